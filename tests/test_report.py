"""The report reads run folders in any state, in bounded memory."""

import itertools
import json

import pytest
import torch
from run_folders import data, measured, panels, session

from fxtrain import EvalEnd, FitBegin, FitEnd, Interrupted, Rewound, Saved, StepEnd, observers, writers
from fxtrain.core import Control
from fxtrain.report import RunFolderError, page, read_run
from fxtrain.report._downsampling import BoundedSeries, Items, Points, evenly, thinned
from fxtrain.values import HParams, Image, Table, Text

pytestmark = pytest.mark.usefixtures("without_pyav")  # videos are GIFs


def marked(run):
    return [(mark.step, mark.kind) for mark in run.marks]


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


# Bounded memory


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
