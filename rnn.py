"""A recurrent neural network by hand: the Elman layer, its backward pass, and a language model on top.

The layer (Elman 1990), for t = 1..T, with x_t in R^I, h_t in R^H:

    h_t = tanh(a_t),    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh

Back-propagation through time (Werbos 1990). Let dh_t be the derivative of the loss with respect to h_t. It
has two parts: grad_h_t, which the layers above send down at time t, and what the next step sends back. After
the last step nothing comes back, so da_{T+1} = 0:

    dh_t = grad_h_t + W_hh^T da_{t+1}        da_t = dh_t * (1 - h_t^2)        (tanh' = 1 - tanh^2)

A gradient that goes back k steps is so multiplied k times by W_hh^T and by tanh', which is at most 1. It
vanishes or explodes like a power of k (Bengio et al. 1994). This is why an RNN forgets, and why the norm of
the gradient is clipped.

Only this recursion, from T down to 1, is sequential. Everything else is one product over all steps:

    dx_t = W_ih^T da_t     dW_ih = sum_t da_t x_t^T     dW_hh = sum_t da_t h_{t-1}^T     db = sum_t da_t

`RNN.plain` is the textbook's loop, and autograd finds its gradient. `RNNFunction` is the same loop with the
gradient written out. It is a torch.autograd.Function: autograd calls `forward`, which keeps in ctx what the
gradient needs, and later `backward`, which is given the gradient of each output and returns the gradient of
each input, in their order. A test holds the two equal to each other and to torch.nn.RNN.

The language model `RNNLM` predicts the next token. The shapes on the way, for B rows of T tokens:

    tokens [B, T] -> embedded [B, T, D] -> time-major [T, B, D] -> h [T, B, H] -> hidden [B, T, H] -> loss

The loss of a token is -log p, the negative log-likelihood (nll), with p = softmax(logits)[token]; its
gradient with respect to the logits z is softmax(z) - onehot(token), because -log p = log sum_k exp(z_k) -
z_token.

Where there are many words, most of the time goes into their logits, although a few of the words make up most
of a text. An adaptive softmax (Goodman 2001; Grave et al. 2017) makes use of this. It needs words that
are numbered by frequency. The first softmax is over the first `cutoff` words and one more symbol, "a rarer
word", which has a vector of its own. The second softmax is over all other words. It is needed only where the
target is one of them:

    p(w) = p_frequent(w) for w < cutoff             p(w) = p_frequent(rarer) p_rare(w) for w >= cutoff

With a fifth of the 10,000 words of the Penn Treebank as the frequent ones, 13 % of its tokens need the second
softmax. A token costs 0.2 V + 0.13 * 0.8 V = 0.3 V scores on average, and not V.

With z the scores of all words and of the symbol, the logits are z_w for w < cutoff, and z_rarer + log
p_rare(w) for the others. Their softmax is this p: because p_rare sums to 1, the exponentials of the rare
logits sum to exp(z_rarer). So whatever reads logits need not know of a cutoff. Generation reads them all, and
saves nothing.

Word-level corpora need regularisation. Words are dropped from the embedding (Merity et al. 2018). One dropout
mask serves all time steps, because a new one at each step would add noise to the recurrence (Gal &
Ghahramani 2016). Embedding and softmax share their weights, because both have a vector for each word (Press &
Wolf 2017): they are `tied`, and the last layer is then as wide as the embedding, H = D.

Where to find what:
    h_t                                 RNN.plain; RNNFunction.forward, the loop
    dh_t, da_t                          RNNFunction.backward, the loop
    dx, dW_ih, dW_hh, db                RNNFunction.backward, after the loop
    the loss that is trained            softmax_loss, softmax_gradient, LinearCrossEntropy
    each token's loss (PPO, evaluation) TokenLoss; without a gradient token_nll
    the adaptive softmax                add_cutoff; its loss softmax_levels, its logits logits_of
    dropout of words, units             embedded_dropout, locked_dropout

Vectors are columns in these equations and rows in the code, so that W x is written x W^T. Three functions of
fast/products.py are matrix products: product(x, W) is x W^T, grad_product(g, x) is g^T x, and
packed_linear(W, ...) returns the function x -> x W^T.

    python train.py --model rnn                      # trains it; see train.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fast.products import grad_product, packed_linear, product


# -------------------------------------------------------------------------------------------------- the layer

class RNN(nn.Module):
    """One Elman layer. forward(x [B, T, I], state h [B, H] or None) -> (out [B, T, H], state h [B, H]). The
    parameters are those of torch.nn.RNN, without `_l0` in their names."""
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

    def plain(self, x, state=None):
        """The layer as a textbook writes it; autograd finds the gradient."""
        h = self.zero_state(x.shape[0]) if state is None else state
        out = []
        for x_t in x.unbind(1):                                 # [B, I]
            h = torch.tanh(x_t @ self.weight_ih.T + self.bias_ih + h @ self.weight_hh.T + self.bias_hh)
            out.append(h)
        return torch.stack(out, 1), h

    def forward(self, x, state=None):
        """The same as plain, by RNNFunction, with its gradient written out."""
        h0 = self.zero_state(x.shape[0]) if state is None else state
        x, w_ih, w_hh, bias = self.cast_inputs(x)
        with torch.autocast(x.device.type, enabled=False):                      # all inputs are cast already
            out = RNNFunction.apply(x, h0.to(x.dtype), w_ih, w_hh, bias)        # [T, B, H]
        return out.transpose(0, 1), out[-1].to(h0.dtype)

    def cast_inputs(self, x):
        """x in time-major order [T, B, I], the weights and the sum of the biases, all in the dtype of the
        products."""
        if x.shape[1] == 0:
            raise ValueError("a recurrent layer needs at least one time step")
        x = x.transpose(0, 1).contiguous()             # a matmul of strided rows takes up to 30 times as long
        dtype, bias = compute_dtype(x), self.bias_ih + self.bias_hh
        return [v.to(dtype) for v in (x, self.weight_ih, self.weight_hh, bias)]

    def zero_state(self, batch_size):
        return self.weight_hh.new_zeros(batch_size, self.hidden_size)


class RNNFunction(torch.autograd.Function):
    """All T steps of one layer. x [T, B, I], h0 [B, H] -> h_1..h_T [T, B, H] (the last one is the state)."""

    @staticmethod
    def forward(ctx, x, h0, w_ih, w_hh, bias):
        T, B, _ = x.shape
        input_part = product(x, w_ih, bias).unbind(0)       # W_ih x_t + b, for all t at once: T of [B, H]
        h = x.new_empty(T + 1, B, w_hh.shape[0])
        h[0] = h0
        hs, times_w_hh = h.unbind(0), packed_linear(w_hh, B, T)     # hs[0] is the state before the first step
        for t in range(T):
            a = times_w_hh(hs[t]).add_(input_part[t])           # W_hh h + W_ih x + b
            torch.tanh(a, out=hs[t + 1])
        ctx.save_for_backward(x, h, w_ih, w_hh)
        return h[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        x, h, w_ih, w_hh = ctx.saved_tensors
        T, B, H = grad_h.shape
        slope = 1 - h[1:] * h[1:]                               # tanh' for all steps at once
        da = torch.empty_like(slope)
        grad_hs, slopes, das = grad_h.unbind(0), slope.unbind(0), da.unbind(0)
        from_next, times_w_hh_transposed = torch.zeros_like(grad_hs[0]), packed_linear(w_hh.t(), B, T)
        for t in reversed(range(T)):
            dh = from_next.add_(grad_hs[t])                     # dh_t = grad_h_t + W_hh^T da_{t+1}
            torch.mul(dh, slopes[t], out=das[t])                # da_t = dh_t (1 - h_t^2)
            from_next = times_w_hh_transposed(das[t])           # W_hh^T da_t; in the end, the gradient of h0
        da = da.view(T * B, H)
        dx = product(da, w_ih.t()).view_as(x)
        dw_ih = grad_product(da, x.reshape(T * B, -1))
        dw_hh = grad_product(da, h[:-1].reshape(T * B, H))
        return dx, from_next, dw_ih, dw_hh, da.sum(0)


def compute_dtype(x):
    """The dtype in which products run: that of autocast, torch's switch for products of 16 bits, if it is on,
    else that of the tensor x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# ------------------------------------------------------------------------------------------- softmax and loss

# The largest number of logits in a chunk, and the fewest rows: each chunk reads the whole matrix of the
# vocabulary, so chunks of few rows would be slow.
MOST_LOGITS, FEWEST_ROWS = 1 << 23, 512


def row_chunks(vocab_size, *tensors, copies=1):
    """The rows of tensors [N, ...] in chunks, so that the logits [rows, vocab_size] of one chunk fit memory.
    Yields a tuple of parts, views of the tensors, for each chunk. copies: how many matrices of this size the
    caller holds at a time."""
    N, most = len(tensors[0]), MOST_LOGITS * (32 if tensors[0].is_cuda else 1)
    n = max(1, min(math.ceil(copies * N * vocab_size / most), copies * N // FEWEST_ROWS))
    return zip(*(tensor.chunk(n) for tensor in tensors))


def softmax_gradient(logits, targets):
    """-log softmax(logits)[target] of each row, and its gradient with respect to the logits, softmax -
    onehot(target), in the logits' dtype. logits [N, V], which may be overwritten, targets [N].

    Both are formed in float32 (float64 for float64) and rounded last: bfloat16 would round p = 0.997 to
    0.996, and then 1 - p would be 0.004 instead of 0.003. The clamp keeps the loss finite, below 88 nats."""
    row = torch.arange(len(targets), device=targets.device)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))
    torch.softmax(p, -1, out=p)
    p_target = p[row, targets]
    p[row, targets] = p_target - 1                                      # p is now softmax - onehot
    return -p_target.clamp(min=1e-38).log(), p.to(logits.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy of softmax(hidden W^T + b), with its gradient, in chunks of rows.

    The loss is one number, so the gradient that comes back to it is one number, too. So forward already
    computes all gradients, chunk by chunk, and backward multiplies them by that number. So the [N, V] logits
    of a large batch or vocabulary never exist together. hidden [N, D], weight [V, D], bias [V] or None,
    targets [N] (-1: ignored) -> float32 scalar, in nats. Products run in hidden's dtype, sums in float32
    (float64 where hidden is).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        w, b = (v if v is None else v.to(hidden.dtype) for v in (weight, bias))
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        d_hidden, d_weight, d_bias = torch.empty_like(hidden), None, None
        for h, d_h, y in row_chunks(len(w), hidden, d_hidden, targets):
            counted = y >= 0
            nll, d_logits = softmax_gradient(product(h, w, b), y.clamp(min=0))
            total += (nll * counted).sum()
            if not counted.all():
                d_logits.masked_fill_(~counted[:, None], 0.0)
            d_h.copy_(product(d_logits, w.t()))                         # into this chunk's rows of d_hidden
            part = grad_product(d_logits, h)
            part = part if len(h) == len(hidden) else part.to(sum_dtype)        # one chunk needs no sum
            d_weight = part if d_weight is None else d_weight.add_(part)
            if b is not None:
                part = d_logits.sum(0).to(sum_dtype)                   # summed in float32, whatever the dtype
                d_bias = part if d_bias is None else d_bias.add_(part)
        ctx.grads = d_hidden, d_weight, d_bias
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (d_hidden, d_weight, d_bias), ctx.grads = ctx.grads, None       # scaled in place: backward runs once
        return d_hidden.mul_(grad), d_weight.mul_(grad), None if d_bias is None else d_bias.mul_(grad), None


class TokenLoss(torch.autograd.Function):
    """-log softmax(hidden W^T + b)[target] of each row, float32 [N], with its gradient. The factor that comes
    back differs from row to row, so softmax - onehot [N, V] is kept until backward. suppressed: ids that have
    probability 0. hidden [N, D], weight [V, D], bias [V] or None, targets [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, suppressed):
        w, b = (v if v is None else v.to(hidden.dtype) for v in (weight, bias))
        nll = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        d_logits = hidden.new_empty(len(targets), len(w))
        for h, y, out, d in row_chunks(len(w), hidden, targets, nll, d_logits):
            loss, gradient = softmax_gradient(product(h, w, b).index_fill_(1, suppressed, -math.inf), y)
            out.copy_(loss)
            d.copy_(gradient)
        ctx.save_for_backward(hidden, w, d_logits)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, w, d_logits = ctx.saved_tensors
        d_logits = d_logits.mul_(grad[:, None])                         # in place: backward runs once
        d_bias = d_logits.sum(0) if ctx.needs_input_grad[2] else None
        return product(d_logits, w.t()), grad_product(d_logits, hidden), d_bias, None, None


@torch.no_grad()
def token_nll(hidden, weight, bias, targets):
    """-log softmax(hidden W^T + b)[target], float32 [N] in nats, 0 where the target is -1; no gradient."""
    w, b = (v if v is None else v.to(hidden.dtype) for v in (weight, bias))
    nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for h, y, out in row_chunks(len(w), hidden, targets, nll):
        logits = product(h, w, b)
        at_target = logits.gather(1, y.clamp(min=0)[:, None])[:, 0].float()
        out.copy_(torch.logsumexp(logits.float(), -1) - at_target)
    return nll.masked_fill_(targets < 0, 0.0)


def add_cutoff(head, cutoff):
    """Make the softmax of head, an nn.Linear(D, V), an adaptive one. With a cutoff of 0, or of at least V, it
    stays an ordinary one."""
    if 0 < cutoff < head.out_features:
        # the scores of the symbol "a rarer word" begin at 0, and nothing is drawn for them
        head.rarer = nn.utils.skip_init(nn.Linear, head.in_features, 1, bias=head.bias is not None,
                                        device=head.weight.device)
        for p in head.rarer.parameters():
            nn.init.zeros_(p)
        head.cutoff = cutoff


def logits_of(hidden, head):
    """hidden [..., D] -> logits [..., V] of a head with or without a cutoff."""
    z = head(hidden)
    if not hasattr(head, "cutoff"):
        return z
    dtype = torch.promote_types(z.dtype, torch.float32)         # the loss, too, takes logarithms in float32
    log_p_rare = torch.log_softmax(z[..., head.cutoff:], -1, dtype=dtype)
    return torch.cat((z[..., :head.cutoff].to(dtype), head.rarer(hidden).to(dtype) + log_p_rare), -1)


def softmax_levels(hidden, head, targets):
    """The softmaxes that predict the targets: a list of (rows, hidden, weight, bias, targets), one for all
    rows and, with a cutoff, one for the rows with a rarer target. hidden [N, D], targets [N]."""
    all_rows = slice(None)
    if not hasattr(head, "cutoff"):
        return [(all_rows, hidden, head.weight, head.bias, targets)]
    cutoff = head.cutoff

    def split(of_words, of_symbol):         # two slices would each have a gradient of the size of the whole
        frequent, rare = of_words.split([cutoff, len(of_words) - cutoff])
        return torch.cat((frequent, of_symbol)), rare
    weight, rare_weight = split(head.weight, head.rarer.weight)
    bias, rare_bias = (None, None) if head.bias is None else split(head.bias, head.rarer.bias)
    rows = (targets >= cutoff).nonzero()[:, 0]
    return [(all_rows, hidden, weight, bias, targets.clamp(max=cutoff)),
            (rows, hidden.index_select(0, rows), rare_weight, rare_bias, targets[rows] - cutoff)]


def softmax_loss(hidden, head, targets, reduction="mean", suppressed=None):
    """The loss of predicting the targets by softmax(logits_of(hidden, head)), in nats per token. hidden [...,
    D], head an nn.Linear(D, V), targets [...]; a target of -1 does not count. reduction "mean": the mean over
    the targets. "none": the loss of each, in the shape of targets, 0 where one is -1; under torch.no_grad()
    this takes less memory. suppressed: ids that have probability 0 (only for "none", in ppo.py).

    There is one function for each use. LinearCrossEntropy trains, and keeps no logits. TokenLoss has to keep
    them, because PPO gives each token a weight. token_nll has no gradient. PPO with a cutoff leaves the
    gradient to autograd."""
    flat, y = hidden.to(compute_dtype(hidden)).flatten(0, -2), targets.flatten()
    if reduction == "none" and (torch.is_grad_enabled() or suppressed is not None):
        suppressed = y[:0] if suppressed is None else suppressed
        if hasattr(head, "cutoff"):         # a suppressed rare word changes the probabilities of both levels
            logits = logits_of(flat, head).index_fill_(1, suppressed, -math.inf)
            return F.cross_entropy(logits, y, ignore_index=-1, reduction="none").view(targets.shape)
        with torch.autocast(hidden.device.type, enabled=False):
            nll = TokenLoss.apply(flat, head.weight, head.bias, y.clamp(min=0), suppressed)
            return (nll * (y >= 0)).view(targets.shape)
    with torch.autocast(hidden.device.type, enabled=False):
        levels = softmax_levels(flat, head, y)
        if reduction == "mean":
            return sum(LinearCrossEntropy.apply(*level) for _, *level in levels) / (y >= 0).sum()
        nll = torch.zeros(len(y), device=hidden.device)
        for rows, *level in levels:
            nll[rows] += token_nll(*level)
        return nll.view(targets.shape)


# ---------------------------------------------------------------------------------------------------- dropout

def locked_dropout(x, p, training):
    """Dropout with one mask for all time steps of a row (Gal & Ghahramani 2016). x [B, T, D]."""
    if not training or p == 0:
        return x
    return x * x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - p).div_(1 - p)


def embedded_dropout(embedding, tokens, p, training):
    """Embed tokens [B, T]. Words of the vocabulary are dropped, each wherever it occurs (Merity et al.)."""
    x = embedding(tokens)
    if not training or p == 0:
        return x
    keep = x.new_empty(embedding.num_embeddings).bernoulli_(1 - p).div_(1 - p)
    return x * keep[tokens][..., None]


# ----------------------------------------------------------------------------------------- the language model

@dataclass
class RNNConfig:
    """Sizes and dropouts of a recurrent language model."""
    vocab_size: int
    n_embd: int = 200
    n_hidden: int = 200
    n_layer: int = 2
    dropout: float = 0.0            # after the last layer, one mask for all time steps
    dropout_hidden: float = 0.0     # between layers, likewise
    dropout_input: float = 0.0      # after the embedding, likewise
    dropout_embed: float = 0.0      # words of the vocabulary, wherever they occur in the batch
    tied: bool = True               # embedding and softmax share one matrix
    cutoff: int = 0                 # how many words are the frequent ones; 0: an ordinary softmax


class RNNLM(nn.Module):
    """Embedding (embed_tokens), a stack of recurrent layers, softmax (lm_head). Three members, as every model
    here has: forward, init_state and logits."""
    layer_type = RNN
    recurrent = True
    product_dtype = torch.float32                               # dtype of products, for sample.autocast
    embed_range = 0.1                                           # embeddings start uniform in [-0.1, 0.1]

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
        add_cutoff(self.lm_head, c.cutoff)

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
        return logits_of(hidden, self.lm_head)
