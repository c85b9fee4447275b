"""Tiny tasks of KerasHub, with tokenizers of each kind over vocabularies that are made here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import sentencepiece
from keras_hub import models
from tokenizers.pre_tokenizers import ByteLevel

from support.keras_hub_backbones import BACKBONES, sizes

SENTENCES = ["the good film", "a bad film", "good films are good", "the bad are bad"]
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]", "<pad>", "<bos>", "<eos>"]
MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "g o",
    "go o",
    "goo d",
    "Ġ good",
    "f i",
    "fi l",
    "fil m",
    "Ġ film",
]
LLAMA3 = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
LENGTH = 13


def word_pieces() -> list[str]:
    return [*SPECIAL, "the", "a", "good", "bad", "film", "##s", "are", "!"]


def byte_pairs(*special: str) -> tuple[dict[str, int], list[str]]:
    """A vocabulary of every byte, the results of the merges, and these special tokens."""
    pieces = [*sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES), *special]
    return {piece: i for i, piece in enumerate(pieces)}, MERGES


@cache
def sentence_pieces() -> bytes:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=proto,
        vocab_size=29,
        control_symbols=SPECIAL[:4] + SPECIAL[5:],
        minloglevel=2,
    )
    return proto.getvalue()


def backbone(name: str, vocabulary: int) -> Any:
    """The tiny backbone of this name, for a vocabulary of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "VOCAB", vocabulary)
        patch.setattr(sizes, "LENGTH", LENGTH)
        return BACKBONES[f"{name}Backbone"]()[0]


def classifier(name: str, tokenizer: Any, classes: int = 3, **options: Any) -> keras.Model:
    preprocessor = getattr(models, f"{name}TextClassifierPreprocessor")(tokenizer, LENGTH)
    made = getattr(models, f"{name}TextClassifier")
    network = backbone(name, tokenizer.vocabulary_size())
    return made(network, num_classes=classes, preprocessor=preprocessor, **options)


# A text classifier for each kind of tokenizer, and of preprocessor.
CLASSIFIERS: dict[str, Callable[[], keras.Model]] = {
    "Bert": lambda: classifier("Bert", models.BertTokenizer(word_pieces(), lowercase=True)),
    "DistilBert": lambda: classifier("DistilBert", models.DistilBertTokenizer(word_pieces())),
    "Roberta": lambda: classifier(
        "Roberta", models.RobertaTokenizer(*byte_pairs("<s>", "<pad>", "</s>", "<mask>"))
    ),
    "XLMRoberta": lambda: classifier("XLMRoberta", models.XLMRobertaTokenizer(sentence_pieces())),
    "DebertaV3": lambda: classifier("DebertaV3", models.DebertaV3Tokenizer(sentence_pieces())),
}


def language_model(
    name: str, tokenizer: Any, kind: str = "CausalLM", lengths: Sequence[int] = (LENGTH,)
) -> keras.Model:
    preprocessor = getattr(models, f"{name}{kind}Preprocessor")(tokenizer, *lengths)
    network = backbone(name, tokenizer.vocabulary_size())
    model = getattr(models, f"{name}{kind}")(network, preprocessor=preprocessor)
    spread(model)
    model.compile(sampler="greedy", run_eagerly=True)
    return model


# A language model for each kind of tokenizer.
LANGUAGE_MODELS: dict[str, Callable[[], keras.Model]] = {
    "GPT2": lambda: language_model("GPT2", models.GPT2Tokenizer(*byte_pairs("<|endoftext|>"))),
    "Llama3": lambda: language_model(
        "Llama3", models.Llama3Tokenizer(*byte_pairs(*(f"<|{name}|>" for name in LLAMA3)))
    ),
    "Gemma": lambda: language_model("Gemma", models.GemmaTokenizer(sentence_pieces())),
    "Bart": lambda: language_model(
        "Bart",
        models.BartTokenizer(*byte_pairs("<s>", "<pad>", "</s>")),
        "Seq2SeqLM",
        (LENGTH, LENGTH),
    ),
}


def spread(model: keras.Model) -> None:
    """Weights large enough that the answers of random models vary."""
    rng = np.random.default_rng(7)
    for variable in model.trainable_variables:
        variable.assign(variable + rng.normal(scale=0.3, size=variable.shape))


def task_classes() -> dict[str, Any]:
    """Every language model of KerasHub with a backbone of its own."""
    found: list[Any] = [getattr(models, name) for name in dir(models)]
    tasks = [task for task in found if getattr(task, "backbone_cls", None) is not None]
    return {task.__name__: task for task in tasks if issubclass(task, models.CausalLM)}
