"""The csv, media and console writers: their output is read back with independent libraries."""

import csv as reference
import io
import json
import math
import os
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

from fxtrain.core import EvalEnd, StepEnd
from fxtrain.disk import replace_file
from fxtrain.values import Audio, ConfusionMatrix, Histogram, HParams, Image, PointCloud, Table, Text, Video
from fxtrain.writers import console, csv, media, read_csv, read_media

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


# CSV


def table(path):
    """Reads the rows with the csv module, without empty cells."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(reference.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)  # all rows have the header's length
    return [{name: cell for name, cell in row.items() if cell} for row in rows]


def test_csv_has_one_row_per_call_and_one_column_per_name(tmp_path):
    path = tmp_path / "new" / "a.csv"
    writer = csv(path)
    event = StepEnd(step=12, position=5, epoch_length=10, time=3.25, metrics={})
    writer.write(12, {"loss": 0.5, "n": np.int64(7), "flag": True, "t": torch.tensor(0.25)}, event)
    writer.write(12, {"eval": 1}, EvalEnd(step=12, time=4.5, metrics={}))
    writer.write_scalars(13, {"late": 2.0})
    writer.write_scalars(13, {"loss": np.float32(0.5)})
    writer.flush()
    assert path.read_text().splitlines() == [
        "step,epoch,time,loss,n,flag,t,eval,late",
        "12,0.5,3.25,0.5,7,1,0.25,,",
        "12,,4.5,,,,,1,",
        "13,,,,,,,,2.0",
        "13,,,0.5,,,,,",
    ]
    assert read_csv(path) == [
        {"step": 12, "epoch": 0.5, "time": 4.5, "loss": 0.5, "n": 7, "flag": 1, "t": 0.25, "eval": 1},
        {"step": 13, "loss": 0.5, "late": 2.0},
    ]
    writer.close()


def test_csv_header_is_written_with_the_first_row(tmp_path):
    path = tmp_path / "a.csv"
    first, other = csv(path), csv(path)  # other ranks also create the writer, and never use it
    assert path.read_bytes() == b""
    first.write_scalars(1, {"time": 2.0})
    first.write_scalars(2, {"loss": 0.25})
    for writer in (first, other):
        writer.close()
    assert path.read_text() == "step,epoch,time,loss\n1,,2.0,\n2,,,0.25\n"


def test_csv_round_trips_non_finite_and_large_scalars(tmp_path):
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1e-300, "e": 2**70, "f": 0.1 + 0.2}
    writer = csv(tmp_path / "a.csv")
    writer.write_scalars(1, values)
    writer.close()
    (row,) = table(tmp_path / "a.csv")
    assert math.isnan(float(row["a"]))
    assert [float(row[name]) for name in "bcdf"] == [values[name] for name in "bcdf"]
    assert int(row["e"]) == 2**70


NAMES = ["a,b", 'say "x"', "two\nlines", "\r", " spaced ", "wörld", "", "=1+1", '"']


def test_csv_names_may_have_any_characters(tmp_path):
    for count, name in enumerate(NAMES):
        writer = csv(tmp_path / "a.csv")
        writer.purge(count)
        writer.write_scalars(count + 1, {name: float(count)})
        writer.write_scalars(count + 1, {name: count + 0.5})
        writer.close()
    assert read_csv(tmp_path / "a.csv") == [{"step": count + 1, name: count + 0.5} for count, name in enumerate(NAMES)]
    assert len(table(tmp_path / "a.csv")) == 2 * len(NAMES)


def test_csv_values_may_set_epoch_but_not_step(tmp_path):
    writer = csv(tmp_path / "a.csv")
    writer.write(1, {"epoch": 7}, StepEnd(step=1, position=5, epoch_length=10, time=3.0, metrics={}))
    with pytest.raises(ValueError, match=r"expected names other than 'step', the step column of"):
        writer.write_scalars(2, {"step": 9, "loss": 1.0})
    writer.close()
    assert table(tmp_path / "a.csv") == [{"step": "1", "epoch": "7", "time": "3.0"}]


WHOLE = b'step,epoch,time,"two\nlines",loss\n1,,,0.5,1.5\n2,,,0.5,2.5\n3,0.25,1.5,,3.5\n'
HEADER = WHOLE.index(b"1,,,")


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_csv_repairs_a_row_torn_at_any_byte(tmp_path, cut, recwarn):
    path = tmp_path / "a.csv"
    path.write_bytes(WHOLE[:cut])
    writer = csv(path)
    whole = WHOLE[:cut].rfind(b"\n") + 1 if cut >= HEADER else 0
    assert [str(w.message) for w in recwarn] == (
        [
            f"{path} ended in the middle of a row, possibly after a crash. Its last {cut - whole} bytes "
            "were moved to a.csv.damaged."
        ]
        if cut > whole
        else []
    )
    writer.write_scalars(3, {"loss": 9.5})
    writer.write_scalars(9, {"new": 1})
    writer.close()
    found = read_csv(path)
    assert [row["step"] for row in found] == [
        *range(1, min(max(WHOLE[HEADER:cut].count(b"\n"), 0), 2) + 1),
        3,
        9,
    ]
    assert found[-2]["loss"] == 9.5
    assert found[-2].get("time") == (1.5 if cut == len(WHOLE) else None)


@pytest.mark.parametrize(
    "content",
    [b"a,b\n1,2\n", b"a,b\n1,2", b"text", b"step;epoch;time\n", b"\xff\xfe\0", b"step,time,epoch\n1,2,3\n", b"\n"],
)
def test_csv_rejects_a_foreign_table_unchanged(tmp_path, content, recwarn):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected the columns of .*a.csv to begin with .* Use another path"):
        csv(path)
    assert path.read_bytes() == content
    assert not recwarn


def test_csv_appends_to_a_file_saved_by_a_spreadsheet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'step,epoch,time,loss\r\n1,,,"1.5"\r\n2,,,2.5\r\n')
    writer = csv(path)
    writer.write_scalars(2, {"loss": 2.75})
    writer.write_scalars(3, {"loss": 3.5})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_csv(path)] == [(1, 1.5), (2, 2.75), (3, 3.5)]


def filled(path, steps=5):
    writer = csv(path)
    for step in range(1, steps + 1):
        writer.write_scalars(step, {"loss": float(step)})
    return writer


@pytest.mark.parametrize("reopened", [False, True])
def test_csv_purge_abandons_later_rows_and_keeps_all_rows(tmp_path, reopened):
    path = tmp_path / "a.csv"
    writer = filled(path)
    if reopened:
        writer.close()
        writer = csv(path)
    for _ in range(2):
        writer.purge(3)
        assert [row["step"] for row in read_csv(path)] == [1, 2, 3]
        assert table(path)[5:] == [{"step": "3"}]
    writer.write_scalars(3, {"eval": 0.5})
    writer.write_scalars(4, {"loss": 40.0})
    writer.purge(4)
    writer.close()
    assert read_csv(path)[2:] == [{"step": 3, "loss": 3.0, "eval": 0.5}, {"step": 4, "loss": 40.0}]
    csv(path).purge(0)
    assert read_csv(path) == []
    assert len(table(path)) == 9


def test_csv_reader_skips_damaged_rows(tmp_path):
    path = tmp_path / "a.csv"
    filled(path, 2).close()
    path.write_bytes(path.read_bytes() + b"\0\0\0\0\n\xff,,,\n1.5,,,\n,,,\n2,,,x\n3,,,3.0\n4,,,4.")
    assert [row["step"] for row in read_csv(path)] == [1, 2, 3, 4]
    with pytest.warns(RuntimeWarning, match="middle of a row"):
        writer = csv(path)
    writer.purge(2)
    writer.write_scalars(3, {"new": 1.0})  # rewrites the file
    writer.close()
    assert read_csv(path)[2:] == [{"step": 3, "new": 1.0}]


def test_csv_rewrites_the_file_only_for_new_columns(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("fxtrain.writers._csv_rows.replace_file", lambda *a: (calls.append(1), replace_file(*a)))
    writer = filled(tmp_path / "a.csv")
    assert len(calls) == 1
    writer.write_scalars(6, {f"m{index}": 1.0 for index in range(100)})
    assert len(calls) == 2
    writer.purge(5)
    writer.flush()
    writer.write_scalars(5, {"loss": 1.0})
    assert len(calls) == 2
    writer.close()


def test_csv_survives_a_crash_during_a_rewrite(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    writer = filled(path)
    before = path.read_bytes()

    def crash(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.write_scalars(6, {"new": 1.0})
    assert path.read_bytes() == before
    writer.write_scalars(5, {"loss": 50.0})
    writer.write_scalars(6, {"new": 1.0})
    writer.close()
    assert [row["step"] for row in read_csv(path)] == [1, 2, 3, 4, 5, 6]
    assert read_csv(path)[4:] == [{"step": 5, "loss": 50.0}, {"step": 6, "new": 1.0}]


@settings(deadline=None, max_examples=40)
@given(
    sessions=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from(["a", "b,c", 'd"', "e\nf"]), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_csv_has_one_row_per_step_after_restarts_and_purges(tmp_path_factory, sessions):
    path = tmp_path_factory.mktemp("law") / "a.csv"
    expected, last, writer = {}, 0, csv(path)
    for number, (back, steps, name, reopened) in enumerate(sessions):
        begin = max(last - back, 0)
        if reopened:
            writer.close()
            writer = csv(path)
        writer.purge(begin)
        expected = {step: row for step, row in expected.items() if step <= begin}
        for step in range(begin + 1, begin + steps + 1):
            for value in ({"session": number}, {name: float(step)}):
                writer.write_scalars(step, value)
            expected[step] = {"step": step, "session": number, name: float(step)}
        last = begin + steps
    writer.close()
    assert read_csv(path) == list(expected.values())


def test_csv_rejects_an_unwritable_path_on_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"csv cannot write to .*file.a.csv \(.*Use a writable path"):
        csv(tmp_path / "file" / "a.csv")
    with pytest.raises(OSError, match="Is a directory"):
        csv(tmp_path)


# Media


PIXELS = torch.arange(2 * 8 * 8 * 3, dtype=torch.float64).reshape(2, 8, 8, 3) / 384


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


# Console


def test_console_prints_scalars_texts_and_hparams(capsys):
    writer = console()
    table = Table({"word": ["cat"], "n": [1]})
    values = {"loss": 0.123456789, "n": 3, "flag": True, "nan": float("nan"), "said": Text("one\n\ntwo"), "t": table}
    writer.write(7, values)
    writer.write_hparams({"lr": 0.1, "optim": {"name": "adamw"}})
    writer.write(8, {"empty": Text("")})
    with pytest.warns(RuntimeWarning, match="ConsoleWriter does not store histograms"):
        writer.write(8, {"h": Histogram(torch.ones(3))})
    writer.write(9, {"none": HParams({})})
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 7 | loss 0.123457 | n 3 | flag True | nan nan",
        "step 7 | said:",
        "  one",
        "  ",
        "  two",
        "step 7 | t:",
        "  | word | n |",
        "  | --- | --- |",
        "  | cat | 1 |",
        "hparams:",
        "  lr          0.1",
        "  optim/name  adamw",
        "step 8 | empty:",
        "none:",
    ]


def test_console_leaves_its_file_open(tmp_path):
    with open(tmp_path / "log.txt", "w") as file:
        writer = console(file)
        writer.write_scalars(1, {"loss": torch.tensor(0.5)})
        writer.flush()
        assert (tmp_path / "log.txt").read_text() == "step 1 | loss 0.5\n"
        writer.close()
        writer.write_scalars(2, {"loss": np.float32(0.25)})
    assert (tmp_path / "log.txt").read_text().splitlines() == ["step 1 | loss 0.5", "step 2 | loss 0.25"]


HOSTILE = "a\x1b[2J\x07\x9b\x7f\n\u202eb\ud800"
SHOWN = "a\\x1b[2J\\x07\\x9b\\x7f\\n\\u202eb\\ud800"


def test_console_escapes_terminal_control_characters(capsys):
    writer = console()
    writer.write(1, {HOSTILE: 1.0, f"{HOSTILE}!": Text(f"one\t{HOSTILE}\r\ntwo\x0c\n")})
    writer.write_hparams({HOSTILE: HOSTILE})
    writer.close()
    first, second = SHOWN.split("\\n")
    assert capsys.readouterr().out.split("\n") == [
        f"step 1 | {SHOWN} 1",
        f"step 1 | {SHOWN}!:",
        f"  one\t{first}",
        f"  {second}",
        "  two\\x0c",
        "hparams:",
        f"  {SHOWN}  {SHOWN}",
        "",
    ]


def test_console_escapes_characters_outside_the_file_encoding():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console(file).write_texts(1, {"a": "wörld"})
    file.flush()
    assert file.buffer.getvalue() == b"step 1 | a: w\\xf6rld\n"


# Disk


def test_replace_file_is_atomic_and_ignores_leftovers(tmp_path):
    (tmp_path / "a.tmp").write_bytes(b"torn")
    replace_file(tmp_path / "a", b"one")
    replace_file(tmp_path / "a", b"two")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"
