"""Chapter 1: the batch, the loss, the update, tokenizers, the split of the rows, the toy, flags."""

import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import ma_ppo
import reward
import sft
from sft import Config, batch_rows, cosine_lr, make_batch, sft_loss, split

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

PROMPTS = [[2, 3, 4, 5, 6], [7], [3, 3, 9]]
RESPONSES = [[4, 1], [5, 6, 7, 8, 1], [9]]


def tiny_llama(vocab=11):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def stops(capsys, call, *arguments):
    """Run something that must end the program; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# The batch and the loss


def test_prompts_are_left_padded_and_responses_right_padded():
    batch = make_batch(PROMPTS, RESPONSES, pad=0, device="cpu")
    assert batch.tokens.tolist() == [
        [2, 3, 4, 5, 6, 4, 1, 0, 0, 0],
        [0, 0, 0, 0, 7, 5, 6, 7, 8, 1],
        [0, 0, 3, 3, 9, 9, 0, 0, 0, 0],
    ]
    assert batch.attention.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert batch.mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.responses.tolist() == [[4, 1, 0, 0, 0], [5, 6, 7, 8, 1], [9, 0, 0, 0, 0]]
    assert batch.rows(slice(1, 3)).mask.tolist() == batch.mask[1:].tolist()


def test_the_mask_counts_a_real_eos_even_where_the_pad_has_the_same_id():
    batch = make_batch([[5]] * 2, [[4, 1], [4, 4, 4, 1]], pad=1, device="cpu")
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_positions_count_real_tokens_from_0():
    attention = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert sft.positions(attention).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_the_loss_is_that_of_a_loop_over_response_tokens():
    model = tiny_llama()
    total = 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for t, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1].tolist()
            total -= logits[token] - math.log(sum(math.exp(x) for x in logits))
    loss = sft_loss(model, make_batch(PROMPTS, RESPONSES, 0, "cpu"), token_count=8)
    assert loss.item() == pytest.approx(total / 8, abs=1e-5)


class FixedLogits(torch.nn.Module):
    """A model whose logits do not depend on what it reads: only targets can matter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(10, 11, generator=generator))  # [S, V]

    def forward(self, input_ids, logits_to_keep=0, **rest):
        logits = self.logits.expand(len(input_ids), -1, -1)  # [B, S, V]
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_only_response_tokens_are_targets():
    model, batch = FixedLogits(), make_batch(PROMPTS, RESPONSES, 0, "cpu")
    loss = sft_loss(model, batch, 8).item()
    padding = (batch.attention == 0).nonzero().tolist()
    for b, place in [*padding, [0, 0], [0, 4], [1, 4], [2, 3]]:
        changed = make_batch(PROMPTS, RESPONSES, 0, "cpu")
        changed.tokens[b, place] = 10  # in a prompt or in the padding
        assert sft_loss(model, changed, 8).item() == loss
    for b, response in enumerate(RESPONSES):
        for t in range(len(response)):
            changed = make_batch(PROMPTS, RESPONSES, 0, "cpu")
            changed.tokens[b, 5 + t] = 10  # any response token, the EOS included
            assert sft_loss(model, changed, 8).item() != loss


def test_logits_in_front_of_prompt_tokens_get_no_gradient():
    model = FixedLogits()
    sft_loss(model, make_batch([PROMPTS[0]], [RESPONSES[1]], 0, "cpu"), 5).backward()
    touched = model.logits.grad.abs().sum(1) > 0  # [S]: 5 prompt tokens, 5 response tokens
    # the prompt's last token predicts the first of the response; the last predicts nothing
    assert touched.tolist() == [False] * 4 + [True] * 5 + [False]


# The update


def rows_of(count=7, seed=0):
    rng = random.Random(seed)
    return [
        {
            name: [rng.randint(2, 10) for _ in range(rng.randint(1, 6))]
            for name in ("prompt", "response")
        }
        for _ in range(count)
    ]


def test_the_micro_batch_size_does_not_change_the_parameters_after_an_update():
    rows, results = rows_of(), []
    count = float(sum(len(row["response"]) for row in rows))
    tokenizer = SimpleNamespace(pad_token_id=0)
    for size in (1, 3, 100):
        model = tiny_llama()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        losses = sft.micro_losses(model, rows, tokenizer, count, size, "cpu")
        # SGD without clipping: Adam's step and clipping both hide the scale of the gradient
        loss = sft.update(model, torch.optim.SGD(model.parameters()), losses, lr=0.1, max_norm=1e9)
        results.append((loss, torch.cat([p.detach().flatten() for p in model.parameters()])))
        assert (results[-1][1] - before).abs().max() > 1e-3
    for loss, parameters in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert torch.allclose(parameters, results[0][1], atol=1e-6)


def test_an_update_sums_its_losses_clips_the_norm_and_sets_the_learning_rate():
    weight = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(weight.weight)
    losses = [
        lambda: 3 * weight.weight[0, 0],
        lambda: 4 * weight.weight[0, 1] + 1,
    ]  # gradient (3, 4), norm 5
    loss = sft.update(
        weight, torch.optim.SGD(weight.parameters(), lr=99), losses, lr=0.5, max_norm=1
    )
    assert loss == 1
    assert weight.weight[0].tolist() == pytest.approx([-0.5 * 3 / 5, -0.5 * 4 / 5], abs=1e-5)


def test_micro_slices_tile_the_batch():
    assert [list(range(7))[part] for part in sft.micro_slices(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert sft.micro_slices(2, 100) == [slice(0, 2)]


def test_the_ranks_shares_are_the_global_batch_in_order(monkeypatch):
    monkeypatch.setattr(sft, "world", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(sft, "rank", lambda rank=rank: rank)
        shares.append(sft.my_share([10, 11, 12, 13, 14, 15]))
    assert shares == [[10, 11], [12, 13], [14, 15]]


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 3))
def test_every_epoch_covers_every_row_exactly_once_in_an_order_of_its_own(count, batch_size, seed):
    rows = list(range(count))
    stream = [row for step in range(3 * count) for row in batch_rows(rows, step, batch_size, seed)]
    assert len(stream) == 3 * count * batch_size
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == rows


def test_epochs_and_seeds_differ_in_their_order():
    rows = list(range(50))
    first, second = batch_rows(rows, 0, 50, 0), batch_rows(rows, 1, 50, 0)
    assert first != second
    assert first != batch_rows(rows, 0, 50, 1)
    assert first == batch_rows(rows, 0, 50, 0)


def test_the_learning_rate_ramps_up_for_a_tenth_and_then_falls_like_a_cosine():
    # 20 steps: 2 of warm-up, 1/2 and 1; then half a cosine over 18 steps, its middle 9 steps in.
    rates = [cosine_lr(step, 20, peak=8.0, warmup=0.1) for step in range(20)]
    assert rates[:3] == [4, 8, 8]
    assert rates[11] == pytest.approx(4)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert cosine_lr(20, 20, 8.0, 0.1) == pytest.approx(0)
    assert cosine_lr(0, 1, 8.0, 0.1) == 8  # a single step is not wasted
    assert cosine_lr(0, 20, 8.0, 0.0) == 8  # no warm-up


# Tokenizers and models

TOY_TEXTS = [sft.toy_row(i)["prompt"] + sft.toy_row(i)["response"] for i in range(400)]


@pytest.fixture(scope="module")
def toy_tokenizer():
    return sft.small_tokenizer("toy", TOY_TEXTS)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return sft.small_tokenizer(
        "hh", ["Human: is this a test?\n\nAssistant: Yes. It is, isn't it?"] * 20
    )


def test_the_toys_tokenizer_decodes_to_what_it_encoded(toy_tokenizer):
    for i in range(400, 600):
        for text in (sft.toy_row(i)["prompt"], sft.toy_row(i)["response"]):
            ids = toy_tokenizer(text).input_ids
            assert toy_tokenizer.unk_token_id not in ids
            # Metaspace cannot tell whether the first word had a space in front of it
            assert toy_tokenizer.decode(ids).strip() == text.strip()


@given(st.text())
def test_the_byte_level_tokenizer_decodes_any_text_to_itself(bytes_tokenizer, text):
    if any(token in text for token in bytes_tokenizer.all_special_tokens):
        return
    ids = bytes_tokenizer(text).input_ids
    assert bytes_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(
    "text",
    ["naïve café — 日本語 🙂\n\n\ttabs", " don 't , stop .", "  two  spaces ", "\u0000\ud7ff"],
)
def test_unicode_and_odd_spaces_survive_the_default_decoding(bytes_tokenizer, text):
    assert bytes_tokenizer.decode(bytes_tokenizer(text).input_ids) == text


def test_both_tokenizers_have_pad_and_eos_apart_and_survive_saving(
    toy_tokenizer, bytes_tokenizer, tmp_path
):
    for name, tokenizer in (("toy", toy_tokenizer), ("hh", bytes_tokenizer)):
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        text = " the weather was mostly foggy for us."
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
        assert (again.pad_token_id, again.eos_token_id) == (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )


def encoded(toy_tokenizer, **limits):
    row = {"prompt": sft.toy_row(0)["prompt"], "response": " so we finally made it to oslo."}
    (got,) = sft.encode([row], toy_tokenizer, Config(**limits))
    return got, toy_tokenizer(row["prompt"]).input_ids, toy_tokenizer(row["response"]).input_ids


def test_a_truncated_prompt_keeps_its_end(toy_tokenizer):
    got, prompt, _ = encoded(toy_tokenizer, max_prompt=7)
    assert got["prompt"] == prompt[-7:]
    assert toy_tokenizer.decode(got["prompt"]).endswith("TL;DR:")


def test_a_response_gets_its_eos_and_one_that_is_cut_loses_it(toy_tokenizer):
    got, prompt, response = encoded(toy_tokenizer)
    assert got == {"prompt": prompt, "response": [*response, toy_tokenizer.eos_token_id]}
    got, _, _ = encoded(toy_tokenizer, max_response=len(response) + 1)
    assert got["response"][-1] == toy_tokenizer.eos_token_id
    got, _, _ = encoded(toy_tokenizer, max_response=len(response))
    assert got["response"] == response
    got, _, _ = encoded(toy_tokenizer, max_response=3)
    assert got["response"] == response[:3]


def with_bos():
    """A tokenizer of words that puts BOS (id 1) in front, as Llama's does."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "e", "f", "g", "h"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.mark.parametrize(
    ("limit", "kept"), [(9, [4, 5, 6]), (4, [4, 5, 6]), (3, [5, 6]), (2, [6]), (1, [])]
)
def test_a_bos_stays_in_front_of_a_truncated_prompt_and_counts(limit, kept):
    row = {"prompt": "f g h", "response": " e"}
    (got,) = sft.encode([row], with_bos(), Config(max_prompt=limit))
    assert got == {"prompt": [1, *kept], "response": [3, 2]}


def save_gpt2_with_pad_as_eos(folder, vocab_rows):
    """What many hub models look like: EOS does the work of PAD, and there is dropout."""
    torch.manual_seed(0)
    tokenizer = sft.small_tokenizer("hh", ["a few words to learn pieces from"])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + vocab_rows, **size)).save_pretrained(
        folder
    )
    return tokenizer


@pytest.mark.parametrize("spare", [0, 5], ids=["the vocabulary is full", "rows to spare"])
def test_a_model_whose_pad_is_its_eos_gets_a_pad_of_its_own(tmp_path, spare):
    old = save_gpt2_with_pad_as_eos(tmp_path, spare)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == old.eos_token_id
    model, tokenizer = sft.load_causal_lm(tmp_path)
    assert tokenizer.eos_token_id == old.eos_token_id
    assert tokenizer.pad_token_id != old.eos_token_id
    assert tokenizer.pad_token_id < model.get_input_embeddings().weight.shape[0]
    assert model.get_input_embeddings().weight.shape[0] == len(old) + max(1, spare)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer("some text").input_ids == old("some text").input_ids


def test_a_loaded_model_has_its_dropout_off(tmp_path):
    save_gpt2_with_pad_as_eos(tmp_path, 0)
    model, _ = sft.load_causal_lm(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert model.config.resid_pdrop > 0
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_saved_run_loads_with_equal_logits(tmp_path, toy_tokenizer):
    model, batch = tiny_llama(vocab=len(toy_tokenizer)), make_batch(PROMPTS, RESPONSES, 0, "cpu")
    sft.save_models([model, toy_tokenizer], tmp_path)
    sft.write_result(tmp_path, Config(steps=7), {"test_loss": 1.5})
    again, tokenizer = sft.load_causal_lm(tmp_path)
    logits = sft.response_logits(model, batch)
    assert torch.equal(sft.response_logits(again, batch), logits)
    assert torch.equal(
        sft.response_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), batch), logits
    )
    assert tokenizer(TOY_TEXTS[0]).input_ids == toy_tokenizer(TOY_TEXTS[0]).input_ids
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["steps"] == 7
    assert run["result"] == {"test_loss": 1.5}


def test_a_model_without_eos_is_refused(tmp_path, capsys):
    tokenizer = save_gpt2_with_pad_as_eos(tmp_path, 0)
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert "no EOS token" in stops(capsys, sft.load_causal_lm, tmp_path)


# Rows and their split


def test_the_shares_are_disjoint_complete_and_sized_10_then_20_40_40():
    rows = [{"prompt": f"question {i}", "number": i} for i in range(1000)]
    shares = {
        name: [row["number"] for row in split(rows, name)] for name in ("test", "sft", "rm", "ppo")
    }
    assert sorted(number for share in shares.values() for number in share) == list(range(1000))
    assert {name: len(share) for name, share in shares.items()} == {
        "test": 100,
        "sft": 180,
        "rm": 360,
        "ppo": 360,
    }


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80))
def test_all_rows_about_one_prompt_are_in_one_share(numbers):
    rows = [{"prompt": f"question {n}"} for n in numbers]
    shares = [{row["prompt"] for row in split(rows, name)} for name in ("test", "sft", "rm", "ppo")]
    assert sum(map(len, shares)) == len(set(numbers))
    assert sum(len(split(rows, name)) for name in ("test", "sft", "rm", "ppo")) == len(rows)


def test_the_split_depends_on_no_other_randomness():
    rows = [{"prompt": f"question {i}"} for i in range(100)]
    results = []
    for seed in (0, 1):
        random.seed(seed)
        torch.manual_seed(seed)
        results.append(split(rows, "rm"))
    assert results[0] == results[1]
    assert results[0] != rows[28:64]  # shuffled


def facts_in(text):
    """What the sentences of a toy text state, in order: (slot, value) each."""
    return [sft.toy_sentences()[sentence.strip()] for sentence in text.split(".")[:-1]]


def test_toy_posts_state_their_twelve_facts_and_summaries_some_of_them():
    for index in range(200):
        row = sft.toy_row(index)
        assert row == sft.toy_row(index)
        post = row["prompt"].removeprefix("POST Subreddit: r/travel").removesuffix(" TL;DR:")
        assert facts_in(post) == list(row["facts"].items())
        assert len(row["facts"]) == 12
        stated = facts_in(row["response"])
        assert {slot for slot, _ in stated} - {None}
        assert len(stated) <= sft.TOY_LONGEST


def test_toy_demonstrations_are_sometimes_wrong_repeated_or_filled():
    kinds = Counter()
    for index in range(500):
        row = sft.toy_row(index)
        seen = set()
        for slot, value in facts_in(row["response"]):
            if slot is None:
                kinds["filler"] += 1
            elif slot in seen:
                kinds["repeated"] += 1
            else:
                kinds["right" if row["facts"][slot] == value else "wrong"] += 1
            seen.add(slot)
    assert kinds["right"] > 0.5 * kinds.total()
    assert all(kinds[kind] > 0.02 * kinds.total() for kind in ("wrong", "filler", "repeated"))


def test_toy_responses_average_60_to_100_tokens_and_all_fit(toy_tokenizer):
    lengths = [len(toy_tokenizer(sft.toy_row(i)["response"]).input_ids) + 1 for i in range(1000)]
    assert 60 <= sum(lengths) / 1000 <= 100
    assert max(lengths) <= Config().max_response


def test_held_out_toy_posts_are_not_among_those_trained_on():
    rows = [sft.toy_row(i) for i in range(5000)]
    shares = [{row["prompt"] for row in split(rows, name)} for name in ("test", "sft", "rm", "ppo")]
    assert sum(map(len, shares)) == len(set.union(*shares)) == len({row["prompt"] for row in rows})
    assert len(set.union(*shares)) > 0.999 * len(rows)


# Settings


def test_a_flag_overrides_the_tasks_default_which_overrides_the_chapters():
    hh = sft.parse(Config, "sft", ["--task", "hh", "--data", "pairs.jsonl", "--lr", "0.5"])
    assert f"--batch_size {hh.batch_size} " in sft.TASK_FLAGS["hh"]["sft"]
    assert hh.batch_size != Config().batch_size
    assert hh.lr == 0.5
    toy = sft.parse(Config, "sft", [])
    assert (toy.batch_size, toy.lr) == (Config().batch_size, Config().lr)


def test_a_pretrained_model_is_fine_tuned_at_small_rates_unless_told_otherwise():
    own = ["--task", "plain", "--data", "rows.jsonl", "--model", "gpt2"]
    for chapter, config in (("sft", Config), ("reward", reward.Config), ("ma_ppo", ma_ppo.Config)):
        assert sft.parse(config, chapter, own).lr <= 5e-5
        assert sft.parse(config, chapter, own[:4]).lr > 1e-4
        assert sft.parse(config, chapter, [*own, "--lr", "0.5"]).lr == 0.5
    assert sft.parse(ma_ppo.Config, "ma_ppo", own).critic_lr <= 5e-5


def test_a_preset_names_task_and_model_and_yields_to_flags():
    preset = ["--preset", "gemma-7b-webgpt"]
    cfg = sft.parse(ma_ppo.Config, "ma_ppo", preset)
    assert (cfg.task, cfg.model, cfg.beta, cfg.lr) == ("webgpt", "google/gemma-7b", 0.1, 1e-6)
    cfg = sft.parse(ma_ppo.Config, "ma_ppo", [*preset, "--beta", "0.2", "--model", "here"])
    assert (cfg.task, cfg.model, cfg.beta, cfg.lr) == ("webgpt", "here", 0.2, 1e-6)


def test_output_folders_follow_the_task_and_the_chapter():
    data = "pairs.jsonl"
    assert sft.parse(Config, "sft", []).out == "runs/toy/sft"
    assert (
        sft.parse(reward.Config, "reward", ["--task", "hh", "--data", data]).out == "runs/hh/reward"
    )
    assert sft.parse(ma_ppo.Config, "ma_ppo", []).out == "runs/toy"
    assert sft.parse(Config, "sft", ["--out", "here"]).out == "here"


def test_the_shared_flags_are_spelled_the_same_way_in_every_chapter():
    shared = "task model out seed steps batch_size micro_batch_size lr device"
    ppo = "sft reward_model arms n gamma lam beta sigma macro_reward ratio critic_lr clip"
    ppo += " ppo_epochs max_response temperature top_k top_p"
    assert set(shared.split()) <= set(sft.Config.__dataclass_fields__)  # which the others inherit
    assert set(ppo.split()) <= set(ma_ppo.Config.__dataclass_fields__)
    assert sft.parse(ma_ppo.Config, "ma_ppo", ["--terminations", "whole"]).arms == ["whole"]
