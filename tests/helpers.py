"""Functions that several test files use: starting programs, reading and comparing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TOY_ARMS = ["token", "fixed", "whole", "control"]
# The PPO runs of the fixture `toy`, as flags: those that are compared with it need the same.
PPO_FLAGS = ["--steps", "3", "--batch_size", "8", "--max_prompt", "16", "--max_response", "32"]
PPO_FLAGS += ["--temperature", "0.9"]


class Pipeline(NamedTuple):
    """Runs of several chapters."""

    folder: Path  # holds sft, reward where there is an RM, one folder an arm, curves.png
    printed: str  # on stdout

    @property
    def stages(self):
        """Flags that name the stages."""
        return ["--sft", str(self.folder / "sft"), "--reward_model", str(self.folder / "reward")]


def python(*arguments, **environment):
    """Run Python in the repository's root, and wait for its end."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def succeeds(*arguments, **environment):
    """What Python prints when it is run with these arguments, which must not fail."""
    done = python(*arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def read_lines(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(folder):
    """A run's metrics, one dict a step."""
    return read_lines(Path(folder) / "metrics.jsonl")


def samples(folder):
    """A PPO run's samples."""
    return read_lines(Path(folder) / "samples.jsonl")


def settings(folder):
    """The settings of a PPO run."""
    return json.loads((Path(folder) / "config.json").read_text())


def result(folder):
    """The results of a stage."""
    return json.loads((Path(folder) / "run.json").read_text())["result"]


def same_metrics(run, other):
    """Every metric of every step but the time it took, within float tolerance."""
    assert len(run) == len(other)
    for row, wanted in zip(run, other, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in row.items():
            # None: a task without a gold score has none
            if not key.startswith(("seconds", "tokens_per_second")) and wanted[key] is not None:
                near = pytest.approx(wanted[key], rel=1e-3, abs=2e-5)
                assert value == near, (row["step"], key)
