"""Media files that the tests make: videos whose frames show their number, tones, text."""

from fractions import Fraction

import av
import numpy as np
from conftest import sine

from data import Medium


def medium(path, kind="video", **taken) -> Medium:
    return Medium(kind, str(path), **taken)


def numbered_frames(n):
    """(n, 32, 32, 3): frame i shows the bits of i as 2 x 4 tiles of 16 x 8 pixels."""
    bits = np.arange(n)[:, None] >> np.arange(8) & 1
    tiles = (60 + 140 * bits).astype(np.uint8).reshape(n, 2, 4)
    return np.repeat(tiles.repeat(16, axis=1).repeat(8, axis=2)[..., None], 3, axis=3)


def numbers_of(frames):
    """The inverse: (n,) the number that each frame shows."""
    tiles = frames.astype(float).reshape(len(frames), 2, 16, 4, 8, 3).mean((2, 4, 5))
    return ((tiles.reshape(-1, 8) > 130) << np.arange(8)).sum(1)


def write_video(path, frames, codec="mpeg4", fps=10, pts=None, turn=0, pixels="yuv420p"):
    """frames (F, H, W, 3) as a video; pts: when each is shown, in milliseconds; turn: degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        stream.codec_context.thread_count = 1
        if turn:
            stream.set_display_rotation(turn)
        if pts is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


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


def copied(source, target, late=0.0, **container):
    """The packets of a file in another one, not decoded; its video `late` seconds later."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=container) as new:
        streams = [new.add_stream_from_template(s) for s in old.streams]
        for packet in old.demux():
            if packet.dts is not None:
                shift = int(late / packet.time_base) if packet.stream.type == "video" else 0
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    return target


def packet_starts(path):
    """Byte positions of the packets of a video, in order."""
    with av.open(str(path)) as container:
        return sorted(p.pos for p in container.demux(video=0) if p.pos)
