"""`AdapterSpec`: rank, scale and options of one adapter on one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras_lora.checks import check_alpha, check_rank, check_tokens, invalid, is_flag, is_number
from keras_lora.initializers import start_of
from keras_lora.lowrank.equations import scaling
from keras_lora.plain_values import make_plain, to_write

DEFAULT_INIT = "kaiming_uniform"

# Fields that version 0.1.0 does not know. At their defaults no file has them: 0.1.0 reads it then.
_LATER_FIELDS = ("freeze_a", "train_tokens")


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Rank, scale and options of one adapter on one layer.

    `h = x W0 + s (drop(x) A) B` with `s = alpha / rank` (`alpha / sqrt(rank)` for rsLoRA).

    Args:
        rank: Inner size of `A B`; a positive integer.
        alpha: Numerator of the scale `s`; a finite number.
        dropout: Probability with which an input of the adapter is zeroed while training, in
            `[0, 1)`. The frozen kernel's own input is not dropped. An embedding adapter has no
            dropout, as in PEFT, since it is fed token ids.
        use_rslora: Divide by `sqrt(rank)` instead of `rank`.
        use_dora: Also train a magnitude `m` of each output, which starts at `|W0|`:
            `W = m (W0 + s A B) / |W0 + s A B|`.
        init: How `A` and `B` start. A fresh adapter changes nothing, and `W0` never changes.

            - `"kaiming_uniform"`: `A` uniform within `±1/sqrt(d)` for `d` inputs (as PEFT does),
              `B` zero; `"gaussian"`: `A` normal with standard deviation `1/rank`, `B` zero. An
              embedding adapter has its own start instead: `A` zero and `B` standard normal.
            - `"orthogonal"`: both random, with `A B = 0`.
            - `"pissa"`: the principal part of `W0`, `s A0 B0 = U_r S_r V_r^T`; `"pissa:4"` by a
              randomised SVD with 4 power iterations. `"olora"`: orthonormal `B0` from the QR
              decomposition of `W0`. Both need a positive `alpha`, and compute with
              `s (A B - A0 B0)`, where `A0` and `B0` are frozen copies.
            - `"eva"`: `A` along the directions in which the layer's inputs vary most, `B` zero;
              `"lora_ga"`: both along the gradient of `W0`, with frozen copies. They need
              `apply_lora(model, config, data=batches)`, and adapt linear layers alone.
            - `"loftq"`: the best correction of a quantized `W0`, by
              `apply_lora(model, config, data=float_model)`. A fresh adapter is then nearer to
              that model than its base is, and differs from its base.

        freeze_a: Train `B` alone (LoRA-FA): `A` stays as it starts, and has no gradient, for which
            the inputs of the layer would be kept. Not for embeddings, whose `A` starts at zero.
        train_tokens: Tokens of an embedding whose rows train in full, as values of the adapter; in
            sorted order. Beside them the rank may be 0: there is no `A B` then.

    Raises:
        ValueError: a value outside the above.

    Example:

    >>> AdapterSpec(rank=4, alpha=8).scaling
    2.0

    References: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA),
    https://arxiv.org/abs/2312.03732; Liu et al. 2024 (DoRA), https://arxiv.org/abs/2402.09353;
    Zhang et al. 2023 (LoRA-FA), https://arxiv.org/abs/2308.03303.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = DEFAULT_INIT
    freeze_a: bool = False
    train_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_tokens", check_tokens(self.train_tokens))
        if self.rank != 0 or not self.train_tokens:
            check_rank(self.rank)
        check_alpha(self.alpha)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise invalid("dropout", "a number in [0, 1)", self.dropout, "try dropout=0.05")
        for name in ("use_rslora", "use_dora", "freeze_a"):
            if not is_flag(getattr(self, name)):
                raise invalid(name, "True or False", getattr(self, name))
        start_of(self.init)
        make_plain(self)

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank or 1, self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which JSON can contain."""
        return to_write(self, _LATER_FIELDS)

    @property
    def has_counterpart(self) -> bool:
        """Whether `A0 B0`, with which the adapter begins, is taken off again."""
        return start_of(self.init).has_counterpart
