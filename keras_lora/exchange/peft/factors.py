"""The factors of Keras kernels, and those of Hugging Face matrices.

A Keras kernel `K` `(d, k)` is a block of a Hugging Face matrix `W` `(out, in)`,
`K[i, o] = W[rows[o], columns[i]]`, and so is the kernel's update:

    dK = s A B  <->  dW = s b a        a[:, columns[i]] = A[i]        b[rows[o]] = B[:, o]

An embedding matrix is `(vocabulary, dim)` in both, so its `in` is the vocabulary. PEFT's magnitude
of DoRA has an entry for each row of `W`: the entry of output `o` is `m[rows[o]]`.

Several kernels may be blocks of one matrix: GPT-2's `c_attn` is query, key and value. Where these
kernels share `A`, it is the matrix's `a` too. Otherwise the factors of all kernels are stacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from keras_lora.config import AdapterSpec
from keras_lora.exchange.converters import Block, HuggingFaceWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.kernels import ExchangedKernel, blocks_by_module
from keras_lora.exchange.peft_files import PeftModule
from keras_lora.exchange.problems import Problems
from keras_lora.lowrank.equations import scaling

Factors: TypeAlias = dict[str, tuple[AdapterSpec, *tuple[Array, ...]]]


@dataclass(frozen=True, eq=False)
class KernelPart:
    """A kernel's part of the LoRA of a matrix: `A` `(d, r)`, `B` `(r, k)` and `m` `(k,)`.

    Attributes:
        block: Where the kernel is inside the matrix.
        reached: False if the adapter of a fused matrix has only zeros for this kernel.
    """

    block: Block
    a: Array
    b: Array
    spec: AdapterSpec
    is_embedding: bool
    magnitude: Array | None = None
    reached: bool = True

    def widened(self) -> tuple[Array, Array]:
        """`a` `(r, in)` and `b` `(out, r)` of the whole matrix."""
        out, inputs = self.block.shape
        a, b = np.zeros((self.spec.rank, inputs)), np.zeros((out, self.spec.rank))
        a[:, self.block.columns], b[self.block.rows] = self.a.T, self.b.T
        return a.astype("float32"), b.astype("float32")


def joined(parts: Sequence[KernelPart]) -> PeftModule:
    """The module of a matrix, from its kernels, without any loss.

    The rank is that of one kernel where all share `A`, and otherwise the sum of all ranks.
    """
    module = joined_factors([part.spec for part in parts], [part.widened() for part in parts])
    return replace(module, embedding=parts[0].is_embedding)


def joined_factors(specs: Sequence[AdapterSpec], wide: Sequence[tuple[Array, Array]]) -> PeftModule:
    """One pair of factors from several, of disjoint rows of one matrix or of many matrices.

    Args:
        specs: The spec of each.
        wide: `a` `(..., r, in)` and `b` `(..., out, r)` of the whole matrix, for each.
    """
    first, (a, b) = specs[0], wide[0]
    if all(s == first for s in specs) and all(np.array_equal(a, other) for other, _ in wide):
        # The rows are disjoint, so nothing is rounded.
        b, alpha = np.sum([b for _, b in wide], 0, "float32"), first.alpha
    else:
        scales = [np.float32(spec.scaling / first.scaling) for spec in specs]
        b = np.concatenate([scale * b for scale, (_, b) in zip(scales, wide, strict=True)], -1)
        a = np.concatenate([a for a, _ in wide], -2)
        alpha = alpha_of(first.scaling, a.shape[-2], first.use_rslora)
    return PeftModule(a=a, b=b, rank=a.shape[-2], alpha=alpha, use_rslora=first.use_rslora)


def alpha_of(scale: float, rank: int, use_rslora: bool) -> float:
    """The alpha that gives this scale: the inverse of `lowrank.equations.scaling`."""
    return scale / scaling(1.0, rank, use_rslora)


def of_one_kind(modules: Mapping[str, PeftModule]) -> dict[str, PeftModule]:
    """The same modules, all with rsLoRA or all without, since PEFT has one field for all."""
    if len({module.use_rslora for module in modules.values()}) < 2:
        return dict(modules)
    return {
        name: replace(m, alpha=alpha_of(m.scaling, m.rank, False), use_rslora=False)
        for name, m in modules.items()
    }


def whole_magnitude(rows: Sequence[tuple[Block, Array]]) -> Array | None:
    """The magnitude of a matrix, from those of its kernels; None if a part has no kernel."""
    if not _are_whole([block for block, _ in rows]):
        return None
    magnitude = np.zeros(rows[0][0].shape[0], "float32")
    for block, values in rows:
        magnitude[block.rows] = values.reshape(-1)
    return magnitude


def _are_whole(blocks: Sequence[Block]) -> bool:
    """Whether each whole row of the matrix belongs to one of these kernels."""
    out, inputs = blocks[0].shape
    rows = np.unique(np.concatenate([block.rows for block in blocks]))
    return len(rows) == out and all(len(block.columns) == inputs for block in blocks)


def split_modules(
    modules: Mapping[str, PeftModule],
    kernels: Mapping[str, ExchangedKernel],
    weights: HuggingFaceWeights,
    dropout: float,
    problems: Problems,
) -> Factors:
    """Spec and factors of each kernel, by path: the inverse of `joined` and `whole_magnitude`.

    Modules that the kernels cannot take up are added to `problems`.
    """
    known, factors = blocks_by_module(weights), Factors()
    for name, module in [pair for pair in modules.items() if not pair[1].experts]:
        blocks = known.get(name, {})
        wrong = _misfits(module, list(blocks.values()), [kernels[path] for path in blocks])
        problems.add(*(f"{name}: {problem}" for problem in wrong))
        for path, block in blocks.items() if not wrong else ():
            part = _cut(module, block, len(blocks) > 1, dropout)
            if _has_effect(part, kernels[path]):
                factors[path] = (part.spec, *_shaped(part, kernels[path]))
    return factors


def _has_effect(part: KernelPart, kernel: ExchangedKernel) -> bool:
    """Whether the adapter of a fused matrix changes this kernel."""
    if part.reached or part.magnitude is None:
        return part.reached
    return not np.allclose(part.magnitude, kernel.norms().reshape(-1), rtol=1e-6, atol=0)


def _shaped(part: KernelPart, kernel: ExchangedKernel) -> list[Array]:
    pair = kernel.split.factors(part.a[None], part.b[None], kernel.shape)
    if part.magnitude is None:
        return [*pair]
    return [*pair, part.magnitude.reshape(kernel.split.norm_shape(kernel.shape))]


def _misfits(
    module: PeftModule, blocks: Sequence[Block], kernels: Sequence[ExchangedKernel]
) -> list[str]:
    """Why these kernels cannot take up the whole effect of a module."""
    wrong = _unsupported(module)
    if wrong:
        return wrong
    if not blocks:
        kind = "embedding layer" if module.embedding else "kernel"
        return [f"the model has no {kind} that is this module"]
    if any(kernel.is_embedding != module.embedding for kernel in kernels):
        return ["an embedding in one of the two models, and a linear layer in the other"]
    refusals = [kernel.refusal for kernel in kernels if kernel.refusal]
    return refusals or _unplaced(module, blocks)


def _unsupported(module: PeftModule) -> list[str]:
    """Why no adapter of this package can express a module."""
    if module.kind == "convolution":
        return ["a convolution, which keras_lora does not exchange"]
    if module.embedding and module.magnitude is not None:
        return ["DoRA of an embedding, which keras_lora does not have"]
    return []


def _unplaced(module: PeftModule, blocks: Sequence[Block]) -> list[str]:
    received, expected = (len(module.b), module.a.shape[1]), blocks[0].shape
    if received != expected:
        return [f"for a matrix of shape {received}, expected {expected}"]
    if module.magnitude is not None and not _are_whole(blocks):
        return ["DoRA's magnitude, of which the model has only a part"]
    return (
        []
        if _reach_all(module, blocks)
        else ["changes a part of the matrix that is no kernel of the model"]
    )


def _reach_all(module: PeftModule, blocks: Sequence[Block]) -> bool:
    rows = np.concatenate([block.rows for block in blocks])
    within = all(_is_zero(module.a, 1, block.columns) for block in blocks)
    return within and _is_zero(module.b, 0, rows)


def _is_zero(array: Array, axis: int, beside: Array) -> bool:
    return not np.delete(array, beside, axis).any()


def _cut(module: PeftModule, block: Block, fused: bool, dropout: float) -> KernelPart:
    """A kernel's part of the LoRA of a matrix.

    If the matrix has several kernels, a kernel gets only the components of `b` that are not zero
    in its rows. So factors that were stacked come apart again. An adapter that was never trained
    has `b = 0`, which does not tell the components apart: each kernel gets all of them.
    """
    a, b = module.a[:, block.columns].T, module.b[block.rows].T
    reach = b.any(1) if fused and module.b.any() else np.full(module.rank, True)
    reached = bool(reach.any())
    if not reached:
        reach = np.full(module.rank, True)
    rank, alpha = int(reach.sum()), module.alpha
    if rank < module.rank:
        alpha = alpha_of(module.scaling, rank, module.use_rslora)
    magnitude = None if module.magnitude is None else module.magnitude.reshape(-1)[block.rows]
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        use_rslora=module.use_rslora,
        use_dora=magnitude is not None,
    )
    return KernelPart(block, a[:, reach], b[reach], spec, module.embedding, magnitude, reached)
