"""Chapter 5: statistics, held-out samples, judges, the report."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eval as chapter5
import ma_ppo
import reward
import sft
from eval import agreement, best_of_n, bootstrap, pass_at_k, repeated, share_cell, winner
from reward import wilson_interval

ROOT = Path(__file__).parent.parent

# Statistics


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_pass():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for wrong in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


def test_best_of_n_is_the_mean_pick_over_all_subsets_ties_to_the_later_sample():
    rng = random.Random(0)
    for n in range(1, 7):
        scores, worths = [rng.randint(0, 3) for _ in range(6)], [rng.random() for _ in range(6)]
        picks = [
            worths[max(subset, key=lambda i: (scores[i], i))]
            for subset in combinations(range(6), n)
        ]
        assert best_of_n(scores, worths, n) == pytest.approx(sum(picks) / len(picks))


def test_the_bootstrap_interval_covers_a_known_mean_at_least_92_times_in_100():
    rng = np.random.default_rng(1)
    for sample in (lambda: rng.normal(3, 2, 60), lambda: rng.exponential(3, 120)):
        hits = [low <= 3 <= high for _, low, high in (bootstrap(sample()) for _ in range(400))]
        assert 0.92 <= sum(hits) / len(hits) <= 0.99
    assert bootstrap([]) == (None,)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (5, 10), (10, 10), (1, 20), (700, 2000)])
def test_wilsons_edges_are_the_shares_from_which_the_wins_are_two_deviations_away(wins, count):
    low, high = wilson_interval(wins, count)
    assert 0 <= low <= wins / count + 1e-9 and wins / count - 1e-9 <= high <= 1
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            deviations = (wins / count - p) / math.sqrt(p * (1 - p) / count)
            assert abs(deviations) == pytest.approx(1.959964)
    mirrored = wilson_interval(count - wins, count)
    assert mirrored == pytest.approx((1 - high, 1 - low))
    assert share_cell(wins, count) == f"{wins / count:.2f} [{low:.2f}, {high:.2f}]"


def test_a_share_of_nothing_is_left_open():
    assert share_cell(0, 0) == "–"


def test_kappa_worked_by_hand():
    # 3 of 4 equal; by chance (2 * 1 + 2 * 3) / 16 = 1 / 2: kappa = (3/4 - 1/2) / (1/2)
    assert agreement(["a", "a", "b", "b", "a"], ["a", "b", "b", "b", "unparsable"]) == (
        4,
        0.75,
        0.5,
    )
    assert agreement(["a", "a"], ["a", "a"]) == (2, 1.0, None)
    assert agreement(["unparsable"], ["a"]) == (0, None, None)


def test_repeated_trigrams_of_ordinary_short_and_empty_responses():
    assert repeated("a b a b a") == pytest.approx(1 / 3)  # aba bab aba
    assert repeated("a b c") == 0
    assert repeated("a b") is None
    assert repeated("") is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"winner": "1"}', "b"),
        (' {"winner":"2"}\n', "a"),
        (
            'Both are short. {"winner": "1"}? No: 2 has the facts.\n```json\n{"winner": "2"}\n```',
            "a",
        ),
        ('{"why": "{it} is {longer}", "winner": "tie"}', "tie"),
        ('{"winner": 1}', "b"),
        ('I take {"winner": "1"}, or rather {"winner": "3"}', "unparsable"),
        ("The winner is 1, {as you see}", "unparsable"),
        ('["1"]', "unparsable"),
        ("", "unparsable"),
        ('{"a":' * 3000, "unparsable"),
    ],
)
def test_the_last_json_object_with_a_winner_is_the_verdict(answer, verdict):
    assert winner(answer, "ba") == verdict


# Runs without weights: what was sampled is measured


def synthetic(folder, rows, **config):
    (folder / "score").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task": "toy", "temperature": 1.0} | config))
    base = {
        "temperature": 1.0,
        "sample": 0,
        "drawn_with": [],
        "reference": None,
        "difficulty": None,
    }
    base |= {"prompt": "p", "response": "r", "rm_score": 0.0, "gold_score": 0.0, "passed": None}
    lines = [json.dumps(base | row) + "\n" for row in rows]
    (folder / "score" / "samples.jsonl").write_text("".join(lines))
    return str(folder)


def cells(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "|" in line
    ]


def printed(capsys, *argv):
    chapter5.main([*map(str, argv)])
    return cells(capsys.readouterr().out)


def error(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        chapter5.main([*map(str, argv)])
    assert stop.value.code == 2
    _, _, line = capsys.readouterr().err.rpartition("error: ")  # behind a progress bar, perhaps
    return line.splitlines()[0]


def test_passk_is_the_mean_over_problems_and_by_difficulty(tmp_path, capsys):
    passes = {0: [1, 0, 0, 0], 1: [0, 0, 0, 0], 2: [1, 1, 1, 0]}
    levels = ["easy", "hard", "easy"]
    rows = [
        {"number": i, "sample": s, "passed": bool(x), "difficulty": levels[i]}
        for i, row in passes.items()
        for s, x in enumerate(row)
    ]
    run = synthetic(tmp_path / "run", rows, task="toy-code")
    table = printed(capsys, "passk", "--run", run, "--k", 1, 2, "--samples", 4)
    found = {row[2]: [cell.split()[0] for cell in row[4:]] for row in table[2:]}
    # pass@1: 1/4, 0, 3/4; pass@2 by enumeration: 3/6, 0, 6/6
    assert found == {"all": ["0.33", "0.50"], "easy": ["0.50", "0.75"], "hard": ["0.00", "0.00"]}
    assert "needs 5 samples" in error(capsys, "passk", "--run", run, "--k", 5)
    other = synthetic(tmp_path / "other", [{"number": 0}])
    assert "no unit tests" in error(capsys, "passk", "--run", other, "--k", 1)


def test_errors_name_what_is_missing(tmp_path, capsys):
    run = synthetic(tmp_path / "run", [{"number": 0}])
    assert "needs 16 samples" in error(capsys, "bestofn", "--run", run)
    assert "no run there" in error(capsys, "score", "--run", tmp_path / "nowhere")
    other = synthetic(tmp_path / "other", [{"number": 0}], task="hh")
    assert "one task" in error(capsys, "duel", "--a", run, "--b", other)
    assert "reward models" in error(
        capsys,
        "duel",
        "--a",
        run,
        "--b",
        synthetic(tmp_path / "third", [{"number": 0}], reward_model="x"),
    )
    empty = synthetic(tmp_path / "empty", [])
    assert "model" in error(capsys, "score", "--run", empty)
    assert "--judge" in error(capsys, "duel", "--a", run, "--b", run, "--judge", "dice")
    assert "--judge_model" in error(capsys, "duel", "--a", run, "--b", run, "--judge", "llm")
    lonely = synthetic(tmp_path / "lonely", [{"number": 1}])
    assert "no prompt in common" in error(capsys, "duel", "--a", run, "--b", lonely)
    assert "at least" in error(capsys, "bestofn", "--run", run, "--n", 0)


def duel_runs(tmp_path, count=6):
    """Two runs whose responses say how good they are."""
    rng = random.Random(0)
    a, b = [], []
    for name, rows in (("a", a), ("b", b)):
        for i in range(count):
            worth = round(rng.random(), 6)
            row = {"number": i, "prompt": f"p{i}", "response": f"{name} q{worth:.6f}"}
            rows.append(row | {"rm_score": worth, "gold_score": worth})
    return synthetic(tmp_path / "one", a), synthetic(tmp_path / "two", b), a, b


class Judge(BaseHTTPRequestHandler):
    """A chat endpoint; `mode` decides how it behaves, `asked` what it was asked."""

    mode, asked, dies_after, closing = "good", [], None, None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        question = body["messages"][0]["content"]
        kind.asked.append(question)
        number = len(kind.asked)
        if kind.mode == "no temperature" and "temperature" in body:
            return self.reply(
                400, {"error": {"message": "temperature 0 is not\nsupported", "type": "x"}}
            )
        if kind.mode == "no such model":
            return self.reply(
                404, {"message": f"{body['model']} is unknown to {self.headers['Authorization']}"}
            )
        if (kind.mode == "flaky" and number % 3) or (kind.dies_after and number > kind.dies_after):
            return self.reply(429 if number % 2 else 500, {})
        if kind.mode == "slow" and number == 1:
            kind.closing.wait(60)
        one, two = (
            float(part.split(" q")[1].split()[0]) for part in question.split("[Response ")[1:3]
        )
        answer = "1" if kind.mode == "first" or one > two else "2"
        text = json.dumps({"winner": answer})
        if kind.mode == "thinks":
            text = f'I would say {{"winner": "tie"}}, but no. So: {text}'
        if kind.mode == "garbage":
            text = ["I like 1", '{"winner": "3"}', '["1"]', "", None][number % 5]
        if kind.mode == "echo":
            text = f"your key is {self.headers['Authorization']}"
        reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        replies = {"html": "<html>", "empty": {"choices": []}, "list": [1]}
        return self.reply(200, replies.get(kind.mode, reply))

    def reply(self, code, body):
        self.send_response(code)
        self.send_header(
            "Content-Type", "text/html" if isinstance(body, str) else "application/json"
        )
        self.send_header("retry-after-ms", "5")  # so that the tests need not wait
        self.end_headers()
        self.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    pytest.importorskip("openai")
    Judge.mode, Judge.asked, Judge.dies_after, Judge.closing = "good", [], None, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    yield ["--judge", "llm", "gold", "--judge_model", "m", "--judge_url", url]
    Judge.closing.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["good", "slow", "flaky", "thinks"])
def test_an_honest_llm_agrees_with_gold_whatever_the_line_does(
    tmp_path, capsys, judge, mode, monkeypatch
):
    if mode == "slow":
        monkeypatch.setattr(chapter5, "TIMEOUT", 1.0)
    Judge.mode = mode
    one, two, a, b = duel_runs(tmp_path)
    table = printed(capsys, "duel", "--a", one, "--b", two, *judge)
    wins = sum(x["gold_score"] > y["gold_score"] for x, y in zip(a, b, strict=True))
    assert table[2][:3] == ["llm", "6", "0"]
    assert table[2][3] == share_cell(wins, 6)
    assert table[-1][2] == "1.00"  # agreement
    assert len(Judge.asked) >= 12


def test_a_preference_for_the_first_place_comes_out_as_ties(tmp_path, capsys, judge):
    Judge.mode = "first"
    one, two, *_ = duel_runs(tmp_path)
    table = printed(capsys, "duel", "--a", one, "--b", two, *judge)
    assert [cell.split()[0] for cell in table[2][3:6]] == ["0.00", "1.00", "0.00"]


@pytest.mark.parametrize("mode", ["garbage", "html", "echo", "empty", "list"])
def test_unparsable_answers_are_counted_and_no_key_is_written_or_printed(
    tmp_path, capsys, judge, mode
):
    Judge.mode = mode
    one, two, *_ = duel_runs(tmp_path, count=3)
    chapter5.main(["duel", "--a", one, "--b", two, *judge])
    output = capsys.readouterr()
    assert cells(output.out)[2][:3] == ["llm", "3", "3"]
    written = "".join(path.read_text() for path in Path(one).rglob("*.jsonl"))
    assert "sk-secret" not in written + output.out + output.err


def test_a_judge_that_refuses_the_temperature_says_so_and_can_do_without(tmp_path, capsys, judge):
    Judge.mode = "no temperature"
    one, two, *_ = duel_runs(tmp_path, count=2)
    command = ["duel", "--a", one, "--b", two, *judge]
    line = error(capsys, *command)
    assert "HTTP 400" in line
    assert "temperature 0 is not supported" in line
    assert "--judge_temperature none" in line
    assert len(Judge.asked) == 1  # a refusal is not tried again
    assert printed(capsys, *command, "--judge_temperature", "none")[2][:3] == ["llm", "2", "0"]
    assert "--judge_temperature" in error(capsys, *command, "--judge_temperature", "warm")


def test_a_refusal_is_shown_without_the_key(tmp_path, capsys, judge):
    Judge.mode = "no such model"
    one, two, *_ = duel_runs(tmp_path, count=2)
    line = error(capsys, "duel", "--a", one, "--b", two, *judge)
    assert "m is unknown to Bearer [key]" in line
    assert "sk-secret" not in line


def test_an_llm_judge_without_its_package_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    one, two, *_ = duel_runs(tmp_path, count=2)
    line = error(capsys, "duel", "--a", one, "--b", two, "--judge", "llm", "--judge_model", "m")
    assert "pip install openai" in line


@pytest.mark.parametrize(
    ("key", "url"), [("sk-se\rcret", "http://localhost:1/v1"), ("sk-secret", "http://[bad")]
)
def test_a_malformed_key_or_address_is_one_line_without_the_key(
    tmp_path, capsys, monkeypatch, key, url
):
    """A key from a file with CRLF lines once ended in a traceback that quoted it."""
    pytest.importorskip("openai")
    one, two, *_ = duel_runs(tmp_path, count=2)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    flags = ["--judge", "llm", "--judge_model", "m", "--judge_url", url]
    line = error(capsys, "duel", "--a", one, "--b", two, *flags)
    assert "cret" not in line
    assert "OPENAI_API_KEY" in line or "--judge_url" in line


def test_a_judge_that_nobody_answers_for_is_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(chapter5, "RETRIES", 0)
    one, two, *_ = duel_runs(tmp_path, count=2)
    flags = ["--judge", "llm", "--judge_model", "m", "--judge_url", "http://127.0.0.1:1/v1"]
    assert "does not answer" in error(capsys, "duel", "--a", one, "--b", two, *flags)


def test_a_judge_that_dies_halfway_is_asked_only_the_rest(tmp_path, capsys, judge):
    one, two, *_ = duel_runs(tmp_path)
    Judge.dies_after = 5
    line = error(capsys, "duel", "--a", one, "--b", two, *judge)
    assert "HTTP" in line
    assert "sk-secret" not in line
    answers = Path(one) / "duel-two" / "answers.jsonl"
    assert len(answers.read_text().splitlines()) == 5
    with answers.open("a") as file:
        file.write('{"question": "cut sh')  # and it was cut short while writing
    Judge.dies_after, Judge.asked = None, []
    assert printed(capsys, "duel", "--a", one, "--b", two, *judge)[2][1] == "6"
    assert len(Judge.asked) == len(set(Judge.asked)) == 7
    assert len(answers.read_text().splitlines()) == 12


def test_a_human_judges_blind_and_an_interruption_loses_no_verdict(tmp_path, capsys, monkeypatch):
    one, two, *_ = duel_runs(tmp_path, count=4)
    command = ["duel", "--a", one, "--b", two, "--judge", "human"]

    def types(*answers):
        """A person who types these and then presses Ctrl-C."""
        waiting = iter(answers)

        def read(prompt):
            for answer in waiting:
                return answer
            raise KeyboardInterrupt

        monkeypatch.setattr("builtins.input", read)

    types("1", "maybe", "2")
    assert "the same command goes on" in error(capsys, *command)
    answers = Path(one) / "duel-two" / "answers.jsonl"
    kept = [json.loads(line)["answer"] for line in answers.read_text().splitlines()]
    assert [json.loads(answer) for answer in kept] == [{"winner": "1"}, {"winner": "2"}]
    types("tie", "1")
    chapter5.main(command)
    shown = capsys.readouterr().out
    assert shown.count("[Prompt]") == 2  # only the rest was asked
    assert "one" not in shown.split("| judge")[0]  # no name of a run
    verdicts = Path(one) / "duel-two" / "verdicts.jsonl"
    rows = [json.loads(line) for line in verdicts.read_text().splitlines()]
    firsts = [row["first"] for row in rows]
    other = {"a": "b", "b": "a"}
    assert [row["human"] for row in rows] == [firsts[0], other[firsts[1]], "tie", firsts[3]]


def test_a_response_cannot_write_to_the_terminal_of_a_human_judge(capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "tie")
    chapter5.ask_human("a\x1b[2Jb\nc")
    assert capsys.readouterr().out == "\na[2Jb\nc\n"


# Runs with weights


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The --out folder of a tiny toy run of two arms; its reward model has learned nothing."""
    folder = tmp_path_factory.mktemp("toy")
    sizes = ["--max_prompt", "16", "--max_response", "32", "--batch_size", "8"]
    models = ["--sft", str(folder / "sft"), "--reward_model", str(folder / "reward")]
    load_share = sft.load_share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "load_share", lambda *args: load_share(*args)[:200])
        patch.setattr(ma_ppo, "draw_curves", lambda *ignored: None)  # a process of its own
        sft.main([*sizes, "--steps", "30", "--out", str(folder / "sft")])
        torch.manual_seed(0)
        reward.ScalarModel.load(folder / "sft").save_pretrained(folder / "reward")
        reward.load_tokenizer(folder / "sft").save_pretrained(folder / "reward")
        ma_ppo.main([*sizes, *models, "--steps", "3", "--out", str(folder)])
    return folder


def stored(run):
    return [json.loads(line) for line in (run / "score" / "samples.jsonl").read_text().splitlines()]


def number(text):
    return float(text.split()[0])


def resampled(values):
    """The percentile interval, in plain Python but for the places that are drawn."""
    places = np.random.default_rng(0).integers(len(values), size=(2000, len(values))).tolist()
    means = sorted(sum(values[i] for i in row) / len(row) for row in places)
    return sum(values) / len(values), means[50], means[1949]


def smoothed(rows, key):
    """Three steps: mean of all so far."""
    return [sum(row[key] for row in rows[: i + 1]) / (i + 1) for i in range(3)]


def as_cell(values):
    return "{:.2f} [{:.2f}, {:.2f}]".format(*resampled(values))


@pytest.fixture(scope="module")
def written(toy):
    """The report of the tiny run: (its text, {section: cells}, {arm: stored samples})."""
    chapter5.main(["report", str(toy), "--prompts", "12", "--n", "1", "2", "4"])
    text = (toy / "report.md").read_text()
    sections = {part.split("\n")[0].strip(): cells(part) for part in text.split("\n## ")[1:]}
    return text, sections, {name: stored(toy / name) for name in ("token", "fixed")}


def test_the_report_shows_every_picture(toy, written):
    for png in ("curves", "frontier", "bestofn", "heatmap"):
        assert (toy / f"{png}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({png}.png)" in written[0]


def held_out_values(rows, key):
    """The values of one measure, a sample each, in plain Python."""
    if key != "repeated":
        return [float(row[key]) for row in rows if row[key] is not None]
    values = []
    for row in rows:
        words = row["response"].split()
        grams = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
        values += [1 - len(set(grams)) / len(grams)] if grams else []
    return values


def test_the_scores_of_the_report_come_from_the_stored_samples(written):
    _, sections, rows = written
    heads, _, *lines = sections["score"]
    assert len(lines) == 5  # two arms at two temperatures, and the references
    for policy, temperature, count, *measures in lines:
        arm = "fixed" if policy == "references" else policy.split("/")[1]
        at = {"1": 1.0, "greedy": 0.0, "–": "references"}[temperature]
        mine = [row for row in rows[arm] if row["temperature"] == at and row["sample"] == 0]
        assert len(mine) == int(count) == 12
        for key, shown in zip(heads[3:], measures, strict=True):
            values = held_out_values(mine, key)
            assert shown == (as_cell(values) if values else "–"), key


def test_best_of_n_of_the_report_enumerated(written):
    _, sections, rows = written
    for policy, _, n, kl, *shown in sections["bestofn"][2:]:
        mine = [row for row in rows[policy.split("/")[1]] if row["temperature"] == 1.0]
        assert kl == f"{math.log(int(n)) - (int(n) - 1) / int(n):.2f}"
        for key, found in zip(("rm_score", "gold_score"), shown, strict=True):
            picks = []
            for prompt in range(12):
                drawn = [row for row in mine if row["number"] == prompt]
                subsets = combinations(drawn, int(n))
                best = [max(x, key=lambda row: (row["rm_score"], row["sample"])) for x in subsets]
                picks.append(sum(row[key] for row in best) / len(best))
            assert found == as_cell(picks)


def test_the_duel_of_the_report_counted(written):
    _, sections, rows = written
    arms = (rows["fixed"], rows["token"])
    a, b = ([r for r in side if (r["temperature"], r["sample"]) == (1.0, 0)] for side in arms)
    signs = {}
    for judge, count, unparsable, *shares, matched in sections["duel fixed"][2:4]:
        key = f"{judge}_score"
        sign = [(x[key] > y[key]) - (x[key] < y[key]) for x, y in zip(a, b, strict=True)]
        signs[judge] = sign
        lengths = [(len(x["response"]), len(y["response"])) for x, y in zip(a, b, strict=True)]
        close = [abs(x - y) <= 0.1 * max(x, y) for x, y in lengths]
        near = [v for v, fits in zip(sign, close, strict=True) if fits]
        wanted = [(sign.count(v), 12) for v in (1, 0, -1)]
        wanted += [(x.count(1), x.count(1) + x.count(-1)) for x in (sign, near)]
        assert shares == [share_cell(x, y) for x, y in wanted]
        assert (count, unparsable, matched) == ("12", "0", str(sum(close)))
    *_, (names, count, equal, kappa) = sections["duel fixed"]
    rm, gold = signs["rm"], signs["gold"]
    same = sum(x == y for x, y in zip(rm, gold, strict=True)) / 12
    chance = sum(rm.count(v) * gold.count(v) for v in (-1, 0, 1)) / 144
    wanted = "–" if chance == 1 else f"{(same - chance) / (1 - chance):.2f}"
    assert (names, count, equal, kappa) == ("rm, gold", "12", f"{same:.2f}", wanted)


def test_frontier_and_curves_of_the_report_come_from_the_metrics(toy, written):
    _, sections, _ = written
    metrics = {}
    for arm in ("token", "fixed"):
        lines = (toy / arm / "metrics.jsonl").read_text().splitlines()
        metrics[arm] = [json.loads(line) for line in lines]
    common = min(max(smoothed(rows, "kl")) for rows in metrics.values())
    for arm, nats, *shown in sections["frontier"][2:]:
        kl = smoothed(metrics[arm], "kl")
        assert nats == f"{kl[-1]:.2f}"
        top = [max(kl[: i + 1]) for i in range(3)]
        before = max(i for i in range(3) if top[i] <= common)
        wanted = []
        for key in ("rm_score", "gold_score"):
            y = smoothed(metrics[arm], key)
            wanted.append(f"{(y[-1] - y[0]) / kl[-1]:.2f}" if kl[-1] > 0 else "–")
            there = y[before]
            if before < 2:
                share = (common - top[before]) / (top[before + 1] - top[before])
                there += share * (y[before + 1] - there)
            wanted.append(f"{there:.2f}")
        assert shown == wanted
    for arm, *closing in sections["curves"][2:]:
        ends = [
            f"{smoothed(metrics[arm], key)[-1]:.2f}" for key in ("rm_score", "gold_score", "kl")
        ]
        assert [closing[0], closing[1], closing[3]] == ends


def without(rows):
    return sorted(
        ((r["temperature"], r["number"], r["sample"], r["response"]), r["rm_score"], r["kl"])
        for r in rows
    )


@pytest.mark.parametrize(
    "how", ["micro batches", pytest.param("two processes", marks=pytest.mark.slow), "more samples"]
)
def test_samples_do_not_depend_on_batches_ranks_or_other_samples(toy, tmp_path, how, capsys):
    for copy in ("one", "other"):
        shutil.copytree(toy / "token", tmp_path / copy, ignore=shutil.ignore_patterns("score"))
    flags = ["--prompts", "7", "--samples", "2"]
    chapter5.main(["score", "--run", str(tmp_path / "one"), *flags])
    flags = ["score", "--run", str(tmp_path / "other"), *flags]
    if how == "micro batches":
        chapter5.main([*flags, "--micro_batch_size", "3"])
    elif how == "two processes":
        # without "--" torchrun takes --run for an abbreviation of its own --run-path
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -- eval.py"
        command = [sys.executable, *torchrun.split(), *flags, "--device", "cpu"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(cells(done.stdout)) == 3  # printed once
    else:
        chapter5.main(
            ["score", "--run", str(tmp_path / "other"), "--prompts", "3", "--samples", "1"]
        )
        chapter5.main(flags)
    one, other = without(stored(tmp_path / "one")), without(stored(tmp_path / "other"))
    assert [row[0] for row in one] == [row[0] for row in other]
    for (_, *x), (_, *y) in zip(one, other, strict=True):
        assert x == pytest.approx(y, abs=1e-3)


def test_a_retrained_model_is_sampled_again_and_an_untouched_one_is_not(
    toy, tmp_path, capsys, monkeypatch
):
    shutil.copytree(toy / "token", tmp_path / "run", ignore=shutil.ignore_patterns("score"))
    command = ["score", "--run", str(tmp_path / "run"), "--prompts", "3"]
    chapter5.main(command)
    draw, drawn = chapter5.draw, []
    monkeypatch.setattr(
        chapter5, "draw", lambda jobs, *more: drawn.append(len(jobs)) or draw(jobs, *more)
    )
    chapter5.main(command)
    assert drawn == []
    os.utime(tmp_path / "run" / "model" / "model.safetensors", (1, 1))
    chapter5.main(command)
    assert drawn == [3]
    assert all(row["prompt"] in {r["prompt"] for r in sft.split(sft.load_rows("toy", ()), "test")}
               for row in stored(tmp_path / "run"))  # fmt: skip


def test_program_tasks_are_scored_by_their_unit_tests_instead_of_the_rm(
    toy, tmp_path, capsys, monkeypatch
):
    shutil.copytree(toy / "token", tmp_path / "run", ignore=shutil.ignore_patterns("score"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"task": "toy-code"}))
    problem = {"input_output": {"inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]}}
    rows = [
        {"prompt": f"Say it, {i}.", "problem": problem | {"difficulty": "easy"}} for i in range(4)
    ]
    monkeypatch.setattr(sft, "split", lambda *ignored: rows)
    written, sample = ["print(input())", "print(1)", "print(", "1 / 0"], ma_ppo.sample

    def programs(policy, examples, *more):
        rollout = sample(policy, examples, *more)
        rollout.texts = [written[example["number"]] for example in examples]
        return rollout

    monkeypatch.setattr(ma_ppo, "sample", programs)
    every = lambda batch, tokenizer: torch.ones(len(batch.tokens), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(
        ma_ppo, "ended", every
    )  # else the untrained model's cut responses score nothing
    table = printed(
        capsys, "passk", "--run", tmp_path / "run", "--prompts", 4, "--samples", 2, "--k", 1, 2
    )
    assert [row[2:4] for row in table[2:]] == [["all", "4"], ["easy", "4"]]
    assert [number(x) for row in table[2:] for x in row[4:]] == [0.25] * 4
    found = {row["number"]: (row["rm_score"], row["passed"]) for row in stored(tmp_path / "run")}
    assert found == {
        0: (pytest.approx(1.0), True),
        1: (pytest.approx(-0.3 + 1.3 / 2), False),
        2: (-1.0, False),
        3: (pytest.approx(-0.6), False),
    }


def test_the_kl_of_many_samples_is_the_exact_kl_of_a_tiny_model():
    """All responses of at most two tokens, enumerated, against the mean over samples."""
    tokenizer = sft.small_tokenizer("toy", [" a b"])
    size = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.7, **size)
    models = {}
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(config).eval()
    zeros = {"reward": lambda batch: torch.zeros(batch.tokens.shape)}
    cfg = ma_ppo.Config(task="hh", max_response=2, temperature=0.7)
    eos, prompt, exact = tokenizer.eos_token_id, tokenizer(" a b").input_ids, 0.0

    def shares(model, ids):
        with torch.no_grad():
            return (
                (model(torch.tensor([ids])).logits[0, -1] / cfg.temperature)
                .log_softmax(-1)
                .tolist()
            )

    for first in range(len(tokenizer)):
        p, q = (shares(model, prompt)[first] for model in models.values())
        if first == eos:
            exact += math.exp(p) * (p - q)
            continue
        later = [shares(model, [*prompt, first]) for model in models.values()]
        for x, y in zip(*later, strict=True):
            exact += math.exp(p + x) * (p + x - q - y)
    rows = [{"prompt": " a b", "number": i, "text": "", "sample": 0} for i in range(4000)]
    found = [row["kl"] for row in chapter5.respond(rows, 0.7, models | zeros, tokenizer, cfg)]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - exact) < 4 * error < 0.1 * exact


def test_a_runs_name_below_its_folder_names_the_arm(tmp_path, capsys):
    """results/toy holds seed0/fixed and seed0/decay/fixed: two arms, of one name."""
    for name, slope in (("token", 1), ("fixed", 2), ("decay/fixed", 4)):
        (tmp_path / "seed0" / name).mkdir(parents=True)
        rows = [{"rm_score": slope * i, "kl": i, "eos_rate": 1, "seconds": 1} for i in range(21)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "seed0" / name / "metrics.jsonl").write_text(text)
    arms = ["token", "fixed", "decay/fixed"]
    table = printed(capsys, "seeds", "--run", tmp_path / "seed0", "--arms", *arms)
    assert [row[0] for row in table[2:]] == arms
    assert [number(row[1]) for row in table[2:]] == [18, 36, 72]  # the mean of the last five


def test_curves_over_seeds_give_medians_areas_and_a_band(tmp_path, capsys):
    runs = []
    for seed, slope in enumerate((1.0, 2.0, 4.0)):
        for arm, factor in (("token", 1), ("fixed", 2)):
            folder = tmp_path / f"seed{seed}" / arm
            folder.mkdir(parents=True)
            rows = [
                {
                    "rm_score": slope * factor * i,
                    "kl": i,
                    "response_length": 9,
                    "eos_rate": 1,
                    "seconds": 1,
                }
                for i in range(21)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(tmp_path / f"seed{seed}")
    table = printed(capsys, "curves", "--run", *runs, "--png", tmp_path / "c.png")
    assert table[2][:2] == [
        "token",
        "36.00 (18.00 to 72.00)",
    ]  # the mean of steps 16 to 20 is slope * 18
    assert [row[0] for row in table[4:]] == ["arm", "---", "token", "fixed"]
    assert number(table[-2][5]) == 20.0  # area: the mean of 0..20 is 10, times the slopes' median 2
    assert number(table[-1][5]) == 40.0
    (tmp_path / "seed3").mkdir()
    shutil.copytree(tmp_path / "seed0" / "token", tmp_path / "seed3" / "token")
    assert "different numbers" in error(capsys, "curves", "--run", *runs, tmp_path / "seed3")
