"""Safetensors against the package of that name, in both directions, and against files that lie; Qwen2 against transformers."""
import hashlib
import json
import sys
import shutil
import subprocess
import random
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import data
import qwen_load
import sample
from data import UserError
from sample import tokenizer_from
from qwen_load import DTYPES, WordPiece, load_weights, read_safetensors, save_weights, write_safetensors
from sample import generate
from tests.conftest import ROOT, real

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
    with pytest.raises(ValueError, match="liar.safetensors is not a complete safetensors file: .+"):
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
            assert "a.safetensors is not a complete" in str(e)
            refused += 1
            continue
        assert k % 3 < 2 and sorted(bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in got.values()) == sorted(kept)
    assert refused > 1000


# --------------------------------------------------------------------------------------------------------------- Qwen2

QWEN2 = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=9000, rope_theta=1e6, tie_word_embeddings=True, initializer_range=0.3)
SIZES = {
    "as Qwen2-0.5B": {}, "untied": {"tie_word_embeddings": False}, "one kv head": {"num_key_value_heads": 1},
    "many kv heads": {"num_key_value_heads": 4}, "odd heads": {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 42},
    "odd groups": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "tie_word_embeddings": False},
    "deep and narrow": {"num_hidden_layers": 7, "hidden_size": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5}}


def library_model(**sizes):
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2 | sizes)).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:                 # else they are all 0 and 1, and hide a mistake
            torch.nn.init.normal_(p, float("norm" in name), 0.3)
    return model


def rewrite(folder, **changes):
    """Change entries of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture
def saved(tmp_path):
    def save(shards=False, binary=False, **sizes):
        model = library_model(**sizes)
        model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "5GB")
        if binary:
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        return model, tmp_path
    return save


@torch.no_grad()
def assert_same_logits(library, model, length=40):
    tokens = torch.randint(97, (3, length), generator=torch.Generator().manual_seed(1))
    ours, theirs = model.logits(model(tokens)[0]), library(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 and torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", ["whole", "shards", "binary"])
def test_logits_equal_transformers(saved, sizes, form):
    library, folder = saved(shards=form == "shards", binary=form == "binary", **SIZES[sizes])
    assert form != "shards" or len(list(folder.glob("*.safetensors"))) > 1
    assert_same_logits(library, load_weights(folder))


def test_long_positions(saved):
    library, folder = saved(num_hidden_layers=1)
    model = load_weights(folder)
    tokens = torch.randint(97, (1, 8192), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens)[0][:, -50:]), library(tokens).logits[:, -50:]
    assert (ours - theirs).abs().max() <= 1e-4 and torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_both_spellings_of_rope(saved):
    library, folder = saved()
    for spelling in ({"rope_theta": 1e6, "rope_parameters": None}, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
                     {"rope_theta": 1e6, "rope_parameters": None, "rope_scaling": None}):
        rewrite(folder, **spelling)
        assert_same_logits(library, load_weights(folder))


def greedy(library, prompt, n, **options):
    """The tokens that transformers.generate finds likeliest."""
    out = library.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=n,
                           do_sample=False, pad_token_id=0, **{"eos_token_id": None} | options)
    return out[0, len(prompt):].tolist()


def test_greedy_generation_equals_transformers_and_does_not_depend_on_the_batch(saved):
    library, folder = saved()
    model, generator = load_weights(folder), torch.Generator().manual_seed(2)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (3, 17, 1, 9)]
    together = generate(model, prompts, 64, temperature=0)
    for prompt, got in zip(prompts, together):
        assert got == greedy(library, prompt, 64) == generate(model, [prompt], 64, temperature=0)[0]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_equals_transformers_in_a_batch_too(saved, penalty):
    library, folder = saved()
    model, prompts = load_weights(folder), [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
    together = generate(model, prompts, 40, temperature=0, repetition_penalty=penalty)
    assert together == [greedy(library, prompt, 40, repetition_penalty=penalty) for prompt in prompts]
    assert together != generate(model, prompts, 40, temperature=0)


def test_several_end_tokens_end_a_text_as_in_transformers(saved):
    library, folder = saved()
    model, prompt = load_weights(folder), [3, 1, 4, 1, 5]
    text = greedy(library, prompt, 40)
    ends = [text[25], text[9]]
    expected = greedy(library, prompt, 40, eos_token_id=ends)
    assert expected[-1] in ends and len(expected) <= 10
    assert generate(model, [prompt], 40, temperature=0, eos=ends)[0] == expected[:-1]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_opens_in_transformers(saved, tmp_path, tied):
    library, folder = saved(tie_word_embeddings=tied)
    save_weights(load_weights(folder), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(97, (2, 30))
    with torch.no_grad():
        assert torch.equal(library(tokens).logits, again(tokens).logits)
    assert_same_logits(library, load_weights(tmp_path / "out"))


def test_names_are_the_hubs_without_a_prefix(saved):
    library, folder = saved(tie_word_embeddings=False)
    ours = load_weights(folder).state_dict().keys()
    assert {qwen_load.hub_name(name) for name in ours} == library.state_dict().keys()
    assert all(qwen_load.hub_name(name).removeprefix("model.") == name for name in ours)


def test_bf16_stays_bf16_and_is_converted_on_request(saved):
    library, folder = saved()
    library.bfloat16().save_pretrained(folder)
    assert load_weights(folder).embed_tokens.weight.dtype == torch.bfloat16
    library = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(library, load_weights(folder, dtype=torch.float32))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "llama"}, "model_type 'llama'"), ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "rope scaling 'linear'"), ({"head_dim": 64}, "head_dim 64"),
    ({"hidden_size": None}, "does not say 'hidden_size'")])
def test_what_is_not_implemented_is_refused_by_name(saved, changes, message):
    _, folder = saved()
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_weights(folder)


def test_every_parameter_is_accounted_for(saved):
    _, folder = saved()
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in read_safetensors(path).items()}
    norm, other = tensors["model.norm.weight"], dict(tensors)
    for wrong, message in (({"model.norm.weight": None}, 'are not those of its config.json: Missing key.*: "norm.weight"'),
                           ({"model.extra": norm}, 'Unexpected key.*: "extra"'),
                           ({"model.norm.weight": norm[:5]}, r"size mismatch for norm.weight: .*\[5\].*\[32\]"),
                           ({"model.embed_tokens.weight": None}, 'Missing key.*: "embed_tokens.weight"'),
                           ({"lm_head.weight": torch.zeros(97, 32)}, "ties the head")):
        write_safetensors({k: v for k, v in (other | wrong).items() if v is not None}, path)
        with pytest.raises(UserError, match=message):
            load_weights(folder)
    write_safetensors(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                                 "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path)
    load_weights(folder)


def test_a_folder_without_what_is_needed_is_named(saved, tmp_path):
    _, folder = saved()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="model.safetensors is not a complete safetensors file"):
        load_weights(folder)
    path.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_weights(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(UserError, match="does not list the files"):
        load_weights(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="model-1.safetensors is missing"):
        load_weights(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        load_weights(folder)
    with pytest.raises(UserError, match="config.json is not there"):
        load_weights(tmp_path / "nowhere")


def test_files_that_are_no_weights_say_what_they_are(saved):
    _, folder = saved()
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in read_safetensors(path).items()}
    name = "model.layers.0.self_attn.q_proj"
    packed = {k: v for k, v in tensors.items() if k != f"{name}.weight"} | {f"{name}.qweight": torch.zeros(4, 32, dtype=torch.int32)}
    write_safetensors(packed, path)
    with pytest.raises(UserError, match="q_proj.qweight, packed integers of a quantized model"):
        load_weights(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 988097824\n")
    with pytest.raises(UserError, match="only git-lfs's pointer to a file. Run: git lfs pull"):
        load_weights(folder)


@pytest.mark.slow
def test_the_full_size_of_qwen2_half_a_billion(tmp_path):
    sizes = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, max_position_embeddings=131072, initializer_range=0.02)
    library = library_model(**sizes)
    library.save_pretrained(tmp_path)
    model, tokens = load_weights(tmp_path), torch.randint(151936, (1, 60))
    with torch.no_grad():
        ours, theirs = model.logits(model(tokens)[0]), library(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 and torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert generate(model, tokens.tolist(), 64, temperature=0)[0] == greedy(library, tokens[0].tolist(), 64)


# ----------------------------------------------------------------------------------------------------------- tokenizer

MERGES = ["t h", "th e", "\u0120 the", "i n", "e r", "\u0120 a", "in g", "d o", "do n", "\u010a \u010a", "\u00c3 \u00a9", "h e", "l l", "he ll", "hell o"]


def write_tokenizer(folder):
    tokens = [*qwen_load.byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")


@pytest.fixture(scope="module", params=["made up", "real"])
def tokenizers(request, tmp_path_factory):
    """Ours and the library's, on a small vocabulary made up here and on the real one."""
    if request.param == "real":
        folder, vocab_size = real("qwen2/vocab.json").parent, 151936
    else:
        folder, vocab_size = tmp_path_factory.mktemp("tokenizer"), 300
        write_tokenizer(folder)
    ours = qwen_load.read_tokenizer(folder, vocab_size)
    library = transformers.Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    library.add_special_tokens({"additional_special_tokens": list(ours.added)})
    return ours, library


def random_text(generator):
    """Letters of every script, marks, digits, spaces, new lines, emoji, contractions, added tokens."""
    parts = []
    for _ in range(generator.randrange(1, 25)):
        kind = generator.randrange(8)
        if kind == 0:
            parts.append(generator.choice(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_", "'S", "'ll", "don't", "I'VE"]))
        elif kind == 1:
            parts.append(generator.choice([" ", "  ", "\n", "\r\n", "\t", "\n\n \n", "\u00a0", "\u3000"]))
        elif kind == 2:
            parts.append(str(generator.randrange(10 ** generator.randrange(1, 12))))
        elif kind == 3:
            parts.append(generator.choice("aeou") + chr(generator.randrange(0x300, 0x370)))         # combining marks: NFC matters
        else:
            low, high = generator.choice([(32, 127), (0xa0, 0x250), (0x370, 0x590), (0x5d0, 0x700), (0x900, 0xe80), (0x1100, 0x1200),
                                          (0x2000, 0x2c00), (0x3040, 0xa000), (0xac00, 0xd7a0), (0xf900, 0xfb00), (0x1f300, 0x1fb00)])
            parts.append("".join(chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 6))))
    return "".join(parts)


def test_the_tokenizer_equals_the_librarys_on_random_unicode(tokenizers):
    ours, library = tokenizers
    generator = random.Random(0)
    # the library's NFC tables are older than two Malayalam marks (Unicode 10) and leave them where they stand
    texts = [random_text(generator).translate({0xd3b: None, 0xd3c: None}) for _ in range(10_000)]
    for text, expected in zip(texts, library(texts, add_special_tokens=False)["input_ids"]):
        assert ours.encode(text) == expected, text
    hello = ours.encode("<|im_start|>hello<|im_end|>")
    assert hello == ([151644, 14990, 151645] if ours.vocab_size == 151936 else [272, 270, 273])


def test_the_tokenizer_equals_the_librarys_on_stories_and_gives_them_back(tokenizers):
    ours, library = tokenizers
    text = real("tinystories/TinyStories-valid.txt").read_text(encoding="utf-8")
    ids = ours.encode(text)
    assert ids == library(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_byte_pairs_of_own_text_are_those_of_the_whole_file(tokenizers, tmp_path):
    """In blocks that no token crosses: here a full stop and the new lines behind it are one token."""
    ours, library = tokenizers
    verse = "".join(f"  A line of verse {k}.\n\tIts end, \u4e2d\u6587\uff0c {k % 7}!\n" + " \n\n"[k % 3:] for k in range(4000))
    for text in (verse, "No blank lines, one end.\n" * 5000, "one line with words. " * 6000):
        (tmp_path / "my.txt").write_text(text)
        ids = data.load(str(tmp_path / "my.txt"), ours, ("all",)).ids["all"].tolist()
        assert ids == library(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_ids_without_a_token_decode_to_nothing(tokenizers):
    ours, _ = tokenizers
    assert ours.decode([*ours.encode("hello"), ours.eos + 3, ours.vocab_size - 1]) == "hello"


def test_a_saved_tokenizer_opens_in_transformers_and_here(tokenizers, tmp_path):
    ours, _ = tokenizers
    qwen_load.save_tokenizer(ours, tmp_path)
    library, again = transformers.AutoTokenizer.from_pretrained(tmp_path), qwen_load.read_tokenizer(tmp_path, ours.vocab_size)
    text = "<|im_start|>Caf\u0065\u0301, 123 don't<|im_end|>\n"
    assert library(text, add_special_tokens=False)["input_ids"] == again.encode(text) == ours.encode(text)
    assert again.state() == ours.state() and tokenizer_from(ours.state()).encode(text) == ours.encode(text)


SMALL = dict(vocab_size=300, initializer_range=0.3)                 # the made-up tokenizer's tokens, and rows that stand for nothing


@pytest.fixture
def whole(saved):
    """A folder with weights and a tokenizer, as the hub has them."""
    library, folder = saved(**SMALL)
    write_tokenizer(folder)
    return library, folder


def test_the_end_tokens_are_those_of_the_files(whole):
    _, folder = whole
    end, eos = len(qwen_load.byte_letters()) + len(MERGES) + 2, len(qwen_load.byte_letters()) + len(MERGES)
    for file, ids, expected in (("config.json", None, [eos]), ("config.json", end, [end]), ("generation_config.json", [end, eos], [eos, end])):
        path = folder / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"eos_token_id": ids}))
        if file == "config.json":
            (folder / "generation_config.json").unlink(missing_ok=True)
        assert qwen_load.read_tokenizer(folder, 300).stops == expected
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')                     # says nothing: config.json does
    assert qwen_load.read_tokenizer(folder, 300).stops == [end]


def test_an_id_that_the_model_has_not_is_refused_when_the_folder_is_opened(whole):
    _, folder = whole
    for last, fits in ((299, True), (300, False)):
        listed = {"280": {"content": "<|endoftext|>", "special": True}, str(last): {"content": "<|extra|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
        if fits:
            assert qwen_load.load_model(folder)[1].encode("<|extra|>") == [299]
        else:
            with pytest.raises(UserError, match="the id 300, but its model only those below 300"):
                qwen_load.load_model(folder)


def test_a_damaged_tokenizer_is_said_in_a_line(whole):
    _, folder = whole
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="merges.txt is not there"):
        qwen_load.read_tokenizer(folder, 300)
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        qwen_load.read_tokenizer(folder, 300)
    for damaged in ({"model": {}}, {"model": {"vocab": {}, "merges": 3}}, {"model": {"vocab": [], "merges": []}}, {"added_tokens": [3]}, [1]):
        (folder / "tokenizer.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="is not one of Qwen2's kind"):
            qwen_load.read_tokenizer(folder, 300)


def test_the_command_writes_what_transformers_writes(whole, capsys):
    library, folder = whole
    tokenizer = qwen_load.read_tokenizer(folder, 300)
    for prompt in ("hello the", ""):
        text = tokenizer.encode(prompt) or [tokenizer.eos]
        expected = greedy(library, text, 20, eos_token_id=tokenizer.eos, suppress_tokens=list(range(len(tokenizer.known), 300)))
        sample.main(["--run", str(folder), "--prompt", prompt, "--tokens", "20", "--temperature", "0", "--dtype", "float32"])
        assert capsys.readouterr().out == prompt + tokenizer.decode([t for t in expected if t != tokenizer.eos]) + "\n"


def test_the_command_in_bf16_by_default_where_the_hardware_has_it(whole, capsys, monkeypatch):
    _, folder = whole
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sample, "pick_dtype", lambda name, device: dtype)
        seen = []
        monkeypatch.setattr(sample, "generate_stream", lambda model, *rest: seen.append(model.embed_tokens.weight.dtype) or [])
        sample.main(["--run", str(folder)])
        assert seen == [dtype]


def test_chat_asks_in_chatml_shows_the_answer_alone_and_stops_at_its_end(whole, capsys, monkeypatch):
    _, folder = whole
    tokenizer = qwen_load.read_tokenizer(folder, 300)
    end, asked = tokenizer.added["<|im_end|>"], []

    def steps(model, prompts, n, temperature, top_k, top_p, eos, *rest):
        asked.append((tokenizer.decode(prompts[0]), set(eos)))
        for token in [*tokenizer.encode("hello the"), end]:
            yield torch.tensor([token]), None, None
    monkeypatch.setattr(sample, "generate_stream", steps)
    sample.main(["--run", str(folder), "--chat", "--prompt", "don't"])
    assert capsys.readouterr().out == "hello the\n"
    assert asked == [("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\ndon't<|im_end|>\n<|im_start|>assistant\n",
                      {tokenizer.eos, end})]
    assert prompts_are_special(tokenizer, asked[0][0])


def prompts_are_special(tokenizer, text):
    ids = tokenizer.encode(text)
    return ids.count(tokenizer.added["<|im_start|>"]) == 3 and ids.count(tokenizer.added["<|im_end|>"]) == 2


def test_ids_without_a_token_are_never_drawn(whole):
    _, folder = whole
    model, tokenizer = qwen_load.load_model(folder)
    banned = tokenizer.suppressed
    assert banned == list(range(len(tokenizer.known), 300))
    drawn = {t for row in generate(model, [[1]] * 8, 60, temperature=3.0, seed=0, suppressed_tokens=banned) for t in row}
    free = {t for row in generate(model, [[1]] * 8, 60, temperature=3.0, seed=0) for t in row}
    assert not drawn & set(banned) and free & set(banned)


def test_a_saved_model_generates_the_same_in_transformers(whole, tmp_path):
    library, folder = whole
    model, tokenizer = qwen_load.load_model(folder)
    qwen_load.save_model(model, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("hello the", add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode("hello the") and greedy(library, ids, 30) == greedy(again, ids, 30)
    assert again.generation_config.eos_token_id == tokenizer.stops


# ------------------------------------------------------------------------------------------------------------- the hub

class Hub:
    """A loopback server with the hub's layout: large files redirect, small ones carry git's blob id."""

    def __init__(self, files):
        self.files, self.asked, self.drop, self.wrong = files, [], set(), None
        self.refuse, self.refusals, self.ignore_range = None, 1 << 30, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.asked.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
                if hub.refuse and hub.refusals > 0:
                    hub.refusals -= 1
                    return self.send_error(hub.refuse)
                large = self.path.startswith("/cdn/")
                name = self.path.removeprefix("/cdn/").removeprefix("/some/model/resolve/main/")
                if name not in hub.files:
                    return self.send_error(404)
                body, start = hub.files[name], int((self.headers.get("Range") or "bytes=0-")[6:-1])
                start = 0 if hub.ignore_range else start
                if name.endswith(".safetensors") and not large:
                    self.send_response(302)
                    self.send_header("Location", f"/cdn/{name}")
                    self.send_header("X-Linked-ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                if not large:
                    self.send_header("X-Repo-Commit", "0" * 40)
                    self.send_header("ETag", '"%s"' % hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest())
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                rest = bytearray(body[start:])
                if name in hub.drop:                                # once: half of it, or a wrong byte
                    hub.drop.remove(name)
                    rest = rest[:len(rest) // 2] if large else bytearray([rest[0] ^ 1]) + rest[1:]
                if name == hub.wrong:
                    rest[len(rest) // 2] ^= 1
                self.wfile.write(rest)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def hub(saved, data_folder, monkeypatch):
    def serve(**options):
        library, folder = saved(**options)
        server = Hub({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.http.server_port}/")
        monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
        servers.append(server)
        return library, server
    servers = []
    yield serve
    for server in servers:
        server.http.shutdown()


def test_a_foreign_configuration_is_refused_before_weights_are_fetched(hub):
    _, server = hub()
    with pytest.raises(UserError, match="describes a qwen2 model"):
        qwen_load.load_scorer("some/model")
    server.files["config.json"] = b'{"model_type": "llama"}'
    shutil.rmtree(data.data_dir() / "hub")
    with pytest.raises(UserError, match="model_type 'llama'"):
        qwen_load.load_model("some/model")
    assert {asked[0].rsplit("/", 1)[1] for asked in server.asked} == {"config.json"}


@pytest.mark.parametrize("shards", [False, True])
def test_a_repository_is_fetched_once_and_only_what_is_needed(hub, data_folder, shards):
    library, server = hub(shards=shards)
    server.files["README.md"] = b"not needed"
    server.drop = {"config.json", next(n for n in server.files if n.endswith(".safetensors"))}
    assert_same_logits(library, load_weights(qwen_load.repo_folder("some/model")))
    here = {p.name for p in (data_folder / "hub" / "some" / "model").iterdir()}
    assert here == set(server.files) - {"README.md"} | {".complete"}
    server.http.shutdown()                                          # from here on without a network
    server.http.server_close()
    assert_same_logits(library, load_weights(qwen_load.repo_folder("some/model")))


def test_an_old_name_without_an_owner_is_asked_for_by_its_owner(hub, data_folder):
    _, server = hub()
    with pytest.raises(UserError, match="no config.json for distilbert/distilbert-base-uncased"):
        qwen_load.load_scorer("distilbert-base-uncased", new_head=True)
    assert server.asked[0][0] == "/distilbert/distilbert-base-uncased/resolve/main/config.json"


def test_a_token_is_sent_and_never_shown(hub, monkeypatch, capsys):
    _, server = hub()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    qwen_load.repo_folder("some/model")
    assert server.asked[0][1] == "Bearer hf_secret" and "hf_secret" not in "".join(capsys.readouterr())


def test_what_is_no_repository_is_said_in_a_line(hub):
    hub()
    for name, message in (("some/other", "no config.json for some/other"), ("qwen", "neither a folder nor"), ("../up/there", "neither a folder nor"),
                          ("a/..", "neither a folder nor")):
        with pytest.raises(UserError, match=message):
            qwen_load.repo_folder(name)


@pytest.mark.parametrize("code, message", [(401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (429, "HTTP 429"), (500, "HTTP 500")])
def test_a_refusal_of_the_hub_is_said_in_a_line_and_leaves_nothing(hub, data_folder, code, message):
    _, server = hub()
    server.refuse = code
    with pytest.raises(UserError, match=message):
        qwen_load.repo_folder("some/model")
    assert not [p for p in data_folder.rglob("*") if p.is_file()]
    server.refuse = None
    qwen_load.repo_folder("some/model")


def test_a_busy_hub_is_asked_again(hub):
    library, server = hub()
    server.refuse, server.refusals = 429, 2
    assert_same_logits(library, load_weights(qwen_load.repo_folder("some/model")))


@pytest.mark.parametrize("ignored", [False, True])
def test_a_connection_that_drops_is_taken_up_where_it_broke_even_if_range_is_ignored(hub, ignored):
    library, server = hub(vocab_size=4000)                          # half a megabyte: more than a block
    server.ignore_range, server.drop = ignored, {"model.safetensors"}
    assert_same_logits(library, load_weights(qwen_load.repo_folder("some/model")))
    assert any(asked[2] and int(asked[2][6:-1]) >= 1 << 16 for asked in server.asked)       # it was asked for the rest


def test_a_byte_that_is_always_wrong_never_becomes_a_file(hub, data_folder):
    _, server = hub()
    server.wrong = "model.safetensors"
    with pytest.raises(UserError, match="model.safetensors"):
        qwen_load.repo_folder("some/model")
    assert not (data_folder / "hub/some/model/model.safetensors").exists() and not (data_folder / "hub/some/model/.complete").exists()
    server.wrong = None
    qwen_load.repo_folder("some/model")


def test_a_run_is_opened_by_its_name_on_the_hub_and_a_missing_one_is_no_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library, server = hub(**SMALL)
    write_tokenizer(tmp_path)
    server.files |= {name: (tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    model, tokenizer, config = sample.load_run("some/model")
    assert tokenizer.kind == "qwen2" and config == model.config and not model.training
    asked = len(server.asked)
    (tmp_path / "here" / "run").mkdir(parents=True)
    (tmp_path / "here" / "run" / "last.pt").touch()
    for missing, said in (("runs/nothing", "there is no run at"), ("here/nothing", "there is no run at"), ("nothing", "there is no run at"),
                          ("/tmp/no/where", "there is no run at"), ("here", "neither a run nor a model .* it holds run")):
        with pytest.raises(UserError, match=said):
            sample.load_run(missing)
    assert len(server.asked) == asked


def test_a_folder_of_a_repositorys_name_does_not_hide_the_hub_and_is_named_if_that_fails(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library, server = hub()
    (tmp_path / "some" / "model").mkdir(parents=True)
    (tmp_path / "some" / "model" / "notes.txt").touch()
    assert_same_logits(library, load_weights(qwen_load.repo_folder("some/model")))
    (tmp_path / "my" / "adapter").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "my" / "adapter" / name).touch()
    for name in ("my/adapter", str(tmp_path / "my" / "adapter")):
        with pytest.raises(UserError, match="adapter_config.json, adapter_model.safetensors"):
            sample.load_run(name)


def test_a_quantized_model_is_refused_by_name(saved):
    _, folder = saved()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantized"):
        load_weights(folder)


def test_weights_in_the_hugging_face_cache_are_used_from_there(hub, saved, tmp_path, monkeypatch):
    library, server = hub()
    _, folder = saved()
    write_tokenizer(folder)
    repository = tmp_path / "home" / "hub" / "models--some--model"
    for revision in ("abc", "newer"):
        (repository / "snapshots" / revision).mkdir(parents=True)
        for file in folder.glob("*.*"):
            shutil.copy(file, repository / "snapshots" / revision)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert qwen_load.cached_snapshot("some/model") is None              # no revision is the current one
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    assert qwen_load.repo_folder("some/model") == snapshot and not server.asked
    for name, value in (("HF_HUB_CACHE", tmp_path / "home" / "hub"), ("HUGGINGFACE_HUB_CACHE", tmp_path / "home" / "hub"),
                        ("XDG_CACHE_HOME", tmp_path / "cache")):
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(name, str(value))
        if name == "XDG_CACHE_HOME":
            shutil.copytree(tmp_path / "home", tmp_path / "cache" / "huggingface")
            snapshot = tmp_path / "cache" / "huggingface" / "hub" / "models--some--model" / "snapshots" / "abc"
        assert qwen_load.repo_folder("some/model") == snapshot and not server.asked
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    snapshot = repository / "snapshots" / "abc"
    next(snapshot.glob("*.safetensors")).unlink()                   # the rest is fetched, and only the rest
    assert qwen_load.repo_folder("some/model") != snapshot
    names = {asked[0].rsplit("/", 1)[1] for asked in server.asked}
    assert "model.safetensors" in names and not names & {"config.json", "vocab.json", "merges.txt"}


def test_two_processes_fetch_one_file_one_after_the_other(hub, data_folder):
    _, server = hub()
    program = ("import sys, data; "
               "data.download(data.HUB + '/some/model/resolve/main/model.safetensors', sys.argv[1])")
    path = data_folder / "model.safetensors"
    both = [subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and path.read_bytes() == server.files["model.safetensors"]
    assert sum(asked[0].startswith("/cdn/") for asked in server.asked) == 1 and [p.name for p in data_folder.iterdir()] == [path.name]


SYSTEM = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
TURN = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
ASK = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
FOR = "{% for message in messages %}"
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {"Qwen2": FOR + SYSTEM + TURN + ASK, "new lines in quotes": (FOR + SYSTEM + TURN + ASK).replace("\\n", "\n"), "Qwen2.5": QWEN25,
             "none": FOR + TURN + ASK}


@pytest.mark.parametrize("name, expected", [("Qwen2", "You are a helpful assistant."), ("new lines in quotes", "You are a helpful assistant."),
                                            ("Qwen2.5", "You are Qwen."), ("none", None)])
def test_the_system_message_is_that_of_the_models_template_and_the_template_is_kept(whole, tmp_path, name, expected):
    _, folder = whole
    added = {str(i): {"content": text, "special": text != "<tool>"} for i, text in ((280, "<|endoftext|>"), (281, "<|im_start|>"), (282, "<|im_end|>"), (283, "<tool>"))}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[name], "added_tokens_decoder": added}))
    model, tokenizer = qwen_load.load_model(folder)
    assert sample.system_message(tokenizer) == (f"<|im_start|>system\n{expected}<|im_end|>\n" if expected else "")
    qwen_load.save_model(model, tokenizer, tmp_path / "written")
    written = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert written["chat_template"] == TEMPLATES[name]
    assert {token["content"] for token in written["added_tokens_decoder"].values() if token["special"]} == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert sample.tokenizer_from(tokenizer.state()).chat_template == TEMPLATES[name]
    library = transformers.AutoTokenizer.from_pretrained(tmp_path / "written")
    rendered = library.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert rendered == sample.system_message(tokenizer) + sample.MESSAGE.format(role="user", text="Why?") + sample.ANSWER


@pytest.mark.parametrize("template", [
    FOR + TURN.replace("'\\n' + message['content']", "'\\n' + message['content'] | trim") + ASK,                  # changes the text
    FOR + TURN + "{% endfor %}", "Be short. " + FOR + TURN + ASK,                                                 # no answer; text of its own
    "{% set s = 'Answer in one word.' %}{{ '<|im_start|>system\\n' + s + '<|im_end|>\\n' }}" + FOR + TURN + ASK,    # a message in a variable
    QWEN25.replace("and not loop.first", ""), FOR + SYSTEM.replace("!= 'system'", "== 'user'") + TURN + ASK])
def test_an_unknown_chat_template_is_refused(whole, template, capsys):
    _, folder = whole
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="--chat knows the chat templates of Qwen2, Qwen2.5 and SmolLM2, and this model has another"):
        sample.main(["--run", str(folder), "--chat", "--prompt", "Why?", "--tokens", "3"])
    sample.main(["--run", str(folder), "--prompt", "Why?", "--tokens", "3"])
    assert capsys.readouterr().out.startswith("Why?")


def write_library_tokenizer(folder, **parts):
    """tokenizer.json of a byte-level tokenizer as transformers writes it, with other parts."""
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {
        str(280 + k): {"content": text, "special": True} for k, text in enumerate(qwen_load.ADDED)}}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    for name, part in parts.items():
        if name == "model":
            whole["model"] |= part
        else:
            whole[name] = part
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


@pytest.mark.parametrize("parts, message", [
    ({}, None), ({"normalizer": None}, "a normalizer other than NFC"), ({"normalizer": {"type": "Lowercase"}}, "a normalizer other than NFC"),
    ({"pre_tokenizer": None}, "another way to split words"),
    ({"normalizer": None, "pre_tokenizer": None}, "a normalizer other than NFC; another way to split words"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}]}}, "a normalizer other than NFC"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}}, "another way to split words"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
     "another way to split words"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                         "pair": [], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [280], "tokens": ["<|endoftext|>"]}}}},
     "tokens that begin or end every text"),
    ({"model": {"ignore_merges": True}}, "ignore_merges")])
def test_a_pipeline_of_its_own_is_refused(whole, parts, message):
    _, folder = whole
    write_library_tokenizer(folder, **parts)
    if message:
        with pytest.raises(UserError, match=f"{folder.name}: its tokenizer is not one of Qwen2's kind: it has {message}"):
            qwen_load.load_model(folder)
    else:
        text = "<|im_start|>Hello the don't 123<|im_end|>"
        assert qwen_load.load_model(folder)[1].encode(text) == transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("setting", ["add_bos_token", "add_prefix_space"])
def test_a_token_or_a_space_before_every_text_is_refused(whole, setting):
    _, folder = whole
    (folder / "tokenizer_config.json").write_text(json.dumps({setting: True, "added_tokens_decoder": {"280": {"content": "<|endoftext|>"}}}))
    with pytest.raises(UserError, match="before every text|begins every text"):
        qwen_load.load_model(folder)


@pytest.mark.parametrize("as_one_file", [False, True])
def test_an_export_has_the_files_of_its_base_byte_for_byte(whole, tmp_path, as_one_file):
    _, folder = whole
    first = 280 if as_one_file else len(qwen_load.byte_letters()) + len(MERGES)
    if as_one_file:
        write_library_tokenizer(folder)
    else:
        (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}\n')
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "model_max_length": 77, "added_tokens_decoder": {
            str(first + k): {"content": text, "special": True} for k, text in enumerate(qwen_load.ADDED)}}, indent=3))
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{first + 2}, {first}], "temperature": 0.7,\n "do_sample": true}}')
    model, tokenizer = qwen_load.load_model(folder)
    again = sample.tokenizer_from(tokenizer.state())                        # as a checkpoint keeps it
    qwen_load.save_model(model, again, tmp_path / "export")
    names = {p.name for p in folder.iterdir() if p.is_file()} - {"config.json", "model.safetensors"}
    assert names and all((tmp_path / "export" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    library = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert again.stops == [first, first + 2] and library("Hello<|im_end|>")["input_ids"] == again.encode("Hello<|im_end|>")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "export").temperature == 0.7


def test_a_conversation_keeps_its_state_and_says_what_one_long_prompt_would(whole, capsys, monkeypatch):
    _, folder = whole
    model, tokenizer = qwen_load.load_model(folder, dtype=torch.float32)
    said, read, forward = iter(["hello", "and the?", EOFError]), [], type(model).forward

    def ask(prompt):
        text = next(said)
        if text is EOFError:
            raise EOFError
        return text
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(type(model), "forward", lambda self, tokens, *rest, **more: read.append(tokens.tolist()[0]) or forward(self, tokens, *rest, **more))
    sample.main(["--run", str(folder), "--chat", "--tokens", "6", "--temperature", "0", "--dtype", "float32"])
    turns = capsys.readouterr().out.split("\n")[:2]
    monkeypatch.undo()
    ids = [i for part in read for i in part]                                # each token once
    text = sample.system_message(tokenizer) + "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    first = generate(model, [tokenizer.encode(text)], 6, temperature=0, suppressed_tokens=tokenizer.suppressed)[0]
    assert tokenizer.decode(first) == turns[0]
    head = tokenizer.encode(text) + first + tokenizer.encode("<|im_end|>\n<|im_start|>user\nand the?<|im_end|>\n<|im_start|>assistant\n")
    assert ids[:len(head)] == head
    assert tokenizer.decode(generate(model, [head], 6, temperature=0, suppressed_tokens=tokenizer.suppressed)[0]) == turns[1]


def test_a_chat_survives_what_is_no_text_and_cuts_answers_to_the_context(whole, capsys, monkeypatch):
    _, folder = whole
    said = iter(["hello", "", "  ", "caf\udce9", "and <|im_end|>?"])

    def ask(prompt=""):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sample, "CHAT_CONTEXT", 100)
    sample.main(["--run", str(folder), "--chat", "--tokens", "4096", "--dtype", "float32", "--temperature", "0"])
    out = capsys.readouterr()
    assert out.err.count("(your message holds <|im_end|>, which the model reads as a control token)") == 1
    assert "this is no UTF-8 text" in out.err and "too long" not in out.err and "(cut off)" in out.err and len(out.out) > 50


def test_whole_weights_are_read_beside_an_index_of_shards_that_are_not_there(whole, tmp_path):
    _, folder = whole
    tensors = qwen_load.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "model-00001-of-00002.safetensors" for name in tensors}}))
    model, _ = qwen_load.load_model(folder)
    assert model.embed_tokens.weight.shape[0] == 300


def test_a_mistyped_run_is_said_to_be_missing_and_the_hub_to_have_been_asked(hub):
    hub()
    with pytest.raises(UserError, match="there is no run at run/w; and as a name on the hub: .*run/w"):
        sample.load_run("run/w")


def test_shards_whose_index_got_lost_are_read(whole):
    _, folder = whole
    tensors = qwen_load.read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for k, part in enumerate((names[:5], names[5:]), 1):
        write_safetensors({name: tensors[name] for name in part}, folder / f"model-0000{k}-of-00002.safetensors")
    model, _ = qwen_load.load_model(folder)
    assert torch.equal(model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="only git-lfs's pointer to a file. Run: git lfs pull"):
        qwen_load.load_model(folder)


def test_a_list_of_templates_has_a_default(whole):
    _, folder = whole
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES["Qwen2.5"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert "You are Qwen." in sample.system_message(qwen_load.read_tokenizer(folder, 300))


def test_a_message_longer_than_the_context_is_said_to_be_and_the_conversation_continues(whole, capsys, monkeypatch):
    _, folder = whole
    said = iter(["the " * 5000, "hello"])

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", ask)
    sample.main(["--run", str(folder), "--chat", "--tokens", "5", "--dtype", "float32"])
    out = capsys.readouterr()
    assert "this message is too long" in out.err and out.out.strip()


def test_ctrl_c_stops_an_answer_and_not_the_conversation(whole, capsys, monkeypatch):
    _, folder = whole
    said, drawn = iter(["one", "two"]), []

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", ask)
    original = sample.sample_token

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(sample, "sample_token", interrupted)
    sample.main(["--run", str(folder), "--chat", "--tokens", "5", "--dtype", "float32"])
    assert len(drawn) == 3 + 5


@pytest.mark.parametrize("stopped_at", ["read", "draw"])
def test_after_ctrl_c_a_conversation_has_each_token_once(whole, monkeypatch, stopped_at):
    """Whether it comes while a prompt is read, or after a token of the answer was read and before the next is drawn."""
    _, folder = whole
    model, tokenizer = qwen_load.load_model(folder, dtype=torch.float32)
    said, read, drawn = iter(["one", "two"]), [], []
    forward, draw = type(model).forward, sample.sample_token

    def ask(prompt=""):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    def watched(self, tokens, *rest, **more):
        if stopped_at == "read" and not read and not drawn:
            drawn.append(None)                                  # once
            raise KeyboardInterrupt
        out = forward(self, tokens, *rest, **more)
        read.extend(tokens[0].tolist())
        return out

    def interrupted(*args):
        if stopped_at == "draw" and len(drawn) == 2:
            drawn.append(None)
            raise KeyboardInterrupt
        token, log_p = draw(*args)
        drawn.append(token.item())
        return token, log_p
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(sample, "sample_token", interrupted)
    sample.main(["--run", str(folder), "--chat", "--tokens", "5", "--dtype", "float32", "--temperature", "0"])
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first = tokenizer.encode(sample.system_message(tokenizer) + turn.format("one"))
    answer = drawn[:2] if stopped_at == "draw" else []
    head = first + answer + tokenizer.encode("<|im_end|>\n" + turn.format("two"))
    assert read[:len(head)] == head


@pytest.mark.slow
def test_a_real_pretrained_model_is_transformers_to_the_last_bit():
    """The folder that holds a real language model in Qwen2's layout; random weights hide what only trained ones show."""
    folder = real("smollm2/config.json").parent
    model, tokenizer = qwen_load.load_model(folder, dtype=torch.float32)
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer.encode("The capital of France is a city that many people want to see, because")
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(torch.tensor([ids]))[0]), library(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-5)
    theirs = library.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()
    assert generate(model, [ids], 40, temperature=0)[0] == theirs



# ------------------------------------------------------------------------------------------------------- WordPiece

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCAB = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS), *"!,.'-", "film", "##ing", "##ings", "good",
         "go", "##o", "bad", "not", "very", "##ly", "the", "actor", "act", "plays", "play", "##s", "\u4e2d", "e", "cafe"]

def library_tokenizer(vocab_file):
    return transformers.BertTokenizer(vocab=str(vocab_file), do_lower_case=True)


def agree(ours, theirs, texts):
    for text in texts:
        expected = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert ours.encode(text) == expected, ascii(text)


def settled(code):
    """Whether a character has been in Unicode, under its category of today, since version 3.2: the library's tables are older than Python's."""
    ch = chr(code)
    return unicodedata.category(ch) == unicodedata.ucd_3_2_0.category(ch) not in ("Cn", "Cs")


def random_unicode(n, seed):
    """Texts of characters from all over Unicode."""
    rng = random.Random(seed)
    ranges = [(9, 127), (0x80, 0x24f), (0x300, 0x36f), (0x370, 0x6ff), (0x900, 0x1fff), (0x2000, 0x2fff), (0x3040, 0x9fff), (0xac00, 0xd7a3), (0xf900, 0xffff),
              (0x1d000, 0x1d7ff), (0x20000, 0x2fa1f)]
    out = []
    for _ in range(n):
        chars = []
        while len(chars) < rng.randint(1, 40):
            code = rng.randint(*rng.choice(ranges))
            chars += [chr(code)] if settled(code) else []
            if rng.random() < 0.4:
                chars.append(rng.choice([" ", "\t", "\n", "film", "caf\u00e9", "Good", "\u0130", "\u00df", "\u00a0", "...", "\x00", "\ufffd"]))
        out.append("".join(chars))
    return out


def test_every_settled_character_is_treated_as_the_library_does(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    library = library_tokenizer(tmp_path / "vocab.txt").backend_tokenizer
    codes = [code for code in range(0x110000) if settled(code)]
    assert len(codes) > 90_000
    for at in range(0, len(codes), 500):
        text = " q".join(f"a{chr(code)}B" for code in codes[at:at + 500])
        expected = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(library.normalizer.normalize_str(text))]
        assert qwen_load.basic_words(text) == expected


def test_wordpiece_equals_the_librarys_on_a_made_up_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    fixed = ["", " ", "The actor's FILMINGS are not good!", "caf\u00e9 Cafe\u0301", "a" * 100, "a" * 101, "\u4e2dfilm\u4e2d", "go\u00adod", "good\u2014bad", "1.5,x"]
    agree(WordPiece(VOCAB), library_tokenizer(tmp_path / "vocab.txt"), fixed + random_unicode(2000, 0))


def test_wordpiece_equals_the_librarys_on_the_real_vocabulary():
    path = real("distilbert/vocab.txt")
    ours, theirs = WordPiece(path.read_text(encoding="utf-8").removesuffix("\n").split("\n")), library_tokenizer(path)
    agree(ours, theirs, random_unicode(3000, 1))
    real("imdb/aclImdb_v1.tar.gz")
    texts = [text for text, _ in data.labelled("imdb", "train")[:5000]]
    expected = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == expected and len(texts) == 5000


def test_a_vocabulary_of_ones_own_knows_frequent_words_letters_and_endings():
    texts = ["the film is good , the actor acts", "the film is bad , the actor overacts", "filmed nicely , acted badly"] * 5 + ["rare"]
    piece = qwen_load.build_wordpiece(texts, 800)
    assert len(piece.vocab) == len(set(piece.vocab)) <= 800 and piece.vocab[0] == "[PAD]"
    assert [piece.vocab[i] for i in piece.encode("the film")] == ["the", "film"]
    assert piece.unk not in piece.encode("relisted")                        # letters that it has seen spell any word
    assert piece.encode("\u4e2d") == [piece.unk]
    small = qwen_load.build_wordpiece([f"{a}{b}ing" for a in "abcdefgh" for b in "klmnop"] * 2, 60)
    assert "##ing" in small.vocab
