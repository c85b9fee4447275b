"""The tensors of `target_parameters`: of stacked experts, which are parameters and no modules.

    base_model.model.<module>.lora_A.weight               (experts * r, in)
    base_model.model.<module>.lora_B.weight               (out, r * experts)
    base_model.model.<module>.base_layer.lora_A.weight    of the parameter that is declared before

    dW_e = scaling * b_e @ a_e      with a_e = A.reshape(experts, r, in)[e]
                                    and  b_e = B.reshape(out, r, experts)[..., e]

No key tells the parameter. PEFT wraps a module once for each parameter, in the order in which the
module declares them: the outermost wrapper, without `base_layer`, is that of the last one.

Reference: `ParamWrapper` in PEFT 0.21, https://github.com/huggingface/peft.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# In the order in which the experts of transformers declare their parameters.
DECLARED = ("gate_up_proj", "down_proj")
_WRAPPER = ".base_layer"


def parameter_names(
    names: Iterable[str], targets: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The parameter that each name of a module in a file stands for.

    Args:
        names: The names, with `base_layer` for inner wrappers.
        targets: `target_parameters` of the config.

    Returns:
        `{name: parameter}` of the names that stand for one, and what is wrong with others.
    """
    wrappers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        wrappers[_owner(name)].append(name)
    found, wrong = dict[str, str](), []
    for owner, inside in wrappers.items():
        parameters = sorted({p for t in targets if (p := _of_owner(t, owner))}, key=_order)
        unknown = [p for p in parameters if p not in DECLARED]
        if unknown:
            wrong.append(f"{owner}: the parameters {unknown} are no stacked experts")
        elif parameters and len(parameters) != len(inside):
            wrong.append(f"{owner}: tensors of {len(inside)} parameters, expected {parameters}")
        elif parameters:
            outermost_last = sorted(inside, key=len, reverse=True)
            pairs = zip(outermost_last, parameters, strict=True)
            found |= {name: f"{owner}.{parameter}" for name, parameter in pairs}
    return found, wrong


def wrapper_names(parameters: Iterable[str]) -> dict[str, str]:
    """The inverse of `parameter_names`: for each parameter the name of its module in a file."""
    owners: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        owners[parameter.rpartition(".")[0]].append(parameter)
    return {
        parameter: owner + _WRAPPER * depth
        for owner, inside in owners.items()
        for depth, parameter in enumerate(sorted(inside, key=_order, reverse=True))
    }


def stacked(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """`(experts, r, in)` and `(experts, out, r)` as PEFT stores them."""
    rows = a.reshape(-1, a.shape[-1])
    return rows, b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def unstacked(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], rank: int) -> tuple[Any, Any] | str:
    """The inverse of `stacked`, or what is wrong."""
    count = a.shape[0] // rank
    if a.ndim != 2 or b.ndim != 2 or count * rank != a.shape[0] or a.shape[0] != b.shape[1]:
        return (
            f"A and B of shapes {a.shape} and {b.shape}, expected (experts * {rank}, in) and "
            f"(out, {rank} * experts) for the rank {rank} that the config gives"
        )
    by_expert = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
    return a.reshape(count, rank, -1), np.ascontiguousarray(by_expert)


def _owner(name: str) -> str:
    while name.endswith(_WRAPPER):
        name = name.removesuffix(_WRAPPER)
    return name


def _of_owner(target: str, owner: str) -> str | None:
    """The parameter of a module that an entry of `target_parameters` names, if it names one."""
    module, _, parameter = target.rpartition(".")
    return parameter if module and f".{owner}".endswith(f".{module}") else None


def _order(parameter: str) -> int:
    name = parameter.rpartition(".")[2]
    return DECLARED.index(name) if name in DECLARED else len(DECLARED)
