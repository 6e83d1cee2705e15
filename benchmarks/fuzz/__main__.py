"""Command line of the fuzzer.

    python -m benchmarks.fuzz                            # a thousand programs from seed 0
    python -m benchmarks.fuzz --cases 5000 --first 70000
    python -m benchmarks.fuzz --seed 1234                # one program, with all its problems
    python -m benchmarks.fuzz --compiled --cases 20
    python -m benchmarks.fuzz --program "Program(epochs=2, cuts=(Cut(at=3),))"

Each kind of failure is printed with its first program, shrunk. The exit code is 1 if any program fails.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import logging
import sys
import time

import torch

from benchmarks.fuzz import check, draw, laws, program, shrink


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run only the program of this seed")
    parser.add_argument("--program", help="run only this program, given by its repr")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--shrink-seconds", type=float, default=30.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # Resuming a stream logs that earlier batches are read again.
    logging.getLogger("fxtrain").setLevel(logging.ERROR)
    if options.program is not None:
        names = {name: getattr(program, name) for name in ("Program", "Ask", "Cut")}
        return _one(eval(options.program, names), options)
    if options.seed is not None:
        return _one(draw.draw(options.seed, compiled=options.compiled), options)
    return _many(options)


def _one(given: program.Program, options: argparse.Namespace) -> int:
    print(given)
    verdict = check.check(given)
    for line in verdict.problems:
        print("  ", line)
    print("rejected" if verdict.refused else "fails" if verdict.problems else "passes")
    if verdict.problems and not options.no_shrink:
        _show_shrunk(verdict, options.shrink_seconds)
    return int(bool(verdict.problems))


def _many(options: argparse.Namespace) -> int:
    began = time.monotonic()
    failures: dict[str, list[check.Verdict]] = collections.defaultdict(list)
    refused = 0
    for seed in range(options.first, options.first + options.cases):
        # The alarm in session.py cannot interrupt a hang in native code.
        faulthandler.dump_traceback_later(1200, exit=True)
        verdict = check.check(draw.draw(seed, compiled=options.compiled))
        refused += verdict.refused
        if verdict.problems:
            kind = laws.signature(verdict.problems[0])
            failures[kind].append(verdict)
            if len(failures[kind]) == 1:
                print(f"seed {seed}: {verdict.problems[0]}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - began
    count = sum(map(len, failures.values()))
    print(
        f"{options.cases} programs, seeds {options.first} to {options.first + options.cases - 1}: {count} failures of "
        f"{len(failures)} kinds, {refused} rejected; {options.cases / seconds:.1f} programs per second"
    )
    for kind, verdicts in sorted(failures.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(verdicts)} times: {kind}")
        print(f"  seeds {', '.join(str(verdict.program.seed) for verdict in verdicts[:8])}")
        if not options.no_shrink:
            _show_shrunk(verdicts[0], options.shrink_seconds)
    return int(bool(failures))


def _show_shrunk(verdict: check.Verdict, seconds: float) -> None:
    kind = laws.signature(verdict.problems[0])

    def fails(tried: program.Program) -> bool:
        return any(laws.signature(line) == kind for line in check.check(tried).problems)

    smallest = shrink.shrink(verdict.program, fails, seconds=seconds)
    print(f"  shrunk: {smallest}")
    for line in check.check(smallest).problems[:3]:
        print(f"    {line:.400}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
