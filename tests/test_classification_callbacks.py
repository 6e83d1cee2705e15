"""Confusion matrices, areas under curves, and tables of predictions, from evaluations."""

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torch import nn

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import testing
from fxtrain.values import ConfusionMatrix, Image, Video

CLASSES = 4


def evaluated(callback, batches):
    """Runs one evaluation over batches of logits and labels, and returns the state and the logged values."""
    composed = fx.compose(callback)
    state = fx.attach(fx.init(nn.Linear(1, 1)), composed)
    log = {}
    events = [fx.EvalBegin(step=7)]
    events += [
        fx.EvalStep(step=7, index=i, batch={"y": truth, **more}, metrics={}, outputs=logits)
        for i, (logits, truth, more) in enumerate(batches)
    ]
    for event in [*events, fx.EvalEnd(step=7, metrics={})]:
        state, control = composed(state, event)
        log |= {name: entry.value for name, entry in control.log.items()}
    return state, log


def scored(seed, count=64, sure=1.5):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, CLASSES, (count,), generator=generator)
    logits = torch.randn(count, CLASSES, generator=generator) + sure * nn.functional.one_hot(truth, CLASSES)
    return logits, truth, {}


def test_confusion_matrix_counts_each_example_of_an_evaluation():
    batches = [scored(seed) for seed in range(5)]
    _, log = evaluated(cb.confusion_matrix(CLASSES, labels=list("abcd")), batches)
    truth = torch.cat([batch[1] for batch in batches])
    taken = torch.cat([batch[0].argmax(-1) for batch in batches])
    matrix = log["confusion_matrix"]
    assert isinstance(matrix, ConfusionMatrix)
    assert matrix.labels == ("a", "b", "c", "d")
    assert (matrix.counts.numpy() == oracle.confusion_matrix(truth, taken)).all()
    _, again = evaluated(cb.confusion_matrix(CLASSES), batches[:1])
    assert again["confusion_matrix"].counts.sum() == 64


def test_padding_rows_are_not_counted():
    logits, truth, _ = scored(0)
    mask = torch.arange(64) < 10
    _, log = evaluated(cb.confusion_matrix(CLASSES), [(logits, truth, {"mask": mask})])
    assert log["confusion_matrix"].counts.sum() == 10
    _, log = evaluated(cb.curves(CLASSES), [(logits, truth, {"mask": mask})])
    _, wanted = evaluated(cb.curves(CLASSES), [(logits[:10], truth[:10], {})])
    assert log["curves/auc"] == wanted["curves/auc"]


def test_areas_under_curves_match_scikit_learn():
    batches = [scored(seed, 500) for seed in range(4)]
    _, log = evaluated(cb.curves(CLASSES, bins=20_000), batches)
    truth = torch.cat([batch[1] for batch in batches]).numpy()
    scores = torch.cat([batch[0] for batch in batches]).softmax(-1).numpy()
    auc = np.mean([oracle.roc_auc_score(truth == c, scores[:, c]) for c in range(CLASSES)])
    precision = np.mean([oracle.average_precision_score(truth == c, scores[:, c]) for c in range(CLASSES)])
    assert log["curves/auc"] == pytest.approx(auc, abs=1e-3)
    assert log["curves/average_precision"] == pytest.approx(precision, abs=2e-3)
    assert log["curves/roc"].pixels.shape == (500, 500, 4)
    assert "curves/precision_recall" in log


def test_absent_class_has_no_area():
    logits, _, _ = scored(0)
    _, log = evaluated(cb.curves(CLASSES), [(logits, torch.zeros(64, dtype=torch.int64), {})])
    assert "curves/auc" not in log
    assert "curves/roc" in log


def test_predictions_table_has_first_examples():
    def show(batch):
        assert len(batch["x"]) == 3
        return Image(batch["x"])

    logits, truth, _ = scored(0)
    callback = cb.predictions(show, labels=["cat", "dog"], limit=3)
    _, log = evaluated(callback, [(logits, truth, {"x": torch.rand(64, 8, 8, 1)})] * 2)
    table = log["predictions"]
    assert len(table) == 3
    assert list(table.columns) == ["input", "prediction", "truth", "confidence"]
    named = {0: "cat", 1: "dog", 2: 2, 3: 3}
    assert table.columns["truth"] == [named[int(each)] for each in truth[:3]]
    assert table.columns["prediction"] == [named[int(each)] for each in logits[:3].argmax(-1)]
    assert table.columns["confidence"] == logits[:3].softmax(-1).amax(-1).tolist()


def numbered_batches(sizes, **more):
    """Batches whose examples are numbered through, with the number as input."""
    numbers = torch.arange(sum(sizes)).split(sizes)
    return [(torch.eye(CLASSES)[n % CLASSES], n % CLASSES, {"n": n, **more}) for n in numbers]


def shown(batches, **options):
    _, log = evaluated(cb.predictions(lambda batch: batch["n"], **options), batches)
    return log["predictions"].columns["input"] if log else None


def test_predictions_are_taken_from_as_many_batches_as_it_takes():
    batches = numbered_batches([2, 2, 2, 2])
    assert shown(batches, limit=5) == [0, 1, 2, 3, 4]
    assert shown(batches, limit=100) == list(range(8))
    assert shown(batches, limit=100, batch=2) == [4, 5]
    assert shown([]) is None


@pytest.mark.parametrize("sample", ["first", "random"])
def test_predictions_leave_out_padding(sample):
    batches = numbered_batches([4, 4], mask=torch.tensor([True, False, True, False]))
    assert shown(batches, limit=100, sample=sample) == [0, 2, 4, 6]


def test_random_predictions_are_a_uniform_subset_in_the_order_of_the_evaluation():
    batches, drawn = numbered_batches([7, 7, 6]), []
    callback = fx.compose(cb.predictions(lambda batch: batch["n"], limit=4, sample="random"))
    state = fx.attach(fx.init(nn.Linear(1, 1)), callback)
    for step in range(300):
        for index, (logits, truth, more) in enumerate(batches):
            batch = {"y": truth, **more}
            event = fx.EvalStep(step=step, index=index, batch=batch, metrics={}, outputs=logits)
            state, _ = callback(state, event)
        state, control = callback(state, fx.EvalEnd(step=step, metrics={}))
        table = control.log["predictions"].value
        assert table.columns["truth"] == [n % CLASSES for n in table.columns["input"]]
        drawn.append(table.columns["input"])
        state, _ = callback(state, fx.EvalBegin(step=step + 1))
    assert all(len(set(each)) == 4 and each == sorted(each) for each in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert 300 * 4 / 20 * 0.6 < counts.min() <= counts.max() < 300 * 4 / 20 * 1.4


def test_predictions_show_inputs_of_every_kind():
    images = torch.rand(2, 3, 40, 40)
    for given, expected in [
        (["déjà " * 100, "b"], [("déjà " * 100).encode()[:64].decode(errors="ignore"), "b"]),
        ([1, None], [1, None]),
        ([True, 2.5], [True, 2.5]),
        (torch.tensor([0.1, float("nan")]), [pytest.approx(0.1), pytest.approx(float("nan"), nan_ok=True)]),
        (torch.tensor([True, False]), [True, False]),
    ]:
        callback = cb.predictions(lambda batch, given=given: given, input_bytes=64)
        _, log = evaluated(callback, numbered_batches([2]))
        assert log["predictions"].columns["input"] == expected
    callback = cb.predictions(lambda batch: Image(images, "CHW"))
    _, log = evaluated(callback, numbered_batches([2]))
    frames = [cell.frames[0] for cell in log["predictions"].columns["input"]]
    assert (np.stack(frames) == Image(images, "CHW").frames).all()
    callback = cb.predictions(lambda batch: Image(images, "CHW"), input_bytes=40 * 40)
    _, log = evaluated(callback, numbered_batches([2]))
    small = log["predictions"].columns["input"][1].frames[0]
    averaged = nn.functional.avg_pool2d(Image(images, "CHW").bytes_tensor().movedim(-1, 1).float(), 2)
    assert (small == averaged[1].movedim(0, -1).round().numpy()).all()


@pytest.mark.parametrize(
    ("show", "error", "says"),
    [
        (lambda batch: [1], ValueError, "expected show to return 2 inputs, one for each example, got 1"),
        (lambda batch: Video(torch.zeros(2, 3, 4, 4, 1)), TypeError, "expected show to return strings, scalars or one"),
        (
            lambda batch: [Image(torch.zeros(4, 4))] * 2,
            TypeError,
            "got Image of 4 x 4, gray in a list. Return one Image",
        ),
    ],
)
def test_unsupported_inputs_of_predictions_are_refused(show, error, says):
    with pytest.raises(error, match=says):
        evaluated(cb.predictions(show), numbered_batches([2]))


def test_invalid_options_of_predictions_are_refused():
    for options, says in [
        ({"sample": "all"}, "expected sample to be one of 'first', 'random', got 'all'"),
        ({"limit": 0}, "expected limit to be"),
        ({"batch": -1}, "expected batch to be"),
        ({"input_bytes": 10}, "expected input_bytes to be an int of at least 64, got 10"),
    ]:
        with pytest.raises(ValueError, match=says):
            cb.predictions(lambda batch: batch["n"], **options)


@pytest.mark.parametrize(
    ("callback", "outputs", "batch", "says"),
    [
        (cb.confusion_matrix(2), None, {"y": torch.zeros(3).long()}, "got None. Return"),
        (cb.confusion_matrix(2), torch.zeros(3), {"y": torch.zeros(3).long()}, r"got a float32 tensor of shape \[3\]"),
        (
            cb.confusion_matrix(2),
            torch.zeros(3, 2),
            {"x": torch.zeros(3)},
            r"as batch\['y'\] for confusion_matrix, got None. Give their key as truth=",
        ),
        (cb.curves(2), torch.zeros(3, 2), {"y": torch.zeros(3)}, "got a float32 tensor"),
        (cb.predictions(lambda batch: [1] * 3), None, {"y": torch.zeros(3).long()}, "outputs=True"),
    ],
)
def test_missing_evaluation_data_is_named(callback, outputs, batch, says):
    composed = fx.compose(callback)
    state = fx.attach(fx.init(nn.Linear(1, 1)), composed)
    with pytest.raises(TypeError, match=says):
        composed(state, fx.EvalStep(step=1, index=0, batch=batch, metrics={}, outputs=outputs))


@pytest.mark.parametrize("make", [cb.confusion_matrix, cb.curves])
def test_invalid_classes_and_labels_are_rejected(make):
    with pytest.raises(ValueError, match="expected classes to be an int of at least 2, got 1"):
        make(1)
    with pytest.raises(ValueError, match="expected one label for each of the 2 classes, got 3 labels"):
        make(2, labels=list("abc"))


def events_of_an_evaluation():
    batches = [scored(seed, 8) for seed in range(3)]
    steps = [
        fx.EvalStep(step=7, index=i, batch={"x": logits, "y": truth}, metrics={}, outputs=logits)
        for i, (logits, truth, _) in enumerate(batches)
    ]
    return [fx.EvalBegin(step=7), *steps, fx.EvalEnd(step=7, metrics={})]


def random_predictions():
    return cb.predictions(lambda batch: batch["x"][:, 0], limit=5, sample="random")


def test_classifier_callbacks_obey_the_laws():
    testing.check_laws(cb.confusion_matrix(CLASSES), fx.init(nn.Linear(1, 1)), events_of_an_evaluation())
    *without_a_table, _ = events_of_an_evaluation()
    testing.check_laws(random_predictions(), fx.init(nn.Linear(1, 1)), without_a_table)


@pytest.mark.parametrize("cut", range(6))
def test_evaluation_resumes_from_a_save_in_its_middle(cut, tmp_path):
    composed = fx.compose(cb.confusion_matrix(CLASSES), cb.curves(CLASSES), random_predictions())
    start = fx.attach(fx.init(nn.Linear(1, 1)), composed)
    events = events_of_an_evaluation()
    whole = start
    for event in events:
        whole, _ = composed(whole, event)
    state = start
    for event in events[:cut]:
        state, _ = composed(state, event)
    fx.save(tmp_path / "middle", state)
    state = fx.restore(tmp_path / "middle", start)
    for event in events[cut:]:
        state, _ = composed(state, event)
    testing.assert_equal(state, whole, "after the middle")
