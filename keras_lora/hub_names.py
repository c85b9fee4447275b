"""Between the names that KerasHub's converters ask for and those of modules in transformers.

They differ by a prefix, which depends on the class there: a `BertForSequenceClassification` has
`bert.encoder.layer.0...`, a `BertModel` `encoder.layer.0...`. And transformers 5 renames, when it
loads a checkpoint, what is in some architectures, such as ViT; only itself knows how.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import keras

from keras_lora.config import invalid

Rename: TypeAlias = Callable[[str], str]

_BASE = "MODEL_MAPPING"
# KerasHub's tasks: what PEFT calls them, and where transformers lists the classes for them.
_TASKS = {
    "CausalLM": ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "Seq2SeqLM": ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "TextClassifier": ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "MaskedLM": (None, "MODEL_FOR_MASKED_LM_MAPPING"),
    "ImageClassifier": (None, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
}


def hub_names(model: keras.Model, model_type: str, prefix: str | None) -> tuple[str | None, Rename]:
    """PEFT's name of a model's task, and how names become those of a Hugging Face model for it.

    `prefix` is what the names begin with there; with it, transformers is not asked. Without, it
    is: for a backbone only where it is installed.

    Raises:
        ValueError: transformers is needed to know the prefix, and is missing.
    """
    known = (_TASKS[c.__name__] for c in type(model).__mro__ if c.__name__ in _TASKS)
    task, mapping = next(known, (None, _BASE))
    if prefix is not None:
        return task, lambda name: _prefixed(name, prefix)
    try:
        hub_model = _hub_model(model_type, mapping)
    except (ImportError, KeyError, ValueError) as error:
        if mapping == _BASE:
            return task, lambda name: name
        raise invalid(
            "prefix",
            "what the names of modules begin with in the Hugging Face model, such as 'bert.'",
            None,
            f"only transformers knows it ({error}): pip install 'keras-lora[peft]', or pass it",
        ) from error
    begin = "" if mapping == _BASE else f"{hub_model.base_model_prefix}."
    return task, lambda name: _current(hub_model, _prefixed(name, begin))


def hub_names_back(model_type: str, names: Sequence[str], known: Sequence[str]) -> Rename:
    """How the names of an adapter become known ones; what does not, stays.

    Those that transformers gives are tried where the checkpoint's own do not do.
    """
    rename = renaming(names, known)
    if all(rename(name) in known for name in names):
        return rename
    try:
        hub_model = _hub_model(model_type, _BASE)
    except (ImportError, KeyError, ValueError):
        return rename
    current = {_current(hub_model, name): name for name in known}
    rename_current = renaming(names, current)

    def back(name: str) -> str:
        return current.get(rename_current(name), rename(name))

    return back


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


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _hub_model(model_type: str, mapping: str) -> Any:
    """A model of the class that transformers has for a task, without values and with one layer.

    Raises:
        ImportError, KeyError, ValueError: transformers or torch is missing, or the class is.
    """
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    config = transformers.AutoConfig.for_model(model_type)
    hub_class = getattr(transformers, mapping)[type(config)]
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = 1
    with torch.device("meta"):
        return hub_class(config)


def _current(hub_model: Any, name: str) -> str:
    """The name of what a checkpoint calls so in a model of transformers.

    PEFT asks transformers in the same way.
    """
    conversion = importlib.import_module("transformers.conversion_mapping")
    loading = importlib.import_module("transformers.core_model_loading")
    for transform in conversion.get_model_conversion_mapping(hub_model):
        if isinstance(transform, loading.WeightRenaming):
            name, _ = transform.rename_source_key(name)
    return name
