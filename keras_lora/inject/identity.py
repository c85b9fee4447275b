"""Keras may put another variable in the place of one that adapters were made for, as in quantizing.

An adapter would then go on with the old variable, which nothing computes with any more.
"""

from __future__ import annotations

from keras_lora.layers import owned
from keras_lora.walker import Tree


def check_variables(tree: Tree) -> None:
    """
    Raises:
        ValueError: a layer has other variables than those that an adapter has values of.
    """
    banks = tree.banks
    parts = [part for bank in banks for part in bank.adapters.values()]
    wholes = {id(part.adapter): part.adapter for part in parts if part.adapter is not None}
    items = [item for x in wholes.values() for v in x.trained if (item := owned(v)) is not None]
    inside = {id(layer) for layer in tree.layers} if items else set()
    replaced = sorted(
        {
            item.variable.path
            for item in items
            if id(item.layer) in inside and all(v is not item.variable for v in item.layer.weights)
        }
    )
    if replaced:
        raise ValueError(
            "Expected the variables that the adapters were made for. Received: a model in which "
            f"others took the place of {replaced}, such as by `layer.quantize`. The adapters' "
            "values of them act no more. Make the model anew: load the base and the adapters, "
            "merge_lora(model), and then quantize."
        )
