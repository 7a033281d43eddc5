"""What a server serves and how much of it at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dim.config import StrictModel
from dim.designers import calls_a_server, can_review
from dim.model.checkpoint.content import name_of
from dim.redaction import redact
from infra.registry import SCHEME, is_registered

NO_DESIGNER = "none"
NAMES_BY_THEMSELVES = ("self", "oracle", NO_DESIGNER)


Consent = Literal["never", "ask", "always"]
"""Whether a client's edits may be kept for training, where the server keeps any: not even if a
request consents; those whose request does; all whose request does not say otherwise."""


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


class PoolConfig(StrictModel):
    """What the replicas of one deployment take; null is as the server says for all."""

    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float | None = Field(None, ge=0)
    max_batch_size: int | None = Field(None, ge=1)
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's ``autoscaling_config``, in place of a number of replicas."""

    @field_validator("autoscaling")
    @classmethod
    def _as_serve_takes_it(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            from ray.serve.config import AutoscalingConfig

            if unknown := sorted(given.keys() - AutoscalingConfig.model_fields.keys()):
                raise ValueError(f"Serve's autoscaling_config has no {', '.join(unknown)}")
            if AutoscalingConfig(**given).min_replicas < 1:
                raise ValueError("min_replicas must be 1 or more: without a replica, not ready")
        return given


class DesignerConfig(StrictModel):
    """A designer that requests may choose by its name."""

    spec: str
    """As of ``dim.designers``; ``self`` is the served model's own understanding."""
    deadline_s: float | None = Field(None, gt=0)
    """Until a request that waits for it is answered 502, below ``request_timeout_s``; null: half of
    that. An answer that comes later is kept for whoever asks again."""
    concurrency: int = Field(16, ge=1)
    """Questions asked at a time; of a designer that is not ``self``, as all that follow."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    input_price: float = Field(0.0, ge=0)
    """US dollars for a million tokens of questions."""
    output_price: float = Field(0.0, ge=0)
    """US dollars for a million tokens of answers."""
    budget_usd: float | None = Field(None, gt=0)
    """What the server may spend on it from its start on; needs a price."""

    @model_validator(mode="after")
    def _only_what_is_minded(self) -> DesignerConfig:
        if self.budget_usd is not None and not (self.input_price or self.output_price):
            raise ValueError("budget_usd needs input_price or output_price")
        calls = {"requests_per_minute", "tokens_per_minute", "input_price", "output_price"}
        minded = sorted(self.model_fields_set & (calls | {"budget_usd"}))
        if minded and not calls_a_server(self.spec):
            raise ValueError(f"{', '.join(minded)} is for openai: designers alone")
        if self.is_own and "concurrency" in self.model_fields_set:
            raise ValueError("concurrency is for designers that are not self: those batch")
        return self

    @property
    def is_own(self) -> bool:
        """Whether it is an understanding model of ours, which wants a device."""
        return self.spec.partition(":")[0] == "self"

    @property
    def can_review(self) -> bool:
        """Whether it can look at what was painted."""
        return can_review(self.spec)

    def patience_s(self, request_timeout_s: float) -> float:
        """Seconds that a request waits for it."""
        return self.deadline_s or request_timeout_s / 2


class AccessLogConfig(StrictModel):
    """A line of JSON for each request."""

    to: str = "stdout"
    """``stdout``, of the ingress's replicas; or a folder of their machine: a file for each."""
    prompts: bool = False
    """Log what is asked for, too: the first 2,000 characters. Pictures never are."""
    max_megabytes: float = Field(64.0, gt=0)
    """Of a file, which is then put aside."""
    keep: int = Field(8, ge=1)
    """Files put aside, of each replica."""


class TracingConfig(StrictModel):
    """OpenTelemetry traces, from the ingress to the painter's steps."""

    exporter: str = Field("", pattern=r"^([A-Za-z_][\w.]*[:.][A-Za-z_]\w*)?$")
    """A function that gives the span processors, as ``package.module:function``; empty: spans are
    written to files among Serve's logs."""
    sampling_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the requests that are traced."""


class SigningConfig(StrictModel):
    """A certificate to sign images with, by C2PA; files that every painter's replica can read."""

    certificate: str
    """PEM: the chain, the signer's certificate first."""
    key: str
    """PEM: its private key."""
    algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = "es256"
    timestamp_url: str | None = Field(None, pattern=r"^https?://\S+$")
    """A time stamp authority (RFC 3161), asked for each image; null: no time is attested."""


class ContributionsConfig(StrictModel):
    """What is held of edits whose requests consent, until their clients accept them."""

    store: str
    """Address of the folder, local or ``s3://``, in which lies what was accepted."""
    keep_s: float = Field(3600.0, gt=0)
    """How long an edit may be accepted; then it is forgotten."""
    most: int = Field(256, ge=1)
    """Edits held at once; the oldest make room."""
    most_megabytes: float = Field(512.0, gt=0)
    """Of their pictures and texts together."""


class ServingConfig(StrictModel):
    """Configuration of the serving application; also the ``args`` of a Serve config file."""

    model: str
    """Folder of a DIM, readable from every node that runs a replica, at a path or ``s3://``; or
    ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, of the registry that ``MLFLOW_TRACKING_URI``
    names: what it means when the server starts."""
    lora: tuple[str, ...] = ()
    """LoRA adapters to merge into the model, ``PATH[:WEIGHT]`` each; readable from there too."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters that requests choose by name, ``PATH[:WEIGHT]`` each, likewise. All of them are
    loaded when a painter starts, and images of several share its batches."""
    designers: dict[str, DesignerConfig] = Field(
        default_factory=lambda: {"self": DesignerConfig(spec="self")}
    )
    """What a request may choose from, by name; the first is the default. A text is a ``spec``; a
    list is of names that are specs too: ``self``, ``oracle``, ``none``. ``none`` is always allowed
    and needs no entry."""
    kept_blueprints: int = Field(1024, ge=1)
    """Answers of a designer over HTTP that are kept, so that nobody pays for them again."""
    dtype: str | None = None
    """Floating type of the painter's replicas, such as ``bfloat16``; null is as saved."""
    int8: bool = False
    """Keep the weights of the painter's linear layers in 8 bits; needs ``torchao``."""
    step_cache: float = Field(0.0, ge=0, lt=1)
    """Threshold of the painter's step cache, such as 0.03; 0 computes every step whole."""
    host: str = "127.0.0.1"
    """Where ``dim serve`` listens; in a Serve config file that is ``http_options``' to say."""
    port: int = Field(8000, ge=1, le=65535)
    application: str = Field("dim", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What Serve calls it; several on one cluster have different ones, and ``route_prefix``es."""
    route_prefix: str = Field("/", pattern=r"^/([A-Za-z0-9._/-]*[A-Za-z0-9._-])?$")
    """Where its routes begin."""
    keys: str | None = None
    """File of API keys (see ``serving.keys``), or ``env:NAME``, a variable that holds its text;
    null asks nobody for one, and is for loopback alone unless ``insecure``."""
    insecure: bool = False
    """Listen beyond loopback without keys: whoever reaches the port may spend what this costs."""
    open_metrics: bool = False
    """Answer ``/metrics`` without a key, for a Prometheus that has none."""
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

    designer: PoolConfig = PoolConfig()
    """Of the designers that are models of ours; the others take neither CPU nor GPU."""
    painter: PoolConfig = PoolConfig()
    ingress_replicas: int = Field(1, ge=1)
    """Each takes on ``max_pending`` images; they share the rates of clients."""
    cpus_per_ingress: float = Field(0.0, ge=0)
    """Above 0 keeps them off a head node that offers no CPU."""

    max_batch_size: int = Field(8, ge=1)
    """Images that one replica paints at once (or designs in one forward pass)."""
    max_batch_megapixels: float | None = Field(None, gt=0)
    """Megapixels that one replica paints at once, a larger image alone; null is no bound."""
    batch_wait_s: float = Field(0.02, ge=0)
    """How long the first design of a batch waits for company."""
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

    result_cache_bytes: int = Field(0, ge=0)
    """Of answers that each ingress keeps to give them again to the same request; only one with a
    seed is the same. 0: none."""

    object_store: str | None = None
    """``s3://`` address under which lie images that are answered by URL (``response_format=url``)
    and asynchronous jobs; null: there are neither. The bucket's life cycle deletes them."""
    contributions: ContributionsConfig | None = None
    """Keep edits for training, of requests that consent and whose results are accepted; null keeps
    nothing."""
    access_log: AccessLogConfig | None = None
    """A line for each request; a text is where to. Null: there is none."""
    tracing: TracingConfig | None = None
    """Null: no traces. In a Serve config file that is ``tracing_config``'s to say."""
    signing: SigningConfig | None = None
    """Sign images; null: they say how they were painted, without proof."""
    url_s: int = Field(3600, ge=1, le=7 * 24 * 3600)
    """How long such a URL can be read, in seconds."""

    @field_validator("object_store")
    @classmethod
    def _in_an_object_store(cls, address: str | None) -> str | None:
        if address is not None and not address.startswith("s3://"):
            raise ValueError("no URL leads to a local folder: it must be an s3:// address")
        return address

    @field_validator("access_log", mode="before")
    @classmethod
    def _by_place(cls, given: Any) -> Any:
        return {"to": given} if isinstance(given, str) else given

    @field_validator("designers", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            for spec in given:
                if spec not in NAMES_BY_THEMSELVES:
                    raise ValueError(
                        f"the designer {redact(str(spec))!r} needs a name that clients call it by, "
                        "such as best: openai:MODEL@URL; by themselves there are "
                        f"{', '.join(NAMES_BY_THEMSELVES)}"
                    )
            given = {spec: spec for spec in given}
        if not isinstance(given, dict):
            return given
        return {
            name: {"spec": value} if isinstance(value, str) else value
            for name, value in given.items()
        }

    @field_validator("designers")
    @classmethod
    def _named(cls, designers: dict[str, DesignerConfig]) -> dict[str, DesignerConfig]:
        if not designers:
            raise ValueError("at least one designer is needed ('none' paints the instruction)")
        for name, designer in designers.items():
            require_name(name)
            if (name == NO_DESIGNER) != (designer.spec == NO_DESIGNER):
                raise ValueError(
                    "'none' is the name of painting the instruction, and of that alone"
                )
        return designers

    @model_validator(mode="after")
    def _leave_time_to_paint(self) -> ServingConfig:
        for name, designer in self.designers.items():
            if (designer.deadline_s or 0) >= self.request_timeout_s:
                raise ValueError(
                    f"designers.{name}.deadline_s must be less than request_timeout_s, "
                    f"{self.request_timeout_s:g}"
                )
        return self

    @field_validator("adapters")
    @classmethod
    def _callable(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            require_name(name)
        return adapters

    @model_validator(mode="after")
    def _whole_steps_with_adapters(self) -> ServingConfig:
        if self.step_cache and self.adapters:
            raise ValueError("step_cache does not go with adapters; those of lora it goes with")
        return self

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
        """Every name that a request's ``designer`` may have."""
        return list(dict.fromkeys([*self.designers, NO_DESIGNER]))

    @property
    def model_name(self) -> str:
        """What the server calls the model, whichever release of it is served."""
        return model_name(self.model)


def require_name(name: str) -> None:
    """Refuse what clients cannot call something by.

    Raises:
        ValueError: it is empty, too long, or has other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"{redact(name)!r} is no name of letters, digits, '.', '_', '-'")


def model_name(model: str) -> str:
    """The name of a registered model, else that of a folder.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a folder's address.
    """
    if is_registered(model):
        return re.split("[@/]", model.removeprefix(SCHEME))[0]
    return name_of(Path(model))
