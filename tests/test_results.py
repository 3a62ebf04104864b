"""The tables and numbers of results/README.md are those of the files beside it."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from test_study import rows_of

import eval as chapter5

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "results" / "README.md").read_text()
CODE = (ROOT / "results" / "toy-code" / "RESULTS.md").read_text()


def result_of(path):
    """What the run.json of a stage measured."""
    return json.loads((ROOT / "results" / path).read_text())["result"]


def exact_interval(successes, count):
    """Clopper and Pearson's 95 % interval: the shares that make so few or so many not unlikely."""

    def tail(p, counts):
        binomial = torch.distributions.Binomial(count, torch.tensor(p, dtype=torch.float64))
        return binomial.log_prob(torch.tensor(list(counts))).exp().sum()

    def root(counts, rises):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if (tail(middle, counts) < 0.025) == rises:
                low = middle
            else:
                high = middle
        return low

    least = root(range(successes, count + 1), rises=True) if successes else 0.0
    return least, root(range(successes + 1), rises=False)


def expanded(words):
    """The words of a command, with patterns replaced by the paths that they match."""
    for word in words:
        yield from sorted(map(str, ROOT.glob(word))) if "*" in word or "[" in word else [word]


def table_after(command):
    """The rows of the first table after a command."""
    after = TEXT.split(f"python eval.py {command}")[1]
    return rows_of("\n" + re.search(r"^\|.*?\n\n", after, re.MULTILINE | re.DOTALL)[0])


SEEDS = re.findall(r"python eval.py (seeds [^`\n]*--run results/.*?)[`\n]", TEXT)


def test_the_commands_are_found():
    assert len(SEEDS) == 3


@pytest.mark.parametrize("command", SEEDS)
def test_tables_over_seeds_are_what_their_commands_print(command, capsys):
    chapter5.main(list(expanded(command.split())))
    printed = rows_of(capsys.readouterr().out)
    shown = table_after(command)
    assert len(shown) >= 3
    for row in shown:
        name = row.pop(next(iter(row)))  # "last" for last/fixed
        same = [other for other in printed if row.items() <= other.items()]
        assert same, name
        assert any(name in other["arm"] or name.startswith("equal") for other in same)


def test_accuracies_of_reward_models():
    toy = [result_of(f"toy/seed{k}/reward.json") for k in range(5)]
    for key in ("accuracy_noiseless", "accuracy"):
        *first, last = [f"{found[key]:.3f}" for found in toy]
        assert f"{', '.join(first)} and {last}" in re.sub(r"\s+", " ", TEXT)
    for path in ("webgpt/reward.json", "hh/reward.json"):
        found = result_of(path)
        right = round(found["accuracy"] * found["pairs"])
        low, high = exact_interval(right, found["pairs"])
        said = rf"\*\*{found['accuracy']:.3f}\*\* o[nf] {found['pairs']} held-out pairs"
        assert re.search(rf"{said}, (exact )?95 % interval {low:.3f} to {high:.3f}", TEXT), path


def passed():
    """{(temperature, policy): {seed: how many of 1,000 held-out problems it solved}}."""
    counts = {}
    for line in (ROOT / "results" / "toy-code" / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["problems"] == 1000
        counts.setdefault((row["temperature"], row["policy"]), {})[row["seed"]] = row["passed"]
    return counts


def test_pass_rates_of_programs_seed_by_seed():
    rows = [row for row in rows_of(CODE) if row.get("seed", "").isdigit()]
    assert len(rows) == 10  # five seeds, sampled and greedy
    for row in rows:
        for arm in ("SFT", "token", "fixed", "ast"):
            sampled = "[" in row[arm]
            count = passed()[1.0 if sampled else 0.0, arm.lower()][int(row["seed"])]
            low, high = exact_interval(count, 1000)
            interval = f" [{low:.3f}, {high:.3f}]" if sampled else ""
            assert row[arm] == f"{count / 1000:.3f}{interval}"


def test_mean_pass_rates_of_programs():
    rows = {row[""]: row for row in rows_of(TEXT) if "SFT" in row and "" in row}
    counts = passed()
    before = counts[1.0, "sft"]
    for column in ("SFT", "token", "fixed (n = 10)", "ast", "control"):
        arm = column.split()[0].lower()
        for temperature, name in ((1.0, "sampled as in training"), (0.0, "greedy")):
            found = counts.get((temperature, arm), {})
            assert set(found) in (set(), set(range(5)))
            shown = f"{fmean(found.values()) / 1000:.3f}"[1:] if found else "–"
            assert rows[name][column] == shown
        gained = [(counts[1.0, arm][seed] - before[seed]) / 10 for seed in before]
        if column in ("token", "fixed (n = 10)", "ast"):
            shown = f"{fmean(gained):.1f} ({min(gained):.1f} to {max(gained):.1f})"
            assert rows["points gained (range)"][column] == shown


def test_times_of_the_run_on_webgpt():
    for arm, said in (("token", "62 s a step (`token`)"), ("fixed", "60 s (`fixed`)")):
        lines = (ROOT / "results" / "webgpt" / arm / "metrics.jsonl").read_text().splitlines()
        seconds = chapter5.typical_seconds([json.loads(line) for line in lines])
        assert said.startswith(f"{seconds:.0f} s") and said in TEXT
