"""The toy: a data set of real mp4 files and an untrained VILA, for a run of minutes on a CPU.

It stands for what a run on 8 GPUs starts from: LongVideo-Reason's videos and questions, and a
pretrained checkpoint. Everything behind it is the real thing: decord reads the files, train.py runs
all its stages. Nothing of the method is in this file.

A video: T = 256 frames of 32 x 32 pixels at 4 frames a second. On a noisy grey ground
  - 2 to 5 flashes of different colours, one after the other, each at one side, 5 to 12 frames
    long: 64 sampled frames (stride 4) see every one, 32 miss some, 8 miss most;
  - a white dot drifts from the middle to a corner;  - a grey square wanders about (distractor).
A question is of one of four categories: temporal (first, last, right after), spatial (side of a
flash), plot (how many flashes), goal (the dot's corner). Right letter: uniform over A-D; wrong
options: drawn without looking at the video, so that guessing without it stays at 25 %.

The splits never share a video. "base" rows pretrain the model, "sft" rows carry chains of thought
(careful and hasty ones), "rl", "test" and "test_other" are the questions themselves.

Check this file alone:  python -m kit.toy /tmp/toy   (writes a small toy, prints some of its rows)
"""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from data import frame_indices, load_media, load_rows
from families.vila import VILA
from model import Recipe
from sft import SFTConfig

T, SIZE, FPS = 256, 32, 4
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 60, 230),
    "yellow": (225, 215, 30),
    "cyan": (30, 210, 215),
    "magenta": (220, 40, 210),
}
SIDES = {"left": (16, 5), "right": (16, 26), "top": (5, 16), "bottom": (26, 16)}  # centre y, x
CORNERS = {"northwest": (3, 3), "northeast": (3, 28), "southwest": (28, 3), "southeast": (28, 28)}
COUNTS = ("2", "3", "4", "5")
QUESTIONS = {
    "first": ("temporal", "Which color came first?"),
    "last": ("temporal", "Which color came last?"),
    "after": ("temporal", "Which color came right after {}?"),
    "side": ("spatial", "Which side was {} on?"),
    "count": ("plot", "How many flashes?"),
    "corner": ("goal", "Which corner did the dot reach?"),
}


def toy_scene(rng: np.random.Generator) -> dict:
    """What happens in one video: flashes [(color, side, start, end)] and the dot's corner."""
    n = int(rng.integers(2, 6))
    length = rng.integers(5, 13, n)
    # Free frames are dealt at random to the n + 1 gaps; inner gaps are at least 5 frames.
    free = T - length.sum() - 5 * (n - 1)
    cuts = np.sort(rng.integers(0, free + 1, n))
    gaps = np.diff(cuts, prepend=0) + np.where(np.arange(n) > 0, 5, 0)
    starts = np.cumsum(gaps) + np.concatenate([[0], np.cumsum(length)[:-1]])
    colors = rng.permutation(list(COLORS))[:n].tolist()
    sides = rng.choice(list(SIDES), n).tolist()
    flashes = list(zip(colors, sides, starts.tolist(), (starts + length).tolist()))
    return {"flashes": flashes, "corner": str(rng.choice(list(CORNERS)))}


def toy_frames(scene: dict, rng: np.random.Generator, other: bool = False) -> np.ndarray:
    """Paint a scene: (T, SIZE, SIZE, 3) uint8. `other` is the other environment of the last test:
    a tinted and striped ground, other sizes."""
    ground = rng.uniform(30, 70) + rng.normal(0, 4, (SIZE, SIZE, 1)) + np.zeros(3)
    if other:
        ground = ground + rng.uniform(-15, 35, 3)
        ground[:: int(rng.integers(3, 6))] += rng.uniform(10, 25)
    video = np.repeat(ground[None], T, axis=0)

    def square(t, center, half, color):
        y, x = (int(round(c)) for c in center)
        y0, x0 = max(y - half[0], 0), max(x - half[1], 0)
        video[t, y0 : y + half[0] + 1, x0 : x + half[1] + 1] = color

    flash, dot = ((5, 3), (1, 1)) if not other else ((int(rng.integers(3, 6)), 4), (2, 1))
    phase, speed = rng.uniform(0, 6.3, 2), rng.uniform(0.01, 0.04, 2)
    target = np.array(CORNERS[scene["corner"]])
    gray = rng.uniform(100, 150)
    for t in range(T):
        square(t, 16 + 9 * np.sin(phase + speed * t), (2, 2), gray)
        square(t, 16 + (target - 16) * t / (T - 1), dot, 250)
        for color, side, start, end in scene["flashes"]:
            if start <= t < end:
                half = flash if side in ("left", "right") else flash[::-1]
                square(t, SIDES[side], half, COLORS[color])
    return np.clip(video, 0, 255).astype(np.uint8)


def write_mp4(path: str, frames: np.ndarray, fps: int = FPS) -> None:
    """(F, H, W, 3) uint8 to an mpeg4 file, a key frame every 32 frames; written, then renamed."""
    import av

    part = f"{path}.{os.getpid()}.mp4"
    with av.open(part, "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"g": "32"})
        stream.codec_context.thread_count = 1  # frames this small: threads cost 6 times the work
        stream.codec_context.flags |= 1 << 1  # AV_CODEC_FLAG_QSCALE: constant quality
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(part, path)


def toy_question(kind: str, scene: dict, seen: list | None, rng, careful=True) -> dict | None:
    """A question about the flashes in `seen`, with options, gold letter and chain of thought.

    Careful reasoning cites its evidence (the flashes in order), the answer's word, its letter.
    Hasty reasoning cites none and is wrong 60 % of the time: who imitates both (as SFT on noisy
    chains of thought does) leaves RL something to find. seen=None: every flash of the scene.
    Returns None where the question makes no sense.
    """
    seen = scene["flashes"] if seen is None else seen
    n, key, pool = len(seen), "", COLORS
    if n < {"corner": 0, "after": 2, "count": 2}.get(kind, 1):
        return None
    evidence = " ".join(f"{i} {color}" for i, (color, *_) in enumerate(seen, 1))
    if kind == "first":
        word = seen[0][0]
    elif kind == "last":
        word = seen[-1][0]
    elif kind == "after":
        i = int(rng.integers(1, n))
        key, word = seen[i - 1][0], seen[i][0]
        pool = [c for c in COLORS if c != key]
    elif kind == "side":
        key, word = seen[int(rng.integers(n))][:2]
        pool, evidence = SIDES, f"{key} {word}"
    elif kind == "count":
        pool, word = COUNTS, str(n)
    else:
        pool, word, evidence = CORNERS, scene["corner"], f"dot {scene['corner']}"
    wrong = [w for w in rng.permutation(list(pool)) if w != word][:3]
    options = [str(w) for w in rng.permutation([*wrong, word])]
    letter = "ABCD"[options.index(word)]
    category, text = QUESTIONS[kind]
    reasoning = f"seen {evidence} so {word} {letter}"
    if not careful:
        if rng.random() > 0.4:
            letter = str(rng.choice([c for c in "ABCD" if c != letter]))
        reasoning = f"guess {letter}"
    lines = [text.format(key), *(f"{a}. {w}" for a, w in zip("ABCD", options))]
    row = {"problem": "\n".join(lines), "problem_type": category, "reasoning": reasoning}
    return row | {"answer": f"<answer>{letter}</answer>"}


def toy_clip_rows(scene: dict, rng: np.random.Generator, clip: tuple, texts: int) -> list[dict]:
    """Pretraining rows of one clip (first, last, n): two captions, and questions about what the n
    sampled frames show, each with the evidence before the answer."""
    indices = frame_indices(T, clip[2], clip[0], clip[1])
    seen = [f for f in scene["flashes"] if ((indices >= f[2]) & (indices < f[3])).any()]
    full = "".join(f"{i} {c} {s} " for i, (c, s, *_) in enumerate(seen, 1))
    short = " ".join(f"{i} {c}" for i, (c, *_) in enumerate(seen, 1))
    rows = [{"problem": "Describe.", "response": f"{full}dot {scene['corner']}"}]
    rows.append({"problem": "List the flashes.", "response": short or "nothing"})
    while len(rows) < texts:
        kind = str(rng.choice(list(QUESTIONS), p=(0.12, 0.14, 0.22, 0.3, 0.12, 0.1)))
        row = toy_question(kind, scene, seen, rng)
        if row is not None:
            rows.append({"problem": row["problem"], "response": row["reasoning"]})
    where = {"num_frames": clip[2], "segment": [clip[0] / FPS, (clip[1] + 1) / FPS]}
    return [row | where for row in rows]


def toy_text_row(rng: np.random.Generator, shares=(0.6, 0.2, 0.2)) -> dict:
    """Text only, one of three kinds: the letters of words; the letter of one word, in the answer
    format; a question about flashes that the text lists."""
    form = rng.choice(3, p=shares)
    if form == 2:
        kinds = ["first", "last", "after", "after", "count"]
        row = toy_question(str(rng.choice(kinds)), toy_scene(rng), None, rng)
        given, answer = row["reasoning"].split(" so ")
        problem, response = f"{row['problem']}\n{given}", f"so {answer}"
        if rng.random() < 0.5:
            response = f"<think> {response} </think> <answer> {answer[-1]} </answer>"
    else:
        pool = (COLORS, COLORS, SIDES, CORNERS, COUNTS)[int(rng.integers(5))]
        words = [str(w) for w in rng.permutation(list(pool))[:4]]
        asked = [(words[i], "ABCD"[i]) for i in rng.permutation(4)]
        word, letter = asked[0]
        problem, response = "Find the letters.", " ".join(f"{w} {x}" for w, x in asked)
        if form == 1:
            problem = f"Choose {word}."
            response = f"<think> so {word} {letter} </think> <answer> {letter} </answer>"
        problem = "\n".join([problem, *(f"{x}. {w}" for x, w in zip("ABCD", words))])
    return {"problem": problem, "response": response}


def toy_image_rows(scene: dict, t: int) -> list[dict]:
    """Captions of the single frame t."""
    now = [f for f in scene["flashes"] if f[2] <= t < f[3]]
    rows = [("Describe.", f"{now[0][0]} {now[0][1]}" if now else "nothing")]
    if t > 40:  # by then the dot has left the middle
        rows.append(("Where is the dot?", f"dot {scene['corner']}"))
    return [{"problem": p, "response": r} for p, r in rows]


@dataclass(frozen=True)
class ToyConfig:
    """How much toy data to make: videos per split, and texts per video."""

    base: int = 1200  # videos of base pretraining
    sft: int = 300  # videos of chain-of-thought SFT
    rl: int = 800  # videos of GRPO
    test: int = 200  # videos never trained on, 5 questions each
    other: int = 100  # videos never trained on, in another environment
    images: int = 4  # single frames per base video
    clips: int = 3  # clips per base video
    texts: int = 4  # texts per clip
    careful: float = 0.45  # share of SFT rows whose reasoning cites its evidence
    # pretraining on single frames
    images_stage: SFTConfig = SFTConfig(
        steps=100, groups=192, texts=4, micro_batches=4, train="all", optimizer="muon", lr=2e-3
    )
    # pretraining on clips
    base_stage: SFTConfig = SFTConfig(
        steps=350, groups=32, texts=4, micro_batches=4, train="llm", optimizer="muon", lr=2e-3
    )

    def __post_init__(self):
        for name in ("base", "sft", "rl", "test", "other", "images", "clips", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Rows(dict):
    """The rows of the toy's files, {name: [row ...]}."""

    def add(self, name: str, row: dict, data_type: str = "video", videos: str = "") -> None:
        rows = self.setdefault(name, [])
        base = {"problem_id": f"{name}_{len(rows)}", "problem_type": "base", "reasoning": ""}
        rows.append(base | {"answer": "", "data_type": data_type, "videos": videos} | row)

    def add_base(self, scene: dict, number: int, config: ToyConfig, rng) -> dict[str, int]:
        """Pretraining rows about the base video `number`. Returns {image: its frame's index}."""
        images = {}
        for k in range(config.images):  # every other image shows a flash
            _, _, start, end = scene["flashes"][int(rng.integers(len(scene["flashes"])))]
            t = int(rng.integers(start, end) if k % 2 == 0 else rng.integers(T))
            images[f"images/{number}_{k}.png"] = t
            for row in toy_image_rows(scene, t):
                self.add("base_images", row, "image", f"images/{number}_{k}.png")
            self.add("base_images", toy_text_row(rng, (0.7, 0.3, 0.0)), "text")
        for _ in range(config.clips):
            n = int(rng.choice((64, 32, 16, 8), p=(0.6, 0.2, 0.1, 0.1)))
            # Half the shorter clips are a part of the video, at the full frame rate.
            whole = n == 64 or rng.random() < 0.5
            first = 0 if whole else int(rng.integers(0, T - 4 * n + 1))
            last = T - 1 if whole else first + 4 * n - 1
            for row in toy_clip_rows(scene, rng, (first, last, n), config.texts):
                self.add("base", row, "video", f"videos/base_{number}.mp4")
            for _ in range(2):
                self.add("base", toy_text_row(rng), "text")
        return images

    def add_questions(self, split: str, scene: dict, number: int, careful: float, rng) -> None:
        """Questions about a video of another split; careful: share of SFT rows that are so."""
        kinds = list(QUESTIONS)
        if split == "sft":  # 8 rows a video, some of them twice with another annotation
            kinds += ["side", "count"]
        else:  # 2 of the 3 temporal ones, 5 questions a video
            kinds.remove(str(rng.choice(kinds[:3])))
        name = "test_other" if split == "other" else split
        for kind in kinds:
            cites = split != "sft" or bool(rng.random() < careful)
            row = toy_question(kind, scene, None, rng, cites)
            self.add(name, row, "video", f"videos/{split}_{number}.mp4")


def toy_build(folder: str, config: ToyConfig, seed: int, rank: int = 0, world: int = 1, bar=iter):
    """Write base_images, base, sft, rl, test, test_other (.jsonl, by rank 0), videos/ (.mp4) and
    images/ (.png) under folder. Each rank paints every world-th video; all of it is a function of
    (seed, split, video), never of the rank. `bar` wraps the loop over videos, e.g. tqdm. The caller
    puts a barrier behind it."""
    from PIL import Image

    root = Path(folder)
    for sub in ("videos", "images"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    rows = Rows()
    splits = ("base", "sft", "rl", "test", "other")
    jobs = [(s, split, i) for s, split in enumerate(splits) for i in range(getattr(config, split))]
    for number, (s, split, i) in enumerate(bar(jobs)):
        rng = np.random.default_rng([seed, s, i])
        scene = toy_scene(rng)
        images = {}
        if split == "base":
            images = rows.add_base(scene, i, config, rng)
        else:
            rows.add_questions(split, scene, i, config.careful, rng)
        if number % world == rank:
            frames = toy_frames(scene, np.random.default_rng([seed, s, i, 1]), split == "other")
            write_mp4(str(root / "videos" / f"{split}_{i}.mp4"), frames)
            for image, t in images.items():
                Image.fromarray(frames[t]).save(root / image)
    for name, content in rows.items():
        if rank == 0:
            part = root / f"{name}.jsonl.part"
            part.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
            os.replace(part, root / f"{name}.jsonl")


CONFIG = {
    "mm_projector_cfg": {"mm_projector_type": "mlp_downsample_2x2_fix"},
    "mm_vision_select_layer": -1,
    "image_encoder": {"_target_": "BasicImageEncoder", "end_tokens": None},
    "video_encoder": {"_target_": "BasicVideoEncoder", "end_tokens": None},
}
LLM = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
LLM |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05}
LLM |= {"tie_word_embeddings": True, "max_position_embeddings": 4096}
LLM |= {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
TOWER = {"patch_size": 16, "hidden_size": 64, "intermediate_size": 128}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vision_use_head": False}


def toy_checkpoint(folder: str, texts: list[str], image_size: int, recipe: Recipe, seed: int):
    """A VILA of 0.9 M parameters with random weights, in a checkpoint folder like any other. Its
    tokenizer has one token for each word of `texts`; white space and . , : ? are dropped."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<vila/video>"]
    special += ["<think>", "</think>", "<answer>", "</answer>"]
    texts = [*texts, "system user assistant", recipe.template.replace("{problem}", "")]
    words = sorted(set(re.findall(r"[^\s.,:?]+", " ".join(texts))) - set(special))
    vocab = {word: i for i, word in enumerate(special + words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,:?]+"), "removed")
    core.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    torch.manual_seed(seed)
    model = VILA.create(
        config=CONFIG,
        llm=LLM | {"vocab_size": len(vocab)},
        tower=TOWER | {"image_size": image_size},
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
        ),
        preprocess={"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255},
    )
    model.recipe = recipe
    model.save_pretrained(folder)


def toy_make(out: Path, config: ToyConfig, recipe: Recipe, seed: int, rank=0, world=1, bar=iter):
    """out/data, and out/init, an untrained checkpoint for its words (by rank 0)."""
    toy_build(str(out / "data"), config, seed, rank, world, bar)
    if rank == 0:
        rows = [e for f in sorted((out / "data").glob("*.jsonl")) for e in load_rows(str(f))]
        texts = [f"{e.problem} {e.response}" for e in rows]
        toy_checkpoint(str(out / "init"), texts, SIZE, recipe, seed)


def named(settings, out: Path, model: Path):
    """The settings of a run on the toy in `out`, from the checkpoint `model`; rows that the command
    line names stay."""
    run = replace(settings.run, model=str(model))
    for name, rows in (("data", "rl"), ("sft_data", "sft"), ("test_data", "test")):
        if not getattr(run, name):
            run = replace(run, **{name: str(out / "data" / f"{rows}.jsonl")})
    other = settings.eval.other_data or str(out / "data" / "test_other.jsonl")
    return replace(settings, run=run, eval=replace(settings.eval, other_data=other))


def sketch(settings, folder: Path):
    """A toy of one video a split in a folder, for a look at it."""
    toy_make(folder, ToyConfig(1, 1, 1, 1, 1), settings.recipe, settings.more.seed)
    return named(settings, folder, folder / "init")


PLAN = """\
LongVILA-R1 in miniature, {ranks.world} rank(s) on {ranks.device}; \
every stage shows the time it has left:
  1 data    {videos} videos (mp4) with questions; train and test videos are disjoint
  2 base    a tiny VILA learns to see and to read: stands for the pretrained model
  3 SFT     chains of thought, careful and hasty ones mixed
  4 GRPO    {grpo.steps} steps, {grpo.prompts} prompts x {grpo.group} answers; \
reward: right answer, right format
  5 test    {questions} questions on videos never trained on, greedy, after the last step
Everything goes to {out}/"""


def prepare(run):
    """What the toy has in place of a data set and a pretrained checkpoint: data/, init/ (untrained)
    and base/, pretrained on single frames, then on clips. All ranks. run: kit.run.Run. Returns the
    settings of a run from there on."""
    s, out, ranks = run.settings, run.out, run.ranks
    sizes = s.toy
    videos = sizes.base + sizes.sft + sizes.rl + sizes.test + sizes.other
    run.say(PLAN.format(ranks=ranks, out=out, videos=videos, grpo=s.grpo, questions=5 * sizes.test))
    with run.stage("data"):
        bar = run.bar("videos")
        toy_make(out, sizes, s.recipe, s.more.seed, ranks.rank, ranks.world, bar)
    model = run.load_policy(out / "init")
    images, clips = (run.rows(str(out / "data" / f"{n}.jsonl")) for n in ("base_images", "base"))
    run.supervised(model, images, sizes.images_stage, "images")
    run.supervised(model, clips, sizes.base_stage, "base")
    run.save(model, "base")
    return named(s, out, out / "base")


if __name__ == "__main__":
    import sys

    target = sys.argv[1] if len(sys.argv) > 1 else "runs/toy/data"
    toy_build(target, ToyConfig(base=4, sft=4, rl=4, test=4, other=4), seed=0)
    for split in ("base", "sft", "test"):
        for example in load_rows(f"{target}/{split}.jsonl")[:3]:
            frames, times = load_media(example.media[0], 64)
            shown = split, frames.shape, f"{times[-1:]} s", repr(example.problem)
            print(*shown, "->", example.response)
