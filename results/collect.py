"""Prints the runs that study.sh has made as rows of study.csv.

python results/collect.py runs/study > mine.csv
"""

import json
import sys
from pathlib import Path

COLUMNS = ["rm_score", "gold_score", "kl", "response_length", "explained_variance"]
COLUMNS += ["eos_rate", "ref_surprise"]


def short(value):
    """Four decimals; nothing where a task has no such metric."""
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


for log in sorted(Path(sys.argv[1]).glob("*/seed*/*/*/metrics.jsonl")):
    task, seed, arm = log.parts[-5:-2]
    for line in log.read_text().splitlines():
        row = json.loads(line)
        cells = [short(row.get(column)) for column in COLUMNS]
        print(task, arm, seed.removeprefix("seed"), row["step"], *cells, sep=",")
