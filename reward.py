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
higher. 0.5 is chance. On the toy it is about 0.81, and 0.87 where the labels have no noise.

Contents
    the story     Config, the model, where the score sits, the loss, main, the measures
    Appendix A    the toy's true quality and its noisy judge
    Appendix B    programs: unit tests as the reward, run in a sandbox
You may stop reading at Appendix A.
"""

import functools
import json
import math
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import atexit
import contextlib
import ctypes
import inspect
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

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


@torch.no_grad()
def output_width(trunk):
    """How many numbers the trunk gives for a token; configs tell it in too many ways."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(trunk.parameters()).device)
    return trunk(input_ids=token, use_cache=False).last_hidden_state.shape[-1]


def is_classifier(folder):
    """Whether a folder or hub name holds a sequence classifier of transformers."""
    config = sft.load_or_fail(AutoConfig.from_pretrained, folder)
    return any("ForSequenceClassification" in name for name in config.architectures or ())


class ScalarModel(nn.Module):
    """A transformer trunk with one number per position: the RM, and later the critic."""

    def __init__(self, trunk):
        super().__init__()
        width = output_width(trunk)
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
        trunk, head = {}, {}
        for name, x in (state_dict or self.state_dict()).items():
            if name.startswith("trunk."):
                trunk[name.removeprefix("trunk.")] = x
            else:
                head[name.removeprefix("head.")] = x
        self.trunk.save_pretrained(folder, state_dict=trunk)
        save_file(head, Path(folder) / HEAD)

    @classmethod
    def load(cls, folder, device="cpu"):
        """The model that `save_pretrained` wrote; of a causal LM its trunk, under a fresh head.

        Nearly all published reward models are AutoModelForSequenceClassification with one label:
        of these, trunk and head.
        """
        if is_classifier(folder):
            return cls.from_classifier(folder).to(device)
        model = cls(sft.load_model(AutoModel, folder))
        head = Path(folder) / HEAD
        if head.exists():
            model.head.load_state_dict(load_file(head))
        return model.to(device)

    @classmethod
    def from_classifier(cls, folder):
        """The same model as a sequence classifier of transformers that gives one number."""
        classifier = sft.load_model(AutoModelForSequenceClassification, folder)
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            sft.fail(
                f"{folder}: a reward model is a decoder with one label, read at its last token"
            )
        model = cls(classifier.base_model)
        state = {
            "weight": score.weight,
            "bias": torch.zeros(1) if score.bias is None else score.bias,
        }
        model.head.load_state_dict(state)
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


def pair_scores(model, pairs, tokenizer, device):
    """Scores of encoded pairs, in one forward pass: chosen in row 0, rejected in row 1.

    -> [2, number of pairs]
    """
    prompts = [pair["prompt"] for pair in pairs] * 2
    responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
    return last_token_scores(model, batch).view(2, len(pairs))  # [2, pairs]


def micro_losses(model, pairs, tokenizer, cfg, device):
    """A function for each micro-batch of pairs that computes its share of the loss."""

    def loss(part):
        scores = pair_scores(model, pairs[part], tokenizer, device)  # [2, pairs]
        return preference_loss(scores[0], scores[1], cfg.batch_size)

    parts = sft.micro_slices(len(pairs), cfg.micro_batch_size)
    return [functools.partial(loss, part) for part in parts]


def main(argv=None):
    """Train a reward model, with the settings of the command line."""
    try:
        train(sft.parse(Config, "reward", argv))
    except sft.StorageError as error:
        sft.fail_together(error)


def train(cfg):
    """The whole chapter: train, measure on held-out pairs, set the bias, save."""
    if cfg.task in sft.PROGRAMS:
        sft.fail(f"--task {cfg.task} needs no reward model: go on with ma_ppo.py")
    cfg.sft = cfg.sft or str(Path("runs") / cfg.task / "sft")
    device = sft.setup(cfg.device, cfg.timeout)  # join the other ranks, if there are any
    rows = load_pairs(cfg, "rm")  # this chapter's share of the preference pairs
    test = load_pairs(cfg, "test")  # held out
    cfg.steps = sft.count_steps(cfg, len(rows))
    out = sft.claim(cfg.out)  # the run's folder, held against other runs
    if sft.finished(cfg, out):
        return
    model, tokenizer = start_model(cfg, device)  # the SFT trunk under a new head
    sft.prepare(model, cfg, device)
    optimizer = sft.make_optimizer(model)
    print0(f"RM: {len(rows):,} preference pairs, batches of {cfg.batch_size} -> {out}")

    sft.report_cuts(rows, tokenizer, cfg, PAIR)
    run = sft.Run(cfg, out, "reward", {"model": model}, {"model": optimizer})
    run.begin()  # at step 0, or where an interrupted run was
    for step in run.steps():
        clock = [sft.tick(device)]
        pairs = sft.my_share(sft.batch_rows(rows, step, cfg.batch_size, cfg.seed))  # texts
        pairs = sft.encode(pairs, tokenizer, cfg, PAIR)  # token lists
        losses = micro_losses(model, pairs, tokenizer, cfg, device)
        lr = sft.cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup)
        loss = sft.update(model, optimizer, losses, lr)
        clock.append(sft.tick(device))
        run.log({"step": step, "loss": loss} | sft.timings(clock), "loss", pairs)

    result = evaluate(model, test, tokenizer, cfg, device)
    demonstrations = sft.load_share(cfg, "rm", "response")[:512]
    result["bias"] = center(model, demonstrations, tokenizer, cfg, device)
    report(result)
    sft.save_models([model, tokenizer], out)
    sft.write_result(out, cfg, result)  # run.json: from here on the folder is complete


def load_pairs(cfg, share):
    """The preference pairs of one share of the task's rows: {prompt, chosen, rejected} of text."""
    if cfg.task == "toy":
        return [toy_pair(row) for row in sft.load_share(cfg, share)]
    return sft.load_share(cfg, share, *PAIR)


def start_model(cfg, device):
    """The SFT trunk under a fresh scalar head, the same on every rank, and the SFT tokenizer."""
    torch.manual_seed(cfg.seed)
    if not Path(cfg.sft).is_dir():
        command = f"python sft.py --task {cfg.task} --out {cfg.sft}"
        sft.fail(f"--sft {cfg.sft}: no such folder; make one with {command}")
    model = ScalarModel.load(cfg.sft, sft.load_device(cfg, device))
    sft.broadcast_parameters(model)
    return model, load_tokenizer(cfg.sft)


def load_tokenizer(folder):
    """The tokenizer that sft.py saved with the model, which has a PAD token that is not EOS."""
    tokenizer = sft.load_or_fail(AutoTokenizer.from_pretrained, folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        sft.fail(f"{folder}: the tokenizer has no PAD of its own; make the folder with sft.py")
    return tokenizer


def check_vocabulary(model, folder, tokenizer):
    """Refuse an RM that reads other ids than the policy writes; PAD alone may be new to it.

    tokenizer: the policy's.
    """
    theirs = sft.load_or_fail(AutoTokenizer.from_pretrained, folder).get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(token) != number and number != tokenizer.pad_token_id:
            sft.fail(f"--reward_model {folder} reads another vocabulary: {token!r} is not {number}")
    if len(tokenizer) > model.trunk.get_input_embeddings().weight.shape[0]:
        model.trunk.resize_token_embeddings(len(tokenizer))


@torch.no_grad()
def score_all(model, examples, pad, size, device):
    """The RM's scores of encoded {prompt, response} examples, in order: a list on every rank.

    The ranks share the work. A model that is split among them must be called equally often by
    all, so that those who run out of examples score the first one again, and forget it.
    """
    mine = examples[sft.rank() :: sft.world()]
    share = math.ceil(len(examples) / sft.world())
    mine += examples[:1] * (share - len(mine))
    scores = []
    for part in sft.micro_slices(share, size):
        prompts = [example["prompt"] for example in mine[part]]
        responses = [example["response"] for example in mine[part]]
        batch = sft.make_batch(prompts, responses, pad, device)
        scores += last_token_scores(model, batch).tolist()
    everyone = sft.gather([scores])  # [ranks][share]
    return [everyone[i % sft.world()][i // sft.world()] for i in range(len(examples))]


def evaluate(model, rows, tokenizer, cfg, device):
    """Accuracy on held-out pairs: the share in which the preferred response scores higher.

    Where the task has a gold score, also against noiseless labels: the truly better response
    counts as preferred, and pairs of equal gold score are left out.
    """
    pairs = sft.encode(rows, tokenizer, cfg, PAIR)
    margins = score_margins(model, pairs, tokenizer, cfg, device)
    result = {"pairs": len(rows), "accuracy": sum(m > 0 for m in margins) / len(rows)}
    if cfg.task == "toy":
        right = []
        for margin, row in zip(margins, rows, strict=True):
            gold = gold_score(row["facts"], row["chosen"])
            gold -= gold_score(row["facts"], row["rejected"])
            if gold != 0:
                right.append(margin * gold > 0)
        result["accuracy_noiseless"] = sum(right) / len(right)
        result["pairs_noiseless"] = len(right)
    return result


def score_margins(model, pairs, tokenizer, cfg, device):
    """By how much each encoded pair's chosen response scores higher: a list of numbers."""
    chosen = [{"prompt": pair["prompt"], "response": pair["chosen"]} for pair in pairs]
    rejected = [{"prompt": pair["prompt"], "response": pair["rejected"]} for pair in pairs]
    size, pad = 2 * cfg.micro_batch_size, tokenizer.pad_token_id
    scores = score_all(model, chosen + rejected, pad, size, device)
    return [a - b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]


def center(model, rows, tokenizer, cfg, device):
    """Shift the head's bias so that the demonstrations in `rows` score 0 on average.

    Returns the new bias.
    """
    examples = sft.encode(rows, tokenizer, cfg)
    size, pad = cfg.micro_batch_size, tokenizer.pad_token_id
    scores = score_all(model, examples, pad, size, device)
    if sft.is_sharded(model):
        model.reshard()  # or the change would be made to a copy that is put together, and lost
    with torch.no_grad():
        model.head.bias -= sum(scores) / len(scores)
    return float(sft.gathered(model.head.bias))


def wilson_interval(wins, count):
    """The 95 % interval of a share, of which `wins` of `count` were seen (Wilson, 1927).

    Unlike share +- 2 standard errors it stays within 0 and 1, and has a width at 0 of 10.

    >>> low, high = wilson_interval(0, 10)
    >>> f"{low:.3f} to {high:.3f}"
    '0.000 to 0.278'
    """
    z = 1.959964  # standard errors that hold 95 % of a normal distribution
    share = wins / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def report(result):
    """Print the accuracies with their 95 % intervals."""
    kinds = [("accuracy", "pairs", "the labels as given")]
    kinds.append(("accuracy_noiseless", "pairs_noiseless", "noiseless labels"))
    for name, pairs, labels in kinds:
        if name in result:
            count = result[pairs]
            low, high = wilson_interval(round(result[name] * count), count)
            interval = f"95 % interval {low:.3f} to {high:.3f}"
            print0(
                f"RM: accuracy {result[name]:.3f} ({interval}) on {count} held-out pairs, {labels}"
            )


# Appendix A. The toy's true quality, and its noisy judge.
#
# With real preferences nobody knows whether the RM is right. In the toy a gold score knows the
# truth; two summaries of one post are compared by it, with noise, and the RM sees only the labels.
# Later the gold score tells whether PPO has found better summaries or only what the RM likes.

# What a sentence of a summary is worth. Coverage weighs more than correctness: comparing a value
# with the post's takes a deeper model than the toy's, and what the RM cannot see it cannot teach.
TOY_GOLD = {"true": 1.0, "wrong": -0.25, "repeated": -0.25, "filler": -1.0, "broken": -1.0}


def gold_score(facts, response):
    """True quality of a toy summary: each sentence's worth from TOY_GOLD, summed.

    facts: {slot: value} of the post. A sentence is `broken` if it is none of the toy's sentences
    or lacks its full stop, and `repeated` if its fact has been stated before, rightly or wrongly.

    >>> facts = {"weather": "foggy", "month": "july"}
    >>> weather = " the weather was mostly foggy for us."
    >>> gold_score(facts, weather + " it was the middle of may back then.")
    0.75
    >>> gold_score(facts, weather + weather + " it")
    -0.25
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

    Length must not betray coverage: or else the RM learns that longer is better, and the policy
    to repeat.
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

    jobs = [
        (program, *_unit_tests(problem))
        for program, problem in zip(programs, problems, strict=True)
    ]
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
        given, wanted = (
            [line.rstrip() for line in x.rstrip().split("\n")] for x in (answer, expected)
        )
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
        source += "import tempfile, threading\nfrom pathlib import Path\n" + inspect.getsource(
            _Sandbox
        )
        command = [sys.executable, "-P", "-s", "-S", "-c", source + "_Sandbox().serve()"]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
            "start_new_session": True,
        }
        process = subprocess.Popen(
            command, env={"PYTHONHASHSEED": "0"}, **pipes
        )  # sets in the same order
        atexit.register(lambda: process.stdin.close() or process.wait())
        if not (greeting := process.stdout.readline()):
            raise RuntimeError(
                f"{sys.executable} started no server for programs; its error stands above"
            )
        if greeting.strip():
            _print_once(
                f"programs run without {greeting.strip()} here: see README.md", file=sys.stderr
            )
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
            self.root, self.user = (
                True,
                0x70000000 + os.getpid(),
            )  # to whom no file or other process belongs
        libraries = {
            os.path.dirname(os.__file__),
            sys.base_prefix + "/lib",
            "/usr/lib",
            "/usr/lib64",
        }
        self.libraries = sorted(filter(os.path.isdir, libraries | {"/lib", "/lib64"}))
        self.namespaces = self.linux and self.enter_namespaces()
        self.landlock = self.linux and max(
            0, ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
        )
        print(
            " and ".join(x for x in ("namespaces", "landlock") if not getattr(self, x)), flush=True
        )
        while os.waitpid(os.fork() or self.keep(), 0)[1] == 0:
            pass  # until a keeper finds no more jobs

    def system(self, name, *arguments):
        """Call a function of Linux's C library; OSError if it fails, nothing on other systems."""
        function = (
            getattr(ctypes.CDLL(None, use_errno=True), name) if self.linux else lambda *ignored: 0
        )
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
            self.system(
                "mount", "none", "/", "", 0x4000 | 0x40000, ""
            )  # from here on, mounts are private
            self.system(
                "mount", "tmpfs", "/proc", "tmpfs", 0, "mode=755"
            )  # on a folder that always exists
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
        if (
            self.namespaces
        ):  # new ones: a program dies with all that it started, and so does its folder
            options = f"mode=700,uid={self.user},nr_inodes=1000,size={self.disk}"
            self.system("unshare", 0x20000 | 0x08000000 | 0x20000000)  # mounts, IPC, processes
            self.system(
                "mount", "tmpfs", folder, "tmpfs", 0x2 | 0x4 | 0x8, options
            )  # nothing to execute
        os.chown(folder, self.user, -1)
        (
            self.system("prctl", 36, 1),
            self.system("prctl", 4, 0),
        )  # adopt orphans, to kill them; be private
        given = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        (
            given.write(b"" if job["function"] else job["input"].encode(errors="replace")),
            given.seek(0),
        )
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
        code = (
            self.kill(program) or unsaid
        )  # no result: os._exit(0) before the function has returned
        failure = (
            "time-out"
            if late
            else "compile error"
            if code == self.compile_error
            else "runtime error"
        )
        if not self.namespaces:
            shutil.rmtree(folder, ignore_errors=True)
        print(
            json.dumps([failure if late or code else "ran", said[1:].decode(errors="replace")]),
            flush=True,
        )
        os._exit(0)

    def kill(self, program):
        """Kill a program, its process group and, without namespaces, adopted orphans -> its exit status."""
        adopted, code = Path(f"/proc/self/task/{os.getpid()}/children"), 0
        with contextlib.suppress(ChildProcessError):
            while True:
                for child in (
                    -program,
                    program,
                    *(adopted.read_text().split() if adopted.exists() else ()),
                ):
                    with contextlib.suppress(OSError):
                        os.kill(int(child), 9)
                ended, status = os.waitpid(-1, 0)
                code = os.waitstatus_to_exitcode(status) if ended == program else code
        return code

    def confine(self, job, folder, given, answer):
        """Before a program runs: a session of its own, only its own open files, limits, and no rights."""
        for target, source in enumerate(
            (given, self.null if job["function"] else answer, self.null, answer)
        ):
            os.dup2(source, target)
        os.closerange(4, 256), os.setsid(), os.chdir(folder), os.umask(0o077)
        for name, limit in (*self.limits, ("CPU", int(job["timeout"]) + 2)):
            with contextlib.suppress(ValueError, OSError):  # macOS does not know all of them
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        self.system("prctl", 38, 1, 0, 0, 0)  # no new privileges
        if (
            self.landlock
        ):  # read libraries, write to `folder`; no other files, no TCP, no signals to others
            every = (
                1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(self.landlock, 16)
            ) - 1  # kinds that it knows of
            handled = (ctypes.c_uint64 * 3)(
                every, 3 * (self.landlock >= 4), 3 * (self.landlock >= 6)
            )
            rules = self.system("syscall", 444, handled, ctypes.c_size_t(24), 0)
            for path in (*self.libraries, folder):
                place = os.open(path, os.O_PATH)
                allowed = (
                    every - 1 if path == folder else 4 | 8
                )  # all but execute; read files, list folders
                rule = (ctypes.c_uint64 * 2)(allowed, place)
                self.system("syscall", 445, rules, 1, rule, 0), os.close(place)
            self.system("syscall", 446, rules, 0), os.close(rules)
        if self.root:
            os.setgroups([]), os.setresgid(*[self.user] * 3), os.setresuid(*[self.user] * 3)
        self.system(
            "capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        )  # no capabilities
        self.system("prctl", 1, 9)  # die with the keeper

    def run(self, job):
        """Run a program on one input: as a script, or to call its function and write down its value."""
        (
            random.seed(0),
            sys.set_int_max_str_digits(0),
        )  # reproducible; as in the Python of APPS' days
        text = {"encoding": "utf-8", "errors": "replace", "closefd": False}
        sys.stdin = sys.__stdin__ = os.fdopen(0, **text)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", **text)
        names = {
            "__name__": "program" if job["function"] else "__main__",
            "exit": sys.exit,
            "quit": sys.exit,
        }
        try:
            code = compile(job["program"], "program", "exec", dont_inherit=True)
        except BaseException:
            os._exit(self.compile_error)
        if not job["function"]:
            exec(code, names)
            (
                threading._shutdown(),
                atexit._run_exitfuncs(),
                names.clear(),
            )  # await threads, close files
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
