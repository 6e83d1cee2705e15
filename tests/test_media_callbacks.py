"""Media callbacks: generated text, samples, predictions, confusion matrices and curves.

What they log depends only on the state and the event.
"""

import re

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torch import nn

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import report, testing, writers
from fxtrain.callbacks._decoding import Sampling, draw
from fxtrain.values import ConfusionMatrix, Image, Video


class Bytes:
    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def language_model():
    return fx.init(nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256)), fx.optim.sgd(0.1))


def generated(state, step=10, **options):
    callback = cb.textgen(["def ", "import"], Bytes(), length=8, **{"max_tokens": 12, **options})
    after, control = callback(state, fx.EvalEnd(step=step, metrics={}))
    assert after is state
    return control.log["textgen"].value.markdown


class TestTextgen:
    def test_text_depends_only_on_step_and_seed(self):
        state = language_model()
        assert generated(state) == generated(state)
        assert generated(state) != generated(state, step=11)
        assert generated(state) != generated(state.replace(seed=state.seed + 1))

    def test_equal_prompts_get_different_random_samples(self):
        callback = cb.textgen(["a", "a"], Bytes(), length=8, max_tokens=20)
        _, control = callback(language_model(), fx.EvalEnd(step=1, metrics={}))
        first, second = control.log["textgen"].value.markdown.split("**prompt**")[1:]
        assert first.strip() != second.strip()

    def test_stop_token_ends_text_and_is_hidden(self):
        model = nn.Sequential(nn.Embedding(256, 256), nn.Identity())
        with torch.no_grad():
            model[0].weight.copy_(100 * torch.eye(256).roll(1, 1))  # the next token is the token plus 1
        callback = cb.textgen(["a"], Bytes(), length=8, max_tokens=9, temperature=0, stop=[ord("e")])
        _, control = callback(fx.init(model), fx.EvalEnd(step=1, metrics={}))
        assert "\nbcd\n" in control.log["textgen"].value.markdown

    def test_output_object_with_logits_is_accepted(self):
        class Output(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Embedding(256, 256)

            def forward(self, tokens):
                return type("Output", (), {"logits": self.inner(tokens)})()

        assert "```text\ndef \n```" in generated(fx.init(Output()))

    @pytest.mark.parametrize("prompt", ["def ", "**a** # `b`\n\n- c", "```python\nx", "a `````` b"])
    def test_prompts_are_escaped_in_markdown(self, prompt, tmp_path):
        callback = cb.textgen([prompt], Bytes(), length=8, max_tokens=1, stop=range(256))
        _, control = callback(language_model(), fx.EvalEnd(step=1, metrics={}))
        writer = writers.jsonl(tmp_path / "metrics.jsonl")
        writer.write(1, {"textgen": control.log["textgen"].value})
        writer.close()
        shown = report.page(report.read_run(tmp_path))
        assert re.findall("<pre>(.*?)</pre>", shown, re.DOTALL) == [prompt, ""]

    def test_non_logits_output_is_rejected(self):
        with pytest.raises(TypeError, match=r"expected logits \[N, T, vocabulary\].*tensor of shape \[2, 6\]"):
            generated(fx.init(nn.Sequential(nn.Embedding(256, 1), nn.Flatten())))

    @pytest.mark.parametrize(
        "options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": 0}]
    )
    def test_out_of_range_options_are_rejected(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            generated(language_model(), **options)

    def test_string_and_empty_prompts_are_rejected(self):
        with pytest.raises(TypeError, match="a sequence of at least one string, got 'def'"):
            cb.textgen("def", Bytes(), length=8)
        with pytest.raises(ValueError, match="expected prompts with at least one token, got '' with none"):
            cb.textgen([""], Bytes(), length=8)


class TestDraw:
    LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    @pytest.mark.parametrize(
        ("options", "shares"),
        [
            ({}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0}, [1, 0, 0, 0]),
            ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
            ({"top_k": 2}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
            ({"top_p": 1e-9}, [1, 0, 0, 0]),
            ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ],
    )
    def test_token_frequencies_match_probabilities(self, options, shares):
        order = torch.tensor([2, 0, 3, 1])  # the vocabulary is not sorted by probability
        drawn = draw(self.LOGITS[order].expand(4000, 4), [(i + 0.5) / 4000 for i in range(4000)], Sampling(**options))
        found = np.bincount(order[drawn].numpy(), minlength=4) / 4000
        assert np.abs(found - shares).max() < 1e-3


def test_resumed_run_generates_same_texts(tmp_path):
    tx = fx.optim.sgd(0.5)
    module = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 256))
    step = fx.train_step(
        lambda model, batch: nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), tx
    )
    data = [torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def run(folder, steps, resume=False):
        seen = {}

        def look(state, event, control):
            if "textgen" in control.log:
                seen[event.step] = control.log["textgen"].value.markdown

        writing = fx.when(3, cb.textgen(["ab"], Bytes(), length=8, max_tokens=8, on=fx.StepEnd))
        checkpointer = fx.checkpointer(tmp_path / folder)
        fx.fit(
            fx.init(module, tx),
            step,
            data,
            steps=steps,
            callbacks=writing,
            checkpointer=checkpointer,
            resume=resume,
            observers=[look],
        )
        return seen

    whole = run("whole", 12)
    parts = run("parts", 5) | run("parts", 12, resume=True)
    assert sorted(whole) == [3, 6, 9, 12]
    assert parts == whole


def test_samples_depend_only_on_seed_and_step():
    def noise(model, key):
        return {"noise": Image(fx.rng.uniform(key, (2, 4, 4, 1))), "mean": model(torch.ones(1, 1)).mean()}

    state = fx.init(nn.Linear(1, 1))
    callback = cb.samples(noise)

    def made(state, step):
        _, control = callback(state, fx.EvalEnd(step=step, metrics={}))
        return control.log["samples/noise"].value.frames

    assert (made(state, 5) == made(state, 5)).all()
    assert (made(state, 5) != made(state, 6)).any()
    assert (made(state, 5) != made(state.replace(seed=state.seed + 1), 5)).any()


def test_samples_may_be_videos():
    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.light = nn.Parameter(torch.tensor(0.5))

        def generate(self, count):
            assert not self.training
            return self.light * torch.linspace(0, 1, 6).view(1, 6, 1, 1, 1).expand(count, 6, 4, 5, 3)

    callback = cb.samples(lambda model, key: Video(model.generate(2), fps=30), name="films")
    _, control = callback(fx.init(Film()), fx.EvalEnd(step=1, metrics={}))
    video = control.log["films"].value
    assert (video.frames.shape, video.fps) == ((2, 6, 4, 5, 3), 30)
    assert video.frames[0, :, 0, 0, 0].tolist() == [0, 26, 51, 77, 102, 128]
    assert not video.pixels.requires_grad


# Classifiers

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
