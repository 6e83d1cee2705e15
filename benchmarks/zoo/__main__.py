"""Trains every model of tests/zoo, each in a process with a time limit, and writes ``benchmarks/ZOO.md``.

    python -m benchmarks.zoo                         # all of them
    python -m benchmarks.zoo --only llama,timm       # those whose "package: name" contains one of these
    python -m benchmarks.zoo --part 2/3              # every third one
    python -m benchmarks.zoo --eager                 # without compiling

Results are kept in ``benchmarks/zoo/results.json``, so a run of a few models updates the table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import warnings
from typing import Any

HERE = pathlib.Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE.parent / "ZOO.md"
COLUMNS = ("model", "package", "eager", "compiled how", "parity", "first step seconds")
sys.path.insert(0, str(HERE.parents[1] / "tests"))


def main() -> None:
    given = options()
    if given.worker:
        print(json.dumps(checked(given.worker, eager=given.eager)))
        return
    import zoo

    keys = list(zoo.cases())
    if given.only:
        keys = [key for key in keys if any(part in key for part in given.only.split(","))]
    if given.part:
        index, count = map(int, given.part.split("/"))
        keys = keys[index - 1 :: count]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for key in keys:
        results[key] = {**results.get(key, {}), **in_a_process(key, given.timeout, eager=given.eager)}
        print(key, results[key], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        TABLE.write_text(table(results))
    if any("error" in results[key] and results[key]["error"] for key in keys):
        raise SystemExit(1)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAMES", help="parts of package and name, separated by commas")
    parser.add_argument("--part", metavar="K/N", help="one of N parts")
    parser.add_argument("--eager", action="store_true", help="compare with plain loops only, compile nothing")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a model")
    parser.add_argument("--worker", metavar="KEY", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(key: str, timeout: float, *, eager: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zoo", "--worker", key, *(["--eager"] if eager else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    except (IndexError, json.JSONDecodeError):
        return {"error": f"ended with exit code {done.returncode}"}


def checked(key: str, *, eager: bool) -> dict[str, Any]:
    """What the checks found for a case."""
    warnings.simplefilter("ignore")
    import torch
    import zoo
    from zoo import checks

    torch.set_num_threads(1)
    case = zoo.cases()[key]
    found: dict[str, Any] = {"error": ""}
    try:
        found["parity"] = checks.parity(case)
        if not eager:
            outcome = checks.compiled(case)
            found.update(route=outcome.route, difference=outcome.difference, seconds=outcome.first_seconds)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def table(results: dict[str, Any]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for key, found in results.items():
        package, _, name = key.partition(": ")
        parity = f"{found['parity']:.1e}" if "parity" in found else "-"
        seconds = f"{found['seconds']:.0f}" if "seconds" in found else "-"
        error = found.get("error", "").replace("|", "/")
        trained = "as a plain loop" if "parity" in found else f"failed: {error}"
        route = found.get("route") or (f"failed: {error}" if error and "parity" in found else "not tried")
        rows.append((name, package, trained, route, parity, seconds))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    passed = sum("parity" in found for found in results.values())
    done = sum("route" in found for found in results.values())
    return (
        "# The zoo\n\n"
        f"{passed} of {len(results)} models train uncompiled as in a plain loop (float64, 1e-9). Compiled in the runs "
        f"recorded here: {done}. Written by `python -m benchmarks.zoo`.\n\n{lines}\n"
    )


if __name__ == "__main__":
    main()
