"""LoRA: adapters are trained in the decoder's place, all samplers see them, the end merges them."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import answers, run_ranks
from torch.distributed.tensor import DTensor
from zoo import texts_of, tiny_qwen

import data
import mrsp
import sft
import train
from families import load
from families.vila import VILA
from grpo import GRPOConfig
from model import ModelError
from rollout import TorchEngine
from sft import SFTConfig
from train import Run, RunConfig

SFT = SFTConfig(
    steps=3, groups=3, texts=3, train="llm", micro_batches=2, lr=1e-2, warmup=0.0, lora_rank=4,
    lora_alpha=8.0,
)  # fmt: skip
GRPO = GRPOConfig(
    steps=3, prompts=4, update_prompts=2, micro_prompts=1, group=4, top_p=1.0, lr=1e-2,
    kl_coef=0.1, lora_rank=4, lora_alpha=8.0,
)  # fmt: skip


class Graded(TorchEngine):
    """What the policy says does not matter: every other answer has the right format."""

    def generate(self, prompts, n, sampling, seeds):
        right = "<think> x </think> <answer> Z </answer>"
        return [
            [replace(r, text=right if i % 2 else "") for i, r in enumerate(group)]
            for group in super().generate(prompts, n, sampling, seeds)
        ]


@pytest.fixture(params=["vila", "qwen", "qwen untied"])
def policy(request, toy):
    if request.param == "vila":
        return VILA.from_pretrained(toy / "init")
    return tiny_qwen(texts_of(toy), request.param == "qwen")


def copy_of(tensors) -> dict:
    return {name: mrsp.whole(value).detach().clone() for name, value in tensors}


def stir(model, rank=4) -> None:
    """Adapters that change something, as if they had been trained."""
    model.add_adapters(rank, 2.0 * rank, seed=0)
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) / 50)


def log_probs(model, toy):
    prompt = model.prompt(data.load_rows(str(toy / "rl.jsonl"))[0], num_frames=4)
    with torch.no_grad():
        return model(mrsp.pack([prompt], answers(model, [[5, 3]])))[0]


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") and ".layers." in name and "policy" in name


def run_in(folder) -> Run:
    return Run(RunConfig(output_dir=str(folder), rollout="torch"))


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def check_only_adapters_moved(model, start: dict) -> None:
    """In the middle of a stage: the model's own tensors as they were, to the last bit."""
    now = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in start.items())
    moved = [p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert moved and all(moved)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


def check_merged(model, start: dict, fresh) -> None:
    """After a stage: the tree of a model that was just made; linear layers of the decoder moved."""
    assert str(model) == str(fresh) and vars(model.llm.model).keys() == vars(fresh.llm.model).keys()
    assert model.state_dict().keys() == fresh.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) != is_linear(name), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trains_adapters_alone_and_ends_with_a_plain_model(toy, policy, checkpointing):
    fresh, start = load_like(policy, toy), copy_of(policy.state_dict().items())
    for model in (policy, fresh) if checkpointing else ():
        model.enable_gradient_checkpointing()
    losses = []

    def log(step, metrics):
        losses.append(metrics["loss"])
        if step:
            check_only_adapters_moved(policy, start)

    sft.train(policy, data.load_rows(str(toy / "sft.jsonl")), SFT, log=log)
    assert losses[2] < losses[0] and len([n for n in start if is_linear(n)]) >= 14
    check_merged(policy, start, fresh)


def load_like(model, toy):
    if isinstance(model, VILA):
        return VILA.from_pretrained(toy / "init")
    return tiny_qwen(texts_of(toy), model.llm.config.tie_word_embeddings)


def test_the_optimizer_holds_adapters_alone_and_they_are_float32(toy):
    model = VILA.from_pretrained(toy / "init", torch.bfloat16)
    (optimizer,) = sft.optimizers(model, SFT, seed=0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert held == {id(p) for p in adapters} and {p.dtype for p in adapters} == {torch.float32}
    assert sum(p.numel() for p in adapters) < 0.2 * sum(p.numel() for p in model.llm.parameters())
    model.merge_adapters()
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}


def test_adapters_follow_the_seed_and_leave_the_generator_alone(toy, model):
    torch.manual_seed(5)
    expected, made = torch.rand(3), []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        model.add_adapters(4, 8.0, seed)
        assert torch.equal(torch.rand(3), expected)
        made.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
        model.merge_adapters()
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("rank", [1, 4, 200])  # 200: more than the layers are wide
def test_what_is_saved_handed_over_and_merged_is_what_was_trained(toy, tmp_path, policy, rank):
    plain = log_probs(policy.double(), toy)
    stir(policy, rank)
    before, weights = log_probs(policy, toy), copy_of(policy.decoder_weights())
    policy.save_pretrained(tmp_path)
    assert (before - plain).abs().max() > 1e-3
    engine = TorchEngine(load_like(policy, toy).double(), dtype=torch.float64)
    engine.sync(policy)
    policy.merge_adapters()
    for model in (policy, engine.policy, load(tmp_path, torch.float64).double()):
        assert (log_probs(model, toy) - before).abs().max() < 1e-9
    merged = copy_of(policy.decoder_weights())
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], value) for name, value in weights.items())


@pytest.mark.parametrize("copied", [False, True])
def test_grpo_with_adapters_samples_from_them_and_keeps_a_plain_reference(
    toy, tmp_path, model, copied
):
    fresh, start = VILA.from_pretrained(toy / "init"), copy_of(model.state_dict().items())
    engine = Graded(model, dtype=torch.float32 if copied else None)
    reference, run = TorchEngine(model, dtype=torch.float32).policy, run_in(tmp_path)
    write = run.write

    def check(name, line):
        write(name, line)
        if name == "metrics.jsonl":
            check_only_adapters_moved(model, start)

    run.write = check
    rows = data.load_rows(str(toy / "rl.jsonl"))[:8]
    train.train_grpo(run, model, reference, engine, GRPO, rows)
    check_merged(model, start, fresh)
    metrics = metrics_of(tmp_path)
    assert all(m["mismatch_max"] < 1e-4 and m["grad_norm"] > 1e-3 for m in metrics)
    assert all(m["kl"] > 1e-3 for m in metrics)
    for name, value in reference.llm.state_dict().items():
        assert torch.equal(value, start[f"policy.llm.{name}"]), name
    assert (log_probs(engine.policy, toy) - log_probs(model, toy)).abs().max() < 1e-5


def _train(rank, world, folder, out, dtype, sp=1, fsdp=False):
    """SFT, then GRPO, both with adapters; a checkpoint in the middle of GRPO and one after it."""
    model = VILA.from_pretrained(f"{folder}/init").to(dtype)
    model.mesh, run = mrsp.make_mesh(sp, "auto", 4, 2), run_in(f"{out}/{world}_{rank}")
    engine = Graded(model, dtype=dtype)
    reference = TorchEngine(model, dtype=dtype).policy
    if fsdp:
        model.enable_gradient_checkpointing()
        for part in (model, reference):
            part.shard_parameters(dtype)
    start, write = copy_of(model.state_dict().items()), run.write

    def check(name, line):
        write(name, line)
        if name == "metrics.jsonl" and line["step"] == 1:
            layers = [p for n, p in model.named_parameters() if is_linear(n) and "lora" not in n]
            assert all(isinstance(p, DTensor) == fsdp and not p.requires_grad for p in layers)
            assert all(p.grad is None for p in layers)
            model.save_pretrained(f"{out}/{world}_middle", write=rank == 0)

    run.write = check
    log = lambda step, m: run.write("metrics.jsonl", {"step": -1} | m)  # noqa: E731
    sft.train(model, data.load_rows(f"{folder}/sft.jsonl"), SFT, log=log)
    rows = data.load_rows(f"{folder}/rl.jsonl")[:8]
    train.train_grpo(run, model, reference, engine, GRPO, rows)
    assert all(isinstance(p, DTensor) == fsdp for p in model.llm.parameters())
    for name, value in copy_of(model.state_dict().items()).items():
        assert torch.equal(value, start[name]) != is_linear(name), name
    model.save_pretrained(f"{out}/{world}_end", write=rank == 0)


@pytest.fixture(scope="session")
def one_rank(toy, tmp_path_factory):
    """_train in one process, once for each precision: the folder with what it wrote."""
    out = {dtype: tmp_path_factory.mktemp("one") for dtype in (torch.float32, torch.float64)}
    for dtype, folder in out.items():
        _train(0, 1, str(toy), str(folder), dtype)
    return out


@pytest.mark.parametrize("sp, fsdp, dtype, tolerance", [
    (1, False, torch.float64, 1e-9), (1, True, torch.float64, 1e-9),
    (2, True, torch.float64, 1e-9), (1, True, torch.float32, 1e-5),
])  # fmt: skip
def test_two_ranks_train_adapters_like_one(toy, one_rank, tmp_path, sp, fsdp, dtype, tolerance):
    run_ranks(_train, 2, 2, str(toy), str(tmp_path), dtype, sp, fsdp)
    # Only rank 0 would write in a run of two ranks; here each has a Run, and a file, of its own.
    one = metrics_of(one_rank[dtype] / "1_0")
    for rank in (0, 1):
        for a, b in zip(one, metrics_of(tmp_path / f"2_{rank}"), strict=True):
            for name in ("loss", "grad_norm", "reward", "kl"):
                if name in a:
                    assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name
    for name in ("middle", "end"):
        a = VILA.from_pretrained(one_rank[dtype] / f"1_{name}", dtype).state_dict()
        b = VILA.from_pretrained(tmp_path / f"2_{name}", dtype).state_dict()
        assert all((a[n] - b[n]).abs().max() < tolerance for n in a), name


def _in_bfloat16(rank, folder):
    model, plain = (VILA.from_pretrained(f"{folder}/init") for _ in range(2))
    model.shard_parameters(torch.bfloat16)
    losses, rows = [[], []], data.load_rows(f"{folder}/sft.jsonl")
    for kind, seen in zip((model, plain), losses):
        sft.train(kind, rows, SFT, log=lambda step, m, seen=seen: seen.append(m["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    assert {p.dtype for p in model.llm.parameters()} == {torch.float32}  # the masters


def test_adapters_learn_under_sharded_layers_in_bfloat16(toy):
    run_ranks(_in_bfloat16, 2, str(toy))


@pytest.mark.parametrize("options, message", [
    ("--sft_lora_rank 4 --sft_train all", "options of sft: lora_rank needs train llm"),
    ("--sft_lora_rank 4 --sft_optimizer muon", "options of sft: lora_rank needs .*adamw"),
    ("--sft_lora_rank -1", "options of sft: need lora_rank >= 0"),
    ("--grpo_lora_alpha 0", "options of grpo: need lora_rank >= 0 and lora_alpha > 0"),
])  # fmt: skip
def test_impossible_options_are_errors(options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train.main(options.split())


def test_without_peft_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        model.add_adapters(4, 8.0, seed=0)


def _vllm(rank, folder):
    from test_vllm import CONFIG, SAMPLINGS, VLLMEngine, build, gap

    for kind in ("vila", "qwen untied"):
        model, prompts = build(folder, kind)
        engine = VLLMEngine(model, CONFIG)
        engine.sync(model)
        old = engine.generate(prompts, 4, SAMPLINGS[0])
        stir(model)
        assert gap(model, prompts, old) > 1e-3  # another policy now
        engine.sync(model)
        assert gap(model, prompts, engine.generate(prompts, 4, SAMPLINGS[0])) < 1e-4
        engine.close()


def test_vllm_samples_from_the_merged_weights(toy):
    """In a process of its own: vLLM keeps to the first process group it has seen."""
    pytest.importorskip("vllm")
    run_ranks(_vllm, 1, toy)
