"""Chapter 4: advantages, losses, rewards, sampling, and PPO steps of models of one line."""

import copy
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import samples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sft import stops
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import ma_ppo
import reward
import sft
from ma_ppo import Config, Judged, Scored, draw, generate, macro_gae, token_gae, token_rewards
from segment import fixed_starts, perplexity_starts, random_starts, segment_ids

SIGMAS = ("equal", "last", "decay", "first")
POOLINGS = [(sigma, kind) for sigma in SIGMAS for kind in ("sum", "mean")]
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=5)  # of the responses of a batch
factor = st.floats(0, 1)  # gamma, lam
seeds = st.integers(0, 2**31)


def ragged(lengths, seed, extra=2):
    """Random rewards, values, mask, macro actions, all [B, T]; what is padding holds NaN."""
    random = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths) + extra
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()  # [B, T]
    x = torch.randn(2, B, T, generator=random, dtype=torch.float64)  # [2, B, T]
    starts = random_starts(mask, [seed + b for b in range(B)], lengths=(1, 2, 3))
    return *x.masked_fill(mask == 0, torch.nan), mask, segment_ids(starts, mask)


def rows_of(lengths, *tensors):
    """For each row a tuple of lists: its real tokens in every tensor."""
    rows = zip(*(x.tolist() for x in tensors), strict=True)
    return [[x[:n] for x in row] for row, n in zip(rows, lengths, strict=True)]


def close(tensor, rows, error=1e-6):
    """Compare a padded tensor with lists of different lengths; the padding must be 0."""
    for got, wanted in zip(tensor.tolist(), rows, strict=True):
        assert got == pytest.approx(list(wanted) + [0.0] * (len(got) - len(wanted)), abs=error)


# Oracles in plain Python: one row at a time, no tensors, no masks

WEIGHTS = {  # of token i in a macro action of L
    "sum": lambda i, L: 1,
    **dict.fromkeys(("mean", "equal"), lambda i, L: 1 / L),
    "first": lambda i, L: i == 0,
    "last": lambda i, L: i == L - 1,
    "decay": lambda i, L: 1 / (L - i) / sum(1 / j for j in range(1, L + 1)),
}


def slow_pool(x, seg, how):
    pooled = []
    for k in range(max(seg) + 1):
        group = [value for value, at in zip(x, seg, strict=True) if at == k]
        pooled.append(sum(WEIGHTS[how](i, len(group)) * v for i, v in enumerate(group)))
    return pooled


def slow_gae(rewards, values, gamma, lam):
    """Pairs (advantage, target) of one row, the recursion as it is written."""
    pairs, following, value_after = [], 0.0, 0.0
    for r, value in zip(reversed(rewards), reversed(values), strict=True):
        following = r + gamma * value_after - value + gamma * lam * following
        pairs.append((following, following + value))
        value_after = value
    return pairs[::-1]


def slow_sum(x, factor):
    return [sum(factor ** (j - i) * x[j] for j in range(i, len(x))) for i in range(len(x))]


@given(lengths, seeds, factor, factor)
def test_both_estimators_are_the_recursion_from_the_end(lengths, seed, gamma, lam):
    rewards, values, mask, seg = ragged(lengths, seed)
    rows = rows_of(lengths, rewards, values, seg)
    for i, found in enumerate(token_gae(rewards, values, mask, gamma, lam)):
        close(found, [[pair[i] for pair in slow_gae(r, v, gamma, lam)] for r, v, _ in rows])
    for sigma, kind in POOLINGS:
        wanted = []
        for r, v, s in rows:
            pairs = slow_gae(slow_pool(r, s, kind), slow_pool(v, s, sigma), gamma, lam)
            wanted.append([pairs[k] for k in s])  # handed to each token
        found = macro_gae(rewards, values, mask, seg, gamma, lam, sigma, kind)
        for i in range(2):
            close(found[i], [[pair[i] for pair in row] for row in wanted])
    found = ma_ppo.discounted_sum(torch.where(mask.bool(), rewards, 0), gamma)
    close(found, [slow_sum(r, gamma) for r, _, _ in rows])


def test_the_table_of_the_primer_beside_a_lone_end_mark_and_a_row_without_padding():
    """From the score 3 and a KL penalty of 1 for "trip"; scores stand on the last real token."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [1] * 7])
    logprobs, ref_logprobs = -torch.ones(3, 7), -torch.ones(3, 7)
    ref_logprobs[0, 1], ref_logprobs[1, 0], ref_logprobs[2, 6] = -3, -2, 1
    rewards = token_rewards(torch.tensor([3.0, 10, 20]), logprobs, ref_logprobs, mask, beta=0.5)
    assert rewards.tolist() == [[0, -1, 0, 0, 0, 3, 0], [9.5] + [0] * 6, [0] * 6 + [21]]
    values = torch.tensor([[1.0, 3, 0, 1, 2, 1, 7], [5] * 7, [5] * 7])
    by_token = token_gae(rewards, values, mask, 1.0, 0.5)[0][0].tolist()
    assert by_token == [0.375, -3.25, 1.5, 1, 0, 2, 0]
    seg = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0] * 7, [0] * 7])
    by_macro = macro_gae(rewards, values, mask, seg, 1.0, 0.5)[0][0].tolist()
    assert by_macro == [-1.5, -1.5, 1, 1, 1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=10)
@given(lengths, seeds, factor, factor)
def test_macro_actions_of_one_token_are_token_level_exactly(dtype, lengths, seed, gamma, lam):
    rewards, values, mask, _ = ragged(lengths, seed)
    rewards, values = rewards.to(dtype), values.to(dtype)
    seg = segment_ids(fixed_starts(mask, 1), mask)
    by_token = token_gae(rewards, values, mask, gamma, lam)
    for sigma, kind in POOLINGS:
        by_macro = macro_gae(rewards, values, mask, seg, gamma, lam, sigma, kind)
        assert all(map(torch.equal, by_token, by_macro))


@given(lengths, seeds, factor, factor, st.sampled_from(SIGMAS))
def test_what_whole_responses_and_lambda_1_come_down_to(lengths, seed, gamma, lam, sigma):
    rewards, values, mask, seg = ragged(lengths, seed)
    rows = rows_of(lengths, rewards, values, seg)
    one = segment_ids(fixed_starts(mask, math.inf), mask)  # the sum of the rewards minus V
    advantages, targets = macro_gae(rewards, values, mask, one, gamma, lam, sigma)
    close(
        advantages, [[sum(r) - slow_pool(v, [0] * len(v), sigma)[0]] * len(r) for r, v, _ in rows]
    )
    close(targets, [[sum(r)] * len(r) for r, _, _ in rows])
    advantages, _ = token_gae(rewards, values, mask, 1.0, 1.0)  # reward-to-go minus V
    close(advantages, [np.subtract(slow_sum(r, 1), v) for r, v, _ in rows])
    _, targets = macro_gae(rewards, values, mask, seg, 1.0, 1.0)  # from a macro action's first on
    close(targets, [[slow_sum(r, 1)[s.index(k)] for k in s] for r, _, s in rows])


def slow_own(r, v, s, gamma, lam):
    """A_t from all surprises to come, each with a factor lam for every macro action begun by it."""
    after = [*v[1:], 0]
    surprises = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
    advantages = []
    for t in range(len(r)):
        terms = [gamma ** (j - t) * lam ** (s[j] - s[t]) * surprises[j] for j in range(t, len(r))]
        advantages.append(sum(terms))
    return advantages


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@settings(max_examples=10)
@given(lengths, seeds, factor, factor)
def test_without_pooling_lambda_counts_where_a_macro_action_begins(
    dtype, lengths, seed, gamma, lam
):
    rewards, values, mask, seg = ragged(lengths, seed)
    rewards, values = rewards.to(dtype), values.to(dtype)
    advantages, targets = found = ma_ppo.own_gae(rewards, values, mask, seg, gamma, lam)
    rows = rows_of(lengths, rewards, values, seg)
    wanted = [slow_own(*row, gamma, lam) for row in rows]
    digits = {torch.float64: 1e-6, torch.bfloat16: 0.1}[dtype] * max(1, *map(max, wanted))
    close(advantages, wanted, digits)
    close(targets, [np.add(A, row[1]) for A, row in zip(wanted, rows, strict=True)], digits)
    single, whole = (segment_ids(fixed_starts(mask, n), mask) for n in (1, math.inf))
    pairs = [(ma_ppo.own_gae(rewards, values, mask, single, gamma, lam), lam)]
    pairs += [(ma_ppo.own_gae(rewards, values, mask, whole, gamma, lam), 1.0)]
    for found, equal_lam in pairs:
        assert all(map(torch.equal, found, token_gae(rewards, values, mask, gamma, equal_lam)))
    cfg = Config(sigma="own", gamma=gamma, lam=lam)
    arm = ma_ppo.assign_credit("fixed", rewards, values, seg, mask, cfg)
    assert torch.equal(arm[0], advantages) and torch.equal(arm[1], targets)


@given(lengths, seeds)
def test_neither_padding_nor_batch_mates_change_an_advantage(lengths, seed):
    def estimators(rewards, values, mask, seg):
        yield from token_gae(rewards, values, mask, 0.9, 0.8)
        for sigma, kind in POOLINGS:
            yield from macro_gae(rewards, values, mask, seg, 0.9, 0.8, sigma, kind)

    tensors = ragged(lengths, seed)
    together = list(estimators(*tensors))
    for b, length in enumerate(lengths):
        alone = estimators(*(x[b : b + 1, :length] for x in tensors))
        for in_batch, single in zip(together, alone, strict=True):
            assert torch.equal(in_batch[b, :length], single[0]) and not in_batch[b, length:].any()


@given(lengths, seeds)
def test_whitening_gives_mean_0_and_variance_1_over_real_tokens(lengths, seed):
    x, _, mask, _ = ragged(lengths, seed)
    rows = [np.array(row) for (row,) in rows_of(lengths, x)]
    mean, spread = np.concatenate(rows).mean(), np.concatenate(rows).std()
    close(ma_ppo.whiten(x, mask), [(row - mean) / (spread**2 + 1e-8) ** 0.5 for row in rows])


def test_explained_variance_by_hand():
    """Rewards 0, 2 | 4: returns 2, 2 | 4, of variance 8/9."""
    rewards, mask = torch.tensor([[0.0, 2], [4, 9]]), torch.tensor([[1, 1], [1, 0]])
    right = torch.tensor([[2.0, 2], [4, 0]])
    worse = torch.tensor([[4.0, 4], [2, 0]])  # errors -2, -2, 2: variance 32/9
    for guess, wanted in ((right, 1), (right + 7, 1), (0 * right, 0), (worse, -3)):
        assert ma_ppo.explained_variance(rewards, guess, mask) == pytest.approx(wanted)


def test_rloo_compares_a_response_with_the_others_of_its_prompt():
    """Two prompts, three samples each; beta = 0.5; the KL of each lies on its first token."""
    scores, lengths = torch.tensor([1.0, 2, 6, 0, 0, 3]), [1, 2, 3, 1, 1, 2]
    log_ratios = torch.tensor([[2.0, 0, 0, 0, 4, 0], [0] * 6, [0] * 6]).T  # [6, 3]
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).long()  # [6, 3]
    found = ma_ppo.rloo_advantages(scores, log_ratios, mask, Config(beta=0.5, rloo_k=3))
    # Q = score - 0.5 KL = 0, 2, 6 and 0, -2, 3; the others' means are 4, 3, 1 and .5, 1.5, -1.
    wanted = [-4.0, -1, 5, -0.5, -3.5, 4]
    close(found, [[A] * n for A, n in zip(wanted, lengths, strict=True)])
    prompts = [{"number": i} for i in range(8)]
    rows = ma_ppo.choose_prompts("rloo", prompts, 1, Config(batch_size=6, rloo_k=3))
    assert [row["sample"] for row in rows] == [0, 1, 2, 0, 1, 2]
    others = ma_ppo.choose_prompts("token", prompts, 1, Config(batch_size=2))
    assert [row["number"] for row in rows] == [row["number"] for row in others for _ in range(3)]


@given(lengths, seeds, st.floats(0.01, 0.5), st.booleans())
def test_both_losses_and_their_gradients_are_those_of_a_loop(lengths, seed, clip, per_macro):
    new, other, mask, seg = ragged(lengths, seed)
    old = new + 0.3 * ragged(lengths, seed + 1)[0]
    totals, slopes = [0.0, 0.0], torch.zeros(2, *new.shape)
    for b, length in enumerate(lengths):
        for t in range(length):
            same = [i for i in range(length) if seg[b, i] == seg[b, t]] if per_macro else [t]
            ratio = math.exp(sum(float(new[b, i] - old[b, i]) for i in same))
            A = target = float(other[b, t])
            clipped = min(max(ratio, 1 - clip), 1 + clip)
            totals[0] -= min(ratio * A, clipped * A)
            if ratio * A <= clipped * A:  # d exp(sum) / d each of its terms = exp(sum)
                slopes[0, b, same] -= ratio * A
            V, before = float(new[b, t]), float(old[b, t])
            clipped = before + min(max(V - before, -clip), clip)
            totals[1] += 0.5 * max((V - target) ** 2, (clipped - target) ** 2)
            if abs(V - before) < clip or abs(V - target) > abs(clipped - target):
                slopes[1, b, t] += V - target
    policy, value = new.clone().requires_grad_(), new.clone().requires_grad_()
    ratio = ma_ppo.ratios(policy, old, mask, seg if per_macro else None)
    losses = [ma_ppo.policy_loss(ratio, other, mask, clip)]
    losses.append(ma_ppo.value_loss(value, old, other, mask, clip))
    sum(losses).backward()
    for i, x in enumerate((policy, value)):
        assert losses[i].item() == pytest.approx(totals[i] / sum(lengths))
        assert torch.allclose(x.grad.float(), slopes[i] / sum(lengths), atol=1e-6)


# Sampling: one distribution, drawn from and scored

GRID = torch.arange(10_000, dtype=torch.float64) / 10_000  # uniform numbers, none missing
TOKENS = SimpleNamespace(pad_token_id=0, ends=[1])  # all that `generate` asks of a tokenizer


def config(**given):
    usual = {"task": "hh", "data": ["-"], "max_response": 8, "micro_batch_size": 100, "ngram": 3}
    return Config(**usual | {"temperature": 0.8, "seed": 1} | given)


def slow_shaped(logits, temperature=1.0, top_k=0):
    """Probabilities at one position: temperature, then top-k, by sorting."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    weights = {i: math.exp(logits[i] / temperature) for i in ranked[: top_k or None]}
    return [weights.get(i, 0.0) / sum(weights.values()) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [1, 0.6, 1.4])
@pytest.mark.parametrize("top_k", [0, 3, 9])
def test_tokens_are_drawn_as_often_as_scored_and_pay_the_exact_kl_on_average(temperature, top_k):
    logits = torch.tensor([-1.0, 0.3, -0.4, 2.0, 0.9, 1.5])
    wanted = slow_shaped(logits.tolist(), temperature, top_k)
    scored = ma_ppo.shaped(logits, Config(temperature=temperature, top_k=top_k))
    assert scored.exp().tolist() == pytest.approx(wanted)
    kl = sum(p * math.log(6 * p) for p in wanted if p)  # against a reference that knows nothing
    drawn = draw(scored.expand(len(GRID), 6), GRID)[:, None]  # [grid, 1]
    guess, ones = torch.full(drawn.shape, -math.log(6)), torch.ones_like(drawn)
    penalty = token_rewards(0 * GRID, scored[drawn], guess, ones, beta=2.0)
    assert -float(penalty.mean()) == pytest.approx(2 * kl, abs=2e-3)
    frequency = drawn.flatten().bincount(minlength=6) / len(GRID)
    assert frequency.tolist() == pytest.approx(wanted, abs=2e-4)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 11}
LLAMA = LlamaConfig(**SIZES, num_attention_heads=2, initializer_range=0.4, attention_dropout=0.5)
SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 11}
GPT2 = GPT2Config(**SIZES, initializer_range=0.4)  # absolute positions, which padding would shift
both_models = pytest.mark.parametrize("family", [LLAMA, GPT2], ids=["llama", "gpt2"])
PROMPTS = [[2, 3, 4, 5, 6, 7, 8], [9], [3, 3, 10, 4], [5, 2], [6, 7, 8], [4, 9]]
NOISE = torch.tensor(np.random.default_rng(5).random((50, 20)))


def tiny(seed=0, family=LLAMA):
    """A model as `sft.load_causal_lm` and `sft.prepare` leave it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family).eval()
    model.unused_ids, model.bf16 = [], False
    return model


@both_models
@pytest.mark.parametrize("shape", [{}, {"temperature": 0.7, "top_k": 5}], ids=str)
def test_what_is_sampled_is_what_is_scored_and_each_rows_own_affair(family, shape, monkeypatch):
    """Sampled with a cache, scored without; neither depends on padding or other rows."""
    model, cfg, u, seen = tiny(0, family), config(max_response=20, **shape), NOISE[:6], []
    monkeypatch.setattr(ma_ppo, "draw", lambda x, u: seen.append(x) or draw(x, u))
    responses = generate(model, PROMPTS, u, TOKENS, cfg)
    assert len({len(response) for response in responses}) > 1
    batch = sft.make_batch(PROMPTS, responses, 0, "cpu")
    logprobs, every, _ = ma_ppo.token_logprobs(model, batch, cfg)
    real, sampled = batch.mask.bool(), torch.stack(seen, 1)  # [B, T], [B, T, N]
    assert torch.allclose(sampled[real].exp(), every[real].exp(), atol=1e-5)
    chosen = sampled.gather(2, batch.responses[..., None]).squeeze(2)  # [B, T]
    assert torch.allclose(logprobs[real], chosen[real], atol=1e-4)
    for order in ([0], [1], [2], [3], [5, 2, 0, 4, 3, 1]):
        mixed = generate(model, [PROMPTS[i] for i in order], u[order], TOKENS, cfg)
        assert mixed == [responses[i] for i in order]


@pytest.mark.parametrize("ends", [[1], [4, 1, 7]])
def test_a_response_ends_with_the_first_end_mark_or_at_max_response(ends):
    tokenizer = SimpleNamespace(pad_token_id=ends[0], ends=ends)  # such a PAD ends nothing
    model = tiny()
    model.unused_ids = [10]  # stands for no token
    responses = generate(model, [[2, 3]] * 50, NOISE[:, :8], tokenizer, config())
    for response in responses:
        assert not set(response[:-1]) & {*ends, 10}
        assert response[-1] in ends or len(response) == 8
    assert {response[-1] for response in responses if len(response) < 8} == set(ends)
    batch = sft.make_batch([[2]] * 51, [*responses, [9]], ends[0], "cpu")
    wanted = [response[-1] in ends for response in responses]
    assert ma_ppo.ended(batch, tokenizer).tolist() == [*wanted, False]


@both_models
def test_a_model_whose_cache_samples_other_tokens_is_refused(family, capsys):
    def count_padding(model, args, given):
        """As a model does that takes its place in the text from the length of its cache."""
        if given.get("cache"):
            given["position_ids"] = (given["attention_mask"].shape[1] - 1) + 0 * given["input_ids"]
        return args, given

    model, prompts = tiny(0, family), [{"prompt": prompt} for prompt in PROMPTS[:2]]
    ma_ppo.check_sampling(model, prompts, TOKENS, config())
    model.register_forward_pre_hook(count_padding, with_kwargs=True)
    with pytest.raises(SystemExit):
        ma_ppo.check_sampling(model, prompts, TOKENS, config())
    assert type(model).__name__ in capsys.readouterr().err


# A PPO step of tiny models


@pytest.fixture(scope="module")
def tokenizer():
    made = sft.small_tokenizer("toy", [" a b c d e f g h"])  # 3 special tokens, 8 words: ids 0-10
    made.ends = [1, 9]
    return made


NAMES = ("policy", "reference", "critic", "reward")


def tiny_models():
    """All four different, so that no term vanishes by accident."""
    models = [tiny(seed) for seed in range(1, 5)]
    models[2:] = [reward.ScalarModel(model.model) for model in models[2:]]
    return dict(zip(NAMES, models, strict=True))


def examples_of(**more):
    return [{"number": i, "text": "", "prompt": row} | more for i, row in enumerate(PROMPTS)]


def one_step(tokenizer, arm="fixed", **given):
    """What `train` has at hand before its update, with the tiny models."""
    cfg, models, examples = config(**given), tiny_models(), examples_of()
    rollout = ma_ppo.sample(models["policy"], examples, 0, tokenizer, cfg)
    batch, mask = rollout.batch, rollout.batch.mask
    assert len({len(row) for row in rollout.tokens}) > 1  # or padding would not matter
    judged = ma_ppo.judge(batch, models, cfg)
    scored = ma_ppo.score(rollout, models, examples, tokenizer, cfg)
    starts, _ = ma_ppo.cut(arm, rollout, judged.ref_logprobs, tokenizer, cfg)
    seg = segment_ids(starts, mask)
    rewards = token_rewards(scored.scores, judged.logprobs, judged.ref_logprobs, mask, cfg.beta)
    credit = ma_ppo.assign_credit(arm, rewards, judged.values, seg, mask, cfg)
    learned = ma_ppo.whiten(credit[0], mask), credit[1]
    lesson = ma_ppo.Lesson(batch, judged.logprobs, judged.values, *learned, starts, seg)
    return SimpleNamespace(**locals())


def improve(now, step=0, **changed):
    """Update copies of the models -> (metrics, models). SGD: its step shows the gradient's size."""
    cfg, models, optimizers = Config(**asdict(now.cfg) | changed), copy.deepcopy(now.models), {}
    for name in ("policy", "critic"):
        optimizers[name] = torch.optim.SGD(models[name].parameters())
        optimizers[name].skipped = 0
    return ma_ppo.improve(now.lesson, models, optimizers, step, cfg), models


def weights(models, *names):
    return torch.cat([p.detach().flatten() for name in names for p in models[name].parameters()])


def test_a_rollout_depends_on_seed_step_and_prompt_and_not_on_what_is_sampled_at_once(tokenizer):
    def tokens(step=3, rows=slice(6), seed=1, size=0, **more):
        cfg, examples = config(seed=seed, sample_batch_size=size), examples_of(**more)[rows]
        rollout = ma_ppo.sample(policy, examples, step, tokenizer, cfg)
        real = zip(rollout.batch.responses, rollout.batch.mask.bool(), strict=True)
        assert [row[mask].tolist() for row, mask in real] == rollout.tokens
        assert rollout.texts == tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
        return rollout.tokens

    policy = tiny(1)
    found = [tokens(), tokens(step=1), tokens(seed=2), tokens(number=9), tokens(sample=1)]
    assert all(rows not in found[:i] for i, rows in enumerate(found))
    # The first samples of `rloo` are those of the other arms.
    assert found[0] == tokens(size=4) == tokens(size=1) == tokens(sample=0)
    assert found[0][3:] == tokens(rows=slice(3, 6))  # as rank 1 of 2 samples it


@torch.no_grad()
def test_what_is_judged_is_read_in_front_of_each_token(tokenizer):
    now = one_step(tokenizer)
    for b, (prompt, response) in enumerate(zip(PROMPTS, now.rollout.tokens, strict=True)):
        for t, token in enumerate(response):
            text = prompt + response[:t]
            logits = [now.models[name](torch.tensor([text])).logits for name in NAMES[:2]]
            chances, others = (slow_shaped(x[0, -1].tolist(), 0.8) for x in logits)
            V = now.models["critic"](sft.make_batch([text], [[]], 0, "cpu"))[0, len(text) - 1]
            entropy = -sum(p * math.log(p) for p in chances)
            wanted = [math.log(chances[token]), math.log(others[token]), float(V), entropy]
            assert [float(x[b, t]) for x in now.judged] == pytest.approx(wanted, abs=1e-4)
        assert not any(x[b, len(response) :].any() for x in now.judged)


def rollout_of(responses, texts=(), seeds=()):
    batch = sft.make_batch([[4, 5]] * len(responses), responses, 0, "cpu")
    return ma_ppo.Rollout(batch, responses, list(texts), list(seeds))


def test_scores_are_the_reward_models_or_those_of_unit_tests_or_that_of_no_end():
    rows = [sft.toy_row(i) for i in range(2)]
    rollout = rollout_of([[7, 8, 1], [9, 10, 3, 3]], [rows[1]["response"]] * 2)
    models, cfg = tiny_models(), Config(no_eos_score=-4.0, micro_batch_size=1)
    scored = ma_ppo.score(rollout, models, rows, TOKENS, cfg)
    wanted = reward.last_token_scores(models["reward"], rollout_of([[7, 8, 1]]).batch)
    assert scored.scores.tolist() == pytest.approx([wanted.item(), -4.0], abs=1e-5)
    gold = [reward.gold_score(row["facts"], rows[1]["response"]) for row in rows]
    assert scored.gold.tolist() == gold and gold[0] < gold[1]  # by the facts of a row's own post
    row = sft.code_row(0) | {"text": ""}
    tests = row["problem"]["input_output"]
    known = {str(x[0]): y for x, y in zip(tests["inputs"], tests["outputs"], strict=True)}
    right, wrong = f"\ndef f(x):\n    return {known}[str(x)]", "\ndef f(x) return"
    rollout = rollout_of([[7, 1], [7, 1], [7, 7]], [right, wrong, right])
    scored = ma_ppo.score(rollout, {}, [row] * 3, TOKENS, Config(task="toy-code", no_eos_score=-2))
    assert scored.scores.tolist() == [1, -1, -2] and scored.passed.tolist() == [True, False, False]


def test_a_response_that_does_not_end_is_scored_as_it_is_where_none_is_set():
    rollout, models = rollout_of([[7, 8, 1], [9, 10, 3, 3]], ["", ""]), tiny_models()
    rows = [sft.toy_row(i) for i in range(2)]
    wanted = reward.last_token_scores(models["reward"], rollout.batch)
    cfg = ma_ppo.parse(["--no_eos_score", "none"])
    assert ma_ppo.score(rollout, models, rows, TOKENS, cfg).scores.tolist() == wanted.tolist()
    cfg = ma_ppo.parse(["--no_eos_score", "-10"])
    scores = ma_ppo.score(rollout, models, rows, TOKENS, cfg).scores.tolist()
    assert scores == [wanted[0].item(), -10]


def test_not_ending_may_not_pay_better_than_ending(capsys):
    rollout = rollout_of([[7, 1], [7, 1], [8, 8]])  # TOKENS: 1 ends
    scores = torch.tensor([-9.0, -11, -4])

    def check(no_eos_score, task="plain", rollout=rollout):
        ma_ppo.check_no_eos_score(
            rollout, scores, TOKENS, Config(no_eos_score=no_eos_score, task=task)
        )

    for paid in ("-4", "-10", "3"):
        line = stops(capsys, check, paid)
        assert paid in line and "-10.00" in line and "--no_eos_score -12.0" in line
    for fine in ("-12.0", "-10.1", "none"):
        check(fine)
    check("-4", task="apps")
    check("-4", rollout=rollout_of([[7], [7], [8]]))  # none has ended: nothing to compare with


@pytest.mark.parametrize(("arm", "copies"), [("fixed", 1), ("rloo", 4)])
def test_prompts_that_come_again_in_a_step_get_noise_of_their_own(tokenizer, arm, copies):
    few = [{"number": i, "prompt": [2, 3], "text": ""} for i in range(22 // copies)]
    cfg = config(batch_size=64, rloo_k=4, seed=5)
    examples = ma_ppo.choose_prompts(arm, few, 3, cfg)
    assert len(examples) == 64
    numbers = [example["number"] for example in examples]
    assert all(len(set(numbers[i : i + copies])) == 1 for i in range(0, 64, copies))
    rollout = ma_ppo.sample(tiny(), examples, 3, tokenizer, cfg)
    assert len({tuple(seed) for seed in rollout.seeds}) == 64
    firsts = [seed for seed in rollout.seeds if not seed[3]]
    assert sorted(firsts) == [[5, 3, i, 0] for i in range(len(few))]  # where each comes but once
    noise = [np.random.default_rng(seed).random() for seed in ([5, 3, 9], [5, 3, 9, 0])]
    assert noise[0] == noise[1]  # so the sample's number changed no run
    assert len(set(map(tuple, rollout.tokens))) > len(few) + 10  # though the prompts are one


def test_with_top_k_the_reference_is_scored_on_the_policys_allowed_tokens(tokenizer):
    now, differs = one_step(tokenizer, top_k=2), 0
    with torch.no_grad():
        policy = sft.response_logits(now.models["policy"], now.batch)  # [B, T, N]
        reference = sft.response_logits(now.models["reference"], now.batch) / 0.8  # [B, T, N]
    for b, t in now.mask.nonzero().tolist():
        token, best = int(now.batch.responses[b, t]), policy[b, t].topk(2).indices.tolist()
        wanted = reference[b, t, token] - reference[b, t, best].logsumexp(0)
        assert torch.allclose(now.judged.ref_logprobs[b, t], wanted, atol=1e-5)
        differs += token not in reference[b, t].topk(2).indices.tolist()
    assert differs  # the reference itself would not have allowed some of these tokens


def test_every_arm_hands_its_own_macro_actions_to_the_same_recipe(tokenizer):
    given = {"sigma": "last", "macro_reward": "mean", "gamma": 0.9, "critic_lam": 1.0}
    for arm, n in (("token", 1), ("fixed", 3), ("whole", math.inf)):
        now = one_step(tokenizer, arm, **given)
        assert torch.equal(now.starts, fixed_starts(now.mask, n))
        data = now.rewards, now.judged.values, now.mask, now.seg
        advantages, _ = macro_gae(*data, 0.9, 0.95, "last", "mean")
        _, targets = macro_gae(*data, 0.9, 1.0, "last", "mean")  # by the critic's own lambda
        assert all(map(torch.equal, now.credit, (advantages, targets)))
    now = one_step(tokenizer, "perplexity")
    assert torch.equal(now.starts, perplexity_starts(now.mask, now.judged.ref_logprobs))
    now = one_step(tokenizer, "control", lam=0.512)
    wanted = token_gae(now.rewards, now.judged.values, now.mask, 1.0, 0.8)  # 0.8 ^ 3 = 0.512
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(now.credit, wanted, strict=True))
    assert torch.equal(now.starts, now.mask.bool())


def test_terminations_read_the_text_and_the_seed_of_each_row(tokenizer):
    def starts(arm, responses, numbers):
        rollout = rollout_of(responses, seeds=[[0, 0, i] for i in numbers])
        return ma_ppo.cut(arm, rollout, None, tokenizer, Config())

    a, b, c = tokenizer("a b c", add_special_tokens=False).input_ids
    words, none = starts("word", [[a, b, 1], [c, a, a, b]], [0, 1])
    assert words.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]  # EOS joins the last word
    assert (none, starts("ast", [[a, b]], [0])[1]) == (0, 1)  # "a b" is no Python
    one, other = (starts("random", [[a] * 40] * 3, order)[0] for order in ([1, 2, 3], [3, 2, 1]))
    assert torch.equal(one, other.flip(0)) and not torch.equal(one[0], one[1])


@pytest.mark.parametrize("ratio", ["token", "macro"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_with_one_update_the_ratio_is_1_and_nothing_is_clipped(tokenizer, ratio, top_k):
    now = one_step(tokenizer, ratio=ratio, top_k=top_k, micro_batch_size=2, lr=1.0, warmup=0)
    for epochs in (1, 3):
        result, _ = improve(now, ppo_epochs=epochs)
        assert result["ratio_first"] == pytest.approx(1, abs=1e-5)  # of the first update
        assert (result["clip_fraction"] > 0) == (epochs > 1)
    b, t = now.mask.nonzero()[3].tolist()
    now.lesson.logprobs[b, t] += math.log(2)  # as if it had been twice as likely when sampled
    result, _ = improve(now)
    count = int(now.mask.sum() if ratio == "token" else now.starts.sum())
    assert result["ratio_first"] == pytest.approx(0.5, abs=1e-4)
    assert result["clip_fraction"] == pytest.approx(1 / count)


@pytest.mark.parametrize("ratio", ["token", "macro"])
def test_the_micro_batch_size_changes_no_judgement_and_no_update(tokenizer, ratio):
    given = {"ratio": ratio, "top_k": 6, "lr": 0.5, "warmup": 0, "ppo_epochs": 2}
    now, names = one_step(tokenizer, **given), ("policy", "critic")
    wanted, models = improve(now)
    assert (weights(models, *names) - weights(now.models, *names)).abs().max() > 1e-3
    for size in (1, 4):
        other = one_step(tokenizer, micro_batch_size=size, **given)
        for name in ("judged", "scored"):
            pairs = zip(getattr(now, name), getattr(other, name), strict=True)
            assert all(x is None or torch.allclose(x, y, atol=1e-5) for x, y in pairs)
        result, others = improve(now, micro_batch_size=size)
        assert torch.allclose(weights(others, *names), weights(models, *names), atol=1e-6)
        assert result == pytest.approx(wanted, abs=1e-5)
        assert len(list(now.lesson.parts(size))) == math.ceil(6 / size)


def test_the_critic_learns_alone_first_and_may_learn_more_often(tokenizer, monkeypatch):
    given = {"lr": 0.4, "critic_lr": 0.2, "warmup": 4, "critic_steps": 2, "critic_epochs": 3}
    now, rates, inner = one_step(tokenizer, **given), [], sft.update
    monkeypatch.setattr(sft, "update", lambda *args: rates.append(args[3]) or inner(*args))
    for step, wanted in ((0, None), (1, None), (2, 0.1), (3, 0.2), (9, 0.4)):
        rates.clear()
        result, models = improve(now, step)
        assert rates == pytest.approx([wanted] * (wanted is not None) + [0.2] * 3)
        moved = not torch.equal(weights(models, "policy"), weights(now.models, "policy"))
        assert moved == (wanted is not None) and result["value_loss"] > 0
        for name in ("policy_loss", "clip_fraction", "ratio_first"):
            assert (result[name] is None) == (wanted is None)


@pytest.mark.parametrize("value_clip, within", [(None, 0.2), (0.0, math.inf), (1.5, 1.5)])
def test_the_value_has_a_clip_of_its_own(tokenizer, value_clip, within):
    now = one_step(tokenizer, value_clip=value_clip, clip=0.2)
    V, count = now.judged.values, int(now.mask.sum())
    lesson = now.lesson._replace(values=(V - 2) * now.mask, targets=V)  # has come 2, to its target
    (loss,) = ma_ppo.value_losses(lesson, now.models["critic"], count, now.cfg)
    assert loss.item() == pytest.approx(0.5 * max(0, 2 - within) ** 2, abs=1e-5)


def test_metrics_are_means_over_responses_or_over_real_tokens():
    # Two responses: 2 tokens with EOS (id 1), and 3 tokens without; macro actions 1 and 3.
    logprobs = torch.tensor([[-1.0, -1, 0], [-1, -1, -1]])
    ref_logprobs = torch.tensor([[-2.0, -1.5, 0], [-1, -1, -1.5]])
    entropy = torch.tensor([[1.0, 2, 0], [0, 0, 2]])
    judged = Judged(logprobs, ref_logprobs, 0 * logprobs, entropy)
    scored = Scored(torch.tensor([1.0, 3]), None, torch.tensor([0, 1]))
    seg = torch.tensor([[0, 0, 0], [0, 1, 2]])
    found = ma_ppo.summary(rollout_of([[4, 1], [7, 8, 9]]), judged, scored, seg, 0.25, TOKENS)
    wanted = {"response_length": 2.5, "eos_rate": 0.5, "entropy": 5 / 5, "parse_fallback": 0.25}
    wanted |= {"ref_surprise": (2 + 1.5 + 1 + 1 + 1.5) / 5}
    wanted |= {"macro_actions": 2, "macro_length": 5 / 4}  # 5 tokens in 4 macro actions
    wanted |= {"kl": (1.5 + 0.5) / 2, "gold_score": None, "gold_score_std": None}  # nats a response
    assert found == pytest.approx(wanted | {"rm_score": 2, "rm_score_std": 1, "pass_rate": 0.5})


def test_samples_show_four_responses_token_by_token(tokenizer):
    now = one_step(tokenizer)
    rows = ma_ppo.sample_rows(7, now.rollout, now.scored, now.lesson, now.examples, tokenizer)
    assert len(rows) == 4
    for i, row in enumerate(rows):
        for name in ("seg", "values", "advantages", "targets"):
            wanted = getattr(now.lesson, name)[i, : len(row["tokens"])]
            assert row.pop(name) == wanted.tolist()
        assert "".join(row.pop("pieces")) == row.pop("response") == now.rollout.texts[i]
        known = {"tokens": now.rollout.tokens[i], "rm_score": float(now.scored.scores[i])}
        assert row == known | {"step": 7, "prompt": "", "gold_score": None}


def test_advantages_are_whitened_after_the_targets_were_taken_in_units_of_reward(toy):
    rows, raw, white = samples(toy.folder / "token")[:4], [], []  # of step 0
    for row in rows:
        raw += np.subtract(row["targets"], row["values"]).tolist()
        white += row["advantages"]
        # The last target is the last reward: the score, less a penalty of 0.
        assert row["targets"][-1] == pytest.approx(row["rm_score"], abs=1e-3)
    slope, shift = np.polyfit(raw, white, 1)
    assert np.allclose(np.multiply(raw, slope) + shift, white, atol=1e-3)
    assert abs(slope - 1) > 0.05


def test_policy_and_reference_start_equal_and_so_do_critic_and_reward_model(tokenizer, tmp_path):
    def loaded(arm, **given):
        cfg = config(sft=f"{tmp_path}/policy", reward_model=f"{tmp_path}/reward", **given)
        return ma_ppo.load_models(arm, cfg, torch.device("cpu"))[:2]

    def same(one, other):
        return all(map(torch.equal, one.parameters(), other.parameters()))

    for name in ("policy", "reward"):
        sft.save_models([tiny_models()[name], tokenizer], tmp_path / name)
    models, optimizers = loaded("token")
    assert set(models) == set(NAMES) and set(optimizers) == {"policy", "critic"}
    assert same(models["policy"], models["reference"]) and same(models["critic"], models["reward"])
    for name, model in models.items():
        trunk = getattr(model, "trunk", model)
        assert not any(module.training for module in trunk.modules())  # dropout is off
        assert {p.requires_grad for p in model.parameters()} == {name in optimizers}
    models, optimizers = loaded("rloo")
    assert set(models) == {"policy", "reference", "reward"} and set(optimizers) == {"policy"}
    models, _ = loaded("token", critic_start="sft")
    assert set(models) == set(NAMES)
    assert same(models["critic"].trunk, models["policy"].model)
    assert not same(models["critic"].trunk, models["reward"].trunk)
    models, _ = loaded("token", task="toy-code")
    assert set(models) == {"policy", "reference", "critic"}
    assert same(models["critic"].trunk, models["policy"].model)
    with pytest.raises(SystemExit):  # an RM would have nothing to do there
        ma_ppo.parse(["--task", "toy-code", "--reward_model", f"{tmp_path}/reward"])


def test_prompts_are_those_of_the_ppo_share_once_each(tokenizer, monkeypatch):
    rows = [sft.toy_row(i % 60) for i in range(80)]  # twenty posts twice
    monkeypatch.setattr(sft, "load_rows", lambda *args: rows)
    facts = {row["prompt"]: row["facts"] for row in sft.split(rows, "ppo")}
    prompts = ma_ppo.load_prompts(tokenizer, Config())
    assert [(row["text"], row["facts"]) for row in prompts] == list(facts.items())
    assert [row["number"] for row in prompts] == list(range(len(facts)))


def test_stages_share_settings_and_those_of_other_data_are_refused(monkeypatch, tmp_path, capsys):
    made = []
    for chapter in (sft, reward):
        monkeypatch.setattr(chapter, "train", made.append)
    flags = ["--seed", "7", "--max_response", "32", "--split", "30", "30", "40", "--compile", "1"]
    cfg = ma_ppo.parse([*flags, "--out", str(tmp_path), "--lr", "9", "--steps", "3"])
    ma_ppo.build_missing_stages(cfg)
    assert [stage.out for stage in made] == [cfg.sft, cfg.reward_model]
    assert made[1].sft == cfg.sft == str(tmp_path / "sft")
    for stage, usual in zip(made, (sft.Config, reward.Config), strict=True):
        assert (stage.seed, stage.max_response, stage.split) == (7, 32, [30, 30, 40])
        assert stage.compile and (stage.lr, stage.steps) == (usual.lr, usual.steps)
    sft.write_json(tmp_path / "run.json", {"config": asdict(made[0])})
    ma_ppo.run_stage(sft, str(tmp_path), replace(cfg, seed=3, lr=1.0, steps=9))
    assert len(made) == 2
    for other in ({"task": "toy-code"}, {"max_response": 9}, {"split": [9, 9, 82]}):
        with pytest.raises(SystemExit):
            ma_ppo.run_stage(sft, str(tmp_path), replace(cfg, **other))
        assert f"--{next(iter(other))}" in capsys.readouterr().err


def test_a_critic_is_kept_and_can_be_a_reward_model(toy):
    cfg = ma_ppo.parse([*toy.stages[:2], "--reward_model", str(toy.folder / "fixed/critic")])
    models, _, tokenizer = ma_ppo.load_models("fixed", cfg, torch.device("cpu"))
    before = reward.ScalarModel.load(toy.folder / "reward", tokenizer)
    (checkpoint,) = sft.checkpoints(toy.folder / "fixed")
    learned = ma_ppo.load_models("fixed", cfg, torch.device("cpu"))[:2]
    state = sft.training_state(*learned)
    sft.dcp.load(state, checkpoint_id=checkpoint)
    for name, p in models["reward"].named_parameters():
        assert torch.equal(p, state["critic"]["model_state_dict"][name])
    assert not torch.equal(models["reward"].head.weight, before.head.weight)


def test_a_reward_in_python_needs_no_reward_model(monkeypatch, tmp_path):
    made = []
    for chapter in (sft, reward):
        monkeypatch.setattr(chapter, "train", made.append)
    (tmp_path / "own.py").write_text(
        "def f(prompts, responses, rows): return [len(r) for r in rows]"
    )
    flags = ["--reward", f"{tmp_path}/own.py:f", "--out", str(tmp_path)]
    cfg = ma_ppo.parse(flags)
    ma_ppo.build_missing_stages(cfg)
    assert [stage.out for stage in made] == [f"{tmp_path}/sft"]
    assert cfg.split == made[0].split == [20, 0, 80] and not cfg.reward_model
    assert ma_ppo.parse([*flags, "--split", "10", "10", "80"]).split == [10, 10, 80]
    rows = [{"number": 0, "facts": {}, "text": "", "raw": {"a": 1, "b": 2}}] * 2
    scored = ma_ppo.score(rollout_of([[7, 1], [8]], ["", ""]), {}, rows, TOKENS, cfg)
    assert scored.scores.tolist() == [2, -4] and scored.passed is None


def test_ranks_that_do_not_divide_a_batch_are_refused_by_the_stage_s_name(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    cfg = ma_ppo.parse(["--batch_size", "48"])
    line = stops(capsys, ma_ppo.build_missing_stages, cfg)
    assert line.startswith("error: sft.py: --batch_size 32 ")


WRONG = """--clip 0, --temperature 0, --critic_lr inf, --ngram 0, --ppo_epochs 0, --gamma 1.1,
    --lam -1, --critic_lam 2, --critic_steps 60, --critic_steps 5 --arms rloo, --sigma most,
    --arms, --arms nonsense, --arms token token, --gamma 0.5 --arms control,
    --rloo_k 1 --arms rloo, --rloo_k 3 --arms rloo --batch_size 8, --reward_model ./nowhere,
    --steps 0, --batch_size 0, --nonsense 1, --no_eos_score nan, --no_eos_score -none,
    --reward nowhere.py:f, --reward ma_ppo.py, --reward ma_ppo.py:nothing, --reward reward.py:F.x,
    --reward reward.py:fail --reward_model x, --beta -1, --beta nan, --value_clip -1, --top_k -1,
    --sample_batch_size -1, --critic_epochs 0, --critic_steps -1"""


@pytest.mark.parametrize("flags", [words.strip() for words in WRONG.split(",")])
def test_what_cannot_work_is_one_line_that_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        ma_ppo.parse(flags.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and any(word.strip("-") in line for word in flags.split())
