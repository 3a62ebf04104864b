"""Any causal LM: every architecture of the README, tiny and random, in the same lines of code."""

import pytest
import torch
import transformers as hf

import ma_ppo
import reward
import sft

VOCAB = 64
LLAMA = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
LLAMA |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
HEADS = LLAMA | {"head_dim": 16}
# One layer of two looks back 4 tokens only: less than a prompt, so padding could shift its window.
SLIDING = HEADS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
GPT2 |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1}
NEOX = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
CONFIGS = {
    "llama": hf.LlamaConfig(**LLAMA),
    "gemma": hf.GemmaConfig(**HEADS),
    "gemma2": hf.Gemma2Config(**SLIDING, query_pre_attn_scalar=16),
    "gemma3": hf.Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=16),
    "qwen2": hf.Qwen2Config(**LLAMA),
    "qwen3": hf.Qwen3Config(**HEADS),
    "gpt2": hf.GPT2Config(**GPT2),
    "gpt_neox": hf.GPTNeoXConfig(**NEOX),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14], [7, 7, 15, 8], [9, 6]]
RESPONSES = [[8, 1], [9, 10, 11, 12, 13, 14, 15, 1], [12, 13, 14, 6, 7], [1]]
PAD = 0


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture
def stages(model, tmp_path):
    """(folder of the model as an SFT model with a tokenizer, folder of an RM on its trunk)."""
    tokenizer = sft.small_tokenizer("toy", [" " + " ".join(f"w{i}" for i in range(VOCAB - 3))])
    sft.save_models([model, tokenizer], tmp_path / "sft")
    critic = reward.ScalarModel.load(tmp_path / "sft")
    sft.save_models([critic, tokenizer], tmp_path / "reward")
    return tmp_path


def settings(stages, **given):
    folders = {"sft": str(stages / "sft"), "reward_model": str(stages / "reward")}
    given = {"batch_size": 8, "max_prompt": 40, "max_response": 10, "lr": 1e-3, "warmup": 0} | given
    return ma_ppo.Config(task="hh", data=["-"], **folders, **given)


def one_step(cfg, models, optimizers, tokenizer, step=0):
    """One PPO step of the arm `fixed`; returns its metrics."""
    examples = []
    for i in range(cfg.batch_size):
        prompt = [3 + (7 * i + j) % (VOCAB - 3) for j in range(1 + i)]
        examples.append({"number": i, "text": "", "prompt": prompt})
    rollout = ma_ppo.sample(models["policy"], examples, step, tokenizer, cfg)
    first_pass = ma_ppo.judge(rollout, models, examples, tokenizer, cfg)
    ma_ppo.cut("fixed", rollout, tokenizer, cfg)
    mask = rollout.batch.mask
    rewards = ma_ppo.token_rewards(
        rollout.scores, rollout.logprobs, rollout.ref_logprobs, mask, cfg.beta
    )
    ma_ppo.assign_credit("fixed", rollout, rewards, cfg)
    return ma_ppo.improve(rollout, models, optimizers, step, cfg, first_pass)


def test_left_padding_does_not_change_logprobabilities_nor_scores(model, stages):
    critic = reward.ScalarModel.load(stages / "reward")
    batch = sft.make_batch(PROMPTS, RESPONSES, PAD, "cpu")
    with torch.no_grad():
        together = sft.response_logits(model, batch).log_softmax(-1)  # [B, T, V]
        scores = reward.last_token_scores(critic, batch)  # [B]
        for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            alone = sft.make_batch([prompt], [response], PAD, "cpu")
            wanted = sft.response_logits(model, alone).log_softmax(-1)[0]  # [T, V]
            assert torch.allclose(together[b, : len(response)], wanted, atol=1e-4)
            assert torch.allclose(reward.last_token_scores(critic, alone), scores[b], atol=1e-4)


def test_cached_sampling_of_a_padded_batch_is_that_of_feeding_each_row_anew(model):
    cfg = ma_ppo.Config(max_response=12)
    uniforms = torch.rand(
        4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )  # [B, T]
    tokenizer = sft.small_tokenizer("toy", [" a b"])  # for its PAD 0 and EOS 1
    together = ma_ppo.generate(model, PROMPTS, uniforms, tokenizer, cfg)
    assert max(map(len, together)) > 8  # beyond the sliding window
    for prompt, u, response in zip(PROMPTS, uniforms, together, strict=True):
        tokens = list(prompt)
        for t in range(len(response)):
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[:, -1]  # [1, V]
            tokens.append(int(ma_ppo.draw(ma_ppo.shaped(logits, cfg), u[t : t + 1])))
        assert tokens[len(prompt) :] == response


def test_one_ppo_step_runs_with_first_ratio_1_and_moves_policy_and_critic(stages):
    cfg = settings(stages)
    models, optimizers, tokenizer = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    before = {name: [p.clone() for p in models[name].parameters()] for name in models}
    result = one_step(cfg, models, optimizers, tokenizer)
    assert result["ratio_first"] == pytest.approx(1, abs=1e-5)
    for name, parameters in before.items():
        moved = any(
            not torch.equal(p, q)
            for p, q in zip(parameters, models[name].parameters(), strict=True)
        )
        assert moved == (name in ("policy", "critic"))


def test_a_saved_model_and_its_critic_come_back_equal(stages, tmp_path):
    models, _, tokenizer = ma_ppo.load_models("token", settings(stages), torch.device("cpu"))
    batch = sft.make_batch(PROMPTS, RESPONSES, PAD, "cpu")
    for name in ("policy", "critic"):
        sft.save_models([models[name], tokenizer], tmp_path / name)
    policy, _ = sft.load_causal_lm(tmp_path / "policy")
    critic = reward.ScalarModel.load(tmp_path / "critic")
    with torch.no_grad():
        assert torch.equal(
            sft.response_logits(policy, batch), sft.response_logits(models["policy"], batch)
        )
        assert torch.equal(critic(batch), models["critic"](batch))


@pytest.mark.parametrize("ratio", ["token", pytest.param("macro", marks=pytest.mark.slow)])
def test_micro_batches_of_1_4_and_all_give_the_same_parameters_after_three_steps(tmp_path, ratio):
    torch.manual_seed(0)
    model, results = hf.LlamaForCausalLM(CONFIGS["llama"]).eval(), []
    tokenizer = sft.small_tokenizer("toy", [" " + " ".join(f"w{i}" for i in range(VOCAB - 3))])
    sft.save_models([model, tokenizer], tmp_path / "sft")
    torch.manual_seed(1)
    critic = reward.ScalarModel.load(tmp_path / "sft")
    sft.save_models([critic, tokenizer], tmp_path / "reward")
    for size in (1, 4, 8):
        cfg = settings(tmp_path, micro_batch_size=size, ratio=ratio, ppo_epochs=2)
        models, optimizers, tokenizer = ma_ppo.load_models("token", cfg, torch.device("cpu"))
        for step in range(3):
            one_step(cfg, models, optimizers, tokenizer, step)
        results.append([p for name in optimizers for p in models[name].parameters()])
    for now, start in zip(results[0], model.parameters(), strict=False):
        assert not torch.allclose(now, start, atol=1e-4)
    for other in results[1:]:
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(results[0], other, strict=True))
