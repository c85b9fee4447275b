"""Regular expressions from a file of somebody else: each match ends soon, or it is refused."""

from __future__ import annotations

import re

import pytest

from keras_lora.exchange.peft_files.expressions import compiled

NAMES = [
    "model.layers.3.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.vision_tower.blocks.0.attn.proj",
    "lm_head",
    "transformer.h.5.attn.c_attn",
    f"{'a' * 60}!",
]
# As PEFT's users write them, and as PEFT and Unsloth do.
READ = [
    r".*\.layers\.\d+\.(q|v)_proj",
    r"^(?!.*vision).*(?:q_proj|k_proj|v_proj)$",
    r".*?\.[^.]*\.(?P<idx>\d+)\.",
    r"(?:^|.*?\.)layers\.(?P<idx>\d+)\.",
    r"(.*\.)?(layers\.3\.self_attn\.q_proj)$",
    r"(lm_head|model\.layers\.11\.mlp\.down_proj)",
    r"(?:model\.)?layers\.[3-9]\.[^(]*",
    r"[^]]*[*+)(]?lm_head",
    r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|down_proj)))",
]
REFUSED = [
    r"(a+)+b",
    r"(a|aa)+$",
    r"([a-z]+)*$",
    r"(?:(?:ab?)+)+c",
    r"((a?){20}){20}",
    r"(\w+\.)+$",
    ".*" * 7 + "x",
    "a?" * 30 + "a" * 30,
    "(a|a)" * 30 + "b",
    "(.|.)" * 27,
]


@pytest.mark.parametrize("expression", READ)
def test_what_people_write_matches_as_in_python(expression: str) -> None:
    for name in NAMES:
        ours, theirs = compiled(expression).match(name), re.match(expression, name)
        assert (ours and ours.span()) == (theirs and theirs.span())


@pytest.mark.parametrize("expression", REFUSED)
def test_what_could_take_forever_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="forever"):
        compiled(expression)


def test_what_is_no_expression_is_an_error_of_re() -> None:
    for expression in ("(a", "a)", "[a", "*a", "\\"):
        with pytest.raises(re.error):
            compiled(expression)
