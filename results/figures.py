"""The pictures of the study, from study.csv.

python results/figures.py     # draws study, long, horizon, level and readability.png in ../figures
"""

from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from measures import HERE, RUNS, STUDENT, smooth, values

COLOURS = {  # an arm has one colour in all pictures, and the colour-blind can tell them apart
    "token": "#0072B2",
    "fixed": "#D55E00",
    "control": "#009E73",
    "token-level": "#E69F00",
    "token-shifted": "#CC79A7",
    "token-warmed": "#56B4E9",
}
TOKENS_PER_ACTION = {1: "#cdb4ea", 2: "#9a63cf", 5: "#6a2fa3", 10: "#2f0a57"}
LAMBDAS = {0.9: "-lam.9", 0.95: "", 0.98: "-lam.98", 0.99: "-lam.99", 1: "-lam1"}
FAR = 8000  # tokens, where an endless horizon is drawn


def curves(column, arms, seeds, way=""):
    """{arm: [seeds, steps]}, smooth.  way: what is added to the names of the arms."""
    runs = {x: [RUNS["toy", x + way, seed][column] for seed in seeds] for x in arms}
    return {x: np.array([*map(smooth, found)]) for x, found in runs.items()}


def lines(ax, found, title):
    """Means over seeds with 95 % bands, named at their ends.  found: {arm: [seeds, steps]}"""
    for name, runs in found.items():
        middle = runs.mean(0)  # [steps]
        reach = STUDENT[len(runs)] * runs.std(0, ddof=1) / len(runs) ** 0.5  # [steps]
        ax.plot(middle, color=COLOURS[name], lw=2)
        band = np.arange(len(middle)), middle - reach, middle + reach
        ax.fill_between(*band, color=COLOURS[name], alpha=0.18, lw=0)
    height, place = np.ptp(ax.get_ylim()), -np.inf
    for name, runs in sorted(found.items(), key=lambda item: item[1][:, -1].mean()):
        place = max(runs[:, -1].mean(), place + 0.07 * height)  # no name on another
        ax.text(runs.shape[1], place, name, color=COLOURS[name], va="center", weight="bold")
    ax.set(title=title, xlabel="PPO step", xlim=(0, runs.shape[1] - 1))
    ax.spines[["top", "right"]].set_visible(False)


def two_panels(name, left, right):
    """A picture of two panels; each: curves, title."""
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 3.5), layout="constrained")
    lines(axes[0], *left)
    lines(axes[1], *right)
    save(figure, name)


def save(figure, name):
    """Write a picture 1,245 pixels wide, which looks sharp at 830."""
    figure.savefig(HERE.parent / "figures" / name, dpi=150)


def points(ax, reach, found, colour, **style):
    """Means and ranges of settings against their horizons.  found: [settings, seeds]"""
    middle = found.mean(1)
    ends = [middle - found.min(1), found.max(1) - middle]
    ax.errorbar(reach, middle, ends, color=colour, marker="o", elinewidth=1, **style)


def horizon():
    """RM area against H = n / (1 - λ)."""
    figure, ax = plt.subplots(figsize=(8.3, 4.2), layout="constrained")

    def area(arms):
        return np.array([values(arm, "RM area", "20-22") for arm in arms])

    for place, (n, colour) in enumerate(TOKENS_PER_ACTION.items()):
        arm = "token" if n == 1 else "fixed" if n == 5 else f"fixed-n{n}"
        found = area(arm + way for way in LAMBDAS.values())
        reach = [n / (1 - lam) for lam in LAMBDAS if lam < 1]
        points(ax, reach, found[:-1], colour, label=n)
        points(ax, [FAR * 1.1**place], found[-1:], colour)
    length = fmean(fmean(RUNS["toy", "whole", seed]["length"]) for seed in (20, 21, 22))
    points(ax, [length / (1 - 0.95)], area(["whole"]), "black", label="the whole response", ls="")
    for arm, reach in {"token": 20, "fixed": 100, "control": 1 / (1 - 0.95**0.2)}.items():
        found = area([arm])
        points(ax, [reach], found, COLOURS[arm], ms=11)
        x, up = {"token": (12, 0.1), "fixed": (106, -0.27), "control": (103, 0.27)}[arm]
        ax.text(x, found.mean() + up, arm, color=COLOURS[arm], weight="bold")
    ax.set(xscale="log", xlabel="effective horizon H = n / (1 − λ), tokens")
    ax.set_ylabel("RM area: mean RM score of 60 steps")
    ax.set_xticks([10, 100, 1000, 1.15 * FAR], ["10", "100", "1000", "∞"])
    ax.minorticks_off()
    ax.text(FAR / 2, ax.get_ylim()[0], "//", ha="center", va="center", backgroundcolor="white")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="tokens per action, n", loc="lower right", frameon=False, ncols=5)
    save(figure, "horizon.png")


def readability():
    """The real model's runs: a thin line a seed, a thick one for their mean."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
    panels = ["rm_score", "kl", "eos_rate", "explained_variance"]
    for ax, column in zip(axes, panels, strict=True):
        for arm in ("token", "token-warmed", "fixed", "control"):
            found = [x for x in RUNS if x[:2] == ("readability", arm)]
            runs = [smooth(RUNS[x][column]) for x in found]
            for run in runs:
                ax.plot(run, color=COLOURS[arm], lw=0.8, alpha=0.6)
            ax.plot(np.mean(runs, axis=0), color=COLOURS[arm], lw=2.5, label=arm)
        ax.set(title=column.replace("rm_score", "reward: −|grade − 3|"), xlabel="PPO step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    save(figure, "readability.png")


if __name__ == "__main__":
    twenty, arms = range(20, 40), ["token", "fixed", "control"]
    scores = curves("rm_score", arms, twenty), "RM score: what PPO raises"
    two_panels("study.png", scores, (curves("gold_score", arms, twenty), "gold score: the truth"))
    long = [curves(x, arms, range(40, 46), "-long") for x in ("rm_score", "gold_score")]
    two_panels("long.png", (long[0], "RM score, a quarter of the rate"), (long[1], "gold score"))
    ten, arms = range(20, 30), ["token", "control", "token-level", "token-shifted"]
    scores = curves("rm_score", arms, ten)
    ahead = {x: scores[x] - scores["token"] for x in arms[1:]}
    lengths = curves("length", arms, ten), "length of responses, tokens"
    two_panels("level.png", (ahead, "RM score ahead of token"), lengths)
    horizon()
    readability()
