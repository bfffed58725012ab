"""Evaluation: every number against a reference written out here, and a report that survives whatever it is given."""
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from data import UserError, WordTokenizer
from tests.conftest import ROOT, next_words, real
from tests.test_train import KINDS, make
from transformer import Transformer, TransformerConfig

CLIMATE = ROOT / "tests" / "climate.txt"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def words_run(kind="lstm", model=None, corpus="?"):
    """A run with an untrained model on a vocabulary of 31 words, <unk> among them."""
    tokenizer = WordTokenizer(["<eos>", "<unk>", "N"] + [f"w{chr(97 + i)}" for i in range(28)])
    return evaluation.Trained(kind, model or make(kind), tokenizer, [], {}, {"data": corpus, "model": kind})


def reference_losses(model, ids, eos):
    """-log p of each token, one forward pass per token."""
    out = []
    for k in range(len(ids)):
        limit = len(ids) if model.recurrent else model.config.block_size
        text = torch.tensor([[eos, *ids[:k]][-limit:]])
        log_p = torch.log_softmax(model.logits(model(text)[0][0, -1]).float(), -1)
        out.append(-log_p[ids[k]].item())
    return out


# ------------------------------------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3, 32])
def test_losses_equal_a_pass_per_token(kind, group):
    model = make(kind)
    texts = [torch.randint(31, (n,)).tolist() for n in (3, 1, 11, 7, 7, 12, 2)]
    with torch.no_grad():
        for text, got in zip(texts, evaluation.per_document_nll(model, texts, 0, group=group)):
            np.testing.assert_allclose(got, reference_losses(model, text, 0), atol=1e-5)


def test_a_text_longer_than_the_context_is_read_in_windows():
    model, long = make("transformer"), torch.randint(31, (40,)).tolist()
    got = evaluation.per_document_nll(model, [long, long[:5]], 0)
    assert len(got[0]) == 40 and np.allclose(got[0][:5], got[1], atol=1e-5)
    np.testing.assert_allclose(got[0], train.token_losses(model, [0, *long]).numpy())


def test_scores_equal_the_definitions():
    run, text = words_run(), ["wa wb wc wd", "we 17 zebra wf", "wg"]
    ids = [[3, 4, 5, 6], [7, 2, 1, 8], [9]]
    with torch.no_grad():
        losses = [reference_losses(run.model, i, 0) for i in ids]
    got, all_losses = evaluation.perplexities(run.model, run.tokenizer, text), sum(losses, [])
    each = [math.exp(sum(v) / len(v)) for v in losses]
    assert got["sentences"] == pytest.approx(each, rel=1e-5) and got["mean"] == pytest.approx(sum(each) / 3, rel=1e-5)
    assert got["corpus"] == pytest.approx(math.exp(sum(all_losses) / 9), rel=1e-5)
    assert got["tokens"] == 9 and got["unknown"] == pytest.approx(1 / 9)
    spelled = evaluation.Speller(["N"] + [f"w{chr(97 + i)}" for i in range(28)]).bits("zebra")
    characters = len("wa wb wc wd ") + len("we N zebra wf ") + len("wg ")
    assert got["bits_per_character"] == pytest.approx((sum(all_losses) / math.log(2) + spelled) / characters, rel=1e-5)


def test_an_unk_in_the_text_itself_is_unknown_but_has_no_spelling():
    run = words_run()
    got = evaluation.perplexities(run.model, run.tokenizer, ["wa <unk> wb"])
    assert got["unknown"] == pytest.approx(1 / 3)
    assert got["bits_per_character"] == pytest.approx(sum(got["losses"]) / math.log(2) / len("wa <unk> wb "))


def test_a_character_that_the_vocabulary_does_not_have_is_charged_21_bits():
    tokenizer = data.CharTokenizer(["<unk>", "\n", *" abcdefghijklmnopqrstuvwxyzAB"])
    got = evaluation.perplexities(make("rnn"), tokenizer, ["a b", "c \u4f60\u597d!"])
    assert got["unknown"] == pytest.approx(3 / 8)
    assert got["bits_per_character"] == pytest.approx((sum(got["losses"]) / math.log(2) + 3 * 21) / (4 + 6))


def test_a_degree_sign_is_no_initial():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "N", "c", "c."])
    assert tokenizer.normalize("at 1.1 °C. C. Lee") == ["at", "N", "c", "c.", "lee"]


def test_wikitexts_marks_are_undone_where_the_vocabulary_does_not_have_them():
    plain, wiki = WordTokenizer(["<eos>", "<unk>", "N", "well-known"]), WordTokenizer(["<eos>", "<unk>", "N", "well", "@-@", "known"])
    assert plain.normalize(evaluation.without_marks(plain, "well @-@ known 1 @.@ 5")) == ["well-known", "N"]
    assert wiki.normalize(evaluation.without_marks(wiki, "well @-@ known")) == ["well", "@-@", "known"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_model_has_the_size_of_its_vocabulary_as_perplexity(kind):
    run = words_run(kind)
    for p in run.model.parameters():
        torch.nn.init.zeros_(p)
    got = evaluation.perplexities(run.model, run.tokenizer, ["wa wb", "wc", "wd we wf wg zebra"])
    assert got["corpus"] == pytest.approx(31, rel=1e-5) and got["mean"] == pytest.approx(31, rel=1e-5)


class Source(torch.nn.Module):
    """An embedded language's own grammar as a model with the four members; hidden holds the log-probabilities."""
    recurrent, product_dtype = True, torch.float32

    def __init__(self, domain):
        super().__init__()
        self.language, self.words = data.language(domain), data.embedded_vocabulary()
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.anything = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, state=None, targets=None, reduction="mean"):
        hidden = torch.full((*tokens.shape, len(self.words)), -1e9, dtype=torch.double)
        for row, text in enumerate(tokens.tolist()):
            for k in range(len(text)):
                said = [self.words[i] for i in text[1:k + 1]]               # text[0] is the end token before it
                if "<eos>" not in said:
                    for word, p in next_words(self.language, said).items():
                        hidden[row, k, self.ids[word]] = math.log(p)
        if targets is None:
            return hidden, None
        return -hidden.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0.0), None

    def logits(self, hidden):
        return hidden


@pytest.fixture
def few_documents(monkeypatch):
    original = data.embedded_documents
    monkeypatch.setattr(data, "embedded_documents", lambda domain, split: original(domain, split)[:25])


@pytest.mark.parametrize("domain", ["finance", "reviews"])
def test_the_source_as_a_model_has_exactly_the_floor_and_repeats_every_name(domain, few_documents):
    run = evaluation.Trained("source", Source(domain), WordTokenizer(data.embedded_vocabulary()), [], {}, {"data": domain})
    got = evaluation.perplexities(run.model, run.tokenizer, evaluation.read_domain(domain))
    assert got["corpus"] == pytest.approx(data.embedded_floor(domain, "test"), rel=1e-9)
    memory = evaluation.name_memory(run)
    assert sum(cell[2] for cell in memory if cell) > 10
    assert all(abs(cell[0]) < 1e-9 and abs(cell[1]) < 1e-9 for cell in memory if cell)


def test_a_run_on_another_grammar_has_no_memory_section():
    older = WordTokenizer(data.embedded_vocabulary()[:-20])                 # the grammars have learned words since
    run = words_run(model=make("lstm", older.vocab_size), corpus="finance")
    run.tokenizer = older
    report = evaluation.measure_runs([run], {}, "the", 5)
    assert report["memory"] == {} and evaluation.memory_section(report, None) == []


# ---------------------------------------------------------------------------------------------------------- sentences

@pytest.mark.parametrize("text, expected", [
    ("It rose by 1.1 °C. The sea too.", ["It rose by 1.1 °C.", "The sea too."]),
    ("Dr. J. R. Larsen drills. She is there.", ["Dr. J. R. Larsen drills.", "She is there."]),
    ("The U.S. coast is long. In the U.S. The law is new.", ["The U.S. coast is long.", "In the U.S.", "The law is new."]),
    ("Some, e.g. Rome, fell! Why? No one knows.", ["Some, e.g. Rome, fell!", "Why?", "No one knows."]),
    ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
    ("It was shown.[12] Later it was not.", ["It was shown.[12]", "Later it was not."]),
    ("No. 5 is 3 km. away, approx. 4 mi. by road. It is far.", ["No. 5 is 3 km. away, approx. 4 mi. by road.", "It is far."]),
    ("the market fell . the bank rose . it did", ["the market fell .", "the bank rose .", "it did"]),
    ("= Heading =\n\nOne line\nAnother line.", ["One line", "Another line."]),
    ("The wave was 5 m. Boats sank. The answer is no. No one asked.", ["The wave was 5 m.", "Boats sank.", "The answer is no.", "No one asked."]),
    ("Oil, coal, etc. The rest. Big Corp. The firm.", ["Oil, coal, etc.", "The rest.", "Big Corp.", "The firm."]),
    ("He met\u00a0Dr. Lee there.", ["He met\u00a0Dr. Lee there."]),
    ("So did I. They went.", ["So did I.", "They went."]),
    ("Wait... what? 3.5 is a number. 42 is another.", ["Wait... what?", "3.5 is a number.", "42 is another."]),
    ("\u5929\u5730\u7384\u9ec3\u3002\u5b87\u5b99\uff1f\u300c\u6d2a\uff01\u300d\u8352", ["\u5929\u5730\u7384\u9ec3\u3002", "\u5b87\u5b99\uff1f", "\u300c\u6d2a\uff01\u300d", "\u8352"]),
    ("She met Dr. No. Her ship sank, i.e. \u00e9l\u00e8ves swam. \u0422\u0430\u043a. \u0438 \u0442\u0430\u043a.",
     ["She met Dr. No.", "Her ship sank, i.e. \u00e9l\u00e8ves swam.", "\u0422\u0430\u043a. \u0438 \u0442\u0430\u043a."]),
    ("", []), ("   \n\n", []), ("no end", ["no end"]), ("...", ["..."])])
def test_sentences(text, expected):
    assert evaluation.sentences(text) == expected


def test_the_climate_text_has_the_sentences_a_reader_counts():
    found = evaluation.sentences(CLIMATE.read_text(encoding="utf-8"))
    assert len(found) == 44 and not any(s.startswith("=") for s in found)


# ---------------------------------------------------------------------------------------------------- words and letters

def test_the_speller_is_a_distribution_over_words():
    speller = evaluation.Speller(["ab", "b"])
    # after a start: a or b, 1 of 2 each; letters are a, b and the end mark, and one place for all others: 4 in all
    assert speller.bits("ab") == pytest.approx(-math.log2((1 + 1) / (2 + 4)) - math.log2((1 + 1) / (1 + 4)) - math.log2((2 + 1) / (2 + 4)))
    assert speller.bits("z") > 21
    total, texts = 0.0, [""]
    for _ in range(12):
        total += sum(2 ** -speller.bits(t) for t in texts)
        texts = [t + ch for t in texts for ch in "ab"]
    assert 0.3 < total < 1


def test_frequencies_against_the_formulas():
    a, b = Counter(x=90, y=9, z=1), Counter(x=30, y=60, u=10)
    got = evaluation.compare_frequencies(a, b, n_words=4)
    p, q = ({w: c[w] / 100 for w in "xyzu"} for c in (a, b))
    divergence = sum(v[w] * math.log2(v[w] / ((p[w] + q[w]) / 2)) / 2 for v in (p, q) for w in "xyzu" if v[w])
    assert got["divergence_bits"] == pytest.approx(divergence)
    for row in got["words"]:
        w, prior = row["word"], 15_000 * (a[row["word"]] + b[row["word"]]) / 200
        delta = math.log((b[w] + prior) / (15_100 - b[w] - prior)) - math.log((a[w] + prior) / (15_100 - a[w] - prior))
        assert row["z"] == pytest.approx(delta / math.sqrt(1 / (a[w] + prior) + 1 / (b[w] + prior)))
    assert [r["word"] for r in got["words"]] == ["y", "u", "x", "z"]
    assert got["shares"] == [[(1, 0.9), (2, 0.09), (3, 0.01)], [(1, 0.6), (2, 0.3), (3, 0.1)]]
    same = evaluation.compare_frequencies(a, a)
    assert same["divergence_bits"] == 0 and same["words"] == []
    assert evaluation.compare_frequencies(Counter(x=3), Counter(y=5))["divergence_bits"] == pytest.approx(1)


def test_the_distance_of_a_name_is_counted_from_where_it_was_last_said(few_documents):
    run = evaluation.Trained("source", Source("finance"), WordTokenizer(data.embedded_vocabulary()), [], {}, {"data": "finance"})
    counts, names = Counter(), set(data.NAMES.split())
    for words, _ in data.embedded_documents("finance", "test"):
        for at, word in enumerate(words):
            if word in names and word in words[:at]:
                distance = at - max(k for k in range(at) if words[k] == word)
                counts[next(k for k, (low, high) in enumerate(evaluation.DISTANCES) if low <= distance <= high)] += 1
    assert [row and row[2] for row in evaluation.name_memory(run)] == [counts[k] or None for k in range(len(evaluation.DISTANCES))]


def test_a_corpus_is_read_from_a_split_that_the_run_has_not_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "ptb").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb/ptb.{split}.txt").write_text(f" the words of {split} \n" * 3)
    read = {split: evaluation.read_domain("ptb", trained) for split, trained in (("valid", ()), ("test", ("ptb",)))}
    assert all(f"of {split}" in text for split, texts in read.items() for text in texts)


def drawn(p, n, seed):
    """n words drawn from a distribution, as a Counter."""
    return Counter({f"w{k}": int(c) for k, c in enumerate(np.random.default_rng(seed).multinomial(n, p)) if c})


def zipf(n_words=10_000, n=900_000):
    """A training text whose words are as frequent as those of a natural language."""
    p = 1 / np.arange(1, n_words + 1)
    return drawn(p / p.sum(), n, seed=0)


def distribution(counts):
    p = np.zeros(10_000)
    for word, count in counts.items():
        p[int(word[1:])] = count
    return p / p.sum()


@pytest.mark.parametrize("n", [566, 5000])
def test_a_text_from_the_training_distribution_differs_by_chance_only(n):
    """Its divergence is the one that is printed for its size, and few of its words have |z| > 2."""
    counts, passed, seen, found = zipf(), 0, 0, []
    for seed in range(5):
        here = drawn(distribution(counts), n, seed + 1)
        found.append(evaluation.compare_frequencies(counts, here, n_words=10 ** 6))
        z = [row["z"] for row in found[-1]["words"] if row["word"] in here]
        passed, seen = passed + sum(abs(v) > 2 for v in z), seen + len(here)
    assert 0.01 < passed / seen < 0.06
    assert np.mean([f["divergence_bits"] for f in found]) == pytest.approx(found[0]["divergence_of_samples"], rel=0.05)
    assert found[0]["divergence_of_samples"] > 0.15 and found[0]["words_read"] == n


def test_words_that_are_five_times_as_frequent_are_found():
    counts = zipf()
    p = distribution(counts)
    passed = []
    for seed in range(3):
        rng, q = np.random.default_rng(seed), p.copy()
        planted = rng.choice(np.flatnonzero((5 * 5000 * p >= 14) & (p < 0.01)), 50, replace=False)
        q[planted] *= 5
        here = drawn(q / q.sum(), 5000, seed + 9)
        z = {row["word"]: row["z"] for row in evaluation.compare_frequencies(counts, here, n_words=10 ** 6)["words"]}
        passed += [z[f"w{k}"] > 2 for k in planted if here[f"w{k}"] >= 10]
    assert np.mean(passed) > 0.8 and len(passed) > 100


def test_the_penn_treebanks_own_words_differ_from_it_by_chance_only():
    words = data.read_text(real("ptb/ptb.train.txt")).split()
    counts, rng = Counter(words), np.random.default_rng(0)
    for n in (566, 5000):
        here = Counter(rng.choice(words, n).tolist())
        found = evaluation.compare_frequencies(counts, here, n_words=10 ** 6)
        passed = sum(abs(row["z"]) > 2 for row in found["words"] if row["word"] in here) / len(here)
        assert 0.02 < passed < 0.06 and found["divergence_bits"] == pytest.approx(found["divergence_of_samples"], rel=0.1)


def test_the_divergence_of_samples_does_not_depend_on_what_was_read_before():
    a, b = zipf(), drawn(distribution(zipf()), 500, 3)
    np.random.seed(3)
    assert evaluation.compare_frequencies(a, b)["divergence_of_samples"] == evaluation.compare_frequencies(a, b)["divergence_of_samples"]


def test_the_link_between_frequency_and_loss_is_pearsons():
    run = words_run()
    train_counts, said = Counter(wa=50, wb=5), Counter({"wa": 2, "wb": 2, "wc": 3, "<unk>": 1})
    scored = {"ids": [3, 4, 5, 1, 3], "losses": np.array([1.0, 2.0, 5.0, 4.0, 1.5])}
    ratio = [math.log((d + 0.5) / 8.5) - math.log((t + 0.5) / 55.5) for t, d in ((50, 2), (5, 2), (0, 3), (0, 1), (50, 2))]
    got = evaluation.frequency_and_loss(train_counts, said, run.tokenizer, scored)
    assert got == pytest.approx(np.corrcoef(ratio, scored["losses"])[0, 1]) and got > 0.5
    assert evaluation.frequency_and_loss(train_counts, said, run.tokenizer, {"ids": [3, 3], "losses": np.ones(2)}) is None


def test_distinct_counts_ngrams():
    assert evaluation.distinct([[1, 1, 1], [2, 3]], 1) == 3 / 5
    assert evaluation.distinct([[1, 1, 1], [2, 3]], 2) == 2 / 3
    assert evaluation.distinct([[], [1]], 2) is None


# ------------------------------------------------------------------------------------------------------------- report

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of a few steps: three models on an embedded language, a second seed, and two on a text of our own."""
    folder = tmp_path_factory.mktemp("trained")
    own = folder / "own.txt"
    own.write_text("".join(f"the {'cat dog cow'.split()[i % 3]} of {i % 7} towns saw mr. hale {'twice' if i % 5 else 'and left'} .\n"
                           for i in range(400)))
    small = ["--n-embd", "16", "--n-hidden", "16", "--batch-size", "8", "--block-size", "16", "--steps", "6", "--warmup-steps", "2",
             "--log-every", "2", "--eval-every", "3"]
    for name, *options in (("rnn", "--model", "rnn"), ("lstm", "--model", "lstm"), ("lstm-2", "--model", "lstm", "--seed", "2"),
                           ("transformer", "--model", "transformer", "--n-head", "2", "--also", "climate"),
                           ("own-rnn", "--model", "rnn", "--data", str(own)), ("own-bpe", "--model", "lstm", "--data", str(own), "--tokenizer", "gpt2")):
        if "gpt2" in options and not (ROOT / "data" / "tiktoken").exists():
            continue
        train.main([*small, *options, "--run", str(folder / "runs" / name)])
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def test_one_command_makes_the_whole_report(runs, few_documents, capsys):
    evaluation.main(["--domains", "climate", str(CLIMATE), "--sentences", "30"])
    md, js = Path("runs/report/report.md").read_text(), json.loads(Path("runs/report/report.json").read_text())
    for heading in ("Summary", "Loss curves", "Perplexity at stages", "Other domains", "Word frequencies", "Memory", "Samples"):
        assert f"## {heading}" in md
    rows = {row["run"]: row for row in js["summary"]}
    for name, seed in (("lstm", 1), ("lstm-2", 2)):                 # a row for each seed
        assert rows[name]["seed"] == seed and rows[name]["test"] == json.loads((runs / name / "result.json").read_text())["test_ppl"]
    assert set(js["stages"]["transformer"]) == {"val_ppl", "ppl_climate"}
    climate = js["domains"]["climate"]
    assert climate["floor"] == pytest.approx(data.embedded_floor("climate", "test"), rel=0.3) and js["domains"][str(CLIMATE)]["floor"] is None
    assert climate["runs"].keys() == {p.name for p in runs.iterdir()} - {"report"}
    for image in ("loss_curves", "stages", "memory_finance", "domains"):
        assert f"]({image}.png)" in md and (runs / "report" / f"{image}.png").read_bytes().startswith(b"\x89PNG")
    assert "written to runs/report/report.md" in capsys.readouterr().out
    evaluation.main(["--domains", "climate", "--sentences", "5"])   # its own report may be replaced


def test_a_report_is_drawn_again_from_its_numbers_alone(runs, few_documents):
    evaluation.main(["--domains", "climate", str(CLIMATE), "--sentences", "30", "--out", "r"])
    files = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    shutil.rmtree("runs")
    for name in files:
        if name != "report.json":
            Path("r", name).unlink()
    evaluation.main(["--redraw", "--out", "r"])
    assert {path.name: path.read_bytes() for path in Path("r").iterdir()} == files
    with pytest.raises(UserError, match="nowhere/report.json is not there"):
        evaluation.main(["--redraw", "--out", "nowhere"])
    older = json.loads(Path("r/report.json").read_text())
    del older["notes"]
    Path("r/report.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="r/report.json is of another version of eval.py: make the report again"):
        evaluation.main(["--redraw", "--out", "r"])


def test_vocabularies_of_one_size_are_told_apart(few_documents):
    def warned(*tokenizers):
        runs = [evaluation.Trained(f"r{k}", make("rnn"), t, [], {}, {"data": "?"}) for k, t in enumerate(tokenizers)]
        evaluation.draw_report(evaluation.measure_runs(runs, {}, "wa", 5), Path("r"))
        return "different vocabularies" in Path("r/report.md").read_text()
    one, same, other = (WordTokenizer(["<eos>", "<unk>", *(letter + str(k) for k in range(28)), "wa"]) for letter in "xxy")
    assert not warned(one, same) and warned(one, other)


def test_a_model_that_cannot_read_a_text_is_a_marked_gap(runs, few_documents):
    evaluation.main(["--domains", str(CLIMATE), "--runs", "runs/rnn", "runs/own-rnn", "--out", "r", "--sentences", "9"])
    js, md = json.loads(Path("r/report.json").read_text())["domains"][str(CLIMATE)], Path("r/report.md").read_text()
    assert js["runs"].keys() == {"own-rnn", "rnn"} and "vocabulary has no" in js["runs"]["rnn"] and "| rnn | – (the run's vocabulary has no" in md
    assert 0.5 < js["runs"]["own-rnn"]["unknown"] < 1


def test_without_matplotlib_the_report_is_complete_but_for_the_figures(runs, few_documents, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for out, name in (("r", "r"), ("my r", '"my r"')):
        evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--out", out, "--sentences", "5"])
        hint = f"There are no figures, because matplotlib is not installed. Type: pip install matplotlib; then: python eval.py --redraw --out {name}"
        lines = Path(out, "report.md").read_text().splitlines()
        assert hint in capsys.readouterr().out.splitlines() and lines[0] == "# Report" and hint in lines[:4]
        assert not list(Path(out).glob("*.png")) and "Loss curves" not in "".join(lines) and "Figure 1" not in "".join(lines)
    monkeypatch.undo()
    os.chdir(runs.parent)
    evaluation.main(["--redraw", "--out", "r"])
    assert "(Figure 1)" in Path("r/report.md").read_text() and "matplotlib" not in Path("r/report.md").read_text() and list(Path("r").glob("*.png"))


def test_a_report_has_no_heading_without_content(runs, few_documents, data_folder):
    shutil.copytree(runs / "own-rnn", "only")                       # real text: no domains, no memory of names
    (Path("only") / "log.csv").unlink()
    evaluation.main(["--runs", "only", "--out", "r", "--sentences", "5"])
    lines = [line for line in Path("r/report.md").read_text().splitlines() if line.strip()]
    levels = [len(line) - len(line.lstrip("#")) for line in lines] + [1]
    empty = [line for line, level, after in zip(lines, levels, levels[1:]) if level > 1 and 0 < after <= level]
    assert not empty and not any("Other domains" in line or "Memory" in line for line in lines)


def test_names_that_matplotlib_would_hide_or_read_as_mathematics_are_in_the_legend(runs, few_documents, monkeypatch):
    import matplotlib.figure
    legends, save = [], matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **how):
        legends.append([text.get_text().strip().replace("\\$", "$") for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()])
        return save(figure, *args, **how)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    for name in ("_old", "$a$", "__"):
        shutil.copytree(runs / "rnn", runs / name)
    evaluation.main(["--runs", "runs/_old", "runs/$a$", "runs/__", "--domains", "climate", "--out", "r", "--sentences", "5"])
    assert legends and all({"_old", "$a$", "__"} <= {text.removesuffix(", in domain") for text in legend} for legend in legends[:3])
    assert len(list(Path("r").glob("*.png"))) >= 4


@pytest.mark.parametrize("damage", [lambda lines: lines[1:], lambda lines: ["a,b", *lines[1:]], lambda lines: [lines[0], "x" + lines[1], *lines[2:]]])
def test_a_log_that_was_changed_is_left_out_with_a_line(runs, few_documents, capsys, damage):
    log = runs / "rnn" / "log.csv"
    log.write_text("\n".join(damage(log.read_text().splitlines())) + "\n")
    evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--out", "r", "--sentences", "5"])
    assert "left out: runs/rnn/log.csv is not as it was written" in capsys.readouterr().err and Path("r/report.md").exists()


def test_a_report_among_runs_is_passed_over_and_a_pattern_is_expanded(runs, few_documents, capsys):
    evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--sentences", "5"])
    assert Path("runs/report/report.json").exists()
    for name, file, content in (("scorer", "config.json", '{"model_type": "distilbert"}'), ("search", "trials.csv", "trial,rung\n")):
        Path("runs", name).mkdir()
        Path("runs", name, file).write_text(content)
    for names in (sorted(map(str, Path("runs").glob("*"))), ["runs/*"], ["runs/l*", "runs/rnn"]):
        evaluation.main(["--runs", *names, "--domains", "climate", "--sentences", "5", "--out", "r"])
        summary = {row["run"] for row in json.loads(Path("r/report.json").read_text())["summary"]}
        assert ("passed over: runs/scorer holds no language model" in capsys.readouterr().err) == (len(names) != 2)
        assert summary == {"lstm", "lstm-2", "rnn"} | ({"own-rnn", "transformer"} if len(names) != 2 else set()) | (summary & {"own-bpe"})
    with pytest.raises(UserError, match="runs/x\\*"):
        evaluation.main(["--runs", "runs/x*", "--out", "r"])


def test_a_log_cut_off_in_the_middle_is_read_as_far_as_it_goes(runs):
    log = runs / "rnn" / "log.csv"
    whole = evaluation.read_log(log)
    text = log.read_text()
    for cut in range(len(text)):
        log.write_text(text[:cut])
        assert evaluation.read_log(log) == whole[:max(0, text[:cut].count("\n") - 1)]
    log.unlink()
    assert evaluation.read_log(log) == []


def test_an_unfinished_run_is_marked_and_its_stages_are_shares_of_the_plan(runs, few_documents):
    (runs / "lstm" / "result.json").unlink()
    lines = (runs / "lstm" / "log.csv").read_text().splitlines()
    step = lines[0].split(",").index("step")
    (runs / "lstm" / "log.csv").write_text("\n".join(line for line in lines if not line.split(",")[step] in ("4", "6")) + "\n")
    evaluation.main(["--domains", "climate", "--sentences", "3"])
    js = json.loads(Path("runs/report/report.json").read_text())
    assert {row["run"]: row["seed"] for row in js["summary"]}["lstm (unfinished)"] == 1
    assert [v is None for v in js["stages"]["lstm"]["val_ppl"]] == [True, True, True, False, True]


def test_a_stage_between_two_evaluations_lies_on_the_line_of_their_losses():
    log = [{"step": k, "val_ppl": math.exp(5 - k / 150)} for k in range(0, 151, 10)]       # 15 evaluations, and one before
    stages = evaluation.at_stages(evaluation.Trained("r", None, None, log, {}, {}, 150))["val_ppl"]
    assert stages == pytest.approx([math.exp(5 - share) for share in (1 / 15, 0.1, 0.25, 0.5, 1)])
    assert evaluation.at_stages(evaluation.Trained("r", None, None, log[:9], {}, {}, 150))["val_ppl"][3:] == [pytest.approx(math.exp(4.5), rel=0.04), None]


def test_a_prompt_longer_than_the_context_is_a_marked_gap(runs, few_documents):
    evaluation.main(["--runs", "runs/transformer", "--domains", "climate", "--out", "r", "--prompt", "the " * 30])
    assert "the model's context is 16" in Path("r/report.md").read_text()


def test_a_damaged_run_is_left_out_and_named_or_refused_if_asked_for(runs, few_documents, capsys):
    (runs / "rnn" / "best.pt").write_bytes(b"no checkpoint")
    evaluation.main(["--domains", "climate", "--sentences", "5"])
    assert "left out: runs/rnn/best.pt" in capsys.readouterr().err
    assert {"lstm", "own-rnn"} <= {row["run"] for row in json.loads(Path("runs/report/report.json").read_text())["summary"]} - {"rnn"}
    assert "rnn" not in json.loads(Path("runs/report/report.json").read_text())["logs"]
    with pytest.raises(UserError, match="rnn/best.pt"):
        evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--out", "r"])


@pytest.mark.parametrize("content, message", [("", "is empty"), ("\n\n", "no sentence"), ("... !!! ,\n", "no sentence")])
def test_a_text_without_words_is_refused(runs, content, message):
    Path("t.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        evaluation.main(["--runs", "runs/own-rnn", "--domains", "t.txt"])
    assert not Path("runs/report").exists()


def test_one_token_and_words_nobody_knows_have_numbers_or_gaps(runs, few_documents):
    Path("one.txt").write_text("twice")
    Path("none.txt").write_text("xyzzy plugh frotz")
    evaluation.main(["--runs", "runs/own-rnn", "runs/rnn", "--domains", "one.txt", "none.txt", "--out", "r"])
    js = json.loads(Path("r/report.json").read_text())["domains"]
    assert js["one.txt"]["runs"]["own-rnn"]["tokens"] == 1 and js["none.txt"]["runs"]["own-rnn"]["unknown"] == 1
    assert "vocabulary has no" in js["one.txt"]["runs"]["rnn"]


def test_errors_are_one_line(runs, tmp_path):
    for options, message in ((["--run", "runs/rnn"], "go together"), (["--sentences", "0"], "above 0"),
                             (["--domains", "nowhere.txt"], "nowhere.txt"), (["--runs", "runs/none"], "no run at runs/none"),
                             (["--runs", "runs/rnn", "runs/rnn"], "same name"), (["--run", "runs/rnn", "--runs", "runs/own-rnn", "--text", "x"], "go together"), (["--run", "runs/rnn", "--text", "zebra"], "has no word .zebra"),
                             (["--run", "runs/own-rnn", "--text", "!!!"], "nothing in this text")):
        with pytest.raises(UserError, match=message):
            evaluation.main(options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="other files"):
        evaluation.main(["--out", "mine"])
    shutil.rmtree("runs")
    with pytest.raises(UserError, match="Train one first: python train.py"):
        evaluation.main([])


def test_the_quick_look_shows_every_token(runs, capsys):
    evaluation.main(["--run", "runs/own-rnn", "--text", "The cat of zebras saw"])
    *lines, picture = capsys.readouterr().out.splitlines()
    assert picture == "written to runs/report/influence.png"
    assert [line.split()[0] for line in lines[1:-2]] == ["the", "cat", "of", "<unk>", "saw"]
    assert lines[-2] == "<unk> stands for: zebras" and lines[-1].startswith("5 tokens")
    assert float(lines[-1].split()[2]) == pytest.approx(np.mean([float(line.split()[1]) for line in lines[1:-2]]), abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_influence_is_the_gradient_with_respect_to_the_words(kind):
    """Every word stands once in this text, so the gradient of its vector is that of its row of the embedding."""
    model = make(kind)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())            # else the head has it, too
    ids = torch.randperm(31)[:11]
    got = evaluation.influence(model, ids)
    assert got.shape == (10, 10) and (got.triu(1) == 0).all()
    torch.testing.assert_close(got.sum(1), torch.ones(10))
    for t in range(10):
        losses = model(ids[None, :-1], targets=ids[None, 1:], reduction="none")[0][0]
        norms = torch.autograd.grad(losses[t], model.embed_tokens.weight)[0].norm(dim=1)[ids[:-1]]
        torch.testing.assert_close(got[t], norms / norms.sum(), atol=1e-5, rtol=1e-4)


def test_the_picture_shows_each_run_and_says_where_it_is(runs, capsys, monkeypatch):
    command = ["--runs", "runs/own-rnn", "runs/rnn", "--text", data.embedded_text("finance", "test", 8), "--out", "seen"]
    pytest.importorskip("matplotlib")
    evaluation.main(command)
    out = capsys.readouterr().out
    assert "own-rnn:" in out and out.count("nats per token") == 2 and "written to seen/influence.png" in out
    assert Path("seen/influence.png").stat().st_size > 5000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluation.main(command)
    out = capsys.readouterr().out
    assert out.count("nats per token") == 2 and "pip install matplotlib" in out and not Path("seen/influence.png").exists()
    evaluation.main(["--runs", "runs/own-rnn", "--out", "seen"])                # the picture is no file of somebody else


def test_a_text_longer_than_the_picture_is_shown_from_its_beginning(runs, capsys):
    evaluation.main(["--run", "runs/own-rnn", "--text", "the cat saw a town . " * 40])
    assert "240 tokens" in capsys.readouterr().out


def test_inputs_that_share_a_name_are_told_apart_everywhere(runs, few_documents):
    for folder, words in (("a", "the cat saw a town ."), ("b", "mr. hale left the town twice .")):
        Path(folder).mkdir()
        Path(folder, "x.txt").write_text((words + "\n") * 4)
        shutil.copytree("runs/own-rnn", f"{folder}/own-rnn")
    evaluation.main(["--runs", "a/own-rnn", "b/own-rnn", "--domains", "a/x.txt", "b/x.txt", "--out", "r"])
    js = json.loads(Path("r/report.json").read_text())
    assert [row["run"] for row in js["summary"]] == ["a/own-rnn", "b/own-rnn"]
    assert {name: set(domain["runs"]) for name, domain in js["domains"].items()} == dict.fromkeys(
        ("a/x.txt", "b/x.txt"), {"a/own-rnn", "b/own-rnn"})
    found = {tuple(each["texts"]): {row["word"] for row in each["words"] if row["per million here"]} for each in js["frequencies"].values()}
    assert {texts[1] for texts in found} == {"a/x.txt", "b/x.txt"}
    assert "hale" not in next(words for texts, words in found.items() if "a/x.txt" in texts[1])


def test_a_text_whose_name_is_not_utf8_is_read_and_named(runs, few_documents):
    name = b"caf\xe9.txt".decode(errors="surrogateescape")
    Path(name).write_text("the cat saw a town .\n")
    evaluation.main(["--runs", "runs/own-rnn", "--domains", name, "--out", "r"])
    js = json.loads(Path("r/report.json").read_text())
    assert js["domains"][name]["runs"]["own-rnn"]["tokens"] > 3 and "caf" in Path("r/report.md").read_text()
    evaluation.main(["--redraw", "--out", "r"])


def test_a_figure_that_cannot_be_drawn_is_left_out_with_a_line(runs, few_documents, monkeypatch, capsys):
    evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--out", "r", "--sentences", "5"])
    assert Path("r/loss_curves.png").exists()
    def plot_curves(*args):
        raise ZeroDivisionError("division by zero")
    monkeypatch.setattr(evaluation, "plot_curves", plot_curves)
    Path("r/loss_curves.png").unlink()
    evaluation.main(["--redraw", "--out", "r"])
    md = Path("r/report.md").read_text()
    assert "plot_curves is left out: ZeroDivisionError" in capsys.readouterr().err
    assert "loss_curves.png" not in md and "](domains.png)" in md


def test_figures_are_drawn_whatever_backend_a_shell_names(runs, few_documents, tmp_path):
    program = ("import sys; sys.path.insert(0, sys.argv[1]); import eval\n"
               "def plot(plt, path):\n    figure, axes = plt.subplots()\n    axes.plot([1, 2])\n    eval.save_figure(figure, path)\n"
               "eval.draw('f', plot, eval.Path('f.png'))")
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", program, str(ROOT)], check=True, env=environment)
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")


def test_a_book_is_scored_in_windows_under_a_model_with_a_long_context():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(31, 131072, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, n_hidden=8)).eval()
    seen, forward = [], model.forward
    model.forward = lambda tokens, *rest, **more: seen.append(tokens.shape[1]) or forward(tokens, *rest, **more)
    book = torch.randint(31, (9000,)).tolist()
    [losses, short] = evaluation.per_document_nll(model, [book, book[:300]], 0)
    assert len(losses) == 9000 and max(seen) <= 4096
    np.testing.assert_allclose(losses[:300], short, atol=1e-4)


def test_wrapped_lines_are_joined_and_what_has_no_stop_is_cut():
    words = [f"word{k % 7}" for k in range(60)]
    wrapped = textwrap.fill(" ".join(words) + ". And this is the second one.", 70)
    assert wrapped.count("\n") > 4 and evaluation.sentences(wrapped + "\n\nA title\n") == [" ".join(words) + ".", "And this is the second one.", "A title"]
    verse = "so much depends\nupon\na red wheel\nbarrow"
    assert evaluation.sentences(verse) == verse.split("\n")
    parts = evaluation.sentences("many words " * 5000)
    assert len(parts) > 20 and max(map(len, parts)) <= 2000 and " ".join(parts).split() == ["many", "words"] * 5000


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_special_characters_of_the_text_itself_have_a_row(tokenizer, capsys):
    Path("odd.txt").write_text("a \ufffd b\u200dc <unk> d\n" * 300)
    train.main(["--model", "rnn", "--data", "odd.txt", "--tokenizer", tokenizer, "--n-embd", "8", "--batch-size", "2", "--block-size", "8",
                "--steps", "2", "--run", "odd"])
    capsys.readouterr()
    evaluation.main(["--run", "odd", "--text", "a \ufffd b\u200dc <unk>"])
    assert "\ufffd" in capsys.readouterr().out


def test_a_log_that_was_changed_by_hand_is_left_out_with_a_line(tmp_path, capsys):
    (tmp_path / "log.csv").write_text("step,val_ppl\n1,12,5\n2;13\n")
    assert evaluation.read_log(tmp_path / "log.csv") == [] and "is not as it was written" in capsys.readouterr().err


@pytest.mark.parametrize("names, shown", [
    (["runs/a", "runs/b"], ["a", "b"]), (["x/a", "y/a", "y/b"], ["x/a", "y/a", "y/b"]), (["finance", "./finance"], ["finance", "./finance"]),
    (["caf\udce9"], ["caf?"]), ([], [])])
def test_names_are_as_long_as_tells_them_apart(names, shown):
    assert list(evaluation.distinct_names(names).values()) == shown


# ---------------------------------------------------------------------------------------------------------- Wikipedia

@pytest.fixture
def wikipedia(monkeypatch, data_folder):
    """A loopback server that answers as Wikipedia's API does."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            page = {"title": "Snow line", "extract": "The line is at 4.5 km. It moves."} if "Snow+line" in self.path else {"missing": True}
            body = json.dumps({"query": {"pages": [page]}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "WIKIPEDIA_URL", f"http://127.0.0.1:{server.server_port}/w/api.php")
    yield asked
    server.shutdown()


def test_an_article_is_fetched_once_and_split_into_sentences(wikipedia, data_folder):
    for _ in range(2):
        assert evaluation.read_domain("wikipedia:Snow_line") == ["The line is at 4.5 km.", "It moves."]
    assert len(wikipedia) == 1 and "explaintext=1" in wikipedia[0]
    assert [p.name for p in (data_folder / "wikipedia").iterdir()] == ["Snow_line.txt"]


def test_an_article_that_does_not_exist_is_named(wikipedia, data_folder):
    with pytest.raises(UserError, match="no article called 'Sno line'"):
        evaluation.read_domain("wikipedia:Sno_line")
    assert not list((data_folder / "wikipedia").iterdir())


def test_without_a_network_the_line_says_where_the_text_belongs(monkeypatch, data_folder):
    monkeypatch.setattr(data, "WIKIPEDIA_URL", "http://127.0.0.1:9/w/api.php")
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="Save its text as .*Snow_line.txt and run again"):
        evaluation.read_domain("wikipedia:Snow_line")
    (data_folder / "wikipedia" / "Snow_line.txt").write_text("It is high.")
    assert evaluation.read_domain("wikipedia:Snow_line") == ["It is high."]


def test_the_reward_at_a_given_divergence_lies_on_the_line_between_two_evaluations():
    points = [(0, 1.0), (2, 3.0), (1, 9.0), (6, 4.0)]
    assert [evaluation.reward_at(points, kl) for kl in (1.0, 2.0, 4.0, 6.0, 7.0)] == [2.0, 3.0, 6.0, 4.0, None]


def test_an_interrupted_report_leaves_the_one_before(runs, few_documents, monkeypatch):
    evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--sentences", "5", "--out", "r"])
    before = Path("r/report.json").read_text()

    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluation, "measure_runs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(["--runs", "runs/rnn", "--domains", "climate", "--sentences", "5", "--out", "r"])
    assert Path("r/report.json").read_text() == before
    evaluation.main(["--redraw", "--out", "r"])


def test_a_text_may_have_and_in_its_name(tmp_path):
    pytest.importorskip("matplotlib")
    counts = Counter("a a b c".split()), Counter("a b b d".split())
    found = evaluation.compare_frequencies(*counts) | {"texts": ["crime and punishment", "war and peace"]}
    assert evaluation.draw("f", evaluation.plot_frequencies, found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
