"""--shard: models split among ranks by FSDP2 are trained, sampled from, saved and resumed."""

import math
import signal

import pytest
import torch
from runs import assert_near, assert_same, command_at, kill_at, newest
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import reward
import sft

CHAPTERS = ["sft", "reward", "ma_ppo"]


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_sharded_run_is_the_run_of_one_process(
    driver, short_runs, undisturbed, tmp_path, chapter
):
    flags, inside = short_runs[chapter]
    driver.run(chapter, tmp_path, *flags, "--shard", ranks=2)
    out, wanted = tmp_path / inside, undisturbed(chapter).folder
    assert_near(out, wanted)
    if chapter == "ma_ppo":
        out, wanted = out / "model", wanted / "model"
    kind = reward.ScalarModel.load if chapter == "reward" else AutoModelForCausalLM.from_pretrained
    model, other = kind(out), kind(wanted)
    if chapter != "reward":
        assert model.config.architectures == ["LlamaForCausalLM"]
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after", [("two shards", "one"), ("one", "two shards"), ("two shards", "two shards")]
)
def test_sharded_and_whole_runs_go_on_from_each_other(
    driver, short_runs, undisturbed, tmp_path, before, after
):
    ranks = {"one": 1, "two shards": 2}
    extra = {"one": [], "two shards": ["--shard"]}
    flags, inside = short_runs["ma_ppo"]
    at = command_at("sft.micro_slices", 1, "kill -TERM {pid}")
    codes = [143] * ranks[before]
    driver.run("ma_ppo", tmp_path, *flags, *extra[before], ranks=ranks[before], at=at, codes=codes)
    assert newest(tmp_path / inside).name == "step-000001"
    more = [*extra[after], "--resume", "auto"]
    driver.run("ma_ppo", tmp_path, *flags, *more, ranks=ranks[after])
    assert_near(tmp_path / inside, undisturbed("ma_ppo").folder)


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_sharded_run_that_was_killed_goes_on(driver, short_runs, undisturbed, tmp_path, chapter):
    flags, inside = short_runs[chapter]
    at = kill_at("torch.Tensor.backward", 6 if chapter == "ma_ppo" else 3)
    codes = [1, -signal.SIGKILL]
    driver.run(chapter, tmp_path, *flags, "--shard", ranks=2, at=at, codes=codes)
    more = ["--shard", "--resume", "auto"]
    printed = driver.run(chapter, tmp_path, *flags, *more, ranks=2)
    assert "goes on from" in printed
    assert_same(tmp_path / inside, undisturbed(chapter, "--shard", ranks=2).folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_more_ranks_end_with_the_parameters_of_one(
    driver, short_runs, undisturbed, tmp_path, ranks
):
    """Without --shard too."""
    flags, inside = short_runs["ma_ppo"]
    driver.run("ma_ppo", tmp_path, *flags, ranks=ranks)
    assert_near(tmp_path / inside, undisturbed("ma_ppo").folder)


@pytest.mark.slow
def test_a_model_with_tied_weights_is_sharded_and_saved(driver, stages, tmp_path):
    _, tokenizer = sft.load_causal_lm(stages[1])
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--steps", 3, "--model", tmp_path / "gpt2"]
    driver.run("sft", tmp_path / "one", *flags)
    driver.run("sft", tmp_path / "two", *flags, "--shard", ranks=2)
    assert_near(tmp_path / "two", tmp_path / "one")
    model, _ = sft.load_causal_lm(tmp_path / "two")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gradients_of_shards_are_those_of_the_whole_model(driver):
    driver.on_ranks(2, compare_shards)


def compare_shards():
    """Losses are parts of a sum over the ranks: their gradients are added up, not averaged."""
    prompts = [[3, 4, 5, 6], [3, 4, 5], [3, 4], [3]]
    responses = [[7, 8, 9, 2], [8, 9, 2], [9, 2], [2]]
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config).eval()
    batch = sft.make_batch(prompts, responses, 0, "cpu")
    sft.sft_loss(whole, batch, token_count=10).backward()
    torch.manual_seed(0)
    shards = LlamaForCausalLM(config).eval()
    sft.shard_model(shards, torch.device("cpu"))
    batch = sft.make_batch(sft.my_share(prompts), sft.my_share(responses), 0, "cpu")
    sft.sft_loss(shards, batch, token_count=10).backward()
    for p, q in zip(whole.parameters(), shards.parameters(), strict=True):
        assert q.to_local().numel() < p.numel()
        torch.testing.assert_close(sft.gathered(q.grad), p.grad, rtol=1e-4, atol=1e-6)


def test_all_ranks_skip_an_update_of_which_one_shard_is_not_finite(driver):
    driver.on_ranks(2, skip_together)


def skip_together():
    """The gradient of the last row, which is rank 1's, is infinite, and the loss is not."""
    model = torch.nn.Linear(2, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    sft.shard_model(model, torch.device("cpu"))

    def loss():
        return model(torch.ones(1, 2))[0, 3].sqrt()

    assert math.isnan(sft.update(model, sft.make_optimizer(model), [loss], 1.0))
    assert not sft.gathered(model.weight).any()


def test_sharding_without_torchrun_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        sft.parse(sft.Config, "sft", ["--shard"])
    assert stop.value.code == 2
    assert "torchrun" in capsys.readouterr().err
