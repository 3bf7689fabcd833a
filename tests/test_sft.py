"""SFT: only answers are targets, and the groups do not change the loss."""

from dataclasses import replace

import pytest
import torch
from conftest import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import data
import mrsp
import sft
from families import load
from model import ModelError
from sft import SFTConfig

SLOW = pytest.mark.slow


def rows_of(toy, name="sft"):
    return data.load_rows(str(toy / f"{name}.jsonl"))


def run(model, rows, config, **options):
    losses = []
    sft.train(model, rows, config, log=lambda step, metrics: losses.append(metrics), **options)
    return losses


def test_the_loss_is_the_mean_over_answer_tokens_of_separate_sequences(toy, model):
    rows = rows_of(toy)[:5]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            prompt = model.prompt(row)
            answer = model.tokenizer(row.response).input_ids + [model.eos]
            logp, _ = model(mrsp.pack([prompt], [[torch.tensor(answer)]]))
            total, count = total - logp.sum().item(), count + len(answer)
    config = SFTConfig(steps=1, groups=1, texts=5, train="llm", warmup=0.0)
    (metrics,) = run(model, rows, config)
    assert metrics["tokens"] == count
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_micro_batches_and_small_groups_change_nothing(toy, model):
    rows, state = rows_of(toy)[:8], {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    for texts, micro in ((8, 1), (4, 2), (2, 4), (1, 3)):
        model.load_state_dict(state)
        config = SFTConfig(steps=1, groups=8 // texts, texts=texts, micro_batches=micro, lr=1e-3)
        (metrics,) = run(model, rows, config)
        seen.append((metrics["loss"], metrics["grad_norm"]))
    for loss, norm in seen:
        assert loss == pytest.approx(seen[0][0], rel=1e-5)
        assert norm == pytest.approx(seen[0][1], rel=1e-4)


@pytest.mark.parametrize("part", ["all", "llm", "projector"])
def test_only_what_is_named_is_trained(toy, model, part):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    key = model.encoder_hash()
    run(model, rows_of(toy), SFTConfig(steps=2, groups=2, train=part, lr=1e-2, warmup=0.0))
    now = model.state_dict()
    moved = {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}
    expected = {"all": {"policy", "tower", "projector"}, "llm": {"policy"}}
    assert moved == expected.get(part, {"projector"})
    assert (model.encoder_hash() == key) == (part == "llm")  # old embeddings are not reused


def _train(rank, world, folder, out, part="all", sp=1, fsdp=False):
    model = load(f"{folder}/init").double()
    model.mesh = mrsp.make_mesh(sp, "auto", 4, 2)
    if fsdp:
        model.shard_parameters(torch.float64)
        assert all(isinstance(p, DTensor) for p in model.policy.parameters())
    see, encoded = model.see, []
    model.see = lambda frames, *how: encoded.append(len(frames)) or see(frames, *how)
    config = SFTConfig(steps=3, groups=3, texts=3, train=part, micro_batches=2, lr=1e-3, warmup=0.0)
    losses = []
    if part != "llm":  # images and text: some parts have no media
        rows = data.load_rows(f"{folder}/base_images.jsonl")[:9]
    else:  # 3 videos
        rows = data.load_rows(f"{folder}/sft.jsonl")
    sft.train(model, rows, config, log=lambda step, m: losses.append(m))
    if part == "llm" and sp == world:  # 3 videos of 5 frames: a rank encodes its share of each
        assert sum(encoded) == (15 if sp == 1 else (9, 6)[rank])
    model.save_pretrained(f"{out}/{world}", write=rank == 0)
    torch.save(losses, f"{out}/{world}_{rank}.pt")


TRAINED = [("all", 1, False), ("all", 2, False), ("llm", 1, True), ("llm", 2, False)]
TRAINED = [pytest.param(*how, marks=SLOW) for how in [*TRAINED, ("projector", 1, True)]]


@pytest.mark.parametrize("part, sp, fsdp", [("all", 2, True), *TRAINED])
def test_two_ranks_train_like_one(toy, tmp_path, part, sp, fsdp):
    """Three groups a step, in two micro-batches: one rank has two of them, the other one; or both
    share all three, also the frames to encode, whose gradient goes back to the rank that encoded
    them. The checkpoints that they write are the same."""
    _train(0, 1, str(toy), str(tmp_path), part)
    run_ranks(_train, 2, 2, str(toy), str(tmp_path), part, sp, fsdp)
    one = torch.load(tmp_path / "1_0.pt")
    for rank in (0, 1):
        for a, b in zip(one, torch.load(tmp_path / f"2_{rank}.pt")):
            assert a == pytest.approx(b, rel=1e-9)
    states = [load(tmp_path / n, torch.float64).state_dict() for n in ("1", "2")]
    stored = load_file(tmp_path / "2" / "llm" / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied: written once, as the embedding
    for name, value in states[0].items():
        assert value.dtype == torch.float64
        assert (value - states[1][name]).abs().max() < 1e-9, name


def test_text_rows_are_skipped_where_only_the_projector_is_trained(toy, model):
    rows = [r for r in rows_of(toy, "base") if r.data_type == "text"][:2] + rows_of(toy)[:2]
    config = SFTConfig(steps=1, groups=2, texts=2, micro_batches=2, train="projector")
    (metrics,) = run(model, rows, config)
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(toy, model, optimizer):
    del model.policy.model.layers[1:]
    config = SFTConfig(steps=6, groups=1, train="llm", optimizer=optimizer, lr=5e-3)
    losses = [m["loss"] for m in run(model, rows_of(toy)[:2], config)]
    assert losses[-1] < 0.5 * losses[0]


def test_every_row_is_seen_once_an_epoch():
    items = list(range(10))
    flat = [x for batch in sft.batches(items, 4, 5, seed=1) for x in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == items
    assert flat != [x for batch in sft.batches(items, 4, 5, seed=2) for x in batch]


def test_the_learning_rate_rises_then_falls(toy, model):
    config = SFTConfig(steps=20, groups=1, texts=1, train="projector", lr=1e-3, warmup=0.2)
    lr = [m["lr"] for m in run(model, rows_of(toy), config)]
    assert lr[0] == 0 and lr[4] == 1e-3 == max(lr) and lr[-1] < 2e-5
    assert all(a <= b for a, b in zip(lr[:4], lr[1:5])) and sorted(lr[4:], reverse=True) == lr[4:]


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="all, llm or projector"):
        SFTConfig(train="tower")
    with pytest.raises(ValueError, match="adamw or muon"):
        SFTConfig(optimizer="sgd")


def test_a_template_whose_beginning_depends_on_thinking_is_refused(toy, model):
    model.tokenizer.chat_template = (
        "<|im_start|>system {% if enable_thinking %}think{% else %}user{% endif %}<|im_end|>"
        "<|im_start|>user {{ messages[-1].content }}<|im_end|><|im_start|>assistant "
    )
    rows = rows_of(toy)[:2]
    bare = replace(rows[1], response="A")
    media = model.features(rows[0], 5)
    sft.to_branches(model, rows, media)
    with pytest.raises(ModelError, match="use --sft.texts 1"):
        sft.to_branches(model, [rows[0], bare], media)


def test_a_row_without_reasoning_is_refused(toy, model):
    rows = rows_of(toy)
    rows[3] = replace(rows[3], response="")
    before = model.policy.lm_head.weight.clone()
    with pytest.raises(data.DataError, match=f"question {rows[3].id}: field 'reasoning' is empty"):
        run(model, rows, SFTConfig(steps=1, groups=1, train="llm"))
    assert torch.equal(before, model.policy.lm_head.weight)


def test_groups_whose_media_do_not_decode_are_left_out_and_all_their_rows_listed(toy, model):
    """The step is that of the batch without them, in both ways to the features."""
    rows = rows_of(toy)
    groups = sft.group_rows(rows, 99)
    gone = (data.Medium("video", str(toy / "gone.mp4")),)
    bad = [replace(e, media=gone) for e in groups[0]]
    kept = [e for group in groups[1:] for e in group]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for train in ("llm", "all"):
        config = SFTConfig(steps=1, groups=len(groups), texts=99, train=train, warmup=0.0)
        found = []
        for given, n, lost in ((bad + kept, len(groups), {}), (kept, len(groups) - 1, None)):
            model.load_state_dict(state)
            config = replace(config, groups=n)
            found.append(run(model, given, config, lost=lost)[0])
            if lost is not None:
                assert set(lost) == set(bad) and "gone.mp4" in lost[bad[0]]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
        assert found[0]["tokens"] == found[1]["tokens"]
        model.load_state_dict(state)
        with pytest.raises(data.DataError, match="gone.mp4: no such file"):
            run(model, bad + kept, replace(config, groups=len(groups)))


def one_rank_loses_all(rank, toy, state):
    """Two groups, a rank each; that of one rank does not decode: both step on the other's."""
    model = load(toy / "init")
    groups = sft.group_rows(rows_of(toy), 99)
    gone = (data.Medium("video", str(toy / "gone.mp4")),)
    rows = groups[0] + [replace(e, media=gone) for e in groups[1]]
    config, lost = SFTConfig(steps=1, groups=2, texts=99, train="llm", warmup=0.0, lr=1e-2), {}
    model.mesh = mrsp.make_mesh(1, "auto", 4, 2)
    (metrics,) = run(model, rows, config, lost=lost)
    assert metrics["tokens"] > 0
    assert torch.equal(model.state_dict()[KEY], state)


KEY = "policy.model.layers.0.mlp.up_proj.weight"


@SLOW
def test_a_rank_that_loses_its_share_steps_with_the_others(toy, model):
    groups = sft.group_rows(rows_of(toy), 99)
    config = SFTConfig(steps=1, groups=1, texts=99, train="llm", warmup=0.0, lr=1e-2)
    run(model, groups[0], config)
    run_ranks(one_rank_loses_all, 2, toy, model.state_dict()[KEY].clone())
