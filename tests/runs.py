"""Runs of the training chapters that are killed, stopped and signalled, and go on.

Python and PyTorch take seconds to start, a tiny run a fraction of one. So one process, the
driver, imports everything once, and forks every rank of every run. This file is both sides:
imported, it has the class `Driver` that tests talk to; run as a script, it is the process behind.
"""

import atexit
import contextlib
import importlib
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp

import ma_ppo
import reward
import sft

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {"sft": sft, "reward": reward, "ma_ppo": ma_ppo}
TINY = ["--batch_size", "4", "--max_prompt", "16", "--max_response", "16", "--save_every", "2"]
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 300  # seconds after which something that should have ended counts as hanging


def make_toy_small():
    """Let this process train on few posts, and draw nothing."""
    torch.set_num_threads(1)
    small = "--steps 3 --batch_size 4 --max_prompt 16 --max_response 16"
    sft.TOY_ROWS = 300
    sft.TASK_FLAGS["toy"] = {"sft": small, "reward": small}  # of the stages that ma_ppo makes
    ma_ppo.draw_curves = lambda folders, cfg: None


def free_port():
    """(a port of this machine, the socket that keeps others from taking it).

    A socket that is bound and does not listen gives way to one that listens, and to nothing else.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held.getsockname()[1], held


# What the last rank of a run meets: at the k-th event, and at the `times` - 1 after it. An event
# is "files", of which there is one before each operation on a file in --out, or the name of a
# function, of which there is one after each of its calls.


def kill_at(event, k):
    """The last rank ends by kill -9."""
    return {"event": event, "k": k, "command": "kill -KILL {pid}", "times": 1}


def kill_within(function, k, seconds):
    """The last rank ends by kill -9 so long after the k-th call has begun, or at its end."""
    return kill_at(function, k) | {"seconds": seconds}


def command_at(event, k, command, times=1):
    """A shell command is run; in it {pid} is the last rank's process."""
    return {"event": event, "k": k, "command": command, "times": times}


class Driver:
    """The process that forks runs, one run at a time."""

    def __init__(self):
        self.pids = []
        self.codes = []  # of the ranks that have ended, in order
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def close(self):
        """End the driver."""
        self.process.kill()  # there is nothing to wait for
        self.process.wait()

    def start(self, chapter, out, *flags, ranks=1, at=None, most_bytes=0, port=0):
        """Start a run.

        at: what the last rank meets; most_bytes: that a file of the last rank may have, 0 for any;
        port: where the ranks meet, 0 for a free one.
        """
        self.wait()  # for a run that a test has left behind
        self.log = Path(f"{out}.log")
        self.log.unlink(missing_ok=True)
        job = {
            "chapter": chapter,
            "out": str(out),
            "flags": [str(flag) for flag in flags],
            "log": str(self.log),
            "ranks": ranks,
            "at": at,
            "most_bytes": most_bytes,
            "port": port,
        }
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.pids = [int(pid) for pid in self.answer().split()]
        self.codes = []

    def on_ranks(self, count, function, *args):
        """Call a function of a test file on so many ranks, which have joined one process group."""
        with tempfile.TemporaryDirectory() as folder:
            name = f"{function.__module__}.{function.__name__}"
            self.run(name, f"{folder}/ranks", *args, ranks=count)

    def wait(self, ranks=None):
        """Wait for the first so many ranks, by default all; -> their exit codes."""
        while len(self.codes) < (ranks or len(self.pids)):
            self.codes.append(int(self.answer()))
        return self.codes

    def answer(self):
        """The driver's next line; a run that hangs is killed, and the test fails."""
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            for rank in range(len(self.codes), len(self.pids)):
                self.kill(rank)
            raise AssertionError(f"still running after {PATIENCE} s:\n{self.printed()}")
        return self.process.stdout.readline()

    def kill(self, rank):
        """kill -9 a rank, if it has not ended yet."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGKILL)

    def printed(self):
        """What the ranks have printed."""
        return self.log.read_text()

    def run(self, chapter, out, *flags, codes=None, **options):
        """Run a chapter to its end, with these exit codes, by default 0; -> what it printed."""
        self.start(chapter, out, *flags, **options)
        ended = self.wait()
        assert ended == (codes or [0] * len(ended)), self.printed()
        return self.printed()

    def count_events(self):
        """How many events the last rank has met; its run had an `at`."""
        return int(re.search(r"\[(\d+) events\]", self.printed())[1])

    def run_killed(self, chapter, out, flags, at):
        """Kill a run at `at`, then finish it with --resume auto; -> what it then printed."""
        self.run(chapter, out, *flags, at=at, codes=[-signal.SIGKILL])
        printed = self.run(chapter, out, *flags, "--resume", "auto")
        assert "Traceback" not in printed
        return printed


class ShortRun(NamedTuple):
    """A chapter's flags for a run of few steps, and the folder in --out that it trains in."""

    flags: list
    inside: str


class Undisturbed(NamedTuple):
    """A run in one go: the folder that it trained in, and its last rank's operations on files."""

    folder: Path
    operations: int


def short_runs(stages):
    """{chapter: its ShortRun}; stages: flags of SFT model and RM."""
    sft_model = stages[:2]
    return {
        "sft": ShortRun(["--steps", 5], "."),
        "reward": ShortRun(["--steps", 4, *sft_model], "."),
        "ma_ppo": ShortRun(["--steps", 4, *stages, "--arms", "fixed"], "fixed"),
    }


def line_with(word, printed):
    """The one line of what was printed that contains `word`."""
    (found,) = [line for line in re.split(r"[\n\r]", printed) if word in line]
    return found


def rows(path):
    """The rows of a .jsonl file without timings; a file that is missing has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        row = json.loads(line)
        timings = ("seconds", "tokens_per_second")
        found.append({name: x for name, x in row.items() if not name.startswith(timings)})
    return found


def newest(out):
    """The folder of a run's newest checkpoint."""
    return sft.checkpoints(out)[-1]


def contents(folder):
    """All that a checkpoint holds: {name: tensor or value}."""
    reader = dcp.FileSystemReader(folder)
    state = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        is_tensor = hasattr(entry, "size")
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same(out, wanted):
    """Two finished runs are the same bit by bit: logs, weights, optimizer states, final model."""
    for name in sft.LOGS:
        assert rows(out / name) == rows(wanted / name)
    assert_near(out, wanted, atol=0)
    models = [path.relative_to(wanted) for path in wanted.glob("*.safetensors")]
    models += [path.relative_to(wanted) for path in wanted.glob("model/*.safetensors")]
    assert models
    for path in models:
        assert (out / path).read_bytes() == (wanted / path).read_bytes(), path
    assert (out / "run.json").exists()
    assert not list(out.rglob(".tmp-*"))


def assert_near(out, wanted, atol=1e-5):
    """Two runs have the same steps, and weights and optimizer states within `atol`."""
    steps = [row["step"] for row in rows(wanted / "metrics.jsonl")]
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == steps
    assert newest(out).name == newest(wanted).name
    one, two = contents(newest(out)), contents(newest(wanted))
    assert one.keys() == two.keys()
    assert any("exp_avg_sq" in name for name in one)
    for name, x in two.items():
        if torch.is_tensor(x):
            torch.testing.assert_close(one[name], x, atol=atol, rtol=0, msg=name)
        else:
            assert one[name] == x, name


# The driver's side.


def serve():
    """Read jobs, one a line; for each write its processes' ids, then their exit codes in order."""
    make_toy_small()
    sft.load_rows("toy", ())  # once
    for request in sys.stdin:
        job = json.loads(request)
        port, held = free_port()
        job["port"] = job["port"] or port
        children = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if not child:
                be_rank(job, rank)
            children.append(child)
        print(*children, flush=True)
        for child in children:
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        held.close()


def be_rank(job, rank):
    """Be one rank of a run, to the end of this process."""
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["ranks"] > 1:  # as torchrun would
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"]}
        os.environ.update({name: str(value) for name, value in place.items()})
    if job["most_bytes"] and rank == job["ranks"] - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["most_bytes"], job["most_bytes"]))
    if job["at"] and rank == job["ranks"] - 1:
        plant(job["at"], job["out"])
    code = 1
    try:
        if job["chapter"] in CHAPTERS:
            CHAPTERS[job["chapter"]].main([*TINY, "--out", job["out"], *job["flags"]])
        else:
            call(job["chapter"], job["flags"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    atexit._run_exitfuncs()  # what the end of Python does, but for taking all modules apart
    os._exit(code)


def call(name, args):
    """Call a function of a test file on all ranks, and wait for all to end."""
    module, function = name.split(".")
    sft.setup("cpu")
    getattr(importlib.import_module(module), function)(*args)
    sft.gather([])  # all wait for all


def plant(at, out):
    """Make this process meet `at`; at its end it prints how many events it has seen."""
    seen = 0

    def count():
        nonlocal seen
        seen += 1
        if 0 < at["k"] <= seen < at["k"] + at["times"]:
            command = at["command"].format(pid=os.getpid())
            subprocess.run(command, shell=True, check=True)

    def before():
        if "seconds" in at and seen == at["k"] - 1:
            command = f"sleep {at['seconds']}; kill -KILL {os.getpid()}"
            subprocess.Popen(command, shell=True)

    atexit.register(lambda: print(f"[{seen} events]", flush=True))
    if at["event"] == "files":
        count_operations_on_files(out, count)
    else:
        count_calls(at["event"], count, before)


def count_operations_on_files(out, count):
    """Call `count` before every operation on a file or folder in `out`."""
    names = ("open", "os.mkdir", "os.rename", "os.truncate", "os.remove", "os.rmdir")

    def hook(name, arguments):
        if name in names and str(arguments[0]).startswith(out):
            count()

    sys.addaudithook(hook)


def count_calls(name, count, before):
    """Call `before` and `count` around every call of the function with this dotted name."""
    *path, last = name.split(".")
    owner = torch if path[0] == "torch" else CHAPTERS[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    inner = getattr(owner, last)

    def outer(*args, **options):
        before()
        result = inner(*args, **options)
        count()
        return result

    setattr(owner, last, outer)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
