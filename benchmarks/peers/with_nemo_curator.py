"""NeMo Curator: its reader of tars (DALI on the CPU), and stages of ours on its batches."""

import asyncio
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import imagehash
import numpy as np
import pandas as pd
from nemo_curator.backends.ray_data import RayDataExecutor
from nemo_curator.models.client.openai_client import AsyncOpenAIClient
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.file_partitioning import FilePartitioningStage
from nemo_curator.stages.image.io.image_reader import ImageReaderStage
from nemo_curator.stages.text.io.reader import JsonlReader
from nemo_curator.stages.text.io.writer import ParquetWriter
from nemo_curator.tasks import DocumentBatch, ImageBatch
from nvidia import dali
from PIL import Image

MIN_SIDE, MAX_ASPECT = 256, 3.0
PER_FILE = 128
CLUSTER = """
import ray, sys
context = ray.init(num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def prepare(inputs: Path) -> None:
    """Its partitions are files: tars of the pictures, and questions in several files."""
    files = sorted((inputs / "files").iterdir())
    lines = (inputs / "prompts.jsonl").read_text().splitlines(keepends=True)
    for name in ("tars", "prompts"):
        (inputs / name).mkdir()
    for first in range(0, len(files), PER_FILE):
        with tarfile.open(inputs / f"tars/{first:06}.tar", "w") as tar:
            for file in files[first : first + PER_FILE]:
                tar.add(file, file.name)
    for first in range(0, len(lines), PER_FILE):
        (inputs / f"prompts/{first:06}.jsonl").write_text("".join(lines[first : first + PER_FILE]))


def start(processes: int) -> None:
    """A Ray apart from this process: on another it does not go on from its checkpoints.

    Its own ``RayClient`` looks for it where the name of this machine leads, which may be a loopback
    address that Ray does not listen at. Ray shows no token at an address that it is given, and asks
    for one where somebody has ever made one.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", CLUSTER, str(min(processes, os.cpu_count() or 1))]
    cluster = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.environ["RAY_ADDRESS"] = cluster.stdout.readline().strip()


class OnTheCPU(ImageReaderStage):
    """Its reader, which asks DALI for a GPU also where it decodes on the CPU."""

    def _create_dali_pipeline(self, tar_paths: list[str]) -> object:
        plain = dali.pipeline_def
        without = mock.patch.object(
            dali, "pipeline_def", lambda **given: plain(**given | {"device_id": None})
        )
        with without:
            return super()._create_dali_pipeline(tar_paths)


@dataclass
class Hash(ProcessingStage[ImageBatch, DocumentBatch]):
    """Hash, and keep the pictures that have one; it calls them by tar and place."""

    name: str = "hash"

    def process(self, batch: ImageBatch) -> DocumentBatch:
        """Pixels in, ids and hashes out."""
        rows = [
            (f"p{sum(map(int, image.image_id.split('_'))):06}", hash_of(image.image_data))
            for image in batch.data
        ]
        hashed = [row for row in rows if row[1] is not None]
        return DocumentBatch("hashes", pd.DataFrame(hashed, columns=["id", "hash"]))


def hash_of(pixels: np.ndarray) -> str | None:
    """The perceptual hash of a picture; ``None`` if it is too small or too long."""
    short, long = sorted(pixels.shape[:2])
    fits = short >= MIN_SIDE and long <= MAX_ASPECT * short
    return str(imagehash.phash(Image.fromarray(pixels))) if fits else None


@dataclass
class Ask(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Ask about every row."""

    url: str
    in_flight: int
    name: str = "ask"

    def num_workers(self) -> int:
        """One, which has all that is in flight."""
        return 1

    def process(self, batch: DocumentBatch) -> DocumentBatch:
        """Questions in, answers beside them out."""
        frame = batch.to_pandas()
        frame["answer"] = asyncio.run(self._answers(frame["prompt"]))
        return DocumentBatch(batch.dataset_name, frame)

    async def _answers(self, prompts: pd.Series) -> list[str]:
        client = AsyncOpenAIClient(self.in_flight, base_url=self.url, api_key="none")
        client.setup()
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        calls = (client.query_model(messages=messages, model="m") for messages in asked)
        return [answer for [answer] in await asyncio.gather(*calls)]


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """Read, hash, write."""
    files = FilePartitioningStage(f"{inputs}/tars", files_per_partition=1, file_extensions=[".tar"])
    _run([files, OnTheCPU(num_threads=1), Hash(), ParquetWriter(f"{out}/data")], out)


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """Read, ask, write."""
    _run([JsonlReader(f"{inputs}/prompts"), Ask(url, in_flight), ParquetWriter(f"{out}/data")], out)


def _run(stages: list[ProcessingStage], out: Path) -> None:
    Pipeline("peers", stages=stages).run(RayDataExecutor(), checkpoint_path=out / "done")
