"""Long short-term memory by hand: the layer, its backward pass, and the language model.

The layer (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), for t = 1..T:

    i_t = sigma(W_i x_t + U_i h_{t-1} + b_i)        input gate: what to write
    f_t = sigma(W_f x_t + U_f h_{t-1} + b_f)        forget gate: what to keep
    g_t = tanh (W_g x_t + U_g h_{t-1} + b_g)        what could be written
    o_t = sigma(W_o x_t + U_o h_{t-1} + b_o)        output gate: what to show
    c_t = f_t * c_{t-1} + i_t * g_t                 the cell: a sum, so gradients pass through it unsquashed
    h_t = o_t * tanh(c_t)

weight_ih stacks W_i, W_f, W_g, W_o (torch's order) and weight_hh the U's, so weights of `torch.nn.LSTM` load
(without the `_l0` of their names).

Back-propagation through time. Write dv for the derivative of the loss with respect to v, da for that with
respect to what a gate squashes, and grad_h_t for what the layers above send to h_t. With sigma' = s (1 - s),
tanh' = 1 - tanh^2:

    dh_t = grad_h_t + [U_i; U_f; U_g; U_o]^T da_{t+1}
    do_t = dh_t * tanh(c_t)
    dc_t = dc_{t+1} * f_{t+1} + dh_t * o_t (1 - tanh^2 c_t)
    di_t = dc_t * g_t        df_t = dc_t * c_{t-1}        dg_t = dc_t * i_t
    da_t = [di i (1 - i); df f (1 - f); dg (1 - g^2); do o (1 - o)]_t

Only this recursion is sequential. The weight gradients are one product each over all steps: dW = sum_t da_t
x_t^T, dU = sum_t da_t h_{t-1}^T, db = sum_t da_t. Initial and final states have gradients too.

Where each is:
    i_t, f_t, g_t, o_t, c_t, h_t        LSTM.plain; cell_forward
    dh_t, do_t, dc_t, di_t .. da_t      cell_backward, a line each
    the loops over t; dx, dW, dU, db    LSTMFunction
    forget biases of many time scales   LSTMLM.__init__

Where there is a C compiler, a CPU runs the two cells as csrc/lstm.c has them, as long as both give the same.

    python train.py --model lstm
"""
import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from rnn import RNN, RNNConfig, RNNLM, grad_product, packed_linear, product


# -------------------------------------------------------------------------------------------------- the layer

def cell_forward(gates, from_h, c_before, c, h):
    """The equations of one step. gates [B, 4H] holds W x + b and receives
    i, f, g, o; from_h [B, 4H] is U h_{t-1}; c_before, c, h [B, H]: the last two are written."""
    a_i, a_f, a_g, a_o = (gates + from_h).chunk(4, 1)                       # [B, H] each
    i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
    gates.copy_(torch.cat((i, f, g, o), 1))
    c.copy_(f * c_before + i * g)
    h.copy_(o * torch.tanh(c))


def cell_backward(gates, grad_h, from_next, c_before, c, da, dc):
    """The equations of back-propagation through one step. from_next [B, H] is U^T da_{t+1}; da [B, 4H] is
    written; dc [B, H] holds dc_{t+1} f_{t+1} before and dc_t f_t after."""
    i, f, g, o = gates.chunk(4, 1)                                          # [B, H] each
    tanh_c = torch.tanh(c)
    dh = grad_h + from_next
    do = dh * tanh_c
    dc_t = dc + dh * o * (1 - tanh_c ** 2)
    di, df, dg = dc_t * g, dc_t * c_before, dc_t * i
    da.copy_(torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g ** 2), do * o * (1 - o)), 1))
    dc.copy_(dc_t * f)


class LSTMFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0, c0 [B, H] -> h_1..h_T [T, B, H] and c_T [B, H]. cells:
    cell_forward and cell_backward, or the same in C. Matmuls run in x's dtype; the cell is kept in c0's:
    float32 under bf16 matmuls, because c is a long sum."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, bias, cells):
        T, B, _ = x.shape
        h, c = x.new_empty(T + 1, B, h0.shape[1]), c0.new_empty(T + 1, B, h0.shape[1])
        h[0], c[0] = h0, c0
        gates, linear = product(x, w_ih, bias), packed_linear(w_hh, B, T)  # every input product at once
        for gates_t, h_before, c_before, c_t, h_t in zip(gates, h[:-1], c[:-1], c[1:], h[1:]):
            cells[0](gates_t, linear(h_before), c_before, c_t, h_t)
        ctx.save_for_backward(x, h, c, gates, w_ih, w_hh)
        ctx.cells = cells
        return h[1:], c[T].clone()                   # a view would keep all of c

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        x, h, c, gates, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        grad_h, dc = grad_h.contiguous(), grad_c.clone(memory_format=torch.contiguous_format)
        da, dh = torch.empty_like(gates), torch.zeros_like(grad_h[0])
        linear = packed_linear(w_hh.t(), B, T)
        for gates_t, grad_h_t, c_before, c_t, da_t in reversed(list(zip(gates, grad_h, c[:-1], c[1:], da))):
            ctx.cells[1](gates_t, grad_h_t, dh, c_before, c_t, da_t, dc)
            dh = linear(da_t)
        da = da.view(T * B, 4 * H)
        dx = product(da, w_ih.t()).view_as(x)
        dw_ih = grad_product(da, x.reshape(T * B, -1))
        dw_hh = grad_product(da, h[:-1].reshape(T * B, H))
        return dx, dh, dc, dw_ih, dw_hh, da.sum(0), None


class LSTM(RNN):
    """One layer; parameters as torch.nn.LSTM's, without `_l0`. forward(x [B, T, I], state (h, c) or None) ->
    (out [B, T, H], state (h, c)), h and c [B, H]."""
    n_gates = 4

    def forward(self, x, state=None):
        h, c = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.operands(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        cells = fast_cells(x.device.type, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out, c_last = LSTMFunction.apply(x, h.to(x.dtype), c.to(wide), w_ih, w_hh, bias, cells)
        return out.transpose(0, 1), (out[-1].to(h.dtype), c_last.to(c.dtype))

    def plain(self, x, state=None):
        """The same as forward, the way a textbook writes it; autograd does the backward pass."""
        h, c = self.zero_state(x.shape[0]) if state is None else state
        out = []
        for x_t in x.unbind(1):                                 # [B, I]
            a = x_t @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh
            i, f, g, o = a.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out, 1), (h, c)

    def zero_state(self, batch_size):
        zeros = super().zero_state(batch_size)
        return zeros, zeros.clone()


# ----------------------------------------------------------------------------------------- the language model

LSTMConfig = RNNConfig                                          # the same options


class LSTMLM(RNNLM):
    """RNNLM with LSTM layers whose forget gates start at many time scales: a unit with forget bias log(tau)
    (and bias_hh's small random start) keeps its cell for about tau steps. With tau uniform in 1..MEMORY
    (Tallec & Ollivier 2018, "chrono initialization"), some units remember a sentence from the first step on;
    from torch's biases near 0 they must first learn to."""
    layer_type = LSTM
    MEMORY = 64                                                 # tokens
    # Wide: with the usual 0.1 words look so alike at first that a name's trace drowns before its recall is
    # learned (on `finance`, after 300 steps: 3.04 nats at the repeated name, with 1.0 it is 0.15).
    embed_range = 1.0

    def __init__(self, config):
        super().__init__(config)
        with torch.no_grad():
            for layer in self.layers:
                i, f, _, _ = layer.bias_ih.chunk(4)
                f.copy_(torch.empty_like(f).uniform_(1, self.MEMORY).log())
                i.copy_(-f)                                     # what is kept long is written seldom


# ---------------------------------------------- the cells in C, and how C is called (skip in a first reading)

@functools.lru_cache(None)
def fast_cells(device_type, dtype):
    """The fastest form of (cell_forward, cell_backward) here: in C for float32 and bf16 on a CPU where there
    is a compiler and the C computes what they say (to 2 %); else, as where you changed them, as they are."""
    library = None
    if device_type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        library = compile_c("lstm", *["-DBF16"] * (dtype == torch.bfloat16))
    if library is None:
        return cell_forward, cell_backward

    def in_c(function, n):
        function.argtypes, function.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * n, None
        return lambda *v: function(*v[-1].shape, *[array.data_ptr() for array in v])        # v[-1] is [B, H]
    cells, outcomes = (in_c(library.cell_forward, 5), in_c(library.cell_backward, 7)), []
    for forward, backward in (cell_forward, cell_backward), cells:          # the same numbers in both forms
        gates, from_h, da = (torch.arange(k, k + 24.0).sin().view(2, 12).to(dtype) for k in range(3))
        grad_h, from_next, h = (torch.arange(k, k + 6.0).sin().view(2, 3).to(dtype) for k in range(3))
        c_before, c, dc = (torch.arange(k, k + 6.0).sin().view(2, 3) for k in range(3))
        forward(gates, from_h, c_before, c, h)
        backward(gates, grad_h, from_next, c_before, c, da, dc)
        outcomes.append([v.float() for v in (gates, c, h, da, dc)])
    same = all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*outcomes))
    return cells if same else (cell_forward, cell_backward)


@functools.lru_cache(None)
def compile_c(name, *flags):
    """csrc/NAME.c as a library for this CPU (about 0.3 s, once in a process), or None if there is no compiler
    ($CC chooses it). What is written in C is written in torch operations too: a compiler is never needed."""
    source = Path(__file__).resolve().parent / "csrc" / f"{name}.c"
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", *flags, str(source), "-o"]
    for own in (["-march=native", "-fopenmp"], ["-march=native"], []):      # not every compiler has them
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                library = str(Path(folder, "code.so"))
                command = [*shlex.split(os.environ.get("CC", "cc")), *own, *flags, library]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                return ctypes.CDLL(library)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return None
