"""The painting thread: who joins, who leaves, and what each of them is told."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dim import model as models
from dim.errors import DimError, InputError
from dim.model import DIM
from serving.engine import Engine, Event, Finished, Load, Partial, Ticket, preview_steps
from serving.errors import NotReadyError, TooLargeError
from serving.jobs import EditJob, GenerateJob

JOB = GenerateJob(prompt="a red circle", size=(64, 64), seed=1, steps=4, guidance_scale=1.0)
LONG = replace(JOB, steps=100_000)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> DIM:
    return models.load(tiny_model_dir)


class Painting:
    """An engine whose every step waits until it is let through, and what its jobs were told."""

    def __init__(self, model: DIM, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.model = model
        self.allowed = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.stepped: queue.Queue[Load] = queue.Queue()
        self.engine = Engine(model, on_step=self._on_step, **{"max_batch_size": 4, **options})
        step = self.engine._batch.step

        def held() -> dict:
            self.allowed.acquire()
            return step()

        monkeypatch.setattr(self.engine._batch, "step", held)

    def _on_step(self, load: Load, seconds: float) -> None:
        assert seconds > 0
        self.sizes.append(load.running)
        self.stepped.put(load)

    def submit(self, job: EditJob | GenerateJob, source: Image.Image | None = None) -> Asked:
        return Asked(self.engine, job, source)

    def step(self, count: int = 1) -> Load:
        """Let steps through, and wait until the last of them is done."""
        self.allowed.release(count)
        return [self.stepped.get(timeout=20) for _ in range(count)][-1]

    def let_go(self) -> None:
        self.allowed.release(10**6)


class Asked:
    """A submitted job and its events."""

    def __init__(self, engine: Engine, job: EditJob | GenerateJob, source: Image.Image | None):
        self.events: queue.Queue[Event] = queue.Queue()
        self.ticket: Ticket = engine.submit(job, source, self.events.put)

    def told(self) -> Event:
        return self.events.get(timeout=20)

    def image(self) -> Image.Image:
        event = self.told()
        assert isinstance(event, Finished), event
        return event.image


@pytest.fixture
def painting(model: DIM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Painting]]:
    """Makes engines, and ends them."""
    made: list[Painting] = []

    def make(**options: Any) -> Painting:
        made.append(Painting(model, monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.let_go()
        one.engine.stop()
        assert not one.engine._thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_jobs_of_all_kinds_share_steps_and_are_what_they_are_alone(
    painting: Callable[..., Painting], model: DIM
) -> None:
    at_work = painting()
    edit = EditJob(
        image=b"", text="remove it", fit="source", seed=3, steps=3, guidance_scale=3.0,
        negative_prompt="blurred",
    )  # fmt: skip
    first = at_work.submit(replace(JOB, seed=7))
    at_work.step(2)
    second, third = at_work.submit(edit, picture(0)), at_work.submit(replace(JOB, size=(64, 32)))
    at_work.let_go()
    drawn = model.generate([JOB.prompt], seeds=[7], steps=4, guidance_scale=1.0)[0]
    edited = model.edit(
        [picture(0)], ["remove it"], seeds=[3], steps=3, guidance_scale=3.0,
        negative_prompt="blurred",
    )[0].image  # fmt: skip
    wide = model.generate([JOB.prompt], size=(64, 32), seeds=[1], steps=4, guidance_scale=1.0)[0]
    for asked, expected in ((first, drawn), (second, edited), (third, wide)):
        assert np.array_equal(asked.image(), expected)
    assert max(at_work.sizes) == 3


def test_images_of_one_request_are_prepared_once(
    painting: Callable[..., Painting], model: DIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    encode = model.conditioner.encode
    monkeypatch.setattr(
        model.conditioner, "encode", lambda *rest: passes.append(rest) or encode(*rest)
    )
    at_work = painting()
    asked = [at_work.submit(replace(JOB, seed=seed)) for seed in range(4)]
    at_work.let_go()
    events = [one.told() for one in asked]
    assert len(passes) == 1
    expected = model.generate([JOB.prompt] * 4, seeds=[0, 1, 2, 3], steps=4, guidance_scale=1.0)
    for event, image in zip(events, expected, strict=True):
        assert isinstance(event, Finished) and event.batch_size == 4
        assert np.abs(np.asarray(event.image, int) - np.asarray(image, int)).max() <= 1


def test_a_cancelled_job_leaves_before_the_next_step(painting: Callable[..., Painting]) -> None:
    at_work = painting()
    kept, left = at_work.submit(LONG), at_work.submit(replace(LONG, seed=2))
    assert at_work.step(3).running == 2
    at_work.engine.cancel(left.ticket)
    # one step may have begun
    at_work.step()
    assert at_work.step().running == 1
    at_work.engine.cancel(kept.ticket)
    at_work.step()
    until(lambda: at_work.engine.load().running == 0)
    steps = at_work.engine.load().steps
    at_work.let_go()
    time.sleep(0.05)
    assert at_work.engine.load().steps == steps
    assert left.events.empty() and kept.events.empty()


def test_a_job_past_its_deadline_is_told_so_and_leaves(painting: Callable[..., Painting]) -> None:
    at_work = painting(max_batch_size=1)
    running = at_work.submit(replace(LONG, deadline=time.time() + 0.2))
    at_work.step()
    waiting = at_work.submit(replace(LONG, deadline=time.time() + 0.2))
    time.sleep(0.25)
    at_work.step()
    for asked in (running, waiting):
        error = asked.told()
        assert isinstance(error, TimeoutError) and "too long" in str(error)
    assert at_work.engine.load().running == 0


def test_no_more_take_part_than_there_are_places(painting: Callable[..., Painting]) -> None:
    at_work = painting(max_batch_size=3)
    asked = [at_work.submit(replace(JOB, seed=seed)) for seed in range(7)]
    assert at_work.step().waiting == 4
    at_work.let_go()
    for one in asked:
        one.image()
    assert max(at_work.sizes) == 3


def test_megapixels_bound_a_batch_and_a_larger_image_is_painted_alone(
    painting: Callable[..., Painting],
) -> None:
    at_work = painting(max_megapixels=2 * 64 * 64 / 1e6)
    sizes = [(64, 64), (64, 64), (64, 32), (128, 128)]
    asked = [at_work.submit(replace(JOB, size=size)) for size in sizes]
    at_work.let_go()
    assert [one.image().size for one in asked] == sizes
    assert at_work.sizes == [2] * 4 + [1] * 8


def test_a_batch_job_steps_aside_and_is_painted_on_from_where_it_stood(
    painting: Callable[..., Painting], model: DIM
) -> None:
    at_work = painting(max_batch_size=1)
    aside = at_work.submit(replace(JOB, batch=True))
    at_work.step(2)
    behind = at_work.submit(replace(JOB, seed=2, batch=True))
    urgent = at_work.submit(replace(JOB, seed=3))
    at_work.let_go()
    images = [one.image() for one in (urgent, aside, behind)]
    assert len(at_work.sizes) == 12
    for seed, image in zip((3, 1, 2), images, strict=True):
        expected = model.generate([JOB.prompt], seeds=[seed], steps=4, guidance_scale=1.0)[0]
        assert np.array_equal(image, expected)
    assert urgent.ticket.painting is not None and aside.events.empty()


def test_previews_come_at_even_steps_and_before_the_image(
    painting: Callable[..., Painting], model: DIM
) -> None:
    seen: list[Image.Image] = []
    model.generate([JOB.prompt], seeds=[1], steps=4, guidance_scale=1.0,
                   on_step=lambda step: seen.extend(step.previews()))  # fmt: skip
    at_work = painting()
    asked = at_work.submit(replace(JOB, previews=3))
    at_work.let_go()
    for number in range(3):
        event = asked.told()
        assert isinstance(event, Partial) and event.number == number
        assert np.array_equal(event.image, seen[number])
    assert np.array_equal(asked.image(), seen[3])


@pytest.mark.parametrize(
    ("steps", "previews", "due"),
    [(20, 0, []), (20, 1, [10]), (20, 3, [5, 10, 15]), (1, 3, []), (2, 3, [1]), (3, 3, [1, 2])],
)
def test_previews_are_spread_over_the_steps(steps: int, previews: int, due: list[int]) -> None:
    assert preview_steps(steps, previews) == due


def test_a_bad_job_fails_alone(painting: Callable[..., Painting]) -> None:
    at_work = painting()
    jobs = [JOB, replace(JOB, prompt=" "), replace(JOB, size=(65, 64)), replace(JOB, steps=0)]
    asked = [at_work.submit(job) for job in jobs]
    at_work.let_go()
    for one in asked[1:]:
        assert isinstance(one.told(), InputError)
    assert asked[0].image().size == (64, 64)


def test_an_image_that_does_not_fit_into_memory_fails_alone_and_is_told_why(
    painting: Callable[..., Painting], model: DIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.painter.forward

    def limited(latent: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if len(latent) > 2 or latent.shape[-1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latent, *rest, **more)

    monkeypatch.setattr(model.painter, "forward", limited)
    at_work = painting()
    sizes = [(64, 64), (64, 64), (128, 128), (64, 64)]
    asked = [at_work.submit(replace(JOB, size=size)) for size in sizes]
    at_work.let_go()
    error = asked[2].told()
    assert isinstance(error, TooLargeError)
    assert "0.016 megapixels does not fit" in str(error)
    for number in (0, 1, 3):
        assert asked[number].image().size == (64, 64)


def test_what_cannot_be_prepared_for_want_of_memory_waits_until_somebody_leaves(
    painting: Callable[..., Painting], model: DIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = painting()
    begin = model.begin_generation

    def crowded(*rest: Any, **more: Any) -> Any:
        if at_work.engine.load().running >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(*rest, **more)

    monkeypatch.setattr(model, "begin_generation", crowded)
    asked = [at_work.submit(replace(JOB, prompt=f"{number} circles")) for number in range(4)]
    at_work.let_go()
    for one in asked:
        assert one.image().size == (64, 64)
    assert max(at_work.sizes) == 2


def test_a_bug_in_one_image_is_told_to_it_alone(
    painting: Callable[..., Painting], model: DIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = model.autoencoder.decode, []

    def broken(latent: torch.Tensor) -> torch.Tensor:
        calls.append(latent)
        if len(calls) == 1:
            raise KeyError("x")
        return decode(latent)

    monkeypatch.setattr(model.autoencoder, "decode", broken)
    at_work = painting()
    asked = [at_work.submit(replace(JOB, seed=seed)) for seed in range(2)]
    at_work.let_go()
    error = asked[0].told()
    assert isinstance(error, RuntimeError) and not isinstance(error, DimError)
    assert "KeyError" in str(error)
    assert asked[1].image().size == (64, 64)


def test_a_painting_thread_that_dies_is_known_and_leaves_nobody_waiting(
    painting: Callable[..., Painting], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = painting(max_batch_size=1)
    at_work.engine.check()

    def die() -> None:
        raise SystemExit

    asked = [at_work.submit(LONG), at_work.submit(LONG)]
    at_work.step()
    monkeypatch.setattr(at_work.engine, "_finish", die)
    at_work.let_go()
    for one in asked:
        assert isinstance(one.told(), NotReadyError)
    at_work.engine._thread.join(timeout=20)
    with pytest.raises(NotReadyError, match="painting thread has ended"):
        at_work.engine.check()
    with pytest.raises(NotReadyError, match="does not paint any more"):
        at_work.submit(JOB)


def test_a_device_that_fails_is_known(
    painting: Callable[..., Painting], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = painting()
    monkeypatch.setattr(
        torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        at_work.engine.check()
