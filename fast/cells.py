"""The LSTM's cell in C (cells.c). It replaces lstm.cell_forward and lstm.cell_backward, which pass over small
vectors a dozen times. C passes over them once."""
import ctypes
import functools

import torch

from fast.products import compile_c


@functools.lru_cache(None)
def fast_cells(cell_forward, cell_backward, device_type, dtype):
    """The same two functions in C, for float32 and bfloat16 on a CPU with a compiler, if C computes the same.
    Else, for example if a student has changed them, the two functions themselves."""
    library = None
    if device_type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        library = compile_c("cells", "-DBF16") if dtype == torch.bfloat16 else compile_c("cells")
    if library is None:
        return cell_forward, cell_backward
    cells_in_c = as_function(library.cell_forward, 5), as_function(library.cell_backward, 7)
    same = all(agree((cell_forward, cell_backward), cells_in_c, scale, dtype) for scale in (1.0, 16.0))
    return cells_in_c if same else (cell_forward, cell_backward)


def as_function(c_function, n_arrays):
    """A C function of (B, H, arrays) as a function of tensors, the last of which is [B, H]."""
    c_function.argtypes, c_function.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * n_arrays, None
    return lambda *arrays: c_function(*arrays[-1].shape, *[array.data_ptr() for array in arrays])


def agree(textbook, in_c, scale, dtype):
    """Whether both pairs of functions compute the same from random numbers of this scale. The textbook's pair
    computes in float32 what C computes in dtype, so that only the rounding of the results separates them."""
    draw, results = torch.Generator().manual_seed(0), []
    a, from_h, c_before, c, grad_h, from_next, dc_next = (
        scale * torch.randn(8, width, generator=draw) for width in (64, 64, 16, 16, 16, 16, 16))
    gates = torch.cat((torch.sigmoid(a[:, :32]), torch.tanh(a[:, 32:48]), torch.sigmoid(a[:, 48:])), 1)
    a, from_h, grad_h, from_next, gates = (v.to(dtype) for v in (a, from_h, grad_h, from_next, gates))
    for (forward, backward), kind in (textbook, torch.float32), (in_c, dtype):
        new_gates, new_c, h = a.to(kind, copy=True), torch.empty(8, 16), torch.empty(8, 16, dtype=kind)
        forward(new_gates, from_h.to(kind), c_before, new_c, h)
        da, dc = torch.empty(8, 64, dtype=kind), dc_next.clone()
        backward(gates.to(kind), grad_h.to(kind), from_next.to(kind), c_before, c, da, dc)
        results.append([v.float() for v in (new_gates, new_c, h, da, dc)])
    tolerance = 1e-4 if dtype == torch.float32 else 2 ** -8
    return all((x - y).norm() <= tolerance * x.norm() for x, y in zip(*results))
