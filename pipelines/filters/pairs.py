"""Which edit pairs are worth a designer's time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from dim import records
from pipelines.filters import measures
from pipelines.filters.gauge import Gauge
from pipelines.filters.images import STAGE, check_content, open_checked
from pipelines.filters.models import Models
from pipelines.filters.rules import PairRules
from pipelines.filters.signatures import Signer
from pipelines.outcome import Rejection, Row, failed, to_rows, to_table


@dataclass(frozen=True)
class FilterPairs:
    """Keep the pairs whose images decode, meet the rules, and differ by an edit.

    Args:
        rules: the thresholds.
        signer: also note what near duplicates are found by.
    """

    rules: PairRules
    signer: Signer | None = None
    schema: ClassVar[pa.Schema] = records.RAW_PAIR

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw pairs in, the same with outcomes out."""
        return to_table(self.verdicts(batch), self.schema)

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """A record that the filters do not survive, as a failed one."""
        return to_table(failed(record, STAGE, why), self.schema)

    def verdicts(self, batch: pa.Table) -> list[Row]:
        """The rows of a batch with their outcomes, measures and signatures."""
        models = Models.of(self.rules, self.signer)
        return models.verdicts(to_rows(batch), STAGE, partial(self._check, models))

    def _check(self, models: Models, row: Row) -> Row:
        if not (row["instruction"] or "").strip():
            raise Rejection("pair.no_instruction", "the instruction is empty")
        if row["image_hash"] == row["image_target_hash"]:
            raise Rejection("pair.unchanged", "source and target are the same file", 0.0)
        rules = self.rules.of(row["source"])
        gauge = Gauge(rules)
        try:
            source = open_checked(row["image"], "the source", gauge, rules)
            target = open_checked(row["image_target"], "the target", gauge, rules)
            check_pair(source, target, gauge, rules)
            check_content(source, "the source", gauge, rules)
            check_content(target, "the target", gauge, rules)
        finally:
            row["measures"] = gauge.measures
        signature = self.signer.sign_pair(row["instruction"], source, target) if self.signer else {}
        return {**signature, **models.look([source, target], ["the source", "the target"], gauge)}


def check_pair(source: Image.Image, target: Image.Image, gauge: Gauge, rules: PairRules) -> None:
    """Compare the pixels of two decoded images, each rule at its own common size.

    Raises:
        Rejection: ``pair.size_mismatch``, ``.unchanged``, ``.changed_too_much``, ``.shifted`` or
            ``.ssim_low``.
    """
    change = abs(source.width * target.height / (source.height * target.width) - 1)
    sizes = f"{source.width} x {source.height} and {target.width} x {target.height} px"
    gauge.check("aspect_change", change, sizes)
    before, after = measures.at_common_size(source, target, rules.change_side)
    changed = measures.changed_share(np.asarray(before), np.asarray(after))
    gauge.check("changed", changed, f"{changed:.2%} of the pixels change")
    before, after = before.convert("L"), after.convert("L")
    if gauge.wants("shift"):
        shift = measures.global_shift(measures.grey(before), measures.grey(after))
        gauge.check("shift", shift, f"the picture has moved by {shift:.1%} of its longer side")
    if gauge.wants("ssim"):
        small = measures.at_common_size(before, after, rules.ssim_side)
        similarity = measures.ssim(*map(measures.grey, small))
        gauge.check("ssim", similarity, f"structural similarity {similarity:.3f}")
