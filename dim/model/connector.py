"""The connector: from the understanding model's hidden states to the painter's conditions."""

from __future__ import annotations

from torch import Tensor, nn

from dim.errors import InputError


class Connector(nn.Sequential):
    """Linear, GELU, Linear on every token.

    Call with ``hidden_states`` (B, N, in_features); returns the condition (B, N, out_features) in
    the same floating type. A layer's names are those of the published projector: ``0``, ``2``.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features)
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[-1] != self.in_features:
            raise InputError(
                f"the connector takes {self.in_features} features a token, "
                f"not {hidden_states.shape[-1]}"
            )
        weight = next(self.parameters())
        return super().forward(hidden_states.to(weight.dtype))
