"""The runs of the study, what is measured of them, and differences between arms.

A difference is taken seed by seed: arms of one seed share the SFT model and the reward model.
"""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
COLUMNS = ["rm_score", "gold_score", "kl", "length", "explained_variance"]
COLUMNS += ["eos_rate", "ref_surprise"]  # not kept of the older runs
STUDENT = {
    3: 4.3027,
    4: 3.1824,
    6: 2.5706,
    10: 2.2622,
    20: 2.0930,
}  # seeds -> 97.5 % quantile of Student's t


def read(name):
    """The rows of a file of this folder, as dicts."""
    with (HERE / name).open() as file:
        return list(csv.DictReader(file)) if name.endswith("csv") else list(map(json.loads, file))


def read_runs():
    """{(task, arm, seed): {column: [a value a step]}}, of steps in which the policy learns."""
    alone = {}  # how many steps come before these, in which only the critic does
    for row in read("arms.csv"):
        found = re.search(r"--critic_steps (\d+)", row["flags"])
        alone[row["task"], row["arm"]] = int(found[1]) if found else 0
    runs = defaultdict(lambda: defaultdict(list))
    for row in read("study.csv"):
        task, arm, seed = row["task"], row["arm"], int(row["seed"])
        if int(row["step"]) >= alone.get((task, arm), 0):
            for column in COLUMNS:
                runs[task, arm, seed][column].append(float(row[column] or "nan"))
    return runs


RUNS = read_runs()


def smooth(values):
    """Mean of the last five steps, of fewer at the beginning."""
    return np.array([fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))])


# Measures: functions of a run, and of the run of `token` that has the same seed.


def mean(column, first=0, last=None):
    """Over steps: the area under the learning curve, divided by its width."""
    return lambda run, token: fmean(run[column][first:last])


def steps(share):
    """Steps to a share of the gain of `token`, over those that `token` took itself."""

    def measure(run, token):
        start, end = token["rm_score"][0], fmean(token["rm_score"][-5:])
        target = start + share * (end - start)
        there, own = (smooth(x["rm_score"]) >= target for x in (run, token))
        taken = np.argmax(there) if there.any() else len(there)  # never: it counts as the last
        return taken / np.argmax(own)

    return measure


def at_kl(column, nats):
    """A column where the KL first reaches so many nats, both smooth."""

    def measure(run, token):
        there = smooth(run["kl"]) >= nats
        return smooth(run[column])[np.argmax(there)] if there.any() else np.nan

    return measure


def objective(run, token):
    """What PPO is after: the reward, less the KL penalty (beta = .05)."""
    return fmean(run["rm_score"]) - 0.05 * fmean(run["kl"])


MEASURES = {
    "RM area": mean("rm_score"),
    "RM − β KL": objective,
    "RM 0–29": mean("rm_score", 0, 30),
    "RM 30–59": mean("rm_score", 30),
    "RM 0–59": mean("rm_score", 0, 60),
    "RM end": mean("rm_score", -5),
    "RM 220–239": mean("rm_score", 220, 240),
    "gold area": mean("gold_score"),
    "gold 10–29": mean("gold_score", 10, 30),
    "gold 30–59": mean("gold_score", 30),
    "gold 220–239": mean("gold_score", 220, 240),
    "gold end": mean("gold_score", -5),
    "KL end": mean("kl", -5),
    "EOS rate end": mean("eos_rate", -5),
    "EOS rate 0": mean("eos_rate", 0, 1),
    "lowest EOS rate": lambda run, token: min(smooth(run["eos_rate"])),
    "lowest EOS rate of five": lambda run, token: min(smooth(run["eos_rate"])[4:]),
    "gain": lambda run, token: fmean(run["rm_score"][-5:]) - run["rm_score"][0],
    "ref_surprise end": mean("ref_surprise", -5),
    "length end": mean("length", -5),
    "explained variance": mean("explained_variance"),
    "explained variance end": mean("explained_variance", -5),
    "shortest": lambda run, token: min(smooth(run["length"])),
    **{f"steps to {share} %": steps(share / 100) for share in (50, 80, 90)},
    **{f"gold at {nats} nats": at_kl("gold_score", nats) for nats in (6, 8, 10)},
    **{f"RM at {nats} nats": at_kl("rm_score", nats) for nats in (4, 6, 10)},
}


def numbers(seeds):
    """ "0-1 10-11" -> [0, 1, 10, 11]"""
    ends = [map(int, part.split("-")) for part in seeds.split()]
    return [seed for first, last in ends for seed in range(first, last + 1)]


def made(names, seeds, task="toy"):
    """Whether all runs of a difference are in study.csv."""
    arms = re.sub("[()]", "", names).split(" - ")
    return all((task, x, seed) in RUNS for x in arms for seed in numbers(seeds))


def values(arm, what, seeds, task="toy"):
    """A measure of an arm, a number a seed; seeds: "20-39"."""
    pairs = [[RUNS[task, x, seed] for x in (arm, "token")] for seed in numbers(seeds)]
    return np.array([MEASURES[what](*pair) for pair in pairs])


def interval(names, what, seeds, task="toy"):
    """names: "a - b", or "a - b - (c - d)" -> mean difference, both ends of its 95 % interval."""
    found = [values(x, what, seeds, task) for x in re.sub("[()]", "", names).split(" - ")]
    d = found[0] - found[1] - (found[2] - found[3] if len(found) == 4 else 0)
    reach = STUDENT[len(d)] * stdev(d) / len(d) ** 0.5
    return fmean(d), fmean(d) - reach, fmean(d) + reach


def share_left(lead, rest, seeds):
    """How much of one lead another is, with its 95 % interval (Fieller).  Names as in `interval`.

    The interval holds the shares s for which `rest` - s x `lead` cannot be told from 0.
    """
    found = []
    for names in (lead, rest):
        a, b = (values(x, "RM area", seeds) for x in names.split(" - "))
        found.append(a - b)
    lead, rest = found
    possible = []
    for share in np.linspace(-3, 5, 80001):
        d = rest - share * lead
        if abs(fmean(d)) <= STUDENT[len(d)] * stdev(d) / len(d) ** 0.5:
            possible.append(share)
    return fmean(rest) / fmean(lead), min(possible), max(possible)


def verdict(low, high, margin):
    """What an interval lets one say."""
    said = ["ahead"] if low > 0 else ["behind"] if high < 0 else []
    said += ["equivalent"] if -margin < low and high < margin else []
    return ", ".join(said) or "cannot tell"
