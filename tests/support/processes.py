"""Running a script in a fresh process, as a user or a server does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# An import blocker fails in `create_module`: TensorFlow itself asks `find_spec("keras")`.
BLOCK = """
import importlib.machinery, sys

class Blocker:
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): raise ImportError(f"{spec.name} is blocked")
    def exec_module(self, module): raise ImportError

sys.meta_path.insert(0, Blocker(BLOCKED))
"""


def run(script: str, *arguments: object, block: tuple[str, ...] = ()) -> str:
    """Run a script whose imports of the packages in `block` fail; its output."""
    return finish(start((blocking(*block) if block else "") + script, *arguments))


def blocking(*packages: str) -> str:
    """The beginning of a script that cannot import these packages."""
    return BLOCK.replace("BLOCKED", ", ".join(map(repr, packages)))


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output
