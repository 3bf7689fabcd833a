"""What all tests share: the toy's folder and model, rows and media, ranks. All of it is made here,
nothing is downloaded. A tiny model of every family: zoo.py."""

import json
import os
import wave

# One thread a process: at these sizes more are slower, and torchrun's ranks have one each.
os.environ["OMP_NUM_THREADS"] = "1"

from dataclasses import replace  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import zoo  # noqa: E402
from PIL import Image  # noqa: E402
from torch.multiprocessing import set_forkserver_preload, start_processes  # noqa: E402
from zoo import RECIPE, answers, deepstack, texts_of, tiny_qwen, wide_prompt  # noqa: E402, F401

import data  # noqa: E402
from families import load
from kit.toy import SIZE, ToyConfig, toy_build, toy_checkpoint  # noqa: E402
from rollout import Response  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a very small toy data set and an untrained checkpoint in init/."""
    root = tmp_path_factory.mktemp("toy")
    sizes = ToyConfig(base=3, sft=3, rl=6, test=4, other=2, images=2)
    toy_build(str(root), sizes, seed=7)
    toy_checkpoint(str(root / "init"), texts_of(root), SIZE, RECIPE, seed=7)
    return root


@pytest.fixture
def model(toy):
    """The toy's VILA with random weights, float32, fresh for each test."""
    return load(toy / "init")


@pytest.fixture
def prompts(toy, model):
    """Three prompts of different lengths: two with video, one text only."""
    rows = data.load_rows(str(toy / "rl.jsonl"))
    text = next(r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text")
    seen = [model.prompt(rows[0], num_frames=9), model.prompt(rows[7], num_frames=4)]
    return [*seen, model.prompt(text)]


@pytest.fixture(scope="session")
def saved(toy, tmp_path_factory):
    """A checkpoint whose recipe names the toy's 20 test rows."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    model = load(toy / "init")
    model.recipe = replace(model.recipe, data=str(toy / "test.jsonl"))
    model.save_pretrained(folder)
    return folder


class Oracle:
    """An engine that answers as its function says."""

    tp = 1  # ranks that share it

    def __init__(self, model, answer):
        self.model, self.answer, self.prompts, self.seeds = model, answer, [], []

    def generate(self, prompts, n, sampling, seeds=None):
        self.prompts += prompts
        self.seeds.append(seeds)
        said = [[self.answer(p) for _ in range(n)] for p in prompts]
        return [[Response(torch.tensor([1]), torch.zeros(1), a, True) for a in s] for s in said]

    def check_fits(self, prompt, sampling, name=""):
        pass

    def sync(self, policy):
        pass

    def close(self):
        pass


@pytest.fixture
def oracle(monkeypatch):
    """oracle(answer): commands sample from Oracles; answer(text of the prompt). Those that were
    made."""
    from kit import ask

    def use(answer):
        made = []

        def make(kind, model, config, dtype):
            made.append(Oracle(model, lambda prompt: answer(prompt.text)))
            return made[-1]

        monkeypatch.setattr(ask, "make_engine", make)
        return made

    return use


# --------------------------------------------------------------------------------- rows and media


def row(number: int, **fields) -> dict:
    """A row of the data set: text, unless fields say otherwise."""
    question = {"problem_id": str(number), "problem": f"What is {number}?\nA. red\nB. blue"}
    about = {"data_type": "text", "problem_type": "goal", "videos": ""}
    return question | about | {"reasoning": "seen", "answer": "<answer>A</answer>"} | fields


def says(letter):
    """An answer in the format."""
    return f"<think> x </think> <answer> {letter} </answer>"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def sine(seconds, rate, hz):
    """(S,) float32: a tone of amplitude 0.5."""
    return (np.sin(np.arange(round(seconds * rate)) * (2 * np.pi * hz / rate)) / 2).astype("f4")


def write_wav(path, seconds, rate=16000, hz=440, channels=1):
    """A tone as a .wav of 16 bits, the same in every channel."""
    sound = (sine(seconds, rate, hz) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(sound.repeat(channels).tobytes())


def write_video_with_audio(path, frames, fps, seconds, hz, start=0.0, codec="aac"):
    """frames (F, H, W, 3) uint8 as an mpeg4 video, and a tone from second `start` as its track."""
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=fps)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream(codec, rate=16000, layout="mono")
        sound = sine(seconds, 16000, hz)[None]
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for i in range(0, sound.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(sound[:, i : i + 1024], "fltp", "mono")
            part.rate = 16000
            part.pts = i + round(start * 16000)
            container.mux(audio.encode(part))
        container.mux([*video.encode(), *audio.encode()])


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> dict[str, data.Medium]:
    """One video with sound, two images and a sound. v: 5 frames of the video's 16 (4 s), w: all 16,
    o: one, s: those of seconds 1 to 3; t, u: w and s with the sound; i, j: images; a: sound
    (3.37 s)."""
    root = tmp_path_factory.mktemp("media")
    film, sound = str(root / "film.mp4"), str(root / "a.wav")
    write_video_with_audio(film, zoo.frames(16, 60, 100), 4, 4.1, 300)
    write_wav(sound, 3.37)
    found = {"a": data.Medium("audio", sound)}
    for name, height, width in (("i", 70, 130), ("j", 90, 64)):
        Image.fromarray(zoo.frames(1, height, width)[0]).save(root / f"{name}.png")
        found[name] = data.Medium("image", str(root / f"{name}.png"))
    taken = {"v": (), "w": (16,), "o": (1,), "s": (16, (1.0, 3.0))}
    taken |= {"t": (16, None, True), "u": (16, (1.0, 3.0), True)}
    return found | {letter: data.Medium("video", film, *how) for letter, how in taken.items()}


@pytest.fixture
def ask(media):
    """ask(letters): a question about these media."""

    def make(letters, problem="Which came first?", response="<think> so </think> A"):
        about = tuple(media[letter] for letter in letters)
        return data.Example("q", problem, (), "A", "temporal", about, "mixed", response)

    return make


# ------------------------------------------------------------------------------------------- ranks

# The processes of all tests are forked from one that has the slow imports done: 0.1 s, not 5 s.
_classes = [f"transformers.models.{n}.modeling_{n}" for n in ("qwen2", "qwen2_5_vl", "qwen3_vl")]
_classes.append("transformers.models.siglip.modeling_siglip")
set_forkserver_preload(["torch.distributed.fsdp", "matplotlib.figure", "pytest", *_classes])


def run_ranks(function, world, *args):
    """function(rank, *args) in `world` processes that have a process group; what they raise is
    raised here. One that waits for the others in vain fails after a minute."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    start_processes(_enter, (function, world, store.port, args), world, start_method="forkserver")


def _enter(rank, function, world, port, args):
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    function(rank, *args)
    dist.barrier()  # nobody closes connections that another one still uses
    dist.destroy_process_group()


# ----------------------------------------------------- the table of families, from test_matrix.py

CELLS = pytest.StashKey[dict]()  # of a test run: (family, modality, column) -> outcome


def pytest_addoption(parser):
    parser.addoption("--table", help="write the table of tests/test_matrix.py into this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and item.name.startswith("test_cell["):
        found = dict(report.user_properties).get("cell") if report.passed else report.outcome
        names = tuple(item.callspec.params[n] for n in ("family", "modality", "column"))
        item.config.stash.setdefault(CELLS, {})[names] = found
    return report


def pytest_sessionfinish(session):
    if path := session.config.getoption("--table"):
        import test_matrix

        head, rest = Path(path).read_text().split("<!-- matrix -->")
        tail = rest.split("<!-- /matrix -->")[1]
        found = test_matrix.table(session.config.stash[CELLS])
        text = f"{head}<!-- matrix -->\n\n{found}\n\n<!-- /matrix -->{tail}"
        Path(path).write_text(text)
