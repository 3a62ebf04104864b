"""All tables of README.md, and the numbers of its sentences, from the small files beside this one.

    python results/tables.py

study.csv has a row a PPO step, arms.csv says how an arm's runs were made, plan.csv what was
compared, and expected, before the runs were made, tables.csv what else is shown. Brackets: 95 %
intervals of paired differences.
"""

import re
from itertools import groupby
from statistics import fmean, median, stdev

from measures import RUNS, STUDENT, interval, made, read, share_left, smooth, steps, values, verdict

MARGIN = 0.20  # RM area: a quarter of control's lead over token, on the twenty seeds


def show(title, heads, rows):
    """Print a table as Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    print(f"\n**{title}**\n\n" + "\n".join(f"| {' | '.join(map(str, x))} |" for x in lines))


def cell(names, *where):
    """The mean of an arm, or a difference with its interval."""
    if " - " not in names:
        return f"{fmean(values(names, *where)):.2f}".replace("-", "−")
    return "{:+.2f} [{:.2f}, {:.2f}]".format(*interval(names, *where)).replace("-", "−")


def named(text):
    """ "label | name" -> label, name; a name alone is its label, too."""
    label, _, name = text.rpartition("|")
    return (label or name).partition("@")[0].strip(), name.strip()


def table(spec):
    """A line of tables.csv: rows "label | name @seeds @task", columns "label | * - *: measure".

    The name takes the place of * in the columns, which may have "@seeds", too.
    """
    columns = [named(x) for x in spec["columns"].split("; ")]
    rows = []
    for label, row in map(named, spec["rows"].split("; ")):
        name, *where = (x.strip() for x in row.split("@"))
        seeds = where[0] if where else spec["seeds"]
        task = where[1] if len(where) > 1 else spec["task"]
        cells = []
        for _, column in columns:
            names, what, *other = re.split(": | @", column.replace("*", name))
            cells.append(cell(names, what, *other or [seeds], task))
        rows.append([label, seeds, *cells])
    show(spec["title"], ["", "seeds", *(x.removeprefix("*: ") for x, _ in columns)], rows)


def planned(title, rows):
    """Verdicts with the margin of then, a tenth of the baseline's mean, and with today's."""
    lines = []
    for row in rows:
        names, where = row["difference"], (row["measure"], row["seeds"], row["task"])
        _, low, high = interval(names, *where)
        then = 0.1 * fmean(values(names.split(" - ")[1], *where))
        said = f"{verdict(low, high, then)} (±{then:.2f})"
        today = verdict(low, high, MARGIN) if where[::2] == ("RM area", "toy") else "–"
        first = row["letter"], names, where[1], where[0], row["expected"]
        lines.append([*first, cell(names, *where), said, today])
    heads = ["", "difference", "seeds", "measure", "expected", "found", "margin of then", "±0.20"]
    show(title, heads, lines)


def margin_of(measure, task):
    """How large a difference counts as none, in the plan for seeds 40 to 49."""
    if measure.startswith(("steps", "lowest")):
        return 0.1
    return 0.5 if task == "readability" else MARGIN


def registered(title, rows):
    """Verdicts with the one margin that was stated beforehand."""
    lines = []
    for row in rows:
        names, where = row["difference"], (row["measure"], row["seeds"], row["task"])
        first = row["letter"], names, where[1], where[0], row["expected"]
        if not made(names, *where[1:]):
            lines.append([*first, "not run yet", "–"])
            continue
        margin = margin_of(where[0], where[2])
        said = f"{verdict(*interval(names, *where)[1:], margin)} (±{margin:.2f})"
        lines.append([*first, cell(names, *where), said])
    heads = ["", "difference", "seeds", "measure", "expected", "found", "which is"]
    show(title, heads, lines)


def averages(title, name, keys, columns, chosen=lambda row: True):
    """Means of those rows of a small file that have the same keys."""
    groups = {}
    for row in filter(chosen, read(name)):
        numbers = [float(row[column] or "nan") for column in columns]
        groups.setdefault(tuple(row[key] for key in keys), []).append(numbers)
    means = {x: map(fmean, zip(*found, strict=True)) for x, found in groups.items()}
    show(
        title, [*keys, *columns], [[*x, *(f"{y:.3g}" for y in found)] for x, found in means.items()]
    )


def curve(arm):
    """The RM score of an arm, averaged over the twenty seeds."""
    runs = [RUNS["toy", arm, seed]["rm_score"] for seed in range(20, 40)]
    return {"rm_score": list(map(fmean, zip(*runs, strict=True)))}


def sentences():
    """Numbers that stand in no table."""
    rows = []
    for arm in ("fixed", "control"):
        for share in (50, 80, 90):
            taken = fmean(values(arm, f"steps to {share} %", "20-39"))
            rows.append([f"{arm}: times as fast as token to {share} %", f"{1 / taken:.2f}"])
        mean = curve(arm), curve("token")
        rows.append(
            [f"{arm}: times as fast to 95 %, curves averaged", f"{1 / steps(0.95)(*mean):.2f}"]
        )
        for share in (50, 90):
            taken = median(values(arm, f"steps to {share} %", "0-4", "toy-code"))
            rows.append([f"{arm}, programs, seeds 0-4: median steps to {share} %", f"{taken:.2f}"])
    for step in (0, 10):
        found = [smooth(RUNS["toy", "token", seed]["length"])[step] for seed in range(20, 40)]
        rows.append([f"token: length at step {step}, tokens", f"{fmean(found):.0f}"])
    kept = [
        fmean(values(x, "RM area", "20-39") - values("token", "RM area", "20-39"))
        for x in ("fixed", "control")
    ]
    rows.append(["fixed: share of the lead of control, %", f"{100 * kept[0] / kept[1]:.0f}"])
    for arm in ("fixed", "control"):
        for way in ("sft", "warmed"):
            lead, rest = f"{arm} - token", f"{arm}-{way} - token-{way}"
            if made(f"{lead} - {rest}", "40-49"):
                said = "{:.2f} [{:.2f}, {:.2f}]".format(*share_left(lead, rest, "40-49"))
                rows.append([f"share of the lead of {arm} that is left, {way}", said])
    d = []  # what the critic's ten steps cost: the first thirty of forty, against token's thirty
    for seed in (1, 2, 3):
        run = "readability", "token-warmed", str(seed)
        found = [x for x in read("study.csv") if (x["task"], x["arm"], x["seed"]) == run]
        scores = [float(x["rm_score"]) for x in found][:30]
        d.append(fmean(scores) - fmean(RUNS["readability", "token", seed]["rm_score"]))
    reach = STUDENT[3] * stdev(d) / 3**0.5
    said = f"{fmean(d):+.2f} [{fmean(d) - reach:.2f}, {fmean(d) + reach:.2f}]"
    rows.append(["real model: token-warmed - token, its ten steps counted", said])
    rows.append(["runs in study.csv", len(RUNS)])
    known = [fmean(run["explained_variance"]) for run in RUNS.values()]
    rows.append(["highest explained variance of a run, its mean", f"{max(known):.2f}"])
    show("In sentences", ["", ""], rows)


if __name__ == "__main__":
    for spec in read("tables.csv"):
        table(spec)
    for title, rows in groupby(read("plan.csv"), key=lambda row: row["table"]):
        how = planned if title in ("headline", "programs", "others") else registered
        how(f"Registered: {title}", rows)
    sentences()
    averages(
        "SFT and RM", "stages.csv", ["task"], ["sft_loss", "rm_accuracy_noiseless", "rm_spread"]
    )
    praise = ["too low by", "last 10 tokens", "all others"]
    averages("What the first update praises", "ends.csv", ["critic", "estimator"], praise)
    beside = ["ours", "TRL", "ours / TRL"]
    averages("A step", "bench.jsonl", ["part", "size"], beside, lambda x: "trl" in x["part"])
    speeds = [f"{x} / matmul" for x in ("sample", "judge", "update")]
    averages("Phases", "bench.jsonl", ["size"], speeds, lambda x: x["part"] == "phases")
    show("Credit and the truth", read("credit.csv")[0], [x.values() for x in read("credit.csv")])
