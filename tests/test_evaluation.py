"""Chapter 5: statistics, held-out samples, judges, the report."""

import json
import math
import os
import pty
import random
import select
import signal
import subprocess
import sys
import threading
import time
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
from eval import agreement, best_of_n, bootstrap, pass_at_k, texture
from reward import exact_share

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
        picks = [worths[max(subset, key=lambda i: (scores[i], i))] for subset in combinations(range(6), n)]
        assert best_of_n(scores, worths, n) == pytest.approx(sum(picks) / len(picks))


def test_the_bootstrap_interval_covers_a_known_mean_at_least_92_times_in_100():
    rng = np.random.default_rng(1)
    for sample in (lambda: rng.normal(3, 2, 60), lambda: rng.exponential(3, 120)):
        hits = [low <= 3 <= high for _, low, high in (bootstrap(sample()) for _ in range(400))]
        assert 0.92 <= sum(hits) / len(hits) <= 0.99
    assert bootstrap([]) == (None,)


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1.0), (1, 20, 0.0013, 0.2487)],
)
def test_exact_intervals_are_those_of_printed_tables(wins, count, low, high):
    assert exact_share(wins, count) == pytest.approx((wins / count, low, high), abs=5e-5)


def test_an_exact_interval_ends_where_the_binomial_tails_hold_a_fortieth():
    for wins, count in ((3, 12), (40, 128), (700, 2000)):
        _, low, high = exact_share(wins, count)

        def tail(p, numbers, count=count):
            logs = [i * math.log(p) + (count - i) * math.log(1 - p) for i in numbers]
            return sum(
                math.exp(math.log(math.comb(count, i)) + x) for i, x in zip(numbers, logs, strict=True)
            )

        assert tail(low, range(wins, count + 1)) == pytest.approx(0.025, rel=1e-6)
        assert tail(high, range(wins + 1)) == pytest.approx(0.025, rel=1e-6)
    assert exact_share(0, 0) == (None,)


def test_kappa_worked_by_hand():
    # 3 of 4 equal; by chance (2 * 1 + 2 * 3) / 16 = 1 / 2: kappa = (3/4 - 1/2) / (1/2)
    assert agreement(["a", "a", "b", "b", "a"], ["a", "b", "b", "b", "unparsable"]) == (4, 0.75, 0.5)
    assert agreement(["a", "a"], ["a", "a"]) == (2, 1.0, None)
    assert agreement(["unparsable"], ["a"]) == (0, None, None)


def test_texture_of_ordinary_one_word_and_empty_responses():
    row = {"reference": None, "temperature": 1.0}
    found = texture(row | {"response": "a b a b a"})
    assert (found["distinct_1"], found["distinct_2"]) == (2 / 5, 2 / 4)
    assert found["repeated"] == pytest.approx(1 - 2 / 3)
    assert set(texture(row | {"response": ""}).values()) == {None}
    assert texture(row | {"response": "a"}) == dict(
        distinct_1=1.0, distinct_2=None, distinct_3=None, repeated=None
    )


# Runs without weights: what was sampled is measured


def synthetic(folder, rows, **config):
    (folder / "score").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task": "toy", "temperature": 1.0} | config))
    base = {"temperature": 1.0, "sample": 0, "drawn_with": [], "reference": None, "difficulty": None}
    base |= {"prompt": "p", "response": "r", "rm_score": 0.0, "gold_score": 0.0, "passed": None}
    lines = [json.dumps(base | row) + "\n" for row in rows]
    (folder / "score" / "samples.jsonl").write_text("".join(lines))
    return str(folder)


def cells(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
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
        capsys, "duel", "--a", run, "--b", synthetic(tmp_path / "third", [{"number": 0}], reward_model="x")
    )
    empty = synthetic(tmp_path / "empty", [])
    assert "model" in error(capsys, "score", "--run", empty)
    assert "--judge" in error(capsys, "duel", "--a", run, "--b", run, "--judge", "dice")
    assert "--judge_model" in error(capsys, "duel", "--a", run, "--b", run, "--judge", "llm")
    assert "at least" in error(capsys, "bestofn", "--run", run, "--n", 0)


def duel_runs(tmp_path, count=6):
    """Two runs whose responses say how good they are."""
    rng = random.Random(0)
    a, b = ([{"number": i, "prompt": f"p{i}", "response": f"{x} q{rng.random():.6f}"} for i in range(count)]
            for x in "ab")  # fmt: skip
    for rows in (a, b):
        for row in rows:
            row["rm_score"] = row["gold_score"] = float(row["response"].split("q")[1])
    return synthetic(tmp_path / "one", a), synthetic(tmp_path / "two", b), a, b


class Judge(BaseHTTPRequestHandler):
    """A chat endpoint; `mode` decides how it behaves, `asked` what it was asked."""

    mode, asked, dies_after = "good", [], None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        kind = type(self)
        kind.asked.append(question)
        number = len(kind.asked)
        if (kind.mode == "flaky" and number % 3) or (kind.dies_after and number > kind.dies_after):
            self.send_response(429 if number % 2 else 500)
            self.end_headers()
            return
        if kind.mode == "slow" and number == 1:
            time.sleep(0.6)
        one, two = (float(part.split(" q")[1].split()[0]) for part in question.split("[Response ")[1:3])
        answer = {"good": "1" if one > two else "2", "first": "1"}.get(kind.mode, "1" if one > two else "2")
        text = json.dumps({"winner": answer})
        if kind.mode == "garbage":
            text = ["I like 1", '{"winner": "3"}', '["1"]', "", '{"winner": "1", "more": 2}'][number % 5]
        if kind.mode == "echo":
            text = f"your key is {self.headers['Authorization']}"
        self.send_response(200)
        self.end_headers()
        reply = {"choices": [{"message": {"content": text}}]}
        self.wfile.write(b"<html>" if kind.mode == "html" else json.dumps(reply).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    Judge.mode, Judge.asked, Judge.dies_after = "good", [], None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(chapter5, "PAUSES", (0.01,) * 5)
    monkeypatch.setattr(chapter5, "TIMEOUT", 0.3)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    yield [
        "--judge",
        "llm",
        "gold",
        "--judge_model",
        "m",
        "--judge_url",
        f"http://127.0.0.1:{server.server_port}/v1",
    ]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["good", "slow", "flaky"])
def test_an_honest_llm_agrees_with_gold_whatever_the_line_does(tmp_path, capsys, judge, mode):
    Judge.mode = mode
    one, two, a, b = duel_runs(tmp_path)
    table = printed(capsys, "duel", "--a", one, "--b", two, *judge)
    wins = sum(x["gold_score"] > y["gold_score"] for x, y in zip(a, b, strict=True)) / 6
    assert table[2][:3] == ["llm", "6", "0"]
    assert table[2][3] == "{:.2f} [{:.2f}, {:.2f}]".format(*exact_share(round(6 * wins), 6))
    assert table[-1][2] == "1.00"  # agreement
    assert len(Judge.asked) >= 12


def test_a_preference_for_the_first_place_comes_out_as_ties(tmp_path, capsys, judge):
    Judge.mode = "first"
    one, two, *_ = duel_runs(tmp_path)
    table = printed(capsys, "duel", "--a", one, "--b", two, *judge)
    assert [cell.split()[0] for cell in table[2][3:6]] == ["0.00", "1.00", "0.00"]


@pytest.mark.parametrize("mode", ["garbage", "html", "echo"])
def test_unparsable_answers_are_counted_and_no_key_is_written_or_printed(tmp_path, capsys, judge, mode):
    Judge.mode = mode
    one, two, *_ = duel_runs(tmp_path)
    chapter5.main(["duel", "--a", one, "--b", two, *judge])
    output = capsys.readouterr()
    assert cells(output.out)[2][:3] == ["llm", "6", "6"]
    written = "".join(path.read_text() for path in Path(one).rglob("*.jsonl"))
    assert "sk-secret" not in written + output.out + output.err


@pytest.mark.parametrize(
    ("key", "url"), [("sk-se\rcret", "http://localhost:1/v1"), ("sk-secret", "http://[bad")]
)
def test_a_malformed_key_or_address_is_one_line_without_the_key(tmp_path, capsys, monkeypatch, key, url):
    """A key from a file with CRLF lines once ended in a traceback that quoted it."""
    one, two, *_ = duel_runs(tmp_path, count=2)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as stop:
        chapter5.main(
            ["duel", "--a", one, "--b", two, "--judge", "llm", "--judge_model", "m", "--judge_url", url]
        )
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "secret" not in line
    assert "cret" not in line
    assert "ValueError" in line or "URL" in line


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


def type_into(command, answers, interrupt_after=None):
    """Run a command on a terminal of its own, typing an answer at each prompt -> (code, what it showed)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which background runs of the tests ignore
        os.execv(command[0], command)
    shown, given, waiting = "", 0, 0
    while True:
        if not select.select([terminal], [], [], 100 if given != interrupt_after else 3)[0]:
            # A signal between the prompt and the read that follows it waits for the next one.
            os.kill(pid, signal.SIGINT if given == interrupt_after else signal.SIGKILL)
            continue
        try:
            shown += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            break
        while shown.count("(Ctrl-C stops)") > waiting:
            waiting += 1
            if interrupt_after is not None and given == interrupt_after:
                time.sleep(0.2)
                os.kill(pid, signal.SIGINT)
            else:
                os.write(terminal, answers[given].encode() + b"\n")
                given += 1
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_a_human_judges_blind_and_an_interruption_loses_no_verdict(tmp_path):
    one, two, *_ = duel_runs(tmp_path, count=4)
    command = [
        sys.executable,
        "eval.py",
        "duel",
        "--a",
        one,
        "--b",
        two,
        "--judge",
        "human",
        "--device",
        "cpu",
    ]
    code, shown = type_into(command, ["1", "maybe", "2"], interrupt_after=3)
    assert code == 2
    assert "the same command goes on" in shown
    assert "Traceback" not in shown
    answers = Path(one) / "duel-two" / "answers.jsonl"
    assert [json.loads(json.loads(x)["answer"]) for x in answers.read_text().splitlines()] == [
        {"winner": "1"},
        {"winner": "2"},
    ]
    code, shown = type_into(command, ["tie", "1"])
    assert code == 0
    assert shown.count("[Prompt]") == 2  # only the rest was asked
    rows = [json.loads(x) for x in (Path(one) / "duel-two" / "verdicts.jsonl").read_text().splitlines()]
    other = {"a": "b", "b": "a"}
    assert [row["human"] for row in rows] == [
        rows[0]["first"], other[rows[1]["first"]], "tie", rows[3]["first"]
    ]  # fmt: skip
    assert tmp_path.name not in shown.split("| judge")[0]  # no name of a run


# Runs with weights


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The --out folder of a tiny toy run of two arms."""
    folder = tmp_path_factory.mktemp("toy")
    small = ["--max_prompt", "16", "--max_response", "32"]
    sft.main(["--steps", "60", "--batch_size", "16", "--max_prompt", "16", "--out", str(folder / "sft")])
    stage = ["--sft", str(folder / "sft")]
    reward.main(["--steps", "5", "--batch_size", "8", *small, *stage, "--out", str(folder / "reward")])
    stage += ["--reward_model", str(folder / "reward")]
    ma_ppo.main(["--steps", "3", "--batch_size", "8", *small, *stage, "--out", str(folder)])
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


def test_every_number_of_the_report_comes_from_the_raw_files(toy, capsys):
    chapter5.main(["report", str(toy), "--prompts", "12", "--n", "1", "2", "4"])
    text = (toy / "report.md").read_text()
    sections = {part.split("\n")[0].strip(): cells(part) for part in text.split("## ")[1:]}
    rows = {name: stored(toy / name) for name in ("token", "fixed")}
    for name in sections["score"][2:]:
        policy, temperature, count, *measures = name
        arm = "fixed" if policy == "references" else policy.split("/")[1]
        at = {"1": 1.0, "greedy": 0.0, "–": "references"}[temperature]
        mine = [row for row in rows[arm] if row["temperature"] == at and row["sample"] == 0]
        assert len(mine) == int(count) == 12
        heads = sections["score"][0][3:]
        for key, cell in zip(heads, measures, strict=True):
            if key.startswith(("distinct", "repeated")):
                size = {"distinct_1": 1, "distinct_2": 2, "repeated": 3}[key]
                values = []
                for row in mine:
                    words = row["response"].split()
                    grams = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
                    share = len(set(grams)) / len(grams) if grams else None
                    values += [] if share is None else [1 - share if key == "repeated" else share]
            else:
                values = [float(row[key]) for row in mine if row[key] is not None]
            assert cell == (as_cell(values) if values else "–"), key
    for policy, _, n, kl, rm, gold in sections["bestofn"][2:]:
        mine = [row for row in rows[policy.split("/")[1]] if row["temperature"] == 1.0]
        assert kl == f"{math.log(int(n)) - (int(n) - 1) / int(n):.2f}"
        for key, cell in (("rm_score", rm), ("gold_score", gold)):
            picks = []
            for prompt in range(12):
                drawn = [row for row in mine if row["number"] == prompt]
                best = [
                    max(x, key=lambda row: (row["rm_score"], row["sample"]))
                    for x in combinations(drawn, int(n))
                ]
                picks.append(sum(row[key] for row in best) / len(best))
            assert cell == as_cell(picks)
    key = (1.0, 0)
    pairs = [[r for r in rows[arm] if (r["temperature"], r["sample"]) == key] for arm in ("fixed", "token")]
    for judge, count, unparsable, *shares, matched in sections["duel fixed"][2:4]:
        scores = [(x[f"{judge}_score"], y[f"{judge}_score"]) for x, y in zip(*pairs, strict=True)]
        lengths = [(len(x["response"]), len(y["response"])) for x, y in zip(*pairs, strict=True)]
        close = [abs(x - y) <= 0.1 * max(x, y) for x, y in lengths]
        wins, losses = [x > y for x, y in scores], [x < y for x, y in scores]
        near = [sum(x and c for x, c in zip(side, close, strict=True)) for side in (wins, losses)]
        wanted = [(sum(wins), 12), (12 - sum(wins) - sum(losses), 12), (sum(losses), 12)]
        wanted += [(sum(wins), sum(wins) + sum(losses)), (near[0], sum(near))]
        assert [number(x) if x != "–" else None for x in shares] == [
            round(x / y, 2) if y else None for x, y in wanted
        ]
        assert (count, unparsable, matched) == ("12", "0", str(sum(close)))
    metrics = {a: [json.loads(x) for x in (toy / a / "metrics.jsonl").read_text().splitlines()] for a in rows}
    for arm, nats, rm_rate, rm_at, gold_rate, gold_at in sections["frontier"][2:]:
        smooth = {key: smoothed(metrics[arm], key) for key in ("kl", "rm_score", "gold_score")}
        kl = smooth["kl"]
        assert nats == f"{kl[-1]:.2f}"
        for key, rate in (("rm_score", rm_rate), ("gold_score", gold_rate)):
            gain = smooth[key][-1] - smooth[key][0]
            assert rate == (f"{gain / kl[-1]:.2f}" if kl[-1] > 0 else "–")
        top = [max(kl[: i + 1]) for i in range(3)]
        common = min(max(smoothed(metrics[a], "kl")) for a in metrics)
        for key, cell in (("rm_score", rm_at), ("gold_score", gold_at)):
            before = max(i for i in range(3) if top[i] <= common)
            wanted = smooth[key][before]
            if before < 2:
                share = (common - top[before]) / (top[before + 1] - top[before])
                wanted += share * (smooth[key][before + 1] - wanted)
            assert cell == f"{wanted:.2f}"
    for arm, *closing in sections["curves"][2:]:
        ends = [smoothed(metrics[arm], key)[-1] for key in ("rm_score", "gold_score")]
        assert closing[:2] == [f"{end:.2f}" for end in ends]
        assert closing[3] == f"{smoothed(metrics[arm], 'kl')[-1]:.2f}"
    *_, (names, count, equal, kappa) = sections["duel fixed"]
    signs = [
        [(x[k] > y[k]) - (x[k] < y[k]) for x, y in zip(*pairs, strict=True)]
        for k in ("rm_score", "gold_score")
    ]
    same = sum(x == y for x, y in zip(*signs, strict=True)) / 12
    chance = sum(signs[0].count(v) * signs[1].count(v) for v in (-1, 0, 1)) / 144
    wanted = "–" if chance == 1 else f"{(same - chance) / (1 - chance):.2f}"
    assert (names, count, equal, kappa) == ("rm, gold", "12", f"{same:.2f}", wanted)
    for png in ("curves", "frontier", "bestofn", "heatmap"):
        assert (toy / f"{png}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({png}.png)" in text


def without(rows):
    return sorted(
        ((r["temperature"], r["number"], r["sample"], r["response"]), r["rm_score"], r["kl"]) for r in rows
    )


@pytest.mark.parametrize("how", ["micro batches", "two processes", "more samples"])
def test_samples_do_not_depend_on_batches_ranks_or_other_samples(toy, tmp_path, how, capsys):
    for copy in ("one", "other"):
        subprocess.run(["cp", "-r", str(toy / "token"), str(tmp_path / copy)], check=True)
        subprocess.run(["rm", "-rf", str(tmp_path / copy / "score")], check=True)
    flags = ["--prompts", "7", "--samples", "2"]
    chapter5.main(["score", "--run", str(tmp_path / "one"), *flags])
    flags = ["score", "--run", str(tmp_path / "other"), *flags]
    if how == "micro batches":
        chapter5.main([*flags, "--micro_batch_size", "3"])
    elif how == "two processes":
        # without "--" torchrun takes --run for an abbreviation of its own --run-path
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -- eval.py"
        command = [sys.executable, *torchrun.split()]
        done = subprocess.run([*command, *flags, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(cells(done.stdout)) == 3  # printed once
    else:
        chapter5.main(["score", "--run", str(tmp_path / "other"), "--prompts", "3", "--samples", "1"])
        chapter5.main(flags)
    one, other = without(stored(tmp_path / "one")), without(stored(tmp_path / "other"))
    assert [row[0] for row in one] == [row[0] for row in other]
    for (_, *x), (_, *y) in zip(one, other, strict=True):
        assert x == pytest.approx(y, abs=1e-3)


def test_a_retrained_model_is_sampled_again_and_an_untouched_one_is_not(toy, tmp_path, capsys, monkeypatch):
    subprocess.run(["cp", "-r", str(toy / "token"), str(tmp_path / "run")], check=True)
    command = ["score", "--run", str(tmp_path / "run"), "--prompts", "3"]
    chapter5.main(command)
    draw, drawn = chapter5.draw, []
    monkeypatch.setattr(chapter5, "draw", lambda jobs, *more: drawn.append(len(jobs)) or draw(jobs, *more))
    chapter5.main(command)
    assert drawn == []
    os.utime(tmp_path / "run" / "model" / "model.safetensors", (1, 1))
    chapter5.main(command)
    assert drawn == [3]
    assert all(row["prompt"] in {r["prompt"] for r in sft.split(sft.load_rows("toy", ()), "test")}
               for row in stored(tmp_path / "run"))  # fmt: skip


def test_program_tasks_are_scored_by_their_unit_tests_instead_of_the_rm(toy, tmp_path, capsys, monkeypatch):
    subprocess.run(["cp", "-r", str(toy / "token"), str(tmp_path / "run")], check=True)
    subprocess.run(["rm", "-rf", str(tmp_path / "run" / "score")], check=True)
    problem = {"input_output": {"inputs": ["1\n", "2\n"], "outputs": ["1\n", "2\n"]}}
    rows = [{"prompt": f"Say it, {i}.", "problem": problem | {"difficulty": "easy"}} for i in range(4)]
    monkeypatch.setattr(sft, "split", lambda *ignored: rows)
    written, sample = ["print(input())", "print(1)", "print(", "1 / 0"], ma_ppo.sample

    def programs(policy, examples, *more):
        rollout = sample(policy, examples, *more)
        rollout.texts = [written[example["number"]] for example in examples]
        return rollout

    monkeypatch.setattr(ma_ppo, "sample", programs)
    every = lambda batch, tokenizer: torch.ones(len(batch.tokens), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(ma_ppo, "ended", every)  # else the untrained model's cut responses score nothing
    table = printed(capsys, "passk", "--run", tmp_path / "run", "--prompts", 4, "--samples", 2, "--k", 1, 2)
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
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.7, **size)
    models = {}
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(config).eval()
    zeros = {name: lambda batch: torch.zeros(batch.tokens.shape) for name in ("critic", "reward")}
    cfg = ma_ppo.Config(task="hh", max_response=2, temperature=0.7)
    eos, prompt, exact = tokenizer.eos_token_id, tokenizer(" a b").input_ids, 0.0

    def shares(model, ids):
        with torch.no_grad():
            return (model(torch.tensor([ids])).logits[0, -1] / cfg.temperature).log_softmax(-1).tolist()

    for first in range(len(tokenizer)):
        p, q = (shares(model, prompt)[first] for model in models.values())
        if first == eos:
            exact += math.exp(p) * (p - q)
            continue
        later = [shares(model, [*prompt, first]) for model in models.values()]
        for x, y in zip(*later, strict=True):
            exact += math.exp(p + x) * (p + x - q - y)
    rows = [{"prompt": " a b", "number": i, "text": ""} for i in range(4000)]
    found = [row["kl"] for row in chapter5.respond(rows, 0.7, 0, models | zeros, tokenizer, cfg)]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - exact) < 4 * error < 0.1 * exact


def test_a_runs_name_below_its_folder_names_the_arm(tmp_path, capsys):
    """results/toy holds seed0/fixed and seed0/decay/fixed: both are called `fixed`, but are two arms."""
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
                {"rm_score": slope * factor * i, "kl": i, "response_length": 9, "eos_rate": 1, "seconds": 1}
                for i in range(21)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(tmp_path / f"seed{seed}")
    table = printed(capsys, "curves", "--run", *runs, "--png", tmp_path / "c.png")
    assert table[2][:2] == ["token", "36.00 (18.00 to 72.00)"]  # the mean of steps 16 to 20 is slope * 18
    assert [row[0] for row in table[4:]] == ["arm", "---", "token", "fixed"]
    assert number(table[-2][5]) == 20.0  # area: the mean of 0..20 is 10, times the slopes' median 2
    assert number(table[-1][5]) == 40.0
    assert "different numbers" in error(capsys, "curves", "--run", *runs, tmp_path / "seed0" / "token")
