"""The toy: its scenes, rows and files, whatever the number of ranks."""

import hashlib
import re

import numpy as np
import pytest
from conftest import read_jsonl
from test_data import ROW, medium, numbered_frames, numbers_of, psnr

import data
from data import frame_indices, load_media, load_rows
from kit import toy
from kit.toy import ToyConfig, write_mp4

TINY = ToyConfig(base=2, sft=2, rl=2, test=2, other=2, images=2, clips=2, texts=3)
SPLITS = ("base", "sft", "rl", "test", "other")  # in the order of their seeds


def contents(folder, pattern):
    """Path -> hash of every file under the folder that matches the pattern."""
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.toy_build(str(folder), TINY, seed=5)
    return folder


def unpainted(folder, config, seed):
    """Only the rows of a larger toy, by file name: nothing is painted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "toy_frames", lambda *_: np.zeros((toy.T, 1, 1, 3), np.uint8))
        patch.setattr(toy, "write_mp4", lambda *_: None)
        toy.toy_build(str(folder), config, seed)
    return {p.stem: read_jsonl(p) for p in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    config = ToyConfig(base=30, sft=60, rl=300, test=60, other=60, images=2, clips=2)
    return unpainted(tmp_path_factory.mktemp("many"), config, seed=3)


def right_word(row, colors, places):
    """The answer to a row's question, by the colors in order and {color or dot: where it was}."""
    question = row["problem"].split("\n")[0]
    if question == "Which color came first?":
        return colors[0]
    if question == "Which color came last?":
        return colors[-1]
    if question == "How many flashes?":
        return str(len(colors))
    if question == "Which corner did the dot reach?":
        return places["dot"]
    if after := re.fullmatch(r"Which color came right after (\w+)\?", question):
        return colors[colors.index(after.group(1)) + 1]
    return places[re.fullmatch(r"Which side was (\w+) on\?", question).group(1)]


def scene_of(split, number):
    """Of a video of `many`."""
    return toy.toy_scene(np.random.default_rng([3, SPLITS.index(split), number]))


def true_word(row):
    """The right answer of a row, from its video's scene."""
    split, number = re.fullmatch(r"videos/([a-z]+)_(\d+)\.mp4", row["videos"]).groups()
    scene = scene_of(split, int(number))
    flashes = sorted(scene["flashes"], key=lambda flash: flash[2])
    places = dict(flash[:2] for flash in flashes) | {"dot": scene["corner"]}
    return right_word(row, [color for color, *_ in flashes], places)


def gold(row):
    """Letter and text of the option that a row calls right."""
    options = data.parse_options(row["problem"])
    letter = re.fullmatch(r"<answer>([A-D])</answer>", row["answer"]).group(1)
    assert len(set(options)) == 4
    return letter, options["ABCD".index(letter)]


def test_ranks_share_the_videos_and_make_the_same_toy(tiny, tmp_path):
    for rank in (0, 1):
        toy.toy_build(str(tmp_path / str(rank)), TINY, seed=5, rank=rank, world=2)
    mine, yours = (contents(tmp_path / str(rank), "*") for rank in (0, 1))
    assert not mine.keys() & yours.keys() and mine | yours == contents(tiny, "*")
    videos = [sum(name.startswith("videos/") for name in part) for part in (mine, yours)]
    assert videos == [5, 5] and len(mine | yours) == 6 + 10 + 4  # rows, videos, images
    assert not any(name.endswith(".jsonl") for name in yours)


def test_another_seed_is_another_toy(many, tmp_path):
    config = ToyConfig(base=2, sft=2, rl=2, test=2, other=2)
    one, two = (unpainted(tmp_path / str(seed), config, seed) for seed in (3, 4))
    for name in one:
        assert one[name] != two[name], name
    assert one["rl"] == many["rl"][: len(one["rl"])]  # and a larger toy begins with the smaller


def test_every_toy_row_loads_with_its_media(tiny):
    rows = [e for path in tiny.glob("*.jsonl") for e in load_rows(str(path))]
    assert all(len(e.media) == (e.data_type != "text") for e in rows)
    for m in {m for e in rows for m in e.media}:
        frames, times = load_media(m, 64)
        assert len(frames) == len(times) == (1 if m.kind == "image" else m.num_frames or 64)


def test_toy_splits_share_no_video(tiny, many):
    hashes = contents(tiny, "videos/*").values()
    assert len(set(hashes)) == len(hashes)
    seen = {}
    for name, rows in many.items():
        for media in {row["videos"] for row in rows if row["videos"]}:
            assert seen.setdefault(media, name) == name
    assert set(seen.values()) == {"base_images", "base", "sft", "rl", "test", "test_other"}
    counts = {n: sum(m.startswith(f"videos/{n}_") for m in seen) for n in SPLITS}
    assert counts == {"base": 30, "sft": 60, "rl": 300, "test": 60, "other": 60}


@pytest.mark.parametrize("name", ("rl", "test", "test_other"))
def test_every_gold_letter_is_right(many, name):
    for row in many[name]:
        letter, word = gold(row)
        assert word == true_word(row), row
        assert row["reasoning"].split()[-3:] == ["so", word, letter]


def test_the_reasoning_alone_leads_to_the_gold_letter(many):
    for row in many["rl"]:
        evidence, word, letter = re.fullmatch(r"seen (.*) so (\w+) (.)", row["reasoning"]).groups()
        words = evidence.split()
        if words[0].isdigit():  # "1 red 2 blue", or "red left", "dot northwest"
            assert words[::2] == [str(i + 1) for i in range(len(words) // 2)]
        expected = right_word(row, words[1::2], dict([words[:2]]))
        assert (letter, word) == gold(row) == (letter, expected)


def test_hasty_reasoning_is_right_40_percent_of_the_time(many):
    hasty = [row for row in many["sft"] if row["reasoning"].startswith("guess")]
    careful = [row for row in many["sft"] if not row["reasoning"].startswith("guess")]
    assert len(careful) / len(many["sft"]) == pytest.approx(ToyConfig.careful, abs=0.07)
    assert all(gold(row)[1] == true_word(row) for row in careful)
    right = sum(gold(row)[1] == true_word(row) for row in hasty) / len(hasty)
    assert right == pytest.approx(0.4, abs=0.09)
    assert all(row["reasoning"] == f"guess {gold(row)[0]}" for row in hasty)


def test_gold_letters_are_uniform(many):
    for kinds in (".", "flashes", "corner", "side"):
        rows = [row for row in many["rl"] if re.search(kinds, row["problem"].split("\n")[0])]
        counts = np.array([sum(gold(row)[0] == letter for row in rows) for letter in "ABCD"])
        chi_square = ((counts - len(rows) / 4) ** 2 / (len(rows) / 4)).sum()
        assert len(rows) >= 300 and chi_square < 16.3, (kinds, counts)  # p = 0.001


def test_the_six_kinds_occur_in_their_four_categories(many):
    ends = ("first", "last", "right after")
    category = {f"Which color came {end}": "temporal" for end in ends}
    category |= {"Which side was": "spatial", "How many flashes": "plot", "Which corner": "goal"}
    for name in ("sft", "rl", "test", "test_other"):
        found = set()
        for row in many[name]:
            (start,) = [s for s in category if row["problem"].startswith(s)]
            assert row["problem_type"] == category[start]
            found.add(start)
        assert found == set(category), name


def test_64_frames_see_every_flash_and_8_do_not(many):
    missed = 0
    for number in range(300):
        for _, _, start, end in scene_of("rl", number)["flashes"]:
            assert 0 <= start < end <= toy.T
            sees = [((i := frame_indices(toy.T, n)) >= start) & (i < end) for n in (64, 8)]
            assert sees[0].any()
            missed += not sees[1].any()
    assert missed > 300


def test_a_test_video_shows_the_flashes_its_reasoning_lists(tiny):
    for e in load_rows(str(tiny / "test.jsonl")):
        listing = re.fullmatch(r"<think> seen ((?:\d \w+ ?)+)so .*", e.response)
        if listing is None:
            continue
        frames = load_media(e.media[0], 64)[0].astype(float)
        first = {}
        for color, rgb in toy.COLORS.items():
            close = (np.abs(frames - rgb).max(-1) < 60).sum((1, 2)) >= 8
            if close.any():
                first[color] = int(close.argmax())
        assert sorted(first, key=first.get) == listing.group(1).split()[1::2]


@pytest.mark.parametrize("first, last, n", ((0, 255, 64), (0, 255, 8), (37, 68, 8), (96, 223, 32)))
def test_a_clip_row_selects_the_frames_it_was_written_from(tmp_path, first, last, n):
    write_mp4(str(tmp_path / "v.mp4"), numbered_frames(256))
    rng = np.random.default_rng(0)
    (row, *_) = toy.toy_clip_rows(toy.toy_scene(rng), rng, (first, last, n), texts=2)
    one = data.parse_row(ROW | {"answer": ""} | row | {"videos": "v.mp4"}, str(tmp_path))
    frames, times = load_media(one.media[0], 5)
    assert numbers_of(frames).tolist() == frame_indices(256, n, first, last).tolist()
    assert (times * 4).tolist() == numbers_of(frames).tolist()


def test_a_toy_video_keeps_its_noise_and_its_flashes(tmp_path):
    rng = np.random.default_rng(0)
    frames = toy.toy_frames(toy.toy_scene(rng), rng)
    write_mp4(str(tmp_path / "v.mp4"), frames)
    quality = psnr(load_media(medium(tmp_path / "v.mp4"), 256)[0], frames)
    assert np.median(quality) > 36 and quality.min() > 26  # small flashes lose half their colour
