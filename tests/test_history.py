"""The history of a run: its recorded curves and their plots."""

import builtins
import io
import math
import sys

import matplotlib as mpl
import notebook
import numpy as np
import problem
import pytest

import fxtrain as fx
from fxtrain.loop._history import HistoryRecorder

mpl.use("agg")


class Recorded(fx.History):
    """A history with its recorder."""

    def __init__(self):
        self.recorder = HistoryRecorder()
        super().__init__(self.recorder.points)


@pytest.fixture
def history():
    made = Recorded()
    for step in range(1, 101):
        made.recorder.add(step, {"train/loss": 1 / step, "train/accuracy": 0.5, "lr": 0.1})
        if step % 20 == 0:
            made.recorder.add(step, {"eval/loss": 2 / step, "eval/auc": 0.9})
    return made


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


# Recording


def test_history_records_only_scalars(history):
    history.recorder.add(101, {"train/loss": 7, "ok": True, "text": fx.values.Text("hello")})
    assert history["train/loss"].steps.tolist() == list(range(1, 102))
    assert history["train/loss"].values.dtype == np.float64
    assert history["eval/loss"].steps.tolist() == [20, 40, 60, 80, 100]
    assert "text" not in history
    assert list(history) == ["eval/auc", "eval/loss", "lr", "ok", "train/accuracy", "train/loss"]
    assert repr(history).splitlines()[:2] == ["History of 6 curves", "  eval/auc: 5 points, last 0.9"]


def test_later_value_replaces_point_of_same_step():
    history = Recorded()
    for step, value in [(1, 1.0), (3, 3.0), (3, 4.0), (2, 2.0), (1, 0.5)]:
        history.recorder.add(step, {"eval/loss": value})
    assert history["eval/loss"].steps.tolist() == [1, 2, 3]
    assert history["eval/loss"].values.tolist() == [0.5, 2.0, 4.0]


def test_rewind_removes_abandoned_points(history):
    history.recorder.forget_after(30)
    assert history["train/loss"].steps[-1] == 30
    assert history["eval/loss"].steps.tolist() == [20]
    history.recorder.add(31, {"train/loss": 9.0})
    assert (history["train/loss"].steps[-1], history["train/loss"].values[-1]) == (31, 9.0)
    history.recorder.forget_after(10)
    assert "eval/loss" not in history
    assert "eval/loss" not in repr(history)


def test_error_for_missing_curve_lists_published_names(history):
    with pytest.raises(
        KeyError, match=r"expected a published name, got 'loss'.* Published: 'eval/auc', 'eval/loss', 'lr'"
    ):
        history["loss"]
    with pytest.raises(KeyError, match=r"got 'loss'. Published: nothing"):
        fx.History()["loss"]


# Plots


def test_train_and_eval_curves_share_first_panel(history):
    figure = history.plot()
    assert titles(figure) == ["loss", "eval/auc", "lr", "train/accuracy"]
    assert png(figure).startswith(b"\x89PNG")


def test_only_panels_with_several_curves_have_legends(history):
    shared, *others = history.plot().axes
    assert [text.get_text() for text in shared.get_legend().get_texts()] == ["train/loss", "eval/loss"]
    assert [axes.get_legend() for axes in others] == [None] * 3


def test_train_and_eval_curves_differ_in_style(history):
    train, evaluated = history.plot("*loss").axes[0].get_lines()
    assert (train.get_label(), evaluated.get_label()) == ("train/loss", "eval/loss")
    assert train.get_color() != evaluated.get_color()
    assert train.get_linewidth() < evaluated.get_linewidth()
    assert (train.get_marker(), evaluated.get_marker()) == ("", "o")
    assert train.get_zorder() <= evaluated.get_zorder()  # with equal z-order, later lines are drawn on top


def test_patterns_select_curves_without_duplicates(history):
    assert titles(history.plot("eval/*")) == ["eval/auc", "eval/loss"]
    figure = history.plot("lr", "*loss", "train/*")
    assert titles(figure) == ["loss", "lr", "train/accuracy"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 1, 1]


def test_error_for_unmatched_pattern_lists_published_names(history):
    with pytest.raises(KeyError, match=r"got '\*/lss', which matches none. Published: 'eval/auc', 'eval/loss', 'lr'"):
        history.plot("*loss", "*/lss")
    with pytest.raises(KeyError, match=r"got '\*', which matches none. Published: nothing"):
        fx.History().plot()


def test_non_finite_values_are_gaps():
    history = Recorded()
    for step, value in enumerate([1.0, math.nan, 2.0, math.inf, 3.0, -math.inf]):
        history.recorder.add(step, {"loss": value, "lost": math.nan})
    figure = history.plot()
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    assert np.array_equal(drawn, [1, np.nan, 2, np.nan, 3, np.nan], equal_nan=True)
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [[], ["no finite value"]]
    assert png(figure)
    assert math.isinf(history["loss"].values[3])  # plotting leaves the recorded values unchanged


def test_many_panels_use_three_columns_in_natural_order():
    history = Recorded()
    for number in range(20):
        history.recorder.add(1, {f"norm/layer.{number}.weight": 1.0})
    figure = history.plot()
    assert titles(figure) == [f"norm/layer.{number}.weight" for number in range(20)]
    assert figure.get_size_inches().tolist() == pytest.approx([13.5, 2.8 * 7])
    # The lowest panel of each column has the label "step", even if the last row is not full.
    assert [axes.get_xlabel() for axes in figure.axes] == [""] * 17 + ["step"] * 3
    assert png(figure)


def test_long_names_are_shortened_in_the_middle():
    history = Recorded()
    history.recorder.add(1, {"gradients/" + "a" * 50 + ".weight": 1.0})
    (title,) = titles(history.plot())
    assert title.startswith("gradients/aaa")
    assert title.endswith("aaa.weight")
    assert len(title) <= 46


def test_single_point_has_visible_marker():
    history = Recorded()
    history.recorder.add(1, {"train/loss": 1.0})
    assert history.plot().axes[0].get_lines()[0].get_marker() == "."


def test_plot_leaves_no_figure_open(history):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = history.plot()
    assert plt.get_fignums() == before  # a notebook would show an open figure twice
    assert isinstance(figure, mpl.figure.Figure)


def test_history_of_run_is_plotted():
    step = problem.step()
    result = fx.fit(
        problem.start(), step, problem.data(), epochs=2, eval_step=problem.eval_step, eval_data=problem.data()
    )
    figure = result.history.plot()
    assert titles(figure) == ["loss", "mae", "train/learning_rate"]
    assert [axes.get_lines()[1].get_xdata().tolist() for axes in figure.axes[:2]] == [[3, 6]] * 2


def test_error_without_matplotlib_says_what_to_install(history, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"plot requires matplotlib. Install it: pip install 'fxtrain\[plot"):
        history.plot()


def test_notebook_shows_figure_once(tmp_path):
    train = "result = fx.fit(state, step, [torch.ones(4, 1)], steps=30, progress=False)"
    made, drawn = notebook.outputs(tmp_path, f"{notebook.MODEL}\n    {train}", "result.history.plot()")
    assert made == []
    assert [list(output.data) for output in drawn] == [["text/plain", "image/png"]]


def test_repr_escapes_control_characters():
    history = Recorded()
    history.recorder.add(1, {"a\x1b[2J\n\u202e": 1.0})
    assert repr(history).splitlines() == ["History of 1 curves", "  a\\x1b[2J\\n\\u202e: 1 points, last 1"]


def test_history_has_every_step_with_and_without_observers():
    def watched(state, event: fx.StepEnd, control):
        pass

    def logging(state, event: fx.StepEnd):
        return state, fx.Control(log={"half": event.step / 2} if event.step % 2 else {})

    runs = [
        fx.fit(problem.start(), problem.step(), problem.data(), steps=150, observers=seen, callbacks=logged)
        for seen, logged in [([], []), ([watched], []), ([], [logging]), ([watched], [logging])]
    ]
    for run in runs:
        assert run.history["train/loss"].steps.tolist() == list(range(1, 151))
        assert run.history["train/loss"].values.tolist() == runs[0].history["train/loss"].values.tolist()
    assert runs[2].history["half"].values.tolist() == [step / 2 for step in range(1, 151, 2)]


# Frames


def test_frame_has_one_row_per_step_with_epoch_and_time():
    clock = iter(float(tick) for tick in range(10**6))
    result = problem.fit(
        epochs=2, steps=None, eval_step=problem.eval_step, eval_data=problem.data(), clock=lambda: next(clock)
    )
    frame = result.history.frame()
    assert list(frame.columns[:3]) == ["step", "epoch", "time"]
    assert set(frame.columns[3:]) == set(result.history)
    assert frame["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert frame["epoch"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert (np.diff(frame["time"]) > 0).all()
    assert frame["eval/loss"].notna().tolist() == [False, False, True] * 2
    assert frame["train/loss"].tolist() == result.history["train/loss"].values.tolist()


def test_frame_of_stream_has_epochs_once_their_length_is_known():
    step = problem.step()
    batches = problem.data()
    result = fx.fit(problem.start(), step, lambda: iter(batches), epochs=2)
    assert result.history.frame()["epoch"].tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_rewind_removes_abandoned_rows_and_times(history):
    epoch = fx.core.Epoch(done=0, start=0, length=10)
    recorded = HistoryRecorder()
    view = fx.History(recorded.points, clock=recorded.clock)
    for step in (1, 2, 3):
        recorded.add(step, {"loss": 1.0})
    recorded.mark([1, 2, 3], [(float(step), step, epoch) for step in (1, 2, 3)])
    recorded.forget_after(1)
    recorded.add(2, {"loss": 1.0})
    recorded.mark([2, 1], [(9.0, 2, epoch), (10.0, 1, epoch)])  # a late value of step 1 keeps its first time
    assert view.frame()["time"].tolist() == [1.0, 9.0]
    assert view.frame()["epoch"].tolist() == pytest.approx([0.1, 0.2])


def test_frame_of_nothing_is_empty():
    assert fx.History().frame().shape == (0, 3)


def test_error_without_pandas_says_what_to_install(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"frame requires pandas. Install it: pip install 'fxtrain\[frame\]'"):
        history.frame()


# Several runs


def other():
    made = Recorded()
    for step in range(1, 51):
        made.recorder.add(step, {"train/loss": 2 / step, "extra": 1.0})
    return made


def test_runs_share_panels_by_metric_with_a_color_each(history):
    figure = fx.plot({"adam": history, "sgd": other()}, "*loss")
    (axes,) = figure.axes
    assert titles(figure) == ["loss (thick: eval)"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["adam", "sgd"]
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["adam: train/loss", "sgd: train/loss", "adam: eval/loss"]
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    assert colors["adam: train/loss"] == colors["adam: eval/loss"] != colors["sgd: train/loss"]


def test_legend_of_one_metric_names_only_the_runs(history):
    (axes,) = fx.plot({"adam": history, "sgd": other()}, "train/loss").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["adam", "sgd"]


def test_metric_of_one_run_has_its_own_panel_with_the_name_of_the_run(history):
    figure = fx.plot({"adam": history, "sgd": other()}, "extra", "lr")
    assert {axes.get_legend().get_texts()[0].get_text() for axes in figure.axes} == {"adam", "sgd"}


def test_results_are_plotted_by_time_and_epoch():
    runs = {"first": problem.fit(steps=4), "second": problem.fit(steps=6)}
    figure = fx.plot(runs, "train/loss", x="time")
    assert figure.axes[0].get_xlabel() == "time (s)"
    first, second = fx.plot(runs, "train/loss", x="epoch").axes[0].get_lines()
    assert second.get_xdata().tolist() == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert len(first.get_xdata()) == 4


def test_log_scale_leaves_gaps_at_zero_and_below():
    history = fx.History({"loss": ([1, 2, 3], [1.0, 0.0, 0.1]), "negative": ([1, 2], [-1.0, 0.0])})
    first, second = history.plot(log=True).axes
    assert (first.get_yscale(), second.get_yscale()) == ("log", "linear")
    assert np.array_equal(first.get_lines()[0].get_ydata(), [1, np.nan, 0.1], equal_nan=True)
    assert png(history.plot(log=True))


def test_errors_of_plots_say_what_to_pass(history):
    with pytest.raises(TypeError, match=r"expected runs to be a mapping from names to results, got .* Pass a dict"):
        fx.plot([history])
    with pytest.raises(
        TypeError, match=r"expected a result or a history as run 'adam', got 3\. Pass the result of fit"
    ):
        fx.plot({"adam": 3})
    with pytest.raises(ValueError, match=r"expected at least one run to plot, got none"):
        fx.plot({})
    with pytest.raises(ValueError, match=r"expected x to be .*'step', 'epoch'.*'time'.*, got 'hours'"):
        history.plot(x="hours")
    with pytest.raises(ValueError, match=r"expected a history with the time of its steps, got none for 'the run'"):
        history.plot(x="time")
    with pytest.raises(KeyError, match=r"got 'x\*', which matches none. Published: 'eval/auc', 'eval/loss', 'extra'"):
        fx.plot({"adam": history, "sgd": other()}, "x*")
