"""Painting held-out samples during training: numbers, and a picture for the eye.

The samples are split over the workers, so none waits for another one's validation. The numbers
do not depend on how they were split.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw, ImageFont

from dim import judges
from dim.errors import DimError, InputError
from dim.failures import explain
from dim.features.encoder import CachedFeatures, Features
from dim.features.shards import TableSamples
from dim.judges import Judge
from dim.learning.batch import Draws, draw
from dim.learning.config import RESERVED_NAME
from dim.model import DIM, flow
from dim.model.config import SamplingConfig
from dim.model.paint import paint
from dim.model.request import Conditioning, make_rows
from infra.samples import open_images
from training import parallel
from training.data import make_encoder
from training.stage import AUTO_JUDGE, NO_JUDGE, StageConfig, ValidationConfig

_CELL = 192  # pixels of an image in the picture
_TEXT_WIDTH = 360
_LINE = 12
_OWN = frozenset({"loss", "distance", "unjudged"})  # metrics that are no judge's
_NAME = re.compile(r"[\w .:-]+")  # what MLflow takes, without the slash of parts


@dataclass(frozen=True)
class Painted:
    """One validation sample after painting: images are RGB, and there for the picture alone.

    ``scores`` are the judge's, ``None`` where it could not judge.
    """

    number: int
    text: str
    images: tuple[Image.Image, ...]  # source (edits only), painted, target; none if not shown
    loss: float
    quartile: int  # of the noise level that the loss is of, 0 to 3
    distance: float  # mean absolute difference to the target, 0 to 1
    scores: Mapping[str, float] | None = field(default_factory=dict)


class Validation:
    """One worker's share of the held-out samples, their features computed once.

    Args:
        config: The stage, with its ``validation`` section.
        model: Painted with; its weights are whatever they are at the time of a call.
        table: All held-out rows, the same on every worker.
        judge: Scores what is painted, by columns of ``table``; ``None``: nobody does.
        rank, world_size: Which of them are this worker's.

    Raises:
        DimError: a sample cannot be read, or the judge cannot even judge the first one's target.
    """

    def __init__(
        self,
        config: StageConfig,
        model: DIM,
        table: pa.Table,
        judge: Judge | None = None,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        assert config.validation is not None
        self._config: ValidationConfig = config.validation
        self._judge = judge
        self._sampling = _sampling(model, config.validation)
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
            self._try_judge()

    @torch.no_grad()
    def run(self) -> tuple[dict[str, float], Image.Image] | None:
        """Paint and score. Every worker calls this; rank 0 gets the metrics and the picture.

        Metrics: ``validation_loss`` (flow matching, the same noise and noise levels each time), the
        same of the samples in each quartile of the levels, ``validation_distance`` (mean absolute
        pixel difference to the target, 0 to 1) and the mean of each of the judge's scores, such as
        ``validation_exact``; ``validation_unjudged`` counts samples that it could not judge.
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
        losses, images = self._losses(batch, draws), self._images(batch, places)
        quartiles = flow.quartile_of(draws.index).tolist()
        return [
            self._score(place, image, loss, quartile)
            for place, image, loss, quartile in zip(places, images, losses, quartiles, strict=True)
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

    def _images(self, batch: Features, places: Sequence[int]) -> list[Image.Image]:
        """What ``dim edit --seed`` (the model's own seed + number) ``--fit square`` paints too."""
        model, sampling = self._model, self._sampling
        height, width = (int(side) * model.autoencoder.factor for side in batch.latent.shape[2:])
        rows = make_rows(
            sampling,
            [None] * len(places),
            [self._text] * len(places),
            [((width, height), (width, height))] * len(places),
            seeds=[sampling.seed + self._numbers[place] for place in places],
            guidance_scale=None,
            negative_prompt=None,
        )
        return paint(
            model.painter,
            model.autoencoder,
            rows,
            Conditioning(model.connector(batch.hidden_states), batch.mask),
            sampling,
            source_latent=batch.source_latent,
        )

    def _score(self, place: int, image: Image.Image, loss: float, quartile: int) -> Painted:
        row = self._table.slice(place, 1).to_pylist()[0]
        target, source = self._encoder.cut(row)
        difference = np.abs(np.asarray(image, np.float32) - np.asarray(target, np.float32))
        scores: Mapping[str, float] | None = None
        try:
            scores = self._judged(image, target, source, row)
        except InputError as error:  # hours of training are worth more than a score
            sys.stdout.write(f"validation: {error}\n")
        number = self._numbers[place]
        images = (image, target) if source is None else (source, image, target)
        return Painted(
            number=number,
            text=row[self._text],
            # Those of other samples would travel to the first worker for nothing.
            images=images if number < self._config.grid_rows else (),
            loss=loss,
            quartile=quartile,
            distance=float(difference.mean()) / 255,
            scores=scores,
        )

    def _judged(
        self,
        painted: Image.Image,
        target: Image.Image,
        source: Image.Image | None,
        row: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """The judge's scores of a sample.

        Raises:
            InputError: it has none; the message names the sample.
        """
        if self._judge is None:
            return {}
        asked = {name: row[name] for name in ("id", *self._judge.columns)}
        try:
            scores = {
                name: float(score)
                for name, score in self._judge.judge(painted, target, source, asked).items()
            }
        except Exception as error:  # a judge is anybody's code
            reason = str(error) if isinstance(error, DimError) else explain(error).sentence
            raise InputError(f"sample {row['id']} cannot be judged: {reason}") from error
        for name, score in scores.items():
            if name in _OWN or not _NAME.fullmatch(name):
                raise InputError(f"a judge's score cannot be called {name!r}")
            if not np.isfinite(score):
                raise InputError(f"sample {row['id']} cannot be judged: its {name} is {score}")
        return scores

    def _try_judge(self) -> None:
        """Have a target judged, so that what is wrong with the judge is known before training."""
        row = self._table.slice(0, 1).to_pylist()[0]
        target, source = self._encoder.cut(row)
        scores = self._judged(target, target, source, row)
        name = self._config.judge
        if not scores and name not in (AUTO_JUDGE, NO_JUDGE):
            raise InputError(f"validation.judge: {name} has no score for sample {row['id']}")


def open_validation(
    config: StageConfig, model: DIM, rank: int, world_size: int
) -> Validation | None:
    """This worker's share of the stage's held-out samples, if it has any.

    Raises:
        DimError: a sample cannot be read.
    """
    if config.validation is None:
        return None
    table, judge = read_validation(config)
    return Validation(config, model, table, judge, rank=rank, world_size=world_size)


def read_validation(config: StageConfig) -> tuple[pa.Table, Judge | None]:
    """The first ``validation.samples`` held-out rows, and who judges what is painted of them.

    Raises:
        ConfigError: there is no such judge.
        InputError: there are no rows, or a column is missing.
    """
    assert config.validation is not None
    images = open_images(config.validation.data, config.columns, every_file=False)
    count = min(images.rows, config.validation.samples)
    table = images.read(np.arange(count))
    name = config.validation.judge
    if name == NO_JUDGE:
        return table, None
    judge = judges.create("tabletop" if name == AUTO_JUDGE else name)
    for column in judge.columns:
        if column in table.column_names:
            continue
        values = images.head(count, column)
        if values is not None:
            table = table.append_column(column, values)
        elif name == AUTO_JUDGE:
            return table, None
        else:
            raise InputError(
                f"validation.judge: {name} needs the column {column!r}, which the held-out data "
                "do not have"
            )
    return table, judge


def _sampling(model: DIM, config: ValidationConfig) -> SamplingConfig:
    """The model's own, but for what the stage says."""
    given = {"steps": config.steps, "guidance_scale": config.guidance_scale}
    changes = {name: value for name, value in given.items() if value is not None}
    return model.config.sampling.model_copy(update=changes)


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
    metrics = {"loss": [sample.loss for sample in samples]}
    for number in range(flow.QUARTILES):
        metrics[f"loss/{RESERVED_NAME}{number + 1}"] = [
            sample.loss for sample in samples if sample.quartile == number
        ]
    metrics["distance"] = [sample.distance for sample in samples]
    for sample in samples:
        for name, score in (sample.scores or {}).items():
            metrics.setdefault(name, []).append(score)
    means = {f"validation_{name}": float(np.mean(each)) for name, each in metrics.items() if each}
    unjudged = sum(sample.scores is None for sample in samples)
    return means | ({"validation_unjudged": float(unjudged)} if unjudged else {})
