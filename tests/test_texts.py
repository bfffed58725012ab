"""What a text is: the same file is cut, encoded, scored and prompted with in one way everywhere."""
import gzip
import json
import os
import random
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import finetune
import sample
import train
from data import SEPARATOR, UserError

SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def text_of(name, *splits):
    return "".join(document for split in splits or ["all"] for document in data.documents(str(name), split))


def write(**files):
    """Write texts to paths; a path is spelled with __ for / and its extension .txt is added."""
    for name, text in files.items():
        path = Path(name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def small(kind, *more):
    return ["--model", kind, "--n-embd", "16", "--batch-size", "4", "--block-size", "12", "--steps", "4", "--no-sample", "--dtype", "float32", *more]


# ---------------------------------------------------------------------------------------------------------------- files

def test_text_files_are_found_by_their_names_in_any_case_and_behind_links(tmp_path):
    for name, text in (("lib/A.TXT", "one\n"), ("lib/b.Jsonl", '{"text": "two"}\n'), ("lib/deep/c.ndjson", '{"text": "three"}\n'),
                       ("lib/.hidden.txt", "no\n"), ("lib/.git/x.txt", "no\n"), ("lib/notes.md", "no\n"), ("elsewhere/d.txt", "four\n")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib/e.txt.GZ").write_bytes(gzip.compress(b"five\n"))
    os.symlink(tmp_path / "elsewhere", tmp_path / "lib/more")
    os.symlink(tmp_path / "lib", tmp_path / "elsewhere/back")                   # a circle: each folder is visited once
    names = [path.relative_to(tmp_path / "lib").as_posix() for path in data.text_files(tmp_path / "lib")]
    assert names == ["A.TXT", "b.Jsonl", "deep/c.ndjson", "e.txt.GZ", "more/d.txt"]
    assert text_of("lib").replace(SEPARATOR, "\n").split() == ["one", "two", "three", "five", "four"]


@pytest.mark.parametrize("name, split", [
    ("train.txt", "train"), ("ptb.train.txt", "train"), ("test.v2.txt.gz", "test"), ("train-00000-of-00003.jsonl", "train"),
    ("wiki.valid.txt", "valid"), ("VAL.txt", "valid"), ("my_dev.txt", "valid"), ("train2.txt", "train"), ("data-validation-01.txt", "valid"),
    ("my test essay.txt", None), ("training.txt", None), ("contest.txt", None), ("chapter 1.txt", None), ("wiki.train.tokens.txt", None),
    ("latest-news.txt", None)])
def test_a_name_says_a_split_by_a_word_that_a_dot_a_line_or_a_dash_sets_apart(name, split):
    assert data.split_in_name(name) == split


def test_a_name_with_two_splits_is_refused():
    write(a__train="x\n" * 50, a__train_test="y\n" * 50)
    with pytest.raises(UserError, match="train_test.txt says two splits, test and train"):
        data.load("a")


@pytest.mark.parametrize("names", [("ptb.train", "ptb.valid", "ptb.test"), ("train/x", "val/x", "test/x"), ("train-00000-of-00001", "dev.v2", "test_b")])
def test_splits_by_name_are_what_is_read(names, tmp_path):
    for name, word in zip(names, ("red", "green", "blue")):
        path = tmp_path / "train of thought" / (name + ".txt")                  # the folder that is typed says nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the {word} fox\n" * 30)
    for split, word in zip(SPLITS, ("red", "green", "blue")):
        assert set(text_of("train of thought", split).split()) == {"the", word, "fox"}


def test_a_files_name_counts_before_its_folders_and_the_rest_is_left_out(capsys):
    write(a__train__part="one\n" * 30, a__train__valid="two\n" * 5, a__notes="three\n")
    assert text_of("a", "train") == "one\n" * 30 and text_of("a", "valid") == "two\n" * 5
    assert "left out, because their names say no split: notes.txt" in capsys.readouterr().out
    write(b__test="x\n" * 9, b__more="y\n" * 9)
    with pytest.raises(UserError, match="b has test.txt but no training text"):
        data.load("b")


# ------------------------------------------------------------------------------------------------------- cuts and ends

def unequal(seed, n=60):
    rng = random.Random(seed)
    return ["".join(f"line {i} of story {k} in the old book\n" for i in range(max(1, int(rng.lognormvariate(2.5, 1.5))))) for k in range(n)]


@pytest.mark.parametrize("text", [
    SEPARATOR.join(unequal(0)), SEPARATOR.join(unequal(1, 12)), "\n\n".join(unequal(2)), "\n\n".join("word " * 180 for _ in range(10)),
    SEPARATOR.join(["a line\n" * 3000, "end\n"]), SEPARATOR * 200, SEPARATOR.join("ab" * 60), "\u5b57" * 900])
@pytest.mark.parametrize("encoding", ["char", "word"])
def test_a_cut_gives_each_split_about_its_share_and_never_lies_inside_a_separator(text, encoding):
    Path("my.txt").write_text(text)
    if not text.replace(SEPARATOR, "").strip():
        with pytest.raises(UserError, match="too short: its .* part holds no text"):
            data.load("my.txt", encoding)
        return
    parts = [text_of("my.txt", split) for split in SPLITS]
    assert "".join(parts) == text and [len(part) / len(text) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.041)
    assert sum(part.count(SEPARATOR) for part in parts) == text.count(SEPARATOR)
    if "\n" in text:
        assert all(part.endswith(("\n", SEPARATOR)) for part in parts[:2]) or SEPARATOR not in text
    assert {split: len(ids) > 0 for split, ids in data.load("my.txt", encoding).ids.items()} == dict.fromkeys(SPLITS, True)


def test_a_cut_is_at_the_end_of_a_document_if_one_is_near():
    text = "".join(f"verse {k}\nof two lines\n\n" for k in range(200))
    Path("poem.txt").write_text(text)
    assert all(text_of("poem.txt", split).endswith("lines\n\n") for split in SPLITS)
    assert len(data.documents("poem.txt", "valid")) == 10


@pytest.mark.parametrize("encoding", ["word", "char"])
def test_what_ends_a_text_is_decided_on_the_complete_corpus_and_kept(encoding):
    """Five books: validation and test text lie within the last one, so they hold no separator."""
    lines = ["".join(f"the tide {i % 7} rises .\n" for i in range(200)) for _ in range(5)]
    Path("books.txt").write_text((SEPARATOR + "\n").join(lines))
    Path("plain.txt").write_text("".join(lines))
    books, plain = (data.load(f"{name}.txt", encoding) for name in ("books", "plain"))
    assert [int((ids == books.tokenizer.eos).sum()) for ids in books.ids.values()] == [4, 0, 0]
    assert [int((ids == plain.tokenizer.eos).sum()) for ids in plain.ids.values()] == [900, 50, 50]
    for corpus, ends in ((books, 1), (plain, 3)):
        tokenizer = sample.tokenizer_from(corpus.tokenizer.state())             # as a checkpoint keeps it
        ids = tokenizer.encode(f"the tide\nrises{SEPARATOR}the tide\nrises")     # a prompt or another text follows the same rule
        assert ids.count(tokenizer.eos) == ends


@pytest.mark.parametrize("text, ends", [
    ("the fund\n\n \nrises\n", 2), ("the fund <eos>\nrises <eos> <eos>\n", 2), (f"the fund{SEPARATOR}\n{SEPARATOR}rises<eos>", 2),
    ("\n\nthe fund", 1), ("the" + " " * 200_000 + "fund\n", 1)])
def test_several_ends_with_nothing_between_them_are_one(text, ends):
    tokenizer = data.WordTokenizer(["<eos>", "<unk>", "the", "fund", "rises"])
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.eos) == ends and [i for i in ids if i] == [tokenizer.ids[w] for w in ("the", "fund", "rises") if w in text]


def test_a_written_end_is_no_word_of_the_vocabulary():
    Path("ends.txt").write_text("the fund rises <eos>the market falls<eos>\n" * 60)
    tokenizer = data.load("ends.txt").tokenizer
    assert set(tokenizer.words) == {"<eos>", "<unk>", "the", "fund", "rises", "market", "falls"}


# ---------------------------------------------------------------------------------------------- one text, three scripts

@pytest.mark.parametrize("kind, text", [
    ("poems", "".join(f"the {'red big shy'.split()[k % 3]} fox sat\nthe bird {k % 5} sang\n\n" for k in range(300))),
    ("lines", "".join(f"the fox {k % 9} sat on the mill .\n" for k in range(400))),
    ("stories", SEPARATOR.join(f"the fox {k % 9} sat .\nit sang .\n" for k in range(300)))])
@pytest.mark.parametrize("encoding", ["word", "char"])
def test_a_document_has_the_same_tokens_in_training_and_where_it_is_scored(kind, text, encoding):
    Path("my.txt").write_text(text)
    corpus = data.load("my.txt", encoding)
    documents = finetune.held_out("my.txt", 10 ** 6)
    scored = [i for document in documents for i in evaluation.encode_text(corpus.tokenizer, document)[0]]
    assert scored == corpus.ids["test"].tolist() and len(documents) > 10


def test_finetunings_held_out_figure_is_that_of_reading_each_document_alone(capsys):
    Path("poems.txt").write_text("".join(f"the {'red big shy'.split()[k % 3]} fox sat\nthe bird {k % 5} sang\n\n" for k in range(300)))
    train.main(small("lstm", "--data", "poems.txt", "--run", "base"))
    model, tokenizer, _ = sample.load_run("base")
    model.product_dtype = torch.float32
    config = finetune.Config(base="base", data="poems.txt", held_out=5, retain="", prompts=["the"], sample_tokens=2, temperature=1.0)
    documents = finetune.held_out("poems.txt", 5)
    losses = torch.cat([train.token_losses(model, data.prepend_eos(tokenizer, tokenizer.encode(text))) for text in documents])
    got = finetune.measure(model, tokenizer, config)
    assert got["corpus"] == pytest.approx(losses.mean().exp().item()) and got["tokens"] == len(losses)
    assert got["tokens"] == sum(len(tokenizer.encode(text)) for text in documents) and all(text.count("\n") == 3 for text in documents)


@pytest.mark.parametrize("content", ["the fox saw\n", "the fox saw\r\n", "the fox saw"])
def test_the_last_new_line_of_a_prompt_file_is_its_editors(content, capsys):
    Path("own.txt").write_text("the fox saw the bird .\n" * 300)
    train.main(small("lstm", "--data", "own.txt", "--run", "w"))
    Path("p.txt").write_bytes(content.encode())
    capsys.readouterr()
    for prompt in ("the fox saw", "file:p.txt"):
        sample.main(["--run", "w", "--prompt", prompt, "--temperature", "0", "--tokens", "7"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


# ------------------------------------------------------------------------------------------------------------- held out

def folder_of_nonsense():
    rng = random.Random(2)
    words = [a + b for a in "ba de fi go ku la me ni po ru".split() for b in "ba de fi go ku".split()]
    text = lambda n: "".join(" ".join(rng.choice(words) for _ in range(9)) + " .\n" for _ in range(n))
    write(mine__train=text(120), mine__valid=text(30), mine__test=text(30), other=text(200))
    return {split: Path(f"mine/{split}.txt").read_text().splitlines() for split in SPLITS}


def report(*arguments):
    evaluation.main([*arguments, "--out", "r", "--sentences", "60", "--prompt", "ba"])
    return json.loads(Path("r/report.json").read_text()), Path("r/report.md").read_text()


def test_what_a_run_was_trained_on_is_never_its_own_test(capsys):
    lines = folder_of_nonsense()
    train.main(small("transformer", "--n-head", "2", "--data", "mine", "--also", "mine", "other.txt", "--run", "o"))
    assert sample.trained_on("o") == [str(Path("mine").resolve())]
    log = evaluation.read_log(Path("o/log.csv"))
    assert log[-1]["ppl_mine"] == pytest.approx(log[-1]["val_ppl"])
    got, markdown = report("--runs", "o", "--domains", "mine", "other.txt")
    assert got["domains"]["mine"]["sentences"] == lines["test"] and "the first 30 sentences of the test split, because a run was trained on this text" in markdown
    assert len(got["domains"]["other.txt"]["sentences"]) == 60 and "the first 60 sentences of the complete text." in markdown
    # a run that was not trained on it is measured on the same sentences, and the base's text counts for what is made of it
    options = ["--steps", "3", "--batch-size", "4", "--block-size", "12", "--no-sample", "--prompts", "ba", "--held-out", "5", "--dtype", "float32"]
    finetune.main(["--base", "o", "--data", "other.txt", "--run", "ft", *options])
    assert sample.trained_on("ft") == [str(Path("mine").resolve()), str(Path("other.txt").resolve())]
    written = Path("ft/report.md").read_text()
    model, tokenizer, _ = sample.load_run("o")
    model.product_dtype = torch.float32
    expected = train.perplexity(model, data.prepend_eos(tokenizer, tokenizer.encode(Path("mine/valid.txt").read_text())))["ppl"]
    assert f"| mine (its validation split, not trained on) | {evaluation.format_number(expected)} |" in written
    got, _ = report("--runs", "ft", "--domains", "mine", "./mine/../other.txt")
    assert got["domains"]["mine"]["sentences"] == lines["test"] and 5 < len(got["domains"]["./mine/../other.txt"]["sentences"]) < 15


def test_a_text_that_has_changed_is_not_compared(capsys):
    Path("own.txt").write_text("".join(f"the fox {k % 9} sat on the mill .\n" for k in range(400)))
    write(dom="the fox sat .\nthe mill sat .\n" * 20)
    train.main(small("lstm", "--data", "own.txt", "--run", "w"))
    got, markdown = report("--runs", "w", "--domains", "dom.txt", "own.txt")
    assert "Jensen-Shannon" in markdown and not got["notes"]
    Path("own.txt").write_text("the fox sat .\n" * 500)
    capsys.readouterr()
    got, markdown = report("--runs", "w", "--domains", "dom.txt", "own.txt")
    assert "Jensen-Shannon" not in markdown and "has changed since w was trained on it" in got["domains"]["own.txt"]["runs"]["w"]
    assert "own.txt has changed since w was trained on it" in markdown and "has changed since" in capsys.readouterr().out


def test_a_corpus_that_has_a_namesake_says_which_one_is_read(capsys):
    write(stories__train="my own words only\n" * 200, stories__valid="my own words only\n" * 20)
    data.warn_of_two_meanings.cache_clear()
    train.main(small("lstm", "--data", "stories", "--run", "a"))
    assert "stories is read as the corpus of this name; for the folder stories, type ./stories" in capsys.readouterr().out
    data.warn_of_two_meanings.cache_clear()
    train.main(small("lstm", "--data", "./stories", "--run", "b"))
    out = capsys.readouterr().out
    assert "is read as the corpus" not in out and sample.load_run("b")[1].vocab_size == 6
    Path("climate").write_text("my own words only\n" * 50)
    assert len(evaluation.read_domain("climate")) == 500 and len(evaluation.read_domain("./climate")) == 50
    assert "climate is read as the corpus of this name; for the file climate, type ./climate" in capsys.readouterr().out
    assert data.labelled("reviews", "test") and data.has_test_split("finance") and not data.has_test_split("./stories")


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_a_run_may_be_named_by_its_checkpoint(file, capsys):
    train.main(small("lstm", "--run", "a"))
    capsys.readouterr()
    sample.main(["--run", f"a/{file}", "--tokens", "3", "--seed", "1"])
    assert capsys.readouterr().out.strip() and sample.trained_on(f"a/{file}") == ["finance"]
