"""Train a language model: the RNN, the LSTM or the Transformer, in one loop.

    python train.py --model lstm                             # the embedded finance language
    python train.py --model lstm --data ptb --minutes 15     # the Penn Treebank in the time you have
    python train.py --model transformer --data my.txt --tokenizer gpt2 --epochs 3 --run runs/mine
    python train.py --resume --run runs/mine                 # after a kill, bit for bit in float32
    torchrun --nproc-per-node 2 -- train.py --model lstm     # several processes split the rows of a batch

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
    what a step sees                    data.ContiguousBatches, data.WindowBatches; detach_state
    g scaled down, m, v, w              clip_grad_norm, configure_optimizer
    lr                                  get_lr, set_lr
    a whole training                    train, stages 4 to 8

A run is a folder: last.pt (all that is needed to resume), best.pt (the weights with the lowest validation
loss), log.csv (a row for every log step and evaluation), result.json (the final figures). log.csv grows row
by row; every other file is written under another name first and then renamed, so a kill at any moment leaves
the previous one whole.
"""
import copy
import csv
import ctypes
import io
import json
import math
import os
import platform
import random
import signal
import subprocess
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import data
import qwen_load
from data import UserError, option, save_json, write_atomically
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from transformer import (DecoderLayer, FastDecoderLayer, Scorer, Transformer, TransformerConfig,
                         use_layer_kernels)

MODELS = {"rnn": (RNNLM, RNNConfig), "lstm": (LSTMLM, LSTMConfig),
          "transformer": (Transformer, TransformerConfig)}

# Defaults by model: for the embedded languages, then what real text (the corpora, your own file) changes,
# then what its characters change (10 epochs of Shakespeare: 15 minutes on two cores).
COMMON = dict(weight_decay=0.01, dropout=0.0)
DEFAULTS = {
    "rnn": dict(n_embd=192, n_layer=1, batch_size=32, block_size=32, lr=3e-3, epochs=3.0),
    "lstm": dict(n_embd=192, n_layer=1, batch_size=32, block_size=64, lr=6e-3, epochs=3.0),
    "transformer": dict(n_embd=128, n_layer=4, n_head=4, batch_size=16, block_size=128, lr=2e-3, epochs=2.0),
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
    eval_every: int = option(None, "steps between evaluations (default: a 20th of the run, of ppo.py's a "
                                       "10th)")
    seed: int = option(1, "of weights, batches and all other random draws", at_least=0, below=2 ** 62)
    device: str = option("auto", "auto: cuda, then mps, then cpu; or a torch device")
    dtype: str = option("auto", "of matmuls, weights are float32; auto: bfloat16 where the hardware has it",
                        choices=["auto", "float32", "bfloat16"])


@dataclass
class Config(RunOptions):
    """Train an RNN, an LSTM or a Transformer, all written by hand, on an embedded language, a corpus or a
    file."""
    model: str = option("lstm", "which of the models", choices=list(MODELS))
    data: str = option("finance", f"{', '.join(data.CORPORA)}, or the path of a UTF-8 text file or of a "
                                  "folder of them")
    tokenizer: str = option("word", "whole words, characters, or GPT-2's byte-pair encoding",
                            choices=["word", "char", "gpt2"])
    also: list[str] = option([], "other corpora to log the perplexity of")
    search: int = option(None, "try N random configurations and the default one within --minutes, narrowed "
                               "by thirds; what else you type is held fixed; looks at the validation split "
                               "only")
    epochs: float = option(None, "passes over the training text")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    minutes: float = option(None, "instead: measure the speed, then plan as many steps as fit")
    warmup_steps: int = option(100, "steps of linear warm-up, however short the run", at_least=0)
    compile: bool = option(False, "torch.compile the Transformer's layers: for a GPU (on a CPU they have "
                                  "kernels, which are as fast)")
    log_every: int = option(50, "steps between rows of log.csv")
    sample: bool = option(True, "print a line that the model writes at every evaluation")
    batch_size: int = option(None, "rows of a batch",
                             group="by model and corpus (the defaults are below)")
    block_size: int = option(None, "tokens of a row: back-propagation through time goes so far, or the "
                                   "Transformer's context")
    lr: float = option(None, "highest learning rate")
    n_layer: int = option(None, "layers")
    n_head: int = option(None, "attention heads")
    n_embd: int = option(None, "width")
    n_hidden: int = option(None, "width inside: of all recurrent layers but the last (default: n_embd), of "
                                 "the Transformer's MLP (default: 3 n_embd)")
    dropout: float = option(None, "on the output of the last recurrent layer, or of each half of a layer",
                            at_least=0, below=1)
    dropout_hidden: float = option(None, "between recurrent layers", at_least=0, below=1)
    dropout_input: float = option(None, "on the embedded input", at_least=0, below=1)
    dropout_embed: float = option(None, "of words of the vocabulary", at_least=0, below=1)
    weight_decay: float = option(None, "AdamW's, on matrices", at_least=0)


# ------------------------------------------------------------------------------------------ devices and files

def pick_device(name="auto"):
    """`auto` is cuda, then mps, then cpu."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {name} is not available here; try --device cpu") from e
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name, device):
    """The dtype matmuls run in. `auto` is bfloat16 where the hardware multiplies it (CUDA from capability
    8.0; CPUs with AVX512-BF16 or AMX), float32 elsewhere. Weights are float32 always."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = [getattr(torch.cpu, f, None) for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = device.type == "cpu" and any(f is not None and f() for f in flags)
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def autocast(device, dtype):
    """The context in which matmuls run in bfloat16, if dtype says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


libc = ctypes.CDLL(None) if os.name == "posix" else None        # the C library


def keep_memory():
    """Have glibc keep what is freed for the next tensor of the size. It would give large pieces back and
    fetch them anew, page by page. (PPO with 50,257 tokens: 4.0 s an iteration without, 2.9 with.)"""
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)                                                    # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)                                          # M_TRIM_THRESHOLD


def read_checkpoint(path, first="python train.py --model lstm", mmap=False):
    """A checkpoint as a dict, on the CPU; weights_only, so a hostile file cannot run code. mmap: tensors are
    read where they are used. UserError if it is not readable."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        needed = {"model", "kind", "config", "tokenizer"}
        if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
            raise ValueError("not a checkpoint of this project")
        return checkpoint
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there; train a model first, for example: {first} --run "
                        f"{Path(path).parent}") from e
    except (PermissionError, IsADirectoryError, MemoryError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    except Exception as e:                          # truncated zip, hostile pickle, wrong content: many types
        raise UserError(f"{path} cannot be loaded: it is damaged or not a checkpoint of this project "
                        f"({type(e).__name__}). Delete it, and train again if there is no other") from e


def tokenizer_from(state):
    """The tokenizer that a checkpoint describes."""
    kinds = {"word": data.WordTokenizer, "char": data.CharTokenizer, "gpt2": data.GPT2Tokenizer,
             "qwen2": qwen_load.Qwen2Tokenizer}
    return kinds[state["kind"]](**{k: v for k, v in state.items() if k != "kind"})


def build_model(kind, config, weights=None):
    """A model of MODELS from its config as a dict, with weights if given. UserError if they do not fit."""
    try:
        model_type, config_type = MODELS[kind]
        model = model_type(config_type(**config))
        if weights is not None:
            model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"this does not make a {kind} model (runs of earlier versions are not read): "
                        f"{' '.join(str(e).split())[:200]}") from e
    return use_layer_kernels(model)


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


def kind_of(model):
    """A model's name in MODELS, or scorer. (fully_shard makes a subclass of a model's class.)"""
    names = {model_type: kind for kind, (model_type, _) in MODELS.items()} | {Scorer: "scorer"}
    return next(names[t] for t in type(model).__mro__ if t in names)


def command_for(folder):
    """The command that makes a run of this name, as far as the default names tell: runs/MODEL-DATA,
    runs/ppo-..., ..."""
    kind, _, corpus = folder.name.partition("-")
    if folder.parent == Path("runs") and kind in MODELS and corpus in data.CORPORA:
        return f"python train.py --model {kind} --data {corpus}"
    if kind in ("finetune", "ppo"):
        return f"python {kind}.py --run {folder} (python {kind}.py --help says from what)"
    return f"python train.py --model {kind if kind in MODELS else 'lstm'} --run {folder}"


def load_run(folder, device="cpu", dtype=None):
    """Open a run: -> (model in eval mode, tokenizer, config). best.pt if it is there, else last.pt. Or
    pretrained weights: a folder in the hub's layout, or the name of a repository there; dtype None keeps
    theirs. A run is float32."""
    if qwen_load.is_pretrained(folder):
        model, tokenizer = qwen_load.load_model(folder, device, dtype)
        return use_layer_kernels(model), tokenizer, model.config
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no run at {folder}. Train one first: {command_for(folder)}")
    path = folder / "best.pt"
    if not path.exists() and not (folder / "last.pt").exists():
        raise UserError(f"{folder} is neither a run nor a model that can be read here: it holds "
                        f"{qwen_load.contents(folder)}")
    checkpoint = read_checkpoint(path if path.exists() else folder / "last.pt")
    if checkpoint["kind"] not in MODELS:
        raise UserError(f"{folder} holds a {checkpoint['kind']}, which is no language model; name a run of "
                        "train.py")
    model = build_model(checkpoint["kind"], checkpoint["config"], checkpoint["model"]).to(device).eval()
    return model, tokenizer_from(checkpoint["tokenizer"]), model.config


def context(model):
    """How many tokens a model can read at once."""
    return math.inf if model.recurrent else model.config.block_size


# ------------------------------------------------------------------------------------------------- evaluation

CONTEXT = 256               # tokens


@torch.no_grad()
def token_losses(model, ids, rows=1, context=None, stride=None, dtype=None):
    """-log p of each of ids[1:] in nats, float64 [len(ids) - 1]. ids[0] is context only (put <eos> first).
    Dropout is off.

    The model may be split across processes; then all call this together. A recurrent model reads the text
    with its state carried from start to end, cut into `rows` pieces side by side (1: exact; more: faster).
    Each piece but the first begins with the state after the first CONTEXT tokens of the text and reads the
    CONTEXT tokens before its own, which do not count: from a state of zero in mid-text a recurrent network
    may settle among states that it never meets in reading on, and stay there. The Transformer reads windows
    of `context` tokens that advance by `stride`, and only a window's last `stride` predictions count, so that
    (after the first window) no token is predicted with less than context - stride tokens before it.
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
            before = min(CONTEXT, n // rows) if rows > 1 else 0
            length = -(-(n - before) // rows)
            padded = torch.full((2, before + rows * length), -1)
            padded[:, :n] = torch.stack((ids[:-1], ids[1:]))
            inputs, targets = padded.unfold(1, before + length, length)         # [rows, before + length] each
            state = model.init_state(rows)
            if before:              # the first piece starts from zeros, the others from the beginning's state
                beginning = model(inputs[:1, :before].to(device))[1]
                state = take_rows(join_rows([model.init_state(1)] + [beginning] * (rows - 1)), 0, 1, device)
            for x, y in zip(inputs.clamp(min=0).split(256, 1), targets.split(256, 1)):
                nll, state = model(x.to(device), state, targets=y.to(device), reduction="none")
                losses.append(nll.cpu())
                data.live(f"evaluated {len(losses) * 256 * rows:,} of {n:,} tokens")
            counted = targets >= 0                                              # not what fills the last row
            counted[1:, :before] = False
            losses = [torch.cat(losses, 1)[counted]]
        else:
            context = min(context or model.config.block_size, n)
            stride = min(stride or max(1, context // 2), context)
            ends = torch.tensor([*range(context, n, stride), n])                # of the windows' targets
            new = ends.diff(prepend=torch.zeros(1, dtype=torch.long))           # what no earlier one predicts
            for end, n_new in zip(ends.split(32), new.split(32)):
                at = end[:, None] - context + torch.arange(context)             # [32, context]
                y = ids[at + 1].masked_fill(at < (end - n_new)[:, None], -1)
                nll = model(ids[at].to(device), targets=y.to(device), reduction="none")[0].cpu()
                losses.append(nll[y >= 0])
                data.live(f"evaluated {int(end[-1]):,} of {n:,} tokens")
    model.train(was_training)
    data.live("")
    return torch.cat(losses).double()


def perplexity(model, ids, rows=1, context=None, stride=None, dtype=None):
    """The mean of token_losses, every token of ids[1:] predicted once.
    -> {"nll": nats per token, "ppl": perplexity, "tokens": how many}."""
    losses = token_losses(model, ids, rows, context, stride, dtype)
    nll = losses.mean().item()
    return {"nll": nll, "ppl": math.exp(min(nll, 700)), "tokens": len(losses)}


def unknown_share(tokenizer, ids):
    """The share of <unk> among token ids; 0 for a tokenizer without."""
    unk = getattr(tokenizer, "unk", None)
    return 0.0 if unk is None else float(np.mean(np.asarray(ids) == unk))


def warn_of_unknown(share, what):
    """Say what flatters a perplexity."""
    if share > 0.05:
        data.live(f"{share:.0%} of {what} is <unk>, which is easy to predict and flatters every perplexity "
                  "here: train with --tokenizer char or gpt2", "\n")


def eval_batch_size(ids):
    """Into how many pieces to cut a text for a recurrent model: up to 16, of at least 1000 tokens."""
    return max(1, min(16, len(ids) // 1000))


def prepend_eos(tokenizer, ids):
    """ids (an array) behind the end token, int64: what perplexity expects of an independent text."""
    return torch.cat([torch.tensor([tokenizer.eos]), torch.from_numpy(ids.astype("int64"))])


# ---------------------------------------------------------------------------------------- the parts of a step

def step_seed(seed, step, rank=0):
    """The number that a step begins its random draws with: no random state is ever saved, and a resumed run
    draws what an uninterrupted one would have drawn. 32 bits, because a CPU's generator keeps no more."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def get_lr(step, steps, peak, warmup_steps):
    """The schedule of all four trainings (train.py, finetune.py, ppo.py's two): linear warm-up, then half a
    cosine down to 1 % of the peak. Steps count from 0; the last is steps - 1, and log.csv shows its rate in
    row `steps`. Fine-tuning and the scorer warm up for a tenth of the run at most."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def configure_optimizer(model, lr, weight_decay):
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=fused)


def detach_state(state):
    """The recurrent state without its history: back-propagation through time is truncated here."""
    if state is None or isinstance(state, torch.Tensor):
        return state if state is None else state.detach()
    return [detach_state(s) for s in state]


def clip_grad_norm(parameters, limit):
    """Scale the gradients so that their common norm is at most limit; -> the norm before. Most steps of a
    training need no scaling, and then this passes over them once instead of twice, as clip_grad_norm_
    does."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm    # of a model split across processes
    if not norm <= limit:                                           # also where it is not a number
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()


class NotFinite(UserError):
    """The loss or the gradient has left the finite numbers."""


def kept(run):
    """What is left of a run that ends with an error."""
    if (run / "last.pt").exists():
        return f"The last good checkpoint is kept in {run}"
    return "Nothing was saved yet"


def check_finite(run, where, **values):
    """NotFinite unless all these values are finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(f"the {name.replace('_', ' ')} is not finite at {where} ({value}). {kept(run)}; "
                            "train again with a smaller --lr and another --run")


# ----------------------------------------------------------------------------------------- runs: what is kept

@dataclass
class Progress:
    """How far a run is; its checkpoint keeps it."""
    steps: int                      # planned
    eval_every: int                 # steps between evaluations
    step: int = 0
    best: float = math.inf          # lowest validation loss so far, nats per token
    best_step: int = -1
    loss_sum: float = 0.0           # since the last row of the log
    loss_steps: int = 0
    seconds: float = 0.0            # in all
    step_seconds: float = 0.0       # in training steps
    resumed_at: int = -1

    def due(self, every):
        """Whether what is done every so many steps, and at the end, is due: at the step that a run resumed
        at, it was done before."""
        return self.step != self.resumed_at and (self.step % every == 0 or self.step == self.steps)

    def add_loss(self, loss, seconds):
        """One more training step."""
        self.step += 1
        self.loss_sum += loss
        self.loss_steps += 1
        self.step_seconds += seconds

    def is_best(self, loss):
        """Note a validation loss; -> whether it is the lowest so far. Step 0, before any training, is not."""
        better = self.step > 0 and loss < self.best
        if better:
            self.best, self.best_step = loss, self.step
        return better

    def tokens_per_second(self, batches):
        return self.step * batches.batch_size * batches.block_size / max(self.step_seconds, 1e-9)

    def row(self, batches):
        """The columns of log.csv that this knows; the mean training loss is that since the last row."""
        mean = self.loss_sum / self.loss_steps if self.loss_steps else ""
        self.loss_sum, self.loss_steps = 0.0, 0
        return {"step": self.step, "epoch": self.step / batches.steps_per_epoch,
                "tokens": self.step * batches.batch_size * batches.block_size, "seconds": self.seconds,
                "train_loss": mean, "tokens_per_second": self.tokens_per_second(batches)}

    def __str__(self):
        left = self.seconds / max(1, self.step) * (self.steps - self.step)
        return f"step {self.step}/{self.steps}  {self.seconds:.0f} s, {left:.0f} s left"


class Log:
    """log.csv of a run. When a run resumes, rows after its checkpoint's step are cut off: they will be
    written again."""

    def __init__(self, run, columns, resumed_at=-1):
        path, self.columns, rows = run / "log.csv", columns, []
        if resumed_at >= 0 and not path.exists():
            data.live(f"{path} is missing; it begins again at step {resumed_at}", "\n")
        elif resumed_at >= 0:
            # a last line without an end was cut off
            lines = path.read_text(errors="replace").split("\n")[1:-1]
            rows = [row for row in csv.reader(lines)
                    if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= resumed_at]
        write_atomically(path, lambda f: f.write(csv_text([columns, *rows])))
        self.file = open(path, "ab")

    def write(self, row):
        """row: {column: value}; columns that are missing stay empty."""
        values = [row.get(column, "") for column in self.columns]
        self.file.write(csv_text([[f"{v:.6g}" if isinstance(v, float) else v for v in values]]))
        self.file.flush()


def csv_text(rows):
    """Rows as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def save_checkpoint(config, model, tokenizer, states, progress, better, **more):
    """Write last.pt, and best.pt if these weights are the best. states: of the weights and of the optimizer;
    more: what else this kind of run needs to resume."""
    run, (weights, moments) = Path(config.run), states
    best = {"kind": kind_of(model), "config": asdict(model.config), "model": weights,
            "tokenizer": tokenizer.state(), "step": progress.step}
    last = best | {"optimizer": moments, "progress": asdict(progress) | {"resumed_at": progress.step},
                   "options": asdict(config)} | more
    if better:
        write_atomically(run / "best.pt", lambda f: torch.save(best, f))
    write_atomically(run / "last.pt", lambda f: torch.save(last, f))


def resumed_progress(run, checkpoint, config):
    """How far a run is that resumes; without its best.pt, the next evaluation is the best so far."""
    progress = Progress(**checkpoint["progress"])
    progress.eval_every = config.eval_every or progress.eval_every
    if not (run / "best.pt").exists():
        progress.best = math.inf
    return progress


@contextmanager
def complete_checkpoint(run):
    """Inside, a checkpoint's contents are put where they belong; a UserError if it lacks some, or they do not
    fit."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise UserError(f"{run}/last.pt is not a complete checkpoint of this run "
                        f"({type(e).__name__}: {str(e).splitlines()[0]})") from e


def environment(device):
    """What a result was computed with: torch, the processor, the commit of this code (None where git does not
    know it)."""
    processor, commit = platform.processor() or platform.machine(), None
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    with suppress(OSError):
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=data.HERE,
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {"device": device.type, "torch": torch.__version__, "processor": processor, "commit": commit}


def base_result(config, model, progress, device, dtype):
    """What every result.json holds."""
    return {"model": kind_of(model), "data": config.data,
            "params": sum(p.numel() for p in model.parameters()),
            "steps": progress.steps, "best_step": progress.best_step, "seconds": progress.seconds,
            "dtype": dtype_name(dtype), "seed": config.seed, **environment(device), "options": asdict(config)}


# of log.csv: row k shows the state after k steps, so lr and grad_norm are those of step k - 1
COLUMNS = ["step", "epoch", "tokens", "seconds", "lr", "train_loss", "grad_norm", "tokens_per_second",
           "val_loss", "val_ppl"]


def sample_line(model, tokenizer, prompt, seed):
    """How the model continues a prompt (ids), from the same seed at every evaluation: a line of text."""
    from sample import generate                                     # which imports this file
    was_training = model.training
    model.eval()
    new = generate(model, [prompt], 20, 0.8, seed=seed, suppressed_tokens=tokenizer.suppressed)
    model.train(was_training)
    return " ".join(tokenizer.decode(prompt + new[0]).replace(data.SEPARATOR, " ").split())[-100:]


class StopRequest:
    """Ctrl-C, or a polite kill, as a flag that the loop reads between two steps; a second Ctrl-C does not
    wait. In another thread than the main one there are no signals."""

    def __enter__(self):
        self.requested, self.handlers = False, {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        data.live("stopping when this step is complete and saved; Ctrl-C again does not wait", "\n")

    def __exit__(self, *_):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)


def extend(run, progress, steps, peak, warmup_steps):
    """Plan more steps for a run that resumes; UserError unless they are more than before."""
    if steps <= progress.steps:
        raise UserError(f"{run} was planned for {progress.steps} steps; to extend it, give more than these "
                        f"({steps} is what you gave)")
    before, after = (get_lr(progress.step, n, peak, warmup_steps) for n in (progress.steps, steps))
    data.live(f"extended from {progress.steps} to {steps} steps; at step {progress.step} the learning rate "
              f"goes from {before:.3g} to {after:.3g}", "\n")
    progress.steps = steps
    (run / "result.json").unlink(missing_ok=True)                   # the run is not complete any more


def load_optimizer(optimizer, state):
    """Put a checkpoint's state into an optimizer that may be on another device."""
    for saved, own in zip(state["param_groups"], optimizer.param_groups):
        saved["fused"] = own["fused"]
    optimizer.load_state_dict(state)


def resume_command(script, run, world):
    """What to type to resume a run."""
    return f"{script if world == 1 else 'the same torchrun command and'} --resume --run {data.quoted(run)}"


def stopped(progress, resume_hint, world=1):
    """End a run that was told to stop and has been saved."""
    data.live(f"stopped at step {progress.step} and saved. Resume with: {resume_hint}", "\n")
    leave_processes(world)
    raise SystemExit(130)


# ------------------------------------------------------------------ several processes (one laptop: skip this)

import torch.distributed as dist


def join_processes(device):
    """Under torchrun: join the other processes; -> (rank, world size, device of this process). Else (0, 1,
    device)."""
    if data.job_size() == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type == "mps":                                      # gloo knows CPUs only
        device = torch.device("cpu")
    # the others wait while one encodes a text
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def leave_processes(world):
    if world > 1:
        dist.barrier()                                              # torchrun ends those that are left behind
        dist.destroy_process_group()


@contextmanager
def first_process_first(rank, world):
    """What is done inside, the first process does before the others: it downloads and encodes for all."""
    if rank:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


@contextmanager
def job_errors(run, progress, world):
    """In a job of several processes, an error of their connection in one line that says how to resume."""
    try:
        yield
    except RuntimeError as e:
        if world == 1 or isinstance(e, torch.OutOfMemoryError):
            raise
        again = f" with --resume --run {run}" if (run / "last.pt").exists() else ""
        raise UserError(f"at step {progress.step} another process of this job was gone, or this one failed "
                        f"({(str(e) or type(e).__name__).splitlines()[0]}). {kept(run)}: start the same "
                        f"torchrun command again{again}") from e


def average_gradients(model, device, world):
    """The model, wrapped so that a backward pass averages the gradients of all processes."""
    if world == 1:
        return model
    on = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=on)


def broadcast(value, world, device):
    """The first process's value, for all."""
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=device)
    return box[0]


def mean_and_any(loss, flag, world, device):
    """The mean of a number over the processes, and whether any of them has the flag."""
    if world == 1:
        return loss, flag
    both = torch.tensor([loss, flag], dtype=torch.float64, device=device)
    dist.all_reduce(both)
    return both[0].item() / world, both[1].item() > 0


def gather_state(state, world):
    """The recurrent state of all rows of a batch, on the CPU, from the processes' parts."""
    states = [state]
    if world > 1:
        states *= world
        dist.all_gather_object(states, state)
    return join_rows(states)


def join_rows(states):
    """The rows of several recurrent states of the same form, one below the other, on the CPU."""
    if states[0] is None:
        return None
    if isinstance(states[0], torch.Tensor):
        return torch.cat([s.cpu() for s in states])
    return [join_rows(parts) for parts in zip(*states)]


def take_rows(state, rank, world, device):
    """The rows of a recurrent state that belong to one of `world` processes, as those of a batch do."""
    if state is None:
        return None
    if isinstance(state, torch.Tensor):
        return state.chunk(world)[rank].to(device)
    return [take_rows(s, rank, world, device) for s in state]


# --------------------------------------------------------------------------------------------------- training

# tokens of a split that are read at most (IMDB's has 7 million)
WHILE_TRAINING, AT_THE_END = 100_000, 300_000
EXACT = 100_000             # at the end, a recurrent model reads a text of up to so many tokens in one row
MEASURED = 20               # steps in which --minutes measures the speed; the first quarter is not counted


def evaluate(model, texts, dtype):
    """{name: perplexity} of texts {name: ids}, quickly: recurrent models read 16 pieces side by side."""
    return {name: perplexity(model, ids, rows=eval_batch_size(ids), dtype=dtype)
            for name, ids in texts.items()}


def plan_minutes(config, progress, model, batches, texts, device, dtype, rank, world):
    """--minutes as a number of steps: train a copy of the model for MEASURED steps as the job will run,
    evaluate it once, and plan as many steps as fit into the rest, with the evaluations (up to 20, and up to a
    tenth of the time, but at least two; the final figures on the test split come on top)."""
    started = time.perf_counter()
    data.live("measuring the speed")
    model = copy.deepcopy(model).train()
    if config.compile:
        compile_layers(model, device)                               # a copy is not compiled
    optimizer = configure_optimizer(model, config.lr / 100, config.weight_decay)
    ddp_model, state = average_gradients(model, device, world), None
    for step in range(MEASURED):
        if step == MEASURED // 4:
            clock = time.perf_counter()
        x, y = (part.chunk(world)[rank].to(device) for part in batches.batch(step % batches.steps_per_epoch))
        with autocast(device, dtype):
            loss, state = ddp_model(x, state, targets=y)
        loss.backward()
        state = detach_state(state)
        clip_grad_norm(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    step_seconds = (time.perf_counter() - clock) / (MEASURED - MEASURED // 4)
    clock = time.perf_counter()
    if rank == 0:
        evaluate(model, texts, dtype)
    now = time.perf_counter()
    times = broadcast((step_seconds, now - clock, now - started), world, device)
    step_seconds, eval_seconds, progress.seconds = times
    left = 0.98 * config.minutes * 60 - progress.seconds - eval_seconds     # one evaluation is at step 0
    evaluations = max(2, min(20, int(0.1 * left / eval_seconds)))
    if config.eval_every:
        step_seconds += eval_seconds / config.eval_every
    else:
        left -= evaluations * eval_seconds
    progress.steps = max(1, int(left / step_seconds))
    progress.eval_every = config.eval_every or -(-progress.steps // evaluations)
    data.live(f"{config.minutes:g} minutes are {progress.steps} steps, "
              f"{progress.steps / batches.steps_per_epoch:.1f} epochs", "\n")


def train(config, corpora, device, dtype, rank=0, world=1, checkpoint=None, resume_hint=None):
    """Train a model as config says, into the folder config.run; -> what its result.json holds. corpora["val"]
    is the corpus (without a test split in a trial of a search), the others are --also."""
    corpus, tokenizer, run = corpora["val"], corpora["val"].tokenizer, Path(config.run)

    # 4 model
    if config.batch_size % world:
        raise UserError(f"--batch-size {config.batch_size} cannot be split across {world} processes equally")
    torch.manual_seed(config.seed)
    model = build_model(config.model, model_config(config, tokenizer.vocab_size)).to(device)
    if config.compile:
        compile_layers(model, device)
    cut = data.ContiguousBatches if model.recurrent else data.WindowBatches
    batches = cut(corpus.ids["train"], config.batch_size, config.block_size, config.seed)
    texts = {name: prepend_eos(tokenizer, c.ids["valid"][:WHILE_TRAINING]) for name, c in corpora.items()}
    prompt = texts["val"][:9].tolist()                              # the end token and eight more

    # 5 optimizer
    optimizer = configure_optimizer(model, config.lr, config.weight_decay)
    steps = config.steps or max(1, round((config.epochs or 0) * batches.steps_per_epoch))
    progress = Progress(steps, config.eval_every or -(-steps // 20))

    # 6 resume
    state = None                                             # of a recurrent model, carried from step to step
    if checkpoint:
        with complete_checkpoint(run):
            model.load_state_dict(checkpoint["model"])
            load_optimizer(optimizer, checkpoint["optimizer"])
            state = take_rows(checkpoint["state"], rank, world, device)
            progress = resumed_progress(run, checkpoint, config)
        if checkpoint.get("extended"):
            if config.minutes:
                steps = int(60 * config.minutes / progress.seconds * progress.step)
            extend(run, progress, steps, config.lr, config.warmup_steps)
    elif config.minutes:
        plan_minutes(config, progress, model, batches, texts, device, dtype, rank, world)
    steps, ddp_model = progress.steps, average_gradients(model, device, world)

    # 7 loop
    if rank == 0:
        log = Log(run, COLUMNS + [f"ppl_{name}" for name in config.also], progress.resumed_at)
    data.live(f"{config.model} on {config.data}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(corpus.ids['train']):,} training tokens, {device.type} {dtype_name(dtype)}"
              f"{f' x {world}' if world > 1 else ''}, {run}", "\n")
    model.train()
    clock, loss, metrics, stopping = time.perf_counter() - progress.seconds, math.nan, {}, False
    with StopRequest() as stop, job_errors(run, progress, world):
        for step in range(progress.step, steps + 1):
            # evaluate, log, save
            progress.seconds, better = time.perf_counter() - clock, False
            evaluating = progress.due(progress.eval_every)
            if evaluating:
                scores = broadcast(evaluate(model, texts, dtype) if rank == 0 else None, world, device)
                check_finite(run, f"step {step}", validation_loss=scores["val"]["nll"])
                better = progress.is_best(scores["val"]["nll"])
                progress.seconds = time.perf_counter() - clock
                metrics |= {"val_loss": scores["val"]["nll"], "val_ppl": scores["val"]["ppl"]}
                metrics |= {f"ppl_{name}": scores[name]["ppl"] for name in config.also}
            if rank == 0 and (evaluating or progress.due(config.log_every)):
                log.write(progress.row(batches) | metrics)
            if step > 0 and (evaluating or stopping):
                rows = gather_state(state, world)                   # of all processes
                if rank == 0:
                    states = model.state_dict(), optimizer.state_dict()
                    save_checkpoint(config, model, tokenizer, states, progress, better, state=rows,
                                    fingerprint=corpus.fingerprint())
            if evaluating and step > 0 and rank == 0:
                also = "".join(f"  {name} {scores[name]['ppl']:.1f}" for name in config.also)
                data.live(f"{progress}  loss {loss:.3f}  val ppl {scores['val']['ppl']:.2f}"
                          f"{' *' if better else ''}{also}", "\n")
                if config.sample:
                    data.live("    " + sample_line(model, tokenizer, prompt, config.seed), "\n")
            if step == steps:
                break
            if stopping:
                stopped(progress, resume_hint or resume_command("python train.py", run, world), world)

            # one step
            started = time.perf_counter()
            torch.manual_seed(step_seed(config.seed, step, rank))           # of dropout
            lr = get_lr(step, steps, config.lr, config.warmup_steps)
            set_lr(optimizer, lr)
            if not model.recurrent or batches.is_epoch_start(step):
                state = None                                    # a recurrent state is carried within an epoch
            x, y = batches.batch(step)                              # [B, T] each, y one token later
            x, y = x.chunk(world)[rank].to(device), y.chunk(world)[rank].to(device)     # rows, as the state's
            with autocast(device, dtype):
                loss, state = ddp_model(x, state, targets=y)        # mean nats per token
            loss.backward()
            state = detach_state(state)                          # truncated BPTT: values stay, gradients stop
            grad_norm = clip_grad_norm(model.parameters(), config.grad_clip)
            loss = loss.item()
            check_finite(run, f"step {step}", loss=loss, gradient_norm=grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss, stopping = mean_and_any(loss, stop.requested, world, device)
            progress.add_loss(loss, time.perf_counter() - started)
            metrics = {"lr": lr, "grad_norm": grad_norm}
            data.live(f"{progress}  loss {loss:.3f}  {progress.tokens_per_second(batches):,.0f} tokens/s")

    # 8 results
    if rank:
        return None
    result = {"val_ppl": math.exp(min(progress.best, 700)), "epochs": steps / batches.steps_per_epoch,
              "tokens_per_second": progress.tokens_per_second(batches)}
    if not config.search:
        model.load_state_dict(read_checkpoint(run / "best.pt")["model"])
        result |= final_figures(model, corpus, dtype)
    result |= base_result(config, model, progress, device, dtype)
    save_json(run / "result.json", result)                          # last: it says that the run is complete
    return result


def final_figures(model, corpus, dtype):
    """Perplexity on the validation and test splits, the state carried from end to end of each; floor; the
    share of <unk> among what is predicted. None for a test split that the corpus does not have."""
    out = {"test_ppl": None, "floor_ppl": corpus.floor.get("test"), "test_tokens": None}
    for split in [split for split in corpus.ids if split != "train"]:
        ids = prepend_eos(corpus.tokenizer, corpus.ids[split][:AT_THE_END])
        scores = perplexity(model, ids, rows=1 if len(ids) <= EXACT else eval_batch_size(ids), dtype=dtype)
        name = "val" if split == "valid" else split
        out |= {f"{name}_ppl": scores["ppl"], f"{name}_tokens": scores["tokens"],
                f"{name}_unknown": unknown_share(corpus.tokenizer, ids[1:])}
    return out


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
    drawn = {}
    for name, space in SEARCH_SPACE[config.model].items():
        if isinstance(space, tuple):
            drawn[name] = float(f"{space[0] * (space[1] / space[0]) ** rng.random():.2g}")
        else:
            drawn[name] = rng.choice(space)
    drawn |= {name: getattr(config, name) for name in drawn if name in given}
    return drawn | {"n_hidden": (3 if config.model == "transformer" else 1) * drawn["n_embd"]}


def run_trial(config, corpora, device, dtype):
    """One training of a search, in a folder of its own: complete if its result is there, resumed if it was
    begun; its weights are not kept. -> its result; "val_ppl" is infinite where it diverged."""
    run = Path(config.run)
    if not (run / "result.json").exists():
        checkpoint = read_checkpoint(run / "last.pt") if (run / "last.pt").exists() else None
        try:
            train(config, corpora, device, dtype, checkpoint=checkpoint,
                  resume_hint="the same search again; finished trials are not repeated")
        except NotFinite:
            save_json(run / "result.json", {"val_ppl": math.inf})
        for file in run.glob("*.pt"):
            file.unlink()
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def search(config, given, corpora, device, dtype):
    """Successive halving (Jamieson & Talwalkar 2016), by thirds: all configurations train for a short time
    each, the best third again for three times as long, and so on, every rung for an equal share of --minutes.
    Trial 0 is what would be trained without a search, so that the table says whether searching paid. Each
    training is complete, with its own schedule, because a half-finished one says little about a finished
    one. Only the validation split is looked at. Finished trainings are not repeated after an interruption."""
    folder, rng = Path(config.run), random.Random(config.seed)
    identity = json.dumps({k: v for k, v in asdict(config).items() if k not in LOCAL}, sort_keys=True)
    if (folder / "search.json").exists() and (folder / "search.json").read_text() != identity:
        raise UserError(f"{folder} is of another search; choose another folder with --run")
    configs = [draw(config, given, rng) for _ in range(config.search)]
    configs = [{name: getattr(config, name) for name in configs[0]}] + configs
    alive, sizes = list(range(len(configs))), [len(configs)]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 3))
    scores = [f"val_ppl_{rung + 1}" for rung in range(len(sizes))]
    columns = ["trial", "params", "tokens", "seconds", "diverged", *configs[0], *scores]
    trials = {i: {"trial": i, **drawn} for i, drawn in enumerate(configs)}
    write_atomically(folder / "search.json", lambda f: f.write(identity.encode()))
    for rung, (size, score) in enumerate(zip(sizes, scores)):
        minutes = config.minutes / len(sizes) / size
        for i in alive:
            one = replace(config, **configs[i], minutes=minutes, sample=False,
                          run=str(folder / f"trial-{i}-rung-{rung + 1}"))
            result = run_trial(one, corpora, device, dtype)
            trials[i] |= {"params": result.get("params", ""),
                          "tokens": result.get("steps", 0) * one.batch_size * one.block_size,
                          "seconds": round(result.get("seconds", 0.0), 1),
                          "diverged": int(math.isinf(result["val_ppl"])), score: f"{result['val_ppl']:.3f}"}
            rows = [[trial.get(column, "") for column in columns] for trial in trials.values()]
            write_atomically(folder / "trials.csv", lambda f: f.write(csv_text([columns, *rows])))
            data.live("")
            print(f"rung {rung + 1} of {len(sizes)}, trial {i}: validation perplexity "
                  f"{result['val_ppl']:.1f}", flush=True)
        alive = sorted(alive, key=lambda i: float(trials[i][score]))[:math.ceil(size / 3)]
    best = float(trials[alive[0]][scores[-1]])
    if not math.isfinite(best):
        raise UserError("every trial that was left diverged; search again with another --seed, or a smaller "
                        "--lr held fixed")
    fixed = sorted(given - {"model", "data", "minutes", "search", "run", "also", "resume", "sample",
                            "compile"})
    chosen = configs[alive[0]] | {name: getattr(config, name) for name in fixed}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
    print(f"all trials are in {folder}/trials.csv. The best, validation perplexity {best:.2f}:\n"
          f"python train.py --model {config.model} --data {data.quoted(config.data)} --minutes "
          f"{config.minutes:g} {flags}")


# ----------------------------------------------------------------------------------------------- command line

def defaults_text():
    """The tables at the top of this file, for --help."""
    lines = []
    for title, table in (("embedded languages", {m: COMMON | d for m, d in DEFAULTS.items()}),
                         ("real text", {m: COMMON | DEFAULTS[m] | d for m, d in REAL_TEXT.items()}),
                         ("its characters, what differs", CHARACTERS)):
        lines.append(f"defaults for {title}:")
        for model, values in table.items():
            text = f"{model}: " + ", ".join(f"{k.replace('_', '-')} {v:g}" for k, v in values.items())
            lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def resolve_defaults(config):
    """Fill in what depends on model and corpus."""
    defaults = COMMON | DEFAULTS[config.model]
    if config.data not in data.DOMAINS:
        defaults |= REAL_TEXT[config.model]
        defaults |= CHARACTERS.get(config.model, {}) if config.tokenizer == "char" else {}
    if config.model != "transformer":
        defaults = dict.fromkeys(("dropout_hidden", "dropout_input", "dropout_embed"), 0.0) | defaults
    if config.epochs or config.steps or config.minutes:
        defaults.pop("epochs")
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.n_hidden is None:
        config.n_hidden = 3 * config.n_embd if config.model == "transformer" else config.n_embd


def model_config(config, vocab_size):
    """The options that describe the model, as the dict its own config is made of; UserError for one it
    lacks."""
    fields = MODELS[config.model][1].__dataclass_fields__
    sizes = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    sizes["vocab_size"] = vocab_size
    if config.model == "transformer":
        sizes["n_kv_head"] = config.n_head
    if config.model != "transformer" and config.n_layer == 1 and config.n_hidden != config.n_embd:
        raise UserError("--n-hidden is the width of the layers below the last one, which shares its weights "
                        "with the embedding and is --n-embd wide; with one layer, set --n-embd alone")
    for name in ("n_head", "dropout_hidden", "dropout_input", "dropout_embed"):
        if getattr(config, name) is not None and name not in fields:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --model {config.model}; leave it "
                            "out")
    return sizes


# options that say where a run is, and how it is shown or split; where and how it is computed; how long it is
LOCAL = "run", "resume", "sample", "shard"
COMPUTED = "device", "dtype", "compile", "log_every", "eval_every"
LENGTHS = "steps", "epochs", "minutes"


def refuse_existing(run, script, files):
    """UserError if a folder already holds a run."""
    if data.job_rank() == 0 and any((Path(run) / file).exists() for file in files):
        raise UserError(f"{run} already holds a run{' or weights' if 'config.json' in files else ''}. Resume "
                        f"it: {script} --resume --run {data.quoted(run)}; or choose another folder with "
                        "--run")


def resume_or_refuse(config, given, script, places, files=("last.pt", "result.json", "config.json"),
                     lengths=LENGTHS):
    """-> (checkpoint, the options that its run was started with) with --resume, else (None, config). What may
    be given anew: where and how it is computed; how long it is, which extends it; and `places`, options that
    say where something lies whose contents are checked. UserError if the run is not one of this script, or
    was started with other options; without --resume, if the folder holds a run."""
    if not config.resume:
        refuse_existing(config.run, script, files)
        return None, config
    checkpoint = read_checkpoint(Path(config.run) / "last.pt", script, mmap=getattr(config, "shard", False))
    saved, here = checkpoint.get("options", {}), asdict(config)
    if saved.keys() != here.keys():
        raise UserError(f"{config.run} is not a run of {script}, or one of another version; resume it with "
                        "what started it")
    for name in sorted(given.difference(LOCAL, COMPUTED, lengths, places)):
        if here[name] != saved[name]:
            raise UserError(f"the run in {config.run} was started with {name} {saved[name]}, not "
                            f"{here[name]}. Resume it without this option, or choose another folder with "
                            "--run")
    checkpoint["extended"] = bool(given & {*lengths})
    changed = {name: here[name] for name in here if name in LOCAL or name in given
               or name in lengths and checkpoint["extended"]}
    return checkpoint, type(config)(**saved | changed)


def check_text(corpus, checkpoint, run):
    """UserError if a text is too short to be split, or is not the one that a run was started with."""
    for split, ids in corpus.ids.items():
        if len(ids) < 2 and split != "train":
            raise UserError(f"{corpus.name} is too short: its {split} part (5 %, cut between lines) holds "
                            f"{len(ids)} tokens")
    if checkpoint and checkpoint.get("fingerprint") != corpus.fingerprint():
        raise UserError(f"{corpus.name} is no longer the text that the run in {run} was started with; "
                        "restore it, or start a new run with --run")


def main(argv=None):
    # 1 options
    example = "example: python train.py --model lstm --data ptb --minutes 15 --also wikitext2"
    config, given = data.parse_args(Config, argv, f"{defaults_text()}\n\n{example}")
    if len(given & {"epochs", "steps", "minutes"}) > 1:
        raise UserError("--epochs, --steps and --minutes exclude each other; give one of them")
    if config.search and (not config.minutes or "n_hidden" in given or data.job_size() > 1):
        raise UserError("--search needs --minutes, the time for all trials together; it runs in one process, "
                        "and draws --n-hidden with --n-embd")
    if config.search and config.model not in SEARCH_SPACE:
        raise UserError(f"--search does not know what to draw for {config.model}; give it a line in "
                        "SEARCH_SPACE")
    if config.compile and config.model != "transformer":
        raise UserError("--compile is for --model transformer; a recurrent layer has a loop of its own")
    if "val" in config.also:
        raise UserError("--also val: this name is taken; rename the file")
    default = f"{'search-' if config.search else ''}{config.model}-{data.file_name(config.data)}"
    config.run = config.run or f"runs/{default}"
    files = ("last.pt", "result.json")
    checkpoint, config = resume_or_refuse(config, given, "python train.py", {"data"}, files)
    if not checkpoint:
        resolve_defaults(config)
    keep_memory()

    # 2 device and processes
    rank, world, device = join_processes(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)

    # 3 data
    tokenizer = tokenizer_from(checkpoint["tokenizer"]) if checkpoint else config.tokenizer
    splits = ("train", "valid") if config.search else ("train", "valid", "test")
    with first_process_first(rank, world):                          # it downloads and encodes
        corpus = data.load(config.data, tokenizer, splits)
        check_text(corpus, checkpoint, config.run)
        also = {name: data.load(name, corpus.tokenizer, ("valid",)) for name in config.also}
        corpora = {"val": corpus} | also
    share = unknown_share(corpus.tokenizer, corpus.ids["valid"])
    warn_of_unknown(share, f"the validation split of {config.data}")
    if config.search:
        return search(config, given, corpora, device, dtype)
    result = train(config, corpora, device, dtype, rank, world, checkpoint)
    if rank == 0:
        figures = f"validation perplexity {result['val_ppl']:.2f}"
        if result["test_ppl"]:
            figures += f", test {result['test_ppl']:.2f}"
        else:
            figures += f" ({math.log(result['val_ppl']):.4f} nats per token), no test split"
        if result["floor_ppl"]:
            figures += f", floor {result['floor_ppl']:.2f}"
        if result["val_unknown"]:
            figures += f", {result['val_unknown']:.1%} <unk>"
        print(f"{config.model} on {config.data}: {result['params']:,} parameters, {figures}, "
              f"{result['seconds']:.0f} s at {result['tokens_per_second']:,.0f} tokens/s")
        print(f"written to {config.run}. Next: python sample.py --run {data.quoted(config.run)}")
    leave_processes(world)


if __name__ == "__main__":
    data.run_main(main)
