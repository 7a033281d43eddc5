"""Every stage of the published size: what it takes in all, and how long that is on what devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dim.config import load_config, shipped
from dim.model.config import ModelConfig
from infra.models import read_config
from pipelines.features import FeaturesConfig
from pipelines.job import JobConfig
from pipelines.outputs.files import GROUP_BYTES
from training.estimate import Estimate, estimate, frozen_parts
from training.plan import epoch_steps
from training.stage import StageConfig
from workflows.scaling.costs import Amounts, Costs, ranges_for
from workflows.scaling.settings import Api, Call, Local, PlanConfig

CPU, GPU, STORE, NETWORK, MODEL = "CPU", "GPU", "object store", "network", "model's server"

KNOBS = {
    CPU: "cpu.count, cpu.cores",
    GPU: "gpu.count, gpu.name",
    STORE: "several prefixes or buckets",
    NETWORK: "nodes, gigabytes_per_second",
    MODEL: "models.*: limits of the server, or GPUs of one's own",
}
"""What to turn where a resource is what a stage waits for."""

_JOB_KNOBS = {
    "edit": "calls.requests_per_minute, workers",
    "t2i": "calls.requests_per_minute, workers",
}
_HOUR = 3600.0
_HALF = 2  # bytes of a number in bfloat16
_FORWARD = 3  # a training step is so many forward passes
_GUIDED = 2  # passes of a step of the sampler
_PART_BYTES = 10 << 20  # of a large file in a request to the object store, as pyarrow uploads


@dataclass(frozen=True)
class Stage:
    """A stage and what it takes.

    Attributes:
        name: of the stage.
        records: that go in, or are trained on.
        amounts: of CPU, bytes and requests in all.
        hours: of each resource, if it alone were waited for.
        gpus: that are held meanwhile.
        nodes: without GPUs that are held meanwhile.
        tokens: that models read, and write.
        calls_usd: what their answers cost.
        devices_usd: what the machines cost.
        store_usd: what the requests to the object store cost.
        stored_bytes: that stay when it is done.
        files: of that.
        ranges: into which its input is cut; 0 where there are none.
        driver_bytes: of the driver's memory; 0 where it was not measured.
    """

    name: str
    records: int
    amounts: Amounts
    hours: dict[str, float]
    gpus: int = 0
    nodes: int = 0
    tokens: tuple[float, float] = (0.0, 0.0)
    calls_usd: float = 0.0
    devices_usd: float = 0.0
    store_usd: float = 0.0
    stored_bytes: float = 0.0
    files: int = 0
    ranges: int = 0
    driver_bytes: float = 0.0
    knobs: dict[str, str] = field(default_factory=dict)

    @property
    def bottleneck(self) -> str:
        """The resource that it waits for."""
        return max(self.hours, key=lambda name: self.hours[name])

    @property
    def wall_hours(self) -> float:
        """How long it takes."""
        return self.hours[self.bottleneck]

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU, idle ones that are held included."""
        return self.wall_hours * self.gpus

    @property
    def knob(self) -> str:
        """What to turn to make it faster."""
        return self.knobs.get(self.bottleneck, KNOBS[self.bottleneck])

    def per_second(self, requests: float) -> float:
        """Requests a second, on average over the stage."""
        return requests / max(self.wall_hours * _HOUR, 1.0)


def stages(config: PlanConfig, costs: Costs) -> Iterator[Stage]:
    """All stages, in the order in which they are run.

    Raises:
        ConfigError: a file that is named is not there, or the costs lack a job.
    """
    data, calls, models = config.data, config.calls, config.models
    planner = _Planner(config, costs)
    yield planner.job("ingest-images", data.raw_images, data.raw_images)
    yield planner.job("ingest-pairs", data.raw_pairs, data.raw_pairs)
    yield planner.job("filter-images", data.raw_images, data.images)
    yield planner.job("filter-pairs", data.raw_pairs, data.designed_pairs)
    yield planner.job("t2i", data.images, data.images, (calls.caption,), models.captioner)
    both = (calls.triage, calls.blueprint)
    yield planner.job("edit", data.designed_pairs, data.pairs, both, models.designer)
    trained = {
        "t2i": data.images + data.public_images, "edit1": data.short_pairs, "edit2": data.pairs,
    }  # fmt: skip
    for made in config.features:
        yield planner.features(made, trained[made])
    for name, samples in trained.items():
        yield planner.training(name, samples)
    yield planner.evaluation()


class _Planner:
    """Makes stages of amounts, costs and devices."""

    def __init__(self, config: PlanConfig, costs: Costs) -> None:
        self._config = config
        self._costs = costs
        self._model: ModelConfig = read_config(shipped(config.model))
        self._trained: dict[str, tuple[StageConfig, Estimate]] = {}

    def job(
        self,
        job: str,
        records: int,
        kept: int,
        calls: tuple[Call, ...] = (),
        model: Api | Local | None = None,
    ) -> Stage:
        """A data job that takes in ``records`` and keeps some."""
        config, cost, ranges = self._config, self._costs.of(job), ranges_for(job, records)
        larger = config.data.megapixels / self._costs.megapixels
        cores = config.cpu.count * config.cpu.cores
        took = cost.of(records, ranges, cores, pictures=larger)
        # A measured range had one row group of pictures and one file, and a large one has several.
        groups = cost.a_record.written_bytes * larger * records / GROUP_BYTES
        requests = cost.of(records, max(ranges, math.ceil(groups)), cores, pictures=larger)
        # What is dropped is read and not written; the measured runs kept all.
        dropped = cost.a_record.written_bytes * larger * (records - kept)
        asked = [records * (1 + call.again) for call in calls]
        took = took.model_copy(
            update={
                "written_bytes": took.written_bytes - dropped,
                "reads": requests.reads,
                "writes": requests.writes * kept / records,
                "calls": sum(asked),
            }
        )
        stored = cost.a_record.written_bytes * larger * kept
        tokens = (
            sum(n * call.input_tokens for n, call in zip(asked, calls, strict=True)),
            sum(n * call.output_tokens for n, call in zip(asked, calls, strict=True)),
        )
        hours = self._on_cpus(took)
        gpus, paid = 0, 0.0
        if model is not None:
            hours[MODEL], gpus, paid = self._asked(model, took.calls, tokens)
        most = JobConfig(out="").target_file_mb * 2**20
        return self._priced(
            Stage(
                name=f"data {job}",
                records=records,
                amounts=took,
                hours=hours,
                gpus=gpus,
                nodes=self._nodes(took, max(hours.values())),
                tokens=tokens,
                calls_usd=paid,
                stored_bytes=stored,
                files=ranges * max(1, math.ceil(stored / ranges / most)),
                ranges=ranges,
                driver_bytes=took.driver_bytes,
                knobs={MODEL: _JOB_KNOBS[job]} if job in _JOB_KNOBS and gpus == 0 else {},
            )
        )

    def features(self, name: str, samples: int) -> Stage:
        """`dim data features` for a stage."""
        gpu = self._config.gpu
        stage, made = self._estimated(name)
        ranges = ranges_for("features", samples)
        stored = samples * self._feature_bytes(stage, made)
        pictures = 2 if stage.edits else 1
        read = samples * pictures * self._picture_bytes()
        most = JobConfig(out="").target_file_mb * 2**20
        files = ranges * max(1, math.ceil(stored / ranges / most))
        took = Amounts(
            read_bytes=read, written_bytes=stored,
            reads=read / GROUP_BYTES, writes=stored / _PART_BYTES + files,
        )  # fmt: skip
        work = samples * made.frozen_flops / stage.batch_size
        hours = self._on_gpus(took, gpu.count, work / gpu.frozen)
        return self._priced(
            Stage(
                name=f"data features, {name}", records=samples, amounts=took, hours=hours,
                gpus=gpu.count, stored_bytes=stored, files=files, ranges=ranges,
            )
        )  # fmt: skip

    def training(self, name: str, samples: int) -> Stage:
        """`dim train` of a stage."""
        config, gpu = self._config, self._config.gpu
        stage, made = self._estimated(name)
        cached = name in config.features
        steps = stage.steps or (stage.epochs or 0) * epoch_steps(samples, stage.batch_size, None)
        seen = steps * stage.batch_size
        if cached:
            each = self._feature_bytes(stage, made)
            group = FeaturesConfig.model_fields["row_group_mb"].default * 2**20
            reads = seen * min(1.0, each / group)
        else:
            each = (2 if stage.edits else 1) * self._picture_bytes()
            reads = seen * each / GROUP_BYTES
        work = steps * made.trained_flops / gpu.training
        work += 0.0 if cached else steps * made.frozen_flops / gpu.frozen
        took = Amounts(read_bytes=seen * each, reads=reads)
        return self._priced(
            Stage(
                name=f"train {name}", records=seen, amounts=took,
                hours=self._on_gpus(took, made.workers, work), gpus=made.workers,
                stored_bytes=made.checkpoint, files=1,
                knobs={GPU: "workers of the stage, up to its batch_size; gpu.name"},
            )
        )  # fmt: skip

    def evaluation(self) -> Stage:
        """The published benchmarks: images are painted, and edits judged by a model."""
        config, gpu, data = self._config, self._config.gpu, self._config.data
        work, passes = 0.0, _GUIDED * self._model.sampling.steps
        for name, images in (("t2i", data.painted), ("edit2", data.edited)):
            stage, made = self._estimated(name)
            forward = (
                made.trained_flops / stage.batch_size / (_FORWARD + stage.gradient_checkpointing)
            )
            work += images * (passes * forward + made.frozen_flops / stage.batch_size)
        judge = config.calls.judge
        asked = data.edited * (1 + judge.again)
        tokens = (asked * judge.input_tokens, asked * judge.output_tokens)
        images = data.painted + data.edited
        took = Amounts(calls=asked, written_bytes=images * self._picture_bytes())
        hours = self._on_gpus(took, gpu.count, work / gpu.frozen)
        hours[MODEL], more, paid = self._asked(config.models.judge, asked, tokens)
        return self._priced(
            Stage(
                name="evaluate", records=images, amounts=took, hours=hours,
                gpus=max(gpu.count, more), tokens=tokens, calls_usd=paid,
                stored_bytes=took.written_bytes, files=1,
            )
        )  # fmt: skip

    def _estimated(self, name: str) -> tuple[StageConfig, Estimate]:
        """A stage's settings, and what a step of it takes with the frozen parts in it."""
        if name not in self._trained:
            path = shipped(getattr(self._config.stages, name))
            stage = load_config(StageConfig, path)
            self._trained[name] = stage, estimate(stage, self._model, 1, features=False)
        return self._trained[name]

    def _feature_bytes(self, stage: StageConfig, made: Estimate) -> float:
        """Hidden states and latents of a sample, in bfloat16."""
        frozen, cell = frozen_parts(self._model)
        side = self._model.sampling.resolution // cell
        channels = int(self._model.painter.architecture["in_channels"])
        latents = (2 if stage.edits else 1) * channels * side**2
        return float(_HALF * (made.tokens * frozen.hidden + latents))

    def _picture_bytes(self) -> float:
        """Of an encoded picture, as the ingest of images wrote them."""
        larger = self._config.data.megapixels / self._costs.megapixels
        return self._costs.of("ingest-images").a_record.written_bytes * larger

    def _nodes(self, took: Amounts, hours: float) -> int:
        """Nodes without GPUs that do it in so many hours; more would wait for something else."""
        cpu = self._config.cpu
        return min(cpu.count, max(1, math.ceil(took.cpu_seconds / _HOUR / cpu.cores / hours)))

    def _on_cpus(self, took: Amounts) -> dict[str, float]:
        cpu = self._config.cpu
        return {
            CPU: took.cpu_seconds / (cpu.count * cpu.cores) / _HOUR,
            **self._elsewhere(took, cpu.count * cpu.gigabytes_per_second),
        }

    def _on_gpus(self, took: Amounts, gpus: int, flops: float) -> dict[str, float]:
        """``flops`` as they would be at the GPU's peak."""
        gpu = self._config.gpu
        nodes = math.ceil(gpus / gpu.per_node)
        return {
            GPU: flops / (gpus * gpu.gpu.flops) / _HOUR,
            **self._elsewhere(took, nodes * gpu.gigabytes_per_second),
        }

    def _elsewhere(self, took: Amounts, gigabytes_per_second: float) -> dict[str, float]:
        store = self._config.store
        moved = took.read_bytes + took.written_bytes
        waits = max(took.reads / store.reads_per_second, took.writes / store.writes_per_second)
        return {STORE: waits / _HOUR, NETWORK: moved / (gigabytes_per_second * 1e9) / _HOUR}

    def _asked(
        self, model: Api | Local, calls: float, tokens: tuple[float, float]
    ) -> tuple[float, int, float]:
        """Hours of a model, GPUs that it holds, and dollars that its answers cost."""
        if isinstance(model, Local):
            gpus = self._config.gpu.count
            seconds = (
                tokens[0] / model.input_tokens_per_second
                + tokens[1] / model.output_tokens_per_second
            )
            return seconds / gpus / _HOUR, gpus, 0.0
        minutes = max(calls / model.requests_per_minute, sum(tokens) / model.tokens_per_minute)
        paid = (tokens[0] * model.input_price + tokens[1] * model.output_price) / 1e6
        return minutes / 60, 0, paid

    def _priced(self, stage: Stage) -> Stage:
        config, store = self._config, self._config.store
        devices = stage.wall_hours * (
            stage.nodes * config.cpu.price_per_hour + stage.gpus * config.gpu.price_per_hour
        )
        requests = (
            stage.amounts.reads * store.price_per_1000_reads
            + stage.amounts.writes * store.price_per_1000_writes
        ) / 1000
        return replace(stage, devices_usd=devices, store_usd=requests)
