"""No run is ever lost: kills at any moment, signals, damaged checkpoints, full disks, two runs in a folder.

The runs are children that one process forks, which has loaded everything once: 0.3 s a run instead of 8 s.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import sft

ROOT = Path(__file__).parent.parent
TINY = ["--batch_size", "4", "--max_prompt", "16", "--max_response", "16", "--save_every", "2"]
# A job: {chapter, argv, log, ranks, port, bytes, at}. `at` is [event, k, action, times]: before the k-th
# operation on a file in --out ("files"), or behind the k-th call of a function, the last rank kills itself
# or runs a shell command; and so at the next times - 1 events. An action that is a number kills it within the
# call, so many seconds after its beginning, or at its end.
DRIVER = """
import json, os, resource, signal, subprocess, sys
sys.argv[0] = "train.py"
import torch, ma_ppo, reward, sft
torch.set_num_threads(1)
sft.TOY_ROWS = 300
sft.load_rows("toy", ())
small = {"steps": 3, "batch_size": 4, "max_prompt": 16, "max_response": 16}
sft.DEFAULTS["toy"] = {"sft": small, "reward": small}  # of the stages that ma_ppo makes
ma_ppo.draw_curves = lambda *ignored: None
chapters = {"sft": sft, "reward": reward, "ma_ppo": ma_ppo}

def plant(event, k, action, times=1):
    seen = 0
    def count():
        nonlocal seen
        seen += 1
        if k <= seen < k + times:
            if action == "kill" or isinstance(action, float):
                os.kill(os.getpid(), signal.SIGKILL)
            subprocess.run(action.format(pid=os.getpid()), shell=True, check=True)
    if event == "files":
        names = "open os.mkdir os.rename os.truncate os.remove os.rmdir shutil.rmtree".split()
        def hook(name, arguments):
            if name in names:
                if str(arguments[0]).startswith(out):
                    count()
        sys.addaudithook(hook)
    else:
        owner, name = event.rsplit(".", 1)
        owner = eval(owner)
        inner = getattr(owner, name)
        def outer(*args, **options):
            if isinstance(action, float) and seen == k - 1:
                subprocess.Popen(["sh", "-c", f"sleep {action}; kill -KILL {os.getpid()}"])
            result = inner(*args, **options)
            count()
            return result
        setattr(owner, name, outer)
    return lambda: seen

def train(job, rank):
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["ranks"]), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    if job["bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["bytes"], job["bytes"]))
    seen = plant(*job["at"]) if job["at"] and rank == job["ranks"] - 1 else lambda: 0
    code = 1
    try:
        chapters[job["chapter"]].main(job["argv"])
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    print(f"[{seen()} events]", flush=True)
    os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    out = job["argv"][job["argv"].index("--out") + 1]
    children = [os.fork() or train(job, rank) for rank in range(job["ranks"])]
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    """The process that forks the runs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def stages(driver, tmp_path_factory):
    """Flags of an SFT model and an RM for the PPO runs."""
    folder = tmp_path_factory.mktemp("stages")
    run(driver, "sft", folder / "sft", "--steps", 2)
    run(driver, "reward", folder / "reward", "--steps", 2, "--sft", folder / "sft")
    return ["--sft", folder / "sft", "--reward_model", folder / "reward"]


def free_port():
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(driver, chapter, out, *flags, ranks=1, at=None, most=0, port=0):
    """Start a run; returns the ids of its processes, one per rank.  most: bytes that a file may have"""
    argv = [*TINY, "--out", str(out), *map(str, flags)]
    log = Path(f"{out}.log")
    log.unlink(missing_ok=True)
    job = {
        "chapter": chapter,
        "argv": argv,
        "log": str(log),
        "ranks": ranks,
        "port": port or free_port(),
        "at": at,
        "bytes": most,
    }
    print(json.dumps(job), file=driver.stdin, flush=True)
    return [int(pid) for pid in driver.stdout.readline().split()]


def wait(driver, out):
    """The exit codes of the ranks of a run that was started, and what it printed."""
    codes = [int(code) for code in driver.stdout.readline().split()]
    return codes, Path(f"{out}.log").read_text()


def run(driver, chapter, out, *flags, codes=(0,), **options):
    """Run a chapter to its end; returns what it printed."""
    start(driver, chapter, out, *flags, **options)
    ended, printed = wait(driver, out)
    assert ended == list(codes), printed
    assert "Traceback" not in printed
    return printed


def line(printed, word):
    """The one line of what was printed that contains `word`."""
    (found,) = [x for x in printed.splitlines() if word in x]
    return found


def rows(path):
    """The rows of a .jsonl file without timings; a file that is missing has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(x).items() if not k.startswith("seconds")} for x in lines]


def newest(out):
    return sft.checkpoints(out)[-1]


def same(out, wanted):
    """Two finished runs are the same, bit by bit: weights, optimizer state, metrics, samples, final model."""
    for name in sft.LOGS:
        assert rows(out / name) == rows(wanted / name)
    assert newest(out).name == newest(wanted).name
    pairs = [(newest(out) / path.name, path) for path in newest(wanted).glob("*.safetensors")]
    pairs += [(out / path.relative_to(wanted), path) for path in wanted.glob("model/*.safetensors")]
    pairs += [(out / path.name, path) for path in wanted.glob("*.safetensors")]
    assert len(pairs) >= 4
    for one, two in pairs:
        assert one.read_bytes() == two.read_bytes(), one
    assert (out / "run.json").exists()
    assert not list(out.rglob(".tmp-*"))


def chapters(stages):
    """Each training chapter with the flags of a short run, and the folder in --out that it trains in."""
    ppo = ["--steps", 4, *stages, "--terminations", "fixed"]
    return {
        "sft": (["--steps", 5], "."),
        "reward": (["--steps", 4, *stages[:2]], "."),
        "ma_ppo": (ppo, "fixed"),
    }


# Kills


@pytest.fixture(scope="module")
def whole(driver, stages, tmp_path_factory):
    """Each chapter's run in one go: {chapter: (folder, number of its operations on files)}."""
    made = {}
    for chapter, (flags, inside) in chapters(stages).items():
        out = tmp_path_factory.mktemp("whole") / chapter
        printed = run(driver, chapter, out, *flags, at=["files", -1, ""])
        made[chapter] = out / inside, int(re.search(r"\[(\d+) events", printed)[1])
    return made


def survive(driver, chapter, out, flags, at):
    """Kill a run at `at`, then finish it with --resume auto."""
    run(driver, chapter, out, *flags, at=at, codes=[-signal.SIGKILL])
    return run(driver, chapter, out, *flags, "--resume", "auto")


@pytest.mark.parametrize("chapter", ["sft", "reward", "ma_ppo"])
def test_a_run_killed_at_any_operation_on_a_file_ends_like_one_that_was_not(
    driver, stages, whole, tmp_path, chapter
):
    (wanted, count), (flags, inside) = whole[chapter], chapters(stages)[chapter]
    assert count > 40
    for k in random.Random(chapter).sample(range(1, count), 4):
        out = tmp_path / str(k)
        survive(driver, chapter, out, flags, ["files", k, "kill"])
        same(out / inside, wanted)


@pytest.mark.parametrize(
    "at",
    [
        ["ma_ppo.generate", 3, "kill"],
        ["ma_ppo.judge", 4, "kill"],
        ["sft.update", 5, "kill"],  # the policy has been updated, the critic has not
        ["torch.Tensor.backward", 6, "kill"],
        ["sft.append_rows", 4, "kill"],  # the step is in metrics.jsonl, but in no checkpoint
        ["sft.save_file", 6, "kill"],
        ["sft.digest", 8, "kill"],
        ["sft.Run.save", 2, "kill"],
    ],
    ids=lambda at: at[0],
)
def test_a_ppo_run_killed_within_a_step_ends_like_one_that_was_not(driver, stages, whole, tmp_path, at):
    flags, inside = chapters(stages)["ma_ppo"]
    printed = survive(driver, "ma_ppo", tmp_path / "run", flags, at)
    assert "goes on from" in printed
    same(tmp_path / "run" / inside, whole["ma_ppo"][0])


def test_the_whole_pipeline_goes_on_where_it_was_killed(driver, tmp_path):
    flags = ["--steps", 2, "--terminations", "token", "fixed"]
    printed = run(driver, "ma_ppo", tmp_path / "whole", *flags, at=["files", -1, ""])
    count = int(re.search(r"\[(\d+) events", printed)[1])
    for k in (count * i // 9 for i in range(1, 9)):
        out = tmp_path / str(k)
        survive(driver, "ma_ppo", out, flags, ["files", k, "kill"])
        for inside in ("sft", "reward", "token", "fixed"):
            same(out / inside, tmp_path / "whole" / inside)
    printed = run(driver, "ma_ppo", out, *flags, "--resume", "auto")
    for inside in ("token", "fixed"):
        assert line(printed, f"{inside} is already finished")


def test_metrics_are_cut_back_to_the_checkpoint_even_within_a_line(driver, interrupted, whole):
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert "goes on from" in run(driver, "sft", interrupted, *SFT, "--resume", "auto")
    same(interrupted, whole["sft"][0])


# Signals


SFT = ["--steps", "5"]


@pytest.fixture(scope="module")
def killed(driver, tmp_path_factory):
    """An SFT run that was killed in its last step, and has checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("killed") / "sft"
    run(driver, "sft", out, *SFT, at=["sft.update", 5, "kill"], codes=[-signal.SIGKILL])
    return out


@pytest.fixture
def interrupted(killed, tmp_path):
    """A copy of that run for one test."""
    return Path(shutil.copytree(killed, tmp_path / "sft"))


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(driver, stages, whole, tmp_path, name):
    (flags, inside), number = chapters(stages)["ma_ppo"], getattr(signal, f"SIG{name}")
    at = ["ma_ppo.judge", 3, f"kill -{name} {{pid}}"]
    printed = run(driver, "ma_ppo", tmp_path / "run", *flags, at=at, codes=[128 + number])
    saved = tmp_path / "run" / inside / "checkpoints" / "step-000003"
    assert f"SIG{name}: saved {saved}; the same command with --resume auto goes on from it" in printed
    run(driver, "ma_ppo", tmp_path / "run", *flags, "--resume", "auto")
    same(tmp_path / "run" / inside, whole["ma_ppo"][0])


def test_a_second_signal_ends_a_run_at_once(driver, stages, whole, tmp_path):
    flags, inside = chapters(stages)["ma_ppo"]
    at = ["torch.Tensor.backward", 5, "kill -TERM {pid}", 2]  # policy and critic of the third step
    run(driver, "ma_ppo", tmp_path / "run", *flags, at=at, codes=[-signal.SIGTERM])
    assert newest(tmp_path / "run" / inside).name == "step-000002"
    run(driver, "ma_ppo", tmp_path / "run", *flags, "--resume", "auto")
    same(tmp_path / "run" / inside, whole["ma_ppo"][0])


def test_a_signal_during_the_last_save_is_not_lost(driver, whole, tmp_path):
    at = ["sft.Run.complete", 3, "kill -TERM {pid}"]
    run(driver, "sft", tmp_path / "run", *SFT, at=at, codes=[-signal.SIGTERM])
    run(driver, "sft", tmp_path / "run", *SFT, "--resume", "auto")
    same(tmp_path / "run", whole["sft"][0])


def test_signal_handlers_are_as_before_once_a_run_is_over(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for _ in small_run(tmp_path):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(ZeroDivisionError):
        for step in small_run(tmp_path):
            step / 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Ranks


@pytest.mark.parametrize("chapter", ["sft", "ma_ppo"])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(driver, stages, whole, tmp_path, chapter, before, after):
    """Only the last rank gets the signal: all of them stop behind the same step."""
    (flags, inside), out = chapters(stages)[chapter], tmp_path / "run"
    at = ["sft.micro_slices", 1, "kill -TERM {pid}"]
    run(driver, chapter, out, *flags, at=at, ranks=before, codes=[143] * before)
    assert newest(out / inside).name == "step-000001"
    run(driver, chapter, out, *flags, "--resume", "auto", ranks=after, codes=[0] * after)
    wanted = whole[chapter][0]
    assert [row["step"] for row in rows(out / inside / "metrics.jsonl")] == list(range(int(flags[1])))
    for path in newest(wanted).glob("*.safetensors"):
        one, two = load_file(path), load_file(newest(out / inside) / path.name)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


# Faults of storage


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        r"model.safetensors has 1,000 bytes instead of \d\d\d,\d\d\d",
    ),
    "flipped byte": (
        lambda folder: flip(folder / "model.safetensors"),
        "model.safetensors is damaged: its SHA-256 differs",
    ),
    "flipped byte of the step": (
        lambda folder: flip(folder / "state.json"),
        "state.json is damaged: its SHA-256 differs",
    ),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), "it cannot be read: .+"),
    "deleted optimizer": (
        lambda folder: (folder / "model.optimizer.safetensors").unlink(),
        "model.optimizer.safetensors is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_skipped(driver, interrupted, whole, kind):
    damage, reason = DAMAGE[kind]
    damage(interrupted / "checkpoints" / "step-000004")
    printed = run(driver, "sft", interrupted, *SFT, "--resume", "auto")
    bad, good = (interrupted / "checkpoints" / f"step-00000{step}" for step in (4, 2))
    assert re.fullmatch(f"warning: {re.escape(str(bad))} is skipped: {reason}", line(printed, "warning"))
    assert f"sft: goes on from {good}, 2 of 5 steps are done" in printed
    same(interrupted, whole["sft"][0])


def test_if_every_checkpoint_is_damaged_nothing_is_removed(driver, interrupted):
    for folder in sft.checkpoints(interrupted):
        flip(folder / "model.safetensors")
    files = sorted(interrupted.rglob("*"))
    printed = run(driver, "sft", interrupted, *SFT, "--resume", "auto", codes=[2])
    wanted = f"error: no checkpoint in {interrupted} is complete; without --resume the run starts anew"
    assert line(printed, "error") == wanted
    assert sorted(interrupted.rglob("*")) == files
    assert len(rows(interrupted / "metrics.jsonl")) == 4


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MB, room for one checkpoint of the toy but not for two and the model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(driver, disk, whole):
    out = disk / "sft"
    printed = run(driver, "sft", out, *SFT, ranks=2, codes=[2, 2])
    last = out / "checkpoints" / "step-000002"
    error = line(printed, "error")
    assert error.startswith(f"error: cannot save a checkpoint in {out}: ") and "No space left" in error
    assert error.endswith(f"; the last complete checkpoint is {last} (--resume auto)")
    assert sft.checkpoints(out) == [last] and sft.damage(last) is None
    assert list((out / "checkpoints").iterdir()) == [last]
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    run(driver, "sft", out, *SFT, "--resume", "auto", ranks=2, codes=[0, 0])
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_full_disk_under_the_metrics_ends_the_run_in_one_line(driver, disk, whole):
    run(driver, "sft", disk / "sft", *SFT, at=["sft.update", 4, "kill"], codes=[-9])
    fill = f"truncate -s 4096 {disk}/sft/metrics.jsonl; cat /dev/zero > {disk}/filler 2> /dev/null; true"
    at = ["sft.update", 1, fill]  # the next row needs a new page, and there is none
    printed = run(driver, "sft", disk / "sft", *SFT, "--resume", "auto", at=at, codes=[2])
    wanted = f"error: cannot write metrics.jsonl in {disk}/sft: No space left on device; the last complete"
    assert line(printed, "error").startswith(wanted)
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    run(driver, "sft", disk / "sft", *SFT, "--resume", "auto")
    same(disk / "sft", whole["sft"][0])


def test_a_read_only_folder_is_refused_before_anything_is_computed(driver, disk):
    (disk / "sft").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    start(driver, "sft", disk.parent / "log", "--out", disk / "sft", *SFT)
    codes, printed = wait(driver, disk.parent / "log")
    assert codes == [2] and f"error: cannot write to {disk}/sft" in printed


def test_a_file_that_cannot_grow_ends_the_run_with_the_last_checkpoint_intact(driver, interrupted, whole):
    """The same as a full disk, where nobody may mount one: no file may have more than 500,000 bytes."""
    printed = run(driver, "sft", interrupted, *SFT, "--resume", "auto", most=400_000, codes=[2])
    last = interrupted / "checkpoints" / "step-000004"
    assert f"error: cannot save a checkpoint in {interrupted}: " in printed
    assert f"the last complete checkpoint is {last} (--resume auto)" in printed
    assert sft.damage(last) is None and not list(interrupted.rglob(".tmp-*"))
    run(driver, "sft", interrupted, *SFT, "--resume", "auto")
    same(interrupted, whole["sft"][0])


@pytest.mark.parametrize("chapter", ["sft", "ma_ppo"])
def test_a_second_run_in_a_folder_is_refused_and_all_its_ranks_stop(driver, stages, tmp_path, chapter):
    (flags, inside), out = chapters(stages)[chapter], tmp_path / "run"
    sft.lock(sft.make_folder(out / inside))
    for ranks in (1, 2):
        printed = run(driver, chapter, out, *flags, ranks=ranks, codes=[2] * ranks)
        wanted = f"error: another run, pid {os.getpid()}, writes to {(out / inside).resolve()}"
        assert line(printed, "error") == wanted
    sft._claimed.pop((out / inside).resolve()).close()
    run(driver, chapter, out, *flags)


# Settings


def test_changed_settings_are_refused_by_name_unless_overridden(driver, interrupted):
    changed = ["--steps", 6, "--lr", 0.1, "--seed", 0, "--resume", "auto"]
    printed = run(driver, "sft", interrupted, *changed, codes=[2])
    last = interrupted / "checkpoints" / "step-000004"
    wanted = f"error: {last} has other settings: --steps was 5, is 6; --lr was 0.004, is 0.1"
    assert line(printed, "error") == f"{wanted} (--override goes on with the new)"
    assert len(rows(interrupted / "metrics.jsonl")) == 4
    run(driver, "sft", interrupted, *changed, "--override")
    assert [row["step"] for row in rows(interrupted / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_settings_that_cannot_change_the_result_may_change(driver, interrupted, whole):
    free = ["--save_every", 1, "--keep", 1, "--max_skipped", 9, "--device", "cpu", "--micro_batch_size", 16]
    run(driver, "sft", interrupted, *SFT, *free, "--resume", "auto")
    assert [path.name for path in sft.checkpoints(interrupted)] == ["step-000005"]
    same(interrupted, whole["sft"][0])


def test_a_finished_run_is_not_trained_again_but_can_be_trained_on(driver, stages, tmp_path):
    (flags, inside), out = chapters(stages)["ma_ppo"], tmp_path / "run"
    run(driver, "ma_ppo", out, *flags)
    before = {path: path.stat().st_mtime_ns for path in (out / inside).rglob("*") if path.name != "run.lock"}
    assert f"{out / inside} is already finished" in run(driver, "ma_ppo", out, *flags, "--resume", "auto")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    more = [*flags, "--steps", 6, "--resume", "auto"]
    printed = run(driver, "ma_ppo", out, *more, codes=[2])
    wanted = f"error: {out / inside} is finished, with other settings: --steps was 4, is 6"
    assert line(printed, "error") == f"{wanted} (--override trains on)"
    printed = run(driver, "ma_ppo", out, *more, "--override")
    assert "fixed: goes on from" in printed and "4 of 6 steps are done" in printed
    assert [row["step"] for row in rows(out / inside / "metrics.jsonl")] == list(range(6))


def test_without_resume_a_run_starts_anew_and_says_so(driver, interrupted, whole):
    printed = run(driver, "sft", interrupted, *SFT)
    assert f"starting anew: 2 checkpoints in {interrupted / 'checkpoints'} are removed" in printed
    same(interrupted, whole["sft"][0])


@pytest.mark.parametrize("flags", ["--resume yes", "--keep 0", "--save_every -1", "--max_skipped 0"])
def test_impossible_settings_are_refused(capsys, flags):
    with pytest.raises(SystemExit) as error:
        sft.parse(sft.Config, "sft", flags.split())
    assert error.value.code == 2 and f"error: {flags.split()[0]} must be" in capsys.readouterr().err


# One checkpoint


def small_run(out, model=None, **settings):
    """A run of four steps of a model, by default a small linear one."""
    model = model or torch.nn.Linear(2, 2)
    cfg = sft.Config(**{"out": str(out), "steps": 4} | settings)
    optimizer = torch.optim.AdamW(model.parameters(), **sft.ADAM)
    return sft.Run(cfg, out, "small", {"model": model}, {"model": optimizer})


def test_the_newest_checkpoints_are_kept(tmp_path):
    list(small_run(tmp_path, save_every=1, keep=3))
    assert [path.name for path in sft.checkpoints(tmp_path)] == [f"step-00000{i}" for i in (2, 3, 4)]
    list(small_run(tmp_path, save_every=0))
    assert [path.name for path in sft.checkpoints(tmp_path)] == ["step-000004"]


def test_a_checkpoint_holds_what_its_manifest_says(tmp_path):
    list(small_run(tmp_path))
    folder = newest(tmp_path)
    names = {path.name for path in folder.iterdir()}
    files = {"model.safetensors", "model.optimizer.safetensors", "generators.safetensors", "state.json"}
    assert names == files | {"manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == files
    for name, (size, digest) in manifest.items():
        printed = subprocess.run(
            ["sha256sum", folder / name], capture_output=True, text=True, check=True
        ).stdout
        assert (folder / name).stat().st_size == size and printed.split()[0] == digest


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    size = {"vocab_size": 9, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    config = LlamaConfig(**size, num_attention_heads=1, tie_word_embeddings=True)
    model, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    list(small_run(tmp_path, model))
    saved = load_file(newest(tmp_path) / "model.safetensors")
    assert "model.embed_tokens.weight" in saved and "lm_head.weight" not in saved
    small_run(tmp_path, other, resume="auto")
    assert other.lm_head.weight is other.model.embed_tokens.weight
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_global_generators_go_on_too(tmp_path):
    list(small_run(tmp_path))
    wanted = torch.rand(3)
    torch.manual_seed(1)
    small_run(tmp_path, resume="auto")
    assert torch.equal(torch.rand(3), wanted)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, capsys):
    list(small_run(tmp_path))
    capsys.readouterr()
    for model in (torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        with pytest.raises(SystemExit):
            small_run(tmp_path, model, resume="auto", override=True)
        error = capsys.readouterr().err.split("\r")[-1].lstrip("\n")
        assert (
            error.startswith(f"error: {newest(tmp_path)} does not fit the model: ") and error.count("\n") == 1
        )


def test_skipped_updates_are_counted_over_interruptions_and_end_the_run(tmp_path, capsys):
    run = small_run(tmp_path, save_every=1, max_skipped=3)
    losses = [math.nan, 1.0, math.nan, math.inf]
    for step in run:
        run.log({"step": step, "policy_loss": losses[step], "value_loss": 0.0}, "value_loss")
    again = small_run(tmp_path, steps=6, resume="auto", override=True, max_skipped=3)
    assert again.counters == {"skipped": 3, "in_a_row": 2}
    with pytest.raises(SystemExit) as error:
        again.log({"step": 4, "policy_loss": 0.0, "value_loss": math.nan}, "policy_loss", [[1, 2], [3]])
    assert error.value.code == 2
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad == {"step": 4, "batch_of_each_rank": [[[1, 2], [3]]]}
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is no longer finite: lower --lr" in printed and "3 steps in a row" in printed
    assert str(newest(tmp_path)) in printed
    steps = [json.loads(x, parse_constant=pytest.fail) for x in (tmp_path / "metrics.jsonl").open()]
    assert [row["policy_loss"] for row in steps] == [None, 1.0, None, None, 0.0]


def test_json_files_are_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    sft.write_json(path, {"a": 1})
    monkeypatch.setattr(Path, "rename", lambda *ignored: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        sft.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
