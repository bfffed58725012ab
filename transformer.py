"""Two Transformers by hand. The decoder is the small language model that train.py trains; with Qwen2's sizes
it is Qwen2. The encoder is DistilBERT, the reward model.

The decoder. A layer has two halves, and each adds to x_t in R^D at positions t = 0..T-1 (Vaswani et al.
2017). The input of each half is normalised (pre-norm, Xiong et al. 2020):

    x <- x + W_o Attention(RMSNorm(x))
    x <- x + SwiGLU(RMSNorm(x))

RMSNorm (Zhang & Sennrich 2019):    x / sqrt(mean(x^2) + eps) * weight, in float32
Attention, for one head of size d:  sum over s <= t of softmax_s(q_t . k_s / sqrt(d)) v_s. The query of
                                    position t is compared with the keys of all positions up to t, and the
                                    values are added, weighted by how well their keys match. n_head of
                                    these run side by side, and W_o adds up what they find
    q, k, v = W x + b               grouped-query attention (Ainslie et al. 2023): n_kv_head heads of
                                    keys and values; n_head / n_kv_head heads of queries share each of them
RoPE (Su et al. 2021):              q and k at position t are turned by the angle t * theta^(-2j/d) in the
                                    plane of coordinates (j, j + d/2), so that q_t . k_s depends only on
                                    t - s
SwiGLU (Shazeer 2020):              W_down (silu(W_gate x) * W_up x)

The KV cache keeps k and v of all tokens that were read, so that the next token costs one position and not all
of them. `attention` is the readable form, and F.scaled_dot_product_attention is the fast one. A test holds
them equal.

The encoder (Devlin et al. 2019; Sanh et al. 2019) predicts no next token and sees the text in both
directions. It differs in four things: its positions are learned, x = LayerNorm(E[token] + P[position]); only
padding is masked; the norm comes after the sum (post-norm, as in 2017); and GELU takes the place of SwiGLU:

    x <- LayerNorm(x + W_o Attention(x))
    x <- LayerNorm(x + W_2 GELU(W_1 x))

The head of the scorer reads the first position, [CLS]: the logits of two classes are W_c relu(W_p x_0).

Where to find what:
    RMSNorm, SwiGLU                     the classes of these names
    softmax over s <= t                 attention, causal_mask; fast_attention
    q, k, v and W_o                     Attention.forward
    the angles of RoPE                  rotary_cos_sin, apply_rotary_emb
    x <- x + ...                        DecoderLayer.forward; post-norm: EncoderLayer.forward
    k and v of the tokens read          KVCache
    the head of the scorer              Scorer.forward

    python train.py --model transformer
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fast.products import dropout
from rnn import add_cutoff, compute_dtype, logits_of, softmax_loss


# ------------------------------------------------------------------------------------------------ the decoder

@dataclass
class TransformerConfig:
    """The sizes of a decoder. The defaults make a small model. Qwen2-0.5B has a vocabulary of 151936, a
    context of 131072, 24 layers, 14 heads, 2 kv heads, widths 896 and 4864, theta 1e6 and eps 1e-6, and is
    tied."""
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
    cutoff: int = 0                 # of the softmax over the vocabulary: see rnn.py
    dropout: float = 0.0            # on the embedding and on the output of each half of a layer


def rotary_cos_sin(positions, head_dim, theta):
    """cos and sin, float32 [T, head_dim], of the angles at these positions. Both halves hold the same
    angles."""
    # Qwen2's order of operations: at position 8,000 the last bit of a frequency changes the fourth decimal
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = torch.outer(positions.float(), frequency)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def apply_rotary_emb(x, cos, sin):
    """Turn each plane (j, j + d/2) of x [B, heads, T, d] by the angle of its position."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def causal_mask(T, S, like):
    """The mask [T, S] of queries at the last T of S positions: 0 where a query may look, at itself and at
    earlier positions, and -inf elsewhere."""
    return like.new_full((T, S), float("-inf")).triu(S - T + 1)


def attention(q, k, v):
    """Causal grouped-query attention in its readable form. q [B, n_head, T, d], k and v [B, n_kv_head, S, d];
    the queries are at the last T of S positions. -> [B, n_head, T, d]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)               # [B, n_head, T, S]
    scores = scores + causal_mask(q.shape[2], k.shape[2], q)
    return torch.softmax(scores, -1) @ v


def fast_attention(q, k, v):
    """The same as attention, by torch's fused kernels. When a CPU trains on short texts, `attention` itself
    is faster: its backward in bfloat16 takes 4.0 ms, and theirs 12.7 (16 rows of 128 tokens, 4 heads of
    32)."""
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if T == 1:                              # the queries of a group become rows of one head: no k is repeated
        grouped = q.reshape(-1, k.shape[1], group, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
    if q.device.type == "cpu" and torch.is_grad_enabled() and S <= 256:
        return attention(q, k, v)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = None if T == S else causal_mask(T, S, q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, at least in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x32 = x.float() if x.dtype != torch.float64 else x
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of the tokens read so far: for each layer k and v [B, n_kv_head, max_len, head_dim].
    They are allocated once and filled from the front. length: how many positions are filled."""

    def __init__(self, c, batch_size, max_len, like):
        shape = c.n_layer, batch_size, c.n_kv_head, max_len, c.n_embd // c.n_head
        self.k, self.v = like.new_empty(shape).unbind(), like.new_empty(shape).unbind()
        self.length, self.max_len = 0, max_len

    def append(self, layer, k, v):
        """Store k and v [B, n_kv_head, T, d] of the next positions; -> all keys and values of this layer."""
        start, T = self.length, k.shape[2]
        self.k[layer].narrow(2, start, T).copy_(k)
        self.v[layer].narrow(2, start, T).copy_(v)
        return self.k[layer].narrow(2, 0, start + T), self.v[layer].narrow(2, 0, start + T)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.n_embd // c.n_head
        self.layer = layer
        self.q_proj = nn.Linear(c.n_embd, c.n_head * self.head_dim)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * self.head_dim)
        self.o_proj = nn.Linear(c.n_head * self.head_dim, c.n_embd, bias=False)

    def forward(self, x, cos, sin, cache):
        B, T, _ = x.shape
        # the heads of q and of k in one tensor [B, n_head + n_kv_head, T, d], because both are turned
        qk = torch.cat((self.q_proj(x), self.k_proj(x)), -1).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # [B, n_kv_head, T, d]
        q, k = apply_rotary_emb(qk, cos, sin).split((self.n_head, self.n_kv_head), 1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                           # [B, n_kv_head, S, d]
            q = q.to(k.dtype)                                               # the angles are float32
        y = fast_attention(q, k, v)                                         # [B, n_head, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.up_proj = nn.Linear(c.n_embd, c.n_hidden, bias=False)
        self.down_proj = nn.Linear(c.n_hidden, c.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm: x <- x + Attention(norm(x)), x <- x + SwiGLU(norm(x))."""

    def __init__(self, c, layer):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.n_embd, c.norm_eps), Attention(c, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.n_embd, c.norm_eps), SwiGLU(c)
        self.dropout = c.dropout

    def forward(self, x, cos, sin, cache):
        y = self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + dropout(y, self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """The language model. Three members, as every model here has: forward, init_state and logits. Parameters
    have the names of Qwen2's checkpoint, without its leading `model.`."""
    recurrent = False
    product_dtype = torch.float32                               # dtype of products, for sample.autocast
    checkpointing = False      # keep only the input of each layer, and compute the rest again in backward

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.n_embd % c.n_head or c.n_embd // c.n_head % 2 or c.n_head % c.n_kv_head:
            raise ValueError(f"n_embd {c.n_embd} must be n_head {c.n_head} times an even head size, and "
                             f"n_head a multiple of n_kv_head {c.n_kv_head}")
        self.embed_tokens = nn.Embedding(c.vocab_size, c.n_embd)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()
        add_cutoff(self.lm_head, c.cutoff)

    def init_weights(self):
        """Matrices are Normal(0, 1/sqrt(inputs)); those whose output is added to x are smaller by sqrt(2
        n_layer), as in GPT-2. Embeddings are Normal(0, 0.1), and biases 0. With GPT-2's 0.02 everywhere,
        queries and keys are so small in a small model that it never learns to look a name up (`finance` after
        300 steps: 3.0 nats at the repeated name, and 0.1 with these values)."""
        for name, p in self.named_parameters():
            if name == "embed_tokens.weight":
                nn.init.normal_(p, 0.0, 0.1)
            elif p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                inputs = p.shape[1] * (2 * self.config.n_layer if into_residual else 1)
                nn.init.normal_(p, 0.0, inputs ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def init_state(self, batch_size, max_len):
        """An empty KV cache for at most max_len tokens a row."""
        return KVCache(self.config, batch_size, max_len, self.embed_tokens.weight)

    def forward(self, tokens, state=None, targets=None, reduction="mean"):
        """tokens [B, T] -> (hidden [B, T, D] after the final norm, state). If a state was passed, it now
        holds these tokens, too; else it is None. With targets [B, T]: -> (loss in nats per token, state), see
        softmax_loss."""
        start, T, c = state.length if state is not None else 0, tokens.shape[1], self.config
        limit = c.block_size if state is None else state.max_len
        if start + T > limit:
            raise ValueError(f"{start + T} tokens do not fit the context of {limit}")
        positions = torch.arange(start, start + T, device=tokens.device)
        cos, sin = rotary_cos_sin(positions, c.n_embd // c.n_head, c.rope_theta)        # [T, d]
        x = dropout(self.embed_tokens(tokens), c.dropout, self.training)                # [B, T, D]
        cos, sin = cos.to(compute_dtype(x)), sin.to(compute_dtype(x))
        for layer in self.layers:
            if self.checkpointing and state is None:
                x = checkpoint(layer, x, cos, sin, state, use_reentrant=False)
            else:
                x = layer(x, cos, sin, state)
        if state is not None:
            state.length += T
        x = self.norm(x)
        if targets is not None:
            return softmax_loss(x, self.lm_head, targets, reduction), state
        return x, state

    def logits(self, hidden):
        """hidden [..., D] -> logits [..., V]."""
        return logits_of(hidden, self.lm_head)


# The evening's reading of this file ends here.

# ------------------------------------------------------------------------------------------------ the encoder

@dataclass
class ScorerConfig:
    """The sizes of an encoder, under the names of DistilBERT's config.json."""
    vocab_size: int
    dim: int = 128
    hidden_dim: int = 256
    n_layers: int = 2
    n_heads: int = 4
    max_position_embeddings: int = 512
    dropout: float = 0.1
    positive: int = 1               # which of the two labels is the positive one


class EncoderAttention(nn.Module):
    """Attention in both directions."""

    def __init__(self, c):
        super().__init__()
        self.n_heads = c.n_heads
        self.q_lin, self.k_lin, self.v_lin, self.out_lin = (nn.Linear(c.dim, c.dim) for _ in range(4))

    def forward(self, x, mask):
        """x [B, T, D], mask [B, 1, 1, T]: 0 where there is a token, -inf at padding."""
        B, T, D = x.shape
        q, k, v = (lin(x).view(B, T, self.n_heads, -1).transpose(1, 2)
                   for lin in (self.q_lin, self.k_lin, self.v_lin))         # [B, heads, T, d]
        if T > 64:                              # 32 texts with T = 256 take 144 ms, and 178 the other way
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = torch.softmax(q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2) + mask, -1) @ v
        return self.out_lin(y.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(c.dim, c.hidden_dim), nn.Linear(c.hidden_dim, c.dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        return self.dropout(self.lin2(F.gelu(self.lin1(x))))


class EncoderLayer(nn.Module):
    """Post-norm: x <- norm(x + Attention(x)), x <- norm(x + FeedForward(x))."""

    def __init__(self, c):
        super().__init__()
        self.attention, self.sa_layer_norm = EncoderAttention(c), nn.LayerNorm(c.dim, eps=1e-12)
        self.ffn, self.output_layer_norm = FeedForward(c), nn.LayerNorm(c.dim, eps=1e-12)

    def forward(self, x, mask):
        x = self.sa_layer_norm(x + self.attention(x, mask))
        return self.output_layer_norm(x + self.ffn(x))


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.dim)
        self.LayerNorm, self.dropout = nn.LayerNorm(c.dim, eps=1e-12), nn.Dropout(c.dropout)

    def forward(self, tokens):
        x = self.word_embeddings(tokens) + self.position_embeddings.weight[:tokens.shape[1]]
        return self.dropout(self.LayerNorm(x))


class Scorer(nn.Module):
    """DistilBERT with a classification head, and the tokenizer that it reads with (qwen_load.WordPiece).
    Parameters have the hub's names without the leading `distilbert.`."""
    recurrent = False
    product_dtype = torch.float32                               # dtype of products, for sample.autocast

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer, c = config, tokenizer, config
        self.embeddings, self.transformer = Embeddings(c), nn.Module()
        self.transformer.layer = nn.ModuleList(EncoderLayer(c) for _ in range(c.n_layers))
        self.pre_classifier, self.dropout = nn.Linear(c.dim, c.dim), nn.Dropout(c.dropout)
        self.classifier = nn.Linear(c.dim, 2)

    def forward(self, tokens, state=None, targets=None):
        """tokens [B, T], with [PAD] at the end of the shorter rows -> logits [B, 2]. With targets, labels
        [B]: -> (mean cross-entropy, state), as train.train expects it."""
        x = self.embeddings(tokens)                                         # [B, T, D]
        padding = (tokens == self.tokenizer.pad)[:, None, None]             # [B, 1, 1, T]
        mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -math.inf)
        for layer in self.transformer.layer:
            x = layer(x, mask)
        logits = self.classifier(self.dropout(F.relu(self.pre_classifier(x[:, 0]))))
        return logits if targets is None else (F.cross_entropy(logits.float(), targets), state)

    def batch(self, texts):
        """Lists of ids -> tokens [B, T]: [CLS], as many ids as fit, [SEP], and [PAD] on the right."""
        fits = self.config.max_position_embeddings - 2
        rows = [torch.tensor([self.tokenizer.cls, *ids[:fits], self.tokenizer.sep]) for ids in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad)

    @torch.no_grad()
    def classify(self, texts, batch_size=32):
        """Lists of ids -> logits, float32 [N, 2] on the CPU, without dropout. Texts of similar length share a
        batch."""
        was_training, device = self.training, self.classifier.weight.device
        self.eval()
        out = torch.empty(len(texts), 2)
        by_length = torch.tensor(sorted(range(len(texts)), key=lambda k: len(texts[k])))
        for rows in by_length.split(batch_size):
            out[rows] = self(self.batch([texts[k] for k in rows]).to(device)).float().cpu()
        self.train(was_training)
        return out

    def score(self, texts):
        """The logit of the positive class for each text (a string): float32 [N] on the CPU."""
        return self.classify([self.tokenizer.encode(text) for text in texts])[:, self.config.positive]
