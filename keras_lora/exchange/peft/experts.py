"""The experts of mixtures, which are parameters of three axes in Hugging Face models.

PEFT adapts such a parameter by `target_parameters`: for each expert `e` as a matrix `(out, in)`.
KerasHub has a bank `(experts, in, out)` for it, or one for each half of its outputs. As with blocks
of one matrix, the halves are one where they share `A`, and otherwise the ranks are stacked:

    dW_e = s b_e a_e        a_e = A_e^T  (r, in)        b_e = B_e^T  (out, r)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keras_lora.config import AdapterSpec
from keras_lora.exchange.converters import HuggingFaceWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.factors import Factors, alpha_of, joined_factors
from keras_lora.exchange.peft_files import PeftModule
from keras_lora.exchange.problems import Problems
from keras_lora.layers import AdapterBank, LayerAdapter
from keras_lora.walker import Target, Tree, all_targets

# For each type of Hugging Face model, the parameters of a decoder layer, and the banks of KerasHub
# that are one parameter. GPT-OSS has gate and up in turns, in both models.
_QWEN = {
    "mlp.experts.gate_up_proj": ("expert_feedforward_gate_dense",),
    "mlp.experts.down_proj": ("expert_feedforward_output_dense",),
}
_GEMMA4 = {
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}
_PARAMETERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gpt_oss": {
        "mlp.experts.gate_up_proj": ("gate_up_proj",),
        "mlp.experts.down_proj": ("down_proj",),
    },
    "mixtral": {
        "mlp.experts.gate_up_proj": (
            "expert_feedforward_gate_dense",
            "expert_feedforward_intermediate_dense",
        ),
        "mlp.experts.down_proj": ("expert_feedforward_output_dense",),
    },
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_5_moe": _QWEN,
}


@dataclass(frozen=True, eq=False)
class _Part:
    """A bank of a parameter: its adapter, if it has one, and its rows among the outputs."""

    adapter: LayerAdapter | None
    rows: slice


def expert_parameters(tree: Tree, weights: HuggingFaceWeights) -> dict[str, list[Target]]:
    """The banks of each parameter of stacked experts, under the parameter's name."""
    known = _PARAMETERS.get(weights.model_type, {})
    layers: dict[str, dict[str, Target]] = {}
    for target in all_targets(tree) if known else ():
        if target.site.kind.family == "expert":
            layers.setdefault(target.layer_path, {})[target.matrix] = target
    return {
        f"{decoder}.{parameter}": [matrices[name] for name in names]
        for path, matrices in layers.items()
        if (decoder := _decoder(path, weights)) is not None
        for parameter, names in known.items()
    }


def _decoder(path: str, weights: HuggingFaceWeights) -> str | None:
    """The decoder layer of a layer of experts, by the nearest other weights."""
    while path := path.rpartition("/")[0]:
        names = [b[0].weight for p, b in weights.blocks.items() if p.startswith(f"{path}/")]
        if names:
            found = {m[1] for name in names if (m := re.match(r"(.*?\.\d+)\.", name))}
            return found.pop() if len(found) == 1 else None
    return None


def expert_modules(
    parameters: Mapping[str, Sequence[Target]],
    banks: Mapping[str, AdapterBank],
    name: str,
    problems: Problems,
) -> dict[str, PeftModule]:
    """What an adapter adds to the parameters; banks that are in none are added to `problems`."""
    placed = {target.path for targets in parameters.values() for target in targets}
    banks = {path: bank for path, bank in banks.items() if bank.site.kind.family == "expert"}
    for path, bank in banks.items():
        if path not in placed:
            problems.add(f"{path}: experts of which no parameter in Hugging Face's form is known")
        elif bank.adapters[name].spec.use_dora:
            problems.add(f"{path}: DoRA, which PEFT does not have for a parameter")
    return {
        key: _joined(_parts(targets, banks, name))
        for key, targets in parameters.items()
        if any(target.path in banks for target in targets)
    }


def _parts(targets: Sequence[Target], banks: Mapping[str, AdapterBank], name: str) -> list[_Part]:
    adapters = [banks[t.path].ordinary(name) if t.path in banks else None for t in targets]
    return [_Part(x, rows) for x, rows in zip(adapters, _rows(targets), strict=True)]


def _rows(targets: Sequence[Target]) -> list[slice]:
    """The rows of each bank among the outputs of its parameter."""
    ends = np.cumsum([target.kernel_shape[2] for target in targets]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _joined(parts: Sequence[_Part]) -> PeftModule:
    """The parameter's module, from its banks, without any loss."""
    outputs = parts[-1].rows.stop
    found = [(part.adapter, part.rows) for part in parts if part.adapter is not None]
    specs = [adapter.acting_spec for adapter, _ in found]
    module = joined_factors(specs, [_widened(adapter, rows, outputs) for adapter, rows in found])
    return replace(module, experts=True)


def _widened(adapter: LayerAdapter, rows: slice, outputs: int) -> tuple[Array, Array]:
    """`a` `(experts, r, in)` and `b` `(experts, out, r)` of the whole parameter."""
    a, narrow = (np.array(x).transpose(0, 2, 1) for x in (adapter.a, adapter.b))
    b = np.zeros((len(a), outputs, a.shape[1]), "float32")
    b[:, rows] = narrow
    return np.ascontiguousarray(a), b


def split_experts(
    modules: Mapping[str, PeftModule],
    parameters: Mapping[str, Sequence[Target]],
    problems: Problems,
) -> Factors:
    """Spec and factors of each bank, by path: the inverse of `expert_modules`."""
    factors = Factors()
    for key, module in [pair for pair in modules.items() if pair[1].experts]:
        targets = parameters.get(key, ())
        wrong = _misfit(module, targets)
        if wrong:
            problems.add(f"{key}: {wrong}")
            continue
        for target, rows in zip(targets, _rows(targets), strict=True):
            found = _cut(module, rows, len(targets) > 1)
            if found is not None:
                factors[target.path] = found
    return factors


def _misfit(module: PeftModule, targets: Sequence[Target]) -> str:
    if not targets:
        return "the model has no experts that are this parameter"
    count, inputs, _ = targets[0].kernel_shape
    expected = count, _rows(targets)[-1].stop, inputs
    received = len(module.a), module.b.shape[1], module.a.shape[2]
    return "" if received == expected else f"for experts of shape {received}, expected {expected}"


def _cut(module: PeftModule, rows: slice, fused: bool) -> tuple[AdapterSpec, Array, Array] | None:
    """A bank's part: only the components that are not zero in its rows; None if there are none."""
    b = module.b[:, rows]
    reach = b.any((0, 1)) if fused and module.b.any() else np.full(module.rank, True)
    rank, alpha = int(reach.sum()), module.alpha
    if rank == 0:
        return None
    if rank < module.rank:
        alpha = alpha_of(module.scaling, rank, module.use_rslora)
    spec = AdapterSpec(rank=rank, alpha=alpha, use_rslora=module.use_rslora)
    return spec, module.a[:, reach].transpose(0, 2, 1), b[..., reach].transpose(0, 2, 1)
