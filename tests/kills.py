"""The README's figures of runs that are killed: python tests/kills.py

Each training chapter runs 12 steps in one go; then 20 times with kill -9 at a random moment, and to its end
with --resume auto. Weights, optimizer states and samples must be equal bit by bit, and so must the metrics,
timings aside.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_resume as t

KILLS = 20


def main():
    """Print a row for each chapter."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    print("| chapter | kills | steps computed again | runs that differ |\n|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, "-c", t.DRIVER], cwd=t.ROOT, env=environment, **pipes) as driver,
    ):
        folder = Path(folder)
        t.run(driver, "sft", folder / "sft", "--steps", 2)
        t.run(driver, "reward", folder / "reward", "--steps", 2, "--sft", folder / "sft")
        base = ["--sft", folder / "sft"]
        ppo = [*base, "--reward_model", folder / "reward", "--terminations", "fixed"]
        for chapter, flags, inside in (("sft", [], "."), ("reward", base, "."), ("ma_ppo", ppo, "fixed")):
            bench(driver, chapter, folder / f"{chapter}12", ["--steps", 12, *flags], inside)
        driver.stdin.close()


def bench(driver, chapter, folder, flags, inside):
    """Kill one chapter's run KILLS times."""
    folder.mkdir()
    began = time.perf_counter()
    t.run(driver, chapter, folder / "whole", *flags)
    seconds, rng = time.perf_counter() - began, random.Random(chapter)
    kills = again = different = 0
    while kills < KILLS:
        out = folder / str(kills)
        (pid,) = t.start(driver, chapter, out, *flags)
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(pid, signal.SIGKILL)
        codes, _ = t.wait(driver, out)
        if codes != [-signal.SIGKILL]:
            continue  # it had already ended
        kills += 1
        done = len(t.rows(out / inside / "metrics.jsonl"))
        saved = t.sft.checkpoints(out / inside)
        again += done - int(saved[-1].name[5:]) if saved else done
        t.run(driver, chapter, out, *flags, "--resume", "auto")
        try:
            t.same(out / inside, folder / "whole" / inside)
        except AssertionError as error:
            different += 1
            print(f"{out}: {error}", file=sys.stderr)
    print(f"| {chapter} | {kills} | {again} | {different} |", flush=True)


if __name__ == "__main__":
    main()
