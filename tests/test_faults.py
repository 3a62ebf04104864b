"""Faults of ranks and machines: whoever dies, stops or fails alone ends the others; then the run goes on."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from test_resume import ROOT, TINY, chapters, driver, free_port, run, same, stages, start, wait  # noqa: F401

RANKS = {"ranks": 2, "codes": (0, 0)}
LOST = "another rank has died, or not answered for --timeout {} s; --resume auto goes on"


@pytest.fixture(scope="module")
def undisturbed(driver, stages, tmp_path_factory):  # noqa: F811
    """Runs of two ranks in one go: {chapter: (folder, its flags)}."""
    made = {}
    for chapter in ("sft", "ma_ppo"):
        flags, inside = chapters(stages)[chapter]
        out = tmp_path_factory.mktemp("undisturbed") / chapter
        run(driver, chapter, out, *flags, **RANKS)
        made[chapter] = out / inside, flags
    return made


@pytest.fixture
def fault(driver, undisturbed, tmp_path):  # noqa: F811
    """Start two ranks of which the last meets a fault; returns (exit codes, printed, seconds of the first).

    Behind the fault the run goes on, and must end like the one without.
    """

    def meet(chapter, at, *more):
        wanted, flags = undisturbed[chapter]
        out, began = tmp_path / chapter, time.monotonic()
        first, last = start(driver, chapter, out, *flags, *more, ranks=2, at=at)
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < began + 60:
                os.kill(first, 0)
                time.sleep(0.1)
        seconds = time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.kill(last, signal.SIGKILL)  # it may be a stopped one
        codes, printed = wait(driver, out)
        run(driver, chapter, out, *flags, "--resume", "auto", **RANKS)
        same(out if chapter == "sft" else out / wanted.name, wanted)
        return codes, printed, seconds

    return meet


def test_a_rank_killed_within_a_step_ends_the_other_in_one_line(fault):
    codes, printed, seconds = fault("sft", ["torch.Tensor.backward", 4, "kill"])
    assert codes == [1, -signal.SIGKILL] and seconds < 30
    assert f"rank 0: {LOST.format(600)}" in printed and "Traceback" not in printed


def test_a_stopped_rank_ends_the_other_within_the_timeout(fault):
    at = ["torch.Tensor.backward", 4, "kill -STOP {pid}"]
    codes, printed, seconds = fault("sft", at, "--timeout", 4)
    assert codes == [1, -signal.SIGKILL] and 4 < seconds < 20
    assert f"rank 0: {LOST.format(4)}" in printed


@pytest.mark.parametrize("function", ["sft.encode", "ma_ppo.generate", "ma_ppo.judge", "ma_ppo.credit"])
def test_an_error_of_one_rank_is_told_with_its_number_and_ends_both(fault, function):
    """Of the data, the sampler, the judge and the segmentation."""
    chapter = "sft" if function.startswith("sft") else "ma_ppo"
    codes, printed, seconds = fault(chapter, [function, 3, "exit 7"])
    assert codes == [1, 1] and seconds < 30
    assert "\nrank 1: CalledProcessError: " in printed and "Traceback" in printed


def test_a_port_in_use_ends_all_ranks_in_one_line_each_and_nothing_is_written(driver, tmp_path):  # noqa: F811
    """The one that holds it never answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        answer = threading.Timer(30, held.close)  # or a rank that waits for ever would hang this test
        answer.start()
        start(driver, "sft", tmp_path / "run", "--timeout", 3, ranks=2, port=port)
        codes, printed = wait(driver, tmp_path / "run")
        answer.cancel()
    assert codes == [2, 2] and "Traceback" not in printed and not (tmp_path / "run").exists()
    first, second = sorted(x for x in printed.splitlines() if "error" in x)
    text = f"error: cannot meet the other ranks at 127.0.0.1:{port}: "
    assert first.startswith(text) and "address already in use" in first
    assert second == f"rank 1: {text}no answer for --timeout 3 s"


# torchrun. In a process that has LOST in its environment, the last rank kills itself in its third step, and
# with LOST=machine torchrun as well: once, as a file remembers.

SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, os.environ["ROOT"])
import torch, ma_ppo, sft
torch.set_num_threads(1)
sft.TOY_ROWS = 300
ma_ppo.draw_curves = lambda *ignored: None
inner, seen = sft.update, 0

def update(*arguments):
    global seen
    seen += 1
    once, last = Path("lost"), os.environ["LOCAL_RANK"] == str(int(os.environ["LOCAL_WORLD_SIZE"]) - 1)
    if "LOST" in os.environ and last and seen == 5 and not once.exists():
        once.touch()
        if os.environ["LOST"] == "machine":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments)

sft.update = update
ma_ppo.main()
"""


@pytest.fixture
def torchrun(tmp_path):
    """Start torchrun on SCRIPT with these of its options; all are ended with the test."""
    (tmp_path / "train.py").write_text(SCRIPT)
    started = []

    def begin(options, flags, lost=""):
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ROOT": str(ROOT)}
        # without it a machine that comes back never learns where rank 0 is (README)
        environment = os.environ | quiet | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py", *TINY, "--out", "run"]
        log = (tmp_path / f"{len(started)}.log").open("w+")
        process = subprocess.Popen(
            [*command, *map(str, flags), "--resume", "auto"],
            cwd=tmp_path,
            env=environment | ({"LOST": lost} if lost else {}),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append(process)

        def end():
            code = process.wait(90)
            log.seek(0)
            return code, log.read()

        return end

    yield begin
    for process in started:
        process.kill()


def test_torchrun_starts_a_run_again_of_which_a_rank_was_killed(torchrun, undisturbed, tmp_path):
    wanted, flags = undisturbed["ma_ppo"]
    options = ["--nproc_per_node=2", f"--master_port={free_port()}", "--max_restarts=3"]
    code, printed = torchrun(options, flags, lost="rank")()
    assert code == 0 and (tmp_path / "lost").exists(), printed
    assert f"rank 0: {LOST.format(600)}" in printed
    assert re.search("goes on from .*step-000002, 2 of 4 steps are done", printed)
    same(tmp_path / "run/fixed", wanted)


@pytest.mark.parametrize("lost", ["where the ranks meet", "the other"])
def test_a_run_on_two_machines_survives_the_loss_of_one(torchrun, undisturbed, tmp_path, lost):
    """Two torchruns; where the ranks meet is lost, both are started again: else only the one that is lost."""
    wanted, flags = undisturbed["ma_ppo"]
    options = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--local_addr=127.0.0.1"]
    options += ["--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    meets = [*options, "--rdzv_conf=is_host=true,last_call_timeout=1"]
    joins = [*options, "--rdzv_conf=is_host=false,last_call_timeout=1"]
    if lost == "the other":
        stays, goes = torchrun(meets, flags), torchrun(joins, flags, lost="machine")
        assert goes()[0] == -signal.SIGKILL
        again = torchrun(joins, flags)
    else:
        goes, stays = torchrun(meets, flags, lost="machine"), torchrun(joins, flags)
        assert goes()[0] == -signal.SIGKILL
        code, printed = stays()
        assert code == 1 and LOST.format(600) in printed, printed
        stays, again = torchrun(meets, flags), torchrun(joins, flags)
    ended = [stays(), again()]
    assert [code for code, _ in ended] == [0, 0], ended
    assert re.search("goes on from .*step-000002, 2 of 4 steps are done", "".join(x for _, x in ended))
    same(tmp_path / "run/fixed", wanted)


def test_torchrun_says_that_its_port_is_in_use(torchrun, tmp_path):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        code, printed = torchrun(["--nproc_per_node=2", f"--master_port={port}"], ["--steps", 1])()
    assert code == 1 and f"port: {port}" in printed and "EADDRINUSE" in printed
    assert not (tmp_path / "run").exists()
