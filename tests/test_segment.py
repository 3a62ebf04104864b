"""Chapter 3: every termination but parsing, pooling, and the viewer."""

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segment import (
    ast_starts,
    fixed_starts,
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


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32, torch.int32], ids=str)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5), extra=st.integers(0, 3), data=st.data())
def test_a_row_s_cuts_are_its_own_whatever_its_padding_place_neighbours_or_mask_type(
    kind, lengths, extra, data
):
    """Rows of no tokens included; the log-probabilities are a transposed view with NaN in the padding."""
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
            alone = every_cut(torch.ones(1, length), logprobs[b : b + 1, :length], seeds[b : b + 1])[name]
            assert starts[b, :length].tolist() == alone[0].tolist()
            assert not starts[b, length:].any() and starts[b, :1].all() == (length > 0 or not starts.shape[1])


def test_an_infinite_n_is_whole():
    mask = mask_of([4, 1, 6])
    for n in (float("inf"), 10**30):
        assert torch.equal(fixed_starts(mask, n), whole_starts(mask))


# Perplexity


def test_perplexity_of_ten_tokens_by_hand():
    """surprise    2  1  3    1  1  1    4    4  5  0.5
    mean so far    -  2  1.5  3  2  5/3  1.5  4  4  5     a tie (4 and 4) does not begin a macro action."""
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
    """0.1 + 0.1 + 0.1 > 3 * 0.1 in float32: summed in single precision, rounding would cut a constant row."""
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
    """One macro action, from the definitions in SPEC 3."""
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
        assert pooled[b].tolist() == pytest.approx(expected + [0] * (pooled.shape[1] - len(expected)))


@pytest.mark.parametrize("how", ["sum", "mean", "equal", "first", "last", "decay"])
@pytest.mark.parametrize(("kind", "length"), [(torch.bfloat16, 3000), (torch.float16, 2500)], ids=str)
def test_half_precision_only_rounds_the_result(how, kind, length):
    """Token numbers beyond 256 are rounded in bfloat16, so that `last` found no last token of 3,000."""
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
    """Six tokens, n = 3: the reference code always cuts the last token off: macro actions of 3, 2, 1.

    KL penalties -0.3 0 -0.6, -0.2 -0.4, 0.1; the RM score 2 is on the last. It sums r_i / |macro action|:
    -0.9 / 3, -0.6 / 2, 2.1. So the KL penalty shrinks by |macro action| and the score does not (SPEC 3).
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
    """The text's macro actions under `by`, with words and punctuation as tokens; also what fell back."""
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
        ("@a\n@b('/')\nclass A:\n  x: int = 3; y = 4\n", ["@a", "@b('/')", "class A:", "x: int = 3; y = 4"]),
        ('def f():\n  """Doc.\n\n  more"""\n  pass', ["def f():", '"""Doc.\n\n  more"""', "pass"]),
        ("a = 1 + \\\n  2\nassert a, \\\n 'x'\n", ["a = 1 + \\\n  2", "assert a, \\\n 'x'"]),
        ('x = f"{a:>{w}}"\ny = f"""\n{a +\n b}"""\nz', ['x = f"{a:>{w}}"', 'y = f"""\n{a +\n b}"""', "z"]),
        ("a = 1\n\f\ndef f():\n\f  return\n\fb", ["a = 1", "def f():", "return", "b"]),
        ("if x:\n\ty = 1\nelse:\n\ty = 2", ["if x:", "y = 1", "else:", "y = 2"]),
        ("if a:\r\n  g(1,\r\n    2)\r\n  # c\r\n  pass\r\n", ["if a:", "g(1,\r\n    2)", "# c\r\n  pass"]),
        (' if a:\r  b\rc = """\r"""\rd', ["if a:", "b", 'c = """\r"""', "d"]),
        ("π = '東 😀 \u2028'\nif π:\n  a\n# out\n  b", ["π = '東 😀 \u2028'", "if π:", "a", "# out\n  b"]),
    ],
)  # fmt: skip
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
@given(texts=st.lists(st.text(alphabet="ab .\n:=(", min_size=1, max_size=12), min_size=1, max_size=4))
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


# The viewer, as its user runs it


def run(*arguments):
    command = [sys.executable, str(ROOT / "segment.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_viewer_prints_brackets_into_a_pipe_and_counts():
    shown = run("--text", "Well done. Now do it again!", "--termination", "fixed", "--n", "3")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "[Well done.][ Now do it][ again!]",
        "fixed: 8 tokens, 3 macro actions, mean 2.67 tokens",
    ]


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
def test_the_viewer_says_what_is_wrong_in_one_line_and_exits_with_2(arguments, complaint):
    shown = run(*arguments)
    assert shown.returncode == 2
    assert complaint in shown.stderr and shown.stderr.count("\n") == 1 and shown.stdout == ""


def test_the_viewer_draws_the_terminations_that_can_run_and_names_the_others(tmp_path):
    shown = run("--text", "Not a program at all.", "--png", str(tmp_path / "rows.png"))
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert "no row for ast" in shown.stdout and "no row for perplexity" in shown.stdout
