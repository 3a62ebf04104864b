"""--shard: models split among ranks by FSDP2 are trained, sampled from, saved and resumed like whole ones."""

import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import on_ranks
from test_resume import chapters, driver, newest, rows, run, same, stages, whole  # noqa: F401
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import reward
import sft


def near(out, wanted):
    """Two runs have the same steps, and weights and optimizer states within 1e-5."""
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [
        row["step"] for row in rows(wanted / "metrics.jsonl")
    ]
    assert newest(out).name == newest(wanted).name
    for path in newest(wanted).glob("*.safetensors"):
        one, two = load_file(newest(out) / path.name), load_file(path)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chapter", ["sft", "reward", "ma_ppo"])
def test_a_sharded_run_is_the_run_of_one_process(driver, stages, whole, tmp_path, chapter):  # noqa: F811
    (flags, inside), out = chapters(stages)[chapter], tmp_path / "run"
    run(driver, chapter, out, *flags, "--shard", ranks=2, codes=(0, 0))
    near(out / inside, whole[chapter][0])
    folder = out / inside / "model" if chapter == "ma_ppo" else out
    if chapter == "reward":
        model = reward.ScalarModel.load(folder)
        other = reward.ScalarModel.load(whole[chapter][0])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        other = AutoModelForCausalLM.from_pretrained(whole[chapter][0] / folder.relative_to(out / inside))
        assert model.config.architectures == ["LlamaForCausalLM"]
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "before, after", [((2, "--shard"), (1,)), ((1,), (2, "--shard")), ((2, "--shard"),) * 2]
)
def test_sharded_and_whole_runs_go_on_from_each_other(driver, stages, whole, tmp_path, before, after):  # noqa: F811
    (flags, inside), out = chapters(stages)["ma_ppo"], tmp_path / "run"
    at = ["sft.micro_slices", 1, "kill -TERM {pid}"]
    run(driver, "ma_ppo", out, *flags, *before[1:], at=at, ranks=before[0], codes=[143] * before[0])
    assert newest(out / inside).name == "step-000001"
    run(driver, "ma_ppo", out, *flags, *after[1:], "--resume", "auto", ranks=after[0], codes=[0] * after[0])
    near(out / inside, whole["ma_ppo"][0])


@pytest.mark.parametrize("chapter", ["sft", "reward", "ma_ppo"])
def test_a_sharded_run_that_was_killed_goes_on(driver, stages, tmp_path, chapter):  # noqa: F811
    (flags, inside), killed = chapters(stages)[chapter], (1, -signal.SIGKILL)
    flags = [*flags, "--shard"]
    run(driver, chapter, tmp_path / "whole", *flags, ranks=2, codes=(0, 0))
    at = ["torch.Tensor.backward", 6 if chapter == "ma_ppo" else 3, "kill"]
    printed = run(driver, chapter, tmp_path / "run", *flags, ranks=2, at=at, codes=killed)
    assert "rank 0: another rank has died" in printed
    printed = run(driver, chapter, tmp_path / "run", *flags, "--resume", "auto", ranks=2, codes=(0, 0))
    assert "goes on from" in printed
    same(tmp_path / "run" / inside, tmp_path / "whole" / inside)


@pytest.mark.parametrize("ranks", [2, 4])
def test_more_ranks_end_with_the_parameters_of_one(driver, stages, tmp_path, ranks):  # noqa: F811
    flags = ["--steps", 5, *stages, "--terminations", "fixed"]
    for count in (1, ranks):
        run(driver, "ma_ppo", tmp_path / str(count), *flags, ranks=count, codes=[0] * count)
    near(tmp_path / str(ranks) / "fixed", tmp_path / "1/fixed")


def test_a_model_with_tied_weights_is_sharded_and_saved(driver, stages, tmp_path):  # noqa: F811
    _, tokenizer = sft.load_causal_lm(stages[1])
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--steps", 3, "--model", tmp_path / "gpt2"]
    run(driver, "sft", tmp_path / "one", *flags)
    run(driver, "sft", tmp_path / "two", *flags, "--shard", ranks=2, codes=(0, 0))
    near(tmp_path / "two", tmp_path / "one")
    model, _ = sft.load_causal_lm(tmp_path / "two")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gradients_of_shards_are_those_of_the_whole_model():
    on_ranks(2, same_gradients)


def same_gradients():
    """Losses are parts of a sum over the ranks: their gradients are added up, not averaged."""
    examples = [{"prompt": [3, 4, 5, 6][: 4 - i], "response": [7, 8, 9, 2][i:]} for i in range(4)]
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {}
    for name, part in (("whole", examples), ("shards", sft.shard(examples))):
        torch.manual_seed(0)
        models[name] = LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).eval()
        if name == "shards":
            sft.shard_model(models[name], torch.device("cpu"))
        batch = sft.make_batch([e["prompt"] for e in part], [e["response"] for e in part], 0, "cpu")
        sft.sft_loss(models[name], batch, token_count=10).backward()
    for p, q in zip(models["whole"].parameters(), models["shards"].parameters(), strict=True):
        torch.testing.assert_close(sft.whole(q.grad), p.grad, rtol=1e-4, atol=1e-6)


def test_all_ranks_skip_an_update_of_which_one_shard_is_not_finite():
    on_ranks(2, skip_together)


def skip_together():
    """The gradient of the last row, which is rank 1's, is infinite, and the loss is not."""
    model = torch.nn.Linear(2, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    sft.shard_model(model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), **sft.ADAM)

    def loss():
        return model(torch.ones(1, 2))[0, 3].sqrt()

    assert math.isnan(sft.update(model, optimizer, [loss], 1.0))
    assert not sft.whole(model.weight).any()


def test_sharding_without_torchrun_is_refused(capsys):
    with pytest.raises(SystemExit):
        sft.parse(sft.Config, "sft", ["--shard"])
    assert "torchrun" in capsys.readouterr().err
