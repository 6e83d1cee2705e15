"""Renders the head of a page: the headline of a run, or a table that compares several runs."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence

from fxtrain.core import format_duration
from fxtrain.core._html import element
from fxtrain.report import _validation as validation
from fxtrain.report._html import section, table
from fxtrain.report._run import Run, Session

_MAX_BEST = 4  # evaluation metrics in the headline
_MAX_BARS = 40
_MAX_DIFFERENCES = 200  # rows


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Returns a name for each run: the given one or that of its folder, with the parent folder where they are equal."""
    given = [validation.words(run.about.get("name")) or run.name for run in runs]
    names: list[str] = []
    for run, name in zip(runs, given, strict=True):
        if given.count(name) > 1 and run.folder is not None:
            name = os.path.join(os.path.basename(os.path.dirname(run.folder.root)), run.name)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def header(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the title, the best metrics and the facts of a run, or a table with those of several runs."""
    best = [_best_metrics(run) for run in runs]
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        title, found = runs[0].name, f'<dl class="best">{_items(best[0])}</dl><dl>{_items(facts[0])}</dl>'
    else:
        title = f"{len(runs)} runs"
        # Columns in the order of the first run that has them.
        metrics = list(dict.fromkeys(name for each in best for name in each))[:_MAX_BEST]
        others = [name for name in facts[0] if any(each[name] for each in facts)]
        rows = [
            (name, *(_emphasized(metric, values, best) for metric in metrics), *(each[other] for other in others))
            for name, values, each in zip(names, best, facts, strict=True)
        ]
        found = table(("run", *metrics, *others), rows, "runs")
    return f"<header><h1>{html.escape(title)}</h1>{found}{_bars(runs, names)}</header>"


def differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns the section of configuration values that differ between runs."""
    found = [dict(validation.flattened(run.config)) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for each in found for key in each)
        if len({each.get(key) for each in found}) > 1
    ]
    rows = [(key, *(each.get(key, "") for each in found)) for key in keys[:_MAX_DIFFERENCES]]
    beyond = f"<p>{len(keys) - _MAX_DIFFERENCES:,} more differ.</p>" if len(keys) > _MAX_DIFFERENCES else ""
    return section("Differences", table(("", *names), rows) + beyond if rows else "")


def end_of(session: Session) -> str:
    """Returns the reason why a session ended."""
    return session["reason"] or "running or killed: no end was recorded"


def _emphasized(metric: str, values: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> str:
    """Returns the value of a metric, as bold HTML if no run has a better one."""
    found = [float(each[metric]) for each in others if metric in each]
    best = min(found) if metric.startswith("lowest") else max(found)
    value = values.get(metric, "")
    return element("strong", value) if value and float(value) == best else value


def _items(facts: Mapping[str, str]) -> str:
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
        if value
    )


def _facts(run: Run) -> dict[str, str]:
    last = run.sessions[-1] if run.sessions else None
    seconds = sum(session["seconds"] for session in run.sessions)
    step = max((steps[-1] for steps, _ in run.curves.values()), default=0)
    return {
        "step": f"{step:,}",
        "status": end_of(last) if last is not None else "",
        "time": format_duration(seconds) if 0 < seconds < math.inf else "",
        "sessions": str(len(run.sessions)) if len(run.sessions) > 1 else "",
        "device": _device(last["environment"] if last is not None else {}),
    }


def _best_metrics(run: Run) -> dict[str, str]:
    """Returns up to four evaluation metrics: the lowest loss, error or perplexity, and the highest of others."""
    found: dict[str, str] = {}
    for name, (_, values) in sorted(run.curves.items(), key=lambda item: ("loss" not in item[0], item[0])):
        finite = [value for value in values if math.isfinite(value)]
        if name.startswith("eval/") and finite and len(found) < _MAX_BEST:
            lower = any(word in name for word in ("loss", "error", "perplexity", "bits"))
            found[f"{'lowest' if lower else 'highest'} {name}"] = f"{min(finite) if lower else max(finite):.4g}"
    return found


def _device(environment: Mapping[str, object]) -> str:
    device = validation.words(environment.get("gpu")) or validation.words(environment.get("device"))
    threads = validation.words(environment.get("threads"))
    return f"{device}, {threads} thread{'s' * (threads != '1')}" if device == "cpu" and threads else device


def _bars(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Returns bars for each comparison in the results, such as the bits per byte of a model and of its baselines.

    A comparison is an object of at least two numbers. The first belongs to the run. Others that are equal in all runs
    are drawn once.
    """
    parts: list[str] = []
    for title in dict.fromkeys(title for run in runs for title in run.result):
        found: dict[str, tuple[float, str]] = {}
        for run_index, (run, name) in enumerate(zip(runs, names, strict=True)):
            for index, (entry, value) in enumerate(_numbers(run.result.get(title)).items()):
                own = f' data-run="{run_index}"' if index == 0 else ""
                label = name if own and len(runs) > 1 else entry
                if found.setdefault(label, (value, own)) != (value, own):
                    found[f"{entry}, {name}"] = value, own
        if len(found) > 1:
            most = max(value for value, _ in found.values()) or 1.0
            bars = "".join(
                f"<tr><th>{html.escape(label)}</th><td>{value:.4g}</td>"
                f'<td><i{own} style="width:{value / most:.1%}"></i></td></tr>'
                for label, (value, own) in sorted(found.items(), key=lambda item: item[1])[:_MAX_BARS]
            )
            parts.append(f'<h3>{html.escape(title.replace("_", " "))}</h3><table class="bars">{bars}</table>')
    return "".join(parts[:_MAX_BEST])


def _numbers(value: object) -> dict[str, float]:
    """Returns an object whose values are all numbers that bars can show, and otherwise nothing."""
    if not isinstance(value, dict) or len(value) < 2:
        return {}
    numbers = {
        str(name)[:100]: float(each)
        for name, each in value.items()
        if isinstance(each, int | float) and not isinstance(each, bool) and 0 <= each < 1e300
    }
    return numbers if len(numbers) == len(value) else {}
