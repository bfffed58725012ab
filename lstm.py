"""Long short-term memory by hand: the layer, its backward pass, and the language model.

The layer (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), for t = 1..T:

    i_t = sigma(W_i x_t + U_i h_{t-1} + b_i)        input gate: what to write
    f_t = sigma(W_f x_t + U_f h_{t-1} + b_f)        forget gate: what to keep
    g_t = tanh (W_g x_t + U_g h_{t-1} + b_g)        what could be written
    o_t = sigma(W_o x_t + U_o h_{t-1} + b_o)        output gate: what to show
    c_t = f_t * c_{t-1} + i_t * g_t                 the cell: a sum, so gradients pass through it unsquashed
    h_t = o_t * tanh(c_t)

weight_ih stacks W_i, W_f, W_g, W_o (torch's order) and weight_hh the U's, so weights of `torch.nn.LSTM` load (without
the `_l0` of their names).

Back-propagation through time. Write dv for the derivative of the loss with respect to v, a for a gate before its
squashing function, and g_t^up for what the layers above send to h_t. With sigma' = s (1 - s), tanh' = 1 - tanh^2:

    dh_t   = g_t^up + [U_i; U_f; U_g; U_o]^T da_{t+1}
    dc_t   = dc_{t+1} * f_{t+1} + dh_t * o_t (1 - tanh^2 c_t)
    da_i,t = dc_t * g_t i_t (1 - i_t)               da_f,t = dc_t * c_{t-1} f_t (1 - f_t)
    da_g,t = dc_t * i_t (1 - g_t^2)                 da_o,t = dh_t * tanh(c_t) o_t (1 - o_t)

Only this recursion is sequential. The weight gradients are one product each over all steps: dW = sum_t da_t x_t^T,
dU = sum_t da_t h_{t-1}^T, db = sum_t da_t. Initial and final states have gradients too.

A step is a matrix product and then a dozen operations on small vectors, where starting each operation costs more than
the arithmetic. Where a C compiler is found, CELL below does all of them in one pass on the CPU; without one, and on a
GPU, torch operations do the same.

    python train.py --model lstm
"""
import ctypes
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rnn import RNN, RNNConfig, RNNLM, compiled

CELL = r"""
#include <stdint.h>
#include <string.h>
#ifdef BF16                                     /* bfloat16 is the upper half of a float32 */
typedef uint16_t num;
static inline float from(num v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline num to(float f) { uint32_t u; memcpy(&u, &f, 4); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }
#else
typedef float num;
static inline float from(num v) { return v; }
static inline num to(float f) { return f; }
#endif

/* e^x = 2^n e^r with n the integer nearest to x / ln 2, so |r| <= ln 2 / 2, where eight terms of the series are exact to
   float32. ln 2 is taken off in two parts (Cody & Waite); adding and taking off 1.5 * 2^23 rounds. NaN stays NaN. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 87 ? 87 : x;
    float n = x * 1.44269504f + 12582912; n -= 12582912;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r / 5040))))));
    uint32_t power = (uint32_t)((int32_t)n + 127) << 23; float two_to_n; memcpy(&two_to_n, &power, 4);
    return p * two_to_n;
}
static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }
static inline float tanh_(float x) { return 1 - 2 / (1 + exponential(2 * x)); }

/* One step of B rows. gates [B, 4H] holds W x_t + b and receives the gates; from_h [B, 4H] is U h_{t-1}; the others are
   [B, H]. The cell is float32 whatever num is, because c is a long sum. */
void cell_forward(long B, long H, num *gates, const num *from_h, const float *c_before, float *c, num *h) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        num *G = gates + 4 * b * H;
        const num *U = from_h + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = sigmoid(from(G[j]) + from(U[j])), f = sigmoid(from(G[H + j]) + from(U[H + j]));
            float g = tanh_(from(G[2 * H + j]) + from(U[2 * H + j])), o = sigmoid(from(G[3 * H + j]) + from(U[3 * H + j]));
            G[j] = to(i), G[H + j] = to(f), G[2 * H + j] = to(g), G[3 * H + j] = to(o);
            c[k] = f * c_before[k] + i * g;
            h[k] = to(o * tanh_(c[k]));
        }
    }
}

/* dh_t = from_above + from_next. dc holds dc_{t+1} f_{t+1} before and dc_t f_t after; da [B, 4H] is written. */
void cell_backward(long B, long H, const num *gates, const num *from_above, const num *from_next, const float *c_before,
                   const float *c, float *dc, num *da) {
    #pragma omp parallel for if (B * H > 2048)
    for (long b = 0; b < B; b++) {
        const num *G = gates + 4 * b * H;
        num *D = da + 4 * b * H;
        #pragma omp simd
        for (long j = 0; j < H; j++) {
            long k = b * H + j;
            float i = from(G[j]), f = from(G[H + j]), g = from(G[2 * H + j]), o = from(G[3 * H + j]), t = tanh_(c[k]);
            float dh = from(from_above[k]) + from(from_next[k]);
            float d = dc[k] + dh * o * (1 - t * t);
            D[j] = to(d * g * i * (1 - i)), D[H + j] = to(d * c_before[k] * f * (1 - f));
            D[2 * H + j] = to(d * i * (1 - g * g)), D[3 * H + j] = to(dh * t * o * (1 - o));
            dc[k] = d * f;
        }
    }
}
"""


@functools.lru_cache(None)
def compiled_cell(device_type, dtype):
    """CELL for dtype as (cell_forward, cell_backward); None where it cannot be: not on a CPU, another dtype, no compiler."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    library = compiled(CELL, *["-DBF16"] * (dtype == torch.bfloat16))
    if library is None:
        return None
    for f, n_arrays in ((library.cell_forward, 5), (library.cell_backward, 7)):
        f.argtypes, f.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * n_arrays, None
    return library.cell_forward, library.cell_backward


def addresses(v):
    """Where the steps of a contiguous [T, ...] tensor begin in memory."""
    return range(v.data_ptr(), v.data_ptr() + v.nbytes, v.nbytes // len(v))


class LSTMFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0, c0 [B, H] -> h_1..h_T [T, B, H] and c_T [B, H].

    Matmuls run in x's dtype; the cell is kept in c0's: float32 under bf16 matmuls, because c is a long sum.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, bias):
        T, B, _ = x.shape
        H = h0.shape[1]
        a = F.linear(x, w_ih, bias)                                     # every input product at once  [T, B, 4H]
        h, c = x.new_empty(T + 1, B, H), c0.new_empty(T + 1, B, H)
        h[0], c[0] = h0, c0
        hs, a_t = h.unbind(0), x.new_empty(B, 4 * H)
        w_hh_t = w_hh.t().contiguous() if x.dtype == torch.float32 else w_hh.t()    # MKL is 1.3 times as fast with it
        cell = compiled_cell(x.device.type, x.dtype)
        if cell:
            gates, from_h = a, a_t.data_ptr()                           # written over what they are made of
            for h_before, gates_t, c_before, c_t, h_t in zip(hs, *map(addresses, (gates, c[:-1], c[1:], h[1:]))):
                torch.mm(h_before, w_hh_t, out=a_t)
                cell[0](B, H, gates_t, from_h, c_before, c_t, h_t)
        else:
            gates, tanh_c = c0.new_empty(T, B, 4 * H), c0.new_empty(B, H)
            i, f, g, o = (v.unbind(0) for v in gates.view(T, B, 4, H).unbind(2))
            cs, all_gates, a_g = c.unbind(0), gates.unbind(0), a_t[:, 2 * H:3 * H]
            for t, from_x in enumerate(a.unbind(0)):
                torch.addmm(from_x, hs[t], w_hh_t, out=a_t)
                torch.sigmoid(a_t, out=all_gates[t])                    # one wide operation for four gates,
                torch.tanh(a_g, out=g[t])                               # then g put right
                torch.mul(f[t], cs[t], out=cs[t + 1]).addcmul_(i[t], g[t])
                torch.tanh(cs[t + 1], out=tanh_c)
                torch.mul(o[t], tanh_c, out=hs[t + 1])
        ctx.save_for_backward(x, h, c, gates, w_ih, w_hh)
        return h[1:], c[T].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        x, h, c, gates, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        da, dh = x.new_empty(T, B, 4 * H), x.new_zeros(B, H)
        dc = grad_c.clone(memory_format=torch.contiguous_format)        # the cell in C reads it row by row
        flat = da.unbind(0)
        cell = compiled_cell(x.device.type, x.dtype)
        if cell:
            up, from_next, dc_at = grad_h.contiguous(), dh.data_ptr(), dc.data_ptr()
            steps = zip(flat, *map(addresses, (gates, up, c[:-1], c[1:], da)))
            for da_t, gates_t, from_above, c_before, c_t, da_at in reversed(list(steps)):
                cell[1](B, H, gates_t, from_above, from_next, c_before, c_t, dc_at, da_at)
                torch.mm(da_t, w_hh, out=dh)
        else:
            # the factors of the docstring, for all steps at once: of dc in da_i, da_f, da_g; of dh in da_o; of dh in dc
            i, f, g, o = gates.view(T, B, 4, H).unbind(2)
            of_dc = gates.new_empty(T, B, 3, H)
            torch.mul(i * (1 - i), g, out=of_dc[:, :, 0])
            torch.mul(f * (1 - f), c[:-1], out=of_dc[:, :, 1])
            torch.mul(1 - g * g, i, out=of_dc[:, :, 2])
            tanh_c = torch.tanh(c[1:])
            of_dh = o * (1 - o) * tanh_c
            into_dc = o * (1 - tanh_c * tanh_c)
            da_ifg, da_o = (v.unbind(0) for v in da.view(T, B, 4, H).split([3, 1], 2))
            of_dc, of_dh, into_dc, f, up = (v.unbind(0) for v in (of_dc, of_dh, into_dc, f, grad_h))
            dc_wide = dc[:, None]                                       # [B, 1, H], a view
            for t in range(T - 1, -1, -1):
                dh = up[t] + dh
                dc.addcmul_(dh.to(dc.dtype), into_dc[t])
                torch.mul(dc_wide, of_dc[t], out=da_ifg[t])
                torch.mul(dh, of_dh[t], out=da_o[t][:, 0])
                dc.mul_(f[t])
                dh = flat[t] @ w_hh
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
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            out, c_last = LSTMFunction.apply(x, h.to(x.dtype), c.to(wide), w_ih, w_hh, bias)
        return out.transpose(0, 1), (out[-1].to(h.dtype), c_last.to(c.dtype))

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
