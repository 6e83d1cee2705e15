"""Figures of a run that no callback measures: graphs compiled, and how much of an epoch is padding."""

from __future__ import annotations

from typing import Any

from fxtrain.core import Control, EpochEnd, FitEnd, TrainState
from fxtrain.fold import Handler, on


def figures(step: Any, data: Any) -> list[Handler]:
    """The callbacks that publish what is known of a step and of its data. Nothing is measured on a device.

    - ``compile/graphs`` and ``compile/seconds`` at ``FitEnd``: the graphs of a compiled step, and how long this process
      spent on making them. More graphs than kinds of batches are recompilations.
    - ``compile/pending`` and ``compile/uncompiled_steps`` there too, with ``background=True``: the graphs that are not
      compiled yet, and how many steps ran uncompiled meanwhile.
    - ``data/padding`` at each ``EpochEnd``: the share of padding in the batches of that epoch, between 0 and 1, where
      the data source counts it, as those of ``fxtrain.data.padded``, ``bucketed`` and ``packed`` do.

    Args:
        step: Compiled or not.
        data: A data source.
    """
    found = list[Handler]()
    if hasattr(step, "graphs") and hasattr(step, "seconds") and hasattr(step, "background"):

        def compilation(state: TrainState, event: FitEnd) -> tuple[TrainState, Control]:
            log = {"compile/graphs": step.graphs, "compile/seconds": step.seconds}
            if step.background:
                log |= {"compile/pending": step.pending, "compile/uncompiled_steps": step.uncompiled_steps}
            return state, Control(log=log)

        found.append(on(FitEnd, compilation))
    source = _counting_padding(data)
    if source is not None:

        def padding(state: TrainState, event: EpochEnd) -> tuple[TrainState, Control]:
            return state, Control(log={"data/padding": source.padding(event.epochs_done - 1).fraction})

        found.append(on(EpochEnd, padding))
    return found


def _counting_padding(data: Any) -> Any:
    """The source that counts its padding, below those that read ahead or change its batches; None if there is none."""
    while data is not None and not hasattr(data, "padding"):
        data = getattr(data, "source", None)
    return data
