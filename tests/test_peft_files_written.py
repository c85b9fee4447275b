"""Writing PEFT's files: what is refused, what stays, and what a failure leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support.peft_adapters import CONFIG, WEIGHTS, D, K, contents, module

from keras_lora.checks import AdapterFileError
from keras_lora.exchange.peft_files import (
    PeftModule,
    read_peft_adapter,
    write_peft_adapter,
)
from keras_lora.files.adapter_files import write_adapter_files


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
    with pytest.raises(AdapterFileError, match=f"{WEIGHTS}'.*Received: a link"):
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
        # The writer fails after the new tensors and before the new config.
        assert (name, call, alpha) == ("replace", 4, 5.0)


def test_left_over_temporary_files_go_and_others_stay(tmp_path: Path) -> None:
    left = [f".{name}.{'0a' * 16}.tmp" for name in (CONFIG, WEIGHTS, "README.md")]
    for name in [*left, ".other.tmp"]:
        (tmp_path / name).touch()
    write_peft_adapter(tmp_path, {"q": module()})
    assert set(contents(tmp_path)) == {CONFIG, WEIGHTS, "README.md", ".other.tmp"}
