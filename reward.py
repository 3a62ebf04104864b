"""Chapter 2: the reward model (RM), learned from pairs of which people preferred one.

The RM is the SFT model with its next-token head replaced by a scalar one: r(x, y) is read at the last real
token of prompt x and response y. With y+ preferred over y-, Bradley and Terry's model says P(y+ beats y-) =
sigmoid(r+ - r-), so

    loss = -log sigmoid(r(x, y+) - r(x, y-)), averaged over pairs

Only differences are learned. A bias therefore shifts the scores afterwards so that demonstrations score 0 on
average: "better than the human answer" becomes "above zero", and runs can be compared (SPEC 1.2).

    python reward.py                                         # toy; needs the model that sft.py wrote
    python reward.py --sft runs/toy/sft --out runs/toy/reward300 --steps 300
    python reward.py --task hh --data pairs.jsonl.gz
    torchrun --nproc_per_node=2 reward.py
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

import sft
from sft import opt, print0

PAIR = ("prompt", "chosen", "rejected")
HEAD = "scalar_head.safetensors"


@dataclass
class Config(sft.Config):
    """Settings of the reward-model chapter."""

    model: str = opt("", "only recorded: what the SFT model was made from")
    sft: str = opt("", "SFT model whose trunk the RM starts from; empty: runs/TASK/sft")
    steps: int = opt(600, "number of updates")
    batch_size: int = opt(32, "preference pairs per update, over all ranks")
    micro_batch_size: int = opt(32, "pairs, so twice as many sequences, per forward pass and rank")
    lr: float = opt(1.5e-3, "peak learning rate; cosine schedule with 10 % warm-up")


class ScalarModel(nn.Module):
    """A transformer trunk with one number per position: the RM, and later the critic."""

    def __init__(self, trunk):
        super().__init__()
        width = trunk.config.hidden_size
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))  # SPEC 8
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        """A number at every position.  batch: `sft.Batch` -> [B, P+T]"""
        hidden = self.trunk(
            input_ids=batch.tokens,
            attention_mask=batch.attention,
            position_ids=sft.positions(batch.attention),
            use_cache=False,
        ).last_hidden_state  # [B, P+T, hidden]
        return self.head(hidden).squeeze(-1).float()  # [B, P+T]

    def save_pretrained(self, folder):
        """Write the trunk in Hugging Face format and the head beside it."""
        self.trunk.save_pretrained(folder)
        save_file(self.head.state_dict(), Path(folder) / HEAD)

    @classmethod
    def load(cls, folder, device="cpu"):
        """The model that `save_pretrained` wrote; a causal LM's folder gives its trunk and a fresh head."""
        model = cls(sft.load_or_fail(AutoModel.from_pretrained, folder, dtype=torch.float32).eval())
        head = Path(folder) / HEAD
        if head.exists():
            model.head.load_state_dict(load_file(head))
        return model.to(device)


def last_token_scores(model, batch):
    """The RM's score r(x, y), read at the last real token: the EOS where there is one.  -> [B]

    Not at the last column: on padded rows that is PAD, which the RM never learned to read (SPEC 6.8, 8).
    """
    place = torch.arange(batch.attention.shape[1], device=batch.attention.device)  # [P+T]
    last = (batch.attention * place).argmax(1, keepdim=True)  # [B, 1]
    return model(batch).gather(1, last).squeeze(1)  # [B]


def preference_loss(chosen, rejected, pair_count):
    """Bradley-Terry loss, summed over pairs and divided by `pair_count`, that of all ranks.  [B] -> scalar"""
    return -F.logsigmoid(chosen - rejected).sum() / pair_count


def main(argv=None):
    """Train the reward model, measure it on held-out pairs, set its bias, save it."""
    cfg = sft.parse(Config, "reward", argv)
    cfg.sft = cfg.sft or str(Path("runs") / cfg.task / "sft")
    device = sft.setup(cfg.device)
    train, test = load_pairs(cfg, "rm"), load_pairs(cfg, "test")
    out = sft.make_folder(cfg.out)

    model, tokenizer = start_model(cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), **sft.ADAM)
    print0(f"RM: {len(train):,} preference pairs, batches of {cfg.batch_size} -> {out}")

    examples = sft.encode(train, tokenizer, cfg, PAIR)
    metrics = sft.Metrics(out, cfg.steps, "reward")
    for step in range(cfg.steps):
        began = time.perf_counter()
        pairs = sft.shard(sft.batch_rows(examples, step, cfg.batch_size, cfg.seed))
        losses = micro_losses(model, pairs, tokenizer, cfg, device)
        loss = sft.update(model, optimizer, losses, sft.cosine_lr(step, cfg.steps, cfg.lr))
        metrics.log({"step": step, "loss": loss, "seconds": time.perf_counter() - began}, show="loss")
    metrics.bar.close()

    result = evaluate(model, test, tokenizer, cfg, device)
    result["bias"] = center(
        model, sft.split(sft.load_rows(cfg.task, tuple(cfg.data)), "rm")[:512], tokenizer, cfg, device
    )
    report(result)
    sft.save_run([model, tokenizer], out, cfg, result)


def load_pairs(cfg, share):
    """The preference pairs of one share of the task's rows: {prompt, chosen, rejected} of text."""
    rows = sft.split(sft.load_rows(cfg.task, tuple(cfg.data)), share)
    return [toy_pair(row) for row in rows] if cfg.task == "toy" else rows


def start_model(cfg, device):
    """The SFT trunk under a fresh scalar head, the same on every rank, and the SFT tokenizer."""
    torch.manual_seed(cfg.seed)
    if not Path(cfg.sft).is_dir():
        sft.fail(
            f"--sft {cfg.sft}: no such folder; make one with python sft.py --task {cfg.task} --out {cfg.sft}"
        )
    model = ScalarModel.load(cfg.sft, device)
    sft.broadcast_parameters(model)
    return model, load_tokenizer(cfg.sft)


def load_tokenizer(folder):
    """The tokenizer that sft.py saved with the model, which has a PAD token that is not EOS."""
    tokenizer = sft.load_or_fail(AutoTokenizer.from_pretrained, folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        sft.fail(f"{folder}: the tokenizer has no PAD token of its own; make the folder with sft.py")
    return tokenizer


def micro_losses(model, pairs, tokenizer, cfg, device):
    """Yield one loss per micro-batch of pairs, both responses of a pair in one forward pass."""
    for part in sft.micro_slices(len(pairs), cfg.micro_batch_size):
        scores = pair_scores(model, pairs[part], tokenizer, device)  # [2, pairs]
        yield preference_loss(scores[0], scores[1], cfg.batch_size)


def pair_scores(model, pairs, tokenizer, device):
    """RM scores of encoded pairs: chosen in row 0, rejected in row 1.  -> [2, number of pairs]"""
    prompts = [pair["prompt"] for pair in pairs] * 2
    responses = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
    return last_token_scores(model, batch).view(2, len(pairs))  # [2, pairs]


def gather(objects):
    """Every rank's list, concatenated in rank order: after `sft.shard`, the global order."""
    if sft.world() == 1:
        return list(objects)
    parts = [None] * sft.world()
    dist.all_gather_object(parts, list(objects))
    return [x for part in parts for x in part]


@torch.no_grad()
def evaluate(model, rows, tokenizer, cfg, device):
    """Accuracy on held-out pairs: the share in which the preferred response scores higher.

    Where the task has a gold score, also against noiseless labels: the truly better response counts as
    preferred, and pairs of equal gold score are left out.
    """
    pairs = sft.encode(rows, tokenizer, cfg, PAIR)
    mine = range(sft.rank(), len(pairs), sft.world())
    margins = []
    for part in sft.micro_slices(len(mine), cfg.micro_batch_size):
        scores = pair_scores(model, [pairs[i] for i in mine[part]], tokenizer, device)  # [2, pairs]
        margins += zip(mine[part], (scores[0] - scores[1]).tolist(), strict=True)
    margins = [margin for _, margin in sorted(gather(margins))]
    result = {"pairs": len(rows), "accuracy": sum(m > 0 for m in margins) / len(rows)}
    if cfg.task == "toy":
        gold = [gold_score(r["prompt"], r["chosen"]) - gold_score(r["prompt"], r["rejected"]) for r in rows]
        decided = [(m, g) for m, g in zip(margins, gold, strict=True) if g != 0]
        result["accuracy_noiseless"] = sum(m * g > 0 for m, g in decided) / len(decided)
        result["pairs_noiseless"] = len(decided)
    return result


@torch.no_grad()
def center(model, rows, tokenizer, cfg, device):
    """Shift the head's bias so that the demonstrations in `rows` score 0 on average; returns the new bias."""
    examples = sft.encode(rows, tokenizer, cfg)[sft.rank() :: sft.world()]
    total = 0.0
    for part in sft.micro_slices(len(examples), cfg.micro_batch_size):
        prompts, responses = [e["prompt"] for e in examples[part]], [e["response"] for e in examples[part]]
        batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, device)
        total += float(last_token_scores(model, batch).sum())
    model.head.bias -= float(sft.all_sum(total)) / len(rows)
    return float(model.head.bias)


def interval(share, count):
    """Wilson's 95 % interval of a share measured on `count` cases -> (low, high)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def report(result):
    """Print the accuracies with their 95 % intervals."""
    for name, count in (("accuracy", "pairs"), ("accuracy_noiseless", "pairs_noiseless")):
        if name in result:
            low, high = interval(result[name], result[count])
            labels = "noiseless labels" if "noiseless" in name else "the labels as given"
            score = f"{result[name]:.3f} (95 % interval {low:.3f} to {high:.3f})"
            print0(f"RM: accuracy {score} on {result[count]} held-out pairs, {labels}")


# Appendix
# The toy's preferences: two summaries of one post, and which of them a noisy judge of true quality prefers.

# What a sentence of a summary is worth. Coverage weighs more than correctness: comparing a value with the
# post's takes a deeper model than the toy's, and what the RM cannot see it cannot teach.
TOY_GOLD = {"true": 1.0, "wrong": -0.25, "repeated": -0.25, "filler": -1.0, "broken": -1.0}


def gold_score(prompt, response):
    """True quality of a toy summary: each sentence's worth from TOY_GOLD, summed.

    A sentence is `broken` if it is none of the toy's sentences or lacks its full stop, and `repeated` if its
    fact has been stated before, rightly or wrongly.

    >>> facts = "it got foggy as soon as we arrived. last july i had some free days."
    >>> post = f"POST Subreddit: r/travel {facts} TL;DR:"
    >>> gold_score(post, " the weather was mostly foggy for us. it was the middle of may back then.")
    0.75
    >>> gold_score(post, " the weather was mostly foggy for us. the weather was mostly foggy for us. it")
    -0.25
    """
    post = prompt.removeprefix("POST Subreddit: r/travel").removesuffix("TL;DR:")
    truth = dict(sft.toy_sentences().get(sentence.strip(), (None, None)) for sentence in post.split("."))
    *sentences, rest = response.split(".")
    score, stated = (TOY_GOLD["broken"] if rest.strip() else 0.0), set()
    for sentence in sentences:
        slot, value = sft.toy_sentences().get(sentence.strip(), ("broken", None))
        if slot in ("broken", None):
            kind = slot or "filler"
        elif slot in stated:
            kind = "repeated"
        else:
            kind = "true" if truth.get(slot) == value else "wrong"
        score += TOY_GOLD[kind]
        stated.add(slot)
    return score


def toy_edit(rng, sentences):
    """A copy of a summary, one sentence dropped, replaced by another or a filler, broken or falsified."""
    edited, place = list(sentences), rng.randrange(len(sentences))
    kind = rng.choices(("drop", "repeat", "filler", "break", "falsify"), weights=(4, 4, 4, 2, 1))[0]
    slot, value = sft.toy_sentences().get(edited[place], (None, None))
    if kind == "repeat" and len(edited) > 1:
        edited[place] = rng.choice(edited[:place] + edited[place + 1 :])
    elif kind == "filler":
        edited[place] = rng.choice(sft.TOY_FILLERS)
    elif kind == "break":
        words = edited[place].split()
        edited[place] = " ".join(words[: rng.randint(1, max(1, len(words) - 1))])
    elif kind == "falsify" and slot:
        values, wording, *_ = sft.TOY_FACTS[slot]
        edited[place] = wording.format(rng.choice([v for v in values.split() if v != value]))
    elif len(edited) > 1:
        del edited[place]
    return edited


def toy_pair(row):
    """The preference pair about a toy post: {prompt, chosen, rejected}.

    Half the pairs are two independent summaries, half differ by one or two edits; the better one is chosen
    with Bradley-Terry probability sigmoid(3 x margin).
    """
    rng = random.Random(f"{sft.SPLIT_SEED} pair {row['number']}")
    facts = dict(
        map(sft.toy_sentences().get, map(str.strip, row["prompt"].split(" r/travel ")[1].split(".")[:-1]))
    )
    first = _any_summary(rng, facts)
    second = _any_summary(rng, facts) if rng.random() < 0.5 else toy_edit(rng, first)
    if rng.random() < 0.25:
        second = toy_edit(rng, second)
    first, second = sft.toy_text(first), sft.toy_text(second)
    margin = gold_score(row["prompt"], first) - gold_score(row["prompt"], second)
    if rng.random() >= 1 / (1 + math.exp(-3 * margin)):
        first, second = second, first
    return {"prompt": row["prompt"], "chosen": first, "rejected": second}


def _any_summary(rng, facts):
    """A summary of any quality, which may repeat itself until it is full.

    Length must not betray coverage: or else the RM learns that longer is better, and the policy to repeat.
    """
    share, wrong = rng.uniform(0.1, 1.0), rng.uniform(0.0, 0.2)
    return sft.toy_summary(rng, facts, share, wrong, rng.randint(0, 4), sft.TOY_LONGEST)


if __name__ == "__main__":
    main()
