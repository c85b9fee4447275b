"""Pictures of figures, by matplotlib where it is installed."""

from __future__ import annotations

import importlib
import io
import os
from pathlib import Path
from typing import Any

from keras_lora.files.atomic import write_files


def new_figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure` of this size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'keras-lora[plot]'.") from error
    return matplotlib.Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a picture whole or not at all.

    Raises:
        ValueError: the end of the name is no kind of picture.
    """
    target, content = Path(path), io.BytesIO()
    figure.savefig(content, format=target.suffix[1:], dpi=120)
    write_files(target.parent, {target.name: content.getvalue()})
