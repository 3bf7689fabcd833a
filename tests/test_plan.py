"""The plan of a run predicts the memory that a step takes."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from pytest import mark, param
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mrsp
from kit import bench, plan
from kit.presets import PRESETS


def shape(layers=2, hidden=64, mlp=192, vocab=512, tied=True):
    config = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=mlp)
    config |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4)
    return config | dict(vocab_size=vocab, tie_word_embeddings=tied)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive after each operation."""

    def __init__(self, held):
        super().__init__()
        self.seen, self.peak = {}, 0
        self.note(held)

    def note(self, values):
        for x in tree_leaves(values):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                known = StorageWeakRef(storage), storage.nbytes()
                self.seen.setdefault(storage._cdata, known)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.seen = {k: v for k, v in self.seen.items() if not v[0].expired()}
        self.note(out)
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return out


WIDE_MLPS = dict(layers=6, hidden=96, mlp=512)
MANY_LOGITS = dict(vocab=4000, hidden=32, mlp=96)
MANY_WEIGHTS = dict(layers=8, hidden=128, mlp=512, tied=False)


@mark.parametrize(
    "sizes, prompt, answers",
    [
        ({}, 700, [20] * 4),
        (MANY_LOGITS, 600, [64] * 4),
        param(WIDE_MLPS, 600, [10] * 8, marks=mark.slow),
        param(MANY_WEIGHTS, 600, [16] * 2, marks=mark.slow),
    ],
)
def test_predicted_memory_is_within_a_fifth_of_the_counted(sizes, prompt, answers, monkeypatch):
    monkeypatch.setattr(mrsp, "DENSE_LIMIT", 0)  # by blocks, as long sequences are
    tiny = shape(**sizes)
    policy, (layer, rest) = bench.decoder(tiny), plan.parameters(tiny)
    assert sum(p.numel() for p in policy.parameters()) == tiny["num_hidden_layers"] * layer + rest
    optimizer = torch.optim.AdamW(policy.parameters())
    branches = [[torch.ones(r, dtype=torch.long) for r in answers]]
    pack = mrsp.pack([bench.text_prompt(prompt, tiny["vocab_size"])], branches)
    for p in policy.parameters():  # the optimizer's averages exist from its first step on
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    held = [list(policy.parameters()), [list(s.values()) for s in optimizer.state.values()]]
    with LiveBytes(held) as counted:
        policy(mrsp.shard(pack, mrsp.Mesh()))[0].sum().backward()
        optimizer.step()
    predicted = plan.memory(tiny, prompt, sum(answers), c=4, sampler=None, reference=False)["total"]
    assert abs(predicted / counted.peak - 1) < 0.2, (predicted, counted.peak)


def test_memory_of_a_7b_falls_with_the_ranks_and_grows_with_the_video():
    qwen = plan.QWEN_7B
    one, eight = (plan.memory(qwen, 256_000, 16_384, n, n) for n in (1, 8))
    assert eight["optimizer"] * 8 == one["optimizer"] and eight["layer"] * 8 == one["layer"]
    assert plan.memory(qwen, 512_000, 16_384, 8, 8)["total"] > eight["total"]


def test_a_sampler_that_sleeps_counts_in_rollouts_alone():
    hour = {"gpus": 8, "sp": 8, "prefill": 8192}
    stays = plan.memory(plan.QWEN_7B, 259_363, 16_384, sampler="torch", **hour)
    sleeps = plan.memory(plan.QWEN_7B, 259_363, 16_384, sampler="vllm", **hour)
    held = sum(sleeps[name] for name in ("weights", "optimizer", "reference"))
    rollout = sleeps["sampler"] + sleeps["rollout"]
    assert sleeps["total"] == held + rollout  # more than training takes
    training = stays["total"] - held - stays["sampler"]  # here the sampler is there as well
    assert 0 < training < rollout < training + stays["sampler"]
    most = plan.memory(plan.QWEN_7B, 259_363, 16_384, sampler="vllm", reserved=5e10, **hour)
    assert most["total"] == held + 5e10
    alone = plan.memory(plan.QWEN_7B, 259_363, 16_384, sampler="vllm", reference=False, **hour)
    assert alone["total"] == held - sleeps["reference"] + rollout


def test_host_memory_is_that_of_a_step_s_embeddings_and_of_vllm(monkeypatch):
    """32 prompts of an hour, 259,363 tokens of 3,584 numbers in bfloat16, on 8 ranks of a node."""
    hour = PRESETS["hour"]
    each = 259_363 * 3584 * 2
    model = SimpleNamespace(policy=torch.nn.Linear(100, 2**20, bias=False, device="meta"))

    def lines(sampler="vllm", have=2**50, **media):
        s = replace(hour, media=replace(hour.media, **media))
        found = plan.Plan()
        plan.check_host_memory(s, model, 8, sampler, each, have, found)
        return found.lines[0], found.lacking

    requests = 8 * 4 * each / 2**30  # each rank samples for 4 of them
    mapped, lacking = lines()
    assert f"32 prompts 0.0 GiB (mapped from --cache_dir, {32 * each / 2**30:.1f} GiB" in mapped
    assert f"vLLM's requests {requests:.1f} GiB" in mapped and not lacking
    held, lacking = lines("torch", cache_dir=None)  # all of them on each rank
    assert f"32 prompts {8 * 32 * each / 2**30:.1f} GiB (on each" in held and "s 0.0 GiB" in held
    assert lines(have=int(1.2 * requests * 2**30))[1] == []
    assert "--cache_dir FOLDER" in lines(have=int(requests * 2**30))[1][0]
    monkeypatch.setattr(plan, "AT_ONCE", each // 2)  # at least one prompt at a time
    assert f"requests {8 * each / 2**30:.1f} GiB" in lines()[0]
    hour = replace(hour, rollout=replace(hour.rollout, sleep_level=1))
    weights = 8 * 2 * 100 * 2**20
    assert f"requests {(8 * each + weights) / 2**30:.1f} GiB" in lines()[0]
