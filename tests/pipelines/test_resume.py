"""What is done again and what is not, who may replace what, and that nobody's files are touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from dim import records
from dim.errors import DimError, InputError
from infra.storage import open_dataset, open_store
from pipelines.job import Job, JobConfig, Remaining
from pipelines.outcome import fail, to_table
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.verify import verify

pytestmark = pytest.mark.usefixtures("ray_cluster")

RANGES, ROWS = 4, 6


class Shaded(JobConfig):
    """A job whose records are of one shade."""

    shade: int = 1


class Maker:
    """Runs that job, range after range, and notes which it did.

    Args:
        out: its output folder.
        before: what happens before a range; it may raise.
        broken: ranges in which a record fails.
    """

    def __init__(
        self, out: Path, before: Callable[[int], None] = lambda number: None, *broken: int
    ) -> None:
        self.out = out
        self.before = before
        self.broken = broken
        self.did: list[int] = []
        self.work: Remaining | None = None

    def run(self, shade: int = 1, **how: bool) -> Manifest:
        config = Shaded(out=str(self.out), shade=shade)
        rows = RANGES * ROWS
        job = Job("made", config, records.RAW_IMAGE, identity={}, rows=rows, ranges=RANGES)
        return job.run(lambda work: self._build(work, shade), **how)

    def _build(self, work: Remaining, shade: int) -> ray.data.Dataset:
        self.work = work
        done = []
        for number in work.todo:
            self.before(number)
            self.did.append(number)
            table = to_table(
                [self._row(number, place, shade) for place in range(ROWS)], records.RAW_IMAGE
            )
            done.append(work.output.done(number, ROWS, [table]))
        return ray.data.from_arrow(pa.concat_tables(done))

    def _row(self, number: int, place: int, shade: int) -> dict[str, Any]:
        index = number * ROWS + place
        row: dict[str, Any] = {"id": f"r{index}", "index": index, "source": "t"}
        row["image"] = bytes([shade]) * 100
        if number in self.broken and place == 2:
            fail(row, "make", "broken")
        return row


def at(number: int, do: Callable[[], object]) -> Callable[[int], None]:
    """Does something before one range."""

    def watch(reached: int) -> None:
        if reached == number:
            do()

    return watch


def stop_at(number: int) -> Callable[[int], None]:
    return at(number, stop)


def stop() -> None:
    raise DimError("stopped")


def shades(out: Path) -> set[int]:
    """The shades of all records that a reader finds; each record comes once."""
    table = open_dataset(str(out)).to_table()
    assert table["index"].to_pylist() == list(range(RANGES * ROWS))
    return {image[0] for image in table["image"].to_pylist()}


def files_in(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def test_a_run_again_does_the_ranges_that_have_no_receipt(tmp_path: Path) -> None:
    whole = Maker(tmp_path / "whole").run()
    first = Maker(tmp_path / "out", stop_at(2))
    with pytest.raises(DimError, match="stopped"):
        first.run()
    second = Maker(tmp_path / "out")
    assert second.run().files == whole.files
    assert (first.did, second.did) == ([0, 1], [2, 3])
    assert shades(tmp_path / "out") == {1} and verify(str(tmp_path / "out")).problems == []


class Backwards(Maker):
    """The same, and what is done first comes last."""

    def _build(self, work: Remaining, shade: int) -> ray.data.Dataset:
        return super()._build(work, shade).sort("receipt", descending=True)


def test_the_order_in_which_ranges_end_changes_nothing(tmp_path: Path) -> None:
    Backwards(tmp_path / "a").run()
    Maker(tmp_path / "b").run()
    first, second = ((tmp_path / name / "manifest.json").read_text() for name in "ab")
    assert first.replace(str(tmp_path / "a"), str(tmp_path / "b")) == second


def test_other_settings_take_none_of_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DimError, match="stopped"):
        Maker(tmp_path, stop_at(2)).run(shade=1)
    other = Maker(tmp_path)
    manifest = other.run(shade=2)
    assert other.did == [0, 1, 2, 3] and shades(tmp_path) == {2}
    names = [tmp_path / file.path for file in manifest.files]
    assert files_in(tmp_path) == sorted([*names, tmp_path / "manifest.json"])


@pytest.mark.parametrize("harm", ["short", "gone"])
def test_a_file_that_is_not_what_its_receipt_says_is_made_again(tmp_path: Path, harm: str) -> None:
    with pytest.raises(DimError, match="stopped"):
        Maker(tmp_path, stop_at(3)).run()
    (victim,) = (tmp_path / "data").glob("part-00001-*")
    data = victim.read_bytes()
    victim.unlink()
    if harm == "short":
        victim.write_bytes(data[:-9])
    again = Maker(tmp_path)
    again.run()
    assert again.did == [1, 3] and verify(str(tmp_path)).problems == []


def test_a_finished_range_is_not_read_again(tmp_path: Path) -> None:
    with pytest.raises(DimError, match="stopped"):
        Maker(tmp_path, stop_at(3)).run()
    (victim,) = (tmp_path / "data").glob("part-00001-*")
    data = victim.read_bytes()
    victim.write_bytes(data[:20] + bytes(9) + data[29:])  # as a disk does
    again = Maker(tmp_path)
    again.run()
    assert again.did == [3]
    changed = f"data/{victim.name}: the checksum is not the manifest's"
    assert changed in verify(str(tmp_path)).problems


def test_an_output_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    Maker(tmp_path).run(shade=1)
    before = {path: path.read_bytes() for path in files_in(tmp_path)}
    with pytest.raises(DimError, match="stopped"):
        Maker(tmp_path, stop_at(3)).run(shade=2, overwrite=True)
    assert shades(tmp_path) == {1}
    assert {path: path.read_bytes() for path in before} == before
    # The same command as ever finds it finished, and leaves the other attempt alone.
    assert Maker(tmp_path).run(shade=1).counts.kept == RANGES * ROWS
    again = Maker(tmp_path)
    again.run(shade=2, overwrite=True)
    assert again.did == [3] and shades(tmp_path) == {2}
    assert verify(str(tmp_path)).problems == []
    anew = Maker(tmp_path)
    anew.run(shade=2, overwrite=True)
    assert anew.did == [0, 1, 2, 3] and shades(tmp_path) == {2}


def test_of_two_that_make_the_same_at_once_both_have_it(tmp_path: Path) -> None:
    quick = Maker(tmp_path)
    slow = Maker(tmp_path, at(2, quick.run))
    made = slow.run()
    assert quick.did == [2, 3] and slow.did == [0, 1, 2, 3]
    assert made == manifests.read(open_store(str(tmp_path)))
    assert shades(tmp_path) == {1} and verify(str(tmp_path)).problems == []


def test_of_two_that_make_something_else_the_first_to_finish_has_the_place(tmp_path: Path) -> None:
    other = Maker(tmp_path)
    slow = Maker(tmp_path, at(3, lambda: other.run(shade=2)))
    with pytest.raises(DimError, match="another run works on the same output|made otherwise"):
        slow.run(shade=1)
    assert shades(tmp_path) == {2}
    with pytest.raises(InputError, match="made otherwise .*shade was 2 and is 1"):
        slow.run(shade=1)
    slow.before = lambda number: None
    slow.run(shade=1, overwrite=True)
    assert shades(tmp_path) == {1} and verify(str(tmp_path)).problems == []


def test_who_comes_late_cannot_reach_what_is_finished(tmp_path: Path) -> None:
    """A worker of a run that was killed writes the range that it was doing, and its receipt."""
    first = Maker(tmp_path, stop_at(0))
    with pytest.raises(DimError, match="stopped"):
        first.run(shade=1)
    manifest = Maker(tmp_path).run(shade=2)
    first.before = lambda number: None
    assert first.work is not None
    first._build(first.work, shade=1)
    assert shades(tmp_path) == {2}
    for file in manifest.files:
        assert records.sha256_hex((tmp_path / file.path).read_bytes()) == file.sha256
    Maker(tmp_path).run(shade=3, overwrite=True)
    assert shades(tmp_path) == {3} and verify(str(tmp_path)).problems == []


def test_only_ranges_with_failures_are_tried_again(tmp_path: Path) -> None:
    first = Maker(tmp_path, lambda number: None, 1, 3).run()
    assert first.counts.failed == 2
    kept = [file for file in first.files if "part-00000-" in file.path or "-00002-" in file.path]
    stamps = {file.path: (tmp_path / file.path).stat().st_mtime_ns for file in kept if file.rows}
    killed = Maker(tmp_path, stop_at(3), 3)
    with pytest.raises(DimError, match="stopped"):
        killed.run(retry_failed=True)
    assert killed.did == [1] and manifests.read(open_store(str(tmp_path))) == first
    again = Maker(tmp_path, lambda number: None, 3)
    second = again.run(retry_failed=True)
    assert again.did == [3] and (second.counts.kept, second.counts.failed) == (23, 1)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in stamps} == stamps
    assert verify(str(tmp_path)).problems == []
    last = Maker(tmp_path)
    assert last.run(retry_failed=True).counts.failed == 0 and last.did == [3]
    assert first.measured == {} and second.measured is None  # of ranges that were not done again
    assert shades(tmp_path) == {1}
    assert pq.read_table(next((tmp_path / "failed").iterdir())).num_rows == 0


def test_an_output_of_a_program_that_knew_no_ranges_is_tried_again_as_a_whole(
    tmp_path: Path,
) -> None:
    first = Maker(tmp_path, lambda number: None, 1).run()
    older = []
    for number, file in enumerate(first.files):
        name = f"{file.path.partition('/')[0]}/part-{number:05d}.parquet"
        (tmp_path / file.path).rename(tmp_path / name)
        older.append(file.model_copy(update={"path": name}))
    store = open_store(str(tmp_path))
    manifests.write(store, first.model_copy(update={"files": tuple(older)}))
    assert verify(str(tmp_path)).problems == []
    again = Maker(tmp_path)
    assert Maker(tmp_path).run() == manifests.read(store)
    assert again.run(retry_failed=True).counts.failed == 0 and again.did == [0, 1, 2, 3]
    assert shades(tmp_path) == {1} and verify(str(tmp_path)).problems == []
