"""Fine-tune all parameters of a trained language model on other text, and show what changed.

    python finetune.py --base Qwen/Qwen2-0.5B --data tinystories --run runs/stories     # 1 GB of weights, downloaded once
    python finetune.py --base runs/transformer-finance --data stories                    # offline, a minute
    python finetune.py --base runs/transformer-finance --data stories --ablate           # epochs x share of the data
    python finetune.py --resume --run runs/stories                                       # after a kill
    torchrun --nproc-per-node 8 -- finetune.py --shard --base Qwen/Qwen2-7B --data tinystories      # no card holds it all

The base is a run of train.py, or Qwen2's weights (a folder in the hub's layout, or a name on the hub). The loop is
train.py's: AdamW, warm-up and half a cosine, gradients clipped; documents stand one behind the other with their separator
between them, as in nanoGPT, and a batch is windows of that text.

Precision. Weights and AdamW's two moments are float32. bfloat16 has eight significant bits: an update of less than 1/256
of a weight would vanish if the weight were bfloat16, and with learning rates of 1e-5 nearly all are. What is multiplied is
a bfloat16 copy of the weights, which costs a quarter of their memory; its gradients are bfloat16 too (that is what the
products give), and are made float32 a few at a time when AdamW reads them. In bytes per parameter:

    weights 4 + moments 8 + copy 2 + its gradients 2 = 16;      in float32: weights 4 + moments 8 + gradients 4 = 16

Gradients of several micro-batches (--accumulate) would be summed in bfloat16 and lose their low bits; then, and under
torchrun, autocast does the products and gradients are float32: 18 bytes. Under torchrun 4 more hold the gradients that
are being averaged.

Several processes. Under torchrun every process has all weights and some rows of each batch, and the gradients are averaged
(DistributedDataParallel). With --shard it also has only its share of weights, moments and gradients, 16 bytes a parameter
divided by the processes (FSDP2's fully_shard; Rajbhandari et al. 2020, "ZeRO", stage 3): the weights of one block after the
other are gathered in bfloat16, used and let go, forward and backward; gradients are summed in float32. Checkpoints are the
same in all three cases, so that a run goes on with any number of processes.

Measured before and after, always: each held-out document read afresh (its perplexity, the mean of these, and the corpus
perplexity, all as eval.py defines them), the perplexity of a text from outside (what was forgotten), and continuations
of a prompt in the style of the data and of one that has nothing to do with it, from the same seed.
"""
import ctypes
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
from data import UserError, option, save_json, write_atomically
from eval import Figures, Run, losses_afresh, number, open_run, paint_curves, read_log, table
from qwen_load import is_pretrained, save_model
from sample import encode_prompt, generate, suppressed_tokens
from train import (LOCAL, MODELS, Trainer, build_model, check_resume_config, check_text, clip_grad_norm, environment,
                   eval_batch_size, join_processes, load_run, perplexity, pick_device, pick_dtype, read_checkpoint,
                   refuse_existing, tokenizer_from, prepend_eos)

STYLE_PROMPT = "A brave knight sets out on a journey to rescue a princess. Write the next sentence in TinyStories style."
OTHER_PROMPT = "Climate change is"

# by base: Qwen2 (not searched), a run of ours
DEFAULTS = {True: dict(lr=2e-5, batch_size=8, block_size=256), False: dict(lr=1e-3, batch_size=16, block_size=128)}


def by_base(name):
    return f"(default: {DEFAULTS[True][name]:g} for Qwen2, {DEFAULTS[False][name]:g} for a run of ours)"


@dataclass
class Config:
    """Fine-tune all parameters of a trained model on other text, and show what changed."""
    base: str = option("Qwen/Qwen2-0.5B", "a run of train.py; or Qwen2's weights: a folder, or their name on the hub, "
                       "downloaded once (1 GB)")
    data: str = option("tinystories", f"{', '.join(data.CORPORA)}, or the path of a UTF-8 text file")
    run: str = option(None, "folder of the result (default: runs/finetune-BASE-DATA)")
    resume: bool = option(False, "resume the run in --run, as it was started")
    epochs: float = option(2.0, "passes over the training text", above=0)
    steps: int = option(None, "optimizer steps, instead of --epochs", above=0)
    data_fraction: float = option(0.9, "the first share of the training text", above=0, at_most=1)
    ablate: bool = option(False, "a complete run for every pair of the next two, and a table")
    ablate_epochs: list[float] = option([1.0, 2.0], "epochs of the table", above=0)
    ablate_fractions: list[float] = option([0.6, 0.9], "shares of the data of the table", above=0, at_most=1)
    lr: float = option(None, f"highest learning rate {by_base('lr')}", above=0, group="the step")
    batch_size: int = option(None, f"windows of a batch {by_base('batch_size')}", above=0, group="the step")
    block_size: int = option(None, f"tokens of a window, at most the base's context {by_base('block_size')}", above=0,
                             group="the step")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory", above=0, group="the step")
    checkpointing: bool = option(False, "keep the inputs of layers only and compute the rest twice: less memory",
                                 group="the step")
    shard: bool = option(False, "under torchrun: weights and moments are split across the processes", group="the step")
    weight_decay: float = option(0.01, "AdamW's, on matrices", at_least=0, group="the step")
    warmup_steps: int = option(100, "steps of linear warm-up, at most a tenth of all", at_least=0, group="the step")
    grad_clip: float = option(1.0, "largest gradient norm", above=0, group="the step")
    seed: int = option(1, "of batches, dropout and samples", at_least=0, below=2 ** 63, group="the step")
    log_every: int = option(10, "steps between rows of log.csv", above=0, group="the step")
    eval_every: int = option(None, "steps between evaluations (default: a 20th of the run)", above=0, group="the step")
    sample: bool = option(True, "print a line that the model writes at every evaluation", group="the step")
    held_out: int = option(200, "documents of the test split", above=0, group="before and after")
    retain: str = option(None, "a text that is not trained on (default: what the base was trained on; wikitext2 for "
                         "Qwen2)", group="before and after")
    prompts: list[str] = option([], "to continue (default: a knight's journey and the climate; for an embedded language "
                                "the beginnings of a document of --data and of another one)", group="before and after")
    sample_tokens: int = option(60, "of a continuation", above=0, group="before and after")
    temperature: float = option(0.7, "of the continuations", at_least=0, group="before and after")
    eval_tokens: int = option(8192, "of the validation split, for the loss curve", above=0, group="before and after")
    device: str = option("auto", "auto: cuda, then mps, then cpu; or a torch device")
    dtype: str = option("auto", "of the matmuls, weights are float32; auto: bfloat16 where the hardware multiplies it",
                        choices=["auto", "float32", "bfloat16"])


# ----------------------------------------------------------------------------------------------------------- the step

C = ctypes.CDLL(None) if os.name == "posix" else None           # the C library


class LateEmbedding(torch.nn.Module):
    """An embedding tied to the head. Its gradient is added to the head's when the backward pass is over, in float32 and for the
    tokens that occur only: autograd would make a matrix of the whole vocabulary, and sum a frequent token's in bfloat16."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, tokens):
        self.tokens, self.out = tokens, torch.nn.functional.embedding(tokens, self.weight.detach()).requires_grad_()
        return self.out

    def add_gradient(self):
        rows, at = self.tokens.flatten().unique(return_inverse=True)        # summed in float32: some tokens occur often
        grad = self.weight.grad[rows].float().index_add_(0, at, self.out.grad.flatten(0, 1).float())
        self.weight.grad[rows] = grad.to(self.weight.dtype)
        self.tokens = self.out = None


class FineTuner(Trainer):
    """train.py's loop with the products in a bfloat16 copy of the weights, or the weights shared out (see the top of
    this file)."""
    CHUNK = 20_000_000                          # parameters whose float32 gradients exist at a time

    def __init__(self, *args):
        super().__init__(*args)
        self.copy = self.pairs = None
        if self.dtype == torch.bfloat16 and self.world == 1 and self.args.accumulate == 1 and not self.model.recurrent:
            with torch.device("meta"):
                self.copy = type(self.model)(self.model.config)
            self.copy.load_state_dict({k: v.bfloat16() for k, v in self.model.state_dict().items()}, assign=True)
            if self.model.config.tied:
                self.copy.embed_tokens = LateEmbedding(self.copy.embed_tokens.weight)
                self.copy.lm_head.weight = self.copy.embed_tokens.weight
            self.copy.requires_grad_(True).train()
            self.pairs = list(zip(self.model.parameters(), self.copy.parameters()))
        if not self.model.recurrent:
            (self.copy or self.model).checkpointing = self.args.checkpointing

    def distribute(self):
        self.sharded = self.args.shard
        if not self.sharded:
            return super().distribute()
        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        # what is gathered and let go at a time; the last: all the rest
        for module in (*self.model.layers, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self.model.to_empty(device=self.device)                     # the model came without memory

    def restore(self, checkpoint):
        super().restore(checkpoint)
        if self.copy:
            self.take_over(self.pairs)

    @torch.no_grad()
    def take_over(self, pairs):
        for weight, copy in pairs:
            copy.copy_(weight)

    def gradients(self, x, y):
        if self.copy:
            loss, _ = self.copy(x, targets=y)
            loss.backward()
            if self.model.config.tied:
                self.copy.embed_tokens.add_gradient()
            parts = [g for _, c in self.pairs for g in c.grad.split(4096)]          # float32 is made of a part at a time
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in parts]).norm().item()
            self.scale = 1.0 if norm <= self.args.grad_clip else self.args.grad_clip / (norm + 1e-6)
            return loss.item(), norm
        if self.args.accumulate == 1:
            return super().gradients(x, y)
        total = 0.0
        for x_part, y_part in zip(x.chunk(self.args.accumulate), y.chunk(self.args.accumulate)):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = self.ddp_model(x_part, targets=y_part)[0] / self.args.accumulate
            loss.backward()
            total += loss.item()
        return total, clip_grad_norm(self.model.parameters(), self.args.grad_clip)

    def update(self):
        """AdamW, a few matrices after the other: those without a gradient are passed over."""
        if not self.copy:
            return super().update()
        if hasattr(C, "malloc_trim"):               # glibc keeps what activations left behind: 0.7 GB for Qwen2-0.5B
            C.malloc_trim(0)
        waiting, size = [], 0
        for k, (weight, copy) in enumerate(self.pairs):
            weight.grad = copy.grad.float()
            if self.scale < 1:
                weight.grad.mul_(self.scale)
            copy.grad, size = None, size + weight.numel()
            waiting.append((weight, copy))
            if size >= self.CHUNK or k + 1 == len(self.pairs):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.take_over(waiting)
                waiting, size = [], 0


def memory_needed(model, args, dtype, world=1):
    """Bytes that training will hold at its fullest in one process, roughly: 16 or 18 a parameter (4 more where the gradients of
    several processes are averaged; a share of 16 with --shard, and what is gathered at a time: embedding, head and two blocks),
    what the backward pass reads of a batch, and the logits of one chunk of it."""
    c, n, bf16 = model.config, sum(p.numel() for p in model.parameters()), dtype == torch.bfloat16
    lean = args.accumulate == 1 and not model.recurrent and world == 1
    fixed = n * ((18 if bf16 and not lean else 16) + 4 * (world > 1))
    # gathered weights and their gradients in dtype, and these in float32 to be summed
    if args.shard:
        blocks = sum(p.numel() for p in model.layers.parameters())
        fixed = 16 * n / world + (8 if bf16 else 12) * (n - blocks + 2 * blocks / c.n_layer)
    tokens, size = args.batch_size * min(args.block_size, context(model)) // args.accumulate // world, 2 if bf16 else 4
    per_layer = 14 * c.n_embd + 5 * c.n_hidden
    if not model.recurrent and args.checkpointing:
        kept = tokens * size * (c.n_layer * c.n_embd + per_layer)
    else:
        kept = tokens * size * c.n_layer * per_layer
    return fixed + kept + min(tokens, 512) * c.vocab_size * size + c.vocab_size * c.n_embd * 4 * (not args.shard)


def memory_text(model, args, device, dtype, world=1):
    """A line on the memory that training needs, with a warning if the machine has less."""
    needed, there = memory_needed(model, args, dtype, world), None
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):                                            # one memory for all processes
        needed, there = needed * world, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{sum(p.numel() for p in model.parameters()):,} parameters: training needs about {needed / 1e9:.1f} GB of memory"
    if there and needed > there:
        words += (f", and this machine has {there / 1e9:.1f}. It will fail or crawl; take a smaller --batch-size or "
                  "--block-size, --checkpointing, or a smaller base")
    return words


def context(model):
    """The longest window a model can be trained on."""
    return math.inf if model.recurrent else model.config.block_size


# ------------------------------------------------------------------------------------------------- before and after

def is_embedded(tokenizer):
    """Whether its words are the embedded languages'."""
    return tokenizer.kind == "word" and tokenizer.unk is None


def held_out(name, tokenizer, n):
    """The first n documents of a corpus's test split as (text, ids)."""
    texts = []
    for text in data.documents(name, "test"):
        if text.strip():
            texts.append(text)
        if len(texts) == n:
            break
    try:
        read = [(text.replace(data.SEPARATOR, "").strip(), tokenizer.encode(text)) for text in texts]
    except ValueError as e:
        raise UserError(f"{name} cannot be read with the base's vocabulary: {e}. "
                        "Take a base that was trained with --tokenizer gpt2") from e
    read = [(text, ids) for text, ids in read if ids]
    if not read:
        raise UserError(f"{name} has no document to hold out: its last 5 % are the test split; take a longer text")
    return read


def retained_ids(name, tokenizer, most=20_000):
    """Tokens from the beginning of a text's validation split, behind the end token."""
    ids = []
    for text in data.documents(name, "valid"):
        try:
            ids += tokenizer.encode(text)
        except ValueError as e:
            raise UserError(f"--retain {name} cannot be read with the base's vocabulary: {e}. Name another text") from e
        if len(ids) >= most:
            break
    if len(ids) < 2:
        raise UserError(f"--retain {name} is too short")
    return prepend_eos(tokenizer, np.array(ids[:most]))


def measure(model, tokenizer, args, dtype):
    """All figures of a model: held-out documents, the text from outside, continuations."""
    documents = held_out(args.data, tokenizer, args.held_out)
    losses = losses_afresh(model, [ids for _, ids in documents], tokenizer.eos, dtype)
    each = [math.exp(min(v.mean(), 700)) for v in losses]
    out = {"documents": each, "mean": sum(each) / len(each), "corpus": math.exp(min(np.concatenate(losses).mean(), 700)),
           "tokens": sum(len(v) for v in losses), "retained": None, "samples": []}
    if args.retain:
        out["retained"] = perplexity(model, retained_ids(args.retain, tokenizer), dtype=dtype)
    for prompt in args.prompts:
        ids = encode_prompt(tokenizer, prompt)
        new = generate(model, [ids], args.sample_tokens, args.temperature, eos=tokenizer.eos, seed=args.seed,
                       suppressed_tokens=suppressed_tokens(tokenizer))
        out["samples"].append({"prompt": prompt, "text": tokenizer.decode(new[0]).strip()})
    return out


def grammar_floor(name, n, tokenizer):
    """The corpus perplexity of an embedded language's own grammar on its first n test documents; None for other corpora, and
    for models that do not read it in the grammar's words."""
    if name not in data.DOMAINS or not is_embedded(tokenizer):
        return None
    nll = [v for words, _ in data.embedded_documents(name, "test")[:n] for v in data.language(name).nll(words)]
    return math.exp(math.fsum(nll) / len(nll))


def write_report(args, result, figures):
    """report.md: Tables 3, 4 and 5, Figure 4, and what was kept."""
    before, after, run = result["before"], result["after"], Path(args.run)
    rows = [["mean of the documents' perplexities", before["mean"], after["mean"]],
            ["corpus perplexity", before["corpus"], after["corpus"]]]
    if before["retained"]:
        rows.append([f"{args.retain} (not trained on), perplexity", before["retained"]["ppl"], after["retained"]["ppl"]])
    md = [f"# {args.base} fine-tuned on {args.data}\n",
          f"{result['params']:,} parameters, {result['train_tokens']:,} training tokens "
          f"({100 * args.data_fraction:g} % of the text), {result['epochs']:.2f} epochs, {result['seconds']:.0f} s at "
          f"{number(result['tokens_per_second'], 0)} tokens/s, {result['dtype']}.\n",
          "## Perplexity before and after (Table 3)\n", table(["", "before", "after"], rows)]
    if result["floor"]:
        md.append(f"The grammar's own corpus perplexity on these documents, the floor: {result['floor']:.2f}.\n")
    texts = [text for text, _ in held_out(args.data, result["tokenizer"], min(20, args.held_out))]
    md += [f"{len(before['documents'])} held-out documents, each read afresh, {before['tokens']:,} tokens; "
           f"the first {len(texts)}:\n",
           table(["document", "before", "after"], [[text if len(text) <= 80 else text[:80] + " …", b, a]
                                                   for text, b, a in zip(texts, before["documents"], after["documents"])])]
    for k, (b, a) in enumerate(zip(before["samples"], after["samples"])):
        md += [f"## Continuations, prompt {k + 1}{(' (Table 4)', ' (Table 5)', '')[min(k, 2)]}\n",
               table(["", b["prompt"]], [["before", b["text"] or "(nothing)"], ["after", a["text"] or "(nothing)"]])]
    curve = Run(run.name, None, None, read_log(run / "log.csv"), {}, {})
    md += ["## Loss (Figure 4)\n", figures.draw("loss", "Loss while fine-tuning", paint_curves([curve]), panels=2)]
    write_atomically(run / "report.md", lambda f: f.write("\n".join(md).encode()))


# ------------------------------------------------------------------------------------------------------- a whole run

def first_share(ids, fraction, eos):
    """The first `fraction` of a text, to the end of a document: what 60 % have, 90 % have too."""
    n = int(len(ids) * fraction)
    ends = np.flatnonzero(np.asarray(ids[max(0, n - (1 << 16)):n]) == eos)
    return ids[:n if len(ends) == 0 or fraction == 1 else max(0, n - (1 << 16)) + int(ends[-1]) + 1]


def read_before(run):
    """What was measured before a run that goes on was started."""
    try:
        return json.loads((run / "before.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{run}/before.json is missing or damaged: without it nothing can be compared. "
                        "Start anew with another --run") from e


def tune(args, device, dtype, checkpoint=None, before=None, resume_hint=None):
    """Fine-tune as args say, into the folder args.run; -> what result.json holds."""
    run, resumed = Path(args.run), checkpoint is not None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank:
        dist.barrier()                                              # the first process downloads and encodes
    if resumed:
        kind, tokenizer, before = checkpoint["kind"], tokenizer_from(checkpoint["tokenizer"]), read_before(run)
        model = None if args.shard else build_model(kind, checkpoint["config"], checkpoint["model"]).to(device)
    else:
        model, tokenizer, _ = load_run(args.base, *(("cpu", None) if args.shard else (device, torch.float32)))
        kind = next(kind for kind, (model_type, _) in MODELS.items() if type(model) is model_type)
        settle(args, model, tokenizer, world)
    if args.shard:
        if kind != "transformer":
            raise UserError("--shard needs a Transformer for a base")
        weights, config = (checkpoint["model"], checkpoint["config"]) if resumed else (model.state_dict(), asdict(model.config))
        with torch.device("meta"):
            model = build_model(kind, config)                       # without memory until it is shared out
    if rank == 0:
        print(memory_text(model, args, device, dtype, world), file=sys.stderr)
    corpus = data.load(args.data, tokenizer, splits=("train", "valid"))
    if world > 1 and rank == 0:
        dist.barrier()
    check_text(corpus, resumed and checkpoint.get("fingerprint", "unknown"), run)
    train_ids = first_share(corpus.ids["train"], args.data_fraction, tokenizer.eos)
    cut = data.ContiguousBatches if model.recurrent else data.WindowBatches
    batches = cut(train_ids, args.batch_size, min(args.block_size, context(model)), args.seed)
    if not resumed and rank == 0:
        whole_model = load_run(args.base, device, dtype)[0] if args.shard else model
        before = before or measure(whole_model, tokenizer, args, dtype)
        del whole_model
        run.mkdir(parents=True, exist_ok=True)
        save_json(run / "before.json", before)
    valid = prepend_eos(tokenizer, np.asarray(corpus.ids["valid"][:args.eval_tokens]))
    evaluate = lambda: {"val": perplexity(model, valid, rows=eval_batch_size(valid), dtype=dtype)}
    trainer = FineTuner(args, kind, model, tokenizer, batches, evaluate, device, dtype)
    trainer.go_on = resume_hint or f"python finetune.py --resume --run {run}"
    trainer.fingerprint = corpus.fingerprint()
    trainer.warmup = min(args.warmup_steps, max(1, trainer.steps // 10))
    trainer.prompt = encode_prompt(tokenizer, args.prompts[0])
    if resumed:
        trainer.resume(checkpoint)
        checkpoint.clear()                                          # its memory is needed
    elif args.shard:
        trainer.load_weights(weights)
    weights = None
    trainer.open_log(resumed)
    trainer.show(f"{args.base} on {args.data}: {len(train_ids):,} training tokens, {trainer.steps} steps, {device.type} "
                 f"{str(dtype).removeprefix('torch.')}, {run}", "\n")
    trainer.fit()
    if rank:
        return None
    trainer.optimizer = trainer.copy = trainer.pairs = trainer.ddp_model = None        # their memory
    if args.shard:
        trainer.model = model = None
        model = build_model(kind, config)
    model.load_state_dict(read_checkpoint(run / "best.pt")["model"])
    if tokenizer.kind == "qwen2":
        save_model(model, tokenizer, run)
    after = measure((model.to(device, dtype) if args.shard else model).eval(), tokenizer, args, dtype)
    result = {"model": kind, "base": args.base, "data": args.data, "params": sum(p.numel() for p in model.parameters()),
              "train_tokens": len(train_ids), "epochs": trainer.step / batches.steps_per_epoch, "steps": trainer.step,
              "best_step": trainer.best_step, "seconds": trainer.seconds, "seed": args.seed, **environment(device),
              "tokens_per_second": trainer.step * trainer.tokens_per_step / trainer.step_seconds,
              "dtype": str(dtype).removeprefix("torch."), "val_ppl": math.exp(min(trainer.best, 700)),
              "floor": grammar_floor(args.data, args.held_out, tokenizer),
              "before": before, "after": after, "options": asdict(args)}
    write_report(args, result | {"tokenizer": tokenizer}, Figures(run))
    save_json(run / "result.json", result)                          # last: it says that the run is finished
    return result


def ablate(args, device, dtype):
    """Every cell of epochs x share of the data: a complete run with its own schedule, on the same held-out documents.
    A finished cell keeps its result and is not run again; one that was interrupted goes on."""
    folder, rows, before = Path(args.run), [], None
    varied = ("epochs", "data_fraction", "ablate_epochs", "ablate_fractions")
    settings = {k: v for k, v in asdict(args).items() if k not in (*varied, *LOCAL)}
    if (folder / "ablation.json").exists():
        for name, value in json.loads((folder / "ablation.json").read_text(encoding="utf-8")).items():
            if settings.get(name) != value:
                raise UserError(f"the table in {folder} was begun with {name} {value}, not {settings.get(name)}; "
                                "choose another folder with --run")
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "ablation.json", settings)
    grid = [(e, f) for e in args.ablate_epochs for f in args.ablate_fractions]
    for epochs, fraction in grid:
        cell = folder / f"epochs-{epochs:g}-share-{100 * fraction:g}"
        one = replace(args, epochs=epochs, data_fraction=fraction, run=str(cell), ablate=False)
        if (cell / "result.json").exists():
            result = json.loads((cell / "result.json").read_text(encoding="utf-8"))
        else:
            checkpoint = read_checkpoint(cell / "last.pt") if (cell / "last.pt").exists() else None
            if checkpoint:
                one = Config(**checkpoint["options"] | {"run": str(cell), "sample": args.sample})
            result = tune(one, device, dtype, checkpoint, before, "the same command again; finished cells are kept")
        for file in (*cell.glob("*.pt"), *cell.glob("*.safetensors")):         # the figures are what is kept
            file.unlink()
        before = result["before"]
        rows.append([f"{epochs:g}", f"{100 * fraction:g} %", result["after"]["mean"], result["after"]["corpus"],
                     result["after"]["retained"] and result["after"]["retained"]["ppl"], result["after"]["samples"][0]["text"]])
    header = ["epochs", "share of the data", "mean of the documents' perplexities", "corpus perplexity",
              f"{result['options']['retain'] or 'another text'}, not trained on", f"continues: {result['options']['prompts'][0]}"]
    rows.append(["none", "", before["mean"], before["corpus"], before["retained"] and before["retained"]["ppl"],
                 before["samples"][0]["text"]])
    text = f"# {args.base} fine-tuned on {args.data}: epochs and share of the data (Table 6)\n\n" + table(header, rows)
    if result["floor"]:
        text += f"\nThe grammar's own corpus perplexity on these documents, the floor: {result['floor']:.2f}.\n"
    write_atomically(folder / "report.md", lambda f: f.write(text.encode()))
    save_json(folder / "result.json", {"header": header, "rows": rows, **environment(device), "options": asdict(args)})
    print(table(header[:-1], [row[:-1] for row in rows]) + f"written to {folder}/report.md")


# ------------------------------------------------------------------------------------------------------ command line

def default_prompts(args, tokenizer):
    """One in the style of the data, one that has nothing to do with it."""
    if not is_embedded(tokenizer):
        return [STYLE_PROMPT, OTHER_PROMPT]
    own = args.data if args.data in data.DOMAINS else "stories"
    other = "finance" if own != "finance" else "stories"
    return [data.embedded_text(name, "test", 5) for name in (own, other)]


def settle(args, model, tokenizer, world):
    """Fill in what depends on the base; UserError for what does not go with it."""
    qwen2 = tokenizer.kind == "qwen2"
    for name, value in DEFAULTS[qwen2].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if model.recurrent and (args.accumulate > 1 or args.checkpointing):
        raise UserError("--accumulate and --checkpointing need a Transformer for a base")
    if args.batch_size % (args.accumulate * world):
        raise UserError(f"--batch-size {args.batch_size} cannot be cut into {args.accumulate * world} equal micro-batches")
    if not args.prompts:
        args.prompts = default_prompts(args, tokenizer)
    for prompt in args.prompts:
        if len(encode_prompt(tokenizer, prompt)) > context(model):
            raise UserError(f"the prompt {prompt!r} is longer than the base's context of {context(model)} tokens; "
                            "give shorter --prompts")
    if args.retain is None:
        args.retain = "wikitext2" if is_pretrained(args.base) or qwen2 else open_run(args.base, "cpu").corpus
        try:
            if args.retain == args.data:
                raise UserError("the base was trained on the same text; name another with --retain")
            retained_ids(args.retain, tokenizer)
        except UserError as e:
            print(f"nothing is measured from outside: {e}", file=sys.stderr)
            args.retain = ""


def main(argv=None):
    args, given = data.parse_args(Config, argv, "examples:\n  python finetune.py --base runs/transformer-finance --data "
                                  "stories\n  python finetune.py --base Qwen/Qwen2-0.5B --data tinystories --epochs 2 "
                                  "--run runs/stories")
    if args.shard and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise UserError("--shard splits a model across processes; start them with: "
                        "torchrun --nproc-per-node 2 -- finetune.py --shard")
    if args.ablate and ("RANK" in os.environ or args.steps):
        raise UserError("--ablate runs in one process, and its cells say how long")
    kind = "ablate" if args.ablate else "finetune"
    args.run = args.run or f"runs/{kind}-{Path(args.base).name}-{Path(args.data).stem}"
    checkpoint, an_ablation = None, (Path(args.run) / "ablation.json").exists()
    if args.resume and not args.ablate:
        checkpoint = read_checkpoint(Path(args.run) / "last.pt", "python finetune.py", mmap=args.shard)
        if "data_fraction" not in checkpoint.get("options", {}):
            raise UserError(f"{args.run} is not a run of finetune.py; "
                            f"python train.py --resume --run {args.run} may resume it")
        args = check_resume_config(args, given, checkpoint["options"])
    elif not an_ablation:
        refuse_existing(args.run, f"python finetune.py --resume --run {args.run}",
                        ("last.pt", "config.json", "result.json"))
    rank, world, device = join_processes(pick_device(args.device))
    dtype = pick_dtype(args.dtype, device)
    if args.ablate:
        return ablate(args, device, dtype)
    if an_ablation:
        raise UserError(f"{args.run} holds an ablation; choose another folder with --run")
    result = tune(args, device, dtype, checkpoint)
    if rank == 0:
        before, after = result["before"], result["after"]
        print(f"{args.base} on {args.data}: corpus perplexity {before['corpus']:.2f} before, {after['corpus']:.2f} after, "
              f"mean of documents {before['mean']:.2f}, {after['mean']:.2f}"
              + (f", {args.retain} {before['retained']['ppl']:.2f}, {after['retained']['ppl']:.2f}"
                 if before["retained"] else ""))
        print(f"written to {args.run}/report.md. Next: python sample.py --run {args.run}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
