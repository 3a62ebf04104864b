"""What the critic is taught, PPO without one (rloo), explained variance; trackers."""

import math
import sys
import types

import pytest
import torch
from helpers import metrics

import ma_ppo
import sft
from ma_ppo import Config, Rollout

TINY = ["--steps", "3", "--batch_size", "8", "--max_response", "16"]


def rollout_of(scores, kl, lengths):
    """Responses of these lengths, whose KL lies on their first tokens."""
    batch = sft.make_batch([[5]] * len(lengths), [[6] * length for length in lengths], 0, "cpu")
    rollout = Rollout(batch, [], [], [])
    rollout.scores = torch.tensor(scores)
    rollout.ref_logprobs = torch.zeros(batch.mask.shape)
    rollout.logprobs = torch.zeros(batch.mask.shape)
    rollout.logprobs[:, 0] = torch.tensor(kl)
    return rollout


# rloo


def test_rloo_compares_a_response_with_the_others_of_its_prompt():
    """Two prompts, three samples each; beta = 0.5."""
    rollout = rollout_of([1.0, 2, 6, 0, 0, 3], [2.0, 0, 0, 0, 4, 0], [1, 2, 3, 1, 1, 2])
    # Q = score - 0.5 KL = 0, 2, 6 and 0, -2, 3; the others' means are 4, 3, 1 and .5, 1.5, -1.
    wanted = [-4.0, -1, 5, -0.5, -3.5, 4]
    found = ma_ppo.rloo_advantages(rollout, Config(beta=0.5, rloo_k=3))  # [6, 3]
    for row, advantage, length in zip(found.tolist(), wanted, [1, 2, 3, 1, 1, 2], strict=True):
        assert row == [advantage] * length + [0] * (3 - length)


def test_the_gradient_of_rloo_is_that_of_the_formula():
    """At ratio 1 the loss's gradient is -sum A grad log pi / tokens, with whitened A."""
    rollout = rollout_of([1.0, 3], [0.0, 0], [2, 1])
    ma_ppo.assign_credit("rloo", rollout, None, Config(rloo_k=2))
    raw = torch.tensor([[-2.0, -2], [2, 0]])  # before they are whitened
    mean, variance = -2 / 3, 4 - 4 / 9  # over three tokens
    A = (raw - mean) / (variance + 1e-8) ** 0.5 * rollout.batch.mask
    assert torch.allclose(rollout.advantages, A, atol=1e-6)
    logprobs = torch.zeros(2, 2, requires_grad=True)
    mask = rollout.batch.mask
    ma_ppo.policy_loss(logprobs, torch.zeros(2, 2), rollout.advantages, mask).backward()
    assert torch.allclose(logprobs.grad, -A / 3, atol=1e-6)


def test_rloo_samples_each_prompt_k_times_with_other_noise():
    prompts = [{"number": i, "prompt": [5 + i]} for i in range(4)]
    cfg = Config(batch_size=6, rloo_k=3)
    chosen = ma_ppo.choose_prompts("rloo", prompts, 0, cfg)
    assert [example["sample"] for example in chosen] == [0, 1, 2, 0, 1, 2]
    assert len({example["number"] for example in chosen[:3]}) == 1
    alone = ma_ppo.choose_prompts("token", prompts, 0, Config(batch_size=2))
    assert [example["number"] for example in alone] == [chosen[0]["number"], chosen[3]["number"]]


def test_rloo_has_no_critic_and_its_samples_do_not_depend_on_the_micro_batch(
    toy, tmp_path, quick_runs
):
    models, optimizers, _ = ma_ppo.load_models(
        "rloo",
        Config(sft=f"{toy.folder}/sft", reward_model=f"{toy.folder}/reward"),
        torch.device("cpu"),
    )
    assert set(models) == {"policy", "reference", "reward"} and set(optimizers) == {"policy"}
    runs = []
    for size in ("8", "3"):
        out = tmp_path / size
        flags = [*toy.stages, *TINY, "--arms", "rloo", "--micro_batch_size", size]
        ma_ppo.main([*flags, "--sample_batch_size", size, "--out", str(out)])
        runs.append(metrics(out / "rloo"))
    for row, other in zip(*runs, strict=True):
        assert row["value_loss"] is None and row["explained_variance"] is None
        for key in ("rm_score", "kl", "response_length", "entropy"):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("k", ["1", "3"])
def test_a_k_that_does_not_divide_the_batch_is_refused(capsys, k):
    with pytest.raises(SystemExit):
        ma_ppo.parse(["--arms", "rloo", "--rloo_k", k, "--batch_size", "8"])
    assert "--rloo_k" in capsys.readouterr().err


# The critic


def test_explained_variance_by_hand():
    """Rewards 0, 2 | 4: returns 2, 2 | 4, of variance 8/9."""
    rewards = torch.tensor([[0.0, 2], [4, 9]])
    mask = torch.tensor([[1, 1], [1, 0]])
    right = torch.tensor([[2.0, 2], [4, 0]])
    found = ma_ppo.explained_variance(rewards, right, mask)
    assert found == pytest.approx(1)
    assert ma_ppo.explained_variance(rewards, right + 7, mask) == pytest.approx(1)
    assert ma_ppo.explained_variance(rewards, 0 * right, mask) == pytest.approx(0)
    worse = torch.tensor([[4.0, 4], [2, 0]]) * mask  # errors -2, -2, 2: variance 32/9
    assert ma_ppo.explained_variance(rewards, worse, mask) == pytest.approx(-3)


def test_the_critics_lambda_changes_its_targets_and_not_the_advantages():
    rollout = rollout_of([3.0, 1], [0.0, 0], [3, 2])
    rollout.values = torch.tensor([[1.0, 2, 0], [0, 1, 0]])
    mask = rollout.batch.mask
    rewards = ma_ppo.token_rewards(
        rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, beta=0
    )
    ma_ppo.assign_credit("token", rollout, rewards, Config())
    advantages, returns = rollout.advantages, rollout.returns
    ma_ppo.assign_credit("token", rollout, rewards, Config(critic_lam=1.0))
    assert torch.equal(rollout.advantages, advantages)
    assert not torch.allclose(rollout.returns, returns)
    # At lambda 1 the target is what really came: Monte Carlo.
    assert torch.allclose(rollout.returns, torch.tensor([[3.0, 3, 3], [1, 1, 0]]))


def test_the_critic_learns_alone_first_and_may_learn_more_often(toy, tmp_path, quick_runs):
    flags = [*toy.stages, *TINY, "--arms", "token", "--out", str(tmp_path)]
    calls, inner = [], sft.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "update", lambda *args: calls.append(args[3]) or inner(*args))
        ma_ppo.main([*flags, "--critic_steps", "2", "--critic_epochs", "3", "--warmup", "1"])
    rows = metrics(tmp_path / "token")
    assert [row["policy_loss"] is None for row in rows] == [True, True, False]
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-5)  # the policy is still the reference
    assert calls == [1e-3] * 6 + [5e-4] + [1e-3] * 3  # learning rates of critic and policy


def test_without_a_value_clip_the_critic_goes_where_it_is_told():
    far, old, returns = torch.tensor([[5.0]]), torch.zeros(1, 1), torch.tensor([[5.0]])
    mask = torch.ones(1, 1)
    assert ma_ppo.value_loss(far, old, returns, mask, 0.2) == pytest.approx(0.5 * 4.8**2)
    assert ma_ppo.value_loss(far, old, returns, mask, math.inf) == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--critic_lam 2",
        "--critic_lam -1",
        "--critic_epochs 0",
        "--critic_steps -1",
        "--critic_steps 60",  # of 60 steps: the policy would never learn
        "--critic_steps 5 --arms token rloo",
        "--value_clip -1",
    ],
)
def test_what_the_critic_cannot_be_taught_is_refused(capsys, flags):
    with pytest.raises(SystemExit):
        ma_ppo.parse(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


# Trackers


def test_metrics_are_logged_to_a_tracker_too(tmp_path, monkeypatch, quick_runs):
    logged, ended = [], []
    tracker = types.ModuleType("trackio")
    tracker.__spec__ = types.SimpleNamespace(name="trackio")
    tracker.init = lambda project, name, config: logged.append((project, config["steps"]))
    tracker.log = logged.append
    tracker.finish = lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    flags = ["--steps", "2", "--batch_size", "4", "--max_response", "16", "--track", "trackio"]
    sft.main([*flags, "--out", str(tmp_path)])
    assert logged[0] == ("ma-rlhf", 2) and ended == [True]
    assert logged[1:] == metrics(tmp_path)


def test_a_tracker_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit):
        sft.parse(sft.Config, "sft", ["--track", "swanlab"])
    assert "pip install swanlab" in capsys.readouterr().err
