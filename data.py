"""Data: rows of LongVideo-Reason, and the frames of their media.

    rows.jsonl,      load_rows                  load_media
    rows.parquet,    ---------> list[Example]   ---------> frames (F, H, W, 3) uint8
    DATA_SET@SPLIT   parse_row  with Media      Frames     times (F,) seconds

The data set (section 3 of the paper) is read as published: LongVideo-Reason/longvideo-reason@test
of the hub or of its downloaded folder, .parquet and .jsonl files. A row is one question; FIELDS
says what it holds. In a prompt its media stand in the order videos, images, audios. How sound is
decoded, for the families that hear: kit/sound.py.

F frames of H x W pixels, of N in the file. Which ones: by VILA's rule, linspace(0, N - 1, F)
truncated, or so many a second (Rate). Times are those of the file, also where its rate varies.
Frames decode when they are sliced, so ranks that share a video decode a part each; in this
process, with decord, PyAV and PIL. A decoder may hang or crash: kit/decode.py gives the same frames
from child processes.

Other systems drop a video that does not decode, or put another one in its place. Here bad input is
a DataError that names the row or the file and says what to do, and the caller decides; nothing is
replaced. Nor does a row reach files outside the video directory.

Check this file alone:  pytest data.py tests/test_data.py
"""

import functools
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from types import NoneType
from typing import NamedTuple

import numpy as np

TYPES = ("video", "image", "audio", "text")
FIELDS = {  # of a row: their types, and what they must be; one with NoneType may be left out
    "problem_id": ((str, int), "the unique name of a question"),
    "problem": ((str,), "a question, then its options one a line: 'Which?\\nA. red\\nB. blue'"),
    "data_type": ((str,), f"one of {', '.join(TYPES)}"),
    "problem_type": ((str,), "a category: temporal, goal, plot, spatial"),
    "reasoning": ((str, NoneType), "the chain of thought that SFT learns from"),
    "videos": ((str, list), "paths of media files of that data_type, '' for text"),
    "answer": ((str,), "<answer>...</answer> around the letter of an option, or a free text"),
    # Our additions. Fields that are not in this table are not read.
    "response": ((str, NoneType), "a text that SFT learns, instead of reasoning and answer"),
    "num_frames": ((int, NoneType), "a number of frames of `videos`, instead of the run's setting"),
    "segment": ((list, NoneType), "[start, end] in seconds, of `videos`"),
    "audio_track": ((bool, NoneType), "true or false: whether a video's sound is heard as well"),
    "images": ((list, NoneType), "paths of media files that come along"),
    "audios": ((list, NoneType), "paths of media files that come along"),
}
MAX_PIXELS = 2**26  # of a frame: two of 8K; a file that claims more is broken, or means harm


class DataError(ValueError):
    """Bad input: the message names the file or row and the field, and says what is wrong. question:
    the id of the one whose media failed, if it is one."""

    def __init__(self, message: str, question: str = ""):
        super().__init__(message)
        self.question = question


class Rate(NamedTuple):
    """How many frames to take of a video: `fps` a second, `most` at most."""

    fps: float
    most: int = 8192


class Medium(NamedTuple):
    """A file that a question is about, and what is taken from it."""

    kind: str  # "video", "image" or "audio"
    path: str  # absolute
    num_frames: int | None = None  # of a video: instead of the run's setting
    segment: tuple[float, float] | None = None  # [start, end) seconds of a video or audio
    track: bool = False  # a video whose audio track is heard as well


@dataclass(frozen=True)
class Example:
    """One question. `options` is () for an open-ended one; `answer` is a letter if there are
    options, else free text; `media` are in the order of the prompt, () for text only."""

    id: str
    problem: str
    options: tuple[str, ...]
    answer: str
    category: str
    media: tuple[Medium, ...]
    data_type: str
    response: str  # what SFT trains on; "" without reasoning


# ---------------------------------------------------------------------------------------- rows


def wrong(row: dict, field: str) -> DataError:
    """The error of a field that is not what it must be."""
    found = "is missing:" if row.get(field) is None else f"is {row[field]!r}, not"
    return DataError(f"field {field!r} {found} {FIELDS[field][1]}")


# A line that begins an option: "A. red", "(A) red", "- A) red", "**A.** red", "[A] red", "A:".
OPTION = re.compile(r"\s*(?:[-*•]\s+)?(?:\*\*)?[(\[]?([A-Z])[.):\]]+(?:\*\*)?\s*(.*)")


def parse_options(problem: str) -> tuple[str, ...]:
    """The texts of the options at the end of a problem, by their letters A, B, C ..., in whatever
    order they stand there. Each begins a line and may go on in the next (the last one only if
    another does); one may have no text. What begins alike further up, such as statements I. and II.
    or a dialogue, is no option.

    >>> parse_options("A: Hi.\\nB: Hi.\\nWho is first?\\nC.\\n(B) the\\nother\\nA. one")
    ('one', 'the\\nother', '')
    """
    lines = problem.split("\n")  # splitlines() would cut a text at characters like U+2028
    marked = [i for i in range(1, len(lines)) if OPTION.match(lines[i])]
    for first in range(max(len(marked) - 26, 0), len(marked) - 1):
        starts = marked[first:]
        found = [OPTION.match(lines[i]) for i in starts]
        letters = sorted(match[1] for match in found)
        if letters == list(ascii_uppercase[: len(letters)]):
            break
    else:
        if len(marked) > 1:
            letters = [OPTION.match(lines[i])[1] for i in marked]
            raise DataError(f"field 'problem': option letters {letters} are not A, B, C ...")
        return ()
    ends = [*starts[1:], starts[-1] + 1]
    if starts[-1] - starts[0] >= len(starts):  # some have more than a line
        ends[-1] = len(lines)
    texts = {}
    for match, start, end in zip(found, starts, ends):
        texts[match[1]] = "\n".join([match[2], *lines[start + 1 : end]]).strip()
    return tuple(texts[letter] for letter in letters)


def paths_of(row: dict, field: str, video_dir: str) -> list[str]:
    """The media files that a field names, absolute. By the text of their paths they are within the
    video directory; a link in there may lead to another disk.

    >>> paths_of({"data_type": "video", "videos": "a/../v.mp4"}, "videos", "/media")
    ['/media/v.mp4']
    """
    paths = row.get(field) or []
    paths = [paths] if isinstance(paths, str) else paths
    if row["data_type"] == "text" and paths:
        raise DataError(f"field {field!r} must be empty for data_type text")
    missing = field == "videos" and row["data_type"] != "text" and not paths
    if missing or not all(isinstance(path, str) and path for path in paths):
        raise wrong(row, field)
    inside = [os.path.relpath(os.path.join(video_dir, path), video_dir) for path in paths]
    for path, place in zip(paths, inside):
        if place.split(os.sep)[0] == os.pardir:
            parent = f"the video directory {video_dir or '.'}; give one that holds all media"
            raise DataError(f"field {field!r}: {path!r} is not within {parent}")
    return [str(Path(video_dir, place).absolute()) for place in inside]


def parse_media(row: dict, video_dir: str) -> tuple[Medium, ...]:
    """The media of a row, in the order of the prompt."""
    kind = row["data_type"]
    frames = row.get("num_frames")
    segment = row.get("segment")
    if frames is not None and frames < 1:
        raise wrong(row, "num_frames")
    if segment is not None:
        numbers = [x for x in segment if type(x) in (int, float)]
        if not (len(segment) == len(numbers) == 2 and 0 <= segment[0] < segment[1] < float("inf")):
            raise wrong(row, "segment")
        segment = tuple(segment)
    for field in ("num_frames", "segment", "audio_track"):
        if row.get(field) and kind != "video" and (field, kind) != ("segment", "audio"):
            raise DataError(f"field {field!r} does not go with data_type {kind}")
    videos = paths_of(row, "videos", video_dir)
    track = bool(row.get("audio_track"))
    media = [Medium(kind, path, frames, segment, track) for path in videos]
    media += [Medium("image", path) for path in paths_of(row, "images", video_dir)]
    media += [Medium("audio", path) for path in paths_of(row, "audios", video_dir)]
    return tuple(media)


def parse_answer(row: dict, options: tuple[str, ...]) -> str:
    """What stands in the one <answer> span of a row: the letter of an option, or free text.

    >>> parse_answer({"answer": "<answer> B </answer>"}, ("red", "blue"))
    'B'
    """
    inside = r"(?:(?!</?answer>).)+"  # characters, at none of which another tag begins
    span = re.fullmatch(rf"\s*<answer>({inside})</answer>\s*", row["answer"], re.DOTALL)
    if span is None or not span[1].strip():
        raise wrong(row, "answer")
    answer = span[1].strip()
    if options and answer not in list(ascii_uppercase[: len(options)]):
        raise DataError(f"answer {answer!r} is no letter of its {len(options)} options")
    if not options and answer in list(ascii_uppercase):
        raise DataError(
            f"answer {answer!r} is a letter, but field 'problem' has no options that can be read: "
            "write each on a line of its own behind the question, such as 'A. red'"
        )
    return answer


def parse_row(row: dict, video_dir: str, where: str = "row") -> Example:
    """One JSON object to an Example, or a DataError that names the row and the field."""
    try:
        for field, (types, _) in FIELDS.items():
            if type(row.get(field)) not in types:
                raise wrong(row, field)
        if row["data_type"] not in TYPES:
            raise wrong(row, "data_type")
        media = parse_media(row, video_dir)
        options = parse_options(row["problem"])
        response = row.get("response")
        if response is not None and not response.strip():
            raise wrong(row, "response")
        needed = row["answer"] or response is None  # a verbatim response does without one
        answer = parse_answer(row, options) if needed else ""
    except DataError as error:
        raise DataError(f"{where} (problem_id {row.get('problem_id', '?')!r}): {error}") from None
    if response is None:
        thought = (row.get("reasoning") or "").strip()
        if thought and "<think>" not in thought:
            thought = f"<think> {thought} </think>"
        response = f"{thought} <answer> {answer} </answer>" if thought else ""
        tags = re.findall("</?(?:think|answer)>", response)
        if tags not in ([], ["<think>", "</think>", "<answer>", "</answer>"]):
            raise DataError(
                f"{where} (problem_id {row['problem_id']!r}): field 'reasoning' has {tags[:-2]}: "
                "one <think> ... </think>, or no such tags, is what a reward takes"
            )
    return Example(
        id=str(row["problem_id"]),
        problem=row["problem"],
        options=options,
        answer=answer,
        category=row["problem_type"],
        media=media,
        data_type=row["data_type"],
        response=response,
    )


def stand_in(where: str) -> Example:
    """Counts in place of a malformed row."""
    return Example(where, "", (), "", "malformed row", (), "", "")


def parse_line(line: bytes, where: str) -> dict | DataError:
    """A line of a .jsonl file as a JSON object, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # "\\ud800" is half a character: no text
    except UnicodeError:
        return DataError(f"{where}: not UTF-8 text")
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: huge numbers
        return DataError(f"{where}: not JSON ({error})")
    return row if isinstance(row, dict) else DataError(f"{where}: not a JSON object")


def read_rows(path: str):
    """Yields (where, row) for each row of a source that load_rows takes. where: what errors call
    the row. row: a dict, or the DataError that a line of a .jsonl file is instead."""
    source, _, split = path.rpartition("@")
    is_file = os.path.isfile(path)
    if not is_file and (not source or path.endswith((".jsonl", ".parquet"))):
        raise DataError(f"{path}: no such file; give a .jsonl or .parquet file, or DATA_SET@SPLIT")
    try:
        if is_file and not path.endswith(".parquet"):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", parse_line(line, f"{path}:{number}")
            return
        if is_file:
            from pyarrow.parquet import ParquetFile

            table = ParquetFile(path).read()
        else:
            from datasets import load_dataset

            table = load_dataset(source, split=split).with_format("arrow")[:]
        known = [name for name in table.column_names if name in FIELDS]
        for number, row in enumerate(table.select(known).to_pylist(), 1):
            yield f"{path}: row {number}", row
    except ImportError as error:
        raise DataError(f"{path}: {error}; pip install datasets") from None
    except Exception as error:  # file system, Arrow and hub each have their own
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        hint = "download it again" if is_file else "download the data set and give FOLDER@SPLIT"
        raise DataError(f"{path}: cannot be read ({reason}); check its name, or {hint}") from None


def load_rows(path: str, video_dir: str | None = None, bad: list | None = None) -> list[Example]:
    """All rows of a data set. path: a .jsonl or .parquet file, or "ID@SPLIT" of the hub or
    "FOLDER@SPLIT". video_dir defaults to the folder of the rows; of the hub, to the current one.

    DataError for a source that is missing, empty or not to be read, and for a malformed row: no
    JSON object, a field that is missing or wrong, an id that occurs twice. If `bad` is a list, such
    rows are left out and appended to it as (where, message)."""
    folder = os.path.dirname(path) if os.path.isfile(path) else path.rpartition("@")[0]
    video_dir = video_dir or (folder if os.path.isdir(folder) else "")
    examples = {}  # by id
    faults = []
    for where, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            example = parse_row(row, video_dir, where)
            if example.id in examples:
                raise DataError(f"{where}: problem_id {example.id!r} occurs twice")
            examples[example.id] = example
        except DataError as error:
            if bad is None:
                raise
            faults.append((where, str(error)))
    if not examples:
        why = f"no row is good, the first: {faults[0][1]}" if faults else "it has no rows"
        raise DataError(f"{path}: {why}")
    if faults:
        bad += faults
    return list(examples.values())


# --------------------------------------------------------------------------------------- media


def frame_indices(total: int, n: int, first: int = 0, last: int | None = None) -> np.ndarray:
    """Indices of n frames spread evenly over first..last of a video of `total` frames (VILA's
    rule). A shorter video gives all its frames, each once.

    >>> frame_indices(100, 4), frame_indices(3, 8), frame_indices(100, 1)
    (array([ 0, 33, 66, 99]), array([0, 1, 2]), array([0]))
    """
    last = total - 1 if last is None else min(last, total - 1)
    if total < 1 or n < 1 or not 0 <= first <= last:
        raise DataError(f"cannot take {n} frames from {first}..{last} of {total}")
    return np.linspace(first, last, min(n, last - first + 1), dtype=int)


def choose_frames(times: np.ndarray, how: int | Rate, first: int, last: int) -> np.ndarray:
    """Indices of the frames to take between first and last of a video with these times (N,). A
    number is spread evenly by index (VILA's rule), a Rate by time: here 0.0, 0.6, 1.2 and 1.8 s,
    and of each the frame that is shown then.

    >>> times = np.array([0, 0.1, 0.2, 1.0, 1.8])
    >>> choose_frames(times, 4, 0, 4), choose_frames(times, Rate(2), 0, 4)
    (array([0, 1, 2, 4]), array([0, 2, 3, 4]))
    """
    if not isinstance(how, Rate):
        return frame_indices(len(times), how, first, last)
    most = len(frame_indices(len(times), how.most, first, last))
    length = times[last] - times[first]
    seconds = length * (last - first + 1) / max(last - first, 1)  # the last frame's own included
    n = min(max(round(seconds * how.fps), 1), most)
    wanted = times[first] + np.linspace(0, length, n)
    behind = np.searchsorted(times, wanted + 1e-6, "right")  # the next frame
    return np.unique(behind - 1)


@contextmanager
def named_errors(medium: Medium, kind: str, name: str):
    """All that goes wrong within becomes a DataError that names the file, and the question `name`
    if there is one: first of all a file that is missing or empty."""
    where = f" (question {name})" if name else ""
    try:
        if not os.path.isfile(medium.path):
            raise DataError(f"{medium.path}: no such file{where}; check the video directory")
        if os.path.getsize(medium.path) == 0:
            raise DataError(f"{medium.path}: the file is empty{where}; download it again")
        yield
    except Exception as error:  # the decoders raise their own types; keep one line of theirs
        reason = (str(error).strip() or type(error).__name__).split("\n")[-1]
        if not reason.startswith(medium.path):  # else it is named already
            reason = f"{medium.path}: does not decode as {kind}{where}: {reason[:200]}"
        raise DataError(reason, question=name) from None


class Frames:
    """The frames of a video or image, decoded when they are asked for: frames[a:z] is
    (z - a, H, W, 3) uint8. times (F,) float64: seconds from the first frame of the file. An image
    is one frame at time 0. The medium's own num_frames and segment win over `num_frames`. DataError
    as named_errors."""

    def __init__(self, medium: Medium, num_frames: int | Rate, name: str = ""):
        self.medium = medium
        self.name = name
        self.times = np.zeros(1)
        if medium.kind == "video":
            how = medium.num_frames or num_frames
            with named_errors(medium, "video", name):
                self.read, self.indices, self.times = open_video(medium.path, how, medium.segment)

    def __len__(self) -> int:
        return len(self.times)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3), from the first frame."""
        return len(self), *self[:1].shape[1:]

    def __getitem__(self, part: slice) -> np.ndarray:
        with named_errors(self.medium, self.medium.kind, self.name):
            if self.medium.kind == "video":
                return self.read(self.indices[part])
            from PIL import Image

            with Image.open(self.medium.path) as image:
                return np.array(image.convert("RGB"))[None][part]

    def pieces(self, parts: list[slice]):
        """frames[part] of one part after the other."""
        return map(self.__getitem__, parts)


def load_media(medium: Medium, num_frames: int | Rate, name: str = ""):
    """All Frames of a medium at once, (F, H, W, 3) uint8, and their times (F,)."""
    frames = Frames(medium, num_frames, name)
    return frames[:], frames.times


class Opener:
    """Opens media in this process. A run has kit/decode.Loader, which decodes in child processes,
    ahead of the model, and hears."""

    @contextmanager
    def open(self, medium: Medium, num_frames: int | Rate, name: str = ""):
        """Frames of a medium, for the time of the block."""
        yield Frames(medium, num_frames, name)

    def sound(self, medium: Medium, rate: int = 16000, name: str = "") -> np.ndarray:
        """Of audio and tracks: Loader's alone."""
        raise DataError(f"{medium.path}: to hear it set model.loader = kit.decode.Loader()", name)

    def ahead(self, plan) -> None:
        """What will be opened next; here nothing is done beforehand."""

    def close(self) -> None:
        """Nothing is held."""


def open_video(path: str, how: int | Rate, segment=None):
    """(function from indices (n,) to frames (n, H, W, 3), the indices to take (F,), their times
    (F,) in seconds); segment = (start, end) seconds."""
    import decord

    declared, seconds, turned = read_header(path)
    # One thread: decord's own pool fights with the ranks, and threads of it have hung in the field.
    reader = decord.VideoReader(path, num_threads=1)
    total = len(reader)
    fps = float(reader.get_avg_fps())
    stamps = reader.get_frame_timestamp(np.arange(total)).astype(float)  # (N, 2) start, end
    # A download that was cut off decodes as a shorter video, and nothing says so. Times are the
    # weaker witness (sound may be longer): for files that count no frames.
    if total < 0.98 * declared or (not declared and stamps[-1, 1] < 0.9 * seconds - 1):
        found = f"{total} frames of {declared}, {stamps[-1, 1]:.1f} s of {seconds:.1f} s"
        raise DataError(f"the file is cut off, or was trimmed without encoding: {found}")
    times = np.arange(total) / fps  # exact, where the rate is constant ...
    if np.abs(stamps[:, 0] - stamps[0, 0] - times).max() > 0.5 / fps:  # ... and it is not
        times = stamps[:, 0] - stamps[0, 0]
    first, stop = 0, total
    if segment is not None:  # frames whose time lies in [start, end)
        first, stop = np.searchsorted(times, np.array(segment) - 1e-6).tolist()
    indices = choose_frames(times, how, first, stop - 1)

    def read(at: np.ndarray) -> np.ndarray:
        return reader.get_batch(at).asnumpy()

    return Turned(path, turned // 90).read if turned % 180 else read, indices, times[indices]


class Turned:
    """A video that is shown turned by a quarter, as telephones write them: decord gives garbled
    frames of it. They are decoded one after the other, going on behind the last one read."""

    def __init__(self, path: str, quarters: int):
        self.path = path
        self.quarters = quarters
        self.at = np.inf  # index of the last frame decoded; what is not behind it needs a new start

    def read(self, indices: np.ndarray) -> np.ndarray:
        import av

        if indices[0] <= self.at:
            self.frames = enumerate(av.open(self.path).decode(video=0))
            self.at = -1
        found = []
        while self.at < indices[-1]:
            self.at, frame = next(self.frames)
            if self.at in indices:
                found.append(np.rot90(frame.to_ndarray(format="rgb24"), self.quarters))
        return np.stack(found)


def read_header(path: str) -> tuple[int, float, int]:
    """What a video's header tells: the number of frames (0: it does not), seconds, and by how many
    degrees, counter-clockwise, to turn them. DataError without video, or if it is huge."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise DataError("the file has no video stream")
        stream = container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        if height * width > MAX_PIXELS:  # before anything is decoded
            raise DataError(f"frames of {width} x {height} pixels: more than {MAX_PIXELS:,}")
        _, seconds = span_of(container, stream)
        frame = next(container.decode(stream), None)
        return stream.frames, seconds, frame.rotation if frame else 0


def span_of(container, stream) -> tuple[float, float]:
    """(start, length) of a stream in seconds, by its file's header."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration is None:  # Matroska: the time of its end
        return start, (container.duration or 0) / 1e6 - start
    return start, float(stream.duration * stream.time_base)
