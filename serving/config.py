"""What a server serves and how much of it at once."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from dim.config import StrictModel
from dim.redaction import redact

NO_DESIGNER = "none"


class Rates(StrictModel):
    """What one client may ask for in a minute; ``None``: as much as there is room for."""

    requests_per_minute: float | None = Field(None, ge=1)
    images_per_minute: float | None = Field(None, ge=1)
    megapixel_steps_per_minute: float | None = Field(None, gt=0)
    """Megapixels painted × steps, of all images together: what an image costs."""

    def over(self, others: Rates) -> Rates:
        """These rates, and where they say nothing the ``others``'."""
        said = {name: getattr(self, name) for name in Rates.model_fields}
        return others.model_copy(
            update={name: rate for name, rate in said.items() if rate is not None}
        )


class UploadLimits(StrictModel):
    """How a request's body has to come in, of each ingress replica."""

    places: int = Field(32, ge=1)
    """Bodies that come in at a time. One that is too slow loses its place to one that comes."""
    timeout_s: float = Field(120.0, gt=0)
    """For a whole body."""
    least_bytes_per_s: float = Field(1024.0, gt=0)
    """On average since the body began, but for the first ``grace_s``."""
    grace_s: float = Field(5.0, ge=0)


class ServingConfig(StrictModel):
    """Configuration of the serving application; also the ``args`` of a Serve config file."""

    model: str
    """Folder of a DIM, readable from every node that runs a replica."""
    lora: tuple[str, ...] = ()
    """LoRA adapters to merge into the model, ``PATH[:WEIGHT]`` each; readable from there too."""
    designers: tuple[str, ...] = ("self",)
    """Designer specs that a request may choose from; the first is the default. ``self`` is the
    served model's own understanding. ``none`` is always allowed and needs no entry."""
    dtype: str | None = None
    """Floating type of the painter's replicas, such as ``bfloat16``; null is as saved."""
    host: str = "127.0.0.1"
    """Where ``dim serve`` listens; in a Serve config file that is ``http_options``' to say."""
    port: int = Field(8000, ge=1, le=65535)
    keys: str | None = None
    """File of API keys (see ``serving.keys``), or ``env:NAME``, a variable that holds its text;
    null asks nobody for one, and is for loopback alone unless ``insecure``."""
    insecure: bool = False
    """Listen beyond loopback without keys: whoever reaches the port may spend what this costs."""
    rates: Rates = Rates()
    """Of each client that says none of its own in the keys file."""
    origins: tuple[str, ...] = ()
    """Origins of other sites whose pages may call, such as ``https://shop.example``; ``*``: all."""
    hosts: tuple[str, ...] = ()
    """Names that the server may be called by, ``*.`` for any below one, ``*`` for any. Without keys
    it answers to addresses, ``localhost`` and these alone, for any page can point a name at it."""

    designer_replicas: int = Field(1, ge=1)
    painter_replicas: int = Field(1, ge=1)
    cpus_per_replica: float = Field(1.0, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)

    max_batch_size: int = Field(8, ge=1)
    """Images that one replica paints (or designs) in one forward pass."""
    batch_wait_s: float = Field(0.02, ge=0)
    """How long the first image of a batch waits for company."""
    max_pending: int = Field(32, ge=10)
    """Images admitted and not yet answered, per ingress; beyond it a request is answered 429."""
    max_pending_megapixels: float = Field(400.0, gt=0)
    """Of the sources and the images to give back of what is admitted: what it takes in memory."""
    max_pending_megapixel_steps: float = Field(4000.0, gt=0)
    """Megapixels painted × steps of what is admitted: how long it takes."""
    max_output_pixels: int = Field(50_000_000, ge=64)
    """Of all images of one request together, at the size they are given back in."""
    uploads: UploadLimits = UploadLimits()
    max_request_bytes: int = Field(25 * 2**20, ge=1024)
    max_image_pixels: int = Field(50_000_000, ge=64)
    max_side: int = Field(4096, ge=8)
    """Longest side of a generated image, in pixels."""
    max_steps: int = Field(100, ge=1)
    request_timeout_s: float = Field(300.0, gt=0)

    @field_validator("designers")
    @classmethod
    def _at_least_one(cls, designers: tuple[str, ...]) -> tuple[str, ...]:
        if not designers:
            raise ValueError("at least one designer is needed ('none' paints the instruction)")
        if len(set(map(redact, designers))) < len(set(designers)):
            raise ValueError("two designers differ in nothing but their credentials")
        return designers

    @field_validator("origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s@?#]+", origin):
                raise ValueError(f"{origin!r} is not of the form https://host[:port]")
        return tuple(origin.lower() for origin in origins)

    @model_validator(mode="after")
    def _pages_of_others_need_a_key(self) -> ServingConfig:
        if "*" in self.origins and self.keys is None:
            raise ValueError("origins: '*' lets every page on the web ask for work; it needs keys")
        return self

    @property
    def offered(self) -> list[str]:
        """Every value that a request's ``designer`` may have: specs without their credentials."""
        return list(dict.fromkeys([*map(redact, self.designers), NO_DESIGNER]))

    @property
    def model_name(self) -> str:
        """What the server calls the model: the name of its folder."""
        folder = Path(self.model)
        return folder.parent.name if folder.name == "model" else folder.name
