"""Formats the table of the zoo: the checks of each model, and the share that compiles to one graph."""

from __future__ import annotations

from typing import Any

from zoo.case import Case, Limitation

COLUMNS = ("model", "package", "eager", "differentiate", "compile route", "parity", "first step")
ONE_GRAPH = ("traced", "dynamo")

_HEAD = """# The zoo

{summary}

- **eager**: three uncompiled steps compared with a plain PyTorch loop, in float64: the largest relative difference of
  losses, parameters and buffers. At most 1e-9 passes.
- **differentiate**: the method that `fx.train_step(..., differentiate="auto")` chose at the first step.
- **compile route**: the route of `fx.compile`. "traced" and "dynamo" are a single graph of the whole step. A graph
  "with checks" is valid for the values of its batch, and each call checks them. "regions" are several graphs of the
  loss function and one of the optimizer. With "eager forward", only the optimizer is compiled. Graphs marked "not
  compiled" were traced and checked, but run without Inductor (`python -m benchmarks.zoo --interpret`).
- **parity**: compiled steps compared with uncompiled steps in the same way, in float32 with dropout. At most 1e-4
  passes. A run that was saved and restored also ended with the same bits, and exported weights gave the same outputs in
  the original module.
- **first step**: seconds, including compilation, on one core of a machine that was busy with other work. The compiler's
  cache was not cleared between models.

Written by `python -m benchmarks.zoo`.

{rows}
"""


def verdict(result: dict[str, Any], limitation: Limitation | None) -> str:
    """Returns ``"passed"``, ``"failed"`` or ``"limited"`` for a result that was not skipped.

    If a model with a certain limitation passes, the verdict is ``"failed"``, and an error is added to the result.
    """
    if limitation is None:
        return "failed" if result["error"] else "passed"
    if limitation.error in result["error"]:
        return "limited"
    if not limitation.is_certain and not result["error"]:
        return "passed"
    result["error"] = (
        result["error"] or "expected the known limitation of the case, got a pass. Remove the limitation from the case."
    )
    return "failed"


def table(results: dict[str, Any], cases: dict[str, Case]) -> str:
    """Returns the page. Cases without a result have rows, too."""
    rows = [_row(key, results.get(key), case) for key, case in cases.items()]
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return _HEAD.format(
        summary=summary({key: results[key] for key in cases if key in results}, len(cases)),
        rows="\n".join(f"| {' | '.join(line)} |" for line in lines),
    )


def summary(results: dict[str, Any], total: int) -> str:
    counts = {
        status: sum(result["status"] == status for result in results.values())
        for status in ("passed", "failed", "limited", "skipped")
    }
    tried = total - counts["skipped"] - (total - len(results))
    whole = sum(_is_one_graph(result) for result in results.values())
    share = f" ({whole / tried:.0%})" if tried else ""
    interpreted = sum(bool(result.get("interpreted")) for result in results.values())
    dates = sorted({result["date"] for result in results.values()})
    when = f"between {dates[0]} and {dates[-1]}" if len(dates) > 1 else f"on {dates[0]}" if dates else ""
    return (
        f"{total} models of {len({key.partition(': ')[0] for key in results})} packages. {tried} were trained {when}. "
        f"All checks passed for {counts['passed']}; {counts['failed']} failed, "
        f"{counts['limited']} have a known limitation, {counts['skipped']} were skipped because their package is "
        f"missing, {total - len(results)} have no result. **{whole} of {tried}{share} are one graph**; the graphs of "
        f"{interpreted} were run without Inductor."
        if results
        else f"{total} models, without results."
    )


def _is_one_graph(result: dict[str, Any]) -> bool:
    return result["status"] == "passed" and any(f", {name}" in result["route"] for name in ONE_GRAPH)


def _row(key: str, result: dict[str, Any] | None, case: Case) -> tuple[str, ...]:
    package, _, name = key.partition(": ")
    if result is None or result["status"] == "skipped":
        reason = "not run" if result is None else f"skipped: {_cell(result['error'])}"
        return (name, package, reason, "-", "-", "-", "-")
    failed = f"failed: {_cell(result['error'])}"
    if result["status"] == "limited" and case.limitation is not None:
        failed = f"known limitation: {_cell(case.limitation.reason)}"
    is_eager_right = "parity" in result
    return (
        name,
        package,
        f"{result['parity']:.0e}" if is_eager_right else failed,
        result.get("differentiate", "-"),
        _route(result) or (failed if is_eager_right else "-"),
        f"{result['difference']:.0e}" if "difference" in result else "-",
        f"{result['seconds']:.0f} s" if "seconds" in result else "-",
    )


def _route(result: dict[str, Any]) -> str:
    route = result.get("route", "")
    return f"{route}, not compiled" if result.get("interpreted") else route


def _cell(text: str) -> str:
    return text.replace("|", "/")
