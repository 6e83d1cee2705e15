"""The media writer and its encodings: files are read back with independent libraries."""

import io
import json
import pathlib
import re
import tempfile
import wave

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain.core import StepEnd
from fxtrain.values import Audio, ConfusionMatrix, Image, PointCloud, Table, Text, Video
from fxtrain.writers import media, read_media

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs

PIXELS = torch.arange(2 * 8 * 8 * 3, dtype=torch.float64).reshape(2, 8, 8, 3) / 384


# Files


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_media_files_are_readable_by_other_programs(tmp_path):
    folder = tmp_path / "new" / "media"
    cloud, colors = (
        torch.tensor([[0.5, -1.25, 1e-8], [1, 2, 3]]),
        torch.tensor([[0, 128, 255], [1, 2, 3]], dtype=torch.uint8),
    )
    video = torch.zeros(3, 8, 8, 3)
    video[1] = 1
    values = {
        "text": Text("wörld\n"),
        "image": Image(PIXELS[0]),
        "deep/images": Image(PIXELS),
        "alpha": Image(torch.ones(4, 4, 4)),
        "gray": Image(torch.full((4, 4), 0.2)),
        "video": Video(video, fps=4),
        "sound": Audio(torch.linspace(-1, 1, 50), 8000),
        "sounds": Audio(torch.stack([torch.zeros(50, 2), torch.ones(50, 2)]), 16000),
        "table": Table(
            {"n": [1, None], "x": torch.tensor([0.5, float("nan")]), "look": Image(PIXELS), "s": ["a", "ö"]}
        ),
        "confusion": ConfusionMatrix(torch.tensor([[8, 2], [1, 9]]), labels=("cat", "dog")),
        "points": PointCloud(cloud),
        "colored": PointCloud(cloud, colors),
    }
    writer = media(folder)
    writer.write(100, values, StepEnd(step=100, metrics={}))
    writer.flush()
    writer.close()
    assert names(folder) == sorted(
        [
            *["alpha/00000100.png", "colored/00000100.ply", "confusion/00000100.json", "deep/images/00000100-0.png"],
            *["deep/images/00000100-1.png", "gray/00000100.png", "image/00000100.png", "points/00000100.ply"],
            *["sound/00000100.wav", "sounds/00000100-0.wav", "sounds/00000100-1.wav", "table/00000100-0.png"],
            *["table/00000100-1.png", "table/00000100.json", "text/00000100.md", "video/00000100.gif"],
        ]
    )
    assert (folder / "text/00000100.md").read_text(encoding="utf-8") == "wörld\n"
    frames = Image(PIXELS).frames
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(np.array(PIL.Image.open(folder / f"deep/images/00000100-{index}.png")), frame)
        np.testing.assert_array_equal(np.array(PIL.Image.open(folder / f"table/00000100-{index}.png")), frame)
    assert [PIL.Image.open(folder / f"{n}/00000100.png").mode for n in ("image", "alpha", "gray")] == [
        "RGB",
        "RGBA",
        "L",
    ]
    moving = PIL.Image.open(folder / "video/00000100.gif")
    assert (moving.n_frames, moving.info["duration"], moving.info["loop"]) == (3, 250, 0)
    moving.seek(1)
    assert moving.convert("RGB").getpixel((3, 3)) == (255, 255, 255)
    for name, channels, rate in (("sound/00000100", 1, 8000), ("sounds/00000100-1", 2, 16000)):
        with wave.open(str(folder / f"{name}.wav")) as sound:
            assert (sound.getnchannels(), sound.getframerate(), sound.getsampwidth()) == (channels, rate, 2)
            samples = np.frombuffer(sound.readframes(100), "<i2").reshape(-1, channels)
            assert (len(samples), samples[-1, 0]) == (50, 32767)

    def refuse(name):
        pytest.fail(f"{name} is no JSON")

    found = json.loads((folder / "table/00000100.json").read_text(), parse_constant=refuse)
    assert found["columns"]["x"] == [0.5, "NaN"]
    assert found["columns"]["look"] == ["00000100-0.png", "00000100-1.png"]
    assert (found["columns"]["n"], found["columns"]["s"]) == ([1, None], ["a", "ö"])
    matrix = json.loads((folder / "confusion/00000100.json").read_text())
    assert matrix == {"labels": ["cat", "dog"], "counts": [[8, 2], [1, 9]]}
    for name, properties in (("points", "xyz"), ("colored", ["x", "y", "z", "red", "green", "blue"])):
        head, body = (folder / name / "00000100.ply").read_text().split("end_header\n")
        assert head.startswith("ply\nformat ascii 1.0\nelement vertex 2\n")
        assert re.findall(r"property \w+ (\w+)", head) == list(properties)
        rows = np.loadtxt(io.StringIO(body))
        np.testing.assert_array_equal(rows[:, :3].astype(np.float32), cloud.numpy())
        np.testing.assert_array_equal(rows[:, 3:], colors.numpy()[:, : len(properties) - 3])


def test_media_captions_are_in_a_file_by_file_name(tmp_path):
    writer = media(tmp_path)
    writer.write(1, {"pair": Image(PIXELS, caption=["cat", "dog"]), "grid": Image(PIXELS, grid=True)})
    writer.write(1, {"video": Video(torch.zeros(3, 8, 8, 3), caption="a film")})
    assert names(tmp_path / "pair") == ["00000001-0.png", "00000001-1.png", "00000001.json"]
    assert names(tmp_path / "grid") == ["00000001.png"]
    captions = json.loads((tmp_path / "pair/00000001.json").read_text())
    assert captions == {"captions": {"00000001-0.png": "cat", "00000001-1.png": "dog"}}
    (caption,) = json.loads((tmp_path / "video/00000001.json").read_text())["captions"].values()
    assert caption == "a film"


def test_media_names_map_to_distinct_files_inside_the_directory(tmp_path):
    given = ["../../x", "/absolute", "..", ".", "", "a//b", "a/", "a", "a/../b", "b?", "b*", "b_", "%3F", "b%3F", ".b"]
    given += ["trailing.", "trailing ", "trailing", "c:\\d", "nul\0", "wörld/ü", "...", " "]
    writer = media(tmp_path / "inside" / "media")
    writer.write(1, {name: Text(name) for name in given})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.read_text() for path in files) == sorted(given)
    for path in files:
        assert (tmp_path / "inside" / "media") in path.parents
        assert not any(part.startswith(".") for part in path.relative_to(tmp_path).parts)
    assert (tmp_path / "inside" / "media" / "wörld" / "ü" / "00000001.md").exists()


def files(folder):
    """Returns the files that the reader returns, by name and step."""
    return {
        name: {step: [path.name for path in paths] for step, paths in steps.items()}
        for name, steps in read_media(folder).items()
    }


@pytest.mark.parametrize("reopened", [False, True])
def test_media_purge_abandons_later_files_and_keeps_all_files(tmp_path, reopened):
    folder = tmp_path / "media"
    writer = media(folder)
    writer.purge(0)
    assert not folder.exists()
    assert read_media(folder) == {}
    for step in (1, 2, 123456789):
        writer.write(step, {"a/text?": Text(str(step)), "images": Image(PIXELS)})
    (folder / "00000009.pt").write_text("written by another program")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if reopened:
        writer = media(folder)
    for _ in range(2):
        writer.purge(1)
    assert (folder / "rewinds.jsonl").read_text() == '{"rewound_to": 1}\n'
    assert files(folder) == {
        "a/text?": {1: ["00000001.md"]},
        "images": {1: ["00000001-0.png", "00000001-1.png"]},
    }
    writer.write(1, {"images": Image(PIXELS[:1])})
    writer.write(2, {"a/text?": Text("another")})
    assert files(folder) == {
        "a/text?": {1: ["00000001.md"], 2: ["00000002.r1.md"]},
        "images": {1: ["00000001.r1.png"]},
    }
    writer.purge(0)
    assert files(folder) == {}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_media_marker_torn_by_a_crash_is_written_again(tmp_path):
    writer = media(tmp_path)
    for step in (1, 2):
        writer.write_texts(step, {"text": str(step)})
    (tmp_path / "rewinds.jsonl").write_text('{"rewou')
    assert files(tmp_path) == {"text": {1: ["00000001.md"], 2: ["00000002.md"]}}
    writer = media(tmp_path)
    with pytest.warns(RuntimeWarning, match="middle of a line"):
        writer.purge(1)
    writer.write_texts(2, {"text": "again"})
    assert files(tmp_path) == {"text": {1: ["00000001.md"], 2: ["00000002.r1.md"]}}


def test_media_rejects_an_unwritable_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"media cannot write to .*file.text \(.*Use a writable path"):
        media(tmp_path / "file").write_texts(1, {"text": "t"})


def test_media_warns_once_about_scalars(tmp_path, recwarn):
    writer = media(tmp_path)
    with pytest.warns(RuntimeWarning, match="MediaWriter does not store scalars and skips 'loss' .*writers.jsonl"):
        writer.write_scalars(1, {"loss": 1.0, "b": 1.0})
    writer.write_scalars(2, {"loss": 1.0, "b": 1.0})
    assert not recwarn
    assert names(tmp_path) == []


# Encoding


def stored(value):
    """Returns the content of the file that ``media`` writes for a value."""
    with tempfile.TemporaryDirectory() as folder:
        media(folder).write(1, {"value": value})
        (file,) = pathlib.Path(folder, "value").iterdir()
        return file.read_bytes()


@settings(deadline=None, max_examples=30)
@given(channels=st.sampled_from([1, 3, 4]), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_png_round_trips_every_pixel(channels, height, width, seed):
    frame = np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)
    found = np.array(PIL.Image.open(io.BytesIO(stored(Image(frame)))))
    np.testing.assert_array_equal(found.reshape(frame.shape), frame)


@pytest.mark.parametrize(("fps", "milliseconds"), [(0.5, 2000), (8, 120), (30, 30), (1000, 20)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gif_has_every_frame_even_if_equal(fps, milliseconds, channels):
    frames = np.zeros((5, 8, 8, channels), np.uint8)
    frames[3:] = 255
    moving = PIL.Image.open(io.BytesIO(stored(Video(frames, fps=fps))))
    duration, shown = 0, []
    for index in range(moving.n_frames):
        moving.seek(index)
        duration += moving.info["duration"]
        shown += [moving.convert("L").getpixel((4, 4))] * round(moving.info["duration"] / milliseconds)
    assert abs(duration - 5 * milliseconds) <= 50
    if channels < 4:
        assert shown == [0, 0, 0, 255, 255]


def test_gif_may_have_one_frame():
    assert PIL.Image.open(io.BytesIO(stored(Video(np.zeros((1, 4, 4, 3), np.uint8))))).n_frames == 1


def test_wav_round_trips_every_sample():
    samples = np.random.default_rng(0).integers(-32767, 32768, (77, 2)).astype(np.int16)
    with wave.open(io.BytesIO(stored(Audio(samples / 32767, rate=44100)))) as sound:
        assert sound.getframerate() == 44100
        np.testing.assert_array_equal(np.frombuffer(sound.readframes(100), "<i2").reshape(-1, 2), samples)
