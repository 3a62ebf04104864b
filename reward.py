"""Chapter 2: the reward model (RM), learned from pairs of which people preferred one.

The RM is the SFT model with its next-token head replaced by a scalar one: r(x, y) is read at the last real
token of prompt x and response y. With y+ preferred over y-, Bradley and Terry's model says P(y+ beats y-) =
sigmoid(r+ - r-), so

    loss = -log sigmoid(r(x, y+) - r(x, y-)), averaged over pairs

Only differences are learned. A bias therefore shifts the scores afterwards so that demonstrations score 0 on
average: "better than the human answer" becomes "above zero", and runs can be compared (SPEC 1.2).

    python reward.py                                         # toy; needs the model that sft.py wrote
    python reward.py --sft runs/toy/sft --out runs/toy/reward300 --steps 300
    python reward.py --task hh --data pairs.jsonl.gz
    torchrun --nproc_per_node=2 reward.py
"""

import atexit
import contextlib
import ctypes
import functools
import inspect
import json
import math
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

import sft
from sft import opt, print0

PAIR = ("prompt", "chosen", "rejected")
HEAD = "scalar_head.safetensors"


@dataclass
class Config(sft.Config):
    """Settings of the reward-model chapter."""

    model: str = opt("", "only recorded: what the SFT model was made from")
    sft: str = opt("", "SFT model whose trunk the RM starts from; empty: runs/TASK/sft")
    steps: int = opt(600, "number of updates")
    batch_size: int = opt(32, "preference pairs per update, over all ranks")
    micro_batch_size: int = opt(32, "pairs, so twice as many sequences, per forward pass and rank")
    lr: float = opt(1.5e-3, "peak learning rate; cosine schedule with 10 % warm-up")


class ScalarModel(nn.Module):
    """A transformer trunk with one number per position: the RM, and later the critic."""

    def __init__(self, trunk):
        super().__init__()
        width = trunk.config.hidden_size
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))  # SPEC 8
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """A number at every position.  batch: `sft.Batch` -> [B, P+T]"""
        hidden = self.trunk(
            input_ids=batch.tokens,
            attention_mask=batch.attention,
            position_ids=sft.positions(batch.attention),
            use_cache=False,
        ).last_hidden_state  # [B, P+T, hidden]
        return self.head(hidden).squeeze(-1).float()  # [B, P+T]

    def save_pretrained(self, folder):
        """Write the trunk in Hugging Face format and the head beside it."""
        self.trunk.save_pretrained(folder)
        save_file(self.head.state_dict(), Path(folder) / HEAD)

    @classmethod
    def load(cls, folder, device="cpu"):
        """The model that `save_pretrained` wrote; a causal LM's folder gives its trunk and a fresh head."""
        model = cls(sft.load_or_fail(AutoModel.from_pretrained, folder, dtype=torch.float32).eval())
        head = Path(folder) / HEAD
        if head.exists():
            model.head.load_state_dict(load_file(head))
        return model.to(device)


def last_token_scores(model, batch):
    """The RM's score r(x, y), read at the last real token: the EOS where there is one.  -> [B]

    Not at the last column: on padded rows that is PAD, which the RM never learned to read (SPEC 6.8, 8).
    """
    place = torch.arange(batch.attention.shape[1], device=batch.attention.device)  # [P+T]
    last = (batch.attention * place).argmax(1, keepdim=True)  # [B, 1]
    return model(batch).gather(1, last).squeeze(1)  # [B]


def preference_loss(chosen, rejected, pair_count):
    """Bradley-Terry loss, summed over pairs and divided by `pair_count`, that of all ranks.  [B] -> scalar"""
    return -F.logsigmoid(chosen - rejected).sum() / pair_count


def main(argv=None):
    """Train the reward model, measure it on held-out pairs, set its bias, save it."""
    cfg = sft.parse(Config, "reward", argv)
    cfg.sft = cfg.sft or str(Path("runs") / cfg.task / "sft")
    device = sft.setup(cfg.device)
    train, test = load_pairs(cfg, "rm"), load_pairs(cfg, "test")
    out = sft.make_folder(cfg.out)

    model, tokenizer = start_model(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), **sft.ADAM)
    print0(f"RM: {len(train):,} preference pairs, batches of {cfg.batch_size} -> {out}")

    examples = sft.encode(train, tokenizer, cfg, PAIR)
    metrics = sft.Metrics(out, cfg.steps, "reward")
    for step in range(cfg.steps):
        began = time.perf_counter()
        pairs = sft.shard(sft.batch_rows(examples, step, cfg.batch_size, cfg.seed))
        losses = micro_losses(model, pairs, tokenizer, cfg, device)
        loss = sft.update(model, optimizer, losses, sft.cosine_lr(step, cfg.steps, cfg.lr))
        metrics.log({"step": step, "loss": loss, "seconds": time.perf_counter() - began}, show="loss")
    metrics.bar.close()

    result = evaluate(model, test, tokenizer, cfg, device)
    result["bias"] = center(
        model, sft.split(sft.load_rows(cfg.task, tuple(cfg.data)), "rm")[:512], tokenizer, cfg, device
    )
    report(result)
    sft.save_run([model, tokenizer], out, cfg, result)


def load_pairs(cfg, share):
    """The preference pairs of one share of the task's rows: {prompt, chosen, rejected} of text."""
    rows = sft.split(sft.load_rows(cfg.task, tuple(cfg.data)), share)
    return [toy_pair(row) for row in rows] if cfg.task == "toy" else rows


def start_model(cfg, device):
    """The SFT trunk under a fresh scalar head, the same on every rank, and the SFT tokenizer."""
    torch.manual_seed(cfg.seed)
    if not Path(cfg.sft).is_dir():
        sft.fail(
            f"--sft {cfg.sft}: no such folder; make one with python sft.py --task {cfg.task} --out {cfg.sft}"
        )
    model = ScalarModel.load(cfg.sft, device)
    sft.broadcast_parameters(model)
    return model, AutoTokenizer.from_pretrained(cfg.sft)


def micro_losses(model, pairs, tokenizer, cfg, device):
    """Yield one loss per micro-batch of pairs, both responses of a pair in one forward pass."""
    for part in sft.micro_slices(len(pairs), cfg.micro_batch_size):
        scores = pair_scores(model, pairs[part], tokenizer, device)  # [2, pairs]
        yield preference_loss(scores[0], scores[1], cfg.batch_size)


def pair_scores(model, pairs, tokenizer, device):
    """RM scores of encoded pairs: chosen in row 0, rejected in row 1.  -> [2, number of pairs]"""
    prompts = [pair["prompt"] for pair in pairs] * 2
    responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
    return last_token_scores(model, batch).view(2, len(pairs))  # [2, pairs]


def gather(objects):
    """Every rank's list, concatenated in rank order: after `sft.shard`, the global order."""
    if sft.world() == 1:
        return list(objects)
    parts = [None] * sft.world()
    dist.all_gather_object(parts, list(objects))
    return [x for part in parts for x in part]


@torch.no_grad()
def evaluate(model, rows, tokenizer, cfg, device):
    """Accuracy on held-out pairs: the share in which the preferred response scores higher.

    Where the task has a gold score, also against noiseless labels: the truly better response counts as
    preferred, and pairs of equal gold score are left out.
    """
    pairs = sft.encode(rows, tokenizer, cfg, PAIR)
    mine = range(sft.rank(), len(pairs), sft.world())
    margins = []
    for part in sft.micro_slices(len(mine), cfg.micro_batch_size):
        scores = pair_scores(model, [pairs[i] for i in mine[part]], tokenizer, device)  # [2, pairs]
        margins += zip(mine[part], (scores[0] - scores[1]).tolist(), strict=True)
    margins = [margin for _, margin in sorted(gather(margins))]
    result = {"pairs": len(rows), "accuracy": sum(m > 0 for m in margins) / len(rows)}
    if cfg.task == "toy":
        gold = [gold_score(r["prompt"], r["chosen"]) - gold_score(r["prompt"], r["rejected"]) for r in rows]
        decided = [(m, g) for m, g in zip(margins, gold, strict=True) if g != 0]
        result["accuracy_noiseless"] = sum(m * g > 0 for m, g in decided) / len(decided)
        result["pairs_noiseless"] = len(decided)
    return result


@torch.no_grad()
def center(model, rows, tokenizer, cfg, device):
    """Shift the head's bias so that the demonstrations in `rows` score 0 on average; returns the new bias."""
    examples = sft.encode(rows, tokenizer, cfg)[sft.rank() :: sft.world()]
    total = 0.0
    for part in sft.micro_slices(len(examples), cfg.micro_batch_size):
        prompts, responses = [e["prompt"] for e in examples[part]], [e["response"] for e in examples[part]]
        batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
        total += float(last_token_scores(model, batch).sum())
    model.head.bias -= float(sft.all_sum(total)) / len(rows)
    return float(model.head.bias)


def interval(share, count):
    """Wilson's 95 % interval of a share measured on `count` cases -> (low, high)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def report(result):
    """Print the accuracies with their 95 % intervals."""
    for name, count in (("accuracy", "pairs"), ("accuracy_noiseless", "pairs_noiseless")):
        if name in result:
            low, high = interval(result[name], result[count])
            labels = "noiseless labels" if "noiseless" in name else "the labels as given"
            score = f"{result[name]:.3f} (95 % interval {low:.3f} to {high:.3f})"
            print0(f"RM: accuracy {score} on {result[count]} held-out pairs, {labels}")


# Appendix
# Unit tests as a reward (SPEC 7): running programs that a model wrote, and that may be hostile.
# Servers, bare Pythons without our environment, fork a keeper per test, which forks the sandboxed process. That
# one gets the program and one input, never the expected output: its answer comes back as text and is compared
# here. So nothing that it does to itself, its harness or its pipes earns more than the right answer would.

# Bytes of memory and of a file, per process; of the folder; of an answer. Open files. Processes at a time.
LIMITS = {
    "memory": 1 << 29,
    "file": 1 << 24,
    "folder": 1 << 26,
    "answer": 1 << 23,
    "files": 32,
    "processes": 8,
}
COMPILE_ERROR, TIME_OUT = 200, 1000  # an exit status; none that a process can have
# What programs for call-based problems take for granted: their judges import it.
PRELUDE = """import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
import datetime, decimal, fractions, queue, statistics, threading, typing
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, merge, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, cycle, groupby, permutations, product, zip_longest
from math import ceil, floor, gcd, inf, sqrt
from typing import *"""


def program_rewards(programs: list[str], problems: list[dict], timeout: float = 4.0) -> list[float]:
    """SPEC 7's reward of each program on its problem's unit tests; arguments as in `run_programs`.

    >>> problem = {"input_output": {"fn_name": "twice", "inputs": [[1], [2]], "outputs": [2, 4]}}
    >>> program_rewards(["def twice(x): return 2 * x", "def twice(x): return 1 / 0", "def"], [problem] * 3)
    [1.0, -0.6, -1.0]
    """
    results = run_programs(programs, problems, timeout)
    ended_early = {"compile error": -1.0, "runtime error": -0.6, "time-out": -0.6}
    return [ended_early.get(status, -0.3 + 1.3 * passed / total) for status, passed, total in results]


def run_programs(programs, problems, timeout=4.0) -> list[tuple[str, int, int]]:
    """Per program (status, tests passed, tests); it is right if its status is "ran" and passed equals tests.

    programs: source texts.  problems: that of each program, {input_output: …} in APPS' schema (SPEC 9).  timeout:
    seconds of wall clock per test.  The status is ran, compile error, runtime error or time-out; a program ends at
    the first test that meets one of the last three.  Raises ValueError if a problem has no tests.
    """

    def judge(program, function, tests):
        passed = 0
        for given, expected in tests:
            job = {"program": program, "function": function, "input": given, "timeout": timeout}
            code, answer = _SERVER.run(job)
            if code != 0 or (function and not answer):  # such as os._exit(0) before the function returned
                failures = {COMPILE_ERROR: "compile error", TIME_OUT: "time-out"}
                return failures.get(code, "runtime error"), passed, len(tests)
            passed += _is_right(answer, expected, function)
        return "ran", passed, len(tests)

    jobs = [(program, *_unit_tests(problem)) for program, problem in zip(programs, problems, strict=True)]
    return list(_threads(os.getpid()).map(lambda job: judge(*job), jobs))


def _unit_tests(problem):
    """A problem's function name, None for standard input and output; its list of (input, expected output)."""
    given = problem["input_output"]
    given = json.loads(given if isinstance(given, str) else json.dumps(given))
    inputs, outputs, function = given["inputs"], given["outputs"], given.get("fn_name")
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"a problem with {len(inputs)} inputs and {len(outputs)} outputs has no unit tests")
    if not function:
        inputs, outputs = (
            [x if isinstance(x, str) else "\n".join(x) for x in xs] for xs in (inputs, outputs)
        )
    return function, list(zip(inputs, outputs, strict=True))


def _is_right(answer, expected, function):
    """Whether a program's answer, a text, is the expected one, which APPS may have wrapped in a list."""
    if not function:
        given, wanted = ([line.rstrip() for line in x.rstrip().split("\n")] for x in (answer, expected))
        return given == wanted
    try:
        value = json.loads(answer)
        return value == expected or [value] == expected
    except (ValueError, RecursionError):  # not plain data; a number of over 4,300 digits; too deep
        return False


@functools.cache
def _threads(process):
    """The threads of this process, whose id is `process`; one per core, shared among a machine's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class _Server(threading.local):
    """Each thread's server process; a new one where the last has died."""

    process = None

    def run(self, job):
        """Run one job -> [exit status or TIME_OUT, answer]; status 1 if the server itself died or hung."""
        if self.process is None:
            self.start()
        watchdog = threading.Timer(job["timeout"] + 10, os.killpg, (self.process.pid, 9))
        watchdog.start()
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            os.killpg(self.process.pid, 9)
            self.process = self.process.communicate() and None
            return 1, ""
        finally:
            watchdog.cancel()

    def start(self):
        """Start a process that sees only Python's standard library, and warn of what its sandbox lacks."""
        names = "atexit contextlib ctypes functools json os random resource select shutil sys tempfile threading time".split()
        source = [f"import {', '.join(names)}", "from pathlib import Path"]
        source += [
            f"{name} = {globals()[name]!r}" for name in ("LIMITS", "COMPILE_ERROR", "TIME_OUT", "PRELUDE")
        ]
        parts = (
            _serve,
            _system,
            _enter_namespaces,
            _keep,
            _watch,
            _kill,
            _confine,
            _landlock,
            _run,
            _run_script,
        )
        source += [*map(inspect.getsource, parts), "_serve()"]
        command = [sys.executable, "-P", "-s", "-S", "-c", "\n".join(source)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        hashes = {"PYTHONHASHSEED": "0"}  # sets come in the same order every time
        process = subprocess.Popen(command, env=hashes, cwd="/", start_new_session=True, **pipes)
        atexit.register(lambda: process.stdin.close() or process.wait())
        if not (greeting := process.stdout.readline()):
            raise RuntimeError(
                f"{sys.executable} could not start a server for programs: its error stands above"
            )
        _warn(greeting.strip())
        self.process = process


@functools.cache
def _warn(missing):
    """Say once per process what the system does not give the sandbox."""
    if missing:
        print(f"programs run without {missing}, which this system lacks: see the README", file=sys.stderr)


# From here to the end of the section: the servers' source, which runs in processes of their own.


def _serve():
    """A server's life: enter the sandbox, say what it lacks, then fork a keeper per job; jobs it never sees."""
    exec(PRELUDE, {})  # imported once, here
    linux, uid, user, group = sys.platform == "linux", 0x70000000 + os.getpid(), os.getuid(), os.getgid()
    try:
        os.seteuid(uid), os.seteuid(0)
        user = group = uid  # as root, run programs as somebody whom no file and no other process belongs to
    except OSError:
        uid = None
    libraries = {
        os.path.dirname(os.__file__),
        sys.base_prefix + "/lib",
        "/usr/lib",
        "/usr/lib64",
        "/lib",
        "/lib64",
    }
    box = {"uid": uid, "user": user, "group": group, "null": os.open(os.devnull, os.O_RDWR)}
    box |= {"linux": linux, "libraries": sorted(filter(os.path.isdir, libraries))}
    box["namespaces"] = linux and _enter_namespaces(box)
    with contextlib.suppress(OSError):
        box["landlock"] = (
            _system("syscall", 444, None, ctypes.c_size_t(0), 1) if linux else None
        )  # its version
    print(" and ".join(name for name in ("namespaces", "landlock") if not box.get(name)), flush=True)
    while True:
        if (keeper := os.fork()) == 0:
            _keep(box)
        if os.waitpid(keeper, 0)[1] != 0:  # no more jobs
            return


def _system(name, *arguments):
    """Call a function of the C library; OSError if it fails."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if (result := function(*(x.encode() if isinstance(x, str) else x for x in arguments))) < 0:
        raise OSError(ctypes.get_errno(), f"{name} failed")
    return result


def _enter_namespaces(box):
    """Leave the network and the file system, but for libraries; False where the system refuses."""
    user, group, read_only = box["user"], box["group"], 0x1 | 0x2 | 0x4 | 0x20 | 0x1000  # no suid, no devices
    try:
        if box["uid"] is None:  # only in a user namespace of our own may we make the others
            _system("unshare", 0x10000000)
            maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, text in maps.items():
                Path("/proc/self", name).write_text(text)
        _system("unshare", 0x20000 | 0x40000000)  # mounts, network
        _system("mount", "none", "/", "", 0x4000 | 0x40000, "")  # from now on, mounts are ours alone
        _system(
            "mount", "tmpfs", "/proc", "tmpfs", 0, "mode=755"
        )  # the new root, on a folder that always exists
        for path in box["libraries"]:
            os.makedirs("/proc" + path, exist_ok=True)
            _system("mount", path, "/proc" + path, "", 0x1000 | 0x4000, "")
            _system("mount", "none", "/proc" + path, "", read_only, "")
        os.mkdir("/proc/work")
        _system("mount", "none", "/proc", "", read_only, "")
        os.chroot("/proc"), os.chdir("/")
        return True
    except OSError:
        return False


def _keep(box):
    """A keeper's life: read one job, run it in the sandbox, kill what is left, reply."""
    job = json.loads(sys.stdin.readline() or os._exit(1))
    if box["namespaces"]:  # of its own: a program is killed with all that it started, and its folder goes too
        folder, options = "/work", "mode=700,uid={user},gid={group},nr_inodes=1000,size=".format(**box)
        _system("unshare", 0x20000 | 0x08000000 | 0x20000000)  # mounts, IPC, processes
        _system("mount", "tmpfs", folder, "tmpfs", 0x2 | 0x4 | 0x8, options + str(LIMITS["folder"]))
    else:
        folder = tempfile.mkdtemp()
        os.chown(folder, box["user"], box["group"])
    if box["linux"]:
        (
            _system("prctl", 36, 1),
            _system("prctl", 4, 0),
        )  # adopt orphans, to kill them; let nobody look into us
    given = os.open(folder + "/input", os.O_RDWR | os.O_CREAT)
    os.unlink(folder + "/input")
    if job["function"] is None:
        os.write(given, job["input"].encode(errors="replace")), os.lseek(given, 0, os.SEEK_SET)
    pipe, answer = os.pipe()
    deadline = time.monotonic() + job["timeout"]
    if (program := os.fork()) == 0:
        _confine(box, job, folder, given, answer)
        _run(job)
    os.close(answer)
    code, said = _watch(program, pipe, deadline)
    _kill(program)
    if not box["namespaces"]:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps([code, said.decode(errors="replace")]), flush=True)
    os._exit(0)


def _watch(program, pipe, deadline):
    """Read what a program says until it ends, says too much or is late -> (exit status or TIME_OUT, bytes)."""
    said = chunk = b"?"
    while chunk and len(said) <= LIMITS["answer"] and (left := deadline - time.monotonic()) > 0:
        chunk = os.read(pipe, 1 << 16) if select.select([pipe], [], [], left)[0] else b""
        said += chunk
    while time.monotonic() < deadline:
        ended, status = os.waitpid(program, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), said[1:]
        if len(said) > LIMITS["answer"]:
            return 1, b""
        time.sleep(0.0002)
    return TIME_OUT, b""


def _kill(program):
    """Kill a program, its process group and, without namespaces, the orphans that we adopted."""
    adopted = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(OSError):
        os.killpg(program, 9)
    while True:
        for child in (program, *(adopted.read_text().split() if adopted.exists() else [])):
            with contextlib.suppress(OSError):
                os.kill(int(child), 9)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _confine(box, job, folder, given, answer):
    """Before a program runs: its own session, only its own open files, limits, and no rights."""
    os.setsid()
    script = job["function"] is None
    (
        os.dup2(given, 0),
        os.dup2(box["null"], 2),
        os.dup2(answer if script else box["null"], 1),
        os.dup2(answer, 3),
    )
    os.closerange(3 if script else 4, 256)
    os.chdir(folder), os.umask(0o077)
    limits = {"CPU": int(job["timeout"]) + 2, "AS": LIMITS["memory"], "FSIZE": LIMITS["file"], "CORE": 0}
    for name, limit in {**limits, "NOFILE": LIMITS["files"], "NPROC": LIMITS["processes"]}.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not know all of them
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    if box["linux"]:
        _system("prctl", 38, 1, 0, 0, 0)  # no new privileges
    if box.get("landlock"):
        _landlock(box["landlock"], box["libraries"], folder)
    if box["uid"]:
        os.setgroups([]), os.setresgid(*[box["uid"]] * 3), os.setresuid(*[box["uid"]] * 3)
    if box["linux"]:
        _system("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())  # no capabilities
        _system("prctl", 1, 9)  # die with the keeper


def _landlock(version, libraries, folder):
    """Let it read `libraries` and write to `folder`; deny other files, TCP, signals: what the kernel can."""
    every = (
        1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    ) - 1  # newer versions know more kinds of access
    handled = (ctypes.c_uint64 * 3)(every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = _system("syscall", 444, handled, ctypes.c_size_t(24), 0)
    for path in (*libraries, folder):
        place = os.open(path, os.O_PATH)
        allowed = every - 1 if path == folder else 4 | 8  # all but execute; read files, list folders
        _system("syscall", 445, rules, 1, (ctypes.c_uint64 * 2)(allowed, place), 0)
        os.close(place)
    _system("syscall", 446, rules, 0)
    os.close(rules)


def _run(job):
    """Run a program on one input: as a script, or to call its function and write down what that returns."""
    script, dumps = job["function"] is None, json.dumps
    random.seed(0)  # the reward is to be reproducible
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    names = {"__name__": "__main__" if script else "program", "exit": sys.exit, "quit": sys.exit}
    try:
        code = compile(job["program"], "program", "exec", dont_inherit=True)
    except BaseException:
        os._exit(COMPILE_ERROR)
    if script:
        _run_script(code, names)
    exec(PRELUDE, names)
    exec(code, names)
    function = names.get(job["function"]) or getattr(names["Solution"](), job["function"])
    value = function(*job["input"])
    try:
        text = dumps(value)
    except Exception:  # a set, a generator, an object; too deep, or circular: no right answer
        text = "not plain data"
    with open(3, "w") as file:
        file.write(text)
    os._exit(0)


def _run_script(code, names):
    """Run a script to its end, as Python would: wait for threads, call atexit's functions, write out buffers."""
    try:
        exec(code, names)
    except SystemExit as end:
        if end.code:
            raise
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    names.clear()
    for file in (sys.stdout, sys.__stdout__):
        file.flush()
    os._exit(0)  # taking the interpreter apart would cost more than all of the above


_SERVER = _Server()


# The toy's preferences: two summaries of one post, and which of them a noisy judge of true quality prefers.

# What a sentence of a summary is worth. Coverage weighs more than correctness: comparing a value with the
# post's takes a deeper model than the toy's, and what the RM cannot see it cannot teach.
TOY_GOLD = {"true": 1.0, "wrong": -0.25, "repeated": -0.25, "filler": -1.0, "broken": -1.0}


def gold_score(prompt, response):
    """True quality of a toy summary: each sentence's worth from TOY_GOLD, summed.

    A sentence is `broken` if it is none of the toy's sentences or lacks its full stop, and `repeated` if its
    fact has been stated before, rightly or wrongly.

    >>> facts = "it got foggy as soon as we arrived. last july i had some free days."
    >>> post = f"POST Subreddit: r/travel {facts} TL;DR:"
    >>> gold_score(post, " the weather was mostly foggy for us. it was the middle of may back then.")
    0.75
    >>> gold_score(post, " the weather was mostly foggy for us. the weather was mostly foggy for us. it")
    -0.25
    """
    post = prompt.removeprefix("POST Subreddit: r/travel").removesuffix("TL;DR:")
    truth = dict(sft.toy_sentences().get(sentence.strip(), (None, None)) for sentence in post.split("."))
    *sentences, rest = response.split(".")
    score, stated = (TOY_GOLD["broken"] if rest.strip() else 0.0), set()
    for sentence in sentences:
        slot, value = sft.toy_sentences().get(sentence.strip(), ("broken", None))
        if slot in ("broken", None):
            kind = slot or "filler"
        elif slot in stated:
            kind = "repeated"
        else:
            kind = "true" if truth.get(slot) == value else "wrong"
        score += TOY_GOLD[kind]
        stated.add(slot)
    return score


def toy_edit(rng, sentences):
    """A copy of a summary, one sentence dropped, replaced by another or a filler, broken or falsified."""
    edited, place = list(sentences), rng.randrange(len(sentences))
    kind = rng.choices(("drop", "repeat", "filler", "break", "falsify"), weights=(4, 4, 4, 2, 1))[0]
    slot, value = sft.toy_sentences().get(edited[place], (None, None))
    if kind == "repeat" and len(edited) > 1:
        edited[place] = rng.choice(edited[:place] + edited[place + 1 :])
    elif kind == "filler":
        edited[place] = rng.choice(sft.TOY_FILLERS)
    elif kind == "break":
        words = edited[place].split()
        edited[place] = " ".join(words[: rng.randint(1, max(1, len(words) - 1))])
    elif kind == "falsify" and slot:
        values, wording, *_ = sft.TOY_FACTS[slot]
        edited[place] = wording.format(rng.choice([v for v in values.split() if v != value]))
    elif len(edited) > 1:
        del edited[place]
    return edited


def toy_pair(row):
    """The preference pair about a toy post: {prompt, chosen, rejected}.

    Half the pairs are two independent summaries, half differ by one or two edits; the better one is chosen
    with Bradley-Terry probability sigmoid(3 x margin).
    """
    rng = random.Random(f"{sft.SPLIT_SEED} pair {row['number']}")
    facts = dict(
        map(sft.toy_sentences().get, map(str.strip, row["prompt"].split(" r/travel ")[1].split(".")[:-1]))
    )
    first = _any_summary(rng, facts)
    second = _any_summary(rng, facts) if rng.random() < 0.5 else toy_edit(rng, first)
    if rng.random() < 0.25:
        second = toy_edit(rng, second)
    first, second = sft.toy_text(first), sft.toy_text(second)
    margin = gold_score(row["prompt"], first) - gold_score(row["prompt"], second)
    if rng.random() >= 1 / (1 + math.exp(-3 * margin)):
        first, second = second, first
    return {"prompt": row["prompt"], "chosen": first, "rejected": second}


def _any_summary(rng, facts):
    """A summary of any quality, which may repeat itself until it is full.

    Length must not betray coverage: or else the RM learns that longer is better, and the policy to repeat.
    """
    share, wrong = rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.2)
    return sft.toy_summary(rng, facts, share, wrong, rng.randint(0, 4), sft.TOY_LONGEST)


if __name__ == "__main__":
    main()
