"""Products of a few rows without a gradient, for a CPU: the steps of generation. It replaces nn.Linear.

Generation reads every weight for every token, so its speed is that of memory. These are the GB/s of a large
matrix that two cores of an AMD EPYC with AVX512-BF16 read, for 1, 8, 32 and 128 rows:

    bfloat16: F.linear 17, 14, 8, 3; packed by oneDNN 25, 25, 12, 3.3; decode.c 33 (one row)
    float32:  F.linear 14, 8, 5, 2; packed by oneDNN 28, 26, 12, 3
"""
import contextlib
import ctypes
import functools

import torch
import torch.nn as nn

from fast.products import AMD, compile_c, product
from rnn import compute_dtype


@functools.lru_cache(None)
def compiled_linear():
    """The function of decode.c, or None without a compiler."""
    library = compile_c("decode", "-DBF16")
    if library is None:
        return None
    library.linear.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 4
    return library.linear


PACKED = None                                   # {DecodeLinear: its weight packed}, during a model's calls


@contextlib.contextmanager
def packed_weights(packed):
    """Within this context the steps of a few rows keep a packed copy of each matrix in the dict `packed` (the
    weights' memory once more). One generation makes the dict and enters the context around its calls of the
    model. No longer, because a fused optimizer changes weights without a trace."""
    global PACKED
    before, PACKED = PACKED, packed
    try:
        yield
    finally:
        PACKED = before


class DecodeLinear(nn.Linear):
    """nn.Linear that takes the fastest way of the head of this file if no gradient is needed."""

    def forward(self, x):
        weight, bias, onednn = self.weight, self.bias, torch.ops.mkldnn
        rows, is_bf16 = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
        known = rows and (is_bf16 or AMD and x.dtype == torch.float32) and x.device.type == "cpu"
        if torch.is_grad_enabled() or not known or not compute_dtype(x) == x.dtype == weight.dtype:
            return super().forward(x)
        if rows == 1 and is_bf16 and self.in_features % 2 == 0 and (linear := compiled_linear()):
            x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.out_features)
            bias_pointer = None if bias is None else bias.data_ptr()
            linear(self.out_features, self.in_features // 2, x.data_ptr(), weight.data_ptr(), bias_pointer,
                   y.data_ptr())
            return y
        if rows == 1 and not is_bf16:           # F.linear is as fast as a packed weight
            return onednn._linear_pointwise(x, weight, bias, "none", [], "")
        step = rows == len(x) <= 128 and torch.backends.mkldnn.is_available()   # one token of each row
        if PACKED is None or not step or is_bf16 and not onednn._is_mkldnn_bf16_supported():
            return product(x, weight, bias)
        if self not in PACKED:
            PACKED[self] = onednn._reorder_linear_weight(weight, rows)
        return onednn._linear_pointwise(x, PACKED[self], bias, "none", [], "")


def use_decode_kernels(model):
    """Make DecodeLinears of a model's matrices on a CPU, in bfloat16 and, on an AMD processor, in float32."""
    dtypes = [torch.bfloat16] + [torch.float32] * AMD
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in dtypes \
                and module.weight.device.type == "cpu" and module.weight.is_contiguous():
            module.__class__ = DecodeLinear
