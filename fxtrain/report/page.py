"""Page: a run as one HTML file with all that it shows in it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fxtrain.report.read import Curve, Run

_POINTS = 1000  # of a curve
_STEPS_OF_MEDIA = 6  # the last so many steps of each name are shown
_BUDGET = 24 * 2**20  # bytes of media in one page
_TYPES = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}

# A curve is in the first section with a prefix of its name; what belongs to none is in the first of all.
_SECTIONS = (
    ("Curves", ()),
    ("Gradients and weights", ("grad_", "gradients", "update_ratios", "weight_stats", "weights", "activation")),
    ("Guards", ("nan_guard", "spike_guard", "early_stopping", "reduce_on_plateau")),
    ("Speed and machine", ("throughput", "memory/", "system/", "hyperparams", "lr")),
)


def page(run: Run) -> str:
    """The run as HTML: one file, which needs neither a server nor a network."""
    here = files("fxtrain.report")
    data = {
        "sections": _sections(run),
        "marks": [{"step": mark.step, "kind": mark.kind, "text": mark.text} for mark in run.marks],
        "histograms": {name: _heat(found) for name, found in run.histograms.items()},
    }
    # Within a script, "</" would end it.
    embedded = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    body = [_head(run), '<main><div id="tools"></div><div id="charts"></div>']
    body += [_media(run), _texts(run), _tables(run), _confusion(run), _story(run), _facts(run), "</main>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.name)}</title><style>{here.joinpath('page.css').read_text()}</style></head><body>"
        f'{"".join(body)}<script type="application/json" id="data">{embedded}</script>'
        f"<script>{here.joinpath('page.js').read_text()}</script></body></html>\n"
    )


# Curves


def _sections(run: Run) -> list[dict[str, Any]]:
    sections: dict[str, dict[str, list[dict[str, Any]]]] = {title: {} for title, _ in _SECTIONS}
    for name in sorted(run.curves, key=lambda name: ("loss" not in name, name)):
        title = next((t for t, starts in _SECTIONS if any(name.startswith(s) for s in starts)), _SECTIONS[0][0])
        panel = name.removeprefix("train/").removeprefix("eval/")
        steps, values = _thinned(run.curves[name])
        shown = [value if math.isfinite(value) else None for value in values]
        sections[title].setdefault(panel, []).append({"name": name, "steps": steps, "values": shown})
    return [
        {"title": title, "panels": [{"title": panel, "series": series} for panel, series in panels.items()]}
        for title, panels in sections.items()
        if panels
    ]


def _thinned(curve: Curve) -> Curve:
    """At most so many points: of each stretch the least and the largest, so that no spike is lost."""
    steps, values = curve
    if len(steps) <= _POINTS:
        return curve
    chosen: list[int] = []
    stretch = 2 * len(steps) / _POINTS
    for index in range(_POINTS // 2):
        part = range(round(index * stretch), round((index + 1) * stretch))
        finite = [i for i in part if math.isfinite(values[i])] or list(part)[:1]
        chosen += sorted({min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])})
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _heat(found: list[tuple[int, list[float], list[float]]]) -> dict[str, Any]:
    """The latest histograms whose edges are alike, one column a step."""
    edges = found[-1][2]
    alike = [(step, counts) for step, counts, each in found if len(each) == len(edges)][-100:]
    return {"steps": [step for step, _ in alike], "counts": [counts for _, counts in alike], "edges": edges}


# What is read and looked at


def _head(run: Run) -> str:
    last = run.sessions[-1] if run.sessions else {}
    reason = last.get("reason") or ("no end was written: it is running, or was killed" if last else "")
    seconds = sum(session.get("seconds", 0) for session in run.sessions)
    step = max((steps[-1] for steps, _ in run.curves.values()), default=0)
    facts = {
        "step": f"{step:,}",
        "how it ended": reason,
        "time": _duration(seconds) if seconds else "",
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
    """The best of the evaluation's losses, or the last of the training's."""
    found: dict[str, float] = {}
    for name, (_, values) in run.curves.items():
        finite = [value for value in values if math.isfinite(value)]
        if name.startswith("eval/") and finite:
            lower = "loss" in name or "error" in name or "perplexity" in name
            found[f"{'least' if lower else 'most'} {name}"] = min(finite) if lower else max(finite)
    return dict(sorted(found.items())[:4])


def _device(environment: Mapping[str, Any]) -> str:
    device = environment.get("gpu") or environment.get("device") or ""
    return f"{device}, {environment['threads']} threads" if device == "cpu" else device


def _media(run: Run) -> str:
    parts: list[str] = []
    budget = _BUDGET
    in_tables = {path for _, columns in run.tables.values() for cells in columns.values() for path in map(_path, cells)}
    for name, steps in sorted(run.media.items()):
        shown: list[str] = []
        for step in sorted(steps)[-_STEPS_OF_MEDIA:][::-1]:
            paths = [path for path in steps[step] if path not in in_tables]
            size = sum(path.stat().st_size for path in paths)
            if paths and size <= budget:
                budget -= size
                content = "".join(map(_embedded, paths))
                shown.append(f"<figure><div>{content}</div><figcaption>step {step:,}</figcaption></figure>")
        if shown:
            left = len(steps) - len(shown)
            note = f"<p>{left} more steps are in the run's folder.</p>" if left > 0 else ""
            parts.append(f'<h3>{html.escape(name)}</h3><div class="media">{"".join(shown)}</div>{note}')
    return _section("Samples", "".join(parts))


def _path(cell: Any) -> Any:
    return cell if isinstance(cell, Path) else None


def _embedded(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_TYPES[path.suffix]};base64,{content}"
    if path.suffix == ".wav":
        return f'<audio controls src="{source}"></audio>'
    return f'<img loading="lazy" alt="{html.escape(path.parent.name)}" src="{source}">'


def _texts(run: Run) -> str:
    parts: list[str] = []
    for name, texts in sorted(run.texts.items()):
        latest = sorted(texts, reverse=True)[:20]
        shown = "".join(
            f"<details{'' if index else ' open'}><summary>step {step:,}</summary><pre>{html.escape(text)}</pre>"
            "</details>"
            for index, (step, text) in enumerate(latest)
        )
        parts.append(f"<h3>{html.escape(name)}</h3>{shown}")
    return _section("Texts", "".join(parts))


def _tables(run: Run) -> str:
    parts: list[str] = []
    for name, (step, columns) in sorted(run.tables.items()):
        rows = list(zip(*columns.values(), strict=False))[:50]
        parts.append(f"<h3>{html.escape(name)}, step {step:,}</h3>{_table(columns, rows)}")
    return _section("Tables", "".join(parts))


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Any) -> str:
    if isinstance(cell, Path):
        return _embedded(cell) if cell.exists() else "(image)"
    return html.escape(f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell))


def _confusion(run: Run) -> str:
    parts: list[str] = []
    for name, (step, labels, counts) in sorted(run.confusion.items()):
        rows = ""
        for label, row in zip(labels, counts, strict=True):
            total = max(sum(row), 1e-12)
            cells = "".join(f'<td style="--share:{count / total:.3f}">{count:g}</td>' for count in row)
            rows += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
        heads = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
        parts.append(
            f"<h3>{html.escape(name)}, step {step:,}</h3><p>Rows are what it is, columns what it was taken for.</p>"
            f'<div class="wide"><table class="confusion"><tr><th></th>{heads}</tr>{rows}</table></div>'
        )
    return _section("Confusion", "".join(parts))


def _story(run: Run) -> str:
    """What happened, the many savings left out."""
    told = [mark for mark in run.marks if mark.kind != "saved"]
    saved = [mark.step for mark in run.marks if mark.kind == "saved"]
    rows = [(f"{mark.step:,}", mark.kind, mark.text) for mark in told[-200:]]
    note = f"<p>{len(saved)} checkpoints were saved, the last one at step {saved[-1]:,}.</p>" if saved else ""
    return _section("What happened", note + (_table(("step", "what", "why"), rows) if rows else ""))


def _facts(run: Run) -> str:
    parts: list[str] = []
    if run.summary:
        parts.append(f'<div class="wide"><pre>{html.escape(run.summary)}</pre></div>')
    if run.sessions:
        heads = ("began", "from step", "ended", "at step", "why")
        rows = [
            [session.get(key) for key in ("began", "from_step", "ended", "to_step", "reason")]
            for session in run.sessions
        ]
        parts.append(f"<h3>Sessions</h3>{_table(heads, rows)}")
        environment = run.sessions[-1].get("environment", {})
        parts.append(
            f"<h3>Environment</h3>{_table(('what', 'value'), [(k, _line(v)) for k, v in environment.items() if v])}"
        )
    if run.config:
        parts.append(f"<h3>Configuration</h3>{_table(('name', 'value'), _flat(run.config))}")
    if run.result:
        parts.append(f"<h3>Result</h3>{_table(('name', 'value'), _flat(run.result))}")
    return _section("Summary", "".join(parts))


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}/")
        else:
            rows.append((before + name, _line(value)))
    return rows


def _line(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
