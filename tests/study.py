"""The study: do macro actions help PPO, and if so, why?  Not a test; it makes results/study.

    python tests/study.py confirm             # two runs at a time; the same command goes on
    python tests/study.py confirm --list      # the commands that it would run
    python tests/study.py tables              # results/study -> tables.md, figures/*.png

Every run is one `python ma_ppo.py` on one thread, without its closing picture. A part trains what
it needs and is not there yet; parts share runs. Interrupt it (Ctrl-C) as you like.

    part           runs        what it asks
    pilot          8           seeds 0, 1: how `confirm` shall teach its critic; no claim
    confirm        80          seeds 20 to 29: the comparisons in CLAIMS, named before they were run
    four           20          (c) with the first candidate; made before the pilots were looked at
    code           50          the same ten seeds on toy-code: (a) and (b) again
    grid           63 (51)     seeds 20 to 22: n x lambda; (those that no part before it has)
    terminations   21 (12)     other macro actions
    sigma          18 (12)     other values of a macro action
    variants       18 (12)     mean rewards; two epochs, with a ratio a token and a macro action
    critic         48 (36)     the critic's lambda x its updates x steps in which only it learns
    doubts         15          faster learning, and the taught critic, with the horizon alone
    good           6           a critic taught so hard that it should know what is to come
    short          9           posts of 5 facts in place of 12: shorter responses
    long           9           posts of 24 facts: longer ones
    level          30          seeds 20 to 29: critics that start at the right level
    flat           30          seeds 20 to 29: critics that start with nothing but a level
    centred        30          seeds 20 to 29: values that are at the right level in every step
    shifted        20          seeds 20 to 29: the same for advantages only, not for targets
    pooling        50          seeds 30 to 39: true quality on the way, and a macro action's value
    credit         -           the estimators against the truth, in two runs: 30 minutes
    ends           -           what the first update praises: the responses' ends, or all else

A run of the toy takes 90 to 110 s of a core (rloo 80, a critic with four updates a step 150, with
eight 220), SFT and RM of a seed, made once, 300 s. What was planned: six hours on two; `four`,
`doubts`, `level`, `flat`, `centred`, `shifted` and `pooling`, which came later: three.

Kept in results/study/TASK/seedK/NAME: metrics.jsonl (COLUMNS; `seconds` is the mean of the run) and
config.json. runs.json has each run's command, commit, and the seconds that it took.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "study"
FIGURES = ROOT / "figures"
sys.path.insert(0, str(ROOT))
chapter5 = importlib.import_module("eval")  # found only now

# How (c) teaches the critic: the first candidate, unless a pilot beat it by 0.2 in RM area over all
# steps. Eight updates did (4.72 against 4.50); ten steps ahead did not (4.05 over all 70 steps).
FIRST_CANDIDATE = "--critic_lam 1 --critic_epochs 4 --value_clip 0"
TAUGHT = "--critic_lam 1 --critic_epochs 8 --value_clip 0"
TEN = range(20, 30)
THREE = range(20, 23)
FRESH = range(30, 40)

# Settings: {name of a run: flags of ma_ppo.py}. One name means the same run wherever it stands.


def grid_name(arm, n, lam):
    """What a run with this n and λ is called: `fixed` and `token` are those of n = 5, λ = .95.

    >>> grid_name("token", 1, 0.95), grid_name("fixed", 2, 0.9), grid_name("fixed", 5, 1)
    ('token', 'fixed-n2-lam.9', 'fixed-lam1')
    """
    name = arm
    if arm == "fixed" and n != 5:
        name += f"-n{n}"
    if lam != 0.95:
        name += f"-lam{lam:g}".replace("0.", ".")
    return name


def n_and_lambda():
    """The grid; a whole response is one decision, so that λ has nothing to act on."""
    settings = {"whole": "--arms whole"}
    for lam in (0.9, 0.95, 0.98, 0.99, 1):
        for n in (1, 2, 5, 10):
            arm = "token" if n == 1 else "fixed"
            flags = f"--arms {arm}"
            flags += f" --n {n}" if n in (2, 10) else ""
            flags += f" --lam {lam:g}" if lam != 0.95 else ""
            settings[grid_name(arm, n, lam)] = flags
    return settings


def taught_critics():
    """The critic's λ x updates a step x steps before the policy moves, which come on top of 60.

    Without --value_clip 0 a second update would hardly get anywhere: the clip of 0.2 is in units of
    reward. With one update it makes no difference.
    """
    there = {flags: name for name, flags in FOUR.items()}  # has these, under other names
    settings = {"token": "--arms token", "fixed": "--arms fixed"}
    for arm in ("token", "fixed"):
        for lam in (0.95, 1):
            for epochs in (1, 4):
                for steps in (0, 20):
                    if (lam, epochs, steps) == (0.95, 1, 0):
                        continue  # the default, which is there already
                    flags = f"--critic_lam {lam:g} --critic_epochs {epochs} --value_clip 0"
                    if steps:
                        flags += f" --critic_steps {steps} --steps {60 + steps}"
                    name = f"{arm}-critic{lam:g}-{epochs}-{steps}".replace("0.", ".")
                    flags = f"--arms {arm} {flags}"
                    settings[there.get(flags, name)] = flags
    return settings


def both(name, flags):
    """The same flags for `token` and for `fixed`."""
    return {f"{arm}-{name}": f"--arms {arm} {flags}" for arm in ("token", "fixed")}


PLAIN = {
    "token": "--arms token",
    "fixed": "--arms fixed",
    "control": "--arms control",
    "token-lam1": "--arms token --lam 1",
    "fixed-lam1": "--arms fixed --lam 1",
}
CONFIRM = PLAIN | both("taught", TAUGHT) | {"rloo": "--arms rloo"}
FOUR = both("taught-4", FIRST_CANDIDATE)
PILOT = {
    "token": "--arms token",
    "token-taught-4": f"--arms token {FIRST_CANDIDATE}",
    "token-taught-8": f"--arms token {TAUGHT}",
    "token-taught-4-10": f"--arms token {FIRST_CANDIDATE} --critic_steps 10 --steps 70",
}
TERMINATIONS = {
    name: f"--arms {name}"
    for name in ("token", "fixed", "whole", "random", "perplexity", "sentence", "word")
}
SIGMA = {
    "fixed": "--arms fixed",
    "whole": "--arms whole",
    "fixed-last": "--arms fixed --sigma last",
    "fixed-decay": "--arms fixed --sigma decay",
    "fixed-first": "--arms fixed --sigma first",
    "whole-first": "--arms whole --sigma first",
}
VARIANTS = {
    "token": "--arms token",
    "fixed": "--arms fixed",
    "fixed-mean": "--arms fixed --macro_reward mean",
    "token-2epochs": "--arms token --ppo_epochs 2",
    "fixed-2epochs": "--arms fixed --ppo_epochs 2",
    "fixed-2epochs-macro": "--arms fixed --ppo_epochs 2 --ratio macro",
}
HARD = "--critic_lam 1 --critic_epochs 8 --value_clip 0 --critic_steps 20 --steps 120"
DOUBTS = {
    "token-lr": "--arms token --lr 1e-3",
    "fixed-lr": "--arms fixed --lr 1e-3",
    "control-lr": "--arms control --lr 1e-3",
    "control-2epochs": "--arms control --ppo_epochs 2",
    "control-taught": f"--arms control {TAUGHT}",
}
SHORT = {name: PLAIN[name] for name in ("token", "fixed", "control")}
LONG = {name: f"{flags} --max_response 256" for name, flags in SHORT.items()}
LEVEL = {f"{name}-level": PLAIN[name] for name in ("token", "fixed", "control")}
FLAT = {f"{name}-flat": PLAIN[name] for name in ("token", "fixed", "control")}
CENTRED = {f"{name}-centred": PLAIN[name] for name in ("token", "fixed", "control")}
SHIFTED = {f"{name}-shifted": PLAIN[name] for name in ("token", "control")}
POOLING = SHORT | {name: SIGMA[name] for name in ("fixed-first", "fixed-last")}
GOLD_ON_THE_WAY = "gold score of steps 10 to 29"
FACTS = 12  # that a post of the toy states


class Part(NamedTuple):
    """A part of the study: every setting with every seed."""

    task: str
    seeds: Iterable
    settings: dict
    seconds: int  # of a run, roughly, on a core of its own
    facts: int = FACTS
    critic: str = ""  # what is changed in critics: see `change_critics` and `centre_values`

    @property
    def folder(self):
        """What its results stand under."""
        return self.task if self.facts == FACTS else f"{self.task}-{self.facts}"

    @property
    def change(self):
        """What its runs change in the chapters, a word for the command line; mostly nothing."""
        return self.critic or self.changed_facts

    @property
    def changed_facts(self):
        """The same for SFT and RM, which know no critic."""
        return "" if self.facts == FACTS else str(self.facts)


PARTS = {
    "pilot": Part("toy", (0, 1), PILOT, 185),
    "confirm": Part("toy", TEN, CONFIRM, 125),
    "four": Part("toy", TEN, FOUR, 190),
    "code": Part("toy-code", TEN, PLAIN, 80),
    "grid": Part("toy", THREE, n_and_lambda(), 107),
    "terminations": Part("toy", THREE, TERMINATIONS, 107),
    "sigma": Part("toy", THREE, SIGMA, 107),
    "variants": Part("toy", THREE, VARIANTS, 130),
    "critic": Part("toy", THREE, taught_critics(), 165),
    "doubts": Part("toy", THREE, DOUBTS, 170),
    "good": Part("toy", THREE, both("good", HARD), 600),
    "short": Part("toy", THREE, SHORT, 60, facts=5),
    "long": Part("toy", THREE, LONG, 240, facts=24),
    "level": Part("toy", TEN, LEVEL, 107, critic="level"),
    "flat": Part("toy", TEN, FLAT, 107, critic="flat"),
    "centred": Part("toy", TEN, CENTRED, 107, critic="centred"),
    "shifted": Part("toy", TEN, SHIFTED, 107, critic="shifted"),
    "pooling": Part("toy", FRESH, POOLING, 90),
}
STAGE_SECONDS = {"toy": 300, "toy-code": 100, "toy-5": 190, "toy-24": 700}

# The comparisons that were named before the runs of `confirm` were made: (arm, baseline).
CLAIMS = [
    ("fixed", "token"),  # (a) are macro actions faster?
    ("fixed", "control"),  # (b) faster than their horizon at token level? Equivalence is claimed
    ("fixed-lam1", "token-lam1"),  # (b) and where the horizon is infinite?
    ("fixed-taught", "token-taught"),  # (c) and with a critic that is taught on returns?
    ("rloo", "fixed"),  # (d) is a critic needed at all?
]


# Running.


@dataclass
class Job:
    """A process: a run, or SFT and RM of a seed, which come first."""

    name: str  # TASK/seedK/NAME, the folder below runs/study and results/study
    settings: str  # the flags that make the run what it is
    flags: list  # all flags of ma_ppo.py
    seconds: int
    change: str = ""  # what is changed in the chapters: a number of facts, or critics

    @property
    def command(self):
        """What a reader would type."""
        script = f"tests/study.py {self.mode('run')}" if self.change else "ma_ppo.py"
        return f"python {script} {shlex.join(self.flags)}"

    def mode(self, kind):
        """What its process is told: "stages" or "run", and what it shall change."""
        return f"{kind}-{self.change}" if self.change else kind

    @property
    def kept(self):
        """Where its small files are kept."""
        return RESULTS / self.name


def stage_folder(out, part, seed):
    """SFT and RM of a seed: its subfolders sft and reward."""
    return Path(out) / part.folder / f"seed{seed}"


def jobs_of(part, out):
    """All runs of a part, seed by seed."""
    jobs = []
    for seed in part.seeds:
        stages = stage_folder(out, part, seed)
        for name, flags in part.settings.items():
            given = ["--task", part.task, "--seed", str(seed), *flags.split()]
            given += ["--out", str(stages / name), "--sft", str(stages / "sft")]
            if part.task == "toy":
                given += ["--reward_model", str(stages / "reward")]
            given += ["--keep", "3", "--resume", "auto"]
            name = f"{part.folder}/seed{seed}/{name}"
            jobs.append(Job(name, flags, given, part.seconds, part.change))
    return jobs


def stages_of(part, jobs, out):
    """The jobs that make SFT and RM, of those seeds that have runs to be made."""
    stages = []
    for seed in part.seeds:
        name = f"{part.folder}/seed{seed}"
        needed = any(job.name.startswith(f"{name}/") for job in jobs)
        folder = stage_folder(out, part, seed)
        last = folder / ("reward" if part.task == "toy" else "sft") / "run.json"
        if needed and not last.exists():
            flags = ["--task", part.task, "--seed", str(seed), "--out", str(folder)]
            if part.facts > FACTS:
                flags += ["--max_response", "256"]
            flags += ["--resume", "auto"]
            seconds = STAGE_SECONDS[part.folder]
            stages.append(Job(name, "", flags, seconds, part.changed_facts))
    return stages


def is_kept(job):
    """Whether results/study has the run, and with these settings."""
    there = (job.kept / "config.json").exists()
    return there and known_runs().get(job.name, {}).get("settings") == job.settings


def known_runs():
    """runs.json: {name of a run: how it was made}."""
    path = RESULTS / "runs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def make(part, args):
    """Train what a part has no results of, and keep its small files."""
    jobs = [job for job in jobs_of(part, args.out) if not is_kept(job)]
    stages = stages_of(part, jobs, args.out)
    total = sum(job.seconds for job in [*stages, *jobs])
    count = len(part.settings) * len(part.seeds)
    minutes = total / args.workers / 60
    print(
        f"{count} runs, {count - len(jobs)} are there; {len(stages)} x SFT and RM; "
        f"about {minutes:.0f} minutes with {args.workers} workers",
        flush=True,
    )
    if args.list:
        print("\n".join(job.command for job in [*stages, *jobs]))
        return
    commit = current_commit()
    work(stages, "stages", args.workers, lambda job: keep_stages(job, args.out))
    work(jobs, "run", args.workers, lambda job: keep(job, commit))


def current_commit():
    """The commit of the code; it ends in -changed where the chapters differ from it."""
    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", ":(glob)*.py")  # the chapters
    if changed:
        print(f"warning: files that are not committed:\n{changed}")
    return f"{commit}-changed" if changed else commit


def git(*words):
    """What git prints."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def work(jobs, mode, workers, done):
    """Run jobs, several at a time, each in a process; call done(job) after each."""
    stop = threading.Event()  # Ctrl-C reaches the processes, too: they save, and end

    def one(job):
        return None if stop.is_set() else run_process(job, mode)

    failed = []
    begin = time.time()
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(one, job): job for job in jobs}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                job, problem = futures[future], future.result()
                if problem:
                    failed.append(job.name)
                else:
                    done(job)
                left = (time.time() - begin) / number * (len(jobs) - number) / 60
                place = f"[{number}/{len(jobs)}, {left:.0f} min left]"
                print(f"{place} {job.name}: {problem or 'done'}", flush=True)
        except KeyboardInterrupt:
            stop.set()
            print("interrupted: runs under way are saved; the same command goes on", flush=True)
            raise SystemExit(130) from None
    if failed:
        raise SystemExit(f"error: {len(failed)} failed: {', '.join(failed)}")


def run_process(job, mode):
    """Run one job to its end, with one thread -> None, or the last line of its log."""
    log = Path(job.flags[job.flags.index("--out") + 1]) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, job.mode(mode), *job.flags]
    with log.open("a") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        code = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, **streams).returncode
    if code == 0:
        return None
    lines = log.read_text().splitlines() or [""]
    return f"exit code {code}, {log}: {lines[-1]}"


def child(mode, flags):
    """What a process does: the stages, or one run without its closing picture."""
    ma_ppo = chapter5.ma_ppo
    kind, _, change = mode.partition("-")
    if change in ("level", "flat"):
        change_critics(change)
    elif change in ("centred", "shifted"):
        centre_values(targets=change == "centred")
    elif change:
        change_facts(int(change))
    if kind == "stages":
        cfg = ma_ppo.parse(flags)
        chapter5.sft.setup(cfg.device)
        ma_ppo.build_missing_stages(cfg)
    else:
        ma_ppo.draw_curves = print  # eval.py draws all runs together
        ma_ppo.main(flags)


def change_facts(count):
    """Let posts of the toy state so many facts (5 to 24), and summaries be shorter or longer.

    The facts beyond the twelve are those of a second trip, told in the same words after "later".
    """
    sft = chapter5.sft
    facts = dict(sft.TOY_FACTS)
    for slot, fact in sft.TOY_FACTS.items():
        posts = tuple(f"later {post}" for post in fact.posts)
        facts[f"later {slot}"] = sft.Fact(fact.values, f"later {fact.summary}", posts)
    sft.TOY_FACTS = dict(list(facts.items())[:count])
    sft.TOY_LONGEST = count + 2  # as it is for twelve


def change_critics(how):
    """Let the critic of a run start at the right level.

    As a copy of the reward model, which reads unfinished texts here, it expects far too little.
    "level": its bias is raised by the mean of return - V over the tokens of the first step's
    responses; every difference between two of its values stays. "flat": there are no differences
    any more, for its head is set to 0 first; it knows the mean, and nothing else.
    """
    load_models = chapter5.ma_ppo.load_models

    def load_and_change(arm, cfg, device):
        models, optimizers, tokenizer = load_models(arm, cfg, device)
        head = models["critic"].head
        with chapter5.torch.no_grad():
            if how == "flat":
                head.weight.zero_()
            _, missing = first_rollout(models, tokenizer, cfg)
            head.bias += missing
        print(f"the critic's level: {missing:+.3f}", flush=True)
        return models, optimizers, tokenizer

    chapter5.ma_ppo.load_models = load_and_change


def centre_values(targets):
    """Let values be at the right level in every step when advantages are made of them.

    All are shifted by the mean of return - V over the step's tokens, the return being the rewards
    that really came; all differences between values stay. `targets`: whether what the critic is
    taught, A + V, is made of the shifted values, too.
    """
    ma_ppo = chapter5.ma_ppo
    estimate = ma_ppo.estimate

    def estimate_centred(arm, rollout, rewards, lam, cfg):
        mask, values = rollout.batch.mask, rollout.values  # [B, T]
        _, usual = estimate(arm, rollout, rewards, lam, cfg)  # [B, T], the critic's targets
        returns = ma_ppo.discounted_sum(rewards * mask, 1.0)  # [B, T]
        missing = ma_ppo.masked_mean(returns - values, mask)
        rollout.values = (values + missing) * mask
        advantages, centred = estimate(arm, rollout, rewards, lam, cfg)
        rollout.values = values
        return advantages, centred if targets else usual

    ma_ppo.estimate = estimate_centred


def first_rollout(models, tokenizer, cfg):
    """The judged rollout of step 0, and the mean of return - V over its tokens.

    Before the first update no KL penalty is due: every token's return is the score.
    """
    ma_ppo = chapter5.ma_ppo
    prompts = ma_ppo.load_prompts(tokenizer, cfg)
    examples = ma_ppo.choose_prompts("token", prompts, 0, cfg)
    rollout = ma_ppo.sample(models["policy"], examples, 0, tokenizer, cfg)
    ma_ppo.judge(rollout, models, examples, tokenizer, cfg)
    error = rollout.scores[:, None] - rollout.values  # [B, T]
    return rollout, ma_ppo.masked_mean(error, rollout.batch.mask)


# Keeping.

COLUMNS = ["rm_score", "gold_score", "kl", "response_length", "eos_rate", "macro_length"]
COLUMNS += ["explained_variance", "pass_rate"]
AT_STEP_0 = ["rm_score_std", "gold_score_std"]


def keep(job, commit):
    """Copy the small files of a finished run to results/study."""
    folder = trained(job)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    job.kept.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in small_rows(rows))
    (job.kept / "metrics.jsonl").write_text(text)
    (job.kept / "config.json").write_text((folder / "config.json").read_text())
    made = {"settings": job.settings, "command": job.command, "commit": commit}
    made["seconds"] = round(sum(row["seconds"] for row in rows))
    known = known_runs() | {job.name: made}
    (RESULTS / "runs.json").write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def small_rows(rows):
    """The columns that tables and figures need, in six digits.

    Of the timings only the mean of the run, in every row: it stands for each step's.
    """
    mean = rounded(fmean(row["seconds"] for row in rows))
    small = []
    for row in rows:
        names = COLUMNS + (AT_STEP_0 if row["step"] == 0 else [])
        kept = {name: rounded(row[name]) for name in names if row.get(name) is not None}
        small.append({"step": row["step"], **kept, "seconds": mean})
    return small


def rounded(x):
    """A number in six significant digits."""
    return float(f"{x:.6g}")


def keep_stages(job, out):
    """Copy the results of SFT and RM."""
    for stage in ("sft", "reward"):
        path = Path(out) / job.name / stage / "run.json"
        if path.exists():
            job.kept.mkdir(parents=True, exist_ok=True)
            (job.kept / f"{stage}.json").write_text(path.read_text())


def examine(args):
    """The part `credit`: estimators against the truth, from the checkpoints of two runs."""
    confirm = PARTS["confirm"]
    names = ["toy/seed20/token", "toy/seed20/token-taught"]
    jobs = [job for job in jobs_of(confirm, args.out) if job.name in names]
    folders = [str(trained(job)) for job in jobs]
    flags = ["--at", "0", "20", "60", "--responses", "32", "--continuations", "8"]
    command = ["credit", "--run", *folders, *flags, "--png", str(FIGURES / "credit.png")]
    # Results alone do not do: the models of these two must be here.
    jobs = [job for job in jobs if not (trained(job) / "run.json").exists()]
    stages = stages_of(confirm, jobs, args.out)
    if args.list:
        made = [job.command for job in [*stages, *jobs]]
        print("\n".join([*made, f"python eval.py {shlex.join(command)}"]))
        return
    work(stages, "stages", args.workers, lambda job: keep_stages(job, args.out))
    work(jobs, "run", args.workers, lambda job: None)  # `confirm` keeps their metrics
    _, options = chapter5.parse(command)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "credit.md").write_text("\n".join(chapter5.credit(options)) + "\n")


def praise_at_the_end(args):
    """The part `ends`: what the first update of ten seeds praises, the end or all else.

    Of the first step's responses, with the critic as it starts and with the right level. Kept is
    the mean of the whitened advantages of each response's last ten tokens, and of its other ones.
    """
    ma_ppo = chapter5.ma_ppo
    part = PARTS["level"]
    jobs = [job for job in jobs_of(part, args.out) if job.settings == PLAIN["token"]]
    stages = stages_of(part, jobs, args.out)
    if args.list:
        print("\n".join(job.command for job in stages))
        return
    work(stages, "stages", args.workers, lambda job: keep_stages(job, args.out))
    rows = []
    for job in jobs:
        cfg = ma_ppo.parse(job.flags)
        models, _, tokenizer = ma_ppo.load_models("token", cfg, chapter5.sft.setup("cpu"))
        rollout, missing = first_rollout(models, tokenizer, cfg)
        mask = rollout.batch.mask  # [B, T]
        zero = chapter5.torch.zeros_like(rollout.logprobs)  # [B, T], before any KL
        rewards = ma_ppo.token_rewards(rollout.scores, zero, zero, mask, cfg.beta)  # [B, T]
        to_end = mask.flip(1).cumsum(1).flip(1) * mask  # [B, T]: 1 at the last token
        late = (to_end > 0) & (to_end <= 10)
        for shift, critic in ((0, "as it starts"), (missing, "at the right level")):
            values = rollout.values
            rollout.values = (values + shift) * mask
            for name, guess in chapter5.guesses_of(rollout, rewards, tokenizer, cfg).items():
                if name in ("token", "token, λ = 1", "control", "fixed, σ = equal"):
                    credit = ma_ppo.whiten(guess.advantages, mask)  # [B, T]
                    end = ma_ppo.masked_mean(credit, late)
                    other = ma_ppo.masked_mean(credit, mask.bool() & ~late)
                    row = {"seed": cfg.seed, "critic": critic, "estimator": name}
                    rows.append(row | {"last 10": rounded(end), "others": rounded(other)})
            rollout.values = values
        print(f"seed {cfg.seed}: the critic is {missing:.2f} too low", flush=True)
        rows.append({"seed": cfg.seed, "critic": "as it starts", "too low": rounded(missing)})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (RESULTS / "ends.jsonl").write_text(text)


def trained(job):
    """Where a run leaves its models."""
    out, arm = (job.flags[job.flags.index(name) + 1] for name in ("--out", "--arms"))
    return Path(out) / arm


# Tables. All of them come from results/study, and from nothing else.


def tables():
    """All tables, as the text of results/study/tables.md; the figures are drawn."""
    lines = ["Made by `python tests/study.py tables`.", ""]
    for title, section in SECTIONS.items():
        found = section()
        if found:
            lines += [f"## {title}", "", *found, ""]
    return "\n".join(lines)


def kept_arms(folder, seeds, names):
    """{name: {folder: rows}} of what is kept, of those seeds that have all of the names.

    Of a run in which the critic learns alone at first, only the steps after that.
    """
    folders = [RESULTS / folder / f"seed{seed}" for seed in seeds]
    there = [x for x in folders if all((x / name / "metrics.jsonl").exists() for name in names)]
    arms = chapter5.read_arms(there, list(names)) if there else {}
    for runs in arms.values():
        for folder, rows in runs.items():
            alone = chapter5.read_settings(folder)["critic_steps"]
            spreads = {key: rows[0][key] for key in AT_STEP_0 if key in rows[0]}
            runs[folder] = [rows[alone] | spreads, *rows[alone + 1 :]]
    return arms


def measured(folder, seeds, names, columns):
    """A table of means and standard deviations over the seeds, a row a name."""
    arms = kept_arms(folder, seeds, names)
    if not arms:
        return []
    count = len(next(iter(arms.values())))
    compared = chapter5.compare(arms)
    how = chapter5.measures_table(compared, columns, "mean", chapter5.score_names(arms))
    return [f"{count} seeds.", "", *how]


ALL = ["RM score", "gold score", "KL", "EOS rate", "RM 50 %", "RM 90 %", "RM area", "gold area"]
ALL += ["explained variance", "s/step"]


def claims(folder, pairs, seeds=TEN):
    """The lines of plain words for pairs (arm, baseline)."""
    lines = []
    for arm, versus in pairs:
        arms = kept_arms(folder, seeds, dict.fromkeys(["token", versus, arm]))
        if arms and len(arms[arm]) > 1:  # one seed has no interval
            names = chapter5.score_names(arms)
            args = chapter5.Options()
            found = chapter5.pair_lines(arm, versus, arms, chapter5.compare(arms), names, args)
            lines += [f"- {line}" for line in found]
    return lines


def paired(what, measure, pairs, folder="toy", seeds=TEN):
    """Lines as those of `claims`, for a measure of our own: a function of a run's rows."""
    lines = []
    for arm, versus in pairs:
        arms = kept_arms(folder, seeds, dict.fromkeys([versus, arm]))
        if arms and len(arms[arm]) > 1:
            values, others = ([measure(rows) for rows in arms[x].values()] for x in (arm, versus))
            known = [value for value in others if value is not None]
            margin = 0.1 * abs(fmean(known)) if known else 0.0
            said = chapter5.in_words(values, others, margin)
            lines.append(f"- {arm} - {versus}, {what}: {said}")
    return lines


def rm_area(rows):
    """Mean RM score of the first 60 steps."""
    return chapter5.area(rows[:60], "rm_score")


def shortest(rows):
    """The shortest mean response of five steps, in tokens."""
    return min(chapter5.smooth(chapter5.column(rows[:60], "response_length")))


def score_at_kl(rows, nats):
    """The RM score when the KL first reaches a height, both means of five steps; None: never."""
    kl, scores = (chapter5.smooth(chapter5.column(rows, key)) for key in ("kl", "rm_score"))
    return next((score for x, score in zip(kl, scores, strict=True) if x >= nats), None)


def confirm_section():
    """The confirmatory comparisons, and the picture of four arms."""
    draw_arms(["token", "fixed", "control", "token-taught"], FIGURES / "study.png")
    table = measured("toy", TEN, CONFIRM, ALL)
    return [*table, "", *claims("toy", CLAIMS)] if table else []


def draw_arms(names, png):
    """Learning curves of some arms, mean and range over the ten seeds."""
    arms = kept_arms("toy", TEN, names)
    panels = []
    for key, label in (chapter5.SCORES | chapter5.PANELS).items():
        lines = chapter5.curve_lines(arms, key)
        if lines:
            panels.append(chapter5.Panel(label, "PPO steps", lines))
    if panels:
        chapter5.plot(png, panels, "mean of 5 steps; range over seeds")


def lead_section():
    """How far arms are ahead of `token` at some steps, in the mean over the seeds."""
    names = ["token", "fixed", "control", "token-taught", "rloo"]
    if kept_arms("toy", TEN, ["token-shifted"]):
        names += ["token-level", "control-level", "token-shifted", "control-shifted"]
    arms = kept_arms("toy", TEN, names)
    if not arms:
        return []
    curves = chapter5.smoothed(arms, "rm_score")
    mean = {name: curve.mean(1) for name, curve in curves.items()}  # [steps] each
    steps = [step for step in (0, 5, 10, 20, 40, 59) if step < len(mean["token"])]
    rows = [
        [f"{name} - token", *(f"{mean[name][step] - mean['token'][step]:+.2f}" for step in steps)]
        for name in names[1:]
    ]
    return chapter5.table(["RM score, mean of 5 steps", *map(str, steps)], rows)


def level_section():
    """Critics that start at the right level, and their picture."""
    lines = starts_section("level")()
    if lines:
        names = ["token", "control", "token-level", "token-shifted"]
        draw_arms(names, FIGURES / "level.png")
    return lines


def shortening_section():
    """How long responses are on the way, and whether a setting that shortens them learns slowly."""
    arms = kept_arms("toy", TEN, CONFIRM)
    if not arms:
        return []
    steps = (0, 5, 10, 20, 40, 59)
    rows = []
    for name, runs in arms.items():
        columns = [chapter5.column(found, "response_length") for found in runs.values()]
        curve = [fmean(lengths) for lengths in zip(*map(chapter5.smooth, columns), strict=True)]
        least = chapter5.spread([shortest(found) for found in runs.values()], "mean")
        rows.append([name, *(f"{curve[x]:.0f}" for x in steps if x < len(curve)), least])
    heads = ["tokens, mean of 5 steps", *(str(x) for x in steps if x < len(curve)), "shortest"]
    pairs = [(arm, "token") for arm in ("fixed", "control", "token-taught")]
    lines = paired("shortest responses", shortest, pairs)
    return [*chapter5.table(heads, rows), "", *lines, "", *settings_by_length()]


def settings_by_length():
    """Every setting of seeds 20 to 22: its shortest responses and its RM area, means over these."""
    names = {}
    for part in PARTS.values():
        if part.folder == "toy" and set(THREE) <= set(part.seeds):
            names |= part.settings
    rows = []
    for name in names:
        arms = kept_arms("toy", THREE, [name])
        if arms and len(arms[name]) == len(THREE):
            runs = arms[name].values()
            rows.append((fmean(map(shortest, runs)), fmean(map(rm_area, runs)), name))
    rows.sort()
    grid = [(tokens, area) for tokens, area, name in rows if name in n_and_lambda()]
    if not grid:
        return []
    found = statistics.correlation(*zip(*grid, strict=True))
    cells = [[name, f"{tokens:.0f}", f"{area:.2f}"] for tokens, area, name in rows]
    return [
        f"- {len(grid)} settings of the grid, shortest responses and RM area: r = {found:.2f}",
        "",
        *chapter5.table(["setting", "shortest", "RM area"], cells),
    ]


def kl_section():
    """What the arms cost: the KL at the end, compared by nobody beforehand."""
    pairs = [("fixed", "token"), ("control", "token"), ("token-lam1", "token")]
    pairs += [("fixed", "control"), ("fixed-lam1", "token-lam1"), ("rloo", "fixed")]
    return paired("KL", kl_at_end, pairs)


def kl_at_end(rows):
    """The KL at the end of a run."""
    return chapter5.at_end(rows, "kl")


def ends_section():
    """What the first update praises: a row an estimator, means and deviations over the seeds."""
    path = RESULTS / "ends.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    low = chapter5.spread([row["too low"] for row in rows if "too low" in row], "mean")
    cells = {}
    for row in rows:
        if "estimator" in row:
            found = cells.setdefault((row["critic"], row["estimator"]), [])
            found.append((row["last 10"], row["others"]))
    table = []
    for names, found in cells.items():
        table.append([*names, *(chapter5.spread(x, "mean") for x in zip(*found, strict=True))])
    heads = ["critic", "credit", "last 10 tokens", "all others"]
    note = f"The critic is {low} too low. Mean whitened advantages of the first step's responses:"
    return [note, "", *chapter5.table(heads, table)]


def starts_section(part):
    """A section: critics that are changed, and what is left of the horizon's lead with them."""

    def section():
        changed = {name.rpartition("-")[0]: name for name in PARTS[part].settings}
        names = dict.fromkeys([*changed, *changed.values()])
        runs = kept_arms("toy", TEN, names)
        if not runs or len(runs["token"]) < 2:  # one seed has no interval
            return []
        leads = [(name, changed["token"]) for name in changed.values() if name != changed["token"]]
        pairs = [(changed["token"], "token"), *leads, (changed["control"], "control")]
        if "fixed" in changed:
            pairs.append((changed["fixed"], changed["control"]))
        lines = claims("toy", pairs)
        lines += paired("shortest responses", shortest, [(changed["token"], "token"), *leads])
        areas = {name: [rm_area(rows) for rows in found.values()] for name, found in runs.items()}
        for arm in changed:
            before, after = (
                [x - y for x, y in zip(areas[names[0]], areas[names[1]], strict=True)]
                for names in ((arm, "token"), (changed[arm], changed["token"]))
            )
            if arm != "token":
                said = chapter5.in_words(before, after, 0.1 * fmean(areas["token"]))
                what = f"({arm} - token) - ({changed[arm]} - {changed['token']})"
                lines.append(f"- {what}, RM area: {said}")
        return [*measured("toy", TEN, names, ALL), "", *lines]

    return section


def phases_section():
    """Differences in RM score early, in the middle and late; and at the same KL."""
    pairs = [("control", "token"), ("token-level", "token"), ("control-level", "token-level")]
    pairs += [("token-centred", "token"), ("control-centred", "token-centred")]
    pairs += [("token-shifted", "token"), ("control-shifted", "token-shifted")]
    pairs += [("control-flat", "token-flat")]
    lines = []
    for first, last in ((0, 9), (10, 19), (20, 59)):

        def mean(rows, part=slice(first, last + 1)):
            return chapter5.area(rows[part], "rm_score")

        lines += paired(f"RM score of steps {first} to {last}", mean, pairs)
    for nats in (4, 6, 8, 10):
        score = partial(score_at_kl, nats=nats)
        lines += paired(f"RM score at a KL of {nats}", score, [*pairs, ("fixed", "control")])
    return lines


def token_level_section():
    """What a longer horizon, and a taught critic, do to plain PPO: compared afterwards."""
    pairs = [("control", "token"), ("token-lam1", "token"), ("token-lam1", "control")]
    return claims("toy", [*pairs, ("token-taught", "token")])


def gold_on_the_way(rows):
    """Mean gold score of steps 10 to 29."""
    return chapter5.area(rows[10:30], "gold_score")


def pooling_section():
    """True quality on the way, on fresh seeds: whose value shall a macro action be given?"""
    table = measured("toy", FRESH, POOLING, ALL)
    if not table:
        return []
    pairs = [("fixed", "control"), ("fixed-first", "fixed"), ("fixed-first", "control")]
    pairs += [("fixed-last", "fixed"), ("control", "token"), ("fixed", "token")]
    lines = paired(GOLD_ON_THE_WAY, gold_on_the_way, pairs, seeds=FRESH)
    pairs = [("fixed", "token"), ("fixed", "control"), ("control", "token")]
    pairs += [("fixed-first", "fixed"), ("fixed-first", "control"), ("fixed-last", "fixed")]
    costs = paired("KL", kl_at_end, pairs[:3], seeds=FRESH)
    for nats in (6, 10):
        what = f"RM score at a KL of {nats}"
        costs += paired(what, partial(score_at_kl, nats=nats), pairs[1:2], seeds=FRESH)
    return [*table, "", *lines, "", *claims("toy", pairs, FRESH), "", *costs]


def on_the_way_section():
    """True quality on the way on the older seeds: where the difference was seen."""
    pairs = [("fixed", "control"), ("fixed-lam1", "token-lam1"), ("fixed", "token")]
    pairs += [("control", "token"), ("token-taught", "token"), ("fixed-taught", "token-taught")]
    lines = paired(GOLD_ON_THE_WAY, gold_on_the_way, pairs)
    three = [("fixed-first", "fixed"), ("fixed-last", "fixed")]
    three += [(arm, "control") for arm in ("fixed", "fixed-first", "fixed-last")]
    return lines + paired(GOLD_ON_THE_WAY, gold_on_the_way, three, seeds=THREE)


def first_candidate_section():
    """(c) with the critic that was taken before its pilots had been looked at."""
    table = measured("toy", TEN, {"token": "", **FOUR}, ALL)
    return [*table, "", *claims("toy", [("fixed-taught-4", "token-taught-4")])] if table else []


def code_section():
    """(a) and (b) on programs."""
    table = measured("toy-code", TEN, PLAIN, [*ALL, "pass rate"])
    pairs = [*CLAIMS[:3], ("control", "token")]  # the last was not planned
    return [*table, "", *claims("toy-code", pairs)] if table else []


def horizon_section():
    """The grid, and its picture."""
    arms = kept_arms("toy", THREE, n_and_lambda())
    # The baseline of each seed must come first.
    runs = [str(folder) for runs in arms.values() for folder in runs]
    runs.sort(key=lambda run: not run.endswith("/token"))
    png = str(FIGURES / "horizon.png")
    if not runs:
        return []
    return [*chapter5.horizon(chapter5.Options(run=runs, png=png)), "", *same_horizon(arms)]


def same_horizon(arms):
    """A line a horizon: the mean RM scores of all settings that have it.

    arms: {setting: {folder: rows}}.
    """
    areas = {}  # {horizon: a mean over the seeds, for each setting}
    for runs in arms.values():
        tokens = fmean(chapter5.reach_of(folder, rows).horizon for folder, rows in runs.items())
        mean = fmean(chapter5.area(rows, "rm_score") for rows in runs.values())
        areas.setdefault(round(tokens, 3), []).append(mean)  # 1 / (1 - .95) is not quite 20
    lines = []
    for tokens, found in sorted(areas.items()):
        name = f"{tokens:.0f} tokens" if tokens < math.inf else "∞"
        spread = f"{min(found):.2f} to {max(found):.2f}" if len(found) > 1 else f"{found[0]:.2f}"
        lines.append(f"- H = {name}, settings: {len(found)}, mean RM score {spread}")
    return lines


def exploratory(name):
    """A section with the table of one part, or of those settings that have been run by now."""

    def section():
        part = PARTS[name]
        folders = [RESULTS / part.folder / f"seed{seed}" for seed in part.seeds]
        folders = [folder for folder in folders if folder.exists()]
        made = [x for x in part.settings if all((y / x / "config.json").exists() for y in folders)]
        if 2 * len(made) < len(part.settings):
            return []  # nothing but what other parts share with it
        names = dict.fromkeys(["token", *made])  # the baseline of the steps to parity is first
        missing = len(part.settings) - len(made)
        note = [f"Settings that have not been run: {missing} of {len(part.settings)}.", ""]
        return (note if missing else []) + measured(part.folder, part.seeds, names, ALL)

    return section


def critic_section():
    """How the critic is taught, and what is left of the lead of `fixed` then."""
    lines = []
    for name in PARTS["critic"].settings:
        arm, _, how = name.partition("-")
        if how and arm == "token":
            pairs = [(name, "token"), (f"fixed-{how}", name)]
            lines += [line for line in claims("toy", pairs, THREE) if "RM area" in line]
    table = exploratory("critic")()
    return [*table, "", *lines] if table else []


def doubts_section():
    """What a sceptical reader asks of the toy's comparisons."""
    table = exploratory("doubts")()
    pairs = []
    for how in ("lr", "2epochs", "taught"):  # a doubled rate, two updates, the critic of (c)
        pairs += [(f"fixed-{how}", f"token-{how}"), (f"fixed-{how}", f"control-{how}")]
    lines = [line for line in claims("toy", pairs, THREE) if "RM area" in line]
    return [*table, "", *lines] if table else []


def good_section():
    """A critic that is taught hard; its runs are longer than the others."""
    table = exploratory("good")()
    if not table:
        return []
    pairs = [("token-good", "token"), ("fixed-good", "token-good")]
    lines = paired("RM score of the first 60 steps", rm_area, pairs, seeds=THREE)
    runs = kept_arms("toy", THREE, PARTS["good"].settings)
    every = [rows for found in runs.values() for rows in found.values()]
    known = [max(chapter5.smooth(chapter5.column(x, "explained_variance"))) for x in every]
    lines.append(f"- highest explained variance of five steps, of these runs: {max(known):.2f}")
    return [*table, "", *lines]


def lengths_section():
    """Three arms at three lengths: posts of 5, 12 and 24 facts."""
    made = [kept_arms(PARTS[name].folder, THREE, SHORT) for name in ("short", "long")]
    if not any(made):
        return []
    lines = []
    for name in ("short", "confirm", "long"):
        part = PARTS[name]
        arms = kept_arms(part.folder, THREE, SHORT)
        if arms:
            rows = [row for runs in arms.values() for rows in runs.values() for row in rows]
            tokens = fmean(row["response_length"] for row in rows)
            lines += [f"**{part.facts} facts**: {tokens:.0f} tokens a response in the mean.", ""]
            lines += [*measured(part.folder, THREE, SHORT, ALL), ""]
            pairs = [("fixed", "token"), ("control", "token"), ("fixed", "control")]
            lines += [*claims(part.folder, pairs, THREE), ""]
    return lines[:-1]


def credit_section():
    """The table that the part `credit` has left: it cannot be made without the models."""
    path = RESULTS / "credit.md"
    return path.read_text().splitlines() if path.exists() else []


SECTIONS = {
    "Confirmatory: ten seeds": confirm_section,
    "Confirmatory: programs": code_section,
    "Confirmatory: critics that start at the right level": level_section,
    "Confirmatory: critics that start flat": starts_section("flat"),
    "Confirmatory: values at the right level in every step": starts_section("centred"),
    "Confirmatory: the same, but not for the critic's targets": starts_section("shifted"),
    "Confirmatory: true quality on the way": pooling_section,
    "Exploratory: true quality on the way": on_the_way_section,
    "Exploratory: when the lead is won": lead_section,
    "Exploratory: early, in the middle, late": phases_section,
    "Exploratory: responses become shorter at first": shortening_section,
    "Exploratory: what the first update praises": ends_section,
    "Exploratory: a longer horizon at token level": token_level_section,
    "Exploratory: KL at the end": kl_section,
    "Exploratory: a critic taught by the first candidate": first_candidate_section,
    "Exploratory: n and λ": horizon_section,
    "Exploratory: terminations": exploratory("terminations"),
    "Exploratory: values of a macro action": exploratory("sigma"),
    "Exploratory: mean rewards, macro ratios": exploratory("variants"),
    "Exploratory: how the critic is taught": critic_section,
    "Exploratory: faster learning, and the taught critic, with the horizon alone": doubts_section,
    "Exploratory: a critic that is taught hard": good_section,
    "Exploratory: other lengths": lengths_section,
    "Credit against the truth": credit_section,
    "Pilots": exploratory("pilot"),
}


def main():
    """Run the parts named on the command line."""
    if sys.argv[1:] and sys.argv[1].partition("-")[0] in ("stages", "run"):
        child(sys.argv[1], sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part", nargs="+", choices=[*PARTS, "credit", "ends", "tables"], metavar="PART"
    )
    parser.add_argument("--out", default="runs/study", help="where runs are trained")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="print commands, run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    for name in args.part:
        if name == "tables":
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / "tables.md").write_text(tables())
        elif name == "credit":
            examine(args)
        elif name == "ends":
            praise_at_the_end(args)
        else:
            make(PARTS[name], args)


if __name__ == "__main__":
    main()
