"""Faults of ranks and machines: whoever dies, stops or fails alone ends the others.

Then the run goes on with --resume auto, and ends like one to which nothing has happened.
"""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from runs import PATIENCE, QUIET, ROOT, TINY, assert_same, command_at, free_port, kill_at, line_with

KILLED = -signal.SIGKILL


@pytest.fixture
def fault(driver, short_runs, undisturbed, tmp_path):
    """A function: two ranks of which the last meets a fault; -> (exit codes, what they printed).

    The first must end by itself. The last, which may be a stopped one, is then killed; the run
    goes on, and must end like one without a fault.
    """

    def meet(chapter, at, *more):
        flags, inside = short_runs[chapter]
        out = tmp_path / chapter
        driver.start(chapter, out, *flags, *more, ranks=2, at=at)
        driver.wait(1)
        driver.kill(1)
        codes = driver.wait()
        printed = driver.printed()
        driver.run(chapter, out, *flags, "--resume", "auto", ranks=2)
        assert_same(out / inside, undisturbed(chapter, ranks=2).folder)
        return codes, printed

    return meet


@pytest.mark.parametrize(
    "event",
    [
        "torch.Tensor.backward",
        pytest.param("sft.dcp.save", marks=pytest.mark.slow),  # the others are still in it
        pytest.param("sft.Writer.write_data", marks=pytest.mark.slow),
        pytest.param("sft.claim", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_other(fault, event):
    codes, printed = fault("sft", kill_at(event, 1))
    assert codes == [1, KILLED]
    assert "Connection" in line_with("RuntimeError", printed)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_other_after_the_timeout(fault):
    at = command_at("torch.Tensor.backward", 4, "kill -STOP {pid}")
    codes, printed = fault("sft", at, "--timeout", 4)
    assert codes == [1, KILLED]
    # gloo's words depend on which of the sums under way notices first.
    line = line_with("RuntimeError", printed)
    assert "Timed out waiting 4000ms" in line or "Application timeout" in line


@pytest.mark.slow
@pytest.mark.parametrize("event", ["sft.encode", "ma_ppo.generate", "ma_ppo.judge", "ma_ppo.cut"])
def test_an_error_of_one_rank_ends_both(fault, event):
    """Of the data, the sampler, the judges and the segmentation."""
    chapter = "sft" if event.startswith("sft") else "ma_ppo"
    codes, printed = fault(chapter, command_at(event, 3, "exit 7"))
    assert codes[0] == 1
    assert "CalledProcessError: Command 'exit 7'" in printed


def test_a_port_in_use_is_one_line_and_nothing_is_written(driver, tmp_path):
    """The other rank asks whoever listens there, maybe for ever; torchrun ends it (below)."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        driver.start("sft", tmp_path / "run", ranks=2, port=port)
        driver.wait(1)
        driver.kill(1)
        assert driver.wait() == [2, KILLED]
    error = line_with("error", driver.printed())
    assert error.startswith(f"error: cannot meet the other ranks at 127.0.0.1:{port}: ")
    assert "address already in use" in error
    assert not (tmp_path / "run").exists()


# torchrun. With LOST in its environment, the last rank meets a fault in its third step, once, as
# a file remembers: LOST=rank, it is killed; machine, it and torchrun are killed; error, it fails.

SCRIPT = """
import os, signal
from pathlib import Path
import runs
from runs import ma_ppo, sft

runs.make_toy_small()
last = int(os.environ["LOCAL_RANK"]) == int(os.environ["LOCAL_WORLD_SIZE"]) - 1
update, seen = sft.update, 0

def update_or_fault(*arguments):
    global seen
    seen += 1
    lost, once = os.environ.get("LOST"), Path("lost")
    if lost and last and seen == 5 and not once.exists():
        once.touch()
        if lost == "error":
            raise ZeroDivisionError("a fault of one rank")
        if lost == "machine":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments)

sft.update = update_or_fault
ma_ppo.record(ma_ppo.main)()
"""


@pytest.fixture
def torchrun(tmp_path):
    """A function that starts torchrun on SCRIPT, and returns one that waits for its end."""
    (tmp_path / "train.py").write_text(SCRIPT)
    path = f"{ROOT}:{ROOT / 'tests'}"
    # without the last a machine that comes back never learns where rank 0 is
    settings = QUIET | {"PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []

    def begin(options, flags, lost=""):
        command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py", *TINY]
        command += ["--out", "run", *map(str, flags), "--resume", "auto"]
        log = (tmp_path / f"{len(started)}.log").open("w+")
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | settings | {"LOST": lost},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        started.append(process)

        def end():
            code = process.wait(PATIENCE)
            log.seek(0)
            return code, log.read()

        return end

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def port():
    """A free port, which nobody else can take meanwhile."""
    number, held = free_port()
    with held:
        yield number


@pytest.mark.slow
def test_torchrun_starts_a_run_again_of_which_a_rank_was_killed(
    torchrun, short_runs, undisturbed, tmp_path, port
):
    flags, inside = short_runs["ma_ppo"]
    options = ["--nproc_per_node=2", f"--master_port={port}", "--max_restarts=3"]
    code, printed = torchrun(options, flags, lost="rank")()
    assert code == 0, printed
    assert (tmp_path / "lost").exists()
    assert re.search("goes on from .*step-000002, 2 of 4 steps are done", printed)
    assert_same(tmp_path / "run" / inside, undisturbed("ma_ppo", ranks=2).folder)


@pytest.mark.slow
def test_torchrun_reports_the_error_of_a_rank_with_its_number(torchrun, short_runs, port):
    flags, _ = short_runs["ma_ppo"]
    options = ["--nproc_per_node=2", f"--master_port={port}"]
    code, printed = torchrun(options, flags, lost="error")()
    assert code == 1
    assert "[rank1]: ZeroDivisionError: a fault of one rank" in printed
    report = printed[printed.index("train.py FAILED") :]
    assert re.search(r"rank\s*: 1 ", report), printed
    assert "ZeroDivisionError: a fault of one rank" in report


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["where the ranks meet", "the other"])
def test_a_run_on_two_machines_survives_the_loss_of_one(
    torchrun, short_runs, undisturbed, tmp_path, port, lost
):
    """Two torchruns. Where the place where ranks meet is lost, both are started again."""
    flags, inside = short_runs["ma_ppo"]
    options = ["--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--local_addr=127.0.0.1"]
    options += ["--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{port}"]
    meets = [*options, "--rdzv_conf=is_host=true,last_call_timeout=1"]
    joins = [*options, "--rdzv_conf=is_host=false,last_call_timeout=1"]
    if lost == "the other":
        stays = torchrun(meets, flags)
        goes = torchrun(joins, flags, lost="machine")
        assert goes()[0] == KILLED
    else:
        goes = torchrun(meets, flags, lost="machine")
        stays = torchrun(joins, flags)
        assert goes()[0] == KILLED
        code, printed = stays()
        assert code == 1, printed
        stays = torchrun(meets, flags)
    again = torchrun(joins, flags)
    ended = [stays(), again()]
    assert [code for code, _ in ended] == [0, 0], ended
    printed = "".join(printed for _, printed in ended)
    assert re.search("goes on from .*step-000002, 2 of 4 steps are done", printed)
    assert_same(tmp_path / "run" / inside, undisturbed("ma_ppo", ranks=2).folder)


@pytest.mark.slow
def test_torchrun_says_that_its_port_is_in_use(torchrun, tmp_path):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        options = ["--nproc_per_node=2", f"--master_port={port}"]
        code, printed = torchrun(options, ["--steps", 1])()
    assert code == 1
    assert f"port: {port}" in printed
    assert "EADDRINUSE" in printed
    assert not (tmp_path / "run").exists()
