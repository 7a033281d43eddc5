"""Data-Juicer: operators named in a recipe, with its checkpoints."""

import os
from pathlib import Path

import yaml
from data_juicer.config import init_configs
from data_juicer.core import DefaultExecutor
from picture import hash_of

MIN_SIDE, MAX_ASPECT = 256, 3.0


def hashed(sample: dict) -> dict:
    """Hash a picture; one that cannot be read has none."""
    return {**sample, "hash": hash_of(Path(sample["images"][0]).read_bytes())}


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """Two filters, and a function of ours: its own hash loads weights of a network from the web."""
    shape = {"min_width": MIN_SIDE, "min_height": MIN_SIDE}
    aspect = {"min_ratio": 1 / MAX_ASPECT, "max_ratio": MAX_ASPECT}
    operators = [
        {"image_shape_filter": shape},
        {"image_aspect_ratio_filter": aspect},
        {"python_file_mapper": {"file_path": __file__, "function_name": "hashed"}},
    ]
    _run(f"{inputs}/images.jsonl", out, processes, operators)


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """Its mapper that corrects an answer: every process waits for one call at a time."""
    operator = {
        "api_model": "m",
        "query_key": "prompt",
        "response_key": "answer",
        "system_prompt": "Answer.",
        "input_template": "{reference}{qa_pair}",
        "reference_template": "{}",
        "qa_pair_template": "{0:.0}{1:.0}",
        "model_params": {"base_url": url, "api_key": "none"},
    }
    _run(f"{inputs}/prompts.jsonl", out, in_flight, [{"calibrate_response_mapper": operator}])


def _run(data: str, out: Path, processes: int, operators: list[dict]) -> None:
    os.environ["DATA_JUICER_CACHE_HOME"] = f"{out}/cache"
    recipe = {
        "project_name": "peers",
        "dataset_path": data,
        "export_path": f"{out}/data/part.jsonl",
        "work_dir": f"{out}/work",
        "np": processes,
        "text_keys": "prompt",
        "use_checkpoint": True,
        "auto_op_parallelism": False,
        "open_tracer": False,
        "process": operators,
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    DefaultExecutor(init_configs(["--config", f"{out}/recipe.yaml"])).run()
