"""SFT: supervised fine-tuning on chains of thought, many questions behind one video.

    loss = - 1/N * sum over answer tokens of log pi(y_t | video, question, y_<t)

with N the number of answer tokens in the whole batch, over all ranks. This is stage 1 of the
paper's two (section 4: 36K chain-of-thought samples, then GRPO); the toy's pretraining runs
through the same function with other rows.

Rows about the same video form a group, and a group is one packed sequence (mrsp.py): the video is
the prompt, question + answer are the branches, and only the answer's tokens are targets.

    [ video ............ | question_1 answer_1 | question_2 answer_2 | ... ]
      prompt, once          context   targets

The large systems repeat the video for every question. Settings are not stated in the paper; VILA's
nearest public recipe is AdamW, 2e-5, cosine, warm-up 0.03, no weight decay, everything trained.

DEVIATION 1: the prefix of several questions about one video is computed once.
DEVIATION 2: optimizer "muon" (torch.optim.Muon for matrices, AdamW for the rest) is offered: from
    random weights, as in the toy, it needs several times fewer steps.

Check this file alone:  pytest tests/test_sft.py
"""

import math
import random
from dataclasses import dataclass, replace

import torch

import mrsp
from model import BARE


@dataclass(frozen=True)
class SFTConfig:
    """One supervised stage."""

    data: str = "sft.jsonl"  # rows; the path is relative to the data directory
    steps: int = 400  # optimizer steps
    groups: int = 16  # groups (videos, images) in a step, over all ranks
    texts: int = 8  # questions taken from a group
    micro_batches: int = 1  # parts that a rank's share of a step is computed in
    train: str = "all"  # all, llm (tower and projector frozen, embeddings cached), or projector
    optimizer: str = "adamw"  # adamw, or muon for the decoder's and tower's matrices
    lr: float = 2e-5  # peak learning rate of AdamW
    muon_lr: float = 0.03  # peak learning rate of Muon
    warmup: float = 0.03  # share of the steps with rising learning rate; then cosine to 0
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 1.0  # largest norm of the gradient
    thinking: bool = True  # ask in thinking mode; False: the bare question

    def __post_init__(self):
        if self.train not in ("all", "llm", "projector"):
            raise ValueError(f"train must be all, llm or projector, not {self.train!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, not {self.optimizer!r}")


def group_rows(examples, texts: int) -> list[list]:
    """Rows that share their media, in groups of at most `texts`. Text rows share "no media".

    >>> from types import SimpleNamespace as S
    >>> rows = [S(media=m, segment=None, num_frames=None) for m in "aabaa"]
    >>> [[r.media for r in g] for g in group_rows(rows, 3)]
    [['a', 'a', 'a'], ['a'], ['b']]
    """
    by_media = {}
    for example in examples:
        key = (example.media, example.segment, example.num_frames)
        by_media.setdefault(key, []).append(example)
    return [rows[i : i + texts] for rows in by_media.values() for i in range(0, len(rows), texts)]


def batches(items: list, size: int, steps: int, seed: int):
    """steps batches of `size` items; every epoch in a new order, the last of one epoch and the
    first of the next may share a batch. The same on every rank."""
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        while len(queue) < size:
            queue += rng.sample(items, len(items))
        yield queue[:size]
        queue = queue[size:]


@dataclass
class Packable:
    """A group, ready for mrsp.pack: the shared prompt, its branches, and their given tokens."""

    prompt: object
    branches: list
    context: list

    @property
    def length(self) -> int:
        return len(self.prompt.ids) + sum(len(b) for b in self.branches)

    @property
    def targets(self) -> int:
        return sum(len(b) - c for b, c in zip(self.branches, self.context))


def to_branches(model, rows: list, features, template, system=None) -> Packable:
    """Rows about the same media -> the part before their questions as the prompt, and
    question + response + end token of each as a branch."""
    out = Packable(None, [], [])
    for row in rows:
        full = model.build_prompt(row, features, template, system)
        cut = full.shared
        shared = replace(full, ids=full.ids[:cut], positions=full.positions[..., :cut])
        after = shared.positions.max() + 1 + torch.arange(len(full.ids) - cut)
        if not (full.positions[..., cut:] == after).all():
            raise ValueError("text behind the media must have consecutive positions")
        answer = model.tokenizer(row.response, add_special_tokens=False).input_ids + [model.eos]
        out.prompt = shared
        out.branches.append(torch.cat([full.ids[cut:], torch.tensor(answer)]))
        out.context.append(len(full.ids) - cut)
    return out


def split_evenly(items: list, parts: int) -> list[list]:
    """items in order, in at most `parts` parts of nearly equal size, none empty.

    >>> split_evenly([1, 2, 3, 4, 5], 2), split_evenly([1], 3)
    ([[1, 2, 3], [4, 5]], [[1]])
    """
    size = -(-len(items) // parts)
    return [items[i : i + size] for i in range(0, len(items), size or 1)]


def optimizers(model, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """Freeze what is not trained; one or two optimizers for the rest."""
    parts = {"all": [model], "llm": [model.llm], "projector": [model.projector]}[config.train]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    embedding = {id(p) for p in model.llm.get_input_embeddings().parameters()}
    embedding |= {id(p) for p in model.llm.lm_head.parameters()}
    matrices, rest = [], []
    for p in model.parameters():
        if p.requires_grad:
            muon = config.optimizer == "muon" and p.ndim == 2 and id(p) not in embedding
            (matrices if muon else rest).append(p)
    out = [
        torch.optim.AdamW(rest, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    ]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    return out


def schedule(step: int, config: SFTConfig) -> float:
    """Factor of the learning rate at a step: linear warm-up, then half a cosine down to 0."""
    warm = max(1, round(config.steps * config.warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def train(
    model,
    examples,
    config: SFTConfig,
    num_frames: int,
    template,
    cache=None,
    system=None,
    rank=0,
    world=1,
    group=None,
    seed=0,
    bar=iter,
    log=lambda step, metrics: None,
):
    """Train model in place on rows (Examples with a response). Every rank calls this with the same
    rows and takes every world-th group of each batch.

    Metrics per step: loss (mean negative log-likelihood of a target token), accuracy (share of
    targets whose... see below), grad_norm, lr, tokens (targets in the batch, all ranks).
    """
    groups = group_rows(examples, config.texts)
    opts = optimizers(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    base_lr = [g["lr"] for o in opts for g in o.param_groups]
    model.train()
    for step, batch in enumerate(bar(batches(groups, config.groups, config.steps, seed))):
        # Dealt by size, so that the ranks have like amounts of work.
        batch.sort(
            key=lambda rows: (
                (rows[0].num_frames or num_frames) * (rows[0].media != "") * 4
                + sum(len(r.problem) + len(r.response) for r in rows)
            )
        )
        mine, first = batch[rank::world], [rows[0] for rows in batch[rank::world]]
        if config.train == "llm":
            media = [model.features(e, num_frames, cache) for e in first]
        else:  # the embeddings change with every step: no cache
            media = model.features_trainable(first, num_frames)
        how = template if config.thinking else BARE
        packable = [to_branches(model, rows, x, how, system) for rows, x in zip(mine, media)]
        total = mrsp.all_sum(torch.tensor(float(sum(p.targets for p in packable))), group)
        loss = torch.zeros(())
        # Rows of a pack are padded to the longest: groups of like length go together.
        packable.sort(key=lambda p: p.length)
        for part in split_evenly(packable, config.micro_batches):
            packed = mrsp.pack(*zip(*[(p.prompt, p.branches, p.context) for p in part]))
            part_loss = -model(packed)[0].sum() / total
            # one graph over the tower's features serves all parts
            part_loss.backward(retain_graph=config.train != "llm")
            loss += part_loss.detach()
        mrsp.all_reduce_gradients(trained, group)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        factor = schedule(step, config)
        for group_, lr in zip([g for o in opts for g in o.param_groups], base_lr):
            group_["lr"] = lr * factor
        for o in opts:
            o.step()
            o.zero_grad()
        loss = mrsp.all_sum(loss, group)
        log(
            step,
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "lr": factor * config.lr,
                "tokens": total.item(),
            },
        )
    if config.train != "llm":
        model.forget_encoder()
