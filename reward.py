"""Chapter 2: the reward model (RM), learned from pairs of which people preferred one.

Nobody can write down what a good answer is, but people can say which of two is better. The RM
turns such choices into a score r(x, y) for prompt x and response y. It is the SFT model with its
next-token head replaced by one that gives a single number. With y+ preferred over y-, Bradley and
Terry's model says P(y+ beats y-) = sigmoid(r+ - r-), so that the loss is

    loss = -log sigmoid(r(x, y+) - r(x, y-)), averaged over pairs

Only differences are learned. A bias therefore shifts the scores afterwards so that demonstrations
score 0 on average: "better than the human answer" becomes "above zero", and runs can be compared.

    python reward.py                                  # toy; needs the model that sft.py wrote
    python reward.py --task hh --data pairs.jsonl.gz  # human preference pairs
    torchrun --nproc_per_node=2 reward.py             # the same run on two processes

Look at the accuracy it prints: the share of held-out pairs in which the preferred response scores
higher. 0.5 is chance. On the toy it is about 0.82, and 0.87 where the labels have no noise.

Contents
    the story     Config, the model, where the score sits, the loss, main, the measures
    Appendix A    the toy's true quality and its noisy judge
    Appendix B    programs: unit tests as the reward, run in a sandbox
    Appendix C    other people's rewards: functions, published reward models
    Appendix D    how sure a share is: intervals
You may stop reading at Appendix A.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel

import sft
from sft import opt, print0

PAIR = ("prompt", "chosen", "rejected")  # the fields of a preference pair
HEAD = "scalar_head.safetensors"  # the file with the head, beside the trunk's


@dataclass
class Config(sft.Config):
    """Settings of the reward-model chapter; those that are not named here are chapter 1's."""

    model: str = opt("", "pretrained model that the SFT model was made from: sets --lr")
    sft: str = opt("", "SFT model whose trunk the RM starts from; empty: runs/TASK/sft")
    steps: int = opt(600, "number of updates")
    batch_size: int = opt(32, "preference pairs per update, over all ranks")
    micro_batch_size: int = opt(32, "pairs, so twice as many sequences, per forward pass and rank")
    lr: float = opt(1.5e-3, "peak learning rate; rises linearly, then falls as a cosine")


class ScalarModel(nn.Module):
    """A transformer trunk with one number per position: the RM, and later the critic."""

    def __init__(self, trunk):
        super().__init__()
        width = trunk.get_input_embeddings().embedding_dim  # and last_hidden_state's
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        # Small enough that all first scores are near 0, whatever the trunk puts out.
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """A number at every position.  batch: `sft.Batch` -> [B, P+T]"""
        with sft.autocast(self):
            output = self.trunk(
                input_ids=batch.tokens,
                attention_mask=batch.attention,
                position_ids=sft.positions(batch.attention),
                use_cache=False,
            )
        hidden = output.last_hidden_state.float()  # [B, P+T, hidden]
        # In fp32, for bf16's three digits are too few for scores. clone: FSDP wants no view.
        return self.head(hidden).squeeze(-1).clone()  # [B, P+T]

    def save_pretrained(self, folder, state_dict=None):
        """Write the trunk in Hugging Face format and the head beside it."""
        parts = {"trunk": {}, "head": {}}
        for name, x in (state_dict or self.state_dict()).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = x
        self.trunk.save_pretrained(folder, state_dict=parts["trunk"])
        save_file(parts["head"], Path(folder) / HEAD)

    @classmethod
    def load(cls, folder, tokenizer):
        """The model that `save_pretrained` wrote; of a causal LM its trunk, under a fresh head."""
        if is_classifier(folder):  # as others publish their reward models: Appendix C
            return from_classifier(folder, tokenizer)
        model = cls(sft.load_model(AutoModel, folder, tokenizer))
        head = Path(folder) / HEAD
        if head.exists():
            model.head.load_state_dict(load_file(head))
        return model


# Where the score sits. The trunk gives a number at every position, but only one of them has read
# the whole response: that of its last real token, the end mark where there is one.
#
#     tokens       POST   :    nice  trip  <eos>  <pad>  <pad>
#     numbers       .3   -.1    .2    .9   (1.4)   7.0   -3.2
#
# The number in the last *column* is no score: there stands <pad>, which the RM never learned to
# read. A score taken from there is noise that looks like a reward.
def last_token_scores(model, batch):
    """The RM's score r(x, y), read at the last real token.  -> [B]"""
    place = torch.arange(batch.attention.shape[1], device=batch.attention.device)  # [P+T]
    last = (batch.attention * place).argmax(1, keepdim=True)  # [B, 1]
    return model(batch).gather(1, last).squeeze(1)  # [B]


def preference_loss(chosen, rejected, pair_count):
    """Bradley-Terry loss, summed over pairs and divided by `pair_count`.  [B], [B] -> scalar

    pair_count: pairs of the whole batch, over all micro-batches and ranks.
    """
    return -F.logsigmoid(chosen - rejected).sum() / pair_count


def micro_losses(model, pairs, pad, cfg):
    """Yield the loss of each micro-batch of encoded pairs, computed when it is asked for."""
    for part in sft.micro_slices(len(pairs), cfg.micro_batch_size):
        prompts = [pair["prompt"] for pair in pairs[part]] * 2
        responses = [pair[name] for name in ("chosen", "rejected") for pair in pairs[part]]
        batch = sft.make_batch(prompts, responses, pad, model.trunk.device)
        chosen, rejected = last_token_scores(model, batch).chunk(2)  # [pairs] each
        yield preference_loss(chosen, rejected, cfg.batch_size)


def main(argv=None):
    """Train a reward model, with the settings of the command line."""
    train(sft.parse(Config, "reward", argv))


def train(cfg):
    """The whole chapter: train, measure on held-out pairs, set the bias, save."""
    if cfg.task in sft.PROGRAMS:
        sft.fail(f"--task {cfg.task} needs no reward model: go on with ma_ppo.py")
    cfg.sft = cfg.sft or str(Path("runs") / cfg.task / "sft")
    if Path(cfg.out).resolve() == Path(cfg.sft).resolve():
        sft.fail(f"--out {cfg.out} is the SFT model's folder, which would be lost")
    device = sft.setup(cfg.device)  # join the other ranks, if there are any
    rows = load_pairs(cfg, "rm")  # this chapter's share of the preference pairs
    test = load_pairs(cfg, "test")  # held out
    out = sft.claim(cfg.out)  # the run's folder, held against other runs
    if sft.finished(out, cfg):
        return
    model, tokenizer = start_model(cfg)  # the SFT trunk under a new head
    pad = tokenizer.pad_token_id
    rows = sft.usable_rows(rows, tokenizer, cfg, PAIR)  # without pairs that are equal once cut
    test = sft.usable_rows(test, tokenizer, cfg, PAIR)
    pairs = sft.encode(rows, tokenizer, cfg, PAIR)  # token lists
    cfg.steps = sft.count_steps(cfg, len(pairs))
    sft.prepare(model, cfg, device)  # on its device, equal on all ranks
    optimizer = sft.make_optimizer(model)
    print0(f"RM: {len(pairs):,} preference pairs, batches of {cfg.batch_size} -> {out}")

    models, optimizers = {"model": model}, {"model": optimizer}
    first = sft.begin(out, cfg, models, optimizers)  # 0, or where an interrupted run was
    bar = sft.steps(first, cfg, "reward")
    for step in bar:
        began = time.perf_counter()
        mine = sft.my_share(sft.batch_rows(pairs, step, cfg.batch_size, cfg.seed))
        lr = sft.cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup)
        loss = sft.update(model, optimizer, micro_losses(model, mine, pad, cfg), lr)
        seconds = time.perf_counter() - began
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        sft.log(out, {"step": step, "loss": loss, "seconds": seconds}, cfg)
        sft.save_checkpoint(out, step + 1, cfg, models, optimizers)  # if it is time to

    result = evaluate(model, test, tokenizer, cfg)
    demonstrations = sft.load_share(cfg, "rm", "response")[:512]
    center(model, demonstrations, tokenizer, cfg)
    sft.save_models([model, tokenizer], out)
    sft.write_json(out / "run.json", {"config": asdict(cfg), "result": result})


def load_pairs(cfg, share):
    """The preference pairs of one share of the task's rows: {prompt, chosen, rejected} of text."""
    if cfg.task == "toy":
        return [toy_pair(row) for row in sft.load_share(cfg, share)]
    return sft.load_share(cfg, share, *PAIR)


def start_model(cfg):
    """The SFT trunk under a fresh scalar head, and the SFT tokenizer."""
    tokenizer = sft.load_tokenizer(cfg.sft)
    torch.manual_seed(cfg.seed)  # the head's
    return ScalarModel.load(cfg.sft, tokenizer), tokenizer


@torch.no_grad()
def score_all(model, examples, pad, size):
    """The RM's scores of encoded {prompt, response} examples: a list. All ranks compute all."""
    scores = []
    for part in sft.micro_slices(len(examples), size):
        prompts = [example["prompt"] for example in examples[part]]
        responses = [example["response"] for example in examples[part]]
        batch = sft.make_batch(prompts, responses, pad, model.trunk.device)
        scores += last_token_scores(model, batch).tolist()
    return scores


def evaluate(model, rows, tokenizer, cfg):
    """Accuracy on held-out pairs: the share in which the preferred response scores higher.

    Where the task has a gold score, also against noiseless labels: the truly better response
    counts as preferred, and pairs of equal gold score are left out.
    """
    pairs = sft.encode(rows, tokenizer, cfg, PAIR)
    both = [(pair["prompt"], pair[name]) for name in PAIR[1:] for pair in pairs]
    examples = [{"prompt": prompt, "response": response} for prompt, response in both]
    scores = score_all(model, examples, tokenizer.pad_token_id, 2 * cfg.micro_batch_size)
    margins = [a - b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
    right = [(row["prompt"], margin > 0) for row, margin in zip(rows, margins, strict=True)]
    result = {"pairs": len(right), "accuracy": accuracy(right, "the labels as given")}
    if cfg.task == "toy":
        right = []
        for margin, row in zip(margins, rows, strict=True):
            chosen, rejected = (gold_score(row["facts"], row[name]) for name in PAIR[1:])
            if chosen != rejected:
                right.append((row["prompt"], (margin > 0) == (chosen > rejected)))
        result["pairs_noiseless"] = len(right)
        result["accuracy_noiseless"] = accuracy(right, "noiseless labels")
    return result


def accuracy(right, labels):
    """The share of pairs in which the RM is right; prints it with its 95 % interval.

    right: (prompt, whether the RM is right) of each pair.
    """
    share = fmean(is_right for _, is_right in right)
    count = effective_count(right, share)  # of independent pairs: Appendix D
    low, high = wilson_interval(share * count, count)
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    print0(f"RM: accuracy {share:.3f} ({interval}) on {len(right)} held-out pairs, {labels}")
    return share


def center(model, rows, tokenizer, cfg):
    """Shift the head's bias so that the demonstrations in `rows` score 0 on average."""
    examples = sft.encode(sft.usable_rows(rows, tokenizer, cfg), tokenizer, cfg)
    scores = score_all(model, examples, tokenizer.pad_token_id, cfg.micro_batch_size)
    if isinstance(model, FSDPModule):
        model.reshard()  # or the change would be made to a copy that is put together, and lost
    with torch.no_grad():
        model.head.bias -= sum(scores) / len(scores)


# Appendix A. The toy's true quality, and its noisy judge.
#
# With real preferences nobody knows whether the RM is right. In the toy a gold score knows the
# truth; two summaries of one post are compared by it, with noise, and the RM sees only the labels.
# Later the gold score tells whether PPO has found better summaries or only what the RM likes.

import random

# What a sentence of a summary is worth. Coverage weighs more than correctness: comparing a value
# with the post's takes a deeper model than the toy's, and what the RM cannot see it cannot teach.
TOY_GOLD = {"true": 1.0, "wrong": -0.25, "repeated": -0.25, "filler": -1.0, "broken": -1.0}


def gold_score(facts, response):
    """True quality of a toy summary: each sentence's worth from TOY_GOLD, summed.

    facts: {slot: value} of the post. A sentence is `broken` if it is none of the toy's sentences
    or lacks its full stop, and `repeated` if its fact has been stated before, rightly or wrongly.

    >>> summary = " the weather was mostly foggy for us. it was the middle of may back then."
    >>> gold_score({"weather": "foggy", "month": "july"}, summary)
    0.75
    """
    *sentences, rest = response.split(".")
    score = TOY_GOLD["broken"] if rest.strip() else 0.0
    stated = set()
    for sentence in sentences:
        slot, value = sft.toy_sentences().get(sentence.strip(), ("broken", None))
        if slot == "broken":
            kind = "broken"
        elif slot is None:
            kind = "filler"
        elif slot in stated:
            kind = "repeated"
        else:
            kind = "true" if facts.get(slot) == value else "wrong"
        score += TOY_GOLD[kind]
        stated.add(slot)
    return score


def toy_edit(rng, sentences):
    """A copy of a summary with one sentence dropped, repeated, broken, falsified or a filler."""
    edited = list(sentences)
    place = rng.randrange(len(sentences))
    kinds = ("drop", "repeat", "filler", "break", "falsify")
    kind = rng.choices(kinds, weights=(4, 4, 4, 2, 1))[0]
    slot, value = sft.toy_sentences().get(edited[place], (None, None))
    if kind == "repeat" and len(edited) > 1:
        edited[place] = rng.choice(edited[:place] + edited[place + 1 :])
    elif kind == "filler":
        edited[place] = rng.choice(sft.TOY_FILLERS)
    elif kind == "break":
        words = edited[place].split()
        edited[place] = " ".join(words[: rng.randint(1, max(1, len(words) - 1))])
    elif kind == "falsify" and slot:
        fact = sft.TOY_FACTS[slot]
        others = [other for other in fact.values.split() if other != value]
        edited[place] = fact.summary.format(rng.choice(others))
    elif len(edited) > 1:
        del edited[place]
    return edited


def toy_pair(row):
    """The preference pair about a toy post: {prompt, chosen, rejected, facts}.

    Half the pairs are two independent summaries, half differ by one or two edits; the better one
    is chosen with Bradley-Terry probability sigmoid(3 x margin).
    """
    facts = row["facts"]
    rng = random.Random(f"{sft.SPLIT_SEED} pair {row['number']}")
    first = any_summary(rng, facts)
    second = any_summary(rng, facts) if rng.random() < 0.5 else toy_edit(rng, first)
    if rng.random() < 0.25:
        second = toy_edit(rng, second)
    first, second = sft.toy_text(first), sft.toy_text(second)
    margin = gold_score(facts, first) - gold_score(facts, second)
    if rng.random() >= 1 / (1 + math.exp(-3 * margin)):
        first, second = second, first
    return {"prompt": row["prompt"], "chosen": first, "rejected": second, "facts": facts}


def any_summary(rng, facts):
    """A summary of any quality, which may repeat itself until it is full.

    Length must not betray coverage, or the RM learns that longer is better: the policy repeats.
    """
    share, wrong = rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.2)
    return sft.toy_summary(rng, facts, share, wrong, rng.randint(0, 4), sft.TOY_LONGEST)


# Appendix B. Programs: a reward from unit tests.
#
# For code, no model has to guess what people like: a program is run on a problem's unit tests, and
# the share that it passes is the reward. But a policy in training writes anything, programs that
# never end or delete files among them. So every test runs in a process of its own, with limits on
# time and memory, in a sandbox without network, without our files and processes (bubblewrap). The
# expected outputs never enter it: it sends back what a program answered, which is compared out
# here. No trick in there can earn more than a right answer does.
#
# What it is not: a prison for people who mean harm. A fault of the kernel opens it, and how long
# things take tells what else the machine does. Without bubblewrap there are limits only: programs
# can do to files, network and processes what their user can (for root, a user without rights).

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cache


def program_rewards(programs, problems, timeout=4.0):
    """The paper's reward of each program on its problem's unit tests: a list of numbers.

    -1 if Python cannot compile it, -0.6 if a test ends in an error or takes longer than `timeout`
    seconds, else from -0.3 (no test passed) to 1 (all of them). Programs may stand in a Markdown
    fence. Problems hold {input_output: {fn_name, inputs, outputs}} in APPS' form, or its JSON text.

    Right is what APPS' own harness accepts, save slips that a policy would learn to use: a program
    that prints the answer and then crashes has failed; words may come in another order, but each as
    often as expected; whole numbers are equal or not (APPS' tolerance takes 100001 for 100000).
    """
    pairs = list(zip(programs, problems, strict=True))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # shared among ranks
    with ThreadPoolExecutor(count) as threads:
        shares = [threads.submit(judge, pairs[i::count], timeout) for i in range(count)]
    rewards = [0.0] * len(pairs)
    for i, share in enumerate(shares):
        rewards[i::count] = share.result()
    return rewards


def judge(pairs, timeout):
    """The rewards of (program, problem) pairs, one after the other."""
    jobs, outputs = [], []  # of all their tests
    for number, (program, problem) in enumerate(pairs):
        tests = problem["input_output"]
        tests = json.loads(tests) if isinstance(tests, str) else tests
        job = {"number": number, "program": program, "function": tests.get("fn_name")}
        for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            jobs.append(job | {"input": given})
            outputs.append(expected)
    results = [[] for _ in pairs]  # of each test, whether it is passed, or what a failure earns
    for job, (failure, answer), expected in zip(jobs, run(jobs, timeout), outputs, strict=True):
        same = same_result if job["function"] else same_output
        results[job["number"]].append(failure or same(answer, expected))
    return [min(0.0, *tests) or -0.3 + 1.3 * sum(tests) / len(tests) for tests in results]


def run(jobs, timeout):
    """Run jobs {number of the program, program, function, input}  -> [(failure, answer)].

    failure: 0, or what a program earns that fails; its other tests are not run any more.
    """
    replies = []
    command = [*(sandbox() or [PYTHON]), "-PsSX", "utf8", "-c", RUNNER, str(timeout)]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "text": True}
    while len(replies) < len(jobs):
        left = "".join(json.dumps(job) + "\n" for job in jobs[len(replies) :])
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            done = subprocess.run(command, input=left, cwd=folder, **options)
        _, *lines = done.stdout.splitlines()  # "ready", or else Python did not start: ValueError
        # Without a line, the first program has killed the runner.
        replies += map(json.loads, lines or ['[-0.6, ""]'])
    return replies


def same_result(answer, expected):
    """Whether a function's result, as JSON, is as expected; APPS puts some of those into a list."""
    try:
        result = json.loads(answer, parse_int=Decimal)  # to read a long int would take minutes
        expected = json.loads(json.dumps(expected))  # tuples become lists, and all keys text
        return result == expected or [result] == expected
    except (ValueError, RecursionError):  # not plain data, or nested too deeply
        return False


def same_output(printed, expected):
    """Whether a script printed the expected words, in any order, or nearly the same numbers."""
    printed, expected = lines_of(printed), lines_of(expected)
    if sorted(map(sorted, printed)) == sorted(map(sorted, expected)):
        return True
    try:
        lines = zip(printed, expected, strict=True)
        return all(same_number(*words) for line in lines for words in zip(*line, strict=True))
    except (ValueError, ArithmeticError):  # other counts, or a word that is no number
        return False


def lines_of(text):
    """The words of each line, without empty lines. APPS gives a text as lines now and then."""
    lines = text.splitlines() if isinstance(text, str) else "\n".join(text).splitlines()
    return [line.split() for line in lines if line.strip()]


def same_number(word, wanted):
    """Whether numbers agree to 3 decimals or 5 digits (np.allclose); whole ones must be equal."""
    if wanted.lstrip("+-").isdecimal():  # "2.0" may stand for 2, but 100001.0 not for 100000
        return abs(Decimal(word) - Decimal(wanted)) < Decimal("0.001")
    x, y = float(word), float(wanted)
    return round(x, 3) == round(y, 3) or math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-8)


PYTHON = os.path.realpath(sys._base_executable)  # not a virtual environment's: no packages
# All that programs see of our environment; with this seed, sets have the same order in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": f"/python/lib:{sys.base_prefix}/lib"}


@cache
def sandbox():
    """The command that runs Python in bubblewrap; empty, with a warning, where that does not work.

    All that is inside: Python, the system's libraries, and 64 MB of /tmp. Python is the first
    process in there (--as-pid-1): no other can kill or stop it, and when it ends, all others end.
    """
    python, base = shlex.quote(PYTHON), shlex.quote(sys.base_prefix)
    # Limits do not bind root: then the runner must be able to become somebody else.
    user = "--unshare-user" if os.geteuid() else "--cap-add CAP_SETUID --cap-add CAP_SETGID"
    command = shlex.split(f"""
        {shutil.which("bwrap")} --die-with-parent --new-session --as-pid-1 {user}
        --unshare-pid --unshare-net --unshare-ipc --unshare-uts
        --dir /python --dir /python/bin --ro-bind {python} /python/bin/python
        --ro-bind-try {base}/lib /python/lib --ro-bind-try {base}/lib64 /python/lib64
        --dir /usr --ro-bind-try /usr/lib /usr/lib --ro-bind-try /usr/lib64 /usr/lib64
        --ro-bind-try /lib /lib --ro-bind-try /lib64 /lib64 --ro-bind-try /nix /nix
        --proc /proc --dev /dev --remount-ro /dev
        --size {1 << 26} --tmpfs /tmp --chdir /tmp --remount-ro / /python/bin/python
    """)
    try:
        subprocess.run([*command, "-c", ""], env=ENVIRONMENT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # not installed, or not allowed
        print("programs run under limits only: apt install bubblewrap", file=sys.stderr)
        return []
    return command


# The runner is a program of its own, and a text: to import this file, with PyTorch, takes seconds.
# It forks a process for each test, which is faster than to start a Python.
RUNNER = r'''
import atexit, builtins, ctypes, decimal, fractions, gc, glob, json, os, random, re, resource
import signal, sys, tempfile, textwrap, types
from contextlib import suppress

# What APPS' harness imports for programs, so that they take it for granted, and a little more.
PRELUDE = """
import bisect, collections, copy, datetime, fractions, functools, heapq, itertools, math, operator
import queue, random, re, string, sys, time
from math import ceil, cos, exp, fabs, floor, gcd, inf, log, log2, sin, sqrt, tan
from bisect import *; from collections import *; from functools import *
from heapq import *; from itertools import *; from typing import *
stdin, stdout = sys.stdin, sys.stdout
"""
names = {}
exec(PRELUDE, names)

alone = os.getpid() == 1  # whether all processes that it may kill are programs': in a sandbox,
if os.geteuid() == 0:  # or as a user whom nobody else is
    if not alone:  # and who cannot import from root's home: what programs like is imported now
        import __future__, array, cmath, concurrent.futures.thread, dataclasses, pickle, statistics
    os.chmod(".", 0o777)
    with suppress(OSError):  # some containers have few users
        user = random.randrange(0x70000000, 0x78000000)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        alone = True
timeout = float(sys.argv[1])  # seconds
LIMITS = {
    "AS": 1 << 30,  # bytes of memory, of each process
    "FSIZE": 1 << 23,  # bytes of a file, and so of an answer
    "NOFILE": 64,  # open files
    "NPROC": 16 if alone else 4096,  # processes and threads, the same user's others too
    "CPU": int(timeout) + 2,  # seconds
    "CORE": 0,
}
COMPILE_ERROR = 200  # the exit status that says so
NUMBERS = {decimal.Decimal: float, fractions.Fraction: float}  # how JSON can have them

def run(job):
    """Run a program on one input, in a process of its own -> (failure, answer)."""
    given, answer = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if not job["function"]:
        text = job["input"] if isinstance(job["input"], str) else "\n".join(job["input"])
        given.write(text.encode(errors="replace"))
        given.seek(0)
    child = os.fork()
    if child == 0:
        live(job, given, answer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, timeout)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    with suppress(OSError):  # what it has started must end too; -1: all but this process
        os.kill(-1 if alone else -child, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    answer.seek(0)
    text = answer.read().decode(errors="replace")
    if job["function"] and not text:  # it ended before there was a result
        code = code or 1
    return {0: 0.0, COMPILE_ERROR: -1.0}.get(code, -0.6), text

def live(job, given, answer):
    """The life of a program's process. It never returns."""
    os.setpgid(0, 0)
    function = job["function"]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(given.fileno(), 0)
    os.dup2(null if function else answer.fileno(), 1)
    os.dup2(null, 2)
    jobs.close()
    replies.close()
    for name, limit in LIMITS.items():
        with suppress(ValueError, OSError):  # macOS has not all of them
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    random.seed(0)  # so that programs are reproducible
    module = types.ModuleType("program" if function else "__main__")
    vars(module).update(names)
    sys.modules[module.__name__] = module
    try:
        code = compiled(job["program"])
    except BaseException:
        os._exit(COMPILE_ERROR)
    if not function:
        exec(code, vars(module))
        sys.exit()  # as after any script: Python waits for threads, and writes out what is left
    try:
        exec(code, vars(module))
        result, text = call(module, function, job["input"]), "no plain data"
        with suppress(Exception):  # a set, an object; circular, or nested too deeply
            text = json.dumps(result, default=lambda x: NUMBERS[type(x)](x))
        answer.write(text.encode())
        answer.flush()
    except BaseException:
        os._exit(1)
    os._exit(0)

def compiled(text):
    """The code of a program or, where the text is no Python, of Markdown's first block in it."""
    try:
        return compile(text, "program", "exec", dont_inherit=True)
    except SyntaxError:
        block = re.search(r"^ *```[^\n]*\n(.*?)(^ *```|\Z)", text, re.MULTILINE | re.DOTALL)
        return compile(textwrap.dedent(block[1]), "program", "exec", dont_inherit=True)

def call(scope, function, arguments):
    """The result of a program's function, or of a method of its class Solution (LeetCode's way)."""
    # JSON has made the keys of dicts text: as in APPS, those of the first argument are ints again.
    if arguments and isinstance(arguments[0], dict):
        with suppress(ValueError):
            arguments[0] = {int(key): value for key, value in arguments[0].items()}
    if hasattr(getattr(scope, "Solution", None), function):
        scope = scope.Solution()
    return getattr(scope, function)(*arguments)

def traces():
    """What programs can leave behind: files, and System V's shared memory."""
    tables = glob.glob("/proc/sysvipc/*") if alone else []
    return os.listdir("."), [open(table).read() for table in tables]

with suppress(AttributeError):  # only Linux has it
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: no program can look into this process
os.environ["TMPDIR"] = os.getcwd()
jobs, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
builtins.exit = builtins.quit = sys.exit
atexit.register(sys.stdout.flush)  # even where a program has another sys.stdout by then
sys.set_int_max_str_digits(0)  # as in the Python of APPS' days
gc.freeze()  # forks share its memory
clean, number, failure = traces(), None, 0.0
print("ready", file=replies, flush=True)
for line in jobs:
    job = json.loads(line)
    if job["number"] != number or not failure:  # the first test that fails is a program's last
        number = job["number"]
        failure, answer = run(job)
    print(json.dumps([failure, answer]), file=replies, flush=True)
    if traces() != clean:
        break  # nothing is cleaned: what comes next gets another sandbox
'''


# Appendix C. Other people's rewards.
#
# Your own may be a Python function (prompts, responses, rows) -> scores: lists of texts, of texts,
# of the rows as they were read, with all their fields, and of numbers. Published reward models are
# nearly all AutoModelForSequenceClassification with one label: the same trunk and head as ours
# under other names, and read at the last token too.

import runpy

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


@cache
def own_reward(name):
    """The function that --reward FILE.py:NAME means, of (prompts, responses, examples)."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        sft.fail(f"--reward must be FILE.py:NAME, got {name!r}")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # it may import its neighbours
    own = runpy.run_path(path).get(function)
    if not callable(own):
        sft.fail(f"--reward {name}: {path} has no function {function}")

    def scores_of(prompts, responses, examples):
        """One finite number a response, or one line that says what is wrong."""
        rows = [example.get("raw", example) for example in examples]
        scores = own(list(prompts), list(responses), rows)
        try:
            scores = torch.tensor([float(score) for score in scores]).tolist()
        except (TypeError, ValueError):  # it may have forgotten its return
            sft.fail(" ".join(f"--reward {name}: these are no numbers: {scores!r:.99}".split()))
        if len(scores) != len(responses):
            sft.fail(f"--reward {name}: {len(scores)} scores for {len(responses)} responses")
        if not all(map(math.isfinite, scores)):
            sft.fail(f"--reward {name}: a score is not finite: {scores}"[:200])
        return scores

    return scores_of


def is_classifier(folder):
    """Whether a folder or hub name holds a sequence classifier of transformers."""
    config = sft.load_or_fail(AutoConfig.from_pretrained, folder)
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def from_classifier(folder, tokenizer):
    """The `ScalarModel` that is equal to a sequence classifier with one label."""
    classifier = sft.load_model(AutoModelForSequenceClassification, folder, tokenizer)
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        sft.fail(f"{folder}: a reward model is a decoder with one label, read at its last token")
    model = ScalarModel(classifier.base_model)
    bias = torch.zeros(1) if score.bias is None else score.bias
    model.head.load_state_dict({"weight": score.weight, "bias": bias})
    return model


def check_vocabulary(folder, tokenizer):
    """Refuse an RM that reads other ids than the policy's `tokenizer`; PAD alone may be new."""
    theirs = sft.load_or_fail(AutoTokenizer.from_pretrained, folder).get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(token) != number and number != tokenizer.pad_token_id:
            sft.fail(f"--reward_model {folder} reads another vocabulary: {token!r} is not {number}")


# Appendix D. How sure a share is.


def effective_count(right, share):
    """How many independent pairs would say as much: pairs about one prompt may be much alike.

    The share's variance is estimated from the prompts' errors, and compared with that of
    independent pairs, share (1 - share) / count.
    """
    errors = {}  # {prompt: sum over its pairs}
    for prompt, is_right in right:
        errors[prompt] = errors.get(prompt, 0.0) + is_right - share
    prompts = len(errors)
    squares = sum(error**2 for error in errors.values()) * prompts / max(1, prompts - 1)
    if squares == 0:
        return prompts
    return min(len(right), share * (1 - share) * len(right) ** 2 / squares)


def wilson_interval(wins, count):
    """The 95 % interval, within 0 and 1, of a share seen as `wins` of `count` (Wilson, 1927)."""
    z = 1.959964  # standard errors that hold 95 % of a normal distribution
    share = wins / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


if __name__ == "__main__":
    main()
