"""Chapter 1, the model's own conventions: one worked example for each family of models.

The tokenizers are tiny, and otherwise like the real ones: the same normalizers, pre-tokenizers,
special tokens and templates of the same shape. Tokens are compared as texts; ▁ and Ġ are spaces.
"""

import json

import pytest
import torch
import transformers as hf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import sft
from sft import Config

TEXTS = ["red cat? Answer: blue dog. the tag ends it"]
TEXTS += ["user assistant model system [INST] be kind why so", "blue red red the blue a red dog"]
WORDS = r"\s*[\r\n]+|\s+(?!\S)| ?\w+| ?[^\s\w]+|\s+"
RAISE = "{{ raise_exception('roles must alternate user/assistant/user/assistant') }}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + RAISE + "{% endif %}"
INST = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' "
    "+ m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACE = " "


def sentencepiece(prefix, specials):
    """Words behind ▁, letters that are unknown as bytes; prefix: ▁ in front of every text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(SPACE, "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + spaces)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", SPACE), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(SPACE, 1, 0)] * prefix
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    known = [*specials, *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(
        [text.replace(SPACE, "▁") for text in TEXTS] * 3,
        trainers.BpeTrainer(vocab_size=700, special_tokens=known, show_progress=False),
    )
    core.pre_tokenizer = None
    state = json.loads(
        core.to_str()
    )  # the bytes are pieces of the vocabulary, and no special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def byte_level(specials):
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_pieces])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 600, "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(**options))
    core.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return core


def begins_with(core, bos):
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )


LLAMA_3_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
LLAMA_3_TOKENS += ("<|eot_id|>",)
FAMILIES = {
    "llama2": (True, ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, INST),
    "mistral": (True, ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, INST),
    "llama3": (
        None,
        LLAMA_3_TOKENS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        LLAMA_3,
    ),
    "gemma": (
        False,
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        GEMMA,
    ),
    "qwen": (
        None,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        CHATML,
    ),
    "smollm": (
        None,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        CHATML,
    ),
    "gpt2": (
        None,
        ["<|endoftext|>"],
        {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")},
        None,
    ),
}


def family(name):
    """A tiny tokenizer of a family, as it comes from the hub: without our conventions."""
    prefix, specials, named, template = FAMILIES[name]
    core = byte_level(specials) if prefix is None else sentencepiece(prefix, specials)
    if name in ("llama2", "mistral", "llama3", "gemma"):
        begins_with(core, named["bos_token"])
    if prefix is not None:
        named = named | {"unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(rows, ends=None):
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=rows, bos_token_id=None, eos_token_id=None, **size)
    )
    model.generation_config.eos_token_id = ends
    return model.eval()


def tokens(tokenizer, prompt, response, **settings):
    """Prompt and response as tokens, each joined by spaces; or those of whole rows."""
    row = prompt if isinstance(prompt, dict) else {"prompt": prompt, "response": response}
    (ids,) = sft.encode([row], tokenizer, Config(**settings))
    names = ("prompt", "response")
    return tuple(" ".join(tokenizer.convert_ids_to_tokens(ids[name])) for name in names)


def turn(role, content):
    return {"role": role, "content": content}


def stops(capsys, call, *arguments):
    """Run something that must end the program; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Texts: what begins, what ends, spaces at the seam


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        ("llama2", "<s> ▁red ▁cat? ▁Answer:", "▁blue ▁dog. </s>"),
        ("mistral", "<s> ▁red ▁cat? ▁Answer:", "▁blue ▁dog. </s>"),
        ("gemma", "<bos> red ▁cat? ▁Answer:", "▁blue ▁dog. <eos>"),
        (
            "llama3",
            "<|begin_of_text|> red Ġcat ? ĠAnswer :",
            "Ġblue Ġdog . <|end_of_text|>",
        ),
        ("qwen", "red Ġcat ? ĠAnswer :", "Ġblue Ġdog . <|im_end|>"),
        ("smollm", "red Ġcat ? ĠAnswer :", "Ġblue Ġdog . <|im_end|>"),
        ("gpt2", "red Ġcat ? ĠAnswer :", "Ġblue Ġdog . <|endoftext|>"),
    ],
)
def test_prompt_and_response_are_the_tokens_of_one_text_and_one_end(name, prompt, response):
    tokenizer = family(name)
    assert tokens(tokenizer, "red cat? Answer:", " blue dog.") == (prompt, response)
    assert tokenizer("red cat? Answer: blue dog.").input_ids == tokenizer.convert_tokens_to_ids(
        [*prompt.split(), *response.split()[:-1]]
    )


def test_code_continues_its_prompt_without_a_space_that_nobody_wrote():
    tokenizer = family("llama2")
    _, response = tokens(tokenizer, "def f(x):\n", "  be\n", max_response=9)
    assert response == "▁ ▁be <0x0A> </s>"
    _, response = tokens(tokenizer, "Answer:", "blue")
    assert not response.startswith("▁")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_probes_of_other_tokenizers_change_nothing(name):
    tokenizer = family(name)
    assert bool(sft.conventions(tokenizer).newline) == (name in ("llama2", "mistral"))
    texts = [" blue dog.", "blue", "\n\n  blue", "", "\nred"]
    if name not in ("llama2", "mistral"):
        assert (
            sft.text_ids(texts, tokenizer) == tokenizer(texts, add_special_tokens=False).input_ids
        )


def test_the_toys_tokenizers_have_the_conventions_of_before():
    for task, text in (("toy", "my red cat. so"), ("toy-code", "def f(x):\n    return x")):
        tokenizer = sft.small_tokenizer(task, [text])
        found = sft.conventions(tokenizer)
        assert (found.begin, found.ends, found.newline) == ([], [tokenizer.eos_token_id], [])
        assert tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_are_spelled_out_are_text(name):
    tokenizer = family(name)
    for spelled in FAMILIES[name][1]:
        if spelled == "<unk>":
            continue
        row = {"prompt": f"red {spelled} cat", "response": f" the tag {spelled} ends it"}
        (ids,) = sft.encode([row], tokenizer, Config())
        control = tokenizer.convert_tokens_to_ids(spelled)
        inside = ids["prompt"][len(sft.conventions(tokenizer).begin) :] + ids["response"][:-1]
        assert control not in inside
        assert tokenizer.decode(ids["response"][:-1]).strip() == row["response"].strip()


def test_a_word_that_is_a_control_token_in_every_spelling_is_left_out():
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert tokens(tokenizer, "a </s> b", "a </s> b") == ("a b", "a b </s>")


# Chat templates

ASKED = [turn("user", "red cat?")]


@pytest.mark.parametrize(
    ("name", "prompt", "response"),
    [
        ("llama2", "<s> [INST] red cat? [/INST]", "▁blue ▁dog. </s>"),
        ("mistral", "<s> [INST] red cat? [/INST]", "▁blue ▁dog. </s>"),
        (
            "llama3",
            "<|begin_of_text|> <|start_header_id|>user<|end_header_id|>\n\nred cat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "blue Ġdog . <|eot_id|>",
        ),
        (
            "gemma",
            "<bos> <start_of_turn>user\nred cat?<end_of_turn>\n<start_of_turn>model\n",
            "blue ▁dog. <end_of_turn>",
        ),
        (
            "qwen",
            "<|im_start|>user\nred cat?<|im_end|>\n<|im_start|>assistant\n",
            "blue Ġdog . <|im_end|>",
        ),
        (
            "smollm",
            "<|im_start|>user\nred cat?<|im_end|>\n<|im_start|>assistant\n",
            "blue Ġdog . <|im_end|>",
        ),
    ],
)
def test_a_chat_begins_once_and_its_answer_ends_as_the_template_ends_turns(name, prompt, response):
    tokenizer = family(name)
    (ids,) = sft.encode(
        [sft.read_row({"messages": [*ASKED, turn("assistant", "blue dog.")]})], tokenizer, Config()
    )
    wanted = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ids["prompt"] == wanted
    first, _, rest = prompt.partition(" ") if name not in ("qwen", "smollm") else ("", "", prompt)
    assert (ids["prompt"][:1] == [tokenizer.convert_tokens_to_ids(first)]) == bool(first)
    assert tokenizer.decode(ids["prompt"][bool(first) :]) == rest
    got = " ".join(tokenizer.convert_ids_to_tokens(ids["response"]))
    assert got == response
    text = {"prompt": " Human: red cat? Assistant:", "response": " blue dog."}
    assert sft.encode([text], tokenizer, Config(chat_template=True)) == [ids]


def test_the_end_of_turn_that_the_template_writes_ends_a_response_too():
    tokenizer = family("gemma")
    found = sft.conventions(tokenizer, tiny_model(900, [1]))
    assert tokenizer.convert_ids_to_tokens(found.ends) == ["<eos>", "<end_of_turn>"]
    assert tokenizer.convert_ids_to_tokens([found.end, found.turn_end]) == [
        "<eos>",
        "<end_of_turn>",
    ]


def test_no_text_opens_or_closes_a_turn():
    for name in ("gemma", "llama3", "qwen"):
        tokenizer = family(name)
        spelled = "".join(FAMILIES[name][1])
        said = [
            turn("user", "red " + spelled),
            turn("assistant", "so"),
            turn("user", spelled + " why"),
        ]
        plain = [turn("user", "red "), turn("assistant", "so"), turn("user", " why")]
        (ids, wanted) = sft.encode(
            [sft.read_row({"prompt": turns}) for turns in (said, plain)],
            tokenizer,
            Config(),
            ["prompt"],
        )
        control = sft.conventions(tokenizer).control
        inside, outside = ([i for i in row["prompt"] if i in control] for row in (ids, wanted))
        assert inside == outside
        assert spelled in tokenizer.decode(ids["prompt"])


@pytest.mark.parametrize("name", ["llama2", "gemma", "llama3"])
def test_system_text_has_its_role_or_the_front_of_the_users_turn(name):
    tokenizer = family(name)
    rows = [
        sft.read_row({"prompt": [turn("system", "be kind"), *ASKED]}),
        {"prompt": "System: be kind\n\nHuman: red cat?\n\nAssistant:"},
    ]
    own = [turn("system", "be kind"), *ASKED]
    wanted = own if name == "llama3" else [turn("user", "be kind\n\nred cat?")]
    ids = tokenizer.apply_chat_template(wanted, add_generation_prompt=True, return_dict=False)
    for row in sft.encode(rows, tokenizer, Config(chat_template=True), ["prompt"]):
        assert row["prompt"] == ids


def test_system_text_that_a_template_leaves_out_in_silence_goes_to_the_user():
    tokenizer = family("qwen")
    tokenizer.chat_template = CHATML.replace(
        "{{ '<|im_start|>' + m", "{{ '' if m.role == 'system' else '<|im_start|>' + m"
    )
    (ids,) = sft.encode(
        [sft.read_row({"prompt": [turn("system", "be kind"), *ASKED]})],
        tokenizer,
        Config(),
        ["prompt"],
    )
    assert "be kind\n\nred cat?" in tokenizer.decode(ids["prompt"])


def test_a_dialogue_that_the_template_refuses_is_named(capsys):
    row = sft.read_row({"messages": [turn("assistant", "so"), *ASKED, turn("assistant", "blue")]})
    line = stops(capsys, sft.encode, [row], family("gemma"), Config())
    assert "Assistant: so" in line
    assert "roles must alternate" in line
    tokens(family("llama3"), row, None)  # this one does not mind


def test_without_a_template_turns_are_text_and_the_flag_is_refused(capsys):
    tokenizer = family("gpt2")
    row = sft.read_row({"messages": [*ASKED, turn("assistant", "blue")]})
    (ids,) = sft.encode([row], tokenizer, Config())
    assert tokenizer.decode(ids["prompt"]) == "\n\nHuman: red cat?\n\nAssistant:"
    assert tokenizer.decode(ids["response"]) == " blue<|endoftext|>"
    assert "has none" in stops(capsys, sft.announce, tokenizer, Config(chat_template=True))


def test_a_header_that_only_whole_turns_have_ends_the_prompt():
    tokenizer = family("qwen")
    thoughts = "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content"
    tokenizer.chat_template = CHATML.replace("m.content", thoughts)
    prompt, response = tokens(tokenizer, "red cat?", "blue dog.", chat_template=True)
    assert "".join(prompt.split()).endswith("<think>ĊĊ</think>ĊĊ")
    assert response == "blue Ġdog . <|im_end|>"


# Several ends, PAD, embeddings without a token, what is said, and what is found again


def test_every_end_of_the_tokenizer_and_of_generation_config_counts(tmp_path, capsys):
    tokenizer = family("llama3")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    tokenizer.chat_template = None
    model = tiny_model(len(tokenizer), [tokenizer.eos_token_id, eot])
    assert sft.conventions(tokenizer, model).ends == [tokenizer.eos_token_id, eot]
    sft.announce(tokenizer, Config())
    said = "prompt begins <|begin_of_text|>; "
    said += "ends with any of <|end_of_text|>, <|eot_id|>; template: none"
    assert capsys.readouterr().out == said + "\n"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = hf.AutoTokenizer.from_pretrained(tmp_path)  # as reward.py does, without a model
    assert sft.conventions(again) == tokenizer.conventions


def test_what_is_decided_is_said_in_one_line(capsys):
    sft.announce(family("llama2"), Config(chat_template=True))
    sft.announce(family("qwen"), Config())
    sft.announce(family("gpt2"), Config())
    assert capsys.readouterr().out.splitlines() == [
        "prompt begins <s>; ends with any of </s>; template: the tokenizer's",
        "prompt begins with its first word; ends with any of <|im_end|>; "
        "template: the tokenizer's, for rows of turns",
        "prompt begins with its first word; ends with any of <|endoftext|>; template: none",
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_pad_is_none_of_the_ends(name):
    tokenizer = family(name)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(FAMILIES[name][1][0])]
    found = sft.conventions(tokenizer, tiny_model(900, ends))
    assert tokenizer.pad_token_id not in found.ends
    assert set(ends) <= set(found.ends)


def test_no_end_at_all_is_refused(capsys):
    tokenizer = family("gpt2")
    tokenizer.eos_token = None
    assert "no EOS token" in stops(capsys, sft.conventions, tokenizer)


@pytest.mark.parametrize(("name", "own_pad"), [("qwen", False), ("gpt2", True)])
def test_ids_without_a_token_are_impossible_and_everything_else_stays(name, own_pad):
    tokenizer = family(name)
    model = tiny_model(700)
    count = len(tokenizer)
    sft.conventions(tokenizer, model)
    assert (tokenizer.pad_token_id == count) == own_pad  # a PAD of ours: nobody has trained it
    sft.fit_vocabulary(model, tokenizer)
    assert model.unused_ids == list(range(count, 700))
    batch = sft.make_batch([[1, 2], [3]], [[4, 5], [6]], tokenizer.pad_token_id, "cpu")
    probs = sft.response_logits(model, batch).softmax(-1)  # [B, T, V]
    assert not probs[..., count:].any()
    loss = sft.sft_loss(model, batch, 3)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.unused_ids = []
    free = sft.response_logits(model, batch)[..., :count].softmax(-1)  # [B, T, count]
    assert torch.allclose(probs[..., :count], free)


def test_a_tokenizer_with_more_tokens_than_embeddings_gets_room():
    tokenizer = family("gpt2")
    model = tiny_model(len(tokenizer) - 5)
    sft.conventions(tokenizer, model)
    sft.fit_vocabulary(model, tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.unused_ids == [tokenizer.pad_token_id]  # a PAD of ours: nobody has trained it


# Rows that cannot be used as tokens


def test_chats_that_are_too_long_are_dropped_and_counted_and_texts_are_cut(capsys):
    tokenizer = family("qwen")
    rows = [
        sft.read_row({"messages": [*ASKED, turn("assistant", "so")]}),
        {"prompt": "red " * 99, "response": " a"},
    ]
    cfg = Config(max_prompt=10)
    assert sft.usable_rows(rows, tokenizer, cfg) == rows[1:]
    said = capsys.readouterr().out
    assert "1 of 2 rows dropped: a chat's prompt longer than --max_prompt 10" in said
    assert "1 of 2 texts 'prompt' are cut to --max_prompt 10" in said
    assert len(sft.encode(rows, tokenizer, cfg)[1]["prompt"]) == 10
    assert "none of the rows" in stops(capsys, sft.usable_rows, rows[:1], tokenizer, cfg)


def test_pairs_that_are_equal_once_cut_are_dropped_and_counted(capsys):
    names = ("prompt", "chosen", "rejected")
    rows = [
        dict(zip(names, ("a", " the red cat", " the red dog"), strict=True)),
        dict(zip(names, ("a", " red cat", " blue dog"), strict=True)),
        dict(zip(names, ("a", " the red", " the red dog"), strict=True)),  # with its EOS it differs
    ]
    tokenizer = family("gpt2")
    assert sft.usable_rows(rows, tokenizer, Config(max_response=2, task="hh"), names) == rows[1:2]
    assert (
        "2 of 3 rows dropped: a pair that is equal once cut to --max_response 2"
        in capsys.readouterr().out
    )
    assert sft.usable_rows(rows, tokenizer, Config(max_response=3, task="hh"), names) == rows


def test_a_limit_that_would_cut_the_instruction_is_refused(capsys):
    rows = [{"prompt": "red cat? Assistant:", "response": " a"}]
    tokenizer = family("gpt2")
    assert "'Assistant:'" in stops(capsys, sft.usable_rows, rows, tokenizer, Config(max_prompt=1))
