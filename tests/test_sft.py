"""Chapter 1: the batch, the loss, the update, models, settings, runs that go on, and the toys."""

import hashlib
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from filelock import FileLock
from torch.distributed.run import get_args_parser

import ma_ppo
import reward
import sft
from sft import Config, batch_rows, cosine_lr, make_batch, sft_loss

PROMPTS = [[2, 3, 4, 5, 6], [7], [3, 3, 9]]
RESPONSES = [[4, 1], [5, 6, 7, 8, 1], [9]]
SIZES = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
WIDE = {"intermediate_size": 32, "initializer_range": 0.4, "head_dim": 8}
# One layer of two looks back 4 tokens only: padding could shift its window.
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "llama": WIDE | {"attention_dropout": 0.5},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.2},  # absolute positions
    "gpt2": {"initializer_range": 0.4},
    "gpt_neox": WIDE,
    "qwen3": WIDE | {"num_key_value_heads": 1},
    "gemma2": WIDE | SLIDING | {"num_key_value_heads": 1},
    "gemma3_text": WIDE | SLIDING | {"num_key_value_heads": 1},
}


def tiny(kind="llama", **options):
    """A random model, the same at every call."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **(SIZES | KINDS[kind] | options))
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.unused_ids = []
    return model


def batch(pad=0):
    return make_batch(PROMPTS, RESPONSES, pad, "cpu")


def stops(capsys, call, *arguments):
    """Run something that must end the program with exit code 2; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    return line


# The batch and the loss


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    assert batch().tokens.tolist() == [
        [2, 3, 4, 5, 6, 4, 1, 0, 0, 0],
        [0, 0, 0, 0, 7, 5, 6, 7, 8, 1],
        [0, 0, 3, 3, 9, 9, 0, 0, 0, 0],
    ]
    assert batch().attention.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert batch(pad=1).mask.tolist() == batch().attention[:, 5:].tolist()  # an end counts
    assert batch().rows(slice(1, 3)).responses.tolist() == batch().tokens[1:, 5:].tolist()


def test_the_loss_worked_by_hand():
    # Two words, prompt [0], response [1, 0]. Odds of 1 at its places: 3 to 1, then 1 to 4.
    logits = torch.tensor([[[0, math.log(3)], [math.log(4), 0], [9, 9]]])  # [1, 3, 2]
    model = torch.nn.Linear(1, 1)
    model.unused_ids, model.forward = [], lambda **_: SimpleNamespace(logits=logits)
    loss = sft_loss(model, make_batch([[0]], [[1, 0]], 0, "cpu"), token_count=2)
    assert loss.item() == pytest.approx(-(math.log(3 / 4) + math.log(4 / 5)) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_each_response_alone_without_padding(kind):
    model, total = tiny(kind), 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)  # [S, N]
        for t, token in enumerate(response):
            total -= logprobs[len(prompt) + t - 1, token].item()
    for pad in (0, 10):
        assert sft_loss(model, batch(pad), 8).item() == pytest.approx(total / 8, abs=1e-5)


# The update


def test_micro_batches_do_not_change_an_update():
    pairs = zip(PROMPTS * 2, RESPONSES * 2, strict=True)
    examples = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    after = []
    for size in (6, 4, 1):
        model, cfg = tiny(), Config(micro_batch_size=size)
        losses = sft.micro_losses(model, examples, SimpleNamespace(pad_token_id=0), 16, cfg)
        loss = sft.update(model, sft.make_optimizer(model), losses, lr=0.1)
        after.append([torch.tensor(loss), *model.parameters()])
    assert not torch.allclose(after[0][1], tiny().model.embed_tokens.weight)
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-4, atol=1e-4)


def test_an_update_sums_its_losses_clips_the_norm_and_skips_what_is_not_finite(capsys):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=99)
    optimizer.skipped = 0
    losses = [3 * model.weight[0, 0], 4 * model.weight[0, 1] + 1]  # gradient (3, 4): norm 5
    assert sft.update(model, optimizer, iter(losses), lr=0.5, max_norm=1) == 1
    assert model.weight[0].tolist() == pytest.approx([-0.5 * 3 / 5, -0.5 * 4 / 5], abs=1e-5)
    for factor in [math.nan] * 4 + [1] + [math.inf] * 4:
        before = model.weight.clone()
        loss = sft.update(model, optimizer, iter([factor * model.weight.sum()]), lr=0.5)
        assert math.isnan(loss) == (factor != 1)
        assert torch.equal(model.weight, before) == (factor != 1)
    losses = iter([math.nan * model.weight.sum()])
    assert "5 updates in a row" in stops(capsys, sft.update, model, optimizer, losses, 0.5)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (1, 4), (5, 12), (50, 50)])
def test_every_epoch_covers_every_row_once_in_an_order_of_its_own(count, size):
    stream = [i for step in range(3 * count) for i in batch_rows(range(count), step, size, 1)]
    assert len(stream) == 3 * count * size
    epochs = [stream[i * count :][:count] for i in range(3)]
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    assert (epochs[0] != epochs[1]) == (count > 1)
    assert (epochs[0] != batch_rows(range(count), 0, count, seed=2)) == (count > 1)
    assert sft.count_steps(Config(epochs=3, batch_size=size), 1000) == round(3000 / size)


def test_the_learning_rate_rises_for_a_tenth_and_then_falls_like_a_cosine():
    # 20 steps: 2 of warm-up, 1/2 and 1; then half a cosine over 18 steps, its middle 9 steps in.
    rates = [cosine_lr(step, 20, peak=8.0, warmup=0.1) for step in range(20)]
    assert rates[:3] == [4, 8, 8]
    assert rates[11] == pytest.approx(4)
    assert 0 < rates[-1] < 0.1
    assert cosine_lr(0, 1, 8.0, 0.1) == 8  # a single step is not wasted


# Models


def gradients(model, **settings):
    """(loss, gradients) of one batch."""
    sft.prepare(model, Config(**settings), torch.device("cpu"))
    loss = sft_loss(model, batch(), 8)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def test_bf16_is_close_to_fp32_whose_weights_and_gradients_stay():
    exact, _ = gradients(tiny())
    loss, grads = gradients(tiny(), precision="bf16")
    assert loss != exact and abs(loss - exact) < 0.05
    assert {x.dtype for x in grads} == {torch.float32}
    frozen = tiny().requires_grad_(False)
    sft.prepare(frozen, Config(precision="bf16"), torch.device("cpu"))
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_recomputed_activations_give_equal_gradients_and_no_dropout(kind):
    calls, model = [], tiny(kind)
    model.get_decoder().layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, gradient_checkpointing=True)
    torch.testing.assert_close(found, gradients(tiny(kind)), rtol=0, atol=0)
    assert len(calls) == 2


def save(folder, model, **special):
    """Save a model and a tokenizer of 11 tokens, in which PAD is 0 and EOS 1."""
    tokenizer = sft.small_tokenizer("toy", [" a b c d e f g h"])
    for name, token in special.items():
        setattr(tokenizer, name, token)
    sft.save_models([model, tokenizer], folder)
    return str(folder)


def test_a_saved_model_comes_back_equal_and_without_dropout(tmp_path):
    model, tokenizer = sft.load_causal_lm(save(tmp_path, tiny()), 64)
    assert torch.equal(sft.response_logits(model, batch()), sft.response_logits(tiny(), batch()))
    assert (tokenizer(" a").input_ids, tokenizer.ends) == ([3], [1])


@pytest.mark.parametrize(("vocab", "rows"), [(11, 12), (15, 15)], ids=["full", "rows to spare"])
def test_a_pad_that_is_the_end_gets_an_id_of_its_own(tmp_path, vocab, rows):
    folder = save(tmp_path, tiny(vocab_size=vocab), pad_token="<eos>")
    model, tokenizer = sft.load_causal_lm(folder)
    assert (tokenizer.pad_token_id, tokenizer.ends) == (11, [1])
    assert model.get_input_embeddings().num_embeddings == rows
    assert model.config.pad_token_id == 11 and 11 in model.unused_ids


def test_a_bf16_model_is_saved_in_fp32_with_all_its_ends_and_a_pad_and_says_so(tmp_path, capsys):
    model = tiny().to(torch.bfloat16)
    folder = save(tmp_path / "a", model, pad_token="<eos>")
    theirs = {"eos_token_id": 4, "temperature": 0.5, "do_sample": False, "repetition_penalty": 2.0}
    (tmp_path / "a/generation_config.json").write_text(json.dumps(theirs))
    sft.save_models(sft.load_causal_lm(folder), tmp_path / "b")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith(folder) for line in said)
    assert "PAD" in said[0] and "float32" in said[1]
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert found.dtype == torch.float32
    assert torch.equal(found.model.norm.weight, model.model.norm.weight.float())
    kept = found.generation_config
    assert (sorted(kept.eos_token_id), kept.pad_token_id) == ([1, 4], 11)
    assert not kept.repetition_penalty and not kept.temperature  # our sampler knows none
    sft.load_causal_lm(tmp_path / "b")
    assert capsys.readouterr().out == ""  # nothing was decided


@pytest.mark.parametrize("name", ["me/tiny", "tiny"])
def test_a_name_on_the_hub_can_be_anything_that_a_folder_can(tmp_path, monkeypatch, name):
    """As the hub's client keeps them, so that it asks for nothing."""
    home = tmp_path / f"models--{name.replace('/', '--')}"
    save(home / "snapshots/0", tiny(), pad_token="<eos>")
    (home / "refs").mkdir()
    (home / "refs/main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cfg = ma_ppo.parse(["--sft", name, "--task", "toy-code", "--max_response", "64"])
    models, _, tokenizer = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    assert torch.equal(models["policy"].lm_head.weight[:11], tiny().lm_head.weight)
    assert models["critic"].trunk.get_input_embeddings().num_embeddings == 12 > 11
    assert tokenizer.pad_token_id == 11


def test_no_flag_is_the_beginning_of_one_of_torchruns():
    flags = {f"--{name}" for chapter in (sft, reward, ma_ppo) for name in vars(chapter.Config())}
    for flag in flags:
        words = get_args_parser().parse_args(["--nproc_per_node=2", "ma_ppo.py", flag, "1"])
        assert words.training_script_args == [flag, "1"]


def test_ids_without_a_token_have_no_chance_and_all_else_stays(tmp_path):
    model, _ = sft.load_causal_lm(save(tmp_path, tiny(vocab_size=20)))
    probs = sft.response_logits(model, batch()).softmax(-1)  # [B, T, N]
    assert not probs[..., 11:].any()
    assert sft_loss(model, batch(pad=15), 8).isfinite()  # PAD may be among them
    model.unused_ids = []
    free = sft.response_logits(model, batch())[..., :11].softmax(-1)  # [B, T, 11]
    torch.testing.assert_close(probs[..., :11], free)


UNUSABLE = {
    "adapter_config.json": "merge_and_unload",
    "model.safetensors": "cannot load",  # half a download
    "tokenizer.json": "cannot load",
    "nowhere": "no such folder",
    "a trunk alone": "no lm_head",
    "no end": "no EOS",
    "short": "2048 positions",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, capsys, kind):
    folder = tmp_path / "nowhere"
    if kind != "nowhere":
        model = tiny(eos_token_id=None)
        no_end = {"eos_token": None} if kind == "no end" else {}
        save(folder, model.model if kind == "a trunk alone" else model, **no_end)
    if "." in kind:
        (folder / kind).write_text("{}")
    line = stops(capsys, sft.load_causal_lm, str(folder), 3000 if kind == "short" else 64)
    assert str(folder) in line and UNUSABLE[kind] in line


# Settings


def parse(*flags):
    return sft.parse(Config, "sft", [*flags])


def test_a_flag_wins_over_those_of_task_and_model_and_these_over_the_chapters_own():
    own = ["--task", "plain", "--data", "rows.jsonl"]
    assert (parse().batch_size, parse().lr, parse().out) == (32, 4e-3, "runs/toy/sft")
    assert (parse(*own).batch_size, parse(*own).lr) == (16, 1e-3)
    assert (parse(*own, "--model", "gpt2").lr, parse(*own).out) == (5e-5, "runs/plain/sft")
    assert parse("--lr", "0.5", *own, "--model", "gpt2").lr == 0.5


REFUSED = ["--steps 0", "--lr nan", "--warmup 2", "--data a.jsonl", "--split 50 50", "--shard"]
REFUSED += ["--data a --task plain --data=b", "--split 20 40 40 --lr 1 --split 20 0 80"]
REFUSED += ["--seed -1", "--keep 0", "--epochs nan", "--track swanlab --batch_size 9"]
REFUSED += ["--split nan 50 50", "--task chess", "--precision fp8", "--batch_size 8", "--new 1"]


@pytest.mark.parametrize("flags", REFUSED)
def test_settings_that_cannot_work_are_one_line_that_names_them(capsys, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "1" if flags == "--shard" else "3")
    assert flags.split()[0] in stops(capsys, parse, *flags.split())


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [("--epochs=2 --steps 9", 0), ("--steps 9 --epochs 2", 2), ("--epochs 1 --steps=9", 0),
     ("--steps=9 --lr 1 --epochs=1", 1), ("--epochs 2 --task hh", 2), ("", 0)],
)  # fmt: skip
def test_of_steps_and_epochs_counts_what_is_typed_last(flags, epochs):
    assert parse(*flags.split()).epochs == epochs


def test_a_path_is_the_same_from_every_folder_and_in_every_spelling(tmp_path, monkeypatch):
    for name in ("rows.jsonl", "other.jsonl", "deep/rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made = []
    for folder, *names in [
        (".", "rows.jsonl", f"{tmp_path}/rows.jsonl"),
        ("deep", "../rows.jsonl"),
    ]:
        monkeypatch.chdir(tmp_path / folder)
        made += [parse("--task", "plain", "--model", "me/hub", "--data", name) for name in names]
    assert {cfg.model for cfg in made} == {"me/hub"}
    for cfg in made[1:]:
        assert sft.other_settings(cfg, vars(made[0])) == ""
    other = parse("--task", "plain", "--model", "me/hub", "--data", "rows.jsonl")  # deep/rows.jsonl
    assert sft.other_settings(other, vars(made[0])) == ", with other --data"


# Runs that are not lost


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(name, *flags, killed=step): the chapter on 100 posts, killed in that step. -> folder"""
    rows = [sft.toy_row(i) for i in range(100)]
    monkeypatch.setattr(sft, "load_rows", lambda *_: rows)
    small = "--steps 4 --save_every 2 --batch_size 4 --max_prompt 16 --max_response 32"

    def train(name, *flags, killed=None):
        def rows_or_death(rows, step, *more):
            if step == killed:
                raise KeyboardInterrupt
            return batch_rows(rows, step, *more)

        monkeypatch.setattr(sft, "batch_rows", rows_or_death)
        try:
            sft.main([*small.split(), "--out", str(tmp_path / name), *flags])
        except KeyboardInterrupt:  # with a run.json it would count as finished
            assert not (tmp_path / name / "run.json").exists()
        return tmp_path / name

    return train


RESUME = ["--resume", "auto"]


def losses_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(len(rows))]
    return [row["loss"] for row in rows]


def test_a_killed_run_that_goes_on_ends_bit_for_bit_like_one_that_was_not(train, capsys):
    whole, out = train("whole"), train("killed", killed=3)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    train("killed", *RESUME, "--keep", "1", "--lr", "0.004")
    assert f"goes on from {out}/checkpoints/step-000002\n" in capsys.readouterr().out
    assert losses_of(out) == losses_of(whole) and len(losses_of(out)) == 4
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [path.name for path in sft.checkpoints(out)] == ["step-000004"]
    assert len(sft.checkpoints(whole)) == 2


def test_a_finished_run_is_not_touched_and_goes_on_where_more_steps_are_asked_for(train, capsys):
    out = train("run")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    train("run", *RESUME, "--lr", "1", killed=0)
    assert f"{out} is already finished, with other --lr\n" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    first = losses_of(out)
    train("run", *RESUME, "--steps", "6", killed=5)
    train("run", *RESUME, "--steps", "6", "--seed", "1", killed=3)
    assert "step-000004, with other --seed\n" in capsys.readouterr().out
    assert losses_of(out)[:4] == first and len(losses_of(out)) == 6


def test_a_run_that_begins_anew_removes_what_was_there(train):
    (train("run") / "checkpoints" / "mine").mkdir()  # somebody's own
    out = train("run", killed=1)
    assert len(losses_of(out)) == 1 and not sft.checkpoints(out)
    assert (out / "checkpoints" / "mine").is_dir()


def test_a_folder_that_another_run_writes_to_is_refused(train, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        assert "another run writes to" in stops(capsys, train, "run")
    train("run")


def test_a_checkpoint_before_the_first_update_does_not_change_it():
    found = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = sft.make_optimizer(model)
        if saves:
            state = sft.training_state({"a": model}, {"a": optimizer})["a"]["optim_state_dict"]
            numbers = [x for kept in state["state"].values() for x in kept.values()]
            assert len(numbers) == 6 and not any(x.any() for x in numbers)
        sft.update(model, optimizer, [model(torch.ones(1, 3)).sum() ** 2], 0.1)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_what_is_not_finite_is_null_in_logs(tmp_path):
    sft.append(tmp_path / "log.jsonl", {"step": 0, "loss": math.nan}, {"step": 1})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0, "loss": null}\n{"step": 1}\n'


# The toys


@pytest.mark.parametrize(
    ("row", "digest"), [(sft.toy_row, "d0bfa2370860ba5b"), (sft.code_row, "3ff7bac74e880caf")]
)
def test_the_toys_rows_are_the_same_for_ever(row, digest):
    rows = json.dumps([row(i) for i in range(300)])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == digest


def passes(program, tests):
    """Whether a program's f does what the unit tests say: our own programs do no harm."""
    names = {}
    try:
        exec(program, names)
        return [names["f"](*given) for given in tests["inputs"]] == tests["outputs"]
    except (SyntaxError, NameError):
        return False


def test_unit_tests_pass_right_programs_and_find_every_mistake():
    right, seen = 0, set()
    for i in range(400):
        row = sft.code_row(i)
        steps, _ = sft.code_steps(random.Random(f"{sft.SPLIT_SEED} code {i}"))
        tests = row["problem"]["input_output"]
        correct = "\n" + sft.code_text(steps)
        assert passes(correct, tests)  # the outputs were made without looking at the text
        assert passes(row["response"], tests) == (row["response"] == correct)
        assert any(output != tests["outputs"][0] for output in tests["outputs"])
        right += row["response"] == correct
        seen |= {name for name, _ in steps}
    assert right / 400 == pytest.approx(1 - sft.CODE_WRONG, abs=0.06)
    assert seen == set(sft.CODE)
