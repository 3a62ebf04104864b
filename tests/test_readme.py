"""The commands in the READMEs: all are understood, and those that take seconds run."""

import glob
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import bench
import pytest

import eval as chapter5
import ma_ppo
import reward
import segment
import sft

ROOT = Path(__file__).parent.parent
RUNS = re.compile(r"\b(python|torchrun)\b.* (sft|reward|segment|ma_ppo|eval)\.py\b")
CONFIGS = {"sft": sft.Config, "reward": reward.Config, "ma_ppo": ma_ppo.Config}


def listings(text):
    """The code blocks of a Markdown text that have no language: commands and drawings."""
    blocks, lines, language = [], None, ""
    for line in text.splitlines():
        if not line.startswith("```"):
            if lines is not None:
                lines.append(line)
        elif lines is None:
            lines, language = [], line[3:]
        else:
            blocks += [] if language else ["\n".join(lines)]
            lines = None
    return blocks


def commands():
    """Every command that runs a chapter: (file, words)."""
    found = []
    for name in ("README.md", "results/README.md"):
        variables = {"k": "0"}
        for block in listings((ROOT / name).read_text()):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                variables.update(re.findall(r'^(\w+)="(.*)"$', line))
                for command in re.split(r"&&|; (?:do|done)|; ", line.split("  #")[0]):
                    for variable, value in variables.items():
                        command = command.replace(f"${variable}", value)
                    if RUNS.search(command):
                        found.append((name, shlex.split(command)))
    return found


COMMANDS = commands()


def split(words):
    """(chapter, its flags, number of ranks) of a command."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    ranks = 1
    for word in words[:place]:
        if word.startswith(("--nproc_per_node=", "--nnodes=")):
            ranks *= int(word.split("=")[1])
    return words[place].removesuffix(".py"), words[place + 1 :], ranks


def test_the_commands_are_found():
    assert len(COMMANDS) > 40
    assert {split(words)[0] for _, words in COMMANDS} == {*CONFIGS, "segment", "eval"}


@pytest.mark.parametrize(
    ("name", "words"), COMMANDS, ids=[f"{i} {' '.join(c[1])[:60]}" for i, c in enumerate(COMMANDS)]
)
def test_every_command_is_understood(name, words, monkeypatch):
    chapter, flags, ranks = split(words)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if "--help" in flags:
        return
    if chapter in CONFIGS:
        sft.parse(CONFIGS[chapter], chapter, flags)
    elif chapter == "segment":
        segment.read_arguments(flags)
    else:
        monkeypatch.setenv("WORLD_SIZE", "1")
        chapter5.parse(flags)


QUICK = ("seeds", "curves", "frontier", "heatmap")
READY = [words for _, words in COMMANDS if split(words)[0] in ("segment", "eval")]
READY = [words for words in READY if split(words)[0] == "segment" or split(words)[1][0] in QUICK]
READY = [words for words in READY if "runs/seed" not in " ".join(words)]  # five runs of minutes


@pytest.fixture(scope="module")
def place(toy, tmp_path_factory):
    """A folder like the repository's root in which the default job has run."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(toy.folder, folder / "runs" / "toy")
    (folder / "results").symlink_to(ROOT / "results")
    (folder / "figures").mkdir()
    return folder


@pytest.mark.parametrize("words", READY, ids=[" ".join(words)[:70] for words in READY])
def test_a_command_that_takes_seconds_runs_as_printed(place, words, monkeypatch, capsys):
    monkeypatch.chdir(place)
    chapter, flags, _ = split(words)
    expanded = []
    for flag in flags:  # as a shell does it
        expanded += sorted(glob.glob(flag)) if re.search(r"[*?\[]", flag) else [flag]
    (segment if chapter == "segment" else chapter5).main(expanded)
    assert capsys.readouterr().out.strip() or "--png" in flags
    if "--png" in flags:
        assert os.path.getsize(flags[flags.index("--png") + 1]) > 1000


def test_the_tables_of_speed_are_those_of_the_measured_rows():
    text = (ROOT / "results" / "README.md").read_text()
    parts = {}
    for line in (ROOT / "results" / "bench.jsonl").read_text().splitlines():
        row = json.loads(line)
        parts.setdefault(row.pop("part"), []).append(row)
    assert len(parts) == 7
    for part, rows in parts.items():
        assert f"\n\n{bench.table(rows)}\n\n" in text, part
    front = " ".join((ROOT / "README.md").read_text().split())
    alone, both = parts["trl"], parts["trl, both keep memory"]
    said = "a step takes {:.2f} (toy) and {:.2f} (10 M) of TRL 1.8's time"
    assert said.format(*(row["ours / TRL"] for row in alone)) in front
    said = "{:.2f} and {:.2f} if TRL keeps freed memory as we do"
    assert said.format(*(row["ours / TRL"] for row in both)) in front
    update = next(row["update / matmul"] for row in parts["phases"] if row["size"] == "135m")
    assert f"updates at 135 M run at {100 * update:.0f} % of bare matmuls" in front
