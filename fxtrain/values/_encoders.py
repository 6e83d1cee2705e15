"""Encoders of images, videos and sounds."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np


def png(frame: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, C] with 1, 3 or 4 channels, as a PNG.

    Example:
        >>> png(np.zeros((8, 8, 3), np.uint8))[:4]
        b'\\x89PNG'
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame).save(buffer, "PNG")
    return buffer.getvalue()


def gif(frames: np.ndarray, fps: float) -> bytes:
    """Encodes a video, uint8 [T, H, W, C], as a GIF that loops forever. ``fps`` is in frames per second.

    Example:
        >>> gif(np.zeros((4, 8, 8, 1), np.uint8), fps=2)[:6]
        b'GIF89a'
    """
    from PIL import Image

    first, *rest = [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
    buffer = io.BytesIO()
    # GIF durations are in hundredths of a second, and browsers slow down durations below two of them.
    milliseconds = max(round(1000 / fps), 20)
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Encodes a sound, int16 [T, C], as a WAV file. ``rate`` is in Hz.

    Example:
        >>> wav(np.zeros((100, 1), np.int16), 8000)[:4]
        b'RIFF'
    """
    import wave

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def mp4(frames: np.ndarray, fps: float) -> bytes:
    """Encodes a video, uint8 [T, H, W, C] with 1 or 3 channels, as an MP4 that browsers play.

    The last row and column are repeated where a size is odd, because H.264 stores color for squares of four pixels.

    Args:
        frames: The video.
        fps: Frames per second.

    Raises:
        ImportError: PyAV is not installed.
    """
    from fractions import Fraction

    import av  # pyright: ignore[reportMissingImports] -- optional

    _, height, width, _ = frames.shape
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    rgb = padded if padded.shape[-1] == 3 else padded.repeat(3, -1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        # The options are those of one thread and a constant quality, so equal videos give equal files.
        rate = Fraction(fps).limit_denominator(1000)
        stream: Any = file.add_stream("libx264", rate=rate, options={"crf": "18", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[1:3], "yuv420p"
        for image in rgb:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def video(frames: np.ndarray, fps: float) -> tuple[Literal["mp4", "gif"], bytes]:
    """Encodes a video, uint8 [T, H, W, C], and returns the ending of its files and its content.

    It is an MP4 if PyAV is installed, and a GIF otherwise or with an alpha channel, which MP4 lacks.

    Args:
        frames: The video.
        fps: Frames per second.
    """
    if frames.shape[-1] != 4 and _has_h264():
        return "mp4", mp4(frames, fps)
    return "gif", gif(frames, fps)


def _has_h264() -> bool:
    try:
        import av  # pyright: ignore[reportMissingImports] -- optional
    except ImportError:
        return False
    return "libx264" in av.codecs_available
