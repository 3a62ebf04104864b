"""Chapter 1: supervised fine-tuning (SFT), and what the later chapters stand on.

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
    the story     Config, the batch, the loss, data parallelism by hand, the update, train
    Appendices    A runs that are not lost, B settings, C models, D how text becomes tokens,
                  E rows, F the toy: posts and their summaries, G toy-code: small programs
You may stop reading at Appendix A. What the story uses from there says so in a comment.
"""

import atexit
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


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

    The story needs the first dozen. A task changes some defaults: Appendix B, or --help.
    """

    task: Literal["toy", "toy-code", "tldr", "hh", "webgpt", "apps", "plain"] = opt(
        "toy", "embedded (toy, toy-code), or read from files or the hub"
    )
    data: list[str] = opt([], "files of rows: JSON, JSON Lines, Parquet, also .gz")
    model: str = opt("", "causal LM to start from, a folder or hub name; empty: a small one anew")
    out: str = opt("", "folder to write to; empty: runs/TASK/sft, runs/TASK/reward or runs/TASK")
    seed: int = opt(0, "of initialisation, data order and sampling; never of the split of the data")
    steps: int = opt(350, "number of updates")
    batch_size: int = opt(32, "sequences per update, over all ranks")
    micro_batch_size: int = opt(32, "sequences per forward pass and rank: memory, not the result")
    lr: float = opt(4e-3, "peak learning rate; rises linearly, then falls as a cosine")
    warmup: float = opt(0.1, "share of the steps in which the learning rate rises (paper: 0.1)")
    max_prompt: int = opt(512, "tokens; longer prompts lose their beginning")
    max_response: int = opt(128, "tokens, the end mark included; longer responses lose their end")

    # What the rows are, and how they are shown to the model: Appendices D and E.
    epochs: float = opt(0.0, "passes over the rows, which then set --steps; 0: --steps counts")
    split: list[float] = opt([20, 40, 40], "% of the prompts for SFT, RM, PPO; a tenth is held out")
    chat_template: bool = opt(False, "wrap prompts in the chat template of the model's tokenizer")
    # Where and how it is computed: Appendix C.
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    precision: Literal["auto", "fp32", "bf16"] = opt("auto", "auto: bf16 on a GPU that has it")
    gradient_checkpointing: bool = opt(False, "less memory: compute activations again, backwards")
    compile: bool = opt(False, "torch.compile the forward passes: slow to start, then faster")
    shard: bool = opt(False, "split the models among the ranks: for those too large for one GPU")
    # Runs that are not lost: Appendix A.
    resume: Literal["", "auto"] = opt("", "auto: go on from the newest checkpoint, if there is one")
    save_every: int = opt(100, "steps between checkpoints; 0: only at the end")
    keep: int = opt(2, "newest checkpoints that are kept")
    track: Literal["", "wandb", "trackio", "swanlab"] = opt("", "also log to one of these")


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

    PAD must not be EOS, the end mark: other code, unlike ours, finds padding by its id. It would
    take the ends for padding, and a model that never sees an end never learns to stop.
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
    """The model's scores (logits) of every possible token at each response place.  -> [B, T, N]

    N is the size of the vocabulary. The logits at position p predict token p+1. So those of the
    first response token stand in the last prompt column, and we need T+1 columns less the last.
    The prompt's are never computed.
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
    return possible(output.logits[:, -T - 1 : -1].float(), model)  # [B, T, N]


def possible(logits, model):
    """Logits in which ids that stand for no token have no chance.  [..., N] -> [..., N]

    Many models have more ids than their tokenizer has tokens. `unused_ids` is set in Appendix C.
    """
    if not model.unused_ids:
        return logits
    unused = torch.tensor(model.unused_ids, device=logits.device)  # [unused ids]
    # Not minus infinity: PAD may be among them, and in the padding that would become inf * 0.
    return logits.index_fill(-1, unused, -1e9)  # [..., N]


def sft_loss(model, batch, token_count):
    """Cross-entropy of the response tokens: their sum, divided by `token_count`.  -> scalar

    token_count: response tokens of the whole batch, over all micro-batches and ranks. So a long
    response counts as much as its tokens, wherever it is computed.
    """
    logprobs = response_logits(model, batch).log_softmax(-1)  # [B, T, N]
    logprobs = logprobs.gather(-1, batch.responses[..., None]).squeeze(-1)  # [B, T]
    return -(logprobs * batch.mask).sum() / token_count


# Data parallelism by hand. A rank is one process, usually with one GPU. Every rank holds the whole
# model and takes its share of the batch. Three things keep the ranks one model: equal parameters
# at the start (broadcast), equal gradients at every update (all_reduce), and no decision taken
# from one rank's numbers alone. A loss is a sum over tokens divided by the token count of *all*
# ranks; so gradients are summed, and the number of ranks cancels out of the mathematics.


def setup(device=""):
    """Join the other ranks, if torchrun started us.  -> the torch.device of this rank"""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        if device.type == "cuda":  # every rank has a GPU of its own
            number = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            device = torch.device("cuda", number)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # a torch without CUDA ...
        fail(f"--device {device} cannot be used: {str(error).splitlines()[0]}")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        atexit.register(dist.destroy_process_group)
    return device


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


def fail(message):
    """End the program with one line for the person at the keyboard, and exit code 2."""
    number = int(os.environ.get("RANK", 0))
    if number == 0 or dist.is_initialized():  # before the ranks have met, they all fail alike
        name = f"rank {number}: " if number else ""
        print(f"{name}error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def all_sum(x):
    """The sum of a tensor, or a number, over all ranks (a float64 tensor for a number)."""
    x = x.clone() if torch.is_tensor(x) else torch.tensor(float(x), dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(x)
    return x


def gather(items):
    """Every rank's list, concatenated in rank order: after `my_share`, the global order."""
    parts = [list(items)]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, list(items))
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
    """Add up every gradient over all ranks, so that all of them will make the same update."""
    if world() == 1 or isinstance(model, FSDPModule):
        return  # a model that is split among the ranks (--shard) has summed its own, backwards
    for p in model.parameters():
        if p.requires_grad:
            if p.grad is None:  # not used by this rank's rows, but maybe by another's
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


def micro_slices(count, size):
    """Slices of at most `size` that tile range(count): one forward and backward pass each."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def micro_losses(model, examples, tokenizer, token_count, cfg):
    """Yield each micro-batch's share of the SFT loss, computed when it is asked for."""
    for part in micro_slices(len(examples), cfg.micro_batch_size):
        prompts = [example["prompt"] for example in examples[part]]
        responses = [example["response"] for example in examples[part]]
        batch = make_batch(prompts, responses, tokenizer.pad_token_id, model.device)
        yield sft_loss(model, batch, token_count)


def update(model, optimizer, losses, lr, max_norm=1.0):
    """One optimizer step on the sum of `losses`, a generator of one loss a micro-batch.

    A batch that does not fit into memory is computed in micro-batches: `backward` is through with
    one before the generator computes the next. Their gradients add up, over ranks too, and every
    loss is already divided by the batch-wide token count; so neither changes the update. The
    gradient's norm is clipped at `max_norm`: one odd batch must not throw the model off. Returns
    the loss, a float; NaN if it or the gradient is not finite: then nothing is updated.
    """
    total = torch.zeros((), dtype=torch.float64)
    for loss in losses:
        loss.backward()  # adds to the gradients of the micro-batches before
        total += loss.detach().double().cpu()
    sum_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = float(all_sum(total))
    finite = math.isfinite(total) and math.isfinite(norm)  # the same on all ranks
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()  # frees the gradients: the next rollout can use their memory
    optimizer.skipped = 0 if finite else optimizer.skipped + 1
    if optimizer.skipped == 5:
        fail("5 updates in a row were not finite: lower --lr (or --critic_lr)")
    return total if finite else math.nan


def make_optimizer(model):
    """AdamW without weight decay. eps 1e-5, not 1e-8: PPO's gradients can be tiny, and Adam
    divides by their size, so that noise would be blown up to full steps."""
    weights = list(model.parameters())
    fused = weights[0].is_cuda  # one pass over memory, no temporaries
    adam = torch.optim.AdamW(weights, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=fused)
    adam.skipped = 0  # updates in a row that were not finite
    return adam


def cosine_lr(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * ((step + 1) / ramp)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
    return peak * cosine


def count_steps(cfg, count):
    """--steps, or as many as --epochs passes over `count` rows take."""
    if cfg.epochs:
        return max(1, round(cfg.epochs * count / cfg.batch_size))
    return cfg.steps


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


def main(argv=None):
    """Fine-tune a model on demonstrations, with the settings of the command line."""
    train(parse(Config, "sft", argv))  # Appendix B


def train(cfg):
    """The whole chapter: fine-tune, measure, save."""
    device = setup(cfg.device)  # join the other ranks, if there are any
    rows = load_share(cfg, "sft", "response")  # this chapter's demonstrations: Appendix E
    test = load_share(cfg, "test", "response")[:256]  # held out: no chapter learns from them
    out = claim(cfg.out)  # the run's folder, held against other runs: Appendix A
    if finished(out, cfg):  # --resume auto found nothing left to do: Appendix A
        return
    model, tokenizer = start_model(cfg, rows)  # pretrained, or small and random: Appendix C
    examples = encode(usable_rows(rows, tokenizer, cfg), tokenizer, cfg)  # token lists: Appendix D
    test = encode(usable_rows(test, tokenizer, cfg), tokenizer, cfg)
    cfg.steps = count_steps(cfg, len(examples))
    prepare(model, cfg, device)  # on its device, equal on all ranks, in bf16 or not: Appendix C
    optimizer = make_optimizer(model)
    print0(f"SFT: {len(examples):,} demonstrations, {model.num_parameters():,} parameters -> {out}")

    models, optimizers = {"model": model}, {"model": optimizer}
    first = begin(out, cfg, models, optimizers)  # 0, or where an interrupted run was: Appendix A
    bar = steps(first, cfg, "sft")  # the numbers of the steps, with a progress bar: Appendix A
    for step in bar:
        started = time.perf_counter()
        mine = my_share(batch_rows(examples, step, cfg.batch_size, cfg.seed))
        token_count = float(all_sum(sum(len(example["response"]) for example in mine)))
        losses = micro_losses(model, mine, tokenizer, token_count, cfg)
        lr = cosine_lr(step, cfg.steps, cfg.lr, cfg.warmup)
        loss = update(model, optimizer, losses, lr)
        seconds = time.perf_counter() - started
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        log(out, {"step": step, "loss": loss, "seconds": seconds}, cfg)  # Appendix A
        save_checkpoint(out, step + 1, cfg, models, optimizers)  # if it is time to: Appendix A

    token_count = sum(len(example["response"]) for example in test)
    with torch.no_grad():  # all ranks compute all
        loss = sum(map(float, micro_losses(model, test, tokenizer, token_count, cfg)))
    print0(f"SFT: cross-entropy {loss:.3f} nats a token on {len(test)} held-out demonstrations")
    save_models([model, tokenizer], out)  # Appendix A
    write_json(out / "run.json", {"config": asdict(cfg), "result": {"test_loss": loss}})


# Appendix A. Runs that are not lost.
#
# Noise, data order and schedules are pure functions of seed and step. So weights, optimizer state
# and the step are all that it takes to go on as if nothing had happened. A checkpoint gets its name
# when all of it is there, and only then the oldest one goes: one is complete at any moment.

import importlib
import json
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from filelock import FileLock, Timeout
from torch.distributed.checkpoint import state_dict as dcp_state
from tqdm import tqdm

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is no mistake
LOGS = ("metrics.jsonl", "samples.jsonl")
# Settings that may change: nothing is said where a run goes on with others.
FREE = {"out", "arms", "steps", "resume", "save_every", "keep", "track", "device"}


def claim(folder):
    """Create a run's folder and hold it until this process ends: two runs would mix their files."""
    folder = Path(folder)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.resolve() / "run.lock", is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            fail(f"another run writes to {folder}")
        atexit.register(lock.release)  # the system does it after kill -9
    barrier()
    return folder


def finished(out, cfg):
    """Whether --resume auto finds all steps of this run done, and its models saved."""
    if not cfg.resume or not (out / "run.json").exists():
        return False
    made = json.loads((out / "run.json").read_text())["config"]
    what = "epochs" if cfg.epochs else "steps"
    enough = made[what] >= getattr(cfg, what)
    if enough:
        print0(f"{out} is already finished{other_settings(cfg, made)}")
    return enough


def other_settings(cfg, made):
    """In words, which settings differ from those that something was `made` with."""
    changed = []
    for name, now in asdict(cfg).items():
        if name not in FREE and made.get(name) != now:
            changed.append(f"--{name}")
    return f", with other {', '.join(changed)}" if changed else ""


def begin(out, cfg, models, optimizers):
    """Go on from the newest checkpoint (--resume auto), or start anew.  -> number of the first step

    models: {name: module}; optimizers: {name: its optimizer} of those that learn. Only from here on
    is anything in the folder changed: what was logged of later steps is cut off.
    """
    saved = checkpoints(out) if cfg.resume else []
    first = 0
    if saved:
        made = json.loads((saved[-1] / "state.json").read_text())
        first = made["step"]
        if first > cfg.steps:
            fail(f"{saved[-1]} is beyond --steps {cfg.steps}")
        state = training_state(models, optimizers)
        dcp.load(state, checkpoint_id=saved[-1])  # fills the tensors in `state`
        for name, optimizer in optimizers.items():
            dcp_state.set_state_dict(models[name], optimizer, **state[name])
        print0(f"goes on from {saved[-1]}{other_settings(cfg, made['config'])}")
    barrier()  # nobody reads any more
    if rank() == 0:
        (out / "run.json").unlink(missing_ok=True)  # not finished any more
        for folder in [] if saved else out.glob("checkpoints/step-*"):
            shutil.rmtree(folder)
        for path in [out / name for name in LOGS if (out / name).exists()]:
            *lines, _ = path.read_text().split("\n")  # the last one is empty, or was cut short
            new = path.with_suffix(".tmp")
            new.write_text("".join(x + "\n" for x in lines if json.loads(x)["step"] < first))
            new.rename(path)
        if cfg.track:
            tracker = importlib.import_module(cfg.track)
            tracker.init(project="ma-rlhf", name=str(out), config=asdict(cfg))
    torch.manual_seed(cfg.seed)  # whatever this process has done before
    return first


def steps(first, cfg, name):
    """The numbers of the steps that are left, with a progress bar."""
    left = range(first, cfg.steps)
    return tqdm(left, name, cfg.steps, initial=first, mininterval=1.0, disable=rank() != 0)


def save_checkpoint(out, done, cfg, models, optimizers):
    """Every --save_every steps, and after the last, write OUT/checkpoints/step-`done`."""
    if done < cfg.steps and (not cfg.save_every or done % cfg.save_every):
        return
    unfinished = out / "checkpoints" / "unfinished"
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    # Each rank writes its part, one tensor after the other: never is there a second copy of all.
    writer = dcp.FileSystemWriter(unfinished, per_thread_copy_ahead=0)
    dcp.save(training_state(models, optimizers), storage_writer=writer)
    if rank() == 0:
        write_json(unfinished / "state.json", {"step": done, "config": asdict(cfg)})
        unfinished.rename(out / "checkpoints" / f"step-{done:06d}")
        for folder in checkpoints(out)[: -cfg.keep]:
            shutil.rmtree(folder)
    barrier()


def checkpoints(out):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(path.parent for path in out.glob("checkpoints/step-*/state.json"))


def training_state(models, optimizers):
    """{name: state of a model and its optimizer}, whole or split among the ranks."""
    state = {}
    for name, optimizer in optimizers.items():
        new = not optimizer.state
        weights, moments = dcp_state.get_state_dict(models[name], optimizer)
        for of_weight in optimizer.state.values() if new else ():
            of_weight["step"].zero_()  # to have a state, Adam has just made an update of size 0
        state[name] = {"model_state_dict": weights, "optim_state_dict": moments}
    return state


def barrier():
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


def log(out, row, cfg):
    """Append a step's metrics to metrics.jsonl, and hand them to --track."""
    append(out / "metrics.jsonl", row)
    if cfg.track and rank() == 0:  # wandb, trackio and swanlab share one interface
        tracker = importlib.import_module(cfg.track)
        tracker.log({name: value for name, value in row.items() if value is not None})
        if row["step"] == cfg.steps - 1:
            tracker.finish()


def append(path, *rows):
    """Append rows to a .jsonl file, on rank 0; null stands for what is not finite."""
    if rank() == 0:
        with path.open("a") as file:
            for row in rows:
                row = json.loads(json.dumps(row), parse_constant=lambda name: None)
                file.write(json.dumps(row) + "\n")


def write_json(path, value):
    """Write a JSON file on rank 0, in one move: nobody will ever see half of it."""
    if rank() == 0:
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(value, indent=2) + "\n")
        new.rename(path)


def save_models(parts, out):
    """Save models and tokenizers in Hugging Face format, on rank 0."""
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    for part in parts:
        options = {}
        if isinstance(part, FSDPModule):  # it is put together, on rank 0's CPU
            options["state_dict"] = dcp_state.get_model_state_dict(part, options=whole)
        if rank() == 0:
            part.save_pretrained(out, **options)
    barrier()


# Appendix B. Settings.
#
# Every setting is a flag. A task or --model puts flags in front of those that you type, and of two
# equal ones the last one wins: what you type always counts. --help shows what is put in front.

import argparse
import importlib.util

from transformers import HfArgumentParser

# Real text without a pretrained model: sized for minutes on two cores.
SMALL = "--max_prompt 192 --max_response 96"
TEXT = {
    "sft": f"{SMALL} --steps 250 --batch_size 16 --lr 1e-3",
    "reward": f"{SMALL} --steps 100 --batch_size 16 --lr 2e-4",
    "ma_ppo": f"{SMALL} --steps 40 --batch_size 32 --lr 2e-4 --critic_lr 2e-4",
}
NO_RM = "--split 20 0 80"  # programs need no reward model
TESTED = f"{NO_RM} --arms token fixed ast --ngram 10 --no_eos_score -1"  # -1 is their floor
TASK_FLAGS = {  # {task: {chapter: flags}}
    **dict.fromkeys(("tldr", "hh", "webgpt", "plain"), TEXT),
    "toy": {},
    "toy-code": {
        "sft": f"{NO_RM} --max_response 80 --steps 500",
        "ma_ppo": f"{TESTED} --max_response 80 --lr 1e-3",
    },
    "apps": {"sft": f"{TEXT['sft']} {NO_RM}", "ma_ppo": f"{TEXT['ma_ppo']} {TESTED}"},
}
PROGRAMS = ("toy-code", "apps")
PRETRAINED = {  # a pretrained model would forget what it knows at the rates of a small new one
    "sft": "--micro_batch_size 8 --lr 5e-5",
    "reward": "--micro_batch_size 8 --lr 1e-5",
    "ma_ppo": "--micro_batch_size 8 --lr 1.5e-5 --critic_lr 1.5e-5",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and leaves the lines at the end as they are."""


def parse(config_class, chapter, argv=None):
    """A chapter's `Config`: its defaults, then the flags of task and model, then `argv`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    in_front = [f"--task {task}: {flags.get(chapter)}" for task, flags in TASK_FLAGS.items()]
    in_front.append(f"--model: {PRETRAINED[chapter]}")
    parser = HfArgumentParser(
        config_class,
        description=sys.modules[config_class.__module__].__doc__.split("\n")[0],
        epilog="\n  ".join(["put in front of your flags:", *in_front]),
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30),
        allow_abbrev=False,
    )
    parser.error = fail
    typed = parser.parse_args(argv)
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for name, value in vars(typed).items():
        if isinstance(value, list) and flags.count(f"--{name}") > 1:
            fail(f"--{name} is given twice: put all of its values behind one")
    front = TASK_FLAGS[typed.task].get(chapter, "")
    if typed.model:
        front += f" {PRETRAINED[chapter]}"
    if getattr(typed, "reward", ""):
        front += f" {NO_RM}"
    cfg = config_class(**vars(parser.parse_args(front.split() + argv)))
    cfg.data = [*map(absolute, cfg.data)]
    for name in {"model", "sft", "reward_model"} & vars(cfg).keys():
        setattr(cfg, name, absolute(getattr(cfg, name)))
    if not cfg.out:
        cfg.out = str(Path("runs") / cfg.task / ("" if chapter == "ma_ppo" else chapter))
    if [flag for flag in flags if flag in ("--steps", "--epochs")][-1:] == ["--steps"]:
        cfg.epochs = 0.0  # of the two, what is typed last counts
    check(cfg, chapter)
    return cfg


def absolute(path):
    """A path that means the same from every folder; hub names stay as they are."""
    return os.path.abspath(path) if os.path.exists(path) else path


def check(cfg, chapter):
    """Refuse settings that cannot work, before anything is computed."""
    may_be_zero = ["seed", "epochs", "warmup"]
    sizes = ["steps", "batch_size", "micro_batch_size", "lr", "max_prompt", "max_response", "keep"]
    for name in sizes + may_be_zero:
        value = getattr(cfg, name)
        if not 0 <= value < math.inf or (value == 0 and name in sizes):
            fail(f"--{name} must be {'positive' if name in sizes else '0 or more'}, got {value}")
    if cfg.track and importlib.util.find_spec(cfg.track) is None:
        fail(f"--track {cfg.track} needs: pip install {cfg.track}")
    if isinstance(cfg.warmup, float) and cfg.warmup > 1:
        fail(f"--warmup is a share of the steps, 0 to 1, got {cfg.warmup}")
    if cfg.task.startswith("toy") and cfg.data:
        fail("--data FILE needs a task that reads it: tldr, hh, webgpt, apps or plain")
    if cfg.task == "plain" and not cfg.data:
        fail("--task plain needs --data FILE")
    if len(cfg.split) != 3 or min(cfg.split) < 0 or not 99.9 < sum(cfg.split) < 100.1:
        fail(f"--split must be three percentages that add up to 100, got {cfg.split}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.shard and ranks == 1:
        fail("--shard splits models among ranks: start two with torchrun --nproc_per_node=2")
    if cfg.batch_size % ranks:
        fail(f"{chapter}.py: --batch_size {cfg.batch_size} is not divisible by {ranks} ranks")


# Appendix C. Models.
#
# All models stay in eval mode, so that dropout is off: PPO compares the probability of a token now
# with that when it was sampled, and the two must not differ before anything is learned.

import ctypes

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_or_fail(from_pretrained, path, **options):
    """Call a `from_pretrained`; a failure becomes one line that names the path."""
    if Path(path, "adapter_config.json").exists():
        fail(f"{path} holds a LoRA adapter: save what peft's merge_and_unload makes of it first")
    no_hub_name = str(path).count("/") != 1 or Path(path).parent.is_dir()
    if "/" in str(path) and no_hub_name and not Path(path).exists():
        fail(f"cannot load {path}: no such folder")
    try:
        return from_pretrained(path, **options)
    except Exception as error:  # nothing there, half a download, a missing package ...
        reason = str(error).strip().split("\n")[0]
        fail(f"cannot load {path}: {reason or type(error).__name__}")


def load_model(auto_class, path, tokenizer):
    """The transformer at `path`, folder or hub name, in float32, with a row for every token."""
    stored = load_or_fail(transformers.AutoConfig.from_pretrained, path).dtype
    if stored not in (None, torch.float32):
        print0(f"{path}: {stored}; it learns, and is saved, in float32: small updates would vanish")
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, report = load_or_fail(auto_class.from_pretrained, path, **options)
    for missing in sorted(report["missing_keys"]):
        fail(f"{path} holds no {auto_class.__name__.removeprefix('AutoModelFor')}: no {missing}")
    count = max(tokenizer.get_vocab().values()) + 1
    if count > model.get_input_embeddings().num_embeddings:  # a PAD that it has just been given
        model.resize_token_embeddings(count)
    return model.eval()


def load_causal_lm(path, length=0):
    """The causal LM at `path`, with room for `length` tokens, and its tokenizer.

    `unused_ids` must not be sampled: embeddings without a token, as Qwen has them, and a new PAD.
    """
    tokenizer = load_tokenizer(path)  # Appendix D
    model = load_model(transformers.AutoModelForCausalLM, path, tokenizer)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if length > window:
        fail(f"--max_prompt and --max_response add up to {length}; {path} has {window} positions")
    tokens = set(tokenizer.get_vocab().values())
    if tokenizer.pad_token == OWN_PAD:
        tokens.discard(tokenizer.pad_token_id)
    count = model.get_input_embeddings().num_embeddings
    model.unused_ids = [i for i in range(count) if i not in tokens]
    model.config.pad_token_id = tokenizer.pad_token_id
    # `model.generate` shall stop where we do, and no repetition penalty shall make it write others.
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.ends, **special)
    return model, tokenizer


def start_model(cfg, rows):
    """What SFT starts from: --model, or a small Llama with a vocabulary made from `rows`."""
    if cfg.model:
        return load_causal_lm(cfg.model, cfg.max_prompt + cfg.max_response)
    torch.manual_seed(cfg.seed)
    tokenizer = small_tokenizer(cfg.task, [row["prompt"] + row["response"] for row in rows])
    toy = cfg.task.startswith("toy")
    hidden, layers, heads = (64, 2, 2) if toy else (128, 4, 4)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(1024, cfg.max_prompt + cfg.max_response),
        initializer_range=0.1 if toy else 0.02,  # or the toy's learns to copy too late
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.unused_ids = []
    return model, tokenizer


def small_tokenizer(task, texts):
    """A tokenizer learned from `texts`: whole words for the toy, else 2,048 pieces of bytes."""
    options = {"special_tokens": ["<pad>", "<eos>", "<unk>"], "show_progress": False}
    if task == "toy":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        words = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)  # "▁in", "▁oslo", "."
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
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.ends = [tokenizer.eos_token_id]
    return tokenizer


def prepare(model, cfg, device):
    """Put a model where it will be used, as --precision, --shard and the like say."""
    if not cfg.shard:
        model.to(device)
    broadcast_parameters(model)  # all ranks start equal
    trunk = getattr(model, "trunk", model)  # a reward model's transformer, without its head
    frozen = not next(model.parameters()).requires_grad  # PPO's reference and reward model
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and able)
    if model.bf16 and frozen:
        trunk.to(torch.bfloat16)  # it never learns, so half the memory will do
    if cfg.gradient_checkpointing and not frozen:
        recompute_activations(trunk)
    if cfg.shard:
        shard_model(model, device)
    if cfg.compile:
        model.compile(dynamic=True)
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):  # glibc
        # Keep freed memory for the next tensors: the system would clear it anew, page by page, for
        # up to a sixth of an update.
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large tensors live in the heap, too


def autocast(model, cache=False):
    """Within this context a model that is set up for bf16 multiplies its matrices in bf16.

    Weights that learn stay in fp32: bf16's three digits would lose an update of one part in a
    thousand. cache: keep copies in bf16 for many calls, 2 bytes a parameter.
    """
    bf16 = getattr(model, "bf16", False)
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=cache)


def recompute_activations(trunk):
    """Keep only the inputs of each layer, and compute the rest again in the backward pass."""
    trunk.activation_checkpointing_enable()
    for layer in trunk.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # or nothing is recomputed; what is inside stays in eval mode
            for name in vars(layer):  # numbers that are its own, no modules
                if "dropout" in name:
                    setattr(layer, name, 0.0)


def shard_model(model, device):
    """Split a model's parameters, gradients and Adam's state among the ranks (PyTorch's FSDP2).

    Layers are put together when they are needed, so all ranks must call the model equally often.
    Gradients are summed, not averaged: our losses are parts of a sum.
    """
    mesh = init_device_mesh(device.type, (world(),))
    trunk = getattr(model, "trunk", model)
    modules = [layer for layer in trunk.modules() if isinstance(layer, GradientCheckpointingLayer)]
    in_bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in dict.fromkeys([*modules, trunk, model]):
        head = module is model and trunk is not model  # a reward model's head stays in fp32
        policy = in_bf16 if model.bf16 and not head else MixedPrecisionPolicy()
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it adds up


# Appendix D. How text becomes tokens.
#
# Every family of models begins prompts, ends responses and marks turns in its own way. So nothing
# is put together by hand: prompt and answer go through the tokenizer, or its chat template, as one.
# What the answer adds is the response.

import re
from contextlib import suppress
from itertools import groupby

from jinja2 import TemplateError

OWN_PAD = "<|pad|>"
BAD_TURNS = (TemplateError, TypeError, ValueError)  # what templates raise that want other turns


def load_tokenizer(path):
    """The tokenizer at `path`, with a PAD of its own, and `ends`: ids that end a response."""
    tokenizer = load_or_fail(transformers.AutoTokenizer.from_pretrained, path)
    ends = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError):  # there is no such file
            known = transformers.GenerationConfig.from_pretrained(path, name).eos_token_id
            ends += known if isinstance(known, list) else [known]
            break
    # The template's own, such as <|im_end|>, is the first special token behind an answer.
    text = rendered([turn("user", "QUESTION"), turn("assistant", "ANSWER")], tokenizer)
    behind = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False).input_ids
    special = tokenizer.added_tokens_decoder
    ends += [i for i in behind if i in special and special[i].content.strip()][:1]
    tokenizer.ends = [i for i in dict.fromkeys(ends) if i is not None and i < len(tokenizer)]
    if not tokenizer.ends:
        fail(f"the tokenizer of {path} has no EOS token: a response could never end")
    if tokenizer.pad_token_id in (None, *tokenizer.ends):
        tokenizer.add_special_tokens({"pad_token": OWN_PAD})
        print0(f"{path}: gets a PAD of its own, {OWN_PAD}: its end mark must not be hidden")
    return tokenizer


def rendered(turns, tokenizer):
    """Turns in the tokenizer's chat template, as text; "" where it has none, or refuses them."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except BAD_TURNS:
        return ""


def encode(rows, tokenizer, cfg, names=("prompt", "response")):
    """Texts -> token lists: rows {name: text} -> rows {name: ids}; names: the prompt's, answers'.

    A prompt longer than max_prompt loses its beginning (less its BOS), but none in a chat template;
    a response (with its end) longer than max_response loses its end.
    """
    prompts = token_lists(rows, "", tokenizer, cfg)
    encoded = []
    for row, ids in zip(rows, prompts, strict=True):
        too_many = max(0, len(ids) - cfg.max_prompt)
        if too_many and not in_template(row, tokenizer, cfg):
            begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            ids = begin + ids[too_many + len(begin) :]
        encoded.append({"prompt": ids})
    for name in names[1:]:
        wholes = token_lists(rows, name, tokenizer, cfg)
        for i, row in enumerate(rows):
            response = response_of(prompts[i], wholes[i], row[name], tokenizer)
            encoded[i][name] = response[: cfg.max_response]
    return encoded


def token_lists(rows, name, tokenizer, cfg):
    """The prompts of rows and, with the `name` of an answer's field, that answer behind them."""
    texts = [row["prompt"] + row.get(name, "") for row in rows]
    # split_special_tokens: a "</s>" that is spelled out is text, and ends nothing.
    lists = tokenizer(texts, split_special_tokens=True).input_ids if rows else []
    for i, row in enumerate(rows):
        if in_template(row, tokenizer, cfg):
            lists[i] = chat_tokens(row, row.get(name), tokenizer)
        elif lists[i][-1:] == [tokenizer.eos_token_id]:  # some tokenizers put one behind any text
            lists[i].pop()
    return lists


def response_of(prompt, whole, text, tokenizer):
    """What an answer has added to the tokens of its prompt, with one end mark, at the end."""
    added = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt:  # a token spans the seam
        added = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    ends = [place for place, token in enumerate(added) if token in tokenizer.ends]
    return added[: ends[0] + 1] if ends else [*added, tokenizer.ends[0]]


def in_template(row, tokenizer, cfg):
    """Whether a row's prompt is put into the tokenizer's chat template."""
    return bool(tokenizer.chat_template) and (cfg.chat_template or "messages" in row)


def chat_tokens(row, answer, tokenizer):
    """A row's prompt, and its answer if there is one, in the tokenizer's chat template."""
    turns = row.get("messages") or dialogue(row["prompt"])
    options = {"add_generation_prompt": not answer, "return_dict": False}
    options["sanitize_control_tokens"] = True  # an "<|im_end|>" that is spelled out is text
    if answer:  # the one space that separates it from the words "Assistant:" has no place here
        turns = [*turns, turn("assistant", re.sub(r"^\s(?=\S)", "", answer))]
    probe = rendered([turn("system", "SYSTEM"), turn("user", "QUESTION")], tokenizer)
    system = "system" if "SYSTEM" in probe else "user"  # whose turn holds a system text
    merged = []  # neighbours of one role: templates want roles to alternate
    for role, same in groupby(turns, lambda t: t["role"].replace("system", system)):
        merged.append(turn(role, "\n\n".join(t["content"] for t in same)))
    try:
        return tokenizer.apply_chat_template(merged, **options)
    except BAD_TURNS as error:
        reason = str(error).split("\n")[0]
        fail(f"the chat template refuses the prompt that begins {row['prompt'][:60]!r}: {reason}")


def turn(role, content):
    """One turn of a dialogue, as chat templates want it."""
    return {"role": role, "content": content}


def dialogue(prompt):
    """A prompt's text as turns: "[System: …] Human: … Assistant:" by its turns, others as one."""
    begins = r"^\s*(?=System:|Human:|Assistant:)|\n\n(?=Human:|Assistant:)|\s(?=Assistant:$)"
    before, *found = re.split(f"(?:{begins})(System|Human|Assistant):", prompt)
    if before.strip() or len(found) < 4 or found[-2:] != ["Assistant", ""]:
        return [turn("user", prompt)]
    roles = {speaker: role for role, speaker in SPEAKERS.items()}
    pairs = zip(found[:-2:2], found[1:-2:2], strict=True)
    return [turn(roles[speaker], text.strip()) for speaker, text in pairs]


def usable_rows(rows, tokenizer, cfg, names=("prompt", "response")):
    """The rows that can be used as tokens; how many cannot, and how many are cut, is said."""
    if cfg.chat_template and not tokenizer.chat_template:
        fail("--chat_template: the model's tokenizer has none; leave it out, or use a chat model")
    kept, cut = [], 0
    for row, ids in zip(rows, encode(rows, tokenizer, cfg, names), strict=True):
        fits = len(ids["prompt"]) <= cfg.max_prompt
        # The toy's judge is noisy, also about equals.
        differ = "chosen" not in ids or ids["chosen"] != ids["rejected"] or cfg.task == "toy"
        if fits and differ:
            kept.append(row)
            cut += any(ids[name][-1] not in tokenizer.ends for name in names[1:])
    if left_out := len(rows) - len(kept):
        print0(f"{left_out:,} rows left out: a chat that is too long, or a pair equal once cut")
    if cut:
        print0(f"{cut:,} of {len(kept):,} rows: an answer is cut to --max_response")
    if not kept:
        fail("none of the rows can be used")
    return kept


# Appendix E. Rows.
#
# A row as people have it becomes texts: {prompt, response} to imitate, {prompt, chosen, rejected}
# to compare, {prompt, problem} to test. A chosen answer is imitated, too. Each --task has a reader,
# which shows its row. A malformed row ends the run; one of no use is left out, and counted.

import gzip
import hashlib
import random
from collections import Counter, namedtuple

SPLIT_SEED = 1234  # the paper's; fixed, so that stages run with different --seed never share rows
TEST_SHARE = 0.1
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
PLAIN = ("chosen", "rejected", "messages", "completion", "response")  # fields of answers
HUB = {  # plain files, or Parquet copies that the hub makes
    "tldr": "openai/summarize_from_feedback@refs/convert/parquet/comparisons/train/*.parquet",
    "hh": "Dahoas/full-hh-rlhf/data/train-*.parquet",
    "webgpt": "openai/webgpt_comparisons@refs/convert/parquet/*/train/*.parquet",
    "apps": "codeparrot/apps/train.jsonl",
}
NAN_TO_NULL = {"NaN": None}.get  # pandas writes NaN where a value is missing
sys.set_int_max_str_digits(0)  # APPS has integers of more digits than Python reads by default


def load_share(cfg, share, *fields):
    """The rows of a share ("test", "sft", "rm" or "ppo") that have all `fields`; at least one."""
    rows = split(load_rows(cfg.task, tuple(cfg.data)), share, tuple(cfg.split))
    rows = [row for row in rows if all(name in row for name in fields)]
    if not rows:
        wanted = " and ".join(fields) or "prompts"
        fail(f"the share {share!r} has no rows with {wanted}: see --split and --data")
    return rows


def split(rows, share, percent=(20, 40, 40)):
    """The rows of the share "test", "sft", "rm" or "ppo"; all about one prompt are in one share.

    A tenth of the prompts is held out as "test"; `percent` of the others are for SFT, RM and PPO. A
    hash of its text decides where a prompt goes: rows added later move no other. (The toys are
    shuffled.)
    """
    edges = [0, TEST_SHARE]
    for edge in (percent[0] / 100, (percent[0] + percent[1]) / 100, 1):
        edges.append(TEST_SHARE + (1 - TEST_SHARE) * edge)
    place = ("test", "sft", "rm", "ppo").index(share)
    begin, end = edges[place : place + 2]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    if rows and "number" in rows[0]:
        random.Random(SPLIT_SEED).shuffle(prompts)
        wanted = set(prompts[round(begin * len(prompts)) : round(end * len(prompts))])
    else:
        wanted = {prompt for prompt in prompts if begin <= hash_of(prompt) < end}
    return [row for row in rows if row["prompt"] in wanted]


def hash_of(text):
    """A number from 0 to 1 that depends on a text alone."""
    digest = hashlib.sha256(f"{SPLIT_SEED} {text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@cache
def load_rows(task, files=()):
    """A task's rows, as texts {prompt, response, ...}: from `files`, or else from the hub."""
    if task == "toy":
        return [toy_row(i) for i in range(TOY_ROWS)]
    if task == "toy-code":
        return [code_row(i) for i in range(CODE_ROWS)]
    reader = globals()[f"{task}_row"]  # below
    rows, left_out = [], Counter()
    for path in files or ["hf://datasets/" + HUB[task]]:
        place = f"--data {path}"
        try:
            for number, raw in enumerate(read_file(path), 1):
                place = f"{path}, row {number}"
                if isinstance(raw, str):  # a line
                    raw = json.loads(raw, parse_constant=NAN_TO_NULL)
                row = reader(raw)
                if isinstance(row, dict):
                    rows.append(row | {"raw": raw})  # a --reward may want its other fields
                else:
                    left_out[row] += 1
        except Exception as error:  # no such file, no network, no JSON, a field that is missing ...
            reason = str(error).strip().split("\n")[0]
            fail(f"{place}: {reason}")
    print0(f"{task}: {len(rows):,} rows")
    unread = {name for row in rows for name in row["raw"]} - {*PLAIN, "prompt"}
    if task == "plain" and unread:
        print0(f"plain: fields that only a --reward reads: {', '.join(sorted(unread))}")
    for reason, count in sorted(left_out.items()):
        print0(f"{task}: {count:,} rows left out: {reason}")
    return rows


def read_file(path):
    """Yield the rows of a file, as read or as JSON texts; Parquet and the hub by `datasets`."""
    if path.startswith("hf://") or path.endswith(".parquet"):
        import datasets  # takes a second, and the toys do not need it

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(50)  # the error says it, too
        kind = "parquet" if path.endswith(".parquet") else "json"
        yield from datasets.load_dataset(kind, data_files=path, split="train")
        return
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        yield from json.loads(text, parse_constant=NAN_TO_NULL)
    else:
        yield from filter(str.strip, text.split("\n"))


def get(row, path, kind=str):
    """The field at a dotted path, such as "info.post"; ValueError if it is not of this `kind`."""
    value = row
    for name in path.split("."):
        try:
            value = value[int(name) if isinstance(value, list) else name]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"field {path!r} is missing") from None
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {str: "text", list: "a list", dict: "an object"}.get(kind, "a number")
        raise ValueError(f"field {path!r} must be {wanted}, got {value!r:.60}")
    if kind is str:  # half an emoji, which JSON can spell, no tokenizer can read
        value = re.sub("[\ud800-\udfff]", "\ufffd", value)
    return value


def pair(prompt, chosen, rejected=None):
    """A row of natural language: one space in front of answers; the chosen one is imitated."""
    row = {"prompt": prompt.rstrip(), "response": " " + chosen.strip()}
    if rejected is not None:
        row |= {"chosen": row["response"], "rejected": " " + rejected.strip()}
    return useful(row)


def useful(row):
    """A row of texts as it is, or why nothing can be learned from it."""
    texts = [row[name] for name in ("prompt", "response", "chosen", "rejected") if name in row]
    if not all(map(str.strip, texts)):
        return "an empty text"
    return "a pair of equal texts" if row.get("chosen", 0) == row.get("rejected") else row


# A reader takes a row as it was read, and returns one of texts, or why it is of no use.
def tldr_row(raw):
    """TL;DR: {info: {post, subreddit}, summaries: [{text}, {text}], choice: 0 or 1}, preferences;
    or {post, subreddit, summary}, a demonstration."""
    info = get(raw, "info", dict) if "info" in raw else raw
    if not info.get("post", "?"):  # a news article
        return "no post"
    subreddit, post = get(info, "subreddit").strip(), get(info, "post").strip()
    prompt = f"POST Subreddit: r/{subreddit} {post} TL;DR:"
    if "summaries" not in raw:
        return pair(prompt, get(raw, "summary"))
    choice = get(raw, "choice", int)
    summaries = [get(raw, f"summaries.{i}.text") for i in (choice, 1 - choice)]
    return pair(prompt, *summaries)


def hh_row(raw):
    """HH-RLHF: {chosen, rejected}, dialogues "\\n\\nHuman: …\\n\\nAssistant: …" that differ in the
    last turn; or {prompt, chosen, rejected}."""
    chosen, rejected = get(raw, "chosen"), get(raw, "rejected")
    if "prompt" in raw:
        return pair(get(raw, "prompt"), chosen, rejected)
    if "Assistant:" not in chosen:
        raise ValueError("field 'chosen' has no 'Assistant:', and there is no field 'prompt'")
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters are meant)
    prompt = "".join(shared.rpartition("\n\nAssistant:")[:2])  # an answer may say that itself
    chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or "\n\nHuman:" in chosen + rejected:
        return "two prompts, or a human's turn in an answer"
    return pair(prompt, chosen, rejected)


def webgpt_row(raw):
    """WebGPT: {question: {full_text}, answer_0, answer_1, score_0, score_1}; the higher score is
    preferred. Marks of quotations, [1] or [2, 3], go."""
    answers = [get(raw, f"answer_{i}") for i in (0, 1)]
    scores = [get(raw, f"score_{i}", (int, float)) for i in (0, 1)]
    answers = [re.sub(r"\s*\[\d+(,\s*\d+)*\]", "", answer) for answer in answers]
    prompt = f" Human: {get(raw, 'question.full_text').strip()} Assistant:"
    if scores[0] == scores[1]:
        return "equal scores"
    if scores[0] < scores[1]:
        answers.reverse()
    return pair(prompt, *answers)


def apps_row(raw):
    """APPS: {question, starter_code, solutions: [program, …], input_output: {fn_name, inputs,
    outputs}}, the last two perhaps as JSON texts; the first solution is imitated."""
    found = {}
    for name in ("input_output", "solutions"):
        value = raw.get(name) or None
        found[name] = json.loads(value) if isinstance(value, str) else value
    tests = found["input_output"] or {"inputs": [], "outputs": []}
    check_tests(tests)
    if not tests["inputs"]:
        return "no unit tests"
    style = "Call-Based" if tests.get("fn_name") else "Standard Input"
    starter = raw.get("starter_code") or ""
    question = get(raw, "question").strip()
    row = {
        "prompt": f"QUESTION:\n{question}\n{starter}\nUse {style} format\nANSWER:",
        "problem": {"input_output": tests, "difficulty": raw.get("difficulty")},
    }
    if found["solutions"]:
        row["response"] = "\n" + get(found, "solutions.0").strip()
    return row


def check_tests(tests):
    """ValueError unless unit tests are in APPS' form {fn_name, inputs, outputs}."""
    inputs, outputs = get(tests, "inputs", list), get(tests, "outputs", list)
    if tests.get("fn_name"):
        get(tests, "fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs are no unit tests")
    kind = list if tests.get("fn_name") else str  # arguments, or what is read and printed
    for x in inputs if kind is list else inputs + outputs:
        lines = isinstance(x, list) and all(isinstance(line, str) for line in x)
        if not isinstance(x, kind) and not lines:
            raise ValueError("unit tests must have lists of arguments, or texts to read and print")


def plain_row(raw):
    """Your own: {prompt, response} (or completion), {prompt, chosen, rejected}, or {prompt}; texts,
    which stay as they are, or lists of turns {role, content}. Or {messages: turns}. The last turn,
    if it is the assistant's, is the answer; the others go into the tokenizer's chat template."""
    raw = {name: value for name, value in raw.items() if value is not None}  # as Parquet has it
    is_pair = "chosen" in raw or "rejected" in raw
    row = {"messages": turns_of(raw, "prompt")} if isinstance(raw.get("prompt"), list) else {}
    for name in PLAIN[:2] if is_pair else PLAIN[2:]:
        to = name if is_pair else "response"
        if isinstance(raw.get(name), list):
            before = turns_of(raw, name)
            if before[-1]["role"] == "assistant":
                row[to] = before.pop()["content"]
            if before and row.setdefault("messages", before) != before:
                return "a pair about two prompts"
        elif is_pair or name in raw:
            row[to] = get(raw, name)
    if "messages" not in row:
        row["prompt"] = get(raw, "prompt")
    else:  # for tokenizers without a template
        texts = [f"\n\n{SPEAKERS[turn['role']]}: {turn['content']}" for turn in row["messages"]]
        row["prompt"] = "".join(texts) + "\n\nAssistant:"
        for name in row.keys() & {"response", "chosen", "rejected"}:
            row[name] = row[name] if row[name][:1].isspace() else " " + row[name]
    return useful(row | {"response": row["chosen"]} if "chosen" in row else row)


def turns_of(raw, name):
    """The turns [{role, content}, ...] in a field."""
    turns = []
    for i in range(len(raw[name])):
        role = get(raw, f"{name}.{i}.role")
        if role not in SPEAKERS:
            raise ValueError(f"field '{name}.{i}.role' must be one of {', '.join(SPEAKERS)}")
        turns.append(turn(role, get(raw, f"{name}.{i}.content")))
    return turns or [turn("user", "")]  # an empty prompt, of no use


# Appendix F. The toy.
#
# Real data takes hours and never tells what a good answer is. The toy is a miniature of TL;DR
# that takes minutes and knows the truth. A post states twelve facts about a trip, in random order
# and wording; a summary should state each of them once. Demonstrations state some of them, one in
# twelve wrongly, with fillers and repetitions. Chapter 2 has the toy's true quality, `gold_score`.

TOY_ROWS = 30_000  # posts
TOY_LONGEST = 14  # sentences of a summary, so that it fits into max_response

# One kind of fact: its six values, the wording of summaries, two wordings of posts.
Fact = namedtuple("Fact", "values summary posts")
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

    facts: {slot: value}; wrong: how often a value is drawn at random, and so wrong 5 times in 6;
    fillers: how many; repeats: at most so many. Never above TOY_LONGEST sentences.
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

# One step of a program: its words and its line, with {} for a number k; what it makes of a list x
# and k; and the step that a wrong demonstration has in its place.
Step = namedtuple("Step", "words line compute mistaken_for")
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
    return "\n    ".join(["def f(x):", *(CODE[name].line.format(k) for name, k in steps)])


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
        lines = code_text(steps).split("\n")
        if kind == "return":
            return code_text(steps).replace("return ", "")
        if kind == "list":  # step i reads a list y that does not exist: the last x of its line
            lines[i + 1] = re.sub("x(?!.*x)", "y", lines[i + 1])
            return "\n".join(lines)
        if kind == "bracket":  # the line of step i lacks its last character
            lines[i + 1] = lines[i + 1][:-1]
            return "\n".join(lines)
        wrong = wrong_steps(kind, steps, i)
        if any(code_output(wrong, x) != code_output(steps, x) for x in inputs):
            return code_text(wrong)


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
    main()
