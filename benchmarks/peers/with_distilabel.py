"""distilabel: a pipeline of steps in processes of their own, with its cache."""

from pathlib import Path

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromFileSystem, StepInput, StepResources, step
from distilabel.steps.tasks import TextGeneration
from picture import hash_of


@step(inputs=["images"], outputs=["hash"])
def hashed(inputs: StepInput):
    """Hash, and keep the rows that have one; JSON goes between steps, so no bytes of pictures."""
    for row in inputs:
        row["hash"] = hash_of(Path(row["images"][0]).read_bytes())
    yield [row for row in inputs if row["hash"] is not None]


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """Run the step in as many processes."""
    with Pipeline("filter", cache_dir=out / "cache") as pipeline:
        load = LoadDataFromFileSystem(data_files=f"{inputs}/images.jsonl")
        load >> hashed(resources=StepResources(replicas=processes))
    _write(pipeline, out)


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """Ask about every row, a batch of ``in_flight`` at once."""
    with Pipeline("ask", cache_dir=out / "cache") as pipeline:
        load = LoadDataFromFileSystem(
            data_files=f"{inputs}/prompts.jsonl", output_mappings={"prompt": "instruction"}
        )
        llm = OpenAILLM(model="m", base_url=url, api_key="none")
        load >> TextGeneration(
            llm=llm, input_batch_size=in_flight, output_mappings={"generation": "answer"}
        )
    _write(pipeline, out)


def _write(pipeline: Pipeline, out: Path) -> None:
    data = pipeline.run(use_cache=True)["default"]["train"]
    (out / "data").mkdir(exist_ok=True)
    data.to_parquet(str(out / "data/part.parquet"))
