"""Chapter 3: every termination but parsing, pooling, a termination of your own, and the viewer."""

import re
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import segment
from segment import (
    TERMINATIONS,
    Responses,
    ast_starts,
    cut_after,
    fixed_starts,
    macro_starts,
    perplexity_starts,
    pool,
    random_starts,
    read_response,
    segment_ids,
    sentence_starts,
    statement_positions,
    token_starts,
    whole_starts,
    word_starts,
)

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
ROOT = Path(__file__).parent.parent
ragged = st.lists(st.integers(1, 12), min_size=1, max_size=5)  # lengths of the rows of a batch


def mask_of(lengths, width=None):
    """Right-padded 0/1 mask: mask_of([1, 3]) = [[1, 0, 0], [1, 1, 1]]."""
    position = torch.arange(max(lengths) if width is None else width)
    return (position < torch.tensor(lengths)[:, None]).long()


def bits(starts):
    return ["".join("1" if begins else "0" for begins in row) for row in starts.tolist()]


# Terminations that need no text


def test_fixed_with_n_1_is_token_and_with_n_T_is_whole():
    mask = mask_of([4, 1, 6])
    assert torch.equal(fixed_starts(mask, 1), token_starts(mask))
    assert torch.equal(fixed_starts(mask, 6), whole_starts(mask))
    assert bits(token_starts(mask)) == ["111100", "100000", "111111"]
    assert bits(whole_starts(mask)) == ["100000", "100000", "100000"]


@given(ragged, st.integers(1, 5))
def test_fixed_starts_are_those_of_a_loop_that_counts_to_n(lengths, n):
    mask = mask_of(lengths)
    for row, length in zip(fixed_starts(mask, n).tolist(), lengths, strict=True):
        since = n
        for t, begins in enumerate(row):
            assert begins == (t < length and since == n)
            since = 1 if begins else since + 1


def test_fixed_refuses_an_n_below_one():
    with pytest.raises(ValueError, match="n = 0"):
        fixed_starts(mask_of([3]), 0)


def test_random_lengths_come_from_the_list_and_only_a_row_s_last_may_be_cut():
    mask = mask_of([400, 391])
    starts = random_starts(mask, lengths=(2, 3, 5, 10), seeds=(7, 8))
    for b, length in enumerate((400, 391)):
        begins = [*starts[b].nonzero().flatten().tolist(), length]
        steps = [later - earlier for earlier, later in pairwise(begins)]
        assert set(steps[:-1]) == {2, 3, 5, 10}
        # Uniform over the four: each about a quarter of some 80 draws.
        assert all(0.1 < steps.count(step) / len(steps) < 0.4 for step in (2, 3, 5, 10))


def test_random_starts_depend_on_a_row_s_own_seed_and_nothing_else():
    together = random_starts(mask_of([9, 40, 5], width=50), seeds=(3, 4, 5))
    alone = random_starts(mask_of([40]), seeds=(4,))
    assert torch.equal(together[1, :40], alone[0])
    assert not torch.equal(alone, random_starts(mask_of([40]), seeds=(5,)))
    with pytest.raises(ValueError, match="one seed a row"):
        random_starts(mask_of([3, 3]), seeds=(1,))
    with pytest.raises(ValueError, match="at least 1"):
        random_starts(mask_of([3]), lengths=(0, 2), seeds=(1,))


def every_cut(mask, logprobs, seeds):
    """{name: starts} of all terminations that need no text."""
    return {
        "token": token_starts(mask),
        "fixed": fixed_starts(mask, 3),
        "random": random_starts(mask, seeds=seeds),
        "perplexity": perplexity_starts(mask, logprobs),
        "whole": whole_starts(mask),
    }


@given(
    kind=st.sampled_from([torch.long, torch.bool, torch.float32, torch.int32]),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    data=st.data(),
)
def test_a_row_s_cuts_are_its_own_whatever_its_padding_place_neighbours_or_mask_type(
    kind, lengths, extra, data
):
    """Rows of no tokens included; log-probabilities: a transposed view with NaN in the padding."""
    mask = mask_of(lengths, width=max(lengths) + extra).to(kind)
    random = torch.Generator().manual_seed(sum(lengths))
    logprobs = -torch.rand(mask.T.shape, generator=random).T.masked_fill(mask == 0, float("nan"))
    seeds, order = list(range(len(lengths))), data.draw(st.permutations(range(len(lengths))))
    together = every_cut(mask, logprobs, seeds)
    moved = every_cut(mask[order], logprobs[order], [seeds[b] for b in order])
    for name, starts in together.items():
        assert starts.dtype == torch.bool
        assert torch.equal(starts[order], moved[name])
        for b, length in enumerate(lengths):
            alone = every_cut(
                torch.ones(1, length), logprobs[b : b + 1, :length], seeds[b : b + 1]
            )[name]
            assert starts[b, :length].tolist() == alone[0].tolist()
            assert not starts[b, length:].any() and starts[b, :1].all() == (
                length > 0 or not starts.shape[1]
            )


def test_an_infinite_n_is_whole():
    mask = mask_of([4, 1, 6])
    for n in (float("inf"), 10**30):
        assert torch.equal(fixed_starts(mask, n), whole_starts(mask))


# Perplexity


def test_perplexity_of_ten_tokens_by_hand():
    """surprise    2  1  3    1  1  1    4    4  5  0.5
    mean so far    -  2  1.5  3  2  5/3  1.5  4  4  5     a tie (4 and 4) begins no macro action."""
    surprise = torch.tensor([[2, 1, 3, 1, 1, 1, 4, 4, 5, 0.5]])
    assert bits(perplexity_starts(mask_of([10]), -surprise)) == ["1010001010"]


def slow_perplexity_starts(surprises):
    starts, running = [], []
    for now in surprises:
        begins = not running or now * len(running) > sum(running)
        running = [now] if begins else [*running, now]
        starts.append(begins)
    return starts


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=5))
def test_perplexity_starts_are_those_of_a_loop_over_one_row_at_a_time(rows):
    mask = mask_of([len(row) for row in rows])
    logprobs = torch.full(mask.shape, float("nan"))  # padding must not matter, not even NaN
    for b, row in enumerate(rows):
        logprobs[b, : len(row)] = -torch.tensor(row)
    starts = perplexity_starts(mask, logprobs)
    for b, row in enumerate(rows):
        assert starts[b, : len(row)].tolist() == slow_perplexity_starts(row)
        assert not starts[b, len(row) :].any()


def test_equal_surprises_are_one_macro_action_despite_rounding():
    """0.1 + 0.1 + 0.1 > 3 * 0.1 in float32: its rounding would cut a constant row."""
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        assert perplexity_starts(mask_of([300]), torch.full((1, 300), -0.1, dtype=kind)).sum() == 1


def test_perplexity_accepts_a_response_of_no_tokens():
    assert perplexity_starts(torch.ones(2, 0), torch.zeros(2, 0)).shape == (2, 0)


# Numbering and pooling


def test_segment_ids_number_each_row_and_padding_repeats_the_last():
    starts = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert segment_ids(starts, mask_of([4, 5])).tolist() == [[0, 0, 1, 1, 1], [0, 1, 2, 3, 4]]


def test_decay_weights_of_three_tokens_are_a_third_a_half_and_one_over_eleven_sixths():
    mask, seg = mask_of([3]), torch.zeros(1, 3, dtype=torch.long)
    weights = [pool(torch.eye(3)[i : i + 1], seg, mask, "decay").item() for i in range(3)]
    by_hand = [float(Fraction(1, 3 - i) / Fraction(11, 6)) for i in range(3)]
    assert weights == pytest.approx(by_hand)
    assert sum(weights) == pytest.approx(1)


def slow_pool(x, how):
    """One macro action, token by token, from the table in `pool`."""
    L = len(x)
    harmonic = sum(1 / j for j in range(1, L + 1))
    sigma = {
        "sum": [1] * L,
        "mean": [1 / L] * L,
        "equal": [1 / L] * L,
        "first": [1] + [0] * (L - 1),
        "last": [0] * (L - 1) + [1],
        "decay": [1 / ((L - i) * harmonic) for i in range(L)],
    }[how]
    return sum(weight * value for weight, value in zip(sigma, x, strict=True))


@pytest.mark.parametrize("how", ["sum", "mean", "equal", "first", "last", "decay"])
@given(macros=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_pool_is_the_weighted_sum_of_a_loop_over_macro_actions(how, macros):
    """`macros` holds the lengths of each row's macro actions."""
    mask = mask_of([sum(lengths) for lengths in macros])
    starts = torch.zeros(mask.shape, dtype=torch.bool)
    for b, lengths in enumerate(macros):
        starts[b, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    x = torch.randn(mask.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    pooled = pool(x.masked_fill(mask == 0, float("nan")), segment_ids(starts, mask), mask, how)
    assert pooled.shape == (len(macros), max(map(len, macros)))
    for b, lengths in enumerate(macros):
        pieces = x[b, : sum(lengths)].split(lengths)
        expected = [slow_pool(piece.tolist(), how) for piece in pieces]
        assert pooled[b].tolist() == pytest.approx(
            expected + [0] * (pooled.shape[1] - len(expected))
        )


@pytest.mark.parametrize("how", ["sum", "mean", "equal", "first", "last", "decay"])
@pytest.mark.parametrize(
    ("kind", "length"), [(torch.bfloat16, 3000), (torch.float16, 2500)], ids=str
)
def test_half_precision_only_rounds_the_result(how, kind, length):
    """bfloat16 rounds token numbers beyond 256, so that `last` found no last token of 3,000."""
    x = torch.rand(1, length, generator=torch.Generator().manual_seed(0)).to(kind)
    pooled = pool(x, torch.zeros(1, length, dtype=torch.long), mask_of([length]), how)
    assert pooled.dtype == kind
    assert pooled.item() == pytest.approx(slow_pool(x[0].tolist(), how), rel=2**-8)


def test_a_row_of_no_tokens_pools_to_zeros():
    mask, x = mask_of([0, 2]), torch.tensor([[5.0, 7], [1, 3]])
    seg = segment_ids(token_starts(mask), mask)
    for how in ("sum", "mean", "equal", "first", "last", "decay"):
        assert pool(x, seg, mask, how).tolist() == [[0, 0], [1, 3]]


def test_mean_is_the_reference_code_s_pooling_on_its_own_segments():
    """Six tokens, n = 3: the reference code always cuts the last token off, into 3, 2 and 1.

    KL penalties -0.3 0 -0.6, -0.2 -0.4, 0.1; the RM score 2 is on the last. It sums
    r_i / |macro action|: -0.9 / 3, -0.6 / 2, 2.1. So the KL penalty shrinks by |macro action| and
    the score does not.
    """
    rewards, mask = torch.tensor([[-0.3, 0, -0.6, -0.2, -0.4, 0.1 + 2]]), mask_of([6])
    seg = torch.tensor([[0, 0, 0, 1, 1, 2]])
    assert pool(rewards, seg, mask, "mean")[0].tolist() == pytest.approx([-0.3, -0.3, 2.1])
    assert pool(rewards, seg, mask, "sum")[0].tolist() == pytest.approx([-0.9, -0.6, 2.1])


def test_pool_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="'median'"):
        pool(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), mask_of([2]), "median")


# Sentence, word, ast: the text decides


def cut(text, by):
    """The text's macro actions under `by`, tokens being words and punctuation; what fell back."""
    _, offsets, _ = read_response(text)
    starts, fallback = by(torch.ones(1, len(offsets)), [text], [offsets])
    seg = (starts[0].cumsum(0) - 1).tolist()
    pieces = [""] * (max(seg) + 1)
    for k, (start, end) in zip(seg, offsets, strict=True):
        pieces[k] += text[start:end]
    assert "".join(pieces) == text
    return pieces, fallback


def test_a_sentence_ends_in_its_full_stop_or_with_its_line():
    text = 'Pi is 3.14. "Really?" Yes!\n\n- one\n- two'
    pieces, fallback = cut(text, sentence_starts)
    assert pieces == ["Pi is 3.14.", ' "Really?"', " Yes!", "\n\n-" + " one", "\n- two"]
    assert fallback == 0


def test_a_word_keeps_its_punctuation():
    assert cut("Well, don't!  I'm here.", word_starts)[0] == ["Well,", " don't!", "  I'm", " here."]


PROGRAM = '''def total(rows):
    """Sum of squares."""
    # start from nothing
    out = 0

    for row in rows:
        out += pow(row,
                   2)  # squared
    return out
# the end
'''


def test_ast_cuts_a_function_with_a_loop_a_call_over_two_lines_and_a_comment_into_its_statements():
    pieces, fallback = cut(PROGRAM, ast_starts)
    assert [piece.strip() for piece in pieces] == [
        "def total(rows):",
        '"""Sum of squares."""',
        "# start from nothing\n    out = 0",
        "for row in rows:",
        "out += pow(row,\n                   2)  # squared",
        "return out\n# the end",
    ]
    assert fallback == 0


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        (
            "@a\n@b('/')\nclass A:\n  x: int = 3; y = 4\n",
            ["@a", "@b('/')", "class A:", "x: int = 3; y = 4"],
        ),
        ('def f():\n  """Doc.\n\n  more"""\n  pass', ["def f():", '"""Doc.\n\n  more"""', "pass"]),
        ("a = 1 + \\\n  2\nassert a, \\\n 'x'\n", ["a = 1 + \\\n  2", "assert a, \\\n 'x'"]),
        (
            'x = f"{a:>{w}}"\ny = f"""\n{a +\n b}"""\nz',
            ['x = f"{a:>{w}}"', 'y = f"""\n{a +\n b}"""', "z"],
        ),
        ("a = 1\n\f\ndef f():\n\f  return\n\fb", ["a = 1", "def f():", "return", "b"]),
        ("if x:\n\ty = 1\nelse:\n\ty = 2", ["if x:", "y = 1", "else:", "y = 2"]),
        (
            "if a:\r\n  g(1,\r\n    2)\r\n  # c\r\n  pass\r\n",
            ["if a:", "g(1,\r\n    2)", "# c\r\n  pass"],
        ),
        (' if a:\r  b\rc = """\r"""\rd', ["if a:", "b", 'c = """\r"""', "d"]),
        (
            "π = '東 😀 \u2028'\nif π:\n  a\n# out\n  b",
            ["π = '東 😀 \u2028'", "if π:", "a", "# out\n  b"],
        ),
    ],
)
def test_ast_knows_a_logical_line_by_its_tokens_and_not_by_its_line_breaks(text, statements):
    pieces, fallback = cut(text, ast_starts)
    assert ([piece.strip() for piece in pieces], fallback) == (statements, 0)


def test_ast_positions_are_the_same_after_leading_white_space_but_that_much_further():
    assert statement_positions(" \n  " + PROGRAM) == [
        position + 4 for position in statement_positions(PROGRAM)
    ]


def test_what_is_not_python_is_cut_at_its_lines_and_counted():
    text = "def f(:\n  three ( words\n\nend"
    assert cut(text, ast_starts) == (["def f(:", "\n  three ( words", "\n\nend"], 1.0)
    mask, offsets = torch.ones(2, 1), [[(0, 5)], [(0, 5)]]
    assert ast_starts(mask, ["a = 1", "a = ("], offsets)[1] == 0.5
    for broken in (
        "\0",
        "\ud800",
        "(" * 5000,
        "not " * 99999 + "x",
        "if x:\n\ty\n        z\n",
        "'",
        "\\",
        "\r",
    ):
        statement_positions(broken)  # whatever a policy samples, nothing is raised


@pytest.mark.parametrize("by", [sentence_starts, word_starts, ast_starts])
@given(
    texts=st.lists(st.text(alphabet="ab .\n:=(", min_size=1, max_size=12), min_size=1, max_size=4)
)
def test_a_row_s_cuts_do_not_depend_on_padding_order_or_neighbours(by, texts):
    offsets = [[(i, i + 1) for i in range(len(text))] for text in texts]
    mask = mask_of([len(text) for text in texts], width=15)
    together = by(mask, texts, offsets)[0]
    backwards = by(mask.flip(0), texts[::-1], offsets[::-1])[0].flip(0)
    assert torch.equal(together, backwards)
    for b, text in enumerate(texts):
        alone = by(torch.ones(1, len(text)), [text], [offsets[b]])[0]
        assert torch.equal(together[b, : len(text)], alone[0])
        assert together[b, 0] and not together[b, len(text) :].any()


def test_too_few_offsets_or_texts_are_refused():
    with pytest.raises(ValueError, match="row 0 has 3 tokens, but only 1 offsets"):
        word_starts(torch.ones(1, 3), ["a"], [[(0, 1)]])
    with pytest.raises(ValueError, match="2 rows of mask, but 1"):
        word_starts(torch.ones(2, 1), ["a"], [[(0, 1)]])


# The table of terminations


@pytest.fixture
def four():
    """Two responses of 5 and 3 tokens: words and punctuation, then an EOS, which wrote nothing."""
    aligned = [
        ("we came, and saw", [(0, 2), (2, 7), (7, 8), (8, 16), (16, 16)]),
        ("a,b", [(0, 1), (1, 3), (3, 3)]),
    ]
    logprobs = -torch.tensor([[1.0, 3, 2, 1, 4], [2, 1, 3, torch.nan, torch.nan]])
    return Responses(mask_of([5, 3]), aligned=aligned, ref_logprobs=logprobs, seeds=[1, 2], n=2)


def test_each_name_in_the_table_is_the_function_of_that_name(four):
    mask, texts, offsets = four.mask, four.texts, four.offsets
    expected = {
        "token": token_starts(mask),
        "fixed": fixed_starts(mask, 2),
        "random": random_starts(mask, seeds=[1, 2]),
        "perplexity": perplexity_starts(mask, four.ref_logprobs),
        "sentence": sentence_starts(mask, texts, offsets)[0],
        "word": word_starts(mask, texts, offsets)[0],
        "ast": ast_starts(mask, texts, offsets)[0],
        "whole": whole_starts(mask),
    }
    assert set(TERMINATIONS) == {*expected, "parsing"}
    for name, starts in expected.items():
        assert torch.equal(macro_starts(name, four)[0], starts), name
    assert bits(expected["perplexity"]) == ["11001", "10100"]


def test_only_programs_and_sentences_can_fail_to_be_read(four):
    fallbacks = {name: macro_starts(name, four)[1] for name in TERMINATIONS if name != "parsing"}
    assert fallbacks.pop("ast") == 0.5  # "we came, and saw" is no Python, "a,b" is a tuple
    assert set(fallbacks.values()) == {0.0}


def test_a_termination_of_your_own_is_a_function_and_a_name(four, monkeypatch):
    def comma_starts(responses):
        return cut_after(responses, r",\s*")

    monkeypatch.setitem(TERMINATIONS, "comma", comma_starts)
    starts, fallback = macro_starts("comma", four)
    assert bits(starts) == ["10010", "11000"]  # the token ",b" holds what follows the comma
    assert fallback == 0


@pytest.mark.parametrize("answer", [torch.zeros, torch.ones], ids=["nothing", "everything"])
def test_whatever_a_termination_says_first_tokens_start_and_padding_does_not(
    four, monkeypatch, answer
):
    returned = answer(2, 5, dtype=torch.bool)
    monkeypatch.setitem(TERMINATIONS, "mine", lambda responses: (returned, 0.25))
    starts, fallback = macro_starts("mine", four)
    expected = token_starts(four.mask) if returned.any() else whole_starts(four.mask)
    assert torch.equal(starts, expected) and fallback == 0.25


class CountingTokenizer:
    """Token i is the letter number i; counts how often it is asked."""

    all_special_ids = (0,)

    def __init__(self):
        self.calls = 0

    def decode(self, ids, **options):
        self.calls += 1
        return "".join(" abc"[i] if i < 4 else "," for i in ids if i)


def test_tokens_are_decoded_only_where_a_termination_reads_text_and_only_once(monkeypatch):
    tokenizer = CountingTokenizer()
    tokens = [[1, 4, 2, 0], [3, 0]]
    responses = Responses(mask_of([4, 2]), tokens=tokens, tokenizer=tokenizer, seeds=[1, 2])
    for name in ("token", "fixed", "random", "whole"):
        macro_starts(name, responses)
    assert tokenizer.calls == 0
    assert responses.texts == ["a,b", "c"]
    assert responses.offsets == [[(0, 1), (1, 2), (2, 3), (3, 3)], [(0, 1), (1, 1)]]
    calls = tokenizer.calls
    assert bits(cut_after(responses, ",")) == ["1010", "1000"] and tokenizer.calls == calls


def test_a_batch_of_empty_responses_has_no_macro_actions():
    """Every row is padding; and a batch in which T is 0."""
    for mask in (mask_of([0, 0], width=3), torch.zeros(2, 0)):
        aligned = [("", [])] * 2
        responses = Responses(mask, aligned=aligned, ref_logprobs=mask * 1.0, seeds=[1, 2])
        for name in TERMINATIONS:
            if name != "parsing":
                starts, fallback = macro_starts(name, responses)
                assert starts.shape == mask.shape and not starts.any() and fallback == 0, name


def test_the_recipe_in_the_source_works_as_printed(tmp_path):
    """Its line, put where it says into a copy of the file, which is run as users run it."""
    source = (ROOT / "segment.py").read_text(encoding="utf-8")
    before, after = source.split("# Your own termination", 1)
    recipe = after.split("def macro_starts")[0]
    lines = [line[6:] for line in recipe.splitlines() if line.startswith("#     ")]
    assert len(lines) == 1
    assert lines[0] in (ROOT / "README.md").read_text(encoding="utf-8")
    changed = before + "\n".join(lines) + "\n# Your own termination" + after
    (tmp_path / "segment.py").write_text(changed, encoding="utf-8")
    command = [sys.executable, "segment.py", "--text", "Yes, no,maybe.", "--termination", "comma"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "[Yes,][ no,][maybe.]",
        "comma: 6 tokens, 3 macro actions, mean 2.00 tokens",
    ]


# The viewer


@pytest.fixture
def viewer(capsys):
    """The viewer in this process: a function of its arguments -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = 0
        try:
            segment.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_viewer_prints_brackets_into_a_pipe_and_counts(viewer):
    text = "Well done. Now do it again!"
    code, out, err = viewer("--text", text, "--termination", "fixed", "--n", 3)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "[Well done.][ Now do it][ again!]",
        "fixed: 8 tokens, 3 macro actions, mean 2.67 tokens",
    ]


def test_on_a_terminal_macro_actions_alternate_between_two_colours():
    starts = torch.tensor([True, False, True])
    shown = segment.marked("ab c", [(0, 1), (1, 2), (2, 4)], starts, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "|", shown) == "|ab|| c|"
    first, _, second, _ = re.findall(r"\x1b\[[0-9;]*m", shown)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--text", " "], "empty"),
        (["--text", "a", "--n", "0"], "n = 0"),
        (["--text", "a", "--n", "five"], "'five'"),
        (["--text", "a", "--termination", "ngram"], "'ngram'"),
        (["--file", "no/such/file"], "no/such/file"),
        (["--file", ""], "directory"),
        (["--file", str(ROOT)], "directory"),
        (["--file", sys.executable], "can't decode"),
        (["--text", "half \udcff"], "can't encode"),
        (["--text", "a", "--model", str(ROOT)], "no tokenizer there"),
        (["--text", "a", "--termination", "perplexity"], "--model"),
    ],
)
def test_the_viewer_says_what_is_wrong_in_one_line_and_exits_with_2(viewer, arguments, complaint):
    code, out, err = viewer(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and complaint in err


def test_the_viewer_draws_the_terminations_that_can_run_and_names_the_others(
    viewer, tmp_path, monkeypatch
):
    drawn = {}
    draw = segment.draw
    monkeypatch.setattr(
        segment, "draw", lambda rows, *rest: drawn.update(rows) or draw(rows, *rest)
    )
    monkeypatch.setitem(TERMINATIONS, "comma", lambda responses: cut_after(responses, ","))
    monkeypatch.delitem(TERMINATIONS, "parsing")  # spaCy may be missing, and takes its time
    code, out, err = viewer("--text", "Not a program, at all.", "--png", tmp_path / "rows.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert "no row for ast" in out and "no row for perplexity" in out
    assert list(drawn) == ["token", "fixed", "random", "sentence", "word", "whole", "comma"]
    assert drawn["comma"].tolist() == [True, False, False, False, True, False, False]


def test_on_the_page_a_token_is_broken_by_its_own_line_break_only():
    text = "one two\n\tthree"
    cells = segment.lay_out(text, [(0, 3), (3, 7), (7, 14)], width=6)
    assert cells == [(0, 0, 0, "one"), (1, 1, 0, " two"), (2, 1, 4, "⏎"), (2, 2, 0, "    three")]
