from __future__ import annotations

from pathlib import Path

import pytest

from dim.errors import ConfigError
from infra.fingerprint import fingerprint
from training.record import StageRecord, discard_partial, identify, read_record
from training.stage import StageConfig


def test_a_record_survives_writing(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert read_record(out) is None
    record = StageRecord({"seed": 1}, {"stage": "t2i"}, "run", True, {"loss": 0.5}, "there")
    record.write(out)
    assert read_record(out) == record


def test_another_run_in_the_same_place_is_refused(tmp_path: Path) -> None:
    record = StageRecord({"seed": 1, "steps": 5, "data": "a"}, {}, "run")
    record.check_same({"seed": 1, "steps": 5, "data": "a"}, "out")
    with pytest.raises(ConfigError, match=r"unfinished run with other settings \(data, steps\)"):
        record.check_same({"seed": 1, "steps": 6, "data": "b"}, "out")


def test_how_sources_are_mixed_is_part_of_what_a_run_is(
    edit_data: str, t2i_data: str, tiny_model_dir: Path
) -> None:
    def identity(*data: object) -> dict[str, object]:
        values = {"stage": "edit1", "init": str(tiny_model_dir), "out": "o", "data": [*data]}
        more = {"steps": 3, "batch_size": 2, "learning_rate": 1}
        return identify(StageConfig.model_validate(values | more), 3)

    plain = identity(edit_data, t2i_data)
    assert "mixture" not in plain  # as of runs from before there was one
    assert identity({"uri": edit_data, "name": "mine", "repeats": 1}, t2i_data) == plain
    mixed = identity({"uri": edit_data, "repeats": 2}, t2i_data)
    record = StageRecord(plain, {}, "run")
    with pytest.raises(ConfigError, match=r"unfinished run with other settings \(mixture\)"):
        record.check_same(mixed, "out")
    for other in ({"repeats": 3}, {"repeats": 2, "cap": 5}, {}):
        assert identity({"uri": edit_data, **other}, t2i_data) != mixed


def test_a_record_of_before_a_setting_is_one_with_its_default() -> None:
    record = StageRecord({"seed": 1}, {}, "run")
    record.check_same({"seed": 1, "buckets": False, "vlm_view": "whole"}, "out")
    with pytest.raises(ConfigError, match=r"with other settings \(buckets, vlm_view\)"):
        record.check_same({"seed": 1, "buckets": True, "vlm_view": "region"}, "out")


def test_only_an_unfinished_run_goes_on_with_another_learning_rate() -> None:
    before, after = ({"seed": 1, "learning_rate": rate} for rate in (1e-3, 1e-4))
    StageRecord(before, {}, "run").check_same(after, "out")
    finished = StageRecord(before, {}, "run", finished=True)
    with pytest.raises(ConfigError, match=r"a finished run with other settings \(learning_rate\)"):
        finished.check_same(after, "out")
    record = StageRecord(before, {}, "run")
    assert record.changes(after) == [{"learning_rate": 1e-4, "before": 1e-3}]
    assert record.changes(before) == []


def test_events_of_all_parts_of_a_run_are_kept() -> None:
    back = {"step": 7, "back_to": 4, "salt": 1}
    change = {"learning_rate": 1e-4, "before": 1e-3}
    record = StageRecord({}, {}, "run", events=[back, change])
    told = [{"step": 4, **change}]
    assert record.with_events(told).events == [back, *told]
    assert record.with_events([back, *told]).events == [back, *told]
    assert record.with_events([]) == record


@pytest.mark.parametrize("text", ["no json", "[]", '{"other": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "stage.json").write_text(text)
    with pytest.raises(ConfigError, match=r"stage\.json is not the record of a training stage"):
        read_record(str(tmp_path))


def test_what_an_export_has_left_half_done_is_removed(tmp_path: Path) -> None:
    for name in (".model-x1", ".model-old-x2", "model", ".other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    discard_partial(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".other"}


def test_the_fingerprint_of_a_start_follows_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "dim.json").write_text("{}")
    weights = folder / "weights.bin"
    weights.write_bytes(bytes(3 << 20))
    before = fingerprint(str(folder))
    assert before == fingerprint(str(folder))
    changed = bytearray(3 << 20)
    changed[-1] = 1
    weights.write_bytes(changed)
    assert fingerprint(str(folder)) != before
    assert fingerprint(str(folder / "dim.json")) != before
