"""A decoder-only Transformer by hand: one class that is Part A's small model and, with its numbers, Qwen2.

A block, for hidden x_t in R^D at positions t = 0..T-1 (Vaswani et al. 2017; pre-norm as in Xiong et al. 2020):

    x <- x + W_o Attention(RMSNorm(x))
    x <- x + SwiGLU(RMSNorm(x))

RMSNorm (Zhang & Sennrich 2019):    x / sqrt(mean(x^2) + eps) * weight, in float32
Attention, for one head of size d:  softmax over s <= t of (q_t . k_s / sqrt(d)), applied to v_s
    q, k, v = W x + b               grouped-query attention (Ainslie et al. 2023): n_kv_head keys and values,
                                    each shared by n_head / n_kv_head queries
RoPE (Su et al. 2021):              q and k at position t are turned by the angle t * theta^(-2j/d) in the plane of
                                    coordinates (j, j + d/2), so that q_t . k_s depends on t - s alone
SwiGLU (Shazeer 2020):              W_down (silu(W_gate x) * W_up x)

The KV cache keeps k and v of what was read, so that the next token costs one position and not all of them.
`attention` is the readable form; F.scaled_dot_product_attention is the fast one; a test holds them equal.

    python train.py --model transformer
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from rnn import chunked_nll, cross_entropy_sum, dropout


@dataclass
class TransformerConfig:
    """Sizes. The defaults are a small model; Qwen2-0.5B is (151936, 131072 positions, 24 layers, 14 heads, 2 kv heads,
    896 wide, 4864 hidden, theta 1e6, eps 1e-6, tied)."""
    vocab_size: int
    block_size: int = 128           # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 128
    n_hidden: int = 384             # width inside SwiGLU
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = True
    dropout: float = 0.0            # on the embedding and on what each half-block adds


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x32 = x.float() if x.dtype != torch.float64 else x
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_angles(positions, head_dim, theta):
    """cos and sin, float32 [T, head_dim], of the angles at these positions (each angle twice: both halves)."""
    # this order of operations is Qwen2's own: at position 8,000 a last bit of a frequency shows in the fourth decimal
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = torch.outer(positions.float(), frequency)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn each plane (j, j + d/2) of x [B, heads, T, d] by its position's angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def causal_mask(T, S, like):
    """[T, S], 0 where a query may look and -inf where it may not: the last T of S positions, each sees those before."""
    return like.new_full((T, S), float("-inf")).triu(S - T + 1)


def attention(q, k, v):
    """Causal grouped-query attention, the readable form. q [B, n_head, T, d], k, v [B, n_kv_head, S, d], S >= T: the
    queries are the last T of S positions. -> [B, n_head, T, d]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)               # [B, n_head, T, S]
    scores = scores + causal_mask(q.shape[2], k.shape[2], q)
    return torch.softmax(scores, -1) @ v


def fast_attention(q, k, v):
    """As attention, through torch's fused kernels where they are faster. (On a CPU their bf16 backward is not, for
    short texts: 12.7 ms against 4.0 at 16 rows of 128 tokens, 4 heads of 32.)"""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and torch.is_grad_enabled() and S <= 256:
        return attention(q, k, v)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = None if T == 1 or T == S else causal_mask(T, S, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and T > 1)


class KVCache:
    """Keys and values of the tokens read so far, for every layer; allocated once, filled from the front.

    k, v: [n_layer, B, n_kv_head, max_len, head_dim]; length: how many positions are filled.
    """

    def __init__(self, config, batch_size, max_len, like):
        c = config
        shape = c.n_layer, batch_size, c.n_kv_head, max_len, c.n_embd // c.n_head
        self.k, self.v, self.length, self.max_len = like.new_empty(shape), like.new_empty(shape), 0, max_len

    def append(self, layer, k, v):
        """Store k, v [B, n_kv_head, T, d] behind what is there; -> all keys and values of this layer."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.layer = c.n_head, c.n_kv_head, c.n_embd // c.n_head, layer
        self.q_proj = nn.Linear(c.n_embd, c.n_head * self.head_dim)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.o_proj = nn.Linear(c.n_head * self.head_dim, c.n_embd, bias=False)

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)         # [B, n_head, T, d]
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            q = q.to(k.dtype)
        y = fast_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.input_norm, self.attention = RMSNorm(c.n_embd, c.norm_eps), Attention(c, layer)
        self.post_norm, self.mlp = RMSNorm(c.n_embd, c.norm_eps), SwiGLU(c)
        self.dropout = c.dropout

    def forward(self, x, cos, sin, cache):
        x = x + dropout(self.attention(self.input_norm(x), cos, sin, cache), self.dropout, self.training)
        return x + dropout(self.mlp(self.post_norm(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """The language model. Four members, as every model here has: forward, init_state, unembed, and nll with its
    training form loss."""
    recurrent = False

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        if c.n_embd % c.n_head or c.n_embd // c.n_head % 2 or c.n_head % c.n_kv_head:
            raise ValueError(f"n_embd {c.n_embd} must be n_head {c.n_head} times an even head size, and n_head a "
                             f"multiple of n_kv_head {c.n_kv_head}")
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        self.init_weights()

    def init_weights(self):
        """Matrices Normal(0, 1/sqrt(inputs)), those that write into the residual stream smaller by sqrt(2 n_layer)
        (GPT-2), embeddings Normal(0, 0.1), biases 0. With GPT-2's 0.02 everywhere, queries and keys are so flat in a
        small model that it never learns to look a name up (`finance`, 300 steps: loss there 3.0 nats, with this 0.1)."""
        for name, p in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(p, 0.0, 0.1)
            elif p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, 0.0, (p.shape[1] * (2 * self.config.n_layer if into_residual else 1)) ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def init_state(self, batch_size, max_len):
        """An empty KV cache for at most max_len tokens a row."""
        return KVCache(self.config, batch_size, max_len, self.embed.weight)

    def forward(self, tokens, state=None):
        """tokens [B, T] -> hidden [B, T, D] after the final norm, and state with the tokens appended (None if None)."""
        start, T, c = state.length if state is not None else 0, tokens.shape[1], self.config
        if start + T > (state.max_len if state is not None else c.block_size):
            raise ValueError(f"{start + T} tokens do not fit the context of "
                             f"{state.max_len if state is not None else c.block_size}")
        cos, sin = rope_angles(torch.arange(start, start + T, device=tokens.device), c.n_embd // c.n_head, c.rope_theta)
        x = dropout(self.embed(tokens), c.dropout, self.training)
        for block in self.blocks:
            x = block(x, cos, sin, state)
        if state is not None:
            state.length += T
        return self.norm(x), state

    def unembed(self, hidden):
        """hidden [..., D] -> logits [..., V]."""
        return self.head(hidden)

    def nll(self, hidden, targets):
        """float32 [B, T] nats per token; 0 where the target is -1."""
        return chunked_nll(self.unembed, hidden, targets, self.config.vocab_size)

    def loss(self, hidden, targets):
        """Scalar sum of nats with the gradient computed chunk by chunk; divide by the number of tokens yourself."""
        return cross_entropy_sum(hidden, self.head.weight, self.head.bias, targets)
