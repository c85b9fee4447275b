"""The reference shows every public name once."""

from __future__ import annotations

import re
from pathlib import Path

import keras_lora as kl

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def test_every_public_name_is_in_the_reference_once() -> None:
    shown = re.findall(r"^::: keras_lora\.(\w+)$", PAGE.read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(kl.__all__) - {"__version__"})
