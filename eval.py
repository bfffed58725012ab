"""Compare trained models across domains: one command turns the runs on disk into a report with tables and
figures.

    python eval.py                                    # every run under runs/ -> runs/report/report.md
    python eval.py --runs runs/rnn-ptb runs/lstm-ptb --domains wikitext2 my.txt --out runs/mine
    python eval.py --run runs/lstm-ptb --text "the market fell"          # one sentence, token by token
    python eval.py --redraw --out runs/mine           # tables and figures again, from report.json alone

The first half of this file computes numbers and puts all of them into one dictionary, report.json; the second
half makes tables and figures from that dictionary and from nothing else.

Definitions, with l_i = -log p(token i | all tokens before it in its text), in nats:

    perplexity of a text            exp(mean of l_i)
    mean of sentence perplexities   every sentence is scored independently, after the end token; the plain
                                    mean of their perplexities, which a few strange sentences decide
    corpus perplexity               exp(mean of l_i over all tokens of all sentences)
    bits per character              (sum of l_i + bits that spell the unknown words * ln 2) / (ln 2 *
                                    characters)

They stand in `perplexities`; the spelling is Speller's.

A model that knows few words meets <unk> often and predicts it easily, so perplexity flatters it. Bits per
character does not: each unknown word is also charged its spelling, under a letter-bigram model fitted on the
training vocabulary: p(word) = prod_k p(c_k | c_k-1), add-one smoothed, with an end mark; a letter that the
vocabulary never has is charged 21 bits more (the size of Unicode). An <unk> in the text itself has no
spelling to charge; a character that a model on characters does not have costs 21 bits. Characters are those
of the normalised words, one space after each; byte-pair tokenizers read, and are charged for, the text as it
is.

Word frequencies (compare_frequencies) are compared by the log-odds of Monroe, Colaresi & Quinn ("Fightin'
Words", 2008, section 3.4): counts y_w of n words in a text, plus a prior of a_w = 1000 * p(w in both texts
together); d_w = log((y_w + a_w) / (n + 1000 - y_w - a_w)) minus the same of the other text, divided by its
standard deviation sqrt(1/(y_w + a_w) + 1/(y'_w + a_w)). A rare word that happens to differ has a small z; a
word of |z| > 2 differs significantly. The distance between the two distributions is the Jensen-Shannon
divergence in bits: 0 if equal, 1 if they share no word.
"""
import csv
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
                    pick_device, pick_dtype, read_checkpoint)
from train import LONGEST_WINDOW, perplexity_of, token_losses


@dataclass
class Config:
    """Compare trained models across domains: tables, figures, one report."""
    runs: list[str] = option([], "folders of runs (default: all under runs/)")
    domains: list[str] = option([], f"texts to read: {', '.join(data.CORPORA)}, wikipedia:TITLE, a file "
                                    "(default: other embedded languages; for real text wikitext2, if there)")
    out: str = option("runs/report", "folder of the report")
    redraw: bool = option(False, "draw the report in --out again from its report.json; no model is needed")
    sentences: int = option(200, "sentences read of each domain")
    prompt: str = option("the meaning of life is", "what the samples continue")
    run: str = option(None, "with --text: one run")
    text: str = option(None, "with --run: a sentence, whose loss is printed token by token")
    device: str = option("auto", "auto: cuda, then mps, then cpu; or a torch device")
    dtype: str = option("float32", "of the matmuls, so that numbers do not depend on the machine",
                        choices=["auto", "float32", "bfloat16"])


TEXT_CHARACTERS = 1 << 20                       # of a domain's text, this much is read
STAGES = (0.05, 0.1, 0.25, 0.5, 1.0)            # of the training, for Figure 2
DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 10 ** 6))        # words since a name was last said


# ---------------------------------------------------------------------------------------------- numbers: runs

@dataclass
class Trained:
    """A trained model with what its training left behind."""
    name: str
    model: object
    tokenizer: object
    log: list                                   # rows of log.csv: {column: number}, empty cells left out
    result: dict                                # result.json; {} while the training is not finished
    options: dict                               # of the script that trained it
    steps: int = 0                              # planned

    @property
    def corpus(self):
        return self.options.get("data", "?")


def read_log(path):
    """The rows of log.csv as {column: float}, up to the last new line: a kill may cut a row off."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
    except (ValueError, TypeError) as e:                                    # changed by hand, or by a program
        print(f"left out: {path} is not as it was written ({e})", file=sys.stderr)
        return []


def run_options(folder):
    """-> (result.json or {}, the options of the script that trained the run, planned steps)."""
    result, last = read_json(Path(folder) / "result.json", {}), Path(folder) / "last.pt"
    if result or not last.exists():
        return result, result.get("options", {}), result.get("steps", 0)
    checkpoint = read_checkpoint(last)                                      # not finished
    return {}, checkpoint.get("options", {}), checkpoint.get("run", {}).get("steps", 0)


def open_run(folder, device, product_dtype=torch.float32):
    """UserError if there is no complete run in folder."""
    model, tokenizer, _ = load_run(folder, device, torch.float32)
    model.product_dtype = product_dtype
    log = read_log(Path(folder) / "log.csv")
    return Trained(Path(folder).name, model, tokenizer, log, *run_options(folder))


def distinct_names(names):
    """{name of a run or a text: its last part, behind as many more as tell it from the others}."""
    shown = {name: str(name).encode(errors="replace").decode() for name in names}
    for n in range(1, 20):
        parts = {name: "/".join(Path(text).parts[-n:]) for name, text in shown.items()}
        if len(set(parts.values())) == len(parts):
            return parts
    return shown


# ----------------------------------------------------------------------------------------- numbers: sentences

# a full stop behind these ends no sentence; behind the second kind, and behind initials (not the unit in
# "5 m."), only before a word that often begins one
NEVER_LAST = (r"mr|mrs|ms|dr|prof|st|gen|col|gov|sen|rep|figs?|eqs?|vol|eds?|pp|cf|ca|approx|vs|e\.g|i\.e|"
              r"no(?=\. \d)")
SOMETIMES_LAST = (r"jr|sr|etc|inc|corp|co|ltd|est|al|u\.[skn]|[ap]\.m|jan|feb|mar|apr|jun|jul|aug|sept?|oct|"
                  r"nov|dec|(?<!\d\s)(?!I\.)[^\W\d_](?:\.[^\W\d_])*")
OPENERS = ("The|An?|In|On|At|Its?|This|That|These|Those|He|They|She|We|I|But|And|However|For|From|By|As|"
           "With|When|While|After|Since|If|There")
QUOTES = "(\\[\"'\u201c\u2018"                                # what may open a sentence
ABBREVIATION = re.compile(rf"(?<![^\s{QUOTES}])(?:(?:{NEVER_LAST})|(?:{SOMETIMES_LAST})"
                          rf"(?!\.\S*\s+[{QUOTES}]*(?-i:{OPENERS})\b))\.(?!\.)", re.I)
ENDS = re.compile(rf"([.!?]+(?:[\"'\u2019\u201d)\]]|\[[^\]\s]{{1,12}}\])*)\s+(?=[{QUOTES}]*(\S?))")


LONGEST = 2000                  # characters of a sentence; what is longer, a text without full stops, is cut


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
    """Raw or tokenized English text -> its sentences, without headings (= like this =). A full stop ends one
    unless it belongs to an abbreviation, an initial or a number; a line's end always, but in wrapped text."""
    # a Chinese stop ends a sentence wherever it stands
    text = re.sub(r"([\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019\uff09]*)", r"\1\n", text)
    found = []
    for line in unwrap(text.replace(data.SEPARATOR, "\n")).splitlines():
        if not re.fullmatch(r"\s*=.*=\s*", line):
            line = ABBREVIATION.sub(lambda m: m[0].replace(".", "\0"), line)
            # an end unless a small letter follows; " . " always is one
            line = ENDS.sub(lambda m: m[0] if m[2].islower() and not re.match(r"\s", line[m.start() - 1:])
                            else m[1] + "\n", line)
            found += line.replace("\0", ".").splitlines()
    return [part.strip() for sentence in found if sentence.strip()
            for part in re.findall(rf"(?s).{{1,{LONGEST}}}(?:\s|$)|.{{{LONGEST}}}", sentence.strip())]


def read_domain(name):
    """Sentences as raw text: the documents of an embedded language's test split (only these begin by saying
    who they are about); sentences of another corpus's validation split, or of a complete file or article."""
    embedded = name in data.DOMAINS
    split = "test" if embedded else "valid" if name in data.CORPORA else "all"
    parts = [part.strip() for part in data.documents(name, split)] if embedded else \
        sentences("".join(data.documents(name, split))[:TEXT_CHARACTERS])
    found = [s for s in parts if any(ch.isalnum() for ch in s)]
    if not found:
        raise UserError(f"{name} holds no sentence to read")
    return found


# -------------------------------------------------------------------------------------------- numbers: losses

@torch.no_grad()
def per_document_nll(model, texts, eos, group=32):
    """[-log p of every token, float64 array] of texts (lists of ids), each scored independently after the end
    token. Those of like length are read side by side, padded where a causal model cannot see it."""
    limit = min(LONGEST_WINDOW, context_length(model))
    out, order = [None] * len(texts), sorted(range(len(texts)), key=lambda k: -len(texts[k]))
    while order:
        data.live(f"scored {len(texts) - len(order):,} of {len(texts):,} texts")
        longest = len(texts[order[0]])
        if longest > limit:
            k = order.pop(0)
            out[k] = token_losses(model, [eos, *texts[k]]).numpy()
            continue
        n = min(group, (1 << 15) // max(1, longest))                        # long texts in smaller groups
        members, order = order[:n], order[n:]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([eos, *texts[k]]) for k in members],
                                              batch_first=True, padding_value=-1).to(device_of(model))
        with autocast(model):
            nll = model(ids[:, :-1].clamp(min=0), targets=ids[:, 1:], reduction="none")[0]
        for k, row in zip(members, nll.cpu().double().numpy()):
            out[k] = row[:len(texts[k])]
    data.live("")
    return out


class Speller:
    """Bits to spell a word, by the letter bigrams of a vocabulary: see the top of this file."""

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
        size = len(self.letters) + 1                                        # and one for all other letters
        return sum(-math.log2((self.pairs[a, b] + 1) / (self.firsts[a] + size)) + 21 * (b not in self.letters)
                   for a, b in zip("\n" + word, word + "\n"))


def in_words(tokenizer, sentence):
    """A sentence as words in a word tokenizer's conventions, unknown ones still spelled out."""
    if "@-@" not in tokenizer.ids:                                 # WikiText's marks inside words and numbers
        sentence = re.sub(r" @([-,.])@ ", r"\1", sentence)
    return [w for w in tokenizer.normalize(sentence) if w != "<eos>"]


def read_sentence(tokenizer, sentence):
    """-> (ids, unknown words, characters); UserError for an unknown word where there is no <unk>."""
    if tokenizer.kind != "word":
        letters = tokenizer.normalize(sentence) if tokenizer.kind == "char" else ()
        unknown = [ch for ch in letters if ch not in tokenizer.ids]
        return tokenizer.encode(sentence), unknown, len(sentence) + 1
    words = in_words(tokenizer, sentence)
    unknown = [w for w in words if w not in tokenizer.ids or w == "<unk>"]
    if unknown and tokenizer.unk is None:
        raise UserError(f"its vocabulary has no {unknown[0]!r}")
    return [tokenizer.ids.get(w, tokenizer.unk) for w in words], unknown, sum(len(w) + 1 for w in words)


def perplexities(model, tokenizer, sentence_list, ends=False):
    """Of sentences under a model: the definitions at the top of this file. ends: the end token after each is
    predicted too, as documents have it. UserError if the vocabulary cannot spell them."""
    read = [read_sentence(tokenizer, s) for s in sentence_list]
    kept = [k for k, (ids, _, _) in enumerate(read) if ids]
    if not kept:
        raise UserError("nothing in it is a word of its vocabulary")
    texts = [read[k][0] + [tokenizer.eos] * ends for k in kept]
    losses = per_document_nll(model, texts, tokenizer.eos)
    unknown = [w for k in kept for w in read[k][1]]
    speller = Speller(w for w in getattr(tokenizer, "words", ()) if w not in ("<unk>", "<eos>"))
    spelling = sum(speller.bits(w) for w in unknown if w != "<unk>")
    nats, characters = np.concatenate(losses), sum(read[k][2] for k in kept)
    each = dict.fromkeys(range(len(read))) | {k: perplexity_of(v.mean()) for k, v in zip(kept, losses)}
    return {"sentences": list(each.values()), "mean": statistics.fmean(each[k] for k in kept),
            "corpus": perplexity_of(nats.mean()), "tokens": len(nats), "unknown": len(unknown) / len(nats),
            "characters": characters,
            "bits_per_character": (nats.sum() / math.log(2) + spelling) / characters,
            "ids": [i for ids in texts for i in ids], "losses": nats}


# ---------------------------------------------------------------------------------- numbers: word frequencies

def compare_frequencies(train, domain, n_words=12):
    """Two Counters of words -> the distance of their distributions, the words that differ most, and how the
    share of a word falls with its rank. At least two words are needed."""
    n, m = sum(train.values()), sum(domain.values())
    words = list(train | domain)
    y, x = (np.array([c[w] for w in words], float) for c in (train, domain))
    prior = 1000 * (y + x) / (n + m)
    d_here, d_train = (np.log((c + prior) / (total + 1000 - c - prior)) for c, total in ((x, m), (y, n)))
    z = (d_here - d_train) / np.sqrt(1 / (x + prior) + 1 / (y + prior))
    p, q = y / n, x / m
    middle = (p + q) / 2
    divergence = sum(np.sum(v[v > 0] * np.log2(v[v > 0] / middle[v > 0])) / 2 for v in (p, q))
    order = np.argsort(-z, kind="stable")
    shown = [k for k in order[:n_words] if z[k] > 0] + [k for k in order[::-1][:n_words] if z[k] < 0]
    rows = [{"word": words[k], "per million in training": 1e6 * p[k], "per million here": 1e6 * q[k],
             "z": float(z[k])} for k in shown]
    return {"divergence_bits": float(divergence), "words": rows, "shares": [by_rank(p), by_rank(q)]}


def by_rank(shares, points=100):
    """[(rank, share)] of a distribution, at ranks evenly spaced on a logarithmic scale."""
    shares = np.sort(shares[shares > 0])[::-1]
    ranks = np.unique(np.geomspace(1, len(shares), points).round().astype(int)).tolist()
    return [(rank, float(shares[rank - 1])) for rank in ranks]


def frequency_and_loss(train, domain, tokenizer, scored):
    """Pearson's correlation, over the tokens of a text, of a word's log-frequency ratio (how much rarer it
    was in training than it is here; half a count added) with its loss."""
    n, m = sum(train.values()), sum(domain.values())
    words = [tokenizer.words[i] for i in scored["ids"]]
    pairs = [(math.log((domain[w] + 0.5) / (m + 0.5)) - math.log((train[w] + 0.5) / (n + 0.5)), loss)
             for w, loss in zip(words, scored["losses"]) if w != "<eos>"]
    ratio, loss = np.array(pairs).T
    varied = len(pairs) > 2 and ratio.std() > 0 and loss.std() > 0
    return float(np.corrcoef(ratio, loss)[0, 1]) if varied else None


def train_counts(corpus, tokenizer):
    """Counter of the words that a run was trained on; UserError if its text cannot be read."""
    counts = np.bincount(data.encode_split(corpus, "train", tokenizer), minlength=tokenizer.vocab_size)
    return Counter({w: int(c) for w, c in zip(tokenizer.words, counts) if c and w != "<eos>"})


# ----------------------------------------------------------------------------------- numbers: memory, samples

def name_memory(run):
    """[(mean loss in nats, the grammar's own, how many)] at names that must be repeated, for each range of
    DISTANCES to where the name was last said; for a run on an embedded language."""
    documents = [words for words, _ in data.embedded_documents(run.corpus, "test")]
    ids = [[run.tokenizer.ids[w] for w in words] for words in documents]
    names, found = set(data.NAMES.split()), defaultdict(list)
    for words, loss in zip(documents, per_document_nll(run.model, ids, run.tokenizer.eos)):
        source, last = data.language(run.corpus).nll(words), {}
        for at, word in enumerate(words):
            if word in last:
                distance = next(r for r in DISTANCES if at - last[word] <= r[1])
                found[distance].append((loss[at], source[at]))
            if word in names:
                last[word] = at
    return [[*np.mean(found[r], 0).tolist(), len(found[r])] if found[r] else None for r in DISTANCES]


def distinct(texts, n):
    """Distinct n-grams over all n-grams of texts (lists of ids): 1 if nothing is ever said twice."""
    grams = [tuple(t[k:k + n]) for t in texts for k in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def samples(run, prompt, temperatures=(0.5, 1.2), n=16, tokens=40):
    """Continuations of a prompt at a low and a high temperature, how varied they are, and their perplexity
    under the model that wrote them. UserError for a prompt longer than the model's context."""
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
    """A row for each run; while it is not finished, its best evaluation so far."""
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
    """{column: [perplexity at each of STAGES]} from the log: that of an evaluation at this share of the
    planned steps, or on the line between the losses of two; None more than 3 % outside of all evaluations."""
    rows = [r for r in run.log if r["step"] > 0]
    end = run.steps or max((r["step"] for r in rows), default=0)
    out = {}
    columns = {c for row in rows for c in row if c == "val_ppl" or c.startswith("ppl_")}
    for column in sorted(columns, reverse=True):
        at, nats = zip(*((r["step"] / end, math.log(r[column])) for r in rows if column in r))
        out[column] = [math.exp(np.interp(share, at, nats)) if at[0] - 0.03 < share < at[-1] + 0.03 else None
                       for share in STAGES]
    return out


def frequencies(runs, domains, scores):
    """{"corpus and domain": what compare_frequencies finds, and each run's correlation}; of runs on words."""
    out, counts, shown = {}, {}, distinct_names({run.corpus for run in runs} | domains.keys())
    for run in [run for run in runs if run.tokenizer.kind == "word" and run.corpus != "?"]:
        key = run.corpus, tuple(run.tokenizer.words)
        try:
            counts[key] = counts.get(key) or train_counts(run.corpus, run.tokenizer)
        except UserError as e:
            print(f"no word frequencies of {run.name}: {e}", file=sys.stderr)
            continue
        for domain, sentence_list in domains.items():
            here = Counter(w if w in run.tokenizer.ids else "<unk>" for s in sentence_list
                           for w in in_words(run.tokenizer, s))
            if (run.name, domain) in scores and len(counts[key] | here) > 1:
                texts = [shown[run.corpus], shown[domain]]
                found = out.setdefault(" and ".join(texts), compare_frequencies(counts[key], here)
                                       | {"texts": texts, "correlation": {}})
                scored = scores[run.name, domain]
                found["correlation"][run.name] = frequency_and_loss(counts[key], here, run.tokenizer, scored)
    return out


def reward_at(points, kl):
    """The reward where KL first comes to this value, on the lines between points [(KL, reward)]."""
    for (k0, r0), (k1, r1) in zip(points, points[1:]):
        if k0 < kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / (k1 - k0)


def rewards(runs):
    """A row for each run of PPO, before and after, with the reward when all had moved equally far; and
    [(KL, reward)] at its evaluations: what a nat of KL buys."""
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
        row["distinct-2 of the reference's"] = after and after["distinct_2"] / before["distinct_2"] or None
        rows.append(row | {f"reward when KL came to {common:.1f}": reward_at(points[run.name], common)})
    return rows, points


def measure_runs(runs, domains, prompt, n_sentences):
    """All numbers of a report, as report.json has them; the text of a UserError where there is no number.
    Policies of ppo.py have a part of their own and are in no other."""
    policies = [run for run in runs if "kl_coef" in run.options]
    runs = [run for run in runs if run not in policies]
    report = {"prompt": prompt, "summary": summary(runs), "logs": {run.name: run.log for run in runs},
              "stages": {run.name: at_stages(run) for run in runs},
              "vocabularies": len({repr(run.tokenizer.state()) for run in runs}), "domains": {}, "memory": {},
              "samples": {}}
    scores = {}
    for name, sentence_list in domains.items():
        embedded, found = name in data.DOMAINS, {}
        for run in runs:
            try:
                scores[run.name, name] = perplexities(run.model, run.tokenizer, sentence_list[:n_sentences],
                                                      ends=embedded)
                found[run.name] = {k: v for k, v in scores[run.name, name].items()
                                   if k not in ("ids", "losses")}
            except UserError as e:
                found[run.name] = str(e)
        floor = data.embedded_floor(name, "test", n_sentences) if embedded else None
        report["domains"][name] = {"sentences": sentence_list[:n_sentences], "floor": floor, "runs": found}
    report["frequencies"] = frequencies(runs, domains, scores)
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
    """A markdown table of dicts with the keys of the first; None is a dash."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row.get(name) for name in rows[0]] for row in rows)]
    escaped = str.maketrans({"|": "\\|", "<": "&lt;", "\n": " / "})          # <unk> is not HTML
    return "".join(f"| {' | '.join(format_number(v).translate(escaped) for v in line)} |\n" for line in lines)


def write_report(folder, lines):
    """Lines of markdown as report.md."""
    more = [] if pyplot() else ["No figures, because matplotlib is not installed: pip install matplotlib\n"]
    write_text(folder / "report.md", "\n".join([*lines, *more]))


def stages_section(report, out):
    stages = [(run, "in domain" if column == "val_ppl" else column.removeprefix("ppl_"), values)
              for run, columns in report["stages"].items() for column, values in columns.items()]
    labels = [f"{share:.0%}" for share in STAGES]
    rows = [{"run": run, "text": text} | dict(zip(labels, values)) for run, text, values in stages]
    if not rows:
        return []
    bars = {f"{run}, {text}": values for run, text, values in stages[:12]}
    return ["## Perplexity at stages of the training (Figure 2)\n",
            "A stage between two evaluations is on the line of their losses. `--also climate`, say, logs "
            "another text's perplexity too.\n", markdown_table(rows),
            draw("Perplexity at stages", plot_bars, bars, labels, "perplexity", True, out / "stages.png")]


def domains_section(report, out):
    """Each domain under each run, and sentence by sentence."""
    lines, bits = ["## Other domains (Table 1)\n"], {}
    if report["vocabularies"] > 1:
        lines.append("These runs have different vocabularies, and a token is not the same thing to them: "
                     "compare bits per character, and these only where the characters are the same too.\n")
    columns = {"mean": "mean of sentence perplexities", "corpus": "corpus perplexity", "tokens": "tokens",
               "unknown": "unknown words, share", "characters": "characters",
               "bits_per_character": "bits per character"}
    for name, domain in report["domains"].items():
        rows, each = [], [{"sentence": sentence} for sentence in domain["sentences"][:20]]
        for run, found in domain["runs"].items():
            reason = found if isinstance(found, str) else ""
            found = {"mean": f"– ({reason})"} if reason else found
            rows.append({"run": run} | {title: found.get(key) for key, title in columns.items()})
            bits.setdefault(run, []).append(found.get("bits_per_character"))
            each = [row | {run: ppl} for row, ppl in zip(each, found.get("sentences", [None] * len(each)))]
        floor = f"The grammar's own perplexity on these documents is {domain['floor'] or 0:.2f}.\n"
        lines += [f"### {name}\n", floor * bool(domain["floor"]), markdown_table(rows),
                  f"The first {len(each)} of {len(domain['sentences'])} sentences:\n", markdown_table(each)]
    if bits:
        lines.append(draw("Bits per character in each domain", plot_bars, bits, [*distinct_names(
            report["domains"]).values()], "bits per character", False, out / "domains.png"))
    return lines


def frequencies_section(report, out):
    lines = ["## Word frequencies (Figure 3)\n"]
    for k, (name, found) in enumerate(report["frequencies"].items()):
        runs = ", ".join(f"{run} {format_number(value)}" for run, value in found["correlation"].items())
        lines += [f"### {name}\n", f"Jensen-Shannon divergence {found['divergence_bits']:.3f} bits. "
                  "Correlation of a token's loss with how much rarer its word was in training than it is "
                  f"here: {runs}.\n",
                  draw("Word frequencies", plot_frequencies, found, out / f"frequencies_{k + 1}.png"),
                  markdown_table(found["words"])]
    return lines


def memory_section(report, out):
    lines = []
    labels = [f"{a}–{b}" if b < 10 ** 6 else f"over {a - 1}" for a, b in DISTANCES]
    for corpus, memory in report["memory"].items():
        any_run = next(iter(memory.values()))
        cells = [(run, 0, row) for run, row in memory.items()]
        cells += [("floor", 1, any_run), ("cases", 2, any_run)]
        rows = [{"run": name} | {label: cell and cell[k] for label, cell in zip(labels, row)}
                for name, k, row in cells]
        lines += [f"### {corpus}\n", markdown_table(rows), draw(
            "Loss at the repeated name", plot_memory, memory, labels, out / f"memory_{corpus}.png")]
    return lines and ["## Memory: the loss where a name must be repeated\n",
                      "Nats, by how many words ago the name was last said. The grammar leaves no choice "
                      "there: its own loss is the floor. A guess among the 20 names costs ln 20 = 3.00.\n",
                      *lines]


def draw_report(report, out):
    """report.md and its figures in the folder out, from what measure_runs returned or report.json holds."""
    lines = ["# Report\n", "Losses are in nats per token, perplexity is their exponential; eval.py defines "
             "all at its top.\n"]
    if report["summary"]:
        lines += ["## Summary\n", markdown_table(report["summary"]), "## Loss curves (Figure 1)\n",
                  draw("Loss while training", plot_curves, report["logs"], out / "loss_curves.png")]
        for section in (stages_section, domains_section, frequencies_section, memory_section):
            lines += section(report, out)
        rows = [{"run": run} | row for run, rows in report["samples"].items() for row in rows]
        lines += ["## Samples (Table 2)\n", f"16 continuations of 40 tokens of \"{report['prompt']}\"; the "
                  "first is shown.\n", markdown_table(rows)]
    if report["rewards"]:
        lines += ["## Policies trained by PPO\n", markdown_table(report["rewards"]), draw(
            "Reward against KL while training", plot_frontier, report["frontier"], out / "frontier.png")]
    write_report(out, lines)


# ------------------------------------------------------------------------------- figures, from the dictionary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")   # Okabe & Ito (2008)
MARKERS = "osD^vPX"


def pyplot():
    """matplotlib.pyplot, set up; None where it is not installed, and then nothing is drawn."""
    os.environ["MPLBACKEND"] = "Agg"            # a notebook's shell names one that is not here
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


def figure(path, panels=1, width=4.2, height=3.2):
    """`for panels in figure(path)`: the axes of a figure, side by side, which is written to path after the
    block; without matplotlib the block is passed over."""
    path.unlink(missing_ok=True)
    if plt := pyplot():
        drawn, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False)
        yield axes[0]
        write_atomically(path, lambda f: drawn.savefig(f, format="png"))
        plt.close(drawn)


def draw(title, plot, *args):
    """plot(*args), the last one the figure's path; -> its line of markdown. What cannot be drawn is left out,
    with a line, and ends no training and no report."""
    try:
        plot(*args)
    except Exception as e:                                                  # of matplotlib, of any kind
        print(f"{plot.__name__} is left out: {type(e).__name__}: {e}", file=sys.stderr)
    return f"![{title}]({args[-1].name})\n" * args[-1].exists()


def plot_curves(logs, path):
    """Figure 1: {run: rows of log.csv}; validation and training loss against tokens and against time."""
    for panels in figure(path, panels=2):
        for axes, column, scale, label in zip(panels, ("tokens", "seconds"), (1e-6, 1 / 60),
                                              ("million tokens seen", "minutes of training")):
            for name, rows in logs.items():
                points = {loss: [(r[column] * scale, r[loss]) for r in rows if r.get("tokens") and loss in r]
                          for loss in ("val_loss", "train_loss")}
                [line] = axes.plot(*zip(*points["val_loss"] or [(math.nan, math.nan)]), label=name)
                axes.plot(*zip(*points["train_loss"] or [(math.nan, math.nan)]), color=line.get_color(),
                          linestyle=line.get_linestyle(), marker="", alpha=0.45, linewidth=0.8)
            axes.set(xlabel=label, ylabel="loss (nats per token)")
        panels[0].set_title("marked: validation; thin: training")
        panels[0].legend()


def plot_bars(groups, labels, ylabel, log_scale, path):
    """groups: {series: [value or None per label]}."""
    for [axes] in figure(path, width=6.5):
        width = 0.8 / len(groups)
        for k, (name, values) in enumerate(groups.items()):
            at = np.arange(len(labels)) + (k - (len(groups) - 1) / 2) * width
            axes.bar(at, [v or 0 for v in values], width, label=name, hatch=("", "//", "..", "xx")[k % 4],
                     edgecolor="white")
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.set_ylabel(ylabel)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)     # above, not over the bars


def plot_memory(memory, labels, path):
    for [axes] in figure(path, width=5):
        for name, cells in memory.items():
            axes.plot(range(len(labels)), [cell[0] if cell else math.nan for cell in cells], label=name)
        axes.axhline(math.log(20), color="grey", linewidth=0.8, linestyle=":", label="a guess: ln 20")
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel="words since the name was last said", ylabel="loss at the repeated name (nats)",
                 ylim=(-0.1, 3.4))
        axes.legend(loc="center left")


def plot_frequencies(found, path):
    trained, read = found["texts"]
    for (ranks, apart) in figure(path, panels=2, height=3.8):
        for label, shares in zip(found["texts"], found["shares"]):
            ranks.loglog(*zip(*shares), marker="", label=label)
        ranks.set(xlabel="rank of the word", ylabel="share of all words")
        ranks.legend()
        rows = sorted(found["words"], key=lambda r: r["z"])
        apart.barh(range(len(rows)), [r["z"] for r in rows], color=[COLOURS[r["z"] > 0] for r in rows])
        apart.set_yticks(range(len(rows)), [r["word"].replace("$", r"\$") for r in rows], fontsize=6)
        apart.set_xlabel(f"log-odds z: {trained} < 0 < {read}")


def plot_frontier(frontier, path):
    """Reward against KL: what a nat of KL buys."""
    for [axes] in figure(path, width=5):
        for name, points in frontier.items():
            axes.plot([x for x, _ in points], [y for _, y in points], linewidth=0.8, label=name)
        axes.set(xlabel="KL to the reference (nats a response)", ylabel="reward")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


# ----------------------------------------------------------------------------------------------- command line

def token_table(run, text):
    """Print the loss of every token of a sentence, and what the model would have said."""
    model, tokenizer = run.model, run.tokenizer
    ids, unknown, _ = read_sentence(tokenizer, text)
    if not ids:
        raise UserError("nothing in this text is a word of the run's vocabulary")
    losses = per_document_nll(model, [ids], tokenizer.eos)[0]
    inputs = torch.tensor([[tokenizer.eos, *ids[:-1]][:min(len(ids), 1024, context_length(model))]])
    with torch.no_grad():
        hidden, _ = model(inputs.to(device_of(model)))
        guesses = model.logits(hidden)[0].argmax(-1).tolist()

    def shown(i):
        if tokenizer.kind == "word":
            return tokenizer.words[i]
        text = tokenizer.decode([i])                                # part of a character: its bytes
        encoding = getattr(tokenizer, "encoding", None)
        return repr(encoding.decode_single_token_bytes(i) if "\ufffd" in text and encoding else text)
    print(f"{'token':<18} {'nats':>7} {'p':>9}   likeliest")
    for k, (i, loss) in enumerate(zip(ids, losses)):
        guess = shown(guesses[k]) if k < len(guesses) else ""
        print(f"{shown(i):<18} {loss:7.3f} {math.exp(-loss):9.5f}   {guess}")
    if unknown:
        print(f"<unk> stands for: {', '.join(unknown)}")
    nll = losses.mean()
    print(f"{len(ids)} tokens, {nll:.3f} nats per token, perplexity {perplexity_of(nll):.2f}")


def default_domains(runs):
    trained = {run.corpus for run in runs}
    names = [d for d in data.DOMAINS if trained & set(data.DOMAINS) and trained != {d}]
    on_disk = (data.data_dir() / "wikitext2" / "valid.txt").exists()
    return names + ["wikitext2"] * (on_disk and bool(trained - {*data.DOMAINS, "wikitext2"}))


def opened(names, chosen, opener, *args):
    """{name: opener(name, *args)}. What cannot be opened is left out, unless it was asked for by name."""
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
    if (config.run is None) != (config.text is None):
        raise UserError("--run and --text go together; for a report of some runs write --runs")
    if config.run:
        return token_table(open_run(config.run, device, product_dtype), config.text)
    out = Path(config.out)
    if config.redraw:
        draw_report(read_json(out / "report.json"), out)
        return print(f"written to {out}/report.md")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists():
        raise UserError(f"{out} is a folder with other files in it; choose another with --out")
    found = {path.parent for path in Path("runs").glob("*/*.pt") if path.stem in ("best", "last")}
    folders = list(map(Path, config.runs)) or sorted(found)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("two of these runs have the same name: they are one folder, name it once")
    runs = opened(folders, config.runs, open_run, device, product_dtype)
    if not runs:
        raise UserError("there is no run under runs/. Train one first: python train.py --model lstm")
    for folder, run in runs.items():
        run.name = distinct_names(runs)[folder]
    runs = list(runs.values())
    domains = opened(config.domains or default_domains(runs), config.domains, read_domain)
    report = measure_runs(runs, domains, config.prompt, config.sentences)
    save_json(out / "report.json", report)
    draw_report(report, out)
    for row in report["summary"] + report["rewards"]:
        print("  ".join(f"{k} {format_number(v)}" for k, v in row.items()
                        if k in ("run", "best validation", "test", "floor", "reward", "KL", "distinct-2")))
    print(f"written to {out}/report.md")


if __name__ == "__main__":
    data.run_main(main)
