"""Images, videos and sounds encoded as file contents."""

from __future__ import annotations

import io

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


def numbered(name: str, index: int, count: int) -> str:
    """Returns the name of one of ``count`` values, or the name itself if there is only one.

    Example:
        >>> numbered("samples", 2, 16), numbered("samples", 0, 1)
        ('samples/2', 'samples')
    """
    return name if count == 1 else f"{name}/{index}"
