"""Array inputs (memory layouts, byte orders, structured arrays, arrays on disk) train as in a plain PyTorch loop."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxtrain as fx
from fxtrain.data import as_source, batches

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((12, 2)).astype(np.float32)
Y = GENERATOR.standard_normal((12, 1)).astype(np.float32)
TX = fx.optim.sgd(0.1)


def loss_fn(model, batch):
    return (model(batch["x"]) - batch["y"].reshape(-1, 1)).square().mean()


STEP = fx.train_step(loss_fn, TX)


def trained(data):
    torch.manual_seed(0)
    return fx.fit(fx.init(nn.Linear(2, 1), TX), STEP, data, epochs=2).state.params


def by_a_plain_loop():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in (0, 4, 8, 0, 4, 8):
        rows = {"x": torch.tensor(X[start : start + 4]), "y": torch.tensor(Y[start : start + 4])}
        optimizer.zero_grad()
        loss_fn(model, rows).backward()
        optimizer.step()
    return dict(model.named_parameters())


WANTED = by_a_plain_loop()


class Samples(Dataset):
    """A map-style dataset whose rows the collate function stacks."""

    def __init__(self, change):
        self.x, self.y = change(X), change(Y)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


def structured(x, y):
    rows = np.zeros(len(x), dtype=[("x", np.float32, 2), ("y", np.float32)])
    rows["x"], rows["y"] = x, y[:, 0]
    return rows


class OnDisk:
    """Mimics an h5py dataset, which accepts only strictly increasing indices."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        if not isinstance(rows, slice) and (np.diff(rows) <= 0).any():
            raise TypeError("Indexing elements must be in increasing order")
        return self.values[rows]


LAYOUTS = {
    "rising": lambda array: array,
    "fortran": np.asfortranarray,
    "reversed": lambda array: np.ascontiguousarray(array[::-1])[::-1],
    "mirrored": lambda array: np.ascontiguousarray(array[:, ::-1])[:, ::-1],
    "strided": lambda array: np.repeat(array, 2, axis=0)[::2],
    "big-endian": lambda array: array.astype(">f4"),
    "read-only": lambda array: np.frombuffer(array.tobytes(), np.float32).reshape(array.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_every_memory_layout_trains_equally(layout):
    change = LAYOUTS[layout]
    before = change(X).copy()
    sources = (
        [{"x": change(X[i : i + 4]), "y": change(Y[i : i + 4])} for i in (0, 4, 8)],
        batches({"x": change(X), "y": change(Y)}, 4, shuffle=False),
        batches(Samples(change), 4, shuffle=False),
    )
    for source in sources:
        torch.testing.assert_close(trained(source), WANTED, rtol=0, atol=1e-7)
    assert (change(X) == before).all()


def test_structured_array_becomes_dict_of_fields():
    rows = structured(X, Y)
    assert as_source([rows])[0]["x"].equal(torch.tensor(X))
    for source in ([rows[i : i + 4] for i in (0, 4, 8)], batches(rows, 4, shuffle=False)):
        torch.testing.assert_close(trained(source), WANTED, rtol=0, atol=1e-7)


def test_disk_array_supports_shuffled_reads():
    torch.testing.assert_close(
        trained(batches({"x": OnDisk(X), "y": OnDisk(Y)}, 4, shuffle=False)), WANTED, rtol=0, atol=1e-7
    )
    lazy, dense = (batches({"x": kind(X), "y": Y}, 5, seed=3) for kind in (OnDisk, np.asarray))
    assert all(lazy[i]["x"].equal(dense[i]["x"]) for i in range(4))


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow"])
def test_tables_are_rejected(library):
    tables = pytest.importorskip(library)
    table = tables.table({"x": [1.0]}) if library == "pyarrow" else tables.DataFrame({"x": [1.0]})
    with pytest.raises(TypeError, match=rf"got a {library} \w+\. Pass its columns as arrays"):
        batches(table, 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nn.Linear(2, 1), r"got a Linear\. Pass the arguments in this order: fit\(state, step, data\)"),
        (DataLoader, r"got the class DataLoader\. Create an instance"),
        ("rows.csv", r"got 'rows.csv'\. Load the data first"),
        ({"train": DataLoader(X)}, r"got a dict with keys 'train'\. Select one: data\['train'\]"),
        ({"x": X}, r"got a dict with keys 'x', which contains samples\. Batch them"),
    ],
)
def test_adapt_rejects_non_batch_sources(source, message):
    with pytest.raises(TypeError, match=f"expected batches, {message}"):
        as_source(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"x": X.tolist()}, r"expected arrays\['x'\]\[0\]\[0\] to be .*, got .*\. Convert it with numpy.asarray"),
        ({"x": X.astype(np.longdouble)}, r"expected batch\['x'\] to have a dtype that torch supports, got float128"),
    ],
)
def test_batches_rejects_unsupported_arrays(source, message):
    with pytest.raises(TypeError, match=message):
        batches(source, 4)
