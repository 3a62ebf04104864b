"""Chapter 1: supervised fine-tuning (SFT), and everything the later chapters stand on.

A language model is taught what answers look like, by imitating demonstrations a_1 ... a_T for
prompts x. Its loss is the cross-entropy of the response tokens:

    loss = - sum_t log pi(a_t | x, a_<t) / (number of response tokens in the batch)

The prompt is read, never learned: the model is not asked to write posts.

    python sft.py                                  # the embedded toy task: a minute on two cores
    python sft.py --task toy-code                  # short programs, six in ten of them wrong
    python sft.py --task plain --data rows.jsonl --model NAME    # your rows, a pretrained model
    torchrun --nproc_per_node=2 sft.py             # the same run on two processes
    python sft.py --resume auto                    # go on where an interrupted run was

Look at the loss in the bar: on the toy it falls from about 6 to 0.4 nats a token.

Contents
    the story     Config, the batch, the loss, data parallelism by hand, the update, main
    Appendix A    runs that are not lost: checkpoints, logs, signals
    Appendix B    settings: flags, defaults of tasks, the paper's settings, errors
    Appendix C    models: loading, bf16, recomputed activations, models split among GPUs
    Appendix D    how text becomes tokens: the conventions of the model at hand
    Appendix E    rows: from files as people have them to {prompt, response, ...}
    Appendix F    the toy: posts about a trip, and their summaries
    Appendix G    toy-code: small programs with unit tests
You may stop reading at Appendix A. What the story uses from there says so in a comment.
"""

import argparse
import atexit
import codecs
import ctypes
import gzip
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake


def opt(default, text, *aliases):
    """A `Config` field with its --help text; aliases: other spellings of its flag."""
    metadata = {"help": text.replace("%", "%%")}  # argparse formats help texts
    if aliases:
        metadata["aliases"] = list(aliases)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Settings of the SFT chapter, and those that all training chapters share.

    The story needs the first dozen. A task changes some defaults; see TASK_FLAGS, or --help.
    """

    task: str = opt("toy", "toy, toy-code (embedded); tldr, hh, webgpt, apps, plain (files or hub)")
    data: list[str] = opt([], "files of rows: JSON, JSON Lines, Parquet, also .gz")
    model: str = opt("", "causal LM to start from, a folder or hub name; empty: a small one anew")
    out: str = opt("", "folder to write to; empty: runs/TASK/sft, runs/TASK/reward or runs/TASK")
    seed: int = opt(0, "of initialisation, data order and sampling; never of the split of the data")
    steps: int = opt(350, "number of updates")
    batch_size: int = opt(32, "sequences per update, over all ranks")
    micro_batch_size: int = opt(32, "sequences per forward pass and rank: memory, not the result")
    lr: float = opt(4e-3, "peak learning rate; rises linearly, then falls as a cosine")
    warmup: float = opt(
        0.1, "share (0 to 1) of the steps in which the learning rate rises (paper: 0.1)"
    )
    max_prompt: int = opt(512, "tokens; longer prompts lose their beginning")
    max_response: int = opt(128, "tokens, the end mark included; longer responses lose their end")

    # What the rows are, and how they are shown to the model: Appendices D and E.
    epochs: float = opt(0.0, "passes over the rows, which then set --steps; 0: --steps counts")
    split: list[float] = opt([20, 40, 40], "% of the prompts for SFT, RM, PPO; a tenth is held out")
    rows_sha256: str = opt("", "of the rows; other rows are refused; empty: it is recorded")
    skip_bad_rows: bool = opt(
        False, "leave malformed rows out, and count them, instead of stopping"
    )
    chat_template: bool = opt(False, "wrap prompts in the chat template of the model's tokenizer")
    # Where and how it is computed: Appendix C.
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    precision: str = opt(
        "auto", "of forward passes: fp32, bf16, or auto: bf16 on a GPU that has it"
    )
    gradient_checkpointing: bool = opt(False, "less memory: compute activations again, backwards")
    compile: bool = opt(False, "torch.compile the forward passes: slow to start, then faster")
    shard: bool = opt(False, "split the models among the ranks: for those too large for one GPU")
    # Runs that are not lost, and ready-made settings: Appendices A and B.
    preset: str = opt(
        "", "the paper's settings for one of its models and tasks; see the end of --help"
    )
    resume: str = opt("", "auto: go on from the newest complete checkpoint; empty: start anew")
    save_every: int = opt(100, "steps between checkpoints; 0: only at the end and when interrupted")
    keep: int = opt(2, "newest checkpoints that are kept")
    override: bool = opt(False, "resume although settings have changed")
    max_skipped: int = opt(5, "steps in a row whose loss is not finite, after which the run ends")
    track: str = opt("", "also log to wandb, trackio, swanlab or tensorboard")
    timeout: float = opt(
        600.0, "seconds without an answer after which the other ranks count as lost"
    )


# The batch. Prompts differ in length, and so do responses. Prompts are padded on the left and
# responses on the right, so that all responses begin in the same column P:
#
#     column       0      1      2      3   |  P=4     5      6      7
#     tokens     <pad>   the    post    :   |  nice   trip  <eos>  <pad>
#     attention    0      1      1      1   |   1      1      1      0
#     mask                                  |   1      1      1      0        T = 4 columns
#
# `mask` says which of the T response columns hold a real token, the end mark <eos> among them.


@dataclass
class Batch:
    """B sequences whose prompts end, and responses begin, at the same column P."""

    tokens: torch.Tensor  # LongTensor [B, P+T]: left-padded prompts, right-padded responses
    attention: torch.Tensor  # LongTensor [B, P+T]: 1 on real tokens
    mask: torch.Tensor  # LongTensor [B, T]: 1 on real response tokens, the end mark included

    @property
    def responses(self):
        """The response tokens, LongTensor [B, T]."""
        return self.tokens[:, -self.mask.shape[1] :]  # [B, T]

    def rows(self, part):
        """The batch made of the rows in the slice `part`."""
        return Batch(self.tokens[part], self.attention[part], self.mask[part])


def make_batch(prompts, responses, pad, device):
    """Lay token lists out as a `Batch`.  prompts, responses: B token lists each; pad: id for gaps.

    PAD must be another token than the end mark EOS. Our own masks come from the lengths, but much
    other code, which reads what we save, finds padding by its id. Where PAD is EOS, it takes the
    end mark for padding too, and a model that never sees an end never learns to stop.
    """
    P = max(len(prompt) for prompt in prompts)
    T = max(1, *(len(response) for response in responses))
    tokens, attention = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left = P - len(prompt)
        right = T - len(response)
        tokens.append([pad] * left + prompt + response + [pad] * right)
        attention.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    tokens = torch.tensor(tokens, device=device)  # [B, P+T]
    attention = torch.tensor(attention, device=device)  # [B, P+T]
    return Batch(tokens, attention, attention[:, P:])


def positions(attention):
    """Position ids that do not count the padding.  [B, S] -> [B, S]

    A model with absolute positions would otherwise read a prompt after 100 PADs as if it began
    at word 100.
    """
    return (attention.cumsum(1) - 1).clamp(min=0)  # [B, S]


def response_logits(model, batch):
    """The model's scores (logits) of every possible token at each response place.  -> [B, T, V]

    The logits at position p predict token p+1. So those of the first response token stand in the
    last prompt column, and we need T+1 columns less the last. The prompt's are never computed.
    """
    T = batch.mask.shape[1]
    with autocast(model):  # in bf16, where that is asked for: Appendix C
        output = model(
            input_ids=batch.tokens,
            attention_mask=batch.attention,
            position_ids=positions(batch.attention),
            use_cache=False,
            logits_to_keep=T + 1,
        )
    logits = output.logits[:, -T - 1 : -1].float()  # [B, T, V], V the size of the vocabulary
    return possible(logits, model)  # ids that stand for no token have no chance: Appendix D


def sft_loss(model, batch, token_count):
    """Cross-entropy of the response tokens: their sum, divided by `token_count`.  -> scalar

    token_count: response tokens of the whole batch, over all micro-batches and ranks. So a long
    response counts as much as its tokens, wherever it is computed.
    """
    logprobs = response_logits(model, batch).log_softmax(-1)  # [B, T, V]
    logprobs = logprobs.gather(-1, batch.responses[..., None]).squeeze(-1)  # [B, T]
    return -(logprobs * batch.mask).sum() / token_count


# Data parallelism by hand. A rank is one process, usually with one GPU. Every rank holds the whole
# model and takes its share of the batch. Three things keep the ranks one model: equal parameters
# at the start (broadcast), equal gradients at every update (all_reduce), and no decision taken
# from one rank's numbers alone. A loss is a sum over tokens divided by the token count of *all*
# ranks; so gradients are summed, and the number of ranks cancels out of the mathematics.


def rank():
    """This process's number among all, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """Print once, not once a rank."""
    if rank() == 0:
        print(*args, flush=True)


def all_sum(x):
    """The sum of a tensor, or a number, over all ranks (a float64 tensor for a number)."""
    x = x.clone() if torch.is_tensor(x) else torch.tensor(float(x), dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(items):
    """Every rank's list, concatenated in rank order: after `my_share`, the global order."""
    mine = list(items)
    parts = [mine]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def my_share(items):
    """This rank's contiguous share of a global batch whose size the number of ranks divides."""
    share = len(items) // world()
    return items[rank() * share : (rank() + 1) * share]


def broadcast_parameters(model):
    """Give every rank rank 0's parameters."""
    if world() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)


def sum_gradients(model):
    """Add up every gradient over all ranks, so that all of them will make the same update.

    All sums are started before the first is waited for: they travel while others are prepared.
    A model that is split among the ranks (--shard) has summed its own in the backward pass.
    """
    if world() == 1 or is_sharded(model):
        return
    under_way = []
    for p in model.parameters():
        if p.requires_grad:
            if p.grad is None:  # not used by this rank's rows, but maybe by another's
                p.grad = torch.zeros_like(p)
            under_way.append(dist.all_reduce(p.grad, async_op=True))
    for work in under_way:
        work.wait()


def micro_slices(count, size):
    """Slices of at most `size` that tile range(count): one forward and backward pass each."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def update(model, optimizer, micro_losses, lr, max_norm=1.0):
    """One optimizer step on the sum of `micro_losses`, functions that each compute one loss.

    A batch that does not fit into memory is computed in micro-batches. Their gradients add up,
    over ranks too, and every loss is already divided by the batch-wide token count; so neither
    changes the update. The gradient's norm is clipped at `max_norm`: one odd batch must not throw
    the model off. Returns the loss, a float; NaN if it or the gradient is not finite: then nothing
    is updated.
    """
    total = torch.zeros((), dtype=torch.float64)
    for micro_loss in micro_losses:
        loss = micro_loss()
        loss.backward()  # adds to the gradients of the micro-batches before
        total += loss.detach().double().cpu()
    sum_gradients(model)
    norm = float(gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
    total = float(all_sum(total))
    finite = math.isfinite(total) and math.isfinite(norm)  # the same on all ranks
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()  # frees the gradients: the next rollout can use their memory
    return total if finite else math.nan


def make_optimizer(model):
    """AdamW without weight decay. eps 1e-5, not 1e-8: PPO's gradients can be tiny, and Adam
    divides by their size, so that noise would be blown up to full steps."""
    fused = next(model.parameters()).is_cuda  # one pass over memory, no temporaries
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=fused)


def cosine_lr(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * ((step + 1) / ramp)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
    return peak * cosine


def batch_rows(rows, step, batch_size, seed):
    """The rows of update `step`, in a new order every epoch.

    A pure function of the step: there is no iterator whose state an interrupted run could lose.
    """
    chosen = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, within = divmod(place, len(rows))
        chosen.append(rows[epoch_order(len(rows), epoch, seed)[within]])
    return chosen


@cache
def epoch_order(count, epoch, seed):
    """The order in which an epoch visits `count` rows."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def micro_losses(model, examples, tokenizer, token_count, size, device):
    """A function for each micro-batch that computes its share of the SFT loss."""

    def loss(part):
        prompts = [example["prompt"] for example in examples[part]]
        responses = [example["response"] for example in examples[part]]
        batch = make_batch(prompts, responses, tokenizer.pad_token_id, device)
        return sft_loss(model, batch, token_count)

    return [partial(loss, part) for part in micro_slices(len(examples), size)]


@torch.no_grad()
def held_out_loss(model, examples, tokenizer, cfg, device):
    """Cross-entropy in nats per response token on held-out examples; all ranks compute all."""
    token_count = sum(len(example["response"]) for example in examples)
    size = cfg.micro_batch_size
    losses = micro_losses(model, examples, tokenizer, token_count, size, device)
    return sum(float(loss()) for loss in losses)


def main(argv=None):
    """Fine-tune a model on demonstrations, with the settings of the command line."""
    try:
        train(parse(Config, "sft", argv))
    except StorageError as error:
        fail_together(error)


def train(cfg):
    """The whole chapter: fine-tune, measure, save, with `run.json` and `metrics.jsonl`."""
    device = setup(cfg.device, cfg.timeout)  # join the other ranks, if torchrun started us
    record_rows(cfg)  # so that a changed file is noticed later
    rows = load_share(cfg, "sft", "response")  # this chapter's share of the demonstrations
    test = load_share(cfg, "test", "response")[:256]  # held out: no chapter learns from them
    out = claim(cfg.out)  # the run's folder, held against other runs
    if finished(cfg, out):  # --resume auto found nothing left to do
        return
    model, tokenizer = start_model(cfg, rows)  # pretrained, or small and random
    announce(tokenizer, cfg)  # how prompts begin and responses end
    rows = usable_rows(rows, tokenizer, cfg)  # without those that do not fit
    test = usable_rows(test, tokenizer, cfg)
    cfg.steps = count_steps(cfg, len(rows))
    model.to(load_device(cfg, device))
    broadcast_parameters(model)  # all ranks start equal
    prepare(model, cfg, device)  # bf16 and other options
    optimizer = make_optimizer(model)
    print0(f"SFT: {len(rows):,} demonstrations, {model.num_parameters():,} parameters -> {out}")
    run = Run(cfg, out, "sft", {"model": model}, {"model": optimizer})
    run.begin()  # at step 0, or where an interrupted run was
    for step in run.steps():
        clock = [tick(device)]
        mine = my_share(batch_rows(rows, step, cfg.batch_size, cfg.seed))  # texts
        examples = encode(mine, tokenizer, cfg)  # token lists
        token_count = float(all_sum(sum(len(example["response"]) for example in examples)))
        losses = micro_losses(model, examples, tokenizer, token_count, cfg.micro_batch_size, device)
        lr = cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup)
        loss = update(model, optimizer, losses, lr)
        clock.append(tick(device))
        run.log({"step": step, "loss": loss} | timings(clock), "loss", examples)

    loss = held_out_loss(model, encode(test, tokenizer, cfg), tokenizer, cfg, device)
    print0(f"SFT: cross-entropy {loss:.3f} nats a token on {len(test)} held-out demonstrations")
    save_models([model, tokenizer], out)
    write_result(out, cfg, {"test_loss": loss})  # run.json: from here on the folder is complete


# Appendix A. Runs that are not lost.
#
# A run may take days, and machines fail. Noise is a pure function of (seed, step, prompt), and
# data order and schedules are pure functions of the step. So weights, optimizer state and the
# step are all that it takes to go on as if nothing had happened. They are saved in
#
#     OUT/checkpoints/step-000020/    the state after 20 steps
#         *.distcp, .metadata         weights and optimizer state, each rank's part in its own files
#         state.json                  step, settings, lengths of the logs, skipped updates
#         manifest.json               size and SHA-256 of all these files
#
# A checkpoint is written under a temporary name, and gets its own in one move when all of it is
# on the disk. The manifest finds what disks and people do to it later.

LOGS = ("metrics.jsonl", "samples.jsonl")
TRACKERS = ("wandb", "trackio", "swanlab", "tensorboard")
# Settings that may differ when a run goes on: they cannot change its result.
FREE_SETTINGS = {
    *("out", "device", "micro_batch_size", "resume", "save_every", "keep", "override", "arms"),
    *("max_skipped", "shard", "timeout", "gradient_checkpointing", "track", "sample_batch_size"),
    *("sort_by_length", "trust_programs"),
}
held_locks = []  # locks on run folders, held until this process ends


class TrainingState(Stateful):
    """What a checkpoint holds of models, optimizers and random generators.

    torch.distributed.checkpoint calls `state_dict` to save. To load, it calls `state_dict` again,
    fills these tensors from the files, and hands them to `load_state_dict`.
    """

    def __init__(self, models, optimizers):
        self.models = models
        self.optimizers = optimizers

    def state_dict(self):
        """{model: {"weights", "optimizer"}}, and the generators, though none of ours is global."""
        state = {"generator": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda_generator"] = torch.cuda.get_rng_state()
        for name, optimizer in self.optimizers.items():
            weights, moments = dcp_state.get_state_dict(self.models[name], optimizer)
            state[name] = {"weights": weights, "optimizer": moments}
        return state

    def load_state_dict(self, state):
        """Put a state back, on any number of ranks, whole or split among them."""
        torch.set_rng_state(state["generator"].cpu())
        if "cuda_generator" in state:
            torch.cuda.set_rng_state(state["cuda_generator"].cpu())
        for name, optimizer in self.optimizers.items():
            dcp_state.set_state_dict(
                self.models[name],
                optimizer,
                model_state_dict=state[name]["weights"],
                optim_state_dict=state[name]["optimizer"],
            )


class Run:
    """A training run in the folder `out`: its steps, its logs, its checkpoints.

        run = Run(cfg, out, "sft", {"model": model}, {"model": optimizer})
        run.begin()
        for step in run.steps():
            ...
            run.log({"step": step, "loss": loss}, "loss")

    models: {name: module}; optimizers: {name: its optimizer} of those that learn.
    """

    def __init__(self, cfg, out, name, models, optimizers):
        self.cfg = cfg
        self.out = Path(out)
        self.folder = self.out / "checkpoints"
        self.name = name
        self.state = TrainingState(models, optimizers)
        self.first = 0  # the step to begin with
        self.last = None  # the newest checkpoint's folder
        self.counters = {"skipped": 0, "in_a_row": 0}  # updates that were not finite
        self.signal = 0  # the number of a signal that asks for an end
        self.bar = None
        self.track = None  # a function of a row, where --track is given
        self.end_tracking = None

    def begin(self):
        """Go on from the newest complete checkpoint (--resume auto), or start anew.

        Only from here on is anything in the folder changed: what an earlier run has logged of
        later steps is cut off.
        """
        self.last = find_checkpoint(self.cfg, self.out)
        if self.last:
            saved = on_rank0(read_json, self.last / "state.json")
            compare_settings(self.cfg, saved["config"], f"{self.last} has other settings")
            self.first, self.counters = saved["step"], saved["counters"]
            load_checkpoint(self.last, self.state)
            total = self.cfg.steps
            print0(f"{self.name}: goes on from {self.last}, {self.first} of {total} steps are done")
            on_rank0(cut_logs, self.out, saved["log_sizes"])
        else:
            torch.manual_seed(self.cfg.seed)  # whatever this process has done before
            on_rank0(start_folder, self.out)
        if self.cfg.track and rank() == 0:
            self.track, self.end_tracking = start_tracking(self.cfg, self.out)
        self.bar = tqdm(
            total=self.cfg.steps,
            initial=self.first,
            desc=self.name,
            disable=rank() != 0,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def steps(self):
        """Yield the number of every step that is left; save checkpoints between the steps.

        On SIGINT (Ctrl-C) or SIGTERM the step under way is finished and saved, and the run ends.
        """
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.remember_signal)
        try:
            for step in range(self.first, self.cfg.steps):
                yield step
                done = step + 1
                number = self.signal_of_any_rank()
                due = self.cfg.save_every and done % self.cfg.save_every == 0
                if due or number or done == self.cfg.steps:
                    self.save(done)
                if number:
                    self.end_early(number)
        finally:
            self.bar.close()
            if self.track:
                self.end_tracking()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.signal:  # it came while the last checkpoint was being written
            os.kill(os.getpid(), self.signal)

    def remember_signal(self, number, frame):
        """Signal handler: remember the first signal; a second one ends the process at once."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def signal_of_any_rank(self):
        """The signal that any of the ranks has received, 0 for none: all must end together."""
        number = torch.tensor(self.signal)
        if world() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def end_early(self, number):
        """End the program as the signal asks for, after a word on how to go on."""
        self.bar.close()
        name = signal.Signals(number).name
        print0(f"{name}: saved {self.last}; the same command with --resume auto goes on from it")
        raise SystemExit(128 + number)

    def log(self, row, show, batch=()):
        """Append `row` to metrics.jsonl and show its key `show` in the bar.

        A loss that is not finite stands for a skipped update. After max_skipped such rows one
        after the other the run ends, and leaves `batch`, this rank's examples, behind.
        """
        self.bar.set_postfix({show: f"{row[show]:.3f}"}, refresh=False)
        self.bar.update()
        self.append("metrics.jsonl", [row])
        if self.track:
            self.track({name: value for name, value in row.items() if value is not None})
        losses = [value for key, value in row.items() if key.endswith("loss")]
        if all(loss is None or math.isfinite(loss) for loss in losses):
            self.counters["in_a_row"] = 0
            return
        self.counters["skipped"] += 1
        self.counters["in_a_row"] += 1
        if self.counters["in_a_row"] >= self.cfg.max_skipped:
            self.give_up(row["step"], batch)

    def give_up(self, step, batch):
        """End a run whose loss stays infinite or NaN, and leave all ranks' last batch behind."""
        path = self.out / "bad_batch.json"
        self.store("write bad_batch.json", write_json, path, {"step": step, "batch": gather(batch)})
        self.bar.close()
        fail_together(
            f"the loss is no longer finite: lower --lr (or --critic_lr), and go on from "
            f"{self.last} with --resume auto --override; {self.cfg.max_skipped} steps in a row "
            f"were skipped, the last batch is in {path}"
        )

    def append(self, name, rows):
        """Append rows to one of the run's LOGS, on rank 0."""
        self.store(f"write {name}", append_rows, self.out / name, rows)

    def store(self, what, action, *args):
        """Do something to the run's folder on rank 0; where it fails, say what is still there."""
        try:
            on_rank0(action, *args)
        except StorageError as error:
            self.storage_failed(what, error)

    def save(self, step):
        """Save the state after `step` steps."""
        try:
            state = {"step": step, "counters": self.counters, "config": asdict(self.cfg)}
            self.last = save_checkpoint(self.out, self.state, state, self.cfg.keep)
        except StorageError as error:
            self.storage_failed("save a checkpoint", error)

    def storage_failed(self, what, error):
        """End the program with one line: what failed, why, and what there is to go on from."""
        self.bar.close()  # or the error would be printed on the same line
        on_rank0(remove_leftovers, self.folder)
        last = self.last or "(none yet)"
        fail_together(
            f"cannot {what} in {self.out}: {error}; "
            f"the last complete checkpoint is {last} (--resume auto)"
        )


def start_tracking(cfg, out):
    """Two functions of the tracker --track: one logs a row of metrics, one ends the run.

    wandb, trackio and swanlab share one interface. metrics.jsonl stays the source.
    """
    if cfg.track != "tensorboard":
        tracker = importlib.import_module(cfg.track)
        tracker.init(project="ma-rlhf", name=str(out), config=asdict(cfg))
        return tracker.log, tracker.finish
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard")

    def log(row):
        for key, value in row.items():
            writer.add_scalar(key, value, row["step"])

    return log, writer.close


class Writer(dcp.FileSystemWriter):
    """PyTorch's writer of checkpoints; it tells why a write has failed."""

    def write_data(self, plan, planner):
        """Write this rank's part. PyTorch hides a full disk behind the error that follows it."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ or error from None


def save_checkpoint(out, training_state, state, keep):
    """Write OUT/checkpoints/step-N for N = state["step"]; keep the newest `keep`. -> its folder

    Every rank writes its own part, and takes the SHA-256 of its own files: of a large model these
    are hundreds of gigabytes, too many for one rank while the others wait.
    """
    final = out / "checkpoints" / f"step-{state['step']:06d}"
    temporary = final.with_name(f".tmp-{final.name}")
    on_rank0(make_empty, temporary)
    try:
        # One tensor after the other is copied to the CPU and written: never a second copy of all.
        writer = Writer(temporary, per_thread_copy_ahead=0)
        dcp.save({"state": training_state}, storage_writer=writer)
    except CheckpointException as error:  # all ranks get it, whichever has failed
        raise StorageError(reason_of(error)) from None
    mine = sorted(temporary.glob(f"__{rank()}_*.distcp"))
    manifest = dict(gather([(path.name, fingerprint(path)) for path in mine]))
    on_rank0(complete_checkpoint, out, temporary, final, state, manifest)
    on_rank0(remove_old, out, final, keep)
    return final


def complete_checkpoint(out, temporary, final, state, manifest):
    """Add state and manifest to a checkpoint, and give it its name."""
    logs = [out / name for name in LOGS if (out / name).exists()]
    wait_for_disk(*logs)
    sizes = {path.name: path.stat().st_size for path in logs}
    write_json(temporary / "state.json", state | {"log_sizes": sizes})
    for name in ("state.json", ".metadata"):
        manifest[name] = fingerprint(temporary / name)
    write_json(temporary / "manifest.json", manifest)
    wait_for_disk(temporary)
    remove(final)  # a damaged one
    temporary.rename(final)
    wait_for_disk(final.parent)


def remove_old(out, newest, keep):
    """Remove all checkpoints but the last `keep` up to `newest`; any later ones are damaged."""
    saved = checkpoints(out)
    upto = saved[: saved.index(newest) + 1]
    for path in saved:
        if path not in upto[-keep:]:
            remove(path)


def load_checkpoint(folder, training_state):
    """Put a checkpoint into models and optimizers, on any number of ranks."""
    try:
        dcp.load({"state": training_state}, checkpoint_id=folder)
    except CheckpointException as error:
        fail_together(f"{folder} does not fit the model: {reason_of(error)}")


def reason_of(error):
    """The first line of the first rank's failure in a CheckpointException."""
    cause = next(iter(error.failures.values()))[0]
    return getattr(cause, "strerror", None) or str(cause).strip().split("\n")[0]


def checkpoints(out):
    """Folders of the checkpoints in a run's folder, oldest first."""
    folders = (Path(out) / "checkpoints").glob("step-*")
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def find_checkpoint(cfg, out):
    """The newest complete checkpoint to go on from; None where the run starts anew."""
    saved = on_rank0(checkpoints, out) if cfg.resume else []
    for folder in reversed(saved):
        reasons = [reason for reason in gather([damage(folder)]) if reason]
        if not reasons:
            return folder
        if rank() == 0:
            print(f"warning: {folder} is skipped: {reasons[0]}", file=sys.stderr, flush=True)
    if saved:
        fail_together(f"no checkpoint in {out} is complete; without --resume the run starts anew")
    return None


def damage(folder):
    """What is wrong with this rank's share of a checkpoint's files; None if nothing is."""
    try:
        manifest = read_json(folder / "manifest.json")
        for name in sorted(manifest)[rank() :: world()]:
            size, sha256 = manifest[name]
            if not (folder / name).is_file():
                return f"{name} is missing"
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if fingerprint(folder / name) != [size, sha256]:
                return f"{name} is damaged: its SHA-256 differs"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it cannot be read: {error}"
    return None


def fingerprint(path):
    """[size in bytes, SHA-256] of a file."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, sha256]


def start_folder(out):
    """Make a run's folder ready for a run from step 0."""
    old = checkpoints(out)
    if old:
        print(f"starting anew: {len(old)} checkpoints in {out} are removed", flush=True)
        remove(out / "checkpoints")
    cut_logs(out, {})


def cut_logs(out, log_sizes):
    """Cut the logs back to where the run goes on; and the folder is not finished any more."""
    (out / "run.json").unlink(missing_ok=True)
    remove_leftovers(out)
    remove_leftovers(out / "checkpoints")
    for path in (out / name for name in LOGS):
        if path.exists():
            os.truncate(path, min(log_sizes.get(path.name, 0), path.stat().st_size))


def remove_leftovers(folder):
    """Remove what an interrupted write has left."""
    for leftover in folder.glob(".tmp-*"):
        remove(leftover)


def claim(path):
    """Create a run's folder and hold it until this process ends: two runs would mix their files."""
    folder = make_folder(path)
    try:
        on_rank0(lock, folder)
    except StorageError as error:
        fail_together(error)
    return folder


def lock(folder):
    """Lock a folder for this process; the system unlocks it, even after kill -9."""
    held = FileLock(folder.resolve() / "run.lock", is_singleton=True)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise OSError(f"another run writes to {folder}") from None
    held_locks.append(held)


def finished(cfg, out):
    """Whether --resume auto finds this run finished, so that there is nothing left to do."""
    path = Path(out) / "run.json"
    if cfg.resume != "auto" or not on_rank0(path.exists):
        return False
    made = on_rank0(read_json, path)["config"]
    compare_settings(cfg, made, f"{out} is finished, with other settings")
    if changed_settings(cfg, made):  # --override: train on
        return False
    print0(f"{out} is already finished")
    return True


def compare_settings(cfg, made, what):
    """Refuse to go on with other settings than something was `made` with, unless --override."""
    changes = changed_settings(cfg, made)
    if changes and not cfg.override:
        fail_together(f"{what}: {'; '.join(changes)} (--override goes on with the new)")


def changed_settings(cfg, made):
    """Settings in which `cfg` differs from those that something was `made` with, as texts."""
    changes = []
    for name, now in asdict(cfg).items():
        free = name in FREE_SETTINGS or (name == "steps" and cfg.epochs)  # epochs set the steps
        if name in made and not free and made[name] != now:
            what = "the rows have changed: " if name == "rows_sha256" else ""
            changes.append(f"{what}--{name} was {made[name]!r}, is {now!r}")
    return changes


def save_models(parts, out):
    """Save models and tokenizers in Hugging Face format, on rank 0."""
    states = []
    for part in parts:
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        split_up = is_sharded(part)  # then put it together, on rank 0's CPU
        states.append(dcp_state.get_model_state_dict(part, options=options) if split_up else None)

    def save():
        for part, state in zip(parts, states, strict=True):
            options = {"state_dict": state} if state else {}
            part.save_pretrained(out, **options)
        wait_for_disk(*(path for path in Path(out).iterdir() if path.is_file()))

    try:
        on_rank0(save)
    except StorageError as error:
        fail_together(f"cannot save the model in {out}: {error}")


def write_result(out, cfg, result):
    """Write run.json: settings and results. A folder that has one is complete."""
    on_rank0(write_json, Path(out) / "run.json", {"config": asdict(cfg), "result": result})


class StorageError(OSError):
    """Something on rank 0's disk went wrong; raised on all ranks, so that all can act alike."""


def on_rank0(action, *args):
    """What `action(*args)` returns on rank 0, for every rank; all wait until it is done.

    Where it raises an OSError there, a StorageError with the reason is raised on every rank.
    """
    result, problem = None, None
    if rank() == 0:
        try:
            result = action(*args)
        except (OSError, SafetensorError) as error:
            problem = describe(error)
    if world() > 1:
        shared = [result, problem]
        dist.broadcast_object_list(shared, src=0)
        result, problem = shared
    if problem:
        raise StorageError(problem)
    return result


def describe(error):
    """An error of the file system in words: which file, and why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def setup(device="", timeout=600.0):
    """Join the process group if torchrun started us; returns the torch.device of this rank.

    timeout: seconds that a rank may take between two exchanges; after that it counts as lost, and
    the others end with an error, from which --resume auto goes on.
    """
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout)
    return device


def pick_device(device):
    """The torch.device meant by --device; under torchrun every rank has a GPU of its own."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def keep_freed_memory():
    """Keep the memory of freed tensors for the next ones, as PyTorch does on a GPU by itself.

    The C library (glibc) returns that of a large tensor to the system at once. For the next tensor
    the system has to find and clear it page by page: up to a sixth of an update. The price is a
    process that stays as large as it once was. With another C library nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors live in the heap, too


def join(backend, timeout):
    """Join the process group of all ranks."""
    limit = timedelta(seconds=timeout)
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=limit))
        # torchrun's own store outlives a restart (--max_restarts). Without a prefix, new ranks
        # could read the addresses of dead ones there, and wait for them for ever.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dist.PrefixStore(f"attempt {attempt}", store)
        dist.init_process_group(backend, timeout=limit, store=store, rank=number, world_size=count)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        fail(f"cannot meet the other ranks at {place}: {str(error).splitlines()[0]}")
    atexit.register(dist.destroy_process_group)


def read_json(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text())


def write_json(path, value):
    """Write a JSON file in one move: nobody will ever see half of it."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    wait_for_disk(temporary)
    temporary.rename(path)


def append_rows(path, rows):
    """Append rows to a .jsonl file."""
    with path.open("a") as file:
        for row in rows:
            file.write(json_line(row))


def json_line(row):
    """A row as a line of JSON, in which null stands for what is not finite: JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n"


def wait_for_disk(*paths):
    """Wait until files and folders are on the disk, and not only in the system's memory."""
    for path in paths:
        place = os.open(path, os.O_RDONLY)
        os.fsync(place)
        os.close(place)


def make_empty(folder):
    """An empty folder, whatever was there."""
    remove(folder)
    folder.mkdir(parents=True)


def remove(path):
    """Remove a file or folder. A folder is renamed first: half of it must not look complete."""
    if path.is_dir():
        path = path.rename(path.with_name(f".tmp-old-{path.name}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tick(device):
    """(time in seconds, None); on a GPU, whose work is waited for, (time, peak GB since then)."""
    if device.type != "cuda":
        return time.perf_counter(), None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter(), peak


def timings(clock, phases=()):
    """Seconds of a step and its phases, which lie between the ticks; on a GPU peak memory too."""
    found = {"seconds": clock[-1][0] - clock[0][0]}
    for name, (before, after) in zip(phases, pairwise(clock), strict=False):
        found[f"seconds_{name}"] = after[0] - before[0]
    if clock[0][1] is not None:  # this rank's; the other ranks do the same work
        found["gpu_gb"] = max(peak for _, peak in clock[1:])
        for name, (_, peak) in zip(phases, clock[1:], strict=False):
            found[f"gpu_gb_{name}"] = peak
    return found


# Appendix B. Settings.
#
# Every setting is a flag. A task, and a preset of the paper's, are nothing but flags in front of
# those on the command line, and of two equal flags the last one wins. So what you type always
# counts, and --help shows all that is put in front.

# Real text without a pretrained model: sized for minutes on two cores.
SMALL = {
    "sft": "--max_prompt 192 --max_response 96 --steps 250 --batch_size 16 --lr 1e-3",
    "reward": "--max_prompt 192 --max_response 96 --steps 100 --batch_size 16 --lr 2e-4",
    "ma_ppo": "--max_prompt 192 --max_response 96 --steps 40 --batch_size 32 "
    "--lr 2e-4 --critic_lr 2e-4",
}
# Programs have no reward model: unit tests give the score, and that of no program at all is -1.
NO_RM = "--split 20 0 80"
TESTED = f"{NO_RM} --arms token fixed ast --n 10 --no_eos_score -1"
TASK_FLAGS = {  # {task: {chapter: flags}}
    "toy": {},
    "toy-code": {
        "sft": f"{NO_RM} --max_response 80 --steps 500",
        "ma_ppo": f"{TESTED} --max_response 80 --lr 1e-3",
    },
    "tldr": SMALL,
    "hh": SMALL,
    "webgpt": SMALL,
    "plain": SMALL,
    "apps": {
        "sft": f"{SMALL['sft']} {NO_RM}",
        "ma_ppo": f"{SMALL['ma_ppo']} {TESTED}",
    },
}
PROGRAMS = ("toy-code", "apps")
# A pretrained model would forget what it knows at the rates of a small new one: with --model,
# those of the paper's 2B model are put in front, and micro-batches that leave room in memory.
PRETRAINED = {
    "sft": "--micro_batch_size 8 --lr 5e-5",
    "reward": "--micro_batch_size 8 --lr 1e-5",
    "ma_ppo": "--micro_batch_size 8 --lr 1.5e-5 --critic_lr 1.5e-5",
}
# The paper's settings (its appendix), for each model and task.
TEXTS = "--max_prompt 512 --max_response 512 --micro_batch_size 4 --epochs 1"
CODE = f"--max_prompt 600 --max_response 512 --micro_batch_size 4 --epochs 1 {NO_RM}"
PPO = "--batch_size 256 --warmup 200 --beta 0.05 --temperature 0.8 --top_k 50 --sort_by_length"
PPO_2B = f"{PPO} --lr 1.5e-5 --critic_lr 1.5e-5"
PPO_7B = f"{PPO} --lr 1e-6 --critic_lr 1e-6"
CODE_PPO = f"{TESTED} --batch_size 16 --lr 5e-7 --critic_lr 5e-5 --warmup 20 --top_k 5"
PRESETS = {  # {preset: {chapter, or all of them: flags}}
    "gemma-2b-tldr": {
        "all": f"--task tldr --model google/gemma-2b {TEXTS}",
        "sft": "--batch_size 512 --lr 5e-5 --epochs 3",
        "reward": "--batch_size 64 --lr 1e-5",
        "ma_ppo": PPO_2B,
    },
    "gemma-2b-hh": {
        "all": f"--task hh --model google/gemma-2b {TEXTS}",
        "sft": "--batch_size 512 --lr 5e-5 --epochs 3",
        "reward": "--batch_size 64 --lr 1e-5",
        "ma_ppo": PPO_2B,
    },
    "gemma-2b-webgpt": {
        "all": f"--task webgpt --model google/gemma-2b {TEXTS}",
        "sft": "--batch_size 64 --lr 1e-4 --epochs 3",
        "reward": "--batch_size 32 --lr 2e-5",
        "ma_ppo": PPO_2B,
    },
    "gemma-7b-tldr": {
        "all": f"--task tldr --model google/gemma-7b {TEXTS}",
        "sft": "--batch_size 128 --lr 2e-5 --epochs 1",
        "reward": "--batch_size 128 --lr 1e-6",
        "ma_ppo": PPO_7B,
    },
    "gemma-7b-hh": {
        "all": f"--task hh --model google/gemma-7b {TEXTS}",
        "sft": "--batch_size 128 --lr 2e-5 --epochs 1",
        "reward": "--batch_size 64 --lr 1e-6",
        "ma_ppo": PPO_7B,
    },
    "gemma-7b-webgpt": {
        "all": f"--task webgpt --model google/gemma-7b {TEXTS}",
        "sft": "--batch_size 128 --lr 2e-5 --epochs 5",
        "reward": "--batch_size 32 --lr 1e-6",
        "ma_ppo": f"{PPO_7B} --beta 0.1",
    },
    "gemma-2-27b-tldr": {
        "all": f"--task tldr --model google/gemma-2-27b {TEXTS}",
        "sft": "--batch_size 128 --lr 5e-6 --epochs 3",
        "reward": "--batch_size 128 --lr 8e-6",
        "ma_ppo": f"{PPO} --lr 7e-7 --critic_lr 1e-6 --beta 0.1 --warmup 0",
    },
    "codegemma-2b-apps": {
        "all": f"--task apps --model google/codegemma-2b {CODE}",
        "sft": "--batch_size 16 --lr 5e-6 --warmup 0",
        "ma_ppo": CODE_PPO,
    },
    "codegemma-7b-apps": {
        "all": f"--task apps --model google/codegemma-7b {CODE}",
        "sft": "--batch_size 32 --lr 2e-6 --warmup 0",
        "ma_ppo": CODE_PPO,
    },
}


def parse(config_class, chapter, argv=None):
    """A chapter's `Config`: its defaults, then flags of task, model and preset, then `argv`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    title = sys.modules[config_class.__module__].__doc__.split("\n")[0]
    parser = HfArgumentParser(
        config_class,
        description=title,
        epilog=flags_in_front(chapter),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.error = fail
    if "--steps" in argv and "--epochs" not in argv:
        argv += ["--epochs", "0"]  # what is typed counts, whatever a preset says
    cfg = config_class(**vars(parser.parse_args(default_flags(chapter, argv) + argv)))
    if not cfg.out:
        cfg.out = str(Path("runs") / cfg.task / ("" if chapter == "ma_ppo" else chapter))
    check(cfg)
    return cfg


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and leaves the lines of the table at the end as they are."""


def default_flags(chapter, argv):
    """The flags that task, model and preset in `argv` put in front of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail
    for name in ("--task", "--model", "--preset"):
        parser.add_argument(name, default="")
    chosen, _ = parser.parse_known_args(argv)
    if chosen.preset and chosen.preset not in PRESETS:
        fail(f"unknown preset {chosen.preset!r}: choose from {', '.join(PRESETS)}")
    preset = PRESETS.get(chosen.preset, {"all": ""})
    task = chosen.task or preset["all"].partition("--task ")[2].partition(" ")[0] or "toy"
    if task not in TASK_FLAGS:
        fail(f"unknown task {task!r}: choose from {', '.join(TASK_FLAGS)}")
    flags = [TASK_FLAGS[task].get(chapter, "")]
    if chosen.model:
        flags.append(PRETRAINED[chapter])
    flags.append(preset["all"])
    flags.append(preset.get(chapter, ""))
    return shlex.split(" ".join(flags))


def flags_in_front(chapter):
    """The end of --help: what tasks, models and presets put in front of the command line."""
    lines = ["flags that are put in front of yours (of two equal flags the last one, yours, wins):"]
    for task, flags in TASK_FLAGS.items():
        lines.append(f"  --task {task}: {flags.get(chapter, '') or '(none)'}")
    lines.append(f"  --model NAME: {PRETRAINED[chapter]}")
    for name, flags in PRESETS.items():
        lines.append(f"  --preset {name}: {flags['all']} {flags.get(chapter, '')}")
    return "\n".join(lines)


def check(cfg):
    """Refuse settings that cannot work, before anything is computed."""
    positive = "steps batch_size micro_batch_size lr max_prompt max_response timeout"
    for name in positive.split():
        if not 0 < getattr(cfg, name) < math.inf:
            fail(f"--{name} must be positive, got {getattr(cfg, name)}")
    at_least = {"save_every": 0, "keep": 1, "max_skipped": 1, "epochs": 0, "warmup": 0}
    for name, least in at_least.items():
        if not least <= getattr(cfg, name) < math.inf:
            fail(f"--{name} must be {least} or more, got {getattr(cfg, name)}")
    choices = {
        "precision": ("auto", "bf16", "fp32"),
        "resume": ("", "auto"),
        "track": ("", *TRACKERS),
    }
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            fail(f"--{name} must be one of {allowed}, got {getattr(cfg, name)!r}")
    if not 0 <= cfg.seed < 2**63:
        fail(f"--seed must be 0 or more and below 2**63, got {cfg.seed}")
    if cfg.track and importlib.util.find_spec(cfg.track) is None:
        fail(f"--track {cfg.track} needs: pip install {cfg.track}")
    check_data(cfg)
    check_ranks(cfg)
    check_device(cfg)


def check_data(cfg):
    """Refuse rows that cannot be found, or shared out."""
    if cfg.task.startswith("toy") and cfg.data:
        fail("--data FILE needs a task that reads it: tldr, hh, webgpt, apps or plain")
    if cfg.task == "plain" and not cfg.data:
        fail(f"--task {cfg.task} needs --data FILE")
    if len(cfg.split) != 3 or min(cfg.split) < 0 or not 99.9 < sum(cfg.split) < 100.1:
        fail(f"--split must be three percentages that add up to 100, got {cfg.split}")


def check_ranks(cfg):
    """Refuse a batch that the ranks cannot share evenly."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.shard and ranks == 1:
        fail("--shard splits models among ranks: start two with torchrun --nproc_per_node=2")
    if cfg.batch_size % ranks:
        fail(f"--batch_size {cfg.batch_size} is not divisible by the number of ranks, {ranks}")


def check_device(cfg):
    """Refuse a device that is not there, or that all ranks would share."""
    try:
        device = pick_device(cfg.device)
        if device.type == "cuda":
            torch.cuda.init()  # says so in words where there is no GPU, or torch was built without
            torch.cuda.set_device(device)  # or every rank would first use some of GPU 0
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        fail(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}")
    if ":" in cfg.device and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail(f"--device {cfg.device} would put all ranks on one; say --device {device.type}")


def count_steps(cfg, count):
    """--steps, or as many as --epochs passes over `count` rows take."""
    if cfg.epochs:
        return max(1, round(cfg.epochs * count / cfg.batch_size))
    return cfg.steps


def make_folder(path):
    """Create the output folder and prove that it can be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot create {path}: {error.strerror}")
    if not os.access(path, os.W_OK):
        fail(f"cannot write to {path}")
    return Path(path)


def fail(message):
    """End the program with one line for the person at the keyboard and exit code 2.

    Before the ranks have joined they all fail alike, and rank 0 speaks; later each speaks for
    itself, with its number.
    """
    number = int(os.environ.get("RANK", 0))
    if number == 0 or dist.is_initialized():
        name = f"rank {number}: " if number else ""
        print(f"{name}error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def fail_together(message):
    """End all ranks, which have met the same problem; rank 0 says so."""
    if rank() == 0:
        fail(message)
    raise SystemExit(2)


# Appendix C. Models.
#
# The story calls models and does not care how they were loaded, in which precision they multiply,
# or whether they are split among GPUs. All of that is decided here, once, before training.
#
# All models of the pipeline stay in eval mode, so that dropout is off: PPO compares the
# probability of a token now with that when it was sampled, and with dropout the two would differ
# before anything was learned.


def load_or_fail(from_pretrained, path, **options):
    """Call a `from_pretrained`; a failure becomes one line that names the path."""
    kinds = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
    try:
        return from_pretrained(path, **options)
    except kinds as error:  # nothing there, half a download, shapes that differ, a missing package
        reason = str(error).strip().splitlines() or [type(error).__name__]
        fail(f"cannot load {path}: {reason[0]}")


def load_model(auto_class, path):
    """The transformer at `path`, a folder or hub name, in float32 and eval mode.

    auto_class: transformers' AutoModelForCausalLM, or AutoModel for the trunk alone. A LoRA
    adapter, beside the model or alone, is merged into the weights, all of which then learn.
    """
    no_hub_name = str(path).count("/") > 1 or str(path).startswith((".", "/"))
    if no_hub_name and not Path(path).exists():
        fail(f"cannot load a model from {path}: there is no such folder")
    adapter = adapter_of(path)
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, report = load_or_fail(auto_class.from_pretrained, path, **options)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])[0]
        fail(f"{path} holds no {auto_class.__name__.removeprefix('AutoModelFor')}: no {missing}")
    if adapter:
        model = merged(model)
    return model.eval()


def adapter_of(path):
    """The settings of the LoRA adapter at `path`; None where there is none."""
    found = load_or_fail(find_adapter_config_file, path)
    if not found:
        return None
    try:
        import peft  # noqa: F401 (transformers uses it)
    except ImportError:
        fail(f"{path} holds a LoRA adapter, which needs: pip install peft")
    return read_json(found)


def merged(model):
    """A plain model whose weights are those of `model` with its adapter added to them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    plain = type(model)(model.config)  # without what transformers remembers of the adapter
    plain.load_state_dict(model.state_dict())
    plain.generation_config = getattr(model, "generation_config", None)
    return plain


def load_causal_lm(path, length=0, device="cpu"):
    """The causal LM and tokenizer at `path`, in float32, with a PAD that is not EOS.

    length: tokens that prompt and response may take together; refused where the model has fewer
    positions.
    """
    model = load_model(AutoModelForCausalLM, path)
    adapter = adapter_of(path)
    home = path
    if adapter and not (Path(path) / "tokenizer_config.json").is_file():
        home = adapter["base_model_name_or_path"]
    tokenizer = load_or_fail(AutoTokenizer.from_pretrained, home)
    config = model.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or math.inf
    if length > window:
        fail(f"--max_prompt and --max_response add up to {length}; {path} has {window} positions")
    conventions(tokenizer, model)  # where prompts begin, what ends a response: Appendix D
    fit_vocabulary(model, tokenizer)
    return model.to(device), tokenizer


def load_device(cfg, device):
    """Where a model is loaded: on its device, or on the CPU if --shard will move it in pieces."""
    return torch.device("cpu") if cfg.shard else device


def start_model(cfg, rows):
    """What SFT starts from: --model, or a small Llama with a vocabulary made from `rows`."""
    if cfg.model:
        return load_causal_lm(cfg.model, cfg.max_prompt + cfg.max_response)
    torch.manual_seed(cfg.seed)
    tokenizer = small_tokenizer(cfg.task, [row["prompt"] + row["response"] for row in rows])
    toy = cfg.task.startswith("toy")
    hidden, layers, heads = (64, 2, 2) if toy else (128, 4, 4)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(1024, cfg.max_prompt + cfg.max_response),
        # With the usual 0.02 the toy's model does not learn to copy from the post in time.
        initializer_range=0.1 if toy else 0.02,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    conventions(tokenizer, model)
    return model, tokenizer


def small_tokenizer(task, texts):
    """A tokenizer learned from `texts`: whole words for the toy, else 2,048 pieces of bytes."""
    options = {"special_tokens": ["<pad>", "<eos>", "<unk>"], "show_progress": False}
    if task == "toy":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        # " in oslo." -> "▁in", "▁oslo", "."
        words = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.WordLevelTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def prepare(model, cfg, device):
    """Set a model up as --precision, --gradient_checkpointing, --shard and --compile say.

    A model is frozen where its parameters want no gradient: reference and reward model in PPO.
    """
    trunk = getattr(model, "trunk", model)  # a reward model's transformer, without its head
    frozen = not next(model.parameters()).requires_grad
    model.bf16 = wants_bf16(cfg, device)
    if model.bf16 and frozen:
        trunk.to(torch.bfloat16)  # it never learns, so half the memory will do
    if cfg.gradient_checkpointing and not frozen:
        recompute_activations(trunk)
    if cfg.shard:
        shard_model(model, device)
    if cfg.compile:
        model.compile(dynamic=True)


def wants_bf16(cfg, device):
    """Whether matrices are multiplied in bf16: as told, or where the GPU itself can."""
    if cfg.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return cfg.precision == "bf16"


def autocast(model, cache=False):
    """Within this context a model that is set up for bf16 multiplies its matrices in bf16.

    Weights that learn stay in fp32: an update of one part in a thousand would be lost in bf16's
    three digits. They are cast at every use. cache: keep the copies until the context ends (2
    bytes a parameter), which pays where one context calls the model many times.
    """
    bf16 = getattr(model, "bf16", False)
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=cache)


def recompute_activations(trunk):
    """Keep only the inputs of each layer, and compute the rest again in the backward pass.

    transformers recomputes in layers that are in training mode. So that is switched on for the
    layers themselves, not for what is inside them; and their own dropout is switched off.
    """
    trunk.activation_checkpointing_enable()
    for layer in trunk.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)


def shard_model(model, device):
    """Split a model's parameters among the ranks, and with them gradients and Adam's state.

    This is PyTorch's FSDP2. Each layer is put together when it is needed, and taken apart again.
    Our losses are parts of a sum over all ranks, so gradients are added up and not averaged. All
    ranks must call the model equally often. Until here every rank holds the whole model in the
    CPU's memory.
    """
    mesh = init_device_mesh(device.type, (world(),))
    trunk = getattr(model, "trunk", model)
    modules = [layer for layer in trunk.modules() if isinstance(layer, GradientCheckpointingLayer)]
    modules += [trunk, model]  # apart, for the trunk may have another dtype than its head
    # Matrices are multiplied in bf16: then they are sent in bf16 too, in half the time.
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    in_fp32 = MixedPrecisionPolicy()
    for module in dict.fromkeys(modules):
        head = module is model and trunk is not model  # a reward model's head stays in fp32
        policy = in_bf16 if getattr(model, "bf16", False) and not head else in_fp32
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds up


def is_sharded(model):
    """Whether a model is split among the ranks."""
    return isinstance(model, FSDPModule)


def gathered(x):
    """A tensor that may be split among the ranks, put together on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# Appendix D. The model's own conventions.
#
# Every family of models begins a prompt, ends a response
# and marks turns in its own way, and has learned its trade on that: tokens that are off by a space
# cost quality, and nothing tells. `conventions` finds out, once a tokenizer; `encode` follows them.

OWN_PAD = "<|pad|>"


@dataclass
class Conventions:
    """What a tokenizer, its chat template and the model's generation_config.json agree on."""

    begin: list[int]  # stands in front of prompts; chat templates write theirs themselves
    ends: list[int]  # any of them ends a response
    end: int  # closes a demonstration
    turn_end: int  # the same in the chat template, like <|im_end|>
    opening: str  # space between template and answer, like Llama 2's " ": the model writes it
    header: list[int]  # what else stands there, like Qwen 3's empty thoughts: ends the prompt
    has_system: bool  # whether the template has a system role
    control: set[int]  # tokens that no text may turn into
    newline: list[
        int
    ]  # tokens of "\n", where a text on its own is given a space that it lacks after others


def conventions(tokenizer, model=None):
    """The `Conventions` of a tokenizer, which keeps them. Without `model` its folder's files count.

    Adds a PAD where there is none, or one that is an end too: an EOS that is hidden as padding
    would never be learned.
    """
    if model is None and getattr(tokenizer, "conventions", None):
        return tokenizer.conventions
    opening, header, turn_end, has_system = template_turns(tokenizer)
    known = [tokenizer.eos_token_id, *generation_ends(tokenizer, model), turn_end]
    ends = [i for i in dict.fromkeys(known) if i is not None and i < len(tokenizer)]
    if not ends:
        path = tokenizer.name_or_path
        fail(f"the tokenizer of {path} has no EOS token: a response could never end")
    if tokenizer.pad_token_id in (None, *ends):
        tokenizer.add_special_tokens({"pad_token": OWN_PAD})
    tokens = tokenizer.added_tokens_decoder
    control = {number for number, token in tokens.items() if token.special} | set(ends)
    if tokenizer.unk_token_id not in (*ends, tokenizer.bos_token_id):
        control.discard(tokenizer.unk_token_id)
    tokenizer.conventions = Conventions(
        begin=begin_ids(tokenizer),
        ends=ends,
        end=ends[0],
        turn_end=ends[0] if turn_end is None else turn_end,
        opening=opening,
        header=header,
        has_system=has_system,
        control=control,
        newline=newline_ids(tokenizer),
    )
    return tokenizer.conventions


def end_ids(tokenizer):
    """The ids any of which ends a response; its EOS alone for a tokenizer that nobody looked at."""
    found = getattr(tokenizer, "conventions", None)
    return found.ends if found else [tokenizer.eos_token_id]


def generation_ends(tokenizer, model=None):
    """The ids in generation_config.json any of which ends a response: none, one or several."""
    if model is not None:
        found = getattr(model.generation_config, "eos_token_id", None)
    else:
        path = Path(tokenizer.name_or_path or "nowhere") / "generation_config.json"
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return found if isinstance(found, list) else [found]


def begin_ids(tokenizer):
    """The ids that a tokenizer puts in front of a text; what it puts after one is left out."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for place in range(len(whole)):
        if whole[place : place + len(alone)] == alone:
            return whole[:place]
    return []


def newline_ids(tokenizer):
    """The ids of "\\n" if a text on its own is tokenized otherwise than after a newline, else [].

    Llama 2 and Mistral: " blue" alone is "▁ ▁blue", but "▁blue" in the middle of a text.
    """
    plain = partial(tokenizer, add_special_tokens=False)
    newline = plain("\n").input_ids
    for text in ("a", " a"):
        behind = plain("\n" + text).input_ids[len(newline) :]
        if behind and behind != plain(text).input_ids:
            return newline
    return []


def template_turns(tokenizer):
    """What the chat template writes around an answer -> (opening, header, turn_end, has_system)."""
    if not tokenizer.chat_template:
        return "", [], None, False
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    asked = [{"role": "user", "content": "QUESTION"}]
    answered = [*asked, {"role": "assistant", "content": "ANSWER"}]
    try:
        prompt = render(asked, add_generation_prompt=True)
        before, _, behind = render(answered).rpartition("ANSWER")
    except (TemplateError, TypeError, ValueError):
        return "", [], None, False  # it wants other turns: rows will tell
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    header = tokenizer(opening, add_special_tokens=False).input_ids if opening.strip() else []
    turn_end = None
    for token in tokenizer(behind, add_special_tokens=False).input_ids:
        added = tokenizer.added_tokens_decoder.get(token)
        if added and added.content.strip():  # Gemma's "\n" is an added token too
            turn_end = token
            break
    try:
        has_system = "SYSTEM" in render([{"role": "system", "content": "SYSTEM"}, *asked])
    except (TemplateError, TypeError, ValueError):
        has_system = False
    return ("" if header else opening), header, turn_end, has_system


def announce(tokenizer, cfg):
    """Say in one line what `conventions` found; refuse --chat_template where there is none."""
    rules = conventions(tokenizer)
    template = "the tokenizer's" + ("" if cfg.chat_template else ", for rows of turns")
    if cfg.chat_template and not tokenizer.chat_template:
        path = tokenizer.name_or_path
        fail(f"--chat_template: the tokenizer of {path} has none; leave it out or use a chat model")
    begin = chat_ids({"prompt": "a"}, tokenizer)[:1] if cfg.chat_template else rules.begin
    begin = " ".join(tokenizer.convert_ids_to_tokens(begin)) or "with its first word"
    ends = ", ".join(tokenizer.convert_ids_to_tokens(rules.ends))
    template = template if tokenizer.chat_template else "none"
    print0(f"prompt begins {begin}; ends with any of {ends}; template: {template}")


def fit_vocabulary(model, tokenizer):
    """Make room for all tokens in a model, and note which of its ids stand for none (`unused_ids`).

    Qwen has more embeddings than tokens: the others were never trained, and must not be sampled.
    """
    tokens = set(tokenizer.get_vocab().values())
    if max(tokens) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(tokens) + 1)
    if tokenizer.pad_token == OWN_PAD:
        tokens.discard(tokenizer.pad_token_id)
    count = model.get_input_embeddings().weight.shape[0]
    model.unused_ids = [number for number in range(count) if number not in tokens]
    model.config.pad_token_id = tokenizer.pad_token_id


def possible(logits, model):
    """Logits in which ids without a token have no chance.  [..., V] -> [..., V]

    Not minus infinity: PAD may be among them, and in the padding that would be masked as inf * 0.
    """
    unused = getattr(model, "unused_ids", [])
    if not unused:
        return logits
    unused = torch.tensor(unused, device=logits.device)  # [unused ids]
    return logits.index_fill(-1, unused, -1e9)  # [..., V]


def encode(rows, tokenizer, cfg, names=("prompt", "response")):
    """Texts -> token lists: rows {name: text, ...} -> rows {name: ids, ...}, for fields `names`.

    A prompt longer than max_prompt loses its beginning, a response (with its end) longer than
    max_response its end. Prompts in a chat template are never cut: see `usable_rows`.
    """
    encoded = [{} for _ in rows]
    for name in names if rows else ():
        encode_field = prompt_ids if name == "prompt" else response_ids
        lists = encode_field(rows, name, tokenizer, cfg)
        for row, ids in zip(encoded, lists, strict=True):
            row[name] = ids
    return encoded


def prompt_ids(rows, name, tokenizer, cfg):
    """The token lists of prompts: in the chat template where `in_template` says so."""
    rules = conventions(tokenizer)
    lists = text_ids([row[name] for row in rows], tokenizer)
    for i, row in enumerate(rows):
        if in_template(row, tokenizer, cfg):
            lists[i] = chat_ids(row, tokenizer)
        else:
            too_many = max(0, len(lists[i]) + len(rules.begin) - cfg.max_prompt)
            lists[i] = rules.begin + lists[i][too_many:]
    return lists


def response_ids(rows, name, tokenizer, cfg):
    """The token lists of responses, as they continue their prompts, with their end."""
    rules = conventions(tokenizer)
    texts, ends = [], []
    for row in rows:
        text, end = row[name], rules.end
        if in_template(row, tokenizer, cfg):
            # The one space that separates an answer from the words "Assistant:" has no place here.
            text, end = rules.opening + re.sub(r"^\s(?=\S)", "", text), rules.turn_end
        texts.append(text)
        ends.append(end)
    lists = text_ids(texts, tokenizer, rules.newline)
    return [[*ids, end][: cfg.max_response] for ids, end in zip(lists, ends, strict=True)]


def in_template(row, tokenizer, cfg):
    """Whether a row's prompt is put into the tokenizer's chat template."""
    return bool(tokenizer.chat_template) and (cfg.chat_template or "messages" in row)


def text_ids(texts, tokenizer, newline=()):
    """Texts as tokens, none of which is a control token: a "</s>" that is spelled out is text.

    newline: put in front of each text, and cut off again, so that it is tokenized as after others.
    """
    rules = conventions(tokenizer)
    plain = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    lists = plain(texts).input_ids
    if newline:
        for i, ids in enumerate(plain(["\n" + text for text in texts]).input_ids):
            if ids[: len(newline)] == newline:
                lists[i] = ids[len(newline) :]
    for i, ids in enumerate(lists):
        if not rules.control.isdisjoint(ids):  # a vocabulary in which a word is a control token
            lists[i] = [token for token in ids if token not in rules.control]
    return lists


def chat_ids(row, tokenizer):
    """A row's prompt in the tokenizer's chat template, which also begins the answer's turn.

    System text goes to the front of the user's next turn where the template has no place for it.
    """
    rules = conventions(tokenizer)
    turns = row.get("messages") or dialogue(row["prompt"])
    if not rules.has_system:
        turns = [turn | {"role": turn["role"].replace("system", "user")} for turn in turns]
    options = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True}
    try:
        ids = tokenizer.apply_chat_template(alternating(turns), **options)
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        fail(f"the chat template refuses the prompt that begins {row['prompt'][:60]!r}: {reason}")
    return ids + rules.header


def usable_rows(rows, tokenizer, cfg, names=("prompt", "response")):
    """The rows that can be used as tokens. Says how many are not, and how many texts are cut.

    A chat whose prompt does not fit is no use: nothing in a template may be cut. Nor is a pair
    whose texts are equal once they are cut. A limit that would cut an instruction is refused.
    """
    begin = conventions(tokenizer).begin
    for suffix in INSTRUCTIONS:
        room = len(begin) + len(tokenizer(suffix, add_special_tokens=False).input_ids)
        if room > cfg.max_prompt and rows[0]["prompt"].endswith(suffix):
            taken = f"cuts the instruction {suffix!r}, which takes {room} tokens"
            fail(f"--max_prompt {cfg.max_prompt} {taken}")
    whole = replace(cfg, max_prompt=10**9, max_response=10**9)
    kept, cut, dropped = [], Counter(), Counter()
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for row, ids in zip(part, encode(part, tokenizer, whole, names), strict=True):
            reason = unusable(row, ids, tokenizer, cfg)
            if reason:
                dropped[reason] += 1
                continue
            kept.append(row)
            for name in names:
                limit = "max_prompt" if name == "prompt" else "max_response"
                cut[name, limit] += len(ids[name]) > getattr(cfg, limit)
    for reason, count in dropped.items():
        print0(f"{count:,} of {len(rows):,} rows dropped: {reason}")
    for (name, limit), count in (+cut).items():
        size = getattr(cfg, limit)
        print0(f"{count:,} of {len(rows):,} texts {name!r} are cut to --{limit} {size} tokens")
    if not kept:
        fail("none of the rows can be used")
    return kept


def unusable(row, ids, tokenizer, cfg):
    """Why an encoded row, not yet cut, is of no use; None if it is."""
    if in_template(row, tokenizer, cfg) and len(ids["prompt"]) > cfg.max_prompt:
        return f"a chat's prompt longer than --max_prompt {cfg.max_prompt}"
    if "chosen" not in ids or cfg.task == "toy":  # the toy's judge is noisy, also about equals
        return None
    if ids["chosen"][: cfg.max_response] == ids["rejected"][: cfg.max_response]:
        return f"a pair that is equal once cut to --max_response {cfg.max_response}"
    return None


# Appendix E. Rows, in the forms in which people have them.
#
# Data comes as texts or as chat turns, in
# JSON or Parquet, under many names of fields. Here, and nowhere else, each row becomes texts
# {prompt, response, chosen, rejected}, as far as it has them. What is malformed stops the run with
# file and line; what is of no use is dropped, and counted by reason.
#
#     fields of the row                         prompt               response; chosen, rejected
#     info, summaries, choice (TL;DR)           POST … TL;DR:        the summaries, by choice
#     post, subreddit, summary (TL;DR)          POST … TL;DR:        summary
#     question, answer_i, score_i (WebGPT)      Human: … Assistant:  the answers, by score
#     question, solutions, input_output (APPS)  QUESTION: … ANSWER:  the first solution
#     chosen, rejected: texts (HH)              to last "Assistant:" what follows
#     prompt [response or completion]           as it is             as it is
#     prompt, chosen, rejected                  as it is             as they are
#     messages: [{role, content}] (TRL)         all but the last     the assistant's last turn
#     conversations: [{from, value}] (ShareGPT) all but the last     the assistant's last turn
#     chosen, rejected [, prompt]: messages     all but the last     the last turns (UltraFeedback)
#     prompt [, completion]: messages           their turns          the last turn
#     instruction [, input], output (Alpaca)    a user's turn        output
#
# Rows of turns also keep the prompt's `messages`, for the tokenizer's chat template; `prompt` is
# the same as text, in HH's form: "\n\nHuman: why?\n\nAssistant:". The tasks tldr, hh and webgpt
# are natural language: a prompt ends in its last word, an answer begins with one space. Other tasks
# may hold code, in which white space has a meaning: it stays as it is given.

INSTRUCTIONS = (" TL;DR:", "Assistant:", "ANSWER:")  # the last words of prompts, as written below
SPLIT_SEED = 1234  # the paper's; fixed, so that stages run with different --seed never share rows
TEST_SHARE = 0.1
NATURAL = ("tldr", "hh", "webgpt")
ANSWERS = ("response", "completion", "chosen", "rejected")
TWO_PROMPTS = "a pair about two prompts"
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
ROLES = {name: name for name in SPEAKERS} | {"developer": "system", "human": "user"}
ROLES |= {"gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
# Parquet copies that the hub makes of datasets whose scripts no longer load, or plain files.
HUB = {
    "tldr": "openai/summarize_from_feedback@refs/convert/parquet/comparisons/train/*.parquet",
    "hh": "Dahoas/full-hh-rlhf/data/train-*.parquet",
    "webgpt": "openai/webgpt_comparisons@refs/convert/parquet/*/train/*.parquet",
    "apps": "codeparrot/apps/train.jsonl",
}
sys.set_int_max_str_digits(0)  # APPS has integers of more digits than Python reads by default


def load_share(cfg, share, *fields):
    """The rows of a share ("test", "sft", "rm" or "ppo") that have all `fields`; at least one."""
    rows = load_rows(cfg.task, tuple(cfg.data), cfg.skip_bad_rows)
    rows = split(rows, share, tuple(cfg.split))
    rows = [row for row in rows if all(name in row for name in fields)]
    if not rows:
        wanted = " and ".join(fields) or "prompts"
        fail(f"the share {share!r} has no rows with {wanted}: see --split and --data")
    return rows


def split(rows, share, percent=(20, 40, 40)):
    """The rows of the share "test", "sft", "rm" or "ppo"; all about one prompt are in one share.

    A tenth of the prompts is held out as "test"; `percent` of the others are for SFT, RM and PPO.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    random.Random(SPLIT_SEED).shuffle(prompts)
    edges = [0, TEST_SHARE]
    for edge in (percent[0] / 100, (percent[0] + percent[1]) / 100, 1):
        edges.append(TEST_SHARE + (1 - TEST_SHARE) * edge)
    place = ("test", "sft", "rm", "ppo").index(share)
    begin, end = (round(edge * len(prompts)) for edge in edges[place : place + 2])
    wanted = set(prompts[begin:end])
    return [row for row in rows if row["prompt"] in wanted]


@cache
def load_rows(task, files=(), skip_bad_rows=False):
    """A task's rows, as texts {prompt, response, ...}: from `files`, or else from the hub.

    A malformed row stops the program with its file, line and field, or is skipped; rows without use
    are dropped. Both are counted.
    """
    if task == "toy":
        return [toy_row(i) for i in range(TOY_ROWS)]
    if task == "toy-code":
        return [code_row(i) for i in range(CODE_ROWS)]
    name = ", ".join(map(printable, files)) or task
    rows, malformed, dropped = sorted_out(files or ["hf://datasets/" + HUB[task]], task)
    count = len(rows) + len(malformed) + dropped.total()
    if count == 0:
        fail(f"{name} is empty")
    if malformed and not skip_bad_rows:
        many = f"{len(malformed)} malformed of {count} rows"
        fail(f"{malformed[0]} ({many}; --skip_bad_rows leaves them out)")
    dropped["malformed"] = len(malformed)
    print0(f"{task}: {len(rows):,} rows")
    for reason in sorted(+dropped):  # +: without those that are 0
        print0(f"{task}: {dropped[reason]:,} rows dropped: {reason}")
    alone = sum("response" not in row for row in rows)
    if alone:
        print0(f"{task}: {alone:,} rows have a prompt and no response: they serve PPO only")
    if len({row["prompt"] for row in rows}) < 20:
        fail(f"{name}: fewer than 20 different prompts, too few to split")
    return rows


def sorted_out(paths, task):
    """Rows that can be used, complaints about others, and a count of the rest by its reason."""
    rows, malformed, dropped = [], [], Counter()
    for path in paths:
        for where, value in read_file(path):
            try:
                row = read_row(value, task)
            except (ValueError, RecursionError) as error:
                malformed.append(f"{where}: {error}")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                dropped[row] += 1
    return rows, malformed, dropped


def record_rows(cfg):
    """Note which rows a run learns from; refuse others than --rows_sha256. Toys never change."""
    if cfg.task.startswith("toy"):
        return
    found = rows_digest(load_rows(cfg.task, tuple(cfg.data), cfg.skip_bad_rows))
    if cfg.rows_sha256 not in ("", found):
        fail(f"--rows_sha256 {cfg.rows_sha256}: the rows have {found}")
    cfg.rows_sha256 = found


def rows_digest(rows):
    """SHA-256 of rows: a run that goes on, or a stage that is used again, must find the same."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_file(path):
    """Yield (where, row) for each row of a path or URL; one that is no JSON is a ValueError."""
    try:
        for name in downloaded(path):
            with open(name, "rb") as file:  # once only: it may be a pipe
                yield from file_rows(file, printable(path))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        fail(f"--data {printable(path)} cannot be read: {reason}")


def downloaded(path):
    """The files behind `path`: itself; for a URL, which may hold *, copies of `datasets`."""
    if not path.startswith(("hf://", "http://", "https://")):
        return [path]
    import datasets  # takes a second, and files on disk do not need it

    datasets.disable_progress_bars()
    try:
        urls = datasets.data_files.resolve_pattern(path, base_path="")
        return datasets.DownloadManager().download(urls)
    except Exception as error:  # of many kinds: no network, no such dataset, no right to read it
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        fail(f"--data {path} cannot be read: {reason}; without the hub, give files: --data FILE")


def printable(path):
    """A file's name for one line of text: a name may hold line breaks or odd bytes."""
    return path if path.isprintable() else ascii(path)


def file_rows(file, name):
    """Yield (where, row) for an open file. What it is, its first bytes say, and not its name."""
    begin = file.peek(4)[:4]
    if begin == b"PAR1":
        import pyarrow.parquet as parquet  # came with `datasets`, and takes half a second

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ValueError, NotImplementedError) as error:
            raise OSError(str(error)) from None
        yield from numbered(rows, name)
        return
    if begin[:2] == b"\x1f\x8b":
        file = gzip.GzipFile(fileobj=file)
    lines = file.readlines()
    first = next((line for line in lines if line.strip()), b"")
    if first.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":  # all rows in one list
        rows = parsed(b"".join(lines))
        if isinstance(rows, list):
            yield from numbered(rows, name)
            return
        if isinstance(parsed(first), ValueError):
            yield name, rows
            return
    for number, line in enumerate(lines, 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield f"{name}:{number}", parsed(line)


def numbered(rows, name):
    """Yield (where, row) for rows that do not stand on lines of their own."""
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", row


def parsed(text):
    """What a JSON text (str, or bytes of UTF-8) says; if it is none, the ValueError that tells why.

    NaN, which pandas writes where a value is missing, is read as null. Half an emoji, which JSON
    can spell and no tokenizer can read, becomes U+FFFD.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, parse_constant=lambda name: None)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(re.sub("[\ud800-\udfff]", "\ufffd", text))
    except RecursionError:
        return ValueError("not JSON that can be read: it is nested too deeply")
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    return value


def read_row(row, task="plain"):
    """A row in any form of the table -> {prompt, ...}, or a text that says why it is of no use.

    Raises ValueError if a field is missing or of the wrong type.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, got {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None}
    if "chosen" not in row and "rejected" not in row:  # UltraFeedback's pairs have `messages` too
        for name, read in FORMS.items():
            if name in row:
                return read(row)
    texts = [name for name in (*ANSWERS, "prompt") if name in row]
    if not texts:
        known = ", ".join([*FORMS, "chosen", "prompt"])
        raise ValueError(f"no known form: none of the fields {known}")
    if row.get("label") is False:  # TRL's unpaired preferences
        return "a completion that is labelled bad"
    if any(isinstance(row[name], list) for name in texts):
        return turns_row(row)
    return text_row(row, task)


def field_of(row, path, kind=str):
    """The field at a dotted path, such as "info.post"; ValueError if it is not of this `kind`."""
    value = row
    for name in path.split("."):
        name = int(name) if isinstance(value, list) and name.isdigit() else name
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"field {path!r} is missing") from None
    wrong = isinstance(value, bool) or not isinstance(value, kind)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        kind = getattr(kind, "__name__", "number").replace("str", "text")
        raise ValueError(f"field {path!r} must be a {kind}, got {value!r:.60}")
    return value


def pair(prompt, chosen, rejected=None):
    """A row of natural language: one space in front of answers; the chosen one is imitated."""
    row = {"prompt": prompt.rstrip(), "response": " " + chosen.strip()}
    if rejected is not None:
        row |= {"chosen": row["response"], "rejected": " " + rejected.strip()}
    return useful(row)


def useful(row):
    """A row of texts as it is, or why nothing can be learned from it."""
    answers = [row[name] for name in ("response", "chosen", "rejected") if name in row]
    if not all(text.strip() for text in (row["prompt"], *answers)):
        return "an empty text"
    if "chosen" in row and row["chosen"] == row["rejected"]:
        return "a pair of equal texts"
    if row["prompt"].endswith("Assistant:") and any("\n\nHuman:" in text for text in answers):
        return "an answer with a human's turn in it"  # we would teach the model to play both
    return row


def text_row(row, task):
    """Texts: {prompt[, response or completion][, chosen, rejected]}, or HH's {chosen, rejected}."""
    texts = {name: field_of(row, name) for name in (*ANSWERS, "prompt") if name in row}
    is_pair = "chosen" in texts or "rejected" in texts
    chosen = field_of(row, "chosen") if is_pair else texts.get("response", texts.get("completion"))
    rejected = field_of(row, "rejected") if is_pair else None
    if "prompt" not in texts and is_pair:
        before, found, chosen = chosen.rpartition("Assistant:")
        other, _, rejected = rejected.rpartition("Assistant:")
        if not found:
            raise ValueError("field 'chosen' has no 'Assistant:', and there is no field 'prompt'")
        return pair(before + found, chosen, rejected) if before == other else TWO_PROMPTS
    prompt = field_of(row, "prompt")
    if task in NATURAL and chosen is not None:
        return pair(prompt, chosen, rejected)
    found = {"prompt": prompt.rstrip() if task in NATURAL else prompt}
    if chosen is not None:
        found["response"] = chosen
    if rejected is not None:
        found |= {"chosen": chosen, "rejected": rejected}
    return useful(found)


def turns_row(row):
    """Lists of turns in `prompt`, `completion`, `chosen`, `rejected`; some may be texts."""
    prompt = turns_of(row, "prompt") if "prompt" in row else []
    dialogues = {}
    for name in ANSWERS:
        if name in row:
            turns = turns_of(row, name)
            whole = turns[: len(prompt)] == prompt or turns[0]["role"] != "assistant"
            dialogues[name] = turns if whole else prompt + turns
    if "chosen" not in row and "rejected" not in row:
        return dialogue_row({"response": next(iter(dialogues.values()), prompt)})
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"field {name!r} is missing")
    return dialogue_row({name: dialogues[name] for name in ("chosen", "rejected")})


def chat_row(row):
    """One dialogue: {messages: [{role, content}, ...]} or {conversations: [{from, value}, ...]}."""
    name = "messages" if "messages" in row else "conversations"
    return dialogue_row({"response": turns_of(row, name)})


def alpaca_row(row):
    """Alpaca: {instruction[, input], output}: a user's turn and its answer."""
    texts = [field_of(row, name) for name in ("instruction", "input") if row.get(name)]
    turns = [{"role": "user", "content": "\n\n".join(texts)}]
    if "output" in row:
        turns.append({"role": "assistant", "content": field_of(row, "output")})
    return dialogue_row({"response": turns})


def turns_of(row, name):
    """The turns [{role, content}, ...] in a field; a text is the assistant's, or the prompt's."""
    if isinstance(row[name], str):
        answer = [{"role": "assistant", "content": row[name]}]
        return dialogue(row[name]) if name == "prompt" else answer
    turns = []
    for number, turn in enumerate(field_of(row, name, list)):
        share_gpt = isinstance(turn, dict) and turn.get("from") is not None
        speaker, content = ("from", "value") if share_gpt else ("role", "content")
        role = field_of(row, f"{name}.{number}.{speaker}")
        if role.lower() not in ROLES:
            raise ValueError(f"field '{name}.{number}' has the unknown role {role!r:.40}")
        content = field_of(row, f"{name}.{number}.{content}")
        turns.append({"role": ROLES[role.lower()], "content": content})
    if not turns:
        raise ValueError(f"field {name!r} has no turns")
    return turns


def dialogue_row(dialogues):
    """Dialogues {name: turns} about one prompt -> a row. Only the assistant's last turn is learned.

    A dialogue that ends in another turn is a prompt that waits for an answer.
    """
    row = {}
    for name, turns in dialogues.items():
        turns = alternating(turns)
        answered = turns[-1]["role"] == "assistant"
        before = turns[:-1] if answered else turns
        if not any(turn["content"].strip() for turn in before):
            return "an empty text"
        if row.setdefault("messages", before) != before:
            return TWO_PROMPTS
        row["prompt"] = spoken(before)
        if answered:
            answer = turns[-1]["content"]
            row[name] = answer if answer[:1].isspace() else " " + answer
        elif len(dialogues) > 1:
            return "a dialogue that ends with the user's turn"
    if "chosen" in row:
        row["response"] = row["chosen"]
    return useful(row)


def alternating(turns):
    """Turns in which neighbours of one role are one: chat templates want roles to alternate."""
    found = []
    for turn in turns:
        if found and found[-1]["role"] == turn["role"]:
            content = found[-1]["content"] + "\n\n" + turn["content"]
            found[-1] = {"role": turn["role"], "content": content}
        else:
            found.append(turn)
    return found


def spoken(turns):
    """A prompt's turns as text, as HH has it.

    >>> spoken([{"role": "user", "content": "why?"}])
    '\\n\\nHuman: why?\\n\\nAssistant:'
    """
    texts = [f"\n\n{SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns]
    return "".join(texts) + "\n\nAssistant:"


def dialogue(prompt):
    """A prompt's text as turns: [System: …] Human: … Assistant:, by its turns; others as one.

    >>> dialogue(" Human: why? Assistant:")
    [{'role': 'user', 'content': 'why?'}]
    """
    begins = r"^\s*(?=System:|Human:|Assistant:)|\n\n(?=Human:|Assistant:)|\s(?=Assistant:$)"
    speakers = {f"{speaker}:": role for role, speaker in SPEAKERS.items()}
    before, *turns = re.split(f"(?:{begins})(System:|Human:|Assistant:)", prompt)
    if before.strip() or len(turns) < 4 or turns[-2:] != ["Assistant:", ""]:
        return [{"role": "user", "content": prompt}]
    found = []
    for speaker, text in zip(turns[:-2:2], turns[1:-2:2], strict=True):
        found.append({"role": speakers[speaker], "content": text.strip()})
    return alternating(found)


def tldr_row(row):
    """TL;DR: {info: {post, ...}, summaries: [{text}, {text}], choice} or {post, ..., summary}."""
    info = "info." if "info" in row else ""
    if info and field_of(row, "info", dict).get("post", "") is None:
        return "not about a Reddit post"
    subreddit = field_of(row, info + "subreddit").strip()
    post = field_of(row, info + "post").strip()
    if not post:
        return "an empty text"
    prompt = f"POST Subreddit: r/{subreddit} {post} TL;DR:"
    if not info:
        return pair(prompt, field_of(row, "summary"))
    choice = field_of(row, "choice", int)
    if choice not in (0, 1):
        raise ValueError(f"field 'choice' must be 0 or 1, got {choice}")
    chosen = field_of(row, f"summaries.{choice}.text")
    return pair(prompt, chosen, field_of(row, f"summaries.{1 - choice}.text"))


def webgpt_row(row):
    """WebGPT: {question: {full_text}, answer_i, score_i}; marks of quotations, [n], go."""
    score_0, score_1 = (field_of(row, f"score_{i}", (int, float)) for i in (0, 1))
    answers = [field_of(row, f"answer_{i}") for i in (0, 1)]
    answers = [re.sub(r"\s*\[\d+(,\s*\d+)*\]", "", answer) for answer in answers]
    prompt = f" Human: {field_of(row, 'question.full_text').strip()} Assistant:"
    if score_0 == score_1:
        return "equal scores"
    chosen, rejected = answers if score_0 > score_1 else reversed(answers)
    return pair(prompt, chosen, rejected)


def apps_row(row):
    """APPS: {question, starter_code, solutions, input_output}; the first solution is imitated."""
    found = {}
    for name in ("input_output", "solutions"):
        value = row.get(name) or None
        found[name] = parsed(value) if isinstance(value, str) else value
        if isinstance(found[name], ValueError):
            raise ValueError(f"field {name!r} is {found[name]}")
    tests = found["input_output"]
    if not tests or (isinstance(tests, dict) and not any(map(tests.get, ("inputs", "outputs")))):
        return "no unit tests"
    check_tests(tests)
    style = "Call-Based" if tests.get("fn_name") else "Standard Input"
    question = field_of(row, "question").strip()
    starter = field_of(row, "starter_code") if row.get("starter_code") else ""
    prompt = f"QUESTION:\n{question}\n{starter}\nUse {style} format\nANSWER:"
    problem = {"input_output": tests, "difficulty": row.get("difficulty")}
    if not found["solutions"]:
        return {"prompt": prompt, "problem": problem}
    solution = field_of(found, "solutions.0")
    return {"prompt": prompt, "problem": problem, "response": "\n" + solution.strip()}


def check_tests(input_output):
    """The unit tests of a row in APPS' form {fn_name, inputs, outputs}, from JSON text or as read.

    With a function's name, each input is the list of its arguments, and each output its result.
    Without one, programs read and print: both are text, or a list of lines. Raises ValueError for
    anything else.
    """
    tests = parsed(input_output) if isinstance(input_output, str) else input_output
    if isinstance(tests, ValueError):
        raise tests
    if not isinstance(tests, dict):
        raise ValueError(f"unit tests must be an object with inputs and outputs, got {tests!r:.60}")
    inputs, outputs = field_of(tests, "inputs", list), field_of(tests, "outputs", list)
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs are no unit tests")
    if tests.get("fn_name"):
        check_calls(tests["fn_name"], inputs)
        return tests
    for number, texts in enumerate(zip(inputs, outputs, strict=True), 1):
        for text in texts:
            lines = text if isinstance(text, list) else [text]
            if not all(isinstance(line, str) for line in lines):
                raise ValueError(
                    f"unit test {number} must be text or lines of text, got {text!r:.60}"
                )
    return tests


def check_calls(function, inputs):
    """ValueError unless unit tests call a function that can exist, with lists of arguments."""
    if not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"fn_name must be the name of a function, got {function!r:.60}")
    for number, given in enumerate(inputs, 1):
        if not isinstance(given, list):
            raise ValueError(f"unit test {number} must have a list of arguments, got {given!r:.60}")


# A form by a field that only it has; the first that fits is taken. Pairs and prompts come after.
FORMS = {
    "summaries": tldr_row,
    "summary": tldr_row,
    "answer_0": webgpt_row,
    "answer_1": webgpt_row,
    "messages": chat_row,
    "conversations": chat_row,
    "instruction": alpaca_row,
    "question": apps_row,
}


# Appendix F. The toy.
#
# Real data takes hours and never tells what a good answer is. The toy is a miniature of TL;DR
# that takes minutes and knows the truth. A post states twelve facts about a trip, in random order
# and wording; a summary should state each of them once. Demonstrations state some of them, one in
# twelve wrongly, with fillers and repetitions. Chapter 2 has the toy's true quality, `gold_score`.

TOY_ROWS = 30_000  # posts
TOY_LONGEST = 14  # sentences of a summary, so that it fits into max_response


class Fact(NamedTuple):
    """One kind of fact: its six values, the wording of summaries, two wordings of posts."""

    values: str
    summary: str
    posts: tuple


# fmt: off
TOY_FACTS = {
    "friend": Fact(
        "anna ben carla david emma felix", "my old friend {} came along with me",
        ("this time i took young {} with me", "{} from work joined me for it all")),
    "place": Fact(
        "lisbon vienna oslo prague dublin athens", "we spent the whole week in lovely {}",
        ("our plan was to see beautiful {} again", "so we finally made it to {}")),
    "month": Fact(
        "january march may july september november", "it was the middle of {} back then",
        ("we had left home in late {}", "last {} i had some free days")),
    "ride": Fact(
        "train bus plane ferry car bike", "we got there by {} in one day",
        ("the way there was one slow {} ride", "i had booked a cheap {} for us")),
    "weather": Fact(
        "sunny rainy windy foggy snowy stormy", "the weather was mostly {} for us",
        ("almost every single day was rather {}", "it got {} as soon as we arrived")),
    "lodging": Fact(
        "hotel hostel cabin tent castle boat", "we slept in a small {} near town",
        ("our home was this tiny {} outside", "somebody had let us use their {}")),
    "food": Fact(
        "pizza soup curry fish pasta stew", "for dinner we ate some {} there",
        ("there was always hot {} to eat", "i could not get enough of their {}")),
    "animal": Fact(
        "dog cat goat horse parrot fox", "a friendly {} followed us all the time",
        ("every morning we met the same {}", "some {} kept running after us")),
    "loss": Fact(
        "camera passport wallet phone umbrella jacket", "i lost my favourite {} on day two",
        ("somebody must have stolen my new {}", "then my expensive {} was suddenly gone")),
    "cost": Fact(
        "forty sixty ninety hundred thousand million", "in total i paid {} euros for it",
        ("it all cost me about {} euros", "i spent {} euros and regret nothing")),
    "injury": Fact(
        "knee ankle wrist elbow shoulder toe", "i badly hurt one {} on the stairs",
        ("my {} still hurts from a fall", "i fell and twisted my {} there")),
    "gift": Fact(
        "mug scarf poster lamp ring clock", "my mother got a nice {} from me",
        ("i brought home the prettiest {}", "for my parents i bought a {}")),
}
# fmt: on
TOY_FILLERS = (
    "anyway that is all i wanted to say",
    "so yeah it was really something else",
    "you know how these things always go",
    "well i guess that is just life",
)


@cache
def toy_sentences():
    """Every sentence of the toy: {sentence: (slot, value)}; a filler's slot is None."""
    sentences = {filler: (None, None) for filler in TOY_FILLERS}
    for slot, fact in TOY_FACTS.items():
        for value in fact.values.split():
            for wording in (fact.summary, *fact.posts):
                sentences[wording.format(value)] = (slot, value)
    return sentences


def toy_summary(rng, facts, share, wrong, fillers, repeats):
    """The sentences of a summary: a `share` of the `facts`, fillers, and repetitions.

    rng: random.Random; facts: {slot: value}. With probability `wrong` a fact's value is drawn at
    random, and so wrong 5 times in 6. fillers: how many; repeats: at most so many. Never more
    than TOY_LONGEST sentences.
    """
    sentences = []
    for slot in rng.sample(list(facts), round(share * len(facts))):
        fact = TOY_FACTS[slot]
        value = rng.choice(fact.values.split()) if rng.random() < wrong else facts[slot]
        sentences.append(fact.summary.format(value))
    extra = rng.sample(TOY_FILLERS, min(fillers, TOY_LONGEST - len(sentences)))
    room = TOY_LONGEST - len(sentences) - len(extra)
    extra += rng.choices(sentences, k=rng.randint(0, min(repeats, room)))
    for sentence in extra:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    return sentences


def toy_row(index):
    """Post number `index` with a demonstration: {prompt, response, facts, number}."""
    rng = random.Random(f"{SPLIT_SEED} {index}")
    facts = {slot: rng.choice(fact.values.split()) for slot, fact in TOY_FACTS.items()}
    order = rng.sample(list(facts), len(facts))
    post = [rng.choice(TOY_FACTS[slot].posts).format(facts[slot]) for slot in order]
    summary = toy_summary(rng, facts, rng.uniform(0.3, 0.7), 0.1, rng.randint(2, 4), 2)
    return {
        "prompt": f"POST Subreddit: r/travel{toy_text(post)} TL;DR:",
        "response": toy_text(summary),
        "facts": {slot: facts[slot] for slot in order},
        "number": index,
    }


def toy_text(sentences):
    """Sentences as a response: each after a space and with its full stop."""
    return "".join(f" {sentence}." for sentence in sentences)


# Appendix G. toy-code.
#
# A miniature of APPS, program synthesis with unit tests: what a function f does with a list x is
# told in English, and demonstrations are programs of which six in ten have one mistake. The truth
# is what the functions `compute` below compute, never a text.

CODE_ROWS = 30_000  # problems
CODE_WRONG = 0.6  # share of the demonstrations with a mistake
CODE_TESTS = 3  # unit tests of each problem
# How often each kind of mistake is made: no return; a number, step or list for another; two steps
# swapped; one step, or a bracket, left out. The first two are habits, which PPO breaks first.
CODE_MISTAKES = {"return": 4, "number": 8, "step": 2, "order": 2, "gap": 1, "list": 1, "bracket": 1}


class Step(NamedTuple):
    """One step of a program: its words and its line, with {} for a number k."""

    words: str
    line: str
    compute: object  # what it makes of a list x and a number k
    mistaken_for: str  # the step that a wrong demonstration has in its place


# fmt: off
CODE_STEPS = {
    "add": Step("add {} to each", "x = [v + {} for v in x]",
        lambda x, k: [v + k for v in x], "subtract"),
    "subtract": Step("subtract {} from each", "x = [v - {} for v in x]",
        lambda x, k: [v - k for v in x], "add"),
    "multiply": Step("multiply each by {}", "x = [v * {} for v in x]",
        lambda x, k: [v * k for v in x], "add"),
    "above": Step("keep those above {}", "x = [v for v in x if v > {}]",
        lambda x, k: [v for v in x if v > k], "below"),
    "below": Step("keep those below {}", "x = [v for v in x if v < {}]",
        lambda x, k: [v for v in x if v < k], "above"),
    "even": Step("keep the even ones", "x = [v for v in x if v % 2 == 0]",
        lambda x, k: [v for v in x if not v & 1], "odd"),
    "odd": Step("keep the odd ones", "x = [v for v in x if v % 2 == 1]",
        lambda x, k: [v for v in x if v & 1], "even"),
    "up": Step("sort upwards", "x = sorted(x)", lambda x, k: sorted(x), "down"),
    "down": Step("sort downwards", "x = sorted(x, reverse=True)",
        lambda x, k: sorted(x)[::-1], "up"),
    "turn": Step("turn the list round", "x = x[::-1]", lambda x, k: [*reversed(x)], "down"),
    "first": Step("keep the first {}", "x = x[:{}]", lambda x, k: x[: min(k, len(x))], "drop"),
    "drop": Step("drop the first {}", "x = x[{}:]", lambda x, k: x[min(k, len(x)) :], "first"),
}
CODE_ENDS = {
    "sum": Step("return the sum", "return sum(x)", lambda x, k: sum(x), "count"),
    "count": Step("return the count", "return len(x)", lambda x, k: len(x), "sum"),
    "largest": Step("return the largest or 0", "return max(x, default=0)",
        lambda x, k: sorted(x)[-1] if x else 0, "smallest"),
    "smallest": Step("return the smallest or 0", "return min(x, default=0)",
        lambda x, k: sorted(x)[0] if x else 0, "largest"),
    "list": Step("return the list", "return x", lambda x, k: x, "count"),
}
# fmt: on
CODE = CODE_STEPS | CODE_ENDS


def code_output(steps, x):
    """What a program of `steps`, a list of (name, number), returns for `x`; None without an end."""
    for name, k in steps:
        x = CODE[name].compute(x, k)
        if name in CODE_ENDS:
            return x
    return None


def code_text(steps):
    """The program of `steps`."""
    lines = ["def f(x):"]
    for name, k in steps:
        lines.append(CODE[name].line.format(k))
    return "\n    ".join(lines)


def code_steps(rng):
    """A random problem: its steps, and the inputs of its tests, whose outputs are not all equal."""
    while True:
        names = rng.sample([*CODE_STEPS], rng.randint(2, 4))
        names.append(rng.choice([*CODE_ENDS]))
        steps = [(name, rng.randint(2, 6)) for name in names]
        inputs = [[rng.randint(0, 12) for _ in range(8)] for _ in range(CODE_TESTS)]
        first = code_output(steps, inputs[0])
        if any(code_output(steps, x) != first for x in inputs):
            return steps, inputs


def code_mistake(rng, steps, inputs):
    """A program with one mistake, which the tests on `inputs` find."""
    while True:
        i = rng.randrange(len(steps))
        kind = rng.choices([*CODE_MISTAKES], CODE_MISTAKES.values())[0]
        if kind == "return":
            return code_text(steps).replace("return ", "")
        if kind == "list":
            return with_unknown_list(steps, i)
        if kind == "bracket":
            return with_line_cut(steps, i)
        wrong = wrong_steps(kind, steps, i)
        if any(code_output(wrong, x) != code_output(steps, x) for x in inputs):
            return code_text(wrong)


def with_unknown_list(steps, i):
    """The program of `steps` in which step `i` reads a list y that does not exist."""
    lines = code_text(steps).split("\n")
    lines[i + 1] = re.sub("x(?!.*x)", "y", lines[i + 1])  # the last x of the line
    return "\n".join(lines)


def with_line_cut(steps, i):
    """The program of `steps` in which the line of step `i` lacks its last character."""
    lines = code_text(steps).split("\n")
    lines[i + 1] = lines[i + 1][:-1]
    return "\n".join(lines)


def wrong_steps(kind, steps, i):
    """`steps` with a mistake at step `i`: another number or step, two swapped, or one left out."""
    before, (name, k), after = steps[:i], steps[i], steps[i + 1 :]
    if kind == "number":
        return [*before, (name, k + 1), *after]
    if kind == "step":
        return [*before, (CODE[name].mistaken_for, k), *after]
    if kind == "order":
        return [*before, *after[:1], (name, k), *after[1:]]
    return before + after


def code_row(index):
    """Problem number `index` with a demonstration: {prompt, response, problem, number}."""
    rng = random.Random(f"{SPLIT_SEED} code {index}")
    steps, inputs = code_steps(rng)
    words = [CODE[name].words.format(k) for name, k in steps]
    wrong = rng.random() < CODE_WRONG
    row = {  # in APPS' form
        "question": f"With the list x: {', '.join(words)}.",
        "starter_code": "def f(x):",
        "solutions": [code_mistake(rng, steps, inputs) if wrong else code_text(steps)],
        "input_output": {
            "fn_name": "f",
            "inputs": [[x] for x in inputs],
            "outputs": [code_output(steps, x) for x in inputs],
        },
        "difficulty": f"{len(steps)} statements",
    }
    return apps_row(row) | {"number": index}


if __name__ == "__main__":
    record(main)()  # so that torchrun can show the error of a rank that failed
