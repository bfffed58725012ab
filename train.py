"""Train a language model: one loop for the RNN, the LSTM, the Transformer and, from finetune.py, Qwen2.

    python train.py --model lstm                             # the embedded finance language, about a minute
    python train.py --model lstm --data ptb --minutes 15     # the Penn Treebank in the time you have
    python train.py --model transformer --data my.txt --tokenizer gpt2 --epochs 3 --run runs/mine
    python train.py --resume --run runs/mine                 # go on after a kill, bit for bit

The loss is the mean negative log-likelihood in nats per token; perplexity is its exponential. The optimizer is AdamW
on float32 weights (matmuls in bfloat16 where the hardware has them), gradients clipped by their norm, the learning
rate warmed up linearly and then lowered along half a cosine.

A run is a folder: last.pt (all that is needed to go on), best.pt (the weights with the lowest validation loss),
log.csv (a row for every log step and evaluation), result.json (the final figures). Every file is written under
another name first and then renamed, so a kill at any moment leaves the previous one whole.
"""
import argparse
import csv
import io
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import data
from data import UserError
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from transformer import Transformer, TransformerConfig

MODELS = {"rnn": (RNNLM, RNNConfig), "lstm": (LSTMLM, LSTMConfig), "transformer": (Transformer, TransformerConfig)}

# Defaults by model: for the embedded languages, then what real text (the corpora, your own file) changes.
DEFAULTS = {
    "rnn": dict(n_embd=192, n_hidden=192, n_layer=1, batch_size=32, block_size=32, lr=3e-3, epochs=3.0),
    "lstm": dict(n_embd=192, n_hidden=192, n_layer=1, batch_size=32, block_size=64, lr=6e-3, epochs=3.0),
    "transformer": dict(n_embd=128, n_hidden=384, n_layer=4, n_head=4, batch_size=16, block_size=128, lr=2e-3, epochs=2.0),
}
REAL_TEXT = {
    "rnn": dict(n_embd=384, n_hidden=384, n_layer=1, batch_size=32, block_size=35, lr=4e-3, dropout=0.3,
                dropout_input=0.2, dropout_embed=0.05, weight_decay=0.02, epochs=10.0),
    "lstm": dict(n_embd=384, n_hidden=384, n_layer=2, batch_size=32, block_size=35, lr=6e-3, dropout=0.3,
                 dropout_hidden=0.2, dropout_input=0.2, dropout_embed=0.05, weight_decay=0.02, epochs=10.0),
    "transformer": dict(n_embd=256, n_hidden=768, n_layer=4, n_head=4, batch_size=16, block_size=128, lr=3e-3,
                        dropout=0.2, weight_decay=0.1, epochs=10.0),
}


# ------------------------------------------------------------------------------------------------ devices and files

def pick_device(name="auto"):
    """`auto` is cuda, then mps, then cpu."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {name} is not available here; try --device cpu") from e
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name, device):
    """The dtype matmuls run in. `auto` is bfloat16 where the hardware multiplies it (CUDA from capability 8.0; CPUs
    with AVX512-BF16 or AMX), float32 elsewhere. Weights are float32 always."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = [getattr(torch.cpu, f, None) for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = device.type == "cpu" and any(f is not None and f() for f in flags)
    return torch.bfloat16 if fast else torch.float32


def write_atomically(path, write):
    """Call write(file) on a new file beside path, then rename it to path: path is the old file or the whole new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                    # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}). The previous files are whole: free some space "
                        f"and go on with: python train.py --resume --run {path.parent}") from e


def read_checkpoint(path, device="cpu"):
    """A checkpoint as a dict; weights_only, so a hostile file cannot run code. UserError if it is not readable."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(checkpoint, dict) or not {"model", "kind", "config", "tokenizer"} <= checkpoint.keys():
            raise ValueError("not a checkpoint of this project")
        return checkpoint
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there; train a model first, for example: python train.py --model lstm "
                        f"--run {Path(path).parent}") from e
    except Exception as e:                                  # truncated zip, hostile pickle, wrong content: many types
        raise UserError(f"{path} cannot be loaded: it is damaged or not a checkpoint of this project "
                        f"({type(e).__name__}). Delete it, and train again if there is no other") from e


def build_model(kind, config, weights=None):
    """A model of MODELS from its config as a dict, with weights if given. UserError if they do not fit."""
    try:
        model_type, config_type = MODELS[kind]
        model = model_type(config_type(**config))
        if weights is not None:
            model.load_state_dict(weights)
        return model
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"this does not make a {kind} model: {' '.join(str(e).split())[:200]}") from e


def load_run(folder, device="cpu"):
    """Open a run: -> (model in eval mode, tokenizer, config). best.pt if it is there, else last.pt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}. Train one first: python train.py --model lstm --run {folder}")
    path = folder / "best.pt"
    checkpoint = read_checkpoint(path if path.exists() else folder / "last.pt", device)
    model = build_model(checkpoint["kind"], checkpoint["config"], checkpoint["model"]).to(device).eval()
    return model, data.tokenizer_from(checkpoint["tokenizer"]), model.config


# ------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def perplexity(model, ids, rows=1, context=None, stride=None, dtype=None):
    """Mean negative log-likelihood of ids[1:], every token predicted once. ids[0] is context only (put <eos> first).

    A recurrent model reads the text with its state carried from start to end, cut into `rows` pieces side by side
    (1: exact; more: faster, and the first tokens of each piece have less context). The Transformer reads windows of
    `context` tokens that advance by `stride`, and only a window's last `stride` predictions count, so that (after the
    first window) no token is judged with less than context - stride tokens before it.
    -> {"nll": nats per token, "ppl": perplexity, "tokens": how many}. Dropout is off.
    """
    device = next(model.parameters()).device
    ids = torch.as_tensor(ids, dtype=torch.long)
    n = len(ids) - 1
    if n < 1:
        raise ValueError("perplexity needs at least one token after the first")
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None and dtype != torch.float32):
        if model.recurrent:
            length = -(-n // rows)
            targets = torch.full((rows * length,), -1)
            targets[:n] = ids[1:]
            inputs = torch.zeros(rows * length, dtype=torch.long)
            inputs[:n] = ids[:-1]
            inputs, targets = inputs.view(rows, length), targets.view(rows, length)
            state = model.init_state(rows)
            for x, y in zip(inputs.split(256, 1), targets.split(256, 1)):
                hidden, state = model(x.to(device), state)
                total += model.nll(hidden, y.to(device)).double().sum().item()
        else:
            context = min(context or model.config.block_size, n)
            stride = min(stride or max(1, context // 2), context)
            ends = list(range(context, n, stride)) + [n]            # window: inputs end - context .. end - 1
            for group in range(0, len(ends), 32):
                block = ends[group:group + 32]
                x = torch.stack([ids[e - context:e] for e in block])
                y = torch.stack([ids[e - context + 1:e + 1] for e in block])
                for row, e in enumerate(block):
                    at = group + row
                    new = e - (ends[at - 1] if at else 0)           # what no earlier window has predicted
                    y[row, :context - new] = -1
                hidden, _ = model(x.to(device))
                total += model.nll(hidden, y.to(device)).double().sum().item()
    model.train(was_training)
    return {"nll": total / n, "ppl": math.exp(min(total / n, 700)), "tokens": n}


def with_context(tokenizer, ids):
    """ids (an array) behind the end token, int64: what perplexity expects of a text that starts afresh."""
    return torch.cat([torch.tensor([tokenizer.eos]), torch.from_numpy(ids.astype("int64"))])


# ------------------------------------------------------------------------------------------------- the training loop

MEASURED = 20               # steps in which --minutes measures the speed; the learning rate never falls before


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then half a cosine down to 1 % of the peak. steps None (not planned yet): level after the
    warm-up, as the first MEASURED steps are in any case, so that --steps repeats what --minutes planned."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, MEASURED)
    progress = 0.0 if steps is None else min(1.0, max(0, step - start) / max(1, steps - start))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, lr, weight_decay):
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=lr, betas=(0.9, 0.99), fused=next(model.parameters()).device.type in ("cpu", "cuda"))


def detach(state):
    """The recurrent state without its history: back-propagation through time is truncated here."""
    if state is None or isinstance(state, torch.Tensor):
        return state if state is None else state.detach()
    return [detach(s) for s in state]


class Trainer:
    """The loop's state and the loop. What it needs beyond the arguments: a model, its batches, and a function
    evaluate() -> {"val": {"nll", "ppl", ...}, name: {...}} for the validation split and any other corpora."""

    # numbers that a checkpoint keeps beside weights, optimizer, recurrent state, random state and arguments
    KEPT = "step", "steps", "interval", "seconds", "best", "best_step", "loss_sum", "loss_steps", "eval_seconds"

    def __init__(self, args, kind, model, tokenizer, batches, evaluate, device, dtype):
        self.args, self.kind, self.model, self.tokenizer, self.batches = args, kind, model, tokenizer, batches
        self.evaluate, self.device, self.dtype = evaluate, device, dtype
        self.run = Path(args.run)
        self.optimizer = make_optimizer(model, args.lr, args.weight_decay)
        self.memory = None                                          # recurrent state, carried from batch to batch
        self.step, self.seconds, self.best, self.best_step, self.eval_seconds = 0, 0.0, math.inf, -1, 0.0
        self.steps = args.steps or (None if args.minutes else max(1, round(args.epochs * batches.steps_per_epoch)))
        self.interval = args.eval_every or -(-self.steps // 20) if self.steps else None
        self.loss_sum, self.loss_steps = 0.0, 0                     # since the last row of the log

    # ---- checkpoints

    def model_checkpoint(self):
        return {"kind": self.kind, "config": asdict(self.model.config), "model": self.model.state_dict(),
                "tokenizer": self.tokenizer.state(), "step": self.step}

    def save(self, best=False):
        if best:
            write_atomically(self.run / "best.pt", lambda f: torch.save(self.model_checkpoint(), f))
        state = {"optimizer": self.optimizer.state_dict(), "memory": self.memory, "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else None,
                 "args": {k: v for k, v in vars(self.args).items() if k not in ("resume", "run")},
                 "log_bytes": self.log_file.tell()} | {name: getattr(self, name) for name in self.KEPT}
        write_atomically(self.run / "last.pt", lambda f: torch.save(self.model_checkpoint() | state, f))

    def restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.memory = checkpoint["memory"]
        torch.set_rng_state(checkpoint["rng"].cpu())
        if checkpoint["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all([r.cpu() for r in checkpoint["cuda_rng"]])
        for name in (*self.KEPT, "log_bytes"):
            setattr(self, name, checkpoint[name])

    # ---- the log

    def open_log(self, resumed):
        path = self.run / "log.csv"
        self.columns = ["step", "epoch", "tokens", "seconds", "lr", "train_loss", "grad_norm", "tokens_per_second",
                        "val_loss", "val_ppl"] + [f"ppl_{name}" for name in self.args.also]
        self.log_file = open(path, "r+b" if resumed else "w+b")
        if resumed:
            self.log_file.truncate(self.log_bytes)                  # rows after the checkpoint will be written again
        self.log_file.seek(0, os.SEEK_END)
        if not resumed:
            self.write_row(self.columns)

    def write_row(self, row):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
        self.log_file.write(text.getvalue().encode())
        self.log_file.flush()

    def log(self, scores=None):
        """One row: the mean training loss since the last row, and the evaluation if there was one."""
        tokens = self.step * self.tokens_per_step
        row = {"step": self.step, "epoch": self.step / self.batches.steps_per_epoch, "tokens": tokens,
               "seconds": self.seconds, "lr": learning_rate(self.step, self.steps, self.args.lr, self.args.warmup),
               "train_loss": self.loss_sum / self.loss_steps if self.loss_steps else "",
               "grad_norm": getattr(self, "grad_norm", ""), "tokens_per_second": tokens / max(self.seconds, 1e-9)}
        if scores:
            row |= {"val_loss": scores["val"]["nll"], "val_ppl": scores["val"]["ppl"]}
            row |= {f"ppl_{name}": scores[name]["ppl"] for name in self.args.also}
        self.write_row([row.get(c, "") for c in self.columns])
        self.loss_sum, self.loss_steps = 0.0, 0

    def show(self, text, end="\r"):
        """The live line: rewritten in place on a terminal; elsewhere only what ends with a new line is printed."""
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
        elif end == "\n":
            print(text, file=sys.stderr, flush=True)

    # ---- the loop

    @property
    def tokens_per_step(self):
        return self.batches.batch_size * self.batches.block_size

    def train_step(self):
        """One optimizer step; -> mean loss in nats per token. UserError if the loss or the gradient is not finite."""
        if self.batches.first(self.step) or not self.model.recurrent:
            self.memory = None
        x, y = (t.to(self.device, non_blocking=True) for t in self.batches.batch(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.args.lr, self.args.warmup)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden, memory = self.model(x, self.memory)
            loss = self.model.loss(hidden, y) / y.numel()
        loss.backward()
        self.memory = detach(memory)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        loss, self.grad_norm = loss.item(), norm.item()
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            raise UserError(f"the loss is not finite at step {self.step} (loss {loss}, gradient norm {self.grad_norm}). "
                            f"The last good checkpoint is kept in {self.run}; start again with a smaller --lr")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loss_sum, self.loss_steps = self.loss_sum + loss, self.loss_steps + 1
        return loss

    def plan(self, step_seconds):
        """--minutes: from the speed of the steps so far, how many steps fit, with the evaluations (up to 20, and
        up to a tenth of the time, but at least two)."""
        left = 0.98 * self.args.minutes * 60 - self.seconds
        evaluations = max(2, min(20, int(0.1 * left / self.eval_seconds)))
        self.steps = self.step + max(1, int((left - evaluations * self.eval_seconds) / step_seconds))
        self.interval = self.args.eval_every or -(-self.steps // evaluations)
        self.show(f"{self.args.minutes:g} minutes are {self.steps} steps, {self.steps / self.batches.steps_per_epoch:.1f} "
                  f"epochs at {self.tokens_per_step / step_seconds:,.0f} tokens/s", "\n")

    def evaluate_and_log(self):
        scores = self.evaluate()
        better = scores["val"]["nll"] < self.best
        if better:
            self.best, self.best_step = scores["val"]["nll"], self.step
        self.log(scores)
        return scores, better

    def interrupt(self, *_):
        """Ctrl-C or a polite kill: stop when the step is whole. A second Ctrl-C does not wait."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def fit(self):
        """Train until the planned number of steps. Ctrl-C saves first and says how to go on."""
        self.model.train()
        self.interrupted = False
        handlers = {s: signal.signal(s, self.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.loop()
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def loop(self):
        clock, shown = time.perf_counter() - self.seconds, 0.0
        if self.step == 0:
            _, better = self.evaluate_and_log()
            self.eval_seconds = time.perf_counter() - clock
            self.save(best=better)
        started, from_step = time.perf_counter(), self.step         # what --minutes measures
        while self.steps is None or self.step < self.steps:
            if self.interrupted:
                self.save()
                self.show(f"stopped at step {self.step} and saved. Go on with: python train.py --resume --run {self.run}", "\n")
                raise SystemExit(130)
            loss = self.train_step()
            self.seconds = time.perf_counter() - clock
            if self.step == MEASURED // 4:                          # the very first steps are slower: not counted
                started, from_step = time.perf_counter(), self.step
            if self.steps is None and self.step == MEASURED:
                self.plan((time.perf_counter() - started) / (MEASURED - from_step))
            left = "" if not self.steps else f"{self.seconds / self.step * (self.steps - self.step):.0f} s left"
            line = (f"step {self.step}/{self.steps or '?'}  loss {loss:.3f}  ppl {math.exp(min(loss, 99)):.1f}  "
                    f"{self.step * self.tokens_per_step / self.seconds:,.0f} tokens/s")
            if self.seconds - shown > 0.2:
                shown = self.seconds
                self.show(f"{line}  {left}")
            if self.steps and (self.step % self.interval == 0 or self.step == self.steps):
                scores, better = self.evaluate_and_log()
                self.seconds = time.perf_counter() - clock
                self.save(best=better)
                also = "".join(f"  {n} {scores[n]['ppl']:.1f}" for n in self.args.also)
                self.show(f"{line}  val ppl {scores['val']['ppl']:.2f}{' *' if better else ''}{also}  "
                          f"{self.seconds:.0f} s, {left}", "\n")
            elif self.step % self.args.log_every == 0:
                self.log()


# ------------------------------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        description="Train an RNN, an LSTM or a Transformer, all written by hand, on an embedded language, a corpus or a file.",
        epilog="example: python train.py --model lstm --data ptb --minutes 15 --also wikitext2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", choices=list(MODELS), default="lstm")
    p.add_argument("--data", default="finance", help=f"{', '.join(data.CORPORA)}, or the path of a UTF-8 text file")
    p.add_argument("--tokenizer", choices=("word", "gpt2"), default="word")
    p.add_argument("--run", help="folder of the run (default: runs/MODEL-DATA)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --run, with the arguments it was started with")
    p.add_argument("--also", nargs="*", default=[], metavar="DATA", help="other corpora to log the perplexity of")
    how_long = p.add_mutually_exclusive_group()
    how_long.add_argument("--epochs", type=float, help="passes over the training text (default: by model)")
    how_long.add_argument("--steps", type=int, help="optimizer steps")
    how_long.add_argument("--minutes", type=float, help="measure the speed, then plan as many steps as fit")
    auto = dict(default=argparse.SUPPRESS)                  # the default depends on model and corpus: see DEFAULTS
    for name, kind in (("--batch-size", int), ("--block-size", int), ("--lr", float), ("--n-layer", int), ("--n-head", int),
                       ("--n-embd", int), ("--n-hidden", int), ("--dropout", float), ("--dropout-hidden", float),
                       ("--dropout-input", float), ("--dropout-embed", float), ("--weight-decay", float)):
        p.add_argument(name, type=kind, help="by model and corpus", **auto)
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--eval-every", type=int, help="steps between evaluations (default: a 20th of the run)")
    p.add_argument("--log-every", type=int, default=50, help="steps between rows of log.csv")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the matmuls; weights are float32")
    return p


def arguments(argv=None):
    p = parser()
    args = p.parse_args(argv)
    for name in ("epochs", "steps", "minutes", "batch_size", "block_size", "lr", "n_layer", "n_head", "n_embd", "n_hidden",
                 "eval_every", "log_every", "clip"):
        if (value := getattr(args, name, None)) is not None and not value > 0:
            p.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name in ("dropout", "dropout_hidden", "dropout_input", "dropout_embed"):
        if not 0 <= getattr(args, name, 0) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 0 and below 1")
    return args


def default_run(args):
    return f"runs/{args.model}-{Path(args.data).stem}"


def fill_defaults(args):
    """Settle what depends on model and corpus."""
    small = args.data in data.DOMAINS
    defaults = dict(weight_decay=0.01) | DEFAULTS[args.model] | ({} if small else REAL_TEXT[args.model])
    if args.model != "transformer":
        defaults |= {k: defaults.get(k, 0.0) for k in ("dropout_hidden", "dropout_input", "dropout_embed")}
    defaults.setdefault("dropout", 0.0)
    if args.epochs or args.steps or args.minutes:
        defaults.pop("epochs")
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.run = args.run or default_run(args)
    return args


def model_config(args, vocab_size):
    """The arguments that describe the model, as the dict its config is made of; UserError for one it does not have."""
    fields = MODELS[args.model][1].__dataclass_fields__
    config = {k: getattr(args, k) for k in fields if hasattr(args, k)} | {"vocab_size": vocab_size}
    if args.model == "transformer":
        config["n_kv_head"] = args.n_head
    for name in ("n_head", "dropout_hidden", "dropout_input", "dropout_embed"):
        if hasattr(args, name) and name not in fields:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --model {args.model}; leave it out")
    return config


def evaluator(model, corpora, tokenizer, dtype):
    """-> evaluate(): the validation perplexity of every corpus, quickly: recurrent models read 16 pieces side by side."""
    ids = {name: with_context(tokenizer, c.ids["valid"]) for name, c in corpora.items()}
    return lambda: {name: perplexity(model, i, rows=max(1, min(16, len(i) // 500)), dtype=dtype,
                                     stride=None if model.recurrent else model.config.block_size // 2) for name, i in ids.items()}


def finish(trainer, corpus, device, dtype):
    """The final figures from the best weights, state carried over the whole split, into result.json."""
    args = trainer.args
    model, tokenizer, _ = load_run(trainer.run, device)
    scores = {s: perplexity(model, with_context(tokenizer, corpus.ids[s]), dtype=dtype) for s in ("valid", "test")}
    result = {"model": args.model, "data": args.data, "params": sum(p.numel() for p in model.parameters()),
              "val_ppl": scores["valid"]["ppl"], "test_ppl": scores["test"]["ppl"], "floor_ppl": corpus.floor["test"],
              "tokens_per_second": trainer.step * trainer.tokens_per_step / trainer.seconds, "seconds": trainer.seconds,
              "epochs": trainer.step / trainer.batches.steps_per_epoch, "dtype": str(dtype).removeprefix("torch."),
              "device": device.type, "seed": args.seed, "steps": trainer.step, "best_step": trainer.best_step,
              "test_tokens": scores["test"]["tokens"], "args": {k: v for k, v in vars(args).items() if k != "resume"}}
    write_atomically(trainer.run / "result.json", lambda f: f.write((json.dumps(result, indent=1) + "\n").encode()))
    floor = f", floor {corpus.floor['test']:.2f}" if corpus.floor["test"] else ""
    print(f"{args.model} on {args.data}: {result['params']:,} parameters, validation perplexity {result['val_ppl']:.2f}, "
          f"test {result['test_ppl']:.2f}{floor}, {result['seconds']:.0f} s at {result['tokens_per_second']:,.0f} tokens/s")
    print(f"written to {trainer.run}. Next: python sample.py --run {trainer.run}")


def resumed_arguments(args):
    """The checkpoint in args.run and the arguments it was started with; UserError if the command line says others."""
    if args.run is None:
        args.run = default_run(args)
    checkpoint = read_checkpoint(Path(args.run) / "last.pt")
    if "optimizer" not in checkpoint:
        raise UserError(f"{args.run}/last.pt holds weights only and cannot be resumed")
    p = parser()
    for name, value in checkpoint["args"].items():
        now = getattr(args, name, None)
        if now not in (None, p.get_default(name), value):
            raise UserError(f"the run in {args.run} was started with {name} {value}, not {now}. Resume it without other "
                            "arguments, or choose another folder with --run")
        setattr(args, name, value)
    return args, checkpoint


def main(argv=None):
    args, checkpoint = arguments(argv), None
    if args.resume:
        args, checkpoint = resumed_arguments(args)
    else:
        args = fill_defaults(args)
        if any(Path(args.run).glob("*.pt")) or (Path(args.run) / "log.csv").exists():
            raise UserError(f"{args.run} already holds a run. Go on with it: python train.py --resume --run {args.run}; "
                            "or choose another folder with --run")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    tokenizer = data.tokenizer_from(checkpoint["tokenizer"]) if checkpoint else args.tokenizer
    corpus = data.load(args.data, tokenizer)
    for split in ("valid", "test"):
        if len(corpus.ids[split]) < 2:
            raise UserError(f"{args.data} is too short: its {split} part (5 %) holds {len(corpus.ids[split])} tokens")
    corpora = {"val": corpus} | {name: data.load(name, corpus.tokenizer, splits=("valid",)) for name in args.also}
    model = build_model(args.model, model_config(args, corpus.tokenizer.vocab_size)).to(device)
    batches = (data.Streams if model.recurrent else data.Windows)(corpus.ids["train"], args.batch_size, args.block_size, args.seed)
    trainer = Trainer(args, args.model, model, corpus.tokenizer, batches, evaluator(model, corpora, corpus.tokenizer, dtype),
                      device, dtype)
    if checkpoint:
        trainer.restore(checkpoint)
    try:
        trainer.run.mkdir(parents=True, exist_ok=True)
        trainer.open_log(resumed=bool(checkpoint))
    except OSError as e:
        raise UserError(f"cannot write to {args.run}: {e.strerror}") from e
    print(f"{args.model} on {args.data}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{len(corpus.ids['train']):,} training tokens, {device.type} {str(dtype).removeprefix('torch.')}, {args.run}", file=sys.stderr)
    trainer.fit()
    finish(trainer, corpus, device, dtype)


if __name__ == "__main__":
    data.run_main(main)
