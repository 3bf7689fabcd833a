"""Sequence parallelism changes nothing: log-probs and gradients of S ranks equal those of one."""

import random
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from conftest import run_ranks
from test_mrsp import torch_norms
from torch._subclasses.fake_tensor import FakeTensorMode

import mrsp
from model import Policy

# ---------------------------------------------------------------------------- a model, a batch

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(head_dim=8, initializer_range=0.2, attn_implementation="mrsp")


def make_policy(heads, kv_heads, mrope=False, dtype=torch.float64, checkpointing=False, levels=0):
    """A decoder with random weights, norms in full float64, under attention "mrsp"."""
    torch.manual_seed(0)
    sizes = SIZES | dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    if levels:
        rope["mrope_interleaved"] = True
        body = hf.Qwen3VLTextModel(hf.Qwen3VLTextConfig(**sizes, rope_parameters=rope))
    elif mrope:
        body = hf.Qwen2_5_VLTextModel(hf.Qwen2_5_VLTextConfig(**sizes, rope_parameters=rope))
    else:
        body = hf.Qwen2Model(hf.Qwen2Config(**sizes))
    head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"], bias=False)
    if not mrope and not levels:  # tied
        head.weight = body.embed_tokens.weight
    policy = Policy(body, head).to(dtype).train()
    if dtype == torch.float64:
        torch_norms(policy)
    if checkpointing:
        body.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def make_batch(prompts, mrope=False, dtype=torch.float64, levels=0, checkpointing=False):
    """[(P, [R ...], media tokens)] -> a Pack of random prompts, media in their middle."""
    width = 32 * (1 + levels)
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
                media=torch.randn(n, width, generator=g, dtype=dtype) if n else None,
                media_at=start + torch.randperm(n, generator=g),  # in any order
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
    "14/2": (14, 2, RAGGED, {}),
    "28/4": (28, 4, RAGGED, {}),
    "7/1": (7, 1, RAGGED, {}),
    "4/4": (4, 4, RAGGED, {}),
    "4/4 tiny": (4, 4, TINY, {}),
    "4/2 M-RoPE": (4, 2, RAGGED, {"mrope": True}),
    "4/2 deepstack": (4, 2, RAGGED, {"mrope": True, "levels": 2}),
    "4/2 float32": (4, 2, RAGGED, {"dtype": torch.float32}),
    "4/2 bfloat16": (4, 2, RAGGED, {"dtype": torch.bfloat16}),
}
# Largest difference to one process. bfloat16 has 8 bits, and sharding adds its numbers up in
# another order: log-probs of size 5 differ by some of their last bits.
TOLERANCE = {"4/2 float32": 1e-5, "4/2 bfloat16": 0.1}

# Ranks, sp, cases: the methods that run there. The code has four paths: exchange of heads (U > 1),
# gather, ring, and none of them (O = 1); a method names which a layout takes. So chosen that
# - every method runs on 2, on 4 and on 2 x 2 ranks if it can: 2 ranks have no product (U or O is
#   2), 4 ranks with 4/4 heads have U = 4, with 4/2, 6/2 and 14/2 heads U x O = 2 x 2, 28/4 heads on
#   8 ranks U x O = 4 x 2, and 7/1 heads cannot be split: U = 1;
# - rings have 2, 4 and 8 ranks (1, 3 and 7 steps); 2 x 2 groups of ranks do not mix;
# - "dense" is ulysses with the dense mask, which a short sequence takes when all ranks split heads;
# - each property of a batch (M-RoPE, checkpointing, precision, long, tiny) meets heads exchanged,
#   a gather, and a ring, but not each on each layout: the batch is not what they look at.
RUNS = {
    "2 2 quick": "4/4 tiny: ulysses gather ring, 4/2 M-RoPE: ulysses",
    "2 2": "4/2: ulysses dense gather ring, 4/2 deepstack: ulysses ring, 4/2 float32: gather, "
    "4/2 bfloat16: ring, 6/2 checkpointed: ring, 7/1: auto",
    "4 4": "4/2: gather ring ulysses+gather ulysses+ring auto, 4/4: ulysses dense, "
    "4/4 tiny: ulysses gather ring, 4/2 long: gather ulysses+ring, 14/2: ulysses+ring, "
    "6/2 checkpointed: ulysses+gather ring, 4/2 M-RoPE: ulysses+ring gather, 7/1: ring, "
    "4/2 deepstack: ulysses+ring, 4/2 float32: ulysses+ring, 4/2 bfloat16: ulysses+gather",
    "4 2": "4/2: ulysses gather ring, 4/4 tiny: ulysses gather ring, 4/2 M-RoPE: ring",
    "8 8": "28/4: ulysses+ring auto, 4/4 tiny: ring",
}
SLOW = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in list(RUNS)[1:]]


def run_case(name, mesh):
    heads, kv_heads, prompts, options = CASES[name]
    policy, pack = make_policy(heads, kv_heads, **options), make_batch(prompts, **options)
    return logps_and_grads(policy, pack, mesh)


def compare(found, expected, mesh) -> float:
    """The largest difference of a case on this mesh to one process, relative to its size; of all
    ranks."""
    logp, entropy, grads = found
    worst = [(logp - expected[0]).abs().max(), (entropy - expected[1]).abs().max()]
    for key, value in expected[2].items():
        value, total = value.double(), grads[key].double()
        dist.all_reduce(total)  # over dp groups too, which all do the same work here
        scale = max(1.0, value.abs().max().item())
        worst.append((total / mesh.dp - value).abs().max() / scale)
    worst = torch.stack([x.double() for x in worst]).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def _compare_rank(rank, sp, runs, known):
    expected = torch.load(known)
    for name, methods in runs.items():
        for method in methods.split():
            mrsp.DENSE_LIMIT = 10**9 if method == "dense" else 0  # 0: blocks, even if it is short
            how = "ulysses" if method == "dense" else method
            mesh = mrsp.make_mesh(sp, how, *CASES[name][:2])
            worst = compare(run_case(name, mesh), expected[name], mesh)
            assert worst < TOLERANCE.get(name, 1e-9), (name, method, worst)


@cache
def one_process(name):
    """The case by the dense mask."""
    return run_case(name, mrsp.Mesh())


@pytest.mark.parametrize("ranks", ["2 2 quick", *SLOW])
def test_sharded_logprobs_and_gradients_equal_unsharded(ranks, tmp_path):
    known = tmp_path / "expected.pt"
    runs = dict(run.split(": ") for run in RUNS[ranks].split(", "))
    torch.save({name: one_process(name) for name in runs}, known)
    world, sp, *_ = ranks.split()
    run_ranks(_compare_rank, int(world), int(sp), runs, known)


# -------------------------------------------------------------------------- attention by itself


def random_share(mesh, heads, kv_heads, prompts, seed=5):
    """This rank's share of a batch, and random q, k, v (B, H, Ls, D) of its tokens."""
    share = mrsp.shard(make_batch(prompts), mesh)
    g = torch.Generator().manual_seed(seed + mesh.rank)
    b, n = share.ids.shape
    q, k, v, up = (
        torch.randn(b, h, n, 8, generator=g, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    held = share.layout.q_segment[:, mesh.inner_rank :: mesh.ulysses]
    real = held >= 0  # padding's output is of no interest
    return share.layout, [x.requires_grad_() for x in (q, k, v)], up * real[:, None, :, None], real


def attend(naive, layout, qkv, up):
    """Output, and gradients of q, k, v."""
    if naive:
        out = mrsp.attention_naive(*qkv, layout, 0.3)
    else:
        out = mrsp.mrsp_attention(None, *qkv, None, layout, scaling=0.3)[0].transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, qkv, up)]


def _naive_rank(rank, sp):
    mrsp.DENSE_LIMIT = 0
    passes, real_pass = [], mrsp.ring_pass

    def counted(*what):
        passes.append(1)
        return real_pass(*what)

    mrsp.ring_pass = counted
    cases = [(4, 4, "ulysses"), (4, 2, "gather"), (4, 2, "ring"), (4, 2, "ulysses+gather")]
    cases += [(4, 2, "ulysses+ring"), (14, 2, "auto"), (7, 1, "auto")]
    for heads, kv_heads, method in cases:
        for prompts in (RAGGED, TINY, LONG):
            case = sp, heads, kv_heads, method, len(prompts)
            mesh = mrsp.make_mesh(sp, method, heads, kv_heads)
            layout, qkv, up, real = random_share(mesh, heads, kv_heads, prompts)
            naive = attend(True, layout, qkv, up)
            passes.clear()
            found = attend(False, layout, qkv, up)
            # K/V go to the next rank O - 1 times, backward too; their gradients as often.
            rings = 3 * (mesh.outer - 1) if method.endswith("ring") else 0
            assert len(passes) == rings, case
            for a, b in zip(found, naive, strict=True):
                assert ((a - b) * real[:, None, :, None]).abs().max() < 1e-9, case
            if method == "auto" and mesh.outer > 1:  # above RING_BYTES the same in a ring
                limit, mrsp.RING_BYTES = mrsp.RING_BYTES, 1
                for a, b in zip(attend(False, layout, qkv, up), found, strict=True):
                    assert (a - b).abs().max() < 1e-9, case
                assert len(passes) == 3 * (mesh.outer - 1), case
                mrsp.RING_BYTES = limit


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_method_equals_the_naive_attention(world):
    """On random q, k, v; output and input gradients; auto is gather or ring, by size."""
    run_ranks(_naive_rank, world, world)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_the_dense_mask_and_blocks_of_one_rank_equal_the_naive_attention(heads, monkeypatch):
    layout, qkv, up, real = random_share(mrsp.Mesh(), *heads, RAGGED)
    naive = attend(True, layout, qkv, up)
    for limit in (0, 10**9):
        monkeypatch.setattr(mrsp, "DENSE_LIMIT", limit)
        for a, b in zip(attend(False, layout, qkv, up), naive, strict=True):
            assert ((a - b) * real[:, None, :, None]).abs().max() < 1e-12


def test_auto_takes_the_ring_above_ring_bytes(monkeypatch):
    """All K and V of a prompt together: 2 tensors x 3 ranks x 2 heads x 4 tokens x 5 x 8 bytes."""
    k = torch.zeros(1, 2, 9, 5, dtype=torch.float64)
    layout = mrsp.Layout(*(k,) * 4, travels=4)
    cases = [("auto", 1919, True), ("auto", 1920, False)]
    cases += [("ring", 10**9, True), ("gather", 1, False)]
    for method, limit, ring in cases:
        monkeypatch.setattr(mrsp, "RING_BYTES", limit)
        layout.mesh = mrsp.Mesh(outer=3, method=method)
        assert mrsp.use_ring(layout, k) == ring, (method, limit)


# ------------------------------------------------------------------------------ who takes what


@pytest.mark.parametrize(
    "method, sp, heads, ulysses, travel, words",
    [
        ("auto", 1, (28, 4), 1, "auto", "no sequence parallelism"),
        ("ring", 1, (28, 4), 1, "auto", "no sequence parallelism"),
        ("auto", 8, (32, 8), 8, "auto", "= ulysses 8 x 1 "),
        ("auto", 8, (28, 4), 4, "auto", "= ulysses 4 x 2 .*K/V are gathered, above 2 GiB"),
        ("auto", 4, (12, 9), 1, "auto", "= ulysses 1 x 4 .*12 query and 9 K/V heads: at most 1 "),
        ("ulysses", 4, (28, 4), 4, "auto", "= ulysses 4 x 1 "),
        ("gather", 4, (28, 4), 1, "gather", "= ulysses 1 x 4 .*K/V travel by gather, as asked"),
        ("ring", 4, (28, 4), 1, "ring", "= ulysses 1 x 4 .*K/V travel by ring, as asked"),
        ("ulysses+gather", 8, (28, 4), 4, "gather", "= ulysses 4 x 2 .*by gather, as asked"),
        ("ulysses+ring", 6, (28, 4), 2, "ring", "= ulysses 2 x 3 .*by ring, as asked"),
        ("ulysses+ring", 4, (28, 4), 4, "auto", r"= ulysses 4 x 1 \(28 query.*split them\)$"),
    ],
)
def test_the_method_follows_heads_and_ranks(method, sp, heads, ulysses, travel, words):
    u, how, why = mrsp.choose_method(method, sp, *heads)
    assert (u, how) == (ulysses, travel) and re.search(words, why), why
    assert sp == 1 or why.startswith(f"{sp} ranks a sequence")


def test_impossible_methods_and_ranks_are_refused():
    with pytest.raises(ValueError, match="one of auto, ulysses, .*, not 'Ring'"):
        mrsp.choose_method("Ring", 2, 4, 2)
    with pytest.raises(ValueError, match="8 ranks divide.*28 query and 4 K/V.*--sp_attention auto"):
        mrsp.choose_method("ulysses", 8, 28, 4)
    for sp in (0, -1, 2):
        with pytest.raises(ValueError, match=f"--sp {sp} does not divide the 1 ranks"):
            mrsp.make_mesh(sp)


def random_row(rng, prompt=40, answers=9):
    """Segment and order (L,) of a packed row."""
    p = rng.randint(1, prompt)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, answers))]
    pack = make_batch([(p, lengths, 0)])
    return pack.segment[0], pack.order[0]


def test_a_deal_gives_every_token_once_and_all_ranks_alike():
    rng = random.Random(0)
    for _ in range(500):
        outer = rng.randint(1, 8)
        segment, order = random_row(rng)
        prompt = int((segment == 0).sum())
        parts = mrsp.deal(segment, outer)
        assert len(parts) == outer
        assert torch.cat(parts).sort().values.equal(torch.arange(len(segment)))
        # The prompt comes first, in order; each rank has as much of it, and of its work: token t
        # sees t + 1 others.
        own = [part[part < prompt] for part in parts]
        assert all(part[: len(mine)].equal(mine) for part, mine in zip(parts, own))
        assert all((mine.diff() > 0).all() for mine in own)
        sizes = [len(mine) for mine in own]
        assert max(sizes) - min(sizes) <= 2
        work = [int((mine + 1).sum()) for mine in own]
        assert max(work) - min(work) <= 2 * prompt + 2
        # Answers are whole. They even out the rest: no rank exceeds another by more than one.
        lengths = segment.bincount().tolist()
        spans = [mrsp.find_spans(segment[part], order[part]) for part in parts]
        answers = [span for row in spans for span in row if span[0]]
        assert sorted(answers) == [(g, prompt, prompt + r) for g, r in enumerate(lengths) if g]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= max(2, *lengths[1:])


def rule(queries, keys):
    """Rule (*), written out token by token: (Lq, Lk) of 0 and 1."""
    q, k = ([(s, t) for s, a, b in spans for t in range(a, b)] for spans in (queries, keys))
    seen = [[ks in (0, qs) and kt <= qt for ks, kt in k] for qs, qt in q]
    return torch.tensor(seen, dtype=torch.long).view(len(q), len(k))


def painted(plan, shape):
    """How often the blocks of a plan cover each pair."""
    seen = torch.zeros(shape, dtype=torch.long)
    for q0, q1, k0, k1, causal in plan:
        assert 0 <= q0 < q1 <= shape[0] and 0 <= k0 < k1 <= shape[1]  # none empty, none outside
        assert not causal or q1 - q0 == k1 - k0  # a diagonal only in squares
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.long)
        seen[q0:q1, k0:k1] += block.tril() if causal else block
    return seen


@pytest.mark.parametrize("outer, ulysses", [(1, 4), (4, 1), (2, 2), (1, 8)])
def test_every_target_is_one_ranks_and_ranks_have_as_many(outer, ulysses):
    """The LM head's work is shared, also where all answers stand at the end of the sequence. Of an
    answer's R tokens U ranks have R / U each, of whole answers an outer rank at most one more."""
    pack, n = make_batch(LONG + RAGGED), outer * ulysses
    shares = [mrsp.shard(pack, mrsp.Mesh(r, outer=outer, ulysses=ulysses)) for r in range(n)]
    every = torch.cat([share.target_at for share in shares])
    assert every.sort().values.equal(torch.arange(len(pack.targets)))
    assert torch.cat([share.targets for share in shares]).equal(pack.targets[every])
    answers = int((pack.step == 0).sum())
    longest = int(pack.step.max()) + 1
    counts = [len(share.targets) for share in shares]
    assert max(counts) - min(counts) <= (longest if outer > 1 else 0) + answers


def test_planned_blocks_are_the_rule_for_any_spans():
    rng = random.Random(1)

    def spans():
        out = []
        for _ in range(rng.randint(0, 5)):
            start = rng.randint(0, 12)
            out.append((rng.randint(0, 3), start, start + rng.randint(1, 8)))
        return out

    for _ in range(1000):
        queries, keys = spans(), spans()
        expected = rule(queries, keys)
        assert painted(mrsp.plan_blocks(queries, keys), expected.shape).equal(expected)


def test_planned_blocks_of_all_ranks_are_the_rule_for_the_whole_row():
    """The plan of every pair of ranks, for the parts of a dealt row; and few blocks."""
    rng = random.Random(2)
    for _ in range(100):
        outer = rng.randint(1, 4)
        segment, order = random_row(rng)
        part = mrsp.deal(segment, outer)
        longest = max(len(columns) for columns in part)
        held = [
            mrsp.stack([x[at] for at in part], longest, -1) for x in (segment, order)
        ]  # (O, Lo)
        spans = [mrsp.find_spans(segment[columns], order[columns]) for columns in part]
        prompts = [[span for span in row if span[0] == 0] for row in spans]
        for me in range(outer):
            two = [x[:, None].repeat(1, 2, 1) for x in held]  # two rows that are alike
            layout = mrsp.make_layout(*two, mrsp.Mesh(me, outer=outer))
            assert layout.travels == max(sum(b - a for _, a, b in row) for row in prompts)
            for source, plan in enumerate(layout.plan):
                theirs = spans[me] if source == me else prompts[source]  # no others' answers
                expected = rule(spans[me], theirs)
                assert all(q[:2] == k[:2] and q[1] == slice(None) for q, k, _ in plan)
                for b in range(2):
                    row = [block for block in plan if block[0][0] == slice(b, b + 1)]
                    ends = [(q.start, q.stop, k.start, k.stop, c) for (*_, q), (*_, k), c in row]
                    assert painted(ends, expected.shape).equal(expected)
                    # prompt chunks: at most 4 pairs; one rectangle a chunk for all answers; a
                    # diagonal an answer
                    answers = sum(span[0] > 0 for span in spans[me]) if source == me else 0
                    assert len(row) <= 4 + 2 + answers
                assert len(plan) == 2 * len(row)


# -------------------------------------------------------------------------------------- kernels


def block_inputs(dtype=torch.float64, device="cpu", lq=6, lk=6, heads=(4, 2), width=8):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, h, n, width, generator=g, dtype=torch.float64).to(device, dtype)
        for h, n in ((heads[0], lq), (heads[1], lk), (heads[1], lk), (heads[0], lq))
    ]


def both_passes(q, k, v, grad, causal):
    """-> out, lse, dq, dk, dv of one block that is a part of more keys: its final out and lse are
    not its own."""
    out, lse = mrsp.block_forward(q, k, v, causal, 0.3)
    final = (out * 0.7).to(q.dtype), lse + 0.4
    return [out, lse, *mrsp.block_backward(grad, q, *final, k, v, causal, 0.3)]


def test_the_kernel_follows_device_precision_and_width():
    half, full = torch.bfloat16, torch.float32

    def chosen(device, dtype, width):
        with FakeTensorMode():
            return mrsp.kernel(torch.empty(1, 2, 3, width, device=device, dtype=dtype))

    assert chosen("cpu", half, 8) == chosen("cpu", full, 7) == "cpu"
    assert chosen("meta", half, 8) == chosen("cuda", full, 64) == "plain"
    assert chosen("cuda", half, 12) == chosen("cuda", half, 264) == "plain"
    assert chosen("cuda", half, 256) == chosen("cuda", torch.float16, 8) == "cuda"


def test_the_cuda_kernel_is_called_by_its_schema():
    """On tensors without data: arguments and shapes of both passes, on machines without a GPU."""
    with FakeTensorMode():
        q, grad = (torch.empty(1, 4, 5, 64, device="cuda", dtype=torch.bfloat16) for _ in "qg")
        k, v = (torch.empty(1, 2, 9, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        out, lse, *grads = both_passes(q, k, v, grad, False)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_the_plain_block_gives_the_same_as_the_kernel(monkeypatch):
    for heads, lq, lk, causal in ((4, 2), 6, 6, True), ((6, 2), 5, 9, False), ((3, 3), 1, 1, True):
        inputs = block_inputs(heads=heads, lq=lq, lk=lk)
        found = both_passes(*inputs, causal)
        with monkeypatch.context() as patch:
            patch.setattr(mrsp, "kernel", lambda q: "plain")
            expected = both_passes(*inputs, causal)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-12, heads


def whole_attention(name, monkeypatch, dtype=torch.float64, device="cpu"):
    """BlockAttention over a packed row by one kernel: output, and gradients of q, k, v."""
    monkeypatch.setattr(mrsp, "kernel", lambda q: name)
    segment = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([37, 5, 1, 3]))
    order = torch.cat([torch.arange(37), *(37 + torch.arange(r) for r in (5, 1, 3))])
    layout = mrsp.make_layout(segment[None, None], order[None, None])
    q, k, v, up = block_inputs(dtype, device, 46, 46, width=64)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    out = mrsp.BlockAttention.apply(*qkv, layout, 0.125)
    return [out.detach(), *torch.autograd.grad(out, qkv, up)]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def close(found, expected):
    """bfloat16 on CUDA against float64 on the CPU: 8 bits."""
    for a, b in zip(found, expected, strict=True):
        a, b = a.double().cpu(), b.double().cpu()
        assert (a - b).abs().max() < 0.03 * max(1.0, b.abs().max().item())


@needs_gpu
@pytest.mark.parametrize("name", ["cuda", "plain"])
def test_on_cuda_blocks_and_what_they_make_equal_the_plain_kernel(name, monkeypatch):
    for lq, lk, causal in ((65, 65, True), (33, 130, False), (1, 1, True)):
        shape = dict(lq=lq, lk=lk, heads=(6, 2), width=64)
        monkeypatch.setattr(mrsp, "kernel", lambda q: name)
        found = both_passes(*block_inputs(torch.bfloat16, "cuda", **shape), causal)
        monkeypatch.setattr(mrsp, "kernel", lambda q: "plain")
        rounded = [x.double() for x in block_inputs(torch.bfloat16, **shape)]
        close(found, both_passes(*rounded, causal))
    found = whole_attention(name, monkeypatch, torch.bfloat16, "cuda")
    close(found, whole_attention("plain", monkeypatch))
