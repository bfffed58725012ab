"""Everything that comes from a hub or goes to one: the safetensors format by hand, the weights of Qwen2 and
DistilBERT in our Transformer and our encoder, and their tokenizers.

The safetensors format (github.com/huggingface/safetensors). A file begins with 8 bytes, little-endian: the
length n of the header. n bytes of JSON follow:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
     "__metadata__": {"any": "text"}}

Then come the bytes of the tensors, row-major and little-endian. Offsets count from the end of the header.
Nothing in such a file can be executed. A reader must check a header before it believes it: the length fits
the file, no name occurs twice, each tensor has as many bytes as its shape and dtype say, and all tensors
together fill the rest of the file without a gap or an overlap. A flipped bit inside the numbers cannot be
seen, because the format has no checksum.

Qwen2 (Yang et al. 2024) is the decoder of transformer.py, and DistilBERT (Sanh et al. 2019) the encoder.
Their parameters have the hub's names without the prefix `model.` or `distilbert.`. If the head is tied, a
file has no lm_head.weight.

WordPiece (Schuster & Nakajima 2012) is DistilBERT's tokenizer. The text loses capitals and accents and is
split at spaces and punctuation. Each word is then cut from its left end into the longest pieces that the
vocabulary has; a piece inside a word begins with ##. Qwen2's tokenizer is byte-pair encoding (Sennrich et al.
2016), through tiktoken.

Where to find what:
    the safetensors format              read_header, read_safetensors, write_safetensors
    the hub, and the user's cache       repo_folder, cached_snapshot
    Qwen2                               read_config, load_hub_weights, Qwen2Tokenizer
    chat templates                      system_text
    DistilBERT and WordPiece            scorer_config, load_scorer, basic_words, WordPiece.pieces

    model, tokenizer = load_model("path/of/Qwen2-0.5B")   # a folder in the hub's layout, or a name on the hub
    scorer = load_scorer("lvwerra/distilbert-imdb")
"""
import json
import math
import os
import re
import shutil
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from data import (HUB, SEPARATOR, NotFound, UserError, data_dir, download, quoted, read_json, save_json,
                  write_atomically, write_text)
from transformer import Scorer, ScorerConfig, Transformer, TransformerConfig

# ------------------------------------------------------------------------------------------------ safetensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000                        # bytes; the limit of the format's reference reader


def check(holds, what):
    if not holds:
        raise ValueError(what)


def no_duplicates(pairs):
    out = dict(pairs)
    check(len(out) == len(pairs), "a name occurs twice in its header")
    return out


def read_header(f):
    """The header of an open file: {name: (dtype, shape, begin, end)}, where begin and end count from the
    start of the file. ValueError, with the fault, if the header breaks a rule of the format."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    check(8 <= size and length <= min(size - 8, MAX_HEADER),
         f"it should have a header of {length} bytes, but the file has {size}")
    raw = f.read(length)
    check(raw.startswith(b"{"), "its header does not begin with {")
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    metadata = header.pop("__metadata__", {}).values()
    check(all(isinstance(text, str) for text in metadata), "its __metadata__ is not a table of texts")
    found, at = {}, 8 + length
    for name, info in header.items():
        check(info.keys() == {"dtype", "shape", "data_offsets"},
             f"{name!r} in its header is not described by dtype, shape and data_offsets")
        kind, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        check(kind in DTYPES, f"{name!r} has the dtype {kind!r}; known here are {' '.join(DTYPES)}")
        check(all(type(n) is int and n >= 0 for n in shape), f"{name!r} has the shape {shape}")
        check(end - begin == math.prod(shape) * DTYPES[kind].itemsize,
             f"{name!r} lies at {begin} to {end}, which its shape {shape} and dtype {kind} contradict")
        found[name] = DTYPES[kind], shape, at + begin, at + end
    for name, (_, _, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        check(begin == at, f"the bytes of {name!r} begin at {begin}, but those before them end at {at}")
        at = end
    check(at == size, f"its last tensor ends at byte {at}, the file at {size}")
    return found


def read_safetensors(path):
    """{name: tensor} of a safetensors file. ValueError that names the file and the fault."""
    tensors = {}
    try:
        with open(path, "rb") as f:
            for name, (dtype, shape, begin, end) in read_header(f).items():
                tensors[name] = torch.empty(shape, dtype=dtype)
                raw = tensors[name].view(-1).view(torch.uint8)
                f.seek(begin)
                check(f.readinto(raw.numpy()) == end - begin, f"it ends inside {name!r}")
                check(dtype != torch.bool or not (raw > 1).any(), f"{name!r} has truth values beyond 0 and 1")
    # json and torch raise many types for a header with other contents
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path} is not a complete safetensors file: {e}. Fetch it again") from e
    return tensors


def write_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} and a table of texts, metadata, to path. After a kill, path is the old file or the
    complete new one. ValueError for a dtype that read_safetensors does not know."""
    header, at = {"__metadata__": dict(metadata)} if metadata else {}, 0
    # the widest dtype comes first, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name!r} has the dtype {tensor.dtype}, which {path} cannot hold")
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)

    def write(f):
        f.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            f.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    write_atomically(Path(path), write)


# ---------------------------------------------------------------------------------------------------- the hub

REPOSITORY = r"[\w.-]+/[\w.-]+"


def is_pretrained(name):
    """Whether this names weights in the hub's layout, in a folder or on the hub, and not a run. A name that
    looks like a repository, but lies beside runs or in runs/, is a run that is missing."""
    path = Path(name)
    if path.is_file() or (path / "best.pt").exists() or (path / "last.pt").exists():
        return False
    beside_runs = path.parent.name == "runs" or any(path.parent.glob("*/last.pt"))
    is_repository = re.fullmatch(REPOSITORY, path.as_posix())
    return (path / "config.json").exists() or bool(is_repository) and not beside_runs


def contents(folder):
    """The names of files in a folder, in a few words."""
    names = sorted(path.name for path in Path(folder).iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "nothing"


def cached_snapshot(name):
    """The folder of a repository in the user's Hugging Face cache: the revision that refs/main names. None if
    there is none."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    repository = Path(cache).expanduser() / f"models--{name.replace('/', '--')}"
    if not (repository / "refs" / "main").exists():
        return None
    return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()


def is_complete(folder):
    """Whether a folder holds a configuration, all weights and a tokenizer."""
    try:
        weights = weight_files(folder)
    except UserError:
        return False
    tokenizers = ["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"]
    has_tokenizer = any(all((folder / name).exists() for name in names) for names in tokenizers)
    return has_tokenizer and all(path.exists() for path in (folder / "config.json", *weights))


def repo_folder(name, read=None):
    """The local folder of a hub repository (of a folder, the folder itself). It is in data/hub if it was
    downloaded before. If it is complete in the user's Hugging Face cache, it is used there. Else data/hub
    gets the files of the cache, and the rest is downloaded: first the configuration, which read(folder) may
    refuse, then the weights and the tokenizer."""
    path, name = Path(name), Path(name).as_posix()
    if re.fullmatch(r"distilbert-[\w-]+", name) and not path.exists():
        name = f"distilbert/{name}"                             # the hub's first names had no owner
    is_repository = re.fullmatch(REPOSITORY, name) and ".." not in name
    if (path / "config.json").exists() or path.is_dir() and not is_repository:
        return path
    if not is_repository:
        raise UserError(f"{name} is neither a folder nor the name of a repository, as Qwen/Qwen2-0.5B is")
    folder, cached = data_dir() / "hub" / name, cached_snapshot(name)
    if (folder / ".complete").exists():                            # complete: no network is needed
        return folder
    if cached and is_complete(cached):
        return cached

    def fetch(*names):
        """The first of these files that the repository has; None if it has none."""
        for file in names:
            if cached and (cached / file).exists() and not (folder / file).exists():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(cached / file, folder / file)
            with suppress(NotFound):
                download(f"{HUB}/{name}/resolve/main/{file}", folder / file)
                return file
        return None
    try:
        if not fetch("config.json"):
            raise UserError(f"the hub has no config.json for {name}; is the name right?")
    except UserError as e:
        what = (f"the folder {name} holds no model that can be read here ({contents(path)})" if path.is_dir()
                else f"there is no run at {name}")
        raise UserError(f"{what}; and as a name on the hub: {e}") from e
    if read:
        read(folder)
    weights = fetch("model.safetensors", "model.safetensors.index.json",
                    "pytorch_model.bin", "pytorch_model.bin.index.json")
    if weights and weights.endswith(".index.json"):
        for file in weight_files(folder):
            fetch(file.name)
    if fetch("vocab.json", "vocab.txt") == "vocab.json":
        fetch("merges.txt")
    for file in OTHER_FILES:
        fetch(file)
    (folder / ".complete").touch()
    return folder


def weight_files(folder):
    """The files that hold the weights: safetensors, one file or shards, or else PyTorch's own format."""
    folder = Path(folder)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            return [folder / whole]
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
                raise UserError(f"{index} does not list the files of the weights; fetch it again")
            return [folder / name for name in names]
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):           # their index got lost
        return shards
    raise UserError(f"{folder} holds no weights: no model.safetensors and no pytorch_model.bin")


def read_weights(path):
    """{name: tensor} of one file of weights. UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            check(f.read(11) != b"version htt",
                  f"{path} is only git-lfs's pointer to a file. Run: git lfs pull")
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                                  # damaged in any of many ways
        what = "is missing" if not path.exists() else f"cannot be read ({type(e).__name__})"
        raise UserError(str(e) if f"{path} is" in str(e) else f"{path} {what}; fetch it again") from e


def load_hub_weights(model, folder, prefix, dtype, new=()):
    """Give a model on the meta device the weights of a hub folder, whose names have a prefix. Parameters that
    begin with one of `new` get BERT's initial values instead. UserError if the weights do not fit."""
    state = {}
    for path in weight_files(folder):
        tensors = read_weights(path)
        for name in list(tensors):
            tensor = tensors.pop(name)                          # one by one, so that two copies never exist
            ours = name.removeprefix(prefix)
            # old files hold constants, too
            if new and ours.startswith(new) or name.endswith(("rotary_emb.inv_freq", "position_ids")):
                continue
            if not tensor.is_floating_point():
                raise UserError(f"{path} has {name}, packed integers of a quantized model: take another one")
            state[ours] = tensor.to(dtype)
    if new:
        state |= {name: torch.randn(p.shape) * 0.02 * (p.dim() == 2)
                  for name, p in model.named_parameters() if name.startswith(new)}
    tied = getattr(model.config, "tied", False) and "embed_tokens.weight" in state
    if tied and not torch.equal(state.setdefault("lm_head.weight", state["embed_tokens.weight"]),
                                state["embed_tokens.weight"]):
        raise UserError(f"{folder}: config.json ties the head to the embedding, lm_head.weight differs")
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as e:
        reasons = " ".join(str(e).partition("\n")[2].split())
        raise UserError(f"the weights in {folder} are not those of its config.json: {reasons[:300]}") from e
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.requires_grad_(True).eval()


# ------------------------------------------------------------------------------------------------------ Qwen2

# option of a TransformerConfig -> its name in config.json
HUB_NAMES = {"vocab_size": "vocab_size", "block_size": "max_position_embeddings",
             "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "n_hidden": "intermediate_size",
             "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "tied": "tie_word_embeddings"}


def hub_name(name):
    """The name on the hub of a parameter of our Transformer."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def read_config(folder):
    """config.json of a Qwen2 or Qwen2.5 checkpoint -> TransformerConfig. UserError that names a setting that
    is not implemented here, because it would be wrong to ignore it."""
    c = {name: value for name, value in read_json(Path(folder) / "config.json").items() if value is not None}
    # transformers 5 writes rope_parameters, and 4 rope_scaling
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    sliding = c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ())
    head_dims = None, c.get("hidden_size", 0) // c.get("num_attention_heads", 1)
    for implemented, what in (
            ("quantization_config" not in c, "quantization_config: a quantized model"),
            (c.get("model_type") == "qwen2",
             f"model_type {c.get('model_type')!r} (language models are of 'qwen2')"),
            (c.get("hidden_act", "silu") == "silu", f"hidden_act {c.get('hidden_act')!r}"),
            (not sliding, "use_sliding_window"), (scaling == "default", f"rope scaling {scaling!r}"),
            (c.get("head_dim") in head_dims, f"head_dim {c.get('head_dim')}")):
        if not implemented:
            raise UserError(f"{folder}/config.json says {what}, which is not implemented here")
    c = {"num_key_value_heads": c.get("num_attention_heads"), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "tie_word_embeddings": False} | c | rope
    try:
        return TransformerConfig(**{ours: c[theirs] for ours, theirs in HUB_NAMES.items()})
    except KeyError as e:
        raise UserError(f"{folder}/config.json does not say {e}") from e


def load_weights(folder, dtype=None):
    """The model of a hub folder on the CPU, in eval mode. dtype None keeps that of the file."""
    with torch.device("meta"):
        model = Transformer(read_config(folder))            # takes no memory: the tensors of the file move in
    return load_hub_weights(model, folder, "model.", dtype)


def save_weights(model, folder):
    """Write config.json and model.safetensors, which transformers' AutoModelForCausalLM opens."""
    c, folder = model.config, Path(folder)
    tensors = {hub_name(name): p for name, p in model.state_dict().items()
               if not (c.tied and name == "lm_head.weight")}
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
              "use_sliding_window": False, "attention_dropout": 0.0, "torch_dtype": stored}
    config |= {theirs: getattr(c, ours) for ours, theirs in HUB_NAMES.items()}
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    save_json(folder / "config.json", config)


# Qwen2 cuts a text into these pieces before it merges any pair. A digit is always a piece of its own.
QWEN2_PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")         # the added tokens, if no file lists any
OTHER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
               "chat_template.jinja", "generation_config.json")
TOKENIZER_FILES = ("vocab.json", "merges.txt", *OTHER_FILES)


def byte_letters():
    """{letter: byte}: how vocab.json writes bytes. A printable character means its own byte, and the letters
    from U+0100 on mean the others (GPT-2's convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


class Qwen2Tokenizer:
    """Qwen2's byte-pair encoding through tiktoken, in Unicode's NFC form. files: {name: text} of the
    TOKENIZER_FILES of a hub folder; a checkpoint and an export keep them as they are. vocab_size: of the
    model, which may have ids without a token. UserError for a tokenizer of another kind."""
    kind = "qwen2"

    def __init__(self, files, vocab_size):
        import tiktoken
        self.files, self.vocab_size = files, vocab_size
        names = [name for name in TOKENIZER_FILES if name.endswith(".json")]
        parsed = {name: json.loads(files.get(name, "{}")) for name in names}
        whole, config = parsed["tokenizer.json"], parsed["tokenizer_config.json"]
        check_pipeline(whole, config)
        if whole:
            vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        else:
            vocab, lines = parsed["vocab.json"], files["merges.txt"].split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        self.added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
        for i, token in config.get("added_tokens_decoder", {}).items():
            self.added[token["content"]] = int(i)
        self.added |= parsed["added_tokens.json"]
        self.added = self.added or {text: len(vocab) + k for k, text in enumerate(ADDED)}
        letters, added = byte_letters(), self.added
        ranks = {bytes(letters[ch] for ch in token): i for token, i in vocab.items() if token not in added}
        made = [vocab[merge.replace(" ", "", 1)] for merge in merges]          # the id that each merge makes
        if any(a >= b for a, b in zip(made, made[1:])) or len(ranks) != 256 + len(made):
            raise UserError("its tokenizer is no byte-level BPE whose ids follow the order of its merges")
        self.encoding = tiktoken.Encoding("qwen2", pat_str=QWEN2_PIECES, mergeable_ranks=ranks,
                                          special_tokens=self.added)
        self.known = set(ranks.values()) | set(self.added.values())
        if max(self.known) >= vocab_size:
            raise UserError(f"a tokenizer has the id {max(self.known)}, but its model only those below "
                            f"{vocab_size}: they do not belong together")
        longest_first = sorted(self.added, key=len, reverse=True)
        self.split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.eos, self.begin = self.added[SEPARATOR], []        # its texts begin with no token
        generation = parsed["generation_config.json"]
        if generation.get("eos_token_id") is None:
            generation["eos_token_id"] = [self.eos]
            self.files = files | {"generation_config.json": json.dumps(generation)}
        stops = generation["eos_token_id"]
        self.stops = sorted({stops} if isinstance(stops, int) else set(stops))
        self.suppressed = [i for i in range(vocab_size) if i not in self.known]     # ids without a token
        self.chat_template = config.get("chat_template")
        if isinstance(self.chat_template, list):                # several, by name
            self.chat_template = {t["name"]: t["template"] for t in self.chat_template}.get("default")
        if "chat_template.jinja" in files:                      # transformers 5 writes this file
            self.chat_template = files["chat_template.jinja"]

    def encode(self, text):
        ids = []
        for piece in self.split.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            elif piece:
                ids.extend(self.encoding.encode_ordinary(unicodedata.normalize("NFC", piece)))
        return ids

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i in self.known], errors="replace")

    def state(self):
        return {"kind": "qwen2", "files": self.files, "vocab_size": self.vocab_size}


def check_pipeline(whole, config):
    """UserError if tokenizer.json (whole) or tokenizer_config.json (config) prepares a text in another way
    than Qwen2 does: it would be wrong to ignore that."""
    def steps(name, parts):
        step = whole.get(name) or {}
        steps = step[parts] if step.get("type") == "Sequence" else [step] if step else []
        return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]

    qwen2_split = [{"type": "Split", "pattern": {"Regex": QWEN2_PIECES}, "behavior": "Isolated",
                    "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    faults = []
    if whole and steps("normalizer", "normalizers") != [{"type": "NFC"}]:
        faults.append("a normalizer other than NFC")
    if whole and steps("pre_tokenizer", "pretokenizers") != qwen2_split:
        faults.append("another way to split words")
    for step in steps("post_processor", "processors"):
        if step["type"] != "ByteLevel" and step.get("special_tokens") != {}:
            faults.append("tokens that begin or end every text")
    if config.get("add_bos_token"):
        faults.append("a token that begins every text")
    if config.get("add_prefix_space"):
        faults.append("a space before every text")
    if whole.get("model", {}).get("ignore_merges"):
        faults.append("ignore_merges, which keeps known words whole")
    if faults:
        raise UserError(f"its tokenizer is not one of Qwen2's kind: it has {'; '.join(faults)}")


def read_tokenizer(folder, vocab_size):
    """The tokenizer of a hub folder: tokenizer.json, or vocab.json and merges.txt, with all added tokens that
    the files list. generation_config.json, or else config.json, says which tokens end a text."""
    folder = Path(folder)
    try:
        files = {name: (folder / name).read_bytes().decode("utf-8") for name in TOKENIZER_FILES
                 if (folder / name).exists()}
        if "tokenizer.json" not in files and "vocab.json" not in files:
            raise UserError(f"{folder} holds no tokenizer: no vocab.json with merges.txt, no tokenizer.json")
        if "vocab.json" in files and not files.keys() & {"merges.txt", "tokenizer.json"}:
            raise UserError(f"{folder}/merges.txt is not there; vocab.json is of no use without it")
        generation = json.loads(files.get("generation_config.json", "{}"))
        stops = read_json(folder / "config.json", {}).get("eos_token_id")
        if stops is not None and generation.get("eos_token_id") is None:
            files["generation_config.json"] = json.dumps(generation | {"eos_token_id": stops})
        if not files.keys() & {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}:
            first = len(json.loads(files["vocab.json"]))
            added = {str(first + k): {"content": text, "special": True} for k, text in enumerate(ADDED)}
            files["tokenizer_config.json"] = json.dumps({
                "tokenizer_class": "Qwen2Tokenizer", "eos_token": ADDED[0], "pad_token": ADDED[0],
                "unk_token": None, "bos_token": None, "added_tokens_decoder": added})
        return Qwen2Tokenizer(files, vocab_size)
    except UserError as e:
        raise UserError(f"{folder}: {e}" if str(folder) not in str(e) else str(e)) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the tokenizer in {folder} is not one of Qwen2's kind "
                        f"({type(e).__name__}: {e})") from e


def save_tokenizer(tokenizer, folder):
    """Write the tokenizer's files, and the settings of generation, as they were read."""
    for name, text in tokenizer.files.items():
        write_text(Path(folder) / name, text)


# The chat templates that are known here, as lists of their statements; SYSTEM is the model's system message.
# CHATML_SYSTEM is the template of Qwen2 and SmolLM2. Qwen2.5's has QWEN25 between its parts for tools.
TURN = r"'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
LAST = ["endfor", "if add_generation_prompt", r"'<|im_start|>assistant\n'", "endif"]
CHATML = ["for message in messages", TURN, *LAST]
CHATML_SYSTEM = ["for message in messages", "if loop.first and messages[0]['role'] != 'system'", "SYSTEM",
                 "endif", TURN, *LAST]
QWEN25 = ["else", "if messages[0]['role'] == 'system'",
          r"'<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n'", "else", "SYSTEM", "endif",
          "endif", "for message in messages",
          "if (message['role'] == 'user') or (message['role'] == 'system' and not loop.first) or "
          "(message['role'] == 'assistant' and not message['tool_calls'])", TURN]


def system_text(template):
    """The system message with which a chat template begins a conversation, None if it begins without one.
    UserError for a template that is not known here."""
    pattern, statements, system = r"(?s)\{[{%]-?\s*(.*?)\s*-?[}%]\}", [], None
    for text in re.findall(pattern, template):
        # templates differ in quotes, in how they write a new line, in white space and in message.role
        parts = re.split(r"('[^']*')", text.replace('"', "'"))
        for k, part in enumerate(parts):
            if part.startswith("'"):
                parts[k] = part.replace("\n", r"\n")
            else:
                parts[k] = re.sub(r"\bmessage\.(\w+)", r"message['\1']", re.sub(r"\s+", " ", part))
        text = "".join(parts)
        if match := re.fullmatch(r"'<\|im_start\|>system\\n([^']*)<\|im_end\|>\\n'", text):
            text, system = "SYSTEM", match[1].replace(r"\n", "\n")
        statements.append(text)
    starts = [k for k in range(len(statements)) if statements[k:k + len(QWEN25)] == QWEN25]
    is_qwen25 = statements[:1] == ["if tools"] and len(starts) == 1 and statements[-len(LAST):] == LAST
    if re.sub(pattern, "", template).strip() or not (is_qwen25 or statements in (CHATML, CHATML_SYSTEM)):
        raise UserError("--chat knows the chat templates of Qwen2, Qwen2.5 and SmolLM2, and this model has "
                        "another one. Without --chat, --prompt takes any text")
    return system


def load_model(name, device="cpu", dtype=None):
    """-> (model in eval mode, tokenizer) of a Qwen2 repository or folder. dtype None keeps that of the files.
    """
    folder = repo_folder(name, read_config)
    model = load_weights(folder, dtype).to(device)
    return model, read_tokenizer(folder, model.config.vocab_size)


def save_model(model, tokenizer, folder):
    """Write a folder in the hub's layout, which transformers opens."""
    save_tokenizer(tokenizer, folder)
    save_weights(model, folder)


# ----------------------------------------------------------------------------------- DistilBERT and WordPiece

IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
              (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


@lru_cache(None)
def clean_character(ch):
    """A character as BERT reads it: white space is a space, control and private characters are nothing, and a
    Chinese character is a word of its own."""
    if ch in "\t\n\r" or unicodedata.category(ch)[0] == "Z":
        return " "
    if ch in "\0\ufffd" or unicodedata.category(ch) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {ch} " if any(low <= ord(ch) <= high for low, high in IDEOGRAPHS) else ch


@lru_cache(None)
def spaced(ch):
    """A character with spaces around it if it is punctuation, or one of ASCII's symbols."""
    sign = ch.isascii() and ch.isprintable() and not ch.isalnum() and ch != " "
    return f" {ch} " if sign or unicodedata.category(ch)[0] == "P" else ch


def basic_words(text, lower=True):
    """The words and punctuation marks of a text, as BERT reads it. lower: without capitals and accents."""
    text = "".join(map(clean_character, text))
    if lower:                               # each character alone: str.lower treats a last sigma otherwise
        text = unicodedata.normalize("NFD", text)
        text = "".join(ch.lower() for ch in text if ch.isascii() or unicodedata.category(ch) != "Mn")
    return "".join(map(spaced, text)).split()


class WordPiece:
    """BERT's WordPiece tokenizer. vocab: the pieces in the order of their ids; [PAD] [UNK] [CLS] [SEP] must
    be among them."""

    def __init__(self, vocab, lower=True):
        self.vocab, self.lower = list(vocab), lower
        self.ids = {piece: i for i, piece in enumerate(self.vocab)}
        try:
            special = [self.ids[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
            self.pad, self.unk, self.cls, self.sep = special
        except KeyError as e:
            raise UserError(f"this is no WordPiece vocabulary: it has no {e}") from e

    @lru_cache(500_000)
    def pieces(self, word):
        """The ids of one word: the longest piece with which it begins, then the longest for the rest, ..."""
        ids, start = [], 0
        while start < len(word) <= 100:
            end = next((e for e in range(len(word), start, -1)
                        if ("##" if start else "") + word[start:e] in self.ids), None)
            if end is None:
                break
            ids.append(self.ids[("##" if start else "") + word[start:end]])
            start = end
        return ids if start == len(word) else [self.unk]

    def encode(self, text):
        return [i for word in basic_words(text, self.lower) for i in self.pieces(word)]

    def state(self):
        return {"kind": "wordpiece", "vocab": self.vocab, "lower": self.lower}


def read_wordpiece(folder):
    """The WordPiece tokenizer of a hub folder, whose words are in vocab.txt or, as transformers 5 writes
    them, in tokenizer.json. UserError for what is missing or not implemented."""
    whole, config = (read_json(folder / name, {}) for name in ("tokenizer.json", "tokenizer_config.json"))
    model, normalizer = whole.get("model") or {}, whole.get("normalizer") or {}
    if (folder / "vocab.txt").exists():
        vocab = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    elif model.get("type") == "WordPiece":
        vocab = [f"[unused{i}]" for i in range(1 + max(model["vocab"].values()))]     # ids may have gaps
        for piece, i in model["vocab"].items():
            vocab[i] = piece
    else:
        raise UserError(f"{folder}/vocab.txt is missing, and no tokenizer.json has its words; fetch it again")
    lower = config.get("do_lower_case", normalizer.get("lowercase", True))
    accents = config.get("strip_accents", normalizer.get("strip_accents"))
    chinese = config.get("tokenize_chinese_chars", normalizer.get("handle_chinese_chars", True))
    if accents not in (None, lower) or not chinese:
        raise UserError(f"{folder}: strip_accents other than do_lower_case, and tokenize_chinese_chars "
                        "false, are not implemented")
    return WordPiece(vocab, lower)


def build_wordpiece(texts, size=8000):
    """A vocabulary for these texts: their characters, alone and inside a word; then whole words, the most
    frequent first; and in the last eighth the most frequent endings of the other words."""
    counts = Counter(word for text in texts for word in basic_words(text))
    letters = Counter()
    for word, n in counts.items():
        letters.update(dict.fromkeys(word, n))
    letters = [ch for ch, _ in letters.most_common(size // 16)]
    vocab = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters,
                           *("##" + ch for ch in letters)])
    by_count = [word for word, n in sorted(counts.items(), key=lambda wn: (-wn[1], wn[0])) if n > 1]
    for word in by_count:
        if len(vocab) >= size * 7 // 8:
            break
        vocab[word] = None
    endings = Counter()
    for word in by_count:
        if word not in vocab:
            for k in range(2, min(6, len(word))):
                endings["##" + word[-k:]] += counts[word]
    return WordPiece([*vocab, *(e for e, _ in endings.most_common(max(0, size - len(vocab))))])


def positive_label(config, folder):
    """The index, 0 or 1, of the label that id2label in the config of a classifier calls positive."""
    labels = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    if len(labels) != 2:
        raise UserError(f"{folder} is a classifier with {len(labels)} labels; a scorer has two")
    positive = [int(i) for i, label in labels.items() if str(label).lower().startswith("pos")]
    if len(positive) != 1:
        raise UserError(f"{folder}: which of the labels {', '.join(map(str, labels.values()))} is the "
                        "positive one? Call it POSITIVE in id2label of config.json")
    return positive[0]


HEADS = ("pre_classifier", "classifier", "vocab_")          # the heads of an encoder in the hub's files


def scorer_config(folder, new_head=False):
    """config.json of a DistilBERT -> ScorerConfig. UserError for another model, or without two labels."""
    c = read_json(Path(folder) / "config.json")
    known = c.get("model_type") == "distilbert" and c.get("activation", "gelu") == "gelu"
    if not known or c.get("sinusoidal_pos_embds"):
        raise UserError(f"{folder}/config.json describes a {c.get('model_type')} model that is not "
                        "implemented; a scorer is a DistilBERT with GELU and learned positions, as "
                        "lvwerra/distilbert-imdb")
    try:
        return ScorerConfig(c["vocab_size"], c["dim"], c["hidden_dim"], c["n_layers"], c["n_heads"],
                            c.get("max_position_embeddings", 512), c.get("dropout", 0.1),
                            1 if new_head else positive_label(c, folder))
    except KeyError as e:
        raise UserError(f"{folder}/config.json does not say {e}") from e


def load_scorer(name, device="cpu", dtype=torch.float32, new_head=False):
    """-> Scorer in eval mode: a DistilBERT with two labels from a folder in the hub's layout (--train-reward
    writes one) or from a repository. new_head: take any DistilBERT, and give it a head with initial weights.
    """
    if not is_pretrained(name) and not str(name).startswith("distilbert-"):
        raise UserError(f"there is no scorer at {name}. "
                        f"Train one first: python ppo.py --train-reward --data reviews --run {quoted(name)}")
    folder = repo_folder(name, lambda folder: scorer_config(folder, new_head))
    config, tokenizer = scorer_config(folder, new_head), read_wordpiece(folder)
    if len(tokenizer.vocab) > config.vocab_size:
        raise UserError(f"the vocabulary of {folder} and its model do not belong together: more pieces than "
                        "embeddings")
    with torch.device("meta"):
        scorer = Scorer(config, tokenizer)
    scorer = load_hub_weights(scorer, folder, "distilbert.", dtype, HEADS if new_head else ())
    return scorer.to(device).requires_grad_(new_head)


def save_scorer(scorer, folder):
    """Write a folder in the hub's layout, which transformers opens."""
    c, folder = scorer.config, Path(folder)
    config = {"architectures": ["DistilBertForSequenceClassification"], "model_type": "distilbert",
              "activation": "gelu", "sinusoidal_pos_embds": False, "attention_dropout": c.dropout,
              "seq_classif_dropout": c.dropout, "pad_token_id": scorer.tokenizer.pad,
              "id2label": {str(i): "POSITIVE" if i == c.positive else "NEGATIVE" for i in (0, 1)},
              "label2id": {"POSITIVE": c.positive, "NEGATIVE": 1 - c.positive}} | asdict(c)
    config.pop("positive")
    lower = scorer.tokenizer.lower
    save_json(folder / "config.json", config)
    save_json(folder / "tokenizer_config.json",
              {"tokenizer_class": "BertTokenizer", "do_lower_case": lower, "strip_accents": lower})
    write_text(folder / "vocab.txt", "\n".join(scorer.tokenizer.vocab) + "\n")
    tensors = {(name if "classifier" in name else f"distilbert.{name}"): p
               for name, p in scorer.state_dict().items()}
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
