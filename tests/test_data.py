"""The embedded languages and their floor, tokenizers, corpora, downloads and batches."""
import gzip
import hashlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from types import SimpleNamespace
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
import torch

import data
import sample
import train
from data import UserError
from tests.conftest import ROOT, next_words, real


# ---------------------------------------------------------------------------------------- the embedded languages

@pytest.mark.parametrize("domain", data.DOMAINS)
def test_next_word_probabilities_sum_to_one_and_give_the_nll(domain):
    language = data.language(domain)
    words = [w for doc, _ in data.embedded_documents(domain, "valid")[:5] for w in doc]
    nll = language.nll(words)
    for at in range(0, len(words), 3):
        p = next_words(language, words[:at])
        assert abs(sum(p.values()) - 1) < 1e-9
        assert abs(-math.log(p[words[at]]) - nll[at]) < 1e-9


def test_the_hidden_mood_is_summed_over():
    """Chain rule: the product of the conditionals is the mixture of the two moods' probabilities of the document."""
    language = data.language("reviews")
    for words, _ in data.embedded_documents("reviews", "valid")[:20]:
        by_mood = []
        for mood in (0, 1):
            stack, log_p = ["DOCUMENT"], 0.0
            for word in words:
                weights, push = language.rules[stack.pop()][word]
                log_p += math.log(weights[mood])
                stack.extend(push)
            by_mood.append(log_p)
        expected = math.log(0.5) + np.logaddexp(*by_mood)
        assert abs(-sum(language.nll(words)) - expected) < 1e-8


@pytest.mark.parametrize("domain", data.DOMAINS)
def test_what_is_generated_follows_the_stated_probabilities(domain):
    """Entropy check: on its own text the mean of nll is the mean surprise, so its z-score against an independent
    sample of the same source is small; and the first two words' frequencies pass a chi-square test."""
    language, documents = data.language(domain), data.embedded_documents(domain, "train")
    for prefix in ([], [data.TITLES[domain].split()[0]]):
        p = next_words(language, prefix)
        said = Counter(doc[len(prefix)] for doc, _ in documents if doc[:len(prefix)] == prefix)
        n = sum(said.values())
        chi2 = sum((said[w] - n * q) ** 2 / (n * q) for w, q in p.items())
        degrees = len(p) - 1
        assert chi2 < degrees + 5 * math.sqrt(2 * degrees)
        assert set(said) <= set(p)
    train_nll = language.nll([w for d, _ in documents[:500] for w in d])
    test_nll = language.nll([w for d, _ in data.embedded_documents(domain, "test") for w in d])
    error = math.sqrt(np.var(train_nll) / len(train_nll) + np.var(test_nll) / len(test_nll))
    assert abs(np.mean(train_nll) - np.mean(test_nll)) < 6 * error


def test_splits_are_the_same_every_time_and_do_not_overlap():
    again = subprocess.run([sys.executable, "-c", "import data; print(data.embedded_text('stories', 'test', 200))"],
                           capture_output=True, text=True, cwd=ROOT).stdout
    assert again.strip() == data.embedded_text("stories", "test", 200).strip()
    texts = {s: {" ".join(w) for w, _ in data.embedded_documents("finance", s)} for s in ("train", "valid", "test")}
    long = {s: {t for t in texts[s] if len(t.split()) > 25} for s in texts}
    assert not long["train"] & long["test"] and not long["train"] & long["valid"] and not long["valid"] & long["test"]


def test_vocabulary_is_shared_and_closed():
    words = data.embedded_vocabulary()
    assert 800 <= len(words) <= 1200 and len(set(words)) == len(words) and "<unk>" not in words
    for domain in data.DOMAINS:
        assert {w for d, _ in data.embedded_documents(domain, "test") for w in d} <= set(words)


def test_every_domain_can_say_every_other_domains_text_but_less_readily():
    for own in data.DOMAINS:
        nll = {d: np.mean(data.language(own).nll([w for doc, _ in data.embedded_documents(d, "test")[:100] for w in doc]))
               for d in data.DOMAINS}
        assert all(nll[d] > nll[own] + 0.5 for d in data.DOMAINS if d != own)


def test_a_name_is_always_repeated_and_verbs_agree():
    names, titles = set(data.NAMES.split()), set(" ".join(data.TITLES.values()).split())
    singular = {data.add_s(v) for kind in ("VERBS", "INTRANSITIVES") for v in data.CLASSES[kind, "finance"]}
    plural = {v for kind in ("VERBS", "INTRANSITIVES") for v in data.CLASSES[kind, "finance"]}
    nouns = {form(n) for n in data.CLASSES["NOUNS", "finance"] for form in (str, data.plural)}
    singular, plural, repeats = singular - nouns, plural - nouns, 0
    for words, _ in data.embedded_documents("finance", "valid"):
        pairs = [(a, b) for a, b in zip(words, words[1:]) if b in names]
        assert len(set(pairs)) == 1 and pairs[0][0] in titles
        repeats += len(pairs) - 1
        for a, b, c in zip(words, words[1:], words[2:]):
            if a == "every" and c in singular | plural:
                assert c in singular
            if a == "many" and c in singular | plural:
                assert c in plural
    assert repeats > 500


def test_reviews_carry_labels_that_show_in_the_words():
    labelled = data.labelled("reviews", "test")
    assert {label for _, label in labelled} == {0, 1}
    liked, disliked = set(data.LIKED.split()), set(data.DISLIKED.split())

    def guess(text):
        words = text.lower().replace(".", " ").split()
        return int(sum(w in liked for w in words) >= sum(w in disliked for w in words))
    assert np.mean([guess(text) == label for text, label in labelled]) > 0.75


class SourceModel(torch.nn.Module):
    """A language's own grammar with the four members of a model. hidden holds log p of every word."""
    recurrent, product_dtype = True, torch.float32

    def __init__(self, domain, tokenizer):
        super().__init__()
        self.language, self.tokenizer = data.language(domain), tokenizer
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def init_state(self, batch_size, max_len=None):
        return [[] for _ in range(batch_size)]

    def forward(self, tokens, state=None, targets=None, reduction="mean"):
        state = self.init_state(len(tokens)) if state is None else state
        hidden = torch.full((*tokens.shape, self.tokenizer.vocab_size), -math.inf, dtype=torch.double)
        for b, row in enumerate(tokens.tolist()):
            for t, token in enumerate(row):
                word = self.tokenizer.words[token]
                state[b] = [] if word == "<eos>" else state[b] + [word]
                for w, p in next_words(self.language, state[b]).items():
                    hidden[b, t, self.tokenizer.ids[w]] = math.log(p)
        if targets is None:
            return hidden, state
        return -hidden.gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0).float(), state

    def logits(self, hidden):
        return hidden


@pytest.fixture
def small_splits(monkeypatch):
    """Embedded corpora of 25 documents."""
    monkeypatch.setattr(data, "DOCUMENTS", {"train": 25, "valid": 25, "test": 25})
    data.embedded_documents.cache_clear()
    yield
    data.embedded_documents.cache_clear()


@pytest.mark.parametrize("domain", data.DOMAINS)
@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_source_as_a_model_gives_exactly_the_floor(domain, split, small_splits):
    corpus = data.load(domain)
    ids = data.prepend_eos(corpus.tokenizer, corpus.ids[split])
    got = train.perplexity(SourceModel(domain, corpus.tokenizer), ids)
    assert got["tokens"] == len(corpus.ids[split]) > 500 and abs(got["ppl"] / corpus.floor[split] - 1) < 1e-6


def test_the_floor_is_of_words_and_not_of_other_tokens(monkeypatch, small_splits):
    corpus = data.load("finance", made_up_gpt2(monkeypatch))
    assert corpus.floor == {"valid": None, "test": None}


# --------------------------------------------------------------------------------------------------- tokenizers

def vocabulary(*more):
    return data.WordTokenizer(["<eos>", "<unk>", *more])


@pytest.mark.parametrize("text, words", [
    ("The Fund doesn't rise 3.5%.", ["the", "fund", "does", "n't", "rise", "N"]),
    ("Mr. Smith's co. didn’t; U.S. funds", ["mr.", "smith", "'s", "co.", "did", "n't", "u.s.", "funds"]),
    ("they're (really) $1,000.00 richer!", ["they", "'re", "really", "$", "N", "richer"]),
    ("N <unk> already tokenized", ["N", "<unk>", "already", "tokenized"]),
    ("line one\nline two\n", ["line", "one", "<eos>", "line", "two", "<eos>"]),
    ("one\ntwo<|endoftext|>", ["one", "two", "<eos>"]),
])
def test_normaliser_follows_ptb(text, words):
    tokenizer = vocabulary(*sorted({w for w in words if w[0] != "<"} | {"$"}))
    tokenizer.separated = data.SEPARATOR in text
    assert tokenizer.normalize(text) == words
    assert [tokenizer.words[i] for i in tokenizer.encode(text)] == words


def test_punctuation_is_kept_only_where_the_vocabulary_has_it():
    assert vocabulary("a", "b").normalize("a, b.") == ["a", "b"]
    assert vocabulary("a", "b", ",", ".").normalize("a, b.") == ["a", ",", "b", "."]


def test_unknown_words_become_unk_or_an_error():
    assert vocabulary("a").encode("a zebra") == [2, 1]
    with pytest.raises(UserError, match="zebra"):
        data.WordTokenizer(["<eos>", "a"]).encode("a zebra")


@pytest.mark.parametrize("domain", data.DOMAINS)
def test_detokenized_text_encodes_to_the_same_ids(domain):
    tokenizer = data.WordTokenizer(data.embedded_vocabulary())
    ids = [tokenizer.ids[w] for doc, _ in data.embedded_documents(domain, "test") for w in doc]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    assert " ." not in text and " ," not in text and all(line[0].isupper() for line in text.splitlines())


def test_detokenized_prefixes_are_prefixes():
    words = "mr. smith said he does n't own ( the ) 's bank . it cost $ N @-@ fold <eos> then".split()
    texts = [data.detokenize(words[:n]) for n in range(len(words) + 1)]
    assert all(longer.startswith(text) for text, longer in zip(texts, texts[1:]))
    assert texts[-1] == "Mr. Smith said he doesn't own (the)'s bank. It cost $N-fold\nThen"


def test_tokenizer_state_round_trip():
    tokenizer = vocabulary("x", "y")
    again = sample.tokenizer_from(tokenizer.state())
    assert again.words == tokenizer.words and again.eos == 0 and again.vocab_size == 4


def made_up_gpt2(monkeypatch):
    import tiktoken
    encoding = tiktoken.Encoding("made-up", pat_str=r"\s?\w+|\s+|[^\s\w]+", special_tokens={data.SEPARATOR: 258},
                                 mergeable_ranks={bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return data.GPT2Tokenizer()


def test_byte_pair_tokenizer_round_trip(monkeypatch):
    tokenizer = made_up_gpt2(monkeypatch)
    text = "the caf\u00e9 \U0001f600 then" + data.SEPARATOR
    ids = tokenizer.encode(text)
    assert ids[0] == 257 and ids[-1] == tokenizer.eos == 258 and tokenizer.vocab_size == 259
    assert tokenizer.decode(ids) == text


def test_gpt2_files_encode_as_published():
    real("tiktoken")
    tokenizer = data.GPT2Tokenizer()
    assert tokenizer.encode("Hello world" + data.SEPARATOR) == [15496, 995, 50256] and tokenizer.vocab_size == 50257


def test_gpt2_without_its_files_says_what_to_do(data_folder, monkeypatch):
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        data.GPT2Tokenizer()


# ------------------------------------------------------------------------------------------------------ corpora

def test_unknown_words_are_numbered_by_how_often_they_stand(tmp_path):
    """<unk> takes the place of all words that occur once: 30 of them are rarer than "the" and more frequent than "of"."""
    file = tmp_path / "mine.txt"
    once = " ".join(f"{a}{b}" for a in "qwzxk" for b in "qwzxkm")
    file.write_text(("the " * 50 + "of " * 20 + "a a\n" + once + "\n") + "the\n" * 400)
    tokenizer = data.build_word_tokenizer(str(file))
    ids = np.asarray(data.load(str(file), tokenizer, ("train",)).ids["train"])
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    assert tokenizer.words == ["<eos>", "the", "<unk>", "of", "a"] and counts[tokenizer.unk] == 30
    written = tmp_path / "written.txt"                          # and those that are written <unk> are counted with them
    written.write_text("the the <unk> <unk> <unk> once\n" * 3 + "twice twice only\n" + "the the the\n" * 60)
    assert data.build_word_tokenizer(str(written)).words[:3] == ["<eos>", "the", "<unk>"]


def write_ptb(folder, train="the fund rises <unk> N\n" * 40):
    (folder / "ptb").mkdir()
    for split, text in (("train", train), ("valid", " the fund <unk> \n"), ("test", " fund the\n rises\n")):
        (folder / "ptb" / f"ptb.{split}.txt").write_text(text)


def test_ptb_layout_is_read_token_by_token(data_folder):
    write_ptb(data_folder, " the fund rises <unk> N\n mr. u.s. n't 's \n")
    corpus = data.load("ptb")
    assert [corpus.tokenizer.words[i] for i in corpus.ids["train"]] == \
        "the fund rises <unk> N <eos> mr. u.s. n't 's <eos>".split()
    assert len(corpus.ids["test"]) == 5 and corpus.floor == {"valid": None, "test": None}


def test_real_ptb_has_the_published_counts():
    file = real("ptb/ptb.train.txt")
    corpus = data.load("ptb")
    assert corpus.tokenizer.vocab_size == 10_000
    assert [len(corpus.ids[s]) for s in ("train", "valid", "test")] == [929_589, 73_760, 82_430]
    expected = file.read_text().replace("\n", " <eos> ").split()
    assert [corpus.tokenizer.words[i] for i in corpus.ids["train"][:20_000]] == expected[:20_000]


def joined(name, *splits):
    return "".join(piece for split in splits for piece in data.documents(str(name), split))


SPLITS = ("train", "valid", "test")
POEM = "".join(f"  A line of stanza {k},\n\tthe {k % 7}th of its kind\n" + "\n" * (1 + k % 3) for k in range(120))
OWN = {"poem": POEM, "lines": "".join(f"line {k % 7} has words\n" for k in range(1000)), "no end": "one two\n" * 99 + "two one",
       "spaced": "".join(f"line {k % 7} has words\n\n" for k in range(1000)), "one line": "word " * 999 + "rod",
       "no space": "\u4e2d\u6587\U0001f600" * 500, "blank first": "\n\n \n" + POEM, "few": "a b\n\nc d\n" * 9,
       "separated": data.SEPARATOR.join(f"Title\n\nstory {k} ends.\n" for k in range(99)) + "\n",
       "few separated": data.SEPARATOR.join(" ".join(f"w{(k * j) % 50}" for j in range(1200)) for k in range(8))}


@pytest.mark.parametrize("text", OWN.values(), ids=OWN)
def test_own_text_is_read_as_it_is_and_split_90_5_5(tmp_path, text):
    path = tmp_path / "my.txt"
    path.write_text(text)
    parts = [joined(path, split) for split in SPLITS]
    assert "".join(parts) == text == joined(path, "all")
    assert [len(part) / len(text) for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.02 if len(text) > 2000 else 0.1)
    corpus = data.load(str(path), "char")
    assert "".join(corpus.tokenizer.decode(corpus.ids[split]) for split in SPLITS) == text


@pytest.mark.parametrize("text, first, n", [
    (OWN["separated"], "Title\n\nstory 0 ends.\n" + data.SEPARATOR, 99), (data.SEPARATOR + "a\n\nb", data.SEPARATOR, 2),
    (POEM, "  A line of stanza 0,\n\tthe 0th of its kind\n\n", 120), (OWN["lines"], "line 0 has words\n", 1000)])
def test_documents_of_own_text_are_what_its_separators_blank_lines_or_lines_end(tmp_path, text, first, n):
    (tmp_path / "my.txt").write_text(text)
    pieces = list(data.documents(str(tmp_path / "my.txt"), "all"))
    assert pieces[0] == first and len(pieces) == n


def test_words_of_own_text_have_one_end_between_paragraphs(tmp_path):
    (tmp_path / "my.txt").write_text("the fund\nrises\n \n\n" * 100)
    corpus = data.load(str(tmp_path / "my.txt"))
    assert [corpus.tokenizer.words[k] for k in corpus.ids["valid"][:6]] == "the fund <eos> rises <eos> the".split()


def test_new_lines_and_marks_of_any_kind_are_read_as_one(tmp_path):
    for name, text in (("a", "caf\u00e9\n" * 9 + POEM), ("b", ("cafe\u0301\n" * 9 + POEM).replace("\n", "\r\n"))):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" * (name == "b") + text.encode())
    for tokenizer in ("char", "word"):
        a, b = (data.load(str(tmp_path / f"{name}.txt"), tokenizer, ("all",)) for name in "ab")
        assert a.tokenizer.state() == b.tokenizer.state() and a.ids["all"].tolist() == b.ids["all"].tolist()
        assert "caf\u00e9" in b.tokenizer.decode(b.ids["all"]).lower()
    (tmp_path / "c.txt").write_bytes(POEM.replace("\n", "\r").encode())
    assert joined(tmp_path / "c.txt", "all") == POEM


@pytest.mark.parametrize("text", [POEM * 40, OWN["separated"], "No space,but stops.And more.\n" * 4000, "x" * 150_000])
def test_byte_pairs_of_own_text_are_those_of_the_whole_file(tmp_path, monkeypatch, text):
    """Its pieces are encoded in blocks that no token crosses: for GPT-2 two new lines are two tokens before a letter, and
    one at the end of a text."""
    real("tiktoken")
    tokenizer = data.GPT2Tokenizer()
    path = tmp_path / "my.txt"
    path.write_text(text)
    ids = data.load(str(path), tokenizer, ("all",)).ids["all"].tolist()
    if " " in text:
        assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def write_folder(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_files_of_a_folder_called_as_splits_are_its_splits(tmp_path, capfd):
    text = {split: f"{split} says so\n" * 50 for split in SPLITS}
    for k, valid in enumerate(("valid", "val", "dev", "validation")):
        folder = write_folder(tmp_path / str(k), train=text["train"], test=text["test"], other="not this\n", **{valid: text["valid"]})
        assert [joined(folder, split) for split in SPLITS] == list(text.values())
        assert joined(folder, "all") == "".join(text.values())
        assert (f"{folder}: 3 files, {len(''.join(text.values())):,} characters; left out, because their names say no split: other.txt"
                in capfd.readouterr().out)
    folder = write_folder(tmp_path / "two", train=text["train"])
    assert joined(folder, "train", "valid") == text["train"] and joined(folder, "valid") == "train says so\n" * 3
    assert list(data.load(str(folder)).ids) == ["train", "valid"]                   # no test split: as Shakespeare
    with pytest.raises(UserError, match="has test.txt but no training text. Call the training text train.txt"):
        data.load(str(write_folder(tmp_path / "three", test="a\n", other="b\n")))


def test_hidden_files_are_no_text(tmp_path, capfd):
    folder = write_folder(tmp_path / ".books", a="one\n" * 50)
    write_folder(folder / ".ipynb_checkpoints", a="hidden\n" * 50)
    (folder / "._a.txt").write_bytes(b"\0\xff")
    assert joined(folder, "all") == "one\n" * 50 and "1 file, 200 characters" in capfd.readouterr().out


def test_shakespeare_has_the_same_characters_as_a_corpus_and_as_a_file():
    path = real("shakespeare/input.txt")
    assert joined("shakespeare", "train", "valid") == joined(path, *SPLITS)


def test_documents_with_separators_are_joined_across_lines(data_folder):
    (data_folder / "tinystories").mkdir()
    text = "One.\n\nTwo.\n<|endoftext|>\nA<|endoftext|>B<|endoftext|>\n<|endoftext|>\nlast one"
    for split in ("train", "valid"):
        (data_folder / "tinystories" / f"TinyStories-{split}.txt").write_text(text)
    expected = [s + data.SEPARATOR for s in ("One.\n\nTwo.", "A", "B", "last one")]
    assert list(data.documents("tinystories", "train")) == expected
    assert list(data.documents("tinystories", "valid")) == expected[::2]
    assert list(data.documents("tinystories", "test")) == expected[1::2]


def write_imdb(folder, n=60):
    (folder / "imdb").mkdir()
    with tarfile.open(folder / "imdb" / "aclImdb_v1.tar.gz", "w:gz") as tar:
        for split in ("test", "train"):
            for label in ("pos", "neg"):
                for i in range(n):
                    raw = f"{split} {label} review {i}<br />good film".encode()
                    info = tarfile.TarInfo(f"aclImdb/{split}/{label}/{i}_8.txt")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))


def test_imdb_is_read_in_place_with_labels(data_folder):
    write_imdb(data_folder)
    parts = {s: data.labelled("imdb", s) for s in ("train", "valid", "test")}
    assert {s: len(p) for s, p in parts.items()} == {"train": 114, "valid": 6, "test": 120}
    assert all((" pos " in text) == bool(label) and "<br" not in text for p in parts.values() for text, label in p)
    assert all(text.startswith("test") == (s == "test") for s, p in parts.items() for text, _ in p)
    assert sum(label for _, label in parts["train"][:30]) not in (0, 30)        # shuffled


def test_real_imdb_has_the_published_labels():
    real("imdb/aclImdb_v1.tar.gz")
    reviews = data.labelled("imdb", "test")
    assert len(reviews) >= 24_990 and abs(sum(label for _, label in reviews) / len(reviews) - 0.5) < 0.01


def test_a_damaged_archive_is_named(data_folder):
    write_imdb(data_folder)
    path = data_folder / "imdb" / "aclImdb_v1.tar.gz"
    whole = path.read_bytes()
    for damaged in (whole[:500], whole[:-1], whole[:200] + b"\0\0\0" + whole[203:], b"not an archive"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="aclImdb_v1.tar.gz cannot be read"):
            data.labelled("imdb", "train")


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"\x89PNG\r\n\x1a\n\xff\xfe" * 50, "not UTF-8"), (b"text \x00 with zeros", "has a zero byte \\(byte 5\\)"),
    ("caf\u00e9".encode("latin1"), "not UTF-8 text"), ("\u4e2d\u6587 text".encode("gb18030"), "iconv -f gb18030 .*latin1.*look at the result"),
    ("\u4e2d\u6587".encode("utf-16"), "is UTF-16 text. Convert it first: iconv -f utf-16"),
    ("\u4e2d\u6587".encode("utf-16-be", "surrogatepass").join([b"\xfe\xff", b""]), "is UTF-16 text")])
def test_files_that_are_no_text_are_refused(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(str(path))


def test_unknown_corpus_lists_what_there_is(tmp_path):
    with pytest.raises(UserError, match="finance, climate.*or give the path"):
        data.load("financ")
    with pytest.raises(UserError, match="holds no .txt or .jsonl file"):
        data.load(str(tmp_path))


def test_large_files_are_encoded_once_into_a_memory_map(data_folder, tmp_path, monkeypatch, capfd):
    path = tmp_path / "big.txt"
    path.write_text("".join(f"word{chr(97 + i % 26)} goes on and on\n" for i in range(3000)))
    small = data.load(str(path))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 1000)
    large = data.load(str(path))
    assert isinstance(large.ids["train"], np.memmap) and large.ids["train"].dtype == np.uint16
    for split in ("train", "valid", "test"):
        assert np.array_equal(small.ids[split], large.ids[split])
    assert "encoding" in capfd.readouterr().err
    data.load(str(path))
    assert "encoding" not in capfd.readouterr().err
    path.write_text(path.read_text() + "another line\n" * 600)                   # a changed file is encoded anew
    assert len(data.load(str(path)).ids["test"]) != len(large.ids["test"])
    assert not list((data_folder / "tokens").glob("*.part"))


def test_encoding_stories_takes_bounded_memory(tmp_path):
    (tmp_path / "tinystories").mkdir()
    rng = random.Random(0)
    story = "".join(" ".join(f"w{rng.randrange(3000)}x" for _ in range(30)) + "\n" for _ in range(20)) + data.SEPARATOR + "\n"
    for split, size in (("train", 6000), ("valid", 20)):
        (tmp_path / "tinystories" / f"TinyStories-{split}.txt").write_text(story * size)        # 23 MB
    program = ("import re, data\n"
               "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
               "before = peak()\ncorpus = data.load('tinystories')\nafter = peak()\n"
               "text = open(data.corpus_file('tinystories', 'train')).read()\nprint(len(corpus.ids['train']), after - before, peak() - before)")
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                         env={"PATH": "", "DATA_DIR": str(tmp_path)})
    tokens, grown, read_whole = map(int, out.stdout.split())
    assert tokens > 3_200_000 and grown < 18_000 < read_whole, (out.stdout, out.stderr)     # kilobytes


def test_a_folder_is_its_text_files_one_behind_the_other(tmp_path):
    (tmp_path / "book" / "part 2").mkdir(parents=True)
    text = [f"line {k} says w{k % 7}\n" for k in range(400)]
    (tmp_path / "book" / "a.txt").write_text("".join(text[:150]))
    (tmp_path / "book" / "b.txt").write_text("".join(text[150:170]))
    (tmp_path / "book" / "part 2" / "c.txt").write_text("".join(text[170:]))
    (tmp_path / "book" / "notes.md").write_text("not this")
    parts = [list(data.documents(str(tmp_path / "book"), split)) for split in ("train", "valid", "test")]
    assert sum(parts, []) == text and [abs(len(part) - n) <= 3 for part, n in zip(parts, (360, 20, 20))] == [True] * 3
    assert data.load(str(tmp_path / "book")).ids["valid"].size > 50


# --------------------------------------------------------------------------------------------------- characters

def test_characters_are_those_of_the_training_text_and_come_back(tmp_path):
    path = tmp_path / "novel.txt"
    text = "\u5929\u5730\u7384\u9ec3\u3002\n" * 90 + "\u5b87\u5929\n" * 20
    path.write_text(text)
    corpus = data.load(str(path), "char")
    tokenizer = corpus.tokenizer
    assert set(tokenizer.characters) == {"<unk>", *"\u5929\u5730\u7384\u9ec3\u3002\n"} | {"\u5b87"} & set("".join(data.documents(str(path), "train")))
    assert tokenizer.decode(tokenizer.encode("\u5730\u5929\n")) == "\u5730\u5929\n" and tokenizer.encode("\u706b") == [tokenizer.unk]
    assert tokenizer.decode([tokenizer.eos]) == "\n" and tokenizer.unk in tokenizer.suppressed
    again = sample.tokenizer_from(tokenizer.state())
    assert again.encode("\u7384\u3002") == tokenizer.encode("\u7384\u3002") and again.vocab_size == tokenizer.vocab_size


def test_characters_of_documents_end_with_one_token(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(data.SEPARATOR.join(["ab\nc"] * 60))
    corpus = data.load(str(path), "char", ("train",))
    ids = corpus.ids["train"].tolist()
    assert corpus.tokenizer.vocab_size == 6 and ids[:6] == corpus.tokenizer.encode("ab\nc") + [corpus.tokenizer.eos, ids[0]]


def test_shakespeare_is_split_as_nanogpt_does():
    text = real("shakespeare/input.txt").read_text()
    corpus = data.load("shakespeare", "char")
    assert list(corpus.ids) == ["train", "valid"] and corpus.tokenizer.vocab_size == 66      # 65 characters and <unk>
    assert corpus.tokenizer.decode(corpus.ids["train"]) == text[:int(0.9 * len(text))]
    assert corpus.tokenizer.decode(corpus.ids["valid"]) == text[int(0.9 * len(text)):]
    assert "".join(data.documents("shakespeare", "test")) == text[int(0.9 * len(text)):]     # what stands in for a test split


def test_a_corpus_of_ones_own_is_a_function_of_the_split(data_folder, monkeypatch):
    monkeypatch.setitem(data.CORPORA, "mine", lambda split: ["a line\n"] * (30 if split == "train" else 3))
    corpus = data.load("mine")
    assert len(corpus.ids["train"]) == 90 and len(corpus.ids["test"]) == 9 and corpus.floor["valid"] is None


# ---------------------------------------------------------------------------------------------------- downloads

class Server:
    """A loopback web server that serves `body` and misbehaves as told: a list of one word per request."""

    def __init__(self, body, *behaviours):
        self.body, self.behaviours, self.ranges = body, list(behaviours), []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                how = server.behaviours.pop(0) if server.behaviours else "serve"
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                start = int(asked[6:-1]) if asked and how != "ignore range" else 0
                if how.isdigit():
                    return self.send_error(int(how))
                if how.startswith("redirect"):
                    self.send_response(302)
                    self.send_header("Location", "/elsewhere")
                    if how != "redirect":
                        self.send_header("X-Linked-ETag", f'"{how.split()[1]}"')
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                if start >= len(server.body) and start:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(server.body)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                body = bytearray(server.body[start:])
                if how == "wrong byte":
                    body[-1] ^= 1
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if how == "drop" else body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


BODY = random.Random(1).randbytes(700_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("behaviours, requests_made", [
    ([], 1), (["drop"], 2), (["drop", "drop"], 3), (["500"], 2), (["429", "503"], 3), (["redirect"], 2),
    (["drop", "ignore range"], 2), (["wrong byte"], 2)])
def test_download_gets_there(tmp_path, quick, behaviours, requests_made):
    with Server(BODY, *behaviours) as server:
        path = data.download(server.url, tmp_path / "deep" / "file.bin", sha256=SHA)
    assert path.read_bytes() == BODY and len(server.ranges) == requests_made
    assert not list(path.parent.glob("*.part"))
    if behaviours == ["drop"]:
        assert server.ranges[1] == "bytes=327680-"                  # in blocks of 64 kB


@pytest.mark.parametrize("behaviours, requests_made, reason", [
    (["404"], 1, "404"), (["401"], 1, "401"), (["500"] * 3, 3, "500"), (["429"] * 3, 3, "429"),
    (["wrong byte"] * 3, 3, "sha256")])
def test_download_gives_up_with_a_line_that_says_what_to_do(tmp_path, quick, behaviours, requests_made, reason):
    path = tmp_path / "file.bin"
    with Server(BODY, *behaviours) as server:
        with pytest.raises(UserError, match=f"{reason}.*Place it by hand at .*file.bin"):
            data.download(server.url, path, sha256=SHA)
    assert not path.exists() and len(server.ranges) == requests_made


def test_download_checks_the_sum_that_the_publisher_sends(tmp_path, quick):
    with Server(BODY, f"redirect {SHA}", "wrong byte", f"redirect {SHA}") as server:
        assert data.download(server.url, tmp_path / "a").read_bytes() == BODY
        assert len(server.ranges) == 4
    with Server(BODY, *[f"redirect {'0' * 64}", "serve"] * 3) as server:
        with pytest.raises(UserError, match="sha256"):
            data.download(server.url, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Log in</html>", b"\n<html lang=en>Log in"])
def test_a_login_page_is_not_kept_as_a_corpus(data_folder, monkeypatch, quick, page):
    for name in ("ptb", "tinystories", "shakespeare"):
        with Server(page) as server:
            monkeypatch.setitem(data.FILES, name, (server.url.removesuffix("file.bin"), data.FILES[name][1]))
            with pytest.raises(UserError, match="web page came instead.*Place it by hand"):
                data.load(name)
        assert not list((data_folder / name).glob("*"))


def test_the_corpora_that_never_change_have_the_published_digests():
    checked = 0
    for name, (_, file) in data.FILES.items():
        for file in {f"{name}/{file.format(split)}" for split in SPLITS} & data.SHA256.keys() - {"wikitext2/test.txt"}:
            assert hashlib.sha256(real(file).read_bytes()).hexdigest() == data.SHA256[file]
            checked += 1
    assert checked == 5


def test_download_resumes_what_an_earlier_run_left(tmp_path, quick):
    (tmp_path / "file.bin.part").write_bytes(BODY[:123_456])
    with Server(BODY) as server:
        data.download(server.url, tmp_path / "file.bin", sha256=SHA)
    assert server.ranges == ["bytes=123456-"] and (tmp_path / "file.bin").read_bytes() == BODY


def test_download_takes_a_part_that_is_whole_already(tmp_path, quick):
    (tmp_path / "file.bin.part").write_bytes(BODY)
    with Server(BODY) as server:
        data.download(server.url, tmp_path / "file.bin", sha256=SHA)
    assert (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize("leftover", [BODY + b"too much", b"x" * len(BODY), b"x" * 1000])
def test_download_never_keeps_a_wrong_part(tmp_path, quick, leftover):
    (tmp_path / "file.bin.part").write_bytes(leftover)
    with Server(BODY) as server:
        data.download(server.url, tmp_path / "file.bin", sha256=SHA)
    assert (tmp_path / "file.bin").read_bytes() == BODY


def test_download_without_a_network_says_where_to_place_the_file(data_folder, quick):
    with pytest.raises(UserError, match=r"Place it by hand at .*ptb.train.txt"):
        data.load("ptb")


@pytest.mark.parametrize("error, reason", [
    (requests.exceptions.SSLError("CERTIFICATE_VERIFY_FAILED"), "certificate is not trusted.*REQUESTS_CA_BUNDLE"),
    (requests.exceptions.ProxyError("Cannot connect to proxy"), "proxy refuses or does not answer; look at HTTPS_PROXY"),
    (requests.ConnectionError("refused"), "no connection"), (requests.exceptions.ReadTimeout("timed out"), "timed out")])
def test_what_stands_between_us_and_a_server_is_named(data_folder, monkeypatch, quick, error, reason):
    def get(*args, **how):
        raise error
    monkeypatch.setattr(data.requests, "get", get)
    for open_it in (lambda: data.load("ptb"), lambda: data.load("wikipedia:Glacier")):
        with pytest.raises(UserError, match=reason):
            open_it()


def test_a_server_with_a_certificate_of_its_own(tmp_path, quick, monkeypatch):
    import ssl
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not there; the test above has the error itself")
    key, certificate = tmp_path / "k.pem", tmp_path / "c.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    monkeypatch.setenv("NO_PROXY", "*")
    with Server(BODY) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(UserError, match="certificate is not trusted"):
            data.download(url, tmp_path / "a")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert data.download(url, tmp_path / "a").read_bytes() == BODY


def test_processes_that_wait_for_a_download_never_hold_different_locks(tmp_path):
    """A third process comes while a second one waits: only one is ever inside."""
    program = ("import sys, time, data\n"
               "with data.locked(sys.argv[1]):\n"
               "    with open('log', 'a') as f: f.write('in ')\n"
               "    time.sleep(0.3)\n"
               "    with open('log', 'a') as f: f.write('out ')\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (tmp_path / "folder").mkdir()
    processes = [subprocess.Popen([sys.executable, "-c", program, "folder"], cwd=tmp_path, env=environment) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 4 and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("name", ["a b", "it's", 'say "x"', "$HOME", "`id`", "-x", "a;b", "caf\u00e9 (1)", "back\\slash", "a!b"])
def test_a_quoted_path_is_what_a_shell_reads(name):
    out = subprocess.run(["bash", "-c", f"printf %s {data.quoted(name)}"], capture_output=True, text=True, check=True).stdout
    assert out == (f"./{name}" if name.startswith("-") else name)


def test_files_already_there_are_taken_as_they_are(data_folder):
    write_ptb(data_folder)
    assert data.load("ptb").tokenizer.vocab_size == 6


# ------------------------------------------------------------------------------------------------------ batches

@pytest.mark.parametrize("n, rows, block", [(1000, 4, 7), (129, 1, 64), (5000, 16, 35)])
def test_streams_continue_from_step_to_step(n, rows, block):
    ids = np.arange(n)
    batches = data.ContiguousBatches(ids, rows, block, seed=3)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        inputs = [batches.batch(s) for s in steps]
        text = torch.cat([x for x, _ in inputs], 1)
        assert batches.is_epoch_start(steps[0]) and not any(batches.is_epoch_start(s) for s in steps[1:])
        assert (text.diff(dim=1) == 1).all()                        # each row is contiguous text
        assert len(text.flatten().unique()) == text.numel()         # nothing twice
        assert text.numel() >= n - rows * 2 * block - block         # little is left out
        assert all(torch.equal(y, x + 1) for x, y in inputs)
    x, y = batches.batch(5)
    assert torch.equal(x, data.ContiguousBatches(ids, rows, block, seed=3).batch(5)[0]) and x.shape == (rows, block)


@pytest.mark.parametrize("n, rows, block", [(1000, 4, 7), (200, 1, 64), (5000, 16, 35)])
def test_windows_read_everything_once_an_epoch_in_another_order(n, rows, block):
    ids = np.arange(n)
    batches = data.WindowBatches(ids, rows, block, seed=3)
    orders = []
    for epoch in range(2):
        xs = [batches.batch(epoch * batches.steps_per_epoch + s) for s in range(batches.steps_per_epoch)]
        text = torch.cat([x for x, _ in xs])
        assert (text.diff(dim=1) == 1).all() and len(text.flatten().unique()) == text.numel()
        assert text.numel() >= n - (rows + 2) * block and all(torch.equal(y, x + 1) for x, y in xs)
        orders.append(text[:, 0].tolist())
    assert n == 200 or orders[0] != orders[1] and all(order != sorted(order) for order in orders)
    fresh = data.WindowBatches(ids, rows, block, seed=3)
    assert torch.equal(fresh.batch(2)[0], batches.batch(2)[0])      # no matter what was asked before


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_text_shorter_than_a_batch_is_refused(recurrent):
    with pytest.raises(UserError, match="50 tokens.*--batch-size"):
        data.batches_of(SimpleNamespace(recurrent=recurrent), np.arange(50), 8, 20, seed=0)


def test_marks_that_combine_do_not_cut_words():
    for word in ("\u0915\u093f\u0924\u093e\u092c", "\u0e01\u0e33\u0e25\u0e31\u0e07", "caf\u0065\u0301", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"):
        assert data.split_words(word) == [word] and data.split_words(word + ",") == [word, ","]


def test_a_file_that_is_held_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    replace, tried = data.os.replace, []

    def held(a, b):
        tried.append(1)
        if len(tried) < 3:
            raise PermissionError(13, "held by another program")
        replace(a, b)
    monkeypatch.setattr(data.os, "replace", held)
    data.save_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").exists() and len(tried) == 3
    monkeypatch.setattr(data.os, "replace", lambda a, b: (_ for _ in ()).throw(PermissionError(13, "held")))
    with pytest.raises(UserError, match="held"):
        data.save_json(tmp_path / "a.json", {"b": 2})


def test_names_of_run_folders_have_nothing_that_windows_forbids():
    assert data.file_name("wikipedia:Climate_change") == "wikipedia-Climate_change" and data.file_name("my books/a b?.txt") == "a-b-"
    assert data.file_name("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B" and data.file_name("books/") == "books"
    assert data.quoted("a b") == '"a b"' and data.quoted("runs/a") == "runs/a"


@pytest.mark.parametrize("settings, size", [({}, 1), ({"RANK": "3"}, 1), ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 1),
                                            ({"RANK": "2", "WORLD_SIZE": "4"}, 1), ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "x"}, 1),
                                            ({"RANK": "", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, 1),
                                            ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, 4)])
def test_a_rank_without_the_rest_is_no_job(settings, size):
    out = subprocess.run([sys.executable, "-c", "import data; print(data.RANK, data.WORLD)"], capture_output=True, text=True, cwd=ROOT,
                         env={"PATH": os.environ["PATH"]} | settings)
    assert out.stdout.split() == ["2" if size > 1 else "0", str(size)], out.stderr


def test_an_older_python_is_told_in_a_line():
    program = "import sys; sys.version_info = (3, 9, 1); import data"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 1 and out.stderr.startswith("Python 3.10 or newer is needed") and "Traceback" not in out.stderr


def test_text_that_the_terminal_cannot_show_is_replaced():
    program = "import data\ndata.run_main(lambda: print('caf\\u00e9 \\u4e2d'))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, env={"PYTHONIOENCODING": "ascii", "PATH": ""})
    assert out.returncode == 0 and out.stdout.strip() == b"caf? ?", out.stderr


@pytest.mark.parametrize("content, message", [
    (b"%PDF-1.7 text", "is rich text or a PDF: save it as plain text"), (b"{\\rtf1 text", "is rich text or a PDF: save it as plain text"),
    (b"BZh91AY&SY\x9f", "is not UTF-8 text"), (b"\x89PNG\r\n", "is not UTF-8 text"), (b"PK\3\4\x14\0 text", "has a zero byte"),
    (b"PAR1\x15\0 text", "has a zero byte"), (gzip.compress(b"text"), "is not UTF-8 text.*packed by gzip must be called .gz")])
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(str(tmp_path / "mine.txt"))


def test_packed_text_and_lines_of_json_are_read(tmp_path):
    text = "".join(f"line {k} of a poem\n" for k in range(60))
    (tmp_path / "poem.txt").write_text(text)
    (tmp_path / "poem.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert "".join(data.documents(str(tmp_path / "poem.txt.gz"), "all")) == text
    texts = [f"document {k}\nof two lines" for k in range(50)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": each, "id": 1}) + "\n" for each in texts))
    assert list(data.documents(str(tmp_path / "mine.jsonl"), "all")) == [each + data.SEPARATOR for each in texts]
    folder = tmp_path / "splits"
    folder.mkdir()
    for name in ("train.txt.gz", "test.v2.txt.gz"):
        (folder / name).write_bytes(gzip.compress((name + "\n").encode() * 99))
    assert {line.strip() for line in data.documents(str(folder), "train")} == {"train.txt.gz"}
    assert "".join(data.documents(str(folder), "test")) == "test.v2.txt.gz\n" * 99
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(text.encode())[:40])
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "list.json").write_text('[{"text":\n "x"}]\n')
    for name, message in (("short.txt.gz", "cannot be unpacked"), ("rows.jsonl", "is not lines of JSON"), ("list.json", "is not lines of JSON")):
        with pytest.raises(UserError, match=message):
            list(data.documents(str(tmp_path / name), "all"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        data.load(str(tmp_path / "pipe"))


def test_a_text_that_words_do_not_hold_is_said_to_be_changed(tmp_path, capsys):
    for name, line in (("chess.txt", "1. e4 e5 2. Nf3 Nc6\n"), ("prose.txt", "The cat isn\u2019t here, said Mr. Hale; it left.\n")):
        (tmp_path / name).write_text(line * 300)
        data.load(str(tmp_path / name))
        assert ("--tokenizer char or gpt2 keeps all" in capsys.readouterr().out) == (name == "chess.txt")


def test_a_script_runs_without_a_standard_error():
    script = f"{sys.executable} {ROOT / 'sample.py'} --run nowhere 2>&-; echo $?"
    out = subprocess.run(script, shell=True, capture_output=True, text=True)
    assert out.stdout.strip() == "2"
    script = f"{sys.executable} -c 'import sys; sys.path.insert(0, \"{ROOT}\"); import data; data.run_main(lambda: data.show(\"x\", chr(10)))' 2>&-"
    assert subprocess.run(script, shell=True).returncode == 0


def test_the_data_folder_may_be_in_ones_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", "~/texts")
    assert data.data_dir() == tmp_path / "texts"


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(data.fcntl, "flock", flock)
    monkeypatch.setattr(data, "fetch", lambda url, part, headers, sha256: part.write_text("there"))
    assert data.download("http://localhost/x", tmp_path / "x").read_text() == "there"


def test_every_epoch_of_a_stream_begins_elsewhere_within_a_block():
    batches = data.ContiguousBatches(np.arange(5000), 4, 20, seed=1)
    starts = [int(batches.batch(epoch * batches.steps_per_epoch)[0][0, 0]) for epoch in range(40)]
    assert len(set(starts)) > 10 and 0 <= min(starts) and max(starts) < 20
