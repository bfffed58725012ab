"""Long short-term memory by hand: the layer, its backward pass, and the language model.

The layer (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), for t = 1..T:

    i_t = sigma(W_i x_t + U_i h_{t-1} + b_i)        input gate: how much to write
    f_t = sigma(W_f x_t + U_f h_{t-1} + b_f)        forget gate: how much to keep
    g_t = tanh (W_g x_t + U_g h_{t-1} + b_g)        candidate: what to write
    o_t = sigma(W_o x_t + U_o h_{t-1} + b_o)        output gate: how much to show
    c_t = f_t * c_{t-1} + i_t * g_t                 the cell
    h_t = o_t * tanh(c_t)

From c_t back to c_{t-1} a gradient is only multiplied by f_t, with no matrix and no tanh' between. Where the
forget gate is near 1 it survives many steps, which an RNN's does not (rnn.py).

weight_ih stacks W_i, W_f, W_g, W_o (torch's order) and weight_hh the U's, so weights of `torch.nn.LSTM` load
(without the `_l0` of their names).

Back-propagation through time. Write dv for the derivative of the loss with respect to v, a for the argument
of a gate (W x + U h + b), and grad_h_t for the gradient that the layers above send to h_t. With sigma' =
sigma (1 - sigma) and tanh' = 1 - tanh^2:

    dh_t = grad_h_t + [U_i; U_f; U_g; U_o]^T da_{t+1}
    do_t = dh_t * tanh(c_t)
    dc_t = dc_{t+1} * f_{t+1} + dh_t * o_t (1 - tanh^2 c_t)
    di_t = dc_t * g_t        df_t = dc_t * c_{t-1}        dg_t = dc_t * i_t
    da_t = [di i (1 - i); df f (1 - f); dg (1 - g^2); do o (1 - o)]_t

Only this recursion is sequential. The weight gradients are one product each over all steps: dW = sum_t da_t
x_t^T, dU = sum_t da_t h_{t-1}^T, db = sum_t da_t. Initial and final states have gradients, too.

Where to find what:
    i_t, f_t, g_t, o_t, c_t, h_t        LSTM.plain; cell_forward
    dh_t, do_t, dc_t, di_t .. da_t      cell_backward, a line each
    the loops over t; dx, dW, dU, db    LSTMFunction
    forget biases of many time scales   LSTMLM.__init__

On a CPU with a C compiler, cell_forward and cell_backward run in C (fast/cells.c), if the C gives the same
results as the functions below.

    python train.py --model lstm
"""
import torch
from torch.autograd.function import once_differentiable

from fast.cells import fast_cells
from fast.products import grad_product, packed_linear, product
from rnn import RNN, RNNConfig, RNNLM


# -------------------------------------------------------------------------------------------------- the layer

class LSTM(RNN):
    """One layer. forward(x [B, T, I], state (h, c) or None) -> (out [B, T, H], state (h, c)), h and c [B, H].
    The parameters are those of torch.nn.LSTM, without `_l0` in their names."""
    n_gates = 4

    def plain(self, x, state=None):
        """The layer as a textbook writes it; autograd finds the gradient."""
        h, c = self.zero_state(x.shape[0]) if state is None else state
        out = []
        for x_t in x.unbind(1):                                 # [B, I]
            a = x_t @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh
            i, f, g, o = a.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out, 1), (h, c)

    def forward(self, x, state=None):
        """The same as plain, by LSTMFunction, with its gradient written out."""
        h, c = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.cast_inputs(x)
        cell_dtype = torch.promote_types(x.dtype, torch.float32)
        cells = fast_cells(cell_forward, cell_backward, x.device.type, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out, c_last = LSTMFunction.apply(x, h.to(x.dtype), c.to(cell_dtype), w_ih, w_hh, bias, cells)
        return out.transpose(0, 1), (out[-1].to(h.dtype), c_last.to(c.dtype))

    def zero_state(self, batch_size):
        zeros = super().zero_state(batch_size)
        return zeros, zeros.clone()


def cell_forward(gates, from_h, c_before, c, h):
    """The equations of one step, as in LSTM.plain. It works in place, because its twin in C does: gates [B,
    4H] holds W x_t + b when the step begins, and i, f, g, o when it ends. from_h [B, 4H] is U h_{t-1}.
    c_before, c and h are [B, H]; c and h are written."""
    a_i, a_f, a_g, a_o = (gates + from_h).chunk(4, 1)                       # [B, H] each
    i, f, g, o = torch.sigmoid(a_i), torch.sigmoid(a_f), torch.tanh(a_g), torch.sigmoid(a_o)
    gates.copy_(torch.cat((i, f, g, o), 1))
    c.copy_(f * c_before + i * g)
    h.copy_(o * torch.tanh(c))


def cell_backward(gates, grad_h, from_next, c_before, c, da, dc):
    """The equations of back-propagation through one step. gates [B, 4H] holds i, f, g, o. from_next [B, H] is
    U^T da_{t+1}. da [B, 4H] is written. dc [B, H] holds dc_{t+1} f_{t+1} before, and dc_t f_t after."""
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
    cell_forward and cell_backward, or the same in C. Products run in x's dtype. The cell is kept in c0's,
    float32 under bfloat16 products, because c is a long sum."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, bias, cells):
        step_forward, _ = cells                             # cell_forward, or the same in C
        T, B, _ = x.shape
        h, c = x.new_empty(T + 1, B, h0.shape[1]), c0.new_empty(T + 1, B, h0.shape[1])
        h[0], c[0] = h0, c0
        gates = product(x, w_ih, bias)                      # W x_t + b for all t; step_forward makes it gates
        times_u = packed_linear(w_hh, B, T)
        for gates_t, h_before, c_before, c_t, h_t in zip(gates, h[:-1], c[:-1], c[1:], h[1:]):
            step_forward(gates_t, times_u(h_before), c_before, c_t, h_t)        # U h_{t-1}: the recurrence
        ctx.save_for_backward(x, h, c, gates, w_ih, w_hh)
        ctx.cells = cells
        return h[1:], c[T].clone()                          # a view would keep c of all steps in memory

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        x, h, c, gates, w_ih, w_hh = ctx.saved_tensors
        _, step_backward = ctx.cells
        T, B, H = grad_h.shape
        grad_h, dc = grad_h.contiguous(), grad_c.clone(memory_format=torch.contiguous_format)
        da, from_next = torch.empty_like(gates), torch.zeros_like(grad_h[0])
        times_u_transposed = packed_linear(w_hh.t(), B, T)
        for gates_t, grad_h_t, c_before, c_t, da_t in reversed(list(zip(gates, grad_h, c[:-1], c[1:], da))):
            step_backward(gates_t, grad_h_t, from_next, c_before, c_t, da_t, dc)
            from_next = times_u_transposed(da_t)            # U^T da_t: what the step before receives
        da = da.view(T * B, 4 * H)
        dx = product(da, w_ih.t()).view_as(x)
        dw_ih = grad_product(da, x.reshape(T * B, -1))
        dw_hh = grad_product(da, h[:-1].reshape(T * B, H))
        return dx, from_next, dc, dw_ih, dw_hh, da.sum(0), None


# ----------------------------------------------------------------------------------------- the language model

LSTMConfig = RNNConfig                                          # the same options


class LSTMLM(RNNLM):
    """RNNLM with LSTM layers whose forget gates start at many time scales: a unit with forget bias log(tau)
    keeps its cell for about tau steps, because sigma(log tau) = 1 - 1 / (tau + 1). With tau uniform in
    1..MEMORY (Tallec & Ollivier 2018, "chrono initialization"), some units remember a sentence from the start
    of the training. With torch's biases near 0 they must first learn to."""
    layer_type = LSTM
    MEMORY = 64                                                 # tokens
    # With the usual 0.1 the vectors of words are so alike at first that a name is lost before its recall is
    # learned (`finance` after 300 steps: 3.04 nats at a name that must be repeated, and 0.15 with 1.0; a
    # guess among the 20 names costs ln 20 = 3.00).
    embed_range = 1.0

    def __init__(self, config):
        super().__init__(config)
        with torch.no_grad():
            for layer in self.layers:
                i, f, _, _ = layer.bias_ih.chunk(4)
                f.copy_(torch.empty_like(f).uniform_(1, self.MEMORY).log())
                i.copy_(-f)                                     # a unit that keeps long writes seldom
