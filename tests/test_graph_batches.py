"""torch_geometric graphs as batches: they vary in size and keep their class."""

import pytest
import torch
from sources import assert_same, take
from torch import nn

import fxtrain as fx
from fxtrain.data import as_source, batches, check_batch, for_step, prefetch

geometric_data = pytest.importorskip("torch_geometric.data")
loaders = pytest.importorskip("torch_geometric.loader")
layers = pytest.importorskip("torch_geometric.nn")

TX = fx.optim.sgd(0.1)


def graphs(count=10):
    generator = torch.Generator().manual_seed(0)
    return [
        geometric_data.Data(
            x=torch.randn(3 + i % 4, 3, generator=generator),
            edge_index=torch.randint(0, 3 + i % 4, (2, 6 + i), generator=generator),
            y=torch.randn(1, 1, generator=generator),
            name=f"graph {i}",
        )
        for i in range(count)
    ]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = layers.SAGEConv(3, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, data):
        hidden = self.conv(data.x, data.edge_index).relu()
        return self.last(layers.global_mean_pool(hidden, data.batch, size=data.num_graphs))


def loss_fn(model, data):
    return (model(data) - data.y).square().mean()


def problem(loss=loss_fn, **options):
    torch.manual_seed(0)
    module = Net()
    return module, fx.init(module, TX), fx.train_step(loss, TX, **options)


def test_training_on_graph_loader_matches_plain_loop():
    module, state, step = problem()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        for batch in loaders.DataLoader(graphs(), 4):
            optimizer.zero_grad()
            loss_fn(module, batch).backward()
            optimizer.step()
    seen = []

    def look(state, event: fx.StepBegin):
        seen.append(event.batch[0].name)
        return state, fx.Control()

    result = fx.fit(state, step, loaders.DataLoader(graphs(), 4), epochs=2, callbacks=[look])
    for name, value in module.named_parameters():
        torch.testing.assert_close(result.state.params[name], value.detach(), rtol=1e-5, atol=1e-6)
    assert seen == ["graph 0", "graph 4", "graph 8"] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_source(loaders.DataLoader(graphs(), 4, shuffle=True)),
        lambda: batches(graphs(), 4, drop_last=False),
        lambda: prefetch(loaders.DataLoader(graphs(), 4, shuffle=True), device="cpu"),
    ],
)
def test_graph_batches_are_read_by_position(make):
    whole = take(make(), range(7))
    assert_same(take(make(), range(4, 7)), whole[4:])
    assert type(whole[0]).__name__ == "DataBatch"
    assert whole[0].num_graphs == 4
    assert isinstance(whole[0].name, list)


def test_evaluation_weights_batches_by_number_of_graphs():
    _, state, _ = problem()
    measure = fx.eval_step(loss_fn)
    each = [float(measure(state, batch).metrics["loss"]) for batch in loaders.DataLoader(graphs(), 1)]
    found = fx.evaluate(state, measure, loaders.DataLoader(graphs(), 4))["loss"]
    assert found == pytest.approx(sum(each) / 10, rel=1e-5)


def test_loss_may_split_and_modify_its_batch():
    def loss(model, data):
        data.x = data.x * 2
        parts = [loss_fn(model, geometric_data.Batch.from_data_list([part])) for part in data.to_data_list()]
        return sum(parts) / data.num_graphs

    _, state, step = problem(loss)
    batch = next(iter(loaders.DataLoader(graphs(), 4)))
    x = batch.x.clone()
    new, _ = step(state, batch)
    expected, _ = problem(lambda model, data: loss_fn(model, for_step(data).update({"x": data.x * 2})))[2](state, batch)
    torch.testing.assert_close(new.params, expected.params)
    assert batch.x.equal(x)


def test_single_graph_is_one_batch():
    def loss(model, data):
        return (model.conv(data.x, data.edge_index)[: data.num_nodes] * data.mask[:, None]).square().mean()

    _, state, step = problem(loss)
    graph = graphs()[1].update({"mask": torch.tensor([True, False, True, True])})
    assert int(fx.fit(state, step, graph, epochs=3).state.step) == 3
    assert fx.evaluate(state, fx.eval_step(loss), [graph])["loss"] > 0


def test_heterogeneous_graphs_train_and_are_checked():
    data = geometric_data.HeteroData()
    data["a"].x, data["b"].x = torch.ones(4, 3), torch.ones(5, 3)
    data["a", "to", "b"].edge_index = torch.tensor([[0, 1, 2], [1, 2, 3]])
    data["b"].name = "text"

    def loss(model, data):
        return model.conv((data["a"].x, data["b"].x), data["a", "to", "b"].edge_index).square().mean()

    _, state, step = problem(loss)
    result = fx.fit(state, step, loaders.DataLoader([data] * 3, 2), epochs=2)
    assert int(result.state.step) == 4
    other = data.clone()
    other["b"].x = other["b"].x.double()
    with pytest.raises(ValueError, match=r"expected batch.*\['b'\].x.* to be .*, got a float64 tensor"):
        check_batch(other, data)


def test_missing_attributes_and_microbatches_of_graphs_are_rejected():
    first, second = graphs(2)
    del second.edge_index
    with pytest.raises(ValueError, match=r"structure as in earlier batches, .*: batch.*edge_index.* missing"):
        as_source([first, second])
    _, state, step = problem(accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate=2: expected a batch of tensors .* got a graph"):
        step(state, next(iter(loaders.DataLoader(graphs(), 4))))


def test_dynamic_compiled_step_accepts_graphs_of_many_sizes():
    _, state, step = problem()
    compiled = fx.compile(step, dynamic=True, backend="aot_eager", on_recompile="error")
    data = list(loaders.DataLoader(graphs(9), 3))
    found, expected = (fx.fit(state, each, data, epochs=1).state for each in (compiled, step))
    torch.testing.assert_close(found.params, expected.params)
