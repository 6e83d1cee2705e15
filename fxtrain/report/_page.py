"""Renders runs as one self-contained HTML file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePath

from fxtrain.report import _validation as validation
from fxtrain.report._downsampling import evenly
from fxtrain.report._html import card, grid, section, table
from fxtrain.report._overview import differences, distinct_names, end_of, header
from fxtrain.report._panels import clocks, heat, sections
from fxtrain.report._run import Mark, Run
from fxtrain.report._samples import Cards, Samples

_SCRIPTS = ("uPlot.iife.min.js", "helpers.js", "panel.js", "plots.js", "page.js")  # in order of use
_MAX_RUNS = 50
_MAX_MARKS = 300  # per run and kind, evenly spaced
_MAX_EVENTS = 200  # rows in the table of events, the latest
_MAX_FACTS = 1000  # rows in the table of a configuration
_MAX_SESSIONS = 100


def page(*runs: Run, path: str | os.PathLike[str] | None = None) -> str:
    """Renders a run, or a comparison of several runs, as one HTML page without a server or a network connection.

    The curves of several runs for one metric share a panel, with one color for each run. A table compares the states
    and best metrics of the runs, and another one the values of their configurations that differ.

    Damaged media files are recorded in ``run.folder.problems``. A section at the top of the page lists all problems.

    Args:
        runs: One to fifty runs as returned by ``read_run``.
        path: The file that the page will be written to, for links to interactive figures. Defaults to a file in the
            folder of the run, or in the folder that contains the folders of all runs.

    Returns:
        The HTML text.

    Raises:
        ValueError: There are no runs, or more than fifty.

    Example:
        >>> import pathlib, tempfile, fxtrain.report as report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "metrics.jsonl").write_text('{"step": 1, "metrics": {"train/loss": 0.5}}\\n')
        ...     html = report.page(report.read_run(folder))
        >>> html[:15]
        '<!doctype html>'
    """
    if not 1 <= len(runs) <= _MAX_RUNS:
        raise ValueError(f"expected from 1 to {_MAX_RUNS} runs, got {len(runs)}. Choose fewer.")
    names = distinct_names(runs)
    style, code = _resource("uPlot.min.css") + _resource("page.css"), _script()
    # Escape "<", which could end the script or begin a comment.
    data = json.dumps(_data(runs, names), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    main = _main(runs, names, path)  # before the problems, which it may add to
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title[:200])}</title><style>{style}</style></head><body>"
        f"{header(runs, names)}<main>{_problems(runs, names)}{main}</main>"
        f'<script type="application/json" id="data">{data}</script>'
        f"<script>{code}</script></body></html>\n"
    )
    # File names and JSON strings may contain surrogates, which cannot be encoded.
    return text.encode("utf-8", "replace").decode("utf-8")


def _resource(name: str) -> str:
    return files("fxtrain.report").joinpath(name).read_text("utf-8")


def _script() -> str:
    """Returns the code of the page, with the license of uPlot as its terms require."""
    return f"/*\n{_resource('uPlot.LICENSE')}*/\n" + "\n".join(map(_resource, _SCRIPTS))


def _policy(script: str) -> str:
    """Returns a content security policy that allows only the page's script and embedded data.

    Even a text that was not escaped could not run as code.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(runs: Sequence[Run], names: Sequence[str]) -> dict[str, object]:
    """Returns the values that the script draws."""
    marks: list[dict[str, object]] = []
    counts: dict[str, int] = {}
    histograms: list[dict[str, object]] = []
    for index, run in enumerate(runs):
        kinds: dict[str, list[Mark]] = {}
        for mark in run.marks:
            kinds.setdefault(mark.kind, []).append(mark)
        for kind, found in kinds.items():
            marks += [{"run": index, **dataclasses.asdict(mark)} for mark in evenly(found, _MAX_MARKS)]
            counts[kind] = counts.get(kind, 0) + run.counts.get(kind, len(found))
        histograms += [{"run": index, "name": name, **heat(each.items)} for name, each in run.histograms.items()]
    return {
        "runs": [{"name": name, **clocks(run)} for run, name in zip(runs, names, strict=True)],
        "sections": sections(runs),
        "marks": marks,
        "counts": counts,
        "histograms": sorted(histograms, key=lambda each: str(each["name"])),
    }


def _main(runs: Sequence[Run], names: Sequence[str], path: str | os.PathLike[str] | None) -> str:
    labels = names if len(runs) > 1 else [""]
    samples = [
        Samples(run, label, len(runs), link) for run, label, link in zip(runs, labels, _links(runs, path), strict=True)
    ]

    def cards(make: Callable[[Samples], Cards]) -> list[str]:
        """Returns the cards of all runs, those of one name next to each other."""
        found = [each for sample in samples for each in make(sample)]
        return [content for _, content in sorted(found, key=lambda each: each[0])]

    # The script draws the main curves into "first", and all other panels into "rest".
    return "".join(
        (
            '<div id="tools"></div><div id="first"></div>',
            section("Samples", grid(cards(Samples.media))),
            section("Confusion", grid(cards(Samples.confusion))),
            section("Tables", "".join(cards(Samples.tables))),
            section("Texts", "".join(cards(Samples.texts))),
            '<div id="rest"></div>',
            differences(runs, names) if len(runs) > 1 else "",
            section("Events", _per_run(labels, [_events(run) for run in runs])),
            section("Summary", _per_run(labels, [_summary(run) for run in runs])),
        )
    )


def _links(runs: Sequence[Run], path: str | os.PathLike[str] | None) -> list[str]:
    """Returns the paths of the run folders relative to the page."""
    roots = ["" if run.folder is None else run.folder.root for run in runs]
    try:
        base = os.path.commonpath(roots) if path is None else os.path.dirname(os.path.realpath(path))
        return [PurePath(os.path.relpath(root, base)).as_posix() if root else "" for root in roots]
    except ValueError:  # folders on several drives of Windows, or runs without a folder
        return [PurePath(root).as_posix() for root in roots]


def _per_run(labels: Sequence[str], contents: Sequence[str]) -> str:
    """Returns HTML contents, each in an element that opens at its label. The label of a single run is empty."""
    return "".join(
        f"<details><summary>{html.escape(label)}</summary>{content}</details>" if label else content
        for label, content in zip(labels, contents, strict=True)
        if content
    )


def _problems(runs: Sequence[Run], names: Sequence[str]) -> str:
    lines = [
        line if len(runs) == 1 else f"{name}/{line}"
        for run, name in zip(runs, names, strict=True)
        if run.folder is not None
        for line in run.folder.problems.lines()
    ]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return section("Problems", f"<ul>{items}</ul>" if items else "")


def _events(run: Run) -> str:
    """Returns the table of events. Checkpoints and improvements are only counted, because there are many."""
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
    return note + (table(("step", "event", "reason"), rows, "story") if rows else "")


def _summary(run: Run) -> str:
    text = f'<div class="wide"><pre>{html.escape(run.summary)}</pre></div>' if run.summary else ""
    if run.sessions:
        heads = ("began", "from step", "ended", "at step", "reason")
        rows = [
            (
                _when(each.get("began")),
                each.get("from_step"),
                _when(each.get("ended")),
                each.get("to_step"),
                end_of(each),
            )
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
    return text + grid(cards)


def _fact_table(values: Mapping[str, object]) -> str:
    rows = list(validation.flattened(values))
    beyond = f"<p>{len(rows) - _MAX_FACTS:,} more are in the run's folder.</p>" if len(rows) > _MAX_FACTS else ""
    return table((), rows[:_MAX_FACTS], "facts") + beyond


def _when(time: str | None) -> str:
    return (time or "").replace("T", " ").replace("+00:00", " UTC")
