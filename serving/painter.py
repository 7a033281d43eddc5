"""The painter deployment: every image joins and leaves the painter's batch at any step."""

from __future__ import annotations

import asyncio
import contextlib
import io
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image
from ray.serve import metrics

from dim import model as models
from dim.devices import best_device
from dim.images import decode_image
from dim.model import DIM
from dim.model.pixels import composite
from infra.models import fingerprint, on_this_machine
from serving.config import ServingConfig
from serving.encoding import Output, encode
from serving.engine import Engine, Event, Load, Partial
from serving.jobs import Defaults, EditJob, GenerateJob, Painted, PaintJob, Preview
from serving.signing import open_signer
from serving.usage import image_tokens, text_tokens

FILE_WORKERS = 4
STEP_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
BATCH_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class PainterDeployment:
    """Holds one DIM and paints with it, on a thread of its own."""

    def __init__(self, config: ServingConfig) -> None:
        self._model = models.load(
            on_this_machine(config.model),
            device=best_device(),
            dtype=config.dtype,
            lora=config.lora,
        )
        self._model_hash = fingerprint(config.model)
        warm_up(self._model)
        self._engine = Engine(
            self._model,
            max_batch_size=config.max_batch_size,
            max_megapixels=config.max_batch_megapixels,
            on_step=StepMetrics(),
        )
        weakref.finalize(self, self._engine.stop)  # at the latest when the process ends
        self._files = ThreadPoolExecutor(FILE_WORKERS, thread_name_prefix="files")
        self._sign = open_signer(config.signing)

    def defaults(self) -> Defaults:
        """What the model does unless a request says otherwise."""
        sampling = self._model.config.sampling
        return Defaults(
            resolution=sampling.resolution,
            size_multiple=self._model.cell,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            image_tokens=image_tokens(self._model),
            model_hash=self._model_hash,
        )

    def warm(self) -> None:
        """Return once it has painted: at once, for it has when it answers."""

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens that the understanding model reads of ``texts`` together."""
        return text_tokens(self._model, texts)

    def load(self) -> Load:
        """How busy this replica is."""
        return self._engine.load()

    async def check_health(self) -> None:
        """Raise when the device or the painting thread is dead; Serve then replaces the replica."""
        await asyncio.to_thread(self._engine.check)

    async def paint(self, job: EditJob | GenerateJob) -> AsyncIterator[Preview | Painted]:
        """Paint one image: its previews in order, then itself.

        Closing or cancelling this generator takes the image out before the painter's next step.

        Raises:
            InputError: the job is impossible, such as a text that is empty.
            TooLargeError: the image alone does not fit into memory.
            TimeoutError: its deadline has passed.
            NotReadyError: the painter stopped.
        """
        loop = asyncio.get_running_loop()
        source, mask = await loop.run_in_executor(self._files, opened, job)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        as_file = partial(file_of, output=job.output, source=source, mask=mask)
        ticket = self._engine.submit(job, source, deliver)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                data = await loop.run_in_executor(self._files, as_file, event.image)
                if not isinstance(event, Partial):
                    if self._sign is not None:
                        signing = partial(self._sign, data, job.output, source is not None)
                        data = await loop.run_in_executor(self._files, signing)
                    yield Painted(data, event.batch_size, event.waited_s, event.painted_s)
                    return
                yield Preview(event.number, data)
        finally:
            self._engine.cancel(ticket)


def warm_up(model: DIM) -> None:
    """Paint one image of the model's own size in one step, so that no request is the first.

    What does not work is known before the replica counts as ready: weights, device, memory.
    """
    side = model.config.sampling.resolution
    if model.painter.takes_source:
        model.edit([Image.new("RGB", (side, side))], ["warm up"], steps=1)
    else:
        model.generate(["warm up"], steps=1)


def opened(job: PaintJob) -> tuple[Image.Image | None, Image.Image | None]:
    """The decoded source and mask of a job, as far as it has them."""
    if not isinstance(job, EditJob):
        return None, None
    return decode_image(job.image), None if job.mask is None else decode_mask(job.mask)


def decode_mask(data: bytes) -> Image.Image:
    """A job's mask, of mode L."""
    return Image.open(io.BytesIO(data), formats=("PNG",)).convert("L")


def file_of(
    image: Image.Image, *, output: Output, source: Image.Image | None, mask: Image.Image | None
) -> bytes:
    """The file of a painted image; outside of ``mask`` it has the pixels of ``source``."""
    if source is not None and mask is not None:
        image = composite(image, source, mask)
    return encode(image, output)


class StepMetrics:
    """The painter's Prometheus metrics: as of Serve, tagged by deployment, replica, application."""

    def __init__(self) -> None:
        self._steps = metrics.Counter(
            "dim_painter_steps", description="Steps done, however many images took part in each."
        )
        self._batch_size = metrics.Histogram(
            "dim_painter_batch_size",
            description="Images that took part in a step.",
            boundaries=BATCH_SIZES,
        )
        self._seconds = metrics.Histogram(
            "dim_painter_step_seconds",
            description="How long a step took, in seconds.",
            boundaries=STEP_SECONDS,
        )
        self._queue = metrics.Gauge(
            "dim_painter_queue_length", description="Images that wait for a place in the batch."
        )

    def __call__(self, load: Load, seconds: float) -> None:
        self._steps.inc()
        self._batch_size.observe(load.running)
        self._seconds.observe(seconds)
        self._queue.set(load.waiting)
