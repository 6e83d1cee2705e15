"""Logged values: their validation, their publication by events, and their delivery to writers."""

import matplotlib.figure
import numpy as np
import optree
import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st

import fxtrain as fx
from fxtrain.core import NAMESPACE, Control, EvalBegin, EvalEnd, Logged, Saved, StepEnd
from fxtrain.values import KINDS_BY_NAME, Histogram, HParams, Text, is_kept, kind_of, published, simplified
from fxtrain.writers import multi

EDGES = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        Text("a"),
        fx.values.Table({"word": ["cat"]}),
        fx.values.ConfusionMatrix(torch.eye(2)),
        fx.values.Image(torch.zeros(1, 4, 4, 3)),
        fx.values.Figure(matplotlib.figure.Figure()),
    ],
)
@pytest.mark.parametrize("kind", KINDS_BY_NAME.values())
def test_kind_is_kept_if_its_values_can_be_converted(value, kind):
    assert is_kept(kind_of(value), {kind}) == (simplified(value, {kind}) is not None)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Text(3), TypeError, "expected markdown to be a string, got 3"),
        (lambda: Histogram(), ValueError, "got nothing"),
        (lambda: Histogram(counts=torch.ones(2)), ValueError, "got counts."),
        (lambda: Histogram(EDGES, counts=torch.ones(2), edges=EDGES), ValueError, "got values and counts and edges"),
        (lambda: Histogram([1.0]), TypeError, "expected values of Histogram to be a real tensor, got a list"),
        (lambda: Histogram(torch.ones(2, dtype=torch.complex64)), TypeError, "got a complex64 tensor"),
        (lambda: Histogram(counts=torch.ones(3), edges=EDGES), ValueError, "got [3] and [3]"),
        (lambda: HParams([1]), TypeError, "expected HParams of a mapping, got a list"),
        (lambda: HParams({"a": {2: "x"}}), TypeError, "expected string keys in a, got 2"),
        (
            lambda: HParams({"optim": {"betas": (0.9, EDGES)}}),
            TypeError,
            "expected optim/betas/1 to be a string, number, bool or None, or a list or mapping of these, got a float32",
        ),
        (lambda: HParams({"a/b": 1, "a": {"b": 2}}), ValueError, "distinct names, got 'a/b' twice"),
    ],
)
def test_invalid_values_are_refused(make, error, says):
    with pytest.raises(error) as caught:
        make()
    assert says in str(caught.value)


def test_flat_hparams_keep_order_and_types_without_empty_branches():
    nested = {"b": True, "a": {"y": 1, "x": {"deep": "s"}, "none": {}}, "c": 0.5}
    assert list(HParams(nested).flat().items()) == [("b", True), ("a/y", 1), ("a/x/deep", "s"), ("c", 0.5)]


@given(st.lists(st.floats(width=32), max_size=50), st.integers(1, 40))
def test_every_finite_value_is_in_one_bucket(values, num):
    counts, edges = Histogram(torch.tensor(values)).buckets(num)
    finite = [value for value in values if np.isfinite(value)]
    assert counts.sum() == len(finite)
    assert counts.shape == (num,)
    assert (np.diff(edges) > 0).all()
    if finite:
        assert edges[0] <= min(finite)
        assert max(finite) <= edges[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_histogram_accepts_any_real_dtype_and_shape(dtype):
    values = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    assert Histogram(values.requires_grad_(values.is_floating_point())).buckets(2)[0].tolist() == [1, 3]


def test_given_buckets_are_kept_and_must_increase():
    counts, edges = Histogram(counts=torch.tensor([3, 0]), edges=EDGES).buckets(7)
    assert (counts.tolist(), edges.tolist()) == ([3.0, 0.0], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="expected edges to increase"):
        Histogram(counts=torch.tensor([3, 0]), edges=torch.tensor([0.0, 2.0, 1.0])).buckets()


@pytest.mark.parametrize("histogram", [Histogram(EDGES), Histogram(counts=torch.ones(2), edges=EDGES)], ids=repr)
def test_histogram_is_a_pytree_node_for_optree_and_torch(histogram):
    for flatten, unflatten in (
        (lambda x: optree.tree_flatten(x, namespace=NAMESPACE), optree.tree_unflatten),
        (torch_pytree.tree_flatten, lambda spec, leaves: torch_pytree.tree_unflatten(leaves, spec)),
    ):
        leaves, spec = flatten(histogram)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        again = unflatten(spec, leaves)
        assert np.array_equal(again.buckets()[0], histogram.buckets()[0])


def test_compiled_and_vmapped_steps_return_histograms():
    def step(state, batch):
        counts = torch.stack([(batch < 1).sum(), (batch >= 1).sum()])
        log = {"all": Histogram(2 * batch), "split": Histogram(counts=counts, edges=EDGES.clone())}
        return state, fx.StepOutput({"loss": batch.sum()}, Control(log=log))

    state, batch = fx.init(torch.nn.Identity()), torch.tensor([0.5, 1.0, 1.5])
    log = fx.compile(step, backend="aot_eager")(state, batch)[1].control.log
    assert log["split"].value.counts.tolist() == [1, 2]
    assert log["all"].value.values.tolist() == [1.0, 2.0, 3.0]

    split = torch.vmap(lambda batch: step(state, batch)[1].control.log["split"].value)
    assert split(torch.stack([batch, batch + 1])).counts.tolist() == [[1, 2], [0, 3]]


def test_events_publish_metrics_and_logs():
    log = Control(log={"lr": 0.1, "note": Text("hello"), "steps": np.float32(3), "t": torch.tensor(2.0)})
    expected = {"lr": 0.1, "note": Text("hello"), "steps": 3.0, "t": 2.0}
    assert published(StepEnd(step=1, metrics={"loss": 2.0}), log) == {"train/loss": 2.0, **expected}
    assert published(EvalEnd(step=1, metrics={"loss": 2.0}), Control()) == {"eval/loss": 2.0}
    assert published(Saved(step=1, path="p", metrics={"loss": 2.0}), log) == expected
    assert published(EvalBegin(step=1), Control()) == {}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", "as 'x', got 'text'. Wrap it in Text."),
        (torch.zeros(2, 3), "as 'x', got a float32 tensor of shape [2, 3]. Reduce it to a scalar"),
        (None, "as 'x', got None. Wrap it in one of Text, "),
    ],
)
def test_unpublishable_values_are_refused(value, says):
    with pytest.raises(TypeError) as caught:
        published(EvalBegin(step=1), Control(log={"x": Logged(value, owner="watcher")}))
    assert str(caught.value).startswith("expected watcher to log")
    assert says in str(caught.value)


def test_logged_name_of_a_metric_is_refused():
    with pytest.raises(ValueError, match=r"expected watcher to log .* got 'train/loss', a metric of StepEnd"):
        published(StepEnd(step=1, metrics={"loss": 2.0}), Control(log={"train/loss": Logged(1.0, owner="watcher")}))


class Recorder:
    """A writer with only the methods of clu's writers."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("write_"):
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, *args))


def test_each_kind_is_written_by_its_method():
    writer = Recorder()
    log = multi(writer)
    log.write(7, {})
    assert writer.calls == []
    values = {"a": 1.0, "b": Text("*b*"), "c": Histogram(EDGES), "d": HParams({"lr": 1}), "e": 2}
    log.write(7, values)
    scalars, texts, histograms, hparams = writer.calls
    assert scalars == ("write_scalars", 7, {"a": 1.0, "e": 2})
    assert texts == ("write_texts", 7, {"b": "*b*"})
    assert histograms[:2] == ("write_histograms", 7)
    assert histograms[2]["c"].tolist() == [0.0, 1.0, 2.0]  # a plain array, as clu's writers expect
    assert hparams == ("write_hparams", {"lr": 1})


def test_writer_without_purge_warns_past_step_0():
    multi(Recorder()).purge(0)
    with pytest.warns(RuntimeWarning, match=r"Recorder has no purge.*after step 5"):
        multi(Recorder()).purge(5)
