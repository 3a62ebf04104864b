"""Several processes: gradients are those of one, and none updates where another cannot."""

import copy
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import sft


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def batches_of_this_rank(count):
    """Token tensors [2, 6], others on every rank."""
    torch.manual_seed(sft.rank())
    return [torch.randint(0, 11, (2, 6)) for _ in range(count)]


def loss_of(model, x):
    return model(input_ids=x, labels=x).loss


# Gradients


def test_gradients_of_two_ranks_are_those_of_one_and_of_ddp(driver):
    driver.on_ranks(2, compare_gradients)


def compare_gradients():
    model = llama()
    model.spare = torch.nn.Linear(3, 5)  # never used
    plain = copy.deepcopy(model)
    theirs = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    batches = batches_of_this_rank(3)
    gradients = []

    class Look(torch.optim.SGD):
        """An optimizer that only looks at what it is given."""

        def step(self):
            gradients[:] = [p.grad.clone() for p in model.parameters()]

    for _ in range(2):  # the second update finds nothing of the first
        losses = [lambda x=x: loss_of(model, x) for x in batches]
        loss = sft.update(model, Look(model.parameters()), losses, lr=1.0, max_norm=1e9)
        plain.zero_grad()
        total = sum(loss_of(plain, x) for x in batches)
        total.backward()
        assert abs(loss - float(sft.all_sum(total.detach()))) < 1e-4
        theirs.zero_grad()
        with theirs.no_sync():
            for x in batches[:-1]:
                loss_of(theirs, x).backward()
        loss_of(theirs, batches[-1]).backward()
        parameters = zip(plain.parameters(), theirs.module.parameters(), strict=True)
        for ours, (p, q) in zip(gradients, parameters, strict=True):
            if p.grad is None:
                assert not ours.any()  # the spare layer's
            else:
                torch.testing.assert_close(ours, sft.all_sum(p.grad), atol=1e-5, rtol=0)
                torch.testing.assert_close(ours, 2 * q.grad, atol=1e-5, rtol=0)  # DDP averages


def test_parameters_that_only_one_rank_uses_are_updated_on_both(driver):
    driver.on_ranks(2, use_one_of_two)


def use_one_of_two():
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    sft.broadcast_parameters(model)
    mine = model[sft.rank()]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters())
    sft.update(model, optimizer, [lambda: mine.weight.sum() + mine.bias.sum()], lr=1.0, max_norm=9)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.allclose(p, q - 1)


# Updates that are not finite


@pytest.mark.parametrize("kind", ["gradient", "infinite loss"])
def test_what_is_not_finite_on_one_rank_makes_all_skip_that_update_and_no_other(driver, kind):
    driver.on_ranks(2, poison_one_rank, kind)


def poison_one_rank(kind):
    model = llama()
    optimizer = sft.make_optimizer(model)
    (x,) = batches_of_this_rank(1)
    before = copy.deepcopy(model.state_dict())
    here = sft.rank() == 1
    norm = model.model.norm.weight
    one = torch.arange(len(norm)) == 3  # number of thousands
    hooks = []
    if kind == "gradient" and here:
        hooks.append(norm.register_hook(lambda grad: grad.masked_fill(one, torch.nan)))
    factor = torch.inf if kind == "infinite loss" and here else 1.0
    assert math.isnan(sft.update(model, optimizer, [lambda: loss_of(model, x) * factor], lr=0.1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not optimizer.state
    for hook in hooks:
        hook.remove()
    assert math.isfinite(sft.update(model, optimizer, [lambda: loss_of(model, x)], lr=0.1))
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(2 * parameters, sft.all_sum(parameters))
