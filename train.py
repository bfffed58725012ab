"""Train a language model: the RNN, the LSTM or the Transformer, in one loop.

    python train.py --model lstm                             # the embedded finance language
    python train.py --model lstm --data ptb --minutes 15     # the Penn Treebank in the time you have
    python train.py --model transformer --data my.txt --tokenizer gpt2 --epochs 3 --run runs/mine
    python train.py --resume --run runs/mine                 # after a kill, bit for bit in float32
    torchrun --nproc-per-node 2 --standalone -- train.py     # several processes split the rows of a batch

A language model factors the probability of a text into that of each token after all before it, p(w_1..w_n) =
prod_i p(w_i | w_1..w_{i-1}). The loss is L = -1/n sum_i log p(w_i | ...). Its unit is the nat, because the
logarithm is the natural one. Perplexity is e^L: a model with perplexity 12 is as uncertain as a choice among
12 equally likely tokens.

This is a training in its shortest form. `train` has the same loop with a log and checkpoints, and with calls
for several processes, which do nothing if there is only one:

    for step in range(steps):
        x, y = batches.batch(step)                           # [B, T] each; y is x one token later
        loss, state = model(x, state, targets=y)             # forward
        loss.backward()                                      # backward
        state = map_state(torch.Tensor.detach, state)        # values stay, gradients stop
        set_lr(optimizer, get_lr(step, steps, lr, warmup_steps))
        clip_grad_norm(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()

What a step reads. A recurrent model reads batch_size places of the text side by side, and each step continues
where the last one stopped. The state is carried from step to step, but its history is cut (truncated
back-propagation through time, Williams & Peng 1990): gradients reach block_size tokens back, the memory
reaches further. The Transformer has no state and reads windows of block_size tokens in random order.

What a step changes. With g the gradient, scaled down to a norm of at most --grad-clip (Pascanu et al. 2013),
AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) updates float32 weights:

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2        w <- (1 - lr wd) w - lr m' / (sqrt(v') + eps)

where m' = m / (1 - b1^t), v' = v / (1 - b2^t), b1 = 0.9, b2 = 0.99, and wd is 0 for biases and norms. m is a
running mean of the gradient and v of its square, and m' and v' correct for their beginning at 0. So a weight
moves by about lr, whatever the scale of its gradient. lr rises linearly to its peak, because v is not yet
reliable at first. Then it falls along half a cosine (Loshchilov & Hutter 2017) to a hundredth of the peak.

Where to find it:
    L                                   the models' forward (rnn.softmax_loss); perplexity, token_losses
    what a step reads                   data.ContiguousBatches, data.WindowBatches; map_state, begin_texts
    g scaled down, m, v, w              clip_grad_norm, configure_optimizer
    lr                                  get_lr, set_lr
    a complete training                 main, stages 1 to 3; pretrain, 4 and 8; train, 5 to 7
    its folder                          Run

The stages have the same numbers in every script: 1 options, 2 device, 3 data, 4 model, 5 optimizer, 6 resume,
7 loop, 8 results.

A run is a folder: last.pt (all that is needed to resume), best.pt (the weights with the lowest validation
loss), log.csv (a row for every log step and evaluation), result.json (the final figures). last.pt is written
at every evaluation and after Ctrl-C. --resume takes from it the options, the weights, the moments m and v,
the recurrent state, the rows of the log and the step. The steps that came later are computed again, with the
same random draws. --resume --steps N makes a run longer, and its cosine, too.
"""
import contextlib
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from data import RANK, WORLD, UserError, option, prepend_eos, read_json, save_json, write_atomically
from fast.layer import runs_textbook, speed_up
from fast.products import compile_c, keep_memory, processor_name
from sample import (MODELS, autocast, build_model, count_parameters, device_of, dtype_name, generate, kind_of,
                    pick_device, pick_dtype, read_checkpoint, tokenizer_from, trained_on)

# The defaults of each model for the embedded languages.
DEFAULTS = {
    "rnn": dict(n_embd=192, n_layer=1, batch_size=32, block_size=32, lr=3e-3, weight_decay=0.01, epochs=3.0),
    "lstm": dict(n_embd=192, n_layer=1, batch_size=32, block_size=64, lr=6e-3, weight_decay=0.01,
                 epochs=3.0),
    "transformer": dict(n_embd=128, n_layer=4, n_head=4, batch_size=16, block_size=128, lr=2e-3,
                        weight_decay=0.01, epochs=2.0),
}
# For real text (a corpus, or a text of one's own) these replace them.
REAL_TEXT = {
    "rnn": dict(n_embd=512, n_layer=1, batch_size=32, block_size=35, lr=3e-3, dropout=0.3,
                dropout_input=0.2, dropout_embed=0.05, weight_decay=0.1, epochs=10.0),
    "lstm": dict(n_embd=512, n_layer=1, batch_size=32, block_size=70, lr=1.1e-2, dropout=0.3,
                 dropout_hidden=0.2, dropout_input=0.2, dropout_embed=0.05, weight_decay=0.05, epochs=10.0),
    "transformer": dict(n_embd=128, n_layer=6, n_head=4, batch_size=16, block_size=64, lr=5e-3,
                        dropout=0.1, weight_decay=0.6, epochs=10.0),
}
# For the characters of real text these replace both. (10 epochs of Shakespeare take 15 minutes on two cores.)
CHARACTERS = {"transformer": dict(n_embd=192, n_head=6, block_size=128, lr=3e-3, weight_decay=0.1)}


@dataclass
class RunOptions:
    """The options of every training, whichever script it belongs to."""
    run: str = option(None, "folder of the run (default: in runs/, named after the model and the text)",
                      group="the run")
    resume: bool = option(False, "resume the run in --run, with the options that it was started with")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    lr: float = option(None, "highest learning rate")
    warmup_steps: int = option(100, "steps of linear warm-up, however short the run", at_least=0)
    grad_clip: float = option(1.0, "largest gradient norm")
    log_every: int = option(50, "steps between rows of log.csv")
    eval_every: int = option(None, "steps between evaluations (default: a 20th of the run)")
    seed: int = option(1, "seed of weights, batches and all other random draws", at_least=0, below=2 ** 62)
    device: str = option("auto", "auto: cuda if there is one, else cpu; or a torch device")
    dtype: str = option("auto", "dtype of products (weights are float32); auto: bfloat16 if the hardware has "
                                "it", choices=["auto", "float32", "bfloat16"])


@dataclass
class Config(RunOptions):
    """Train an RNN, an LSTM or a Transformer by hand, on an embedded language, a corpus or a file."""
    script = "python train.py"
    model: str = option("lstm", "which of the models", choices=list(MODELS))
    data: str = option("finance", f"{', '.join(data.CORPORA)}, or the path of a text file or a folder")
    tokenizer: str = option("word", "words (capitals become small, numbers N), characters, or GPT-2's pieces",
                            choices=["word", "char", "gpt2"])
    also: list[str] = option([], "other corpora to log the perplexity of")
    search: int = option(None, "try N random configurations within --minutes; options that you type are "
                               "held fixed")
    epochs: float = option(None, "passes over the training text")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    minutes: float = option(None, "as many steps as fit into this time, instead of --epochs")
    compile: bool = option(False, "torch.compile the Transformer's layers, instead of the kernels of fast/")
    sample: bool = option(True, "print a line that the model writes at every evaluation")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory (Transformer only)")
    batch_size: int = option(None, "rows of a batch", group="by model and corpus (the defaults are below)")
    block_size: int = option(None, "tokens of a row: how far back gradients reach (RNN, LSTM), or the "
                                   "context (Transformer)")
    lr: float = option(None, "highest learning rate")
    n_layer: int = option(None, "layers")
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "width")
    n_hidden: int = option(None, "width of the recurrent layers below the last (default: n_embd), or of the "
                                 "MLP (default: 3 n_embd)")
    dropout: float = option(None, "dropout after the last recurrent layer, or after attention and MLP",
                            at_least=0, below=1)
    dropout_hidden: float = option(None, "dropout between recurrent layers", at_least=0, below=1)
    dropout_input: float = option(None, "dropout of the embedded input", at_least=0, below=1)
    dropout_embed: float = option(None, "dropout of words of the vocabulary", at_least=0, below=1)
    weight_decay: float = option(None, "weight decay of AdamW, on matrices", at_least=0)
    cutoff: int = option(None, "frequent words of an adaptive softmax; 0: an ordinary softmax (default: a "
                               "fifth of a vocabulary above 5,000)", at_least=0)


# ---------------------------------------------------------------------------------------- the parts of a step

def step_seed(seed, step, rank=0):
    """The seed of a step's random draws. No random state is ever saved, and a resumed run draws what an
    uninterrupted one would have drawn. The seed has 32 bits, because a CPU's generator keeps no more."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def get_lr(step, steps, peak, warmup_steps):
    """The schedule of all trainings: linear warm-up, then half a cosine down to 1 % of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)                 # ppo.py's value head has one


def configure_optimizer(model, lr, weight_decay):
    """AdamW with weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = device_of(model).type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=fused)


def map_state(f, *states):
    """Apply f to each tensor of a recurrent state, or to the tensors in the same place of several states. The
    state None stays None."""
    if states[0] is None:
        return None
    if isinstance(states[0], torch.Tensor):
        return f(*states)
    return [map_state(f, *parts) for parts in zip(*states)]


def begin_texts(state, x, eos, seed, step):
    """A row of x [B, T] that starts with <eos> gets a zero state with probability 1/2, because generation and
    evaluation start a text from a zero state, too."""
    drawn = torch.from_numpy(np.random.default_rng((seed, step)).random(len(x)) < 0.5)
    keep = ~own_rows((x[:, 0] == eos) & drawn)                              # [B]
    return map_state(lambda s: s * keep.to(s.device)[:, None], state)


def clip_grad_norm(parameters, limit):
    """Scale the gradients so that their common norm is at most limit; -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()    # of all shards


# ----------------------------------------------------------------------------------------------- the training

def train(config, model, tokenizer, batches, get_scores, warmup_steps, checkpoint=None, prompt=()):
    """Train a model into the folder config.run; -> its Run.

    batches.batch(step) -> (x, y), the inputs and targets of a step. get_scores() -> {column: figure} for
    log.csv; the weights with the lowest "val_loss" become best.pt. checkpoint: the saved run, if this
    training resumes; the caller has loaded its weights. prompt: ids that the model continues at every
    evaluation.

    What the loop calls and a first reading can do without: own_rows and data_parallel do nothing in one
    process; autocast sets the dtype of products; a Run counts steps, logs and saves; data.show prints a line,
    which stays on the screen if it ends in a line end."""
    device = device_of(model)

    # 5 optimizer
    optimizer = configure_optimizer(model, config.lr, config.weight_decay)
    ddp_model = data_parallel(model)                        # the model itself, where there is one process

    # 6 resume
    run = Run(config, batches, checkpoint)
    state = None                                            # of a recurrent model, carried from step to step
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        state = map_state(lambda rows: own_rows(rows).to(device), checkpoint["state"])
        checkpoint.clear()                                  # its memory is needed
    data.show(f"{kind_of(model)} on {config.data}: {count_parameters(model):,} parameters, "
              f"{batches.train_tokens:,} training tokens, {how_computed(model)}, {config.run}", "\n")

    # 7 loop
    model.train()
    with run:                                               # Ctrl-C asks for a stop: Run.request_stop
        if not run.rows:
            run.log(**evaluate_once(get_scores, model))     # row 0: the model before the first step
        while run.step < run.steps:
            started = time.perf_counter()

            # one batch
            x, y = batches.batch(run.step)                          # [B, T] each, y one token later
            if not model.recurrent or batches.is_epoch_start(run.step):
                state = None            # a Transformer has none; others carry it to the end of an epoch
            if state is not None:
                state = begin_texts(state, x, tokenizer.eos, config.seed, run.step)
            x, y = own_rows(x).to(device), own_rows(y).to(device)   # all rows, where there is one process

            # forward and backward, in micro-batches (of a Transformer; a recurrent batch is one)
            torch.manual_seed(step_seed(config.seed, run.step, RANK))           # of dropout
            loss = 0.0
            for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
                with autocast(model):
                    part, state = ddp_model(x_part, state, targets=y_part)      # mean nats per token
                part = part / config.accumulate
                part.backward()
                loss += part.item()
            state = map_state(torch.Tensor.detach, state)   # truncated BPTT: values stay, gradients stop

            # update
            lr = get_lr(run.step, run.steps, config.lr, warmup_steps)
            set_lr(optimizer, lr)
            grad_norm = clip_grad_norm(model.parameters(), config.grad_clip)
            run.check_finite(loss=loss, gradient_norm=grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.step_done(time.perf_counter() - started, loss)
            run.plan_minutes()                              # of --minutes only: how many steps fit
            data.show(f"{run}  loss {loss:.3f}  {run.tokens_per_second:,.0f} tokens/s")

            # evaluate, log, save
            if run.step % run.eval_every == 0 or run.step == run.steps:
                scores = evaluate_once(get_scores, model)
                run.check_finite(validation_loss=scores["val_loss"])
                row = run.log(lr=lr, grad_norm=grad_norm, **scores)
                better = run.save(model, tokenizer, optimizer, state, scores["val_loss"])
                figures = "".join(f"  {name} {scores[name]:.2f}" for name in scores if name != "val_loss")
                data.show(f"{run}  loss {row['train_loss']:.3f}{figures}{' *' if better else ''}", "\n")
                if prompt and RANK == 0:
                    data.show("    " + sample_line(model, tokenizer, prompt, config.seed), "\n")
            elif run.step % config.log_every == 0:
                run.log(lr=lr, grad_norm=grad_norm)
            if run.stop_requested:
                run.save_and_exit(model, tokenizer, optimizer, state)       # saves, and ends the process
    return run


# Upper limits on the tokens that an evaluation reads, during training and at the end
WHILE_TRAINING, AT_THE_END = 100_000, 300_000
EXACT = 100_000             # at the end, a recurrent model reads a text of up to this length in one piece


def pretrain(config, corpus, also=(), checkpoint=None):
    """Train a model from random weights on a corpus, into the folder config.run; -> the content of its
    result.json. also: other texts, [(name, ids)], whose perplexity is logged."""
    # 4 model
    tokenizer, device = corpus.tokenizer, pick_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config.model, model_config(config, tokenizer.vocab_size)).to(device)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    model.product_dtype = pick_dtype(config.dtype, device)
    if config.compile:
        compile_layers(model)
    else:
        speed_up(model)
    check_rows(config, model)
    batches = data.batches_of(model, corpus.ids["train"], config.batch_size, config.block_size, config.seed)
    texts = {"valid": prepend_eos(tokenizer, corpus.ids["valid"][:WHILE_TRAINING])}
    for name, ids in also:
        texts[name] = prepend_eos(tokenizer, ids[:WHILE_TRAINING])

    # 5 to 7
    prompt = texts["valid"][:min(9, config.block_size)].tolist() if config.sample else ()
    with claim_folder(config):
        run = train(config, model, tokenizer, batches, lambda: evaluate(model, texts), config.warmup_steps,
                    checkpoint, prompt)
    if RANK:
        return None

    # 8 results
    result = {"val_ppl": perplexity_of(run.best), "epochs": run.steps / batches.steps_per_epoch,
              "tokens_per_second": run.tokens_per_second}
    if not config.search:
        model.load_state_dict(read_checkpoint(run.folder / "best.pt")["model"])
        result |= final_figures(model, corpus)
    result |= run.result(model)
    save_json(run.folder / "result.json", result)                   # last: it says that the run is complete
    return result


def final_figures(model, corpus):
    """Perplexity on the validation and test splits, up to AT_THE_END tokens of each; the floor; the share of
    <unk>. None for a test split that the corpus does not have."""
    out = {"test_ppl": None, "floor_ppl": corpus.floor.get("test"), "test_tokens": None}
    for split in [split for split in corpus.ids if split != "train"]:
        ids = prepend_eos(corpus.tokenizer, corpus.ids[split][:AT_THE_END])
        scores = perplexity(model, ids, 1 if len(ids) <= EXACT else 16)
        name = "val" if split == "valid" else split
        out |= {f"{name}_ppl": scores["ppl"], f"{name}_tokens": scores["tokens"],
                f"{name}_unknown": unknown_share(corpus.tokenizer, ids[1:])}
    return out


# ------------------------------------------------------------------------------------------------- evaluation

LONGEST_WINDOW = 4096                                                       # tokens


@torch.no_grad()
def token_losses(model, ids, pieces=1, window=None, stride=None):
    """-log p, the negative log-likelihood (nll), of each of ids[1:] in nats, float64 [len(ids) - 1], without
    dropout. ids[0] is context only. A recurrent model reads the text in `pieces` side by side, a Transformer
    in windows of `window` tokens that advance by `stride` (recurrent_nll, window_nll)."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    n = len(ids) - 1
    if n < 1:
        raise ValueError("at least one token is needed after the first")
    ids, was_training = ids.to(device_of(model)), model.training
    model.eval()
    with autocast(model):
        if model.recurrent:
            losses = recurrent_nll(model, ids, pieces)
        else:
            window = min(window or min(model.config.block_size, LONGEST_WINDOW), n)
            losses = window_nll(model, ids, window, min(stride or max(1, window // 2), window))
    model.train(was_training)
    data.show("")
    return losses.cpu().double()


def perplexity_of(nats):
    """e^nats, limited to what a float can hold."""
    return math.exp(min(nats, 700))


def perplexity(model, ids, pieces=1, window=None, stride=None):
    """The mean of token_losses: -> {"nll": nats per token, "ppl": perplexity, "tokens": how many}."""
    losses = token_losses(model, ids, pieces, window, stride)
    nll = losses.mean().item()
    return {"nll": nll, "ppl": perplexity_of(nll), "tokens": len(losses)}


def evaluate(model, texts):
    """Figures on texts {name: ids}, for log.csv. Recurrent models read up to 16 pieces side by side."""
    scores = {name: perplexity(model, ids, max(1, min(16, len(ids) // 1000))) for name, ids in texts.items()}
    valid = scores.pop("valid")
    others = {f"ppl_{name}": score["ppl"] for name, score in scores.items()}
    return {"val_loss": valid["nll"], "val_ppl": valid["ppl"]} | others


def sample_line(model, tokenizer, prompt, seed):
    """How the model continues a prompt (ids), from the same seed at every evaluation: a line of text."""
    was_training = model.training
    model.eval()
    new = generate(model, [prompt], 20, 0.8, seed=seed, suppressed_tokens=tokenizer.suppressed)
    model.train(was_training)
    return " ".join(tokenizer.decode(prompt + new[0]).replace(data.SEPARATOR, " ").split())[-100:]


def unknown_share(tokenizer, ids):
    """The share of <unk> among token ids; 0 for a tokenizer without."""
    return float(np.mean(np.asarray(ids) == getattr(tokenizer, "unk", None)))


def warn_of_unknown(share, what, above=0.05):
    """Warn where many words are <unk>, which flatters a perplexity."""
    if share > above:
        data.show(f"{share:.0%} of {what} is <unk>. It is easy to predict, so perplexities look better than "
                  "they are; a model that is trained with --tokenizer gpt2 has no <unk>", "\n")


# The evening's reading of this file ends here.

# ----------------------------------------------------------------------------- evaluation: reading in batches

OVERLAP, TOKENS_AT_ONCE = 256, 16_384


def recurrent_nll(model, ids, pieces):
    """-log p of each of ids[1:], float32, under a recurrent model that reads the text from start to end or,
    faster, in equal pieces side by side. Each piece but the first starts from the state after the first
    OVERLAP tokens of the text, and reads the OVERLAP tokens before its own, which do not count. (From a zero
    state in mid-text, a network may settle in states that never occur when it reads from the start.)"""
    n = len(ids) - 1
    overlap = min(OVERLAP, n // pieces) if pieces > 1 else 0
    length = math.ceil((n - overlap) / pieces)
    padded = ids.new_full((2, overlap + pieces * length), -1)
    padded[:, :n] = torch.stack((ids[:-1], ids[1:]))
    inputs, targets = padded.unfold(1, overlap + length, length)            # [pieces, overlap + length] each
    state = model.init_state(pieces)
    if overlap:
        _, beginning = model(inputs[:1, :overlap])
        states = model.init_state(1), *[beginning] * (pieces - 1)
        state = map_state(lambda *rows: torch.cat(rows), *states)
    losses = []
    for x, y in zip(inputs.clamp(min=0).split(256, 1), targets.split(256, 1)):      # 256 time steps a call
        nll, state = model(x, state, targets=y, reduction="none")
        losses.append(nll)
        data.show(f"evaluated {len(losses) * 256 * pieces:,} of {n:,} tokens")
    counted = targets >= 0                                                  # the last piece may be filled up
    counted[1:, :overlap] = False
    return torch.cat(losses, 1)[counted]


def window_nll(model, ids, window, stride):
    """-log p of each of ids[1:], float32, under a Transformer that reads windows which advance by `stride`.
    A window counts only the predictions that no earlier window made. window <= len(ids) - 1.
    Example: 10 predictions, window 4, stride 2. Windows end at 4, 6, 8, 10 and count 4, 2, 2, 2 of them."""
    n = len(ids) - 1
    ends = [*range(window, n, stride), n]                           # a window's last target is ids[end]
    windows = list(zip([0, *ends], ends))                           # (end of the window before, end)
    losses, rows = [], max(1, min(32, TOKENS_AT_ONCE // window))
    for k in range(0, len(windows), rows):
        group = windows[k:k + rows]
        x = torch.stack([ids[end - window:end] for _, end in group])                    # [rows, window]
        y = torch.stack([ids[end - window + 1:end + 1] for _, end in group])            # one token later
        nll, _ = model(x, targets=y, reduction="none")
        losses += [row[window - (end - before):] for row, (before, end) in zip(nll, group)]
        data.show(f"evaluated {group[-1][1]:,} of {n:,} tokens")
    return torch.cat(losses)


# ----------------------------------------------------------------------------------- a training in its folder

VERSION = 2                         # of checkpoints; last.pt of another version is not resumed
MEASURED, WARMING_UP = 20, 5        # --minutes plans after 20 steps, by their speed without the first 5


class NotFinite(UserError):
    """The loss or the gradient is infinite or not a number."""


@contextlib.contextmanager
def claim_folder(config):
    """Reserve config.run for one training. A new training creates log.csv with mode "x", so that a second one
    in the same folder is refused. If the training ends before its first checkpoint, log.csv is deleted."""
    log, refusal = Path(config.run, "log.csv"), None
    if RANK == 0 and not config.resume:
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            open(log, "x").close()
        except FileExistsError:
            refusal = (f"{config.run} belongs to a training that is running, or that died before its first "
                       f"checkpoint. If it died, delete {log}; else choose another folder with --run")
    if refusal := all_gather(refusal)[0]:
        raise UserError(refusal)
    try:
        yield
    except BaseException:
        if RANK == 0 and not log.with_name("last.pt").exists():
            log.unlink(missing_ok=True)
        raise


@dataclass
class Progress:
    """How far a training is: what last.pt keeps of its Run."""
    step: int = 0                                   # steps done
    steps: float = math.inf                         # steps planned; inf while --minutes measures the speed
    eval_every: float = math.inf                    # steps between evaluations
    seconds: float = 0.0                            # on the clock
    step_seconds: float = 0.0                       # on the clock, in training steps
    warmup_seconds: float = 0.0                     # in the first WARMING_UP steps
    eval_seconds: float = 0.0                       # in the last evaluation
    eval_in_steps: float = 0.0                      # how many steps an evaluation is worth (--minutes)
    best: float = math.inf                          # the lowest validation loss
    best_step: int = -1                             # the step that reached it
    rows: list = field(default_factory=list)        # of log.csv
    losses: list = field(default_factory=list)      # training losses since the last row
    train_tokens: int = 0                           # of the training text
    trained_on: list = field(default_factory=list)  # resolved names of texts, the base's first


class Run(Progress):
    """A training in its folder: how far it is, its clock, log.csv, last.pt and best.pt. The first of several
    processes writes them. Row k of log.csv shows the state after k steps: its lr and grad_norm are those of
    the k-th step. `with run:` turns Ctrl-C, or a polite kill, into stop_requested. batches: None in PPO."""

    def __init__(self, config, batches=None, checkpoint=None):
        super().__init__(train_tokens=batches.train_tokens if batches else 0)
        if getattr(config, "base", None):
            self.trained_on += trained_on(config.base)
        if config.data:
            self.trained_on.append(data.resolved(config.data))
        self.config, self.batches, self.folder = config, batches, Path(config.run)
        self.stop_requested = False
        self.log_is_written = True                              # log.csv holds all rows
        self.saved_step = None                                  # of last.pt
        self.plan(self.planned_steps())
        if checkpoint:
            self.resume(checkpoint)
        # --minutes: where the last measurement of the speed ended, and what it said
        self.mark_step, self.mark_seconds, self.recent_before = self.step, self.step_seconds, 0.0
        self.started = time.perf_counter() - self.seconds

    def planned_steps(self):
        """The length of the run by its options; inf for --minutes, which need the speed of some steps."""
        if self.config.steps:
            return self.config.steps
        if getattr(self.config, "minutes", None):
            return math.inf
        return max(1, round(self.config.epochs * self.batches.steps_per_epoch))

    def plan(self, steps, evaluations=20):
        """Set the number of steps, and the steps between evaluations (inf: none before there is a plan)."""
        self.steps = steps
        self.eval_every = self.config.eval_every or (math.inf if steps == math.inf else
                                                     math.ceil(steps / evaluations))

    def resume(self, checkpoint):
        """Continue where last.pt was written. UserError for another text or a shorter length."""
        asked, train_tokens, texts = self.steps, self.train_tokens, self.trained_on
        vars(self).update(checkpoint["run"])
        self.trained_on += [text for text in texts if text not in self.trained_on]      # --data was moved
        if train_tokens != self.train_tokens:
            raise UserError(f"{self.config.data} is no longer the text that the run in {self.folder} was "
                            f"started with: it has {train_tokens:,} training tokens, and had "
                            f"{self.train_tokens:,}. Restore it, or start a new run with --run")
        self.eval_every = self.config.eval_every or self.eval_every
        now, then = asdict(self.config), checkpoint["options"]
        if any(now.get(name) != then.get(name) for name in ("steps", "epochs", "minutes")):
            planned = self.step if self.steps == math.inf else self.steps
            if asked == math.inf and self.steps < math.inf:     # --minutes, at the speed so far
                asked = int(60 * self.config.minutes / self.seconds * self.step)
            if asked <= planned:
                raise UserError(f"{self.folder} was planned for {planned} steps; to extend it, give more "
                                f"than these ({asked} is what you gave)")
            data.show(f"from {self.steps} to {asked} steps, and the learning rate's schedule with it", "\n")
            self.plan(asked)
        if not (self.folder / "best.pt").exists():
            self.best = math.inf                                # the next evaluation is the best so far
        if RANK == 0:
            (self.folder / "result.json").unlink(missing_ok=True)       # the run is not complete any more
        self.write_log(all_rows=True)

    def plan_minutes(self):
        """Turn --minutes into a number of steps, after the first MEASURED ones. Later, every 60th of the run,
        plan fewer steps if the machine has become so slow that the run would end 5 % late."""
        measuring = self.steps == math.inf and self.step < MEASURED
        if not getattr(self.config, "minutes", None) or measuring or self.step >= self.steps:
            return
        limit = 60 * self.config.minutes                                        # seconds, as all times here
        left = limit - self.seconds
        if self.steps == math.inf:
            a_step = (self.step_seconds - self.warmup_seconds) / (MEASURED - WARMING_UP)
            left -= 0.02 * limit
            evaluations = max(2, min(20, int(0.1 * left / self.eval_seconds)))  # a tenth of the time
            if self.config.eval_every:
                steps = left / (a_step + self.eval_seconds / self.config.eval_every)
            else:
                steps = (left - evaluations * self.eval_seconds) / a_step
            self.plan(*all_gather((self.step + max(1, int(steps)), evaluations))[0])
            self.eval_in_steps = self.eval_seconds / a_step
            data.show(f"{self.config.minutes:g} minutes are {self.steps} steps, "
                      f"{self.steps / self.batches.steps_per_epoch:.1f} epochs", "\n")
        elif self.step - self.mark_step >= max(1, self.steps // 60):
            recent = (self.step_seconds - self.mark_seconds) / (self.step - self.mark_step)
            # a short pause is no reason to stop early: only two slow measurements in a row count
            a_step, slow = self.step_seconds / self.step, min(recent, self.recent_before)
            if slow > 1.5 * a_step:
                a_step = slow
            an_evaluation = self.eval_in_steps * a_step
            with_evaluations = a_step + an_evaluation / self.eval_every
            is_late = (self.steps - self.step) * with_evaluations > left + 0.05 * limit
            # time for the last evaluation, and as much in reserve, because a busy machine is not steady
            fewer = self.step + max(1, int((left - 2 * an_evaluation) / with_evaluations))
            is_late, fewer = all_gather((is_late, fewer))[0]
            if is_late and fewer < self.steps:
                data.show(f"the machine has become slower: {fewer} steps instead of {self.steps} fit into "
                          f"{self.config.minutes:g} minutes", "\n")
                self.steps = fewer
            self.mark_step, self.mark_seconds, self.recent_before = self.step, self.step_seconds, recent

    def __enter__(self):
        """In one process, signals ask for a stop. (Several processes resume from their last evaluation.)"""
        self.handlers = {}
        if WORLD == 1 and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)            # Windows has no SIGHUP; nohup ignores it
                if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                    self.handlers[number] = signal.signal(number, self.request_stop)

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def request_stop(self, *_):
        """Stop when the present step is complete. A second signal ends the process at once."""
        if self.stop_requested:
            raise KeyboardInterrupt
        if not self.rows:                                       # before the first step: nothing to save
            data.show("stopped. Nothing was saved yet; the same command begins again", "\n")
            raise SystemExit(130)
        self.stop_requested = True
        data.show("stopping when this step is complete and saved; Ctrl-C again stops at once", "\n")

    def step_done(self, seconds, loss=None):
        """Count a step. seconds: what it took; loss: in this process (PPO has none)."""
        self.step += 1
        self.seconds = time.perf_counter() - self.started
        self.step_seconds += seconds
        if loss is not None:
            self.losses.append(loss)
        if self.step == WARMING_UP:
            self.warmup_seconds = self.step_seconds

    @property
    def tokens_per_second(self):
        return self.step * self.batches.tokens / max(self.step_seconds, 1e-9)

    def log(self, **columns):
        """Write a row of log.csv, with these columns beside those of the clock; -> the row."""
        before, self.seconds = self.seconds, time.perf_counter() - self.started
        if "val_loss" in columns:
            self.eval_seconds = self.seconds - before
        row = {"step": self.step, "seconds": self.seconds}
        if self.batches:
            row |= {"epoch": self.step / self.batches.steps_per_epoch,
                    "tokens": self.step * self.batches.tokens, "tokens_per_second": self.tokens_per_second}
        if self.losses:
            means = [sum(losses) / WORLD for losses in zip(*all_gather(self.losses))]   # over the processes
            row["train_loss"] = sum(means) / len(means)
        row |= columns
        has_new_column = bool(row.keys() - {name for earlier in self.rows for name in earlier})
        self.rows.append(row)
        self.write_log(all_rows=has_new_column)
        self.losses = []
        return row

    def write_log(self, all_rows):
        """Write all rows of log.csv, or only the last one. If that fails, the next row tries again."""
        try:
            write_csv(self.folder / "log.csv", self.rows, appended=self.log_is_written and not all_rows)
            self.log_is_written = True
        except OSError as e:
            self.log_is_written = False
            data.show(f"log.csv cannot be written now ({e.strerror}): is it open elsewhere? The training "
                      "continues, and writes all of it with the next row", "\n")

    def save(self, model, tokenizer, optimizer, state=None, val_loss=None, **more):
        """Write last.pt, and best.pt too if the validation loss is the lowest so far; -> whether it is. more:
        what else the checkpoint keeps."""
        better = val_loss is not None and val_loss < self.best
        if better:
            self.best, self.best_step = val_loss, self.step
        weights, moments = gather(model.state_dict()), gather(optimizer.state_dict())
        states = all_gather(map_state(torch.Tensor.cpu, state))         # the rows of each process
        state = map_state(lambda *rows: torch.cat(rows), *states)
        self.saved_step = self.step
        if RANK == 0:
            best = {"kind": kind_of(model), "config": asdict(model.config), "model": weights,
                    "tokenizer": tokenizer.state(), "trained_on": self.trained_on, "step": self.step}
            last = best | more | {
                "version": VERSION, "script": self.config.script, "options": asdict(self.config),
                "optimizer": moments, "state": state,
                "run": {f.name: getattr(self, f.name) for f in fields(Progress)}}
            if better:
                write_atomically(self.folder / "best.pt", lambda f: torch.save(best, f))
            write_atomically(self.folder / "last.pt", lambda f: torch.save(last, f))
        return better

    def save_and_exit(self, *what, **more):
        """End the process, with last.pt as it is now."""
        if self.saved_step != self.step:
            self.save(*what, **more)
        again = f"{self.config.script} --resume --run {data.quoted(self.folder)}"
        if getattr(self.config, "search", None):
            again = "the same search again; finished trainings are kept"
        data.show(f"stopped at step {self.step}. The last checkpoint is kept in {self.folder}. Resume with: "
                  f"{again}", "\n")
        raise SystemExit(130)

    def check_finite(self, **values):
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"the {name.replace('_', ' ')} is not finite at step {self.step} ({value}). "
                                f"What was saved is kept in {self.folder}; take a smaller --lr in a new run")

    def result(self, model):
        """What every result.json holds."""
        return {"model": kind_of(model), "data": self.config.data, "params": count_parameters(model),
                "steps": self.steps, "best_step": self.best_step, "seconds": self.seconds,
                "dtype": dtype_name(model.product_dtype), "seed": self.config.seed, **environment(model),
                "options": asdict(self.config)}

    def __str__(self):
        if self.steps == math.inf:
            return f"step {self.step}, measuring the speed"
        left = self.seconds / max(1, self.step) * (self.steps - self.step)
        return f"step {self.step}/{self.steps}  {self.seconds:.0f} s, {left:.0f} s left"


def write_csv(path, rows, appended=False):
    """Write rows, {column: value}, as a file; appended: only the last one, to a file that has its columns."""
    if RANK:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a" if appended else "w", encoding="utf-8", errors="backslashreplace", newline="") as f:
        table = csv.DictWriter(f, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        if not appended:
            table.writeheader()
        for row in rows[-1:] if appended else rows:
            table.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})


def load_optimizer(optimizer, state):
    """Put a checkpoint's state into an optimizer, perhaps on another device or in shards."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups):
        saved["fused"] = own.get("fused")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, moments in state["state"].items():
        moments |= {name: shard_as(v, parameters[k]) for name, v in moments.items() if v.dim()}
    optimizer.load_state_dict(state)


def how_computed(model):
    """What decides a training's speed: device, dtype, processes; on a CPU its threads and its kernels."""
    device = device_of(model)
    text = f"{device.type} {dtype_name(model.product_dtype)}" + (f" x {WORLD}" if WORLD > 1 else "")
    if device.type != "cpu":
        return text
    threads, cores = torch.get_num_threads(), os.cpu_count()
    text += f", {threads} threads" + (f" on {cores} cores: slow" if threads > cores else "")
    if compile_c("decode", "-DBF16") is None:
        return text + ", no C compiler (cc, or $CC): slow"
    return text + (", textbook layers without kernels" if runs_textbook(model) else "")


def compile_layers(model):
    """torch.compile a Transformer's layers. UserError where that does not work."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device_of(model)))
    except Exception as e:                                          # no compiler, no Triton, ...: many types
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--compile does not work here: {reason}. Leave it out") from e
    for layer in model.layers:
        layer.compile()


def environment(model):
    """What a result was computed with. The commit is None where the code is in no git repository."""
    device = device_of(model)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    git = "git describe --always --dirty --exclude=*"
    commit = subprocess.run(git, shell=True, cwd=data.HERE, capture_output=True, text=True).stdout.strip()
    return {"device": device.type, "torch": torch.__version__, "processor": processor,
            "commit": commit or None}


# What a resumed run may change: its length (one typed length replaces the others), how it is computed and
# shown, where its texts and its models lie, and its rate.
MAY_CHANGE = {"run", "resume", "steps", "epochs", "minutes", "lr", "grad_clip", "log_every", "eval_every",
              "sample", "also", "device", "dtype", "compile", "shard", "data", "base", "scorer"}


def resume_or_refuse(config, given):
    """With --resume: -> (checkpoint, the options of its run with those that were typed). Else (None, config).
    given: the names that were typed. UserError for a folder that holds a run already, for one that holds none
    of this script, and for an option that would make it another run."""
    folder, lengths = Path(config.run), {"steps", "epochs", "minutes"}
    if len(given & lengths) > 1:
        raise UserError("--epochs, --steps and --minutes exclude each other; give one of them")
    if not config.resume:
        if RANK == 0 and any((folder / file).exists() for file in ("last.pt", "result.json", "config.json")):
            again = f"Resume it: {config.script} --resume --run {data.quoted(folder)}; or choose"
            again = again if (folder / "last.pt").exists() else "Choose"        # a scorer is not resumed
            raise UserError(f"{folder} already holds a run or weights. {again} another folder with --run")
        return None, config
    checkpoint = read_checkpoint(folder / "last.pt", config.script, mmap=getattr(config, "shard", False))
    complete = {"options", "state", "run", "optimizer"} <= checkpoint.keys()
    if not complete or (checkpoint.get("version"), checkpoint.get("script")) != (VERSION, config.script):
        raise UserError(f"{folder} is not a run of {config.script}, or one of another version, so it cannot "
                        "be resumed")
    saved = asdict(type(config)()) | checkpoint["options"]          # a newer option has its default
    if saved.get("cutoff", 0) is None:
        saved["cutoff"] = 0                                         # an older run has an ordinary softmax
    changes = {name: getattr(config, name) for name in sorted(given) if getattr(config, name) != saved[name]}
    for name, value in changes.items():
        if name not in MAY_CHANGE:
            raise UserError(f"the run in {folder} was started with {name} {saved[name]}, not {value}: "
                            "leave it out, or choose another folder with --run")
        if name not in ("run", "resume"):
            data.show(f"changed: {name} {value}, was {saved[name]}", "\n")
    if given & lengths:
        saved |= {name: None for name in lengths & saved.keys() - given}
    return checkpoint, replace(config, **saved | changes | {"run": config.run, "resume": True})


# ------------------------------------------------------------------ several processes (one laptop: skip this)

JOINING_SECONDS = 60                # after which a process says what it is waiting for


def join_processes(device):
    """Under torchrun: join the other processes. After a minute a line says what this one is waiting for."""
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        waiting = threading.Timer(JOINING_SECONDS, print, (
            f"process {RANK} is waiting for all {WORLD} processes of this job (RANK and WORLD_SIZE are set): "
            "start the others, or unset RANK",), {"file": sys.stderr, "flush": True})
        waiting.daemon = True
        waiting.start()
        # the timeout is long, because the others wait while one encodes a text
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
        waiting.cancel()


def leave_processes():
    if WORLD > 1:
        dist.barrier()                                              # torchrun ends those that are left behind
        dist.destroy_process_group()


def all_gather(value=None):
    """The values of all processes, in their order. The processes wait for each other."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block before the others do: it downloads and encodes for all."""
    if RANK:
        all_gather()
    yield
    if RANK == 0:
        all_gather()


def evaluate_once(get_scores, model):
    """get_scores() in the first process, which tells the others. A model in shards needs all processes."""
    return all_gather(get_scores() if RANK == 0 or is_sharded(model) else None)[0]


def own_rows(rows):
    """The rows of a batch, or of its state, that belong to this process."""
    return rows.chunk(WORLD)[RANK]


def data_parallel(model):
    """The model, or with several processes its DistributedDataParallel, which averages their gradients. (A
    model in shards averages them itself.)"""
    return model if WORLD == 1 or is_sharded(model) else torch.nn.parallel.DistributedDataParallel(model)


def is_sharded(model):
    return hasattr(next(model.parameters()), "full_tensor")         # finetune.py --shard


def gather(state):
    """A state dict with its sharded tensors put together, on the first process's CPU."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    complete = state.full_tensor()                                  # all processes call it
    return None if RANK else complete.cpu()


def shard_as(value, parameter):
    """This process's part of the first one's tensor, if a parameter is sharded; else the tensor."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    value = value.to(parameter.device, torch.float32)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


# -------------------------------------------------------------------------------------------- hyperparameters

# What --search draws from: a pair of floats is a range on a logarithmic scale, a list is a choice.
SEARCH_SPACE = {
    "rnn": dict(lr=(1e-3, 1e-2), n_embd=[256, 384, 512], n_layer=[1, 2], batch_size=[16, 32, 64],
                block_size=[20, 35, 70], dropout=[0.1, 0.2, 0.3, 0.4], dropout_input=[0.0, 0.1, 0.2, 0.3],
                weight_decay=(3e-3, 0.3)),
    "lstm": dict(lr=(2e-3, 2e-2), n_embd=[256, 384, 512], n_layer=[1, 2], batch_size=[16, 32, 64],
                 block_size=[35, 70], dropout=[0.1, 0.2, 0.3, 0.4], dropout_hidden=[0.1, 0.2, 0.3],
                 dropout_input=[0.0, 0.1, 0.2, 0.3], weight_decay=(3e-3, 0.3)),
    "transformer": dict(lr=(1e-3, 8e-3), n_embd=[128, 256, 384], n_layer=[2, 3, 4, 6], batch_size=[8, 16, 32],
                        block_size=[64, 128], dropout=[0.0, 0.1, 0.2, 0.3], weight_decay=(1e-2, 1.0)),
}


def draw_options(config, given, rng):
    """One random configuration, as a dict of options. What the command line says is not drawn."""
    drawn = {name: rng.choice(space) if isinstance(space, list) else
             float(f"{space[0] * (space[1] / space[0]) ** rng.random():.2g}")
             for name, space in SEARCH_SPACE[config.model].items()}
    drawn |= {name: getattr(config, name) for name in drawn if name in given}
    if config.model == "transformer":
        typed = "n_head" in given
        drawn["n_head"] = config.n_head if typed else fitting_heads(drawn["n_embd"], config.n_head)
    return drawn | {"n_hidden": (3 if config.model == "transformer" else 1) * drawn["n_embd"]}


# options that do not decide what a trial of a search, or a cell of an ablation, computes
NOT_OF_A_TRIAL = {"run", "resume", "sample", "log_every", "eval_every", "device", "dtype", "compile", "shard",
                  "also", "search", "ablate_epochs", "ablate_fractions"}


def finished_trial(config):
    """The result of a finished trial. If the trial is not finished, its folder is deleted, and the result is
    None. UserError if the result is of other options."""
    folder = Path(config.run)
    result = read_json(folder / "result.json", {})
    if not result:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    options = json.loads(json.dumps(asdict(config)))
    for name, value in result["options"].items():
        if name not in NOT_OF_A_TRIAL and value != options.get(name):
            raise UserError(f"the run in {folder} was started with {name} {value}, not {options.get(name)}: "
                            "choose another folder with --run")
    return result


def run_trial(config, corpus):
    """One training of a search; -> its result, with val_ppl None if it diverged. Its weights are not kept."""
    try:
        result = pretrain(config, corpus)
    except NotFinite:
        result = {"params": None, "steps": 0, "seconds": 0.0, "val_ppl": None, "options": asdict(config)}
        save_json(Path(config.run, "result.json"), result)
    for file in Path(config.run).glob("*.pt"):
        file.unlink()
    return result


def search(config, given, corpus):
    """Successive halving (Jamieson & Talwalkar 2016), by thirds: all configurations train for a short time
    each, the best third again for three times as long, and so on. Every rung has an equal share of --minutes.
    Trial 0 has the defaults. Each training has its own schedule, because a half-finished one says little.
    Only the validation split is read. A trial is a folder, and its result.json is the record, so that the
    same command continues a search that was stopped. trials.csv has a row for each training."""
    rng, rows = random.Random(config.seed), []
    drawn = [draw_options(config, given, rng) for _ in range(config.search)]
    trials = [{name: getattr(config, name) for name in drawn[0]}, *drawn]
    alive, sizes = range(len(trials)), [len(trials)]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 3))
    for rung, size in enumerate(sizes, 1):
        minutes, scores = config.minutes / len(sizes) / size, {}
        for i in alive:
            trial = replace(config, **trials[i], minutes=minutes, sample=False,
                            run=f"{config.run}/trial-{i}-rung-{rung}")
            result = finished_trial(trial) or run_trial(trial, corpus)
            scores[i] = math.inf if result["val_ppl"] is None else result["val_ppl"]
            figures = {name: result[name] for name in ("params", "steps", "seconds", "val_ppl")}
            rows.append({"trial": i, "rung": rung, "minutes": minutes, **trials[i], **figures})
            write_csv(Path(config.run, "trials.csv"), rows)
            print(f"rung {rung} of {len(sizes)}, trial {i}: validation perplexity {scores[i]:.1f}")
        alive = sorted(alive, key=scores.get)[:math.ceil(size / 3)]
    if not math.isfinite(scores[alive[0]]):
        raise UserError("every trial that was left diverged; search with another --seed, or hold --lr fixed")
    fixed = given - {"model", "data", "minutes", "search", "run", "also", "resume", "sample", "compile"}
    chosen = trials[alive[0]] | {name: getattr(config, name) for name in sorted(fixed)}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    print(f"all trainings are in {config.run}/trials.csv. The best, validation perplexity "
          f"{scores[alive[0]]:.2f}:\n"
          f"{config.script} --model {config.model} --data {data.quoted(config.data)} --minutes "
          f"{config.minutes:g} {flags}")


# ----------------------------------------------------------------------------------------------- command line

def defaults_text():
    """The tables at the top of this file, for --help."""
    tables = {"embedded languages": DEFAULTS,
              "real text": {model: DEFAULTS[model] | d for model, d in REAL_TEXT.items()},
              "its characters, what differs": CHARACTERS}
    return "\n".join(f"defaults for {title}:\n" + "\n".join(
        f"  {model}: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in values.items())
        for model, values in table.items()) for title, table in tables.items())


def fitting_heads(n_embd, n_head):
    """The largest number of heads up to n_head that a width can be cut into, each an even number of at least
    16 coordinates; n_head itself where there is none."""
    fitting = [n for n in range(2, n_head) if n_embd % (2 * n) == 0 and n_embd // n >= 16]
    return n_head if n_embd % (2 * n_head) == 0 else max(fitting, default=n_head)


def resolve_defaults(config):
    own = {f.name: f.default for f in fields(MODELS[config.model][1]) if f.name.startswith("dropout")}
    defaults = own | DEFAULTS[config.model]
    if config.data not in data.DOMAINS:
        defaults |= REAL_TEXT[config.model]
        defaults |= CHARACTERS.get(config.model, {}) if config.tokenizer == "char" else {}
    if config.epochs or config.steps or config.minutes:
        defaults.pop("epochs")
    if config.model == "transformer" and config.n_embd:
        defaults["n_head"] = fitting_heads(config.n_embd, defaults["n_head"])
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.n_hidden is None:
        config.n_hidden = 3 * config.n_embd if config.model == "transformer" else config.n_embd


def model_config(config, vocab_size):
    """The options that describe the model, for its own config; UserError for one that it lacks."""
    names = [f.name for f in fields(MODELS[config.model][1])]
    sizes = {name: getattr(config, name) for name in names if hasattr(config, name)}
    sizes["vocab_size"] = vocab_size
    if config.model == "transformer":
        sizes["n_kv_head"] = config.n_head
        pair = 2 * config.n_head                                # RoPE turns pairs of a head's coordinates
        if config.n_embd % pair:
            raise UserError(f"n_embd {config.n_embd} must be a multiple of twice n_head, {config.n_head}: "
                            f"type --n-embd {max(1, round(config.n_embd / pair)) * pair}, or other heads")
    elif config.n_layer == 1 and config.n_hidden != config.n_embd:
        raise UserError("--n-hidden is the width of the lower layers; with one layer, set --n-embd alone")
    for name in ("n_head", "dropout_hidden", "dropout_input", "dropout_embed"):
        if getattr(config, name) is not None and name not in names:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --model {config.model}")
    return sizes


def default_cutoff(tokenizer):
    """The adaptive softmax is for large vocabularies whose order is that of frequency, as characters' is not.
    The most frequent fifth of the Penn Treebank's words are 87 % of its text. GPT-2's ids follow the order of
    its merges: the first fifth are 91 % of the tokens of the same text, and 86 % of Shakespeare's."""
    size = tokenizer.vocab_size
    return size // 5 if size > 5000 and tokenizer.kind != "char" else 0


def check_text(corpus):
    for split, ids in corpus.ids.items():
        if len(ids) < 2 and split != "train":
            raise UserError(f"{corpus.name} is too short: its {split} part holds {len(ids)} tokens")


def check_rows(config, model):
    parts = config.accumulate * WORLD
    if config.batch_size % parts:
        raise UserError(f"--batch-size {config.batch_size} cannot be cut into {parts} equal micro-batches")
    if model.recurrent and config.accumulate > 1:
        raise UserError("--accumulate is for a Transformer: a recurrent model carries its rows' state")


def main(argv=None):
    # 1 options
    example = "example: python train.py --model lstm --data ptb --minutes 15 --also wikitext2"
    config, given = data.parse_args(Config, argv, f"{defaults_text()}\n\n{example}")
    if config.search and (not config.minutes or given & {"n_hidden", "also"} or WORLD > 1):
        raise UserError("--search needs --minutes, the time for all trials together; it runs in one process, "
                        "draws --n-hidden with --n-embd, and reads no text of --also")
    if config.search and config.model not in SEARCH_SPACE:
        raise UserError(f"--search cannot draw for {config.model}; give it a line in SEARCH_SPACE")
    default = f"{'search-' if config.search else ''}{config.model}-{data.file_name(config.data)}"
    config.run = config.run or f"runs/{default}"
    checkpoint, config = resume_or_refuse(config, given)
    if checkpoint and config.search:
        raise UserError(f"{config.run} is a trial of a search; the same search again continues it")
    if config.compile and config.model != "transformer":
        raise UserError("--compile is for --model transformer; a recurrent layer has a loop of its own")
    if not checkpoint:
        resolve_defaults(config)
    keep_memory()

    # 2 device and processes
    join_processes(pick_device(config.device))

    # 3 data
    tokenizer = tokenizer_from(checkpoint["tokenizer"]) if checkpoint else config.tokenizer
    splits = ("train", "valid") if config.search else ("train", "valid", "test")
    with first_process_first():
        corpus = data.load(config.data, tokenizer, splits)
        check_text(corpus)
        also = []
        for name in config.also:
            split = data.unseen_split(name, [data.resolved(config.data)])
            other = data.load(name, corpus.tokenizer, (split,))
            check_text(other)
            warn_of_unknown(unknown_share(corpus.tokenizer, other.ids[split]), name, above=0.5)
            also.append(("./valid" if name == "valid" else name, other.ids[split]))
    if config.cutoff is None:
        config.cutoff = default_cutoff(corpus.tokenizer)
    elif config.cutoff and (config.data in data.DOMAINS or corpus.tokenizer.kind == "char"):
        raise UserError("--cutoff needs words or GPT-2's tokens, which are numbered by frequency; characters "
                        "and the words of an embedded language are not")
    share = unknown_share(corpus.tokenizer, corpus.ids["valid"])
    warn_of_unknown(share, f"the validation split of {config.data}")
    if config.search:
        with data.locked(config.run, wait=False):
            return search(config, given, corpus)
    result = pretrain(config, corpus, also, checkpoint)
    if RANK == 0:
        cut = f" (of its first {AT_THE_END:,} tokens)" if result["test_tokens"] == AT_THE_END else ""
        figures = (f", test {result['test_ppl']:.2f}{cut}" if result["test_ppl"] else
                   f" ({math.log(result['val_ppl']):.4f} nats per token; there is no test split, and this "
                   "one chose the weights)")
        figures += f", floor {result['floor_ppl']:.2f}" if result["floor_ppl"] else ""
        figures += f", {result['val_unknown']:.1%} <unk>" if result["val_unknown"] else ""
        print(f"{config.model} on {config.data}: {result['params']:,} parameters, validation perplexity "
              f"{result['val_ppl']:.2f}{figures}, {result['seconds']:.0f} s at "
              f"{result['tokens_per_second']:,.0f} tokens/s")
        print(f"written to {config.run}. Next: python sample.py --run {data.quoted(config.run)}")
    leave_processes()


if __name__ == "__main__":
    data.run_main(main)
