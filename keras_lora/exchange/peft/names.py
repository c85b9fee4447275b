"""Between the names that KerasHub's converters ask for and those of modules in transformers.

They differ by a prefix, which depends on the class there: a `BertForSequenceClassification` has
`bert.encoder.layer.0...`, a `BertModel` `encoder.layer.0...`. And transformers 5 renames, when it
loads a checkpoint, what is in some architectures, such as ViT; only itself knows how.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras

from keras_lora.checks import invalid

Rename: TypeAlias = Callable[[str], str]

_BASE = "MODEL_MAPPING"
_CONVERSION = "transformers.conversion_mapping"  # of transformers 5
# KerasHub's tasks: what PEFT calls them, and where transformers lists the classes for them.
_TASKS = {
    "CausalLM": ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "Seq2SeqLM": ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "TextClassifier": ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "MaskedLM": (None, "MODEL_FOR_MASKED_LM_MAPPING"),
    "ImageClassifier": (None, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
}


@dataclass(frozen=True)
class HubNames:
    """The names of modules in the Hugging Face model for a task.

    Attributes:
        task: PEFT's name of the task, or None.
        prefix: What the names begin with.
        hub_model: The model, without values, where transformers was asked for it.
    """

    task: str | None
    prefix: str
    hub_model: Any = None

    def rename(self, name: str) -> str:
        """The name of what KerasHub's converter calls so."""
        full = name if name.startswith(self.prefix) else self.prefix + name
        return full if self.hub_model is None else _current(self.hub_model, full)

    def foreign(self, modules: Iterable[str]) -> list[str]:
        """Those that are no modules which PEFT adapts, where transformers was asked for a task.

        For a bare backbone it is not known what class the names are for.
        """
        if self.hub_model is None or not self.prefix:
            return []
        kinds = ("Linear", "Conv1D", "Embedding")
        found = self.hub_model.named_modules()
        known = {_any_layer(name) for name, module in found if _is_any(module, kinds)}
        return sorted(name for name in modules if _any_layer(name) not in known)


def hub_names(model: keras.Model, model_type: str, prefix: str | None) -> HubNames:
    """How names become those of a Hugging Face model for the task of a Keras model.

    `prefix` is what the names begin with there; with it, transformers is not asked. Without, it
    is: for a backbone only where it is installed.

    Raises:
        ValueError: transformers is needed to know the prefix, and is missing.
    """
    known = (_TASKS[c.__name__] for c in type(model).__mro__ if c.__name__ in _TASKS)
    task, mapping = next(known, (None, _BASE))
    if prefix is not None:
        return HubNames(task, prefix)
    hub_model, reason = _hub_model(model_type, mapping)
    if mapping == _BASE:
        return HubNames(task, "", hub_model)
    if hub_model is None:
        raise invalid(
            "prefix",
            "what the names of modules begin with in the Hugging Face model, such as 'bert.'",
            None,
            f"only transformers knows it ({reason}): pip install 'keras-lora[peft]', or pass it",
        )
    return HubNames(task, f"{hub_model.base_model_prefix}.", hub_model)


def hub_names_back(model_type: str, names: Sequence[str], known: Sequence[str]) -> Rename:
    """How the names of an adapter become known ones; what does not, stays.

    Those that transformers gives are tried where the checkpoint's own do not do.
    """
    rename = renaming(names, known)
    if all(rename(name) in known for name in names):
        return rename
    hub_model, _ = _hub_model(model_type, _BASE)
    if hub_model is None:
        return rename
    current = {_current(hub_model, name): name for name in known}
    rename_current = renaming(names, current)
    return lambda name: current.get(rename_current(name), rename(name))


def renaming(names: Iterable[str], known: Iterable[str]) -> Callable[[str], str]:
    """From the names of an adapter's modules to those that the converter asks for.

    One has a prefix that the other lacks where their models are of different classes: a
    `BertForSequenceClassification` has `bert.encoder.layer.0...`, a `BertModel`
    `encoder.layer.0...`. The prefix that serves most names counts, and names that are known as
    they are stay.

    Example:

    >>> rename = renaming(["bert.layer.0.query", "classifier"], ["layer.0.query", "classifier"])
    >>> rename("bert.layer.0.query"), rename("classifier")
    ('layer.0.query', 'classifier')
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


def _hub_model(model_type: str, mapping: str) -> tuple[Any, str]:
    """A model of the class that transformers has for a task, without values and with one layer.

    None, and why, where there is none.
    """
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
        importlib.import_module(_CONVERSION)
        config = transformers.AutoConfig.for_model(model_type)
        hub_class = getattr(transformers, mapping)[type(config)]
        if hasattr(config, "num_hidden_layers"):
            config.num_hidden_layers = 1
        with torch.device("meta"):
            return hub_class(config), ""
    except Exception as error:  # whatever a model of defaults meets: there are hundreds of classes
        return None, f"{type(error).__name__}: {error}"


def _current(hub_model: Any, name: str) -> str:
    """The name of what a checkpoint calls so in a model of transformers 5.

    PEFT asks transformers in the same way.
    """
    conversion = importlib.import_module(_CONVERSION)
    renaming_class = importlib.import_module("transformers.core_model_loading").WeightRenaming
    for transform in conversion.get_model_conversion_mapping(hub_model):
        if isinstance(transform, renaming_class):
            name, _ = transform.rename_source_key(name)
    return name
