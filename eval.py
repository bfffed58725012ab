"""Compare trained models across domains. One command turns the runs on disk into a report with tables and
figures.

    python eval.py                                    # every run under runs/ -> runs/report/report.md
    python eval.py --runs runs/rnn-ptb runs/lstm-ptb --domains wikitext2 my.txt --out runs/mine
    python eval.py --run runs/lstm-ptb --text "the market fell"          # one sentence: tokens, and a picture
    python eval.py --redraw --out runs/mine           # tables and figures again, from report.json alone

The first half of this file computes numbers and puts all of them into one dictionary, report.json; the second
half makes tables and figures from that dictionary and from nothing else.

Definitions, with l_i = -log p(token i | all tokens before it in its text), in nats:

    perplexity of a text            exp(mean of l_i)
    mean of sentence perplexities   the mean of the perplexities of all sentences, each scored on its own
                                    after the end token; a few strange sentences decide it
    corpus perplexity               exp(mean of l_i over all tokens of all sentences)
    bits per character              (sum of l_i + bits that spell the unknown words * ln 2) / (ln 2 *
                                    characters)

`perplexities` computes them, and Speller the bits of a spelling.

A model that knows few words meets <unk> often and predicts it easily, so perplexity flatters it. Bits per
character does not, because each unknown word also costs its spelling under a letter-bigram model of the
training vocabulary: p(word) = prod_k p(c_k | c_k-1), add-one smoothed, with an end mark. A letter that the
vocabulary never has costs 21 bits more, the size of Unicode. An <unk> in the text itself has no spelling and
costs nothing more. A character that a model on characters does not have costs 21 bits. The characters of a
text are those of its normalised words with a space after each; for characters and byte pairs they are the
text as it is, and one for its end.

Word frequencies (compare_frequencies) are compared by the log-odds of Monroe, Colaresi & Quinn ("Fightin'
Words", 2008, section 3.4). A word w has the count y_w among the n words of a text, and a prior of a_w = a *
p(w in both texts together) with a = PRIOR. d_w = log((y_w + a_w) / (n + a - y_w - a_w)) minus the same of the
other text, and z is d_w divided by its standard deviation sqrt(1/(y_w + a_w) + 1/(y'_w + a_w)), where y'_w is
the count in the other text. Of 500 or of 5,000 words that are drawn from the training text's own
distribution, about one in 25 has |z| > 2.

The distance between the two distributions is the Jensen-Shannon divergence in bits: 0 if they are equal, 1 if
they share no word. A small text is far from every distribution, also from its own. So the report also has the
mean divergence of samples: a sample has as many words as the text, drawn from the training text's
distribution."""
import csv
import glob
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from data import UserError, option, read_json, save_json, write_atomically, write_text
from sample import (autocast, context_length, count_parameters, device_of, encode_prompt, generate, load_run,
                    pick_device, pick_dtype, read_checkpoint, trained_on)
from train import LONGEST_WINDOW, perplexity_of, token_losses


@dataclass
class Config:
    """Compare trained models across domains: tables, figures, one report."""
    runs: list[str] = option([], "folders of runs (default: all under runs/)")
    domains: list[str] = option([], f"texts to read: {', '.join(data.CORPORA)}, wikipedia:TITLE, a file or "
                                    "a folder (default: the other embedded languages; for real text "
                                    "wikitext2, if it is downloaded)")
    out: str = option("runs/report", "folder of the report")
    redraw: bool = option(False, "draw the report in --out again from its report.json; no model is needed")
    sentences: int = option(200, "largest number of sentences to score of a domain")
    prompt: str = option("the meaning of life is", "beginning of the samples")
    run: str = option(None, "with --text: one run")
    text: str = option(None, "with --run or --runs: a sentence; its loss is printed token by token, and "
                             "influence.png in --out shows what each prediction depends on")
    device: str = option("auto", "auto: cuda if there is one, else cpu; or a torch device")
    dtype: str = option("float32", "dtype of products; with float32 the figures depend least on the machine",
                        choices=["auto", "float32", "bfloat16"])


TEXT_CHARACTERS = 1 << 20                       # how much of a domain's text is read
STAGES = (0.05, 0.1, 0.25, 0.5, 1.0)            # shares of the training, for Figure 2
PRIOR = 15_000                                  # words; how strongly z distrusts the counts of rare words
DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 10 ** 6))        # words since a name was last said


# ---------------------------------------------------------------------------------------------- numbers: runs

@dataclass
class Trained:
    """A trained model with the records of its training."""
    name: str
    model: object
    tokenizer: object
    log: list                                   # rows of log.csv: {column: number}, without empty cells
    result: dict                                # result.json; {} while the training is not finished
    options: dict                               # of the script that trained it
    steps: int = 0                              # number of planned steps
    train_tokens: int = None                    # number of tokens of the training text
    trained_on: tuple = ()                      # resolved names of its training texts, the base's first

    @property
    def corpus(self):
        return self.options.get("data", "?")


def read_log(path):
    """The rows of log.csv as {column: float}. A last row without a new line, left by a kill, is dropped."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
        if any("step" not in row for row in rows):
            raise ValueError("it has no column step")
        return rows
    except (ValueError, TypeError) as e:                                    # changed by hand, or by a program
        print(f"left out: {path} is not as it was written ({e})", file=sys.stderr)
        return []


def run_options(folder):
    """-> (result.json, or {} of a run that is not finished; the options of the script that trained it;
    planned steps; number of training tokens)."""
    result, last = read_json(Path(folder) / "result.json", {}), Path(folder) / "last.pt"
    checkpoint = read_checkpoint(last, mmap=True) if last.exists() else {}
    progress = checkpoint.get("run", {})
    return (result, (result or checkpoint).get("options", {}), (result or progress).get("steps", 0),
            progress.get("train_tokens"))


def open_run(folder, device, product_dtype=torch.float32):
    """-> Trained. UserError if the folder holds no run."""
    model, tokenizer, _ = load_run(folder, device, torch.float32)
    model.product_dtype = product_dtype
    log = read_log(Path(folder) / "log.csv")
    return Trained(Path(folder).name, model, tokenizer, log, *run_options(folder), trained_on(folder))


def distinct_names(names):
    """{name of a run or a text: the shortest end of its path that tells it from the others}."""
    shown = {name: str(name).encode(errors="replace").decode() for name in names}
    for n in range(1, 20):
        parts = {name: "/".join(Path(text).parts[-n:]) for name, text in shown.items()}
        if len(set(parts.values())) == len(parts):
            return parts
    return shown


# ----------------------------------------------------------------------------------------- numbers: sentences

# A full stop after the first kind never ends a sentence. After one of the second kind, or an initial, it ends
# a sentence only if the next word is one of OPENERS. (The m of "5 m." is no initial.)
NEVER_LAST = (r"mr|mrs|ms|dr|prof|st|gen|col|gov|sen|rep|figs?|eqs?|vol|eds?|pp|cf|ca|approx|vs|e\.g|i\.e|"
              r"no(?=\. \d)")
SOMETIMES_LAST = (r"jr|sr|etc|inc|corp|co|ltd|est|al|u\.[skn]|[ap]\.m|jan|feb|mar|apr|jun|jul|aug|sept?|oct|"
                  r"nov|dec|(?<!\d\s)(?!I\.)[^\W\d_](?:\.[^\W\d_])*")
OPENERS = ("The|An?|In|On|At|Its?|This|That|These|Those|He|They|She|We|I|But|And|However|For|From|By|As|"
           "With|When|While|After|Since|If|There")
QUOTES = "(\\[\"'\u201c\u2018"                                # characters that may open a sentence
ABBREVIATION = re.compile(rf"(?<![^\s{QUOTES}])(?:(?:{NEVER_LAST})|(?:{SOMETIMES_LAST})"
                          rf"(?!\.\S*\s+[{QUOTES}]*(?-i:{OPENERS})\b))\.(?!\.)", re.I)
ENDS = re.compile(rf"([.!?]+(?:[\"'\u2019\u201d)\]]|\[[^\]\s]{{1,12}}\])*)\s+(?=[{QUOTES}]*(\S?))")


LONGEST = 2000                  # characters of a sentence; a longer one, a text without full stops, is cut


def unwrap(text):
    """Join the lines of wrapped paragraphs: three or more, none with room for the next one's first word."""
    blocks = re.split(r"(\n\s*\n)", text)
    for k, lines in enumerate(block.splitlines() for block in blocks):
        width, pairs = max(map(len, lines), default=0), zip(lines, lines[1:])
        if len(lines) > 2 and 40 <= width <= 120 and all(
                len(line) + len(after.split(" ")[0]) >= width for line, after in pairs):
            blocks[k] = " ".join(lines)
    return "".join(blocks)


def sentences(text):
    """Raw or tokenized English text -> its sentences, without headings (= like this =). A full stop ends a
    sentence unless it belongs to an abbreviation, an initial or a number. The end of a line ends one, too,
    but not in wrapped text."""
    # a Chinese stop ends a sentence wherever it stands
    text = re.sub(r"([\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019\uff09]*)", r"\1\n", text)
    found = []
    for line in unwrap(text.replace(data.SEPARATOR, "\n")).splitlines():
        if not re.fullmatch(r"\s*=.*=\s*", line):
            line = ABBREVIATION.sub(lambda m: m[0].replace(".", "\0"), line)
            # no end if a small letter follows; but " . " always is one
            line = ENDS.sub(lambda m: m[0] if m[2].islower() and not re.match(r"\s", line[m.start() - 1:])
                            else m[1] + "\n", line)
            found += line.replace("\0", ".").splitlines()
    return [part.strip() for sentence in found if sentence.strip()
            for part in re.findall(rf"(?s).{{1,{LONGEST}}}(?:\s|$)|.{{{LONGEST}}}", sentence.strip())]


def domain_split(name, trained_texts):
    """The split of a domain that is read. Of an embedded language it is `test`. For other texts see
    data.unseen_split, which prefers the test split."""
    return "test" if name in data.DOMAINS else data.unseen_split(name, trained_texts, prefer="test")


def read_domain(name, trained_texts=()):
    """The sentences of a domain as raw text. Of an embedded language they are complete documents with their
    ends, because only a document's first sentence says whom it is about."""
    documents = data.documents(name, domain_split(name, trained_texts))
    texts = documents if name in data.DOMAINS else sentences("".join(documents)[:TEXT_CHARACTERS])
    texts = [text for text in texts if any(ch.isalnum() for ch in text)]
    if not texts:
        raise UserError(f"{name} holds no sentence to read")
    return texts


# -------------------------------------------------------------------------------------------- numbers: losses

@torch.no_grad()
def per_document_nll(model, texts, eos, group=32):
    """[-log p of every token, float64 array] for each text (a list of ids). A text is scored on its own after
    the end token. Texts of similar length share a batch, padded on the right, where a causal model cannot see
    it."""
    limit = min(LONGEST_WINDOW, context_length(model))
    out, order = [None] * len(texts), sorted(range(len(texts)), key=lambda k: -len(texts[k]))
    while order:
        data.show(f"scored {len(texts) - len(order):,} of {len(texts):,} texts")
        longest = len(texts[order[0]])
        if longest > limit:
            k = order.pop(0)
            out[k] = token_losses(model, [eos, *texts[k]]).numpy()
            continue
        n = min(group, (1 << 15) // max(1, longest))                        # long texts make smaller groups
        members, order = order[:n], order[n:]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([eos, *texts[k]]) for k in members],
                                              batch_first=True, padding_value=-1).to(device_of(model))
        with autocast(model):
            nll = model(ids[:, :-1].clamp(min=0), targets=ids[:, 1:], reduction="none")[0]
        for k, row in zip(members, nll.cpu().double().numpy()):
            out[k] = row[:len(texts[k])]
    data.show("")
    return out


class Speller:
    """The bits that spell a word, by the letter bigrams of a vocabulary: see the top of this file."""

    def __init__(self, words):
        self.pairs, self.firsts = Counter(), Counter()
        for word in words:
            for a, b in zip("\n" + word, word + "\n"):
                self.pairs[a, b] += 1
                self.firsts[a] += 1
        self.letters = {b for _, b in self.pairs}

    def bits(self, word):
        if not self.letters:                                                # the words are characters
            return 21 * len(word)
        size = len(self.letters) + 1                                        # one stands for all other letters
        return sum(-math.log2((self.pairs[a, b] + 1) / (self.firsts[a] + size)) + 21 * (b not in self.letters)
                   for a, b in zip("\n" + word, word + "\n"))


def without_marks(tokenizer, sentence):
    """A sentence of WikiText without the marks inside its words and numbers ("well @-@ known"), unless the
    vocabulary has them."""
    if tokenizer.kind == "word" and "@-@" not in tokenizer.ids:
        return re.sub(r" @([-,.])@ ", r"\1", sentence)
    return sentence


def encode_text(tokenizer, text):
    """-> (ids, unknown words, number of characters). The ids are those of training: a document has its end.
    UserError for an unknown word if the vocabulary has no <unk>."""
    if tokenizer.kind != "word":
        characters = tokenizer.normalize(text) if tokenizer.kind == "char" else ()
        unknown = [ch for ch in characters if ch not in tokenizer.ids]
        return tokenizer.encode(text), unknown, len(text.replace(data.SEPARATOR, "").rstrip("\n")) + 1
    words = tokenizer.normalize(text)
    unknown = [w for w in words if w not in tokenizer.ids or w == "<unk>"]
    if unknown and tokenizer.unk is None:
        raise UserError(f"the run's vocabulary has no word {unknown[0]!r}")
    ids = [tokenizer.ids.get(w, tokenizer.unk) for w in words]
    return ids, unknown, sum(len(w) + 1 for w in words if w != "<eos>")


def perplexities(model, tokenizer, texts):
    """The figures that are defined at the top of this file, of texts (sentences, or documents with their
    ends) under a model. UserError if the vocabulary cannot spell them."""
    encoded = [encode_text(tokenizer, text) for text in texts]
    scored = [k for k, (ids, _, _) in enumerate(encoded) if ids]
    if not scored:
        raise UserError("nothing in it is a word of its vocabulary")
    losses = per_document_nll(model, [encoded[k][0] for k in scored], tokenizer.eos)
    unknown = [w for k in scored for w in encoded[k][1]]
    speller = Speller(w for w in getattr(tokenizer, "words", ()) if w not in ("<unk>", "<eos>"))
    spelling = sum(speller.bits(w) for w in unknown if w != "<unk>")
    nats, n_characters = np.concatenate(losses), sum(encoded[k][2] for k in scored)
    per_text = dict.fromkeys(range(len(texts))) | {k: perplexity_of(v.mean()) for k, v in zip(scored, losses)}
    return {"sentences": list(per_text.values()), "mean": statistics.fmean(per_text[k] for k in scored),
            "corpus": perplexity_of(nats.mean()), "tokens": len(nats), "unknown": len(unknown) / len(nats),
            "characters": n_characters,
            "bits_per_character": (nats.sum() / math.log(2) + spelling) / n_characters,
            "ids": [i for k in scored for i in encoded[k][0]], "losses": nats}


# ---------------------------------------------------------------------------------- numbers: word frequencies

def divergence(p, q):
    """The Jensen-Shannon divergence of two distributions over the same words, in bits."""
    def entropy(v):
        v = v[v > 0]
        return -np.sum(v * np.log2(v))
    return float(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def compare_frequencies(train, domain, n_words=12, n_samples=5):
    """Two Counters of words -> a dict: the distance of their distributions and the one that the size of the
    domain alone would explain, the words that differ most, and how the share of a word falls with its rank.
    At least two different words are needed."""
    n, m = sum(train.values()), sum(domain.values())
    words = list(train | domain)
    y, x = (np.array([c[w] for w in words], float) for c in (train, domain))
    prior = PRIOR * (y + x) / (n + m)
    d_here, d_train = (np.log((c + prior) / (total + PRIOR - c - prior)) for c, total in ((x, m), (y, n)))
    z = (d_here - d_train) / np.sqrt(1 / (x + prior) + 1 / (y + prior))
    p, q = y / n, x / m
    samples = np.random.default_rng(0).multinomial(m, p, n_samples) / m
    order = np.argsort(-z, kind="stable")
    shown = [k for k in order[:n_words] if z[k] > 0] + [k for k in order[::-1][:n_words] if z[k] < 0]
    rows = [{"word": words[k], "per million in training": 1e6 * p[k], "per million here": 1e6 * q[k],
             "z": float(z[k])} for k in shown]
    return {"divergence_bits": divergence(p, q), "words_read": m, "words": rows,
            "divergence_of_samples": float(np.mean([divergence(p, sample) for sample in samples])),
            "shares": [by_rank(p), by_rank(q)]}


def by_rank(shares, points=100):
    """[(rank, share)] of a distribution, at ranks evenly spaced on a logarithmic scale."""
    shares = np.sort(shares[shares > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(shares), points).round().astype(int)).tolist()
    return [(rank, float(shares[rank - 1])) for rank in ranks]


def frequency_and_loss(train, domain, tokenizer, scored):
    """Pearson's correlation, over the tokens of a text, between a token's loss and the logarithm of its
    word's frequency in this text over that in training (half a count added to both)."""
    n, m = sum(train.values()), sum(domain.values())
    words = [tokenizer.words[i] for i in scored["ids"]]
    pairs = [(math.log((domain[w] + 0.5) / (m + 0.5)) - math.log((train[w] + 0.5) / (n + 0.5)), loss)
             for w, loss in zip(words, scored["losses"]) if w != "<eos>"]
    ratio, loss = np.array(pairs).T
    varied = len(pairs) > 2 and ratio.std() > 0 and loss.std() > 0
    return float(np.corrcoef(ratio, loss)[0, 1]) if varied else None


def training_ids(run):
    """The tokens that a run was trained on. UserError if its text cannot be read, or has changed since."""
    name = run.trained_on[-1] if run.trained_on else run.corpus
    ids = data.encode_split(name, "train", run.tokenizer)
    ids = data.first_share(ids, run.options.get("data_fraction", 1), run.tokenizer.eos)
    if run.train_tokens not in (None, len(ids)):
        raise UserError(f"{run.corpus} has changed since {run.name} was trained on it: it has {len(ids):,} "
                        f"training tokens, and had {run.train_tokens:,}")
    return ids


def train_counts(run):
    """Counter of the words that a run was trained on. UserError as for training_ids."""
    ids, size = training_ids(run), run.tokenizer.vocab_size
    # in parts, because bincount copies its input as int64
    counts = sum(np.bincount(ids[k:k + (1 << 20)], minlength=size) for k in range(0, len(ids), 1 << 20))
    return Counter({w: int(c) for w, c in zip(run.tokenizer.words, counts) if c and w != "<eos>"})


# ----------------------------------------------------------------------------------- numbers: memory, samples

def name_memory(run):
    """For a run on an embedded language: [(mean loss in nats, the grammar's own loss, number of cases)] at
    names that must be repeated, for each range of DISTANCES to where the name was last said."""
    documents = [words for words, _ in data.embedded_documents(run.corpus, "test")]
    ids = [[run.tokenizer.ids[w] for w in words] for words in documents]
    names, found = set(data.NAMES.split()), defaultdict(list)
    for words, loss in zip(documents, per_document_nll(run.model, ids, run.tokenizer.eos)):
        grammar_nll, last = data.language(run.corpus).nll(words), {}
        for at, word in enumerate(words):
            if word in last:
                distance = next(r for r in DISTANCES if at - last[word] <= r[1])
                found[distance].append((loss[at], grammar_nll[at]))
            if word in names:
                last[word] = at
    return [[*np.mean(found[r], 0).tolist(), len(found[r])] if found[r] else None for r in DISTANCES]


def distinct(texts, n):
    """The share of distinct n-grams among all n-grams of texts (lists of ids): 1 if none occurs twice."""
    grams = [tuple(t[k:k + n]) for t in texts for k in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def samples(run, prompt, temperatures=(0.5, 1.2), n=16, tokens=40):
    """Continuations of a prompt at a low and a high temperature: their variety, and their perplexity under
    the model that wrote them. UserError for a prompt longer than the model's context."""
    tokenizer, out = run.tokenizer, []
    prompt = encode_prompt(tokenizer, prompt)
    read = prompt[len(tokenizer.begin):]
    for temperature in temperatures:
        texts = generate(run.model, [prompt] * n, tokens, temperature, seed=1,
                         suppressed_tokens=tokenizer.suppressed)
        losses = per_document_nll(run.model, [read + t for t in texts], tokenizer.eos)
        own = np.concatenate([v[len(read):] for v in losses])
        out.append({"temperature": temperature, "text": tokenizer.decode(read + texts[0]),
                    "distinct-1": distinct(texts, 1), "distinct-2": distinct(texts, 2),
                    "perplexity under itself": perplexity_of(own.mean())})
    return out


# ---------------------------------------------------------------------------------------- numbers: the report

def summary(runs):
    """A row of figures for each run. A run that is not finished has its best evaluation so far."""
    rows = []
    for run in runs:
        result, base = run.result, run.options.get("base")
        logged = [row["val_ppl"] for row in run.log if "val_ppl" in row]
        rows.append({"run": f"{run.name} (unfinished)" if run.options and not result else run.name,
                     "model": run.options.get("model") or (f"{base}, fine-tuned" if base else "pretrained"),
                     "trained on": run.corpus, "seed": run.options.get("seed"),
                     "parameters": count_parameters(run.model),
                     "best validation": result.get("val_ppl") or min(logged, default=None),
                     "test": result.get("test_ppl"), "floor": result.get("floor_ppl"),
                     "tokens/s": result.get("tokens_per_second"), "seconds": result.get("seconds")})
    return rows


def at_stages(run):
    """{column: [perplexity at each of STAGES]} from the log, interpolated in the loss between two
    evaluations; None for a stage more than 3 % outside of all evaluations."""
    rows = [r for r in run.log if r["step"] > 0]
    end = run.steps or max((r["step"] for r in rows), default=0)
    out = {}
    columns = {c for row in rows for c in row if c == "val_ppl" or c.startswith("ppl_")}
    for column in sorted(columns, reverse=True):
        at, nats = zip(*((r["step"] / end, math.log(r[column])) for r in rows if column in r))
        out[column] = [math.exp(np.interp(share, at, nats)) if at[0] - 0.03 < share < at[-1] + 0.03 else None
                       for share in STAGES]
    return out


def frequencies(runs, domains, scores, notes):
    """{"corpus and domain": what compare_frequencies finds, and each run's correlation}, of runs on words. A
    run that cannot be compared gets a line in notes."""
    out, titles, counts, shown = {}, {}, {}, distinct_names({run.corpus for run in runs} | domains.keys())
    for run in [run for run in runs if run.tokenizer.kind == "word" and run.corpus != "?"]:
        key = run.corpus, tuple(run.tokenizer.words), run.train_tokens
        try:
            counts[key] = counts.get(key) or train_counts(run)
        except UserError as e:
            notes.append(f"No word frequencies of {run.name}: {e}.")
            continue
        for domain, texts in domains.items():
            words = [w for text in texts for w in run.tokenizer.normalize(without_marks(run.tokenizer, text))]
            here = Counter(w if w in run.tokenizer.ids else "<unk>" for w in words if w != "<eos>")
            if (run.name, domain) in scores and len(counts[key] | here) > 1:
                if (key, domain) not in titles:
                    title = f"{shown[run.corpus]} and {shown[domain]}"
                    titles[key, domain] = f"{title}, by the words of {run.name}" if title in out else title
                    out[titles[key, domain]] = compare_frequencies(counts[key], here) | {
                        "texts": [shown[run.corpus], shown[domain]], "correlation": {}}
                correlation = frequency_and_loss(counts[key], here, run.tokenizer, scores[run.name, domain])
                out[titles[key, domain]]["correlation"][run.name] = correlation
    return out


def reward_at(points, kl):
    """The reward where KL first reaches this value, interpolated between points [(KL, reward)]; else None."""
    for (k0, r0), (k1, r1) in zip(points, points[1:]):
        if k0 < kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / (k1 - k0)


def rewards(runs):
    """-> (a row for each run of PPO: before and after, and the reward at a KL that all runs reached; {run:
    [(KL, reward)] at its evaluations}, which shows what a policy gains for a nat of KL)."""
    points = {run.name: [(r["eval_kl"], r["eval_reward"]) for r in run.log if "eval_kl" in r] for run in runs}
    common = min(max((kl for kl, _ in each), default=0.0) for each in points.values())
    rows = []
    for run in runs:
        before, after = (run.result.get(when, {}) for when in ("before", "after"))
        row = {"run": run.name if run.result else f"{run.name} (unfinished)", "seed": run.options["seed"]}
        for name in ("kl_coef", "kl_target", "lr", "repetition_coef", "sft_every", "steps"):
            row[name.replace("_", "-")] = f"{run.options[name]:g}"
        row |= {"reward before": before.get("reward"), "rise, deviations": run.result.get("rise")}
        row |= {title: after.get(name) for name, title in (
            ("reward", "reward"), ("kl", "KL"), ("distinct_2", "distinct-2"),
            ("repetition", "repeated bigrams"), ("ref_ppl", "perplexity under the reference"))}
        row["distinct-2, relative to before"] = after and after["distinct_2"] / before["distinct_2"] or None
        rows.append(row | {f"reward when KL came to {common:.1f}": reward_at(points[run.name], common)})
    return rows, points


def measure_runs(runs, domains, prompt, n_sentences):
    """All numbers of a report: the content of report.json. If a number cannot be had, the text of a UserError
    stands in its place. Policies of ppo.py are in a part of their own, and in no other."""
    trained_texts = {text for run in runs for text in run.trained_on}
    policies = [run for run in runs if "kl_coef" in run.options]
    runs = [run for run in runs if run not in policies]
    report = {"prompt": prompt, "summary": summary(runs), "logs": {run.name: run.log for run in runs},
              "stages": {run.name: at_stages(run) for run in runs},
              "vocabularies": len({repr(run.tokenizer.state()) for run in runs}), "domains": {}, "memory": {},
              "samples": {}, "notes": []}
    scores = {}
    for name, texts in domains.items():
        texts, by_run = texts[:n_sentences], {}
        for run in runs:
            try:
                if name not in data.CORPORA and data.resolved(name) == data.resolved(run.corpus):
                    training_ids(run)           # a text that has changed may have its training text in `test`
                readable = [without_marks(run.tokenizer, text) for text in texts]
                scores[run.name, name] = perplexities(run.model, run.tokenizer, readable)
                by_run[run.name] = {k: v for k, v in scores[run.name, name].items()
                                    if k not in ("ids", "losses")}
            except UserError as e:
                by_run[run.name] = str(e)
        split = domain_split(name, trained_texts)
        what = "the complete text" if split == "all" else f"the {split} split"
        reason = ", because a run was trained on this text" if data.resolved(name) in trained_texts else ""
        if reason and split == "valid":
            reason += "; there is no test split, and this one chose the run's weights"
        unknown = [score["unknown"] for score in by_run.values() if isinstance(score, dict)]
        if unknown and max(unknown) > 0.5:
            report["notes"].append(f"Most words of {name} are <unk> for a run ({max(unknown):.0%}): its "
                                   "perplexity says little.")
        kind = "documents" if name in data.DOMAINS else "sentences"
        read = f"These are the first {len(texts)} {kind} of {what}{reason}."
        floor = data.embedded_floor(name, "test", n_sentences) if name in data.DOMAINS else None
        report["domains"][name] = {"sentences": texts, "read": read, "floor": floor, "runs": by_run}
    report["frequencies"] = frequencies(runs, domains, scores, report["notes"])
    for run in runs:
        if run.corpus in data.DOMAINS and getattr(run.tokenizer, "words", None) == data.embedded_vocabulary():
            report["memory"].setdefault(run.corpus, {})[run.name] = name_memory(run)
        try:
            report["samples"][run.name] = samples(run, prompt)
        except UserError as e:                                              # longer than its context
            report["samples"][run.name] = [{"text": f"– ({e})"}]
    report["rewards"], report["frontier"] = rewards(policies) if policies else ([], {})
    return report


# -------------------------------------------------------------------------------- tables, from the dictionary

def format_number(value, digits=2):
    if value is None:
        return "–"
    if not isinstance(value, float):
        return value if isinstance(value, str) else f"{value:,}"
    return f"{value:,.{digits if abs(value) < 1000 else 0}f}" if abs(value) < 1e7 else f"{value:.3g}"


def markdown_table(rows):
    """A markdown table of dicts, with the keys of the first one as columns. None becomes a dash."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row.get(name) for name in rows[0]] for row in rows)]
    escaped = str.maketrans({"|": "\\|", "<": "&lt;", "\n": " / "})          # <unk> is not HTML
    return "".join(f"| {' | '.join(format_number(v).translate(escaped) for v in line)} |\n" for line in lines)


NO_FIGURES = "There are no figures, because matplotlib is not installed. Type: pip install matplotlib"


def write_report(folder, lines, redraw=""):
    """Write report.md. The first of these lines of markdown is its title. redraw: a command that draws the
    figures later."""
    if pyplot() is None:
        hint = f"{NO_FIGURES}; then: {redraw}" if redraw else NO_FIGURES
        print(hint)
        lines = [lines[0], hint + "\n", *lines[1:]]
    write_text(folder / "report.md", "\n".join(lines))


def stages_section(report, out):
    stages = [(run, "in domain" if column == "val_ppl" else column.removeprefix("ppl_"), values)
              for run, columns in report["stages"].items() for column, values in columns.items()]
    if not stages:
        return []
    labels = [f"{share:.0%}" for share in STAGES]
    rows = [{"run": run, "text": text} | dict(zip(labels, values)) for run, text, values in stages]
    bars = {f"{run}, {text}": values for run, text, values in stages[:12]}
    return ["## Perplexity at stages of the training (Figure 2)\n",
            "A value between two evaluations is interpolated in the loss. `--also climate` logs the "
            "perplexity of another text, too.\n", markdown_table(rows),
            draw("Perplexity at stages", plot_bars, bars, labels, "perplexity", "log", out / "stages.png")]


def domains_section(report, out):
    """Each domain under each run, and sentence by sentence."""
    if not report["domains"]:
        return []
    lines, bits = ["## Other domains (Table 1)\n"], {}
    columns = {"mean": "mean of sentence perplexities", "corpus": "corpus perplexity", "tokens": "tokens",
               "unknown": "unknown words, share", "characters": "characters",
               "bits_per_character": "bits per character"}
    for name, domain in report["domains"].items():
        rows, by_sentence = [], [{"sentence": text.strip()} for text in domain["sentences"][:20]]
        for run, figures in domain["runs"].items():
            if isinstance(figures, str):                        # the reason why there are no figures
                figures = {"mean": f"– ({figures})"}
            rows.append({"run": run} | {title: figures.get(key) for key, title in columns.items()})
            bits.setdefault(run, []).append(figures.get("bits_per_character"))
            for row, ppl in zip(by_sentence, figures.get("sentences", [None] * len(by_sentence))):
                row[run] = ppl
        lines += [f"### {name}\n", domain["read"] + "\n", markdown_table(rows)]
        if domain["floor"]:
            lines.append(f"The grammar's own perplexity on these documents is {domain['floor']:.2f}.\n")
        lines += [f"The first {len(by_sentence)} of them:\n", markdown_table(by_sentence)]
    labels = list(distinct_names(report["domains"]).values())
    return [*lines, draw("Bits per character in each domain", plot_bars, bits, labels, "bits per character",
                         "linear", out / "domains.png")]


def frequencies_section(report, out):
    lines = []
    for k, (name, found) in enumerate(report["frequencies"].items()):
        runs = ", ".join(f"{run} {format_number(value)}" for run, value in found["correlation"].items())
        lines += [f"### {name}\n", f"The Jensen-Shannon divergence is {found['divergence_bits']:.3f} bits. "
                  f"That of {found['words_read']:,} words drawn from the training text's own distribution is "
                  f"{found['divergence_of_samples']:.3f}. The correlation of a token's loss with how much "
                  f"rarer its word was in training than in this text is: {runs}.\n",
                  draw("Word frequencies", plot_frequencies, found, out / f"frequencies_{k + 1}.png"),
                  markdown_table(found["words"])]
    return ["## Word frequencies (Figure 3)\n", *lines] if lines else []


def memory_section(report, out):
    lines = []
    labels = [f"{a}–{b}" if b < 10 ** 6 else f"over {a - 1}" for a, b in DISTANCES]
    for corpus, by_run in report["memory"].items():
        any_run = next(iter(by_run.values()))
        cells = [(run, 0, row) for run, row in by_run.items()]
        cells += [("floor", 1, any_run), ("cases", 2, any_run)]
        rows = [{"run": name} | {label: cell and cell[k] for label, cell in zip(labels, row)}
                for name, k, row in cells]
        lines += [f"### {corpus}\n", markdown_table(rows), draw(
            "Loss at the repeated name", plot_memory, by_run, labels, out / f"memory_{corpus}.png")]
    return lines and ["## Memory: the loss where a name must be repeated\n",
                      "Nats, by the number of words since the name was last said. The grammar leaves no "
                      "choice at these words, and its own loss is the floor. A guess among the 20 names "
                      "costs ln 20 = 3.00.\n", *lines]


def policies_section(report, out):
    if not report["rewards"]:
        return []
    return ["## Policies trained by PPO\n", markdown_table(report["rewards"]), draw(
        "Reward against KL while training", plot_frontier, report["frontier"], out / "frontier.png")]


def draw_report(report, out):
    """Write report.md and its figures into the folder out. report: what measure_runs returned."""
    lines = ["# Report\n", "Losses are in nats per token, and perplexity is their exponential. The head of "
             "eval.py defines all figures.\n", *(note + "\n" for note in report["notes"])]
    if report["summary"]:
        lines += ["## Summary\n", markdown_table(report["summary"])]
        if report["vocabularies"] > 1:
            lines.append("These runs have different vocabularies, so their tokens differ: compare bits per "
                         "character, and these only where the numbers of characters are the same, too.\n")
        if curves := draw("Loss while training", plot_curves, report["logs"], out / "loss_curves.png"):
            lines += ["## Loss curves (Figure 1)\n", curves]
        for section in (stages_section, domains_section, frequencies_section, memory_section):
            lines += section(report, out)
        rows = [{"run": run} | row for run, rows in report["samples"].items() for row in rows]
        lines += ["## Samples (Table 2)\n", f"16 continuations of 40 tokens of \"{report['prompt']}\". The "
                  "table shows the first.\n", markdown_table(rows)]
    lines += policies_section(report, out)
    write_report(out, lines, f"python eval.py --redraw --out {data.quoted(out)}")


# ------------------------------------------------------------------------------- figures, from the dictionary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")   # Okabe & Ito (2008)
MARKERS = "osD^vPX"


def pyplot():
    """matplotlib.pyplot with the settings of all figures, or None if it is not installed."""
    os.environ["MPLBACKEND"] = "Agg"            # a notebook names a backend that does not exist here
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    plt.rcParams.update({"figure.dpi": 150, "savefig.bbox": "tight", "font.size": 9, "axes.grid": True,
                         "grid.alpha": 0.3, "axes.axisbelow": True, "legend.fontsize": 7,
                         "axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 3,
                         "axes.prop_cycle": plt.cycler(color=COLOURS, marker=list(MARKERS), linestyle=(
                             "-", "--", "-.", ":", "-", "--", "-."))})
    return plt


def draw(title, plot, *args):
    """plot(plt, *args); -> the figure's line of markdown, "" if there is none. The last argument is the path.
    If drawing fails, one line is printed, and the report goes on without the figure."""
    path = args[-1]
    path.unlink(missing_ok=True)
    if plt := pyplot():
        try:
            plot(plt, *args)
        except Exception as e:                                              # matplotlib raises many types
            print(f"{plot.__name__} is left out: {type(e).__name__}: {e}", file=sys.stderr)
        plt.close("all")
    return f"![{title}]({path.name})\n" if path.exists() else ""


def save_figure(figure, path):
    write_atomically(path, lambda f: figure.savefig(f, format="png"))


def label_of(name):
    """A name as a label: matplotlib reads $ as mathematics, and hides labels that begin with _."""
    text = str(name).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def plot_curves(plt, logs, path):
    """Figure 1: the validation and training loss of {run: rows of log.csv}, by tokens and by minutes."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.2))
    for axes, column, scale, label in zip(panels, ("tokens", "seconds"), (1e-6, 1 / 60),
                                          ("million tokens seen", "minutes of training")):
        for name, rows in logs.items():
            points = {loss: [(r[column] * scale, r[loss]) for r in rows if r.get("tokens") and loss in r]
                      for loss in ("val_loss", "train_loss")}
            [line] = axes.plot(*zip(*points["val_loss"] or [(math.nan, math.nan)]), label=label_of(name))
            axes.plot(*zip(*points["train_loss"] or [(math.nan, math.nan)]), color=line.get_color(),
                      linestyle=line.get_linestyle(), marker="", alpha=0.45, linewidth=0.8)
        axes.set(xlabel=label, ylabel="loss (nats per token)")
    panels[0].set_title("marked: validation; thin: training")
    panels[0].legend()
    save_figure(figure, path)


def plot_bars(plt, groups, labels, ylabel, scale, path):
    """Bars of {series: [value or None, for each label]}. scale: of the y axis, "linear" or "log"."""
    figure, axes = plt.subplots(figsize=(6.5, 3.2))
    width = 0.8 / len(groups)
    for k, (name, values) in enumerate(groups.items()):
        x = np.arange(len(labels)) + (k - (len(groups) - 1) / 2) * width
        axes.bar(x, [v or 0 for v in values], width, label=label_of(name), edgecolor="white",
                 hatch=("", "//", "..", "xx")[k % 4])
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set_xticks(range(len(labels)), [label_of(label) for label in labels], fontsize=7)
    axes.set_ylabel(ylabel)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)         # above the bars
    save_figure(figure, path)


def plot_memory(plt, by_run, labels, path):
    """The loss at repeated names, of {run: [(loss, floor, cases) or None, for each label]}."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for name, cells in by_run.items():
        axes.plot(range(len(labels)), [cell[0] if cell else math.nan for cell in cells], label=label_of(name))
    axes.axhline(math.log(20), color="grey", linewidth=0.8, linestyle=":", label="a guess: ln 20")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="words since the name was last said", ylabel="loss at the repeated name (nats)",
             ylim=(-0.1, 3.4))
    axes.legend(loc="center left")
    save_figure(figure, path)


def plot_frequencies(plt, found, path):
    """Figure 3, of what compare_frequencies returned: shares by rank, and the words that differ most."""
    trained, read = map(label_of, found["texts"])
    figure, (by_rank_axes, by_word_axes) = plt.subplots(1, 2, figsize=(8.4, 3.8))
    for label, shares in zip((trained, read), found["shares"]):
        by_rank_axes.loglog(*zip(*shares), marker="", label=label)
    by_rank_axes.set(xlabel="rank of the word", ylabel="share of all words")
    by_rank_axes.legend()
    rows = sorted(found["words"], key=lambda r: r["z"])
    by_word_axes.barh(range(len(rows)), [r["z"] for r in rows], color=[COLOURS[r["z"] > 0] for r in rows])
    by_word_axes.set_yticks(range(len(rows)), [label_of(r["word"]) for r in rows], fontsize=6)
    by_word_axes.set_xlabel(f"log-odds z: {trained} < 0 < {read}")
    save_figure(figure, path)


def plot_frontier(plt, frontier, path):
    """Reward against KL, of {run: [(KL, reward)]}: what a policy gains for a nat of KL."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for name, points in frontier.items():
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=0.8, label=label_of(name))
    axes.set(xlabel="KL to the reference (nats a response)", ylabel="reward")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


# ----------------------------------------------------------------------------------------------- command line

def token_name(tokenizer, i):
    if tokenizer.kind == "word":
        return tokenizer.words[i]
    text, encoding = tokenizer.decode([i]), getattr(tokenizer, "encoding", None)
    return repr(encoding.decode_single_token_bytes(i) if "\ufffd" in text and encoding else text)


def token_table(run, text):
    """Print the loss of every token of a sentence, and the likeliest token in its place; -> ids, losses."""
    model, tokenizer = run.model, run.tokenizer
    ids, unknown, _ = encode_text(tokenizer, text)
    if not ids:
        raise UserError("nothing in this text is a word of the run's vocabulary")
    losses = per_document_nll(model, [ids], tokenizer.eos)[0]
    inputs = torch.tensor([[tokenizer.eos, *ids[:-1]][:min(1024, context_length(model))]])
    with torch.no_grad(), autocast(model):
        hidden, _ = model(inputs.to(device_of(model)))
        guesses = model.logits(hidden)[0].argmax(-1).tolist()
    print(f"{'token':<18} {'nats':>7} {'p':>9}   likeliest")
    for k, (i, loss) in enumerate(zip(ids, losses)):
        guess = token_name(tokenizer, guesses[k]) if k < len(guesses) else ""
        print(f"{token_name(tokenizer, i):<18} {loss:7.3f} {math.exp(-loss):9.5f}   {guess}")
    if unknown:
        print(f"<unk> stands for: {', '.join(unknown)}")
    nll = losses.mean()
    print(f"{len(ids)} tokens, {nll:.3f} nats per token, perplexity {perplexity_of(nll):.2f}")
    return ids, losses


def influence(model, ids):
    """How much each token of a text matters for the prediction of each later one: the norm of the gradient of
    -log p(ids[t + 1]) with respect to the vector of ids[s], each row divided by its sum. float32 [T, T] for
    the T predictions of ids[1:]; 0 for s > t."""
    vectors = []
    hook = model.embed_tokens.register_forward_hook(lambda module, args, out: vectors.append(out))
    hidden, _ = model(ids[None, :-1])
    hook.remove()
    losses = -torch.log_softmax(model.logits(hidden)[0].float(), -1)                        # [T, V]
    rows = [torch.autograd.grad(loss[token], vectors[0], retain_graph=True)[0][0].norm(dim=-1)
            for loss, token in zip(losses, ids[1:])]
    return torch.stack([row / row.sum().clamp(min=1e-30) for row in rows])


def plot_influence(plt, scored, path):
    """`influence` in each run, side by side: dark where a word that was read matters for the word that is
    predicted. scored: [(run, ids, losses)]."""
    size = 1.1 + 0.13 * max(min(len(ids), 48) for _, ids, _ in scored)                          # inches
    figure, panels = plt.subplots(1, len(scored), figsize=(size * len(scored), size), squeeze=False,
                                  layout="constrained")
    panels[0, 0].set_ylabel("word that is predicted, and its probability")
    for axes, (run, ids, losses) in zip(panels[0], scored):
        ids = [run.tokenizer.eos, *ids][:1 + min(48, context_length(run.model))]
        names = [label_of(token_name(run.tokenizer, i)) for i in ids]
        square = influence(run.model, torch.tensor(ids, device=device_of(run.model))).cpu()
        axes.imshow(square.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.grid(False)
        axes.set_xticks(range(len(square)), names[:-1], rotation=90, fontsize=6)
        predicted = [f"{name}  {math.exp(-loss):.0%}" for name, loss in zip(names[1:], losses)]
        axes.set_yticks(range(len(square)), predicted, fontsize=6)
        axes.set(title=label_of(run.name), xlabel="word that was read")
    save_figure(figure, path)


def default_domains(runs):
    trained = {run.corpus for run in runs}
    names = [d for d in data.DOMAINS if trained & set(data.DOMAINS) and trained != {d}]
    on_disk = (data.data_dir() / "wikitext2" / "valid.txt").exists()
    if on_disk and trained - {*data.DOMAINS, "wikitext2"}:
        names.append("wikitext2")
    return names


def run_folders(names):
    """The folders of runs with these names, of all runs if there are none. A pattern that the shell has not
    expanded is expanded. Among several folders, as `runs/*` gives them, one without a language model (a
    report, a scorer, a search) is passed over."""
    if not names:
        return sorted({path.parent for path in Path("runs").glob("*/*.pt") if path.stem in ("best", "last")})
    folders = []
    for name in names:
        folders += map(Path, [name] if Path(name).exists() else sorted(glob.glob(name)) or [name])
    chosen = [folder for folder in folders if len(folders) == 1 or may_hold_language_model(folder)]
    for folder in folders:
        if folder not in chosen:
            print(f"passed over: {folder} holds no language model", file=sys.stderr)
    return chosen


def may_hold_language_model(folder):
    """Whether a name is a run, a checkpoint, a hub name or a folder of a hub's model other than a scorer."""
    if not folder.is_dir() or (folder / "best.pt").exists() or (folder / "last.pt").exists():
        return True
    return read_json(folder / "config.json", {}).get("model_type") not in (None, "distilbert")


def opened(names, chosen, opener, *args):
    """{name: opener(name, *args)}. If a name cannot be opened, it is skipped with a message; but if the user
    chose the names, its error is raised."""
    out = {}
    for name in names:
        try:
            out[name] = opener(name, *args)
        except UserError as e:
            if chosen:
                raise
            print(f"left out: {e}", file=sys.stderr)
    return out


def main(argv=None):
    config, _ = data.parse_args(Config, argv, "examples:\n" + __doc__.split("\n\n")[1])
    device = pick_device(config.device)
    product_dtype = pick_dtype(config.dtype, device)
    out, chosen = Path(config.out), [config.run] if config.run else config.runs
    if config.run and (config.text is None or config.runs):
        raise UserError("--run and --text go together; for a report, or a text in several runs, write --runs")
    if config.redraw:
        try:
            draw_report(read_json(out / "report.json"), out)
        except (KeyError, TypeError) as e:
            raise UserError(f"{out}/report.json is of another version of eval.py: make the report "
                            "again") from e
        return print(f"written to {out}/report.md")
    if out.is_dir() and {path.name for path in out.iterdir()} - {"influence.png"} \
            and not (out / "report.json").exists():
        raise UserError(f"{out} is a folder with other files in it; choose another with --out")
    folders = run_folders(chosen)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("--runs has the same folder twice; the same name counts once")
    runs = opened(folders, chosen, open_run, device, product_dtype)
    if not runs:
        raise UserError("there is no run under runs/. Train one first: python train.py --model lstm")
    for folder, run in runs.items():
        run.name = distinct_names(runs)[folder]
    runs = list(runs.values())
    if config.text is not None:
        scored = []
        for run in runs:
            if len(runs) > 1:
                print(f"{run.name}:")
            scored.append((run, *token_table(run, config.text)))
        out.mkdir(parents=True, exist_ok=True)
        drawn = draw("", plot_influence, scored, out / "influence.png")
        said = "The picture is left out." if pyplot() else NO_FIGURES
        return print(f"written to {out}/influence.png" if drawn else said)
    trained_texts = {text for run in runs for text in run.trained_on}
    names = config.domains or default_domains(runs)
    domains = opened(names, config.domains, read_domain, trained_texts)
    report = measure_runs(runs, domains, config.prompt, config.sentences)
    for note in report["notes"]:
        print(note)
    save_json(out / "report.json", report)
    draw_report(report, out)
    for row in report["summary"] + report["rewards"]:
        print("  ".join(f"{k} {format_number(v)}" for k, v in row.items()
                        if k in ("run", "best validation", "test", "floor", "reward", "KL", "distinct-2")))
    print(f"written to {out}/report.md")


if __name__ == "__main__":
    data.run_main(main)
