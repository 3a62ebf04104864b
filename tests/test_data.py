"""Chapter 1, rows: every form that people have, files that are broken, the split, presets."""

import gzip
import json
import math
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    return {
        "info": info,
        "summaries": [{"text": " it sleeps "}, {"text": "dogs"}],
        "choice": choice,
    }


def test_a_tldr_preference_puts_the_post_between_subreddit_and_tldr_and_the_choice_first():
    prompt = "POST Subreddit: r/pets My cat sleeps. TL;DR:"
    first = {
        "prompt": prompt,
        "response": " it sleeps",
        "chosen": " it sleeps",
        "rejected": " dogs",
    }
    assert read_row(tldr_pair(0)) == first
    other = {"response": " dogs", "chosen": " dogs", "rejected": " it sleeps"}
    assert read_row(tldr_pair(1)) == first | other


def test_a_tldr_demonstration_has_no_pair():
    row = {
        "post": "My cat sleeps.",
        "summary": "it sleeps",
        "subreddit": "pets",
        "title": "cat",
        "id": "7",
    }
    prompt = "POST Subreddit: r/pets My cat sleeps. TL;DR:"
    assert read_row(row) == {"prompt": prompt, "response": " it sleeps"}


def test_a_news_article_among_tldrs_posts_is_dropped():
    assert read_row(tldr_pair(0, post=None, article="news")) == "not about a Reddit post"


def webgpt(score_0, score_1, answer_0="Blue [1][2].", answer_1="Red [3, 4], see a[0]."):
    row = {"question": {"dataset": "eli5", "id": "1", "full_text": "Which colour?"}}
    return row | {
        "answer_0": answer_0,
        "answer_1": answer_1,
        "score_0": score_0,
        "score_1": score_1,
    }


def test_a_webgpt_comparison_prefers_the_higher_score_and_loses_its_citation_marks():
    row = read_row(webgpt(-1, 0.5))
    assert row["prompt"] == " Human: Which colour? Assistant:"
    assert (row["chosen"], row["rejected"], row["response"]) == (
        " Red, see a.",
        " Blue.",
        " Red, see a.",
    )
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
    assert row == {
        "prompt": DIALOGUE,
        "response": " see you",
        "chosen": " see you",
        "rejected": " no",
    }


def test_a_pair_with_its_own_prompt_keeps_it():
    row = read_row({"prompt": DIALOGUE + " ", "chosen": "see you", "rejected": " no"}, "hh")
    assert row == {
        "prompt": DIALOGUE,
        "response": " see you",
        "chosen": " see you",
        "rejected": " no",
    }


@pytest.mark.parametrize(
    "change", [("bye", "stay"), ("bye", "bye\n\nAssistant: no\n\nHuman: why?")]
)
def test_a_pair_about_two_prompts_is_dropped(change):
    row = {"chosen": DIALOGUE + " see you", "rejected": DIALOGUE.replace(*change) + " no"}
    assert read_row(row) == "a pair about two prompts"


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("user", "why?")]
WHY = "\n\nHuman: why?\n\nAssistant:"
SO = {"prompt": WHY, "messages": ASKED, "response": " so"}
PAIR = SO | {"chosen": " so", "rejected": " no"}
SYSTEM = [turn("system", "be kind"), *ASKED]
KIND = {"prompt": "\n\nSystem: be kind" + WHY, "messages": SYSTEM, "response": " so"}
YES, NO = [turn("assistant", "so")], [turn("assistant", "no")]
LONG = [*ASKED, *YES, turn("user", "so?")]
LONGER = {"prompt": WHY + " so\n\nHuman: so?\n\nAssistant:", "messages": LONG}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "Hi. "}, {"prompt": "Hi. "}),
        ({"prompt": "Hi.", "response": "ho"}, {"prompt": "Hi.", "response": "ho"}),
        ({"prompt": "Hi.", "completion": " ho\n"}, {"prompt": "Hi.", "response": " ho\n"}),
        (
            {"prompt": "def f0(x):\n", "response": "    y = x + 0\n    return y\n"},
            {"prompt": "def f0(x):\n", "response": "    y = x + 0\n    return y\n"},
        ),
        (
            {"prompt": "def f(x):\n", "chosen": "    a\n", "rejected": "    b\n"},
            {
                "prompt": "def f(x):\n",
                "response": "    a\n",
                "chosen": "    a\n",
                "rejected": "    b\n",
            },
        ),
        ({"messages": ASKED + YES}, SO),
        ({"messages": SYSTEM + YES, "prompt": "why?", "prompt_id": "7"}, KIND),
        ({"messages": LONG + NO}, LONGER | {"response": " no"}),
        ({"messages": LONG}, LONGER),  # it waits for an answer: a prompt for PPO
        (
            {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]},
            SO,
        ),
        (
            {"conversations": [{"from": "human", "value": "why?"}]},
            {"prompt": WHY, "messages": ASKED},
        ),
        ({"conversations": ASKED + YES}, SO),
        ({"instruction": "why?", "input": "", "output": "so"}, SO),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            {
                "prompt": "\n\nHuman: add\n\n1 2\n\nAssistant:",
                "messages": [turn("user", "add\n\n1 2")],
            }
            | {"response": " 3"},
        ),
        ({"prompt": ASKED}, {"prompt": WHY, "messages": ASKED}),
        ({"prompt": ASKED, "completion": YES}, SO),
        ({"prompt": ASKED, "completion": "so"}, SO),
        ({"prompt": "why?", "completion": YES}, SO),
        ({"prompt": ASKED, "chosen": YES, "rejected": NO}, PAIR),
        ({"prompt": ASKED, "chosen": "so", "rejected": "no"}, PAIR),
        (
            {
                "chosen": ASKED + YES,
                "rejected": ASKED + NO,
                "score_chosen": 8,
                "score_rejected": 2.5,
            },
            PAIR,
        ),
        (
            {
                "prompt": "why?",
                "chosen": ASKED + YES,
                "rejected": ASKED + NO,
                "messages": ASKED + YES,
            },
            PAIR,
        ),
        ({"prompt": ASKED, "chosen": ASKED + YES, "rejected": ASKED + NO}, PAIR),
        ({"prompt": None, "chosen": ASKED + YES, "rejected": ASKED + NO}, PAIR),
        ({"messages": [*ASKED, turn("assistant", "  so\n")]}, SO | {"response": "  so\n"}),
    ],
)
def test_every_form_of_rows_becomes_texts_and_turns(row, wanted):
    assert read_row(row) == wanted


def test_neighbours_of_one_role_are_one_turn():
    row = read_row({"messages": [turn("user", "a"), turn("user", "b"), *YES, *NO]})
    assert row["messages"] == [turn("user", "a\n\nb")]
    assert row["response"] == " so\n\nno"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": ASKED + YES, "rejected": ASKED + YES}, "a pair of equal texts"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "a pair of equal texts"),
        ({"chosen": LONG, "rejected": ASKED + NO}, "a dialogue that ends with the user's turn"),
        ({"chosen": LONG + YES, "rejected": ASKED + NO}, "a pair about two prompts"),
        ({"messages": YES}, "an empty text"),
        ({"messages": [turn("user", " "), *YES]}, "an empty text"),
        ({"messages": [*ASKED, turn("assistant", "")]}, "an empty text"),
        ({"prompt": "a", "completion": "b", "label": False}, "a completion that is labelled bad"),
        (
            {"chosen": DIALOGUE + " see you\n\nHuman: thanks", "rejected": DIALOGUE + " no"},
            "an answer with a human's turn in it",
        ),
        ({"prompt": WHY, "response": " so\n\nHuman: oh"}, "an answer with a human's turn in it"),
    ],
)
def test_what_cannot_be_learned_is_dropped_with_its_reason(row, reason):
    assert read_row(row) == reason


def test_a_dialogue_and_its_text_say_the_same():
    for turns in (ASKED, SYSTEM, LONG, [turn("assistant", "hi"), *ASKED]):
        assert sft.dialogue(sft.spoken(turns)) == turns
    assert sft.dialogue("a Human: b Assistant: c") == [turn("user", "a Human: b Assistant: c")]
    assert sft.dialogue("System: be kind\n\nHuman: why?\n\nAssistant:") == SYSTEM


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
        ({"text": "a"}, "no known form"),
        ({"messages": []}, "'messages' has no turns"),
        ({"messages": [7]}, "'messages.0.role' is missing"),
        ({"messages": [turn("cook", "a")]}, "'messages.0' has the unknown role 'cook'"),
        ({"messages": [turn("user", None)]}, "'messages.0.content' must be a text, got None"),
        ({"messages": {"role": "user"}}, "'messages' must be a list"),
        ({"chosen": ASKED + YES}, "'rejected' is missing"),
        ({"instruction": "a", "output": 3}, "'output' must be a text, got 3"),
        (webgpt(float("inf"), 0), "'score_0' must be a number"),
        (apps(solutions=[3]), "'solutions.0' must be a text"),
        (apps(starter_code=7), "'starter_code' must be a text"),
        ({"chosen": "a"}, "'rejected' is missing"),
        ({"rejected": "a"}, "'chosen' is missing"),
        ({"chosen": ["a"], "rejected": "a"}, "'chosen.0.role' is missing"),
        ({"chosen": 1, "rejected": "a"}, "'chosen' must be a text"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt' must be a text, got 5"),
        ({"chosen": "no turns", "rejected": "b"}, "Assistant:"),
        ({"prompt": "a", "response": 3}, "'response' must be a text, got 3"),
        (tldr_pair(2), "'choice' must be 0 or 1"),
        (tldr_pair("1"), "'choice' must be a int"),
        (tldr_pair(True), "'choice' must be a int"),
        (tldr_pair(0, post=7), "'info.post' must be a text"),
        (tldr_pair(0) | {"summaries": [{"text": "a"}]}, "'summaries.1.text' is missing"),
        (tldr_pair(0) | {"info": []}, "'info' must be a dict"),
        (webgpt("1", 0), "'score_0' must be a number"),
        (webgpt(None, 0), "'score_0' is missing"),
        (webgpt(1, 0, answer_0=None), "'answer_0' is missing"),
        (webgpt(1, 0) | {"question": "Which?"}, "'question.full_text' is missing"),
        (apps(question=5), "'question' must be a text"),
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
    misnamed = []
    for number, source in enumerate((zipped, whole, table)):
        misnamed.append(tmp_path / f"e {number}\n*[x].txt")
        misnamed[-1].write_bytes(Path(source).read_bytes())
    bom = tmp_path / "f.jsonl"
    bom.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for path in (zipped, whole, table, *map(str, misnamed), str(bom)):
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
def test_a_bad_row_stops_the_run_with_file_and_line_or_is_skipped_and_counted(
    tmp_path, capsys, bad
):
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
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert f"{path}: row 3: field 'rejected'" in stops(capsys, sft.load_rows, "hh", (path,))


def test_dropped_rows_are_counted_by_reason(tmp_path, capsys):
    rows = [
        *hh_rows(20),
        {"prompt": "a", "chosen": "", "rejected": "b"},
        webgpt(1, 1),
        webgpt(2, 2),
    ]
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
        ("no.jsonl.gz", b"no gzip", "no.jsonl.gz:1: not JSON"),
        (
            "torn.jsonl.gz",
            gzip.compress(b"abc")[:-9] + b"123456789",
            "torn.jsonl.gz cannot be read",
        ),
        ("latin.jsonl", b'\n{"prompt": "\xe9"}', "latin.jsonl:2: not UTF-8 text"),
        ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), "utf16.jsonl:1: not UTF-8 text"),
        ("no.parquet", b"no parquet", "no.parquet:1: not JSON"),
        ("torn.parquet", b"PAR1 and nothing", "torn.parquet cannot be read"),
        ("torn.json", b'[{"prompt": "a"}', "not JSON"),
        ("nul.jsonl", b"\0\n", "nul.jsonl:1: not JSON"),
        (
            "deep.jsonl",
            b"[" * 100_000,
            "deep.jsonl: not JSON that can be read: it is nested too deeply",
        ),
        ("deep2.jsonl", b'{"prompt": ' + b"[" * 990 + b"]" * 990 + b"}", "deep2.jsonl:1: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert complaint in stops(capsys, sft.load_rows, "plain", (str(tmp_path / name),))


def test_a_folder_is_no_file(tmp_path, capsys):
    assert "cannot be read: Is a directory" in stops(
        capsys, sft.load_rows, "plain", (str(tmp_path),)
    )


def test_rows_may_come_through_a_pipe(tmp_path):
    write_rows(tmp_path / "a.jsonl", hh_rows(30))
    with subprocess.Popen(["cat", tmp_path / "a.jsonl"], stdout=subprocess.PIPE) as cat:
        assert len(sft.load_rows("hh", (f"/dev/fd/{cat.stdout.fileno()}",))) == 30


def plain_rows(tmp_path, *rows):
    """What `plain` makes of these rows, of which thirty others follow."""
    others = [{"prompt": f"question {i}", "response": "yes"} for i in range(30)]
    found = sft.load_rows("plain", (write_rows(tmp_path / "a.jsonl", [*rows, *others]),))
    return found[: len(rows)]


def test_half_an_emoji_becomes_the_replacement_character_and_a_whole_one_stays(tmp_path):
    text = r'{"prompt": "a\ud83d b\uD83D\uDE00", "response": "\udc00", "\ud800": 1}'
    assert plain_rows(tmp_path, text) == [{"prompt": "a\ufffd b\U0001f600", "response": "\ufffd"}]


def test_integers_of_any_length_are_read(tmp_path):
    tests = '{"inputs": ["1"], "outputs": ["2"], "n": ' + "7" * 5000 + "}"
    rows = [apps(question=f"Add {i}.", input_output=tests) for i in range(20)]
    (found, *_) = sft.load_rows("apps", (write_rows(tmp_path / "a.jsonl", rows),))
    assert found["problem"]["input_output"]["n"] == int("7" * 5000)
    assert len(sft.rows_digest([found])) == 64


def test_nan_is_a_missing_value_as_pandas_writes_it(tmp_path):
    row = '{"prompt": "a", "response": "b", "chosen": NaN, "score": NaN, "rank": -Infinity}'
    assert plain_rows(tmp_path, row) == [{"prompt": "a", "response": "b"}]


def test_a_list_in_the_first_line_of_json_lines_is_one_bad_row(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", ["[1, 2]", *hh_rows(30)])
    assert f"{path}:1: expected an object" in stops(capsys, sft.load_rows, "hh", (path,))
    assert len(sft.load_rows("hh", (path,), True)) == 30


def test_rows_changed_under_the_same_name_have_another_digest(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c"}]
    assert sft.rows_digest(rows) == sft.rows_digest([dict(reversed(row.items())) for row in rows])
    assert sft.rows_digest(rows) != sft.rows_digest(rows[::-1])
    assert sft.rows_digest(rows) != sft.rows_digest(rows[:1])
    assert sft.rows_digest(rows) != sft.rows_digest([rows[0], {"prompt": "C"}])


def test_rows_that_hold_a_prompt_only_are_counted(tmp_path, capsys):
    plain_rows(tmp_path, {"messages": ASKED}, {"prompt": "a"})
    assert (
        "plain: 2 rows have a prompt and no response: they serve PPO only"
        in capsys.readouterr().out
    )


def test_files_behind_a_url_are_downloaded_first(tmp_path, monkeypatch):
    import datasets

    path = write_rows(tmp_path / "a.jsonl", hh_rows(30))
    seen = []
    monkeypatch.setattr(datasets.data_files, "resolve_pattern", lambda p, base_path: [p + "!"])
    monkeypatch.setattr(
        datasets.DownloadManager, "download", lambda self, urls: seen.extend(urls) or [path]
    )
    assert len(sft.load_rows("hh")) == 30
    assert seen == ["hf://datasets/Dahoas/full-hh-rlhf/data/train-*.parquet!"]


# No file and no row makes a trace: rows, or one line

NAMES = "prompt response completion chosen rejected messages conversations instruction input"
NAMES += " output label"
NAMES += (
    " summaries summary info post subreddit choice question answer_0 answer_1 score_0 score_1 role"
)
NAMES += (
    " from content value solutions input_output starter_code full_text text inputs outputs fn_name"
)
WORDS = st.sampled_from(
    ["", " ", "user", "assistant", "gpt", "\n\nHuman: a\n\nAssistant: b", "[]", "{}"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)


def boxes(inner):
    fields = st.dictionaries(st.sampled_from(NAMES.split()), inner, max_size=5)
    turns = st.fixed_dictionaries({"role": WORDS | inner, "content": inner})
    return st.lists(inner, max_size=3) | st.lists(turns, max_size=3) | fields


JSON = st.recursive(LEAVES, boxes, max_leaves=12)
ROWS = st.dictionaries(st.sampled_from(NAMES.split()), JSON, max_size=6)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(ROWS, st.sampled_from(["plain", "hh", "apps"]))
def test_a_row_of_any_shape_is_texts_a_reason_or_a_complaint(row, task):
    try:
        found = read_row(row, task)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    if isinstance(found, dict):
        assert all(
            isinstance(found[name], str) for name in found if name not in ("messages", "problem")
        )
        assert found["prompt"].strip()


@FUZZ
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_file_of_any_bytes_is_rows_or_one_line(tmp_path, content):
    for begin in (b"", b"PAR1", b"\x1f\x8b", b"\xef\xbb\xbf"):
        sft.load_rows.cache_clear()
        (tmp_path / "any").write_bytes(begin + content)
        with pytest.raises(SystemExit) as stop:  # never enough rows to split
            sft.load_rows("plain", (str(tmp_path / "any"),))
        assert stop.value.code == 2


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


@pytest.mark.parametrize(
    "split", [["50", "50"], ["9", "9", "9"], ["-9", "9", "100"], ["nan", "50", "50"]]
)
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
    assert all(
        row["response"].strip() and row["prompt"].endswith(sft.INSTRUCTIONS) for row in found
    )
    if task == "apps":
        right = reward.program_rewards(
            [r["response"] for r in found[:8]], [r["problem"] for r in found[:8]]
        )
        assert right == [1.0] * 8


# Settings


def test_epochs_set_the_number_of_steps():
    assert sft.count_steps(Config(epochs=3, batch_size=64), 1000) == round(3000 / 64)
    assert sft.count_steps(Config(steps=7), 1000) == 7
    assert sft.count_steps(Config(epochs=0.001, batch_size=64), 1000) == 1


@pytest.mark.parametrize("name", sft.PRESETS)
def test_every_preset_sets_every_chapter_and_flags_override_it(name):
    flags = ["--preset", name, "--seed", "3", "--max_response", "99"]
    modules = (sft, reward, ma_ppo)
    chapters = [sft.parse(module.Config, module.__name__, flags) for module in modules if
                not (module is reward and name.endswith("apps"))]  # fmt: skip
    for cfg in chapters:
        assert (cfg.task, cfg.seed, cfg.max_response) == (name.rsplit("-", 1)[1], 3, 99)
        assert cfg.model == shlex.split(sft.PRESETS[name]["all"])[3]
        assert cfg.epochs >= 1
        assert math.isclose(sum(cfg.split), 100)
    ppo = chapters[-1]
    assert (ppo.clip, ppo.lam, ppo.gamma, ppo.top_p, ppo.ppo_epochs) == (0.2, 0.95, 1.0, 1.0, 1)


def test_presets_hold_the_papers_values():
    ppo = sft.parse(ma_ppo.Config, "ma_ppo", ["--preset", "gemma-7b-webgpt"])
    assert (ppo.batch_size, ppo.lr, ppo.critic_lr, ppo.beta, ppo.warmup) == (
        256,
        1e-6,
        1e-6,
        0.1,
        200,
    )
    assert (ppo.temperature, ppo.top_k, ppo.max_prompt, ppo.max_response, ppo.n) == (
        0.8,
        50,
        512,
        512,
        5,
    )
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
