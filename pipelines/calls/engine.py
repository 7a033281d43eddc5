"""A local model in vLLM, by ``ray.data.llm``: everything that is open is asked in one heap.

Steps that ask one after another (triage, then blueprint; or again, with what was wrong) run in
rounds. A round lets them run until they come to questions without an answer, and has the engine
answer all of them. When nothing is open any more, they run once for good, and find every answer in
the job's store. A killed job goes on with the answers it has.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from pydantic import Field

from dim import designers
from dim.config import StrictModel
from dim.designers import CallOptions
from dim.designers.calls.usage import Answer, Unusable, Usage
from dim.designers.calls.wire import data_url
from dim.designers.prepared import PreparedModel
from dim.errors import DimError, InputError
from dim.records import clean_text
from infra.storage import Store
from pipelines.attempts import stop_after_restarts
from pipelines.calls.answers import Answers, name_of
from pipelines.calls.worker import AskInTurn, CalledModel, Step

_QUESTIONS = pa.schema(
    [
        pa.field("range", pa.string()),
        pa.field("key", pa.string()),
        pa.field("record", pa.string()),
        pa.field("text", pa.string()),
        pa.field("images", pa.list_(pa.large_string())),
        pa.field("schema", pa.string()),
    ]
)
_ERROR = "__inference_error__"  # as ray.data.llm calls it

Process = Callable[[ray.data.Dataset], ray.data.Dataset]
"""Questions in, the same rows with ``answer``, ``finish_reason`` and token counts out."""


class EngineOptions(StrictModel):
    """How vLLM runs a local model; see ``ray.data.llm.vLLMEngineProcessorConfig``."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Such as ``tensor_parallel_size``, ``max_model_len``, ``limit_mm_per_prompt``."""
    replicas: int = Field(1, ge=1)
    batch_size: int = Field(32, ge=1)
    accelerator_type: str | None = None


class CollectQuestions:
    """Lets steps run, and returns what they asked in vain instead of what they made.

    Args:
        steps: as of :class:`AskInTurn`.
        model: ``vllm:MODEL``.
        records: from a range, as a row of a data set, to its records with outcomes.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        model: CalledModel,
        records: Callable[[dict[str, Any]], Iterator[pa.Table]],
    ) -> None:
        stop_after_restarts()
        self._steps, self._called, self._records = steps, model, records
        self._name = designers.engine_model(model.spec) or model.spec

    def __call__(self, ranges: pa.Table) -> Iterator[pa.Table]:
        """Ranges in, questions out; equal ones of a range are one."""
        for each in ranges.to_pylist():
            name, seen = name_of(each["pieces"]), set[str]()
            with self._called.answers(name) as answers:
                model = PreparedModel(self._name, self._called.calls, answers.get)
                stage = AskInTurn(self._steps, model, None)
                for batch in self._records(each):
                    rows = self._open(batch, stage, model, answers)
                    fresh = [{**row, "range": name} for row in rows if row["key"] not in seen]
                    seen |= {row["key"] for row in fresh}
                    yield pa.Table.from_pylist(fresh, schema=_QUESTIONS)

    def _open(
        self, batch: pa.Table, stage: AskInTurn, model: PreparedModel, answers: Answers
    ) -> list[dict[str, Any]]:
        """The open questions of some records; each record is worked on by itself."""
        rows: list[dict[str, Any]] = []
        for place in range(batch.num_rows):
            record = batch.slice(place, 1)
            stage(record)
            for key, question in model.take_open().items():
                row = {"key": key, "record": record["id"][0].as_py(), "text": question.text}
                schema = json.dumps(question.schema) if question.schema is not None else None
                try:
                    urls = [data_url(image, model.max_pixels) for image in question.images]
                except InputError as error:
                    nothing = Usage(0, 0, 0.0, 0.0)
                    answers.add(key, Unusable(f"image not sent: {error}", nothing))
                else:
                    images = [url.decode() for url in urls]
                    rows.append({**row, "images": images, "schema": schema})
        return rows


class StoreAnswers:
    """Puts answers where the stage will look for them.

    Args:
        spec: ``vllm:MODEL``.
        calls: for the prices.
        store: the job's output folder.
    """

    def __init__(self, spec: str, calls: CallOptions, store: Store) -> None:
        self._who, self._prices, self._store = spec, calls.prices, store

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answered questions in, their keys out; equal questions of a range are stored once."""
        ranges: dict[str, dict[str, Any]] = defaultdict(dict)
        for row in batch.to_pylist():
            ranges[row["range"]].setdefault(row["key"], row)
        for name, rows in ranges.items():
            with Answers(self._store, name) as answers:
                for key in rows.keys() - answers.find(list(rows)).keys():
                    answers.add(key, self._read(rows[key]), rows[key]["record"])
        return pa.table({"key": [key for rows in ranges.values() for key in rows]})

    def _read(self, row: Mapping[str, Any]) -> Answer | Unusable:
        read, written = (row.get(name) or 0 for name in ("input_tokens", "output_tokens"))
        price = self._prices.of(read, written)
        usage = Usage(read, written, price, row.get("seconds") or 0.0)
        if row.get(_ERROR):
            return Unusable(f"{self._who}: {' '.join(str(row[_ERROR]).split())}", usage)
        text = row.get("answer") or ""
        if not text.strip():
            return Unusable(f"{self._who}: answered nothing", usage)
        if row.get("output_tokens") and row["output_tokens"] >= (row.get("max_tokens") or 1 << 30):
            return Unusable(
                f"{self._who}: the answer was cut off (calls.max_tokens is too small)", usage
            )
        return Answer(clean_text(text), usage)


def answer_beforehand(
    ranges: ray.data.Dataset,
    records: Callable[[dict[str, Any]], Iterator[pa.Table]],
    steps: Sequence[Step],
    model: CalledModel,
    engine: EngineOptions,
    *,
    workers: int,
    reasks: int,
) -> None:
    """Have everything answered that steps will ask, if they ask a local model; else do nothing.

    Args:
        ranges: what is to be asked about; it is read once or twice a round.
        records: from a range to what the first step reads.
        steps: as of :class:`AskInTurn`.
        model: which the steps ask.
        engine: how it runs.
        workers: processes that collect questions.
        reasks: how often a step asks again.

    Raises:
        DimError: vLLM is not there, or questions are still open after so many rounds.
    """
    if designers.engine_model(model.spec) is None:
        return

    def questions() -> ray.data.Dataset:
        return ranges.map_batches(
            CollectQuestions,
            fn_constructor_args=(steps, model, records),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_format="pyarrow",
            batch_size=1,
        )

    rounds = len(steps) * (reasks + 1)  # so often a record may ask, one after another
    process = vllm(model.spec, model.calls, engine)
    for _ in range(rounds):
        if not questions().count():  # an engine takes minutes to start: not for nothing
            return
        answered = process(questions()).map_batches(
            StoreAnswers,
            fn_constructor_args=(model.spec, model.calls, model.store),
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_format="pyarrow",
        )
        answered.count()
    left = questions().count()
    if left:
        raise DimError(f"{model.spec} left {left} questions open after {rounds} rounds")


def vllm(spec: str, calls: CallOptions, options: EngineOptions) -> Process:
    """The model ``spec`` in vLLM, over as many GPUs as ``options`` say.

    Raises:
        DimError: vLLM is not installed.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise DimError(f"{spec} needs vLLM, which is not installed: pip install 'ray[llm]'")
    from ray.data.llm import build_processor

    return build_processor(
        engine_config(spec, options),
        preprocess=partial(_to_engine, calls=calls),
        postprocess=partial(_from_engine, max_tokens=calls.max_tokens),
    )


def engine_config(spec: str, options: EngineOptions) -> Any:
    """The ``ray.data.llm.vLLMEngineProcessorConfig`` of a model that reads images.

    One record that vLLM cannot answer becomes that record's error.
    """
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=designers.engine_model(spec),
        engine_kwargs=dict(options.engine_kwargs),
        batch_size=options.batch_size,
        concurrency=options.replicas,
        accelerator_type=options.accelerator_type,
        should_continue_on_error=True,
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai"},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A question in the form of OpenAI's chat API."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["text"]}]}]


def _to_engine(row: Mapping[str, Any], calls: CallOptions) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": calls.temperature, "max_tokens": calls.max_tokens}
    if row["schema"]:
        sampling["structured_outputs"] = {"json": row["schema"]}
    return {"messages": messages_of(row), "sampling_params": sampling}


def _from_engine(row: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    return {
        "range": row["range"],
        "key": row["key"],
        "record": row["record"],
        "answer": row["generated_text"],
        "input_tokens": row["num_input_tokens"],
        "output_tokens": row["num_generated_tokens"],
        "max_tokens": max_tokens,
        "seconds": row["time_taken_llm"],
    }
