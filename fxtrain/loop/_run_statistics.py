"""Statistics that each run publishes: of the compilation of its step, and of the padding of its data."""

from __future__ import annotations

from typing import Any

from fxtrain.core import Control, EpochEnd, FitEnd, TrainState
from fxtrain.data import Source
from fxtrain.fold import Handler, on


def run_statistics(step: Any, data: Source) -> list[Handler]:
    """Returns callbacks that publish statistics of a step and its data. Nothing is measured on a device.

    - ``compile/graphs`` and ``compile/seconds`` at ``FitEnd``: the number of graphs of a compiled step, and the time
      this process spent compiling them. More graphs than batch shapes mean recompilations.
    - ``compile/pending`` and ``compile/uncompiled_steps`` at ``FitEnd``, with ``background=True``: the number of graphs
      not compiled yet, and the number of steps that ran uncompiled.
    - ``data/padding`` at ``EpochEnd``: the fraction of padding in the batches of the epoch, if the data source counts
      it, as those of ``fxtrain.data.padded``, ``bucketed`` and ``packed`` do.

    Args:
        step: Compiled or not.
        data: A data source.
    """
    found = list[Handler]()
    if hasattr(step, "uncompiled_steps"):

        def compilation(state: TrainState, event: FitEnd) -> tuple[TrainState, Control]:
            log = {"compile/graphs": step.graphs, "compile/seconds": step.seconds}
            if step.background:
                log |= {"compile/pending": step.pending, "compile/uncompiled_steps": step.uncompiled_steps}
            return state, Control(log=log)

        found.append(on(FitEnd, compilation))
    source: Any = data
    while source is not None and not hasattr(source, "padding"):
        source = getattr(source, "source", None)  # the source that it wraps
    if source is not None:

        def padding(state: TrainState, event: EpochEnd) -> tuple[TrainState, Control]:
            return state, Control(log={"data/padding": source.padding(event.epochs_done - 1).fraction})

        found.append(on(EpochEnd, padding))
    return found
