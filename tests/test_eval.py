"""Chapter 5: measures, intervals, verdicts, judges, and commands on runs that the tests write."""

import json
import math
import os
import random
import re
import sys
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

import eval as chapter5
import ma_ppo
import sft
from eval import correlation, moments, parity, smooth, verdict, winner

# Measures and intervals


def test_a_step_that_was_not_finite_hides_no_metric():
    rows = [{"kl": None}, {"kl": 1.0}, {"kl": None}, {"kl": 3.0}]
    assert chapter5.column(rows, "kl") == [1, 1, 1, 3]
    assert chapter5.column(rows, "gold_score") is None


def test_smoothing_never_looks_ahead_and_parity_is_as_worked_by_hand():
    assert smooth([10, 0, 2, 4, 4, 0, 5]) == [10, 5, 4, 4, 4, 2, 3]
    # Five steps at 0, then ten at 10: smoothed 0 0 0 0 0 2 4 6 8 10: half at 7, nine tenths at 9.
    slow = [0] * 5 + [10] * 10
    fast = [0] * 2 + [10] * 13  # smoothed 0 0 10/3 5 6 8 10 ...: half at step 3, nine tenths at 6
    assert (parity(slow, slow, 0.5), parity(slow, fast, 0.5)) == (1, 3 / 7)
    assert parity(slow, fast, 0.9) == 6 / 9
    lucky = [*slow[:-1], 30]  # one batch at the end does not move the target out of reach
    assert parity(lucky, lucky, 0.5) == 1
    rising, falling, flat = list(range(20)), list(range(20, 0, -1)), [3] * 20
    assert parity(falling, rising, 0.5) is parity(flat, rising, 0.5) is None  # no gain
    assert parity(rising, flat, 0.9) is None  # never reached
    assert parity(rising, flat, 0.1) == 0  # 3 is above a tenth of the gain


def test_t_quantiles_hold_95_percent_and_make_the_interval_of_paired_differences():
    for freedom, t in enumerate(chapter5.T_95, start=1):
        x = np.linspace(-t, t, 100_001)
        halves = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        scale = halves / math.sqrt(freedom * math.pi)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4)
    # Mean .22, s.d. .1033, and 2.262 x .1033 / sqrt(10) = .0739.
    found = chapter5.paired_difference([0.1] * 4 + [0.3] * 6)
    assert found == pytest.approx((0.22, 0.22 - 0.0739, 0.22 + 0.0739), abs=1e-4)
    mean, low, _ = chapter5.paired_difference(list(range(30)))  # beyond the table: its last entry
    assert mean - low == pytest.approx(2.086 * math.sqrt(77.5 / 30))


def test_a_verdict_needs_the_whole_interval():
    assert verdict(0.1, 0.9, margin=0.2) == verdict(-0.9, -0.1, margin=0.2) == "different"
    assert verdict(-0.1, 0.19, margin=0.2) == "equivalent"
    assert verdict(0.01, 0.19, margin=0.2) == "equivalent, though different"
    assert verdict(-0.1, 0.21, margin=0.2) == verdict(-0.9, 0.1, margin=0.2) == "cannot tell"


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_and_pass_at_n_are_means_over_all_subsets(n):
    rng = random.Random(0)
    rows = [{"rm_score": rng.randint(0, 3), "gold_score": rng.random()} for _ in range(6)]
    picks = []
    for subset in combinations(range(6), n):
        best = max(subset, key=lambda i: (rows[i]["rm_score"], i))  # ties to the later sample
        picks.append(rows[best]["gold_score"])
    assert chapter5.best_of_n(rows, "gold_score", n) == pytest.approx(np.mean(picks))
    for passed in range(7):
        subsets = combinations([True] * passed + [False] * (6 - passed), n)
        assert chapter5.pass_at_k(6, passed, n) == pytest.approx(np.mean(list(map(any, subsets))))


def test_distinct_trigrams_worked_by_hand():
    assert chapter5.distinct("a b c a b c") == 3 / 4  # abc bca cab abc
    assert chapter5.distinct("so it") is None


# Credit: a coin is tossed for each of four tokens, and a response is worth its number of heads.

HEAD, TAIL = 1, 2


def toss(model, prompts, uniforms, tokenizer, cfg):
    """In the place of `ma_ppo.generate`."""
    return [[HEAD if u < 0.5 else TAIL for u in row] for row in uniforms.tolist()]


def heads(rollout, *others):
    """In the place of `eval.judge`: a reward for each head, at once."""
    return None, (rollout.batch.responses == HEAD).float()


def test_continuations_find_the_value_and_the_advantage_of_every_toss(monkeypatch):
    monkeypatch.setattr(ma_ppo, "generate", toss)
    monkeypatch.setattr(chapter5, "judge", heads)
    tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda rows, **options: rows)
    models = {"policy": SimpleNamespace(device="cpu")}
    cfg = ma_ppo.Config(max_response=4)
    responses = [[HEAD, HEAD, TAIL, TAIL], [TAIL, HEAD, TAIL]]
    examples = [{"prompt": [3, 3]}, {"prompt": [3]}]
    batch = sft.make_batch([row["prompt"] for row in examples], responses, 0, "cpu")
    rollout = ma_ppo.Rollout(batch, responses, responses, seeds=[])
    _, rewards = heads(rollout)
    found = chapter5.true_values(rollout, rewards, examples, 1000, models, tokenizer, cfg)
    values, advantages = (x.numpy() for x in found)
    # Heads so far do not count, half of the tosses to come do; behind the end nothing is to come.
    exact = np.array([[2, 1.5, 1, 0.5, 0], [2, 1.5, 1, 0, 0]])
    assert values == pytest.approx(np.stack([exact, exact]), abs=4 / math.sqrt(500))
    exact = [[0.5, 0.5, -0.5, -0.5], [-0.5, 0.5, -1, 0]]  # the end takes a toss away
    assert advantages == pytest.approx(np.stack([exact, exact]), abs=6 / math.sqrt(500))
    assert (values[0] != values[1])[:, :3].all()  # halves of their own


def test_the_sampling_error_of_the_truth_is_taken_off_the_correlation():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (40_000, 9))  # surprises: independent, 0 on average
    guesses = 0.5 * truth + rng.normal(0.3, 1, truth.shape)
    # An error of V* between two tokens enters one A* with plus and the next with minus.
    edges = np.pad(rng.normal(0, 25, (2, 40_000, 8)), [(0, 0), (0, 0), (1, 1)])
    halves = truth + np.diff(edges)  # [2, 40000, 9]
    sums = moments(*map(torch.tensor, (guesses, halves, np.ones_like(truth))))
    exact = 0.5 / math.sqrt(0.25 + 1)
    assert correlation(sums, axis=0) == pytest.approx(exact, abs=0.1)
    assert np.corrcoef(guesses.ravel(), halves.mean(0).ravel())[0, 1] < exact / 3


# Judges


def test_the_last_winner_of_an_answer_is_the_verdict():
    assert winner('Short ones. {"winner": "1"}? No.\n```json\n{"winner":"2"}\n```', "ba") == "a"
    assert winner('{"why": "{it} is {longer}", "winner": 1}', "ba") == "b"
    assert winner('{"winner": "tie"}', "ba") == "tie"
    for answer in ('I take {"winner": "1"}, or rather {"winner": "3"}', "The winner is 1", ""):
        assert winner(answer, "ba") == "none"


PAIRS = []
for i, (a, b) in enumerate([("good", "bad"), ("bad", "good"), ("good", "good")]):
    rows = [{"number": i, "prompt": f"p{i}", "response": text} for text in (a, b)]
    PAIRS.append([row | {"rm_score": row["response"] == "good"} for row in rows])
JUDGES = {"honest": ["a", "b", "tie"], "first": ["tie"] * 3, "mute": ["none"] * 3}


@pytest.mark.parametrize(("judge", "said"), [*JUDGES.items(), ("half", ["none"] * 3)])
def test_a_language_model_is_asked_once_in_both_orders(tmp_path, monkeypatch, judge, said):
    asked = []

    def create(model, messages):
        one, two = re.findall(r"\[Response \d\] (\w+)", messages[0]["content"])
        asked.append((one, two))
        better = "1" if one > two or judge == "first" else "2"
        answer = "tie" if one == two and judge == "honest" else better
        silent = judge == "mute" or (judge == "half" and len(asked) % 2)
        content = "no idea" if silent else json.dumps({"winner": answer})
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=content))])

    completions = SimpleNamespace(create=create)
    client = nullcontext(SimpleNamespace(chat=SimpleNamespace(completions=completions)))
    fake = SimpleNamespace(OpenAI=lambda **options: client, APIError=RuntimeError)
    monkeypatch.setitem(sys.modules, "openai", fake)
    flags = ["--a", str(tmp_path), "--b", "runs/b", "--judge", "llm", "--judge_model", "m"]
    args = chapter5.parse(["duel", *flags])
    assert chapter5.verdicts_of("llm", PAIRS, args) == said
    orders = [(a["response"], b["response"]) for a, b in PAIRS]
    assert sorted(asked) == sorted(orders + [(b, a) for a, b in orders])
    assert chapter5.verdicts_of("llm", PAIRS, args) == said  # from the file
    assert len(asked) == 6


def test_a_person_judges_in_an_order_by_lot_a_score_by_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "1")
    args = chapter5.parse(["duel", "--a", str(tmp_path / "a"), "--b", "b", "--judge", "human"])
    pairs = [[row | {"number": i} for row in PAIRS[0]] for i in range(40)]
    found = [chapter5.asked("human", *pair, args) for pair in pairs]
    shown = re.findall(r"\[Response 1\] (\w+)", capsys.readouterr().out)
    assert shown == ["good" if said == "a" else "bad" for said in found]
    assert 10 < found.count("a") < 30
    assert chapter5.verdicts_of("rm", PAIRS, args) == ["a", "b", "tie"]  # the higher score wins


# Commands, on runs without models


def write_run(folder, scores, seed=0, **settings):
    """A run of these scores: its config.json, metrics.jsonl and one sample."""
    folder.mkdir(parents=True)
    settings = {"arm": folder.name, "seed": seed, "ngram": 5, "lam": 0.95} | settings
    (folder / "config.json").write_text(json.dumps(settings))
    rows = []
    for step, x in enumerate(scores):
        row = {"step": step, "rm_score": x, "gold_score": x, "kl": step, "rm_score_std": 1}
        rows.append(row | {"response_length": 9, "eos_rate": 1, "seconds": 1, "macro_length": 4})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 99, "rm_sc')  # being written
    kept = {"step": 0, "pieces": [" the", " end\n", ""], "seg": [0, 0, 1]}
    kept |= {"values": [0.1, 0.2, 0.3], "advantages": [-1, -1, 2], "targets": [0.5, 0.5, 1]}
    (folder / "samples.jsonl").write_text(json.dumps(kept) + "\n")


def printed(capsys, *words):
    """The cells of the tables that a command prints."""
    chapter5.main([str(word) for word in words])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_paired_by_their_settings_whatever_the_folders_are_called(tmp_path, capsys):
    # Far apart, and named in another order: unpaired, the difference would drown.
    for i in range(5):
        write_run(tmp_path / f"x{i}/token", [10.0 * i] * 6, seed=i)
        write_run(tmp_path / f"x{4 - i}/fixed", [10.0 * i + 1 + 0.1 * i] * 6, seed=i)
    command = ["seeds", "--runs", *sorted(tmp_path.iterdir())]
    table = printed(capsys, *command)
    (row,) = [row for row in table if row[:2] == ["fixed - token", "score area"]]
    # d = 1.0 ... 1.4: mean 1.2, s.d. .158, 2.776 x .158 / sqrt(5) = .196; margin: a tenth of 20
    assert row[2:] == ["±2.00", "1.20 [1.00, 1.40]", "equivalent, though different"]
    table = printed(capsys, *command, "--versus", "fixed", "--margin", 0.25, 0.01)
    (row,) = [row for row in table if row[:2] == ["token - fixed", "score area"]]
    assert row[2:] == ["±0.21", "-1.20 [-1.40, -1.00]", "different"]


def test_curves_heatmap_horizon_and_report_of_four_arms(tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(chapter5, "save", lambda figure, png: figures.append(figure))
    slow, fast = [0.0] * 5 + [10.0] * 10, [0.0] * 2 + [10.0] * 13
    for arm, scores in {"fixed": fast, "token": slow, "control": fast}.items():
        write_run(tmp_path / arm, scores)
    write_run(tmp_path / "n10/fixed", fast, ngram=10, lam=1.0)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/config.json").write_text("{}")  # a model, no run
    runs = ["--runs", tmp_path, tmp_path / "n10"]
    table = printed(capsys, "curves", *runs, "--png", "c.png")
    assert [row[0] for row in table[2:6]] == ["token", "control", "fixed", "n10/fixed"]
    assert table[2][1:3] == ["15", "10.00"]
    assert [row[1:3] for row in table[8:10]] == [["1.00", "1.00"], ["0.43", "0.67"]]
    labels = [ax.get_ylabel() for ax in figures[0].axes]
    assert labels == ["rm score", "gold score", "response length", "gold score"]
    drawn = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert list(drawn["token"].get_ydata()) == smooth(slow)
    for arm, color in chapter5.ARM_COLORS.items():
        assert drawn[arm].get_color() == color
    table = printed(capsys, "horizon", *runs)
    assert [row[:3] for row in table[2:]] == [
        ["n = 1", "0.950", "20"],
        ["n = 1", "0.990", "98"],  # control: nearly that of fixed
        ["n = 10", "1.000", "∞"],
        ["n = 5", "0.950", "100"],
    ]
    printed(capsys, "heatmap", *runs[:2], "--png", "h.png")
    text, values, *_ = figures[1].axes
    assert [t.get_text() for t in text.texts] == [" the", " end⏎", "∎"]
    assert len(text.lines) == 2  # a bar where each macro action begins
    write_run(tmp_path / "own/fixed", fast, sigma="own")  # else both would be called fixed
    printed(capsys, "heatmap", "--runs", tmp_path / "fixed", tmp_path / "own/fixed")
    titles = [ax.get_title() for ax in figures.pop().axes[::2]]
    assert titles == ["fixed: 2 macro actions", "fixed, σ own: 2 macro actions"]
    assert list(values.lines[-1].get_ydata()) == [0.5, 0.5, 1]
    printed(capsys, "report", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"## (\w+)", text) == ["curves", "heatmap"]  # there is no model to sample
    assert "![heatmap](heatmap.png)" in text


def test_samples_are_drawn_once_and_again_when_a_model_has_changed(tmp_path, monkeypatch):
    for folder in ("run/model", "sft", "rm"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
    (tmp_path / "run/config.json").write_text('{"arm": "token"}')
    prompts = [{"prompt": text} for text in "aabc"]  # one of them twice
    monkeypatch.setattr(sft, "load_share", lambda cfg, share: prompts)
    drawn = []

    def args(prompts):
        return SimpleNamespace(prompts=prompts, device="cpu")

    def draw(jobs, temperature, *rest):
        drawn.append([(job["number"], job["sample"]) for job in jobs])
        return [job | {"temperature": temperature} for job in jobs]

    monkeypatch.setattr(chapter5, "draw", draw)
    cfg = ma_ppo.Config(sft=str(tmp_path / "sft"), reward_model=str(tmp_path / "rm"))
    chapter5.samples_of(tmp_path / "run", cfg, 1.0, 1, args(2))
    groups = chapter5.samples_of(tmp_path / "run", cfg, 1.0, 2, args(3))
    assert [[row["prompt"] for row in group] for group in groups] == [[x] * 2 for x in "abc"]
    assert drawn == [[(0, 0), (1, 0)], [(0, 1), (1, 1), (2, 0), (2, 1)]]  # only what was missing
    groups = chapter5.samples_of(tmp_path / "run", cfg, 1.0, 1, args(2))
    assert len(drawn) == 2 and [len(group) for group in groups] == [1, 1]
    os.utime(tmp_path / "rm/model.safetensors", (1, 1))
    chapter5.samples_of(tmp_path / "run", cfg, 1.0, 1, args(1))
    assert drawn[2] == [(0, 0)]
    # A model on the hub has no folder; and a reward in Python is as old as its file.
    cfg = ma_ppo.Config(sft="me/tiny", reward=f"{tmp_path}/own.py:score")
    for time, count in [(1, 4), (1, 4), (2, 5)]:
        (tmp_path / "own.py").touch()
        os.utime(tmp_path / "own.py", (time, time))
        chapter5.samples_of(tmp_path / "run", cfg, 1.0, 1, args(1))
        assert len(drawn) == count


@pytest.mark.parametrize("function", chapter5.COMMANDS, ids=lambda function: function.__name__)
def test_a_command_s_help_lists_its_own_options_of_which_torchrun_takes_none(function, capsys):
    with pytest.raises(SystemExit) as stop:
        chapter5.parse([function.__name__, "--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out.split("options:")[1]
    shown = set(re.findall(r"^  (?:-h, )?(--\w+)", usage, re.MULTILINE)) - {"--help"}
    assert shown == {name for name in chapter5.COMMANDS[function].split() if name.startswith("--")}
    theirs = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    assert not [flag for flag in theirs if flag.startswith(tuple(shown))]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("curves --runs nowhere", "nowhere: no run"),
        ("curves --runs model", "model: no run"),
        ("score --runs toy --device cpu --prompts 4", "gone: no such folder"),
        ("duel --a toy --b hh", "task"),
        ("duel --a toy --b toy --judge dice", "dice"),
        ("seeds --runs toy --versus nobody", "--versus"),
        ("seeds --runs toy", "two or more"),
        ("heatmap --runs toy --step 7", "step 7"),
    ],
)
def test_what_cannot_work_is_one_line_with_exit_code_2(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"arm": "token", "seed": 0, "sft": "model", "reward_model": str(tmp_path / "gone")}
    configs = {"toy": settings | {"task": "toy"}, "hh": settings | {"task": "hh"}, "model": {}}
    for folder, config in configs.items():
        Path(folder, "model").mkdir(parents=True)
        Path(folder, "config.json").write_text(json.dumps(config))
        Path(folder, "metrics.jsonl").write_text('{"rm_score": 1, "seconds": 1}\n')
    with pytest.raises(SystemExit) as stop:
        chapter5.main(words.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
