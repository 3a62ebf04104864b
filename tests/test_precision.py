"""Precision, recomputed activations, compilation, timings: how models run, never what they mean."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import ma_ppo
import reward
import sft

CPU = torch.device("cpu")


def settings(**changes):
    """Settings of which only those count that say how models run."""
    return sft.Config(**changes)


def llama(layers=3, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    """A model whose layers have dropout, 0.1 by default."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=2)).eval()


def opt():
    """A model whose layers themselves have dropout, 0.1 by default."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        init_std=0.2,
    )
    return OPTForCausalLM(config).eval()


def batch():
    return sft.make_batch([[3, 4, 5], [6]], [[7, 8, 9, 2], [10, 2]], 0, "cpu")


def gradients(model):
    """(loss, gradients) of one batch."""
    model.zero_grad()
    loss = sft.sft_loss(model, batch(), 6)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


# Precision


def test_auto_precision_on_a_cpu_is_fp32_bit_for_bit():
    model = llama()
    expected = gradients(model)
    sft.prepare(model, settings(), CPU)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_bf16_rounds_the_matrices_and_keeps_weights_and_gradients_in_fp32():
    model = llama()
    exact, _ = gradients(model)
    sft.prepare(model, settings(precision="bf16"), CPU)
    loss, grads = gradients(model)
    assert loss != exact
    assert abs(loss - exact) < 0.02
    assert {x.dtype for x in [*model.parameters(), *grads]} == {torch.float32}


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_a_pass_in_bf16_keeps_no_copies_of_the_weights(kind):
    """autocast's cache would: 2 bytes for each parameter, until the end of the pass."""
    model = llama()
    seen = []

    def look(*ignored):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    model.model.norm.register_forward_hook(look)
    if kind == "critic":
        model = reward.ScalarModel(model.model)
        seen.clear()  # it has asked the trunk how wide it is
    sft.prepare(model, settings(precision="bf16"), CPU)
    if kind == "critic":
        model(batch())
    else:
        sft.response_logits(model, batch())
    assert seen == [(True, False)]


def test_a_frozen_model_is_stored_in_bf16_but_its_scalar_head_is_not():
    model = reward.ScalarModel(llama().model).requires_grad_(False)
    exact = model(batch())
    sft.prepare(model, settings(precision="bf16"), CPU)
    assert {p.dtype for p in model.trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    scores = model(batch())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.1)


def test_an_unknown_precision_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        sft.parse(sft.Config, "sft", ["--precision", "fp8"])
    assert stop.value.code == 2
    assert "--precision must be" in capsys.readouterr().err


# Recomputed activations


def test_gradient_checkpointing_computes_every_layer_twice_and_the_same_gradients():
    model = llama()
    calls = []
    expected = gradients(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    sft.prepare(model, settings(gradient_checkpointing=True), CPU)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
    assert len(calls) == 2 * 3
    with torch.no_grad():
        sft.response_logits(model, batch())
    assert len(calls) == 3 * 3, "nothing is computed twice where nothing is learned"


@pytest.mark.parametrize(
    "make", [lambda: llama(attention_dropout=0.5), gpt2, opt], ids=["llama", "gpt2", "opt"]
)
def test_gradient_checkpointing_does_not_switch_dropout_on(make):
    model = make()
    expected = gradients(model)
    sft.prepare(model, settings(gradient_checkpointing=True), CPU)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_gradient_checkpointing_leaves_sampling_with_its_cache_as_it_is():
    plain = llama()
    changed = copy.deepcopy(plain)
    sft.prepare(changed, settings(gradient_checkpointing=True), CPU)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    uniforms = torch.rand(2, 12, dtype=torch.float64)
    args = ([[3, 4, 5], [6]], uniforms, tokenizer, ma_ppo.Config())
    assert ma_ppo.generate(changed, *args) == ma_ppo.generate(plain, *args)


# The pipeline


@pytest.mark.parametrize(
    "flags",
    [["--precision", "bf16"], pytest.param(["--gradient_checkpointing"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_the_pipeline_runs_and_first_ratios_are_1(driver, tmp_path, flags):
    driver.run("ma_ppo", tmp_path, "--arms", "fixed", "--steps", 1, *flags)
    row = json.loads((tmp_path / "fixed/metrics.jsonl").read_text())
    assert abs(row["ratio_first"] - 1) < 1e-5
    saved = load_file(tmp_path / "fixed/model/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_forward_passes_give_the_same_gradients():
    plain = llama(layers=1)
    compiled = copy.deepcopy(plain)
    sft.prepare(compiled, settings(compile=True), CPU)
    torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-4, atol=1e-5)


# Timings


def test_timings_on_a_cpu_know_no_memory_and_on_a_gpu_the_peak_of_each_phase():
    phases = ("rollout", "credit")
    assert sft.timings([(1.0, None), (3.0, None), (3.5, None)], phases) == {
        "seconds": 2.5,
        "seconds_rollout": 2.0,
        "seconds_credit": 0.5,
    }
    found = sft.timings([(1.0, 9.0), (3.0, 4.0), (3.5, 6.0)], phases)
    assert found["gpu_gb"] == 6.0
    assert (found["gpu_gb_rollout"], found["gpu_gb_credit"]) == (4.0, 6.0)
    assert sft.timings([(1.0, None), (3.0, None)]) == {"seconds": 2.0}
