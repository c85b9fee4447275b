"""What converters do to weights on their way, and what of it is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from keras_lora.exchange.converters.blocks import ConvertedKernel, Locator, RefusedError
from keras_lora.exchange.converters.tensors import Weight
from keras_lora.lowrank.equations import split_equation

# A warning of KerasHub's Swin.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'attn':UserWarning")


# --- Hooks, one by one: what a hook makes of a weight `x` for a kernel `(d, n, h)` -----------

D, N, H = 5, 3, 2
HOOKS: dict[str, tuple[Any, tuple[int, int], bool, list[int]]] = {
    "linear": (lambda x: x.T.reshape(D, N, H), (N * H, D), False, [0, 1, 2, 3, 4, 5]),
    "conv1d": (lambda x: np.reshape(x, (D, N, H)), (N * H, D), True, [0, 1, 2, 3, 4, 5]),
    "float16": (
        lambda x: np.reshape(np.transpose(x.astype("float16")), (D, N, -1)),
        (N * H, D),
        False,
        [0, 1, 2, 3, 4, 5],
    ),
    "permuted": (
        lambda x: x.T.reshape(D, H, N).transpose(0, 2, 1),
        (N * H, D),
        False,
        [0, 3, 1, 4, 2, 5],
    ),
    "slice": (
        lambda x: x[4 : 4 + N * H].T.reshape(D, N, H),
        (4 + N * H, D),
        False,
        [4, 5, 6, 7, 8, 9],
    ),
    "rest": (lambda x: x[:, 4:].reshape(D, N, H), (4 + N * H, D), True, [4, 5, 6, 7, 8, 9]),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook: str) -> None:
    function, shape, transposed, rows = HOOKS[hook]
    kernel = ConvertedKernel(function(Weight("w")), split_equation("bd,dnh->bnh"), (D, N, H))
    (block,) = Locator().blocks(kernel, Locator().shapes(kernel))
    assert (block.shape, block.stored_transposed) == (shape, transposed)
    assert block.rows.tolist() == rows
    assert block.columns.tolist() == list(range(D))
    tensor = np.random.default_rng(0).normal(size=shape[::-1] if transposed else shape)
    expected = function(tensor).reshape(D, N * H)
    assert np.allclose(block.read(tensor), expected, atol=1e-3 if hook == "float16" else 0)


REFUSED_HOOKS: dict[str, tuple[Any, str]] = {
    "scaled": (lambda x: 2 * x.T.reshape(D, N, H), "computed with multiply"),
    "sum": (lambda x: (x + Weight("v")).T.reshape(D, N, H), "computed with add"),
    "unknown": (lambda x: np.flip(x.T.reshape(D, N, H), 0), "computed with flip"),
    "scrambled": (lambda x: x.T.reshape(N, D, H).transpose(1, 0, 2), "not the columns"),
    "sizes": (lambda x: x.T.reshape(D, N, H + 1), "no matrix of as many elements"),
    "vector": (lambda x: x.reshape(-1)[: D * N * H].reshape(D, N, H), "no matrix"),
    "fused": (
        lambda x: np.concatenate([x, Weight("v"), Weight("u")], 1).reshape(D, N, H),
        "made of several weights: w, v, u",
    ),
}


@pytest.mark.parametrize("hook", REFUSED_HOOKS)
def test_hooks_that_are_refused(hook: str) -> None:
    function, message = REFUSED_HOOKS[hook]
    kernel = ConvertedKernel(function(Weight("w")), split_equation("bd,dnh->bnh"), (D, N, H))
    with pytest.raises(RefusedError, match=message):
        Locator().shapes(kernel)


def test_experts_have_a_block_each() -> None:
    experts = [Weight(f"experts.{i}.weight") for i in range(3)]
    stacked: Any = np.stack([np.transpose(w) for w in experts])
    kernel = ConvertedKernel(stacked, split_equation("ebd,edf->ebf"), (3, 5, 7))
    blocks = Locator().blocks(kernel, Locator().shapes(kernel))
    assert [(b.weight, b.shape) for b in blocks] == [(w.key, (7, 5)) for w in experts]


def test_a_table_of_tokens_is_located_without_an_index_for_each_element() -> None:
    vocabulary, dim = 128_256, 4096
    kernel = ConvertedKernel(Weight("w"), split_equation("...x,xy->...y"), (vocabulary, dim))
    tracemalloc.start()
    (block,) = Locator().blocks(kernel, Locator().shapes(kernel))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (block.shape, block.stored_transposed) == ((dim, vocabulary), True)
    assert (len(block.rows), len(block.columns)) == (dim, vocabulary)
    assert peak < 2**24


def test_kernels_of_one_form_are_located_once() -> None:
    locator = Locator()
    for key in "vw":
        kernel = ConvertedKernel(Weight(key).T, split_equation("bd,df->bf"), (5, 7))
        (block,) = locator.blocks(kernel, locator.shapes(kernel))
        assert block.weight == key
    assert len(locator.found) == 1
