from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dim import records
from dim.errors import InputError
from pipelines.filters import FilterImages, FilterPairs, ImageRules, PairRules
from pipelines.filters.duplicates import (
    SIGNATURE,
    TWINS,
    DuplicateRules,
    Find,
    MatchBands,
    MatchEmbeddings,
    explained,
    find_duplicates,
    known_of,
    reject_duplicates,
)
from pipelines.filters.verdicts import ApplyVerdicts, GiveVerdicts
from pipelines.outcome import Row, to_table
from pipelines.outputs.files import by_place
from pipelines.readers.records import pair_columns
from tests.pipelines.models import save_clip
from tests.pipelines.samples import edited, encoded, photo

RULES = PairRules(min_side=32, min_sharpness=None)
NEAR = DuplicateRules(exact=False, max_distance=4)


def find(matcher: Callable[..., pa.Table], tasks: list[Row], signatures: pa.Table) -> pa.Table:
    """Run a matcher here, its last task first: the order must not matter."""
    parts = [matcher(pa.Table.from_pylist([task]), signatures) for task in reversed(tasks)]
    return pa.concat_tables([TWINS.empty_table(), *parts])


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


def drop_duplicates(table: pa.Table, rules: DuplicateRules, find: Find) -> pa.Table:
    """The verdicts by place, with the duplicates among them rejected."""
    ids = dict(zip(table["index"].to_pylist(), table["id"].to_pylist(), strict=True))
    losers = explained(find_duplicates(known_of(table), rules, find), ids)
    return reject_duplicates(by_place(table), losers)


def dropped(table: pa.Table, rules: DuplicateRules = NEAR) -> dict[int, Row]:
    """By number of the record, what became of those that went."""
    result = drop_duplicates(table, rules, find).to_pylist()
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


@pytest.mark.parametrize("distance", [0, 1, 4, 15])
def test_bands_find_exactly_what_comparing_all_finds(distance: int) -> None:
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**63, 30, dtype=np.uint64)
    hashes = [
        flipped(int(rng.choice(base)), *rng.choice(64, rng.integers(0, 20), replace=False).tolist())
        for _ in range(400)
    ]
    matcher = MatchBands(distance)
    twins = find(matcher, matcher.tasks, verdicts(*hashes))
    expected = {
        (i, j, (hashes[i] ^ hashes[j]).bit_count())
        for i in range(400)
        for j in range(i + 1, 400)
        if (hashes[i] ^ hashes[j]).bit_count() <= distance
    }
    found = [tuple(row.values()) for row in twins.to_pylist()]
    assert len(found) == len(set(found)) == len(expected) and set(found) == expected


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
    assert drop_duplicates(table, NEAR, find).equals(drop_duplicates(mixed, NEAR, find))
    assert dropped(verdicts()) == {}


def test_embeddings_find_what_hashes_do_not() -> None:
    vectors = np.eye(4, dtype=np.float16)[[0, 1, 0, 2]]
    vectors[2] = np.float16([0.98, 0.199, 0, 0])
    table = verdicts(1, 2**20 - 1, 2**63 - 1, 0, embeddings=[v.tobytes() for v in vectors])
    rules = DuplicateRules(exact=False, max_distance=None, embedding_model="m", max_cosine=0.95)
    result = dropped(table, rules)
    assert {place: row["reason"] for place, row in result.items()} == {2: "duplicate.embedding"}
    assert result[2]["value"] == pytest.approx(0.98, abs=1e-3)
    assert dropped(table, rules.model_copy(update={"max_cosine": 0.99})) == {}


def test_half_precision_does_not_make_twins_differ() -> None:
    vector = np.random.default_rng(0).normal(size=512)
    stored = (vector / np.linalg.norm(vector)).astype(np.float16).tobytes()
    rules = DuplicateRules(exact=False, max_distance=None, embedding_model="m", max_cosine=0.99999)
    assert list(dropped(verdicts(1, 2, embeddings=[stored, stored]), rules)) == [1]


def test_of_a_pair_the_less_similar_image_counts() -> None:
    same, turned = np.float16([1, 0]), np.float16([0, 1])
    table = verdicts(
        (1, 1), (2, 2), (3, 3),
        embeddings=[np.stack(v).tobytes() for v in ((same, same), (same, turned), (same, same))],
    )  # fmt: skip
    matcher = MatchEmbeddings(0.9)
    twins = find(matcher, matcher.tasks(table), table)
    assert [(row["first"], row["second"]) for row in twins.to_pylist()] == [(0, 2)]


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
    verdict = drop_duplicates(given, NEAR, find)
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


def test_a_failure_of_the_filter_stays_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr("pipelines.filters.pairs.check_pair", broken)
    source = photo(1, (96, 96))
    batch = raw_pairs((encoded(source), encoded(edited(source)), "Add."))
    given = GiveVerdicts.of(FilterPairs(RULES), NEAR)(batch)
    result = ApplyVerdicts(records.RAW_PAIR)(batch, drop_duplicates(given, NEAR, find))
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
    losers = find_duplicates(known, NEAR, find)
    assert losers.num_rows < 1000 and losers.schema.names[:2] == ["index", "twin"]
