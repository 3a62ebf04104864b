"""Chapter 5: evaluation, or what the runs show.

A run of chapter 4 leaves `metrics.jsonl`, a line per step, and its final policy, measured here on held-out
prompts. The paper's claim is about speed, so the measure is *steps to parity*: smooth scores over 5 steps; a
target is the first run's start + a share of its gain; divide a run's first step there by the first run's.

    python eval.py report runs/toy                           # all that follows, in runs/toy/report.md
    python eval.py curves --run runs/toy --png curves.png    # seeds: --run runs/seed0 runs/seed1 runs/seed2
    python eval.py score --run runs/toy-code --sft           # held-out pass rates, of the SFT model too
    python eval.py duel --a runs/toy/fixed --b runs/toy/token --judge rm gold   # bestofn, frontier, …
"""

import json
import math
import os
import re
import time
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, groupby, product
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
import torch
from matplotlib import colormaps, figure, patches
from tqdm import tqdm
from transformers import HfArgumentParser

import ma_ppo
import reward
import sft
from sft import fail, opt

SMOOTHING, RESAMPLES, ROUGE = 5, 2000, ["rouge1", "rouge2", "rougeL"]  # steps; of the bootstrap; kinds
CREDIT = {"step", "pieces", "seg", "values", "advantages", "returns"}
SCORES = {"rm_score": "RM score", "gold_score": "gold score"}
FIGURES = ["RM score", "gold score", "gold gain (SD)", "KL", "EOS rate", "RM 50 %", "RM 90 %", "gold 50 %",
           "gold 90 %", "s/step", "RM area", "gold area", "pass rate"]  # fmt: skip


def bootstrap(values, statistic=np.mean):
    """A statistic and its percentile 95 % interval -> (value, low, high).  Of few values it is too narrow."""
    if not len(values):
        return (None,)
    values = np.asarray(values, dtype=float)  # [N]
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))  # [RESAMPLES, N]
    found, edge = np.sort(statistic(values[picks], axis=1)), RESAMPLES // 40  # [RESAMPLES]
    return float(statistic(values, axis=0)), float(found[edge]), float(found[-edge - 1])


def pass_at_k(n, c, k):
    """Probability that one of k samples passes, from n of which c did: unbiased (Chen et al., 2021)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} with {c} of {n} passing: needs 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_n(scores, worths, n):
    """Expected worth of the highest-scored of n samples, over all n-subsets; the last one of equals."""
    order = enumerate(sorted(range(len(scores)), key=scores.__getitem__))
    return sum(worths[i] * math.comb(below, n - 1) for below, i in order) / math.comb(len(scores), n)


def agreement(ours, theirs):
    """Two judges' verdicts -> (pairs that both judged, share of equal verdicts, Cohen's kappa or None)."""
    both = [(x, y) for x, y in zip(ours, theirs, strict=True) if "unparsable" not in (x, y)]
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


def column(rows, key):
    """A metric's value at every step, or None where the run does not have it."""
    values = [row.get(key) for row in rows]
    return None if None in values else values


def smooth(values, width=SMOOTHING):
    """Mean over the last `width` steps, fewer at the beginning."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def parity(baseline, values, share):
    """Steps of `values` to the baseline's start + share of its gain, over its own; None if there are none."""
    start, end = baseline[0], smooth(baseline)[-1]
    target = start + share * (end - start)
    own, other = (next((i for i, y in enumerate(smooth(x)) if y >= target), None) for x in (baseline, values))
    return None if end <= start or not own or other is None else other / own


def figures(baseline, rows):
    """What a run comes to, as named in FIGURES: at the end smoothed, then parities, median, means."""
    columns = (column(rows, key) for key in (*SCORES, "kl", "eos_rate", "pass_rate"))
    rm, gold, kl, eos, passed = (values and smooth(values)[-1] for values in columns)
    known = gold is not None and rows[0]["gold_score_std"] > 0
    gain = (gold - rows[0]["gold_score"]) / rows[0]["gold_score_std"] if known else None
    pairs = [(column(baseline, key), column(rows, key)) for key in SCORES]
    ratios = [None if None in pair else parity(*pair, share) for pair in pairs for share in (0.5, 0.9)]
    seconds = sorted(row["seconds"] for row in rows)[len(rows) // 2]
    return [rm, gold, gain, kl, eos, *ratios, seconds, *(own and fmean(own) for _, own in pairs), passed]


def read_rows(path, keys=frozenset()):
    """The rows of a .jsonl file, if there is one, which have `keys`; a last line cut short does not count."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    if (keys and not rows) or any(not isinstance(row, dict) or not keys <= row.keys() for row in rows):
        fail(f"{path}: no PPO run there, or lines of something else in it")
    return rows


def runs_of(folders, names=()):
    """The run folders meant: each folder is one, or holds one an arm (those named, or all, `token` first)."""
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
        rows, name = read_rows(run / "metrics.jsonl", {"rm_score", "kl", "seconds"}), run.name
        name = max((arm for arm in args.arms if run.as_posix().endswith("/" + arm)), key=len, default=name)
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
    """Learning curves in training, steps to parity with the first arm, areas under the curves (means)."""
    arms, panels, tables = arms_of(args), [], []
    shown = {"pass_rate": "pass rate", "kl": "KL to reference, nats", "response_length": "length, tokens"}
    tested = [12] if paths(arms, "pass_rate") else []
    shown = SCORES | ({"rm_score": "score of the unit tests"} if tested else {}) | shown
    for key, title in shown.items():
        lines = [{"label": arm, "x": range(len(y)), "y": y.mean(1), "band": (y.min(1), y.max(1)),
                  "raw": column(arms[arm][0], key) if y.shape[1] == 1 else None}
                 for arm, y in paths(arms, key).items()]  # fmt: skip
        panels += [(title, "PPO steps", title, lines)] if lines else []
    plot(args.png, panels, f"mean of {SMOOTHING} steps")
    first, single = next(iter(arms.values())), all(len(seeds) == 1 for seeds in arms.values())
    compared = {arm: [*zip(*map(figures, first, seeds), strict=True)] for arm, seeds in arms.items()}
    how = "mean" if args.mean else "range"
    over_seeds = [([*range(9), *tested], how), ((5, 6, 7, 8, 10, 11), "bootstrap")]
    for numbers, how in [([*range(10), *tested], "range")] if single else over_seeds:
        rows = [[arm, *(spread(values[i], how) for i in numbers)] for arm, values in compared.items()]
        tables += ["", *table(["arm", *(FIGURES[i] for i in numbers)], rows)]
    return tables[1:]


def spread(values, how="range"):
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
    """Reward against KL in training, smoothed: gain per nat, and the score at a KL that all reach."""
    arms, panels = arms_of(args), []
    kl = {arm: nats.mean(1) for arm, nats in paths(arms, "kl").items()}  # [steps] each
    common = min(nats.max() for nats in kl.values())
    heads, lines = ["arm", "KL at the end"], {arm: [arm, cell(nats[-1])] for arm, nats in kl.items()}
    for key, name in SCORES.items():
        score = {arm: y.mean(1) for arm, y in paths(arms, key).items()}  # [steps] each
        for arm, y in score.items():
            lines[arm].append(cell((y[-1] - y[0]) / kl[arm][-1] if kl[arm][-1] > 0 else None))
            lines[arm].append(cell(np.interp(common, np.maximum.accumulate(kl[arm]), y)))  # when first there
        found = [{"label": arm, "x": kl[arm], "y": y} for arm, y in score.items()]
        heads += [f"{name} per nat", f"{name} at {common:.2f} nats"] if found else []
        panels += [(name, "KL to the reference, nats", "score", found)] if found else []
    plot(args.png, panels, f"mean of {SMOOTHING} steps")
    return table(heads, lines.values())


def run_config(folder, args):
    """A run's settings, and its model's folder."""
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if "task" not in found:
        fail(f"{folder}: no run there (config.json is missing, or not that of a run)")
    cfg = ma_ppo.Config(**{name: found[name] for name in found if name in vars(ma_ppo.Config())})
    return replace(cfg, micro_batch_size=args.micro_batch_size or cfg.micro_batch_size), path.parent / "model"


def drawn(args, count):
    """Yield (policy, temperature, [the scored samples of each prompt]) of every run at every temperature."""
    runs = [(run, *run_config(run, args)) for run in runs_of(args.run)]
    starts = {cfg.sft: (Path(cfg.sft), cfg, Path(cfg.sft)) for _, cfg, _ in runs if args.sft}
    for run, cfg, model in [*starts.values(), *runs]:
        for t in args.temperature or [cfg.temperature]:
            found = samples(run, cfg, model, t, count, args)
            yield "/".join(run.parts[-2:]), f"{t:g}" if t else "greedy", found
    if args.references:
        yield "references", "–", samples(run, cfg, model, "references", 1, args)


def samples(run, cfg, model, temperature, count, args):
    """`count` samples of each of args.prompts held-out prompts, kept in RUN/score or drawn -> a list each."""
    path, weights = run / "score/samples.jsonl", (Path(x) for x in (model, cfg.sft, cfg.reward_model) if x)
    stamp = [x.stat().st_mtime for folder in weights for x in sorted(folder.glob("*.safetensors"))]
    kept = {(row["temperature"], row["sample"], row["number"]): row for row in read_rows(path)
            if not model.is_dir() or row["drawn_with"] == stamp}  # fmt: skip
    if model.is_dir():
        rows = sft.load_share(cfg, "test")
        prompts = [*{row["prompt"]: row for row in reversed(rows)}.values()][::-1][: args.prompts]
        prompts = [row | {"number": i, "text": row["prompt"]} for i, row in enumerate(prompts)]
        usable = [row for row in prompts if temperature != "references" or row.get("response")]
        wanted, t = product(range(count), usable), temperature
        missing = [(s, row) for s, row in wanted if (t, s, row["number"]) not in kept]
        for row in draw(missing, temperature, cfg, model, args) if missing else ():
            kept[temperature, row["sample"], row["number"]] = row | {"drawn_with": stamp}
        if missing and sft.rank() == 0:
            sft.make_folder(path.parent)
            order = sorted(kept, key=lambda key: (str(key[0]), key[2], key[1]))
            path.write_text("".join(json.dumps(kept[key]) + "\n" for key in order))
        sft.save_run([], path.parent)  # ends in a barrier: no rank may read the file before it is complete
    found = [row for (t, s, i), row in kept.items() if t == temperature and s < count and i < args.prompts]
    found.sort(key=lambda row: (row["number"], row["sample"]))
    groups = [[*group] for _, group in groupby(found, lambda row: row["number"])]
    if (fewest := min(map(len, groups), default=0)) < count:
        fail(f"{run}: needs {count} samples a prompt at temperature {temperature}, has {fewest}, no {model}")
    return groups


def draw(jobs, temperature, cfg, model, args):
    """Sample and score every (sample number, task row) in `jobs`, shared among the ranks -> rows."""
    device, length = sft.setup(args.device), cfg.max_prompt + cfg.max_response
    policy, tokenizer = sft.load_causal_lm(model, length, device)
    models = {"policy": policy, "reference": sft.load_causal_lm(cfg.sft, length, device)[0]}
    zeros = lambda batch: torch.zeros(batch.tokens.shape, device=device)  # noqa: E731  [B, P+T]
    models["critic"] = zeros
    if "problem" not in jobs[0][1]:  # where there is one, unit tests take the RM's place
        if not (Path(cfg.reward_model) / reward.HEAD).is_file():
            fail(f"{cfg.reward_model}: no reward model there")
        models["reward"] = reward.ScalarModel.load(cfg.reward_model, device)
    for name in set(models) - {"critic"}:
        sft.prepare(models[name].requires_grad_(name == "policy"), replace(cfg, shard=False), device)
    groups = groupby(jobs[sft.rank() :: sft.world()], key=lambda job: job[0])
    mine, size = [(sample, [row for _, row in group]) for sample, group in groups], cfg.micro_batch_size
    mine = [(sample, rows[part]) for sample, rows in mine for part in sft.micro_slices(len(rows), size)]
    bar = tqdm(mine, desc=f"samples of {model.parent.name}", disable=sft.rank() != 0)
    drawn = [respond(rows, temperature, sample, models, tokenizer, cfg) for sample, rows in bar]
    return reward.gather(row for rows in drawn for row in rows)


def respond(rows, temperature, sample, models, tokenizer, cfg):
    """Respond, with noise of (seed, sample, prompt number), and judge as training does -> a row for each."""
    human, tested = temperature == "references", "problem" in rows[0]
    encoded = sft.encode(rows, tokenizer, cfg, ["prompt", "response"][: 1 + human])
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
    kl, ended = (rollout.logprobs - rollout.ref_logprobs).sum(1), ma_ppo.ended(rollout.batch, tokenizer)
    texts, scores = rollout.texts, rollout.scores.tolist()
    passed = rollout.passed.tolist() if tested else [None] * len(rows)
    return [
        {"temperature": temperature, "number": row["number"], "sample": sample, "prompt": row["prompt"],
         "response": texts[i], "reference": row.get("response"), "length": len(rollout.tokens[i]),
         "ended": bool(ended[i]), "kl": None if human else float(kl[i]), "rm_score": scores[i],
         "gold_score": rollout.gold and rollout.gold[i], "passed": passed[i],
         "difficulty": (row.get("problem") or row).get("difficulty")}
        for i, row in enumerate(rows)
    ]  # fmt: skip


def score(args):
    """The policies on held-out prompts: means, 95 % intervals (bootstrap; exact for one program each)."""
    lines, measured = [], [(*who, [[row | texture(row, args.rouge) for row in group] for group in groups])
                for *who, groups in drawn(args, args.samples)]  # fmt: skip
    names = [*SCORES, "passed", "kl", "length", "ended", "distinct_1", "distinct_2", "repeated", *ROUGE]
    keys = [k for k in names if any(row.get(k) is not None for *_, gs in measured for g in gs for row in g)]
    for *who, groups in measured:
        values = ([[x for row in g if (x := row.get(key)) is not None] for g in groups] for key in keys)
        means = {key: [fmean(x) for x in prompts if x] for key, prompts in zip(keys, values, strict=True)}
        found = {key: bootstrap(x) for key, x in means.items()}
        if args.samples == 1 and means.get("passed"):
            found["passed"] = reward.exact_share(round(sum(means["passed"])), len(means["passed"]))
        lines.append([*who, str(sum(map(len, groups))), *(cell(*found[key]) for key in keys)])
    return table(["policy", "temperature", "samples", *keys], lines)


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
        scores = RougeScorer(ROUGE, use_stemmer=True).score(row["reference"], row["response"])
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
            line = {"label": ", ".join(who), "y": [*map(fmean, picks)], "marker": ".-"}
            found.setdefault(name, []).append(line)
        lines += cells
    panels = [(name, label, "score", [line | {"x": x} for line in found[name]]) for name in found
              for x, label in ((args.n, "n"), (nats, "KL of best of n, nats"))]  # fmt: skip
    plot(args.png, panels, "policy, temperature")
    return table(["policy", "temperature", "n", "KL", *found], lines)


def passk(args):
    """pass@k: probability that one of k programs passes all tests, unbiased, with bootstrap intervals."""
    lines = []
    for *who, groups in drawn(args, max(*args.k, args.samples)):
        if groups[0][0]["passed"] is None:
            fail(f"{who[0]}: no unit tests, so nothing passes or fails; pass@k is for program tasks")
        for level in ["all", *sorted({g[0]["difficulty"] for g in groups if g[0].get("difficulty")})]:
            counts = [(len(group), sum(row["passed"] for row in group)) for group in groups
                      if level in ("all", group[0].get("difficulty"))]  # fmt: skip
            cells = (cell(*bootstrap([pass_at_k(n, c, k) for n, c in counts])) for k in args.k)
            lines.append([*who, level, str(len(counts)), *cells])
    return table(["policy", "temperature", "difficulty", "problems", *(f"pass@{k}" for k in args.k)], lines)


PAUSES, TIMEOUT = (1, 2, 4, 8, 16), 60  # seconds: between attempts to reach the LLM, and of one attempt
CRITERIA = dict.fromkeys(("toy", "tldr"), "relevance, coherence, consistency and fluency")
CRITERIA |= {"hh": "helpfulness", "webgpt": "factual accuracy, coherence and usefulness", "": "correctness"}
SHOWN = "[Prompt]\n{}\n\n[Response 1]\n{}\n\n[Response 2]\n{}\n\nWhich response is better, judged by {}?"
FORMAT = ' Reply with JSON only: {"winner": "1"}, {"winner": "2"} or {"winner": "tie"}.'
HEADS = ["judge", "pairs", "unparsable", "win", "tie", "loss", "of decided", "at matched length", "matched"]


def duel(args):
    """Wins of one run over another, exact 95 % intervals; lengths match if at most 10 % apart; Cohen's κ."""
    (cfg, _), (other, _) = (run_config(run, args) for run in (args.a, args.b))
    if (cfg.task, cfg.data) != (other.task, other.data):
        fail(f"a duel needs one task: the runs have {cfg.task} {cfg.data} and {other.task} {other.data}")
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
    rows = [{"number": a["number"], "first": first, "a": a["response"], "b": b["response"]}
            | {judge: said[judge][i] for judge in said} for i, (a, b, first) in enumerate(pairs)]  # fmt: skip
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths, lines = [sorted((len(a["response"]), len(b["response"]))) for a, b, _ in pairs], []
    for judge, given in said.items():
        close = [v for v, (low, high) in zip(given, lengths, strict=True) if high - low <= 0.1 * high]
        shares = [reward.exact_share(given.count(verdict), len(given)) for verdict in ("a", "tie", "b")]
        shares += [reward.exact_share(x.count("a"), x.count("a") + x.count("b")) for x in (given, close)]
        shares = [cell(*share) for share in shares]
        lines.append([judge, str(len(given)), str(given.count("unparsable")), *shares, str(len(close))])
    found = [(x, y, *agreement(said[x], said[y])) for x, y in combinations(said, 2)]
    found = [[f"{x}, {y}", str(count), cell(equal), cell(kappa)] for x, y, count, equal, kappa in found]
    return table(HEADS, lines) + (["", *table(["judges", "pairs", "agreement", "κ"], found)] if found else [])


def verdicts(judge, pairs, path, cfg, args):
    """Who wins each pair: "a", "b", "tie" or "unparsable".  What is answered at `path` is not asked again."""
    if key := {"rm": "rm_score", "gold": "gold_score"}.get(judge):
        if pairs[0][0][key] is None:
            fail(f"--judge {judge}: task {cfg.task} has no such score")
        return ["tie" if a[key] == b[key] else "a" if a[key] > b[key] else "b" for a, b, _ in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path)))  # whole lines only
    kept, found = {row["question"]: row["answer"] for row in read_rows(path)}, []
    for a, b, first in tqdm(pairs, disable=judge == "human", desc="judge"):
        votes, orders = [], ("ab", "ba") if first == "a" else ("ba", "ab")
        for one, two in orders[: 1 if judge == "human" else 2]:
            shown = [{"a": a, "b": b}[x]["response"] for x in (one, two)]
            question = SHOWN.format(a["prompt"], *shown, CRITERIA.get(cfg.task, CRITERIA[""]))
            name = f"{judge} {args.judge_model}: {question}"
            if name not in kept:
                kept[name] = ask_llm(question + FORMAT, args) if judge == "llm" else ""
                if judge == "human":  # blind; a response's control characters do not reach the terminal
                    print("\n" + "".join(c for c in question if c.isprintable() or c == "\n"))
                    while (typed := input("1, 2 or tie (Ctrl-C stops): ").strip()) not in ("1", "2", "tie"):
                        pass
                    kept[name] = json.dumps({"winner": typed})
                with path.open("a") as file:
                    row = {"judge": judge, "number": a["number"], "first": one, "answer": kept[name]}
                    file.write(json.dumps(row | {"question": name}) + "\n")
            said = re.fullmatch(r'\s*{\s*"winner"\s*:\s*"(1|2|tie)"\s*}\s*', kept[name])  # JSON, no more
            votes.append({"1": one, "2": two, "tie": "tie"}[said[1]] if said else "unparsable")
        found.append("unparsable" if "unparsable" in votes else votes[0] if len({*votes}) == 1 else "tie")
    return found


def ask_llm(question, args):
    """An OpenAI-compatible endpoint's answer; 429, 5xx, time-outs and lost connections are tried again."""
    key, url = os.environ.get("OPENAI_API_KEY", "").strip(), args.judge_url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    body = {"model": args.judge_model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
    for pause in (*PAUSES, None):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                text = reply.read().decode(errors="replace")
            break
        except urllib.request.HTTPError as error:
            problem, again = f"HTTP {error.code}", error.code == 429 or error.code >= 500
        except (OSError, ValueError, urllib.request.http.client.HTTPException) as error:
            problem, again = type(error).__name__, not isinstance(error, ValueError)  # malformed key or URL
        if not again or pause is None:
            fail(f"the judge does not answer ({problem}); its verdicts are kept, the same command goes on")
        time.sleep(pause)
    with suppress(ValueError, LookupError, TypeError, RecursionError):  # what is no answer is unparsable
        text = json.loads(text)["choices"][0]["message"]["content"]
    return str(text).replace(key or "\0", "[key]")


# Appendix: report, pictures, command line


def report(args):
    """Everything that the runs of a folder allow, as report.md in it, with the pictures beside it."""
    out, runs = Path(args.run[0]), runs_of(args.run[:1])
    args, chapters = replace(args, references=True), [(curves, {}), (frontier, {})]
    if all((run / "model").is_dir() or (run / "score").is_dir() for run in runs):
        cfg, (*_, ((row, *_), *_)) = run_config(runs[0], args)[0], next(drawn(args, 1))
        tested, both = row["passed"] is not None, {"temperature": [cfg.temperature, 0.0]}
        chapters += [(score, both | {"sft": tested}), (bestofn, {"references": False})]
        chapters += [(passk, {"references": False, "sft": True})] if tested else []
        judges = ["rm"] if row["gold_score"] is None else ["rm", "gold"]
        chapters += [(duel, {"a": str(run), "b": str(runs[0]), "judge": judges}) for run in runs[1:]]
    chapters += [(heatmap, {})] if all((run / "samples.jsonl").is_file() for run in runs) else []
    lines = [f"# {out.name}: {', '.join(run.name for run in runs)}", ""]
    for command, changes in chapters:
        name = command.__name__
        png = f"{name}.png" if command in (curves, frontier, bestofn, heatmap) else ""
        found = command(replace(args, png=str(out / png) if png else "", **changes))
        lines += [f"## {name} {Path(changes.get('a', '')).name}", "", command.__doc__, "", *found, ""]
        lines += [f"![{name}]({png})", ""] if png else []
    if sft.rank() == 0:
        (out / "report.md").write_text("\n".join(lines))
    return [f"wrote {out / 'report.md'}"]


def plot(png, panels, legend):
    """Draw panels (title, x label, y label, lines) side by side; a line may have raw values and a band."""
    canvas = figure.Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, xlabel, ylabel, lines) in zip(axes, panels, strict=True):
        for i, line in enumerate(lines):
            ax.plot(line["x"], line.get("raw") or line["y"], color=f"C{i}", alpha=0.25, lw=1)
            ax.fill_between(line["x"], *line.get("band", [line["y"]] * 2), color=f"C{i}", alpha=0.2, lw=0)
            ax.plot(line["x"], line["y"], line.get("marker", "-"), color=f"C{i}", lw=2, label=line["label"])
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
    axes[0].legend(title=legend)
    if png and sft.rank() == 0:
        save(canvas, png)


def save(canvas, png):
    """Write a picture, and its folder if need be."""
    sft.make_folder(Path(png).parent)
    try:
        with warnings.catch_warnings(action="ignore"):  # a character that the font lacks is drawn as a box
            canvas.savefig(png, dpi=110, format="png")
    except OSError as error:
        fail(f"cannot write {png}: {error}")


def heatmap(args):
    """One response, its tokens blue where they become likelier, red where less; bars begin macro actions."""
    pages = []
    for run in runs_of(args.run):
        kept = [row for row in read_rows(run / "samples.jsonl", CREDIT) if row["step"] == args.step]
        if not 0 <= args.sample < len(kept):
            fail(f"{run}: no sample {args.sample} of step {args.step} in samples.jsonl (every tenth step is)")
        row = kept[args.sample]
        if {len(row[key]) for key in CREDIT - {"step"}} != {len(row["seg"]) or None}:
            fail(f"{run}: sample {args.sample} of step {args.step} is damaged: not one entry a token")
        cells, line, column = [], 0, 0
        for piece in row["pieces"]:  # in lines of 100 characters
            shown = piece.replace("\n", "⏎") or "∎"  # ∎: a token that writes nothing, usually the EOS
            line, column = (line + 1, 0) if column and column + len(shown) > 100 else (line, column)
            cells.append((line, column, shown))
            column += len(shown)
        pages.append((run.name, row, cells))
    limit = max(abs(a) for _, row, _ in pages for a in row["advantages"]) or 1.0
    heights = [x for *_, cells in pages for x in (0.25 * (cells[-1][0] + 1), 1.6)]  # inches
    canvas = figure.Figure(figsize=(10, sum(heights) + len(pages)), layout="constrained")
    font = {"family": "monospace", "fontsize": 9.3, "parse_math": False, "va": "center"}
    axes = iter(canvas.subplots(len(heights), 1, height_ratios=heights))
    for (name, row, cells), above, below in zip(pages, axes, axes, strict=True):
        title = f"{name}: {row['seg'][-1] + 1} macro actions"
        above.set(xlim=(0, 100), ylim=(cells[-1][0] + 1, 0), title=title)
        above.axis("off")
        for t, (line, column, text) in enumerate(cells):
            strength, place = row["advantages"][t] / limit, (column, line + 0.08)
            tint, ink = 0.5 + 0.45 * strength, "black" if abs(strength) < 0.7 else "white"
            above.add_patch(patches.Rectangle(place, len(text), 0.84, color=colormaps["RdBu"](tint), lw=0))
            above.text(column, line + 0.52, text, color=ink, **font)
            if t == 0 or row["seg"][t] != row["seg"][t - 1]:
                above.plot([column, column], [line + 0.08, line + 0.92], color="black", linewidth=1.5)
                below.axvline(t - 0.5, color="0.85", linewidth=0.8)
        below.plot(row["values"], color="C0", label="value V(s)")
        below.step(range(len(cells)), row["returns"], where="mid", color="C3", label="return")
        below.set(xlim=(-0.5, len(cells) - 0.5), xlabel="response token", ylabel="reward")
        below.legend(loc="upper left", ncols=2, frameon=False)
    save(canvas, args.png)
    return []


@dataclass
class Options:
    """Settings of the subcommands; each reads those that its --help names."""

    run: list[str] = opt([], "run folders of ma_ppo.py, or --out folders that hold one per arm")
    arms: list[str] = opt([], "curves, frontier: only these arms of the folders, the first one the baseline")
    mean: bool = opt(False, "curves, over seeds: mean ± standard deviation, not median (range)")
    png: str = opt("", "curves, frontier, bestofn, heatmap: picture to write")
    prompts: int = opt(128, "held-out prompts to sample, the first ones")
    samples: int = opt(1, "score, passk: samples of each prompt")
    temperature: list[float] = opt([], "of sampling, one or more, 0 for greedy; default: the run's own")
    sft: bool = opt(False, "score, bestofn, passk: the SFT models that the runs started from, too")
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
    commands = {f.__name__: f for f in (report, curves, frontier, score, bestofn, passk, duel, heatmap)}
    commands["seeds"] = curves
    parser = HfArgumentParser(Options, description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("command", choices=commands, help="what to do")
    parser.add_argument("folder", nargs="?", help="report: the --out folder of ma_ppo.py")
    values = vars(parser.parse_args(argv))
    command, folder = values.pop("command"), values.pop("folder")
    args = Options(**values | {"run": [folder] if folder else values["run"]})
    needed = {"duel": ["a", "b"], "heatmap": ["run", "png"]}.get(command, ["run"])
    missing, mixed = [f"--{x}" for x in needed if not getattr(args, x)], command == "report" and args.run[1:]
    if missing or mixed:
        fail(f"{command} needs {' and '.join(missing) or 'one folder'}")
    counts = (args.prompts, args.samples, *args.n, *args.k)
    if min(counts) < 1 or not all(0 <= t < math.inf for t in args.temperature):
        fail("--prompts, --samples, --n and --k must be at least 1, --temperature at least 0")
    unfit = "llm" in args.judge and not (args.judge_model and args.judge_url.startswith("http"))
    if unfit or not {*args.judge} <= {"gold", "rm", "llm", "human"}:
        fail("--judge: gold, rm, human, or llm with --judge_model and a --judge_url of http")
    sft.check(ma_ppo.Config(device=args.device, batch_size=int(os.environ.get("WORLD_SIZE", 1))))
    sft.setup(args.device)
    with suppress(KeyboardInterrupt, EOFError):
        return sft.print0("\n".join(commands[command](args)))
    fail("interrupted; verdicts given so far are kept: the same command goes on")


if __name__ == "__main__":
    main()
