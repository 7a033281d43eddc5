"""Painting held-out samples during training: numbers, and a picture for the eye.

The samples are split over the workers, so none waits for another one's validation. The numbers
do not depend on how they were split.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw, ImageFont

from dim import tabletop
from dim.errors import InputError
from dim.features.encoder import CachedFeatures, Features
from dim.features.shards import TableSamples
from dim.learning.batch import Draws, draw
from dim.model import DIM, flow, sampler
from dim.model.pixels import to_images
from infra.samples import open_images
from training import parallel
from training.data import make_encoder
from training.stage import StageConfig, ValidationConfig

_CELL = 192  # pixels of an image in the picture
_TEXT_WIDTH = 360
_LINE = 12


@dataclass(frozen=True)
class Painted:
    """One validation sample after painting: images are RGB.

    ``exact`` and ``strict`` (see :class:`dim.tabletop.Judgement`) only where they are known.
    """

    number: int
    text: str
    images: tuple[Image.Image, ...]  # source (edits only), painted, target
    loss: float
    distance: float  # mean absolute difference to the target, 0 to 1
    exact: bool | None
    strict: bool | None = None


class Validation:
    """One worker's share of the held-out samples, their features computed once.

    Args:
        config: The stage, with its ``validation`` section.
        model: Painted with; its weights are whatever they are at the time of a call.
        table: All held-out rows, the same on every worker.
        rank, world_size: Which of them are this worker's.
    """

    def __init__(
        self, config: StageConfig, model: DIM, table: pa.Table, *, rank: int, world_size: int
    ) -> None:
        assert config.validation is not None
        self._config: ValidationConfig = config.validation
        self._seed = config.seed
        self._model = model
        self._schedule = flow.FlowSchedule(model.config.sampling.shift)
        self._numbers = list(range(rank, table.num_rows, world_size))
        self._table = table.take(pa.array(self._numbers, pa.int64()))
        self._text = config.validation_text
        self._encoder = make_encoder(config, model)
        self._features: CachedFeatures | None = None
        if self._numbers:
            self._features = CachedFeatures(
                self._encoder,
                TableSamples(self._table),
                [self._text],
                encode_batch=config.encode_batch,
                threads=config.cpus_per_worker,
            )
            for error in self._features.bad.values():
                raise error  # another sample in its place would make other numbers

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float], Image.Image] | None:
        """Paint and score. Every worker calls this; rank 0 gets the metrics and the picture.

        Metrics: ``validation_loss`` (flow matching, the same noise each time),
        ``validation_distance`` (mean absolute pixel difference to the target, 0 to 1) and, where
        the scenes are known, ``validation_exact`` (share painted exactly) and ``validation_strict``
        (share painted strictly so).
        """
        painted: list[Painted] = []
        for places in self._features.by_shape() if self._features else []:
            for first in range(0, len(places), self._config.batch_size):
                painted += self._paint(places[first : first + self._config.batch_size])
        everything = parallel.gather(painted)
        if everything is None:
            return None
        everything.sort(key=lambda sample: sample.number)
        return _summarise(everything), picture(everything[: self._config.grid_rows])

    def _paint(self, places: list[int]) -> list[Painted]:
        """Samples of one shape, by their places among this worker's."""
        assert self._features is not None
        batch = self._features.batch(np.array(places), np.zeros(len(places), np.int64))
        batch = batch.to(self._model.painter.null_condition.device)
        # A sample's noise depends on its number only: the split over workers changes nothing.
        draws = draw(
            self._seed,
            0,
            [self._numbers[place] for place in places],
            tuple(batch.latent.shape[1:]),  # type: ignore[arg-type]
            dropout=0.0,
        )
        losses, images = self._losses(batch, draws), self._images(batch, draws)
        return [
            self._score(place, image, loss)
            for place, image, loss in zip(places, images, losses, strict=True)
        ]

    def _losses(self, batch: Features, draws: Draws) -> list[float]:
        rows = flow.loss(
            self._model.painter,
            batch.latent,
            draws.noise.to(batch.latent.device),
            draws.index,
            self._model.connector(batch.hidden_states),
            batch.mask,
            source_latent=batch.source_latent,
            schedule=self._schedule,
        )
        return rows.tolist()

    def _images(self, batch: Features, draws: Draws) -> list[Image.Image]:
        latent = sampler.sample(
            self._model.painter,
            draws.noise.to(batch.latent.device),
            self._model.connector(batch.hidden_states),
            batch.mask,
            source_latent=batch.source_latent,
            steps=self._config.steps,
            guidance_scale=self._config.guidance_scale,
            shift=self._model.config.sampling.shift,
        )
        return to_images(self._model.autoencoder.decode(latent))

    def _score(self, place: int, image: Image.Image, loss: float) -> Painted:
        row = self._table.slice(place, 1).to_pylist()[0]
        target, source = self._encoder.cut(row)
        difference = np.abs(np.asarray(image, np.float32) - np.asarray(target, np.float32))
        return Painted(
            number=self._numbers[place],
            text=row[self._text],
            images=(image, target) if source is None else (source, image, target),
            loss=loss,
            distance=float(difference.mean()) / 255,
            **_judged(image, row.get("provenance")),
        )


def open_validation(
    config: StageConfig, model: DIM, rank: int, world_size: int
) -> Validation | None:
    """This worker's share of the stage's held-out samples, if it has any.

    Raises:
        DimError: a sample cannot be read.
    """
    if config.validation is None:
        return None
    table = read_validation(config)
    return Validation(config, model, table, rank=rank, world_size=world_size)


def read_validation(config: StageConfig) -> pa.Table:
    """The first ``validation.samples`` held-out rows, with their provenance where they have one.

    Raises:
        InputError: there are none, or a column is missing.
    """
    assert config.validation is not None
    images = open_images(config.validation.data, config.columns, every_file=False)
    count = min(images.rows, config.validation.samples)
    table, origin = images.read(np.arange(count)), images.head(count, "provenance")
    return table if origin is None else table.append_column("provenance", origin)


def picture(samples: Sequence[Painted]) -> Image.Image:
    """One row per sample: source | painted | target, and the text it was painted from."""
    columns = len(samples[0].images)
    sheet = Image.new("RGB", (columns * (_CELL + 4) + _TEXT_WIDTH, len(samples) * (_CELL + 4)))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_LINE - 2)
    for row, sample in enumerate(samples):
        top = row * (_CELL + 4)
        for column, image in enumerate(sample.images):
            longer = max(image.size)
            size = (image.width * _CELL // longer, image.height * _CELL // longer)
            resample = Image.Resampling.NEAREST if longer < _CELL else None
            sheet.paste(image.resize(size, resample), (column * (_CELL + 4), top))
        lines = [line for part in sample.text.splitlines() for line in textwrap.wrap(part, 64)]
        pen.multiline_text(
            (columns * (_CELL + 4) + 4, top + 2),
            "\n".join(lines[: _CELL // _LINE]),
            font=font,
            spacing=2,
            fill="white",
        )
    return sheet


def _summarise(samples: Sequence[Painted]) -> dict[str, float]:
    metrics = {
        "validation_loss": float(np.mean([sample.loss for sample in samples])),
        "validation_distance": float(np.mean([sample.distance for sample in samples])),
    }
    for name in ("exact", "strict"):
        judged = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if judged:
            metrics[f"validation_{name}"] = float(np.mean(judged))
    return metrics


def _judged(image: Image.Image, provenance: str | None) -> dict[str, bool | None]:
    """How well ``image`` shows the tabletop scene in ``provenance``; ``None``: it is not known."""
    scene = target_scene(provenance)
    if scene is None:
        return {"exact": None, "strict": None}
    source = _scene(provenance, "source_scene")
    judgement = tabletop.judge(image, scene, source)
    # Of an edit without its source nobody knows what should have stayed.
    known = source is not None or _scene(provenance, "target_scene") is None
    return {"exact": judgement.exact, "strict": judgement.strict if known else None}


def target_scene(provenance: str | None) -> tabletop.Scene | None:
    """The scene that a tabletop record's image to paint shows, or ``None`` for other records.

    Raises:
        InputError: the provenance is no JSON or its scene is none.
    """
    return _scene(provenance, "target_scene", "scene")


def _scene(provenance: str | None, *names: str) -> tabletop.Scene | None:
    if not provenance:
        return None
    try:
        origin = json.loads(provenance).get("tabletop")
    except (ValueError, AttributeError):
        raise InputError(f"a record's provenance is no JSON object: {provenance[:80]!r}") from None
    if not origin:
        return None
    scene = next((origin[name] for name in names if origin.get(name)), None)
    if scene is None:
        return None
    return tabletop.Scene.from_json(scene if isinstance(scene, str) else json.dumps(scene))
