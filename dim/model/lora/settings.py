"""What a stage's file says of an adapter to train."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from dim.config import StrictModel

Part = Literal["null_condition", "patch_embed", "connector"]


class LoraSettings(StrictModel):
    """An adapter: low-rank changes of some layers, and parts that are trained as a whole.

    ``targets``: layers of painter and connector, each by a dotted piece of its name: ``to_q`` is
    every query of self- and cross-attention, ``attn2.to_q`` those of cross-attention only,
    ``transformer_blocks.19`` a block's layers, ``connector`` both of the connector's.
    ``alpha``: the changes count ``alpha / rank``; null is ``rank``.
    ``train``: parts that are trained as they are, beside it.
    """

    rank: PositiveInt = 16  # of a change: rows of its A, columns of its B
    alpha: PositiveFloat | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)  # share of a layer's input that A does not see
    targets: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out", "connector"], min_length=1
    )
    train: list[Part] = Field(default=[])

    @field_validator("targets")
    @classmethod
    def _names(cls, targets: list[str]) -> list[str]:
        if any(not target.strip(".") for target in targets):
            raise ValueError("a target is a dotted piece of a layer's name, such as attn1.to_q")
        return targets

    @property
    def scaled_by(self) -> float:
        """peft's ``lora_alpha``."""
        return float(self.rank if self.alpha is None else self.alpha)
