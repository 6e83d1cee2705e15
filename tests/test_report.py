"""The report: reading run folders in any state, and the content of the page."""

import hashlib
import importlib.resources
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fxtrain import EvalEnd, FitBegin, FitEnd, Interrupted, Rewound, Saved, StepEnd, cli, observers, writers
from fxtrain.core import Control
from fxtrain.report import Run, RunFolderError, page, read_run
from fxtrain.report._downsampling import BoundedSeries, Items, Points, evenly, thinned
from fxtrain.values import Audio, ConfusionMatrix, Figure, Histogram, HParams, Image, Table, Text, Video

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


EMPTY = [], {}, {}, {}, {}, {}, {}, [], "", {}  # arguments of Run after its curves


def data(html):
    """The data embedded for the page's script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def panels(html):
    return {panel["title"]: panel["series"] for section in data(html)["sections"] for panel in section["panels"]}


def marked(run):
    return [(mark.step, mark.kind) for mark in run.marks]


def measured(folder, losses, **more):
    """Writes losses by step, and other values at the last step."""
    writer = writers.jsonl(folder / "metrics.jsonl")
    for step, loss in losses.items():
        writer.write_scalars(step, {"train/loss": loss})
    writer.write(max(losses, default=0), more)
    writer.close()


# Folders in any state


def test_missing_or_empty_folder_raises(tmp_path):
    with pytest.raises(
        RunFolderError, match=r"expected a run folder, got .*nothing \(No such file or directory\)\. Check the path"
    ):
        read_run(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"got none of metrics.jsonl, .* Write metrics with .*writers.jsonl"):
        read_run(tmp_path)


def test_run_without_values_raises_until_an_event_is_recorded(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(RunFolderError, match=r"expected logged values in .*, got none\. Wait"):
        read_run(tmp_path)
    observers.record_run(tmp_path)(None, FitBegin(step=0), Control())
    assert "running or killed: no end was recorded" in page(read_run(tmp_path))


def test_torn_lines_are_skipped(tmp_path):
    measured(tmp_path, {1: 3.0, 2: 2.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"step": 3, "metrics": {"train/loss": 1.0}, "texts": {"said": "wö'.encode()[:-1])
    (tmp_path / "events.jsonl").write_text('{"event": "Saved", "step": 2}\n{"event": "Rewound", "step": 2, "fr')
    (tmp_path / "run.json").write_text('{"sessions": [{"began"')
    run = read_run(tmp_path)
    assert run.curves == {"train/loss": ([1, 2], [3.0, 2.0])}
    assert marked(run) == [(2, "saved")]
    assert run.sessions == []
    assert "<h1>" in page(run)


def test_csv_is_read_without_json_lines(tmp_path):
    writer = writers.csv(tmp_path / "metrics.csv")
    writer.write_scalars(1, {"train/loss": 0.5})
    writer.write_scalars(2, {"eval/loss": 0.25})
    writer.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("3,,,0.12")  # torn within 0.125
    run = read_run(tmp_path)
    assert run.curves == {"train/loss": ([1], [0.5]), "eval/loss": ([2], [0.25])}
    assert list(panels(page(run))) == ["loss"]


def test_curves_have_increasing_steps_with_one_point_each(tmp_path):
    lines = [{"step": step, "metrics": {"train/loss": loss}} for step, loss in [(1, 4), (3, 3), (2, 9), (3, 2)]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(tmp_path).curves == {"train/loss": ([1, 3], [4.0, 2.0])}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_values_abandoned_by_rewinds_are_left_out(tmp_path, kind):
    writer = getattr(writers, kind)(tmp_path / f"metrics.{kind}")
    for begin, end in ((0, 9), (6, 8), (2, 4)):  # the run rewinds to step 6, then to step 2
        writer.purge(begin)
        for step in range(begin + 1, end + 1):
            writer.write_scalars(step, {"train/loss": begin + step / 10})
    writer.close()
    run = read_run(tmp_path)
    assert run.curves == {"train/loss": ([1, 2, 3, 4], [0.1, 0.2, 2.3, 2.4])}
    assert run.folder.problems.lines() == []


def test_media_abandoned_by_rewinds_are_left_out(tmp_path):
    writer = writers.media(tmp_path / "media")
    pixels = torch.zeros(2, 4, 4, 1)
    for begin, end in ((0, 4), (2, 3)):  # the run rewinds to step 2
        writer.purge(begin)
        for step in range(begin + 1, end + 1):
            table = Table({"picture": Image(pixels), "score": [0.5, float(begin)]})
            writer.write(step, {"sample": Image(pixels[: 2 - begin // 2]), "text": Text(f"{begin}"), "table": table})
    run = read_run(tmp_path)
    assert {step: [path.name for path in files] for step, files in run.media["sample"].items()} == {
        1: ["00000001-0.png", "00000001-1.png"],
        2: ["00000002-0.png", "00000002-1.png"],
        3: ["00000003.r1.png"],
    }
    assert run.texts["text"].items == [(1, "0"), (2, "0"), (3, "2")]
    assert (run.tables["table"].step, run.tables["table"].columns["score"]) == (3, [0.5, 2.0])
    assert "00000003.r1-1.png" in str(run.tables["table"].columns["picture"][1])
    assert list(run.media) == ["sample"]
    assert run.folder.problems.lines() == []


def test_nonfinite_values_are_gaps(tmp_path):
    measured(tmp_path, {1: 3.0, 2: float("nan"), 3: float("inf"), 4: 2.0})
    (series,) = panels(page(read_run(tmp_path)))["loss"]
    assert series == {"run": 0, "name": "train", "steps": [1, 2, 3, 4], "values": [3, None, None, 2]}


# Marks and sessions


def session(folder, *events, begin=0, config=None):
    """Records a session of a run from pairs of an event and its control."""
    observer = observers.record_run(folder, config)
    observer(None, FitBegin(step=begin, resumed=begin > 0), Control())
    for event, control in events:
        observer(None, event, control)
    observer.close()


def test_actions_of_callbacks_are_marked(tmp_path):
    measured(tmp_path, dict.fromkeys(range(1, 11), 1.0))
    skipped = Control(skip_update=True, reason="a spike of the loss")
    session(
        tmp_path,
        (StepEnd(step=3, metrics={}), skipped),
        (Saved(step=4, path="somewhere", metrics={}), Control()),
        (Interrupted(step=5, cause="SIGTERM"), Control()),
    )
    session(
        tmp_path,
        (EvalEnd(step=9, metrics={}), Control(stop=True, reason="good enough")),
        (FitEnd(step=9, reason="good enough"), Control()),
        begin=5,
    )
    run = read_run(tmp_path)
    assert marked(run) == [(3, "skipped"), (4, "saved"), (5, "interrupted"), (5, "resumed"), (9, "stopped")]
    assert [mark.text for mark in run.marks][::4] == ["a spike of the loss", "good enough"]
    assert [each["reason"] for each in run.sessions] == ["interrupted by SIGTERM", "good enough"]
    html = page(run)
    assert "<td>interrupted by SIGTERM</td>" in html
    assert "One checkpoint was saved, at step 4." in html


def test_rewind_removes_marks_of_abandoned_saves_and_keeps_later_ones(tmp_path):
    writer = writers.jsonl(tmp_path / "metrics.jsonl")
    writer.write_scalars(2, {"early_stopping/improved_by": 0.5})
    writer.write_scalars(6, {"early_stopping/improved_by": 0.25})
    writer.close()

    def saved(step):
        return Saved(step=step, path="somewhere", metrics={}), Control()

    back = Rewound(step=7, from_step=7, to_step=3, abandoned=range(3, 7), times=1)
    session(tmp_path, saved(2), saved(6), (back, Control()), saved(5))
    run = read_run(tmp_path)
    assert marked(run) == [(2, "improved"), (2, "saved"), (5, "saved"), (6, "improved"), (7, "rewound")]
    assert run.marks[-1].text == "back to step 3"


def test_saves_beyond_the_resumed_step_are_not_marked(tmp_path):
    measured(tmp_path, {1: 1.0})
    session(tmp_path, *[(Saved(step=step, path="somewhere", metrics={}), Control()) for step in (4, 8)])
    session(tmp_path, (FitEnd(step=9, reason="reached 9 steps"), Control()), begin=4)
    run = read_run(tmp_path)
    assert marked(run) == [(4, "resumed"), (4, "saved")]
    html = page(run)
    assert html.count("no end was recorded") == 1
    assert "<dt>sessions</dt><dd>2</dd>" in html


# The page


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


def test_thinning_keeps_spikes_and_endpoints():
    steps, values = list(range(100_000)), [1.0] * 100_000
    values[31_234], values[77_777], values[50_000] = 50.0, -50.0, float("nan")
    kept_steps, kept = thinned((steps, values), 1000)
    assert len(kept) <= 1000
    assert (kept_steps[0], kept_steps[-1]) == (0, 99_999)
    assert kept_steps == sorted(set(kept_steps))
    assert {(31_234, 50.0), (77_777, -50.0)} < set(zip(kept_steps, kept, strict=True))
    assert thinned((steps[:1000], values[:1000]), 1000) == (steps[:1000], values[:1000])


@pytest.mark.parametrize(("count", "most", "kept"), [(3, 5, [0, 1, 2]), (10, 4, [0, 3, 6, 9]), (10, 1, [9])])
def test_evenly_chosen_items_span_all_and_include_the_last(count, most, kept):
    assert evenly(range(count), most) == kept


def test_many_marks_are_thinned_and_counted(tmp_path):
    measured(tmp_path, dict.fromkeys(range(1, 2001), 1.0))
    lines = [json.dumps({"event": "Saved", "step": step}) for step in range(1, 2001)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    html = page(read_run(tmp_path))
    assert data(html)["counts"] == {"saved": 2000}
    assert len(data(html)["marks"]) == 300
    assert "2,000 checkpoints were saved, the last one at step 2,000." in html


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


def media_of(folder, values, steps=(10,)):
    writer = writers.media(folder / "media")
    for step in steps:
        writer.write(step, values)
    measured(folder, {1: 1.0})
    return read_run(folder)


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


# Several runs


def compared(folder, *names):
    """Records runs with different learning rates and returns them."""
    runs = []
    for index, name in enumerate(names):
        run = folder / name
        measured(run, {1: 3.0 - index, 2: 2.0 - index}, **{"eval/loss": 1.0 - index, "lr": 0.1, f"own/{index}": 1.0})
        session(run, (FitEnd(step=2, reason="done"), Control()), config={"lr": 10.0**-index, "model": {"layers": 2}})
        bits = {"this model": 3.0 - index, "xz": 1.5, "own": index}
        (run / "result.json").write_text(json.dumps({"bits_per_byte": bits, "step": 2}))
        runs.append(read_run(run))
    return runs


def test_curves_of_several_runs_share_the_panel_of_their_metric(tmp_path):
    found = panels(page(*compared(tmp_path, "a", "b")))
    assert {title: [(series["run"], series["name"]) for series in lines] for title, lines in found.items()} == {
        "loss": [(0, "train"), (1, "train"), (0, "eval"), (1, "eval")],
        "lr": [(0, "lr"), (1, "lr")],
        "own/0": [(0, "own/0")],
        "own/1": [(1, "own/1")],
    }


def test_table_of_runs_has_their_best_metrics_and_states(tmp_path):
    html = page(*compared(tmp_path, "a", "b"))
    heads, *rows = re.findall("<tr>(.*?)</tr>", html.split('class="runs"')[1].split("</table>")[0])
    assert re.findall("<th>(.*?)</th>", heads) == ["run", "lowest eval/loss", "step", "status"]
    assert [re.findall("<td>(.*?)</td>", row) for row in rows] == [
        ["a", "1", "2", "done"],
        ["b", "<strong>0</strong>", "2", "done"],
    ]


def test_only_differing_configuration_is_compared(tmp_path):
    html = page(*compared(tmp_path, "a", "b"))
    shown = html.split("<h2>Differences</h2>")[1].split("</section>")[0]
    assert "<tr><td>lr</td><td>1</td><td>0.1</td></tr>" in shown
    assert "model" not in shown


def test_results_of_several_runs_are_bars_beside_their_common_baselines(tmp_path):
    def bars(html):
        return re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td><i( data-run=\"\d\")?", html)

    runs = compared(tmp_path, "a", "b")
    own = ' data-run="{}"'.format
    assert bars(page(runs[0])) == [("own", "0", ""), ("xz", "1.5", ""), ("this model", "3", own(0))]
    assert bars(page(*runs)) == [
        ("own", "0", ""),
        ("own, b", "1", ""),
        ("xz", "1.5", ""),
        ("b", "2", own(1)),
        ("a", "3", own(0)),
    ]
    assert "<h3>bits per byte</h3>" in page(*runs)


def test_samples_and_problems_name_their_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        media_of(tmp_path / name, {"digits": Image(torch.rand(4, 4, 1)), "few": Table({"x": [1]}), "said": Text("so")})
    (tmp_path / "b/run.json").write_text("{")
    html = page(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    for name in ("digits", "few", "said"):
        assert re.findall(f"<h3>{name} <small>(.)</small>", html) == ["a", "b"]
    assert "<li>b/run.json: expected JSON" in html


def test_runs_of_one_name_are_told_apart_by_their_parent_folder(tmp_path):
    runs = compared(tmp_path, "x/run", "y/run", "other")
    runs[2].about["name"] = "other <b>"
    assert [run["name"] for run in data(page(*runs))["runs"]] == ["x/run", "y/run", "other <b>"]
    assert [run["name"] for run in data(page(*runs[:1] * 3))["runs"]] == ["x/run", "x/run (2)", "x/run (3)"]


def test_number_of_runs_of_a_page_is_limited(tmp_path):
    (run,) = compared(tmp_path, "a")
    for runs in ((), (run,) * 51):
        with pytest.raises(ValueError, match=rf"expected from 1 to 50 runs, got {len(runs)}\. Choose fewer"):
            page(*runs)


def test_links_to_interactive_figures_are_relative_to_the_page(tmp_path):
    runs = compared(tmp_path, "a", "b")
    for run in runs:
        place = run.folder.root + "/media/drawn"
        os.makedirs(place)
        with open(place + "/00000001.html", "w") as file:
            file.write("figure")
    runs = [read_run(run.folder.root) for run in runs]

    def links(html):
        return re.findall('href="([^"#]*)"', html)

    assert links(page(runs[0])) == ["media/drawn/00000001.html"]
    assert links(page(*runs)) == ["a/media/drawn/00000001.html", "b/media/drawn/00000001.html"]
    assert links(page(runs[0], path=tmp_path / "pages/page.html")) == ["../a/media/drawn/00000001.html"]


# Epochs and times


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_time_continues_across_sessions_and_epochs_are_read(tmp_path, kind):
    writer = getattr(writers, kind)(tmp_path / f"metrics.{kind}")
    for step, length, time in [(1, 2, 2.0), (2, 2, 6.0), (3, 2, 1.0), (4, None, 3.0)]:
        event = StepEnd(step=step, position=step, epoch_length=length, time=time, metrics={})
        writer.write(step, {"loss": 1.0}, event)
        if kind == "jsonl":
            writer.write(step, {"config": HParams({"lr": 0.1})}, FitBegin(step=step))  # as each session does
    writer.close()
    run = read_run(tmp_path)
    assert run.folder.problems.lines() == []
    (found,) = data(page(run))["runs"]
    assert found["epoch"] == [[1, 2, 3], [0.5, 1.0, 1.5]]
    assert found["time"] == [[1, 2, 3, 4], [2.0, 6.0, 7.0, 9.0]]


def test_times_never_decrease_and_damaged_ones_are_listed(tmp_path):
    lines = [{"step": 1, "time": 5.0}, {"step": 2, "time": "NaN"}, {"step": 3, "time": []}, {"step": 4, "time": -2.0}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "metrics": {"loss": 1.0}}) + "\n" for line in lines)
    )
    run = read_run(tmp_path)
    (found,) = data(page(run))["runs"]
    assert found["time"] == [[1, 4], [5.0, 5.0]]
    assert run.folder.problems.lines() == ["metrics.jsonl: line 3, 'time': expected a number, got a list of 0"]


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


# Bounded memory


def test_long_curve_keeps_its_extremes():
    kept = BoundedSeries(Points, budget=10_000, names=9)
    for step in range(100_000):
        kept.put("loss", step, 1e6 if step == 31_234 else -1e6 if step == 77_777 else 1.0)
    points = kept.series["loss"]
    assert len(points.steps) <= 10_000
    assert (points.steps[0], points.steps[-1]) == (0, 99_999)
    assert points.steps == sorted(set(points.steps))
    assert {(31_234, 1e6), (77_777, -1e6)} < set(zip(points.steps, points.values, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000, 12_345])
def test_texts_of_a_long_run_are_thinned_evenly_and_keep_the_last(count):
    kept = BoundedSeries(Items, budget=100, names=9)
    for step in range(count):
        kept.put("said", step, str(step), 1)
    series = kept.series["said"]
    found = series.items
    assert len(found) <= 100
    assert series.count == count
    assert (found[0], found[-1]) == ((0, "0"), (count - 1, str(count - 1)))
    gaps = {later - earlier for (earlier, _), (later, _) in itertools.pairwise(found[:-1])}
    assert len(gaps) <= 1
    assert count > 100 or len(found) == count


def test_repeated_step_replaces_its_value_and_an_earlier_one_raises():
    for make in (Points, Items):
        kept = BoundedSeries(make, budget=100, names=1)
        kept.put("a", 5, 1.0)
        kept.put("a", 5, 2.0)
        with pytest.raises(ValueError, match="expected a step after 5, got 4"):
            kept.put("a", 4, 3.0)
        with pytest.raises(ValueError, match="expected at most 1 names"):
            kept.put("b", 6, 1.0)
        series = kept.series["a"]
        assert (series.values if make is Points else [value for _, value in series.items]) == [2.0]


def test_values_over_the_memory_budget_are_left_out():
    kept = BoundedSeries(Items, budget=100, names=9)
    kept.put("a", 1, "a", 60)
    with pytest.raises(ValueError, match="expected values within the memory budget"):
        kept.put("b", 1, "b", 60)
    kept.put("c", 1, "c", 40)
    assert set(kept.series) == {"a", "c"}


def test_problems_are_listed_at_the_top(tmp_path):
    measured(tmp_path, {1: 3.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "metrics": {"<b>": [], "train/loss": 2.0}}\n{"step": 3, "met')
    run = read_run(tmp_path)
    assert run.curves == {"train/loss": ([1, 2], [3.0, 2.0])}
    line = "metrics.jsonl: line 2, metrics '&lt;b&gt;': expected a number, got a list of 0 (1 more in this file)"
    assert f"<h2>Problems</h2><ul><li>{line}</li></ul>".replace("'", "&#x27;") in page(run)


# The command


def test_command_writes_the_page_to_the_run_folder_or_out(tmp_path, capsys):
    measured(tmp_path, {1: 1.0})
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_command_writes_the_page_of_several_runs_to_the_current_folder(tmp_path, capsys, monkeypatch):
    compared(tmp_path, "runs/a", "runs/b")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the first page is not among the runs
        assert cli.main(["report", *map(str, (tmp_path / "runs").iterdir())]) == 0
        assert capsys.readouterr().out == "report.html\n"
    assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_command_prints_errors_with_an_exit_code(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == (
        f"fxtrain report: expected a run folder, got {tmp_path / 'nothing'} (No such file or directory). Check the "
        "path.\n"
    )
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "fxtrain report: expected the folder of a run, got none. Name at least one.\n"
    measured(tmp_path, {1: 1.0})
    page = tmp_path / "no" / "page.html"
    assert cli.main(["report", str(tmp_path), "--out", str(page)]) == 1
    assert capsys.readouterr().err == (
        f"fxtrain report: expected a writable path for the page, got {page} (No such file or directory). Choose "
        "another one with --out.\n"
    )


def test_command_exits_with_2_in_a_subprocess(tmp_path):
    done = subprocess.run([sys.executable, "-m", "fxtrain", "report", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "got none of metrics.jsonl, metrics.csv" in done.stderr
