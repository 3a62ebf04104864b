"""Faults of ranks: one that dies, stops, or fails alone ends all of them, in a line that says why."""

import signal
import time

import pytest
from test_resume import SFT, driver, run, same, stages, start, wait, whole  # noqa: F401


@pytest.fixture
def lost(driver, tmp_path):  # noqa: F811
    """Start two ranks of SFT of which the last meets a fault: (codes, printed, seconds)."""

    def go(at, *flags):
        began = time.monotonic()
        start(driver, "sft", tmp_path / "run", *SFT, *flags, ranks=2, at=at)
        return *wait(driver, tmp_path / "run"), time.monotonic() - began

    return go


def test_a_rank_killed_within_a_step_ends_the_other_in_one_line_and_the_run_goes_on(driver, lost, tmp_path):  # noqa: F811
    (first, second), printed, seconds = lost(["torch.Tensor.backward", 4, "kill"])
    assert (first, second) == (1, -signal.SIGKILL) and seconds < 60
    assert "rank 0: another rank has died, or not answered for --timeout 600 s; --resume auto" in printed
    assert "Traceback" not in printed
    run(driver, "sft", tmp_path / "run", *SFT, "--resume", "auto", ranks=2, codes=(0, 0))
    run(driver, "sft", tmp_path / "whole", *SFT, ranks=2, codes=(0, 0))
    same(tmp_path / "run", tmp_path / "whole")


def test_a_stopped_rank_ends_the_other_within_the_timeout(lost):
    at = ["torch.Tensor.backward", 4, "(sleep 30; kill -KILL {pid}) & kill -STOP {pid}"]
    (first, _), printed, _ = lost(at, "--timeout", 4)
    assert first == 1
    assert "rank 0: another rank has died, or not answered for --timeout 4 s; --resume auto" in printed


def test_an_error_of_one_rank_is_told_with_its_number_and_ends_both(lost):
    codes, printed, _ = lost(["sft.encode", 3, "exit 7"])
    assert codes == [1, 1]
    assert "\nrank 1: CalledProcessError: " in printed
