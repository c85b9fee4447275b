"""Scripts in processes of their own, which find imported what takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from support import processes

# A child has none of the threads of its parent, which therefore imports alone.
PARENT = """
import json, multiprocessing, sys
import IMPORTS

def run(script, arguments):
    sys.argv[1:] = arguments
    exec(script, globals())

for line in sys.stdin:
    child = multiprocessing.get_context("fork").Process(target=run, args=json.loads(line))
    child.start()
    child.join()
    print("ended", child.exitcode, flush=True)
"""

Fork = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def fork() -> Iterator[Fork]:
    """A function that runs a script with its arguments: the exit status, and the output."""
    yield from _forks("keras_hub, keras_lora")


@pytest.fixture(scope="session")
def fork_without_keras() -> Iterator[Fork]:
    """As `fork`, for scripts that cannot import Keras or this package."""
    yield from _forks("tensorflow", "keras", "keras_lora")


def _forks(imports: str, *block: str) -> Iterator[Fork]:
    parent = processes.start(processes.blocking(*block) + PARENT.replace("IMPORTS", imports))

    def run(script: str, *arguments: object) -> tuple[int, str]:
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps([script, list(map(str, arguments))]), file=parent.stdin, flush=True)
        output = ""
        for line in parent.stdout:
            if line.startswith("ended "):
                return int(line.split()[1]), output
            output += line
        raise RuntimeError(output)

    yield run
    processes.finish(parent)
