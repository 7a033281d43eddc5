"""What `dim plan` is told: amounts, prices, devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from dim.config import StrictModel
from dim.gpus import Gpu, find_gpu

Share = Annotated[float, Field(gt=0, le=1)]


class DataConfig(StrictModel):
    """How much of what."""

    raw_images: PositiveInt
    """Images that are taken in."""
    images: PositiveInt
    """Images that the filters keep, each of which is captioned."""
    public_images: NonNegativeInt
    """Captioned images of others that the first stage is trained on besides."""
    raw_pairs: PositiveInt
    """Pairs that are taken in."""
    designed_pairs: PositiveInt
    """Pairs that the filters keep, each of which is triaged."""
    pairs: PositiveInt
    """Pairs that triage keeps: those with a blueprint."""
    short_pairs: PositiveInt
    """Pairs with short instructions, which the second stage is trained on."""
    megapixels: PositiveFloat
    """Of an encoded picture."""
    painted: PositiveInt
    """Images that an evaluation paints from texts."""
    edited: PositiveInt
    """Images that an evaluation edits, each of which is judged."""


class Call(StrictModel):
    """A request to a model, on average. ``again`` is the share that is asked again."""

    input_tokens: PositiveInt
    output_tokens: PositiveInt
    again: NonNegativeFloat = 0.0


class CallsConfig(StrictModel):
    """What models are asked."""

    caption: Call
    triage: Call
    blueprint: Call
    judge: Call


class Api(StrictModel):
    """A model behind somebody's API."""

    kind: Literal["api"]
    input_price: NonNegativeFloat
    """US dollars for a million tokens."""
    output_price: NonNegativeFloat
    requests_per_minute: PositiveFloat
    tokens_per_minute: PositiveFloat


class Local(StrictModel):
    """A model on one's own GPUs. The rates are of one GPU."""

    kind: Literal["local"]
    input_tokens_per_second: PositiveFloat
    output_tokens_per_second: PositiveFloat


Model = Annotated[Api | Local, Field(discriminator="kind")]


class ModelsConfig(StrictModel):
    """Who answers."""

    captioner: Model
    designer: Model
    judge: Model


class CpuNodes(StrictModel):
    """Machines without GPUs, for the data jobs."""

    count: PositiveInt
    cores: PositiveInt
    """Of the kind on which the costs were measured."""
    price_per_hour: NonNegativeFloat
    """US dollars a node."""
    gigabytes_per_second: PositiveFloat
    """To and from the object store, of a node."""


class GpuNodes(StrictModel):
    """GPUs, for features, training, local models and evaluation."""

    name: str
    """One of ``dim.gpus``."""
    count: PositiveInt
    per_node: PositiveInt
    price_per_hour: NonNegativeFloat
    """US dollars a GPU."""
    gigabytes_per_second: PositiveFloat
    """To and from the object store, of a node."""
    training: Share
    """Of the GPU's peak that training reaches."""
    frozen: Share
    """Of the GPU's peak that forward passes of frozen parts, and sampling, reach."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        find_gpu(name)
        return name

    @property
    def gpu(self) -> Gpu:
        """What is known of it."""
        return find_gpu(self.name)


class StoreConfig(StrictModel):
    """The object store."""

    price_per_gigabyte_month: NonNegativeFloat
    price_per_1000_reads: NonNegativeFloat
    price_per_1000_writes: NonNegativeFloat
    reads_per_second: PositiveFloat
    """What one prefix answers."""
    writes_per_second: PositiveFloat


class StagesConfig(StrictModel):
    """The training stages: files as `dim train` takes them."""

    t2i: str
    edit1: str
    edit2: str


class PlanConfig(StrictModel):
    """Amounts, prices and devices."""

    data: DataConfig
    calls: CallsConfig
    models: ModelsConfig
    cpu: CpuNodes
    gpu: GpuNodes
    store: StoreConfig
    model: str
    """The model that is trained, a YAML file."""
    stages: StagesConfig
    features: tuple[Literal["t2i", "edit1", "edit2"], ...]
    """Stages for which `dim data features` is run before; the others compute them at every step."""
    costs: str = "configs/plan-costs.yaml"
    """What the jobs were measured to cost."""
