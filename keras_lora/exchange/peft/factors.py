"""Between the factors of kernels and those of Hugging Face matrices.

With `W` a matrix `(out, in)` there, a kernel `K` `(d, k)` here is a block of it,
`K[i, o] = W[rows[o], columns[i]]`, and so is its update:

    dK = s A B  <->  dW = s b a        a[:, columns[i]] = A[i]        b[rows[o]] = B[:, o]

The table of an embedding is `(vocabulary, dim)` on both sides, so `in` is the vocabulary there.
DoRA's magnitude there has an entry for each row, so `m[rows[o]]` is that of output `o`.

Several kernels may be blocks of one matrix: GPT-2's `c_attn` is query, key and value. The factors
of the matrix are then those that the kernels share or, where theirs differ, all of them stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from keras_lora.config import AdapterSpec
from keras_lora.exchange.converters import Block, HubWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft_files import PeftModule
from keras_lora.lowrank.equations import EinsumSplit, Shape, scaling

Factors: TypeAlias = dict[str, tuple[AdapterSpec, *tuple[Array, ...]]]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel here: its axes, and whether it is an embedding's table.

    `refusal` is why its factors cannot be exchanged, or None; `norms` gives `|W0|` of each output.
    """

    split: EinsumSplit
    shape: Shape
    is_table: bool
    refusal: str | None
    norms: Callable[[], Array]


@dataclass(frozen=True, eq=False)
class Part:
    """What a kernel has of a matrix: its block, `A` `(d, r)`, `B` `(r, k)` and `m` `(k,)`."""

    block: Block
    a: Array
    b: Array
    spec: AdapterSpec
    is_table: bool
    magnitude: Array | None = None
    reached: bool = True  # whether `A B` is more than a fused matrix's zeros

    def widened(self) -> tuple[Array, Array]:
        """`a` `(r, in)` and `b` `(out, r)` of the whole matrix."""
        out, inputs = self.block.shape
        a, b = np.zeros((self.spec.rank, inputs)), np.zeros((out, self.spec.rank))
        a[:, self.block.columns], b[self.block.rows] = self.a.T, self.b.T
        return a.astype("float32"), b.astype("float32")


def module_name(weight: str) -> str:
    return weight.removesuffix(".weight")


def module_names(weights: HubWeights) -> list[str]:
    """The modules there that are kernels here."""
    return sorted({module_name(b.weight) for found in weights.blocks.values() for b in found})


def joined(parts: Sequence[Part]) -> PeftModule:
    """The module of a matrix, from its kernels: exact, of the rank of one or of all together."""
    wide = [part.widened() for part in parts]
    (first, *others), (a, _) = parts, wide[0]
    same = [part.spec == first.spec for part in others]
    if all(same) and all(np.array_equal(a, other) for other, _ in wide[1:]):
        b = np.sum([b for _, b in wide], 0, "float32")  # of disjoint rows: nothing is rounded
        return _module(a, b, first.spec.alpha, first)
    scales = [np.float32(part.spec.scaling / first.spec.scaling) for part in parts]
    b = np.concatenate([scale * b for scale, (_, b) in zip(scales, wide, strict=True)], 1)
    a = np.concatenate([a for a, _ in wide])
    return _module(a, b, alpha_of(first.spec.scaling, len(a), first.spec.use_rslora), first)


def alpha_of(scale: float, rank: int, use_rslora: bool) -> float:
    """The alpha that gives this scale, the inverse of `lowrank.scaling`."""
    return scale / scaling(1.0, rank, use_rslora)


def of_one_kind(modules: Mapping[str, PeftModule]) -> dict[str, PeftModule]:
    """The same modules, with or without rsLoRA all together: PEFT has one field for all."""
    if len({module.use_rslora for module in modules.values()}) < 2:
        return dict(modules)
    return {
        name: replace(m, alpha=alpha_of(m.scaling, m.rank, False), use_rslora=False)
        for name, m in modules.items()
    }


def whole_magnitude(rows: Sequence[tuple[Block, Array]]) -> Array | None:
    """The magnitude of a matrix, from those of its kernels; None where they are not all of it."""
    if not _are_whole([block for block, _ in rows]):
        return None
    magnitude = np.zeros(rows[0][0].shape[0], "float32")
    for block, values in rows:
        magnitude[block.rows] = values.reshape(-1)
    return magnitude


def _are_whole(blocks: Sequence[Block]) -> bool:
    """Whether each row of the matrix is an output of one of these kernels, all along."""
    out, inputs = blocks[0].shape
    rows = np.unique(np.concatenate([block.rows for block in blocks]))
    return len(rows) == out and all(len(block.columns) == inputs for block in blocks)


def _module(a: Array, b: Array, alpha: float, part: Part) -> PeftModule:
    rslora, embedding = part.spec.use_rslora, part.is_table
    return PeftModule(a=a, b=b, rank=len(a), alpha=alpha, use_rslora=rslora, embedding=embedding)


def blocks_by_module(weights: HubWeights) -> dict[str, dict[str, Block]]:
    """For each module there, the kernels that are blocks of its matrix, by path."""
    found: dict[str, dict[str, Block]] = {}
    for path, blocks in weights.blocks.items():
        # A key without that ending is of a bare parameter, which PEFT does not adapt.
        if len(blocks) == 1 and blocks[0].weight.endswith(".weight"):
            found.setdefault(module_name(blocks[0].weight), {})[path] = blocks[0]
    return found


def split_modules(
    modules: Mapping[str, PeftModule],
    kernels: Mapping[str, Kernel],
    weights: HubWeights,
    dropout: float,
    problems: list[str],
) -> Factors:
    """Spec and factors of each kernel, by path: the inverse of `joined` and `whole_magnitude`.

    What has no place here is added to `problems`.
    """
    known, factors = blocks_by_module(weights), Factors()
    for name, module in modules.items():
        blocks = known.get(name, {})
        wrong = _misfits(module, list(blocks.values()), [kernels[path] for path in blocks])
        problems += [f"{name}: {problem}" for problem in wrong]
        for path, block in blocks.items() if not wrong else ():
            part = _cut(module, block, len(blocks) > 1, dropout)
            if _acts(part, kernels[path]):
                factors[path] = (part.spec, *_shaped(part, kernels[path]))
    return factors


def _acts(part: Part, kernel: Kernel) -> bool:
    """Whether anything of a fused matrix's adapter reaches a kernel."""
    if part.reached or part.magnitude is None:
        return part.reached
    return not np.allclose(part.magnitude, kernel.norms().reshape(-1), rtol=1e-6, atol=0)


def _shaped(part: Part, kernel: Kernel) -> list[Array]:
    pair = kernel.split.factors(part.a[None], part.b[None], kernel.shape)
    if part.magnitude is None:
        return [*pair]
    return [*pair, part.magnitude.reshape(kernel.split.norm_shape(kernel.shape))]


def _misfits(module: PeftModule, blocks: Sequence[Block], kernels: Sequence[Kernel]) -> list[str]:
    """Why these kernels cannot take up all that a module does."""
    wrong = _foreign_parts(module)
    if wrong:
        return wrong
    if not blocks:
        kind = "embedding layer" if module.embedding else "kernel"
        return [f"the model has no {kind} that is this module"]
    if any(kernel.is_table != module.embedding for kernel in kernels):
        return ["it is an embedding there or here, and a linear layer on the other side"]
    refusals = [kernel.refusal for kernel in kernels if kernel.refusal]
    return refusals or _out_of_place(module, blocks)


def _foreign_parts(module: PeftModule) -> list[str]:
    """What an adapter does not have here."""
    if module.kind == "convolution":
        return ["a convolution, which is not adapted here yet"]
    if module.bias is not None:
        return ["a bias of B (lora_bias), which an adapter does not have here"]
    if module.embedding and module.magnitude is not None:
        return ["DoRA's magnitude of an embedding, which an adapter does not have here"]
    return []


def _out_of_place(module: PeftModule, blocks: Sequence[Block]) -> list[str]:
    received, expected = (len(module.b), module.a.shape[1]), blocks[0].shape
    if received != expected:
        return [f"of a matrix {received}, expected {expected}"]
    if module.magnitude is not None and not _are_whole(blocks):
        return ["DoRA's magnitude, of which the model has only a part"]
    return [] if _reach_all(module, blocks) else ["acts where the model has no kernel"]


def _reach_all(module: PeftModule, blocks: Sequence[Block]) -> bool:
    rows = np.concatenate([block.rows for block in blocks])
    within = all(_is_zero(module.a, 1, block.columns) for block in blocks)
    return within and _is_zero(module.b, 0, rows)


def _is_zero(array: Array, axis: int, beside: Array) -> bool:
    return not np.delete(array, beside, axis).any()


def _cut(module: PeftModule, block: Block, fused: bool, dropout: float) -> Part:
    """A kernel's part of a matrix.

    Of a matrix with several kernels only those components are taken that reach this one, so that
    factors that were stacked come apart again. Where `b` is zero all over, it was never trained.
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
    return Part(block, a[:, reach], b[reach], spec, module.embedding, magnitude, reached)
