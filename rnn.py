"""A recurrent neural network by hand: the Elman layer, its backward pass, and a language model on top.

The layer (Elman 1990), for t = 1..T, with x_t in R^I, h_t in R^H:

    h_t = tanh(a_t),    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh

Back-propagation through time (Werbos 1990). Let dh_t be the derivative of the loss with respect to h_t. It
has two parts: what the layers above send down at time t (grad_h[t] in the code), and what the next step sends
back:

    dh_t = grad_h_t + W_hh^T da_{t+1}        da_t = dh_t * (1 - h_t^2)        (tanh' = 1 - tanh^2)

The recursion runs from T down to 1 and only it is sequential. Everything else is one product over all steps:

    dx_t = W_ih^T da_t     dW_ih = sum_t da_t x_t^T     dW_hh = sum_t da_t h_{t-1}^T     db = sum_t da_t

`RNN.plain` is the textbook loop (autograd finds the gradient); `RNNFunction` is the same forward with the
recursion above written out, the input product hoisted out of the loop and the weight gradients taken in one
matmul each. A test holds them equal to each other and to `torch.nn.RNN`.

The language model `RNNLM` predicts the next token: embedding -> layers -> softmax over the vocabulary, with
the regularisation that word-level corpora need (Gal & Ghahramani 2016; Merity et al. 2018; Press & Wolf
2017): whole words dropped from the embedding, one dropout mask for all time steps, embedding and softmax
weights shared.

Where each is:
    h_t                                 RNN.plain; RNNFunction.forward, the loop
    dh_t, da_t                          RNNFunction.backward, the loop
    dx, dW_ih, dW_hh, db                RNNFunction.backward, after the loop
    the loss and softmax - onehot       softmax_loss, LinearCrossEntropy; token_nll (evaluation)
    words, masks, elements dropped      embedded_dropout, locked_dropout, dropout
    x W^T, g^T x, many x W^T + y        product, grad_product, packed_linear (last: how a CPU is fast)

    python train.py --model rnn                      # trains it; see train.py
"""
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def compute_dtype(x):
    """The dtype matmuls should run in: autocast's where it is on, else that of the tensor x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# -------------------------------------------------------------------------------------------------- the layer

class RNNFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0 [B, H] -> h_1..h_T [T, B, H] (the last one is the state)."""

    @staticmethod
    def forward(ctx, x, h0, w_ih, w_hh, bias):
        T, B, _ = x.shape
        a = product(x, w_ih, bias)                              # every input product at once  [T, B, H]
        h = x.new_empty(T + 1, B, w_hh.shape[0])
        h[0] = h0
        steps, linear = h.unbind(0), packed_linear(w_hh, B, T, plus=True)
        for t, a_t in enumerate(a.unbind(0)):
            torch.tanh(linear(steps[t], a_t), out=steps[t + 1])             # tanh(W_hh h_{t-1} + a_t)
        ctx.save_for_backward(x, h, w_ih, w_hh)
        return h[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        x, h, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        slope = 1 - h[1:] * h[1:]                               # tanh' for all steps at once
        da = torch.empty_like(slope)
        grad_h, slope, steps = grad_h.unbind(0), slope.unbind(0), da.unbind(0)
        dh, linear = grad_h[T - 1], packed_linear(w_hh.t(), B, T, plus=True)
        for t in reversed(range(T)):
            torch.mul(dh, slope[t], out=steps[t])
            dh = linear(steps[t], grad_h[t - 1]) if t else steps[0] @ w_hh  # W_hh^T da_t + grad_h_{t-1}
        da = da.view(T * B, H)
        dx = product(da, w_ih.t()).view_as(x)
        dw_ih = grad_product(da, x.reshape(T * B, -1))
        dw_hh = grad_product(da, h[:-1].reshape(T * B, H))
        return dx, dh, dw_ih, dw_hh, da.sum(0)


class RNN(nn.Module):
    """One Elman layer; parameters as torch.nn.RNN's, without `_l0`. forward(x [B, T, I], state h [B, H] or
    None) -> (out [B, T, H], state h [B, H])."""
    n_gates = 1                                     # blocks of hidden_size rows in the weights; an LSTM has 4

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        rows = self.n_gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        for p in self.parameters():
            nn.init.uniform_(p, -hidden_size ** -0.5, hidden_size ** -0.5)

    def operands(self, x):
        """x time-major, the weights and the sum of the biases, all in the dtype to compute in."""
        if x.shape[1] == 0:
            raise ValueError("a recurrent layer needs at least one time step")
        x = x.transpose(0, 1).contiguous()             # a matmul of strided rows takes up to 30 times as long
        dtype, bias = compute_dtype(x), self.bias_ih + self.bias_hh
        return [v.to(dtype) for v in (x, self.weight_ih, self.weight_hh, bias)]

    def forward(self, x, state=None):
        state = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out = RNNFunction.apply(x, state.to(x.dtype), w_ih, w_hh, bias)
        return out.transpose(0, 1), out[-1].to(state.dtype)

    def plain(self, x, state=None):
        """The same as forward, the way a textbook writes it; autograd does the backward pass."""
        h = self.zero_state(x.shape[0]) if state is None else state
        out = []
        for x_t in x.unbind(1):                                 # [B, I]
            h = torch.tanh(x_t @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh)
            out.append(h)
        return torch.stack(out, 1), h

    def zero_state(self, batch_size):
        return self.weight_hh.new_zeros(batch_size, self.hidden_size)


# ------------------------------------------------------------------------------------------- softmax and loss

MOST_LOGITS, FEWEST_ROWS = 1 << 23, 512         # of a chunk; for each all of W is read, so few rows are slow


def logit_chunks(hidden, weight, bias, *others):
    """Rows of hidden [N, D] and of the tensors in `others`, a chunk at a time, each with its logits
    hidden W^T + b. Yields (logits, hidden, *others)."""
    N, V, most = len(hidden), len(weight), MOST_LOGITS * (32 if hidden.is_cuda else 1)
    n = max(1, min(-(-N * V // most), N // FEWEST_ROWS))
    for h, *parts in zip(*(v.chunk(n) for v in (hidden, *others))):
        yield product(h, weight, bias), h, *parts


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy of softmax(hidden W^T + b), with its gradient, in chunks of rows.

    The gradient with respect to the logits is softmax - onehot(target), so it can be formed in the forward
    pass and multiplied out at once: the [N, V] logits of a large batch or vocabulary never exist together.
    hidden [N, D], weight [V, D], bias [V] or None, targets [N] (-1: ignored) -> float32 scalar, in nats.
    Matmuls run in hidden's dtype; sums and the softmax in float32 (float64 where hidden is).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        acc = torch.promote_types(hidden.dtype, torch.float32)
        w, b = (v if v is None else v.to(hidden.dtype) for v in (weight, bias))
        total = torch.zeros((), dtype=acc, device=hidden.device)
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), None, None
        for logits, h, d_h, y in logit_chunks(hidden, w, b, d_hidden, targets):
            row, target, keep = torch.arange(len(y), device=y.device), y.clamp(min=0), y >= 0
            p = torch.softmax(logits, -1, out=logits)                   # float32 inside, whatever the dtype
            p_target = p[row, target].to(acc)
            total -= (p_target.clamp(min=1e-38).log() * keep).sum()   # the clamp: at most 87 nats are counted
            p[row, target] = (p_target - 1).to(p.dtype)                 # softmax - onehot, in place of p
            if not keep.all():
                p.masked_fill_(~keep[:, None], 0.0)
            d_h.copy_(product(p, w.t()))
            part = grad_product(p, h) if len(h) == len(hidden) else grad_product(p, h).to(acc)
            d_weight = part if d_weight is None else d_weight.add_(part)
            if b is not None:
                part = p.sum(0).to(acc)                                # summed in float32, whatever the dtype
                d_bias = part if d_bias is None else d_bias.add_(part)
        ctx.grads = d_hidden, d_weight, d_bias
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (d_hidden, d_weight, d_bias), ctx.grads = ctx.grads, None       # scaled in place: usable once
        return d_hidden.mul_(grad), d_weight.mul_(grad), None if d_bias is None else d_bias.mul_(grad), None


@torch.no_grad()
def token_nll(hidden, weight, bias, targets):
    """-log softmax(hidden W^T + b)[target], float32 [N] in nats, 0 where the target is -1; no gradient."""
    w, b = (v if v is None else v.to(hidden.dtype) for v in (weight, bias))
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for logits, _, y, out in logit_chunks(hidden, w, b, targets, nll):
        at_target = logits.gather(1, y.clamp(min=0)[:, None])[:, 0].float()
        out.copy_(torch.logsumexp(logits.float(), -1) - at_target)
    return nll.masked_fill_(targets < 0, 0.0)


def softmax_loss(hidden, head, targets, reduction="mean"):
    """How badly softmax(head(hidden)) predicts the targets, in nats per token; targets of -1 are ignored.
    hidden [B, T, D], head an nn.Linear(D, V), targets [B, T] -> "mean": a scalar with its gradient; "none":
    float32 [B, T], 0 where ignored, for evaluation: without a gradient."""
    flat, y = hidden.to(compute_dtype(hidden)).flatten(0, -2), targets.flatten()
    with torch.autocast(hidden.device.type, enabled=False):
        if reduction == "none":
            return token_nll(flat, head.weight, head.bias, y).view(targets.shape)
        return LinearCrossEntropy.apply(flat, head.weight, head.bias, y) / (y >= 0).sum()


# ---------------------------------------------------------------------------------------------------- dropout

def locked_dropout(x, p, training):
    """Dropout with one mask for all time steps of a row (Gal & Ghahramani 2016). x [B, T, D]."""
    if not training or p == 0:
        return x
    return x * x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - p).div_(1 - p)


def dropout(x, p, training):
    """Dropout of single elements, as nn.Dropout. A CPU draws random bits slowly, so each 64-bit draw serves
    eight elements: p is rounded to a 256th, and survivors are scaled by what is kept in truth."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-2 ** 63, None)
    cut = min(255, round(p * 256))
    keep = (drawn.view(torch.uint8)[:x.numel()] >= cut).view(x.shape)
    return x * keep * (256 / (256 - cut))


def embedded_dropout(embedding, tokens, p, training):
    """Embed tokens [B, T] with words of the vocabulary dropped, each wherever it occurs (Merity et al.)."""
    x = embedding(tokens)
    if not training or p == 0:
        return x
    keep = x.new_empty(embedding.num_embeddings).bernoulli_(1 - p).div_(1 - p)
    return x * keep[tokens][..., None]


# ----------------------------------------------------------------------------------------- the language model

@dataclass
class RNNConfig:
    """Sizes and dropouts of a recurrent language model. With `tied`, the last layer is n_embd wide."""
    vocab_size: int
    n_embd: int = 200
    n_hidden: int = 200
    n_layer: int = 2
    dropout: float = 0.0            # after the last layer, one mask for all time steps
    dropout_hidden: float = 0.0     # between layers, likewise
    dropout_input: float = 0.0      # after the embedding, likewise
    dropout_embed: float = 0.0      # words of the vocabulary, wherever they occur in the batch
    tied: bool = True


class RNNLM(nn.Module):
    """Embedding (embed_tokens), a stack of recurrent layers, softmax (lm_head). Three members, as every model
    here has: forward, init_state and logits."""
    layer_type = RNN
    recurrent = True
    embed_range = 0.1                                           # embeddings start uniform in +- this

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        sizes = [c.n_embd] + [c.n_hidden] * (c.n_layer - 1) + [c.n_embd if c.tied else c.n_hidden]
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(self.layer_type(i, o) for i, o in zip(sizes, sizes[1:]))
        self.lm_head = nn.Linear(sizes[-1], c.vocab_size)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        nn.init.uniform_(self.embed_tokens.weight, -self.embed_range, self.embed_range)
        if not c.tied:
            nn.init.uniform_(self.lm_head.weight, -0.1, 0.1)
        nn.init.zeros_(self.lm_head.bias)

    def init_state(self, batch_size, max_len=None):
        """The state before the first token: zeros. A recurrent state has one size, whatever max_len."""
        return [layer.zero_state(batch_size) for layer in self.layers]

    def forward(self, tokens, state=None, targets=None, reduction="mean"):
        """tokens [B, T] -> (hidden [B, T, D], state after the last token); with targets [B, T], each the
        token that follows, (loss in nats per token, state): see softmax_loss."""
        c = self.config
        state = self.init_state(len(tokens)) if state is None else state
        x = embedded_dropout(self.embed_tokens, tokens, c.dropout_embed, self.training)         # [B, T, D]
        x = locked_dropout(x, c.dropout_input, self.training)
        new_state = []
        for i, (layer, layer_state) in enumerate(zip(self.layers, state)):
            x, layer_state = layer(x, layer_state)
            x = locked_dropout(x, c.dropout if i == c.n_layer - 1 else c.dropout_hidden, self.training)
            new_state.append(layer_state)
        return (x if targets is None else softmax_loss(x, self.lm_head, targets, reduction)), new_state

    def logits(self, hidden):
        """hidden [..., D] -> logits [..., V]."""
        return self.lm_head(hidden)


# -------------------------- the products, as fast as this processor has them (skip in a first reading: x w^T)

# On AMD's processors, oneDNN multiplies few rows of float32 up to three times as fast as MKL, torch's choice;
# from Zen 5 (family 26) on, all of them twice as fast
CPUINFO = Path("/proc/cpuinfo")
CPU = CPUINFO.read_text() if CPUINFO.exists() else platform.processor()
AMD = torch.backends.mkldnn.is_available() and "AuthenticAMD" in CPU
ONEDNN = AMD and re.search(r"(?i)family\s*:? (2[6-9]|[3-9]\d)\b", CPU) is not None


def product(x, w, bias=None):
    """x w^T + b, for x [..., K], w [M, K], b [M]. No autograd: oneDNN's operations have none."""
    if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def grad_product(g, x):
    """g^T x, the gradient of a weight, for g [N, M], x [N, K]."""
    return product(x.t(), g.t()).t() if ONEDNN else g.t() @ x


def packed_linear(w, rows, times, plus=False):
    """The function x [rows, K] -> x w^T, for w [M, K]; plus: (x, y [rows, M]) -> x w^T + y. In every product
    the library reorders w for its kernels; where there are several, that is done once here."""
    onednn, mkl = torch.ops.mkldnn, torch.ops.mkl
    several = times > 1 and w.device.type == "cpu" and torch.backends.mkldnn.is_available()
    wide, low = (several and w.dtype == dtype for dtype in (torch.float32, torch.bfloat16))
    large = w.numel() >= (1 << 16 if ONEDNN else 1 << 18)
    if wide and AMD and large or low and onednn._is_mkldnn_bf16_supported():
        packed = onednn._reorder_linear_weight(w.contiguous(), rows)

        def linear(x, y=None):
            out = onednn._linear_pointwise(x, packed, None, "none", [], "")
            return out.add_(y) if plus else out                 # faster than its own sum
        return linear
    if wide and not plus and not AMD and torch.backends.mkl.is_available():
        packed = mkl._mkl_reorder_linear_weight(w := w.contiguous(), rows)
        return lambda x: mkl._mkl_linear(x, packed, w, None, rows)
    w_t = w.t().contiguous() if wide else w.t()                 # MKL is 1.3 times as fast with it
    return (lambda x, y: torch.addmm(y, x, w_t)) if plus else (lambda x: x @ w_t)
