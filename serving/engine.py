"""The painting thread: between two steps jobs join, and leave when done, cancelled or too late.

No event loop and no Ray here: ``submit`` and ``cancel`` may be called from any thread, and what
comes of a job is told by a callback on the painting thread.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import torch
from PIL import Image

from dim.errors import DimError
from dim.model import DIM
from dim.model.continuous import ContinuousBatch
from dim.model.paint import Painting
from serving.encoding import Output
from serving.errors import NotReadyError, TooLargeError
from serving.jobs import EditJob, GenerateJob
from serving.tracing import is_traced, record_step

logger = logging.getLogger("ray.serve")

STEP_AT_MOST_S = 60.0
"""How long the end of a process waits for a step."""


@dataclass(frozen=True)
class Partial:
    """The ``number``-th preview of an image, counted from 0."""

    number: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """A painted image, and how many images at most shared one of its passes.

    ``waited_s``, ``painted_s``: as of ``Painted``.
    """

    image: Image.Image
    batch_size: int
    waited_s: float
    painted_s: float


@dataclass(frozen=True)
class Load:
    """How busy the painter is.

    ``steps``: how many it has done since it started, however many images took part in each.
    ``running``: images that take part in the next one. ``waiting``: those that cannot yet.
    """

    steps: int
    running: int
    waiting: int


Event = Partial | Finished | Exception
OnStep = Callable[[Load, float], None]


@dataclass(eq=False)
class Ticket:
    """A job in the engine, the ``number``-th that was submitted."""

    number: int
    job: EditJob | GenerateJob
    source: Image.Image | None
    deliver: Callable[[Event], None]
    megapixels: float
    painting: Painting | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    begun: float | None = None
    context: Context = field(default_factory=copy_context)
    """Of the request: its id stands in what is logged within, and its trace has the steps."""
    traced: bool = field(default_factory=is_traced)
    previews: list[int] = field(default_factory=list)
    """After which steps previews are due."""

    @property
    def late(self) -> bool:
        """Whether nobody waits for the job any longer."""
        return self.job.deadline is not None and time.time() >= self.job.deadline

    @property
    def place(self) -> tuple[bool, int]:
        """In which order jobs are painted: batch jobs last, else as they came."""
        return self.job.batch, self.number


class Engine:
    """Paints jobs on a thread of its own.

    Args:
        model: used by that thread alone.
        max_batch_size: images that take part in a step.
        max_megapixels: of all of them together, as they are painted; an image that has more is
            painted alone. ``None``: as many as there are.
        on_step: called after every step, with the load and how long it took in seconds.
    """

    def __init__(
        self,
        model: DIM,
        *,
        max_batch_size: int,
        max_megapixels: float | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self._model = model
        self._max_batch_size = max_batch_size
        self._max_megapixels = max_megapixels
        self._on_step = on_step
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._stopped = False
        self._submitted = 0
        # Of the painting thread alone:
        self._batch = ContinuousBatch(model.painter, model.adapters)
        self._running: list[Ticket] = []
        self._steps = 0
        self._full = False  # the device's memory: nobody joins until somebody leaves
        self._thread = threading.Thread(target=self._paint, name="painting", daemon=True)
        self._thread.start()

    def submit(
        self,
        job: EditJob | GenerateJob,
        source: Image.Image | None,
        deliver: Callable[[Event], None],
    ) -> Ticket:
        """Queue ``job``, an edit with its decoded ``source``.

        ``deliver`` is called on the painting thread: with each preview, and at last with the image
        or with what went wrong. Nothing comes of a job that was cancelled.

        Raises:
            NotReadyError: the painting thread has ended.
        """
        with self._changed:
            if self._stopped:
                raise NotReadyError("this painter does not paint any more; try again")
            self._submitted += 1
            ticket = Ticket(self._submitted, job, source, deliver, self._megapixels(job))
            ticket.previews = preview_steps(job.steps, job.previews)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take a job out before the next step; a finished one stays finished."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """End the painting thread after the step it is doing; what is not finished fails.

        Waits for that step: a process that ends in the middle of one is aborted.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout=STEP_AT_MOST_S)

    def finish(self) -> None:
        """Paint what was submitted, then ``stop``."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._waiting or self._running))
        self.stop()

    def load(self) -> Load:
        """How busy the painter is at the moment."""
        return Load(self._steps, len(self._running), len(self._waiting))

    def check(self) -> None:
        """Raise when nothing can be painted any more.

        A GPU that failed once fails at every operation until its process ends, and one that hangs
        lets this call hang.
        """
        if not self._thread.is_alive():
            raise NotReadyError("the painting thread has ended")
        if float(torch.ones(1, device=self._model.device) + 1) != 2:
            raise NotReadyError("the device computes wrongly")

    def _paint(self) -> None:
        try:
            while self._wait():
                self._leave_unwanted()
                self._join()
                self._step()
                self._finish()
                with self._changed:
                    self._changed.notify_all()
        except BaseException:
            logger.exception("the painting thread has failed")
        with self._changed:
            self._stopped = True
            left = [*self._running, *self._waiting]
        for ticket in left:
            ticket.deliver(NotReadyError("the painter was stopped; try again"))

    def _wait(self) -> bool:
        """Wait for something to do; False when there will be nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopped)
            return not self._stopped

    def _leave_unwanted(self) -> None:
        with self._changed:
            unwanted = [ticket for ticket in self._waiting if ticket.cancelled or ticket.late]
            for ticket in unwanted:
                self._waiting.remove(ticket)
        for ticket in [ticket for ticket in self._running if ticket.cancelled or ticket.late]:
            self._leave(ticket)
            unwanted.append(ticket)
        for ticket in unwanted:
            if not ticket.cancelled:
                ticket.deliver(TimeoutError("the request took too long and was given up"))

    def _join(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                ticket.begun = ticket.begun or time.monotonic()
                ticket.painting = ticket.painting or self._begin(ticket)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) and self._running:
                    self._full = True
                    self._wait_again(ticket)
                else:
                    self._fail(ticket, error)
            else:
                self._batch.join(ticket.painting.denoising)
                self._running.append(ticket)

    def _next(self) -> Ticket | None:
        """The next job that there is room for, off the queue.

        A batch job that is in the way of one that somebody waits for is set aside, as it stands.
        """
        with self._changed:
            first = min(self._waiting, key=lambda ticket: ticket.place, default=None)
            if first is None or self._full:
                return None
            while not self._fits(first):
                last = max(self._running, key=lambda ticket: ticket.place)
                if first.job.batch or not last.job.batch:
                    return None
                self._leave(last)
                self._waiting.append(last)
            self._waiting.remove(first)
            return first

    def _fits(self, ticket: Ticket) -> bool:
        if not self._running:
            return True
        megapixels = ticket.megapixels + sum(other.megapixels for other in self._running)
        return len(self._running) < self._max_batch_size and (
            self._max_megapixels is None or megapixels <= self._max_megapixels
        )

    def _begin(self, ticket: Ticket) -> Painting:
        job = ticket.job
        for other in self._running:
            # Several images of one request: what is prepared of one is that of all.
            if other.painting is not None and _but_for_the_seed(other.job) == _but_for_the_seed(
                job
            ):
                return other.painting.again(job.seed)
        if isinstance(job, GenerateJob):
            return self._model.begin_generation(
                job.prompt,
                size=job.size,
                seed=job.seed,
                steps=job.steps,
                guidance_scale=job.guidance_scale,
                negative_prompt=job.negative_prompt,
                adapter=job.adapter,
            )
        assert ticket.source is not None
        return self._model.begin_edit(
            ticket.source,
            job.text,
            seed=job.seed,
            steps=job.steps,
            guidance_scale=job.guidance_scale,
            negative_prompt=job.negative_prompt,
            fit=job.fit,
            adapter=job.adapter,
        )

    def _step(self) -> None:
        if not self._running:
            return
        started, began_ns = time.perf_counter(), time.time_ns()
        failed = self._batch.step()
        self._steps += 1
        for ticket in self._running:
            if ticket.traced:
                number = _painting(ticket).denoising.number
                record_step(ticket.context, began_ns, number, len(self._running))
        if self._on_step is not None:
            self._on_step(self.load(), time.perf_counter() - started)
        for ticket in list(self._running):
            error = failed.get(_painting(ticket).denoising)
            if error is not None:
                self._leave(ticket)
                self._fail(ticket, error)
            elif _painting(ticket).denoising.number in ticket.previews:
                self._preview(ticket)

    def _preview(self, ticket: Ticket) -> None:
        painting = _painting(ticket)
        try:
            image = painting.preview()
        except Exception:
            logger.exception("a preview failed; its image goes on")
        else:
            ticket.deliver(Partial(ticket.previews.index(painting.denoising.number), image))

    def _finish(self) -> None:
        for ticket in [ticket for ticket in self._running if _painting(ticket).denoising.done]:
            self._leave(ticket)
            try:
                image = _painting(ticket).image()
            except Exception as error:
                self._fail(ticket, error)
            else:
                ticket.deliver(finished(ticket, image))

    def _leave(self, ticket: Ticket) -> None:
        self._running.remove(ticket)
        self._batch.leave(_painting(ticket).denoising)
        self._full = False

    def _wait_again(self, ticket: Ticket) -> None:
        with self._changed:
            self._waiting.append(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            error = TooLargeError(
                f"an image of {ticket.megapixels:.2g} megapixels does not fit into the painter's "
                "memory; ask for a smaller one"
            )
        elif not isinstance(error, DimError):
            ticket.context.run(logger.error, "an image could not be painted", exc_info=error)
            error = RuntimeError(f"{type(error).__name__}: {error}")
        ticket.deliver(error)

    def _megapixels(self, job: EditJob | GenerateJob) -> float:
        """As it is painted: every shape of an edit has about the area of the model's square."""
        resolution = self._model.config.sampling.resolution
        width, height = job.size if isinstance(job, GenerateJob) else (resolution, resolution)
        return width * height / 1e6


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which steps ``previews`` previews are due, spread evenly, the last step left out."""
    due = {round(steps * number / (previews + 1)) for number in range(1, previews + 1)}
    return sorted(due - {0, steps})


def finished(ticket: Ticket, image: Image.Image) -> Finished:
    """What comes of a job that was painted."""
    begun = ticket.begun or ticket.submitted
    waited, painted = begun - ticket.submitted, time.monotonic() - begun
    return Finished(image, _painting(ticket).denoising.company, waited, painted)


def _painting(ticket: Ticket) -> Painting:
    """Of a job that is being painted."""
    assert ticket.painting is not None
    return ticket.painting


def _but_for_the_seed(job: EditJob | GenerateJob) -> EditJob | GenerateJob:
    """What of a job decides on conditions and steps."""
    job = dataclasses.replace(job, seed=0, deadline=None, previews=0, output=Output(), batch=False)
    return dataclasses.replace(job, mask=None) if isinstance(job, EditJob) else job
