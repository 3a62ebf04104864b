"""Programs: the task toy-code, and unit tests as the reward in SFT, PPO and evaluation."""

import json
import random
import shutil

import pytest
import torch
from helpers import TORCHRUN, metrics, read_lines, settings, succeeds

import eval as chapter5
import ma_ppo
import reward
import segment
import sft

ARMS = ["token", "fixed", "ast"]


@pytest.fixture(scope="module")
def rows():
    return [sft.code_row(i) for i in range(600)]


def answers(program, inputs):
    """What a program's f returns for each input, run right here: these programs are our own."""
    names = {}
    exec(program, names)
    return [names["f"](list(x)) for (x,) in inputs]


# The rows


def test_a_row_is_a_function_of_its_number_alone(rows):
    state = random.getstate()
    assert [sft.code_row(i) for i in (5, 3, 5)] == [rows[5], rows[3], rows[5]]
    assert random.getstate() == state
    assert rows[3] != rows[5]
    assert [row["number"] for row in rows] == list(range(600))
    assert set(rows[0]) == {"prompt", "response", "problem", "number"}


def test_a_correct_program_of_every_problem_does_what_the_functions_say(rows):
    """The functions that make the expected outputs know nothing of the programs' text."""
    names = set()
    for i in range(len(rows)):
        steps, inputs = sft.code_steps(random.Random(f"{sft.SPLIT_SEED} code {i}"))
        tests = rows[i]["problem"]["input_output"]
        assert tests["inputs"] == [[x] for x in inputs]
        assert answers(sft.code_text(steps), tests["inputs"]) == tests["outputs"]
        # No constant passes.
        assert any(output != tests["outputs"][0] for output in tests["outputs"])
        names |= {name for name, _ in steps}
    assert names == set(sft.CODE)  # so every step has been run


def test_a_problem_worked_by_hand():
    steps = [("above", 3), ("multiply", 2), ("down", 9), ("first", 2), ("sum", 9)]
    assert sft.code_output(steps, [5, 1, 4, 9]) == 18 + 10
    assert sft.code_output(steps[:-1], [5, 1, 4, 9]) is None  # nothing is returned
    assert sft.code_text(steps[:1] + steps[-1:]) == (
        "def f(x):\n    x = [v for v in x if v > 3]\n    return sum(x)"
    )


def test_the_stated_share_of_demonstrations_is_right_and_tests_find_all_mistakes(rows):
    rows = rows[:160]
    programs, problems = [row["response"] for row in rows], [row["problem"] for row in rows]
    results = reward.run_programs(programs, problems)
    passed = 0
    for i, (status, right, total) in enumerate(results):
        steps, _ = sft.code_steps(random.Random(f"{sft.SPLIT_SEED} code {i}"))
        correct = rows[i]["response"] == "\n" + sft.code_text(steps)
        assert (status == "ran" and right == total == sft.CODE_TESTS) == correct
        passed += correct
    assert abs(passed / len(rows) - (1 - sft.CODE_WRONG)) < 0.1  # 2.6 standard deviations
    statuses = [status for status, *_ in results]
    for failure in ("compile error", "runtime error"):
        assert statuses.count(failure) > 5
    assert sum(0 < right < total for _, right, total in results) > 5  # some tests only


def test_every_kind_of_mistake_occurs(rows):
    mistaken = [row["response"] for row in rows]  # 6 in 10 of them
    assert any("return" not in text for text in mistaken)
    assert any("y" in text for text in mistaken)
    assert any(text.count("(") > text.count(")") for text in mistaken)
    assert any("return" in text.strip().split("\n")[-2] for text in mistaken)  # steps swapped


@pytest.mark.slow
def test_no_held_out_specification_is_in_training_and_the_split_has_no_share_for_an_rm():
    everything = sft.load_rows("toy-code")
    shares, prompts = {}, {}
    for name in ("test", "sft", "rm", "ppo"):
        shares[name] = sft.split(everything, name, (20, 0, 80))
        prompts[name] = {row["prompt"] for row in shares[name]}
    assert not prompts["rm"] and len(prompts["test"]) > 1000
    assert not prompts["test"] & (prompts["sft"] | prompts["ppo"])
    assert not prompts["sft"] & prompts["ppo"]
    cfg = sft.parse(sft.Config, "sft", ["--task", "toy-code"])
    assert len(sft.load_share(cfg, "sft", "response")) == len(shares["sft"])


def test_the_tokenizer_keeps_every_character_and_can_write_what_is_not_python(rows):
    learned = [row["prompt"] + row["response"] for row in rows[:300]]
    tokenizer = sft.small_tokenizer("toy-code", learned)
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    texts += ["\n\n  def\tf (x ) :\n        return   x\n", "é ≠ x", "))((\n  1"]
    ids = tokenizer(texts).input_ids
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert max(map(len, ids[: 2 * len(rows)])) < 80
    read = [segment.token_offsets(tokenizer, row) for row in ids[1:9:2]]
    assert [text for text, _ in read] == texts[1:9:2]


# What cannot work is refused


@pytest.mark.parametrize(
    ("chapter", "flags", "named"),
    [
        (sft, "--task toy-code --data file.jsonl", "--data"),
        (reward, "--task toy-code", "no reward model"),
        (reward, "--task apps --data file.jsonl", "no reward model"),
        (reward, "--preset codegemma-2b-apps", "no reward model"),
        (ma_ppo, "--task toy-code --reward_model runs/toy/reward", "unit tests"),
        (ma_ppo, "--task apps --data file.jsonl --reward_model runs/toy/reward", "unit tests"),
    ],
)
def test_a_reward_model_or_file_that_makes_no_sense_is_refused_in_one_line(
    chapter, flags, named, capsys, tmp_path
):
    with pytest.raises(SystemExit) as stop:
        chapter.main([*flags.split(), "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and named in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--task toy-code", "--task apps", "--preset codegemma-7b-apps"])
def test_program_tasks_have_the_papers_split_and_arms_of_their_own(flags):
    cfg = ma_ppo.parse([*flags.split(), "--trust_programs"])  # here may be no bubblewrap
    assert (cfg.split, cfg.arms, cfg.no_eos_score) == ([20, 0, 80], ARMS, -1.0)
    assert sft.parse(sft.Config, "sft", flags.split()).split == [20, 0, 80]


# From SFT to PPO and evaluation, at the smallest size


def test_one_command_trains_all_arms_without_a_reward_model(toy_code):
    folders = [*ARMS, "sft", "curves.png"]
    assert sorted(path.name for path in toy_code.folder.iterdir()) == sorted(folders)
    for arm in ARMS:
        (row,) = metrics(toy_code.folder / arm)
        assert 0 <= row["pass_rate"] <= 1
        assert -1 <= row["rm_score"] <= 1
        assert row["gold_score"] is None
        assert row["ratio_first"] == pytest.approx(1, abs=1e-4)
        assert settings(toy_code.folder / arm)["reward_model"] == ""
    lengths = {arm: metrics(toy_code.folder / arm)[0]["macro_length"] for arm in ARMS}
    assert lengths["token"] == 1 < lengths["ast"]
    assert lengths["fixed"] > 1


@pytest.mark.slow
def test_two_processes_test_the_same_programs_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
    task = ["--task", "toy-code", "--batch_size", "8"]
    sft.main([*task, "--steps", "30", "--lr", "1e-2", "--out", str(tmp_path / "sft")])
    flags = [*task, "--steps", "1", "--arms", "ast", "--sft", str(tmp_path / "sft")]
    ma_ppo.main([*flags, "--out", str(tmp_path / "one")])
    succeeds(*TORCHRUN, "ma_ppo.py", *flags, "--out", tmp_path / "two")
    (one,), (two,) = metrics(tmp_path / "one" / "ast"), metrics(tmp_path / "two" / "ast")
    for key in ("pass_rate", "rm_score", "rm_score_std", "response_length", "macro_actions", "kl"):
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_the_critic_starts_from_the_sft_models_trunk_under_a_seeded_head(toy_code):
    cfg = ma_ppo.parse(["--task", "toy-code", "--sft", str(toy_code.folder / "sft")])
    models, optimizers, _ = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    again, _, _ = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    assert set(models) == {"policy", "reference", "critic"}
    assert set(optimizers) == {"policy", "critic"}
    trunk, started = models["critic"].trunk.state_dict(), models["policy"].model.state_dict()
    assert all(torch.equal(trunk[name], started[name]) for name in trunk)
    name = "layers.0.mlp.up_proj.weight"
    assert trunk[name].data_ptr() != started[name].data_ptr()  # a copy, not the policy itself
    assert torch.equal(models["critic"].head.weight, again["critic"].head.weight)
    assert models["critic"].head.weight.abs().sum() > 0


def score(texts, stopped, problems, monkeypatch):
    """A rollout of given texts as `ma_ppo.score` scores it; those not `stopped` are cut."""
    cfg = ma_ppo.Config(task="toy-code", no_eos_score=-1.0)
    monkeypatch.setattr(ma_ppo, "ended", lambda batch, tokenizer: torch.tensor(stopped))
    rollout = ma_ppo.Rollout(None, [], [], texts)
    ma_ppo.score(rollout, {}, [{"problem": problem} for problem in problems], None, cfg)
    return rollout


def test_programs_get_the_papers_score_and_a_cut_one_that_of_none(monkeypatch):
    problem = {"input_output": {"fn_name": "f", "inputs": [[1], [2]], "outputs": [1, 4]}}
    square = "def f(x):\n    return x * x"
    # Right; half right; a name that does not exist; no Python; wrong; right, but cut.
    texts = [square, "def f(x): return 1", "def f(x): return y"]
    texts += ["def f(x", "def f(x): pass", square]
    rollout = score(texts, [True] * 5 + [False], [problem] * 6, monkeypatch)
    wanted = [1.0, -0.3 + 1.3 / 2, -0.6, -1.0, -0.3, -1.0]
    assert rollout.scores.tolist() == pytest.approx(wanted)
    assert rollout.passed.tolist() == [True, False, False, False, False, False]


def test_pass_rate_is_the_share_of_responses_that_an_independent_count_finds_right(
    rows, monkeypatch
):
    texts, problems = [row["response"] for row in rows[:40]], [row["problem"] for row in rows[:40]]
    right = []
    for text, problem in zip(texts, problems, strict=True):
        tests = problem["input_output"]
        try:
            right.append(answers(text, tests["inputs"]) == tests["outputs"])
        except (SyntaxError, NameError):
            right.append(False)
    rollout = score(texts, [True] * 40, problems, monkeypatch)
    assert rollout.passed.tolist() == right and 10 < sum(right) < 30
    mask = torch.ones(40, 2, dtype=torch.long)
    rollout.batch = sft.Batch(None, None, mask)
    for name in ("logprobs", "ref_logprobs", "entropy", "seg"):
        setattr(rollout, name, torch.zeros_like(mask))
    assert ma_ppo.summary(rollout, None)["pass_rate"] == pytest.approx(sum(right) / 40)


def test_held_out_pass_rates_of_sft_and_arms_are_printed_with_intervals(
    toy_code, tmp_path, quick_runs, capsys
):
    run = shutil.copytree(toy_code.folder, tmp_path / "run")
    for arm in ARMS:  # the copy's own SFT model, and so its own samples
        path = run / arm / "config.json"
        path.write_text(json.dumps(settings(run / arm) | {"sft": str(run / "sft")}))
    capsys.readouterr()
    chapter5.main(["score", "--run", str(run), "--sft", "--prompts", "12"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    head, _, *lines = lines
    assert [line[0].split("/")[-1] for line in lines] == ["sft", "token", "ast", "fixed"]
    tests = {row["prompt"]: row["problem"] for row in sft.split(sft.load_rows("toy-code"), "test")}
    for name, line in zip(["sft", "token"], lines[:2], strict=True):
        kept = read_lines(run / name / "score" / "samples.jsonl")
        assert len(kept) == 12
        wins = sum(row["passed"] for row in kept)
        low, high = reward.wilson_interval(wins, 12)
        shown = line[head.index("passed")].strip(" |")
        assert shown == f"{wins / 12:.2f} [{low:.2f}, {high:.2f}]"
        programs = [row["response"] for row in kept]
        scores = reward.program_rewards(programs, [tests[row["prompt"]] for row in kept])
        for row, score in zip(kept, scores, strict=True):
            cut = settings(run / "token")["no_eos_score"]
            assert row["rm_score"] == pytest.approx(score if row["ended"] else cut)


# APPS: both kinds of problems, from a file


def test_a_file_of_apps_rows_goes_from_sft_to_ppo(tmp_path, monkeypatch, quick_runs):
    calls = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]}
    lines = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]}
    rows = []
    for i in range(40):
        row = {"question": f"Add one, number {i}.", "difficulty": "interview"}
        if i % 2:
            row |= {"starter_code": "def f(x):", "input_output": json.dumps(calls)}
            solution = "def f(x):\n    return x + 1"
        else:
            row |= {"starter_code": "", "input_output": json.dumps(lines)}
            solution = "print(int(input()) + 1)"
        rows.append(row | {"solutions": json.dumps([solution])})
    path = tmp_path / "apps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["--task", "apps", "--data", str(path), "--split", "50", "0", "50"]
    sft.main([*task, "--steps", "2", "--batch_size", "4", "--out", str(tmp_path / "sft")])
    sampled, judged = ma_ppo.sample, []

    def right(policy, examples, *more):
        """Samples whose text is the right program for half of the prompts."""
        rollout = sampled(policy, examples, *more)
        names = [example["problem"]["input_output"].get("fn_name") for example in examples]
        rollout.texts = ["def f(x): return x + 1" if name else "print(2)" for name in names]
        judged.extend(names)
        return rollout

    monkeypatch.setattr(ma_ppo, "sample", right)
    monkeypatch.setattr(ma_ppo, "ended", lambda batch, _: torch.ones(len(batch.mask), dtype=bool))
    flags = ["--batch_size", "8", "--max_response", "8", "--steps", "1", "--arms", "token"]
    flags += [] if reward.sandbox() else ["--trust_programs"]  # those two above do no harm
    ma_ppo.main([*task, *flags, "--sft", str(tmp_path / "sft"), "--out", str(tmp_path)])
    (row,) = metrics(tmp_path / "token")
    called = judged.count("f") / 8
    assert 0 < called < 1
    assert row["pass_rate"] == called
    assert row["rm_score"] == pytest.approx(called * 1.0 + (1 - called) * 0.35)


def test_rows_without_unit_tests_are_no_program_task(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        flags = ["--task", "apps", "--data", str(path), "--trust_programs"]
        ma_ppo.load_prompts(None, ma_ppo.parse(flags))
    assert "no rows with problem" in capsys.readouterr().err
