"""Chapter 5: evaluation, or what the runs show.

A run of chapter 4 leaves `metrics.jsonl`, a line per step: line k is the policy after k steps, on prompts that
it has not seen before. The paper's claim is about speed, so the measure of these is *steps to parity*: smooth
scores over 5 steps; the target is the first run's start plus a share (50 % or 90 %) of its gain; divide a run's
first step at the target by the first run's. Below 1 is faster. The final policy is measured on held-out prompts.

    python eval.py report runs/toy                           # all that follows, in runs/toy/report.md
    python eval.py curves --run runs/toy --png curves.png    # over seeds: --run runs/seed0 runs/seed1 runs/seed2
    python eval.py score --run runs/toy/token runs/toy/fixed --temperature 1 0 --references
    python eval.py bestofn --run runs/toy --n 1 2 4 8 16 32 --png bestofn.png
    python eval.py duel --a runs/toy/fixed --b runs/toy/token --judge rm gold    # likewise: frontier, passk
    python eval.py heatmap --run runs/toy/token runs/toy/fixed --png heatmap.png
"""

import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser

import ma_ppo
import reward
import sft
from sft import fail, opt

SMOOTHING, RESAMPLES = 5, 2000  # steps; of the bootstrap
SCORES = {"rm_score": "RM score", "gold_score": "gold score"}
FIGURES = [*SCORES.values(), "gold gain (SD)", "KL", "EOS rate", "RM 50 %", "RM 90 %", "gold 50 %", "gold 90 %",
           "s/step", "RM area", "gold area"]  # fmt: skip


def bootstrap(values, statistic=np.mean):
    """A statistic and its percentile 95 % interval -> (value, low, high); (None,) without values.

    Resampling is seeded. For a handful of values, such as seeds, the interval is too narrow.
    """
    if not len(values):
        return (None,)
    values = np.asarray(values, dtype=float)  # [N]
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))  # [RESAMPLES, N]
    found, edge = np.sort(statistic(values[picks], axis=1)), RESAMPLES // 40  # [RESAMPLES]
    return float(statistic(values, axis=0)), float(found[edge]), float(found[-edge - 1])


def exact_share(wins, count):
    """wins / count and its Clopper-Pearson 95 % interval -> (share, low, high); (None,) where count is 0."""
    edges, factorial = [], [math.lgamma(i + 1) for i in range(count + 1)]  # logarithms
    for k, level in ((wins, 0.025), (wins + 1, 0.975)):  # the share p at which P(k wins or more) = level
        low, high = float(k > count), float(k > 0)
        while high - low > 1e-12:
            p = (low + high) / 2
            tail = (i * math.log(p) + (count - i) * math.log1p(-p) - factorial[i] - factorial[count - i]
                    for i in range(k, count + 1))  # fmt: skip
            low, high = (p, high) if sum(math.exp(factorial[-1] + x) for x in tail) < level else (low, p)
        edges.append(low)
    return (wins / count, *edges) if count else (None,)


def pass_at_k(n, c, k):
    """Probability that one of k samples passes, from n samples of which c did: unbiased (Chen et al., 2021)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} of {n} passing: needs 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_n(scores, worths, n):
    """Expected worth of the highest-scored of n samples, over all n-subsets; of equal scores the later one."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    picked = sum(worths[i] * math.comb(below, n - 1) for below, i in enumerate(order))
    return picked / math.comb(len(scores), n)


def agreement(ours, theirs):
    """Two judges' verdicts -> (pairs that both judged, share of equal verdicts, Cohen's kappa or None)."""
    both = [(x, y) for x, y in zip(ours, theirs, strict=True) if not {x, y} & {None, "unparsable"}]
    if not both:
        return 0, None, None
    (left, right), equal = zip(*both, strict=True), fmean(x == y for x, y in both)
    chance = sum(left.count(v) * right.count(v) for v in {*left}) / len(both) ** 2
    return len(both), equal, (equal - chance) / (1 - chance) if chance < 1 else None


def cell(x, low=None, high=None):
    """A number, with its interval if there is one, as text."""
    return "–" if x is None else f"{x:.2f}" if low is None else f"{x:.2f} [{low:.2f}, {high:.2f}]"


def table(heads, rows):
    """The lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


# Training: what metrics.jsonl tells
def column(rows, key):
    """A metric's value at every step, or None where the run does not have it."""
    values = [row.get(key) for row in rows]
    return None if None in values else values


def smooth(values, width=SMOOTHING):
    """Mean over the last `width` steps, fewer at the beginning."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def steps_to(values, target):
    """The first step at which the smoothed values reach the target; None if they never do."""
    return next((step for step, value in enumerate(smooth(values)) if value >= target), None)


def parity(baseline, values, share):
    """Steps of `values` to the baseline's start + share of its gain, over its own; None if there are none."""
    start, end = baseline[0], smooth(baseline)[-1]
    own, other = (steps_to(x, start + share * (end - start)) for x in (baseline, values))
    return None if end <= start or not own or other is None else other / own


def figures(baseline, rows):
    """What a run comes to, as named in FIGURES: smoothed at the end, then parities, median, means; or None."""
    columns = (column(rows, key) for key in (*SCORES, "kl", "eos_rate"))
    rm, gold, kl, eos = (values and smooth(values)[-1] for values in columns)
    deviation = rows[0].get("gold_score_std")  # of step 0's samples
    gain = (gold - rows[0]["gold_score"]) / deviation if gold is not None and deviation else None
    pairs = [(column(baseline, key), column(rows, key)) for key in SCORES]
    ratios = [None if None in pair else parity(*pair, share) for pair in pairs for share in (0.5, 0.9)]
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return [rm, gold, gain, kl, eos, *ratios, seconds, *(own and fmean(own) for _, own in pairs)]


def read_rows(path):
    """The rows of a .jsonl file, if there is one; without a last line that an interruption cut short."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def runs_of(folders, names=()):
    """The run folders meant: each folder is one, or holds one per arm (those named, or all, `token` first)."""
    runs = []
    for folder in map(Path, folders):
        held = [path.parent for path in folder.glob("*/metrics.jsonl") if '"rm_score"' in path.read_text()]
        held = [folder / name for name in names] or sorted(held, key=lambda run: (run.name != "token", run))
        runs += [folder] if not held or (not names and (folder / "metrics.jsonl").is_file()) else held
    return runs


def arms_of(args):
    """{arm: the metrics of its seeds}.  Of folders that hold runs, those of one name are one arm's seeds."""
    arms, runs = {}, runs_of(args.run, args.arms)
    for run in runs:
        rows, name = read_rows(run / "metrics.jsonl"), run.name
        if not rows or "rm_score" not in rows[0]:
            fail(f"{run}: no PPO run there (no steps of one in metrics.jsonl)")
        if name in arms and runs == [*map(Path, args.run)]:  # runs named one by one are arms of their own
            name = "/".join(run.parts[-2:])
        arms.setdefault(name, []).append(rows)
    if len({len(seeds) for seeds in arms.values()}) > 1:
        fail(f"these arms have different numbers of seeds: {', '.join(arms)}")
    return arms


def paths(arms, key):
    """{arm: a smoothed metric, array [steps, seeds]}; empty where a run does not have the metric."""
    found = {arm: [column(rows, key) for rows in seeds] for arm, seeds in arms.items()}
    known = None not in [values for seeds in found.values() for values in seeds]
    return {a: np.array([*zip(*map(smooth, seeds), strict=False)]) for a, seeds in found.items() if known}


def curves(args):
    """Learning curves in training, and steps to parity with the first arm.  An area is a mean over all steps."""
    arms, panels, units = arms_of(args), [], {"kl": "nats per response", "response_length": "tokens"}
    for key in (*SCORES, *units):
        lines = [{"label": arm, "x": range(len(y)), "y": y.mean(1), "band": (y.min(1), y.max(1)),
                  "raw": column(arms[arm][0], key) if y.shape[1] == 1 else None}
                 for arm, y in paths(arms, key).items()]  # fmt: skip
        panels += [(key.replace("_", " "), "PPO steps", units.get(key, "score"), lines)] if lines else []
    plot(args.png, panels, f"mean of {SMOOTHING} steps")

    def closing(numbers, how):
        lines = []
        for arm, runs in arms.items():
            values = [*zip(*map(figures, next(iter(arms.values())), runs), strict=True)]
            lines.append([arm, *(spread(values[i], how) for i in numbers)])
        return table(["arm", *(FIGURES[i] for i in numbers)], lines)

    if all(len(seeds) == 1 for seeds in arms.values()):
        return closing(range(10), "")
    return [*closing(range(9), "mean" if args.mean else ""), "", *closing((5, 6, 7, 8, 10, 11), "bootstrap")]


def spread(values, how=""):
    """A figure over seeds: median (range), median [bootstrap] or mean ± s.d.; None counts as infinite."""
    ordered = sorted(math.inf if value is None else value for value in values)
    if len(values) == 1 or ordered[0] == math.inf:
        return cell(values[0])
    if how == "bootstrap":
        return cell(*bootstrap(ordered, np.median))
    if how == "mean" and ordered[-1] < math.inf:
        return f"{fmean(ordered):.2f} ± {stdev(ordered):.2f}"
    return f"{median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def frontier(args):
    """Reward against KL in training, smoothed: gain per nat, and the score at the largest KL common to all."""
    arms, panels = arms_of(args), []
    kl = {arm: nats.mean(1) for arm, nats in paths(arms, "kl").items()}  # [steps] each
    common = min(nats.max() for nats in kl.values())
    heads, lines = ["arm", "KL at the end"], {arm: [arm, cell(nats[-1])] for arm, nats in kl.items()}
    for key, name in SCORES.items():
        score = {arm: y.mean(1) for arm, y in paths(arms, key).items()}  # [steps] each
        for arm, y in score.items():
            lines[arm].append(cell((y[-1] - y[0]) / kl[arm][-1] if kl[arm][-1] > 0 else None))
            lines[arm].append(cell(np.interp(common, np.maximum.accumulate(kl[arm]), y)))  # when first there
        heads += [f"{name} per nat", f"{name} at {common:.2f} nats"] if score else []
        found = [{"label": arm, "x": kl[arm], "y": y} for arm, y in score.items()]
        panels += [(name, "KL to the reference, nats", "score", found)] if score else []
    plot(args.png, panels, f"mean of {SMOOTHING} steps")
    return table(heads, lines.values())


# Samples on held-out prompts
DEFAULT = ma_ppo.Config()


def run_config(folder, args):
    """A run's settings, and its model's folder."""
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if "task" not in found:
        fail(f"{folder}: no run there (config.json is missing, or not that of a run)")
    cfg = ma_ppo.Config(**{name: found[name] for name in found if hasattr(DEFAULT, name)})
    for name in ("sft", "reward_model"):  # a run that was moved took its stages along
        if not Path(getattr(cfg, name)).is_dir():
            setattr(cfg, name, str(path.parent.parent / name.removesuffix("_model")))
    return replace(cfg, micro_batch_size=args.micro_batch_size or cfg.micro_batch_size), path.parent / "model"


def drawn(args, count):
    """Yield (policy, temperature, [the scored samples of each prompt]) of every run at every temperature."""
    runs = runs_of(args.run)
    for run in runs:
        cfg, model = run_config(run, args)
        for t in args.temperature or [cfg.temperature]:
            yield (
                "/".join(run.parts[-2:]),
                f"{t:g}" if t else "greedy",
                samples(run, cfg, model, t, count, args),
            )
    if args.references:
        yield "references", "–", samples(runs[0], *run_config(runs[0], args), "references", 1, args)


def samples(run, cfg, model, temperature, count, args):
    """`count` scored samples of each of the first args.prompts held-out prompts -> [[row, ...] of a prompt].

    A sample's noise is a function of (seed, sample, prompt number): no other samples, batches or ranks change
    it. So what RUN/score/samples.jsonl has, if these are still the weights, is not drawn again.
    """
    path, stamp = (
        run / "score" / "samples.jsonl",
        sum(x.stat().st_mtime_ns for x in model.glob("*.safetensors")),
    )
    kept = {(row["temperature"], row["sample"], row["number"]): row for row in read_rows(path)
            if not model.is_dir() or row["drawn_with"] == stamp}  # fmt: skip
    if model.is_dir():
        rows = sft.split(sft.load_rows(cfg.task, tuple(cfg.data)), "test")
        prompts = [*{row["prompt"]: row for row in reversed(rows)}.values()][::-1][: args.prompts]
        prompts = [row | {"number": i, "text": row["prompt"]} for i, row in enumerate(prompts)]
        missing = [(s, row) for s in range(count) for row in prompts if (temperature, s, row["number"]) not in kept
                   and (temperature != "references" or row.get("response"))]  # fmt: skip
        for row in draw(missing, temperature, cfg, model, args) if missing else ():
            kept[temperature, row["sample"], row["number"]] = row | {"drawn_with": stamp}
        if missing and sft.rank() == 0:
            sft.make_folder(path.parent)
            path.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
        if sft.world() > 1:
            torch.distributed.barrier()  # no rank may read the file before it is complete
    found = [row for (t, s, i), row in kept.items() if t == temperature and s < count and i < args.prompts]
    found.sort(key=lambda row: (row["number"], row["sample"]))
    groups = [[*group] for _, group in groupby(found, lambda row: row["number"])]
    if (fewest := min(map(len, groups), default=0)) < count:
        why = "the data has no responses" if model.is_dir() else f"there is no {model} to draw more"
        fail(
            f"{run}: {count} samples a prompt are needed at temperature {temperature}, {fewest} are kept; {why}"
        )
    return groups


def draw(jobs, temperature, cfg, model, args):
    """Sample and score every (sample number, task row) in `jobs`, shared among the ranks -> rows."""
    policy, tokenizer = sft.load_causal_lm(model, device := sft.setup(args.device))
    models = {"policy": policy, "reference": sft.load_causal_lm(cfg.sft, device)[0]}
    models |= dict.fromkeys(
        ("critic", "reward"), lambda batch: torch.zeros(batch.tokens.shape, device=device)
    )
    if "problem" not in jobs[0][1]:  # where there is one, unit tests take the RM's place
        if not (Path(cfg.reward_model) / reward.HEAD).is_file():
            fail(f"{cfg.reward_model}: no reward model there")
        models["reward"] = reward.ScalarModel.load(cfg.reward_model, device)
    made, mine = [], jobs[sft.rank() :: sft.world()]
    with tqdm(total=len(mine), desc=f"samples of {model.parent.name}", disable=sft.rank() != 0) as bar:
        for sample, group in groupby(mine, key=lambda job: job[0]):
            rows = [row for _, row in group]
            for part in sft.micro_slices(len(rows), cfg.micro_batch_size):
                made += respond(rows[part], temperature, sample, models, tokenizer, cfg)
                bar.update(len(rows[part]))
    return reward.gather(made)


def respond(rows, temperature, sample, models, tokenizer, cfg):
    """One micro-batch: respond, and judge as training does; greedy responses at the run's own temperature."""
    human, tested = temperature == "references", "problem" in rows[0]
    encoded = sft.encode(rows, tokenizer, cfg, ["prompt", "response"] if human else ["prompt"])
    examples = [row | ids for row, ids in zip(rows, encoded, strict=True)]
    if human:
        tokens, pad = [row["response"] for row in examples], tokenizer.pad_token_id
        batch = sft.make_batch([row["prompt"] for row in examples], tokens, pad, models["policy"].device)
        rollout = ma_ppo.Rollout(batch, [], tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True))
    else:
        cfg = replace(cfg, temperature=temperature or cfg.temperature)
        sampling = cfg if temperature else replace(cfg, top_k=1)
        rollout = ma_ppo.sample(models["policy"], examples, sample, tokenizer, sampling)
    ma_ppo.judge(rollout, models, examples, tokenizer, cfg)
    kl, ended = (
        (rollout.logprobs - rollout.ref_logprobs).sum(1),
        ma_ppo.ended(rollout.batch, tokenizer),
    )  # [B]
    scores = (
        reward.program_rewards(rollout.texts, [row["problem"] for row in rows]) if tested else rollout.scores
    )
    return [
        {"temperature": temperature, "number": row["number"], "sample": sample, "prompt": row["prompt"],
         "response": rollout.texts[i], "reference": row.get("response"), "length": len(rollout.tokens[i]),
         "ended": bool(ended[i]), "kl": None if human else float(kl[i]), "rm_score": float(scores[i]),
         "gold_score": rollout.gold and rollout.gold[i], "passed": bool(scores[i] == 1.0) if tested else None,
         "difficulty": (row.get("problem") or row).get("difficulty")}
        for i, row in enumerate(rows)
    ]  # fmt: skip


MEASURES = SCORES | {"passed": "pass rate", "kl": "KL", "length": "length", "ended": "EOS rate"}
MEASURES |= {"distinct_1": "distinct-1", "distinct_2": "distinct-2", "repeated": "repeated trigrams"}
MEASURES |= {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def score(args):
    """The final policies on held-out prompts: means over prompts with bootstrap 95 % intervals."""
    measured = [(*who, [[row | texture(row, args.rouge) for row in group] for group in groups])
                for *who, groups in drawn(args, args.samples)]  # fmt: skip
    keys = [
        k for k in MEASURES if any(r.get(k) is not None for *_, found in measured for g in found for r in g)
    ]
    lines = []
    for *who, groups in measured:
        values = ([[x for row in g if (x := row.get(key)) is not None] for g in groups] for key in keys)
        means = (cell(*bootstrap([fmean(x) for x in prompts if x])) for prompts in values)
        lines.append([*who, str(sum(map(len, groups))), *means])
    return table(["policy", "temperature", "samples", *(MEASURES[key] for key in keys)], lines)


def texture(row, rouge=False):
    """distinct-n (different n-grams of words / all), repeated trigrams (1 - distinct-3) and ROUGE's F1."""
    words = row["response"].split()
    grams = {n: [*zip(*(words[i:] for i in range(n)), strict=False)] for n in (1, 2, 3)}
    found = {f"distinct_{n}": len({*x}) / len(x) if x else None for n, x in grams.items()}
    found["repeated"] = found["distinct_3"] and 1 - found["distinct_3"]
    if rouge and row["reference"] and row["temperature"] != "references":
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            fail("--rouge needs a package: pip install rouge-score")
        scores = RougeScorer(["rouge1", "rouge2", "rougeL"], True).score(row["reference"], row["response"])
        found |= {key: value.fmeasure for key, value in scores.items()}
    return found


def bestofn(args):
    """Best of n: scores of the sample that the RM picks, against n and its KL, log n - (n - 1) / n."""
    lines, found, nats = [], {}, [math.log(n) - (n - 1) / n for n in args.n]
    for *who, groups in drawn(args, max(args.n)):
        cells = [[*who, str(n), cell(kl)] for n, kl in zip(args.n, nats, strict=True)]
        for key, name in [*SCORES.items()][: 1 if groups[0][0]["gold_score"] is None else 2]:
            pairs = [([row["rm_score"] for row in group], [row[key] for row in group]) for group in groups]
            picks = [[best_of_n(*pair, n) for pair in pairs] for n in args.n]
            cells = [[*row, cell(*bootstrap(values))] for row, values in zip(cells, picks, strict=True)]
            line = {"label": ", ".join(who), "y": [*map(fmean, picks)], "marker": "."}
            found.setdefault(name, []).append(line)
        lines += cells
    axes = (args.n, "n"), (nats, "KL of best of n, nats")
    panels = [(name, label, "score", [line | {"x": x} for line in found[name]])
              for x, label in axes for name in found]  # fmt: skip
    plot(args.png, panels, "policy, temperature")
    return table(["policy", "temperature", "n", "KL", *found], lines)


def passk(args):
    """pass@k: probability that one of k programs passes all tests, unbiased, with bootstrap intervals."""
    lines = []
    for *who, groups in drawn(args, max(*args.k, args.samples)):
        if groups[0][0]["passed"] is None:
            fail(f"{who[0]}: no unit tests, so nothing passes or fails; pass@k is for program tasks")
        levels = {group[0]["difficulty"] for group in groups if group[0].get("difficulty")}
        for level in ["all", *sorted(levels)]:
            counts = [(len(group), sum(row["passed"] for row in group)) for group in groups
                      if level in ("all", group[0].get("difficulty"))]  # fmt: skip
            cells = (cell(*bootstrap([pass_at_k(n, c, k) for n, c in counts])) for k in args.k)
            lines.append([*who, level, str(len(counts)), *cells])
    return table(["policy", "temperature", "difficulty", "problems", *(f"pass@{k}" for k in args.k)], lines)


# Duels: which of two responses to one prompt is better?
MATCHED = 0.1  # lengths match if they differ by at most this share of the longer one, in characters
PAUSES, TIMEOUT = (1, 2, 4, 8, 16), 60  # seconds: between attempts to reach the LLM, and of one attempt
SUMMARY, ANSWER = (
    "relevance, coherence, consistency and fluency",
    "factual accuracy, coherence and usefulness",
)
CRITERIA = {"toy": SUMMARY, "tldr": SUMMARY, "hh": "helpfulness", "webgpt": ANSWER}
SHOWN = "[Prompt]\n{}\n\n[Response 1]\n{}\n\n[Response 2]\n{}\n\nWhich response is better, judged by {}?"
FORMAT = ' Reply with JSON only: {"winner": "1"}, {"winner": "2"} or {"winner": "tie"}.'
HEADS = "judge/pairs/win/tie/loss/unparsable/wins of decided/wins at matched length/matched pairs".split("/")


def duel(args):
    """Wins of one run over another with exact 95 % intervals; lengths match if at most 10 % apart; Cohen's κ."""
    (cfg, _), (other, _) = (run_config(run, args) for run in (args.a, args.b))
    if (cfg.task, cfg.data) != (other.task, other.data):
        fail(
            f"a duel needs one task: {args.a} is of {cfg.task} {cfg.data}, {args.b} of {other.task} {other.data}"
        )
    if "rm" in args.judge and cfg.reward_model != other.reward_model:
        fail(f"no common judge: the reward models are {cfg.reward_model} and {other.reward_model}")
    at = (args.temperature or [cfg.temperature])[:1]
    both = drawn(replace(args, run=[args.a, args.b], temperature=at, references=False), 1)
    ours, theirs = ({group[0]["number"]: group[0] for group in groups} for *_, groups in both)
    firsts = {i: "ab"[np.random.default_rng([cfg.seed, i]).integers(2)] for i in ours if i in theirs}
    pairs = [(ours[i], theirs[i], first) for i, first in firsts.items()]
    folder = sft.make_folder(Path(args.a) / f"duel-{Path(args.b).name}")
    if sft.rank():
        return []
    said = {judge: verdicts(judge, pairs, folder / "answers.jsonl", cfg, args) for judge in args.judge}
    with (folder / "verdicts.jsonl").open("w") as file:
        for number, (a, b, first) in enumerate(pairs):
            row = {"number": a["number"], "first": first, "a": a["response"], "b": b["response"]}
            file.write(json.dumps(row | {judge: said[judge][number] for judge in said}) + "\n")
    lengths = [sorted((len(a["response"]), len(b["response"]))) for a, b, _ in pairs]
    lines = []
    for judge, given in said.items():
        close = [v for v, (low, high) in zip(given, lengths, strict=True) if high - low <= MATCHED * high]
        shares = [exact_share(given.count(verdict), len(given)) for verdict in ("a", "tie", "b")]
        decided = [exact_share(x.count("a"), x.count("a") + x.count("b")) for x in (given, close)]
        shares, decided = ([cell(*share) for share in x] for x in (shares, decided))
        lines.append(
            [judge, str(len(given)), *shares, str(given.count("unparsable")), *decided, str(len(close))]
        )
    kappas = [(x, y, *agreement(said[x], said[y])) for x, y in combinations(said, 2)]
    kappas = [[f"{x}, {y}", str(count), cell(equal), cell(kappa)] for x, y, count, equal, kappa in kappas]
    return table(HEADS, lines) + (
        ["", *table(["judges", "pairs", "agreement", "κ"], kappas)] if kappas else []
    )


def verdicts(judge, pairs, path, cfg, args):
    """Who wins each pair: "a", "b", "tie", or "unparsable".  What is answered at `path` is not asked again."""
    if key := {"rm": "rm_score", "gold": "gold_score"}.get(judge):
        if pairs[0][0][key] is None:
            fail(f"--judge {judge}: task {cfg.task} has no such score")
        return ["tie" if a[key] == b[key] else "a" if a[key] > b[key] else "b" for a, b, _ in pairs]
    kept, found = {row["question"]: row["answer"] for row in read_rows(path)}, []
    for a, b, first in tqdm(pairs, disable=judge == "human", desc="judge"):
        votes, second = [], "a" if first == "b" else "b"
        for one, two in ((first, second), (second, first))[: 1 if judge == "human" else 2]:
            shown = [{"a": a, "b": b}[x]["response"] for x in (one, two)]
            criteria = CRITERIA.get(cfg.task, "correctness, relevance, coherence and helpfulness")
            question = SHOWN.format(a["prompt"], *shown, criteria)
            name = hashlib.sha256(f"{judge} {args.judge_model} {question}".encode()).hexdigest()
            if name not in kept:
                kept[name] = ask_llm(question + FORMAT, args) if judge == "llm" else ask_human(question)
                with path.open("a") as file:
                    row = {"judge": judge, "number": a["number"], "first": one, "answer": kept[name]}
                    file.write(json.dumps(row | {"question": name}) + "\n")
            said = re.fullmatch(r'\s*{\s*"winner"\s*:\s*"(1|2|tie)"\s*}\s*', kept[name])  # JSON, no more
            votes.append({"1": one, "2": two, "tie": "tie"}[said[1]] if said else "unparsable")
        found.append("unparsable" if "unparsable" in votes else votes[0] if len({*votes}) == 1 else "tie")
    return found


def ask_human(question):
    """A verdict typed at the terminal."""
    answer, question = "", "".join(c for c in question if c.isprintable() or c == "\n")
    while answer not in ("1", "2", "tie"):
        answer = (
            input(f"\n{question}\n1, 2 or tie (Ctrl-C stops; the same command goes on): ").strip().lower()
        )
    return json.dumps({"winner": answer})


def ask_llm(question, args):
    """An OpenAI-compatible endpoint's answer; 429, 5xx, time-outs and lost connections are tried again."""
    key, headers = os.environ.get("OPENAI_API_KEY", ""), {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": args.judge_model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    url, data = args.judge_url.rstrip("/") + "/chat/completions", json.dumps(body).encode()
    for pause in (*PAUSES, None):
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                text = reply.read().decode(errors="replace")
            break
        except urllib.request.HTTPError as error:
            problem, again = f"HTTP {error.code}", error.code == 429 or error.code >= 500
        except (OSError, http.client.HTTPException) as error:
            problem, again = type(error).__name__, True
        if not again or pause is None:
            fail(
                f"the judge does not answer ({problem}); what it has said is kept: run the same command to go on"
            )
        time.sleep(pause)
    try:
        text = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        pass  # counted as unparsable
    return str(text).replace(key or "\0", "[key]")


# Appendix: report, pictures, command line
def report(args):
    """Everything that the runs of a folder allow, as report.md in it, with the pictures beside it."""
    out, runs = Path(args.run[0]), runs_of(args.run[:1])
    args, chapters = replace(args, references=True), [(curves, {}), (frontier, {})]
    if all((run / "model").is_dir() or (run / "score").is_dir() for run in runs):
        cfg, (*_, ((row, *_), *_)) = run_config(runs[0], args)[0], next(drawn(args, 1))
        chapters += [(score, {"temperature": [cfg.temperature, 0.0]}), (bestofn, {"references": False})]
        chapters += [(passk, {"references": False})] if row["passed"] is not None else []
        judges = ["rm"] if row["gold_score"] is None else ["rm", "gold"]
        chapters += [(duel, {"a": str(run), "b": str(runs[0]), "judge": judges}) for run in runs[1:]]
    chapters += [(heatmap, {})] if all((run / "samples.jsonl").is_file() for run in runs) else []
    lines = [f"# {out.name}: {', '.join(run.name for run in runs)}", ""]
    for command, changes in chapters:
        png = f"{command.__name__}.png" if command in (curves, frontier, bestofn, heatmap) else ""
        found = command(replace(args, **{"png": str(out / png) if png else ""} | changes))
        versus = f": {Path(changes['a']).name} against {runs[0].name}" if command is duel else ""
        lines += [f"## {command.__name__}{versus}", "", command.__doc__.split("\n")[0], "", *found, ""]
        lines += [f"![{command.__name__}]({png})", ""] if png else []
    if sft.rank() == 0:
        (out / "report.md").write_text("\n".join(lines))
    return [f"wrote {out / 'report.md'}"]


def plot(png, panels, legend):
    """Draw panels (title, x label, y label, lines) side by side; a line may have raw values and a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, xlabel, ylabel, lines) in zip(axes, panels, strict=True):
        for i, line in enumerate(lines):
            if line.get("raw"):
                ax.plot(line["x"], line["raw"], color=f"C{i}", alpha=0.25, linewidth=1)
            if "band" in line:
                ax.fill_between(line["x"], *line["band"], color=f"C{i}", alpha=0.2, linewidth=0)
            ax.plot(
                line["x"], line["y"], line.get("marker", "-"), color=f"C{i}", linewidth=2, label=line["label"]
            )
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
    axes[0].legend(title=legend)
    save(figure, png)


def save(figure, png):
    """Write a picture, and its folder if need be."""
    try:
        if png and sft.rank() == 0:
            Path(png).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(png, dpi=110)
    except (OSError, ValueError) as error:
        fail(f"cannot write {png}: {error}")


PAGE = 100  # characters in a line of the heatmap


def lay_out(pieces):
    """Break tokens into lines of at most PAGE characters.  Returns [(line, column, text)], one a token."""
    cells, line, column = [], 0, 0
    for piece in pieces:
        shown = piece.replace("\n", "⏎") or "∎"  # ∎: a token that writes nothing, usually the EOS
        line, column = (line + 1, 0) if column and column + len(shown) > PAGE else (line, column)
        cells.append((line, column, shown))
        column += len(shown)
    return cells


def heatmap(args):
    """One response, its tokens blue where they become likelier, red where less; bars begin macro actions."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    samples, runs = [], runs_of(args.run)
    for run in runs:
        kept = [row for row in read_rows(run / "samples.jsonl") if row["step"] == args.step]
        if not 0 <= args.sample < len(kept):
            fail(
                f"{run}: no sample {args.sample} of step {args.step} in samples.jsonl: it has four of every tenth"
            )
        samples.append(kept[args.sample])
    limit = max(abs(a) for row in samples for a in row["advantages"]) or 1.0
    heights = [x for row in samples for x in (0.25 * (lay_out(row["pieces"])[-1][0] + 1), 1.6)]  # inches
    figure = Figure(figsize=(10, sum(heights) + len(samples)), layout="constrained")
    axes = iter(figure.subplots(len(heights), 1, height_ratios=heights))
    for run, row, above, below in zip(runs, samples, axes, axes, strict=True):
        begins = [t for t, number in enumerate(row["seg"]) if t == 0 or number != row["seg"][t - 1]]
        cells = lay_out(row["pieces"])
        above.set(xlim=(0, PAGE), ylim=(cells[-1][0] + 1, 0))
        above.set_title(f"{run.name}: {len(begins)} macro actions", loc="left")
        above.axis("off")
        for t, (line, column, text) in enumerate(cells):
            strength = row["advantages"][t] / limit
            box = {"facecolor": colormaps["RdBu"](0.5 + 0.45 * strength), "linewidth": 0, "pad": 2.2}
            font = {
                "color": "white" if abs(strength) > 0.7 else "black",
                "family": "monospace",
                "fontsize": 9.3,
            }
            above.text(column, line + 0.5, text, va="center", parse_math=False, bbox=box, **font)
        below.vlines([t - 0.5 for t in begins], *below.get_ylim(), color="0.85", linewidth=0.8)
        below.plot(row["values"], color="C0", label="value V(s)")
        below.step(range(len(row["returns"])), row["returns"], where="mid", color="C3", label="return")
        below.set(xlim=(-0.5, len(row["seg"]) - 0.5), xlabel="response token", ylabel="reward")
        below.legend(loc="upper left", ncols=2, frameon=False)
    save(figure, args.png)
    return []


@dataclass
class Options:
    """Settings of the subcommands."""

    run: list[str] = opt([], "run folders of ma_ppo.py, or --out folders that hold one per arm")
    arms: list[str] = opt([], "curves, frontier: only these arms of the folders, the first one the baseline")
    mean: bool = opt(False, "curves, over seeds: mean ± standard deviation, not median (range)")
    png: str = opt("", "curves, frontier, bestofn, heatmap: picture to write")
    prompts: int = opt(128, "held-out prompts to sample, the first ones")
    samples: int = opt(1, "score, passk: samples of each prompt")
    temperature: list[float] = opt([], "of sampling, one or more, 0 for greedy; default: the run's own")
    references: bool = opt(False, "score: the human-written responses too")
    rouge: bool = opt(False, "score: ROUGE against the human-written responses (pip install rouge-score)")
    n: list[int] = opt([1, 2, 4, 8, 16], "bestofn: n")
    k: list[int] = opt([1, 5], "passk: k")
    a: str = opt("", "duel: a run folder")
    b: str = opt("", "duel: its opponent's")
    judge: list[str] = opt(["rm"], "duel: gold, rm, llm, human, or several")
    judge_url: str = opt("https://api.openai.com/v1", "llm: endpoint; the key is in OPENAI_API_KEY")
    judge_model: str = opt("", "llm: model")
    step: int = opt(0, "heatmap: PPO step; at 0 all arms have sampled the same")
    sample: int = opt(0, "heatmap: which sample of that step")
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    micro_batch_size: int = opt(0, "responses per forward pass and rank; 0: the run's own")


def main(argv=None):
    """Run the subcommand named on the command line, and print its table."""
    commands = (report, curves, frontier, score, bestofn, passk, duel, heatmap)
    commands = {command.__name__: command for command in commands} | {"seeds": curves}
    parser = HfArgumentParser(Options, description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("command", choices=commands, help="what to do")
    parser.add_argument("folder", nargs="?", help="report: the --out folder of ma_ppo.py")
    values = vars(parser.parse_args(argv))
    command, folder = values.pop("command"), values.pop("folder")
    args = Options(**values | {"run": [folder] if folder else values["run"]})
    needed = ("a", "b") if command == "duel" else ("run", "png") if command == "heatmap" else ("run",)
    for name in needed:
        if not getattr(args, name):
            fail(f"{command} needs --{name}")
    if min(args.prompts, args.samples, *args.n, *args.k) < 1 or min(args.temperature, default=0) < 0:
        fail("--prompts, --samples, --n and --k must be at least 1, --temperature at least 0")
    if not {*args.judge} <= {"gold", "rm", "llm", "human"} or ("llm" in args.judge and not args.judge_model):
        fail("--judge is one or more of gold, rm, llm and human, and llm needs --judge_model")
    try:
        torch.empty(0, device=sft.setup(args.device))
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if command == "seeds":
        args.arms = args.arms or ["token", "fixed"]
    try:
        sft.print0("\n".join(commands[command](args)))
    except (KeyboardInterrupt, EOFError):
        fail("interrupted; verdicts given so far are kept: the same command goes on")


if __name__ == "__main__":
    main()
