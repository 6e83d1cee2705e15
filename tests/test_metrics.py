"""Metrics: merging matches one pass over all data, and values match clu except where clu is inaccurate."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain import metrics, tree
from fxtrain.metrics import Accuracy, Average, Collection, LastValue, Metric, Std, Sum

SIMPLE = [Average, LastValue, Std, Sum]
NAN_WHEN_EMPTY = [Average, Accuracy, LastValue, Std]


def batch(seed, *, count=8, classes=3, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "loss": torch.randn(count, generator=generator) + offset,
        "logits": torch.randn(count, classes, generator=generator),
        "labels": torch.randint(classes, (count,), generator=generator),
        "mask": torch.rand(count, generator=generator) < 0.7,
    }


def of(cls, values, mask=None):
    return cls.from_model_output(torch.as_tensor(values), mask=mask)


def close(first, second, tolerance=1e-12):
    leaves = zip(tree.leaves(first), tree.leaves(second), strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in leaves)


# The laws

BATCHES = st.lists(st.floats(-1e6, 1e6, width=32), max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float32))


@pytest.mark.parametrize("cls", SIMPLE)
@given(a=BATCHES, b=BATCHES, c=BATCHES)
@settings(max_examples=40, deadline=None)
def test_merge_is_associative_with_empty_as_identity(cls, a, b, c):
    a, b, c = (of(cls, values) for values in (a, b, c))
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)), 1e-9)
    assert close(a.merge(cls.empty()), a)
    assert close(cls.empty().merge(a), a)


@pytest.mark.parametrize("cls", [Average, Std, Sum])
@given(a=BATCHES, b=BATCHES)
@settings(max_examples=40, deadline=None)
def test_merge_is_commutative(cls, a, b):
    a, b = of(cls, a), of(cls, b)
    assert all(map(torch.equal, tree.leaves(a.merge(b)), tree.leaves(b.merge(a))))


REFERENCE = {Average: np.mean, Std: np.std, Sum: np.sum}


@pytest.mark.parametrize("cls", list(REFERENCE))
@given(parts=st.lists(BATCHES, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_merged_batches_match_one_pass(cls, parts):
    metric = functools.reduce(lambda total, values: total.update(values), parts, cls.empty())
    together = torch.cat(parts).double().numpy()
    expected = REFERENCE[cls](together) if len(together) or cls is Sum else math.nan
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("cls", [*SIMPLE, Accuracy])
def test_empty_metric_computes_without_error(cls):
    value = cls.empty().compute()
    assert (value.shape, value.dtype) == ((), torch.float32)
    assert bool(value.isnan()) == (cls in NAN_WHEN_EMPTY)
    assert all(leaf.dtype == torch.float64 and leaf.shape == () for leaf in tree.leaves(cls.empty()))
    assert len({leaf.data_ptr() for leaf in tree.leaves(cls.empty())}) == len(tree.leaves(cls.empty()))
    assert {leaf.device for leaf in tree.leaves(cls.empty(device="meta"))} == {torch.device("meta")}


# Against clu


@pytest.fixture
def clu_collection(monkeypatch):
    import jax

    jax.config.update("jax_platforms", "cpu")
    from clu import metrics as clu  # imported lazily, because it takes seconds

    # clu's Std passes a_min, which newer versions of JAX lack.
    monkeypatch.setattr(jax.numpy, "clip", lambda x, a_min: jax.numpy.maximum(x, a_min))
    return clu.Collection.create(
        loss=clu.Average.from_output("loss"),
        deviation=clu.Std.from_output("loss"),
        last=clu.LastValue.from_output("loss"),
        accuracy=clu.Accuracy,
        doubled=clu.Average.from_fun(doubled),
    )


def doubled(loss, **_):
    return {"values": loss * 2}


OURS = Collection.create(
    loss=Average.from_output("loss"),
    deviation=Std.from_output("loss"),
    last=LastValue.from_output("loss"),
    accuracy=Accuracy,
    doubled=Average.from_fun(doubled),
)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("value_of", ["example", "batch"])
def test_metrics_match_clu(clu_collection, masked, value_of):
    ours, total = OURS.empty(), clu_collection.empty()
    for seed in range(12):
        outputs = batch(seed)
        if not masked:
            del outputs["mask"]
        if value_of == "batch":
            outputs["loss"] = outputs["loss"].mean()
        ours = ours.merge(OURS.single_from_model_output(**outputs))
        arrays = {name: value.numpy() for name, value in outputs.items()}
        arrays["labels"] = arrays["labels"].astype(np.int32)
        total = total.merge(clu_collection.single_from_model_output(**arrays))
        assert {k: float(v) for k, v in ours.compute().items()} == pytest.approx(
            {k: float(v) for k, v in total.compute().items()}, rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_std_is_accurate_under_large_offset(clu_collection, offset):
    ours, total, seen = Std.empty(), clu_collection.empty(), []
    for seed in range(12):
        outputs = batch(seed, offset=offset)
        seen.append(outputs["loss"].double())
        ours = ours.update(outputs["loss"])
        arrays = {name: value.numpy() for name, value in outputs.items()} | {"labels": np.zeros(8, np.int32)}
        total = total.merge(clu_collection.single_from_model_output(**{**arrays, "mask": np.ones(8, bool)}))
    right = float(torch.cat(seen).std(correction=0))
    assert float(ours.compute()) == pytest.approx(right, rel=1e-6)
    assert abs(float(total.compute()["deviation"]) - right) > 0.05 * right


def test_sums_exceed_float32_precision():
    ones = Average(torch.tensor(2.0**24, dtype=torch.float64), torch.tensor(2.0**24, dtype=torch.float64))
    for _ in range(3):
        ones = ones.update(torch.tensor(1.0))
    assert int(ones.count) == int(ones.total) == 2**24 + 3
    assert float(of(Std, torch.tensor([1e9, 1e9 + 1], dtype=torch.float64)).compute()) == pytest.approx(0.5)


# Inputs and results


@pytest.mark.parametrize(
    ("shape", "mask"),
    [((4,), (4,)), ((4, 3), (4,)), ((4, 3), (4, 3)), ((4, 3, 2), (4, 3)), ((4, 3), ())],
)
def test_mask_broadcasts_over_leading_dimensions(shape, mask):
    values = torch.randn(shape)
    kept = torch.rand(mask) < 0.5
    chosen = values[kept.reshape(*mask, *[1] * (len(shape) - len(mask))).expand(shape)].double()
    assert float(of(Average, values, kept).compute()) == pytest.approx(float(chosen.mean()), nan_ok=True)
    poisoned = torch.where(kept.reshape(*mask, *[1] * (len(shape) - len(mask))), values, torch.nan)
    for cls in SIMPLE:
        assert close(of(cls, poisoned, kept), of(cls, values, kept))
        assert close(of(cls, values, kept.float()), of(cls, values, kept))


def test_last_value_skips_empty_batches():
    first, last = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 6.0])
    metric = of(LastValue, first).merge(of(LastValue, last, torch.tensor([True, False])))
    assert float(metric.compute()) == 5.0
    assert float(metric.update(first, torch.zeros(2, dtype=torch.bool)).compute()) == 5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_accumulation_is_wide_and_result_has_default_dtype(dtype):
    values = torch.tensor([1, 0, 1, 1]).to(dtype)
    for cls, expected in ((Average, 0.75), (Sum, 3.0), (Std, math.sqrt(3) / 4)):
        value = of(cls, values).compute()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert of(Average, values).compute().dtype == torch.float64
        torch.set_default_dtype(torch.bfloat16)
        assert of(Average, values).compute().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_metrics_are_detached_from_autograd():
    loss = torch.ones(3, requires_grad=True) * 2
    assert not any(leaf.requires_grad for leaf in tree.leaves([of(cls, loss) for cls in SIMPLE]))
    assert not any(leaf.requires_grad for leaf in tree.leaves(metrics.lift({"loss": loss.sum()}, 1)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: of(Average, torch.zeros(4), torch.ones(3)),
            ValueError,
            r"a mask with .* the values, \[4\], got shape \[3\]",
        ),
        (lambda: of(Std, torch.zeros(4), torch.ones(4, 2)), ValueError, r"the values, \[4\], got shape \[4, 2\]"),
        (
            lambda: Accuracy.from_model_output(logits=torch.zeros(4, 3), labels=torch.zeros(4, 3, dtype=torch.int64)),
            ValueError,
            r"logits of shape \[4, 3\] and labels of shape \[4, 3\]\. Convert one-hot labels",
        ),
        (
            lambda: Accuracy.from_model_output(logits=torch.zeros(4, 3), labels=torch.zeros(4)),
            TypeError,
            "expected labels to be class indices of an integer dtype, got a float32 tensor",
        ),
        (
            lambda: Average.from_output("loss").from_model_output(x=1),
            KeyError,
            "expected the model output 'loss', got x",
        ),
        (lambda: Collection.create(), ValueError, "expected at least one metric, got none"),
        (lambda: Collection.create(merge=Average), ValueError, "not an attribute of Collection, got 'merge'"),
        (lambda: Collection.create(loss=3), TypeError, "expected loss to be a subclass of Metric, got 3"),
        (
            lambda: metrics.lift({"loss": 1.0}, 1),
            TypeError,
            r"expected the metric 'loss' to be a tensor of shape .*, got 1\.0",
        ),
        (
            lambda: metrics.lift({"loss": torch.ones(2)}, 1),
            TypeError,
            r"'loss' .*, got a float32 tensor of shape \[2\]",
        ),
        (lambda: metrics.merge({"a": Sum.empty()}, {"b": Sum.empty()}), ValueError, "'a' .*, got Sum and absent"),
        (lambda: metrics.merge({}, {"b": Sum.empty()}), ValueError, "'b' .*, got absent and Sum"),
        (lambda: metrics.merge({"a": Sum.empty()}, {"a": Std.empty()}), ValueError, "'a' .*, got Sum and Std"),
        (
            lambda: metrics.compute({"a/b": torch.tensor(1), "a": Collection.create(b=Sum).empty()}),
            ValueError,
            "expected distinct metric names, got 'a/b' twice",
        ),
        (lambda: Metric.from_model_output(), NotImplementedError, "expected Metric to define from_model_output"),
    ],
)
def test_invalid_input_is_rejected(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Derived and custom classes


def test_derived_classes_are_cached_and_named():
    assert Average.from_output("loss") is Average.from_output("loss")
    assert Average.from_fun(doubled) is Average.from_fun(doubled)
    assert Collection.create(a=Sum) is Collection.create(a=Sum)
    assert Average.from_output("loss").__name__ == "Average.from_output('loss')"
    assert issubclass(Std.from_fun(doubled), Std)
    assert repr(OURS) == "<class 'fxtrain.metrics.Collection(loss, deviation, last, accuracy, doubled)'>"


def test_mask_from_function_overrides_mask_of_outputs():
    outputs = {"x": torch.tensor([1.0, 2.0, 3.0]), "mask": torch.tensor([True, True, False])}
    for function, expected in (
        (lambda x, **_: x, 1.5),
        (lambda x, **_: {"values": x}, 1.5),
        (lambda x, **_: {"values": x, "mask": x > 2}, 3.0),
        (lambda x, **_: {"values": x, "mask": None}, 2.0),
        (lambda x, **_: x.sum(), 6.0),
    ):
        assert float(Average.from_fun(function).from_model_output(**outputs).compute()) == expected
    chained = Average.from_output("head").from_fun(lambda x, **_: {"head": x, "mask": x < 2})
    assert float(chained.from_model_output(**outputs).compute()) == 1.0


def test_custom_metrics_compose():
    class GeometricMean(Average):
        @classmethod
        def from_model_output(cls, values, mask=None, **_):
            return super().from_model_output(values.log(), mask)

        def compute(self):
            return super().compute().exp()

    class Largest(Metric):
        value: torch.Tensor

        @classmethod
        def empty(cls, *, device=None):
            return cls(torch.full((), -torch.inf, device=device))

        @classmethod
        def from_model_output(cls, values, **_):
            return cls(values.amax())

        def merge(self, other):
            return type(self)(torch.maximum(self.value, other.value))

        def compute(self):
            return self.value

    pair = Collection.create(mean=GeometricMean.from_output("x"), largest=Largest.from_output("x"))
    total = pair.empty().update(x=torch.tensor([1.0, 4.0])).update(x=torch.tensor([16.0]))
    assert {name: float(value) for name, value in total.compute().items()} == pytest.approx({"mean": 4, "largest": 16})
    assert tree.paths(total, "total")[-1] == "total.largest.value"
    with pytest.raises(AttributeError, match="cannot assign"):
        total.largest = None


# lift, merge, compute


def test_averages_are_weighted_and_nested_names_joined():
    nested = Collection.create(inner=OURS, sum=Sum.from_output("loss"))
    first = {"loss": torch.tensor(1.0, dtype=torch.bfloat16), "all": nested.from_model_output(**batch(0))}
    second = {"loss": torch.tensor(4.0, dtype=torch.bfloat16), "all": nested.from_model_output(**batch(1))}
    total = metrics.merge(metrics.lift(first, torch.tensor(6.0)), metrics.lift(second, 2))
    values = metrics.compute(total)
    assert float(values["loss"]) == 1.75
    assert list(values) == ["loss", *(f"all/inner/{name}" for name in OURS.classes), "all/sum"]
    assert float(values["all/sum"]) == pytest.approx(
        sum(float((b["loss"] * b["mask"]).sum()) for b in map(batch, range(2))), rel=1e-6
    )
    assert metrics.compute({"loss": first["loss"]})["loss"] is first["loss"]


@given(value=st.floats(width=32), weight=st.integers(1, 2**29))
@settings(max_examples=60, deadline=None)
def test_lifted_value_is_restored_exactly(value, weight):
    value = torch.tensor(value, dtype=torch.float32)
    assert torch.equal(metrics.compute(metrics.lift({"x": value}, weight))["x"], value) or bool(value.isnan())


def test_zero_weight_batch_is_ignored_even_if_nan():
    total = metrics.merge(metrics.lift({"x": torch.tensor(3.0)}, 2), metrics.lift({"x": torch.tensor(torch.nan)}, 0))
    assert float(metrics.compute(total)["x"]) == 3.0
    weight = torch.tensor(2.0)
    lifted = metrics.lift({"x": torch.tensor(1.0), "y": torch.tensor(1.0)}, weight)
    storages = [leaf.data_ptr() for leaf in tree.leaves(lifted)]
    assert len({*storages, weight.data_ptr()}) == len(storages) + 1


# Inside the step


def step(total, scale, outputs):
    def objective(scale):
        loss = outputs["loss"] * scale
        new = OURS.single_from_model_output(**{**outputs, "loss": loss})
        return loss.square().mean(), (new, metrics.lift({"loss": loss.mean(), "all": new}, loss.shape[0]))

    grad, (new, lifted) = torch.func.grad(objective, has_aux=True)(scale)
    return total.merge(new), metrics.compute(metrics.merge(lifted, lifted)), grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_metrics_run_inside_a_compiled_step(backend):
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ours, theirs = OURS.empty(), OURS.empty()
    for seed in range(3):
        ours, values, _ = compiled(ours, torch.tensor(2.0), batch(seed))
        theirs, expected, _ = step(theirs, torch.tensor(2.0), batch(seed))
        assert isinstance(ours, OURS)
        assert close(values, expected, 1e-6)
    assert close(ours, theirs, 1e-6)


def test_vmapped_metrics_match_single_ones():
    members = [batch(seed) for seed in range(3)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *members)
    scales = torch.arange(1.0, 4.0)
    empty = tree.map(lambda leaf: leaf.expand(3), OURS.empty())
    total, values, _ = torch.func.vmap(step)(empty, scales, stacked)
    for index, member in enumerate(members):
        alone = step(OURS.empty(), scales[index], member)[:2]
        assert close(tree.map(lambda leaf, i=index: leaf[i], (total, values)), alone, 1e-6)
