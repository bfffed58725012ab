"""Safetensors against the package of that name, in both directions, and against files that lie."""
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_load import DTYPES, read_safetensors, write_safetensors

SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (4, 1, 3)]


def some_tensors(seed=0):
    """A tensor of every dtype and shape, with every bit pattern that a number can have (NaN and infinity included)."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            n = torch.Size(shape).numel()
            raw = torch.randint(2 if dtype == torch.bool else 256, (n * dtype.itemsize,), generator=generator, dtype=torch.uint8)
            out[f"{name} {list(shape)} \u00e9"] = raw.view(dtype).view(shape) if n else torch.empty(shape, dtype=dtype)
    return out


def same(a, b):
    """Equal bit for bit: NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and \
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def test_reads_what_the_library_writes(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    got = read_safetensors(tmp_path / "a.safetensors")
    assert got.keys() == tensors.keys() and all(same(got[k], v) for k, v in tensors.items())


def test_the_library_reads_what_is_written_here(tmp_path):
    tensors = some_tensors(1) | {"transposed": torch.randn(3, 4).t(), "slice": torch.randn(5, 6)[1:4, ::2],
                                 "weight": torch.nn.Parameter(torch.randn(2, 2))}
    write_safetensors(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    for got in (load_file(tmp_path / "a.safetensors"), read_safetensors(tmp_path / "a.safetensors")):
        assert got.keys() == tensors.keys() and all(same(got[k], v.detach()) for k, v in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_no_tensors_at_all(tmp_path):
    write_safetensors({}, tmp_path / "a.safetensors")
    assert read_safetensors(tmp_path / "a.safetensors") == load_file(tmp_path / "a.safetensors") == {}


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    write_safetensors({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    read_safetensors(tmp_path / "a.safetensors")["a"].fill_(1)
    assert read_safetensors(tmp_path / "a.safetensors")["a"].sum() == 0


def test_a_dtype_that_the_format_lacks_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="'c' has the dtype torch.complex64"):
        write_safetensors({"c": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def encode(header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_of_odd_length_is_read(tmp_path):
    for pad in range(9):                                            # the tensors begin at every alignment
        (tmp_path / "a").write_bytes(encode(json.dumps({"a": entry()}).encode() + b" " * pad, torch.tensor([1.5, 2.5]).numpy().tobytes()))
        assert read_safetensors(tmp_path / "a")["a"].tolist() == [1.5, 2.5]


BODY = bytes(8)
LIARS = {
    "empty": b"", "seven bytes": b"\0" * 7, "no header": (0).to_bytes(8, "little"), "huge length": b"\xff" * 8 + b"{}",
    "length past the end": (50).to_bytes(8, "little") + b"{}", "not JSON": encode(b"{'a': 1}"), "not UTF-8": encode(b'{"\xff": 1}'),
    "a list": encode([1, 2]), "a number": encode(b"17"), "spaces first": encode(b'  {}'), "deep": encode(b'{"a":' + b"[" * 200_000),
    "deeper": encode(b"[" * 5_000_000), "long number": encode(b'{"a": ' + b"9" * 100_000 + b"}"), "NaN": encode(b'{"a": NaN}'),
    "an entry that is a text": encode({"a": "F32"}), "no offsets": encode({"a": {"dtype": "F32", "shape": [2]}}, BODY),
    "more in an entry": encode({"a": entry() | {"x": 1}}, BODY), "unknown dtype": encode({"a": entry("F33")}, BODY),
    "dtype a list": encode({"a": entry() | {"dtype": ["F32"]}}, BODY), "negative shape": encode({"a": entry(shape=(-2,))}, BODY),
    "two negatives": encode({"a": entry(shape=(-1, -2))}, BODY), "float shape": encode({"a": entry(shape=(2.0,))}, BODY),
    "true as a shape": encode({"a": entry(shape=(True, 2))}, BODY), "shape a number": encode({"a": entry() | {"shape": 2}}, BODY),
    "shape too large": encode({"a": entry(shape=(3,))}, BODY), "shape too small": encode({"a": entry(shape=(1,))}, BODY),
    "overflowing shape": encode({"a": entry(shape=(1 << 62, 4, 2))}, BODY), "huge shape": encode({"a": entry(shape=(1 << 70,))}, BODY),
    "huge and empty": encode({"a": entry(shape=(1 << 64, 0), offsets=(0, 0))}),
    "beyond counting": encode({"a": entry(shape=(1 << 62, 1 << 62, 0), offsets=(0, 0))}),
    "negative offsets": encode({"a": entry(offsets=(-8, 0))}, BODY), "backwards": encode({"a": entry(offsets=(8, 0))}, BODY),
    "one offset": encode({"a": entry(offsets=(8,))}, BODY), "past the end": encode({"a": entry(offsets=(8, 16))}, BODY),
    "file too short": encode({"a": entry()}, BODY[:7]), "file too long": encode({"a": entry()}, BODY + b"\0"),
    "overlap": encode({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "the same bytes": encode({"a": entry(), "b": entry()}, BODY),
    "gap": encode({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "starts late": encode({"a": entry(offsets=(4, 12))}, bytes(12)),
    "duplicate": encode(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), BODY),
    "duplicate inside": encode(b'{"a": {"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', BODY),
    "metadata a number": encode({"__metadata__": 3}), "metadata of numbers": encode({"__metadata__": {"a": 3}}),
    "a truth value of 2": encode({"a": entry("BOOL", (2,), (0, 2))}, b"\1\2"),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_lying_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / "liar.safetensors"
    path.write_bytes(LIARS[name])
    with pytest.raises(ValueError, match="liar.safetensors is not a whole safetensors file: .+"):
        read_safetensors(path)


def test_no_corruption_of_a_header_passes_for_something_else(tmp_path):
    """1,500 files with a flipped bit, a changed run of bytes or a cut in the header's part: refused, or (where the change
    is in a name, a space or the metadata) the numbers are all still there."""
    generator = random.Random(0)
    tensors = {k: v for k, v in some_tensors(2).items() if "[2, 3]" in k or "[]" in k}
    path = tmp_path / "a.safetensors"
    write_safetensors(tensors, path, {"format": "pt"})
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    kept = [bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors.values()]
    refused = 0
    for k in range(1500):
        corrupt = bytearray(whole)
        if k % 3 == 0:
            corrupt[generator.randrange(header_end)] ^= 1 << generator.randrange(8)
        elif k % 3 == 1:
            at = generator.randrange(header_end)
            for i in range(at, min(header_end, at + generator.randrange(1, 9))):
                corrupt[i] = generator.choice(b'0123456789{}[]",:-eNFBIU\x00\xff')
        else:
            corrupt = corrupt[:generator.randrange(len(whole))]
        path.write_bytes(corrupt)
        try:
            got = read_safetensors(path)
        except ValueError as e:
            assert "a.safetensors is not a whole" in str(e)
            refused += 1
            continue
        assert k % 3 < 2 and sorted(bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in got.values()) == sorted(kept)
    assert refused > 1000
