"""Logged values in notebooks."""

import re

import torch
from pages import HOSTILE, Page, shown

import fxtrain as fx
import fxtrain.core._state_view


def images(count, side=8, **options):
    return fx.values.Image(torch.linspace(0, 1, count * side * side).reshape(count, side, side, 1), **options)


def test_images_are_drawn_with_captions():
    page = images(3, caption=["one", HOSTILE, "three"])._repr_html_()
    assert page.count("data:image/png;base64,") == 3
    assert "width:112px;image-rendering:pixelated" in page  # enlarged fourteen times
    assert "<script>alert(1)</script>" in shown(images(3, caption=["one", HOSTILE, "three"]))


def test_only_shown_images_are_copied_to_the_host():
    value = images(1000)
    assert value._repr_html_().count("<img") == 64
    assert "and 936 more images" in shown(value)
    assert "unpacked" not in vars(value)


def test_large_images_are_scaled_down_within_a_budget():
    value = fx.values.Image(torch.randint(0, 256, (4, 2000, 1500, 3), dtype=torch.uint8))
    page = value._repr_html_()
    assert "width:750px" in page
    assert len(page) < 6e6
    assert re.search(r"and \d more image", shown(value))


def test_values_are_cut_before_they_are_copied_to_the_host():
    huge = torch.zeros(1, dtype=torch.uint8)
    assert "<img" in fx.values.Image(huge.expand(10_000, 40_000, 30_000, 3))._repr_html_()
    assert "<img" in fx.values.Image(huge.expand(4, 40_000, 30_000, 3), grid=True)._repr_html_()
    assert "the first 240 frames" in shown(fx.values.Video(huge.expand(10_000, 40_000, 20_000, 4)))
    assert "the first 20 seconds" in shown(fx.values.Audio(torch.zeros(1).expand(10**10), rate=8000))
    images = fx.values.Image(huge.expand(10_000, 40_000, 30_000, 3))
    assert "and 9,950 more rows" in shown(fx.values.Table({"x": images}))


def test_reprs_of_long_values_are_short():
    assert len(repr(fx.values.Text("x" * 10**6))) < 1000
    assert len(repr(fx.values.Table({f"column {index}": [1] for index in range(1000)}))) < 1000
    assert len(repr(fx.History({f"norm/{index}": ([1], [1.0]) for index in range(5000)})).splitlines()) < 60


def test_image_out_of_range_says_so_in_its_place():
    assert "cannot be shown: ValueError: expected Image pixels from 0 to 1, got 5 to 5" in shown(
        fx.values.Image(torch.full((4, 4), 5.0))
    )


def test_video_plays_in_a_loop():
    gray = torch.linspace(0, 1, 4 * 16 * 16).reshape(1, 4, 16, 16, 1)
    value = fx.values.Video(gray, fps=5, caption=[HOSTILE])
    page = value._repr_html_()
    assert ("<video controls autoplay loop muted" in page) or ("data:image/gif" in page)
    assert "Video 1 of 16 x 16, gray, 4 frames 5 fps" in shown(value)
    transparent = fx.values.Video(gray.expand(-1, -1, -1, -1, 4))
    assert "data:image/gif;base64,R0lGODlh" in transparent._repr_html_()


def test_long_videos_are_cut():
    assert "the first 240 frames" in shown(fx.values.Video(torch.zeros(300, 8, 8, 4)))


def test_sounds_have_players():
    assert fx.values.Audio(torch.zeros(9, 100, 1), rate=100)._repr_html_().count("<audio controls") == 8
    assert "Audio of 1.0 s 100 Hz and 1 more sound" in shown(fx.values.Audio(torch.zeros(9, 100, 1), rate=100))


def test_matplotlib_figure_is_a_picture():
    from matplotlib.figure import Figure

    assert "data:image/png" in fx.values.Figure(Figure(figsize=(1, 1)))._repr_html_()


def test_text_is_rendered_without_raw_html():
    text = shown(fx.values.Text(f"# Title\n\n**bold** {HOSTILE}\n\n| a |\n| - |\n| 1 |"))
    assert "<strong>bold</strong>" in fx.values.Text("**bold**")._repr_html_()
    assert "<script>alert(1)</script>" in text
    assert "and 34,464 more characters" in shown(fx.values.Text("x" * 100_000))


def test_table_shows_first_rows_with_images():
    value = fx.values.Table(
        {"picture": images(60), HOSTILE: [HOSTILE] * 60, "score": torch.linspace(0, 1, 60), "note": [None] * 60}
    )
    assert value._repr_html_().count("<img") == 50
    assert "and 10 more rows" in shown(value)
    assert "<script>alert(1)</script>" in shown(value)
    assert 'class="number">0.01695' in value._repr_html_()


def test_table_of_many_rows_is_read_only_in_part():
    assert len(fx.values.Table({"x": torch.arange(10**6)})._repr_html_()) < 10_000


def test_confusion_matrix_shows_labels_and_counts():
    value = fx.values.ConfusionMatrix(torch.tensor([[8, 2], [0, 90_000]]), labels=(HOSTILE, "dog"))
    text = shown(value)
    assert "ConfusionMatrix of 2 classes 100.0% of 90,010 correct" in text
    assert "8 2" in text
    assert "90,000" in text
    assert "--share:0.800" in value._repr_html_()


def test_confusion_matrix_of_many_classes_is_an_image_with_the_most_confused():
    counts = torch.eye(1000) * 5
    counts[3, 7] = 2
    value = fx.values.ConfusionMatrix(counts)
    assert shown(value).endswith("true predicted count 3 7 2 ".rstrip())
    assert len(value._repr_html_()) < 200_000


def test_histogram_has_one_bar_per_bucket_with_its_count():
    value = fx.values.Histogram(counts=torch.tensor([1.0, 5, 2]), edges=torch.tensor([-torch.inf, 0.0, 1, 5]))
    assert "5 from 0 to 1" in shown(value)
    assert "-inf" in shown(value)
    assert "nan" not in value._repr_html_()
    assert "no values" in shown(fx.values.Histogram(torch.zeros(0)))


def test_geometric_buckets_of_a_histogram_are_equally_wide():
    positive = torch.logspace(-8, 2, 21)
    edges = torch.cat([-positive.flip(0), positive])
    view = fx.values.Histogram(counts=torch.arange(41.0) + 1, edges=edges)._repr_html_()
    widths = {float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', view)}
    assert max(widths) - min(widths) < 0.02
    assert ">-100<" in view
    assert ">100<" in view
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', view)]
    assert heights == sorted(heights)


def test_histogram_of_many_buckets_merges_them():
    value = fx.values.Histogram(counts=torch.ones(5000), edges=torch.arange(5001.0))
    assert Page(value._repr_html_()).tags.count("rect") == 100
    assert "50 from 0 to 50" in shown(value)
