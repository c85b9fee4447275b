"""The options of a SavedModel for a server, in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from keras_lora.checks import invalid

AdapterIds: TypeAlias = Literal["name", "index"]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is served: the options of `keras_lora.export_saved_model`, which explains each.

    A value that is wrong for every model is refused at once. A value that does not fit a model is
    refused when the model is exported.

    Raises:
        ValueError: a value that no model can be exported with.

    Example:

    >>> Serving(class_names=["bad", "good"]).is_mixed
    False
    >>> Serving(max_length=0)
    Traceback (most recent call last):
    ...
    ValueError: Invalid `max_length`: expected None or a positive number of tokens. Received: ...
    """

    adapters: Sequence[str] | None = None
    adapter_ids: AdapterIds = "name"
    input_signature: Any | None = None
    class_names: Sequence[str] | None = None
    preprocessing: bool | Sequence[str] = False
    generate: bool = True
    max_length: int | None = None
    stop_token_ids: Sequence[int] | str | None = "auto"

    def __post_init__(self) -> None:
        if self.adapter_ids not in get_args(AdapterIds):
            raise invalid("adapter_ids", f"one of {get_args(AdapterIds)}", self.adapter_ids)
        self._check_names()
        self._check_generation()

    @property
    def is_mixed(self) -> bool:
        """Whether each row of a request names its adapter; otherwise the model is merged."""
        return self.adapters is not None

    @property
    def has_generation(self) -> bool:
        """Whether an option is given that only a language model can use."""
        return self.max_length is not None or self.stop_token_ids != "auto"

    def _check_names(self) -> None:
        names, segments = self.class_names, self.preprocessing
        if names is not None and not _are_distinct(names, 2):
            raise invalid("class_names", "two or more distinct strings", names)
        if not isinstance(segments, bool) and not _are_distinct(segments, 1):
            expected = "False or, for a KerasHub task, True or distinct names of segments"
            raise invalid("preprocessing", expected, segments)

    def _check_generation(self) -> None:
        length, stop = self.max_length, self.stop_token_ids
        if length is not None and (not isinstance(length, int) or length < 1):
            raise invalid("max_length", "None or a positive number of tokens", length)
        ids = isinstance(stop, Sequence) and not isinstance(stop, str) and len(stop) > 0
        if stop is not None and stop != "auto" and not ids:
            raise invalid("stop_token_ids", "'auto', None or ids of tokens", stop)
        if self.has_generation and not self.generate:
            raise invalid("generate", "True with max_length or stop_token_ids", self.generate)


def _are_distinct(names: object, least: int) -> bool:
    """Whether `names` are distinct strings, `least` of them or more."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        return False
    listed = list(names)
    if not all(isinstance(name, str) for name in listed):
        return False
    return len(set(listed)) == len(listed) >= least
