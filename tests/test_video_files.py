"""Videos as MP4 files, which need PyAV, in the folder of media, in Weights & Biases and in the report."""

import base64
import io
import re

import numpy as np
import pytest
import torch

from fxtrain import report, writers
from fxtrain.values import Table, Video

av = pytest.importorskip("av")


def decoded(content):
    with av.open(io.BytesIO(content)) as file:
        (stream,) = file.streams.video
        return float(stream.average_rate), np.stack(
            [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_has_every_frame_at_its_rate(tmp_path, channels):
    shades = torch.linspace(0, 1, 7).view(7, 1, 1, 1).expand(7, 31, 20, channels)
    writers.media(tmp_path).write(1, {"video": Video(shades, fps=7.5)})
    rate, frames = decoded((tmp_path / "video/00000001.mp4").read_bytes())
    assert rate == 7.5
    assert frames.shape == (7, 32, 20, 3)
    assert np.abs(frames.mean((1, 2, 3)) - np.linspace(0, 255, 7)).max() < 4


def test_equal_videos_have_equal_files(tmp_path):
    video = Video(torch.rand(5, 16, 16, 3))
    for step in (1, 2):
        writers.media(tmp_path).write(step, {"video": video})
    first, second = sorted(tmp_path.rglob("*.mp4"))
    assert first.read_bytes() == second.read_bytes()


def test_videos_with_an_alpha_channel_are_gifs(tmp_path):
    writers.media(tmp_path).write(1, {"video": Video(torch.rand(3, 8, 8, 4))})
    assert [path.name for path in (tmp_path / "video").iterdir()] == ["00000001.gif"]


def test_wandb_gets_mp4(tmp_path):
    pytest.importorskip("wandb")
    writer = writers.wandb(tmp_path, mode="offline")
    writer.write(1, {"video": Video(torch.rand(2, 3, 8, 8, 3), caption=["a", "b"])})
    writer.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/videos/*.mp4"))) == 2


def test_report_embeds_whole_mp4_files(tmp_path):
    video = Video(torch.rand(2, 3, 8, 8, 3), caption=["one", "two"])
    writers.media(tmp_path / "media").write(1, {"video": video, "table": Table({"video": video})})
    writers.jsonl(tmp_path / "metrics.jsonl").write_scalars(1, {"train/loss": 1.0})
    page = report.page(report.read_run(tmp_path))
    contents = re.findall('<video[^>]* src="data:video/mp4;base64,([^"]+)"', page)
    assert [decoded(base64.b64decode(each))[1].shape for each in contents] == [(3, 8, 8, 3)] * 4
    assert "<small>two</small>" in page
    path = tmp_path / "media/video/00000001-0.mp4"
    path.write_bytes(path.read_bytes()[:-10])
    run = report.read_run(tmp_path)
    assert report.page(run).count("<video") == 3
    assert any("expected a complete MP4 file" in line for line in run.folder.problems.lines())
