"""Train a language model: the RNN, the LSTM or the Transformer, in one loop.

    python train.py --model lstm                             # the embedded finance language
    python train.py --model lstm --data ptb --minutes 15     # the Penn Treebank in the time you have
    python train.py --model transformer --data my.txt --tokenizer gpt2 --epochs 3 --run runs/mine
    python train.py --resume --run runs/mine                 # after a kill, bit for bit in float32
    torchrun --nproc-per-node 2 --standalone -- train.py     # several processes split the rows of a batch

A language model factors the probability of a text into that of each token after all before it, p(w_1..w_n) =
prod_i p(w_i | w_1..w_{i-1}). The loss is L = -1/n sum_i log p(w_i | ...), in nats per token; perplexity is
e^L, the number of tokens among which a guess would be equally hard.

What a step sees. A recurrent model reads batch_size places of the text side by side, step after step from
where it stopped: the state is carried on, its history is cut (truncated back-propagation through time,
Williams & Peng 1990), so gradients reach block_size tokens back and memory further. The Transformer has no
state and reads windows of block_size tokens in random order.

What a step does, with g the gradient, scaled down to a norm of at most --grad-clip (Pascanu et al. 2013), and
AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) on float32 weights (matmuls in bfloat16 where the hardware
has them):

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2        w <- (1 - lr wd) w - lr m' / (sqrt(v') + eps)

where m' = m / (1 - b1^t) and v' likewise, and wd is 0 for biases and norms. lr rises linearly to its peak,
then falls along half a cosine (Loshchilov & Hutter 2017) to a hundredth of it.

Where each is:
    L                                   the models' forward (rnn.softmax_loss); perplexity, token_losses
    what a step sees                    data.ContiguousBatches, data.WindowBatches; map_state, begin_texts
    g scaled down, m, v, w              clip_grad_norm, configure_optimizer
    lr                                  get_lr, set_lr
    a whole training                    pretrain, stages 4 and 8; train, stages 5 to 7
    its folder                          Run

A run is a folder: last.pt (all that is needed to resume), best.pt (the weights with the lowest validation
loss), log.csv (a row for every log step and evaluation), result.json (the final figures).
"""
import csv
import math
import os
import platform
import random
import re
import signal
import subprocess
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from data import RANK, WORLD, UserError, option, prepend_eos, save_json, write_atomically
from lstm import compile_c
from rnn import CPU
from sample import (MODELS, autocast, build_model, count_parameters, dtype_name, generate, keep_memory,
                    kind_of, pick_device, pick_dtype, read_checkpoint, tokenizer_from)
from transformer import DecoderLayer, FastDecoderLayer

# Defaults by model: for the embedded languages, then what real text (the corpora, your own file) changes,
# then what its characters change (10 epochs of Shakespeare: 15 minutes on two cores).
DEFAULTS = {
    "rnn": dict(n_embd=192, n_layer=1, batch_size=32, block_size=32, lr=3e-3, weight_decay=0.01, epochs=3.0),
    "lstm": dict(n_embd=192, n_layer=1, batch_size=32, block_size=64, lr=6e-3, weight_decay=0.01,
                 epochs=3.0),
    "transformer": dict(n_embd=128, n_layer=4, n_head=4, batch_size=16, block_size=128, lr=2e-3,
                        weight_decay=0.01, epochs=2.0),
}
REAL_TEXT = {
    "rnn": dict(n_embd=512, n_layer=1, batch_size=32, block_size=35, lr=3e-3, dropout=0.3,
                dropout_input=0.2, dropout_embed=0.05, weight_decay=0.1, epochs=10.0),
    "lstm": dict(n_embd=512, n_layer=1, batch_size=32, block_size=70, lr=1.1e-2, dropout=0.3,
                 dropout_hidden=0.2, dropout_input=0.2, dropout_embed=0.05, weight_decay=0.05, epochs=10.0),
    "transformer": dict(n_embd=128, n_layer=6, n_head=4, batch_size=16, block_size=64, lr=5e-3,
                        dropout=0.1, weight_decay=0.6, epochs=10.0),
}
CHARACTERS = {"transformer": dict(n_embd=192, n_head=6, block_size=128, lr=3e-3, weight_decay=0.1)}


@dataclass
class RunOptions:
    """The options that all scripts have in which something is trained."""
    run: str = option(None, "folder of the run (default: in runs/, named after what is trained on what)",
                      group="the run")
    resume: bool = option(False, "resume the run in --run, as it was started")
    grad_clip: float = option(1.0, "largest gradient norm")
    eval_every: int = option(None, "steps between evaluations (default: a 20th of the run; ppo.py: "
                                        "a 10th, at least 5)")
    seed: int = option(1, "of weights, batches and all other random draws", at_least=0, below=2 ** 62)
    device: str = option("auto", "auto: cuda, then mps, then cpu; or a torch device")
    dtype: str = option("auto", "of matmuls, weights are float32; auto: bfloat16 where the hardware has it",
                        choices=["auto", "float32", "bfloat16"])


@dataclass
class Config(RunOptions):
    """Train an RNN, an LSTM or a Transformer by hand, on an embedded language, a corpus or a file."""
    script = "python train.py"
    model: str = option("lstm", "which of the models", choices=list(MODELS))
    data: str = option("finance", f"{', '.join(data.CORPORA)}, or the path of a text file or a folder")
    tokenizer: str = option("word", "words (capitals become small, numbers N), characters, or GPT-2's pieces",
                            choices=["word", "char", "gpt2"])
    also: list[str] = option([], "other corpora to log the perplexity of")
    search: int = option(None, "try N random configurations within --minutes; what you type is held fixed")
    epochs: float = option(None, "passes over the training text")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    minutes: float = option(None, "instead: plan as many steps as fit, after the first 20")
    warmup_steps: int = option(100, "steps of linear warm-up, however short the run", at_least=0)
    compile: bool = option(False, "torch.compile the Transformer's layers, on a GPU (a CPU has kernels)")
    log_every: int = option(50, "steps between rows of log.csv")
    sample: bool = option(True, "print a line that the model writes at every evaluation")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory (Transformer only)")
    batch_size: int = option(None, "rows of a batch", group="by model and corpus (the defaults are below)")
    block_size: int = option(None, "tokens of a row: as far as back-propagation, or a Transformer, goes")
    lr: float = option(None, "highest learning rate")
    n_layer: int = option(None, "layers")
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "width")
    n_hidden: int = option(None, "width of lower recurrent layers (n_embd), or of the MLP (3 n_embd)")
    dropout: float = option(None, "after the last recurrent layer, or half a layer", at_least=0, below=1)
    dropout_hidden: float = option(None, "between recurrent layers", at_least=0, below=1)
    dropout_input: float = option(None, "on the embedded input", at_least=0, below=1)
    dropout_embed: float = option(None, "of words of the vocabulary", at_least=0, below=1)
    weight_decay: float = option(None, "AdamW's, on matrices", at_least=0)


# ---------------------------------------------------------------------------------------- the parts of a step

def step_seed(seed, step, rank=0):
    """The number that a step begins its random draws with: no random state is ever saved, and a resumed run
    draws what an uninterrupted one would have drawn. 32 bits, because a CPU's generator keeps no more."""
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
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=fused)


def map_state(f, *states):
    """f of each tensor of a recurrent state, or of those in the same place of several; None of none."""
    if states[0] is None:
        return None
    if isinstance(states[0], torch.Tensor):
        return f(*states)
    return [map_state(f, *parts) for parts in zip(*states)]


def begin_texts(state, x, eos, seed, step):
    """Half of the rows of x [B, T] that start with <eos> start from a zero state, as texts do in sample.py
    and eval.py. Drawn for the rows of all processes together."""
    drawn = torch.from_numpy(np.random.default_rng((seed, step)).random(len(x)) < 0.5)
    keep = (x[:, 0] != eos) | ~drawn                                        # [B]
    return map_state(lambda s: s * own_rows(keep, s.device)[:, None], state)


def clip_grad_norm(parameters, limit):
    """Scale the gradients so that their common norm is at most limit; -> the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()    # full: of a sharded model


# ----------------------------------------------------------------------------------------------- the training

# tokens of a split that are read at most (IMDB's has 7 million)
WHILE_TRAINING, AT_THE_END = 100_000, 300_000
EXACT = 100_000             # at the end, a recurrent model reads a text of up to so many tokens in one piece


def train(config, model, tokenizer, batches, evaluation, steps, device, dtype, checkpoint=None, prompt=(),
          warmup_steps=0, **kept):
    """Train a model, into the folder config.run; -> its Run. evaluation(): figures for log.csv; its
    "val_loss" decides which weights are the best. steps: inf where --minutes plans them. checkpoint: of the
    run that is resumed; the model has its weights. prompt: what a language model continues at evaluations.
    kept: what else checkpoints hold."""
    # with one process, own_rows(x) is x.to(device), everyone(x) is [x], and RANK is 0

    # 5 optimizer
    optimizer = configure_optimizer(model, config.lr, config.weight_decay)

    # 6 resume
    state = None                                             # of a recurrent model, carried from step to step
    if checkpoint:
        load_optimizer(optimizer, checkpoint["optimizer"])
        state = map_state(lambda rows: own_rows(rows, device), checkpoint["state"])
    sharded = hasattr(next(model.parameters()), "full_tensor")      # finetune.py --shard
    ddp_model = model if WORLD == 1 or sharded else torch.nn.parallel.DistributedDataParallel(model)

    # 7 loop
    model.train()
    with Run(config, steps, batches, checkpoint) as run:
        if checkpoint:
            checkpoint.clear()                                      # its memory is needed
        while True:
            # evaluate, log, save
            if run.steps == math.inf and run.step == MEASURED:
                run.plan()
            if run.due(run.eval_every):
                scores = everyone(evaluation() if RANK == 0 or sharded else None)[0]
                run.check_finite(validation_loss=scores["val_loss"])
                row = run.log(**scores)
                if run.step:
                    better = run.save(model, tokenizer, optimizer, state, scores["val_loss"], **kept)
                    shown = [f"{name} {value:.2f}" for name, value in scores.items() if name != "val_loss"]
                    data.live(f"{run}  loss {row['train_loss']:.3f}  {'  '.join(shown)}{' *' * better}", "\n")
                    if config.sample and RANK == 0 and not sharded:
                        data.live("    " + sample_line(model, tokenizer, prompt, config.seed), "\n")
            elif run.due(config.log_every):
                run.log()
            if run.stopping:                        # without an evaluation: nothing differs after a resume
                run.leave(model, tokenizer, optimizer, state, **kept)
            if run.step == run.steps:
                break

            # one step
            started = time.perf_counter()
            torch.manual_seed(step_seed(config.seed, run.step, RANK))       # of dropout
            lr = get_lr(run.step, run.steps, config.lr, warmup_steps)
            set_lr(optimizer, lr)
            if not model.recurrent or batches.is_epoch_start(run.step):
                state = None                                    # a recurrent state is carried within an epoch
            x, y = batches.batch(run.step)                          # [B, T] each, y one token later
            if state is not None:
                state = begin_texts(state, x, tokenizer.eos, config.seed, run.step)
            x, y, loss = own_rows(x, device), own_rows(y, device), 0.0
            for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
                with autocast(device, dtype):
                    part, state = ddp_model(x_part, state, targets=y_part)  # mean nats per token
                part = part / config.accumulate
                part.backward()
                loss += part.item()
            state = map_state(torch.Tensor.detach, state)       # truncated BPTT: values stay, gradients stop
            grad_norm = clip_grad_norm(model.parameters(), config.grad_clip)
            run.check_finite(loss=loss, gradient_norm=grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.add(time.perf_counter() - started, loss, lr=lr, grad_norm=grad_norm)
            data.live(f"{run}  loss {loss:.3f}  {run.tokens_per_second:,.0f} tokens/s")
    return run


def pretrain(config, corpora, device, dtype, checkpoint=None):
    """Train a model from random weights, into the folder config.run; -> what its result.json holds.
    corpora["valid"] is the corpus (without a test split in a trial of a search), the others are --also."""
    # 4 model
    corpus, tokenizer = corpora["valid"], corpora["valid"].tokenizer
    torch.manual_seed(config.seed)
    sizes = model_config(config, tokenizer.vocab_size)
    model = build_model(config.model, sizes, checkpoint and checkpoint["model"]).to(device)
    if config.compile:
        compile_layers(model, device)
    check_rows(config, model)
    batches = data.batches_of(model, corpus.ids["train"], config.batch_size, config.block_size, config.seed)
    texts = {name: prepend_eos(tokenizer, c.ids["valid"][:WHILE_TRAINING]) for name, c in corpora.items()}
    steps = config.steps or math.inf
    if config.epochs:
        steps = max(1, round(config.epochs * batches.steps_per_epoch))

    # 5 to 7
    data.live(f"{config.model} on {config.data}: {count_parameters(model):,} parameters, "
              f"{len(corpus.ids['train']):,} training tokens, {device.type} {dtype_name(dtype)}"
              f"{f' x {WORLD}' if WORLD > 1 else ''}{how_computed(device)}, {config.run}", "\n")
    prompt = texts["valid"][:min(9, config.block_size)].tolist()            # for the sample lines
    run = train(config, model, tokenizer, batches, lambda: evaluate(model, texts, dtype), steps, device,
                dtype, checkpoint, prompt, config.warmup_steps, fingerprint=corpus.fingerprint())
    if RANK:
        return None

    # 8 results
    result = {"val_ppl": perplexity_of(run.best), "epochs": run.steps / batches.steps_per_epoch,
              "tokens_per_second": run.tokens_per_second}
    if not config.search:
        model.load_state_dict(read_checkpoint(run.folder / "best.pt")["model"])
        result |= final_figures(model, corpus, dtype)
    result |= run.result(model, device, dtype)
    save_json(run.folder / "result.json", result)                   # last: it says that the run is complete
    return result


def final_figures(model, corpus, dtype):
    """Perplexity on the validation and test splits, up to AT_THE_END tokens of each; the floor; the share of
    <unk>. None for a test split that the corpus does not have."""
    out = {"test_ppl": None, "floor_ppl": corpus.floor.get("test"), "test_tokens": None}
    for split in [split for split in corpus.ids if split != "train"]:
        ids = prepend_eos(corpus.tokenizer, corpus.ids[split][:AT_THE_END])
        scores = perplexity(model, ids, 1 if len(ids) <= EXACT else 16, dtype=dtype)
        name = "val" if split == "valid" else split
        out |= {f"{name}_ppl": scores["ppl"], f"{name}_tokens": scores["tokens"],
                f"{name}_unknown": unknown_share(corpus.tokenizer, ids[1:])}
    return out


def how_computed(device):
    """What makes a CPU's speed: its threads, and whether a compiler was there for csrc/."""
    if device.type != "cpu":
        return ""
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return (f", {threads} threads{f' on {cores} cores: slow' * (threads > cores)}"
            f"{', no C compiler (cc, or $CC): slow' * (compile_c('decode', '-DBF16') is None)}")


def compile_layers(model, device):
    """torch.compile in place of the kernels. UserError where it does not work."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as e:                                          # no compiler, no Triton, ...: many types
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--compile does not work here: {reason}. Leave it out") from e
    for layer in model.layers:
        if type(layer) is FastDecoderLayer:
            layer.__class__ = DecoderLayer
        layer.compile()


# ------------------------------------------------------------------------------------------------- evaluation

OVERLAP, LONGEST_WINDOW = 256, 4096                 # tokens


@torch.no_grad()
def token_losses(model, ids, pieces=1, window=None, stride=None, dtype=None):
    """-log p of each of ids[1:] in nats, float64 [len(ids) - 1], without dropout; ids[0] is context only.

    A recurrent model reads the text from start to end, or, faster, in `pieces` side by side. Each piece but
    the first begins with the state after the first OVERLAP tokens of the text and reads the OVERLAP tokens
    before its own, which do not count: from zeros in mid-text a network may settle among states that it never
    meets. The Transformer reads windows of `window` tokens that advance by `stride`; only a window's last
    `stride` predictions count (all of the first window's).
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, dtype=torch.long)
    n = len(ids) - 1
    if n < 1:
        raise ValueError("at least one token is needed after the first")
    was_training, losses = model.training, []
    model.eval()
    with autocast(device, dtype):
        if model.recurrent:
            before = min(OVERLAP, n // pieces) if pieces > 1 else 0
            length = -(-(n - before) // pieces)
            padded = torch.full((2, before + pieces * length), -1)
            padded[:, :n] = torch.stack((ids[:-1], ids[1:]))
            inputs, targets = padded.unfold(1, before + length, length)     # [pieces, before + length] each
            state = model.init_state(pieces)
            if before:              # the first piece starts from zeros, the others from the beginning's state
                beginning = model(inputs[:1, :before].to(device))[1]
                states = model.init_state(1), *[beginning] * (pieces - 1)
                state = map_state(lambda *rows: torch.cat(rows), *states)
            for x, y in zip(inputs.clamp(min=0).split(256, 1), targets.split(256, 1)):
                nll, state = model(x.to(device), state, targets=y.to(device), reduction="none")
                losses.append(nll.cpu())
                data.live(f"evaluated {len(losses) * 256 * pieces:,} of {n:,} tokens")
            counted = targets >= 0                                              # not what fills the last row
            counted[1:, :before] = False
            losses = [torch.cat(losses, 1)[counted]]
        else:
            window = min(window or min(model.config.block_size, LONGEST_WINDOW), n)
            stride = min(stride or max(1, window // 2), window)
            ends = torch.tensor([*range(window, n, stride), n])                # of the windows' targets
            new = ends.diff(prepend=torch.zeros(1, dtype=torch.long))           # what no earlier one predicts
            for end, n_new in zip(ends.split(32), new.split(32)):
                at = end[:, None] - window + torch.arange(window)             # [32, window]
                y = ids[at + 1].masked_fill(at < (end - n_new)[:, None], -1)
                nll = model(ids[at].to(device), targets=y.to(device), reduction="none")[0].cpu()
                losses.append(nll[y >= 0])
                data.live(f"evaluated {int(end[-1]):,} of {n:,} tokens")
    model.train(was_training)
    data.live("")
    return torch.cat(losses).double()


def perplexity_of(nats):
    """e^nats; what is too large for a number stays one."""
    return math.exp(min(nats, 700))


def perplexity(model, ids, pieces=1, window=None, stride=None, dtype=None):
    """The mean of token_losses: -> {"nll": nats per token, "ppl": perplexity, "tokens": how many}."""
    losses = token_losses(model, ids, pieces, window, stride, dtype)
    nll = losses.mean().item()
    return {"nll": nll, "ppl": perplexity_of(nll), "tokens": len(losses)}


def evaluate(model, texts, dtype):
    """Figures on texts {name: ids}, for log.csv. Recurrent models read up to 16 pieces side by side."""
    scores = {name: perplexity(model, ids, max(1, min(16, len(ids) // 1000)), dtype=dtype)
              for name, ids in texts.items()}
    valid = scores.pop("valid")
    others = {f"ppl_{name}": each["ppl"] for name, each in scores.items()}
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


def warn_of_unknown(share, what):
    """Say what flatters a perplexity."""
    if share > 0.05:
        data.live(f"{share:.0%} of {what} is <unk>, which is easy to predict and flatters every perplexity: "
                  "train with --tokenizer char or gpt2", "\n")


# ----------------------------------------------------------------------------------- a training in its folder

MEASURED, WARMING_UP = 20, 5        # --minutes plans after 20 steps, by their speed without the first 5


class NotFinite(UserError):
    """The loss or the gradient has left the finite numbers."""


class Run:
    """A training in its folder: how far it is, its clock, log.csv, last.pt and best.pt. Of several processes,
    the first one writes. Row k of log.csv shows the state after k steps: its lr and grad_norm are those of
    step k - 1. Ctrl-C, or a polite kill, sets `stopping`, which the loop reads between two steps; a second
    one does not wait."""
    KEPT = ("step", "steps", "evaluations", "seconds", "step_seconds", "warming_up", "best", "best_step",
            "rows", "logged", "losses", "metrics")

    def __init__(self, config, steps, batches=None, checkpoint=None, evaluations=20):
        self.config, self.folder, self.batches = config, Path(config.run), batches
        self.steps, self.evaluations = steps, evaluations           # steps inf: not planned yet
        self.step, self.seconds = 0, 0.0
        self.step_seconds, self.warming_up = 0.0, 0.0               # of all training steps; of the first ones
        self.best, self.best_step = math.inf, -1                    # the lowest validation loss so far
        self.rows, self.logged = [], -1                             # of log.csv; the step of the last one
        self.losses, self.metrics = [], {}                          # since the last row; of the last step
        self.signalled = self.stopping = False                      # this process; all of several, together
        if checkpoint:
            vars(self).update(checkpoint["run"])
            if checkpoint.get("extended"):
                self.extend(steps)
            if not (self.folder / "best.pt").exists():
                self.best = math.inf                                # the next evaluation is the best so far
            write_csv(self.folder / "log.csv", self.rows)
        self.started = time.perf_counter() - self.seconds

    def extend(self, steps):
        """Plan more steps for a run that resumes."""
        if steps == math.inf and self.steps < math.inf:             # --minutes, at the speed so far
            steps = int(60 * self.config.minutes / self.seconds * self.step)
        if steps <= self.steps < math.inf:
            raise UserError(f"{self.folder} was planned for {self.steps} steps; to extend it, give more than "
                            f"these ({steps} is what you gave)")
        data.live(f"from {self.steps} to {steps} steps, and the learning rate's schedule with it", "\n")
        self.steps = steps
        (self.folder / "result.json").unlink(missing_ok=True)       # the run is not complete any more

    def plan(self):
        """--minutes as a number of steps: as many as fit beside the evaluations (2 to 20, a tenth of the
        time; the final figures on the test split come on top)."""
        step, every = (self.step_seconds - self.warming_up) / (MEASURED - WARMING_UP), self.config.eval_every
        left, evaluating = 0.98 * 60 * self.config.minutes - self.seconds, self.rows[0]["seconds"]
        evaluations = max(2, min(20, int(0.1 * left / evaluating)))
        steps = left / (step + evaluating / every) if every else (left - evaluations * evaluating) / step
        self.steps, self.evaluations = everyone((self.step + max(1, int(steps)), evaluations))[0]
        data.live(f"{self.config.minutes:g} minutes are {self.steps} steps, "
                  f"{self.steps / self.batches.steps_per_epoch:.1f} epochs", "\n")

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():   # another one has no signals
            for s in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
                if s and not (s.name == "SIGHUP" and signal.getsignal(s) is signal.SIG_IGN):        # nohup
                    self.handlers[s] = signal.signal(s, self.request_stop)
        return self

    def request_stop(self, *_):
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled, self.stopping = True, WORLD == 1
        data.live("stopping when this step is complete and saved; Ctrl-C again does not wait", "\n")

    def __exit__(self, kind, error, _):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if WORLD > 1 and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"at step {self.step} another process of this job was gone, or this one failed "
                            f"({str(error).partition(chr(10))[0]}). {self.resume_hint()}") from error

    def due(self, every):
        """True every `every` steps and at the last one, once; not while stopping."""
        now = self.step % every == 0 or self.step == self.steps
        return now and self.step != self.logged and not self.stopping

    def add(self, seconds, loss=None, **metrics):
        """One more step is done, with this loss in this process."""
        self.step, self.metrics = self.step + 1, metrics
        self.seconds = time.perf_counter() - self.started
        self.step_seconds += seconds
        if self.step == WARMING_UP:
            self.warming_up = self.step_seconds
        losses, signals = zip(*everyone((loss, self.signalled)))
        self.stopping = any(signals)
        if loss is not None:
            self.losses.append(sum(losses) / WORLD)

    @property
    def eval_every(self):
        """Steps between evaluations: inf, none but the first, until there is a plan."""
        planned = -(-self.steps // self.evaluations) if self.steps < math.inf else math.inf
        return self.config.eval_every or planned

    @property
    def tokens_per_second(self):
        return self.step * self.batches.tokens / max(self.step_seconds, 1e-9)

    def log(self, **scores):
        """A row of log.csv, {column: value}, with the scores of an evaluation; -> the row."""
        self.seconds, self.stopping = time.perf_counter() - self.started, any(everyone(self.signalled))
        row = {"step": self.step, "seconds": self.seconds}
        if self.batches:
            row |= {"epoch": self.step / self.batches.steps_per_epoch,
                    "tokens": self.step * self.batches.tokens, "tokens_per_second": self.tokens_per_second}
        if self.losses:
            row["train_loss"] = sum(self.losses) / len(self.losses)
        row |= self.metrics | scores
        known = {name for row in self.rows for name in row}
        self.rows.append(row)
        write_csv(self.folder / "log.csv", self.rows, appended=row.keys() <= known)
        self.logged, self.losses = self.step, []
        return row

    def save(self, model, tokenizer, optimizer, state=None, loss=None, **more):
        """last.pt; with a validation loss, best.pt, too, if it is the lowest so far. -> whether it is."""
        better = loss is not None and loss < self.best
        if better:
            self.best, self.best_step = loss, self.step
        weights, moments = gather(model.state_dict()), gather(optimizer.state_dict())
        state = map_state(lambda *rows: torch.cat(rows), *everyone(map_state(torch.Tensor.cpu, state)))
        if RANK == 0:
            best = {"kind": kind_of(model), "config": asdict(model.config), "model": weights,
                    "tokenizer": tokenizer.state(), "step": self.step}
            last = best | {"optimizer": moments, "state": state, "options": asdict(self.config),
                           "run": {name: getattr(self, name) for name in self.KEPT}} | more
            if better:
                write_atomically(self.folder / "best.pt", lambda f: torch.save(best, f))
            write_atomically(self.folder / "last.pt", lambda f: torch.save(last, f))
        return better

    def resume_hint(self):
        """What is kept, and what to type to resume."""
        if not (self.folder / "last.pt").exists():
            return "Nothing was saved yet; the same command begins again"
        if getattr(self.config, "search", None):
            return "Resume with: the same search again; finished trainings are kept"
        command = self.config.script if WORLD == 1 else "the same torchrun command and"
        return (f"The last checkpoint is kept in {self.folder}. Resume with: {command} --resume --run "
                f"{data.quoted(self.folder)}")

    def leave(self, *what, **kept):
        """End the process, with last.pt as it is."""
        if self.step:
            self.save(*what, **kept)
        data.live(f"stopped at step {self.step}. {self.resume_hint()}", "\n")
        leave_processes()
        raise SystemExit(130)

    def check_finite(self, **values):
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(f"the {name.replace('_', ' ')} is not finite at step {self.step} ({value}). "
                                f"What was saved is kept in {self.folder}; train anew with a smaller --lr")

    def result(self, model, device, dtype):
        """What every result.json holds."""
        return {"model": kind_of(model), "data": self.config.data, "params": count_parameters(model),
                "steps": self.steps, "best_step": self.best_step, "seconds": self.seconds,
                "dtype": dtype_name(dtype), "seed": self.config.seed, **environment(device),
                "options": asdict(self.config)}

    def __str__(self):
        if self.steps == math.inf:
            return f"step {self.step}, measuring the speed"
        left = self.seconds / max(1, self.step) * (self.steps - self.step)
        return f"step {self.step}/{self.steps}  {self.seconds:.0f} s, {left:.0f} s left"


def write_csv(path, rows, appended=False):
    """Rows, {column: value}, as a file; appended: only the last, to a file that has its columns."""
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


def environment(device):
    """What a result was computed with; the commit of this code is None where git has none."""
    found = re.search("model name\\s*: (.+)", CPU)
    processor = found[1] if found else platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    git = "git describe --always --dirty --exclude=*"
    commit = subprocess.run(git, shell=True, cwd=data.HERE, capture_output=True, text=True).stdout.strip()
    return {"device": device.type, "torch": torch.__version__, "processor": processor,
            "commit": commit or None}


# ------------------------------------------------------------------ several processes (one laptop: skip this)

def join_processes(device):
    """Under torchrun: join the other processes. -> the device of this one."""
    if WORLD == 1:
        return device
    device = torch.device("cpu") if device.type == "mps" else device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # the others wait while one encodes a text
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return device


def leave_processes():
    if WORLD > 1:
        dist.barrier()                                              # torchrun ends those that are left behind
        dist.destroy_process_group()


def everyone(value=None):
    """The values of all processes, in their order; they wait for each other."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def own_rows(rows, device):
    """The rows of a batch, or of its state, that belong to this process."""
    return rows.chunk(WORLD)[RANK].to(device)


def gather(state):
    """A state dict, with tensors that are split across processes in one piece on the first one's CPU."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    complete = state.full_tensor()                                  # all call it
    return None if RANK else complete.cpu()


def shard_as(value, parameter):
    """This process's part of the first one's tensor, if a parameter is split; else the tensor."""
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


def draw(config, given, rng):
    """One random configuration, as a dict of options. What the command line says is not drawn."""
    drawn = {name: rng.choice(space) if isinstance(space, list) else
             float(f"{space[0] * (space[1] / space[0]) ** rng.random():.2g}")
             for name, space in SEARCH_SPACE[config.model].items()}
    drawn |= {name: getattr(config, name) for name in drawn if name in given}
    return drawn | {"n_hidden": (3 if config.model == "transformer" else 1) * drawn["n_embd"]}


def search(config, given, corpora, device, dtype):
    """Successive halving (Jamieson & Talwalkar 2016), by thirds: all configurations train for a short time
    each, the best third again for three times as long, and so on, every rung for an equal share of --minutes.
    Trial 0 has the defaults. Each training has a schedule of its own: a half-finished one says little. Only
    the validation split is looked at. trials.csv has a row for each training; none is repeated."""
    rng, table, rows, finished = random.Random(config.seed), Path(config.run, "trials.csv"), [], []
    drawn = [draw(config, given, rng) for _ in range(config.search)]
    trials = [{name: getattr(config, name) for name in drawn[0]}, *drawn]
    alive, sizes = range(len(trials)), [len(trials)]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 3))
    if table.exists():
        finished = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    for rung, size in enumerate(sizes, 1):
        minutes, scores = config.minutes / len(sizes) / size, {}
        for i in alive:
            row = {"trial": i, "rung": rung, "model": config.model, "data": config.data, "minutes": minutes}
            row = {name: str(value) for name, value in (row | trials[i]).items()}
            if len(rows) < len(finished):
                if not row.items() <= finished[len(rows)].items():
                    raise UserError(f"{table} is of another search; choose another folder with --run")
                rows.append(finished[len(rows)])
            else:
                one = replace(config, **trials[i], minutes=minutes, sample=False,
                              run=f"{config.run}/trial-{i}-rung-{rung}")
                rows.append(row | run_trial(one, corpora, device, dtype))
                write_csv(table, rows, appended=len(rows) > 1)
            scores[i] = float(rows[-1]["val_ppl"])
            print(f"rung {rung} of {len(sizes)}, trial {i}: validation perplexity {scores[i]:.1f}")
        alive = sorted(alive, key=scores.get)[:math.ceil(size / 3)]
    if not math.isfinite(scores[alive[0]]):
        raise UserError("every trial that was left diverged; search with another --seed, or hold --lr fixed")
    fixed = given - {"model", "data", "minutes", "search", "run", "also", "resume", "sample", "compile"}
    chosen = trials[alive[0]] | {name: getattr(config, name) for name in sorted(fixed)}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    print(f"all trainings are in {table}. The best, validation perplexity {scores[alive[0]]:.2f}:\n"
          f"{config.script} --model {config.model} --data {data.quoted(config.data)} --minutes "
          f"{config.minutes:g} {flags}")


def run_trial(config, corpora, device, dtype):
    """One training of a search; its weights are not kept. -> its figures, inf where it diverged."""
    try:
        result = pretrain(config, corpora, device, dtype)
    except NotFinite:
        result = {"params": "", "steps": 0, "seconds": 0.0, "val_ppl": math.inf}
    for file in Path(config.run).glob("*.pt"):
        file.unlink()
    return {"params": result["params"], "tokens": result["steps"] * config.batch_size * config.block_size,
            "seconds": f"{result['seconds']:.1f}", "val_ppl": f"{result['val_ppl']:.3f}"}


# ----------------------------------------------------------------------------------------------- command line

def defaults_text():
    """The tables at the top of this file, for --help."""
    tables = {"embedded languages": DEFAULTS,
              "real text": {model: DEFAULTS[model] | d for model, d in REAL_TEXT.items()},
              "its characters, what differs": CHARACTERS}
    return "\n".join(f"defaults for {title}:\n" + "\n".join(
        f"  {model}: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in values.items())
        for model, values in table.items()) for title, table in tables.items())


def resolve_defaults(config):
    own = {f.name: f.default for f in fields(MODELS[config.model][1]) if f.name.startswith("dropout")}
    defaults = own | DEFAULTS[config.model]
    if config.data not in data.DOMAINS:
        defaults |= REAL_TEXT[config.model]
        defaults |= CHARACTERS.get(config.model, {}) if config.tokenizer == "char" else {}
    if config.epochs or config.steps or config.minutes:
        defaults.pop("epochs")
    if config.model == "transformer" and config.n_embd and config.n_embd % (2 * defaults["n_head"]):
        fitting = [n for n in range(2, defaults["n_head"]) if config.n_embd % (2 * n) == 0]
        defaults["n_head"] = max([n for n in fitting if config.n_embd // n >= 16], default=defaults["n_head"])
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


# Options that may change on --resume: the length, which extends the run; how it is computed and shown; the
# places of what it reads, whose contents are checked; the learning rate.
LENGTHS = {"steps", "epochs", "minutes"}
SHOWN = {"run", "resume", "sample", "log_every", "eval_every", "device", "dtype", "compile", "shard"}
ANEW = LENGTHS | SHOWN | {"data", "base", "scorer", "also", "lr"}


def resume_or_refuse(config, given, files=("last.pt", "result.json")):
    """-> (checkpoint, the options that its run was started with) with --resume, else (None, config).
    UserError if the run is not one of this script, or was started with other options, or is there already."""
    folder, script = Path(config.run), config.script
    if not config.resume:
        if RANK == 0 and any((folder / file).exists() for file in files):
            raise UserError(f"{folder} already holds a run or weights. Resume it: {script} --resume --run "
                            f"{data.quoted(folder)}; or choose another folder with --run")
        return None, config
    checkpoint = read_checkpoint(folder / "last.pt", script, mmap=getattr(config, "shard", False))
    # an option that is newer than the run has its default
    saved, here = asdict(type(config)()) | checkpoint.get("options", {}), asdict(config)
    if saved.keys() != here.keys() or not {"run", "state", "optimizer", "options"} <= checkpoint.keys():
        raise UserError(f"{folder} is not a run of {script}, or one of another version, and is not resumed")
    check_same(saved, here, given - ANEW, folder)
    checkpoint["extended"] = bool(given & LENGTHS)
    anew = {"run"} | given & ANEW | (LENGTHS & here.keys() if given & LENGTHS else set())
    return checkpoint, replace(config, **saved | {name: here[name] for name in anew})


def check_same(saved, here, names, run):
    for name in sorted(names):
        if here[name] != saved[name]:
            raise UserError(f"the run in {run} was started with {name} {saved[name]}, not {here[name]}: "
                            "leave it out, or choose another folder with --run")


def check_text(corpus, checkpoint=None, run=""):
    for split, ids in corpus.ids.items():
        if len(ids) < 2 and split != "train":
            raise UserError(f"{corpus.name} is too short: its {split} part holds {len(ids)} tokens")
    if checkpoint and checkpoint.get("fingerprint") != corpus.fingerprint():
        raise UserError(f"{corpus.name} is no longer the text that the run in {run} was started with; "
                        "restore it, or start a new run with --run")


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
    if len(given & LENGTHS) > 1:
        raise UserError("--epochs, --steps and --minutes exclude each other; give one of them")
    if config.search and (not config.minutes or "n_hidden" in given or WORLD > 1):
        raise UserError("--search needs --minutes, the time for all trials together; it runs in one process, "
                        "and draws --n-hidden with --n-embd")
    if config.search and config.model not in SEARCH_SPACE:
        raise UserError(f"--search cannot draw for {config.model}; give it a line in SEARCH_SPACE")
    default = f"{'search-' if config.search else ''}{config.model}-{data.file_name(config.data)}"
    config.run = config.run or f"runs/{default}"
    checkpoint, config = resume_or_refuse(config, given)
    if config.compile and config.model != "transformer":
        raise UserError("--compile is for --model transformer; a recurrent layer has a loop of its own")
    if not checkpoint:
        resolve_defaults(config)
    keep_memory()

    # 2 device and processes
    device = join_processes(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)

    # 3 data
    tokenizer = tokenizer_from(checkpoint["tokenizer"]) if checkpoint else config.tokenizer
    splits = ("train", "valid") if config.search else ("train", "valid", "test")
    if RANK:
        everyone()                                          # the first process downloads and encodes for all
    corpus = data.load(config.data, tokenizer, splits)
    check_text(corpus, checkpoint, config.run)
    corpora = {"valid": corpus}
    for name in config.also:
        whole = "valid" if name in data.CORPORA else "all"              # your own has no split to spare
        also = data.load(name, corpus.tokenizer, (whole,))
        also.ids["valid"] = also.ids.pop(whole)
        check_text(also)
        corpora[name if name != "valid" else "./valid"] = also
    if RANK == 0:
        everyone()
    share = unknown_share(corpus.tokenizer, corpus.ids["valid"])
    warn_of_unknown(share, f"the validation split of {config.data}")
    if config.search:
        return search(config, given, corpora, device, dtype)
    result = pretrain(config, corpora, device, dtype, checkpoint)
    if RANK == 0:
        cut = f" (of its first {AT_THE_END:,} tokens)" * (result["test_tokens"] == AT_THE_END)
        figures = (f", test {result['test_ppl']:.2f}{cut}" if result["test_ppl"] else
                   f" ({math.log(result['val_ppl']):.4f} nats per token), no test split")
        figures += f", floor {result['floor_ppl']:.2f}" if result["floor_ppl"] else ""
        figures += f", {result['val_unknown']:.1%} <unk>" if result["val_unknown"] else ""
        print(f"{config.model} on {config.data}: {result['params']:,} parameters, validation perplexity "
              f"{result['val_ppl']:.2f}{figures}, {result['seconds']:.0f} s at "
              f"{result['tokens_per_second']:,.0f} tokens/s")
        print(f"written to {config.run}. Next: python sample.py --run {data.quoted(config.run)}")
    leave_processes()


if __name__ == "__main__":
    data.run_main(main)
