"""Compare trained models across domains: one command turns the runs on disk into a report with tables and figures.

    python eval.py                                                  # every run under runs/ -> runs/report/report.md
    python eval.py --runs runs/rnn-ptb runs/lstm-ptb --domains wikitext2 wikipedia:Climate_change my.txt --out runs/mine
    python eval.py --run runs/lstm-ptb --text "the market fell"     # one sentence, token by token

Definitions, with l_i = -log p(token i | all tokens before it in its text), in nats:

    perplexity of a text            exp(mean of l_i)
    mean of sentence perplexities   every sentence read afresh (after the end token), its perplexity, the plain mean: a few
                                    strange sentences decide it
    corpus perplexity               exp(mean of l_i over all tokens of all sentences)
    bits per character              (sum of l_i + cost of spelling the unknown words) / (ln 2 * characters)

A model that knows few words meets <unk> often and predicts it easily, so perplexity flatters it. Bits per character
does not: each unknown word is also charged its spelling, under a letter-bigram model fitted on the training vocabulary:
p(word) = prod_k p(c_k | c_k-1), add-one smoothed, with an end mark; a letter the vocabulary never has is charged 21
bits more (the size of Unicode). An <unk> that stands in the text itself has no spelling to charge. Characters are those of
the normalised words, one space after each; byte-pair tokenizers read, and are charged for, the text as it is.

Word frequencies are compared by the log-odds of Monroe, Colaresi & Quinn ("Fightin' Words", 2008, section 3.4): counts
y_w of n words in a text, plus a prior of a_w = 1000 * p(w in both texts together); d_w = log((y_w + a_w) / (n + 1000 -
y_w - a_w)) minus the same of the other text, divided by its standard deviation sqrt(1/(y_w + a_w) + 1/(y'_w + a_w)). A
rare word that happens to differ has a small z; a word of |z| > 2 differs in earnest. The distance between the two
distributions is the Jensen-Shannon divergence in bits: 0 if equal, 1 if they share no word.
"""
import csv
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from data import UserError, option, save_json, write_atomically
from sample import encode_prompt, generate, suppressed_tokens
from train import LOCAL, load_run, pick_device, pick_dtype, read_checkpoint, token_losses

@dataclass
class Config:
    """Compare trained models across domains: tables, figures, one report."""
    runs: list[str] = option([], "folders of runs (default: all under runs/)")
    domains: list[str] = option([], f"texts to read: {', '.join(data.CORPORA)}, wikipedia:TITLE, or a UTF-8 file "
                                "(default: the other embedded languages; for runs on real text, wikitext2 if it is on disk)")
    out: str = option("runs/report", "folder of the report")
    sentences: int = option(200, "sentences read of each domain", above=0)
    prompt: str = option("the meaning of life is", "what the samples continue")
    run: str = option(None, "with --text: one run")
    text: str = option(None, "with --run: a sentence, whose loss is printed token by token")
    device: str = option("auto", "auto: cuda, then mps, then cpu; or a torch device")
    dtype: str = option("float32", "of the matmuls, so that numbers do not depend on the machine",
                        choices=["auto", "float32", "bfloat16"])


TEXT_CHARACTERS = 1 << 20                       # of a domain's text, this much is read
STAGES = (0.05, 0.1, 0.25, 0.5, 1.0)            # of the training, for Figure 2
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")      # Okabe & Ito (2008)
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"


# ------------------------------------------------------------------------------------------------------------- runs

@dataclass
class Run:
    """A trained model with what its training left behind."""
    name: str
    model: object
    tokenizer: object
    log: list                                   # rows of log.csv: {column: number}, empty cells left out
    result: dict                                # result.json; {} while the training is not finished
    args: dict                                  # of train.py
    steps: int = 0                              # planned

    @property
    def corpus(self):
        return self.args.get("data", "?")


def read_log(path):
    """The rows of log.csv as {column: float}. What follows the last new line was cut off while it was written."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as f:
        header, *rows = list(csv.reader(f.read().split("\n")[:-1])) or [[]]
    out = []
    for row in rows:
        try:
            values = {k: float(v) for k, v in zip(header, row) if v}
        except ValueError:
            continue
        if len(row) == len(header) and "step" in values:
            out.append(values)
    return out


def open_run(folder, device):
    """UserError if there is no whole run in folder."""
    model, tokenizer, _ = load_run(folder, device, torch.float32)
    result = {}
    if (Path(folder) / "result.json").exists():
        try:
            result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
        except ValueError:
            print(f"{folder}/result.json is damaged and left out", file=sys.stderr)
    args, steps = result.get("options"), result.get("steps", 0)
    if args is None and (Path(folder) / "last.pt").exists():                # not finished
        checkpoint = read_checkpoint(Path(folder) / "last.pt")
        args, steps = checkpoint.get("options"), checkpoint.get("progress", {}).get("steps", 0)
    return Run(Path(folder).name, model, tokenizer, read_log(Path(folder) / "log.csv"), result, args or {}, steps)


def find_runs(folder="runs"):
    """Folders with weights in them, by name."""
    return sorted({p.parent for pattern in ("*/best.pt", "*/last.pt") for p in Path(folder).glob(pattern)})


# ------------------------------------------------------------------------------------------------- text and sentences

NEVER_LAST = set("mr mrs ms dr prof st gen col gov sen rep fig figs eq eqs vol ed eds pp cf ca approx vs e.g i.e".split())
ABBREVIATIONS = NEVER_LAST | set("jr sr etc inc corp co ltd est al u.s u.k u.n a.m p.m jan feb mar apr jun jul aug sep "
                                 "sept oct nov dec".split())
OPENERS = set("The A An In On At It Its This That These Those He She They We I But And However For From By As With When "
              "While After Since If There".split())
BOUNDARY = re.compile(r"""([.!?]+)((?:["'\u2019\u201d)\]]|\[[^\]\s]{1,12}\])*)(\s+)(?=(\S+))""")


def sentences(text):
    """Raw or tokenized English text -> its sentences. A full stop ends one unless it belongs to an abbreviation, an
    initial or a number. A line break always does; headings (= like this =) and empty lines are left out."""
    found = []
    for line in text.replace(data.SEPARATOR, "\n").splitlines():
        line = line.strip()
        if not line or re.fullmatch(r"=.*=", line):
            continue
        start = 0
        for m in BOUNDARY.finditer(line):
            words = line[start:m.start()].split()
            before = words[-1].lstrip("([\"'\u201c\u2018") if words else ""
            follows = m[4].lstrip("([\"'\u201c\u2018")
            standing_alone = line[m.start() - 1:m.start()].isspace()                # tokenized text: " . "
            ends = standing_alone or not follows[:1].islower()
            if m[1] == "." and not standing_alone and before != "I":
                unit = before.islower() and len(words) > 1 and words[-2][-1:].isdigit()         # 5 m. Then
                initial = re.fullmatch(r"[^\W\d_](\.[^\W\d_])*", before) and not unit
                number = before.lower() == "no" and follows[:1].isdigit()
                ends = ends and not number and before.lower() not in NEVER_LAST and (
                    follows in OPENERS or not (initial or before.lower() in ABBREVIATIONS))
            if ends:
                found.append(line[start:m.end(2)].strip())
                start = m.end()
        if line[start:].strip():
            found.append(line[start:].strip())
    return found


def read_domain(name):
    """The sentences, as raw text, of the test split of an embedded language (there a document is read as one sentence,
    because only a document can be read afresh: it begins by saying who it is about), of the validation split of a
    downloaded corpus, or of a whole file or article. UserError if it cannot be had or holds no sentence."""
    if name in data.CORPORA:
        texts = data.documents(name, "test" if name in data.DOMAINS else "valid")
    else:
        texts = (line for _, line in data.read_lines(data.source_file(name, "train")))
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size > TEXT_CHARACTERS:
            break
    found = [part.strip() for part in parts] if name in data.DOMAINS else sentences("".join(parts))
    found = [s for s in found if any(ch.isalnum() for ch in s)]
    if not found:
        raise UserError(f"{name} holds no sentence to read")
    return found


# ------------------------------------------------------------------------------------------------------------- losses

@torch.no_grad()
def losses_afresh(model, texts, eos, dtype=None, group=32):
    """[-log p of every token, float64 array] for each of texts (lists of ids), each read afresh after the end token.
    Texts of like length are read side by side, padded on the right, where a causal model cannot see it."""
    device = next(model.parameters()).device
    limit = 4096 if model.recurrent else model.config.block_size
    out = [None if len(t) <= limit else token_losses(model, [eos, *t], dtype=dtype).numpy() for t in texts]
    order, groups = sorted((k for k, t in enumerate(texts) if len(t) <= limit), key=lambda k: len(texts[k])), [[]]
    for k in order:                                                         # long texts in smaller groups
        if len(groups[-1]) == group or len(groups[-1]) * len(texts[k]) > 1 << 15:
            groups.append([])
        groups[-1].append(k)
    for members in filter(None, groups):
        targets = torch.full((len(members), max(1, len(texts[members[-1]]))), -1)
        for row, k in enumerate(members):
            targets[row, :len(texts[k])] = torch.tensor(texts[k], dtype=torch.long)
        inputs = torch.cat([torch.full((len(members), 1), eos), targets[:, :-1].clamp(min=0)], 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            nll = model(inputs, targets=targets.to(device), reduction="none")[0].cpu().double().numpy()
        for row, k in enumerate(members):
            out[k] = nll[row, :len(texts[k])]
    return out


class Speller:
    """Bits to spell a word: a letter-bigram model of a vocabulary, add-one smoothed; see the top of this file."""

    def __init__(self, words):
        self.pairs, self.firsts = Counter(), Counter()
        for word in words:
            for a, b in zip("\n" + word, word + "\n"):
                self.pairs[a, b] += 1
                self.firsts[a] += 1
        self.letters = {b for _, b in self.pairs}

    def bits(self, word):
        size = len(self.letters) + 1                                        # and one for all other letters
        return sum(-math.log2((self.pairs[a, b] + 1) / (self.firsts[a] + size)) + 21 * (b not in self.letters)
                   for a, b in zip("\n" + word, word + "\n"))


def in_words(tokenizer, sentence):
    """A sentence as words in a word tokenizer's conventions, unknown ones still spelled out."""
    if "@-@" not in tokenizer.ids:                                          # WikiText's marks inside words and numbers
        sentence = re.sub(r" @([-,.])@ ", r"\1", sentence)
    return [w for w in tokenizer.normalize(sentence) if w != "<eos>"]


def read_sentence(tokenizer, sentence):
    """-> (ids, unknown words, characters) of a sentence; ValueError for a word that a vocabulary without <unk> lacks."""
    if tokenizer.kind != "word":
        return tokenizer.encode(sentence), [], len(sentence) + 1
    words = in_words(tokenizer, sentence)
    unknown = [w for w in words if w not in tokenizer.ids or w == "<unk>"]
    if unknown and tokenizer.unk is None:
        raise ValueError(f"its vocabulary has no {unknown[0]!r}")
    return [tokenizer.ids.get(w, tokenizer.unk) for w in words], unknown, sum(len(w) + 1 for w in words)


def score(run, sentence_list, dtype, ends=False):
    """The perplexities of sentences under a run's model: the definitions at the top of this file. ends: the end token
    after each is predicted too, as documents have it. ValueError if they cannot be read with the run's vocabulary."""
    read = [read_sentence(run.tokenizer, s) for s in sentence_list]
    kept = [k for k, (ids, _, _) in enumerate(read) if ids]
    if not kept:
        raise ValueError("nothing in it is a word of its vocabulary")
    texts = [read[k][0] + [run.tokenizer.eos] * ends for k in kept]
    losses = losses_afresh(run.model, texts, run.tokenizer.eos, dtype)
    unknown = [w for k in kept for w in read[k][1]]
    speller = Speller(w for w in getattr(run.tokenizer, "words", ()) if w not in ("<unk>", "<eos>"))
    spelling = sum(speller.bits(w) for w in unknown if w != "<unk>")
    each, nats = [None] * len(sentence_list), np.concatenate(losses)
    for k, v in zip(kept, losses):
        each[k] = math.exp(min(v.mean(), 700))
    characters = sum(read[k][2] for k in kept)
    return {"sentences": each, "mean": statistics.fmean(each[k] for k in kept), "corpus": math.exp(min(nats.mean(), 700)),
            "tokens": len(nats), "unknown": len(unknown) / len(nats), "characters": characters,
            "bits_per_character": (nats.sum() / math.log(2) + spelling) / characters,
            "ids": [i for ids in texts for i in ids], "losses": nats}


# -------------------------------------------------------------------------------------------------- word frequencies

def compare_frequencies(train, domain, n_words=12):
    """Two Counters of words -> the distance of their distributions, and the words that differ most. At least two words
    are needed."""
    n, m = sum(train.values()), sum(domain.values())
    words = list(train | domain)
    y, x = (np.array([c[w] for w in words], float) for c in (train, domain))
    prior = 1000 * (y + x) / (n + m)

    def log_odds(counts, total):
        return np.log((counts + prior) / (total + 1000 - counts - prior))
    z = (log_odds(x, m) - log_odds(y, n)) / np.sqrt(1 / (x + prior) + 1 / (y + prior))
    p, q = y / n, x / m
    middle = (p + q) / 2
    parts = [np.sum(v[v > 0] * np.log2(v[v > 0] / middle[v > 0])) / 2 for v in (p, q)]
    order = np.argsort(-z, kind="stable")
    shown = [k for k in order[:n_words] if z[k] > 0] + [k for k in order[::-1][:n_words] if z[k] < 0]
    rows = [{"word": words[k], "train_per_million": 1e6 * p[k], "domain_per_million": 1e6 * q[k], "z": float(z[k])}
            for k in shown]
    return {"divergence_bits": float(sum(parts)), "words": rows}


def frequency_and_loss(train, domain, tokenizer, scored):
    """Pearson's correlation, over the tokens of a text, of a word's log-frequency ratio (how much rarer it was in training
    than it is here; half a count added) with its loss."""
    n, m = sum(train.values()), sum(domain.values())
    pairs = [(math.log((domain[w] + 0.5) / (m + 0.5)) - math.log((train[w] + 0.5) / (n + 0.5)), loss)
             for w, loss in zip((tokenizer.words[i] for i in scored["ids"]), scored["losses"]) if w != "<eos>"]
    ratio, loss = np.array(pairs).T
    return float(np.corrcoef(ratio, loss)[0, 1]) if len(pairs) > 2 and ratio.std() > 0 and loss.std() > 0 else None


# ---------------------------------------------------------------------------------------------------- memory, samples

DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 10 ** 6))


def name_memory(run, dtype):
    """[(mean loss in nats, the grammar's own, how many)] at names that must be repeated, for each range of DISTANCES to
    where the name was last said; for a run on an embedded language."""
    documents = [words for words, _ in data.embedded_documents(run.corpus, "test")]
    ids = [[run.tokenizer.ids[w] for w in words] for words in documents]
    losses = losses_afresh(run.model, ids, run.tokenizer.eos, dtype)
    names, found = set(data.NAMES.split()), defaultdict(list)
    for words, loss in zip(documents, losses):
        source, last = data.language(run.corpus).nll(words), {}
        for at, word in enumerate(words):
            if word in names:
                if word in last:
                    found[next(r for r in DISTANCES if at - last[word] <= r[1])].append((loss[at], source[at]))
                last[word] = at
    return [[*np.mean(found[r], 0).tolist(), len(found[r])] if found[r] else None for r in DISTANCES]


def distinct(texts, n):
    """Distinct n-grams over all n-grams of texts (lists of ids): 1 if nothing is ever said twice."""
    grams = [tuple(t[k:k + n]) for t in texts for k in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def samples(run, prompt, dtype, temperatures=(0.5, 1.2), n=16, tokens=40):
    """Continuations of a prompt at a low and a high temperature, how varied they are, and their perplexity under the
    model that wrote them."""
    ids, out, first = encode_prompt(run.tokenizer, prompt), [], int(run.tokenizer.kind != "qwen2")      # not the end token
    for temperature in temperatures:
        texts = generate(run.model, [ids] * n, tokens, temperature, seed=1, suppressed_tokens=suppressed_tokens(run.tokenizer))
        losses = losses_afresh(run.model, [ids[first:] + t for t in texts], run.tokenizer.eos, dtype)
        own = np.concatenate([v[len(ids) - first:] for v in losses])
        out.append({"temperature": temperature, "text": run.tokenizer.decode(ids[first:] + texts[0]),
                    "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
                    "self_perplexity": math.exp(min(own.mean(), 700))})
    return out


# ------------------------------------------------------------------------------------------------------------- figures

class Figures:
    """Draws into a folder with matplotlib where it is installed; draw() returns the line of the report."""

    def __init__(self, folder):
        self.folder = folder
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
            plt.rcParams.update({"figure.dpi": 150, "savefig.bbox": "tight", "font.size": 9, "axes.grid": True,
                                 "grid.alpha": 0.3, "axes.axisbelow": True,
                                 "axes.spines.top": False, "axes.spines.right": False})
            self.plt = plt
        except ImportError:
            self.plt = None

    def draw(self, name, title, paint, panels=1, width=4.2, height=3.2):
        """paint(axes...) draws; -> markdown."""
        if not self.plt:
            return f"({title}: no figure, because matplotlib is not installed: pip install matplotlib)\n"
        figure, axes = self.plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False)
        paint(*axes[0])
        write_atomically(self.folder / f"{name}.png", lambda f: figure.savefig(f, format="png"))
        self.plt.close(figure)
        return f"![{title}]({name}.png)\n"


def style(k):
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": LINES[k % len(LINES)]}


def paint_curves(runs):
    def paint(by_tokens, by_time):
        for k, run in enumerate(runs):
            rows = [r for r in run.log if r.get("tokens", 0) > 0]
            marked = {"marker": MARKERS[k % len(MARKERS)], "markersize": 3, "label": run.name}
            for axes, column, scale in ((by_tokens, "tokens", 1e-6), (by_time, "seconds", 1 / 60)):
                for what, look in (("train_loss", {"alpha": 0.45, "linewidth": 0.8}), ("val_loss", marked)):
                    points = [(r[column] * scale, r[what]) for r in rows if what in r and column in r]
                    if points:
                        axes.plot(*zip(*points), **style(k), **look)
        by_tokens.set(xlabel="million tokens seen", ylabel="loss (nats per token)", title="marked: validation; thin: training")
        by_time.set(xlabel="minutes of training", ylabel="loss (nats per token)")
        by_tokens.legend(fontsize=7)
    return paint


def paint_bars(groups, labels, ylabel, log=True):
    """groups: {series: [value or None per label]}."""
    def paint(axes):
        width = 0.8 / len(groups)
        for k, (name, values) in enumerate(groups.items()):
            at = [j + (k - (len(groups) - 1) / 2) * width for j, v in enumerate(values) if v is not None]
            axes.bar(at, [v for v in values if v is not None], width, label=name, color=COLOURS[k % len(COLOURS)],
                     hatch=("", "//", "..", "xx")[k % 4], edgecolor="white")
        if log:
            axes.set_yscale("log")
            for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis("{x:,.0f}")
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.set_ylabel(ylabel)
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)      # above, not over the bars
    return paint


def paint_memory(losses, labels):
    def paint(axes):
        for k, (name, row) in enumerate(losses.items()):
            points = [(j, v) for j, v in enumerate(row) if v is not None]
            axes.plot(*zip(*points), **style(k), marker=MARKERS[k % len(MARKERS)], label=name)
        axes.axhline(math.log(20), color="grey", linewidth=0.8, linestyle=":", label="a guess: ln 20")
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel="words since the name was last said", ylabel="loss at the repeated name (nats)", ylim=(-0.1, 3.4))
        axes.legend(fontsize=7, loc="center left")
    return paint


def paint_frequencies(train, domain, train_name, domain_name, words):
    def paint(ranks, apart):
        for k, (name, counts) in enumerate(((train_name, train), (domain_name, domain))):
            values = sorted(counts.values(), reverse=True)
            ranks.loglog(range(1, len(values) + 1), np.array(values) / sum(values), **style(k), label=name)
        ranks.set(xlabel="rank of the word", ylabel="share of all words")
        ranks.legend(fontsize=7)
        rows = sorted(words, key=lambda r: r["z"])
        apart.barh(range(len(rows)), [r["z"] for r in rows], color=[COLOURS[int(r["z"] > 0)] for r in rows])
        apart.set_yticks(range(len(rows)), [r["word"].replace("$", r"\$") for r in rows], fontsize=6)
        apart.set(xlabel=f"log-odds z: {train_name} < 0 < {domain_name}")
    return paint


def paint_search(rows, rungs, columns):
    def paint(*panels):
        for axes, column in zip(panels, columns):
            for k, rung in enumerate(rungs):
                points = [(float(r[column]), float(r[rung])) for r in rows if r[rung] and math.isfinite(float(r[rung]))]
                if points:
                    axes.scatter(*zip(*points), s=18, color=COLOURS[k], marker=MARKERS[k], label=f"rung {k + 1}")
            axes.set_xlabel(column)
            if column in ("lr", "weight_decay"):
                axes.set_xscale("log")
        panels[0].set_ylabel("validation perplexity")
        panels[0].legend(fontsize=7)
    return paint


def paint_frontier(groups):
    """Reward against KL, at every evaluation of the first run of each configuration: what a nat of KL buys."""
    def paint(axes):
        for k, members in enumerate(groups):
            run = next(iter(members.values()))
            points = [(r["eval_kl"], r["eval_reward"]) for r in run.log if "eval_kl" in r]
            axes.plot(*zip(*points), **style(k), marker=MARKERS[k % len(MARKERS)], markersize=3, linewidth=0.8, label=run.name)
        axes.set(xlabel="KL to the reference (nats a response)", ylabel="reward")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return paint


# -------------------------------------------------------------------------------------------------------------- report

def number(value, digits=2):
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def table(header, rows):
    """A markdown table; None is a dash, and <unk> is not taken for HTML."""
    cells = [[number(v).replace("|", "\\|").replace("<", "&lt;").replace("\n", " / ") for v in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def spread(values):
    """`mean ± deviation` of several seeds' values; one value stays a number."""
    if len(values) < 2:
        return values[0] if values else None
    return f"{number(statistics.fmean(values))} ± {number(statistics.stdev(values))}"


def by_configuration(runs):
    """[{seed: run}]: finished runs that differ in their seed alone are together."""
    groups = defaultdict(dict)
    for run in runs:
        same = {k: v for k, v in run.args.items() if k not in ("seed", *LOCAL)}
        key, seed = json.dumps([run.corpus, same], sort_keys=True, default=str), run.args.get("seed", "?")
        if not run.result or seed in groups[key]:                           # not finished, or a copy: a row of its own
            key += run.name
        groups[key][seed] = run
    return list(groups.values())


def summary(runs):
    """The table's header and rows: one row per configuration."""
    rows = []
    for members in by_configuration(runs):
        first, results = next(iter(members.values())), [run.result for run in members.values()]
        logged = [r["val_ppl"] for r in first.log if "val_ppl" in r]
        over_seeds = {k: spread([r[k] for r in results if k in r])
                      for k in ("val_ppl", "test_ppl", "tokens_per_second", "seconds")}
        if first.result or logged:
            rows.append([first.name if first.result else f"{first.name} (unfinished)", first.args.get("model") or f"{first.args.get('base', '?')}, fine-tuned",
                         first.corpus, sum(p.numel() for p in first.model.parameters()),
                         over_seeds["val_ppl"] if first.result else min(logged), over_seeds["test_ppl"],
                         first.result.get("floor_ppl"), over_seeds["tokens_per_second"], over_seeds["seconds"],
                         " ".join(map(str, members))])
    return ["run", "model", "trained on", "parameters", "best validation", "test", "floor",
            "tokens/s", "seconds", "seeds"], rows


def at_stages(run):
    """{column: [perplexity at each of STAGES]} from the log: the evaluation nearest to that share of the planned steps,
    None where there is none within 3 %."""
    rows = [r for r in run.log if r["step"] > 0]
    end = run.steps or max((r["step"] for r in rows), default=0)
    columns = sorted({c for r in rows for c in r if c == "val_ppl" or c.startswith("ppl_")}, reverse=True)

    def near(column, share):
        distance, value = min((abs(r["step"] / end - share), r[column]) for r in rows if column in r)
        return value if distance <= 0.03 else None
    return {c: [near(c, share) for share in STAGES] for c in columns}


def section_summary(runs, figures, js):
    header, rows = summary(runs)
    js["summary"] = [dict(zip(header, row)) for row in rows]
    return ["## Summary\n", table(header, rows)]


def section_curves(runs, figures, js):
    logged = [run for run in runs if any("val_loss" in r for r in run.log)]
    md = ["## Loss curves (Figure 1)\n"] + [f"{run.name} has no readable log.\n" for run in runs if run not in logged]
    return md + ([figures.draw("loss_curves", "Loss while training", paint_curves(logged), panels=2)] if logged else [])


def section_stages(runs, figures, js):
    by_run = {run.name: at_stages(run) for run in runs}
    js["stages"] = {"share of the training": STAGES, **by_run}
    series = {(name, "in domain" if c == "val_ppl" else c.removeprefix("ppl_")): values
              for name, by_text in by_run.items() for c, values in by_text.items()}
    labels = [f"{s:.0%}" for s in STAGES]
    md = ["## Perplexity at stages of the training (Figure 2)\n",
          table(["run", "text", *labels], [[*k, *v] for k, v in series.items()])]
    if not any(text != "in domain" for _, text in series):
        md.append("Only in domain: train with `--also climate`, say, to log another text's perplexity too.\n")
    if 0 < len(series) <= 12:
        bars = {f"{name}, {text}": values for (name, text), values in series.items()}
        md.append(figures.draw("stages", "Perplexity at stages", paint_bars(bars, labels, "perplexity"), width=6.5))
    return md


def section_domains(runs, domains, scores, gaps, n_sentences, figures, js):
    md, js["domains"] = ["## Other domains (Table 1)\n"], {}
    if len({run.tokenizer.vocab_size for run in runs}) > 1:
        md.append("These runs have different vocabularies, so a token is not the same thing to them: compare their bits per "
                  "character, and these only where the characters are the same too.\n")
    for name, sentence_list in domains.items():
        here = {run.name: scores[run.name, name] for run in runs if (run.name, name) in scores}
        missing = {run.name: gaps[run.name, name] for run in runs if run.name not in here}
        kept, floor = sentence_list[:n_sentences], None
        md.append(f"### {name}\n")
        if name in data.DOMAINS:
            documents = data.embedded_documents(name, "test")[:n_sentences]
            floor = math.exp(np.mean([v for words, _ in documents for v in data.language(name).nll(words)]))
            md.append("The grammar's own perplexity on these documents, the floor for models with its vocabulary: "
                      f"{floor:.2f}.\n")
        if here:
            md += [table(["run", "mean of sentence perplexities", "corpus perplexity", "tokens", "unknown words", "characters",
                          "bits per character"],
                         [[run, s["mean"], s["corpus"], s["tokens"], f"{s['unknown']:.1%}", s["characters"],
                           s["bits_per_character"]] for run, s in here.items()]),
                   f"Perplexity of the first {min(20, len(kept))} of {len(kept)} sentences (all are in report.json):\n",
                   table(["sentence", *here], [[text, *(s["sentences"][k] for s in here.values())]
                                               for k, text in enumerate(kept[:20])])]
        md += [f"{run}: – ({reason}).\n" for run, reason in missing.items()]
        js["domains"][name] = {"sentences": kept, "floor": floor, "gaps": missing, "runs": {
            run: {k: v for k, v in s.items() if k not in ("ids", "losses")} for run, s in here.items()}}
    if scores:
        bits = {run.name: [scores.get((run.name, d), {}).get("bits_per_character") for d in domains] for run in runs}
        md.append(figures.draw("domains", "Bits per character in each domain", width=6.5,
                               paint=paint_bars(bits, [Path(d).name for d in domains], "bits per character", log=False)))
    return md


def section_frequencies(runs, domains, scores, figures, js):
    md, js["frequencies"], groups = ["## Word frequencies (Figure 3)\n"], {}, {}
    for run in runs:
        if run.tokenizer.kind == "word" and run.corpus != "?":
            groups.setdefault((run.corpus, tuple(run.tokenizer.words)), []).append(run)
    for (corpus, words), members in groups.items():
        tokenizer, corpus_name = members[0].tokenizer, Path(corpus).stem
        try:
            ids = data.encode_split(corpus, "train", tokenizer)
        except UserError as e:
            md.append(f"The text of {corpus} cannot be read: {e}.\n")
            continue
        counts = sum(np.bincount(part, minlength=len(words)) for part in np.array_split(ids, len(ids) // (1 << 24) + 1))
        train = Counter({w: int(c) for w, c in zip(words, counts) if c and w != "<eos>"})
        for domain, sentence_list in domains.items():
            able = [run for run in members if (run.name, domain) in scores]
            said = Counter(w if w in tokenizer.ids else "<unk>" for s in sentence_list for w in in_words(tokenizer, s))
            if not able or len(train | said) < 2:
                continue
            compared = compare_frequencies(train, said)
            links = {run.name: frequency_and_loss(train, said, tokenizer, scores[run.name, domain]) for run in able}
            js["frequencies"][f"{corpus} and {domain}"] = compared | {"correlation": links}
            figure = figures.draw(f"frequencies_{len(js['frequencies'])}", "Word frequencies", panels=2, height=3.8,
                                  paint=paint_frequencies(train, said, corpus_name, Path(domain).name, compared["words"]))
            correlations = ", ".join(f"{name} {number(value)}" for name, value in links.items())
            md += [f"### {corpus_name} and {domain}\n",
                   f"Jensen-Shannon divergence {compared['divergence_bits']:.3f} bits. Correlation of a token's loss with how "
                   f"much rarer its word was in training than it is here: {correlations}.\n", figure,
                   table(["word", f"per million in {corpus_name}", f"in {domain}", "z"],
                         [list(row.values()) for row in compared["words"]])]
    return md


def section_memory(runs, dtype, figures, js):
    md = []
    labels = [f"{a}–{b}" if b < 10 ** 6 else f"over {a - 1}" for a, b in DISTANCES]
    for corpus in data.DOMAINS:
        able = [run for run in runs if run.corpus == corpus
                and getattr(run.tokenizer, "words", None) == data.embedded_vocabulary()]
        memory = {run.name: name_memory(run, dtype) for run in able}
        if memory:
            js.setdefault("memory", {"distances": DISTANCES})[corpus] = memory
            losses = {name: [cell and cell[0] for cell in cells] for name, cells in memory.items()}
            first = next(iter(memory.values()))
            md += [f"### {corpus}\n", table(["run", *labels], [[name, *row] for name, row in losses.items()] + [
                       ["floor", *(cell and cell[1] for cell in first)], ["cases", *(cell and cell[2] for cell in first)]]),
                   figures.draw(f"memory_{corpus}", "Loss at the repeated name", paint_memory(losses, labels), width=5)]
    return md and ["## Memory: the loss where a name must be repeated\n",
                   "Nats, by how many words ago the name was last said. The grammar leaves no choice there: its own loss is "
                   "the floor. A guess among the 20 names costs ln 20 = 3.00.\n", *md]


def section_samples(runs, prompt, dtype, js):
    js["samples"], rows = {}, []
    for run in runs:
        try:
            js["samples"][run.name] = samples(run, prompt, dtype)
            rows += [[run.name, *row.values()] for row in js["samples"][run.name]]
        except ValueError as e:                                             # longer than its context
            rows.append([run.name, None, f"– ({e})", None, None, None])
    return ["## Samples (Table 2)\n", f"16 continuations of 40 tokens of \"{prompt}\"; the first is shown.\n",
            table(["run", "temperature", "text", "distinct-1", "distinct-2", "perplexity under itself"], rows)]


def section_search(path, figures, js):
    """The trials of one search, best first: those that reached the last rung, then those of the rung before."""
    with open(path, newline="") as f:
        rows = [r for r in csv.DictReader(f) if r.get("val_ppl_1")]
    if not rows:
        return []
    rungs = sorted(k for k in rows[0] if k.startswith("val_ppl_"))
    rows.sort(key=lambda r: [float(r[k] or "inf") for k in reversed(rungs)])
    columns = [c for c in rows[0] if c in rungs or c not in ("trial", "diverged") and len({r[c] for r in rows}) > 1]
    drawn = [c for c in columns if c not in (*rungs, "tokens", "seconds", "params")]
    js.setdefault("search", {})[path.parent.name] = rows
    md = [f"## Search: {path.parent.name}\n",
          table(["trial", *columns], [[r["trial"], *(r[c] or None for c in columns)] for r in rows])]
    if drawn:
        md.append(figures.draw(path.parent.name, "Validation perplexity against each hyperparameter",
                               paint_search(rows, rungs, drawn), len(drawn), width=2.2))
    return md


def reward_at(run, kl):
    """The reward on the validation prompts when the policy's KL first came to this value, between two evaluations linearly."""
    points = [(r["eval_kl"], r["eval_reward"]) for r in run.log if "eval_kl" in r]
    for (k0, r0), (k1, r1) in zip(points, points[1:]):
        if k0 < kl <= k1:
            return r0 + (r1 - r0) * (kl - k0) / (k1 - k0)


def section_rewards(runs, figures, js):
    """Policies that ppo.py trained, before and after, and what the reward was when all had moved equally far."""
    groups = by_configuration(runs)
    common = min(max((r["eval_kl"] for r in run.log if "eval_kl" in r), default=0.0) for run in runs)
    settings = ("kl_coef", "kl_target", "lr", "repetition_coef", "sft_coef", "sft_every", "steps")
    measured = {"reward before": lambda r: r["before"]["reward"], "reward": lambda r: r["after"]["reward"],
                "rise, deviations": lambda r: r["rise"], "KL": lambda r: r["after"]["kl"],
                "distinct-2": lambda r: r["after"]["distinct_2"],
                "of the reference's": lambda r: r["after"]["distinct_2"] / r["before"]["distinct_2"],
                "repeated bigrams": lambda r: r["after"]["repetition"],
                "perplexity under the reference": lambda r: r["after"]["ref_ppl"]}
    rows = []
    for members in groups:
        first, finished = next(iter(members.values())), [run.result for run in members.values() if run.result]
        on_the_way = [v for run in members.values() if (v := reward_at(run, common)) is not None]
        rows.append([first.name if finished else f"{first.name} (unfinished)", *(f"{first.args[name]:g}" for name in settings),
                     *(spread([value(r) for r in finished]) for value in measured.values()), spread(on_the_way),
                     " ".join(map(str, members))])
    header = ["run", *(name.replace("_", "-") for name in settings), *measured, f"reward when KL came to {common:.1f}", "seeds"]
    js["rewards"] = [dict(zip(header, row)) for row in rows]
    logged = [members for members in groups if any("eval_kl" in r for r in next(iter(members.values())).log)]
    figure = [figures.draw("frontier", "Reward against KL while training", paint_frontier(logged), width=5)] if logged else []
    return ["## Policies trained by PPO\n", table(header, rows), *figure]


def report(runs, domains, missing, out, prompt, n_sentences, dtype, trials):
    """Write report.md, report.json and the figures into the folder `out`; -> the rows of the summaries. Policies of
    ppo.py have a section of their own and are in no other."""
    policies, runs = [r for r in runs if "kl_coef" in r.args], [r for r in runs if "kl_coef" not in r.args]
    scores, gaps = {}, {}
    for name, sentence_list in domains.items():
        for run in runs:
            try:
                scores[run.name, name] = score(run, sentence_list[:n_sentences], dtype, ends=name in data.DOMAINS)
            except ValueError as e:
                gaps[run.name, name] = str(e)
    figures, js = Figures(out), {}
    md = ["# Report\n", "Losses are in nats per token, perplexity is their exponential; eval.py defines all at its top.\n",
          *(f"Left out: {reason}.\n" for reason in missing)]
    if runs:
        md += section_summary(runs, figures, js) + section_curves(runs, figures, js) + section_stages(runs, figures, js)
        md += section_domains(runs, domains, scores, gaps, n_sentences, figures, js)
        md += section_frequencies(runs, domains, scores, figures, js)
        md += section_memory(runs, dtype, figures, js) + section_samples(runs, prompt, dtype, js)
    if policies:
        md += section_rewards(policies, figures, js)
    for path in trials:
        md += section_search(path, figures, js)
    save_json(out / "report.json", js)
    write_atomically(out / "report.md", lambda f: f.write("\n".join(md).encode()))
    return js.get("summary", []) + js.get("rewards", [])


# -------------------------------------------------------------------------------------------------------- command line

def token_table(run, text, dtype):
    """The loss of every token of a sentence, and what the model would have said."""
    try:
        ids, unknown, _ = read_sentence(run.tokenizer, text)
    except ValueError as e:
        raise UserError(f"{run.name} cannot read this: {e}; take words it was trained on") from e
    if not ids:
        raise UserError("nothing in this text is a word of the run's vocabulary")
    losses = losses_afresh(run.model, [ids], run.tokenizer.eos, dtype)[0]
    with torch.no_grad():
        device = next(run.model.parameters()).device
        limit = len(ids) if run.model.recurrent else run.model.config.block_size
        hidden, _ = run.model(torch.tensor([[run.tokenizer.eos, *ids[:-1]][:limit]], device=device))
        likeliest = run.model.logits(hidden)[0].argmax(-1).tolist() + [None] * (len(ids) - limit)

    def piece(i):
        return "" if i is None else run.tokenizer.words[i] if run.tokenizer.kind == "word" else repr(run.tokenizer.decode([i]))
    print(f"{'token':<18} {'nats':>7} {'p':>9}   likeliest")
    for i, loss, guess in zip(ids, losses, likeliest):
        print(f"{piece(i):<18} {loss:7.3f} {math.exp(-loss):9.5f}   {piece(guess)}")
    if unknown:
        print(f"<unk> stands for: {', '.join(unknown)}")
    print(f"{len(ids)} tokens, {losses.mean():.3f} nats per token, perplexity {math.exp(min(losses.mean(), 700)):.2f}")


def default_domains(runs):
    trained = {run.corpus for run in runs}
    names = [d for d in data.DOMAINS if trained & set(data.DOMAINS) and trained != {d}]
    if trained - set(data.DOMAINS) and "wikitext2" not in trained and (data.data_dir() / "wikitext2" / "valid.txt").exists():
        names.append("wikitext2")
    return names


def main(argv=None):
    args, _ = data.parse_args(Config, argv, 'examples:\n  python eval.py --domains wikitext2 my.txt\n'
                              '  python eval.py --run runs/lstm-ptb --text "the market fell"')
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if (args.run is None) != (args.text is None):
        raise UserError("--run and --text go together; for a report of some runs write --runs")
    if args.run:
        return token_table(open_run(args.run, device), args.text, dtype)
    out = Path(args.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists():
        raise UserError(f"{out} is a folder with other files in it; choose another with --out")
    runs, missing = [], []
    for folder in args.runs or find_runs():
        try:
            runs.append(open_run(folder, device))
        except UserError as e:
            if args.runs:
                raise
            missing.append(str(e))
    if not runs:
        raise UserError("there is no run under runs/. Train one first: python train.py --model lstm")
    if len({run.name for run in runs}) < len(runs):
        raise UserError("two of these runs have the same name, and the tables could not tell them apart; rename one folder")
    domains = {}
    for name in args.domains or default_domains(runs):
        try:
            domains[name] = read_domain(name)
        except UserError as e:
            if args.domains:
                raise
            missing.append(str(e))
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "report.json", {})                                      # marks the folder as ours, should this be cut off
    trials = sorted(Path("runs").glob("*/trials.csv")) if not args.runs else []
    for row in report(runs, domains, missing, out, args.prompt, args.sentences, dtype, trials):
        print("  ".join(f"{k} {number(v)}" for k, v in row.items()
                        if k in ("run", "best validation", "test", "floor", "reward", "KL", "distinct-2")))
    print(f"written to {out}/report.md")


if __name__ == "__main__":
    data.run_main(main)
