"""What notebooks show: HTML that is escaped, self-contained, short, and never fails."""

import re

import problem
import pytest
import torch
from pages import HOSTILE, Page, shown

import fxtrain as fx
import fxtrain.core._state_view


def test_state_is_a_tree_with_totals_and_values_of_scalars():
    state = fx.init(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)), fx.optim.adam(0.1), seed=7)
    text = shown(state.replace(step=torch.tensor(120)))
    assert "step 120, seed 7, position 0; due: begin_epoch" in text
    assert "params 12 parameters in 4 tensors, 48 B, float32" in text
    assert "opt_state 28 elements in 9 tensors, 128 B, int64, float32" in text
    assert "num_batches_tracked [] int64 8 B 0" in text
    assert Page(state._repr_html_()).tags.count("details") > 4


def test_names_in_state_are_escaped():
    state = problem.start().replace(params={HOSTILE: torch.zeros(2)})
    assert "<script>alert(1)</script>" in shown(state.with_slot(HOSTILE, torch.tensor(1)))


def test_large_state_is_short():
    params = {f"blocks.{index}.{part}.weight": torch.zeros(8) for index in range(1000) for part in "abc"}
    state = problem.start().replace(params=params, opt_state=(params, params))
    assert len(state._repr_html_()) < 120_000
    assert "params 24,000 parameters in 3,000 tensors" in shown(state)
    assert "and 2850 more tensors" in shown(state).replace(",", "")
    assert len(repr(state).splitlines()) < 50


def test_donated_state_is_shown_as_such():
    state = problem.start()
    fx.core.invalidate(state, "<step train_step>")
    assert shown(state).strip() == "TrainState donated to <step train_step>, which reused its memory"


def test_freed_and_meta_tensors_are_shown_as_such():
    freed = torch.ones(1000)
    freed.untyped_storage().resize_(0)
    state = problem.start().replace(params={"freed": freed, "meta": torch.zeros(5, device="meta")})
    assert "freed [1000] float32 3.9 KiB memory freed" in shown(state)
    assert "meta [5] float32 20 B no value on meta" in shown(state)


def test_sparse_and_nested_tensors_are_shown():
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    state = problem.start().replace(params={"sparse": torch.eye(3).to_sparse(), "ragged": ragged})
    assert "sparse [3, 3] float32 12 B" in shown(state)
    assert "ragged nested float32" in shown(state)
    assert "state.params['sparse']" in repr(state)


def test_state_inside_transform_is_shown_without_values():
    state, pages = problem.start(), []

    def look(weight):
        pages.append(state.replace(params={"w": weight}, step=weight.sum())._repr_html_())
        return weight

    torch.func.vmap(look)(torch.ones(3, 2))
    assert "params" in pages[0]
    assert "cannot be shown" not in pages[0]


def test_error_while_drawing_is_shown_in_its_place(monkeypatch):
    monkeypatch.setattr(fx.core._state_view, "state_view", lambda state: 1 / 0)
    assert "TrainState cannot be shown: ZeroDivisionError: division by zero" in shown(problem.start())


# Runs


def test_composed_callbacks_are_a_matrix_of_events_with_slots():
    def stop(state, event: fx.EvalEnd):
        return state, fx.Control()

    stop.__name__ = HOSTILE
    composed = fx.compose(fx.callbacks.nan_guard(), fx.callbacks.early_stopping("loss", patience=2), stop)
    text = shown(composed)
    assert "3 callbacks callback Gradients StepEnd EvalEnd slots nan_guard ● ● nan_guard early_stopping ●" in text
    assert "<script>alert(1)</script>" in text
    assert "and 250 more callbacks" in shown(fx.compose(*[stop] * 300))
    assert shown(fx.compose()).strip() == "0 callbacks"


def test_result_and_history_draw_each_curve():
    result = problem.fit(steps=4, eval_step=problem.eval_step, eval_data=problem.data())
    assert "Result at step 4 reached 4 steps; " in shown(result)
    assert Page(result._repr_html_()).tags.count("polyline") == Page(result.history._repr_html_()).tags.count(
        "polyline"
    )
    last = f"{result.history['eval/loss'].values[-1]:.4f}"
    assert last in shown(result.history)


def test_result_whose_state_was_donated_is_shown():
    result = problem.fit(steps=2)
    fx.core.invalidate(result.state, "<step>")
    assert repr(result).startswith("Result whose state was donated: reached 2 steps\n")
    assert "Result whose state was donated" in shown(result)


def test_history_with_extreme_values_is_drawn():
    history = fx.History(
        {
            HOSTILE: ([1, 2, 3], [float("nan"), float("inf"), 1.0]),
            "wide": ([1, 2, 3], [-1.7e308, 0.0, 1.7e308]),
            "flat": ([1, 2], [3.0, 3.0]),
        }
    )
    assert "<script>alert(1)</script>" in shown(history)
    assert "nan," not in history._repr_html_()


def test_history_of_many_long_curves_is_short():
    points = list(range(100_000))
    history = fx.History({f"norm/{index}": (points, points) for index in range(100)})
    assert len(history._repr_html_()) < 150_000
    assert "and 60 more curves" in shown(history)


def saved(checkpoints, steps, **options):
    for step in steps:
        checkpoints.save(problem.start().replace(step=torch.tensor(step)), {"loss": abs(step - 3.0)}, **options)
    checkpoints.wait()


def test_checkpointer_lists_steps_roles_sizes_and_metrics(tmp_path):
    with fx.checkpointer(tmp_path / HOSTILE.replace("/", "|"), keep=2, best="loss") as checkpoints:
        assert "no checkpoints" in shown(checkpoints)
        saved(checkpoints, range(1, 8))
        text = shown(checkpoints)
    assert "3 checkpoints" in text
    assert re.search(r"7 trajectory, latest \S+ \S+ \S+ KiB 4.0000 6 trajectory .* 3 trajectory, best", text)


def test_view_of_checkpointer_shows_the_newest_and_the_best(tmp_path):
    with fx.checkpointer(tmp_path, keep=None, best="loss") as checkpoints:
        saved(checkpoints, range(1, 31))
        text = shown(checkpoints)
    assert "30 checkpoints" in text
    assert "3 trajectory, best" in text
    assert "and 10 more checkpoints" in text


def test_view_of_checkpointer_survives_damage(tmp_path):
    with fx.checkpointer(tmp_path, keep=None, best="loss") as checkpoints:
        saved(checkpoints, [1, 2, 3])
        for path, content in zip(sorted(tmp_path.glob("*-step-*")), [b"", b"[1]\n", b"\xff" * 100], strict=True):
            (path / "manifest.jsonl").write_bytes(content)
        assert "3 trajectory, latest" in shown(checkpoints)


# Data


def test_source_of_arrays_shows_shapes_without_a_read():
    data = fx.data.batches({HOSTILE: torch.zeros(100, 3), "y": torch.zeros(100, dtype=torch.int64)}, 8)
    text = shown(data)
    assert "IndexedBatches 12 batches per epoch, 8 examples per batch, 100 examples" in text
    assert "batch['y'] [8] int64 64 B" in text
    assert repr(data) == "<IndexedBatches: 12 batches per epoch, 8 examples per batch, 100 examples>"


def test_view_of_source_runs_no_function_of_the_user():
    reads = []
    data = fx.data.batches(torch.zeros(100, 3), 8).map(lambda batch: reads.append(1) or {"x": batch})
    assert "The shapes of a batch are known once one is read" in shown(data)
    assert not reads
    data[5]
    assert "batch['x'] [8, 3] float32 96 B" in shown(data)
    assert len(reads) == 1


def test_source_without_known_length_is_shown():
    data = fx.data.from_iterable(iter([torch.zeros(2)]))
    assert repr(data) == "<IterableBatches: epochs of unknown length>"
    assert "unknown length" in shown(data)


# Notebooks


def shown_objects():
    state, values = problem.start(), fx.values
    donated = problem.start()
    fx.core.invalidate(donated, "<step>")
    return {
        "state": state,
        "donated": donated,
        "diff": state.diff(state),
        "summary": fx.summary(state),
        "composed": fx.compose(fx.callbacks.nan_guard()),
        "checkpointer": fx.checkpointer("nowhere"),
        "history": fx.History({"loss": ([1], [0.5])}),
        "result": fx.Result(state, state, "done", fx.History()),
        "image": values.Image(torch.zeros(1, 8, 8, 1)),
        "video": fx.values.Video(torch.zeros(2, 8, 8, 4)),
        "audio": values.Audio(torch.zeros(10), rate=10),
        "table": values.Table({"x": [1]}),
        "text": values.Text("text"),
        "matrix": values.ConfusionMatrix(torch.eye(2)),
        "histogram": values.Histogram(torch.ones(3)),
        "data": fx.data.batches(torch.zeros(4, 2), 2),
    }


def test_notebooks_get_plain_text_beside_html():
    formatters = pytest.importorskip("IPython.core.formatters")
    for name, value in shown_objects().items():
        bundle, _ = formatters.DisplayFormatter().format(value)
        assert sorted(bundle) == ["text/html", "text/plain"], name
        assert bundle["text/plain"] == repr(value)
        assert len(bundle["text/html"]) < 15_000, name
        assert "cannot be shown" not in bundle["text/html"], name


def test_source_of_a_user_is_shown_before_its_own_init_is_done():
    class Mine(fx.data.Source):
        def __init__(self):
            self.text = repr(self)
            self.reference = 3  # names that a view needs are not taken
            super().__init__()

        epoch_length = 3

        def fetch(self, position):
            return torch.zeros(2, 5)

    data = Mine()
    assert data.text == repr(data) == "<Mine: 3 batches per epoch>"
    data[0]
    assert "batch [2, 5] float32 40 B" in shown(data)
