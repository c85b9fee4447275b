"""Files and functions stay short enough to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from support.processes import ROOT

FILE_LINES, FUNCTION_LINES = 350, 40
FOLDERS = ("keras_lora", "keras_lora_cli", "tests", "examples", "benchmarks", "docs")


def files() -> Iterator[tuple[str, str]]:
    """Path and text of each Python file of the repository."""
    for name in FOLDERS:
        for path in sorted((ROOT / name).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()


def lines(first: ast.AST, last: ast.AST | None = None) -> int:
    return (last or first).end_lineno - first.lineno + 1  # type: ignore[attr-defined]


def options(path: str, function: ast.FunctionDef) -> int:
    """The number of lines that the options of a command or of a class take, which do not count."""
    if not (Path(path).parts[0] == "keras_lora_cli" or function.name == "__init__"):
        return 0
    return function.body[0].lineno - function.lineno


def length(path: str, function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    return lines(function) - options(path, function) - documented * lines(function.body[0])


def test_no_file_is_long() -> None:
    long = {path: len(text.splitlines()) for path, text in files()}
    long = {path: count for path, count in long.items() if count > FILE_LINES}
    assert not long


def test_no_function_is_long() -> None:
    long = {
        f"{path}: {node.name}": length(path, node)
        for path, text in files()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and length(path, node) > FUNCTION_LINES
    }
    assert not long
