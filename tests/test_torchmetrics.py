"""Metrics of torchmetrics as mergeable metrics: equal to torchmetrics itself, batch by batch and in any grouping."""

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import metrics

torchmetrics = pytest.importorskip("torchmetrics")
from torchmetrics import classification, regression, retrieval, text, wrappers  # noqa: E402

SIZES = (5, 1, 8, 3)
CLASSES = 3


def batches(kind, seed=0):
    """Returns the arguments of ``update`` for batches of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        logits = torch.randn(size, CLASSES, generator=generator)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        values = torch.randn(size, generator=generator)
        return {
            "classes": (logits.softmax(-1), labels),
            "binary": (logits[:, 0].sigmoid(), labels > 0),
            "regression": (values, values * 0.5 + logits[:, 0]),
            "values": (values,),
            "tokens": (logits[:, None].expand(-1, 4, -1), labels[:, None].expand(-1, 4)),
            "texts": ([f"the cat {i} sat" for i in labels.tolist()], [[f"the cat {i} sat down"] for i in range(size)]),
            "queries": (logits[:, 0].sigmoid(), labels > 0, torch.arange(size) // 2),
            "outputs": (logits, logits.flip(0)),
        }[kind]

    return [draw(size) for size in SIZES]


def collection():
    return torchmetrics.MetricCollection(
        {
            "accuracy": classification.MulticlassAccuracy(CLASSES),
            "recall": classification.MulticlassRecall(CLASSES),
            "auroc": classification.MulticlassAUROC(CLASSES),
        },
        prefix="val_",
    )


METRICS = {
    "accuracy": ("classes", lambda: classification.MulticlassAccuracy(CLASSES)),
    "micro accuracy": ("classes", lambda: classification.MulticlassAccuracy(CLASSES, average="micro")),
    "accuracy of each class": ("classes", lambda: classification.MulticlassAccuracy(CLASSES, average=None)),
    "perplexity": ("tokens", text.Perplexity),
    "f1": ("classes", lambda: classification.MulticlassF1Score(CLASSES)),
    "confusion": ("classes", lambda: classification.MulticlassConfusionMatrix(CLASSES)),
    "binned auroc": ("classes", lambda: classification.MulticlassAUROC(CLASSES, thresholds=10)),
    "exact auroc": ("classes", lambda: classification.MulticlassAUROC(CLASSES)),
    "average precision": ("binary", classification.BinaryAveragePrecision),
    "calibration": ("binary", classification.BinaryCalibrationError),
    "mse": ("regression", regression.MeanSquaredError),
    "r2": ("regression", regression.R2Score),
    "pearson": ("regression", regression.PearsonCorrCoef),
    "spearman": ("regression", regression.SpearmanCorrCoef),
    "mean": ("values", torchmetrics.MeanMetric),
    "max": ("values", torchmetrics.MaxMetric),
    "min": ("values", torchmetrics.MinMetric),
    "cat": ("values", torchmetrics.CatMetric),
    "bleu": ("texts", text.BLEUScore),
    "mrr": ("queries", retrieval.RetrievalMRR),
    "collection": ("classes", collection),
    "composition": ("classes", lambda: 2 * classification.MulticlassAccuracy(CLASSES) + 1),
    "classwise": ("classes", lambda: wrappers.ClasswiseWrapper(classification.MulticlassRecall(CLASSES, average=None))),
    "multioutput": ("outputs", lambda: wrappers.MultioutputWrapper(regression.MeanSquaredError(), CLASSES)),
}


def expected_of(metric, data):
    """Returns what torchmetrics computes for the batches, with each number as a value of its own."""
    for batch in data:
        metric.update(*batch)
    return metrics.compute({"value": Plain(metric.compute())})


class Plain(metrics.Metric):
    """A result as a metric, for the names of its numbers."""

    result: object

    def compute(self):
        return entries(self.result)


def entries(result):
    if isinstance(result, dict):
        return {name: entries(value) for name, value in result.items()}
    return result if result.ndim == 0 else {str(index): entries(value) for index, value in enumerate(result)}


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize(("kind", "make"), METRICS.values(), ids=METRICS.keys())
def test_merged_batches_equal_torchmetrics(kind, make):
    data = batches(kind)
    expected = expected_of(make(), data)
    measure = fx.interop.torchmetric(make())
    parts = [measure.from_model_output(*batch) for batch in data]
    assert_close(metrics.compute({"value": fold(parts)}), expected)
    pairs = [fold(parts[:2]), fold(parts[2:])]
    assert_close(metrics.compute({"value": fold(pairs)}), expected)
    assert_close(metrics.compute({"value": measure.empty().merge(fold(parts))}), expected)


def test_given_metric_is_not_updated():
    kept = torchmetrics.MeanMetric()
    fx.interop.torchmetric(kept).from_model_output(torch.ones(3))
    assert kept.update_count == 0


@pytest.mark.parametrize(
    ("kind", "make"),
    [each for name, each in METRICS.items() if name != "cat"],
    ids=[name for name in METRICS if name != "cat"],
)
def test_order_of_merging_does_not_matter(kind, make):
    measure = fx.interop.torchmetric(make())
    parts = [measure.from_model_output(*batch) for batch in batches(kind)]
    expected = metrics.compute({"value": fold(parts)})
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        assert_close(metrics.compute({"value": fold([parts[index] for index in order])}), expected)


def fold(parts):
    total, *others = parts
    for part in others:
        total = total.merge(part)
    return total


class OwnReductions(torchmetrics.Metric):
    """A metric with the reductions mean and a function, and a sum that starts above 0."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("product", torch.tensor(1.0), dist_reduce_fx=lambda stacked: stacked.prod(0))

    def update(self, value):
        self.mean = self.mean + value.mean()
        self.product = self.product * value.mean()

    def compute(self):
        return {"mean": self.mean, "product": self.product}


def test_means_and_functions_reduce_as_in_forward():
    data = batches("values")
    oracle = OwnReductions()
    for batch in data:
        oracle(*batch)  # forward reduces the state of the batch into that of all before
    measure = fx.interop.torchmetric(OwnReductions())
    parts = [measure.from_model_output(*batch) for batch in data]
    for total in (fold(parts), fold([fold(parts[:2]), fold(parts[2:])]), measure.empty().merge(fold(parts))):
        assert_close(total.compute(), oracle.compute())


CLASSIFIER = nn.Linear(4, CLASSES)
DATA = [
    {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), "y": torch.arange(6) % CLASSES}
    for i in range(3)
]
TX = fx.optim.sgd(0.1)
Accuracy = fx.interop.torchmetric(
    classification.MulticlassAccuracy(CLASSES, average="micro"), preds="logits", target="y"
)
Confusion = fx.interop.torchmetric(classification.MulticlassConfusionMatrix(CLASSES))
ExactAUROC = fx.interop.torchmetric(classification.MulticlassAUROC(CLASSES))


def start():
    return fx.init(CLASSIFIER, TX)


def measured(model, batch):
    logits = model(batch["x"])
    return {
        "accuracy": Accuracy.from_model_output(logits=logits, **batch),
        "confusion": Confusion.from_model_output(logits, batch["y"]),
    }


def with_curve(model, batch):
    return {"auroc": ExactAUROC.from_model_output(model(batch["x"]).softmax(-1), batch["y"])}


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"]), measured(model, batch)


def of_predictions(metric, state, data):
    for batch in data:
        metric.update(fx.view(state)(batch["x"]).softmax(-1), batch["y"])
    return metric.compute()


def test_evaluation_equals_torchmetrics():
    found = fx.evaluate(
        start(), fx.eval_step(lambda model, batch: measured(model, batch) | with_curve(model, batch)), DATA
    )
    assert found["auroc"] == pytest.approx(
        float(of_predictions(classification.MulticlassAUROC(CLASSES), start(), DATA)), abs=1e-6
    )
    matrix = of_predictions(classification.MulticlassConfusionMatrix(CLASSES), start(), DATA)
    assert [found[f"confusion/{i}/{j}"] for i in range(CLASSES) for j in range(CLASSES)] == matrix.flatten().tolist()


def test_compiled_evaluation_is_one_graph_and_equals_the_eager_one():
    step = fx.eval_step(measured)
    compiled = fx.compile(step, fullgraph=True)
    assert fx.evaluate(start(), compiled, DATA) == fx.evaluate(start(), step, DATA)
    batch = DATA[0]
    compiled(start(), batch)
    again = Confusion.from_model_output(torch.eye(CLASSES), torch.arange(CLASSES))
    assert int(again.states["confmat"].trace()) == CLASSES


def test_training_metrics_merge_over_microbatches_and_epochs(tmp_path):
    seen = []

    def note(state, event: fx.EpochEnd):
        seen.append(dict(event.metrics))
        return state, fx.Control()

    def run(accumulate, **options):
        step = fx.train_step(loss_fn, TX, accumulate=accumulate)
        return fx.fit(start(), step, DATA, callbacks=note, progress=False, **options)

    history = run(1, epochs=1).history
    run(2, epochs=1)
    assert history["train/accuracy"].values[0] == pytest.approx(
        float(of_predictions(classification.MulticlassAccuracy(CLASSES, average="micro"), start(), DATA[:1]))
    )
    run(1, steps=2, checkpointer=fx.checkpointer(tmp_path))
    run(1, epochs=1, checkpointer=fx.checkpointer(tmp_path), resume=True)
    assert seen[0]["accuracy"] == pytest.approx(sum(history["train/accuracy"].values) / len(DATA))
    assert sum(int(seen[0][f"confusion/{i}/{j}"]) for i in range(CLASSES) for j in range(CLASSES)) == 18
    for other in seen[1:]:
        assert_close(
            {name: value for name, value in other.items() if name != "loss"},
            {name: value for name, value in seen[0].items() if name != "loss"},
        )
    assert len(seen) == 3


def test_growing_states_are_refused_in_training():
    step = fx.train_step(lambda model, batch: (model(batch["x"]).sum(), with_curve(model, batch)), TX)
    with pytest.raises(
        TypeError, match=r"metric 'auroc' of .* fixed size, got MulticlassAUROC, whose states preds, target"
    ):
        step(start(), DATA[0])


def test_growing_states_of_a_collection_are_refused_in_training():
    both = metrics.Collection.create(accuracy=Accuracy, auroc=ExactAUROC)

    def loss_fn(model, batch):
        found = both.from_model_output(
            logits=model(batch["x"]), preds=model(batch["x"]).softmax(-1), target=batch["y"], **batch
        )
        return model(batch["x"]).sum(), {"both": found}

    with pytest.raises(TypeError, match=r"metric 'both' of .* states auroc\.preds, auroc\.target grow"):
        fx.train_step(loss_fn, TX)(start(), DATA[0])


def test_collections_of_both_libraries_take_outputs_by_name():
    both = metrics.Collection.create(accuracy=Accuracy, loss=metrics.Average.from_output("loss"))
    logits, labels = torch.eye(CLASSES), torch.tensor([0, 1, 0])
    found = both.from_model_output(logits=logits, y=labels, loss=torch.tensor(2.0), other=None).compute()
    assert float(found["accuracy"]) == pytest.approx(2 / 3)
    with pytest.raises(
        KeyError, match=r"expected the model output 'logits', got logit, y\. .*preds=.*Did you mean 'logit'"
    ):
        Accuracy.from_model_output(logit=logits, y=labels)
    with pytest.raises(TypeError, match=r"expected no mask, which .* got a bool tensor of shape \[3\]\. Set masked"):
        both.from_model_output(logits=logits, y=labels, loss=torch.tensor(2.0), mask=labels > 0)


def test_convert_chooses_the_published_numbers():
    curve = classification.BinaryROC(thresholds=5)
    (batch,) = batches("binary")[2:3]
    with pytest.raises(TypeError, match=r"computes at most 1024 numbers, got a tuple .* convert=lambda"):
        fx.interop.torchmetric(curve).from_model_output(*batch).compute()
    measure = fx.interop.torchmetric(curve, convert=lambda result: {"largest": result[0].max()})
    assert metrics.compute({"roc": measure.from_model_output(*batch)})["roc/largest"] == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torchmetrics.MeanMetric, TypeError, r"got the class MeanMetric\. Call it"),
        (lambda: metrics.Average, TypeError, r"got the class Average\. Metrics of fxtrain\.metrics need no adapter"),
        (lambda: wrappers.MinMaxMetric(regression.MeanSquaredError()), ValueError, r"got a MinMaxMetric, which keeps"),
        (lambda: wrappers.Running(torchmetrics.MeanMetric()), ValueError, r"Give the metric inside it"),
    ],
)
def test_what_does_not_merge_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        fx.interop.torchmetric(make())


def test_unknown_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"argument of MulticlassAccuracy\.update \(preds, target\), got 'pred'.*'preds'"
    ):
        fx.interop.torchmetric(classification.MulticlassAccuracy(CLASSES), pred="logits")
    with pytest.raises(TypeError, match=r"expected convert to be a function .*, got 3"):
        fx.interop.torchmetric(torchmetrics.MeanMetric(), convert=3)
