"""What a GPU will do, as far as it shows without one: on a played device, by counting, on paper."""

import copy
import ctypes
import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import ma_ppo
import reward
import segment
import sft

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "1", "--batch_size", "4", "--micro_batch_size", "2", "--max_response", "8"]
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
)
ARMS = [arm for arm in (*segment.TERMINATIONS, "control", "rloo") if arm != "parsing"]


@pytest.fixture
def stages(toy):
    """Flags of the tiny pipeline's SFT model and RM."""
    return ["--sft", str(toy.folder / "sft"), "--reward_model", str(toy.folder / "reward")]


# The played device


@pytest.fixture
def device(monkeypatch, quick_runs):
    """The played device; its tensors cannot be written to files, so that models are not saved."""
    from second_device import Device

    monkeypatch.setattr(sft, "save_models", lambda parts, out: None)
    monkeypatch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
    with Device():
        yield ["--device", "gpu"]


def test_a_cpu_tensor_among_those_of_the_device_is_found(device):
    from second_device import Mixed

    there = torch.ones(3, device="gpu")
    assert (there * 2).device.type == "gpu" and (there * 2).tolist() == [2, 2, 2]
    assert there.to("cpu").device.type == "cpu"
    with pytest.raises(Mixed):
        there + torch.ones(3)


def test_sft_and_reward_model_train_on_one_device(device, toy, tmp_path):
    large = ["--micro_batch_size", "64"]
    sft.main([*TINY, *large, *device, "--out", str(tmp_path / "sft")])
    flags = ["--sft", str(toy.folder / "sft"), "--out", str(tmp_path / "reward")]
    reward.main([*TINY, *large, *device, *flags])


def test_all_arms_train_on_one_device(device, stages, tmp_path):
    flags = [*stages, *TINY, *device, "--out", str(tmp_path), "--top_k", "5", "--top_p", "0.9"]
    short = ["--max_response", "4", "--micro_batch_size", "3"]
    ma_ppo.main([*flags, "--arms", *ARMS, "--sort_by_length", *short])


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "sigma", ["decay", pytest.param("last", marks=SLOW), pytest.param("first", marks=SLOW)]
)
def test_variants_train_on_one_device(device, stages, tmp_path, sigma):
    flags = [*stages, *TINY, *device, "--out", str(tmp_path), "--arms", "fixed", "--sigma", sigma]
    more = ["--macro_reward", "mean", "--ratio", "macro", "--ppo_epochs", "2", "--critic_lam", "1"]
    ma_ppo.main([*flags, *more, "--critic_epochs", "2", "--value_clip", "0"])


# By counting


class CountCasts(TorchDispatchMode):
    """Counts copies of weights, which have two dimensions, from fp32 to bf16."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = shapes
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            to_bf16 = (kwargs or {}).get("dtype") == torch.bfloat16
            self.count += to_bf16 and args[0].shape in self.shapes
        return operation(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_a_rollout_and_not_for_every_token(toy):
    policy, tokenizer = sft.load_causal_lm(str(toy.folder / "sft"))
    cfg = ma_ppo.Config(precision="bf16", max_response=12)
    sft.prepare(policy, cfg, torch.device("cpu"))
    weights = [module.weight for module in policy.modules() if isinstance(module, torch.nn.Linear)]
    uniforms = torch.rand(3, 12, dtype=torch.float64)
    with CountCasts({weight.shape for weight in weights}) as casts:
        ma_ppo.generate(policy, [[5, 6], [7], [8, 9, 10]], uniforms, tokenizer, cfg)
    assert 0 < casts.count <= len(weights)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_rank_samples_in_one_loop_or_in_as_many_as_it_is_told_and_always_the_same(
    toy, monkeypatch, size
):
    policy, tokenizer = sft.load_causal_lm(str(toy.folder / "sft"))
    examples = []
    for number, length in enumerate([3, 9, 2, 5, 7]):
        examples.append({"number": number, "prompt": list(range(5, 5 + length))})
    cfg = ma_ppo.Config(max_response=12, micro_batch_size=2)
    wanted = ma_ppo.sample(policy, examples, 3, tokenizer, cfg).tokens
    calls, inner = [], ma_ppo.generate
    monkeypatch.setattr(ma_ppo, "generate", lambda *args: calls.append(0) or inner(*args))
    cfg.sample_batch_size = size
    assert ma_ppo.sample(policy, examples, 3, tokenizer, cfg).tokens == wanted
    assert len(calls) == {0: 1, 1: 5, 3: 2}[size]


def test_nothing_of_an_arm_is_alive_when_the_next_one_loads_its_models(
    stages, tmp_path, monkeypatch, quick_runs
):
    """Five models of gigabytes each would be in the way of the next five."""
    seen, alive = [], []
    load = ma_ppo.load_models
    load_lm = sft.load_causal_lm

    def watch(arm, cfg, device):
        models, optimizers, tokenizer = load(arm, cfg, device)
        seen.extend(weakref.ref(x) for x in (*models.values(), *optimizers.values()))
        return models, optimizers, tokenizer

    def look(*args):
        alive.append(sum(reference() is not None for reference in seen))
        return load_lm(*args)

    monkeypatch.setattr(ma_ppo, "load_models", watch)
    monkeypatch.setattr(sft, "load_causal_lm", look)
    monkeypatch.setattr(ma_ppo, "draw_curves", lambda folders, cfg: None)
    gc.disable()  # as if no collection happened to come
    try:
        flags = [*stages, *TINY, "--out", str(tmp_path), "--precision", "bf16"]
        ma_ppo.main([*flags, "--gradient_checkpointing", "--arms", "token", "fixed"])
    finally:
        gc.enable()
    assert len(seen) == 12 and alive == [0, 0]


def test_gradients_take_no_memory_between_updates():
    model = torch.nn.Linear(3, 1)
    optimizer = sft.make_optimizer(model)
    sft.update(model, optimizer, [lambda: model(torch.ones(3)).sum()], lr=0.1)
    assert all(p.grad is None for p in model.parameters())
    with_nan = [lambda: model(torch.ones(3)).sum() * torch.nan]
    sft.update(model, optimizer, with_nan, lr=0.1)
    assert all(p.grad is None for p in model.parameters())


FAULTS = """
import resource
import sys

import torch

import sft

if sys.argv[1] == "keep":
    sft.setup("cpu")
torch.set_num_threads(1)
inner, outer = torch.nn.Linear(320, 880), torch.nn.Linear(880, 320)
counts = []
for _ in range(20):  # activations of up to 43 MB, taken and freed
    x = torch.randn(64 * 190, 320)
    for _ in range(4):
        x = outer(torch.nn.functional.silu(inner(x)))
    x.sum().backward()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[9])  # pages that the system handed out in the last ten rounds
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_the_memory_of_freed_tensors_is_not_handed_out_anew_page_by_page():
    faults = {}
    for mode in ("keep", "as usual"):
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        faults[mode] = int(done.stdout)
    assert 20 * faults["keep"] < faults["as usual"]


def test_rows_of_similar_length_are_judged_together_with_the_same_result(toy):
    policy, tokenizer = sft.load_causal_lm(str(toy.folder / "sft"))
    prompts = [[5] * n for n in (3, 9, 2, 5, 7, 4)]
    responses = [[6] * n for n in (9, 1, 4, 2, 6, 3)]
    batch = sft.make_batch(prompts, responses, tokenizer.pad_token_id, "cpu")
    cfg = ma_ppo.Config()
    wanted, _, _ = ma_ppo.token_logprobs(policy, batch, cfg)  # [B, T]
    found = torch.zeros_like(wanted)  # [B, T]
    columns = 0
    for rows, part in ma_ppo.micro_batches(batch, 2, sort=True):
        columns += part.tokens.numel()
        found[rows, : part.mask.shape[1]], _, _ = ma_ppo.token_logprobs(policy, part, cfg)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert columns < batch.tokens.numel()
    again = ma_ppo.micro_batches(batch, 2)
    assert torch.equal(torch.cat([part.tokens for _, part in again]), batch.tokens)


def tiny_models():
    """Models of three kinds of layers: separate output matrix, transposed matrices, tied output."""
    sizes = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    yield LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes, **heads))
    yield GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4))
    yield Gemma2ForCausalLM(Gemma2Config(vocab_size=200, **sizes, **heads, head_dim=32))


def test_the_flops_of_a_model_are_those_that_pytorch_counts():
    """Of short rows, so that attention costs little; and no logits of a prompt are computed."""
    for model in tiny_models():
        for prompt in (2, 10):
            batch = sft.make_batch([[5] * prompt] * 4, [[6] * (12 - prompt)] * 4, 0, "cpu")
            with FlopCounterMode(display=False) as counter:
                sft.sft_loss(model, batch, 1).backward()
            found = 3 * ma_ppo.forward_flops(model, batch)
            counted = counter.get_total_flops()
            assert found == pytest.approx(counted, rel=0.03), (type(model).__name__, prompt)


def test_attention_costs_half_of_what_pytorch_counts():
    """The same tokens in longer rows: only attention grows. PyTorch counts later tokens, too."""
    for model in tiny_models():
        model.set_attn_implementation("eager")
        counted, found = [], []
        for shape in ((4, 16), (2, 32)):
            tokens = torch.full(shape, 5)  # [rows, length]
            with FlopCounterMode(display=False) as counter:
                model(tokens)
            counted.append(counter.get_total_flops())
            batch = sft.Batch(tokens, torch.ones(shape), torch.ones(shape))
            found.append(ma_ppo.forward_flops(model, batch))
        growth = counted[1] - counted[0]
        assert 2 * (found[1] - found[0]) == growth > 0, type(model).__name__


def test_utilisation_is_the_models_flops_by_what_the_card_could_have_done(toy, monkeypatch):
    policy, _ = sft.load_causal_lm(str(toy.folder / "sft"))
    models = {"policy": policy, "reference": policy}
    batch = sft.make_batch([[5, 6], [7]], [[8], [9, 10]], 0, "cpu")
    rollout = ma_ppo.Rollout(batch, [], [], [])
    seconds = {f"seconds_{phase}": 2.0 for phase in ("sample", "judge", "update")}
    cfg = ma_ppo.Config(ppo_epochs=2)
    assert not any("mfu" in name for name in ma_ppo.speeds(rollout, seconds, models, cfg))
    once = ma_ppo.forward_flops(policy, batch)
    monkeypatch.setattr(ma_ppo, "card_speed", lambda model: 10 * once)
    found = ma_ppo.speeds(rollout, seconds, models, cfg)
    shares = [found[f"mfu_{phase}"] for phase in ("sample", "judge", "update")]
    assert shares == pytest.approx([1 / 20, 2 / 20, (3 * 2 - 1) / 20])  # rloo: no critic
    cfg.micro_batch_size = 1  # two micro-batches: all of both updates' passes are their own
    found = ma_ppo.speeds(rollout, seconds, models, cfg)
    assert found["mfu_update"] == pytest.approx(3 * 2 / 20)


def test_a_card_is_known_by_its_name(monkeypatch):
    class Model:
        device = torch.device("cuda")
        bf16 = True

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert ma_ppo.card_speed(Model) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "something else")
    assert ma_ppo.card_speed(Model) is None
    Model.device = torch.device("cpu")
    assert ma_ppo.card_speed(Model) is None


# On fake tensors, which have sizes and no content: peaks of memory at the size of Gemma 2B


class Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, and remembers the most."""

    def __init__(self, tensors):
        super().__init__()
        self.alive = {}
        self.now = self.most = 0
        for x in tensors:
            self.see(x)

    def see(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def forget(self, key, size):
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.see(x)
        return made

    def gigabytes(self):
        """The peak since the last call."""
        most, self.most = self.most, self.now
        return most / 1e9


def fake_models(cfg):
    """The four models of `ma_ppo.load_models`, of Gemma 2B's sizes, after `sft.prepare`."""
    learning = {"policy": GemmaForCausalLM(GEMMA_2B)}
    learning["critic"] = reward.ScalarModel(GemmaForCausalLM(GEMMA_2B).model)
    for model in learning.values():
        sft.prepare(model, cfg, torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)  # a fake model cannot be cast
    try:
        frozen = {"reference": GemmaForCausalLM(GEMMA_2B)}
        frozen["reward"] = reward.ScalarModel(GemmaForCausalLM(GEMMA_2B).model)
    finally:
        torch.set_default_dtype(torch.float32)
    frozen["reward"].head = torch.nn.Linear(GEMMA_2B.hidden_size, 1)
    for model in frozen.values():
        model.requires_grad_(False).bf16 = True
    return learning | frozen


def test_a_step_of_gemma_2b_fits_into_the_memory_that_is_promised():
    """A micro-batch of 8 responses, 512 + 512 tokens; the command of results/README.md."""
    cfg = ma_ppo.Config(precision="bf16", gradient_checkpointing=True)
    with FakeTensorMode():
        models = fake_models(cfg)
        optimizers = {}
        for name in ("policy", "critic"):
            optimizers[name] = torch.optim.AdamW(models[name].parameters(), fused=True)
        tokens = torch.ones(8, 1024, dtype=torch.long)
        batch = sft.Batch(tokens, torch.ones_like(tokens), torch.ones(8, 512))
        peak = Peak([p for model in models.values() for p in model.parameters()])
        with peak:
            for name, optimizer in optimizers.items():  # makes Adam's moments
                for p in models[name].parameters():
                    p.grad = torch.zeros_like(p)
                optimizer.step()
                optimizer.zero_grad()
        assert peak.gigabytes() < 81
        for at_once, most in ((False, 90), (True, 92)):  # with activations of policy and critic
            with peak, torch.set_grad_enabled(at_once):
                logprobs, every, keep = ma_ppo.token_logprobs(models["policy"], batch, cfg)
                values = ma_ppo.state_values(models["critic"], batch)
            with peak, torch.no_grad():
                ma_ppo.token_logprobs(models["reference"], batch, cfg, keep)
                torch.special.entr(every.exp()).sum(-1)
                del every
                models["reward"](batch)
            assert 75 < peak.gigabytes() < most
        del logprobs, values
        with peak:
            logprobs, _, _ = ma_ppo.token_logprobs(models["policy"], batch, cfg)
            ma_ppo.policy_loss(logprobs, batch.mask, batch.mask, batch.mask).backward()
        assert 80 < peak.gigabytes() < 98
        with peak:
            optimizers["policy"].step()
        assert 80 < peak.gigabytes() < 81


# On paper: the memory table of results/README.md


def gemma(name):
    """A Gemma of the published size, without its weights: the number of parameters."""
    with torch.device("meta"):
        if name == "2b":
            return GemmaForCausalLM(GEMMA_2B).num_parameters()
        if name == "7b":
            return GemmaForCausalLM(GemmaConfig()).num_parameters()  # its defaults are the 7B's
        config = Gemma2Config(
            hidden_size=4608,
            intermediate_size=36864,
            num_hidden_layers=46,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
        )
        return Gemma2ForCausalLM(config).num_parameters()


ROWS = re.findall(
    r"^\| (`.*`) \| ([\d.]+) × 10⁹ \| (\d+) GB \| (.*) \|$",
    (ROOT / "results" / "README.md").read_text(),
    re.MULTILINE,
)


def test_the_memory_table_has_every_preset():
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in ROWS))
    named = {name if name.startswith("codegemma") else f"gemma-{name}" for name in named}
    assert named == set(sft.PRESETS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_memory_table_follows_from_the_sizes_of_the_models(row):
    presets, billions, gigabytes, gpus = row
    size = re.search(r"(27b|2b|7b)", presets)[1]
    count = gemma(size)
    assert float(billions) == pytest.approx(count / 1e9, rel=0.005)
    copies = 30 if "apps" in presets else 32  # programs have no reward model
    assert float(gigabytes) == pytest.approx(copies * count / 1e9, abs=0.6)
    needed = -(-copies * count // int(0.8 * 80e9))
    assert int(re.match(r"\d+", gpus)[0]) == needed


def test_every_command_of_several_gpus_without_room_for_a_whole_pipeline_splits_it():
    text = (ROOT / "README.md").read_text() + (ROOT / "results" / "README.md").read_text()
    commands = re.findall(r"^torchrun[^\n]*(?:\\\n[^\n]*)*", text, re.MULTILINE)
    large = [command for command in commands if "--preset" in command]
    assert large and all("--shard" in command for command in large)
    for command in large:
        ranks = 1
        for flag in ("--nnodes", "--nproc_per_node"):
            found = re.search(flag + r"=(\d+)", command)
            ranks *= int(found[1]) if found else 1
        preset = re.search(r"--preset (\S+)", command)[1]
        copies = 30 if "apps" in preset else 32
        count = gemma(re.search(r"(27b|2b|7b)", preset)[1])
        assert copies * count / ranks < 0.8 * 80e9, command


def test_a_deep_copy_of_a_model_is_set_up_on_its_own(toy):
    policy, _ = sft.load_causal_lm(str(toy.folder / "sft"))
    reference = copy.deepcopy(policy).requires_grad_(False)
    sft.prepare(policy, ma_ppo.Config(precision="bf16"), torch.device("cpu"))
    assert not getattr(reference, "bf16", False)
    assert next(policy.parameters()).dtype == torch.float32
