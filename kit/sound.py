"""Sound: an audio file, or a video's audio track, for the families that hear (Qwen2.5-Omni).

    .wav .mp3 .m4a .flac ...   PyAV: decode, resample      load_audio
    .mp4 .mkv (audio_track)   --------------------------> (S,) float32 in [-1, 1], 16,000 a second

Second 0 is that of the video, if the file has one, so that sound and frames run side by side:

    video           |---------------            |---------------
    audio track         |-----------        |-------------------
    sound           |000|-----------            |---------------

What other systems do: they ask ffmpeg for samples and take what comes; a download that was cut off
is a shorter sound, and one with a gap runs ahead of its video. Here the seconds that were decoded
are compared with those that the file's header tells, where it does, and less is a DataError.

Check this file alone:  pytest tests/test_sound.py
"""

import os

import numpy as np

from data import DataError, Medium, named_errors, span_of


def load_audio(medium: Medium, rate: int = 16000, name: str = "") -> np.ndarray:
    """The sound of an audio file, or of a video's audio track: (S,) float32 in [-1, 1], `rate`
    samples a second, the mean of its channels. A segment's first sample is at its start. Errors as
    those of data.Frames; sound with gaps is one."""
    import av

    with (
        named_errors(medium, "audio", name),
        av.open(medium.path, metadata_errors="replace") as container,  # old tags are not UTF-8
    ):
        if not container.streams.audio:
            raise DataError("the file has no audio stream")
        stream = container.streams.audio[0]
        sound = decode(medium.path, container, stream, rate)
        start, _ = span_of(container, stream)
        zero, _ = span_of(container, (container.streams.video or [stream])[0])
        late = round(rate * (start - zero))
        if late > 0:
            sound = np.concatenate([np.zeros(late, np.float32), sound])
        else:
            sound = sound[-late:]
        if medium.segment is not None:
            first, stop = (int(np.ceil(x * rate - 1e-6)) for x in medium.segment)
            sound = sound[first:stop]
        if len(sound) == 0:
            raise DataError(f"there is no sound (segment: {medium.segment})")
        return sound.clip(-1, 1)


def decode(path: str, container, stream, rate: int) -> np.ndarray:
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
    _, seconds = span_of(container, stream)
    if kind == "wav":  # libav goes by the length of the file
        with open(path, "rb") as file:
            form, size = file.read(4), int.from_bytes(file.read(4), "little")
        if form == b"RIFF" and size < 2**31 - 2**16:  # else written as a stream, without a length
            seconds *= size / os.path.getsize(path)
    return seconds
