"""Write an adapter's directory as `PeftModel.save_pretrained` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from keras_lora.checks import given_path, invalid_file
from keras_lora.exchange.peft_files.card import CARD_FILE, default_card
from keras_lora.exchange.peft_files.config import DEFAULTS, parse_config, unknown_fields
from keras_lora.exchange.peft_files.naming import target_modules, value_and_pattern
from keras_lora.exchange.peft_files.reading import WEIGHTS_FILE, peft_error
from keras_lora.exchange.peft_files.tensors import (
    PREFIX,
    Array,
    PeftModule,
    build_modules,
    file_tensors,
    sort_keys,
    wrapped,
)
from keras_lora.exchange.peft_files.token_rows import (
    PeftTokens,
    read_tokens,
    token_indices,
    token_tensors,
)
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import CONFIG_FILE, TENSORS_FILE, PathLike
from keras_lora.files.atomic import leftovers, locked, new_files, temporary_path
from keras_lora.files.reading import (
    CODES,
    CONFIG_LIMIT,
    DTYPES,
    check_size,
    explained,
    key_problem,
)


def write_peft_adapter(
    directory: PathLike,
    modules: Mapping[str, PeftModule],
    saved: Mapping[str, Array] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    tokens: Mapping[str, PeftTokens] | None = None,
    all_modules: Sequence[str] | None = None,
    dtype: str | Mapping[str, str] = "float32",
    overwrite: bool = False,
    model_card: str | None = None,
) -> None:
    """Write an adapter that PEFT loads with `PeftModel.from_pretrained(base, directory)`.

    The config is renamed to its place last, since no program takes a directory without a config
    for an adapter. An old config that differs from the new one is renamed away first. So a
    process killed at any moment leaves the old adapter, the new one or, if killed between these
    renames, a directory without a config: never the tensors of one adapter under the config of
    the other.

    Args:
        directory: The directory to write; made, with its parents, if it does not exist. Other
            files in it stay.
        modules: The LoRA of each module, under the module's name in the Hugging Face model.
        saved: Parameters that replace parameters of the base, under their full names.
        config: Fields of PEFT's `LoraConfig` that do not follow from the tensors, such as
            `base_model_name_or_path`, `task_type`, `lora_dropout`, `bias`, `modules_to_save` and
            `fan_in_fan_out`. Fields that follow from the tensors are ignored, so the config
            of another adapter may be given.
        tokens: Rows that replace rows of embedding matrices, under the names of the embeddings.
        all_modules: The names of all modules of the base that `target_modules` could match, and of
            all parameters that `target_parameters` could. With
            them `target_modules` is a short list such as `["q_proj"]`; without them it has whole
            names.
        dtype: The dtype of the tensors in the file; or a dtype for each key, as in
            `PeftAdapter.dtypes`, with float32 for the keys that are left out.
        overwrite: Replace an adapter that the directory has.
        model_card: The text of `README.md`. By default a short text, or the file as it is where
            the directory has one.

    Raises:
        AdapterFileError: the tensors and fields could not be read again, the directory has an
            adapter and `overwrite` is false, or the system refuses.

    Example:

    >>> import tempfile
    >>> module = PeftModule(a=np.ones((2, 7)), b=np.ones((5, 2)), rank=2, alpha=8)
    >>> directory = tempfile.mkdtemp()
    >>> write_peft_adapter(directory, {"layers.0.q_proj": module}, all_modules=["layers.0.q_proj"])
    >>> sorted(p.name for p in Path(directory).iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    root = given_path(directory)
    tokens = tokens or {}
    tensors = _cast(root, file_tensors(modules, saved or {}) | token_tensors(tokens), dtype)
    fields = _fields(root, modules, config or {}, all_modules)
    fields["trainable_token_indices"] = token_indices(tokens)
    _check(root, fields, tensors, modules, saved or {})
    contents = {
        CARD_FILE: (default_card(fields) if model_card is None else model_card).encode(),
        WEIGHTS_FILE: save(tensors, {"format": "pt"}),
        CONFIG_FILE: _json(root, fields),
    }
    check_size(root / CONFIG_FILE, len(contents[CONFIG_FILE]), CONFIG_LIMIT)
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            _check_target(root, overwrite)
            if model_card is None and (root / CARD_FILE).exists():
                del contents[CARD_FILE]
            for file in leftovers(root, (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)):
                file.unlink()
            _replace(root, contents)


def _cast(
    root: Path, tensors: Mapping[str, Array], dtype: str | Mapping[str, str]
) -> dict[str, Array]:
    names = {k: dtype if isinstance(dtype, str) else dtype.get(k, "float32") for k in tensors}
    unknown = sorted({name for name in names.values() if name not in CODES})
    if unknown:
        raise peft_error(root, f"dtype {unknown}, expected some of {sorted(CODES)}")
    with np.errstate(over="ignore"):  # `_check` reports infinity, with the key
        return {
            key: np.asarray(tensor, dtype=DTYPES[CODES[names[key]]], order="C")
            for key, tensor in tensors.items()
        }


def _fields(
    root: Path,
    modules: Mapping[str, PeftModule],
    config: Mapping[str, Any],
    all_modules: Sequence[str] | None,
) -> dict[str, Any]:
    _check_fields(root, modules, config)
    experts = [name for name, module in modules.items() if module.experts]
    r, rank_pattern = value_and_pattern({n: int(m.rank) for n, m in modules.items()})
    alpha, alpha_pattern = value_and_pattern({n: _number(m.alpha) for n, m in modules.items()})
    return {
        **DEFAULTS,
        **{name: value for name, value in config.items() if name in DEFAULTS},
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules([n for n in modules if n not in experts], all_modules),
        "target_parameters": _listed(target_modules(experts, all_modules), experts),
        "use_rslora": any(m.use_rslora for m in modules.values()),
        "use_dora": any(m.magnitude is not None for m in modules.values()),
        "lora_bias": any(m.bias is not None for m in modules.values()),
        # `target_modules` makes these three superfluous.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }


def _listed(found: list[str] | str, names: list[str]) -> list[str] | None:
    """`target_parameters`, which is no expression."""
    return (names if isinstance(found, str) else found) or None


def _check_fields(root: Path, modules: Mapping[str, PeftModule], config: Mapping[str, Any]) -> None:
    problems = Problems()
    problems.add(*(f"{name}: no field of LoraConfig" for name in unknown_fields(config)))
    if not modules:
        problems.add("no modules")
    if len({module.use_rslora for module in modules.values()}) > 1:
        problems.add("use_rslora in some modules only, for which PEFT has no field")
    problems.raise_any(partial(peft_error, root))


def _json(root: Path, fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise peft_error(root, f"a config that JSON cannot express: {error}") from error


def _number(value: float) -> float:
    """A whole number as an `int`, as PEFT writes it."""
    return int(value) if float(value).is_integer() else float(value)


def _check(
    root: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Array],
    modules: Mapping[str, PeftModule],
    saved: Mapping[str, Array],
) -> None:
    """Read the fields and tensors as a reader of the files would, before anything is written."""
    problems = Problems()
    problems.add(*(f"{k!r}: {wrong}" for k in tensors if (wrong := key_problem(k))))
    problems.add(*(f"{k}: NaN or infinity" for k, t in tensors.items() if not _is_finite(t)))
    settings = parse_config(fields, problems)
    if settings is not None:
        keys = sort_keys(tensors, problems)
        problems.add(*(f"{key!r}: no name of a parameter" for key in keys.unknown))
        read = build_modules(keys, tensors, settings, problems)
        read_tokens(keys, tensors, settings.config, problems)
        expected = {PREFIX + wrapped(name, modules): name for name in saved}
        if {key: name for name, key in keys.saved.items()} != expected:
            problems.add(f"names in {sorted(saved)} that PEFT would take for other parameters")
        problems.add(*_other_scales(modules, read))
    problems.raise_any(partial(peft_error, root))


def _is_finite(tensor: Array) -> bool:
    return bool(np.isfinite(tensor).all())


def _other_scales(
    modules: Mapping[str, PeftModule], read: Mapping[str, PeftModule]
) -> Iterator[str]:
    for name, module in modules.items():
        found = read.get(name, module)
        if (found.rank, found.scaling) != (module.rank, module.scaling):
            yield f"{name}: would be read with another rank or scale"


def _check_target(root: Path, overwrite: bool) -> None:
    files = [root / name for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)]
    for file in files:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            received = "a link, directory or device"
            raise invalid_file(file, "a file, or nothing", received, "remove it")
    if (root / TENSORS_FILE).exists():
        received, fix = "an adapter of keras_lora itself", "write to another directory"
        raise invalid_file(root, "no other adapter in the directory", received, fix)
    if not overwrite and any(file.exists() for file in files[:2]):
        fix = "pass overwrite=True to replace the adapter"
        raise invalid_file(root, "no adapter in the directory", "an adapter", fix)


def _replace(root: Path, contents: Mapping[str, bytes]) -> None:
    config, old = root / CONFIG_FILE, temporary_path(root, CONFIG_FILE)
    with new_files(root, contents) as temporary:
        try:
            if config.exists() and config.read_bytes() != contents[CONFIG_FILE]:
                config.replace(old)
            for name, file in temporary.items():
                file.replace(root / name)
        finally:
            if old.exists() and temporary[WEIGHTS_FILE].exists():
                old.replace(config)
            old.unlink(missing_ok=True)
