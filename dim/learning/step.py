"""The part of a DIM that learns, as one module, and which cells its loss counts more."""

from __future__ import annotations

import torch
from torch import nn

from dim.model import DIM

# A cell counts as changed when source and target differ there by this share of the latents'
# own size (root mean square over channels). Decoders react to a cell's neighbours, so latents of
# an unchanged cell differ a little near an edit.
CHANGED_SHARE = 0.25


class Trainable(nn.Module):
    """Connector and painter, from hidden states to a velocity.

    Args:
        model: Its connector and painter are trained in place.
    """

    def __init__(self, model: DIM) -> None:
        super().__init__()
        self.connector = model.connector
        self.painter = model.painter

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
        condition = self.painter.drop_condition(self.connector(hidden_states), dropped)
        return self.painter(noisy_latent, timestep, condition, mask, source_latent)


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
