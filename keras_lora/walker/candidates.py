"""The matrices of a model that can be adapted, before any are selected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from keras_lora.layers import (
    LoRALayer,
    Site,
    check_adaptable,
    check_bare,
    lora_class_for,
    plain_class,
    sites_of,
    supported_base,
)
from keras_lora.walker.tree import Layer, Node, Tree, site_path


@dataclass(frozen=True)
class Target:
    """A layer that can be adapted, or one of its matrices.

    Attributes:
        path: Its place in the model, the names of the layers joined by `/`. A second sibling of
            the same name is `name#2`.
        layer: The layer itself.
        kind: The Keras class that it is adapted as: `"Dense"`, `"EinsumDense"`, `"Embedding"`,
            `"ReversibleEmbedding"`, a convolution such as `"Conv2D"`, a cell such as `"LSTMCell"`,
            or one given to `register_lora_class`; of a bare variable the class of its layer.
        kernel_shape: Shape of its kernel; of an embedding `(vocabulary, dim)`.
        parent_class: Class name of the layer that contains it.
        matrix: Which matrix of the layer, where the layer has several, or is known by its
            variables; then `path` ends in it.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> kl.find_targets(model, ["up"])[0].kernel_shape
    (3, 5)
    """

    path: str
    layer: Layer
    kind: str
    kernel_shape: tuple[int, ...]
    parent_class: str
    matrix: str = ""

    @property
    def layer_path(self) -> str:
        """The path of the layer."""
        return self.path.removesuffix(f"/{self.matrix}")

    @property
    def site(self) -> Site:
        """The matrix itself."""
        return sites_of(self.layer)[self.matrix]


class Candidates(NamedTuple):
    """What can be adapted.

    Attributes:
        every: All matrices, in the order of the walk.
        left_out: Layers of a kind that can be adapted that themselves cannot: that are not built,
            or whose class overrides the computation of the Keras layer.
    """

    every: list[Target]
    left_out: list[Node]

    @property
    def known(self) -> list[Target]:
        """Without the bare variables of which only their layers' code knows what they compute."""
        return [t for t in self.every if t.site.kind.family != "weight"]

    @property
    def layers(self) -> list[Target]:
        """The matrices of layers of a kind that can be adapted."""
        return [t for t in self.known if t.site.kind.family != "expert"]


def check_target(target: Target) -> None:
    """Refuse a layer that cannot be adapted though its kind can.

    Raises:
        ValueError: see `check_adaptable`; or the layer's equation has a diagonal.
    """
    if not isinstance(target.layer, LoRALayer):
        check_adaptable(target.layer)
        target.site.split()
        if target.site.kind.constraint is None:
            check_bare(target.layer, target.site)
        _check_saving(target)
        if 0 in target.kernel_shape:
            raise ValueError(
                f"Layer {target.path!r}: expected a kernel without a side of 0. Received: the "
                f"shape {target.kernel_shape}. Exclude the layer."
            )


def _check_saving(target: Target) -> None:
    """Refuse a matrix that no rank factors with fewer parameters, where its kind says so."""
    inputs, outputs = target.site.split().matrix_shape(target.kernel_shape)
    if target.site.kind.must_save and inputs * outputs <= inputs + outputs:
        raise ValueError(
            f"Layer {target.path!r}: expected a kernel with more parameters than factors of rank 1 "
            f"have. Received: the shape {target.kernel_shape}, {inputs} by {outputs} as a matrix. "
            "Exclude the layer, or train it in full: "
            f"layers_to_save=[{target.layer_path!r}]."
        )


def all_targets(tree: Tree) -> list[Target]:
    """Every matrix that can be adapted, also those that `check_target` refuses."""
    return candidates(tree).every


def _check_built(tree: Tree) -> None:
    model, nodes = tree.root, tree.nodes
    supported = [n for n in nodes if supported_base(plain_class(n.layer))]
    if not model.built or (supported and not any(n.layer.built for n in supported)):
        raise ValueError(
            f"Expected a built model. Received: {model.name!r} ({type(model).__name__}), in which "
            "no layer has weights yet. Call the model on a batch, or model.build(input_shape)."
        )


def candidates(tree: Tree) -> Candidates:
    """The matrices of a built model that can be adapted.

    Raises:
        ValueError: nothing is built.
    """
    _check_built(tree)
    found = Candidates([], [])
    for node in tree.owners:
        layer_class = plain_class(node.layer)
        base = supported_base(layer_class)
        known = lora_class_for(layer_class) is not None
        if base is not None and not (known and node.layer.built):
            found.left_out.append(node)
        if node.layer.built:
            kind = base if base is not None and known else layer_class
            found.every.extend(_targets(node, kind.__name__))
    return found


def _targets(node: Node, kind: str) -> list[Target]:
    parent = type(node.parent).__name__
    return [
        Target(site_path(node.path, name), node.layer, kind, site.shape, parent, name)
        for name, site in sites_of(node.layer).items()
    ]


def why_left_out(node: Node) -> str:
    if not node.layer.built:
        return "not built: call the part of the model that uses it first."
    return (
        "its class overrides the computation of the Keras layer; say how to adapt the class "
        "with register_lora_class(layer_class, lora_class), or name its variables: "
        f"targets={[site_path(node.path, name) for name in sites_of(node.layer)]}."
    )
