"""Fine-tune all parameters of a trained language model on other text, and show what changed.

    python finetune.py --base Qwen/Qwen2-0.5B --data tinystories --run runs/stories     # downloads 1 GB once
    python finetune.py --base runs/transformer-finance --data stories                    # offline, a minute
    python finetune.py --base runs/transformer-finance --data stories --ablate    # epochs x share of the data
    python finetune.py --resume --run runs/stories                                       # after a kill
    torchrun --nproc-per-node 8 -- finetune.py --shard --base Qwen/Qwen2-7B --data tinystories

The base is a run of train.py, or Qwen2's weights (a folder in the hub's layout, or a name on the hub). The
loop is train.py's, its schedule and optimizer too; documents stand one behind the other
with their separator between them, as in nanoGPT, and a batch is windows of that text.

Precision. Weights and AdamW's two moments are float32. bfloat16 has eight significant bits: an update of less
than 1/512 of a weight would vanish if the weight were bfloat16, and with learning rates of 1e-5 nearly all
are. What is multiplied is a bfloat16 copy of the weights, which costs a quarter of their memory; its
gradients are bfloat16 too (that is what the products give), and are made float32 a few at a time when AdamW
reads them. In bytes per parameter:

    weights 4 + moments 8 + copy 2 + its gradients 2 = 16
    in float32: weights 4 + moments 8 + gradients 4 = 16

Gradients of several micro-batches (--accumulate) would be summed in bfloat16 and lose their low bits; then,
and under torchrun, autocast does the products and gradients are float32: 18 bytes. Under torchrun 4 more hold
the gradients that are being averaged.

Several processes. Under torchrun every process has all weights and some rows of each batch, and the gradients
are averaged (DistributedDataParallel). With --shard it also has only its share of weights, moments and
gradients, 16 bytes a parameter divided by the processes (FSDP2's fully_shard; Rajbhandari et al. 2020,
"ZeRO", stage 3): the weights of one block after the other are gathered in bfloat16, used and released,
forward and backward; gradients are summed in float32. Checkpoints are the same in all three cases, so that a
run resumes with any number of processes.

Measured before and after, always: each held-out document read independently (its perplexity, the mean of
these, and the corpus perplexity, all as eval.py defines them), the perplexity of a text from outside (what
was forgotten), and continuations of a prompt in the style of the data and of one that has nothing to do with
it, from the same seed.

Where each is:
    the bfloat16 copy, its gradients    make_bf16_model, bf16_grad_norm, step_with_bf16_gradients
    shares of weights and moments       shard_model, sharded_state, load_sharded_state
    the bytes                           memory_needed
    before and after                    measure; report (Tables 3 to 5), ablate (Table 6)
    a whole fine-tuning                 finetune, stages 3 to 8
"""
import copy
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import data
from data import UserError, option, save_json
from eval import exp, format_number, markdown_table, plot_curves, read_log, run_options, score, write_report
from qwen_load import read_json, save_model
from sample import encode_prompt, generate
from train import (COLUMNS, COMPUTED, LOCAL, Log, Progress, RunOptions, StopRequest, autocast,
                   average_gradients, base_result, broadcast, build_model, check_finite, check_text,
                   clip_grad_norm, complete_checkpoint, configure_optimizer, context, detach_state,
                   dtype_name, environment, eval_batch_size, extend, first_process_first, gather_state,
                   get_lr, job_errors, join_processes, kind_of, leave_processes, libc, load_optimizer,
                   load_run, mean_and_any, perplexity, pick_device, pick_dtype, prepend_eos, read_checkpoint,
                   refuse_existing, resume_command, resume_or_refuse, resumed_progress, sample_line,
                   save_checkpoint, set_lr, step_seed, stopped, take_rows, tokenizer_from, warn_of_unknown)
from transformer import use_layer_kernels

STYLE_PROMPT = ("A brave knight sets out on a journey to rescue a princess. Write the next sentence in "
                "TinyStories style.")
OTHER_PROMPT = "Climate change is"

# by base: pretrained (searched on SmolLM2-135M), a run of ours
DEFAULTS = {True: dict(lr=1e-4, batch_size=8, block_size=256),
            False: dict(lr=1e-3, batch_size=16, block_size=128)}


def by_base(name):
    return f"(default: {DEFAULTS[True][name]:g} for Qwen2, {DEFAULTS[False][name]:g} for a run of ours)"


@dataclass
class Config(RunOptions):
    """Fine-tune all parameters of a trained model on other text, and show what changed."""
    base: str = option("Qwen/Qwen2-0.5B", "a run of train.py; or Qwen2's weights: a folder, or their name on "
                                          "the hub, downloaded once (1 GB)")
    data: str = option("tinystories", f"{', '.join(data.CORPORA)}, or the path of a UTF-8 text file")
    epochs: float = option(2.0, "passes over the training text")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    data_fraction: float = option(0.9, "train on this first share of the text", above=0, at_most=1)
    ablate: bool = option(False, "a complete run for every pair of the next two, and a table")
    ablate_epochs: list[float] = option([1.0, 2.0], "epochs of the table")
    ablate_fractions: list[float] = option([0.6, 0.9], "shares of the data of the table", above=0, at_most=1)
    lr: float = option(None, f"highest learning rate {by_base('lr')}", group="the step")
    batch_size: int = option(None, f"windows of a batch {by_base('batch_size')}")
    block_size: int = option(None, f"tokens of a window, at most the base's context {by_base('block_size')}")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory")
    checkpointing: bool = option(False, "keep the inputs of layers only, compute the rest twice: less memory")
    shard: bool = option(False, "under torchrun: weights and moments are split across the processes")
    weight_decay: float = option(0.01, "AdamW's, on matrices", at_least=0)
    warmup_steps: int = option(100, "steps of linear warm-up, at most a tenth of all", at_least=0)
    log_every: int = option(10, "steps between rows of log.csv")
    eval_tokens: int = option(8192, "of the validation split, for the loss curve")
    sample: bool = option(True, "print a line that the model writes at every evaluation")
    held_out: int = option(200, "documents of the test split", group="before and after")
    retain: str = option(None, "a text that is not trained on (default: what the base was trained on; "
                               "wikitext2 for Qwen2)")
    prompts: list[str] = option([], "to continue (default: a knight's journey and the climate; for an "
                                    "embedded language the beginnings of a document of --data and of another "
                                    "one)")
    sample_tokens: int = option(60, "of a continuation")
    temperature: float = option(0.7, "of the continuations", at_least=0)


# --------------------------------------------------------------------------------------------------- the step

class TiedEmbedding(torch.nn.Module):
    """An embedding tied to the head. Its gradient is added to the head's when the backward pass is over, in
    float32 and for the tokens that occur only: autograd would make a matrix of all the vocabulary, and sum a
    frequent token's in bfloat16."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, tokens):
        self.tokens = tokens
        self.out = torch.nn.functional.embedding(tokens, self.weight.detach()).requires_grad_()
        return self.out

    def add_gradient(self):
        rows, index = self.tokens.flatten().unique(return_inverse=True)     # some tokens occur often
        grad = self.weight.grad[rows].float().index_add_(0, index, self.out.grad.flatten(0, 1).float())
        self.weight.grad[rows] = grad.to(self.weight.dtype)
        self.tokens = self.out = None


def make_bf16_model(model):
    """The copy that the products are done in; -> (bf16_model, [(master, bf16)] for every parameter)."""
    with torch.device("meta"):
        bf16_model = type(model)(model.config)
    bf16_model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=True)
    if model.config.tied:
        bf16_model.embed_tokens = TiedEmbedding(bf16_model.embed_tokens.weight)
        bf16_model.lm_head.weight = bf16_model.embed_tokens.weight
    return use_layer_kernels(bf16_model), list(zip(model.parameters(), bf16_model.parameters()))


@torch.no_grad()
def copy_master_to_bf16(pairs):
    for master, bf16 in pairs:
        bf16.copy_(master)


def bf16_grad_norm(bf16_model, pairs):
    """The norm of all gradients after a backward pass of the copy, whose embedding's are joined first."""
    if bf16_model.config.tied:
        bf16_model.embed_tokens.add_gradient()
    parts = [g for _, bf16 in pairs for g in bf16.grad.split(4096)]      # float32 is made of a part at a time
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in parts]).norm().item()


CHUNK = 20_000_000                              # parameters whose float32 gradients exist at a time


def step_with_bf16_gradients(optimizer, pairs, scale):
    """AdamW on the masters with the copy's gradients times scale, a few matrices after the other: those
    without a gradient are passed over."""
    if hasattr(libc, "malloc_trim"):         # glibc keeps what activations left behind: 0.7 GB for Qwen2-0.5B
        libc.malloc_trim(0)
    waiting, size = [], 0
    for k, (master, bf16) in enumerate(pairs):
        master.grad, bf16.grad = bf16.grad.float(), None
        if scale < 1:
            master.grad.mul_(scale)
        waiting.append((master, bf16))
        size += master.numel()
        if size >= CHUNK or k + 1 == len(pairs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            copy_master_to_bf16(waiting)
            waiting, size = [], 0


# -------------------------------------------------------- a model split across processes (--shard; skip this)
#
# States go through torch.distributed.checkpoint.state_dict, whole and on the first process's CPU. Model and
# optimizer are set by two calls: one for both waits forever where the other processes pass {}.

def shard_model(model, device, dtype, world):
    """fully_shard a model that has no memory yet: by layers, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.layers, model):                           # what is gathered and released at a time
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=device)


def renamed(state, names):
    """An optimizer's state with its parameters called by other names: names, {old: new}."""
    groups = [group | {"params": [names[name] for name in group["params"]],
                       "betas": tuple(group["betas"])}              # a list after a resume
              for group in state["param_groups"]]
    return {"state": {names[name]: v for name, v in state["state"].items()}, "param_groups": groups}


def sharded_state(model, optimizer):
    """(weights, optimizer state) as an unsharded run has them, on the first process; {} on the others."""
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                         get_optimizer_state_dict)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if state:                                                       # an unsharded run counts its parameters
        names = [name for group in state["param_groups"] for name in group["params"]]
        state = renamed(state, {name: k for k, name in enumerate(names)})
    return weights, state


def load_sharded_state(model, optimizer, weights, state=None):
    """The opposite; the first process's arguments count."""
    from torch.distributed.checkpoint.state_dict import (StateDictOptions, set_model_state_dict,
                                                         set_optimizer_state_dict)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    if state is None:
        return
    if state:
        by_id = {id(p): name for name, p in model.named_parameters()}
        names = [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]
        state = renamed(state, dict(enumerate(names)))
    optimizer.zero_grad(set_to_none=True)                           # torch allocates gradients for a moment
    set_optimizer_state_dict(model, optimizer, state, options=options)


# ----------------------------------------------------------------------------------------------------- memory

def bytes_of_layer(c, size):
    """What the backward pass of a layer reads of one token, numbers of `size` bytes."""
    return (14 * c.n_embd + 5 * c.n_hidden) * size


def memory_needed(model, config, dtype, world=1):
    """Bytes that training will hold at its fullest in one process, roughly: what a parameter takes (the head
    of this file), what the backward pass reads of a batch, and the logits of one chunk of it."""
    c, n, size = model.config, sum(p.numel() for p in model.parameters()), 2 if dtype == torch.bfloat16 else 4
    fixed = n * (16 + 2 * (size == 2 and not uses_bf16_model(model, config, dtype, world)) + 4 * (world > 1))
    if config.shard:                # gathered at a time: embedding, head, two blocks, and their gradients
        blocks = sum(p.numel() for p in model.layers.parameters())
        fixed = 16 * n / world + (4 + 2 * size) * (n - blocks + 2 * blocks / c.n_layer)
    tokens = config.batch_size * min(config.block_size, context(model)) // config.accumulate // world
    kept = c.n_layer * bytes_of_layer(c, size)
    if config.checkpointing:
        kept = c.n_layer * c.n_embd * size + bytes_of_layer(c, size)
    chunk = min(tokens, 512) * c.vocab_size * size + c.vocab_size * c.n_embd * 4 * (not config.shard)
    return fixed + tokens * kept + chunk


def memory_text(model, config, device, dtype, world=1):
    """A line on the memory that training needs, with a warning if the machine has less."""
    needed, there = memory_needed(model, config, dtype, world), None
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):                                            # one memory for all processes
        needed, there = needed * world, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n = sum(p.numel() for p in model.parameters())
    words = f"{n:,} parameters: training needs about {needed / 1e9:.1f} GB of memory"
    if there and needed > there:
        words += (f", and this machine has {there / 1e9:.1f}. It will fail or crawl; take a smaller "
                  "--batch-size or --block-size, --checkpointing, or a smaller base")
    return words


# ------------------------------------------------------------------------------------------- before and after

def is_embedded(tokenizer):
    """Whether its words are the embedded languages'."""
    return tokenizer.kind == "word" and tokenizer.unk is None


def held_out(name, n):
    """The first n documents of a corpus's test split, each with its end."""
    return list(islice((text for text in data.documents(name, "test") if text.strip()), n))


def retained_ids(name, tokenizer, most=20_000):
    """Tokens from the beginning of a text's validation split, behind the end token."""
    ids = []
    for text in data.documents(name, "valid"):
        try:
            ids += tokenizer.encode(text)
        except ValueError as e:
            raise UserError(f"--retain {name} cannot be read with the base's vocabulary: {e}. Name another "
                            "text") from e
        if len(ids) >= most:
            break
    if len(ids) < 2:
        raise UserError(f"--retain {name} is too short")
    return prepend_eos(tokenizer, np.array(ids[:most]))


def measure(model, tokenizer, config, dtype):
    """All figures of a model: held-out documents, the text from outside, continuations."""
    try:
        texts = held_out(config.data, config.held_out)
        scores = score(model, tokenizer, texts, dtype, ends=tokenizer.kind == "word")
    except ValueError as e:
        raise UserError(f"the test split of {config.data} cannot be read by the base: {e}. Take a longer "
                        "text, or a base that was trained with --tokenizer gpt2") from e
    out = {"documents": scores["sentences"], "retained": None, "samples": []}
    out |= {name: scores[name] for name in ("mean", "corpus", "tokens", "unknown")}
    if config.retain:
        out["retained"] = perplexity(model, retained_ids(config.retain, tokenizer), dtype=dtype)
    for prompt in config.prompts:
        new = generate(model, [encode_prompt(tokenizer, prompt)], config.sample_tokens, config.temperature,
                       eos=tokenizer.stops, seed=config.seed, suppressed_tokens=tokenizer.suppressed)
        out["samples"].append({"prompt": prompt, "text": tokenizer.decode(new[0]).strip()})
    return out


def grammar_floor(name, n, tokenizer):
    """The corpus perplexity of an embedded language's own grammar on its first n test documents; None for
    other corpora, and for models that do not read it in the grammar's words."""
    return data.embedded_floor(name, "test", n) if name in data.DOMAINS and is_embedded(tokenizer) else None


def report(config, result):
    """report.md: Tables 3, 4 and 5, Figure 4, and what was kept."""
    before, after, run = result["before"], result["after"], Path(config.run)
    rows = [("mean of the documents' perplexities", before["mean"], after["mean"]),
            ("corpus perplexity", before["corpus"], after["corpus"])]
    if before["retained"]:
        rows.append((f"{config.retain} (not trained on)", before["retained"]["ppl"],
                     after["retained"]["ppl"]))
    rows = [dict(zip(("", "before", "after"), row)) for row in rows]
    lines = [f"# {config.base} fine-tuned on {config.data}\n",
             f"{result['params']:,} parameters, {result['train_tokens']:,} training tokens "
             f"({100 * config.data_fraction:g} % of the text), {result['epochs']:.2f} epochs, "
             f"{result['seconds']:.0f} s at {format_number(result['tokens_per_second'], 0)} tokens/s, "
             f"{result['dtype']}.\n", "## Perplexity before and after (Table 3)\n", markdown_table(rows)]
    if result["floor"]:
        lines.append("The grammar's own corpus perplexity on these documents, the floor: "
                     f"{result['floor']:.2f}.\n")
    texts = [text.replace(data.SEPARATOR, "").strip() for text in held_out(config.data, 20)]
    rows = [{"document": text if len(text) <= 80 else text[:80] + " …", "before": b, "after": a}
            for text, b, a in zip(texts, before["documents"], after["documents"])]
    lines += [f"{len(before['documents'])} held-out documents, each scored independently, "
              f"{before['tokens']:,} tokens, {before['unknown']:.1%} of them <unk>; the first "
              f"{len(rows)}:\n", markdown_table(rows)]
    for k, (b, a) in enumerate(zip(before["samples"], after["samples"])):
        lines += [f"## Continuations, prompt {k + 1}{(' (Table 4)', ' (Table 5)', '')[min(k, 2)]}\n",
                  markdown_table([{"": when, b["prompt"]: sample["text"] or "(nothing)"}
                                  for when, sample in (("before", b), ("after", a))])]
    plot_curves({run.name: read_log(run / "log.csv")}, run / "loss.png")
    write_report(run, [*lines, "## Loss (Figure 4)\n", "![Loss while fine-tuning](loss.png)\n"])


# ------------------------------------------------------------------------------------------------ a whole run

def first_share(ids, fraction, eos):
    """The first `fraction` of a text, to the end of a document: what 60 % have, 90 % have too."""
    n = int(len(ids) * fraction)
    start = max(0, n - (1 << 16))                               # where a last document's end is looked for
    ends = np.flatnonzero(np.asarray(ids[start:n]) == eos)
    return ids[:n if len(ends) == 0 or fraction == 1 else start + int(ends[-1]) + 1]


def uses_bf16_model(model, config, dtype, world):
    """Whether the products are done in a bfloat16 copy; else autocast does them, if they are bfloat16."""
    return dtype == torch.bfloat16 and world == 1 and config.accumulate == 1 and not model.recurrent


def finetune(config, model, tokenizer, corpus, device, dtype, rank=0, world=1, checkpoint=None, before=None,
             resume_hint=None):
    """Fine-tune as config says, into the folder config.run; -> what its result.json holds. model: the base,
    which is trained in place; on the meta device with --shard, and only its config counts where a run
    resumes."""
    run = Path(config.run)
    if rank == 0:
        print(memory_text(model, config, device, dtype, world), file=sys.stderr)

    # 3 data: windows of the first share of the text; what is measured before
    train_ids = first_share(corpus.ids["train"], config.data_fraction, tokenizer.eos)
    cut = data.ContiguousBatches if model.recurrent else data.WindowBatches
    batches = cut(train_ids, config.batch_size, min(config.block_size, context(model)), config.seed)
    valid = prepend_eos(tokenizer, np.asarray(corpus.ids["valid"][:config.eval_tokens]))
    prompt = encode_prompt(tokenizer, config.prompts[0])
    if rank == 0:
        if checkpoint and (run / "before.json").exists():
            before = read_json(run / "before.json")
        elif not before:
            base = load_run(config.base, device, dtype)[0] if config.shard or checkpoint else model
            before = measure(base, tokenizer, config, dtype)
            warn_of_unknown(before["unknown"], f"the held-out text of {config.data}")
            del base
        save_json(run / "before.json", before)

    # 4 model: the products' bfloat16 copy, or shards, or a copy in every process
    bf16_model = None
    if config.shard:
        shard_model(model, device, dtype, world)
    elif uses_bf16_model(model, config, dtype, world):
        bf16_model, pairs = make_bf16_model(model)
    ddp_model = model if config.shard else average_gradients(model, device, world)
    (bf16_model or model).checkpointing = config.checkpointing

    # 5 optimizer
    optimizer = configure_optimizer(model, config.lr, config.weight_decay)
    steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
    warmup_steps = min(config.warmup_steps, max(1, steps // 10))
    progress = Progress(steps, config.eval_every or -(-steps // 20))

    # 6 resume
    state = None                                             # of a recurrent model, carried from step to step
    if checkpoint:
        with complete_checkpoint(run):
            if config.shard:
                load_sharded_state(model, optimizer, checkpoint["model"], checkpoint["optimizer"])
            else:
                model.load_state_dict(checkpoint["model"])
                load_optimizer(optimizer, checkpoint["optimizer"])
            state = take_rows(checkpoint["state"], rank, world, device)
            progress = resumed_progress(run, checkpoint, config)
        if checkpoint.get("extended"):
            extend(run, progress, steps, config.lr, warmup_steps)
        checkpoint.clear()                                          # its memory is needed
    elif config.shard:
        load_sharded_state(model, optimizer,
                           load_run(config.base, "cpu", None)[0].state_dict() if rank == 0 else {})
    steps = progress.steps
    if bf16_model:
        copy_master_to_bf16(pairs)

    # 7 loop
    if rank == 0:
        log = Log(run, COLUMNS, progress.resumed_at)
    data.live(f"{config.base} on {config.data}: {len(train_ids):,} training tokens, {steps} steps, "
              f"{device.type} {dtype_name(dtype)}, {run}", "\n")
    model.train()
    clock, loss, metrics, stopping = time.perf_counter() - progress.seconds, math.nan, {}, False
    with StopRequest() as stop, job_errors(run, progress, world):
        for step in range(progress.step, steps + 1):
            # evaluate, log, save
            progress.seconds, better = time.perf_counter() - clock, False
            evaluating = progress.due(progress.eval_every)
            if evaluating:
                scores = (perplexity(model, valid, rows=eval_batch_size(valid), dtype=dtype)
                          if rank == 0 or config.shard else None)
                scores = broadcast(scores, world, device)
                check_finite(run, f"step {step}", validation_loss=scores["nll"])
                better = progress.is_best(scores["nll"])
                progress.seconds = time.perf_counter() - clock
                metrics |= {"val_loss": scores["nll"], "val_ppl": scores["ppl"]}
            if rank == 0 and (evaluating or progress.due(config.log_every)):
                log.write(progress.row(batches) | metrics)
            if step > 0 and (evaluating or stopping):
                rows = gather_state(state, world)                   # of all processes
                states = (sharded_state(model, optimizer) if config.shard
                          else (model.state_dict(), optimizer.state_dict()))
                if rank == 0:
                    save_checkpoint(config, model, tokenizer, states, progress, better, state=rows,
                                    fingerprint=corpus.fingerprint())
                states = None                                       # their memory
            if evaluating and step > 0 and rank == 0:
                star = " *" if better else ""
                data.live(f"{progress}  loss {loss:.3f}  val ppl {scores['ppl']:.2f}{star}", "\n")
                if config.sample and not config.shard:
                    data.live("    " + sample_line(model, tokenizer, prompt, config.seed), "\n")
            if step == steps:
                break
            if stopping:
                stopped(progress, resume_hint or resume_command("python finetune.py", run, world), world)

            # one step
            started = time.perf_counter()
            torch.manual_seed(step_seed(config.seed, step, rank))           # of dropout
            lr = get_lr(step, steps, config.lr, warmup_steps)
            set_lr(optimizer, lr)
            if not model.recurrent or batches.is_epoch_start(step):
                state = None
            x, y = batches.batch(step)                              # [B, T] each, y one token later
            x, y = x.chunk(world)[rank].to(device), y.chunk(world)[rank].to(device)
            if bf16_model:
                loss, _ = bf16_model(x, targets=y)                  # mean nats per token
                loss.backward()
                loss, grad_norm = loss.item(), bf16_grad_norm(bf16_model, pairs)
                check_finite(run, f"step {step}", loss=loss, gradient_norm=grad_norm)
                step_with_bf16_gradients(optimizer, pairs, min(1.0, config.grad_clip / (grad_norm + 1e-6)))
            else:
                loss = 0.0
                for x_part, y_part in zip(x.chunk(config.accumulate), y.chunk(config.accumulate)):
                    with autocast(device, dtype):
                        part, state = ddp_model(x_part, state, targets=y_part)
                    part = part / config.accumulate
                    part.backward()
                    loss += part.item()
                state = detach_state(state)                  # truncated BPTT: values are kept, gradients stop
                grad_norm = clip_grad_norm(model.parameters(), config.grad_clip)
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
    optimizer = bf16_model = pairs = ddp_model = None               # their memory
    if config.shard:
        model = build_model(kind_of(model), asdict(model.config))
    model.load_state_dict(read_checkpoint(run / "best.pt")["model"])
    if tokenizer.kind == "qwen2":
        save_model(model, tokenizer, run)
    after = measure((model.to(device, dtype) if config.shard else model).eval(), tokenizer, config, dtype)
    result = base_result(config, model, progress, device, dtype) | {
        "base": config.base, "train_tokens": len(train_ids), "epochs": steps / batches.steps_per_epoch,
        "tokens_per_second": progress.tokens_per_second(batches), "val_ppl": exp(progress.best),
        "floor": grammar_floor(config.data, config.held_out, tokenizer), "before": before, "after": after}
    report(config, result)
    save_json(run / "result.json", result)                          # last: it says that the run is complete
    return result


def ablate(config, base, tokenizer, corpus, device, dtype):
    """Every cell of epochs x share of the data: a complete run with its own schedule, on the same held-out
    documents. A finished cell keeps its result and is not run again; one that was interrupted resumes."""
    folder, rows, before = Path(config.run), [], None
    varied = ("epochs", "data_fraction", "ablate_epochs", "ablate_fractions")
    settings = {k: v for k, v in asdict(config).items() if k not in (*varied, *LOCAL, *COMPUTED)}
    begun = read_json(folder / "ablation.json") if (folder / "ablation.json").exists() else settings
    for name, value in begun.items():
        if settings.get(name) != value:
            raise UserError(f"the table in {folder} was begun with {name} {value}, not {settings.get(name)}; "
                            "choose another folder with --run")
    save_json(folder / "ablation.json", settings)

    def row(epochs, share, measured):
        kept, sample = measured["retained"], measured["samples"][0]
        return {"epochs": epochs, "share of the data": share,
                "mean of the documents' perplexities": measured["mean"],
                "corpus perplexity": measured["corpus"],
                f"{config.retain or 'another text'}, not trained on": kept and kept["ppl"],
                f"continues: {sample['prompt']}": sample["text"]}
    for epochs, fraction in [(e, f) for e in config.ablate_epochs for f in config.ablate_fractions]:
        cell = folder / f"epochs-{epochs:g}-share-{100 * fraction:g}"
        if (cell / "result.json").exists():
            result = read_json(cell / "result.json")
        else:
            checkpoint = read_checkpoint(cell / "last.pt") if (cell / "last.pt").exists() else None
            check_text(corpus, checkpoint, cell)
            one = replace(config, epochs=epochs, data_fraction=fraction, run=str(cell), ablate=False)
            result = finetune(one, copy.deepcopy(base), tokenizer, corpus, device, dtype,
                              checkpoint=checkpoint, before=before,
                              resume_hint="the same command again; finished cells are kept")
        for file in (*cell.glob("*.pt"), *cell.glob("*.safetensors")):         # the figures are what is kept
            file.unlink()
        before = result["before"]
        rows.append(row(f"{epochs:g}", f"{100 * fraction:g} %", result["after"]))
    rows.append(row("none", "", before))
    lines = [f"# {config.base} fine-tuned on {config.data}: epochs and share of the data (Table 6)\n",
             markdown_table(rows)]
    if floor := result["floor"]:
        lines.append(f"The grammar's corpus perplexity on these documents, the floor: {floor:.2f}.\n")
    write_report(folder, lines)
    save_json(folder / "result.json", {"rows": rows, **environment(device), "options": asdict(config)})
    print(markdown_table([dict(list(r.items())[:-1]) for r in rows]) + f"written to {folder}/report.md")


# ----------------------------------------------------------------------------------------------- command line

def default_prompts(config, tokenizer):
    """One in the style of the data, one that has nothing to do with it."""
    if not is_embedded(tokenizer):
        return [STYLE_PROMPT, OTHER_PROMPT]
    own = config.data if config.data in data.DOMAINS else "stories"
    other = "finance" if own != "finance" else "stories"
    return [data.embedded_text(name, "test", 5) for name in (own, other)]


def resolve_defaults(config, model, tokenizer):
    """Fill in what depends on the base; UserError for what does not go with it."""
    qwen2 = tokenizer.kind == "qwen2"
    for name, value in DEFAULTS[qwen2].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if model.recurrent and (config.accumulate > 1 or config.checkpointing):
        raise UserError("--accumulate and --checkpointing need a Transformer for a base")
    config.prompts = config.prompts or default_prompts(config, tokenizer)
    for prompt in config.prompts:
        if len(encode_prompt(tokenizer, prompt)) > context(model):
            raise UserError(f"the prompt {prompt!r} is longer than the base's context of {context(model)} "
                            "tokens; give shorter --prompts")
    if config.retain is None:
        config.retain = "wikitext2" if qwen2 else run_options(config.base)[1].get("data", "")
        try:
            if config.retain == config.data:
                raise UserError("the base was trained on the same text; name another with --retain")
            retained_ids(config.retain, tokenizer)
        except UserError as e:
            print(f"nothing is measured from outside: {e}", file=sys.stderr)
            config.retain = ""


def open_base(config, device, checkpoint, world):
    """The model to train and its tokenizer: the base, or that of a checkpoint; without memory with
    --shard."""
    if checkpoint:
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
        with torch.device("meta" if config.shard else device):
            model = build_model(checkpoint["kind"], checkpoint["config"])
    else:
        where = ("cpu", None) if config.shard else (device, torch.float32)
        model, tokenizer, _ = load_run(config.base, *where)
        resolve_defaults(config, model, tokenizer)
        if config.shard:
            with torch.device("meta"):
                model = build_model(kind_of(model), asdict(model.config))
    if config.shard and model.recurrent:
        raise UserError("--shard needs a Transformer for a base")
    if config.batch_size % (config.accumulate * world):
        raise UserError(f"--batch-size {config.batch_size} cannot be cut into {config.accumulate * world} "
                        "equal micro-batches")
    return model, tokenizer


def main(argv=None):
    # 1 options
    config, given = data.parse_args(Config, argv, "examples:\n"
        "  python finetune.py --base runs/transformer-finance --data stories\n"
        "  python finetune.py --base Qwen/Qwen2-0.5B --data tinystories --epochs 2 --run runs/stories")
    if config.shard and data.job_size() < 2:
        raise UserError("--shard splits a model across processes; start them with: "
                        "torchrun --nproc-per-node 2 -- finetune.py --shard")
    if config.ablate and (data.job_size() > 1 or config.steps):
        raise UserError("--ablate runs in one process, and its cells say how long")
    kind, checkpoint = "ablate" if config.ablate else "finetune", None
    config.run = config.run or f"runs/{kind}-{data.file_name(config.base)}-{data.file_name(config.data)}"
    files = ("last.pt", "result.json", "config.json")
    if not config.ablate:
        checkpoint, config = resume_or_refuse(config, given, "python finetune.py", {"data", "base"},
                                              (*files, "ablation.json"))
    elif not (Path(config.run) / "ablation.json").exists():
        refuse_existing(config.run, "python finetune.py", files)

    # 2 device and processes
    rank, world, device = join_processes(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)

    # 3 data and base
    with first_process_first(rank, world):                          # it downloads and encodes
        model, tokenizer = open_base(config, device, checkpoint, world)
        corpus = data.load(config.data, tokenizer, splits=("train", "valid"))
    check_text(corpus, checkpoint, config.run)
    if config.ablate:
        return ablate(config, model, tokenizer, corpus, device, dtype)
    result = finetune(config, model, tokenizer, corpus, device, dtype, rank, world, checkpoint)
    if rank == 0:
        before, after = result["before"], result["after"]
        retained = (f", {config.retain} {before['retained']['ppl']:.2f}, {after['retained']['ppl']:.2f}"
                    if before["retained"] else "")
        print(f"{config.base} on {config.data}: corpus perplexity {before['corpus']:.2f} before, "
              f"{after['corpus']:.2f} after, mean of documents {before['mean']:.2f}, "
              f"{after['mean']:.2f}{retained}")
        print(f"written to {config.run}/report.md. Next: python sample.py --run {data.quoted(config.run)}")
    leave_processes(world)


if __name__ == "__main__":
    data.run_main(main)
