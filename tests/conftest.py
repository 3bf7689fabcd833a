"""Tiny models and data for the tests: everything is made here, nothing is downloaded."""

import json
import os
import wave
from dataclasses import replace

# One thread a process: at these sizes more are slower, and torchrun's ranks have one each.
os.environ["OMP_NUM_THREADS"] = "1"

from datetime import timedelta  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.multiprocessing import set_forkserver_preload, start_processes  # noqa: E402
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel  # noqa: E402

import data  # noqa: E402
from families.qwen import Decoder
from families.vila import VILA
from kit.toy import SIZE, ToyConfig, toy_build, toy_checkpoint  # noqa: E402
from model import Policy, Prompt, Recipe  # noqa: E402
from rollout import Response  # noqa: E402

torch.set_num_threads(1)
RECIPE = Recipe(num_frames=5, max_tokens=8, template="{problem} Think, then answer.")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with a very small toy data set and an untrained checkpoint in init/."""
    root = tmp_path_factory.mktemp("toy")
    sizes = ToyConfig(base=3, sft=3, rl=6, test=4, other=2, images=2)
    toy_build(str(root), sizes, seed=7)
    rows = [e for name in root.glob("*.jsonl") for e in data.load_rows(str(name))]
    texts = [text for e in rows for text in (e.problem, e.response)]
    toy_checkpoint(str(root / "init"), texts, SIZE, RECIPE, seed=7)
    return root


@pytest.fixture
def model(toy):
    """The toy's VILA with random weights, float32, fresh for each test."""
    return VILA.from_pretrained(toy / "init")


@pytest.fixture
def prompts(toy, model):
    """Three prompts of different lengths: two with video, one text only."""
    rows = data.load_rows(str(toy / "rl.jsonl"))
    text = next(r for r in data.load_rows(str(toy / "base.jsonl")) if r.data_type == "text")
    return [
        model.prompt(rows[0], num_frames=9),
        model.prompt(rows[7], num_frames=4),
        model.prompt(text),
    ]


@pytest.fixture(scope="session")
def saved(toy, tmp_path_factory):
    """A checkpoint whose recipe names the toy's 20 test rows."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    model = VILA.from_pretrained(toy / "init")
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


def says(letter):
    """An answer in the format."""
    return f"<think> x </think> <answer> {letter} </answer>"


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def answers(model, lengths, seed=0):
    """Random answers of the given lengths: a list of id tensors for each inner list."""
    g = torch.Generator().manual_seed(seed)
    vocab = model.llm.config.vocab_size
    return [[torch.randint(8, vocab, (r,), generator=g) for r in group] for group in lengths]


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
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.thread_count = 1
        audio = container.add_stream(codec, rate=16000, layout="mono")
        sound = sine(seconds, 16000, hz)[None]
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for i in range(0, sound.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(sound[:, i : i + 1024], "fltp", "mono")
            part.rate, part.pts = 16000, i + round(start * 16000)
            container.mux(audio.encode(part))
        container.mux([*video.encode(), *audio.encode()])


LEVELS = 2  # of deepstack


def deepstack(model, tie=True, seed=0):
    """The model with the decoder of a Qwen3-VL of the same vocabulary, random weights."""
    old = model.llm.config
    torch.manual_seed(seed)
    config = Qwen3VLTextConfig(
        vocab_size=old.vocab_size, hidden_size=128, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.1,
        max_position_embeddings=4096, tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True,
                         "mrope_section": [6, 5, 5]},
    )  # fmt: skip
    body, head = Qwen3VLTextModel(config), torch.nn.Linear(128, old.vocab_size, bias=False)
    head.weight = body.embed_tokens.weight if tie else torch.nn.Parameter(head.weight * 2)
    model.policy, model.mrope, model.levels = Policy(Decoder(body, head)), True, LEVELS
    model.decoder_kind = "Qwen3ForCausalLM", "qwen3"
    model.llm.set_attn_implementation("mrsp")
    return model.eval()


def wide_prompt(model, before, n, after, ahead=0, seed=0):
    """A Prompt with n wide features in any order among its middle tokens, at any position; text
    goes on `ahead` of its index."""
    g, length = torch.Generator().manual_seed(seed), before + n + after
    at = before + torch.randperm(n, generator=g)
    positions = torch.arange(length).expand(3, -1).clone()
    positions[:, at] = before + torch.randint(0, max(n, 1), (3, n), generator=g)
    positions[:, before + n :] += ahead
    ids = torch.randint(8, model.llm.config.vocab_size, (length,), generator=g)
    ids[at], media = model.media_tokens[0], torch.randn(n, model.media_width, generator=g)
    return Prompt(ids, positions, media if n else None, at, "", before + n)


# The processes of all tests are forked from one that has the slow imports done: 0.1 s, not 5 s.
set_forkserver_preload(
    ["torch.distributed.fsdp", "matplotlib.figure", "pytest"]
    + [
        f"transformers.models.{name}.modeling_{name}"
        for name in ("qwen2", "qwen2_5_vl", "qwen3_vl", "siglip")
    ]
)


def run_ranks(function, world, *args):
    """function(rank, *args) in `world` processes that have a process group; what they raise is
    raised here. One that waits for the others in vain fails after a minute."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    start_processes(_enter, (function, world, store.port, args), world, start_method="forkserver")


def _enter(rank, function, world, port, args):
    torch.set_num_threads(1)
    store, patience = dist.TCPStore("localhost", port), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    function(rank, *args)
    dist.barrier()  # nobody closes connections that another one still uses
    dist.destroy_process_group()


# ------------------------------------------------------------------- the README's table of families


def pytest_addoption(parser):
    parser.addoption("--table", help="write the table of tests/test_matrix.py into this file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and item.name.startswith("test_cell["):
        import zoo

        found = dict(report.user_properties).get("cell") if report.passed else report.outcome
        names = [item.callspec.params[n] for n in ("family", "modality", "column")]
        item.config.stash.setdefault(zoo.CELLS, {})[tuple(names)] = found
    return report


def pytest_sessionfinish(session):
    if path := session.config.getoption("--table"):
        import zoo

        text, marks = open(path).read(), ("<!-- matrix -->", "<!-- /matrix -->")
        head, rest = text.split(marks[0])
        tail = rest.split(marks[1])[1]
        found = zoo.table(session.config.stash[zoo.CELLS])
        open(path, "w").write(f"{head}{marks[0]}\n\n{found}\n\n{marks[1]}{tail}")
