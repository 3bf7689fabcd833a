"""SFT: supervised fine-tuning on chains of thought, many questions behind one video.

    loss = - 1/N * sum over answer tokens of log pi(y_t | video, question, y_<t)

with N the number of answer tokens in the whole batch, over all ranks. This is stage 1 of the
paper's two (section 4: 36K chain-of-thought samples, then GRPO); the toy's pretraining runs
through the same function with other rows.

Rows about the same video form a group, and a group is one packed sequence (mrsp.py): the video is
the prompt, question + answer are the branches, and only the answer's tokens are targets.

    [ video ............ | question_1 answer_1 | question_2 answer_2 | ... ]
      prompt, once          context   targets

With lora_rank, low-rank adapters are trained instead of the decoder's weights (model.add_adapters)
and merged when the stage ends.

The large systems repeat the video for every question. Settings are not stated in the paper; VILA's
nearest public recipe is AdamW, 2e-5, cosine, warm-up 0.03, no weight decay, everything trained.

DEVIATION 1: the prefix of several questions about one video is computed once.
DEVIATION 2: optimizer "muon" (torch.optim.Muon for matrices, AdamW for the rest) is offered: from
    random weights, as in the toy, it needs several times fewer steps.

Check this file alone:  pytest tests/test_sft.py
"""

import random
from dataclasses import dataclass, replace

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
    train: str = "all"  # all, llm (tower and projector frozen, embeddings cached), or projector
    optimizer: str = "adamw"  # adamw, or muon for the decoder's and tower's matrices
    lr: float = 2e-5  # peak learning rate of AdamW
    muon_lr: float = 0.03  # peak learning rate of Muon
    warmup: float = 0.03  # share of the steps with rising learning rate; then cosine to 0
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 1.0  # largest norm of the gradient
    lora_rank: int = 0  # rank of adapters (LoRA) trained in place of the decoder's weights; 0: none
    lora_alpha: float = 32.0  # what adapters add to a layer is scaled by lora_alpha / lora_rank

    def __post_init__(self):
        if self.train not in ("all", "llm", "projector"):
            raise ValueError(f"train must be all, llm or projector, not {self.train!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, not {self.optimizer!r}")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(f"need lora_rank >= 0 and lora_alpha > 0: {self}")
        if self.lora_rank and (self.train, self.optimizer) != ("llm", "adamw"):
            raise ValueError(f"lora_rank needs train llm and optimizer adamw: {self}")


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
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        while len(queue) < size:
            queue += rng.sample(items, len(items))
        yield queue[:size]
        queue = queue[size:]


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
        raise ModelError("the chat template begins otherwise with thinking: use --sft_texts 1")
    # DEVIATION 1: the part up to the media is one prompt for all of them.
    return replace(full, ids=full.ids[:cut], positions=full.positions[..., :cut]), branches, context


def optimizers(model, config: SFTConfig, seed: int) -> list[torch.optim.Optimizer]:
    """Freeze what is not trained; one or two optimizers (DEVIATION 2) for the rest."""
    if model.sharded and config.optimizer == "muon":
        raise ValueError("muon needs whole matrices: use optimizer adamw, or --fsdp false")
    parts = {"all": model, "llm": model.llm, "projector": model.projector}
    model.requires_grad_(False)
    if config.lora_rank:
        model.add_adapters(config.lora_rank, config.lora_alpha, seed)
    else:
        parts[config.train].requires_grad_(True)
    embedding = {id(p) for p in model.llm.get_input_embeddings().parameters()}
    embedding |= {id(p) for p in model.llm.lm_head.parameters()}
    matrices, rest = [], []
    for p in model.parameters():
        if p.requires_grad:
            muon = config.optimizer == "muon" and p.ndim == 2 and id(p) not in embedding
            (matrices if muon else rest).append(p)
    if not matrices + rest:
        raise ModelError(f"train {config.train}: a {type(model).__name__} model has no such part")
    groups = [{"params": kind} for kind in mrsp.split_sharded(rest)]
    out = [
        torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    ]
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    return out


def train(model, rows, config: SFTConfig, seed=0, bar=iter, log=None, lost=None) -> None:
    """Train model in place on rows (Examples with a response). Every rank calls this with the same
    rows; of each batch the ranks of one sequence (model.mesh) take every dp-th group. bar wraps
    the steps, log(step, metrics) takes loss, grad_norm, lr and tokens (see train.METRICS). lost: a
    dict that takes {row: message} of those whose media do not decode; None: that is an error."""
    mesh = model.mesh
    check_rows(rows)
    groups, opts = group_rows(rows, config.texts), optimizers(model, config, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    warm, frames = round(config.steps * config.warmup), model.recipe.frames
    schedules = [get_cosine_schedule_with_warmup(o, warm, config.steps) for o in opts]

    def size(group):  # roughly its tokens (4 characters each)
        media = sum(m.num_frames or model.recipe.num_frames for m in group[0].media)
        return media + sum(len(r.problem) + len(r.response) for r in group) / 4

    def dealt(batch):
        # By size: the ranks have like amounts of work, and groups of like length, which are
        # padded to the longest of them, share a pack.
        return sorted(batch, key=size)[mesh.dp_rank :: mesh.dp]

    def see(examples):
        if config.train == "llm":
            return [model.features(e, frames, mesh.sp_group) for e in examples]
        return model.features_trainable(examples, frames)  # new with every step: no cache

    model.train()
    plan = [*batches(groups, config.groups, config.steps, seed), []]
    for step in bar(range(config.steps)):
        mine = dealt(plan[step])
        if config.train == "llm":  # while this batch trains, the first files of the next one open
            soon = [group[0] for group in mine + dealt(plan[step + 1])]
            model.ahead(soon, frames, mesh.sp_group)
        seen, media = model.usable([group[0] for group in mine], see, lost)
        for group in [g for g in mine if g[0] not in seen]:  # they share media, and their fate
            mine.remove(group)
            lost.update(dict.fromkeys(group, lost[group[0]]))
        parts = [to_branches(model, g, m) for g, m in zip(mine, media)]
        count = sum(len(b) - c for _, bs, cs in parts for b, c in zip(bs, cs))
        tokens, loss = mrsp.all_sum(torch.tensor(count)).item() // mesh.sp, 0.0
        each = max(1, -(-len(parts) // config.micro_batches))
        micro = [mrsp.pack(*zip(*parts[i : i + each])) for i in range(0, len(parts), each)]
        while model.sharded and len(micro) < config.micro_batches:
            micro.append(None)  # every rank gathers parameters equally often
        for packed in micro:
            logp, _ = model(packed or model.idle())
            part = -logp.sum() / max(tokens, 1) * (packed is not None)
            # the graph of the tower's features serves all parts
            part.backward(retain_graph=config.train != "llm")
            loss += part.item()
        mrsp.all_reduce_gradients(trained)
        norm = mrsp.clip_gradients(trained, config.grad_clip)
        loss = mrsp.all_sum(torch.tensor(loss, dtype=torch.float64)).item() / mesh.sp
        if log:
            metrics = {"loss": loss, "grad_norm": norm, "tokens": tokens}
            log(step, metrics | {"lr": schedules[0].get_last_lr()[0]})
        for optimizer, scheduler in zip(opts, schedules):
            if tokens:  # else all rows were left out: no step of momentum and decay alone
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.merge_adapters()
    if config.train != "llm":
        model.forget_encoder()
