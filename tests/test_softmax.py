"""The adaptive softmax: the loss, its gradient and the logits against the definition, and everything that must not know of it."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import finetune
import ppo
import rnn
import sample
import train
from data import UserError
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from tests.test_finetune import in_processes
from tests.test_ppo import PROMPTS, V, run_policy, task_for
from tests.test_train import TINY, figures, last, rows, signal_in, torchrun
from transformer import Transformer, TransformerConfig

KINDS = ["rnn", "lstm", "transformer"]


def make(kind, vocab_size=31, cutoff=8, **sizes):
    torch.manual_seed(1)
    if kind == "transformer":
        config = dict(block_size=48, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24, cutoff=cutoff) | sizes
        model = Transformer(TransformerConfig(vocab_size, **config))
    else:
        model_type, config_type = (LSTMLM, LSTMConfig) if kind == "lstm" else (RNNLM, RNNConfig)
        model = model_type(config_type(vocab_size, **dict(n_embd=10, n_hidden=14, n_layer=2, cutoff=cutoff) | sizes))
    if hasattr(model.lm_head, "rarer"):
        for p in model.lm_head.rarer.parameters():                              # it starts as zero
            torch.nn.init.normal_(p)
        if model.lm_head.rarer.bias is not None:
            model.lm_head.rarer.bias.data += 3                                  # rarer words are drawn, too
    return model.eval()


def make_head(D=6, V=11, cutoff=4, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V, bias)
    rnn.add_cutoff(head, cutoff)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    return head.to(dtype)


def textbook(hidden, head, cutoff):
    """log p of every word, float64 [N, V], from the two softmaxes as they are defined."""
    z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    symbol = hidden @ head.rarer.weight.T + (0 if head.bias is None else head.rarer.bias)
    first = torch.cat((z[:, :cutoff], symbol), 1).softmax(1)
    return torch.cat((first[:, :cutoff], first[:, cutoff:] * z[:, cutoff:].softmax(1)), 1).log()


TARGETS = {"mixed": [0, 3, 4, 10, -1, 7, 2, 9], "no rarer one": [0, 3, 2, -1, 1, 1, 0, 2], "only rarer ones": [4, 10, 7, 5, 9, 4, 6, 8],
           "first and last": [0, 10, 3, 4, 0, 10, 3, 4]}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_loss_and_its_gradients_equal_autograd_of_the_definition(bias, targets, monkeypatch):
    monkeypatch.setattr(rnn, "MOST_LOGITS", 1)
    monkeypatch.setattr(rnn, "FEWEST_ROWS", 3)                                  # several chunks
    head, y = make_head(bias=bias), torch.tensor(targets)
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    log_p, inputs = textbook(hidden, head, 4), [hidden, *head.parameters()]
    torch.testing.assert_close(torch.log_softmax(rnn.logits_of(hidden, head), -1), log_p)
    each = -log_p.gather(1, y.clamp(min=0)[:, None])[:, 0] * (y >= 0)
    slope = torch.randn(8, dtype=torch.float64)
    for got, expected in ((rnn.softmax_loss(hidden, head, y), each.sum() / (y >= 0).sum()),
                          ((rnn.softmax_loss(hidden, head, y, "none") * slope).sum(), (each * slope).sum())):
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs, retain_graph=True)):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(rnn.softmax_loss(hidden, head, y, "none"), each.float())


@pytest.mark.parametrize("trial", range(6))
def test_random_shapes_in_float32_and_bfloat16(trial):
    rng = torch.Generator().manual_seed(trial)
    B, T, D, V = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((1, 4), (1, 9), (1, 40), (3, 3000)))
    cutoff = int(torch.randint(1, V, (), generator=rng))
    head = make_head(D, V, cutoff, trial % 2 == 0, torch.float32)
    hidden, y = torch.randn(B, T, D, generator=rng), torch.randint(V, (B, T), generator=rng)
    exact = -textbook(hidden.flatten(0, 1).double(), make_head(D, V, cutoff, trial % 2 == 0), cutoff).gather(1, y.flatten()[:, None]).view(B, T)
    p = rnn.logits_of(hidden, head).softmax(-1)
    torch.testing.assert_close(p.sum(-1), torch.ones(B, T))
    torch.testing.assert_close(rnn.softmax_loss(hidden, head, y), exact.mean().float(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(rnn.softmax_loss(hidden, head, y, "none"), exact.float(), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            in_bf16, scale = rnn.softmax_loss(hidden, head, y, "none"), (hidden.norm(dim=-1).max() * head.weight.norm(dim=1).max())
            assert in_bf16.dtype == torch.float32 and (in_bf16 - exact).abs().max() < 0.02 * scale
            torch.testing.assert_close(rnn.logits_of(hidden, head).softmax(-1).sum(-1), torch.ones(B, T))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cutoff", [0, 31, 1000])
def test_without_rarer_words_it_is_the_ordinary_softmax(kind, cutoff):
    model, ordinary = make(kind, cutoff=cutoff), make(kind, cutoff=0)
    assert model.state_dict().keys() == ordinary.state_dict().keys()
    x, y = torch.randint(31, (2, 2, 9))
    hidden = model(x)[0]
    torch.testing.assert_close(model(x, targets=y)[0], F.cross_entropy((hidden @ model.lm_head.weight.T + (model.lm_head.bias if model.lm_head.bias is not None else 0)).flatten(0, 1), y.flatten()))


@pytest.mark.parametrize("kind", KINDS)
def test_all_other_first_weights_are_those_of_a_model_without(kind):
    one, other = make(kind).state_dict(), make(kind, cutoff=0).state_dict()
    new = one.keys() - other.keys()
    assert new and all(name.startswith("lm_head.rarer.") for name in new) and all(torch.equal(one[name], other[name]) for name in other)
    assert sum(one[name].numel() for name in new) == one["lm_head.weight"].shape[1] + ("lm_head.bias" in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_the_gradient_of_its_logits(kind, tied):
    model = make(kind, tied=tied).double()
    x, y = torch.randint(31, (2, 3, 9))
    parameters = list(model.parameters())
    got = torch.autograd.grad(model(x, targets=y)[0], parameters)
    expected = torch.autograd.grad(F.cross_entropy(model.logits(model(x)[0]).flatten(0, 1), y.flatten()), parameters)
    for (name, _), a, b in zip(model.named_parameters(), got, expected):
        torch.testing.assert_close(a, b, msg=name)
        assert a.abs().max() > 0, name


def test_suppressed_words_have_probability_0_frequent_or_rare():
    head, hidden = make_head(), torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    suppressed = torch.tensor([2, 9])
    y = torch.tensor([0, 1, 3, 4, 10] * 4)
    p = textbook(hidden, head, 4).exp()
    expected = -(p.gather(1, y[:, None])[:, 0] / (1 - p[:, suppressed].sum(1))).log()
    got = rnn.softmax_loss(hidden, head, y, "none", suppressed)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), hidden, retain_graph=True), torch.autograd.grad(expected.sum(), hidden))
    with torch.no_grad():
        torch.testing.assert_close(rnn.softmax_loss(hidden, head, y, "none", suppressed), expected)
        assert rnn.softmax_loss(hidden, head, y * 0 + 9, "none", suppressed).isinf().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 1.7}, {"suppressed_tokens": [1, 20]}])
def test_greedy_generation_equals_reading_everything_anew(kind, how):
    """Also in bfloat16, where packed weights and kernels for few rows are in use: its first token at least."""
    model, prompt = make(kind), [3, 1, 4, 1, 5]
    text = list(prompt)
    with torch.no_grad():
        for _ in range(25):
            hidden = model(torch.tensor([text]))[0][0, -1:]
            logits = textbook(hidden, model.lm_head, 8)[0]
            scores = hidden @ model.lm_head.weight.T + (model.lm_head.bias if model.lm_head.bias is not None else 0)
            symbol = model.lm_head.rarer(hidden)[0]
            logits = torch.cat((scores[0, :8], symbol + scores[0, 8:].log_softmax(0)))
            for token in set(text) if "repetition_penalty" in how else ():
                logits[token] *= 1.7 if logits[token] < 0 else 1 / 1.7
            logits[how.get("suppressed_tokens", [])] = -math.inf
            text.append(int(logits.argmax()))
    assert sample.generate(model, [prompt], 25, temperature=0, **how)[0] == text[5:]


def test_a_penalty_changes_a_frequent_word_as_it_does_with_an_ordinary_softmax():
    """An ordinary head whose logits are the same ones at one hidden state: its scores are scaled alike."""
    head, hidden = make_head(), torch.randn(1, 6, dtype=torch.float64)
    z = (hidden @ head.weight.T + head.bias)[0]
    ordinary = z.clone()
    ordinary[4:] = ordinary[4:] - ordinary[4:].logsumexp(0) + head.rarer(hidden)[0]     # the same sum of the rarer ones
    for word in range(4):
        seen = torch.tensor([[word]])
        got = sample.penalize(rnn.logits_of(hidden, head), seen, 1.5).softmax(-1)[0]
        score = z[word] * 1.5 if z[word] < 0 else z[word] / 1.5
        others = sum(ordinary[i].exp() for i in range(11) if i != word)
        torch.testing.assert_close(got[word], score.exp() / (score.exp() + others))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_drawn_is_scored_with_the_same_probability(kind, dtype):
    """Drawn token by token, in bfloat16 with packed weights and the kernels for few rows; scored as whole texts."""
    model, exact, prompts = make(kind, vocab_size=300, cutoff=60).to(dtype), make(kind, vocab_size=300, cutoff=60), [[3, 1, 4], [9], [200, 250]]
    sample.speed_up(model)
    drawn = [[] for _ in prompts]
    for token, log_p, _ in sample.generate_stream(model, prompts, 12, temperature=1.0, seed=3):
        for row, t, value in zip(drawn, token.tolist(), log_p.tolist()):
            if t >= 0:
                row.append((t, value))
    for prompt, row in zip(prompts, drawn):
        nll = train.token_losses(exact, torch.tensor(prompt + [t for t, _ in row]))[len(prompt) - 1:]
        torch.testing.assert_close(-nll, torch.tensor([value for _, value in row], dtype=torch.float64), atol=1e-4 if dtype == torch.float32 else 0.15, rtol=1e-4 if dtype == torch.float32 else 0.03)
    assert any(t >= 60 for row in drawn for t, _ in row)


# ------------------------------------------------------------------------------------------------------ whole runs

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("".join(f"the w{chr(97 + i % 17)} of w{chr(97 + i * i % 23)} is v{chr(97 + i % 5)} here\n" for i in range(600)))


def options(kind, *more):
    own = ["--n-head", "2", "--n-layer", "2"] if kind == "transformer" else []
    return ["--model", kind, *TINY, *own, "--data", "small.txt", "--cutoff", "8", "--dtype", "float32", *more]


def test_the_cutoff_follows_the_vocabulary_and_a_typed_one_holds(capsys):
    Path("many.txt").write_text("".join(f"{word} {word}\n" for word in (f"{a}{b}{c}{d}" for a in "abcdef" for b in "abcdefghij" for c in "abcdefghij" for d in "abcdefghij")))
    for more, expected in ((["--data", "many.txt"], 5402 // 5), (["--data", "many.txt", "--cutoff", "0"], 0), (["--data", "many.txt", "--cutoff", "7"], 7),
                           (["--data", "small.txt"], 0), (["--data", "small.txt", "--tokenizer", "char"], 0), (["--data", "finance"], 0)):
        run = f"r{len(list(Path().iterdir()))}"
        train.main(["--model", "rnn", "--n-embd", "8", "--batch-size", "2", "--block-size", "8", "--steps", "1", "--no-sample", "--run", run, *more])
        checkpoint = last(run)
        assert checkpoint["config"]["cutoff"] == checkpoint["options"]["cutoff"] == json.loads(Path(run, "result.json").read_text())["options"]["cutoff"] == expected
        assert ("lm_head.rarer.weight" in checkpoint["model"]) == bool(expected)
    with pytest.raises(UserError, match="cutoff"):
        train.main(["--cutoff", "-1"])
    characters = data.CharTokenizer(["<unk>", "\n", *map(chr, range(0x4e00, 0x4e00 + 6000))])
    assert train.default_cutoff(characters) == 0                    # they are not numbered by frequency


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_bit_for_bit(kind, monkeypatch):
    train.main(options(kind, "--steps", "12", "--eval-every", "4", "--run", "whole"))
    with monkeypatch.context() as m:
        signal_in(m, "clip_grad_norm", 6)
        with pytest.raises(SystemExit):
            train.main(options(kind, "--steps", "12", "--eval-every", "4", "--run", "cut"))
    train.main(["--resume", "--run", "cut"])
    assert figures("cut") == figures("whole")
    with pytest.raises(UserError, match="was started with cutoff 8, not 0"):
        train.main(["--resume", "--run", "cut", "--cutoff", "0", "--steps", "20"])


def test_a_run_from_before_there_was_a_cutoff_has_none(monkeypatch):
    """Its checkpoints name none. It is opened, and resumed, with the ordinary softmax."""
    monkeypatch.setattr(train, "default_cutoff", lambda tokenizer: 8)
    train.main(options("lstm", "--cutoff", "0", "--steps", "6", "--eval-every", "3", "--run", "whole"))
    with monkeypatch.context() as m:
        signal_in(m, "clip_grad_norm", 4)
        with pytest.raises(SystemExit):
            train.main(options("lstm", "--cutoff", "0", "--steps", "6", "--eval-every", "3", "--run", "old"))
    for file in ("last.pt", "best.pt"):
        checkpoint = torch.load(f"old/{file}", weights_only=True)
        for part in ("config", "options"):
            checkpoint.get(part, {}).pop("cutoff", None)
        torch.save(checkpoint, f"old/{file}")
    assert sample.load_run("old")[0].config.cutoff == 0
    with pytest.raises(UserError, match="was started with cutoff 0, not 8"):
        train.main(["--resume", "--run", "old", "--cutoff", "8"])
    train.main(["--resume", "--run", "old", "--cutoff", "0"])
    assert figures("old") == figures("whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_sampled_scored_reported_and_fine_tuned_like_any_other(kind, capsys):
    train.main(options(kind, "--steps", "20", "--eval-every", "10", "--run", "r"))
    model, tokenizer, _ = sample.load_run("r")
    assert model.config.cutoff == 8 and hasattr(model.lm_head, "rarer")
    with torch.no_grad():
        ids = [tokenizer.eos, *tokenizer.encode("the wa of wb is va here")]
        log_p = model.logits(model(torch.tensor([ids]))[0])[0].log_softmax(-1)
        nll = -log_p[range(len(ids) - 1), ids[1:]]
    sample.main(["--run", "r", "--prompt", "the", "--tokens", "20", "--top-k", "5", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "1"])
    capsys.readouterr()
    evaluation.main(["--run", "r", "--text", "the wa of wb is va here"])
    assert f"7 tokens, {nll.mean():.3f} nats per token" in capsys.readouterr().out
    evaluation.main(["--runs", "r", "--out", "all"])
    assert f"{json.loads(Path('r/result.json').read_text())['test_ppl']:.2f}" in Path("all/report.md").read_text()
    finetune.main(["--base", "r", "--data", "small.txt", "--run", "tuned", "--steps", "4", "--batch-size", "4", "--block-size", "12", "--no-sample", "--prompts", "the"])
    assert sample.load_run("tuned")[0].config.cutoff == 8


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_a_policy_with_a_cutoff_is_trained_by_ppo(kind, tmp_path):
    """At every token the policy's probability is that of the definition. The reward grows."""
    sizes = dict(block_size=64) if kind == "transformer" else {}
    model = make(kind, vocab_size=V, cutoff=20, **sizes)
    task = task_for(tmp_path, model)
    r = ppo.rollout(task, model, PROMPTS, seed=3)
    values = ppo.evaluate_actions(task, model, r)
    for row, prompt in enumerate(PROMPTS):
        n = int(r.mask[row].sum())
        with torch.no_grad():
            hidden = model(r.tokens[row:row + 1])[0][0, len(prompt) - 1:len(prompt) - 1 + n]
            p = textbook(hidden, model.lm_head, 20).exp()
        p[:, task.suppressed] = 0
        expected = (p / p.sum(1, keepdim=True)).log().gather(1, r.tokens[row, len(prompt):len(prompt) + n, None])[:, 0]
        torch.testing.assert_close(values["log_prob"][row][r.mask[row] > 0], expected, atol=1e-4, rtol=1e-4)
    _, log = run_policy(tmp_path, model, steps=12, lr=0.02)
    assert float(log[-1]["reward"]) > float(log[1]["reward"]) + 0.1


@pytest.mark.slow
def test_compiled_layers_learn_what_the_others_learn():
    train.main(options("transformer", "--steps", "4", "--no-sample", "--run", "one"))
    train.main(options("transformer", "--steps", "4", "--no-sample", "--compile", "--run", "two"))
    assert float(rows("one")[-1]["val_loss"]) == pytest.approx(float(rows("two")[-1]["val_loss"]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_two_processes_have_the_losses_of_one(kind):
    command = options(kind, "--steps", "9", "--eval-every", "3", "--dropout", "0", *([] if kind == "transformer" else ["--dropout-input", "0", "--dropout-embed", "0"]))
    two = torchrun(2, *command, "--run", "two")
    assert two.wait(120) == 0, two.stderr.read()
    train.main([*command, "--run", "one"])
    # the mean over a batch is the mean of two halves; rare targets are as many in neither
    for a, b in zip(rows("one"), rows("two"), strict=True):
        assert a["val_loss"] == b["val_loss"] == "" or float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5)


@pytest.mark.slow
def test_shares_of_the_weights_learn_what_one_process_learns():
    train.main(options("transformer", "--steps", "5", "--no-sample", "--dropout", "0", "--run", "base"))
    command = ["--base", "base", "--data", "small.txt", "--steps", "6", "--eval-every", "3", "--batch-size", "4", "--block-size", "12", "--no-sample",
               "--prompts", "the", "--dtype", "float32"]
    in_processes(2, *command, "--run", "two", "--shard")
    finetune.main([*command, "--run", "one"])
    for a, b in zip(rows("one"), rows("two"), strict=True):
        assert a["val_loss"] == b["val_loss"] == "" or float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5)
