"""`load_peft_adapter`: an adapter of Hugging Face PEFT for a Keras model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from keras_lora.checks import invalid_file, warn
from keras_lora.exchange.converters import hugging_face_weights
from keras_lora.exchange.peft.experts import expert_parameters, split_experts
from keras_lora.exchange.peft.factors import (
    split_modules,
)
from keras_lora.exchange.peft.kernels import (
    exchanged_kernels,
    module_name,
    module_names,
)
from keras_lora.exchange.peft.names import Rename, common_prefix, renaming_to_converter
from keras_lora.exchange.peft.single_experts import stacked_experts
from keras_lora.exchange.peft.token_rows import token_factors
from keras_lora.exchange.peft.values import (
    check_copies,
    find_slices,
    scatter,
    with_added_biases,
)
from keras_lora.exchange.peft_files import (
    PeftAdapter,
    PeftModule,
    read_peft_adapter,
)
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import PathLike
from keras_lora.inject import active_names, install, plan_factors, plan_layers, turn
from keras_lora.layers import DEFAULT_ADAPTER, Adapter, check_adapter_name

# PEFT's `EMBEDDING_LAYER_NAMES`: if one of them has an adapter, PEFT may save both as a whole.
_SAVED_ALONG = ("embed_tokens", "lm_head")
_FIX = (
    "load the adapter into a model of the architecture and size that it was trained with, and "
    "pass heads={layer: module} if its modules_to_save has a head"
)


def load_peft_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    heads: Mapping[str, str] | None = None,
    transformers_config: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> None:
    """Add an adapter that PEFT has saved to a model of the same architecture.

        dW = s b a        for each Hugging Face matrix W (out, in), with b (out, r) and a (r, in)

    The model need not come from Hugging Face, nor be adapted yet. If no adapter is active, the new
    one is active and trains at once. Otherwise activate it with `set_adapter`. If a Hugging Face
    matrix is several kernels in Keras, as GPT-2's `c_attn` is, each kernel gets the components of
    `b a` that change it. Modules of single experts, as before transformers 5, are stacked.

    Args:
        model: A KerasHub model, or a model that has a KerasHub backbone inside.
        directory: The directory that `PeftModel.save_pretrained` wrote, with PEFT 0.10 or later.
        name: The adapter's name in this model.
        heads: As in `save_peft_adapter`, for `modules_to_save`.
        transformers_config: As in `save_peft_adapter`.
        model_type: As in `save_peft_adapter`.

    Raises:
        ValueError: a name that is taken, or no converter for the model.
        AdapterFileError: the files are damaged, have effects that A, B and magnitudes cannot
            express (such as another `peft_type`), or do not fit the model: everything is listed.
            The model is unchanged.

    A `UserWarning` lists the tensors that are not understood and left out.

    Example:

    >>> import tempfile, keras_hub, numpy as np, keras_lora as kl
    >>> from keras_lora.exchange.peft_files import PeftModule, write_peft_adapter
    >>> module = PeftModule(a=np.ones((2, 6)), b=np.ones((18, 2)), rank=2, alpha=8)
    >>> directory = tempfile.mkdtemp()
    >>> write_peft_adapter(directory, {"transformer.h.0.attn.c_attn": module})
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> kl.load_peft_adapter(backbone, directory, "chat")
    >>> [path.rpartition("/")[2] for path in kl.lora_layers(backbone)]
    ['query', 'key', 'value']

    Reference:
        The PEFT checkpoint format:
        https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    check_adapter_name(name)
    with turn(model, "load_peft_adapter") as tree:
        weights = hugging_face_weights(model, transformers_config, model_type=model_type)
        slices = find_slices(model, weights, heads or {})
        adapter = read_peft_adapter(directory)
        problems = Problems()
        parameters = expert_parameters(tree, weights)
        dropout = float(adapter.config.get("lora_dropout") or 0)
        stacked = stacked_experts(adapter.modules, parameters, problems)
        known = [*module_names(weights), *slices, *parameters]
        names = [*stacked, *adapter.saved, *adapter.tokens]
        rename = renaming_to_converter(weights.model_type, names, known)
        modules, kernels = _renamed(stacked, rename), exchanged_kernels(model, weights)
        factors = split_modules(modules, kernels, weights, dropout, problems)
        factors |= split_experts(modules, parameters, problems)
        tokens = _renamed(adapter.tokens, rename)
        factors = token_factors(model, tokens, factors, weights, problems)
        copies = _copies_of_base(adapter)
        saved = {rename(k): v for k, v in adapter.saved.items() if k not in copies}
        values = scatter(saved, slices, problems)
        values = with_added_biases(values, modules, slices, problems)
        everywhere = find_slices(model, weights, heads or {}, of_adapted=True)
        check_copies({rename(k): adapter.saved[k] for k in copies}, everywhere, problems)
        expected = f"an adapter for the {weights.model_type!r} model {model.name!r}"
        problems.raise_any(lambda received: invalid_file(directory, expected, received, _FIX))
        prefix = common_prefix(stacked, rename, known)
        whole = Adapter(None, [variable for variable, _ in values], peft_prefix=prefix)
        plan = plan_factors(tree, name, whole, plan_layers(tree, factors), values)
        _warn(directory, adapter, modules, dropout)
        install(tree, plan, active=not active_names(tree))


def _warn(
    directory: PathLike, adapter: PeftAdapter, modules: Mapping[str, PeftModule], dropout: float
) -> None:
    if adapter.unknown:
        warn(f"{str(directory)!r}: left out the tensors {adapter.unknown}, of unknown meaning")
    if dropout and any(module.experts for module in modules.values()):
        warn(
            f"{str(directory)!r}: the experts train without lora_dropout={dropout}, since they are "
            "stacked in the model, as in transformers 5"
        )


def _renamed(values: Mapping[str, Any], rename: Rename) -> dict[str, Any]:
    return {rename(name): value for name, value in values.items()}


def _copies_of_base(adapter: PeftAdapter) -> list[str]:
    """Embedding matrices that PEFT has saved along with their adapters, and heads beside them."""
    whole = adapter.config.get("modules_to_save") or []
    embeddings = [name for name, module in adapter.modules.items() if module.embedding]
    weights = [key for key in adapter.saved if embeddings and key.endswith(".weight")]
    return [
        key
        for key in weights
        if (module_name(key) in embeddings or module_name(key).endswith(_SAVED_ALONG))
        and not any(f".{module_name(key)}".endswith(f".{name}") for name in whole)
    ]
