"""Properties of data.py: frames, sound, rows, every kind of bad input.

The test video shows the number of each frame as 8 black or white tiles, so that a frame taken in
another one's place is seen. Broken videos are decoded in a child process with a time limit: a
decoder that hangs or crashes fails its test and not the run.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow
import pytest
from conftest import sine, write_video_with_audio, write_wav
from PIL import Image
from pyarrow import parquet

import data
from data import (
    DataError,
    Example,
    Medium,
    frame_indices,
    load_media,
    load_rows,
)
from kit.sound import load_audio
from kit.toy import write_mp4


def numbered_frames(n):
    """(n, 32, 32, 3): frame i shows the bits of i as 2 x 4 tiles of 16 x 8 pixels."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    tiles = (60 + 140 * bits).astype(np.uint8).reshape(n, 2, 4)
    return np.repeat(tiles.repeat(16, axis=1).repeat(8, axis=2)[..., None], 3, axis=3)


def numbers_of(frames):
    """The inverse: (n,) the number that each frame shows."""
    tiles = frames.astype(float).reshape(len(frames), 2, 16, 4, 8, 3).mean((2, 4, 5))
    return ((tiles.reshape(-1, 8) > 130) << np.arange(8)).sum(1)


def psnr(a, b):
    """(F,) in dB, one number a frame."""
    error = ((a.astype(float) - b.astype(float)) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


def medium(path, kind="video", **how):
    return Medium(kind, str(path), **how)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A good video of 70 numbered frames, 4 a second."""
    path = tmp_path_factory.mktemp("clip") / "v.mp4"
    write_mp4(str(path), numbered_frames(70))
    return path


# --------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((100, 4), [0, 33, 66, 99]),
        ((10, 4), [0, 3, 6, 9]),
        ((11, 4), [0, 3, 6, 10]),  # truncated, not rounded: 6.67 -> 6
        ((4, 4), [0, 1, 2, 3]),
        ((3, 8), [0, 1, 2]),  # n > N: every frame, each once
        ((1, 8), [0]),
        ((100, 1), [0]),
        ((100, 2), [0, 99]),
        ((100, 3, 10, 20), [10, 15, 20]),
        ((100, 50, 10, 12), [10, 11, 12]),
        ((100, 1, 10, 20), [10]),
        ((100, 8, 5, 5), [5]),
        ((100, 2, 90, 500), [90, 99]),  # a range may end behind the video
    ],
)
def test_frame_indices_are_spread_from_the_first_to_the_last(arguments, expected):
    assert frame_indices(*arguments).tolist() == expected


def test_frame_indices_never_repeat_and_stay_in_range():
    for total in (1, 2, 7, 64, 255):
        for n in range(1, 70):
            indices = frame_indices(total, n)
            assert len(indices) == min(n, total)
            assert indices[0] == 0 and indices[-1] == (total - 1 if len(indices) > 1 else 0)
            assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize(
    "arguments", ((0, 4), (10, 0), (10, -1), (10, 4, -1, 5), (10, 4, 6, 5), (10, 4, 10, 20))
)
def test_impossible_frame_indices_are_errors(arguments):
    with pytest.raises(DataError, match="cannot take"):
        frame_indices(*arguments)


# ---------------------------------------------------------------------------------------- media


@pytest.mark.parametrize("n", (1, 2, 7, 64, 70, 100))
def test_a_written_video_gives_back_its_frames_and_times(clip, n):
    frames, times = load_media(medium(clip), n)
    indices = frame_indices(70, n)
    assert frames.shape == (min(n, 70), 32, 32, 3) and frames.dtype == np.uint8
    assert numbers_of(frames).tolist() == indices.tolist()
    assert psnr(frames, numbered_frames(70)[indices]).min() > 30
    assert times.dtype == np.float64 and times.tolist() == (indices / 4).tolist()


def test_only_the_frames_asked_for_are_decoded(clip):
    """Ranks that share a video each decode a slice; together they have what one would have."""
    frames, asked = data.Frames(medium(clip), 9), []
    read = frames.read
    frames.read = lambda at: asked.append(at.tolist()) or read(at)
    parts = [frames[0:4], frames[4:8], frames[8:12]]
    assert asked == [frame_indices(70, 9)[i : i + 4].tolist() for i in (0, 4, 8)]
    assert np.array_equal(np.concatenate(parts), load_media(medium(clip), 9)[0])


def test_times_follow_the_frame_rate(tmp_path):
    write_mp4(str(tmp_path / "v.mp4"), numbered_frames(30), fps=10)
    frames, times = load_media(medium(tmp_path / "v.mp4", segment=(0.5, 2.5)), 3)
    assert numbers_of(frames).tolist() == [5, 14, 24]
    assert times == pytest.approx([0.5, 1.4, 2.4], abs=1e-9)


def test_colours_and_sides_are_not_swapped(tmp_path):
    frames = np.zeros((8, 32, 64, 3), np.uint8)  # not square: height 32, width 64
    frames[:, :16, :, 0] = 220  # red above; below, blue on the right
    frames[:, 16:, 32:, 2] = 220
    write_mp4(str(tmp_path / "v.mp4"), frames)
    assert psnr(load_media(medium(tmp_path / "v.mp4"), 8)[0], frames).min() > 30


def test_writing_leaves_only_the_finished_file(clip):
    assert [p.name for p in clip.parent.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(
    "segment, expected",
    [  # 4 frames a second: frame i is at i / 4 seconds, and the end is exclusive
        ((0, 17.5), [0, 23, 46, 69]),
        ((2.0, 5.0), [8, 11, 15, 19]),
        ((2.0, 3.0), [8, 9, 10, 11]),
        ((2.0, 2.5), [8, 9]),
        ((2.01, 2.51), [9, 10]),
        ((17.0, 99.0), [68, 69]),
        ((0, 0.1), [0]),
    ],
)
def test_a_segment_gives_the_frames_within_it(clip, segment, expected):
    frames, times = load_media(medium(clip, segment=segment), 4)
    assert numbers_of(frames).tolist() == expected
    assert times.tolist() == [i / 4 for i in expected]


@pytest.mark.parametrize("segment", ((17.5, 20), (99, 100), (2.05, 2.2)))
def test_a_segment_without_frames_is_an_error(clip, segment):
    with pytest.raises(DataError, match=re.escape(str(clip))):
        load_media(medium(clip, segment=segment), 4)


def test_num_frames_of_a_row_wins(clip):
    assert numbers_of(load_media(medium(clip, num_frames=3), 64)[0]).tolist() == [0, 34, 69]


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "L", "P"))
def test_an_image_is_one_frame_at_time_zero(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "i.png")
    frames, times = load_media(medium(tmp_path / "i.png", "image"), 64)
    assert frames.dtype == np.uint8 and times.tolist() == [0.0]
    assert np.array_equal(frames, np.array(image.convert("RGB"))[None])


# ---------------------------------------------------------------------------------- broken media


def load_in_a_child(path, kind="video", seconds=30):
    """(outcome, text): "DataError" and its message, or "loaded" and the number of frames. A hang,
    a crash of the process or another exception fails the test and says which."""
    code = (
        "import sys, data\n"
        "m = data.Medium(sys.argv[2], sys.argv[1])\n"
        "try:\n"
        "    print('loaded', len(data.load_media(m, 8, 'q7')[0]), sep='\\t')\n"
        "except data.DataError as error:\n"
        "    print('DataError', str(error), sep='\\t')\n"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, str(path), kind],
            cwd=Path(data.__file__).parent,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"the decoder hangs on {path}: no end after {seconds} s")
    if child.returncode:
        pytest.fail(f"exit status {child.returncode} on {path}: {child.stderr}")
    outcome, text = child.stdout.removesuffix("\n").split("\t")
    return outcome, text


def assert_refused(path, kind="video"):
    outcome, text = load_in_a_child(path, kind)
    assert outcome == "DataError", f"{outcome}: {text}"
    assert text.startswith(f"{path}: ") and "q7" in text and "\n" not in text, text


def packet_starts(path):
    """Byte positions of the packets of a video, in order."""
    with av.open(str(path)) as container:
        return sorted(p.pos for p in container.demux(video=0) if p.pos)


@pytest.fixture(scope="module")
def faststart(clip, tmp_path_factory):
    """The same video with its index (moov) in front of its packets, as in files for the web."""
    path = tmp_path_factory.mktemp("fast") / "v.mp4"
    with (
        av.open(str(clip)) as source,
        av.open(str(path), "w", options={"movflags": "+faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = path.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    assert numbers_of(load_media(medium(path), 70)[0]).tolist() == list(range(70))
    return path


@pytest.mark.parametrize("share", (0.1, 0.5, 0.9))  # the last 5 % are a tag that may go
def test_a_truncated_video_with_its_index_at_the_end_is_refused(clip, tmp_path, share):
    content = clip.read_bytes()
    assert content.find(b"moov") > content.find(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(content[: int(share * len(content))])
    assert_refused(tmp_path / "cut.mp4")


@pytest.mark.parametrize("share", (0.1, 0.5, 0.99))
def test_a_faststart_video_cut_within_a_packet_is_refused(faststart, tmp_path, share):
    content, starts = faststart.read_bytes(), packet_starts(faststart)
    cut = int(share * len(content))
    if share > 0.1:  # keep clear of the packets' ends: see the next test
        cut = min(start for start in starts[1:] + [len(content)] if start >= cut) - 3
    (tmp_path / "cut.mp4").write_bytes(content[:cut])
    assert_refused(tmp_path / "cut.mp4")


@pytest.mark.parametrize("packets", (35, 67))  # 2 % are allowed: some files declare too many
def test_a_faststart_video_cut_between_packets_is_refused(faststart, tmp_path, packets):
    starts = packet_starts(faststart)
    (tmp_path / "cut.mp4").write_bytes(faststart.read_bytes()[: starts[packets]])
    assert_refused(tmp_path / "cut.mp4")


def test_a_truncated_matroska_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in numbered_frames(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    assert_refused(tmp_path / "cut.mkv")


def test_a_video_with_garbage_in_the_middle_is_refused(clip, tmp_path):
    content = bytearray(clip.read_bytes())
    start, stop = packet_starts(clip)[20], packet_starts(clip)[50]
    content[start:stop] = bytes(stop - start)
    (tmp_path / "v.mp4").write_bytes(content)
    assert_refused(tmp_path / "v.mp4")


@pytest.mark.parametrize("kind", ("video", "image"))
def test_text_under_a_media_name_is_refused(tmp_path, kind):
    (tmp_path / "v.mp4").write_text("<html>404 not found</html>\n" * 50)
    assert_refused(tmp_path / "v.mp4", kind)


def test_a_truncated_image_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "i.png")
    content = (tmp_path / "i.png").read_bytes()
    (tmp_path / "i.png").write_bytes(content[: len(content) // 2])
    assert_refused(tmp_path / "i.png", "image")


@pytest.mark.parametrize("kind", ("video", "image", "audio"))
def test_a_missing_or_empty_file_or_a_directory_is_refused_by_name(tmp_path, kind):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "directory.mp4").mkdir()
    for name, words in (
        ("no", "no such file"),
        ("empty", "is empty"),
        ("directory", "no such file"),
    ):
        m = medium(tmp_path / f"{name}.mp4", kind)
        for question, where in (("", ""), ("q7", " (question q7)")):
            with pytest.raises(DataError, match=words) as error:
                load_audio(m, name=question) if kind == "audio" else load_media(m, 8, question)
            assert str(error.value).startswith(f"{m.path}: ") and "\n" not in str(error.value)
            assert f"{words}{where}; " in str(error.value)


# ---------------------------------------------------------------------------------------- sound


def tone(sound, rate=16000):
    """(Hz, amplitude) of the loudest tone in a sound."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 8 * len(sound)))
    return spectrum.argmax() * rate / 8 / len(sound), 4 * spectrum.max() / len(sound)


def write_audio(path, codec, seconds=2.0, rate=16000, hz=440, gain=1.0, **container):
    """A mono tone through a codec of PyAV; its container is told by the name's ending."""
    with av.open(str(path), "w", options=container) as target:
        stream = target.add_stream(codec, rate=rate, layout="mono")
        sound = gain * sine(seconds, rate, hz)[None]
        to_codec = av.AudioResampler(stream.codec_context.format, "mono", rate)
        for i in range(0, sound.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(sound[:, i : i + 1024], "fltp", "mono")
            part.rate, part.pts = rate, i
            for frame in to_codec.resample(part):
                target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def refused(path, *words, kind="audio", **how):
    with pytest.raises(DataError) as error:
        load_audio(medium(path, kind, **how), name="q7")
    message = str(error.value)
    assert message.startswith(f"{path}: does not decode as audio (question q7): ")
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("channels", (1, 2, 3))
@pytest.mark.parametrize("rate", (8000, 16000, 44100, 48000))
def test_a_tone_keeps_its_pitch_length_and_loudness(tmp_path, rate, channels):
    write_wav(tmp_path / "a.wav", 2.5, rate, channels=channels)
    sound = load_audio(medium(tmp_path / "a.wav", "audio"))
    assert sound.dtype == np.float32 and sound.ndim == 1 and abs(len(sound) - 40000) <= 1
    assert tone(sound) == (pytest.approx(440, rel=0.01), pytest.approx(0.5, rel=0.05))
    middle = slice(1000, 39000)  # in phase too: nothing is shifted
    assert np.abs(sound[middle] - sine(2.5, 16000, 440)[middle]).max() < 0.005
    assert len(load_audio(medium(tmp_path / "a.wav", "audio"), 24000)) == pytest.approx(60000, 1e-4)


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", 1, channels=2)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    samples = np.frombuffer(content, "<i2", offset=44)
    samples[1::2] = 0  # silence on the right
    (tmp_path / "a.wav").write_bytes(content)
    assert tone(load_audio(medium(tmp_path / "a.wav", "audio")))[1] == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp3", "libmp3lame"),
        ("a.flac", "flac"),
        ("a.m4a", "aac"),
        ("a.opus", "libopus"),
        ("a.mka", "flac"),
        ("24.wav", "pcm_s24le"),
        ("float.wav", "pcm_f32le"),
        ("u8.wav", "pcm_u8"),
    ],
)
def test_any_codec_is_heard_the_same(tmp_path, name, codec):
    rate = 48000 if codec == "libopus" else 44100
    sound = load_audio(medium(write_audio(tmp_path / name, codec, rate=rate), "audio"))
    assert len(sound) == pytest.approx(32000, rel=0.015)
    assert tone(sound) == (pytest.approx(440, rel=0.01), pytest.approx(0.5, rel=0.05))


def test_sound_beyond_full_scale_is_clipped(tmp_path):
    path = write_audio(tmp_path / "a.wav", "pcm_f32le", gain=4)
    sound = load_audio(medium(path, "audio"))
    assert sound.min() == -1 and sound.max() == 1


@pytest.mark.parametrize("start", (0.0, 0.75))
@pytest.mark.parametrize("ending", ("mp4", "mkv"))
def test_the_track_of_a_video_keeps_the_video_s_time(tmp_path, start, ending):
    path = tmp_path / f"v.{ending}"
    write_video_with_audio(path, numbered_frames(16), 4, 3, 880, start)
    sound = load_audio(medium(path, track=True))
    assert abs(len(sound) / 16000 - start - 3) < 0.07  # AAC ends with a whole block
    first = np.flatnonzero(np.abs(sound) > 0.1)[0] / 16000
    assert first == pytest.approx(start, abs=0.02)
    assert tone(sound[-32000:-8000]) == (pytest.approx(880, rel=0.01), pytest.approx(0.5, rel=0.05))
    assert numbers_of(load_media(medium(path), 64)[0]).tolist() == list(range(16))
    part = load_audio(medium(path, segment=(0.5, 1.5)))
    assert np.array_equal(part, sound[8000:24000])


def test_a_track_that_begins_before_its_video_is_cut(tmp_path):
    path = tmp_path / "v.mp4"
    write_video_with_audio(path, numbered_frames(8), 4, 2, 440)
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as target:
        streams = [target.add_stream_from_template(s) for s in source.streams]
        for packet in source.demux():
            if packet.dts is not None:
                late = int(0.5 / packet.time_base) if packet.stream.type == "video" else 0
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    sound, whole = (load_audio(medium(p)) for p in (tmp_path / "late.mp4", path))
    assert len(whole) - len(sound) == pytest.approx(8000, abs=1)
    assert np.array_equal(sound, whole[len(whole) - len(sound) :])


@pytest.mark.parametrize(
    "segment, samples",
    [
        ((0, 2), (0, 32000)),
        ((0.5, 1.25), (8000, 20000)),
        ((0.50001, 1.25001), (8001, 20001)),
        ((1.5, 99), (24000, 32000)),
    ],
)
def test_a_segment_gives_the_samples_within_it(tmp_path, segment, samples):
    write_wav(tmp_path / "a.wav", 2)
    whole = load_audio(medium(tmp_path / "a.wav", "audio"))
    part = load_audio(medium(tmp_path / "a.wav", "audio", segment=segment))
    assert np.array_equal(part, whole[slice(*samples)])


def test_a_segment_or_file_without_sound_is_refused(clip, tmp_path):
    write_wav(tmp_path / "a.wav", 2)
    refused(tmp_path / "a.wav", "no sound", "(2.0, 9.0)", segment=(2.0, 9.0))
    write_wav(tmp_path / "empty.wav", 0)
    refused(tmp_path / "empty.wav")
    refused(clip, "no audio stream", kind="video", track=True)
    (tmp_path / "a.mp3").write_text("<html>404 not found</html>\n" * 50)
    refused(tmp_path / "a.mp3", "Invalid data")


@pytest.mark.parametrize("share", (0.3, 0.6, 0.9))
@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.wav", "pcm_s16le", {}),
        ("a.flac", "flac", {}),
        ("a.mp3", "libmp3lame", {}),
        ("a.m4a", "aac", {}),
        ("fast.m4a", "aac", {"movflags": "+faststart"}),
        ("a.mka", "flac", {}),
    ],
)
def test_a_truncated_sound_is_refused(tmp_path, name, codec, options, share):
    path = write_audio(tmp_path / name, codec, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@pytest.mark.parametrize(
    "name, codec",
    [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.aac", "aac")]
    + [("a.opus", "libopus")],
)
def test_a_sound_with_garbage_in_the_middle_is_refused(tmp_path, name, codec):
    path = write_audio(tmp_path / name, codec, rate=48000)
    content = bytearray(path.read_bytes())
    start, end = int(0.4 * len(content)), int(0.6 * len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    refused(path)


def test_a_length_that_the_file_does_not_tell_is_not_held_against_it(tmp_path):
    """libav guesses the length of raw .aac from the bit rate of its first, quiet seconds; a .wav
    written as a stream has none in its header."""
    quiet, loud = (
        write_audio(tmp_path / f"{gain}.aac", "aac", 4, gain=gain, hz=hz).read_bytes()
        for gain, hz in ((1e-4, 440), (1, 3001))
    )
    (tmp_path / "a.aac").write_bytes(quiet + loud)
    assert len(load_audio(medium(tmp_path / "a.aac", "audio"))) / 16000 == pytest.approx(8, abs=0.3)
    write_wav(tmp_path / "a.wav", 2)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_audio(medium(tmp_path / "a.wav", "audio"))) == 32000


def test_a_tag_at_the_end_of_an_mp3_does_no_harm(tmp_path):
    path = write_audio(tmp_path / "a.mp3", "libmp3lame", rate=44100)
    whole = load_audio(medium(path, "audio"))
    path.write_bytes(path.read_bytes() + b"LYRICSBEGIN" + b"la la la " * 99 + b"LYRICS200")
    sound = load_audio(medium(path, "audio"))  # its last frame may go
    assert len(whole) - 1600 < len(sound) and np.array_equal(sound, whole[: len(sound)])


# ----------------------------------------------------------------------------------------- rows

ROW = {
    "problem_id": "q7",
    "problem": "Which?\nA. red\n(B) dark blue \nC: 7",
    "data_type": "video",
    "problem_type": "plot",
    "reasoning": "seen blue",
    "videos": "videos/v.mp4",
    "answer": "<answer>B</answer>",
}


def write_rows(folder, *rows):
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def error_of(folder, *rows):
    """The one-line message of the DataError that loading the rows must raise."""
    path = write_rows(folder, *rows)
    with pytest.raises(DataError) as error:
        load_rows(path)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    return message


def test_a_row_becomes_an_example(tmp_path):
    (one,) = load_rows(write_rows(tmp_path, ROW))
    assert one == Example(
        id="q7",
        problem=ROW["problem"],
        options=("red", "dark blue", "7"),
        answer="B",
        category="plot",
        media=(Medium("video", str(tmp_path / "videos" / "v.mp4")),),
        data_type="video",
        response="<think> seen blue </think> <answer> B </answer>",
    )


def test_optional_fields_are_kept(tmp_path):
    more = {"num_frames": 16, "segment": [1, 2.5], "response": "red blue", "answer": ""}
    (one,) = load_rows(write_rows(tmp_path, ROW | more))
    assert one.response == "red blue"
    assert one.media == (Medium("video", str(tmp_path / "videos" / "v.mp4"), 16, (1, 2.5)),)


VIDEO, IMAGE, AUDIO = "/media/v.mp4", "/media/i.png", "/media/a.wav"


@pytest.mark.parametrize(
    "change, media",
    [
        ({"videos": "v.mp4"}, [Medium("video", VIDEO)]),
        ({"videos": ["v.mp4"]}, [Medium("video", VIDEO)]),
        ({"videos": ["v.mp4", "w.mp4"]}, [Medium("video", VIDEO), Medium("video", "/media/w.mp4")]),
        (
            {"videos": ["v.mp4", "v.mp4"], "num_frames": 4, "segment": [0, 9], "audio_track": True},
            [Medium("video", VIDEO, 4, (0, 9), True)] * 2,
        ),
        ({"videos": "i.png", "data_type": "image"}, [Medium("image", IMAGE)]),
        ({"videos": ["i.png"] * 3, "data_type": "image"}, [Medium("image", IMAGE)] * 3),
        ({"videos": "a.wav", "data_type": "audio"}, [Medium("audio", AUDIO)]),
        (
            {"videos": ["a.wav"] * 2, "data_type": "audio", "segment": [1.5, 2]},
            [Medium("audio", AUDIO, None, (1.5, 2))] * 2,
        ),
        (
            {"audios": ["a.wav", AUDIO], "images": ["i.png"], "videos": "v.mp4", "num_frames": 4},
            [
                Medium("video", VIDEO, 4),
                Medium("image", IMAGE),
                Medium("audio", AUDIO),
                Medium("audio", AUDIO),
            ],
        ),
        (
            {"videos": "a.wav", "data_type": "audio", "images": ["i.png"], "audios": ["a.wav"]},
            [Medium("audio", AUDIO), Medium("image", IMAGE), Medium("audio", AUDIO)],
        ),
        (
            {"videos": "i.png", "data_type": "image", "images": [IMAGE], "audio_track": False},
            [Medium("image", IMAGE)] * 2,
        ),
        ({"videos": "v.mp4", "images": None, "audios": None}, [Medium("video", VIDEO)]),
        ({"videos": "", "data_type": "text"}, []),
    ],
)
def test_a_row_holds_media_of_several_kinds_in_the_order_of_the_prompt(tmp_path, change, media):
    (one,) = load_rows(write_rows(tmp_path, ROW | change), "/media")
    assert one.media == tuple(media) and len({one.media: 1}) == 1
    assert one.data_type == change.get("data_type", "video")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"videos": []}, ("videos", "[]")),
        ({"videos": [""]}, ("videos", "['']")),
        ({"videos": ["v.mp4", 5]}, ("videos", "5")),
        ({"videos": [["v.mp4"]]}, ("videos",)),
        ({"videos": {"path": "v.mp4"}}, ("videos",)),
        ({"images": "i.png"}, ("images", "'i.png'")),
        ({"images": ["i.png", ""]}, ("images",)),
        ({"images": [None]}, ("images",)),
        ({"audios": {}}, ("audios",)),
        ({"audios": "a.wav"}, ("audios",)),
        ({"audios": [""]}, ("audios",)),
        ({"audio_track": 1}, ("audio_track", "1", "true or false")),
        ({"audio_track": "true"}, ("audio_track", "'true'")),
        ({"audio_track": True, "data_type": "image"}, ("audio_track", "image")),
        ({"audio_track": True, "data_type": "audio"}, ("audio_track", "audio")),
        ({"num_frames": 4, "data_type": "audio"}, ("num_frames", "audio")),
        ({"num_frames": 4, "data_type": "image"}, ("num_frames", "image")),
        ({"segment": [0, 1], "data_type": "image"}, ("segment", "image")),
        ({"data_type": "text", "videos": ["v.mp4"]}, ("videos", "text")),
        ({"data_type": "text", "videos": [""]}, ("videos", "text")),
        ({"data_type": "text", "videos": "", "images": ["i.png"]}, ("images", "text")),
        ({"data_type": "text", "videos": "", "audios": ["a.wav"]}, ("audios", "text")),
        ({"data_type": "text", "videos": "", "segment": [0, 1]}, ("segment", "text")),
    ],
)
def test_wrong_media_are_refused_by_row_and_field(tmp_path, change, words):
    message = error_of(tmp_path, ROW | {"problem_id": "8"}, ROW | change)
    for word in (":2 ", "q7", *words):
        assert word in message, message


def test_media_paths_are_relative_to_the_file_or_to_a_given_folder(tmp_path, monkeypatch):
    path = write_rows(tmp_path, ROW, ROW | {"problem_id": "8", "videos": "", "data_type": "text"})
    video, text = load_rows(path, "/media")
    assert (video.media, text.media) == ((Medium("video", "/media/videos/v.mp4"),), ())
    monkeypatch.chdir(tmp_path)
    assert load_rows("rows.jsonl")[0].media[0].path == str(tmp_path / "videos" / "v.mp4")


def test_an_open_ended_row_has_a_free_answer(tmp_path):
    row = ROW | {"problem": "How many, A or B?", "answer": " <answer> 1,000 </answer>\n"}
    (one,) = load_rows(write_rows(tmp_path, row))
    assert (one.options, one.answer) == ((), "1,000")


def test_an_id_may_be_a_number_and_reasoning_null_as_published(tmp_path):
    (one,) = load_rows(write_rows(tmp_path, ROW | {"problem_id": 0, "reasoning": None}))
    assert one.id == "0" and one.response == ""  # nothing to learn from
    assert "problem_id '0' occurs twice" in error_of(
        tmp_path, ROW | {"problem_id": 0}, ROW | {"problem_id": "0"}
    )


def test_reasoning_that_has_its_tags_keeps_them(tmp_path):
    row = ROW | {"reasoning": "<think> a </think>"}
    assert load_rows(write_rows(tmp_path, row))[0].response == (
        "<think> a </think> <answer> B </answer>"
    )


def test_blank_lines_are_skipped_but_counted(tmp_path):
    assert len(load_rows(write_rows(tmp_path, "", ROW, "  "))) == 1
    assert ":3: not JSON" in error_of(tmp_path, ROW, "", "{")


REQUIRED = list(data.FIELDS)[:7]
WRONG = [(field, value) for field in REQUIRED for value in ("absent", 2.5, True, None, {"x": 1})]


@pytest.mark.parametrize(
    "field, value", [x for x in WRONG if x not in (("reasoning", None), ("reasoning", "absent"))]
)
def test_a_row_without_a_field_is_refused(tmp_path, field, value):
    row = {k: v for k, v in ROW.items() if k != field}
    row |= {} if value == "absent" else {field: value}
    message = error_of(tmp_path, ROW | {"problem_id": "8"}, row)
    assert ":2 " in message and repr(field) in message
    assert "q7" in message or field == "problem_id"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data_type": "sound"}, ("data_type", "sound", "video, image, audio, text")),
        ({"data_type": ""}, ("data_type",)),
        ({"data_type": "text"}, ("videos", "text")),
        ({"videos": ""}, ("videos",)),
        ({"answer": ""}, ("answer",)),
        ({"answer": "B"}, ("answer", "'B'")),
        ({"answer": "<answer>B"}, ("answer", "<answer>B")),
        ({"answer": "so <answer>B</answer>"}, ("answer",)),
        ({"answer": "<answer></answer>"}, ("answer",)),
        ({"answer": "<answer> </answer>"}, ("answer",)),
        ({"answer": "<answer>D</answer>"}, ("answer", "'D'", "3 options")),
        ({"answer": "<answer>b</answer>"}, ("answer", "'b'")),
        ({"answer": "<answer>B.</answer>"}, ("answer", "'B.'")),
        ({"answer": "<answer>red</answer>"}, ("answer", "'red'")),
        ({"answer": "<answer>A</answer><answer>B</answer>"}, ("answer",)),
        ({"problem": "Which?\nB. red\nC. blue"}, ("problem", "['B', 'C']")),
        ({"problem": "Which?\nA. red\nC. blue"}, ("problem", "['A', 'C']")),
        ({"problem": "Which?\nA. red\nA. blue"}, ("problem", "['A', 'A']")),
        ({"problem": "Which?\nB. red\nA. blue"}, ("problem", "['B', 'A']")),
    ],
)
def test_a_wrong_value_is_refused_by_row_and_field(tmp_path, change, words):
    message = error_of(tmp_path, ROW | {"problem_id": "8"}, ROW | change)
    for word in (":2 ", "q7", *words):
        assert word in message, message


@pytest.mark.parametrize(
    "line, words",
    [
        ("not json", ":2: not JSON"),
        ('{"problem_id": ', ":2: not JSON"),
        ("[1, 2]", ":2: not a JSON object"),
        ("null", ":2: not a JSON object"),
        (json.dumps(ROW | {"problem_id": "8"}), ":2: problem_id '8' occurs twice"),
    ],
)
def test_a_wrong_line_is_refused_by_number(tmp_path, line, words):
    assert words in error_of(tmp_path, ROW | {"problem_id": "8"}, line)


def test_a_file_without_rows_or_no_file_is_refused_by_name(tmp_path):
    assert "no rows" in error_of(tmp_path)
    assert "no rows" in error_of(tmp_path, "", " ")
    for path in ("none.jsonl", "none.parquet", "", "me@home/none.jsonl", "data@none.parquet"):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / path}: no such file")):
            load_rows(str(tmp_path / path))


def test_a_line_that_is_not_text_is_refused_by_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in (b"\xff\xfe", json.dumps(ROW | {"problem": "half \ud800"}).encode()):
        path.write_bytes(json.dumps(ROW | {"problem_id": "8"}).encode() + b"\n" + line + b"\n")
        with pytest.raises(DataError, match=re.escape(f"{path}:2: not UTF-8 text")):
            load_rows(str(path))


@pytest.mark.parametrize("line", ("9" * 5000, "[" * 100_000))
def test_a_line_that_is_too_much_for_the_parser_is_refused_by_number(tmp_path, line):
    assert ":2: not JSON" in error_of(tmp_path, ROW, line)


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    path = write_rows(tmp_path, ROW)
    monkeypatch.setitem(
        load_rows.__globals__, "open", lambda *_: (_ for _ in ()).throw(OSError("I/O\nerror"))
    )
    with pytest.raises(DataError, match=re.escape(f"{path}: cannot be read (I/O)")):
        load_rows(path)


# What the published columns hold: ids are numbers, and another file may have columns of its own.
PUBLISHED = [
    ROW | {"problem_id": i, "images": None, "num_frames": None, "segment": segment, "score": 0.5}
    for i, segment in enumerate([None, [1.0, 2.5], None])
]


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A data set in the hub's layout; what the package keeps goes to the test's folder as well."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "long@video"
    folder.mkdir()
    for split, rows in (("train", PUBLISHED), ("test", PUBLISHED[:1])):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def test_every_kind_of_file_gives_the_same_rows(tmp_path, hub_folder):
    lines = load_rows(write_rows(tmp_path, *PUBLISHED), "/media")
    assert [e.id for e in lines] == ["0", "1", "2"]
    assert lines[1].media == (Medium("video", "/media/videos/v.mp4", None, (1.0, 2.5)),)
    file = hub_folder / "data" / "train-00000-of-00001.parquet"
    assert load_rows(str(file), "/media") == lines
    assert load_rows(f"{hub_folder}@train", "/media") == lines
    assert load_rows(f"{hub_folder}@test", "/media") == lines[:1]
    assert load_rows(str(file))[0].media[0].path == str(file.parent / "videos" / "v.mp4")
    assert load_rows(f"{hub_folder}@test")[0].media[0].path == str(hub_folder / "videos" / "v.mp4")


def test_rows_of_the_hub_are_asked_for_by_name_and_split(tmp_path, monkeypatch):
    """Their media are relative to the current folder; a path with @ that is a file is a file."""
    import datasets

    asked, table = [], datasets.Dataset.from_list(PUBLISHED[:1])
    ask = lambda name, split: asked.append((name, split)) or table  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", ask)
    monkeypatch.chdir(tmp_path)
    (one,) = load_rows("LongVideo-Reason/longvideo-reason@test")
    assert asked == [("LongVideo-Reason/longvideo-reason", "test")]
    assert one.media[0].path == str(tmp_path / "videos" / "v.mp4")
    (tmp_path / "me@home").mkdir()
    assert load_rows(write_rows(tmp_path / "me@home", ROW)) and len(asked) == 1


@pytest.mark.parametrize("package, path", (("pyarrow.parquet", "x.parquet"), ("datasets", "a/b@c")))
def test_a_missing_package_is_told_how_to_install(tmp_path, monkeypatch, package, path):
    (tmp_path / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"{path}: .*{package}.*pip install datasets"):
        load_rows(path)


def test_a_wrong_source_is_refused_by_name(tmp_path, hub_folder):
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "empty.parquet").touch()
    whole = (hub_folder / "data" / "train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-99])
    write_parquet(tmp_path / "bare.parquet", [{"score": 1}])
    write_parquet(tmp_path / "none.parquet", [])
    for path, words in (
        (tmp_path / "text.parquet", "cannot be read"),
        (tmp_path / "empty.parquet", "cannot be read"),
        (tmp_path / "cut.parquet", "download it again"),
        (tmp_path / "bare.parquet", "row 1 (problem_id '?'): field 'problem_id' is missing"),
        (tmp_path / "none.parquet", "no rows"),
        (f"{hub_folder}@tset", "tset"),  # names the splits that there are
        (f"{hub_folder}@tset", "'train', 'test'"),
        (f"{hub_folder}@", "Split name"),
        (f"{tmp_path}/none@train", "give FOLDER@SPLIT"),
        ("LongVideo-Reason/longvideo-reason@test", "give FOLDER@SPLIT"),
    ):
        with pytest.raises(DataError) as error:
            load_rows(str(path))
        assert str(error.value).startswith(f"{path}: ") and words in str(error.value), error.value
        assert "\n" not in str(error.value)


def test_a_wrong_row_of_a_table_is_refused_by_number_id_and_field(tmp_path):
    rows = [ROW | {"problem_id": 7}, ROW | {"problem_id": 8, "answer": "B"}]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    for word in (f"{path}: row 2 (problem_id 8): field 'answer'",):
        with pytest.raises(DataError, match=re.escape(word)):
            load_rows(path)


def test_bad_rows_are_left_out_and_listed_where_a_list_is_given(tmp_path):
    wrong = [ROW | {"answer": "B"}, "not json", ROW | {"problem_id": "8"}, "\n[]"]
    path, bad = write_rows(tmp_path, ROW | {"problem_id": "8"}, *wrong, ROW), []
    assert [e.id for e in load_rows(path, bad=bad)] == ["8", "q7"]
    assert [where for where, _ in bad] == [f"{path}:{n}" for n in (2, 3, 4, 6)]
    assert all(message.startswith(where) for where, message in bad)
    words = ("field 'answer'", "not JSON", "occurs twice", "not a JSON object")
    assert [word in message for word, (_, message) in zip(words, bad, strict=True)] == [True] * 4
    same = load_rows(write_rows(tmp_path, ROW), bad=bad)
    assert [e.id for e in same] == ["q7"] and len(bad) == 4


def test_a_source_without_a_good_row_is_refused_even_where_a_list_is_given(tmp_path):
    bad = []
    for rows, words in (([ROW | {"answer": "B"}], "no row is good, the first: "), ([], "no rows")):
        path = write_rows(tmp_path, *rows)
        with pytest.raises(DataError, match=re.escape(path) + ".*" + words):
            load_rows(path, bad=bad)
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.jsonl"), bad=bad)
    assert bad == []


@pytest.mark.parametrize(
    "path", ("../v.mp4", "..", "a/../../v.mp4", "/etc/passwd", "/media2/v.mp4", "./../v.mp4", "/")
)
@pytest.mark.parametrize("field", ("videos", "images", "audios"))
def test_a_path_that_leaves_the_video_directory_is_refused(tmp_path, field, path):
    row = ROW | {field: path if field == "videos" else ["good.png", path]}
    rows = write_rows(tmp_path, ROW | {"problem_id": "8"}, row)
    with pytest.raises(DataError) as error:
        load_rows(rows, "/media")
    for word in (f"{rows}:2 ", "q7", repr(field), repr(path), "not within", "/media"):
        assert word in str(error.value)
    assert "not within" in error_of(tmp_path, row)


def test_a_path_within_the_video_directory_may_be_written_in_any_way(tmp_path, monkeypatch):
    for path in (
        "v.mp4",
        "./v.mp4",
        "a/../v.mp4",
        "..v/../v.mp4",
        "/media/v.mp4",
        "/media/a/../v.mp4",
    ):
        (one,) = load_rows(write_rows(tmp_path, ROW | {"videos": path}), "/media")
        assert one.media == (Medium("video", "/media/v.mp4"),)
    assert load_rows(write_rows(tmp_path, ROW | {"videos": "..v.mp4"}))
    (tmp_path / "disk").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "rows")
    path = write_rows(tmp_path / "rows", ROW | {"videos": "link/v.mp4"})
    for folder in (None, ".", "../rows", str(tmp_path / "rows")):
        assert Path(load_rows(path, folder)[0].media[0].path).resolve() == tmp_path / "disk/v.mp4"


@pytest.mark.parametrize("value", ("8", 0, -3, 2.5, True, [8]))
def test_a_malformed_num_frames_is_refused(tmp_path, value):
    assert "num_frames" in error_of(tmp_path, ROW | {"num_frames": value})


@pytest.mark.parametrize(
    "value",
    (5, 0, [], "ab", [1], [1, 2, 3], ["0", "1"], [3, 1], [2, 2], [-1, 2], [float("nan"), 2]),
)
def test_a_malformed_segment_is_refused(tmp_path, value):
    assert "segment" in error_of(tmp_path, ROW | {"segment": value})


@pytest.mark.parametrize("value", (5, ["red"], "  "))
def test_a_malformed_response_is_refused(tmp_path, value):
    assert "response" in error_of(tmp_path, ROW | {"response": value})


def test_options_may_be_indented_and_hold_any_character(tmp_path):
    problem = "Which?\n  A. red\u2028B. blue\r\n\t(B) dark\x0bred"
    (one,) = load_rows(write_rows(tmp_path, ROW | {"problem": problem}))
    assert one.options == ("red\u2028B. blue", "dark\x0bred")


@pytest.mark.parametrize("answer, expected", (("<answer>B</answer>", "B"), ("", "")))
def test_a_row_with_a_response_still_has_its_letter(tmp_path, answer, expected):
    rows = [ROW | {"response": "x", "answer": answer}, ROW | {"problem_id": "8", "response": "x"}]
    assert [e.answer for e in load_rows(write_rows(tmp_path, *rows))] == [expected, "B"]


def test_an_option_without_text_is_refused(tmp_path):
    row = ROW | {"problem": "Which?\nA.\nB. red", "answer": "<answer>A</answer>"}
    assert "problem" in error_of(tmp_path, row)


def test_a_question_may_begin_with_a_letter(tmp_path):
    (one,) = load_rows(write_rows(tmp_path, ROW | {"problem": "Q: Which?\nA. red\nB. blue"}))
    assert one.options == ("red", "blue")


def test_an_open_ended_row_has_one_answer_span(tmp_path):
    row = ROW | {"problem": "Why?", "answer": "<answer>x</answer> <answer>y</answer>"}
    assert "answer" in error_of(tmp_path, row)
