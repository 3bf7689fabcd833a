"""LoRA: adapters are trained in the decoder's place, all samplers see them, the end merges them."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import answers, read_jsonl, run_ranks
from torch.distributed.tensor import DTensor
from zoo import texts_of, tiny_qwen

import data
import mrsp
import sft
import train
from families import load
from grpo import Config
from kit.actors import Actors
from kit.method import Method
from kit.presets import RunConfig, Settings
from kit.ranks import Ranks
from kit.run import Run
from model import ModelError
from rollout import TorchEngine

LORA = {"steps": 3, "lr": 1e-2, "lora_rank": 4, "lora_alpha": 8.0}
SFT = sft.SFTConfig(groups=3, texts=3, train="llm", micro_batches=2, warmup=0.0, **LORA)
GRPO = Config(prompts=4, update_prompts=2, micro_prompts=1, group=4, top_p=1, kl_coef=0.1, **LORA)


class Graded(TorchEngine):
    """What the policy says does not matter: every other answer has the right format."""

    def generate(self, prompts, n, sampling, seeds):
        texts = ["", "<think> x </think> <answer> Z </answer>"] * n
        found = super().generate(prompts, n, sampling, seeds)
        return [[replace(r, text=text) for r, text in zip(group, texts)] for group in found]


def fresh(kind, toy):
    """A model with the weights that each of this kind has at first."""
    if kind == "vila":
        return load(toy / "init")
    return tiny_qwen(texts_of(toy), kind == "qwen")


SLOW = pytest.mark.slow
KINDS = ["vila", pytest.param("qwen", marks=SLOW), pytest.param("qwen untied", marks=SLOW)]


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


def run_grpo(run, model, engine, toy) -> None:
    actors = Actors(model, None, engine, None, Method(), GRPO)
    train.train_grpo(run, actors, data.load_rows(f"{toy}/rl.jsonl")[:8])


def watched(folder, check) -> Run:
    """A run that calls check(line) after each line of its metrics, in the middle of a stage."""
    run = Run(Settings(run=RunConfig(output_dir=str(folder))), Ranks())
    write = run.write

    def write_and_check(name, line):
        write(name, line)
        if name == "metrics.jsonl":
            check(line)

    run.write = write_and_check
    return run


def check_only_adapters_moved(model, start: dict) -> None:
    """In the middle of a stage: the model's own tensors as they were, to the last bit."""
    now = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in start.items())
    moved = [p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n]
    assert moved and all(moved)
    assert all(p.requires_grad == (".lora_" in n) for n, p in model.named_parameters())


def check_merged(model, start: dict, plain) -> None:
    """After a stage: the tree of a model that was just made; linear layers of the decoder moved."""
    assert (
        str(model) == str(plain)
        and vars(model.policy.model).keys() == vars(plain.policy.model).keys()
    )
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) != is_linear(name), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=SLOW)])
def test_sft_trains_adapters_alone_and_ends_with_a_plain_model(toy, kind, checkpointing):
    model, plain, losses = fresh(kind, toy), fresh(kind, toy), []
    start = copy_of(model.state_dict().items())
    for m in (model, plain) if checkpointing else ():
        m.enable_gradient_checkpointing()

    def log(step, metrics):
        losses.append(metrics["loss"])
        if step:
            check_only_adapters_moved(model, start)

    sft.train(model, data.load_rows(str(toy / "sft.jsonl")), SFT, log=log)
    assert losses[2] < losses[0] and len([n for n in start if is_linear(n)]) >= 14
    check_merged(model, start, plain)


def test_the_optimizer_holds_adapters_alone_and_they_are_float32(toy):
    model = load(toy / "init", torch.bfloat16)
    (optimizer,) = sft.optimizers(model, SFT, seed=0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert held == {id(p) for p in adapters} and {p.dtype for p in adapters} == {torch.float32}
    assert sum(p.numel() for p in adapters) < 0.2 * sum(
        p.numel() for p in model.policy.parameters()
    )
    model.merge_adapters()
    assert {p.dtype for p in model.policy.parameters()} == {torch.bfloat16}


def test_the_reference_is_the_policy_as_it_was_before_its_adapters(toy, model):
    before = log_probs(model, toy)
    stir(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with Actors(model, None, None, None, Method(), GRPO).referring() as reference:
        assert torch.equal(log_probs(reference, toy), before)
    assert (log_probs(model, toy) - before).abs().max() > 1e-3
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_adapters_follow_the_seed_and_leave_the_generator_alone(model):
    torch.manual_seed(5)
    expected, made = torch.rand(3), []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        model.add_adapters(4, 8.0, seed)
        assert torch.equal(torch.rand(3), expected)
        made.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
        model.merge_adapters()
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 1, pytest.param(200, marks=SLOW)])  # wider than the layers
def test_what_is_saved_handed_over_and_merged_is_what_was_trained(toy, tmp_path, kind, rank):
    model = fresh(kind, toy).double()
    plain = log_probs(model, toy)
    stir(model, rank)
    before, weights = log_probs(model, toy), copy_of(model.decoder_weights())
    model.save_pretrained(tmp_path)
    assert (before - plain).abs().max() > 1e-3
    engine = TorchEngine(fresh(kind, toy).double(), dtype=torch.float64)
    engine.sync(model)
    model.merge_adapters()
    for m in (model, engine.model, load(tmp_path, torch.float64).double()):
        assert (log_probs(m, toy) - before).abs().max() < 1e-9
    merged = copy_of(model.decoder_weights())
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], value) for name, value in weights.items())


@pytest.mark.parametrize("copied", [False, pytest.param(True, marks=SLOW)])
def test_grpo_with_adapters_samples_from_them_and_refers_to_the_policy_without_them(
    toy, tmp_path, model, copied
):
    start = copy_of(model.state_dict().items())
    engine = Graded(model, dtype=torch.float32 if copied else None)
    run = watched(tmp_path, lambda line: check_only_adapters_moved(model, start))
    run_grpo(run, model, engine, toy)
    check_merged(model, start, fresh("vila", toy))
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    assert all(m["mismatch_max"] < 1e-4 and m["grad_norm"] > 1e-3 for m in metrics)
    assert all(m["kl"] > 1e-3 for m in metrics)
    assert (log_probs(engine.model, toy) - log_probs(model, toy)).abs().max() < 1e-5


def _train(rank, world, toy, out, dtype, sp=1, fsdp=False):
    """SFT, then GRPO, both with adapters; a checkpoint in the middle of GRPO and one after it."""
    model = fresh("vila", toy).to(dtype)
    model.mesh = mrsp.make_mesh(sp, "auto", 4, 2)
    engine = Graded(model, dtype=dtype)
    if fsdp:
        model.enable_gradient_checkpointing()
        model.shard_parameters(dtype)
    start = copy_of(model.state_dict().items())

    def check(line):
        if line["step"] == 1:
            layers = [p for n, p in model.named_parameters() if is_linear(n) and "lora" not in n]
            assert all(isinstance(p, DTensor) == fsdp and not p.requires_grad for p in layers)
            assert all(p.grad is None for p in layers)
            model.save_pretrained(f"{out}/{world}_middle", write=rank == 0)

    def log(step, metrics):
        run.write("metrics.jsonl", {"step": -1} | metrics)

    run = watched(out / f"{world}_{rank}", check)
    sft.train(model, data.load_rows(f"{toy}/sft.jsonl"), SFT, log=log)
    run_grpo(run, model, engine, toy)
    assert all(isinstance(p, DTensor) == fsdp for p in model.policy.parameters())
    for name, value in copy_of(model.state_dict().items()).items():
        assert torch.equal(value, start[name]) != is_linear(name), name
    model.save_pretrained(f"{out}/{world}_end", write=rank == 0)


@pytest.fixture(scope="session")
def one_rank(toy, tmp_path_factory):
    """_train in one process, once for each precision: the folder with what it wrote."""
    out = {dtype: tmp_path_factory.mktemp("one") for dtype in (torch.float32, torch.float64)}
    for dtype, folder in out.items():
        _train(0, 1, toy, folder, dtype)
    return out


RANKS = [(1, False, torch.float64, 1e-9), (1, True, torch.float64, 1e-9)]
RANKS += [(2, True, torch.float64, 1e-9), (1, True, torch.float32, 1e-5)]


@SLOW
@pytest.mark.parametrize("sp, fsdp, dtype, tolerance", RANKS)
def test_two_ranks_train_adapters_like_one(toy, one_rank, tmp_path, sp, fsdp, dtype, tolerance):
    run_ranks(_train, 2, 2, toy, tmp_path, dtype, sp, fsdp)
    # Only rank 0 would write in a run of two ranks; here each has a Run, and a file, of its own.
    one = read_jsonl(one_rank[dtype] / "1_0/metrics.jsonl")
    for rank in (0, 1):
        for a, b in zip(one, read_jsonl(tmp_path / f"2_{rank}/metrics.jsonl"), strict=True):
            for name in {"loss", "grad_norm", "reward", "kl"} & a.keys():
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name
    for name in ("middle", "end"):
        a = load(one_rank[dtype] / f"1_{name}", dtype).state_dict()
        b = load(tmp_path / f"2_{name}", dtype).state_dict()
        assert all((a[n] - b[n]).abs().max() < tolerance for n in a), name


def _in_bfloat16(rank, toy):
    model, plain = fresh("vila", toy), fresh("vila", toy)
    model.shard_parameters(torch.bfloat16)
    losses, rows = [[], []], data.load_rows(f"{toy}/sft.jsonl")
    for kind, seen in zip((model, plain), losses):
        sft.train(kind, rows, SFT, log=lambda step, m, seen=seen: seen.append(m["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0] != losses[1]
    assert {p.dtype for p in model.policy.parameters()} == {torch.float32}  # the masters


@SLOW
def test_adapters_learn_under_sharded_layers_in_bfloat16(toy):
    run_ranks(_in_bfloat16, 2, toy)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--sft.lora_rank 4 --sft.train all", ".*sft: lora_rank needs train llm"),
        ("--sft.lora_rank 4 --sft.train llm --sft.optimizer muon", ".*lora_rank needs .*adamw"),
        ("--sft.lora_rank -1", ".*lora_rank must be at least 0, not -1"),
        ("--grpo.lora_alpha 0", ".*lora_alpha must be above 0"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        train.main(["--preset", "toy", *options.split()])


def test_without_peft_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        model.add_adapters(4, 8.0, seed=0)


def _vllm(rank, toy):
    from test_rollout import CONFIG, SAMPLINGS, VLLMEngine, build, gap

    for kind in ("vila", "qwen untied"):
        model, prompts = build(toy, kind)
        engine = VLLMEngine(model, CONFIG)
        engine.sync(model)
        old = engine.generate(prompts, 4, SAMPLINGS[0])
        stir(model)
        assert gap(model, prompts, old) > 1e-3  # another policy now
        engine.sync(model)
        assert gap(model, prompts, engine.generate(prompts, 4, SAMPLINGS[0])) < 1e-4
        engine.close()


@SLOW
def test_vllm_samples_from_the_merged_weights(toy):
    """In a process of its own: vLLM keeps to the first process group it has seen."""
    pytest.importorskip("vllm")
    run_ranks(_vllm, 1, toy)
