"""Rows of embeddings that train in full, between Keras and Hugging Face.

    E[i] = R[i]    <->    W[columns[i], rows] = R[i]        for the tokens i of the adapter

The matrix of an embedding is `(vocabulary, dim)` in both; `rows` and `columns` are those of its
block in a `Block`, in which the vocabulary is the input.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from keras_lora.config import AdapterSpec
from keras_lora.exchange.converters import Block, HuggingFaceWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft.embeddings import shared_embeddings
from keras_lora.exchange.peft.factors import Factors
from keras_lora.exchange.peft.kernels import blocks_by_module
from keras_lora.exchange.peft_files import PeftTokens
from keras_lora.exchange.problems import Problems
from keras_lora.layers import LayerAdapter

_BOTH = "A and B beside rows that train in full: PEFT has one of both for an embedding"


def gathered_tokens(
    model: keras.Model,
    adapters: Mapping[str, LayerAdapter],
    weights: HuggingFaceWeights,
    problems: Problems,
) -> dict[str, PeftTokens]:
    """The rows of an adapter by module, from its parts by path; inverse of `token_factors`."""
    found, blocks = dict[str, PeftTokens](), _blocks(weights)
    refusals = shared_embeddings(model, weights)
    for path, adapter in adapters.items():
        if adapter.tokens is None:
            continue
        refusal = _BOTH if adapter.spec.rank else refusals.get(path)
        if path not in blocks:
            refusal = weights.refused.get(path, "no embedding of the Hugging Face model")
        if refusal is None:
            module, block = blocks[path]
            ids, rows = block.columns[list(adapter.spec.train_tokens)], np.array(adapter.tokens)
            whole = np.zeros((len(ids), block.shape[0]), "float32")
            whole[:, block.rows] = rows
            order = np.argsort(ids)
            found[module] = PeftTokens(tuple(map(int, ids[order])), whole[order])
        else:
            problems.add(f"{path}: {refusal}")
    return found


def token_factors(
    model: keras.Model,
    tokens: Mapping[str, PeftTokens],
    factors: Factors,
    weights: HuggingFaceWeights,
    problems: Problems,
) -> Factors:
    """The factors, with the rows of the embeddings of these modules."""
    known, found = blocks_by_module(weights), dict(factors)
    refusals = shared_embeddings(model, weights)
    for module, own in tokens.items():
        blocks = known.get(module, {})
        path = next(iter(blocks), "")
        refusal = _BOTH if path in factors else refusals.get(path)
        if len(blocks) != 1:
            problems.add(f"{module}: the model has no embedding that is this module")
        elif refusal is not None or not _fits(own, blocks[path]):
            shape = blocks[path].shape[::-1]
            problems.add(f"{module}: {refusal or f'rows that a matrix of {shape} has not'}")
        else:
            found[path] = _factors(own, blocks[path])
    return found


def _blocks(weights: HuggingFaceWeights) -> dict[str, tuple[str, Block]]:
    every = blocks_by_module(weights).items()
    return {path: (module, block) for module, found in every for path, block in found.items()}


def _fits(own: PeftTokens, block: Block) -> bool:
    return bool(np.isin(own.ids, block.columns).all()) and own.rows.shape[1] == block.shape[0]


def _factors(own: PeftTokens, block: Block) -> tuple[AdapterSpec, *tuple[Array, ...]]:
    """Spec and factors of an adapter of rank 0."""
    order = np.argsort(block.columns)
    ids = order[np.searchsorted(block.columns, own.ids, sorter=order)]
    sorted_ids = np.argsort(ids)
    spec = AdapterSpec(rank=0, alpha=1.0, train_tokens=ids[sorted_ids].tolist())
    rows = own.rows[:, block.rows][sorted_ids]
    return spec, np.zeros((len(block.columns), 0)), np.zeros((0, len(block.rows))), rows
