"""What all tests share: no GPU, one thread a process, and two tiny pipelines to look at."""

import os

# Before torch is imported: on a machine with a GPU the chapters would pick it, and bf16 with it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# For this process and those that tests start: so many threads share the cores well.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import contextlib
import io
from functools import cache

import pytest
import runs
import second_device  # noqa: F401  PyTorch counts devices before its first backward pass, only then
from helpers import PPO_FLAGS, TOY_ARMS, Pipeline
from hypothesis import HealthCheck, settings

import eval as chapter5
import ma_ppo
import reward
import sft

# The same examples in every run; and on a busy machine every example may take its time.
slow_is_fine = [HealthCheck.too_slow]
settings.register_profile(
    "unhurried",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=slow_is_fine,
)
settings.load_profile("unhurried")

load_all_rows = sft.load_rows


@cache
def load_few_rows(task, *more):
    """`sft.load_rows`, but of the embedded tasks 1,000 rows: 30,000 take seconds in each run."""
    if task == "toy":
        return [sft.toy_row(i) for i in range(1000)]
    if task == "toy-code":
        return [sft.code_row(i) for i in range(1000)]
    return load_all_rows(task, *more)


def draw_here(folders, cfg):
    """`ma_ppo.draw_curves`, but in this process: a new one has to import everything again."""
    png = f"{cfg.out}/curves.png"
    chapter5.main(["curves", "--run", *map(str, folders), "--png", png])


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
    sft_flags = ["--steps", 40, "--batch_size", 16, "--max_prompt", 16]
    reward_flags = ["--steps", 4, "--batch_size", 8, "--max_prompt", 16, "--max_response", 32]
    return make_pipeline(
        out,
        [
            (sft, [*sft_flags, "--out", out / "sft"]),
            (reward, [*reward_flags, "--sft", out / "sft", "--out", out / "reward"]),
            (ma_ppo, [*PPO_FLAGS, *stages, "--arms", *TOY_ARMS, "--out", out]),
        ],
    )


@pytest.fixture(scope="session")
def toy_code(tmp_path_factory):
    """The SFT model of toy-code, hardly trained, and one PPO step of each of its arms."""
    out = tmp_path_factory.mktemp("toy-code")
    task = ["--task", "toy-code"]
    sft_flags = ["--steps", 30, "--batch_size", 16, "--lr", 1e-2]
    ppo_flags = ["--steps", 1, "--batch_size", 8]
    return make_pipeline(
        out,
        [
            (sft, [*task, *sft_flags, "--out", out / "sft"]),
            (ma_ppo, [*task, *ppo_flags, "--out", out]),
        ],
    )


# Runs that are killed


@pytest.fixture(scope="session")
def driver():
    """The process that forks runs, see runs.py."""
    driver = runs.Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def stages(driver, tmp_path_factory):
    """Flags of an SFT model and an RM for PPO runs."""
    folder = tmp_path_factory.mktemp("stages")
    sft_model, reward_model = folder / "sft", folder / "reward"
    driver.run("sft", sft_model, "--steps", 2)
    driver.run("reward", reward_model, "--steps", 2, "--sft", sft_model)
    return ["--sft", sft_model, "--reward_model", reward_model]


@pytest.fixture(scope="session")
def short_runs(stages):
    """{chapter: its `runs.ShortRun`}."""
    return runs.short_runs(stages)


@pytest.fixture(scope="session")
def undisturbed(driver, short_runs, tmp_path_factory):
    """A function: a chapter's short run without disturbance (runs.Undisturbed), made once."""
    made = {}

    def run_of(chapter, *flags, ranks=1):
        key = (chapter, *flags, ranks)
        if key not in made:
            short = short_runs[chapter]
            out = tmp_path_factory.mktemp("undisturbed") / chapter
            at = runs.command_at("files", 0, "")
            driver.run(chapter, out, *short.flags, *flags, ranks=ranks, at=at)
            made[key] = runs.Undisturbed(out / short.inside, driver.count_events())
        return made[key]

    return run_of


@pytest.fixture(scope="session")
def killed(driver, tmp_path_factory):
    """An SFT run that was killed in its last step, and has checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("killed") / "sft"
    at = runs.kill_at("sft.update", 5)
    driver.run("sft", out, "--steps", 5, at=at, codes=[-9])
    return out
