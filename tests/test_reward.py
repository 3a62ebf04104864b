"""Chapter 2: the reward model, and the toy's true quality and noisy preferences."""

import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import reward
import sft
from reward import ScalarModel, gold_score, last_token_scores, preference_loss, toy_edit, toy_pair

PROMPTS = [[2, 3, 4, 5, 6], [7], [3, 3, 9]]
RESPONSES = [[4, 1], [5, 6, 7, 8, 1], [9, 10]]


def tiny_config(seed=0):
    torch.manual_seed(seed)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(vocab_size=11, initializer_range=0.4, **size)


def tiny_scalar(seed=0):
    return ScalarModel(LlamaModel(tiny_config(seed)).eval())


# The model and its loss


def test_the_score_is_read_at_the_eos_of_padded_rows_too():
    # A stand-in that scores a position by its token: the score must be the last real token's id.
    batch = sft.make_batch(PROMPTS, RESPONSES, pad=0, device="cpu")
    assert last_token_scores(lambda batch: batch.tokens.float(), batch).tolist() == [1, 1, 10]


def test_a_rows_score_does_not_depend_on_its_batch():
    model = tiny_scalar()
    together = last_token_scores(model, sft.make_batch(PROMPTS, RESPONSES, 0, "cpu"))
    for b in range(3):
        alone = last_token_scores(model, sft.make_batch([PROMPTS[b]], [RESPONSES[b]], 0, "cpu"))
        assert float(together[b].detach()) == pytest.approx(float(alone.detach()), abs=1e-5)


def test_preference_loss_worked_by_hand():
    # Equal scores: log 2.  Two apart the right way: log(1 + e^-2); the wrong way: 2 more.
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 2.0])
    wanted = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2)) + 2]
    assert float(preference_loss(chosen, rejected, 3)) == pytest.approx(sum(wanted) / 3)
    # A micro-batch divides by the batch's pairs, not its own.
    assert float(preference_loss(chosen[:1], rejected[:1], 8)) == pytest.approx(math.log(2) / 8)


def test_preference_loss_survives_a_hopeless_pair():
    assert float(preference_loss(torch.tensor([-1e4]), torch.tensor([1e4]), 1)) == pytest.approx(
        2e4
    )


def test_a_saved_model_scores_the_same_after_loading(tmp_path):
    model = tiny_scalar()
    nn.init.constant_(model.head.bias, 0.7)
    model.save_pretrained(tmp_path)
    batch = sft.make_batch(PROMPTS, RESPONSES, 0, "cpu")
    assert torch.equal(ScalarModel.load(tmp_path)(batch), model(batch))


def test_a_causal_lm_gives_its_trunk_and_a_fresh_head_of_the_right_spread(tmp_path):
    torch.manual_seed(0)
    causal = LlamaForCausalLM(tiny_config()).eval()
    causal.save_pretrained(tmp_path)
    model = ScalarModel.load(tmp_path)
    for name, parameter in causal.model.state_dict().items():
        assert torch.equal(parameter, model.trunk.state_dict()[name])
    assert float(model.head.bias.detach()) == 0
    spread = torch.stack([ScalarModel(model.trunk).head.weight.detach() for _ in range(200)]).std()
    assert float(spread) == pytest.approx(1 / math.sqrt(17), rel=0.05)  # 16 wide


# Training and measuring, with a tokenizer that turns digits into ids


class Digits:
    """The tokenizer of texts like "3 1 4"."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None
    conventions = sft.Conventions([], [1], 1, 1, "", [], False, set(), [])

    def __call__(self, text, **options):
        ids = [[int(x) for x in t.split()] for t in ([text] if isinstance(text, str) else text)]
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)


def settings(**given):
    fields = {
        "task": "hh",
        "data": ["-"],
        "batch_size": 7,
        "micro_batch_size": 3,
        "max_response": 6,
    }
    return reward.Config(**fields | given)


def text_pairs(count=7, seed=0):
    rng = random.Random(seed)

    def text():
        return " ".join(str(rng.randint(2, 10)) for _ in range(rng.randint(1, 5)))

    return [
        {"prompt": text(), "response": text(), "chosen": text(), "rejected": text()}
        for _ in range(count)
    ]


def test_the_micro_batch_size_does_not_change_loss_or_gradient():
    pairs, results = sft.encode(text_pairs(), Digits(), settings(), reward.PAIR), []
    for size in (1, 3, 100):
        model = tiny_scalar()
        losses = reward.micro_losses(model, pairs, Digits(), settings(micro_batch_size=size), "cpu")
        losses = [loss() for loss in losses]
        sum(losses).backward()
        results.append((float(sum(losses).detach()), model.head.weight.grad))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-6)
        assert torch.allclose(gradient, results[0][1], atol=1e-6)


def one_score(model, prompt, response):
    ids = [int(x) for x in response.split()]
    batch = sft.make_batch([[int(x) for x in prompt.split()]], [[*ids, 1][:6]], 0, "cpu")
    return float(last_token_scores(model, batch).detach())


def test_scores_of_many_examples_come_in_their_order_whatever_the_micro_batch_size():
    model = tiny_scalar()
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in text_pairs(9)]
    examples = sft.encode(rows, Digits(), settings())
    wanted = [one_score(model, row["prompt"], row["response"]) for row in rows]
    for size in (1, 4, 100):
        scores = reward.score_all(model, examples, Digits.pad_token_id, size, "cpu")
        assert scores == pytest.approx(wanted, abs=1e-5)


def test_accuracy_is_the_share_of_pairs_whose_chosen_answer_scores_higher():
    model, rows = tiny_scalar(), text_pairs(20)
    right = []
    for row in rows:
        chosen, rejected = (one_score(model, row["prompt"], row[x]) for x in reward.PAIR[1:])
        right.append(chosen > rejected)
    assert 0 < sum(right) < 20
    result = reward.evaluate(model, rows, Digits(), settings(), "cpu")
    assert result == {"pairs": 20, "accuracy": pytest.approx(sum(right) / 20)}


def test_noiseless_accuracy_asks_the_gold_score_and_leaves_ties_out(monkeypatch):
    rows = text_pairs(20)
    for number, row in enumerate(rows):
        row["facts"] = number  # as if the facts of a post were its number
    quality = {}
    for row in rows:
        for name in ("chosen", "rejected"):
            quality[row["facts"], row[name]] = len(row[name].split())
    monkeypatch.setattr(reward, "gold_score", lambda *which: quality[which])
    model, right = tiny_scalar(), []
    for row in rows:
        gap = len(row["chosen"].split()) - len(row["rejected"].split())
        if gap:
            chosen, rejected = (one_score(model, row["prompt"], row[x]) for x in reward.PAIR[1:])
            right.append((chosen > rejected) == (gap > 0))
    assert 0 < sum(right) < len(right) < 20
    result = reward.evaluate(model, rows, Digits(), settings(task="toy", data=[]), "cpu")
    assert result["pairs_noiseless"] == len(right)
    assert result["accuracy_noiseless"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 12), (40, 128), (10, 10)])
def test_an_interval_ends_where_a_share_would_be_seen_1_96_standard_errors_away(wins, count):
    seen = wins / count
    for end, extreme in zip(reward.wilson_interval(wins, count), (0, 1), strict=True):
        error = math.sqrt(end * (1 - end) / count)
        assert abs(seen - end) == pytest.approx(1.959964 * error, abs=1e-9) or seen == extreme
    low, high = reward.wilson_interval(wins, count)
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= seen <= high + 1e-9


@pytest.mark.filterwarnings("error")
def test_after_centering_demonstrations_score_0_on_average():
    model, rows = tiny_scalar(), text_pairs(10)
    before = [one_score(model, r["prompt"], r["response"]) for r in rows]
    bias = reward.center(model, rows, Digits(), settings(), "cpu")
    after = [one_score(model, r["prompt"], r["response"]) for r in rows]
    assert sum(after) / 10 == pytest.approx(0, abs=1e-5)
    assert bias == pytest.approx(-sum(before) / 10, abs=1e-5)
    assert [a - b for a, b in zip(after, before, strict=True)] == pytest.approx(
        [bias] * 10, abs=1e-5
    )


# The toy: gold score and preferences

FACTS = {"weather": "foggy", "place": "oslo"}  # of a post that says nothing else
TRUE, WRONG = " the weather was mostly foggy for us.", " the weather was mostly sunny for us."
UNSTATED = " i badly hurt one knee on the stairs."
FILLER = f" {sft.TOY_FILLERS[0]}."
# Each kind of sentence its own decimal place: the score counts them.
PLACES = {"true": 1, "wrong": 10, "repeated": 100, "filler": 1000, "broken": 10_000}


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("", 0),
        (TRUE, 1),
        (WRONG, 10),
        (UNSTATED, 10),
        (TRUE + " we spent the whole week in lovely oslo.", 2),
        (TRUE + TRUE, 101),
        (TRUE + TRUE + TRUE, 201),
        (WRONG + TRUE, 110),  # the fact has been stated before, wrongly
        (TRUE + WRONG, 101),
        (TRUE + " it got foggy as soon as we arrived.", 101),  # the same fact in the post's words
        (FILLER + FILLER, 2000),  # fillers are never repetitions
        (TRUE + FILLER + WRONG, 1101),
        (TRUE[:-1], 10_000),  # no full stop: unfinished
        (TRUE + " the weather was", 10_001),
        (" the was weather foggy.", 10_000),
        (TRUE + " nonsense. more nonsense.", 20_001),
    ],
)
def test_gold_score_counts_every_kind_of_sentence(response, wanted, monkeypatch):
    monkeypatch.setattr(reward, "TOY_GOLD", PLACES)
    assert gold_score(FACTS, response) == wanted


def test_only_true_facts_are_worth_something():
    assert reward.TOY_GOLD["true"] > 0
    assert all(worth < 0 for kind, worth in reward.TOY_GOLD.items() if kind != "true")
    assert set(reward.TOY_GOLD) == set(PLACES)


def test_a_summary_of_all_twelve_facts_in_the_toys_words_is_the_best_there_is():
    facts = sft.toy_row(5)["facts"]
    assert len(facts) == 12
    best = [fact.summary.format(facts[slot]) for slot, fact in sft.TOY_FACTS.items()]
    assert gold_score(facts, sft.toy_text(best)) == 12 * reward.TOY_GOLD["true"]


def test_the_facts_of_a_row_are_those_that_its_post_states():
    for index in range(50):
        row = sft.toy_row(index)
        post = row["prompt"].removeprefix("POST Subreddit: r/travel").removesuffix(" TL;DR:")
        sentences = [sentence.strip() for sentence in post.split(".")[:-1]]
        stated = dict(sft.toy_sentences()[sentence] for sentence in sentences)
        assert list(stated.items()) == list(row["facts"].items())  # in this order, too


@pytest.fixture(scope="module")
def pairs():
    return [toy_pair(sft.toy_row(i)) for i in range(6000)]


def margin_of(pair):
    """By how much the chosen summary is truly better."""
    facts = pair["facts"]
    return gold_score(facts, pair["chosen"]) - gold_score(facts, pair["rejected"])


def test_the_better_summary_is_preferred_at_the_bradley_terry_rate(pairs):
    scale = float(re.search(r"sigmoid\(([\d.]+) x margin\)", " ".join(toy_pair.__doc__.split()))[1])
    margins = Counter()
    for pair in pairs:
        gap = margin_of(pair)
        margins[round(abs(gap), 2), gap > 0] += 1
    checked = 0
    for margin in {m for m, _ in margins if m > 0}:
        right, wrong = margins[margin, True], margins[margin, False]
        rate = 1 / (1 + math.exp(-scale * margin))
        error = math.sqrt(rate * (1 - rate) * (right + wrong))
        if error > 2:  # enough of both for the normal approximation
            checked += 1
            assert abs(right - rate * (right + wrong)) < 4 * error, margin
    assert checked >= 2
    # And all margins together.
    expected = variance = right = 0
    for (margin, better), count in margins.items():
        if margin > 0:
            rate = 1 / (1 + math.exp(-scale * margin))
            expected += count * rate
            variance += count * rate * (1 - rate)
            right += count * better
    assert abs(right - expected) < 4 * math.sqrt(variance)


def test_which_summary_comes_first_says_nothing_about_equal_ones(pairs):
    equal = [p for p in pairs if margin_of(p) == 0]
    longer = sum(len(p["chosen"]) > len(p["rejected"]) for p in equal)
    shorter = sum(len(p["chosen"]) < len(p["rejected"]) for p in equal)
    assert abs(longer - shorter) < 4 * math.sqrt(longer + shorter)


def test_a_pair_depends_on_its_row_only_and_fits_into_the_response(pairs):
    assert toy_pair(sft.toy_row(17)) == pairs[17]
    texts = [pair["prompt"] + pair["chosen"] + pair["rejected"] for pair in pairs[:500]]
    tokenizer = sft.small_tokenizer("toy", texts)
    for pair in pairs:
        for name in ("chosen", "rejected"):
            assert pair[name].startswith(" ")
            assert pair[name].endswith(".")
    longest = max(len(ids) for ids in tokenizer([p["chosen"] for p in pairs]).input_ids)
    assert longest < sft.Config().max_response  # and one more for the EOS


def test_the_length_of_a_summary_says_little_about_its_coverage(pairs):
    """When it did (correlation 0.84), the RM paid for each sentence, and the policy repeated."""
    seen = []
    for text in (pair[name] for pair in pairs[:1000] for name in ("chosen", "rejected")):
        slots = set()
        for sentence in text.split(".")[:-1]:
            slot, _ = sft.toy_sentences().get(sentence.strip(), (None, None))
            slots.add(slot)
        seen.append((len(text.split()), len(slots - {None})))
    assert np.corrcoef(np.array(seen).T)[0, 1] < 0.65


def test_an_edit_drops_or_replaces_one_sentence():
    rng, kinds, named = random.Random(0), Counter(), Counter()
    for index in range(300):
        before = [s.strip() for s in sft.toy_row(index)["response"].split(".")[:-1]]
        original, after = list(before), toy_edit(rng, before)
        assert before == original  # the summary itself is left alone
        more, fewer = Counter(after) - Counter(before), Counter(before) - Counter(after)
        assert more.total() <= 1
        assert fewer.total() <= 1
        kinds[more.total(), fewer.total()] += 1
        known = sft.toy_sentences()
        for new in more:
            kind, _ = known.get(new, ("broken", None))
            if kind not in (None, "broken"):
                kind = "again" if new in before else "false"
            named[kind] += 1
    # dropped, replaced (by another, a filler, a fragment or a falsehood), or replaced by itself
    assert {(0, 1), (1, 1)} <= set(kinds) <= {(0, 1), (1, 1), (0, 0)}
    assert set(named) == {None, "broken", "again", "false"}
