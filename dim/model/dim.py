"""DIM: the parts put together, editing and painting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from dim.design import Designs, Reply
from dim.errors import CheckpointError, InputError
from dim.model import parts, plan
from dim.model.autoencoder import Autoencoder
from dim.model.checkpoint import folder
from dim.model.checkpoint.folder import Provenance
from dim.model.conditioner import Conditioner, ImageFeatures, OnText, Patches
from dim.model.config import Fit, ModelConfig, SamplingConfig, require_choice
from dim.model.connector import Connector
from dim.model.framing import centre_box, upright_rgb
from dim.model.lora.merge import merge_for_good
from dim.model.lora.rows import Adapters
from dim.model.paint import Painting, begin, encode_sources, paint
from dim.model.painter import Painter
from dim.model.quantize import quantize
from dim.model.request import (
    Conditioning,
    OnStep,
    Row,
    batches,
    by_size,
    make_rows,
    one_per_image,
)
from dim.model.sizes import Size, check_size, nearest_shape
from dim.model.understanding import Understanding


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
        self.adapters: Adapters | None = None
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
        self,
        texts: Sequence[str],
        images: Sequence[Image.Image | None] | ImageFeatures | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Conditions (B, N, features) and their mask (B, N) bool; see ``Conditioner.encode``."""
        hidden_states, mask = self.conditioner.encode(texts, images)
        return self.connector(hidden_states), mask

    @torch.no_grad()
    def design(
        self,
        images: Sequence[Image.Image] | ImageFeatures,
        instructions: Sequence[str],
        on_text: OnText | None = None,
    ) -> list[str]:
        """The understanding model's own answers to "write the blueprint of this edit", unchecked.

        ``on_text`` hears of them while they are written; see ``Conditioner.generate``.

        Raises:
            InputError: an instruction is empty, counts differ, or an image cannot be read.
        """
        return Understanding(self.conditioner, self.config.understanding).design(
            images, instructions, on_text
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
            images: PIL images of any size and kind (see ``dim.model.framing.upright_rgb``).
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
        fit = fit or self.config.sampling.fit
        plan.require_designer(designer)
        rows = self._edit_rows(
            images, instructions, fit, blueprints, seeds, guidance_scale, negative_prompt
        )
        sampling = self._sampling(steps)
        return [
            result
            for batch in batches(rows, batch_size)
            for result in self._edit(batch, fit, designer, sampling, on_step)
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
        rows = self._generation_rows(prompts, size, seeds, guidance_scale, negative_prompt)
        sampling = self._sampling(steps)
        return [
            image
            for batch in batches(rows, batch_size)
            for image in paint(
                self.painter,
                self.autoencoder,
                batch,
                self._conditioning(batch, [row.text for row in batch]),
                sampling,
                on_step=on_step,
            )
        ]

    @torch.no_grad()
    def begin_edit(
        self,
        image: Image.Image,
        text: str,
        *,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        fit: Fit | None = None,
        adapter: str | None = None,
    ) -> Painting:
        """Prepare one edit that others join and leave while it is painted.

        The source and ``text``, a blueprint or an instruction, are encoded here. The painting's
        ``denoising`` then goes through a ``dim.model.continuous.ContinuousBatch``, and becomes the
        image that ``edit`` paints of the same. ``adapter``: one of ``add_adapters``.

        Raises:
            InputError: as for ``edit``.
        """
        fit = fit or self.config.sampling.fit
        seeds = None if seed is None else [seed]
        with self._adapted(adapter):
            rows = self._edit_rows(
                [image], [text], fit, None, seeds, guidance_scale, negative_prompt
            )
            features = self.conditioner.see([self._shown(row, fit) for row in rows])
            return begin(
                self.painter,
                self.autoencoder,
                rows[0],
                self._conditioning(rows, [text], features),
                self._sampling(steps),
                source_latent=encode_sources(self.autoencoder, rows, fit),
                adapter=adapter,
            )

    @torch.no_grad()
    def begin_generation(
        self,
        prompt: str,
        *,
        size: Size | None = None,
        seed: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        adapter: str | None = None,
    ) -> Painting:
        """Prepare one image of ``generate`` as ``begin_edit`` does one of ``edit``.

        Raises:
            InputError: as for ``generate``.
        """
        seeds = None if seed is None else [seed]
        with self._adapted(adapter):
            rows = self._generation_rows([prompt], size, seeds, guidance_scale, negative_prompt)
            return begin(
                self.painter,
                self.autoencoder,
                rows[0],
                self._conditioning(rows, [prompt]),
                self._sampling(steps),
                adapter=adapter,
            )

    def add_adapters(self, specs: Mapping[str, str]) -> Adapters:
        """Load adapters that ``begin_edit`` and ``begin_generation`` choose by name.

        Args:
            specs: name → ``PATH[:WEIGHT]`` (``dim.model.lora``). They stay beside the weights, so
                that a batch may hold images of several; pass the result to ``ContinuousBatch``.

        Raises:
            CheckpointError, InputError: one is none of this model's.
        """
        self.adapters = Adapters(self, specs)
        return self.adapters

    def _adapted(self, name: str | None) -> AbstractContextManager[None]:
        if name is not None and self.adapters is None:
            raise InputError(f"no adapter {name!r}; there are none")
        return nullcontext() if self.adapters is None else self.adapters.using(name)

    def speed_up(
        self,
        *,
        compile: bool = False,
        channels_last: bool = False,
        int8: bool = False,
        step_cache: float = 0.0,
    ) -> DIM:
        """Trade start-up time, layout or exactness for faster or smaller painting, in place.

        Args:
            compile: compile the painter's blocks (``torch.compile``): the first pass of each shape
                takes long.
            channels_last: keep the convolutions of painter and autoencoder channels last.
            int8: keep the weights of the painter's linear layers in 8 bits (``torchao``). The last
                thing to do to a model: adapters are merged or added before.
            step_cache: a threshold such as 0.03, see ``dim.model.step_cache``.

        Returns:
            This model. ``docs/model.md`` says how far the numbers move: with the first two the
            images stay the same, with the others nearly.

        Raises:
            InputError: ``torchao`` is not installed, or the threshold is not from 0 to 1.
        """
        if step_cache:
            if not 0 < step_cache < 1:
                raise InputError(f"a step cache's threshold is from 0 to 1, not {step_cache:g}")
            sampling = self.config.sampling.model_copy(update={"step_cache": step_cache})
            self.config = self.config.model_copy(update={"sampling": sampling})
        if channels_last:
            for part in (self.painter, self.autoencoder):
                # torch's annotations leave memory_format out
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if int8:
            quantize(self.painter)
        if compile:
            self.painter.compile_blocks()
        return self

    def _edit_rows(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str],
        fit: Fit,
        blueprints: Sequence[str | None] | None,
        seeds: Sequence[int] | None,
        guidance_scale: float | Sequence[float] | None,
        negative_prompt: str | Sequence[str | None] | None,
    ) -> list[Row]:
        if not self.painter.takes_source:
            raise InputError("this model's painter was made for text-to-image and cannot edit")
        require_choice("fit", fit, Fit)
        sources = [upright_rgb(image, f"image {row + 1}") for row, image in enumerate(images)]
        return make_rows(
            self.config.sampling,
            sources,
            one_per_image(len(sources), "instructions", texts, ""),
            [self._sizes(source, fit) for source in sources],
            blueprints=blueprints,
            seeds=seeds,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )

    def _generation_rows(
        self,
        prompts: Sequence[str],
        size: Size | None,
        seeds: Sequence[int] | None,
        guidance_scale: float | Sequence[float] | None,
        negative_prompt: str | Sequence[str | None] | None,
    ) -> list[Row]:
        resolution = self.config.sampling.resolution
        size = size or (resolution, resolution)
        check_size(size, self.cell)
        return make_rows(
            self.config.sampling,
            [None] * len(prompts),
            prompts,
            [(size, size)] * len(prompts),
            seeds=seeds,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
        )

    def _sizes(self, source: Image.Image, fit: Fit) -> tuple[Size, Size]:
        """The size an edit of ``source`` is painted at, and the one it is given back at."""
        resolution = self.config.sampling.resolution
        if fit == "square":
            return (resolution, resolution), (resolution, resolution)
        return nearest_shape(source.size, resolution, self.cell), source.size

    def _shown(self, row: Row, fit: Fit) -> Image.Image | Patches | None:
        """What the understanding model sees of a row: see ``understanding.vlm_view``."""
        image = row.image
        if image is None or fit == "source" or self.config.understanding.vlm_view == "whole":
            return image
        return self.conditioner.patches(image, centre_box(image.size, row.size))

    def _sampling(self, steps: int | None) -> SamplingConfig:
        sampling = self.config.sampling
        return sampling if steps is None else sampling.model_copy(update={"steps": steps})

    def _edit(
        self,
        rows: Sequence[Row],
        fit: Fit,
        designer: Designs | Literal["self"] | None,
        sampling: SamplingConfig,
        on_step: OnStep | None,
    ) -> list[EditResult]:
        features = self.conditioner.see([self._shown(row, fit) for row in rows])
        blueprints = self._blueprints(rows, features, designer)
        texts = [
            row.text if blueprint is None else blueprint
            for blueprint, row in zip(blueprints, rows, strict=True)
        ]
        conditioning = self._conditioning(rows, texts, features)
        painted: dict[int, Image.Image] = {}
        for places in by_size(rows):
            group = [rows[place] for place in places]
            images = paint(
                self.painter,
                self.autoencoder,
                group,
                conditioning.select(places),
                sampling,
                source_latent=encode_sources(self.autoencoder, group, fit),
                on_step=on_step,
            )
            painted |= zip(places, images, strict=True)
        return [EditResult(painted[place], blueprint) for place, blueprint in enumerate(blueprints)]

    def _blueprints(
        self,
        rows: Sequence[Row],
        features: ImageFeatures,
        designer: Designs | Literal["self"] | None,
    ) -> list[str | None]:
        """What to paint from: the given blueprint, else the designer's, else None."""
        if designer is None:
            return [row.blueprint for row in rows]

        def answers(places: list[int]) -> Sequence[Reply]:
            asked = [rows[place] for place in places]
            if designer == plan.SELF:
                return self.design(features.select(places), [row.text for row in asked])
            return plan.ask(designer, asked)

        return plan.blueprints(rows, answers)

    def _conditioning(
        self, rows: Sequence[Row], texts: Sequence[str], features: ImageFeatures | None = None
    ) -> Conditioning:
        """The rows' conditions from ``texts``, and those of their negative prompts.

        An edit's negative prompt is read with the source in view, as its prompt is. A row without
        one has an empty mask.
        """
        condition, mask = self.condition(texts, features)
        places = [place for place, row in enumerate(rows) if row.negative is not None]
        if not places:
            return Conditioning(condition, mask)
        some, some_mask = self.condition(
            [rows[place].negative or "" for place in places], features and features.select(places)
        )
        negative = some.new_zeros(len(rows), *some.shape[1:])
        negative_mask = some_mask.new_zeros(len(rows), *some_mask.shape[1:])
        negative[places], negative_mask[places] = some, some_mask
        return Conditioning(condition, mask, negative, negative_mask)

    def _present_config(self) -> ModelConfig:
        """The configuration with the sizes that training or widening may have changed."""
        painter = self.config.painter.model_copy(
            update={
                "source_latent": self.painter.takes_source,
                "null_condition_tokens": len(self.painter.null_condition),
            }
        )
        return self.config.model_copy(update={"painter": painter})


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
    modules = parts.make(config, seed=seed, dtype=floating_type(dtype))
    dim = DIM(config, *modules, understanding_source=config.understanding.weights)
    return dim.to(device) if device is not None else dim


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    lora: Sequence[str] = (),
) -> DIM:
    """Read a folder that ``DIM.save`` wrote.

    Args:
        path: the folder.
        device: where to put the model, for example ``"cuda"``; default is the CPU.
        dtype: floating type such as ``torch.bfloat16`` or ``"bfloat16"``; default is as saved.
        lora: adapters to merge into the weights, ``PATH[:WEIGHT]`` each (``dim.model.lora``).

    Raises:
        CheckpointError: no such folder, not a DIM, incomplete or damaged; or an adapter is so, or
            is another model's.
        InputError: an adapter's weight is no number.
    """
    description, modules = folder.read(Path(path), floating_type(dtype))
    dim = DIM(
        description.config,
        *modules,
        understanding_source=description.understanding,
        provenance=description.provenance,
    )
    dim = dim.to(device) if device is not None else dim
    merge_for_good(dim, lora)
    return dim


def floating_type(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"{dtype!r} is no floating type of torch, such as 'bfloat16'")
    return found
