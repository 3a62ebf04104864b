"""All chapters as a user runs them: the embedded task at its smallest size, one process and two."""

import ast
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

import ma_ppo
import reward
import sft

ROOT = Path(__file__).parent.parent
CHAPTERS = ["sft", "reward", "segment", "ma_ppo", "eval"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
KEYS = ["step", "rm_score", "gold_score", "kl", "response_length", "eos_rate", "entropy", "seconds"]
KEYS += ["rm_score_std", "gold_score_std", "macro_actions", "macro_length", "parse_fallback"]
KEYS += ["policy_loss", "value_loss", "clip_fraction", "ratio_first"]
ARMS = ["token", "fixed", "random", "whole", "control"]
SMALL = [
    "--steps",
    "3",
    "--batch_size",
    "8",
    "--max_prompt",
    "16",
    "--max_response",
    "32",
    "--temperature",
    "0.9",
]


def python(*arguments, **environment):
    """Run a script in the repository's root."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=280
    )


def succeeds(*arguments):
    done = python(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def samples(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def same_metrics(run, other):
    """Every metric of every step but the time it took, within float tolerance."""
    assert len(run) == len(other)
    for row, wanted in zip(run, other, strict=True):
        assert row.keys() == wanted.keys()
        for key in row:
            if not key.startswith("seconds") and wanted[key] is not None:  # None: hh has no gold score
                assert row[key] == pytest.approx(wanted[key], rel=1e-3, abs=2e-5), (row["step"], key)


def stages(folder):
    return ["--sft", str(folder / "sft"), "--reward_model", str(folder / "reward")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, what was printed): the SFT model, the RM and five PPO arms, each made by its own script."""
    folder = tmp_path_factory.mktemp("toy")
    made = succeeds("sft.py", "--steps", 60, "--batch_size", 16, "--max_prompt", 16, "--out", folder / "sft")
    small = ["--max_prompt", 16, "--max_response", 32, "--micro_batch_size", 64]
    flags = ["--steps", 5, "--batch_size", 8, *small, "--sft", folder / "sft", "--out", folder / "reward"]
    made += succeeds("reward.py", *flags)
    made += succeeds("ma_ppo.py", *stages(folder), "--terminations", *ARMS, *SMALL, "--out", folder)
    return folder, made


# One process


def test_every_chapter_leaves_the_promised_files(toy):
    folder, printed = toy
    for stage in ("sft", "reward"):
        run = json.loads((folder / stage / "run.json").read_text())
        assert {"config", "result"} <= run.keys()
        losses = [row["loss"] for row in metrics(folder / stage)]
        assert all(math.isfinite(loss) for loss in losses)
    assert metrics(folder / "sft")[-1]["loss"] < metrics(folder / "sft")[0]["loss"] - 1
    assert "held-out" in printed
    for arm in ARMS:
        for name in (
            "config.json",
            "metrics.jsonl",
            "samples.jsonl",
            "model/config.json",
            "model/model.safetensors",
        ):
            assert (folder / arm / name).is_file(), (arm, name)
        config = json.loads((folder / arm / "config.json").read_text())
        assert (config["arm"], config["steps"], config["ranks"]) == (arm, 3, 1)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_closing_table_has_a_line_for_every_arm(toy):
    _, printed = toy
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ARMS


def test_the_sft_loss_and_rm_accuracy_are_printed_and_stored(toy):
    folder, printed = toy
    loss = json.loads((folder / "sft" / "run.json").read_text())["result"]["test_loss"]
    result = json.loads((folder / "reward" / "run.json").read_text())["result"]
    assert f"{loss:.3f}" in printed
    for name in ("accuracy", "accuracy_noiseless"):
        assert 0 <= result[name] <= 1
        assert f"{result[name]:.3f}" in printed


def test_metrics_have_every_promised_key_at_every_step(toy):
    for arm in ARMS:
        rows = metrics(toy[0] / arm)
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert set(KEYS) <= row.keys()
            assert all(math.isfinite(row[key]) for key in KEYS)
            assert 0 <= row["eos_rate"] <= 1
            assert 0 < row["response_length"] <= 32
            assert row["seconds"] == pytest.approx(
                row["seconds_rollout"] + row["seconds_credit"] + row["seconds_update"]
            )


def test_the_first_ratio_of_every_update_is_1_and_with_one_epoch_nothing_is_clipped(toy):
    for arm in ARMS:
        for row in metrics(toy[0] / arm):
            assert abs(row["ratio_first"] - 1) <= 1e-5
            assert row["clip_fraction"] == 0


def test_the_policy_starts_as_the_reference_and_leaves_it(toy):
    for arm in ARMS:
        kl = [row["kl"] for row in metrics(toy[0] / arm)]
        assert kl[0] == pytest.approx(0, abs=1e-5)
        assert all(abs(x) > 1e-4 for x in kl[1:])


def test_all_arms_start_from_the_same_prompts_and_samples_and_go_their_own_ways(toy):
    first = {arm: [row for row in samples(toy[0] / arm) if row["step"] == 0] for arm in ARMS}
    for name in ("prompt", "response", "tokens", "rm_score", "gold_score", "values"):
        assert all([r[name] for r in first[arm]] == [r[name] for r in first["token"]] for arm in ARMS), name
    assert {len(rows) for rows in first.values()} == {4}
    rollout = ("rm_score", "gold_score", "response_length", "eos_rate", "entropy")
    start = {arm: metrics(toy[0] / arm)[0] for arm in ARMS}
    assert all(start[arm][key] == start["token"][key] for arm in ARMS for key in rollout)
    assert len({metrics(toy[0] / arm)[2]["kl"] for arm in ARMS}) == len(ARMS)


def test_each_arm_has_its_own_macro_actions(toy):
    for arm, count in (("token", lambda L: L), ("fixed", lambda L: -(-L // 5)), ("whole", lambda L: 1)):
        for row in samples(toy[0] / arm):
            L = len(row["tokens"])
            assert row["seg"][-1] + 1 == count(L)
            assert [len(row[name]) for name in ("seg", "values", "advantages", "returns", "pieces")] == [
                L
            ] * 5
            # The pieces are the response, and where it ended by itself an EOS that writes nothing.
            assert "".join(row["pieces"]).split() == row["response"].split()
        last = metrics(toy[0] / arm)[-1]
        assert last["macro_length"] == pytest.approx(last["response_length"] / last["macro_actions"])
    assert [r["seg"] for r in samples(toy[0] / "control")][:4] == [
        r["seg"] for r in samples(toy[0] / "token")
    ][:4]


def test_the_trained_policy_loads_as_any_hugging_face_model_and_differs_from_where_it_started(toy):
    start = AutoModelForCausalLM.from_pretrained(toy[0] / "sft").state_dict()
    trained = {arm: AutoModelForCausalLM.from_pretrained(toy[0] / arm / "model").state_dict() for arm in ARMS}
    tokenizer = AutoTokenizer.from_pretrained(toy[0] / "token" / "model")
    assert tokenizer.decode(tokenizer(" so we finally made it to oslo.").input_ids).strip() == (
        "so we finally made it to oslo."
    )
    for arm in ARMS:
        assert trained[arm].keys() == start.keys()
        assert any(not torch.equal(trained[arm][name], start[name]) for name in start)
    assert any(not torch.equal(trained["token"][name], trained["fixed"][name]) for name in start)


@pytest.fixture
def quiet(monkeypatch):
    """Chapter 4 in this process, without the picture at the end."""
    monkeypatch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
    return ma_ppo.main


def test_the_micro_batch_size_changes_no_metric(toy, tmp_path, quiet):
    flags = [*stages(toy[0]), "--terminations", "fixed", *SMALL, "--out", str(tmp_path)]
    quiet([*flags, "--micro_batch_size", "3"])
    same_metrics(metrics(tmp_path / "fixed"), metrics(toy[0] / "fixed"))


def test_a_run_repeats_itself_exactly_and_another_seed_does_not(toy, tmp_path, quiet):
    flags = [*stages(toy[0]), "--terminations", "fixed", *SMALL]
    quiet([*flags, "--out", str(tmp_path / "again")])
    quiet([*flags, "--out", str(tmp_path / "other"), "--seed", "1"])
    again, first = samples(tmp_path / "again" / "fixed"), samples(toy[0] / "fixed")
    assert [row["tokens"] for row in again] == [row["tokens"] for row in first]
    other = samples(tmp_path / "other" / "fixed")
    assert [row["prompt"] for row in other] != [row["prompt"] for row in first]


def test_several_epochs_macro_ratios_and_a_narrow_distribution_work_together(toy, tmp_path, quiet):
    flags = [*stages(toy[0]), "--terminations", "fixed", *SMALL, "--out", str(tmp_path)]
    flags += ["--ratio", "macro", "--ppo_epochs", "3", "--lr", "0.003", "--warmup", "0", "--sigma", "first"]
    quiet([*flags, "--top_k", "20", "--top_p", "0.95"])
    rows = metrics(tmp_path / "fixed")
    assert all(abs(row["ratio_first"] - 1) <= 1e-5 for row in rows)
    assert any(0 < row["clip_fraction"] < 1 for row in rows)
    assert all(math.isfinite(row[key]) for row in rows for key in KEYS)


# Two processes


def test_two_processes_sample_the_same_tokens_and_log_the_same_metrics_as_one(toy, tmp_path):
    one, two = toy[0], tmp_path
    flags = [*stages(one), "--terminations", "token", "fixed", *SMALL, "--out", two]
    printed = succeeds(*TORCHRUN, "ma_ppo.py", *flags)
    assert printed.count("PPO, arm token") == 1  # rank 0 alone speaks
    for arm in ("token", "fixed"):
        assert json.loads((two / arm / "config.json").read_text())["ranks"] == 2
        same_metrics(metrics(two / arm), metrics(one / arm))
        ours, theirs = samples(two / arm), samples(one / arm)
        assert len(ours) == len(theirs) == 8  # four rows of step 0, four of step 2; all are rank 0's
        for name in ("step", "prompt", "tokens", "seg"):
            assert [row[name] for row in ours] == [row[name] for row in theirs], name
    trained = [AutoModelForCausalLM.from_pretrained(x / "fixed" / "model") for x in (one, two)]
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# Real input: the same path for a file of preferences, from scratch or from a hub model

TINY = {"steps": 2, "batch_size": 4, "max_prompt": 40, "max_response": 12}
WORDS = "what why how can you tell me about the dog cat moon sea please thanks"


def write_hh(path, count=40):
    """Preference pairs as Anthropic/hh-rlhf publishes them, two of them without a common prompt."""
    rows = []
    for i in range(count):
        words = [WORDS.split()[(i * k + 3) % 15] for k in (3, 5, 7, 11)]
        prompt = f"\n\nHuman: {' '.join(words)} {i}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} yes, {words[0]}.", "rejected": f"{prompt} no {words[1]} ü"})
    rows += [{"chosen": rows[i]["chosen"], "rejected": rows[i + 1]["rejected"]} for i in (0, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PPO_HH = ["--steps", "3", "--batch_size", "4", "--terminations", "token", "perplexity", "sentence", "word"]
PPO_HH += ["--max_prompt", "40", "--max_response", "12"]


@pytest.fixture
def short_stages(monkeypatch):
    for chapter in ("sft", "reward"):
        monkeypatch.setitem(sft.DEFAULTS["hh"], chapter, sft.DEFAULTS["hh"][chapter] | TINY)


@pytest.fixture
def hh(tmp_path, quiet, short_stages, capsys):
    """(folder, data, what was printed) of one command on a file of preferences: all stages are built."""
    data = write_hh(tmp_path / "pairs.jsonl")
    quiet(["--task", "hh", "--data", data, "--out", str(tmp_path / "one"), *PPO_HH])
    return tmp_path, data, capsys.readouterr().out


def test_one_command_on_a_file_of_preferences_builds_the_stages_and_two_processes_build_the_same(hh):
    folder, data, printed = hh
    for chapter in ("sft", "reward"):
        assert f"python {chapter}.py --task hh" in printed  # the equivalent command
        assert (folder / "one" / chapter / "run.json").is_file()
    assert "2 rows dropped" in printed
    for arm in ("token", "perplexity", "sentence", "word"):
        rows = metrics(folder / "one" / arm)
        assert all(row["gold_score"] is None for row in rows)
        assert all(math.isfinite(row[key]) for row in rows for key in KEYS if not key.startswith("gold"))

    script = folder / "two_processes.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport ma_ppo, sft\n"
        f"for chapter in ('sft', 'reward'):\n    sft.DEFAULTS['hh'][chapter] |= {TINY}\n"
        "ma_ppo.draw_curves = lambda folders, cfg: None\nma_ppo.main()\n"
    )
    flags = ["--task", "hh", "--data", data, "--out", folder / "two", *PPO_HH]
    succeeds(*TORCHRUN, script, *flags)
    for stage in ("sft", "reward"):
        same_metrics(metrics(folder / "two" / stage), metrics(folder / "one" / stage))
        one, two = (json.loads((folder / x / stage / "run.json").read_text()) for x in ("one", "two"))
        assert two["result"] == pytest.approx(one["result"], abs=1e-4)
    for arm in ("token", "perplexity", "sentence", "word"):
        same_metrics(metrics(folder / "two" / arm), metrics(folder / "one" / arm))


def test_finished_stages_are_used_again_and_those_of_other_data_refused(hh, quiet, monkeypatch, capsys):
    folder, data, _ = hh
    for chapter in (sft, reward):
        monkeypatch.setattr(chapter, "main", lambda argv: pytest.fail("was built again"))
    flags = [
        "--task",
        "hh",
        "--out",
        str(folder / "one"),
        *PPO_HH[:4],
        "--terminations",
        "whole",
        "--seed",
        "3",
    ]
    quiet([*flags, *PPO_HH[-4:], "--data", data])
    assert capsys.readouterr().out.count("using ") == 2
    monkeypatch.chdir(folder)  # another name of the same file
    quiet([*flags, *PPO_HH[-4:], "--data", "./pairs.jsonl"])
    assert capsys.readouterr().out.count("using ") == 2
    os.utime(folder / "one" / "sft" / "run.json")  # touched: as if the SFT model had been made again
    quiet([*flags, *PPO_HH[-4:], "--data", data])
    assert "warning: " in capsys.readouterr().out
    other = write_hh(folder / "other.jsonl", 30)
    with pytest.raises(SystemExit) as stop:
        quiet([*flags, "--data", other])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert str(folder / "one" / "sft") in line


def test_missing_stages_are_built_with_the_users_task_data_model_and_seed(monkeypatch, tmp_path, capsys):
    called = []
    monkeypatch.setattr(sft, "main", lambda argv: called.append(("sft", argv)))
    monkeypatch.setattr(reward, "main", lambda argv: called.append(("reward", argv)))
    cfg = ma_ppo.Config(task="hh", data=["a b.jsonl", "c.jsonl"], model="gpt2", seed=7, out=str(tmp_path))
    ma_ppo.build_missing_stages(cfg)
    common = ["--task", "hh", "--seed", "7", "--data", "a b.jsonl", "c.jsonl", "--model", "gpt2"]
    common += ["--split", "20", "40", "40"]
    paths = str(tmp_path / "sft"), str(tmp_path / "reward")
    assert called == [
        ("sft", [*common, "--out", paths[0]]),
        ("reward", [*common, "--sft", paths[0], "--out", paths[1]]),
    ]
    assert (cfg.sft, cfg.reward_model) == paths
    assert "--data 'a b.jsonl' c.jsonl" in capsys.readouterr().out  # quoted: it can be pasted
    called.clear()
    ma_ppo.build_missing_stages(ma_ppo.Config(sft="given", reward_model="given", out=str(tmp_path)))
    assert called == []


def test_a_hub_model_whose_pad_is_its_eos_goes_through_the_whole_pipeline(tmp_path, quiet, short_stages):
    torch.manual_seed(0)
    data, hub, out = write_hh(tmp_path / "pairs.jsonl"), tmp_path / "hub", tmp_path / "out"
    tokenizer = sft.small_tokenizer("hh", [WORDS])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(hub)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(hub)
    flags = ["--steps", "2", "--batch_size", "4", "--max_prompt", "40", "--max_response", "12"]
    quiet(["--task", "hh", "--data", data, "--model", str(hub), "--out", str(out), *flags])
    for arm in ("token", "fixed"):
        assert all(abs(row["ratio_first"] - 1) <= 1e-5 for row in metrics(out / arm))  # dropout is off
        trained = AutoTokenizer.from_pretrained(out / arm / "model")
        assert trained.pad_token_id != trained.eos_token_id == tokenizer.eos_token_id
        assert AutoModelForCausalLM.from_pretrained(out / arm / "model").config.model_type == "gpt2"


# Bad input: one clear line and exit code 2, before any training


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "out")


@pytest.fixture
def refuses(monkeypatch, capsys, tmp_path):
    """Run a chapter's main, which must stop before the first update; returns its one line on stderr."""
    monkeypatch.setattr(sft, "update", lambda *arguments: pytest.fail("training began"))

    def run(chapter, *flags):
        flags = list(map(str, flags))
        arguments = flags if "--out" in flags else [*flags, "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stop:
            chapter.main(arguments)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize("chapter", [sft, reward, ma_ppo], ids=lambda chapter: chapter.__name__)
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--task nonsense", "nonsense"),
        ("--steps 0", "--steps"),
        ("--steps three", "three"),
        ("--batch_size 0", "--batch_size"),
        ("--micro_batch_size -1", "--micro_batch_size"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        (f"--seed {2**63}", "--seed"),
        ("--device meta:x", "--device"),
        ("--device meta", "--device"),
        ("--max_response 0", "--max_response"),
        ("--device nonsense", "nonsense"),
        ("--nonsense 1", "--nonsense"),
        ("--task hh", "--data"),
        ("--data somewhere", "--data"),
        ("--task hh --data no/such/file", "no/such/file"),
    ],
)
def test_every_chapter_refuses_settings_that_cannot_work(refuses, chapter, flags, named):
    assert named in refuses(chapter, *flags.split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--terminations token nonsense", "nonsense"),
        ("--terminations token token", "--terminations"),
        ("--n 0", "--n"),
        ("--n -3", "--n"),
        ("--ppo_epochs 0", "--ppo_epochs"),
        ("--gamma 1.5", "--gamma"),
        ("--lam -0.1", "--lam"),
        ("--lam 1.1", "--lam"),
        ("--beta -1", "--beta"),
        ("--sigma nonsense", "nonsense"),
        ("--macro_reward nonsense", "nonsense"),
        ("--ratio nonsense", "nonsense"),
        ("--parser nonsense", "nonsense"),
        ("--clip 0", "--clip"),
        ("--beta nan", "--beta"),
        ("--no_eos_score nan", "--no_eos_score"),
        ("--critic_lr 0", "--critic_lr"),
        ("--temperature 0", "--temperature"),
        ("--top_k -1", "--top_k"),
        ("--top_p 0", "--top_p"),
        ("--top_p 1.1", "--top_p"),
        ("--sft no/such/folder", "no/such/folder"),
        ("--reward_model no/such/folder", "no/such/folder"),
    ],
)
def test_the_ppo_chapter_refuses_settings_that_cannot_work(refuses, flags, named):
    assert named in refuses(ma_ppo, *flags.split())


@pytest.mark.parametrize("chapter", [sft, reward, ma_ppo], ids=lambda chapter: chapter.__name__)
def test_a_batch_that_the_ranks_cannot_share_is_refused(refuses, chapter, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refuses(chapter, "--batch_size", "8")
    assert "8" in line
    assert "3" in line


@pytest.mark.parametrize("chapter", [sft, reward, ma_ppo], ids=lambda chapter: chapter.__name__)
def test_a_missing_checkpoint_is_named(refuses, chapter, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in refuses(chapter, "--sft" if chapter is reward else "--model", nowhere)


def test_a_checkpoint_folder_without_a_model_in_it_is_named(refuses, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for chapter, flag in ((sft, "--model"), (reward, "--sft"), (ma_ppo, "--sft"), (ma_ppo, "--reward_model")):
        assert str(empty) in refuses(chapter, flag, str(empty))


def test_the_trunk_of_a_reward_model_is_no_causal_lm(refuses, tmp_path):
    """transformers would give it a random head without a word, and PPO would train noise."""
    tokenizer = sft.small_tokenizer("toy", [" a b"])
    trunk = LlamaModel(LlamaConfig(vocab_size=5, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    sft.save_run([reward.ScalarModel(trunk), tokenizer], tmp_path)
    assert "lm_head" in refuses(ma_ppo, "--sft", str(tmp_path), "--reward_model", str(tmp_path))


def small_stage(folder, words=" a b", positions=2048):
    """A causal LM, and an RM on its trunk, saved as the chapters save them; (SFT folder, RM folder)."""
    tokenizer = sft.small_tokenizer("toy", [words])
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **size)
    sft.save_run([LlamaForCausalLM(config), tokenizer], folder / "sft")
    sft.save_run([reward.ScalarModel.load(folder / "sft"), tokenizer], folder / "reward")
    return folder / "sft", folder / "reward"


def test_a_reward_model_with_another_vocabulary_is_refused(refuses, tmp_path):
    """It would score other words than were written; with fewer of them, end in an IndexError."""
    policy, _ = small_stage(tmp_path / "one", " a b")
    _, other = small_stage(tmp_path / "two", " a c")
    assert str(other) in refuses(ma_ppo, "--sft", policy, "--reward_model", other)


def test_prompts_and_responses_beyond_a_models_positions_are_refused(refuses, tmp_path):
    policy, scores = small_stage(tmp_path / "short", positions=64)
    assert "64 positions" in refuses(ma_ppo, "--sft", policy, "--reward_model", scores)
    assert "64 positions" in refuses(sft, "--model", policy)


def test_a_reward_model_cannot_start_from_a_tokenizer_without_pad(refuses, tmp_path):
    policy, _ = small_stage(tmp_path)
    path = policy / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"pad_token"', '"no_pad_token"'))
    assert "PAD" in refuses(reward, "--sft", policy)


def test_a_control_that_controls_nothing_is_refused(refuses):
    assert "--gamma" in refuses(ma_ppo, "--gamma", "0.9", "--terminations", "fixed", "control")


def test_a_run_with_a_broken_policy_skips_its_updates_and_logs_null(tmp_path, quiet):
    """NaN logits have no place in the cumulative distribution: a run once ended in an IndexError."""
    policy, scores = small_stage(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(policy)
    flags = ["--sft", policy, "--reward_model", scores, "--batch_size", "4", "--terminations", "fixed"]
    flags += ["--max_prompt", "8", "--max_response", "8", "--steps", "2", "--out", tmp_path / "out"]
    ma_ppo.main([str(flag) for flag in flags])
    rows = (tmp_path / "out" / "fixed" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row, parse_constant=pytest.fail) for row in rows]
    assert [row["policy_loss"] for row in rows] == [None, None]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "fixed" / "model").state_dict()
    assert all(
        torch.equal(saved[name].nan_to_num(), x.nan_to_num()) for name, x in model.state_dict().items()
    )
    for line in (tmp_path / "out" / "fixed" / "samples.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_ranks_that_start_apart_are_made_one_model(tmp_path):
    script = tmp_path / "broadcast.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch, sft\nsft.setup('cpu')\n"
        "torch.manual_seed(sft.rank())\nmodel = torch.nn.Linear(3, 2)\nsft.broadcast_parameters(model)\n"
        f"torch.save(model.state_dict(), {str(tmp_path)!r} + f'/rank{{sft.rank()}}.pt')\n"
    )
    succeeds(*TORCHRUN, script)
    torch.manual_seed(0)
    expected = torch.nn.Linear(3, 2).state_dict()
    for number in (0, 1):
        found = torch.load(tmp_path / f"rank{number}.pt", weights_only=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected), number


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(refuses):
    assert "--device cuda" in refuses(sft, "--device", "cuda")


def test_an_output_folder_that_cannot_be_written_is_named(refuses, tmp_path):
    blocked = below_a_file(tmp_path)
    for chapter in (sft, reward, ma_ppo):
        assert blocked in refuses(chapter, "--out", blocked)


def test_a_negative_seed_is_refused(refuses):
    assert "--seed" in refuses(sft, "--seed", "-1")


def test_the_scripts_themselves_end_with_one_line_and_exit_code_2(tmp_path):
    blocked = below_a_file(tmp_path)
    for arguments, named in ((["ma_ppo.py", "--n", 0], "--n"), (["ma_ppo.py", "--out", blocked], blocked)):
        done = python(*arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert named in line
        assert done.stdout == ""


# The house


def imports(chapter):
    tree = ast.parse((ROOT / f"{chapter}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module.split(".")[0]


def test_chapters_import_earlier_chapters_only_and_segment_none():
    for place, chapter in enumerate(CHAPTERS):
        allowed = set() if chapter == "segment" else set(CHAPTERS[:place])
        assert set(imports(chapter)) & set(CHAPTERS) <= allowed, chapter


def test_five_chapters_and_nothing_beside_them():
    assert {path.stem for path in ROOT.glob("*.py")} == set(CHAPTERS)
    assert not list(ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_story_of_a_chapter_is_short_and_every_function_fits_on_a_screen(chapter):
    source = (ROOT / f"{chapter}.py").read_text()
    assert len(source.split("\n# Appendix")[0].splitlines()) <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 42, node.name


def test_every_chapter_says_what_it_teaches_and_how_to_run_it():
    for chapter in CHAPTERS:
        header = ast.get_docstring(ast.parse((ROOT / f"{chapter}.py").read_text()))
        assert header.startswith(f"Chapter {CHAPTERS.index(chapter) + 1}: ")
        commands = [line for line in header.splitlines() if "python " in line or "torchrun " in line]
        assert any(line.startswith(f"    python {chapter}.py") for line in commands), chapter
        for line in commands:  # one command a line, or it would not paste
            command = line.split("#")[0]
            assert line.startswith(("    python ", "    torchrun ")), line
            assert command.count("python ") + command.count("torchrun ") == 1, line


@pytest.mark.parametrize("chapter", ["sft", "reward", "segment", "ma_ppo", "eval"])
def test_help_of_every_chapter_prints_its_settings(chapter, monkeypatch, capsys):
    """argparse %-formats help texts: "10 % warm-up" once made --help of two chapters a traceback."""
    monkeypatch.setattr(sys, "argv", [f"{chapter}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(chapter).main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage:" in printed
    module = importlib.import_module(chapter)
    for name in module.Config.__dataclass_fields__ if hasattr(module, "Config") else ():
        assert f"--{name}" in printed, name


def test_help_shows_the_defaults_of_the_task_that_was_named(capsys):
    with pytest.raises(SystemExit):
        sft.main(["--task", "hh", "--help"])
    assert f"number of updates (default: {sft.DEFAULTS['hh']['sft']['steps']})" in capsys.readouterr().out
