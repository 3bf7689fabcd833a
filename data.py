"""Data: rows of LongVideo-Reason, and the frames and sound of their media.

The data set (section 3 of the paper) is read as published, LongVideo-Reason/longvideo-reason@test
from the hub or its downloaded folder@test, .parquet and .jsonl files. A row is one question:

    problem_id     unique name of the question, a text or a number
    problem        question, then its options one a line: "Which ...?\\nA. red\\nB. blue"
    data_type      "video" (or "image", "audio", "text")
    problem_type   category: temporal, goal, plot, spatial
    reasoning      the chain of thought that SFT learns from; without SFT "" or null will do
    videos         path of the media file, within a video directory; "" for text
    answer         "<answer>B</answer>"

and, as our additions, optional or null: response (a verbatim SFT target, not reasoning + answer);
of `videos`: a list of paths, all of the kind data_type, num_frames (instead of the run's setting),
segment ([start, end] in seconds) and audio_track (true: a video's sound is heard as well); and
`images` and `audios`, lists of paths that come along. Order in the prompt: videos, images, audios.
Other fields are not read.

                   load_rows                 load_media
    rows.jsonl,    ---------> list[Example] ----------> frames (F, H, W, 3) uint8, times (F,) s
    rows.parquet,  checks     with their     decord / PIL
    ID@SPLIT       all fields Media          load_audio
                                            ----------> sound (S,) float32, 16,000 samples a second
                                             PyAV

F frames, H x W pixels, S samples. Which frames: so many, by VILA's rule linspace(0, N - 1, F),
truncated; or a Rate, frames a second. Times are those of the file, also where its rate varies.
A run decodes in child processes, which may hang or crash: kit/decode.py.

What other systems do: a video that does not decode is replaced by another one under the same
question, or dropped. Here bad input is a DataError that names the row or the file, and the caller
decides (--on_bad_video); nothing is replaced. Nor does a row reach files outside the video
directory.

Check this file alone:  pytest tests/test_data.py
"""

import functools
import json
import os
import re
import string
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

FIELDS = ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer")
OPTIONAL = ("response", "num_frames", "segment", "audio_track", "images", "audios")
ALSO = {"problem_id": int, "reasoning": type(None), "videos": list}  # what may stand for a text
TYPES = ("video", "image", "audio", "text")


MAX_PIXELS = 2**26  # of a frame: two of 8K; a file that claims more is broken, or means harm


class DataError(ValueError):
    """Bad input: the message names the file or row and the field, and says what is wrong. question:
    the id of the one whose media failed, if it is one."""

    question = ""


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


def parse_options(problem: str) -> tuple[str, ...]:
    """The texts of the option lines of a problem, in the order A, B, C ...

    >>> parse_options("Which?\\nA. red\\nB. blue sky")
    ('red', 'blue sky')
    """
    lines = problem.split("\n")[1:]  # splitlines() would cut a text at characters like U+2028
    found = [re.match(r"\s*\(?([A-Z])[.):]\s+(.*\S)", line) for line in lines]
    found = [match.groups() for match in found if match]
    letters = "".join(letter for letter, _ in found)
    if letters != string.ascii_uppercase[: len(letters)]:
        raise DataError(f"option letters {list(letters)} are not A, B, C ...")
    return tuple(text for _, text in found)


def parse_media(row: dict, video_dir: str, name: str) -> tuple[Medium, ...]:
    """The media of a row, in the order of the prompt. name: what errors call the row."""
    fields = ("data_type", "num_frames", "segment", "audio_track")
    kind, frames, segment, track = map(row.get, fields)
    if frames is not None and (type(frames) is not int or frames < 1):
        raise DataError(f"{name}: field 'num_frames' is {frames!r}, not a number of frames")
    if segment is not None:
        numbers = isinstance(segment, list) and all(type(x) in (int, float) for x in segment)
        if not (numbers and len(segment) == 2 and 0 <= segment[0] < segment[1] < float("inf")):
            raise DataError(f"{name}: field 'segment' is {segment!r}, not [start, end] in seconds")
    if not isinstance(track, bool | None):
        raise DataError(f"{name}: field 'audio_track' is {track!r}, not true or false")
    for field in fields[1:]:
        if row.get(field) and kind != "video" and (field, kind) != ("segment", "audio"):
            raise DataError(f"{name}: field {field!r} does not go with data_type {kind}")
    how = (frames, tuple(segment) if segment else None, bool(track))
    media = []
    for field, of in (("videos", kind), ("images", "image"), ("audios", "audio")):
        paths = row.get(field)
        paths = None if paths == [] and field != "videos" else paths
        if kind == "text" and paths != ("" if field == "videos" else None):
            raise DataError(f"{name}: field {field!r} must be empty for data_type text")
        if kind == "text" or paths is None:
            continue
        if field == "videos" and isinstance(paths, str):
            paths = [paths]
        if not (isinstance(paths, list) and paths and all(isinstance(p, str) and p for p in paths)):
            raise DataError(f"{name}: field {field!r} is {row[field]!r}, not paths of media files")
        for path in paths:
            # Only the text of the path counts: a link within the folder may lead to another disk.
            inside = os.path.relpath(os.path.join(video_dir, path), video_dir)
            if inside.split(os.sep)[0] == os.pardir:
                raise DataError(
                    f"{name}: field {field!r}: {path!r} is not within the video directory "
                    f"{video_dir or '.'}; give one that holds all media"
                )
            path = str(Path(video_dir, inside).absolute())
            media.append(Medium(of, path, *(how if field == "videos" else ())))
    return tuple(media)


def parse_row(row: dict, video_dir: str, where: str = "row") -> Example:
    """One JSON object to an Example, or a DataError that names the row and the field."""
    name = f"{where} (problem_id {row.get('problem_id', '?')!r})"
    for field in FIELDS:
        if field not in row or type(row[field]) not in (str, ALSO.get(field)):
            raise DataError(f"{name}: field {field!r} is missing or of a wrong type")
    if row["data_type"] not in TYPES:
        raise DataError(f"{name}: data_type {row['data_type']!r} is not one of {', '.join(TYPES)}")
    media, response = parse_media(row, video_dir, name), row.get("response")
    if response is not None and not (isinstance(response, str) and response.strip()):
        raise DataError(f"{name}: field 'response' is {response!r}, not a text")
    try:
        options = parse_options(row["problem"])
    except DataError as error:
        raise DataError(f"{name}: field 'problem': {error}") from None
    answer = row["answer"]
    if answer or response is None:  # rows with a verbatim response need no gold answer
        span = re.fullmatch(r"\s*<answer>((?:(?!</?answer>).)+)</answer>\s*", answer, re.DOTALL)
        if span is None or not span.group(1).strip():
            raise DataError(f"{name}: field 'answer' is {answer!r}, not <answer>...</answer>")
        answer = span.group(1).strip()
        if options and answer not in list(string.ascii_uppercase[: len(options)]):
            raise DataError(f"{name}: answer {answer!r} is no letter of its {len(options)} options")
    if response is None:
        think = (row["reasoning"] or "").strip()
        if think and "<think>" not in think:
            think = f"<think> {think} </think>"
        response = f"{think} <answer> {answer} </answer>" if think else ""
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


def read_rows(path: str):
    """Yields (where, row) for each row of a source that load_rows takes. where: what errors call
    the row. row: a dict, or for a .jsonl file still its line, in bytes."""
    source, _, split = path.rpartition("@")
    is_file = os.path.isfile(path)
    if not is_file and (not source or path.endswith((".jsonl", ".parquet"))):
        raise DataError(f"{path}: no such file; give a .jsonl or .parquet file, or DATA_SET@SPLIT")
    try:
        if is_file and not path.endswith(".parquet"):
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line
            return
        if is_file:
            from pyarrow.parquet import ParquetFile

            table = ParquetFile(path).read()
        else:
            from datasets import load_dataset

            table = load_dataset(source, split=split).with_format("arrow")[:]
        known = [name for name in table.column_names if name in FIELDS + OPTIONAL]
        for number, row in enumerate(table.select(known).to_pylist(), 1):
            yield f"{path}: row {number}", row
    except ImportError as error:
        raise DataError(f"{path}: {error}; pip install datasets") from None
    except Exception as error:  # file system, Arrow and hub each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = "download it again" if is_file else "download the data set and give FOLDER@SPLIT"
        raise DataError(f"{path}: cannot be read ({reason}); check its name, or {hint}") from None


def parse_line(line: bytes, where: str) -> dict:
    """A line of a .jsonl file as a JSON object, or a DataError."""
    try:
        row = json.loads(line.decode())
        json.dumps(row, ensure_ascii=False).encode()  # "\\ud800" is half a character: no text
    except UnicodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: huge numbers
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object")
    return row


def load_rows(path: str, video_dir: str | None = None, bad: list | None = None) -> list[Example]:
    """All rows of a data set. path: a .jsonl or .parquet file, or "ID@SPLIT" of the hub or
    "FOLDER@SPLIT". video_dir defaults to the folder of the rows; of the hub, to the current one.

    Raises DataError for a source that is missing, empty or not to be read, and for a malformed row:
    a line that is not a JSON object, a field that is missing or wrong, an id that occurs twice. If
    `bad` is a list, such rows are left out and appended to it as (where, message).
    """
    source = path.rpartition("@")[0]
    folder = os.path.dirname(path) if os.path.isfile(path) else source * os.path.isdir(source)
    examples, faults, seen = [], [], set()
    for where, row in read_rows(path):
        try:
            row = parse_line(row, where) if isinstance(row, bytes) else row
            example = parse_row(row, video_dir or folder, where)
            if example.id in seen:
                raise DataError(f"{where}: problem_id {example.id!r} occurs twice")
        except DataError as error:
            if bad is None:
                raise
            faults.append((where, str(error)))
            continue
        seen.add(example.id)
        examples.append(example)
    if not examples:
        why = f"no row is good, the first: {faults[0][1]}" if faults else "it has no rows"
        raise DataError(f"{path}: {why}")
    if faults:
        bad += faults
    return examples


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
    """Indices of the frames to take between first and last of a video with these times: a number of
    them by VILA's rule, a Rate by time, as many as it gives, from the first to the last.

    >>> choose_frames(np.arange(100) / 10, Rate(0.5), 0, 99), choose_frames(np.arange(9), 3, 2, 6)
    (array([ 0, 24, 49, 74, 99]), array([2, 4, 6]))
    """
    if not isinstance(how, Rate):
        return frame_indices(len(times), how, first, last)
    most = len(frame_indices(len(times), how.most, first, last))
    length = times[last] - times[first]
    seconds = length * (last - first + 1) / max(last - first, 1)  # the last frame's own included
    n = min(max(round(seconds * how.fps), 1), most)
    wanted = times[first] + np.linspace(0, length, n)
    return np.unique(np.searchsorted(times, wanted + 1e-6, "right") - 1)  # shown at that time


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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        if not reason.startswith(medium.path):  # else a worker has said it all
            reason = f"{medium.path}: does not decode as {kind}{where}: {reason[:200]}"
        failed = DataError(reason)
        failed.question = name
        raise failed from None


def load_media(medium: Medium, num_frames: int | Rate, name: str = ""):
    """The frames of a video or image: (F, H, W, 3) uint8 and their times in seconds (F,) float64.

    An image is one frame at time 0. The medium's own num_frames and segment win over `num_frames`.
    Raises DataError, naming the file and the question `name`, if it is missing, empty or does not
    decode.
    """
    frames = Frames(medium, num_frames, name)
    return frames[:], frames.times


class Frames:
    """The frames of a video or image, decoded when they are asked for: frames[a:z] is
    (z - a, H, W, 3) uint8. So ranks that encode a video together decode only their own share.
    times (F,) seconds from the first frame of the file. worker: the process that decodes; default:
    this one. Errors as load_media's."""

    def __init__(self, medium: Medium, num_frames: int | Rate, name: str = "", worker=None):
        self.medium, self.name, self.read, self.times = medium, name, None, np.zeros(1)
        self.worker, self.asked = worker, None
        if worker is not None:
            reply = worker.ask("open", medium, num_frames, name)
            self.times, self.shape = self._result(reply)
        elif medium.kind == "video":
            with named_errors(medium, "video", name):
                how = medium.num_frames or num_frames
                self.read, self.indices, self.times = open_video(medium.path, how, medium.segment)

    def __len__(self) -> int:
        return len(self.times)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, H, W, 3), from the first frame."""
        return len(self), *self[:1].shape[1:]

    def ask(self, part: slice) -> None:
        """frames[part] is what will be wanted next: a worker begins with it."""
        if self.worker is not None:
            self.asked, self.reply = part, self.worker.ask("read", part)

    def pieces(self, parts: list[slice]):
        """frames[part] of one part after the other; a worker decodes the next one meanwhile."""
        for part, then in zip(parts, [*parts[1:], None]):
            pixels = self[part]
            if then:
                self.ask(then)
            yield pixels

    def __getitem__(self, part: slice) -> np.ndarray:
        if self.worker is not None:
            if self.asked != part:  # something else, or nothing, was asked for
                self.ask(part)
            self.asked = None
            return self._result(self.reply)
        with named_errors(self.medium, self.medium.kind, self.name):
            if self.read is not None:
                return self.read(self.indices[part])
            from PIL import Image

            with Image.open(self.medium.path) as image:
                return np.array(image.convert("RGB"))[None][part]

    def _result(self, reply):
        with named_errors(self.medium, self.medium.kind, self.name):
            return reply.result()


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
    """(function from indices to frames, the indices to take, their times in seconds); segment =
    (start, end) seconds."""
    import decord

    declared, seconds, turned = read_header(path)
    # One thread: decord's own pool fights with the ranks, and threads of it have hung in the field.
    reader = decord.VideoReader(path, num_threads=1)
    total, fps = len(reader), float(reader.get_avg_fps())
    stamps = reader.get_frame_timestamp(np.arange(total)).astype(float)  # (N, 2) start, end
    # A download that was cut off decodes as a shorter video, and nothing says so. Times are the
    # weaker witness (sound may be longer): for files that count no frames.
    if total < 0.98 * declared or (not declared and stamps[-1, 1] < 0.9 * seconds - 1):
        found = f"{total} frames of {declared}, {stamps[-1, 1]:.1f} s of {seconds:.1f} s"
        raise DataError(f"the file is cut off, or was trimmed without encoding: {found}")
    times = np.arange(total) / fps  # exact, where the rate is constant ...
    if np.abs(stamps[:, 0] - stamps[0, 0] - times).max() > 0.5 / fps:  # ... and it is not
        times = stamps[:, 0] - stamps[0, 0]
    first, last = 0, total - 1
    if segment is not None:  # frames whose time lies in [start, end)
        first, last = np.searchsorted(times, np.array(segment) - 1e-6) - (0, 1)
    indices = choose_frames(times, how, int(first), int(last))
    read = lambda at: reader.get_batch(at).asnumpy()  # noqa: E731
    return Turned(path, turned // 90).read if turned % 180 else read, indices, times[indices]


class Turned:
    """A video that is shown turned by a quarter, as telephones write them: decord gives garbled
    frames of it. They are decoded one after the other, going on behind the last one read."""

    def __init__(self, path: str, quarters: int):
        self.path, self.quarters, self.at = path, quarters, None

    def read(self, indices: np.ndarray) -> np.ndarray:
        import av

        if self.at is None or indices[0] <= self.at:
            self.container = av.open(self.path)
            self.frames, self.at = enumerate(self.container.decode(video=0)), -1
        found = {}
        while self.at < indices[-1]:
            self.at, frame = next(self.frames)
            if self.at in indices:
                found[self.at] = np.rot90(frame.to_ndarray(format="rgb24"), self.quarters)
        return np.stack([found[i] for i in indices])


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
        if stream.duration is not None:
            length = float(stream.duration * stream.time_base)
        else:  # Matroska: the time of its end
            length = (container.duration or 0) / av.time_base - start_of(stream)
        frame = next(container.decode(stream), None)
        return stream.frames, length, frame.rotation if frame else 0


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
        # Planar floats of all channels: libav's own way from floats to mono leaves [-1, 1].
        resampler, parts, error = av.AudioResampler("fltp", rate=rate), [], None
        mono = lambda f: [x.to_ndarray().mean(0) for x in resampler.resample(f) if x]  # noqa: E731
        try:
            for frame in container.decode(stream):
                parts += mono(frame)
        except av.InvalidDataError as wrong:  # at the end of an .mp3 this is a tag
            error = wrong
        parts += mono(None)  # what the resampler holds back
        check_sound(medium.path, container, stream, sum(map(len, parts)) / rate, error)
        zero = start_of((container.streams.video or [stream])[0])
        late = round(rate * (start_of(stream) - zero))
        sound = np.concatenate([np.zeros(max(late, 0), np.float32), *parts])[max(-late, 0) :]
        if medium.segment is not None:
            start, end = (int(np.ceil(x * rate - 1e-6)) for x in medium.segment)
            sound = sound[start:end]
        if len(sound) == 0:
            raise DataError(f"there is no sound (segment: {medium.segment})")
        return sound.clip(-1, 1)


def start_of(stream) -> float:
    """When a stream begins, in seconds."""
    return float((stream.start_time or 0) * stream.time_base)


def check_sound(path: str, container, stream, seconds: float, error: Exception | None) -> None:
    """DataError if fewer seconds were decoded, until an error or the end, than the file's header
    tells. An Ogg file, a raw .aac and an .mp3 without its encoder's tag tell nothing: cut off, they
    are shorter sounds."""
    stated = float((stream.duration or 0) * stream.time_base)
    if container.format.name in ("aac", "mp3") and not stream.start_time:
        stated = 0.0  # libav's guess from the bit rate, 4 times too long if that varies
    elif stream.duration is None and len(container.streams) == 1:  # Matroska
        stated = (container.duration or 0) / 1e6 - start_of(stream)
    elif container.format.name == "wav":  # libav goes by the length of the file
        with open(path, "rb") as file:
            form, size = file.read(4), int.from_bytes(file.read(4), "little")
        if form == b"RIFF" and size < 2**31 - 2**16:  # else written as a stream, without a length
            stated *= size / os.path.getsize(path)
    if error is not None and (not stated or seconds < stated - 0.1):
        raise error
    if seconds < 0.98 * stated - 0.1:
        raise DataError(f"the sound is cut off or has gaps: {seconds:.1f} s of {stated:.1f} s")
