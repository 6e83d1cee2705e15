"""Datasets of other libraries (datasets, webdataset, torchdata): batching, training and bitwise resume."""

import datetime
import io

import numpy as np
import pytest
import torch
from sources import assert_same, take
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import fxtrain as fx
from fxtrain.data import as_source, batches, prefetch

TX = fx.optim.adam(0.1)


def loss_fn(model, batch):
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
    return (model(x.float()).squeeze(-1) - y).square().mean()


def train(data, **options):
    torch.manual_seed(0)
    state = fx.init(nn.Linear(2, 1), TX)
    return fx.fit(state, fx.train_step(loss_fn, TX), data, **{"epochs": 2, **options})


def assert_continues(make, stop, caplog=None):
    """Asserts that a source restored from a snapshot continues with the same batches, for every position."""
    whole = take(make(), range(stop))
    for position in range(1, stop):
        first = make()
        assert_same(take(first, range(position)), whole[:position])
        snapshot = first.snapshot(position)
        then = make()
        then.expect_epoch_length(first.epoch_length) if first.epoch_length else None
        then.restore(position, snapshot)
        assert_same(take(then, range(position, stop)), whole[position:])
        first.close()
        then.close()
    assert caplog is None or "again to reach" not in caplog.text


def table(count=10):
    return {
        "x": [[float(i), 1.0] for i in range(count)],
        "y": list(range(count)),
        "text": [f"row {i}" for i in range(count)],
        "meta": [{"id": i, "name": None if i % 3 else str(i)} for i in range(count)],
    }


@pytest.fixture(scope="module")
def dataset():
    return pytest.importorskip("datasets").Dataset.from_dict(table())


@pytest.mark.parametrize("format", [None, "torch", "numpy", "pandas", "arrow"])
def test_dataset_of_any_format_trains(dataset, format):  # noqa: A002
    data = batches(dataset.with_format(format), 4, seed=0)
    assert data[0]["x"].shape == (4, 2)
    assert data[0]["y"].dtype == torch.int64
    assert data[0]["text"] == [f"row {i}" for i in data[0]["y"].tolist()]
    assert data[0]["meta"]["id"].equal(data[0]["y"])
    assert data[0]["meta"]["name"] == [None if i % 3 else str(i) for i in data[0]["y"].tolist()]
    whole = train(data, epochs=3).state.params["weight"]
    assert train(data, epochs=3).state.params["weight"].equal(whole)


@pytest.mark.parametrize("format", [None, "torch", "numpy", "pandas", "arrow"])
def test_all_column_types_train_in_any_format(format):  # noqa: A002
    datasets = pytest.importorskip("datasets")
    columns = {
        "nested": [[[1, 2], [3]]] * 4,
        "missing": [None] * 4,
        "day": [datetime.datetime(2026, 1, 1 + i) for i in range(4)],
        "raw": [b"ab"] * 4,
        "flag": [True] * 4,
    }
    if format == "torch":  # the torch format of datasets does not convert dates
        del columns["day"]
    dataset = datasets.Dataset.from_dict({"x": [[float(i), 1.0] for i in range(4)], "y": list(range(4)), **columns})
    data = batches(dataset.with_format(format), 2, shuffle=False)
    assert {"x", "y", *columns} == set(data[1])
    assert data[1]["flag"].equal(torch.tensor([True, True]))
    whole = train([(torch.tensor([[i, 1.0], [i + 1, 1.0]]), torch.tensor([i, i + 1])) for i in (0, 2)])
    assert train(data).state.params["weight"].equal(whole.state.params["weight"])


def test_dataset_transform_is_applied(dataset):
    changed = dataset.with_transform(lambda rows: {"x": [np.float32(2 * y) for y in rows["y"]]})
    assert batches(changed, 2, shuffle=False)[1]["x"].tolist() == [4, 6]


def test_image_and_label_columns_become_tensors():
    datasets, images = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    pictures = [images.fromarray(np.full((4, 5, 3), i, np.uint8)) for i in range(4)]
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 0]}, features=features)
    batch = batches(made, 2, shuffle=False)[1]
    assert batch["image"].shape == (2, 3, 4, 5)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].tolist() == [1, 0]
    with pytest.raises(TypeError, match=r"'image'\] to be .*, got a PIL.Image.Image. Convert it in the dataset"):
        as_source([{"x": torch.ones(1), "image": pictures[0]}])


def test_splits_and_ragged_columns_are_rejected(dataset):
    datasets = pytest.importorskip("datasets")
    for use in (as_source, lambda splits: batches(splits, 2)):
        with pytest.raises(TypeError, match=r"got a DatasetDict with the splits 'train'. Select one: dataset\["):
            use(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match=r"got a Dataset, which contains samples. Batch .*data.batches\(source"):
        as_source(dataset)
    ragged = datasets.Dataset.from_dict({"ids": [[1], [1, 2], [3]]})
    with pytest.raises(ValueError, match=r"expected samples of equal shape.* Pad them with fxtrain.data.padded"):
        batches(ragged, 3)[0]


def streams(dataset):
    stream = dataset.remove_columns("meta").to_iterable_dataset(num_shards=2)
    return {
        "bare": lambda: batches(stream, 3),
        "short": lambda: batches(stream, 3, drop_last=False),
        "shuffled shards": lambda: batches(stream.shuffle(seed=0, buffer_size=1), 3),
        "batched": lambda: as_source(stream.with_format("torch").batch(3, drop_last_batch=True)),
        "loader": lambda: as_source(StatefulDataLoader(stream.with_format("torch"), 3, drop_last=True)),
        "prefetch": lambda: prefetch(batches(stream, 3)),
    }


@pytest.mark.parametrize("name", ["bare", "short", "shuffled shards", "batched", "loader", "prefetch"])
def test_streamed_dataset_resumes(dataset, name, caplog):
    assert_continues(streams(dataset)[name], 8, caplog)


def test_stream_with_shuffle_buffer_is_reread(dataset):
    stream = dataset.to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=4)
    for make in (
        lambda: batches(stream, 3),
        lambda: as_source(stream.select_columns(["y"]).batch(3, drop_last_batch=True)),
    ):
        whole = take(make(), range(8))
        assert not make().has_snapshots
        assert_same(take(make(), range(4, 8)), whole[4:])
        assert len({tuple(batch["y"].tolist()) for batch in whole}) > 3


def test_stream_in_workers_resumes(dataset):
    stream = dataset.remove_columns("meta").to_iterable_dataset(num_shards=2).with_format("torch")
    make = lambda: as_source(StatefulDataLoader(stream, 2, num_workers=2, drop_last=True))  # noqa: E731
    whole, first, then = take(make(), range(6)), make(), make()
    take(first, range(3))
    then.restore(3, first.snapshot(3))
    assert_same(take(then, range(3, 6)), whole[3:])
    first.close()
    then.close()


class Numbers(IterableDataset):
    """A stream without state."""

    def __iter__(self):
        for i in range(8):
            yield torch.tensor([i, 1.0]), i


class Counting(Numbers):
    """A stream that saves its position."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        start, self.index = self.index, 0
        for i, sample in enumerate(super().__iter__()):
            if i >= start:
                self.index = i + 1
                yield sample
        self.index = 0

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


def test_iterable_dataset_resumes_from_its_state(caplog):
    assert_continues(lambda: batches(Counting(), 3), 5, caplog)
    assert_same(take(batches(Counting(), 3), range(4)), take(batches(Numbers(), 3), range(4)))
    assert_same(
        take(batches(Numbers(), 3), range(4)), take(as_source(DataLoader(Numbers(), 3, drop_last=True)), range(4))
    )
    with pytest.raises(ValueError, match="Shuffle the stream itself"):
        batches(Numbers(), 3, shuffle=True)


class Preempted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("make", [lambda: batches(Numbers(), 3), lambda: batches(Counting(), 3)])
def test_run_over_stream_resumes_bitwise(make, tmp_path):
    def stop_at_three(state, event: fx.StepEnd):
        return state, fx.Control(stop=event.step == 3, reason="preempted")

    whole = train(make(), epochs=3).state
    train(make(), epochs=3, checkpointer=fx.checkpointer(tmp_path), callbacks=[stop_at_three])
    found = fx.checkpointer(tmp_path)
    state = fx.init(nn.Linear(2, 1), TX)
    step = fx.train_step(loss_fn, TX)
    first = fx.fit(state, step, make(), epochs=3, checkpointer=found, resume=True)
    assert first.reason.startswith("preempted")
    last = fx.fit(first.state, step, make(), epochs=3).state
    assert last.params["weight"].equal(whole.params["weight"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    wds = pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with wds.TarWriter(str(folder / f"rows-{shard}.tar")) as writer:
            for i in range(5):
                array = io.BytesIO()
                np.save(array, np.array([i, shard], np.float32))
                writer.write(
                    {"__key__": f"{shard}{i}", "x.npy": array.getvalue(), "y.cls": str(i), "t.txt": f"{shard}-{i}"}
                )
    return str(folder / "rows-{0..1}.tar")


def test_web_dataset_resumes_by_rereading(shards, caplog):
    wds = pytest.importorskip("webdataset")

    def pipeline():
        return wds.WebDataset(shards, shardshuffle=False).decode().to_tuple("x.npy", "y.cls", "t.txt")

    kinds = {
        "pipeline": lambda: as_source(pipeline().batched(2)),
        "loader": lambda: as_source(wds.WebLoader(pipeline().batched(2), batch_size=None, num_workers=0)),
        "samples": lambda: batches(pipeline(), 2),
    }
    expected = take(kinds["samples"](), range(10))
    assert list(expected[0][2]) == ["0-0", "0-1"]
    for make in kinds.values():
        caplog.clear()
        data = make()
        found = [batch[:2] for batch in take(data, range(10))]
        assert_same([list(batch) for batch in found], [list(batch[:2]) for batch in expected])
        assert not data.has_snapshots
        later = make()
        assert later[3][0].equal(expected[3][0])
        assert "again to reach position 3" in caplog.text
        assert int(train(make()).state.step) == 10
