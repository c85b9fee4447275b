"""`save_peft_adapter`: an adapter of a Keras model for Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_lora.checks import warn
from keras_lora.exchange.converters import Block, HuggingFaceWeights, hugging_face_weights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.experts import expert_modules, expert_parameters
from keras_lora.exchange.peft.factors import (
    KernelPart,
    joined,
    of_one_kind,
    whole_magnitude,
)
from keras_lora.exchange.peft.kernels import (
    ExchangedKernel,
    blocks_by_module,
    exchanged_kernels,
    module_name,
    module_names,
)
from keras_lora.exchange.peft.names import HuggingFaceNames, hugging_face_names
from keras_lora.exchange.peft.token_rows import gathered_tokens
from keras_lora.exchange.peft.values import (
    ParameterSlices,
    find_slices,
    gather,
)
from keras_lora.exchange.peft_files import (
    PeftModule,
    PeftTokens,
    write_peft_adapter,
)
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import PathLike
from keras_lora.files.keys import values_beside
from keras_lora.inject import CHOOSING, check_names, turn
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    AdapterBank,
    LayerAdapter,
    LoRALayer,
    factor_matrices,
    family_of,
    output_norms,
    site_of,
)
from keras_lora.walker import Target, Tree, backbone_of, walk

_MODULES = ("linear", "embedding")


def save_peft_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    base_model_name: str | None = None,
    prefix: str | None = None,
    heads: Mapping[str, str] | None = None,
    transformers_config: Mapping[str, Any] | None = None,
    model_type: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write an adapter in PEFT's format, for `PeftModel.from_pretrained(base, directory)`.

        dW = s b a        for each Hugging Face matrix W (out, in), with b (out, r) and a (r, in)

    The base is the Hugging Face model whose checkpoints KerasHub loads into models of this class.
    Several kernels may be slices of one Hugging Face matrix. If their factors differ, the factors
    are stacked: the update is exact, and the rank in the files is the sum of the ranks. PEFT has
    DoRA for all modules or for none. So if some layers have DoRA, each other layer gets the norms
    of its own weights as magnitudes, which change nothing. The experts of KerasHub's mixtures are
    PEFT's `target_parameters`.

    Args:
        model: An adapted KerasHub model, or a model that has a KerasHub backbone inside.
        directory: The directory to write; made if it does not exist.
        name: The adapter, active or not.
        base_model_name: The value of `base_model_name_or_path` in the config, such as
            `"openai-community/gpt2"`.
        prefix: The beginning of the names of modules in the Hugging Face model that the
            converter's names do not have, such as `"bert."` in a `BertForSequenceClassification`.
            By default transformers is asked for the prefix of a KerasHub task. A bare backbone
            has the prefix with which `load_peft_adapter` has read the adapter, or the names of
            the checkpoints that KerasHub converts, with a warning if only a class without a head
            has them.
        heads: `{path of a layer: name of the module in the Hugging Face model}` for layers of
            `layers_to_save` that the converter does not know, such as `{"logits": "classifier"}`.
        transformers_config: The base's `config.json`, for the few converters that need it.
        model_type: Hugging Face's name of the architecture, where several architectures share a
            backbone class.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        overwrite: Replace an adapter that the directory has.

    Raises:
        ValueError: no adapter of that name; layers or trained values that the Hugging Face model
            does not have (all are listed); no converter for the model.
        AdapterFileError: the directory has an adapter and `overwrite` is false, values are not
            finite in `dtype`, or the files cannot be written.

    Example:

    >>> import tempfile, keras_hub, keras_lora as kl
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> config = kl.LoRAConfig(rank=2, targets=["query", "value"])
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_peft_adapter(kl.apply_lora(backbone, config), directory, prefix="transformer.")
    >>> kl.load_peft_adapter(backbone, directory, "again")
    >>> layer = kl.lora_layers(backbone)["transformer_layer_0/self_attention/value"]
    >>> layer.adapters["again"].spec.rank, layer.adapters["again"].scaling
    (4, 8.0)

    Reference:
        The PEFT checkpoint format:
        https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    with turn(model, "save_peft_adapter", CHOOSING) as tree:
        banks = _banks_of(tree, name)
        weights = hugging_face_weights(model, transformers_config, model_type=model_type)
        slices = find_slices(model, weights, heads or {})
        parameters = expert_parameters(tree, weights)
        modules, saved, tokens = _values(tree, name, banks, weights, slices, parameters=parameters)
    names = hugging_face_names(model, weights.model_type, prefix, _came_with(banks, name))
    inside = _in_backbone(model, weights, slices)
    all_modules = [*module_names(weights), *parameters]
    full = _full_names(names, [*all_modules, *saved], inside | parameters.keys())
    _warn_of_names(names, [full[key] for key in modules if key in inside])
    write_peft_adapter(
        directory,
        {full[key]: module for key, module in modules.items()},
        {full[key]: value for key, value in saved.items()},
        {
            "base_model_name_or_path": base_model_name,
            "task_type": names.task,
            "lora_dropout": _dropout(banks, name),
            **_trained_apart(saved, modules, full),
            "fan_in_fan_out": _stored_transposed(_layers(tree, banks), weights),
        },
        tokens={full[key]: rows for key, rows in tokens.items()},
        all_modules=[full[key] for key in all_modules],
        dtype=dtype,
        overwrite=overwrite,
    )


def _full_names(
    names: HuggingFaceNames, keys: Sequence[str], inside: Collection[str]
) -> dict[str, str]:
    """The names in the Hugging Face model; only those inside the backbone have its prefix."""
    return {key: names.rename(key) if key in inside else key for key in keys}


def _banks_of(tree: Tree, name: str) -> dict[str, AdapterBank]:
    """The banks of an adapter, by path."""
    check_names(tree, [name])
    banks = {path: bank for path, bank in tree.banks_by_path.items() if name in bank.adapters}
    known = (*_MODULES, "expert")
    others = [path for path, bank in banks.items() if bank.site.kind.family not in known]
    if others:
        raise ValueError(
            "Expected an adapter of linear layers, embeddings and experts. Received: "
            f"{name!r}, which is on {others} too. Exclude these: PEFT's form of them is not known."
        )
    return banks


def _layers(tree: Tree, banks: Mapping[str, AdapterBank]) -> dict[str, LoRALayer]:
    """The linear layers and embeddings of an adapter, by path."""
    layers = tree.adapted_by_path
    return {p: layers[p] for p, bank in banks.items() if bank.site.kind.family in _MODULES}


def _values(
    tree: Tree,
    name: str,
    banks: Mapping[str, AdapterBank],
    weights: HuggingFaceWeights,
    slices: ParameterSlices,
    *,
    parameters: Mapping[str, Sequence[Target]],
) -> tuple[dict[str, PeftModule], dict[str, Array], dict[str, PeftTokens]]:
    """The modules, the parameters and the rows of an adapter, under the names of the converter.

    Raises:
        ValueError: layers or values that the Hugging Face model does not have.
    """
    problems, model, layers = Problems(), tree.root, _layers(tree, banks)
    adapters = {path: layer.bank.ordinary(name) for path, layer in layers.items()}
    low_rank = {path: layers[path] for path, part in adapters.items() if part.spec.rank}
    modules = _modules(low_rank, name, weights, exchanged_kernels(model, weights), problems)
    saved = gather(values_beside(tree, name), slices, problems)
    modules = _with_magnitudes(model, adapters, modules, weights, problems)
    tokens = gathered_tokens(model, adapters, weights, problems)
    experts = expert_modules(parameters, banks, name, problems)
    if experts and any(module.magnitude is not None for module in modules.values()):
        problems.add("experts beside DoRA, which PEFT has for all of an adapter or for nothing")
    problems.raise_any(lambda received: _not_in_base(weights.model_type, received))
    return of_one_kind(modules | experts), saved, tokens


def _not_in_base(model_type: str, received: str) -> ValueError:
    return ValueError(
        "Expected an adapter whose layers and trained values all are in the Hugging Face model "
        f"{model_type!r}. Received: {received}. Leave these layers out of the config, name the "
        "modules of heads with heads={...}, or save the adapter of the backbone alone."
    )


def _modules(
    layers: Mapping[str, LoRALayer],
    name: str,
    weights: HuggingFaceWeights,
    kernels: Mapping[str, ExchangedKernel],
    problems: Problems,
) -> dict[str, PeftModule]:
    """The modules of an adapter's layers; layers without a module are added to `problems`."""
    known = blocks_by_module(weights)
    placed = {path for blocks in known.values() for path in blocks}
    for path in sorted(set(layers) - placed):
        reason = weights.refused.get(path, "no module of one matrix in the Hugging Face model")
        problems.add(f"{path}: {reason}")
    for path in sorted(set(layers) & placed):
        if kernels[path].refusal:
            problems.add(f"{path}: {kernels[path].refusal}")
    parts = {
        key: [_part(layers[path], name, block) for path, block in found.items() if path in layers]
        for key, found in known.items()
    }
    return of_one_kind({key: joined(found) for key, found in parts.items() if found})


def _part(layer: LoRALayer, name: str, block: Block) -> KernelPart:
    adapter = layer.bank.ordinary(name)
    a, b = factor_matrices(layer.bank.site, adapter)
    return KernelPart(block, a[0], b[0], adapter.acting_spec, family_of(layer) == "embedding")


def _with_magnitudes(
    model: keras.Model,
    adapters: Mapping[str, LayerAdapter],
    modules: Mapping[str, PeftModule],
    weights: HuggingFaceWeights,
    problems: Problems,
) -> dict[str, PeftModule]:
    """The same modules; each with a magnitude, if one of the layers has DoRA."""
    if not any(adapter.spec.use_dora for adapter in adapters.values()):
        return dict(modules)
    layers = {node.path: node.layer for node in walk(model)}
    blocks, found = blocks_by_module(weights), {}
    for key, module in modules.items():
        rows = [(b, _magnitude(layers[p], adapters.get(p))) for p, b in blocks[key].items()]
        magnitude = whole_magnitude(rows)
        if magnitude is None:
            problems.add(f"{key}: DoRA's magnitude, of which the model has only a part")
        found[key] = replace(module, magnitude=magnitude)
    return found


def _magnitude(layer: keras.layers.Layer, adapter: LayerAdapter | None) -> Array:
    if adapter is None or adapter.magnitude is None:
        return output_norms(site_of(layer), adapter)
    return np.array(adapter.magnitude)


def _dropout(banks: Mapping[str, AdapterBank], name: str) -> float:
    """The dropout of the factors, which rows of tokens have none of.

    Zero beside experts, for which PEFT refuses any other.
    """
    specs = (bank.adapters[name].spec for bank in banks.values())
    dropout = next((spec.dropout for spec in specs if spec.rank and spec.dropout), 0.0)
    if dropout and any(bank.site.kind.family == "expert" for bank in banks.values()):
        warn(
            f"{name!r} has dropout={dropout}, which PEFT takes for no adapter with experts: the "
            "files say lora_dropout=0. PEFT computes the same without training; it trains without "
            "dropout."
        )
        return 0.0
    return dropout


def _trained_apart(
    saved: Collection[str], modules: Collection[str], full: Mapping[str, str]
) -> dict[str, Any]:
    """PEFT's `bias`, and `modules_to_save`, which are saved as a whole."""
    whole = sorted(key for key in saved if key.endswith(".weight"))
    biases = {k.removesuffix(".bias") for k in saved if k.endswith(".bias")}
    biases -= {module_name(key) for key in whole}
    bias = "lora_only" if biases <= set(modules) else "all"
    return {
        "bias": bias if biases else "none",
        "modules_to_save": [module_name(full[key]) for key in whole] or None,
    }


def _stored_transposed(layers: Mapping[str, LoRALayer], weights: HuggingFaceWeights) -> bool:
    """PEFT's `fan_in_fan_out`, which concerns only linear modules."""
    linear = [path for path, layer in layers.items() if family_of(layer) != "embedding"]
    return any(weights.blocks[path][0].stored_transposed for path in linear)


def _in_backbone(
    model: keras.Model, weights: HuggingFaceWeights, slices: ParameterSlices
) -> set[str]:
    """The Hugging Face names whose Keras variables belong to the backbone."""
    inside = {id(v) for v in backbone_of(model).variables}
    paths = {node.path for node in walk(model) if _any(node.layer.variables, inside)}
    modules = {module_name(b.weight) for p in paths for b in weights.blocks.get(p, ())}
    return modules | {k for k, found in slices.items() if _any([p.variable for p in found], inside)}


def _any(variables: Iterable[keras.Variable], wanted: Collection[int]) -> bool:
    return any(id(variable) in wanted for variable in variables)


def _came_with(banks: Mapping[str, AdapterBank], name: str) -> str | None:
    adapter = next(iter(banks.values())).adapters[name].adapter
    return adapter.peft_prefix if adapter else None


def _warn_of_names(names: HuggingFaceNames, written: Sequence[str]) -> None:
    _warn_of_foreign(names.foreign(written))
    message = names.unprefixed(written)
    if message:
        warn(message)


def _warn_of_foreign(modules: Sequence[str]) -> None:
    """Warn of modules such as routers of experts, which are no `nn.Linear` in transformers 5."""
    if modules:
        warn(
            f"PEFT will not load the adapters of {modules}, which are no linear modules in the "
            "installed version of transformers. Leave them out with LoRAConfig(exclude=[...])."
        )
