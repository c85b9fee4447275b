"""PEFT's files that are refused, damaged, or read with a warning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from peft.utils.other import get_pattern_key
from support import mutations
from support.peft_adapters import (
    CONFIG,
    LAYERS,
    WEIGHTS,
    config_of,
    renamed,
    saved_by_peft,
    with_config,
    with_tensors,
)

from keras_lora.checks import AdapterFileError
from keras_lora.exchange.peft_files import (
    PeftAdapter,
    read_peft_adapter,
)
from keras_lora.exchange.peft_files.config import (
    DEFAULTS,
    NOT_SAVED,
    REFUSED,
)
from keras_lora.exchange.peft_files.tensors import PREFIX, file_tensors


def test_what_is_not_understood_is_named(tmp_path: Path) -> None:
    saved_by_peft("list", tmp_path)
    new = {
        f"{PREFIX}norm.num_batches_tracked": torch.tensor(3),
        f"{PREFIX}layers.1.q_proj.lora_velora_embed": torch.ones(3),
        f"{PREFIX}emb.token_adapter.trainable_tokens_original": torch.ones(3),
        f"{PREFIX}layers.1.q_proj.lora_A.bias": torch.ones(3),
        f"{PREFIX}a/../b": torch.ones(3),
        f"{PREFIX}a..b": torch.ones(3),
        "prompt_embeddings": torch.ones(3),
    }
    with_tensors(tmp_path, lambda tensors: tensors.update(new))
    adapter = read_peft_adapter(tmp_path)
    assert adapter.unknown == tuple(sorted(new))
    assert adapter.saved == {}


def test_every_field_of_the_installed_config_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == {*DEFAULTS, *NOT_SAVED}
    expected = peft.LoraConfig().to_dict() | {"inference_mode": True, "peft_version": None}
    assert expected == DEFAULTS


def test_unknown_fields_and_modules_beside_the_targets_are_warned_of(tmp_path: Path) -> None:
    saved_by_peft("list", tmp_path)
    with_config(tmp_path, use_new=True, target_modules=["q_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = read_peft_adapter(tmp_path)
    assert [w.filename for w in caught] == [__file__] * 2
    assert "unknown fields ['use_new']" in str(caught[0].message)
    assert "layers.1.v_proj" in str(caught[1].message)
    assert len(adapter.modules) == 2 * LAYERS


CHANGED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is not 'LORA'"),
    ({"peft_type": None}, "peft_type: None"),
    *(({name: [{"any": 1}]}, f"{name}: {re.escape(why)}") for name, (_, why) in REFUSED.items()),
    *(
        ({"init_lora_weights": init}, f"init_lora_weights: '{init}' changes.*path_initial")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "another")
    ),
    ({"r": 0}, "r: Invalid `rank`"),
    ({"r": None}, "r: Invalid `rank`"),
    ({"r": "8"}, "r: Invalid `rank`"),
    ({"r": True}, "r: Invalid `rank`"),
    ({"r": 4}, r"layers.0.q_proj: A and B.*the rank 4.*layers.9.v_proj: A and B"),
    ({"lora_alpha": float("nan")}, "lora_alpha: Invalid `alpha`"),
    ({"lora_alpha": 10**400}, "lora_alpha: "),
    ({"rank_pattern": {"q_proj": 4}}, r"layers.1.q_proj: A and B of shapes \(2, 11\).*rank 4"),
    ({"rank_pattern": {"(": 4}}, r"rank_pattern\['\('\]: .*unterminated"),
    ({"rank_pattern": {"(?i)q": 4}}, "rank_pattern.*global flags"),
    ({"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\]: Invalid `rank`"),
    ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]: Invalid `alpha`"),
    ({"alpha_pattern": [3]}, "alpha_pattern: of type list"),
    ({"bias": "some"}, "bias: 'some'"),
    ({"lora_dropout": "0.1"}, "lora_dropout: Invalid `dropout`"),
    ({"lora_dropout": 10**400}, "lora_dropout: Invalid `dropout`"),
    ({"use_rslora": "yes"}, "use_rslora: of type str"),
    ({"use_dora": True}, "lora_magnitude_vector is missing, although"),
    ({"lora_bias": True}, "lora_B.bias is missing, although"),
    ({"target_modules": 3}, "target_modules: of type int"),
    ({"target_modules": [3]}, "target_modules: not all"),
    ({"target_modules": "("}, "unterminated"),
    ({"layers_to_transform": ["a"]}, "layers_to_transform: not all"),
    ({"layers_pattern": ["("]}, "unterminated|unbalanced"),
    ({"r": 0, "use_qalora": True, "bias": 3}, "use_qalora: .*bias: 3"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), CHANGED)
def test_configs_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_peft("list", tmp_path)
    with_config(tmp_path, **fields)
    with pytest.raises(AdapterFileError, match=message):
        read_peft_adapter(tmp_path)


Q = f"{PREFIX}layers.1.q_proj."
A, B = Q + "lora_A.weight", Q + "lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(A), "layers.1.q_proj: lora_A.weight is missing"),
        (lambda t: t.pop(B), "layers.1.q_proj: lora_B.weight is missing"),
        (lambda t: t[A].fill_(torch.nan), f"{A}: NaN or infinity"),
        (lambda t: t.update({A: t[A].int()}), f"{A}: dtype I32, expected one of"),
        (lambda t: t.update({A: t[A].T.contiguous()}), "expected factors of the rank 2"),
        (lambda t: t.update({A: t[A][:, :0]}), "expected two factors"),
        (lambda t: t.update({A: t[A][0].clone()}), "expected two factors"),
        (lambda t: t.update({A: t[A][..., None]}), "expected two factors"),
        (
            lambda t: t.update({A: torch.ones(2, 3, 3), B: torch.ones(5, 2, 3)}),
            "kernel of size 1",
        ),
        (
            lambda t: t.update({Q + "lora_embedding_A": torch.ones(2)}),
            "lora_embedding_B is missing",
        ),
        (
            lambda t: t.update({Q + f"lora_embedding_{x}": torch.ones(2, 2) for x in "AB"}),
            "parts of an embedding and of a linear module",
        ),
        (lambda t: t.update({Q + "lora_B.bias": torch.ones(7)}), "although lora_bias=False"),
        (lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(7)}), "use_dora=False"),
        (lambda t: t.update({Q + "lora_A.x.weight": t[A] + 1}), "lora_A.x.weight: differs from"),
        (
            lambda t: t.update({f"{PREFIX}at.base_layer.out.lora_A.weight": torch.ones(2)}),
            "MultiheadAttention",
        ),
        (lambda t: t.clear(), "no tensors"),
        (renamed((re.escape(PREFIX), "")), "no tensors of LoRA among 48"),
        (lambda t: (t[A].fill_(torch.inf), t.pop(B)), "infinity; layers.1.q_proj: lora_B.weight"),
    ],
)
def test_tensors_that_are_refused(
    edit: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    saved_by_peft("list", tmp_path)
    with_tensors(tmp_path, edit)
    with pytest.raises(AdapterFileError, match=message):
        read_peft_adapter(tmp_path)


def moved(name: str) -> mutations.Mutation:
    def mutate(directory: Path) -> None:
        (directory / WEIGHTS).rename(directory / name)

    return mutate


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (moved("adapter_model.bin"), "execute code.*safe_serialization=True"),
        (moved("adapter_model-00001-of-00002.safetensors"), "several files"),
        (moved("adapter.safetensors"), "keras_lora itself; load it with load_adapter"),
        (mutations.special(WEIGHTS, lambda file: None), f"{WEIGHTS}.*FileNotFound"),
        (mutations.special(CONFIG, lambda file: None), f"{CONFIG}.*FileNotFound"),
        (shutil.rmtree, f"{CONFIG}.*FileNotFound.*{WEIGHTS}.*FileNotFound"),
        (mutations.replace(CONFIG, b'{"peft_type": "LORA"}'), "r: missing; lora_alpha: missing"),
        (mutations.replace(CONFIG, b"{}"), "an empty adapter_config.json"),
        (mutations.replace(CONFIG, b"{" + b" " * 2**21), "bytes of JSON"),
        (mutations.truncate(WEIGHTS, 5000), "damaged"),
        (mutations.repeat_in_json, "twice"),
    ],
)
def test_files_that_are_refused(mutation: mutations.Mutation, message: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    saved_by_peft("list", directory)
    mutation(directory)
    with pytest.raises(AdapterFileError, match=message):
        read_peft_adapter(directory)


def fuzzed(directory: Path) -> None:
    """An adapter under the names and with the metadata that the mutations expect."""
    arrays: dict[str, np.ndarray] = {
        f"{PREFIX}{name}.lora_{x}.weight": np.full(shape, 0.5, dtype)
        for name, dtype in (("q", "float32"), ("v", "float16"), ("o", "float64"))
        for x, shape in (("A", (2, 7)), ("B", (5, 2)))
    }
    arrays[f"{PREFIX}score.bias"] = np.ones(3, "float32")
    metadata = {"format": "pt", "config": "{}", "digest": "", "format_version": "1"}
    directory.mkdir()
    safetensors.numpy.save_file(arrays, directory / mutations.TENSORS_FILE, metadata)
    config = DEFAULTS | {"r": 2, "target_modules": ["q", "v", "o"], "alpha_pattern": {"q": 3}}
    (directory / CONFIG).write_text(json.dumps(config))


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(mutation=mutations.mutations())
def test_a_damaged_adapter_is_read_as_it_stands_in_the_files_or_refused(
    mutation: mutations.Mutation,
) -> None:
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        directory = Path(parent, "adapter")
        fuzzed(directory)
        mutation(directory)
        if (directory / mutations.TENSORS_FILE).is_symlink() or directory.is_dir():
            moved_back(directory)
        warnings.simplefilter("ignore", UserWarning)
        with contextlib.suppress(AdapterFileError):
            assert_as_in_the_files(read_peft_adapter(directory), directory)


def moved_back(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (directory / mutations.TENSORS_FILE).rename(directory / WEIGHTS)


def assert_as_in_the_files(adapter: PeftAdapter, directory: Path) -> None:
    assert adapter.config == config_of(directory)
    expected = safetensors.torch.load_file(directory / WEIGHTS)
    received = file_tensors(adapter.modules, adapter.saved)
    assert {*received, *adapter.unknown} == set(expected)
    for key, array in received.items():
        np.testing.assert_array_equal(array, expected[key].double().numpy())
        assert np.isfinite(array).all()
    for name, part in adapter.modules.items():
        assert part.a.shape[0] == part.b.shape[1] == part.rank
        pattern = adapter.config.get("alpha_pattern") or {}
        assert part.alpha == pattern.get(
            get_pattern_key(list(pattern), name), adapter.config["lora_alpha"]
        )
    assert set(adapter.dtypes) == set(received)
