"""Whatever mixes devices raises on the played device, see second_device.py."""

import pytest
import torch
from helpers import metrics
from second_device import Device, Mixed

import eval as chapter5
import ma_ppo
import reward
import sft

TINY = ["--device", "gpu", "--steps", "2", "--batch_size", "4", "--max_response", "6"]
ARMS = "--arms control random perplexity word rloo --steps 1"  # all ways to make `starts`
KNOBS = """--arms fixed --n 3 --sigma decay --macro_reward mean --ratio macro --ppo_epochs 2
    --critic_lam 1 --critic_epochs 2 --critic_steps 1 --value_clip 0 --warmup_steps 0 --top_k 5
    --sample_batch_size 3 --micro_batch_size 3"""


@pytest.fixture
def device(monkeypatch, quick_runs):
    """The played device. Its tensors cannot be written to files: nothing is saved."""
    monkeypatch.setattr(sft, "save_models", lambda parts, out: None)
    monkeypatch.setattr(sft, "save_checkpoint", lambda *args: None)
    monkeypatch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
    with Device():
        yield


def test_a_cpu_tensor_among_those_of_the_device_is_found(device):
    there = torch.ones(3, device="gpu")
    assert (there * 2).device.type == "gpu" and (there * 2).tolist() == [2, 2, 2]
    assert there.to("cpu").device.type == "cpu"
    with pytest.raises(Mixed):
        there + torch.ones(3)


def test_sft_and_reward_model_train_on_one_device(device, toy, tmp_path):
    sft.main([*TINY, "--out", f"{tmp_path}/sft"])
    reward.main([*TINY, "--out", f"{tmp_path}/reward", "--sft", f"{toy.folder}/sft"])


@pytest.mark.parametrize("flags", [ARMS, KNOBS], ids=["arms", "knobs"])
def test_ppo_trains_on_one_device(device, toy, tmp_path, flags):
    ma_ppo.main([*TINY, *toy.stages, "--out", str(tmp_path), *flags.split()])
    for arm in flags.split(" --")[0].split()[1:]:
        assert metrics(tmp_path / arm)[-1]["policy_loss"] is not None


def test_policies_are_scored_on_one_device(device, toy, capsys):
    flags = ["--runs", f"{toy.folder}/fixed", "--prompts", "3", "--samples", "2"]
    chapter5.main(["score", *flags, "--device", "gpu"])
    assert "/fixed" in capsys.readouterr().out
