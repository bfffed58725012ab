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
    i_t, f_t, g_t, o_t, c_t, h_t        LSTM.plain; forward_loop
    dh_t, do_t, dc_t, di_t .. da_t      backward_loop, a line each
    dx, dW, dU, db                      LSTMFunction.backward, after the loop
    forget biases of many time scales   LSTMLM.__init__

Where there is a C compiler, a CPU runs the last section's form of forward_loop and backward_loop, whose cell
is in C; tests hold the two forms equal. Elsewhere the equations are run as they are.

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
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rnn import RNN, RNNConfig, RNNLM


# -------------------------------------------------------------------------------------------------- the layer

def forward_loop(a, h, c, w_hh):
    """The equations of a layer, step by step (to change them, see LSTM.forward). a [T, B, 4H]: W x + b for
    all steps; h, c [T + 1, B, H]: the initial state in h[0], c[0], the others are written; w_hh [4H, H]. ->
    gates i, f, g, o [T, B, 4H]."""
    gates = torch.empty_like(a)
    for t in range(len(a)):
        a_i, a_f, a_g, a_o = (a[t] + h[t] @ w_hh.t()).chunk(4, 1)           # [B, H] each
        i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
        c[t + 1] = f * c[t] + i * g
        h[t + 1] = o * torch.tanh(c[t + 1])
        gates[t] = torch.cat((i, f, g, o), 1)
    return gates


def backward_loop(grad_h, dc_next, gates, c, w_hh):
    """The equations of back-propagation through time, from the last step to the first. grad_h [T, B, H];
    dc_next [B, H]: the gradient of the last cell, then dc_{t+1} f_{t+1}; c[t] is c_{t-1}. -> da [T, B, 4H],
    and the gradients of the initial state, dh and dc [B, H]."""
    da, dh = torch.empty_like(gates), torch.zeros_like(grad_h[0])
    for t in reversed(range(len(gates))):
        i, f, g, o = gates[t].chunk(4, 1)                                   # [B, H] each
        tanh_c = torch.tanh(c[t + 1])
        dh = grad_h[t] + dh
        do = dh * tanh_c
        dc = dc_next + dh * o * (1 - tanh_c ** 2)
        di, df, dg = dc * g, dc * c[t], dc * i
        da[t] = torch.cat((di * i * (1 - i), df * f * (1 - f), dg * (1 - g ** 2), do * o * (1 - o)), 1)
        dc_next = dc * f
        dh = da[t] @ w_hh
    return da, dh, dc_next


class LSTMFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0, c0 [B, H] -> h_1..h_T [T, B, H] and c_T [B, H].

    `loops` are forward_loop and backward_loop, or a faster form of them (the last section of this file).
    Matmuls run in x's dtype; the cell is kept in c0's: float32 under bf16 matmuls, because c is a long sum.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, bias, loops):
        T, B, _ = x.shape
        h, c = x.new_empty(T + 1, B, h0.shape[1]), c0.new_empty(T + 1, B, h0.shape[1])
        h[0], c[0] = h0, c0
        gates = loops[0](F.linear(x, w_ih, bias), h, c, w_hh)               # every input product at once
        ctx.save_for_backward(x, h, c, gates, w_ih, w_hh)
        ctx.loops = loops
        return h[1:], c[T].clone()                   # a view would keep all of c

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        x, h, c, gates, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        da, dh, dc = ctx.loops[1](grad_h, grad_c, gates, c, w_hh)
        da = da.view(T * B, 4 * H)
        dx = (da @ w_ih).view_as(x)
        dw_ih = da.t() @ x.reshape(T * B, -1)
        dw_hh = da.t() @ h[:-1].reshape(T * B, H)
        return dx, dh, dc, dw_ih, dw_hh, da.sum(0), None


class LSTM(RNN):
    """One layer; parameters have the names, shapes, gate order and initial distribution of `torch.nn.LSTM`.

    forward(x [B, T, I], state (h, c) or None) -> (out [B, T, H], state (h, c)), h and c [B, H].
    """
    n_gates = 4

    def forward(self, x, state=None):
        h, c = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.operands(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        loops = fast_loops(x.device.type, x.dtype)     # changed them? (forward_loop, backward_loop)
        with torch.autocast(x.device.type, enabled=False):
            out, c_last = LSTMFunction.apply(x, h.to(x.dtype), c.to(wide), w_ih, w_hh, bias, loops)
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
                i.copy_(-f)


# ----------------------------------------------- the same loops, with the cell in C (skip in a first reading)
#
# A step is a matrix product and then a dozen operations on small vectors, where starting an operation costs
# more than its arithmetic. LSTM_CELL_C does all of them in one pass over memory.

C_NUMBERS = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
static inline float bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
#ifdef BF16                                     /* bfloat16 is the upper half of a float32 */
typedef uint16_t scalar_t;
static inline float load(scalar_t v) { return bits((uint32_t)v << 16); }
static inline scalar_t store(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
#else
typedef float scalar_t;
static inline float load(scalar_t v) { return v; }
static inline scalar_t store(float f) { return f; }
#endif

/* e^x = 2^n e^r with n the integer nearest to x / ln 2, so |r| <= ln 2 / 2, where eight terms of the series
   are exact to float32. ln 2 is taken off in two parts (Cody & Waite); adding and taking off 1.5 * 2^23
   rounds. NaN stays NaN. (If x is limited on both sides at once, gcc makes branches, and no vectors.) */
static inline float exponential(float x) {
    x = x > 87 ? 87 : x;
    float n = x * 1.44269504f + 12582912; n -= 12582912;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f
              + r * (1 / 120.f + r * (1 / 720.f + r / 5040))))));
    return x < -87 ? 0 : p * bits((uint32_t)((int32_t)n + 127) << 23);
}
"""

LSTM_CELL_C = C_NUMBERS + r"""
static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }
static inline float tanh_(float x) { return 1 - 2 / (1 + exponential(2 * x)); }

/* One step of B rows. gates [B, 4H] holds W x_t + b and receives the gates; from_h [B, 4H] is U h_{t-1}; the
   others are [B, H]. The cell is float32 whatever scalar_t is, because c is a long sum. */
void cell_forward(long B, long H, scalar_t *gates, const scalar_t *from_h, const float *c_before, float *c,
                  scalar_t *h) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        scalar_t *G = gates + 4 * b * H;
        const scalar_t *U = from_h + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = sigmoid(load(G[j]) + load(U[j])), f = sigmoid(load(G[H + j]) + load(U[H + j]));
            float g = tanh_(load(G[2 * H + j]) + load(U[2 * H + j]));
            float o = sigmoid(load(G[3 * H + j]) + load(U[3 * H + j]));
            G[j] = store(i), G[H + j] = store(f), G[2 * H + j] = store(g), G[3 * H + j] = store(o);
            c[k] = f * c_before[k] + i * g;
            h[k] = store(o * tanh_(c[k]));
        }
    }
}

/* dh_t = grad_h + from_next. dc holds dc_{t+1} f_{t+1} before and dc_t f_t after; da [B, 4H] is written. */
void cell_backward(long B, long H, const scalar_t *gates, const scalar_t *grad_h, const scalar_t *from_next,
                   const float *c_before, const float *c, float *dc, scalar_t *da) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        const scalar_t *G = gates + 4 * b * H;
        scalar_t *D = da + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = load(G[j]), f = load(G[H + j]), g = load(G[2 * H + j]), o = load(G[3 * H + j]);
            float t = tanh_(c[k]), dh = load(grad_h[k]) + load(from_next[k]);
            float d = dc[k] + dh * o * (1 - t * t);
            D[j] = store(d * g * i * (1 - i)), D[H + j] = store(d * c_before[k] * f * (1 - f));
            D[2 * H + j] = store(d * i * (1 - g * g)), D[3 * H + j] = store(dh * t * o * (1 - o));
            dc[k] = d * f;
        }
    }
}
"""


def addresses(v):
    """Where the steps of a contiguous [T, ...] tensor begin in memory."""
    return range(v.data_ptr(), v.data_ptr() + v.nbytes, v.nbytes // len(v))


def packed_linear(weight, rows):
    """The function x [rows, K] -> x W^T, W [N, K]. The library reorders W for its kernels in every product;
    here that is done once for all steps, where torch has (private) operations for it. A step's product, 32 x
    512 by 512 x 2048: 258 us to 183 in float32, 87 to 55 in bfloat16."""
    onednn = torch.backends.mkldnn.is_available()
    if onednn and weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, rows)
    if onednn and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def c_forward_loop(cell, gates, h, c, w_hh):
    """gates [T, B, 4H] holds W x + b and is overwritten."""
    B, H = h.shape[1:]
    linear = packed_linear(w_hh, B) if len(gates) > 1 else functools.partial(F.linear, weight=w_hh)
    steps = zip(h.unbind(0), *map(addresses, (gates, c[:-1], c[1:], h[1:])))
    for h_before, gates_t, c_before, c_t, h_t in steps:
        from_h = linear(h_before)                               # named, so that it outlives the call
        cell(B, H, gates_t, from_h.data_ptr(), c_before, c_t, h_t)
    return gates


def c_backward_loop(cell, grad_h, dc, gates, c, w_hh):
    T, B, H = grad_h.shape
    grad_h, dc = grad_h.contiguous(), dc.clone(memory_format=torch.contiguous_format)
    da, dh = grad_h.new_empty(T, B, 4 * H), grad_h.new_zeros(B, H)
    linear = packed_linear(w_hh.t().contiguous(), B)
    steps = list(zip(da.unbind(0), *map(addresses, (gates, grad_h, c[:-1], c[1:], da))))
    for da_t, gates_t, grad_h_t, c_before, c_t, da_at in reversed(steps):
        cell(B, H, gates_t, grad_h_t, dh.data_ptr(), c_before, c_t, dc.data_ptr(), da_at)
        dh = linear(da_t)
    return da, dh, dc


@functools.lru_cache(None)
def fast_loops(device_type, dtype):
    """The fastest form of (forward_loop, backward_loop) here: with the cell in C for float32 and bf16 on a
    CPU where there is a compiler, else the equations as they are."""
    library = None
    if device_type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        library = compile_c(LSTM_CELL_C, *["-DBF16"] * (dtype == torch.bfloat16))
    if library is None:
        return forward_loop, backward_loop
    for function, n_arrays in ((library.cell_forward, 5), (library.cell_backward, 7)):
        function.argtypes, function.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * n_arrays, None
    return (functools.partial(c_forward_loop, library.cell_forward),
            functools.partial(c_backward_loop, library.cell_backward))


@functools.lru_cache(None)
def compile_c(source, *flags):
    """A library made of C source for this CPU (about 0.3 s, once in a process), or None if there is no
    compiler. $CC chooses it. What is written in C here is written in torch operations too: a compiler is
    never needed."""
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", *flags]
    for own in (["-march=native", "-fopenmp"], ["-march=native"], []):      # not every compiler has them
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                code, library = Path(folder, "code.c"), Path(folder, "code.so")
                code.write_text(source)
                compiler = shlex.split(os.environ.get("CC", "cc"))
                subprocess.run([*compiler, *flags, *own, str(code), "-o", str(library)], check=True,
                               capture_output=True, timeout=60)
                return ctypes.CDLL(str(library))
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return None
