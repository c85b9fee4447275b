"""The exports by name, each loaded on first use: they import TensorFlow, and nothing else does.

So `import keras_lora` takes no seconds for TensorFlow on the JAX and torch backends, and works
where TensorFlow is not installed (PEP 562).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

MODULES = {
    "add_adapter_to_saved_model": "keras_lora.export.many.adding",
    "check_saved_model": "keras_lora.export.checking",
    "export_litert": "keras_lora.export.runtimes.litert",
    "export_onnx": "keras_lora.export.runtimes.onnx",
    "export_saved_model": "keras_lora.export.saved_model",
}


def load(name: str) -> Any:
    """The public function of this name.

    Where TensorFlow cannot be imported, a function that says so when it is called: the name can
    be imported all the same, and `from keras_lora import *` works.
    """
    try:
        importlib.import_module("tensorflow")
    except ImportError as error:
        return _refusing(name, error)
    return getattr(importlib.import_module(MODULES[name]), name)


def _refusing(name: str, error: ImportError) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ImportError(
            f"Expected TensorFlow, which {name} needs. Received: {error}. Install it with "
            "`pip install tensorflow`, and export in a process with KERAS_BACKEND=tensorflow."
        ) from error

    refuse.__name__ = refuse.__qualname__ = name
    return refuse
