"""Renders a run as one self-contained HTML file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
from collections.abc import Mapping
from importlib.resources import files

from fxtrain.core import format_duration
from fxtrain.report import _validation as validation
from fxtrain.report._downsampling import evenly
from fxtrain.report._html import card, grid, section, table
from fxtrain.report._panels import heat, sections
from fxtrain.report._run import Mark, Run, Session
from fxtrain.report._samples import Embedded, confusion, media, tables, texts

_MAX_MARKS = 300  # per kind, evenly spaced
_MAX_EVENTS = 200  # rows in the table of events, the latest
_MAX_FACTS = 1000  # rows in the table of a configuration
_MAX_SESSIONS = 100


def page(run: Run) -> str:
    """Renders a run as one HTML page, which needs neither a server nor a network connection.

    Damaged media files are recorded in ``run.folder.problems``. A section at the top of the page lists all problems.

    Args:
        run: A run as returned by ``read_run``.

    Returns:
        The HTML text.

    Example:
        >>> import pathlib, tempfile, fxtrain.report as report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/loss": 0.5}}\\n')
        ...     html = report.page(report.read_run(folder))
        >>> html[:15]
        '<!doctype html>'
    """
    style, script = (files("fxtrain.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    kinds: dict[str, list[Mark]] = {}
    for mark in run.marks:
        kinds.setdefault(mark.kind, []).append(mark)
    data = {
        "sections": sections(run),
        "marks": [dataclasses.asdict(mark) for marks in kinds.values() for mark in evenly(marks, _MAX_MARKS)],
        "counts": {kind: len(marks) for kind, marks in kinds.items()} | run.counts,
        "histograms": {name: heat(found.items) for name, found in run.histograms.items()},
    }
    # Escape "<", which could end the script or begin a comment.
    embedded_data = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    embedded = Embedded(run.folder)
    seen = media(run, embedded) + confusion(run) + tables(run, embedded) + texts(run)
    # The script draws the main curves into "first", and all other panels into "rest".
    main = f'<div id="tools"></div><div id="first"></div>{seen}<div id="rest"></div>{_events(run)}{_summary(run)}'
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.name)}</title><style>{style}</style></head><body>"
        f"{_head(run)}<main>{_problems(run)}{main}</main>"
        f'<script type="application/json" id="data">{embedded_data}</script>'
        f"<script>{script}</script></body></html>\n"
    )
    # File names and JSON strings may contain surrogates, which cannot be encoded.
    return text.encode("utf-8", "replace").decode("utf-8")


def _policy(script: str) -> str:
    """Returns a content security policy that allows only the page's script and embedded data.

    Even a text that was not escaped could not run as code.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _problems(run: Run) -> str:
    lines = run.folder.problems.lines() if run.folder is not None else []
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return section("Problems", f"<ul>{items}</ul>" if items else "")


def _head(run: Run) -> str:
    last = run.sessions[-1] if run.sessions else None
    seconds = sum(session["seconds"] for session in run.sessions)
    step = max((steps[-1] for steps, _ in run.curves.values()), default=0)
    facts = {
        "step": f"{step:,}",
        "status": _end(last) if last is not None else "",
        "time": format_duration(seconds) if 0 < seconds < math.inf else "",
        "sessions": str(len(run.sessions)) if len(run.sessions) > 1 else "",
        "device": _device(last["environment"] if last is not None else {}),
    }
    facts |= {name: f"{value:.4g}" for name, value in _best_metrics(run).items()}
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
        if value
    )
    return f"<header><h1>{html.escape(run.name)}</h1><dl>{rows}</dl></header>"


def _best_metrics(run: Run) -> dict[str, float]:
    """Returns up to four evaluation metrics: the lowest loss, error or perplexity, and the highest of others."""
    found: dict[str, float] = {}
    for name, (_, values) in sorted(run.curves.items(), key=lambda item: ("loss" not in item[0], item[0])):
        finite = [value for value in values if math.isfinite(value)]
        if name.startswith("eval/") and finite:
            lower = "loss" in name or "error" in name or "perplexity" in name
            found[f"{'lowest' if lower else 'highest'} {name}"] = min(finite) if lower else max(finite)
    return dict(list(found.items())[:4])


def _device(environment: Mapping[str, object]) -> str:
    device = validation.words(environment.get("gpu")) or validation.words(environment.get("device"))
    threads = validation.words(environment.get("threads"))
    return f"{device}, {threads} thread{'s' * (threads != '1')}" if device == "cpu" and threads else device


def _events(run: Run) -> str:
    """Returns the section of events. Checkpoints and improvements are only counted, because there are many."""
    events = [mark for mark in run.marks if mark.kind not in ("saved", "improved")]
    rows = [(f"{mark.step:,}", mark.kind, mark.text) for mark in events[-_MAX_EVENTS:]]
    notes: list[str] = []
    for kind, one, many in (
        ("saved", "checkpoint was saved", "checkpoints were saved"),
        ("improved", "improvement was found", "improvements were found"),
    ):
        steps = [mark.step for mark in run.marks if mark.kind == kind]
        if steps:
            count = run.counts.get(kind, len(steps))
            what = f"{count:,} {many}, the last one" if count > 1 else f"One {one},"
            notes.append(f"{what} at step {steps[-1]:,}.")
    if len(events) > _MAX_EVENTS:
        notes.append(f"These are the last {_MAX_EVENTS} of {len(events):,} events.")
    note = f"<p>{' '.join(notes)}</p>" if notes else ""
    return section("Events", note + (table(("step", "event", "reason"), rows, "story") if rows else ""))


def _summary(run: Run) -> str:
    text = f'<div class="wide"><pre>{html.escape(run.summary)}</pre></div>' if run.summary else ""
    if run.sessions:
        heads = ("began", "from step", "ended", "at step", "reason")
        rows = [
            (_when(each.get("began")), each.get("from_step"), _when(each.get("ended")), each.get("to_step"), _end(each))
            for each in run.sessions[-_MAX_SESSIONS:]
        ]
        text += f"<h3>Sessions</h3>{table(heads, rows, 'sessions')}"
    facts = {
        "Run": run.about,
        "Environment": run.sessions[-1].get("environment", {}) if run.sessions else {},
        "Configuration": run.config,
        "Result": run.result,
    }
    cards = [card(title, _fact_table(values)) for title, values in facts.items() if values]
    return section("Summary", text + grid(cards))


def _fact_table(values: Mapping[str, object]) -> str:
    rows = list(validation.flattened(values))
    beyond = f"<p>{len(rows) - _MAX_FACTS:,} more are in the run's folder.</p>" if len(rows) > _MAX_FACTS else ""
    return table((), rows[:_MAX_FACTS], "facts") + beyond


def _end(session: Session) -> str:
    return session["reason"] or "running or killed: no end was recorded"


def _when(time: str | None) -> str:
    return (time or "").replace("T", " ").replace("+00:00", " UTC")
