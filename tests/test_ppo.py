"""PPO: the scorer and WordPiece against transformers, the estimators against loops, the optimum against its closed form."""
import copy
import csv
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import eval
import finetune
import ppo
import sample
import train
from data import UserError
from fast.layer import FastDecoderLayer, speed_up
from lstm import LSTMConfig, LSTMLM
from ppo import gae, load_scorer, policy_loss, prompt_batch, rollout, value_loss, whiten
from qwen_load import WordPiece, save_scorer
from rnn import RNNConfig, RNNLM
from tests.conftest import real
from tests.test_qwen_load import VOCAB, agree, library_model, library_tokenizer, random_unicode, settled, write_tokenizer
from tests.test_train import stops_and_resumes, survives_kills
from transformer import Scorer, ScorerConfig, Transformer, TransformerConfig

# ---------------------------------------------------------------------------------------------------------- scorer

def library_scorer(folder, seed=0, **changes):
    """A DistilBERT with random weights, biases and norms too, in folder with a vocabulary."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(VOCAB), dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=128,
                 id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1}) | changes
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, float("norm.weight" in name.lower()), 0.3 if p.dim() == 1 else 2.0 if "embeddings" in name else 1.5 * p.shape[1] ** -0.5)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return model


def some_texts(rng, n, longest):
    return [" ".join(rng.choice(VOCAB[42:]).removeprefix("##") for _ in range(rng.randint(0, longest))) for _ in range(n)]


@pytest.mark.parametrize("changes", [{}, {"n_heads": 1, "n_layers": 1}, {"dim": 24, "n_heads": 3, "hidden_dim": 7}, {"n_layers": 5},
                                     {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}])
def test_scores_equal_transformers(tmp_path, changes):
    library = library_scorer(tmp_path, **changes)
    scorer, tokenizer = load_scorer(tmp_path), library_tokenizer(tmp_path / "vocab.txt")
    texts = ["", "good"] + some_texts(random.Random(1), 40, 20) + some_texts(random.Random(2), 8, 110) + ["bad film " * 100]    # cut at 128
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        logits = library(encoded["input_ids"], encoded["attention_mask"]).logits
    positive = 0 if "id2label" in changes else 1
    torch.testing.assert_close(scorer.score(texts), logits[:, positive], atol=1e-4, rtol=1e-4)
    assert logits[:, positive].std() > 0.05


def test_scores_of_the_full_size_equal_transformers(tmp_path):
    library = library_scorer(tmp_path, dim=768, hidden_dim=3072, n_layers=6, n_heads=12, max_position_embeddings=512)
    texts = some_texts(random.Random(3), 3, 30) + ["good " * 600]
    encoded = library_tokenizer(tmp_path / "vocab.txt")(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        logits = library(encoded["input_ids"], encoded["attention_mask"]).logits
    scorer = load_scorer(tmp_path)
    torch.testing.assert_close(scorer.score(texts), logits[:, 1], atol=1e-4, rtol=1e-4)
    assert scorer.batch([scorer.tokenizer.encode(texts[-1])]).shape == (1, 512)
    low = load_scorer(tmp_path, dtype=torch.bfloat16).score(texts)
    assert low.dtype == torch.float32 and (low - logits[:, 1]).abs().max() < 0.1 * logits.abs().max()


def test_pytorch_files_are_read_too_and_old_names_passed_over(tmp_path):
    library = library_scorer(tmp_path)
    state = library.state_dict() | {"distilbert.embeddings.position_ids": torch.arange(128)[None]}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        logits = library(torch.tensor([[3, 60, 61, 4]])).logits[0]
    scorer = load_scorer(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(scorer(torch.tensor([[3, 60, 61, 4]]))[0], logits, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing_and_dropout_is_off(tmp_path):
    library_scorer(tmp_path)
    scorer = load_scorer(tmp_path)
    scorer.train()
    texts = some_texts(random.Random(4), 20, 100)
    alone = torch.cat([scorer.score([t]) for t in texts])
    torch.testing.assert_close(scorer.score(texts), alone, atol=1e-5, rtol=1e-5)
    assert scorer.training


def test_the_library_opens_a_scorer_that_was_saved_here(tmp_path):
    torch.manual_seed(0)
    scorer = Scorer(ScorerConfig(len(VOCAB), dim=16, n_heads=2, positive=1), WordPiece(VOCAB)).eval()
    ppo.save_scorer(scorer, tmp_path)
    library = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer, texts = transformers.AutoTokenizer.from_pretrained(tmp_path), some_texts(random.Random(5), 10, 30)
    with torch.no_grad():
        logits = library(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(scorer.score(texts), logits[:, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(load_scorer(tmp_path).score(texts), scorer.score(texts), atol=0, rtol=0)
    assert library.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


@pytest.mark.parametrize("kind", ["DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"])
def test_an_encoder_goes_under_a_new_head(tmp_path, kind):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=len(VOCAB), dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=128)
    saved = getattr(transformers, kind)(config).eval()
    saved.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    scorer = load_scorer(tmp_path, new_head=True)
    library = transformers.DistilBertForSequenceClassification(config).eval()
    library.distilbert.load_state_dict(getattr(saved, "distilbert", saved).state_dict())
    for name in ("pre_classifier", "classifier"):
        head = getattr(scorer, name)
        assert 0.01 < head.weight.std() < 0.03 and (head.bias == 0).all()
        if hasattr(saved, name):
            assert not torch.equal(head.weight, getattr(saved, name).weight)
        getattr(library, name).load_state_dict(head.state_dict())
    texts = some_texts(random.Random(7), 20, 30)
    with torch.no_grad():
        logits = library(**library_tokenizer(tmp_path / "vocab.txt")(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(scorer.score(texts), logits[:, 1], atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in scorer.parameters())
    edit_config(tmp_path, n_layers=3)
    with pytest.raises(UserError, match="Missing key.*transformer.layer.2"):
        load_scorer(tmp_path, new_head=True)


@pytest.mark.slow
def test_a_real_pretrained_encoder_is_transformers():
    folder = real("minilm/config.json").parent
    texts = ["The acting is superb, but the plot drags.", "Never again!"]
    scorer = load_scorer(folder, new_head=True)
    scorer.pre_classifier, scorer.dropout, scorer.classifier = (torch.nn.Identity() for _ in range(3))      # relu(what the head reads)
    library = transformers.DistilBertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = library(**library_tokenizer(folder / "vocab.txt")(texts, padding=True, return_tensors="pt")).last_hidden_state[:, 0]
        torch.testing.assert_close(scorer(scorer.batch([scorer.tokenizer.encode(text) for text in texts])), hidden.relu(), atol=1e-5, rtol=1e-5)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("labels, message", [
    ({"0": "POSITIVE"}, "is a classifier with 1 labels"), ({"0": "NEGATIVE", "1": "NEUTRAL", "2": "POSITIVE"}, "is a classifier with 3 labels"),
    ({"0": "LABEL_0", "1": "LABEL_1"}, "which of the labels LABEL_0, LABEL_1"), ({"0": "POS", "1": "positive"}, "which of the labels")])
def test_a_scorer_must_have_a_negative_and_a_positive_label(tmp_path, labels, message):
    library_scorer(tmp_path)
    edit_config(tmp_path, id2label=labels)
    with pytest.raises(UserError, match=message):
        load_scorer(tmp_path)


def test_what_is_no_scorer_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="there is no scorer at runs/none. Train one first: python ppo.py --train-reward"):
        load_scorer("runs/none")
    library_scorer(tmp_path / "a")
    for name, changes, message in (("type", {"model_type": "qwen2"}, "describes a qwen2 model"), ("sizes", {"dim": 64}, "are not those of its config.json: size mismatch"),
                                   ("more", {"n_layers": 3}, "Missing key.*transformer.layer.2"), ("few", {"vocab_size": 9}, "do not belong together")):
        library_scorer(tmp_path / name)
        edit_config(tmp_path / name, **changes)
        with pytest.raises(UserError, match=message):
            load_scorer(tmp_path / name)
    (tmp_path / "a/vocab.txt").write_text("good\nbad\n")
    with pytest.raises(UserError, match="no WordPiece vocabulary"):
        load_scorer(tmp_path / "a")
    (tmp_path / "a/vocab.txt").unlink()
    with pytest.raises(UserError, match="vocab.txt is missing"):
        load_scorer(tmp_path / "a")


@pytest.mark.parametrize("lower", [True, False])
def test_the_words_of_a_scorer_may_be_in_tokenizer_json(tmp_path, lower):
    library_scorer(tmp_path)
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    (tmp_path / "vocab.txt").unlink()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    scorer = load_scorer(tmp_path)
    assert all(scorer.tokenizer.ids[piece] == i for piece, i in tokenizer.get_vocab().items()) and scorer.tokenizer.lower == lower
    for text in ("Good FILM, caf\u00e9!", "a bad film"):
        assert scorer.tokenizer.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["type"] = "Unigram"
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="vocab.txt is missing, and no tokenizer.json has its words"):
        load_scorer(tmp_path)


def test_batches_for_a_scorer_read_every_text_once_an_epoch_whole_or_cropped():
    scorer = Scorer(ScorerConfig(100, dim=8, n_heads=1), WordPiece(VOCAB))
    texts = [[10 + k] * random.Random(k).randint(1, 300) for k in range(70)]
    pairs = [(ids, k % 2) for k, ids in enumerate(texts)]
    batches = ppo.TextBatches(scorer, pairs, 8, seed=1)
    lengths = {0: {}, 1: {}}
    for step in range(2 * batches.steps_per_epoch):
        tokens, y = batches.batch(step)
        for row, label in zip(tokens.tolist(), y.tolist()):
            inside = [t for t in row if t][1:-1]
            k = inside[0] - 10
            assert row[0] == 3 and set(inside) == {10 + k} and label == k % 2 and len(inside) <= len(texts[k])
            assert k not in lengths[step // batches.steps_per_epoch]
            lengths[step // batches.steps_per_epoch][k] = len(inside)
    assert all(len(found) == 64 for found in lengths.values())
    both = set(lengths[0]) & set(lengths[1])
    assert all(lengths[k % 2 == 0][k] == len(texts[k]) and lengths[k % 2 == 1][k] <= 60 for k in both)     # whole in one epoch, a crop in the other
    again = ppo.TextBatches(scorer, pairs, 8, seed=1)
    assert torch.equal(again.batch(11)[0], batches.batch(11)[0]) and not torch.equal(ppo.TextBatches(scorer, pairs, 8, seed=2).batch(11)[0], again.batch(11)[0])


# ------------------------------------------------------------------------------------------------ estimators and losses

def random_rows(seed, B=7, T=9):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=rng)
    mask = (torch.arange(T) < lengths[:, None]).double()
    return [torch.randn(B, T, generator=rng, dtype=torch.float64) for _ in range(2)] + [mask, lengths.tolist()]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.0, 0.7)])
def test_gae_equals_its_definition(gamma, lam):
    rewards, values, mask, lengths = random_rows(int(100 * gamma + lam))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        for t in range(len(mask[0])):
            if t >= n:
                assert advantages[b, t] == 0 and returns[b, t] == 0
                continue
            delta = [rewards[b, k] + (gamma * values[b, k + 1] if k + 1 < n else 0) - values[b, k] for k in range(t, n)]
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(delta)).item()
            assert advantages[b, t].item() == pytest.approx(expected) and returns[b, t].item() == pytest.approx(expected + values[b, t].item())
            if lam == 1:                                                    # then it is the return minus the value
                future = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, n)).item()
                assert returns[b, t].item() == pytest.approx(future)


def test_whitening_gives_mean_0_and_variance_1_inside_the_mask():
    x, _, mask, _ = random_rows(3)
    x = 5 * x + 2
    white, inside = whiten(x, mask), x[mask > 0].numpy()
    np.testing.assert_allclose(white[mask > 0].numpy(), (inside - inside.mean()) / inside.std(), rtol=1e-6)
    assert (white[mask == 0] == 0).all()
    assert whiten(torch.ones(2, 3), torch.ones(2, 3)).abs().max() == 0     # nothing to divide by


def test_the_policy_loss_equals_a_loop_and_its_gradient_stops_where_it_is_clipped():
    rng = torch.Generator().manual_seed(0)
    old, advantage = torch.randn(50, generator=rng, dtype=torch.float64), torch.randn(50, generator=rng, dtype=torch.float64)
    new = (old + 0.4 * torch.randn(50, generator=rng, dtype=torch.float64)).requires_grad_()
    loss, clipped, kl = policy_loss(new, old, advantage, 0.2)
    terms, held, divergence = [], [], []
    for n, o, a in zip(new.tolist(), old.tolist(), advantage.tolist()):
        r = math.exp(n - o)
        terms.append(min(r * a, min(max(r, 0.8), 1.2) * a))
        held.append((a > 0 and r > 1.2) or (a < 0 and r < 0.8))
        divergence.append(r - 1 - (n - o))
    assert loss.item() == pytest.approx(-sum(terms) / 50) and clipped.item() == pytest.approx(sum(held) / 50) and 0 < sum(held) < 50
    assert kl.item() == pytest.approx(sum(divergence) / 50)
    loss.backward()
    assert ((new.grad == 0) == torch.tensor(held)).all()


def test_the_value_loss_equals_a_loop():
    rng = torch.Generator().manual_seed(1)
    value, old, returns = (torch.randn(40, generator=rng, dtype=torch.float64) for _ in range(3))
    expected = [0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2) for v, o, r in zip(value.tolist(), old.tolist(), returns.tolist())]
    assert value_loss(value, old, returns, 0.2).item() == pytest.approx(sum(expected) / 40)


def test_shared_repetition_adds_up_to_one_minus_distinct_2():
    assert ppo.shared_repetition([[1, 2, 3], [1, 2, 9], [], [5]]) == [0.25, 0.25, 0, 0]
    rng = random.Random(0)
    texts = [[rng.randrange(6) for _ in range(rng.randint(0, 12))] for _ in range(20)]
    weights = [max(0, len(t) - 1) for t in texts]
    total = sum(w * v for w, v in zip(weights, ppo.shared_repetition(texts))) / sum(weights)
    assert total == pytest.approx(1 - eval.distinct(texts, 2)) and 0.3 < total < 1


@pytest.mark.parametrize("lower", [False, True])
def test_the_options_of_a_wordpiece_tokenizer_are_honoured_and_written(tmp_path, lower):
    library_scorer(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    scorer = load_scorer(tmp_path / "theirs")
    library = transformers.BertTokenizer(vocab=str(tmp_path / "theirs/vocab.txt"), do_lower_case=lower)
    texts = ["The FILM, caf\u00e9 \u4e2d\u4e2d film", "caf\u00e9 cafe Plays not", "\u4e2d a\u4e2db"] + [text for text in random_unicode(200, 3) if all(settled(ord(ch)) for ch in text)]
    agree(scorer.tokenizer, library, texts)
    save_scorer(scorer, tmp_path / "ours")
    agree(load_scorer(tmp_path / "ours").tokenizer, library, texts)


@pytest.mark.parametrize("options", [dict(strip_accents=False), dict(do_lower_case=False, strip_accents=True), dict(tokenize_chinese_chars=False)], ids=str)
def test_options_of_wordpiece_that_are_not_implemented_are_refused(tmp_path, options):
    library_scorer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="strip_accents.* are not implemented"):
        load_scorer(tmp_path)


# ------------------------------------------------------------------------------------------------------- responses

V = 23


class Words:
    """A stand-in for a tokenizer: token k is the word wk."""
    kind, vocab_size, eos = "gpt2", V, 0
    begin, stops, suppressed = [0], [0], []

    def encode(self, text):
        return [int(w[1:]) for w in text.split()]

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)

    def state(self):
        return {"kind": "gpt2"}


class Table:
    """A stand-in for a scorer: the reward of a text is the sum of its words' worths."""

    def __init__(self, worth):
        self.worth = worth

    def score(self, texts):
        return torch.tensor([sum(float(self.worth[int(w[1:])]) for w in text.split()) for text in texts])


def policies():
    torch.manual_seed(0)
    yield Transformer(TransformerConfig(V, 16, 2, 4, 2, 32, 24, dropout=0.5))
    yield RNNLM(RNNConfig(V, 16, 16, 2, dropout=0.5))
    yield LSTMLM(LSTMConfig(V, 16, 16, 1, dropout=0.5))


def settings(folder, **changes):
    base = dict(run=str(folder), lr=1e-3, batch_size=16, minibatch=4, update_epochs=2, steps=4, response_tokens=6, kl_coef=0.1,
                max_update_kl=1e9, warmup_steps=1, eval_every=2, held_out=8, sample=False)
    return ppo.Config(**base | changes)


PROMPTS = [[0, *(1 + (7 * k + j) % (V - 1) for j in range(k % 7))] for k in range(40)]      # 1 to 7 tokens


def task_for(folder, model, worth=None, dtype=torch.float32, prompts=PROMPTS, text=None, **changes):
    scorer = Table(torch.linspace(-1, 1, V) if worth is None else worth)
    splits = {"train": prompts, "valid": prompts[:8], "test": prompts[:8]}
    reference = copy.deepcopy(model).eval()
    reference.product_dtype = dtype
    return ppo.Task(settings(folder, **changes), reference, Words(), scorer, splits, text)


def run_policy(folder, model, worth=None, dtype=torch.float32, prompts=PROMPTS, text=None, **changes):
    """train_policy on these prompts, without a report; -> its last checkpoint and the rows of log.csv."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ppo, "report", lambda *a: None)
        ppo.train_policy(task_for(folder, model, worth, dtype, prompts, text, **changes))
    return torch.load(folder / "last.pt", weights_only=True), list(csv.DictReader(open(folder / "log.csv")))


def moved(model, by):
    for p in model.parameters():
        p.data += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("model", list(policies()), ids=lambda m: type(m).__name__)
def test_sampled_and_recomputed_log_probabilities_agree(model, tmp_path):
    """Unequal prompts, some responses that end early: the first ratio is 1."""
    task = task_for(tmp_path, model.eval())
    r = rollout(task, model, PROMPTS, seed=3)
    there = ppo.evaluate_actions(task, model, r)
    ratio = (there["log_prob"] - r.log_probs).exp()
    assert (ratio - 1).abs().max() < 1e-5
    lengths = r.mask.sum(1)
    assert lengths.min() < 6 and lengths.max() == 6
    for row, prompt in enumerate(PROMPTS):                                  # each row, read alone, says the same
        n, here = int(lengths[row]), r.mask[row] > 0
        answer = r.tokens[row, 1:][here].tolist()
        assert r.tokens[row, :len(prompt) + n].tolist() == prompt + answer and (answer[-1] == 0 or n == 6) and 0 not in answer[:-1]
        assert r.responses[row] == [t for t in answer if t]
        with torch.no_grad():
            log_p = torch.log_softmax(model.logits(model(torch.tensor([prompt + answer]))[0]), -1)[0]
        alone = [log_p[len(prompt) - 1 + k, t].item() for k, t in enumerate(answer)]
        np.testing.assert_allclose(there["log_prob"][row][here].numpy(), alone, atol=2e-5)
    assert (there["log_prob"][r.mask == 0] == 0).all() and there["kl"].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_minibatch_has_ratio_one(tmp_path, dtype, monkeypatch):
    ratios = []
    monkeypatch.setattr(ppo, "policy_loss", lambda new, old, *rest: ratios.append((new - old).exp().detach()) or policy_loss(new, old, *rest))
    model = next(policies()).train()                                        # dropout 0.5, if it were on
    speed_up(model)
    run_policy(tmp_path, model, dtype=dtype, steps=1, seed=2)
    # without a compiler, attention is computed in one way without a gradient, and in another with one: bfloat16 shows that
    same_way = dtype == torch.float32 or isinstance(model.layers[0], FastDecoderLayer)
    assert len(ratios) == 8 and (ratios[0] - 1).abs().max() < (1e-5 if same_way else 0.02)
    assert (ratios[-1] - 1).abs().max() > 1e-3                              # and after updates it has not


def test_divergence_and_entropy_equal_torchs(tmp_path):
    model = next(policies()).eval()
    task = task_for(tmp_path, model)
    moved(model, 0.05)                                                      # away from the reference
    r = rollout(task, model, PROMPTS, seed=3)
    there = ppo.evaluate_actions(task, model, r)
    for row, prompt in enumerate(PROMPTS):
        n, here = int(r.mask[row].sum()), r.mask[row] > 0
        with torch.no_grad():
            hidden = [m(r.tokens[row:row + 1])[0][0, len(prompt) - 1:len(prompt) - 1 + n] for m in (model, task.reference)]
            p, q = (torch.distributions.Categorical(logits=m.logits(h)) for m, h in zip((model, task.reference), hidden))
        np.testing.assert_allclose(there["kl"][row][here], torch.distributions.kl_divergence(p, q), atol=1e-5)
        np.testing.assert_allclose(there["entropy"][row][here], p.entropy(), atol=1e-5)
        np.testing.assert_allclose(there["ref_log_prob"][row][here], q.log_prob(r.tokens[row, 1:][here]), atol=1e-5)
    assert there["kl"].min() > -1e-6 and there["kl"].sum(1).mean() > 0.1


def test_values_are_linear_in_the_hidden_state(tmp_path):
    model, head = next(policies()).eval(), torch.nn.Linear(32, 1)
    task = task_for(tmp_path, model)
    r = rollout(task, model, PROMPTS, seed=3)
    values = ppo.evaluate_actions(task, model, r, head)["value"]
    for row, prompt in enumerate(PROMPTS):
        n = int(r.mask[row].sum())
        with torch.no_grad():
            expected = head(model(r.tokens[row:row + 1])[0][0, len(prompt) - 1:len(prompt) - 1 + n])[:, 0]
        np.testing.assert_allclose(values[row][r.mask[row] > 0], expected, atol=1e-5)
    assert (values[r.mask == 0] == 0).all()


def test_the_sampled_estimate_of_the_divergence_is_unbiased_and_not_negative(tmp_path):
    model = next(policies()).eval()
    task = task_for(tmp_path, model, minibatch=500)
    moved(model, 0.02)
    r = rollout(task, model, PROMPTS * 50, seed=5)
    there = ppo.evaluate_actions(task, model, r)
    estimate, full = (there["log_prob"] - there["ref_log_prob"]).sum(1), there["kl"].sum(1)
    error = (estimate - full).std() / len(full) ** 0.5
    assert (estimate - full).mean().abs() < 3 * error and estimate.mean() > 0 and error < 0.2 * full.mean()


def test_ids_that_are_no_words_are_never_drawn_and_count_nothing(tmp_path, monkeypatch):
    suppressed = [3, 9, 22]
    monkeypatch.setattr(Words, "suppressed", suppressed)
    model = next(policies()).eval()
    task = task_for(tmp_path, model, minibatch=500)
    r = rollout(task, model, PROMPTS * 10, seed=1)
    assert not torch.isin(r.tokens[:, 1:][r.mask > 0], torch.tensor(suppressed)).any()
    there = ppo.evaluate_actions(task, model, r)
    assert ((there["log_prob"] - r.log_probs).exp() - 1).abs().max() < 1e-5 and there["kl"].abs().max() < 1e-6 and there["entropy"].max() <= math.log(V - 3) + 1e-5


def test_prompts_are_a_permutation_every_epoch():
    prompts = [[k] for k in range(10)]
    epochs = [sum((prompt_batch(prompts, 3, 1, 3 * e + k) for k in range(3)), []) for e in range(2)]
    assert all(len({p[0] for p in epoch}) == 9 for epoch in epochs) and epochs[0] != epochs[1]
    assert prompt_batch(prompts, 3, 1, 4) == prompt_batch(prompts, 3, 1, 4) != prompt_batch(prompts, 3, 2, 4)


def test_prompts_are_the_first_two_to_eight_tokens_of_reviews():
    tokenizer = data.build_word_tokenizer("reviews")
    prompts = ppo.read_prompts("reviews", "test", tokenizer)
    assert len(prompts) > 400 and {len(p) for p in prompts} == set(range(3, 10))
    for prompt, (text, _) in zip(prompts, data.labelled("reviews", "test")):
        assert prompt[0] == tokenizer.eos and prompt[1:] == tokenizer.encode(text)[:len(prompt) - 1]


# --------------------------------------------------------------------------------------------------------- learning

@pytest.mark.parametrize("coef", [0.25, 0.5, 1.5])
def test_one_token_policies_reach_the_optimum_in_closed_form(tmp_path, coef):
    """One state, one action: the best policy for reward - coef * KL is ref * exp(reward / coef), normalised."""
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(V, 16, 1, 2, 2, 16, 8))
    worth = torch.randn(V, generator=torch.Generator().manual_seed(2))

    def log_p():
        with torch.no_grad():
            return torch.log_softmax(model.logits(model(torch.tensor([[0]]))[0][0, 0]), -1).double()
    log_ref = log_p()
    last, _ = run_policy(tmp_path, model, worth, prompts=[[0]] * 512, batch_size=512, minibatch=512, update_epochs=2, steps=150, response_tokens=1, lr=0.01,
                         kl_coef=coef, whiten=False, eval_every=1000, value_coef=1.0)
    model.load_state_dict(last["model"])
    log_pi, worth = log_p(), worth.double()
    worth[0] = 0                                                            # the end token is an empty text
    optimum = torch.log_softmax(log_ref + worth / coef, -1)
    (got_reward, got_kl), (best_reward, best_kl) = [((p.exp() * worth).sum().item(), (p.exp() * (p - log_ref)).sum().item()) for p in (log_pi, optimum)]
    assert got_reward == pytest.approx(best_reward, rel=0.05) and got_kl == pytest.approx(best_kl, rel=0.05)
    assert best_kl > 0.1 and best_reward > 0.2


@pytest.mark.parametrize("target, factor", [(1e-6, 1.2), (1e6, 0.98)])
def test_the_coefficient_adapts_towards_the_target(tmp_path, target, factor):
    last, _ = run_policy(tmp_path, next(policies()), kl_target=target, kl_coef=0.3, lr=1e-2, steps=2)
    assert last["kl_coef"] == pytest.approx(0.3 * 0.98 * factor)            # before the first update KL is 0: below any target


def test_one_response_an_iteration_logs_numbers(tmp_path):
    _, log = run_policy(tmp_path, next(policies()), batch_size=1, minibatch=1, response_tokens=1, held_out=2)
    assert len(log) > 4 and not any(value in ("nan", "inf") for row in log for value in row.values())
    assert "NaN" not in (tmp_path / "result.json").read_text()


def test_an_iteration_ends_when_the_policy_has_moved_too_far(tmp_path):
    _, log = run_policy(tmp_path, next(policies()), max_update_kl=1e-4, lr=0.1, steps=1)
    assert 1 <= int(log[1]["updates"]) < 8


def test_rewards_stand_on_the_last_token_and_the_penalty_on_every_one(tmp_path, monkeypatch):
    """In the third iteration, when the policy has left the reference."""
    seen = {}

    def record(name, function):
        def recorded(*args, **kwargs):
            seen[name, "args"] = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            seen[name] = function(*args, **kwargs)
            return seen[name]
        monkeypatch.setattr(ppo, name, recorded)
    record("gae", gae)
    original = ppo.evaluate_actions
    monkeypatch.setattr(ppo, "evaluate_actions", lambda task, model, r, head=None: [
        out := original(task, model, r, head), head and seen.update(old=dict(out), r=r, task=task)][0])
    run_policy(tmp_path, next(policies()), kl_coef=0.3, repetition_coef=2.0, lr=1e-2, steps=3, eval_every=10)
    r, old, rewards = seen["r"], seen["old"], seen["gae", "args"][0]
    worth, _ = ppo.score_responses(seen["task"], r)
    repeated = ppo.shared_repetition(r.responses)
    assert max(repeated) > 0 and (old["log_prob"] - old["ref_log_prob"]).abs().max() > 0.01
    for row in range(len(r.responses)):
        here = r.mask[row] > 0
        expected = (-0.3 * (old["log_prob"] - old["ref_log_prob"]))[row][here].tolist()
        expected[-1] += worth[row].item() - 2.0 * repeated[row]
        np.testing.assert_allclose(rewards[row][here], expected, atol=1e-4)


def test_supervised_steps_have_the_gradient_of_the_text(tmp_path):
    """One minibatch an iteration: one step of plain descent down the cross-entropy of a batch of the text."""
    model = next(policies()).eval()
    text = data.WindowBatches(np.random.default_rng(0).integers(1, V, 600), 4, 14, 1)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    task = task_for(tmp_path, model, text=text, minibatch=16, grad_clip=1e9)
    [metrics] = ppo.supervised_steps(task, after, torch.optim.SGD(after.parameters(), 1.0), 3)
    x, y = text.batch(3)                                        # one batch after the other
    expected = F.cross_entropy(before.logits(before(x)[0]).flatten(0, 1), y.flatten())
    assert expected.item() == pytest.approx(metrics["sft_loss"], rel=1e-5)
    expected.backward()
    for p, q in zip(before.parameters(), after.parameters()):
        torch.testing.assert_close(p.data - p.grad, q.data, atol=1e-6, rtol=1e-4)


def test_supervised_steps_learn_the_text(tmp_path):
    text = data.WindowBatches(np.tile(np.arange(1, V), 40), 4, 14, 1)       # one word always follows the other
    _, log = run_policy(tmp_path, next(policies()), text=text, sft_every=1, lr=1e-2, steps=6)
    assert float(log[-1]["sft_loss"]) < float(log[1]["sft_loss"]) - 0.5


def test_supervised_iterations_alternate(tmp_path):
    text = data.WindowBatches(np.random.default_rng(0).integers(1, V, 600), 4, 14, 1)
    _, log = run_policy(tmp_path, next(policies()), text=text, sft_every=2)
    assert [int(row["updates"]) for row in log[1:]] == [8, 12, 8, 12]


def test_a_reward_that_is_not_a_number_ends_the_run_in_a_line(tmp_path):
    worth = torch.linspace(-1, 1, V)
    worth[5] = math.nan
    with pytest.raises(UserError, match="a reward that is not a number"):
        run_policy(tmp_path, next(policies()), worth)
    assert not (tmp_path / "last.pt").exists()


def test_only_empty_responses_end_the_run_in_a_line_but_single_ones_do_not(tmp_path):
    task = task_for(tmp_path, next(policies()))
    assert ppo.score_responses(task, ppo.Rollout([[0, 1], [0, 2]], [[], [4]], None, None, None))[0].shape == (2,)
    assert ppo.score_responses(task, ppo.Rollout([[0, 1]], [[]], None, None, None))[0].shape == (1,)      # the last prompt of an evaluation
    model = list(policies())[1]
    with torch.no_grad():                                                   # its responses end before they begin
        for p in model.lm_head.parameters():
            p.zero_()
        model.lm_head.bias[0] = 1e4
    with pytest.raises(UserError, match="every response is empty"):
        run_policy(tmp_path, model)


@pytest.mark.parametrize("settings, scores, best, best_step", [
    (dict(kl_coef=0.5), [(1.0, 0.0), (2.0, 3.0), (2.0, 1.0), (9.0, 20.0)], 1.5, 3),
    (dict(kl_coef=0.5, repetition_coef=2.0), [(1.0, 0.0, 0.1), (2.0, 0.0, 0.9), (1.5, 0.0, 0.3), (0.0, 0.0, 0.0)], 0.9, 3),
    # an adapted coefficient grows from 0.441 to 0.529; all policies are measured at the one that was given
    (dict(kl_coef=0.45, kl_target=1e-6), [(3.0, 2.0), (2.0, 0.0), (0.0, 0.0), (0.0, 0.0)], 2.1, 1)])
def test_best_is_the_highest_reward_minus_the_price_of_the_divergence(tmp_path, monkeypatch, settings, scores, best, best_step):
    sequence = iter([(0.0, 0.0), (50.0, 0.0), *scores, (0.0, 0.0)])         # before; step 0, which is no trained policy; after
    monkeypatch.setattr(ppo, "evaluate_policy", lambda *a: dict.fromkeys(ppo.EVALUATED, 1.0) | {"each": []} | dict(zip(("reward", "kl", "repetition"), next(sequence))))
    last, _ = run_policy(tmp_path, next(policies()), eval_every=1, lr=1e-2, **settings)
    assert last["run"]["best"] == pytest.approx(-best) and last["run"]["best_step"] == best_step
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == best_step


def test_the_worst_outputs_are_liked_and_bad():
    each = [{"reward": r, "repetition": b} for r, b in ((1, 0), (5, 0), (5, 0.9), (0, 0.9), (4, 0.5), (-3, 0))]
    assert ppo.reward_hacking_examples(each, lambda r: r["repetition"], 2) == [each[2], each[4]]


# ------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small policy on reviews and a scorer that was trained for a few steps, in one folder."""
    folder = tmp_path_factory.mktemp("ppo")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        train.main(["--model", "transformer", "--data", "reviews", "--n-embd", "32", "--n-layer", "2", "--n-head", "2", "--block-size", "64", "--steps", "150",
                    "--run", "base"])
        ppo.main(["--train-reward", "--data", "reviews", "--epochs", "0.1", "--run", "scorer"])
    return folder


QUICK = ["--steps", "4", "--batch-size", "16", "--minibatch", "8", "--update-epochs", "2", "--response-tokens", "8", "--held-out", "12", "--eval-every", "2",
         "--dtype", "float32", "--base", "base", "--scorer", "scorer"]


@pytest.fixture
def there(trained, tmp_path, monkeypatch):
    for name in ("base", "scorer"):
        (tmp_path / name).symlink_to(trained / name)
    monkeypatch.chdir(tmp_path)


def test_a_policy_resumes_in_another_dtype(there):
    ppo.main([*QUICK, "--run", "out"])
    ppo.main(["--resume", "--run", "out", "--steps", "6", "--dtype", "bfloat16"])
    assert json.loads(Path("out/result.json").read_text())["steps"] == 6


def test_a_scorer_of_ones_own_learns_to_tell_reviews_apart(trained):
    result = json.load(open(trained / "scorer/result.json"))
    assert result["accuracy"] > 0.8 and result["accuracy_first_32"] > 0.7 and result["held_out"] == 500
    scorer, texts = load_scorer(trained / "scorer"), data.labelled("reviews", "test")
    scores, labels = scorer.score([text for text, _ in texts]), torch.tensor([label for _, label in texts])
    assert scores[labels == 1].mean() > scores[labels == 0].mean() + 1
    assert not list((trained / "scorer").glob("*.pt"))
    assert transformers.AutoModelForSequenceClassification.from_pretrained(trained / "scorer").num_labels == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scorer_from_a_pretrained_encoder(trained, tmp_path, monkeypatch, dtype):
    """An encoder that tells reviews apart already, under a new head: a tenth of an epoch with the defaults for encoders."""
    monkeypatch.chdir(tmp_path)
    ppo.main(["--train-reward", "--data", "reviews", "--encoder", str(trained / "scorer"), "--epochs", "0.1", "--run", "out", "--dtype", dtype])
    result, scorer, encoder = json.load(open("out/result.json")), load_scorer("out"), load_scorer(trained / "scorer")
    assert result["options"]["lr"] < 1e-3 and result["accuracy"] > 0.8
    assert scorer.tokenizer.vocab == encoder.tokenizer.vocab and scorer.config == encoder.config
    moved = (scorer.embeddings.word_embeddings.weight - encoder.embeddings.word_embeddings.weight).abs().max()
    assert 0 < moved < 0.01 and transformers.AutoModelForSequenceClassification.from_pretrained("out").num_labels == 2


def test_a_whole_run_writes_its_report(there, capsys):
    ppo.main([*QUICK, "--run", "out", "--steps", "10", "--lr", "1e-3", "--repetition-coef", "0.5", "--sft-every", "3", "--kl-target", "5"])
    result, report = json.load(open("out/result.json")), Path("out/report.md").read_text()
    assert result["steps"] == 10 and len(result["before"]["each"]) == len(result["after"]["each"]) == 12
    before, after = result["before"], result["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-5) and after["kl"] >= 0
    assert before["reward"] == pytest.approx(np.mean([r["reward"] for r in before["each"]]))
    assert result["rise"] == pytest.approx((after["reward"] - before["reward"]) / before["reward_std"])
    assert [r["prompt"] for r in before["each"]] == [r["prompt"] for r in after["each"]]
    assert all(word in report for word in ("Figure 5", "Table 7", "Table 8", "sft-every 3", "rewards.png")) and Path("out/rewards.png").exists()
    rows = list(csv.DictReader(open("out/log.csv")))
    assert len(rows) == 11 and rows[0]["eval_reward"] and all(row["kl_estimate"] for row in rows[1:])
    assert float(rows[1]["kl"]) == pytest.approx(0, abs=1e-4) and float(rows[3]["sft_loss"]) > 0
    model, tokenizer, _ = sample.load_run("out")                             # an ordinary run
    assert tokenizer.vocab_size == model.config.vocab_size
    capsys.readouterr()
    eval.main(["--runs", "out", "base", "--domains", "stories", "--sentences", "3", "--out", "report"])
    assert "out  reward" in capsys.readouterr().out.replace("run ", "") and "Policies trained by PPO" in Path("report/report.md").read_text()


def test_a_run_that_was_killed_goes_on_bit_for_bit(there, monkeypatch):
    command = [*QUICK, "--sft-every", "2", "--kl-target", "1", "--lr", "1e-3"]
    ppo.main([*command, "--run", "whole"])
    with monkeypatch.context() as m:
        original, calls = ppo.gae, []

        def dies(*args):
            calls.append(1)
            if len(calls) == 4:
                raise MemoryError("killed")
            return original(*args)
        m.setattr(ppo, "gae", dies)
        with pytest.raises(MemoryError):
            ppo.main([*command, "--run", "killed"])
    ppo.main(["--resume", "--run", "killed"])
    a, b = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "killed"))
    assert a["kl_coef"] == b["kl_coef"] != 0.2 and a["run"]["best"] == b["run"]["best"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert torch.equal(a["value_head"]["weight"], b["value_head"]["weight"]) and a["value_head"]["weight"].abs().max() > 0
    log = lambda run: [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(open(f"{run}/log.csv"))]
    assert log("whole") == log("killed")
    strip = lambda run: {k: v for k, v in json.load(open(f"{run}/result.json")).items() if k not in ("seconds", "options")}
    assert strip("whole") == strip("killed")


def test_a_policy_is_trained_further_and_epochs_are_no_length_of_it(there):
    ppo.main([*QUICK, "--run", "out"])
    steps = json.load(open("out/result.json"))["steps"]
    ppo.main(["--resume", "--run", "out", "--steps", str(steps + 2)])
    assert json.load(open("out/result.json"))["steps"] == steps + 2
    assert [int(row["step"]) for row in csv.DictReader(open("out/log.csv"))][-1] == steps + 2
    with pytest.raises(UserError, match="was started with update_epochs"):
        ppo.main(["--resume", "--run", "out", "--update-epochs", "9"])


@pytest.mark.parametrize("encoder", [False, True])
def test_a_scorers_training_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)
    command = ["--train-reward", "--data", "reviews", "--epochs", "0.04", "--eval-every", "4", "--dtype", "float32"]
    if encoder:
        library_scorer(tmp_path / "encoder", max_position_embeddings=200)
        command += ["--encoder", "encoder", "--lr", "1e-3"]
    ppo.main([*command, "--run", "whole"])
    with monkeypatch.context() as m:
        original, steps = torch.optim.AdamW.step, []

        def dies(self, *args):
            steps.append(1)
            if len(steps) == 8:
                raise MemoryError("killed")
            return original(self, *args)
        m.setattr(torch.optim.AdamW, "step", dies)
        with pytest.raises(MemoryError):
            ppo.main([*command, "--run", "killed"])
    if encoder:
        (tmp_path / "encoder").rename(tmp_path / "elsewhere")               # the checkpoint has all of it
    ppo.main(["--train-reward", "--resume", "--run", "killed"])
    a, b = (load_scorer(run).state_dict() for run in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.load(open("whole/result.json"))["accuracy"] == json.load(open("killed/result.json"))["accuracy"]


def test_a_stopped_training_resumes_as_if_it_had_not_been(there):
    """Of a policy: in an iteration, which is completed, also in one whose end is an evaluation; of a scorer."""
    stops_and_resumes(ppo.main, [*QUICK, "--kl-target", "1", "--lr", "1e-3"], [], (1, 6, 16), torch.optim.Adam)
    shutil.rmtree("whole")
    options = ["--train-reward", "--data", "reviews", "--epochs", "0.04", "--eval-every", "4", "--log-every", "3", "--dtype", "float32"]
    stops_and_resumes(ppo.main, options, ["--train-reward"], (2, 8), name="SIGHUP")


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing_of_a_policy(there):
    survives_kills("ppo.py", [*QUICK, "--steps", "24", "--sft-every", "2", "--kl-target", "1", "--lr", "1e-3"], [])


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing_of_a_scorer(tmp_path, monkeypatch):
    """Its checkpoints are removed when it is complete, so it must not be complete before the last kill."""
    monkeypatch.chdir(tmp_path)
    survives_kills("ppo.py", ["--train-reward", "--data", "reviews", "--epochs", "0.15", "--eval-every", "2", "--dtype", "float32"],
                   ["--train-reward"])


def test_what_does_not_go_together_is_said_in_a_line(there, tmp_path, monkeypatch):
    def refused(message, *command):
        with pytest.raises(UserError, match=message):
            ppo.main([*QUICK, "--run", "out", *command])
        assert not Path("out/last.pt").exists()
    refused("do not fit the base's context of 64", "--response-tokens", "60")
    with monkeypatch.context() as m:
        m.setattr(data, "WORLD", 2)
        refused("start it without torchrun")
    refused("cannot be cut into minibatches of 5", "--minibatch", "5")
    refused("there is no run at nowhere", "--base", "nowhere")
    refused("there is no scorer at runs/nowhere. Train one first", "--scorer", "runs/nowhere")
    refused("there is no scorer at base", "--scorer", "base")
    refused("model_type", "--base", "scorer")
    library_scorer(tmp_path / "foreign")
    (tmp_path / "foreign/vocab.txt").write_text("\n".join(w if k < 6 else f"word{k}" for k, w in enumerate(VOCAB)) + "\n")
    refused("do not fit: the scorer does not know", "--scorer", "foreign")
    for wrong in (["--kl-coef", "-1"], ["--gamma", "2"], ["--update-epochs", "1.5"], ["--steps", "0"], ["--held-out", "0"]):
        refused(wrong[0], *wrong)
    refused("prompts are too few", "--batch-size", "20000", "--minibatch", "20000")
    ppo.main([*QUICK, "--run", "out"])
    with pytest.raises(UserError, match="already holds a run"):
        ppo.main([*QUICK, "--run", "out"])
    with pytest.raises(UserError, match="was started with kl_coef"):
        ppo.main(["--resume", "--run", "out", "--kl-coef", "1"])
    with pytest.raises(UserError, match="is not a run of python ppo.py"):
        ppo.main(["--resume", "--run", "base"])
    with pytest.raises(UserError, match="is not a run of python finetune.py"):
        finetune.main(["--resume", "--run", "out"])
    with pytest.raises(UserError, match="is not a run of python train.py"):
        train.main(["--resume", "--run", "out"])
    with pytest.raises(UserError, match="unrecognized arguments: --kl-coef"):
        ppo.main(["--train-reward", "--kl-coef", "1"])
    with pytest.raises(UserError, match="--seed must be at least 0 and below"):
        ppo.main(["--seed", str(2 ** 70)])
    with pytest.raises(UserError, match="--batch-size 32 cannot be cut into 5 equal micro-batches"):
        ppo.main(["--train-reward", "--data", "reviews", "--accumulate", "5", "--run", "other"])
    with pytest.raises(UserError, match="already holds a run or weights"):
        ppo.main(["--train-reward", "--data", "reviews", "--run", "scorer"])


def test_other_weights_than_at_the_start_are_noticed(there, tmp_path, trained):
    ppo.main([*QUICK, "--run", "out"])
    (tmp_path / "scorer").unlink()
    ppo.main(["--train-reward", "--data", "reviews", "--epochs", "0.02", "--run", "scorer"])
    with pytest.raises(UserError, match="no longer holds the weights"):
        ppo.main(["--resume", "--run", "out"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_qwen2_trained_by_ppo_opens_in_transformers(there, tmp_path, dtype, monkeypatch):
    library_model(vocab_size=300, initializer_range=0.1).save_pretrained(tmp_path / "hub")
    write_tokenizer(tmp_path / "hub")
    monkeypatch.setattr(ppo, "check_fit", lambda *a: None)                  # the prompts are gibberish to it
    ppo.main([*QUICK, "--base", "hub", "--data", "reviews", "--run", "out", "--lr", "1e-3", "--dtype", dtype])
    model, tokenizer, _ = sample.load_run("out")
    library = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    ids = tokenizer.encode("the film is good")
    with torch.no_grad():
        torch.testing.assert_close(model.float().logits(model(torch.tensor([ids]))[0]), library(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4)
    assert json.load(open("out/result.json"))["after"]["each"][0]["prompt"] == ppo.NAMED[0]
