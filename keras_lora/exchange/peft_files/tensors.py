"""The keys of `adapter_model.safetensors`, and the modules that their tensors belong to.

    base_model.model.<module>.lora_A.weight              (r, in)    or (r, in, *kernel)
    base_model.model.<module>.lora_B.weight              (out, r)   or (out, r, 1, ...)
    base_model.model.<module>.lora_B.bias                (out,)
    base_model.model.<module>.lora_embedding_A           (r, num)
    base_model.model.<module>.lora_embedding_B           (dim, r)
    base_model.model.<module>.lora_magnitude_vector      (out,)     or (1, out, 1, ...)
    base_model.model.<module>.token_adapter.trainable_tokens_delta   (see `token_rows`)
    base_model.model.<parameter>                         trained in full, or a copy of the base's

Those of `target_parameters` are in `parameters.py`.

Older files, and files with the whole state of a model, have the adapter's name in their keys:
`lora_A.default.weight`, `lora_magnitude_vector.default.weight`,
`score.modules_to_save.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from keras_lora.exchange.peft_files.config import Settings
from keras_lora.exchange.peft_files.parameters import (
    parameter_names,
    stacked,
    unstacked,
    wrapper_names,
)
from keras_lora.exchange.problems import Problems
from keras_lora.files.reading import key_problem
from keras_lora.lowrank.equations import scaling

Array: TypeAlias = "np.ndarray[Any, Any]"

PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|(?P<whole>lora_embedding_[AB])(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)"
)
ROWS = "token_adapter.trainable_tokens_delta"
_ROWS = re.compile(rf"(?P<module>.+)\.{re.escape(ROWS)}(?:\.[^.]+)?")
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BIAS, _MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
_PARTS = {*_LINEAR, *_EMBEDDING, _BIAS, _MAGNITUDE}


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftModule:
    """What an adapter adds to one module: `scaling * b @ a`, in PyTorch's orientation.

    Or to a parameter of stacked experts, which has a matrix `(out, in)` for each.

    Attributes:
        a: `(r, in)`; `(r, num)` for an embedding; `(r, in, *kernel)` for a convolution, with `in`
            counting the channels of one group; `(n, r, in)` for `n` experts.
        b: `(out, r)`; `(dim, r)` for an embedding; `(out, r / groups, 1, ...)` for a convolution;
            `(n, out, r)` for experts.
        rank: The rank of this module, after `rank_pattern`.
        alpha: The alpha of this module, after `alpha_pattern`.
        use_rslora: Whether the scale is `alpha / sqrt(rank)`.
        magnitude: DoRA's norms of the `out` rows of the whole matrix, of any shape of that size.
        bias: `(out,)`; with `lora_bias` the module adds `scaling * bias` to the output too.
        embedding: Whether the module is an embedding.
        experts: Whether it is a parameter of stacked experts.

    Example:

    >>> PeftModule(a=np.ones((2, 7)), b=np.ones((5, 2)), rank=2, alpha=8).scaling
    4.0
    """

    a: Array
    b: Array
    rank: int
    alpha: float
    use_rslora: bool = False
    magnitude: Array | None = None
    bias: Array | None = None
    embedding: bool = False
    experts: bool = False

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank, self.use_rslora)

    @property
    def kind(self) -> str:
        """`"linear"`, `"embedding"`, `"convolution"` or `"experts"`."""
        if self.embedding:
            return "embedding"
        if self.experts:
            return "experts"
        return "linear" if self.a.ndim == 2 else "convolution"


@dataclass(frozen=True)
class SortedKeys:
    """The keys of a file, by the part of a module or by the parameter that each is."""

    parts: Mapping[str, Mapping[str, str]]  # {module: {part: key}}
    saved: Mapping[str, str]  # {parameter: key}
    rows: Mapping[str, str]  # {module: key of the rows that train in full}
    unknown: tuple[str, ...]


def sort_keys(tensors: Mapping[str, Array], problems: Problems) -> SortedKeys:
    """Find the part of a module, or the parameter, that each tensor is."""
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    rows: dict[str, str] = {}
    unknown = []
    for key in tensors:
        name = key.removeprefix(PREFIX)
        match, of_rows = _LORA.fullmatch(name), _ROWS.fullmatch(name)
        part = _part(match) if match else None
        if key_problem(key) or name == key or "" in name.split("."):
            unknown.append(key)
        elif match and part in _PARTS:
            _add(parts.setdefault(match["module"], {}), str(part), key, tensors, problems)
        elif of_rows:
            _add(rows, of_rows["module"], key, tensors, problems)
        elif ".original_module." in name:
            pass  # the base's own values, for which PEFT uses the trained copy
        elif any(segment.startswith(("lora_", "trainable_tokens")) for segment in name.split(".")):
            unknown.append(key)
        else:
            _add(saved, _parameter(name), key, tensors, problems)
    return SortedKeys(parts, saved, rows, tuple(unknown))


def widened(array: Array) -> Array:
    """The same values in float32 or, where they are float64, in float64."""
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of a signalling NaN
        return array if array.dtype == "float64" else array.astype("float32", copy=False)


def is_factor(key: str) -> bool:
    """Whether a key is one of a LoRA factor, a magnitude or a bias of B."""
    return _LORA.fullmatch(key.removeprefix(PREFIX)) is not None


def build_modules(
    keys: SortedKeys, tensors: Mapping[str, Array], settings: Settings, problems: Problems
) -> dict[str, PeftModule]:
    """The modules by name; what is wrong with a module is added to `problems`."""
    if not keys.parts:
        problems.add(f"no tensors of LoRA among {len(tensors)}, e.g. {sorted(tensors)[:3]}")
    modules = {}
    parameters, unclear = parameter_names(keys.parts, settings.parameters)
    problems.add(*unclear)
    for name, parts in sorted(keys.parts.items()):
        found = {part: tensors[key] for part, key in parts.items()}
        read = _experts if name in parameters else _module
        full = parameters.get(name, name)
        module, wrong = read(full, found, settings)
        problems.add(*(f"{full}: {w}" for w in wrong))
        if module:
            modules[full] = module
    return modules


def file_tensors(modules: Mapping[str, PeftModule], saved: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors under the keys that PEFT writes."""
    tensors: dict[str, Array] = {}
    wrappers = wrapper_names(name for name, module in modules.items() if module.experts)
    for name, module in modules.items():
        a, b = _EMBEDDING if module.embedding else _LINEAR
        factors = stacked(module.a, module.b) if module.experts else (module.a, module.b)
        parts = {a: factors[0], b: factors[1], _BIAS: module.bias, _MAGNITUDE: module.magnitude}
        prefix = PREFIX + wrappers.get(name, name)
        tensors |= {f"{prefix}.{part}": v for part, v in parts.items() if v is not None}
    return tensors | {PREFIX + wrapped(name, modules): v for name, v in saved.items()}


def canonical_keys(keys: SortedKeys, modules: Iterable[str]) -> dict[str, str]:
    """`{key as PEFT 0.21 writes it: key in the file}`."""
    parts = {f"{PREFIX}{m}.{p}": key for m, found in keys.parts.items() for p, key in found.items()}
    names = set(modules)
    parts |= {f"{PREFIX}{module}.{ROWS}": key for module, key in keys.rows.items()}
    return parts | {PREFIX + wrapped(name, names): key for name, key in keys.saved.items()}


def _part(match: re.Match[str]) -> str:
    return match["whole"] or match["magnitude"] or f"{match['factor']}.{match['kind']}"


def _add(
    found: dict[str, str], name: str, key: str, tensors: Mapping[str, Array], problems: Problems
) -> None:
    other = found.setdefault(name, key)
    if other != key and _content(tensors[other]) != _content(tensors[key]):
        problems.add(f"{key}: differs from {other}, which stands for the same tensor")


def _content(array: Array) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def _parameter(name: str) -> str:
    """The base model's own name of a parameter that is inside one of PEFT's wrappers."""
    name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return name.replace(".base_layer.", ".")


def wrapped(name: str, modules: Iterable[str]) -> str:
    owner, _, parameter = name.rpartition(".")
    return f"{owner}.base_layer.{parameter}" if owner in modules else name


def _module(
    name: str, parts: Mapping[str, Array], settings: Settings
) -> tuple[PeftModule | None, list[str]]:
    if ".base_layer." in name:
        return None, ["part of torch's MultiheadAttention, which stores several matrices as one"]
    embedding = not parts.keys().isdisjoint(_EMBEDDING)
    pair = _EMBEDDING if embedding else _LINEAR
    missing = [f"{part} is missing" for part in pair if part not in parts]
    if missing or (embedding and not parts.keys().isdisjoint((*_LINEAR, _BIAS))):
        return None, missing or ["has parts of an embedding and of a linear module"]
    module = PeftModule(
        a=parts[pair[0]],
        b=parts[pair[1]],
        rank=settings.ranks.of(name),
        alpha=settings.alphas.of(name),
        use_rslora=settings.use_rslora,
        magnitude=parts.get(_MAGNITUDE),
        bias=parts.get(_BIAS),
        embedding=embedding,
    )
    return module, [*_shape_problems(module), *_extra_problems(module, settings)]


def _experts(
    name: str, parts: Mapping[str, Array], settings: Settings
) -> tuple[PeftModule | None, list[str]]:
    if parts.keys() != {*_LINEAR} or settings.use_dora:
        return None, [f"has {sorted(parts)}, expected {_LINEAR} without DoRA for a parameter"]
    rank, alpha = settings.ranks.of(name), settings.alphas.of(name)
    factors = unstacked(parts[_LINEAR[0]], parts[_LINEAR[1]], rank)
    if isinstance(factors, str):
        return None, [factors]
    a, b = factors
    rslora = settings.use_rslora
    return PeftModule(a=a, b=b, rank=rank, alpha=alpha, use_rslora=rslora, experts=True), []


def _shape_problems(module: PeftModule) -> list[str]:
    a, b, rank = module.a, module.b, module.rank
    shapes = f"A and B of shapes {a.shape} and {b.shape}"
    allowed = (2,) if module.embedding else (2, 3, 4, 5)
    if a.ndim != b.ndim or a.ndim not in allowed or 0 in a.shape + b.shape:
        return [f"{shapes}, expected two factors (r, in) and (out, r)"]
    inner = b.shape[1]
    grouped = module.kind == "convolution" and rank % inner == 0
    if a.shape[0] != rank or (inner != rank and not grouped):
        return [f"{shapes}, expected factors of the rank {rank} that the config gives"]
    return [] if set(b.shape[2:]) <= {1} else [f"{shapes}, expected a kernel of size 1 in B"]


def _extra_problems(module: PeftModule, settings: Settings) -> list[str]:
    problems = []
    out, dora = module.b.shape[:1], settings.use_dora
    if (module.magnitude is not None) != dora:
        problems.append(f"{_MAGNITUDE} {_present(module.magnitude)}, although use_dora={dora}")
    elif module.magnitude is not None and (module.magnitude.size,) != out:
        problems.append(f"{_MAGNITUDE} of shape {module.magnitude.shape}, expected {out}")
    if (module.bias is not None) != (settings.lora_bias and not module.embedding):
        problems.append(f"{_BIAS} {_present(module.bias)}, although lora_bias={settings.lora_bias}")
    elif module.bias is not None and module.bias.shape != out:
        problems.append(f"{_BIAS} of shape {module.bias.shape}, expected {out}")
    return problems


def _present(tensor: Array | None) -> str:
    return "is missing" if tensor is None else "is present"
