"""Chapter 2: the reward model, and the toy's true quality and noisy preferences."""

import hashlib
import json
import math
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sft import stops
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTModel,
)

import reward
import sft
from reward import PAIR, ScalarModel, gold_score, last_token_scores, preference_loss, toy_pair

PROMPTS = [[2, 3, 4, 5, 6], [7], [3, 3, 9]]
RESPONSES = [[4, 1], [5, 6, 7, 8, 1], [9, 10]]
ELEVEN = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(11)})  # a tokenizer's words


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


def test_the_score_is_read_at_the_last_real_token_and_padding_does_not_matter():
    # A stand-in that scores a position by its token: the score must be the last real token's id.
    assert last_token_scores(lambda batch: batch.tokens.float(), batch()).tolist() == [1, 1, 10]
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    model = ScalarModel(GPT2Model(gpt2).eval())  # it has absolute positions
    together = last_token_scores(model, batch()).tolist()
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = last_token_scores(model, batch([prompt], [response])).tolist()
        assert alone == pytest.approx([together[i]], abs=1e-5)


def test_the_head_is_as_wide_as_what_the_trunk_puts_out():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 1}
    opt = OPTModel(OPTConfig(vocab_size=11, num_attention_heads=2, **sizes))  # as OPT-350m has it
    model = ScalarModel(opt.eval())
    assert model.head.in_features == 8 and model(batch()).shape == batch().tokens.shape


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
    pairs = [{name: rng.choices(range(2, 11), k=4) for name in PAIR} for _ in range(8)]

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
    prompts = [pair["prompt"] for pair in pairs]
    scores = [last_token_scores(model, batch(prompts, [p[x] for p in pairs])) for x in PAIR[1:]]
    assert whole[0] == pytest.approx(float(preference_loss(*scores, 8).detach()), abs=1e-6)
    assert loss_and_gradient(3, pairs) == pytest.approx(whole, abs=1e-6)
    assert loss_and_gradient(2, pairs[:4], pairs[4:]) == pytest.approx(whole, abs=1e-6)


def test_a_saved_model_scores_the_same_after_loading(model, tmp_path):
    nn.init.constant_(model.head.bias, 0.7)
    model.save_pretrained(tmp_path)
    assert torch.equal(ScalarModel.load(tmp_path, ELEVEN)(batch()), model(batch()))


def test_a_causal_lm_gives_its_trunk_and_a_fresh_head_of_the_right_spread(tmp_path):
    causal = LlamaForCausalLM(config()).eval()
    causal.save_pretrained(tmp_path)
    model = ScalarModel.load(tmp_path, ELEVEN)
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
                ScalarModel.load(tmp_path, ELEVEN)
            continue
        wanted = classifier(batch().tokens, attention_mask=batch().attention)
        scores = last_token_scores(ScalarModel.load(tmp_path, ELEVEN), batch())
        assert torch.allclose(scores, wanted.logits.squeeze(1), atol=1e-5)
        larger = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(12)})  # with a new PAD
        model = ScalarModel.load(tmp_path, larger)
        assert model.trunk.get_input_embeddings().num_embeddings == 12
        assert torch.equal(last_token_scores(model, batch()), scores)


# Measuring, with a tokenizer that turns digits into ids


def test_accuracy_counts_right_pairs_without_noise_too_and_centring_moves_the_mean_to_0(
    model, monkeypatch
):
    rng = random.Random(0)
    names = [*PAIR, "response"]
    rows = [{name: rng.choices(range(2, 11), k=4) for name in names} for _ in range(20)]

    # Rows are token lists from the start, and gold scores are their sums.
    def encode(rows, *options):
        return [row | {"prompt": [*row["prompt"]]} for row in rows]

    monkeypatch.setattr(sft, "encode", encode)
    monkeypatch.setattr(sft, "usable_rows", lambda rows, *options: rows)
    monkeypatch.setattr(reward, "gold_score", lambda facts, ids: sum(ids) // 4)

    def score(row, name):
        return last_token_scores(model, batch([[*row["prompt"]]], [row[name]])).item()

    right, noiseless = [], []
    for row in rows:
        row |= {"facts": {}, "prompt": tuple(row["prompt"])}  # texts can be counted by, lists not
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
    assert abs(sum(score(row, "response") for row in rows)) > 0.1
    reward.center(model, rows, tokenizer, cfg)
    assert sum(score(row, "response") for row in rows) / 20 == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 12), (40, 128), (10, 10)])
def test_an_interval_ends_where_a_share_would_be_seen_1_96_standard_errors_away(wins, count):
    low, high = reward.wilson_interval(wins, count)
    assert 0 <= low < high <= 1
    for end, extreme in ((low, 0), (high, 1)):
        error = math.sqrt(end * (1 - end) / count)
        far = abs(wins / count - end) == pytest.approx(1.959964 * error, abs=1e-9)
        assert far or wins / count == extreme


@pytest.mark.parametrize("alike", [1.0, 0.5])
def test_accuracy_s_interval_holds_the_truth_though_pairs_of_a_prompt_are_alike(alike, capsys):
    """20 prompts of 30 pairs; a pair is as its prompt's first with probability `alike`."""
    rng, truth, held = random.Random(1), 0.7, 0
    for _ in range(300):
        right = []
        for prompt in range(20):
            first = rng.random() < truth
            for _ in range(30):
                own = rng.random() < truth
                right.append((f"prompt {prompt}", first if rng.random() < alike else own))
        reward.accuracy(right, "")
        low, high = map(float, re.search(r"([\d.]+) to ([\d.]+)", capsys.readouterr().out).groups())
        held += low <= truth <= high
    assert held >= 0.9 * 300
    # A pair a prompt: as wide as Wilson's of all pairs.
    right = [(str(i), rng.random() < truth) for i in range(600)]
    assert reward.effective_count(right, sum(x for _, x in right) / 600) == pytest.approx(600, 0.01)


# Other people's rewards

OWN = """
from __future__ import annotations
from dataclasses import dataclass
import numpy, torch
import neighbour_of_rewards

@dataclass
class Known:
    answer: int

def right(prompts, responses, rows):
    known = [Known(row["meta"]["answer"][0]) for row in rows]
    assert prompts == [row["prompt"] for row in rows]
    pairs = zip(responses, known, strict=True)
    return neighbour_of_rewards.doubled([text == str(row.answer) for text, row in pairs])

def tensor(prompts, responses, rows): return torch.tensor([[1.5], [2]])
def array(prompts, responses, rows): return numpy.array([1.5, 2])
def one(prompts, responses, rows): return 1.5
def few(prompts, responses, rows): return [1]
def nan(prompts, responses, rows): return [1, float("nan")]
def forgot(prompts, responses, rows): [1, 2]
def text(prompts, responses, rows): return ["good", "bad"]
def broken(prompts, responses, rows): return 1 / 0
NUMBER = 5
"""


def test_a_reward_in_python_reads_whole_rows_and_gives_numbers(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/reward.py").write_text(OWN)
    (tmp_path / "mine/neighbour_of_rewards.py").write_text(
        "def doubled(x): return [2 * v for v in x]"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    rows = [{"prompt": "2+1", "meta": {"answer": [3]}}, {"prompt": "1+1", "meta": {"answer": [2]}}]
    examples = [{"prompt": [7], "text": row["prompt"], "raw": row} for row in rows]

    def scores(name, responses=("3", "5")):
        function = reward.own_reward(f"{tmp_path}/mine/reward.py:{name}")
        return function(["2+1", "1+1"], responses, examples)

    assert scores("right") == [2, 0]
    assert scores("tensor") == scores("array") == [1.5, 2]
    complaints = {"few": "1 scores for 2", "nan": "finite", "one": "no numbers"}
    complaints |= {"forgot": "no numbers: None", "text": "no numbers", "NUMBER": "no function"}
    for name, complaint in (complaints | {"nothing": "no function"}).items():
        assert complaint in stops(capsys, scores, name)
    with pytest.raises(ZeroDivisionError):  # and Python tells in which line
        scores("broken")
    assert scores("right", ["3", "2"]) == [2, 2]  # and not the module `reward`


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
    for text in (pair[name] for pair in pairs[:1000] for name in PAIR[1:]):
        known = [sft.toy_sentences().get(s.strip(), (None, None)) for s in text.split(".")[:-1]]
        seen.append((len(text.split()), len({slot for slot, _ in known} - {None})))
    assert np.corrcoef(np.array(seen).T)[0, 1] < 0.65
