"""How fast a PPO step is: beside a step of TRL's, and beside bare matrix products.

    python results/bench.py trl toy 10m            # needs pip install "trl==1.8.*"
    python results/bench.py phases toy 10m 135m >> results/bench.jsonl

Same work on both sides: random Llamas of one shape, the toy's prompts, responses of 80 tokens none
of which ends early, one update, on a CPU. Numbers are medians over steps, without the first. TRL
runs in a process of its own, for ours keeps freed memory. Keep the machine idle.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ma_ppo
from ma_ppo import reward, sft

STEPS = 5  # that count; one more comes before them
SHAPE = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SHAPE += ["num_key_value_heads"]
SIZES = {  # shape, vocabulary (0: the toy's), batch
    "toy": ([64, 128, 2, 4, 4], 0, 64),
    "10m": ([320, 880, 8, 5, 5], 0, 64),
    "135m": ([576, 1536, 30, 9, 3], 49152, 8),  # SmolLM2-135M's
}


def start(size):
    """The settings of a run, a random policy, and the toy's tokenizer, with no token that ends."""
    shape, vocabulary, batch = SIZES[size]
    flags = f"--batch_size {batch} --max_response 80 --steps {STEPS + 1} --lr 1e-9 --critic_lr 1e-9"
    cfg = sft.parse(ma_ppo.Config, "ma_ppo", flags.split())
    tokenizer = sft.start_model(cfg, sft.load_share(cfg, "sft", "response"))[1]
    tokenizer.ends = [-1]
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        **dict(zip(SHAPE, shape, strict=True)),
    )
    policy = LlamaForCausalLM(config)
    policy.unused_ids = []
    return cfg, policy, tokenizer


def ours(size):
    """Run `ma_ppo.train` -> its rows of metrics, but for the first step."""
    cfg, policy, tokenizer = start(size)
    critic = reward.ScalarModel(copy.deepcopy(policy.model))
    models = {"policy": policy, "critic": critic}
    models["reference"] = copy.deepcopy(policy).requires_grad_(False)
    models["reward"] = copy.deepcopy(critic).requires_grad_(False)
    device = torch.device("cpu")
    for model in models.values():
        sft.prepare(model, cfg, device)
    optimizers = {name: sft.make_optimizer(models[name]) for name in ("policy", "critic")}
    ma_ppo.load_models = lambda *_: (models, optimizers, tokenizer)
    sft.save_checkpoint = sft.save_models = lambda *_: None
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        ma_ppo.train("token", Path(folder), cfg, device)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def trainer(size):
    """What TRL's process does: run its trainer, and print the seconds of each step."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    cfg, policy, tokenizer = start(size)
    prompts = ma_ppo.load_prompts(tokenizer, cfg)
    steps = range(cfg.steps)
    chosen = [x for i in steps for x in ma_ppo.choose_prompts("token", prompts, i, cfg)]
    classifier = copy.deepcopy(policy.config)
    classifier.num_labels = 1
    times = []

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=cfg.batch_size,
            local_rollout_forward_batch_size=cfg.batch_size,
            num_ppo_epochs=1,
            total_episodes=len(chosen),
            response_length=cfg.max_response,
            temperature=1.0,
            learning_rate=1e-9,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=copy.deepcopy(policy),
            reward_model=LlamaForSequenceClassification(classifier),
            value_model=LlamaForSequenceClassification(classifier),
            train_dataset=Dataset.from_list([{"input_ids": x["prompt"]} for x in chosen]),
            callbacks=[Clock()],
        ).train()
    print("\nseconds", *(after - before for before, after in pairwise(times)))


def trl(size):
    """Three runs of ours and of TRL's trainer in turn -> {column: number}"""
    if not importlib.util.find_spec("trl"):
        raise SystemExit('error: TRL is not installed: pip install "trl==1.8.*"')
    command = [sys.executable, __file__, "trainer", size]
    mine, theirs = [], []
    for _ in range(3):
        mine += [row["seconds"] for row in ours(size)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        theirs += map(float, said.split("seconds ")[1].split("\n")[0].split())
    found = {"ours": median(mine), "TRL": median(theirs)}
    return found | {"ours / TRL": found["ours"] / found["TRL"]}


def phases(size):
    """Each phase's FLOPs a second, without attention, over those of a layer's largest product."""
    rows = ours(size)
    cfg, policy, tokenizer = start(size)
    hidden, inner = SIZES[size][0][:2]
    read = int(rows[0]["tokens_per_second_judge"] * rows[0]["seconds_judge"])
    trunk = read * sum(x.numel() for x in policy.model.layers.parameters())
    head = cfg.batch_size * cfg.max_response * hidden * (SIZES[size][1] or len(tokenizer))
    flops = {"sample": 2 * (trunk + head)}
    flops["judge"] = 2 * (4 * trunk + 2 * head)  # policy, reference, critic, RM
    flops["update"] = 6 * (2 * trunk + head)  # policy, critic; backward takes twice as long
    product = {"x": torch.randn(read, hidden), "w": torch.randn(hidden, inner)}
    timer = Timer("x @ w", globals=product, num_threads=torch.get_num_threads())
    possible = 2 * read * hidden * inner / timer.blocked_autorange().median
    found = {"matmul, GFLOP/s": possible / 1e9}
    for name, count in flops.items():
        speed = count / median(row[f"seconds_{name}"] for row in rows)
        found[f"{name} / matmul"] = speed / possible
    return found


if __name__ == "__main__":
    part, *sizes = sys.argv[1:] if sys.argv[1:] else ["trl"]
    for size in sizes or ["toy"]:
        found = {"trl": trl, "phases": phases, "trainer": trainer}[part](size)
        if found:
            print(json.dumps({"part": part, "size": size} | found), flush=True)
