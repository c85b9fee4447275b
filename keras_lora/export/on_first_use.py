"""The exports by name, each loaded on first use: they import TensorFlow, and nothing else does.

So `import keras_lora` does not load TensorFlow on the JAX and torch backends, and works where
TensorFlow is not installed (PEP 562).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

MODULES = {
    "add_adapter_to_saved_model": "keras_lora.export.many.adding",
    "check_saved_model": "keras_lora.export.checking",
    "export_litert": "keras_lora.export.runtimes.litert",
    "export_onnx": "keras_lora.export.runtimes.onnx",
    "export_saved_model": "keras_lora.export.saved_model",
}


def load(name: str) -> Any:
    """The public function of this name.

    If TensorFlow cannot be imported, the function returned says so when it is called. The name
    itself can be imported all the same, and `from keras_lora import *` works.
    """
    try:
        return _function(name)
    except ImportError:
        return _deferred(name)


def check_tensorflow(user: str) -> None:
    """Import TensorFlow for a function or a command.

    Raises:
        ImportError: TensorFlow cannot be imported.
    """
    try:
        importlib.import_module("tensorflow")
    except ImportError as error:
        raise ImportError(
            f"Expected TensorFlow, which {user} needs. Received: {error}. Install it with "
            "`pip install tensorflow`, and export in a process with KERAS_BACKEND=tensorflow."
        ) from error


def _function(name: str) -> Callable[..., Any]:
    check_tensorflow(name)
    return getattr(importlib.import_module(MODULES[name]), name)


def _deferred(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _function(name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call
