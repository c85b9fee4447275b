"""Lets a process import modules of `keras_lora` without running the package's own `__init__`."""

from __future__ import annotations

import sys
import types
from pathlib import Path

package = types.ModuleType("keras_lora")
package.__path__ = [str(Path(__file__).parents[2] / "keras_lora")]
sys.modules["keras_lora"] = package
