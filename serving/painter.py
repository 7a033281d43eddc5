"""The painter deployment: every image joins and leaves the painter's batch at any step."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image
from ray.serve import metrics

from dim import model as models
from dim.devices import best_device
from dim.errors import CheckpointError
from dim.images import decode_image
from dim.model import DIM
from dim.model.framing import composite
from dim.model.lora.merge import hashes
from infra.models import adapter_here, on_this_machine
from serving.config import ServingConfig
from serving.encoding import Output, encode
from serving.engine import Engine, Event, Load, Partial
from serving.jobs import Defaults, EditJob, GenerateJob, Painted, Preview
from serving.release import Holder, Release, Served, find_release
from serving.shipping import received
from serving.signing import open_signer
from serving.usage import image_tokens, text_tokens

logger = logging.getLogger("ray.serve")

FILE_WORKERS = 4
STEP_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
BATCH_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class PainterDeployment:
    """Holds one DIM and paints with it, on a thread of its own."""

    def __init__(
        self, config: ServingConfig, release: Release | None = None, key: str = ""
    ) -> None:
        self._config, self._key = config, key
        self._files = ThreadPoolExecutor(FILE_WORKERS, thread_name_prefix="files")
        self._on_step = StepMetrics()
        self._sign = open_signer(config.signing)
        self._as_it_is: Defaults | None = None
        first = release or find_release(config.model)
        self._engines: list[Engine] = []
        weakref.finalize(self, stop_all, self._engines)  # at the latest when the process ends
        self._holder = Holder(key, first, self._ready, self._retire)
        self._as_it_is = self.defaults()

    def defaults(self) -> Defaults:
        """What the model does unless a request says otherwise."""
        held = self._holder.held
        return defaults_of(held.model.model, held.release)

    def served(self) -> Served:
        """What ``dim serve rollout`` has to know."""
        return Served(self._config.model, self._holder.held.release, self._key)

    async def prepare(self, release: Release) -> None:
        """Load and try ``release`` beside the model that paints.

        Raises:
            DimError: it cannot be served in its place; nothing has changed.
        """
        await asyncio.to_thread(self._holder.prepare, release)

    async def adopt(self, release: Release) -> None:
        """Paint with ``release`` what comes from now on; what was begun is painted to its end."""
        await asyncio.to_thread(self._holder.adopt, release)

    async def discard(self) -> None:
        """Let go of what was prepared."""
        await asyncio.to_thread(self._holder.discard)

    def _ready(self, release: Release) -> Easel:
        """The model of ``release``, which has painted."""
        lora = [adapter_here(spec) for spec in self._config.lora]
        model = models.load(
            on_this_machine(release.address),
            device=best_device(),
            dtype=self._config.dtype,
            lora=lora,
        )
        if self._as_it_is is not None:
            require_same_use(self._as_it_is, defaults_of(model, release))
        if self._config.adapters:
            specs = {name: adapter_here(spec) for name, spec in self._config.adapters.items()}
            adapters = model.add_adapters(specs)
            for name, size in adapters.bytes.items():
                logger.info("adapter %s takes %.1f MB", name, size / 1e6)
        model.speed_up(int8=self._config.int8, step_cache=self._config.step_cache)
        warm_up(model)
        engine = Engine(
            model,
            max_batch_size=self._config.max_batch_size,
            max_megapixels=self._config.max_batch_megapixels,
            on_step=self._on_step,
        )
        self._engines.append(engine)
        return Easel(model, engine, hashes(lora))

    def _retire(self, easel: Easel) -> None:
        easel.engine.finish()
        self._engines.remove(easel.engine)

    def warm(self) -> None:
        """Return once it has painted: at once, for it has when it answers."""

    def load(self) -> Load:
        """How busy this replica is."""
        return self._holder.held.model.engine.load()

    async def check_health(self) -> None:
        """Raise when the device or the painting thread is dead; Serve then replaces the replica."""
        self._holder.follow_soon()
        await asyncio.to_thread(self._holder.held.model.engine.check)

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
        source = mask = None
        if isinstance(job, EditJob):
            job = replace(job, image=await received(job.image))
            source, mask = await loop.run_in_executor(self._files, opened, job)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        # Now and not before: what is painted last while another model takes over is submitted.
        held = self._holder.held
        engine = held.model.engine
        output = signed(job.output, held.release, held.model.lora)
        as_file = partial(file_of, output=output, source=source, mask=mask)
        ticket = engine.submit(job, source, deliver)
        try:
            # Beside the first steps, so that no image waits for it.
            texts = texts_of(job)
            counted = loop.run_in_executor(self._files, text_tokens, held.model.model, texts)
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                data = await loop.run_in_executor(self._files, as_file, event.image)
                if not isinstance(event, Partial):
                    if self._sign is not None:
                        signing = partial(self._sign, data, output, source is not None)
                        data = await loop.run_in_executor(self._files, signing)
                    yield Painted(
                        data,
                        event.batch_size,
                        await counted,
                        held.release.name,
                        waited_s=event.waited_s,
                        painted_s=event.painted_s,
                    )
                    return
                yield Preview(event.number, data)
        finally:
            engine.cancel(ticket)


@dataclass(frozen=True)
class Easel:
    """A model, and the engine that paints with it. ``lora``: the adapters merged into it."""

    model: DIM
    engine: Engine
    lora: str


def stop_all(engines: Sequence[Engine]) -> None:
    """End the threads that paint."""
    for engine in engines:
        engine.stop()


def defaults_of(model: DIM, release: Release) -> Defaults:
    """What ``model`` does unless a request says otherwise."""
    sampling = model.config.sampling
    return Defaults(
        resolution=sampling.resolution,
        size_multiple=model.cell,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        image_tokens=image_tokens(model),
        edits=model.painter.takes_source,
        release=release.name,
        model_hash=release.model_hash,
    )


def require_same_use(served: Defaults, other: Defaults) -> None:
    """Refuse a model with which requests that this server takes would mean something else.

    Raises:
        CheckpointError: says what differs.
    """
    for said, field in (
        ("paints squares of {} px", "resolution"),
        ("has cells of {} px", "size_multiple"),
        ("sees a source as {} tokens", "image_tokens"),
        ("can edit: {}", "edits"),
    ):
        mine, theirs = getattr(served, field), getattr(other, field)
        if mine != theirs:
            raise CheckpointError(
                f"{other.release} {said.format(theirs)}, and the model that is served: {mine}; "
                "a server of its own can serve it"
            )


def signed(output: Output, release: Release, lora: str = "") -> Output:
    """``output``, whose file says what painted it: the model, and the adapters merged into it."""
    said = dict(output.metadata) | {"release": release.name, "model_hash": release.model_hash}
    said |= {"lora": lora} if lora else {}
    return replace(output, metadata=tuple(said.items()))


def warm_up(model: DIM) -> None:
    """Paint one image of the model's own size in one step, so that no request is the first.

    What does not work is known before the replica counts as ready: weights, device, memory.
    """
    side = model.config.sampling.resolution
    if model.painter.takes_source:
        model.edit([Image.new("RGB", (side, side))], ["warm up"], steps=1)
    else:
        model.generate(["warm up"], steps=1)


def opened(job: EditJob) -> tuple[Image.Image, Image.Image | None]:
    """The decoded source of a job that was received, and its mask, if it has one."""
    assert isinstance(job.image, bytes)
    return decode_image(job.image), None if job.mask is None else decode_mask(job.mask)


def texts_of(job: EditJob | GenerateJob) -> list[str]:
    """What the understanding model reads for an image."""
    return [job.text if isinstance(job, EditJob) else job.prompt, job.negative_prompt or ""]


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
