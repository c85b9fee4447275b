"""Against PEFT on torch: what it writes is read, and what we write it loads, byte for byte."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import mutations
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from keras_lora.checks import AdapterFileError
from keras_lora.exchange.peft_files import (
    PeftAdapter,
    PeftModule,
    read_peft_adapter,
    write_peft_adapter,
)
from keras_lora.exchange.peft_files.config import (
    DEFAULTS,
    NOT_SAVED,
    REFUSED,
    is_targeted,
    parse_config,
)
from keras_lora.exchange.peft_files.naming import target_modules, value_and_pattern
from keras_lora.exchange.peft_files.tensors import PREFIX, file_tensors
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import write_adapter_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARY, D, K, CLASSES = 13, 11, 7, 3
# Twelve layers, so that the name of layer 1 begins that of layer 11.
LAYERS = 12


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(D, K)
        self.v_proj = torch.nn.Linear(D, K, bias=False)
        self.down_proj = torch.nn.Linear(K, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.tanh(self.q_proj(x) * self.v_proj(x)))


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(VOCABULARY, D)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(D)
        self.conv = torch.nn.Conv1d(D, 6, 3, groups=1)
        self.grouped = torch.nn.Conv1d(6, 4, 1, groups=2)
        self.score = torch.nn.Linear(4, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.grouped(self.conv(self.norm(x).transpose(1, 2)))
        return self.score(x.mean(2))


IDS = torch.arange(15).reshape(3, 5) % VOCABULARY
ALL_MODULES = [name for name, _ in Base().named_modules() if name]

CASES: dict[str, dict[str, Any]] = {
    "list": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"layers\.(1|11)\.(q_proj|down_proj)"},
    "all-linear": {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.25},
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1, 3, 11],
        "layers_pattern": "layers",
        "exclude_modules": ["layers.3.q_proj"],
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.q_proj": 3, r"^layers\.(0|11)\.v_proj": 5, "down_proj": 7},
        "alpha_pattern": {r".*\.1\d\.q_proj": 9.5, "q_proj": 4, "layers.1.down_proj": 1},
    },
    "rslora": {
        "use_rslora": True,
        "lora_alpha": 2.5,
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.11.q_proj": 3},
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "conv", "emb"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["score", "norm"]},
    "bias-all": {"target_modules": ["q_proj"], "modules_to_save": ["score"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["emb", "down_proj"], "r": 5},
    "convolutions": {"target_modules": ["conv", "grouped"], "r": 4},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal", "r": 2},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica", "r": 2},
    "revision": {"target_modules": ["q_proj"], "revision": "a"},
}
MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
COMPUTED = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"]
COMPUTED += ["rank_pattern", "alpha_pattern"]


def adapted(case: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model in which everything that trains has got random values."""
    torch.manual_seed(0)
    base = Base().to(dtype)
    model = peft.get_peft_model(base, peft.LoraConfig(**case), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(mean=0.3, std=0.2)
    return model.eval()


def saved_by_peft(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = adapted(CASES[case], dtype)
    model.save_pretrained(directory)
    return model


def fresh(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    base = Base().to(dtype)
    model = peft.PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
    return model.eval()


def outputs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(IDS).double())


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Byte for byte, but for what PEFT writes twice and what it never reads."""
    if b"original_module" in (theirs / WEIGHTS).read_bytes():
        unused = re.compile(r"\.(original_module|modules_to_save)\.")
        with_tensors(theirs, lambda t: [t.pop(key) for key in list(t) if unused.search(key)])
    assert (ours / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes()


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    modules = model.base_model.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def assert_reads(adapter: PeftAdapter, model: Any) -> None:
    layers = lora_layers(model)
    assert set(adapter.modules) == set(layers)
    for name, module in adapter.modules.items():
        layer = layers[name]
        assert module.rank == layer.r["default"]
        assert module.alpha == layer.lora_alpha["default"]
        assert module.scaling == layer.scaling["default"]
        factors = ("embedding_A", "embedding_B") if module.embedding else ("A", "B")
        for factor, received in zip(factors, (module.a, module.b), strict=True):
            expected = getattr(layer, f"lora_{factor}")["default"]
            expected = expected if module.embedding else expected.weight
            assert_same(received, expected)
        if "default" in layer.lora_magnitude_vector:
            assert_same(module.magnitude, layer.lora_magnitude_vector["default"].weight)
        if layer.lora_bias["default"]:
            assert_same(module.bias, layer.lora_B["default"].bias)


def assert_same(received: np.ndarray | None, expected: torch.Tensor) -> None:
    assert received is not None
    assert received.dtype == "float32"
    np.testing.assert_array_equal(received, expected.detach().float().numpy())


def written(adapter: PeftAdapter, directory: Path, **options: Any) -> None:
    given: dict[str, Any] = {"all_modules": ALL_MODULES, "dtype": adapter.dtypes, **options}
    write_peft_adapter(directory, adapter.modules, adapter.saved, adapter.config, **given)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return config


# PEFT says so of the bias of B and of groups.
@pytest.mark.filterwarnings("ignore:.*(invalid shape|groups > 1):UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_read_and_written_again(case: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = saved_by_peft(case, theirs)
    adapter = read_peft_adapter(theirs)
    assert_reads(adapter, model)
    assert adapter.unknown == ()
    assert adapter.config == config_of(theirs)

    written(adapter, ours)
    assert_same_tensors(ours, theirs)
    config, expected = config_of(ours), config_of(theirs)
    assert list(config) == list(expected)
    assert {k: v for k, v in config.items() if k not in COMPUTED} == {
        k: v for k, v in expected.items() if k not in COMPUTED
    }
    loaded = fresh(ours)
    assert_reads(adapter, loaded)
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    assert np.abs(outputs(model) - outputs(model.unload())).max() > 1e-3


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.float16, "float16"),
    (torch.bfloat16, "bfloat16"),
    (torch.float64, "float64"),
])  # fmt: skip
@pytest.mark.parametrize("case", ["list", "dora", "saved", "bias-all"])
def test_dtypes(case: str, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    saved_by_peft(case, theirs, dtype)
    adapter = read_peft_adapter(theirs)
    assert set(adapter.dtypes.values()) == {name}
    arrays = [*file_tensors(adapter.modules, adapter.saved).values()]
    assert {a.dtype.name for a in arrays} == {"float64" if name == "float64" else "float32"}
    written(adapter, ours)
    assert_same_tensors(ours, theirs)
    written(adapter, tmp_path / "cast", dtype="float32")
    assert set(read_peft_adapter(tmp_path / "cast").dtypes.values()) == {"float32"}


def test_mixed_dtypes_return_too(tmp_path: Path) -> None:
    model = adapted(CASES["dora"], torch.bfloat16)
    for layer in lora_layers(model).values():
        layer.lora_A.float()
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_peft_adapter(tmp_path / "theirs")
    assert set(adapter.dtypes.values()) == {"float32", "bfloat16"}
    written(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_parameters_that_take_the_place_of_the_bases(tmp_path: Path) -> None:
    model = saved_by_peft("bias-all", tmp_path)
    adapter = read_peft_adapter(tmp_path)
    expected = {"score.weight", "score.bias", "norm.bias", "conv.bias", "grouped.bias"}
    expected |= {f"layers.{i}.{p}.bias" for i in range(LAYERS) for p in ("q_proj", "down_proj")}
    assert set(adapter.saved) == expected
    score = model.base_model.model.score.modules_to_save["default"]
    assert_same(adapter.saved["score.bias"], score.bias)
    q_proj = model.base_model.model.layers[1].q_proj
    assert_same(adapter.saved["layers.1.q_proj.bias"], q_proj.base_layer.bias)


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_embeddings_that_peft_saves_beside_their_factors(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=17)
    base = transformers.GPT2LMHeadModel(config)
    case = {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}
    model = peft.get_peft_model(base, peft.LoraConfig(**case, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    adapter = read_peft_adapter(tmp_path / "theirs")
    assert {name: m.kind for name, m in adapter.modules.items()} == {
        "transformer.wte": "embedding",
        "transformer.h.0.attn.c_attn": "linear",
    }
    assert_same(adapter.saved["transformer.wte.weight"], base.transformer.wte.base_layer.weight)
    written(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert "pipeline_tag: text-generation" in (tmp_path / "ours/README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*changes the base weights:UserWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_are_read_once_converted(
    init: str, use_rslora: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = Base()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    case = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": init}
    model = peft.get_peft_model(base, peft.LoraConfig(**case, use_rslora=use_rslora))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "unconverted")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    with pytest.raises(AdapterFileError, match=f"init_lora_weights: '{init}' changes the base"):
        read_peft_adapter(tmp_path / "unconverted")
    for name, module in read_peft_adapter(tmp_path / "converted").modules.items():
        layer = lora_layers(model)[name]
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        received = before[f"{name}.weight"].numpy() + module.scaling * module.b @ module.a
        np.testing.assert_allclose(received, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def with_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def with_config(directory: Path, **fields: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(config_of(directory) | fields))


def renamed(*rules: tuple[str, str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            name = key
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            tensors[name] = tensors.pop(key)

    return edit


NAMED = [
    (r"(lora_[AB])\.", r"\1.my_adapter."),
    (r"(lora_embedding_[AB])$", r"\1.my_adapter"),
    (r"score\.", "score.modules_to_save.default."),
]


@pytest.mark.parametrize("magnitude", ["", ".weight", ".my_adapter", ".my_adapter.weight"])
def test_other_forms_of_keys(magnitude: str, tmp_path: Path) -> None:
    model = adapted({**CASES["dora"], "modules_to_save": ["score"]})
    model.save_pretrained(tmp_path)
    before = read_peft_adapter(tmp_path)
    with_tensors(tmp_path, renamed(*NAMED, ("(magnitude_vector)$", rf"\1{magnitude}")))
    frozen = {f"{PREFIX}score.original_module.weight": torch.ones(2)}
    with_tensors(tmp_path, lambda tensors: tensors.update(frozen))
    after = read_peft_adapter(tmp_path)
    assert_reads(after, model)
    assert list(after.saved) == list(before.saved)
    assert (after.dtypes, after.unknown) == (before.dtypes, ())


def test_what_is_not_understood_is_named(tmp_path: Path) -> None:
    saved_by_peft("list", tmp_path)
    new = {
        f"{PREFIX}norm.num_batches_tracked": torch.tensor(3),
        f"{PREFIX}layers.1.q_proj.lora_velora_embed": torch.ones(3),
        f"{PREFIX}emb.token_adapter.trainable_tokens_delta": torch.ones(3),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "layers.1.v_proj", "score"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "layers.3.v_proj"], "layers_to_transform": 11},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": ["q_proj", "score"], "layers_to_transform": [0], "layers_pattern": "h"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "exclude_modules": ["1.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"layers\.1.*"},
    ],
)
def test_targets_match_as_in_peft(fields: dict[str, Any]) -> None:
    settings = parse_config(MINIMAL | fields, Problems())
    assert settings
    config = peft.LoraConfig(**fields)
    for name in ALL_MODULES if fields["target_modules"] != "all-linear" else ():
        expected = check_target_module_exists(config, name)
        excluded = type(expected).__name__ == "_ExcludedModule"
        assert is_targeted(settings.config, name) == (bool(expected) and not excluded), name


@pytest.mark.parametrize("key", ["q_proj", "1.q_proj", "^layers.1.q_proj", r"layers\.\d\.q", "q|v",
    r".*\.1\d\.q_proj", "layers.1", "^q_proj$", "[[a]q_proj"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_patterns_match_as_in_peft(key: str) -> None:
    settings = parse_config(MINIMAL | {"rank_pattern": {key: 3, "v_proj": 5}}, Problems())
    assert settings
    for name in ALL_MODULES:
        pattern = {key: 3, "v_proj": 5}
        assert settings.ranks.of(name) == pattern.get(get_pattern_key(list(pattern), name), 8)


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
            "a kernel of size 1",
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


def test_the_links_of_a_snapshot_are_followed(tmp_path: Path) -> None:
    model = saved_by_peft("list", tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for name in (CONFIG, WEIGHTS):
        blob = (tmp_path / "snapshot" / name).rename(tmp_path / "blobs" / name)
        (tmp_path / "snapshot" / name).symlink_to(blob)
    assert_reads(read_peft_adapter(tmp_path / "snapshot"), model)


def module(rank: int = 2, **options: Any) -> PeftModule:
    rng = np.random.default_rng(rank)
    a, b = rng.normal(size=(rank, D)), rng.normal(size=(K, rank))
    given: dict[str, Any] = {"a": a, "b": b, "rank": rank, "alpha": 8.0, **options}
    return PeftModule(**given)


def test_names_that_are_written() -> None:
    names = [f"layers.{i}.q_proj" for i in range(LAYERS)]
    assert target_modules(names, ALL_MODULES) == ["q_proj"]
    assert target_modules(names[:2], ALL_MODULES) == ["0.q_proj", "1.q_proj"]
    assert target_modules(names[:2], None) == names[:2]
    assert target_modules(["q", "b.q"], ["a.q", "q", "b.q"]) == r"(b\.q|q)"


@pytest.mark.parametrize(
    "values",
    [
        {f"layers.{i}.{p}": 4 for i in range(LAYERS) for p in "qv"} | {"layers.1.q": 3},
        {f"layers.{i}.{p}": i % 3 for i in range(LAYERS) for p in "qv"},
        {f"layers.{i}.{p}": "qv".index(p) for i in range(LAYERS) for p in "qv"},
        {"q": 1, "a.q": 2, "b.a.q": 3, "c.q": 3, "d.q": 3},
        {"layersx1.q": 1, "layers.1.q": 2, "a+b": 3, "a*b": 3, "aab": 1},
    ],
)
def test_patterns_that_are_written_mean_each_module_to_peft(values: dict[str, int]) -> None:
    common, pattern = value_and_pattern(values)
    for order in (pattern, dict(reversed(pattern.items()))):
        found = {name: order.get(get_pattern_key(list(order), name), common) for name in values}
        assert found == values


def test_targets_without_names_of_the_base_load_too(tmp_path: Path) -> None:
    modules = {"layers.1.q_proj": module(), "layers.11.v_proj": module(5, alpha=2.5)}
    write_peft_adapter(tmp_path, modules, config={"bias": "none"})
    adapter = read_peft_adapter(tmp_path)
    assert_reads(adapter, fresh(tmp_path))
    assert config_of(tmp_path)["target_modules"] == list(modules)
    assert config_of(tmp_path)["lora_alpha"] == 8
    assert isinstance(config_of(tmp_path)["lora_alpha"], int)


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        ({}, {}, "no modules"),
        ({"q": module(), "v": module(use_rslora=True)}, {}, "use_rslora in some"),
        ({"q": module(), "v": module(magnitude=np.ones(K))}, {}, "q: lora_magn.*use_dora=True"),
        ({"q": module(magnitude=np.ones(5))}, {}, r"shape \(5,\), expected \(7,\)"),
        ({"q": module(bias=np.ones(5))}, {}, r"lora_B.bias of shape \(5,\), expected \(7,\)"),
        ({"q": module(rank=2, alpha=np.nan)}, {}, "alpha"),
        ({"q": module(a=np.full((2, D), np.nan))}, {}, "q.lora_A.weight: NaN or infinity"),
        ({"q": module(a=np.full((2, D), 1e6))}, {"dtype": "float16"}, "NaN or infinity"),
        ({"q": module()}, {"dtype": "int8"}, r"dtype \['int8'\]"),
        ({"q": module(a=np.ones((3, D)))}, {}, "rank 2 that the config gives"),
        ({"a/../b": module()}, {}, "segment"),
        ({"a..b": module()}, {}, "no name of a parameter|no tensors of LoRA"),
        ({"q": module()}, {"saved": {"v.lora_A.weight": np.ones(2)}}, "lora_B.weight is missing"),
        ({"q": module()}, {"saved": {"v.base_layer.bias": np.ones(2)}}, "take for other"),
        ({"q": module()}, {"config": {"other": 1}}, "other: no field of LoraConfig"),
        ({"q": module()}, {"config": {"use_qalora": True}}, "use_qalora: the inputs"),
        ({"q": module()}, {"config": {"revision": float("nan")}}, "JSON"),
        ({"q": module()}, {"config": {"revision": object()}}, "JSON"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_is_not_written(
    modules: dict[str, PeftModule], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError, match=message):
        write_peft_adapter(tmp_path / "new", modules, **options)
    assert not (tmp_path / "new").exists()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_peft_adapter(tmp_path, {"q": module()})
    before = contents(tmp_path)
    assert before["README.md"] == b"mine"
    with pytest.raises(AdapterFileError, match="pass overwrite=True"):
        write_peft_adapter(tmp_path, {"q": module(3)})
    assert contents(tmp_path) == before
    write_peft_adapter(tmp_path, {"q": module(3)}, overwrite=True, model_card="new")
    assert read_peft_adapter(tmp_path).modules["q"].rank == 3
    assert contents(tmp_path)["README.md"] == b"new"


def test_adapters_of_this_package_and_links_stay(tmp_path: Path) -> None:
    write_adapter_files(tmp_path / "native", {}, {}, overwrite=False)
    with pytest.raises(AdapterFileError, match="keras_lora itself; write to"):
        write_peft_adapter(tmp_path / "native", {"q": module()}, overwrite=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / WEIGHTS).symlink_to(tmp_path / "blob")
    with pytest.raises(AdapterFileError, match=f"{WEIGHTS} is a link"):
        write_peft_adapter(tmp_path / "linked", {"q": module()}, overwrite=True)


@pytest.mark.parametrize("base", ["org/base", "true", 'a "b"\n---\n: x', "/tmp/ä b"])
def test_the_front_matter_of_the_card(base: str, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": base, "task_type": "SEQ_CLS"}
    write_peft_adapter(tmp_path, {"q": module()}, config=config)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    tags = [f"base_model:adapter:{base}", "lora"]
    expected = {"base_model": base, "library_name": "peft", "tags": tags}
    assert card.data.to_dict() == expected
    assert "PeftModel.from_pretrained" in card.text


@contextlib.contextmanager
def failing(name: str, call: int, error: BaseException) -> Iterator[None]:
    import os  # noqa: PLC0415

    module: Any = Path if name == "replace" else os
    function = getattr(module, name)
    calls = iter(range(1, 99))

    def fail(*args: Any) -> Any:
        if next(calls) == call:
            raise error
        return function(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fail)
        with contextlib.suppress(AdapterFileError, KeyboardInterrupt):
            yield


@pytest.mark.parametrize("alpha", [8.0, 5.0])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("name", "call"), [("fsync", i) for i in range(1, 5)]
    + [("replace", i) for i in range(1, 5)])  # fmt: skip
def test_a_failed_save_never_mixes_two_adapters(
    name: str, call: int, error: BaseException, alpha: float, tmp_path: Path
) -> None:
    old, new = module(), module(a=np.ones((2, D)), alpha=alpha)
    write_peft_adapter(tmp_path, {"q": old})
    with failing(name, call, error):
        write_peft_adapter(tmp_path, {"q": new}, overwrite=True, model_card="new")
    assert set(contents(tmp_path)) <= {CONFIG, WEIGHTS, "README.md"}
    if (tmp_path / CONFIG).exists():
        found = read_peft_adapter(tmp_path).modules["q"]
        pair = (found.a[0, 0] == 1, found.alpha)
        assert pair in ((False, 8), (True, alpha))
    else:
        # After the new tensors, before the new config.
        assert (name, call, alpha) == ("replace", 4, 5.0)


def test_left_over_temporary_files_go_and_others_stay(tmp_path: Path) -> None:
    left = [f".{name}.{'0a' * 16}.tmp" for name in (CONFIG, WEIGHTS, "README.md")]
    for name in [*left, ".other.tmp"]:
        (tmp_path / name).touch()
    write_peft_adapter(tmp_path, {"q": module()})
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md", ".other.tmp"}


def test_memory_of_reading_stays_under_three_times_the_file(tmp_path: Path) -> None:
    large = np.ones((2, 2**20), "float32")
    modules = {name: module(a=large) for name in "qkvo"}
    write_peft_adapter(tmp_path, modules, dtype="bfloat16")
    tracemalloc.start()
    read_peft_adapter(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 3 * (tmp_path / WEIGHTS).stat().st_size + 2**17


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


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    values = np.arange(-7, 7).reshape(2, 7).astype(ml_dtypes.bfloat16)
    write_peft_adapter(tmp_path, {"q": module(a=values)}, dtype="bfloat16")
    read = read_peft_adapter(tmp_path)
    np.testing.assert_array_equal(read.modules["q"].a, values.astype("float32"))
    assert read.dtypes[f"{PREFIX}q.lora_A.weight"] == "bfloat16"
