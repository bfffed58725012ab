"""Long short-term memory by hand: the layer, its backward pass, and the language model.

The layer (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), for t = 1..T:

    i_t = sigma(W_i x_t + U_i h_{t-1} + b_i)        input gate: what to write
    f_t = sigma(W_f x_t + U_f h_{t-1} + b_f)        forget gate: what to keep
    g_t = tanh (W_g x_t + U_g h_{t-1} + b_g)        what could be written
    o_t = sigma(W_o x_t + U_o h_{t-1} + b_o)        output gate: what to show
    c_t = f_t * c_{t-1} + i_t * g_t                 the cell: a sum, so gradients pass through it unsquashed
    h_t = o_t * tanh(c_t)

weight_ih stacks W_i, W_f, W_g, W_o (torch's order) and weight_hh the U's, so weights of `torch.nn.LSTM` load.

Back-propagation through time. Write dv for the derivative of the loss with respect to v, a for a gate before its
squashing function, and g_t^up for what the layers above send to h_t. With sigma' = s (1 - s), tanh' = 1 - tanh^2:

    dh_t   = g_t^up + [U_i; U_f; U_g; U_o]^T da_{t+1}
    dc_t   = dc_{t+1} * f_{t+1} + dh_t * o_t (1 - tanh^2 c_t)
    da_i,t = dc_t * g_t i_t (1 - i_t)               da_f,t = dc_t * c_{t-1} f_t (1 - f_t)
    da_g,t = dc_t * i_t (1 - g_t^2)                 da_o,t = dh_t * tanh(c_t) o_t (1 - o_t)

Every factor behind dc_t and dh_t is known after the forward pass, for all steps at once; what remains sequential
is five operations a step. The weight gradients are then one product each over all steps: dW = sum_t da_t x_t^T,
dU = sum_t da_t h_{t-1}^T, db = sum_t da_t. Initial and final states have gradients too.

    python train.py --model lstm
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rnn import RNN, RNNConfig, RNNLM


class LSTMFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0, c0 [B, H] -> h_1..h_T [T, B, H] and c_T [B, H].

    c0's dtype is the one the gates and the cell are kept in: float32 under bf16 matmuls, because c is a long sum.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, bias):
        T, B, _ = x.shape
        H = h0.shape[1]
        a = F.linear(x, w_ih, bias)                                     # every input product at once  [T, B, 4H]
        h, c = x.new_empty(T + 1, B, H), c0.new_empty(T + 1, B, H)
        gates, tanh_c = c0.new_empty(T, B, 4 * H), c0.new_empty(T, B, H)
        h[0], c[0] = h0, c0
        i, f, g, o = (v.unbind(0) for v in gates.view(T, B, 4, H).unbind(2))
        hs, cs, all_gates, tanhs, w_hh_t = h.unbind(0), c.unbind(0), gates.unbind(0), tanh_c.unbind(0), w_hh.t()
        a_t = x.new_empty(B, 4 * H)
        a_g = a_t[:, 2 * H:3 * H]
        for t, from_x in enumerate(a.unbind(0)):
            torch.addmm(from_x, hs[t], w_hh_t, out=a_t)
            torch.sigmoid(a_t, out=all_gates[t])                        # one wide operation for four gates,
            torch.tanh(a_g, out=g[t])                                   # then g put right
            torch.mul(f[t], cs[t], out=cs[t + 1]).addcmul_(i[t], g[t])
            torch.tanh(cs[t + 1], out=tanhs[t])
            torch.mul(o[t], tanhs[t], out=hs[t + 1])
        ctx.save_for_backward(x, h, c, gates, tanh_c, w_ih, w_hh)
        return h[1:], c[T].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        x, h, c, gates, tanh_c, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        i, f, g, o = gates.view(T, B, 4, H).unbind(2)
        # the factors of the docstring, for all steps at once: of dc in da_i, da_f, da_g; of dh in da_o; of dh in dc
        of_dc = gates.new_empty(T, B, 3, H)
        torch.mul(i * (1 - i), g, out=of_dc[:, :, 0])
        torch.mul(f * (1 - f), c[:-1], out=of_dc[:, :, 1])
        torch.mul(1 - g * g, i, out=of_dc[:, :, 2])
        of_dh = o * (1 - o) * tanh_c
        into_dc = o * (1 - tanh_c * tanh_c)
        da = x.new_empty(T, B, 4, H)                                    # in the dtype of the matmuls
        da_ifg, da_o, flat = da[:, :, :3].unbind(0), da[:, :, 3].unbind(0), da.view(T, B, 4 * H).unbind(0)
        of_dc, of_dh, into_dc, f, up = (v.unbind(0) for v in (of_dc, of_dh, into_dc, f, grad_h))
        dc = grad_c.clone()
        dc_wide = dc[:, None]                                           # [B, 1, H], a view
        dh = up[T - 1]
        for t in range(T - 1, -1, -1):
            dc.addcmul_(dh.to(dc.dtype), into_dc[t])
            torch.mul(dc_wide, of_dc[t], out=da_ifg[t])
            torch.mul(dh, of_dh[t], out=da_o[t])
            dc.mul_(f[t])
            dh = torch.addmm(up[t - 1], flat[t], w_hh) if t else flat[0] @ w_hh
        da = da.view(T * B, 4 * H)
        return ((da @ w_ih).view_as(x), dh, dc, da.t() @ x.reshape(T * B, -1),
                da.t() @ h[:-1].reshape(T * B, H), da.sum(0))


class LSTM(RNN):
    """One layer; parameters have the names, shapes, gate order and initial distribution of `torch.nn.LSTM`.

    forward(x [B, T, I], state (h, c) or None) -> (out [B, T, H], state (h, c)), h and c [B, H].
    """
    n_gates = 4

    def forward(self, x, state=None):
        if x.shape[1] == 0:
            raise ValueError("a recurrent layer needs at least one time step")
        h, c = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out, c_last = LSTMFunction.apply(x, h.to(x.dtype), c, w_ih, w_hh, bias)
        return out.transpose(0, 1), (out[-1].to(h.dtype), c_last)

    def plain(self, x, state=None):
        """The same as forward, the way a textbook writes it; autograd does the backward pass."""
        h, c = self.zero_state(x.shape[0]) if state is None else state
        out = []
        for x_t in x.unbind(1):                                         # [B, I]
            a = x_t @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh
            i, f, g, o = a.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out, 1), (h, c)

    def zero_state(self, batch_size):
        zeros = super().zero_state(batch_size)
        return zeros, zeros.clone()


LSTMConfig = RNNConfig


class LSTMLM(RNNLM):
    """RNNLM with LSTM layers whose forget gates start at many time scales: a unit with forget bias log(tau) keeps its
    cell for about tau steps. With tau uniform in 1..MEMORY (Tallec & Ollivier 2018, "chrono initialization"), some
    units remember a sentence from the first step on; from torch's biases near 0 they must first learn to."""
    layer_type = LSTM
    MEMORY = 64                                                 # tokens
    # Wide: with the usual 0.1 words look so alike at first that a name's trace drowns before its recall is ever learned
    # (on `finance`, after 300 steps: 3.04 nats at the repeated name, with 1.0 it is 0.15).
    embed_range = 1.0

    def __init__(self, config):
        super().__init__(config)
        with torch.no_grad():
            for layer in self.layers:
                i, f, _, _ = layer.bias_ih.chunk(4)
                f.copy_(torch.empty_like(f).uniform_(1, self.MEMORY).log())
                i.copy_(-f)
