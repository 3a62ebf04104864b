"""Chapter 4: PPO on macro actions, beside PPO on tokens.

PPO samples responses, scores them, asks which actions were better than expected, and makes those likelier. In
RLHF an action is usually one token, so that a score that arrives after 80 tokens has to be explained
through 80 decisions. MA-RLHF explains it through a few macro actions (chapter 3). Everything but
advantages and returns stays the same:

    token   delta_t = r_t + gamma V(s_t+1) - V(s_t)      A_t = delta_t + gamma lam A_t+1
    macro   delta_k = R_k + gamma V_k+1    - V_k         A_k = delta_k + gamma lam A_k+1

with R_k and V_k pooled from the tokens of macro action k. Read `train` for the algorithm, then `token_gae`
and `macro_gae`: their difference is the paper's idea.

    python ma_ppo.py                                      # SFT, RM, both arms, curves: minutes on a CPU
    python ma_ppo.py --terminations token fixed control   # with the control experiment
    python ma_ppo.py --terminations fixed --n 10 --out runs/n10
    python ma_ppo.py --task toy-code                      # programs, rewarded by unit tests: no RM
    python ma_ppo.py --task hh --data pairs.jsonl.gz      # real preference pairs
    torchrun --nproc_per_node=2 ma_ppo.py                 # the same run on two processes
"""

import copy
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import reward
import segment
import sft
from segment import pool
from sft import opt, print0


@dataclass
class Config(sft.Config):
    """Settings of the PPO chapter. Values without a source were found on the toy."""

    model: str = opt("", "what sft.py starts from, if OUT/sft has to be made")
    sft: str = opt("", "SFT model: policy and reference start from it; empty: OUT/sft, made if missing")
    reward_model: str = opt("", "RM: gives the score, and the critic starts from it; empty: OUT/reward")
    terminations: list[str] = opt(["token", "fixed"], "arms to train, one after the other (all: see README)")
    n: int = opt(5, "tokens in a macro action of `fixed` (paper: 5; code: 10); `control` takes lam^(1/n)")
    steps: int = opt(60, "PPO steps: one rollout of the whole batch, then ppo_epochs updates")
    batch_size: int = opt(64, "responses per step, over all ranks (paper: 256)")
    micro_batch_size: int = opt(64, "responses per forward pass and rank; changes memory, not the result")
    lr: float = opt(5e-4, "learning rate of the policy, constant after the warm-up")
    critic_lr: float = opt(1e-3, "learning rate of the critic")
    warmup: int = opt(10, "steps of linear warm-up of the policy's rate; the critic learns at once")
    gamma: float = opt(1.0, "discount per action: macro action, or token in `token` and `control` (paper: 1)")
    lam: float = opt(0.95, "GAE's lambda, per action like --gamma (paper: 0.95)")
    beta: float = opt(0.05, "weight of the KL penalty, reward per nat (paper: 0.05)")
    parser: str = opt("spacy", "of the arm `parsing`: spacy (dependencies), or benepar (constituents; paper)")
    sigma: str = opt("equal", "value of a macro action: equal, last, decay or first (paper: equal)")
    macro_reward: str = opt("sum", "reward of a macro action: sum (paper) or mean (reference code)")
    ratio: str = opt("token", "probability ratio per token (reference code) or per macro action (paper)")
    clip: float = opt(0.2, "PPO's clipping range, of the ratio and of the value (paper: 0.2)")
    ppo_epochs: int = opt(1, "updates per rollout (paper: 1; then the ratio is always 1: nothing is clipped)")
    temperature: float = opt(1.0, "of sampling, and of every log-probability (paper: 0.8)")
    top_k: int = opt(0, "sample from the k likeliest tokens only (paper: 50); 0: from all")
    top_p: float = opt(1.0, "sample from the likeliest tokens that make up this probability; 1: from all")
    no_eos_score: float = opt(-4.0, "score of a response that does not end by itself (programs: -1)")
    save_every: int = opt(20, "steps between checkpoints; 0: only at the end and when interrupted")


@dataclass
class Rollout:
    """What one step knows about its B responses; padding is 0, but for `seg` and `batch`."""

    batch: sft.Batch  # tokens [B, P+T], attention [B, P+T], mask [B, T]
    seeds: list  # B integer lists [seed, step, prompt number]
    tokens: list  # B responses, lists of token ids without padding
    texts: list  # B responses, decoded
    logprobs: torch.Tensor = None  # [B, T] log pi of the tokens, under the policy that sampled them
    ref_logprobs: torch.Tensor = None  # [B, T] the same under the reference
    entropy: torch.Tensor = None  # [B, T] nats
    values: torch.Tensor = None  # [B, T] critic's V(s_t), s_t the state in front of token t
    scores: torch.Tensor = None  # [B] RM score, or that of the unit tests, or no_eos_score
    gold: list = None  # B gold scores, None where the task has none
    passed: torch.Tensor = None  # [B] whether all unit tests passed, None where there are none
    starts: torch.Tensor = None  # [B, T] True where a macro action begins
    seg: torch.Tensor = None  # [B, T] number of the macro action that each token belongs to
    parse_fallback: float = 0.0  # share of sentences or programs that could not be parsed
    advantages: torch.Tensor = None  # [B, T] whitened
    returns: torch.Tensor = None  # [B, T]


def allowed(logits, top_k, top_p):
    """Which tokens top-k and top-p leave in the distribution.  logits: [..., V] -> BoolTensor [..., V]"""
    keep = torch.ones_like(logits, dtype=torch.bool)  # [..., V]
    if top_k:
        keep &= logits >= logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    if top_p < 1:
        probs, order = logits.masked_fill(~keep, -torch.inf).softmax(-1).sort(-1, descending=True)  # [..., V]
        inside = probs.cumsum(-1) - probs < top_p  # a token stays if those before it do not yet reach top_p
        keep &= torch.zeros_like(keep).scatter(-1, order, inside)
    return keep


def shaped(logits, cfg, keep=None):
    """Log-probabilities of the one distribution that is both sampled from and scored (SPEC 6.7, 8).  [..., V]

    `keep`: BoolTensor [..., V] of the allowed tokens; by default those that the logits themselves allow.
    """
    logits = logits / cfg.temperature  # [..., V]
    if cfg.top_k or cfg.top_p < 1:
        keep = allowed(logits, cfg.top_k, cfg.top_p) if keep is None else keep
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.log_softmax(-1)


def draw(logprobs, uniforms):
    """Sample by inverting the cumulative distribution.  logprobs [B, V], uniforms [B] -> LongTensor [B]"""
    cdf = logprobs.double().exp().cumsum(-1)  # [B, V]; double: 100,000 small probabilities must add up
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)  # [B]
    return drawn.clamp(max=logprobs.shape[1] - 1)  # NaN has no place: the update will be skipped


# What transformers calls the keys and values of earlier tokens: `cache` since its version 5.24.
_arguments = inspect.signature(sft.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _arguments else "past_key_values"


@torch.no_grad()
def generate(model, prompts, uniforms, tokenizer, cfg):
    """Sample a response to each prompt, token by token, reusing the keys and values of all earlier tokens.

    prompts: B token lists; uniforms: float64 tensor [B, max_response], the randomness of each row. A row's
    response depends on its own prompt and uniforms only, not on its batch. Returns B token lists, which end
    in EOS unless cut.
    """
    batch = sft.make_batch(prompts, [[]] * len(prompts), tokenizer.pad_token_id, model.device)
    tokens, attention = batch.tokens[:, :-1], batch.attention[:, :-1]  # [B, P]
    place, cache, sampled = sft.positions(attention), None, []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)  # [B]
    for u in uniforms.to(model.device).T:  # [B]
        inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": place}
        output = model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        cache = output[CACHE]
        tokens = draw(shaped(output.logits[:, -1].float(), cfg), u)[:, None]  # [B, 1]
        sampled.append(tokens)
        done |= tokens.squeeze(1) == tokenizer.eos_token_id
        if everywhere(done.all(), model):
            break
        attention = torch.cat([attention, torch.ones_like(tokens)], 1)  # [B, P+t+1]
        place = place[:, -1:] + 1  # [B, 1]
    rows, eos = torch.cat(sampled, 1).tolist(), tokenizer.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def everywhere(done, model):
    """Whether this rank is done; with a sharded model, which all ranks must call equally often, all ranks."""
    return float(sft.all_sum(float(done))) == sft.world() if sft.sharded(model) else bool(done)


def sample(policy, examples, step, tokenizer, cfg):
    """1. Sample a response to each prompt, with noise seeded by (seed, step, prompt number) -> Rollout."""
    seeds = [[cfg.seed, step, example["number"]] for example in examples]
    uniforms = np.array([np.random.default_rng(s).random(cfg.max_response) for s in seeds])
    uniforms = torch.tensor(uniforms)  # [B, max_response]
    prompts, responses = [example["prompt"] for example in examples], []
    for part in sft.micro_slices(len(prompts), cfg.micro_batch_size):
        responses += generate(policy, prompts[part], uniforms[part], tokenizer, cfg)
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, policy.device)
    return Rollout(batch, seeds, responses, tokenizer.batch_decode(responses, skip_special_tokens=True))


def token_logprobs(model, batch, cfg, keep=None):
    """Log-probabilities of the response tokens, and of everything that could have stood there.

    keep: BoolTensor [B, T, V] of allowed tokens; by default those that this model's own logits allow, plus
    the sampled token, which rounding may have pushed over the edge. Returns ([B, T] masked, [B, T, V], keep).
    """
    logits = sft.response_logits(model, batch)  # [B, T, V]
    if keep is None and (cfg.top_k or cfg.top_p < 1):
        keep = allowed(logits.detach() / cfg.temperature, cfg.top_k, cfg.top_p)
        keep = keep.scatter(-1, batch.responses[..., None], True)  # [B, T, V]
    every = shaped(logits, cfg, keep)  # [B, T, V]
    return every.gather(-1, batch.responses[..., None]).squeeze(-1) * batch.mask, every, keep


@torch.no_grad()
def judge(rollout, models, examples, tokenizer, cfg):
    """2. Judge the rollout: log-probabilities under policy and reference, values, scores."""
    names, parts = ("logprobs", "ref_logprobs", "entropy", "values"), []
    for part in sft.micro_slices(len(examples), cfg.micro_batch_size):
        batch = rollout.batch.rows(part)
        logprobs, every, keep = token_logprobs(models["policy"], batch, cfg)
        # The reference is asked about the same allowed tokens: one it does not allow would cost infinite KL.
        ref_logprobs, _, _ = token_logprobs(models["reference"], batch, cfg, keep)
        entropy = torch.special.entr(every.exp()).sum(-1) * batch.mask  # [B, T]
        values = state_values(models["critic"], batch) * batch.mask  # [B, T]
        parts.append((logprobs, ref_logprobs, entropy, values))
    for name, tensors in zip(names, zip(*parts, strict=True), strict=True):
        setattr(rollout, name, torch.cat(tensors))
    score(rollout, models, examples, tokenizer, cfg)


def score(rollout, models, examples, tokenizer, cfg):
    """The RM's scores, or those of programs' unit tests (SPEC 7); no_eos_score where a response is cut."""
    stopped = ended(rollout.batch, tokenizer)  # [B]
    if "problem" in examples[0]:
        scores = reward.program_rewards(rollout.texts, [example["problem"] for example in examples])
        scores = torch.tensor(scores, device=stopped.device)  # [B]
        rollout.passed = (scores == 1) & stopped  # [B]
    else:
        parts = map(rollout.batch.rows, sft.micro_slices(len(examples), cfg.micro_batch_size))
        scores = torch.cat([reward.last_token_scores(models["reward"], part) for part in parts])  # [B]
    rollout.scores = torch.where(stopped, scores, cfg.no_eos_score)  # [B]
    if cfg.task == "toy":
        rollout.gold = [reward.gold_score(examples[i]["text"], text) for i, text in enumerate(rollout.texts)]


def state_values(critic, batch):
    """The critic's V(s_t), read at the token in front of response token t.  -> [B, T]"""
    return critic(batch)[:, -batch.mask.shape[1] - 1 : -1]  # [B, T]


def ended(batch, tokenizer):
    """Which responses contain an EOS.  -> BoolTensor [B]"""
    return ((batch.responses == tokenizer.eos_token_id) & batch.mask.bool()).any(1)


def macro_starts(arm, rollout, tokenizer, cfg):
    """3. Mark where macro actions begin (chapter 3).  -> (BoolTensor [B, T], share that fell back)"""
    mask = rollout.batch.mask
    if arm == "fixed":
        return segment.fixed_starts(mask, cfg.n), 0.0
    if arm == "random":
        seeds = [np.random.SeedSequence(seed).generate_state(1)[0] for seed in rollout.seeds]
        return segment.random_starts(mask, seeds=seeds), 0.0
    if arm == "perplexity":
        return segment.perplexity_starts(mask, rollout.ref_logprobs), 0.0
    if arm == "whole":
        return segment.whole_starts(mask), 0.0
    if arm in TEXT_STARTS:
        read = [segment.token_offsets(tokenizer, tokens) for tokens in rollout.tokens]
        texts, offsets = zip(*read, strict=True)
        parser = [segment.PARSERS[cfg.parser]()] if arm == "parsing" else []
        return TEXT_STARTS[arm](mask, texts, offsets, *parser)
    return segment.token_starts(mask), 0.0  # token, and control


TEXT_STARTS = {
    "parsing": segment.parse_starts,
    "sentence": segment.sentence_starts,
    "word": segment.word_starts,
    "ast": segment.ast_starts,
}
# control is no termination: token level with the horizon of `fixed` at gamma = 1, lam ** (1 / n) (SPEC 4).
TERMINATIONS = ("token", "fixed", "random", "perplexity", "whole", "control", *TEXT_STARTS)


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """4. The KL penalty at every token, plus the score at the last real one: the EOS (SPEC 1.3, 6.8).

    scores: [B]; logprobs, ref_logprobs, mask: [B, T]; beta in reward per nat. Returns [B, T].
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask  # [B, T], k1: unbiased for the KL of what was sampled
    last = (mask.sum(1, keepdim=True).long() - 1).clamp(min=0)  # [B, 1]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))  # [B, T]


def token_gae(rewards, values, mask, gamma, lam):
    """5. Advantages and returns per token (SPEC 4).

    rewards, values, mask: [B, T]; gamma, lam: per token. Returns (advantages, returns), both [B, T].

    Two tokens, gamma = 1, lam = 0.5. A_1 = 2 - 1 = 1; delta_0 = 0 + 1 - 0.5 = 0.5; A_0 = 0.5 + 0.5 * 1 = 1.

    >>> token_gae(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 1.0]]), torch.ones(1, 2), 1.0, 0.5)
    (tensor([[1., 1.]]), tensor([[1.5000, 2.0000]]))
    """
    R = torch.where(mask.bool(), rewards, 0)  # [B, T]
    V = torch.where(mask.bool(), values, 0)  # [B, T], so V behind the last real step is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, T]
    returns = A + V  # [B, T]
    return A * mask, returns * mask


def macro_gae(rewards, values, mask, seg, gamma, lam, sigma="equal", reward="sum"):
    """5. Advantages and returns per macro action, handed to each of its tokens (SPEC 3, 4).

    rewards, values, mask: [B, T]; seg: LongTensor [B, T]; gamma, lam: per macro action; sigma, reward: see
    `pool`. Returns (advantages, returns), [B, T], 0 in the padding.

    Six tokens in macro actions of 2, 3 and 1; gamma = 1, lam = 0.5; the score 3 arrives at the end.
    R = (0 - 1, 0, 3) = (-1, 0, 3); V = (mean(1, 3), mean(0, 1, 2), 1) = (2, 1, 1);
    delta = (-1 + 1 - 2, 0 + 1 - 1, 3 - 1) = (-2, 0, 2); A_2 = 2, A_1 = 0 + 1 = 1, A_0 = -2 + 0.5 = -1.5.

    >>> rewards, values = torch.tensor([[0.0, -1, 0, 0, 0, 3]]), torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> macro_gae(rewards, values, torch.ones(1, 6), torch.tensor([[0, 0, 1, 1, 1, 2]]), 1.0, 0.5)[0]
    tensor([[-1.5000, -1.5000,  1.0000,  1.0000,  1.0000,  2.0000]])
    """
    R = pool(rewards, seg, mask, reward)  # [B, K]
    V = pool(values, seg, mask, sigma)  # [B, K], so V behind the last macro action is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, K]
    returns = A + V  # [B, K]
    return A.gather(1, seg) * mask, returns.gather(1, seg) * mask


def shift(x):
    """Every column replaced by the one after it, the last by 0.  [B, N] -> [B, N]"""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)  # [B, N]


def discounted_sum(x, factor):
    """y_i = x_i + factor * y_{i+1} along each row.  [B, N] -> [B, N]"""
    y = torch.zeros_like(x)  # [B, N]
    running = torch.zeros_like(x[:, 0]) if x.shape[1] else None  # [B]
    for i in reversed(range(x.shape[1])):
        running = x[:, i] + factor * running
        y[:, i] = running
    return y


def credit(arm, rollout, tokenizer, cfg):
    """3.-5. Segment the responses, assign rewards, estimate advantages and returns, whiten the advantages."""
    mask = rollout.batch.mask
    rollout.starts, rollout.parse_fallback = macro_starts(arm, rollout, tokenizer, cfg)  # [B, T]
    rollout.seg = segment.segment_ids(rollout.starts, mask)  # [B, T]
    rewards = token_rewards(rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, cfg.beta)  # [B, T]
    if arm in ("token", "control"):
        lam = cfg.lam ** (1 / cfg.n) if arm == "control" else cfg.lam
        advantages, rollout.returns = token_gae(rewards, rollout.values, mask, cfg.gamma, lam)
    else:
        advantages, rollout.returns = macro_gae(
            rewards, rollout.values, mask, rollout.seg, cfg.gamma, cfg.lam, cfg.sigma, cfg.macro_reward
        )
    rollout.advantages = whiten(advantages, mask)  # after the returns: those stay in units of reward (SPEC 8)


def whiten(x, mask):
    """Mean 0, variance 1 over the real tokens of all ranks.  x, mask: [B, T] -> [B, T], 0 in the padding."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask.bool(), (x - mean) / (variance + 1e-8) ** 0.5, 0)  # [B, T]


def masked_mean(x, mask):
    """Mean of x over the real tokens of all ranks, a float."""
    x = torch.where(mask.bool(), x, 0)  # [B, T]
    return float(sft.all_sum(x.sum().double().cpu()) / sft.all_sum(mask.sum()))


def ratios(logprobs, old_logprobs, mask, seg=None):
    """pi / pi_old of each token; with `seg`, of the macro action that it belongs to.  [B, T] -> [B, T]"""
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0)  # [B, T], whatever the padding holds
    if seg is not None:
        log_ratio = pool(log_ratio, seg, mask, "sum").gather(1, seg)  # [B, T]
    return log_ratio.exp()


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, seg=None):
    """PPO's clipped objective, averaged over real tokens (SPEC 5).

    All [B, T], seg a LongTensor: with it there is one ratio per macro action, exp of the sum over its tokens
    (the paper's formula). Its L tokens share that ratio, so it weighs L times as much as with token ratios.
    Returns a scalar.
    """
    ratio = ratios(logprobs, old_logprobs, mask, seg)  # [B, T]
    clipped = ratio.clamp(1 - clip, 1 + clip)  # [B, T]
    advantages = torch.where(mask.bool(), advantages, 0)  # [B, T]
    loss = -torch.min(ratio * advantages, clipped * advantages)  # [B, T]
    return loss.sum() / mask.sum().clamp(min=1)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Clipped squared error of the critic, averaged over real tokens (SPEC 5).  All [B, T] -> scalar."""
    values, old_values, returns = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # [B, T]
    loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)  # [B, T]
    return loss.sum() / mask.sum().clamp(min=1)


def improve(rollout, models, optimizers, step, cfg):
    """6. Update policy and critic, ppo_epochs times on the whole rollout; returns the metrics of that."""
    token_count = float(sft.all_sum(rollout.batch.mask.sum().cpu()))
    ramp = min(1.0, (step + 1) / max(1, cfg.warmup))
    seen, results = [], []
    for _ in range(cfg.ppo_epochs):
        losses = policy_losses(rollout, models["policy"], token_count, cfg, seen)
        policy = sft.update(models["policy"], optimizers["policy"], losses, cfg.lr * ramp)
        losses = value_losses(rollout, models["critic"], token_count, cfg)
        critic = sft.update(models["critic"], optimizers["critic"], losses, cfg.critic_lr)
        results.append((policy, critic))
    clipped, counted = (float(sft.all_sum(sum(s[i] for s in seen))) for i in (0, 1))
    first = [ratio for s in seen[: len(seen) // cfg.ppo_epochs] for ratio in s[2:]]
    return {
        "policy_loss": sum(p for p, _ in results) / len(results),
        "value_loss": sum(v for _, v in results) / len(results),
        "clip_fraction": clipped / counted,
        "ratio_first": max(reward.gather(first), key=lambda ratio: abs(ratio - 1)),
    }


def policy_losses(rollout, policy, token_count, cfg, seen):
    """A function for each micro-batch that computes its policy loss, divided by the batch-wide token count.

    Each appends (clipped ratios, number of ratios, smallest, largest) to the list `seen`; a ratio is one
    of a token, or with --ratio macro of a macro action.
    """

    def one_loss(part):
        batch = rollout.batch.rows(part)
        old, seg = rollout.logprobs[part], rollout.seg[part] if cfg.ratio == "macro" else None
        logprobs, _, _ = token_logprobs(policy, batch, cfg)
        ratio = ratios(logprobs.detach(), old, batch.mask, seg)  # [B, T]
        ratio = ratio[(batch.mask if seg is None else rollout.starts[part]).bool()]  # [number of ratios]
        outside = float(((ratio - 1).abs() > cfg.clip).sum())
        seen.append((outside, ratio.numel(), float(ratio.min()), float(ratio.max())))
        loss = policy_loss(logprobs, old, rollout.advantages[part], batch.mask, cfg.clip, seg)
        return loss * batch.mask.sum() / token_count

    return [partial(one_loss, part) for part in sft.micro_slices(len(rollout.texts), cfg.micro_batch_size)]


def value_losses(rollout, critic, token_count, cfg):
    """A function for each micro-batch that computes its value loss, divided by the batch-wide token count."""

    def one_loss(part):
        batch = rollout.batch.rows(part)
        values = state_values(critic, batch)  # [B, T]
        loss = value_loss(values, rollout.values[part], rollout.returns[part], batch.mask, cfg.clip)
        return loss * batch.mask.sum() / token_count

    return [partial(one_loss, part) for part in sft.micro_slices(len(rollout.texts), cfg.micro_batch_size)]


def main(argv=None):
    """Make the SFT model and the RM if they are missing, train every arm from them, draw the curves."""
    cfg = parse(argv)
    device = sft.setup(cfg.device, cfg.timeout)
    folders = [sft.claim(Path(cfg.out) / arm) for arm in cfg.terminations]
    build_missing_stages(cfg)
    for arm, folder in zip(cfg.terminations, folders, strict=True):
        if not sft.finished(cfg, folder):
            train(arm, folder, cfg, device)
    draw_curves(folders, cfg)


def train(arm, out, cfg, device):
    """PPO with one kind of macro action: sample, judge, segment and credit, improve; `steps` times."""
    models, optimizers, tokenizer = load_models(cfg, device)
    prompts = load_prompts(tokenizer, cfg)
    cfg.steps = sft.count_steps(cfg, len(prompts))
    print0(f"PPO, arm {arm}: {len(prompts):,} prompts, {cfg.steps} steps of {cfg.batch_size} -> {out}")
    run = sft.Run(cfg, out, arm, models, optimizers)
    settings = asdict(cfg) | {"arm": arm, "ranks": sft.world()}
    sft.on_rank0(sft.write_json, out / "config.json", settings)
    for step in run:
        clock = [sft.tick(device)]
        examples = sft.shard(sft.batch_rows(prompts, step, cfg.batch_size, cfg.seed))
        rollout = sample(models["policy"], examples, step, tokenizer, cfg)
        judge(rollout, models, examples, tokenizer, cfg)
        clock.append(sft.tick(device))
        credit(arm, rollout, tokenizer, cfg)
        clock.append(sft.tick(device))
        losses = improve(rollout, models, optimizers, step, cfg)
        clock.append(sft.tick(device))
        row = {"step": step} | summary(rollout, tokenizer) | losses | sft.timings(clock, PHASES)
        run.log(row, "rm_score", rollout.tokens)
        if step % 10 == 0 or step == cfg.steps - 1:
            run.append("samples.jsonl", sample_rows(step, rollout, examples, tokenizer))
    sft.save_run([models["policy"], tokenizer], out / "model")
    sft.save_run([], out, cfg, {"arm": arm})


def summary(rollout, tokenizer):
    """This step's metrics of the rollout: means over the responses, or the response tokens, of all ranks."""
    mask = rollout.batch.mask
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)  # [B] nats a response
    macros = rollout.seg.max(1).values + 1  # [B]
    stopped, entropy = ended(rollout.batch, tokenizer), rollout.entropy.sum(1)  # [B]
    columns = [rollout.scores, kl, mask.sum(1), stopped, macros, entropy]
    if rollout.gold:
        columns.append(torch.tensor(rollout.gold, device=mask.device))
    if rollout.passed is not None:
        columns.append(rollout.passed)
    table = torch.stack([c.double().cpu() for c in columns], 1)  # [B, columns]
    table = torch.tensor(reward.gather(table.tolist()), dtype=torch.float64)  # [all ranks' B, columns]
    mean, std = table.mean(0).tolist(), table.std(0, correction=0).tolist()
    return {
        "rm_score": mean[0],
        "rm_score_std": std[0],
        "gold_score": mean[6] if rollout.gold else None,
        "gold_score_std": std[6] if rollout.gold else None,
        "pass_rate": mean[-1] if rollout.passed is not None else None,
        "kl": mean[1],
        "response_length": mean[2],
        "eos_rate": mean[3],
        "macro_actions": mean[4],
        "macro_length": mean[2] / mean[4],
        "parse_fallback": float(sft.all_sum(rollout.parse_fallback)) / sft.world(),
        "entropy": mean[5] / mean[2],
    }


def sample_rows(step, rollout, examples, tokenizer):
    """Yield rank 0's first four responses of this step for samples.jsonl, token by token."""
    for i, tokens in enumerate(rollout.tokens[:4] if sft.rank() == 0 else []):
        row = {"step": step, "prompt": examples[i]["text"], "response": rollout.texts[i]}
        row |= {"rm_score": float(rollout.scores[i]), "gold_score": rollout.gold and rollout.gold[i]}
        text, offsets = segment.token_offsets(tokenizer, tokens)
        row |= {"tokens": tokens, "pieces": [text[start:end] for start, end in offsets]}
        for name in ("seg", "values", "advantages", "returns"):
            row[name] = getattr(rollout, name)[i, : len(tokens)].tolist()  # [length]
        yield row


# Appendix: settings, stages, models

PHASES = ("rollout", "credit", "update")
# Switches that are passed on to stages.
SWITCHES = ("chat_template", "skip_bad_rows", "gradient_checkpointing", "compile", "shard")

RULES = (  # (settings, test, what to say)
    ("n ppo_epochs", lambda x: x >= 1, "at least 1"),
    ("clip temperature critic_lr top_p", lambda x: 0 < x < math.inf, "positive"),
    ("gamma lam beta top_k warmup", lambda x: 0 <= x < math.inf, "0 or more"),
    ("gamma lam top_p", lambda x: x <= 1, "at most 1"),
    ("no_eos_score", math.isfinite, "a finite number"),
    ("sigma", ("equal", "last", "decay", "first").__contains__, "equal, last, decay or first"),
    ("macro_reward", ("sum", "mean").__contains__, "sum or mean"),
    ("parser", segment.PARSERS.__contains__, "spacy or benepar"),
    ("ratio", ("token", "macro").__contains__, "token or macro"),
    ("terminations", lambda arms: set(arms) <= set(TERMINATIONS), f"among {', '.join(TERMINATIONS)}"),
    ("terminations", lambda arms: 0 < len(set(arms)) == len(arms), "different from each other"),
    ("sft", lambda path: not path or (Path(path) / "config.json").is_file(), "a model's folder"),
    ("reward_model", lambda path: not path or (Path(path) / reward.HEAD).is_file(), "a folder of reward.py"),
)


def parse(argv):
    """Read and check the settings."""
    cfg = sft.parse(Config, "ma_ppo", argv)
    if "control" in cfg.terminations and cfg.gamma != 1:
        sft.fail(f"the control matches the horizon of `fixed` at --gamma 1 only, got {cfg.gamma}")
    if cfg.reward_model and cfg.task in sft.PROGRAMS:
        sft.fail(f"--reward_model: unit tests give the reward of --task {cfg.task}, not a reward model")
    for names, holds, rule in RULES:
        for name in names.split():
            if not holds(getattr(cfg, name)):
                sft.fail(f"--{name} must be {rule}, got {getattr(cfg, name)!r}")
    if "parsing" in cfg.terminations:
        try:
            segment.PARSERS[cfg.parser]()
        except ImportError as error:
            sft.fail(error)
    return cfg


def build_missing_stages(cfg):
    """Run the earlier chapters, with their own defaults, for models that do not exist yet."""
    flags = ["--task", cfg.task, "--seed", str(cfg.seed)]
    flags += ["--data", *cfg.data] if cfg.data else []
    flags += ["--model", cfg.model] if cfg.model else []
    flags += ["--device", cfg.device] if cfg.device else []
    flags += ["--preset", cfg.preset] if cfg.preset else []
    flags += ["--split", *map(str, cfg.split)]
    flags += [f"--{name}" for name in SWITCHES if getattr(cfg, name)]
    for name in ("resume", "save_every", "keep", "override", "max_skipped", "timeout", "precision"):
        if getattr(cfg, name) != getattr(Config, name):
            flags += [f"--{name}", str(getattr(cfg, name))]
    if not cfg.sft:
        cfg.sft = str(Path(cfg.out) / "sft")
        run_stage(sft, cfg.sft, flags, cfg)
    if not cfg.reward_model and cfg.task not in sft.PROGRAMS:
        cfg.reward_model = str(Path(cfg.out) / "reward")
        run_stage(reward, cfg.reward_model, [*flags, "--sft", cfg.sft], cfg)


def run_stage(chapter, out, flags, cfg):
    """Run a chapter, saying so, unless `out` holds its finished run for the same task, data and model."""
    finished = Path(out) / "run.json"
    if not finished.exists():
        flags = [*flags, "--out", out]
        print0(f"{out} is missing; making it: python {chapter.__name__}.py {shlex.join(flags)}")
        return chapter.main(flags)
    made = json.loads(finished.read_text())["config"]
    made = {"split": [20, 40, 40], "chat_template": False} | made
    same = made["task"] == cfg.task and (chapter is reward or cfg.model in ("", made["model"]))
    same &= made["split"] == cfg.split and made["chat_template"] == cfg.chat_template
    if not same or [*map(os.path.realpath, made["data"])] != [*map(os.path.realpath, cfg.data)]:
        names = ("task", "data", "model", "split", "chat_template")
        flags = " ".join(f"--{name} {made[name]!r}" for name in names)
        sft.fail(f"{out} was made with {flags}: choose another --out, or remove it")
    base = Path(cfg.sft) / "run.json"
    if chapter is reward and base.exists() and base.stat().st_mtime > finished.stat().st_mtime:
        print0(f"warning: {out} is older than {cfg.sft}; to make it anew from that, remove it")
    size = f"{made['steps']} steps of {made['batch_size']}"  # a short trial should not pass unnoticed
    print0(f"using {out}: seed {made['seed']}, {size}, lr {made['lr']}")


def load_models(cfg, device):
    """Policy and reference start from the SFT model, critic and RM from the RM (SPEC 1.3).

    Programs have no RM: there the critic is the SFT model's trunk under a fresh head.
    Returns ({name: model}, {name: optimizer} of the two that learn, tokenizer).
    """
    place = sft.home(cfg, device)

    def ready(**loaded):  # two at a time: with --shard the CPU holds no more than that
        for model in loaded.values():
            sft.broadcast_parameters(model)
            sft.prepare(model, cfg, device)
        return loaded

    policy, tokenizer = sft.load_causal_lm(cfg.sft, cfg.max_prompt + cfg.max_response, place)
    models = ready(policy=policy, reference=copy.deepcopy(policy).requires_grad_(False))
    if cfg.task in sft.PROGRAMS:
        models |= ready(critic=reward.start_model(cfg, device)[0])
    else:
        if reward.load_tokenizer(cfg.reward_model).get_vocab() != tokenizer.get_vocab():
            sft.fail(f"--reward_model {cfg.reward_model} reads another vocabulary than --sft {cfg.sft}")
        critic = reward.ScalarModel.load(cfg.reward_model, place)
        models |= ready(critic=critic, reward=copy.deepcopy(critic).requires_grad_(False))
    learning = ("policy", "critic")
    optimizers = {name: torch.optim.AdamW(models[name].parameters(), **sft.ADAM) for name in learning}
    return models, optimizers, tokenizer


def load_prompts(tokenizer, cfg):
    """The PPO share's prompts, once each: {number, text, prompt (token list)}, and a program's {problem}."""
    fields, rows = ("problem",) if cfg.task in sft.PROGRAMS else (), {}
    for row in sft.load_share(cfg, "ppo", *fields):
        rows.setdefault(row["prompt"], {"text": row["prompt"]} | {name: row[name] for name in fields})
    texts = [{"prompt": text} for text in rows]
    sft.report_cuts(texts, tokenizer, cfg, ["prompt"])
    encoded = zip(rows.values(), sft.encode(texts, tokenizer, cfg, ["prompt"]), strict=True)
    return [{"number": i} | row | ids for i, (row, ids) in enumerate(encoded)]


def draw_curves(folders, cfg):
    """Hand the finished runs on to chapter 5, as a command: nothing here may import it."""
    if sft.rank() == 0:
        flags = ["curves", "--run", *map(str, folders), "--png", str(Path(cfg.out) / "curves.png")]
        print0(f"drawing: python eval.py {shlex.join(flags)}")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        subprocess.run([sys.executable, Path(__file__).with_name("eval.py"), *flags], check=True, env=alone)


if __name__ == "__main__":
    main()
