"""Language models in SavedModels: logits, and tokens and text as `generate` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support import keras_hub_tasks
from support.keras_hub_backbones import BACKBONES
from support.models import state
from support.tasks import NAMES, UNFOLDED, Arrays, Service, adapted

import keras_lora as kl
from keras_lora.export.keras_hub.generation import stop_tokens
from keras_lora.export.keras_hub.operations import server_operations, slice_update
from keras_lora.export.serving import Serving

pytest_plugins = ["support.tasks"]


# --- Language models --------------------------------------------------------------------------

# Models that need a tokenizer or a certain second model.
NOT_MADE = {"BLIP2Seq2SeqLM", "Gemma4AssistantCausalLM", "PARSeqCausalLM"}
# Models that need an input_signature, and models that are refused with this text in the message
# (RWKV7 for `serve` too).
FIXED_SIZE = {"Qwen3_5CausalLM", "Qwen3_5MoeCausalLM", "Gemma4CausalLM"}
REFUSED = {"RWKV7CausalLM": "RWKV7TimeMix", "T5Seq2SeqLM": "Cannot squeeze axis=1.*generate=False"}
WARNS_WHEN_MADE = pytest.mark.filterwarnings(r"ignore::UserWarning:keras(_hub)?\.src")
WRITERS = sorted(keras_hub_tasks.task_classes().keys() - NOT_MADE - REFUSED.keys())
STOP = [5]


def writer(name: str) -> tuple[keras.Model, Arrays]:
    """A language model, and prompts of three and two tokens."""
    task: Any = keras_hub_tasks.task_classes()[name]
    network, given = BACKBONES[task.backbone_cls.__name__]()
    model = task(backbone=network, preprocessor=None)
    model.compile(sampler="greedy", run_eagerly=True)
    feeds = {
        tensor.name: given_or_empty(tensor, given) for tensor in keras.tree.flatten(model.input)
    }
    side = "decoder_" if "decoder_token_ids" in feeds else ""
    mask = feeds[f"{side}padding_mask"]
    mask[0, 3:], mask[1, 2:] = 0, 0
    feeds[f"{side}token_ids"] *= mask.astype("int32")
    return model, feeds


def given_or_empty(tensor: Any, given: Any) -> np.ndarray:
    """The given input, or an empty one if it is missing, for a modality that is left out."""
    if tensor.name in given:
        return np.array(given[tensor.name]).astype(tensor.dtype)
    length = given["token_ids"].shape[1] if tensor.name.endswith("mask") else 0
    return np.zeros((2, length), tensor.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_tokens_are_those_of_generate(name: str, service: Service, tmp_path: Path) -> None:
    model, feeds = writer(name)
    adapted(model, rank=1)
    expected = model.generate(dict(feeds), stop_token_ids=STOP)
    if name == "LlamaCausalLM":  # whole logits again, from plain blocks
        kl.chunk_logits(kl.rematerialize(model), 2)
        again = model.generate(dict(feeds), stop_token_ids=STOP)
        np.testing.assert_array_equal(again["token_ids"], expected["token_ids"])
    before = state(model)
    sizes = {key: tf.TensorSpec((None, *x.shape[1:]), x.dtype, key) for key, x in feeds.items()}
    signature = sizes if name in FIXED_SIZE else None
    kl.export_saved_model(model, tmp_path / "1", stop_token_ids=STOP, input_signature=signature)
    assert state(model) == before
    answers = service.answer(tmp_path / "1", feeds, "generate", config=UNFOLDED)
    for key, value in answers.items():
        np.testing.assert_array_equal(value, expected[key], key)
        assert value.dtype == feeds[key].dtype, key


def test_every_language_model_of_kerashub_is_accounted_for() -> None:
    assert len(WRITERS) == 29
    assert NOT_MADE | REFUSED.keys() <= keras_hub_tasks.task_classes().keys()


@WARNS_WHEN_MADE
@pytest.mark.parametrize("name", list(REFUSED))
def test_generation_that_is_refused_says_why_and_leaves_the_model(
    name: str, tmp_path: Path
) -> None:
    model, _ = writer(name)
    adapted(model)
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=f"(?s){REFUSED[name]}"):
        kl.export_saved_model(model, tmp_path / "1", stop_token_ids=STOP)
    assert state(model) == before
    assert not list(tmp_path.iterdir())


@WARNS_WHEN_MADE
def test_logits_alone(service: Service, tmp_path: Path) -> None:
    model, feeds = writer("T5Seq2SeqLM")
    adapted(model)
    kl.export_saved_model(model, tmp_path / "1", generate=False)
    for signature in ("serve", "serving_default"):
        logits = service.answer(tmp_path / "1", feeds, signature)["logits"]
        np.testing.assert_allclose(logits, model(feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(keras_hub_tasks.LANGUAGE_MODELS))
def test_text_is_that_of_generate(name: str, service: Service, tmp_path: Path) -> None:
    model = adapted(keras_hub_tasks.LANGUAGE_MODELS[name]())
    prompts = ["the good film", "a bad", "čaj"]
    expected = model.generate(list(prompts), max_length=11)
    report = kl.export_saved_model(model, tmp_path / "1", preprocessing=True, max_length=11)
    assert report.text_operations
    answers = service.answer(tmp_path / "1", {"text": prompts}, "generate")
    assert answers["text"].tolist() == expected
    assert model.generate(list(prompts), max_length=11) == expected
    stored = (tmp_path / "1/variables/variables.data-00000-of-00001").stat().st_size
    values = sum(np.array(v).nbytes for v in kl.merge_lora(model).weights)
    assert values <= stored <= 1.1 * values + 2**15  # once, for two signatures


def gpt2(sampler: Any = "greedy") -> keras.Model:
    model = keras_hub_tasks.LANGUAGE_MODELS["GPT2"]()
    model.compile(sampler=sampler, run_eagerly=True)
    return model


def prompts_of(model: keras.Model, length: int) -> Arrays:
    tokens = model.preprocessor.generate_preprocess(["good", " the film"], sequence_length=length)
    return {name: np.array(value).astype("int32") for name, value in tokens.items()}


def written(model: keras.Model, length: int, stop: Any) -> Any:
    """The answer of `generate` for tokens, which needs the preprocessor to be None."""
    prompts = prompts_of(model, length)
    preprocessor, model.preprocessor = model.preprocessor, None
    try:
        return model.generate(prompts, stop_token_ids=stop)
    finally:
        model.preprocessor = preprocessor


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        keras_hub.samplers.TopKSampler(k=5, seed=3),
        keras_hub.samplers.RandomSampler(temperature=0.7, seed=3),
        keras_hub.samplers.BeamSampler(num_beams=3),
    ],
)
def test_the_sampler_goes_on_from_its_state_at_the_export(
    sampler: Any, service: Service, tmp_path: Path
) -> None:
    model = gpt2(sampler)
    kl.export_saved_model(model, tmp_path / "1", stop_token_ids=None)
    for times in (1, 2):  # the service loads the model for each answer
        answers = service.answer(tmp_path / "1", prompts_of(model, 9), "generate", times)
        expected = written(model, 9, None)
        np.testing.assert_array_equal(answers["token_ids"], expected["token_ids"])


@pytest.mark.parametrize("stop", ["auto", None, "seen"])
def test_prompts_are_padded_and_answers_stop(stop: Any, service: Service, tmp_path: Path) -> None:
    model = gpt2()
    full = written(model, 11, None)
    tokens = [int(full["token_ids"][0, 5])] if stop == "seen" else stop
    kl.export_saved_model(model, tmp_path / "1", max_length=11, stop_token_ids=tokens)
    answers = service.answer(tmp_path / "1", prompts_of(model, 4), "generate")
    end = [model.preprocessor.tokenizer.end_token_id] if stop == "auto" else tokens
    expected = written(model, 11, end)
    for key, value in answers.items():
        np.testing.assert_array_equal(value, expected[key], key)
    assert (stop == "seen") == bool((answers["padding_mask"][0] == 0).any())
    with pytest.raises(RuntimeError, match="at most 11 tokens in a row"):
        service.answer(tmp_path / "1", prompts_of(model, 12), "generate")


def test_llama3_has_two_ends() -> None:
    model = keras_hub_tasks.LANGUAGE_MODELS["Llama3"]()
    vocabulary = model.preprocessor.tokenizer.vocabulary
    ends = [vocabulary["<|end_of_text|>"], vocabulary["<|eot_id|>"]]
    assert stop_tokens(model, Serving()) == ends


@pytest.mark.parametrize(
    ("detached", "options", "message"),
    [
        (True, {}, "without a preprocessor"),
        (True, {"preprocessing": True}, "without a preprocessor"),
        (False, {"max_length": 0}, "positive number"),
        (False, {"stop_token_ids": ()}, "ids of tokens"),
        (False, {"class_names": NAMES}, "None for a language model"),
        (False, {"stop_token_ids": "</s>"}, "ids of tokens"),
        (False, {"preprocessing": True, "generate": False}, "for the signature 'generate'"),
        (False, {"preprocessing": ("prompt",)}, "for the signature 'generate'"),
        (False, {"max_length": 5, "generate": False}, "True with max_length"),
    ],
)
def test_arguments_that_are_not_for_a_language_model(
    detached: bool, options: Any, message: str, tmp_path: Path
) -> None:
    model = gpt2()
    if detached:
        model.preprocessor = None
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(model, tmp_path / "1", **options)
    assert not list(tmp_path.iterdir())


# --- Operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize(
    ("start", "size"),
    [((0, 0), (2, 3)), ((1, 2), (2, 3)), ((3, 4), (2, 3)), ((-2, 9), (1, 1)), ((0, 1), (5, 4))],
)
def test_slice_update_is_that_of_xla(start: Any, size: Any, dtype: str) -> None:
    rng = np.random.default_rng(3)
    inputs = tf.cast(rng.integers(0, 2, (5, 7)), dtype)
    updates = tf.cast(rng.integers(0, 2, size), dtype)
    expected = keras.ops.slice_update(inputs, start, updates)
    traced = tf.function(slice_update, input_signature=None)
    for received in (slice_update(inputs, start, updates), traced(inputs, start, updates)):
        assert received.dtype == expected.dtype
        np.testing.assert_array_equal(received, expected)


def test_operations_are_those_of_keras_again_afterwards() -> None:
    before = keras.ops.slice_update, keras.ops.convert_to_numpy

    def fail() -> None:
        with server_operations():
            assert keras.ops.slice_update is slice_update
            assert type(keras.ops.convert_to_numpy(tf.constant(3))) is np.ndarray
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (keras.ops.slice_update, keras.ops.convert_to_numpy) == before
