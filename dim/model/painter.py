"""The painter: a SANA diffusion transformer that follows a condition and sees a source latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from dim.errors import InputError
from dim.model import step_cache
from dim.model.attention import (
    Attended,
    CrossAttention,
    LinearAttention,
    keys_and_values,
)
from dim.model.block import sampling_block
from dim.model.step_cache import StepCache

# The published network's query and key norms; diffusers' own 1e-5 moves outputs by 5e-5.
QK_NORM_EPS = 1e-6
# The tensor that sees the latents' channels.
PATCH_WEIGHT = "patch_embed.proj.weight"
# What diffusers adds to the attention score of a masked token: nothing is left of it after exp.
MASKED = -10000.0
# Lengths of conditions for which a block is compiled before torch gives up: all up to 8192 tokens
# in steps of 64. torch's own limit is 8.
_MOST_LENGTHS = 128
_STRIDES = 2  # the first block's input comes from the patches and lies otherwise than the others'
# Of fewer rows a CPU's libraries make products by other kernels, which round otherwise: an image's
# last bits would depend on how many are painted beside it.
_ENOUGH_ROWS = 4


def random_null_condition(rows: int, features: int) -> Tensor:
    """A null table (rows, features) to start from, drawn with torch's global generator."""
    return torch.randn(rows, features) / features**0.5


def resized_null_condition(table: Tensor, rows: int) -> Tensor:
    """``table`` (N, features) with ``rows`` rows: the first ones stay, new ones are random.

    New rows are drawn with torch's global generator, in the table's type.
    """
    kept = table[:rows]
    return torch.cat([kept, random_null_condition(rows - len(kept), table.shape[1]).to(kept)])


def widened(patch_weight: Tensor) -> Tensor:
    """A patch embedding's weight (width, C, p, p) for latents with a source's channels behind.

    Returns (width, 2 C, p, p): the weights for the noisy latent, then zeros for the source latent.
    """
    return torch.cat([patch_weight, torch.zeros_like(patch_weight)], dim=1)


@dataclass(frozen=True)
class PreparedCondition:
    """A condition as the network's blocks attend to it; see ``Painter.prepare`` and ``together``.

    ``latents``: how many latents it is for. ``spread``: (R,) int64, which of them each row of
    conditions is for; None where each row is for its own.
    """

    blocks: tuple[Attended, ...]
    latents: int
    spread: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of conditions."""
        return self.latents if self.spread is None else len(self.spread)


def together(conditions: Sequence[PreparedCondition]) -> PreparedCondition:
    """Prepared conditions, each for one latent, as those of a batch, latent after latent.

    They may be of different lengths and numbers of branches, and nothing is copied: each latent
    attends to its own tokens, as if it were alone.
    """
    if len(conditions) == 1:
        return conditions[0]
    blocks = zip(*(condition.blocks for condition in conditions), strict=True)
    branched = [condition.spread for condition in conditions if condition.spread is not None]
    spread = None
    if branched:
        rows = [number for number, one in enumerate(conditions) for _ in range(one.rows)]
        spread = torch.tensor(rows, device=branched[0].device)
    return PreparedCondition(tuple(blocks), len(conditions), spread)


class Painter(nn.Module):
    """diffusers' ``SanaTransformer2DModel`` with the two things that DIM adds.

    ``null_condition``: a learned table (rows, caption_channels); its first N rows stand for "no
    condition" of N tokens. ``source_latent``: an edit painter has twice the input channels and
    takes the source's latent behind the noisy one.

    ``integer_timesteps``: the published network saw timesteps with the fraction cut off; False
    feeds them as they are (for trainings of one's own).
    """

    def __init__(
        self,
        network: SanaTransformer2DModel,
        null_condition: Tensor,
        *,
        integer_timesteps: bool = True,
    ) -> None:
        super().__init__()
        channels = (network.config["in_channels"], network.config["out_channels"])
        if channels[0] not in (channels[1], 2 * channels[1]):
            raise InputError(
                f"a painter has as many input channels as output channels, or twice as many for "
                f"editing, not {channels[0]} for {channels[1]}"
            )
        if null_condition.ndim != 2 or null_condition.shape[1] != network.config.caption_channels:
            raise InputError(
                f"the null table must be (rows, {network.config.caption_channels}), "
                f"not {tuple(null_condition.shape)}"
            )
        for block in network.transformer_blocks:
            block.attn1.set_processor(LinearAttention())
            block.attn2.set_processor(CrossAttention())
            for attention in (block.attn1, block.attn2):
                for norm in (attention.norm_q, attention.norm_k):
                    if norm is not None:
                        norm.eps = QK_NORM_EPS
        self.network = network
        self.null_condition = nn.Parameter(null_condition)
        self.integer_timesteps = integer_timesteps
        self._sampling_block: Callable[..., Tensor] = sampling_block

    @property
    def blocks(self) -> nn.ModuleList:
        """The network's blocks, all of one kind and nearly all of its weights.

        They are what to wrap one by one for sharded training: ``fully_shard(block)`` for each,
        then ``fully_shard(painter)``.
        """
        return self.network.transformer_blocks

    @property
    def latent_channels(self) -> int:
        """Channels of one latent (the noisy one, the source, the velocity)."""
        return self.network.config["out_channels"]

    @property
    def patch_size(self) -> int:
        """Latent cells along each side of a token: what a latent's sides must be multiples of."""
        return self.network.config["patch_size"]

    @property
    def condition_features(self) -> int:
        """Features of one condition token."""
        return self.network.config["caption_channels"]

    @property
    def takes_source(self) -> bool:
        """True for an edit painter, whose input has the source latent's channels."""
        return self.network.config["in_channels"] == 2 * self.latent_channels

    def forward(
        self,
        noisy_latent: Tensor,
        timestep: Tensor | float,
        condition: Tensor | PreparedCondition,
        mask: Tensor | None = None,
        source_latent: Tensor | None = None,
        caches: Sequence[StepCache] | None = None,
    ) -> Tensor:
        """Velocity (noise − image) of ``noisy_latent``.

        Args:
            noisy_latent: (B, C, h, w).
            timestep: 0–1000, one number or (B,).
            condition: (B, N, condition_features), or what ``prepare`` made of conditions and
                their mask.
            mask: (B, N), true or 1 where a token counts; None counts all.
            source_latent: (B, C, h, w) for an edit painter; without it the painter sees zeros.
            caches: one a latent, with a prepared condition (``dim.model.step_cache``); without
                them every block is computed.

        Returns:
            (B, C, h, w) in the type of ``noisy_latent``; of a prepared condition (R, C, h, w), one
            for each of its rows.

        Raises:
            InputError: a shape does not fit, or a text-to-image painter got a source.
        """
        self._check_latents(noisy_latent, source_latent)
        latent = self._with_source(noisy_latent, source_latent).to(self._dtype)
        told = self._timestep(timestep, noisy_latent)
        if isinstance(condition, PreparedCondition):
            return self._prepared_forward(latent, told, condition, caches).to(noisy_latent.dtype)
        self._check_condition(condition, mask, len(noisy_latent))
        velocity = self.network(
            hidden_states=latent,
            encoder_hidden_states=condition.to(self._dtype),
            timestep=told,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return velocity.to(noisy_latent.dtype)

    def prepare(
        self, condition: Tensor, mask: Tensor | None = None, *, branches: int = 1
    ) -> PreparedCondition:
        """Compute once what every step of a sample would compute again from its condition.

        The caption projection, its norm, and every block's keys and values depend neither on the
        latent nor on the timestep. Pass the result to ``forward`` in place of the condition. It
        holds 2 · layers · R · N · width numbers.

        Args:
            condition: (R, N, condition_features).
            mask: (R, N), as ``forward`` takes it.
            branches: how many conditions each latent is painted under at once. The rows are the
                first condition of every latent, then the second of every latent, and so on.

        Raises:
            InputError: a shape does not fit.
        """
        rows = len(condition)
        if branches < 1 or rows % branches:
            raise InputError(f"{rows} conditions do not make {branches} branches")
        self._check_condition(condition, mask, rows)
        network = self.network
        states = network.caption_norm(network.caption_projection(condition.to(self._dtype)))
        bias = None
        # A bias of zeros would say nothing and keep attention from its fastest kernels.
        if mask is not None and not bool(mask.all()):
            bias = ((1 - mask.to(self._dtype)) * MASKED)[:, None, None, :]
        blocks = (keys_and_values(block.attn2, states, bias) for block in self.blocks)
        latents, spread = rows // branches, None
        if branches > 1:
            spread = torch.arange(latents, device=condition.device).repeat(branches)
        return PreparedCondition(tuple(blocks), latents, spread)

    def null(self, tokens: int) -> Tensor:
        """The condition (tokens, condition_features) that says nothing.

        Raises:
            InputError: the table has fewer rows.
        """
        if tokens > len(self.null_condition):
            raise InputError(
                f"a condition of {tokens} tokens needs as many rows in the painter's null table, "
                f"which has {len(self.null_condition)}"
            )
        return self.null_condition[:tokens]

    def drop_condition(self, condition: Tensor, drop: Tensor) -> Tensor:
        """``condition`` (B, N, F) with the rows marked in ``drop`` (B,) bool said to be nothing.

        Padding stays padding: the same mask holds before and after.
        """
        null = self.null(condition.shape[1]).to(condition.dtype)
        return torch.where(drop[:, None, None], null, condition)

    def widen(self) -> None:
        """Turn a text-to-image painter into an edit painter, in place.

        The patch embedding keeps its weights for the noisy latent and starts at zero for the
        source latent, so the velocity does not change until it is trained.

        Raises:
            InputError: the painter is an edit painter already.
        """
        if self.takes_source:
            raise InputError("the painter has a source latent's channels already")
        narrow = self.network.patch_embed.proj
        with torch.device("meta"):  # neither memory nor random numbers for weights that we set
            wide = nn.Conv2d(
                2 * narrow.in_channels, narrow.out_channels, narrow.kernel_size, narrow.stride
            )
        wide.weight = nn.Parameter(widened(narrow.weight.detach()))
        wide.bias = narrow.bias
        self.network.patch_embed.proj = wide
        self.network.register_to_config(in_channels=wide.in_channels)

    def resize_null_condition(self, rows: int) -> None:
        """Give the null table ``rows`` rows, in place: the first ones stay, new ones are random."""
        self.null_condition = nn.Parameter(
            resized_null_condition(self.null_condition.detach(), rows)
        )

    def checkpoint_gradients(self, on: bool = True) -> None:
        """Keep no block's inner states for the backward pass: computed again, the same numbers."""
        if on:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()

    def compile_blocks(self, *, shapes: int = 1, **options: Any) -> None:
        """Compile a block, for training and for sampling, in place.

        All blocks are of one kind, so one of them is compiled and serves for all but the first,
        whose input lies otherwise in memory and for which it is compiled again. In training it is
        compiled once more for every new shape, number of rows or of tokens, so there should be few:
        torch 2.13 compiles a backward pass wrongly in which the number of tokens is a symbol
        (seen: a second length works, the first one no longer). In sampling it becomes a symbol.

        Args:
            shapes: that latents have in training.
            options: as ``torch.compile`` takes them, such as ``mode`` or ``backend``.
        """
        limits, most = torch._dynamo.config, _STRIDES * shapes * _MOST_LENGTHS
        limits.recompile_limit = max(limits.recompile_limit, most)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most)
        for block in self.blocks:
            block.compile(**{"dynamic": False, **options})
        self._sampling_block = torch.compile(sampling_block, **options)

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.patch_embed.proj.weight.dtype

    def _prepared_forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        condition: PreparedCondition,
        caches: Sequence[StepCache] | None,
    ) -> Tensor:
        """diffusers' forward from the patches on, with ready keys and values for the blocks."""
        if condition.latents != len(latent):
            raise InputError(
                f"the condition was prepared for {condition.latents} rows, not {len(latent)}"
            )
        network, patch = self.network, self.patch_size
        height, width = (side // patch for side in latent.shape[2:])
        modulation, embedded = network.time_embed(
            _enough(timestep), batch_size=len(latent), hidden_dtype=latent.dtype
        )
        states = network.patch_embed(_enough(latent))[: len(latent)]
        modulation, embedded = modulation[: len(latent)], embedded[: len(latent)]
        spread, size = condition.spread, (height, width)
        first, *later = zip(self.blocks, condition.blocks, strict=True)
        before = states
        states = self._sampling_block(first[0], states, modulation, first[1], size, spread)
        if spread is not None:
            modulation, embedded, before = modulation[spread], embedded[spread], before[spread]

        def through_later(states: Tensor, chosen: Tensor | None = None) -> Tensor:
            told = modulation if chosen is None else modulation[chosen]
            for block, ready in later:
                ready = ready if chosen is None else step_cache.chosen_rows(ready, chosen)
                states = self._sampling_block(block, states, told, ready, size, None)
            return states

        if caches is None:
            states = through_later(states)
        else:
            rows = step_cache.rows_of(len(latent), spread, states)
            states = step_cache.through(caches, rows, before, states, through_later)
        states = network.proj_out(network.norm_out(states, embedded, network.scale_shift_table))
        cells = states.reshape(condition.rows, height, width, patch, patch, -1)
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _timestep(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        """(B,) float32. The fraction goes first: 249.99999999999994 is 250 in single precision."""
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, dtype=torch.float64)
        if self.integer_timesteps:
            timestep = timestep.trunc()
        timestep = timestep.to(like.device, torch.float32)
        return timestep.expand(len(like)) if timestep.ndim == 0 else timestep

    def _with_source(self, noisy_latent: Tensor, source_latent: Tensor | None) -> Tensor:
        if not self.takes_source:
            return noisy_latent
        if source_latent is None:
            source_latent = torch.zeros_like(noisy_latent)
        return torch.cat([noisy_latent, source_latent.to(noisy_latent)], dim=1)

    def _check_condition(self, condition: Tensor, mask: Tensor | None, rows: int) -> None:
        if condition.ndim != 3 or condition.shape[::2] != (rows, self.condition_features):
            raise InputError(
                f"the condition must be ({rows}, N, {self.condition_features}), "
                f"not {tuple(condition.shape)}"
            )
        if mask is not None and mask.shape != condition.shape[:2]:
            raise InputError(
                f"the mask must be {tuple(condition.shape[:2])}, not {tuple(mask.shape)}"
            )

    def _check_latents(self, noisy_latent: Tensor, source_latent: Tensor | None) -> None:
        if noisy_latent.ndim != 4 or noisy_latent.shape[1] != self.latent_channels:
            raise InputError(
                f"the noisy latent must be (B, {self.latent_channels}, h, w), "
                f"not {tuple(noisy_latent.shape)}"
            )
        if any(side % self.patch_size for side in noisy_latent.shape[2:]):
            raise InputError(
                f"the noisy latent's sides must be multiples of {self.patch_size}, "
                f"not {tuple(noisy_latent.shape[2:])}"
            )
        if source_latent is None:
            return
        if not self.takes_source:
            raise InputError("a text-to-image painter takes no source latent; widen it first")
        if source_latent.shape != noisy_latent.shape:
            raise InputError(
                f"the source latent must be {tuple(noisy_latent.shape)} like the noisy one, "
                f"not {tuple(source_latent.shape)}"
            )


def _enough(rows: Tensor) -> Tensor:
    """``rows`` (B, …), the last one repeated where there are fewer than ``_ENOUGH_ROWS``."""
    missing = _ENOUGH_ROWS - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
