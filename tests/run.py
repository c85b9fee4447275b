"""All tests, each file in a process of its own, and as many at once as there are processors.

A process that has run a thousand tests takes half as long again for each, and gigabytes: models
are cycles of objects, and TensorFlow keeps what it has traced. So each file starts anew, from a
process that has imported what takes seconds to import.

    python tests/run.py [options of pytest] [tests]

Without tests: all. With some, as `tests/test_a.py` or `tests/test_a.py::test_b`: these, again each
file in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A name in the folder that this runs in, since the process that forks is told no other.
IMPORTED = "tests.imported"
NOT_REWRITTEN = "ignore:Module already imported so cannot be rewritten; anyio"
# Of these a process would go on alone at the end. They begin, the longest first.
LONGEST = [
    *("export_generation", "docs", "coverage_backbones", "checkpoint", "export_tasks", "examples"),
    *("export_runtimes", "stateful", "peft_exchange", "saving", "serialization"),
    *("coverage_models", "without_tensorflow", "cli_process", "cli_output"),
    # On JAX and torch, by what they compute.
    *("devices", "layers", "dora_models", "recurrent", "rematerialize", "starts", "training"),
]
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)

Paths = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What pytest said of some files; the status of a process that crashed is negative."""

    paths: Paths
    status: int
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status in PASSED

    def __str__(self) -> str:
        lines = self.output.strip().splitlines()
        return f"{' '.join(self.paths)}: " + "\n".join(lines[-1:] if self.passed else lines)


def run_pytest(arguments: list[str], output: str) -> None:
    """End this process with pytest's status, all its output and that of its processes in a file."""
    assert IMPORTED in sys.modules  # an import that fails there is silent
    file = os.open(output, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.exit(pytest.main(arguments))


def run(paths: Paths, options: Sequence[str]) -> Run:
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        arguments = ["-q", "--doctest-modules", "-W", NOT_REWRITTEN, *options, *paths]
        process = multiprocessing.get_context("forkserver").Process(
            target=run_pytest, args=(arguments, output.name)
        )
        process.start()
        process.join()
        return Run(paths, process.exitcode or 0, output.read(), time.perf_counter() - began)


def parts() -> Iterator[Paths]:
    """The files of tests, and the folders of the package, whose docstrings have examples."""
    yield from ((relative(file),) for file in sorted((ROOT / "tests").glob("test_*.py")))
    for package in (ROOT / "keras_lora", ROOT / "keras_lora_cli"):
        yield from ((relative(path.parent),) for path in sorted(package.glob("*/__init__.py")))
        # pytest takes no `__main__.py` from a folder, and imports one that it is given.
        yield tuple(
            relative(path) for path in sorted(package.glob("*.py")) if path.stem != "__main__"
        )


def by_file(tests: Iterable[str]) -> list[Paths]:
    """The given tests, those of each file together."""
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.partition("::")[0], []).append(test)
    return [tuple(of_file) for of_file in files.values()]


def order(paths: Paths) -> int:
    """The place in `LONGEST`, or the one behind it."""
    name = Path(paths[0].partition("::")[0]).stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main(arguments: Sequence[str]) -> int:
    """Run all parts, or the given tests; the exit status."""
    os.chdir(ROOT)
    tests = [each for each in arguments if each.startswith("tests/")]
    options = [each for each in arguments if each not in tests]
    chosen = sorted(by_file(tests) if tests else parts(), key=order)
    multiprocessing.get_context("forkserver").set_forkserver_preload([IMPORTED])
    runs = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(run, paths, options) for paths in chosen]):
            runs.append(done.result())
            print(runs[-1], flush=True)
    longest = sorted(runs, key=lambda each: -each.seconds)[:15]
    print("Longest:", *(f"{' '.join(each.paths)} {each.seconds:.0f} s," for each in longest))
    failed = [each for each in runs if not each.passed]
    print("Failed:", ", ".join(" ".join(each.paths) for each in failed) or "none")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
