"""DIM: the parts put together, editing and painting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from dim.blueprint import Blueprint
from dim.design import DesignRequest, Designs, Reply
from dim.errors import BlueprintError, CheckpointError, DesignerError, InputError
from dim.images import encode_png
from dim.model import parts, sampler
from dim.model.autoencoder import Autoencoder
from dim.model.checkpoint import folder
from dim.model.checkpoint.checks import require_choice
from dim.model.checkpoint.folder import Provenance
from dim.model.conditioner import Conditioner, Seen
from dim.model.config import Fit, ModelConfig
from dim.model.connector import Connector
from dim.model.painter import Painter
from dim.model.pictures import centre_crop, stretched, to_images, to_pixels, upright_rgb
from dim.model.request import OnStep, Progress, Row, Told, alike, batches, noise, one_each
from dim.model.sizes import Size, check_size, nearest_shape
from dim.model.understanding import Understanding

SELF: Literal["self"] = "self"


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

    @property
    def cell(self) -> int:
        """Pixels along each side of the painter's smallest piece; painted sizes are multiples."""
        return self.autoencoder.factor * self.painter.patch_size

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
        return Understanding(self.conditioner, self.config.understanding).design(
            images, instructions
        )

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        *,
        blueprints: Sequence[str | None] | None = None,
        designer: Designs | Literal["self"] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        fit: Fit | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> list[EditResult]:
        """Edit images.

        The painter follows a row's blueprint if one is given, else what the designer answers, else
        the instruction itself.

        Args:
            images: PIL images of any size and kind (see ``dim.model.pictures.upright_rgb``).
            instructions: one an image.
            blueprints: one an image, None where there is none.
            designer: such as ``dim.designers.create("openai:MODEL@URL")`` gives, or ``"self"``:
                this model's own understanding model.
            seeds: one an image; default is the configuration's for all.
            steps: default of the configuration.
            guidance_scale: for all or one an image; default of the configuration.
            negative_prompt: what to paint away from, for all or one an image (None where there is
                none); without it the learned null condition. Nothing at guidance 1.
            fit: ``"source"`` edits all of an image and gives it back at its own size (that of the
                upright image); ``"square"`` edits the middle square and gives it back at the
                configuration's resolution, as published. Default of the configuration.
            batch_size: images in one pass; the painter takes those of one size together. The
                result does not depend on it.
            on_step: called after each sampler step. What it raises ends the call.

        Returns:
            One result an image, in their order.

        Raises:
            InputError: counts differ, an empty text, an unreadable image, something that is no
                designer, or the painter is a text-to-image painter.
            DesignerError: the designer failed, or answered no blueprint.
        """
        if not self.painter.takes_source:
            raise InputError("this model's painter was made for text-to-image and cannot edit")
        fit = fit or self.config.sampling.fit
        require_choice("fit", fit, Fit)
        _require_designer(designer)
        sources = [upright_rgb(image, f"image {row + 1}") for row, image in enumerate(images)]
        rows = self._rows(
            sources,
            one_each(len(sources), "instructions", instructions, ""),
            [self._sizes(source, fit) for source in sources],
            blueprints=blueprints,
            seeds=seeds,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )
        return [
            result
            for batch in batches(rows, batch_size)
            for result in self._edit(batch, fit, designer, steps, on_step)
        ]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        seeds: Sequence[int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Paint images from texts.

        Args:
            prompts: one an image.
            size: (width, height) in pixels, each a multiple of ``cell``; default is a square of
                the configured resolution. ``dim.model.sizes.shapes`` holds those that SANA was
                trained on.
            seeds, steps, guidance_scale, negative_prompt, batch_size, on_step: as for ``edit``.

        Returns:
            One RGB image of ``size`` a prompt.

        Raises:
            InputError: an empty prompt, counts that differ, or a size that does not divide into
                cells.
        """
        resolution = self.config.sampling.resolution
        size = size or (resolution, resolution)
        check_size(size, self.cell)
        rows = self._rows(
            [None] * len(prompts),
            prompts,
            [(size, size)] * len(prompts),
            seeds=seeds,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )
        images: list[Image.Image] = []
        for batch in batches(rows, batch_size):
            told = self._told(batch, [row.text for row in batch])
            images += self._paint(batch, told, None, steps, on_step)
        return images

    def speed_up(self, *, compile: bool = False, channels_last: bool = False) -> DIM:
        """Trade start-up time or layout for faster painting, in place; the images stay the same.

        Args:
            compile: compile the painter's blocks (``torch.compile``): the first pass of each shape
                takes long.
            channels_last: keep the convolutions of painter and autoencoder channels last.

        Returns:
            This model. ``docs/model.md`` says how far the numbers move.
        """
        if channels_last:
            for part in (self.painter, self.autoencoder):
                # torch's annotations leave memory_format out
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            self.painter.compile_blocks()
        return self

    def _rows(
        self,
        images: Sequence[Image.Image | None],
        texts: Sequence[str],
        sizes: Sequence[tuple[Size, Size]],
        *,
        blueprints: Sequence[str | None] | None = None,
        seeds: Sequence[int] | None,
        guidance_scale: float | Sequence[float] | None,
        negative_prompt: str | Sequence[str | None] | None,
    ) -> list[Row]:
        count, sampling = len(images), self.config.sampling
        if isinstance(guidance_scale, int | float):
            guidance_scale = [float(guidance_scale)] * count
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * count
        rows = zip(
            images,
            texts,
            sizes,
            one_each(count, "blueprints", blueprints, None),
            one_each(count, "negative prompts", negative_prompt, None),
            one_each(count, "seeds", seeds, sampling.seed),
            one_each(count, "guidance scales", guidance_scale, sampling.guidance_scale),
            strict=True,
        )
        return [
            Row(number, image, text, blueprint, negative, seed, scale, *size)
            for number, (image, text, size, blueprint, negative, seed, scale) in enumerate(rows)
        ]

    def _sizes(self, source: Image.Image, fit: Fit) -> tuple[Size, Size]:
        """The size an edit of ``source`` is painted at, and the one it is given back at."""
        resolution = self.config.sampling.resolution
        if fit == "square":
            return (resolution, resolution), (resolution, resolution)
        return nearest_shape(source.size, resolution, self.cell), source.size

    def _edit(
        self,
        rows: Sequence[Row],
        fit: Fit,
        designer: Designs | Literal["self"] | None,
        steps: int | None,
        on_step: OnStep | None,
    ) -> list[EditResult]:
        sources = [row.image for row in rows if row.image is not None]
        seen = self.conditioner.see(sources)
        plans = self._plans(rows, seen, designer)
        texts = [row.text if plan is None else plan for plan, row in zip(plans, rows, strict=True)]
        told = self._told(rows, texts, seen)
        painted: dict[int, Image.Image] = {}
        for places in alike(rows):
            group = [rows[place] for place in places]
            source_latent = self._source_latent(group, fit)
            images = self._paint(group, told.select(places), source_latent, steps, on_step)
            painted |= zip(places, images, strict=True)
        return [EditResult(painted[place], plan) for place, plan in enumerate(plans)]

    def _source_latent(self, rows: Sequence[Row], fit: Fit) -> Tensor:
        """(B, C, h, w) float32 of sources that are painted at one size."""
        fitted = [
            centre_crop(row.image, row.size[0])
            if fit == "square"
            else stretched(row.image, row.size)
            for row in rows
            if row.image is not None
        ]
        return self.autoencoder.encode(to_pixels(fitted).to(self.device)).float()

    def _told(self, rows: Sequence[Row], texts: Sequence[str], seen: Seen | None = None) -> Told:
        """The rows' conditions from ``texts``, and those of their negative prompts.

        An edit's negative prompt is read with the source in view, as its prompt is. A row without
        one has an empty mask.
        """
        condition, mask = self.condition(texts, seen)
        places = [place for place, row in enumerate(rows) if row.negative is not None]
        if not places:
            return Told(condition, mask)
        some, some_mask = self.condition(
            [rows[place].negative or "" for place in places], seen and seen.select(places)
        )
        negative = some.new_zeros(len(rows), *some.shape[1:])
        negative_mask = some_mask.new_zeros(len(rows), *some_mask.shape[1:])
        negative[places], negative_mask[places] = some, some_mask
        return Told(condition, mask, negative, negative_mask)

    def _plans(
        self, rows: Sequence[Row], seen: Seen, designer: Designs | Literal["self"] | None
    ) -> list[str | None]:
        """What to paint from: the given blueprint, else the designer's, else None."""
        plans = [row.blueprint for row in rows]
        open_rows = [number for number, plan in enumerate(plans) if plan is None]
        if designer is None or not open_rows:
            return plans
        asked = [rows[number] for number in open_rows]
        if designer == SELF:
            told = [row.text for row in asked]
            answers: Sequence[Reply] = self.design(seen.select(open_rows), told)
        else:
            answers = _ask(designer, asked)
        for number, row, answer in zip(open_rows, asked, answers, strict=True):
            plans[number] = _blueprint(answer, row.text)
        return plans

    def _paint(
        self,
        rows: Sequence[Row],
        told: Told,
        source_latent: Tensor | None,
        steps: int | None,
        on_step: OnStep | None,
    ) -> list[Image.Image]:
        sampling = self.config.sampling
        steps = sampling.steps if steps is None else steps
        width, height = (side // self.autoencoder.factor for side in rows[0].size)
        shape = (self.painter.latent_channels, height, width)
        latent = sampler.sample(
            self.painter,
            torch.stack([noise(row.seed, shape) for row in rows]).to(self.device),
            told.condition,
            told.mask,
            source_latent=source_latent,
            steps=steps,
            guidance_scale=[row.guidance_scale for row in rows],
            shift=sampling.shift,
            solver=sampling.solver,
            negative_condition=told.negative,
            negative_mask=told.negative_mask,
            on_step=on_step and self._reporter(rows, steps, on_step),
        )
        return self._images(rows, latent)

    def _images(self, rows: Sequence[Row], latent: Tensor) -> list[Image.Image]:
        images = to_images(self.autoencoder.decode(latent))
        return [stretched(image, row.final_size) for image, row in zip(images, rows, strict=True)]

    def _reporter(
        self, rows: Sequence[Row], steps: int, on_step: OnStep
    ) -> Callable[[sampler.Step], None]:
        numbers = tuple(row.number for row in rows)

        def report(step: sampler.Step) -> None:
            previews = partial(self._images, rows, step.estimate)
            on_step(Progress(numbers, step.number + 1, steps, previews))

        return report

    def _present_config(self) -> ModelConfig:
        """The configuration with the sizes that training or widening may have changed."""
        painter = self.config.painter.model_copy(
            update={
                "source_latent": self.painter.takes_source,
                "null_condition_tokens": len(self.painter.null_condition),
            }
        )
        return self.config.model_copy(update={"painter": painter})


def _require_designer(designer: object) -> None:
    if designer is None or designer == SELF:
        return
    if isinstance(designer, str):
        given = repr(designer)
    elif isinstance(designer, type):
        given = f"the class {designer.__name__}"
    elif isinstance(designer, DIM):
        given = "a DIM, of which dim.designers.self_play.SelfDesigner makes one"
    elif callable(getattr(designer, "design", None)):
        return
    else:
        given = f"a {type(designer).__name__}"
    raise InputError(
        "designer must be 'self', None or a designer, such as dim.designers.create('oracle') "
        f"gives, not {given}"
    )


def _ask(designer: Designs, rows: Sequence[Row]) -> Sequence[Reply]:
    requests = [DesignRequest(row.text, encode_png(row.image)) for row in rows if row.image]
    answers = designer.design(requests)
    if len(answers) != len(requests):
        raise DesignerError(f"the designer answered {len(answers)} of {len(requests)} requests")
    return answers


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
