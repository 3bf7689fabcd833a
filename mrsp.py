"""MR-SP: one packed sequence for a prompt and its G answers, and embeddings computed once.

GRPO trains G sampled answers to ONE prompt, and the prompt of a long video is long: P = 256,000
tokens against R = 1,000 of an answer. Training code runs G full copies of the prompt, G * (P + R)
tokens. Nothing in the prompt depends on the answers behind it, so one copy is enough:

    naive   [ prompt | r_1 ]  [ prompt | r_2 ]  ...  [ prompt | r_G ]     G * (P + R) tokens
    packed  [ prompt | r_1 | r_2 | ... | r_G ]                            P + sum(R) tokens

with one rule of who sees whom. A token carries a segment (0 = prompt, g = answer g, -1 = padding)
and its order within prompt + answer; query i sees key j if

    (segment[j] == 0  or  segment[j] == segment[i])   and   order[j] <= order[i]        (*)

                     keys:  prompt   r_1    r_2
    queries: prompt         causal    .      .       Positions (RoPE) continue from the prompt in
             r_1            all     causal   .       every answer, as if the others were not there.
             r_2            all       .    causal

Log-probs and gradients are equal to those of the copies: nothing is approximated (the tests hold
both at 1e-9 in float64). The first token of every answer is predicted from the prompt's last
hidden state. The same rule serves sampling (G answers grow side by side behind one prompt, see
rollout.py) and SFT (one video, several questions: the branches are question + answer).

(*) enters unmodified Hugging Face models as one attention function, registered as "mrsp"; the
Layout travels as a keyword, model(..., mrsp=layout), and so reaches every layer, also when
gradient checkpointing runs it again. Two implementations of the same rule:
    dense    one masked call. Fine while L * L bits are little (below DENSE_LIMIT tokens).
    blocks   prompt causal, answers x prompt full, each answer causal on itself; partial results
             merged by their log-sum-exp. Linear memory, and only the needed blocks are computed.

Stage 1 of the paper's MR-SP is here too: encode_parallel splits the frames of a video over the
ranks and gathers the embeddings; EmbeddingCache keeps them, since the tower is frozen in RL.

Differences from the paper:
    DEVIATION 1: one packed sequence instead of G copies (section 5 trains 5 full copies).
    DEVIATION 2: embeddings outlive the step: kept in memory, and on disk across epochs and runs.

Glossary: B prompts, G answers a prompt, P prompt tokens, R answer tokens, L packed length, M
predicted tokens of a batch, H heads (Hkv of keys), D width of a head or of an embedding, F frames.
Check this file alone:  pytest tests/test_mrsp.py
"""

import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

DENSE_LIMIT = 2048  # longest packed sequence for which the (L, L) mask is built


# -------------------------------------------------------------------------------------- layout


@dataclass
class Layout:
    """Who sees whom. Queries (B, Lq) and keys (B, Lk) carry segment and order; while training they
    are the same tokens, while sampling the keys are the whole cache.

    lengths: per row (P, [R_1 ... R_G]), with prompt and answers back to back from token 0; needed
    for the block form. None while sampling.
    """

    q_segment: Tensor
    q_order: Tensor
    k_segment: Tensor
    k_order: Tensor
    lengths: list[tuple[int, list[int]]] | None = None
    _mask: Tensor | None = field(default=None, repr=False)

    def mask(self) -> Tensor:
        """Rule (*) as a boolean (B, 1, Lq, Lk); built once, used by every layer."""
        if self._mask is None:
            q_seg, q_ord = self.q_segment[:, :, None], self.q_order[:, :, None]  # (B, Lq, 1)
            k_seg, k_ord = self.k_segment[:, None, :], self.k_order[:, None, :]  # (B, 1, Lk)
            # Padding (-1) sees padding: a row of the softmax must not be empty.
            self._mask = (((k_seg == 0) | (k_seg == q_seg)) & (k_ord <= q_ord))[:, None]
        return self._mask

    def blocks(self, row: int) -> list[tuple[int, int, int, int, bool]]:
        """Rule (*) as rectangles (q0, q1, k0, k1, causal) of one row: squares are causal, the
        rest is full. Empty ones are left out: the kernels crash on them.

        >>> Layout(*[torch.zeros(1, 5)] * 4, lengths=[(2, [1, 2])]).blocks(0)
        [(0, 2, 0, 2, True), (2, 5, 0, 2, False), (2, 3, 2, 3, True), (3, 5, 3, 5, True)]
        """
        p, answers = self.lengths[row]
        plan, start = [(0, p, 0, p, True), (p, p + sum(answers), 0, p, False)], p
        for r in answers:
            plan.append((start, start + r, start, start + r, True))
            start += r
        return [b for b in plan if b[1] > b[0] and b[3] > b[2]]


@dataclass
class Pack:
    """B groups, one a row, right-padded to the same L.

    ids (B, L) token ids; positions (B, L), or (3, B, L) for M-RoPE; media (N, D) features that
    replace the token embeddings at media_at (N,), an index into the B * L flattened tokens.
    hidden_at (M,): index into B * L of the hidden state that predicts targets (M,);
    row, branch (M,): which prompt and which of its answers a target belongs to; step (M,): where
    in the answer it stands.
    """

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

    def pad(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) values of the targets -> (B, G, R) with zeros where nothing is, and the mask.
        Differentiable in values."""
        shape = (self.ids.shape[0], int(self.branch.max()) + 1, int(self.step.max()) + 1)
        at = (self.row, self.branch, self.step)
        mask = torch.zeros(shape, device=values.device).index_put(
            at, torch.ones_like(values).float()
        )
        return values.new_zeros(shape).index_put(at, values), mask


def pack(prompts, branches, context=None) -> Pack:
    """Pack B prompts with their answers: [prompt | r_1 | ... | r_G] in each row (DEVIATION 1).

    prompts: B objects with ids (P,), positions (P,) or (3, P), media (N, D) or None, media_at (N,)
    branches: B lists of token ids (R,), every R >= 1. The lists may differ in length.
    context: B lists of ints; the first `context` tokens of a branch are given, not predicted (the
    question, in SFT). Default 0: every token of a branch is a target.
    """
    if len(prompts) != len(branches) or not prompts:
        raise ValueError(f"{len(prompts)} prompts but {len(branches)} groups of answers")
    context = context or [[0] * len(group) for group in branches]
    device, b_rows = prompts[0].ids.device, len(prompts)
    lengths = [(len(p.ids), [len(r) for r in group]) for p, group in zip(prompts, branches)]
    if any(p == 0 or not group or min(group) == 0 for p, group in lengths):
        raise ValueError(f"empty prompt, group or answer in {lengths}")
    total = max(p + sum(group) for p, group in lengths)  # L

    ids = torch.zeros(b_rows, total, dtype=torch.long)
    segment = torch.full((b_rows, total), -1)
    order = torch.arange(total).repeat(b_rows, 1)
    positions = torch.zeros(*prompts[0].positions.shape[:-1], b_rows, total, dtype=torch.long)
    media, media_at, hidden_at, targets, owner = [], [], [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, branches)):
        p = len(prompt.ids)
        ids[b, :p], segment[b, :p], positions[..., b, :p] = (
            prompt.ids.cpu(),
            0,
            prompt.positions.cpu(),
        )
        if prompt.media is not None and len(prompt.media):
            media.append(prompt.media)
            media_at.append(prompt.media_at.cpu() + b * total)
        start, after = p, int(prompt.positions.max()) + 1
        for g, branch in enumerate(group):
            r, given = len(branch), context[b][g]
            here = slice(start, start + r)
            ids[b, here], segment[b, here] = branch.cpu(), g + 1
            order[b, here] = torch.arange(p, p + r)
            positions[..., b, here] = torch.arange(after, after + r)
            # Token t of the branch is predicted by token t - 1; token 0 by the prompt's last.
            before = torch.arange(start - 1, start + r - 1)
            before[0] = p - 1
            hidden_at.append(before[given:] + b * total)
            targets.append(branch[given:].cpu())
            owner += [(b, g, t) for t in range(r - given)]
            start += r
    row, branch, step = torch.tensor(owner).T.to(device)
    segment, order = segment.to(device), order.to(device)
    return Pack(
        ids=ids.to(device),
        positions=positions.to(device),
        media=torch.cat(media) if media else None,
        media_at=torch.cat([torch.zeros(0, dtype=torch.long), *media_at]).to(device),
        layout=Layout(segment, order, segment, order, lengths),
        hidden_at=torch.cat(hidden_at).to(device),
        targets=torch.cat(targets).to(device),
        row=row,
        branch=branch,
        step=step,
    )


def copies(prompts, branches, context=None) -> tuple[list, list, list | None]:
    """NAIVE: the same batch as G separate sequences a prompt, for pack(); what the tests and the
    benchmark compare with. Targets come out in the same order."""
    n = [len(group) for group in branches]
    return (
        [p for p, k in zip(prompts, n) for _ in range(k)],
        [[r] for group in branches for r in group],
        None if context is None else [[c] for group in context for c in group],
    )


# ----------------------------------------------------------------------------------- attention


def mrsp_attention(
    module, query, key, value, attention_mask, mrsp: Layout = None, scaling=None, **_
):
    """The attention function for Hugging Face models: AttentionInterface.register("mrsp", this).

    query (B, H, Lq, D), key and value (B, Hkv, Lk, D) -> (B, Lq, H, D), None. Dropout and sliding
    windows are not supported by the packed layout. Padding belongs into the layout: transformers
    drops a model's attention_mask for attention functions it does not know.
    """
    if attention_mask is not None:
        raise ValueError("attention 'mrsp' takes its mask from the layout; pass no attention_mask")
    if mrsp is None:
        raise ValueError("attention 'mrsp' needs the keyword mrsp=Layout in the model's call")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if mrsp.lengths is None or query.shape[2] <= DENSE_LIMIT:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mrsp.mask(), scale=scale, enable_gqa=True
        )
    else:
        out = torch.cat(
            [
                BlockAttention.apply(query[[b]], key[[b]], value[[b]], mrsp.blocks(b), scale)
                for b in range(query.shape[0])
            ]
        )
    return out.transpose(1, 2).contiguous(), None


def has_kernel(q: Tensor) -> bool:
    """Does block_forward have a kernel for this tensor's device?"""
    return q.device.type == "cpu"


def block_forward(q, k, v, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one block: out (1, H, Lq, D) and its log-sum-exp (1, H, Lq), natural log."""
    if has_kernel(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scale
        )
    score = block_score(q, k, causal, scale)
    lse = score.logsumexp(-1)
    weight = (score - lse[..., None]).exp().to(v.dtype)
    return weight @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def block_backward(grad, q, k, v, out, lse, causal: bool, scale: float):
    """Gradients of one block from the FINAL out and lse of its rows: with those, softmax weights
    exp(score - lse) are the global ones, and each block's share simply adds up."""
    if has_kernel(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    group = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    weight = (block_score(q, k, causal, scale) - lse[..., None]).exp()  # (1, H, Lq, Lk)
    d_weight = (grad @ v_all.mT).to(weight.dtype)
    d_score = weight * (d_weight - (grad * out).sum(-1, keepdim=True).to(weight.dtype)) * scale
    d_score, weight = d_score.to(q.dtype), weight.to(q.dtype)
    fold = lambda x: x.unflatten(1, (-1, group)).sum(2)  # noqa: E731  query heads of one K/V head
    return d_score @ k_all, fold(d_score.mT @ q), fold(weight.mT @ grad)


def block_score(q, k, causal: bool, scale: float) -> Tensor:
    """NAIVE scores of one block in float32 or wider: for devices without a kernel below."""
    wide = torch.promote_types(q.dtype, torch.float32)
    score = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).to(wide) * scale
    if causal:
        keep = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
        score = score.masked_fill(~keep, float("-inf"))
    return score


class BlockAttention(torch.autograd.Function):
    """Attention over a plan of blocks of one row: q (1, H, L, D), k, v (1, Hkv, L, D).

    Forward merges the blocks: with lse = log sum exp(score) of each,
        lse = logaddexp(lse_1, lse_2),  out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.
    It is one autograd.Function because the kernels' lse carries no gradient: plain autograd
    through the merge runs, and is wrong by 40 %.
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks, scale):
        out = torch.zeros_like(q)
        # lse is kept in the kernels' own precision: float64 for float64, else float32
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for q0, q1, k0, k1, causal in blocks:
            part, part_lse = block_forward(
                q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], causal, scale
            )
            both = torch.logaddexp(lse[:, :, q0:q1], part_lse.to(wide))
            keep = (lse[:, :, q0:q1] - both).exp()[..., None].to(q.dtype)
            add = (part_lse - both).exp()[..., None].to(q.dtype)
            out[:, :, q0:q1] = out[:, :, q0:q1] * keep + part * add
            lse[:, :, q0:q1] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grad = grad.contiguous()
        for q0, q1, k0, k1, causal in ctx.blocks:
            rows, cols = slice(q0, q1), slice(k0, k1)
            parts = block_backward(
                grad[:, :, rows],
                q[:, :, rows],
                k[:, :, cols],
                v[:, :, cols],
                out[:, :, rows],
                lse[:, :, rows],
                causal,
                ctx.scale,
            )
            dq[:, :, rows] += parts[0]
            dk[:, :, cols] += parts[1]
            dv[:, :, cols] += parts[2]
        return dq, dk, dv, None, None


# ---------------------------------------------------------------- stage 1: encode once, in parallel


@torch.no_grad()
def encode_parallel(encode, frames: Tensor, group=None) -> Tensor:
    """Encode a video's frames, split evenly over the ranks of `group` (None: this process alone).

    frames (F, H, W, 3), the same on every rank; encode maps (f, H, W, 3) -> (f, K, D), frame by
    frame. Returns (F, K, D) on every rank, equal to encode(frames).

    Communication: one all-gather; each rank sends its ceil(F / n) frames' embeddings (the last
    ranks pad with copies of the last frame; padding is cut off again). No backward: the tower is
    frozen.
    """
    n = dist.get_world_size(group) if group is not None else 1
    if n == 1 or len(frames) == 0:
        return encode(frames)
    share = -(-len(frames) // n)
    at = torch.arange(share) + dist.get_rank(group) * share
    mine = encode(frames[at.clamp(max=len(frames) - 1)]).contiguous()  # (share, K, D)
    whole = mine.new_empty(n * share, *mine.shape[1:])
    dist.all_gather_into_tensor(whole, mine, group=group)
    return whole[: len(frames)]


class EmbeddingCache:
    """Embeddings by key, in memory (least recently used goes first) and, with a folder, on disk
    (DEVIATION 2).

    A key names everything the embedding depends on: the media file's content, the frames taken,
    and the encoder's weights and preprocessing (see media_key). Disk entries are safetensors
    files, written under another name and renamed, so that ranks and runs may share a folder; one
    that does not read back is reported and computed again.
    """

    def __init__(self, folder: str | None = None, max_bytes: int = 4 << 30):
        self.folder, self.max_bytes, self.bytes = folder, max_bytes, 0
        self.memory: OrderedDict[str, Tensor] = OrderedDict()
        self.hits = self.misses = 0
        if folder:
            os.makedirs(folder, exist_ok=True)

    def get(self, key: str, compute) -> Tensor:
        """The tensor under key; compute() makes it on a miss. Never give it back modified."""
        value = self.memory.get(key)
        if value is not None:
            self.memory.move_to_end(key)
            self.hits += 1
            return value
        value = self._read(key)
        if value is None:
            self.misses += 1
            value = compute().cpu()  # host memory: the model moves what it uses
            self._write(key, value)
        else:
            self.hits += 1
        self.memory[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes and len(self.memory) > 1:
            self.bytes -= self.memory.popitem(last=False)[1].nbytes
        return value

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key + ".safetensors")

    def _read(self, key: str) -> Tensor | None:
        if not self.folder or not os.path.isfile(self._path(key)):
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._path(key))["embeddings"]
        except (SafetensorError, KeyError, OSError) as error:
            print(f"embedding cache: {self._path(key)} is damaged ({error}); computing it again")
            return None

    def _write(self, key: str, value: Tensor) -> None:
        if self.folder:
            from safetensors.torch import save_file

            part = f"{self._path(key)}.{os.getpid()}.part"
            save_file({"embeddings": value.contiguous()}, part)
            os.replace(part, self._path(key))


def media_key(content: str, encoder: str, *settings) -> str:
    """Cache key: hash of the media's content hash, the encoder's hash, and all settings (frames,
    segment ...) that the embedding depends on."""
    return hashlib.sha256(repr((content, encoder, *settings)).encode()).hexdigest()[:32]


def file_hash(path: str) -> str:
    """Content hash of a file, remembered by path, size and modification time."""
    stat = os.stat(path)
    known = (path, stat.st_size, stat.st_mtime_ns)
    if known not in _FILE_HASH:
        with open(path, "rb") as file:
            _FILE_HASH[known] = hashlib.file_digest(file, "sha256").hexdigest()
    return _FILE_HASH[known]


_FILE_HASH: dict[tuple, str] = {}


# ------------------------------------------------------------------------------- data parallelism


def all_reduce_gradients(parameters, group=None) -> None:
    """Sum the gradients over the ranks of the data-parallel group, in place, in one message.

    The loss of a rank is (sum over ITS tokens) / (number of tokens on ALL ranks), so that the sum
    is the gradient of the global mean, whatever the number of ranks and however uneven their
    shares. A parameter without gradient on this rank takes part with zeros.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:  # on one rank too: optimizers step on zeros, but skip a missing gradient
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat, group=group)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


def all_sum(values: Tensor, group=None) -> Tensor:
    """Sum of a tensor over the ranks (a new tensor); the tensor itself without a process group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values
