"""All chapters together: one process and several, killed and resumed, split and whole.

Python and PyTorch take seconds to start, and these runs hardly longer. So one server imports
everything once, and every process of every run is forked from it. Two ranks find each other as
under torchrun, but by a file.
"""

import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, TORCHRUN, metrics, python, result, samples, settings, succeeds
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import eval as chapter5
import ma_ppo
import reward
import sft

ARMS = ["token", "fixed", "rloo"]
FOLDERS = ["sft", "reward", *ARMS]
# Micro-batches of one process are the shares of two, and rloo's only prompt belongs to both.
SMALL = "--save_every 2 --batch_size 8 --micro_batch_size 4 --steps"
FLAGS = f"{SMALL} 5 --rloo_k 8 --max_prompt 16 --max_response 16 --arms".split()
RESUME = ["--resume", "auto"]


# Running


@cache
def short_rows(*_):
    """300 posts of the toy with summaries of one sentence, which end within 16 tokens."""
    rows = [sft.toy_row(i) for i in range(300)]
    return [row | {"response": row["response"].split(".")[0] + "."} for row in rows]


def draw(folders, cfg):
    """`ma_ppo.draw_curves`, but within this process."""
    if sft.rank() == 0:
        chapter5.main(["curves", "--runs", *map(str, folders), "--png", f"{cfg.out}/curves.png"])


def train(flags, watched=(), moment=0):
    """The whole of ma_ppo.py on few posts.

    watched: files, of which all calls in them are counted, and in the end left in calls.json.
    moment: kill -9 ends this process at the call with this number.
    """
    sft.load_rows, ma_ppo.draw_curves, calls = short_rows, draw, Counter()
    sft.TASK_FLAGS["toy"] = {"sft": f"{SMALL} 30", "reward": f"{SMALL} 4"}

    def look(frame, event, _):
        file = os.path.basename(frame.f_code.co_filename)
        if file in watched and event.endswith("call"):  # a function in Python, or one in C
            calls[file] += 1
            if calls[file] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look if watched else None)
    ma_ppo.main(flags)
    sys.setprofile(None)
    Path(ma_ppo.parse(flags).out, "calls.json").write_text(json.dumps(calls))


def be_rank(rank, ranks, meet, function, args):
    """Call a function as one of several ranks."""
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=ranks)
    function(*args)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_ranks(ranks, function, *args, last=()):
    """Call a function on each of several ranks, on the last with more arguments -> exit codes"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_end_to_end"])
    processes = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # of the server
        for rank in range(ranks):
            mine = args + last if rank == ranks - 1 else args
            job = (rank, ranks, f"{folder}/meet", function, mine)
            processes.append(context.Process(target=be_rank, args=job))
            processes[rank].start()
        for process in processes:
            process.join()
    return [process.exitcode for process in processes]


def run(out, *flags, arms=ARMS, ranks=1):
    """ma_ppo.py from nothing to a picture.  -> its folder"""
    codes = on_ranks(ranks, train, [*FLAGS, *arms, "--out", str(out), *flags])
    assert codes == [0] * ranks
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run on one process. Tests only read it."""
    return run(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the same run on two processes."""
    return run(tmp_path_factory.mktemp("two"), ranks=2)


# Comparing


def timeless(folder):
    """The rows of metrics.jsonl without times, and without what is null."""
    rows = []
    for row in metrics(folder):
        rows.append({k: x for k, x in row.items() if "second" not in k and x is not None})
    return rows


def learned(folder):
    """Weights and optimizers' moments of the newest checkpoint, and the saved models' weights."""
    newest, file = sft.checkpoints(folder)[-1], io.BytesIO()
    dcp_to_torch_save(newest, file)
    file.seek(0)
    found = {newest.name: torch.load(file)}
    for part in found[newest.name].values():
        part["optim_state_dict"].pop("param_groups")  # names and rates
    for path in folder.rglob("*.safetensors"):
        found[str(path.relative_to(folder))] = load_file(path)
    return found


def told(folder):
    """What samples.jsonl says of the first step, and of the last."""
    rows = [[row[key] for key in ("step", "prompt", "tokens", "seg")] for row in samples(folder)]
    return rows[:4] + rows[-4:]


def assert_same(out, wanted, tolerance=0.0, folders=FOLDERS):
    """Logs, weights and optimizers of two runs are equal, or within a tolerance."""
    rough = 10 * tolerance  # of metrics: KL is the small difference of sums
    for name in folders:
        found, other = out / name, wanted / name
        near = [pytest.approx(row, rel=rough, abs=rough) for row in timeless(other)]
        assert timeless(found) == near and (found / "run.json").exists()
        torch.testing.assert_close(learned(found), learned(other), rtol=0, atol=tolerance)
        assert name not in ARMS or told(found) == told(other)


# One command


def test_one_command_goes_from_nothing_to_models_samples_and_a_picture(one):
    for name in ("sft", "reward"):
        losses = [row["loss"] for row in metrics(one / name)]
        assert 0 < losses[-1] < losses[0]
    assert result(one / "sft")["test_loss"] < 5 and 0 <= result(one / "reward")["accuracy"] <= 1
    for arm in ARMS:
        rows = metrics(one / arm)
        assert [row["step"] for row in rows] == list(range(5))
        assert (settings(one / arm)["arm"], settings(one / arm)["ranks"]) == (arm, 1)
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and abs(rows[-1]["kl"]) > 1e-4
        assert any(0 < row["eos_rate"] < 1 for row in rows)  # or the scores would all be equal
        assert all(abs(row["ratio_first"] - 1) < 1e-5 for row in rows)
        assert [row["step"] for row in samples(one / arm)] == [0] * 4 + [4] * 4
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_finished_run_nothing_is_made_again(one):
    def times():
        paths = [path for name in FOLDERS for path in (one / name).rglob("*")]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    run(one, *RESUME)
    assert times() == before


def test_the_saved_policy_is_any_hugging_face_model_and_writes_what_ours_writes(one, monkeypatch):
    monkeypatch.setattr(sft, "load_rows", short_rows)
    folder = one / "fixed" / "model"
    model, tokenizer = sft.load_causal_lm(folder)
    cfg = ma_ppo.Config(max_response=16, max_prompt=16, top_k=1)  # greedy
    prompts = [row["prompt"] for row in ma_ppo.load_prompts(tokenizer, cfg)[:4]]
    ours = ma_ppo.generate(model, prompts, torch.full((4, 16), 0.5), tokenizer, cfg)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == tokenizer.ends[0]
    for prompt, response in zip(prompts, ours, strict=True):
        whole = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)
        assert whole[0].tolist() == prompt + response


# Two ranks


def test_two_ranks_are_one_process(one, two):
    assert settings(two / "fixed")["ranks"] == 2
    assert_same(two, one, tolerance=1e-6)


def check_ranks():
    """What two ranks share, and decide together; on each of them."""
    rank = sft.rank()
    assert sft.my_share([0, 1, 2, 3]) == [[0, 1], [2, 3]][rank]
    assert sft.gather(sft.my_share("abcd")) == [*"abcd"]
    assert sft.gather(range(rank)) == [0]  # of shares that differ in length
    assert sft.all_sum(torch.tensor([rank, 2**60])).tolist() == [1, 2**61]
    torch.manual_seed(rank)
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(2)])
    sft.broadcast_parameters(model)
    before = [p.item() for p in model.parameters()]
    assert sft.gather(before) == before * 2
    # Each rank uses another parameter, twice; then one has a loss that is not finite.
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.skipped = 0
    losses = (model[rank].weight.sum() for _ in "ab")
    assert sft.update(model, optimizer, losses, 1.0, 9.0) == pytest.approx(2 * sum(before))
    broken = (model[rank].weight.sum() * (torch.nan if rank else 1) for _ in "a")
    assert math.isnan(sft.update(model, optimizer, broken, 1.0))
    assert [p.item() for p in model.parameters()] == pytest.approx([x - 2 for x in before])


def test_what_ranks_share_and_decide_together():
    assert on_ranks(2, check_ranks) == [0, 0]


# Kills

WRITER = "filesystem.py"  # of torch.distributed.checkpoint


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """{file: number of calls in it} in a run that is not killed."""
    flags = [*FLAGS, *ARMS, "--out", str(tmp_path_factory.mktemp("calls"))]
    assert on_ranks(1, train, flags, ("ma_ppo.py", WRITER)) == [0]
    return json.loads(Path(flags[-1], "calls.json").read_text())


def kill(out, file, moment, *flags, ranks=1):
    """Run until kill -9 ends the last rank at that call in a file."""
    at = ([file], int(moment))
    codes = on_ranks(ranks, train, [*FLAGS, *ARMS, "--out", str(out), *flags], last=at)
    assert codes == [1] * (ranks - 1) + [-signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_run_that_is_killed_twice_ends_as_if_never(one, two, calls, tmp_path, before, after):
    """Early, at random, and in the second of three arms. On as many ranks to the bit."""
    rng = random.Random(f"{before} {after}")
    kill(tmp_path, WRITER, rng.uniform(0.05, 0.2) * calls[WRITER], ranks=before)
    assert list(tmp_path.glob("*/checkpoints/unfinished"))  # it was writing a checkpoint
    assert not (tmp_path / "token" / "config.json").exists()
    moment = {1: 0.55, 2: 0.45}[before] * calls["ma_ppo.py"]  # one of two ranks makes fewer calls
    kill(tmp_path, "ma_ppo.py", moment, *RESUME, ranks=before)
    assert metrics(tmp_path / "fixed") and not (tmp_path / "fixed" / "run.json").exists()
    for name in sft.LOGS:
        with (tmp_path / "fixed" / name).open("a") as file:
            file.write('{"step": 4, "of": "another"}\n{"step": 4, "rm_sc')
    run(tmp_path, *RESUME, ranks=after)
    assert_same(tmp_path, two if before == after == 2 else one, 0 if before == after else 1e-6)


# Models that are split among the ranks, and bf16


@pytest.mark.slow
def test_split_models_learn_what_whole_ones_do_and_go_on_as_such(one, tmp_path):
    run(tmp_path, "--steps", "4", "--shard", arms=["fixed"], ranks=2)
    assert settings(tmp_path / "fixed")["shard"]
    run(tmp_path, *RESUME, arms=["fixed"])  # on one process, to step 5
    assert_same(tmp_path, one, 1e-5, ["sft", "reward", "fixed"])


@pytest.mark.slow
def test_split_models_in_bf16_that_recompute_activations_learn_nearly_the_same(one, tmp_path):
    bf16 = ["--precision", "bf16", "--gradient_checkpointing"]
    run(tmp_path, *bf16, "--shard", arms=["fixed"], ranks=2)
    found, wanted = ([row["loss"] for row in metrics(x / "sft")] for x in (tmp_path, one))
    assert pytest.approx(wanted, abs=1e-3) != found == pytest.approx(wanted, abs=0.1)
    ratios = [row["ratio_first"] for row in metrics(tmp_path / "fixed")]
    assert ratios == pytest.approx([1] * 5, abs=0.1)
    assert load_file(tmp_path / "sft/model.safetensors")["lm_head.weight"].dtype == torch.float32


# Other tasks, and the scripts as they are


@pytest.mark.slow
def test_programs_are_rewarded_by_their_unit_tests_alone(toy_code):
    assert not (toy_code.folder / "reward").exists()
    for arm in ("token", "fixed", "ast"):
        (row,) = metrics(toy_code.folder / arm)
        assert row["gold_score"] is None and 0 <= row["pass_rate"] <= 1
        for sample in samples(toy_code.folder / arm):
            try:
                compile(sample["response"], "program", "exec")
                ended = sample["tokens"][-1] == 1  # <eos>
                assert ended == (sample["rm_score"] > -0.7)
            except SyntaxError:
                assert sample["rm_score"] == -1


def make_published_models(folder):
    """A ChatML model in bf16 with tied weights whose PAD is its EOS, and an RM that scores -10."""
    words = "is it not 1 2 3 4 5 6 7 8 9? yes. no, it is not.\nuser assistant"
    tokenizer = sft.small_tokenizer("plain", [words])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    turn = "<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    begin = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = "{% for turn in messages %}" + turn + "{% endfor %}" + begin
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size, **ends)
    sft.save_models([LlamaForCausalLM(config).bfloat16(), tokenizer], folder / "base")
    config.num_labels = 1
    rm = LlamaForSequenceClassification(config).eval()
    end = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_end|>")]])
    state = rm.model(end).last_hidden_state[0, 0].detach()  # nearly the same after every text
    rm.score.weight.data[0] = -10 * state / state.square().sum()
    sft.save_models([rm.bfloat16(), tokenizer], folder / "rm")


@pytest.mark.slow
def test_a_chat_model_goes_through_all_chapters_on_rows_of_messages(tmp_path, quick_runs, capsys):
    def said(role, text):
        return [{"role": role, "content": text}]

    yes, no = said("assistant", "yes."), said("assistant", "no, it is not.")
    rows = [{"messages": said("user", f"is it not {i}?") + yes} for i in range(100)]
    for i in range(100):
        rows.append({"prompt": said("user", f"is it {i}?"), "chosen": yes, "rejected": no})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make_published_models(tmp_path)
    flags = f"--task plain --data {tmp_path}/rows.json --model {tmp_path}/base --chat_template"
    flags = f"{flags} --batch_size 8 --max_prompt 48 --max_response 16 --steps".split()
    stages = f"--sft {tmp_path}/sft --reward_model {tmp_path}/reward".split()
    sft.main([*flags, "40", "--lr", "0.01", "--out", stages[1]])
    reward.main([*flags, "10", "--lr", "0.01", *stages[:2], "--out", stages[3]])
    ma_ppo.main([*flags, "2", *stages, "--arms", "sentence", "--out", str(tmp_path)])
    assert result(tmp_path / "reward")["accuracy"] > 0.9
    capsys.readouterr()
    chapter5.main(["score", "--runs", str(tmp_path / "sentence"), "--prompts", "8"])
    assert "/sentence | 1 | 8 |" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sentence" / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, end)
    answers = [row["tokens"] for row in samples(tmp_path / "sentence")]
    assert sum(answer[-1] == end and end not in answer[:-1] for answer in answers) > 4


OWN = """
def known(prompts, responses, rows):
    scores = []
    for text, row in zip(responses, rows, strict=True):
        scores.append(sum(value in text for value in row["facts"].values()) - len(text) / 99)
    return scores
"""


@pytest.mark.slow
def test_a_reward_in_python_is_the_same_on_two_ranks_and_in_chapter_5(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_rows", short_rows)
    (tmp_path / "own.py").write_text(OWN)
    flags = ["--reward", f"{tmp_path}/own.py:known", "--steps", "3"]
    one = run(tmp_path / "one", *flags, arms=["fixed"])
    two = run(tmp_path / "two", *flags, arms=["fixed"], ranks=2)
    assert_same(two, one, 1e-5, ["sft", "fixed"])
    assert not (one / "reward").exists()
    assert len({row["rm_score"] for row in metrics(one / "fixed")}) == 3
    chapter5.main(["score", "--runs", str(one / "fixed"), "--prompts", "12"])
    function, facts = {}, {row["prompt"]: row["facts"] for row in short_rows()}
    exec(OWN, function)
    rows = samples(one / "fixed/score") + samples(one / "fixed")  # of chapter 5, of training
    assert {row.get("temperature") for row in rows} == {1.0, None}
    assert len([row for row in rows if "temperature" in row]) == 12
    for row in rows:
        (score,) = function["known"]([0], [row["response"]], [{"facts": facts[row["prompt"]]}])
        ended = row["ended"] if "ended" in row else row["tokens"][-1] == 1
        assert row["rm_score"] == pytest.approx(score if ended else -4, abs=1e-5)


@pytest.mark.slow
def test_published_models_go_through_and_keep_their_ends(tmp_path, quick_runs, capsys):
    rows = []
    for i in range(200):
        ask, say = f"is it not {i}?", "yes." if i % 2 else "no, it is not."
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        rows.append({"messages": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make_published_models(tmp_path)
    flags = f"--task plain --data {tmp_path}/rows.json --batch_size 16 --max_prompt 48"
    flags = f"{flags} --max_response 16 --lr 0.01 --steps".split()
    base, rm = str(tmp_path / "base"), str(tmp_path / "rm")
    sft.main([*flags, "60", "--model", base, "--out", f"{tmp_path}/sft"])
    said = capsys.readouterr().out.splitlines()
    for word in ("float32", "PAD"):  # one line for each thing decided
        assert len([line for line in said if word in line and base in line]) == 1
    ppo = [
        *flags[:-3],
        "--lr",
        "1e-4",
        "--critic_lr",
        "1e-3",
        "--steps",
        "4",
        "--sft",
        f"{tmp_path}/sft",
    ]
    ppo += ["--reward_model", rm, "--arms", "fixed", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        ma_ppo.main(ppo)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    mean, lower = map(
        float, re.search(r"score (-\S+) on average: set --no_eos_score (-\S+),", line).groups()
    )
    assert "--no_eos_score -4 " in line and -12 < mean < -8 and lower < mean - 0.9
    ma_ppo.main([*ppo, "--no_eos_score", str(lower)])
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "float32" in line and rm in line]) == 1
    assert not [line for line in said if "float32" in line and base in line]
    assert all(row["eos_rate"] > 0.8 for row in metrics(tmp_path / "fixed"))
    chapter5.main(["score", "--runs", str(tmp_path / "fixed"), "--prompts", "6"])
    assert "/fixed | 1 | 6 |" in capsys.readouterr().out
    # What other code makes of the folder: the same words, and it stops where the turn ends.
    folder = str(tmp_path / "fixed/model")
    policy, tokenizer = sft.load_causal_lm(folder)
    model, theirs = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    cfg, end = ma_ppo.Config(max_response=16, top_k=1), tokenizer.ends[-1]
    for i in range(6):
        turns = rows[i]["messages"][:1]
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        written = model.generate(torch.tensor([ids]), max_new_tokens=16)[0, len(ids) :].tolist()
        (ours,) = ma_ppo.generate(policy, [ids], torch.rand(1, 16).double(), tokenizer, cfg)
        assert written == ours and ours[-1] == end == theirs.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_the_scripts_run_under_torchrun_and_end_with_one_line_where_they_cannot(toy, tmp_path):
    flags = ["--steps", 1, "--batch_size", 8, "--max_prompt", 16, "--arms", "whole"]
    printed = succeeds(*TORCHRUN, "ma_ppo.py", *flags, *toy.stages, "--out", tmp_path)
    assert printed.count("whole: 10,800 prompts") == printed.count("eval.py curves") == 1
    assert (settings(tmp_path / "whole")["ranks"], len(metrics(tmp_path / "whole"))) == (2, 1)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    refused = python("ma_ppo.py", "--steps", 0)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: --steps must be positive, got 0\n"
