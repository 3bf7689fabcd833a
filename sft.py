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

Copied it needs mrsp.py, data.py and model.py. Check this file alone:  pytest tests/test_sft.py
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import get_cosine_schedule_with_warmup

import mrsp
from data import DataError
from model import ModelError


@dataclass(frozen=True)
class SFTConfig:
    """One supervised stage."""

    steps: int = 400  # optimizer steps
    groups: int = 16  # groups (videos, images) in a step, over all ranks
    texts: int = 8  # questions taken from a group
    micro_batches: int = 1  # parts that a rank's share of a step is computed in
    train: Literal["all", "llm", "projector"] = "all"  # llm: tower frozen, embeddings cached
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for decoder's and tower's matrices
    lr: float = 2e-5  # peak learning rate of AdamW
    muon_lr: float = 0.03  # peak learning rate of Muon
    warmup: float = 0.03  # share of the steps with rising learning rate; then cosine to 0
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 1.0  # largest norm of the gradient; 0: it is not clipped
    lora_rank: int = 0  # rank of adapters (LoRA) trained in place of the decoder's weights; 0: none
    lora_alpha: float = 32.0  # what adapters add to a layer is scaled by lora_alpha / lora_rank

    def __post_init__(self):
        least = dict.fromkeys(("steps", "groups", "texts", "micro_batches"), 1)
        least |= dict.fromkeys(("warmup", "weight_decay", "lora_rank", "grad_clip"), 0)
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:  # nan fails too
                raise ValueError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        for name in ("lr", "muon_lr", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.train not in ("all", "llm", "projector"):
            raise ValueError(f"train must be all, llm or projector, not {self.train!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, not {self.optimizer!r}")
        if self.lora_rank and (self.train, self.optimizer) != ("llm", "adamw"):
            raise ValueError("lora_rank needs train llm and optimizer adamw")


def group_rows(examples, texts: int) -> list[list]:
    """Rows that share their media, in groups of at most `texts`. Text rows share "no media".

    >>> from types import SimpleNamespace as S
    >>> rows = [S(media=tuple(m)) for m in ("a", "a", "b", "a", "ab", "")]
    >>> [["".join(r.media) for r in g] for g in group_rows(rows, 2)]
    [['a', 'a'], ['a'], ['b'], ['ab'], ['']]
    """
    by_media = {}
    for example in examples:  # as a Medium has its segment and num_frames, these are shared too
        by_media.setdefault(example.media, []).append(example)
    return [rows[i : i + texts] for rows in by_media.values() for i in range(0, len(rows), texts)]


def check_rows(rows: list) -> None:
    """DataError for a row that there is nothing to learn from."""
    for e in rows:
        if not e.response:
            raise DataError(
                f"question {e.id}: field 'reasoning' is empty, so SFT has nothing to learn: leave "
                "such rows out, or give them a reasoning or a response"
            )


def batches(items: list, size: int, steps: int, seed: int):
    """steps batches of `size` items; every epoch in a new order, the last of one epoch and the
    first of the next may share a batch. The same on every rank."""
    rng = random.Random(seed)
    queue = []
    for _ in range(steps):
        while len(queue) < size:
            queue += rng.sample(items, len(items))
        yield queue[:size]
        queue = queue[size:]


def deal(model, batch: list) -> list:
    """Every dp-th group of a batch, by size, for this rank's sequence: so the ranks have like work,
    and groups of like length share a pack (it is padded to the longest)."""

    def size(group: list) -> float:  # roughly its tokens (4 characters each)
        frames = sum(m.num_frames or model.recipe.num_frames for m in group[0].media)
        return frames + sum(len(row.problem) + len(row.response) for row in group) / 4

    return sorted(batch, key=size)[model.mesh.dp_rank :: model.mesh.dp]


def to_branches(model, rows: list, features) -> tuple:
    """Rows about the same media -> the part before their questions as the prompt, question +
    response + end token of each as a branch, and how many tokens of each branch are given. A
    response that thinks is asked for in thinking mode, another one by the bare question."""
    branches, context, heads = [], [], []
    for row in rows:
        full = model.build_prompt(row, features, row.response.startswith("<think>"))
        cut = full.shared
        heads.append(full.ids[:cut])
        answer = model.tokenizer(row.response, add_special_tokens=False).input_ids + [model.eos]
        branches.append(torch.cat([full.ids[cut:].cpu(), torch.tensor(answer)]))
        context.append(len(full.ids) - cut)
    if not all(head.equal(heads[0]) for head in heads):
        raise ModelError("the chat template begins otherwise with thinking: use --sft.texts 1")
    # DEVIATION 1: the part up to the media is one prompt for all of them.
    return replace(full, ids=full.ids[:cut], positions=full.positions[..., :cut]), branches, context


def optimizers(model, config: SFTConfig, seed: int) -> list[torch.optim.Optimizer]:
    """Freeze what is not trained; one or two optimizers (DEVIATION 2) for the rest."""
    if model.sharded and config.optimizer == "muon":
        raise ValueError("muon needs whole matrices: use optimizer adamw, or --fsdp false")
    parts = {"all": model, "llm": model.policy, "projector": model.projector}
    model.requires_grad_(False)
    if config.lora_rank:
        model.add_adapters(config.lora_rank, config.lora_alpha, seed)
    else:
        parts[config.train].requires_grad_(True)
    embedding = {id(p) for p in model.policy.model.get_input_embeddings().parameters()}
    embedding |= {id(p) for p in model.policy.lm_head.parameters()}
    matrices, rest = [], []
    for p in model.parameters():
        if p.requires_grad:
            muon = config.optimizer == "muon" and p.ndim == 2 and id(p) not in embedding
            (matrices if muon else rest).append(p)
    if not matrices + rest:
        raise ModelError(f"train {config.train}: a {type(model).__name__} model has no such part")
    groups = [{"params": kind} for kind in mrsp.split_sharded(rest)]
    decay = config.weight_decay
    found = [torch.optim.AdamW(groups, lr=config.lr, weight_decay=decay, betas=(0.9, 0.95))]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=decay))
    return found


def look(model, groups: list, config: SFTConfig, lost: dict | None) -> list[tuple]:
    """[(group, features of its media)] of the groups that can be seen. Rows of a group share their
    media, and their fate: those of the others go to `lost`, or raise (see MultiModal.usable)."""
    frames = model.recipe.frames

    def see(examples: list) -> list:
        if config.train == "llm":
            return [model.features(e, frames, model.mesh.sp_group) for e in examples]
        return model.features_trainable(examples, frames)  # new with every step: no cache

    seen, media = model.usable([group[0] for group in groups], see, lost)
    for group in groups:
        if group[0] not in seen:
            lost.update(dict.fromkeys(group, lost[group[0]]))
    kept = [group for group in groups if group[0] in seen]
    return list(zip(kept, media, strict=True))


def make_packs(model, seen: list[tuple], config: SFTConfig) -> tuple[list, int]:
    """The forward passes of a step on this rank (None: the idle pack, because every rank has to
    gather sharded parameters equally often), and the target tokens on all ranks."""
    parts = [to_branches(model, group, media) for group, media in seen]
    own = sum(sum(map(len, branches)) - sum(context) for _, branches, context in parts)
    tokens = mrsp.all_sum(torch.tensor(own)).item() // model.mesh.sp
    size = max(1, math.ceil(len(parts) / config.micro_batches))
    packs = []
    for i in range(0, len(parts), size):
        prompts, branches, context = zip(*parts[i : i + size])
        packs.append(mrsp.pack(prompts, branches, context))
    return mrsp.even(packs, None, model.sharded), tokens


def train(model, rows, config: SFTConfig, seed=0, bar=iter, log=None, lost=None) -> None:
    """Train model in place on rows (Examples with a response). Every rank calls this with the same
    rows; of each batch the ranks of one sequence (model.mesh) take every dp-th group. bar wraps
    the steps, log(step, metrics) takes loss, grad_norm, lr and tokens. lost: a dict that takes
    {row: message} of those whose media do not decode; None: that is an error."""
    check_rows(rows)
    opts = optimizers(model, config, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    warm = round(config.steps * config.warmup)
    schedules = [get_cosine_schedule_with_warmup(opt, warm, config.steps) for opt in opts]
    model.train()
    learned = 0  # tokens
    plan = [*batches(group_rows(rows, config.texts), config.groups, config.steps, seed), []]
    for step in bar(range(config.steps)):
        # 1. See the media; meanwhile the first files of the next batch are opened.
        mine = deal(model, plan[step])
        if config.train == "llm":
            soon = [group[0] for group in mine + deal(model, plan[step + 1])]
            model.prefetch(soon, model.recipe.frames, model.mesh.sp_group)
        seen = look(model, mine, config, lost)

        # 2. Log-probs of the answers, their mean over all ranks, backward.
        packs, tokens = make_packs(model, seen, config)
        learned += tokens
        own = 0.0
        for pack in packs:
            logp, _ = model(pack or model.idle())
            loss = -logp.sum() / max(tokens, 1) * (pack is not None)
            # The graph of the tower's features serves all packs.
            loss.backward(retain_graph=config.train != "llm")
            own += loss.item()

        # 3. Optimizer step.
        norm = mrsp.join_gradients(trained, config.grad_clip)
        total = mrsp.all_sum(torch.tensor(own, dtype=torch.float64)).item() / model.mesh.sp
        if log:
            lr = schedules[0].get_last_lr()[0]
            log(step, {"loss": total, "grad_norm": norm, "tokens": tokens, "lr": lr})
        for optimizer, scheduler in zip(opts, schedules):
            if tokens:  # else all rows were left out: no step of momentum and decay alone
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if not learned:
        raise DataError("SFT had no row to learn from: all were left out, as said above")
    model.merge_adapters()
    if config.train != "llm":
        model.forget_encoder()
