"""How fast a PPO step is, and beside what.  Not a test; prints Markdown tables, writes JSON lines.

    python tests/bench.py trl phases decode arms averaging scaling     # about 25 minutes, two cores
    python tests/bench.py trl --sizes toy 10m --repeats 9
    python tests/bench.py phases profile --sizes 135m --device cuda    # bf16; not tried on any GPU

    trl        a step of ours and one of TRL's PPOTrainer in turn (pip install "trl==1.8.*"); they
               run in two processes, for ours keeps freed memory (`sft.keep_freed_memory`)
    phases     model FLOPs per second of each phase, beside matmuls of the same shapes; peak memory
    decode     `generate` of ours and of transformers in turn: same prompts, same number of tokens
    arms       a step of `fixed` and one of `token` in turn: what do macro actions cost?
    averaging  our addition of gradients beside DistributedDataParallel, two processes
    scaling    a step against response length, batch, and length of macro actions
    profile    the ten operations that take longest in a step

Same work on both sides: random models of one shape, the toy's prompts, no response ends early.
Times are medians; a ratio is the median of the ratios of neighbours. Keep the machine idle.
"""

import argparse
import contextlib
import copy
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ma_ppo = importlib.import_module("ma_ppo")
reward, sft = ma_ppo.reward, ma_ppo.sft

# Name: hidden, intermediate, layers, heads, key-value heads, vocabulary (0: the toy's), batch.
SIZES = {
    "toy": (64, 128, 2, 4, 4, 0, 64),
    "10m": (320, 880, 8, 5, 5, 0, 64),
    "135m": (576, 1536, 30, 9, 3, 49152, 8),  # SmolLM2-135M's
}
LENGTH = 80  # tokens of a response
PHASES = ma_ppo.PHASES


class Bench:
    """Models of one size, and what a step of ours needs."""

    def __init__(self, size, device, length=LENGTH, batch=None, flags=()):
        hidden, inner, layers, heads, kv_heads, vocabulary, usual = SIZES[size]
        batch = batch or usual
        words = ["--batch_size", str(batch), "--micro_batch_size", str(min(batch, 64))]
        words += ["--max_response", str(length), "--no_eos_score", "-4", *flags]
        self.cfg = sft.parse(ma_ppo.Config, "ma_ppo", words)
        self.device = device
        torch.manual_seed(0)
        rows = sft.load_share(self.cfg, "sft", "response")
        _, self.tokenizer = sft.start_model(sft.parse(sft.Config, "sft", []), rows)
        config = LlamaConfig(
            vocab_size=vocabulary or len(self.tokenizer),
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.policy = LlamaForCausalLM(config).to(device)
        self.models = {
            "policy": self.policy,
            "reference": copy.deepcopy(self.policy).requires_grad_(False),
            "critic": reward.ScalarModel(copy.deepcopy(self.policy.model)).to(device),
            "reward": reward.ScalarModel(copy.deepcopy(self.policy.model)).to(device),
        }
        self.models["reward"].requires_grad_(False)
        for model in self.models.values():
            sft.prepare(model, self.cfg, device)
        learning = ("policy", "critic")
        self.optimizers = {name: sft.make_optimizer(self.models[name]) for name in learning}
        with contextlib.redirect_stdout(None):
            self.prompts = ma_ppo.load_prompts(self.tokenizer, self.cfg)
        sft.end_ids = lambda tokenizer: [-1]  # no token ends a response: all are equally long
        self.cfg.lr = self.cfg.critic_lr = 1e-9  # steps stay equal

    def step(self, number, arm="token"):
        """One step of `ma_ppo.train` -> seconds of its phases, and the rollout."""
        cfg, models, tokenizer = self.cfg, self.models, self.tokenizer
        clock = [sft.tick(self.device)]
        examples = ma_ppo.choose_prompts(arm, self.prompts, number, cfg)
        rollout = ma_ppo.sample(models["policy"], examples, number, tokenizer, cfg)
        clock.append(sft.tick(self.device))
        first_pass = ma_ppo.judge(rollout, models, examples, tokenizer, cfg)
        clock.append(sft.tick(self.device))
        ma_ppo.cut(arm, rollout, tokenizer, cfg)
        mask = rollout.batch.mask  # [B, T]
        kl = rollout.logprobs, rollout.ref_logprobs  # [B, T] each
        rewards = ma_ppo.token_rewards(rollout.scores, *kl, mask, cfg.beta)  # [B, T]
        ma_ppo.assign_credit(arm, rollout, rewards, cfg)
        clock.append(sft.tick(self.device))
        ma_ppo.improve(rollout, models, self.optimizers, number, cfg, first_pass)
        clock.append(sft.tick(self.device))
        return sft.timings(clock, PHASES), rollout


# The parts. Each returns rows, dicts of equal keys: a table.


def trl(args):
    """Steps of ours and of TRL's trainer in turn, each in a process of its own."""
    rows = []
    for size in args.sizes:
        bench = Bench(size, args.device)
        command = [sys.executable, __file__, "trainer", "--sizes", size]
        command += ["--repeats", str(args.repeats), "--device", str(args.device)]
        ours, theirs = [], []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:
            for number in range(args.repeats + 1):
                process.stdin.write("go\n")
                process.stdin.flush()
                theirs.append(seconds_said(process))
                seconds, rollout = bench.step(number)
                assert rollout.batch.mask.all()  # no response ended early
                ours.append(seconds)
        ours, theirs = ours[1:], theirs[1:]  # the first warms up
        seconds = [step["seconds"] for step in ours]
        row = {"size": size, "ours": median(seconds), "TRL": median(theirs)}
        row["ours / TRL"] = paired(seconds, theirs)
        phases = ("sample", "judge", "update")
        rows.append(row | {name: median([x[f"seconds_{name}"] for x in ours]) for name in phases})
    return rows


def seconds_said(process):
    """How long the other process says that its step took; it may print other things before."""
    for line in process.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise SystemExit("error: TRL's process has ended")


def trainer(args):
    """What the other process of `trl` does: a step of TRL's whenever it is told to."""
    try:
        from transformers import TrainerCallback
        from trl.experimental.ppo import PPOTrainer
    except ImportError as error:
        raise SystemExit(f'error: {error}; pip install "trl==1.8.*"') from None

    class Clock(TrainerCallback):
        """Called by TRL's trainer before its first step and after every one."""

        def on_train_begin(self, *args, **kwargs):
            self.wait()

        def on_step_end(self, *args, **kwargs):
            print(f"\nseconds {now(bench.device) - self.began}", flush=True)
            self.wait()

        def wait(self):
            if not sys.stdin.readline():
                raise SystemExit  # all steps are done, or the other process has ended
            self.began = now(bench.device)

    bench = Bench(args.sizes[0], args.device)
    with tempfile.TemporaryDirectory() as folder:
        PPOTrainer(**trl_arguments(bench, folder, args), callbacks=[Clock()]).train()


def trl_arguments(bench, folder, args):
    """TRL's trainer with the same models, prompts, lengths and micro-batches."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig

    cfg = bench.cfg
    classifier = copy.deepcopy(bench.policy.config)
    classifier.num_labels = 1
    steps = args.repeats + 1
    chosen = []  # the same prompts as in our steps
    for step in range(steps):
        chosen += ma_ppo.choose_prompts("token", bench.prompts, step, cfg)
    return {
        "args": PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=cfg.batch_size,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=cfg.batch_size,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=cfg.batch_size * steps,
            response_length=cfg.max_response,
            temperature=1.0,
            learning_rate=1e-9,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=bench.policy.bf16,
            use_cpu=bench.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        "processing_class": bench.tokenizer,
        "model": copy.deepcopy(bench.policy),
        "ref_model": copy.deepcopy(bench.policy),
        "reward_model": LlamaForSequenceClassification(classifier),
        "value_model": LlamaForSequenceClassification(classifier),
        "train_dataset": Dataset.from_list([{"input_ids": x["prompt"]} for x in chosen]),
    }


def phases(args):
    """GFLOP/s of each phase, by ma_ppo.phase_flops, and of a matmul: tokens x hidden x inner."""
    rows = []
    for size in args.sizes:
        bench = Bench(size, args.device)
        done = [bench.step(number) for number in range(args.repeats + 1)][1:]
        batch = done[0][1].batch
        flops = ma_ppo.phase_flops(batch, bench.models, bench.cfg)
        hidden, inner = SIZES[size][:2]
        possible = matmul_speed(batch.tokens.numel(), hidden, inner, args)
        row = {"size": size, "matmul, GFLOP/s": possible / 1e9}
        for phase, count in flops.items():
            speed = count / median([seconds[f"seconds_{phase}"] for seconds, _ in done])
            row[phase] = speed / 1e9
            row[f"{phase} / matmul"] = speed / possible
        rows.append(row | peak_memory(done[-1][0]))
    return rows


def matmul_speed(tokens, hidden, inner, args):
    """FLOP/s of the largest matmul of a layer, in the phases' precision."""
    bf16 = args.device.type == "cuda"
    kind = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(tokens, hidden, device=args.device, dtype=kind)
    w = torch.randn(hidden, inner, device=args.device, dtype=kind)
    times = []
    for _ in range(10 * args.repeats):
        began = now(args.device)
        x @ w
        times.append(now(args.device) - began)
    return 2 * tokens * hidden * inner / median(times)


def peak_memory(seconds):
    """Of the process, or on a GPU of each phase of the last step, 10⁹ bytes."""
    found = {name: value for name, value in seconds.items() if name.startswith("gpu_gb")}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found or {"peak of the process, GB": kilobytes * 1024 / 1e9}


@torch.no_grad()
def decode(args):
    """Tokens per second of `ma_ppo.generate` and of transformers' `generate`, in turn."""
    rows = []
    for size in args.sizes:
        bench = Bench(size, args.device)
        cfg, tokenizer = bench.cfg, bench.tokenizer
        prompts = [x["prompt"] for x in ma_ppo.choose_prompts("token", bench.prompts, 0, cfg)]
        uniforms = torch.rand(len(prompts), cfg.max_response, dtype=torch.float64)
        batch = sft.make_batch(prompts, [[]] * len(prompts), tokenizer.pad_token_id, args.device)
        ours, theirs = [], []
        for _ in range(args.repeats + 1):
            began = now(args.device)
            ma_ppo.generate(bench.policy, prompts, uniforms, tokenizer, cfg)
            between = now(args.device)
            with sft.autocast(bench.policy, cache=True):
                bench.policy.generate(
                    input_ids=batch.tokens,
                    attention_mask=batch.attention,
                    max_new_tokens=cfg.max_response,
                    do_sample=True,
                    top_k=0,
                )
            theirs.append(now(args.device) - between)
            ours.append(between - began)
        count = len(prompts) * cfg.max_response
        row = {"size": size, "ours, tokens/s": count / median(ours[1:])}
        row["transformers, tokens/s"] = count / median(theirs[1:])
        rows.append(row | {"ours / transformers, seconds": paired(ours[1:], theirs[1:])})
    return rows


def arms(args):
    """Seconds of a step of `fixed` and one of `token`, in turn, and of their step 5."""
    rows = []
    for size in args.sizes:
        bench = Bench(size, args.device)
        fixed, token = [], []
        for number in range(2 * args.repeats + 1):
            order = ["fixed", "token"] if number % 2 else ["token", "fixed"]
            done = {arm: bench.step(number, arm)[0] for arm in order}
            fixed.append(done["fixed"])
            token.append(done["token"])
        row = {"size": size}
        for name in ("seconds", "seconds_credit"):
            of_fixed, of_token = [[x[name] for x in times[1:]] for times in (fixed, token)]
            row |= {f"fixed, {name}": median(of_fixed), f"token, {name}": median(of_token)}
            row[f"{name}, ratio"] = paired(of_fixed, of_token)
        rows.append(row)
    return rows


def averaging(args):
    """Gradients of two processes: ours, added up after the backward pass, beside DDP's."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            path = Path(folder) / f"{size}.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node=2", __file__, "rank", "--sizes", size]
            command += ["--repeats", str(args.repeats), "--json", str(path)]
            command += ["--device", args.device.type]
            threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}
            subprocess.run(command, check=True, env=os.environ | threads)
            rows.append({"size": size} | json.loads(path.read_text()))
    return rows


def rank(args):
    """What each of the two processes of `averaging` does."""
    device = sft.setup(args.device.type)
    bench = Bench(args.sizes[0], device)
    batch = sft.make_batch([[5] * 80] * 8, [[6] * LENGTH] * 8, bench.tokenizer.pad_token_id, device)
    models = {"ours": copy.deepcopy(bench.policy), "DDP": copy.deepcopy(bench.policy)}
    wrapped = torch.nn.parallel.DistributedDataParallel(models["DDP"])
    times = {"ours": [], "DDP": []}
    for _ in range(2 * args.repeats + 1):
        for name, model in models.items():
            began = now(device)
            called = wrapped if name == "DDP" else model
            called(input_ids=batch.tokens, attention_mask=batch.attention).logits.sum().backward()
            if name == "ours":
                sft.sum_gradients(model)
            times[name].append(now(device) - began)
            model.zero_grad()
    if sft.rank() == 0:
        row = {name: median(each[1:]) for name, each in times.items()}
        row["ours / DDP"] = paired(times["ours"][1:], times["DDP"][1:])
        Path(args.json).write_text(json.dumps(row))


def scaling(args):
    """Seconds of a step at the toy's size: against response length, batch, and macro actions."""
    settings = [(length, 64, 5) for length in (64, 128, 256, 512, 1024)]
    settings += [(LENGTH, batch, 5) for batch in (16, 32, 128, 256)]
    settings += [(LENGTH, 64, n) for n in (1, 2, 10, LENGTH)]
    rows = []
    for length, batch, n in settings:
        bench = Bench("toy", args.device, length, batch, ["--n", str(n)])
        done = [bench.step(number, "fixed")[0] for number in range(args.repeats + 1)][1:]
        row = {"response": length, "batch": batch, "n": n, "K": -(-length // n)}
        names = ("seconds", *(f"seconds_{phase}" for phase in PHASES))
        rows.append(row | {name: median([x[name] for x in done]) for name in names})
    return rows


def profile(args):
    """The ten operations that take longest in one step, by PyTorch's profiler."""
    on_gpu = args.device.type == "cuda"
    key = "device_time_total" if on_gpu else "self_cpu_time_total"
    rows = []
    for size in args.sizes:
        bench = Bench(size, args.device)
        bench.step(0)
        with torch.profiler.profile() as profiler:
            bench.step(1)
        found = sorted(profiler.key_averages(), key=lambda x: -getattr(x, key))
        whole = sum(x.self_cpu_time_total for x in found) if not on_gpu else None
        for x in found[:10]:
            row = {"size": size, "operation": x.key, "calls": x.count}
            row["milliseconds"] = getattr(x, key) / 1e3
            rows.append(row | ({"share": getattr(x, key) / whole} if whole else {}))
    return rows


# Helpers.


def now(device):
    """Seconds, after all work that a GPU was given."""
    return sft.tick(device)[0]


def median(values):
    """The median: one slow step on a noisy machine must not count."""
    return statistics.median(values)


def paired(ours, theirs):
    """The median ratio of neighbours: a machine that gets slower slows both."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def table(rows):
    """Rows as Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS = [trl, phases, decode, arms, averaging, scaling, profile]
OTHERS = [rank, trainer]  # what processes do that a part starts


def main():
    """Run the parts named on the command line."""
    parts = {part.__name__: part for part in PARTS + OTHERS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=parts, metavar="PART")
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--repeats", type=int, default=5, help="steps that count, after one more")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", default="", help="append the tables' rows to this file")
    args = parser.parse_args()
    for name in args.parts:
        np.random.seed(0)
        if parts[name] in OTHERS:
            parts[name](args)
            continue
        sft.setup(args.device.type)
        rows = parts[name](args)
        print(f"\n{name}: {parts[name].__doc__.splitlines()[0]}\n\n{table(rows)}", flush=True)
        if args.json:
            with Path(args.json).open("a") as file:
                file.writelines(json.dumps({"part": name} | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
