"""Jobs whose model runs in one heap by ``ray.data.llm``; its HTTP processor stands in for vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dim.blueprint import Blueprint
from dim.designers import CallOptions
from dim.errors import DimError
from infra.storage import open_store
from pipelines import edit, ingest, t2i
from pipelines.calls import engine
from pipelines.calls.answers import read_entries
from pipelines.calls.engine import EngineOptions, StoreAnswers, engine_config, messages_of
from pipelines.edit import EditConfig
from pipelines.filters import ImageRules, PairRules
from pipelines.ingest import IngestConfig
from pipelines.stages.caption import CaptionRules
from pipelines.t2i import T2IConfig
from tests.chat_server import ChatServer, Response, completion, images_of, text_of
from tests.pipelines.samples import write_pairs

PLAN = Blueprint("Add a red box.", "A field.", "- grass", "The left.", "A field with a box.")
SPEC = "vllm:org/model"


@pytest.fixture
def over_http(chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> ChatServer:
    """The server answers what the engine would."""
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    def process(spec: str, calls: CallOptions, options: EngineOptions) -> engine.Process:
        def ask(row: dict[str, Any]) -> dict[str, Any]:
            return {"payload": {"messages": messages_of(row), "schema": row["schema"]}}

        def read(row: dict[str, Any]) -> dict[str, Any]:
            said = row["http_response"]
            return {
                "range": row["range"],
                "key": row["key"],
                "record": row["record"],
                "answer": said["choices"][0]["message"]["content"],
                "input_tokens": said["usage"]["prompt_tokens"],
                "output_tokens": said["usage"]["completion_tokens"],
            }

        config = HttpRequestProcessorConfig(
            url=f"{chat_server.url}/chat/completions", concurrency=1, batch_size=options.batch_size
        )
        return build_processor(config, preprocess=ask, postprocess=read)

    monkeypatch.setattr(engine, "vllm", process)
    return chat_server


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_asks_in_rounds_until_nothing_is_open(tmp_path: Path, over_http: ChatServer) -> None:
    pairs = write_pairs(tmp_path, 6)
    ingest.run(IngestConfig(pairs=str(pairs), out=str(tmp_path / "raw")))

    def respond(request: dict[str, Any]) -> Response:
        text = text_of(request)
        if '"differences"' in text or "differences" in json.dumps(request["schema"]):
            if "number 2." in text:
                return completion("Alignment: misaligned")
            if "number 4." in text:
                return completion("  ")  # asked once: nothing stays open for ever
            return completion(
                json.dumps(
                    {
                        "differences": "a box",
                        "alignment": "aligned",
                        "instruction": text.partition("Add red box")[2].partition(".")[0],
                    }
                )
            )
        if "could not be used" not in text and len(plans) == 0:
            plans.append(text)
            return completion("nonsense")
        return completion(PLAN.render(), tokens=(100, 10))

    plans: list[str] = []
    over_http.respond = respond
    config = EditConfig(
        raw=str(tmp_path / "raw"),
        out=str(tmp_path / "edit"),
        designer=SPEC,
        filters=PairRules(min_side=32),
        calls=CallOptions(input_price=1.0),
        engine=EngineOptions(batch_size=4),
        batch_size=3,
    )
    manifest = edit.run(config)
    assert manifest.counts.add_up()
    assert manifest.counts.by_reason == {"triage.misaligned": 1}
    assert (manifest.counts.kept, manifest.counts.failed) == (4, 1)
    assert all(len(images_of(request)) == 2 for request in over_http.requests)
    asked = len(over_http.requests)
    assert asked == 6 + 4 + 1  # triage, blueprints, and one of them again
    assert manifest.cost is not None and manifest.cost["requests"] == asked
    records = {entry.record for entry in read_entries(open_store(config.out))}
    assert records == {f"pair-{n}" for n in range(6)}


@pytest.mark.usefixtures("ray_cluster")
def test_captions_too(tmp_path: Path, over_http: ChatServer) -> None:
    ingest.run(IngestConfig(tabletop_images=5, out=str(tmp_path / "raw")))
    words = "A wooden table with a red circle on the left and a blue square near its edge."
    over_http.respond = lambda request: completion(words)
    config = T2IConfig(
        raw=str(tmp_path / "raw"),
        out=str(tmp_path / "t2i"),
        captioner=SPEC,
        filters=ImageRules(min_side=64),
        captions=CaptionRules(min_words=5, min_dimensions_in_prose=0),
    )
    manifest = t2i.run(config)
    assert manifest.counts.kept == manifest.counts.input - manifest.counts.rejected > 0
    assert manifest.counts.failed == 0
    asked = len(over_http.requests)
    assert asked == manifest.counts.kept
    again = t2i.run(config, overwrite=True)
    assert again.files == manifest.files and len(over_http.requests) == asked


def test_without_vllm_the_job_says_so() -> None:
    with pytest.raises(DimError, match=r"vllm:org/model needs vLLM.*pip install 'ray\[llm\]'"):
        engine.vllm(SPEC, CallOptions(), EngineOptions())


def test_the_engine_is_set_up_for_images_and_survives_a_bad_record() -> None:
    options = EngineOptions(
        engine_kwargs={"max_model_len": 8192}, replicas=4, batch_size=16, accelerator_type="H100"
    )
    config = engine_config(SPEC, options)
    assert config.model_source == "org/model" and config.engine_kwargs["max_model_len"] == 8192
    assert (config.concurrency, config.batch_size, config.accelerator_type) == (4, 16, "H100")
    assert config.should_continue_on_error
    assert config.prepare_multimodal_stage["enabled"]


def test_what_the_engine_is_given_and_gives_back() -> None:
    row = {
        "range": "a",
        "key": "k",
        "record": "r",
        "text": "What?",
        "images": ["data:x"],
        "schema": '{"a": 1}',
    }
    calls = CallOptions(temperature=0.5, max_tokens=7)
    given = engine._to_engine(row, calls)
    assert given["sampling_params"] == {
        "temperature": 0.5,
        "max_tokens": 7,
        "structured_outputs": {"json": '{"a": 1}'},
    }
    assert given["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "text", "text": "What?"},
    ]
    out = {"generated_text": "yes", "num_input_tokens": 3, "num_generated_tokens": 2}
    back = engine._from_engine({**row, **out, "time_taken_llm": 0.5}, max_tokens=7)
    assert (back["key"], back["answer"], back["output_tokens"]) == ("k", "yes", 2)


def test_every_answer_of_the_engine_ends_its_question(tmp_path: Path) -> None:
    import pyarrow as pa

    store = open_store(str(tmp_path))
    base = {
        "range": "a",
        "record": "r",
        "input_tokens": 10,
        "max_tokens": 5,
        "__inference_error__": "",
    }
    rows = [
        {**base, "key": "good", "answer": "yes", "output_tokens": 2},
        {**base, "key": "good", "answer": "yes", "output_tokens": 2},
        {**base, "key": "cut", "answer": "ye", "output_tokens": 5},
        {**base, "key": "empty", "answer": "", "output_tokens": 0},
        {**base, "key": "bad", "answer": None, "__inference_error__": "ValueError:\n too long"},
    ]
    stage = StoreAnswers(SPEC, CallOptions(), store)
    assert stage(pa.Table.from_pylist(rows))["key"].to_pylist() == ["good", "cut", "empty", "bad"]
    replies = {entry.key: str(entry.reply) for entry in read_entries(store)}
    assert len(list(read_entries(store))) == 4
    assert replies["good"] == "yes"
    assert "cut off" in replies["cut"] and "answered nothing" in replies["empty"]
    assert replies["bad"] == f"{SPEC}: ValueError: too long"
