"""The gradient that quantized embeddings do not have in reverse, while a model has adapters.

Keras rounds the hidden states of a quantized `ReversibleEmbedding` in reverse, and no gradient
passes through the rounding. An adapted layer has a gradient of its own. A plain one gets it as long
as there are adapters before it to learn from it; what it computes stays the same, bit for bit.
"""

from __future__ import annotations

from keras_lora.layers import LoRALayer, pass_gradient, stop_gradient
from keras_lora.walker import Tree


def settle_gradients(tree: Tree) -> None:
    """Let gradients pass the plain layers of a model if it has adapters, and as in Keras if not."""
    settle = pass_gradient if tree.adapted else stop_gradient
    for layer in tree.layers:
        if not isinstance(layer, LoRALayer):
            settle(layer)
