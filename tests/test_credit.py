"""Chapter 5, Appendix C: the truth by continuations, on trees that can be enumerated."""

import copy
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as chapter5
import ma_ppo
import sft
from eval import Job, bias, correlation, moments, rewards_to_go, rmse, true_advantages, true_spread

ROOT = Path(__file__).parent.parent
PAD, EOS, A, B = range(4)  # a vocabulary of two tokens, A and B, beside the end mark
LONGEST = 3  # tokens of a response, so that a tree has at most 3^3 leaves
PROMPT = [A, B, B]
QUARTERS = [0.125, 0.375, 0.625, 0.875]  # uniform numbers, one in the middle of each quarter
TOKENIZER = SimpleNamespace(
    pad_token_id=PAD,
    eos_token_id=EOS,
    batch_decode=lambda rows, **options: ["AB"[row[0] == B] if row else "" for row in rows],
)


class Lookup(torch.nn.Module):
    """A language model that is a table: of each text, the next token's probabilities in quarters.

    With quarters, four uniform numbers a token, all equally likely, are all that can happen: the
    mean over them is the exact expectation.
    """

    bf16 = False

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # tells its device
        self.seed = seed
        self.device = torch.device("cpu")

    def probabilities(self, text):
        """[PAD, EOS, A, B] after a list of tokens: 1/4, 1/4 and 1/2 in some order."""
        order = np.random.default_rng([self.seed, *text]).permutation(3)
        return [0.0, *(np.array([0.25, 0.25, 0.5])[order])]

    def forward(self, input_ids, attention_mask, cache=None, logits_to_keep=0, **options):
        """Log-probabilities at the last positions; the cache is simply all tokens so far."""
        tokens = input_ids if cache is None else torch.cat([cache, input_ids], 1)  # [B, S]
        S = tokens.shape[1]
        logits = []
        for row, real in zip(tokens.tolist(), attention_mask.tolist(), strict=True):
            for end in range(S - logits_to_keep + 1, S + 1):
                text = [token for token, here in zip(row[:end], real[:end], strict=True) if here]
                logits.append(self.probabilities(text))
        logits = torch.tensor(logits).clamp(min=1e-30).log().view(len(tokens), logits_to_keep, 4)
        return SimpleNamespace(logits=logits, cache=tokens)


class Judge(torch.nn.Module):
    """A reward model that is a table: a number for each text, read at its last token."""

    def score(self, text):
        return float(np.random.default_rng([9, *text]).normal())

    def forward(self, batch):
        numbers = []
        for row, real in zip(batch.tokens.tolist(), batch.attention.tolist(), strict=True):
            for end in range(1, len(row) + 1):
                text = [token for token, here in zip(row[:end], real[:end], strict=True) if here]
                numbers.append(self.score(text))
        return torch.tensor(numbers).view(batch.tokens.shape)


MODELS = {"policy": Lookup(1), "reference": Lookup(2), "reward": Judge()}
CFG = ma_ppo.Config(task="plain", beta=0.3, max_response=LONGEST, no_eos_score=-2.0)


def reward_of(tokens, t):
    """The reward of token t of a response: the KL penalty, and at its end the score."""
    text = PROMPT + tokens[:t]
    policy = MODELS["policy"].probabilities(text)[tokens[t]]
    reference = MODELS["reference"].probabilities(text)[tokens[t]]
    found = -CFG.beta * (np.log(policy) - np.log(reference))
    if tokens[t] == EOS:
        found += MODELS["reward"].score(PROMPT + tokens[: t + 1])
    elif t == LONGEST - 1:
        found += CFG.no_eos_score
    return found


def exact_value(tokens):
    """V* of the text PROMPT + tokens: the tree of all that may follow, walked through."""
    if len(tokens) == LONGEST or tokens[-1:] == [EOS]:
        return 0.0
    total = 0.0
    for token, p in enumerate(MODELS["policy"].probabilities(PROMPT + tokens)):
        if p > 0:
            longer = [*tokens, token]
            total += p * (reward_of(longer, len(tokens)) + exact_value(longer))
    return total


def leaves(tokens=()):
    """All responses that there can be."""
    tokens = list(tokens)
    if len(tokens) == LONGEST or tokens[-1:] == [EOS]:
        return [tokens]
    return [leaf for token in (EOS, A, B) for leaf in leaves([*tokens, token])]


def rollout_and_examples(responses):
    prompts = [PROMPT] * len(responses)
    rollout = chapter5.rollout_of(prompts, responses, TOKENIZER, "cpu")
    return rollout, [{"prompt": PROMPT, "number": i} for i in range(len(responses))]


def test_the_truth_is_exact_where_all_continuations_are_enumerated():
    rollout, examples = rollout_and_examples(leaves())
    assert len(rollout.tokens) == 15  # 1 of one token, 2 of two, 12 of three
    every = torch.tensor(list(product(QUARTERS, repeat=LONGEST)), dtype=torch.float64)  # [64, 3]
    places = {}  # {text: (response, position)}: many responses begin alike
    for i, tokens in enumerate(rollout.tokens):
        for t in range(len(tokens)):
            places[tuple(tokens[:t])] = (i, t)
    assert len(places) == 1 + 2 + 4
    for text, (i, t) in places.items():
        jobs = [Job(i, t, sample) for sample in range(len(every))]
        found = rewards_to_go(jobs, every, rollout, examples, MODELS, TOKENIZER, CFG)
        assert np.mean(found) == pytest.approx(exact_value(list(text)), abs=1e-5)


def test_continuations_of_different_places_can_be_written_together():
    rollout, examples = rollout_and_examples([[A, B, EOS], [B, A, A]])
    jobs = [Job(0, 0, 0), Job(1, 2, 0), Job(0, 1, 0), Job(1, 1, 0)]
    uniforms = torch.tensor(np.random.default_rng(0).random((4, LONGEST)))
    together = rewards_to_go(jobs, uniforms, rollout, examples, MODELS, TOKENIZER, CFG)
    for i, job in enumerate(jobs):
        alone = rewards_to_go([job], uniforms[i : i + 1], rollout, examples, MODELS, TOKENIZER, CFG)
        assert together[i] == pytest.approx(alone[0], abs=1e-5)


def test_sampled_truth_agrees_with_the_exact_one_within_its_error():
    responses = [[A, B, EOS], [B, A, A], [EOS], [A, EOS]]
    rollout, examples = rollout_and_examples(responses)
    count = 200
    found = chapter5.true_values(rollout, examples, [count] * 4, MODELS, TOKENIZER, CFG)
    assert found.shape == (2, 4, 4)
    for i, tokens in enumerate(responses):
        for t in range(len(tokens)):
            exact = exact_value(tokens[:t])
            for half in found[:, i, t]:
                assert half == pytest.approx(exact, abs=4 * 1.5 / (count / 2) ** 0.5)
            assert found[0, i, t] != found[1, i, t]  # halves of their own
        assert (found[:, i, len(tokens) :] == 0).all()  # behind the end nothing is to come
    # The same text in front, but another response: continuations of its own.
    assert len(set(found[:, :, 0].ravel())) == 8


def test_the_truth_does_not_depend_on_micro_batches_or_other_responses():
    rollout, examples = rollout_and_examples([[A, B, EOS], [B, A, A]])
    both = chapter5.true_values(rollout, examples, [4, 4], MODELS, TOKENIZER, CFG)
    one_by_one = ma_ppo.Config(**(vars(CFG) | {"micro_batch_size": 1}))
    again = chapter5.true_values(rollout, examples, [4, 4], MODELS, TOKENIZER, one_by_one)
    assert again == pytest.approx(both, abs=1e-5)
    alone, examples = rollout_and_examples([[A, B, EOS]])
    first = chapter5.true_values(alone, examples, [4], MODELS, TOKENIZER, CFG)
    assert first[:, 0] == pytest.approx(both[:, 0], abs=1e-5)


# A*


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 999))
def test_advantages_add_up_to_the_return_minus_the_value_of_the_prompt(rewards, seed):
    rng = np.random.default_rng(seed)
    values = np.append(rng.normal(size=len(rewards)), 0.0)
    starts = np.flatnonzero(np.append(True, rng.random(len(rewards) - 1) < 0.4))
    found = true_advantages(rewards, values, starts)
    assert found.sum() == pytest.approx(sum(rewards) - values[0])
    whole = true_advantages(rewards, values, [0])
    assert whole == pytest.approx([sum(rewards) - values[0]])


def test_an_advantage_is_expected_to_be_0_under_the_policy_itself():
    # Over the tree: the mean of A* of the next token, weighed by its probability.
    for tokens in ([], [A], [B], [A, B]):
        mean = 0.0
        for token, p in enumerate(MODELS["policy"].probabilities(PROMPT + tokens)):
            if p > 0:
                longer = [*tokens, token]
                rewards = [reward_of(longer, t) for t in range(len(longer))]
                values = [exact_value(longer[:t]) for t in range(len(longer) + 1)]
                mean += p * true_advantages(rewards, np.array(values), range(len(longer)))[-1]
        assert mean == pytest.approx(0, abs=1e-9)


def test_the_squares_of_the_surprises_of_a_response_add_up_to_that_of_their_sum_on_average():
    one_by_one = together = total = 0.0
    for tokens in leaves():
        T = len(tokens)
        chances = [MODELS["policy"].probabilities(PROMPT + tokens[:t])[tokens[t]] for t in range(T)]
        p = np.prod(chances)
        values = np.array([exact_value(tokens[:t]) for t in range(T + 1)])
        rewards = np.array([reward_of(tokens, t) for t in range(T)])
        each = true_advantages(rewards, values, range(T))
        found = chapter5.of_surprises(np.zeros(T), rewards, np.stack([values, values]), [0, T - 1])
        assert found.truth_squared == pytest.approx((rewards.sum() - values[0]) ** 2)
        one_by_one += p * (each**2).sum()
        together += p * found.truth_squared
        total += p
    assert total == pytest.approx(1)
    assert one_by_one == pytest.approx(together)


def test_the_estimators_with_the_true_values_are_as_good_as_theory_says():
    # A critic that knows V*: one step of token_gae (lambda = 0) is A* itself, and so is a whole
    # response with sigma = first. With lambda = 1 the token's credit has the noise of what follows.
    responses = leaves()
    rollout, _ = rollout_and_examples(responses)
    mask = rollout.batch.mask
    rewards, values = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, tokens in enumerate(responses):
        for t in range(len(tokens)):
            rewards[i, t], values[i, t] = reward_of(tokens, t), exact_value(tokens[:t])
    one_step, _ = ma_ppo.token_gae(rewards, values, mask, 1.0, 0.0)
    all_steps, _ = ma_ppo.token_gae(rewards, values, mask, 1.0, 1.0)
    whole, _ = ma_ppo.macro_gae(rewards, values, mask, torch.zeros_like(mask), 1.0, 0.9, "first")
    for i, tokens in enumerate(responses):
        T = len(tokens)
        given_values = np.append(values[i, :T], 0.0)
        truth = true_advantages(rewards[i, :T].numpy(), given_values, range(T))
        assert one_step[i, :T].tolist() == pytest.approx(truth, abs=1e-5)
        assert all_steps[i, :T].tolist() == pytest.approx(truth[::-1].cumsum()[::-1], abs=1e-5)
        assert whole[i, 0].item() == pytest.approx(truth.sum(), abs=1e-5)


# The measures


def noisy(count, error, seed=0):
    """Guesses, A*, and what two halves of continuations say of it, of `count` responses."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(1.0, 2.0, (count, 9))
    guesses = 0.5 * truth + rng.normal(0.3, 1.0, (count, 9))
    halves = truth + rng.normal(0.0, error, (2, count, 9))
    return guesses, truth, halves


def test_without_sampling_error_the_measures_are_the_ordinary_ones():
    guesses, truth, halves = noisy(40, error=0.0)
    sums = np.array([moments(guesses[i], halves[:, i]) for i in range(40)])
    g, a = guesses.ravel(), truth.ravel()
    assert correlation(sums, axis=0) == pytest.approx(np.corrcoef(g, a)[0, 1])
    assert bias(sums, axis=0) == pytest.approx((g - a).mean())
    assert rmse(sums, axis=0) == pytest.approx(((g - a) ** 2).mean() ** 0.5)
    assert true_spread(sums, axis=0) == pytest.approx(a.std())


def test_the_sampling_error_of_the_truth_is_taken_off():
    guesses, truth, halves = noisy(4000, error=3.0)  # larger than the spread of A* itself
    sums = np.array([moments(guesses[i], halves[:, i]) for i in range(4000)])
    g, a = guesses.ravel(), truth.ravel()
    assert correlation(sums, axis=0) == pytest.approx(np.corrcoef(g, a)[0, 1], abs=0.03)
    assert rmse(sums, axis=0) == pytest.approx(((g - a) ** 2).mean() ** 0.5, abs=0.1)
    assert true_spread(sums, axis=0) == pytest.approx(a.std(), abs=0.1)
    naive = np.corrcoef(g, halves.mean(0).ravel())[0, 1]
    assert correlation(sums, axis=0) > naive + 0.1


def test_a_truth_that_chance_hides_gives_no_division_by_zero():
    sums = np.array([moments(np.array([1.0, 2.0]), np.array([[1.0, -1.0], [-1.0, 1.0]]))] * 3)
    assert -1 <= correlation(sums, axis=0) <= 1
    assert true_spread(sums, axis=0) == 0


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A toy run of two steps with untrained models, which keeps the checkpoint of each step."""
    out = tmp_path_factory.mktemp("credit")
    rows = [sft.toy_row(i) for i in range(200)]  # of 30,000
    patch = pytest.MonkeyPatch()
    patch.setattr(sft, "load_rows", lambda *arguments: rows)
    small = ["--seed", "1", "--max_response", "12", "--batch_size", "4", "--n", "4"]
    keep = ["--steps", "2", "--save_every", "1", "--keep", "9"]
    models = ["--sft", str(out / "sft"), "--reward_model", str(out / "rm")]
    policy, tokenizer = sft.start_model(ma_ppo.Config(seed=1), rows)
    rm = ma_ppo.reward.ScalarModel(copy.deepcopy(policy.model))
    sft.save_models([policy, tokenizer], out / "sft")
    sft.save_models([rm, tokenizer], out / "rm")
    cfg = ma_ppo.parse([*small, *keep, *models, "--out", str(out)])
    ma_ppo.train("fixed", sft.claim(out / "fixed"), cfg, sft.setup())
    yield out / "fixed"
    patch.undo()


def test_credit_compares_every_estimator_at_every_step(run, tmp_path, capsys):
    png = tmp_path / "credit.png"
    size = ["--responses", "3", "--continuations", "2", "--at", "0", "2"]
    chapter5.main(["credit", "--run", str(run), "--png", str(png), *size])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    _, _, *lines = lines
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ["V", "return", *(estimator.name for estimator in chapter5.ESTIMATORS)]
    assert [row[:2] for row in rows] == [
        [f"{run.parent.name}/fixed, step {step}", name] for step in (0, 2) for name in names
    ]
    actions = {row[1]: int(row[2]) for row in rows[:11]}
    assert actions["whole, σ = first"] == 3  # one a response
    assert actions["token"] == actions["control"] == actions["V"] == actions["return"]
    assert actions["fixed, σ = last"] >= actions["token"] / 4
    assert rows[2][3:] != rows[13][3:]  # the policy and the critic have learned
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_models_are_those_of_the_checkpoint(run):
    args = chapter5.Options()
    cfg = chapter5.read_config(run, args)
    final, _ = sft.load_causal_lm(run / "model")
    for step in (0, 1, 2):
        models, _ = chapter5.models_at(run, step, cfg, args)
        pairs = zip(models["policy"].parameters(), final.parameters(), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        assert same == (step == 2)


@pytest.mark.slow
def test_two_ranks_share_the_continuations_and_print_the_same_table(run):
    flags = f"eval.py credit --run {run} --responses 3 --continuations 2 --at 2".split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    tables = []
    for words in ([], torchrun):
        command = [sys.executable, *words, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        tables.append(done.stdout)
    assert "whole, σ = first" in tables[0]
    assert tables[0] == tables[1]


def test_at_step_0_the_responses_are_those_that_training_met(run):
    args = chapter5.Options(responses=3, continuations=2)
    cfg = chapter5.read_config(run, args)
    models, tokenizer = chapter5.models_at(run, 0, cfg, args)
    prompts = ma_ppo.load_prompts(tokenizer, cfg)
    chosen = sft.batch_rows(prompts, 0, cfg.batch_size, cfg.seed)[:3]
    examined = chapter5.examine("run", chosen, 0, models, tokenizer, cfg, args)
    kept = chapter5.read_rows(run / "samples.jsonl")[:3]
    assert [row["tokens"] for row in kept] == examined.rollout.tokens
    for i, row in enumerate(kept):
        values = examined.rollout.values[i, : len(row["tokens"])].tolist()
        assert values == pytest.approx(row["values"], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--at", "1000"], "step 1000"),
        (["--at", "-1"], "--at"),
        (["--continuations", "3"], "--continuations"),
        (["--responses", "1"], "--responses"),
    ],
)
def test_what_cannot_be_compared_is_one_line_with_exit_code_2(run, capsys, flags, what):
    with pytest.raises(SystemExit) as stop:
        chapter5.main(["credit", "--run", str(run), *flags])
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert what in line
