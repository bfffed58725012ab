"""Pretrained weights: the safetensors format by hand, and Qwen2's checkpoints in our own Transformer.

The safetensors format (github.com/huggingface/safetensors): 8 bytes, little-endian: the length n of the header; n bytes
of JSON,

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"any": "text"}}

then the tensors' bytes, row-major and little-endian; offsets are counted from the end of the header. Nothing in such a
file can be executed. What a reader must check before it believes a header: that the length fits the file, no name
occurs twice, each tensor's bytes are as many as its shape and dtype say, and all together fill the rest of the file
without gap or overlap. A flipped bit inside the numbers cannot be seen: the format has no checksum.

Qwen2 (Yang et al. 2024) is the decoder of transformer.py under other names (layer i):

    model.embed_tokens.weight                              embed.weight
    model.layers.i.input_layernorm.weight                  blocks.i.input_norm.weight
    model.layers.i.self_attn.{q,k,v}_proj.{weight,bias}    blocks.i.attention.{q,k,v}_proj.{weight,bias}
    model.layers.i.self_attn.o_proj.weight                 blocks.i.attention.o_proj.weight
    model.layers.i.post_attention_layernorm.weight         blocks.i.post_norm.weight
    model.layers.i.mlp.{gate,up,down}_proj.weight          blocks.i.mlp.{gate,up,down}_proj.weight
    model.norm.weight                                      norm.weight
    lm_head.weight (missing where the head is tied)        head.weight

    model = load_weights("path/of/Qwen2-0.5B")             # a folder with config.json and the weights
"""
import json
import math
import mmap
import os
import re
from pathlib import Path

import torch

from data import NotFound, Qwen2Tokenizer, UserError, data_dir, download, write_atomically
from transformer import Transformer, TransformerConfig

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


def read_safetensors(path, copy=False):
    """{name: tensor} of a safetensors file; ValueError that names the file and the fault. The tensors are views of the
    mapped file: their bytes are read when they are first used. Writing to a tensor does not change the file. copy: each in
    memory of its own, which begins where fast arithmetic wants it to; of the file no more than one tensor stays in memory."""
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
            if copy:
                tensors[name] = tensors[name].clone()
                if hasattr(mmap, "MADV_DONTNEED"):                          # not on Windows
                    page = begin // mmap.PAGESIZE * mmap.PAGESIZE
                    mapped.madvise(mmap.MADV_DONTNEED, page, end - page)
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


# --------------------------------------------------------------------------------------------------------------- Qwen2

HUB_NAMES = (("model.embed_tokens.", "embed."), ("model.layers.", "blocks."), (".input_layernorm.", ".input_norm."),
             (".self_attn.", ".attention."), (".post_attention_layernorm.", ".post_norm."), ("model.norm.", "norm."),
             ("lm_head.", "head."))


def our_name(name):
    """A parameter's name on the hub -> its name here; None for RoPE's frequencies, which old files keep."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    for theirs, ours in HUB_NAMES:
        name = name.replace(theirs, ours)
    return name


def hub_name(name):
    """A parameter's name here -> its name on the hub."""
    for theirs, ours in HUB_NAMES:
        if ours.startswith("."):
            name = name.replace(ours, theirs)
        elif name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return name


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there; a folder of weights needs it") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it and fetch it again") from e


def read_config(folder):
    """config.json of a Qwen2 or Qwen2.5 checkpoint -> TransformerConfig. UserError, by name, for what is not implemented here:
    it would be wrong to ignore it."""
    c = read_json(Path(folder) / "config.json")

    def refuse(what):
        raise UserError(f"{folder}/config.json says {what}, which is not implemented here")
    if c.get("model_type") != "qwen2":
        refuse(f"model_type {c.get('model_type')!r} (known: 'qwen2')")
    if c.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {c['hidden_act']!r}")
    if c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ()):
        refuse("use_sliding_window")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}          # transformers 5 writes the one, 4 the other
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse(f"rope scaling {kind!r}")
    try:
        config = TransformerConfig(
            vocab_size=c["vocab_size"], block_size=c["max_position_embeddings"], n_layer=c["num_hidden_layers"],
            n_head=c["num_attention_heads"], n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            n_embd=c["hidden_size"], n_hidden=c["intermediate_size"], norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
            tied=bool(c.get("tie_word_embeddings", False)))
    except KeyError as e:
        raise UserError(f"{folder}/config.json does not say {e}") from e
    if c.get("head_dim") not in (None, config.n_embd // config.n_head):
        refuse(f"head_dim {c['head_dim']}")
    return config


def weight_files(folder):
    """The files that hold a checkpoint's weights: safetensors, whole or in shards, or else PyTorch's own format."""
    folder = Path(folder)
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = whole + ".index.json"
        if (folder / index).exists():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
                raise UserError(f"{folder / index} does not list the files of the weights; fetch it again")
            return [folder / name for name in names]
        if (folder / whole).exists():
            return [folder / whole]
    raise UserError(f"{folder} holds no weights: no model.safetensors and no pytorch_model.bin")


def read_parameters(model, folder, our_name, device="cpu", dtype=None):
    """{our name: tensor} of a hub folder's weights; dtype None keeps that of the file. our_name: the hub's name of a tensor ->
    the name it has in model (which may be on the meta device), or None for one that is to be passed over. UserError for a
    tensor that the model does not have, or has in another shape."""
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    state = {}
    for path in weight_files(folder):
        try:
            tensors = read_safetensors(path, copy=True) if path.suffix == ".safetensors" else \
                torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as e:
            raise UserError(f"{path} is missing; fetch it again") from e
        except Exception as e:                                              # damaged in any of many ways
            reason = str(e) if path.name in str(e) else f"{path} cannot be read ({type(e).__name__}); fetch it again"
            raise UserError(reason) from e
        for name in list(tensors):
            tensor = tensors.pop(name)                                      # converted one by one: never two whole copies
            if (ours := our_name(name)) is None:
                continue
            if ours not in wanted or ours in state:
                what = "is there twice" if ours in state else "is no parameter of this model"
                raise UserError(f"{path} has {name}, which {what}")
            if tensor.shape != wanted[ours]:
                raise UserError(f"{path} has {name} in the shape {list(tensor.shape)}; by its config.json it should be "
                                f"{list(wanted[ours])}")
            state[ours] = tensor.to(device=device, dtype=dtype)
    return state


def load_weights(folder, device="cpu", dtype=None):
    """The model of a hub folder, in eval mode; dtype None keeps that of the file. UserError unless the file has exactly the
    parameters of its config.json, each in its shape."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)                                         # no memory yet: the file's tensors move in
    state = read_parameters(model, folder, our_name, device, dtype)
    if config.tied and "embed.weight" in state:
        state.setdefault("head.weight", state["embed.weight"])
    if missing := [hub_name(name) for name in model.state_dict() if name not in state]:
        raise UserError(f"{folder} lacks {len(missing)} parameters: {', '.join(missing[:3])}")
    if config.tied and not torch.equal(state["head.weight"], state["embed.weight"]):
        raise UserError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight is another matrix")
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.requires_grad_(True).eval()


def save_weights(model, folder, dtype=None):
    """Write config.json and model.safetensors as transformers' AutoModelForCausalLM opens them."""
    c, folder = model.config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hub_name(name): p.detach().to(dtype or p.dtype) for name, p in model.state_dict().items()
               if not (c.tied and name == "head.weight")}
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": c.vocab_size, "hidden_size": c.n_embd,
              "intermediate_size": c.n_hidden, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
              "num_key_value_heads": c.n_kv_head, "hidden_act": "silu", "max_position_embeddings": c.block_size,
              "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tied,
              "use_sliding_window": False, "attention_dropout": 0.0, "torch_dtype": stored}
    write_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_atomically(folder / "config.json", lambda f: f.write((json.dumps(config, indent=2) + "\n").encode()))


ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")                     # where the files do not list any


def read_tokenizer(folder, vocab_size):
    """The tokenizer of a hub folder: vocab.json and merges.txt, or tokenizer.json; all added tokens that its files list; the
    tokens that end a text, by generation_config.json or config.json."""
    folder = Path(folder)

    def optional(file):
        return read_json(folder / file) if (folder / file).exists() else {}
    whole = optional("tokenizer.json")
    try:
        if (folder / "vocab.json").exists():
            if not (folder / "merges.txt").exists():
                raise UserError(f"{folder / 'merges.txt'} is not there; vocab.json is of no use without it")
            vocab = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        elif whole:
            vocab = whole["model"]["vocab"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
        else:
            raise UserError(f"{folder} holds no tokenizer: no vocab.json with merges.txt and no tokenizer.json")
        added = {token["content"]: token["id"] for token in whole.get("added_tokens", ())}
        listed = optional("tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {token["content"]: int(i) for i, token in listed.items()} | optional("added_tokens.json")
        added = added or {text: len(vocab) + k for k, text in enumerate(ADDED)}
        stops = (optional("generation_config.json") or optional("config.json")).get("eos_token_id")
        stops = [stops] if isinstance(stops, int) else stops
        return Qwen2Tokenizer(vocab, merges, added, vocab_size, stops)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the tokenizer in {folder} is not one of Qwen2's kind ({type(e).__name__}: {e})") from e


def save_tokenizer(tokenizer, folder):
    """Write vocab.json, merges.txt and tokenizer_config.json as transformers' AutoTokenizer opens them, and the end tokens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": ADDED[0], "pad_token": ADDED[0],
              "unk_token": None, "bos_token": None,
              "added_tokens_decoder": {str(i): {"content": text} | plain for text, i in tokenizer.added.items()}}
    for name, text in (("vocab.json", json.dumps(tokenizer.vocab, ensure_ascii=False)),
                       ("merges.txt", "\n".join(tokenizer.merges) + "\n"),
                       ("tokenizer_config.json", json.dumps(config, indent=2)),
                       ("generation_config.json", json.dumps({"eos_token_id": tokenizer.stops}))):
        write_atomically(folder / name, lambda f: f.write(text.encode()))


# ------------------------------------------------------------------------------------------------------------- the hub

REPOSITORY = r"[\w.-]+/[\w.-]+"


def is_pretrained(name):
    """Whether this names weights in the hub's layout, in a folder or on the hub, and not a run. What has the form of a
    repository's name but lies in a folder that exists, or in runs/, is a run that is missing."""
    path = Path(name)
    if path.is_dir():
        return (path / "config.json").exists() and not any((path / run).exists() for run in ("best.pt", "last.pt"))
    return bool(re.fullmatch(REPOSITORY, str(name))) and not path.parent.is_dir() and path.parent.name != "runs"


def repo_folder(name):
    """The local folder of a hub repository (or of a folder, itself). What is missing is downloaded: the configuration, the
    weights and the tokenizer, nothing else. $HF_ENDPOINT is another hub, $HF_TOKEN a key for what is not public."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(REPOSITORY, str(name)) or ".." in str(name):
        raise UserError(f"{name} is neither a folder nor the name of a repository, as Qwen/Qwen2-0.5B is")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    folder = data_dir() / "hub" / name
    if (folder / ".complete").exists():                                     # everything is there: no network is needed
        return folder
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else None

    def fetch(*names):
        """The first of these files that there is; None if there is none."""
        for file in names:
            try:
                if not (folder / file).exists():
                    download(f"{endpoint.rstrip('/')}/{name}/resolve/main/{file}", folder / file, headers=headers)
                return file
            except NotFound:
                continue
        return None
    if not fetch("config.json"):
        raise UserError(f"{endpoint} has no config.json for {name}; is the name right?")
    weights = fetch("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if weights and weights.endswith(".index.json"):
        for path in weight_files(folder):
            fetch(path.name)
    if fetch("vocab.json", "vocab.txt") == "vocab.json":
        fetch("merges.txt")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        fetch(file)
    (folder / ".complete").touch()
    return folder


def load_model(name, device="cpu", dtype=None):
    """A Qwen2 repository or folder -> (model in eval mode, tokenizer). dtype None keeps that of the files."""
    folder = repo_folder(name)
    model = load_weights(folder, device, dtype)
    return model, read_tokenizer(folder, model.config.vocab_size)


def save_model(model, tokenizer, folder, dtype=None):
    """Write a folder in the hub's layout, which transformers opens as it is."""
    save_tokenizer(tokenizer, folder)
    save_weights(model, folder, dtype)
