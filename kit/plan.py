"""The plan of a run: what it will need, before it takes a GPU. Predicted from shapes; nothing runs.

    python train.py --preset hour --dry_run     for a run's own checkpoint, rows and ranks

A run of long videos rarely fails at its start: it fails at the first long video, in the backward
pass, an hour later. A plan answers before: how long is the packed sequence, what does each part of
a step keep on a GPU, does it fit, and which setting would make it fit.

    (D, M, V, heads) of config.json --+
    F frames x K tokens a frame       +--> memory() --> {part: bytes of a GPU}, and their peak
    ranks, sp, chunk, prefill       --+

    rollout     weights  optimizer  reference   sampler, its keys and values, one layer's prefill
    backward    weights  optimizer  reference   activations of all layers, logits or one layer again
      its end   weights  optimizer  reference   gradients of all weights, one layer again
                |____ always there __________|  |__ come and go: the peak is the largest row, not
                                                    the sum of all parts
                                                (a PyTorch sampler stays; vLLM's sleeps meanwhile)

Large systems try and adapt: DeepSpeed has estimators for parameters and optimizer alone, vLLM
profiles one forward pass at its start, trainers leave the batch size to the user. Counting is
possible here since a step has one shape: one packed sequence, checkpointed layer by layer.

What the numbers leave out: the vision tower (it has gone through the video before), fragmentation
and CUDA's own memory: compare them with 92 % of a GPU. Tests count the bytes of every tensor alive
in a real step of small decoders: the prediction is within a fifth of the count.

Check this file alone:  pytest tests/test_plan.py
"""

import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import mrsp
import sft
from data import DataError, Example
from families import load
from families.files import read_json
from kit import toy
from kit.decode import Loader
from kit.presets import PRESETS, Settings
from kit.ranks import Ranks
from kit.vllm_engine import AT_ONCE, engine_kind
from model import ModelError
from rollout import RolloutError

# -------------------------------------------------------------------------- memory of a step

CONFIGS = Path(__file__).parent / "configs"  # of published checkpoints, without weights
GIB = 2**30


def shape_of(config) -> dict[str, int]:
    """What memory() wants to know of a decoder, from its config (of transformers)."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    names += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    shape = {name: getattr(config, name) for name in names}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return shape | {"head_dim": head}


QWEN_7B = shape_of(SimpleNamespace(**read_json(CONFIGS / "qwen2.5-vl-7b", "config.json")))


def widths(shape: dict) -> tuple[int, ...]:
    """D of the model, M of the MLP, V of the vocabulary, Q of all query heads, K of all keys'."""
    q = shape["num_attention_heads"] * shape["head_dim"]
    k = shape["num_key_value_heads"] * shape["head_dim"]
    return shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"], q, k


def parameters(shape: dict) -> tuple[int, int]:
    """Parameters of one layer, and of embedding, final norm and LM head.

    >>> layer, root = parameters(QWEN_7B)
    >>> round((28 * layer + root) / 1e9, 2)  # as published
    7.62
    """
    d, m, v, q, k = widths(shape)
    attention = 2 * d * (q + k) + q + 2 * k  # with the biases of queries, keys and values
    matrices = 1 if shape["tie_word_embeddings"] else 2
    return attention + 3 * d * m + 2 * d, matrices * v * d + d


def travelling(shape: dict, length: int, sp: int, c: int) -> float:
    """Bytes of the queries, keys and values that one layer exchanges or gathers, on a GPU."""
    *_, q, k = widths(shape)
    ulysses = math.gcd(shape["num_attention_heads"], shape["num_key_value_heads"], sp)
    found = 0.0
    if ulysses > 1:
        found += 2 * c * length / sp * (q + 2 * k)
    if ulysses < sp:  # gathered whole, and their gradients
        found += (c + 4) * 2 * k * length
    return found


def memory(
    shape: dict,
    prompt: int,
    answers: int,
    gpus=1,
    sp=1,
    c=2,
    chunk=8192,
    sampler="torch",
    prefill=None,
    reserved=0.0,
    reference=True,
) -> dict[str, float]:
    """Bytes of a GPU, by part, at the peak of a step that trains prompt + answers tokens (answers
    of one prompt) with FSDP2 over all GPUs and sp ranks a sequence.

    shape: of the decoder, named as in config.json; c: bytes of a number in a layer; chunk: answer
    tokens in the LM head at once; sampler: torch, vllm, or none (SFT); prefill: prompt tokens that
    it takes at once (None: all); reserved: bytes that vLLM takes for itself, if it is more than it
    needs; reference: is there one, with weights of its own? `total` is the peak: see above.
    """
    d, m, v, q, k = widths(shape)
    n_layers = shape["num_hidden_layers"]
    layer, root = parameters(shape)
    n = n_layers * layer + root
    length = prompt + answers
    t = length / sp
    sharded = gpus > 1
    at_once = min(prefill or prompt, prompt)  # tokens of the prefill, whose one layer is held
    part = {
        "weights": 4 * n / gpus,  # float32 masters
        "optimizer": 8 * n / gpus,  # AdamW's two averages
        "reference": c * n / gpus if reference else 0.0,
        "sampler": c * n if sampler else 0.0,  # whole
        # Two layers, and embedding and head throughout: gathered, or cast for a layer.
        "gathered": c * (2 * layer + root) if sharded or c < 4 else 0,
        # Sharded: and those of one layer before they are added up.
        "gradients": 4 * n / gpus + ((4 + c) * layer if sharded else 0),
        # What checkpointing keeps of each layer; final norm and its input; the pack's layout.
        "activations": c * t * d * (n_layers + 2) + 64 * t,
        # One layer again, during its backward.
        "layer": t * (16 * d + c * (3 * d + 3 * q + 2 * k + 6 * m)),
        "kv": travelling(shape, length, sp, c),
        "embeddings": c * t * d,  # in host memory: 4 D a token of the whole video
        "logits": 16 * v * min(chunk, answers / sp),  # float32: logits, log-softmax, exp, product
        # The sampler's cache, and one layer of the prefill.
        "rollout": c * (n_layers * 2 * k * length + at_once * (4 * d + 3 * m)) if sampler else 0.0,
    }
    held = part["weights"] + part["optimizer"] + part["reference"]
    # The MLP's part is freed before attention's backward, when keys and values travel.
    running = part["layer"] + max(0, part["kv"] - 6 * c * t * m)
    begin = part["activations"] + max(running + 4 * root, part["logits"])  # of backward
    end = 2 * c * t * d + part["gradients"] + running  # at the first layer
    training = part["gathered"] + part["embeddings"] + max(begin, end)
    rollout = max(part["sampler"] + part["rollout"], reserved)
    asleep = 0.0 if sampler == "vllm" else part["sampler"]
    return part | {"total": held + max(training + asleep, rollout)}


# ----------------------------------------------------------------------------- the plan of a run


@dataclass
class Plan:
    """What is known of a run before it begins."""

    lines: list[str] = field(default_factory=list)  # to show
    memory: list[str] = field(default_factory=list)  # of a rank, by part
    prompt: list[str] = field(default_factory=list)  # the first one, as the model would get it
    wrong: list[str] = field(default_factory=list)  # was given, and cannot be right
    lacking: list[str] = field(default_factory=list)  # has to come before the run
    published: bool = False  # by the settings of a published checkpoint, which is not here


def check(settings: Settings, ranks: Ranks) -> list[str]:
    """Looks at all that a run needs before anything large is loaded; returns lines to show first:
    ranks and memory. Raises DataError with a line for each thing that is wrong or missing."""
    kind = engine_kind(settings.run.rollout, settings.for_gpus)
    found = make_plan(settings, ranks.world, kind)
    if found.wrong or found.lacking:
        raise DataError("missing for this run:\n  " + "\n  ".join(found.wrong + found.lacking))
    return found.lines


def show(settings: Settings, notes: list[str], ranks: Ranks) -> None:
    """--dry_run: prints settings, ranks, memory and the first prompt of a run on 8 ranks (one, if
    nothing is sharded; or those that torchrun started), whatever this machine has.

    Raises DataError for what is wrong; what only has to come before the run (rows, checkpoint,
    vLLM, memory) is said, and is no error."""
    if ranks.rank > 0:
        return
    for name, part in vars(settings).items():
        if settings.makes_toy or name != "toy":
            print(f"{name}: " + ", ".join(f"{k}={v!r}" for k, v in asdict(part).items()))
    usual = 8 if settings.ranks.fsdp else 1
    world = max(int(os.environ.get("WORLD_SIZE", usual)), settings.ranks.sp)
    with tempfile.TemporaryDirectory() as folder:
        if settings.makes_toy:
            settings = toy.sketch(settings, Path(folder))
        sampler = settings.run.rollout or ("torch" if settings.run.preset == "toy" else "vllm")
        found = make_plan(settings, world, sampler, dry=True)
    print("\n".join([*notes, *found.lines, *found.memory, *found.prompt]))
    for line in found.lacking:
        print(f"before the run: {line}")
    if found.wrong:
        raise DataError("wrong for this run:\n  " + "\n  ".join(found.wrong))


def make_plan(s: Settings, world: int, sampler: str, dry: bool = False) -> Plan:
    """Plan of a run by `world` ranks with this sampler. dry: a published checkpoint need not be on
    this machine, its settings are enough; nor vLLM."""
    found = Plan()
    if world % s.ranks.sp:
        found.wrong.append(
            f"--sp {s.ranks.sp} does not divide the {world} rank(s): start with torchrun "
            f"--nproc_per_node {s.ranks.sp} (or a multiple), or take another --sp"
        )
    if sampler == "torch" and s.rollout.tp > 1:
        found.wrong.append("--rollout.tp is vLLM's: add --rollout vllm, or leave it out")
    if dry and sampler == "vllm":
        try:
            engine_kind("vllm")
        except RolloutError as error:
            found.lacking.append(str(error))
    rows = check_rows(s, found)
    if s.run.model is None:
        if not s.makes_toy:
            found.lacking.append("no model: give --model FOLDER or a hub id")
        return found
    model = None
    try:
        model = load(checkpoint(s, found) if dry else s.run.model, weights=False)
        model.recipe = s.recipe
        model.loader = Loader(min(s.media.decode_ahead, 1), s.media.decode_seconds)
        found.lines.append(describe_ranks(s, model.policy.config, world, sampler))
        check_memory(s, model, world, sampler, found)
        for e in rows:
            model.check_question(e)
        check_prompt(s, model, rows[:1], sampler, found)
    except (DataError, ModelError) as error:
        skipped = s.media.on_bad_video == "skip" and getattr(error, "question", "")
        line = f"--model {error}" if model is None else str(error)
        (found.lines if skipped else found.wrong).append(line)
    finally:
        if model is not None:
            model.loader.close()
    return found


def check_rows(s: Settings, found: Plan) -> list[Example]:
    """All rows that are named; what is wrong with them, or which media are missing, in found."""
    skip = s.media.on_bad_video == "skip"
    rows = []
    if s.run.data is None and not s.makes_toy:
        found.lacking.append(
            "no rows: give --data FILE.jsonl, with --video_dir DIR, or take --preset toy"
        )
    for path in filter(None, (s.run.data, s.run.sft_data, s.run.test_data, s.eval.other_data)):
        try:
            own = data.load_rows(path, s.run.video_dir, [] if skip else None)
            if path == s.run.sft_data:
                sft.check_rows(own)
            rows += own
        except DataError as error:
            found.wrong.append(str(error))
    files = sorted({m.path for e in rows for m in e.media})
    gone = [path for path in files if not os.path.isfile(path)]
    if gone:
        line = (
            f"{len(gone)} of {len(files)} media files are missing, the first is {gone[0]}: "
            "download them, or give the folder that the rows' paths start from as --video_dir"
        )
        (found.lines if skip and len(gone) < len(files) else found.wrong).append(line)
        rows = [e for e in rows if not any(m.path in gone for m in e.media)]
    return rows


def checkpoint(s: Settings, found: Plan) -> str | Path:
    """The checkpoint's folder; of a preset's published one the settings that came along."""
    name = s.run.preset
    published = name in PRESETS and s.run.model == PRESETS[name].run.model
    if os.path.isdir(s.run.model) or not published:
        return s.run.model
    found.lacking.append(f"the checkpoint {s.run.model} is taken from the hub, if it is not there")
    found.published = True
    own = CONFIGS / name
    return own if own.is_dir() else CONFIGS / "qwen2.5-vl-7b"


def describe_ranks(s: Settings, config, world: int, sampler: str) -> str:
    """Who does what, in a sentence. ModelError if the heads cannot be shared like this."""
    heads = config.num_attention_heads, config.num_key_value_heads
    try:
        _, _, why = mrsp.choose_method(s.ranks.sp_attention, s.ranks.sp, *heads)
    except ValueError as error:
        raise ModelError(error) from None
    sharded = "parameters, gradients and optimizer whole on each"
    if s.ranks.fsdp:
        sharded = f"parameters, gradients and optimizer sharded over all {world} (FSDP2)"
    engine = "a PyTorch sampler each"
    if sampler == "vllm":
        engine = f"a vLLM engine for {s.rollout.tp}" if s.rollout.tp > 1 else "a vLLM engine each"
    dp = world // s.ranks.sp
    return f"{world} rank(s): data parallel {dp} x sp {s.ranks.sp} ({why}); {sharded}; {engine}"


def check_memory(s: Settings, model, world: int, sampler: str, found: Plan) -> None:
    """memory() of a GRPO step on a 640 x 360 video of 2 seconds a frame (with its sound, where that
    is heard; or 1,000 words of text), and whether this machine has it."""
    config, recipe = model.policy.config, s.recipe
    question = data.stand_in("")
    media = []
    frames = recipe.max_frames if recipe.fps else recipe.num_frames
    if "video" in model.takes:
        question = replace(question, problem="why " * 100)
        media = [model.blank("video", frames, 360, 640, 2.0 * np.arange(frames))]
        if "audio" in model.takes:
            sound = torch.empty(
                model.audio_tokens(2 * frames * 16000), model.media_width, device="meta"
            )
            media = [media[0]._replace(track=sound)]
    else:
        question = replace(question, problem="why " * 1000)
    tokens = len(model.build_prompt(question, media, recipe.thinking).ids)
    wide = 4 if s.ranks.dtype == "float32" else 2
    where = f"without a GPU, a share of the memory for {world} ranks"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    have = host // world
    reserved = 0.0
    if torch.cuda.is_available():
        where = "a GPU"
        have = torch.cuda.get_device_properties(0).total_memory
        reserved = s.rollout.memory * have if sampler == "vllm" else 0.0
    if s.for_gpus:
        check_host_memory(s, model, world, sampler, tokens * wide * model.media_width, host, found)
    part = memory(
        shape_of(config),
        tokens,
        s.grpo.group * recipe.max_tokens,
        gpus=world if s.ranks.fsdp else 1,
        sp=s.ranks.sp,
        c=wide,
        chunk=max(1, min(8192, 2**28 // config.vocab_size)),
        sampler=sampler,
        prefill=s.rollout.prefill_tokens if sampler == "vllm" else None,
        reserved=reserved,
        reference=s.grpo.kl_coef > 0 and not s.grpo.lora_rank,
    )
    tower = wide * sum(p.numel() for p in model.tower.parameters())
    part = {"tower": tower} | part | {"total": part["total"] + tower}
    found.memory = [f"memory of each rank in GiB, prompts of {tokens:,} tokens:"]
    found.memory += [f"  {name:12s} {value / GIB:8.3f}" for name, value in part.items()]
    need, here = f"{part['total'] / GIB:.1f} GiB", f"{have / GIB:.1f} GiB ({where})"
    found.lines.append(f"memory: a rank needs {need}, as predicted, and has {here}")
    if part["total"] >= 0.92 * have:
        found.lacking.append(
            f"memory: a rank needs {need}, and has {here}: start on 8 GPUs of 80 GB with torchrun "
            "--nproc_per_node 8, or take fewer --recipe.num_frames, more ranks a sequence (--sp) "
            "or a smaller --model"
        )


def check_host_memory(s, model, world: int, sampler: str, each: int, have: int, found) -> None:
    """What a step keeps beside the GPUs, if `world` ranks are on this machine: the embeddings of
    its prompts, `each` bytes one; vLLM's requests of them, and its weights where they sleep there.
    With --cache_dir all ranks map one copy, which the system may drop and read again."""
    dp = max(1, world // s.ranks.sp)
    prompts = math.ceil(s.grpo.prompts / dp)  # of a sequence
    engines = s.ranks.sp // s.rollout.tp  # that sample for them
    if s.media.cache_dir:
        held = 0
        how = f"mapped from --cache_dir, {dp * prompts * each / GIB:.1f} GiB in all"
    else:
        held = world * prompts * each
        how = "on each rank of a sequence: --cache_dir makes it one copy"
    vllm = 0
    if sampler == "vllm":
        vllm = world * max(min(math.ceil(prompts / engines) * each, AT_ONCE), each)
        if s.rollout.sleep_level == 1:
            vllm += world * 2 * sum(p.numel() for p in model.policy.parameters()) // s.rollout.tp
    found.lines.append(
        f"host memory: embeddings of a step's {dp * prompts} prompts {held / GIB:.1f} GiB ({how}); "
        f"vLLM's requests {vllm / GIB:.1f} GiB; this machine has {have / GIB:.1f} GiB"
    )
    if held + vllm >= 0.92 * have:
        found.lacking.append(
            "host memory: more than there is, see above: take --cache_dir FOLDER, fewer "
            "--grpo.prompts a step, or fewer --recipe.num_frames"
        )


def check_prompt(s: Settings, model, rows: list[Example], sampler: str, found: Plan) -> None:
    """The first prompt as the model would get it, from its file's shape alone."""
    if rows:
        named = "first prompt"
        first = rows[0]
        media = [model.measure(m, s.recipe.frames, first.id) for m in first.media]
    else:
        named = "a prompt (no rows are given)"
        first = replace(data.stand_in(""), problem="What happens?")
        frames = s.recipe.num_frames
        seen = "video" in model.takes
        media = [model.blank("video", frames, 360, 640, np.arange(frames))] if seen else []
    prompt = model.build_prompt(first, media, s.recipe.thinking)
    length = len(prompt.ids) + s.recipe.max_tokens
    most = s.rollout.max_len
    if sampler == "vllm" and most and length > most:
        found.wrong.append(
            f"the first prompt and its answer of {s.recipe.max_tokens} have {length} tokens: more "
            f"than --rollout.max_len {most}"
        )
    text = prompt.text
    if found.published:  # a tokenizer without words, that counts four characters as a token
        head, between, behind = model.turns(s.recipe.thinking)
        asked = s.recipe.template.replace("{problem}", first.problem)
        text = f"{head}[{len(prompt.media_at)} media tokens]{between}{asked}{behind}"
    found.prompt.append(
        f"{named}: {len(prompt.ids)} tokens, {len(prompt.media_at)} of them media, positions up to "
        f"{int(prompt.positions.max())}:\n{text}"
    )
