"""Data: rows of LongVideo-Reason, and the frames and sound of their media.

                    load_rows                load_media
    rows.jsonl,     ---------> list[Example] ----------> frames (F, H, W, 3) uint8, times (F,) s
    rows.parquet,   parse_row  with their      Frames      decord, PIL
    DATA_SET@SPLIT  a row      Media         load_audio
                                             ----------> sound (S,) float32, 16,000 samples a second
                                                           PyAV

The data set (section 3 of the paper) is read as published: LongVideo-Reason/longvideo-reason@test
of the hub or of its downloaded folder, .parquet and .jsonl files. A row is one question; FIELDS
says what it holds. Optional fields are our additions. In the prompt, its media stand in the order
videos, images, audios.

N frames in a file, F of them taken, H x W pixels, S samples. Which F of the N: by VILA's rule,
linspace(0, N - 1, F) truncated, or so many a second (Rate). Times are those of the file, also
where its rate varies. Frames decode when they are sliced: ranks that share a video decode a part
each. All this in the process that asks; kit/decode.py gives the same from child processes, since a
decoder may hang or crash.

What other systems do: a video that does not decode is replaced by another one under the same
question, or dropped. Here bad input is a DataError that names the row or the file and says what to
do, and the caller decides; nothing is replaced. Nor does a row reach files outside the video
directory.

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
FIELDS = {  # what a row holds: the types of each field, and what they stand for
    "problem_id": ((str, int), "the unique name of a question"),
    "problem": ((str,), "a question, then its options one a line: 'Which?\\nA. red\\nB. blue'"),
    "data_type": ((str,), f"one of {', '.join(TYPES)}"),
    "problem_type": ((str,), "a category: temporal, goal, plot, spatial"),
    "reasoning": ((str, NoneType), "the chain of thought for SFT; '' or null do without SFT"),
    "videos": ((str, list), "paths of media files of that data_type in the video directory"),
    "answer": ((str,), "<answer>...</answer>, around the letter of an option or a free text"),
}
OPTIONAL = {  # they may be null, too; a row's other fields are not read
    "response": ((str,), "a text for SFT to learn, instead of reasoning and answer"),
    "num_frames": ((int,), "a number of frames of `videos`, instead of the run's setting"),
    "segment": ((list,), "[start, end] in seconds, of `videos`"),
    "audio_track": ((bool,), "true or false: whether the sound of `videos` is heard as well"),
    "images": ((list,), "paths of media files that come along"),
    "audios": ((list,), "paths of media files that come along"),
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
    meaning = (FIELDS | OPTIONAL)[field][1]
    found = f"is {row[field]!r}, not" if field in row else "is missing:"
    return DataError(f"field {field!r} {found} {meaning}")


def parse_options(problem: str) -> tuple[str, ...]:
    """The texts of the option lines of a problem, in the order A, B, C ...

    >>> parse_options("Which?\\nA. red\\n(B) blue sky")
    ('red', 'blue sky')
    """
    texts = []
    letters = []
    for line in problem.split("\n")[1:]:  # splitlines() would cut at characters like U+2028
        if option := re.match(r"\s*\(?([A-Z])[.):]\s+(.*\S)", line):
            letters.append(option[1])
            texts.append(option[2])
    if letters != list(ascii_uppercase[: len(letters)]):
        raise DataError(f"field 'problem': option letters {letters} are not A, B, C ...")
    return tuple(texts)


def parse_media(row: dict, video_dir: str) -> tuple[Medium, ...]:
    """The media of a row, in the order of the prompt.

    >>> parse_media({"data_type": "video", "videos": "v.mp4", "num_frames": 8}, "/media")
    (Medium(kind='video', path='/media/v.mp4', num_frames=8, segment=None, track=False),)
    """
    kind = row["data_type"]
    taken = {field: row.get(field) for field in ("num_frames", "segment", "audio_track")}
    frames, segment, track = taken.values()
    if frames is not None and frames < 1:
        raise wrong(row, "num_frames")
    if segment is not None:
        numbers = [x for x in segment if type(x) in (int, float)]
        if not (len(segment) == len(numbers) == 2 and 0 <= segment[0] < segment[1] < float("inf")):
            raise wrong(row, "segment")
        segment = tuple(segment)
    for field, value in taken.items():
        if value and kind != "video" and (field, kind) != ("segment", "audio"):
            raise DataError(f"field {field!r} does not go with data_type {kind}")
    media = []
    for field, of in (("videos", kind), ("images", "image"), ("audios", "audio")):
        paths = row.get(field) or []
        paths = [paths] if isinstance(paths, str) else paths
        if kind == "text" and paths:
            raise DataError(f"field {field!r} must be empty for data_type text")
        missing = field == "videos" and kind != "text" and not paths
        if missing or not all(isinstance(path, str) and path for path in paths):
            raise wrong(row, field)
        for path in paths:
            medium = Medium(of, absolute(path, field, video_dir))
            if field == "videos":
                medium = Medium(of, medium.path, frames, segment, bool(track))
            media.append(medium)
    return tuple(media)


def absolute(path: str, field: str, video_dir: str) -> str:
    """The path of a medium within the video directory. Only the text counts: a link in the folder
    may lead to another disk.

    >>> absolute("a/../v.mp4", "videos", "/media"), absolute("/media/v.mp4", "videos", "/media")
    ('/media/v.mp4', '/media/v.mp4')
    """
    inside = os.path.relpath(os.path.join(video_dir, path), video_dir)
    if inside.split(os.sep)[0] == os.pardir:
        raise DataError(
            f"field {field!r}: {path!r} is not within the video directory {video_dir or '.'}; "
            "give one that holds all media"
        )
    return str(Path(video_dir, inside).absolute())


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
    return answer


def parse_row(row: dict, video_dir: str, where: str = "row") -> Example:
    """One JSON object to an Example, or a DataError that names the row and the field."""
    try:
        for field, (types, _) in (FIELDS | OPTIONAL).items():
            absent = field in OPTIONAL and row.get(field) is None
            if not absent and (field not in row or type(row[field]) not in types):
                raise wrong(row, field)
        if row["data_type"] not in TYPES:
            raise wrong(row, "data_type")
        media = parse_media(row, video_dir)
        options = parse_options(row["problem"])
        response = row.get("response")
        if response is not None and not response.strip():
            raise wrong(row, "response")
        verbatim = response is not None and not row["answer"]  # it needs no gold answer
        answer = "" if verbatim else parse_answer(row, options)
    except DataError as error:
        raise DataError(f"{where} (problem_id {row.get('problem_id', '?')!r}): {error}") from None
    if response is None:
        thought = (row["reasoning"] or "").strip()
        if thought and "<think>" not in thought:
            thought = f"<think> {thought} </think>"
        response = f"{thought} <answer> {answer} </answer>" if thought else ""
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
        known = [name for name in table.column_names if name in FIELDS | OPTIONAL]
        for number, row in enumerate(table.select(known).to_pylist(), 1):
            yield f"{path}: row {number}", row
    except ImportError as error:
        raise DataError(f"{path}: {error}; pip install datasets") from None
    except Exception as error:  # file system, Arrow and hub each have their own
        reason = lines_of(error)[0][:200]
        hint = "download it again" if is_file else "download the data set and give FOLDER@SPLIT"
        raise DataError(f"{path}: cannot be read ({reason}); check its name, or {hint}") from None


def load_rows(path: str, video_dir: str | None = None, bad: list | None = None) -> list[Example]:
    """All rows of a data set. path: a .jsonl or .parquet file, or "ID@SPLIT" of the hub or
    "FOLDER@SPLIT". video_dir defaults to the folder of the rows; of the hub, to the current one.

    Raises DataError for a source that is missing, empty or not to be read, and for a malformed row:
    a line that is not a JSON object, a field that is missing or wrong, an id that occurs twice. If
    `bad` is a list, such rows are left out and appended to it as (where, message).
    """
    if not video_dir:
        folder = path.rpartition("@")[0] if not os.path.isfile(path) else os.path.dirname(path)
        video_dir = folder if os.path.isdir(folder) else ""
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


def lines_of(error: Exception) -> list[str]:
    """What an error says; its type where it says nothing."""
    return str(error).strip().splitlines() or [type(error).__name__]


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
        reason = lines_of(error)[-1]
        if not reason.startswith(medium.path):  # else it is named already
            reason = f"{medium.path}: does not decode as {kind}{where}: {reason[:200]}"
        raise DataError(reason, question=name) from None


class Frames:
    """The frames of a video or image, decoded when they are asked for: frames[a:z] is
    (z - a, H, W, 3) uint8. times (F,) float64: seconds from the first frame of the file. An image
    is one frame at time 0. The medium's own num_frames and segment win over `num_frames`.

    Raises DataError, naming the file and the question `name`, if it is missing, empty or does not
    decode."""

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
    """Opens media in this process. A run has kit/decode.Loader in its place, with the same methods:
    that one decodes in child processes, ahead of the model."""

    @contextmanager
    def open(self, medium: Medium, num_frames: int | Rate, name: str = ""):
        """Frames of a medium, for the time of the block."""
        yield Frames(medium, num_frames, name)

    def sound(self, medium: Medium, rate: int = 16000, name: str = "") -> np.ndarray:
        """load_audio."""
        return load_audio(medium, rate, name)

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
    first, stop = np.searchsorted(times, np.array(segment or (0, np.inf)) - 1e-6)
    indices = choose_frames(times, how, int(first), int(stop) - 1)  # times in [start, end)

    def read(at: np.ndarray) -> np.ndarray:
        return reader.get_batch(at).asnumpy()

    return Turned(path, turned // 90).read if turned % 180 else read, indices, times[indices]


class Turned:
    """A video that is shown turned by a quarter, as telephones write them: decord gives garbled
    frames of it. They are decoded one after the other, going on behind the last one read."""

    def __init__(self, path: str, quarters: int):
        self.path = path
        self.quarters = quarters
        self.at = None  # the last frame decoded

    def read(self, indices: np.ndarray) -> np.ndarray:
        import av

        if self.at is None or indices[0] <= self.at:
            self.container = av.open(self.path)
            self.frames = enumerate(self.container.decode(video=0))
            self.at = -1
        found = []
        while self.at < indices[-1]:
            self.at, frame = next(self.frames)
            if self.at in indices:
                found.append(np.rot90(frame.to_ndarray(format="rgb24"), self.quarters))
        return np.stack(found)


def read_header(path: str) -> tuple[int, float, int]:
    """What a video's header tells: the number of frames (0: it does not), seconds, and by how many
    degrees, counter-clockwise, frames are to be turned. DataError without video, or if it is
    huge: before anything of it is decoded."""
    import av

    with av.open(path) as container:
        if not container.streams.video:
            raise DataError("the file has no video stream")
        stream = container.streams.video[0]
        height, width = stream.codec_context.height, stream.codec_context.width
        if height * width > MAX_PIXELS:
            raise DataError(f"frames of {width} x {height} pixels: more than {MAX_PIXELS:,}")
        seconds = seconds_of(container, stream)
        frame = next(container.decode(stream), None)
        return stream.frames, seconds, frame.rotation if frame else 0


def start_of(stream) -> float:
    """When a stream begins, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def seconds_of(container, stream) -> float:
    """How long a stream is, by its file's header."""
    if stream.duration is None:  # Matroska: the time of its end
        return (container.duration or 0) / 1e6 - start_of(stream)
    return float(stream.duration * stream.time_base)


def load_audio(medium: Medium, rate: int = 16000, name: str = "") -> np.ndarray:
    """The sound of an audio file, or of a video's audio track: (S,) float32 in [-1, 1], `rate`
    samples a second, the mean of its channels. A segment's first sample is at its start.

    Second 0 is that of the video, if the file has one: a track that starts later is padded with
    silence, one that starts earlier is cut. Errors as load_media's; sound with gaps is one.
    """
    import av

    with (
        named_errors(medium, "audio", name),
        av.open(medium.path, metadata_errors="replace") as container,  # old tags are not UTF-8
    ):
        if not container.streams.audio:
            raise DataError("the file has no audio stream")
        stream = container.streams.audio[0]
        sound = decode_sound(medium.path, container, stream, rate)
        video = (container.streams.video or [stream])[0]
        late = round(rate * (start_of(stream) - start_of(video)))
        silence = np.zeros(max(late, 0), np.float32)
        sound = np.concatenate([silence, sound])[max(-late, 0) :]
        if medium.segment is not None:
            start, end = (int(np.ceil(x * rate - 1e-6)) for x in medium.segment)
            sound = sound[start:end]
        if len(sound) == 0:
            raise DataError(f"there is no sound (segment: {medium.segment})")
        return sound.clip(-1, 1)


def decode_sound(path: str, container, stream, rate: int) -> np.ndarray:
    """The samples of a stream, (S,) float32; an error if they end before the time that the file's
    header tells."""
    import av

    # Planar floats of all channels: libav's own way from floats to mono leaves [-1, 1].
    resampler = av.AudioResampler("fltp", rate=rate)

    def mono(frame) -> list[np.ndarray]:  # None: what the resampler holds back
        return [part.to_ndarray().mean(0) for part in resampler.resample(frame) if part]

    parts = [np.zeros(0, np.float32)]
    error = None
    try:
        for frame in container.decode(stream):
            parts += mono(frame)
    except av.InvalidDataError as found:  # at the end of an .mp3 this is a tag
        error = found
    sound = np.concatenate(parts + mono(None))
    seconds = len(sound) / rate
    stated = stated_seconds(path, container, stream)
    if error is not None and (not stated or seconds < stated - 0.1):
        raise error
    if seconds < 0.98 * stated - 0.1:
        raise DataError(f"the sound is cut off or has gaps: {seconds:.1f} s of {stated:.1f} s")
    return sound


def stated_seconds(path: str, container, stream) -> float:
    """How long a sound is by its file's header; 0 if it does not tell, as an Ogg file, a raw .aac
    and an .mp3 without its encoder's tag: cut off, they are shorter sounds."""
    kind = container.format.name
    if kind in ("aac", "mp3") and not stream.start_time:
        return 0.0  # libav's guess from the bit rate, 4 times too long if that varies
    if stream.duration is None and len(container.streams) > 1:
        return 0.0
    seconds = seconds_of(container, stream)
    if kind == "wav":  # libav goes by the length of the file
        with open(path, "rb") as file:
            form, size = file.read(4), int.from_bytes(file.read(4), "little")
        if form == b"RIFF" and size < 2**31 - 2**16:  # else written as a stream, without a length
            seconds *= size / os.path.getsize(path)
    return seconds
