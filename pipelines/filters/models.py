"""The filters that models decide: each looks at all pictures of a batch that got so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from pipelines.filters import scorers
from pipelines.filters.gauge import Gauge
from pipelines.filters.rules import ImageRules, PairRules
from pipelines.filters.scorers import Pixels
from pipelines.filters.signatures import Signer
from pipelines.outcome import Row, kept, settle, work_on

LOOKED = "looked"
"""Where a row holds its :class:`Looked` on its way through the models."""


@dataclass(frozen=True)
class Looked:
    """What is left of a record's pictures when they have passed what needs no model.

    Attributes:
        gauge: its measures.
        names: what its images are called in a sentence.
        views: its images as each model wants them, by the model's folder.
    """

    gauge: Gauge
    names: Sequence[str]
    views: dict[str, list[Pixels]]


@dataclass(frozen=True)
class Model:
    """A model that is asked about pictures.

    Attributes:
        folder: of its weights.
        load: gives the scorer, the same one each time.
        ask: what the scorer says of several views.
    """

    folder: str
    load: Callable[[], Any]
    ask: Callable[[Any, Sequence[Pixels]], Sequence[Any]]

    def said(self, rows: Sequence[Row]) -> list[list[Any] | Exception]:
        """What it says of the images of some records; where it cannot do with one, its error."""
        return self._said(self.load(), [row[LOOKED].views[self.folder] for row in rows])

    def _said(
        self, scorer: Any, records: Sequence[Sequence[Pixels]]
    ) -> list[list[Any] | Exception]:
        try:
            said = iter(self.ask(scorer, [view for views in records for view in views]))
            return [[next(said) for _ in views] for views in records]
        except Exception as error:
            if len(records) == 1:
                return [error]
            return [said for views in records for said in self._said(scorer, [views])]


@dataclass(frozen=True)
class ModelFilter:
    """A filter that a model decides.

    Attributes:
        measure: what it measures.
        model: which.
        check: holds what the model says of a record's images against the limits.
    """

    measure: str
    model: Model
    check: Callable[[Looked, list[Any]], None]


@dataclass(frozen=True)
class Models:
    """The models that records are shown to, in their order.

    Attributes:
        filters: they must pass these.
        embedding: what embeds them, for duplicates to be found by.
    """

    filters: Sequence[ModelFilter]
    embedding: Model | None

    @classmethod
    def of(cls, rules: ImageRules, signer: Signer | None) -> Models:
        """Those by the rules."""
        device = "cuda" if rules.gpus else "cpu"
        chosen = []
        if rules.nsfw_model:
            load: Any = partial(scorers.classifier, rules.nsfw_model, rules.nsfw_label, device)
            model = Model(rules.nsfw_model, load, scorers.Classifier.scores)
            said = f"is {rules.nsfw_label!r} with probability"
            chosen.append(ModelFilter("nsfw", model, partial(_check_each, "nsfw", said)))
        if rules.aesthetic_model and rules.aesthetic_head:
            load = partial(scorers.aesthetic, rules.aesthetic_model, rules.aesthetic_head, device)
            model = Model(rules.aesthetic_model, load, scorers.Aesthetic.scores)
            check = partial(_check_each, "aesthetic", "has an aesthetic score of")
            chosen.append(ModelFilter("aesthetic", model, check))
        if isinstance(rules, PairRules):
            for measure, folder in (("dino", rules.dino_model), ("clip", rules.clip_model)):
                if folder:
                    model = _embedding(folder, device)
                    chosen.append(ModelFilter(measure, model, partial(_check_pair, measure)))
        folder = signer.embedding_model if signer is not None else None
        embedding = _embedding(folder, device) if folder is not None else None
        return cls(chosen, embedding)

    def verdicts(
        self, rows: list[Row], stage: str, check: Callable[[Row], Row | None]
    ) -> list[Row]:
        """The same rows with what became of them.

        Args:
            rows: records.
            stage: what works on them.
            check: all that needs no model; what it gives for one that passes is from :meth:`look`.

        Raises:
            InputError: a model cannot be loaded; that is no fault of a record.
        """
        for model in (*(each.model for each in self.filters), self.embedding):
            if model is not None:
                model.load()
        work_on(rows, stage, check)
        self._decide(rows, stage)
        return rows

    def look(self, images: Sequence[Image.Image], names: Sequence[str], gauge: Gauge) -> Row:
        """Keep of a record's pictures what its models will look at; the rest can be let go."""
        wanted = [each.model for each in self.filters if gauge.wants(each.measure)]
        if self.embedding is not None:
            wanted.append(self.embedding)
        views = {model.folder: [model.load().view(image) for image in images] for model in wanted}
        return {LOOKED: Looked(gauge, names, views)}

    def _decide(self, rows: Sequence[Row], stage: str) -> None:
        """Reject what a model decides against, and embed what is kept."""
        for each in self.filters:
            wanted = [row for row in kept(rows) if row[LOOKED].gauge.wants(each.measure)]

            def check(row: Row, said: list[Any], each: ModelFilter = each) -> None:
                each.check(row[LOOKED], said)

            if wanted:
                settle(wanted, stage, each.model.said(wanted), check)
        if self.embedding is not None and (wanted := kept(rows)):
            settle(wanted, stage, self.embedding.said(wanted), _embedded)
        for row in rows:
            if looked := row.pop(LOOKED, None):
                row["measures"] = looked.gauge.measures


def _embedding(folder: str, device: str) -> Model:
    return Model(folder, partial(scorers.embedder, folder, device), scorers.Embedder.embed)


def _embedded(row: Row, said: list[Any]) -> Row:
    return {"embeddings": np.stack(said).astype(np.float16).tobytes()}


def _check_each(measure: str, is_said: str, looked: Looked, said: list[float]) -> None:
    for name, value in zip(looked.names, said, strict=True):
        looked.gauge.check(measure, value, f"{name} {is_said} {value:.2f}")


def _check_pair(measure: str, looked: Looked, said: list[Any]) -> None:
    similarity = float(said[0] @ said[1])
    looked.gauge.check(measure, similarity, f"{measure.upper()} similarity {similarity:.3f}")
