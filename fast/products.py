"""Matrix products, dropout and memory, as fast as this CPU allows. They replace x @ w.T, g.T @ x and
nn.Dropout.

    x W^T + b, g^T x, and a product that is repeated with one W    product, grad_product, packed_linear
    dropout of single elements                                     dropout
    a C file of this folder as a library                           compile_c
    freed memory that stays with the process                       keep_memory

torch multiplies float32 matrices through MKL. It also has oneDNN, which on an AMD processor multiplies few
rows up to three times as fast, and from Zen 5 (family 26) on multiplies everything twice as fast. The
processor decides which of the two is called, and never a stopwatch, because a resumed run has to compute the
same bits.
"""
import ctypes
import functools
import os
import platform
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

CPUINFO = Path("/proc/cpuinfo")
CPU = CPUINFO.read_text() if CPUINFO.exists() else platform.processor()
AMD = torch.backends.mkldnn.is_available() and "AuthenticAMD" in CPU
ONEDNN = AMD and re.search(r"(?i)family\s*:? (2[6-9]|[3-9]\d)\b", CPU) is not None


def processor_name():
    """The name of the processor, for result.json."""
    match = re.search("model name\\s*: (.+)", CPU)
    return match[1] if match else platform.processor() or platform.machine()


def product(x, w, bias=None):
    """x w^T + b, for x [..., K], w [M, K], b [M]. Without autograd, because oneDNN's operations have none."""
    if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def grad_product(g, x):
    """g^T x, the gradient of a weight, for g [N, M], x [N, K]."""
    # Autograd copies the transposed result into the weight's layout. In float32 that costs less than the
    # faster product gains, and in bfloat16 it costs more.
    if ONEDNN and g.dtype == torch.float32:
        return product(x.t(), g.t()).t()
    return g.t() @ x


def packed_linear(w, rows, times):
    """The function x [rows, K] -> x w^T, for w [M, K], to be called `times` times. The library reorders w for
    its kernels in every product; where there are several products, w is reordered once, here."""
    onednn, mkl = torch.ops.mkldnn, torch.ops.mkl
    several = times > 1 and w.device.type == "cpu" and torch.backends.mkldnn.is_available()
    is_float32, is_bf16 = (several and w.dtype == dtype for dtype in (torch.float32, torch.bfloat16))
    large = w.numel() >= (1 << 16 if ONEDNN else 1 << 18)
    if is_float32 and AMD and large or is_bf16 and onednn._is_mkldnn_bf16_supported():
        packed = onednn._reorder_linear_weight(w.contiguous(), rows)
        return lambda x: onednn._linear_pointwise(x, packed, None, "none", [], "")
    if is_float32 and not AMD and torch.backends.mkl.is_available():
        w = w.contiguous()
        packed = mkl._mkl_reorder_linear_weight(w, rows)
        return lambda x: mkl._mkl_linear(x, packed, w, None, rows)
    w_t = w.t().contiguous() if is_float32 else w.t()           # MKL is 1.3 times as fast with it
    return lambda x: x @ w_t


def dropout(x, p, training):
    """Dropout of single elements, as nn.Dropout. A CPU draws random bits slowly, so each 64-bit draw serves
    eight elements: p is rounded to a multiple of 1/256, and the rest is scaled for the rounded p. A smaller p
    is drawn exactly."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or p < 1 / 256:
        return F.dropout(x, p)
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-2 ** 63, None)
    cut = min(255, round(p * 256))
    keep = (drawn.view(torch.uint8)[:x.numel()] >= cut).view(x.shape)
    return x * keep * (256 / (256 - cut))


@functools.lru_cache(None)
def compile_c(name, *flags):
    """NAME.c of this folder as a library for this CPU, or None without a compiler ($CC names one). A process
    compiles a file once, in about 0.3 s."""
    source = Path(__file__).resolve().parent / f"{name}.c"
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", *flags, str(source), "-o"]
    for optional in (["-march=native", "-fopenmp"], ["-march=native"], []):     # not every compiler has them
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                library = str(Path(folder, "code.so"))
                command = [*shlex.split(os.environ.get("CC", "cc")), *optional, *flags, library]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                return ctypes.CDLL(library)
        except (OSError, ValueError, subprocess.SubprocessError):
            continue
    return None


def keep_memory():
    """Make glibc keep freed memory for the next tensor of the same size, instead of returning large pieces to
    the system and fetching them again page by page. (PPO with 50,257 tokens: 4.0 s an iteration without, 2.9
    with.)"""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                                    # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)                                          # M_TRIM_THRESHOLD
