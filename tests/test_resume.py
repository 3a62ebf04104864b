"""No run is lost: kills at any moment, signals, damaged checkpoints, full disks, changed settings.

Whatever happens to a run, with --resume auto it ends like one to which nothing has happened.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from runs import (
    assert_near,
    assert_same,
    command_at,
    kill_at,
    line_with,
    newest,
    rows,
)
from transformers import LlamaConfig, LlamaForCausalLM

import sft

SFT = ["--steps", 5]  # the short run of SFT; with checkpoints after 2, 4 and 5 steps


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of `killed`: an SFT run with checkpoints of steps 2 and 4, killed in its last step."""
    return Path(shutil.copytree(killed, tmp_path / "sft"))


# Kills

MOMENTS = []
for chapter in ("sft", "reward", "ma_ppo"):
    MOMENTS.append(pytest.param(chapter, 0))
    MOMENTS += [pytest.param(chapter, number, marks=pytest.mark.slow) for number in range(1, 4)]


@pytest.mark.parametrize("chapter, number", MOMENTS)
def test_a_run_killed_at_any_operation_on_a_file_ends_like_one_that_was_not(
    driver, short_runs, undisturbed, tmp_path, chapter, number
):
    flags, inside = short_runs[chapter]
    wanted = undisturbed(chapter)
    assert wanted.operations > 40
    k = random.Random(f"{chapter} {number}").randint(1, wanted.operations)
    driver.run_killed(chapter, tmp_path / "run", flags, kill_at("files", k))
    assert_same(tmp_path / "run" / inside, wanted.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "at",
    [
        kill_at("ma_ppo.generate", 4),  # the first call checks sampling
        kill_at("ma_ppo.judge", 4),
        kill_at("sft.update", 5),  # the policy has been updated, the critic has not
        kill_at("torch.Tensor.backward", 6),
        kill_at("sft.append_rows", 4),  # the step is in metrics.jsonl, but in no checkpoint
        kill_at("sft.dcp.save", 2),  # all is written, and has neither manifest nor name
        kill_at("sft.fingerprint", 4),
        kill_at("sft.write_json", 4),
        kill_at("sft.save_checkpoint", 2),
    ],
    ids=lambda at: at["event"],
)
def test_a_ppo_run_killed_within_a_step_ends_like_one_that_was_not(
    driver, short_runs, undisturbed, tmp_path, at
):
    flags, inside = short_runs["ma_ppo"]
    printed = driver.run_killed("ma_ppo", tmp_path / "run", flags, at)
    assert "goes on from" in printed
    assert_same(tmp_path / "run" / inside, undisturbed("ma_ppo").folder)


@pytest.mark.slow
def test_the_whole_pipeline_goes_on_where_it_was_killed(driver, tmp_path):
    flags = ["--steps", 2, "--arms", "token", "fixed"]
    folders = ("sft", "reward", "token", "fixed")
    whole, out = tmp_path / "whole", tmp_path / "run"
    driver.run("ma_ppo", whole, *flags, at=command_at("files", 0, ""))
    count = driver.count_events()
    for i in range(1, 7):
        shutil.rmtree(out, ignore_errors=True)
        driver.run_killed("ma_ppo", out, flags, kill_at("files", count * i // 7))
        for folder in folders:
            assert_same(out / folder, whole / folder)
    printed = driver.run("ma_ppo", out, *flags, "--resume", "auto")
    for arm in ("token", "fixed"):
        assert line_with(f"{arm} is already finished", printed)


def test_metrics_are_cut_back_to_the_checkpoint_even_within_a_line(
    driver, interrupted, undisturbed
):
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    printed = driver.run("sft", interrupted, *SFT, "--resume", "auto")
    assert "goes on from" in printed
    assert_same(interrupted, undisturbed("sft").folder)


# Signals


@pytest.mark.parametrize("name", ["TERM", pytest.param("INT", marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    driver, short_runs, undisturbed, tmp_path, name
):
    flags, inside = short_runs["ma_ppo"]
    at = command_at("ma_ppo.judge", 3, f"kill -{name} {{pid}}")
    code = 128 + getattr(signal, f"SIG{name}")
    printed = driver.run("ma_ppo", tmp_path / "run", *flags, at=at, codes=[code])
    saved = tmp_path / "run" / inside / "checkpoints" / "step-000003"
    text = f"SIG{name}: saved {saved}; the same command with --resume auto goes on from it"
    assert line_with("saved", printed) == text
    driver.run("ma_ppo", tmp_path / "run", *flags, "--resume", "auto")
    assert_same(tmp_path / "run" / inside, undisturbed("ma_ppo").folder)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(driver, short_runs, undisturbed, tmp_path):
    flags, inside = short_runs["ma_ppo"]
    # in the updates of policy and critic in the third step
    at = command_at("torch.Tensor.backward", 5, "kill -TERM {pid}", times=2)
    driver.run("ma_ppo", tmp_path / "run", *flags, at=at, codes=[-signal.SIGTERM])
    assert newest(tmp_path / "run" / inside).name == "step-000002"
    driver.run("ma_ppo", tmp_path / "run", *flags, "--resume", "auto")
    assert_same(tmp_path / "run" / inside, undisturbed("ma_ppo").folder)


@pytest.mark.slow
def test_a_signal_during_the_last_save_is_not_lost(driver, undisturbed, tmp_path):
    at = command_at("sft.save_checkpoint", 3, "kill -TERM {pid}")
    driver.run("sft", tmp_path / "run", *SFT, at=at, codes=[-signal.SIGTERM])
    driver.run("sft", tmp_path / "run", *SFT, "--resume", "auto")
    assert_same(tmp_path / "run", undisturbed("sft").folder)


def test_signal_handlers_are_as_before_once_a_run_is_over(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for _ in small_run(tmp_path).steps():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(ZeroDivisionError):
        for step in small_run(tmp_path).steps():
            step / 0
    assert [signal.getsignal(number) for number in numbers] == before


# Another number of ranks


@pytest.mark.parametrize(
    "chapter, before, after",
    [
        ("ma_ppo", 2, 1),
        pytest.param("ma_ppo", 1, 2, marks=pytest.mark.slow),
        pytest.param("sft", 2, 1, marks=pytest.mark.slow),
        pytest.param("sft", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    driver, short_runs, undisturbed, tmp_path, chapter, before, after
):
    """Only the last rank gets the signal: all of them stop behind the same step."""
    flags, inside = short_runs[chapter]
    out = tmp_path / "run"
    at = command_at("sft.micro_slices", 1, "kill -TERM {pid}")
    driver.run(chapter, out, *flags, at=at, ranks=before, codes=[143] * before)
    assert newest(out / inside).name == "step-000001"
    driver.run(chapter, out, *flags, "--resume", "auto", ranks=after)
    assert_near(out / inside, undisturbed(chapter).folder)


# Damaged checkpoints


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(folder, kind):
    """Do to a checkpoint what disks and people do; -> a pattern of what must be said about it."""
    part = folder / "__0_0.distcp"
    if kind == "a flipped bit in the weights":
        flip(part)
        return "__0_0.distcp is damaged: its SHA-256 differs"
    if kind == "a flipped bit in the list of weights":
        flip(folder / ".metadata")
        return r"\.metadata is damaged: its SHA-256 differs"
    if kind == "a flipped bit in the step":
        flip(folder / "state.json")
        return "state.json is damaged: its SHA-256 differs"
    if kind == "weights cut short":
        os.truncate(part, 1000)
        return r"__0_0.distcp has 1,000 bytes instead of [\d,]+"
    if kind == "no weights":
        part.unlink()
        return "__0_0.distcp is missing"
    if kind == "no manifest":
        (folder / "manifest.json").unlink()
        return "manifest.json is missing"
    assert kind == "half a manifest"
    os.truncate(folder / "manifest.json", 50)
    return "it cannot be read: .+"


DAMAGE = [
    "a flipped bit in the weights",
    "a flipped bit in the list of weights",
    "a flipped bit in the step",
    "weights cut short",
    "no weights",
    "no manifest",
    "half a manifest",
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, capsys, kind):
    model = torch.nn.Linear(2, 2)
    for step in small_run(tmp_path, model, save_every=2).steps():
        model.weight.data.fill_(step)
    older, newer = sft.checkpoints(tmp_path)
    reason = damage(newer, kind)
    capsys.readouterr()
    again = small_run(tmp_path, model, resume="auto")
    warning = line_with("warning", capsys.readouterr().err)
    assert re.fullmatch(f"warning: {re.escape(str(newer))} is skipped: {reason}", warning)
    assert (again.first, again.last) == (2, older)
    assert (model.weight == 1).all()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(driver, interrupted, undisturbed):
    flip(interrupted / "checkpoints/step-000004/__0_0.distcp")
    printed = driver.run("sft", interrupted, *SFT, "--resume", "auto")
    good = interrupted / "checkpoints" / "step-000002"
    assert f"sft: goes on from {good}, 2 of 5 steps are done" in printed
    assert_same(interrupted, undisturbed("sft").folder)


@pytest.mark.slow
def test_what_any_rank_finds_damaged_is_skipped_by_all(driver, short_runs, undisturbed, tmp_path):
    flags, inside = short_runs["ma_ppo"]
    at = command_at("ma_ppo.judge", 3, "kill -TERM {pid}")
    driver.run("ma_ppo", tmp_path, *flags, at=at, ranks=2, codes=[143, 143])
    flip(newest(tmp_path / inside) / "__1_0.distcp")
    printed = driver.run("ma_ppo", tmp_path, *flags, "--resume", "auto", ranks=2)
    assert "step-000003 is skipped: __1_0.distcp is damaged" in line_with("warning", printed)
    assert_same(tmp_path / inside, undisturbed("ma_ppo", ranks=2).folder)


def test_if_every_checkpoint_is_damaged_nothing_is_removed(driver, interrupted):
    for folder in sft.checkpoints(interrupted):
        flip(folder / "__0_0.distcp")
    files = sorted(interrupted.rglob("*"))
    printed = driver.run("sft", interrupted, *SFT, "--resume", "auto", codes=[2])
    text = f"no checkpoint in {interrupted} is complete; without --resume the run starts anew"
    assert line_with("error", printed) == f"error: {text}"
    assert sorted(interrupted.rglob("*")) == files
    assert len(rows(interrupted / "metrics.jsonl")) == 4


# Disks


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB: room for one checkpoint of the toy, not for two and the model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def enlarge(disk):
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(driver, disk, undisturbed, ranks):
    out = disk / "sft"
    printed = driver.run("sft", out, *SFT, ranks=ranks, codes=[2] * ranks)
    last = out / "checkpoints" / "step-000002"
    reason = f"cannot save a checkpoint in {out}: No space left on device"
    end = f"the last complete checkpoint is {last} (--resume auto)"
    assert line_with("error", printed) == f"error: {reason}; {end}"
    assert "Traceback" not in printed
    assert list((out / "checkpoints").iterdir()) == [last]
    assert sft.damage(last) is None
    enlarge(disk)
    driver.run("sft", out, *SFT, "--resume", "auto", ranks=ranks)
    assert_same(out, undisturbed("sft", ranks=ranks).folder)


@pytest.mark.slow
def test_a_full_disk_under_the_metrics_ends_the_run_in_one_line(driver, disk, undisturbed):
    out = disk / "sft"
    driver.run("sft", out, *SFT, at=kill_at("sft.update", 4), codes=[-9])
    # the next row needs a new page, and there is none
    grow = f"truncate -s 4096 {out}/metrics.jsonl"
    fill = f"cat /dev/zero > {disk}/filler 2> /dev/null"
    at = command_at("sft.update", 1, f"{grow}; {fill}; true")
    printed = driver.run("sft", out, *SFT, "--resume", "auto", at=at, codes=[2])
    text = f"error: cannot write metrics.jsonl in {out}: No space left on device; the last"
    assert line_with("error", printed).startswith(text)
    (disk / "filler").unlink()
    enlarge(disk)
    driver.run("sft", out, *SFT, "--resume", "auto")
    assert_same(out, undisturbed("sft").folder)


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_anything_is_computed(driver, disk):
    out = disk / "sft"
    out.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    printed = driver.run("sft", disk.parent / "log", "--out", out, *SFT, codes=[2])
    assert line_with("error", printed) == f"error: cannot write to {out}"
    assert "SFT:" not in printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_grow_ends_all_ranks_with_the_last_checkpoint_intact(
    driver, interrupted, ranks
):
    """The same as a full disk, where nobody may mount one; of two ranks only the last meets it."""
    flags = [*SFT, "--resume", "auto"]
    codes = [2] * ranks
    printed = driver.run("sft", interrupted, *flags, ranks=ranks, most_bytes=400_000, codes=codes)
    last = interrupted / "checkpoints" / "step-000004"
    reason = f"cannot save a checkpoint in {interrupted}: File too large"
    end = f"the last complete checkpoint is {last} (--resume auto)"
    assert line_with("error", printed) == f"error: {reason}; {end}"
    assert "Traceback" not in printed
    assert sft.damage(last) is None
    assert not list(interrupted.rglob(".tmp-*"))


# Two runs in one folder


@pytest.mark.parametrize(
    "chapter, ranks", [("sft", 1), pytest.param("ma_ppo", 2, marks=pytest.mark.slow)]
)
def test_a_second_run_in_a_folder_is_refused_and_all_its_ranks_stop(
    driver, short_runs, tmp_path, chapter, ranks
):
    flags, inside = short_runs[chapter]
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "run.lock"):
        printed = driver.run(chapter, tmp_path, *flags, ranks=ranks, codes=[2] * ranks)
    assert line_with("error", printed) == f"error: another run writes to {folder}"
    driver.run(chapter, tmp_path, *flags, ranks=ranks)


# Settings


def test_changed_settings_are_refused_by_name_unless_overridden(driver, interrupted):
    changed = ["--steps", 6, "--lr", 0.1, "--seed", 0, "--resume", "auto"]
    printed = driver.run("sft", interrupted, *changed, codes=[2])
    last = interrupted / "checkpoints" / "step-000004"
    text = f"error: {last} has other settings: --steps was 5, is 6; --lr was 0.004, is 0.1"
    assert line_with("error", printed) == f"{text} (--override goes on with the new)"
    assert len(rows(interrupted / "metrics.jsonl")) == 4
    driver.run("sft", interrupted, *changed, "--override")
    assert [row["step"] for row in rows(interrupted / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_settings_that_cannot_change_the_result_may_change(driver, interrupted, undisturbed):
    free = ["--save_every", 1, "--keep", 1, "--max_skipped", 9, "--timeout", 1000]
    free += ["--device", "cpu", "--micro_batch_size", 16]
    driver.run("sft", interrupted, *SFT, *free, "--resume", "auto")
    assert [path.name for path in sft.checkpoints(interrupted)] == ["step-000005"]
    assert_same(interrupted, undisturbed("sft").folder)


def test_a_finished_run_is_not_trained_again_but_can_be_trained_on(driver, undisturbed, tmp_path):
    out = Path(shutil.copytree(undisturbed("sft").folder, tmp_path / "sft"))

    def times():
        files = (path for path in out.rglob("*") if path.name != "run.lock")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    printed = driver.run("sft", out, *SFT, "--resume", "auto")
    assert f"{out} is already finished" in printed
    assert times() == before
    more = ["--steps", 6, "--resume", "auto"]
    printed = driver.run("sft", out, *more, codes=[2])
    text = f"error: {out} is finished, with other settings: --steps was 5, is 6"
    assert line_with("error", printed) == f"{text} (--override goes on with the new)"
    printed = driver.run("sft", out, *more, "--override")
    assert re.search("sft: goes on from .*, 5 of 6 steps are done", printed)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(6))


def test_without_resume_a_run_starts_anew_and_says_so(driver, interrupted, undisturbed):
    printed = driver.run("sft", interrupted, *SFT)
    assert f"starting anew: 2 checkpoints in {interrupted} are removed" in printed
    assert_same(interrupted, undisturbed("sft").folder)


@pytest.mark.parametrize(
    "flags", ["--resume yes", "--keep 0", "--save_every -1", "--max_skipped 0", "--timeout 0"]
)
def test_impossible_settings_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        sft.parse(sft.Config, "sft", flags.split())
    assert stop.value.code == 2
    assert f"error: {flags.split()[0]} must be" in capsys.readouterr().err


# One checkpoint


def small_run(out, model=None, **settings):
    """A run of four steps, begun, of a model, by default a small linear one."""
    model = model or torch.nn.Linear(2, 2)
    cfg = sft.Config(**{"out": str(out), "steps": 4} | settings)
    run = sft.Run(cfg, out, "small", {"model": model}, {"model": sft.make_optimizer(model)})
    run.begin()
    return run


def test_the_newest_checkpoints_are_kept(tmp_path):
    list(small_run(tmp_path, save_every=1, keep=3).steps())
    names = [path.name for path in sft.checkpoints(tmp_path)]
    assert names == ["step-000002", "step-000003", "step-000004"]
    list(small_run(tmp_path, save_every=0).steps())
    assert [path.name for path in sft.checkpoints(tmp_path)] == ["step-000004"]


def test_a_checkpoint_holds_what_its_manifest_says(tmp_path):
    list(small_run(tmp_path).steps())
    folder = newest(tmp_path)
    names = {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {"__0_0.distcp", ".metadata", "state.json"}
    assert names == manifest.keys() | {"manifest.json"}
    for name, (size, digest) in manifest.items():
        command = ["sha256sum", folder / name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert (folder / name).stat().st_size == size
        assert printed.split()[0] == digest


def test_tied_weights_stay_tied(tmp_path):
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    list(small_run(tmp_path, model).steps())
    small_run(tmp_path, other, resume="auto")
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_global_generators_go_on_too(tmp_path):
    list(small_run(tmp_path).steps())
    wanted = torch.rand(3)
    torch.manual_seed(1)
    small_run(tmp_path, resume="auto")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    "other",
    [torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))],
    ids=["other shapes", "other names"],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, capsys, other):
    list(small_run(tmp_path).steps())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        small_run(tmp_path, other, resume="auto")
    assert stop.value.code == 2
    error = line_with("error", capsys.readouterr().err)
    assert error.startswith(f"error: {newest(tmp_path)} does not fit the model: ")


def test_skipped_updates_are_counted_over_interruptions_and_end_the_run(tmp_path, capsys):
    run = small_run(tmp_path, save_every=1, max_skipped=3)
    losses = [math.nan, 1.0, math.nan, math.inf]
    for step in run.steps():
        row = {"step": step, "policy_loss": losses[step], "value_loss": 0.0}
        run.log(row, "value_loss")
    again = small_run(tmp_path, steps=6, resume="auto", override=True, max_skipped=3)
    assert again.counters == {"skipped": 3, "in_a_row": 2}
    with pytest.raises(SystemExit) as stop:
        row = {"step": 4, "policy_loss": 0.0, "value_loss": math.nan}
        again.log(row, "policy_loss", [[1, 2], [3]])
    assert stop.value.code == 2
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad == {"step": 4, "batch": [[1, 2], [3]]}
    error = line_with("error", capsys.readouterr().err)
    assert "the loss is no longer finite: lower --lr" in error
    assert "3 steps in a row" in error
    assert str(newest(tmp_path)) in error
    with (tmp_path / "metrics.jsonl").open() as file:
        steps = [json.loads(line, parse_constant=pytest.fail) for line in file]
    assert [row["policy_loss"] for row in steps] == [None, 1.0, None, None, 0.0]


def test_json_files_are_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    sft.write_json(path, {"a": 1})
    monkeypatch.setattr(Path, "rename", lambda *ignored: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        sft.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
