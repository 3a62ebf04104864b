"""Folders that people have: odd widths, adapters, published reward models; and what is refused."""

import shutil

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

import ma_ppo
import reward
import sft

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


@pytest.fixture(scope="module")
def tokenizer():
    rows = [sft.toy_row(i) for i in range(50)]
    return sft.small_tokenizer("toy", [row["prompt"] + row["response"] for row in rows])


@pytest.fixture
def save(tokenizer, tmp_path):
    """Save a model and its tokenizer in a folder; returns the folder's name."""

    def save(model, name="model"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def llama(tokenizer, kind=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=32, **SMALL, **IDS, **more)
    return kind(config).eval()


def refusal(capsys, action, *args):
    """The one line with which something ends the program."""
    with pytest.raises(SystemExit) as stop:
        action(*args)
    printed = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(printed) == 1
    return printed[0]


def test_the_head_is_as_wide_as_the_trunks_output(tokenizer, save):
    """OPT-350m: 1,024 numbers within, 512 outside."""
    config = OPTConfig(
        vocab_size=len(tokenizer),
        word_embed_proj_dim=16,
        ffn_dim=32,
        do_layer_norm_before=False,
        max_position_embeddings=64,
        **SMALL,
        **IDS,
    )
    model = reward.ScalarModel.load(save(OPTForCausalLM(config)))
    assert model.head.in_features == 16
    assert model(sft.make_batch([[4, 5]], [[6, 1]], 0, "cpu")).shape == (1, 4)


def test_a_model_with_images_is_trained_on_texts(tokenizer, save):
    """Gemma 3 from 4B on: the sizes stand in config.text_config."""
    text = {"vocab_size": len(tokenizer), "intermediate_size": 32, "head_dim": 16, **SMALL, **IDS}
    text["num_key_value_heads"] = 1
    vision = {"image_size": 28, "patch_size": 14, "intermediate_size": 16, **SMALL}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = save(Gemma3ForConditionalGeneration(config))
    model, found = sft.load_causal_lm(folder, 64)
    batch = sft.make_batch([[4, 5]], [[6, 1]], found.pad_token_id, "cpu")
    assert sft.response_logits(model, batch).shape == (1, 2, len(tokenizer))
    assert reward.ScalarModel.load(folder)(batch).shape == (1, 4)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the model"])
def test_an_adapter_is_merged_and_all_weights_learn(tokenizer, save, tmp_path, beside):
    peft = pytest.importorskip("peft")
    base = save(llama(tokenizer), "base")
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).eval()
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    if beside:
        shutil.copytree(base, folder, dirs_exist_ok=True)
    tokens = torch.arange(3, 9)[None]  # [1, 6]
    wanted = adapted(input_ids=tokens).logits
    model, _ = sft.load_causal_lm(str(folder), 64)
    assert torch.allclose(model(input_ids=tokens).logits, wanted, atol=1e-5)
    plain = llama(tokenizer)(input_ids=tokens).logits
    assert not torch.allclose(plain, wanted, atol=1e-3)
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "merged")  # a whole model, that anybody can load
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(again(input_ids=tokens).logits, wanted, atol=1e-5)


def test_without_peft_an_adapter_is_refused_by_name(tokenizer, save, capsys, monkeypatch):
    folder = save(llama(tokenizer))
    with open(f"{folder}/adapter_config.json", "w") as file:
        file.write('{"base_model_name_or_path": "somewhere"}')
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install peft" in refusal(capsys, sft.load_causal_lm, folder, 64)


def test_a_published_reward_model_scores_as_transformers_does(tokenizer, save):
    classifier = llama(tokenizer, LlamaForSequenceClassification, num_labels=1)
    folder = save(classifier)
    model = reward.ScalarModel.load(folder)
    batch = sft.make_batch([[4, 5]], [[6, 7, 1]], 0, "cpu")
    wanted = classifier(input_ids=torch.tensor([[4, 5, 6, 7, 1]])).logits[0]  # [1]
    assert torch.allclose(reward.last_token_scores(model, batch), wanted, atol=1e-6)
    cfg = ma_ppo.Config(sft=save(llama(tokenizer), "sft"), reward_model=folder)
    ma_ppo.check_folders(cfg)
    models, _, _ = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    assert torch.equal(models["critic"].head.weight, models["reward"].head.weight)


def test_a_classifier_of_several_labels_or_of_another_vocabulary_is_refused(
    tokenizer, save, capsys
):
    three = save(llama(tokenizer, LlamaForSequenceClassification, num_labels=3), "three")
    assert "one label" in refusal(capsys, reward.ScalarModel.load, three)
    others = sft.small_tokenizer("toy", [" words of another text."])
    one = llama(tokenizer, LlamaForSequenceClassification, num_labels=1)
    folder = save(one, "other")
    others.save_pretrained(folder)
    model = reward.ScalarModel.load(folder)
    refused = refusal(capsys, reward.check_vocabulary, model, folder, tokenizer)
    assert "another vocabulary" in refused


@pytest.mark.parametrize("broken", ["half a download", "no weights", "no tokenizer", "nothing"])
def test_a_folder_that_cannot_be_used_is_one_line(tokenizer, save, tmp_path, capsys, broken):
    folder = save(llama(tokenizer))
    if broken == "half a download":
        with open(f"{folder}/model.safetensors", "r+b") as file:
            file.truncate(1000)
    elif broken == "no weights":
        (tmp_path / "model" / "model.safetensors").unlink()
    elif broken == "no tokenizer":
        for path in (tmp_path / "model").glob("tokenizer*"):
            path.unlink()
    else:
        folder = str(tmp_path / "nowhere")
    assert "model" in refusal(capsys, sft.load_causal_lm, folder, 64)


def test_a_model_whose_cache_leads_elsewhere_is_refused(tokenizer, save, capsys):
    """As that of a recurrent model that counts padding in."""
    policy, found = sft.load_causal_lm(save(llama(tokenizer)), 64)
    sft.prepare(policy, ma_ppo.Config(), torch.device("cpu"))
    prompts = [{"prompt": [4, 5, 6, 7]}, {"prompt": [8]}]
    cfg = ma_ppo.Config(sft="somewhere")
    ma_ppo.check_sampling(policy, prompts, found, cfg)
    forward = policy.forward

    def forgetful(*args, cache=None, **options):
        return forward(*args, cache=None, **options)

    policy.forward = forgetful
    refused = refusal(capsys, ma_ppo.check_sampling, policy, prompts, found, cfg)
    assert "LlamaForCausalLM" in refused


def test_rows_that_have_changed_under_the_same_name_are_noticed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"prompt": "question {i}?", "response": " answer"}}' for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    flags = ["--task", "plain", "--data", "rows.jsonl", "--steps", "1", "--batch_size", "2"]
    sft.main([*flags, "--out", "run"])
    path.write_text("\n".join(rows[:40]))
    sft.load_rows.cache_clear()
    capsys.readouterr()
    refused = refusal(capsys, sft.main, [*flags, "--out", "run", "--resume", "auto"])
    assert "the rows have changed" in refused
    cfg = ma_ppo.parse([*flags, "--out", str(tmp_path / "ppo")])
    sft.record_rows(cfg)
    cfg.sft = "run"
    with pytest.raises(SystemExit):
        ma_ppo.run_stage(sft, "run", cfg)
    assert "other rows" in capsys.readouterr().err
