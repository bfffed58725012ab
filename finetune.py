"""Fine-tune all parameters of a trained language model on other text, and report what changed.

    python finetune.py --base Qwen/Qwen2-0.5B --data tinystories --run runs/stories     # downloads 1 GB once
    python finetune.py --base runs/transformer-finance --data stories                    # offline, a minute
    python finetune.py --base runs/transformer-finance --data stories --ablate    # epochs x share of the data
    python finetune.py --resume --run runs/stories                                       # after a kill
    torchrun --nproc-per-node 8 --standalone -- finetune.py --shard --base Qwen/Qwen2-7B --data tinystories

The base is a run of train.py, or Qwen2's weights (a folder in the hub's layout, or a name on the hub). The
training is that of train.py, but it starts from the weights of the base. The documents of the text follow
each other with a separator between them, as in nanoGPT, and a batch holds windows of that text.

Precision. Weights and AdamW's two moments are float32. Products are bfloat16 if the hardware has them, and
autocast casts the weights for each product. bfloat16 has eight significant bits: an update of less than 1/512
of a weight would vanish if the weight were bfloat16, and at these learning rates most updates are smaller. A
parameter takes 4 bytes for the weight, 8 for the moments, 4 for the gradient and 2 for the cast: 18 in all.

Several processes. Under torchrun every process has all weights and some rows of each batch, and the gradients
are averaged (DistributedDataParallel). With --shard a process keeps only a part of the weights, moments and
gradients (FSDP2's fully_shard; Rajbhandari et al. 2020, "ZeRO", stage 3): forward and backward gather the
weights of one layer at a time in bfloat16, use them and release them, and gradients are summed in float32.
Checkpoints are the same in all three cases, so a run resumes with any number of processes.

The report compares the model before and after: the perplexity of held-out documents, each read on its own
(eval.py defines the figures); the perplexity of a text that the training does not see, which shows what was
forgotten; and continuations of two prompts with the same seed, one in the style of the data and one not.

Where to find what:
    a whole fine-tuning                 finetune: stages 3, 4 and 8; train.train: stages 5 to 7
    shares of weights and moments       shard_model
    before and after                    measure; report (Tables 3 to 5), ablate (Table 6)
"""
import copy
import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import data
from data import RANK, WORLD, UserError, option, prepend_eos, read_json, save_json
from eval import (draw, format_number, markdown_table, perplexities, plot_curves, read_log, run_options,
                  write_report)
from fast.layer import speed_up
from qwen_load import save_model
from sample import (build_model, context_length, count_parameters, encode_prompt, generate, kind_of, load_run,
                    pick_device, pick_dtype, tokenizer_from, trained_on)
from train import (RunOptions, check_rows, check_text, claim_folder, environment, evaluate, finished_trial,
                   first_process_first, join_processes, leave_processes, perplexity,
                   perplexity_of, resume_or_refuse, shard_as, train, warn_of_unknown)

STYLE_PROMPT = ("A brave knight sets out on a journey to rescue a princess. Write the next sentence in "
                "TinyStories style.")
OTHER_PROMPT = "Climate change is"

# "qwen2": for a pretrained base (searched on SmolLM2-135M); "own": for a run of train.py
DEFAULTS = {"qwen2": dict(lr=1e-4, batch_size=8, block_size=256),
            "own": dict(lr=1e-3, batch_size=16, block_size=128)}


def by_base(defaults, name):
    """The words of --help for a default that depends on the base."""
    return f"(default: {defaults['qwen2'][name]:g} for Qwen2, {defaults['own'][name]:g} for a run of ours)"


@dataclass
class Config(RunOptions):
    """Fine-tune all parameters of a trained model on other text, and report what changed."""
    script = "python finetune.py"
    base: str = option("Qwen/Qwen2-0.5B", "a run; or Qwen2's weights: a folder, or their name on the hub")
    data: str = option("tinystories", f"{', '.join(data.CORPORA)}, or the path of a UTF-8 text file")
    epochs: float = option(None, "passes over the training text (default: 2)")
    steps: int = option(None, "optimizer steps, instead of --epochs")
    data_fraction: float = option(0.9, "train on this share of the text, from its beginning", above=0,
                                  at_most=1)
    ablate: bool = option(False, "a complete run for each pair of the next two options, and a table of them")
    ablate_epochs: list[float] = option([1.0, 2.0], "epochs, for --ablate")
    ablate_fractions: list[float] = option([0.6, 0.9], "shares of the data, for --ablate", above=0, at_most=1)
    lr: float = option(None, f"highest learning rate {by_base(DEFAULTS, 'lr')}", group="the step")
    batch_size: int = option(None, f"windows of a batch {by_base(DEFAULTS, 'batch_size')}")
    block_size: int = option(None, "tokens of a window, at most the base's context "
                                   f"{by_base(DEFAULTS, 'block_size')}")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory")
    checkpointing: bool = option(False, "keep only the inputs of layers and compute the rest twice: less "
                                        "memory")
    shard: bool = option(False, "under torchrun, split weights and moments across the processes")
    weight_decay: float = option(0.01, "weight decay of AdamW, on matrices", at_least=0)
    warmup_steps: int = option(100, "steps of linear warm-up, at most a tenth of all", at_least=0)
    log_every: int = option(10, "steps between rows of log.csv")
    eval_tokens: int = option(8192, "tokens of the validation split that an evaluation reads")
    sample: bool = option(True, "print a line that the model writes at every evaluation")
    held_out: int = option(200, "documents of the test split to score", group="before and after")
    retain: str = option(None, "another text, to see how much is forgotten (default: the validation split of "
                               "the base's text; wikitext2 for Qwen2)")
    prompts: list[str] = option([], "prompts to continue (default: one like the text of --data, and another)")
    sample_tokens: int = option(60, "length of a continuation")
    temperature: float = option(0.7, "temperature of the continuations", at_least=0)


# ----------------------------------------------------------------------------------------- memory and shards

def memory_line(model, shard):
    """How much memory a training needs in each process, by the sum at the top of this file."""
    n, parts = count_parameters(model), WORLD if shard else 1
    return (f"{n:,} parameters: training needs about {18 * n / parts / 1e9:.1f} GB of memory, and activations"
            " (less with --accumulate, --checkpointing, a smaller --block-size)")


def shard_model(model, weights, device):
    """Shard a model on the meta device layer by layer, and give it the weights of the first process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=model.product_dtype, reduce_dtype=torch.float32)
    for module in (*model.layers, model):                           # the units that are gathered and released
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=device)
    for name, p in model.state_dict().items():
        value = weights[name] if RANK == 0 else torch.empty(p.shape)
        p.to_local().copy_(shard_as(value, p).to_local())


# ------------------------------------------------------------------------------------------- before and after

def is_embedded(tokenizer):
    """Whether a tokenizer has the words of the embedded languages."""
    return tokenizer.kind == "word" and tokenizer.unk is None


def held_out(name, n):
    """The first n documents of the test split of a corpus, each with its end."""
    texts = data.documents(name, "test")
    return list(itertools.islice((text for text in texts if text.replace(data.SEPARATOR, "").strip()), n))


def retained_ids(name, tokenizer, base, most=20_000):
    """The first tokens of the part of a text that the base has not seen, with the end token before them."""
    ids = []
    for text in data.documents(name, data.unseen_split(name, trained_on(base))):
        ids += tokenizer.encode(text)
        if len(ids) >= most:
            break
    if len(ids) < 2:
        raise UserError(f"--retain {name} is too short")
    return prepend_eos(tokenizer, ids[:most])


def measure(model, tokenizer, config):
    """All figures of a model: held-out documents, the text that is not trained on, continuations."""
    texts = held_out(config.data, config.held_out)
    scores = perplexities(model, tokenizer, texts)
    out = {"documents": scores["sentences"], "retained": None, "samples": []}
    out |= {name: scores[name] for name in ("mean", "corpus", "tokens", "unknown")}
    if config.retain:
        out["retained"] = perplexity(model, retained_ids(config.retain, tokenizer, config.base))
    for prompt in config.prompts:
        new = generate(model, [encode_prompt(tokenizer, prompt)], config.sample_tokens, config.temperature,
                       eos=tokenizer.stops, seed=config.seed, suppressed_tokens=tokenizer.suppressed)
        out["samples"].append({"prompt": prompt, "text": tokenizer.decode(new[0]).strip()})
    return out


def grammar_floor(name, n, tokenizer):
    """The grammar's own corpus perplexity on n test documents; None if the model does not read its words."""
    return data.embedded_floor(name, "test", n) if name in data.DOMAINS and is_embedded(tokenizer) else None


def report(config, result):
    """Write report.md: Tables 3, 4 and 5, and Figure 4."""
    before, after, run = result["before"], result["after"], Path(config.run)
    rows = [{"": label, "before": before[name], "after": after[name]} for name, label in
            (("mean", "mean of the documents' perplexities"), ("corpus", "corpus perplexity"))]
    if before["retained"]:
        is_own = data.resolved(config.retain) in trained_on(config.base)
        label = f"{config.retain} ({'its validation split, ' if is_own else ''}not trained on)"
        rows.append({"": label, "before": before["retained"]["ppl"], "after": after["retained"]["ppl"]})
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
    chose = "" if data.has_test_split(config.data) else " (of the split that chose the weights)"
    lines += [f"{len(before['documents'])} held-out documents{chose}, each scored independently, "
              f"{before['tokens']:,} tokens, {before['unknown']:.1%} of them <unk>; the first "
              f"{len(rows)}:\n", markdown_table(rows)]
    for k, (b, a) in enumerate(zip(before["samples"], after["samples"])):
        lines += [f"## Continuations, prompt {k + 1}{(' (Table 4)', ' (Table 5)', '')[min(k, 2)]}\n",
                  markdown_table([{"": when, b["prompt"]: sample["text"] or "(nothing)"}
                                  for when, sample in (("before", b), ("after", a))])]
    log = {run.name: read_log(run / "log.csv")}
    if figure := draw("Loss while fine-tuning", plot_curves, log, run / "loss.png"):
        lines += ["## Loss (Figure 4)\n", figure]
    write_report(run, lines)


# ------------------------------------------------------------------------------------------------ a whole run

def finetune(config, model, tokenizer, corpus, checkpoint=None, before=None):
    """Fine-tune as config says, into the folder config.run; -> the content of its result.json. model: the
    base or, of a run that resumes, the saved model; it is trained in place. before: the figures of the base,
    if they are known."""
    # 3 data: windows of the first share of the text
    folder, device, product_dtype = Path(config.run), pick_device(config.device), model.product_dtype
    train_ids = data.first_share(corpus.ids["train"], config.data_fraction, tokenizer.eos)
    block_size = min(config.block_size, context_length(model))
    batches = data.batches_of(model, train_ids, config.batch_size, block_size, config.seed)
    valid = prepend_eos(tokenizer, corpus.ids["valid"][:config.eval_tokens])
    steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
    warmup_steps = min(config.warmup_steps, max(1, steps // 10))

    with claim_folder(config):
        data.show(memory_line(model, config.shard), "\n")
        # figures before
        if RANK == 0:
            if config.resume:
                before = read_json(folder / "before.json", {})
            if not before:
                base = open_as(config.base, device, product_dtype) if config.shard or checkpoint else model
                before = measure(base, tokenizer, config)
                del base
            warn_of_unknown(before["unknown"], f"the held-out text of {config.data}")
            save_json(folder / "before.json", before)

        # 4 model
        model.checkpointing = config.checkpointing
        if config.shard:
            weights = None
            if checkpoint:
                weights = checkpoint["model"]
            elif RANK == 0:
                weights = load_run(config.base)[0].state_dict()
            shard_model(model, weights, device)
            del weights

        # 5 to 7: the loop of train.py
        prompt = encode_prompt(tokenizer, config.prompts[0]) if config.sample and not config.shard else ()
        run = train(config, model, tokenizer, batches, lambda: evaluate(model, {"valid": valid}),
                    warmup_steps, checkpoint, prompt)
    if RANK:
        return None

    # 8 results
    model = open_as(folder, device, product_dtype)                  # the best weights
    if tokenizer.kind == "qwen2":
        save_model(model, tokenizer, folder)
    after = measure(model, tokenizer, config)
    result = run.result(model) | {
        "base": config.base, "train_tokens": len(train_ids), "epochs": run.steps / batches.steps_per_epoch,
        "tokens_per_second": run.tokens_per_second, "val_ppl": perplexity_of(run.best),
        "floor": grammar_floor(config.data, config.held_out, tokenizer), "before": before, "after": after}
    report(config, result)
    save_json(folder / "result.json", result)                       # last: it says that the run is complete
    return result


# The evening's reading of this file ends here.

def ablate(config, base, tokenizer, corpus):
    """Train a complete run with its own schedule for every pair of epochs and share of the data, on the same
    held-out documents. A finished run keeps its result and is not run again."""
    folder, rows, before = Path(config.run), [], None
    if (folder / "last.pt").exists() or "rows" not in read_json(folder / "result.json", {"rows": []}):
        raise UserError(f"{folder} already holds a run; choose another folder with --run")

    def row(epochs, share, measured):
        retained, sample = measured["retained"], measured["samples"][0]
        return {"epochs": epochs, "share of the data": share,
                "mean of the documents' perplexities": measured["mean"],
                "corpus perplexity": measured["corpus"],
                f"{config.retain or 'another text'}, not trained on": retained and retained["ppl"],
                f"continues: {sample['prompt']}": sample["text"]}
    for epochs, fraction in itertools.product(config.ablate_epochs, config.ablate_fractions):
        path = folder / f"epochs-{epochs:g}-share-{100 * fraction:g}"
        cell = replace(config, epochs=epochs, data_fraction=fraction, run=str(path), ablate=False)
        result = finished_trial(cell)
        if result is None:
            result = finetune(cell, copy.deepcopy(base), tokenizer, corpus, before=before)
        for file in (*path.glob("*.pt"), *path.glob("*.safetensors")):         # only the figures are kept
            file.unlink()
        before = result["before"]
        rows.append(row(f"{epochs:g}", f"{100 * fraction:g} %", result["after"]))
    rows.append(row("none", "", before))
    lines = [f"# {config.base} fine-tuned on {config.data}: epochs and share of the data (Table 6)\n",
             markdown_table(rows)]
    if floor := result["floor"]:
        lines.append(f"The grammar's corpus perplexity on these documents, the floor: {floor:.2f}.\n")
    write_report(folder, lines)
    save_json(folder / "result.json", {"rows": rows, **environment(base), "options": asdict(config)})
    print(markdown_table([dict(list(r.items())[:-1]) for r in rows]) + f"written to {folder}/report.md")


# ----------------------------------------------------------------------------------------------- command line

def default_prompts(config, tokenizer):
    """A prompt in the style of the data, and one that has nothing to do with it."""
    if not is_embedded(tokenizer):
        return [STYLE_PROMPT, OTHER_PROMPT]
    own = config.data if config.data in data.DOMAINS else "stories"
    other = "finance" if own != "finance" else "stories"
    return [data.embedded_text(name, "test", 5) for name in (own, other)]


def resolve_defaults(config, model, tokenizer):
    """Fill in the options that depend on the base. UserError for an option that the base cannot have."""
    qwen2 = tokenizer.kind == "qwen2"
    if not config.steps:
        config.epochs = config.epochs or 2.0
    for name, value in DEFAULTS["qwen2" if qwen2 else "own"].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if model.recurrent and config.checkpointing:
        raise UserError("--checkpointing needs a Transformer for a base")
    config.prompts = config.prompts or default_prompts(config, tokenizer)
    for prompt in config.prompts:
        if len(encode_prompt(tokenizer, prompt)) > context_length(model):
            raise UserError(f"the prompt {prompt!r} is longer than the base's context of "
                            f"{context_length(model)} tokens; give shorter --prompts")
    if config.retain is None:
        config.retain, reason = "wikitext2" if qwen2 else run_options(config.base)[1].get("data", ""), None
        try:
            retained_ids(config.retain, tokenizer, config.base)
        except UserError as e:
            reason = e
        if config.retain == config.data:
            reason = "the base was trained on the same text; name another with --retain"
        if reason:
            data.show(f"no other text is measured: {reason}", "\n")
            config.retain = ""


def open_as(name, device, product_dtype):
    """A run, or pretrained weights, as a float32 model that multiplies in product_dtype."""
    model = load_run(name, device, torch.float32)[0]
    model.product_dtype = product_dtype
    return model


def open_base(config, checkpoint):
    """The model to train and its tokenizer, of the base or of a checkpoint. With --shard the model is on the
    meta device, without memory."""
    device = pick_device(config.device)
    if checkpoint:
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
        kind, sizes = checkpoint["kind"], checkpoint["config"]
        if not config.shard:
            model = build_model(kind, sizes, checkpoint["model"]).to(device)
    else:
        where = ("cpu", None) if config.shard else (device, torch.float32)
        model, tokenizer, _ = load_run(config.base, *where)
        kind, sizes = kind_of(model), asdict(model.config)
        resolve_defaults(config, model, tokenizer)
    if config.shard:
        with torch.device("meta"):
            model = build_model(kind, sizes)
        if model.recurrent:
            raise UserError("--shard needs a Transformer for a base")
    speed_up(model)
    model.product_dtype = pick_dtype(config.dtype, device)
    check_rows(config, model)
    return model, tokenizer


def main(argv=None):
    # 1 options
    config, given = data.parse_args(Config, argv, "examples:\n" + __doc__.split("\n\n")[1])
    if config.shard and WORLD < 2:
        raise UserError("--shard splits a model across processes; start them with: "
                        "torchrun --nproc-per-node 2 --standalone -- finetune.py --shard")
    if config.ablate and (WORLD > 1 or given & {"steps", "epochs", "data_fraction", "resume"}):
        raise UserError("--ablate runs in one process, for all --ablate-epochs and --ablate-fractions; the "
                        "same command resumes it")
    kind, checkpoint = "ablate" if config.ablate else "finetune", None
    config.run = config.run or f"runs/{kind}-{data.file_name(config.base)}-{data.file_name(config.data)}"
    if not config.ablate:
        checkpoint, config = resume_or_refuse(config, given)
        config.shard = "shard" in given

    # 2 device and processes
    join_processes(pick_device(config.device))

    # 3 base and data
    with first_process_first():
        model, tokenizer = open_base(config, checkpoint)
        corpus = data.load(config.data, tokenizer, splits=("train", "valid"))
    check_text(corpus)
    if config.ablate:
        with data.locked(config.run, wait=False):
            return ablate(config, model, tokenizer, corpus)
    result = finetune(config, model, tokenizer, corpus, checkpoint)
    if RANK == 0:
        before, after = result["before"], result["after"]
        retained = (f", {config.retain} {before['retained']['ppl']:.2f}, {after['retained']['ppl']:.2f}"
                    if before["retained"] else "")
        print(f"{config.base} on {config.data}: corpus perplexity {before['corpus']:.2f} before, "
              f"{after['corpus']:.2f} after, mean of documents {before['mean']:.2f}, "
              f"{after['mean']:.2f}{retained}")
        print(f"written to {config.run}/report.md. Next: python sample.py --run {data.quoted(config.run)}")
    leave_processes()


if __name__ == "__main__":
    data.run_main(main)
