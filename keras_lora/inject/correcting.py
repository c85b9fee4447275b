"""The weights in floating point that a start corrects a quantized base with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.inject.plan import Plan
from keras_lora.layers import Site
from keras_lora.walker import Tree, all_targets


def check_weights(tree: Tree, plan: Plan, init: str, data: Any) -> None:
    """
    Raises:
        ValueError: no model in floating point with the matrices of the plan, or matrices that
            are not quantized, of which nothing is to be corrected.
    """
    if not isinstance(data, keras.layers.Layer):
        fix = "pass data=model, made before it was quantized"
        raise invalid("data", f"the model in floating point for init={init!r}", type(data), fix)
    exact = [x.target.path for x in plan.layers if not x.target.site.is_quantized]
    if exact:
        expected = f"a start for {exact}, which are not quantized"
        raise invalid("init", expected, init, "exclude them, or quantize them first")
    if any(x.spec.use_dora for x in plan.layers):
        fix = "the norms that its magnitudes begin with are those of the base alone"
        raise invalid("use_dora", f"False for init={init!r}", True, fix)
    theirs = _sites(Tree.of(data))
    wrong = [
        x.target.path
        for x in plan.layers
        if not _is_origin(theirs.get(tree.stable_path(x.target.path)), x.target.site)
    ]
    if wrong:
        expected = f"a model with {wrong} in floating point and of the same shapes"
        raise invalid("data", expected, data.name, "pass the model from before it was quantized")


def with_weights(tree: Tree, plan: Plan, model: Any) -> Plan:
    """The plan with the weights in floating point, each read when it is needed."""
    theirs = _sites(Tree.of(model))
    layers = [
        dataclasses.replace(x, measured=_reader(theirs[tree.stable_path(x.target.path)]))
        for x in plan.layers
    ]
    return dataclasses.replace(plan, layers=layers)


def _reader(site: Site) -> Callable[[], np.ndarray]:
    return lambda: ops.convert_to_numpy(site.frozen_matrix().values())


def _sites(tree: Tree) -> Mapping[str, Site]:
    return {tree.stable_path(target.path): target.site for target in all_targets(tree)}


def _is_origin(found: Site | None, site: Site) -> bool:
    return found is not None and not found.is_quantized and found.shape == site.shape
