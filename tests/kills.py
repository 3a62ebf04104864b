"""The README's figures of runs that are killed: python tests/kills.py

Each training chapter runs 12 steps in one go; then 40 times with kill -9, and to its end with --resume auto:
20 times at any moment, start-up included, and 5 times each at a random moment of the rollout (in SFT and RM
of the encoding of a batch), of an update, of writing a checkpoint, and of writing metrics. Weights, optimizer
states and samples must be equal bit by bit, and so must the metrics, timings aside.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_resume as t

KILLS = {"any moment": 20, "rollout": 5, "update": 5, "checkpoint": 5, "metrics": 5}
# The function that does it; a batch of SFT or the RM is encoded where PPO has its rollout.
WITHIN = {
    "rollout": "sft.encode",
    "update": "sft.update",
    "checkpoint": "sft.Run.save",
    "metrics": "sft.append_rows",
}


def main():
    """Print a row for each chapter: kills at each kind of moment, steps computed again, runs that differ."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    head = ["chapter", *KILLS, "steps computed again", "runs that differ"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
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
    """Kill one chapter's runs, finish them, compare them."""
    folder.mkdir()
    began = time.perf_counter()
    t.run(driver, chapter, folder / "whole", *flags)
    seconds, rng = time.perf_counter() - began, random.Random(chapter)
    again = different = 0
    for i, moment in enumerate(moment for moment, count in KILLS.items() for _ in range(count)):
        codes, out = [0], folder / str(i)
        while codes == [0]:  # it had ended before it was killed
            shutil.rmtree(out, ignore_errors=True)
            at = None
            if moment in WITHIN:
                function = "ma_ppo.sample" if (chapter, moment) == ("ma_ppo", "rollout") else WITHIN[moment]
                at = [function, rng.randint(1, 6), 0.05 * rng.random() ** 3]
            (pid,) = t.start(driver, chapter, out, *flags, at=at)
            if not at:
                time.sleep(rng.uniform(0, seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            codes, printed = t.wait(driver, out)
        assert codes == [-signal.SIGKILL], printed
        done = len(t.rows(out / inside / "metrics.jsonl"))
        saved = t.sft.checkpoints(out / inside)
        again += done - int(saved[-1].name[5:]) if saved else done
        t.run(driver, chapter, out, *flags, "--resume", "auto")
        try:
            t.same(out / inside, folder / "whole" / inside)
        except AssertionError as error:
            different += 1
            print(f"{out}: {error}", file=sys.stderr)
    print(f"| {' | '.join(map(str, [chapter, *KILLS.values(), again, different]))} |", flush=True)


if __name__ == "__main__":
    main()
