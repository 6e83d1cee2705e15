"""Watch callback: histograms of weights, gradients and updates during a run."""

import json

import problem
import pytest

import fxtrain as fx
from fxtrain import observers, writers


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def watched(tmp_path, watch, steps=6):
    path = tmp_path / "metrics.jsonl"
    fx.fit(
        problem.start(),
        problem.step(callbacks=watch),
        problem.data(),
        callbacks=watch,
        steps=steps,
        observers=[observers.required(observers.write(writers.jsonl(path)))],
    )
    found = {}
    for line in lines(path):
        for name, histogram in line.get("histograms", {}).items():
            found.setdefault(name, {})[line["step"]] = histogram
    return found


def test_watch_writes_histograms_of_weights_and_gradients(tmp_path):
    found = watched(tmp_path, fx.callbacks.watch(every=3))
    sizes = {name: leaf.numel() for name, leaf in problem.start().params.items()}
    assert set(found) == {f"histograms/{kind}/{name}" for kind in ("weights", "grads") for name in sizes}
    for name, by_step in found.items():
        assert list(by_step) == [3, 6]
        for histogram in by_step.values():
            assert sum(histogram["counts"]) == sizes[name.rpartition("/")[2]]
            assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    weights = found["histograms/weights/0.weight"]
    assert weights[3] != weights[6]


def test_watch_selects_kinds_and_parameters(tmp_path):
    found = watched(tmp_path, fx.callbacks.watch("updates", every=2, parameter="4.*", sample=3), steps=2)
    assert set(found) == {"histograms/updates/4.bias", "histograms/updates/4.weight"}
    assert sum(found["histograms/updates/4.weight"][2]["counts"]) == 3
    with pytest.raises(ValueError, match=r"expected log to be one of 'gradients', .*, got 'biases'"):
        fx.callbacks.watch("biases")
    with pytest.raises(ValueError, match="expected log to name what to watch, got nothing"):
        fx.callbacks.watch(())


@pytest.mark.parametrize(
    ("log", "slots"),
    [
        ("gradients", ["grads"]),
        ("parameters", ["weights"]),
        ("all", ["weights", "grads"]),
        (("all", "updates", "gradients"), ["weights", "grads", "updates"]),
    ],
)
def test_watch_has_the_words_of_other_trainers(log, slots):
    callback = fx.callbacks.watch(log)
    assert [handler.slot for handler in callback.handlers] == [f"histograms/{slot}" for slot in slots]
