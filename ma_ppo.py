"""Chapter 4: PPO (proximal policy optimization) on macro actions, beside PPO on tokens.

A primer. PPO learns from its own tries. All of its words, on one response of six tokens:

    token                 the    trip     was    nice     .    <eos>
    reward      r          0     -1        0      0       0      3
    value       V          1      3        0      1       2      1
    advantage   A        .38  -3.25     1.50   1.00       0   2.00     token_gae, lambda = 1/2
                       |-------------|--------------------|-------|
    reward      R           -1                0              3         (sums)
    value       V            2                1              1         (means)
    advantage   A         -1.5              1.0            2.0         macro_gae, lambda = 1/2

policy        the language model that writes responses, and learns. An *action* is what it decides:
              a token, or, for us, a *macro action*, a run of tokens judged together (chapter 3).
reward model  gives a whole response one score (chapter 2), here 3: nobody labels single tokens.
reference     the policy as it was before PPO, frozen: the memory of what normal text looks like.
KL penalty    at each token beta (log pi - log pi_ref) is paid, here 1 for "trip", which the
              reference finds unlikely. The reward model knows normal text only; without a leash the
              policy drifts to where its scores are wrong and high. Paid at each token, it tells
              *which* token has left normal text. (KL divergence: the expected sum of these logs.)
reward r      what a token earns: the penalty, and at the last real token the score as well.
return        the sum of the rewards from a token on: what is still to come, and what training wants
              large. One sample of it is noisy: it depends on all tokens that happened to follow.
              What the critic is taught is A + V: this sum, mixed with its own later guesses.
value V       the critic's guess of the return, made *before* the token is chosen: 3 is the guess
              after reading "the". After the end it is 0. The critic is a second model, which
              learns to predict; "better than expected" is measured by it.
advantage A   how much better an action turned out than expected: positive ones are made likelier,
              negative ones less likely. Without the comparison, every token of a good response
              would be praised, and the praise would drown in noise.
delta         one step of surprise: r_t + V(s_{t+1}) - V(s_t), where s_t is the text before token
              t: what is expected after the choice of token t, less what was expected before.
GAE           generalized advantage estimation: A_t = delta_t + lambda A_{t+1}, the sum of the
              surprises from t on, each discounted by lambda per step. From the end, with 1/2:
              A("<eos>") = 3 + 0 - 1 = 2; A(".") = (0 + 1 - 2) + 2/2 = 0; A("nice") = (0 + 2 - 1)
              + 0/2 = 1.
lambda        the trade-off. 0: trust the critic, look one step ahead: little noise, but all of the
              critic's errors (*bias*). 1: trust the return, use the critic as baseline only: no
              bias, all the noise. In between, news from d steps ahead arrives times lambda^d. The
              sum of all lambda^d is 1 / (1 - lambda), so that is about how many steps credit
              reaches: the *horizon*, 20 for .95.
gamma         a discount of the rewards themselves; 1 here, for a late score counts in full.
whitening     advantages are shifted and scaled to mean 0 and variance 1 over the batch: step sizes
              then do not depend on the units of the score. After the returns are taken, for the
              critic must predict real rewards.
ratio         pi(a) / pi_old(a), the token's probability now over that when it was sampled. The
              loss is -ratio x A. Before the first update the ratio is 1 everywhere, but its
              gradient is not 0: d(pi / pi_old) = (pi / pi_old) d log pi, so it is that of log pi.
              The value of the loss says nothing about progress; only its slope is used.
clip          once the ratio has left 1 +- 0.2 in the direction that A asks for, the gradient is cut
              off: a few responses must not carry the policy far from where they were sampled. With
              one update per rollout (one batch of samples), the default, this never happens.

Why should fewer decisions help? The score is earned at the end, and has to travel back to the
early tokens *through the critic's guesses*: each decision on the way multiplies it by lambda, and
fills the rest up with the critic's opinion. Over 80 tokens at .95 next to nothing arrives (.95^80 =
.02): the early tokens learn what the critic thinks. And a bad critic thinks nonsense: it started as
a reward model that was only ever read at the end of a response. With macro actions of 5 tokens
there are 16 decisions (.95^16 = .44), which is a longer horizon in tokens. But lambda = .95^(1/5)
at token level has that horizon too, for (lambda^(1/n))^n = lambda. That is the arm `control`: what
macro actions do beyond it, such as averaging the critic's noise (1 and 3 above became 2), shows in
the difference of the two.

The equation, and the whole difference (k counts macro actions, R_k and V_k are pooled from tokens):

    token   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)      A_t = delta_t + gamma lambda A_{t+1}
    macro   delta_k = R_k + gamma V_{k+1}    - V_k         A_k = delta_k + gamma lambda A_{k+1}

    python ma_ppo.py                                # SFT, RM, two arms, curves: minutes on a CPU
    python ma_ppo.py --arms token fixed control     # with the control experiment
    python ma_ppo.py --arms fixed --n 10 --out runs/n10
    python ma_ppo.py --task toy-code                # programs, rewarded by unit tests: no RM
    torchrun --nproc_per_node=2 ma_ppo.py           # the same run on two processes

Look at rm_score in the bar, and at runs/toy/curves.png: `fixed` rises before `token`.
Source: Chai et al., MA-RLHF, ICLR 2025, section 3; PPO: Schulman et al., 2017; GAE: 2016.

Contents
    the story     Config, train: the algorithm in six steps, then the functions of each step
    Appendix A    models, prompts and stages that are missing
    Appendix B    what is logged
    Appendix C    settings that cannot work
You may stop reading at Appendix A.
"""

import copy
import gc
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
from torch.distributed.elastic.multiprocessing.errors import record

import reward
import segment
import sft
from segment import pool
from sft import opt, print0


@dataclass
class Config(sft.Config):
    """Settings of the PPO chapter. Values without a source were found on the toy.

    An *arm* is one training of a comparison. All arms start from the same models, and all but
    `rloo`, which needs several responses to each prompt, also share prompts and noise.
    """

    arms: list[str] = opt(
        ["token", "fixed"],
        "trainings to compare: terminations of chapter 3, control (token with lam^(1/n)), or rloo",
        "--terminations",
    )
    n: int = opt(5, "tokens in a macro action of `fixed`; lambda of `control` (paper: 5; code: 10)")
    steps: int = opt(60, "PPO steps: one rollout of the whole batch, then ppo_epochs updates")
    batch_size: int = opt(64, "responses per step, over all ranks (paper: 256)")
    micro_batch_size: int = opt(64, "responses per forward pass and rank: memory, not the result")
    sort_by_length: bool = opt(False, "micro-batches of like length: less padding, other rounding")
    sample_batch_size: int = opt(0, "responses sampled at once by a rank; 0: all of its share")
    lr: float = opt(5e-4, "learning rate of the policy, constant after the warm-up")
    critic_lr: float = opt(1e-3, "learning rate of the critic")
    warmup: int = opt(
        10, "number of steps in which the policy's rate rises; the critic learns at once"
    )
    gamma: float = opt(1.0, "discount per action, macro action or token (paper: 1)")
    lam: float = opt(0.95, "GAE's lambda, per action like gamma; control: lam^(1/n) (paper: 0.95)")
    beta: float = opt(0.05, "weight of the KL penalty, reward per nat (paper: 0.05)")
    clip: float = opt(0.2, "PPO's clipping range, of the ratio and of the value (paper: 0.2)")
    ppo_epochs: int = opt(1, "updates per rollout (paper: 1; then no ratio is ever clipped)")
    no_eos_score: float = opt(-4.0, "score of a response that does not end: a bad RM score")
    temperature: float = opt(1.0, "of sampling, and of every log-probability (paper: 0.8)")
    top_k: int = opt(0, "sample from the k likeliest tokens only (paper: 50); 0: from all")
    top_p: float = opt(1.0, "sample from the likeliest tokens that make up this probability")
    # Variants of the method.
    sigma: str = opt("equal", "value of a macro action: equal, last, decay or first (paper: equal)")
    macro_reward: str = opt("sum", "reward of a macro action: sum (paper) or mean (reference code)")
    critic_lam: float | None = opt(None, "lambda of the returns that the critic learns; none: lam")
    critic_epochs: int | None = opt(None, "the critic's updates per rollout; none: ppo_epochs")
    critic_steps: int = opt(0, "how many of the steps, the first ones, only teach the critic")
    value_clip: float | None = opt(
        None, "clipping range of the value, 0 for none; none given: clip"
    )
    rloo_k: int = opt(4, "rloo: responses to each of batch_size / rloo_k prompts, in as many steps")
    ratio: str = opt("token", "probability ratio per token, or per macro action (paper's formula)")
    # Where models come from, and go to.
    model: str = opt("", "what sft.py starts from, if OUT/sft has to be made")
    sft: str = opt("", "SFT model: policy and reference; empty: OUT/sft, made if missing")
    reward_model: str = opt("", "RM: the score, and the critic's start; empty: OUT/reward")
    trust_programs: bool = opt(False, "apps: run programs without bubblewrap, under limits only")
    save_every: int = opt(20, "steps between checkpoints; 0: only at the end and when interrupted")


@dataclass
class Rollout:
    """What one step knows about its B responses; padding is 0, but for `seg` and `batch`."""

    batch: sft.Batch  # tokens [B, P+T], attention [B, P+T], mask [B, T]
    seeds: list  # B integer lists [seed, step, prompt number(, sample)]
    tokens: list  # B responses, lists of token ids without padding
    texts: list  # B responses, decoded
    logprobs: torch.Tensor = None  # [B, T] log pi of the tokens, under the policy that sampled them
    ref_logprobs: torch.Tensor = None  # [B, T] the same under the reference
    entropy: torch.Tensor = None  # [B, T] nats
    values: torch.Tensor = None  # [B, T] critic's V(s_t), s_t the text in front of token t
    scores: torch.Tensor = None  # [B] RM score, or that of the unit tests, or no_eos_score
    gold: list = None  # B gold scores, None where the task has none
    passed: torch.Tensor = None  # [B] whether all unit tests passed, None where there are none
    starts: torch.Tensor = None  # [B, T] True where a macro action begins
    seg: torch.Tensor = None  # [B, T] number of the macro action that each token belongs to
    parse_fallback: float = 0.0  # share of sentences or programs that could not be parsed
    advantages: torch.Tensor = None  # [B, T] whitened
    returns: torch.Tensor = None  # [B, T] what the critic is taught
    explained_variance: float = None  # how well it knew the rewards to come


def train(arm, out, cfg, device):
    """PPO with one kind of macro action: the algorithm, in six steps."""
    models, optimizers, tokenizer = load_models(arm, cfg, device)
    prompts = load_prompts(tokenizer, cfg)
    cfg.steps = sft.count_steps(cfg, len(prompts))
    print0(f"PPO, arm {arm}: {len(prompts):,} prompts, {cfg.steps} steps -> {out}")
    check_sampling(models["policy"], prompts[:2], tokenizer, cfg)
    run = sft.Run(cfg, out, arm, models, optimizers)
    run.begin()  # at step 0, or where an interrupted run was
    settings = asdict(cfg) | {"arm": arm, "ranks": sft.world()}
    sft.on_rank0(sft.write_json, out / "config.json", settings)
    for step in run.steps():
        clock = [sft.tick(device)]
        examples = choose_prompts(arm, prompts, step, cfg)  # this rank's share
        # 1. The policy writes a response to each prompt.
        rollout = sample(models["policy"], examples, step, tokenizer, cfg)
        clock.append(sft.tick(device))
        # 2. The four models judge: how likely is each token, what is expected, what is the score?
        first_pass = judge(rollout, models, examples, tokenizer, cfg)  # step 6 can go on from it
        clock.append(sft.tick(device))
        # 3. The responses are cut into macro actions.
        cut(arm, rollout, tokenizer, cfg)
        # 4. Each token gets its reward: the KL penalty, and the last one the score.
        logprobs, ref_logprobs = rollout.logprobs, rollout.ref_logprobs  # [B, T]
        mask = rollout.batch.mask  # [B, T]
        rewards = token_rewards(rollout.scores, logprobs, ref_logprobs, mask, cfg.beta)  # [B, T]
        # 5. Each action gets its advantage: how much better was it than expected?
        assign_credit(arm, rollout, rewards, cfg)
        clock.append(sft.tick(device))
        # 6. The policy makes good actions likelier; the critic learns to expect what came.
        losses = improve(rollout, models, optimizers, step, cfg, first_pass)
        clock.append(sft.tick(device))
        log(run, step, rollout, examples, losses, clock, tokenizer)
    sft.save_models([models["policy"], tokenizer], out / "model")
    sft.write_result(out, cfg, {"arm": arm})  # run.json: from here on the folder is complete


# Step 1. Sampling.


def choose_prompts(arm, prompts, step, cfg):
    """This rank's share of the step's prompts; in `rloo` each comes rloo_k times."""
    copies = cfg.rloo_k if arm == "rloo" else 1
    chosen = sft.batch_rows(prompts, step, cfg.batch_size // copies, cfg.seed)
    examples = [example | {"sample": i} for example in chosen for i in range(copies)]
    return sft.my_share(examples)


def sample(policy, examples, step, tokenizer, cfg):
    """Sample a response to each prompt -> Rollout.

    The noise of a response is a function of (seed, step, prompt number), and in `rloo` of the
    sample's number, of nothing else. So a run repeats itself exactly, on any number of ranks, and
    arms that are given the same prompts meet the same luck.
    """
    seeds = []
    for example in examples:
        copy_number = [example["sample"]] if example.get("sample") else []
        seeds.append([cfg.seed, step, example["number"], *copy_number])
    uniforms = np.array([np.random.default_rng(seed).random(cfg.max_response) for seed in seeds])
    uniforms = torch.tensor(uniforms)  # [B, max_response]
    prompts = [example["prompt"] for example in examples]
    responses = [None] * len(prompts)
    # Writing a token takes a GPU equally long for 8 rows as for 256, so all are sampled at once, or
    # as many as the cache has room for; those of similar length together, to have less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for part in sft.micro_slices(len(order), cfg.sample_batch_size or len(order)):
        rows = order[part]
        chosen = [prompts[i] for i in rows]
        written = generate(policy, chosen, uniforms[rows], tokenizer, cfg)
        for i, response in zip(rows, written, strict=True):
            responses[i] = response
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, policy.device)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout(batch, seeds, responses, texts)


@torch.no_grad()
def generate(model, prompts, uniforms, tokenizer, cfg):
    """Write a response to each prompt, token by token.

    The keys and values of earlier tokens are kept in a cache and read again, so that each step
    computes one new token per row.

    prompts: B token lists; uniforms: float64 tensor [B, max_response], the randomness of each row.
    A row's response depends on its own prompt and uniforms only, not on its batch. Returns B token
    lists, which end in EOS unless cut.
    """
    responses = [[]] * len(prompts)
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, model.device)
    tokens, attention = batch.tokens[:, :-1], batch.attention[:, :-1]  # [B, P]
    place = sft.positions(attention)  # [B, P]
    cache, sampled = None, []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)  # [B]
    ends = torch.tensor(sft.end_ids(tokenizer), device=model.device)  # any of them ends a response
    columns = uniforms.to(model.device).T  # [max_response, B]
    with sft.autocast(model, cache=True):  # weights are cast once, not for every token
        for u in columns:  # [B]
            output = model(  # cache: called past_key_values before transformers 5.24
                input_ids=tokens,
                attention_mask=attention,
                position_ids=place,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.cache
            logits = sft.possible(output.logits[:, -1].float(), model)  # [B, V]
            logprobs = shaped(logits, cfg)  # [B, V]
            tokens = draw(logprobs, u)[:, None]  # [B, 1]
            sampled.append(tokens)
            done |= torch.isin(tokens.squeeze(1), ends)
            if everywhere(done.all(), model):
                break
            attention = torch.cat([attention, torch.ones_like(tokens)], 1)  # [B, P+t+1]
            place = place[:, -1:] + 1  # [B, 1]
    rows = torch.cat(sampled, 1).tolist()
    return [up_to_end(row, sft.end_ids(tokenizer)) for row in rows]


def up_to_end(row, ends):
    """A sampled row up to its first end mark; rows that end early were sampled on for nothing."""
    for place, token in enumerate(row):
        if token in ends:
            return row[: place + 1]
    return row


def everywhere(done, model):
    """Whether sampling may stop: this rank is done; with a sharded model, all ranks are."""
    if sft.is_sharded(model):
        return float(sft.all_sum(float(done))) == sft.world()
    return bool(done)


def shaped(logits, cfg, keep=None):
    """Log-probabilities after temperature, top-k and top-p.  [..., V] -> [..., V]

    There must be one distribution, both sampled from and scored: a ratio or KL between the sampled
    distribution and another one would be wrong from the first step.
    keep: BoolTensor [..., V] of allowed tokens; by default those that the logits themselves allow.
    """
    logits = logits / cfg.temperature  # [..., V]
    if cfg.top_k or cfg.top_p < 1:
        keep = allowed(logits, cfg.top_k, cfg.top_p) if keep is None else keep
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.log_softmax(-1)


def allowed(logits, top_k, top_p):
    """Which tokens top-k and top-p leave.  logits: [..., V] -> BoolTensor [..., V]"""
    keep = torch.ones_like(logits, dtype=torch.bool)  # [..., V]
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]  # [..., 1]
        keep &= logits >= least
    if top_p < 1:
        probs = logits.masked_fill(~keep, -torch.inf).softmax(-1)  # [..., V]
        probs, order = probs.sort(-1, descending=True)  # [..., V]
        # A token stays if those before it do not yet make up top_p.
        inside = probs.cumsum(-1) - probs < top_p  # [..., V]
        keep &= torch.zeros_like(keep).scatter(-1, order, inside)
    return keep


def draw(logprobs, uniforms):
    """Sample by inverting the cumulative distribution.  [B, V], [B] -> LongTensor [B]

    The token is where the running sum of the probabilities passes the row's uniform number.
    """
    cdf = logprobs.double().exp().cumsum(-1)  # [B, V]; double: 100,000 small numbers must add up
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)  # [B]
    return drawn.clamp(max=logprobs.shape[1] - 1)  # NaN has no place: the update will be skipped


# Step 2. Judging.


@torch.no_grad()
def judge(rollout, models, examples, tokenizer, cfg):
    """Ask policy and reference for log-probabilities, the critic for values, the RM for scores.

    The first update of policy and critic needs their passes again, with the same weights. If all
    rows are one micro-batch, each is made once: returned are {"policy": log-probabilities [b, T],
    "critic": values [b, T]}, laid out as in `micro_batches`, with the activations that a backward
    pass needs. The activations of several micro-batches may not fit into memory: then {}.
    """
    blank = torch.zeros(rollout.batch.mask.shape, device=rollout.batch.mask.device)  # [B, T]
    rollout.logprobs = blank.clone()
    rollout.ref_logprobs = blank.clone()
    rollout.entropy = blank.clone()
    rollout.values = blank.clone()
    parts = micro_batches(rollout.batch, cfg.micro_batch_size, cfg.sort_by_length)
    for rows, batch in parts:
        T = batch.mask.shape[1]  # of this part: b rows of similar length
        first_pass = {}
        with torch.set_grad_enabled(len(parts) == 1):
            logprobs, every, keep = token_logprobs(models["policy"], batch, cfg)  # [b, T]
            first_pass["policy"] = logprobs
            if "critic" in models:  # rloo has none
                first_pass["critic"] = state_values(models["critic"], batch)  # [b, T]
        # The reference is asked about the same allowed tokens: else one that only the policy
        # allows would cost infinite KL.
        ref_logprobs, _, _ = token_logprobs(models["reference"], batch, cfg, keep)  # [b, T]
        rollout.logprobs[rows, :T] = logprobs
        rollout.ref_logprobs[rows, :T] = ref_logprobs
        rollout.entropy[rows, :T] = torch.special.entr(every.exp()).sum(-1) * batch.mask
        if "critic" in models:
            rollout.values[rows, :T] = first_pass["critic"] * batch.mask
    score(rollout, models, examples, tokenizer, cfg)
    return first_pass if len(parts) == 1 else {}


def micro_batches(batch, size, sort=False):
    """A batch in parts of at most `size` rows: a list of (row numbers LongTensor [b], Batch).

    sort (--sort_by_length): rows of similar length together, without the columns in which all have
    padding. These would be computed and thrown away. It changes nothing but the rounding of sums,
    and is off by default so that published numbers repeat to the last digit.
    """
    count, T = batch.mask.shape
    P = batch.attention.shape[1] - T
    prompts = batch.attention[:, :P].sum(1).tolist()  # lengths in tokens
    responses = batch.mask.sum(1).tolist()
    order = list(range(count))
    if sort:
        order.sort(key=lambda i: prompts[i] + responses[i])
    parts = []
    for part in sft.micro_slices(count, size):
        numbers = order[part]
        rows = torch.tensor(numbers, device=batch.mask.device)  # [b]
        left, right = 0, T
        if sort:
            left = P - max(prompts[i] for i in numbers)
            right = max(responses[i] for i in numbers)
        tokens = batch.tokens[rows, left : P + right]  # [b, columns]
        attention = batch.attention[rows, left : P + right]  # [b, columns]
        parts.append((rows, sft.Batch(tokens, attention, batch.mask[rows, :right])))
    return parts


def token_logprobs(model, batch, cfg, keep=None):
    """Log-probabilities of the response tokens, and of everything that could have stood there.

    keep: BoolTensor [B, T, V] of allowed tokens; by default those that this model's own logits
    allow, plus the sampled token, which rounding may have pushed over the edge.
    Returns ([B, T] masked, [B, T, V], keep).
    """
    logits = sft.response_logits(model, batch)  # [B, T, V]
    responses = batch.responses[..., None]  # [B, T, 1]
    if keep is None and (cfg.top_k or cfg.top_p < 1):
        keep = allowed(logits.detach() / cfg.temperature, cfg.top_k, cfg.top_p)
        keep = keep.scatter(-1, responses, True)  # [B, T, V]
    every = shaped(logits, cfg, keep)  # [B, T, V]
    return every.gather(-1, responses).squeeze(-1) * batch.mask, every, keep


def state_values(critic, batch):
    """The critic's V(s_t), read at the token in front of response token t.  -> [B, T]"""
    return critic(batch)[:, -batch.mask.shape[1] - 1 : -1]  # [B, T]


def score(rollout, models, examples, tokenizer, cfg):
    """The score of each response: the RM's, or that of its unit tests.

    A response that was cut before its end mark gets no_eos_score: the RM has never judged half an
    answer, and a policy that never stops must not be paid for it.
    """
    stopped = ended(rollout.batch, tokenizer)  # [B]
    if "problem" in examples[0]:
        problems = [example["problem"] for example in examples]
        scores = torch.tensor(reward.program_rewards(rollout.texts, problems))  # [B]
        scores = scores.to(stopped.device)
        rollout.passed = (scores == 1) & stopped  # [B]
    else:
        scores = torch.zeros(len(examples), device=stopped.device)  # [B]
        for rows, batch in micro_batches(rollout.batch, cfg.micro_batch_size, cfg.sort_by_length):
            scores[rows] = reward.last_token_scores(models["reward"], batch)
    rollout.scores = torch.where(stopped, scores, cfg.no_eos_score)  # [B]
    if cfg.task == "toy":
        pairs = zip(examples, rollout.texts, strict=True)
        rollout.gold = [reward.gold_score(example["facts"], text) for example, text in pairs]


def ended(batch, tokenizer):
    """Which responses contain an end mark.  -> BoolTensor [B]"""
    ends = torch.tensor(sft.end_ids(tokenizer), device=batch.mask.device)
    return (torch.isin(batch.responses, ends) & batch.mask.bool()).any(1)


# Step 3. Macro actions.


def cut(arm, rollout, tokenizer, cfg):
    """Mark where macro actions begin (chapter 3), and number them.

    `control` and `rloo` are no terminations: their actions are single tokens.
    """
    responses = segment.Responses(
        mask=rollout.batch.mask,
        tokens=rollout.tokens,
        tokenizer=tokenizer,
        ref_logprobs=rollout.ref_logprobs,
        seeds=[np.random.SeedSequence(seed).generate_state(1)[0] for seed in rollout.seeds],
        n=cfg.n,
    )
    termination = "token" if arm in ("control", "rloo") else arm
    rollout.starts, rollout.parse_fallback = segment.macro_starts(termination, responses)
    rollout.seg = segment.segment_ids(rollout.starts, rollout.batch.mask)  # [B, T]


# Step 4. Rewards.


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """The KL penalty at every token, plus the score at the last real one.  -> [B, T]

    scores: [B]; logprobs, ref_logprobs, mask: [B, T]; beta: reward per nat, the unit of natural
    logarithms. The sum of log pi - log pi_ref over a sampled response is an unbiased estimate of
    the KL divergence. The score lands on the last *real* token, the end mark: in a padded row the
    last column lies after the end, where nothing was decided, and the mask would drop the score.

    >>> mask = torch.tensor([[1, 1, 0]])  # a response of two tokens, and padding
    >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -2, 0]]), torch.tensor([[-3.0, -2, 0]])
    >>> token_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, mask, beta=0.5).int().tolist()
    [[-1, 3, 0]]
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask  # [B, T]
    last = (mask.sum(1, keepdim=True).long() - 1).clamp(min=0)  # [B, 1]
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))  # [B, T]


# Step 5. Credit. These two functions are what the paper is about: read them side by side.


def token_gae(rewards, values, mask, gamma, lam):
    """Advantages and returns per token (GAE).

    rewards, values, mask: [B, T]; gamma, lam: per token. Returns (advantages, returns), [B, T],
    0 in the padding. The primer's response, lam = 0.5: from the end, A_5 = 3 - 1 = 2,
    A_4 = (0 + 1 - 2) + 0.5 x 2 = 0, A_3 = (0 + 2 - 1) + 0.5 x 0 = 1, and so on.

    >>> rewards = torch.tensor([[0.0, -1, 0, 0, 0, 3]])
    >>> values = torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> token_gae(rewards, values, torch.ones(1, 6), gamma=1.0, lam=0.5)[0].tolist()
    [[0.375, -3.25, 1.5, 1.0, 0.0, 2.0]]
    """
    R = torch.where(mask.bool(), rewards, 0)  # [B, T]
    V = torch.where(mask.bool(), values, 0)  # [B, T], so V after the last real step is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, T]
    returns = A + V  # [B, T]
    return A * mask, returns * mask


def macro_gae(rewards, values, mask, seg, gamma, lam, value_pooling="equal", reward_pooling="sum"):
    """Advantages and returns per macro action, handed to each of its tokens (paper, section 3.2).

    rewards, values, mask: [B, T]; seg: LongTensor [B, T]; gamma, lam: per macro action;
    value_pooling, reward_pooling: see `pool`. Returns (advantages, returns), [B, T], 0 in the
    padding. The primer's response in macro actions of 2, 3 and 1 tokens, lam = 0.5:
    R = (-1, 0, 3), V = (2, 1, 1); A_2 = 3 - 1 = 2, A_1 = (0 + 1 - 1) + 0.5 x 2 = 1,
    A_0 = (-1 + 1 - 2) + 0.5 x 1 = -1.5.

    >>> rewards = torch.tensor([[0.0, -1, 0, 0, 0, 3]])
    >>> values = torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> seg = torch.tensor([[0, 0, 1, 1, 1, 2]])
    >>> macro_gae(rewards, values, torch.ones(1, 6), seg, gamma=1.0, lam=0.5)[0].tolist()
    [[-1.5, -1.5, 1.0, 1.0, 1.0, 2.0]]
    """
    R = pool(rewards, seg, mask, reward_pooling)  # [B, K]
    V = pool(values, seg, mask, value_pooling)  # [B, K], so V after the last macro action is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, K]
    returns = A + V  # [B, K]
    return A.gather(1, seg) * mask, returns.gather(1, seg) * mask


def shift(x):
    """Every column replaced by the one after it, the last by 0.  [B, N] -> [B, N]"""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)  # [B, N]


def discounted_sum(x, factor):
    """y_i = x_i + factor * y_{i+1} along each row, from the end.  [B, N] -> [B, N]"""
    y = torch.zeros_like(x)  # [B, N]
    running = torch.zeros_like(x[:, 0]) if x.shape[1] else None  # [B]
    for i in reversed(range(x.shape[1])):
        running = x[:, i] + factor * running
        y[:, i] = running
    return y


def assign_credit(arm, rollout, rewards, cfg):
    """Advantages and returns of the arm's actions; the advantages are whitened.

    rewards: [B, T]. The returns come first: they stay in units of reward, for the critic.
    """
    mask = rollout.batch.mask  # [B, T]
    if arm == "rloo":
        advantages = rloo_advantages(rollout, cfg)  # [B, T]
    else:
        rollout.explained_variance = explained_variance(rewards, rollout.values, mask)
        advantages, rollout.returns = estimate(arm, rollout, rewards, cfg.lam, cfg)  # [B, T]
        if cfg.critic_lam is not None:  # the critic may be taught with a lambda of its own
            _, rollout.returns = estimate(arm, rollout, rewards, cfg.critic_lam, cfg)
    rollout.advantages = whiten(advantages, mask)  # [B, T]


def estimate(arm, rollout, rewards, lam, cfg):
    """Advantages and returns of `token_gae` or `macro_gae`, whichever the arm uses.  [B, T] each"""
    mask, values = rollout.batch.mask, rollout.values  # [B, T]
    if arm == "token":
        return token_gae(rewards, values, mask, cfg.gamma, lam)
    if arm == "control":  # the horizon of macro actions of n tokens, without macro actions
        return token_gae(rewards, values, mask, cfg.gamma, lam ** (1 / cfg.n))
    seg = rollout.seg  # [B, T]
    return macro_gae(rewards, values, mask, seg, cfg.gamma, lam, cfg.sigma, cfg.macro_reward)


def rloo_advantages(rollout, cfg):
    """PPO without a critic: a response is compared with the other samples of its prompt.  -> [B, T]

    Leave-one-out (Ahmadian et al., 2024): Q_i is the total reward of response i, and every token of
    it gets A_i = Q_i - mean of the other Q_j. The baseline depends on no action of response i
    (whitening, which follows in every arm, takes off the whole batch's mean as well).

    >>> rollout = Rollout(sft.Batch(None, None, torch.ones(2, 1)), [], [], [])
    >>> rollout.scores = torch.tensor([1.0, 4.0])
    >>> rollout.logprobs, rollout.ref_logprobs = torch.zeros(2, 1), torch.zeros(2, 1)
    >>> rloo_advantages(rollout, Config(rloo_k=2)).tolist()
    [[-3.0], [3.0]]
    """
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)  # [B]
    total = rollout.scores - cfg.beta * kl  # [B]
    everyone = torch.tensor(sft.gather(total.tolist())).view(-1, cfg.rloo_k)  # [prompts, k]
    others = (everyone.sum(1, keepdim=True) - everyone) / (cfg.rloo_k - 1)  # [prompts, k]
    mine = sft.my_share((everyone - others).flatten()).to(total.device)  # [B]
    return mine[:, None] * rollout.batch.mask  # [B, T]


def explained_variance(rewards, values, mask):
    """How much of the differences between returns the critic knows beforehand.  [B, T] each

    1 - Var(G - V) / Var(G) over the real tokens of all ranks, G the sum of the rewards that really
    came. 1: it knows all, up to a constant; 0: no more than their mean; below 0: it would better
    say nothing.
    """
    G = discounted_sum(torch.where(mask.bool(), rewards, 0), 1.0)  # [B, T]
    error = G - values  # [B, T]
    unknown = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((G - masked_mean(G, mask)) ** 2, mask)
    return 1 - unknown / total if total > 0 else 0.0


def whiten(x, mask):
    """Mean 0, variance 1 over the real tokens of all ranks.  [B, T] -> [B, T], 0 in the padding."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask.bool(), (x - mean) / (variance + 1e-8) ** 0.5, 0)  # [B, T]


def masked_mean(x, mask):
    """Mean of x over the real tokens of all ranks, a float."""
    x = torch.where(mask.bool(), x, 0)  # [B, T]
    return float(sft.all_sum(x.sum().double().cpu()) / sft.all_sum(mask.sum()))


# Step 6. Improvement.


def ratios(logprobs, old_logprobs, mask, seg=None):
    """pi / pi_old of each token; with `seg`, of the macro action that it is in.  -> [B, T]

    A macro action's probability is the product of its tokens': logs are added.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0)  # [B, T]
    if seg is not None:
        log_ratio = pool(log_ratio, seg, mask, "sum").gather(1, seg)  # [B, T]
    return log_ratio.exp()


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, seg=None):
    """PPO's clipped objective, averaged over real tokens.  -> scalar

    All [B, T], seg a LongTensor: with it there is one ratio per macro action (the paper's formula).
    A macro action of L tokens then enters the sum L times, with the product of all L ratios.
    """
    ratio = ratios(logprobs, old_logprobs, mask, seg)  # [B, T]
    clipped = ratio.clamp(1 - clip, 1 + clip)  # [B, T]
    advantages = torch.where(mask.bool(), advantages, 0)  # [B, T]
    # The smaller of the two, clip = 0.2. It stops the gradient where A has got what it asks for:
    #     A > 0, ratio above 1.2: 1.2 A, constant        A > 0, ratio below 0.8: ratio x A, goes on
    #     A < 0, ratio below 0.8: 0.8 A, constant        A < 0, ratio above 1.2: ratio x A, goes on
    loss = -torch.min(ratio * advantages, clipped * advantages)  # [B, T]
    return loss.sum() / mask.sum().clamp(min=1)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Clipped squared error of the critic, averaged over real tokens.  All [B, T] -> scalar.

    As for the policy: within one rollout the critic must not run far from what it said before. In
    the first update of a rollout values equal old_values, and nothing is clipped. Mind the unit:
    clip is in units of reward here, where returns may span ten, so that further updates hardly get
    anywhere (hence --value_clip 0 with more --critic_epochs).
    """
    values = torch.where(mask.bool(), values, 0)  # [B, T]
    old_values = torch.where(mask.bool(), old_values, 0)  # [B, T]
    returns = torch.where(mask.bool(), returns, 0)  # [B, T]
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # [B, T]
    loss = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)  # [B, T]
    return loss.sum() / mask.sum().clamp(min=1)


def improve(rollout, models, optimizers, step, cfg, first_pass):
    """Update policy and critic on the whole rollout; returns {metric: number}.

    first_pass: what `judge` returned. It is taken out by the first updates: after them the weights
    are others.
    """
    token_count = float(sft.all_sum(rollout.batch.mask.sum().cpu()))
    learning = step - cfg.critic_steps  # steps since the policy began to learn
    lr = cfg.lr * min(1.0, (learning + 1) / max(1, cfg.warmup))
    if learning <= 0:
        # The policy does not learn yet, or for the first time: then it reads the rollout again, as
        # a check that its ratio is 1.
        first_pass.pop("policy", None)
    policy_totals, value_totals, ratio_stats = [], [], []
    for epoch in range(cfg.ppo_epochs if learning >= 0 else 0):
        seen = []  # what the ratios of this epoch's micro-batches were
        known = first_pass.pop("policy", None)
        # Functions: `update` computes their losses one after the other, each with a backward pass.
        losses = policy_losses(rollout, models["policy"], token_count, cfg, seen, known)
        policy_totals.append(sft.update(models["policy"], optimizers["policy"], losses, lr))
        ratio_stats += [stats | {"epoch": epoch} for stats in seen]
    for _ in range(updates_of_critic(cfg) if "critic" in models else 0):
        known = first_pass.pop("critic", None)
        losses = value_losses(rollout, models["critic"], token_count, cfg, known)
        total = sft.update(models["critic"], optimizers["critic"], losses, cfg.critic_lr)
        value_totals.append(total)
    return {
        "policy_loss": sum(policy_totals) / len(policy_totals) if policy_totals else None,
        "value_loss": sum(value_totals) / len(value_totals) if value_totals else None,
    } | ratio_metrics(ratio_stats)


def updates_of_critic(cfg):
    """How often the critic learns from a rollout: by default as often as the policy."""
    return cfg.ppo_epochs if cfg.critic_epochs is None else cfg.critic_epochs


def policy_losses(rollout, policy, token_count, cfg, seen, known):
    """A function for each micro-batch that computes its share of the policy loss.

    Each appends a dict about its ratios to the list `seen`. known: the log-probabilities [b, T] of
    the only micro-batch, if `judge` has them; else None.
    """

    def one_loss(rows, batch):
        """The loss of the responses with these row numbers [b]."""
        T = batch.mask.shape[1]
        old = rollout.logprobs[rows, :T]  # [b, T]
        advantages = rollout.advantages[rows, :T]  # [b, T]
        seg = rollout.seg[rows, :T] if cfg.ratio == "macro" else None  # [b, T]
        logprobs = known  # [b, T]
        if known is None:
            logprobs, _, _ = token_logprobs(policy, batch, cfg)
        ratio = ratios(logprobs.detach(), old, batch.mask, seg)  # [b, T]
        counted = batch.mask if seg is None else rollout.starts[rows, :T]  # one per macro action
        seen.append(describe_ratios(ratio[counted.bool()], cfg.clip))
        loss = policy_loss(logprobs, old, advantages, batch.mask, cfg.clip, seg)
        return loss * batch.mask.sum() / token_count

    parts = micro_batches(rollout.batch, cfg.micro_batch_size, cfg.sort_by_length)
    return [partial(one_loss, rows, batch) for rows, batch in parts]


def value_losses(rollout, critic, token_count, cfg, known):
    """A function for each micro-batch that computes its share of the value loss.

    known: the values [b, T] of the only micro-batch, if `judge` has them; else None.
    """

    def one_loss(rows, batch):
        """The loss of the responses with these row numbers [b]."""
        T = batch.mask.shape[1]
        values = state_values(critic, batch) if known is None else known  # [b, T]
        old, returns = rollout.values[rows, :T], rollout.returns[rows, :T]  # [b, T]
        clip = cfg.clip if cfg.value_clip is None else cfg.value_clip
        loss = value_loss(values, old, returns, batch.mask, clip or math.inf)
        return loss * batch.mask.sum() / token_count

    parts = micro_batches(rollout.batch, cfg.micro_batch_size, cfg.sort_by_length)
    return [partial(one_loss, rows, batch) for rows, batch in parts]


def main(argv=None):
    """Make the SFT model and the RM if they are missing, train every arm from them, draw."""
    try:
        cfg = parse(argv)
        device = sft.setup(cfg.device, cfg.timeout)  # join the other ranks, if there are any
        sft.record_rows(cfg)  # so that a changed file is noticed later
        folders = [sft.claim(Path(cfg.out) / arm) for arm in cfg.arms]  # held against other runs
        build_missing_stages(cfg)  # chapters 1 and 2, where their folders are not there yet
        for arm, folder in zip(cfg.arms, folders, strict=True):
            if not sft.finished(cfg, folder):  # --resume auto
                train(arm, folder, cfg, device)
        draw_curves(folders, cfg)  # chapter 5
    except sft.StorageError as error:
        sft.fail_together(error)


# Appendix A. Models, prompts and stages.
#
# PPO needs four models and prompts that nobody has learned from. Where the SFT model or the RM is
# missing, the earlier chapters are run for it, so that one command goes from nothing to a picture.


def load_models(arm, cfg, device):
    """Policy and reference start from the SFT model, critic and RM from the RM.

    The critic starts from the RM because what is expected of a response is close to what it will
    be scored. Programs have no RM: there the critic is the SFT model's trunk under a fresh head.
    `rloo` has no critic.
    Returns ({name: model}, {name: optimizer} of the two that learn, tokenizer).
    """
    place = sft.load_device(cfg, device)
    length = cfg.max_prompt + cfg.max_response
    gc.collect()  # what is left of an arm or stage before would take a GPU's memory from this one
    policy, tokenizer = sft.load_causal_lm(cfg.sft, length, place)
    models = {"policy": policy, "reference": copy.deepcopy(policy).requires_grad_(False)}
    make_ready(models, cfg, device)  # with --shard the CPU holds two models at a time, not four
    others = {}
    if cfg.task not in sft.PROGRAMS:
        rm = reward.ScalarModel.load(cfg.reward_model, place)
        reward.check_vocabulary(rm, cfg.reward_model, tokenizer)
        others["reward"] = copy.deepcopy(rm).requires_grad_(False)
    if arm != "rloo":
        others["critic"] = reward.start_model(cfg, device)[0] if cfg.task in sft.PROGRAMS else rm
    make_ready(others, cfg, device)
    models |= others
    learning = [name for name in ("policy", "critic") if name in models]
    optimizers = {name: sft.make_optimizer(models[name]) for name in learning}
    return models, optimizers, tokenizer


def make_ready(models, cfg, device):
    """Make models equal on all ranks, and set them up for `device`."""
    for model in models.values():
        sft.broadcast_parameters(model)
        sft.prepare(model, cfg, device)


def load_prompts(tokenizer, cfg):
    """The PPO share's prompts, once each: {number, text, prompt (token list), ...}.

    A toy prompt has its post's {facts} as well, a program's its unit tests {problem}.
    """
    fields = ("problem",) if cfg.task in sft.PROGRAMS else ()
    rows = {}
    for row in sft.load_share(cfg, "ppo", *fields):
        rows.setdefault(row["prompt"], row)
    rows = list(rows.values())
    sft.announce(tokenizer, cfg)
    rows = sft.usable_rows(rows, tokenizer, cfg, ["prompt"])
    encoded = sft.encode(rows, tokenizer, cfg, ["prompt"])
    prompts = []
    for number, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        known = {name: row[name] for name in ("facts", "problem") if name in row}
        prompts.append({"number": number, "text": row["prompt"], "prompt": ids["prompt"]} | known)
    return prompts


@torch.no_grad()
def check_sampling(policy, prompts, tokenizer, cfg):
    """Refuse a model that samples from another distribution than the one that is scored.

    `generate` reads keys and values from a cache, and skips padding by position ids. Not every
    architecture keeps its memory in that way, and one that does not goes wrong in silence. So two
    prompts get eight tokens each, and the logits that these were drawn from are compared with those
    of a forward pass over the whole text, without a cache.
    """
    uniforms = torch.full((len(prompts), min(8, cfg.max_response)), 0.5, dtype=torch.float64)
    texts = [example["prompt"] for example in prompts]
    seen = []  # a [b, V] for every token
    hook = policy.register_forward_hook(lambda *args: seen.append(args[-1].logits[:, -1].float()))
    try:
        responses = generate(policy, texts, uniforms, tokenizer, cfg)
    except TypeError as error:  # its forward function wants other arguments
        sft.fail(f"--sft {cfg.sft}: cannot sample from a {type(policy).__name__}: {error}")
    finally:
        hook.remove()
    batch = sft.make_batch(texts, responses, tokenizer.pad_token_id, policy.device)
    whole = sft.response_logits(policy, batch)  # [b, t, V]
    usable = whole[0, 0] > -1e8  # [V], without ids that stand for no token
    whole = whole[..., usable]  # [b, t, usable]
    cached = torch.stack(seen[: whole.shape[1]], 1)[..., usable]  # [b, t, usable]
    wrong = (cached - whole).std(-1) / whole.std(-1)  # [b, t] share of the logits' spread
    most = 0.2 if policy.bf16 else 0.01  # bf16 rounds more
    if ((wrong > most) & batch.mask.bool()).any():
        name = type(policy).__name__
        sft.fail(f"--sft {cfg.sft}: a {name} samples other tokens with its cache than without")


# Settings that a stage takes over; and those in which a finished stage must agree with this run.
SHARED = (
    *("seed", "data", "split", "skip_bad_rows", "chat_template", "max_prompt", "max_response"),
    *("device", "precision", "gradient_checkpointing", "compile", "shard"),
    *("resume", "keep", "override", "max_skipped", "timeout"),
)
SHAPING = ("task", "data", "split", "model", "chat_template", "max_prompt", "max_response")


def build_missing_stages(cfg):
    """Run the earlier chapters, with their own defaults, for models that do not exist yet."""
    if not cfg.sft:
        cfg.sft = str(Path(cfg.out) / "sft")
        run_stage(sft, cfg.sft, cfg)
    if not cfg.reward_model and cfg.task not in sft.PROGRAMS:
        cfg.reward_model = str(Path(cfg.out) / "reward")
        run_stage(reward, cfg.reward_model, cfg, sft=cfg.sft)


def run_stage(chapter, out, cfg, **paths):
    """Run a chapter for the folder `out`, unless its finished run is there already."""
    name = chapter.__name__
    flags = stage_flags(chapter, out, cfg, paths)
    stage = sft.parse(chapter.Config, name, flags)
    if (Path(out) / "run.json").exists():
        check_stage(chapter, out, stage, cfg)
    else:
        print0(f"{out} is missing; making it: python {name}.py {shlex.join(flags)}")
        chapter.train(stage)


def stage_flags(chapter, out, cfg, paths):
    """The command line that makes a stage; it takes over the settings that are SHARED."""
    flags = ["--task", cfg.task, "--out", out]
    flags += ["--preset", cfg.preset] if cfg.preset else []
    flags += ["--model", cfg.model] if cfg.model else []
    flags += ["--data", *cfg.data] if cfg.data else []
    for flag, path in paths.items():
        flags += [f"--{flag}", path]
    usual = sft.parse(chapter.Config, chapter.__name__, flags)
    for setting in SHARED:
        value = getattr(cfg, setting)
        if value != getattr(usual, setting):
            values = value if isinstance(value, list) else [value]
            flags += [f"--{setting}", *map(str, values)]
    return flags


def check_stage(chapter, out, stage, cfg):
    """Refuse a finished stage that was made for other rows, or other tokens; say what it is."""
    made = sft.on_rank0(sft.read_json, Path(out) / "run.json")["config"]
    differences = []
    for name in SHAPING:
        if name == "model" and (chapter is reward or not cfg.model):
            continue  # the RM only records it; and without --model any SFT model will do
        old, new = made.get(name), getattr(stage, name)
        if name == "data":
            old, new = [[os.path.realpath(path) for path in files] for files in (old, new)]
        if name in made and old != new:
            differences.append(f"--{name} {made[name]!r}, not {getattr(stage, name)!r}")
    if made.get("rows_sha256", cfg.rows_sha256) != cfg.rows_sha256:
        differences.append("other rows in the same files")
    if differences:
        reasons = "; ".join(differences)
        sft.fail_together(f"{out} was made with {reasons}: choose another --out, or remove it")
    base = Path(cfg.sft) / "run.json"
    newer = base.exists() and base.stat().st_mtime > (Path(out) / "run.json").stat().st_mtime
    if chapter is reward and newer:
        print0(f"warning: {out} is older than {cfg.sft}; to make it anew from that, remove it")
    # A short trial should not pass unnoticed.
    size = f"{made['steps']} steps of {made['batch_size']}"
    print0(f"using {out}: seed {made['seed']}, {size}, lr {made['lr']}")


def draw_curves(folders, cfg):
    """Hand the finished runs on to chapter 5, as a command: nothing here may import it."""
    if sft.rank() == 0:
        flags = ["curves", "--run", *map(str, folders), "--png", str(Path(cfg.out) / "curves.png")]
        print0(f"drawing: python eval.py {shlex.join(flags)}")
        script = Path(__file__).with_name("eval.py")
        hidden = ("RANK", "WORLD_SIZE")  # it must not wait for other ranks
        alone = {name: value for name, value in os.environ.items() if name not in hidden}
        subprocess.run([sys.executable, script, *flags], check=True, env=alone)


# Appendix B. What is logged.
#
# metrics.jsonl has a line per step, measured on the rollout before the step's update (losses and
# ratios: during it); samples.jsonl has four responses of every tenth step, token by token with
# their credit. results/README.md defines every measure.

PHASES = ("sample", "judge", "credit", "update")


def log(run, step, rollout, examples, losses, clock, tokenizer):
    """Write this step's metrics, and now and then some responses."""
    seconds = sft.timings(clock, PHASES)
    row = {"step": step} | summary(rollout, tokenizer) | losses | seconds
    row |= speeds(rollout, seconds, run.state.models, run.cfg)
    run.log(row, "rm_score", rollout.tokens)
    if step % 10 == 0 or step == run.cfg.steps - 1:
        run.append("samples.jsonl", sample_rows(step, rollout, examples, tokenizer))


def summary(rollout, tokenizer):
    """This step's metrics of the rollout: means over responses, or tokens, of all ranks."""
    columns = {  # a number per response
        "score": rollout.scores,
        "kl": (rollout.logprobs - rollout.ref_logprobs).sum(1),  # [B] nats
        "length": rollout.batch.mask.sum(1),  # [B] tokens
        "ended": ended(rollout.batch, tokenizer),  # [B]
        "macro_actions": rollout.seg.max(1).values + 1,  # [B]
        "entropy": rollout.entropy.sum(1),  # [B] nats
    }
    if rollout.gold:
        columns["gold"] = torch.tensor(rollout.gold)
    if rollout.passed is not None:
        columns["passed"] = rollout.passed
    mean, std = {}, {}
    for name, column in columns.items():
        column = torch.tensor(sft.gather(column.tolist()), dtype=torch.float64)  # [all ranks' B]
        mean[name] = float(column.mean())
        std[name] = float(column.std(correction=0))
    return {
        "rm_score": mean["score"],
        "rm_score_std": std["score"],
        "gold_score": mean.get("gold"),
        "gold_score_std": std.get("gold"),
        "pass_rate": mean.get("passed"),
        "kl": mean["kl"],
        "response_length": mean["length"],
        "eos_rate": mean["ended"],
        "macro_actions": mean["macro_actions"],
        "macro_length": mean["length"] / mean["macro_actions"],
        "parse_fallback": float(sft.all_sum(rollout.parse_fallback)) / sft.world(),
        "entropy": mean["entropy"] / mean["length"],
        "explained_variance": rollout.explained_variance,
    }


def speeds(rollout, seconds, models, cfg):
    """Tokens per second of all ranks: sampled ones, judged ones and those learned from.

    On a GPU of CARDS also model-FLOPs utilisation (mfu_*): which share of what the card could
    compute in that time the models needed. Padding does not count, nor recomputed activations.
    """
    sampled = float(sft.all_sum(rollout.batch.mask.sum().cpu()))
    read = float(sft.all_sum(rollout.batch.attention.sum().cpu()))  # with the prompts
    found = {
        "tokens_per_second_sample": sampled / seconds["seconds_sample"],
        "tokens_per_second_judge": read / seconds["seconds_judge"],
        "tokens_per_second_update": read * cfg.ppo_epochs / seconds["seconds_update"],
    }
    speed = card_speed(models["policy"])
    if speed:
        for phase, count in phase_flops(rollout.batch, models, cfg).items():
            possible = seconds[f"seconds_{phase}"] * speed * sft.world()
            found[f"mfu_{phase}"] = float(sft.all_sum(count)) / possible
    return found


# Multiplications and additions per second in bf16, dense, by the makers' data sheets.
CARDS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def card_speed(model):
    """FLOPs per second that the model's card can do; None where it is unknown, or none is used."""
    if model.device.type != "cuda" or not model.bf16:
        return None
    name = torch.cuda.get_device_name(model.device)
    return next((speed for card, speed in CARDS.items() if card in name), None)


def phase_flops(batch, models, cfg):
    """How many multiplications and additions the models need for this rank's rollout, by phase."""
    once = {name: forward_flops(model, batch) for name, model in models.items()}
    learned = cfg.ppo_epochs * once["policy"] + updates_of_critic(cfg) * once.get("critic", 0)
    at_once = len(batch.mask) <= cfg.micro_batch_size  # then `judge` makes the first passes
    saved = once["policy"] + once.get("critic", 0) if at_once else 0
    return {
        "sample": once["policy"],  # thanks to the cache, no more than for reading the text
        "judge": sum(once.values()),
        "update": 3 * learned - saved,  # forward 1, backward 2: the weights', the inputs' gradients
    }


def forward_flops(model, batch):
    """FLOPs of reading a batch once.  batch: `sft.Batch`; only its real tokens count.

    N weights: each multiplies a number and adds it, 2 N a token (and 6 N where it is trained). The
    output matrix is used for the response's tokens only, as in `sft.response_logits`.
    Attention: in each layer a token's query meets all keys before it, half of the row on average,
    and its values are added up: 2 x 2 x width x length / 2 a token.
    """
    trunk = getattr(model, "trunk", model)
    config = trunk.config
    lengths = batch.attention.sum(1).double()  # [B]
    read, written = float(lengths.sum()), float(batch.mask.sum())  # tokens
    total = 0.0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        looked_up = isinstance(module, torch.nn.Embedding)
        if weight is not None and weight.dim() == 2 and not looked_up:
            tokens = written if module is trunk.get_output_embeddings() else read
            total += 2 * weight.numel() * tokens
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return total + 2 * config.num_hidden_layers * width * float((lengths**2).sum())


def describe_ratios(ratio, clip):
    """What is remembered of a micro-batch's ratios.  ratio: [number of ratios]"""
    return {
        "outside": float(((ratio - 1).abs() > clip).sum()),
        "count": ratio.numel(),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
    }


def ratio_metrics(ratio_stats):
    """The share of ratios outside the clip; of the first epoch's, the one farthest from 1."""
    if not ratio_stats:  # only the critic has learned
        return {"clip_fraction": None, "ratio_first": None}
    outside = float(sft.all_sum(sum(stats["outside"] for stats in ratio_stats)))
    count = float(sft.all_sum(sum(stats["count"] for stats in ratio_stats)))
    extremes = []
    for stats in ratio_stats:
        if stats["epoch"] == 0:
            extremes += [stats["lowest"], stats["highest"]]
    farthest = max(sft.gather(extremes), key=lambda ratio: abs(ratio - 1))
    return {"clip_fraction": outside / count, "ratio_first": farthest}


def sample_rows(step, rollout, examples, tokenizer):
    """Rank 0's first four responses of this step for samples.jsonl, token by token."""
    rows = []
    for i, tokens in enumerate(rollout.tokens[:4] if sft.rank() == 0 else []):
        text, offsets = segment.token_offsets(tokenizer, tokens)
        row = {
            "step": step,
            "prompt": examples[i]["text"],
            "response": rollout.texts[i],
            "rm_score": float(rollout.scores[i]),
            "gold_score": rollout.gold[i] if rollout.gold else None,
            "tokens": tokens,
            "pieces": [text[start:end] for start, end in offsets],
        }
        for name in ("seg", "values", "advantages", "returns"):
            column = getattr(rollout, name)  # [B, T]; rloo has no returns
            row[name] = [0.0] * len(tokens) if column is None else column[i, : len(tokens)].tolist()
        rows.append(row)
    return rows


# Appendix C. Settings that cannot work.
#
# They are refused before anything is computed, by name, with what would work.


def parse(argv):
    """Read and check the settings."""
    cfg = sft.parse(Config, "ma_ppo", argv)
    check_numbers(cfg)
    check_choices(cfg)
    check_arms(cfg)
    check_folders(cfg)
    if cfg.task in sft.PROGRAMS:
        reward.check_sandbox(cfg.task, cfg.trust_programs)
    return cfg


def check_numbers(cfg):
    """Refuse numbers out of range."""
    for name in ("clip", "temperature", "critic_lr", "top_p"):
        if not 0 < getattr(cfg, name) < math.inf:
            sft.fail(f"--{name} must be positive, got {getattr(cfg, name)}")
    at_least = {"n": 1, "ppo_epochs": 1, "critic_epochs": 1, "critic_steps": 0, "value_clip": 0}
    at_least |= {"gamma": 0, "lam": 0, "critic_lam": 0, "beta": 0}
    at_least |= {"top_k": 0, "sample_batch_size": 0}
    for name, least in at_least.items():
        value = getattr(cfg, name)
        if value is not None and not least <= value < math.inf:
            sft.fail(f"--{name} must be {least} or more, got {value}")
    for name in ("gamma", "lam", "critic_lam", "top_p"):
        value = getattr(cfg, name)
        if value is not None and value > 1:
            sft.fail(f"--{name} must be at most 1, got {value}")
    if not cfg.epochs and cfg.critic_steps >= cfg.steps:
        sft.fail(f"--critic_steps must be below --steps {cfg.steps}, got {cfg.critic_steps}")
    if not math.isfinite(cfg.no_eos_score):
        sft.fail(f"--no_eos_score must be a finite number, got {cfg.no_eos_score}")


def check_choices(cfg):
    """Refuse words that name nothing."""
    choices = {
        "sigma": ("equal", "last", "decay", "first"),
        "macro_reward": ("sum", "mean"),
        "ratio": ("token", "macro"),
    }
    for name, words in choices.items():
        if getattr(cfg, name) not in words:
            sft.fail(f"--{name} must be one of {', '.join(words)}, got {getattr(cfg, name)!r}")


def check_arms(cfg):
    """Refuse arms that are unknown, named twice, or cannot run here."""
    known = [*segment.TERMINATIONS, "control", "rloo"]
    for arm in cfg.arms:
        if arm not in known:
            sft.fail(f"--arms must be among {', '.join(known)}, got {arm!r}")
    if not cfg.arms or len(set(cfg.arms)) < len(cfg.arms):
        sft.fail(f"--arms must be different from each other, got {cfg.arms}")
    if "control" in cfg.arms and cfg.gamma != 1:
        sft.fail(f"control has the horizon of fixed at --gamma 1 only, got {cfg.gamma}")
    if "rloo" in cfg.arms and cfg.critic_steps:
        sft.fail("--critic_steps: rloo has no critic, and would learn nothing in these steps")
    if "rloo" in cfg.arms and (cfg.rloo_k < 2 or cfg.batch_size % cfg.rloo_k):
        sft.fail(f"--rloo_k must be at least 2 and divide --batch_size, got {cfg.rloo_k}")
    if "parsing" in cfg.arms:
        try:
            segment.spacy_parser()
        except ImportError as error:
            sft.fail(error)


def check_folders(cfg):
    """Refuse models that are not there."""
    if cfg.reward_model and cfg.task in sft.PROGRAMS:
        sft.fail(f"--reward_model: unit tests give the reward of --task {cfg.task}")
    if cfg.sft and not (Path(cfg.sft) / "config.json").is_file():
        sft.fail(f"--sft must be a model's folder, got {cfg.sft!r}")
    ours = (Path(cfg.reward_model) / reward.HEAD).is_file()
    if cfg.reward_model and not ours and not reward.is_classifier(cfg.reward_model):
        kinds = "a folder of reward.py, or a sequence classifier with one label"
        sft.fail(f"--reward_model must be {kinds}, got {cfg.reward_model!r}")


if __name__ == "__main__":
    record(main)()  # so that torchrun can show the error of a rank that failed
