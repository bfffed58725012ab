"""Speed of the hand-written pieces beside the library's, as ratios: both sides do the same work in the same process, in
turn, and the medians of many rounds are compared. Above 1: ours is faster.

    python tests/bench.py               # everything here, as a table in markdown: assets/results.md has it as it is printed
    python tests/bench.py quick         # two minutes: one layer of each kind, a step of each model
    python tests/bench.py layers        # (a) one RNN or LSTM layer, forward and backward
    python tests/bench.py step          # (b) a training step of a 2x200 Penn Treebank model, V = 10,000
    python tests/bench.py transformer   # (c) a training step of the Transformer beside a GPT as nanoGPT's users have it, three sizes
    python tests/bench.py compiled      #     the same, both sides with torch.compile
    python tests/bench.py qwen          # (d) Qwen2-0.5B's shape with random weights: generation, loading (3 GB of memory)
    python tests/bench.py finetune      # (e) the same shape: a training step on 512 tokens (18 GB)
    python tests/bench.py ppo           # (f) an iteration of PPO: 64 responses of 24 tokens, scoring, 4 epochs
    python tests/bench.py memory        # no timing: what finetune.py needs per card for Qwen2's sizes, by arithmetic
"""
import argparse
import copy
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import finetune
import ppo
import qwen_load
import sample
import train
from lstm import LSTM, LSTMConfig, LSTMLM
from rnn import RNN, RNNConfig, RNNLM
from fast.layer import speed_up
from fast.products import keep_memory
from transformer import Transformer, TransformerConfig

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


SECONDS = [6.0]                                                 # of a comparison
NOTES = []                                                      # what is printed behind the table


def compare(ours, theirs, seconds=None):
    """Median milliseconds of two functions called in turn for about `seconds` (at least 7 rounds)."""
    for _ in range(2):
        ours(), theirs()
    times, started = ([], []), time.perf_counter()
    while len(times[0]) < 7 or time.perf_counter() - started < (seconds or SECONDS[0]):
        for f, into in zip((ours, theirs), times):
            t = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            into.append(1e3 * (time.perf_counter() - t))
    return [statistics.median(t) for t in times]


def table_row(name, ours_dtype, theirs_dtype, a, b):
    dtypes = ours_dtype if ours_dtype == theirs_dtype else f"{ours_dtype}, library {theirs_dtype}"
    print(f"| {name} | {dtypes} | {a:.2f} | {b:.2f} | {b / a:.2f} |", flush=True)


def row(name, ours_dtype, theirs_dtype, ours, theirs):
    table_row(name, ours_dtype, theirs_dtype, *compare(ours, theirs))


SHAPES = (20, 35, 200), (20, 35, 650), (32, 64, 512), (64, 70, 256)         # B, T, H


def layers(device, shapes=SHAPES):
    for ours_type, library_type in ((RNN, nn.RNN), (LSTM, nn.LSTM)):
        for B, T, H in shapes:
            for name, dtype in DTYPES.items():
                layer = ours_type(H, H).to(device, dtype)
                library = library_type(H, H, batch_first=True).to(device, dtype)
                x = torch.randn(B, T, H, device=device, dtype=dtype, requires_grad=True)
                grad = torch.randn(B, T, H, device=device, dtype=dtype)
                row(f"{ours_type.__name__} layer B={B} T={T} H={H}", name, name,
                    lambda: layer(x)[0].backward(grad), lambda: library(x)[0].backward(grad))


class LibraryLM(nn.Module):
    """The model that a user of the library would write."""

    def __init__(self, library_type, vocab_size, width, n_layer):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.body = library_type(width, width, n_layer, batch_first=True)

    def forward(self, tokens, state):
        out, state = self.body(self.embed(tokens), state)
        return self.head(out), state


class GPTBlock(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head, self.norm_1, self.norm_2 = n_head, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """GPT-2 as its users train it from scratch with torch's own pieces (nanoGPT's model is this one): LayerNorm, learned positions,
    q, k and v in one product, GELU, torch's fused attention, tied head. No dropout."""

    def __init__(self, c):
        super().__init__()
        self.embed, self.position = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.blocks, self.norm = nn.Sequential(*(GPTBlock(c.n_embd, c.n_head) for _ in range(c.n_layer))), nn.LayerNorm(c.n_embd)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, tokens, state):
        x = self.embed(tokens) + self.position.weight[:tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight), None


def step_function(model, batch_size, block_size, vocab_size, dtype, device, ours, fused, compiled=False):
    """A whole training step: forward, loss, backward, clipping, optimizer; the recurrent state carried. fused: the
    library's side takes AdamW's fused form too, as ours does, so that "same dtype" compares the models alone."""
    model.to(device).train()
    if ours and not compiled:
        speed_up(model)
    if compiled:
        train.compile_layers(model) if ours else model.compile()
    tokens = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
    x, y = tokens[:, :-1], tokens[:, 1:]
    optimizer = train.configure_optimizer(model, 1e-3, 0.01) if ours else torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    clip = train.clip_grad_norm if ours else torch.nn.utils.clip_grad_norm_
    state = None

    def step():
        nonlocal state
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            if ours:
                loss, state = model(x, state, targets=y)
            else:
                logits, state = model(x, state)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        state = train.map_state(torch.Tensor.detach, state)
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def step_rows(name, make_ours, make_theirs, batch_size, block_size, vocab_size, device):
    default = "bf16" if sample.pick_dtype("auto", device) == torch.bfloat16 else "float32"
    pairs = [(n, n, "same dtype", True) for n in DTYPES] + [(default, "float32", "defaults", None)]
    for ours, theirs, label, fused in pairs:
        row(f"{name}, {label}", ours, theirs,
            step_function(make_ours(), batch_size, block_size, vocab_size, DTYPES[ours], device, True, fused),
            step_function(make_theirs(), batch_size, block_size, vocab_size, DTYPES[theirs], device, False, fused))


def step(device):
    for name, ours, config, theirs in (("RNN", RNNLM, RNNConfig, nn.RNN), ("LSTM", LSTMLM, LSTMConfig, nn.LSTM)):
        step_rows(f"{name} 2x200 step", lambda: ours(config(10_000, 200, 200, 2, tied=False)),
                  lambda: LibraryLM(theirs, 10_000, 200, 2), 20, 35, 10_000, device)


SIZES = (12, 64, 4, 4, 128, 65), (16, 128, 4, 4, 256, 10_000), (32, 256, 6, 6, 384, 65)        # B, T, layers, heads, width, V


def transformer(device, compiled=False, sizes=SIZES):
    """Beside a GPT of as many parameters (a SwiGLU of 8/3 of the width has those of an MLP of 4), in the optimizer that it would take
    here: AdamW's fused form on a GPU alone. They share the process, so glibc keeps memory for both, as train.py has it."""
    keep_memory()
    for B, T, n_layer, n_head, width, V in sizes:
        c = TransformerConfig(V, T, n_layer, n_head, n_head, width, 8 * round(width / 3))
        for name, dtype in DTYPES.items():
            models = Transformer(c), GPT(c)
            millions = " and ".join(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" for model in models)
            ours, theirs = (step_function(model, B, T, V, dtype, device, model is models[0], device.type == "cuda", compiled) for model in models)
            row(f"Transformer {n_layer}x{width}, {B}x{T} tokens, {millions} million", name, name, ours, theirs)


def compiled(device):
    transformer(device, compiled=True)


def quick(device):
    SECONDS[0] = 3.0
    layers(device, SHAPES[:1])
    step(device)
    transformer(device, sizes=SIZES[:1])


QWEN2 = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
             num_key_value_heads=2, max_position_embeddings=131072, rope_theta=1e6, tie_word_embeddings=True)

def peak_memory():
    """Bytes that this process has held at its fullest. (Of a child process, getrusage would say the parent's.)"""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def in_own_process(function, *args):
    """What function(*args) of this file returns, run in a process of its own."""
    code = f"import bench; print(*bench.{function.__name__}(*{args!r}))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return [float(v) for v in out.stdout.split()]


def loading(side, folder, dtype):
    """Peak memory over the weights' bytes, after loading and after the first token."""
    from transformers import AutoModelForCausalLM
    before = peak_memory()
    load = qwen_load.load_weights if side == "ours" else AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype))
    loaded = peak_memory()
    with torch.no_grad():                                       # what is only mapped so far is read now
        model(torch.zeros(1, 1, dtype=torch.long))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (loaded - before) / weights, (peak_memory() - before) / weights


def bandwidth(n_bytes):
    """Bytes a second at which the fastest of torch's matrix-vector products reads a bf16 matrix of so many bytes."""
    matrix, x = torch.randn(n_bytes // 2 // 896, 896).bfloat16(), torch.randn(896).bfloat16()
    return max(1e3 * n_bytes / t for t in compare(lambda: torch.mv(matrix, x), lambda: F.linear(x, matrix)))


@torch.no_grad()
def qwen(device):
    import transformers
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2)).to(device, torch.bfloat16).eval()
        theirs.save_pretrained(folder)
        ours = qwen_load.load_weights(folder).to(device)
        speed_up(ours)
        n_bytes = sum(p.numel() * p.element_size() for p in ours.parameters())

        def generators(n_rows, n_prompt, n_new):
            prompts = torch.randint(QWEN2["vocab_size"], (n_rows, n_prompt), device=device)
            rows, mask = prompts.tolist(), torch.ones_like(prompts)
            return (lambda: sample.generate(ours, rows, n_new, temperature=0),
                    lambda: theirs.generate(prompts, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0))
        for n_rows in (1, 8):
            once, more = compare(*generators(n_rows, 16, 1)), compare(*generators(n_rows, 16, 33), seconds=30)
            a, b = [(many - one) / 32 for one, many in zip(once, more)]
            table_row(f"Qwen2-0.5B, {n_rows} rows, a token", "bf16", "bf16", a, b)
            if n_rows == 1 and device.type == "cpu":
                limit = 1e3 * n_bytes / bandwidth(n_bytes)
                NOTES.append(f"Reading Qwen2-0.5B's {n_bytes / 1e6:.0f} MB by matrix-vector products takes {limit:.2f} ms: {limit / a:.0%} of "
                             "that speed for a token.")
        row("Qwen2-0.5B, a prompt of 512", "bf16", "bf16", *generators(1, 512, 1))
        for name in ("bfloat16", "float32"):
            (a, a_used), (b, b_used) = (in_own_process(loading, side, folder, name) for side in ("ours", "theirs"))
            NOTES.append(f"Qwen2-0.5B as {name}: peak memory over the weights, loaded {a:.2f} (library {b:.2f}), after a token {a_used:.2f} "
                         f"(library {b_used:.2f}).")


def tuning_step(side, folder, option, tokens=512):
    """A function that makes one training step on a window of tokens, products in bf16, weights in float32. option: ours with
    checkpointing, the library's with AdamW(fused=True)."""
    ids = torch.randint(QWEN2["vocab_size"], (10 * tokens,)).numpy()
    if side == "ours":
        model = qwen_load.load_weights(folder, dtype=torch.float32).train()
        speed_up(model)
        model.checkpointing = option
        optimizer, batches = train.configure_optimizer(model, 1e-5, 0.01), data.WindowBatches(ids, 1, tokens, 0)

        def our_step():
            """finetune.py's step."""
            x, y = batches.batch(0)
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = model(x, targets=y)
            loss.backward()
            train.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()
        return our_step
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=option or None)
    batch = torch.from_numpy(ids[:tokens + 1])[None]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def tuning_memory(side, folder, option):
    step = tuning_step(side, folder, option)
    for _ in range(3):
        step()
    return [peak_memory()]


def finetuning(device):
    import transformers
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2)).to(torch.bfloat16).save_pretrained(folder)
        peaks = {(side, option): in_own_process(tuning_memory, side, folder, option)[0] for side in ("ours", "theirs") for option in (False, True)}
        for mine, name in ((False, "ours"), (True, "ours --checkpointing")):
            for fused, library in ((False, "AdamW"), (True, "AdamW(fused=True)")):
                ours, theirs = tuning_step("ours", folder, mine), tuning_step("theirs", folder, fused)
                a, b = compare(ours, theirs, seconds=40)
                del ours, theirs                                # together they fill 17 GB
                a_peak, b_peak = peaks["ours", mine], peaks["theirs", fused]
                table_row(f"Qwen2-0.5B, a step on 512 tokens: {name}, {library}; peak {a_peak / 1e9:.2f} GB, {b_peak / 1e9:.2f} GB", "bf16", "bf16", a, b)


def memory_needed(model, config, world):
    """Bytes in one process: what a parameter takes (finetune.py's head), what the backward pass reads of a batch, and logits."""
    c, n = model.config, sum(p.numel() for p in model.parameters())
    fixed = (18 + 4 * (world > 1)) * n
    if config.shard:                # gathered at a time: embedding, head, two layers, and their gradients
        layers = sum(p.numel() for p in model.layers.parameters())
        fixed = 16 * n / world + 8 * (n - layers + 2 * layers / c.n_layer)
    layer, tokens = 2 * (14 * c.n_embd + 5 * c.n_hidden), config.batch_size * config.block_size // world
    kept = 2 * c.n_layer * c.n_embd + layer if config.checkpointing else c.n_layer * layer
    return fixed + tokens * kept + 2 * min(tokens, 512) * c.vocab_size


def memory(device):
    """GB per card by memory_needed: bf16 products, 8 windows of 256 tokens on every card."""
    sizes = {"0.5B": {}, "1.5B": dict(n_embd=1536, n_hidden=8960, n_layer=28, n_head=12),
             "7B": dict(vocab_size=152064, n_embd=3584, n_hidden=18944, n_layer=28, n_head=28, n_kv_head=4, tied=False)}
    base = dict(vocab_size=151936, n_embd=896, n_hidden=4864, n_layer=24, n_head=14, n_kv_head=2, block_size=256)
    print("| Qwen2 | options | 1 card | 2 cards | 4 | 8 |\n|---|---|---|---|---|---|")
    for name, changes in sizes.items():
        with torch.device("meta"):
            model = Transformer(TransformerConfig(**base | changes))
        for options in ([], ["--checkpointing"], ["--shard"], ["--shard", "--checkpointing"]):
            cells = []
            for world in (1, 2, 4, 8):
                args = finetune.Config(batch_size=8 * world, block_size=256, checkpointing="--checkpointing" in options,
                                       shard="--shard" in options)
                cells.append("–" if args.shard and world == 1 else f"{memory_needed(model, args, world) / 1e9:.0f}")
            n = sum(p.numel() for p in model.parameters())
            print(f"| {name}, {n / 1e9:.2f} billion | {' '.join(options)} | {' | '.join(cells)} |")


class OurPPO:
    """One iteration of ppo.py's loop."""

    def __init__(self, task, policy, prompts, dtype):
        self.task, self.policy, self.prompts = task, policy, prompts
        self.value_head = nn.Linear(policy.lm_head.in_features, 1)
        self.sampler = copy.deepcopy(policy).to(dtype) if dtype == torch.bfloat16 else policy
        self.optimizer = torch.optim.Adam([*policy.parameters(), *self.value_head.parameters()], task.config.lr, eps=1e-5, fused=True)

    def step(self):
        task, config, clock = self.task, self.task.config, [time.perf_counter()]
        if self.sampler is not self.policy:
            self.sampler.load_state_dict(self.policy.state_dict())
        r = ppo.rollout(task, self.sampler, self.prompts)
        clock.append(time.perf_counter())
        scores, _ = ppo.score_responses(task, r)
        clock.append(time.perf_counter())
        old = ppo.evaluate_actions(task, self.policy, r, self.value_head)
        rewards = -config.kl_coef * (old["log_prob"] - old["ref_log_prob"])
        last = (r.mask * torch.arange(1, r.mask.shape[1] + 1)).argmax(1)
        rewards[torch.arange(len(last)), last] += scores
        advantages, returns = ppo.gae(rewards, old["value"], r.mask, config.gamma, config.gae_lambda)
        old |= {"advantages": ppo.whiten(advantages, r.mask), "returns": returns}
        ppo.update_policy(task, self.policy, self.value_head, self.optimizer, r, old)
        clock.append(time.perf_counter())
        self.seconds = {name: b - a for name, a, b in zip(("rollout", "scoring", "the rest"), clock, clock[1:])}


class LibraryPPO:
    """One iteration of PPO as a user of transformers would write it: `generate`, its DistilBERT, and ppo.py's update on the logits
    that its models return. The estimators, the optimizer and the number of updates are those of ppo.py."""

    def __init__(self, policy, reference, scorer, tokenizer, wordpiece, prompts, args, dtype):
        self.policy, self.reference, self.scorer, self.tokenizer, self.wordpiece = policy, reference, scorer, tokenizer, wordpiece
        self.prompts, self.args, self.dtype = prompts, args, dtype
        self.value_head = nn.Linear(policy.config.hidden_size, 1)
        self.parameters = [*policy.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, args.lr, eps=1e-5, fused=True)

    def logits(self, model, tokens, mask, positions):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
        n = self.args.response_tokens
        return out.logits[:, -n - 1:-1].float(), out.hidden_states[-1][:, -n - 1:-1].float()

    def step(self):
        args, pad = self.args, 0
        longest = max(map(len, self.prompts))
        prompts = torch.tensor([[pad] * (longest - len(p)) + p for p in self.prompts])              # padded on the left
        mask = (torch.arange(longest) >= torch.tensor([[longest - len(p)] for p in self.prompts])).long()
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                tokens = self.policy.generate(prompts, attention_mask=mask, max_new_tokens=args.response_tokens, min_new_tokens=args.response_tokens,
                                              do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=pad)
            texts = [self.tokenizer.decode(row) for row in tokens.tolist()]
            encoded = self.wordpiece(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                score = self.scorer(**encoded).logits[:, 1].float()
            actions, mask = tokens[:, longest:], torch.cat((mask, torch.ones_like(tokens[:, longest:])), 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            old = {name: [] for name in ("log_prob", "ref_log_prob", "kl", "entropy", "value")}
            for rows in torch.arange(len(tokens)).split(args.minibatch):
                logits, hidden = self.logits(self.policy, tokens[rows], mask[rows], positions[rows])
                log_p, log_q = logits.log_softmax(-1), self.logits(self.reference, tokens[rows], mask[rows], positions[rows])[0].log_softmax(-1)
                action = actions[rows][..., None]
                values = (log_p.gather(-1, action)[..., 0], log_q.gather(-1, action)[..., 0], (log_p.exp() * (log_p - log_q)).sum(-1),
                          -(log_p.exp() * log_p).sum(-1), self.value_head(hidden)[..., 0])
                for name, value in zip(old, values):
                    old[name].append(value)
            old = {name: torch.cat(values) for name, values in old.items()}
        rewards, inside = -args.kl_coef * (old["log_prob"] - old["ref_log_prob"]), torch.ones_like(old["value"])
        rewards[:, -1] += score
        advantages, returns = ppo.gae(rewards, old["value"], inside, args.gamma, args.gae_lambda)
        advantages = ppo.whiten(advantages, inside)
        for _ in range(args.update_epochs):
            for rows in torch.randperm(len(tokens)).split(args.minibatch):
                logits, hidden = self.logits(self.policy, tokens[rows], mask[rows], positions[rows])
                log_prob = logits.log_softmax(-1).gather(-1, actions[rows][..., None])[..., 0]
                loss = ppo.policy_loss(log_prob.flatten(), old["log_prob"][rows].flatten(), advantages[rows].flatten(), args.clip_coef)[0]
                loss = loss + args.value_coef * ppo.value_loss(self.value_head(hidden)[..., 0].flatten(), old["value"][rows].flatten(),
                                                               returns[rows].flatten(), args.clip_coef)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, args.grad_clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


class NoEnd:
    """GPT-2's ids for either side, without an end token, so that both write responses of the same length."""
    kind, vocab_size, begin, stops, suppressed = "qwen2", 50257, [], [], []

    def __init__(self):
        self.known = range(50257)

    def decode(self, ids):
        return " ".join(f"{i}" for i in ids)


def rlhf(device):
    """An iteration on 64 responses of 24 tokens with 4 epochs: a Qwen2 of the size of README's IMDB policy, and a DistilBERT of the
    size of --train-reward's scorer, then of the hub's. Both sides share the process, so first neither has glibc keep its memory,
    as users of the library have it, then both do, as ppo.py does."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    sizes = dict(vocab_size=50257, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                 max_position_embeddings=128, tie_word_embeddings=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *(f"##{d}" for d in range(10))]
    small = dict(dim=128, hidden_dim=256, n_layers=2, n_heads=4)
    for name, scorer_sizes, keep in (("small scorer", small, False), ("small scorer, memory kept", small, True), ("DistilBERT's size, memory kept", {}, True)):
        if keep:
            keep_memory()
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            torch.manual_seed(0)
            policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()
            policy.save_pretrained(folder / "policy")
            labels = dict(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
            scorer = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**{"vocab_size": 30522} | scorer_sizes | labels)).eval()
            scorer.save_pretrained(folder / "scorer")
            (folder / "scorer/vocab.txt").write_text("\n".join(vocab) + "\n")
            for dtype_name, dtype in DTYPES.items():
                args = ppo.Config(run=str(folder / "run"), data="imdb", lr=1e-6, **{k: v for k, v in ppo.DEFAULTS["own"].items() if k != "lr"})
                rng = torch.Generator().manual_seed(0)
                prompts = [torch.randint(50257, (int(n),), generator=rng).tolist() for n in torch.randint(2, 9, (64,), generator=rng)]
                model, reference = (qwen_load.load_weights(folder / "policy", dtype=torch.float32) for _ in range(2))
                for module in model, reference:
                    speed_up(module)
                    module.product_dtype = dtype
                task = ppo.Task(args, reference, NoEnd(), ppo.load_scorer(folder / "scorer", dtype=dtype), {})
                ours = OurPPO(task, model, prompts, dtype)
                theirs = LibraryPPO(copy.deepcopy(policy), copy.deepcopy(policy).requires_grad_(False), scorer, NoEnd(),
                                    transformers.BertTokenizer(vocab=str(folder / "scorer/vocab.txt"), do_lower_case=True), prompts, args, dtype)
                row(f"PPO iteration, {name}", dtype_name, dtype_name, ours.step, theirs.step)
                NOTES.append(f"PPO, {name}, {dtype_name}: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in ours.seconds.items()) + ".")


def main():
    benches = {"layers": layers, "step": step, "transformer": transformer, "compiled": compiled, "qwen": qwen, "finetune": finetuning, "ppo": rlhf, "memory": memory,
               "quick": quick}
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("what", nargs="*", choices=[[], *benches], default=[], help="default: all")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = sample.pick_device(args.device)
    said = train.environment(nn.Linear(1, 1).to(device))
    print(f"{said['processor']} ({torch.backends.cpu.get_cpu_capability()}), torch {said['torch']}, {device.type}, {torch.get_num_threads()} "
          f"threads, commit {said['commit']}, {time.strftime('%Y-%m-%d')}. Medians in milliseconds; above 1, ours is faster.\n")
    print("| work | dtype | ours | library | ratio |\n|---|---|---|---|---|")
    for name in args.what or [name for name in benches if name not in ("quick", "memory")]:
        benches[name](device)
    print("\n" + "\n".join(NOTES))


if __name__ == "__main__":
    main()
