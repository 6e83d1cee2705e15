"""Page: a run as one HTML file with all that it shows in it."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
from collections.abc import Iterable, Mapping, Sized
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fxtrain.observers.figures import duration
from fxtrain.report.markdown import as_html
from fxtrain.report.panels import evenly, heat, sections
from fxtrain.report.read import Mark, Run
from fxtrain.writers.encoding import png

_STEPS_OF_MEDIA = 8  # of each name, spread over the run
_BUDGET = 24 * 2**20  # bytes of media in one page
_MARKS = 300  # of each kind, spread over the run
_ROWS = 50  # of a table
_IMAGE_OF_TABLE = 2**18  # bytes; a larger one is in the folder only
_TEXTS = 20  # of each name, spread over the run
_TOLD = 200  # events in words, the latest
_CONFUSED = 20  # pairs of classes
_CLASSES = 32  # a confusion matrix of more is an image
_TYPES = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}


def page(run: Run) -> str:
    """The run as HTML: one file, which needs neither a server nor a network."""
    style, script = (files("fxtrain.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    kinds: dict[str, list[Mark]] = {}
    for mark in run.marks:
        kinds.setdefault(mark.kind, []).append(mark)
    data = {
        "sections": sections(run),
        "marks": [dataclasses.asdict(mark) for marks in kinds.values() for mark in evenly(marks, _MARKS)],
        "counts": {kind: len(marks) for kind, marks in kinds.items()},
        "histograms": {name: heat(found) for name, found in run.histograms.items()},
    }
    # Within a script "<" could end it, or begin a comment.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    seen = _media(run) + _confusion(run) + _tables(run) + _texts(run)
    # The script draws into the two empty places: first what is looked for first, then what is looked up.
    main = f'<div id="tools"></div><div id="first"></div>{seen}<div id="rest"></div>{_story(run)}{_facts(run)}'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.name)}</title><style>{style}</style></head><body>"
        f"{_head(run)}<main>{main}</main>"
        f'<script type="application/json" id="data">{embedded}</script>'
        f"<script>{script}</script></body></html>\n"
    )


# What is read and looked at


def _head(run: Run) -> str:
    last = run.sessions[-1] if run.sessions else {}
    reason = _end(last) if last else ""
    seconds = sum(session.get("seconds", 0) for session in run.sessions)
    step = max((steps[-1] for steps, _ in run.curves.values()), default=0)
    facts = {
        "step": f"{step:,}",
        "how it ended": reason,
        "time": duration(seconds) if seconds else "",
        "sessions": str(len(run.sessions)) if len(run.sessions) > 1 else "",
        "device": _device(last.get("environment", {})),
    }
    facts |= {name: f"{value:.4g}" for name, value in _marks_of_quality(run).items()}
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
        if value
    )
    return f"<header><h1>{html.escape(run.name)}</h1><dl>{rows}</dl></header>"


def _marks_of_quality(run: Run) -> dict[str, float]:
    """The lowest of the evaluation's losses, and the highest of what else it measures."""
    found: dict[str, float] = {}
    for name, (_, values) in sorted(run.curves.items(), key=lambda item: ("loss" not in item[0], item[0])):
        finite = [value for value in values if math.isfinite(value)]
        if name.startswith("eval/") and finite:
            lower = "loss" in name or "error" in name or "perplexity" in name
            found[f"{'lowest' if lower else 'highest'} {name}"] = min(finite) if lower else max(finite)
    return dict(list(found.items())[:4])


def _device(environment: Mapping[str, Any]) -> str:
    device, threads = environment.get("gpu") or environment.get("device") or "", environment.get("threads")
    return f"{device}, {threads} thread{'s' * (threads != 1)}" if device == "cpu" and threads else device


def _media(run: Run) -> str:
    chosen = {name: evenly(sorted(steps), _STEPS_OF_MEDIA) for name, steps in sorted(run.media.items())}
    shown: dict[str, dict[int, str]] = {name: {} for name in chosen}
    budget = _BUDGET
    # The last of every name comes before the second to last of any, so that none takes the room of all.
    for rank in range(1, _STEPS_OF_MEDIA + 1):
        for name, steps in chosen.items():
            paths = run.media[name][steps[-rank]] if rank <= len(steps) else []
            size = sum(path.stat().st_size for path in paths)
            if paths and size <= budget:
                budget -= size
                shown[name][steps[-rank]] = "".join(map(_embedded, paths))
    parts = [
        f'<div class="card"><h3>{html.escape(name)}</h3>{_steps("media", steps)}{_left(run.media[name], steps)}</div>'
        for name, steps in shown.items()
    ]
    return _section("Samples", _grid(parts))


def _steps(kind: str, contents: Mapping[int, str]) -> str:
    """What was made at each step, of which the script shows one at a time."""
    shown = "".join(
        f'<figure><div class="{kind}">{content}</div><figcaption>step {step:,}</figcaption></figure>'
        for step, content in sorted(contents.items())
    )
    return f'<div class="steps">{shown}</div>'


def _left(there: Sized, shown: Sized) -> str:
    left = len(there) - len(shown)
    return f"<p>{left} more {_plural('step', left)} in the run's folder.</p>" if left else ""


def _plural(noun: str, count: int) -> str:
    return f"{noun} is" if count == 1 else f"{noun}s are"


def _embedded(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_TYPES[path.suffix]};base64,{content}"
    if path.suffix == ".wav":
        return f'<audio controls src="{source}"></audio>'
    return f'<img alt="{html.escape(path.parent.name)}" src="{source}">'


def _texts(run: Run) -> str:
    parts: list[str] = []
    for name, texts in sorted(run.texts.items()):
        contents = {step: as_html(text) for step, text in evenly(sorted(texts, key=lambda each: each[0]), _TEXTS)}
        left = _left(dict(texts), contents)
        parts.append(f'<div class="card"><h3>{html.escape(name)}</h3>{_steps("text", contents)}{left}</div>')
    return _section("Texts", "".join(parts))


def _tables(run: Run) -> str:
    parts: list[str] = []
    for name, (step, columns) in sorted(run.tables.items()):
        rows = list(zip(*columns.values(), strict=False))
        left = len(rows) - _ROWS
        note = f"<p>{left} more {_plural('row', left)} in the run's folder.</p>" if left > 0 else ""
        parts.append(f"<h3>{_titled(name, step)}</h3>{_table(columns, rows[:_ROWS])}{note}")
    return _section("Tables", "".join(parts))


def _titled(name: str, step: int) -> str:
    return f"{html.escape(name)} <small>step {step:,}</small>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Any) -> str:
    if isinstance(cell, Path):
        return _embedded(cell) if cell.exists() and cell.stat().st_size <= _IMAGE_OF_TABLE else "(image)"
    return html.escape(f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell))


def _confusion(run: Run) -> str:
    parts: list[str] = []
    for name, (step, labels, counts) in sorted(run.confusion.items()):
        shown = _squares(labels, counts) if len(labels) <= _CLASSES else _pixels(labels, counts)
        note = "<p>Rows are what it is, columns what it was taken for.</p>"
        parts.append(f'<div class="card"><h3>{_titled(name, step)}</h3>{note}{shown}</div>')
    return _section("Confusion", _grid(parts))


def _squares(labels: list[str], counts: list[list[float]]) -> str:
    rows = ""
    for label, row in zip(labels, counts, strict=True):
        total = max(sum(row), 1e-12)
        cells = "".join(
            f'<td{" class=dark" * (count > total / 2)} style="--share:{count / total:.3f}">{count:g}</td>'
            if count
            else "<td></td>"
            for count in row
        )
        rows += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    heads = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    return f'<div class="wide"><table class="confusion"><tr><th></th>{heads}</tr>{rows}</table></div>'


def _pixels(labels: list[str], counts: list[list[float]]) -> str:
    """One pixel for each pair, and a table of the pairs that are mixed up most often."""
    found = np.asarray(counts, float)
    shares = found / np.maximum(found.sum(1, keepdims=True), 1e-12)
    image = base64.b64encode(png(np.round(255 * (1 - shares[..., None])).astype(np.uint8))).decode()
    wrong = found * (1 - np.eye(len(found)))
    most = [divmod(int(place), len(found)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSED]]
    rows = [(labels[row], labels[column], f"{wrong[row, column]:g}") for row, column in most if wrong[row, column]]
    drawn = f'<img class="matrix" alt="confusion matrix" src="data:image/png;base64,{image}">'
    return drawn + (_table(("it is", "taken for", "times"), rows) if rows else "")


def _story(run: Run) -> str:
    """What happened, of the many savings and improvements only how many they were."""
    told = [mark for mark in run.marks if mark.kind not in ("saved", "improved")]
    rows = [(f"{mark.step:,}", mark.kind, mark.text) for mark in told[-_TOLD:]]
    notes: list[str] = []
    for kind, one, many in (
        ("saved", "checkpoint was saved", "checkpoints were saved"),
        ("improved", "improvement was found", "improvements were found"),
    ):
        steps = [mark.step for mark in run.marks if mark.kind == kind]
        if steps:
            what = f"{len(steps):,} {many}, the last one" if len(steps) > 1 else f"One {one},"
            notes.append(f"{what} at step {steps[-1]:,}.")
    if len(told) > _TOLD:
        notes.append(f"These are the last {_TOLD} of {len(told):,} events.")
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    return _section("What happened", note + (_table(("step", "what", "why"), rows, "story") if rows else ""))


def _facts(run: Run) -> str:
    parts: list[str] = []
    if run.summary:
        parts.append(f'<div class="wide"><pre>{html.escape(run.summary)}</pre></div>')
    if run.sessions:
        heads = ("began", "from step", "ended", "at step", "why")
        rows = [
            (_when(each.get("began")), each.get("from_step"), _when(each.get("ended")), each.get("to_step"), _end(each))
            for each in run.sessions
        ]
        parts.append(f"<h3>Sessions</h3>{_table(heads, rows, 'sessions')}")
    facts = {
        "Environment": run.sessions[-1].get("environment", {}) if run.sessions else {},
        "Configuration": run.config,
        "Result": run.result,
    }
    cards = [
        f'<div class="card"><h3>{title}</h3>{_table((), _flat(values), "facts")}</div>'
        for title, values in facts.items()
        if values
    ]
    return _section("Summary", "".join(parts) + (_grid(cards) if cards else ""))


def _end(session: Mapping[str, Any]) -> str:
    return session.get("reason") or "no end was written: it is running, or was killed"


def _when(time: str | None) -> str:
    return (time or "").replace("T", " ").replace("+00:00", " UTC")


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}/")
        elif value is not None:
            rows.append((before + name, _line(value)))
    return rows


def _line(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""
