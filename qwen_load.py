"""Pretrained weights. So far: the safetensors format, read and written by hand.

The format (github.com/huggingface/safetensors): 8 bytes, little-endian: the length n of the header; n bytes of JSON,

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"any": "text"}}

then the tensors' bytes, row-major and little-endian; offsets are counted from the end of the header. Nothing in such a
file can be executed. What a reader must check before it believes a header: that the length fits the file, no name
occurs twice, each tensor's bytes are as many as its shape and dtype say, and all together fill the rest of the file
without gap or overlap. A flipped bit inside the numbers cannot be seen: the format has no checksum.

    tensors = read_safetensors("model.safetensors")     # {name: tensor}
    write_safetensors(tensors, "copy.safetensors", {"format": "pt"})
"""
import json
import math
import mmap
import os
from pathlib import Path

import torch

from data import write_atomically

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000                        # bytes; the limit of the format's reference reader


def no_duplicates(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return out


def read_header(f):
    """Of an open file: -> ({name: (dtype, shape, begin, end)}, metadata), begin and end counted from the start of the file.
    ValueError, saying what is wrong, unless everything holds that the format demands."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(f"it should have a header of {length} bytes, but the whole file has {size}")
    raw = f.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"its header is not JSON ({type(e).__name__})") from e
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    found, data_start = {}, 8 + length
    for name, info in header.items():
        if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name!r} in its header is not described by dtype, shape and data_offsets")
        shape, offsets = info["shape"], info["data_offsets"]
        if not isinstance(info["dtype"], str) or info["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} has the dtype {info['dtype']!r}; those known here are {' '.join(DTYPES)}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
                raise ValueError(f"{name!r} has a shape or offsets that are not lists of whole numbers")
        dtype = DTYPES[info["dtype"]]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} lies at {offsets}, which its shape {shape} and dtype {info['dtype']} contradict")
        found[name] = dtype, shape, data_start + offsets[0], data_start + offsets[1]
    at = data_start
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise ValueError(f"the bytes of {name!r} begin at {begin}, but those before them end at {at}")
        at = end
    if at != size:
        raise ValueError(f"its last tensor ends at byte {at}, the file at {size}")
    return found, metadata


def read_safetensors(path):
    """{name: tensor} of a safetensors file; ValueError that names the file and the fault. The tensors are views of the
    mapped file: their bytes are read when they are first used. Writing to a tensor does not change the file."""
    try:
        with open(path, "rb") as f:
            header, _ = read_header(f)
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {}
        for name, (dtype, shape, begin, end) in header.items():
            if begin == end:
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            # torch wants memory aligned to the dtype; a header of odd length leaves none
            buffer, offset = (mapped, begin) if begin % dtype.itemsize == 0 else (bytearray(mapped[begin:end]), 0)
            if dtype == torch.bool and torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=offset).max() > 1:
                raise ValueError(f"{name!r} has truth values other than 0 and 1")
            tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
    except (ValueError, RuntimeError) as e:                                 # RuntimeError: shapes beyond torch's counting
        raise ValueError(f"{path} is not a whole safetensors file: {e}. Delete it and fetch it again") from e
    return tensors


def write_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} to path (another name first: a kill leaves the old file or the whole new one), metadata a table of
    texts. ValueError for a dtype that the format, as it is read here, does not have."""
    header, at = {}, 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))     # the widest first: all aligned
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name!r} has the dtype {tensor.dtype}, which {path} cannot hold")
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)

    def write(f):
        f.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            f.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    write_atomically(Path(path), write)
