"""Daft on its own runner: its own expressions (its checkpoints are for its Ray runner alone)."""

from pathlib import Path

import daft
from daft import col
from daft.ai.openai.provider import OpenAIProvider
from daft.functions import decode_image, image_hash, image_height, image_width, prompt

MIN_SIDE, MAX_ASPECT = 256, 3.0


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """Decode, look at the shape, hash, and write the rows that are left."""
    frame = daft.read_parquet(f"{inputs}/data/*.parquet")
    frame = frame.with_column("picture", decode_image(col("image"), on_error="null"))
    width, height = image_width(col("picture")), image_height(col("picture"))
    frame = frame.where((width >= MIN_SIDE) & (height >= MIN_SIDE))
    frame = frame.where((width <= MAX_ASPECT * height) & (height <= MAX_ASPECT * width))
    frame = frame.with_column("hash", image_hash(col("picture"), method="phash"))
    frame.exclude("picture").write_parquet(f"{out}/data", write_mode="overwrite")


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """Ask about every row by its own ``prompt``, as many at once as it sees fit."""
    provider = OpenAIProvider(base_url=url, api_key="none")
    frame = daft.read_json(f"{inputs}/prompts.jsonl")
    answer = prompt(col("prompt"), provider=provider, model="m", use_chat_completions=True)
    frame.with_column("answer", answer).write_parquet(f"{out}/data", write_mode="overwrite")
