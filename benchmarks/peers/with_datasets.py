"""``datasets.map``: what is done to a row is a function of ours."""

import asyncio
from pathlib import Path

import datasets
from openai import AsyncOpenAI, DefaultAioHttpClient
from picture import hash_of

datasets.disable_progress_bars()


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """Hash, and keep the rows that have one."""
    data = _load(f"{inputs}/data/*.parquet", "parquet", out)
    hashed = data.map(lambda row: {"hash": hash_of(row["image"])}, num_proc=processes)
    kept = hashed.filter(lambda value: value is not None, input_columns="hash")
    (out / "data").mkdir(exist_ok=True)
    kept.to_parquet(str(out / "data/part.parquet"))


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """Ask about every row; ``map`` runs coroutines of a batch at once."""
    client = AsyncOpenAI(base_url=url, api_key="none", http_client=DefaultAioHttpClient())
    gate = asyncio.Semaphore(in_flight)

    async def answer(row: dict) -> dict:
        async with gate:
            reply = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": row["prompt"]}]
            )
        return {"answer": reply.choices[0].message.content}

    answered = _load(f"{inputs}/prompts.jsonl", "json", out).map(answer, new_fingerprint="answers")
    (out / "data").mkdir(exist_ok=True)
    answered.to_parquet(str(out / "data/part.parquet"))


def _load(files: str, kind: str, out: Path) -> datasets.Dataset:
    return datasets.load_dataset(kind, data_files=files, split="train", cache_dir=f"{out}/cache")
