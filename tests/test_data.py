"""Chapter 1, rows: every published schema, files that are broken, the split, chat templates, presets."""

import gzip
import json
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ma_ppo
import reward
import sft
from sft import Config, read_row

SHARED = Path(__file__).parents[2] / "shared" / "data"
DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"


@pytest.fixture(autouse=True)
def fresh_rows():
    """Rows are kept by file name; a test's file may have changed."""
    sft.load_rows.cache_clear()


def stops(capsys, call, *arguments):
    """Run something that must end the program; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# A row of each published schema


def tldr_pair(choice, **info):
    info = {"post": " My cat sleeps. ", "title": "cat", "subreddit": "pets"} | info
    return {"info": info, "summaries": [{"text": " it sleeps "}, {"text": "dogs"}], "choice": choice}


def test_a_tldr_preference_puts_the_post_between_subreddit_and_tldr_and_the_choice_first():
    prompt = "POST Subreddit: r/pets My cat sleeps. TL;DR:"
    first = {"prompt": prompt, "response": " it sleeps", "chosen": " it sleeps", "rejected": " dogs"}
    assert read_row(tldr_pair(0)) == first
    other = {"response": " dogs", "chosen": " dogs", "rejected": " it sleeps"}
    assert read_row(tldr_pair(1)) == first | other


def test_a_tldr_demonstration_has_no_pair():
    row = {"post": "My cat sleeps.", "summary": "it sleeps", "subreddit": "pets", "title": "cat", "id": "7"}
    prompt = "POST Subreddit: r/pets My cat sleeps. TL;DR:"
    assert read_row(row) == {"prompt": prompt, "response": " it sleeps"}


def test_a_news_article_among_tldrs_posts_is_dropped():
    assert read_row(tldr_pair(0, post=None, article="news")) == "not about a Reddit post"


def webgpt(score_0, score_1, answer_0="Blue [1][2].", answer_1="Red [3, 4], see a[0]."):
    row = {"question": {"dataset": "eli5", "id": "1", "full_text": "Which colour?"}}
    return row | {"answer_0": answer_0, "answer_1": answer_1, "score_0": score_0, "score_1": score_1}


def test_a_webgpt_comparison_prefers_the_higher_score_and_loses_its_citation_marks():
    row = read_row(webgpt(-1, 0.5))
    assert row["prompt"] == " Human: Which colour? Assistant:"
    assert (row["chosen"], row["rejected"], row["response"]) == (" Red, see a.", " Blue.", " Red, see a.")
    assert read_row(webgpt(0.1, 0))["chosen"] == " Blue."


def test_a_tie_in_webgpts_scores_is_dropped():
    assert read_row(webgpt(0.0, 0)) == "equal scores"


def apps(**fields):
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    row = {"question": "Add 1.", "starter_code": "", "solutions": json.dumps(["print(2)\n", "x"])}
    return row | {"input_output": json.dumps(tests), "difficulty": "interview"} | fields


def test_an_apps_problem_ends_in_answer_and_keeps_its_unit_tests():
    row = read_row(apps())
    assert row["prompt"] == "QUESTION:\nAdd 1.\n\nUse Standard Input format\nANSWER:"
    assert row["response"] == "\nprint(2)"
    assert reward.program_rewards([row["response"]], [row["problem"]]) == [1.0]
    assert row["problem"]["difficulty"] == "interview"


def test_a_call_based_problem_shows_its_starter_code():
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2]}
    row = read_row(apps(input_output=json.dumps(tests), starter_code="def f(x):"))
    assert row["prompt"] == "QUESTION:\nAdd 1.\ndef f(x):\nUse Call-Based format\nANSWER:"
    assert reward.program_rewards(["def f(x): return x + 1"], [row["problem"]]) == [1.0]


@pytest.mark.parametrize("solutions", ["", "[]", None])
def test_a_problem_without_solution_serves_ppo_only(solutions):
    assert set(read_row(apps(solutions=solutions))) == {"prompt", "problem"}


@pytest.mark.parametrize("tests", ["", "{}", None, '{"inputs": [], "outputs": []}'])
def test_a_problem_without_unit_tests_is_dropped(tests):
    assert read_row(apps(input_output=tests)) == "no unit tests"


def test_a_whole_dialogue_is_cut_behind_its_last_assistant():
    row = read_row({"chosen": DIALOGUE + " see you ", "rejected": DIALOGUE + " no"})
    assert row == {"prompt": DIALOGUE, "response": " see you", "chosen": " see you", "rejected": " no"}


def test_a_pair_with_its_own_prompt_keeps_it():
    row = read_row({"prompt": DIALOGUE + " ", "chosen": "see you", "rejected": " no"})
    assert row == {"prompt": DIALOGUE, "response": " see you", "chosen": " see you", "rejected": " no"}


@pytest.mark.parametrize("change", [("bye", "stay"), ("bye", "bye\n\nAssistant: no\n\nHuman: why?")])
def test_a_pair_about_two_prompts_is_dropped(change):
    row = {"chosen": DIALOGUE + " see you", "rejected": DIALOGUE.replace(*change) + " no"}
    assert read_row(row) == "a pair about two prompts"


def test_rows_of_your_own_need_a_prompt_only():
    assert read_row({"prompt": "Hi. "}) == {"prompt": "Hi."}
    assert read_row({"prompt": "Hi.", "response": "ho"}) == {"prompt": "Hi.", "response": " ho"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " "},
        {"prompt": "Hi.", "response": "\n"},
        {"prompt": DIALOGUE, "chosen": "", "rejected": "no"},
        {"chosen": DIALOGUE + "  ", "rejected": DIALOGUE + " no"},
        webgpt(1, 0, answer_1=" [1]"),
        {"post": "", "subreddit": "pets", "summary": ""},
    ],
)
def test_an_empty_text_is_dropped(row):
    assert read_row(row) == "an empty text"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([1, 2], "list"),
        (7, "int"),
        ({"text": "a"}, "no known schema"),
        ({"chosen": "a"}, "'rejected' is missing"),
        ({"rejected": "a"}, "'chosen' is missing"),
        ({"chosen": ["a"], "rejected": "a"}, "'chosen' must be a text"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' must be a text, got None"),
        ({"chosen": "no turns", "rejected": "b"}, "Assistant:"),
        ({"prompt": "a", "response": 3}, "'response' must be a text, got 3"),
        (tldr_pair(2), "'choice' must be 0 or 1"),
        (tldr_pair("1"), "'choice' must be a int"),
        (tldr_pair(True), "'choice' must be a int"),
        (tldr_pair(0, post=7), "'info.post' must be a text"),
        (tldr_pair(0) | {"summaries": [{"text": "a"}]}, "'summaries.1.text' is missing"),
        (tldr_pair(0) | {"info": None}, "'info' must be a dict"),
        (webgpt("1", 0), "'score_0' must be a number"),
        (webgpt(None, 0), "'score_0' must be a number"),
        (webgpt(1, 0, answer_0=None), "'answer_0' must be a text"),
        (webgpt(1, 0) | {"question": "Which?"}, "'question.full_text' is missing"),
        (apps(question=None), "'question' must be a text"),
        (apps(input_output="{inputs"), "not JSON"),
        (apps(solutions="[1"), "not JSON"),
    ],
)
def test_a_malformed_row_is_told_by_its_field(row, complaint):
    with pytest.raises(ValueError) as error:
        read_row(row)
    assert complaint in str(error.value)


# Files


def write_rows(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(path)


def hh_rows(count):
    prompts = [f"\n\nHuman: question {i}?\n\nAssistant:" for i in range(count)]
    return [{"chosen": f"{p} yes é\u2028\x85.", "rejected": f"{p} no"} for p in prompts]


def test_all_kinds_of_files_give_the_same_rows_and_several_files_add_up(tmp_path):
    import datasets

    rows = sft.load_rows("hh", (write_rows(tmp_path / "a.jsonl", hh_rows(30)),))
    assert len(rows) == 30
    assert rows[3]["chosen"] == " yes é\u2028\x85."
    zipped = write_rows(tmp_path / "b.jsonl.gz", ["", *hh_rows(30), " "])
    whole = write_rows(tmp_path / "c.json", [json.dumps(hh_rows(30), indent=2, ensure_ascii=False)])
    table = str(tmp_path / "d.parquet")
    datasets.Dataset.from_list(hh_rows(30)).to_parquet(table)
    for path in (zipped, whole, table):
        assert sft.load_rows("hh", (path,)) == rows, path
    assert sft.load_rows("hh", (zipped, whole)) == rows * 2


def test_parquet_keeps_nested_fields(tmp_path):
    import datasets

    path = str(tmp_path / "a.parquet")
    table = [tldr_pair(i % 2, post=f"post {i}") for i in range(30)]
    datasets.Dataset.from_list(table).to_parquet(path)
    assert sft.load_rows("tldr", (path,)) == [read_row(row) for row in table]


def test_a_changed_file_is_read_anew(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", hh_rows(30))
    assert len(sft.load_rows("hh", (path,))) == 30
    sft.load_rows.cache_clear()
    write_rows(tmp_path / "a.jsonl", hh_rows(40))
    assert len(sft.load_rows("hh", (path,))) == 40


@pytest.mark.parametrize("bad", ["{nonsense", {"chosen": "a"}, "[1, 2]", "7", '{"chosen": NaN}'])
def test_a_bad_row_stops_the_run_with_file_and_line_or_is_skipped_and_counted(tmp_path, capsys, bad):
    path = write_rows(tmp_path / "bad.jsonl", [*hh_rows(20), bad, *hh_rows(21)])
    line = stops(capsys, sft.load_rows, "hh", (path,))
    assert f"{path}:21: " in line
    assert "--skip_bad_rows" in line
    assert len(sft.load_rows("hh", (path,), True)) == 41
    assert "hh: 1 rows dropped: malformed" in capsys.readouterr().out


def test_a_bad_row_of_a_json_or_parquet_file_is_named_by_its_number(tmp_path, capsys):
    import datasets

    rows = [*hh_rows(2), {"chosen": "a", "rejected": None}]
    path = write_rows(tmp_path / "a.json", [json.dumps(rows)])
    assert f"{path}: row 3: field 'rejected'" in stops(capsys, sft.load_rows, "hh", (path,))
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert f"{path}: row 3: field 'rejected'" in stops(capsys, sft.load_rows, "hh", (path,))


def test_dropped_rows_are_counted_by_reason(tmp_path, capsys):
    rows = [*hh_rows(20), {"prompt": "a", "chosen": "", "rejected": "b"}, webgpt(1, 1), webgpt(2, 2)]
    sft.load_rows("hh", (write_rows(tmp_path / "a.jsonl", rows),))
    said = capsys.readouterr().out
    assert "20 rows" in said
    assert "hh: 1 rows dropped: an empty text" in said
    assert "hh: 2 rows dropped: equal scores" in said


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.jsonl", None, "missing.jsonl cannot be read"),
        ("nil.jsonl", b"", "is empty"),
        ("nil.json", b"", "is empty"),
        ("nil.jsonl.gz", gzip.compress(b""), "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("cut.jsonl.gz", gzip.compress(b"abc" * 1000)[:30], "cut.jsonl.gz cannot be read"),
        ("no.jsonl.gz", b"no gzip", "no.jsonl.gz cannot be read"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "UnicodeDecodeError"),
        ("no.parquet", b"no parquet", "no.parquet cannot be read"),
        ("torn.json", b'[{"prompt": "a"}', "not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert complaint in stops(capsys, sft.load_rows, "plain", (str(tmp_path / name),))


def test_too_few_prompts_to_split_are_refused(tmp_path, capsys):
    path = write_rows(tmp_path / "few.jsonl", hh_rows(19))
    assert "fewer than 20" in stops(capsys, sft.load_rows, "hh", (path,))


def test_without_network_the_message_names_the_file_option(capsys, monkeypatch):
    monkeypatch.setitem(sft.HUB, "hh", "nobody/nothing/none.jsonl")
    assert "--data FILE" in stops(capsys, sft.load_rows, "hh")


def test_a_chapter_whose_share_has_no_fitting_rows_says_so(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"question {i}"} for i in range(30)])
    cfg = Config(task="plain", data=[path])
    assert "no rows with response" in stops(capsys, sft.load_share, cfg, "sft", "response")
    assert len(sft.load_share(cfg, "ppo")) == 11  # 40 % of 90 % of 30
    cfg.split = [0, 0, 100]
    assert len(sft.load_share(cfg, "ppo")) == 27


@pytest.mark.parametrize("split", [["50", "50"], ["9", "9", "9"], ["-9", "9", "100"], ["nan", "50", "50"]])
def test_a_split_that_is_none_is_refused(capsys, split):
    assert "--split" in stops(capsys, sft.parse, Config, "sft", ["--split", *split])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not part of this repository")
@pytest.mark.parametrize(
    ("task", "file", "rows"),
    [
        ("webgpt", "webgpt-like/comparisons.jsonl.gz", 2616),
        ("hh", "hh-rlhf/harmless-base-test.jsonl.gz", 2302),
        ("apps", "apps-like/train.jsonl", 238),
    ],
)
def test_real_files_are_read(task, file, rows):
    found = sft.load_rows(task, (str(SHARED / file),))
    assert len(found) == rows
    assert all(row["response"].strip() and row["prompt"].endswith(sft.INSTRUCTIONS) for row in found)
    if task == "apps":
        right = reward.program_rewards([r["response"] for r in found[:8]], [r["problem"] for r in found[:8]])
        assert right == [1.0] * 8


# Lengths and chat templates

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ ' [' + m.role + '] ' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' [assistant]' }}{% endif %}"
)


@pytest.fixture
def words():
    """A tokenizer of single words, with the chat template above."""
    marks = ["<pad>", "<eos>", "<unk>", "<s>", "[user]", "[assistant]", "Human:", "Assistant:"]
    vocabulary = [*marks, *"abcdefghij"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(tokenizer, prompt, limit, response=" a"):
    cfg = Config(max_prompt=limit, chat_template=True)
    (row,) = sft.encode([{"prompt": prompt, "response": response}], tokenizer, cfg)
    return " ".join(tokenizer.convert_ids_to_tokens(row["prompt"])), row["response"]


def test_the_chat_template_wraps_a_prompt_and_the_response_follows_without_space(words):
    prompt, response = chat(words, "a b c", 99)
    assert prompt == "<s> [user] a b c [assistant]"
    assert response == [words.convert_tokens_to_ids("a"), words.eos_token_id]


def test_a_dialogue_becomes_turns_that_alternate(words):
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nHuman: d\n\nAssistant:"
    assert [m["content"] for m in sft.dialogue(text)] == ["a", "b", "c\n\nd"]
    assert chat(words, text, 99)[0] == "<s> [user] a [assistant] b [user] c d [assistant]"
    assert sft.dialogue("a Human: b Assistant: c") == [{"role": "user", "content": "a Human: b Assistant: c"}]


@pytest.mark.parametrize("limit", range(3, 15))
def test_a_long_chat_loses_its_oldest_turns_and_then_its_first_words_never_its_template(words, limit):
    text = "\n\nHuman: a b\n\nAssistant: c d\n\nHuman: e f g h i\n\nAssistant:"
    got = chat(words, text, limit)[0].split()
    if limit == 14:
        assert " ".join(got) == "<s> [user] a b [assistant] c d [user] e f g h i [assistant]"
    else:
        kept = min(5, limit - 3)
        assert got == ["<s>", "[user]", *"efghi"[5 - kept :], "[assistant]"]
    assert len(got) <= limit


def test_a_limit_below_the_empty_template_is_refused(words, capsys):
    assert "3 tokens" in stops(capsys, chat, words, "a b c", 2)


def test_a_limit_that_would_cut_the_instruction_is_refused_and_other_cuts_are_counted(words, capsys):
    rows = [
        {"prompt": "a b c Assistant:", "response": " a"},
        {"prompt": "Assistant:", "response": " a b c d"},
    ]
    sft.report_cuts(rows, words, Config(max_prompt=3, max_response=4))
    said = capsys.readouterr().out
    assert "1 of 2 texts 'prompt' are cut to --max_prompt 3" in said
    assert "1 of 2 texts 'response' are cut to --max_response 4" in said
    assert "'Assistant:'" in stops(capsys, sft.report_cuts, rows, words, Config(max_prompt=0))


# Settings


def test_epochs_set_the_number_of_steps():
    assert sft.count_steps(Config(epochs=3, batch_size=64), 1000) == round(3000 / 64)
    assert sft.count_steps(Config(steps=7), 1000) == 7
    assert sft.count_steps(Config(epochs=0.001, batch_size=64), 1000) == 1


@pytest.mark.parametrize("name", sft.PAPER)
def test_every_preset_sets_every_chapter_and_flags_override_it(name):
    flags = ["--preset", name, "--seed", "3", "--max_response", "99"]
    chapters = [sft.parse(module.Config, module.__name__, flags) for module in (sft, reward, ma_ppo) if
                not (module is reward and name.endswith("apps"))]  # fmt: skip
    for cfg in chapters:
        assert (cfg.task, cfg.seed, cfg.max_response) == (name.rsplit("-", 1)[1], 3, 99)
        assert cfg.model == sft.PAPER[name][0]
        assert cfg.epochs >= 1
        assert math.isclose(sum(cfg.split), 100)
    ppo = chapters[-1]
    assert (ppo.clip, ppo.lam, ppo.gamma, ppo.top_p, ppo.ppo_epochs) == (0.2, 0.95, 1.0, 1.0, 1)


def test_presets_hold_the_papers_values():
    ppo = sft.parse(ma_ppo.Config, "ma_ppo", ["--preset", "gemma-7b-webgpt"])
    assert (ppo.batch_size, ppo.lr, ppo.critic_lr, ppo.beta, ppo.warmup) == (256, 1e-6, 1e-6, 0.1, 200)
    assert (ppo.temperature, ppo.top_k, ppo.max_prompt, ppo.max_response, ppo.n) == (0.8, 50, 512, 512, 5)
    code = sft.parse(ma_ppo.Config, "ma_ppo", ["--preset", "codegemma-7b-apps"])
    assert (code.batch_size, code.lr, code.critic_lr, code.warmup) == (16, 5e-7, 5e-5, 20)
    assert (code.temperature, code.top_k, code.max_prompt, code.n) == (1.0, 5, 600, 10)
    first = sft.parse(Config, "sft", ["--preset", "gemma-2b-tldr"])
    assert (first.batch_size, first.lr, first.epochs, first.warmup) == (512, 5e-5, 3, 0.1)
    rm = sft.parse(reward.Config, "reward", ["--preset", "gemma-7b-tldr"])
    assert (rm.batch_size, rm.lr, rm.epochs) == (128, 1e-6, 1)


def test_an_unknown_preset_or_task_is_refused(capsys):
    assert "gemma-2b-tldr" in stops(capsys, sft.parse, Config, "sft", ["--preset", "gemma-3b"])
    assert "choose from toy" in stops(capsys, sft.parse, Config, "sft", ["--task", "chess"])
    assert "--data" in stops(capsys, sft.parse, Config, "sft", ["--task", "plain"])
    assert "--data" in stops(capsys, sft.parse, Config, "sft", ["--data", "a.jsonl"])
