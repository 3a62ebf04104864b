"""Chapter 5: evaluation, or what the runs show.

A run of chapter 4 leaves two things: `metrics.jsonl`, one line a PPO step, and its final policy.
This chapter reads the first and draws samples from the second, on prompts that training never saw.

The paper's claim is about speed. So the measure is *steps to parity*: a target on the way of the
baseline's score, and how soon another run gets there:

    target = start + share * (end - start)                    of the baseline, the first run named
    parity = steps of this run to the target / steps of the baseline to it        0.5: twice as fast

    python eval.py report runs/toy                            # most of it: runs/toy/report.md
    python eval.py curves --run runs/toy --png curves.png     # while training runs, too
    python eval.py seeds --run runs/seed* --arms token fixed control      # with paired differences
    python eval.py heatmap --run runs/toy/token runs/toy/fixed --png heatmap.png
    python eval.py score --run runs/toy-code --sft            # held-out pass rates; Appendix A
    python eval.py duel --a runs/toy/fixed --b runs/toy/token --judge rm gold         # Appendix B
    python eval.py credit --run runs/toy/fixed --png credit.png                       # Appendix C
    python eval.py horizon --run runs/toy runs/lam1 --png horizon.png                 # Appendix D

The story: metrics, smoothing, steps to parity, the measures of a run, learning curves, several
seeds, the credit heatmap, `main`. You may stop reading there.
Appendix A: samples on held-out prompts (score, bestofn, passk). B: judges and duels.
C: credit against the truth. D: the horizon. E: the frontier of score and KL; the report.
F: intervals. G: drawing. H: the command line.
"""

import inspect
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm
from transformers import HfArgumentParser

import ma_ppo
import reward
import sft
from sft import fail, opt

SMOOTHING = 5  # steps; one step's score is the mean of a batch and jumps about
SCORES = {"rm_score": "RM score", "gold_score": "gold score"}
PANELS = {  # what `curves` shows beside the scores: a panel for each that all runs have
    "pass_rate": "pass rate",
    "kl": "KL to reference, nats",
    "response_length": "length, tokens",
}


# Metrics. A run is a list of rows, one dict a PPO step; a metric is a column of it.


def read_rows(path, keys=()):
    """The rows of a .jsonl file, a dict each; [] where there is no such file.

    keys: what every row must have. A file of anything else is an error.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        # No line break follows the last piece: it is empty, or being written at this moment.
        rows = [json.loads(line.decode()) for line in lines[:-1]]
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read: {error}")
    for row in rows:
        if not isinstance(row, dict) or not set(keys) <= row.keys():
            fail(f"{path}: lines of something else in it, expected {', '.join(sorted(keys))}")
    return rows


def read_metrics(folder):
    """The rows of a PPO run, one a step."""
    path = Path(folder) / "metrics.jsonl"
    rows = read_rows(path, {"rm_score", "kl", "seconds"})
    if not rows:
        fail(f"{path}: no PPO run there")
    for key in USED:
        # null is fine: the task does not have the metric, or the number was not finite.
        if not all(isinstance(row.get(key), int | float | None) for row in rows):
            fail(f"{path}: {key} is not a number")
    return rows


def column(rows, key):
    """A metric's value at every step, or None where the run does not have it."""
    values = [row.get(key) for row in rows]
    return None if None in values else values


def smooth(values, width=SMOOTHING):
    """Mean over the last `width` steps, fewer at the beginning.  It never looks ahead.

    >>> smooth([0, 0, 0, 10, 10])
    [0.0, 0.0, 0.0, 2.5, 4.0]
    """
    means = []
    for i in range(len(values)):
        # Not a centred mean: that would know the future, and let a run arrive before it has.
        first = max(0, i + 1 - width)
        means.append(fmean(values[first : i + 1]))
    return means


# Steps to parity.


def first_step(values, target):
    """The first step at which the values are at `target` or above; None if they never are."""
    for step, value in enumerate(values):
        if value >= target:
            return step
    return None


def parity(baseline, values, share):
    """Steps that `values` need to a target, over those that `baseline` itself needs.

    The target: the baseline's start + `share` of its gain. The baseline below rises from 0 to 10
    at step 5, the other run at step 2. Smoothed over five steps:

        step        0    1    2    3    4    5    6    7    8    9
        baseline    0    0    0    0    0    2    4    6    8   10     5 is passed at step 7
        other run   0    0  3.3    5    6    8   10   10   10   10     5 is reached at step 3

    >>> baseline, other = [0] * 5 + [10] * 10, [0] * 2 + [10] * 13
    >>> parity(baseline, other, share=0.5) == 3 / 7
    True

    None if the baseline gains nothing, or is at the target from the start (nothing to divide by),
    or if the other run never gets there.
    """
    start = baseline[0]  # both runs start from the same models, so this is the start of both
    end = smooth(baseline)[-1]  # smoothed, or one lucky batch at the end would move the target
    target = start + share * (end - start)
    own = first_step(smooth(baseline), target)
    other = first_step(smooth(values), target)
    if end <= start or not own or other is None:  # `not own`: None, or step 0
        return None
    return other / own


# The measures of a run: a dict {name: value}, None where the run has no such value. The RM score is
# what training pushes up. Whether it still means anything, only the gold score can tell, on tasks
# that have one. KL is the price: how far the policy has moved from where it started.


def at_end(rows, key):
    """A metric at the end of training, smoothed."""
    values = column(rows, key)
    return smooth(values)[-1] if values else None


def area(rows, key):
    """Mean over all steps, or the area under the curve: parity looks at one point, this at all."""
    values = column(rows, key)
    return fmean(values) if values else None


def gold_gain(rows):
    """Gain of the gold score, in standard deviations of the responses of the first step."""
    end = at_end(rows, "gold_score")
    spread = rows[0].get("gold_score_std")
    if end is None or not spread:
        return None
    return (end - rows[0]["gold_score"]) / spread


def parity_of(baseline, rows, key, share):
    """Steps to parity in one metric."""
    columns = [column(baseline, key), column(rows, key)]
    return None if None in columns else parity(*columns, share)


def typical_seconds(rows):
    """The median of the seconds a step: the first step is slower, and says little."""
    seconds = column(rows, "seconds")
    return sorted(seconds)[len(seconds) // 2] if seconds else None


# Each takes the rows of the baseline and of the run. "RM" stands for what was trained on.
MEASURES = {
    "RM score": lambda baseline, rows: at_end(rows, "rm_score"),
    "gold score": lambda baseline, rows: at_end(rows, "gold_score"),
    "gold gain (SD)": lambda baseline, rows: gold_gain(rows),
    "KL": lambda baseline, rows: at_end(rows, "kl"),
    "EOS rate": lambda baseline, rows: at_end(rows, "eos_rate"),
    "RM 50 %": lambda baseline, rows: parity_of(baseline, rows, "rm_score", 0.5),
    "RM 90 %": lambda baseline, rows: parity_of(baseline, rows, "rm_score", 0.9),
    "gold 50 %": lambda baseline, rows: parity_of(baseline, rows, "gold_score", 0.5),
    "gold 90 %": lambda baseline, rows: parity_of(baseline, rows, "gold_score", 0.9),
    "s/step": lambda baseline, rows: typical_seconds(rows),
    "RM area": lambda baseline, rows: area(rows, "rm_score"),
    "gold area": lambda baseline, rows: area(rows, "gold_score"),
    "pass rate": lambda baseline, rows: at_end(rows, "pass_rate"),
    "explained variance": lambda baseline, rows: area(rows, "explained_variance"),
}
ENDS = ["RM score", "gold score", "gold gain (SD)", "KL", "EOS rate"]
PARITIES = ["RM 50 %", "RM 90 %", "gold 50 %", "gold 90 %"]
AREAS = ["RM area", "gold area"]
COMPARED = ["RM score", "gold score", "pass rate", *AREAS, *PARITIES]  # seed by seed
# The metrics behind the measures and the panels.
USED = [*SCORES, *PANELS, "gold_score_std", "eos_rate", "seconds"]


# Learning curves: a panel for each metric, a line for each arm, and the measures as a table.
# `arms` is {arm: {run folder: rows}}, where an arm has one run a seed; the first is the baseline.


def curves(args):
    """Learning curves in training, steps to parity with the first arm, areas under the curves."""
    arms = read_arms(args.run, args.arms)
    names = score_names(arms)

    # Pictures: only what all runs have. RM and gold score part company where the RM is fooled.
    panels = []
    for key, label in (names | PANELS).items():
        lines = curve_lines(arms, key)
        if lines:
            panels.append(Panel(label, "PPO steps", lines))
    plot(args.png, panels, f"mean of {SMOOTHING} steps")

    # Numbers. Arms of one seed each have no spread: one table. Seeds add a second one.
    compared = compare(arms)
    more = ["pass rate"] if smoothed(arms, "pass_rate") else []
    if all(len(runs) == 1 for runs in arms.values()):
        columns = [*ENDS, *PARITIES, "s/step", *more]
        tables = measures_table(compared, columns, "range", names)
    else:
        how = "mean" if args.mean else "range"
        tables = measures_table(compared, [*ENDS, *PARITIES, *more], how, names)
        tables.append("")
        tables += measures_table(compared, [*PARITIES, *AREAS], "bootstrap", names)
        tables += ["", *differences(arms, compared, names, args)]
    return still_going(arms) + tables


def smoothed(arms, key):
    """{arm: a smoothed metric, array [steps, seeds]}; {} where a run does not have the metric."""
    found = {}
    for arm, runs in arms.items():
        seeds = [column(rows, key) for rows in runs.values()]
        if None in seeds:
            return {}
        steps = min(len(values) for values in seeds)  # all seeds have got so far
        found[arm] = np.stack([smooth(values)[:steps] for values in seeds], axis=1)
    return found


def curve_lines(arms, key):
    """The lines of one panel: the mean over seeds, in a band from the lowest to the highest one."""
    lines = []
    for arm, y in smoothed(arms, key).items():
        line = Line(arm, range(len(y)), y.mean(1))
        if y.shape[1] == 1:
            (rows,) = arms[arm].values()
            line.raw = column(rows, key)  # of one seed the unsmoothed values can be shown, too
        else:
            line.low, line.high = y.min(1), y.max(1)
        lines.append(line)
    return lines


def score_names(arms):
    """What the scores are called: programs are scored by their unit tests, not by an RM."""
    if not smoothed(arms, "pass_rate"):
        return SCORES
    return SCORES | {"rm_score": "score of the unit tests"}


def measures_table(compared, columns, how, names):
    """The lines of a table: a row an arm, a column a measure."""
    heads = [called(name, names) for name in columns]
    rows = []
    for arm, seeds in compared.items():
        cells = [spread([found[name] for found in seeds], how) for name in columns]
        rows.append([arm, *cells])
    return table(["arm", *heads], rows)


def called(name, names):
    """What a measure is called where unit tests take the RM's place."""
    if names == SCORES:
        return name
    return name.replace("RM score", names["rm_score"]).replace("RM", "tests")


# Several seeds. Every seed of an arm is compared with the *same* seed of the baseline: both have
# started from the same models and read the same prompts, so what the seed brings cancels out. That
# is why the differences, d = arm - baseline of each seed, say more than two ranges side by side:
#
#     seed                  0      1      2      3      4
#     token               3.9    4.6    5.1    4.2    4.4
#     fixed               4.3    5.1    5.4    4.8    4.7     the ranges overlap,
#     d                    .4     .5     .3     .6     .3     but every seed says the same
#
#     mean d = .42, and an interval, .26 to .58, that holds the effect in 95 of 100 such studies
#     p: if the arm changed nothing, each d could as well have had the other sign. Of the 2^5
#        choices of signs, 2 have a sum as far from 0 as the one found: p = 2 / 32 = .06, the least
#
# No difference found is none shown: with two noisy seeds nothing ever differs. To say that two arms
# are *equivalent*, the whole interval must lie within a margin, and one that was stated beforehand.

ENOUGH_SEEDS = 8  # of 5 seeds that all agree, p is .06; of 8, .008


def compare(arms):
    """{arm: [{measure: value} of each seed]}, each against the baseline's run of the same seed."""
    baselines = next(iter(arms.values())).values()
    compared = {}
    for arm, runs in arms.items():
        compared[arm] = []
        for baseline, rows in zip(baselines, runs.values(), strict=True):
            found = {name: measure(baseline, rows) for name, measure in MEASURES.items()}
            compared[arm].append(found)
    return compared


def spread(values, how="range"):
    """One measure over the seeds, as text: median (range), median [bootstrap], or mean ± s.d.

    None stands for a target that was never reached, and so counts as infinitely many steps.
    """
    ordered = sorted(math.inf if value is None else value for value in values)
    if len(values) == 1 or ordered[0] == math.inf:
        return cell(values[0])
    if how == "bootstrap":
        return cell(*bootstrap(ordered, np.median))
    if how == "mean" and ordered[-1] < math.inf:
        return f"{fmean(ordered):.2f} ± {stdev(ordered):.2f}"
    return f"{median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def differences(arms, compared, names, args):
    """A line of plain words for each arm and measure: how it differs from --versus."""
    versus = args.versus or next(iter(arms))
    if versus not in arms:
        fail(f"--versus must be among {', '.join(arms)}, got {versus!r}")
    count = len(arms[versus])
    lines = [few_seeds(count)] if count < ENOUGH_SEEDS else []
    for arm in arms:
        if arm != versus:
            lines += pair_lines(arm, versus, arms, compared, names, args)
    return lines


def pair_lines(arm, versus, arms, compared, names, args):
    """The lines of one arm and one baseline; measures that the task does not have are left out."""
    lines = []
    for name in COMPARED:
        values = [measured[name] for measured in compared[arm]]
        others = [measured[name] for measured in compared[versus]]
        if set(values) != {None}:
            margin = margin_of(name, arms[versus].values(), others, args)
            what = f"{arm} - {versus}, {called(name, names)}"
            lines.append(f"{what}: {in_words(values, others, margin)}")
    return lines


def in_words(values, others, margin):
    """One measure of an arm against that of the baseline, a value a seed.

    >>> in_words([4.3, 5.1, 5.4, 4.8, 4.7], [3.9, 4.6, 5.1, 4.2, 4.4], margin=0.2)
    '+0.42 (95 % 0.26 to 0.58, p = .062, 5 seeds): different'
    """
    pairs = list(zip(values, others, strict=True))
    missing = sum(None in pair for pair in pairs)
    if missing:
        return f"not reached in {missing} of {len(pairs)} seeds"
    found = paired_difference([value - other for value, other in pairs])
    interval = f"95 % {found.low:.2f} to {found.high:.2f}"
    numbers = f"{found.mean:+.2f} ({interval}, p = {plain_p(found.p)}, {len(pairs)} seeds)"
    return f"{numbers}: {verdict(found, margin)}"


class Difference(NamedTuple):
    """Between two arms, over seeds."""

    mean: float
    low: float  # edges of the mean's 95 % interval
    high: float
    p: float


def paired_difference(d):
    """The differences of the seeds, as a list of numbers -> Difference."""
    mean = fmean(d)
    # Student's t: as if normal, but wider, for the spread itself is estimated from a few seeds.
    reach = t_quantile(len(d) - 1) * stdev(d) / math.sqrt(len(d))
    return Difference(mean, mean - reach, mean + reach, sign_flip_p(d))


def sign_flip_p(d):
    """The share of all choices of signs whose sum is at least as far from 0 as that of d itself.

    Of more than 16 differences, 2^16 choices by lot stand for all.

    >>> sign_flip_p([1.0, 2.0, 4.0])  # 7 and -7, of the 8 sums
    0.25
    """
    count = len(d)
    if count <= 16:
        number = np.arange(2**count)[:, None]  # [2^n, 1], whose binary digits are the signs
        flipped = number >> np.arange(count) & 1  # [2^n, n]
    else:
        flipped = np.random.default_rng(0).integers(2, size=(2**16, count))  # [2^16, n]
        flipped[0] = 0  # the choice that was found is one of them
    sums = np.abs((1 - 2 * flipped) @ np.asarray(d, dtype=float))  # [2^n]
    rounding = 1e-9 * np.abs(d).sum()
    return float(np.mean(sums >= sums[0] - rounding))


def verdict(found, margin):
    """What a Difference lets one say.  margin: how large a difference counts as none."""
    different = found.low > 0 or found.high < 0
    equivalent = -margin < found.low and found.high < margin
    if equivalent:
        small = f"equivalent within ±{margin:.2f}"
        return f"{small}, though different" if different else small
    return "different" if different else f"cannot tell (margin ±{margin:.2f})"


# The credit heatmap: who is praised for the score?


def heatmap(args):
    """One response as text, coloured by credit, above the value and return of each of its tokens.

    Text: a token is blue where the update makes it likelier (positive advantage), red where less
    likely; the darkest token has the largest advantage of the picture. A black bar begins a macro
    action, whose tokens share one advantage. ∎ is the EOS, which writes nothing.

    Value V (blue line): the critic's guess, in front of each token, of the reward to come. Before
    the first update it spikes where a sentence has just ended. The critic starts as a copy of the
    reward model, which was only ever read at the end of a response: to it, a text that stops in
    mid-sentence is a broken response, and one that stops after a full stop is a finished one.

    Return (red steps): what V should have been, GAE's mixture of the score, which arrives at the
    last token, and the critic's guesses on the way. With λ = 0.95 the score's share fades in about
    20 actions: 20 tokens in the arm `token`, 20 macro actions in `fixed`. That is why the red line
    of `token` keeps to V's level until shortly before the end, and that of `fixed` does not.

    Advantage = return - V, then whitened. So at token level every spike of V comes out as a red
    first word of the next sentence, which has done nothing wrong. Macro actions average V over
    their tokens, and the spikes with it.
    """
    samples = [read_sample(run, args.step, args.sample) for run in find_runs(args.run)]
    # One scale for all arms, or else a pale picture and a vivid one could mean the same.
    limit = max(abs(a) for sample in samples for a in sample["advantages"]) or 1.0
    layouts = [lay_out(sample["pieces"]) for sample in samples]  # drawing: Appendix G
    canvas, axes = heatmap_axes(layouts)
    for sample, cells, (above, below) in zip(samples, layouts, axes, strict=True):
        draw_credit(above, sample, cells, limit)
        draw_values(below, sample)
    save(canvas, args.png)
    return []


def main(argv=None):
    """Run the subcommand named on the command line, and print its table."""
    command, args = parse(argv)  # Appendix H, with COMMANDS: {name: function(args) -> lines}
    sft.setup(args.device)  # under torchrun: the ranks meet, to share the sampling
    try:
        lines = COMMANDS[command](args)
    except (KeyboardInterrupt, EOFError):
        fail("interrupted; verdicts given so far are kept: the same command goes on")
    sft.print0("\n".join(lines))


# Appendix A. Samples on held-out prompts: score, bestofn, passk
#
# Training scores are scores on training prompts. Here the final policies respond to prompts that
# no stage has seen. The noise of a sample is a function of (seed, sample, prompt number) alone, so
# neither batches, ranks nor other samples change it. Sampling is slow; so samples are kept in
# RUN/score/samples.jsonl, and drawn again only when a model's files have changed.


@dataclass
class Policy:
    """Something that responds to prompts: the final policy of a run, or an SFT model."""

    folder: Path  # in its subfolder `score` samples are kept
    model: Path  # its weights
    cfg: ma_ppo.Config  # settings of the run


class Sampled(NamedTuple):
    """The scored samples of one policy at one temperature."""

    name: str
    temperature: str
    groups: list  # a list a prompt, of the rows that `sample_rows` makes


def sampled(args, count):
    """Yield what every policy meant by the command line answers, `count` samples a prompt."""
    policies = find_policies(args)
    for policy in policies:
        name = "/".join(policy.folder.parts[-2:])
        for temperature in args.temperature or [policy.cfg.temperature]:
            label = f"{temperature:g}" if temperature else "greedy"
            yield Sampled(name, label, samples_of(policy, temperature, count, args))
    if args.references:
        yield Sampled("references", "–", samples_of(policies[-1], "references", 1, args))


def find_policies(args):
    """The policies of the runs; with --sft before them the SFT models that they started from."""
    runs, starts = [], {}
    for run in find_runs(args.run):
        cfg = read_config(run, args)
        runs.append(Policy(run, run / "model", cfg))
        if args.sft:
            starts[cfg.sft] = Policy(Path(cfg.sft), Path(cfg.sft), cfg)
    return [*starts.values(), *runs]


def samples_of(policy, temperature, count, args):
    """`count` samples of each of the first args.prompts held-out prompts -> a list of rows each.

    temperature: 0 for greedy; "references" for the human-written responses. Where the weights are
    gone, what is kept must do.
    """
    path = policy.folder / "score/samples.jsonl"
    rows = read_rows(path, {"temperature", "sample", "number", "prompt", "response", "drawn_with"})
    if policy.model.is_dir():
        stamp = weights_stamp(policy)
        prompts = held_out_prompts(policy.cfg, args.prompts)
        rows = [row for row in rows if is_current(row, stamp, prompts)]
        jobs = missing_jobs(rows, prompts, temperature, count)
        if jobs:
            drawn = draw(jobs, temperature, policy, args)
            rows += [row | {"drawn_with": stamp} for row in drawn]
            rows.sort(key=lambda row: (str(row["temperature"]), row["number"], row["sample"]))
            sft.on_rank0(write_rows, path, rows)  # the others wait: nobody reads half a file
    rows = [row for row in rows if row["temperature"] == temperature]
    rows = [row for row in rows if row["sample"] < count and row["number"] < args.prompts]
    rows.sort(key=lambda row: (row["number"], row["sample"]))
    groups = [list(group) for _, group in groupby(rows, lambda row: row["number"])]
    fewest = min(map(len, groups), default=0)
    if fewest < count:
        what = f"{count} samples a prompt at temperature {temperature}"
        fail(f"{policy.folder}: needs {what}, has {fewest}, and there is no {policy.model}")
    return groups


def weights_stamp(policy):
    """When the files were written that a sample and its scores depend on: policy, reference, RM."""
    stamp = []
    for folder in (policy.model, policy.cfg.sft, policy.cfg.reward_model):
        files = Path(folder).glob("*.safetensors") if folder else []
        stamp += [path.stat().st_mtime for path in sorted(files)]
    return stamp


def held_out_prompts(cfg, count):
    """The first `count` held-out prompts, each once, numbered: the task's rows + {number, text}."""
    rows = {}
    for row in sft.load_share(cfg, "test"):
        rows.setdefault(row["prompt"], row)
    first = list(rows.values())[:count]
    return [row | {"number": i, "text": row["prompt"]} for i, row in enumerate(first)]


def is_current(row, stamp, prompts):
    """Whether a kept sample is of these weights, and of the prompt that has its number today."""
    number = row["number"]
    moved = number < len(prompts) and prompts[number]["prompt"] != row["prompt"]
    return row["drawn_with"] == stamp and not moved


def missing_jobs(rows, prompts, temperature, count):
    """The samples still to be drawn: rows of `prompts` + {sample: which one of its prompt}."""
    there = {(row["number"], row["sample"]) for row in rows if row["temperature"] == temperature}
    if temperature == "references":
        prompts = [row for row in prompts if row.get("response")]
    jobs = []
    for sample in range(count):
        for row in prompts:
            if (row["number"], sample) not in there:
                jobs.append(row | {"sample": sample})
    return jobs


def write_rows(path, rows):
    """Write a .jsonl file in one move: interrupted, it is the old one."""
    sft.make_folder(path.parent)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def draw(jobs, temperature, policy, args):
    """Sample and score all jobs, shared among the ranks -> rows, on every rank."""
    tested = "problem" in jobs[0]  # then unit tests take the reward model's place
    models, tokenizer = load_models(policy, tested, args)
    # In batches of one sample number each, which seeds their noise.
    batches = []
    mine = jobs[sft.rank() :: sft.world()]
    for _, same in groupby(mine, lambda job: job["sample"]):
        same = list(same)
        parts = sft.micro_slices(len(same), policy.cfg.micro_batch_size)
        batches += [same[part] for part in parts]
    title = f"samples of {policy.model.parent.name}"
    rows = []
    for batch in tqdm(batches, desc=title, disable=sft.rank() != 0):
        rows += respond(batch, temperature, models, tokenizer, policy.cfg)
    return sft.gather(rows)


def load_models(policy, tested, args):
    """{name: model} of what samples and what scores, and the tokenizer."""
    cfg = replace(policy.cfg, shard=False)  # models that do not learn fit on one device
    device = sft.setup(args.device)
    length = cfg.max_prompt + cfg.max_response
    models = {}
    models["policy"], tokenizer = sft.load_causal_lm(policy.model, length, device)
    models["reference"], _ = sft.load_causal_lm(cfg.sft, length, device)
    if not tested:
        ma_ppo.check_folders(cfg)  # a reward model of ours, or a classifier
        models["reward"] = reward.ScalarModel.load(cfg.reward_model, device)
    for name, model in models.items():
        model.requires_grad_(name == "policy")  # in bf16, frozen models are kept in half the memory
        sft.prepare(model, cfg, device)
    return models, tokenizer


@torch.no_grad()
def respond(jobs, temperature, models, tokenizer, cfg):
    """Respond to the prompts of one batch, score the responses as training does -> a row each."""
    human = temperature == "references"
    names = ["prompt", "response"] if human else ["prompt"]
    tokens = sft.encode(jobs, tokenizer, cfg, names)
    examples = [job | ids for job, ids in zip(jobs, tokens, strict=True)]
    if human:
        prompts = [example["prompt"] for example in examples]
        responses = [example["response"] for example in examples]
        rollout = rollout_of(prompts, responses, tokenizer, models["policy"].device)
        kl = [None] * len(jobs)
    else:
        # Log-probabilities are taken at the run's own temperature where sampling is greedy.
        cfg = replace(cfg, temperature=temperature or cfg.temperature)
        sampling = cfg if temperature else replace(cfg, top_k=1)
        sample = jobs[0]["sample"]
        rollout = ma_ppo.sample(models["policy"], examples, sample, tokenizer, sampling)
        kl = response_kl(rollout.batch, models, cfg)
    ma_ppo.score(rollout, models, examples, tokenizer, cfg)
    return sample_rows(jobs, rollout, kl, temperature, tokenizer)


def sample_rows(jobs, rollout, kl, temperature, tokenizer):
    """What is kept of each response."""
    ended = ma_ppo.ended(rollout.batch, tokenizer).tolist()
    rows = []
    for i, job in enumerate(jobs):
        row = {"temperature": temperature, "number": job["number"], "sample": job["sample"]}
        row |= {"prompt": job["prompt"], "response": rollout.texts[i]}
        row |= {"length": len(rollout.tokens[i]), "ended": ended[i], "kl": kl[i]}
        row["rm_score"] = float(rollout.scores[i])
        row["gold_score"] = rollout.gold[i] if rollout.gold else None
        row["passed"] = None if rollout.passed is None else bool(rollout.passed[i])
        row["difficulty"] = job.get("problem", job).get("difficulty")
        rows.append(row)
    return rows


def rollout_of(prompts, responses, tokenizer, device):
    """Given responses, token lists like the prompts, in the form of sampled ones."""
    return ma_ppo.Rollout(
        batch=sft.make_batch(prompts, responses, tokenizer.pad_token_id, device),
        seeds=[],
        tokens=responses,
        texts=tokenizer.batch_decode(responses, skip_special_tokens=True),
    )


def response_kl(batch, models, cfg):
    """log π - log π_ref of each response, nats: over samples its mean is the KL.  -> B floats"""
    logprobs, ref_logprobs = both_logprobs(batch, models, cfg)  # [B, T]
    return (logprobs - ref_logprobs).sum(1).tolist()


def both_logprobs(batch, models, cfg):
    """log π and log π_ref of the response tokens.  -> two tensors [B, T]"""
    logprobs, _, keep = ma_ppo.token_logprobs(models["policy"], batch, cfg)  # [B, T]
    # The reference chooses among the same tokens: one that it does not allow would cost infinitely.
    ref_logprobs, _, _ = ma_ppo.token_logprobs(models["reference"], batch, cfg, keep)  # [B, T]
    return logprobs, ref_logprobs


HELD_OUT = [*SCORES, "passed", "kl", "length", "ended", "repeated"]


def score(args):
    """The policies on held-out prompts: means over prompts with 95 % intervals.

    Intervals are bootstraps over prompts, and Wilson's for one program a problem.
    """
    measured = []
    for policy in sampled(args, args.samples):
        for group in policy.groups:
            for row in group:
                row["repeated"] = repeated(row["response"])
        means = {key: prompt_means(policy.groups, key) for key in HELD_OUT}
        measured.append((policy, means))
    columns = [key for key in HELD_OUT if any(means[key] for _, means in measured)]
    lines = []
    for policy, means in measured:
        cells = {key: cell(*bootstrap(means[key])) for key in columns}
        if args.samples == 1 and means["passed"]:
            cells["passed"] = share_cell(round(sum(means["passed"])), len(means["passed"]))
        count = sum(map(len, policy.groups))
        lines.append([policy.name, policy.temperature, str(count), *cells.values()])
    return table(["policy", "temperature", "samples", *columns], lines)


def prompt_means(groups, key):
    """The mean over each prompt's samples, of the prompts that have the measure at all."""
    means = []
    for group in groups:
        values = [row[key] for row in group if row.get(key) is not None]
        if values:
            means.append(fmean(values))
    return means


def share_cell(wins, count):
    """A share with Wilson's 95 % interval, as text."""
    if not count:
        return "–"
    return cell(wins / count, *reward.wilson_interval(wins, count))


def repeated(text):
    """Share of a text's trigrams of words that have stood in it before; None of fewer than 3 words.

    >>> repeated("go go go go")  # 1 of 2
    0.5
    """
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else None


def bestofn(args):
    """Best of n: the score of the sample that the RM picks, against its KL, log n - (n - 1) / n."""
    nats = [math.log(n) - (n - 1) / n for n in args.n]
    rows, lines = [], {}
    for policy in sampled(args, max(args.n)):
        known = [key for key in SCORES if policy.groups[0][0][key] is not None]
        for n, kl in zip(args.n, nats, strict=True):
            picks = [picked_scores(policy.groups, key, n) for key in known]
            cells = [cell(*bootstrap(scores)) for scores in picks]
            rows.append([policy.name, policy.temperature, str(n), cell(kl), *cells])
        for key in known:
            means = [fmean(picked_scores(policy.groups, key, n)) for n in args.n]
            line = Line(f"{policy.name}, {policy.temperature}", nats, means, marker=".-")
            lines.setdefault(SCORES[key], []).append(line)
    panels = [Panel(name, "KL of best of n, nats", found) for name, found in lines.items()]
    plot(args.png, panels, "policy, temperature")
    return table(["policy", "temperature", "n", "KL", *lines], rows)


def picked_scores(groups, key, n):
    """For each prompt the expected score of the RM's favourite among n of its samples."""
    expected = []
    for group in groups:
        scores = [row["rm_score"] for row in group]
        expected.append(best_of_n(scores, [row[key] for row in group], n))
    return expected


def best_of_n(scores, worths, n):
    """Expected worth of the highest-scored of n samples, over all n-subsets; of equals the last.

    The sample with `below` others under it is the best of C(below, n - 1) of the C(N, n) subsets.

    >>> best_of_n([3, 1, 2], [30, 10, 20], 2)  # of (3, 1), (3, 2), (1, 2): 30, 30, 20
    26.666666666666668
    """
    ascending = sorted(range(len(scores)), key=scores.__getitem__)
    total = 0
    for below, i in enumerate(ascending):
        total += worths[i] * math.comb(below, n - 1)
    return total / math.comb(len(scores), n)


def passk(args):
    """pass@k: the probability that one of k programs passes all tests, bootstrap over problems."""
    lines = []
    for policy in sampled(args, max(*args.k, args.samples)):
        groups = policy.groups
        if groups[0][0]["passed"] is None:
            fail(f"{policy.name}: no unit tests: pass@k is for program tasks")
        levels = {group[0]["difficulty"] for group in groups if group[0].get("difficulty")}
        for level in ["all", *sorted(levels)]:
            chosen = [g for g in groups if level in ("all", g[0].get("difficulty"))]
            counts = [(len(group), sum(row["passed"] for row in group)) for group in chosen]
            cells = [cell(*bootstrap([pass_at_k(n, c, k) for n, c in counts])) for k in args.k]
            lines.append([policy.name, policy.temperature, level, str(len(chosen)), *cells])
    heads = [f"pass@{k}" for k in args.k]
    return table(["policy", "temperature", "difficulty", "problems", *heads], lines)


def pass_at_k(n, c, k):
    """Probability that one of k samples passes, from n of which c did (Chen et al., 2021).

    >>> pass_at_k(4, 1, 2)  # 3 of the 6 pairs hold the one that passes
    0.5
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} of {n} passing: needs 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# Appendix B. Judges and duels
#
# The RM is what training has pushed against, so its word for the winner is suspect. In a duel two
# runs respond to the same prompts, and one judge or several say who is better: the RM, the gold
# score, a person, or a language model. A judge that knows no ties may prefer what it reads first,
# so a language model is asked in both orders, and contradicting itself makes a tie.


class Pair(NamedTuple):
    """Two responses to one prompt."""

    a: dict  # rows that `respond` made
    b: dict
    first: str  # "a" or "b", by lot: which one a judge reads first


def duel(args):
    """Wins of one run over another, with 95 % intervals (Wilson); κ is Cohen's.

    Lengths match if they differ by at most 10 % of the longer response, in characters.
    """
    cfg = common_settings(args)
    pairs = pair_up(cfg, args)
    folder = sft.make_folder(Path(args.a) / f"duel-{Path(args.b).name}")
    if sft.rank() > 0:
        return []  # one rank asks
    answers = Answers(folder / "answers.jsonl")
    said = {judge: JUDGES[judge](pairs, answers, cfg, args) for judge in args.judge}
    rows = []
    for i, pair in enumerate(pairs):
        row = {"number": pair.a["number"], "first": pair.first}
        row |= {"a": pair.a["response"], "b": pair.b["response"]}
        rows.append(row | {judge: said[judge][i] for judge in said})
    write_rows(folder / "verdicts.jsonl", rows)
    return duel_table(said, pairs) + agreement_table(said)


def common_settings(args):
    """The settings of both runs, as far as they matter to a judge."""
    cfg, other = (read_config(run, args) for run in (args.a, args.b))
    if (cfg.task, cfg.data) != (other.task, other.data):
        both = f"{cfg.task} {cfg.data} and {other.task} {other.data}"
        fail(f"a duel needs one task: the runs have {both}")
    if "rm" in args.judge and cfg.reward_model != other.reward_model:
        both = f"{cfg.reward_model} and {other.reward_model}"
        fail(f"no common judge: the reward models are {both}")
    return cfg


def pair_up(cfg, args):
    """The first responses of both runs to each prompt that both have answered."""
    temperatures = (args.temperature or [cfg.temperature])[:1]
    found = replace(args, run=[args.a, args.b], temperature=temperatures)
    found = replace(found, references=False, sft=False)
    sides = []
    for policy in sampled(found, 1):
        sides.append({group[0]["number"]: group[0] for group in policy.groups})
    ours, theirs = sides
    pairs = []
    for i in ours:
        if i in theirs:
            first = "ab"[np.random.default_rng([cfg.seed, i]).integers(2)]
            pairs.append(Pair(ours[i], theirs[i], first))
    if not pairs:
        fail(f"{args.a} and {args.b} have answered no prompt in common")
    return pairs


# One function a judge: (pairs, answers, cfg, args) -> "a", "b", "tie" or "unparsable" a pair.


def rm_verdicts(pairs, answers, cfg, args):
    """The reward model: the higher score wins."""
    return score_verdicts(pairs, "rm_score")


def gold_verdicts(pairs, answers, cfg, args):
    """The gold score, where the task has one."""
    if pairs[0].a["gold_score"] is None:
        fail(f"--judge gold: task {cfg.task} has no such score")
    return score_verdicts(pairs, "gold_score")


def human_verdicts(pairs, answers, cfg, args):
    """The person at the keyboard, who sees no run names, and each pair in one order."""
    verdicts = []
    for pair in pairs:
        order = orders_of(pair)[0]
        question = question_of(pair, order, cfg)
        name = f"human: {question}"
        if name not in answers.kept:
            answers.keep(name, ask_human(question), "human", pair, order)
        verdicts.append(winner(answers.kept[name], order))
    return verdicts


def llm_verdicts(pairs, answers, cfg, args):
    """A language model with OpenAI's interface, asked in both orders."""
    client = llm_client(args)
    verdicts = []
    for pair in tqdm(pairs, desc="judge"):
        votes = []
        for order in orders_of(pair):
            question = question_of(pair, order, cfg)
            name = f"llm {args.judge_model} at {args.judge_temperature}: {question}"
            if name not in answers.kept:
                answer = ask_llm(client, question + FORMAT, args)
                answers.keep(name, answer, "llm", pair, order)
            votes.append(winner(answers.kept[name], order))
        verdicts.append(vote(votes))
    return verdicts


JUDGES = {"rm": rm_verdicts, "gold": gold_verdicts, "human": human_verdicts, "llm": llm_verdicts}


def score_verdicts(pairs, key):
    """The higher score wins, equal ones tie."""
    verdicts = []
    for pair in pairs:
        a, b = pair.a[key], pair.b[key]
        better = "a" if a > b else "b"
        verdicts.append("tie" if a == b else better)
    return verdicts


def vote(votes):
    """The verdict of a judge that was asked more than once.

    >>> vote(["a", "a"]), vote(["a", "b"]), vote(["a", "unparsable"])
    ('a', 'tie', 'unparsable')
    """
    if "unparsable" in votes:
        return "unparsable"
    return votes[0] if len(set(votes)) == 1 else "tie"


def winner(answer, order):
    """The verdict in an answer to a question that showed the responses in this order.

    A judge may think aloud first: the last JSON object with a "winner" counts.

    >>> winner('{"winner": "1"} at first sight, but 2 is right. {"winner": "2"}', "ab")
    'b'
    >>> winner("The first one.", "ab")
    'unparsable'
    """
    place = answer.rfind("{")
    while place >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, place)
        except (ValueError, RecursionError):
            found = {}
        if "winner" in found:
            names = {"1": order[0], "2": order[1], "tie": "tie"}
            return names.get(str(found["winner"]), "unparsable")
        place = answer.rfind("{", 0, place)
    return "unparsable"


def orders_of(pair):
    """Both orders in which the responses can be shown, the one by lot first."""
    return ["ab", "ba"] if pair.first == "a" else ["ba", "ab"]


QUESTION = """[Prompt]
{}

[Response 1]
{}

[Response 2]
{}

Which response is better, judged by {}?"""
FORMAT = """ You may think first.
End with JSON: {"winner": "1"}, {"winner": "2"} or {"winner": "tie"}."""
CRITERIA = {
    "toy": "relevance, coherence, consistency and fluency",
    "tldr": "relevance, coherence, consistency and fluency",
    "hh": "helpfulness",
    "webgpt": "factual accuracy, coherence and usefulness",
}


def question_of(pair, order, cfg):
    """What a judge reads."""
    one, two = (getattr(pair, side)["response"] for side in order)
    return QUESTION.format(pair.a["prompt"], one, two, CRITERIA.get(cfg.task, "correctness"))


class Answers:
    """What judges have answered, in a file: an interrupted duel asks for the rest only."""

    def __init__(self, path):
        self.path = path
        rows = read_rows(path, {"question", "answer"})
        write_rows(path, rows)  # a last line cut short would spoil the next one
        self.kept = {row["question"]: str(row["answer"]) for row in rows}

    def keep(self, name, answer, judge, pair, order):
        """Write one answer down, at once."""
        self.kept[name] = answer
        row = {"judge": judge, "number": pair.a["number"], "first": order[0]}
        with self.path.open("a") as file:
            file.write(json.dumps(row | {"answer": answer, "question": name}) + "\n")


def ask_human(question):
    """Show one pair and wait for a verdict -> the JSON that an LLM would have answered."""
    # Control characters in a response must not reach the terminal.
    print("\n" + "".join(c for c in question if c.isprintable() or c == "\n"))
    typed = ""
    while typed not in ("1", "2", "tie"):
        typed = input("1, 2 or tie (Ctrl-C stops): ").strip()
    return json.dumps({"winner": typed})


RETRIES = 5  # of a question: busy servers (429, 5xx), time-outs, lost connections
TIMEOUT = 60.0  # seconds for one answer


def api_key():
    """The key, from the environment: it is neither printed nor written anywhere."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        fail("OPENAI_API_KEY holds characters that no key has (line breaks of Windows, perhaps)")
    return key


def without_key(text):
    """A text that a server has sent, fit to be shown."""
    return text.replace(api_key() or "\0", "[key]")


def llm_client(args):
    """A client of the endpoint, which tries again by itself."""
    try:
        import openai
    except ImportError:
        fail("--judge llm needs a package: pip install openai")
    key = api_key() or "none"  # servers at home want none, but the package does
    return openai.OpenAI(base_url=args.judge_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)


def ask_llm(client, question, args):
    """The model's answer, as text.  A server that refuses or is silent ends the duel."""
    import openai

    options = {"model": args.judge_model}
    if args.judge_temperature != "none":
        options["temperature"] = float(args.judge_temperature)
    messages = [{"role": "user", "content": question}]
    try:
        reply = client.chat.completions.create(messages=messages, **options)
        answer = reply.choices[0].message.content
    except openai.APIStatusError as error:
        problem = f"refuses (HTTP {error.status_code}): {reason_of(error)}"
    except openai.APIConnectionError as error:  # a time-out is one, too
        problem = f"does not answer ({reason_of(error)})"
    except (AttributeError, IndexError, TypeError, ValueError):
        return ""  # not the reply of a chat: unparsable, like an answer without a verdict
    else:
        return without_key(str(answer))
    hint = "; --judge_temperature none leaves it out" if "temperature" in problem else ""
    fail(f"the judge {problem}{hint}; its verdicts are kept, the same command goes on")


def reason_of(error):
    """The server's own words for its refusal, in one line and without the key."""
    body = getattr(error, "body", None)
    words = body.get("message") if isinstance(body, dict) else body
    return " ".join(without_key(str(words or error)).split())[:500]


def duel_table(said, pairs):
    """A row a judge: shares of all pairs, of the decided ones, and of those of like length."""
    alike = []
    for pair in pairs:
        short, long = sorted((len(pair.a["response"]), len(pair.b["response"])))
        alike.append(long - short <= 0.1 * long)
    rows = []
    for judge, verdicts in said.items():
        counts = [str(len(verdicts)), str(verdicts.count("unparsable"))]
        shares = [share_cell(verdicts.count(x), len(verdicts)) for x in ("a", "tie", "b")]
        matched = [verdict for verdict, fits in zip(verdicts, alike, strict=True) if fits]
        shares += [win_cell(verdicts), win_cell(matched)]
        rows.append([judge, *counts, *shares, str(len(matched))])
    heads = ["judge", "pairs", "unparsable", "win", "tie", "loss"]
    return table([*heads, "of decided", "at matched length", "matched"], rows)


def win_cell(verdicts):
    """Wins among the decided pairs, with their interval."""
    wins, losses = verdicts.count("a"), verdicts.count("b")
    return share_cell(wins, wins + losses)


def agreement_table(said):
    """How well each two judges agree."""
    rows = []
    for one, two in combinations(said, 2):
        count, equal, kappa = agreement(said[one], said[two])
        rows.append([f"{one}, {two}", str(count), cell(equal), cell(kappa)])
    return ["", *table(["judges", "pairs", "agreement", "κ"], rows)] if rows else []


class Agreement(NamedTuple):
    """Of two judges."""

    pairs: int  # that both have judged
    equal: float  # share of equal verdicts; None without pairs
    kappa: float  # Cohen's: 1 for perfect, 0 for what chance gives; None if chance gives all


def agreement(ours, theirs):
    """Two judges' verdicts on the same pairs -> Agreement.

    Below 3 of 4 agree. Verdicts dealt out at random with the same frequencies would agree in
    (2 * 1 + 2 * 3) / 16 = 1/2 of the pairs; so κ = (3/4 - 1/2) / (1 - 1/2) = 1/2.

    >>> agreement(["a", "a", "b", "b"], ["a", "b", "b", "b"])
    Agreement(pairs=4, equal=0.75, kappa=0.5)
    """
    both = [pair for pair in zip(ours, theirs, strict=True) if "unparsable" not in pair]
    if not both:
        return Agreement(0, None, None)
    left, right = zip(*both, strict=True)
    equal = fmean(x == y for x, y in both)
    chance = sum(left.count(kind) * right.count(kind) for kind in set(left)) / len(both) ** 2
    return Agreement(len(both), equal, (equal - chance) / (1 - chance) if chance < 1 else None)


# Appendix C. Credit against the truth
#
# An advantage is a guess: how much better an action was than expected. On a toy the truth can be
# had, for a small policy can go on from the same place again and again, each time anew:
#
#     V*(s_t)    the mean return, from token t on, of k continuations of the text before token t
#     A*         of an action: its rewards + V*(the text after it) - V*(the text before it)
#
# That is delta, one step of surprise, with the truth in the critic's place. It adds up: over all
# actions of a response the sum is return - V*(s_0). Two things are asked of every estimator. Does
# it know what *its own actions* were worth? For a whole response that is easy: its return is known,
# and only V*(s_0) is guessed. And does it know what each *token* was worth? That is what the update
# asks, which makes every single token likelier or less likely.
#
# V* has an error, too. The continuations are split into two halves, which say A1 and A2, with
# independent errors. In products of one half with the other these cancel on average: the mean of
# (A - A1) (A - A2) is the squared error without that of the truth.
#
# How far does A* itself spread? Every A* is a surprise: 0 on average, whatever came before. So the
# surprises of a response are uncorrelated, and the mean of the sum of their squares is that of the
# square of their sum, return - V*(s_0), in which V* stands only once. Of single tokens, whose A*
# is far smaller than the errors of V*, the spread could not be found otherwise.


class Estimator(NamedTuple):
    """A way to guess advantages."""

    name: str
    arm: str
    changes: dict  # what its settings are, other than those of the run


ESTIMATORS = [
    Estimator("token", "token", {}),
    Estimator("token, λ = 1", "token", {"lam": 1.0}),
    Estimator("control", "control", {}),
    Estimator("fixed, σ = equal", "fixed", {"sigma": "equal"}),
    Estimator("fixed, σ = last", "fixed", {"sigma": "last"}),
    Estimator("fixed, σ = decay", "fixed", {"sigma": "decay"}),
    Estimator("fixed, σ = first", "fixed", {"sigma": "first"}),
    Estimator("whole, σ = equal", "whole", {"sigma": "equal"}),
    Estimator("whole, σ = first", "whole", {"sigma": "first"}),
]
PICTURED = ["token", "token, λ = 1", "control", "fixed, σ = equal", "whole, σ = first"]


class Guess(NamedTuple):
    """What an estimator says of B responses."""

    starts: torch.Tensor  # [B, T] True where its actions begin
    advantages: torch.Tensor  # [B, T], in units of reward


@dataclass
class Examined:
    """B responses of one policy, what was guessed about them, and what is true."""

    name: str  # of the run, and the step
    rollout: ma_ppo.Rollout
    pieces: list  # what each token of the first response writes
    rewards: np.ndarray  # [B, T]
    truth: np.ndarray  # [2, B, T+1], V* by either half of the continuations; 0 behind the end
    guesses: dict  # {name: Guess}


def credit(args):
    """Estimators of the advantage against the truth by continuations, on the same responses.

    Own actions: correlation with A*, mean error (bias) and root mean squared error, in units of
    reward, and how far A* itself spreads. Tokens: correlation with the A* of single tokens, which
    ranks all estimators by one truth. Sampling errors of A* are taken off. In brackets 95 %
    bootstrap intervals over responses.

    Two rows are about V*. "V": the critic's values. "return": the return that really came, of one
    response each. The square of its correlation is the explained variance of V* itself, beyond
    which no critic can get: the rest is luck.
    """
    examined = []
    for run in find_runs(args.run):
        cfg = replace(read_config(run, args), shard=False)
        if cfg.gamma != 1:
            fail(f"{run}: credit is compared at --gamma 1 only, not {cfg.gamma}")
        prompts = []  # encoding all of them takes a while, so once a run
        for step in args.at:
            models, tokenizer = models_at(run, step, cfg, args)
            prompts = prompts or ma_ppo.load_prompts(tokenizer, cfg)
            # The responses that training itself would learn from next.
            chosen = sft.batch_rows(prompts, step, cfg.batch_size, cfg.seed)[: args.responses]
            name = f"{run.parent.name}/{run.name}, step {step}"
            examined.append(examine(name, chosen, step, models, tokenizer, cfg, args))
    if args.png:
        credit_picture(examined[0], args.png)
    heads = ["run", "estimator", "actions", "correlation", "bias", "RMSE", "s.d. of A*"]
    return table([*heads, "correlation, tokens"], [row for one in examined for row in rate(one)])


def examine(name, prompts, step, models, tokenizer, cfg, args):
    """Let the policy respond to some prompts, guess the credit, and find the truth."""
    examples = [prompt | {"sample": 0} for prompt in prompts]
    rollout = ma_ppo.sample(models["policy"], examples, step, tokenizer, cfg)
    ma_ppo.judge(rollout, models, examples, tokenizer, cfg)
    logprobs, ref_logprobs, mask = rollout.logprobs, rollout.ref_logprobs, rollout.batch.mask
    rewards = ma_ppo.token_rewards(rollout.scores, logprobs, ref_logprobs, mask, cfg.beta)  # [B, T]
    # The first response may be drawn: it gets more continuations than the others.
    counts = [args.continuations] * len(examples)
    counts[0] *= 4 if args.png else 1
    text, offsets = ma_ppo.segment.token_offsets(tokenizer, rollout.tokens[0])
    return Examined(
        name=name,
        rollout=rollout,
        pieces=[text[start:end] for start, end in offsets],
        rewards=rewards.cpu().double().numpy(),
        truth=true_values(rollout, examples, counts, models, tokenizer, cfg),
        guesses=guesses_of(rollout, rewards, tokenizer, cfg),
    )


def models_at(run, step, cfg, args):
    """{name: model} of a run as they were after `step` steps, and the tokenizer."""
    arm = read_settings(run).get("arm", run.name)
    if arm == "rloo":
        fail(f"{run}: rloo has no critic, whose values the estimators could use")
    models, optimizers, tokenizer = ma_ppo.load_models(arm, cfg, sft.setup(args.device))
    if step > 0:
        folder = run / "checkpoints" / f"step-{step:06d}"
        damage = sft.damage(folder)
        if damage:
            hint = "train with --save_every 20 --keep 99 to have it"
            fail(f"{run}: no complete checkpoint of step {step} ({damage}); {hint}")
        sft.load_checkpoint(folder, sft.TrainingState(models, optimizers))
    for model in models.values():
        model.requires_grad_(False)  # nothing learns here: `judge` need not prepare for it
    return models, tokenizer


def guesses_of(rollout, rewards, tokenizer, cfg):
    """{name: Guess} of all estimators.  rewards: [B, T]"""
    guesses = {}
    for estimator in ESTIMATORS:
        changed = replace(cfg, **estimator.changes)
        ma_ppo.cut(estimator.arm, rollout, tokenizer, changed)
        found = ma_ppo.estimate(estimator.arm, rollout, rewards, changed.lam, changed)
        advantages, _ = found  # [B, T]
        guesses[estimator.name] = Guess(rollout.starts, advantages)
    return guesses


# The truth.


class Job(NamedTuple):
    """A continuation to be written."""

    response: int  # its number
    position: int  # the token from which on it is written anew
    sample: int


def true_values(rollout, examples, counts, models, tokenizer, cfg):
    """V* in front of every token, by either half of the continuations.  -> array [2, B, T+1]

    counts: how many continuations there are from each place of a response, B even numbers.
    """
    jobs = []
    for i, tokens in enumerate(rollout.tokens):
        for t in range(len(tokens)):
            jobs += [Job(i, t, sample) for sample in range(counts[i])]
    jobs.sort(key=lambda job: job.position)  # continuations of similar length are written together
    mine = jobs[sft.rank() :: sft.world()]
    parts = sft.micro_slices(len(mine), cfg.micro_batch_size)
    returns = []
    for part in tqdm(parts, desc="continuations", disable=sft.rank() != 0):
        noise = [np.random.default_rng([cfg.seed, *job]) for job in mine[part]]
        uniforms = torch.tensor(np.array([rng.random(cfg.max_response) for rng in noise]))
        returns += rewards_to_go(mine[part], uniforms, rollout, examples, models, tokenizer, cfg)
    B, T = rollout.batch.mask.shape
    values = np.zeros((2, B, T + 1))
    for job, value in sft.gather(list(zip(mine, returns, strict=True))):
        share = value / (counts[job.response] / 2)
        values[job.sample % 2, job.response, job.position] += share
    return values


@torch.no_grad()
def rewards_to_go(jobs, uniforms, rollout, examples, models, tokenizer, cfg):
    """Write a continuation for each job, and add up its rewards, KL penalty included -> b floats.

    uniforms: [b, max_response], the randomness of each continuation.
    """
    chosen = [examples[job.response] for job in jobs]
    prompts = [example["prompt"] for example in chosen]
    begun = [rollout.tokens[job.response][: job.position] for job in jobs]
    # To the policy, what is there already is a longer prompt. Together with it, a response must
    # not become longer than in training.
    texts = [prompt + tokens for prompt, tokens in zip(prompts, begun, strict=True)]
    room = cfg.max_response - min(job.position for job in jobs)
    written = ma_ppo.generate(models["policy"], texts, uniforms[:, :room], tokenizer, cfg)
    responses = []
    for tokens, more in zip(begun, written, strict=True):
        responses.append((tokens + more)[: cfg.max_response])
    anew = rollout_of(prompts, responses, tokenizer, models["policy"].device)
    mask = anew.batch.mask  # [b, T]
    ma_ppo.score(anew, models, chosen, tokenizer, cfg)
    logprobs, ref_logprobs = both_logprobs(anew.batch, models, cfg)  # [b, T]
    rewards = ma_ppo.token_rewards(anew.scores, logprobs, ref_logprobs, mask, cfg.beta)  # [b, T]
    begins = torch.tensor([job.position for job in jobs], device=mask.device)  # [b]
    to_go = torch.arange(mask.shape[1], device=mask.device) >= begins[:, None]  # [b, T]
    return (rewards * to_go).sum(1).tolist()


def true_advantages(rewards, values, starts):
    """A* of each action of one response.

    rewards: [T] numbers; values: V* in front of each token, [..., T+1]; starts: the K places where
    actions begin. Returns an array [..., K]. In actions of two tokens, with a V* of 1, 4 and 2 in
    front of them, and 0 at the end:

    >>> true_advantages([0, 1, 0, 0, 3], np.array([1, 9, 4, 9, 2, 0]), [0, 2, 4])
    array([ 4., -2.,  1.])
    """
    edges = np.append(starts, len(rewards))  # [K+1]
    earned = np.append(0.0, np.cumsum(rewards))[edges]  # [K+1], before each edge
    return np.diff(earned) + np.diff(values[..., edges])


# The comparison.


def rate(examined):
    """The rows of the table: two about V*, and one for every estimator."""
    lengths = [len(tokens) for tokens in examined.rollout.tokens]
    values = examined.rollout.values.cpu().double().numpy()  # [B, T]
    sums, sums_of_returns = [], []
    for i, length in enumerate(lengths):
        sums.append(moments(values[i, :length], examined.truth[:, i, :length]))
        returns = examined.rewards[i, :length][::-1].cumsum()[::-1]  # [length], that really came
        sums_of_returns.append(moments(returns, examined.truth[:, i, :length]))
    rows = [[examined.name, "V", *measure_cells(sums), "–"]]
    rows.append([examined.name, "return", *measure_cells(sums_of_returns), "–"])
    for name, guess in examined.guesses.items():
        advantages = guess.advantages.cpu().double().numpy()  # [B, T]
        own, tokens = [], []
        for i, length in enumerate(lengths):
            starts = np.flatnonzero(guess.starts[i, :length].cpu())
            rewards, truth = examined.rewards[i, :length], examined.truth[:, i, : length + 1]
            own.append(of_surprises(advantages[i], rewards, truth, starts))
            tokens.append(of_surprises(advantages[i], rewards, truth, np.arange(length)))
        rows.append([examined.name, name, *measure_cells(own)])
        rows[-1].append(cell(*bootstrap(tokens, correlation)))
    return rows


def measure_cells(sums):
    """Number of actions, correlation, bias, RMSE and spread of the truth, as text."""
    count = int(sum(one[0] for one in sums))
    measures = [correlation, bias, rmse, true_spread]
    return [str(count), *(cell(*bootstrap(sums, measure)) for measure in measures)]


class Moments(NamedTuple):
    """Sums over actions, of which all measures are made."""

    count: object
    guess: object
    truth: object
    guess_squared: object
    product: object
    truth_squared: object


def moments(guesses, truths):
    """The Moments of one response.  guesses: [K]; truths: [2, K], by either half."""
    first, second = truths  # [K]
    truth = (first + second) / 2  # [K]
    return Moments(
        count=len(guesses),
        guess=guesses.sum(),
        truth=truth.sum(),
        guess_squared=(guesses**2).sum(),
        product=(guesses * truth).sum(),
        truth_squared=(first * second).sum(),  # without the square of any error
    )


def of_surprises(advantages, rewards, values, starts):
    """The Moments of one response's actions, which begin at `starts`.

    advantages: [T]; rewards: [length]; values: V* by either half, [2, length+1].
    """
    truths = true_advantages(rewards, values, starts)  # [2, K]
    first, second = truths.sum(1)  # return - V*(s_0)
    return moments(advantages[starts], truths)._replace(truth_squared=first * second)


def means(sums, axis):
    """The Moments of many responses, averaged over all of their actions.

    sums: [..., responses, ..., 6], added up along `axis`.
    """
    total = Moments(*np.moveaxis(np.asarray(sums).sum(axis), -1, 0))
    return Moments(*(moment / total.count for moment in total))


def bias(sums, axis):
    """Mean error of the guesses."""
    mean = means(sums, axis)
    return mean.guess - mean.truth


def rmse(sums, axis):
    """Root mean squared error of the guesses."""
    mean = means(sums, axis)
    return np.sqrt(np.maximum(0, mean.guess_squared - 2 * mean.product + mean.truth_squared))


def true_spread(sums, axis):
    """Standard deviation of the truth."""
    mean = means(sums, axis)
    return np.sqrt(np.maximum(0, mean.truth_squared - mean.truth**2))


def correlation(sums, axis):
    """Correlation of the guesses with the truth."""
    mean = means(sums, axis)
    covariance = mean.product - mean.guess * mean.truth
    spread = np.sqrt(np.maximum(0, mean.guess_squared - mean.guess**2)) * true_spread(sums, axis)
    # Where chance hides the truth's spread altogether, the division would be by 0.
    return np.clip(covariance / np.maximum(spread, 1e-12), -1, 1)


def credit_picture(examined, png):
    """The first response: V* and V of each token, and its text coloured by A* and each guess.

    Colours are advantages as the update uses them: whitened over all responses.
    """
    rollout, mask = examined.rollout, examined.rollout.batch.mask
    truth = Guess(examined.guesses["fixed, σ = equal"].starts, torch.zeros(mask.shape))
    for i, tokens in enumerate(rollout.tokens):
        starts = np.flatnonzero(truth.starts[i].cpu())
        values = examined.truth[:, i, : len(tokens) + 1].mean(0)
        found = true_advantages(examined.rewards[i, : len(tokens)], values, starts)
        for start, end, value in zip(starts, [*starts[1:], len(tokens)], found, strict=True):
            truth.advantages[i, start:end] = value
    shown = {"truth: A* of macro actions": truth}
    shown |= {name: examined.guesses[name] for name in PICTURED}
    samples = []
    for name, guess in shown.items():
        seg = ma_ppo.segment.segment_ids(guess.starts, mask)[0]  # [T]
        advantages = ma_ppo.whiten(guess.advantages.to(mask.device), mask)[0]  # [T]
        samples.append({"run": name, "seg": seg.tolist(), "advantages": advantages.tolist()})
    count = len(examined.pieces)
    limit = max(abs(a) for sample in samples for a in sample["advantages"][:count]) or 1.0
    cells = lay_out(examined.pieces)
    heights = [2.2, *[0.3 * (cells[-1].line + 1)] * len(samples)]  # inches
    canvas = Figure(figsize=(10, sum(heights) + 0.5 * len(heights)), layout="constrained")
    above, *below = canvas.subplots(len(heights), 1, height_ratios=heights)
    draw_truth(above, examined.truth[:, 0, :count], rollout.values[0, :count].tolist())
    for ax, sample in zip(below, samples, strict=True):
        draw_credit(ax, sample, cells, limit)
    save(canvas, png)


def draw_truth(ax, truth, values):
    """V* of every token, in a band between the two halves, and the critic's V.  truth: [2, T]"""
    place = range(truth.shape[1])
    ax.fill_between(place, *truth, color="C2", alpha=0.3, lw=0)
    ax.plot(place, truth.mean(0), color="C2", label="V*, by continuations")
    ax.plot(place, values, color="C0", label="V, the critic's guess")
    ax.set(xlim=(-0.5, len(values) - 0.5), xlabel="response token", ylabel="return to come")
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
    ax.legend(**above, ncols=2, frameon=False, fontsize=12)


# Appendix D. The horizon
#
# News of the score reaches an early token through the decisions in between, each of which passes a
# share λ of it on. Macro actions make these decisions fewer, a larger λ makes the share larger. If
# that is all that macro actions do, n and λ matter together only, as the tokens that credit spans:
#
#     effective horizon    H = n / (1 - λ)     tokens, n the tokens in a macro action
#
# Then runs of equal H learn equally fast, and in the picture all colours lie on one line.


class Reach(NamedTuple):
    """How far the credit of a run spans."""

    kind: str  # its colour in the picture
    lam: float  # per action
    horizon: float  # tokens; infinite for λ = 1


class Learned(NamedTuple):
    """What a run has learned, and how fast."""

    horizon: float
    area: float  # mean RM score of all steps
    steps: int  # to half of the gain of the first run of its seed; None: never
    explained: float  # mean explained variance of the critic, None where there is none


def horizon(args):
    """Learning speed against the effective horizon H = n / (1 - λ), in tokens; λ = 1 stands at ∞.

    `control` is token level, n = 1, with its own λ^(1/n). Where a macro action's length is not
    set but found (whole, random, ...), n is its mean. Half of the gain: of the first run named that
    has the same seed. Median (range) over seeds; the picture has means and ranges.
    """
    starts = {}  # {seed: rows of its first run}
    groups = {}  # {(kind, λ): a Learned of each seed}
    for run in find_runs(args.run):
        rows = read_metrics(run)
        baseline = starts.setdefault(read_settings(run).get("seed"), rows)
        reach = reach_of(run, rows)
        found = what_was_learned(rows, baseline, reach.horizon)
        groups.setdefault((reach.kind, round(reach.lam, 6)), []).append(found)
    finite = [found.horizon for seeds in groups.values() for found in seeds]
    edge = 4 * max((x for x in finite if x < math.inf), default=1.0)  # where ∞ is drawn
    panels = []
    for key, label in {"area": "mean RM score", "steps": "steps to half of the gain"}.items():
        lines = horizon_lines(groups, key, edge)
        panels.append(Panel(label, "effective horizon H, tokens", lines, edge))
    plot(args.png, panels, "macro actions")
    return horizon_table(groups)


def reach_of(run, rows):
    """The `Reach` of a run, by its config.json."""
    settings = read_settings(run)
    lam, n = settings.get("lam"), settings.get("n")
    if lam is None or n is None:
        fail(f"{run}: config.json is missing, or has no lam and n: not a run of ma_ppo.py")
    arm = settings.get("arm", run.name)
    kind = arm
    if arm in ("token", "control"):
        lam = lam ** (1 / n) if arm == "control" else lam
        kind, n = "n = 1", 1
    elif arm == "fixed":
        kind = f"n = {n}"
    elif arm == "rloo":  # every token is credited with the whole return
        lam = 1.0
    else:
        n = area(rows, "macro_length")
    return Reach(kind, lam, n / (1 - lam) if lam < 1 else math.inf)


def what_was_learned(rows, baseline, tokens):
    """The measures of one run.  baseline: the rows of its seed's first run; tokens: its horizon."""
    scores = column(baseline, "rm_score")
    gain = smooth(scores)[-1] - scores[0]
    steps = first_step(smooth(column(rows, "rm_score")), scores[0] + gain / 2)
    return Learned(tokens, area(rows, "rm_score"), steps, area(rows, "explained_variance"))


def in_order(groups):
    """The items of `groups` by kind, n before names, and by horizon."""

    def place(item):
        (kind, _), seeds = item
        n = int(kind[4:]) if kind.startswith("n = ") else math.inf
        return n, kind, fmean(found.horizon for found in seeds)

    return sorted(groups.items(), key=place)


def horizon_lines(groups, key, edge):
    """A line for each kind of macro action, a point for each λ."""
    lines = []
    for kind, items in groupby(in_order(groups), lambda item: item[0][0]):
        points = []
        for _, seeds in items:
            x = min(edge, fmean(found.horizon for found in seeds))
            values = [getattr(found, key) for found in seeds]
            if None not in values:  # a target that was never reached has no place in the picture
                points.append((x, fmean(values), min(values), max(values)))
        if points:
            lines.append(Line(kind, *zip(*points, strict=True), marker="o-"))
    return lines


def horizon_table(groups):
    """A row for each kind of macro action and λ."""
    rows = []
    for (kind, lam), seeds in in_order(groups):
        tokens = fmean(found.horizon for found in seeds)
        cells = [kind, f"{lam:.3f}", f"{tokens:.0f}" if tokens < math.inf else "∞", str(len(seeds))]
        cells += [spread([found.area for found in seeds]), spread([found.steps for found in seeds])]
        explained = [found.explained for found in seeds]
        rows.append([*cells, "–" if None in explained else spread(explained)])
    heads = ["macro actions", "λ", "H, tokens", "seeds", "mean RM score"]
    return table([*heads, "steps to half", "explained variance"], rows)


# Appendix E. The frontier of score and KL, and the report
#
# A score can be bought with KL, by moving far from the reference. So a higher score at the same KL
# is better training, and a higher score at more KL may not be. The report runs all of this chapter
# that the runs of a folder allow, and writes it down.


def frontier(args):
    """Score against KL in training, smoothed: gain per nat, and score at a KL that all reach."""
    arms = read_arms(args.run, args.arms)
    names = score_names(arms)
    kl = {arm: nats.mean(1) for arm, nats in smoothed(arms, "kl").items()}  # [steps] each
    if not kl:
        fail(f"{', '.join(args.run)}: a run there has no KL")
    common = min(nats.max() for nats in kl.values())  # the largest KL that all arms reach
    heads = ["arm", "KL at the end"]
    rows = {arm: [arm, cell(nats[-1])] for arm, nats in kl.items()}
    panels = []
    for key, name in names.items():
        lines = []
        for arm, y in smoothed(arms, key).items():
            score, nats = y.mean(1), kl[arm]  # [steps]
            gain = (score[-1] - score[0]) / nats[-1] if nats[-1] > 0 else None
            # Where the KL first gets to `common`: the running maximum makes it rise only.
            there = np.interp(common, np.maximum.accumulate(nats), score)
            rows[arm] += [cell(gain), cell(there)]
            lines.append(Line(arm, nats, score))
        if lines:
            heads += [f"{name} per nat", f"{name} at {common:.2f} nats"]
            panels.append(Panel(name, "KL to the reference, nats", lines))
    plot(args.png, panels, f"mean of {SMOOTHING} steps")
    return still_going(arms) + table(heads, rows.values())


class Part(NamedTuple):
    """A part of the report."""

    title: str
    command: object  # one of COMMANDS
    changes: dict  # what its options are, other than those of the report
    drawn: bool = False  # whether it has a picture


def report(args):
    """All that the runs of a folder allow, as report.md in it, with the pictures beside it."""
    out = Path(args.run[0])
    runs = find_runs([out])
    args = replace(args, references=True)
    lines = [f"# {out.name}: {', '.join(run.name for run in runs)}", ""]
    for part in report_parts(runs, args):
        png = f"{part.title}.png" if part.drawn else ""
        path = str(out / png) if png else ""
        found = part.command(replace(args, png=path, **part.changes))
        lines += [f"## {part.title}", "", inspect.cleandoc(part.command.__doc__), "", *found, ""]
        lines += [f"![{part.title}]({png})", ""] if png else []
    if sft.rank() == 0:
        (out / "report.md").write_text("\n".join(lines))
    return [f"wrote {out / 'report.md'}"]


def report_parts(runs, args):
    """The parts of the report that these runs have the files for."""
    parts = [Part("curves", curves, {}, True), Part("frontier", frontier, {}, True)]
    if all((run / "model").is_dir() or (run / "score").is_dir() for run in runs):
        cfg = read_config(runs[0], args)
        tested = cfg.task in sft.PROGRAMS
        both = {"temperature": [cfg.temperature, 0.0], "sft": tested}
        parts.append(Part("score", score, both))
        parts.append(Part("bestofn", bestofn, {"references": False}, True))
        if tested:
            parts.append(Part("passk", passk, {"references": False, "sft": True}))
        judges = ["rm", "gold"] if cfg.task == "toy" else ["rm"]
        for run in runs[1:]:
            sides = {"a": str(run), "b": str(runs[0]), "judge": judges}
            parts.append(Part(f"duel {run.name}", duel, sides))
    if all((run / "samples.jsonl").is_file() for run in runs):
        parts.append(Part("heatmap", heatmap, {}, True))
    return parts


# Appendix F. Intervals
#
# A number without an interval is an anecdote. Over prompts, the values themselves are drawn anew
# (bootstrap); over a few seeds, that would be too narrow, and Student's t is used.


RESAMPLES = 2000


def bootstrap(values, statistic=np.mean):
    """A statistic and its 95 % interval -> (value, low, high); (None,) of no values.

    The values are drawn anew, with replacement, 2,000 times; the interval holds the middle 95 % of
    the 2,000 statistics (percentile bootstrap). Of a handful of values it is too narrow.
    """
    if not len(values):
        return (None,)
    values = np.asarray(values, dtype=float)  # [N]
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    found = np.sort(statistic(values[picks], axis=1))  # [RESAMPLES]
    edge = RESAMPLES // 40  # a fortieth, 2.5 %, on either side
    return float(statistic(values, axis=0)), float(found[edge]), float(found[-edge - 1])


def cell(x, low=None, high=None):
    """A number, with its interval if there is one, as text."""
    if x is None:
        return "–"
    return f"{x:.2f}" if low is None else f"{x:.2f} [{low:.2f}, {high:.2f}]"


def t_quantile(freedom, within=0.95):
    """How far Student's t strays from 0 with probability `within`, on either side together.

    freedom: degrees of freedom, the number of values less 1.

    >>> round(t_quantile(9), 3)  # ten seeds; a normal distribution would have 1.96
    2.262
    """
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < within:
        high *= 2
    for _ in range(100):  # halve the interval that holds it
        middle = (low + high) / 2
        if t_probability(middle, freedom) < within:
            low = middle
        else:
            high = middle
    return high


def t_probability(t, freedom):
    """P(|T| < t) of Student's t with an integer number of degrees of freedom.

    A finite sum over powers of cos θ, with tan θ = t / √freedom (Abramowitz and Stegun, 26.7.3-4).
    """
    theta = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term = cos if odd else 1.0
    total = 0.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos * cos * (power - 1) / power
    if odd:
        return (theta + sin * total) * 2 / math.pi
    return sin * total


def margin_of(name, baseline, values, args):
    """How large a difference counts as none.

    Of a score: --margin's share of the spread of the SFT model's samples, which is that of step 0.
    Of everything else: its share of the baseline's own value.
    baseline: the runs of the baseline, a list of rows each; values: its measure, one a seed.
    """
    of_spread, of_value = args.margin
    key = {"RM score": "rm_score_std", "gold score": "gold_score_std"}.get(name)
    spreads = [rows[0].get(key) for rows in baseline]
    if key and None not in spreads:
        return of_spread * fmean(spreads)
    known = [value for value in values if value is not None]
    return of_value * abs(fmean(known)) if known else 0.0


def few_seeds(count):
    """A warning: of few seeds even differences that all agree may be chance."""
    least = plain_p(2 / 2**count)
    return f"warning: fewer than {ENOUGH_SEEDS} seeds: with {count}, p cannot be below {least}"


def plain_p(p):
    """A probability as text: .002"""
    return f"{p:.3f}".removeprefix("0")


# Appendix G. Finding runs, and drawing
#
# Where runs lie, and how pictures are laid out, has nothing to say about the method. Sizes are such
# that a picture can be read at 900 pixels, the width of a README.


def find_runs(folders, names=()):
    """The runs meant: each folder is one, or holds one an arm (those named, or all)."""
    runs = []
    for folder in map(Path, folders):
        if names:
            runs += [folder / name for name in names]
        elif (folder / "metrics.jsonl").is_file():
            runs.append(folder)
        else:
            held = [path.parent for path in folder.glob("*/metrics.jsonl") if is_ppo_run(path)]
            held.sort(key=lambda run: (run.name != "token", run))  # the baseline first
            runs += held or [folder]
    return runs


def is_ppo_run(path):
    """Whether a metrics.jsonl is of PPO, which has scores, and not of SFT or RM training."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError as error:
        fail(f"{path} cannot be read: {error}")
    return line.endswith(b"\n") and b'"rm_score"' in line


def read_arms(folders, names):
    """{arm: {run folder: its rows}}.  Runs of one name in several folders are seeds of one arm."""
    arms = {}
    runs = find_runs(folders, names)
    for run in runs:
        arm = run.name
        for name in names:  # results/toy holds `fixed` and `decay/fixed`: two arms
            if run.as_posix().endswith("/" + name) and len(name) > len(arm):
                arm = name
        if arm in arms and runs == [Path(folder) for folder in folders]:
            arm = "/".join(run.parts[-2:])  # runs that were named one by one are arms of their own
        arms.setdefault(arm, {})[run] = read_metrics(run)
    if len({len(runs) for runs in arms.values()}) > 1:
        fail(f"these arms have different numbers of seeds: {', '.join(arms)}")
    return arms


def still_going(arms):
    """A line for each run that has not done all its steps."""
    lines = []
    for arm, runs in arms.items():
        for folder, rows in runs.items():
            steps = read_settings(folder).get("steps")
            if isinstance(steps, int) and len(rows) < steps:
                name = arm if len(runs) == 1 else folder
                lines.append(f"{name}: step {len(rows)} of {steps}; the numbers are of these")
    return [*lines, ""] if lines else []


def read_settings(folder):
    """config.json of a run, {} where there is none."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path} cannot be read: {error}")
    return found if isinstance(found, dict) else {}


def read_config(folder, args):
    """The settings of a run; micro_batch_size is the command line's, if it has one."""
    found = read_settings(folder)
    if "task" not in found:
        fail(f"{folder}: no run there (config.json is missing, or not that of a run)")
    known = vars(ma_ppo.Config())
    cfg = ma_ppo.Config(**{name: value for name, value in found.items() if name in known})
    return replace(cfg, micro_batch_size=args.micro_batch_size or cfg.micro_batch_size)


def table(heads, rows):
    """The lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


@dataclass
class Line:
    """A curve; arrays of one length."""

    label: str
    x: object
    y: object
    low: object = None  # edges of a band
    high: object = None
    raw: object = None  # drawn thin and pale
    marker: str = "-"


class Panel(NamedTuple):
    """Curves with common axes."""

    ylabel: str
    xlabel: str
    lines: list
    infinity: float = 0.0  # with it the x-axis is logarithmic, and there stands ∞


def plot(png, panels, legend):
    """Draw panels side by side; without a name for the picture, nothing."""
    if not png:
        return
    with matplotlib.rc_context({"font.size": 12}):
        canvas = Figure(figsize=(3.2 * len(panels), 3.7), layout="constrained")
        axes = canvas.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            for i, line in enumerate(panel.lines):
                draw_line(ax, line, f"C{i}")
            ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
            if panel.infinity:
                logarithmic(ax, panel.infinity)
            ax.grid(alpha=0.3)
        named = axes[0].get_legend_handles_labels()
        above = {"loc": "outside upper center", "ncols": 5 * len(panels) // 2, "frameon": False}
        canvas.legend(*named, title=legend, fontsize=11, title_fontsize=11, **above)
        save(canvas, png)


def draw_line(ax, line, color):
    """A curve, over its raw values or its band."""
    if line.raw is not None:
        ax.plot(line.x, line.raw, color=color, alpha=0.25, lw=1)
    if line.low is not None and "o" in line.marker:
        ax.vlines(line.x, line.low, line.high, color=color, alpha=0.4)  # a bar at each point
    elif line.low is not None:
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, lw=0)
    ax.plot(line.x, line.y, line.marker, color=color, lw=2, label=line.label)


def logarithmic(ax, infinity):
    """A logarithmic x-axis that ends in ∞."""
    ax.set_xscale("log")
    left = ax.dataLim.x0 / 1.5
    ax.set_xlim(left, infinity * 1.5)
    powers = [10**k for k in range(9) if left < 10**k < infinity / 3]
    ax.set_xticks([*powers, infinity], [*map(str, powers), "∞"])
    ax.minorticks_off()


def save(canvas, png):
    """Write a picture, and its folder if need be."""
    if sft.rank() > 0:
        return
    sft.make_folder(Path(png).parent)
    try:
        with warnings.catch_warnings(action="ignore"):  # a character the font lacks becomes a box
            canvas.savefig(png, dpi=150, format="png")
    except OSError as error:
        fail(f"cannot write {png}: {error}")


# The heatmap's parts.

CREDIT = ["seg", "values", "advantages", "returns"]  # a number a token each


def read_sample(run, step, number):
    """One of the responses that a run keeps, {pieces: its tokens as text, seg, values, …}."""
    kept = read_rows(run / "samples.jsonl", {"step", "pieces", *CREDIT})
    kept = [row for row in kept if row["step"] == step]
    what = f"sample {number} of step {step}"
    if not 0 <= number < len(kept):
        fail(f"{run}: no {what} in samples.jsonl, which keeps every tenth step")
    row = kept[number]
    kinds = {"pieces": str} | dict.fromkeys(CREDIT, int | float)
    entries = [row[key] if isinstance(row[key], list) else [] for key in kinds]
    lengths = {len(values) for values in entries}
    for values, kind in zip(entries, kinds.values(), strict=True):
        if len(lengths) > 1 or not values or not all(isinstance(x, kind) for x in values):
            fail(f"{run}: {what} is damaged: not one entry a token")
    return row | {"run": run.name}


WIDTH = 90  # characters in a line of text
FONT = {"family": "monospace", "fontsize": 11, "va": "center", "parse_math": False}


class Place(NamedTuple):
    """Where a token stands."""

    line: int
    column: int
    text: str


def lay_out(pieces):
    """Set the tokens in lines of at most WIDTH characters, none of them broken -> Places."""
    places = []
    line = 0
    column = 0
    for piece in pieces:
        text = piece.replace("\n", "⏎") or "∎"
        if column > 0 and column + len(text) > WIDTH:
            line, column = line + 1, 0
        places.append(Place(line, column, text))
        column += len(text)
    return places


def heatmap_axes(layouts):
    """A picture with two axes a response, text and curves -> (figure, [(above, below), …])."""
    heights = []  # inches
    for places in layouts:
        heights += [0.3 * (places[-1].line + 1), 1.9]
    canvas = Figure(figsize=(10, sum(heights) + len(layouts)), layout="constrained")
    axes = canvas.subplots(len(heights), 1, height_ratios=heights)
    return canvas, list(zip(axes[::2], axes[1::2], strict=True))


def draw_credit(ax, sample, cells, limit):
    """The response's text: colours are advantages, bars begin macro actions."""
    seg = sample["seg"]
    for t, place in enumerate(cells):
        strength = sample["advantages"][t] / limit  # -1 to 1
        tint = matplotlib.colormaps["RdBu"](0.5 + 0.45 * strength)
        corner = (place.column, place.line + 0.08)
        ax.add_patch(Rectangle(corner, len(place.text), 0.84, color=tint, lw=0))
        ink = "black" if abs(strength) < 0.7 else "white"
        ax.text(place.column, place.line + 0.52, place.text, color=ink, **FONT)
        if t == 0 or seg[t] != seg[t - 1]:
            ends = [place.line + 0.08, place.line + 0.92]
            ax.plot([place.column] * 2, ends, color="black", linewidth=1.5)
    title = f"{sample['run']}: {seg[-1] + 1} macro actions"
    ax.set(xlim=(0, WIDTH), ylim=(cells[-1].line + 1, 0))
    ax.set_title(title, fontsize=14)
    ax.axis("off")


def draw_values(ax, sample):
    """The critic's value and the return of every token; grey lines begin macro actions."""
    seg = sample["seg"]
    for t in range(len(seg)):
        if t == 0 or seg[t] != seg[t - 1]:
            ax.axvline(t - 0.5, color="0.85", linewidth=0.8)
    ax.plot(sample["values"], color="C0", label="value V, in front of the token")
    ax.step(range(len(seg)), sample["returns"], where="mid", color="C3", label="return")
    ax.set(xlim=(-0.5, len(seg) - 0.5))
    ax.set_xlabel("response token", fontsize=12)
    ax.set_ylabel("reward", fontsize=12)
    ax.tick_params(labelsize=11)
    ax.margins(y=0.2)  # room for the legend
    ax.legend(loc="upper left", ncols=2, frameon=False, fontsize=12)


# Appendix H. The command line
#
# One set of options for all subcommands. A new subcommand is a function(args) -> lines of text, and
# an entry in COMMANDS.


@dataclass
class Options:
    """Settings of the subcommands; each reads those that its --help names."""

    run: list[str] = opt([], "run folders of ma_ppo.py, or --out folders that hold one per arm")
    arms: list[str] = opt([], "curves, frontier: only these arms, the first one the baseline")
    mean: bool = opt(False, "curves, over seeds: mean ± standard deviation, not median (range)")
    versus: str = opt("", "curves, over seeds: the arm to compare others with; empty: the first")
    margin: list[float] = opt(
        [0.25, 0.1],
        "curves, over seeds: differences that count as none, in standard deviations of the SFT "
        "model's samples for scores, and as a share of the baseline for areas and steps",
    )
    png: str = opt("", "curves, frontier, bestofn, heatmap, credit, horizon: picture to write")
    prompts: int = opt(128, "held-out prompts to sample, the first ones")
    samples: int = opt(1, "score, passk: samples of each prompt")
    temperature: list[float] = opt([], "of sampling; 0: greedy; default: the run's own")
    sft: bool = opt(False, "score, bestofn, passk: the SFT models that the runs started from, too")
    references: bool = opt(False, "score: the human-written responses too")
    n: list[int] = opt([1, 2, 4, 8, 16], "bestofn: n")
    k: list[int] = opt([1, 5], "passk: k")
    a: str = opt("", "duel: a run folder")
    b: str = opt("", "duel: its opponent's")
    judge: list[str] = opt(["rm"], "duel: gold, rm, llm (pip install openai), human, or several")
    judge_url: str = opt("https://api.openai.com/v1", "llm: endpoint; its key is in OPENAI_API_KEY")
    judge_model: str = opt("", "llm: model")
    judge_temperature: str = opt("0", "llm: temperature; none: do not send one")
    at: list[int] = opt([0], "credit: after how many PPO steps; other than 0 needs checkpoints")
    responses: int = opt(16, "credit: number of responses")
    continuations: int = opt(4, "credit: continuations from each place, an even number")
    step: int = opt(0, "heatmap: PPO step; at 0 all arms have sampled the same")
    sample: int = opt(0, "heatmap: which sample of that step")
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    micro_batch_size: int = opt(0, "responses per forward pass and rank; 0: the run's own")


COMMANDS = {
    "report": report,
    "curves": curves,
    "seeds": curves,  # the same, of several folders
    "frontier": frontier,
    "score": score,
    "bestofn": bestofn,
    "passk": passk,
    "duel": duel,
    "heatmap": heatmap,
    "credit": credit,
    "horizon": horizon,
}


def parse(argv):
    """The command line -> (subcommand, Options), checked."""
    parser = HfArgumentParser(Options, description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    parser.add_argument("folder", nargs="?", help="report: the --out folder of ma_ppo.py")
    values = vars(parser.parse_args(argv))
    command, folder = values.pop("command"), values.pop("folder")
    args = Options(**values)
    if folder:
        args.run = [folder]
    check(command, args)
    check_judge(args)
    return command, args


def check(command, args):
    """Refuse what cannot work, before anything is computed."""
    needed = {"duel": ["a", "b"], "heatmap": ["run", "png"]}.get(command, ["run"])
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        fail(f"{command} needs {' and '.join(missing)}")
    if command == "report" and len(args.run) > 1:
        fail(f"report needs one folder, got {len(args.run)}")
    least = min(args.prompts, args.samples, *args.n, *args.k)
    if least < 1:
        fail(f"--prompts, --samples, --n and --k must be at least 1, got {least}")
    if len(args.margin) != 2 or not all(0 <= share < math.inf for share in args.margin):
        fail(f"--margin must be two numbers of 0 or more, got {args.margin}")
    if args.responses < 2 or args.continuations < 2 or args.continuations % 2:
        both = f"{args.responses} and {args.continuations}"
        fail(f"--responses must be 2 or more, --continuations even and 2 or more, got {both}")
    if min(args.at, default=-1) < 0:
        fail(f"--at must be steps, 0 or more, got {args.at}")
    if not all(0 <= t < math.inf for t in args.temperature):
        fail(f"--temperature must be 0 or more, got {args.temperature}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # the device is checked as for training
    sft.check(ma_ppo.Config(device=args.device, batch_size=ranks))


def check_judge(args):
    """The same for the options of `duel`."""
    if not args.judge or not set(args.judge) <= JUDGES.keys():
        fail(f"--judge must be among {', '.join(JUDGES)}, got {args.judge}")
    if "llm" in args.judge and not args.judge_model:
        fail("--judge llm needs --judge_model")
    host = r"[\w.-]+|\[[0-9a-fA-F:]+\]"
    if not re.fullmatch(rf"https?://({host})(:\d+)?(/\S*)?", args.judge_url):
        fail(f"--judge_url must be a URL such as https://host/v1, got {args.judge_url}")
    if not re.fullmatch(r"none|\d+(\.\d+)?", args.judge_temperature):
        fail(f"--judge_temperature must be a number or none, got {args.judge_temperature}")


if __name__ == "__main__":
    main()
