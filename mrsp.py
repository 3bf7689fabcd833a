"""MR-SP: one packed sequence for a prompt and its G answers, over many ranks; media encoded once.

GRPO trains G sampled answers to ONE prompt, and the prompt of a long video is long: P = 256,000
tokens against R = 1,000 of an answer. Nothing in it depends on the answers: one copy is enough.

    naive   [ prompt | r_1 ]  [ prompt | r_2 ]  ...  [ prompt | r_G ]     G * (P + R) tokens
    packed  [ prompt | r_1 | r_2 | ... | r_G ]                            P + sum(R) tokens

A token carries a segment (0 = prompt, g = answer g, -1 = padding) and its order within prompt +
answer; query i sees key j if

    (segment[j] == 0  or  segment[j] == segment[i])   and   order[j] <= order[i]        (*)

                     keys:  prompt   r_1    r_2
    queries: prompt         causal    .      .       Positions (RoPE) continue from the prompt in
             r_1            all     causal   .       every answer, as if the others were not there.
             r_2            all       .    causal

Log-probs and gradients are exactly those of the copies. (*) enters unmodified Hugging Face models
as one attention function, "mrsp"; the Layout travels as a keyword, model(..., mrsp=layout), and so
survives gradient checkpointing. Sampling and SFT (many questions about a video) use it too.

Stage 1 of the paper's MR-SP (section 5): all ranks together encode a video (encode_parallel), and
its embeddings are kept (EmbeddingCache). Stage 2: the packed sequence is sharded over S = O x U
ranks. Only attention needs the others:

    U, Ulysses   tokens are exchanged for heads, (H, L/U) a rank -> (H/U, L), and back: an exact
                 split of the work, but U must divide the heads of queries and of keys.
    O, zigzag    rank r of O holds chunks r and 2O-1-r of the prompt's 2O (the pairs have equal
                 work) and some of the answers, whole. Only the prompt's keys and values (K/V)
                 travel: "gather", everything at once, or "ring", piece by piece.
                  rank 0    [ c0 | c3 | r_1 ]     O = 2, four chunks, two answers
                  rank 1    [ c1 | c2 | r_2 ]

Large systems run Ulysses or a ring over G copies, padded or cut until the length divides.
DEVIATION 1: one packed sequence instead of G copies (section 5 trains 5 full copies).
DEVIATION 2: embeddings outlive the step: kept in memory, and on disk across epochs and runs.
DEVIATION 3: the paper shards evenly in order; here the prompt is dealt in zigzag when O > 1.

Glossary: B prompts, G answers a prompt, P prompt tokens, R answer tokens, L packed length, Ls
tokens on a rank, M predicted tokens of a batch, H heads (Hkv of keys), D width of a head or of an
embedding, F frames. A process group of None is this rank alone; some collectives take CPU tensors:
on GPUs start with init_process_group("cpu:gloo,cuda:nccl"). Copied alone it needs no other file.
Check this file alone:  pytest tests/test_mrsp.py tests/test_sp.py tests/test_cache.py
"""

import functools
import hashlib
import importlib
import math
import os
import time
import uuid
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

# torch 2.13 renamed these two; the old names warn there, the new ones are missing before.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

DENSE_LIMIT = 2048  # longest packed sequence for which the (L, L) mask is built
SUFFIX = ".mrsp.safetensors"  # of the cache's files
RING_BYTES = 2 << 30  # "auto": K/V of a prompt and layer above this travel in a ring, not at once


# ---------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands among dp x O x U ranks, U innermost (neighbours, on one node).
    The groups are process groups of this rank: sp_group has all S ranks of a sequence, outer_group
    the O ranks with the same heads, inner_group the U ranks that share a shard. None: just me."""

    rank: int = 0
    dp: int = 1
    outer: int = 1  # O
    ulysses: int = 1  # U
    method: str = "auto"  # how K/V travel among the outer ranks: gather, ring, or auto
    sp_group: object = None
    outer_group: object = None
    inner_group: object = None
    why: str = ""  # this choice, in a sentence

    @property
    def sp(self) -> int:
        return self.outer * self.ulysses

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    @property
    def outer_rank(self) -> int:
        return self.sp_rank // self.ulysses


def choose_method(method: str, sp: int, heads: int, kv_heads: int) -> tuple[int, str, str]:
    """--sp_attention -> (U, how K/V travel, a sentence that says which and why).
    auto takes the largest U that divides the ranks and both kinds of heads (it splits the work
    exactly and moves the least), and gather for the rest: simplest, and indifferent to heads.

    >>> [choose_method("auto", 8, *heads)[:2] for heads in ((32, 8), (28, 4), (14, 2), (9, 3))]
    [(8, 'auto'), (4, 'auto'), (2, 'auto'), (1, 'auto')]
    """
    known = ("auto", "ulysses", "gather", "ring", "ulysses+gather", "ulysses+ring")
    if method not in known:
        raise ValueError(f"sp_attention must be one of {', '.join(known)}, not {method!r}")
    most = math.gcd(heads, kv_heads, sp)
    if method == "ulysses" and most < sp:
        raise ValueError(
            f"ulysses needs head counts that {sp} ranks divide, but the model has {heads} query "
            f"and {kv_heads} K/V heads: use --sp_attention auto or gather"
        )
    if sp == 1:
        return 1, "auto", "no sequence parallelism: one rank a sequence"
    ulysses = 1 if method in ("gather", "ring") else most
    outer = sp // ulysses
    why = f"{sp} ranks a sequence = ulysses {ulysses} x {outer} "
    why += f"({heads} query and {kv_heads} K/V heads: at most {most} ranks can split them)"
    if outer == 1:
        return ulysses, "auto", why
    if method == "auto":
        gathered = f"; K/V are gathered, above {RING_BYTES >> 30} GiB a layer passed in a ring"
        return ulysses, "auto", why + gathered
    travel = method.rpartition("+")[2]
    return ulysses, travel, f"{why}; K/V travel by {travel}, as asked"


def make_mesh(sp: int = 1, method: str = "auto", heads: int = 1, kv_heads: int = 1) -> Mesh:
    """The Mesh of this rank; every rank calls it (making process groups is a collective)."""
    rank = 0 if alone() else dist.get_rank()
    world = 1 if alone() else dist.get_world_size()
    if sp < 1 or world % sp:
        raise ValueError(
            f"--sp {sp} does not divide the {world} ranks: torchrun --nproc_per_node {sp}"
        )
    u, travel, why = choose_method(method, sp, heads, kv_heads)

    def mine(groups):  # (n, ranks of each): every rank makes all n process groups, and gets its own
        each = groups.tolist()
        return dist.new_subgroups_by_enumeration(each)[0] if len(each[0]) > 1 else None

    grid = torch.arange(world).view(-1, sp // u, u)  # (dp, O, U)
    groups = mine(grid.flatten(1)), mine(grid.mT.flatten(0, 1)), mine(grid.flatten(0, 1))
    return Mesh(rank, world // sp, sp // u, u, travel, *groups, why)


# -------------------------------------------------------------------------------------- layout

Span = tuple[int, int, int]  # (segment, first order, end): consecutive tokens of one segment
Block = tuple[int, int, int, int, bool]  # queries [q0, q1) see keys [k0, k1); causal, or all


def plan_blocks(queries: list[Span], keys: list[Span]) -> list[Block]:
    """Rule (*) as rectangles, for queries and keys that are back to back in memory. Squares are
    causal, the rest is full: kernels disagree on where a rectangle's diagonal begins. Empty ones
    are left out: the kernels crash on them.

    >>> row = [(0, 0, 2), (1, 2, 3), (2, 2, 4)]  # prompt of 2, answers of 1 and 2
    >>> plan_blocks(row, row)
    [(0, 2, 0, 2, True), (2, 5, 0, 2, False), (2, 3, 2, 3, True), (3, 5, 3, 5, True)]
    """
    plan = []
    k_at = 0  # where this span of keys begins in memory
    for k_seg, k0, k1 in keys:
        q_at = 0
        for q_seg, q0, q1 in queries:
            low, high = max(q0, k0), min(q1, k1)  # the orders that both spans have
            found = [
                (q0, q1, k0, min(k1, q0), False),  # keys before all of the queries
                (low, high, low, high, True),  # the diagonal
                (high, q1, low, high, False),  # queries behind the diagonal
            ]
            for a, b, c, d, causal in found:
                if k_seg in (0, q_seg) and a < b and c < d:
                    columns = (c - k0 + k_at, d - k0 + k_at)
                    add_block(plan, (a - q0 + q_at, b - q0 + q_at, *columns, causal))
            q_at += q1 - q0
        k_at += k1 - k0
    return plan


def add_block(plan: list[Block], block: Block) -> None:
    """Append it; a full one that continues the last one below joins it: one for all answers."""
    q0, q1, k0, k1, causal = block
    if plan and not causal and plan[-1][1:] == (q0, k0, k1, False):
        block = (plan.pop()[0], q1, k0, k1, False)
    plan.append(block)


@dataclass
class Layout:
    """Who sees whom, for the attention function. Queries (B, Lq) and keys (B, Lk) carry segment and
    order: what the dense form needs. While training they are the same tokens, while sampling the
    keys are the whole cache. parts: for each of the O outer ranks, for each row, the spans that it
    holds, back to back; needed by the block form. None while sampling."""

    q_segment: Tensor
    q_order: Tensor
    k_segment: Tensor
    k_order: Tensor
    parts: list[list[list[Span]]] | None = None
    mesh: Mesh = field(default_factory=Mesh)
    _mask: Tensor | None = field(default=None, repr=False)

    def mask(self) -> Tensor:
        """Rule (*) as a boolean (B, 1, Lq, Lk); built once, used by every layer."""
        if self._mask is None:
            q_segment, k_segment = self.q_segment[:, :, None], self.k_segment[:, None]
            # (B, Lq, Lk). Padding (-1) sees padding: a row of the softmax must not be empty.
            seen = (k_segment == 0) | (k_segment == q_segment)
            self._mask = (seen & (self.k_order[:, None] <= self.q_order[:, :, None]))[:, None]
        return self._mask

    def blocks(self, source: int) -> list[tuple]:
        """The plan for this rank's queries and the keys that come from an outer rank: its prompt
        tokens (they precede its answers), and if that is this rank, all it has. As index tuples
        into (B, H, L, D) or (B, H, L): [(queries, keys, causal)]."""
        me = self.mesh.outer_rank
        plan = []
        for b, (queries, held) in enumerate(zip(self.parts[me], self.parts[source])):
            keys = held if source == me else [span for span in held if span[0] == 0]
            for q0, q1, k0, k1, causal in plan_blocks(queries, keys):
                row = (slice(b, b + 1), slice(None))  # this row, all heads
                plan.append(((*row, slice(q0, q1)), (*row, slice(k0, k1)), causal))
        return plan

    def prompt_tokens(self) -> int:
        """The most prompt tokens that a part has: what travels, padded to this."""
        return max(count_tokens(s for s in row if s[0] == 0) for part in self.parts for row in part)


@dataclass
class Pack:
    """B groups, one a row, right-padded to the same L.
    ids (B, L) token ids; positions (B, L), or (3, B, L) for M-RoPE; media (N, D) features that
    replace the token embeddings at media_at (N,), an index into the B * L flattened tokens.
    hidden_at (M,): index into B * L of the hidden state that predicts targets (M,);
    row, branch (M,): which prompt and which of its answers a target belongs to; step (M,): where
    in the answer it stands.
    received, gathered_at: of a share alone, see lm_head_share."""

    ids: Tensor
    positions: Tensor
    media: Tensor | None
    media_at: Tensor
    layout: Layout
    hidden_at: Tensor
    targets: Tensor
    row: Tensor
    branch: Tensor
    step: Tensor
    received: Tensor | None = None
    gathered_at: Tensor | None = None

    def pad(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) values of the targets -> (B, G, R) with zeros where nothing is, and the mask.
        Differentiable in values."""
        shape = (self.ids.shape[0], int(self.branch.max()) + 1, int(self.step.max()) + 1)
        at = (self.row, self.branch, self.step)
        mask = torch.zeros(shape, device=values.device)
        mask[at] = 1.0
        return values.new_zeros(shape).index_put(at, values), mask


def pack(prompts, branches, context=None) -> Pack:
    """Pack B prompts with their answers: [prompt | r_1 | ... | r_G] in each row (DEVIATION 1).
    prompts: B objects with ids (P,), positions (P,) or (3, P), media (N, D) or None, media_at (N,)
    branches: B lists of token ids (R,), every R >= 1. The lists may differ in length.
    context: B lists of ints; the first `context` tokens of a branch are given, not predicted (the
    question, in SFT). Default 0: every token of a branch is a target."""
    if len(prompts) != len(branches) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(branches)} groups of answers")
    context = context or [[0] * len(group) for group in branches]
    device = prompts[0].ids.device
    lengths = [(len(p.ids), [len(r) for r in group]) for p, group in zip(prompts, branches)]
    if any(p == 0 or not group or min(group) == 0 for p, group in lengths):
        raise ValueError(f"empty prompt, group or answer in {lengths}")
    total = max(p + sum(group) for p, group in lengths)  # L

    ids, segment, order, positions, media, media_at = pad_prompts(prompts, total)
    spans = [[(0, 0, p), *((g + 1, p, p + r) for g, r in enumerate(rs))] for p, rs in lengths]
    hidden_at, targets, owner = [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, branches)):
        start = p = len(prompt.ids)
        after = int(prompt.positions.max()) + 1
        for g, answer in enumerate(group):
            r = len(answer)
            here = slice(start, start + r)
            ids[b, here] = answer.cpu()
            segment[b, here] = g + 1
            order[b, here] = torch.arange(p, p + r)
            positions[..., b, here] = torch.arange(after, after + r)
            # Token t of the answer is predicted by token t - 1; token 0 by the prompt's last.
            before = torch.arange(start - 1, start + r - 1)
            before[0] = p - 1
            given = context[b][g]
            hidden_at.append(before[given:] + b * total)
            targets.append(answer[given:].cpu())
            owner += [(b, g, t) for t in range(r - given)]
            start += r
    row, branch, step = torch.tensor(owner).T
    tensors = dict(ids=ids, positions=positions, media_at=media_at)
    tensors |= dict(hidden_at=torch.cat(hidden_at), targets=torch.cat(targets))
    tensors |= dict(row=row, branch=branch, step=step)
    moved = {name: x.to(device) for name, x in tensors.items()}
    seen = segment.to(device), order.to(device)
    return Pack(**moved, media=media, layout=Layout(*seen, *seen, [spans]))


def pad_prompts(prompts, total: int, device="cpu") -> list:
    """B prompts, right-padded to L = total -> [ids, segment, order (B, L), positions (B, L) or
    (3, B, L), media (N, D) or None, media_at (N,) into B * L]; all but media on the device."""
    shape = (len(prompts), total)
    ids = torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1)  # padding, which no token sees
    order = torch.arange(total).repeat(len(prompts), 1)
    positions = torch.zeros(*prompts[0].positions.shape[:-1], *shape, dtype=torch.long)
    media, media_at = [], [torch.zeros(0, dtype=torch.long)]
    for b, prompt in enumerate(prompts):
        p = len(prompt.ids)
        ids[b, :p] = prompt.ids.cpu()
        segment[b, :p] = 0
        positions[..., b, :p] = prompt.positions.cpu()
        if prompt.media is not None and len(prompt.media):
            media.append(prompt.media)
            media_at.append(prompt.media_at.cpu() + b * total)
    features = None
    if media:
        features = media[0] if len(media) == 1 else torch.cat(media)
    texts = [x.to(device) for x in (ids, segment, order, positions)]
    return [*texts, features, torch.cat(media_at).to(device)]


def copies(prompts, branches, context=None) -> tuple[list, list, list | None]:
    """NAIVE: the same batch as G separate sequences a prompt, for pack(); what the tests and the
    benchmark compare with. Targets come out in the same order."""
    repeated = [p for p, group in zip(prompts, branches) for _ in group]
    single = [[r] for group in branches for r in group]
    return repeated, single, context and [[c] for group in context for c in group]


# ------------------------------------------------------------------- stage 2: deal, shard, collect


def count_tokens(spans: list[Span]) -> int:
    return sum(end - first for _, first, end in spans)


def deal(row: list[Span], outer: int) -> list[list[Span]]:
    """Deal a packed row to the outer ranks: rank r gets chunks r and 2 * outer - 1 - r of the
    prompt, and whole answers, the longest first to the rank with the fewest tokens. Nothing is
    dropped or padded; pieces of a short prompt may be empty.

    >>> deal([(0, 0, 8), (1, 8, 10), (2, 8, 13)], 2)
    [[(0, 0, 2), (0, 6, 8), (2, 8, 13)], [(0, 2, 4), (0, 4, 6), (1, 8, 10)]]
    """
    if outer == 1:
        return [row]
    cuts = [row[0][2] * j // (2 * outer) for j in range(2 * outer + 1)]
    chunks = [(0, a, b) for a, b in zip(cuts, cuts[1:])]
    parts = [[chunks[r], chunks[-1 - r]] for r in range(outer)]
    for span in sorted(row[1:], key=lambda s: s[1] - s[2]):
        min(parts, key=count_tokens).append(span)
    return [[s for s in part if s[1] < s[2]] for part in parts]


def deal_targets(owner: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deal targets evenly to ranks, whatever rank owner (M,) has the hidden state. Returns, of each
    target: the rank it goes to, its slot in the owner's message there, and its place among all
    that go there. Rank 1 has four of five states, and each predicts two or three:

    >>> deal_targets(torch.tensor([1, 1, 1, 1, 0]), 2)
    (tensor([0, 1, 0, 1, 0]), tensor([0, 0, 1, 1, 0]), tensor([0, 0, 1, 1, 2]))
    """

    def occurrence(rank):  # how many entries before this one are equal to it
        return F.one_hot(rank, ranks).cumsum(0).gather(1, rank[:, None])[:, 0] - 1

    turn = occurrence(owner)
    to = turn % ranks
    return to, turn // ranks, occurrence(to)


def shard(pack: Pack, mesh: Mesh) -> Pack:
    """This rank's share of a Pack, (B, L) -> (B, Ls): the same tensors for a part of the tokens.
    The outer deal comes first; each part is padded to a multiple of U, and cut in U even slices.
    Text and media may fall anywhere. The LM head's work is dealt by itself, see lm_head_share and
    spread. No communication: every rank has the whole Pack."""
    rows = pack.layout.parts[0]
    b_rows, total = pack.ids.shape
    me = mesh.sp_rank
    parts = [list(part) for part in zip(*(deal(row, mesh.outer) for row in rows))]
    at = packed_places(rows, parts, total, mesh.ulysses).to(pack.ids.device)  # (O, B, Lo)
    # (O, B, U * Ls) -> (O, B, U, Ls) -> (O, U, B, Ls) -> (S, B, Ls): rank = o * U + u
    every = at.unflatten(2, (mesh.ulysses, -1)).transpose(1, 2).flatten(0, 1)
    local = every[0].numel()  # B * Ls
    # went (B * L,): rank * B * Ls + place there, of each packed token. Padding goes to column L.
    slots = torch.arange(every.numel(), device=at.device).view_as(every)
    table = slots.new_zeros(b_rows, total + 1)
    table[torch.arange(b_rows, device=at.device)[:, None], every] = slots
    went = table[:, :total].flatten()

    def take(x, index, fill):  # (..., B, L) at (B, n) -> (..., B, n)
        return F.pad(x, (0, 1), value=fill).gather(-1, index.expand(*x.shape[:-1], -1))

    segment = take(pack.layout.q_segment, at[mesh.outer_rank], -1)
    order = take(pack.layout.q_order, at[mesh.outer_rank], 0)
    media_went = went[pack.media_at]
    here = media_went // local == me
    return replace(
        pack,
        ids=take(pack.ids, every[me], 0),
        positions=take(pack.positions, every[me], 0),
        media=None if pack.media is None else pack.media[here.to(pack.media.device)],
        media_at=media_went[here] % local,
        layout=Layout(segment, order, segment, order, parts, mesh),
        **lm_head_share(pack, went[pack.hidden_at], local, mesh),
    )


def packed_places(rows: list, parts: list, total: int, ulysses: int) -> Tensor:
    """(O, B, Lo): where in packed row b token i of part o stands; `total` is padding. Lo: tokens of
    the largest part, as a multiple of U, at least one for each rank."""
    size = max(count_tokens(spans) for part in parts for spans in part)
    size = max(size + -size % ulysses, ulysses)
    at = torch.full((len(parts), len(rows), size), total)
    for b, row in enumerate(rows):
        ends = accumulate(z - a for _, a, z in row)
        ahead = {s: end - z for (s, _, z), end in zip(row, ends)}  # place less order, of a segment
        for o, part in enumerate(parts):
            places = [torch.arange(a + ahead[s], z + ahead[s]) for s, a, z in part[b]]
            at[o, b, : count_tokens(part[b])] = torch.cat([torch.arange(0), *places])
    return at


def lm_head_share(pack: Pack, went: Tensor, local: int, mesh: Mesh) -> dict:
    """went (M,): rank * local + place there, of the hidden state of each target. Of this rank's
    share: hidden_at (S * slots,) are the states that it sends, received (width,) those that it
    takes from what comes, targets (width,) what they predict (as many on each rank: FSDP needs them
    all to run the LM head); gathered_at (M,): where collect() finds each target's value."""
    owner, state = went // local, went % local
    to, slot, place = deal_targets(owner, mesh.sp)
    slots = int(slot.max()) + 1
    width = int(place.max()) + 1
    send = went.new_zeros(mesh.sp * slots)
    sent = owner == mesh.sp_rank
    send[(to * slots + slot)[sent]] = state[sent]
    targets, received = send.new_zeros(width), send.new_zeros(width)
    mine = to == mesh.sp_rank
    targets[place[mine]] = pack.targets[mine]
    received[place[mine]] = (owner * slots + slot)[mine]
    at = to * width + place
    return dict(hidden_at=send, targets=targets, received=received, gathered_at=at)


def spread(hidden: Tensor, share: Pack) -> Tensor:
    """Hidden states (B * Ls, D) of this rank -> those of the targets that it predicts, (width, D):
    targets are dealt evenly over the ranks, or the ranks at the end of the sequence, where the
    answers are, would run the LM head alone. One all-to-all of (S, slots, D); backward the same."""
    mesh = share.layout.mesh
    states = hidden[share.hidden_at]
    if mesh.sp_group is not None:
        states = AllToAll.apply(states.unflatten(0, (mesh.sp, -1)), mesh.sp_group).flatten(0, 1)
    return states[share.received]


class AllGather(torch.autograd.Function):
    """(n, ...) of each rank -> (S * n, ...) on every rank, in rank order. Backward: reduce-scatter,
    (S * n, ...) -> (n, ...): each rank gets the sum of all ranks' gradients for its own part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


def collect(values: Tensor, share: Pack) -> Tensor:
    """(width,) of each rank's targets -> (M,) of all targets, in the order of the unsharded Pack;
    one all-gather. Every rank computes the SAME loss from them, so in backward each keeps the
    gradient of its own targets (a sum would count it S times; no communication): the parameter
    gradients of the S ranks then ADD UP to the whole, as they do over data parallel ranks."""
    mesh = share.layout.mesh
    if mesh.sp_group is not None:
        every = AllGather.apply(values.detach(), mesh.sp_group)
        start = mesh.sp_rank * len(values)
        values = every.slice_scatter(values, 0, start, start + len(values))
    return values[share.gathered_at]


# ----------------------------------------------------------------------------------- attention


def mrsp_attention(
    module, query, key, value, attention_mask, mrsp=None, scaling=None, sliding_window=None, **_
):
    """The attention function for Hugging Face models: AttentionInterface.register("mrsp", this).
    query (B, H, Lq, D), key and value (B, Hkv, Lk, D), mrsp a Layout -> (B, Lq, H, D), None; of the
    tokens of this rank. There is no dropout and no sliding window. Padding belongs into the layout:
    transformers drops a model's attention_mask for functions it does not know."""
    if attention_mask is not None:
        raise ValueError("attention 'mrsp' takes its mask from the layout; pass no attention_mask")
    if mrsp is None:
        raise ValueError("attention 'mrsp' needs the keyword mrsp=Layout in the model's call")
    if sliding_window and key.shape[2] * mrsp.mesh.sp > sliding_window:
        raise ValueError(
            f"attention 'mrsp' has no window, this layer one of {sliding_window} tokens"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    mesh = mrsp.mesh
    if mesh.ulysses > 1:  # (B, H, Ls, D) -> (B, H / U, Lo, D): fewer heads, more tokens
        query, key, value = tokens_for_heads([query, key, value], mesh.inner_group)
    if mrsp.parts is None or (mesh.outer == 1 and query.shape[2] <= DENSE_LIMIT):
        mask = mrsp.mask()
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    else:
        out = BlockAttention.apply(query, key, value, mrsp, scale)
    if mesh.ulysses > 1:
        out = heads_for_tokens(out, mesh.inner_group)
    return out.transpose(1, 2).contiguous(), None


def attention_naive(q, k, v, layout: Layout, scale: float) -> Tensor:
    """NAIVE, for reading and for the tests: what every method below must equal. Each rank gets q, k
    and v of all S ranks, computes the attention of the whole sequence, and keeps its own tokens: S
    times the work and the memory. q (B, H, Ls, D), k, v (B, Hkv, Ls, D) -> (B, H, Ls, D)."""
    mesh = layout.mesh
    n = q.shape[2]

    def gathered(x, dim):  # this dimension of all ranks
        if mesh.sp_group is None:
            return x
        return AllGather.apply(x.movedim(dim, 0), mesh.sp_group).movedim(0, dim)

    inner = slice(mesh.sp_rank % mesh.ulysses * n, (mesh.sp_rank % mesh.ulysses + 1) * n)
    segment = gathered(layout.q_segment[:, inner], 1)  # (B, S * Ls)
    order = gathered(layout.q_order[:, inner], 1)
    every = [gathered(x, 2) for x in (q, k, v)]  # (B, ., S * Ls, D)
    mask = Layout(segment, order, segment, order).mask()
    out = F.scaled_dot_product_attention(*every, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[:, :, mesh.sp_rank * n : (mesh.sp_rank + 1) * n]


# -- Ulysses: exchange tokens for heads, attend, exchange back


class AllToAll(torch.autograd.Function):
    """(U, ...): slice i goes to rank i, slice j of the result comes from rank j. Backward: the same
    exchange; gradients go back where the values came from. Each rank sends (U - 1) / U of x."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.forward(ctx, grad, ctx.group), None


def tokens_for_heads(tensors: list[Tensor], group) -> list[Tensor]:
    """(B, H, Ls, D) of each -> (B, H / U, U * Ls, D): my heads of all tokens, by one exchange of
    (U, B, sum of H / U, Ls, D). (Naive: all-gather all, keep my heads; U times the traffic.)"""
    u = dist.get_world_size(group)
    split = [x.unflatten(1, (u, -1)).movedim(1, 0) for x in tensors]  # (U, B, H / U, Ls, D)
    got = AllToAll.apply(torch.cat(split, 2), group).split([x.shape[2] for x in split], 2)
    return [x.movedim(0, 2).flatten(2, 3) for x in got]


def heads_for_tokens(x: Tensor, group) -> Tensor:
    """Back: (B, H / U, U * Ls, D) -> (B, H, Ls, D)."""
    split = x.unflatten(2, (dist.get_world_size(group), -1)).movedim(2, 0)  # (U, B, H / U, Ls, D)
    return AllToAll.apply(split, group).movedim(0, 1).flatten(1, 2)


# -- one block


@functools.cache
def flash_attn():
    """The package flash-attn, if it is installed; else None."""
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None


def kernel(q: Tensor) -> str:
    """Which kernel computes a block: "cpu" and "cuda" are torch's own, "flash_attn" the package's,
    "plain" a softmax that builds the block's scores (float32 on CUDA, other devices)."""
    if q.device.type == "cpu":
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0
    if q.device.type != "cuda" or not half or q.shape[-1] > 256:
        return "plain"
    return "flash_attn" if flash_attn() else "cuda"


def block_forward(q, k, v, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one block: out (1, H, Lq, D) and its log-sum-exp (1, H, Lq), natural log."""
    which = kernel(q)
    if which == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
    if which == "cuda":  # its tensors are (1, L, H, D)
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *turned, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse
    if which == "flash_attn":  # (L, H, D), lse (H, L)
        flat = [x[0].transpose(0, 1) for x in (q, k, v)]
        out, lse, *_ = flash_attn()._flash_attn_varlen_forward(
            *flat, **varlen(q, k), dropout_p=0.0, softmax_scale=scale, causal=causal
        )
        return out.transpose(0, 1)[None], lse[None]
    score = block_score(q, k, causal, scale)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None]).exp().to(v.dtype)
    return weight @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def block_backward(grad, q, out, lse, k, v, causal: bool, scale: float):
    """Gradients of one block from the FINAL out and lse of its rows: with those, softmax weights
    exp(score - lse) are the global ones, and each block's share simply adds up."""
    which = kernel(q)
    if which == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    if which == "cuda":
        none = torch.empty(0, device=q.device)  # random state of dropout: not used
        turned = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        lengths = (q.shape[2], k.shape[2])
        grads = torch.ops.aten._flash_attention_backward(
            *turned, lse.contiguous(), None, None, *lengths, 0.0, causal, none, none, scale=scale
        )
        return [x.transpose(1, 2) for x in grads]
    if which == "flash_attn":
        flat = [x[0].transpose(0, 1) for x in (grad, q, k, v, out)]
        grads = [torch.empty_like(x) for x in flat[1:4]]
        options = {"window_size_left": -1, "window_size_right": -1, "deterministic": False}
        options |= {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None} | varlen(q, k)
        flash_attn()._flash_attn_varlen_backward(
            *flat, lse[0].contiguous(), *grads, softmax_scale=scale, causal=causal, **options
        )
        return [x.transpose(0, 1)[None] for x in grads]
    group = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = (block_score(q, k, causal, scale) - lse[..., None]).exp()  # (1, H, Lq, Lk)
    d_weight = (grad @ v_all.mT).to(wide.dtype)
    d_score = wide * (d_weight - (grad * out).sum(-1, keepdim=True).to(wide.dtype)) * scale
    d_score, weight = d_score.to(q.dtype), wide.to(q.dtype)
    # A K/V head has the gradients of all query heads that use it: (1, H, Lk, D) -> (1, Hkv, Lk, D)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (d_score.mT @ q, weight.mT @ grad))
    return d_score @ k_all, dk, dv


def block_score(q, k, causal: bool, scale: float) -> Tensor:
    """NAIVE scores of one block in float32 or wider, (1, H, Lq, Lk)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).to(wide) * scale
    if causal:
        keep = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
        score = score.masked_fill(~keep, float("-inf"))
    return score


def varlen(q: Tensor, k: Tensor) -> dict:
    """For flash-attn: where the only sequence of a batch starts and ends, and the longest one."""
    found = {}
    for name, x in (("q", q), ("k", k)):
        ends = torch.tensor([0, x.shape[2]], dtype=torch.int32, device=x.device)
        found |= {f"cu_seqlens_{name}": ends, f"max_seqlen_{name}": x.shape[2]}
    return found


# -- all blocks: gather or ring


def ring_pass(x: Tensor, group):
    """Send x to the next rank of the ring and receive the previous rank's, of the same shape.
    Returns wait() -> received; until then the transfer runs beside the computation."""
    n, me = dist.get_world_size(group), dist.get_rank(group)
    following, previous = (dist.get_global_rank(group, (me + step) % n) for step in (1, -1))
    sent = x.contiguous()
    out = sent.new_empty(x.shape)
    send = dist.P2POp(dist.isend, sent, following, group)
    works = dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, out, previous, group)])

    def wait(held=sent):  # the default keeps what is sent alive
        for work in works:
            work.wait()
        return out

    return wait


def travelling(k: Tensor, v: Tensor, layout: Layout):
    """Yields (source, K, V) for every outer rank, this one first; the others' prompt K/V arrive
    while that is computed. k, v (B, Hkv, Lo, D); others' have Pp = layout.prompt_tokens().
    gather: all-gather of (2, B, Hkv, Pp, D), O times that is held at once; no order to wait for.
    ring:   O - 1 times the same piece goes to the next rank; two pieces are held."""
    mesh = layout.mesh
    most = layout.prompt_tokens()
    me, n = mesh.outer_rank, mesh.outer
    if n == 1:
        yield me, k, v
        return
    piece = torch.stack([k[:, :, :most], v[:, :, :most]])
    if not use_ring(layout, k):
        every = piece.new_empty(n, *piece.shape)
        work = all_gather(every.flatten(0, 1), piece, group=mesh.outer_group, async_op=True)
        yield me, k, v
        work.wait()
        for step in range(1, n):
            yield (me - step) % n, *every[(me - step) % n]
        return
    wait = ring_pass(piece, mesh.outer_group)
    yield me, k, v
    for step in range(1, n):
        piece = wait()
        if step < n - 1:
            wait = ring_pass(piece, mesh.outer_group)
        yield (me - step) % n, *piece


def use_ring(layout: Layout, k: Tensor) -> bool:
    """Do K/V travel in a ring? `auto` gathers as long as all of it is small."""
    mesh = layout.mesh
    gathered = 2 * mesh.outer * k[:, :, : layout.prompt_tokens()].nbytes
    return mesh.method == "ring" or (mesh.method == "auto" and gathered > RING_BYTES)


class BlockAttention(torch.autograd.Function):
    """Attention by blocks, over this rank's tokens and the prompt's K/V of all outer ranks:
    q (B, H, Lo, D), k, v (B, Hkv, Lo, D) -> (B, H, Lo, D). Of a query with score blocks s_1, s_2:
    naive:   out = (sum exp(s_1) v_1 + sum exp(s_2) v_2) / (sum exp(s_1) + sum exp(s_2))
    stable:  keep each block's own softmax, out_i, and its lse_i = log sum exp(s_i); then
             lse = logaddexp(lse_1, lse_2),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
    One autograd.Function, because the kernels' lse carries no gradient: plain autograd through the
    merge runs, and is wrong by 40 %. Nothing that travelled is kept for backward: it travels again,
    and the gradients of K/V go home: by reduce-scatter after gather, one step behind their keys
    after ring. Sums are kept in float32 (or wider)."""

    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, scale: float):
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for source, keys, values in travelling(k, v, layout):
            for at, cols, causal in layout.blocks(source):
                part, part_lse = block_forward(q[at], keys[cols], values[cols], causal, scale)
                both = torch.logaddexp(lse[at], part_lse.to(wide))
                keep, add = (lse[at] - both).exp(), (part_lse - both).exp()
                out[at] = out[at] * keep[..., None] + part * add[..., None]
                lse[at] = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        layout = ctx.layout
        mesh = layout.mesh
        grad = grad.contiguous()
        most = layout.prompt_tokens()
        ring = use_ring(layout, k)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        own = torch.zeros(2, *k.shape, dtype=lse.dtype, device=q.device)  # dk, dv of my tokens
        piece = (2, *k.shape[:2], most, k.shape[3])  # dk, dv of another rank's prompt tokens
        if mesh.outer > 1 and not ring:
            every = own.new_zeros(mesh.outer, *piece)
        wait = None
        for source, keys, values in travelling(k, v, layout):
            if source == mesh.outer_rank:
                dkv = own
            else:
                dkv = own.new_zeros(piece) if ring else every[source]
            for at, cols, causal in layout.blocks(source):
                here = [x[at] for x in (grad, q, out, lse)]
                parts = block_backward(*here, keys[cols], values[cols], causal, ctx.scale)
                dq[at] += parts[0]
                dkv[0][cols] += parts[1]
                dkv[1][cols] += parts[2]
            if ring and source != mesh.outer_rank:
                if wait:  # the previous rank's sum for this source: with mine it goes on home
                    dkv = dkv + wait()
                wait = ring_pass(dkv, mesh.outer_group)
        if wait:
            own[:, :, :, :most] += wait()
        elif mesh.outer > 1:  # (O, 2, B, Hkv, Pp, D) of each rank; each gets the sum for itself
            home = own.new_empty(piece)
            reduce_scatter(home, every.flatten(0, 1), group=mesh.outer_group)
            own[:, :, :, :most] += home
        return dq.to(q.dtype), *own.to(k.dtype).unbind(), None, None


# ---------------------------------------------------------------- stage 1: encode once, in parallel


def encode_parallel(encode, frames, group=None, together: int = 1) -> Tensor:
    """Encode a video's frames, split evenly over the ranks of `group` (None: this process alone).
    frames (F, H, W, 3), the same on every rank: anything that has a length and can be sliced (a
    lazy decoder then decodes only this rank's share). encode maps (f, H, W, 3) to (f / together,
    K, D), each `together` frames by themselves (1: frame by frame, 2: temporal patches, 8: TSP
    pooling); the last few may be fewer. Returns (ceil(F / together), K, D) on every rank, equal to
    encode(frames). Communication: one all-gather of ceil(units / n) units a rank, the last ranks
    padded with zeros; backward, if the tower is trained, a reduce-scatter: every rank gets the
    gradient of the frames it encoded, summed over what all ranks did with them."""
    if len(frames) == 0:
        return encode(frames[:])
    share, kept, most = encoder_share(len(frames), group, together)
    mine = encode(frames[share])
    if len(mine) != math.ceil((share.stop - share.start) / together):
        raise ValueError(f"encode gave {len(mine)} features for every {together} of the frames")
    if group is None or dist.get_world_size(group) == 1:
        return mine
    padding = mine.new_zeros(most - kept, *mine.shape[1:])
    every = AllGather.apply(torch.cat([mine[:kept], padding]), group)
    return every[: math.ceil(len(frames) / together)]


def encoder_share(frames: int, group=None, together: int = 1) -> tuple[slice, int, int]:
    """Of encode_parallel: the frames that this rank encodes, how many units of `together` frames it
    keeps of them, and how many the first rank does. A rank that is left without any encodes the
    last ones and keeps none: it learns shape and dtype.

    >>> encoder_share(9, together=2)
    (slice(0, 9, None), 5, 5)
    """
    n = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    units = math.ceil(frames / together)
    most = math.ceil(units / n)
    first, last = min(rank * most, units), min((rank + 1) * most, units)
    start = min(first, units - 1)
    stop = min(max(last, start + 1) * together, frames)
    return slice(start * together, stop), last - first, most


def agree(error: Exception | None, group=None) -> None:
    """Raise on all ranks of the group what one of them failed with (of several the first), so that
    none waits for another one in vain. Communication: one all-reduce of a flag."""
    failed = torch.tensor(error is not None, dtype=torch.uint8)
    if group is not None:
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
        if failed:
            found = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, error, group=group)
            error = next(e for e in found if e is not None)
    if error is not None:
        raise error


class EmbeddingCache:
    """Embeddings by key, in memory and, with a folder, on disk (DEVIATION 2). Least recently used
    entries go first when max_bytes (memory) or max_disk_bytes (folder) is exceeded. A key names
    everything that the embedding depends on (see media_key). Disk entries are safetensors files
    with a checksum, memory-mapped when read, written under another name and renamed: ranks and runs
    may share a folder. A damaged one is reported and computed again."""

    def __init__(self, folder=None, max_bytes: int = 4 << 30, max_disk_bytes: int = 100 << 30):
        self.folder = folder
        self.max_bytes, self.max_disk_bytes = max_bytes, max_disk_bytes
        self.memory: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = self.hits = self.misses = 0
        if folder:
            os.makedirs(folder, exist_ok=True)

    def get(self, key: str, compute, group=None) -> Tensor:
        """The tensor under key; compute() makes it on a miss. Never give it back modified.
        group: ranks that ask for the same key together, whose compute() is a collective. A miss on
        one of them is a miss on all, or the others would wait for it for ever (one all-reduce of a
        flag); the first of them writes to disk."""
        value = self.memory.get(key)
        if value is None:
            value = self._read(key)
        hit = torch.tensor(value is not None, dtype=torch.uint8)
        if group is not None:
            dist.all_reduce(hit, dist.ReduceOp.MIN, group=group)
        if hit:
            self.hits += 1
        else:
            self.misses += 1
            value = compute().cpu()  # host memory: the model moves what it uses
            if self.folder:
                if group is None or dist.get_rank(group) == 0:
                    self._write(key, value)
                if group is not None:
                    dist.barrier(group)
                mapped = self._read(key)  # one copy for all ranks of a machine, not one each
                value = value if mapped is None else mapped
        if key in self.memory:
            self.bytes -= self.memory.pop(key).nbytes
        self.memory[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes and len(self.memory) > 1:
            self.bytes -= self.memory.popitem(last=False)[1].nbytes
        return value

    def __contains__(self, key: str) -> bool:
        """Would get() find it?"""
        return key in self.memory or bool(self.folder and os.path.exists(self._path(key)))

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key + SUFFIX)

    def _read(self, key: str) -> Tensor | None:
        if not self.folder:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(key), "pt") as file:  # memory-mapped
                value = file.get_tensor("embeddings")
                if checksum(value) != (file.metadata() or {}).get("crc32"):
                    raise OSError("the checksum differs")
            os.utime(self._path(key))  # used now: eviction goes by this time
            return value
        except (SafetensorError, OSError, RuntimeError) as error:
            if os.path.exists(self._path(key)):  # else never written, or evicted meanwhile
                print(f"embedding cache: {self._path(key)} is damaged, computed again: {error}")
            return None

    def _write(self, key: str, value: Tensor) -> None:
        from safetensors.torch import save_file

        part = f"{self._path(key)}.{uuid.uuid4().hex}.part"  # machines may share folder and pid
        save_file({"embeddings": value.contiguous()}, part, {"crc32": checksum(value)})
        os.replace(part, self._path(key))
        entries = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # evicted by another process
                stat = entry.stat()
                # A young part is being written, an old one was left by a process that died. Files
                # that are not ours are never touched.
                dead = entry.name.endswith(".part") and time.time() - stat.st_mtime > 3600
                if SUFFIX in entry.name and (dead or entry.name.endswith(SUFFIX)):
                    entries.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            # Readers that have a file open keep it: an unlinked file lives until it is closed.
            if total > self.max_disk_bytes and path != self._path(key):
                total -= size
                with suppress(FileNotFoundError):
                    os.remove(path)


def checksum(value: Tensor) -> str:
    """CRC-32 of a CPU tensor's bytes."""
    return f"{zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy()):08x}"


def media_key(content: str, encoder: str, *settings) -> str:
    """Cache key: hash of the media's content hash, the encoder's hash, and all settings (frames,
    segment ...) that the embedding depends on."""
    return hashlib.sha256(repr((content, encoder, *settings)).encode()).hexdigest()[:32]


def file_hash(path: str) -> str:
    """Content hash of a file, remembered by path, size and modification time."""
    stat = os.stat(path)
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_hash(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------- all ranks of a run


def all_reduce_gradients(parameters) -> None:
    """Sum the gradients over all ranks, in place, in one message.
    The loss of a rank is (sum over ITS tokens) / (number of tokens on ALL ranks), so that the sum
    is the gradient of the global mean, however uneven the ranks' shares. A parameter without
    gradient on this rank takes part with zeros."""
    trained = [p for p in parameters if p.requires_grad]
    for p in trained:  # on one rank too: optimizers step on zeros, but skip a missing gradient
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    replicated = [p for p in trained if not isinstance(p, DTensor)]  # FSDP has added up its own
    if alone() or not replicated:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in replicated])
    dist.all_reduce(flat)
    for p, grad in zip(replicated, flat.split([p.numel() for p in replicated])):
        p.grad.copy_(grad.view_as(p))


def alone() -> bool:
    """Is there no other rank?"""
    return not dist.is_initialized() or dist.get_world_size() == 1


def all_sum(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks (a new tensor); the tensor itself on one rank."""
    if not alone():
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_max(value: int) -> int:
    """Largest value over all ranks."""
    largest = torch.tensor(value)
    if not alone():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def even(parts: list, filler, sharded: bool) -> list:
    """The forward passes of this rank, as many as on any other: with sharded parameters each pass
    gathers them from all ranks, so a rank with fewer parts gets `filler` appended. Every rank calls
    this; communication: one all-reduce of a length. Not sharded: parts as they are."""
    if not sharded:
        return parts
    return parts + [filler] * (all_max(len(parts)) - len(parts))


def gather_dealt(mine: list, count: int, group, same: int = 1) -> list:
    """Undo a deal of `count` items, item i to rank i % S of the group: all of them, in order, on
    every rank. same: so many neighbours were dealt the same items, as if they were one rank. The
    items are pickled; for token ids and the like."""
    if group is None:
        return mine
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    dealt = found[::same]
    return [dealt[i % len(dealt)][i // len(dealt)] for i in range(count)]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (DTensor; every rank calls this), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters, max_norm: float) -> float:
    """Scale gradients in place so that their norm over all parameters, sharded or not, is at most
    max_norm. Returns the norm before; RuntimeError if it is not finite."""
    kinds = split_sharded(p for p in parameters if p.grad is not None)
    norms = [whole(torch.nn.utils.get_total_norm(p.grad for p in kind)) for kind in kinds]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    if not norm.isfinite():
        raise RuntimeError(f"the norm of the gradient is {norm.item()}; nothing was changed")
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm.item()


def split_sharded(parameters) -> list[list]:
    """Sharded parameters and whole ones apart, without empty lists: torch's functions on lists of
    tensors do not take both at once."""
    kinds = [], []
    for p in parameters:
        kinds[0 if isinstance(p, DTensor) else 1].append(p)
    return [kind for kind in kinds if kind]
