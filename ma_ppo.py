"""Chapter 4: PPO (proximal policy optimization) on macro actions, beside PPO on tokens.

A primer. PPO learns from its own tries. All of its words, on one response of six tokens:

    token                 the    trip     was    nice     .    <eos>
    reward      r          0     -1        0      0       0      3
    value       V          1      3        0      1       2      1
    advantage   A        .38  -3.25     1.50   1.00       0   2.00     token_gae, lambda = 1/2
                       |-------------|----------------------|-----|
    reward      R           -1                0              3         (sums)
    value       V            2                1              1         (means)
    advantage   A         -1.5              1.0            2.0         macro_gae, lambda = 1/2

policy        the language model that writes responses, and learns. A *rollout* is a batch of its
              responses. An *action* is what it decides: a token, or, for us, a *macro action*, a
              run of tokens judged together (chapter 3).
reward model  gives a whole response one score (chapter 2), here 3: nobody labels single tokens.
reference     the policy as it was before PPO, frozen: the memory of what normal text looks like.
KL penalty    at each token beta (log pi - log pi_ref) is paid, here 1 for "trip", which the
              reference finds unlikely. The reward model knows normal text only; without a leash the
              policy drifts to where its scores are wrong and high. Paid at each token, it tells
              *which* token has left normal text. (KL divergence: the expected sum of these logs.)
reward r      what a token earns: the penalty, and at the last real token the score as well.
return        the sum of the rewards from a token on: what is still to come, and what training wants
              large. One sample of it is noisy: it depends on all tokens that happened to follow.
value V       the critic's guess of the return, made *before* the token is chosen: 3 is the guess
              after reading "the". After the end it is 0. The critic is a second model, which
              learns to predict; "better than expected" is measured by it. At first it is a copy of
              the reward model.
advantage A   how much better an action turned out than expected: positive ones are made likelier,
              negative ones less likely. Without the comparison, every token of a good response
              would be praised, and the praise would drown in noise.
delta         one step of surprise: r_t + V(s_{t+1}) - V(s_t), where s_t is the text before token
              t: what is expected after the choice of token t, less what was expected before.
GAE           generalized advantage estimation: A_t = delta_t + lambda A_{t+1}, the sum of the
              surprises from t on, each discounted by lambda per step. From the end, with 1/2:
              A("<eos>") = 3 + 0 - 1 = 2; A(".") = (0 + 1 - 2) + 2/2 = 0; A("nice") = (0 + 2 - 1)
              + 0/2 = 1.
targets       what the critic is taught: A + V, the return mixed with its own later guesses.
lambda        the trade-off. 0: trust the critic, look one step ahead: little noise, but all of the
              critic's errors (*bias*). 1: trust the return, use the critic as baseline only: no
              bias, all the noise. In between, news from d steps ahead arrives times lambda^d. The
              sum of all lambda^d is 1 / (1 - lambda), so that is about how many steps credit
              reaches: the *horizon*, 20 for .95.
gamma         a discount of the rewards themselves; 1 here, for a late score counts in full.
whitening     advantages are shifted and scaled to mean 0 and variance 1 over the batch: step sizes
              then do not depend on the units of the score. After the targets are taken, for the
              critic must predict real rewards.
ratio         pi(a) / pi_old(a), the token's probability now over that when it was sampled. The
              loss is -ratio x A. Before the first update the ratio is 1 everywhere, but its
              gradient is not 0: d(pi / pi_old) = (pi / pi_old) d log pi, so it is that of log pi.
              The value of the loss says nothing about progress; only its slope is used.
clip          once the ratio has left 1 +- 0.2 in the direction that A asks for, the gradient is cut
              off: a few responses must not carry the policy far from where they were sampled. With
              one update per rollout, the default, this never happens.

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
    python ma_ppo.py --arms fixed --ngram 10 --out runs/n10
    python ma_ppo.py --task toy-code                # programs, rewarded by unit tests: no RM
    torchrun --nproc_per_node=2 ma_ppo.py           # the same run on two processes

Look at rm_score in the bar, and at runs/toy/curves.png: `fixed` rises before `token`.
Source: Chai et al., MA-RLHF, ICLR 2025, section 3; PPO: Schulman et al., 2017; GAE: 2016.

Contents
    the story     Config, train: the algorithm in six steps, then the functions of each step
    Appendix A    prompts, and stages that are missing
    Appendix B    what is logged: the table of metrics
    Appendix C    settings that cannot work
You may stop reading at Appendix A.
"""

import copy
import gc
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import reward
import segment
import sft
from segment import pool
from sft import opt, print0


@dataclass
class Config(sft.Config):
    """Settings of the PPO chapter. Values without a source were found on the toy.

    An *arm* is one training of a comparison: a termination, `control` (tokens, with lam^(1/ngram)),
    or `rloo`. All start from the same models, and all but `rloo`, which needs several responses to
    each prompt, also share prompts and noise.
    """

    arms: list[str] = opt(["token", "fixed"], "terminations of chapter 3, control, rloo")
    ngram: int = opt(5, "tokens an action of `fixed` (paper: 5, programs: 10)", "--n")
    sigma: Literal["equal", "last", "decay", "first", "own"] = opt("equal", "values; own: unpooled")
    steps: int = opt(60, "PPO steps: a rollout, then ppo_epochs updates")
    batch_size: int = opt(64, "responses per step of all ranks (paper: 256)")
    micro_batch_size: int = opt(64, "responses per forward pass and rank")
    sample_batch_size: int = opt(0, "responses sampled at once; 0: all")
    lr: float = opt(5e-4, "learning rate of the policy")
    critic_lr: float = opt(1e-3, "learning rate of the critic")
    warmup: int = opt(10, "steps in which the policy's rate rises", "--warmup_steps")
    gamma: float = opt(1.0, "discount per action (paper: 1)")
    lam: float = opt(0.95, "GAE's lambda, per action (paper: 0.95)")
    beta: float = opt(0.05, "KL penalty, reward per nat (paper: 0.05)")
    clip: float = opt(0.2, "clipping range of ratio and value (paper: 0.2)")
    ppo_epochs: int = opt(1, "updates per rollout (paper: 1)")
    no_eos_score: str = opt("-4", "score of a response without end; none: as it is")
    temperature: float = opt(1.0, "of sampled and scored tokens (paper: 0.8)")
    top_k: int = opt(0, "sample from the k likeliest tokens; 0: all (paper: 50)")
    rloo_k: int = opt(4, "rloo: responses to each of batch_size / rloo_k prompts")
    # Where models come from, and go to.
    model: str = opt("", "what sft.py starts from, if OUT/sft has to be made")
    sft: str = opt("", "policy and reference; empty: OUT/sft")
    reward_model: str = opt("", "RM and first critic; empty: OUT/reward")
    reward: str = opt("", "own reward in place of an RM: FILE.py:NAME")
    trust_programs: bool = opt(False, "apps: run programs under limits only")
    save_every: int = opt(20, "steps between checkpoints; 0: at the end")
    # For studies: variants of the method that no default uses.
    macro_reward: Literal["sum", "mean"] = opt("sum", "paper: sum; its code: mean")
    ratio: Literal["token", "macro"] = opt("token", "pi / pi_old of what (paper: macro)")
    critic_lam: float | None = opt(None, "lambda of the critic's targets; not given: lam")
    critic_epochs: int | None = opt(None, "updates of the critic; not given: ppo_epochs")
    critic_steps: int = opt(0, "first steps, for the critic alone")
    critic_start: Literal["rm", "sft"] = opt("rm", "copy of the RM; SFT trunk, fresh head")
    value_clip: float | None = opt(None, "clip of the value; 0: none; not given: clip")


# Four models. The critic *is* a copy of the reward model, and learns on from there: what can be
# expected of a response is close to what it will be scored. But the reward model was only ever read
# at the end of a response, and text without an end looks broken to it: the first guesses are far
# too low. Say that a score of 3 is to come, and that every guess is 4 too low, so -1. From token to
# token, -1 less -1 is no surprise, and that is right. But behind the end V is 0: there the surprise
# is 3 + 0 - (-1) = 4. So whatever ends is praised for ending, and responses shrink at first.
def load_models(arm, cfg, device):
    """Policy and reference are copies of the SFT model, reward model and critic of chapter 2's.

    Programs, and a --reward, need no RM: there (or with --critic_start sft) the critic is the SFT
    model's trunk under a fresh head. `rloo` has no critic.
    Returns ({name: model}, {name: optimizer} of the two that learn, tokenizer).
    """
    gc.collect()  # a GPU may still hold the arm or stage before
    length = cfg.max_prompt + cfg.max_response
    policy, tokenizer = sft.load_causal_lm(cfg.sft, length)
    models = {"policy": policy, "reference": copy.deepcopy(policy).requires_grad_(False)}
    for model in models.values():  # on a GPU, or split, before the next ones need memory
        sft.prepare(model, cfg, device)
    if has_rm(cfg):
        reward.check_vocabulary(cfg.reward_model, tokenizer)
        critic = reward.ScalarModel.load(cfg.reward_model, tokenizer)
        models["reward"] = copy.deepcopy(critic).requires_grad_(False)
        sft.prepare(models["reward"], cfg, device)
    if not has_rm(cfg) or cfg.critic_start == "sft":
        critic, _ = reward.start_model(cfg)
    if arm != "rloo":
        models["critic"] = critic
        sft.prepare(critic, cfg, device)
    learning = [name for name in ("policy", "critic") if name in models]
    optimizers = {name: sft.make_optimizer(models[name]) for name in learning}
    return models, optimizers, tokenizer


def has_rm(cfg):
    """Whether a reward model gives the scores, and no unit tests or --reward."""
    return cfg.task not in sft.PROGRAMS and not cfg.reward


def train(arm, out, cfg, device):
    """PPO with one kind of macro action: the algorithm, in six steps."""
    models, optimizers, tokenizer = load_models(arm, cfg, device)
    policy = models["policy"]
    prompts = load_prompts(tokenizer, cfg)  # Appendix A
    cfg.steps = sft.count_steps(cfg, len(prompts))
    print0(f"{arm}: {len(prompts):,} prompts, {cfg.steps} steps -> {out}")
    check_sampling(policy, prompts[:2], tokenizer, cfg)  # Appendix A
    first = sft.begin(out, cfg, models, optimizers)  # 0, or later: --resume
    about = {"arm": arm, "ranks": sft.world()}
    sft.write_json(out / "config.json", asdict(cfg) | about)
    bar = sft.steps(first, cfg, arm)
    for step in bar:
        clock = [tick(device)]  # Appendix B
        examples = choose_prompts(arm, prompts, step, cfg)  # this rank's share
        # 1. The policy writes a response to each prompt.
        rollout = sample(policy, examples, step, tokenizer, cfg)
        batch, mask = rollout.batch, rollout.batch.mask  # mask: [B, T]
        clock.append(tick(device))
        # 2. The four models judge: how likely is each token, what is expected, what is the score?
        judged = judge(batch, models, cfg)
        logprobs, ref_logprobs, values, _ = judged  # [B, T]
        scored = score(rollout, models, examples, tokenizer, cfg)
        scores = scored.scores  # [B]
        if step == 0:
            check_no_eos_score(rollout, scores, tokenizer, cfg)  # Appendix A
        clock.append(tick(device))
        # 3. The responses are cut into macro actions.
        starts, fallback = cut(arm, rollout, ref_logprobs, tokenizer, cfg)  # [B, T]
        seg = segment.segment_ids(starts, mask)  # [B, T]
        # 4. Each token gets its reward: the KL penalty, and the last one the score.
        rewards = token_rewards(scores, logprobs, ref_logprobs, mask, cfg.beta)  # [B, T]
        # 5. Each action gets its advantage: how much better was it than expected?
        if arm == "rloo":
            advantages = rloo_advantages(scores, logprobs - ref_logprobs, mask, cfg)
            targets = torch.zeros_like(rewards)  # there is no critic
        else:
            advantages, targets = assign_credit(arm, rewards, values, seg, mask, cfg)
        advantages = whiten(advantages, mask)  # [B, T]
        clock.append(tick(device))
        # 6. The policy makes good actions likelier; the critic learns to expect what came.
        lesson = Lesson(batch, logprobs, values, advantages, targets, starts, seg)
        losses = improve(lesson, models, optimizers, step, cfg)
        clock.append(tick(device))

        # What is logged: Appendix B.
        row = {"step": step, "explained_variance": None}
        row |= summary(rollout, judged, scored, seg, fallback, tokenizer)
        if "critic" in models:
            row["explained_variance"] = explained_variance(rewards, values, mask)
        row |= losses | speeds(batch, clock, cfg)
        bar.set_postfix(rm_score=f"{row['rm_score']:.3f}", refresh=False)
        sft.log(out, row, cfg)
        if step % 10 == 0 or step == cfg.steps - 1:
            rows = sample_rows(step, rollout, scored, lesson, examples, tokenizer)
            sft.append(out / "samples.jsonl", *rows)
        sft.save_checkpoint(out, step + 1, cfg, models, optimizers)
    sft.save_models([policy, tokenizer], out / "model")
    if "critic" in models:  # it can be a --reward_model
        sft.save_models([models["critic"], tokenizer], out / "critic")
    sft.write_json(out / "run.json", {"config": asdict(cfg), "result": {"arm": arm}})


# Step 1. Sampling.
def choose_prompts(arm, prompts, step, cfg):
    """This rank's share of the step's prompts; in `rloo` each comes rloo_k times.

    `sample` counts how often a prompt has come in this step (where there are few, they come
    several times): every time with other noise.
    """
    copies = cfg.rloo_k if arm == "rloo" else 1
    examples, seen = [], Counter()
    for row in sft.batch_rows(prompts, step, cfg.batch_size // copies, cfg.seed):
        for _ in range(copies):
            examples.append(row | {"sample": seen[row["number"]]})
            seen[row["number"]] += 1
    return sft.my_share(examples)


class Rollout(NamedTuple):
    """B responses, as they were sampled."""

    batch: sft.Batch  # tokens [B, P+T], attention [B, P+T], mask [B, T]
    tokens: list  # B lists of token ids without padding
    texts: list  # B responses, decoded
    seeds: list  # B lists [seed, step, prompt number, sample]


def sample(policy, examples, step, tokenizer, cfg):
    """Sample a response to each prompt -> `Rollout`.

    The noise of a response is a function of the seed, the step, the prompt's number and, where a
    prompt comes again, the sample's number, of nothing else. So a run repeats itself exactly, on
    any number of ranks, and arms that are given the same prompts meet the same luck.
    """
    seeds = [[cfg.seed, step, row["number"], row.get("sample", 0)] for row in examples]
    noise = [np.random.default_rng(seed).random(cfg.max_response) for seed in seeds]
    uniforms = torch.tensor(np.array(noise))  # [B, max_response]
    prompts = [row["prompt"] for row in examples]
    responses = []
    # Writing a token takes a GPU equally long for 8 rows as for 256, so all are sampled at once, or
    # as many as the cache has room for.
    size = cfg.sample_batch_size or len(prompts)
    for part in sft.micro_slices(len(prompts), size):
        responses += generate(policy, prompts[part], uniforms[part], tokenizer, cfg)
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, policy.device)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollout(batch, responses, texts, seeds)


@torch.no_grad()
def generate(model, prompts, uniforms, tokenizer, cfg):
    """Write a response to each prompt, token by token.

    Keys and values of earlier tokens are read from a cache, so that a step computes one new token
    per row. prompts: B token lists; uniforms: float64 [B, max_response]: a row's response depends
    on its prompt and its uniforms only. Returns B token lists, which end in EOS unless cut.
    """
    B, device = len(prompts), model.device
    batch = sft.make_batch(prompts, [[]] * B, tokenizer.pad_token_id, device)
    tokens = batch.tokens[:, :-1]  # [B, P]
    attention = batch.attention[:, :-1]  # [B, P]
    place = sft.positions(attention)  # [B, P]
    cache, sampled = None, []
    done = torch.zeros(B, dtype=torch.bool, device=device)  # [B]
    ends = torch.tensor(tokenizer.ends, device=device)  # [end marks]
    with sft.autocast(model, cache=True):  # weights are cast once for all tokens
        for u in uniforms.to(device).T:  # [B]
            output = model(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=place,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.cache
            logits = sft.possible(output.logits[:, -1].float(), model)  # [B, N]
            tokens = draw(shaped(logits, cfg), u)[:, None]  # [B, 1]
            sampled.append(tokens)
            done |= torch.isin(tokens.squeeze(1), ends)
            finished = bool(done.all())
            # A model that is split among the ranks (--shard) is called until all of them are done.
            if isinstance(model, sft.FSDPModule):
                finished = sft.all_sum(finished) == sft.world()
            if finished:
                break
            more = torch.ones_like(tokens)  # [B, 1]
            attention = torch.cat([attention, more], 1)  # [B, P+t+1]
            place = place[:, -1:] + 1  # [B, 1]
    responses = torch.cat(sampled, 1).tolist()
    for row in responses:  # what was sampled behind its first end mark is for nothing
        end = next((i for i, token in enumerate(row) if token in tokenizer.ends), len(row))
        del row[end + 1 :]
    return responses


def shaped(logits, cfg, keep=None):
    """Log-probabilities after temperature and top-k.  [..., N] -> [..., N], N the vocabulary

    What is sampled from must be what is scored: a ratio or KL to another distribution would be
    wrong from the first step. keep: BoolTensor [..., N] of allowed tokens; by default the top k.
    """
    logits = logits / cfg.temperature
    if cfg.top_k and keep is None:
        keep = among_top(logits, cfg.top_k)
    if cfg.top_k:
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.log_softmax(-1)


def among_top(logits, k):
    """Which tokens are among the k likeliest.  [..., N] -> BoolTensor [..., N]"""
    k = min(k, logits.shape[-1])
    return logits >= logits.topk(k).values[..., -1:]


def draw(logprobs, uniforms):
    """Sample by inverting the cumulative distribution.  [B, N], [B] -> LongTensor [B]

    The token is where the running sum of the probabilities passes the row's uniform number. The
    sum is in double precision: 100,000 small numbers must add up. NaN has no place in it, and gets
    the last token: its update will be skipped.
    """
    cdf = logprobs.double().exp().cumsum(-1)  # [B, N]
    level = uniforms[:, None] * cdf[:, -1:]  # [B, 1]
    drawn = torch.searchsorted(cdf, level, right=True)  # [B, 1]
    return drawn.squeeze(1).clamp(max=cdf.shape[1] - 1)  # [B]


# Step 2. Judging.
class Judged(NamedTuple):
    """What policy, reference and critic say of the response tokens, [B, T]; 0 in the padding."""

    logprobs: torch.Tensor  # log pi, of the policy that sampled them
    ref_logprobs: torch.Tensor  # the same under the reference
    values: torch.Tensor  # V(s_t), s_t the text in front of token t
    entropy: torch.Tensor  # of the policy's next token, nats


@torch.no_grad()
def judge(batch, models, cfg):
    """Ask policy and reference for log-probabilities, the critic for values.  -> `Judged`"""
    parts = []
    for place in sft.micro_slices(len(batch.mask), cfg.micro_batch_size):
        part = batch.rows(place)  # a micro-batch of b rows
        logprobs, every, keep = token_logprobs(models["policy"], part, cfg)  # every: [b, T, N]
        # The reference is asked about the same allowed tokens: else one that only the policy
        # allows would cost infinite KL.
        ref_logprobs, _, _ = token_logprobs(models["reference"], part, cfg, keep)  # [b, T]
        values = torch.zeros_like(logprobs)  # [b, T]
        if "critic" in models:  # rloo has none
            values = state_values(models["critic"], part) * part.mask  # [b, T]
        entropy = torch.special.entr(every.exp()).sum(-1) * part.mask  # [b, T]
        parts.append((logprobs, ref_logprobs, values, entropy))
    return Judged(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


def token_logprobs(model, batch, cfg, keep=None):
    """Log-probabilities of the response tokens, and of everything that could have stood there.

    keep: BoolTensor [B, T, N] of allowed tokens; by default the top k, and the sampled token, which
    rounding may have pushed over the edge. Returns ([B, T] masked, [B, T, N], keep).
    """
    logits = sft.response_logits(model, batch)  # [B, T, N]
    responses = batch.responses[..., None]  # [B, T, 1]
    if keep is None and cfg.top_k:
        keep = among_top(logits.detach() / cfg.temperature, cfg.top_k)
        keep = keep.scatter(-1, responses, True)  # [B, T, N]
    every = shaped(logits, cfg, keep)  # [B, T, N]
    logprobs = every.gather(-1, responses).squeeze(-1)  # [B, T]
    return logprobs * batch.mask, every, keep


def state_values(critic, batch):
    """The critic's V(s_t), read at the token in front of response token t.  -> [B, T]"""
    return critic(batch)[:, -batch.mask.shape[1] - 1 : -1]


class Scored(NamedTuple):
    """What B responses are worth."""

    scores: torch.Tensor  # [B] what training wants large
    gold: torch.Tensor | None  # [B] the toy's truth
    passed: torch.Tensor | None  # [B] programs: whether all tests passed


@torch.no_grad()
def score(rollout, models, examples, tokenizer, cfg):
    """The score of each response: the RM's, or that of unit tests or a --reward.  -> `Scored`

    A response that was cut before its end mark gets no_eos_score: the RM has never judged half an
    answer, and a policy that never stops must not be paid for it.
    """
    batch, texts = rollout.batch, rollout.texts
    gold, passed = None, None
    stopped = ended(batch, tokenizer)  # [B]
    if has_rm(cfg):
        parts = sft.micro_slices(len(texts), cfg.micro_batch_size)
        rows = [batch.rows(part) for part in parts]
        scores = [reward.last_token_scores(models["reward"], x) for x in rows]
        scores = torch.cat(scores)  # [B]
    elif cfg.reward:
        prompts = [row["text"] for row in examples]
        scores = reward.own_reward(cfg.reward)(prompts, texts, examples)
        scores = torch.tensor(scores, device=stopped.device)  # [B]
    else:
        scores = reward.program_rewards(texts, [row["problem"] for row in examples])
        scores = torch.tensor(scores, device=stopped.device)  # [B]
        passed = (scores == 1) & stopped  # [B]
    if cfg.task == "toy":
        facts = [row["facts"] for row in examples]
        gold = torch.tensor([*map(reward.gold_score, facts, texts)])  # [B]
    if cfg.no_eos_score != "none":
        scores = torch.where(stopped, scores, float(cfg.no_eos_score))
    return Scored(scores, gold, passed)


def ended(batch, tokenizer):
    """Which responses contain an end mark.  -> BoolTensor [B]"""
    ends = torch.tensor(tokenizer.ends, device=batch.mask.device)  # [end marks]
    return (torch.isin(batch.responses, ends) & batch.mask.bool()).any(1)


# Step 3. Macro actions.
def cut(arm, rollout, ref_logprobs, tokenizer, cfg):
    """Mark where macro actions begin (chapter 3).

    `control` and `rloo` are no terminations: their actions are single tokens. ref_logprobs: [B, T].
    Returns (starts BoolTensor [B, T], share of programs that could not be parsed).
    """
    responses = segment.Responses(rollout.batch.mask, rollout.tokens, tokenizer, ngram=cfg.ngram)
    responses.ref_logprobs = ref_logprobs
    responses.seeds = [np.random.SeedSequence(x).generate_state(1)[0] for x in rollout.seeds]
    termination = "token" if arm in ("control", "rloo") else arm
    return segment.macro_starts(termination, responses)


# Step 4. Rewards.
def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """The KL penalty at every token, plus the score at the last real one.  -> [B, T]

    scores: [B]; logprobs, ref_logprobs, mask: [B, T]; beta: reward per nat, the unit of natural
    logarithms. The score lands on the last *real* token, the end mark: in a padded row the last
    column lies after the end, where nothing was decided, and the mask would drop the score.

    >>> mask = torch.tensor([[1, 1, 0]])  # a response of two tokens, and padding
    >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -2, 0]]), torch.tensor([[-3.0, -2, 0]])
    >>> token_rewards(torch.tensor([3.0]), logprobs, ref_logprobs, mask, beta=0.5).int().tolist()
    [[-1, 3, 0]]
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask  # [B, T]
    last = (mask.sum(1, keepdim=True).long() - 1).clamp(min=0)  # [B, 1]
    scores = scores[:, None].to(rewards.dtype)  # [B, 1]
    return rewards.scatter_add(1, last, scores)


# Step 5. Credit. The first two functions are what the paper is about: read them side by side. The
# second does two things at once: it has fewer factors lambda, and one value for several tokens. The
# third has the fewer factors only, and leaves every token its own value.
def token_gae(rewards, values, mask, gamma, lam):
    """Advantages and the critic's targets per token (GAE).

    rewards, values, mask: [B, T]; gamma, lam: per token. Returns (advantages, targets), [B, T],
    0 in the padding. The primer's response:

    >>> rewards = torch.tensor([[0.0, -1, 0, 0, 0, 3]])
    >>> values = torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> token_gae(rewards, values, torch.ones(1, 6), gamma=1.0, lam=0.5)[0].tolist()
    [[0.375, -3.25, 1.5, 1.0, 0.0, 2.0]]
    """
    R = torch.where(mask.bool(), rewards, 0)  # [B, T]
    V = torch.where(mask.bool(), values, 0)  # [B, T], so V after the last real step is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, T]
    targets = A + V  # [B, T]
    return A * mask, targets * mask


def macro_gae(rewards, values, mask, seg, gamma, lam, sigma="equal", kind="sum"):
    """Advantages and targets per macro action, handed to each of its tokens (paper, section 3.2).

    rewards, values, mask: [B, T]; seg: LongTensor [B, T]; gamma, lam: per macro action; sigma and
    kind say how `pool` makes one value and one reward of several. Returns (advantages, targets),
    [B, T], 0 in the padding. The primer's response: R = (-1, 0, 3), V = (2, 1, 1); A_2 = 3 - 1 = 2,
    A_1 = (0 + 1 - 1) + 0.5 x 2 = 1, A_0 = (-1 + 1 - 2) + 0.5 x 1 = -1.5.

    >>> rewards = torch.tensor([[0.0, -1, 0, 0, 0, 3]])
    >>> values = torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> seg = torch.tensor([[0, 0, 1, 1, 1, 2]])
    >>> macro_gae(rewards, values, torch.ones(1, 6), seg, gamma=1.0, lam=0.5)[0].tolist()
    [[-1.5, -1.5, 1.0, 1.0, 1.0, 2.0]]
    """
    R = pool(rewards, seg, mask, kind)  # [B, K]
    V = pool(values, seg, mask, sigma)  # [B, K], so V after the last macro action is 0
    A = discounted_sum(R + gamma * shift(V) - V, gamma * lam)  # [B, K]
    targets = A + V  # [B, K]
    return A.gather(1, seg) * mask, targets.gather(1, seg) * mask


def own_gae(rewards, values, mask, seg, gamma, lam):
    """Macro actions without pooling: lambda counts only where one begins (arXiv 2601.07320).

    rewards, values, mask: [B, T]; seg: LongTensor [B, T]; gamma: per token. Within a macro action
    news travels undiminished, and every token keeps its own value. Returns (advantages, targets),
    [B, T]. The primer's response, lam = 0.5: A_5 = 2, A_4 = (0 + 1 - 2) + 0.5 x 2 = 0,
    A_3 = (0 + 2 - 1) + 0 = 1, A_2 = (0 + 1 - 0) + 1 = 2, A_1 = (-1 + 0 - 3) + 0.5 x 2 = -3.

    >>> rewards = torch.tensor([[0.0, -1, 0, 0, 0, 3]])
    >>> values = torch.tensor([[1.0, 3, 0, 1, 2, 1]])
    >>> seg = torch.tensor([[0, 0, 1, 1, 1, 2]])
    >>> own_gae(rewards, values, torch.ones(1, 6), seg, gamma=1.0, lam=0.5)[0].tolist()
    [[-1.0, -3.0, 2.0, 1.0, 0.0, 2.0]]
    """
    R = torch.where(mask.bool(), rewards, 0)  # [B, T]
    V = torch.where(mask.bool(), values, 0)  # [B, T]
    begins = shift(seg) != seg  # [B, T], whether the next token begins one
    factor = torch.full_like(R, gamma).masked_fill(begins, gamma * lam)  # [B, T]
    A = discounted_sum(R + gamma * shift(V) - V, factor)  # [B, T]
    targets = A + V  # [B, T]
    return A * mask, targets * mask


def shift(x):
    """Every column replaced by the one after it, the last by 0.  [B, N] -> [B, N]"""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def discounted_sum(x, factor):
    """y_i = x_i + factor_i * y_{i+1} along each row, from the end.  [B, N], number or [B, N]"""
    y = torch.zeros_like(x)  # [B, N]
    factor = torch.zeros_like(x) + factor  # [B, N]
    running = x.new_zeros(len(x))  # [B]
    for i in reversed(range(x.shape[1])):
        running = x[:, i] + factor[:, i] * running
        y[:, i] = running
    return y


def assign_credit(arm, rewards, values, seg, mask, cfg):
    """Advantages and the critic's targets by the one of the three that the arm uses.  All [B, T].

    The targets stay in units of reward. The critic may be taught with a lambda of its own.
    """
    data, gamma, lam = (rewards, values, mask), cfg.gamma, cfg.lam
    if arm == "control":  # as far a horizon as that of n tokens an action
        lam = lam ** (1 / cfg.ngram)
    if arm in ("token", "control"):
        advantages, targets = token_gae(*data, gamma, lam)
    elif cfg.sigma == "own":
        advantages, targets = own_gae(*data, seg, gamma, lam)
    else:
        advantages, targets = macro_gae(*data, seg, gamma, lam, cfg.sigma, cfg.macro_reward)
    if cfg.critic_lam is not None:
        taught = replace(cfg, lam=cfg.critic_lam, critic_lam=None)
        _, targets = assign_credit(arm, rewards, values, seg, mask, taught)
    return advantages, targets


def rloo_advantages(scores, log_ratios, mask, cfg):
    """PPO without a critic: a response is compared with the other samples of its prompt.  -> [B, T]

    Leave-one-out (Ahmadian et al., 2024): Q_i is the total reward of response i, and every token of
    it gets A_i = Q_i - mean of the other Q_j. The baseline depends on no action of response i
    (whitening, which follows in every arm, takes off the whole batch's mean as well).
    scores: [B]; log_ratios: [B, T], log pi - log pi_ref; rows of one prompt follow each other.

    >>> scores, nothing, mask = torch.tensor([1.0, 4.0]), torch.zeros(2, 1), torch.ones(2, 1)
    >>> rloo_advantages(scores, nothing, mask, Config(rloo_k=2)).tolist()
    [[-3.0], [3.0]]
    """
    total = scores - cfg.beta * log_ratios.sum(1)  # [B]
    k = cfg.rloo_k
    Q = torch.tensor(sft.gather(total.tolist())).view(-1, k)  # [prompts, k]
    others = (Q.sum(1, keepdim=True) - Q) / (k - 1)  # [prompts, k]
    mine = sft.my_share((Q - others).flatten())  # [B]
    return mine.to(mask.device)[:, None] * mask


def explained_variance(rewards, values, mask):
    """How much of the differences between returns the critic knows beforehand.  [B, T] each

    1 - Var(G - V) / Var(G) over the real tokens of all ranks, G the sum of the rewards that really
    came. 1: it knows all, up to a constant; 0: no more than their mean; below 0: it would better
    say nothing.
    """
    G = discounted_sum(torch.where(mask.bool(), rewards, 0), 1.0)
    error = G - values
    unknown = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    total = masked_mean((G - masked_mean(G, mask)) ** 2, mask)
    return 1 - unknown / total if total > 0 else 0.0


def whiten(x, mask):
    """Mean 0, variance 1 over the real tokens of all ranks.  [B, T] -> [B, T], 0 in the padding."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask.bool(), (x - mean) / (variance + 1e-8) ** 0.5, 0)


def masked_mean(x, mask):
    """Mean of x over the real tokens of all ranks, a float."""
    total = torch.where(mask.bool(), x, 0).sum().double()
    return float(sft.all_sum(total.cpu()) / sft.all_sum(mask.sum()))


# Step 6. Improvement.
def ratios(logprobs, old_logprobs, mask, seg=None):
    """pi / pi_old of each token; with `seg`, of the macro action that it is in.  -> [B, T]

    A macro action's probability is the product of its tokens': logs are added.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0)  # [B, T]
    if seg is not None:
        log_ratio = pool(log_ratio, seg, mask, "sum").gather(1, seg)  # [B, T]
    return log_ratio.exp()


def policy_loss(ratio, advantages, mask, clip=0.2):
    """PPO's clipped objective, averaged over real tokens.  All [B, T] -> scalar

    With macro actions' ratios (the paper's formula), an action of L tokens counts L times.
    """
    clipped = ratio.clamp(1 - clip, 1 + clip)
    advantages = torch.where(mask.bool(), advantages, 0)
    # The smaller of the two, clip = 0.2. It stops the gradient where A has got what it asks for:
    #     A > 0, ratio above 1.2: 1.2 A, constant        A > 0, ratio below 0.8: ratio x A, goes on
    #     A < 0, ratio below 0.8: 0.8 A, constant        A < 0, ratio above 1.2: ratio x A, goes on
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss.sum() / mask.sum().clamp(min=1)


def value_loss(values, old_values, targets, mask, clip=0.2):
    """Clipped squared error of the critic, averaged over real tokens.  All [B, T] -> scalar.

    Within one rollout the critic must not run far from what it said before; in its first update
    nothing is clipped. Mind the unit: clip is in units of reward, where targets may span ten, so
    that further updates hardly get anywhere (hence --value_clip 0 with more --critic_epochs).
    """
    values = torch.where(mask.bool(), values, 0)
    old_values = torch.where(mask.bool(), old_values, 0)
    targets = torch.where(mask.bool(), targets, 0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    loss = 0.5 * torch.max((values - targets) ** 2, (clipped - targets) ** 2)
    return loss.sum() / mask.sum().clamp(min=1)


class Lesson(NamedTuple):
    """What the updates of a step need to know of B responses; tensors [B, T]."""

    batch: sft.Batch
    logprobs: torch.Tensor  # under the policy that sampled them
    values: torch.Tensor  # as the critic said before
    advantages: torch.Tensor  # whitened
    targets: torch.Tensor  # what the critic is taught
    starts: torch.Tensor  # True where a macro action begins
    seg: torch.Tensor  # the number of each token's macro action

    def parts(self, size):
        """Yield the lesson in micro-batches of at most `size` rows."""
        for part in sft.micro_slices(len(self.seg), size):
            yield Lesson(self.batch.rows(part), *(x[part] for x in self[1:]))


def improve(lesson, models, optimizers, step, cfg):
    """Update policy and critic, at first (--critic_steps) only the critic.  -> {metric: number}"""
    policy, critic = models["policy"], models.get("critic")
    token_count = float(sft.all_sum(lesson.batch.mask.sum().cpu()))
    learning = step - cfg.critic_steps  # steps since the policy began
    lr = cfg.lr * min(1.0, (learning + 1) / max(1, cfg.warmup))
    policy_epochs = cfg.ppo_epochs if learning >= 0 else 0
    critic_epochs = (cfg.critic_epochs or cfg.ppo_epochs) if critic else 0
    totals, critic_totals, ratios_seen = [], [], []
    for _ in range(policy_epochs):
        # A generator: `update` takes a loss, runs its backward pass, and only then asks for more.
        losses = policy_losses(lesson, policy, token_count, cfg, ratios_seen)
        totals.append(sft.update(policy, optimizers["policy"], losses, lr))
    for _ in range(critic_epochs):
        losses = value_losses(lesson, critic, token_count, cfg)
        critic_totals.append(sft.update(critic, optimizers["critic"], losses, cfg.critic_lr))
    return {
        "policy_loss": sum(totals) / policy_epochs if policy_epochs else None,
        "value_loss": sum(critic_totals) / critic_epochs if critic_epochs else None,
    } | ratio_metrics(ratios_seen, cfg)


def policy_losses(lesson, policy, token_count, cfg, ratios_seen):
    """Yield each micro-batch's share of the policy loss; its ratios are added to `ratios_seen`."""
    for part in lesson.parts(cfg.micro_batch_size):
        mask = part.batch.mask  # [b, T]
        logprobs, _, _ = token_logprobs(policy, part.batch, cfg)  # [b, T]
        seg, counted = None, mask.bool()
        if cfg.ratio == "macro":
            seg, counted = part.seg, part.starts  # one ratio per macro action
        ratio = ratios(logprobs, part.logprobs, mask, seg)  # [b, T]
        ratios_seen.append(ratio.detach()[counted])
        loss = policy_loss(ratio, part.advantages, mask, cfg.clip)
        yield loss * mask.sum() / token_count  # `loss` is a mean over mask.sum() tokens


def value_losses(lesson, critic, token_count, cfg):
    """Yield each micro-batch's share of the value loss."""
    clip = cfg.clip if cfg.value_clip is None else cfg.value_clip
    clip = clip or math.inf
    for part in lesson.parts(cfg.micro_batch_size):
        mask = part.batch.mask  # [b, T]
        values = state_values(critic, part.batch)  # [b, T]
        loss = value_loss(values, part.values, part.targets, mask, clip)
        yield loss * mask.sum() / token_count


def main(argv=None):
    """Make the SFT model and the RM if they are missing, train every arm from them, draw."""
    cfg = parse(argv)  # Appendix C
    device = sft.setup(cfg.device)  # joins the other ranks, if there are any
    folders = [sft.claim(Path(cfg.out) / arm) for arm in cfg.arms]  # for this run alone
    build_missing_stages(cfg)  # chapters 1 and 2: Appendix A
    for arm, folder in zip(cfg.arms, folders, strict=True):
        if not sft.finished(folder, cfg):  # --resume auto
            train(arm, folder, cfg, device)
    draw_curves(folders, cfg)  # by chapter 5: Appendix A


# Appendix A. Prompts and stages.
#
# PPO needs prompts that nobody has learned from. Where the SFT model or the RM is missing, the
# earlier chapters are run for it, so that one command goes from nothing to a picture.

import json
import os
import re
import shlex
import subprocess
import sys


def load_prompts(tokenizer, cfg):
    """The PPO share's prompts, once each: their rows, with {number, text, prompt (token list)}."""
    fields = ["problem"] if cfg.task in sft.PROGRAMS else []
    rows = {}
    for row in sft.load_share(cfg, "ppo", *fields):
        rows.setdefault(row["prompt"], row)
    rows = sft.usable_rows(list(rows.values()), tokenizer, cfg, ["prompt"])
    encoded = sft.encode(rows, tokenizer, cfg, ["prompt"])
    prompts = []
    for number, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
        prompts.append(row | {"number": number, "text": row["prompt"]} | ids)
    return prompts


@torch.no_grad()
def check_sampling(policy, prompts, tokenizer, cfg):
    """Refuse a model that samples from another distribution than the one that is scored.

    `generate` reads the past from a cache, and skips padding by position ids. An architecture that
    keeps its memory in another way goes wrong in silence. So two prompts get eight tokens each, and
    the logits that these were drawn from are compared with those of one pass over the whole text.
    """
    texts = [row["prompt"] for row in prompts]
    uniforms = torch.full((len(texts), min(8, cfg.max_response)), 0.5).double()
    seen = []  # what the model puts out, for every token
    hook = policy.register_forward_hook(lambda *args: seen.append(args[-1]))
    responses = generate(policy, texts, uniforms, tokenizer, cfg)
    hook.remove()
    batch = sft.make_batch(texts, responses, tokenizer.pad_token_id, policy.device)
    whole = sft.response_logits(policy, batch)  # [b, t, N]
    cached = [output.logits[:, -1].float() for output in seen[: whole.shape[1]]]
    cached = sft.possible(torch.stack(cached, 1), policy)  # [b, t, N]
    usable = whole[0, 0] > -1e8  # [N], without ids that stand for no token
    spread = whole[..., usable].std(-1)  # [b, t] of the logits
    wrong = (cached - whole)[..., usable].std(-1) / spread  # [b, t]
    most = 0.2 if policy.bf16 else 0.01  # bf16 rounds more
    if ((wrong > most) & batch.mask.bool()).any():
        sft.fail(f"--sft {cfg.sft}: {type(policy).__name__} goes wrong with its cache")


def check_no_eos_score(rollout, scores, tokenizer, cfg):
    """Refuse a score for not ending that pays better than ending, as this first rollout scores.

    Reward models have their zero where they like. scores: [B].
    """
    if cfg.no_eos_score == "none" or cfg.task in sft.PROGRAMS:
        return
    stopped = ended(rollout.batch, tokenizer)  # [B]
    found = sft.gather(scores[stopped].tolist())
    if found and float(cfg.no_eos_score) >= np.mean(found):
        lower = np.mean(found) - max(1.0, 2 * np.std(found))
        paid = f"--no_eos_score {cfg.no_eos_score} pays for not ending"
        others = f"responses that end score {np.mean(found):.2f} on average"
        sft.fail(f"{paid}, {others}: set --no_eos_score {lower:.1f}, or none")


# Settings that a stage takes over; and those in which a finished stage must agree with this run.
SHARED = ("seed", "split", "chat_template", "max_prompt", "max_response", "resume", "keep")
SHARED += ("device", "precision", "gradient_checkpointing", "compile", "shard")
SHAPING = ("task", "data", "split", "chat_template", "max_prompt", "max_response")


def build_missing_stages(cfg):
    """Run the earlier chapters, with their own defaults, for models that do not exist yet."""
    if not cfg.sft:
        cfg.sft = os.path.abspath(Path(cfg.out) / "sft")
        run_stage(sft, cfg.sft, cfg)
    if not cfg.reward_model and has_rm(cfg):
        cfg.reward_model = os.path.abspath(Path(cfg.out) / "reward")
        run_stage(reward, cfg.reward_model, cfg, "--sft", cfg.sft)


def run_stage(chapter, out, cfg, *flags):
    """Run a chapter for `out`, unless it is there already; if made of other rows, it is refused."""
    flags = ["--task", cfg.task, "--out", out, "--model", cfg.model, *flags]
    if cfg.data:
        flags += ["--data", *cfg.data]
    stage = sft.parse(chapter.Config, chapter.__name__, flags)
    stage = replace(stage, **{name: getattr(cfg, name) for name in SHARED})
    if not (Path(out) / "run.json").exists():
        print0(f"making {out} with {chapter.__name__}.py")
        chapter.train(stage)
        return
    made = json.loads((Path(out) / "run.json").read_text())["config"]
    for name in SHAPING:
        old, new = made.get(name), getattr(stage, name)
        if old != new:
            sft.fail(f"--{name} was {old!r}, not {new!r}, for {out}: choose another --out")
    # A short trial should not pass unnoticed.
    shown = [f"{name} {made[name]}" for name in ("seed", "steps", "batch_size", "lr")]
    print0(f"using {out}: {', '.join(shown)}")


def draw_curves(folders, cfg):
    """Hand the finished runs on to chapter 5, as a command: nothing here may import it."""
    if sft.rank() == 0:
        flags = ["curves", "--runs", *map(str, folders), "--png", f"{cfg.out}/curves.png"]
        print0(f"drawing: python eval.py {shlex.join(flags)}")
        script = Path(__file__).with_name("eval.py")
        alone = {name: x for name, x in os.environ.items() if name != "RANK"}
        subprocess.run([sys.executable, script, *flags], check=True, env=alone)


# Appendix B. What is logged.
#
# metrics.jsonl has a line per step, measured on the rollout before the step's update (losses and
# ratios: during it); means over the responses, or tokens, of all ranks. null: there is no such
# number in this task or arm, or it was not finite.
#
#     rm_score, rm_score_std        score, of the RM or of unit tests: mean, standard deviation
#     gold_score, gold_score_std    the toy's true quality
#     pass_rate                     programs: share that passes all of its tests
#     kl                            sum of log pi - log pi_ref over a response, nats
#     response_length, eos_rate     tokens; share of the responses that end
#     macro_actions, macro_length   per response; tokens in one
#     parse_fallback                `ast`: share of programs that could not be parsed
#     entropy                       of the policy's next token, nats
#     ref_surprise                  of a token: -log pi_ref, how strange the reference finds it
#     explained_variance            of the rewards to come, by the critic: see the function
#     policy_loss, value_loss       their slopes are used; their values say little
#     clip_fraction                 share of the ratios outside 1 +- clip; 0 with one update
#     ratio_first                   ratio farthest from 1 before any update: 1, but for rounding
#     seconds, seconds_PHASE        of the step, and of its phases sample, judge, credit, update
#     tokens_per_second_PHASE       all ranks: sampled ones; read ones, prompts too, for the others
#
# samples.jsonl has four responses of every tenth step, token by token with their credit.

import time


def tick(device):
    """The time in seconds; a GPU's work is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def speeds(batch, clock, cfg):
    """Seconds of a step's phases, which lie between the ticks, and tokens per second in them."""
    read = float(sft.all_sum(batch.attention.sum().cpu()))  # with the prompts
    tokens = {"judge": read, "update": read * cfg.ppo_epochs}
    tokens["sample"] = float(sft.all_sum(batch.mask.sum().cpu()))
    found = {"seconds": clock[-1] - clock[0]}
    phases = ("sample", "judge", "credit", "update")
    for name, duration in zip(phases, np.diff(clock).tolist(), strict=True):
        found[f"seconds_{name}"] = duration
        if name in tokens:
            found[f"tokens_per_second_{name}"] = tokens[name] / duration
    return found


def summary(rollout, judged, scored, seg, fallback, tokenizer):
    """This step's metrics of the rollout: means over responses, or tokens, of all ranks."""
    columns = {  # a number per response, [B] each
        "rm_score": scored.scores,
        "gold_score": scored.gold,
        "pass_rate": scored.passed,
        "kl": (judged.logprobs - judged.ref_logprobs).sum(1),
        "response_length": rollout.batch.mask.sum(1),
        "eos_rate": ended(rollout.batch, tokenizer),
        "macro_actions": seg.max(1).values + 1,
        "entropy": judged.entropy.sum(1),
        "ref_surprise": -judged.ref_logprobs.sum(1),
    }
    row = dict.fromkeys(("gold_score", "gold_score_std", "pass_rate"))
    for name, column in columns.items():
        if column is None:
            continue
        everyone = torch.tensor(sft.gather(column.tolist()), dtype=torch.float64)  # [all B]
        row[name] = float(everyone.mean())
        if name.endswith("_score"):
            row[f"{name}_std"] = float(everyone.std(correction=0))
    row["macro_length"] = row["response_length"] / row["macro_actions"]
    for name in ("entropy", "ref_surprise"):
        row[name] /= row["response_length"]
    row["parse_fallback"] = float(sft.all_sum(fallback)) / sft.world()
    return row


def ratio_metrics(ratios_seen, cfg):
    """The share of ratios outside the clip; of those before any update, the one farthest from 1."""
    if not ratios_seen:  # only the critic has learned
        return {"clip_fraction": None, "ratio_first": None}
    every = torch.cat(ratios_seen)  # [number of ratios]
    outside = ((every - 1).abs() > cfg.clip).sum()
    share = sft.all_sum(float(outside)) / sft.all_sum(len(every))
    count = len(ratios_seen) // cfg.ppo_epochs
    first = torch.cat(ratios_seen[:count])  # of the first update
    extremes = sft.gather([float(first.min()), float(first.max())])
    farthest = max(extremes, key=lambda ratio: abs(ratio - 1))
    return {"clip_fraction": float(share), "ratio_first": farthest}


def sample_rows(step, rollout, scored, lesson, examples, tokenizer):
    """Rank 0's first four responses of this step for samples.jsonl, token by token."""
    rows = []
    for i, tokens in enumerate(rollout.tokens[:4]):
        text, offsets = segment.token_offsets(tokenizer, tokens)
        row = {
            "step": step,
            "prompt": examples[i]["text"],
            "response": rollout.texts[i],
            "rm_score": float(scored.scores[i]),
            "gold_score": None if scored.gold is None else float(scored.gold[i]),
            "tokens": tokens,
            "pieces": [text[start:end] for start, end in offsets],
        }
        for name in ("seg", "values", "advantages", "targets"):
            row[name] = getattr(lesson, name)[i, : len(tokens)].tolist()
        rows.append(row)
    return rows


# Appendix C. Settings that cannot work are refused by name before anything is computed.


def parse(argv):
    """Read and check the settings."""
    cfg = sft.parse(Config, "ma_ppo", argv)
    check_arms(cfg)
    if cfg.reward:
        cfg.reward = os.path.abspath(cfg.reward)
        reward.own_reward(cfg.reward)  # it is there
    if cfg.task == "apps" and not cfg.trust_programs and not reward.sandbox():
        sft.fail("--task apps runs what a model wrote: apt install bubblewrap, or --trust_programs")
    rm = cfg.reward_model
    ours = (Path(rm) / reward.HEAD).is_file()
    if rm and not ours and not reward.is_classifier(rm):
        kinds = "a folder of reward.py, or a classifier with one label"
        sft.fail(f"--reward_model must be {kinds}, got {rm!r}")
    return cfg


def check_arms(cfg):
    """Refuse arms that are unknown or cannot run here, and numbers that cannot be."""
    wrong = {}  # {message: whether it is so}
    for name in ("clip", "temperature", "critic_lr", "ngram", "ppo_epochs"):
        wrong[f"--{name} must be positive"] = not 0 < getattr(cfg, name) < math.inf
    for name in ("gamma", "lam", "critic_lam"):
        wrong[f"--{name} must be from 0 to 1"] = not 0 <= (getattr(cfg, name) or 0) <= 1
    for name in ("beta", "top_k", "sample_batch_size", "value_clip", "critic_steps"):
        wrong[f"--{name} must be 0 or more"] = not (getattr(cfg, name) or 0) >= 0
    known = [*segment.TERMINATIONS, "control", "rloo"]
    different = set(cfg.arms)
    rloo, k = "rloo" in cfg.arms, cfg.rloo_k
    number = re.fullmatch(r"none|-?\d+\.?\d*", str(cfg.no_eos_score))
    wrong |= {
        f"--arms must be among {', '.join(known)}": different - {*known},
        "--arms must be different ones": len(different) < max(1, len(cfg.arms)),
        "--gamma must be 1 for control": "control" in cfg.arms and cfg.gamma != 1,
        "--rloo_k must be at least 2": rloo and k < 2,
        "--rloo_k must divide --batch_size": rloo and cfg.batch_size % max(1, k),
        "--critic_epochs must be positive": cfg.critic_epochs is not None and cfg.critic_epochs < 1,
        "--critic_steps: rloo has no critic": rloo and cfg.critic_steps,
        "--critic_steps must be below --steps": not cfg.epochs and cfg.critic_steps >= cfg.steps,
        "--no_eos_score must be a number or none": not number,
        "--reward_model: scores come from elsewhere": cfg.reward_model and not has_rm(cfg),
    }
    for message, so in wrong.items():
        if so:
            sft.fail(message)
    if "parsing" in cfg.arms:
        try:
            segment.spacy_parser()
        except ImportError as error:
            sft.fail(error)


if __name__ == "__main__":
    main()
