"""Reinforcement learning from a sentiment scorer: a reward model by hand, and PPO on a language model.

    python train.py --model transformer --data reviews                  # a policy to begin with
    python ppo.py --train-reward --data reviews                         # a scorer, from scratch
    python ppo.py --train-reward --data imdb --encoder distilbert-base-uncased      # from an encoder, 0.3 GB
    python ppo.py --base runs/transformer-reviews --scorer runs/scorer-reviews
    python ppo.py --base Qwen/Qwen2-0.5B --scorer lvwerra/distilbert-imdb --run runs/ppo-qwen2      # 1.3 GB
    python ppo.py --resume --run runs/ppo-transformer-reviews           # after a kill

**The reward model** is DistilBERT with a classification head: a small one trained from scratch, or a
pretrained one. (transformer.py has its equations, and qwen_load.py its tokenizer.) The reward of a text is
the logit of the positive class. The probability would not do: it is soon nearly 1 for every text, and then
hardly rewards a better one.

**PPO**, proximal policy optimization (Schulman et al. 2017; for language models Ziegler et al. 2019). There
are three models: the *reference* is the trained model, and stays as it is; the *policy* pi begins as its
copy, and is trained; pi_old is the policy at the beginning of an iteration. In an iteration pi_old continues
a batch of prompts. Token t of a response is an action a_t in the state s_t, which is all tokens before it.

    r_t = -beta (log pi(a_t|s_t) - log ref(a_t|s_t)), and at the last token also the scorer's reward
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
    A_t = delta_t + gamma lambda A_{t+1},  R_t = A_t + V_old(s_t)           (GAE, Schulman et al. 2016)
    ratio_t = pi(a_t|s_t) / pi_old(a_t|s_t)
    policy loss = -mean min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)
    value loss = mean max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2

beta is --kl-coef, eps --clip-coef, lambda --gae-lambda.

V(s) predicts the sum of the rewards to come. It is a linear function of the model's hidden state. The
advantage A_t says how much better than this prediction the response went. To subtract V does not change the
expected gradient, and makes it less noisy. With lambda = 1, A_t is the sum of the rewards to come minus
V(s_t), which is unbiased and noisy. With lambda = 0 it is delta_t, which has little noise, and V's errors.

The responses of an iteration serve several updates. After the first one, pi is no longer the policy that drew
them, and the ratio corrects for that. Where the ratio is 1, the gradient is that of A_t log pi (REINFORCE,
Williams 1992). But a response says little about a policy that is far from pi_old. So clipping takes away what
is gained by moving the probability of a token by more than the share eps. The minimum keeps the gradient
where a token has moved in the wrong direction.

The part -beta (...) of the reward is the price of KL, the Kullback-Leibler divergence from the reference.
Without it the policy answers every prompt with the sentence that the scorer likes best. With it the optimum
is ref(text) exp(reward / beta), normalised. log.csv has two estimates of the KL: the mean of log pi - log ref
over the sampled tokens, which is noisy; and in full, the sum over all tokens of pi log(pi / ref) at every
prefix that was sampled.

Where to find what:
    an iteration                        iterate, stages 7.1 to 7.6
    a_t                                 rollout (sample.generate_stream)
    log pi_old, log ref, V, full KL     evaluate_actions
    r_t                                 iterate, stage 7.4
    delta_t, A_t, R_t                   gae; whiten
    policy loss, value loss             policy_loss, value_loss; their step: update_policy
    log pi and its gradient             rnn.softmax_loss
    the reward model's training         train_reward

A comment that begins with "Detail" marks a line that follows one of the published details (Huang et al. 2023,
"The N Implementation Details of RLHF with PPO"), or departs from it.

A policy learns to please its scorer with degenerate texts. There are three repairs: the KL coefficient and
the learning rate; --repetition-coef, which subtracts 1 - distinct-2 of the batch from the reward, divided
among the responses by how much each repeats; and --sft-every, supervised training on real text after some
iterations.
"""
import copy
import math
import random
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError, option, read_json, save_json
from eval import COLOURS, distinct, draw, markdown_table, read_log, save_figure, write_report
from fast.layer import speed_up
from fast.products import keep_memory
from finetune import by_base, is_embedded
from qwen_load import build_wordpiece, load_scorer, save_model, save_scorer
from rnn import row_chunks, softmax_loss
from sample import (autocast, context_length, count_parameters, device_of, encode_prompt, generate_stream,
                    load_run, pick_device, pick_dtype, read_checkpoint, tokenizer_from)
from train import (NotFinite, Run, RunOptions, check_rows, claim_folder, clip_grad_norm, get_lr, how_computed,
                   load_optimizer, perplexity_of, resume_or_refuse, set_lr, step_seed, train)
from transformer import Scorer, ScorerConfig

REVIEWS = list(data.LABELLED)

# "qwen2": for a pretrained base (searched on SmolLM2-135M; an update of all its weights is dear, so it reads
# many responses); "own": for a run of train.py
DEFAULTS = {"qwen2": dict(steps=20, lr=5e-5, batch_size=256, minibatch=64, update_epochs=2, kl_coef=0.05),
            "own": dict(steps=100, lr=1e-4, batch_size=64, minibatch=16, update_epochs=4, kl_coef=0.2)}


@dataclass
class Config(RunOptions):
    """Reinforcement learning from a sentiment scorer: PPO on a language model.
    (--train-reward trains a scorer instead: python ppo.py --train-reward --help.)"""
    script = "python ppo.py"
    train_reward: bool = option(False, "train a scorer instead; it has options of its own")
    base: str = option("Qwen/Qwen2-0.5B", "the policy to begin with: a run, or Qwen2's weights (1 GB)")
    scorer: str = option("lvwerra/distilbert-imdb", "a folder that --train-reward wrote, or a DistilBERT "
                                                    "(0.3 GB)")
    data: str = option(None, "reviews, whose beginnings are the prompts (default: reviews for an embedded "
                             "language, else imdb)", choices=REVIEWS)
    held_out: int = option(256, "prompts that the policy is evaluated on", at_least=2)
    sample: bool = option(True, "print a response at every evaluation")
    log_every: int = option(1, "iterations between rows of log.csv")
    eval_every: int = option(None, "iterations between evaluations (default: a 10th of the run, at least 5)")
    steps: int = option(None, f"iterations {by_base(DEFAULTS, 'steps')}", group="PPO")
    lr: float = option(None, f"highest learning rate {by_base(DEFAULTS, 'lr')}")
    warmup_steps: int = option(5, "iterations of linear warm-up", at_least=0)
    batch_size: int = option(None, f"responses of an iteration {by_base(DEFAULTS, 'batch_size')}")
    minibatch: int = option(None, f"responses of an update {by_base(DEFAULTS, 'minibatch')}")
    update_epochs: int = option(None, f"updates for each response {by_base(DEFAULTS, 'update_epochs')}")
    response_tokens: int = option(24, "longest response")
    kl_coef: float = option(None, f"price of a nat of KL to the reference {by_base(DEFAULTS, 'kl_coef')}",
                            at_least=0)
    kl_target: float = option(0.0, "adapt the coefficient to this KL, in nats a response; 0: fixed",
                              at_least=0)
    max_update_kl: float = option(0.1, "end the updates of an iteration at this KL, in nats a token")
    clip_coef: float = option(0.2, "clip the ratio, and the values, to within this")
    value_coef: float = option(0.1, "weight of the value loss", at_least=0)
    gamma: float = option(1.0, "discount", at_least=0, at_most=1)
    gae_lambda: float = option(0.95, "GAE's lambda", at_least=0, at_most=1)
    whiten: bool = option(True, "advantages with mean 0 and variance 1")
    repetition_coef: float = option(0.0, "price of a response that only repeats bigrams",
                                    at_least=0, group="against degenerate texts")
    sft_every: int = option(0, "after every Nth iteration, train on the text of --data; 0: never", at_least=0)


# ------------------------------------------------------------------------------------- advantages and losses

def gae(rewards, values, mask, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016). All arguments are [B, T]. mask is 1 on the
    response, which is contiguous in each row. -> advantages and returns (advantages + values), 0 outside the
    mask."""
    advantages, last_gae, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]           # better than expected at t
        last_gae = (delta + gamma * gae_lambda * last_gae) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = last_gae
    return advantages, (advantages + values) * mask


def whiten(x, mask):
    """x with mean 0 and variance 1 over the mask; 0 outside."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = ((x - mean) ** 2 * mask).sum() / n
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(log_prob, old_log_prob, advantage, clip_coef):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), a mean over tokens. All arguments are [N]. ->
    (loss, the share of tokens at which clipping limits the policy, an estimate of KL(old, new) a token)."""
    logratio = log_prob - old_log_prob
    ratio = logratio.exp()
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    with torch.no_grad():
        clipfrac = (clipped < unclipped).float().mean()
        approx_kl = (ratio - 1 - logratio).mean()                   # "k3", r - 1 - log r: never negative
    return -torch.minimum(unclipped, clipped).mean(), clipfrac, approx_kl


def value_loss(value, old_value, returns, clip_coef):
    """Half the mean squared error of the values, clipped. The error is computed for the new value, and for
    the new value limited to the old one +- clip_coef, and the larger one counts. All arguments are [N].
    Detail: as published, the limit is the ratio's, although values are in units of the reward."""
    near = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.maximum((value - returns) ** 2, (near - returns) ** 2).mean()


def shared_repetition(texts):
    """The share of repeated bigrams in each response (a list of ids), counted over the whole batch: a bigram
    that occurs n times in the batch counts 1 - 1/n. The mean over all bigrams is 1 - distinct-2 of the batch.
    """
    counts = Counter(pair for ids in texts for pair in zip(ids, ids[1:]))
    return [sum(1 - 1 / counts[pair] for pair in zip(ids, ids[1:])) / max(1, len(ids) - 1) for ids in texts]


# ------------------------------------------------------------------------------------- prompts and responses

def prompt_batch(prompts, batch_size, seed, step):
    """The prompts of an iteration. Their order is random, each comes once an epoch, and the draw depends on
    (seed, step) only."""
    epoch, k = divmod(step, len(prompts) // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(len(prompts))
    return [prompts[i] for i in order[k * batch_size:(k + 1) * batch_size]]


def read_prompts(name, split, tokenizer, most=10_000):
    """The first 2 to 8 tokens of the reviews of a split, after the tokens with which every text begins: lists
    of ids. Detail: a prompt need not end with a full stop, as in the experiment that is reproduced."""
    rng, prompts = random.Random(f"{name} {split}"), []
    for text, _ in data.labelled(name, split)[:most]:
        ids = tokenizer.encode(text[:300].rsplit(" ", 1)[0])    # enough for 8 tokens, and cuts no word
        if len(ids) >= 2:
            prompts.append(tokenizer.begin + ids[:rng.randint(2, 8)])
    return prompts


@dataclass
class Rollout:
    """The responses of a model to B prompts. Column t of a tensor belongs to the prediction that the model
    makes after it has read t + 1 tokens. For example, the prompt a b and the response x y with its end e give
    tokens a b x y e and mask 0 1 1 1. Column 1 belongs to the prediction of x."""
    prompts: list               # lists of ids
    responses: list             # lists of ids, without end tokens
    tokens: torch.Tensor        # int64 [B, T + 1]: prompt, response with its end token, zeros
    mask: torch.Tensor          # float32 [B, T]: 1 where the next token is part of the response
    log_probs: torch.Tensor     # float32 [B, T]: of that token when it was sampled (for tests)


@dataclass
class Task:
    """The parts of a run that stay the same."""
    config: Config
    reference: nn.Module        # the policy before
    tokenizer: object
    scorer: object              # score(texts) -> float32 [N]
    prompts: dict               # {"train", "valid", "test": lists of lists of ids}
    sft_batches: object = None  # batches of real text, for --sft-every
    checksum: str = ""          # of the weights of the reference and the scorer

    @property
    def suppressed(self):
        """The ids that have probability 0."""
        return torch.tensor(self.tokenizer.suppressed, dtype=torch.long, device=device_of(self.reference))


def rollout(task, model, prompts, seed=None):
    """Continue each prompt at temperature 1 from the full distribution; -> Rollout. Detail: prompts of
    unequal length step together, so nothing is padded on the left and no position is shifted. A response ends
    with its end token, whose probability counts."""
    stream = generate_stream(model, prompts, task.config.response_tokens, eos=task.tokenizer.stops, seed=seed,
                             suppressed_tokens=task.tokenizer.suppressed)
    new, log_probs, _ = (torch.stack(v, 1) for v in zip(*stream))     # [B, S]; new is -1 where there is none
    shortest, width = min(map(len, prompts)), max(map(len, prompts)) + task.config.response_tokens
    tokens = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=new.device)
    tokens = tokens[:, :shortest + new.shape[1]]
    tokens[:, shortest:] = torch.where(new >= 0, new, tokens[:, shortest:])
    before = (shortest - 1, 0)                  # new begins with column shortest - 1: so many come before it
    mask, log_probs = F.pad((new >= 0).float(), before), F.pad(log_probs, before)
    responses = [[t for t in row if t >= 0 and t not in task.tokenizer.stops] for row in new.tolist()]
    return Rollout(prompts, responses, tokens, mask, log_probs)


def decode_text(task, prompt, response=()):
    """A prompt, without the tokens with which every text begins, and its response, as text."""
    return task.tokenizer.decode([*prompt[len(task.tokenizer.begin):], *response])


def score_responses(task, r):
    """-> (rewards, float32 [B], the logits of the reward model for prompt and response together; the texts).
    UserError for a reward that is not a number. Detail: no response is rejected for its form, and rewards are
    not normalised."""
    texts = [decode_text(task, prompt, response) for prompt, response in zip(r.prompts, r.responses)]
    scores = task.scorer.score(texts).float().cpu()
    if not scores.isfinite().all():
        raise NotFinite(f"the scorer gives {int((~scores.isfinite()).sum())} of {len(scores)} responses a "
                        "reward that is not a number: its weights are damaged, or not those of a scorer. "
                        f"What was saved in {task.config.run} is complete")
    return scores, texts


def response_hidden(model, r, rows):
    """The model's hidden states at which it predicts the responses of these rows: [N, D] for N tokens."""
    mask = r.mask[rows] > 0
    width = int(mask.any(0).nonzero().max()) + 1                            # beyond it all rows are padding
    return model(r.tokens[rows, :width])[0][mask[:, :width]]


@torch.no_grad()
def evaluate_actions(task, policy, r, value_head=None):
    """The policy and the reference at every token of the responses, without a gradient: a dict of float32 [B,
    T], 0 outside the mask. log_prob, ref_log_prob and value are those of the token; kl and entropy, in nats,
    are those of the full distributions."""
    mask, parts = r.mask > 0, []
    actions = r.tokens[:, 1:][mask][:, None]                                # [N, 1]

    def log_softmax(model, hidden):
        # suppressed ids get -1e9 and not -inf, because 0 * -inf is not a number
        return torch.log_softmax(model.logits(hidden).float().index_fill_(-1, task.suppressed, -1e9), -1)
    with autocast(policy):                              # around both models, so that weights are cast once
        groups = torch.arange(len(mask)).split(task.config.minibatch)
        hidden, ref_hidden = (torch.cat([response_hidden(model, r, rows) for rows in groups])
                              for model in (policy, task.reference))        # [N, D]
        vocab_size = policy.lm_head.out_features
        for action, h, ref_h in row_chunks(vocab_size, actions, hidden, ref_hidden, copies=4):
            log_p, log_q = log_softmax(policy, h), log_softmax(task.reference, ref_h)           # [rows, V]
            p = log_p.exp()
            parts.append({"log_prob": log_p.gather(1, action)[:, 0],
                          "ref_log_prob": log_q.gather(1, action)[:, 0],
                          "kl": (p * (log_p - log_q)).sum(-1), "entropy": -(p * log_p).sum(-1)})
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if value_head:                                                          # outside autocast: in float32
        values["value"] = value_head(hidden.float())[:, 0]
    return {name: torch.zeros_like(r.mask).masked_scatter(mask, value) for name, value in values.items()}


def evaluate_policy(task, policy, prompts, seed, group=64):
    """Let a policy respond to prompts; -> a dict of figures over all responses, with the list "each" of the
    single ones."""
    each, responses = [], []
    policy.eval()
    for at in range(0, len(prompts), group):
        data.show(f"evaluating the policy: {at:,} of {len(prompts):,} prompts")
        r = rollout(task, policy, prompts[at:at + group], seed + at)
        (rewards, texts), outputs = score_responses(task, r), evaluate_actions(task, policy, r)
        kl, ref_nll, tokens = outputs["kl"].sum(1), -outputs["ref_log_prob"].sum(1), r.mask.sum(1)
        for k, text in enumerate(texts):
            each.append({"prompt": decode_text(task, r.prompts[k]), "text": text, "reward": rewards[k].item(),
                         "kl": kl[k].item(), "tokens": int(tokens[k]),
                         "ref_ppl": perplexity_of((ref_nll / tokens)[k].item())})
        responses += r.responses
    each = [row | {"repetition": share} for row, share in zip(each, shared_repetition(responses))]
    reward, kl, repeated, tokens, ref_ppl = (np.array([row[name] for row in each]) for name in
                                             ("reward", "kl", "repetition", "tokens", "ref_ppl"))
    return {"reward": float(reward.mean()), "reward_std": float(reward.std(ddof=1)), "kl": float(kl.mean()),
            "distinct_2": distinct(responses, 2) or 1.0, "repetition": float(repeated.mean()),
            "length": float(tokens.mean()),
            "ref_ppl": perplexity_of((np.log(ref_ppl) * tokens).sum() / tokens.sum()), "each": each}


# ------------------------------------------------------------------------------------------------------- PPO

EVALUATED = {"reward": "reward, mean", "reward_std": "reward, standard deviation",
             "kl": "KL to the reference, nats a response", "distinct_2": "distinct-2",
             "repetition": "share of repeated bigrams",
             "length": "tokens of a response", "ref_ppl": "perplexity under the reference"}


def optimizer_step(loss, optimizer, grad_clip):
    """One step of the optimizer; -> the norm of the gradient before it is clipped."""
    loss.backward()
    grad_norm = clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def update_policy(task, policy, value_head, optimizer, r, old):
    """Several epochs of minibatches over one rollout; -> the metrics of each update. old: the result of
    evaluate_actions before the first update, with advantages and returns."""
    config, updates = task.config, []
    for _ in range(config.update_epochs):
        for rows in torch.randperm(len(r.mask)).split(config.minibatch):
            token_mask = r.mask[rows] > 0
            part = {name: values[rows][token_mask] for name, values in old.items()}     # [N] each, N tokens
            actions = r.tokens[rows, 1:][token_mask]
            with autocast(policy):
                hidden = response_hidden(policy, r, rows)                               # [N, D]
                log_prob = -softmax_loss(hidden, policy.lm_head, actions, "none", task.suppressed)      # [N]
            pg_loss, clipfrac, approx_kl = policy_loss(log_prob, part["log_prob"], part["advantages"],
                                                       config.clip_coef)
            if approx_kl > config.max_update_kl:    # too far from the policy that sampled these responses
                return updates
            value = value_head(hidden.float())[:, 0]
            v_loss = value_loss(value, part["value"], part["returns"], config.clip_coef)
            grad_norm = optimizer_step(pg_loss + config.value_coef * v_loss, optimizer, config.grad_clip)
            updates.append({"clip_fraction": clipfrac.item(), "policy_loss": pg_loss.item(),
                            "value_loss": v_loss.item(), "grad_norm": grad_norm})
    return updates


def supervised_steps(task, policy, optimizer, step):
    """batch_size / minibatch updates on real text; -> the metrics of each."""
    config, updates = task.config, []
    n = config.batch_size // config.minibatch
    for k in range(n):
        x, y = (part.to(device_of(policy)) for part in task.sft_batches.batch(step * n + k))
        with autocast(policy):
            loss, _ = policy(x, targets=y)                                  # nats per token
        grad_norm = optimizer_step(loss, optimizer, config.grad_clip)
        updates.append({"sft_loss": loss.item(), "grad_norm": grad_norm})
    return updates


def iterate(task, policy, sampler, value_head, optimizer, step, kl_coef):
    """An iteration of PPO; -> its figures for log.csv, with KL in nats a response and entropy in nats a
    token."""
    config = task.config

    # 7.1 rollout
    batch = prompt_batch(task.prompts["train"], config.batch_size, config.seed, step)
    r = rollout(task, sampler, batch)
    if not any(r.responses):
        raise UserError("every response is empty; take another base, or a smaller --lr")

    # 7.2 reward model, at the end of each response
    scores, _ = score_responses(task, r)                                    # [B]
    repeated = torch.tensor(shared_repetition(r.responses))                 # [B]

    # 7.3 log-probs and values of the policy, log-probs of the reference, in the update's precision: [B, T]
    old = evaluate_actions(task, policy, r, value_head)

    # 7.4 reward per token. Detail: KL at every token, the score at the last one only. Rewards are not
    # whitened, because that would change how much kl_coef counts
    kl_estimate = old["log_prob"] - old["ref_log_prob"]                     # "k1", whose mean is the KL
    rewards = -kl_coef * kl_estimate
    last = r.mask.cumsum(1).argmax(1)                                       # [B]: the end of each response
    rewards[torch.arange(len(last)), last] += (scores - config.repetition_coef * repeated).to(rewards.device)

    # 7.5 GAE. Detail: advantages are whitened over the batch, because the variance of a minibatch is noisy
    advantages, returns = gae(rewards, old["value"], r.mask, config.gamma, config.gae_lambda)
    token_mask = r.mask > 0
    # the share of the returns' variance that the values do not predict
    error = (returns - old["value"])[token_mask].var(correction=0)
    unexplained = error / returns[token_mask].var(correction=0).clamp(min=1e-8)
    if config.whiten:
        advantages = whiten(advantages, r.mask)

    # 7.6 epochs of minibatches, then supervised steps
    updates = update_policy(task, policy, value_head, optimizer, r,
                            old | {"advantages": advantages, "returns": returns})
    if config.sft_every and (step + 1) % config.sft_every == 0:
        updates += supervised_steps(task, policy, optimizer, step)
    tokens, n = r.mask.sum(), len(r.mask)
    metrics = {"reward": scores.mean().item(), "reward_std": scores.std(correction=min(1, n - 1)).item(),
               "kl": old["kl"].sum().item() / n, "kl_estimate": kl_estimate.sum().item() / n,
               "kl_coef": kl_coef, "entropy": (old["entropy"].sum() / tokens).item(),
               "explained_variance": (1 - unexplained).item(), "length": tokens.item() / n,
               "distinct_2": distinct(r.responses, 2), "repetition": repeated.mean().item(),
               "updates": len(updates)}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        metrics[name] = sum(values) / len(values)
    return metrics


def configure_adam(policy, value_head, lr):
    """Adam for the policy and the value head. Detail: epsilon 1e-5 damps the first updates. The value head
    begins at zero and has a higher rate."""
    groups = [{"params": list(policy.parameters()), "lr_scale": 1},
              {"params": list(value_head.parameters()), "lr_scale": 10}]
    return torch.optim.Adam(groups, lr, eps=1e-5, fused=device_of(policy).type in ("cpu", "cuda"))


def policy_to_sample_from(policy):
    """The policy itself; or, if its products are bfloat16, a copy with bfloat16 weights, because generating a
    token reads all weights once."""
    if policy.product_dtype != torch.bfloat16 or policy.recurrent:
        return policy
    sampler = copy.deepcopy(policy).to(torch.bfloat16)
    speed_up(sampler)
    return sampler


def train_policy(task, checkpoint=None):
    """Train a policy by PPO as task.config says, into the folder config.run; -> the content of its
    result.json."""
    # 4 figures of the reference, before
    config, tokenizer, folder = task.config, task.tokenizer, Path(task.config.run)
    before = read_json(folder / "before.json", {}) if checkpoint else {}
    if not before:
        before = evaluate_policy(task, task.reference, task.prompts["test"], config.seed)
        save_json(folder / "before.json", before)

    # 4 model
    # no dropout: with it, pi would differ from pi_old before the first update
    policy = copy.deepcopy(task.reference).requires_grad_(True).eval()
    # Detail: V(s_t) is linear in the hidden state after the prompt and the tokens so far, and begins at zero.
    # Its loss trains the layers of the policy, too
    value_head = nn.Linear(policy.lm_head.in_features, 1).to(device_of(policy))
    for p in value_head.parameters():
        nn.init.zeros_(p)
    sampler = policy_to_sample_from(policy)

    # 5 optimizer
    optimizer = configure_adam(policy, value_head, config.lr)

    # 6 resume
    run, kl_coef = Run(config, checkpoint=checkpoint), config.kl_coef
    if checkpoint:
        policy.load_state_dict(checkpoint["model"])
        value_head.load_state_dict(checkpoint["value_head"])
        load_optimizer(optimizer, checkpoint["optimizer"])
        kl_coef = checkpoint["kl_coef"]

    # 7 loop
    data.show(f"{config.base} rewarded by {config.scorer}: {len(task.prompts['train']):,} prompts, "
              f"{config.steps} iterations, {how_computed(policy)}, {config.run}", "\n")
    with run:
        if not run.rows:
            scores = evaluate_policy(task, policy, task.prompts["valid"], config.seed)
            run.log(**{f"eval_{name}": scores[name] for name in EVALUATED})
        while run.step < run.steps:
            started = time.perf_counter()

            # one iteration
            torch.manual_seed(step_seed(config.seed, run.step))             # responses and minibatches
            lr = get_lr(run.step, run.steps, config.lr, config.warmup_steps)
            set_lr(optimizer, lr)
            if sampler is not policy:
                sampler.load_state_dict(policy.state_dict())
            metrics = iterate(task, policy, sampler, value_head, optimizer, run.step, kl_coef)
            run.check_finite(gradient_norm=metrics.get("grad_norm", 0.0))
            if config.kl_target:
                # Ziegler et al. 2019, 2.2; but it falls by at most 2 %, because the KL begins at 0
                kl_coef *= 1 + min(0.2, max(-0.02, 0.5 * (metrics["kl"] / config.kl_target - 1)))
            run.step_done(time.perf_counter() - started)
            data.show(f"{run}  reward {metrics['reward']:.2f}  KL {metrics['kl']:.2f}")

            # evaluate, log, save
            more = {"value_head": value_head.state_dict(), "kl_coef": kl_coef, "checksum": task.checksum}
            if run.step % run.eval_every == 0 or run.step == run.steps:
                scores = evaluate_policy(task, policy, task.prompts["valid"], config.seed)
                run.log(lr=lr, **metrics, **{f"eval_{name}": scores[name] for name in EVALUATED})
                # the best policy has the highest reward minus the prices of its KL and its repetition
                penalized_reward = (scores["reward"] - config.kl_coef * scores["kl"]
                                    - config.repetition_coef * scores["repetition"])
                better = run.save(policy, tokenizer, optimizer, val_loss=-penalized_reward, **more)
                data.show(f"{run}  coefficient {kl_coef:.3f}  reward {scores['reward']:.2f}  KL "
                          f"{scores['kl']:.2f}  distinct-2 {scores['distinct_2']:.2f}"
                          f"{' *' if better else ''}", "\n")
                if config.sample:
                    data.show("    " + " ".join(scores["each"][0]["text"].split())[:100], "\n")
            elif run.step % config.log_every == 0:
                run.log(lr=lr, **metrics)
            if run.stop_requested:
                run.save_and_exit(policy, tokenizer, optimizer, **more)

    # 8 results
    policy.load_state_dict(read_checkpoint(folder / "best.pt")["model"])
    after = evaluate_policy(task, policy, task.prompts["test"], config.seed)
    if tokenizer.kind == "qwen2":
        save_model(policy, tokenizer, folder)
    result = run.result(policy) | {
        "base": config.base, "scorer": config.scorer, "before": before, "after": after,
        "rise": (after["reward"] - before["reward"]) / before["reward_std"]}
    report(config, result)
    save_json(folder / "result.json", result)                         # last: it says that the run is complete
    return result


# The evening's reading of this file ends here.

# ------------------------------------------------------------------------------------------------ the report

# the first prompts of the report; those of the test split follow
NAMED = "Life Begins", "Now I don't", "There are no people like"


def plot_rewards(plt, rows, path):
    """Figure 5, of the rows of log.csv: reward with a band of one standard deviation; KL; variety."""
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 3.2))
    for axes, column, colour, label in (
            (0, "reward", 0, "mean"), (0, "eval_reward", 1, "validation prompts"),
            (1, "kl_estimate", 2, "from the sampled tokens"), (1, "kl", 0, "all tokens at each prefix"),
            (2, "distinct_2", 0, "distinct-2"), (2, "repetition", 1, "repeated bigrams")):
        points = [(r["step"], r[column]) for r in rows if column in r]
        panels[axes].plot([x for x, _ in points], [y for _, y in points], color=COLOURS[colour],
                          label=label, marker="o" if column.startswith("eval") else "", markersize=3)
    band = np.array([(r["step"], r["reward"] - r["reward_std"], r["reward"] + r["reward_std"])
                     for r in rows if "reward" in r])
    panels[0].fill_between(*band.T, color=COLOURS[0], alpha=0.2, linewidth=0, label="± deviation")
    panels[2].set_ylim(0, 1)
    for axes, label in zip(panels, ("reward (logit of positive)", "KL to the reference (nats a response)",
                                    "share")):
        axes.set(xlabel="iteration", ylabel=label)
        axes.legend()
    save_figure(figure, path)


def reward_hacking_examples(each, badness, n=4):
    """The n responses with the highest sum of reward and badness, both in standard deviations."""
    def standard(values):
        values = np.array(values)
        return (values - values.mean()) / max(values.std(), 1e-9)
    order = np.argsort(-(standard([r["reward"] for r in each]) + standard([badness(r) for r in each])),
                       kind="stable")
    return [each[k] for k in order[:n]]


def report(config, result):
    """Write report.md: figures before and after, Figure 5, Tables 7 and 8."""
    before, after, run = result["before"], result["after"], Path(config.run)
    repairs = ", ".join(f"{name.replace('_', '-')} {getattr(config, name):g}" for name in (
        "kl_coef", "kl_target", "lr", "repetition_coef", "sft_every"))
    pairs = list(zip(before["each"], after["each"]))[:8]
    lines = [f"# {config.base} with PPO, rewarded by {config.scorer}\n",
             f"{result['steps']} iterations of {config.batch_size} responses of at most "
             f"{config.response_tokens} tokens to beginnings of {config.data}, {result['seconds']:.0f} s; "
             f"{repairs}; the best policy is that of iteration {result['best_step']}.\n",
             f"## Before and after, {len(before['each'])} held-out prompts\n",
             markdown_table([{"": label, "before": before[name], "after": after[name]}
                             for name, label in EVALUATED.items()]),
             f"The reward rose by {result['rise']:.2f} of its standard deviations before training.\n"]
    log, path = read_log(run / "log.csv"), run / "rewards.png"
    if figure := draw("Reward, KL and variety while training", plot_rewards, log, path):
        lines += ["## Reward (Figure 5)\n", figure]
    lines += ["## The same prompts, the same seed (Table 7)\n",
              markdown_table([{"prompt": b["prompt"], "before": b["text"], "its reward": b["reward"],
                               "after": a["text"], "reward": a["reward"]} for b, a in pairs]),
              "## Unexpected outputs, found automatically (Table 8)\n"]
    columns = {"text": "text", "reward": "reward", "repetition": "repeated bigrams",
               "ref_ppl": "perplexity under the reference"}
    for title, badness in (("repetition", lambda r: r["repetition"]),
                           ("perplexity under the reference", lambda r: math.log(r["ref_ppl"]))):
        rows = reward_hacking_examples(after["each"], badness)
        lines += [f"High reward with high {title}:\n",
                  markdown_table([{label: row[name] for name, label in columns.items()} for row in rows])]
    write_report(run, lines)


# ------------------------------------------------------------------------------------ what a run begins with

def weights_checksum(*modules):
    """A checksum of all weights. A run that resumes needs the weights with which it was started."""
    crc = 0
    for p in (p for module in modules for p in module.parameters()):
        crc = zlib.crc32(p.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def resolve_defaults(config, tokenizer):
    """Fill in the options that depend on the base."""
    for name, value in DEFAULTS["qwen2" if tokenizer.kind == "qwen2" else "own"].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    config.data = config.data or ("reviews" if is_embedded(tokenizer) else "imdb")
    config.eval_every = config.eval_every or max(5, -(-config.steps // 10))
    if config.batch_size % config.minibatch:
        raise UserError(f"--batch-size {config.batch_size} cannot be cut into minibatches of "
                        f"{config.minibatch}")


def check_fit(task):
    config, prompts, scorer = task.config, task.prompts["train"], task.scorer
    longest, limit = max(map(len, prompts)), context_length(task.reference)
    if longest + config.response_tokens > limit:
        raise UserError(f"a prompt of {longest} tokens and a response of {config.response_tokens} do not fit "
                        f"the base's context of {limit}; take a smaller --response-tokens, or a base with a "
                        "larger --block-size")
    if len(prompts) < config.batch_size:
        raise UserError(f"{len(prompts)} prompts are too few for a --batch-size of {config.batch_size}")
    pieces = [i for prompt in prompts[:500] for i in scorer.tokenizer.encode(decode_text(task, prompt))]
    unknown = sum(i == scorer.tokenizer.unk for i in pieces) / max(1, len(pieces))
    if unknown > 0.3:
        raise UserError(f"{config.base} and {config.scorer} do not fit: the scorer does not know "
                        f"{unknown:.0%} of the words of the prompts. Train one on the same reviews: python "
                        f"ppo.py --train-reward --data {config.data}")


def open_task(config, checkpoint):
    """Open the models and the prompts; -> Task. UserError if they do not fit each other, or if a run that
    resumes was started with other ones."""
    device = pick_device(config.device)
    product_dtype = pick_dtype(config.dtype, device)
    # requires_grad stays True, because autocast caches the cast of a weight only if that requires a gradient
    reference, tokenizer, _ = load_run(config.base, device, torch.float32)
    reference.product_dtype = product_dtype
    if not checkpoint:
        resolve_defaults(config, tokenizer)
    scorer = load_scorer(config.scorer, device)
    prompts = {split: read_prompts(config.data, split, tokenizer) for split in ("train", "valid", "test")}
    named = [] if is_embedded(tokenizer) else [encode_prompt(tokenizer, text) for text in NAMED]
    prompts["test"] = (named + prompts["test"])[:config.held_out]
    prompts["valid"] = prompts["valid"][:config.held_out]
    checksum = weights_checksum(reference, scorer)          # in float32: a run may resume in another dtype
    task = Task(config, reference, tokenizer, scorer.to(product_dtype), prompts, checksum=checksum)
    check_fit(task)
    if checkpoint and checkpoint["checksum"] != task.checksum:
        raise UserError(f"{config.base} or {config.scorer} no longer holds the weights that the run in "
                        f"{config.run} was started with; restore them, or start a new run")
    n = count_parameters(reference)
    needed = n * (26 if product_dtype == torch.bfloat16 else 20)
    data.show(f"{n:,} parameters: PPO needs {needed / 1e9:.1f} GB of memory for the policy, its moments and "
              "gradients, and the reference, beside what a minibatch keeps", "\n")
    if config.sft_every:
        ids = data.load(config.data, tokenizer, splits=("train",)).ids["train"]
        block_size = min(context_length(reference), 8 + config.response_tokens)
        task.sft_batches = data.batches_of(reference, ids, config.minibatch, block_size, config.seed)
    return task


# ----------------------------------------------------------------------------------------- training a scorer

@dataclass
class RewardConfig(RunOptions):
    """Train a sentiment scorer for ppo.py: a small one from scratch, or a pretrained encoder."""
    script = "python ppo.py --train-reward"
    train_reward: bool = option(False, "train a scorer, and not a policy")
    data: str = option("reviews", "the labelled texts", choices=REVIEWS)
    encoder: str = option(None, "a DistilBERT to begin with; it gets a new head (default: from scratch)")
    epochs: float = option(None, "passes over the texts (default: 1, for imdb 3, with --encoder 2)")
    lr: float = option(None, "highest learning rate (default: 0.001, with --encoder 0.0001)")
    batch_size: int = option(32, "texts of a batch")
    accumulate: int = option(1, "cut a batch into N micro-batches: less memory")
    warmup_steps: int = option(100, "steps of linear warm-up, at most a tenth of all", at_least=0)
    weight_decay: float = option(0.01, "weight decay of AdamW, on matrices", at_least=0)
    eval_every: int = option(None, "steps between evaluations (default: a 10th of the run)")


class TextBatches:
    """Batches of texts of similar length. A text is read in full in every second epoch, and in the others as
    a crop of 4 to 60 pieces, as short as the texts that PPO scores. `batch(step)` depends on (seed, step)
    only."""

    def __init__(self, scorer, texts, batch_size, seed):
        self.scorer, self.texts, self.batch_size, self.seed = scorer, texts, batch_size, seed
        self.train_tokens = sum(len(ids) for ids, _ in texts)
        fits = scorer.config.max_position_embeddings - 2
        pieces = sum(min(len(ids), fits) + min(len(ids), 32) for ids, _ in texts) / len(texts) / 2
        self.steps_per_epoch, self.tokens = len(texts) // batch_size, batch_size * round(pieces)   # roughly
        if self.steps_per_epoch < 1:
            raise UserError(f"{len(texts)} texts are too few for a batch of {batch_size}")

    @lru_cache(1)                                               # keeps one epoch at a time
    def plan(self, epoch):
        """The batches of an epoch as lists of (ids, label)."""
        rng, crops = random.Random(f"{self.seed} {epoch}"), []
        for k in rng.sample(range(len(self.texts)), self.steps_per_epoch * self.batch_size):
            ids, label = self.texts[k]
            size = len(ids) if (k + epoch) % 2 else min(len(ids), rng.randint(4, 60))
            start = rng.randint(0, len(ids) - size)
            crops.append((ids[start:start + size], label))
        batches = []
        for at in range(0, len(crops), 32 * self.batch_size):
            near = sorted(crops[at:at + 32 * self.batch_size], key=lambda crop: len(crop[0]))
            batches += [near[b:b + self.batch_size] for b in range(0, len(near), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def batch(self, step):
        """-> tokens [B, T], labels [B]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        texts, labels = zip(*self.plan(epoch)[k])
        return self.scorer.batch(texts), torch.tensor(labels)


def evaluate_scorer(scorer, texts):
    """The mean cross-entropy and the accuracy on [(ids, label)]."""
    data.show(f"scoring {len(texts):,} texts")
    with autocast(scorer):
        logits = scorer.classify([ids for ids, _ in texts])
    labels = torch.tensor([label for _, label in texts])
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return {"val_loss": F.cross_entropy(logits, labels).item(), "val_accuracy": accuracy}


def train_reward(config, checkpoint=None):
    """Train a scorer on labelled reviews into config.run, which becomes a folder in the hub's layout."""
    # 3 data
    reviews = {split: data.labelled(config.data, split) for split in ("train", "valid", "test")}

    # 4 model
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if checkpoint:
        tokenizer = tokenizer_from(checkpoint["tokenizer"])
        scorer = Scorer(ScorerConfig(**checkpoint["config"]), tokenizer).to(device)
        scorer.load_state_dict(checkpoint["model"])
    elif config.encoder:
        scorer = load_scorer(config.encoder, device, new_head=True)
    else:                       # BERT's range for embeddings, because wider ones learn too slowly
        tokenizer = build_wordpiece(text for text, _ in reviews["train"])
        scorer = Scorer(ScorerConfig(len(tokenizer.vocab)), tokenizer).to(device)
        for name, p in scorer.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0.0, 0.02 if "embeddings" in name else p.shape[1] ** -0.5)
    scorer.product_dtype = pick_dtype(config.dtype, device)
    texts = {split: [(scorer.tokenizer.encode(text), label) for text, label in pairs]
             for split, pairs in reviews.items()}
    check_rows(config, scorer)
    batches = TextBatches(scorer, texts["train"], config.batch_size, config.seed)

    # 5 to 7: as a language model
    steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
    config.eval_every = config.eval_every or -(-steps // 10)
    warmup_steps = min(config.warmup_steps, max(1, steps // 10))
    run = train(config, scorer, scorer.tokenizer, batches, lambda: evaluate_scorer(scorer, texts["valid"]),
                warmup_steps, checkpoint)

    # 8 results
    scorer.load_state_dict(read_checkpoint(run.folder / "best.pt")["model"])
    save_scorer(scorer, run.folder)
    complete = evaluate_scorer(scorer, texts["test"])["val_accuracy"]
    short = [(ids[:32], label) for ids, label in texts["test"]]
    beginning = evaluate_scorer(scorer, short)["val_accuracy"]
    result = run.result(scorer) | {"held_out": len(short), "accuracy": complete,
                                   "accuracy_first_32": beginning}
    save_json(run.folder / "result.json", result)
    for path in run.folder.glob("*.pt"):                            # the folder itself is the scorer now
        path.unlink()
    print(f"scorer on {config.data}: {result['params']:,} parameters, accuracy on {len(short):,} held-out "
          f"texts {complete:.1%}, on their first 32 pieces {beginning:.1%}, {run.seconds:.0f} s")
    print(f"written to {config.run}")


# ---------------------------------------------------------------------------------------------- command line

def main(argv=None):
    # 1 options
    argv = sys.argv[1:] if argv is None else argv
    train_a_scorer = "--train-reward" in argv
    examples = "examples:\n" + __doc__.split("\n\n")[1]
    config, given = data.parse_args(RewardConfig if train_a_scorer else Config, argv, examples)
    if data.WORLD > 1:
        raise UserError("ppo.py runs in one process; start it without torchrun")
    default = f"scorer-{config.data}" if train_a_scorer else f"ppo-{data.file_name(config.base)}"
    config.run = config.run or f"runs/{default}"
    keep_memory()
    checkpoint, config = resume_or_refuse(config, given)
    if train_a_scorer and not checkpoint:
        config.lr = config.lr or (1e-4 if config.encoder else 1e-3)         # 1e-4: searched on MiniLM-L6
        if not config.steps:
            usual = 2.0 if config.encoder else 1.0 if config.data == "reviews" else 3.0
            config.epochs = config.epochs or usual

    # 3 base and data, and all that follows
    if train_a_scorer:
        with claim_folder(config):
            return train_reward(config, checkpoint)
    task = open_task(config, checkpoint)
    with claim_folder(config):
        result = train_policy(task, checkpoint)
    before, after = result["before"], result["after"]
    print(f"{config.base} rewarded by {config.scorer}: reward {before['reward']:.2f} before, "
          f"{after['reward']:.2f} after ({result['rise']:+.2f} standard deviations), KL {after['kl']:.2f} "
          f"nats a response, distinct-2 {before['distinct_2']:.2f}, {after['distinct_2']:.2f}")
    print(f"written to {config.run}/report.md. Next: python sample.py --run {data.quoted(config.run)}")


if __name__ == "__main__":
    data.run_main(main)
