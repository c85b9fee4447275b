"""Imports point one way, and what is optional or one backend's stays in its place."""

from __future__ import annotations

import ast
from pathlib import Path

import keras_lora

ROOT = Path(keras_lora.__file__).parent
# Each module may import from those before it.
ORDER = [
    "version",
    "checks",
    "lowrank.equations",
    "lowrank.per_axis",
    "lowrank.combining",
    "lowrank.distances",
    "lowrank",
    "config",
    "initializers",
    "layers.kinds",
    "layers.slots",
    "layers.owned",
    "layers.rows",
    "layers.state",
    "layers.checkpoint",
    "layers.bank",
    "layers.lora_layer",
    "layers.linear",
    "layers.embedding",
    "layers.registry",
    "layers",
    "distribution",
    "walker.tree",
    "walker.heads",
    "walker.names",
    "walker.targets",
    "walker",
    "inject.freezing",
    "inject.cloning",
    "inject.optimizers",
    "inject.compiled",
    "inject.plan",
    "inject.saving",
    "inject.switching",
    "inject.apply",
    "inject.merge",
    "inject",
    "adapters",
    "files.atomic",
    "files.reading",
    "files.adapter_files",
    "files.keys",
    "files.matching",
    "files.saving",
    "files",
    "exchange.problems",
    "exchange.peft_files.config",
    "exchange.peft_files.tensors",
    "exchange.peft_files.naming",
    "exchange.peft_files.card",
    "exchange.peft_files.reading",
    "exchange.peft_files.writing",
    "exchange.peft_files",
    "exchange.keras_hub.h5",
    "exchange.keras_hub.numbering",
    "exchange.keras_hub.adapter",
    "exchange.keras_hub",
    "exchange.converters.tensors",
    "exchange.converters.converters",
    "exchange.converters.recording",
    "exchange.converters.blocks",
    "exchange.converters.weights",
    "exchange.converters",
    "exchange.peft.embeddings",
    "exchange.peft.kernels",
    "exchange.peft.factors",
    "exchange.peft.names",
    "exchange.peft.values",
    "exchange.peft.saving",
    "exchange.peft.loading",
    "exchange.peft",
    "exchange",
    "training.fitting",
    "training.checkpoint",
    "training",
    "summary",
    "export.on_first_use",
    "export.reports",
    "export.serving",
    "export.checking",
    "export.signatures",
    "export.endpoints",
    "export.writing",
    "export.many.stacks",
    "export.many.stored",
    "export.many.requests",
    "export.many.served_layers",
    "export.many.endpoint",
    "export.many.adding",
    "export.many",
    "export.classes",
    "export.keras_hub.operations",
    "export.keras_hub.tasks",
    "export.keras_hub.preprocessing",
    "export.keras_hub.generation",
    "export.keras_hub",
    "export.saved_model",
    "export.runtimes.conversion",
    "export.runtimes.litert",
    "export.runtimes.onnx",
    "export.runtimes",
    "export",
    "",
    "__main__",
]
SERVES_TENSORFLOW_ALONE = "export"
PRIVATE_API = ("layers", "walker", "inject", "training", "export", "exchange")


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


def own_attributes(node: ast.ClassDef) -> set[str]:
    """What a class has on `self`: all where it inherits nothing, else what it sets itself."""
    attributes = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    return {
        n.attr
        for n in attributes
        if isinstance(n.value, ast.Name)
        and n.value.id == "self"
        and (not node.bases or isinstance(n.ctx, ast.Store))
    }


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(ORDER)


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules().items():
        ours = {n for n in imports(tree) if n.split(".")[0] == "keras_lora"}
        for imported in sorted(n.removeprefix("keras_lora").removeprefix(".") for n in ours):
            if ORDER.index(imported) >= ORDER.index(name):
                wrong.append(f"{name} imports {imported}")
    assert not wrong


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


def test_private_attributes_of_keras_stay_in_their_files_and_are_listed_there() -> None:
    ours = set()
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                ours.add(node.name)
            if isinstance(node, ast.ClassDef):
                ours |= own_attributes(node)
    ours |= {"_lora"}
    for name, tree in modules().items():
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        } - ours
        if used:
            assert name.split(".")[0] in PRIVATE_API, (name, used)
            documented = ast.get_docstring(tree) or ""
            assert all(f"`{attribute}`" in documented for attribute in used), (name, used)
