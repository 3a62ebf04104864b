"""All chapters as people run them: the toy, a file of preferences; one process and two."""

import ast
import contextlib
import importlib
import io
import json
import math
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import (
    PPO_FLAGS,
    ROOT,
    TORCHRUN,
    TOY_ARMS,
    metrics,
    python,
    result,
    same_metrics,
    samples,
    settings,
    succeeds,
)
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

pytestmark = pytest.mark.usefixtures("quick_runs")

CHAPTERS = ["sft", "reward", "segment", "ma_ppo", "eval"]
# What every line of metrics.jsonl has; a task without a gold score has None there.
GOLD = {"gold_score", "gold_score_std"}
KEYS = GOLD | {
    *("step", "rm_score", "rm_score_std", "kl", "response_length", "eos_rate", "entropy"),
    *("macro_actions", "macro_length", "parse_fallback", "seconds"),
    *("policy_loss", "value_loss", "clip_fraction", "ratio_first"),
}


def weights(folder):
    """{name: tensor} of the causal LM in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


# One process, the toy


def test_every_chapter_leaves_the_promised_files(toy):
    for stage in ("sft", "reward"):
        run = json.loads((toy.folder / stage / "run.json").read_text())
        assert {"config", "result"} <= run.keys()
        losses = [row["loss"] for row in metrics(toy.folder / stage)]
        assert all(math.isfinite(loss) for loss in losses)
    for arm in TOY_ARMS:
        names = ["config.json", "metrics.jsonl", "samples.jsonl", "run.json"]
        names += ["model/config.json", "model/model.safetensors", "model/tokenizer.json"]
        for name in names:
            assert (toy.folder / arm / name).is_file(), (arm, name)
        made = settings(toy.folder / arm)
        assert (made["arm"], made["steps"], made["ranks"]) == (arm, 3, 1)
    assert (toy.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_sft_learns(toy):
    first, *_, last = metrics(toy.folder / "sft")
    assert last["loss"] < first["loss"] - 1


def test_the_closing_table_has_a_line_for_every_arm(toy):
    table = [line for line in toy.printed.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == TOY_ARMS


def test_the_sft_loss_and_rm_accuracy_are_printed_and_stored(toy):
    assert f"{result(toy.folder / 'sft')['test_loss']:.3f} nats" in toy.printed
    found = result(toy.folder / "reward")
    for name in ("accuracy", "accuracy_noiseless"):
        assert 0 <= found[name] <= 1
        assert f"accuracy {found[name]:.3f}" in toy.printed


def test_metrics_have_every_promised_key_at_every_step(toy):
    for arm in TOY_ARMS:
        rows = metrics(toy.folder / arm)
        assert [row["step"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert row.keys() >= KEYS
            assert all(math.isfinite(row[key]) for key in KEYS)
            assert 0 <= row["eos_rate"] <= 1
            assert 0 < row["response_length"] <= 32
            phases = [row[f"seconds_{phase}"] for phase in ma_ppo.PHASES]
            assert row["seconds"] == pytest.approx(sum(phases))


def test_the_first_ratio_of_every_update_is_1_and_with_one_epoch_nothing_is_clipped(toy):
    for arm in TOY_ARMS:
        for row in metrics(toy.folder / arm):
            assert abs(row["ratio_first"] - 1) <= 1e-5
            assert row["clip_fraction"] == 0


def test_the_policy_starts_as_the_reference_and_leaves_it(toy):
    for arm in TOY_ARMS:
        kl = [row["kl"] for row in metrics(toy.folder / arm)]
        assert kl[0] == pytest.approx(0, abs=1e-5)
        assert all(abs(nats) > 1e-4 for nats in kl[1:])


def test_all_arms_start_from_the_same_prompts_and_samples_and_go_their_own_ways(toy):
    def first(arm, name):
        return [row[name] for row in samples(toy.folder / arm) if row["step"] == 0]

    for arm in TOY_ARMS:
        assert len(first(arm, "step")) == 4
        for name in ("prompt", "response", "tokens", "rm_score", "gold_score", "values"):
            assert first(arm, name) == first("token", name), name
        start, token = metrics(toy.folder / arm)[0], metrics(toy.folder / "token")[0]
        for key in ("rm_score", "gold_score", "response_length", "eos_rate", "entropy"):
            assert start[key] == token[key], key
    assert len({metrics(toy.folder / arm)[2]["kl"] for arm in TOY_ARMS}) == len(TOY_ARMS)


def test_each_arm_has_its_own_macro_actions(toy):
    expected = {
        "token": lambda length: length,
        "fixed": lambda length: math.ceil(length / 5),
        "whole": lambda length: 1,
        "control": lambda length: length,  # that of `token`, but for lambda
    }
    for arm, count in expected.items():
        for row in samples(toy.folder / arm):
            assert row["seg"][-1] + 1 == count(len(row["tokens"]))
        last = metrics(toy.folder / arm)[-1]
        mean = last["response_length"] / last["macro_actions"]
        assert last["macro_length"] == pytest.approx(mean)


def test_samples_are_told_token_by_token(toy):
    for arm in TOY_ARMS:
        for row in samples(toy.folder / arm):
            for name in ("pieces", "seg", "values", "advantages", "returns"):
                assert len(row[name]) == len(row["tokens"]), name
            # The pieces are the response; an EOS writes nothing.
            assert "".join(row["pieces"]).split() == row["response"].split()


def test_every_prompt_of_the_toy_has_the_facts_of_its_post(toy):
    cfg = ma_ppo.parse([*PPO_FLAGS, *toy.stages])
    prompts = ma_ppo.load_prompts(reward.load_tokenizer(cfg.sft), cfg)
    facts = {row["prompt"]: row["facts"] for row in sft.load_rows("toy")}
    assert [prompt["number"] for prompt in prompts] == list(range(len(prompts)))
    assert len(prompts) > 100
    for prompt in prompts:
        assert prompt["facts"] == facts[prompt["text"]]


def test_the_trained_policy_loads_as_any_hugging_face_model_and_differs_from_where_it_started(toy):
    start = weights(toy.folder / "sft")
    trained = {arm: weights(toy.folder / arm / "model") for arm in TOY_ARMS}
    tokenizer = AutoTokenizer.from_pretrained(toy.folder / "token" / "model")
    text = "so we finally made it to oslo."
    assert tokenizer.decode(tokenizer(f" {text}").input_ids).strip() == text

    def differ(one, other):
        assert one.keys() == other.keys()
        return any(not torch.equal(one[name], other[name]) for name in one)

    assert all(differ(trained[arm], start) for arm in TOY_ARMS)
    assert differ(trained["token"], trained["fixed"])


def test_the_micro_batch_size_changes_no_metric(toy, tmp_path):
    flags = [*PPO_FLAGS, *toy.stages, "--arms", "fixed", "--micro_batch_size", "3"]
    ma_ppo.main([*flags, "--out", str(tmp_path)])
    same_metrics(metrics(tmp_path / "fixed"), metrics(toy.folder / "fixed"))


def test_a_run_repeats_itself_exactly_and_another_seed_does_not(toy, tmp_path):
    flags = [*PPO_FLAGS, *toy.stages, "--arms", "fixed"]
    ma_ppo.main([*flags, "--out", str(tmp_path / "again")])
    ma_ppo.main([*flags, "--out", str(tmp_path / "other"), "--seed", "1", "--steps", "1"])
    first = samples(toy.folder / "fixed")
    assert samples(tmp_path / "again" / "fixed") == first
    other = samples(tmp_path / "other" / "fixed")
    assert [row["prompt"] for row in other] != [row["prompt"] for row in first[:4]]


def test_several_epochs_macro_ratios_and_a_narrow_distribution_work_together(toy, tmp_path):
    flags = [*PPO_FLAGS, *toy.stages, "--arms", "fixed", "--out", str(tmp_path)]
    flags += ["--ratio", "macro", "--ppo_epochs", "3", "--lr", "0.003", "--warmup", "0"]
    ma_ppo.main([*flags, "--sigma", "first", "--top_k", "20", "--top_p", "0.95"])
    rows = metrics(tmp_path / "fixed")
    assert all(abs(row["ratio_first"] - 1) <= 1e-5 for row in rows)
    assert any(0 < row["clip_fraction"] < 1 for row in rows)
    assert all(math.isfinite(row[key]) for row in rows for key in KEYS)


# The scripts themselves, PPO on two processes, on a file of preferences


WORDS = "what why how can you tell me about the dog cat moon sea please thanks"
HH_FLAGS = ["--batch_size", "4", "--max_prompt", "40", "--max_response", "12"]
HH_ARMS = ["token", "word"]


def write_hh(path, count=40):
    """Pairs as Anthropic/hh-rlhf publishes them, two of them without a common prompt."""
    rows = []
    for i in range(count):
        words = [WORDS.split()[(i * k + 3) % 15] for k in (3, 5, 7, 11)]
        prompt = f"\n\nHuman: {' '.join(words)} {i}?\n\nAssistant:"
        answers = {"chosen": f"{prompt} yes, {words[0]}.", "rejected": f"{prompt} no {words[1]} ü"}
        rows.append(answers)
    for i in (0, 2):
        rows.append({"chosen": rows[i]["chosen"], "rejected": rows[i + 1]["rejected"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Scripts(NamedTuple):
    """What the scripts have left in `folder`, and the flags that they were called with."""

    folder: Path
    sft_flags: list
    ppo_flags: list
    printed: str


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """sft.py on one process, ma_ppo.py on two, with its picture; the RM between them from here."""
    folder = tmp_path_factory.mktemp("scripts")
    flags = ["--task", "hh", "--data", write_hh(folder / "pairs.jsonl"), *HH_FLAGS]
    stages = ["--sft", str(folder / "sft"), "--reward_model", str(folder / "reward")]
    sft_flags = [*flags, "--steps", "2"]
    ppo_flags = [*flags, "--steps", "3", *stages, "--arms", *HH_ARMS]
    succeeds("sft.py", *sft_flags, "--out", folder / "sft")
    reward.main([*flags, "--steps", "2", *stages[:2], "--out", str(folder / "reward")])
    printed = succeeds(*TORCHRUN, "ma_ppo.py", *ppo_flags, "--out", folder)
    return Scripts(folder, sft_flags, ppo_flags, printed)


def test_a_script_does_what_its_main_does(scripts, tmp_path):
    sft.main([*scripts.sft_flags, "--out", str(tmp_path)])
    same_metrics(metrics(tmp_path), metrics(scripts.folder / "sft"))
    assert result(tmp_path) == pytest.approx(result(scripts.folder / "sft"), abs=1e-4)


@pytest.mark.slow
def test_a_script_that_is_called_wrongly_ends_with_one_line_and_exit_code_2():
    done = python("reward.py", "--steps", 0)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--steps" in line
    assert done.stdout == ""


def test_two_processes_sample_the_same_tokens_and_log_the_same_metrics_as_one(scripts, tmp_path):
    two = scripts.folder
    ma_ppo.main([*scripts.ppo_flags, "--out", str(tmp_path)])
    for arm in HH_ARMS:
        assert settings(two / arm)["ranks"] == 2
        same_metrics(metrics(two / arm), metrics(tmp_path / arm))
        # Two rows of rank 0 at step 0 and at step 2; one process has four.
        ours, theirs = samples(two / arm), samples(tmp_path / arm)
        assert [row["step"] for row in ours] == [0, 0, 2, 2]
        theirs = [*theirs[:2], *theirs[4:6]]
        for name in ("step", "prompt", "tokens", "seg"):
            assert [row[name] for row in ours] == [row[name] for row in theirs], name
        one, other = weights(tmp_path / arm / "model"), weights(two / arm / "model")
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_of_two_processes_one_speaks_and_draws(scripts):
    for arm in HH_ARMS:
        assert scripts.printed.count(f"PPO, arm {arm}:") == 1
        assert scripts.printed.count(f"| {arm} |") == 1  # of the closing table
    assert scripts.printed.count("drawing: python eval.py curves") == 1
    assert (scripts.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_processes_that_start_apart_build_all_stages_as_one_does(hh, tmp_path):
    one, data, _ = hh
    script = tmp_path / "two_processes.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, ma_ppo, sft\n"
        f"sft.TASK_FLAGS['hh'] = {SHORT_STAGES}\n"
        "ma_ppo.draw_curves = lambda folders, cfg: None\n"
        "manual_seed, device = torch.manual_seed, sft.setup('cpu')\n"
        "torch.manual_seed = lambda seed: manual_seed(seed + sft.rank())  # other models at first\n"
        "ma_ppo.main()\n"
    )
    flags = ["--task", "hh", "--data", data, *HH_PPO, "--out", tmp_path]
    succeeds(*TORCHRUN, script, *flags)
    for stage in ("sft", "reward"):
        same_metrics(metrics(tmp_path / stage), metrics(one / stage))
        assert result(tmp_path / stage) == pytest.approx(result(one / stage), abs=1e-4)
    for arm in HH_PPO_ARMS:
        same_metrics(metrics(tmp_path / arm), metrics(one / arm))


@pytest.mark.slow
def test_the_toy_on_two_processes_is_that_of_one(toy, tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import conftest, ma_ppo\n"
        "with conftest.quick():\n"
        "    ma_ppo.draw_curves = lambda folders, cfg: None\n"
        "    ma_ppo.main()\n"
    )
    flags = [*PPO_FLAGS, *toy.stages, "--arms", "token", "whole"]
    succeeds(*TORCHRUN, script, *flags, "--out", tmp_path)
    for arm in ("token", "whole"):
        same_metrics(metrics(tmp_path / arm), metrics(toy.folder / arm))
        ours, theirs = samples(tmp_path / arm), samples(toy.folder / arm)
        assert len(ours) == 8
        for name in ("step", "prompt", "tokens", "seg", "gold_score"):
            assert [row[name] for row in ours] == [row[name] for row in theirs], name


# One command builds the stages that are missing

HH_PPO_ARMS = ["token", "perplexity", "sentence"]
HH_PPO = [*HH_FLAGS, "--steps", "3", "--arms", *HH_PPO_ARMS]


STAGE = "--steps 2 --batch_size 4"
SHORT_STAGES = {"sft": STAGE, "reward": STAGE}


@pytest.fixture
def short_stages(monkeypatch):
    """Stages of --task hh take two steps."""
    monkeypatch.setitem(sft.TASK_FLAGS, "hh", SHORT_STAGES)


class OneCommand(NamedTuple):
    """What one command has made of a file."""

    folder: Path
    data: str  # the file
    printed: str


@pytest.fixture(scope="module")
def hh(tmp_path_factory):
    """One command on a file of preferences."""
    folder = tmp_path_factory.mktemp("hh")
    data = write_hh(folder / "pairs.jsonl")
    flags = ["--task", "hh", "--data", data, "--out", str(folder), *HH_PPO]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(sft.TASK_FLAGS, "hh", SHORT_STAGES)
        patch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
        ma_ppo.main(flags)
    return OneCommand(folder, data, printed.getvalue())


def test_one_command_on_a_file_of_preferences_builds_all_stages(hh):
    assert "2 rows dropped" in hh.printed
    for chapter in ("sft", "reward"):
        assert f"python {chapter}.py --task hh" in hh.printed  # the equivalent command
        assert len(metrics(hh.folder / chapter)) == 2
    for arm in HH_PPO_ARMS:
        rows = metrics(hh.folder / arm)
        assert len(rows) == 3
        assert all(row["gold_score"] is None for row in rows)
        assert all(math.isfinite(row[key]) for row in rows for key in KEYS - GOLD)


def test_finished_stages_are_used_again_and_those_of_other_data_refused(
    hh, monkeypatch, capsys, short_stages
):
    folder, data, _ = hh
    for chapter in (sft, reward):
        monkeypatch.setattr(chapter, "train", lambda cfg: pytest.fail("was built again"))

    def run(data):
        flags = [*HH_FLAGS, "--steps", "1", "--arms", "whole", "--seed", "3"]
        ma_ppo.main(["--task", "hh", "--data", data, "--out", str(folder), *flags])
        return capsys.readouterr().out

    assert run(data).count("using ") == 2
    monkeypatch.chdir(Path(data).parent)
    assert run("./pairs.jsonl").count("using ") == 2  # another name of the same file
    later = (folder / "reward" / "run.json").stat().st_mtime + 1
    os.utime(folder / "sft" / "run.json", (later, later))  # as if it had been made again
    assert "warning: " in run(data)
    with pytest.raises(SystemExit) as stop:
        run(write_hh(Path(data).with_name("other.jsonl"), 30))
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert str(folder / "sft") in line and "--data" in line


@pytest.fixture
def stages_to_make(monkeypatch):
    """{chapter: settings that it was called with} instead of training."""
    made = {}
    for chapter in (sft, reward):
        name = chapter.__name__
        monkeypatch.setattr(chapter, "train", lambda cfg, name=name: made.update({name: cfg}))
    return made


def test_missing_stages_take_over_what_the_user_has_set(stages_to_make, tmp_path):
    flags = "--task hh --model gpt2 --seed 7 --split 30 30 40 --max_prompt 40 --max_response 12"
    flags += " --chat_template --precision fp32 --gradient_checkpointing --keep 3 --resume auto"
    data = ["--data", "a b.jsonl", "c.jsonl"]
    cfg = ma_ppo.parse([*flags.split(), *data, "--out", str(tmp_path), "--lr", "0.5"])
    ma_ppo.build_missing_stages(cfg)
    folders = {name: str(tmp_path / name) for name in ("sft", "reward")}
    assert (cfg.sft, cfg.reward_model) == (folders["sft"], folders["reward"])
    assert stages_to_make["reward"].sft == cfg.sft
    same = ["task", "model", "data", "seed", "split", "max_prompt", "max_response"]
    same += ["chat_template", "precision", "gradient_checkpointing", "keep", "resume"]
    for name, stage in stages_to_make.items():
        assert stage.out == folders[name]
        for setting in same:
            assert getattr(stage, setting) == getattr(cfg, setting), (name, setting)
    # But its own learning rate and length are those of the chapter.
    assert (stages_to_make["sft"].lr, stages_to_make["sft"].steps) == (5e-5, 250)
    assert (stages_to_make["reward"].lr, stages_to_make["reward"].steps) == (1e-5, 100)


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "3"],
        ["--task", "plain", "--data", "a b.jsonl", "--max_prompt", "40", "--skip_bad_rows"],
        ["--task", "hh", "--model", "gpt2", "--split", "30", "30", "40", "--chat_template"],
        ["--preset", "gemma-2b-tldr", "--max_response", "99"],
    ],
    ids=" ".join,
)
def test_the_command_that_is_printed_for_a_missing_stage_makes_that_stage(
    flags, stages_to_make, tmp_path, capsys
):
    cfg = ma_ppo.parse([*flags, "--out", str(tmp_path)])
    ma_ppo.build_missing_stages(cfg)
    printed = capsys.readouterr().out
    for chapter in (sft, reward):
        name = chapter.__name__
        command = printed.partition(f"python {name}.py ")[2].splitlines()[0]
        pasted = sft.parse(chapter.Config, name, shlex.split(command))
        assert asdict(pasted) == asdict(stages_to_make[name])


def test_stages_that_are_named_are_neither_made_nor_compared(stages_to_make, tmp_path):
    cfg = ma_ppo.Config(sft="given", reward_model="given", out=str(tmp_path))
    ma_ppo.build_missing_stages(cfg)
    assert stages_to_make == {}


@pytest.fixture
def finished_stages(tmp_path):
    """An --out folder with stages, as far as their run.json goes, of the toy's default settings."""
    for chapter in (sft, reward):
        name = chapter.__name__
        out = tmp_path / name
        out.mkdir()
        cfg = sft.parse(chapter.Config, name, ["--out", str(out)])
        sft.write_result(out, cfg, {})
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    [
        "--max_prompt 300",
        "--max_response 99",
        "--split 30 30 40",
        "--chat_template",
        "--model gpt2",
        "--task toy-code",
    ],
)
def test_a_stage_made_with_other_tokens_in_mind_is_refused_by_name(flags, finished_stages, capsys):
    cfg = ma_ppo.parse([*flags.split(), "--out", str(finished_stages)])
    with pytest.raises(SystemExit) as stop:
        ma_ppo.build_missing_stages(cfg)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith(f"error: {finished_stages / 'sft'} was made with ")
    assert flags.split()[0] in line
    assert str(getattr(sft.Config(), flags.split()[0].lstrip("-"))) in line  # what it was made with


def test_settings_that_shape_no_tokens_may_differ_from_a_stages(finished_stages, capsys):
    flags = ["--seed", "5", "--steps", "9", "--batch_size", "8", "--lr", "0.1"]
    ma_ppo.build_missing_stages(ma_ppo.parse([*flags, "--out", str(finished_stages)]))
    assert capsys.readouterr().out.count("using ") == 2


def test_a_hub_model_whose_pad_is_its_eos_goes_through_the_whole_pipeline(tmp_path, short_stages):
    torch.manual_seed(0)
    hub, out = tmp_path / "hub", tmp_path / "out"
    tokenizer = sft.small_tokenizer("hh", [WORDS])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(hub)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 80}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(hub)
    flags = ["--task", "hh", "--data", write_hh(tmp_path / "pairs.jsonl"), "--model", str(hub)]
    ma_ppo.main([*flags, *HH_FLAGS, "--steps", "2", "--arms", "fixed", "--out", str(out)])
    rows = metrics(out / "fixed")
    assert all(abs(row["ratio_first"] - 1) <= 1e-5 for row in rows)  # dropout is off
    trained = AutoTokenizer.from_pretrained(out / "fixed" / "model")
    assert trained.pad_token_id != trained.eos_token_id == tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(out / "fixed" / "model")
    assert model.config.model_type == "gpt2"


# Flags: those of task, model and preset are put in front of yours


def parsed(chapter, *flags):
    """A chapter's settings."""
    return sft.parse(chapter.Config, chapter.__name__, list(flags))


def test_a_pretrained_model_is_not_trained_at_the_rates_of_a_small_new_one():
    for task in ([], ["--task", "hh"], ["--task", "apps"]):
        flags = [*task, "--model", "somewhere"]
        assert parsed(sft, *flags).lr == 5e-5
        assert parsed(reward, *flags).lr == 1e-5
        ppo = parsed(ma_ppo, *flags)
        assert (ppo.lr, ppo.critic_lr) == (1.5e-5, 1.5e-5)
    assert parsed(sft).lr == 4e-3
    assert parsed(ma_ppo, "--task", "hh").lr == 2e-4


def test_of_two_equal_flags_the_last_one_wins_and_yours_come_last():
    task = ["--task", "hh"]  # --lr 2e-4 --critic_lr 2e-4 --batch_size 32
    model = ["--model", "somewhere"]  # --lr 1.5e-5 --critic_lr 1.5e-5
    preset = ["--preset", "gemma-7b-webgpt"]  # --lr 1e-6 --critic_lr 1e-6 --batch_size 256
    mine = ["--lr", "0.25"]
    assert parsed(ma_ppo, *task).lr == 2e-4
    assert parsed(ma_ppo, *task, *model).lr == 1.5e-5
    assert parsed(ma_ppo, *task, *model, *preset).lr == 1e-6
    for flags in (task, model, preset, [*task, *model, *preset]):
        assert parsed(ma_ppo, *flags, *mine).lr == 0.25
        assert parsed(ma_ppo, *mine, *flags).lr == 0.25  # wherever it stands
    assert parsed(ma_ppo, "--lr", "1", *mine).lr == 0.25
    assert parsed(ma_ppo, *mine, *preset).critic_lr == 1e-6  # what is not named stays
    assert parsed(ma_ppo, *preset, "--task", "hh").task == "hh"
    assert parsed(ma_ppo, *preset, *model).model == "somewhere"


def test_arms_may_still_be_called_terminations():
    for flag in ("--arms", "--terminations"):
        assert parsed(ma_ppo, flag, "whole", "control").arms == ["whole", "control"]
    assert parsed(ma_ppo).arms == ["token", "fixed"]


@pytest.mark.parametrize("name", CHAPTERS)
def test_help_of_every_chapter_prints_its_settings(name, capsys):
    """argparse %-formats help texts: "10 % warm-up" once made --help a traceback."""
    chapter = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        chapter.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage:" in printed
    for setting in chapter.Config.__dataclass_fields__ if hasattr(chapter, "Config") else ():
        assert f"--{setting}" in printed, setting


@pytest.mark.parametrize("chapter", [sft, reward, ma_ppo], ids=lambda chapter: chapter.__name__)
def test_help_shows_what_is_put_in_front(chapter, capsys):
    with pytest.raises(SystemExit):
        chapter.main(["--help"])
    name, printed = chapter.__name__, capsys.readouterr().out
    for task, flags in sft.TASK_FLAGS.items():
        assert f"--task {task}: {flags.get(name, '') or '(none)'}\n" in printed
    assert f"--model NAME: {sft.PRETRAINED[name]}\n" in printed
    for preset, flags in sft.PRESETS.items():
        assert f"--preset {preset}: {flags['all']} {flags.get(name, '')}\n" in printed


# Bad input: one clear line and exit code 2, before any training


def below_a_file(tmp_path):
    """A path that cannot become a folder."""
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "out")


@pytest.fixture
def refuses(monkeypatch, capsys, tmp_path):
    """Run a chapter's main, which must stop before the first update; returns its line on stderr."""
    monkeypatch.setattr(sft, "update", lambda *arguments: pytest.fail("training began"))

    def run(chapter, *flags):
        flags = [str(flag) for flag in flags]
        if "--out" not in flags:
            flags += ["--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stop:
            chapter.main(flags)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert "error: " in lines[0]
        return lines[0]

    return run


each_chapter = pytest.mark.parametrize(
    "chapter", [sft, reward, ma_ppo], ids=lambda chapter: chapter.__name__
)


@each_chapter
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--task nonsense", "nonsense"),
        ("--preset nonsense", "nonsense"),
        ("--steps 0", "--steps"),
        ("--steps three", "three"),
        ("--batch_size 0", "--batch_size"),
        ("--micro_batch_size -1", "--micro_batch_size"),
        ("--lr 0", "--lr"),
        ("--lr nan", "--lr"),
        ("--lr inf", "--lr"),
        ("--seed -1", "--seed"),
        (f"--seed {2**63}", "--seed"),
        ("--device meta:x", "--device"),
        ("--device meta", "--device"),
        ("--device nonsense", "nonsense"),
        ("--max_response 0", "--max_response"),
        ("--split 20 40", "--split"),
        ("--nonsense 1", "--nonsense"),
        ("--batch 8", "--batch"),  # an abbreviation could mean another flag next year
        ("--max_p 8", "--max_p"),
        ("stray", "stray"),
        ("--data somewhere", "--data"),
        ("--task plain", "--data"),
        ("--task hh --data no/such/file", "no/such/file"),
    ],
)
def test_every_chapter_refuses_settings_that_cannot_work(refuses, chapter, flags, named):
    assert named in refuses(chapter, *flags.split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--arms token nonsense", "nonsense"),
        ("--arms token token", "--arms"),
        ("--gamma 0.9 --arms fixed control", "--gamma"),  # a control that controls nothing
        ("--n 0", "--n"),
        ("--n -3", "--n"),
        ("--ppo_epochs 0", "--ppo_epochs"),
        ("--gamma 1.5", "--gamma"),
        ("--lam -0.1", "--lam"),
        ("--lam 1.1", "--lam"),
        ("--beta -1", "--beta"),
        ("--beta nan", "--beta"),
        ("--sigma nonsense", "nonsense"),
        ("--macro_reward nonsense", "nonsense"),
        ("--ratio nonsense", "nonsense"),
        ("--clip 0", "--clip"),
        ("--no_eos_score nan", "--no_eos_score"),
        ("--critic_lr 0", "--critic_lr"),
        ("--temperature 0", "--temperature"),
        ("--top_k -1", "--top_k"),
        ("--sample_batch_size -1", "--sample_batch_size"),
        ("--top_p 0", "--top_p"),
        ("--top_p 1.1", "--top_p"),
        ("--sft no/such/folder", "no/such/folder"),
        ("--reward_model no/such/folder", "no/such/folder"),
    ],
)
def test_the_ppo_chapter_refuses_settings_that_cannot_work(refuses, flags, named):
    assert named in refuses(ma_ppo, *flags.split())


@each_chapter
def test_a_batch_that_the_ranks_cannot_share_is_refused(refuses, chapter, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refuses(chapter, "--batch_size", "8")
    assert "8" in line
    assert "3" in line


@each_chapter
def test_a_missing_checkpoint_is_named(refuses, chapter, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in refuses(chapter, "--sft" if chapter is reward else "--model", nowhere)


def test_a_checkpoint_folder_without_a_model_in_it_is_named(refuses, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = [(sft, "--model"), (reward, "--sft"), (ma_ppo, "--sft"), (ma_ppo, "--reward_model")]
    for chapter, flag in flags:
        assert str(empty) in refuses(chapter, flag, str(empty))


def small_stages(folder, words=" a b", positions=2048):
    """A causal LM, and an RM on its trunk, as the chapters save them -> (SFT folder, RM folder)"""
    tokenizer = sft.small_tokenizer("toy", [words])
    size = {"hidden_size": 8, "intermediate_size": 8}
    size |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **size)
    sft.save_models([LlamaForCausalLM(config), tokenizer], sft.make_folder(folder / "sft"))
    model = reward.ScalarModel.load(folder / "sft")
    sft.save_models([model, tokenizer], sft.make_folder(folder / "reward"))
    return folder / "sft", folder / "reward"


def test_the_trunk_of_a_reward_model_is_no_causal_lm(refuses, tmp_path):
    """transformers would give it a random head without a word, and PPO would train noise."""
    tokenizer = sft.small_tokenizer("toy", [" a b"])
    config = LlamaConfig(vocab_size=5, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    sft.save_models([reward.ScalarModel(LlamaModel(config)), tokenizer], tmp_path)
    assert "lm_head" in refuses(ma_ppo, "--sft", tmp_path, "--reward_model", tmp_path)


def test_a_reward_model_with_another_vocabulary_is_refused(refuses, tmp_path):
    """It would score other words than were written; with fewer of them, end in an IndexError."""
    policy, _ = small_stages(tmp_path / "one", " a b")
    _, other = small_stages(tmp_path / "two", " a c")
    assert str(other) in refuses(ma_ppo, "--sft", policy, "--reward_model", other)


def test_prompts_and_responses_beyond_a_models_positions_are_refused(refuses, tmp_path):
    policy, scores = small_stages(tmp_path / "short", positions=64)
    assert "64 positions" in refuses(ma_ppo, "--sft", policy, "--reward_model", scores)
    assert "64 positions" in refuses(sft, "--model", policy)


def test_a_reward_model_cannot_start_from_a_tokenizer_without_pad(refuses, tmp_path):
    policy, _ = small_stages(tmp_path)
    path = policy / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"pad_token"', '"no_pad_token"'))
    assert "PAD" in refuses(reward, "--sft", policy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(refuses):
    assert "--device cuda" in refuses(sft, "--device", "cuda")


def test_an_output_folder_that_cannot_be_written_is_named(refuses, tmp_path):
    blocked = below_a_file(tmp_path)
    for chapter in (sft, reward, ma_ppo):
        assert blocked in refuses(chapter, "--out", blocked)


def test_a_run_with_a_broken_policy_skips_its_updates_and_logs_null(tmp_path):
    """NaN logits have no place in the cumulative distribution: this was once an IndexError."""
    policy, scores = small_stages(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.lm_head.weight.data[3] = torch.nan
    model.save_pretrained(policy)
    flags = ["--sft", policy, "--reward_model", scores, "--batch_size", 4, "--arms", "fixed"]
    flags += ["--max_prompt", 8, "--max_response", 8, "--steps", 2, "--out", tmp_path / "out"]
    ma_ppo.main([str(flag) for flag in flags])
    out = tmp_path / "out" / "fixed"
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (out / name).read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    assert [row["policy_loss"] for row in metrics(out)] == [None, None]
    saved = weights(out / "model")
    for name, x in model.state_dict().items():
        assert torch.equal(saved[name].nan_to_num(), x.nan_to_num())


# The house


def tree_of(chapter):
    """A chapter's syntax tree."""
    return ast.parse((ROOT / f"{chapter}.py").read_text())


def imports(chapter):
    """Names of the modules that a chapter imports, wherever it does."""
    for node in ast.walk(tree_of(chapter)):
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


def commands_of(chapter):
    """The commands in a chapter's docstring, which can be pasted."""
    header = ast.get_docstring(tree_of(chapter))
    for line in header.splitlines():
        if "python " in line or "torchrun " in line:
            assert line.startswith(("    python ", "    torchrun ")), line
            command = line.split("#")[0]
            assert command.count("python ") + command.count("torchrun ") == 1, line
            yield shlex.split(command)


def test_every_chapter_says_what_it_teaches_and_how_to_run_it():
    for place, chapter in enumerate(CHAPTERS):
        header = ast.get_docstring(tree_of(chapter))
        assert header.startswith(f"Chapter {place + 1}: ")
        assert "You may stop reading" in " ".join(header.split()).replace("you may", "You may")
        assert any(words[:2] == ["python", f"{chapter}.py"] for words in commands_of(chapter))


@each_chapter
def test_the_commands_of_a_chapters_docstring_are_understood(chapter):
    for words in commands_of(chapter.__name__):
        place = words.index(f"{chapter.__name__}.py")
        parsed(chapter, *words[place + 1 :])
