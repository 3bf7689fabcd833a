"""Sequence parallelism changes nothing: log-probs and gradients of S ranks equal those of one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_mrsp import as_torch_norm
from torch.multiprocessing import spawn
from transformers import Qwen2_5_VLTextConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

import mrsp
from model import Policy

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


class TextModel(torch.nn.Module):
    """The decoder of Qwen2.5-VL, whose positions have three rows (M-RoPE), with an LM head."""

    def __init__(self, config):
        super().__init__()
        self.model = Qwen2_5_VLTextModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self):
        return self.model.embed_tokens


def make_policy(heads, kv_heads, mrope=False, dtype=torch.float64, checkpointing=False):
    """A decoder with random weights, norms in full float64, under attention "mrsp"."""
    torch.manual_seed(0)
    sizes = SIZES | dict(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8,
        initializer_range=0.2, attn_implementation="mrsp",
    )  # fmt: skip
    if mrope:
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
        llm = TextModel(Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope))
    else:
        llm = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    llm = llm.to(dtype).train()
    if dtype == torch.float64:
        for layer in llm.model.layers:
            layer.input_layernorm = as_torch_norm(layer.input_layernorm)
            layer.post_attention_layernorm = as_torch_norm(layer.post_attention_layernorm)
        llm.model.norm = as_torch_norm(llm.model.norm)
    if checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(llm)


def make_batch(prompts, mrope=False, dtype=torch.float64):
    """[(P, [R ...], media tokens)] -> a Pack of random prompts, media in their middle."""
    g = torch.Generator().manual_seed(1)
    made, branches = [], []
    for p, answers, n in prompts:
        positions = torch.arange(p)
        if mrope:  # rows that differ, as they do inside a video
            positions = torch.randint(0, p, (3, p), generator=g)
        start = (p - n) // 2
        made.append(
            SimpleNamespace(
                ids=torch.randint(0, 61, (p,), generator=g),
                positions=positions,
                media=torch.randn(n, 32, generator=g, dtype=dtype) if n else None,
                media_at=torch.arange(start, start + n),
            )
        )
        branches.append([torch.randint(0, 61, (r,), generator=g) for r in answers])
    return mrsp.pack(made, branches)


def logps_and_grads(policy, pack, mesh):
    """-> log-probs, entropies, parameter gradients of this rank, for a random upstream gradient."""
    if pack.media is not None:
        pack.media.requires_grad_(True)
    logp, entropy = policy(mrsp.shard(pack, mesh), 0.7)
    up = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2), dtype=logp.dtype)
    (logp * up).sum().backward()
    grads = {n: p.grad for n, p in policy.named_parameters()}
    if pack.media is not None:
        grads["media"] = pack.media.grad
    return logp.detach(), entropy, grads


RAGGED = [(37, [5, 1, 3], 11), (9, [1], 0), (26, [2, 7, 2, 1], 26)]  # odd, text only, all media
TINY = [(1, [1, 1], 0), (3, [1, 4], 1)]  # prompts shorter than the ranks; most ranks have no target
LONG = [(131, [4, 4, 1, 1, 9, 2, 3, 1], 90)]
# name: heads, K/V heads, batch, other settings of make_policy
CASES = {
    "4/2": (4, 2, RAGGED, {}),
    "4/2 long": (4, 2, LONG, {}),
    "6/2 checkpointed": (6, 2, RAGGED, {"checkpointing": True}),
    "28/4": (28, 4, RAGGED, {}),
    "7/1": (7, 1, RAGGED, {}),
    "4/4 tiny": (4, 4, TINY, {}),
    "4/2 M-RoPE": (4, 2, RAGGED, {"mrope": True}),
    "4/2 float32": (4, 2, RAGGED, {"dtype": torch.float32}),
    "4/2 bfloat16": (4, 2, RAGGED, {"dtype": torch.bfloat16}),
}
METHODS = ["ulysses", "gather", "ring", "ulysses+gather", "ulysses+ring", "auto"]
LAYOUTS = [(2, 2), (4, 4), (4, 2), (8, 8)]  # world, sp; (4, 2) is dp x sp = 2 x 2


def run_case(name, mesh):
    heads, kv_heads, prompts, options = CASES[name]
    keep = {k: v for k, v in options.items() if k in ("mrope", "dtype")}
    return logps_and_grads(
        make_policy(heads, kv_heads, **options), make_batch(prompts, **keep), mesh
    )


def compare(name, mesh):
    """The largest difference of a case on this mesh to one process, relative to its size."""
    logp, entropy, grads = run_case(name, mesh)
    expected = run_case(name, mrsp.Mesh())
    worst = [(logp - expected[0]).abs().max(), (entropy - expected[1]).abs().max()]
    for key, value in expected[2].items():
        value, total = value.double(), grads[key].double()
        dist.all_reduce(total)  # over dp groups too, which all do the same work here
        scale = max(1.0, value.abs().max().item())
        worst.append((total / mesh.dp - value).abs().max() / scale)
    return max(x.item() for x in worst)


def _rank(rank, world, sp, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    mrsp.DENSE_LIMIT = 0  # blocks, except where a case says otherwise
    found = {}
    for name, (heads, kv_heads, _, _) in CASES.items():
        if sp == 8 and name not in ("28/4", "4/4 tiny"):
            continue
        for method in METHODS:
            try:
                mesh = mrsp.make_mesh(sp, method, heads, kv_heads)
            except ValueError as error:
                found[name, method] = str(error)
                continue
            found[name, method] = compare(name, mesh)
    if sp < 8:
        mrsp.DENSE_LIMIT = 10**9
        found["4/2", "dense"] = compare("4/2", mrsp.make_mesh(sp, "auto", 4, 2))
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def differences(tmp_path_factory):
    """(world, sp) -> {(case, method): difference}; each layout of ranks runs once."""
    known = {}

    def get(world, sp):
        if (world, sp) not in known:
            folder = tmp_path_factory.mktemp("sp")
            spawn(_rank, (world, sp, folder / "store", folder / "out.pt"), nprocs=world)
            known[world, sp] = torch.load(folder / "out.pt")
        return known[world, sp]

    return get


@pytest.mark.parametrize("world, sp", LAYOUTS)
def test_sharded_logprobs_and_gradients_equal_unsharded(differences, world, sp):
    found = differences(world, sp)
    tolerance = {"4/2 float32": 1e-5, "4/2 bfloat16": 0.1}
    for (name, method), worst in found.items():
        heads, kv_heads = CASES[name][:2]
        if method == "ulysses" and (heads % sp or kv_heads % sp):
            assert "ulysses needs head counts" in worst
        else:
            assert worst < tolerance.get(name, 1e-9), (name, method, worst)
    assert len(found) == (len(METHODS) * 2 if sp == 8 else len(METHODS) * len(CASES) + 1)
