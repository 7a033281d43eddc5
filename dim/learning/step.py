"""The part of a DIM that learns, as one module: what a step computes."""

from __future__ import annotations

import torch
from torch import nn

from dim.model import DIM, flow

# A cell counts as changed when source and target differ there by this share of the latents'
# own size (root mean square over channels). Decoders react to a cell's neighbours, so latents of
# an unchanged cell differ a little near an edit.
CHANGED_SHARE = 0.25


class Trainable(nn.Module):
    """Connector and painter, from features to one loss per row.

    Args:
        model: Its connector and painter are trained in place.
        changed_cell_weight: How much more a changed cell of an edit counts; 1 = not more.
    """

    def __init__(self, model: DIM, changed_cell_weight: float = 1.0) -> None:
        super().__init__()
        self.connector = model.connector
        self.painter = model.painter
        self._changed_cell_weight = changed_cell_weight
        self._schedule = flow.FlowSchedule(model.config.sampling.shift)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        latent: torch.Tensor,
        source_latent: torch.Tensor | None,
        noise: torch.Tensor,
        index: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """The flow matching loss of each row, (B,); see ``Features`` and ``Draws`` for shapes.

        A dropped row keeps its mask: its condition is the null table's first N rows.
        """
        condition = self.painter.drop_condition(self.connector(hidden_states), dropped)
        weight = None
        if source_latent is not None and self._changed_cell_weight != 1:
            weight = changed_cells(latent, source_latent, self._changed_cell_weight)
        return flow.loss(
            self.painter,
            latent,
            noise,
            index,
            condition,
            mask,
            source_latent=source_latent,
            weight=weight,
            schedule=self._schedule,
        )


def changed_cells(latent: torch.Tensor, source_latent: torch.Tensor, weight: float) -> torch.Tensor:
    """A weight map (B, 1, h, w) of mean 1 per row: changed cells count ``weight`` times more."""
    difference = (latent - source_latent).square().mean(1, keepdim=True).sqrt()
    size = source_latent.square().mean((1, 2, 3), keepdim=True).sqrt()
    raw = torch.where(difference > CHANGED_SHARE * size, weight, 1.0)
    return raw / raw.mean((1, 2, 3), keepdim=True)
