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
    lr: float = opt(1.5e-3, "peak learning rate; cosine schedule")


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
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 has three digits: too few for scores
            return self.head(hidden.float()).squeeze(-1).clone()  # [B, P+T], for FSDP not a view

    def save_pretrained(self, folder, state_dict=None):
        """Write the trunk in Hugging Face format and the head beside it; state_dict: its own by default."""
        state = {"trunk": {}, "head": {}}
        for name, x in (state_dict or self.state_dict()).items():
            part, _, name = name.partition(".")
            state[part][name] = x
        self.trunk.save_pretrained(folder, state_dict=state["trunk"])
        save_file(state["head"], Path(folder) / HEAD)

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
    if cfg.task in sft.PROGRAMS:
        sft.fail(f"--task {cfg.task} needs no reward model: unit tests give the reward; go on with ma_ppo.py")
    cfg.sft = cfg.sft or str(Path("runs") / cfg.task / "sft")
    device = sft.setup(cfg.device, cfg.timeout)
    train, test = load_pairs(cfg, "rm"), load_pairs(cfg, "test")
    cfg.steps = sft.count_steps(cfg, len(train))
    out = sft.claim(cfg.out)
    if sft.finished(cfg, out):
        return
    model, tokenizer = start_model(cfg, device)
    sft.prepare(model, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), **sft.ADAM)
    print0(f"RM: {len(train):,} preference pairs, batches of {cfg.batch_size} -> {out}")

    sft.report_cuts(train, tokenizer, cfg, PAIR)
    run = sft.Run(cfg, out, "reward", {"model": model}, {"model": optimizer})
    for step in run:
        clock = [sft.tick(device)]
        pairs = sft.shard(sft.batch_rows(train, step, cfg.batch_size, cfg.seed))
        pairs = sft.encode(pairs, tokenizer, cfg, PAIR)
        losses = micro_losses(model, pairs, tokenizer, cfg, device)
        loss = sft.update(model, optimizer, losses, sft.cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup))
        clock.append(sft.tick(device))
        run.log({"step": step, "loss": loss} | sft.timings(clock), "loss", pairs)

    result = evaluate(model, test, tokenizer, cfg, device)
    demonstrations = sft.load_share(cfg, "rm", "response")[:512]
    result["bias"] = center(model, demonstrations, tokenizer, cfg, device)
    report(result)
    sft.save_run([model, tokenizer], out, cfg, result)


def load_pairs(cfg, share):
    """The preference pairs of one share of the task's rows: {prompt, chosen, rejected} of text."""
    if cfg.task == "toy":
        return [toy_pair(row) for row in sft.load_share(cfg, share)]
    return sft.load_share(cfg, share, *PAIR)


def start_model(cfg, device):
    """The SFT trunk under a fresh scalar head, the same on every rank, and the SFT tokenizer."""
    torch.manual_seed(cfg.seed)
    if not Path(cfg.sft).is_dir():
        sft.fail(
            f"--sft {cfg.sft}: no such folder; make one with python sft.py --task {cfg.task} --out {cfg.sft}"
        )
    model = ScalarModel.load(cfg.sft, sft.home(cfg, device))
    sft.broadcast_parameters(model)
    return model, load_tokenizer(cfg.sft)


def load_tokenizer(folder):
    """The tokenizer that sft.py saved with the model, which has a PAD token that is not EOS."""
    tokenizer = sft.load_or_fail(AutoTokenizer.from_pretrained, folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        sft.fail(f"{folder}: the tokenizer has no PAD token of its own; make the folder with sft.py")
    return tokenizer


def micro_losses(model, pairs, tokenizer, cfg, device):
    """A function for each micro-batch of pairs that computes its loss, in one forward pass."""

    def loss(part):
        scores = pair_scores(model, pairs[part], tokenizer, device)  # [2, pairs]
        return preference_loss(scores[0], scores[1], cfg.batch_size)

    return [functools.partial(loss, part) for part in sft.micro_slices(len(pairs), cfg.micro_batch_size)]


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
    mine = sft.evenly(len(pairs))
    margins = []
    for part in sft.micro_slices(len(mine), cfg.micro_batch_size):
        scores = pair_scores(model, [pairs[i] for i in mine[part]], tokenizer, device)  # [2, pairs]
        margins += zip(mine[part], (scores[0] - scores[1]).tolist(), strict=True)
    margins = [margin for _, margin in sorted(dict(gather(margins)).items())]
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
    examples, mine, scores = sft.encode(rows, tokenizer, cfg), sft.evenly(len(rows)), []
    for part in sft.micro_slices(len(mine), cfg.micro_batch_size):
        prompts, responses = ([examples[i][name] for i in mine[part]] for name in ("prompt", "response"))
        batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
        scores += zip(mine[part], last_token_scores(model, batch).tolist(), strict=True)
    if sft.sharded(model):
        model.reshard()  # a change of the parameters that were put together would be lost
    model.head.bias -= sum(dict(gather(scores)).values()) / len(rows)
    return float(sft.whole(model.head.bias))


def exact_share(wins, count):
    """wins / count and its Clopper-Pearson 95 % interval -> (share, low, high); (None,) where count is 0."""
    edges, total = [], math.lgamma(count + 1)
    ways = [total - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in range(count + 1)]  # logarithms
    for k, level in ((wins, 0.025), (wins + 1, 0.975)):  # the share p at which P(k wins or more) = level
        low, high = float(k > count), float(k > 0)
        while high - low > 1e-12:
            p = (low + high) / 2
            win, loss = math.log(p), math.log1p(-p)
            tail = sum(math.exp(ways[i] + i * win + (count - i) * loss) for i in range(k, count + 1))
            low, high = (p, high) if tail < level else (low, p)
        edges.append(low)
    return (wins / count, *edges) if count else (None,)


def report(result):
    """Print the accuracies with their 95 % intervals."""
    for name, count in (("accuracy", "pairs"), ("accuracy_noiseless", "pairs_noiseless")):
        if name in result:
            _, low, high = exact_share(round(result[name] * result[count]), result[count])
            labels = "noiseless labels" if "noiseless" in name else "the labels as given"
            score = f"{result[name]:.3f} (95 % interval {low:.3f} to {high:.3f})"
            print0(f"RM: accuracy {score} on {result[count]} held-out pairs, {labels}")


# Appendix
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


# Unit tests as a reward (SPEC 7): running programs that a model wrote, maybe hostile ones. Bare Pythons, the
# servers, fork a keeper per test, and that the sandboxed process. It never sees expected outputs: its answer
# is compared here, as text. So no trick on itself, its harness or its pipes earns more than a right answer.


def program_rewards(programs: list[str], problems: list[dict], timeout: float = 4.0) -> list[float]:
    """SPEC 7's reward of each program on its problem's unit tests; arguments as in `run_programs`."""
    failures = {"compile error": -1.0, "runtime error": -0.6, "time-out": -0.6}
    results = run_programs(programs, problems, timeout)
    return [failures.get(status, -0.3 + 1.3 * passed / total) for status, passed, total in results]


def run_programs(programs, problems, timeout=4.0) -> list[tuple[str, int, int]]:
    """Per program (status, tests passed, tests); a right one has status "ran" and passed all its tests.

    programs: sources.  problems: each one's {input_output: …}, as in APPS (SPEC 9).  timeout: seconds a test.
    Status is ran, compile error, runtime error or time-out; the first test to meet one of the last three is a
    program's last.  Raises ValueError if a problem has no tests.
    """

    def judge(program, function, tests):
        """Run one program on its tests, up to the first failure -> (status, passed, total)."""
        passed = 0
        for given, expected in tests:
            job = {"program": program, "function": function, "input": given, "timeout": timeout}
            if (reply := _server.run(job))[0] != "ran":
                return reply[0], passed, len(tests)
            passed += _is_right(reply[1], expected, function)
        return "ran", passed, len(tests)

    jobs = [(program, *_unit_tests(problem)) for program, problem in zip(programs, problems, strict=True)]
    return list(_threads(os.getpid()).map(lambda job: judge(*job), jobs))


def _unit_tests(problem):
    """A problem's function name, None for standard input and output; its (input, expected output) pairs."""
    given = problem["input_output"]
    given = json.loads(given if isinstance(given, str) else json.dumps(given))
    inputs, outputs, function = given["inputs"], given["outputs"], given.get("fn_name")
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs are no unit tests")
    if not function:
        sides = inputs, outputs
        inputs, outputs = (["\n".join([x] if isinstance(x, str) else x) for x in y] for y in sides)
    return function or None, list(zip(inputs, outputs, strict=True))


def _is_right(answer, expected, function):
    """Whether a program's answer, a text, is the expected one, which APPS may have wrapped in a list."""
    if not function:
        given, wanted = ([line.rstrip() for line in x.rstrip().split("\n")] for x in (answer, expected))
        return given == wanted
    try:
        return (value := json.loads(answer)) == expected or [value] == expected
    except (ValueError, RecursionError):  # not plain data; a number of over 4,300 digits; too deep
        return False


@functools.cache
def _threads(process):
    """The threads of this process, whose id is `process`: one per core, shared among a machine's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class _Server(threading.local):
    """The server process of each thread; a new one where the last has died."""

    process = None

    def run(self, job):
        """Run one job -> [status, answer]; a server that dies or hangs is the program's runtime error."""
        self.process = self.process or self.start()
        watchdog = threading.Timer(job["timeout"] + 10, os.killpg, (self.process.pid, 9))
        watchdog.start()
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            os.killpg(self.process.pid, 9)
            self.process = self.process.communicate() and None
            return ["runtime error", ""]
        finally:
            watchdog.cancel()

    def start(self):
        """Start a process that sees only Python's standard library, and warn of what its sandbox lacks."""
        source = "import atexit, contextlib, ctypes, json, os, random, resource, select, shutil, sys, time\n"
        source += "import tempfile, threading\nfrom pathlib import Path\n" + inspect.getsource(_Sandbox)
        command = [sys.executable, "-P", "-s", "-S", "-c", source + "_Sandbox().serve()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env={"PYTHONHASHSEED": "0"}, **pipes)  # sets in the same order
        atexit.register(lambda: process.stdin.close() or process.wait())
        if not (greeting := process.stdout.readline()):
            raise RuntimeError(f"{sys.executable} started no server for programs; its error stands above")
        if greeting.strip():
            _print_once(f"programs run without {greeting.strip()} here: see README.md", file=sys.stderr)
        return process


_server, _print_once = _Server(), functools.cache(print)


class _Sandbox:
    """The servers' source, run in processes of its own. Its state is what the system offers."""

    # Per process: bytes of memory and of a file, open files; processes at a time. Bytes of folder and answer.
    limits = (("AS", 1 << 29), ("FSIZE", 1 << 24), ("NOFILE", 32), ("NPROC", 8), ("CORE", 0))
    disk, most, compile_error = 1 << 26, 1 << 23, 200  # the last is an exit status
    # What the judges of call-based problems import, so that programs take it for granted.
    prelude = """import bisect, collections, copy, functools, heapq, itertools, math, queue, random, re
import datetime, fractions, string, sys; from math import ceil, floor, gcd, inf, sqrt; from typing import *
from collections import *; from functools import *; from heapq import *; from itertools import *"""

    def serve(self):
        """A server's life: enter the sandbox, say what it lacks, fork a keeper per job; see no job itself."""
        exec(self.prelude, {})  # imported once, here
        self.linux, self.root, self.user = sys.platform == "linux", False, os.getuid()
        self.null = os.open(os.devnull, os.O_RDWR)
        with contextlib.suppress(OSError):
            os.seteuid(0x70000000 + os.getpid()), os.seteuid(0)
            self.root, self.user = True, 0x70000000 + os.getpid()  # to whom no file or other process belongs
        libraries = {os.path.dirname(os.__file__), sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64"}
        self.libraries = sorted(filter(os.path.isdir, libraries | {"/lib", "/lib64"}))
        self.namespaces = self.linux and self.enter_namespaces()
        self.landlock = self.linux and max(0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1))
        print(" and ".join(x for x in ("namespaces", "landlock") if not getattr(self, x)), flush=True)
        while os.waitpid(os.fork() or self.keep(), 0)[1] == 0:
            pass  # until a keeper finds no more jobs

    def system(self, name, *arguments):
        """Call a function of Linux's C library; OSError if it fails, nothing on other systems."""
        function = getattr(ctypes.CDLL(None, use_errno=True), name) if self.linux else lambda *ignored: 0
        if (result := function(*(x.encode() if isinstance(x, str) else x for x in arguments))) < 0:
            raise OSError(ctypes.get_errno(), f"{name} failed")
        return result

    def enter_namespaces(self):
        """Leave the network and, but for libraries, the file system; False where the system refuses."""
        group, bind, read_only = os.getgid(), 0x1000 | 0x4000, 0x1 | 0x2 | 0x4 | 0x20 | 0x1000
        try:
            if not self.root:  # only in a user namespace of our own may we make the others
                self.system("unshare", 0x10000000)
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"{self.user} {self.user} 1")
                Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
            self.system("unshare", 0x20000 | 0x40000000)  # mounts, network
            self.system("mount", "none", "/", "", 0x4000 | 0x40000, "")  # from here on, mounts are private
            self.system("mount", "tmpfs", "/proc", "tmpfs", 0, "mode=755")  # on a folder that always exists
            for path in self.libraries:
                os.makedirs("/proc" + path, exist_ok=True)
                self.system("mount", path, "/proc" + path, "", bind, "")
                self.system("mount", "none", "/proc" + path, "", read_only, "")
            os.mkdir("/proc/work")
            self.system("mount", "none", "/proc", "", read_only, "")
            os.chroot("/proc"), os.chdir("/")
            return True
        except OSError:
            return False

    def keep(self):
        """A keeper's life: read one job, run it in the sandbox, kill what is left, reply."""
        job = json.loads(sys.stdin.readline() or os._exit(1))
        folder = "/work" if self.namespaces else tempfile.mkdtemp()
        if self.namespaces:  # new ones: a program dies with all that it started, and so does its folder
            options = f"mode=700,uid={self.user},nr_inodes=1000,size={self.disk}"
            self.system("unshare", 0x20000 | 0x08000000 | 0x20000000)  # mounts, IPC, processes
            self.system("mount", "tmpfs", folder, "tmpfs", 0x2 | 0x4 | 0x8, options)  # nothing to execute
        os.chown(folder, self.user, -1)
        self.system("prctl", 36, 1), self.system("prctl", 4, 0)  # adopt orphans, to kill them; be private
        given = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        given.write(b"" if job["function"] else job["input"].encode(errors="replace")), given.seek(0)
        (pipe, answer), deadline = os.pipe(), time.monotonic() + job["timeout"]
        if (program := os.fork()) == 0:
            self.confine(job, folder, given.fileno(), answer)
            self.run(job)
        os.close(answer)
        said = chunk = b"?"  # until the program has ended, says too much, or is late
        while chunk and len(said) < self.most and (left := deadline - time.monotonic()) > 0:
            chunk = os.read(pipe, 1 << 16) if select.select([pipe], [], [], left)[0] else b""
            said += chunk
        late, unsaid = time.monotonic() >= deadline, job["function"] and len(said) == 1
        code = self.kill(program) or unsaid  # no result: os._exit(0) before the function has returned
        failure = "time-out" if late else "compile error" if code == self.compile_error else "runtime error"
        if not self.namespaces:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps([failure if late or code else "ran", said[1:].decode(errors="replace")]), flush=True)
        os._exit(0)

    def kill(self, program):
        """Kill a program, its process group and, without namespaces, adopted orphans -> its exit status."""
        adopted, code = Path(f"/proc/self/task/{os.getpid()}/children"), 0
        with contextlib.suppress(ChildProcessError):
            while True:
                for child in (-program, program, *(adopted.read_text().split() if adopted.exists() else ())):
                    with contextlib.suppress(OSError):
                        os.kill(int(child), 9)
                ended, status = os.waitpid(-1, 0)
                code = os.waitstatus_to_exitcode(status) if ended == program else code
        return code

    def confine(self, job, folder, given, answer):
        """Before a program runs: a session of its own, only its own open files, limits, and no rights."""
        for target, source in enumerate((given, self.null if job["function"] else answer, self.null, answer)):
            os.dup2(source, target)
        os.closerange(4, 256), os.setsid(), os.chdir(folder), os.umask(0o077)
        for name, limit in (*self.limits, ("CPU", int(job["timeout"]) + 2)):
            with contextlib.suppress(ValueError, OSError):  # macOS does not know all of them
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        self.system("prctl", 38, 1, 0, 0, 0)  # no new privileges
        if self.landlock:  # read libraries, write to `folder`; no other files, no TCP, no signals to others
            every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(self.landlock, 16)) - 1  # kinds that it knows of
            handled = (ctypes.c_uint64 * 3)(every, 3 * (self.landlock >= 4), 3 * (self.landlock >= 6))
            rules = self.system("syscall", 444, handled, ctypes.c_size_t(24), 0)
            for path in (*self.libraries, folder):
                place = os.open(path, os.O_PATH)
                allowed = every - 1 if path == folder else 4 | 8  # all but execute; read files, list folders
                rule = (ctypes.c_uint64 * 2)(allowed, place)
                self.system("syscall", 445, rules, 1, rule, 0), os.close(place)
            self.system("syscall", 446, rules, 0), os.close(rules)
        if self.root:
            os.setgroups([]), os.setresgid(*[self.user] * 3), os.setresuid(*[self.user] * 3)
        self.system("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())  # no capabilities
        self.system("prctl", 1, 9)  # die with the keeper

    def run(self, job):
        """Run a program on one input: as a script, or to call its function and write down its value."""
        random.seed(0), sys.set_int_max_str_digits(0)  # reproducible; as in the Python of APPS' days
        text = {"encoding": "utf-8", "errors": "replace", "closefd": False}
        sys.stdin = sys.__stdin__ = os.fdopen(0, **text)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", **text)
        names = {"__name__": "program" if job["function"] else "__main__", "exit": sys.exit, "quit": sys.exit}
        try:
            code = compile(job["program"], "program", "exec", dont_inherit=True)
        except BaseException:
            os._exit(self.compile_error)
        if not job["function"]:
            exec(code, names)
            threading._shutdown(), atexit._run_exitfuncs(), names.clear()  # await threads, close files
            sys.stdout.flush(), sys.__stdout__.flush()
            os._exit(0)  # taking the interpreter apart would take longer than all of the above
        exec(self.prelude, names)
        exec(code, names)
        function = names.get(job["function"]) or getattr(names["Solution"](), job["function"])
        value, answer = function(*job["input"]), "not plain data"
        with contextlib.suppress(Exception):  # a set, a generator, an object; too deep, or circular
            answer = json.dumps(value)
        os.write(3, answer.encode()), os._exit(0)


if __name__ == "__main__":
    main()
