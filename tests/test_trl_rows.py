"""Rows in the forms of TRL's own data sets go through all three training chapters."""

import json

import pytest
from helpers import metrics

import ma_ppo

TOPICS = ["dogs", "cats", "trains", "books", "plants", "songs", "games", "maps", "boats", "clouds"]


def ultrafeedback(i):
    """As trl-lib/ultrafeedback_binarized: two dialogues, and their scores."""
    asked = {"role": "user", "content": f"Tell me {i} things about {TOPICS[i % 10]}."}
    good = {"role": "assistant", "content": f"Here are {i}: they are kind, and loud."}
    bad = {"role": "assistant", "content": "No."}
    return {
        "chosen": [asked, good],
        "rejected": [asked, bad],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }


def tldr(i):
    """As trl-lib/tldr: a post that ends in TL;DR:, and its summary."""
    post = (
        f"SUBREDDIT: r/{TOPICS[i % 10]}\n\nTITLE: number {i}\n\nPOST: I lost {i} of them.\n\nTL;DR:"
    )
    return {"prompt": post, "completion": f" Lost {i}."}


def tldr_preference(i):
    """As trl-lib/tldr-preference: the same with two summaries."""
    row = tldr(i)
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " Something."}


@pytest.mark.parametrize("forms", [[ultrafeedback], [tldr, tldr_preference]], ids=["chat", "tldr"])
def test_one_command_trains_all_chapters_on_them(tmp_path, quick_runs, forms):
    files = []
    for number, form in enumerate(forms):
        path = tmp_path / f"{form.__name__}.jsonl"
        rows = [form(i) for i in range(60 * number, 60 * number + 60)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(path))
    out = tmp_path / "run"
    flags = ["--task", "plain", "--data", *files, "--steps", "2", "--batch_size", "4"]
    small = ["--max_prompt", "64", "--max_response", "12", "--epochs", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ma_ppo.sft.SMALL, "sft", "--steps 2 --batch_size 4")
        patch.setitem(ma_ppo.sft.SMALL, "reward", "--steps 2 --batch_size 4")
        ma_ppo.main([*flags, *small, "--arms", "token", "fixed", "--out", str(out)])
    for stage in ("sft", "reward", "token", "fixed"):
        assert len(metrics(out / stage)) == 2
