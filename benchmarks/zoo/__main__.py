"""Trains every model of tests/zoo, each in a process with a time limit, and writes ``benchmarks/ZOO.md``.

    python -m benchmarks.zoo                         # all of them
    python -m benchmarks.zoo --only "llama;timm"     # those whose "package: name" contains one of these
    python -m benchmarks.zoo --part 2/3              # every third one
    python -m benchmarks.zoo --rotate                # a third chosen by the commit hash, as in CI
    python -m benchmarks.zoo --eager                 # compare with plain loops, compile nothing, write nothing
    python -m benchmarks.zoo --interpret             # all checks, with graphs run without Inductor

Results are stored in ``benchmarks/zoo/results.json``, so a run of some models replaces only their rows of the table.
Models of packages that cannot be imported are skipped. The exit code is 1 if a model fails other than by the known
limitation of its case, if a model passes although its limitation is certain, or if fewer than 12 packages can be
imported. The number of packages is not checked with ``--only``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
RESULTS, TABLE = ROOT / "benchmarks/zoo/results.json", ROOT / "benchmarks/ZOO.md"
LEAST_PACKAGES = 12
PARTS = 3
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main() -> None:
    given = options()
    os.environ.update(ONE_THREAD)
    # Set before any process starts, because processes inherit both.
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    import zoo

    from benchmarks.zoo import processes, worker
    from benchmarks.zoo.table import table, verdict

    cases = zoo.cases()
    keys = chosen(list(cases), given)
    processes.prepare()
    too_few = False
    if not given.only:
        missing = unavailable({case.package for case in cases.values()}, given.timeout)
        found = len({case.package for case in cases.values()}) - len(missing)
        too_few = found < LEAST_PACKAGES
        print(f"{found} packages can be imported. Missing: {missing or 'none'}", flush=True)

    deadline = time.monotonic() + given.budget
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def check(key: str) -> tuple[str, dict[str, Any]]:
        if time.monotonic() > deadline:
            return key, {"status": "skipped", "error": f"not started within {given.budget:.0f} s"}
        return key, processes.result_of(worker.checked, key, given.compiler, timeout=given.timeout)

    with concurrent.futures.ThreadPoolExecutor(given.workers) as pool:
        for done in concurrent.futures.as_completed([pool.submit(check, key) for key in keys]):
            key, result = done.result()
            result["status"] = result.get("status") or verdict(result, cases[key].limitation)
            trace = result.pop("trace", "")
            counts["passed" if result["status"] == "limited" else result["status"]] += 1
            print(f"{key}: {result}", trace if result["status"] == "failed" else "", sep="\n", flush=True)
            if given.compiler is not None:
                record(key, result)
    if given.compiler is not None:
        TABLE.write_text(table(json.loads(RESULTS.read_text()), cases))
    if too_few:
        print(f"expected at least {LEAST_PACKAGES} packages that can be imported. Install the missing packages.")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    raise SystemExit(1 if counts["failed"] or too_few else 0)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", metavar="NAMES", help='parts of "package: name", separated by semicolons')
    which.add_argument("--part", metavar="K/N", help="one of N parts")
    which.add_argument("--rotate", action="store_true", help="a third, chosen by the commit hash modulo 3")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--eager", dest="compiler", action="store_const", const=None, help="compare with plain loops only")
    how.add_argument(
        "--interpret", dest="compiler", action="store_const", const="none", help="run graphs without Inductor"
    )
    parser.set_defaults(compiler="inductor")
    parser.add_argument("--timeout", type=float, default=600, help="time limit of a model in seconds")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no model is started")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, each with one thread")
    return parser.parse_args()


def chosen(keys: list[str], given: argparse.Namespace) -> list[str]:
    if given.only:
        return [key for key in keys if any(part in key for part in given.only.split(";"))]
    index, count = map(int, given.part.split("/")) if given.part else (1, 1)
    if given.rotate:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        index, count = int(commit or "0", 16) % PARTS + 1, PARTS
        print(f"Part {index}/{count}, chosen by the commit {commit or '(no repository)'}.", flush=True)
    return keys[index - 1 :: count]


def unavailable(packages: set[str], timeout: float) -> dict[str, str]:
    """Returns the errors of packages that cannot be imported, by package."""
    from benchmarks.zoo import processes, worker

    found = {name: processes.result_of(worker.imported, name, timeout=timeout) for name in sorted(packages)}
    return {name: result["error"] for name, result in found.items() if result["error"]}


def record(key: str, result: dict[str, Any]) -> None:
    """Replaces the result of a case. Reads the file again, because another run may have written it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[key] = {**result, "date": time.strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
