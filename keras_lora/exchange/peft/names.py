"""The names that KerasHub's converters ask for, and the names of modules in transformers.

They differ by a prefix, which depends on the class in transformers: a
`BertForSequenceClassification` has `bert.encoder.layer.0...`, a `BertModel` `encoder.layer.0...`.
For some architectures, such as ViT, transformers 5 renames modules when it loads a checkpoint. Only
transformers itself knows these names.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras

from keras_lora.checks import invalid

Rename: TypeAlias = Callable[[str], str]

_BASE = "MODEL_MAPPING"
_CONVERSION = "transformers.conversion_mapping"  # since transformers 5
# For each task of KerasHub: PEFT's name of the task, and transformers' mapping to the class.
_TASKS = {
    "CausalLM": ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "Seq2SeqLM": ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "TextClassifier": ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "MaskedLM": (None, "MODEL_FOR_MASKED_LM_MAPPING"),
    "ImageClassifier": (None, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
}


@dataclass(frozen=True)
class HuggingFaceNames:
    """The names of modules in the Hugging Face model for a task.

    Attributes:
        task: PEFT's name of the task, or None.
        prefix: The beginning of all names.
        transformers_model: The model without values, if transformers is asked for names.
        chosen: Whether the caller said that there is no prefix.
    """

    task: str | None
    prefix: str
    transformers_model: Any = None
    chosen: bool = False

    def rename(self, name: str) -> str:
        """The name in the Hugging Face model for a name that KerasHub's converter asks for."""
        full = name if name.startswith(self.prefix) else self.prefix + name
        return full if self.transformers_model is None else _current(self.transformers_model, full)

    def unprefixed(self, modules: Iterable[str]) -> str:
        """A warning if these names fit transformers' class without a head alone, or "".

        A bare backbone does not tell the class, and the classes with a head have a prefix.
        """
        prefix = f"{getattr(self.transformers_model, 'base_model_prefix', '')}."
        if (
            self.chosen
            or self.prefix
            or prefix == "."
            or all(name.startswith(prefix) for name in modules)
        ):
            return ""
        name = type(self.transformers_model).__name__
        return (
            f"A backbone does not tell the class of the Hugging Face model: the names are those "
            f"in {name}. For a class with a head pass prefix={prefix!r}, or save the task; for "
            f"{name} pass prefix=''."
        )

    def foreign(self, modules: Iterable[str]) -> list[str]:
        """The names of modules that PEFT does not adapt, as far as transformers tells.

        A bare backbone does not tell the class of the Hugging Face model, so none are found.
        """
        if self.transformers_model is None or not self.prefix:
            return []
        kinds = ("Linear", "Conv1D", "Embedding")
        found = self.transformers_model.named_modules()
        known = {_any_layer(name) for name, module in found if _is_any(module, kinds)}
        return sorted(name for name in modules if _any_layer(name) not in known)


def hugging_face_names(
    model: keras.Model, model_type: str, prefix: str | None, came_with: str | None = None
) -> HuggingFaceNames:
    """The names of modules in the Hugging Face model for the task of a Keras model.

    Args:
        model: The Keras model.
        model_type: Hugging Face's name of the architecture.
        prefix: The beginning of all names. If it is None, transformers is asked; for a bare
            backbone only if it is installed.
        came_with: The prefix of the files that the adapter came from, which a bare backbone has
            if `prefix` is None.

    Raises:
        ValueError: only transformers knows the prefix, and is not installed.
    """
    known = (_TASKS[c.__name__] for c in type(model).__mro__ if c.__name__ in _TASKS)
    task, mapping = next(known, (None, _BASE))
    if prefix is None and mapping == _BASE:
        prefix = came_with
    if prefix or (prefix is not None and mapping != _BASE):
        return HuggingFaceNames(task, prefix)
    transformers_model, reason = _transformers_model(model_type, mapping)
    if mapping == _BASE:
        return HuggingFaceNames(task, "", transformers_model, chosen=prefix is not None)
    if transformers_model is None:
        raise invalid(
            "prefix",
            "the beginning of the names of modules in the Hugging Face model, such as 'bert.'",
            None,
            f"pass the prefix or pip install 'keras-lora[peft]', since only transformers knows it "
            f"({reason})",
        )
    return HuggingFaceNames(task, f"{transformers_model.base_model_prefix}.", transformers_model)


def renaming_to_converter(model_type: str, names: Sequence[str], known: Sequence[str]) -> Rename:
    """From the names of an adapter's modules to the names that KerasHub's converter asks for.

    Where the names of the checkpoint do not fit all, the names of transformers 5 are tried too. A
    name that fits neither stays as it is.
    """
    rename = prefix_renaming(names, known)
    if all(rename(name) in known for name in names):
        return rename
    transformers_model, _ = _transformers_model(model_type, _BASE)
    if transformers_model is None:
        return rename
    current = {_current(transformers_model, name): name for name in known}
    rename_current = prefix_renaming(names, current)
    return lambda name: current.get(rename_current(name), rename(name))


def common_prefix(names: Iterable[str], rename: Rename, known: Collection[str]) -> str | None:
    """The prefix of all names that are known without it; None where they have several or none.

    Example:

    >>> names = ["bert.layer.0.query", "bert.layer.1.query"]
    >>> common_prefix(names, lambda name: name[5:], ["layer.0.query", "layer.1.query"])
    'bert.'
    """
    pairs = ((name, rename(name)) for name in names)
    found = {n.removesuffix(r) if n.endswith(r) else None for n, r in pairs if r in known}
    return found.pop() if len(found) == 1 else None


def prefix_renaming(names: Iterable[str], known: Iterable[str]) -> Callable[[str], str]:
    """From names to known names, by adding or removing one prefix.

    The prefix that makes most names known is chosen. Names that the change does not make known
    stay as they are.

    Example:

    >>> rename = prefix_renaming(["bert.layer.0.query", "head"], ["layer.0.query", "head"])
    >>> rename("bert.layer.0.query"), rename("head")
    ('layer.0.query', 'head')
    """
    known = set(known)
    shifts = Counter(s for name in names for other in known for s in _shifts(name, other))
    (removed, added), _ = shifts.most_common(1)[0] if shifts else (("", ""), 0)

    def rename(name: str) -> str:
        shifted = added + name.removeprefix(removed)
        return shifted if shifted in known else name

    return rename


def _shifts(name: str, other: str) -> list[tuple[str, str]]:
    """The prefix to remove and the one to add that make one name the other."""
    if name == other:
        return [("", "")]
    if name.endswith(f".{other}"):
        return [(name.removesuffix(other), "")]
    return [("", other.removesuffix(name))] if other.endswith(f".{name}") else []


def _is_any(module: Any, kinds: Sequence[str]) -> bool:
    return any(c.__name__ in kinds for c in type(module).__mro__)


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)


def _transformers_model(model_type: str, mapping: str) -> tuple[Any, str]:
    """A model of the class that transformers has for a task, without values and with one layer.

    Returns:
        The model and an empty string; or None and the reason.
    """
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        importlib.import_module(_CONVERSION)
        config = transformers.AutoConfig.for_model(model_type)
        transformers_class = getattr(transformers, mapping)[type(config)]
        if hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = 1
        with torch.device("meta"):
            return transformers_class(config), ""
    except Exception as error:  # whatever one of the hundreds of classes raises for its defaults
        return None, f"{type(error).__name__}: {error}"


def _current(transformers_model: Any, name: str) -> str:
    """The name in a model of transformers 5 for the name in a checkpoint.

    PEFT asks transformers in the same way.
    """
    conversion = importlib.import_module(_CONVERSION)
    renaming_class = importlib.import_module("transformers.core_model_loading").WeightRenaming
    for transform in conversion.get_model_conversion_mapping(transformers_model):
        if isinstance(transform, renaming_class):
            name, _ = transform.rename_source_key(name)
    return name
