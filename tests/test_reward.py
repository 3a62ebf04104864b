"""Chapter 2: the reward model, and the toy's true quality and noisy preferences."""

import hashlib
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

import reward
import sft
from reward import ScalarModel, gold_score, last_token_scores, preference_loss, toy_pair

PROMPTS = [[2, 3, 4, 5, 6], [7], [3, 3, 9]]
RESPONSES = [[4, 1], [5, 6, 7, 8, 1], [9, 10]]


def config(**options):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "vocab_size": 11, "initializer_range": 0.4}
    return LlamaConfig(**size | options)


@pytest.fixture
def model():
    return ScalarModel(LlamaModel(config()).eval())


def batch(prompts=PROMPTS, responses=RESPONSES):
    return sft.make_batch(prompts, responses, 0, "cpu")


# The model and its loss


def test_the_score_is_read_at_the_last_real_token_and_padding_does_not_matter(model):
    # A stand-in that scores a position by its token: the score must be the last real token's id.
    assert last_token_scores(lambda batch: batch.tokens.float(), batch()).tolist() == [1, 1, 10]
    together = last_token_scores(model, batch()).tolist()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = last_token_scores(model, batch([prompt], [response])).tolist()
        assert alone == pytest.approx([together[i]], abs=1e-5)


def test_preference_loss_worked_by_hand():
    # Equal scores: log 2.  Two apart the right way: log(1 + e^-2); the wrong way: 2 more.
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 2.0])
    wanted = math.log(2) + 2 * math.log(1 + math.exp(-2)) + 2
    assert float(preference_loss(chosen, rejected, 3)) == pytest.approx(wanted / 3)
    # A micro-batch divides by the pairs of the whole batch, not by its own.
    assert float(preference_loss(chosen[:1], rejected[:1], 8)) == pytest.approx(math.log(2) / 8)
    assert float(preference_loss(torch.tensor([-1e4]), torch.tensor([1e4]), 1)) == 2e4


def test_micro_batches_and_ranks_add_up_to_one_batch(model):
    rng = random.Random(0)
    pairs = [{name: rng.choices(range(2, 11), k=4) for name in reward.PAIR} for _ in range(8)]

    def loss_and_gradient(size, *shares):
        cfg = reward.Config(batch_size=8, micro_batch_size=size)
        model.zero_grad()
        losses = []
        for share in shares:
            for loss in reward.micro_losses(model, share, 0, cfg):
                loss.backward()
                losses.append(float(loss.detach()))
        return [sum(losses), *model.head.weight.grad.flatten().tolist()]

    whole = loss_and_gradient(8, pairs)
    assert loss_and_gradient(3, pairs) == pytest.approx(whole, abs=1e-6)
    assert loss_and_gradient(2, pairs[:4], pairs[4:]) == pytest.approx(whole, abs=1e-6)


def test_a_saved_model_scores_the_same_after_loading(model, tmp_path):
    nn.init.constant_(model.head.bias, 0.7)
    model.save_pretrained(tmp_path)
    assert torch.equal(ScalarModel.load(tmp_path)(batch()), model(batch()))


def test_a_causal_lm_gives_its_trunk_and_a_fresh_head_of_the_right_spread(tmp_path):
    causal = LlamaForCausalLM(config()).eval()
    causal.save_pretrained(tmp_path)
    model = ScalarModel.load(tmp_path)
    for name, parameter in causal.model.state_dict().items():
        assert torch.equal(parameter, model.trunk.state_dict()[name])
    assert float(model.head.bias.detach()) == 0
    spread = torch.stack([ScalarModel(model.trunk).head.weight.detach() for _ in range(200)]).std()
    assert float(spread) == pytest.approx(1 / math.sqrt(17), rel=0.05)  # 16 wide


def test_a_classifier_folder_equals_its_scalar_model_and_one_of_three_labels_is_refused(tmp_path):
    for labels in (1, 3):
        classifier = LlamaForSequenceClassification(config(num_labels=labels, pad_token_id=0))
        classifier.eval().save_pretrained(tmp_path)
        if labels == 3:
            with pytest.raises(SystemExit):
                ScalarModel.load(tmp_path)
            continue
        wanted = classifier(batch().tokens, attention_mask=batch().attention)
        scores = last_token_scores(ScalarModel.load(tmp_path), batch())
        assert torch.allclose(scores, wanted.logits.squeeze(1), atol=1e-5)


# Measuring, with a tokenizer that turns digits into ids


def test_accuracy_counts_right_pairs_without_noise_too_and_centring_moves_the_mean_to_0(
    model, monkeypatch
):
    rng = random.Random(0)
    names = [*reward.PAIR, "response"]
    rows = [{name: rng.choices(range(2, 11), k=4) for name in names} for _ in range(20)]
    # Rows are token lists from the start, and gold scores are their sums.
    monkeypatch.setattr(sft, "encode", lambda rows, *options: rows)
    monkeypatch.setattr(sft, "usable_rows", lambda rows, *options: rows)
    monkeypatch.setattr(reward, "gold_score", lambda facts, ids: sum(ids) // 4)

    def score(row, name):
        return last_token_scores(model, batch([row["prompt"]], [row[name]])).item()

    right, noiseless = [], []
    for row in rows:
        row["facts"] = {}
        higher = score(row, "chosen") > score(row, "rejected")
        chosen, rejected = sum(row["chosen"]) // 4, sum(row["rejected"]) // 4
        right.append(higher)
        noiseless += [higher == (chosen > rejected)] * (chosen != rejected)
    assert 0 < sum(right) < 20
    assert 0 < sum(noiseless) < len(noiseless) < 20
    cfg = reward.Config(micro_batch_size=3)
    tokenizer = SimpleNamespace(pad_token_id=0)
    assert reward.evaluate(model, rows, tokenizer, cfg) == {
        "pairs": 20,
        "accuracy": sum(right) / 20,
        "pairs_noiseless": len(noiseless),
        "accuracy_noiseless": sum(noiseless) / len(noiseless),
    }
    before = sum(score(row, "response") for row in rows) / 20
    assert reward.center(model, rows, tokenizer, cfg) == pytest.approx(-before, abs=1e-5)
    assert sum(score(row, "response") for row in rows) / 20 == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 12), (40, 128), (10, 10)])
def test_an_interval_ends_where_a_share_would_be_seen_1_96_standard_errors_away(wins, count):
    low, high = reward.wilson_interval(wins, count)
    assert 0 <= low < high <= 1
    for end, extreme in ((low, 0), (high, 1)):
        error = math.sqrt(end * (1 - end) / count)
        far = abs(wins / count - end) == pytest.approx(1.959964 * error, abs=1e-9)
        assert far or wins / count == extreme


# The toy: gold score and preferences

TRUE, WRONG = " the weather was mostly foggy for us.", " the weather was mostly sunny for us."
UNSTATED, FILLER = " i badly hurt one knee on the stairs.", f" {sft.TOY_FILLERS[0]}."
# Each kind of sentence its own decimal place: the score counts them.
PLACES = {"true": 1, "wrong": 10, "repeated": 100, "filler": 1000, "broken": 10_000}
SUMMARIES = {
    "": 0,
    TRUE: 1,
    WRONG: 10,
    UNSTATED: 10,
    TRUE + " we spent the whole week in lovely oslo.": 2,
    TRUE + TRUE + TRUE: 201,
    WRONG + TRUE: 110,  # the fact has been stated before, wrongly
    TRUE + " it got foggy as soon as we arrived.": 101,  # the same fact in the post's words
    TRUE + FILLER + FILLER: 2001,  # fillers are never repetitions
    TRUE[:-1]: 10_000,  # no full stop: unfinished
    " the was weather foggy. nonsense. more": 30_000,
}


def test_gold_score_counts_every_kind_of_sentence(monkeypatch):
    monkeypatch.setattr(reward, "TOY_GOLD", PLACES)
    facts = {"weather": "foggy", "place": "oslo"}
    assert {text: gold_score(facts, text) for text in SUMMARIES} == SUMMARIES


@pytest.fixture(scope="module")
def pairs():
    return [toy_pair(sft.toy_row(i)) for i in range(6000)]


def test_the_toys_pairs_are_the_same_for_ever(pairs):
    digest = hashlib.sha256(json.dumps(pairs[:1000]).encode()).hexdigest()
    assert digest[:16] == "4b287e89e6010b53"
    assert toy_pair(sft.toy_row(17)) == pairs[17]


def test_the_better_summary_is_preferred_at_the_bradley_terry_rate(pairs):
    margins = Counter()
    for pair in pairs:
        gap = gold_score(pair["facts"], pair["chosen"])
        margins[gap - gold_score(pair["facts"], pair["rejected"])] += 1
    expected = variance = right = 0
    for margin in {abs(margin) for margin in margins} - {0}:
        count = margins[margin] + margins[-margin]
        rate = 1 / (1 + math.exp(-3 * margin))
        right += margins[margin]
        expected += count * rate
        variance += count * rate * (1 - rate)
    assert abs(right - expected) < 3 * math.sqrt(variance)


def test_the_length_of_a_summary_says_little_about_its_coverage(pairs):
    """When it did (correlation 0.84), the RM paid for each sentence, and the policy repeated."""
    seen = []
    for text in (pair[name] for pair in pairs[:1000] for name in reward.PAIR[1:]):
        known = [sft.toy_sentences().get(s.strip(), (None, None)) for s in text.split(".")[:-1]]
        seen.append((len(text.split()), len({slot for slot, _ in known} - {None})))
    assert np.corrcoef(np.array(seen).T)[0, 1] < 0.65
