"""Precision, gradient checkpointing, compilation, timings: how forward passes run, never what they mean."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ma_ppo
import reward
import sft


def settings(**changes):
    return SimpleNamespace(
        **{"precision": "auto", "gradient_checkpointing": False, "compile": False, "shard": False} | changes
    )


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **size)).eval()


def batch():
    return sft.make_batch([[3, 4, 5], [6]], [[7, 8, 9, 2], [10, 2]], 0, "cpu")


def gradients(model):
    model.zero_grad()
    loss = sft.sft_loss(model, batch(), 6)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_auto_precision_on_a_cpu_is_fp32_bit_for_bit():
    model = llama()
    expected = gradients(model)
    sft.prepare(model, settings(), torch.device("cpu"))
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)


def test_bf16_rounds_the_matrices_and_keeps_weights_and_gradients_in_fp32():
    model = llama()
    exact, _ = gradients(model)
    sft.prepare(model, settings(precision="bf16"), torch.device("cpu"))
    loss, grads = gradients(model)
    assert loss != exact and abs(loss - exact) < 0.02
    assert {x.dtype for x in [*model.parameters(), *grads]} == {torch.float32}


@pytest.mark.parametrize("shard", [False, True])
def test_a_pass_in_bf16_keeps_no_copies_of_the_weights(monkeypatch, shard):
    """autocast's cache would: 2 bytes for each parameter of the whole model, on every rank, until the end."""
    model, caches = llama(), []
    monkeypatch.setattr(sft, "shard_model", lambda *ignored: None)
    sft.prepare(model, settings(precision="bf16", shard=shard), torch.device("cpu"))
    model.model.norm.register_forward_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    with torch.no_grad():
        model(batch().tokens)
    assert caches == [False]


def test_a_frozen_model_is_stored_in_bf16_but_its_scalar_head_is_not():
    model = reward.ScalarModel(llama().model).requires_grad_(False)
    exact = model(batch())
    sft.prepare(model, settings(precision="bf16"), torch.device("cpu"))
    assert {p.dtype for p in model.trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    scores = model(batch())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0, atol=0.1)


def test_gradient_checkpointing_computes_every_layer_twice_and_the_same_gradients():
    model, calls = llama(), []
    expected = gradients(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    sft.prepare(model, settings(gradient_checkpointing=True), torch.device("cpu"))
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
    assert len(calls) == 2 * 3
    with torch.no_grad():
        model(batch().tokens)
    assert len(calls) == 3 * 3, "nothing is computed twice while sampling"


def test_gradient_checkpointing_leaves_sampling_with_its_cache_as_it_is():
    plain, tokenizer = llama(), SimpleNamespace(pad_token_id=0, eos_token_id=2)
    cfg = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0)
    uniforms = torch.rand(2, 12, dtype=torch.float64)
    changed = copy.deepcopy(plain)
    sft.prepare(changed, settings(gradient_checkpointing=True), torch.device("cpu"))
    args = ([[3, 4, 5], [6]], uniforms, tokenizer, cfg)
    assert ma_ppo.generate(changed, *args) == ma_ppo.generate(plain, *args)


def test_timings_on_a_cpu_know_no_memory_and_on_a_gpu_the_peak_of_each_phase():
    phases = ("rollout", "credit")
    assert sft.timings([(1.0, None), (3.0, None), (3.5, None)], phases) == {
        "seconds": 2.5,
        "seconds_rollout": 2.0,
        "seconds_credit": 0.5,
    }
    found = sft.timings([(1.0, 9.0), (3.0, 4.0), (3.5, 6.0)], phases)
    assert (found["gpu_gb"], found["gpu_gb_rollout"], found["gpu_gb_credit"]) == (6.0, 4.0, 6.0)
    assert sft.timings([(1.0, None), (3.0, None)]) == {"seconds": 2.0}


def test_an_unknown_precision_is_refused(capsys):
    with pytest.raises(SystemExit):
        sft.parse(sft.Config, "sft", ["--precision", "fp8"])
    assert "--precision must be" in capsys.readouterr().err


SMALL = ["--max_prompt", "128", "--max_response", "8", "--batch_size", "4", "--steps", "1"]


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--gradient_checkpointing"]], ids=" ".join)
def test_the_pipeline_runs_and_first_ratios_are_1(tmp_path, flags):
    out = str(tmp_path / "sft")
    sft.main(["--steps", "2", "--batch_size", "4", "--out", out, *flags])
    reward.main(
        ["--steps", "2", "--batch_size", "4", "--sft", out, "--out", str(tmp_path / "reward"), *flags]
    )
    ma_ppo.main(["--out", str(tmp_path), "--terminations", "fixed", *SMALL, *flags])
    row = sft.json.loads((tmp_path / "fixed/metrics.jsonl").read_text())
    assert abs(row["ratio_first"] - 1) < 1e-5
    saved = sft.load_file(tmp_path / "fixed/model/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}


def test_compiled_forward_passes_give_the_same_gradients():
    plain = llama()
    compiled = copy.deepcopy(plain)
    sft.prepare(compiled, settings(compile=True), torch.device("cpu"))
    torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-4, atol=1e-5)
