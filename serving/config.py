"""What a server serves and how much of it at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from dim.config import StrictModel
from dim.redaction import redact

NO_DESIGNER = "none"


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
    port: int = Field(8000, ge=1, le=65535)

    designer_replicas: int = Field(1, ge=1)
    painter_replicas: int = Field(1, ge=1)
    cpus_per_replica: float = Field(1.0, ge=0)
    gpus_per_replica: float = Field(0.0, ge=0)

    max_batch_size: int = Field(8, ge=1)
    """Images that one replica paints at once (or designs in one forward pass)."""
    max_batch_megapixels: float | None = Field(None, gt=0)
    """Megapixels that one replica paints at once, a larger image alone; null is no bound."""
    batch_wait_s: float = Field(0.02, ge=0)
    """How long the first design of a batch waits for company."""
    max_pending: int = Field(32, ge=10)
    """Images admitted and not yet answered, per ingress; beyond it a request is answered 429."""
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

    @property
    def offered(self) -> list[str]:
        """Every value that a request's ``designer`` may have: specs without their credentials."""
        return list(dict.fromkeys([*map(redact, self.designers), NO_DESIGNER]))

    @property
    def model_name(self) -> str:
        """What the server calls the model: the name of its folder."""
        folder = Path(self.model)
        return folder.parent.name if folder.name == "model" else folder.name
