"""The report's page: what it shows of one run, and how much."""

import hashlib
import importlib.resources
import json
import re

import numpy as np
import pytest
import torch
from run_folders import data, measured, media_of, panels, session

from fxtrain import StepEnd, writers
from fxtrain.core import Control
from fxtrain.report import Run, page, read_run
from fxtrain.values import Audio, ConfusionMatrix, Figure, Histogram, HParams, Image, Table, Text, Video

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs

EMPTY = [], {}, {}, {}, {}, {}, {}, [], "", {}  # arguments of Run after its curves


def test_page_escapes_html_in_content_of_a_run(tmp_path):
    bad = "<b>&</script><!--"
    folder = tmp_path / "a <i>run"
    folder.mkdir()
    measured(
        folder,
        {1: 1.0},
        **{
            f"{bad}/number": 1.0,
            f"{bad}/text": Text(f"{bad} **{bad}** `{bad}`\n\n```\n{bad}\n```\n| {bad} |\n| --- |\n| {bad} |\n"),
            f"{bad}/table": Table({bad: [bad]}),
            f"{bad}/confusion": ConfusionMatrix(torch.ones(2, 2), labels=(bad, "b")),
            f"{bad}/histogram": Histogram(torch.arange(9.0)),
            "config": HParams({bad: bad}),
        },
    )
    session(folder, (StepEnd(step=1, metrics={}), Control(stop=True, reason=bad)), config={bad: [bad]})
    (folder / "summary.txt").write_text(bad)
    (folder / "result.json").write_text(json.dumps({bad: {bad: bad}}))
    html = page(read_run(folder))
    assert "<b>" not in html
    assert "<!--" not in html
    assert html.count("</script>") == 2
    assert "<title>a &lt;i&gt;run</title>" in html
    assert data(html)["marks"][0]["text"] == bad
    assert f"{bad}/number" in panels(html)


def test_page_loads_nothing_from_the_network(tmp_path):
    measured(tmp_path, {1: 1.0}, text=Text("see http://example.com/x.png"))
    html = page(read_run(tmp_path))
    assert not re.findall(r"""(?:src|href)=["']?http|url\((?!#)|@import|<link""", html)


def test_empty_sections_are_omitted(tmp_path):
    measured(tmp_path, {1: 1.0})
    html = page(read_run(tmp_path))
    assert "<h2>" not in html  # the script adds the heading of the curves
    assert [section["title"] for section in data(html)["sections"]] == ["Curves"]


def test_related_curves_share_a_panel_and_the_loss_is_first(tmp_path):
    names = ["train/accuracy", "eval/accuracy", "eval/loss", "train/zeros", "lr", "grad_norm/max", "grad_norm/min"]
    names += [f"grad_norm/blocks.{i}" for i in range(10)] + ["grad_flow/gain_max", "grad_flow/gain/conv"]
    names += ["grad_flow/healthy", "grad_flow/damping", "update_ratio/frozen", "throughput/steps_per_second"]
    names += ["train/learning_rate/body", "train/learning_rate/head"]
    names += ["early_stopping/improved_by", "weights/0.bias/norm", "train/activations/0/mean"]
    names += ["eval_batch/loss/5", "eval_batch/loss/10"]
    measured(tmp_path, {1: 1.0}, **dict.fromkeys(names, 1.0))
    html = page(read_run(tmp_path))
    found = {title: [series["name"] for series in lines] for title, lines in panels(html).items()}
    assert list(found)[:4] == ["loss", "accuracy", "learning_rate", "zeros"]
    assert found["loss"] == found["accuracy"] == ["train", "eval"]
    assert found["learning_rate"] == ["body", "head"]
    assert found["grad_norm"] == ["max", "min"]
    assert found["grad_norm by layer, 1 of 2"] == [f"blocks.{i}" for i in range(5)]
    assert found["grad_norm by layer, 2 of 2"] == [f"blocks.{i}" for i in range(5, 10)]
    assert found["grad_flow: layers"] == ["damping", "healthy"]
    assert (found["grad_flow/gain"], found["grad_flow/gain by layer"]) == (["max"], ["conv"])
    assert (found["weights: norm"], found["activations: mean"]) == (["0.bias"], ["0"])
    assert found["loss by evaluation batch"] == ["5", "10"]
    assert "early_stopping/improved_by" not in found
    assert {"update_ratio/frozen", "throughput/steps_per_second"} < set(found)


def test_header_shows_the_best_evaluation_metrics(tmp_path):
    writer = writers.jsonl(tmp_path / "metrics.jsonl")
    for step, loss in enumerate([0.5, 0.25, 0.75], start=1):
        writer.write_scalars(step, {"eval/loss": loss, "eval/accuracy": 1 - loss})
    writer.close()
    html = page(read_run(tmp_path))
    assert "<dt>lowest eval/loss</dt><dd>0.25</dd>" in html
    assert "<dt>highest eval/accuracy</dt><dd>0.75</dd>" in html
    assert html.index("lowest eval/loss") < html.index("highest eval/accuracy")


def test_problems_are_listed_at_the_top(tmp_path):
    measured(tmp_path, {1: 3.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "metrics": {"<b>": [], "train/loss": 2.0}}\n{"step": 3, "met')
    run = read_run(tmp_path)
    assert run.curves == {"train/loss": ([1, 2], [3.0, 2.0])}
    line = "metrics.jsonl: line 2, metrics '&lt;b&gt;': expected a number, got a list of 0 (1 more in this file)"
    assert f"<h2>Problems</h2><ul><li>{line}</li></ul>".replace("'", "&#x27;") in page(run)


def test_many_marks_are_thinned_and_counted(tmp_path):
    measured(tmp_path, dict.fromkeys(range(1, 2001), 1.0))
    lines = [json.dumps({"event": "Saved", "step": step}) for step in range(1, 2001)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    html = page(read_run(tmp_path))
    assert data(html)["counts"] == {"saved": 2000}
    assert len(data(html)["marks"]) == 300
    assert "2,000 checkpoints were saved, the last one at step 2,000." in html


# Histograms


def heat_map(folder, histograms):
    """Returns the heat map on the page of a run, given counts and edges by step."""
    writer = writers.jsonl(folder / "metrics.jsonl")
    for step, (counts, edges) in histograms.items():
        writer.write(step, {"weights": Histogram(counts=torch.tensor(counts), edges=torch.tensor(edges))})
    writer.close()
    (found,) = data(page(read_run(folder)))["histograms"]
    assert (found.pop("run"), found.pop("name")) == (0, "weights")
    return found


def test_heat_map_is_cropped_to_used_bins(tmp_path):
    edges = [-100.0, -1.0, 0.0, 1.0, 100.0]
    found = heat_map(tmp_path, dict.fromkeys(range(500), ([0.0, 1.0, 3.0, 0.0], edges)))
    assert found["edges"] == [-1, 0, 1]
    assert found["counts"][0] == [1, 3]
    assert (len(found["steps"]), found["steps"][0], found["steps"][-1]) == (100, 0, 499)


def test_histograms_with_moving_edges_share_one_scale(tmp_path):
    found = heat_map(tmp_path, {1: ([4.0, 4.0], [0.0, 1.0, 2.0]), 2: ([8.0, 0.0], [0.0, 2.0, 4.0])})
    first, second = np.asarray(found["counts"], float)
    assert (found["edges"][0], found["edges"][-1]) == (0, 2)  # no counts lie beyond 2
    assert np.allclose(first, first[0])
    assert np.isclose(first.sum(), 8)
    assert np.isclose(second.sum(), 8)


def test_empty_histogram_has_zero_counts(tmp_path):
    found = heat_map(tmp_path, {1: ([0.0, 0.0], [0.0, 1.0, 2.0])})
    assert found == {"steps": [1], "counts": [[0, 0]], "edges": [0, 1, 2]}


# Media


def test_media_are_embedded_in_the_page(tmp_path):
    run = media_of(
        tmp_path,
        {
            "digits": Image(torch.rand(12, 4, 4, 1)),
            "film": Video(torch.rand(3, 4, 4, 3)),
            "tone": Audio(torch.zeros(100), 8000),
            "said": Text("**so**"),
            "few": Table({"input": Image(torch.rand(2, 4, 4, 1)), "name": ["00000001.json", "b"]}),
            "taken": ConfusionMatrix(torch.tensor([[3, 1], [0, 4]]), labels=("cat", "dog")),
        },
        steps=(10, 20, 100_000_000),
    )
    assert list(run.media) == ["digits", "film", "tone"]  # without the images of tables
    assert [path.name for path in run.media["digits"][10]] == [f"00000010-{i}.png" for i in range(12)]
    assert run.tables["few"][0] == run.confusion["taken"][0] == 100_000_000
    html = page(run)
    assert html.count('src="data:image/png') == 3 * 12 + 2
    assert html.count('src="data:image/gif') == html.count('src="data:audio/wav') == 3
    assert html.count("<strong>so</strong>") == 3
    assert "step 100,000,000" in html
    assert '<td style="--share:0.750">3</td>' in html


def test_tables_show_videos_and_sounds_in_cells(tmp_path):
    row = Image(torch.rand(8, 8, 3), caption="cat"), Video(torch.rand(3, 8, 8, 3)), Audio(torch.zeros(80), 8000)
    table = Table.from_rows(["image", "video", "sound"], [row, row])
    run = media_of(tmp_path, {"table": table, "texts": Table({"said": [Text("<b>"), None]})})
    assert not run.media
    shown = page(run)
    assert shown.count('src="data:image/png') == shown.count('src="data:audio/wav') == 2
    assert shown.count('src="data:image/gif') + shown.count('src="data:video/mp4') == 2
    assert "<td>&lt;b&gt;</td>" in shown


def test_captions_are_shown_below_images(tmp_path):
    pixels = torch.rand(2, 8, 8, 3)
    values = {"pair": Image(pixels, caption=["<cat>", ""]), "grid": Image(pixels, caption=["a", "b"], grid=1)}
    shown = page(media_of(tmp_path, values))
    assert re.findall(r"<small>([^<]*)</small></div>", shown) == ["a\nb", "&lt;cat&gt;"]
    assert shown.count("<img") == 3
    (tmp_path / "media/pair/00000010.json").write_text('{"captions": ["cat"]}')
    run = read_run(tmp_path)
    assert shown.count("<img") == page(run).count("<img")
    assert any("pair/00000010.json: expected an object" in line for line in run.folder.problems.lines())


def test_text_in_both_json_lines_and_media_is_shown_once(tmp_path):
    run = media_of(tmp_path, {"said": Text("so")})
    writer = writers.jsonl(tmp_path / "metrics.jsonl")
    writer.write_texts(10, {"said": "so"})
    writer.close()
    assert run.texts == read_run(tmp_path).texts
    assert (run.texts["said"].items, run.texts["said"].count) == ([(10, "so")], 1)


def test_media_are_spread_over_the_run_within_a_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("fxtrain.report._samples._MAX_BYTES", 1500)
    run = media_of(
        tmp_path,
        {"a": Image(torch.rand(16, 16, 1)), "b": Image(torch.rand(8, 8, 1))},
        steps=range(10, 210, 10),
    )
    html = page(run)
    a, b = (html.split(f"<h3>{name}</h3>")[1].split("<h3>")[0] for name in "ab")
    assert "step 200" in a  # the last sample of every name has priority
    assert "step 200" in b
    assert 0 < a.count("<img") < 8
    assert b.count("<img") <= 8
    assert "more steps are in the run's folder." in a


def test_large_confusion_matrix_is_an_image_with_its_worst_pairs(tmp_path):
    counts = torch.eye(100) * 50
    counts[3, 7] = 9
    run = media_of(tmp_path, {"taken": ConfusionMatrix(counts)})
    html = page(run)
    assert html.count("<img") == 1
    assert '<tr><td>3</td><td>7</td><td class="number">9</td></tr>' in html
    assert html.count("<tr>") < 20


def test_long_tables_and_large_images_in_tables_are_abbreviated(tmp_path):
    noise = Image(torch.rand(1, 600, 600, 1))
    run = media_of(tmp_path, {"rows": Table({"n": list(range(60))}), "seen": Table({"input": noise})})
    html = page(run)
    assert "10 more rows are in the run's folder." in html
    assert "<td>(image)</td>" in html


def test_figure_is_embedded_as_an_image(tmp_path):
    from matplotlib.figure import Figure as Canvas

    assert "data:image/png" in page(media_of(tmp_path, {"drawn": Figure(Canvas(figsize=(1, 1)))}))


# The script


def test_uplot_is_embedded_unchanged_with_its_license(tmp_path):
    measured(tmp_path, {1: 1.0})
    html = page(read_run(tmp_path))
    code = importlib.resources.files("fxtrain.report").joinpath("uPlot.iife.min.js").read_bytes()
    assert hashlib.sha256(code).hexdigest() == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert code.decode() in html
    assert "Copyright (c) 2022 Leon Sorokin" in html


def test_large_run_has_a_page_of_a_few_megabytes(tmp_path):
    steps = list(range(5000))
    curves = {f"part{index}/norm": (steps, np.random.default_rng(index).normal(size=5000)) for index in range(200)}
    run = Run("large", {name: (steps, values.tolist()) for name, (_, values) in curves.items()}, *EMPTY)
    html = page(run, run)
    assert len(html) < 6e6
    assert min(len(series["steps"]) for lines in panels(html).values() for series in lines) > 500
