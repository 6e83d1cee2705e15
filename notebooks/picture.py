"""Runs the README's example, and draws the picture of its front page: ``python notebooks/picture.py``."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import fxtrain as fx

ROOT = pathlib.Path(__file__).resolve().parents[1]
INK = {"light": "#1f2328", "dark": "#d1d7e0"}
BLUE, ORANGE = "#4a8fe7", "#f08c3a"


def run_example() -> tuple[fx.Result, dict[str, torch.Tensor]]:
    """Runs the example, and returns its result and its held-out data."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0], names)
    return names["result"], names["held_out"]


def draw(result: fx.Result, held_out: dict[str, torch.Tensor], path: pathlib.Path, ink: str) -> None:
    """Draws what the model has learned, and the curves of the run.

    Args:
        result: The result of the example.
        held_out: Its held-out data.
        path: The file to write.
        ink: The color of texts and axes.
    """
    colors = dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], ink)
    style = {**colors, "svg.hashsalt": "fxtrain", "axes.spines.top": False, "axes.spines.right": False}
    with plt.style.context(style):
        figure, (plane, *panels) = plt.subplots(
            1, 3, figsize=(10, 2.9), width_ratios=[1, 1.4, 1.4], layout="constrained"
        )
        _draw_plane(plane, result.state, held_out)
        for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
            train, held = result.history[f"train/{name}"], result.history[f"eval/{name}"]
            axes.plot(train.steps, train.values, color=BLUE, alpha=0.5, linewidth=1, label="training")
            axes.plot(held.steps, held.values, color=ORANGE, marker="o", markersize=4, label="held out")
            axes.set_title(name, loc="left")
            axes.set_xlabel("step")
        panels[0].legend(frameon=False)
        panels[1].annotate(
            f"stopped:\n{result.reason}", (held.steps[-1], held.values[-1]), (0.97, 0.5), textcoords="axes fraction",
            ha="right", arrowprops={"arrowstyle": "->", "color": ink},
        )  # fmt: skip
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _draw_plane(axes: Axes, state: fx.TrainState, held_out: dict[str, torch.Tensor]) -> None:
    ticks = torch.linspace(-1.05, 1.05, 160)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)
    with torch.no_grad():
        second = fx.view(state)(grid).softmax(-1)[..., 1]
    axes.contourf(ticks, ticks, second, levels=[0, 0.5, 1], colors=[BLUE, ORANGE], alpha=0.3)
    for label, color in enumerate((BLUE, ORANGE)):
        x = held_out["x"][held_out["y"] == label][::2]  # enough to see the spirals, in a small file
        axes.scatter(x[:, 0], x[:, 1], s=5, color=color)
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_title("held-out points", loc="left")


if __name__ == "__main__":
    example = run_example()
    for theme, ink in INK.items():
        draw(*example, ROOT / "notebooks" / f"run_{theme}.svg", ink)
