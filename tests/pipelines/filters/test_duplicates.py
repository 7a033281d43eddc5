from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dim import records
from dim.errors import InputError
from pipelines.filters import FilterImages, FilterPairs, ImageRules, PairRules, cells, near
from pipelines.filters.duplicates import (
    SIGNATURE,
    DuplicateRules,
    explained,
    find_duplicates,
    known_of,
    reject_duplicates,
)
from pipelines.filters.near import HashStars
from pipelines.filters.rules import PairThresholds, without_thresholds
from pipelines.filters.verdicts import ApplyVerdicts, GiveVerdicts
from pipelines.outcome import Row, to_table
from pipelines.outputs.files import by_place
from pipelines.readers.records import pair_columns
from tests.pipelines.models import save_clip
from tests.pipelines.samples import edited, encoded, photo

RULES = PairRules(min_side=32, min_sharpness=None)
NEAR = DuplicateRules(exact=False, max_distance=4)


def verdicts(*hashes: int | tuple[int, int], **columns: list[Any]) -> pa.Table:
    rows = []
    for place, value in enumerate(hashes):
        row: Row = {
            "index": 10 * place,
            "id": f"r{place}",
            "content_hash": f"c{place}",
            "text_key": 0,
            "hashes": list(value) if isinstance(value, tuple) else [value],
        }
        rows.append(row | {name: values[place] for name, values in columns.items()})
    return to_table(rows, SIGNATURE)


def drop_duplicates(table: pa.Table, rules: DuplicateRules = NEAR) -> pa.Table:
    """The verdicts by place, with the duplicates among them rejected."""
    names = {row["index"]: repr(row["id"]) for row in table.to_pylist()}
    losers = explained(find_duplicates(known_of(table), rules), names)
    return reject_duplicates(by_place(table), losers)


def dropped(table: pa.Table, rules: DuplicateRules = NEAR) -> dict[int, Row]:
    """By number of the record, what became of those that went."""
    result = drop_duplicates(table, rules).to_pylist()
    assert [row["index"] for row in result] == sorted(table["index"].to_pylist())
    return {row["index"] // 10: row for row in result if row["outcome"] != "kept"}


def flipped(value: int, *bits: int) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


def test_the_first_of_equal_content_stays() -> None:
    table = verdicts(1, 2, 3, 4, content_hash=["a", "b", "a", None])
    result = dropped(table, DuplicateRules(max_distance=None))
    assert list(result) == [2]
    assert (result[2]["reason"], result[2]["detail"]) == ("duplicate.exact", "the same as 'r0'")


def test_near_means_within_the_distance_of_one_that_stays() -> None:
    base = 0x0F0F_F0F0_1234_5678
    far = flipped(base, 0, 13, 26, 39, 52)  # five bits, one in each band
    near = flipped(base, 0, 13, 26, 39)
    chain = flipped(base, 1, 2, 3, 4, 5, 6)  # near the third, which goes
    middle = flipped(base, 1, 2, 3, 4)
    result = dropped(verdicts(base, far, middle, near, chain))
    assert {place: row["value"] for place, row in result.items()} == {2: 4.0, 3: 1.0}
    assert result[2]["detail"] == "4 of 64 bits of the hash differ from 'r0'"
    assert "'r1'" in result[3]["detail"]  # the nearer one of two that stay
    assert {row["threshold"] for row in result.values()} == {4.0}


def by_comparing_all(stars: HashStars, fixed: int) -> dict[int, tuple[int, int]]:
    """Of each record that goes, the distance to the nearest that stays, and which one that is."""
    goes: dict[int, tuple[int, int]] = {}
    for row in range(fixed, len(stars.text)):
        near = [
            (max(int(image[row] ^ image[star]).bit_count() for image in stars.hashes), star)
            for star in range(row)
            if star not in goes and stars.text[star] == stars.text[row]
        ]
        if near and min(near)[0] <= stars.distance:
            goes[row] = min(near)
    return goes


@pytest.mark.parametrize("few", [64, 1])
@pytest.mark.parametrize(
    ("distance", "images", "fixed"), [(0, 1, 0), (1, 2, 9), (4, 1, 30), (15, 2, 0)]
)
def test_stars_are_exactly_what_comparing_all_finds(
    distance: int, images: int, fixed: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are divided as a crowd is."""
    monkeypatch.setattr(near, "_FEW", few)
    monkeypatch.setattr(near, "_JOINED", few)
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 20).tolist()
    hashes = [
        flipped(base[rng.integers(20)], *rng.choice(64, rng.integers(0, 9), replace=False).tolist())
        for _ in range(300 * images)
    ]
    text = rng.integers(0, 2, 300).astype(np.uint64)
    stars = HashStars(list(np.array(hashes, np.uint64).reshape(images, 300)), text, distance)
    stays = stars.stay(fixed)
    expected = by_comparing_all(stars, fixed)
    assert np.flatnonzero(~stays).tolist() == list(expected)
    found = zip(*(column.tolist() for column in stars.nearest(stays)), strict=True)
    assert list(found) == [(star, bits) for bits, star in expected.values()]


@pytest.mark.parametrize("records", [2, 10_000, 1_000_000, 100_000_000])
@pytest.mark.parametrize("distance", [0, 4, 15])
def test_two_that_are_near_share_a_key_however_many_bands_it_has(
    distance: int, records: int
) -> None:
    masks = HashStars([], np.broadcast_to(np.uint64(0), records), distance)._masks
    assert len(masks) <= 40
    rng = np.random.default_rng(0)
    for _ in range(200):
        differ = flipped(0, *rng.choice(64, distance, replace=False).tolist())
        assert any(differ & int(mask) == 0 for mask in masks)


def test_a_crowd_is_compared_with_the_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not each with each: the comparisons are as many as the records, for each key."""
    compared: list[int] = []
    compare = HashStars._compared

    def counted(self: HashStars, places: near.Rows, *rows: near.Rows) -> Iterator[Any]:
        compared.append(len(places))
        return compare(self, places, *rows)

    monkeypatch.setattr(HashStars, "_compared", counted)
    rng = np.random.default_rng(0)
    flipped = np.uint64(1) << rng.integers(0, 64, (2, 2, 20_000)).astype(np.uint64)
    crowd = list(np.uint64(0x0F0F_F0F0_1234_5678) ^ flipped[0] ^ flipped[1])
    stars = HashStars(crowd, np.zeros(20_000, np.uint64), 4)
    assert np.flatnonzero(stars.stay()).tolist() == [0]
    assert sum(compared) < 2 * len(stars._masks) * 20_000


def test_what_is_there_already_stays_and_takes_its_twins_with_it() -> None:
    """Records of an earlier data set have places below 0, and may be like one another."""
    table = verdicts(5, 5, 5, 9 << 30, flipped(9 << 30, 1), content_hash=["a", "a", "b", "c", "d"])
    places = pa.array([-9, -8, 0, 10, -7], pa.int64())
    table = table.set_column(table.schema.get_field_index("index"), "index", places)
    losers = find_duplicates(known_of(table), NEAR)
    assert [(row["index"], row["twin"]) for row in losers.to_pylist()] == [(0, -9), (10, -7)]
    exact = DuplicateRules(max_distance=None)
    assert find_duplicates(known_of(table), exact).num_rows == 0


def test_a_crowd_of_equal_pictures_is_one_entry() -> None:
    result = dropped(verdicts(*[7] * 5000, flipped(7, 40), 2**60 - 1))
    assert sorted(result) == list(range(1, 5001))
    assert result[4999]["value"] == 0.0 and result[5000]["value"] == 1.0


def test_pairs_match_by_both_images_and_their_words() -> None:
    base = (5, 9 << 40)
    result = dropped(
        verdicts(
            base,
            (flipped(5, 3), 9 << 40),
            (5, flipped(9 << 40, *range(6))),
            base,
            text_key=[1, 1, 1, 2],
        )
    )
    assert list(result) == [1]


def test_records_that_were_out_do_not_take_others_with_them() -> None:
    table = verdicts(5, 5, 5, outcome=["rejected", "kept", "kept"], reason=["image.blank", "", ""])
    result = dropped(table)
    assert {place: row["reason"] for place, row in result.items()} == {
        0: "image.blank",
        2: "duplicate.near",
    }
    assert "'r1'" in result[2]["detail"]


def test_order_of_arrival_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    table = verdicts(*(int(value) for value in rng.integers(0, 64, 300)))
    mixed = table.take(pa.array(rng.permutation(300)))
    assert drop_duplicates(table).equals(drop_duplicates(mixed))
    assert dropped(verdicts()) == {}


def cell_of(*vectors: Any, text: list[int] | None = None, first: int = 0) -> pa.Table:
    """Records of one cell by their vectors, or those of their images."""
    rows = [
        {
            "cell": 0,
            "index": first + place,
            "text_key": text[place] if text else 0,
            "embeddings": np.asarray(vector, np.float16).tobytes(),
        }
        for place, vector in enumerate(vectors)
    ]
    return pa.Table.from_pylist(rows, schema=cells.EMBEDDED)


def alike(cell: pa.Table, images: int = 1, max_cosine: float = 0.9) -> dict[int, int]:
    """The twins of those that go."""
    found = cells.CellStars(max_cosine, images).alike(cell)
    assert all(value > max_cosine for value in found["value"].to_pylist())
    return dict(zip(found["index"].to_pylist(), found["twin"].to_pylist(), strict=True))


def test_the_nearest_star_is_the_twin() -> None:
    east, north, near_east, chain = [1, 0], [0, 1], [0.98, 0.199], [0.9, 0.436]
    assert alike(cell_of(east, north, near_east, near_east)) == {2: 0, 3: 0}
    assert alike(cell_of(east, near_east, chain), max_cosine=0.95) == {1: 0}
    assert alike(cell_of(east, east, text=[1, 2])) == {}
    assert alike(cell_of(east, east, near_east, first=-2)) == {0: -2}
    assert alike(cell_of()) == {}


def test_of_a_pair_the_less_similar_image_counts() -> None:
    same, turned = [1, 0], [0, 1]
    assert alike(cell_of([same, same], [same, turned], [same, same]), images=2) == {2: 0}


def test_half_precision_does_not_make_twins_differ() -> None:
    vector = np.random.default_rng(0).normal(size=512)
    vector /= np.linalg.norm(vector)
    assert alike(cell_of(vector, vector), max_cosine=0.99999) == {1: 0}


def test_a_cell_larger_than_what_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)).repeat(3, 0)[rng.permutation(180)]
    at_once = alike(cell_of(*vectors))
    monkeypatch.setattr(cells, "_COMPARED", 7)
    assert alike(cell_of(*vectors)) == at_once and len(at_once) >= 120


def test_twins_are_mostly_in_one_cell() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4000, 1, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    centres = cells.centres(vectors[:640], 20)
    assert centres.shape == (20, 32)
    where = cells.in_cells(vectors, centres)
    assert set(where.tolist()) == set(range(20))
    again = cells.in_cells(
        vectors + rng.normal(size=vectors.shape).astype(np.float32) / 100, centres
    )
    assert (where == again).mean() > 0.85
    assert set(cells.in_cells(vectors, cells.centres(vectors, 1)).tolist()) == {0}


def raw_pairs(*images: tuple[bytes, bytes, str]) -> pa.Table:
    rows = [
        {
            "id": f"p{n}",
            "index": n,
            "source": "t",
            "instruction": words,
            **pair_columns(words, source, target),
        }
        for n, (source, target, words) in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, schema=records.RAW_PAIR)


def test_pictures_are_judged_without_travelling() -> None:
    """From raw pairs to verdicts and back to raw pairs with outcomes."""
    source, other = photo(1, (96, 96)), photo(2, (96, 96))
    good = (encoded(source), encoded(edited(source)))
    again = (encoded(source, "JPEG", quality=90), encoded(edited(source), "JPEG", quality=90))
    batch = raw_pairs(
        (*good, "Add a red box."),
        (*again, "add a  Red box."),
        (*again, "Paint the middle red."),
        (encoded(other), encoded(other, "BMP"), "Add."),
        (good[0], good[1][:200], "Add a red box."),
    )
    given = GiveVerdicts.of(FilterPairs(RULES), NEAR)(batch)
    assert "image" not in given.schema.names and given.nbytes < 3000
    verdict = drop_duplicates(given)
    result = ApplyVerdicts(records.RAW_PAIR)(batch, verdict)
    assert [row["reason"] or row["outcome"] for row in result.to_pylist()] == [
        "kept",
        "duplicate.near",
        "kept",
        "pair.unchanged",
        "image.undecodable",
    ]
    kept, twin, *_ = result.to_pylist()
    assert kept["image"] == good[0] and kept["measures"]
    assert twin["image"] is None and twin["value"] <= 4 and "'p0'" in twin["detail"]
    with pytest.raises(InputError, match="the input changed while it was read: record p4"):
        ApplyVerdicts(records.RAW_PAIR)(batch, verdict.slice(0, 4))


def test_without_thresholds_all_stays_that_can_be_decoded() -> None:
    """As of an earlier data set; and the bomb stays out."""
    source = photo(1, (20, 20))
    small = (encoded(source), encoded(edited(source)), "Add.")
    strict = PairRules(max_pixels=300, min_ssim=1.0, sources={"t": PairThresholds(min_ssim=1.0)})
    assert FilterPairs(strict)(raw_pairs(small))["outcome"].to_pylist() == ["rejected"]
    bare = without_thresholds(strict)
    assert FilterPairs(bare)(raw_pairs(small))["reason"].to_pylist() == ["image.too_large"]
    bare = without_thresholds(strict.model_copy(update={"max_pixels": 400}))
    assert FilterPairs(bare)(raw_pairs(small))["outcome"].to_pylist() == ["kept"]


def test_a_failure_of_the_filter_stays_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr("pipelines.filters.pairs.check_pair", broken)
    source = photo(1, (96, 96))
    batch = raw_pairs((encoded(source), encoded(edited(source)), "Add."))
    given = GiveVerdicts.of(FilterPairs(RULES), NEAR)(batch)
    result = ApplyVerdicts(records.RAW_PAIR)(batch, drop_duplicates(given))
    (row,) = result.to_pylist()
    assert (row["outcome"], row["stage"], row["error"]) == ("failed", "filter", "no such luck")


def test_embeddings_are_noted_when_a_model_is_given(tmp_path: Any) -> None:
    save_clip(tmp_path)
    rules = DuplicateRules(embedding_model=str(tmp_path))
    give = GiveVerdicts.of(FilterImages(ImageRules(min_side=32, min_sharpness=None)), rules)
    row = {"id": "a", "index": 0, "source": "t", "image": encoded(photo(1, (96, 96)))}
    (verdict,) = give(pa.Table.from_pylist([row], schema=records.RAW_IMAGE)).to_pylist()
    assert len(verdict["hashes"]) == 1
    assert np.linalg.norm(np.frombuffer(verdict["embeddings"], np.float16)) == pytest.approx(
        1, abs=0.01
    )


def test_little_is_looked_at_of_each_record() -> None:
    table = verdicts(*[(number, number << 30) for number in range(1000)])
    known = known_of(table)
    assert known.nbytes <= 64 * 1000
    losers = find_duplicates(known, NEAR)
    assert losers.num_rows < 1000 and losers.schema.names[:2] == ["index", "twin"]
