"""Graph networks of torch_geometric."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.case import Case

NODES, FEATURES, CLASSES = 8, 6, 3


def graph() -> dict[str, torch.Tensor]:
    """A ring with chords."""
    ring = torch.arange(NODES)
    edges = torch.stack([torch.cat([ring, ring]), torch.cat([(ring + 1) % NODES, (ring + 3) % NODES])])
    return {"x": torch.randn(NODES, FEATURES), "edges": edges, "y": torch.randint(0, CLASSES, (NODES,))}


def classify_nodes(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"], batch["edges"]), batch["y"])


def case(name: str, model: str, width: int = 8, **options: Any) -> Case:
    def build(dropout: float) -> Any:
        import torch_geometric.nn

        return getattr(torch_geometric.nn, model)(FEATURES, width, 2, CLASSES, dropout=dropout, **options)

    return Case(name, "torch_geometric", build, graph, classify_nodes)


def build_schnet(dropout: float) -> Any:
    from torch_geometric.nn import SchNet

    return SchNet(hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=4, cutoff=5.0)


def molecules() -> dict[str, torch.Tensor]:
    near = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 4], [1, 2, 0, 2, 0, 1, 4, 3]])
    return {
        "kinds": torch.tensor([1, 6, 8, 6, 1]),
        "places": torch.randn(5, 3),
        "molecule": torch.tensor([0, 0, 0, 1, 1]),
        "edges": near,
        "energy": torch.randn(2),
        "forces": torch.randn(5, 3),
    }


class EnergyModel(torch.nn.Module):
    """SchNet on given neighbors, because its neighbor search is a C++ extension."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Any) -> torch.Tensor:
        network, places, (source, target) = self.network, batch["places"], batch["edges"]
        distance = (places[source] - places[target]).norm(dim=-1)
        hidden = network.embedding(batch["kinds"])
        spread = network.distance_expansion(distance)
        for interaction in network.interactions:
            hidden = hidden + interaction(hidden, batch["edges"], distance, spread)
        energy = network.lin2(network.act(network.lin1(hidden)))
        return energy.new_zeros(2, 1).index_add(0, batch["molecule"], energy).squeeze(1)


def energy_loss(model: Any, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch), batch["energy"])


def force_loss(model: Any, batch: Any) -> torch.Tensor:
    """Errors of energies and of forces, which are gradients of the energy with respect to positions."""
    places = batch["places"].detach().requires_grad_()
    energy = model({**batch, "places": places})
    (slope,) = torch.autograd.grad(energy.sum(), places, create_graph=True)
    return F.mse_loss(energy, batch["energy"]) + F.mse_loss(-slope, batch["forces"])


class PointNet(torch.nn.Module):
    """Two PointNet++ layers on given neighbors, and a maximum over each cloud."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import MLP, PointNetConv

        self.first = PointNetConv(MLP([3, 8, 8], norm=None))
        self.second = PointNetConv(MLP([11, 16, 16], norm=None))
        self.head = torch.nn.Linear(16, CLASSES)

    def forward(self, batch: Any) -> torch.Tensor:
        from torch_geometric.nn import global_max_pool

        hidden = self.first(None, batch["places"], batch["edges"])
        hidden = self.second(hidden, batch["places"], batch["edges"])
        return self.head(global_max_pool(hidden, batch["molecule"], 2))


def build_pointnet(dropout: float) -> Any:
    return PointNet()


def classify_clouds(model: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch), torch.tensor([0, 2]))


CASES = [
    case("gcn", "GCN"),
    case("gat", "GAT", heads=2),
    case("gin", "GIN", width=16),  # because with width 8, all units of its last ReLU start dead
    case("graphsage", "GraphSAGE"),
    Case("schnet, energies", "torch_geometric", lambda p: EnergyModel(build_schnet(p)), molecules, energy_loss, False),
    Case("schnet, forces", "torch_geometric", lambda p: EnergyModel(build_schnet(p)), molecules, force_loss, False),
    Case("pointnet++", "torch_geometric", build_pointnet, molecules, classify_clouds, False),
]
