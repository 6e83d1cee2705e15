"""Renders tables, and confusion matrices as tables or images."""

from __future__ import annotations

import base64
import html
from pathlib import PurePosixPath

import numpy as np

from fxtrain.report._html import card, cell_text, grid, left_out, section, table, titled
from fxtrain.report._run import Confusion, Run
from fxtrain.report._samples import Embedded
from fxtrain.writers._encoding import png

_MAX_IMAGE = 2**18  # bytes of an image in a table; larger images are not embedded
_MAX_CLASSES = 32  # confusion matrices with more classes are drawn as images
_MAX_PAIRS = 20  # most confused pairs of classes


def tables(run: Run, embedded: Embedded) -> str:
    """Returns the section of tables."""

    def cell(value: object) -> str:
        if isinstance(value, PurePosixPath):
            return embedded.html(value, _MAX_IMAGE) or "(image)"
        return cell_text(value)

    parts: list[str] = []
    for name, (step, columns, count) in sorted(run.tables.items()):
        rows = list(zip(*columns.values(), strict=True))
        shown = table(columns, rows, cell=cell)
        parts.append(f"<h3>{titled(name, step)}</h3>{shown}{left_out('row', count - len(rows))}")
    return section("Tables", "".join(parts))


def confusion(run: Run) -> str:
    """Returns the section of confusion matrices."""
    note = "<p>Rows are true classes, columns are predicted classes.</p>"
    return section(
        "Confusion",
        grid(
            card(
                titled(name, found.step), note + (_as_table if len(found.labels) <= _MAX_CLASSES else _as_image)(found)
            )
            for name, found in sorted(run.confusion.items())
        ),
    )


def _as_table(found: Confusion) -> str:
    rows = ""
    for label, row in zip(found.labels, found.counts.tolist(), strict=True):
        total = max(sum(row), 1e-12)
        cells = "".join(
            f'<td{" class=dark" * (count > total / 2)} style="--share:{count / total:.3f}">{count:g}</td>'
            if count
            else "<td></td>"
            for count in row
        )
        rows += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(label)}</th>" for label in found.labels)
    return f'<div class="wide"><table class="confusion"><tr><th></th>{heads}</tr>{rows}</table></div>'


def _as_image(found: Confusion) -> str:
    """Returns an image with one pixel for each pair of classes, and a table of the most confused pairs."""
    labels, counts = found.labels, found.counts
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    image = base64.b64encode(png(np.round(255 * (1 - shares[..., None])).astype(np.uint8))).decode()
    wrong = counts * (1 - np.eye(len(counts)))
    most = [divmod(int(place), len(counts)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]]
    rows = [(labels[row], labels[column], f"{wrong[row, column]:g}") for row, column in most if wrong[row, column]]
    drawn = f'<img class="matrix" alt="confusion matrix" src="data:image/png;base64,{image}">'
    return drawn + (table(("true class", "predicted class", "count"), rows) if rows else "")
