"""A decoder layer with its backward pass by hand, for a CPU. It replaces transformer.DecoderLayer.

Autograd runs a layer as some 60 operations. Each of them passes over memory, and its inputs are kept.
LayerFunction is the same layer with its derivatives written out: matrix products, and between two of them one
pass of layer.c over the rows.
"""
import ctypes
from dataclasses import replace

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable

import lstm
from fast.cells import fast_cells
from fast.decode import use_decode_kernels
from fast.products import compile_c, dropout, grad_product, product
from lstm import LSTM
from rnn import compute_dtype
from transformer import DecoderLayer, causal_mask, rotary_cos_sin

DTYPES = torch.float32, torch.bfloat16                  # those of layer.c


def layer_kernels(x_dtype, product_dtype):
    """layer.c for layers with activations of x_dtype and products of product_dtype; None without a compiler.
    """
    wide, bf16 = x_dtype == torch.float32, product_dtype == torch.bfloat16
    return compile_c("layer", *["-DWIDE"] * wide, *["-DBF16"] * bf16)


def call(function, *args):
    """Call a C function: tensors (contiguous) are passed as their address, numbers as long or float."""
    def convert(v):
        if isinstance(v, torch.Tensor):
            return ctypes.c_void_p(v.data_ptr())
        return ctypes.c_float(v) if isinstance(v, float) else ctypes.c_long(v)
    function(*map(convert, args))


def stacked(like, *weights):
    """Several matrices as one, in the dtype of `like`: one product in place of several."""
    return torch.cat([w.to(like.dtype) for w in weights])


class LayerFunction(torch.autograd.Function):
    """DecoderLayer.forward without a cache. x [B, T, D], cos, sin float32 [T, d], weights in the order of
    layer.parameters() -> [B, T, D].

    Forward is the left column, read downwards; backward is the right one, read upwards. d* is the gradient of
    the loss with respect to *; a row is a position, in attention a query. norm, rotate, swiglu and their
    derivatives are in layer.c; norm' gives the gradient of the norm's weight, too.

        n = norm(x)                     dx = dz + norm'(dn)
        qkv = n W_qkv^T + b             dn = dqkv W_qkv, dW_qkv = dqkv^T n, db = sum over rows of dqkv
        q, k, v = rotate(qkv)           dqkv = dq, dk, dv turned back
        S = q k^T / sqrt(d) + mask      dq = dS k / sqrt(d), dk = dS^T q / sqrt(d)
        P = softmax(S)                  dS = P * (dP - sum over keys of dP * P)
        a = P v                         dP = da v^T, dv = P^T da
        z = x + a W_o^T                 da = dz W_o, dW_o = dz^T a
        n2 = norm(z)                    dz = dy + norm'(dn2)
        gu = n2 W_gu^T                  dn2 = dgu W_gu, dW_gu = dgu^T n2
        m = swiglu(gu)                  dgu = swiglu'(dm)
        y = z + m W_down^T              dm = dy W_down, dW_down = dy^T m

    With dropout, a W_o^T and m W_down^T, and dz and dy where they enter these products, are multiplied by a
    mask (keep). The queries of a group are rows of one product, q [B n_kv_head, group * T, d], so k and v are
    not repeated. Products run in compute_dtype(x); x, z and y keep x's dtype.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, layer, w_1, wq, bq, wk, bk, wv, bv, w_o, w_2, w_gate, w_up, w_down):
        dtype, rate, eps = compute_dtype(x), layer.dropout, float(layer.input_layernorm.eps)
        B, T, D, n_q, n_kv, d = *x.shape, layer.self_attn.n_head, layer.self_attn.n_kv_head, cos.shape[1]
        N, group, x, kernels = B * T, n_q // n_kv, x.contiguous(), layer_kernels(x.dtype, dtype)
        b = torch.cat((bq, bk, bv)).to(dtype)

        n, r = x.new_empty(N, D, dtype=dtype), x.new_empty(N, dtype=torch.float32)
        call(kernels.norm, N, D, eps, x, w_1, n, r)
        q, k, v = (n.new_empty(B * n_kv, heads * T, d) for heads in (group, 1, 1))
        qkv = product(n, stacked(n, wq, wk, wv), b)
        call(kernels.rotate, B, T, n_q, n_kv, d, 1, cos, sin, qkv, q, k, v)
        mask = causal_mask(T, T, q).repeat(group, 1)
        p = torch.softmax(torch.baddbmm(mask, q, k.mT, alpha=d ** -0.5), -1)    # [B n_kv, group * T, T]
        a = (p @ v).view(B, n_q, T, d).transpose(1, 2).reshape(N, -1)
        keep = [dropout(torch.ones_like(n), rate, True) for _ in range(2)] if rate and layer.training else []
        out = product(a, w_o.to(dtype))
        z = x + (out * keep[0] if keep else out).view_as(x)
        n2, r2, m = torch.empty_like(n), torch.empty_like(r), n.new_empty(N, len(w_up))
        call(kernels.norm, N, D, eps, z, w_2, n2, r2)
        gu = product(n2, stacked(n2, w_gate, w_up))
        call(kernels.swiglu, *m.shape, gu, m)
        out = product(m, w_down.to(dtype))
        ctx.save_for_backward(x, cos, sin, n, r, q, k, v, p, a, z, n2, r2, gu, m, w_1, wq, wk, wv, w_o, w_2,
                              w_gate, w_up, w_down, *keep)
        ctx.n_q, ctx.n_kv = n_q, n_kv
        return z + (out * keep[1] if keep else out).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, cos, sin, n, r, q, k, v, p, a, z, n2, r2, gu, m, w_1, wq, wk, wv, w_o, w_2, w_gate, w_up, w_down,
         *keep) = ctx.saved_tensors                         # weights as they are: a cast copy costs memory
        (B, T, D), N, d, dy = x.shape, len(n), q.shape[2], dy.contiguous()
        kernels, scale = layer_kernels(x.dtype, n.dtype), d ** -0.5

        d_out = dy.view(N, D).to(n.dtype)
        d_out = d_out * keep[1] if keep else d_out
        dw_down, dm = grad_product(d_out, m), product(d_out, w_down.to(n.dtype).t())
        dgu = torch.empty_like(gu)
        call(kernels.swiglu_backward, *m.shape, gu, dm, dgu)
        dw_gu, dn2 = grad_product(dgu, n2), product(dgu, stacked(n, w_gate, w_up).t())
        dz, dw_2 = torch.empty_like(x), x.new_zeros(64, D, dtype=torch.float32)
        call(kernels.norm_backward, N, D, z, w_2, r2, dn2, dy, dz, dw_2)

        d_out = dz.view(N, D).to(n.dtype)
        d_out = d_out * keep[0] if keep else d_out
        dw_o, da = grad_product(d_out, a), product(d_out, w_o.to(n.dtype).t())
        da = da.view(B, T, -1, d).transpose(1, 2).reshape(q.shape)
        ds = torch._softmax_backward_data(da @ v.mT, p, -1, p.dtype)
        dq = torch.baddbmm(q, ds, k, beta=0, alpha=scale)
        dk, dv = torch.baddbmm(k, ds.mT, q, beta=0, alpha=scale), p.mT @ da
        dqkv = n.new_empty(N, (ctx.n_q + 2 * ctx.n_kv) * d)
        call(kernels.rotate, B, T, ctx.n_q, ctx.n_kv, d, -1, cos, sin, dqkv, dq, dk, dv)
        dw_qkv, db = grad_product(dqkv, n), dqkv.sum(0)
        dn = product(dqkv, stacked(n, wq, wk, wv).t())
        dx, dw_1 = torch.empty_like(x), x.new_zeros(64, D, dtype=torch.float32)
        call(kernels.norm_backward, N, D, x, w_1, r, dn, dz, dx, dw_1)

        rows = [heads * d for heads in (ctx.n_q, ctx.n_kv, ctx.n_kv)]
        (dwq, dwk, dwv), (dbq, dbk, dbv) = dw_qkv.split(rows), db.split(rows)
        return (dx, None, None, None, dw_1.sum(0), dwq, dbq, dwk, dbk, dwv, dbv, dw_o, dw_2.sum(0),
                *dw_gu.chunk(2), dw_down)


class FastDecoderLayer(DecoderLayer):
    """DecoderLayer by LayerFunction, if it runs on a CPU without a cache, with up to 1024 tokens (it keeps P,
    B n_head T^2 numbers, for the backward pass), and in a dtype of layer.c. Else DecoderLayer itself."""

    def forward(self, x, cos, sin, cache):
        same = x.dtype == self.input_layernorm.weight.dtype
        known = same and x.dtype in DTYPES and compute_dtype(x) in DTYPES
        if cache is not None or not known or x.device.type != "cpu" or x.shape[1] > 1024 or is_watched(self):
            return super().forward(x, cos, sin, cache)
        return LayerFunction.apply(x, cos.float(), sin.float(), self, *self.parameters())


def is_watched(layer):
    """Whether a layer has a hook or a parametrization, or a module inside it has. LayerFunction ignores them.
    """
    return any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
               or module._backward_pre_hooks or "parametrizations" in module._modules
               for module in layer.modules())


def use_layer_kernels(model):
    """Let LayerFunction compute the layers of a Transformer, if there is a compiler and the results are the
    same. A class that a student has changed gives other results, and is then trained as changed, by autograd.
    """
    layer_type = type(model.layers[0])
    if layer_kernels(torch.float32, torch.float32) is None or layer_type is FastDecoderLayer:
        return
    try:
        same = all(agrees(layer_type, model.config, scale) for scale in (1.0, 6.0))
    except Exception:                                       # the class has other parameters or arguments
        return
    if same:
        for layer in model.layers:
            layer.__class__ = FastDecoderLayer


def agrees(layer_type, c, scale):
    """Whether LayerFunction gives the outputs of a layer with random weights of this scale, and the gradients
    of its input and all its parameters."""
    with torch.random.fork_rng([]), torch.device("cpu"), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        c = replace(c, n_hidden=min(c.n_hidden, 256))           # a wider MLP would only take longer
        layer, T = layer_type(c, 0), min(c.block_size, 256)     # up to 256 tokens the class calls `attention`
        for p in layer.parameters():
            nn.init.normal_(p, 0.0, scale * p.shape[1] ** -0.5 if p.dim() == 2 else 1.0)
        x, weight = torch.randn(1, T, c.n_embd, requires_grad=True), torch.randn(1, T, c.n_embd)
        cos, sin = rotary_cos_sin(torch.arange(T), c.n_embd // c.n_head, 1e4)
        results = []
        for kind in layer_type, FastDecoderLayer:               # one layer, computed in both ways
            layer.__class__ = kind
            torch.default_generator.manual_seed(0)              # the same dropout
            y = layer(x, cos, sin, None)
            results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])])
    return all((a - b).norm() <= 1e-3 * a.norm() for a, b in zip(*results))


def speed_up(model):
    """Put the kernels of this folder into a model on its device, wherever they compute the same."""
    use_decode_kernels(model)
    if not model.recurrent:
        use_layer_kernels(model)


def runs_textbook(model):
    """Whether a CPU runs the textbook code of a model although there are kernels, because it was changed or
    is compiled."""
    layer = getattr(model, "layers", [None])[0]
    if isinstance(layer, LSTM):
        cells = fast_cells(lstm.cell_forward, lstm.cell_backward, "cpu", model.product_dtype)
        return cells == (lstm.cell_forward, lstm.cell_backward)
    return isinstance(layer, DecoderLayer) and not isinstance(layer, FastDecoderLayer)
