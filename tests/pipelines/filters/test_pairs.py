from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dim import records
from pipelines.filters import (
    FilterPairs,
    PairRules,
    PairThresholds,
    check_pair,
    open_checked,
)
from pipelines.filters.gauge import Gauge
from pipelines.filters.measures import changed_share, grey, ssim
from pipelines.outcome import Rejection, to_table
from pipelines.probe import probe
from pipelines.readers.records import image_columns, pair_columns
from tests.pipelines.samples import bomb, edited, encoded, photo

RULES = PairRules(min_side=32)
LOOSE = PairRules(min_side=32, min_sharpness=None)


def rejection(action: Any, *args: Any) -> Rejection:
    with pytest.raises(Rejection) as caught:
        action(*args)
    return caught.value


def pairs(*images: tuple[bytes, bytes], instruction: str | None = "Add a box.") -> pa.Table:
    """Raw pairs as ingest would have made them, but for headers it would have refused."""
    rows = []
    for index, (image, target) in enumerate(images):
        row = {
            "id": str(index),
            "index": index,
            "source": "test",
            "instruction": instruction,
            "image": image,
            "image_target": target,
            "image_hash": records.sha256_hex(image),
            "image_target_hash": records.sha256_hex(target),
        }
        rows.append(row)
    return to_table(rows, records.RAW_PAIR).select(records.RAW_PAIR.names)


def outcomes(table: pa.Table) -> list[str | None]:
    return [row["reason"] or row["outcome"] for row in table.to_pylist()]


def test_pairs_get_their_outcomes_in_one_pass() -> None:
    source = photo(1)
    good, target = encoded(source), encoded(edited(source))
    small = encoded(photo(1, (20, 20)))
    jpeg = encoded(source, "JPEG")
    turned = encoded(edited(source).transpose(Image.Transpose.ROTATE_90))
    batch = pairs(
        (good, target),
        (b"no image", target),
        (good, b""),
        (jpeg[: len(jpeg) // 2], target),
        (small, small + b" "),
        (bomb(), target),
        (encoded(photo(1, (400, 40))), target),
        (good, turned),
        (good, good),
        (good, encoded(source, "BMP")),
        (good, encoded(photo(1).transpose(Image.Transpose.FLIP_TOP_BOTTOM))),
    )
    result = FilterPairs(RULES.model_copy(update={"min_ssim": 0.3}))(batch)
    assert outcomes(result) == [
        "kept",
        "image.undecodable",
        "image.undecodable",
        "image.undecodable",
        "image.too_small",
        "image.too_large",
        "image.aspect",
        "pair.size_mismatch",
        "pair.unchanged",
        "pair.unchanged",
        "pair.ssim_low",
    ]
    kept, *others = result.to_pylist()
    assert kept["image"] == good and kept["image_target"] == target
    assert all(row["image"] is None and row["image_target"] is None for row in others)
    assert all(row["detail"] for row in others)
    small_row = result.to_pylist()[4]
    assert (small_row["value"], small_row["threshold"]) == (20.0, 32.0)


def test_a_pair_without_an_instruction_is_rejected() -> None:
    source = photo(1)
    batch = pairs((encoded(source), encoded(edited(source))), instruction=" ")
    assert outcomes(FilterPairs(RULES)(batch)) == ["pair.no_instruction"]


def test_rows_that_are_out_already_are_left_alone() -> None:
    first = FilterPairs(RULES)(pairs((b"x", b"y")))
    again = FilterPairs(RULES)(first)
    assert again.equals(first)


def test_an_empty_batch_keeps_its_columns() -> None:
    result = FilterPairs(RULES)(records.RAW_PAIR.empty_table())
    assert result.num_rows == 0
    assert set(records.RAW_PAIR.names) < set(result.schema.names)


def test_headers_are_read_without_decoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert probe(encoded(photo(0)), "x") == (64, 48)
    assert probe(encoded(photo(0), "JPEG", exif=exif), "x") == (48, 64)
    assert rejection(probe, b"", "x").reason == "image.undecodable"
    # within Pillow's own limit the header is fine, beyond it Pillow refuses
    assert probe(bomb(10_000), "x") == (10_000, 10_000)
    assert rejection(probe, bomb(), "x").reason == "image.too_large"


def test_pixels_are_limited_before_decoding() -> None:
    fault = rejection(open_checked, bomb(10_000), "x", Gauge(RULES), RULES)
    assert (fault.reason, fault.value, fault.threshold) == ("image.too_large", 1e8, 5e7)


def test_photos_are_upright_when_they_are_compared() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_checked(encoded(photo(0), "JPEG", exif=exif), "x", Gauge(RULES), RULES)
    assert opened.size == (48, 64)


def test_pairs_of_different_size_are_compared_at_the_sources() -> None:
    source = photo(3, (400, 300))
    target = edited(source).resize((800, 600), Image.Resampling.BICUBIC)
    check_pair(source, target, Gauge(RULES), RULES)
    fault = rejection(check_pair, source, source.resize((800, 600)), Gauge(RULES), RULES)
    assert fault.reason == "pair.unchanged"


def test_compression_noise_is_no_change() -> None:
    source = photo(4, (256, 256))
    with Image.open(io.BytesIO(encoded(source, "JPEG", quality=60))) as noisy:
        assert changed_share(np.asarray(source), np.asarray(noisy.convert("RGB"))) < 0.001


def test_measures() -> None:
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    half = black.copy()
    half[:8, :, 1] = 200
    assert changed_share(black, white) == 1.0
    assert changed_share(black, half) == 0.5
    assert grey(Image.fromarray(white)).max() == 1.0
    ramp = grey(photo(5))
    assert ssim(ramp, ramp) == pytest.approx(1.0)
    assert ssim(ramp, 1 - ramp) < 0.1


def test_real_edits_pass_the_default_rules(shared_real: Path) -> None:
    """All 27, the nine in a new style included: at 32 px they keep a layout that others lack."""
    folder = shared_real / "edit_pairs" / "image"
    sources = [path.read_bytes() for path in sorted(folder.glob("*_source.jpg"))]
    found = [
        (path.read_bytes(), version.read_bytes())
        for path in sorted(folder.glob("*_source.jpg"))
        for version in sorted(folder.glob(path.name.replace("source", "target*")))
    ]
    assert len(found) == 27
    assert set(outcomes(FilterPairs(PairRules())(pairs(*found)))) == {"kept"}
    strangers = pairs(*pairwise(sources))
    assert set(outcomes(FilterPairs(PairRules(min_ssim=0.28))(strangers))) == {"pair.ssim_low"}


def test_a_picture_that_moved_as_a_whole_is_rejected(shared_real: Path) -> None:
    image = Image.open(shared_real / "edit_pairs" / "image" / "add_01_source.jpg")
    left = encoded(image.crop((0, 0, 740, 768)))
    right = encoded(image.crop((28, 0, 768, 768)))
    (row,) = FilterPairs(PairRules())(pairs((left, right))).to_pylist()
    assert row["reason"] == "pair.shifted"
    assert row["value"] == pytest.approx(28 / 768, abs=0.005)
    assert outcomes(FilterPairs(PairRules(max_shift=None))(pairs((left, right)))) == ["kept"]


def test_a_source_has_thresholds_of_its_own() -> None:
    source = photo(1)
    batch = pairs((encoded(source), encoded(edited(source))))  # of the source "test"
    assert outcomes(FilterPairs(LOOSE)(batch)) == ["kept"]
    strict = PairThresholds(max_changed=0.01)
    for name, outcome in (("test", "pair.changed_too_much"), ("other", "kept")):
        rules = LOOSE.model_copy(update={"sources": {name: strict}})
        (row,) = FilterPairs(rules)(batch).to_pylist()
        assert (row["reason"] or row["outcome"]) == outcome
    with pytest.raises(ValueError, match="max_change"):
        PairRules.model_validate({"sources": {"test": {"max_change": 1}}})


def test_what_was_measured_stays_with_the_record() -> None:
    source = photo(1)
    small = encoded(photo(2, (20, 20)))
    batch = pairs((encoded(source), encoded(edited(source))), (small, small + b" "))
    kept, rejected = (
        {measure["name"]: measure["value"] for measure in row["measures"]}
        for row in FilterPairs(LOOSE)(batch).to_pylist()
    )
    wanted = {"pixels", "side", "aspect", "aspect_change", "changed", "shift", "ssim", "entropy"}
    assert set(kept) == wanted | {"text_area"}
    assert kept["side"] == 48.0 and 0.05 < kept["changed"] < 0.3
    assert rejected == {"pixels": 400.0, "side": 20.0}


def test_ingest_refuses_only_what_has_no_header() -> None:
    good = encoded(photo(1), "JPEG")
    assert pair_columns("x", good, good)["width"] == 64
    assert rejection(pair_columns, "x", good, b"").detail == "the target is not an image"
    assert image_columns(good, "a\ud800")["caption_hint"] == "a?"
