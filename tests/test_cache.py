"""Stage 1 of MR-SP: embeddings computed once, by all ranks together, are those of one process."""

import os
import random
import re
from collections import OrderedDict
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import safetensors
import torch
import torch.distributed as dist
from conftest import run_ranks
from safetensors.torch import save
from torch.multiprocessing import start_processes

import data
import mrsp
from mrsp import SUFFIX, EmbeddingCache


def numbers(n, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def get(cache, key, compute, group=None):
    """Features of an entry that has nothing else."""
    return cache.get(key, lambda: {"features": compute()}, group)["features"]


def refuse():
    raise AssertionError("computed, although the cache has it")


def counts(cache):
    return cache.hits, cache.misses, cache.bytes


# -------------------------------------------------------------------------------- memory and disk


def test_memory_forgets_the_least_recently_used_by_bytes():
    cache = EmbeddingCache(max_bytes=100)
    for key in "abac":  # each entry 40 bytes: two fit
        get(cache, key, lambda: torch.zeros(10))
    assert list(cache.memory) == ["a", "c"] and cache.bytes == 80
    get(cache, "d", lambda: torch.zeros(5))  # 100 bytes fit exactly
    assert list(cache.memory) == ["a", "c", "d"] and cache.bytes == 100
    get(cache, "a", refuse)
    get(cache, "e", lambda: torch.zeros(11))  # 44 bytes, for which c and d have to go
    assert list(cache.memory) == ["a", "e"] and cache.bytes == 84
    get(cache, "f", lambda: torch.zeros(100))  # the newest stays, though it is too large
    assert list(cache.memory) == ["f"] and counts(cache) == (2, 6, 400)


def entries(folder) -> list[str]:
    return sorted(file.name.removesuffix(SUFFIX) for file in folder.iterdir())


def age(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_entries_survive_in_their_dtype_and_shape(tmp_path, dtype):
    value = numbers(60, dtype=dtype).view(5, 3, 4).transpose(0, 2)  # not contiguous
    entry = {"features": value, "times": numbers(5, dtype=torch.float64)}
    EmbeddingCache(str(tmp_path)).get("k", lambda: entry)
    again = EmbeddingCache(str(tmp_path))  # as another process would
    read = again.get("k", refuse)
    assert counts(again) == (1, 0, value.nbytes + 40) and read.keys() == entry.keys()
    for name, x in read.items():
        assert x.dtype == entry[name].dtype and torch.equal(x, entry[name])


def test_disk_forgets_the_least_recently_used_and_a_read_refreshes(tmp_path):
    def fresh(limit):  # nothing in memory: what is found comes from the folder
        return EmbeddingCache(str(tmp_path), max_disk_bytes=limit)

    one = fresh(10**9)
    for i, key in enumerate("abcd"):
        get(one, key, lambda: numbers(1000))
        age(tmp_path / f"{key}{SUFFIX}", 1000 - i)
    size = (tmp_path / f"a{SUFFIX}").stat().st_size
    assert size < 4300
    get(fresh(10**9), "a", refuse)  # the oldest, used again
    get(fresh(3 * size), "e", lambda: numbers(1000))
    assert entries(tmp_path) == ["a", "d", "e"]
    get(fresh(size - 1), "f", lambda: numbers(1000))  # the newest stays, though it is too large
    assert entries(tmp_path) == ["f"]
    get(fresh(size - 1), "f", refuse)


OF_FEATURES = mrsp.checksum({"features": numbers(50)})
DAMAGE = {
    "garbage": lambda raw: b"not a tensor",
    "truncated": lambda raw: raw[:-7],
    "one bit": lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],
    "no checksum": lambda raw: save({"features": numbers(50)}),
    "misnamed": lambda raw: save({"x": numbers(50)}, {"crc32": OF_FEATURES}),
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_reported_computed_again_and_rewritten(tmp_path, capsys, damage):
    path = tmp_path / f"k{SUFFIX}"
    get(EmbeddingCache(str(tmp_path)), "k", lambda: numbers(50))
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    cache = EmbeddingCache(str(tmp_path))
    assert torch.equal(get(cache, "k", lambda: numbers(50, seed=1)), numbers(50, seed=1))
    assert (cache.hits, cache.misses) == (0, 1)
    said = capsys.readouterr().out
    assert str(path) in said and "damaged" in said
    assert torch.equal(get(EmbeddingCache(str(tmp_path)), "k", refuse), numbers(50, seed=1))
    assert capsys.readouterr().out == ""


def test_a_half_written_entry_is_never_read(tmp_path, monkeypatch):
    cache = EmbeddingCache(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(mrsp.os, "replace", lambda *a: 1 / 0)  # dies just before the renaming
        with pytest.raises(ZeroDivisionError):
            get(cache, "k", lambda: numbers(50))
    (part,) = entries(tmp_path)
    assert re.fullmatch(rf"k{re.escape(SUFFIX)}\.[0-9a-f]{{32}}\.part", part)
    again = EmbeddingCache(str(tmp_path))
    assert torch.equal(get(again, "k", lambda: numbers(50, seed=1)), numbers(50, seed=1))
    assert again.misses == 1


def _hammer(rank, folder, gets):
    """Many reads and writes of few keys; each key has one right value."""
    torch.set_num_threads(1)
    rng = random.Random(rank)
    cache = EmbeddingCache(folder, max_bytes=1, max_disk_bytes=5 * 4200)  # 5 of 12 fit
    for _ in range(gets):
        i = rng.randrange(12)
        value = get(cache, f"key{i}", lambda i=i: numbers(1000, seed=i))
        assert torch.equal(value, numbers(1000, seed=i))
    assert cache.hits + cache.misses == gets and cache.hits > 0


@pytest.mark.slow
def test_processes_share_a_folder_while_entries_come_and_go(tmp_path):
    start_processes(_hammer, (str(tmp_path), 400), 3, start_method="forkserver")
    left = entries(tmp_path)
    assert len(left) <= 7 and all(re.fullmatch(r"key\d+", name) for name in left)  # no .part stays
    for name in left:
        value = get(EmbeddingCache(str(tmp_path)), name, refuse)
        assert torch.equal(value, numbers(1000, seed=int(name[3:])))


def test_eviction_leaves_foreign_files_and_what_another_process_is_writing_alone(tmp_path):
    """The unlucky moment of the test above, made certain. Between a .part file's writing and its
    renaming another process evicts; and safetensors itself writes under a name like .tmpX9f3Qz
    first. What a process that died left behind does go, an hour later; what is not ours never."""
    young, old = [".tmpX9f3Qz", f"a{SUFFIX}.7.part"], f"b{SUFFIX}.8.part"
    foreign = ["thesis.txt", "model.safetensors", "x.part"]
    for name in [*young, old, *foreign]:
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "folder").mkdir()
    for name in [old, *foreign, "folder"]:
        age(tmp_path / name, 2 * 3600)
    get(EmbeddingCache(str(tmp_path), max_disk_bytes=1), "mine", lambda: numbers(50))
    assert entries(tmp_path) == sorted([*young, *foreign, "folder", "mine"])


def test_an_entry_evicted_while_it_is_opened_is_a_miss(tmp_path, monkeypatch, capsys):
    """The other unlucky moment: safe_open opens a file, and then torch opens it again."""
    get(EmbeddingCache(str(tmp_path)), "k", lambda: numbers(50))

    def evicted(path, *_):
        os.remove(path)
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")

    cache = EmbeddingCache(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", evicted)
        assert cache._read("k") is None
    assert torch.equal(get(cache, "k", lambda: numbers(50)), numbers(50))
    assert "damaged" not in capsys.readouterr().out  # nothing is


# --------------------------------------------------------------------------- through the model


def test_cached_embeddings_equal_fresh_ones_and_skip_decoding(toy, model, tmp_path, monkeypatch):
    row = data.load_rows(str(toy / "rl.jsonl"))[0]
    fresh = model.encode(data.load_media(row.media[0], 6)[0])
    model.cache = first = EmbeddingCache(str(tmp_path))
    assert torch.equal(model.features(row, 6)[0].features, fresh)
    monkeypatch.setattr(model.loader, "open", lambda *a: refuse())
    assert torch.equal(model.features(row, 6)[0].features, fresh)  # from memory
    model.cache = again = EmbeddingCache(str(tmp_path))  # from disk, as another process would
    assert torch.equal(model.features(row, 6)[0].features, fresh)
    assert (first.hits, first.misses, again.hits, again.misses) == (1, 1, 1, 0)


def test_the_key_changes_with_all_that_the_embedding_depends_on(toy, model, tmp_path):
    rows = data.load_rows(str(toy / "rl.jsonl"))
    row, other = rows[0], next(r for r in rows if r.media != rows[0].media)
    copy = tmp_path / "same.mp4"

    def look(n, hits, misses, **change):
        """Features of the row's medium with a change, and whether they had to be computed."""
        changed = replace(row, media=(row.media[0]._replace(**change),))
        found = model.features(changed, n)[0].features
        assert (model.cache.hits, model.cache.misses) == (hits, misses)
        return found

    look(6, 0, 1)
    copy.write_bytes(Path(row.media[0].path).read_bytes())
    look(6, 1, 1, path=str(copy))  # same content under another name: a hit
    look(9, 2, 1, num_frames=6)  # a medium's own number of frames counts
    look(5, 2, 2)
    look(6, 2, 3, segment=(0.0, 20.0))
    features = look(6, 2, 4, path=other.media[0].path)
    copy.write_bytes(Path(other.media[0].path).read_bytes())  # new content under a known name
    assert torch.equal(look(6, 3, 4, path=str(copy)), features)

    changes = [
        lambda: model.preprocess.update(image_mean=[0.4, 0.5, 0.5]),
        lambda: model.projector.layers[2].weight.data.mul_(1.5),
        lambda: next(iter(model.tower.parameters())).data.mul_(1.5),
        lambda: model.config.update(mm_vision_select_layer=-2),
    ]
    for n, change in enumerate(changes):
        change()
        model.forget_encoder()
        fresh = model.encode(data.load_media(row.media[0], 6)[0])
        assert torch.equal(look(6, 3, 5 + n), fresh)
    model.policy.model.norm.weight.data.mul_(2.0)  # not a part of the encoder
    model.forget_encoder()
    look(6, 4, 8)


# -------------------------------------------------------------------------------- many ranks


class Encoder(torch.nn.Module):
    """(f, H, W, 3) -> (ceil(f / together), 2, 4), each `together` frames by themselves; not
    linear, so that a frame too many in a unit shows."""

    def __init__(self, together):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 8, generator=g, dtype=torch.float64))
        self.together = together

    def forward(self, frames):
        units = frames.double().div(255).split(self.together)
        wide = [torch.tanh(u.mean((0, 1, 2)) * len(u) @ self.weight) for u in units]
        return torch.stack(wide).unflatten(1, (2, 4))


class Lazy(list):
    """Frames that are decoded when they are sliced; counts them."""

    read = 0

    def __getitem__(self, at: slice):
        part = super().__getitem__(at)
        self.read += len(part)
        return torch.stack(part)


def _encode_rank(rank):
    group, world = dist.group.WORLD, dist.get_world_size()
    g = torch.Generator().manual_seed(1)
    # fewer frames than ranks; units that do not divide; a last unit of 1
    for count, together in [(n, k) for n in (1, 2, 5, 8, 9, 17) for k in (1, 2, 8)]:
        frames = torch.randint(0, 256, (count, 2, 3, 3), generator=g, dtype=torch.uint8)
        case = f"{count} frames, {together} together, rank {rank} of {world}"
        encode, lazy = Encoder(together), Lazy(frames)
        found = mrsp.encode_parallel(encode, lazy, group, together)
        share = ceil(ceil(count / together) / world) * together
        assert 0 < lazy.read <= share, case  # no rank decodes more than its share
        expected = encode(frames)
        assert torch.equal(found, expected), case
        # every rank has its own gradient for the result; they count as their sum
        ups = torch.randn(world, *found.shape, generator=g, dtype=torch.float64)
        (grad,) = torch.autograd.grad(found, encode.weight, ups[rank])
        dist.all_reduce(grad)
        (whole,) = torch.autograd.grad(expected, encode.weight, ups.sum(0))
        assert (grad - whole).abs().max() < 1e-9 and whole.abs().max() > 1e-3, case
    for count, given, promised in ((17, 2, 1), (16, 1, 2)):  # frames a unit
        with pytest.raises(ValueError, match="encode gave"):
            mrsp.encode_parallel(Encoder(given), torch.zeros(count, 2, 3, 3), group, promised)


def _agree_rank(rank, folder):
    """A hit here and a miss there: both compute, together, and both get the value."""
    group, calls = dist.group.WORLD, []

    def compute():  # a collective: it hangs unless both call it
        calls.append(1)
        value = torch.full((3,), rank + 1.0)
        dist.all_reduce(value)
        return value

    for hits, disk in ((0, False), (0, True), (1, False), (1, True)):
        calls.clear()  # each rank has its own folder, as on two machines
        cache = EmbeddingCache(f"{folder}/{hits}_{rank}" if disk else None)
        if rank == hits:
            seen = EmbeddingCache(cache.folder)
            get(seen, "k", lambda: torch.full((3,), 3.0))
            if not disk:
                cache.memory = OrderedDict(seen.memory)
        assert get(cache, "k", compute, group).tolist() == [3.0] * 3
        assert (*counts(cache), len(calls)) == (0, 1, 12, 1)
        assert get(cache, "k", refuse, group).tolist() == [3.0] * 3  # now both hit
        assert counts(cache) == (1, 1, 12)
    shared = EmbeddingCache(f"{folder}/shared")  # one folder: one rank writes, both read
    assert get(shared, "k", compute, group).tolist() == [3.0] * 3
    dist.barrier()
    assert get(EmbeddingCache(f"{folder}/shared"), "k", refuse, group).tolist() == [3.0] * 3


SLOW = pytest.mark.slow


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_frames_encoded_in_parallel_equal_frames_encoded_alone(world):
    """Values exactly, gradients of the encoder's weights in float64."""
    run_ranks(_encode_rank, world)


class Travels(Exception):
    """One that pickle takes; the next one it does not make again: it wants two arguments."""


class Stays(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def _fail_rank(rank):
    for kind, arguments, raised, said in (
        (Travels, ("this way",), Travels, "^this way$"),
        (Stays, ("that", "way"), RuntimeError, "^Stays: that way$"),
    ):
        with pytest.raises(raised, match=said):  # on both ranks
            with mrsp.agreed(dist.group.WORLD):
                if rank == 1:
                    raise kind(*arguments)
    with mrsp.agreed(dist.group.WORLD):
        pass


def test_what_one_rank_fails_with_is_raised_on_all():
    run_ranks(_fail_rank, 2)


def test_ranks_agree_whether_an_entry_is_there(tmp_path):
    run_ranks(_agree_rank, 2, str(tmp_path))


def test_one_process_and_no_frames_take_the_same_path():
    frames = torch.zeros(5, 2, 3, 3)
    assert torch.equal(mrsp.encode_parallel(Encoder(2), frames, None, 2), Encoder(2)(frames))
