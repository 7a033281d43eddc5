"""From a checked request to its images: source → blueprint → painted → answer."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ray.serve.handle import DeploymentHandle

from dim import provenance
from dim.blueprint import Blueprint
from dim.design import Reply
from dim.errors import InputError
from dim.images import parse_size
from dim.model.config import Fit
from dim.model.sizes import Size
from dim.redaction import redact
from dim.reflection import Candidate, Reflection
from serving import account
from serving.checks import sections
from serving.config import NO_DESIGNER, ServingConfig
from serving.contributions import Contribution, ContributionRoutes
from serving.encoding import LONGEST_SIDE, Output
from serving.errors import BadRequestError
from serving.events import Tell
from serving.image_store import open_image_store
from serving.jobs import Defaults, DesignJob, EditJob, GenerateJob, Painted, ReviewJob
from serving.names import adapter_of, chosen_adapter
from serving.protocol import (
    MAX_SEED,
    BlueprintDelta,
    BlueprintDone,
    BlueprintResponse,
    Completed,
    EditFields,
    GenerationRequest,
    ImageData,
    ImagesResponse,
    PaintRequest,
    PartialImage,
    Reviewed,
    ReviewEvent,
    Usage,
)
from serving.replicas import Designers, paint, review, write
from serving.requests import Design, Edit
from serving.shipping import received
from serving.sources import Source, read_mask, read_source
from serving.usage import Tokens, painted_tokens
from serving.work import PIXELS, Work, area, check_output, painted_size, source_size, work_of

MOST_UNEVEN = 3
"""Longer side over shorter side of an image whose size is asked for."""


DECODED_AT_ONCE = 2
"""Sources; each may take hundreds of megabytes while it is."""


@dataclass(frozen=True)
class Weighed:
    """What a request costs, and the sizes that this comes of, (width, height) in pixels.

    ``size``: of what is given back; of a blueprint, of the source. ``painted``: that the painter
    works at, the same where nothing is painted. ``fit``: as of an ``EditJob``. ``release``: of
    the model that is served, as far as this replica knows.
    """

    work: Work
    size: Size
    painted: Size
    release: str
    fit: Fit = "source"


@dataclass(frozen=True)
class Painting:
    """What a request comes to.

    ``kind``: how the names of its events begin. ``size``: of the images, in pixels; ``painted``:
    the one that the painter works at.
    """

    kind: Literal["image_edit", "image_generation"]
    jobs: Sequence[EditJob | GenerateJob]
    blueprint: str | None
    size: Size
    painted: Size

    @property
    def size_text(self) -> str:
        """The images' size as a client writes it."""
        return f"{self.size[0]}x{self.size[1]}"


class Studio:
    """Asks designer and painter for what requests want. One an ingress replica."""

    def __init__(
        self,
        config: ServingConfig,
        designer: Designers,
        painter: DeploymentHandle,
        contributions: ContributionRoutes,
    ) -> None:
        self._config = config
        self._designer = designer
        self._painter = painter
        self._contributions = contributions
        self._painter_defaults: Defaults | None = None
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self._images = open_image_store(config)

    def renew(self) -> None:
        """Ask the painter anew what it does unless a request says otherwise."""
        self._painter_defaults = None

    async def weigh(self, asked: Edit | GenerationRequest | Design) -> Weighed:
        """What a request costs, before anything of it is decoded, designed or painted.

        Raises:
            DimError: a field is wrong, or it asks for more than one request may have.
        """
        if isinstance(asked, Design):
            adapter_of(self._config, asked.fields.model)
            release = (await self._defaults()).release
            source = source_size(asked.image, self._config.max_image_pixels)
            work = Work(images=1, megapixels=area(source) / PIXELS)
            return Weighed(work, source, source, release)
        wanted = asked.fields if isinstance(asked, Edit) else asked
        self._check(wanted)
        defaults = await self._defaults()
        steps = self._settings(wanted, defaults)["steps"]
        shape = self._size(wanted.size, defaults)
        square = (defaults.resolution, defaults.resolution)
        if isinstance(asked, GenerationRequest):
            size = shape or square
            check_output(wanted.n, size, self._config.max_output_pixels, "size")
            work = work_of(wanted.n, None, size, size, steps)
            return Weighed(work, size, size, defaults.release)
        source = source_size(asked.image, self._config.max_image_pixels)
        size = shape or source
        check_output(wanted.n, size, self._config.max_output_pixels, "n")
        fit: Fit = "square" if shape == square else "source"
        painted = painted_size(size, fit, defaults)
        self._check_reviewer(asked.fields)
        images = wanted.n * asked.fields.rounds * asked.fields.best_of
        work = work_of(images, source, painted, size, steps)
        return Weighed(work, size, painted, defaults.release, fit)

    async def edit(self, edit: Edit, weighed: Weighed, tell: Tell | None = None) -> ImagesResponse:
        """Edit one image: image → blueprint → painted image.

        Args:
            edit: what is wanted.
            weighed: what ``weigh`` said of it.
            tell: is told what comes about, in events; ``None``: only the answer counts.

        Raises:
            DimError: a field or picture is wrong, or a part failed; see :mod:`serving.errors`.
        """
        wanted = edit.fields
        designer = self._choose_designer(wanted.designer)
        defaults = await self._defaults()
        whole = weighed.fit == "square" or wanted.size == "auto"
        source = await self._source(edit.image, None if whole else weighed.size)
        mask = await self._mask(edit, source)
        output = self._output(wanted, weighed.size, mask=mask is not None)
        blueprint = await self._blueprint(wanted, designer, source, tell)
        settings = self._settings(wanted, defaults)

        def job_of(plan: str | None, seed: int) -> EditJob:
            return EditJob(
                image=source.image,
                text=plan or wanted.prompt,
                fit=weighed.fit,
                mask=mask,
                seed=seed,
                output=self._signed(output, seed, settings, plan),
                **settings,
            )

        jobs = [job_of(blueprint, seed) for seed in seeds(wanted)]
        painting = Painting("image_edit", jobs, blueprint, weighed.size, weighed.painted)
        if wanted.reviewed:
            return await self._paint_in_rounds(wanted, designer, painting, job_of, tell)
        return await self._paint(wanted, painting, tell)

    async def generate(
        self, wanted: GenerationRequest, weighed: Weighed, tell: Tell | None = None
    ) -> ImagesResponse:
        """Paint images from a text; arguments and errors as of ``edit``."""
        defaults = await self._defaults()
        size = weighed.size
        output = self._output(wanted, size)
        settings = self._settings(wanted, defaults)
        jobs = [
            GenerateJob(
                prompt=wanted.prompt,
                size=size,
                seed=seed,
                output=self._signed(output, seed, settings, None),
                **settings,
            )
            for seed in seeds(wanted)
        ]
        painting = Painting("image_generation", jobs, None, size, weighed.painted)
        return await self._paint(wanted, painting, tell)

    async def design(
        self, design: Design, weighed: Weighed, tell: Tell | None = None
    ) -> BlueprintResponse:
        """Have a blueprint written; arguments and errors as of ``edit``."""
        wanted = design.fields
        designer = self._choose_designer(wanted.designer)
        if designer == NO_DESIGNER:
            raise BadRequestError(
                f"designer: {NO_DESIGNER!r} writes no blueprint; "
                f"choose from {', '.join(self._config.offered)}",
                param="designer",
            )
        source = await self._source(design.image)
        job = DesignJob(
            designer, source.image, wanted.prompt, self._deadline(), streamed=tell is not None
        )
        text = await self._write(job, "blueprint", tell)
        return BlueprintResponse(
            blueprint=text, sections=sections(Blueprint.parse(text)), designer=designer
        )

    def _check(self, wanted: PaintRequest) -> None:
        chosen_adapter(self._config, wanted.model, wanted.adapter)
        if (wanted.steps or 1) > self._config.max_steps:
            raise BadRequestError(f"steps: at most {self._config.max_steps}", param="steps")
        if wanted.response_format == "url" and self._images is None:
            raise BadRequestError(
                "response_format: this server keeps no images that a URL could lead to; "
                "b64_json is what it answers with",
                param="response_format",
            )

    def _check_reviewer(self, wanted: EditFields) -> None:
        """Refuse rounds with a designer that cannot look at what was painted."""
        designer = self._choose_designer(wanted.designer)
        if not wanted.reviewed or self._can_review(designer):
            return
        able = [name for name in self._config.offered if self._can_review(name)]
        raise BadRequestError(
            f"designer: {designer!r} cannot look at what was painted, as rounds and best_of need; "
            f"{', '.join(able) or 'none of this server'} can",
            param="designer",
        )

    def _can_review(self, designer: str) -> bool:
        known = self._config.designers.get(designer)
        return known is not None and known.can_review

    def _choose_designer(self, wanted: str | None) -> str:
        designer = wanted or self._config.offered[0]
        if designer not in self._config.offered:
            raise BadRequestError(
                f"designer: {redact(designer)!r} is not offered here; "
                f"choose from {', '.join(self._config.offered)}",
                param="designer",
            )
        return designer

    def _size(self, wanted: str, defaults: Defaults) -> Size | None:
        """(width, height) in pixels that is asked for; ``None``: what the source or model has."""
        if wanted == "auto":
            return None
        try:
            size = parse_size(wanted)
        except InputError as error:
            raise BadRequestError(str(error), param="size") from None
        if max(size) > self._config.max_side:
            raise BadRequestError(
                f"size: a side has at most {self._config.max_side} px", param="size"
            )
        if any(side % defaults.size_multiple for side in size):
            raise BadRequestError(
                f"size: both sides must be multiples of {defaults.size_multiple}", param="size"
            )
        if max(size) > MOST_UNEVEN * min(size):
            raise BadRequestError(
                f"size: one side is at most {MOST_UNEVEN} times the other", param="size"
            )
        return size

    async def _source(self, data: bytes, shape: Size | None = None) -> Source:
        limit = self._config.max_image_pixels
        async with self._decoding:
            return await asyncio.to_thread(read_source, data, limit, shape)

    async def _mask(self, edit: Edit, source: Source) -> bytes | None:
        if edit.mask is None:
            return None
        if edit.fields.size != "auto":
            raise BadRequestError(
                "size: with a mask it is auto: what the mask leaves out stays as it is",
                param="size",
            )
        return await asyncio.to_thread(read_mask, edit.mask, source.size)

    def _output(self, wanted: PaintRequest, size: Size, *, mask: bool = False) -> Output:
        output = Output(wanted.output_format, wanted.output_compression)
        if mask and not output.lossless:
            raise BadRequestError(
                "output_format: with a mask it is png, or webp with output_compression 100: "
                "a lossy file would change what the mask leaves out",
                param="output_format",
            )
        if max(size) > LONGEST_SIDE[output.format]:
            raise BadRequestError(
                f"output_format: {output.format} holds sides of at most "
                f"{LONGEST_SIDE[output.format]} px, and this image has {max(size)}",
                param="output_format",
            )
        return output

    def _signed(
        self,
        output: Output,
        seed: int,
        settings: Mapping[str, Any],
        blueprint: str | None,
    ) -> Output:
        """``output`` with what the file says of itself."""
        said = provenance.words(
            model=self._config.model_name,
            seed=seed,
            steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            blueprint=blueprint,
            adapter=settings["adapter"],
        )
        return replace(output, metadata=tuple(said.items()))

    async def _blueprint(
        self, wanted: EditFields, designer: str, source: Source, tell: Tell | None
    ) -> str | None:
        if wanted.blueprint is not None or designer == NO_DESIGNER:
            return wanted.blueprint
        job = DesignJob(
            designer, source.image, wanted.prompt, self._deadline(), streamed=tell is not None
        )
        return await self._write(job, "image_edit.blueprint", tell)

    async def _write(self, job: DesignJob, kind: str, tell: Tell | None) -> str:
        pieces, begun = [], time.monotonic()
        try:
            async for piece in write(self._designer, job):
                pieces.append(piece)
                if tell is not None:
                    await tell(BlueprintDelta(type=f"{kind}.delta", delta=piece))
        finally:
            account.current().designed_s += time.monotonic() - begun
        blueprint = "".join(pieces)
        if tell is not None:
            await tell(BlueprintDone(type=f"{kind}.done", blueprint=blueprint))
        return blueprint

    async def _paint(
        self, wanted: PaintRequest, painting: Painting, tell: Tell | None
    ) -> ImagesResponse:
        """Paint all jobs of a request at once, so that they share a batch; one failure is all's."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._paint_one(wanted, painting, index, tell))
                for index in range(len(painting.jobs))
            ]
        done = [task.result() for task in tasks]
        tokens = await self._tokens(painting, done[0][0])
        return answer(wanted, painting, [image for _, image in done], tokens.of(len(done)))

    async def _paint_in_rounds(
        self,
        wanted: EditFields,
        designer: str,
        painting: Painting,
        job_of: Callable[[str, int], EditJob],
        tell: Tell | None,
    ) -> ImagesResponse:
        """Have the designer look at what is painted, until it is content; see ``dim.reflection``.

        Args:
            wanted: how many rounds and candidates.
            designer: who looks.
            painting: the first job, and what all have in common.
            job_of: the job to paint from a plan with a seed.
            tell: as of ``edit``.
        """
        begun, first = time.monotonic(), painting.jobs[0]
        assert isinstance(first, EditJob)
        reflection: Reflection[Painted] = Reflection(
            wanted.prompt, first.text, first.seed, rounds=wanted.rounds, candidates=wanted.best_of
        )

        async def candidate(plan: str, seed: int) -> tuple[Painted, Reply]:
            job = job_of(plan, seed)
            (image,) = [p async for p in paint(self._painter, job) if isinstance(p, Painted)]
            look = ReviewJob(
                designer=designer, instruction=wanted.prompt, plan=plan, image=first.image,
                painted=image.data, deadline=first.deadline,
            )  # fmt: skip
            return image, await review(self._designer, look)

        reviews: list[Reviewed] = []
        while asked := reflection.wanted:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(candidate(each.plan, each.seed)) for each in asked]
            images, replies = zip(*(task.result() for task in tasks), strict=True)
            reflection.take(images, replies)
            for each in reflection.candidates[len(reviews) :]:
                reviews.append(reviewed(each, time.monotonic() - begun))
                if tell is not None:
                    shown = await asyncio.to_thread(self._shown, each.image.data, wanted)
                    about: dict[str, Any] = {"review": reviews[-1], "size": painting.size_text}
                    about["output_format"] = wanted.output_format
                    await tell(ReviewEvent(type="image_edit.review", **about, **shown))
        best = reflection.best
        job = job_of(best.wanted.plan, best.wanted.seed)
        painting = replace(painting, jobs=[job], blueprint=best.wanted.plan)
        tokens = await self._tokens(painting, best.image)
        image = await self._hand_over(wanted, painting, 0, best.image, tell)
        return answer(wanted, painting, [image], tokens.of(len(reviews)), reviews)

    async def _paint_one(
        self,
        wanted: PaintRequest,
        painting: Painting,
        index: int,
        tell: Tell | None,
    ) -> tuple[Painted, ImageData]:
        event = partial(image_event, wanted, painting, index)
        async for piece in paint(self._painter, painting.jobs[index]):
            if isinstance(piece, Painted):
                painted = piece
            elif tell is not None:
                shown = await asyncio.to_thread(in_base64, piece.data)
                name = f"{painting.kind}.partial_image"
                await tell(
                    PartialImage(type=name, partial_image_index=piece.number, **event(), **shown)
                )
        return painted, await self._hand_over(wanted, painting, index, painted, tell)

    async def _hand_over(
        self,
        wanted: PaintRequest,
        painting: Painting,
        index: int,
        painted: Painted,
        tell: Tell | None,
    ) -> ImageData:
        """A finished image as the client wants to get it."""
        seed, event = painting.jobs[index].seed, partial(image_event, wanted, painting, index)
        if painted.release != (await self._defaults()).release:
            self.renew()
        account.current().paint(painted)
        shown = await asyncio.to_thread(self._shown, painted.data, wanted)
        contribution = await self._contribution(wanted, painting.jobs[index], painted)
        if tell is not None:
            usage = (await self._tokens(painting, painted)).of(1)
            name = f"{painting.kind}.completed"
            about: dict[str, Any] = {
                "usage": usage, "blueprint": painting.blueprint, "seed": seed,
                "release": painted.release, "contribution": contribution,
            }  # fmt: skip
            await tell(Completed(type=name, **about, **event(), **shown))
        return ImageData(
            revised_prompt=painting.blueprint,
            blueprint=painting.blueprint,
            seed=seed,
            batch_size=painted.batch_size,
            release=painted.release,
            contribution=contribution,
            **shown,
        )

    async def _contribution(
        self, wanted: PaintRequest, job: EditJob | GenerateJob, painted: Painted
    ) -> str | None:
        """The name by which a client can accept an edit that may be kept; ``None``: it may not."""
        if not (isinstance(wanted, EditFields) and wanted.consent and isinstance(job, EditJob)):
            return None
        return await self._contributions.hold(
            Contribution(
                instruction=wanted.prompt,
                source=await received(job.image),
                edited=painted.data,
                format=wanted.output_format,
                text=job.text,
                provenance=provenance.read(painted.data) or {},
            )
        )

    def _shown(self, data: bytes, wanted: PaintRequest) -> dict[str, str]:
        """An image as the client wants to get it."""
        if wanted.response_format == "url":
            assert self._images is not None
            return {"url": self._images.put(data, wanted.output_format)}
        return in_base64(data)

    async def _tokens(self, painting: Painting, painted: Painted) -> Tokens:
        defaults = await self._defaults()
        return Tokens(
            text=painted.text_tokens,
            image=defaults.image_tokens if isinstance(painting.jobs[0], EditJob) else 0,
            painted=painted_tokens(painting.painted, defaults.size_multiple),
        )

    def _settings(self, wanted: PaintRequest, defaults: Defaults) -> dict[str, Any]:
        """Of the fields of a ``PaintJob`` those that a request may leave to the model."""
        scale = wanted.guidance_scale
        return {
            "steps": wanted.steps or self._steps(wanted, defaults),
            "guidance_scale": defaults.guidance_scale if scale is None else scale,
            "negative_prompt": wanted.negative_prompt,
            "previews": wanted.partial_images,
            "deadline": self._deadline(),
            "batch": wanted.service_tier == "flex",
            "adapter": chosen_adapter(self._config, wanted.model, wanted.adapter),
        }

    def _steps(self, wanted: PaintRequest, defaults: Defaults) -> int:
        """As many as the quality means: half of the model's own, these, or twice."""
        steps = {"low": -(-defaults.steps // 2), "high": 2 * defaults.steps}
        quality = wanted.effective_quality or "medium"
        return min(steps.get(quality, defaults.steps), self._config.max_steps)

    def _deadline(self) -> float:
        return time.time() + self._config.request_timeout_s

    async def _defaults(self) -> Defaults:
        if self._painter_defaults is None:
            self._painter_defaults = await self._painter.defaults.remote()
        return self._painter_defaults


def seeds(wanted: PaintRequest) -> list[int]:
    """One seed per image: counted up from the request's, else drawn anew."""
    first = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
    return [(first + index) % (MAX_SEED + 1) for index in range(wanted.n)]


def image_event(wanted: PaintRequest, painting: Painting, index: int) -> dict[str, Any]:
    """What the events that show an image have in common, but for the image."""
    return {
        "image_index": index,
        "size": painting.size_text,
        "quality": wanted.effective_quality or "auto",
        "output_format": wanted.output_format,
        "created_at": int(time.time()),
    }


def answer(
    wanted: PaintRequest,
    painting: Painting,
    images: list[ImageData],
    usage: Usage,
    reviews: list[Reviewed] | None = None,
) -> ImagesResponse:
    """The whole answer to a request."""
    return ImagesResponse(
        created=int(time.time()),
        data=images,
        output_format=wanted.output_format,
        quality=wanted.effective_quality,
        size=painting.size_text,
        usage=usage,
        reviews=reviews,
    )


def reviewed(candidate: Candidate[Painted], seconds: float) -> Reviewed:
    """What was thought of an image, for a client."""
    said = candidate.review
    return Reviewed(
        round=candidate.round,
        seed=candidate.wanted.seed,
        blueprint=candidate.wanted.plan,
        score=said and said.score,
        accepted=said is not None and said.accepted,
        missing=said.missing if said else "",
        error=candidate.error or (said.flaw if said and said.flaw else None),
        seconds=seconds,
    )


def in_base64(data: bytes) -> dict[str, str]:
    """An encoded image in JSON."""
    return {"b64_json": base64.b64encode(data).decode("ascii")}
