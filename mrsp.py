"""Multi-modal reinforcement sequence parallelism: a prompt and its G answers as one packed
sequence over many ranks, media encoded once.

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

Log-probs and gradients are those of the copies. (*) enters unmodified Hugging Face models
as one attention function, "mrsp"; the Layout travels as a keyword, model(..., mrsp=layout), and so
survives gradient checkpointing. Sampling and SFT (many questions about a video) use it too.

Stage 1 of the paper's MR-SP (section 5): all ranks together encode a video (encode_parallel), and
its embeddings are kept (EmbeddingCache). Stage 2: the packed sequence is sharded over S = O x U
ranks. Only attention needs the others (and the loss the log-probs of all):

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
DEVIATION 3: the paper shards in order; here the prompt is dealt to outer ranks in zigzag, and their
    parts to inner ones token by token, so that each has its share of the answers (see shard).

Glossary: B prompts, G answers a prompt, P prompt tokens, R answer tokens, L packed length, Ls
tokens on a rank, Lo on an outer one, M predicted tokens of a batch (m of them a rank's), H heads
(Hkv of keys) of width D, W width of media features, F frames. A process group of None is this rank
alone; some collectives take CPU tensors: on GPUs start with init_process_group
("cpu:gloo,cuda:nccl"). Copied alone it needs no other file.
Check this file alone:  pytest tests/test_mrsp.py tests/test_sp.py tests/test_cache.py
"""

import functools
import hashlib
import math
import os
import pickle
import time
import uuid
import zlib
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

# torch 2.13 renamed these two; the old names warn there, the new ones are missing before.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

PATIENCE = timedelta(days=1)  # that a rank waits for others: a long video takes more than the usual
#   10 or 30 minutes to decode, a large checkpoint to save
DENSE_LIMIT = 2048  # longest sequence that is trained under a mask (L, L), where O = 1
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

    @property
    def inner_rank(self) -> int:
        return self.sp_rank % self.ulysses


def choose_method(method: str, sp: int, heads: int, kv_heads: int) -> tuple[int, str, str]:
    """--sp_attention -> (U, how K/V travel, a sentence that says which and why).
    auto takes the largest U that divides the ranks and both kinds of heads (it splits the work
    exactly and moves the least); for the rest K/V are gathered, or travel in a ring if they are
    large (use_ring): indifferent to heads.

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
    why = f"{sp} ranks a sequence = ulysses {ulysses} x {sp // ulysses} "
    why += f"({heads} query and {kv_heads} K/V heads: at most {most} ranks can split them)"
    travel = "auto" if ulysses == sp else method.rpartition("+")[2]
    if travel != "auto":
        why += f"; K/V travel by {travel}, as asked"
    elif ulysses < sp:
        why += f"; K/V are gathered, above {RING_BYTES >> 30} GiB a layer passed in a ring"
    return ulysses, travel, why


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
        if len(each[0]) == 1:
            return None
        return dist.new_subgroups_by_enumeration(each, PATIENCE)[0]

    grid = torch.arange(world).view(-1, sp // u, u)  # (dp, O, U)
    sp_group = mine(grid.flatten(1))  # dp rows of O * U ranks
    outer_group = mine(grid.mT.flatten(0, 1))  # dp * U rows of O ranks
    inner_group = mine(grid.flatten(0, 1))  # dp * O rows of U ranks
    groups = (sp_group, outer_group, inner_group)
    return Mesh(rank, world // sp, sp // u, u, travel, *groups, why)


# -------------------------------------------------------------------------------------- layout

Span = tuple[int, int, int]  # (segment, first order, end): consecutive tokens of one segment


class Block(NamedTuple):
    """Queries [q0, q1) see keys [k0, k1): all of them, or if causal those up to themselves."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


def find_spans(segment: Tensor, order: Tensor) -> list[Span]:
    """Segment and order (L,) of tokens -> their spans, back to back in memory; padding is last.

    >>> find_spans(torch.tensor([0, 0, 0, 2, 2, -1]), torch.tensor([0, 1, 7, 8, 9, 0]))
    [(0, 0, 2), (0, 7, 8), (2, 8, 10)]
    """
    order = order[segment >= 0].tolist()
    segment = segment[segment >= 0].tolist()
    spans = []
    for s, t in zip(segment, order):
        if spans and spans[-1][0] == s and spans[-1][2] == t:
            spans[-1] = (s, spans[-1][1], t + 1)
        else:
            spans.append((s, t, t + 1))
    return spans


def plan_blocks(queries: list[Span], keys: list[Span]) -> list[Block]:
    """Rule (*) as rectangles, for queries and keys that are back to back in memory. Squares are
    causal, the rest is full: kernels disagree on where a rectangle's diagonal begins. Empty ones
    are left out: the kernels crash on them. Queries and keys of one span each, by their orders:

                     k0 ....... low ....... high ....... k1
        q0 .. low    .           .                            (if the queries begin sooner)
        low .. high  before      diagonal    .
        high .. q1   before      behind                       (if the keys end sooner)

    >>> row = [(0, 0, 2), (1, 2, 3), (2, 2, 4)]  # prompt of 2, answers of 1 and 2
    >>> [tuple(block) for block in plan_blocks(row, row)]
    [(0, 2, 0, 2, True), (2, 5, 0, 2, False), (2, 3, 2, 3, True), (3, 5, 3, 5, True)]
    """
    plan = []
    k_at = 0  # where this span of keys begins in memory
    for k_seg, k0, k1 in keys:
        q_at = 0
        for q_seg, q0, q1 in queries:
            to_q = q_at - q0  # from a token's order to its place in memory
            to_k = k_at - k0
            low = max(q0, k0)  # [low, high): the orders that both spans have
            high = min(q1, k1)
            found = [
                (q0, q1, k0, min(k1, q0), False),  # keys before all of the queries
                (low, high, low, high, True),  # the diagonal
                (high, q1, low, high, False),  # queries behind the diagonal
            ]
            for a, b, c, d, causal in found:
                if k_seg in (0, q_seg) and a < b and c < d:
                    block = Block(a + to_q, b + to_q, c + to_k, d + to_k, causal)
                    last = plan[-1] if plan else None
                    same_keys = last and last.q1 == block.q0 and last[2:] == block[2:]
                    if same_keys and not causal:  # join them: one block for all answers
                        block = block._replace(q0=plan.pop().q0)
                    plan.append(block)
            q_at += q1 - q0
        k_at += k1 - k0
    return plan


@dataclass
class Layout:
    """Who sees whom, for the attention function. Queries (B, Lq) and keys (B, Lk) carry segment and
    order, which is what the dense form needs: while training both are the tokens of this outer
    rank, while sampling the keys are the whole cache.

    plan: what the block form needs (None while tokens are sampled). For each outer rank `source`,
    the blocks of this rank's queries and the keys that come from there: its prompt tokens (they
    precede its answers), and if that is this rank, all it has. (queries, keys, causal), with the
    first two as indices into (B, H, L, D) or (B, H, L).
    travels: the most prompt tokens that an outer rank has of any row. The K/V of so many columns
    are sent, of every row; what else is among them, behind a shorter prompt, no block reads."""

    q_segment: Tensor
    q_order: Tensor
    k_segment: Tensor
    k_order: Tensor
    mesh: Mesh = field(default_factory=Mesh)
    plan: list[list[tuple]] | None = None
    travels: int = 0

    @functools.cached_property
    def mask(self) -> Tensor:
        """Rule (*) as a boolean (B, 1, Lq, Lk); built once, used by every layer."""
        q_segment = self.q_segment[:, :, None]
        k_segment = self.k_segment[:, None]
        # (B, Lq, Lk). Padding sees padding, or a row of the softmax could be empty.
        seen = (k_segment == 0) | (k_segment == q_segment)
        return (seen & (self.k_order[:, None] <= self.q_order[:, :, None]))[:, None]


def make_layout(segment: Tensor, order: Tensor, mesh: Mesh | None = None) -> Layout:
    """The Layout of this rank; segment, order (O, B, Lo): of the tokens of all outer ranks."""
    mesh = mesh or Mesh()
    me = mesh.outer_rank
    plan = [[] for _ in range(mesh.outer)]
    for b in range(segment.shape[1]):
        parts = [find_spans(s, t) for s, t in zip(segment[:, b].cpu(), order[:, b].cpu())]
        row = (slice(b, b + 1), slice(None))  # this row, all heads
        for source, held in enumerate(parts):
            keys = held if source == me else [span for span in held if span[0] == 0]
            for block in plan_blocks(parts[me], keys):
                q_index = (*row, slice(block.q0, block.q1))
                k_index = (*row, slice(block.k0, block.k1))
                plan[source].append((q_index, k_index, block.causal))
    travels = int((segment == 0).sum(-1).max())
    own = (segment[me], order[me])
    return Layout(*own, *own, mesh, plan, travels)


# ---------------------------------------------------------------------------------------- packs


@dataclass
class Pack:
    """B groups, one a row, right-padded to the same L; of each group the prompt, then its answers.
    ids, segment, order (B, L); positions (B, L), or (3, B, L) for M-RoPE; media (N, W): features
    that replace the token embeddings at media_at (N,), an index into the B * L flattened tokens.
    hidden_at (M,): index into B * L of the hidden state that predicts targets (M,).
    row, branch, step (M,): a target is token `step` of answer `branch` to prompt `row`, counted
    behind what is given of the answer (context in pack())."""

    ids: Tensor
    segment: Tensor
    order: Tensor
    positions: Tensor
    media: Tensor | None
    media_at: Tensor
    hidden_at: Tensor
    targets: Tensor
    row: Tensor
    branch: Tensor
    step: Tensor

    @property
    def layout(self) -> Layout:
        """Of the whole Pack on one rank."""
        return make_layout(self.segment[None], self.order[None])

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
    prompts: B objects with ids (P,), positions (P,) or (3, P), media (N, W) or None, media_at (N,)
    branches: B lists of token ids (R,), every R >= 1. The lists may differ in length.
    context: B lists of ints; the first `context` tokens of a branch are given, not predicted (the
    question, in SFT). Default 0: every token of a branch is a target."""
    if len(prompts) != len(branches) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(branches)} groups of answers")
    lengths = [[len(p.ids), *(len(r) for r in group)] for p, group in zip(prompts, branches)]
    if min(min(row) for row in lengths) == 0:
        raise ValueError(f"empty prompt or answer: lengths are {lengths}")
    length = max(sum(row) for row in lengths)  # L
    ids, segments, orders, positions, given, media, media_at = [], [], [], [], [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, branches)):
        p = lengths[b][0]
        segment = torch.arange(1 + len(group)).repeat_interleave(torch.tensor(lengths[b]))
        order = torch.cat([torch.arange(p), *(torch.arange(p, p + len(r)) for r in group)])
        own = prompt.positions.cpu()
        resumed = order[p:] - p + int(own.max()) + 1  # every answer goes on where the prompt ended
        ids.append(torch.cat([prompt.ids.cpu(), *(r.cpu() for r in group)]))
        segments.append(segment)
        orders.append(order)
        positions.append(torch.cat([own, resumed.expand(*own.shape[:-1], -1)], -1))
        given.append(torch.tensor([0, *(context[b] if context else [0] * len(group))])[segment])
        if prompt.media is not None and len(prompt.media):
            media.append(prompt.media)
            media_at.append(prompt.media_at.cpu() + b * length)
    ids = stack(ids, length, 0)
    segment = stack(segments, length, -1)  # padding, which no token of a row sees
    order = stack(orders, length, 0)
    # Token t of an answer is predicted by the token before; token 0 by the prompt's last.
    p = torch.tensor([row[0] for row in lengths])[:, None]  # (B, 1)
    step = order - p - stack(given, length, 0)  # (B, L), where it is a target
    row, column = ((segment > 0) & (step >= 0)).nonzero().T
    before = torch.where(order == p, p, torch.arange(length)) - 1  # (B, L)
    tensors = {
        "ids": ids,
        "segment": segment,
        "order": order,
        "positions": stack(positions, length, 0),
        "media_at": torch.cat([torch.arange(0), *media_at]),
        "hidden_at": row * length + before[row, column],
        "targets": ids[row, column],
        "row": row,
        "branch": segment[row, column] - 1,
        "step": step[row, column],
    }
    features = None
    if media:
        features = media[0] if len(media) == 1 else torch.cat(media)  # one is not copied
    device = prompts[0].ids.device
    return Pack(media=features, **{name: x.to(device) for name, x in tensors.items()})


def stack(rows: list[Tensor], length: int, fill: int) -> Tensor:
    """B tensors (..., L_b) -> (..., B, length), filled up on the right."""
    return torch.stack([F.pad(x, (0, length - x.shape[-1]), value=fill) for x in rows], -2)


def copies(prompts, branches, context=None) -> tuple[list, list, list | None]:
    """NAIVE: the same batch as G separate sequences a prompt, for pack(); what the tests and the
    benchmark compare with. Targets come out in the same order."""
    repeated = [p for p, group in zip(prompts, branches) for _ in group]
    single = [[r] for group in branches for r in group]
    return repeated, single, context and [[c] for group in context for c in group]


# ------------------------------------------------------------------- stage 2: deal, shard, collect


def deal(segment: Tensor, outer: int) -> list[Tensor]:
    """Deal the tokens of a packed row, segment (L,), to the outer ranks: rank r gets chunks r and
    2 * outer - 1 - r of the prompt, and whole answers, the longest first to the rank with the
    fewest tokens. Returns the columns that each has, in order, without padding. A prompt of 8,
    answers of 2 and 3:

    >>> deal(torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, -1]), 2)
    [tensor([ 0,  1,  6,  7, 10, 11, 12]), tensor([2, 3, 4, 5, 8, 9])]
    """
    prompt, *answers = [(segment == g).nonzero()[:, 0] for g in range(int(segment.max()) + 1)]
    chunks = prompt.tensor_split(2 * outer)  # of a short prompt some are empty
    parts = [torch.cat([chunks[r], chunks[-1 - r]]) for r in range(outer)]
    for answer in sorted(answers, key=len, reverse=True):
        sizes = [len(part) for part in parts]
        fewest = sizes.index(min(sizes))
        parts[fewest] = torch.cat([parts[fewest], answer])
    return [part.sort().values for part in parts]


@dataclass
class Share:
    """What a rank has of a Pack: Ls of the L columns of each row, and all that belongs to them, by
    the names of Pack. media_at and hidden_at are indices into its own B * Ls tokens; of the Pack's
    M targets it predicts those at target_at (m,): targets (m,)."""

    ids: Tensor
    positions: Tensor
    media: Tensor | None
    media_at: Tensor
    hidden_at: Tensor
    targets: Tensor
    target_at: Tensor
    layout: Layout
    pack: Pack


def shard(pack: Pack, mesh: Mesh) -> Share:
    """This rank's share of a Pack. No communication: every rank has the whole Pack. The rows are
    dealt to the O outer ranks; each part is padded to a multiple of U, and its rank u takes every
    U-th column of it, so that each has its share of every answer, and of the LM head's work:

        part of an outer rank, U = 2    prompt: a b c d e   answer: f g h i   padding: _
                                  u=0           a   c   e             g   i
                                  u=1             b   d           f     h              _

    A target belongs to the rank that has the token before it: the first tokens of all answers to
    the rank with the prompt's last one.
    """
    rows, length = pack.ids.shape
    u = mesh.ulysses
    # Who holds what: part[o, b] are the columns of row b that outer rank o has; L is padding.
    dealt = [deal(segment, mesh.outer) for segment in pack.segment.cpu()]
    longest = max(len(columns) for row in dealt for columns in row)
    part = torch.full((mesh.outer, rows, u * math.ceil(longest / u)), length)  # (O, B, Lo)
    for b, row in enumerate(dealt):
        for o, columns in enumerate(row):
            part[o, b, : len(columns)] = columns
    part = part.to(pack.ids.device)
    mine = part[mesh.outer_rank, :, mesh.inner_rank :: u]  # (B, Ls)

    # Where is what, the inverse: place[i] is the index into this share's B * Ls of token i of the
    # pack's B * L; -1: another rank has it. Padding writes to a last column, which is cut off.
    table = mine.new_full((rows, length + 1), -1)
    table.scatter_(1, mine, torch.arange(mine.numel(), device=mine.device).view_as(mine))
    place = table[:, :length].flatten()

    def take(x, columns, fill):  # (..., B, L) at columns (..., B, n) -> (..., B, n)
        # In front: 3 of x, if it is M-RoPE's positions; O of columns, if they are of all parts.
        padded = F.pad(x, (0, 1), value=fill)
        shape = torch.broadcast_shapes(padded.shape[:-1], columns.shape[:-1])
        return padded.expand(*shape, -1).gather(-1, columns.expand(*shape, -1))

    media_at = place[pack.media_at]
    is_mine = media_at >= 0
    hidden_at = place[pack.hidden_at]
    target_at = (hidden_at >= 0).nonzero()[:, 0]
    return Share(
        ids=take(pack.ids, mine, 0),
        positions=take(pack.positions, mine, 0),
        media=None if pack.media is None else pack.media[is_mine.to(pack.media.device)],
        media_at=media_at[is_mine],
        hidden_at=hidden_at[target_at],
        targets=pack.targets[target_at],
        target_at=target_at,
        layout=make_layout(take(pack.segment, part, -1), take(pack.order, part, 0), mesh),
        pack=pack,
    )


def collect(values: Tensor, share: Share) -> Tensor:
    """(m,) of each rank's targets -> (M,) of all targets, in the order of the Pack; one all-reduce
    of zeros with this rank's values in their places. Every rank computes the SAME loss from them,
    so in backward each keeps the gradient of its own targets (a sum would count it S times; no
    communication): the parameter gradients of the S ranks then ADD UP to the whole, as they do over
    data parallel ranks."""
    every = values.new_zeros(len(share.pack.targets))  # of others constants ...
    every[share.target_at] = values.detach()
    if share.layout.mesh.sp_group is not None:
        dist.all_reduce(every, group=share.layout.mesh.sp_group)
    return every.index_put((share.target_at,), values)  # ... and mine with their gradient


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
    if mrsp.plan is None or (mesh.outer == 1 and query.shape[2] <= DENSE_LIMIT):
        how = {"attn_mask": mrsp.mask, "scale": scale, "enable_gqa": True}
        out = F.scaled_dot_product_attention(query, key, value, **how)
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

    inner = slice(mesh.inner_rank, None, mesh.ulysses)  # this rank's columns of its outer part
    segment = gathered(layout.q_segment[:, inner], 1)  # (B, S * Ls)
    order = gathered(layout.q_order[:, inner], 1)
    every = [gathered(x, 2) for x in (q, k, v)]  # (B, ., S * Ls, D)
    mask = Layout(segment, order, segment, order).mask
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
    (U, B, sum of H / U, Ls, D). Token l of rank u stands at l * U + u: its part's order again.
    (Naive: all-gather all, keep my heads; U times the traffic.)"""
    u = dist.get_world_size(group)
    split = [x.unflatten(1, (u, -1)).movedim(1, 0) for x in tensors]  # (U, B, H / U, Ls, D)
    got = AllToAll.apply(torch.cat(split, 2), group).split([x.shape[2] for x in split], 2)
    return [x.movedim(0, 3).flatten(2, 3) for x in got]  # (B, H / U, Ls, U, D) on the way


def heads_for_tokens(x: Tensor, group) -> Tensor:
    """Back: (B, H / U, U * Ls, D) -> (B, H, Ls, D)."""
    u = dist.get_world_size(group)
    split = x.unflatten(2, (-1, u)).movedim(3, 0)  # (B, H / U, Ls, U, D) -> (U, B, H / U, Ls, D)
    return AllToAll.apply(split, group).movedim(0, 1).flatten(1, 2)


# -- one block


def kernel(q: Tensor) -> str:
    """Which kernel computes a block: "cpu" and "cuda" are torch's FlashAttention (on CUDA for half
    precision; an installed FlashAttention 3 or 4 takes its place where torch is told so, by
    torch.nn.attention.activate_flash_attention_impl), "plain" a softmax that builds the block's
    scores (float32 on CUDA, other devices)."""
    if q.device.type == "cpu":
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "cuda" if q.device.type == "cuda" and half and fits else "plain"


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
    group = q.shape[1] // k.shape[1]
    k_all = k.repeat_interleave(group, 1)
    v_all = v.repeat_interleave(group, 1)
    weight = (block_score(q, k, causal, scale) - lse[..., None]).exp()  # (1, H, Lq, Lk), float32
    d_weight = (grad @ v_all.mT).to(weight.dtype)
    # Of a softmax: weight * (d_weight - sum of weight * d_weight). That sum is grad . out: with the
    # FINAL out over the keys of all blocks.
    d_score = weight * (d_weight - (grad * out).sum(-1, keepdim=True).to(weight.dtype)) * scale
    d_score = d_score.to(q.dtype)
    # A K/V head has the gradients of all query heads that use it: (1, H, Lk, D) -> (1, Hkv, Lk, D)
    dk = (d_score.mT @ q).unflatten(1, (-1, group)).sum(2)
    dv = (weight.to(q.dtype).mT @ grad).unflatten(1, (-1, group)).sum(2)
    return d_score @ k_all, dk, dv


def block_score(q, k, causal: bool, scale: float) -> Tensor:
    """NAIVE scores of one block in float32 or wider, (1, H, Lq, Lk)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).to(wide) * scale
    if causal:
        keep = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
        score = score.masked_fill(~keep, float("-inf"))
    return score


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
    while that is computed. k, v (B, Hkv, Lo, D); others' have Pp = layout.travels.
    gather: all-gather of (2, B, Hkv, Pp, D), O times that is held at once; no order to wait for.
    ring:   O - 1 times the same piece goes to the next rank; two pieces are held."""
    mesh = layout.mesh
    most = layout.travels
    me = mesh.outer_rank
    n = mesh.outer
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
    gathered = 2 * mesh.outer * k[:, :, : layout.travels].nbytes
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
            for at, cols, causal in layout.plan[source]:
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
        most = layout.travels
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
            for at, cols, causal in layout.plan[source]:
                here = [x[at] for x in (grad, q, out, lse)]
                parts = block_backward(*here, keys[cols], values[cols], causal, ctx.scale)
                dq[at] += parts[0]
                dkv[0][cols] += parts[1]
                dkv[1][cols] += parts[2]
            # Ring of 3: rank r begins the sum of r - 1 and sends it to r + 1; then it adds its part
            # for r - 2 to what r - 1 has sent, and sends it on: home, to r + 1 = r - 2.
            if ring and source != mesh.outer_rank:
                if wait:
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
    frames (F, ...), the same on every rank: anything that has a length and can be sliced, such as
    pixels, a spectrogram, or the numbers of frames that encode then decodes. encode maps (f, ...)
    to (f / together, K, W), each `together` frames by themselves (1: frame by frame, 2: temporal
    patches, 8: TSP pooling); the last few may be fewer. Returns (ceil(F / together), K, W) on every
    rank, equal to encode(frames). Communication: one all-gather of ceil(units / n) units a rank,
    the last ranks padded with zeros; backward, if the tower is trained, a reduce-scatter: every
    rank gets the gradient of the frames it encoded, summed over what all ranks did with them."""
    if len(frames) == 0:
        return encode(frames[:])
    share, kept, most = encoder_share(len(frames), group, together)
    mine = encode(frames[share])
    if len(mine) != math.ceil((share.stop - share.start) / together):
        raise ValueError(f"encode gave {len(mine)} units for {share}, {together} frames a unit")
    if group is None or dist.get_world_size(group) == 1:
        return mine
    padding = mine.new_zeros(most - kept, *mine.shape[1:])
    every = AllGather.apply(torch.cat([mine[:kept], padding]), group)
    return every[: math.ceil(len(frames) / together)]


def encoder_share(frames: int, group=None, together: int = 1) -> tuple[slice, int, int]:
    """Of encode_parallel: the frames that this rank encodes, how many units of `together` frames it
    keeps of them, and how many the first rank does (the others are padded to it). A rank that is
    left without any encodes the last ones and keeps none: it learns shape and dtype.

    >>> encoder_share(9, together=2)
    (slice(0, 9, None), 5, 5)
    """
    n = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    units = range(math.ceil(frames / together))
    most = math.ceil(len(units) / n)
    kept = units[rank * most : (rank + 1) * most]
    encoded = kept or units[-1:]
    share = slice(encoded.start * together, min(encoded.stop * together, frames))
    return share, len(kept), most


@contextmanager
def agreed(group=None):
    """A block that all ranks of the group enter: what one of them fails with in it (of several the
    first) is raised on all, so that none waits for another one in vain. Communication: one
    all-reduce of a flag."""
    error = None
    try:
        yield
    except Exception as failed:
        error = failed
    if group is not None:
        flag = torch.tensor(error is not None, dtype=torch.uint8)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        if flag:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # it does not travel as it is
                error = RuntimeError(f"{type(error).__name__}: {error}")
            found = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, error, group=group)
            error = next(e for e in found if e is not None)
    if error is not None:
        raise error


class EmbeddingCache:
    """Entries by key, in memory and, with a folder, on disk (DEVIATION 2). An entry is a dict of
    tensors, such as {"features": (T, h, w, W), "times": (F,)}; its key names all that it depends on
    (media_key). Least recently used ones go first when max_bytes (memory) or max_disk_bytes
    (folder) is exceeded. On disk they are safetensors files with a checksum, memory-mapped when
    read, written under another name and renamed: ranks and runs may share a folder. A damaged one
    is reported and computed again."""

    def __init__(self, folder=None, max_bytes: int = 4 << 30, max_disk_bytes: int = 100 << 30):
        self.folder = folder
        self.max_bytes = max_bytes
        self.max_disk_bytes = max_disk_bytes
        self.memory: OrderedDict[str, dict] = OrderedDict()  # the last one was used last
        self.hits = 0
        self.misses = 0
        if folder:
            os.makedirs(folder, exist_ok=True)

    @property
    def bytes(self) -> int:
        """Held in memory now."""
        return sum(x.nbytes for entry in self.memory.values() for x in entry.values())

    def get(self, key: str, compute, group=None) -> dict[str, Tensor]:
        """The entry under key; compute() makes it on a miss. Do not modify it.
        group: ranks that ask for the same key together, whose compute() is a collective. A miss on
        one of them is a miss on all, or the others would wait for it for ever (one all-reduce of a
        flag, a barrier behind what the first of them writes to disk)."""
        entry = self.memory.pop(key, None) or self._read(key)
        hit = torch.tensor(entry is not None, dtype=torch.uint8)
        if group is not None:
            dist.all_reduce(hit, dist.ReduceOp.MIN, group=group)
        if hit:
            self.hits += 1
        else:
            self.misses += 1
            # In host memory: the model moves what it uses.
            entry = {name: x.cpu().contiguous() for name, x in compute().items()}
            if self.folder:
                if group is None or dist.get_rank(group) == 0:
                    self._write(key, entry)
                if group is not None:
                    dist.barrier(group)
                entry = self._read(key) or entry  # one copy for all ranks of a machine
        self.memory[key] = entry
        while self.bytes > self.max_bytes and len(self.memory) > 1:
            self.memory.popitem(last=False)
        return entry

    def __contains__(self, key: str) -> bool:
        """Would get() find it?"""
        return key in self.memory or bool(self.folder and os.path.exists(self._path(key)))

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key + SUFFIX)

    def _read(self, key: str) -> dict | None:
        if not self.folder:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(key), "pt") as file:  # memory-mapped
                entry = {name: file.get_tensor(name) for name in file.keys()}
                if checksum(entry) != (file.metadata() or {}).get("crc32"):
                    raise OSError("the checksum differs")
            os.utime(self._path(key))  # used now: eviction goes by this time
            return entry
        except (SafetensorError, OSError, RuntimeError) as error:
            if os.path.exists(self._path(key)):  # else never written, or evicted meanwhile
                print(f"embedding cache: {self._path(key)} is damaged, computed again: {error}")
            return None

    def _write(self, key: str, entry: dict) -> None:
        from safetensors.torch import save_file

        part = f"{self._path(key)}.{uuid.uuid4().hex}.part"  # machines may share folder and pid
        save_file(entry, part, {"crc32": checksum(entry)})
        os.replace(part, self._path(key))
        found = []
        for file in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # evicted by another process
                stat = file.stat()
                # A young part is being written, an old one was left by a process that died. Files
                # that are not ours are never touched.
                dead = file.name.endswith(".part") and time.time() - stat.st_mtime > 3600
                if SUFFIX in file.name and (dead or file.name.endswith(SUFFIX)):
                    found.append((stat.st_mtime_ns, stat.st_size, file.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            # Readers that have a file open keep it: an unlinked file lives until it is closed.
            if total > self.max_disk_bytes and path != self._path(key):
                total -= size
                with suppress(FileNotFoundError):
                    os.remove(path)


def checksum(entry: dict[str, Tensor]) -> str:
    """CRC-32 of the names and bytes of CPU tensors."""
    crc = 0
    for name, value in sorted(entry.items()):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


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


def alone() -> bool:
    """Is there no other rank?"""
    return not dist.is_initialized() or dist.get_world_size() == 1


def all_sum(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks (a new tensor); the tensor itself on one rank."""
    if not alone():
        values = values.clone()
        dist.all_reduce(values)
    return values


def even(parts: list, filler, sharded: bool) -> list:
    """The forward passes of this rank, as many as on any other: with sharded parameters each pass
    gathers them from all ranks, so a rank with fewer parts gets `filler` appended. Every rank calls
    this; communication: one all-reduce of a length. Not sharded: parts as they are."""
    if not sharded or alone():
        return parts
    most = torch.tensor(len(parts))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return parts + [filler] * (int(most) - len(parts))


def gather_dealt(mine: list, count: int, group, same: int = 1) -> list:
    """Undo a deal of `count` items, item i to rank i % S of the group: all of them, in order, on
    every rank. same: so many neighbours (of an engine with tensor parallelism) were dealt the same
    items, as if they were one rank. The items are pickled; for token ids and the like."""
    if group is None:
        return mine
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    dealt = found[::same]
    return [dealt[i % len(dealt)][i // len(dealt)] for i in range(count)]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (DTensor; every rank calls this), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def join_gradients(trained: list, max_norm: float) -> float:
    """Sum the gradients of trained parameters over all ranks, in place, in one message (those of
    sharded ones FSDP has added up); then scale them so that their norm over all parameters is at
    most max_norm (0: they stay). Returns the norm before that; RuntimeError if it is not finite.
    The gradient of a rank is that of (sum over ITS tokens) / (number of tokens on ALL ranks), so
    that the sum belongs to the global mean, however uneven the ranks' shares. A parameter without
    gradient on this rank takes part with zeros."""
    for p in trained:  # on one rank too: optimizers step on zeros, but skip a missing gradient
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    kinds = split_sharded(trained)
    replicated = [p for p in trained if not isinstance(p, DTensor)]
    if replicated and not alone():
        flat = torch.cat([p.grad.reshape(-1) for p in replicated])
        dist.all_reduce(flat)
        for p, grad in zip(replicated, flat.split([p.numel() for p in replicated])):
            p.grad.copy_(grad.view_as(p))
    norms = [whole(torch.nn.utils.get_total_norm(p.grad for p in kind)) for kind in kinds]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    if not norm.isfinite():
        raise RuntimeError(f"the norm of the gradient is {norm.item()}; nothing was changed")
    for kind in kinds if max_norm else ():
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm.item()


def split_sharded(parameters) -> list[list]:
    """Sharded parameters and whole ones apart, without empty lists: torch's functions on lists of
    tensors do not take both at once."""
    kinds = [], []
    for p in parameters:
        kinds[0 if isinstance(p, DTensor) else 1].append(p)
    return [kind for kind in kinds if kind]
