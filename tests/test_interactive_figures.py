"""Figures of plotly and charts of Weights & Biases in every writer."""

import io
import re

import PIL.Image
import pytest

from fxtrain import report, writers
from fxtrain.values import Figure


@pytest.fixture
def drawn():
    objects = pytest.importorskip("plotly.graph_objects")
    return objects.Figure(objects.Scatter(x=[1, 2], y=[3, 4]))


def wandb_files(folder):
    return [path.name for path in folder.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]


def test_media_keeps_a_copy_of_a_plotly_figure_as_a_page(tmp_path, drawn):
    figure = Figure(drawn)
    drawn.update_layout(title="changed later")
    writers.media(tmp_path / "media").write(1, {"line": figure})
    page = (tmp_path / "media/line/00000001.html").read_text()
    assert "Plotly.newPlot" in page
    assert "changed later" not in page
    writers.media(tmp_path / "media").write(2, {"line": figure})
    assert (tmp_path / "media/line/00000002.html").read_text() == page
    writers.jsonl(tmp_path / "metrics.jsonl").write_scalars(1, {"train/loss": 1.0})
    shown = report.page(report.read_run(tmp_path))
    assert re.findall('<a href="([^"]*)">', shown) == ["media/line/00000001.html", "media/line/00000002.html"]


def test_wandb_keeps_plotly_figures_interactive(tmp_path, drawn):
    pytest.importorskip("wandb")
    writer = writers.wandb(tmp_path, mode="offline")
    writer.write(1, {"line": Figure(drawn)})
    writer.close()
    assert any(name.endswith(".plotly.json") for name in wandb_files(tmp_path))


def test_tensorboard_gets_a_picture_or_a_warning_of_what_to_install(tmp_path, drawn, monkeypatch):
    def fails(self, *args, **options):
        raise RuntimeError("no browser")

    monkeypatch.setattr(type(drawn), "to_image", fails)
    with pytest.warns(RuntimeWarning, match="'line' of step 1 and similar values are not written: expected kaleido"):
        writers.tensorboard(tmp_path).write(1, {"line": Figure(drawn)})
    encoded = io.BytesIO()
    PIL.Image.new("RGB", (6, 4)).save(encoded, "PNG")
    monkeypatch.setattr(type(drawn), "to_image", lambda *args, **options: encoded.getvalue())
    assert Figure(drawn).image().frames.shape == (1, 4, 6, 4)


def test_charts_of_wandb_are_shown_by_its_writer_only(tmp_path):
    package = pytest.importorskip("wandb")
    figure = Figure(package.Html("<b>chart</b>"))
    writer = writers.wandb(tmp_path, mode="offline")
    writer.write(1, {"chart": figure})
    writer.close()
    assert any(name.endswith(".html") for name in wandb_files(tmp_path))
    with pytest.warns(RuntimeWarning, match="MediaWriter does not store figures and skips 'chart'"):
        writers.media(tmp_path / "media").write(1, {"chart": figure})
