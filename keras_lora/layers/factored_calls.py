"""Calls of layers of experts, whose einsums with an effective matrix are factored.

The code of such a layer multiplies by its attributes in `ops.einsum`, where `x` has the axis of the
experts or not. With `W` (experts, d, k), `A` (experts, d, r) and `B` (experts, r, k):

    x W = x W0 + s (x A) B        "th,ehm->etm":   "th,ehr->etr" and "etr,erm->etm"

So a graph forms neither `W` nor its gradient, each as large as all experts. Whatever else the code
does with an attribute is done with `W`.

KerasHub's layers reach `ops` as a global name of their module, which is no public interface:
`tests/test_private_api.py` watches it. A layer that does not is computed with `W`.
"""

from __future__ import annotations

import string
import types
from typing import Any, final

from keras import ops

from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.effective import formed_bank
from keras_lora.lowrank.equations import Tensor


def factored(call: Any) -> Any:
    """The same function with `FactoredOps` as its `ops`, where it has such a global name."""
    if not isinstance(call, types.FunctionType) or call.__globals__.get("ops") is not ops:
        return call
    names = {**call.__globals__, "ops": FactoredOps()}
    made = types.FunctionType(
        call.__code__, names, call.__name__, call.__defaults__, call.__closure__
    )
    made.__kwdefaults__ = call.__kwdefaults__
    return made


@final
class FactoredOps:
    """`keras.ops`, but that an einsum with a formed matrix of experts is the factored sum."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def einsum(self, subscripts: str, *operands: Any, **options: Any) -> Tensor:
        bank = formed_bank(operands[-1]) if len(operands) == 2 else None
        total = None if bank is None else _product(subscripts, operands[0], bank)
        return ops.einsum(subscripts, *operands, **options) if total is None else total


def _product(subscripts: str, x: Tensor, bank: AdapterBank) -> Tensor | None:
    """`x W0 + s (x A) B`; None where `W` is not that, or the einsum not a product by experts."""
    operands, output = subscripts.split("->")
    inputs, kernel = operands.split(",")
    terms = bank.computation.terms(bank.site, x, None)
    if len(kernel) != 3 or any(term.gain is not None for term in terms):
        return None
    e, d, k = tuple(kernel)
    if not (e in output and k in output and d in inputs) or d in output or k in inputs:
        return None
    r = next(c for c in string.ascii_letters if c not in subscripts)
    hidden = output.replace(k, r)
    total = ops.einsum(subscripts, x, ops.stop_gradient(bank.site.weight()))
    for _, a, b, _ in terms:
        down = ops.einsum(f"{inputs},{e}{d}{r}->{hidden}", x, a)
        total = total + ops.einsum(f"{hidden},{e}{r}{k}->{output}", down, b)
    return total
