"""Adapters of Hugging Face PEFT, both ways: `save_peft_adapter` and `load_peft_adapter`.

What PEFT's files look like is known in `peft_files`, and which Hugging Face matrix a kernel is in
`hub_weights`, from KerasHub's own converters. Here both meet a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_lora.checks import AdapterFileError, warn
from keras_lora.exchange.converters import Block, HubWeights, hub_blocks
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.embeddings import refused_tables
from keras_lora.exchange.peft.factors import (
    Kernel,
    Part,
    blocks_by_module,
    joined,
    module_name,
    module_names,
    of_one_kind,
    split_modules,
    whole_magnitude,
)
from keras_lora.exchange.peft.names import hub_names, hub_names_back
from keras_lora.exchange.peft.values import Places, check_copies, find_places, gather, scatter
from keras_lora.exchange.peft_files import (
    PeftAdapter,
    PeftModule,
    read_peft_adapter,
    write_peft_adapter,
)
from keras_lora.files.adapter_files import PathLike
from keras_lora.inject import active_names, check_names, install, plan_factors, plan_layers
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    Adapter,
    LayerAdapter,
    LoRALayer,
    all_owned,
    check_adapter_name,
    is_table,
    kernel_shape,
    output_norms,
    split_kernel,
)
from keras_lora.walker import Tree, backbone_of, lora_layers, walk

# PEFT's `EMBEDDING_LAYER_NAMES`: it may save both where one of them has an adapter.
_SAVED_ALONG = ("embed_tokens", "lm_head")


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
    """Write an adapter for `PeftModel.from_pretrained(base, directory)`, and what reads such.

    The base is the Hugging Face model that KerasHub's converter would load into this one. Where
    several kernels are slices of one matrix there, and their factors differ, these are stacked:
    the update is exact, and the rank in the files is the sum of theirs. PEFT has DoRA for all
    modules or for none: beside others with DoRA, an adapter without gets the norms of its own
    weights as magnitudes, which change nothing.

    Args:
        model: An adapted KerasHub model, or one that holds a KerasHub backbone.
        directory: Where to; made if it does not exist.
        name: The adapter, active or not.
        base_model_name: What `base_model_name_or_path` in the config is to say, such as
            `"openai-community/gpt2"`.
        prefix: What the names of modules have in the Hugging Face model before those that the
            converter asks for, such as `"bert."` in a `BertForSequenceClassification`. By
            default for a KerasHub task what transformers says; for a bare backbone none, so that
            the names are those of the checkpoints that KerasHub converts.
        heads: `{path of a layer: name of the module in the Hugging Face model}` for layers of
            `layers_to_save` that the converter does not know, such as `{"logits": "classifier"}`.
        transformers_config: The base's `config.json`, for the few converters that need it.
        model_type: Hugging Face's name of the architecture, where several share a backbone class.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        overwrite: Replace an adapter that is there.

    Raises:
        ValueError: no such adapter; layers or trained values that have no place in the Hugging
            Face model (all are listed); no converter for the model.
        AdapterFileError: an adapter is there and `overwrite` is false, values are not finite (in
            that dtype), or the files cannot be written.

    Example:

    >>> import tempfile, keras_hub, keras_lora as kl
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> config = kl.LoRAConfig(rank=2, targets=["query", "value"])
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_peft_adapter(kl.apply_lora(backbone, config), directory)
    >>> kl.load_peft_adapter(backbone, directory, "again")
    >>> layer = kl.lora_layers(backbone)["transformer_layer_0/self_attention/value"]
    >>> layer.adapters["again"].spec.rank, layer.adapters["again"].scaling
    (4, 8.0)
    """
    tree = Tree.of(model)
    check_names(tree, [name])
    weights = hub_blocks(model, transformers_config, model_type=model_type)
    places = find_places(model, weights, heads or {})
    layers = {p: x for p, x in tree.adapted_by_path.items() if name in x.adapters}
    problems: list[str] = []
    modules = _modules(layers, name, weights, _kernels(model, weights), problems)
    saved = gather(_own_values(model, name), places, problems)
    modules = _with_magnitudes(model, name, modules, weights, problems)
    if problems:
        raise ValueError(
            "Expected an adapter whose layers and trained values all have a place in the "
            f"{weights.model_type!r} model of Hugging Face. Received: {'; '.join(problems)}. "
            "Leave these layers out of the config, or name the modules of heads with heads={...}."
        )
    names = hub_names(model, weights.model_type, prefix)
    inside = _in_backbone(model, weights, places)
    keys = [*module_names(weights), *saved]
    full = {key: names.rename(key) if key in inside else key for key in keys}
    _warn_of_foreign(names.foreign(full[key] for key in modules if key in inside))
    bias, whole = _trained_apart(saved, modules)
    write_peft_adapter(
        directory,
        {full[key]: module for key, module in modules.items()},
        {full[key]: value for key, value in saved.items()},
        {
            "base_model_name_or_path": base_model_name,
            "task_type": names.task,
            "lora_dropout": next(iter(layers.values())).adapters[name].spec.dropout,
            "bias": bias,
            "modules_to_save": [module_name(full[key]) for key in whole] or None,
            "fan_in_fan_out": _stored_transposed(layers, weights),
        },
        all_modules=[full[key] for key in module_names(weights)],
        dtype=dtype,
        overwrite=overwrite,
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

    The model need not come from Hugging Face, nor be adapted yet. Where no adapter acts, this one
    acts and trains at once; else it waits for `set_adapter`. Of a matrix that is several kernels
    here (GPT-2's `c_attn`), each kernel gets the components that reach it.

    Args:
        model: A KerasHub model, or one that holds a KerasHub backbone.
        directory: What `PeftModel.save_pretrained` wrote, with PEFT 0.10 or later.
        name: The adapter's name in this model.
        heads: As in `save_peft_adapter`, for `modules_to_save`.
        transformers_config: As in `save_peft_adapter`.
        model_type: As in `save_peft_adapter`.

    Raises:
        ValueError: a name that is taken, or no converter for the model.
        AdapterFileError: the files are damaged, of a kind that A, B and magnitudes do not tell
            (another `peft_type` and such), or do not fit the model: everything is listed. The
            model is then as it was.

    A `UserWarning` lists the tensors that are not understood and left out.
    """
    check_adapter_name(name)
    weights = hub_blocks(model, transformers_config, model_type=model_type)
    places = find_places(model, weights, heads or {})
    adapter = read_peft_adapter(directory)
    problems: list[str] = []
    known = [*module_names(weights), *places]
    rename = hub_names_back(weights.model_type, [*adapter.modules, *adapter.saved], known)
    modules = {rename(key): module for key, module in adapter.modules.items()}
    dropout = float(adapter.config.get("lora_dropout") or 0)
    factors = split_modules(modules, _kernels(model, weights), weights, dropout, problems)
    copies = _copies_of_base(adapter)
    values = scatter(
        {rename(k): v for k, v in adapter.saved.items() if k not in copies}, places, problems
    )
    everywhere = find_places(model, weights, heads or {}, of_adapted=True)
    check_copies({rename(k): adapter.saved[k] for k in copies}, everywhere, problems)
    if problems:
        raise AdapterFileError(
            f"Invalid {str(directory)!r}: expected an adapter for the {weights.model_type!r} "
            f"model {model.name!r}. Received: {'; '.join(problems)}. Load it into a model of the "
            "architecture and size that it was trained on, with heads={layer: module} where "
            "modules_to_save has a head."
        )
    whole = Adapter(None, [variable for variable, _ in values])
    tree = Tree.of(model)
    plan = plan_factors(tree, name, whole, plan_layers(tree, factors), values)
    if adapter.unknown:
        warn(f"{str(directory)!r}: left out, since they are not understood: {adapter.unknown}")
    install(tree, plan, active=not active_names(tree))


def _modules(
    layers: Mapping[str, LoRALayer],
    name: str,
    weights: HubWeights,
    kernels: Mapping[str, Kernel],
    problems: list[str],
) -> dict[str, PeftModule]:
    """The modules of an adapter's layers; layers without any are added to `problems`."""
    known = blocks_by_module(weights)
    placed = {path for blocks in known.values() for path in blocks}
    for path in sorted(set(layers) - placed):
        reason = weights.refused.get(path, "it is no module of one matrix there")
        problems.append(f"{path}: {reason}")
    problems += [f"{p}: {r}" for p in sorted(set(layers) & placed) if (r := kernels[p].refusal)]
    parts = {
        key: [_part(layers[path], name, block) for path, block in found.items() if path in layers]
        for key, found in known.items()
    }
    return of_one_kind({key: joined(found) for key, found in parts.items() if found})


def _part(layer: LoRALayer, name: str, block: Block) -> Part:
    adapter = layer.adapters[name]
    factors = np.array(adapter.a), np.array(adapter.b)
    a, b = split_kernel(layer).matrices(*factors, kernel_shape(layer))
    return Part(block, a[0], b[0], adapter.acting_spec, is_table(layer))


def _with_magnitudes(
    model: keras.Model,
    name: str,
    modules: Mapping[str, PeftModule],
    weights: HubWeights,
    problems: list[str],
) -> dict[str, PeftModule]:
    """The same modules, with magnitudes if one of the layers has one."""
    adapted = lora_layers(model).items()
    adapters = {p: x.adapters[name] for p, x in adapted if name in x.adapters}
    if not any(adapter.spec.use_dora for adapter in adapters.values()):
        return dict(modules)
    layers = {node.path: node.layer for node in walk(model)}
    blocks, found = blocks_by_module(weights), {}
    for key, module in modules.items():
        rows = [(b, _magnitude(layers[p], adapters.get(p))) for p, b in blocks[key].items()]
        magnitude = whole_magnitude(rows)
        if magnitude is None:
            problems.append(f"{key}: DoRA's magnitude, of which the model has only a part")
        found[key] = replace(module, magnitude=magnitude)
    return found


def _magnitude(layer: keras.layers.Layer, adapter: LayerAdapter | None) -> Array:
    if adapter is None or adapter.magnitude is None:
        return output_norms(layer, adapter)
    return np.array(adapter.magnitude)


def _kernels(model: keras.Model, weights: HubWeights) -> dict[str, Kernel]:
    layers = {node.path: node.layer for node in walk(model) if node.path in weights.blocks}
    refusals = refused_tables(model, weights)
    return {
        path: Kernel(
            split_kernel(layer),
            kernel_shape(layer),
            is_table(layer),
            refusals.get(path),
            partial(output_norms, layer),
        )
        for path, layer in layers.items()
    }


def _own_values(model: keras.Model, name: str) -> list[tuple[keras.Variable, Array]]:
    """The values of heads and biases that belong to an adapter."""
    owned = [item for item in all_owned(model.variables) if name in item.names]
    return [(item.variable, item.value(name)) for item in owned]


def _trained_apart(saved: Collection[str], modules: Collection[str]) -> tuple[str, list[str]]:
    """PEFT's `bias`, and the weights of modules that are saved whole."""
    whole = sorted(key for key in saved if key.endswith(".weight"))
    biases = {k.removesuffix(".bias") for k in saved if k.endswith(".bias")}
    biases -= {module_name(key) for key in whole}
    if not biases:
        return "none", whole
    return "lora_only" if biases <= set(modules) else "all", whole


def _stored_transposed(layers: Mapping[str, LoRALayer], weights: HubWeights) -> bool:
    """PEFT's `fan_in_fan_out`, which is of linear modules."""
    linear = [path for path, layer in layers.items() if not is_table(layer)]
    return any(weights.blocks[path][0].stored_transposed for path in linear)


def _copies_of_base(adapter: PeftAdapter) -> list[str]:
    """Tables that PEFT has saved along with their adapters, and the head beside one of tokens."""
    whole = adapter.config.get("modules_to_save") or []
    tables = [name for name, module in adapter.modules.items() if module.embedding]
    weights = [key for key in adapter.saved if tables and key.endswith(".weight")]
    return [
        key
        for key in weights
        if (module_name(key) in tables or module_name(key).endswith(_SAVED_ALONG))
        and not any(f".{module_name(key)}".endswith(f".{name}") for name in whole)
    ]


def _in_backbone(model: keras.Model, weights: HubWeights, places: Places) -> set[str]:
    """The modules and parameters there that are in the backbone here."""
    inside = {id(v) for v in backbone_of(model).variables}
    paths = {node.path for node in walk(model) if _any(node.layer.variables, inside)}
    modules = {module_name(b.weight) for p in paths for b in weights.blocks.get(p, ())}
    return modules | {k for k, found in places.items() if _any([p.variable for p in found], inside)}


def _any(variables: Iterable[keras.Variable], wanted: Collection[int]) -> bool:
    return any(id(variable) in wanted for variable in variables)


def _warn_of_foreign(modules: Sequence[str]) -> None:
    """Routers of experts, for example, are no `nn.Linear` in transformers 5."""
    if modules:
        warn(
            f"PEFT will not load the adapters of {modules}: in the transformers that is installed "
            "these are no linear modules. Leave them out with LoRAConfig(exclude=[...])."
        )
