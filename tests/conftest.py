"""What all tests share: no GPU, one thread a process, and two tiny pipelines to look at."""

import os

# Before torch is imported, or on a machine with a GPU the chapters would pick it, and bf16.
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(QUIET)

import contextlib
import io
from functools import cache

import pytest
import second_device  # noqa: F401  PyTorch counts devices before its first backward pass, only then
from helpers import PPO_FLAGS, TOY_ARMS, Pipeline
from hypothesis import HealthCheck, settings

import eval as chapter5
import ma_ppo
import reward
import sft

# The same examples in every run; and on a busy machine every example may take its time.
options = {"max_examples": 30, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("unhurried", derandomize=True, **options)
settings.load_profile("unhurried")

load_all_rows = sft.load_rows


@cache
def load_few_rows(task, files=()):
    """`sft.load_rows`, but of the embedded tasks 1,000 rows: 30,000 take seconds in each run."""
    embedded = {"toy": sft.toy_row, "toy-code": sft.code_row}
    if task in embedded:
        return [embedded[task](i) for i in range(1000)]
    return load_all_rows(task, files)


def draw_here(folders, cfg):
    """`ma_ppo.draw_curves`, but in this process: a new one has to import everything again."""
    chapter5.main(["curves", "--runs", *map(str, folders), "--png", f"{cfg.out}/curves.png"])


@contextlib.contextmanager
def quick():
    """Within this context the chapters' `main` runs in a second or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "load_rows", load_few_rows)
        patch.setattr(ma_ppo, "draw_curves", draw_here)
        yield


@pytest.fixture
def quick_runs():
    """For tests that call `main`, and compare with `toy` or `toy_code`: the same rows as there."""
    with quick():
        yield


def make_pipeline(folder, commands):
    """Run chapters in this process.  commands: (chapter, its flags) -> Pipeline"""
    printed = io.StringIO()
    with quick(), contextlib.redirect_stdout(printed):
        for chapter, flags in commands:
            chapter.main([str(flag) for flag in flags])
    return Pipeline(folder, printed.getvalue())


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy's SFT model, RM and four PPO arms of three steps. Tests only read it."""
    out = tmp_path_factory.mktemp("toy")
    stages = ["--sft", out / "sft", "--reward_model", out / "reward"]
    short = ["--steps", 4, "--batch_size", 8, "--max_prompt", 16, "--max_response", 32]
    longer = ["--steps", 40, "--batch_size", 16, "--max_prompt", 16]
    sft_model = (sft, [*longer, "--out", out / "sft"])
    rm = (reward, [*short, "--sft", out / "sft", "--out", out / "reward"])
    arms = (ma_ppo, [*PPO_FLAGS, *stages, "--arms", *TOY_ARMS, "--out", out])
    return make_pipeline(out, [sft_model, rm, arms])


@pytest.fixture(scope="session")
def toy_code(tmp_path_factory):
    """The SFT model of toy-code, hardly trained, and one PPO step of each of its arms."""
    out = tmp_path_factory.mktemp("toy-code")
    task = ["--task", "toy-code", "--batch_size"]
    sft_model = (sft, [*task, 16, "--steps", 30, "--lr", 1e-2, "--out", out / "sft"])
    arms = (ma_ppo, [*task, 8, "--steps", 1, "--out", out])
    return make_pipeline(out, [sft_model, arms])
