"""Imports point one way, and what is optional or one backend's stays in its place."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import keras_lora

ROOT = Path(keras_lora.__file__).parent
# The floors of the package, the lowest first. A folder or a file of the package stands on one floor
# and imports from the floors below it.
FLOORS = [
    {"as_command", "checks", "tables", "version"},
    {"lowrank", "plain_values"},
    {"initializers"},
    {"config"},
    {"layers"},
    {"walker"},
    {"distribution", "rates"},
    {"inject"},
    {"adapters", "chunks", "combining", "files", "summary"},
    {"pictures"},
    {"memory", "ranks"},
    {"exchange", "training"},
    {"export"},
    {""},  # the public names: `keras_lora/__init__.py`
    {"__main__"},
]
CLI = "keras_lora_cli"
SERVES_TENSORFLOW_ALONE = "export"
PRIVATE_API = {
    "layers",
    "walker",
    "distribution",
    "rates",
    "chunks",
    "inject",
    "memory",
    "training",
    "export",
    "exchange",
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
    return names


def own_imports(tree: ast.Module) -> set[str]:
    """The modules of this package that a module imports."""
    ours = {name for name in imports(tree) if name.split(".")[0] == "keras_lora"}
    return {name.removeprefix("keras_lora").removeprefix(".") for name in ours}


def room(module: str) -> str:
    """The room of a module: a folder or file directly below the package."""
    return module.split(".", maxsplit=1)[0]


def folder(module: str) -> str:
    """The first two parts of a module's name: its folder or file inside its room."""
    parts = module.split(".")
    return ".".join(parts[:2])


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def own_attributes(node: ast.ClassDef) -> set[str]:
    """The attributes of `self` in a class; if the class has bases, only those that it sets."""
    attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    return {
        n.attr
        for n in attributes
        if isinstance(n.value, ast.Name)
        and n.value.id == "self"
        and (not node.bases or isinstance(n.ctx, ast.Store))
    }


def test_every_module_is_on_a_floor() -> None:
    rooms = [name for floor in FLOORS for name in floor]
    assert sorted({room(name) for name in modules()}) == sorted(rooms)


def test_imports_point_to_lower_floors() -> None:
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{name} imports {imported}"
        for name, tree in modules().items()
        for imported in sorted(own_imports(tree))
        if room(imported) != room(name) and height[room(imported)] >= height[room(name)]
    ]
    assert not wrong


def test_imports_have_no_cycle() -> None:
    found = modules()
    assert not cycle({name: own_imports(tree) for name, tree in found.items()})
    folders: dict[str, set[str]] = {}
    for name, tree in found.items():
        others = {folder(imported) for imported in own_imports(tree)} - {folder(name)}
        folders.setdefault(folder(name), set()).update(others)
    assert not cycle(folders)


def test_the_library_does_not_import_the_command_line() -> None:
    users = {
        name for name, tree in modules().items() for i in imports(tree) if i.split(".")[0] == CLI
    }
    assert users <= {"__main__", "as_command"}


def test_tensorflow_is_imported_only_where_it_is_served() -> None:
    users = {
        n for n, t in modules().items() if any(i.split(".")[0] == "tensorflow" for i in imports(t))
    }
    assert {name.split(".")[0] for name in users} == {SERVES_TENSORFLOW_ALONE}


def test_optional_packages_are_not_imported_at_the_top() -> None:
    optional = {
        *("keras_hub", "keras_nlp", "peft", "torch", "jax", "matplotlib", "transformers"),
        *("onnx", "onnxruntime", "tf2onnx", "ai_edge_litert"),
    }
    for name, tree in modules().items():
        assert not optional & {i.split(".")[0] for i in imports(tree)}, name


def test_keras_internals_are_not_imported() -> None:
    for name, tree in modules().items():
        assert not [i for i in imports(tree) if i.startswith("keras.src")], name


def private_attributes(tree: ast.Module) -> set[str]:
    """The names with one leading underscore that a module reads, except on Python's modules."""
    standard = imports(tree) & sys.stdlib_module_names
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in standard)
    }


def test_private_attributes_of_keras_stay_in_their_files_and_are_listed_there() -> None:
    found, ours = modules(), {"_lora"}
    for tree in found.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                ours.add(node.name)
            if isinstance(node, ast.ClassDef):
                ours |= own_attributes(node)
    used = {name: private_attributes(tree) - ours for name, tree in found.items()}
    users = {name for name, attributes in used.items() if attributes}
    assert {room(name) for name in users} <= PRIVATE_API
    unlisted = [
        f"{name}: {attribute}"
        for name in users
        for attribute in used[name]
        if f"`{attribute}`" not in (ast.get_docstring(found[name]) or "")
    ]
    assert not unlisted
