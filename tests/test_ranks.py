"""Several processes: the same gradients, the same model, and no rank that hangs or dies unseen."""

import copy
import math
import multiprocessing
import os
import socket
import statistics
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import sft

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Forked from a process that has imported everything once: a rank starts in a moment.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers", "sft", "reward", "ma_ppo", "test_ranks"])


def on_ranks(count, function, *arguments):
    """Run a function of this module on so many ranks of one process group, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = FORKS.SimpleQueue()
    ranks = [
        FORKS.Process(target=be_rank, args=(rank, count, port, errors, function, arguments))
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in ranks] == [0] * count


def be_rank(rank, count, port, errors, function, arguments):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        sft.setup("cpu")
        function(*arguments)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.barrier()
    dist.destroy_process_group()


SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 11}
SIZE |= {"num_attention_heads": 2, "initializer_range": 0.4}


def llama(**size):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE | size)).eval()


def batches_of_this_rank(count, shape=(2, 6), vocab=11):
    torch.manual_seed(sft.rank())
    return [torch.randint(0, vocab, shape) for _ in range(count)]


def loss_of(model, x):
    return model(input_ids=x, labels=x).loss


# Gradients


def compare_gradients():
    sft.BUCKET = 2e3  # several buckets even in this model
    model = llama(tie_word_embeddings=True)
    model.spare = torch.nn.Linear(3, 5)  # never used
    plain, batches = copy.deepcopy(model), batches_of_this_rank(3)
    theirs = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    for _ in range(2):  # the second time finds no hooks or buckets of the first
        losses = [lambda x=x: loss_of(model, x) for x in batches]
        loss = sft.update(model, torch.optim.SGD(model.parameters()), losses, lr=0.0, max_norm=1e9)
        plain.zero_grad(), theirs.zero_grad()
        total = sum(loss_of(plain, x) for x in batches)
        total.backward()
        assert abs(loss - float(sft.all_sum(total.detach()))) < 1e-4
        for x in batches[:-1]:
            with theirs.no_sync():
                loss_of(theirs, x).backward()
        loss_of(theirs, batches[-1]).backward()
        for p, q, r in zip(model.parameters(), plain.parameters(), theirs.module.parameters(), strict=True):
            for expected in (sft.all_sum(q.grad), 2 * r.grad) if q.grad is not None else ():  # DDP averages
                assert torch.allclose(p.grad, expected, atol=1e-5), (p.grad - expected).abs().max()
            assert q.grad is not None or not p.grad.any()
            assert not p._post_accumulate_grad_hooks


def test_overlapped_gradients_are_those_of_one_all_reduce_and_of_ddp():
    on_ranks(2, compare_gradients)


def watch_the_embedding():
    sft.BUCKET = 2e3
    model, sent, last = llama(), [], []
    send, embedding = dist.all_reduce, model.model.embed_tokens.weight
    x, y = batches_of_this_rank(2)

    def spy(vector, **options):
        if options:
            sent.append(float(embedding.grad.abs().sum()))
        return send(vector, **options)

    def second():
        last.append((len(sent), float(embedding.grad.abs().sum())))
        return loss_of(model, y)

    dist.all_reduce = spy
    sft.update(model, torch.optim.SGD(model.parameters()), [lambda: loss_of(model, x), second], lr=0.1)
    assert last[0][0] == 0
    assert len(sent) > 3
    assert sent[0] == sent[1] == last[0][1] != sent[-1]


def test_buckets_leave_during_the_last_backward_pass_and_not_before():
    """The embedding's gradient arrives last; when sending begins it is the first micro-batch's."""
    on_ranks(2, watch_the_embedding)


def test_one_process_needs_no_buckets(monkeypatch):
    monkeypatch.setattr(sft, "gradient_buckets", None)
    weight = torch.nn.Linear(2, 1)
    sft.update(weight, torch.optim.SGD(weight.parameters()), [lambda: weight.weight.sum()], lr=0.1)


def race():
    size = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    size |= {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
    model, (x, y) = llama(**size, initializer_range=0.02), batches_of_this_rank(2, (1, 128), 49152)
    theirs = DistributedDataParallel(copy.deepcopy(model))

    def by_hand():
        model.zero_grad()
        buckets = sft.gradient_buckets(model)
        loss_of(model, x).backward()
        loss = loss_of(model, y)
        with sft.summed_over_ranks(buckets):
            loss.backward()

    def by_ddp():
        theirs.zero_grad()
        with theirs.no_sync():
            loss_of(theirs, x).backward()
        loss_of(theirs, y).backward()

    seconds = {by_hand: [], by_ddp: []}
    for step in range(11):
        for way in (by_hand, by_ddp) if step % 2 else (by_ddp, by_hand):
            dist.barrier()
            began = time.perf_counter()
            way()
            dist.barrier()
            seconds[way].append(time.perf_counter() - began)
    hand, ddp = (statistics.median(seconds[way][1:]) for way in (by_hand, by_ddp))
    report = f"{model.num_parameters():,} parameters: {hand:.2f} s by hand, {ddp:.2f} s by DDP"
    sft.print0(f"{report}, ratio {hand / ddp:.3f}", [f"{s:.2f}" for way in seconds for s in seconds[way]])
    for p, q in zip(model.parameters(), theirs.module.parameters(), strict=True):
        assert torch.allclose(p.grad, 2 * q.grad, atol=1e-5)
    assert hand / ddp <= 1.05


@pytest.mark.skipif("SLOW" not in os.environ, reason="minutes on an idle machine; run it with SLOW=1")
def test_gradient_averaging_takes_no_longer_than_that_of_ddp():
    on_ranks(2, race)


# Guards


def poison_one_rank(kind):
    model = llama()
    optimizer, (x,) = torch.optim.AdamW(model.parameters(), **sft.ADAM), batches_of_this_rank(1)
    before = copy.deepcopy(model.state_dict())
    one = torch.arange(16) == 3  # number among thousands
    if kind == "gradient" and sft.rank() == 1:
        hook = model.model.norm.weight.register_hook(lambda g: g.masked_fill(one, torch.nan))
    factor = torch.inf if kind == "infinite loss" and sft.rank() == 1 else 1.0
    assert math.isnan(sft.update(model, optimizer, [lambda: loss_of(model, x) * factor], lr=0.1))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not optimizer.state
    if kind == "gradient" and sft.rank() == 1:
        hook.remove()
    assert math.isfinite(sft.update(model, optimizer, [lambda: loss_of(model, x)], lr=0.1))
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(2 * parameters, sft.all_sum(parameters))


@pytest.mark.parametrize("kind", ["gradient", "infinite loss"])
def test_what_is_not_finite_on_one_rank_makes_all_ranks_skip_that_update_and_no_other(kind):
    on_ranks(2, poison_one_rank, kind)
