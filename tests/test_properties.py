"""Properties of pure functions, each tried on 200 inputs that hypothesis makes up: which frames are
taken, how answers are graded, what becomes of any row or file, advantages.

The inputs are the same in each run; one that breaks a property is shrunk to a small one.
"""

import json
import re
from string import ascii_uppercase

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import data
from data import DataError, Example, Medium, frame_indices, load_rows, parse_row
from grpo import Config, accuracy_reward, advantages, format_reward, reward
from kit.lenient import lenient_accuracy

settings.register_profile("same", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("same")

# --------------------------------------------------------------------------------------- frames


@given(st.integers(1, 10**6), st.integers(1, 3000))
def test_frames_are_spread_evenly_over_a_video(total, n):
    indices = frame_indices(total, n)
    steps = np.diff(indices)
    assert len(indices) == min(n, total) and indices[0] == 0
    assert indices[-1] == (total - 1 if len(indices) > 1 else 0)
    assert (steps > 0).all() and (len(steps) == 0 or steps.max() - steps.min() <= 1)
    assert indices.tolist() == np.linspace(0, total - 1, min(n, total)).astype(int).tolist()


@given(st.integers(0, 5000), st.integers(-1, 300), st.integers(-9, 5009), st.integers(-9, 5009))
@example(100, 3, 10, 20)
@example(100, 2, 90, 500)  # a range may end behind the video
@example(0, 4, 0, 0)
@example(10, 0, 0, 9)
def test_frames_of_a_segment_stay_in_it_and_in_the_video(total, n, first, last):
    if n < 1 or not 0 <= first <= min(last, total - 1):
        with pytest.raises(DataError, match="cannot take"):
            frame_indices(total, n, first, last)
        return
    last = min(last, total - 1)
    within = frame_indices(last - first + 1, n)
    spread = frame_indices(total, n, first, last)
    assert len(spread) == len(within) and abs(spread - first - within).max() <= 1  # rounding
    assert spread[0] == first and spread[-1] in (last, first) and spread[-1] <= last
    assert (np.diff(spread) > 0).all()


# -------------------------------------------------------------------------------------- grading

words = st.lists(st.sampled_from("red dark blue car dog two".split()), min_size=1, max_size=3)
choices = st.lists(words.map(" ".join), min_size=2, max_size=6, unique=True).map(tuple)
pieces = "<think> </think> <answer> </answer> A B b (C) D. red blue 3 1,000 answer is option not or"
pieces = st.sampled_from([*pieces.split(), ",", ".", "\n", " ", "**", r"\boxed{B}", "because", "a"])
completions = st.lists(pieces | st.text(max_size=5), max_size=12).flatmap(
    lambda parts: st.sampled_from(["".join(parts), " ".join(parts)])
)
golds = st.sampled_from(["A", "B", "3", "red", "1000"]) | st.text(max_size=9)


@given(completions, golds, choices | st.just(()))
def test_any_completion_has_a_grade_and_the_lenient_one_is_no_lower(completion, gold, options):
    strict, lenient = (f(completion, gold, options) for f in (accuracy_reward, lenient_accuracy))
    assert strict in (0.0, 1.0) and lenient in (strict, 1.0)
    example = Example("q", "", options, gold, "", (), "text", "")
    parts = reward(completion, example, Config())
    assert parts["accuracy"] == strict and parts["format"] in (0.0, 1.0)
    assert parts["reward"] == pytest.approx(0.9 * strict + 0.1 * parts["format"])


@given(completions)
def test_the_right_format_has_one_span(completion):
    for text in (completion, f"<think>{completion}</think> <answer>{completion}</answer>"):
        if format_reward(text):
            assert len(re.findall("<answer>.*?</answer>", text, re.DOTALL)) == 1
            assert text.count("<answer>") == text.count("<think>") == 1


@given(completions, st.text(max_size=9).map(str.strip).filter(bool))
def test_one_span_around_the_gold_answer_is_right_and_two_are_wrong(around, gold):
    assume("answer>" not in around + gold)
    for options, letter in (((), gold), (("x", gold), "B")):
        one = f"{around} <answer> {letter} </answer> {around}"
        assert accuracy_reward(one, letter, options) == 1
        for more in (letter, "A", around):
            assert accuracy_reward(f"{one} <answer>{more}</answer>", letter, options) == 0
        last = f"<answer> {around} </answer> <answer> {letter} </answer>"
        assert lenient_accuracy(last, letter, options) == 1 or "think>" in around or not options
        assert lenient_accuracy(f"{around} <answer> {letter} </answer>", letter, options) == 1


@given(choices, st.data())
def test_the_order_of_the_options_does_not_matter(options, draw):
    order = draw.draw(st.permutations(range(len(options))))
    gold, said = (draw.draw(st.integers(0, len(options) - 1)) for _ in range(2))
    form = draw.draw(st.sampled_from(["{0}", "({0})", "{0}. {1}", "{1}", "{0} or {0}", "{2}", "?"]))
    front = draw.draw(st.sampled_from(["", "<think> . </think> ", "The answer is "]))
    grades = set()
    for places in (range(len(options)), order):  # places[i]: the option that stands at i
        at = {option: "ABCDEF"[i] for i, option in enumerate(places)}
        answer = form.format(at[said], options[said], at[said].lower())
        now = tuple(options[i] for i in places)
        texts = f"{front}<answer>{answer}</answer>", front + answer
        grades.add(
            tuple(f(t, at[gold], now) for t in texts for f in (accuracy_reward, lenient_accuracy))
        )
    assert len(grades) == 1
    if said != gold:
        assert grades == {(0.0,) * 4}


# ----------------------------------------------------------------------------------------- rows

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
lines = texts.map(lambda s: re.sub(r"[\r\n]", "", s).strip()).filter(bool)
names = st.text("ab.-_ é", min_size=1, max_size=9).filter(lambda s: s.strip(".") == s)
files = st.lists(names, min_size=1, max_size=3).map("/".join)
options = st.lists(lines, min_size=2, max_size=5) | st.just([])


@st.composite
def rows(draw):
    """(a good row, what it must become) without its paths."""
    found, kind = draw(options), draw(st.sampled_from(["video", "image", "audio"]))
    paths = draw(st.lists(files, min_size=1, max_size=3))
    form = draw(st.sampled_from(["{}. {}", "({}) {}", "{}) {}", " {}: {}"]))
    marks = [form.format(letter, text) for letter, text in zip("ABCDE", found)]
    answer = draw(st.sampled_from("ABCDE"[: len(found)]) if found else lines)
    assume("answer>" not in answer and (found or answer not in list(ascii_uppercase)))
    row = {
        "problem_id": draw(texts | st.integers(0, 2**63 - 1)),
        "problem": "\n".join([re.sub(r"[\r\n]", "", draw(texts)), *marks]),
        "data_type": kind,
        "problem_type": draw(texts),
        "reasoning": draw(texts | st.none()),
        "videos": paths[0] if len(paths) == 1 else paths,
        "answer": f"<answer>{answer}</answer>",
    } | draw(st.dictionaries(st.sampled_from(["images", "response", "score"]), st.none()))
    return row, paths, tuple(found), answer


@given(rows())
def test_a_good_row_becomes_what_it_says(good):
    row, paths, options, answer = good
    one = parse_row(row, "/media")
    assert one.id == str(row["problem_id"]) and one.problem == row["problem"]
    assert (one.options, one.answer) == (options, answer)
    assert one.media == tuple(Medium(row["data_type"], f"/media/{path}") for path in paths)
    if not (row["reasoning"] or "").strip():
        assert one.response == ""
        return
    assert f"<answer> {answer} </answer>" in one.response
    assert accuracy_reward(one.response, one.answer, one.options) == 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(data.TYPES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(list(data.FIELDS))


def example_or_error(row):
    """That any row must be one of the two."""
    try:
        one = parse_row(row, "/media", "rows.jsonl:7")
    except DataError as error:
        assert str(error).startswith("rows.jsonl:7 (problem_id ") and "\n" not in str(error)
    else:
        assert isinstance(one, Example) and hash(one) == hash(one)
        assert all(m.path.startswith("/media/") or m.path == "/media" for m in one.media)
        assert not re.search(r"/\.\.(/|$)", "".join(m.path for m in one.media))


@given(st.dictionaries(fields | texts, anything))
def test_any_object_is_an_example_or_an_error_that_names_its_row(row):
    example_or_error(row)


@given(rows(), fields, anything | st.lists(st.integers(0, 9), max_size=3))
def test_a_row_with_one_other_field_is_an_example_or_an_error_that_names_its_row(
    good, field, value
):
    example_or_error(good[0] | {field: value})
    example_or_error({k: v for k, v in good[0].items() if k != field})


steps = st.lists(st.sampled_from(["..", ".", "a", "...", "", "media", "..a", "~"]), min_size=1)


@given(rows(), st.sampled_from(["", "/", "/media/", "//media/"]), steps, st.booleans())
def test_no_path_leaves_the_video_directory(good, start, steps, several):
    path = start + "/".join(steps)
    example_or_error(good[0] | {"videos": ["v.mp4", path] if several else path})
    example_or_error(good[0] | {"images": [path]})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


json_lines = (rows().map(lambda good: good[0]) | anything).map(lambda x: json.dumps(x).encode())
bytes_of_lines = st.lists(json_lines | st.binary(max_size=40), max_size=4).map(b"\n".join)


@given(bytes_of_lines, st.data())
def test_any_bytes_in_a_file_are_rows_or_an_error_that_names_it(file, content, draw):
    if content and draw.draw(st.booleans()):  # a good file with a byte that was hit
        at = draw.draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw.draw(st.binary(max_size=2)) + content[at + 1 :]
    file.write_bytes(content)
    bad, found = [], []
    for kept in (None, bad):
        try:
            found.append(load_rows(str(file), "/media", kept))
        except DataError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error)
            found.append(None)
    strict, loose = found
    assert all(message.startswith(where) for where, message in bad)
    assert (strict is not None) == (loose is not None and not bad) and (strict in (None, loose))
    if loose is not None:
        assert len(loose) + len(bad) == sum(bool(line.strip()) for line in content.split(b"\n"))
        assert len({one.id for one in loose}) == len(loose)


# ----------------------------------------------------------------------------------- advantages

values = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))
groups = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(groups, values, st.floats(0.5, 8), st.booleans())
def test_advantages_are_centred_and_know_no_offset_and_only_unscaled_a_scale(
    group, offset, scale, scale_std
):
    rewards = torch.tensor(group, dtype=torch.float64)
    config = Config(scale_std=scale_std)
    a = advantages(rewards, config)
    assert a.shape == rewards.shape and a.sum(1).abs().max() < 1e-9
    torch.testing.assert_close(advantages(rewards + offset, config), a, rtol=0, atol=1e-6)
    scaled = advantages(rewards * scale, config, eps=1e-6 * scale)  # eps is a standard deviation
    torch.testing.assert_close(scaled, a if scale_std else a * scale, rtol=0, atol=1e-6)
    order = rewards.argsort(dim=1, stable=True)
    assert (a.gather(1, order).diff(dim=1) >= -1e-12).all()  # a better answer is never worse
