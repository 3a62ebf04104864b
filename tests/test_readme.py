"""Every command that can be pasted, from a page or a chapter's first lines, is understood."""

import ast
import re
import shlex

import pytest
from helpers import ROOT

import eval as chapter5
import ma_ppo
import reward
import segment
import sft

CHAPTERS = {"sft": sft, "reward": reward, "segment": segment, "ma_ppo": ma_ppo, "eval": chapter5}
PAGES = ["README.md", "results/README.md"]
COMMAND = re.compile(r"(?:python|torchrun) ([^#|;&\n]*?)\b(\w+)\.py\b([^#|;&\n]*)")


def listings(text):
    """The code blocks of a Markdown page, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ")


def commands():
    """(where, what is before the script, its chapter, its flags) of every command."""
    found = []
    sources = {page: listings((ROOT / page).read_text()) for page in PAGES}
    for name in CHAPTERS:
        sources[name] = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text()))
    for where, text in sources.items():
        text = re.sub(r"\$\{?\w+\}?", "0", text)  # variables of the shell
        for before, chapter, flags in COMMAND.findall(text):
            if chapter in CHAPTERS:
                found.append((where, before, chapter, shlex.split(flags)))
    return found


@pytest.mark.parametrize(("where", "before", "chapter", "flags"), commands())
def test_every_command_is_understood(where, before, chapter, flags, monkeypatch):
    if "--help" in flags:
        return
    ranks = re.search(r"--nproc_per_node[= ](\d+)", before)
    monkeypatch.setenv("WORLD_SIZE", ranks[1] if ranks else "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # for --track
    if chapter == "segment":
        segment.read_arguments(flags)
    elif chapter == "eval":
        chapter5.parse(flags)
    else:
        cfg = sft.parse(CHAPTERS[chapter].Config, chapter, flags)
        assert chapter != "ma_ppo" or ma_ppo.check_arms(cfg) is None


def test_commands_are_found_on_the_front_page_and_in_every_chapter():
    found = {where for where, *_ in commands()}
    assert found >= {"README.md", *CHAPTERS}
