"""DIM: the parts put together, editing and painting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from dim.blueprint import Blueprint, request_prompt
from dim.errors import BlueprintError, CheckpointError, DesignerError, InputError
from dim.images import encode_png
from dim.model import folder, parts, sampler
from dim.model.autoencoder import Autoencoder
from dim.model.conditioner import Conditioner, Seen
from dim.model.config import INSTRUCTION, ModelConfig
from dim.model.connector import Connector
from dim.model.folder import Provenance
from dim.model.painter import Painter
from dim.model.pictures import to_images, upright_rgb

if TYPE_CHECKING:
    from dim.designers.base import Designer, Reply

SELF = "self"
T = TypeVar("T")


@dataclass(frozen=True)
class EditResult:
    """An edited image and the blueprint it was painted from (None: from the instruction)."""

    image: Image.Image
    blueprint: str | None


class DIM(nn.Module):
    """The frozen ``conditioner`` and ``autoencoder`` around the trained ``connector``, ``painter``.

    Made by ``build`` or ``load``. ``config`` is what it was made from, ``provenance`` the published
    checkpoint that it started from, if it did.
    """

    def __init__(
        self,
        config: ModelConfig,
        conditioner: Conditioner,
        connector: Connector,
        painter: Painter,
        autoencoder: Autoencoder,
        *,
        understanding_source: str | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(conditioner, connector, painter, autoencoder)
        self.config = config
        self.conditioner = conditioner
        self.connector = connector
        self.painter = painter
        self.autoencoder = autoencoder
        self.understanding_source = understanding_source
        self.provenance = provenance
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the painter is."""
        return self.painter.null_condition.device

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of connector and painter, the null table included."""
        yield from self.connector.parameters()
        yield from self.painter.parameters()

    def train(self, mode: bool = True) -> DIM:
        """Training mode for connector and painter; the frozen parts stay in evaluation mode."""
        super().train(False)
        self.connector.train(mode)
        self.painter.train(mode)
        return self

    def save(self, path: str | Path, understanding: str = "copy") -> None:
        """Write a folder that ``load`` reads, all of it or nothing.

        Args:
            path: the folder; an earlier DIM there is replaced.
            understanding: ``"copy"`` writes the understanding model too, ``"reference"`` only
                where it was loaded from.

        Raises:
            InputError: ``path`` holds something else, or there is nothing to refer to.
            CheckpointError: the disk refused.
        """
        if understanding not in ("copy", "reference"):
            raise InputError(f"understanding must be 'copy' or 'reference', not {understanding!r}")
        if understanding == "reference" and self.understanding_source is None:
            raise InputError(
                "a random understanding model was loaded from nowhere: save it with "
                "understanding='copy'"
            )
        folder.write(
            Path(path),
            self._present_config(),
            parts.Parts(self.conditioner, self.connector, self.painter, self.autoencoder),
            reference=self.understanding_source if understanding == "reference" else None,
            provenance=self.provenance,
        )

    def condition(
        self, texts: Sequence[str], images: Sequence[Image.Image | None] | Seen | None = None
    ) -> tuple[Tensor, Tensor]:
        """Conditions (B, N, features) and their mask (B, N) bool; see ``Conditioner.encode``."""
        hidden_states, mask = self.conditioner.encode(texts, images)
        return self.connector(hidden_states), mask

    @torch.no_grad()
    def design(
        self, images: Sequence[Image.Image] | Seen, instructions: Sequence[str]
    ) -> list[str]:
        """The understanding model's own answers to "write the blueprint of this edit", unchecked.

        Raises:
            InputError: an instruction is empty, counts differ, or an image cannot be read.
        """
        requests = [self._design_request(instruction) for instruction in instructions]
        return self.conditioner.generate(
            requests, images, self.config.understanding.design_max_new_tokens
        )

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        *,
        blueprints: Sequence[str | None] | None = None,
        designer: Designer | str | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        batch_size: int = 8,
    ) -> list[EditResult]:
        """Edit images.

        The painter follows a row's blueprint if one is given, else what the designer answers, else
        the instruction itself.

        Args:
            images: PIL images of any size; the middle square is edited.
            instructions: one an image.
            blueprints: one an image, None where there is none.
            designer: a designer, its specification (``openai:MODEL@URL``, …), or ``"self"``: this
                model's own understanding model.
            seeds: one an image; default is the configuration's for all.
            steps: default of the configuration.
            guidance_scale: for all or one an image; default of the configuration.
            batch_size: images in one pass. The result does not depend on it.

        Returns:
            One result an image, squares of the configuration's resolution.

        Raises:
            InputError: counts differ, an empty text, an unreadable image, or the painter is a
                text-to-image painter.
            DesignerError: the designer is unknown, failed, or answered no blueprint.
        """
        if not self.painter.takes_source:
            raise InputError("this model's painter was made for text-to-image and cannot edit")
        count = len(images)
        rows = [
            Row(upright_rgb(image, f"image {row + 1}"), instruction, blueprint, seed, scale)
            for row, (image, instruction, blueprint, seed, scale) in enumerate(
                zip(
                    images,
                    _one_each(count, "instructions", instructions, ""),
                    _one_each(count, "blueprints", blueprints, None),
                    _one_each(count, "seeds", seeds, self.config.sampling.seed),
                    self._scales(count, guidance_scale),
                    strict=True,
                )
            )
        ]
        batches = _batches(rows, batch_size)
        return [result for batch in batches for result in self._edit(batch, designer, steps)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        batch_size: int = 8,
    ) -> list[Image.Image]:
        """Paint images from texts.

        Args:
            prompts: one an image.
            size: (width, height) in pixels; default is a square of the configured resolution.
            seeds, steps, guidance_scale, batch_size: as for ``edit``.

        Returns:
            One RGB image of ``size`` a prompt.

        Raises:
            InputError: an empty prompt, counts that differ, or a size that does not divide into
                latent cells.
        """
        count = len(prompts)
        resolution = self.config.sampling.resolution
        size = size or (resolution, resolution)
        self.autoencoder.check_size(size)
        rows = [
            Row(None, prompt, None, seed, scale)
            for prompt, seed, scale in zip(
                prompts,
                _one_each(count, "seeds", seeds, self.config.sampling.seed),
                self._scales(count, guidance_scale),
                strict=True,
            )
        ]
        images: list[Image.Image] = []
        for batch in _batches(rows, batch_size):
            condition, mask = self.condition([row.instruction for row in batch])
            images += self._paint(batch, condition, mask, size, steps)
        return images

    def _edit(
        self, rows: Sequence[Row], designer: Designer | str | None, steps: int | None
    ) -> list[EditResult]:
        seen = self.conditioner.see([row.image for row in rows])
        plans = self._plans(rows, seen, designer)
        texts = [
            row.instruction if plan is None else plan for plan, row in zip(plans, rows, strict=True)
        ]
        condition, mask = self.condition(texts, seen)
        resolution = self.config.sampling.resolution
        pixels = torch.stack(
            [self.autoencoder.prepare(row.image, resolution) for row in rows if row.image]
        )
        source_latent = self.autoencoder.encode(pixels.to(self.device))
        painted = self._paint(rows, condition, mask, (resolution, resolution), steps, source_latent)
        return [EditResult(image, plan) for image, plan in zip(painted, plans, strict=True)]

    def _plans(
        self, rows: Sequence[Row], seen: Seen, designer: Designer | str | None
    ) -> list[str | None]:
        """What to paint from: the given blueprint, else the designer's, else None."""
        plans = [row.blueprint for row in rows]
        open_rows = [number for number, plan in enumerate(plans) if plan is None]
        if designer is None or not open_rows:
            return plans
        asked = [rows[number] for number in open_rows]
        if designer == SELF:
            told = [row.instruction for row in asked]
            answers: Sequence[Reply] = self.design(seen.select(open_rows), told)
        else:
            answers = _ask(designer, asked)
        for number, row, answer in zip(open_rows, asked, answers, strict=True):
            plans[number] = _blueprint(answer, row.instruction)
        return plans

    def _paint(
        self,
        rows: Sequence[Row],
        condition: Tensor,
        mask: Tensor,
        size: tuple[int, int],
        steps: int | None,
        source_latent: Tensor | None = None,
    ) -> list[Image.Image]:
        width, height = (side // self.autoencoder.factor for side in size)
        shape = (self.painter.latent_channels, height, width)
        latent = sampler.sample(
            self.painter,
            torch.stack([_noise(row.seed, shape) for row in rows]).to(self.device),
            condition,
            mask,
            source_latent=None if source_latent is None else source_latent.float(),
            steps=self.config.sampling.steps if steps is None else steps,
            guidance_scale=[row.guidance_scale for row in rows],
            shift=self.config.sampling.shift,
        )
        return to_images(self.autoencoder.decode(latent))

    def _design_request(self, instruction: str) -> str:
        if not instruction.strip():
            raise InputError("the instruction is empty")
        template = self.config.understanding.design_request
        if template is None:
            return request_prompt(instruction, with_target=False)
        return template.replace(INSTRUCTION, instruction)

    def _scales(self, count: int, scale: float | Sequence[float] | None) -> list[float]:
        if isinstance(scale, int | float):
            return [float(scale)] * count
        return _one_each(count, "guidance scales", scale, self.config.sampling.guidance_scale)

    def _present_config(self) -> ModelConfig:
        """The configuration with the sizes that training or widening may have changed."""
        painter = self.config.painter.model_copy(
            update={
                "source_latent": self.painter.takes_source,
                "null_condition_tokens": len(self.painter.null_condition),
            }
        )
        return self.config.model_copy(update={"painter": painter})


@dataclass(frozen=True)
class Row:
    """One image to be painted."""

    image: Image.Image | None
    instruction: str
    blueprint: str | None
    seed: int
    guidance_scale: float


def _one_each(count: int, name: str, values: Sequence[T] | None, default: T) -> list[T]:
    if values is None:
        return [default] * count
    if len(values) != count:
        raise InputError(f"{count} images came with {len(values)} {name}")
    return list(values)


def _batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    if not rows:
        raise InputError("there is nothing to paint")
    if size < 1:
        raise InputError(f"the batch size must be 1 or more, not {size}")
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """A sample's own noise, the same on every device and beside any neighbours."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ask(designer: Designer | str, rows: Sequence[Row]) -> Sequence[Reply]:
    # imported late: the designers' package imports the model for the one that is a model itself
    from dim.designers import DesignRequest, create

    maker = create(designer) if isinstance(designer, str) else designer
    requests = [DesignRequest(row.instruction, encode_png(row.image)) for row in rows if row.image]
    return maker.design(requests)


def _blueprint(answer: Reply, instruction: str) -> str:
    if not isinstance(answer, str):
        raise answer
    try:
        return Blueprint.parse(answer, instruction=instruction).render()
    except BlueprintError as error:
        raise DesignerError(
            f"the designer's answer to {instruction!r} is no blueprint: {error}"
        ) from None


def _check_sizes(
    conditioner: Conditioner, connector: Connector, painter: Painter, autoencoder: Autoencoder
) -> None:
    for name, given, taken in (
        ("the connector's input", conditioner.hidden_size, connector.in_features),
        ("the painter's condition", connector.out_features, painter.condition_features),
        ("the painter's latent", autoencoder.latent_channels, painter.latent_channels),
    ):
        if given != taken:
            raise CheckpointError(f"{name} has {taken} features, but gets {given}")


def build(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> DIM:
    """A DIM from a configuration such as ``configs/tiny.yaml``.

    Parts without weights are random, by ``seed`` alone.

    Raises:
        CheckpointError: weights are missing, damaged, or do not fit each other.
        ConfigError: an architecture is not one.
    """
    modules = parts.make(config, seed=seed, dtype=_dtype(dtype))
    dim = DIM(config, *modules, understanding_source=config.understanding.weights)
    return dim.to(device) if device is not None else dim


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> DIM:
    """Read a folder that ``DIM.save`` wrote.

    Args:
        path: the folder.
        device: where to put the model, for example ``"cuda"``; default is the CPU.
        dtype: floating type such as ``torch.bfloat16`` or ``"bfloat16"``; default is as saved.

    Raises:
        CheckpointError: no such folder, not a DIM, incomplete or damaged.
    """
    description, modules = folder.read(Path(path), _dtype(dtype))
    dim = DIM(
        description.config,
        *modules,
        understanding_source=description.understanding,
        provenance=description.provenance,
    )
    return dim.to(device) if device is not None else dim


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{dtype!r} is no floating type of torch, such as 'bfloat16'")
    return found
