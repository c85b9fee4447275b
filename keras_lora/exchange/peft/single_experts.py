"""Adapters of before transformers 5, in which the matrices of each expert are modules.

    <decoder>.block_sparse_moe.experts.<e>.w1, w3, w2                   Mixtral
    <decoder>.mlp.experts.<e>.gate_proj, up_proj, down_proj             Qwen2 MoE, Qwen3 MoE

Since transformers 5 gate and up of all experts are one parameter. Its factors are those of both,
side by side, so that its rank is the sum of both, and the update is exact:

    a_e = [a_gate; a_up]  (2r, in)        b_e = [[b_gate, 0], [0, b_up]]  (2 out, 2r)

An expert or a module without an adapter has zeros. PEFT 0.21 converts such adapters likewise, if
they have both of gate and up, and all experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from keras_lora.exchange.peft.factors import alpha_of
from keras_lora.exchange.peft_files import PeftModule
from keras_lora.exchange.problems import Problems
from keras_lora.walker import Target

# By name: the parameter that a module of an expert is now, and its place among the rows.
_PLACES: Mapping[str, tuple[str, int]] = {
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
}
_NAME = re.compile(rf"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<part>{'|'.join(_PLACES)})")
_Experts: TypeAlias = "dict[int, PeftModule]"  # by the number of the expert


def stacked_experts(
    modules: Mapping[str, PeftModule],
    parameters: Mapping[str, Sequence[Target]],
    problems: Problems,
) -> dict[str, PeftModule]:
    """The same modules, with parameters of stacked experts in the place of single experts.

    Args:
        modules: The modules of an adapter, by name.
        parameters: Those that the model has. Without any the modules are returned as they are.
        problems: Gets what is wrong with modules of experts.
    """
    found: dict[str, tuple[_Experts, _Experts]] = {}
    others = dict(modules)
    counts = [targets[0].kernel_shape[0] for targets in parameters.values()]
    for name, match in [(n, m) for n in modules if (m := _NAME.fullmatch(n)) and counts]:
        module, expert = others.pop(name), int(match["expert"])
        if expert >= max(counts) or not _is_plain(module):
            problems.add(f"{name}: {_refusal(module, max(counts))}")
            continue
        parameter, place = _PLACES[match["part"]]
        owner = match["experts"].replace(".block_sparse_moe.", ".mlp.")
        found.setdefault(f"{owner}.{parameter}", ({}, {}))[place][expert] = module
    stacked = {key: _stacked(key, places, max(counts), problems) for key, places in found.items()}
    return others | {key: module for key, module in stacked.items() if module is not None}


def _is_plain(module: PeftModule) -> bool:
    return module.kind == "linear" and module.magnitude is None and module.bias is None


def _refusal(module: PeftModule, count: int) -> str:
    if _is_plain(module):
        return f"the model has {count} experts"
    return "more than A and B (DoRA or a bias), which PEFT does not have for stacked experts"


def _stacked(
    key: str, places: tuple[_Experts, _Experts], count: int, problems: Problems
) -> PeftModule | None:
    """One parameter from its experts; None if their shapes differ."""
    every = [module for experts in places for module in experts.values()]
    shapes = {(len(module.b), module.a.shape[1]) for module in every}
    if len(shapes) > 1:
        problems.add(f"{key}: experts of several shapes {sorted(shapes)}")
        return None
    (out, inputs), first = shapes.pop(), max(every, key=lambda module: abs(module.scaling))
    ranks = [max((m.rank for m in experts.values()), default=0) for experts in places]
    halves = 2 if key.endswith("gate_up_proj") else 1
    a = np.zeros((count, sum(ranks), inputs), "float32")
    b = np.zeros((count, halves * out, sum(ranks)), "float32")
    for place, experts in enumerate(places):
        rows = slice(place * out, (place + 1) * out)
        for expert, module in experts.items():
            part = slice(place * ranks[0], place * ranks[0] + module.rank)
            a[expert, part] = module.a
            b[expert, rows, part] = module.b * _ratio(module.scaling, first.scaling)
    rank, rslora = sum(ranks), first.use_rslora
    alpha = alpha_of(first.scaling, rank, rslora)
    return PeftModule(a=a, b=b, rank=rank, alpha=alpha, use_rslora=rslora, experts=True)


def _ratio(scale: float, largest: float) -> np.float32:
    return np.float32(1 if scale == largest else scale / largest)
