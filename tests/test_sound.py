"""Properties of kit/sound.py: pitch, length, time, loudness; sound that is cut off or has gaps."""

import numpy as np
import pytest
from conftest import sine, write_video_with_audio, write_wav
from media import copied, medium, numbered_frames, numbers_of, write_audio, write_video

from data import DataError, load_media
from kit.sound import load_audio


def hear(path, rate=16000, **taken):
    return load_audio(medium(path, "audio", **taken), rate)


def tone(sound, rate=16000):
    """(Hz, amplitude) of the loudest tone in a sound."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 8 * len(sound)))
    return spectrum.argmax() * rate / 8 / len(sound), 4 * spectrum.max() / len(sound)


def is_tone(sound, hz):
    return tone(sound) == (pytest.approx(hz, rel=0.01), pytest.approx(0.5, rel=0.05))


def refused(path, *words, kind="audio", **taken):
    with pytest.raises(DataError) as error:
        load_audio(medium(path, kind, **taken), name="q7")
    message = str(error.value)
    assert message.startswith(f"{path}: does not decode as audio (question q7): ")
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "rate, channels", [(8000, 1), (16000, 2), (44100, 1), (48000, 2), (44100, 3)]
)
def test_a_tone_keeps_its_pitch_length_and_loudness(tmp_path, rate, channels):
    write_wav(tmp_path / "a.wav", 2.5, rate, channels=channels)
    sound = hear(tmp_path / "a.wav")
    assert sound.dtype == np.float32 and sound.ndim == 1 and abs(len(sound) - 40000) <= 1
    assert is_tone(sound, 440)
    middle = slice(1000, 39000)  # in phase too: nothing is shifted
    assert np.abs(sound[middle] - sine(2.5, 16000, 440)[middle]).max() < 0.005
    assert len(hear(tmp_path / "a.wav", 24000)) == pytest.approx(60000, 1e-4)


def test_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", 1, channels=2)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    samples = np.frombuffer(content, "<i2", offset=44)
    samples[1::2] = 0  # silence on the right
    (tmp_path / "a.wav").write_bytes(content)
    assert tone(hear(tmp_path / "a.wav"))[1] == pytest.approx(0.25, rel=0.01)


CODECS = "mp3 libmp3lame, flac flac, m4a aac, opus libopus, mka flac"
PCM = "wav pcm_s24le, wav pcm_f32le, wav pcm_u8"


@pytest.mark.parametrize("ending, codec", [x.split() for x in f"{CODECS}, {PCM}".split(", ")])
def test_any_codec_is_heard_the_same(tmp_path, ending, codec):
    rate = 48000 if codec == "libopus" else 44100
    sound = hear(write_audio(tmp_path / f"a.{ending}", codec, rate=rate))
    assert len(sound) == pytest.approx(32000, rel=0.015) and is_tone(sound, 440)


def test_sound_beyond_full_scale_is_clipped(tmp_path):
    sound = hear(write_audio(tmp_path / "a.wav", "pcm_f32le", gain=4))
    assert sound.min() == -1 and sound.max() == 1


@pytest.mark.parametrize("start", (0.0, 0.75))
@pytest.mark.parametrize("ending", ("mp4", "mkv"))
def test_the_track_of_a_video_keeps_the_video_s_time(tmp_path, start, ending):
    path = tmp_path / f"v.{ending}"
    write_video_with_audio(path, numbered_frames(16), 4, 3, 880, start)
    sound = load_audio(medium(path, track=True))
    assert abs(len(sound) / 16000 - start - 3) < 0.07  # AAC ends with a whole block
    first = np.flatnonzero(np.abs(sound) > 0.1)[0] / 16000
    assert first == pytest.approx(start, abs=0.02) and is_tone(sound[-32000:-8000], 880)
    assert numbers_of(load_media(medium(path), 64)[0]).tolist() == list(range(16))
    part = load_audio(medium(path, segment=(0.5, 1.5)))
    assert np.array_equal(part, sound[8000:24000])


def test_a_track_that_begins_before_its_video_is_cut(tmp_path):
    write_video_with_audio(tmp_path / "v.mp4", numbered_frames(8), 4, 2, 440)
    whole = load_audio(medium(tmp_path / "v.mp4"))
    sound = load_audio(medium(copied(tmp_path / "v.mp4", tmp_path / "late.mp4", late=0.5)))
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
    whole = hear(tmp_path / "a.wav")
    assert np.array_equal(hear(tmp_path / "a.wav", segment=segment), whole[slice(*samples)])


def test_a_segment_or_file_without_sound_is_refused(tmp_path):
    write_wav(tmp_path / "a.wav", 2)
    refused(tmp_path / "a.wav", "no sound", "(2.0, 9.0)", segment=(2.0, 9.0))
    write_wav(tmp_path / "empty.wav", 0)
    refused(tmp_path / "empty.wav")
    silent = write_video(tmp_path / "v.mp4", numbered_frames(4))
    refused(silent, "no audio stream", kind="video", track=True)
    (tmp_path / "a.mp3").write_text("<html>404 not found</html>\n" * 50)
    refused(tmp_path / "a.mp3", "Invalid data")


LOSSY = [("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.flac", "flac")]


@pytest.mark.parametrize("share", (0.3, 0.6, 0.9))
@pytest.mark.parametrize(
    "name, codec", [*LOSSY, ("a.wav", "pcm_s16le"), ("fast.m4a", "aac"), ("a.mka", "flac")]
)
def test_a_truncated_sound_is_refused(tmp_path, name, codec, share):
    options = {"movflags": "+faststart"} if name == "fast.m4a" else {}
    path = write_audio(tmp_path / name, codec, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@pytest.mark.parametrize("name, codec", [*LOSSY, ("a.aac", "aac"), ("a.opus", "libopus")])
def test_a_sound_with_garbage_in_the_middle_is_refused(tmp_path, name, codec):
    path = write_audio(tmp_path / name, codec, rate=48000)
    content = path.read_bytes()
    fifth = len(content) // 5
    path.write_bytes(content[: 2 * fifth] + bytes(fifth) + content[3 * fifth :])
    refused(path)


def test_a_length_that_the_file_does_not_tell_is_not_held_against_it(tmp_path):
    """libav guesses the length of raw .aac from the bit rate of its first, quiet seconds; a .wav
    written as a stream has none in its header."""
    quiet = write_audio(tmp_path / "quiet.aac", "aac", 4, gain=1e-4)
    loud = write_audio(tmp_path / "loud.aac", "aac", 4, hz=3001)
    (tmp_path / "a.aac").write_bytes(quiet.read_bytes() + loud.read_bytes())
    assert len(hear(tmp_path / "a.aac")) / 16000 == pytest.approx(8, abs=0.3)
    write_wav(tmp_path / "a.wav", 2)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(content)
    assert len(hear(tmp_path / "a.wav")) == 32000


def test_a_tag_at_the_end_of_an_mp3_does_no_harm(tmp_path):
    path = write_audio(tmp_path / "a.mp3", "libmp3lame", rate=44100)
    whole = hear(path)
    path.write_bytes(path.read_bytes() + b"LYRICSBEGIN" + b"la la la " * 99 + b"LYRICS200")
    sound = hear(path)  # its last frame may go
    assert len(whole) - 1600 < len(sound) and np.array_equal(sound, whole[: len(sound)])
