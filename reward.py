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
    Appendix C    reward models that others have published
You may stop reading at Appendix A.
"""

import atexit
import functools
import itertools
import json
import math
import os
import queue
import random
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
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

        Reward models that others have published are of another form: Appendix C.
        """
        if is_classifier(folder):
            return from_classifier(folder).to(device)
        model = cls(sft.load_model(AutoModel, folder))
        head = Path(folder) / HEAD
        if head.exists():
            model.head.load_state_dict(load_file(head))
        return model.to(device)


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
    sft.record_rows(cfg)  # so that a changed file is noticed later
    rows = load_pairs(cfg, "rm")  # this chapter's share of the preference pairs
    test = load_pairs(cfg, "test")  # held out
    out = sft.claim(cfg.out)  # the run's folder, held against other runs
    if sft.finished(cfg, out):
        return
    model, tokenizer = start_model(cfg, device)  # the SFT trunk under a new head
    sft.announce(tokenizer, cfg)  # how prompts begin and responses end
    rows = sft.usable_rows(rows, tokenizer, cfg, PAIR)  # without pairs that are equal once cut
    test = sft.usable_rows(test, tokenizer, cfg, PAIR)
    cfg.steps = sft.count_steps(cfg, len(rows))
    sft.prepare(model, cfg, device)
    optimizer = sft.make_optimizer(model)
    print0(f"RM: {len(rows):,} preference pairs, batches of {cfg.batch_size} -> {out}")

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
    demonstrations = sft.usable_rows(demonstrations, tokenizer, cfg)
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


@torch.no_grad()
def score_all(model, examples, pad, size, device):
    """The RM's scores of encoded {prompt, response} examples, in order: a list on every rank.

    The ranks share the work. A model that is split among them must be called equally often by all
    of them. So a rank that runs out of examples scores the first one again, and forgets it.
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
    return float(sft.gathered(model.head.bias.detach()))


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


# Appendix B. Programs: a reward from unit tests.
#
# For code, no model has to guess what people like: a program is run on a problem's unit tests, and
# the share that it passes is the reward. But a policy in training writes anything, programs that
# never end or delete files among them. So every test runs in a process of its own, in a sandbox
# without network, files or other processes (bubblewrap), with limits on time and memory. The
# sandbox never learns the expected outputs: it sends back what the program answered, which is
# compared out here. No trick on the harness can earn more than a right answer does.

FAILURES = {"compile error": -1.0, "runtime error": -0.6, "time-out": -0.6}


def program_rewards(programs, problems, timeout=4.0) -> list[float]:
    """The paper's reward of each program on its problem's tests; arguments as in `run_programs`.

    -1 if Python cannot compile it, -0.6 if a test ends in an error or takes too long, else from
    -0.3 (no test passed) to 1 (all of them).

    What is right is what APPS' own harness accepts, except for slips that a policy would learn to
    use. Stricter on purpose: a program that prints the answer and then crashes, or exits with a
    status other than 0, has failed. Of several expected results the first alone is not enough.
    Lines, and words of a line, may come in another order, but each as often as expected (or else
    "YES NO" would pass wherever both occur). Whole numbers are equal or not (APPS' tolerance takes
    100001 for 100000). And there is no numpy.
    """
    rewards = []
    for status, passed, total in run_programs(programs, problems, timeout):
        rewards.append(FAILURES.get(status, -0.3 + 1.3 * passed / total))
    return rewards


def run_programs(programs, problems, timeout=4.0) -> list[tuple[str, int, int]]:
    """Per program (status, tests passed, tests); a right one has status "ran" and passed all tests.

    programs: sources, also in a Markdown fence.  problems: of each, {input_output: as in
    `sft.check_tests`}.  timeout: seconds a test.  Status is ran, compile error, runtime error or
    time-out; the first test to end in one of the last three is a program's last.
    """
    tests = [unit_tests(problem) for problem in problems]
    idle, threads = server_pool(os.getpid())

    def judge(program, tests):
        """Run one program on its tests, in a server that is idle."""
        passed = 0
        server = idle.get()
        try:
            for test, expected in tests:
                reply = server.run(test | {"program": program, "timeout": timeout})
                if reply["status"] != "ran":
                    break
                same = same_result if test["function"] else same_output
                passed += same(reply["answer"], expected)
        finally:
            idle.put(server)
        return reply["status"], passed, len(tests)

    jobs = list(zip(programs, tests, strict=True))
    return list(threads.map(lambda job: judge(*job), jobs))


@functools.cache
def server_pool(process):
    """The servers of this process (its id), and a thread each: one a core, shared among ranks."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    count = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    idle = queue.SimpleQueue()
    for _ in range(count):
        idle.put(Server())
    return idle, ThreadPoolExecutor(count)


def unit_tests(problem):
    """A problem's tests: [({function, or None for a script; input}, expected output)]."""
    tests = problem["input_output"]
    # By way of JSON, as answers come: a tuple is a list there, and all keys are text.
    tests = sft.check_tests(tests if isinstance(tests, str) else json.dumps(tests))
    function = tests.get("fn_name") or None
    pairs = []
    for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
        if not function:  # APPS gives some texts as lists of lines
            given = given if isinstance(given, str) else "\n".join(given)
            expected = expected if isinstance(expected, str) else "\n".join(expected)
        pairs.append(({"function": function, "input": given}, expected))
    return pairs


def same_result(answer, expected):
    """Whether a function's result, as JSON, is as expected; APPS puts some of those into a list."""

    def whole(digits):  # reading a million digits takes minutes: long numbers stay text
        return int(digits) if len(digits) < 4300 else ("whole", digits)

    try:
        result = json.loads(answer, parse_int=whole)
        expected = json.loads(json.dumps(expected), parse_int=whole)
        return result == expected or [result] == expected
    except (ValueError, RecursionError):  # not plain data, or nested too deeply
        return False


def same_output(printed, expected):
    """Whether a script printed the expected words, in any order, or nearly the same numbers."""
    printed = [line.split() for line in printed.splitlines() if line.strip()]
    expected = [line.split() for line in expected.splitlines() if line.strip()]
    if sum(map(len, printed)) != sum(map(len, expected)):
        return False
    if sorted(map(sorted, printed)) == sorted(map(sorted, expected)):
        return True
    if list(map(len, printed)) != list(map(len, expected)):
        return False
    pairs = zip(itertools.chain(*printed), itertools.chain(*expected), strict=True)
    try:
        return all(same_number(word, wanted) for word, wanted in pairs)
    except (ValueError, ArithmeticError):  # a word that is no number
        return False


def same_number(word, wanted):
    """Whether numbers agree to 3 decimals or 5 digits (np.allclose); whole ones must be equal."""
    if word.lstrip("+-").isdecimal() and wanted.lstrip("+-").isdecimal():
        return Decimal(word) == Decimal(wanted)
    x, y = float(word), float(wanted)
    return round(x, 3) == round(y, 3) or math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-8)


def check_sandbox(task, trust=False):
    """Stop where a pretrained model's programs would run without a sandbox, and without `trust`.

    A model of the task toy-code, which has seen nothing but that, gets limits only, and a warning.
    """
    if task != "apps" or trust or sandbox():
        return
    sft.fail(
        f"--task {task} runs what a model wrote, and its sandbox, bubblewrap, is missing or may "
        "not make namespaces: apt install bubblewrap, or risk your files with --trust_programs"
    )


PYTHON = os.path.realpath(sys._base_executable)  # not a virtual environment's: no packages
# All that programs see of our environment; with this seed, sets have the same order in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": f"/python/lib:{sys.base_prefix}/lib"}


@functools.cache
def sandbox():
    """The command that runs another in bubblewrap; empty where that does not work.

    All that is inside: Python (at /python), the system's libraries, and 64 MB of /tmp to write to.
    """
    base = shlex.quote(sys.base_prefix)
    command = f"""
        --die-with-parent --new-session
        --unshare-pid --unshare-net --unshare-ipc --unshare-uts
        --dir /python --dir /python/bin --ro-bind {shlex.quote(PYTHON)} /python/bin/python
        --ro-bind-try {base}/lib /python/lib --ro-bind-try {base}/lib64 /python/lib64
        --dir /usr --ro-bind-try /usr/lib /usr/lib --ro-bind-try /usr/lib64 /usr/lib64
        --ro-bind-try /lib /lib --ro-bind-try /lib64 /lib64 --ro-bind-try /nix /nix
        --proc /proc --dev /dev --remount-ro /dev
        --perms 1777 --size {1 << 26} --tmpfs /tmp --chdir /tmp --remount-ro /
    """
    if os.geteuid() == 0:  # no limit holds for root: the server becomes somebody else
        command += "--cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        command += "--unshare-user"
    bwrap = shutil.which("bwrap")
    if not bwrap:
        return []
    command = [bwrap, *shlex.split(command)]
    test = [*command, "/python/bin/python", "-c", ""]
    done = subprocess.run(test, env=ENVIRONMENT, capture_output=True)
    return command if done.returncode == 0 else []


class Server:
    """A Python in the sandbox that runs one test at a time; it forks, faster than a new start."""

    patience = 10  # seconds beyond a test's time-out after which the server itself must hang

    def __init__(self):
        self.process = None  # started by the first test
        self.owner = os.getpid()
        atexit.register(self.stop)

    def run(self, test):
        """Run one test -> {status, answer (text)}; a runtime error if the server ends or hangs."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        watchdog = threading.Timer(test["timeout"] + self.patience, self.process.kill)
        watchdog.start()
        try:
            print(json.dumps(test), file=self.process.stdin, flush=True)
            reply = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            reply = {"status": "runtime error", "answer": "", "spent": True}
        watchdog.cancel()
        if reply["spent"]:
            self.stop()
        return reply

    def start(self):
        """Start the process: in bubblewrap, or in a folder of its own under limits only."""
        self.stop()
        user = -1  # stay who we are
        if os.geteuid() == 0:
            user = 0x70000000 + secrets.randbelow(1 << 27)  # nobody else has this id
        self.folder = None
        environment = dict(ENVIRONMENT)
        command = [*sandbox(), "/python/bin/python"]
        if not sandbox():
            say_once("programs run under limits only, in no sandbox: apt install bubblewrap")
            command = [PYTHON]
            self.folder = tempfile.mkdtemp()
            environment["TMPDIR"] = self.folder
            os.chmod(self.folder, 0o777 if user >= 0 else 0o700)  # it is `user` who writes to it
        command += ["-P", "-s", "-S", "-X", "utf8", "-c", SERVER]
        self.process = subprocess.Popen(
            [*command, str(user), "sandbox" if sandbox() else ""],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if not self.process.stdout.readline():
            raise RuntimeError(f"{PYTHON} started no server for programs; why stands above")

    def stop(self):
        """Kill the process, which ends all in its sandbox, and delete its folder."""
        if self.process is None or self.owner != os.getpid():  # a fork of ours has no say
            return
        self.process.kill()
        self.process.communicate()  # wait, and close the pipes
        self.process = None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def say_once(text):
    """Print a warning, the first time."""
    print(text, file=sys.stderr)


# The server is a program of its own, and a text: to import this file, with PyTorch, takes seconds.
SERVER = r'''
import atexit, builtins, contextlib, ctypes, decimal, fractions, gc, json, os, random, re, resource
import select, sys, tempfile, textwrap, threading, time, types
# Programs like these, which are imported once, here, and not by every test.
import __future__, abc, array, cmath, concurrent.futures.thread, contextlib, dataclasses, enum, io
import numbers, pickle, pprint, signal, statistics, traceback

# What APPS' harness imports for programs, so that they take it for granted, and a little more.
PRELUDE = """
import bisect, collections, copy, datetime, fractions, functools, heapq, itertools, math, operator
import queue, random, re, string, sys, time
from math import ceil, cos, exp, fabs, floor, gcd, inf, log, log2, sin, sqrt, tan
from bisect import *; from collections import *; from functools import *
from heapq import *; from itertools import *; from typing import *
stdin, stdout = sys.stdin, sys.stdout
"""
LIMITS = {
    "AS": 1 << 30,  # bytes of memory, of each process
    "FSIZE": 1 << 24,  # bytes of a file
    "NOFILE": 64,  # open files
    "NPROC": 16,  # processes and threads, all together
    "MSGQUEUE": 0,
    "CORE": 0,
}
LONGEST = 1 << 23  # bytes of an answer
COMPILE_ERROR = 200  # the exit status that says so
NUMBERS = {decimal.Decimal: float, fractions.Fraction: float}  # how JSON can have them


USER = int(sys.argv[1])  # whom to become, or -1
SANDBOX = sys.argv[2] == "sandbox"


def serve():
    """Run tests, each a line of JSON, until there are no more."""
    jobs = os.fdopen(os.dup(0))
    replies = os.fdopen(os.dup(1), "w")
    names = {}
    exec(PRELUDE, names)
    builtins.exit = builtins.quit = sys.exit
    sys.set_int_max_str_digits(0)  # as in the Python of APPS' days
    alone = SANDBOX  # whether all processes that we may kill are the program's
    if USER >= 0:
        with contextlib.suppress(OSError):  # some containers have few users
            os.setgroups([])
            os.setgid(USER)
            os.setuid(USER)
            alone = True
    if not alone:  # others' processes count too: allow for all that there are
        with contextlib.suppress(OSError):
            LIMITS["NPROC"] += int(open("/proc/loadavg").read().split()[3].split("/")[1])
    set_dumpable(0)  # programs cannot look into the server
    gc.freeze()  # forks share its memory
    clean = traces()
    print("ready", file=replies, flush=True)
    for line in jobs:
        reply = run_test(json.loads(line), names, alone)
        # Nothing is cleaned: where a program has left something, the next one gets a new server.
        reply["spent"] = traces() != clean
        print(json.dumps(reply), file=replies, flush=True)


def traces():
    """What programs can leave behind: files, a changed folder, System V's shared memory."""
    found = []
    with contextlib.suppress(OSError):
        about = os.stat(".")
        found += [os.listdir("."), about.st_mode, about.st_nlink]
        for kind in ("shm", "msg", "sem") if SANDBOX else ():
            with open("/proc/sysvipc/" + kind) as table:
                found.append(table.read())
    return found


def run_test(test, names, alone):
    """Run a program on one input in a process of its own, and end all that it has started."""
    given = tempfile.TemporaryFile(dir=".")
    if not test["function"]:
        given.write(test["input"].encode(errors="replace"))
        given.seek(0)
    pipe, answer = os.pipe()
    deadline = time.monotonic() + test["timeout"]
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        run_program(test, names, given.fileno(), answer)
    with contextlib.suppress(OSError):  # here as well, as either may be first
        os.setpgid(child, child)
    os.close(answer)
    given.close()
    said, code = follow(child, pipe, deadline)
    os.close(pipe)
    if code is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    end_others(child, alone)
    status = "ran"
    if code == COMPILE_ERROR:
        status = "compile error"
    elif code is None and len(said) <= LONGEST:
        status = "time-out"
    elif code != 0 or (test["function"] and not said):  # os._exit(0) before there is a result
        status = "runtime error"
    return {"status": status, "answer": said.decode(errors="replace")}


def follow(child, pipe, deadline):
    """What a process says, and its exit status: None if it is late, or says too much."""
    said = b""
    code = None
    while len(said) <= LONGEST and time.monotonic() < deadline:
        patience = 0.01 if code is None else 0
        ready = select.select([pipe], [], [], patience)[0]
        chunk = os.read(pipe, 1 << 16) if ready else b""
        said += chunk
        if chunk:
            continue
        # The pipe is closed, or silent: but a process may go on after it has closed its output, and
        # what it has started may keep the pipe open after its end.
        if code is not None:
            break
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
        elif ready:
            time.sleep(0.0002)
    return said, code


def end_others(child, alone):
    """Kill what a program has started, and wait for its end: the limit on processes counts it."""
    with contextlib.suppress(OSError):  # nobody is left
        if not alone:
            os.killpg(child, 9)
        while alone:
            os.kill(-1, 9)  # all but this process
            if not SANDBOX:  # here it never says that nobody is left
                break
            time.sleep(0.0002)


def run_program(test, names, given, answer):
    """The life of a program's process: its files, limits, run and answer. It never returns."""
    function = test["function"]
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in enumerate([given, null if function else answer, null, answer]):
        os.dup2(source, target)
    os.closerange(4 if function else 3, 256)  # 3 is for a function's result
    LIMITS["CPU"] = int(test["timeout"]) + 2  # seconds
    for name, limit in LIMITS.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # unknown to macOS
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    set_dumpable(1)  # or the program could not open /dev/stdin
    random.seed(0)  # so that programs are reproducible
    module = types.ModuleType("program" if function else "__main__")
    vars(module).update(names)
    sys.modules[module.__name__] = module
    try:
        code = compile_program(test["program"])
    except BaseException:
        os._exit(COMPILE_ERROR)
    try:
        exec(code, vars(module))
        if function:
            write_result(call(vars(module), function, test["input"]))
    except BaseException as end:
        if function or not isinstance(end, SystemExit) or end.code not in (None, 0):
            os._exit(1)
    del module
    if not function:
        finish()
    os._exit(0)


def compile_program(text):
    """The code of a program or, where the text is no Python, of Markdown's first block in it."""
    try:
        return compile(text, "program", "exec", dont_inherit=True)
    except SyntaxError:
        block = re.search(r"^ *```[^\n]*\n(.*?)(^ *```|\Z)", text, re.MULTILINE | re.DOTALL)
        return compile(textwrap.dedent(block[1]), "program", "exec", dont_inherit=True)


def call(names, function, arguments):
    """The result of a program's function, or of a method of its class Solution (LeetCode's way)."""
    # JSON has made the keys of dicts text: as in APPS, those of the first argument are ints again.
    if arguments and isinstance(arguments[0], dict):
        with contextlib.suppress(ValueError):
            arguments[0] = {int(key): value for key, value in arguments[0].items()}
    solution = names.get("Solution")
    if hasattr(solution, function):
        return getattr(solution(), function)(*arguments)
    return names[function](*arguments)


def write_result(value):
    """Write a result as JSON to file 3."""
    try:
        text = json.dumps(value, default=lambda x: NUMBERS[type(x)](x))
    except Exception:  # a set, a generator, an object; circular, or nested too deeply
        text = "no plain data"
    with open(3, "wb") as file:
        file.write(text.encode())


def finish():
    """A script's end as in Python, save taking that apart, which takes longer than all else."""

    def flush():
        sys.stdout.flush()  # whatever that is by then

    for step in (threading._shutdown, atexit._run_exitfuncs, flush, gc.collect):
        with contextlib.suppress(Exception):
            step()
    sys.stdin, sys.stdout = sys.__stdin__, sys.__stdout__
    sys.modules.pop("__main__", None)
    gc.collect()  # writes out the files that the script has forgotten
    with contextlib.suppress(Exception):
        flush()


def set_dumpable(flag):
    """Whether processes of the same user may look into this one (4 is PR_SET_DUMPABLE)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, flag, 0, 0, 0)


serve()
'''


# Appendix C. Reward models that others have published.
#
# Nearly all of them are AutoModelForSequenceClassification with one label: the same trunk and head
# as ours under other names, and read at the last token too.


def is_classifier(folder):
    """Whether a folder or hub name holds a sequence classifier of transformers."""
    config = sft.load_or_fail(AutoConfig.from_pretrained, folder)
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def from_classifier(folder):
    """The `ScalarModel` that is equal to a sequence classifier with one label."""
    classifier = sft.load_model(AutoModelForSequenceClassification, folder)
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        sft.fail(f"{folder}: a reward model is a decoder with one label, read at its last token")
    model = ScalarModel(classifier.base_model)
    bias = torch.zeros(1) if score.bias is None else score.bias
    model.head.load_state_dict({"weight": score.weight, "bias": bias})
    return model


def load_tokenizer(folder):
    """The tokenizer that sft.py saved with the model, which has a PAD token that is not EOS."""
    tokenizer = sft.load_or_fail(AutoTokenizer.from_pretrained, folder)
    pad = tokenizer.pad_token_id
    sft.conventions(tokenizer)
    if tokenizer.pad_token_id != pad:  # it had none of its own, and was given one just now
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


if __name__ == "__main__":
    record(main)()  # so that torchrun can show the error of a rank that failed
