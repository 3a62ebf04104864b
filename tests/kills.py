"""The figures of runs that are killed, in results/README.md: python tests/kills.py

Each training chapter runs 12 steps in one go; then 40 times with kill -9, and to its end with
--resume auto: 20 times at any moment, start-up included, and 5 times each at a random moment of
the rollout (in SFT and RM of the encoding of a batch), of an update, of writing a checkpoint, and
of writing metrics. Weights, optimizer states and samples must be equal bit by bit, and so must
the metrics, timings aside.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import runs

import sft

# How often at each kind of moment, and the function that it is in; None: anywhere.
MOMENTS = {
    "any moment": (20, None),
    "rollout": (5, "ma_ppo.sample"),
    "update": (5, "sft.update"),
    "checkpoint": (5, "sft.save_checkpoint"),
    "metrics": (5, "sft.append_rows"),
}


def main():
    """Print a row for each chapter: kills of each kind, steps computed again, runs that differ."""
    head = ["chapter", *MOMENTS, "steps computed again", "runs that differ"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    driver = runs.Driver()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        driver.run("sft", folder / "sft", "--steps", 2)
        driver.run("reward", folder / "reward", "--steps", 2, "--sft", folder / "sft")
        stages = ["--sft", folder / "sft", "--reward_model", folder / "reward"]
        for chapter, short in runs.short_runs(stages).items():
            flags = [*short.flags, "--steps", 12]
            bench(driver, chapter, folder / f"{chapter}12", flags, short.inside)
    driver.close()


def bench(driver, chapter, folder, flags, inside):
    """Kill one chapter's runs, finish them, compare them."""
    folder.mkdir()
    began = time.perf_counter()
    driver.run(chapter, folder / "whole", *flags)
    seconds = time.perf_counter() - began
    rng = random.Random(chapter)
    again = different = 0
    for moment, (count, function) in MOMENTS.items():
        if moment == "rollout" and chapter != "ma_ppo":
            function = "sft.encode"
        for number in range(count):
            out = folder / f"{moment} {number}"
            kill_once(driver, chapter, out, flags, function, seconds, rng)
            done = len(runs.rows(out / inside / "metrics.jsonl"))
            saved = sft.checkpoints(out / inside)
            again += done - int(saved[-1].name.removeprefix("step-")) if saved else done
            driver.run(chapter, out, *flags, "--resume", "auto")
            try:
                runs.assert_same(out / inside, folder / "whole" / inside)
            except AssertionError as error:
                different += 1
                print(f"{out}: {error}", file=sys.stderr)
    counts = [count for count, _ in MOMENTS.values()]
    print(f"| {' | '.join(map(str, [chapter, *counts, again, different]))} |", flush=True)


def kill_once(driver, chapter, out, flags, function, seconds, rng):
    """Kill a run within a call of `function`, or anywhere in its `seconds`; not after its end."""
    codes = [0]
    while codes == [0]:  # it had ended before it was killed
        shutil.rmtree(out, ignore_errors=True)
        if function:
            at = runs.kill_within(function, rng.randint(1, 6), 0.05 * rng.random() ** 3)
            driver.start(chapter, out, *flags, at=at)
        else:
            driver.start(chapter, out, *flags)
            time.sleep(rng.uniform(0, seconds))
            driver.kill(0)
        codes = driver.wait()
    assert codes == [-signal.SIGKILL], driver.printed()


if __name__ == "__main__":
    main()
