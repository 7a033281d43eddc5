"""The part of a DIM that learns, as one module, and which cells its loss counts more."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from dim.model import DIM

# A cell counts as changed when source and target differ there by this share of the latents'
# own size (root mean square over channels). Decoders react to a cell's neighbours, so latents of
# an unchanged cell differ a little near an edit.
CHANGED_SHARE = 0.25


class Trainable(nn.Module):
    """Connector and painter, from hidden states to a velocity.

    It is the root of sharded training: all of its weights are used within ``forward``.

    Args:
        model: Its connector and painter are trained in place.
        token_multiple: Conditions are padded to a multiple of so many tokens, as far as the null
            table goes. Padding changes no number; compiled blocks meet fewer lengths.
    """

    def __init__(self, model: DIM, *, token_multiple: int = 1) -> None:
        super().__init__()
        self.connector = model.connector
        self.painter = model.painter
        self._token_multiple = token_multiple

    def forward(
        self,
        noisy_latent: torch.Tensor,
        timestep: torch.Tensor,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        source_latent: torch.Tensor | None,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity (B, C, h, w) that ``Painter`` gives, under the connected hidden states.

        ``dropped`` (B,) bool: these rows are painted under the null condition. A dropped row keeps
        its mask: its condition is the null table's first N rows. For the other shapes see
        ``Painter`` and ``Features``.
        """
        if padding := self._padding(mask.shape[1]):
            hidden_states = functional.pad(hidden_states, (0, 0, 0, padding))
            mask = functional.pad(mask, (0, padding))
        condition = self.painter.drop_condition(self.connector(hidden_states), dropped)
        return self.painter(noisy_latent, timestep, condition, mask, source_latent)

    def _padding(self, tokens: int) -> int:
        """Tokens to add to ``tokens``; the null table needs a row for each."""
        wanted = math.ceil(tokens / self._token_multiple) * self._token_multiple
        return max(0, min(wanted, len(self.painter.null_condition)) - tokens)


def changed_cells(
    latent: torch.Tensor, source_latent: torch.Tensor | None, weight: float
) -> torch.Tensor | None:
    """A weight map (B, 1, h, w) of mean 1 per row: changed cells count ``weight`` times more.

    ``None``, which counts all alike, where ``weight`` is 1 or there is no source.
    """
    if source_latent is None or weight == 1:
        return None
    difference = (latent - source_latent).square().mean(1, keepdim=True).sqrt()
    size = source_latent.square().mean((1, 2, 3), keepdim=True).sqrt()
    raw = torch.where(difference > CHANGED_SHARE * size, weight, 1.0)
    return raw / raw.mean((1, 2, 3), keepdim=True)
