"""The training loop: evaluation against a reference, runs that survive anything, and errors in one line."""
import csv
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data
import rnn
import sample
import train
from data import UserError
from eval import per_document_nll
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from tests.conftest import ROOT
from transformer import Transformer, TransformerConfig

TINY = ["--n-embd", "16", "--n-hidden", "16", "--batch-size", "8", "--block-size", "16", "--warmup-steps", "5", "--log-every", "1"]
KINDS = ["rnn", "lstm", "transformer"]


def tiny(kind, *more, dropout="0.2"):
    own = ["--n-head", "2", "--n-layer", "2"] if kind == "transformer" else \
        [word for name in ("hidden", "input", "embed") for word in (f"--dropout-{name}", dropout)]
    return ["--model", kind, *TINY, *own, "--dropout", dropout, "--data", "small.txt", *more]


def rows(run, drop=("seconds", "tokens_per_second")):
    """log.csv without what differs between two runs of the same thing."""
    with open(Path(run) / "log.csv") as f:
        return [{k: v for k, v in row.items() if k not in drop} for row in csv.DictReader(f)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("".join(f"the w{i % 17} of w{i * i % 23} is w{i % 5} here\n" for i in range(600)))


# --------------------------------------------------------------------------------------------------- perplexity

def make(kind, vocab_size=31):
    torch.manual_seed(1)
    if kind == "transformer":
        return Transformer(TransformerConfig(vocab_size, 12, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    model_type, config = (LSTMLM, LSTMConfig) if kind == "lstm" else (RNNLM, RNNConfig)
    return model_type(config(vocab_size, n_embd=10, n_hidden=14, n_layer=2)).eval()


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
@pytest.mark.parametrize("n", [1, 2, 255, 600])
def test_recurrent_perplexity_equals_one_pass_token_by_token(kind, n):
    model, ids = make(kind), torch.randint(31, (n + 1,))
    total, state = 0.0, None
    with torch.no_grad():
        for now, following in zip(ids, ids[1:]):
            hidden, state = model(now.view(1, 1), state)
            total -= torch.log_softmax(model.logits(hidden)[0, 0], -1)[following].item()
    got = train.perplexity(model, ids)
    assert got["tokens"] == n and abs(got["nll"] - total / n) < 1e-5 and math.isclose(got["ppl"], math.exp(got["nll"]))


@pytest.mark.parametrize("kind", ["rnn", "lstm"])
@pytest.mark.parametrize("n, rows", [(100, 2), (100, 3), (100, 7), (1200, 4), (3, 5)])
def test_side_by_side_pieces_predict_every_token_once(kind, n, rows):
    """Against a loop over the pieces: state of the text's beginning, tokens of context, then what counts."""
    model, ids = make(kind), torch.randint(31, (n + 1,))
    before = min(train.OVERLAP, n // rows)
    length, total = -(-(n - before) // rows), 0.0
    with torch.no_grad():
        beginning = model(ids[None, :before])[1] if before else None
        for row in range(rows):
            start, end = row * length, min(n, row * length + before + length)
            if end <= start:
                continue
            nll = model(ids[None, start:end], beginning if row else None, ids[None, start + 1:end + 1], "none")[0][0]
            total += nll[before if row else 0:].sum().item()
    got = train.perplexity(model, ids, rows)
    assert got["tokens"] == n and abs(got["nll"] - total / n) < 1e-5


def test_pieces_side_by_side_do_not_settle_where_the_text_read_through_never_is():
    """A network with two stable states, which its first token decides: from a state of zero in mid-text, pieces end in the
    wrong one (this was seen in trained networks: 75.8 instead of 49.2)."""
    model = RNNLM(RNNConfig(3, n_embd=1, n_hidden=1, n_layer=1))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        layer = model.layers[0]
        layer.weight_hh.fill_(3.0)                                  # h -> tanh(3 h + x): stable near +1 and -1
        layer.weight_ih.fill_(1.0)
        model.embed_tokens.weight.copy_(torch.tensor([[1.0], [-0.1], [-0.1]]))         # token 0 comes first, and never again
        model.lm_head.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    ids = torch.cat([torch.tensor([0]), torch.randint(1, 3, (4000,))])
    assert train.perplexity(model.eval(), ids, pieces=16)["ppl"] == pytest.approx(train.perplexity(model, ids)["ppl"], rel=1e-4)


@pytest.mark.parametrize("n", [1, 5, 12, 13, 60])
@pytest.mark.parametrize("context, stride", [(12, 1), (12, 5), (12, 12), (7, 3), (None, None)])
def test_window_perplexity_equals_a_loop_over_tokens(n, context, stride):
    model, ids = make("transformer"), torch.randint(31, (n + 1,))
    got = train.perplexity(model, ids, window=context, stride=stride)
    context, total = min(context or 12, n), 0.0
    stride = min(stride or context // 2 or 1, context)
    ends = list(range(context, n, stride)) + [n]                # a window predicts ids[end - context + 1 .. end]
    with torch.no_grad():
        for target in range(1, n + 1):                          # the first window that reaches it judges it
            end = next(e for e in ends if e >= target)
            logits = model.logits(model(ids[None, end - context:end])[0])[0, target - 1 - (end - context)]
            total -= torch.log_softmax(logits, -1)[ids[target]].item()
    assert got["tokens"] == n and abs(got["nll"] - total / n) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_model_has_the_vocabulary_as_perplexity(kind):
    model = make(kind)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        if model.lm_head.bias is not None:
            model.lm_head.bias.fill_(0.7)
    assert abs(train.perplexity(model, torch.randint(31, (200,)))["ppl"] - 31) < 1e-3


def test_perplexity_needs_a_token_to_predict():
    with pytest.raises(ValueError, match="at least one token"):
        train.perplexity(make("rnn"), torch.tensor([3]))


# ------------------------------------------------------------------------------------------------ schedule and dtype

def test_learning_rate_warms_up_and_follows_a_cosine():
    rates = [train.get_lr(s, 110, 1.0, 10) for s in range(110)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.01 + 0.99 * 0.5) and rates[-1] < 0.012
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_random_draws_depend_on_seed_step_and_rank_alone():
    seeds = [train.step_seed(*key) for key in [(1, 0), (1, 1), (2, 0), (1, 0, 1), (2 ** 62, 7, 3)]]
    assert len(set(seeds)) == 5 and seeds == [train.step_seed(*key) for key in [(1, 0), (1, 1), (2, 0), (1, 0, 1), (2 ** 62, 7, 3)]]
    assert all(0 <= seed < 2 ** 32 for seed in seeds) and train.step_seed(1, 0, 0) == train.step_seed(1, 0)


def test_dtype_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert sample.pick_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert sample.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert sample.pick_dtype("auto", torch.device("cuda")) == dtype


def test_weight_decay_spares_vectors():
    groups = train.configure_optimizer(make("lstm"), 1e-3, 0.5).param_groups
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and groups[0]["weight_decay"] == 0.5
    assert all(p.dim() < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


# --------------------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_leaves_what_it_promises(kind, dtype):
    train.main(tiny(kind, "--steps", "12", "--eval-every", "5", "--data", "finance", "--also", "climate",
                    "--run", "r", "--dtype", dtype))
    result = json.loads(Path("r/result.json").read_text())
    assert {"model", "data", "params", "val_ppl", "test_ppl", "floor_ppl", "tokens_per_second", "seconds", "epochs",
            "dtype", "device", "seed", "torch", "processor", "commit"} <= result.keys()
    assert result["torch"] == torch.__version__ and result["processor"]
    assert result["dtype"] == dtype and result["test_ppl"] > result["floor_ppl"] > 1
    model, tokenizer, config = sample.load_run("r")
    assert result["params"] == sum(p.numel() for p in model.parameters()) and not model.training
    log = rows("r")
    assert [int(r["step"]) for r in log] == list(range(13))
    assert [int(r["step"]) for r in log if r["val_ppl"]] == [0, 5, 10, 12]
    assert all(r["ppl_climate"] for r in log if r["val_ppl"])
    assert float(log[-1]["val_ppl"]) < float(log[0]["val_ppl"]) <= 3 * config.vocab_size
    ids = data.prepend_eos(tokenizer, data.load("finance", tokenizer).ids["test"])
    model.product_dtype = getattr(torch, dtype)
    assert train.perplexity(model, ids)["ppl"] == pytest.approx(result["test_ppl"], rel=1e-6)
    assert not list(Path("r").glob("*.part"))


def test_the_default_lstm_comes_near_the_floor_and_knows_how_a_text_begins():
    """Single documents, behind the end token and without a state, as sample.py begins them: the loss of their first word."""
    train.main(["--run", "r", "--eval-every", "2000"])
    result = json.loads(Path("r/result.json").read_text())
    assert result["floor_ppl"] < result["test_ppl"] < 1.04 * result["floor_ppl"]
    model, tokenizer, _ = sample.load_run("r")
    words = [words for words, _ in data.embedded_documents("finance", "test")]
    losses = per_document_nll(model, [[tokenizer.ids[w] for w in document] for document in words], tokenizer.eos)
    grammar = sum(data.language("finance").nll(document)[0] for document in words) / len(words)
    assert sum(loss[0] for loss in losses) / len(words) < grammar + 0.15


def loss_at_repeated_names(run):
    """Mean nll where the grammar leaves one choice and it is the name of somebody introduced before."""
    model, tokenizer, _ = sample.load_run(run)
    ids = data.prepend_eos(tokenizer, data.load("finance", tokenizer, splits=("test",)).ids["test"])
    words = [tokenizer.words[i] for i in ids[1:]]
    source = torch.tensor(data.language("finance").nll(words))
    at = torch.tensor([w in data.NAMES.split() for w in words]) & (source == 0)
    with torch.no_grad():
        if model.recurrent:
            return model(ids[None, :-1], targets=ids[None, 1:], reduction="none")[0][0][at].mean().item()
        block = model.config.block_size
        windows = ids.unfold(0, block + 1, block // 2)
        nll = model(windows[:, :-1], targets=windows[:, 1:], reduction="none")[0][1:, block // 2:].flatten()
        return nll[at[block:block + len(nll)]].mean().item()


@pytest.mark.slow
def test_defaults_come_within_ten_percent_of_the_floor_in_two_minutes_and_separate_at_names():
    found = {}
    for kind in KINDS:
        train.main(["--model", kind, "--run", kind])
        result = json.loads(Path(kind, "result.json").read_text())
        found[kind] = result["test_ppl"] / result["floor_ppl"], result["seconds"], loss_at_repeated_names(kind)
    assert all(ratio > 1 and seconds < 120 for ratio, seconds, _ in found.values()), found
    assert found["lstm"][0] < 1.1 and found["transformer"][0] < 1.1, found
    # a uniform guess among 20 names costs log 20 = 3.0 nats; only gates and attention carry the name that far
    assert found["rnn"][2] > 1.5 and found["lstm"][2] < 0.3 and found["transformer"][2] < 0.3, found


def test_minutes_plans_steps_that_steps_repeats(monkeypatch, capsys):
    """The clock is made, because on a busy machine a plan is shortened: a step and an evaluation take 20 ms each."""
    now, original, evaluate = [0.0], torch.optim.AdamW.step, train.evaluate

    def slow(function):
        def timed(*args):
            now[0] += 0.02
            return function(*args)
        return timed
    monkeypatch.setattr(torch.optim.AdamW, "step", slow(original))
    monkeypatch.setattr(train, "evaluate", slow(evaluate))
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    train.main(tiny("lstm", "--minutes", "0.05", "--warmup-steps", "20", "--run", "a"))
    planned = json.loads(Path("a/result.json").read_text())
    assert 120 <= planned["steps"] <= 150 and 0.9 * 3 < planned["seconds"] <= 3
    assert f"0.05 minutes are {planned['steps']} steps" in capsys.readouterr().err
    train.main(tiny("lstm", "--steps", str(planned["steps"]), "--warmup-steps", "20", "--run", "b"))
    a, b = ([r["train_loss"] for r in rows(run)] for run in "ab")
    assert a == b
    a, b = (torch.load(f"{run}/last.pt", weights_only=True)["model"] for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------- nothing is lost

@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal; a shell that runs the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c_in(step):
    """Press Ctrl-C in the middle of the step-th step; it is finished first."""
    original = torch.optim.AdamW.step
    steps = []

    def optimizer_step(self, *args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)
    return optimizer_step


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_saves_and_resume_is_bitwise(kind, monkeypatch, capsys):
    options = tiny(kind, "--steps", "25", "--eval-every", "7", "--dtype", "float32")
    train.main([*options, "--run", "whole"])
    for start, step in ((0, 3), (3, 16)):
        with monkeypatch.context() as m:
            m.setattr(torch.optim.AdamW, "step", ctrl_c_in(step - start))
            with pytest.raises(SystemExit) as stopped:
                train.main(["--resume", "--run", "cut"] if start else [*options, "--run", "cut"])
            assert stopped.value.code == 130
        assert f"stopped at step {step}. The last checkpoint is kept in cut. Resume with: python train.py --resume --run cut" in capsys.readouterr().err
    train.main(["--resume", "--run", "cut"])
    assert rows("cut") == rows("whole")
    a, b = (torch.load(f"{run}/last.pt", weights_only=True)["model"] for run in ("cut", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def figures(run):
    """log.csv and result.json without times, and without the options, which say that a run was resumed."""
    result = json.loads(Path(run, "result.json").read_text())
    drop = [c for c in rows(run, drop=())[0] if "seconds" in c or "per_second" in c]
    return rows(run, drop), {k: v for k, v in result.items() if k not in ("seconds", "tokens_per_second", "options")}


def stops_and_resumes(main, options, again, calls, optimizer=torch.optim.AdamW, name="SIGTERM"):
    """Run a command whole, and once more with a signal in the optimizer's step-th call, resumed; for each of `calls`. Log and
    figures are the same without exception."""
    main([*options, "--run", "whole"])
    for call in calls:
        original, seen = optimizer.step, []

        def step(self, *args):
            seen.append(1)
            if len(seen) == call:
                os.kill(os.getpid(), getattr(signal, name))
            return original(self, *args)
        run = f"cut-{name}-{call}"
        with pytest.MonkeyPatch.context() as m:
            m.setattr(optimizer, "step", step)
            with pytest.raises(SystemExit) as stopped:
                main([*options, "--run", run])
        assert stopped.value.code == 130 and Path(run, "last.pt").exists() and not Path(run, "result.json").exists()
        main([*again, "--resume", "--run", run])
        assert figures(run) == figures("whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_run_resumes_as_if_it_had_not_been(name):
    """Between rows of the log, at a row, at an evaluation, before the last one."""
    options = tiny("lstm", "--steps", "25", "--eval-every", "7", "--log-every", "3", "--dtype", "float32")
    stops_and_resumes(train.main, options, [], (1, 3, 7, 14, 24, 25), name=name)


def signal_in(monkeypatch, function, call):
    original, calls = getattr(train, function), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)
    monkeypatch.setattr(train, function, signalled)


def test_a_stop_before_the_first_step_leaves_nothing_to_resume(monkeypatch, capsys):
    options = tiny("lstm", "--steps", "9", "--eval-every", "3", "--dtype", "float32", "--run", "r")
    with monkeypatch.context() as m:
        signal_in(m, "evaluate", 1)
        with pytest.raises(SystemExit) as stopped:
            train.main(options)
    assert stopped.value.code == 130 and "Nothing was saved yet; the same command begins again" in capsys.readouterr().err
    train.main(options)


@pytest.mark.parametrize("where, call", [("evaluate", 4), ("final_figures", 1), ("sample_line", 3)])
def test_a_stop_after_the_last_step_is_no_complete_run(monkeypatch, ctrl_c_interrupts, where, call):
    """During the last evaluation; its sample; the final figures, when Ctrl-C is an ordinary one."""
    options = tiny("lstm", "--steps", "9", "--eval-every", "3", "--dtype", "float32")
    train.main([*options, "--run", "whole"])
    with monkeypatch.context() as m:
        signal_in(m, where, call)
        with pytest.raises(KeyboardInterrupt if where == "final_figures" else SystemExit):
            train.main([*options, "--run", "r"])
    assert last("r")["step"] == 9 and not Path("r/result.json").exists()
    train.main(["--resume", "--run", "r"])
    assert figures("r") == figures("whole")


def test_a_stopped_search_says_so_and_keeps_what_is_finished(monkeypatch, capsys):
    options = ["--search", "1", "--run", "s", "--data", "small.txt", "--n-embd", "8", "--minutes", "0.02", "--n-layer", "1"]
    with monkeypatch.context() as m:
        signal_in(m, "clip_grad_norm", 3)
        with pytest.raises(SystemExit):
            train.main(options)
    assert "Resume with: the same search again" in capsys.readouterr().err
    train.main(options)
    assert "--n-embd 8" in capsys.readouterr().out


def test_nohup_is_respected_and_handlers_are_put_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (run := train.Run(train.Config(run="r", steps=9))):
            run.log(val_loss=1.0)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.stop_requested and signal.getsignal(signal.SIGTERM) == run.request_stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stop_requested
            with pytest.raises(KeyboardInterrupt):                              # a second one ends at once
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def start(*args, **how):
    """train.py in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], text=True, env=dict(os.environ, OMP_NUM_THREADS="1"), **how)


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    assert condition()


ENDLESS = tiny("rnn", "--steps", "1000000", "--eval-every", "1000000", "--no-sample")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_whose_terminal_or_pipe_has_gone_still_saves(name):
    """As Ctrl-C behind `2>&1 | tee`, which ends the reader at once, or as a terminal that is closed."""
    process = start(*ENDLESS, "--run", "r", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: Path("r/log.csv").exists() and len(Path("r/log.csv").read_text().splitlines()) > 8, process)
    process.stdout.close()
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 130 and last("r")["step"] > 5


@pytest.mark.parametrize("moment", ["at the start", "later"])
def test_a_second_training_of_a_folder_is_refused_while_the_first_is_running(capsys, moment):
    process = start(*tiny("rnn", "--steps", "400", "--eval-every", "200", "--no-sample", "--run", "r"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(Path("r/log.csv").exists, process)
    if moment == "later":
        wait_for(lambda: len(Path("r/log.csv").read_text().splitlines()) > 20, process)
    process.send_signal(signal.SIGSTOP)
    try:
        line = fails(capsys, *tiny("rnn", "--steps", "4", "--seed", "2", "--run", "r"))
    finally:
        process.send_signal(signal.SIGCONT)
    assert "r belongs to a training that is running, or that died before its first checkpoint. If it died, delete r/log.csv" in line
    assert process.wait(120) == 0 and json.loads(Path("r/result.json").read_text())["seed"] == 1


def test_a_training_that_fails_before_its_first_checkpoint_leaves_the_folder_to_the_next(monkeypatch):
    options = tiny("rnn", "--steps", "4", "--run", "r")
    with monkeypatch.context() as m:
        m.setattr(train, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(options)
    train.main(options)
    assert Path("r/result.json").exists()


@pytest.mark.parametrize("closed_again", [False, True])
def test_a_log_that_is_open_in_a_spreadsheet_ends_no_training(monkeypatch, capsys, closed_again):
    """Windows refuses to open such a file for writing."""
    real, opened = open, []

    def refusing(file, mode="r", *more, **how):
        if str(file).endswith("log.csv") and mode in ("a", "w"):
            opened.append(1)
            if 3 < len(opened) < (9 if closed_again else 10 ** 9):
                raise PermissionError(13, "Permission denied", str(file))
        return real(file, mode, *more, **how)
    monkeypatch.setattr("builtins.open", refusing)
    train.main(tiny("rnn", "--steps", "20", "--eval-every", "10", "--no-sample", "--run", "r"))
    assert "log.csv cannot be written now (Permission denied)" in capsys.readouterr().err and Path("r/result.json").exists()
    assert [int(r["step"]) for r in rows("r")] == list(range(21 if closed_again else 3))
    assert len(last("r")["run"]["rows"]) == 21                                  # the checkpoint has all of them
    train.main(["--resume", "--run", "r"])
    assert closed_again is False or len(rows("r")) == 21


def test_minutes_are_kept_where_the_machine_becomes_slow(monkeypatch, capsys):
    """After 40 steps all takes 20 times as long. The clock is made: a step takes 1 s, an evaluation 2 s."""
    now, steps, original = [0.0], [], torch.optim.AdamW.step

    def step(self, *args):
        steps.append(1)
        now[0] += 1.0 if len(steps) <= 40 else 20.0
        return original(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: [now.__setitem__(0, now[0] + (2.0 if len(steps) <= 40 else 40.0)), evaluate(*args)][1])
    options = tiny("rnn", "--minutes", "5", "--no-sample")
    train.main([*options, "--run", "slow"])
    result = json.loads(Path("slow/result.json").read_text())
    assert 0.8 * 300 < result["seconds"] < 1.1 * 300 and result["steps"] < 100
    assert "the machine has become slower" in capsys.readouterr().err
    assert rows("slow")[-1]["val_ppl"] and int(rows("slow")[-1]["step"]) == result["steps"]
    steps.clear()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: [now.__setitem__(0, now[0] + 1.0), original(self, *args)][1])
    train.main([*options, "--run", "steady"])
    result = json.loads(Path("steady/result.json").read_text())
    assert 0.95 * 300 < result["seconds"] <= 300 and "slower" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_of_two_that_is_stopped_resumes_from_its_last_evaluation(tmp_path):
    options = tiny("lstm", "--steps", "400", "--eval-every", "20", "--log-every", "3", "--dtype", "float32")
    whole = torchrun(2, *options, "--run", "whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    process = torchrun(2, *options, "--run", "cut")
    while not Path("cut/last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert last("cut")["step"] < 400 and last("cut")["step"] % 20 == 0
    process = torchrun(2, "--resume", "--run", "cut")
    assert process.wait(120) == 0, process.stderr.read()
    assert figures("cut") == figures("whole")


CRASH = """
import os, sys, train
replace, calls = os.replace, 0
def crash(source, target):
    global calls
    calls += str(target).endswith(".pt")
    if calls == int(sys.argv[1]) and sys.argv[2] == "before":
        os._exit(9)
    replace(source, target)
    if calls == int(sys.argv[1]):
        os._exit(9)
os.replace = crash
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize("call, moment", [(1, "before"), (1, "after"), (2, "before"), (2, "after"), (3, "after"), (4, "before")])
def test_a_crash_at_any_point_of_saving_loses_nothing(call, moment):
    """The process ends (as by kill -9) just before or just after the call-th checkpoint gets its name: the first
    one of all, between best.pt and last.pt, and so on."""
    options = tiny("lstm", "--steps", "9", "--eval-every", "3", "--dtype", "float32")
    train.main([*options, "--run", "whole"])
    crashed = subprocess.run([sys.executable, "-c", CRASH, str(call), moment, *options, "--run", "cut"],
                             env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert crashed.returncode == 9, crashed.stderr
    for file in Path("cut").glob("*.pt"):
        assert "model" in torch.load(file, weights_only=True)
    # before the first last.pt there is nothing to go on from, and the run can be started again
    if Path("cut/last.pt").exists():
        train.main(["--resume", "--run", "cut"])
    else:
        with pytest.raises(UserError, match="or that died before its first checkpoint. If it died, delete cut/log.csv"):
            train.main([*options, "--run", "cut"])
        Path("cut/log.csv").unlink()
        train.main([*options, "--run", "cut"])
    assert rows("cut") == rows("whole")
    for file in ("best.pt", "last.pt"):
        a, b = (torch.load(f"{run}/{file}", weights_only=True) for run in ("cut", "whole"))
        assert a["step"] == b["step"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def survives_kills(script, options, again, kills=4):
    """Run a command whole, and once more killed (-9) at random moments and resumed; each time every file is readable, and in
    the end log and figures are those of the run that was left alone. Folders: whole, cut."""
    def command(*args):
        return subprocess.Popen([sys.executable, str(ROOT / script), *args], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    whole = command(*options, "--run", "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    rng, killed = random.Random(4), 0
    process = command(*options, "--run", "cut")
    for _ in range(30):
        while not Path("cut/last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        before = Path("cut/log.csv").stat().st_size
        while process.poll() is None and Path("cut/log.csv").stat().st_size <= before:     # until it trains again
            time.sleep(0.002)
        time.sleep(rng.random() * 0.15)
        if killed < kills:
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        killed += process.returncode == -signal.SIGKILL
        for file in Path("cut").glob("*.pt"):
            assert "model" in torch.load(file, weights_only=True)
        if process.returncode == 0:
            break
        process = command(*again, "--resume", "--run", "cut")
    assert killed >= 2 and process.returncode == 0, output
    assert figures("cut") == figures("whole")


def test_kill_9_at_random_moments_loses_nothing():
    survives_kills("train.py", tiny("lstm", "--steps", "120", "--eval-every", "4", "--log-every", "3", "--dtype", "float32"), [])


@pytest.mark.parametrize("step", [1, train.WARMING_UP, train.MEASURED - 1, train.MEASURED, train.MEASURED + 8])
def test_minutes_can_be_interrupted_while_the_speed_is_measured_and_after(monkeypatch, capsys, step):
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", ctrl_c_in(step))
        with pytest.raises(SystemExit):
            train.main(tiny("lstm", "--minutes", "0.03", "--run", "r"))
    assert ("minutes are" in capsys.readouterr().err) == (step >= train.MEASURED)
    train.main(["--resume", "--run", "r"])
    result = json.loads(Path("r/result.json").read_text())
    assert train.MEASURED < result["steps"] < 10 ** 5 and [int(r["step"]) for r in rows("r")] == list(range(result["steps"] + 1))
    assert 0.6 < result["seconds"] < 6


def test_a_text_that_has_changed_is_not_gone_on_with(capsys, monkeypatch):
    Path("my.txt").write_text("some words to learn from here\n" * 300)
    train.main(tiny("lstm", "--steps", "3", "--run", "r", "--data", "my.txt"))
    Path("my.txt").write_text("some words to learn from here here\n" * 300)
    capsys.readouterr()
    assert "no longer the text" in fails(capsys, "--resume", "--run", "r")


def test_a_full_disk_leaves_the_old_checkpoint(monkeypatch, capsys):
    train.main(tiny("lstm", "--steps", "4", "--run", "r"))
    before = Path("r/last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))     # writing past 20 kB fails
        with pytest.raises(UserError, match="cannot write r/last.pt .*free some space"):
            data.write_atomically(Path("r/last.pt"), lambda f: torch.save({"big": torch.randn(100_000)}, f))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("r/last.pt").read_bytes() == before and not list(Path("r").glob("*.part"))


def test_a_validation_loss_that_is_not_finite_is_not_saved(monkeypatch):
    original, steps = torch.optim.AdamW.step, []

    def overflow(self, *args):
        original(self, *args)
        steps.append(1)
        if len(steps) == 10:
            self.param_groups[0]["params"][0].data.fill_(math.nan)
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(UserError, match="validation loss is not finite at step 10"):
        train.main(tiny("lstm", "--steps", "20", "--eval-every", "5", "--run", "r"))
    assert torch.load("r/last.pt", weights_only=True)["step"] == 5


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(monkeypatch):
    original, calls = LSTMLM.forward, []

    def forward(self, tokens, state=None, targets=None, reduction="mean"):
        loss, state = original(self, tokens, state, targets, reduction)
        if self.training and targets is not None:
            calls.append(1)
        return loss * (math.nan if len(calls) == 8 and self.training else 1.0), state
    monkeypatch.setattr(LSTMLM, "forward", forward)
    with pytest.raises(UserError, match="not finite at step 7.*is kept in r.*smaller --lr"):
        train.main(tiny("lstm", "--steps", "20", "--eval-every", "5", "--run", "r"))
    checkpoint = torch.load("r/last.pt", weights_only=True)
    assert checkpoint["step"] == 5 and all(v.isfinite().all() for v in checkpoint["model"].values())


# ------------------------------------------------------------------------------------------------------- search

def test_search_narrows_by_thirds_and_goes_on_where_it_stopped(monkeypatch, capsys):
    space = dict(lr=(1e-3, 1e-2), n_embd=[8, 16], n_layer=[1, 2], batch_size=[4], block_size=[8, 16], dropout=[0.0, 0.5],
                 weight_decay=(0.01, 0.1))
    monkeypatch.setitem(train.SEARCH_SPACE, "lstm", space)
    monkeypatch.setattr(train, "perplexity", lambda model, ids, *more, **kw: {"nll": 3.0 + model.config.n_embd / 100, "ppl": 9.0})
    trials, tried, original = "s/trials.csv", [], train.pretrain

    def counted(config, *more, **kwargs):
        if len(tried) == 5:
            tried.append(None)
            raise KeyboardInterrupt
        tried.append(config)
        assert "test" not in more[0].ids                            # a search never sees it
        return original(config, *more, **kwargs)
    monkeypatch.setattr(train, "pretrain", counted)
    options = ["--search", "6", "--minutes", "0.06", "--run", "s", "--data", "small.txt", "--weight-decay", "0.2",
               "--log-every", "3"]
    with pytest.raises(KeyboardInterrupt):
        train.main(options)
    table = lambda: list(csv.DictReader(open(trials)))
    assert [(row["trial"], row["rung"]) for row in table()] == [(str(k), "1") for k in range(5)]
    capsys.readouterr()
    train.main(options)
    assert len(tried) == 1 + 7 + 3 + 1                          # nothing twice: 7 trials, then 3, then 1
    rungs = [[row for row in table() if row["rung"] == rung] for rung in "123"]
    assert [len(rung) for rung in rungs] == [7, 3, 1] and [row["trial"] for row in rungs[0]] == list("0123456")
    assert rungs[0][0]["n_embd"] == "512" and rungs[0][0]["lr"] == "0.011"      # trial 0: the defaults for real text
    assert all(r["n_embd"] in ("8", "16") for r in rungs[0][1:])
    assert all(r["weight_decay"] == "0.2" for r in table())                    # typed, so not drawn
    for before, after in zip(rungs, rungs[1:]):
        scores = sorted(float(r["val_ppl"]) for r in before)
        assert sorted(float(r["val_ppl"]) for r in before if r["trial"] in [a["trial"] for a in after]) == scores[:len(after)]
    out = capsys.readouterr().out
    assert "python train.py --model lstm --data small.txt --minutes 0.06 --lr" in out and "--n-embd 8" in out and "trials.csv" in out
    assert "--log-every 3" in out                                               # typed, so it belongs to the command
    assert not list(Path("s").rglob("*.pt")) and len(list(Path("s").glob("trial-*/result.json"))) == 11
    capsys.readouterr()
    train.main(options)                                         # once more: the same answer, and nothing is trained
    assert len(tried) == 12 and out.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_a_search_of_other_configurations_is_not_mixed_in(capsys):
    options = ["--search", "1", "--run", "s", "--data", "small.txt", "--n-embd", "8", "--minutes"]
    train.main([*options, "0.02"])
    capsys.readouterr()
    assert "trial-0-rung-1 was started with minutes 0.005, not 0.0075" in fails(capsys, *options, "0.03")


# --------------------------------------------------------------------------------------------- several processes

def torchrun(n, *args, script="train.py"):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port",
                             str(random.randrange(20_000, 60_000)), "--", str(ROOT / script), *args], text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))


def test_a_text_begins_with_its_end_token_and_no_state(monkeypatch):
    """In half of the rows that begin with it, whichever process has the row."""
    x = torch.randint(3, (400, 5))
    state = [(torch.ones(400, 2), torch.ones(400, 3)), torch.ones(400, 1)]
    (h, c), g = train.begin_texts(state, x, 0, 1, 7)
    begun = x[:, 0] == 0
    assert (h[~begun] == 1).all() and 0.35 < h[begun, 0].mean() < 0.65
    assert all(torch.equal(part[:, 0], h[:, 0]) for part in (c, g)) and set(h.flatten().tolist()) == {0.0, 1.0}
    assert not torch.equal(train.begin_texts(state, x, 0, 1, 8)[1], g) and train.begin_texts(None, x, 0, 1, 7) is None
    monkeypatch.setattr(train, "WORLD", 2)
    for rank, part in enumerate(g.chunk(2)):
        monkeypatch.setattr(train, "RANK", rank)
        assert torch.equal(train.begin_texts([torch.ones(200, 1)], x, 0, 1, 7)[0], part)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_whose_job_never_comes_says_what_it_waits_for(rank):
    """One of two processes, started alone."""
    environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(random.randrange(20_000, 60_000))}
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, train; train.JOINING_SECONDS = 0.2; train.join_processes(torch.device('cpu'))"
    process = subprocess.Popen([sys.executable, "-c", program], text=True, stderr=subprocess.PIPE, env=os.environ | environment)
    too_late = threading.Timer(60, process.kill)
    too_late.start()
    try:                                                        # torch may write lines of its own first
        assert any(f"process {rank} is waiting for all 2 processes of this job" in line for line in process.stderr)
    finally:
        too_late.cancel()
        process.kill()


def test_another_text_of_unknown_words_says_so(capsys):
    Path("foreign.txt").write_text("ein ganz anderer text .\n" * 50)
    train.main(tiny("rnn", "--steps", "2", "--no-sample", "--also", "foreign.txt", "--run", "r"))
    assert "of foreign.txt is <unk>" in capsys.readouterr().err


def test_a_long_context_is_evaluated_in_bounded_batches(monkeypatch):
    """32 windows of 4,096 tokens at once took 1.3 GB for one small layer."""
    model, sizes = make("transformer"), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, **how: (sizes.append(x.numel()), forward(x, **how))[1])
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", 30)
    ids = torch.randint(31, (200,))
    bounded = train.token_losses(model, ids)
    assert max(sizes) <= 30 and len(sizes) > 10
    monkeypatch.setattr(train, "TOKENS_AT_ONCE", 10_000)
    torch.testing.assert_close(bounded, train.token_losses(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_two_processes_have_the_losses_of_one(kind):
    options = tiny(kind, "--steps", "12", "--eval-every", "4", "--dtype", "float32", dropout="0")
    two = torchrun(2, *options, "--run", "two")
    assert two.wait(120) == 0, two.stderr.read()
    train.main([*options, "--run", "one"])
    one, two = rows("one"), rows("two")
    assert len(one) == len(two) == 13
    for a, b in zip(one, two):
        for column in ("train_loss", "val_loss"):
            assert a[column] == b[column] == "" or float(a[column]) == pytest.approx(float(b[column]), rel=1e-5)
    # a run goes on with another number of processes: weights, optimizer and recurrent state fit
    if kind == "lstm":
        checkpoint = torch.load("two/last.pt", weights_only=True)
        assert checkpoint["state"][0][0].shape == (8, 16)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_as_one_and_the_other_way_round():
    options = tiny("lstm", "--steps", "9", "--eval-every", "3", "--dtype", "float32", dropout="0")
    train.main([*options, "--run", "whole"])
    for run, first, second in (("a", 1, 2), ("b", 2, 1)):
        process = torchrun(first, *options, "--run", run)
        while not Path(run, "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait(120)
        process = torchrun(second, "--resume", "--run", run)
        assert process.wait(120) == 0, process.stderr.read()
        for a, b in zip(rows("whole"), rows(run)):
            assert a["train_loss"] == b["train_loss"] == "" or \
                float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-5)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_a_line_and_a_usable_checkpoint():
    options = tiny("lstm", "--steps", "100000", "--eval-every", "20", "--run", "r")
    process = torchrun(2, *options)
    while process.poll() is None and (not Path("r/log.csv").exists() or len(rows("r")) < 40):
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "another process of this job was gone" in errors, errors[-2000:]
    assert "The last checkpoint is kept in the run's folder" in errors
    sample.load_run("r")
    assert torch.load("r/last.pt", weights_only=True)["step"] % 20 == 0


# ------------------------------------------------------------------------------------------------- errors for people

def fails(capsys, *args):
    """Run the command; it must end with status 2 and one line on stderr, which is returned."""
    sys.argv = ["train.py"]
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: train.main(list(args)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_bad_input_ends_with_one_clear_line(capsys):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("only a few words\nand one more line\n")
    Path("binary.txt").write_bytes(bytes(range(256)) * 40)
    Path("my.txt").write_text("words that no grammar says\n" * 400)
    for args, message in ((["--model", "gru"], "invalid choice: 'gru'"), (["--data", "finnance"], "Corpora: finance"),
                          (["--data", "no/such/file.txt"], "no/such/file.txt"), (["--data", "empty.txt"], "is empty"),
                          (["--data", "short.txt"], "short.txt is too short"), (["--data", "binary.txt"], "has a zero byte"),
                          (["--lr", "-1"], "--lr must be above 0"), (["--dropout", "1.5"], "--dropout must be"),
                          (["--steps", "5", "--minutes", "1"], "exclude each other"), (["--device", "cuda:9"], "--device cpu"),
                          (["--model", "transformer", "--n-embd", "30"], "n_embd 30 must be"),
                          (["--model", "lstm", "--n-head", "2"], "--n-head means nothing"),
                          (["--model", "lstm", "--n-layer", "1", "--n-hidden", "8"], "set --n-embd alone"),
                          (["--seed", "-1"], "--seed must be at least 0 and below"), (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
                          (["--epochs", "inf"], "--epochs must be above 0"), (["--search", "3"], "--search needs --minutes"),
                          (["--also", "my.txt"], "go with embedded languages"), (["--cutoff", "100"], "numbered by frequency"),
                          (["--data", "my.txt", "--tokenizer", "char", "--cutoff", "5"], "numbered by frequency"),
                          (["--search", "3", "--minutes", "1", "--also", "my.txt"], "no text of --also"),
                          (["--resume", "--run", "nothing/here"], "train a model first")):
        line = fails(capsys, *args)
        assert message in line, (args, line)
    assert not Path("runs").exists()


def test_a_file_shorter_than_one_batch_says_how_much_is_needed(capsys):
    Path("short.txt").write_text("a few words here\n" * 60)
    assert "too few for one batch of 32 rows of 70 tokens" in fails(capsys, "--data", "short.txt")


def test_a_run_is_never_overwritten_silently(capsys):
    train.main(tiny("lstm", "--steps", "2", "--run", "r"))
    capsys.readouterr()
    before = {f.name: f.read_bytes() for f in Path("r").iterdir()}
    assert "already holds a run" in fails(capsys, *tiny("rnn", "--steps", "2", "--run", "r"))
    assert "started with model lstm, not rnn" in fails(capsys, "--resume", "--run", "r", "--model", "rnn")
    assert "started with seed 1, not 2" in fails(capsys, "--resume", "--run", "r", "--seed", "2")
    train.main(["--resume", "--run", "r", "--model", "lstm"])       # what was typed the first time may be typed again
    capsys.readouterr()
    assert all(Path("r", name).read_bytes() == text for name, text in before.items() if name != "result.json")


def test_characters_of_real_text_have_defaults_of_their_own_and_what_is_typed_holds(capsys):
    widths = {}
    for name, options in (("words", dict(data="my.txt")), ("characters", dict(data="my.txt", tokenizer="char")),
                          ("embedded", dict(data="finance", tokenizer="char")), ("typed", dict(data="my.txt", tokenizer="char", n_embd=24))):
        config = train.Config(model="transformer", **options)
        train.resolve_defaults(config)
        widths[name] = config.n_embd
    assert widths == {"words": 128, "characters": 192, "embedded": 128, "typed": 24}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "its characters, what differs:\n  transformer: n-embd 192" in capsys.readouterr().out


def test_the_default_model_typed_out_does_not_resume_another(capsys):
    train.main(tiny("rnn", "--steps", "2", "--run", "r"))
    capsys.readouterr()
    assert "started with model rnn, not lstm" in fails(capsys, "--resume", "--run", "r", "--model", "lstm")


@pytest.mark.parametrize("lost", ["options", "state", "run", "optimizer"])
def test_a_checkpoint_that_lacks_something_is_not_resumed(capsys, lost):
    train.main(tiny("lstm", "--steps", "2", "--run", "r"))
    checkpoint = torch.load("r/last.pt", weights_only=True)
    del checkpoint[lost]
    torch.save(checkpoint, "r/last.pt")
    capsys.readouterr()
    assert "r is not a run of python train.py, or one of another version" in fails(capsys, "--resume", "--run", "r")


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("damage", ["truncated", "malicious", "garbage", "wrong content", "another model"])
def test_a_bad_checkpoint_is_refused(capsys, damage):
    train.main(tiny("lstm", "--steps", "2", "--run", "r"))
    for file in (Path("r/best.pt"), Path("r/last.pt")):
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-1000])
        elif damage == "malicious":
            file.write_bytes(pickle.dumps({"model": Evil(), "kind": "lstm", "config": {}, "tokenizer": {}}))
        elif damage == "garbage":
            file.write_bytes(random.Random(0).randbytes(5000))
        elif damage == "wrong content":
            torch.save({"weights": torch.zeros(3)}, file)
        else:
            torch.save(torch.load(file, weights_only=True) | {"kind": "rnn"}, file)
    with pytest.raises(UserError, match="does not make a rnn model" if damage == "another model" else "cannot be loaded"):
        sample.load_run("r")
    if damage != "another model":
        capsys.readouterr()
        assert "cannot be loaded" in fails(capsys, "--resume", "--run", "r")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("run, first", [
    ("nowhere", "train.py --model lstm --run nowhere"), ("runs/rnn-ptb", "train.py --model rnn --data ptb"),
    ("runs/transformer-mine", "train.py --model transformer --run runs/transformer-mine"), ("runs/ppo-x", "ppo.py --run runs/ppo-x")])
def test_a_missing_run_says_which_command_comes_first(run, first):
    with pytest.raises(UserError, match=f"Train one first: python {first}"):
        sample.load_run(run)


def test_help_is_a_page_with_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0 and "example: python train.py" in capsys.readouterr().out


def test_each_step_drops_other_units(monkeypatch):
    seeds = []
    monkeypatch.setattr(rnn, "locked_dropout", lambda x, p, training: (training and seeds.append(torch.initial_seed()), x)[1])
    train.main(tiny("rnn", "--steps", "5", "--no-sample", "--run", "r"))
    assert len(set(seeds)) == 5


def test_a_rows_loss_is_the_mean_of_the_steps_since_the_row_before():
    options = tiny("lstm", "--steps", "9", "--eval-every", "9", "--no-sample", "--dtype", "float32")
    train.main([*options, "--log-every", "1", "--run", "each"])
    train.main([*options, "--log-every", "3", "--run", "thirds"])
    each = [float(row["train_loss"]) for row in rows("each")[1:]]
    assert [float(row["train_loss"]) for row in rows("thirds")[1:]] == pytest.approx([sum(each[k:k + 3]) / 3 for k in (0, 3, 6)], abs=1e-5)
    assert json.loads(Path("each/result.json").read_text())["epochs"] == pytest.approx(float(rows("each")[-1]["epoch"]), abs=1e-4)


def test_a_resumed_run_is_not_complete_until_it_ends_again(monkeypatch):
    train.main(tiny("rnn", "--steps", "4", "--no-sample", "--run", "r"))
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(torch.optim.AdamW, "step", ctrl_c_in(2))
        train.main(["--resume", "--run", "r", "--steps", "8"])
    assert not Path("r/result.json").exists()
    train.main(["--resume", "--run", "r"])
    assert json.loads(Path("r/result.json").read_text())["steps"] == 8


def test_a_longer_run_is_evaluated_as_often_as_if_it_had_been_planned_so():
    train.main(tiny("rnn", "--steps", "20", "--no-sample", "--run", "r"))
    train.main(["--resume", "--run", "r", "--steps", "60"])
    assert [int(row["step"]) for row in rows("r") if row["val_ppl"]] == [*range(21), *range(21, 61, 3)]


def test_a_search_has_its_folder_for_itself():
    Path("s").mkdir()
    with data.locked("s"), pytest.raises(UserError, match="another process works in s"):
        train.main(["--model", "rnn", "--data", "small.txt", "--search", "2", "--minutes", "0.05", "--run", "s"])
    assert not list(Path("s").iterdir())


def test_a_mistake_in_a_new_model_is_not_hidden(monkeypatch):
    class Wrong(RNNLM):
        def __init__(self, config):
            super().__init__(config, 3)
    monkeypatch.setitem(sample.MODELS, "rnn", (Wrong, RNNConfig))
    with pytest.raises(TypeError, match="positional argument"):
        train.main(tiny("rnn", "--steps", "2"))


def test_a_search_needs_to_know_what_to_draw(monkeypatch):
    monkeypatch.delitem(train.SEARCH_SPACE, "rnn")
    with pytest.raises(UserError, match="give it a line in SEARCH_SPACE"):
        train.main(["--model", "rnn", "--search", "3", "--minutes", "1"])


def last(run):
    return torch.load(f"{run}/last.pt", weights_only=True)


def test_where_and_how_a_run_is_computed_may_change_when_it_resumes(monkeypatch, capsys):
    options = tiny("lstm", "--steps", "12", "--eval-every", "4", "--dtype", "float32")
    train.main([*options, "--run", "whole"])
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", ctrl_c_in(5))
        with pytest.raises(SystemExit):
            train.main([*options, "--run", "cut"])
    Path("cut/best.pt").unlink()
    Path("cut/log.csv").unlink()
    Path("small.txt").rename("moved text.txt")
    with pytest.raises(UserError, match="no corpus and no file is called 'small.txt'"):
        train.main(["--resume", "--run", "cut"])
    train.main(["--resume", "--run", "cut", "--data", "moved text.txt", "--device", "cpu", "--dtype", "float32", "--log-every", "2", "--eval-every", "6"])
    assert [int(r["step"]) for r in rows("cut")] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 12] and [r["step"] for r in rows("cut") if r["val_ppl"]] == ["0", "4", "6", "12"]
    assert all(torch.equal(a, b) for a, b in zip(last("cut")["model"].values(), last("whole")["model"].values()))
    # the moved text is one that the run was trained on, so only what was held out of it is unseen
    assert sample.trained_on("cut") == [str(Path(name).resolve()) for name in ("small.txt", "moved text.txt")]
    assert data.unseen_split("moved text.txt", sample.trained_on("cut")) == "valid"
    Path("other.txt").write_text("here is w2 of the w3\n" * 600)
    with pytest.raises(UserError, match="no longer the text"):
        train.main(["--resume", "--run", "cut", "--data", "other.txt"])
    with pytest.raises(UserError, match="was started with seed 1, not 2"):
        train.main(["--resume", "--run", "cut", "--seed", "2"])


def test_an_optimizers_state_goes_to_another_kind_of_device():
    model = make("rnn")
    state = train.configure_optimizer(model, 1e-3, 0.1).state_dict()
    for group in state["param_groups"]:
        group["fused"] = False                                      # as a device without the fused kernel saves it
    optimizer = train.configure_optimizer(model, 1e-3, 0.1)
    train.load_optimizer(optimizer, state)
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("how, steps", [(["--steps", "20"], 20), (["--epochs", "2"], None), (["--minutes", "0.2"], None)])
def test_more_steps_extend_a_finished_run(capsys, how, steps):
    train.main(tiny("lstm", "--steps", "8", "--dtype", "float32", "--run", "r"))
    capsys.readouterr()
    train.main(["--resume", "--run", "r", *how])
    said = capsys.readouterr().err
    result = json.loads(Path("r/result.json").read_text())
    assert "from 8 to" in said and "learning rate's schedule" in said and result["steps"] > 8 and result["steps"] in (steps, result["steps"])
    assert [int(r["step"]) for r in rows("r")] == list(range(result["steps"] + 1))
    assert float(rows("r")[9]["lr"]) == pytest.approx(train.get_lr(8, result["steps"], result["options"]["lr"], 5), rel=1e-4)
    with pytest.raises(UserError, match="give more than these"):
        train.main(["--resume", "--run", "r", "--steps", "9"])


def test_a_run_stopped_before_its_plan_takes_steps_and_evaluates(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", ctrl_c_in(4))
        with pytest.raises(SystemExit):
            train.main(tiny("lstm", "--minutes", "1", "--run", "r"))
    train.main(["--resume", "--run", "r", "--steps", "40"])
    assert [int(r["step"]) for r in rows("r") if r["val_ppl"]] == [0, *range(6, 41, 2)]
    train.main(["--resume", "--run", "r", "--steps", "80"])
    assert [int(r["step"]) for r in rows("r") if r["val_ppl"]] == [0, *range(6, 41, 2), *range(44, 81, 4)]


def test_a_length_that_lies_behind_a_run_without_a_plan_is_refused(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.optim.AdamW, "step", ctrl_c_in(15))
        with pytest.raises(SystemExit):
            train.main(tiny("rnn", "--minutes", "1", "--run", "r"))
    with pytest.raises(UserError, match="was planned for 15 steps; to extend it, give more than these .10 is"):
        train.main(["--resume", "--run", "r", "--steps", "10"])


def test_the_length_of_a_run_may_be_typed_again(capsys):
    train.main(tiny("rnn", "--steps", "4", "--run", "r"))
    train.main(["--resume", "--run", "r", "--steps", "4"])
    assert json.loads(Path("r/result.json").read_text())["steps"] == 4
    train.main(["--resume", "--run", "r", "--steps", "6", "--lr", "0.002"])
    said = capsys.readouterr().err
    assert "changed: steps 6, was 4" in said and "changed: lr 0.002, was" in said


def test_a_trial_of_a_search_is_resumed_by_the_search(monkeypatch, capsys):
    options = ["--search", "1", "--run", "s", "--data", "small.txt", "--n-embd", "8", "--minutes", "0.02", "--n-layer", "1"]
    with monkeypatch.context() as m:
        signal_in(m, "clip_grad_norm", 3)
        with pytest.raises(SystemExit):
            train.main(options)
    with pytest.raises(UserError, match="is a trial of a search; the same search again continues it"):
        train.main(["--resume", "--run", "s/trial-0-rung-1"])


def test_a_search_draws_heads_that_fit_the_width():
    config = train.Config(model="transformer", data="small.txt", tokenizer="char", search=3)
    train.resolve_defaults(config)
    rng = random.Random(0)
    for drawn in (train.draw_options(config, set(), rng) for _ in range(40)):
        assert drawn["n_embd"] % (2 * drawn["n_head"]) == 0 and drawn["n_head"] in (4, 6)
    assert train.draw_options(config, {"n_head"}, rng)["n_head"] == 6


def test_a_folder_that_was_renamed_is_resumed_where_it_is():
    train.main(tiny("transformer", "--steps", "4", "--block-size", "4", "--run", "old"))
    Path("old").rename("new")
    train.main(["--resume", "--run", "new", "--steps", "6"])
    assert not Path("old").exists() and json.loads(Path("new/result.json").read_text())["options"]["run"] == "new"


def test_training_in_a_thread_works():
    done = []
    thread = threading.Thread(target=lambda: done.append(train.main(tiny("rnn", "--steps", "2", "--run", "r"))))
    thread.start()
    thread.join()
    assert Path("r/result.json").exists()


def test_a_text_that_is_mostly_unknown_words_is_said_to_be(capsys):
    rng = random.Random(0)
    word = lambda: "".join(rng.choice("abcdefghij") for _ in range(9))
    Path("novel.txt").write_text("".join(f"the {word()} and {word()}\n" for _ in range(3000)))
    train.main(["--model", "rnn", "--data", "novel.txt", "--steps", "2", "--n-embd", "8", "--n-hidden", "8", "--batch-size", "4", "--block-size", "8", "--run", "r"])
    out = capsys.readouterr()
    result = json.loads(Path("r/result.json").read_text())
    assert result["val_unknown"] > 0.3 and f"{result['val_unknown']:.1%} <unk>" in out.out and "--tokenizer gpt2 has no <unk>" in out.err


def test_characters_of_shakespeare_have_no_test_split(capsys, data_folder):
    (data_folder / "shakespeare").mkdir()
    (data_folder / "shakespeare" / "input.txt").write_text("".join(f"ACT {k}:\nto be, or not {k % 7}\n" for k in range(400)))
    train.main(["--model", "lstm", "--data", "shakespeare", "--tokenizer", "char", "--steps", "3", "--n-embd", "8", "--n-hidden", "8", "--batch-size", "4",
                "--block-size", "8", "--run", "r"])
    result = json.loads(Path("r/result.json").read_text())
    assert "nats per token; there is no test split, and this one chose the weights)" in capsys.readouterr().out and result["test_ppl"] is None and result["val_tokens"] > 500
    import sample
    sample.main(["--run", "r", "--prompt", "ACT", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("ACT")


def test_compile_is_refused_where_it_cannot_work(monkeypatch):
    with pytest.raises(UserError, match="--compile is for --model transformer"):
        train.main(tiny("lstm", "--compile", "--run", "r"))
    monkeypatch.setattr(train.torch, "compile", lambda f: lambda x: f(x.no_compiler))
    with pytest.raises(UserError, match="--compile does not work here: .*no_compiler.*Leave it out"):
        train.main(tiny("transformer", "--compile", "--run", "r"))


@pytest.mark.slow
def test_compiled_layers_learn_what_the_others_learn():
    results = []
    for run, more in (("a", []), ("b", ["--compile"])):
        train.main(tiny("transformer", "--steps", "30", "--dtype", "float32", "--run", run, *more, dropout="0"))
        results.append(json.loads(Path(run, "result.json").read_text())["val_ppl"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    train.main(["--resume", "--run", "b", "--steps", "32"])
    assert json.loads(Path("b/result.json").read_text())["steps"] == 32


def test_a_text_that_is_only_evaluated_is_read_completely():
    Path("short.txt").write_text("the w1 of w2\nthe w3 is here\n")
    Path("valid").write_text("w5 w6 of here\n" * 3)
    train.main(tiny("rnn", "--steps", "4", "--eval-every", "2", "--also", "short.txt", "valid", "--run", "a"))
    row = rows("a")[-1]
    model, tokenizer, _ = sample.load_run("a")
    for name, column in (("short.txt", "ppl_short.txt"), ("valid", "ppl_./valid")):
        ids = [tokenizer.eos, *tokenizer.encode(Path(name).read_text())]
        assert float(row[column]) == pytest.approx(train.perplexity(model, torch.tensor(ids))["ppl"], rel=1e-4)
    assert float(row["val_ppl"]) not in (float(row["ppl_./valid"]), float(row["ppl_short.txt"]))
    Path("one.txt").write_text("!")
    with pytest.raises(UserError, match="one.txt is too short"):
        train.main(tiny("rnn", "--steps", "4", "--also", "one.txt", "--run", "b"))


def test_a_run_goes_on_though_another_text_that_it_read_has_moved():
    Path("extra.txt").write_text("the w1 of w2\n")
    train.main(tiny("rnn", "--steps", "4", "--eval-every", "2", "--also", "extra.txt", "--run", "a"))
    Path("extra.txt").rename("elsewhere.txt")
    train.main(["--resume", "--run", "a", "--steps", "8", "--also", "elsewhere.txt"])
    assert rows("a")[-1]["ppl_elsewhere.txt"] and rows("a")[0]["ppl_extra.txt"]


def test_a_run_on_a_text_whose_name_is_not_utf8_is_complete_and_resumes():
    name = b"caf\xe9.txt".decode(errors="surrogateescape")
    Path("small.txt").rename(name)
    options = [name if word == "small.txt" else word for word in tiny("rnn", "--also", name, "--run", "a")]
    train.main([*options, "--steps", "4", "--eval-every", "2"])
    assert json.loads(Path("a/result.json").read_text())["data"] == name
    train.main(["--resume", "--run", "a", "--steps", "8"])
    assert json.loads(Path("a/result.json").read_text())["steps"] == 8


@pytest.mark.parametrize("options, heads", [(["--tokenizer", "char", "--n-embd", "64"], 4), (["--n-embd", "36"], 2), (["--n-embd", "48"], 4), (["--n-embd", "64"], 4), ([], 4)])
def test_the_number_of_heads_follows_the_width(options, heads):
    config, _ = data.parse_args(train.Config, ["--model", "transformer", "--data", "small.txt", *options])
    train.resolve_defaults(config)
    assert config.n_head == heads and train.model_config(config, 20)["n_head"] == heads
    with pytest.raises(UserError, match="n_embd 130 must be a multiple of twice n_head, 4: type --n-embd 128, or other heads"):
        train.main(["--model", "transformer", "--data", "small.txt", "--n-embd", "130"])


def test_the_first_line_says_how_layers_are_computed(capsys, monkeypatch):
    monkeypatch.setattr(train.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(train.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(train, "compile_c", lambda *_: None)
    train.main(tiny("rnn", "--steps", "2", "--run", "a"))
    assert ", 4 threads on 1 cores: slow, no C compiler (cc, or $CC): slow, a" in capsys.readouterr().err


def test_gradients_are_scaled_to_the_limit_and_never_up():
    p = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(1))]
    for scale in (0.01, 1.0, 30.0):
        p[0].grad, p[1].grad = torch.tensor([1.0, -2.0, 2.0]) * scale, torch.tensor([[4.0, 0.0], [0.0, 4.0]]) * scale
        before = [p[0].grad.clone(), p[1].grad.clone()]
        norm = math.sqrt(9 + 32) * scale
        assert train.clip_grad_norm(p, 1.0) == pytest.approx(norm)
        for parameter, grad in zip(p, before):
            torch.testing.assert_close(parameter.grad, grad * min(1, 1 / norm), atol=1e-6, rtol=1e-5)
    p[0].grad[0] = math.nan
    assert math.isnan(train.clip_grad_norm(p, 1.0)) and p[1].grad.isnan().all()


def test_a_recurrent_state_is_carried_within_an_epoch_and_begins_anew_with_the_next(monkeypatch):
    """Batch k + 1 continues what batch k read, but for the first of an epoch, which knows nothing; in all of its rows."""
    states, forward = [], LSTMLM.forward

    def watched(self, tokens, state=None, **more):
        if self.training:
            states.append([torch.zeros(1)] if state is None else [part.clone() for layer in state for part in layer])
        return forward(self, tokens, state, **more)
    monkeypatch.setattr(LSTMLM, "forward", watched)
    monkeypatch.setattr(train, "begin_texts", lambda state, *_: state)
    train.main(tiny("lstm", "--steps", "40", "--batch-size", "32", "--run", "r"))
    empty = [not any(part.any() for part in state) for state in states]
    epoch = empty[1:].index(True) + 1
    assert len(states) == 40 and 1 < epoch < 20 and empty == [step % epoch == 0 for step in range(40)]


def test_best_pt_has_the_weights_of_the_lowest_validation_loss(monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 1.0 + 1e-6, 2.5])             # at steps 0, 2, 4, 6, 8
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses), "val_ppl": 9.0})
    train.main(tiny("rnn", "--steps", "8", "--eval-every", "2", "--no-sample", "--run", "r"))
    assert sample.read_checkpoint("r/best.pt")["step"] == 4 and json.loads(Path("r/result.json").read_text())["best_step"] == 4


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine_to_a_hundredth():
    lr = [train.get_lr(step, 110, 2.0, 10) for step in range(111)]
    assert lr[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)]) and lr[10] == pytest.approx(2.0)
    for k in range(101):
        assert lr[10 + k] == pytest.approx(2.0 * (0.01 + 0.99 * (1 + math.cos(math.pi * k / 100)) / 2))
    assert lr[110] == pytest.approx(0.02) == train.get_lr(500, 110, 2.0, 10)
    assert [train.get_lr(step, math.inf, 2.0, 2) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]
