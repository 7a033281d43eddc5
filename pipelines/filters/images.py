"""Which single images are worth a captioner's time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pyarrow as pa
from PIL import Image

from dim import records
from dim.errors import InputError
from dim.images import decode_image
from pipelines.filters import measures
from pipelines.filters.gauge import Gauge
from pipelines.filters.models import Models
from pipelines.filters.rules import ImageRules
from pipelines.filters.signatures import Signer
from pipelines.outcome import Rejection, Row, failed, to_rows, to_table
from pipelines.probe import probe

STAGE = "filter"


@dataclass(frozen=True)
class FilterImages:
    """Keep the single images that decode completely and meet the rules.

    Args:
        rules: the thresholds.
        signer: also note what near duplicates are found by.
    """

    rules: ImageRules
    signer: Signer | None = None
    schema: ClassVar[pa.Schema] = records.RAW_IMAGE

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw images in, the same with outcomes out."""
        return to_table(self.verdicts(batch), self.schema)

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """A record that the filters do not survive, as a failed one."""
        return to_table(failed(record, STAGE, why), self.schema)

    def verdicts(self, batch: pa.Table) -> list[Row]:
        """The rows of a batch with their outcomes, measures and signatures."""
        models = Models.of(self.rules, self.signer)
        return models.verdicts(to_rows(batch), STAGE, partial(self._check, models))

    def _check(self, models: Models, row: Row) -> Row:
        gauge = Gauge(self.rules)
        try:
            image = open_checked(row["image"], "the image", gauge, self.rules)
            check_content(image, "the image", gauge, self.rules)
        finally:
            row["measures"] = gauge.measures
        signature = self.signer.sign_image(image) if self.signer else {}
        return {**signature, **models.look([image], ["the image"], gauge)}


def open_checked(image: bytes, name: str, gauge: Gauge, rules: ImageRules) -> Image.Image:
    """``image`` decoded (upright RGB), its header checked against the rules first.

    Raises:
        Rejection: ``image.undecodable``, ``.too_large``, ``.too_small`` or ``.aspect``.
    """
    width, height = probe(image, name)
    size = f"{name} is {width} x {height} px"
    gauge.check("pixels", width * height, size)
    gauge.check("side", min(width, height), size)
    gauge.check("aspect", max(width, height) / min(width, height), size)
    try:
        return decode_image(image, name=name, max_pixels=rules.max_pixels)
    except InputError as error:
        raise Rejection("image.undecodable", str(error)) from None


def check_content(image: Image.Image, name: str, gauge: Gauge, rules: ImageRules) -> None:
    """What a decoded image shows, the cheap measures first.

    Raises:
        Rejection: ``image.blank``, ``.blurred`` or ``.text``.
    """
    if not any(map(gauge.wants, ("entropy", "sharpness", "text_area"))):
        return
    shades = image.convert("L")  # a third of what there is to be scaled
    if gauge.wants("entropy"):
        value = measures.entropy(shades)
        gauge.check("entropy", value, f"{name} has an entropy of {value:.2f} bits")
    if gauge.wants("sharpness") or gauge.wants("text_area"):
        luma = measures.levels(measures.scaled(shades, rules.detail_side))
        if gauge.wants("sharpness"):
            value = measures.sharpness(luma)
            said = f"{name} has a variance of the Laplacian of {value:.2g}"
            gauge.check("sharpness", value, said)
        if gauge.wants("text_area"):
            value = measures.text_area(luma)
            gauge.check("text_area", value, f"{value:.0%} of {name} look like text")
