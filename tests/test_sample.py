"""Generation: what is drawn follows the softmax; prompts of unequal length; streaming; all three models."""
import math

import pytest
import torch

import data
import sample
import train
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from transformer import Transformer, TransformerConfig


def make(kind, vocab_size=29):
    torch.manual_seed(0)
    if kind == "transformer":
        return Transformer(TransformerConfig(vocab_size, block_size=48, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24)).eval()
    model_type, config = (LSTMLM, LSTMConfig) if kind == "lstm" else (RNNLM, RNNConfig)
    return model_type(config(vocab_size, n_embd=12, n_hidden=12, n_layer=2)).eval()


KINDS = ["rnn", "lstm", "transformer"]


def reference_distribution(logits, temperature, top_k=None, top_p=None):
    """One row, in plain Python: softmax, cut to top_k, cut to the nucleus, renormalised."""
    weights = {i: math.exp(v / temperature) for i, v in enumerate(logits)}
    order = sorted(weights, key=weights.get, reverse=True)
    if top_k:
        order = order[:top_k]
    p = {i: weights[i] / sum(weights[j] for j in order) for i in order}
    if top_p:
        kept, total = [], 0.0
        for i in order:
            if total >= top_p:
                break
            kept.append(i)
            total += p[i]
        p = {i: p[i] / sum(p[j] for j in kept) for i in kept}
    return p


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}])
def test_sampling_frequencies_pass_a_chi_square_test(temperature, cut):
    torch.manual_seed(1)
    logits, n = torch.randn(12) * 1.5, 60_000
    generator = torch.Generator().manual_seed(2)
    token, log_p = sample.sample_token(logits.expand(n, -1), temperature, cut.get("top_k"), cut.get("top_p"), generator)
    expected = reference_distribution(logits.tolist(), temperature, **cut)
    counts = torch.bincount(token, minlength=12).tolist()
    assert {i for i, c in enumerate(counts) if c} <= set(expected)
    chi2 = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items())
    degrees = len(expected) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 4
    for i, p in expected.items():                               # and it is told the probability it was drawn with
        if counts[i]:
            assert abs(log_p[token == i][0].item() - math.log(p)) < 1e-4


def test_a_wrong_temperature_would_fail_the_chi_square_test():
    torch.manual_seed(1)
    logits, n = torch.randn(12) * 1.5, 60_000
    token, _ = sample.sample_token(logits.expand(n, -1), 0.9, None, None, torch.Generator().manual_seed(2))
    expected = reference_distribution(logits.tolist(), 1.0)
    counts = torch.bincount(token, minlength=12)
    assert sum((counts[i] - n * p) ** 2 / (n * p) for i, p in expected.items()) > 100


def test_truncation_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert sample.top_k_top_p(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert sample.top_k_top_p(logits, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert sample.top_k_top_p(logits, top_p=0.01).isfinite().tolist() == [[True, False, False, False]]
    assert sample.top_k_top_p(logits, top_k=99, top_p=1.0).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_reading_everything_anew(kind):
    model, prompt = make(kind), [3, 1, 4, 1, 5]
    text = list(prompt)
    with torch.no_grad():
        for _ in range(30):
            hidden, _ = model(torch.tensor([text]))
            text.append(model.logits(hidden[0, -1]).argmax().item())
    assert sample.generate(model, [prompt], 30, temperature=0)[0] == text[5:]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_unequal_length_generate_as_they_would_alone(kind):
    model, prompts = make(kind), [[7], [3, 1, 4, 1, 5, 9, 2, 6], [8, 8, 2], [5] * 12]
    together = sample.generate(model, prompts, 20, temperature=0)
    assert together == [sample.generate(model, [p], 20, temperature=0)[0] for p in prompts]
    assert all(len(row) == 20 for row in together)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_equal_the_training_forward(kind):
    model, prompts = make(kind), [[7], [3, 1, 4, 1, 5], [8, 8, 2]]
    rows = [[] for _ in prompts]
    for token, log_prob, _ in sample.generate_stream(model, prompts, 15, seed=3):
        for row, (t, lp) in enumerate(zip(token.tolist(), log_prob.tolist())):
            if t >= 0:
                rows[row].append((t, lp))
    for prompt, row in zip(prompts, rows):
        text = torch.tensor([prompt + [t for t, _ in row]])
        with torch.no_grad():
            nll = model(text[:, :-1], targets=text[:, 1:], reduction="none")[0][0, len(prompt) - 1:]
        torch.testing.assert_close(-nll, torch.tensor([lp for _, lp in row]), atol=1e-5, rtol=1e-5)


def test_a_row_ends_at_its_end_token_and_the_others_go_on():
    model, eos = make("lstm", vocab_size=6), 2
    seen = [[], [], []]
    for token, log_prob, done in sample.generate_stream(model, [[1], [3, 4], [5]], 50, eos=eos, seed=0):
        for row, t in enumerate(token.tolist()):
            if t >= 0:
                seen[row].append(t)
            assert t >= 0 or log_prob[row] == 0
    assert all(eos not in row[:-1] for row in seen) and any(row[-1] == eos for row in seen)
    assert sample.generate(model, [[1], [3, 4], [5]], 50, eos=eos, seed=0) == [[t for t in row if t != eos] for row in seen]


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model = make("transformer")
    first, again, other = (sample.generate(model, [[1]], 30, seed=s) for s in (5, 5, 6))
    assert first == again != other


def test_the_transformer_goes_on_beyond_its_context():
    model = make("transformer")                                 # a context of 48
    out = sample.generate(model, [[1, 2, 3], [4]], 150, temperature=0)
    assert [len(row) for row in out] == [150, 150]
    text = [1, 2, 3] + out[0]
    with torch.no_grad():                                       # after 48 tokens it goes on from the last 24
        hidden, _ = model(torch.tensor([text[24:48]]))
    assert model.logits(hidden[0, -1]).argmax() == text[48]


def test_bad_prompts_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        sample.generate(make("rnn"), [[]], 5)
    for prompts in ([[1] * 49], [[1], [1] * 49]):
        with pytest.raises(data.UserError, match="49 tokens, the model's context is 48"):
            sample.generate(make("transformer"), prompts, 5)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_do_not_break(temperature):
    token, log_p = sample.sample_token(torch.randn(500, 7) * 50, temperature, None, None, torch.Generator().manual_seed(0))
    assert log_p.isfinite().all() and 0 <= token.min() and token.max() < 7


def test_streaming_holds_back_half_a_character(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")
    text = "a\u00e9\U0001f600b"
    printer, printed = sample.Printer(Bytes(), []), ""
    for byte in text.encode():
        printer.add(byte)
        printed += capsys.readouterr().out
        assert text.startswith(printed)
    assert printed == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_readable_text(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", kind, "--steps", "3", "--n-embd", "16", "--n-hidden", "16", "--batch-size", "4", "--block-size",
                "16", "--run", "r"] + (["--n-head", "2"] if kind == "transformer" else []))
    capsys.readouterr()
    sample.main(["--run", "r", "--prompt", "the meaning of life is", "--tokens", "12", "--n", "2", "--seed", "1"])
    out = capsys.readouterr().out
    assert out.count("The meaning of life is") == 2 and out.endswith("\n")
    sample.main(["--run", "r", "--prompt", "the meaning of life is", "--tokens", "12", "--n", "2", "--seed", "1"])
    assert capsys.readouterr().out == out


def test_unknown_words_of_a_prompt_are_named(capsys):
    tokenizer = data.WordTokenizer(["<eos>", "the", "bank"])
    assert sample.encode_prompt(tokenizer, "the zebra bank") == [0, 1, 2]
    assert "zebra" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_banned_tokens_are_never_drawn(kind):
    model = make(kind, vocab_size=7)
    free = sample.generate(model, [[1]] * 4, 40, seed=0)
    assert {2, 5} <= {t for row in free for t in row}
    assert not {2, 5} & {t for row in sample.generate(model, [[1]] * 4, 40, seed=0, suppressed_tokens=[2, 5]) for t in row}
    logits = torch.randn(7)
    kept = torch.where(torch.isin(torch.arange(7), torch.tensor([2, 5])), float("-inf"), logits)
    _, log_p = sample.sample_token(kept.expand(50, -1), 1.0, None, None, torch.Generator().manual_seed(1))
    assert log_p.isfinite().all()


def test_numbers_at_the_edges_of_the_interval_draw_no_token_of_probability_0(monkeypatch):
    logits = torch.full((1, 7), float("-inf"))
    logits[0, 2], logits[0, 4] = 0.0, -1.0
    for u, expected in ((0.0, 2), (1 - 2.0 ** -53, 4), (0.7310, 2), (0.7311, 4)):         # 1 / (1 + 1/e) = 0.73106
        monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, u, dtype=torch.float64))
        assert sample.sample_token(logits, 1.0, None, None, None)[0].item() == expected


@pytest.mark.parametrize("wrong", ["--repetition-penalty 0", "--repetition-penalty -1", "--tokens 0", "--top-p 1.5", "--temperature nan", "--n 0",
                                   "--top-k -3", "--seed -1"])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(data.UserError, match=wrong.split()[0] + " (must be|at most)"):
        sample.main(wrong.split())


def test_a_run_of_ours_does_not_chat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "rnn", "--steps", "1", "--n-embd", "8", "--n-hidden", "8", "--batch-size", "4", "--block-size", "8", "--run", "r"])
    with pytest.raises(data.UserError, match="--chat needs a model that was tuned for it"):
        sample.main(["--run", "r", "--chat"])


@pytest.mark.parametrize("kind", ["word", "char", "gpt2"])
def test_a_stream_shows_what_all_ids_together_say_and_decodes_only_what_is_new(kind, capsys):
    text = "mr. hale said: \"it's 5 % (or so), isn't it?\"\nthe market fell. and then\u4e2d\u6587 \u00e9t\u00e9 it rose ."
    if kind == "gpt2":
        pytest.importorskip("tiktoken")
        tokenizer = Bytes()
    elif kind == "char":
        tokenizer = data.CharTokenizer(["<unk>", *sorted(set(text))])
    else:
        words = [w for w in data.WordTokenizer(["<eos>"]).normalize(text) if w != "<eos>"]
        tokenizer = data.WordTokenizer(["<eos>", "<unk>", *dict.fromkeys(words + ["mr.", "hale", "it", "is", "n't", "(", ")", "%", "N", "'s"])])
    ids = tokenizer.encode(text) * 3
    decoded = []
    original = type(tokenizer).decode
    tokenizer.decode = lambda i: decoded.append(len(i)) or original(tokenizer, i)
    printer = sample.Printer(tokenizer, ids[:4])
    for token in ids[4:]:
        printer.add(token)
    printer.show(last=True)
    assert capsys.readouterr().out == original(tokenizer, ids) and max(decoded) <= 11


class Bytes:
    """A tokenizer whose tokens are bytes."""
    kind = "gpt2"

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_that_a_run_does_not_know_is_left_out_with_a_line(capsys):
    tokenizer = data.CharTokenizer(["<unk>", "\n", "a", "b"])
    assert sample.encode_prompt(tokenizer, "abxa") == [1, 2, 3, 2] and "left out: x" in capsys.readouterr().err


def test_a_prompt_has_new_lines_as_they_are_typed_or_comes_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "play.txt").write_text("ROMEO:\nwhat\tnow\n" * 200)
    train.main(["--model", "rnn", "--data", "play.txt", "--tokenizer", "char", "--n-embd", "8", "--batch-size", "2", "--block-size", "8", "--steps", "2", "--run", "r"])
    capsys.readouterr()
    sample.main(["--run", "r", "--prompt", "ROMEO:\\nwhat\\tnow", "--tokens", "1"])
    assert capsys.readouterr().out.startswith("ROMEO:\nwhat\tnow")
    (tmp_path / "prompt.txt").write_text("ROMEO:\nnow")
    sample.main(["--run", "r", "--prompt", "file:prompt.txt", "--tokens", "1"])
    assert capsys.readouterr().out.startswith("ROMEO:\nnow")


def test_a_device_whose_kernels_torch_does_not_have_is_one_line(monkeypatch):
    def zeros(*args, device=None, **more):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sample.torch, "zeros", zeros)
    with pytest.raises(data.UserError, match="--device cuda is not available here; try --device cpu"):
        sample.pick_device()


def test_samples_of_one_command_differ_and_each_is_that_of_its_own_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"w{k % 13} w{k % 7} w{k % 5}\n" for k in range(400)))
    train.main(["--model", "rnn", "--data", "text.txt", "--tokenizer", "char", "--n-embd", "8", "--batch-size", "2", "--block-size", "8", "--steps", "2", "--run", "r"])
    capsys.readouterr()

    def written(*options):
        sample.main(["--run", "r", "--tokens", "30", *options])
        return capsys.readouterr().out
    assert written("--n", "2", "--seed", "5") == written("--seed", "5") + "\n" + written("--seed", "6")
    assert written("--seed", "5") != written("--seed", "6")
