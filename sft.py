"""Chapter 1: supervised fine-tuning (SFT), and everything the later chapters stand on.

A language model is taught what answers look like, by imitating demonstrations a_1 ... a_T for prompts x:

    loss = - sum_t log pi(a_t | x, a_<t) / (number of response tokens in the batch)

over response tokens only: the prompt and the padding are read, never learned (SPEC 6, fault 10).

    python sft.py                                   # the embedded toy task, about a minute on two cores
    python sft.py --task hh --data pairs.jsonl.gz   # human preference pairs: imitate the chosen answers
    torchrun --nproc_per_node=2 sft.py              # the same run on two processes

Later chapters import from here: the batch, data parallelism by hand, the update step, the run folder.
"""

import gzip
import json
import math
import os
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
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

    task: str = opt("toy", "toy (embedded) or hh (preference pairs from --data; smaller defaults)")
    data: list[str] = opt([], "files of rows, .jsonl or .jsonl.gz, for tasks other than toy")
    model: str = opt("", "Hugging Face causal LM to start from; empty: a small Llama from scratch")
    out: str = opt("", "folder to write to; empty: runs/TASK/sft, runs/TASK/reward, or runs/TASK (PPO)")
    seed: int = opt(0, "of initialisation, data order and sampling; never of the split of the data")
    steps: int = opt(350, "number of updates")
    batch_size: int = opt(32, "sequences per update, over all ranks")
    micro_batch_size: int = opt(32, "sequences per forward pass and rank; changes memory, not the result")
    lr: float = opt(4e-3, "peak learning rate; cosine schedule with 10 % warm-up")
    device: str = opt("", "cpu, cuda, ...; empty: cuda where there is one")
    max_prompt: int = opt(512, "tokens; longer prompts lose their beginning")
    max_response: int = opt(128, "tokens, EOS included; longer responses lose their end")


ADAM = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.0}  # eps: SPEC 8
# What a task changes in these defaults; a flag overrides both. hh: sized for minutes on two cores.
SHORT = {"max_prompt": 192, "max_response": 96}
DEFAULTS = {
    "toy": {},
    "hh": {
        "sft": SHORT | {"steps": 250, "batch_size": 16, "lr": 1e-3},
        "reward": SHORT | {"steps": 100, "batch_size": 16, "lr": 2e-4},
        "ma_ppo": SHORT | {"steps": 40, "batch_size": 32, "lr": 2e-4, "critic_lr": 2e-4},
    },
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


def setup(device=""):
    """Join the process group if torchrun started us; returns the torch.device of this rank."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
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
    buckets = gradient_buckets(model) if world() > 1 else []
    for i, micro_loss in enumerate(micro_losses, 1):
        loss = micro_loss()
        with summed_over_ranks(buckets if i == len(micro_losses) else []):
            loss.backward()
        total += loss.detach().double().cpu()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    total = float(all_sum(total))
    if not (math.isfinite(total) and math.isfinite(norm)):  # the same on all ranks, so all of them skip
        return math.nan
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return total


def cosine_lr(step, steps, peak, warmup=0.1):
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


class Metrics:
    """`metrics.jsonl` of one run, a line per step, and the progress bar that shows the same numbers."""

    def __init__(self, folder, steps, name):
        self.path = Path(folder) / "metrics.jsonl"
        self.bar = tqdm(total=steps, desc=name, disable=rank() != 0, mininterval=1.0, dynamic_ncols=True)
        if rank() == 0:
            self.path.write_text("")

    def log(self, row, show):
        """Append `row` and show its key `show` in the bar."""
        self.bar.set_postfix({show: f"{row[show]:.3f}"}, refresh=False)
        self.bar.update()
        if rank() == 0:
            with self.path.open("a") as file:
                file.write(json_line(row))


def json_line(row):
    """A row as a line of JSON, in which null stands for what is not finite: JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None)) + "\n"


def main(argv=None):
    """Fine-tune a model on demonstrations and save it, with `run.json` and `metrics.jsonl`."""
    cfg = parse(Config, "sft", argv)
    device = setup(cfg.device)
    rows = load_rows(cfg.task, tuple(cfg.data))
    train, test = split(rows, "sft"), split(rows, "test")
    out = make_folder(cfg.out)
    model, tokenizer = start_model(cfg, rows)
    model.to(device)
    broadcast_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    print0(f"SFT: {len(train):,} demonstrations, {model.num_parameters():,} parameters -> {out}")
    train, test = encode(train, tokenizer, cfg), encode(test, tokenizer, cfg)
    metrics = Metrics(out, cfg.steps, "sft")
    for step in range(cfg.steps):
        began = time.perf_counter()
        examples = shard(batch_rows(train, step, cfg.batch_size, cfg.seed))
        token_count = float(all_sum(sum(len(e["response"]) for e in examples)))
        losses = micro_losses(model, examples, tokenizer, token_count, cfg.micro_batch_size, device)
        loss = update(model, optimizer, losses, cosine_lr(step, cfg.steps, cfg.lr))
        metrics.log({"step": step, "loss": loss, "seconds": time.perf_counter() - began}, show="loss")
    metrics.bar.close()

    loss = held_out_loss(model, test[:256], tokenizer, cfg, device)
    print0(f"SFT: cross-entropy {loss:.3f} nats a token on {len(test[:256])} held-out demonstrations")
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
    for part in parts if rank() == 0 else []:
        part.save_pretrained(out)
    if cfg and rank() == 0:
        run = {"config": asdict(cfg), "result": result}
        (Path(out) / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    if world() > 1:
        dist.barrier()  # no rank may read the folder before it is complete


# Appendix: settings and errors, models and tokenizers, tasks, the toy


def fail(message):
    """End the program with one line for the person at the keyboard and exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse(config_class, chapter, argv=None):
    """Read a chapter's `Config` from the command line: dataclass default < the task's default < flag."""
    title = sys.modules[config_class.__module__].__doc__.split("\n")[0]
    parser = HfArgumentParser(config_class, description=title)
    parser.error = fail
    argv = sys.argv[1:] if argv is None else argv
    task = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0].task
    if task not in DEFAULTS:
        fail(f"unknown task {task!r}: choose from {', '.join(DEFAULTS)}")
    parser.set_defaults(**DEFAULTS[task].get(chapter, {}))
    cfg = config_class(**vars(parser.parse_args(argv)))
    cfg.out = cfg.out or str(Path("runs") / cfg.task / ("" if chapter == "ma_ppo" else chapter))
    check(cfg)
    return cfg


def check(cfg):
    """Refuse settings that cannot work, before anything is computed."""
    for name in ("steps", "batch_size", "micro_batch_size", "lr", "max_prompt", "max_response"):
        if not 0 < getattr(cfg, name) < math.inf:
            fail(f"--{name} must be positive, got {getattr(cfg, name)}")
    if cfg.batch_size % (ranks := int(os.environ.get("WORLD_SIZE", 1))):
        fail(f"--batch_size {cfg.batch_size} is not divisible by the number of ranks, {ranks}")
    if (cfg.task == "toy") == bool(cfg.data):
        fail("--data FILE needs --task hh" if cfg.data else f"--task {cfg.task} needs --data FILE")
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


def start_model(cfg, rows):
    """What SFT starts from: --model, or a small Llama from scratch with a vocabulary made for the task."""
    if cfg.model:
        return load_causal_lm(cfg.model, cfg.max_prompt + cfg.max_response)
    torch.manual_seed(cfg.seed)
    tokenizer = small_tokenizer(cfg.task, [row["prompt"] + row["response"] for row in split(rows, "sft")])
    hidden, layers, heads = (64, 2, 2) if cfg.task == "toy" else (128, 4, 4)
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    size |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    size["max_position_embeddings"] = max(1024, cfg.max_prompt + cfg.max_response)
    # With the usual 0.02 the toy's model does not learn to copy from the post in so few steps.
    size["initializer_range"] = 0.1 if cfg.task == "toy" else 0.02
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

    A prompt longer than max_prompt loses its beginning; a response (with its EOS) longer than max_response
    its end.
    """
    bos, eos = tokenizer("").input_ids, tokenizer.eos_token_id  # [BOS] for models that want one, else []
    encoded = [{} for _ in rows]
    for name in names if rows else ():
        texts = [row[name] for row in rows]
        for row, ids in zip(encoded, tokenizer(texts, add_special_tokens=False).input_ids, strict=True):
            if name == "prompt":
                row[name] = bos + ids[max(0, len(ids) + len(bos) - cfg.max_prompt) :]
            else:
                row[name] = [*ids, eos][: cfg.max_response]
    return encoded


SPLIT_SEED = 1234  # the paper's; fixed, so that stages run with different --seed never share rows
SHARES = {"test": (0, 0.1), "sft": (0.1, 0.28), "rm": (0.28, 0.64), "ppo": (0.64, 1)}  # 20/40/40 % of 90 %


@cache
def load_rows(task, files):
    """A task's rows: {prompt, response}, hh also {chosen, rejected}; responses begin with their space."""
    if task == "toy":
        return [toy_row(i) for i in range(TOY_ROWS)]
    rows = [hh_row(row, place) for path in files for place, row in read_jsonl(path)]
    kept = [row for row in rows if row]
    print0(f"{task}: {len(kept):,} rows; {len(rows) - len(kept)} dropped: prompts differ, or no answer")
    if len({row["prompt"] for row in kept}) < 20:
        fail(f"{', '.join(files)}: fewer than 20 different prompts, too few to split")
    return kept


def read_jsonl(path):
    """Yield ("file:line", row) for every line of a .jsonl or .jsonl.gz file."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        fail(f"--data {path} cannot be read: {error}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{path}:{number}: not JSON ({error.msg})")
            if not isinstance(row, dict):
                fail(f"{path}:{number}: expected an object with named fields, got {type(row).__name__}")
            yield f"{path}:{number}", row


def hh_row(row, place):
    """A preference pair: {prompt, chosen, rejected}, or {chosen, rejected} whole dialogues (SPEC 9).

    A dialogue is cut at its last "Assistant:". Returns None if the prompts differ or an answer is empty.
    """
    for name in ("chosen", "rejected", *(["prompt"] if "prompt" in row else [])):
        if not isinstance(row.get(name), str) or not row[name].strip():
            fail(f"{place}: field {name!r} must be a non-empty text, got {row.get(name)!r}")
    prompt, chosen, rejected = row.get("prompt", "").rstrip(), row["chosen"], row["rejected"]
    if not prompt:
        before, found, chosen = chosen.rpartition("Assistant:")
        other, _, rejected = rejected.rpartition("Assistant:")
        if not found:
            fail(f"{place}: a dialogue without 'Assistant:' and no field 'prompt'")
        prompt = before + found if before == other else ""
    if not (prompt and chosen.strip() and rejected.strip()):
        return None
    chosen, rejected = " " + chosen.strip(), " " + rejected.strip()
    return {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected}


def split(rows, share):
    """The rows of the share "test", "sft", "rm" or "ppo"; all rows about one prompt are in the same share."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    random.Random(SPLIT_SEED).shuffle(prompts)
    begin, end = (round(edge * len(prompts)) for edge in SHARES[share])
    wanted = set(prompts[begin:end])
    return [row for row in rows if row["prompt"] in wanted]


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


if __name__ == "__main__":
    main()
