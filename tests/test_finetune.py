"""Fine-tuning: the step against transformers and torch's AdamW, before and after against brute force, nothing lost."""
import csv
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import data
import eval as evaluation
import finetune
import sample
import train
from data import UserError, first_share
from fast.layer import speed_up
from finetune import held_out, measure
from qwen_load import hub_name, load_weights
from tests.test_qwen_load import library_model, write_tokenizer
from tests.test_train import stops_and_resumes, survives_kills, torchrun
from transformer import Transformer, TransformerConfig


def settings(folder, **changes):
    base = dict(run=str(folder), lr=1e-3, weight_decay=0.1, batch_size=4, block_size=12, steps=6, warmup_steps=2, log_every=1,
                eval_every=3, sample=False, data_fraction=1.0)
    return finetune.Config(**base | changes)


def Words():
    """A tokenizer of 97 words, which needs no file."""
    return data.WordTokenizer(["<eos>", "<unk>", *(f"w{k}" for k in range(95))])


def tune(folder, model, dtype=torch.float32, ids=None, **changes):
    """finetune() on random tokens, without evaluations; -> the log's rows, the batches."""
    config = settings(folder, prompts=["w"], retain="", **changes)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 600) if ids is None else ids
    corpus = data.Corpus("random", Words(), {"train": ids, "valid": ids[:100]}, {})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(finetune, "measure", lambda *a: {"each": 1, "unknown": 0.0})
        m.setattr(finetune, "report", lambda *a: None)
        m.setattr(finetune, "grammar_floor", lambda *a: None)
        m.setattr(finetune, "encode_prompt", lambda *a: [0])
        model.product_dtype = dtype
        finetune.finetune(config, model, Words(), corpus)
    with open(folder / "log.csv") as f:
        return list(csv.DictReader(f)), data.WindowBatches(ids, config.batch_size, config.block_size, config.seed)


@pytest.fixture
def qwen(tmp_path):
    """A small Qwen2 with random weights: the library's and ours."""
    library = library_model(initializer_range=0.1)
    library.save_pretrained(tmp_path / "base")
    return library.train(), load_weights(tmp_path / "base", dtype=torch.float32).train()


@pytest.mark.parametrize("how", [{}, {"accumulate": 2}, {"checkpointing": True}, {"accumulate": 4, "checkpointing": True}, {"grad_clip": 0.05}])
def test_three_steps_equal_transformers_with_adamw(qwen, tmp_path, how):
    library, model = qwen
    library.load_state_dict({hub_name(name): p for name, p in model.state_dict().items()})
    log, batches = tune(tmp_path / "run", model, steps=3, warmup_steps=1, eval_every=3, **how)
    model.load_state_dict(torch.load(tmp_path / "run/last.pt", weights_only=True)["model"])
    theirs = dict(library.named_parameters())
    groups = [[p for p in theirs.values() if p.dim() >= 2], [p for p in theirs.values() if p.dim() < 2]]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=(0.9, 0.99))
    for step in range(3):
        x, y = batches.batch(step)
        expected = torch.nn.functional.cross_entropy(library(x).logits.flatten(0, 1), y.flatten())
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(library.parameters(), how.get("grad_clip", 1.0)).item()
        for group in optimizer.param_groups:
            group["lr"] = train.get_lr(step, 3, 1e-3, 1)
        optimizer.step()
        optimizer.zero_grad()
        assert float(log[step + 1]["train_loss"]) == pytest.approx(expected.item(), rel=1e-5)
        assert float(log[step + 1]["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    for name, p in model.named_parameters():
        assert (p - theirs[hub_name(name)]).norm() <= 1e-4 * p.norm(), name


def test_bf16_products_learn_what_float32_learns(qwen, tmp_path):
    _, model = qwen
    start = {k: v.clone() for k, v in model.state_dict().items()}
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.load_state_dict(start)
        tune(tmp_path / str(dtype), model, dtype, steps=3, eval_every=3, lr=1e-3, grad_clip=0.5)
        now = torch.load(tmp_path / str(dtype) / "last.pt", weights_only=True)["model"]
        assert all(v.dtype == torch.float32 for v in now.values())
        moved[dtype] = torch.cat([(v - start[k]).flatten() for k, v in now.items()])
    cosine = torch.nn.functional.cosine_similarity(moved[torch.float32], moved[torch.bfloat16], dim=0)
    assert cosine > 0.95 and moved[torch.bfloat16].norm() == pytest.approx(moved[torch.float32].norm().item(), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_bf16_products_are_close_to_the_exact_ones(qwen, checkpointing):
    _, model = qwen
    speed_up(model)
    model.checkpointing, model.product_dtype = checkpointing, torch.bfloat16
    x, y = torch.randint(97, (4, 12)), torch.randint(97, (4, 12))
    x[0] = x[0, 0]                                                  # a token that occurs often
    with sample.autocast(model):
        model(x, targets=y)[0].backward()
    exact = Transformer(model.config).double()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact(x, targets=y)[0].backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in exact.parameters()))
    for (name, p), (_, q) in zip(exact.named_parameters(), model.named_parameters()):
        assert q.grad.dtype == torch.float32 and (q.grad.double() - p.grad).norm() <= 0.03 * p.grad.norm() + 1e-3 * norm, name


def test_updates_too_small_for_bf16_are_kept(qwen, tmp_path):
    _, model = qwen
    start = model.layers[0].mlp.up_proj.weight.clone()
    frozen = start.bfloat16()
    tune(tmp_path / "run", model, torch.bfloat16, lr=1e-6, steps=20, eval_every=20, warmup_steps=0, weight_decay=0.0)
    now = torch.load(tmp_path / "run/last.pt", weights_only=True)["model"]["layers.0.mlp.up_proj.weight"]
    assert (now != start).float().mean() > 0.99                    # the weights moved,
    assert (now.bfloat16() != frozen).float().mean() < 0.2          # by less than bfloat16 can show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_clipped(qwen, tmp_path, dtype):
    """AdamW's first moment after one step is 0.1 of the gradient that it was given."""
    log, _ = tune(tmp_path / "run", qwen[1], dtype, steps=1, eval_every=1, grad_clip=0.01)
    moments = torch.load(tmp_path / "run/last.pt", weights_only=True)["optimizer"]["state"]
    given = torch.cat([state["exp_avg"].flatten() for state in moments.values()]) / 0.1
    assert float(log[1]["grad_norm"]) > 0.05 and given.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_token_that_occurs_a_thousand_times_keeps_its_gradient():
    model = Transformer(TransformerConfig(97, 1024, 1, 2, 2, 16, 24)).train()
    speed_up(model)
    model.product_dtype = torch.bfloat16
    x, y = torch.full((1, 1024), 5), torch.randint(97, (1, 1024))
    with sample.autocast(model):
        model(x, targets=y)[0].backward()
    exact = Transformer(model.config).double()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    exact(x, targets=y)[0].backward()
    grad = exact.embed_tokens.weight.grad[5]
    assert (model.embed_tokens.weight.grad[5].double() - grad).norm() <= 0.02 * grad.norm()


def test_shares_are_nested_and_end_with_a_document():
    ids = np.array([5, 6, 0, 7, 0, 8, 9, 9, 0, 4, 0])
    shares = [first_share(ids, f, 0).tolist() for f in (0.3, 0.6, 0.9, 1.0)]
    assert shares == [[5, 6, 0], [5, 6, 0, 7, 0], [5, 6, 0, 7, 0, 8, 9, 9, 0], ids.tolist()]
    assert first_share(np.arange(1, 11), 0.5, 0).tolist() == [1, 2, 3, 4, 5]                 # no end anywhere


# --------------------------------------------------------------------------------------------------------- the command

SIZES = ["--n-embd", "16", "--n-hidden", "25", "--n-layer", "2", "--n-head", "2", "--batch-size", "4", "--block-size", "256"]
QUICK = ["--data", "stories", "--batch-size", "4", "--block-size", "32", "--held-out", "12", "--eval-tokens", "500", "--sample-tokens", "8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "finance"
    train.main(["--model", "transformer", "--steps", "20", "--run", str(folder), *SIZES])
    return str(folder)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_before_and_after_are_measured_and_written(base, capsys):
    finetune.main(["--base", base, "--run", "ft", "--steps", "12", "--dtype", "float32", *QUICK])
    assert "corpus perplexity" in capsys.readouterr().out
    result, report = json.load(open("ft/result.json")), open("ft/report.md").read()
    for which, run in (("before", base), ("after", "ft")):
        model, tokenizer, _ = sample.load_run(run)
        alone = []
        for ids in map(tokenizer.encode, held_out("stories", 12)):
            with torch.no_grad():                                   # each afresh, behind the end token, its own end included
                inputs, targets = torch.tensor([[tokenizer.eos, *ids[:-1]]]), torch.tensor([ids])
                alone.append(model(inputs, targets=targets, reduction="none")[0][0].double())
        figures = result[which]
        assert figures["documents"] == pytest.approx([math.exp(v.mean()) for v in alone], rel=1e-4)
        assert figures["corpus"] == pytest.approx(math.exp(torch.cat(alone).mean()), rel=1e-4) and len(figures["samples"]) == 2
        assert figures["mean"] == pytest.approx(sum(figures["documents"]) / 12)
    assert result["after"]["corpus"] < result["before"]["corpus"] and result["before"]["retained"]["ppl"] != result["after"]["retained"]["ppl"]
    assert all(f"Table {k}" in report for k in (3, 4, 5)) and "finance (its validation split, not trained on)" in report and "the floor" in report
    sample.main(["--run", "ft", "--tokens", "3"])


def test_a_floor_stands_beside_models_that_read_the_grammars_words_only():
    closed, other = data.build_word_tokenizer("stories"), data.WordTokenizer(["<eos>", "<unk>", "the"])
    assert finetune.grammar_floor("stories", 5, closed) > 1 and finetune.grammar_floor("stories", 5, other) is None
    assert finetune.grammar_floor("stories", 5, Words()) is None and finetune.grammar_floor("ptb", 5, closed) is None


def test_foreign_weights_are_not_overwritten(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run or weights"):
        finetune.main(["--base", base, "--run", "mine", *QUICK])


def test_a_second_run_does_not_overwrite_the_first(base):
    command = ["--base", base, "--run", "ft", "--steps", "2", *QUICK]
    finetune.main(command)
    with pytest.raises(UserError, match="already holds a run"):
        finetune.main(command)


def dies_in(step, monkeypatch):
    """The process dies (as by SIGKILL: nothing more is written) in the optimizer's step-th step."""
    original, steps = torch.optim.AdamW.step, []

    def dies(self, *rest):
        steps.append(1)
        if len(steps) == step:
            raise MemoryError("killed")
        return original(self, *rest)
    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    return steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_resumes_bit_for_bit(base, monkeypatch, dtype):
    command = ["--base", base, "--steps", "12", "--eval-every", "4", "--dtype", dtype, *QUICK]
    finetune.main([*command, "--run", "whole"])
    with monkeypatch.context() as m:
        dies_in(7, m)
        with pytest.raises(MemoryError):
            finetune.main([*command, "--run", "killed"])
    finetune.main(["--resume", "--run", "killed"])
    a, b = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "killed"))
    assert a["step"] == b["step"] == 12 and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    strip = lambda run: {k: v for k, v in json.load(open(f"{run}/result.json")).items() if k in ("before", "after", "val_ppl", "best_step")}
    assert strip("whole") == strip("killed")


def test_a_stopped_run_resumes_as_if_it_had_not_been(base):
    stops_and_resumes(finetune.main, ["--base", base, "--steps", "10", "--eval-every", "4", "--log-every", "3", "--dtype", "float32", *QUICK], [], (3, 8, 10))


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(base):
    survives_kills("finetune.py", ["--base", base, "--steps", "40", "--eval-every", "4", "--log-every", "3", "--dtype", "float32", *QUICK], [])


def test_a_kill_while_saving_leaves_the_last_checkpoint(base, monkeypatch):
    command = ["--base", base, "--steps", "8", "--eval-every", "2", "--run", "ft", *QUICK]
    with monkeypatch.context() as m:
        real_save, calls = torch.save, []

        def half(value, f):
            calls.append(1)
            if len(calls) == 5:
                f.write(b"half of it")
                raise MemoryError("killed")
            real_save(value, f)
        m.setattr(torch, "save", half)
        with pytest.raises(MemoryError):
            finetune.main(command)
    finetune.main(["--resume", "--run", "ft"])
    assert json.load(open("ft/result.json"))["steps"] == 8


def test_an_ablation_goes_on_where_it_was_killed_and_repeats_nothing(base, monkeypatch, capsys):
    command = ["--ablate", "--base", base, "--ablate-epochs", "0.01", "0.02", "--ablate-fractions", "0.6", "0.9", "--dtype", "float32", *QUICK]
    finetune.main([*command, "--run", "whole"])
    table = capsys.readouterr().out
    with monkeypatch.context() as m:
        cells = [json.load(open(p))["steps"] for p in sorted(Path("whole").glob("*/result.json"))]
        dies_in(cells[0] + cells[1] + 5, m)                                 # in the third cell
        with pytest.raises(MemoryError):
            finetune.main([*command, "--run", "killed"])
    with pytest.raises(UserError, match="was started with seed 1, not 2"):
        finetune.main([*command, "--run", "killed", "--seed", "2"])
    with pytest.raises(UserError, match="already holds a run"):
        finetune.main([*command, "--run", base])
    finetune.main(["--resume", "--run", "killed/epochs-0.02-share-60"])     # the cell alone may be resumed too
    capsys.readouterr()
    with monkeypatch.context() as m:
        steps = dies_in(10 ** 9, m)
        finetune.main([*command, "--run", "killed"])
    assert len(steps) == cells[3]                                           # the last one only
    assert capsys.readouterr().out.replace("killed", "whole") == table and table.count("\n") == 8
    assert not list(Path("killed").rglob("*.pt")) and len(list(Path("killed").rglob("result.json"))) == 5
    epochs = [json.load(open(f"whole/epochs-{e}-share-{s}/result.json"))["train_tokens"] for e, s in (("0.01", 60), ("0.01", 90))]
    assert epochs[0] < epochs[1]
    with pytest.raises(UserError, match="was started with lr 0.001, not 0.5"):
        finetune.main([*command, "--run", "killed", "--lr", "0.5"])


# ---------------------------------------------------------------------------------------------------------- a Qwen2 base

@pytest.fixture
def hub_folder(tmp_path):
    library_model(vocab_size=300, initializer_range=0.1).save_pretrained(tmp_path / "hub")
    write_tokenizer(tmp_path / "hub")
    stories = [f"the {w} went in the hell and don't sing, said the {w} to the doer." for w in ("hen", "thing", "inn", "ring") * 30]
    (tmp_path / "own.txt").write_text("<|endoftext|>\n".join(stories) + "<|endoftext|>\n")
    return str(tmp_path / "hub")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tuned_qwen2_opens_in_transformers(hub_folder, dtype):
    finetune.main(["--base", hub_folder, "--data", "own.txt", "--retain", "own.txt", "--run", "ft", "--steps", "10", "--lr", "1e-3", "--batch-size", "4",
                   "--block-size", "32", "--held-out", "3", "--sample-tokens", "5", "--dtype", dtype])
    result = json.load(open("ft/result.json"))
    assert result["after"]["corpus"] < result["before"]["corpus"] and result["dtype"] == dtype
    model, tokenizer, _ = sample.load_run("ft")
    library = transformers.AutoModelForCausalLM.from_pretrained("ft", dtype=torch.float32).eval()
    ids = tokenizer.encode("the hen went in")
    assert transformers.AutoTokenizer.from_pretrained("ft")("the hen went in", add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(torch.tensor([ids]))[0]), library(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4)
    sample.main(["--run", "ft", "--tokens", "3"])
    assert evaluation.samples(evaluation.open_run("ft", "cpu"), "the hen", n=2, tokens=3)[0]["text"].startswith("the hen")
    finetune.main(["--base", "ft", "--data", "own.txt", "--retain", "own.txt", "--run", "again", "--steps", "1", "--block-size", "32", "--held-out", "2"])
    assert json.load(open("again/result.json"))["options"]["lr"] == finetune.DEFAULTS["qwen2"]["lr"]      # a tuned Qwen2 is a Qwen2


def test_a_folder_of_another_kind_is_no_base(hub_folder, tmp_path):
    config = json.loads((tmp_path / "hub/config.json").read_text()) | {"model_type": "distilbert"}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model_type 'distilbert'"):
        finetune.main(["--base", hub_folder, "--data", "own.txt", "--run", "ft"])


# -------------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("wrong, message", [
    ("--data-fraction 0", "data-fraction"), ("--data-fraction 1.5", "data-fraction"), ("--data-fraction nan", "data-fraction"),
    ("--ablate --ablate-fractions 0.5 2", "ablate-fractions must be above 0 and at most 1, not 2"), ("--ablate --ablate-epochs 0", "ablate-epochs"), ("--epochs 0", "--epochs must be above 0"),
    ("--batch-size 0", "--batch-size must be above 0"), ("--accumulate 3 --batch-size 4", "equal micro-batches"), ("--lr -1", "--lr must be above 0"),
    ("--data-fraction 0.0001", "too few for one batch"), ("--base runs/none", "there is no run at runs/none"), ("--resume --run none", "train a model first"),
    ("--retain wikitext2", "the vocabulary has no word for|could not download")])
def test_bad_input_is_said_in_a_line(base, wrong, message, monkeypatch, data_folder):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=message):
        finetune.main(["--base", base, "--run", "ft", "--steps", "2", *QUICK, *wrong.split()] if "--ablate" not in wrong else ["--base", base, *wrong.split()])


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_trained(base):
    with pytest.raises(UserError, match="longer than the base's context of 256 tokens"):
        finetune.main(["--base", base, "--run", "ft", *QUICK, "--prompts", "the " * 300])
    assert not Path("ft").exists()


def test_an_empty_file_and_a_foreign_one(base, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "foreign.txt").write_text("zebra crossing\n" * 2000)
    for file, message in (("empty.txt", "is empty"), ("foreign.txt", "embedded languages go with embedded languages")):
        with pytest.raises(UserError, match=message):
            finetune.main(["--base", base, "--data", file, "--run", "ft"])


def test_a_document_longer_than_the_context_is_read_whole(base, tmp_path):
    words = " ".join(w for doc, _ in data.embedded_documents("stories", "test")[:40] for w in doc[:-1])
    (tmp_path / "long.txt").write_text((words + "\n") * 40)
    model, tokenizer, config = sample.load_run(base)
    args = finetune.Config(data="long.txt", held_out=1, retain="", prompts=[], temperature=1.0, seed=1, sample_tokens=1)
    figures = measure(model, tokenizer, args)
    assert figures["tokens"] > 2 * config.block_size
    finetune.main(["--base", base, "--data", "long.txt", "--run", "ft", "--steps", "2", *QUICK[2:]])


def test_a_run_of_train_py_is_not_resumed_here_nor_the_other_way_round(base):
    with pytest.raises(UserError, match="not a run of python finetune.py"):
        finetune.main(["--resume", "--run", base])
    finetune.main(["--base", base, "--run", "ft", "--steps", "2", *QUICK])
    with pytest.raises(UserError, match="not a run of python train.py"):
        train.main(["--resume", "--run", "ft"])


def test_memory_is_estimated(qwen, monkeypatch):
    _, model = qwen
    n = sum(p.numel() for p in model.parameters())
    assert f"{n:,} parameters: training needs about {18 * n / 1e9:.1f} GB" in finetune.memory_line(model, False)
    monkeypatch.setattr(finetune, "WORLD", 2)
    monkeypatch.setattr(finetune, "count_parameters", lambda model: 10 ** 9)
    assert "about 9.0 GB" in finetune.memory_line(model, True) and "about 18.0 GB" in finetune.memory_line(model, False)


def test_another_kind_of_length_extends_a_run(base):
    finetune.main(["--base", base, "--run", "ft", "--steps", "2", *QUICK])
    finetune.main(["--resume", "--run", "ft", "--epochs", "0.05"])
    assert json.load(open("ft/result.json"))["steps"] > 2
    with pytest.raises(UserError, match="exclude each other"):
        finetune.main(["--base", base, "--run", "other", "--steps", "2", "--epochs", "1", *QUICK])


def test_rows_that_cannot_be_cut_into_micro_batches_are_refused(base):
    with pytest.raises(UserError, match="--batch-size 4 cannot be cut into 3 equal micro-batches"):
        finetune.main(["--base", base, "--run", "ft", *QUICK, "--accumulate", "3"])


def test_a_recurrent_base_is_tuned_too(tmp_path):
    train.main(["--model", "lstm", "--steps", "5", "--n-embd", "16", "--batch-size", "4", "--block-size", "16", "--run", "base"])
    finetune.main(["--base", "base", "--run", "ft", "--steps", "4", *QUICK])
    assert json.load(open("ft/result.json"))["model"] == "lstm"
    with pytest.raises(UserError, match="needs a Transformer"):
        finetune.main(["--base", "base", "--run", "other", "--checkpointing", *QUICK])


# --------------------------------------------------------------------------------------------- several processes

def in_processes(n, *args):
    """finetune.py in n processes; -> what it said on stderr."""
    process = torchrun(n, *args, script="finetune.py")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-2000:]
    return errors


def assert_same_run(one, other, rel=1e-4):
    """Both end with the same weights, moments and figures, in checkpoints of the same form."""
    a, b = (torch.load(f"{run}/last.pt", weights_only=True) for run in (one, other))
    assert {k: v for k, v in a["options"].items() if k not in train.MAY_CHANGE} == {k: v for k, v in b["options"].items() if k not in train.MAY_CHANGE} and a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    pairs = [(v, b["model"][k]) for k, v in a["model"].items()]
    pairs += [(v, b["optimizer"]["state"][i][k]) for i, state in a["optimizer"]["state"].items() for k, v in state.items()]
    assert a["model"].keys() == b["model"].keys() and a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for v, w in pairs:
        assert v.dtype == w.dtype and v.shape == w.shape and (v - w).norm() <= rel * v.norm() + 1e-9
    a, b = (json.load(open(f"{run}/result.json")) for run in (one, other))
    assert a["val_ppl"] == pytest.approx(b["val_ppl"], rel=1e-5) and a["before"] == b["before"]
    assert a["after"]["documents"] == pytest.approx(b["after"]["documents"], rel=1e-4)


def test_processes_with_a_share_of_the_weights_learn_what_one_learns(base):
    """Three processes: no size of the base can be divided by three."""
    command = ["--base", base, *QUICK, "--batch-size", "6", "--steps", "9", "--eval-every", "3", "--dtype", "float32"]
    in_processes(3, *command, "--run", "three", "--shard")
    finetune.main([*command, "--run", "one"])
    assert_same_run("one", "three")


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--checkpointing"], ["--accumulate", "2"]])
def test_shares_go_with_checkpointing_and_micro_batches(base, how):
    command = ["--base", base, *QUICK, "--steps", "6", "--eval-every", "3", "--dtype", "float32", *how]
    in_processes(2, *command, "--run", "two", "--shard")
    finetune.main([*command, "--run", "one"])
    assert_same_run("one", "two")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_shares(base):
    command = ["--base", base, *QUICK, "--steps", "9", "--eval-every", "3", "--dtype", "float32"]
    finetune.main([*command, "--run", "whole"])
    for run, first, second in (("a", ["--shard"], []), ("b", [], ["--shard"])):
        process = torchrun(2 if first else 1, *command, "--run", run, *first, script="finetune.py")
        while not Path(run, "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=180)
        assert torch.load(f"{run}/last.pt", weights_only=True)["step"] < 9
        in_processes(2 if second else 1, "--resume", "--run", run, *second)
        assert_same_run("whole", run)


@pytest.mark.slow
@pytest.mark.parametrize("share", [[], ["--shard"]])
def test_a_killed_process_ends_the_job_with_a_line_and_a_usable_checkpoint(base, share):
    process = torchrun(2, "--base", base, *QUICK, "--steps", "100000", "--eval-every", "10", "--log-every", "1", "--run", "r", *share, script="finetune.py")
    while process.poll() is None and not (Path("r/log.csv").exists() and len(open("r/log.csv").readlines()) > 20):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "another process of this job was gone" in errors, errors[-2000:]
    sample.load_run("r")
    assert torch.load("r/last.pt", weights_only=True)["step"] % 10 == 0


@pytest.mark.slow
def test_qwen2_in_shares_in_bfloat16_writes_a_folder_that_transformers_opens(hub_folder):
    command = ["--base", hub_folder, "--data", "own.txt", "--retain", "own.txt", "--steps", "6", "--eval-every", "3", "--lr", "1e-3", "--batch-size", "4",
               "--block-size", "32", "--held-out", "3", "--sample-tokens", "5"]
    in_processes(2, *command, "--dtype", "bfloat16", "--run", "two", "--shard")
    finetune.main([*command, "--dtype", "float32", "--run", "one"])
    one, two = (json.load(open(f"{run}/result.json")) for run in ("one", "two"))
    assert two["val_ppl"] == pytest.approx(one["val_ppl"], rel=0.01) and two["dtype"] == "bfloat16"
    model, library = sample.load_run("two")[0], transformers.AutoModelForCausalLM.from_pretrained("two", dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)[0]), library(ids).logits, atol=1e-4, rtol=1e-4)


def test_shares_need_several_processes(base):
    with pytest.raises(UserError, match="torchrun --nproc-per-node"):
        finetune.main(["--base", base, "--shard", "--run", "r", *QUICK])
    assert not Path("r").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(base):
    command = ["--base", base, *QUICK, "--steps", "8", "--eval-every", "4", "--dtype", "float32"]
    in_processes(2, *command, "--run", "two")
    finetune.main([*command, "--run", "one"])
    assert_same_run("one", "two")


def test_a_text_that_is_mostly_unknown_to_the_base_is_said_to_be(tmp_path, capsys):
    Path("a.txt").write_text("the cat of the house saw the dog and the rare <unk> once\n" * 300)
    Path("b.txt").write_text("the bird over some lake met a fox\n" * 300)
    train.main(["--model", "lstm", "--data", "a.txt", "--steps", "5", "--n-embd", "16", "--batch-size", "4", "--block-size", "16", "--run", "base"])
    capsys.readouterr()
    finetune.main(["--base", "base", "--data", "b.txt", "--retain", "a.txt", "--run", "ft", "--steps", "2", *QUICK[2:]])
    result = json.load(open("ft/result.json"))
    assert result["before"]["unknown"] == result["after"]["unknown"] > 0.5 and "--tokenizer gpt2 has no <unk>" in capsys.readouterr().err
    assert f"{result['before']['unknown']:.1%} of them <unk>" in open("ft/report.md").read()
