"""Chapter 4: advantages, losses, rewards, sampling, and a PPO update of models of one line."""

import copy
import math
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

import ma_ppo
import reward
import sft
from ma_ppo import (
    Config,
    Rollout,
    assign_credit,
    cut,
    draw,
    ended,
    generate,
    improve,
    judge,
    macro_gae,
    policy_loss,
    sample,
    score,
    shaped,
    summary,
    token_gae,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from segment import (
    fixed_starts,
    perplexity_starts,
    random_starts,
    segment_ids,
    token_starts,
    whole_starts,
)

VALUE_POOLINGS = ("equal", "last", "decay", "first")
REWARD_POOLINGS = ("sum", "mean")
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)  # of the responses of a batch
factor = st.floats(0, 1)  # gamma, lam
seeds = st.integers(0, 2**31)


def ragged(lengths, seed, extra=0):
    """Random rewards, values, mask, macro actions, all [B, T]; `extra` columns are padding."""
    random = torch.Generator().manual_seed(seed)
    T = max(lengths) + extra
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()  # [B, T]
    rewards = torch.randn(len(lengths), T, generator=random, dtype=torch.float64) * mask  # [B, T]
    values = torch.randn(len(lengths), T, generator=random, dtype=torch.float64) * mask  # [B, T]
    starts = random_starts(mask, lengths=(1, 2, 3), seeds=[seed + b for b in range(len(lengths))])
    return rewards, values, mask, segment_ids(starts, mask)


def close(tensor, rows):
    """Compare a padded tensor with lists of different lengths; the padding must be 0."""
    for got, wanted in zip(tensor.tolist(), rows, strict=True):
        assert got == pytest.approx(list(wanted) + [0.0] * (len(got) - len(wanted)), abs=1e-6)


# Plain-Python references: one row at a time, no tensors, no masks


def slow_gae(rewards, values, gamma, lam):
    """Lists (advantages, returns) of one row, the recursion as it is written."""
    advantages = [0.0] * len(rewards)
    following, value_after = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * value_after - values[t]
        following = advantages[t] = delta + gamma * lam * following
        value_after = values[t]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def slow_groups(x, seg):
    """A row's numbers, one list per macro action."""
    groups = [[] for _ in range(max(seg) + 1)]
    for value, k in zip(x, seg, strict=True):
        groups[k].append(value)
    return groups


def slow_pool(group, how):
    """One macro action's number, with the weights written out."""
    L = len(group)
    if how == "sum":
        return sum(group)
    if how in ("mean", "equal"):
        return sum(group) / L
    if how in ("first", "last"):
        return group[0] if how == "first" else group[-1]
    harmonic = sum(1 / j for j in range(1, L + 1))
    return sum(v / ((L - i) * harmonic) for i, v in enumerate(group))


def slow_macro_gae(rewards, values, seg, gamma, lam, value_pooling, reward_pooling):
    R = [slow_pool(group, reward_pooling) for group in slow_groups(rewards, seg)]
    V = [slow_pool(group, value_pooling) for group in slow_groups(values, seg)]
    advantages, returns = slow_gae(R, V, gamma, lam)
    return [advantages[k] for k in seg], [returns[k] for k in seg]


def rows_of(x, lengths):
    """The real tokens of each row, as lists."""
    return [row[:length] for row, length in zip(x.tolist(), lengths, strict=True)]


# Advantages


@given(lengths, seeds, factor, factor, st.integers(0, 3))
def test_token_gae_is_the_recursion_from_the_end(lengths, seed, gamma, lam, extra):
    rewards, values, mask, _ = ragged(lengths, seed, extra)
    got = token_gae(rewards, values, mask, gamma, lam)
    pairs = zip(rows_of(rewards, lengths), rows_of(values, lengths), strict=True)
    slow = [slow_gae(r, v, gamma, lam) for r, v in pairs]
    for tensor, rows in zip(got, zip(*slow, strict=True), strict=True):
        close(tensor, rows)


@pytest.mark.parametrize("reward_pooling", REWARD_POOLINGS)
@pytest.mark.parametrize("value_pooling", VALUE_POOLINGS)
@settings(max_examples=40)
@given(lengths, seeds, factor, factor, st.integers(0, 3))
def test_macro_gae_pools_then_runs_the_same_recursion(
    value_pooling, reward_pooling, lengths, seed, gamma, lam, extra
):
    rewards, values, mask, seg = ragged(lengths, seed, extra)
    got = macro_gae(rewards, values, mask, seg, gamma, lam, value_pooling, reward_pooling)
    rows = zip(*(rows_of(x, lengths) for x in (rewards, values, seg)), strict=True)
    slow = [slow_macro_gae(r, v, s, gamma, lam, value_pooling, reward_pooling) for r, v, s in rows]
    for tensor, rows in zip(got, zip(*slow, strict=True), strict=True):
        close(tensor, rows)


def test_two_macro_actions_worked_by_hand():
    # Tokens in macro actions of 2 and 2; gamma = 0.5, lam = 0.5, sigma = last.
    # R = (1 + 1, 0 + 4) = (2, 4); V = (3, 2).  A_1 = 4 - 2 = 2; delta_0 = 2 + 0.5 * 2 - 3 = 0;
    # A_0 = 0 + 0.5 * 0.5 * 2 = 0.5; returns = A + V = (3.5, 4).
    rewards, values = torch.tensor([[1.0, 1, 0, 4]]), torch.tensor([[9.0, 3, 9, 2]])
    seg = torch.tensor([[0, 0, 1, 1]])
    advantages, returns = macro_gae(rewards, values, torch.ones(1, 4), seg, 0.5, 0.5, "last")
    assert advantages.tolist() == [[0.5, 0.5, 2, 2]]
    assert returns.tolist() == [[3.5, 3.5, 4, 4]]


@pytest.mark.parametrize("reward_pooling", REWARD_POOLINGS)
@pytest.mark.parametrize("value_pooling", VALUE_POOLINGS)
@settings(max_examples=25)
@given(lengths, seeds, factor, factor)
def test_macro_actions_of_one_token_are_token_level_exactly(
    value_pooling, reward_pooling, lengths, seed, gamma, lam
):
    rewards, values, mask, _ = ragged(lengths, seed, extra=1)
    seg = segment_ids(token_starts(mask), mask)
    macro = macro_gae(rewards, values, mask, seg, gamma, lam, value_pooling, reward_pooling)
    for by_token, by_macro in zip(token_gae(rewards, values, mask, gamma, lam), macro, strict=True):
        assert torch.equal(by_token, by_macro)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_macro_actions_of_one_token_are_token_level_exactly_in_every_precision(kind):
    rewards, values, mask, _ = ragged([9, 1, 12], 0, extra=1)
    rewards, values, seg = rewards.to(kind), values.to(kind), segment_ids(token_starts(mask), mask)
    for value_pooling in VALUE_POOLINGS:
        macro = macro_gae(rewards, values, mask, seg, 0.9, 0.8, value_pooling, "mean")
        token = token_gae(rewards, values, mask, 0.9, 0.8)
        for by_token, by_macro in zip(token, macro, strict=True):
            assert torch.equal(by_token, by_macro)


@pytest.mark.parametrize("value_pooling", VALUE_POOLINGS)
@settings(max_examples=25)
@given(lengths, seeds, factor, factor)
def test_whole_response_advantage_is_reward_minus_value_for_any_lambda(
    value_pooling, lengths, seed, gamma, lam
):
    rewards, values, mask, _ = ragged(lengths, seed)
    seg = segment_ids(whole_starts(mask), mask)
    advantages, returns = macro_gae(rewards, values, mask, seg, gamma, lam, value_pooling)
    rows = list(zip(rows_of(rewards, lengths), rows_of(values, lengths), strict=True))
    close(advantages, [[sum(r) - slow_pool(v, value_pooling)] * len(r) for r, v in rows])
    close(returns, [[sum(r)] * len(r) for r, _ in rows])


@given(lengths, seeds, factor)
def test_whole_with_sigma_first_is_reinforce_with_the_prompts_value_as_baseline(lengths, seed, lam):
    rewards, values, mask, _ = ragged(lengths, seed)
    seg = segment_ids(whole_starts(mask), mask)
    advantages, _ = macro_gae(rewards, values, mask, seg, 1.0, lam, "first")
    surprise = rewards.sum(1) - values[:, 0]  # [B], R - V(s_0)
    assert torch.allclose(advantages, surprise[:, None] * mask)


@given(lengths, seeds)
def test_gamma_and_lambda_1_give_reward_to_go_minus_value(lengths, seed):
    rewards, values, mask, seg = ragged(lengths, seed)
    advantages, returns = token_gae(rewards, values, mask, 1.0, 1.0)
    for b, row in enumerate(rows_of(rewards, lengths)):
        for t in range(len(row)):
            to_go, value = sum(row[t:]), float(values[b, t])
            assert float(returns[b, t]) == pytest.approx(to_go, abs=1e-9)
            assert float(advantages[b, t]) == pytest.approx(to_go - value, abs=1e-9)
    _, returns = macro_gae(rewards, values, mask, seg, 1.0, 1.0)
    for b, row in enumerate(rows_of(rewards, lengths)):
        for t in range(len(row)):
            # What is to come of a macro action begins with its first token.
            begin = seg[b].tolist().index(seg[b, t])
            assert float(returns[b, t]) == pytest.approx(sum(row[begin:]), abs=1e-9)


def estimators(rewards, values, mask, seg):
    """Results of token_gae and of every kind of macro_gae."""
    yield token_gae(rewards, values, mask, 0.9, 0.8)
    for value_pooling in VALUE_POOLINGS:
        for reward_pooling in REWARD_POOLINGS:
            yield macro_gae(rewards, values, mask, seg, 0.9, 0.8, value_pooling, reward_pooling)


@settings(max_examples=40)
@given(lengths, seeds, st.integers(1, 4))
def test_padding_never_changes_an_advantage_even_when_it_holds_nan(lengths, seed, extra):
    rewards, values, mask, seg = ragged(lengths, seed)
    pad = torch.zeros(len(lengths), extra, dtype=torch.long)
    wider, T = torch.cat([mask, pad], 1), mask.shape[1]
    wider_seg = torch.cat([seg, seg[:, -1:].expand(-1, extra)], 1)
    dirty = [
        torch.cat([x, pad.double()], 1).masked_fill(wider == 0, torch.nan)
        for x in (rewards, values)
    ]
    for clean, padded in zip(
        estimators(rewards, values, mask, seg), estimators(*dirty, wider, wider_seg), strict=True
    ):
        for a, b in zip(clean, padded, strict=True):
            assert torch.equal(a, b[:, :T])
            assert torch.equal(b * (1 - wider), torch.zeros_like(b))


@settings(max_examples=40)
@given(lengths, seeds)
def test_a_rows_advantages_do_not_depend_on_its_batch(lengths, seed):
    rewards, values, mask, seg = ragged(lengths, seed)
    together = list(estimators(rewards, values, mask, seg))
    for b, length in enumerate(lengths):
        alone = estimators(*(x[b : b + 1, :length] for x in (rewards, values, mask, seg)))
        for in_batch, single in zip(together, alone, strict=True):
            for a, c in zip(in_batch, single, strict=True):
                assert torch.equal(a[b, :length], c[0])


def test_whiten_gives_mean_0_variance_1_over_real_tokens_and_0_in_the_padding():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = torch.tensor([[3.0, -1, 7, 500, 500], [2, 2, 9, 0, 4]])
    white = whiten(x, mask)
    real = white[0, :3].tolist() + white[1].tolist()
    assert sum(real) / 8 == pytest.approx(0, abs=1e-6)
    assert sum(v * v for v in real) / 8 == pytest.approx(1, abs=1e-6)
    assert white[0, 3:].tolist() == [0, 0]
    assert white[mask.bool()].argsort().tolist() == x[mask.bool()].argsort().tolist()


# Losses


def test_the_policy_clip_acts_on_both_sides_and_only_against_the_gain():
    # ratio   1.5   1.5   0.5   0.5
    # A        +1    -1    +1    -1
    # chosen  1.2  -1.5   0.5  -0.8     loss = -(1.2 - 1.5 + 0.5 - 0.8) / 4 = 0.15
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1, 1, -1]])
    loss = policy_loss(logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4), clip=0.2)
    assert loss.item() == pytest.approx(0.15)
    loss.backward()
    # d(-ratio A / 4) / dlogprob = -ratio A / 4 where the clip leaves it alone, 0 where it does not.
    assert logprobs.grad[0].tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])


def test_one_ratio_per_macro_action_is_the_product_of_its_tokens_ratios():
    # Macro actions of 2 and 1 tokens: ratios 1.1 * 1.05 = 1.155 (twice) and 0.9; A = 1; no clip.
    logprobs = torch.tensor([[1.1, 1.05, 0.9]]).log()
    seg, ones = torch.tensor([[0, 0, 1]]), torch.ones(1, 3)
    loss = policy_loss(logprobs, torch.zeros(1, 3), ones, ones, clip=0.2, seg=seg)
    assert loss.item() == pytest.approx(-(1.155 + 1.155 + 0.9) / 3)
    # With clip 0.1 each token's own ratio stays inside, the macro action's 1.155 does not.
    by_token = policy_loss(logprobs, torch.zeros(1, 3), ones, ones, clip=0.101)
    by_macro = policy_loss(logprobs, torch.zeros(1, 3), ones, ones, clip=0.101, seg=seg)
    assert float(by_token) == pytest.approx(-(1.1 + 1.05 + 0.9) / 3)
    assert float(by_macro) == pytest.approx(-(1.101 + 1.101 + 0.9) / 3)


def loss_inputs(lengths, seed):
    new, old, mask, seg = ragged(lengths, seed)
    advantages, _, _, _ = ragged(lengths, seed + 1)
    return 0.3 * new, 0.3 * old, advantages, mask, seg


@given(lengths, seeds, st.floats(0.01, 0.5), st.booleans())
def test_policy_loss_is_that_of_a_loop_over_real_tokens(lengths, seed, clip, per_macro):
    new, old, advantages, mask, seg = loss_inputs(lengths, seed)
    total = 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            same = [i for i in range(length) if seg[b, i] == seg[b, t]] if per_macro else [t]
            ratio = math.exp(sum(float(new[b, i] - old[b, i]) for i in same))
            A = float(advantages[b, t])
            total -= min(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
    got = policy_loss(new, old, advantages, mask, clip, seg if per_macro else None)
    assert float(got) == pytest.approx(total / sum(lengths), abs=1e-6)


@given(lengths, seeds)
def test_macro_ratio_with_one_token_per_macro_action_is_the_token_ratio_exactly(lengths, seed):
    new, old, advantages, mask, _ = loss_inputs(lengths, seed)
    seg = segment_ids(token_starts(mask), mask)
    assert torch.equal(
        policy_loss(new, old, advantages, mask), policy_loss(new, old, advantages, mask, seg=seg)
    )


def test_the_value_clip_acts_on_both_sides():
    # V     old   return   clipped   0.5 * max((V - return)^2, (clipped - return)^2)
    # 1.0   0     1        0.2       0.5 * 0.64 = 0.32   the clip hides that V is already there
    # -1.0  0     -1       -0.2      0.5 * 0.64 = 0.32   the same on the other side
    # 1.0   0     0.5      0.2       0.5 * 0.25 = 0.125  V is the worse of the two
    # 0.1   0     1        0.1       0.5 * 0.81 = 0.405  inside the clip
    values = torch.tensor([[1.0, -1, 1, 0.1]], requires_grad=True)
    returns = torch.tensor([[1.0, -1, 0.5, 1]])
    loss = value_loss(values, torch.zeros(1, 4), returns, torch.ones(1, 4), clip=0.2)
    assert loss.item() == pytest.approx((0.32 + 0.32 + 0.125 + 0.405) / 4)
    loss.backward()
    assert values.grad[0].tolist() == pytest.approx([0, 0, 0.5 / 4, -0.9 / 4])


@given(lengths, seeds, st.floats(0.01, 0.5))
def test_value_loss_is_that_of_a_loop_over_real_tokens(lengths, seed, clip):
    values, old, returns, mask, _ = loss_inputs(lengths, seed)
    total = 0.0
    for b, length in enumerate(lengths):
        for t in range(length):
            V, before, G = float(values[b, t]), float(old[b, t]), float(returns[b, t])
            clipped = before + min(max(V - before, -clip), clip)
            total += 0.5 * max((V - G) ** 2, (clipped - G) ** 2)
    assert float(value_loss(values, old, returns, mask, clip)) == pytest.approx(
        total / sum(lengths), abs=1e-6
    )


@settings(max_examples=10)
@given(lengths, seeds)
def test_what_stands_in_the_padding_never_changes_a_loss(lengths, seed):
    new, old, advantages, mask, seg = loss_inputs(lengths, seed)
    for dirt in (7.0, -9.0, math.inf, math.nan):
        dirty = [x.masked_fill(mask == 0, dirt) for x in (new, old, advantages)]
        for loss in (policy_loss, partial(policy_loss, seg=seg), value_loss):
            learned, dirty_learned = new.clone().requires_grad_(), dirty[0].requires_grad_()
            clean, other = loss(learned, old, advantages, mask), loss(*dirty, mask)
            assert torch.equal(clean, other)
            (gradient,) = torch.autograd.grad(clean, learned)
            (other_gradient,) = torch.autograd.grad(other, dirty_learned)
            assert torch.equal(gradient, other_gradient) and not gradient[mask == 0].any()
        assert torch.equal(whiten(advantages, mask), whiten(dirty[2], mask))


# Rewards


def test_the_score_lands_on_the_last_real_token_of_every_padded_row():
    # Row 0 ends in EOS at t = 1, row 1 has none and fills its row, row 2 is a lone EOS.
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    logprobs = torch.tensor([[-1.0, -2, 0, 0], [-1, -1, -1, -1], [-3, 0, 0, 0]])
    reference = torch.tensor([[-2.0, -2, 0, 0], [-1, -3, -1, -1], [-2, 0, 0, 0]])
    rewards = token_rewards(torch.tensor([10.0, 20, 30]), logprobs, reference, mask, beta=0.5)
    assert rewards.tolist() == [[-0.5, 10, 0, 0], [0, -1, 0, 20], [30.5, 0, 0, 0]]


def test_the_score_and_the_penalty_of_the_last_token_add_up():
    logprobs, reference = torch.tensor([[0.0, -1]]), torch.tensor([[0.0, -3]])
    rewards = token_rewards(torch.tensor([1.0]), logprobs, reference, torch.tensor([[1, 1]]), 0.1)
    assert rewards[0].tolist() == pytest.approx([0, 1 - 0.1 * 2])


def test_the_mean_k1_penalty_of_sampled_tokens_is_the_exact_kl():
    policy = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    reference = torch.tensor([0.1, 0.3, 0.2, 0.4]).log()
    exact = sum(
        math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True)
    )
    N = 40_000
    uniforms = torch.tensor(np.random.default_rng(0).random(N))
    tokens = draw(policy.expand(N, 4), uniforms)  # [N]
    nothing, ones = torch.zeros(N), torch.ones(N, 1, dtype=torch.long)
    penalty = token_rewards(
        nothing, policy[tokens][:, None], reference[tokens][:, None], ones, beta=1.0
    )
    error = float(penalty.std()) / math.sqrt(N)
    assert exact == pytest.approx(0.5 * math.log(5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.25))
    assert abs(-float(penalty.mean()) - exact) < 4 * error
    assert 4 * error < 0.05 * exact  # the test is sharp enough to mean something


# Sampling: one distribution, drawn from and scored

TOKENS = SimpleNamespace(pad_token_id=0, eos_token_id=1)  # all that `generate` asks of a tokenizer
SHAPES = [
    dict(),
    dict(temperature=0.6),
    dict(top_k=3),
    dict(top_p=0.7),
    dict(temperature=1.4, top_k=4, top_p=0.8),
]
# 99.9 % points of the chi-square distribution with 1, 2, 3, ... degrees of freedom
CHI_SQUARE_999 = """0 10.83 13.82 16.27 18.47 20.52 22.46 24.32 26.12 27.88 29.59 31.26 32.91
    34.53 36.12 37.70 39.25 40.79 42.31 43.82 45.31 46.80"""
CHI_SQUARE_999 = [float(point) for point in CHI_SQUARE_999.split()]


def config(**given):
    return Config(**{"max_response": 8, "micro_batch_size": 100} | given)


def slow_shaped(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities at one position: temperature, top-k, then top-p of the rest, by sorting."""
    scaled = [x / temperature for x in logits]
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    ranked = ranked[: top_k or len(ranked)]
    total = sum(math.exp(scaled[i]) for i in ranked)
    kept, so_far = [], 0.0
    for i in ranked:
        if so_far < top_p:
            kept.append(i)
            so_far += math.exp(scaled[i]) / total
    total = sum(math.exp(scaled[i]) for i in kept)
    return [math.exp(scaled[i]) / total if i in kept else 0.0 for i in range(len(scaled))]


def chi_square(counts, probs, N):
    """(statistic, degrees of freedom) of counts against probabilities; rare ones are merged."""
    common = {x: p for x, p in probs.items() if N * p >= 5}
    cells = [(counts[x], N * p) for x, p in common.items()]
    rest = N * (1 - sum(common.values()))
    if rest >= 1:
        cells.append((N - sum(counts[x] for x in common), rest))
    return sum((seen - wanted) ** 2 / wanted for seen, wanted in cells), len(cells) - 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_temperature_top_k_and_top_p_shape_the_distribution_as_a_loop_does(shape):
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0)) * 2  # [N, V]
    got = shaped(logits, config(**shape)).exp()
    for row, wanted in zip(got.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(slow_shaped(wanted, **shape), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drawn_tokens_pass_a_chi_square_test_against_the_scored_distribution(shape):
    logits = [1.5, 0.3, -0.4, 2.0, 0.9, -1.0]
    wanted = dict(enumerate(slow_shaped(logits, **shape)))
    N = 20_000
    uniforms = torch.tensor(np.random.default_rng(1).random(N))
    tokens = draw(shaped(torch.tensor(logits).expand(N, -1), config(**shape)), uniforms).tolist()
    statistic, freedom = chi_square(Counter(tokens), wanted, N)
    assert statistic < CHI_SQUARE_999[freedom]
    assert all(wanted[token] > 0 for token in tokens)


def test_draw_inverts_the_cumulative_distribution():
    # cumulative: 0, 0.5, 0.75, 1, 1: tokens 0 and 4 are impossible, at either end of [0, 1) too
    logprobs = torch.tensor([0, 0.5, 0.25, 0.25, 0], dtype=torch.float64).log()
    uniforms = torch.tensor([0, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs.expand(6, 5), uniforms).tolist() == [1, 1, 2, 2, 3, 3]


def tiny_llama(seed=0, vocab=11):
    torch.manual_seed(seed)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=0.4, **size)).eval()


def tiny_gpt2(seed=0, vocab=11):
    """Absolute positions: the model that breaks when left-padding shifts them."""
    torch.manual_seed(seed)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, initializer_range=0.4, **size)).eval()


both_models = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
PROMPTS = [[2, 3, 4, 5, 6, 7, 8], [9], [3, 3, 10, 4], [5, 2]]
RESPONSES = [[4, 1], [5, 6, 7, 1], [8, 9, 10, 2, 3], [1]]


def noise(count, T=8):
    rows = [np.random.default_rng([5, i]).random(T) for i in range(count)]
    return torch.tensor(np.array(rows))  # [B, T]


@both_models
def test_left_padding_does_not_change_logprobabilities(make):
    model, cfg = make(), config()
    together, _, _ = token_logprobs(model, sft.make_batch(PROMPTS, RESPONSES, 0, "cpu"), cfg)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone, _, _ = token_logprobs(model, sft.make_batch([prompt], [response], 0, "cpu"), cfg)
        assert torch.allclose(together[b, : len(response)], alone[0], atol=1e-5)
        assert not together[b, len(response) :].any()


@both_models
def test_logprobabilities_are_those_of_feeding_the_tokens_one_more_at_a_time(make):
    model, cfg = make(), config(temperature=0.7)
    got, _, _ = token_logprobs(model, sft.make_batch(PROMPTS, RESPONSES, 0, "cpu"), cfg)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].tolist()
            assert got[b, t].exp().item() == pytest.approx(
                slow_shaped(logits, 0.7)[token], abs=1e-5
            )


@both_models
def test_a_response_depends_on_its_own_prompt_and_noise_only(make):
    model, cfg, u = make(), config(max_response=20), noise(4, 20)
    together = generate(model, PROMPTS, u, TOKENS, cfg)
    assert len({len(response) for response in together}) > 1  # some end early: the interesting case
    for i in range(4):
        assert generate(model, [PROMPTS[i]], u[i : i + 1], TOKENS, cfg) == [together[i]]
    order = [2, 0, 3, 1]
    mixed = generate(model, [PROMPTS[i] for i in order], u[order], TOKENS, cfg)
    assert mixed == [together[i] for i in order]


@both_models
@pytest.mark.parametrize(
    "shape", [dict(), dict(temperature=0.7, top_k=5), dict(top_p=0.8)], ids=str
)
def test_the_distributions_sampled_with_the_cache_are_the_ones_scored_without(
    make, shape, monkeypatch
):
    model, cfg, sampled_from = make(), config(**shape), []

    def recording_draw(logprobs, uniforms):
        sampled_from.append(logprobs)
        return draw(logprobs, uniforms)

    monkeypatch.setattr(ma_ppo, "draw", recording_draw)
    responses = generate(model, PROMPTS, noise(4), TOKENS, cfg)
    batch = sft.make_batch(PROMPTS, responses, 0, "cpu")
    logprobs, every, _ = token_logprobs(model, batch, cfg)
    sampled = torch.stack(sampled_from, 1)  # [B, T, V]
    for b, response in enumerate(responses):
        for t, token in enumerate(response):
            assert torch.allclose(sampled[b, t].exp(), every[b, t].exp(), atol=1e-5)
            assert logprobs[b, t].item() == pytest.approx(sampled[b, t, token].item(), abs=1e-4)


@pytest.mark.parametrize(
    "shape", [dict(), dict(temperature=2.0, top_k=3), dict(temperature=2.0, top_p=0.9)], ids=str
)
def test_generated_responses_pass_a_chi_square_test_against_their_scored_probabilities(shape):
    model, cfg, N = tiny_llama(vocab=5), config(max_response=2, **shape), 3000
    uniforms = torch.tensor(np.random.default_rng(2).random((N, 2)))
    counts = Counter(map(tuple, generate(model, [[2, 3]] * N, uniforms, TOKENS, cfg)))
    batch = sft.make_batch(
        [[2, 3]] * len(counts), [list(response) for response in counts], 0, "cpu"
    )
    logprobs, _, _ = token_logprobs(model, batch, cfg)
    probs = dict(zip(counts, logprobs.sum(1).exp().tolist(), strict=True))
    # Probability of responses that are never drawn would be a cell of its own here.
    statistic, freedom = chi_square(counts, probs, N)
    assert freedom >= 3
    assert statistic < CHI_SQUARE_999[freedom]
    assert sum(probs.values()) < 1 + 1e-5


def test_a_generated_response_ends_with_its_first_eos_or_at_max_response():
    responses = generate(tiny_llama(), [[2, 3]] * 50, noise(50), TOKENS, config())
    for response in responses:
        assert response.count(1) == (response[-1] == 1)  # EOS: at the end or nowhere
        assert response[-1] == 1 or len(response) == 8
    assert {response[-1] == 1 for response in responses} == {True, False}


# One PPO step on tiny models

WORDS = " ".join("abcdefgh")


@pytest.fixture(scope="module")
def tokenizer():
    return sft.small_tokenizer("toy", [" " + WORDS])  # 3 special tokens and 8 words: ids 0 to 10


def tiny_models():
    """Policy, critic, reference and RM, all different, so that no term vanishes by accident."""
    critics = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        trunk = LlamaModel(tiny_llama().config).eval()
        critics.append(reward.ScalarModel(trunk))
    critic, judge_ = critics
    policy = tiny_llama(1)
    return {"policy": policy, "reference": tiny_llama(2), "critic": critic, "reward": judge_}


def examples_of(count=6):
    random = np.random.default_rng(9)
    return [
        {"number": i, "text": "", "prompt": random.integers(3, 11, random.integers(1, 7)).tolist()}
        for i in range(count)
    ]


def step_config(**given):
    return config(**{"task": "hh", "data": ["-"], "seed": 1, "temperature": 0.8} | given)


def credit(arm, rollout, tokenizer, cfg):
    """Steps 3, 4 and 5 of `train`: macro actions, rewards, advantages -> rewards [B, T]."""
    cut(arm, rollout, tokenizer, cfg)
    logprobs, ref_logprobs, mask = rollout.logprobs, rollout.ref_logprobs, rollout.batch.mask
    rewards = token_rewards(rollout.scores, logprobs, ref_logprobs, mask, cfg.beta)
    assign_credit(arm, rollout, rewards, cfg)
    return rewards


@pytest.fixture
def rolled(tokenizer):
    """(rollout, models, cfg) of one judged and credited step, arm fixed n = 3."""

    def roll(**given):
        cfg = step_config(n=3, **given)
        models, examples = tiny_models(), examples_of()
        rollout = sample(models["policy"], examples, 0, tokenizer, cfg)
        judge(rollout, models, examples, tokenizer, cfg)
        credit("fixed", rollout, tokenizer, cfg)
        return rollout, models, cfg

    return roll


def sgd(models, lr=0.5):
    """Plain SGD: unlike Adam's, its step shows the scale of the gradient."""
    return {name: torch.optim.SGD(models[name].parameters(), lr) for name in ("policy", "critic")}


def test_a_rollout_is_the_same_for_any_micro_batch_size_or_share_of_the_batch(tokenizer):
    model, examples = tiny_llama(1), examples_of()
    whole = sample(model, examples, 3, tokenizer, step_config())
    for tokens, row, mask in zip(
        whole.tokens, whole.batch.responses, whole.batch.mask, strict=True
    ):
        assert row[mask.bool()].tolist() == tokens
    assert len({len(tokens) for tokens in whole.tokens}) > 1
    for size in (1, 4):
        other = sample(model, examples, 3, tokenizer, step_config(micro_batch_size=size))
        assert torch.equal(other.batch.tokens, whole.batch.tokens)
        assert torch.equal(other.batch.mask, whole.batch.mask)
    second = sample(model, examples[3:], 3, tokenizer, step_config())  # rank 1 of 2 would sample it
    assert second.tokens == whole.tokens[3:]


def test_another_step_seed_or_prompt_number_means_other_noise(tokenizer):
    def tokens(step=0, seed=1, shift=0):
        examples = [example | {"number": example["number"] + shift} for example in examples_of()]
        return sample(tiny_llama(1), examples, step, tokenizer, step_config(seed=seed)).tokens

    assert tokens() == tokens()
    assert tokens() != tokens(step=1)
    assert tokens() != tokens(seed=2)
    assert tokens() != tokens(shift=100)


def test_judging_does_not_depend_on_the_micro_batch_size(tokenizer):
    models, examples, results = tiny_models(), examples_of(), []
    for size in (1, 4, 100):
        cfg = step_config(micro_batch_size=size, top_k=6)
        rollout = sample(models["policy"], examples, 0, tokenizer, cfg)
        judge(rollout, models, examples, tokenizer, cfg)
        results.append(rollout)
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "scores"):
        first, *others = (getattr(rollout, name) for rollout in results)
        assert first.abs().sum() > 0
        assert all(torch.allclose(first, other, atol=1e-5) for other in others), name


def test_the_value_of_a_token_is_read_in_front_of_it(tokenizer):
    models, examples, cfg = tiny_models(), examples_of(), step_config()
    rollout = sample(models["policy"], examples, 0, tokenizer, cfg)
    judge(rollout, models, examples, tokenizer, cfg)
    for b, example in enumerate(examples):
        response = rollout.batch.responses[b][rollout.batch.mask[b].bool()].tolist()
        for t in range(len(response)):
            state = sft.make_batch([example["prompt"] + response[:t]], [[]], 0, "cpu")
            last = len(example["prompt"]) + t - 1  # of s_t's tokens
            value = models["critic"](state)[0, last]
            assert rollout.values[b, t].item() == pytest.approx(value.item(), abs=1e-5)
        assert not rollout.values[b, len(response) :].any()


def test_a_response_without_eos_gets_the_fixed_penalty_and_others_the_reward_models_score(
    tokenizer,
):
    models, cfg = tiny_models(), step_config(no_eos_score=-4.0)
    batch = sft.make_batch([[4, 5], [6]], [[7, 8, 1], [9, 10, 3, 3]], 0, "cpu")
    rollout = Rollout(batch, seeds=[[0], [1]], tokens=[[7, 8, 1], [9, 10, 3, 3]], texts=["", ""])
    judge(rollout, models, examples_of(2), tokenizer, cfg)
    alone = sft.make_batch([[4, 5]], [[7, 8, 1]], 0, "cpu")
    wanted = reward.last_token_scores(models["reward"], alone)
    assert ended(batch, tokenizer).tolist() == [True, False]
    assert rollout.scores.tolist() == pytest.approx([wanted.item(), -4.0], abs=1e-5)


def test_the_gold_score_of_a_toy_response_is_judged_by_the_facts_of_its_own_post():
    rows = [sft.toy_row(i) for i in range(3)]
    best = [fact.summary.format(rows[1]["facts"][slot]) for slot, fact in sft.TOY_FACTS.items()]
    text = sft.toy_text(best)  # states all facts of post 1
    batch = sft.make_batch([[4]] * 3, [[7, 1]] * 3, 0, "cpu")
    rollout = Rollout(batch, seeds=[], tokens=[[7, 1]] * 3, texts=[text] * 3)
    score(rollout, tiny_models(), rows, TOKENS, Config())
    assert rollout.gold == [reward.gold_score(row["facts"], text) for row in rows]
    assert rollout.gold[1] == 12 * reward.TOY_GOLD["true"] > max(rollout.gold[0], rollout.gold[2])


def test_a_pad_id_that_equals_eos_does_not_count_as_an_ending():
    batch = sft.make_batch([[4], [4]], [[7, 8, 9], [7]], pad=1, device="cpu")  # EOS ids as PAD
    assert ended(batch, TOKENS).tolist() == [False, False]


def test_with_top_k_the_reference_is_scored_on_the_policys_allowed_tokens(tokenizer):
    models, examples, cfg = tiny_models(), examples_of(), step_config(top_k=2)
    rollout = sample(models["policy"], examples, 0, tokenizer, cfg)
    judge(rollout, models, examples, tokenizer, cfg)
    assert rollout.ref_logprobs.isfinite().all()
    with torch.no_grad():
        policy = sft.response_logits(models["policy"], rollout.batch)  # [B, T, V]
        policy = policy / cfg.temperature
        reference = sft.response_logits(models["reference"], rollout.batch)  # [B, T, V]
        reference = reference / cfg.temperature
    differs = 0
    for b, t in rollout.batch.mask.nonzero().tolist():
        token, best = int(rollout.batch.responses[b, t]), policy[b, t].topk(2).indices.tolist()
        other = next(x for x in best if x != token)
        wanted = 1 / (1 + math.exp(reference[b, t, other] - reference[b, t, token]))
        assert math.exp(rollout.ref_logprobs[b, t]) == pytest.approx(wanted, abs=1e-5)
        differs += token not in reference[b, t].topk(2).indices.tolist()
    assert differs  # the reference itself would not have allowed some of these tokens


def test_every_arm_hands_its_own_macro_actions_to_the_same_recipe(rolled, tokenizer):
    rollout, _, cfg = rolled()
    mask = rollout.batch.mask
    starts = {"token": token_starts(mask), "fixed": fixed_starts(mask, 3)}
    starts["whole"] = whole_starts(mask)
    starts["perplexity"] = perplexity_starts(mask, rollout.ref_logprobs)  # not the policy's
    for arm, begins in starts.items():
        rewards = credit(arm, rollout, tokenizer, cfg)
        assert torch.equal(rollout.seg, segment_ids(begins, mask))
        advantages, returns = macro_gae(rewards, rollout.values, mask, rollout.seg, 1.0, 0.95)
        assert torch.allclose(rollout.advantages, whiten(advantages, mask))
        # Not whitened: the critic learns units of reward.
        assert torch.allclose(rollout.returns, returns)


def test_the_flags_sigma_and_macro_reward_say_how_values_and_rewards_are_pooled(rolled, tokenizer):
    rollout, _, cfg = rolled(sigma="last", macro_reward="mean")
    rewards = credit("fixed", rollout, tokenizer, cfg)
    pooled = {"value_pooling": "last", "reward_pooling": "mean"}
    mask, seg = rollout.batch.mask, rollout.seg
    advantages, returns = macro_gae(rewards, rollout.values, mask, seg, 1.0, 0.95, **pooled)
    assert torch.allclose(rollout.advantages, whiten(advantages, mask))
    assert torch.allclose(rollout.returns, returns)


def test_the_control_arm_is_token_level_at_the_nth_root_of_lambda(rolled, tokenizer):
    rollout, _, cfg = rolled(lam=0.512)
    mask = rollout.batch.mask
    rewards = credit("control", rollout, tokenizer, cfg)
    advantages, returns = token_gae(rewards, rollout.values, mask, 1.0, 0.8)  # 0.8 ^ 3 = 0.512
    assert torch.allclose(rollout.advantages, whiten(advantages, mask), atol=1e-5)
    assert torch.allclose(rollout.returns, returns, atol=1e-5)
    assert torch.equal(rollout.seg, segment_ids(token_starts(mask), mask))


def test_a_termination_that_reads_text_reads_the_response_without_its_eos_and_padding(tokenizer):
    a, b, c = tokenizer("a b c", add_special_tokens=False).input_ids
    responses = [[a, b, 1], [c, a, a, b]]
    batch = sft.make_batch([[a], [b]], responses, 0, "cpu")
    rollout = Rollout(batch, seeds=[], tokens=responses, texts=[])
    cut("word", rollout, tokenizer, Config())
    assert rollout.starts.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]  # EOS joins the last word
    assert rollout.parse_fallback == 0
    cut("ast", rollout, tokenizer, Config())  # "a b" is no Python: one line each
    assert rollout.starts.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert rollout.parse_fallback == 1


def test_random_macro_actions_follow_the_row_not_its_place_in_the_batch():
    batch = sft.Batch(None, None, torch.ones(3, 40, dtype=torch.long))

    def starts(*numbers):
        seeds = [[0, 0, number] for number in numbers]
        rollout = Rollout(batch, seeds, tokens=[], texts=[])
        cut("random", rollout, None, Config())
        return rollout.starts

    forward, back = starts(1, 2, 3), starts(3, 2, 1)
    assert torch.equal(forward, back.flip(0))
    assert not torch.equal(forward[0], forward[1])


def judged_once(tokenizer, **given):
    """(rollout, what `judge` returned, models, cfg) of one step, arm fixed n = 3."""
    cfg = step_config(n=3, warmup=0, **given)
    models, examples = tiny_models(), examples_of()
    rollout = sample(models["policy"], examples, 0, tokenizer, cfg)
    first_pass = judge(rollout, models, examples, tokenizer, cfg)
    credit("fixed", rollout, tokenizer, cfg)
    return rollout, first_pass, models, cfg


@pytest.mark.parametrize(
    "given",
    [
        dict(),
        dict(top_k=3, sort_by_length=True),
        dict(ppo_epochs=2, critic_epochs=3, ratio="macro"),
    ],
    ids=str,
)
def test_an_update_from_the_pass_that_judged_is_the_same_to_the_last_digit(tokenizer, given):
    after = []
    for once in (True, False):
        rollout, first_pass, models, cfg = judged_once(tokenizer, **given)
        assert set(first_pass) == {"policy", "critic"}
        result = improve(rollout, models, sgd(models), 1, cfg, first_pass if once else {})
        parameters = [p for name in ("policy", "critic") for p in models[name].parameters()]
        after.append((result, torch.cat([p.detach().flatten() for p in parameters])))
    assert after[0][0] == after[1][0]
    assert torch.equal(after[0][1], after[1][1])
    before = [p for name in ("policy", "critic") for p in tiny_models()[name].parameters()]
    assert not torch.equal(after[0][1], torch.cat([p.flatten() for p in before]))


@pytest.mark.parametrize("size, epochs, passes", [(6, 1, 1), (6, 3, 3), (5, 1, 4), (5, 3, 8)])
def test_models_that_learn_read_a_rollout_of_one_micro_batch_once(tokenizer, size, epochs, passes):
    """Six rows: one micro-batch of six, or two of at most five."""
    given = {"micro_batch_size": size, "ppo_epochs": epochs}
    rollout, _, models, cfg = judged_once(tokenizer, **given)
    calls, with_graph = [], []
    for name in ("policy", "critic"):
        models[name].register_forward_hook(lambda *args, name=name: calls.append(name))
    models["policy"].register_forward_hook(lambda *args: with_graph.append(torch.is_grad_enabled()))
    first_pass = judge(rollout, models, examples_of(), tokenizer, cfg)
    assert set(with_graph) == {size == 6}
    improve(rollout, models, sgd(models), 1, cfg, first_pass)
    assert calls.count("policy") == calls.count("critic") == passes


def test_judging_is_the_same_to_the_last_digit_whether_it_is_learned_from_or_not(tokenizer):
    learned, _, models, cfg = judged_once(tokenizer, top_k=6)
    for model in models.values():
        model.requires_grad_(False)
    other = Rollout(learned.batch, learned.seeds, learned.tokens, learned.texts)
    first_pass = judge(other, models, examples_of(), tokenizer, cfg)
    assert not any(x.requires_grad for x in first_pass.values())
    for name in ("logprobs", "ref_logprobs", "entropy", "values", "scores"):
        assert torch.equal(getattr(other, name), getattr(learned, name)), name
        assert not getattr(learned, name).requires_grad


def test_the_policys_activations_are_not_kept_while_the_critic_learns_alone(tokenizer):
    rollout, first_pass, models, cfg = judged_once(tokenizer, critic_steps=2)
    alive = []
    answers = weakref.ref(first_pass["policy"])
    first_pass["critic"].register_hook(lambda gradient: alive.append(answers() is not None))
    improve(rollout, models, sgd(models), 1, cfg, first_pass)
    assert alive == [False] and not first_pass


def test_the_first_ratio_shows_a_policy_that_never_says_the_same_twice(tokenizer):
    """Its dropout is on, say. Its first update reads the rollout again, so that this shows."""
    rollout, _, models, cfg = judged_once(tokenizer)

    def disturb(model, args, output):
        output.logits = output.logits + torch.randn_like(output.logits)

    models["policy"].register_forward_hook(disturb)
    for step, shows in ((0, True), (1, False)):
        first_pass = judge(rollout, models, examples_of(), tokenizer, cfg)
        result = improve(rollout, models, sgd(models), step, cfg, first_pass)
        assert (abs(result["ratio_first"] - 1) > 0.1) == shows


@pytest.mark.parametrize("kind", ["token", "macro"])
@pytest.mark.parametrize("shape", [dict(), dict(top_k=3)], ids=str)
def test_the_first_ratio_is_1_and_nothing_is_clipped_in_one_epoch(rolled, kind, shape):
    rollout, models, cfg = rolled(ratio=kind, **shape)
    result = improve(rollout, models, sgd(models), 0, cfg, {})
    assert abs(result["ratio_first"] - 1) <= 1e-5
    assert result["clip_fraction"] == 0
    # At ratio 1 the loss is minus the mean of advantages that were whitened to mean 0.
    assert result["policy_loss"] == pytest.approx(0, abs=1e-5)


def test_the_clip_starts_to_act_in_the_second_epoch(rolled):
    rollout, models, cfg = rolled(ppo_epochs=3, lr=1.0, warmup=0)
    result = improve(rollout, models, sgd(models), 0, cfg, {})
    assert abs(result["ratio_first"] - 1) <= 1e-5  # of the first epoch only
    assert 0 < result["clip_fraction"] < 1


def test_ratio_first_reports_the_ratio_that_is_farthest_from_1(rolled):
    rollout, models, cfg = rolled(micro_batch_size=2)
    b, t = rollout.batch.mask.nonzero()[3].tolist()
    # As if this token had been twice as likely when it was sampled.
    rollout.logprobs[b, t] += math.log(2)
    result = improve(rollout, models, sgd(models), 0, cfg, {})
    assert result["ratio_first"] == pytest.approx(0.5, abs=1e-4)
    assert result["clip_fraction"] == pytest.approx(1 / int(rollout.batch.mask.sum()))


@pytest.mark.parametrize("kind", ["token", "macro"])
def test_the_micro_batch_size_does_not_change_the_update(rolled, kind):
    rollout, models, _ = rolled()
    after = []
    for size in (1, 4, 100):
        cfg = step_config(n=3, ratio=kind, micro_batch_size=size, warmup=0)
        copies = copy.deepcopy(models)
        result = improve(rollout, copies, sgd(copies), 0, cfg, {})
        parameters = [
            p.detach() for name in ("policy", "critic") for p in copies[name].parameters()
        ]
        after.append((result, torch.cat([p.flatten() for p in parameters])))
    before = [p.detach() for name in ("policy", "critic") for p in models[name].parameters()]
    assert (after[0][1] - torch.cat([p.flatten() for p in before])).abs().max() > 1e-4
    for result, parameters in after[1:]:
        assert torch.allclose(parameters, after[0][1], atol=1e-6)
        assert result == pytest.approx(after[0][0], abs=1e-5)


def test_an_update_makes_better_than_expected_tokens_likelier_and_the_critic_better(rolled):
    rollout, models, cfg = rolled(lr=0.05, critic_lr=0.05, warmup=0)
    optimizers = {
        name: torch.optim.SGD(models[name].parameters(), 0) for name in ("policy", "critic")
    }
    first = improve(rollout, models, optimizers, 0, cfg, {})
    with torch.no_grad():
        after, _, _ = token_logprobs(models["policy"], rollout.batch, cfg)
    assert float(((after - rollout.logprobs) * rollout.advantages).sum()) > 0
    second = improve(rollout, models, optimizers, 0, cfg, {})
    assert second["policy_loss"] < first["policy_loss"]
    assert second["value_loss"] < first["value_loss"]


def test_the_policys_learning_rate_ramps_up_and_the_critic_learns_at_once(rolled):
    rollout, models, cfg = rolled(lr=0.4, critic_lr=0.2, warmup=4)
    optimizers, seen = sgd(models), []
    for step in (0, 1, 3, 9):
        improve(rollout, models, optimizers, step, cfg, {})
        seen += [
            (optimizers["policy"].param_groups[0]["lr"], optimizers["critic"].param_groups[0]["lr"])
        ]
    assert [x for pair in seen for x in pair] == pytest.approx(
        [0.1, 0.2, 0.2, 0.2, 0.4, 0.2, 0.4, 0.2]
    )


def test_metrics_are_means_over_responses_or_over_real_tokens():
    # Two responses: 2 tokens with EOS (id 1), and 3 tokens without; macro actions 1 and 3.
    batch = sft.make_batch([[5], [6]], [[4, 1], [7, 8, 9]], pad=0, device="cpu")
    rollout = Rollout(batch, seeds=[], tokens=[[4, 1], [7, 8, 9]], texts=[])
    rollout.scores = torch.tensor([1.0, 3.0])
    rollout.gold = [0.0, 4.0]
    rollout.logprobs = torch.tensor([[-1.0, -1, 0], [-1, -1, -1]])
    rollout.ref_logprobs = torch.tensor([[-2.0, -1.5, 0], [-1, -1, -1.5]])
    rollout.entropy = torch.tensor([[1.0, 2, 0], [0, 0, 2]])
    rollout.seg = torch.tensor([[0, 0, 0], [0, 1, 2]])
    rollout.parse_fallback = 0.25
    assert summary(rollout, TOKENS) == pytest.approx(
        {
            "rm_score": 2.0,
            "rm_score_std": 1.0,
            "gold_score": 2.0,
            "pass_rate": None,
            "gold_score_std": 2.0,
            "kl": (1.5 + 0.5) / 2,  # nats a response
            "response_length": 2.5,
            "eos_rate": 0.5,
            "macro_actions": 2.0,
            "macro_length": 5 / 4,  # 5 tokens in 4 macro actions
            "parse_fallback": 0.25,
            "entropy": 5 / 5,  # nats a token
            "explained_variance": None,
        }
    )
