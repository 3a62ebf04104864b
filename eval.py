"""Chapter 5: evaluation, or what the runs show.

A run of chapter 4 leaves `metrics.jsonl`, one line per step, written from the rollout before the update: line
k is the policy after k steps, on prompts that it has not seen before, as long as the PPO share lasts.

    python eval.py curves --run runs/toy/token runs/toy/fixed --png runs/toy/curves.png
    python ma_ppo.py --seed 0 --out runs/seed0    # likewise 1 and 2
    python eval.py seeds --run runs/seed0 runs/seed1 runs/seed2
    python eval.py heatmap --run runs/toy/token runs/toy/fixed --png runs/toy/heatmap.png

The paper's claim is about speed: the same reward in fewer steps. Its measure here is *steps to parity*.
Scores are smoothed over 5 steps; the target is the first run's start plus a share (50 % or 90 %) of its total
gain; a run's steps are the first step at which it reaches the target; and the figure is its steps / the first
run's steps, so less than 1 means faster.
"""

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

SMOOTHING = 5  # steps
PANELS = {  # metric: (title, unit)
    "rm_score": ("reward-model score", "score"),
    "gold_score": ("gold score (true quality)", "score"),
    "kl": ("KL to the reference", "nats per response"),
    "response_length": ("response length", "tokens"),
}


def read_run(folder):
    """One PPO run: (its name, [metrics of step 0, 1, ...]).  Ends the program where there is none."""
    return Path(folder).name, read_rows(folder, "metrics.jsonl", {"rm_score", "kl", "seconds"})


def read_rows(folder, name, keys):
    """The rows of a run's file `name`, which all have `keys`.  Ends the program where there is none."""
    path = Path(folder) / name
    if not path.is_file():
        fail(f"{folder}: no PPO run there ({name} is missing)")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    if not rows or any(not isinstance(row, dict) or not keys <= row.keys() for row in rows):
        fail(f"{path}: no steps of a PPO run in it, or lines of something else")
    return rows


def column(rows, key):
    """A metric's value at every step, or None where the run does not have it."""
    values = [row.get(key) for row in rows]
    return None if None in values else values


def smooth(values, width=SMOOTHING):
    """Mean over the last `width` steps, fewer at the beginning.

    >>> smooth([0.0, 2.0, 4.0], width=2)
    [0.0, 1.0, 3.0]
    """
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def steps_to(values, target):
    """The first step at which the smoothed values reach the target; None if they never do."""
    return next((step for step, value in enumerate(smooth(values)) if value >= target), None)


def parity(baseline, values, share):
    """Steps to parity: steps of `values` to the baseline's start + share of its gain, over the baseline's own
    steps.

    baseline, values: one score per step. Returns None where there is no gain to share or it is never reached.

    >>> parity(list(range(9)), list(range(0, 18, 2)), 0.5)  # smoothed: 0 .5 1 1.5 2 3 ..., 0 1 2 3 4 6 ...
    0.6
    """
    start, end = baseline[0], smooth(baseline)[-1]
    if end <= start:
        return None
    own, other = (steps_to(x, start + share * (end - start)) for x in (baseline, values))
    return None if not own or other is None else other / own


PARITIES = [f"{key} {share}" for key in ("RM", "gold") for share in ("50 %", "90 %")]


def figures(baseline, rows):
    """What a run comes to, None where there is no such figure.

    Smoothed at the end: RM score, gold score, gold gain in standard deviations of step 0's samples, KL and
    EOS rate; then four steps to parity and the median of seconds per step.
    """
    final = {key: smooth(values)[-1] for key in (*PANELS, "eos_rate") if (values := column(rows, key))}
    gain = None
    if final.get("gold_score") is not None and rows[0]["gold_score_std"] > 0:
        gain = (final["gold_score"] - rows[0]["gold_score"]) / rows[0]["gold_score_std"]
    ratios = [
        parity(base, mine, share) if (base := column(baseline, key)) and (mine := column(rows, key)) else None
        for key in ("rm_score", "gold_score")
        for share in (0.5, 0.9)
    ]
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return [
        final["rm_score"],
        final.get("gold_score"),
        gain,
        final["kl"],
        final["eos_rate"],
        *ratios,
        seconds,
    ]


def closing_table(runs):
    """The lines of a Markdown table with the `figures` of each run; the first one is the baseline."""
    heads = ["arm", "RM score", "gold score", "gold gain (SD)", "KL", "EOS rate", *PARITIES, "s/step"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in runs:
        cells = ["–" if x is None else f"{x:.2f}" for x in figures(runs[0][1], rows)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def seeds(args):
    """Print a Markdown table over seeds: median and range (--mean: mean ± s.d.) of each arm's figures."""
    heads = ["arm", "RM score", "gold score", "gold gain (SD)", "KL", "EOS rate", *PARITIES]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    baseline = [read_run(Path(folder) / args.arms[0])[1] for folder in args.run]
    for arm in args.arms:
        table = []
        for folder, base in zip(args.run, baseline, strict=True):
            table.append(figures(base, read_run(Path(folder) / arm)[1])[: len(heads) - 1])
        print(f"| {arm} | " + " | ".join(spread(x, args.mean) for x in zip(*table, strict=True)) + " |")


def spread(values, mean=False):
    """Median and range of one figure over seeds; a target never reached counts as infinitely slow.

    With `mean`, mean ± standard deviation over seeds instead.

    >>> spread([1.0, None, 3.0]), spread([1.0, 3.0], mean=True)
    ('3.00 (1.00 to inf)', '2.00 ± 1.41')
    """
    if all(value is None for value in values):
        return "–"
    ordered = sorted(float("inf") if value is None else value for value in values)
    if mean and ordered[-1] < float("inf"):
        deviation = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
        return f"{statistics.mean(ordered):.2f} ± {deviation:.2f}"
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return f"{middle:.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def curves(args):
    """Draw the learning curves of the runs side by side, and print the closing table."""
    runs = [read_run(folder) for folder in args.run]
    panels = [key for key in PANELS if all(column(rows, key) for _, rows in runs)]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, key in zip(axes, panels, strict=True):
        for i, (name, rows) in enumerate(runs):
            values = column(rows, key)
            ax.plot(values, color=f"C{i}", alpha=0.25, linewidth=1)
            ax.plot(smooth(values), color=f"C{i}", linewidth=2, label=name)
        title, unit = PANELS[key]
        ax.set(title=title, xlabel="PPO steps", ylabel=unit)
        ax.grid(alpha=0.3)
    axes[0].legend(title=f"mean of {SMOOTHING} steps")
    save(figure, args.png)
    print("\n".join(closing_table(runs)))


def save(figure, path):
    """Write a picture, and its folder if need be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(action="ignore"):  # a character that the font lacks is drawn as a box
            figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=110)
    except (OSError, ValueError) as error:
        fail(f"cannot write {path}: {error}")
    print(f"wrote {path}")


def read_sample(folder, step, number):
    """Response `number` of those that a run kept in samples.jsonl at `step`, with its credit per token."""
    credit = {"pieces", "seg", "values", "advantages", "returns"}
    rows = [row for row in read_rows(folder, "samples.jsonl", credit | {"step"}) if row["step"] == step]
    if not 0 <= number < len(rows):
        fail(f"{folder}: no sample {number} of step {step}; kept are four of every tenth step")
    row = rows[number]
    if not all(isinstance(row[key], list) and len(row[key]) == len(row["seg"]) > 0 for key in credit):
        fail(f"{folder}: sample {number} of step {step} is damaged: its lists are not one entry a token")
    return row


def heatmap(args):
    """Draw one response per run: its tokens coloured by advantage, its values and returns.

    Before the first update all arms have sampled the same responses, and the critics agree: what differs at
    step 0 is credit assignment alone.
    """
    from matplotlib.figure import Figure

    samples = [read_sample(folder, args.step, args.sample) for folder in args.run]
    limit = max(abs(a) for sample in samples for a in sample["advantages"]) or 1.0
    layouts = [lay_out(sample["pieces"]) for sample in samples]
    heights = [x for cells in layouts for x in (0.25 * (cells[-1][0] + 1), 1.6)]  # inches
    figure = Figure(figsize=(10, sum(heights) + 1.0 * len(samples)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    for i, (folder, sample, cells) in enumerate(zip(args.run, samples, layouts, strict=True)):
        draw_tokens(axes[2 * i], sample, cells, limit)
        axes[2 * i].set_title(f"{Path(folder).name}: {max(sample['seg']) + 1} macro actions", loc="left")
        draw_values(axes[2 * i + 1], sample)
    save(figure, args.png)


PAGE = 100  # characters in a line of the heatmap


def lay_out(pieces):
    """Break tokens into lines of at most PAGE characters.  Returns [(line, column, text)], one a token."""
    cells, line, column = [], 0, 0
    for piece in pieces:
        shown = piece.replace("\n", "⏎") or "∎"  # ∎: a token that writes nothing, usually the EOS
        if column + len(shown) > PAGE and column:
            line, column = line + 1, 0
        cells.append((line, column, shown))
        column += len(shown)
    return cells


def draw_tokens(ax, sample, cells, limit):
    """The response: red tokens have negative advantages, blue ones positive; bars begin macro actions."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    ax.set(xlim=(0, PAGE), ylim=(cells[-1][0] + 1, 0))
    ax.axis("off")
    for t, (line, column, text) in enumerate(cells):
        colour = colormaps["RdBu"](0.5 + 0.45 * sample["advantages"][t] / limit)
        ax.add_patch(Rectangle((column, line + 0.08), len(text), 0.84, color=colour, linewidth=0))
        ink = "white" if abs(sample["advantages"][t]) > 0.7 * limit else "black"
        font = {"color": ink, "family": "monospace", "fontsize": 9.3, "parse_math": False}
        ax.text(column, line + 0.52, text, va="center", **font)
        if t == 0 or sample["seg"][t] != sample["seg"][t - 1]:
            ax.plot([column, column], [line + 0.08, line + 0.92], color="black", linewidth=1.5)


def draw_values(ax, sample):
    """The critic's values and the returns that they regress on, with the macro actions' boundaries."""
    for t in range(1, len(sample["seg"])):
        if sample["seg"][t] != sample["seg"][t - 1]:
            ax.axvline(t - 0.5, color="0.85", linewidth=0.8)
    ax.plot(sample["values"], color="C0", label="value V(s)")
    ax.step(range(len(sample["returns"])), sample["returns"], where="mid", color="C3", label="return")
    ax.set(xlim=(-0.5, len(sample["seg"]) - 0.5), xlabel="response token", ylabel="reward")
    ax.legend(loc="upper left", ncols=2, frameon=False)


def fail(message):
    """End the program with one line for the person at the keyboard and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    """Run the subcommand named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "curves", help="learning curves and steps to parity; the first run is the baseline"
    )
    sub.error = fail
    sub.add_argument("--run", nargs="+", required=True, help="folders that ma_ppo.py wrote, one an arm")
    sub.add_argument("--png", required=True, help="picture to write")
    sub = commands.add_parser(
        "seeds", help="a table over seeds: medians and ranges; the first arm is the baseline"
    )
    sub.error = fail
    sub.add_argument("--run", nargs="+", required=True, help="--out folders of ma_ppo.py, one a seed")
    sub.add_argument("--arms", nargs="+", default=["token", "fixed"], help="arms (default: token fixed)")
    sub.add_argument("--mean", action="store_true", help="mean ± standard deviation, not median (range)")
    sub = commands.add_parser("heatmap", help="one response per run, its tokens coloured by advantage")
    sub.error = fail
    sub.add_argument("--run", nargs="+", required=True, help="folders that ma_ppo.py wrote, one an arm")
    sub.add_argument("--png", required=True, help="picture to write")
    sub.add_argument("--step", type=int, default=0, help="PPO step (default: 0, where all arms agree)")
    sub.add_argument("--sample", type=int, default=0, help="which sample of that step (default: 0)")
    args = parser.parse_args(argv)
    {"curves": curves, "seeds": seeds, "heatmap": heatmap}[args.command](args)


if __name__ == "__main__":
    main()
