"""The tasks of `methods.py`: rows, a model to train, and what it may forget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import assets
import keras
import keras_hub
import minilm
import numpy as np
import tensorflow as tf
from minilm import Data, Features, tokenise
from training import BATCH, batches, compile_for_training

# Texts of another kind, cut in two; so many tokens of each half.
GENERAL_TEXTS, GENERAL_TOKENS, GENERAL_WORDS = 256, 48, 16


@dataclass(frozen=True)
class Task:
    """Rows to train and to score on, and texts that nothing trains on.

    Attributes:
        name: Its name in the results.
        classes: How many classes there are.
        train: Rows to train on; no row is in two splits.
        validation: Rows on which the rate is chosen.
        test: Rows that are scored.
        halves: The first and the second halves of texts of another kind.
        encoder: Makes the pretrained encoder.
        at_once: How many rows are scored at once; it divides both splits.
        jit: Whether XLA compiles the step.
    """

    name: str
    classes: int
    train: Data
    validation: Data
    test: Data
    halves: tuple[Features, Features]
    encoder: Callable[[], keras.Model]
    at_once: int
    jit: bool = True

    def base(self) -> keras.Model:
        """A compiled classifier, whose head depends on Keras's seed."""
        model = minilm.classifier(self.classes, self.encoder())
        compile_for_training(model, jit=self.jit)
        return model

    def batches(self, steps: int, seed: int) -> tf.data.Dataset:
        return batches(self.train.features, self.train.labels, steps, seed)

    def accuracy(self, model: keras.Model, rows: Data) -> float:
        return rows.accuracy(model.predict(rows.features, batch_size=self.at_once, verbose=0))

    def found_again(self, model: keras.Model) -> float:
        """How well the encoder still does what it was trained for.

        The share of halves of texts whose embedding is nearest to that of their other half, both
        ways. An embedding is the mean over tokens, of length one.
        """
        first, second = (_embeddings(model.backbone, half, self.at_once) for half in self.halves)
        similar = first @ second.T
        own = np.arange(len(similar))
        return float(np.mean([np.mean(similar.argmax(axis) == own) for axis in (0, 1)]))


def _embeddings(encoder: keras.Model, rows: Features, at_once: int) -> np.ndarray:
    tokens = encoder.predict(rows, batch_size=at_once, verbose=0)["sequence_output"]
    mask = rows["padding_mask"][..., None]
    means = (tokens * mask).sum(1) / mask.sum(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def _halves(texts: Sequence[str]) -> tuple[Features, Features]:
    words = [text.split() for text in texts]
    long = [x for x in words if len(x) >= GENERAL_WORDS][:GENERAL_TEXTS]
    parts = [x[: len(x) // 2] for x in long], [x[len(x) // 2 :] for x in long]
    rows = [assets.Rows([" ".join(x) for x in part], [0] * len(part)) for part in parts]
    first, second = (tokenise(part, GENERAL_TOKENS).features for part in rows)
    return first, second


def _of_texts(
    name: str, splits: assets.Splits, others: assets.Splits, length: int, at_once: int
) -> Task:
    train, validation, test = (
        tokenise(rows, length) for rows in (splits.train, splits.validation, splits.test)
    )
    classes = len(set(splits.train.labels))
    halves = _halves(others.test.texts)
    return Task(name, classes, train, validation, test, halves, minilm.encoder, at_once)


def rotten_tomatoes() -> Task:
    """Sentences of film reviews; newswire stories are what may be forgotten."""
    splits = assets.rotten_tomatoes(test=3000)
    return _of_texts("Rotten Tomatoes", splits, assets.reuters(), length=32, at_once=100)


def reuters() -> Task:
    """Newswire stories; sentences of film reviews are what may be forgotten."""
    splits = assets.reuters(validation=512)
    return _of_texts("R8", splits, assets.rotten_tomatoes(), length=64, at_once=64)


def tiny() -> Task:
    """Random rows and a random encoder: only whether everything works."""
    rng = np.random.default_rng(0)

    def rows(count: int) -> Data:
        tokens = rng.integers(1, 31, (count, 5)).astype("int32")
        ones = np.ones_like(tokens)
        features = {"token_ids": tokens, "padding_mask": ones, "segment_ids": 0 * ones}
        return Data(features, rng.integers(2, size=count).astype("int32"))

    def encoder() -> keras.Model:
        return keras_hub.models.BertBackbone(31, 1, 2, 22, 34, dropout=0.0)

    train, validation, test, *halves = (rows(n) for n in (3 * BATCH, 14, 14, 7, 7))
    first, second = (half.features for half in halves)
    return Task("tiny", 2, train, validation, test, (first, second), encoder, 7, jit=False)


TASKS: dict[str, Callable[[], Task]] = {"Rotten Tomatoes": rotten_tomatoes, "R8": reuters}
