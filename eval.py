"""Chapter 5: evaluation, or what the runs show.

A run of chapter 4 leaves two things: `metrics.jsonl`, one line a PPO step, and its final policy.
This chapter reads the first and draws samples from the second, on prompts that training never saw.

The paper's claim is about speed. So the measure is *steps to parity*: a target on the way of the
baseline's score, and how soon another run gets there:

    target = start + share * (end - start)                    of the baseline, the first run named
    parity = steps of this run to the target / steps of the baseline to it        0.5: twice as fast

    python eval.py report runs/toy                            # most of it: runs/toy/report.md
    python eval.py curves --runs runs/toy --png curves.png    # while training runs, too
    python eval.py seeds --runs runs/seed* --arms token fixed control     # paired differences
    python eval.py heatmap --runs runs/toy/token runs/toy/fixed --png heatmap.png
    python eval.py score --runs runs/toy-code --sft           # held-out pass rates; Appendix A
    python eval.py duel --a runs/toy/fixed --b runs/toy/token --judge rm gold         # Appendix B
    python eval.py credit --runs runs/toy/fixed --png credit.png                      # Appendix C
    python eval.py horizon --runs runs/toy runs/lam1          # Appendix D

Look at curves.png first: which line is ahead, and in the last panel, what it has paid in KL.

The story: metrics, smoothing, steps to parity, the measures of a run, learning curves, several
seeds, the credit heatmap, `main`. You may stop reading there.
Appendix A: samples on held-out prompts (score, bestofn, passk). B: judges and duels.
C: credit against the truth. D: the horizon. E: the report. F: finding runs, tables, intervals.
G: drawing. H: the command line.
"""

import argparse
import inspect
import json
import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, median_high, stdev

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import ma_ppo
import reward
import segment
import sft
from sft import fail, print0

SMOOTHING = 5  # steps; one step's score is the mean of a batch and jumps about


# Metrics. A run is a list of rows, one dict a PPO step; a metric is a column of it.
def read_rows(path):
    """The rows of a .jsonl file, a dict each; [] where there is no such file."""
    if not path.is_file():
        return []
    # No line break follows the last piece: it is empty, or being written at this moment.
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def column(rows, key):
    """A metric's value at every step, or None where the run does not have it.

    For a step whose value was not finite that of the step before stands in.
    """
    values = [row.get(key) for row in rows]
    known = [value for value in values if value is not None]
    for i, value in enumerate(values):
        if known and value is None:
            values[i] = values[i - 1] if i else known[0]
    return values if known else None


def smooth(values, width=SMOOTHING):
    """Mean over the last `width` steps, fewer at the beginning.  It never looks ahead.

    >>> smooth([0, 0, 0, 10, 10])
    [0.0, 0.0, 0.0, 2.5, 4.0]
    """
    # Not a centred mean: that would know the future, and let a run arrive before it has.
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def first_step(values, target):
    """The first step at which the values are at `target` or above; None if they never are."""
    return next((step for step, value in enumerate(values) if value >= target), None)


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

    None if the baseline gains nothing or starts at the target, or the other run never gets there.
    """
    start = baseline[0]  # both runs start from the same models, so this is the start of both
    end = smooth(baseline)[-1]  # smoothed, or one lucky batch at the end would move the target
    target = start + share * (end - start)
    own = first_step(smooth(baseline), target)
    other = first_step(smooth(values), target)
    if end <= start or not own or other is None:  # `not own`: None, or step 0
        return None
    return other / own


# The measures of a run: numbers, or None where the run has no such value. The score (`rm_score`) is
# what training pushes up: the reward model's, or that of the unit tests. Whether it still means
# anything, only the gold score can tell, on tasks that have one. KL is the price: how far the
# policy has moved from where it started.


def at_end(rows, key):
    """A metric at the end of training, smoothed."""
    values = column(rows, key)
    return smooth(values)[-1] if values else None


def area(rows, key):
    """Mean over all steps, or the area under the curve: parity looks at one point, this at all."""
    values = column(rows, key)
    return fmean(values) if values else None


def parity_of(baseline, rows, key, share):
    """Steps to parity in one metric."""
    columns = [column(baseline, key), column(rows, key)]
    return None if None in columns else parity(*columns, share)


def measures_of(baseline, rows):
    """All measures of a run.  baseline: the rows of the run that it is compared with."""
    return {
        "steps": len(rows),
        "score": at_end(rows, "rm_score"),
        "gold score": at_end(rows, "gold_score"),
        "pass rate": at_end(rows, "pass_rate"),
        "KL": at_end(rows, "kl"),
        "EOS rate": at_end(rows, "eos_rate"),
        "s/step": median_high(column(rows, "seconds")),  # not the mean: the first step is slower
        "score 50 %": parity_of(baseline, rows, "rm_score", 0.5),
        "score 90 %": parity_of(baseline, rows, "rm_score", 0.9),
        "gold 50 %": parity_of(baseline, rows, "gold_score", 0.5),
        "gold 90 %": parity_of(baseline, rows, "gold_score", 0.9),
        "score area": area(rows, "rm_score"),
        "gold area": area(rows, "gold_score"),
        "score spread": rows[0].get("rm_score_std"),
        "gold score spread": rows[0].get("gold_score_std"),
    }


SCORES = ["score", "gold score", "pass rate"]
ENDS = ["steps", *SCORES, "KL", "EOS rate", "s/step"]
SPEEDS = ["score 50 %", "score 90 %", "gold 50 %", "gold 90 %", "score area", "gold area"]


# Learning curves: a panel a metric, a line an arm, and the measures as tables. `arms` is
# {arm: {seed: rows}}; the first arm is the baseline.
def curves(args):
    """Learning curves in training, steps to parity with the first arm, areas under the curves.

    Medians over seeds, and in brackets the range; in the picture means and ranges. The last panel
    is the price: at how much KL a policy has earned its score. A score can be bought by moving far
    from the reference, so the better of two lines is the one that is higher at the same KL.
    """
    arms = read_arms(args.runs, args.arms)  # Appendix F
    if args.png:
        draw_curves(arms, args.png)  # Appendix G
    compared = compare(arms)
    return [*measures_table(compared, ENDS), "", *measures_table(compared, SPEEDS)]


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


def measures_table(compared, measures):
    """A row an arm, a column a measure that any arm has."""
    arms = compared.values()
    names = [name for name in measures if any(set(found[name]) != {None} for found in arms)]
    rows = []
    for arm, found in compared.items():
        rows.append([arm, *(spread(found[name]) for name in names)])
    return table(["arm", *names], rows)


def spread(values):
    """One measure over the seeds, as text: median (lowest to highest).

    None stands for a target that was never reached, and so counts as infinitely many steps.
    """
    ordered = sorted(math.inf if value is None else value for value in values)
    if ordered[0] == ordered[-1]:
        return cell(values[0])
    return f"{median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


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
#
# No difference found is none shown: with two noisy seeds nothing ever differs. To say that two arms
# are *equivalent*, the whole interval must lie within a margin, and one that was stated beforehand.

# Student's t: how many standard errors a 95 % interval reaches to either side, for the mean of 2,
# 3, ... 21 values. As if normal (1.96), but wider, for the spread itself is estimated from a few.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T_95 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def seeds(args):
    """Arms over several seeds: differences within each seed, and what they let one say.

    In brackets the 95 % interval of the mean difference (Student's t). "equivalent": all of it lies
    within the margin; "different": all of it lies on one side of 0; else "cannot tell".
    --margin: of scores, in standard deviations of the SFT model's samples; of all other measures,
    as a share of the mean of --versus.
    """
    arms = read_arms(args.runs, args.arms)
    versus = args.versus or next(iter(arms))
    if versus not in arms:
        fail(f"--versus must be among {', '.join(arms)}, got {versus!r}")
    if len(arms[versus]) < 2:
        fail(f"{versus} has one seed; differences over seeds need two or more")
    compared = compare(arms)
    rows = []
    for arm in arms:
        for name in (*SCORES, *SPEEDS) if arm != versus else ():
            values, others = compared[arm][name], compared[versus][name]
            if set(values + others) != {None}:  # or else the task does not have this measure
                margin = margin_of(name, compared[versus], args.margin)
                words = in_words(values, others, margin)
                rows.append([f"{arm} - {versus}", name, f"±{margin:.2f}", *words])
    count = f"mean difference, {len(arms[versus])} seeds"
    heads = ["arms", "measure", "margin", count, "verdict"]
    return [*curves(args), "", *table(heads, rows)]


def compare(arms):
    """{arm: {measure: its values, one a seed}}, each against the baseline's run of that seed."""
    baselines = next(iter(arms.values()))
    compared = {}
    for arm, runs in arms.items():
        found = [measures_of(baselines[seed], rows) for seed, rows in runs.items()]
        compared[arm] = {name: [one[name] for one in found] for name in found[0]}
    return compared


def margin_of(name, baseline, margin):
    """How large a difference counts as none.  baseline: its measures; margin: the two shares.

    Of a score: a share of the spread of the SFT model's samples, which is that of step 0. Of
    everything else: a share of the baseline's own value.
    """
    of_spread, of_value = margin
    spreads = baseline.get(f"{name} spread", [None])
    if None not in spreads:
        return of_spread * fmean(spreads)
    known = [value for value in baseline[name] if value is not None]
    return of_value * abs(fmean(known)) if known else 0.0


def in_words(values, others, margin):
    """One measure of an arm against that of --versus, a value a seed: difference and verdict.

    >>> in_words([4.3, 5.1, 5.4, 4.8, 4.7], [3.9, 4.6, 5.1, 4.2, 4.4], margin=0.2)
    ('0.42 [0.26, 0.58]', 'different')
    """
    pairs = list(zip(values, others, strict=True))
    missing = sum(None in pair for pair in pairs)
    if missing:
        return "–", f"not reached in {missing} of {len(pairs)} seeds"
    mean, low, high = paired_difference([value - other for value, other in pairs])
    return cell(mean, low, high), verdict(low, high, margin)


def paired_difference(d):
    """The mean of the seeds' differences and its 95 % interval -> (mean, low, high)."""
    mean = fmean(d)
    t = T_95[min(len(d), 21) - 2]
    reach = t * stdev(d) / math.sqrt(len(d))
    return mean, mean - reach, mean + reach


def verdict(low, high, margin):
    """What an interval lets one say.  margin: how large a difference counts as none."""
    different = low > 0 or high < 0
    equivalent = -margin < low and high < margin
    if equivalent:
        return "equivalent, though different" if different else "equivalent"
    return "different" if different else "cannot tell"


def heatmap(args):
    """One response as text, coloured by credit, above the value and target of each of its tokens.

    Text: a token is blue where the update makes it likelier (positive advantage), red where less
    likely; the darkest token has the largest advantage of the picture. A black bar begins a macro
    action, whose tokens share one advantage. ∎ is the EOS, which writes nothing.

    Value V (blue line): the critic's guess, in front of each token, of the reward to come. Before
    the first update it spikes where a sentence has just ended. The critic starts as a copy of the
    reward model, which was only ever read at the end of a response: to it, a text that stops in
    mid-sentence is a broken response, and one that stops after a full stop is a finished one.

    Target (red steps): what the critic is taught, GAE's mixture of the score, which arrives at the
    last token, and the critic's own guesses on the way. With λ = 0.95 the score's share fades in
    about 20 actions: 20 tokens in the arm `token`, 20 macro actions in `fixed`. That is why the red
    line of `token` keeps to V's level until shortly before the end, and that of `fixed` does not.

    Advantage = target - V, then whitened. So at token level every spike of V comes out as a red
    first word of the next sentence, which has done nothing wrong. Macro actions average V over
    their tokens, and the spikes with it.
    """
    samples = [read_sample(run, args.step, args.sample) for run in find_runs(args.runs)]
    png = args.png or "heatmap.png"
    draw_samples(samples, png)  # Appendix G
    return [f"wrote {png}"]


def read_sample(run, step, number):
    """One of the responses that a run keeps, {pieces: its tokens as text, seg, values, …}."""
    kept = [row for row in read_rows(run / "samples.jsonl") if row["step"] == step]
    if not 0 <= number < len(kept):
        what = f"sample {number} of step {step}"
        fail(f"{run}: no {what} in samples.jsonl, which keeps four of every tenth step")
    sigma = read_config(run).sigma
    return kept[number] | {"run": run.name + (f", σ {sigma}" if sigma != "equal" else "")}


def main(argv=None):
    """Run the command named on the command line, and print its lines."""
    args = parse(argv)  # Appendix H; args.command is the function that was named
    print0("\n".join(args.command(args)))


# Appendix A. Samples on held-out prompts: score, bestofn, passk
#
# Training scores are scores on training prompts. Here the final policies respond to prompts that
# no stage has seen. The noise of a sample is a function of (seed, prompt number, sample) alone, so
# neither batches, ranks nor other samples change it. Sampling is slow; so samples are kept in
# RUN/score/samples.jsonl, and drawn again only when a model's files have changed.


def sampled(args, count):
    """Yield (name, temperature as text, groups of samples) of every policy and temperature."""
    runs = {run: read_config(run) for run in find_runs(args.runs)}
    starts = {Path(cfg.sft): cfg for cfg in runs.values()} if args.sft else {}
    for folder, cfg in (starts | runs).items():
        name = "/".join(folder.parts[-2:])
        for temperature in args.temperature or [cfg.temperature]:
            label = f"{temperature:g}" if temperature else "greedy"
            yield name, label, samples_of(folder, cfg, temperature, count, args)


def samples_of(folder, cfg, temperature, count, args):
    """`count` samples of each of the first prompts by a run or SFT model: rows, a list a prompt."""
    device = sft.setup(args.device)  # under torchrun, the ranks meet
    path = folder / "score/samples.jsonl"
    model = folder / "model" if read_config(folder) else folder
    # What a sample and its scores depend on: settings, and when files were written.
    stamp = [cfg.max_prompt, cfg.max_response, cfg.top_k, cfg.no_eos_score, cfg.seed]
    if cfg.reward:
        stamp.append(os.stat(cfg.reward.rpartition(":")[0]).st_mtime)
    for part in filter(None, [model.resolve(), cfg.sft, cfg.reward_model]):  # maybe without RM
        if os.path.isabs(part) and not Path(part).is_dir():  # others are on the hub
            fail(f"{part}: no such folder")
        stamp += [file.stat().st_mtime for file in sorted(Path(part).glob("*.safetensors"))]
    kept = {}
    for row in sft.gather(read_rows(path) if sft.rank() == 0 else []):
        if row["drawn_with"] == stamp:
            kept[row["temperature"], row["prompt"], row["sample"]] = row
    held_out = {row["prompt"]: row for row in sft.load_share(cfg, "test")}  # each prompt once
    wanted = {}
    for number, row in enumerate(list(held_out.values())[: args.prompts]):
        for sample in range(count):
            key = temperature, row["prompt"], sample
            wanted[key] = row | {"number": number, "sample": sample, "text": row["prompt"]}
    jobs = [job for key, job in wanted.items() if key not in kept]
    if jobs:
        drawn = draw(jobs, temperature, model, cfg, device)
        path.parent.mkdir(exist_ok=True)
        sft.append(path, *(row | {"drawn_with": stamp} for row in drawn))
        kept |= {(temperature, row["prompt"], row["sample"]): row for row in drawn}
    rows = [kept[key] for key in wanted]
    return [rows[i : i + count] for i in range(0, len(rows), count)]


def draw(jobs, temperature, model, cfg, device):
    """Sample and score all jobs, shared among the ranks -> rows, on every rank."""
    cfg = replace(cfg, shard=False)  # models that do not learn fit on one device
    # As training does; in `rloo` there is no critic.
    models, _, _ = ma_ppo.load_models("rloo", cfg, device)
    models["policy"], tokenizer = sft.load_causal_lm(model)
    sft.prepare(models["policy"], cfg, device)
    mine = jobs[sft.rank() :: sft.world()]
    rows = []
    parts = sft.micro_slices(len(mine), cfg.micro_batch_size)
    for part in tqdm(parts, desc=f"samples of {model}", disable=sft.rank() > 0):
        rows += respond(mine[part], temperature, models, tokenizer, cfg)
    return sft.gather(rows)


@torch.no_grad()
def respond(jobs, temperature, models, tokenizer, cfg):
    """Respond to the prompts of one batch, score the responses as training does -> a row each."""
    tokens = sft.encode(jobs, tokenizer, cfg, ["prompt"])
    examples = [job | ids for job, ids in zip(jobs, tokens, strict=True)]
    # Log-probabilities are taken at the run's own temperature where sampling is greedy.
    cfg = replace(cfg, temperature=temperature or cfg.temperature)
    sampling = cfg if temperature else replace(cfg, top_k=1)
    rollout = ma_ppo.sample(models["policy"], examples, 0, tokenizer, sampling)
    scored = ma_ppo.score(rollout, models, examples, tokenizer, cfg)
    judged = ma_ppo.judge(rollout.batch, models, cfg)
    columns = {
        "rm_score": scored.scores,
        "gold_score": scored.gold,
        "passed": scored.passed,
        "kl": (judged.logprobs - judged.ref_logprobs).sum(1),  # its mean over samples is the KL
        "length": rollout.batch.mask.sum(1),
        "ended": ma_ppo.ended(rollout.batch, tokenizer),
    }
    rows = []
    for i, (job, text) in enumerate(zip(jobs, rollout.texts, strict=True)):
        row = {key: job[key] for key in ("number", "sample", "prompt")}
        row |= {"temperature": temperature, "response": text, "distinct": distinct(text)}
        row |= {key: None if x is None else x[i].item() for key, x in columns.items()}
        rows.append(row)
    return rows


def distinct(text):
    """Share of distinct word trigrams among all of a text; None below three words."""
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else None


def score(args):
    """The policies on held-out prompts: means with 95 % intervals (bootstrap over prompts).

    Shares: `passed`, of programs that pass all of their tests; `ended`, of responses that were not
    cut; `distinct`, of the different ones among a text's word trigrams.
    """
    columns = ["rm_score", "gold_score", "passed", "kl", "length", "ended", "distinct"]
    lines = []
    for name, temperature, groups in sampled(args, args.samples):
        cells = []
        for key in columns:
            known = [[row[key] for row in group if row[key] is not None] for group in groups]
            cells.append(interval([fmean(values) for values in known if values]))
        lines.append([name, temperature, sum(map(len, groups)), *cells])
    return table(["policy", "temperature", "samples", *columns], lines)


def bestofn(args):
    """Best of n: the scores of the sample that the RM picks among n, and what they cost in KL.

    The best of n samples is log n - (n - 1) / n nats away from the policy that wrote them.
    """
    rows = []
    for name, temperature, groups in sampled(args, max(args.best_of)):
        for n in args.best_of:
            cells = []
            for key in ("rm_score", "gold_score"):
                known = groups if groups[0][0][key] is not None else []
                cells.append(interval([best_of_n(group, key, n) for group in known]))
            kl = math.log(n) - (n - 1) / n
            rows.append([name, temperature, n, kl, *cells])
    return table(["policy", "temperature", "n", "KL", "rm_score", "gold_score"], rows)


def best_of_n(samples, key, n):
    """Expected `key` of the sample with the highest rm_score of n, over all n-subsets of samples.

    The sample with `below` others under it is the best of C(below, n - 1) of the C(N, n) subsets.

    >>> samples = [{"rm_score": score, "gold_score": 10 * score} for score in (3, 1, 2)]
    >>> best_of_n(samples, "gold_score", 2)  # of (3, 1), (3, 2), (1, 2): 30, 30, 20
    26.666666666666668
    """
    ascending = sorted(samples, key=lambda row: row["rm_score"])
    sums = [row[key] * math.comb(below, n - 1) for below, row in enumerate(ascending)]
    return sum(sums) / math.comb(len(samples), n)


def passk(args):
    """pass@k: the probability that one of k programs passes all tests, bootstrap over problems."""
    rows = []
    for name, temperature, groups in sampled(args, max(*args.k, args.samples)):
        if groups[0][0]["passed"] is None:
            fail(f"{name}: no unit tests: pass@k is for program tasks")
        counts = [(len(group), sum(row["passed"] for row in group)) for group in groups]
        cells = [interval([pass_at_k(n, c, k) for n, c in counts]) for k in args.k]
        rows.append([name, temperature, len(groups), *cells])
    heads = [f"pass@{k}" for k in args.k]
    return table(["policy", "temperature", "problems", *heads], rows)


def pass_at_k(n, c, k):
    """Probability that one of k samples passes, from n of which c did (Chen et al., 2021).

    >>> pass_at_k(4, 1, 2)  # 3 of the 6 pairs hold the one that passes
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# Appendix B. Judges and duels
#
# The RM is what training has pushed against, so its word for the winner is suspect. In a duel two
# runs respond to the same prompts, and one judge or several say who is better: the RM, the gold
# score, a person, or a language model. A judge that knows no ties may prefer what it reads first,
# so a language model is asked in both orders, and contradicting itself makes a tie.

QUESTION = """[Prompt] {}

[Response 1] {}

[Response 2] {}

Which response is better, judged by {}? You may think first.
End with JSON: {{"winner": "1"}}, {{"winner": "2"}} or {{"winner": "tie"}}."""


def duel(args):
    """Wins of run A over run B, a row a judge, with 95 % intervals (Wilson).

    Win, tie and loss are shares of all pairs; what is missing to 1 had no verdict. What a person or
    a language model (its key: OPENAI_API_KEY) has said is kept in A/duel-B.jsonl.
    """
    runs = find_runs([args.a, args.b])
    if len(runs) != 2:
        fail("--a and --b must name one run each, not a folder of several")
    a, b = map(read_config, runs)
    for name in ["task", "data"] + ["reward_model"] * ("rm" in args.judge):
        if getattr(a, name) != getattr(b, name):
            fail(f"no duel: the runs differ in {name}")
    if "gold" in args.judge and a.task != "toy":
        fail(f"--judge gold: task {a.task} has no such score")
    sides = []
    for run, cfg in zip(runs, (a, b), strict=True):
        sides.append(samples_of(run, cfg, cfg.temperature, 1, args))
    pairs = [(one, two) for (one,), (two,) in zip(*sides, strict=True)]
    rows = []
    for judge in args.judge if sft.rank() == 0 else []:  # one rank asks
        verdicts = verdicts_of(judge, pairs, args)
        wins, ties, losses = (verdicts.count(x) for x in ("a", "tie", "b"))
        shares = [share_cell(x, len(pairs)) for x in (wins, ties, losses)]
        rows.append([judge, len(pairs), *shares, share_cell(wins, wins + losses)])
    return table(["judge", "pairs", "win", "tie", "loss", "of decided"], rows)


def share_cell(wins, count):
    """A share with Wilson's 95 % interval, as text."""
    return cell(wins / count, *reward.wilson_interval(wins, count)) if count else "–"


def verdicts_of(judge, pairs, args):
    """What one judge says of each pair of rows: "a", "b", "tie", or "none": it cannot be parsed."""
    if judge in ("rm", "gold"):
        scores = [[row[f"{judge}_score"] for row in pair] for pair in pairs]
        return ["tie" if a == b else "ab"[a < b] for a, b in scores]
    name = f"llm {args.judge_model}" if judge == "llm" else judge
    path = Path(args.a) / f"duel-{Path(args.b).name}.jsonl"
    kept = {tuple(row["pair"]): row["verdict"] for row in read_rows(path)}
    verdicts = []
    for a, b in tqdm(pairs, desc=name, disable=judge == "human"):
        pair = (name, a["prompt"], a["response"], b["response"])
        if pair not in kept:
            kept[pair] = asked(judge, a, b, args)
            sft.append(path, {"pair": pair, "verdict": kept[pair]})
        verdicts.append(kept[pair])
    return verdicts


def asked(judge, a, b, args):
    """The verdict of a person, who sees one order, by lot, or of a model, which sees both."""
    ask, orders = ask_llm, ["ab", "ba"]
    if judge == "human":
        lot = np.random.default_rng(a["number"]).integers(2)
        ask, orders = ask_human, [orders[lot]]
    votes = set()
    for order in orders:
        one, two = (a, b) if order == "ab" else (b, a)
        texts = [a["prompt"], one["response"], two["response"], args.criterion]
        votes.add(winner(ask(QUESTION.format(*texts), args), order))
    if "none" in votes:
        return "none"
    return votes.pop() if len(votes) == 1 else "tie"


def winner(answer, order):
    """The verdict of an answer, in which the last "winner" counts, on responses in this order."""
    named = re.findall(r'"winner"\s*:\s*"?(\w+)', answer)
    names = {"1": order[0], "2": order[1], "tie": "tie"}
    return names.get(named[-1], "none") if named else "none"


def ask_human(question, args):
    """A person's answer, in the words of a language model."""
    # Control characters in a response must not reach the terminal.
    print("\n" + "".join(c for c in question if c.isprintable() or c == "\n"))
    typed = ""
    while typed not in ("1", "2", "tie"):
        typed = input("1, 2 or tie: ").strip()
    return json.dumps({"winner": typed})


def ask_llm(question, args):
    """The answer of a model with OpenAI's interface; the client tries again by itself."""
    try:
        import openai
    except ImportError:
        fail("--judge llm needs: pip install openai")
    key = os.environ.get("OPENAI_API_KEY", "none")  # servers at home need none
    messages = [{"role": "user", "content": question}]
    try:
        with openai.OpenAI(base_url=args.judge_url, api_key=key, max_retries=5) as client:
            reply = client.chat.completions.create(model=args.judge_model, messages=messages)
    except openai.APIError as error:
        fail(f"the judge: {error}; the same command goes on from here")
    return reply.choices[0].message.content or ""


# Appendix C. Credit against the truth
#
# An advantage is a guess: how much better an action was than expected. On a toy the truth can be
# had, for a small policy can go on from the same place again and again, each time anew:
#
#     V*(s_t)    the mean return, from token t on, of k continuations of the text before token t
#     A*         of a token: its reward + V*(the text after it) - V*(the text before it)
#
# That is delta, one step of surprise, with the truth in the critic's place. Does an estimator know
# what each token was worth? That is what the update asks: it makes single tokens likelier.
#
# V* has an error, too, far larger than the A* of a token. So how far A* really spreads is taken
# from elsewhere: every A* is a surprise, 0 on average, whatever came before. So they are
# uncorrelated: their squares add up, on average, to the square of their sum. That sum is return -
# V*(s_0), in which V* stands only once; the errors of two halves of the continuations are
# independent, and cancel in their product.


def credit(args):
    """Estimators of the advantage against the truth by continuations, before the first update.

    Correlations with A* of each token, its sampling error taken off; 95 % intervals by bootstrap
    over responses. The picture is `heatmap`'s, of the first response: the truth (A* summed over the
    actions of `fixed`; V* as target), then `token` and `fixed`. --trained: final policy and critic.
    """
    if args.continuations < 2 or args.continuations % 2:
        fail("--continuations must be an even number")
    # All arms start from the same models, and meet these responses first.
    run = find_runs(args.runs)[0]
    cfg = replace(read_config(run), shard=False)
    device = sft.setup(args.device)
    models, _, tokenizer = ma_ppo.load_models("fixed", cfg, device)
    if args.trained:
        models["policy"], _ = sft.load_causal_lm(run / "model")
        models["critic"] = reward.ScalarModel.load(run / "critic", tokenizer)
        for name in ("policy", "critic"):
            sft.prepare(models[name], cfg, device)
    prompts = ma_ppo.load_prompts(tokenizer, cfg)
    examples = sft.batch_rows(prompts, 0, cfg.batch_size, cfg.seed)[: args.responses]
    rollout = ma_ppo.sample(models["policy"], examples, 0, tokenizer, cfg)
    judged, scored, rewards = judge(rollout, models, examples, tokenizer, cfg)  # rewards: [B, T]
    count = args.continuations
    V, A = true_values(rollout, rewards, examples, count, models, tokenizer, cfg)
    mask = rollout.batch.mask  # [B, T]
    rows, shown = [], {}  # shown: {name: (seg, advantages, targets)}, [B, T] each
    for arm in ("token", "control", "whole", "fixed"):
        starts, _ = ma_ppo.cut(arm, rollout, judged.ref_logprobs, tokenizer, cfg)
        seg = segment.segment_ids(starts, mask)  # [B, T]
        guesses = ma_ppo.assign_credit(arm, rewards, judged.values, seg, mask, cfg)
        seg, advantages, targets = (x.cpu() for x in (seg, *guesses))
        sums = moments(advantages.double(), A, mask.cpu())  # [B, 6]
        rows.append([arm, interval(sums, correlation)])
        shown[arm] = seg, advantages, targets
    if args.png:
        # What an action of `fixed` was worth is the sum of what its tokens were.
        true = segment.pool(A.mean(0), seg, mask.cpu(), "sum").gather(1, seg)  # [B, T]
        shown = {"truth": (seg, true, V.mean(0)), "token": shown["token"], "fixed": shown["fixed"]}
        samples = []
        for name, (seg, advantages, targets) in shown.items():
            # As the update uses them: whitened over all responses.
            taught = ma_ppo.whiten(advantages, mask.cpu()), targets  # [B, T] each
            lesson = ma_ppo.Lesson(rollout.batch, None, judged.values, *taught, None, seg)
            first, *_ = ma_ppo.sample_rows(0, rollout, scored, lesson, examples, tokenizer)
            samples.append(first | {"run": name})
        draw_samples(samples, args.png)
    return table(["arm", "correlation with A*"], rows)


def judge(rollout, models, examples, tokenizer, cfg):
    """What is said of responses, and each token's reward.  -> (Judged, Scored, [B, T])"""
    judged = ma_ppo.judge(rollout.batch, models, cfg)
    scored = ma_ppo.score(rollout, models, examples, tokenizer, cfg)
    logprobs, ref_logprobs, _, _ = judged  # [B, T]
    mask = rollout.batch.mask  # [B, T]
    rewards = ma_ppo.token_rewards(scored.scores, logprobs, ref_logprobs, mask, cfg.beta)
    return judged, scored, rewards


@torch.no_grad()
def true_values(rollout, rewards, examples, count, models, tokenizer, cfg):
    """V* in front of each token, 0 behind, and A*, by two halves -> [2, B, T+1], [2, B, T]"""
    B, T = rewards.shape
    values = torch.zeros(2, B, T + 1, dtype=torch.float64)
    for t in tqdm(range(T), desc="continuations"):
        going = [i for i, tokens in enumerate(rollout.tokens) if t < len(tokens)]
        jobs = [(i, t, k) for i in going for k in range(count)]
        chosen = [examples[i] for i, _, _ in jobs]
        begun = [rollout.tokens[i][:t] for i, _, _ in jobs]
        # To the policy, what is there already is a longer prompt.
        prompts = [row["prompt"] + tokens for row, tokens in zip(chosen, begun, strict=True)]
        room = cfg.max_response - t  # no response becomes longer than in training
        noise = [np.random.default_rng([cfg.seed, *job]).random(room) for job in jobs]
        uniforms = torch.tensor(np.array(noise))  # [b, room]
        written = ma_ppo.generate(models["policy"], prompts, uniforms, tokenizer, cfg)
        responses = [tokens + more for tokens, more in zip(begun, written, strict=True)]
        asked = [row["prompt"] for row in chosen]
        batch = sft.make_batch(asked, responses, tokenizer.pad_token_id, models["policy"].device)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        anew = ma_ppo.Rollout(batch, responses, texts, seeds=[])
        *_, later = judge(anew, models, chosen, tokenizer, cfg)  # [b, T]
        returns = later[:, t:].sum(1).reshape(len(going), -1, 2)  # [responses, pairs, 2]
        values[:, going, t] = returns.double().mean(1).T.cpu()  # [2, responses]
    return values, rewards.cpu() + values.diff()


def moments(guesses, truths, mask):
    """Sums over each response's tokens.  guesses: [B, T]; truths: [2, B, T], by halves -> [B, 6]"""
    truth = truths.mean(0)  # [B, T]
    squares = truths.sum(2).prod(0)  # [B], (return - V*(s_0))^2
    products = [mask, guesses, truth, guesses**2, guesses * truth]
    return torch.stack([*(x.sum(1) for x in products), squares], 1).numpy()  # [B, 6]


def correlation(sums, axis):
    """Correlation of the guesses with the truth, of the moments [..., 6] added up along `axis`."""
    count, *totals = np.moveaxis(np.sum(sums, axis), -1, 0)
    guess, truth, guess_sq, product, truth_sq = (total / count for total in totals)
    spread = np.maximum(0, guess_sq - guess**2) * np.maximum(0, truth_sq - truth**2)
    # Where chance hides the truth's spread altogether, the division would be by 0.
    return np.clip((product - guess * truth) / np.maximum(spread**0.5, 1e-12), -1, 1)


# Appendix D. The horizon
#
# If macro actions do nothing but make decisions fewer, their length n and λ matter only together,
# as the tokens that credit spans: then runs of equal horizon learn equally fast.
def horizon(args):
    """Learning speed (mean score of all steps) against the effective horizon H = n / (1 - λ).

    `control` is token level, n = 1, with its own λ^(1/n). In arms that find their macro actions
    (whole, random, ...), n is their mean length. Medians over seeds, and in brackets the range.
    """
    groups = {}  # {(kind of macro action, λ): [(H, mean score) of each seed]}
    for run in find_runs(args.runs):
        rows = read_rows(run / "metrics.jsonl")
        kind, n, lam = actions_of(read_config(run), rows)
        reach = n / (1 - lam) if lam < 1 else math.inf
        groups.setdefault((kind, lam), []).append((reach, area(rows, "rm_score")))
    rows = []
    for (kind, lam), found in sorted(groups.items()):
        reach, scores = zip(*found, strict=True)
        tokens = f"{fmean(reach):.0f}".replace("inf", "∞")
        rows.append([kind, f"{lam:.3f}", tokens, len(found), spread(scores)])
    return table(["macro actions", "λ", "H, tokens", "seeds", "mean score"], rows)


def actions_of(cfg, rows):
    """The actions of a run -> (what they are, how many tokens they have, λ per action)."""
    if cfg.arm == "rloo":  # every token is credited with the whole return
        return "rloo", 1, 1.0
    if cfg.arm not in ("token", "control", "fixed"):
        return cfg.arm, area(rows, "macro_length"), cfg.lam
    n = cfg.ngram if cfg.arm == "fixed" else 1
    lam = cfg.lam ** (1 / cfg.ngram) if cfg.arm == "control" else cfg.lam
    return f"n = {n}", n, lam


# Appendix E. The report
def report(args):
    """Everything that the runs of a folder allow, as report.md in it, with the pictures beside."""
    out = Path(args.folder)
    runs = find_runs([out])
    cfg = read_config(runs[0])
    named = ["--runs", *runs]
    held_out = ["--prompts", args.prompts, "--device", args.device]
    commands = [[name, *named, "--png", out / f"{name}.png"] for name in ("curves", "heatmap")]
    if all((run / "model").is_dir() for run in runs):
        greedy = ["--temperature", cfg.temperature, 0]
        commands.append(["score", *named, *held_out, *greedy])
        if cfg.task in sft.PROGRAMS:
            commands.append(["passk", *named, *held_out, "--sft"])
        commands.append(["bestofn", *named, *held_out])
        judges = ["rm", "gold"] if cfg.task == "toy" else ["rm"]
        for run in runs[1:]:
            commands.append(["duel", "--a", run, "--b", runs[0], "--judge", *judges, *held_out])
    lines = [f"# {out.name}: {', '.join(run.name for run in runs)}\n"]
    for words in commands:
        words = [str(word) for word in words]
        chosen = parse(words)
        about = inspect.getdoc(chosen.command)
        lines += [f"## {words[0]}\n\n{about}\n\n    python eval.py {shlex.join(words)}\n"]
        lines += [*chosen.command(chosen), ""]
        if "--png" in words:
            lines += [f"![{words[0]}]({words[0]}.png)\n"]
    if sft.rank() == 0:
        (out / "report.md").write_text("\n".join(lines))
    return [f"wrote {out / 'report.md'}"]


# Appendix F. Finding runs, tables, intervals


def read_config(run):
    """The settings of a run, `arm` and `ranks` among them; None where there is no run."""
    path = Path(run) / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if "arm" not in found:  # the config.json of a model names none
        return None
    cfg = ma_ppo.Config()
    vars(cfg).update(found)
    return cfg


def find_runs(folders, arms=()):
    """The runs meant: each folder is one, or holds one an arm (those named, or all)."""
    runs = []
    for folder in map(Path, folders):
        found = [folder / arm for arm in arms]
        if not arms and not read_config(folder):
            found = [path for path in folder.glob("*") if read_config(path)]
            found.sort(key=lambda run: (run.name != "token", run.name))  # the baseline first
        runs += found or [folder]
    for run in runs:
        if not read_config(run):
            fail(f"{run}: no run of ma_ppo.py there")
    return runs


def read_arms(folders, names):
    """{arm: {seed: rows}}, the seeds in order; an arm is named after its folder."""
    arms = {}
    for run in find_runs(folders, names):
        seed = read_config(run).seed
        rows = read_rows(run / "metrics.jsonl")
        arm = run.name
        if seed in arms.get(arm, {}):  # runs/toy/fixed and runs/n10/fixed
            arm = "/".join(run.parts[-2:])
        if rows:  # or else it has only just begun
            arms.setdefault(arm, {})[seed] = rows
    if len({tuple(sorted(runs)) for runs in arms.values()}) != 1:
        seeds = [f"{arm} has {sorted(runs)}" for arm, runs in arms.items()]
        fail(f"all arms need the same seeds: {', '.join(seeds) or 'no run has done a step'}")
    return {arm: dict(sorted(runs.items())) for arm, runs in arms.items()}


def table(heads, rows):
    """The lines of a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in lines]


def cell(x, low=None, high=None):
    """A number, with its interval if there is one, as text."""
    if x is None or isinstance(x, int | str):
        return "–" if x is None else str(x)
    return f"{x:.2f}" if low is None else f"{x:.2f} [{low:.2f}, {high:.2f}]"


def interval(values, statistic=np.mean):
    """A statistic with its 95 % interval, as text: the values are drawn anew 2,000 times.

    The interval holds the middle 95 % of what is found (bootstrap). Too narrow for a few seeds.
    """
    if not len(values):
        return "–"
    values = np.asarray(values, dtype=float)  # [N, ...]
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    found = np.sort(statistic(values[picks], axis=1))  # [2000]
    return cell(statistic(values, axis=0), found[50], found[-51])


# Appendix G. Drawing

ARM_COLORS = {"token": "#0072B2", "fixed": "#D55E00", "control": "#009E73"}
PANELS = ["rm_score", "gold_score", "pass_rate", "response_length"]
WIDTH = 100  # characters in a line of text
FONT = {"family": "monospace", "fontsize": 9.5, "va": "center", "parse_math": False}


def save(figure, png):
    """Write a picture, and its folder if need be."""
    if sft.rank() == 0:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=110, format="png")


def draw_curves(arms, png):
    """The metrics of PANELS that all runs have against steps, and the score against KL."""
    shown = [key for key in PANELS if smoothed(arms, key)]
    colors = {arm: ARM_COLORS.get(arm, f"C{i + 3}") for i, arm in enumerate(arms)}
    figure = Figure(figsize=(2.6 * len(shown) + 2.6, 3), layout="constrained")
    *axes, last = figure.subplots(1, len(shown) + 1)
    for ax, key in zip(axes, shown, strict=True):
        for arm, y in smoothed(arms, key).items():  # [steps, seeds]
            ax.fill_between(range(len(y)), y.min(1), y.max(1), color=colors[arm], alpha=0.2, lw=0)
            ax.plot(y.mean(1), color=colors[arm], lw=2, label=arm)
        ax.set(xlabel=f"PPO steps, means of {SMOOTHING}", ylabel=key.replace("_", " "))
    # Of the two scores the gold score, where there is one: the RM's can be high and wrong.
    key = "gold_score" if "gold_score" in shown else "rm_score"
    kl = smoothed(arms, "kl")
    for arm, y in smoothed(arms, key).items():
        last.plot(kl[arm].mean(1), y.mean(1), color=colors[arm], lw=2)
    last.set(xlabel="KL to reference, nats", ylabel=key.replace("_", " "))
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=8, frameon=False)
    save(figure, png)


def draw_samples(samples, png):
    """Text and values of each sample, one under the other."""
    # One scale for all arms, or else a pale picture and a vivid one could mean the same.
    limit = max(abs(a) for sample in samples for a in sample["advantages"])
    layouts = [segment.lay_out(sample["pieces"], WIDTH) for sample in samples]
    heights = []  # inches
    for cells in layouts:
        heights += [0.28 * (cells[-1][1] + 1), 1.7]  # of its lines, and its values
    figure = Figure(figsize=(10, sum(heights) + len(layouts)), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    for i, (sample, cells) in enumerate(zip(samples, layouts, strict=True)):
        draw_text(axes[2 * i], cells, sample["seg"], sample["advantages"], limit)
        axes[2 * i].set_title(f"{sample['run']}: {sample['seg'][-1] + 1} macro actions")
        draw_values(axes[2 * i + 1], sample)
    save(figure, png)


def draw_text(ax, cells, seg, advantages, limit):
    """The text of a response: colours are advantages, bars begin macro actions."""
    begun = -1
    for token, line, left, text in cells:
        strength = advantages[token] / (limit or 1.0)  # -1 to 1
        tint = matplotlib.colormaps["RdBu"]((strength + 1) / 2)
        ax.barh(line + 0.5, len(text), 0.84, left, color=tint, lw=0)
        ink = "white" if abs(strength) > 0.75 else "black"
        ax.text(left, line + 0.52, text, color=ink, **FONT)
        if seg[token] > begun:
            ax.plot([left, left], [line + 0.04, line + 0.96], color="black", lw=1.5)
        begun = seg[token]
    ax.set(xlim=(0, WIDTH), ylim=(cells[-1][1] + 1, 0))
    ax.axis("off")


def draw_values(ax, sample):
    """The critic's value and target of every token; grey lines begin macro actions."""
    seg = sample["seg"]
    for begin in map(seg.index, set(seg)):
        ax.axvline(begin - 0.5, color="0.85", lw=0.8)
    ax.plot(sample["values"], color="C0", label="value V, in front of the token")
    ax.step(range(len(seg)), sample["targets"], where="mid", color="C3", label="target")
    ax.set(xlim=(-0.5, len(seg) - 0.5), xlabel="response token", ylabel="reward")
    ax.margins(y=0.2)  # room for the legend
    ax.legend(loc="upper left", ncols=2, frameon=False)


# Appendix H. The command line: each command, a function(args) -> lines of text, has its own options

CRITERION = "relevance, coherence, consistency and fluency"
MANY, NUMBER = {"nargs": "+"}, {"type": int}
NEEDED, SWITCH = {"required": True}, {"action": "store_true"}
OPTIONS = {  # default, help, and what else argparse must know
    "folder": ("", "the --out folder of ma_ppo.py"),
    "--runs": ([], "runs, or --out folders of ma_ppo.py", MANY | NEEDED),
    "--arms": ([], "only these arms, the first one the baseline", MANY),
    "--png": ("", "picture to write"),
    "--versus": ("", "the arm to compare with; empty: the first"),
    "--margin": ([0.25, 0.1], "see above", {"nargs": 2, "type": float}),
    "--step": (0, "PPO step; at 0 all arms have sampled the same", NUMBER),
    "--sample": (0, "which sample of that step", NUMBER),
    "--prompts": (128, "how many held-out prompts", NUMBER),
    "--samples": (1, "samples of each prompt", NUMBER),
    "--temperature": ([], "0: greedy; none: the run's own", MANY | {"type": float}),
    "--sft": (False, "the SFT models, too", SWITCH),
    "--best_of": ([1, 2, 4, 8, 16], "n", MANY | NUMBER),
    "--k": ([1, 5], "k", MANY | NUMBER),
    "--a": ("", "a run folder", NEEDED),
    "--b": ("", "its opponent's", NEEDED),
    "--judge": (["rm"], "who", MANY | {"choices": ["rm", "gold", "llm", "human"]}),
    "--judge_model": ("", "llm: its name"),
    "--judge_url": ("https://api.openai.com/v1", "llm: where it is"),
    "--criterion": (CRITERION, "what llm and human judge by"),
    "--responses": (16, "how many responses", NUMBER),
    "--continuations": (4, "from each token, even", NUMBER),
    "--trained": (False, "the final policy and critic", SWITCH),
    "--device": ("", "empty: cuda where there is one"),
}
SAMPLED = "--runs --prompts --temperature --sft --device "
COMMANDS = {
    report: "folder --prompts --device",
    curves: "--runs --arms --png",
    seeds: "--runs --arms --versus --margin --png",
    heatmap: "--runs --step --sample --png",
    score: SAMPLED + "--samples",
    bestofn: SAMPLED + "--best_of",
    passk: SAMPLED + "--samples --k",
    duel: "--a --b --judge --judge_model --judge_url --criterion --prompts --device",
    credit: "--runs --responses --continuations --trained --png --device",
    horizon: "--runs",
}


def parse(argv):
    """The command line -> its options, and `command`, the function that was named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, names in COMMANDS.items():
        about = inspect.getdoc(function)
        texts = {"help": about.split("\n")[0].replace("%", "%%"), "description": about}
        name = function.__name__
        command = commands.add_parser(name, **texts, formatter_class=sft.HelpFormatter)
        command.error = fail
        command.set_defaults(command=function)
        for name in names.split():
            default, about, *more = OPTIONS[name]
            command.add_argument(name, default=default, help=about, **dict(*more))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
