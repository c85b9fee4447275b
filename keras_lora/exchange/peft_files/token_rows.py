"""Rows of embeddings that PEFT trains in full: `trainable_token_indices`.

    base_model.model.<module>.token_adapter.trainable_tokens_delta       (tokens, dim)

Despite its name the tensor has the rows themselves, which stand in the place of the base's. Where
the matrix is the output head too, PEFT uses the same rows there, and saves them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_lora.checks import check_tokens
from keras_lora.exchange.peft_files.tensors import PREFIX, ROWS, Array, SortedKeys
from keras_lora.exchange.problems import Problems


@dataclass(frozen=True, eq=False)
class PeftTokens:
    """Rows of an embedding's matrix.

    Attributes:
        ids: The tokens that the rows belong to, in sorted order.
        rows: Their rows, `(tokens, dim)`.
    """

    ids: tuple[int, ...]
    rows: Array


def read_tokens(
    keys: SortedKeys,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    problems: Problems,
) -> dict[str, PeftTokens]:
    """The rows by module; what is wrong with them is added to `problems`."""
    given, found = config["trainable_token_indices"], {}
    for module, key in sorted(keys.rows.items()):
        own = _ids_of(module, given)
        with problems.caught(ValueError, part=key):
            ids, rows = check_tokens(own), tensors[key]
            if not ids or rows.ndim != 2 or len(rows) != len(ids):
                problems.add(f"{key}: of shape {rows.shape} for the tokens {own} of the config")
            else:
                found[module] = PeftTokens(ids, rows[np.argsort(own)])
    names = [given] if isinstance(given, list) else list(given or {})
    if len(names) > len(found) and not problems:
        problems.add(f"trainable_token_indices: rows of {sorted(found)} alone, for {names}")
    return found


def _ids_of(module: str, given: Any) -> Any:
    """The tokens that the config has for a module, by the end of its name, as in PEFT."""
    if isinstance(given, Mapping):
        return next((ids for name, ids in given.items() if module.endswith(name)), [])
    return given or []


def token_tensors(tokens: Mapping[str, PeftTokens]) -> dict[str, Array]:
    """The rows under the keys that PEFT writes."""
    return {f"{PREFIX}{module}.{ROWS}": own.rows for module, own in tokens.items()}


def token_indices(tokens: Mapping[str, PeftTokens]) -> dict[str, list[int]] | None:
    """The value of PEFT's `trainable_token_indices`."""
    return {module: list(own.ids) for module, own in tokens.items()} or None
