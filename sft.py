"""Chapter 1: supervised fine-tuning (SFT), and everything the later chapters stand on.

A language model is taught what answers look like, by imitating demonstrations a_1 ... a_T for prompts x:

    loss = - sum_t log pi(a_t | x, a_<t) / (number of response tokens in the batch)

over response tokens only: the prompt and the padding are read, never learned (SPEC 6, fault 10).

    python sft.py                                   # the embedded toy task, about a minute on two cores
    python sft.py --task toy-code                   # short programs, six in ten of them wrong
    python sft.py --task hh --data pairs.jsonl.gz   # human preference pairs: imitate the chosen answers
    python sft.py --preset gemma-2b-tldr            # the paper's model, data and settings, on a GPU
    torchrun --nproc_per_node=2 sft.py              # the same run on two processes
    python sft.py --resume auto                     # go on where an interrupted run was

Later chapters import from here: the batch, data parallelism by hand, the update step, the run folder.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint import state_dict as full
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def opt(default, text):
    """A `Config` field with its --help text."""
    kind = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": text.replace("%", "%%")})  # argparse formats help texts


@dataclass
class Config:
    """Settings of the SFT chapter; the first block is spelled the same way in every chapter."""

    task: str = opt("toy", "toy, toy-code (embedded); tldr, hh, webgpt, apps (hub or --data); plain (--data)")
    preset: str = opt("", "a name in the table PAPER, like gemma-2b-tldr: the paper's settings")
    data: list[str] = opt([], "files of rows in place of the hub's: jsonl, json, parquet, .gz (see README)")
    split: list[float] = opt([20, 40, 40], "% of the prompts for SFT, RM and PPO, after a tenth is held out")
    skip_bad_rows: bool = opt(False, "leave malformed rows out, and count them, instead of stopping")
    model: str = opt("", "Hugging Face causal LM to start from; empty: a small Llama from scratch")
    chat_template: bool = opt(False, "wrap prompts in the chat template of the model's tokenizer")
    out: str = opt("", "folder to write to; empty: runs/TASK/sft, runs/TASK/reward, or runs/TASK (PPO)")
    seed: int = opt(0, "of initialisation, data order and sampling; never of the split of the data")
    steps: int = opt(350, "number of updates")
    epochs: float = opt(0.0, "passes over this chapter's rows, which then set --steps; 0: --steps counts")
    batch_size: int = opt(32, "sequences per update, over all ranks")
    micro_batch_size: int = opt(32, "sequences per forward pass and rank; changes memory, not the result")
    lr: float = opt(4e-3, "peak learning rate; cosine schedule")
    warmup: float = opt(0.1, "share of the steps in which the learning rate rises (paper: 0.1)")
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    max_prompt: int = opt(512, "tokens; longer prompts lose their beginning, never their instruction")
    max_response: int = opt(128, "tokens, EOS included; longer responses lose their end")
    resume: str = opt("", "auto: go on from the newest complete checkpoint in --out; empty: start anew")
    save_every: int = opt(100, "steps between checkpoints; 0: only at the end and when interrupted")
    keep: int = opt(2, "newest checkpoints that are kept")
    override: bool = opt(False, "resume although settings have changed")
    max_skipped: int = opt(5, "steps in a row whose loss is not finite, after which the run ends")
    precision: str = opt("auto", "of forward passes: fp32, bf16, or auto: bf16 on a GPU that has it")
    gradient_checkpointing: bool = opt(False, "less memory: compute activations again in the backward pass")
    compile: bool = opt(False, "torch.compile the forward passes: slow to start, then faster on a GPU")
    shard: bool = opt(False, "split the models among the ranks (FSDP2): for models too large for one GPU")
    timeout: float = opt(600.0, "seconds without an answer after which the other ranks count as lost")


ADAM = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}  # eps: SPEC 8
# What a task changes in these defaults; a flag overrides both. Real text: sized for minutes on two cores.
SHORT = {"max_prompt": 192, "max_response": 96}
SMALL = {
    "sft": SHORT | {"steps": 250, "batch_size": 16, "lr": 1e-3},
    "reward": SHORT | {"steps": 100, "batch_size": 16, "lr": 2e-4},
    "ma_ppo": SHORT | {"steps": 40, "batch_size": 32, "lr": 2e-4, "critic_lr": 2e-4},
}
DEFAULTS = {"toy": {}} | {task: dict(SMALL) for task in ("tldr", "hh", "webgpt", "apps", "plain")}
# Programs have no RM: unit tests give the reward. n is the paper's; the score is that of no program at all.
PROGRAMS, NO_RM = ("toy-code", "apps"), {"split": [20, 0, 80]}
TESTED = NO_RM | {"terminations": ["token", "fixed", "ast"], "n": 10, "no_eos_score": -1.0}
DEFAULTS["apps"] = {chapter: SMALL[chapter] | (TESTED if chapter == "ma_ppo" else NO_RM) for chapter in SMALL}
DEFAULTS["toy-code"] = {
    "sft": NO_RM | {"max_response": 80, "steps": 500},
    "ma_ppo": TESTED | {"max_response": 80, "lr": 1e-3},
}


@dataclass
class Batch:
    """B sequences: prompts end, and responses begin, at the same column P whatever their lengths."""

    tokens: torch.Tensor  # LongTensor [B, P+T]: left-padded prompts, right-padded responses
    attention: torch.Tensor  # LongTensor [B, P+T]: 1 on real tokens
    mask: torch.Tensor  # LongTensor [B, T]: 1 on real response tokens, the EOS included

    @property
    def responses(self):
        """The response tokens, LongTensor [B, T]."""
        return self.tokens[:, -self.mask.shape[1] :]  # [B, T]

    def rows(self, part):
        """The batch made of the rows in the slice `part`."""
        return Batch(self.tokens[part], self.attention[part], self.mask[part])


def make_batch(prompts, responses, pad, device):
    """Lay token lists out as a `Batch`.  prompts, responses: B token lists each; pad: id for the gaps.

    Masks come from lengths, never from looking for `pad`: a PAD that equals EOS would hide every EOS from the
    loss, and stopping would never be learned (SPEC 8).
    """
    P, T = max(map(len, prompts)), max(1, *map(len, responses))
    tokens, attention = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        left, right = P - len(prompt), T - len(response)
        tokens.append([pad] * left + prompt + response + [pad] * right)
        attention.append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
    attention = torch.tensor(attention, device=device)  # [B, P+T]
    return Batch(torch.tensor(tokens, device=device), attention, attention[:, P:])


def positions(attention):
    """Position ids that skip the padding, for models with absolute positions (SPEC 8).  [B, S] -> [B, S]"""
    return (attention.cumsum(1) - 1).clamp(min=0)  # [B, S]


def response_logits(model, batch):
    """Logits in front of every response token: those at position p predict token p+1.  -> [B, T, V]"""
    T = batch.mask.shape[1]
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention}
    inputs["position_ids"] = positions(batch.attention)
    output = model(**inputs, use_cache=False, logits_to_keep=T + 1)  # the prompt's logits are not computed
    return output.logits[:, -T - 1 : -1].float()  # [B, T, V]


def sft_loss(model, batch, token_count):
    """Cross-entropy summed over response tokens, divided by `token_count`, that of all ranks.  -> scalar"""
    logprobs = response_logits(model, batch).log_softmax(-1)  # [B, T, V]
    logprobs = logprobs.gather(-1, batch.responses[..., None]).squeeze(-1)  # [B, T]
    return -(logprobs * batch.mask).sum() / token_count


# Data parallelism by hand. Every rank holds the whole model and takes its share of the batch. Three things
# keep the ranks one model: equal parameters at the start (broadcast), equal gradients at every update
# (all_reduce), and no decision taken from one rank's numbers alone. A loss is a sum over tokens divided by
# the token count of *all* ranks; so gradients are summed, and the number of ranks cancels out of the
# mathematics.


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


def setup(device="", timeout=600.0):
    """Join the process group if torchrun started us; returns the torch.device of this rank.

    timeout: seconds; also rank 0's work alone, such as writing a checkpoint, must not take longer.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        join("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout)
    return torch.device(device)


def all_sum(x):
    """The sum of a tensor, or a number, over all ranks (a float64 tensor for a number)."""
    x = x.clone() if torch.is_tensor(x) else torch.tensor(float(x), dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(x)
    return x


def shard(items):
    """This rank's contiguous share of a global batch whose size the number of ranks divides."""
    share = len(items) // world()
    return items[rank() * share : (rank() + 1) * share]


def broadcast_parameters(model):
    """Give every rank rank 0's parameters."""
    if world() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)


BUCKET = 25e6  # bytes: large enough to be sent at full speed, small enough that the first leaves early


def gradient_buckets(model):
    """Give a model's parameters gradients of 0 that lie one behind the other in vectors of about 25 MB.

    In reverse order: a backward pass begins with the last parameters, so the first vector is complete first.
    Returns [(vector, its parameters), ...].
    """
    groups = [[]]
    for p in reversed([p for p in model.parameters() if p.requires_grad]):
        if groups[-1] and sum(other.nbytes for other in groups[-1]) + p.nbytes > BUCKET:
            groups.append([])
        groups[-1].append(p)
    vectors = [group[0].new_zeros(sum(p.numel() for p in group)) for group in groups]  # [numbers in it]
    for group, vector in zip(groups, vectors, strict=True):
        for p, part in zip(group, vector.split([p.numel() for p in group]), strict=True):
            p.grad = part.view_as(p)  # the backward pass adds in place, so nothing is ever copied
    return list(zip(vectors, groups, strict=True))


@contextmanager
def summed_over_ranks(buckets):
    """Sum gradients over all ranks while the backward pass in this block still computes others.

    A bucket leaves as soon as it holds all its gradients and the buckets before it have left: ranks that sent
    in different orders would add up different things. What is never used is sent behind the backward pass.
    """
    missing = [len(parameters) for _, parameters in buckets]
    sent = []

    def arrived(place, p):
        missing[place] -= 1
        while len(sent) < len(buckets) and missing[len(sent)] == 0:
            sent.append(dist.all_reduce(buckets[len(sent)][0], async_op=True))

    hooks = [
        p.register_post_accumulate_grad_hook(partial(arrived, place))
        for place, (_, parameters) in enumerate(buckets)
        for p in parameters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    sent += [dist.all_reduce(vector, async_op=True) for vector, _ in buckets[len(sent) :]]
    for bucket in sent:
        bucket.wait()


def micro_slices(count, size):
    """Slices of at most `size` that tile range(count): one forward and backward pass each."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def update(model, optimizer, micro_losses, lr, max_norm=1.0):
    """One optimizer step on the sum of `micro_losses`, functions of which each computes one loss.

    Gradients add up over micro-batches and ranks, and every loss is already divided by the batch-wide token
    count: neither changes the update. Clips the gradient's norm at `max_norm`. Returns the loss, a float; NaN
    if it or the gradient is not finite: then nothing is updated.
    """
    optimizer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    buckets = gradient_buckets(model) if world() > 1 and not sharded(model) else []
    for i, micro_loss in enumerate(micro_losses, 1):
        loss = micro_loss()
        with summed_over_ranks(buckets if i == len(micro_losses) else []):
            loss.backward()
        total += loss.detach().double().cpu()
    norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
    total = float(all_sum(total))
    if not (math.isfinite(total) and math.isfinite(norm)):  # the same on all ranks, so all of them skip
        return math.nan
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total


def cosine_lr(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to zero."""
    ramp = max(1, round(warmup * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
    return peak * ((step + 1) / ramp if step < ramp else cosine)


def batch_rows(rows, step, batch_size, seed):
    """The rows of update `step`, a seeded order per epoch; a pure function, so there is no state to lose."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [rows[_epoch_order(len(rows), place // len(rows), seed)[place % len(rows)]] for place in places]


@cache
def _epoch_order(count, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(count)


def main(argv=None):
    """Fine-tune a model on demonstrations and save it, with `run.json` and `metrics.jsonl`."""
    cfg = parse(Config, "sft", argv)
    device = setup(cfg.device, cfg.timeout)
    train, test = load_share(cfg, "sft", "response"), load_share(cfg, "test", "response")[:256]
    cfg.steps = count_steps(cfg, len(train))
    out = claim(cfg.out)
    if finished(cfg, out):
        return
    model, tokenizer = start_model(cfg, train)
    model.to(home(cfg, device))
    broadcast_parameters(model)
    prepare(model, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    print0(f"SFT: {len(train):,} demonstrations, {model.num_parameters():,} parameters -> {out}")
    report_cuts(train, tokenizer, cfg)
    run = Run(cfg, out, "sft", {"model": model}, {"model": optimizer})
    for step in run:
        clock = [tick(device)]
        examples = encode(shard(batch_rows(train, step, cfg.batch_size, cfg.seed)), tokenizer, cfg)
        token_count = float(all_sum(sum(len(e["response"]) for e in examples)))
        losses = micro_losses(model, examples, tokenizer, token_count, cfg.micro_batch_size, device)
        loss = update(model, optimizer, losses, cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup))
        clock.append(tick(device))
        run.log({"step": step, "loss": loss} | timings(clock), "loss", examples)

    loss = held_out_loss(model, encode(test, tokenizer, cfg), tokenizer, cfg, device)
    print0(f"SFT: cross-entropy {loss:.3f} nats a token on {len(test)} held-out demonstrations")
    save_run([model, tokenizer], out, cfg, {"test_loss": loss})


def micro_losses(model, examples, tokenizer, token_count, size, device):
    """A function for each micro-batch that computes its loss, divided by the batch-wide `token_count`."""

    def loss(part):
        prompts, responses = [e["prompt"] for e in examples[part]], [e["response"] for e in examples[part]]
        return sft_loss(model, make_batch(prompts, responses, tokenizer.pad_token_id, device), token_count)

    return [partial(loss, part) for part in micro_slices(len(examples), size)]


@torch.no_grad()
def held_out_loss(model, examples, tokenizer, cfg, device):
    """Cross-entropy in nats per response token on held-out examples; every rank computes all of it."""
    token_count = sum(len(e["response"]) for e in examples)
    losses = micro_losses(model, examples, tokenizer, token_count, cfg.micro_batch_size, device)
    return sum(float(loss()) for loss in losses)


def save_run(parts, out, cfg=None, result=None):
    """Save models and tokenizer in Hugging Face format; for a stage also its settings and results.

    Those are `run.json`, written last: a stage's folder that has one is complete.
    """

    states = [full.get_model_state_dict(x, options=GATHER) if sharded(x) else None for x in parts]

    def save():
        try:
            for part, state in zip(parts, states, strict=True):
                part.save_pretrained(out, **({"state_dict": state} if state else {}))
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot save the model in {out}: {error}") from None
        sync(*(path for path in Path(out).iterdir() if parts and path.is_file()))
        if cfg:
            write_json(Path(out) / "run.json", {"config": asdict(cfg), "result": result})

    on_rank0(save)  # no rank may read the folder before it is complete


# Appendix: runs that are not lost, settings and errors, models and tokenizers, tasks, the toy

# No run is ever lost. Noise is a pure function of (seed, step, prompt), data order and schedules are pure
# functions of the step, and nothing draws from a global generator (their states are saved all the same). So
# weights, optimizer state and the step make an interrupted run go on as if nothing had happened.

LOGS = ("metrics.jsonl", "samples.jsonl")
# Settings that may differ when a run goes on: they cannot change its result.
FREE = {"out", "device", "micro_batch_size", "resume", "save_every", "keep", "override", "max_skipped"}
FREE |= {"terminations", "shard", "timeout", "gradient_checkpointing"}
GATHER = full.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, on rank 0's CPU
_claimed = {}  # {folder: its locked file}, held until the process ends


class Run:
    """A training run: `for step in run` yields the steps that are left, and saves a checkpoint between them.

    models: {name: module}; optimizers: {name: its optimizer} of those that learn. OUT/checkpoints/step-000020
    is the state after 20 steps. On SIGINT or SIGTERM the step under way is finished and saved.
    """

    def __init__(self, cfg, out, name, models, optimizers):
        self.cfg, self.out, self.models, self.optimizers = cfg, Path(out), models, optimizers
        self.folder, self.signal = self.out / "checkpoints", 0
        self.last, state = on_rank0(find_checkpoint, cfg, self.out)  # the newest complete checkpoint
        self.first, self.counters = state["step"], state["counters"]
        if self.last and (changes := changed(cfg, state["config"])) and not cfg.override:
            fail(f"{self.last} has other settings: {'; '.join(changes)} (--override goes on with the new)")
        if self.last:
            self.load()
            print0(f"{name}: goes on from {self.last}, {self.first} of {cfg.steps} steps are done")
        else:
            torch.manual_seed(cfg.seed)  # whatever this process has done before
        on_rank0(self.cut, state["offsets"])
        bar = {"total": cfg.steps, "initial": self.first, "desc": name, "disable": rank() != 0}
        self.bar = tqdm(**bar, mininterval=1.0, dynamic_ncols=True)

    def __iter__(self):
        """Yield the number of every step that is left to do."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.first, self.cfg.steps):
                yield step
                number, done = self.stopped(), step + 1
                due = self.cfg.save_every and done % self.cfg.save_every == 0
                if due or number or done == self.cfg.steps:
                    self.save(done)
                if number:
                    self.bar.close()
                    name = signal.Signals(number).name
                    print0(f"{name}: saved {self.last}; the same command with --resume auto goes on from it")
                    raise SystemExit(128 + number)
        finally:
            self.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal:  # it came while the last checkpoint was being written
            os.kill(os.getpid(), self.signal)

    def stop(self, number, frame):
        """Signal handler: remember the first signal; a second one ends the process at once."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def stopped(self):
        """The signal that any of the ranks has received, 0 for none; all ranks agree on it."""
        number = torch.tensor(self.signal)
        if world() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def log(self, row, show, batch=()):
        """Append `row` to metrics.jsonl and show its key `show` in the bar.

        A loss that is not finite stands for a skipped update. After max_skipped such rows one after the other
        the run ends, and leaves `batch`, a list of this rank's examples, in bad_batch.json.
        """
        self.bar.set_postfix({show: f"{row[show]:.3f}"}, refresh=False)
        self.bar.update()
        skipped = not all(math.isfinite(row[key]) for key in row if key.endswith("loss"))
        self.counters["skipped"] += skipped
        self.counters["in_a_row"] = skipped * (self.counters["in_a_row"] + 1)
        self.append("metrics.jsonl", [row])
        if self.counters["in_a_row"] >= self.cfg.max_skipped:
            parts = [list(batch)] * world()
            if world() > 1:
                dist.all_gather_object(parts, list(batch))
            path, bad = self.out / "bad_batch.json", {"step": row["step"], "batch_of_each_rank": parts}
            on_rank0(self.attempt, "write bad_batch.json", write_json, path, bad)
            self.bar.close()
            text = "the loss is no longer finite: lower --lr (or --critic_lr)"
            text += f"; {self.cfg.max_skipped} steps in a row were skipped"
            fail(f"{text}, the last batch is in {path}, the last checkpoint is {self.last}")

    def append(self, name, rows):
        """Append rows to one of the run's LOGS, on rank 0."""
        on_rank0(self.attempt, f"write {name}", append_rows, self.out / name, rows)

    def attempt(self, what, action, *args):
        """Run an action on storage; where it fails, nothing half-written stays, and the error says all."""
        try:
            return action(*args)
        except (OSError, SafetensorError) as error:
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self.bar.close()  # or the error would stand behind it in the same line
            reason = getattr(error, "strerror", None) or error
            last = f"the last complete checkpoint is {self.last or '(none yet)'}"
            raise OSError(f"cannot {what} in {self.out}: {reason}; {last} (--resume auto)") from None

    def save(self, step):
        """Save the state after `step` steps: all ranks gather it, rank 0 writes it, file by file."""
        for name, optimizer in self.optimizers.items():
            model, same = self.models[name], tied(self.models[name])
            weights = full.get_model_state_dict(model, options=GATHER)
            weights = {key: x.contiguous() for key, x in weights.items() if same.get(key, key) == key}
            on_rank0(self.attempt, "save a checkpoint", self.write, step, name, weights)
            del weights  # of a large model there is no room for both
            state = full.get_optimizer_state_dict(model, optimizer, options=GATHER).get("state", {})
            state = {f"{key} {kind}": x for key, entry in state.items() for kind, x in entry.items()}
            on_rank0(self.attempt, "save a checkpoint", self.write, step, f"{name}.optimizer", state)
        self.last = on_rank0(self.attempt, "save a checkpoint", self.complete, step)

    def write(self, step, name, tensors):
        """Write one file of a checkpoint, which has a temporary name until it is complete."""
        folder = self.folder / f".tmp-step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{name}.safetensors")

    def complete(self, step):
        """Add step, settings, generators and manifest; once all is on the disk, give the folder its name."""
        generators = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        self.write(step, "generators", generators)
        folder, final = self.folder / f".tmp-step-{step:06d}", self.folder / f"step-{step:06d}"
        logs = [self.out / name for name in LOGS if (self.out / name).exists()]
        sync(*logs)
        state = {"step": step, "offsets": {path.name: path.stat().st_size for path in logs}}
        write_json(folder / "state.json", state | {"counters": self.counters, "config": asdict(self.cfg)})
        sizes = {path.name: [path.stat().st_size, digest(path)] for path in sorted(folder.iterdir())}
        write_json(folder / "manifest.json", sizes)
        sync(*folder.iterdir(), folder)
        remove(final)  # a damaged one
        folder.rename(final)
        sync(self.folder)
        saved = checkpoints(self.out)  # those behind this one are damaged, or it would not have been made
        for path in set(saved) - set(saved[: saved.index(final) + 1][-self.cfg.keep :]):
            remove(path)
        return final

    def load(self):
        """Put the checkpoint into models and optimizers, on any number of ranks; rank 0 reads it."""
        options = full.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world() > 1)
        for name, optimizer in self.optimizers.items():
            model, weights = self.models[name], tensors_of(self.last / f"{name}.safetensors")
            weights |= {key: weights[first] for key, first in tied(model).items() if first in weights}
            state = full.get_optimizer_state_dict(model, optimizer, options=GATHER)
            if rank() == 0:
                state["state"] = {}
            for place, x in tensors_of(self.last / f"{name}.optimizer.safetensors").items():
                key, kind = place.split(" ")
                state["state"].setdefault(key, {})[kind] = x
            try:
                full.set_model_state_dict(model, weights, options=options)
                full.set_optimizer_state_dict(model, optimizer, state, options=options)
            except (KeyError, RuntimeError) as error:
                fail(f"{self.last} does not fit the model: {str(error).strip().splitlines()[-1].strip()}")
        generators = on_rank0(load_file, self.last / "generators.safetensors")
        torch.set_rng_state(generators["torch"])
        if torch.cuda.is_available() and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])

    def cut(self, offsets):
        """Cut the logs back to where the run goes on; a new run removes the checkpoints of the one before."""
        (self.out / "run.json").unlink(missing_ok=True)  # from here on the folder is not finished
        for leftover in (*self.out.glob(".tmp-*"), *self.folder.glob(".tmp-*")):
            remove(leftover)
        if not self.last and (old := checkpoints(self.out)):
            print(f"starting anew: {len(old)} checkpoints in {self.folder} are removed", flush=True)
            remove(self.folder)
        for path in (self.out / name for name in LOGS if (self.out / name).exists()):
            os.truncate(path, min(offsets.get(path.name, 0), path.stat().st_size))


def claim(path):
    """Create a run's folder and hold it until this process ends: two runs would destroy each other's."""
    folder = make_folder(path)
    on_rank0(lock, folder)
    return folder


def lock(folder):
    """Lock a folder for this process; the system unlocks it even after kill -9.  OSError if it is taken"""
    if folder.resolve() not in _claimed:
        file = (folder / "run.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OSError(f"another run, pid {file.read() or 'unknown'}, writes to {folder}") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        _claimed[folder.resolve()] = file


def finished(cfg, out):
    """Whether --resume auto finds this run finished, so that there is nothing left to do."""
    path = Path(out) / "run.json"
    made = on_rank0(lambda: json.loads(path.read_text())["config"] if path.exists() else None)
    if cfg.resume != "auto" or made is None:
        return False
    if (changes := changed(cfg, made)) and not cfg.override:
        fail(f"{out} is finished, with other settings: {'; '.join(changes)} (--override trains on)")
    if not changes:
        print0(f"{out} is already finished")
    return not changes


def changed(cfg, made):
    """Settings in which `cfg` differs from those that something was `made` with, as texts."""
    free = FREE | ({"steps"} if cfg.epochs else set())  # then the epochs and the rows set the steps
    now = {name: value for name, value in asdict(cfg).items() if name in made and name not in free}
    return [f"--{name} was {made[name]!r}, is {now[name]!r}" for name in now if made[name] != now[name]]


def checkpoints(out):
    """Folders of the checkpoints in a run's folder, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))


def find_checkpoint(cfg, out):
    """The checkpoint to go on from and its state; (None, the state of a new run) where there is none."""
    saved = checkpoints(out) if cfg.resume else []
    for folder in reversed(saved):
        if not (reason := damage(folder)):
            return folder, json.loads((folder / "state.json").read_text())
        print(f"warning: {folder} is skipped: {reason}", file=sys.stderr, flush=True)
    if saved:
        raise OSError(f"no checkpoint in {out} is complete; without --resume the run starts anew")
    return None, {"step": 0, "offsets": {}, "counters": {"skipped": 0, "in_a_row": 0}}


def damage(folder):
    """What is wrong with a checkpoint, compared with its manifest; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, sha256) in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size:,} bytes instead of {size:,}"
            if digest(folder / name) != sha256:
                return f"{name} is damaged: its SHA-256 differs"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it cannot be read: {error}"


def digest(path):
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_of(path):
    """The tensors of a safetensors file, {name: tensor}, on rank 0; {} on the others."""
    return load_file(path) if rank() == 0 else {}


def tied(model):
    """{name: first name of the same parameter}; tied weights have two names, and are saved once."""
    first = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def on_rank0(action, *args):
    """What `action(*args)` returns on rank 0, for every rank; an OSError there ends all of them."""
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = action(*args)
        except (OSError, SafetensorError) as error:
            text = getattr(error, "strerror", None)
            result[1] = f"{error.filename}: {text}" if text else str(error)
    if world() > 1:
        dist.broadcast_object_list(result, src=0)
    if result[1]:
        fail(result[1]) if rank() == 0 else sys.exit(2)  # all of them know, one says so
    return result[0]


def join(backend, timeout):
    """Join the process group; from then on an error of any rank is told with its number and ends the job."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def give_up():  # PyTorch's own time-out does not hold if something else listens there and never answers
        text = f"cannot meet the other ranks at {place}: no answer for --timeout {timeout:g} s"
        print(f"rank {os.environ['RANK']}: error: {text}", file=sys.stderr, flush=True)
        os._exit(2)

    clock, most = threading.Timer(timeout + 5, give_up), timedelta(seconds=timeout)
    clock.start()
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=most))
        # torchrun's own store outlives a restart, in which ranks must not meet addresses of dead ones.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, timeout=most, store=store, rank=number, world_size=count)
    except dist.DistError as error:
        fail(f"cannot meet the other ranks at {place}: {str(error).splitlines()[0]}")
    finally:
        clock.cancel()
    sys.excepthook = partial(report_error, timeout)
    atexit.register(dist.destroy_process_group)  # else gloo's threads sometimes abort the finished process


def report_error(timeout, kind, error, trace):
    """The excepthook of a rank: one line with its number, behind the trace unless another rank is lost."""
    lost = re.search(
        "timed ?out|connection (closed|reset|refused)|broken pipe|aborted", str(error), re.IGNORECASE
    )
    text = f"{kind.__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if issubclass(kind, RuntimeError) and lost:
        text = f"another rank has died, or not answered for --timeout {timeout:g} s; --resume auto goes on"
        text += f" from the last checkpoint ({str(error).strip().splitlines()[0]:.150})"
    else:
        traceback.print_exception(kind, error, trace)
    print(f"\nrank {rank()}: {text}", file=sys.stderr, flush=True)
    os._exit(1)  # no waiting for ranks that will not come


def write_json(path, value):
    """Write a JSON file in one move: nobody will ever see half of it."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    sync(temporary)
    temporary.rename(path)


def append_rows(path, rows):
    """Append rows to a .jsonl file."""
    with path.open("a") as file:
        file.writelines(json_line(row) for row in rows)


def json_line(row):
    """A row as a line of JSON, in which null stands for what is not finite: JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n"


def tick(device):
    """(time in seconds, None), or on a GPU, whose work is waited for, (time, peak GB since the last tick)."""
    if device.type != "cuda":
        return time.perf_counter(), None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return time.perf_counter(), peak


def timings(clock, phases=()):
    """Seconds of a step and of its phases, which lie between the ticks; on a GPU also their peak memory."""
    found = {"seconds": clock[-1][0] - clock[0][0]}
    found |= {f"seconds_{name}": b[0] - a[0] for name, (a, b) in zip(phases, pairwise(clock), strict=False)}
    if clock[0][1] is not None:  # this rank's; the other ranks do the same work
        found["gpu_gb"] = max(peak for _, peak in clock[1:])
        found |= {f"gpu_gb_{name}": peak for name, (_, peak) in zip(phases, clock[1:], strict=False)}
    return found


def sync(*paths):
    """Wait until files and folders are on the disk, and not only in the system's memory."""
    for path in paths:
        place = os.open(path, os.O_RDONLY)
        os.fsync(place)
        os.close(place)


def remove(path):
    """Remove a file, or a folder such that a kill in between leaves none that looks complete."""
    if path.is_dir():
        path = path.rename(path.with_name(f".tmp-old-{path.name}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fail(message):
    """End the program with one line for the person at the keyboard and exit code 2.

    Before the ranks have joined they all fail alike, and one speaks; later each speaks, with its number.
    """
    if (number := int(os.environ.get("RANK", 0))) == 0 or dist.is_initialized():
        print(f"{f'rank {number}: ' if number else ''}error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(config_class, chapter, argv=None):
    """Read a chapter's `Config` from the command line: its defaults < the task's < the preset's < flags."""
    title = sys.modules[config_class.__module__].__doc__.split("\n")[0]
    parser = HfArgumentParser(config_class, description=title)
    parser.error = fail
    argv = sys.argv[1:] if argv is None else argv
    quiet = [flag for flag in argv if flag not in ("-h", "--help")]
    if (name := parser.parse_known_args(quiet)[0].preset) and name not in PAPER:
        fail(f"unknown preset {name!r}: choose from {', '.join(PAPER)}")
    preset = paper_settings(name) if name else {}
    parser.set_defaults(**preset.get("all", {}))
    if (task := parser.parse_known_args(quiet)[0].task) not in DEFAULTS:
        fail(f"unknown task {task!r}: choose from {', '.join(DEFAULTS)}")
    parser.set_defaults(**(preset.get(chapter) or DEFAULTS[task].get(chapter, {})))
    cfg = config_class(**vars(parser.parse_args(argv)))
    cfg.out = cfg.out or str(Path("runs") / cfg.task / ("" if chapter == "ma_ppo" else chapter))
    check(cfg)
    return cfg


def check(cfg):
    """Refuse settings that cannot work, before anything is computed."""
    for name in ("steps", "batch_size", "micro_batch_size", "lr", "max_prompt", "max_response", "timeout"):
        if not 0 < getattr(cfg, name) < math.inf:
            fail(f"--{name} must be positive, got {getattr(cfg, name)}")
    if cfg.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        fail("--shard splits models among ranks: start two or more with torchrun --nproc_per_node=N")
    if cfg.batch_size % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        fail(f"--batch_size {cfg.batch_size} is not divisible by the number of ranks, {ranks}")
    if cfg.task.startswith("toy") and cfg.data:
        fail("--data FILE needs a task that reads it: tldr, hh, webgpt, apps or plain")
    if cfg.task == "plain" and not cfg.data:
        fail(f"--task {cfg.task} needs --data FILE")
    if len(cfg.split) != 3 or min(cfg.split) < 0 or not 99.9 < sum(cfg.split) < 100.1:
        fail(f"--split must be three percentages that add up to 100, got {cfg.split}")
    for name, least in (("save_every", 0), ("keep", 1), ("max_skipped", 1)):
        if getattr(cfg, name) < least:
            fail(f"--{name} must be {least} or more, got {getattr(cfg, name)}")
    if cfg.precision not in ("auto", "bf16", "fp32"):
        fail(f"--precision must be auto, bf16 or fp32, got {cfg.precision!r}")
    if cfg.resume not in ("", "auto"):
        fail(f"--resume must be auto or empty, got {cfg.resume!r}")
    if not 0 <= cfg.seed < 2**63:
        fail(f"--seed must be 0 or more and below 2**63, got {cfg.seed}")
    try:
        torch.zeros(1, device=cfg.device or "cpu").item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        fail(f"--device {cfg.device} cannot be used: {str(error).splitlines()[0]}")


def make_folder(path):
    """Create the output folder and prove that it can be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot create {path}: {error.strerror}")
    if not os.access(path, os.W_OK):
        fail(f"cannot write to {path}")
    return Path(path)


def load_or_fail(from_pretrained, path, **options):
    """Call a `from_pretrained`; a failure becomes one line that names the path."""
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        fail(f"cannot load a model from {path}: {str(error).strip().splitlines()[0]}")


def load_causal_lm(path, length=0, device="cpu"):
    """The causal LM and tokenizer at `path`, in float32, with a PAD that is not EOS, for `length` tokens.

    All models of the pipeline stay in eval mode: with dropout the first PPO ratio would not be 1 (SPEC 8).
    """
    tokenizer = load_or_fail(AutoTokenizer.from_pretrained, path)
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, report = load_or_fail(AutoModelForCausalLM.from_pretrained, path, **options)
    if report["missing_keys"]:
        fail(f"{path} holds no causal LM: it has no {sorted(report['missing_keys'])[0]}")
    if length > (window := getattr(model.config, "max_position_embeddings", math.inf)):
        fail(f"--max_prompt and --max_response add up to {length}; {path} has {window} positions")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no EOS token: a response could never end")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval().to(device), tokenizer


def home(cfg, device):
    """Where a model is loaded: on its device, or on the CPU if --shard will move it there layer by layer."""
    return torch.device("cpu") if cfg.shard else device


def prepare(model, cfg, device):
    """Set a model's forward passes up as --precision, --gradient_checkpointing and --compile say.

    In bf16, weights that learn stay in fp32, and matrices are multiplied in bf16 (autocast); the trunk of a
    frozen model (its parameters want no gradient) is stored in bf16, in half the memory.
    """
    trunk = getattr(model, "trunk", model)
    frozen = not next(model.parameters()).requires_grad
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported() and cfg.precision == "auto"
    if bf16 or cfg.precision == "bf16":
        if frozen:
            trunk.to(torch.bfloat16)
        # A cache would keep a bf16 copy of all weights until the pass ends, of which none is used again.
        cast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        model.forward = cast(model.forward)
    if cfg.gradient_checkpointing and not frozen:
        for layer in trunk.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(recomputed, layer.forward)
    if cfg.shard:
        shard_model(model, device)
    if cfg.compile:
        model.compile(dynamic=True)


def shard_model(model, device):
    """Split a model's parameters among the ranks (PyTorch's FSDP2), and with them gradients and Adam's state.

    Each layer is put together when it is needed. Our losses are parts of a sum over all ranks, so gradients
    are added up and not averaged. All ranks must call the model equally often. Before this, every rank
    holds the whole model in the CPU's memory.
    """
    mesh, trunk = init_device_mesh(device.type, (world(),)), getattr(model, "trunk", model)
    layers = [layer for layer in trunk.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for module in dict.fromkeys([*layers, trunk, model]):  # the trunk may have another dtype than its head
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds up


def sharded(model):
    """Whether a model is split among the ranks."""
    return isinstance(model, FSDPModule)


def whole(x):
    """A tensor that may be split among the ranks, put together on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def evenly(count):
    """This rank's numbers of range(count), as many as any rank's: the first come up again at the end."""
    return [i % count for i in range(rank(), math.ceil(count / world()) * world(), world())]


def recomputed(forward, *args, **kwargs):
    """A layer's output, of which the backward pass keeps the inputs only. (transformers' own way wants train
    mode, which would switch dropout on, and cannot be used while sampling.)"""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def start_model(cfg, rows):
    """What SFT starts from: --model, or a small Llama from scratch with a vocabulary made from `rows`."""
    if cfg.model:
        return load_causal_lm(cfg.model, cfg.max_prompt + cfg.max_response)
    torch.manual_seed(cfg.seed)
    tokenizer = small_tokenizer(cfg.task, [row["prompt"] + row["response"] for row in rows])
    hidden, layers, heads = (64, 2, 2) if cfg.task.startswith("toy") else (128, 4, 4)
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    size |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    size["max_position_embeddings"] = max(1024, cfg.max_prompt + cfg.max_response)
    # With the usual 0.02 the toy's model does not learn to copy from the post in so few steps.
    size["initializer_range"] = 0.1 if cfg.task.startswith("toy") else 0.02
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **size)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return LlamaForCausalLM(config).eval(), tokenizer


def small_tokenizer(task, texts):
    """A tokenizer learned from `texts`: whole words for the toy, 2,048 byte-level pieces for other text."""
    options = {"special_tokens": ["<pad>", "<eos>", "<unk>"], "show_progress": False}
    if task == "toy":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        # " in oslo." -> "▁in", "▁oslo", "."
        words = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.WordLevelTrainer(**options)
    else:
        tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=2048, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return FastTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def encode(rows, tokenizer, cfg, names=("prompt", "response")):
    """Texts -> token lists: rows {name: text, ...} -> rows {name: ids, ...}, for the fields `names`.

    A prompt longer than max_prompt loses its beginning, a response (with its EOS) longer than max_response
    its end. With --chat_template, prompts are wrapped in the tokenizer's own, which is never cut.
    """
    bos, eos = tokenizer("").input_ids, tokenizer.eos_token_id  # [BOS] for models that want one, else []
    encoded = [{} for _ in rows]
    for name in names if rows else ():
        texts = [row[name] for row in rows]
        if name == "prompt" and cfg.chat_template:
            prompts = [chat_prompt(text, tokenizer, cfg.max_prompt) for text in texts]
        elif name == "prompt":
            ids = tokenizer(texts, add_special_tokens=False).input_ids
            prompts = [bos + row[max(0, len(row) + len(bos) - cfg.max_prompt) :] for row in ids]
        else:
            texts = [text.lstrip() for text in texts] if cfg.chat_template else texts
            ids = tokenizer(texts, add_special_tokens=False).input_ids
        for i, row in enumerate(encoded):
            row[name] = prompts[i] if name == "prompt" else [*ids[i], eos][: cfg.max_response]
    return encoded


def dialogue(prompt):
    """A prompt as chat messages [{role, content}, ...]: "Human: … Assistant:" by its turns, others as one.

    >>> dialogue(" Human: why? Assistant:")
    [{'role': 'user', 'content': 'why?'}]
    """
    turns = re.split(r"(?:^\s*|\n\n|\s(?=Assistant:$))(Human|Assistant):", prompt)
    if turns[0].strip() or not prompt.endswith("Assistant:") or len(turns) < 5:
        return [{"role": "user", "content": prompt}]
    messages = []
    for name, text in zip(turns[1:-2:2], turns[2:-2:2], strict=True):
        role = "user" if name == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:  # templates want turns to alternate
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def chat_prompt(prompt, tokenizer, limit):
    """A prompt in the tokenizer's chat template, as at most `limit` tokens: the oldest turns go first, then
    the beginning of the first message that is left."""
    options = {"add_generation_prompt": True, "return_dict": False}
    messages = dialogue(prompt)
    while len(ids := tokenizer.apply_chat_template(messages, **options)) > limit:
        content = messages[0]["content"]
        if len(messages) > 2:
            messages = messages[2:]
        elif content:
            places = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            cut = min(len(places), len(ids) - limit)
            messages[0]["content"] = content[max(1, places[cut - 1][1] if cut else 0) :]
        else:
            fail(f"--max_prompt {limit} leaves no room: the empty chat template has {len(ids)} tokens")
    return ids


def report_cuts(rows, tokenizer, cfg, names=("prompt", "response")):
    """Say how many of the rows' texts are cut at the limits; refuse a limit that would cut the instruction.

    Every rank looks at its own share of the rows.
    """
    bos = len(tokenizer("").input_ids)
    for suffix in INSTRUCTIONS:
        room = bos + len(tokenizer(suffix, add_special_tokens=False).input_ids)
        if room > cfg.max_prompt and rows[0]["prompt"].endswith(suffix):
            fail(f"--max_prompt {cfg.max_prompt} cuts the instruction {suffix!r}, which takes {room} tokens")
    for name in names:
        kind = "prompt" if name == "prompt" else "response"
        texts, limit = [row[name] for row in rows[rank() :: world()]], getattr(cfg, f"max_{kind}")
        lengths = map(len, tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
        spare = bos if name == "prompt" else 1  # 1: the EOS
        cut = int(all_sum(sum(length + spare > limit for length in lengths)))
        if cut:
            print0(f"{cut:,} of {len(rows):,} texts {name!r} are cut to --max_{kind} {limit} tokens")


def count_steps(cfg, count):
    """--steps, or as many as --epochs passes over `count` rows take."""
    return max(1, round(cfg.epochs * count / cfg.batch_size)) if cfg.epochs else cfg.steps


# Rows. Every file, from the hub or from --data, becomes rows of texts {prompt, response, chosen, rejected,
# problem}, as far as it has them. Which of the published schemas a row follows is seen from its fields.

INSTRUCTIONS = (" TL;DR:", "Assistant:", "ANSWER:")  # the last words of prompts, as written below
SPLIT_SEED = 1234  # the paper's; fixed, so that stages run with different --seed never share rows
TEST_SHARE = 0.1


def load_share(cfg, share, *fields):
    """The rows of a share ("test", "sft", "rm" or "ppo") that have all the `fields`; at least one."""
    rows = split(load_rows(cfg.task, tuple(cfg.data), cfg.skip_bad_rows), share, tuple(cfg.split))
    rows = [row for row in rows if all(name in row for name in fields)]
    if not rows:
        wanted = " and ".join(fields) or "prompts"
        fail(f"the share {share!r} has no rows with {wanted}: see --split and --data")
    return rows


def split(rows, share, percent=(20, 40, 40)):
    """The rows of the share "test", "sft", "rm" or "ppo"; all rows about one prompt are in the same share.

    A tenth of the prompts is held out as "test"; `percent` of the others are for SFT, RM and PPO.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    random.Random(SPLIT_SEED).shuffle(prompts)
    first, second = percent[0] / 100, (percent[0] + percent[1]) / 100
    edges = [0, TEST_SHARE, *(TEST_SHARE + (1 - TEST_SHARE) * edge for edge in (first, second, 1))]
    place = ("test", "sft", "rm", "ppo").index(share)
    begin, end = (round(edge * len(prompts)) for edge in edges[place : place + 2])
    wanted = set(prompts[begin:end])
    return [row for row in rows if row["prompt"] in wanted]


@cache
def load_rows(task, files=(), skip_bad_rows=False):
    """A task's rows, as texts {prompt, response, ...}: from `files`, or else from the hub.

    A malformed row stops the program with its file, line and field, or is skipped; rows without use are
    dropped. Both are counted.
    """
    if task == "toy":
        return [toy_row(i) for i in range(TOY_ROWS)]
    if task == "toy-code":
        return [code_row(i) for i in range(CODE_ROWS)]
    table = [row for path in files or ["hf://datasets/" + HUB[task]] for row in read_file(path)]
    bad = [row["bad"] for row in table if row["bad"]]
    if bad and not skip_bad_rows:
        fail(f"{bad[0]} ({len(bad)} malformed of {len(table)} rows; --skip_bad_rows leaves them out)")
    rows = [json.loads(row["row"]) for row in table if row["row"]]
    if not table:
        fail(f"{', '.join(files) or task} is empty")
    print0(f"{task}: {len(rows):,} rows")
    dropped = [row["dropped"] for row in table if row["dropped"]] + ["malformed" for _ in bad]
    for reason in sorted(set(dropped)):
        print0(f"{task}: {dropped.count(reason):,} rows dropped: {reason}")
    if len({row["prompt"] for row in rows}) < 20:
        fail(f"{', '.join(files) or task}: fewer than 20 different prompts, too few to split")
    return rows


def read_file(path):
    """The rows of one file, {row (JSON text), dropped (why), bad (why)}, cached on disk by `datasets`.

    Rank 0 of every machine reads first; the others find its cache.
    """
    import datasets  # takes a second, and the toy does not need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are ours to tell
    kind = str(path).removesuffix(".gz").rsplit(".", 1)[-1]
    loader = "parquet" if kind == "parquet" else "text"
    options = {"sample_by": "document" if kind == "json" else "line"} if loader == "text" else {}
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with waiting(first):
        try:
            table = datasets.load_dataset(loader, data_files=str(path), split="train", **options)
        except Exception as error:  # of many kinds: no file, no network, no gzip, no UTF-8, no Parquet
            cause = error.__cause__ or error.__context__ or error
            reason = f"cannot be read: {type(cause).__name__}: {str(cause).splitlines()[0]}"
            reason = "is empty" if type(cause).__name__ == "SchemaInferenceError" else reason
            hint = "; without the hub, give files: --data FILE" if str(path).startswith("hf://") else ""
            fail(f"--data {path} {reason}{hint}")
        options = {"with_indices": True, "remove_columns": table.column_names, "batched": True}
        known = {"path": str(path), "kind": kind, "code": Path(__file__).read_text()}
        return table.map(read_rows, fn_kwargs=known, **options).to_list()


@contextlib.contextmanager
def waiting(first):
    """Run the body on the `first` ranks, and only then on the others."""
    if world() > 1 and not first:
        dist.barrier()
    yield
    if world() > 1 and first:
        dist.barrier()


def read_rows(columns, places, path, kind, code):
    """A batch of `datasets`' rows, columns {name: values}, as columns {row (JSON text), dropped, bad}.

    `code` is part of the cache's key, so that changed code reads anew.
    """
    found = []
    for where, row in json_rows(columns, places, path, kind):
        try:
            read = read_row(row)
            found.append((json.dumps(read), "", "") if isinstance(read, dict) else ("", read, ""))
        except ValueError as error:
            found.append(("", "", f"{where}: {error}"))
    return {name: [row[i] for row in found] for i, name in enumerate(("row", "dropped", "bad"))}


def json_rows(columns, places, path, kind):
    """Yield (where, row) of a batch; a row that is no JSON is the ValueError that tells so."""
    if kind == "parquet":
        for place, *values in zip(places, *columns.values(), strict=True):
            yield f"{path}: row {place + 1}", dict(zip(columns, values, strict=True))
        return
    for place, text in zip(places, columns["text"], strict=True):
        try:
            parsed = json.loads(text) if text.strip() else []
        except ValueError as error:
            parsed = ValueError(f"not JSON ({error})")
        if parsed == [] or (kind == "json" and isinstance(parsed, list)):  # an empty line, or all rows
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(parsed, 1))
        else:
            yield f"{path}:{place + 1}", parsed


def read_row(row):
    """A row in any of the published schemas (SPEC 9) -> {prompt, ...} of texts, or why it is of no use.

    Raises ValueError if a field is missing or of the wrong type.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, got {type(row).__name__}")
    for name, read in SCHEMAS.items():
        if name in row:
            return read(row)
    raise ValueError(f"no known schema: none of the fields {', '.join(SCHEMAS)}")


def field_of(row, path, kind=str):
    """The field at a dotted path, such as "info.post", of the wanted type; ValueError if it is not there."""
    value = row
    for name in path.split("."):
        name = int(name) if isinstance(value, list) and name.isdigit() else name
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"field {path!r} is missing") from None
    if not isinstance(value, kind) or isinstance(value, bool):
        kind = getattr(kind, "__name__", "number").replace("str", "text")
        raise ValueError(f"field {path!r} must be a {kind}, got {value!r:.60}")
    return value


def pair(prompt, chosen, rejected=None):
    """The row of a demonstration, or of a pair, whose chosen text is the demonstration (SPEC 7)."""
    texts = [text.strip() for text in (prompt, chosen, rejected) if text is not None]
    if not all(texts):
        return "an empty text"
    row = {"prompt": prompt.rstrip(), "response": " " + texts[1]}
    return row if rejected is None else row | {"chosen": " " + texts[1], "rejected": " " + texts[2]}


def tldr_row(row):
    """TL;DR: {info: {post, subreddit}, summaries: [{text}, {text}], choice} or {post, subreddit, summary}."""
    info = "info." if "info" in row else ""
    if info and field_of(row, "info", dict).get("post", "") is None:
        return "not about a Reddit post"
    subreddit, post = (field_of(row, info + name).strip() for name in ("subreddit", "post"))
    prompt = f"POST Subreddit: r/{subreddit} {post} TL;DR:"
    if not info:
        return pair(prompt, field_of(row, "summary"))
    if (choice := field_of(row, "choice", int)) not in (0, 1):
        raise ValueError(f"field 'choice' must be 0 or 1, got {choice}")
    return pair(prompt, *(field_of(row, f"summaries.{i}.text") for i in (choice, 1 - choice)))


def webgpt_row(row):
    """WebGPT: {question: {full_text}, answer_0, answer_1, score_0, score_1}, without quotes' [n]."""
    scores = [field_of(row, f"score_{i}", (int, float)) for i in (0, 1)]
    answers = [re.sub(r"\s*\[\d+(,\s*\d+)*\]", "", field_of(row, f"answer_{i}")) for i in (0, 1)]
    prompt = f" Human: {field_of(row, 'question.full_text').strip()} Assistant:"
    if scores[0] == scores[1]:
        return "equal scores"
    return pair(prompt, *(answers if scores[0] > scores[1] else answers[::-1]))


def apps_row(row):
    """APPS: {question, starter_code, solutions, input_output, difficulty}; the first solution is imitated."""
    tests, solutions = (row.get(name) or "null" for name in ("input_output", "solutions"))
    try:
        tests, solutions = (json.loads(x) if isinstance(x, str) else x for x in (tests, solutions))
    except ValueError as error:
        raise ValueError(f"field 'input_output' or 'solutions' is not JSON ({error})") from None
    if not isinstance(tests, dict) or not tests.get("inputs") or not tests.get("outputs"):
        return "no unit tests"
    style = "Call-Based" if tests.get("fn_name") else "Standard Input"
    question, starter = field_of(row, "question").strip(), row.get("starter_code") or ""
    prompt = f"QUESTION:\n{question}\n{starter}\nUse {style} format\nANSWER:"
    problem = {"input_output": tests, "difficulty": row.get("difficulty")}
    found = {"prompt": prompt, "problem": problem}
    return found | ({"response": "\n" + solutions[0].strip()} if solutions else {})


def hh_row(row):
    """HH-RLHF: {prompt, chosen, rejected}, or {chosen, rejected}, cut at their last "Assistant:"."""
    chosen, rejected = field_of(row, "chosen"), field_of(row, "rejected")
    if "prompt" in row:
        return pair(field_of(row, "prompt"), chosen, rejected)
    before, found, chosen = chosen.rpartition("Assistant:")
    other, _, rejected = rejected.rpartition("Assistant:")
    if not found:
        raise ValueError("field 'chosen' has no 'Assistant:', and there is no field 'prompt'")
    return pair(before + found, chosen, rejected) if before == other else "a pair about two prompts"


def plain_row(row):
    """A row of your own: {prompt, response} or {prompt}."""
    prompt = field_of(row, "prompt")
    if "response" in row:
        return pair(prompt, field_of(row, "response"))
    return {"prompt": prompt.rstrip()} if prompt.strip() else "an empty text"


# A schema by a field that only it has; the first that fits is taken.
SCHEMAS = {"summaries": tldr_row, "summary": tldr_row, "answer_0": webgpt_row, "question": apps_row}
SCHEMAS |= {"chosen": hh_row, "rejected": hh_row, "prompt": plain_row}
# Parquet copies that the hub makes of datasets whose scripts no longer load; plain files where there are any.
HUB = {
    "tldr": "openai/summarize_from_feedback@refs/convert/parquet/comparisons/train/*.parquet",
    "hh": "Dahoas/full-hh-rlhf/data/train-*.parquet",
    "webgpt": "openai/webgpt_comparisons@refs/convert/parquet/*/train/*.parquet",
    "apps": "codeparrot/apps/train.jsonl",
}


# The paper's settings (its appendix; SPEC 7). Batch, learning rate and epochs of SFT; batch and rate of the
# RM; batch, rates of policy and critic, beta and warm-up steps of PPO.
PAPER = {
    "gemma-2b-tldr": ("google/gemma-2b", 512, 5e-5, 3, 64, 1e-5, 256, 1.5e-5, 1.5e-5, 0.05, 200),
    "gemma-2b-hh": ("google/gemma-2b", 512, 5e-5, 3, 64, 1e-5, 256, 1.5e-5, 1.5e-5, 0.05, 200),
    "gemma-2b-webgpt": ("google/gemma-2b", 64, 1e-4, 3, 32, 2e-5, 256, 1.5e-5, 1.5e-5, 0.05, 200),
    "gemma-7b-tldr": ("google/gemma-7b", 128, 2e-5, 1, 128, 1e-6, 256, 1e-6, 1e-6, 0.05, 200),
    "gemma-7b-hh": ("google/gemma-7b", 128, 2e-5, 1, 64, 1e-6, 256, 1e-6, 1e-6, 0.05, 200),
    "gemma-7b-webgpt": ("google/gemma-7b", 128, 2e-5, 5, 32, 1e-6, 256, 1e-6, 1e-6, 0.1, 200),
    "gemma-2-27b-tldr": ("google/gemma-2-27b", 128, 5e-6, 3, 128, 8e-6, 256, 7e-7, 1e-6, 0.1, 0),
    "codegemma-2b-apps": ("google/codegemma-2b", 16, 5e-6, 1, 0, 0, 16, 5e-7, 5e-5, 0.05, 20),
    "codegemma-7b-apps": ("google/codegemma-7b", 32, 2e-6, 1, 0, 0, 16, 5e-7, 5e-5, 0.05, 20),
}


def paper_settings(name):
    """A row of PAPER as settings {"all": of every chapter, "sft": {...}, "reward": ..., "ma_ppo": ...}."""
    model, *sft, rm_batch, rm_lr, batch, lr, critic_lr, beta, warmup = PAPER[name]
    code = name.endswith("apps")
    return {
        "all": {"task": name.rsplit("-", 1)[1], "model": model, "max_prompt": 600 if code else 512,
                "max_response": 512, "micro_batch_size": 4, "epochs": 1.0,
                **(NO_RM if code else {})},
        "sft": dict(zip(("batch_size", "lr", "epochs"), sft, strict=True), warmup=0.0 if code else 0.1),
        "reward": {} if code else {"batch_size": rm_batch, "lr": rm_lr},
        "ma_ppo": {"batch_size": batch, "lr": lr, "critic_lr": critic_lr, "beta": beta, "warmup": warmup,
                   "temperature": 1.0 if code else 0.8, "top_k": 5 if code else 50}
                  | (TESTED if code else {}),
    }  # fmt: skip


# The toy, a miniature TL;DR. A post states twelve facts about a trip, in random order and wording; a summary
# should state each of them once. Unlike with real data, true quality is known: `gold_score` of chapter 2.
TOY_ROWS, TOY_LONGEST = 30_000, 14  # posts; sentences of a summary, so that it fits into max_response
# Each slot: its six values, the wording of summaries, two wordings of posts.
TOY_FACTS = dict(
    friend=("anna ben carla david emma felix", "my old friend {} came along with me",
        "this time i took young {} with me", "{} from work joined me for it all"),
    place=("lisbon vienna oslo prague dublin athens", "we spent the whole week in lovely {}",
        "our plan was to see beautiful {} again", "so we finally made it to {}"),
    month=("january march may july september november", "it was the middle of {} back then",
        "we had left home in late {}", "last {} i had some free days"),
    ride=("train bus plane ferry car bike", "we got there by {} in one day",
        "the way there was one slow {} ride", "i had booked a cheap {} for us"),
    weather=("sunny rainy windy foggy snowy stormy", "the weather was mostly {} for us",
        "almost every single day was rather {}", "it got {} as soon as we arrived"),
    lodging=("hotel hostel cabin tent castle boat", "we slept in a small {} near town",
        "our home was this tiny {} outside", "somebody had let us use their {}"),
    food=("pizza soup curry fish pasta stew", "for dinner we ate some {} there",
        "there was always hot {} to eat", "i could not get enough of their {}"),
    animal=("dog cat goat horse parrot fox", "a friendly {} followed us all the time",
        "every morning we met the same {}", "some {} kept running after us"),
    loss=("camera passport wallet phone umbrella jacket", "i lost my favourite {} on day two",
        "somebody must have stolen my new {}", "then my expensive {} was suddenly gone"),
    cost=("forty sixty ninety hundred thousand million", "in total i paid {} euros for it",
        "it all cost me about {} euros", "i spent {} euros and regret nothing"),
    injury=("knee ankle wrist elbow shoulder toe", "i badly hurt one {} on the stairs",
        "my {} still hurts from a fall", "i fell and twisted my {} there"),
    gift=("mug scarf poster lamp ring clock", "my mother got a nice {} from me",
        "i brought home the prettiest {}", "for my parents i bought a {}"),
)  # fmt: skip
TOY_FILLERS = (
    "anyway that is all i wanted to say", "so yeah it was really something else",
    "you know how these things always go", "well i guess that is just life",
)  # fmt: skip


@cache
def toy_sentences():
    """Every sentence of the toy: {sentence: (slot, value)}; a filler's slot is None."""
    sentences = {filler: (None, None) for filler in TOY_FILLERS}
    for slot, (values, *wordings) in TOY_FACTS.items():
        for value in values.split():
            sentences |= {wording.format(value): (slot, value) for wording in wordings}
    return sentences


def toy_summary(rng, facts, share, wrong, fillers, repeats):
    """Sentences: a `share` of the `facts` {slot: value}, so many fillers, and up to so many repetitions.

    With probability `wrong` a fact's value is drawn at random, and so wrong 5 times in 6. Never more than
    TOY_LONGEST sentences.  rng: random.Random
    """
    sentences = []
    for slot in rng.sample(list(facts), round(share * len(facts))):
        values, wording, *_ = TOY_FACTS[slot]
        value = rng.choice(values.split()) if rng.random() < wrong else facts[slot]
        sentences.append(wording.format(value))
    extra = rng.sample(TOY_FILLERS, min(fillers, TOY_LONGEST - len(sentences)))
    extra += rng.choices(sentences, k=rng.randint(0, min(repeats, TOY_LONGEST - len(sentences) - len(extra))))
    for sentence in extra:
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    return sentences


def toy_row(index):
    """Post number `index` with a demonstration: texts {prompt, response}, and the post's number."""
    rng = random.Random(f"{SPLIT_SEED} {index}")
    facts = {slot: rng.choice(values.split()) for slot, (values, *_) in TOY_FACTS.items()}
    post = [rng.choice(TOY_FACTS[slot][2:]).format(facts[slot]) for slot in rng.sample(list(facts), 12)]
    response = toy_text(toy_summary(rng, facts, rng.uniform(0.3, 0.7), 0.1, rng.randint(2, 4), 2))
    prompt = f"POST Subreddit: r/travel{toy_text(post)} TL;DR:"
    return {"prompt": prompt, "response": response, "number": index}


def toy_text(sentences):
    """Sentences as a response: each behind a space and with its full stop."""
    return "".join(f" {sentence}." for sentence in sentences)


# toy-code, a miniature of APPS: what a function f does with a list x, told in English, with unit tests, and
# demonstrations of which a share has a mistake. The truth is what the functions below compute, never a text.
CODE_ROWS, CODE_WRONG, CODE_TESTS = 30_000, 0.6, 3  # problems; share with a mistake; tests of each
# Weights of the mistakes: no return; a number, step or list for another; two steps swapped; one, or a
# bracket, left out. The first two are habits, which PPO breaks first.
CODE_MISTAKES = {"return": 4, "number": 8, "step": 2, "order": 2, "gap": 1, "list": 1, "bracket": 1}
# Each step: its words, its line, what it does to a list x with a number k, and what it is mistaken for.
CODE_STEPS = dict(
    add=("add {} to each", "x = [v + {} for v in x]", lambda x, k: [v + k for v in x], "subtract"),
    subtract=("subtract {} from each", "x = [v - {} for v in x]", lambda x, k: [v - k for v in x], "add"),
    multiply=("multiply each by {}", "x = [v * {} for v in x]", lambda x, k: [v * k for v in x], "add"),
    above=("keep those above {}", "x = [v for v in x if v > {}]",
        lambda x, k: [v for v in x if v > k], "below"),
    below=("keep those below {}", "x = [v for v in x if v < {}]",
        lambda x, k: [v for v in x if v < k], "above"),
    even=("keep the even ones", "x = [v for v in x if v % 2 == 0]",
        lambda x, k: [v for v in x if not v & 1], "odd"),
    odd=("keep the odd ones", "x = [v for v in x if v % 2 == 1]",
        lambda x, k: [v for v in x if v & 1], "even"),
    up=("sort upwards", "x = sorted(x)", lambda x, k: sorted(x), "down"),
    down=("sort downwards", "x = sorted(x, reverse=True)", lambda x, k: sorted(x)[::-1], "up"),
    turn=("turn the list round", "x = x[::-1]", lambda x, k: [*reversed(x)], "down"),
    first=("keep the first {}", "x = x[:{}]", lambda x, k: [v for i, v in enumerate(x) if i < k], "drop"),
    drop=("drop the first {}", "x = x[{}:]", lambda x, k: [v for i, v in enumerate(x) if i >= k], "first"),
)  # fmt: skip
CODE_ENDS = dict(
    sum=("return the sum", "return sum(x)", lambda x, k: sum(x), "count"),
    count=("return the count", "return len(x)", lambda x, k: len(x), "sum"),
    largest=("return the largest or 0", "return max(x, default=0)",
        lambda x, k: sorted(x)[-1] if x else 0, "smallest"),
    smallest=("return the smallest or 0", "return min(x, default=0)",
        lambda x, k: sorted(x)[0] if x else 0, "largest"),
    list=("return the list", "return x", lambda x, k: x, "count"),
)  # fmt: skip
CODE = CODE_STEPS | CODE_ENDS


def code_output(steps, x):
    """What a program of `steps`, a list of (name, number), returns for the list `x`: None without an end."""
    for name, k in steps:
        x = CODE[name][2](x, k)
        if name in CODE_ENDS:
            return x


def code_text(steps):
    """The program of `steps`."""
    return "\n    ".join(["def f(x):", *(CODE[name][1].format(k) for name, k in steps)])


def code_steps(rng):
    """A random problem: its steps, and the inputs of its tests, to which not all answers are the same."""
    while True:
        names = [*rng.sample([*CODE_STEPS], rng.randint(2, 4)), rng.choice([*CODE_ENDS])]
        steps = [(name, rng.randint(2, 6)) for name in names]
        inputs = [[rng.randint(0, 12) for _ in range(8)] for _ in range(CODE_TESTS)]
        if any(code_output(steps, x) != code_output(steps, inputs[0]) for x in inputs):
            return steps, inputs


def code_mistake(rng, steps, inputs):
    """A program with one mistake, which the tests on `inputs` find."""
    while True:
        i, kind = rng.randrange(len(steps)), rng.choices([*CODE_MISTAKES], CODE_MISTAKES.values())[0]
        (name, k), before, after = steps[i], steps[:i], steps[i + 1 :]
        lines = code_text(steps).split("\n")
        if kind == "return":
            return "\n".join(lines).replace("return ", "")
        if kind in ("list", "bracket"):
            unknown, cut = re.sub("x(?!.*x)", "y", lines[i + 1]), lines[i + 1][:-1]
            return "\n".join([*lines[: i + 1], unknown if kind == "list" else cut, *lines[i + 2 :]])
        wrong = {
            "number": [*before, (name, k + 1), *after],
            "step": [*before, (CODE[name][3], k), *after],
            "order": [*before, *after[:1], steps[i], *after[1:]],
            "gap": before + after,
        }[kind]
        if any(code_output(wrong, x) != code_output(steps, x) for x in inputs):
            return code_text(wrong)


def code_row(index):
    """Problem number `index` with a demonstration, as APPS has them: {prompt, response, problem, number}."""
    rng = random.Random(f"{SPLIT_SEED} code {index}")
    steps, inputs = code_steps(rng)
    tests = {"fn_name": "f", "inputs": [[x] for x in inputs]}
    tests["outputs"] = [code_output(steps, x) for x in inputs]
    words = [CODE[name][0].format(k) for name, k in steps]
    row = {"question": f"With the list x: {', '.join(words)}.", "starter_code": "def f(x):"}
    wrong = rng.random() < CODE_WRONG
    row["solutions"] = [code_mistake(rng, steps, inputs) if wrong else code_text(steps)]
    row |= {"input_output": tests, "difficulty": f"{len(steps)} statements"}
    return apps_row(row) | {"number": index}


if __name__ == "__main__":
    main()
