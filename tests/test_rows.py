"""Chapter 1, Appendices D and E: how rows become texts, and texts the tokens of any model.

The tokenizers are tiny, and otherwise like those of seven families of models: the same steps, end
marks and templates of the same shape. Tokens are shown as texts; ▁ and Ġ are spaces.
"""

import gzip
import json

import pytest
import transformers as hf
from test_sft import stops
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

import sft
from sft import Config, turn

TEXT = "red cat? Answer: blue dog. the tag ends it be kind why so def f(x): x return"
RAISE = "{{ raise_exception('roles must alternate') }}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + RAISE + "{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}" + ALTERNATE
INST += "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
INST += "' ' + m.content + eos_token }}{% endfor %}"
TURNS = "{% for m in messages %}{{ open + m.role + head + m.content + close }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ open + 'assistant' + head }}{% endif %}"
CHATML = "{% set open, head, close = '<|im_start|>', '\\n', '<|im_end|>\\n' %}" + TURNS
LLAMA3 = (
    "{% set open, head, close = '<|start|>', '<|head|>\\n\\n', '<|eot|>' %}{{ bos_token }}" + TURNS
)
GEMMA = "{% set open, head, close = '<turn>', '\\n', '<end_of_turn>\\n' %}{{ bos_token }}"
GEMMA += TURNS.replace("{{ open + m", ALTERNATE + "{{ open + m")
# name: (▁ in front of texts, or None: bytes; BOS, EOS, PAD, other special tokens; template)
FAMILIES = {
    "llama2": (True, "<s>", "</s>", None, [], INST),
    "mistral": (True, "<s>", "</s>", "</s>", [], INST),
    "gemma": (False, "<bos>", "<eos>", "<pad>", ["<turn>", "<end_of_turn>"], GEMMA),
    "llama3": (None, "<|begin|>", "<|end|>", None, ["<|start|>", "<|head|>", "<|eot|>"], LLAMA3),
    "qwen": (None, None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], CHATML),
    "smollm": (None, "<|im_start|>", "<|im_end|>", "<|im_end|>", [], CHATML),
    "gpt2": (None, None, "<|endoftext|>", None, [], None),
}


def pieces_of_words(prefix):
    """As SentencePiece: words behind ▁, other letters as bytes; prefix: ▁ before every text."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    pieces += [*TEXT.split(), *("▁" + word for word in TEXT.split())]
    scores = [(piece, -1.0) for piece in dict.fromkeys(pieces)]  # as few pieces as possible
    core = Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps)
    return core


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name, more ends): a tokenizer, loaded from its folder."""

    def load(name, ends=()):
        prefix, bos, eos, pad, others, template = FAMILIES[name]
        if prefix is None:
            core = sft.small_tokenizer("plain", [*TEXT.split(), TEXT] * 2).backend_tokenizer
        else:
            core = pieces_of_words(prefix)
        special = [*dict.fromkeys(filter(None, [bos, eos, pad, *others]))]
        core.add_special_tokens([AddedToken(token, special=True) for token in special])
        if bos and name != "smollm":
            ids = [(bos, core.token_to_id(bos))]
            core.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=ids)
        names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **names)
        tokenizer.chat_template = template
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folder)
        ends = {"eos_token_id": tokenizer.convert_tokens_to_ids([*ends])}
        (folder / "config.json").write_text("{}")
        (folder / "generation_config.json").write_text(json.dumps(ends))
        return sft.load_tokenizer(str(folder))

    return load


def texts(tokenizer, ids):
    """Token ids as texts, joined by spaces."""
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def tokens(tokenizer, row, **settings):
    """(prompt, response) of a row as texts of tokens."""
    (ids,) = sft.encode([row], tokenizer, Config(**settings))
    return texts(tokenizer, ids["prompt"]), texts(tokenizer, ids["response"])


# Tokens

ROW = {"prompt": "red cat? Answer:", "response": " blue dog."}
ASKED = [turn("user", "red cat?")]
WORKED = [
    ("llama2", "<s> ▁red ▁cat? ▁Answer: ▁blue ▁dog.", "</s>"),
    ("mistral", "<s> ▁red ▁cat? ▁Answer: ▁blue ▁dog.", "</s>"),
    ("gemma", "<bos> red ▁cat? ▁Answer: ▁blue ▁dog.", "<eos>"),
    ("llama3", "<|begin|> red Ġcat ? ĠAnswer : Ġblue Ġdog .", "<|end|>"),
    ("qwen", "red Ġcat ? ĠAnswer : Ġblue Ġdog .", "<|im_end|>"),
    ("smollm", "red Ġcat ? ĠAnswer : Ġblue Ġdog .", "<|im_end|>"),
    ("gpt2", "red Ġcat ? ĠAnswer : Ġblue Ġdog .", "<|endoftext|>"),
]


@pytest.mark.parametrize(("name", "whole", "end"), WORKED)
def test_prompt_and_response_are_the_tokens_of_one_text_and_one_end(family, name, whole, end):
    tokenizer = family(name)
    prompt, response = tokens(tokenizer, ROW)
    assert f"{prompt} {response}" == f"{whole} {end}"
    assert response.startswith(("▁blue", "Ġblue"))
    assert texts(tokenizer, tokenizer(ROW["prompt"] + ROW["response"]).input_ids) == whole
    assert tokenizer.pad_token_id not in (None, *tokenizer.ends)


CHATS = [
    ("llama2", "▁blue ▁dog. </s>"),
    ("gemma", "blue ▁dog. <end_of_turn>"),
    ("llama3", "blue Ġdog . <|eot|>"),
    ("qwen", "blue Ġdog . <|im_end|>"),
]


@pytest.mark.parametrize(("name", "response"), CHATS)
def test_a_chat_begins_once_and_its_answer_ends_as_the_template_ends_turns(family, name, response):
    tokenizer = family(name)
    row = sft.plain_row({"messages": [*ASKED, turn("assistant", "blue dog.")]})
    (ids,) = sft.encode([row], tokenizer, Config())
    wanted = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert (ids["prompt"], texts(tokenizer, ids["response"])) == (wanted, response)
    assert ids["prompt"].count(tokenizer.bos_token_id) == (name != "qwen")
    text = {"prompt": " Human: red cat? Assistant:", "response": " blue dog."}
    assert sft.encode([text], tokenizer, Config(chat_template=True)) == [ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_that_are_spelled_out_are_text(family, name):
    tokenizer = family(name)
    for number, token in tokenizer.added_tokens_decoder.items():
        row = {"prompt": f"red {token} cat", "response": f" the tag {token} ends it"}
        (ids,) = sft.encode([row], tokenizer, Config())
        assert ids["response"][-1] in tokenizer.ends
        assert number not in ids["prompt"][1:] + ids["response"][:-1]
        assert tokenizer.decode(ids["response"][:-1]).strip() == row["response"].strip()


@pytest.mark.parametrize("name", ["gemma", "llama3", "qwen"])
def test_no_text_opens_or_closes_a_turn(family, name):
    tokenizer = family(name)
    special, counts = tokenizer.added_tokens_decoder, []
    for spelled in ("", "".join(map(str, special.values()))):
        said = [turn("user", "red " + spelled), turn("assistant", "so" + spelled + " it")]
        (ids,) = sft.encode([sft.plain_row({"messages": said})], tokenizer, Config())
        both = ids["prompt"] + ids["response"]
        assert spelled in tokenizer.decode(both)
        counts.append(sum(i in special for i in both))
    assert counts[0] == counts[1]


def test_code_continues_its_prompt_without_a_space_that_nobody_wrote(family):
    row = {"prompt": "def f(x):\n", "response": "  return x\n"}
    assert tokens(family("llama2"), row)[1] == "▁ ▁return ▁x <0x0A> </s>"
    tokenizer, text = family("gpt2"), "def f(x): return"
    for cut in range(1, 12):  # also within words: a token spans the seam
        row = {"prompt": text[:cut], "response": text[cut:]}
        (ids,) = sft.encode([row], tokenizer, Config())
        assert tokenizer.decode(ids["prompt"] + ids["response"][:-1]) == text


def test_an_end_that_a_tokenizer_writes_behind_any_text_is_not_doubled(family):
    tokenizer = family("gpt2")
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    behind = TemplateProcessing("$A <|endoftext|>", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = behind
    assert tokens(tokenizer, ROW) == ("red Ġcat ? ĠAnswer :", "Ġblue Ġdog . <|endoftext|>")


def test_every_end_that_anything_names_counts(family):
    tokenizer = family("llama3", ["<|head|>"])  # EOS, generation_config.json, the chat template
    assert texts(tokenizer, tokenizer.ends) == "<|end|> <|head|> <|eot|>"


def test_what_is_cut_keeps_its_bos_and_the_prompts_end_but_not_the_responses(family):
    for limit, kept in ((9, "▁red ▁cat? ▁Answer:"), (4, "▁red ▁cat? ▁Answer:"), (2, "▁Answer:")):
        assert tokens(family("llama2"), ROW, max_prompt=limit)[0] == f"<s> {kept}"
    assert tokens(family("llama2"), ROW, max_prompt=1)[0] == "<s>"
    assert tokens(family("llama2"), ROW, max_response=3)[1] == "▁blue ▁dog. </s>"
    assert tokens(family("llama2"), ROW, max_response=2)[1] == "▁blue ▁dog."


@pytest.mark.parametrize("name", ["llama2", "gemma", "llama3", "silent"])
def test_system_text_has_its_role_or_the_front_of_the_users_turn(family, name):
    tokenizer = family("qwen" if name == "silent" else name)
    if name == "silent":  # a template that leaves it out, and says nothing
        skip = "m in messages if m.role != 'system' %}"
        tokenizer.chat_template = CHATML.replace("m in messages %}", skip)
    rest = [turn("assistant", "so"), turn("user", "why")]
    turns = [turn("system", "be kind"), *ASKED, *rest]
    row = sft.plain_row({"prompt": turns})
    rows = [row, {"prompt": row["prompt"].strip()}]
    wanted = turns if name == "llama3" else [turn("user", "be kind\n\nred cat?"), *rest]
    ids = tokenizer.apply_chat_template(wanted, add_generation_prompt=True, return_dict=False)
    encoded = sft.encode(rows, tokenizer, Config(chat_template=True), ["prompt"])
    assert [row["prompt"] for row in encoded] == [ids, ids]


def test_a_template_that_refuses_is_one_line_and_without_one_turns_are_text(family, capsys):
    turns = [turn("assistant", "so"), *ASKED, turn("assistant", "blue")]
    row = sft.plain_row({"messages": turns})
    line = stops(capsys, sft.encode, [row], family("gemma"), Config())
    assert "Assistant: so" in line and "roles must alternate" in line
    (ids,) = sft.encode([row], family("gpt2"), Config())
    wanted = "\n\nAssistant: so\n\nHuman: red cat?\n\nAssistant: blue<|endoftext|>"
    assert family("gpt2").decode(ids["prompt"] + ids["response"]) == wanted
    cfg = Config(chat_template=True)
    assert "--chat_template" in stops(capsys, sft.usable_rows, [ROW], family("gpt2"), cfg)


def test_what_is_no_use_as_tokens_is_left_out_and_counted(family, capsys):
    chat = sft.plain_row({"messages": [*ASKED, turn("assistant", "so")]})
    rows = [chat, ROW | {"prompt": "red " * 99}]
    cfg = Config(max_prompt=10, task="plain")
    assert sft.usable_rows(rows, family("qwen"), cfg) == rows[1:]
    assert "1 rows left out" in capsys.readouterr().out
    assert "none of the rows" in stops(capsys, sft.usable_rows, rows[:1], family("qwen"), cfg)
    names = ("prompt", "chosen", "rejected")
    answers = [(" why so", " why it"), (" be so", " why so"), (" why", " why so")]
    rows = [{"prompt": "a", "chosen": one, "rejected": other} for one, other in answers]
    cfg.max_response = 1  # the last differ in their ends alone, which are cut
    assert sft.usable_rows(rows, family("gpt2"), cfg, names) == rows[1:2]
    assert "2 rows left out" in capsys.readouterr().out
    cfg.max_response = 2
    assert sft.usable_rows(rows, family("gpt2"), cfg, names) == rows


# Rows

WHY = "\n\nHuman: why?\n\nAssistant:"
ASK, SO, NO = turn("user", "why?"), turn("assistant", "so"), turn("assistant", "no")
KIND = turn("system", "be kind")
POST = "POST Subreddit: r/pets My cat sleeps. TL;DR:"
INFO = {"subreddit": "pets", "post": " My cat sleeps. "}
TWO = [{"text": " it sleeps "}, {"text": "dogs"}]
WEBGPT = {"question": {"full_text": "Which?"}, "answer_0": "Blue [1][2].", "answer_1": "Red [3, 4]"}
TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}
CALLS = {"fn_name": "f", "inputs": [[1]], "outputs": [10**5000]}
APPS = {"question": "Add 1.", "input_output": json.dumps(TESTS), "solutions": '["a\\n", "b"]'}


def a_pair(prompt, chosen=" so", rejected=" no", **more):
    return {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected} | more


READ = [
    ("tldr", {"info": INFO, "summaries": TWO, "choice": 1}, a_pair(POST, " dogs", " it sleeps")),
    ("tldr", INFO | {"summary": "it"}, {"prompt": POST, "response": " it"}),
    ("hh", {"chosen": WHY + " so ", "rejected": WHY + " no"}, a_pair(WHY)),
    ("hh", {"prompt": WHY + " ", "chosen": "so", "rejected": " no"}, a_pair(WHY)),
    ("hh", {"chosen": WHY + " a\n\nAssistant: b", "rejected": WHY + " no"},
     a_pair(WHY, " a\n\nAssistant: b")),
    ("hh", {"chosen": WHY + " so", "rejected": WHY + " so. Assistant: yes"},
     a_pair(WHY, " so", " so. Assistant: yes")),
    ("hh", {"chosen": WHY + " so" + WHY + " so", "rejected": WHY + " so" + WHY + " no"},
     a_pair(WHY + " so" + WHY)),
    ("webgpt", WEBGPT | {"score_0": -1, "score_1": 0.5},
     a_pair(" Human: Which? Assistant:", " Red", " Blue.")),
    ("apps", APPS, {"prompt": "QUESTION:\nAdd 1.\n\nUse Standard Input format\nANSWER:",
     "response": "\na", "problem": {"input_output": TESTS, "difficulty": None}}),
    ("apps", {"question": "Add 1.", "input_output": CALLS, "starter_code": "def f(x):"},
     {"prompt": "QUESTION:\nAdd 1.\ndef f(x):\nUse Call-Based format\nANSWER:",
      "problem": {"input_output": CALLS, "difficulty": None}}),
    ("plain", {"prompt": "Hi. "}, {"prompt": "Hi. "}),
    ("plain", {"prompt": "2026-01-02"}, {"prompt": "2026-01-02"}),
    ("plain", {"prompt": "f:\n", "response": "  a\n"}, {"prompt": "f:\n", "response": "  a\n"}),
    ("plain", {"prompt": "Hi", "completion": " ho"}, {"prompt": "Hi", "response": " ho"}),
    ("plain", {"prompt": "f:\n", "chosen": "  a", "rejected": " b"}, a_pair("f:\n", "  a", " b")),
    ("plain", {"prompt": "Hi", "response": " ho", "chosen": float("nan"), "rank": -1},
     {"prompt": "Hi", "response": " ho"}),
    ("plain", {"messages": [KIND, ASK, SO], "prompt": "why?"},
     {"prompt": "\n\nSystem: be kind" + WHY, "messages": [KIND, ASK], "response": " so"}),
    ("plain", {"messages": [ASK, SO, ASK]},
     {"prompt": WHY + " so" + WHY, "messages": [ASK, SO, ASK]}),
    ("plain", {"prompt": [ASK]}, {"prompt": WHY, "messages": [ASK]}),
    ("plain", {"prompt": [ASK], "completion": [SO]},
     {"prompt": WHY, "messages": [ASK], "response": " so"}),
    ("plain", {"prompt": [ASK], "chosen": [SO], "rejected": [NO]}, a_pair(WHY, messages=[ASK])),
    ("plain", {"prompt": "why?", "chosen": [ASK, SO], "rejected": [ASK, NO], "score_chosen": 8},
     a_pair(WHY, messages=[ASK])),
    ("plain", {"prompt": "a\ud83d b\U0001f600"}, {"prompt": "a\ufffd b\U0001f600"}),
]  # fmt: skip


def load(path, task, rows):
    """Rows, some perhaps as texts, as read from a file of JSON Lines."""
    sft.load_rows.cache_clear()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return sft.load_rows(task, (str(path),))


@pytest.mark.parametrize(("task", "raw", "wanted"), READ)
def test_every_form_of_rows_becomes_texts(tmp_path, task, raw, wanted):
    (row,) = load(tmp_path / "a.jsonl", task, [raw])
    assert row.pop("raw").keys() == raw.keys() and row == wanted


@pytest.mark.parametrize(
    ("task", "raw", "reason"),
    [
        ("plain", {"prompt": "a", "chosen": "b", "rejected": "b"}, "a pair of equal texts"),
        ("plain", {"prompt": " ", "response": "b"}, "an empty text"),
        ("plain", {"chosen": [ASK, SO], "rejected": [KIND, ASK, NO]}, "a pair about two prompts"),
        (
            "hh",
            {"chosen": WHY + " so", "rejected": WHY + WHY + " no"},
            "two prompts, or a human's turn in an answer",
        ),
        ("hh", {"chosen": WHY + "  ", "rejected": WHY + " no"}, "an empty text"),
        ("webgpt", WEBGPT | {"score_0": 0.0, "score_1": 0}, "equal scores"),
        ("tldr", {"info": INFO | {"post": None}, "summaries": TWO, "choice": 1}, "no post"),
        ("apps", APPS | {"input_output": ""}, "no unit tests"),
        ("apps", APPS | {"input_output": '{"inputs": [], "outputs": []}'}, "no unit tests"),
    ],
)
def test_what_cannot_be_learned_is_left_out_and_counted(tmp_path, capsys, task, raw, reason):
    assert load(tmp_path / "a.jsonl", task, [raw, raw]) == []
    assert f"2 rows left out: {reason}\n" in capsys.readouterr().out


SPOILED = [
    ("plain", {"response": "a"}, "'prompt' is missing"),
    ("plain", {"prompt": 5}, "'prompt' must be text, got 5"),
    ("plain", {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ("plain", {"messages": [ASK, turn("cook", "a")]}, "'messages.1.role'"),
    ("plain", {"messages": [turn("user", None)]}, "'messages.0.content' must be text"),
    ("plain", '{"prompt": "a"', "delimiter"),
    ("plain", "7", "int"),
    ("hh", {"chosen": "no turns", "rejected": "b"}, "'chosen' has no 'Assistant:'"),
    ("tldr", {"info": INFO, "summaries": TWO, "choice": 2}, "'summaries.2.text' is missing"),
    ("tldr", {"info": INFO, "summaries": TWO, "choice": True}, "'choice' must be a number"),
    ("webgpt", WEBGPT | {"score_0": "1", "score_1": 0}, "'score_0' must be a number"),
    ("apps", APPS | {"input_output": CALLS | {"inputs": [1]}}, "lists of arguments"),
    ("apps", APPS | {"input_output": TESTS | {"outputs": [[1]]}}, "texts to read"),
    ("apps", APPS | {"input_output": TESTS | {"outputs": []}}, "1 inputs and 0 outputs"),
    ("apps", APPS | {"solutions": "[1"}, "delimiter"),
    ("apps", APPS | {"solutions": [3]}, "'solutions.0' must be text"),
]


@pytest.mark.parametrize(("task", "raw", "complaint"), SPOILED)
def test_a_malformed_row_is_one_line_with_file_row_and_field(
    tmp_path, capsys, task, raw, complaint
):
    good = next(row for name, row, _ in READ if name == task)
    line = stops(capsys, load, tmp_path / "bad.jsonl", task, [good, good, raw, good])
    assert line.startswith(f"error: {tmp_path}/bad.jsonl, row 3: ") and complaint in line


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.jsonl", None, "No such file"),
        ("cut.jsonl.gz", gzip.compress(b"abc" * 1000)[:30], "ended before"),
        ("no.gz", b"no gzip", "gzipped"),
        ("cut.json", b'[{"prompt": "a"}', "delimiter"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "utf-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = stops(capsys, sft.load_rows, "plain", (str(tmp_path / name),))
    assert f"{tmp_path}/{name}: " in line and complaint in line


def test_all_kinds_of_files_give_the_same_rows_and_several_add_up(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    raw = [{"prompt": "é\u2028\x85", "response": " so"}]
    raw += [{"prompt": "a", "chosen": "b", "rejected": "c", "score": 1}]  # other columns
    wanted = [sft.plain_row(row) for row in raw]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in raw).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(raw, indent=2))
    table = [dict.fromkeys(raw[0] | raw[1]) | row for row in raw]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "d.parquet")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")]
    for files in (*([path] for path in paths), paths):
        rows = [row | {"raw": 0} for row in sft.load_rows("plain", tuple(files))]
        assert rows == [row | {"raw": 0} for row in wanted] * len(files)


@pytest.mark.parametrize("percent", [(20, 40, 40), (20, 0, 80)])
def test_the_shares_are_disjoint_complete_by_prompt_and_new_rows_move_none(percent):
    rows = [{"prompt": f"question {i % 1000}"} for i in range(1500)]
    more = [{"prompt": f"new {i}"} for i in range(100)]
    names, parts = ("test", "sft", "rm", "ppo"), [100, *(9 * x for x in percent)]
    shares = [sft.split(rows, name, percent) for name in names]
    assert sum(map(len, shares)) == 1500
    prompts = [{row["prompt"] for row in share} for share in shares]
    assert len(set.union(*prompts)) == 1000
    for name, mine, part in zip(names, prompts, parts, strict=True):
        assert abs(len(mine) - part) <= 4 * part**0.5  # four standard errors, at most
        grown = {row["prompt"] for row in sft.split(more[:50] + rows + more[50:], name, percent)}
        assert {prompt for prompt in grown if prompt.startswith("question")} == mine


def test_the_toys_keep_their_split():
    toys = [sft.toy_row(i) for i in range(1000)]
    assert [row["number"] for row in sft.split(toys, "test")[:5]] == [6, 11, 26, 39, 44]
    counts = [len(sft.split(toys, name)) for name in ("test", "sft", "rm", "ppo")]
    assert counts == [100, 180, 360, 360]


def test_fields_that_nothing_reads_are_named_and_kept_for_a_reward(tmp_path, capsys):
    raw = {"prompt": "a", "context": "c", "meta": {"answer": [1, {"b": 2}]}, "response": "b"}
    (row,) = load(tmp_path / "a.jsonl", "plain", [raw])
    assert "fields that only a --reward reads: context, meta\n" in capsys.readouterr().out
    assert row["raw"] == raw
    load(tmp_path / "a.jsonl", "plain", [{"prompt": [ASK], "chosen": [SO], "rejected": [NO]}])
    assert "fields" not in capsys.readouterr().out


def test_a_share_without_rows_is_one_line(tmp_path, capsys):
    cfg = Config(task="plain", data=[str(tmp_path / "a.jsonl")])
    load(tmp_path / "a.jsonl", "plain", [{"prompt": f"question {i}"} for i in range(30)])
    assert 0 < len(sft.load_share(cfg, "ppo")) < 30
    assert "no rows with response" in stops(capsys, sft.load_share, cfg, "sft", "response")
    load(tmp_path / "a.jsonl", "plain", [])
    assert "no rows with prompts" in stops(capsys, sft.load_share, cfg, "ppo")
