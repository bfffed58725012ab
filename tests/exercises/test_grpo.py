"""Eight responses to each prompt, each measured against their mean; no value head is needed."""

import pytest
import torch

import ppo
from transformer import Transformer, TransformerConfig


class Words:
    """Token k is the word wk."""
    kind, vocab_size, eos, unk = "gpt2", 23, 0, None
    begin, stops, suppressed = [0], [0], []

    def encode(self, text):
        return [int(w[1:]) for w in text.split()]

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)

    def state(self):
        return {"kind": "gpt2"}


class Scorer:
    """Likes words of a high number."""

    def score(self, texts):
        return torch.tensor([sum(float(w[1:]) for w in text.split()) / 100 for text in texts])


def test_responses_come_in_groups_of_eight_and_advantages_sum_to_zero_in_each(tmp_path):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(23, 16, 1, 2, 2, 16, 24))
    config = ppo.Config(run=str(tmp_path), lr=1e-3, batch_size=32, minibatch=8, update_epochs=1, steps=2, response_tokens=6, kl_coef=0.1,
                        eval_every=2, held_out=4, value_coef=0.0, sample=False, whiten=False)
    prompts, seen = [[0, 1 + k % 22] for k in range(64)], {}
    rollout, update = ppo.rollout, ppo.update_policy

    def rolled(task, policy, texts, seed=None):
        if seed is None:                                            # not an evaluation
            seen["prompts"] = [tuple(text) for text in texts]
        return rollout(task, policy, texts, seed)

    def updated(task, policy, value_head, optimizer, r, old, *rest):
        seen["advantages"], seen["mask"] = old["advantages"].clone(), r.mask.clone()
        return update(task, policy, value_head, optimizer, r, old, *rest)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ppo, "rollout", rolled)
        m.setattr(ppo, "update_policy", updated)
        m.setattr(ppo, "report", lambda *a: None)
        splits = {split: prompts for split in ("train", "valid", "test")}
        ppo.train_policy(ppo.Task(config, model, Words(), Scorer(), splits))
    groups = [seen["prompts"][k:k + 8] for k in range(0, 32, 8)]
    assert all(len(set(group)) == 1 for group in groups) and len(set(seen["prompts"])) > 1
    one_each = (seen["advantages"] * seen["mask"]).sum(1) / seen["mask"].sum(1)         # the same for all tokens of a response
    assert ((seen["advantages"] - one_each[:, None]) * seen["mask"]).abs().max() < 1e-5
    assert one_each.view(4, 8).mean(1).abs().max() < 1e-5 and one_each.abs().max() > 0.1
