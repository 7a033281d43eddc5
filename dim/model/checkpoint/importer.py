"""From a published checkpoint to a DIM folder, a tensor at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dim.config import dump_config, validate_config
from dim.errors import CheckpointError, ConfigError, InputError
from dim.model import parts, released
from dim.model.checkpoint import folder, reference, tensorfile
from dim.model.checkpoint.finite import is_finite, refuse_not_finite
from dim.model.checkpoint.folder import Provenance
from dim.model.checkpoint.tensorfile import MAX_SHARD_BYTES, Produce, Shape, Spec, TensorFiles
from dim.model.config import (
    AutoencoderConfig,
    ModelConfig,
    PartConfig,
    Task,
    UnderstandingConfig,
    VlmView,
    weights_path,
)
from dim.model.painter import PATCH_WEIGHT, resized_null_condition, widened
from dim.model.released import AUTOENCODER, CONNECTOR, NULL_TABLE, PAINTER, UNDERSTANDING, UNUSED

# Where the frozen parts of the published models are when nothing else is said.
PUBLISHED = ModelConfig(
    understanding=UnderstandingConfig(weights="Qwen/Qwen2.5-VL-3B-Instruct"),
    autoencoder=AutoencoderConfig(weights="mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"),
)
# Seeds the new rows of a lengthened null table.
SEED = 0


@dataclass(frozen=True)
class Changes:
    """What an import changes on purpose; as it stands, nothing.

    ``widen``: a text-to-image painter becomes an edit painter, see ``Painter.widen``.
    ``null_condition_tokens``: the null table gets so many rows, see
    ``Painter.resize_null_condition``.
    """

    widen: bool = False
    null_condition_tokens: int | None = None


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    config: ModelConfig = PUBLISHED,
    task: Task | None = None,
    changes: Changes | None = None,
    copy_understanding: bool | None = None,
    attention_head_dim: int | None = None,
    cross_attention_head_dim: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Provenance:
    """Write the DIM folder of a published checkpoint, all of it or nothing.

    Weights keep their types and bits. Sizes are those of the tensors; ``config`` gives what no
    tensor shows: where the frozen parts are, how pictures are prepared, how samples are drawn.

    Args:
        path: the safetensors file, or the folder of ``model.safetensors`` or its shards.
        out: the folder; an earlier DIM there is replaced.
        config: ``understanding.weights`` and ``autoencoder.weights`` are read where the checkpoint
            lacks these parts; of the autoencoder's the configuration is read in any case.
        task: what the checkpoint must be for; None takes either.
        changes: widening, and the null table's length; None changes nothing.
        copy_understanding: True copies the understanding model into the folder, False refers to
            ``understanding.weights``; None copies it if the checkpoint has it.
        attention_head_dim, cross_attention_head_dim: features of a head, which leave no trace in
            any shape. None: what the file's header says, else ``painter.architecture``, else the
            published 32 and 112.
        max_shard_bytes: larger parts are written in shards.

    Returns:
        Where the weights came from, as ``dim.json`` has it.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, one for another task, weights that are
            not finite; or tensors are missing, unexpected or of wrong shape or type, all listed.
        ConfigError: ``config`` says too little or nonsense about the frozen parts.
        InputError: something else is at ``out``, or a change that the checkpoint does not allow.
    """
    changes = changes or Changes()
    files = released.open_checkpoint(path)
    if released.VIEW in files.metadata:
        config = config.showing(_view(str(path), files.metadata[released.VIEW]))
    heads = _head_dims(files.metadata, config, attention_head_dim, cross_attention_head_dim)
    layout, problems = released.read_layout(files, *heads)
    copied = _copies(files, copy_understanding)
    vae = _source(files, AUTOENCODER, config.autoencoder, folder.NETWORK_STEM)
    mllm = _source(files, UNDERSTANDING, config.understanding, folder.UNDERSTANDING_STEM)
    problems += _unknown_sections(files)
    problems += _autoencoder_problems(config.autoencoder, layout, vae)
    problems += _understanding_problems(config.understanding, layout, mllm if copied else None)
    layout = released.require_layout(str(path), layout, problems)
    released.require_task(str(path), layout, task)
    _require_allowed(layout, changes)
    layout = _with_sample_size(layout, config)
    settings = _settings(str(path), config, layout, changes)
    provenance = _provenance(str(path), files, layout, copied)
    with folder.replacing(Path(out)) as staged:
        writer = Writer(files, max_shard_bytes)
        _write_trained(staged, writer, layout, changes)
        _write_autoencoder(staged / folder.AUTOENCODER, writer, config.autoencoder, vae)
        if copied:
            place = staged / folder.UNDERSTANDING
            _write_understanding(place, writer, config.understanding, mllm)
        refuse_not_finite(str(path), writer.not_finite)
        referred = None if copied else reference.everywhere(str(config.understanding.weights))
        folder.describe(staged, settings, referred, provenance)
    return provenance


class Source(NamedTuple):
    """Where a frozen part's tensors are read: ``names`` has the part's names → those in ``files``.

    ``label``: what messages put in front of the part's names.
    """

    files: TensorFiles
    names: dict[str, str]
    label: str

    def problems(self, shapes: Mapping[str, Shape]) -> list[str]:
        """What is missing, unexpected or wrong, a phrase each; ``shapes`` by the part's names."""
        found = {self.label + new: self.files[old] for new, old in self.names.items()}
        expected = {self.label + name: shape for name, shape in shapes.items()}
        return released.wrong_types(found) + released.compare(found, expected)


class Writer:
    """Writes tensors of a checkpoint under other names; remembers those that are not finite."""

    def __init__(self, files: TensorFiles, max_shard_bytes: int) -> None:
        self.files = files
        self.max_shard_bytes = max_shard_bytes
        self.not_finite: list[str] = []

    def copy(self, target: Path, stem: str, source: Source) -> None:
        """The tensors of ``source`` as they are into ``target/stem``."""

        def produce(new: str) -> Tensor:
            return self.checked(source.label + new, source.files.read(source.names[new]))

        specs = {new: source.files[old] for new, old in source.names.items()}
        self.write(target, stem, specs, produce)

    def write(self, target: Path, stem: str, specs: Mapping[str, Spec], produce: Produce) -> None:
        """Tensors as ``produce`` gives them into ``target/stem``, in shards if need be."""
        tensorfile.write_folder(
            target,
            stem,
            specs,
            produce,
            metadata={"format": "pt"},  # what transformers and diffusers write and ask for
            max_shard_bytes=self.max_shard_bytes,
        )

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint, checked."""
        return self.checked(name, self.files.read(name))

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, which comes from ``name``; remembered if it is not finite."""
        if name not in self.not_finite and not is_finite(tensor):
            self.not_finite.append(name)
        return tensor


def _section(files: Mapping[str, Spec], prefix: str) -> dict[str, str]:
    """The tensors behind ``prefix``: name without it → name in the checkpoint."""
    return {name.removeprefix(prefix): name for name in files if name.startswith(prefix)}


def _head_dims(
    metadata: Mapping[str, str], config: ModelConfig, self_dim: int | None, cross_dim: int | None
) -> tuple[int, int]:
    """Features of a head in self- and in cross-attention."""
    places = (
        ("attention_head_dim", self_dim, released.HEAD_DIM),
        ("cross_attention_head_dim", cross_dim, released.CROSS_HEAD_DIM),
    )
    first, second = (
        int(given or metadata.get(name) or config.painter.architecture.get(name, published))
        for name, given, published in places
    )
    return first, second


def _view(path: str, said: str) -> VlmView:
    """What a header says that the understanding model was shown in training."""
    if said not in get_args(VlmView):
        raise CheckpointError(f"{path}: {released.VIEW} in its header: {said!r} is not known")
    return cast(VlmView, said)


def _copies(files: Mapping[str, Spec], wanted: bool | None) -> bool:
    return bool(_section(files, UNDERSTANDING)) if wanted is None else wanted


def _unknown_sections(files: Mapping[str, Spec]) -> list[str]:
    return [
        f"unexpected {name}" for name in sorted(files) if not name.startswith(released.SECTIONS)
    ]


def _source(files: TensorFiles, prefix: str, config: PartConfig, stem: str) -> Source | None:
    """A frozen part's tensors in the checkpoint, or else in the part's own folder.

    None: the part must be loaded, because it lies on the hub, in another format, or is wanted in
    another type.
    """
    if names := _section(files, prefix):
        return Source(files, names, prefix)
    if config.weights is None or config.dtype is not None:
        return None
    where = weights_path(config.weights)
    try:
        elsewhere = tensorfile.open_folder(Path(where), stem)
    except CheckpointError:
        return None
    return Source(elsewhere, {name: name for name in elsewhere}, f"{where}: ")


def _autoencoder_problems(
    config: AutoencoderConfig, layout: released.Layout | None, source: Source | None
) -> list[str]:
    """What does not fit between checkpoint and autoencoder."""
    if source is None and config.weights is None:
        return [f"missing {AUTOENCODER}*, and autoencoder.weights names no other autoencoder"]
    try:
        network = _autoencoder(config)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    channels = network.config["latent_channels"]
    if layout is not None and layout.latent_channels != channels:
        problems.append(
            f"the painter's latents have {layout.latent_channels} channels, the autoencoder's "
            f"have {channels}"
        )
    return problems + (source.problems(_shapes(network)) if source else [])


def _understanding_problems(
    config: UnderstandingConfig, layout: released.Layout | None, source: Source | None
) -> list[str]:
    """What does not fit between checkpoint and understanding model.

    ``source``: its tensors, if they are to be copied. A model that is only referred to and lies
    elsewhere is not asked for: loading will tell.
    """
    where = _understanding_place(config)
    if source is None and not Path(where).is_dir():
        return []
    try:
        saved = parts.saved_understanding_config(where)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    hidden_size = saved.text_config.hidden_size
    if layout is not None and layout.hidden_size != hidden_size:
        problems.append(
            f"projector.0.weight takes tokens of {layout.hidden_size} features, "
            f"but {where} gives {hidden_size}"
        )
    return problems + (source.problems(_understanding_shapes(saved, source)) if source else [])


def _understanding_shapes(saved: Qwen2_5_VLConfig, source: Source) -> dict[str, Shape]:
    """The shapes of the understanding model's tensors, named as they are in ``source``.

    Checkpoints have the names that transformers writes or, with a level more, those of its
    classes; it reads both.
    """
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(saved)
    shapes = _shapes(model)
    if not any(name.startswith("model.language_model.") for name in source.names):
        shapes = {
            re.sub(r"^model\.(visual)|^(model)\.language_model", r"\1\2", name): shape
            for name, shape in shapes.items()
        }
    if saved.tie_word_embeddings and "lm_head.weight" not in source.names:
        del shapes["lm_head.weight"]
    return shapes


def _understanding_place(config: UnderstandingConfig) -> str:
    if config.weights is None:
        raise ConfigError(
            "understanding.weights is null: a checkpoint has no tokenizer, so say where the "
            "understanding model is"
        )
    return weights_path(config.weights)


def _autoencoder(config: AutoencoderConfig) -> AutoencoderDC:
    """The autoencoder without weights."""
    arguments = parts.autoencoder_config(config)
    try:
        with torch.device("meta"):
            return AutoencoderDC(**arguments)
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"autoencoder.architecture: {reason}") from error


def _shapes(module: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _require_allowed(layout: released.Layout, changes: Changes) -> None:
    if changes.widen and layout.task == "edit":
        raise InputError("an edit checkpoint has a source latent's channels already")
    rows = changes.null_condition_tokens
    if rows is not None and rows < 1:
        raise InputError(f"the null table must have 1 row or more, not {rows}")


def _with_sample_size(layout: released.Layout, config: ModelConfig) -> released.Layout:
    """``layout`` with the configured number that diffusers stores and a SANA does not use."""
    if "sample_size" not in config.painter.architecture:
        return layout
    kept = {"sample_size": config.painter.architecture["sample_size"]}
    return dataclasses.replace(layout, architecture=layout.architecture | kept)


def _settings(
    where: str, config: ModelConfig, layout: released.Layout, changes: Changes
) -> ModelConfig:
    """``config`` with the sizes of the checkpoint."""
    rows = changes.null_condition_tokens or layout.null_condition_tokens
    values: dict[str, Any] = dump_config(config)
    understanding = values["understanding"]
    understanding["max_condition_tokens"] = min(understanding["max_condition_tokens"], rows)
    values["connector"] = {"out_features": layout.condition_features}
    values["painter"] |= {
        "weights": None,
        "dtype": None,
        "architecture": layout.architecture | {"in_channels": layout.latent_channels},
        "source_latent": changes.widen or layout.task == "edit",
        "null_condition_tokens": rows,
    }
    values["autoencoder"]["architecture"] = parts.autoencoder_config(config.autoencoder)
    return validate_config(ModelConfig, values, where=where)


def _provenance(path: str, files: TensorFiles, layout: released.Layout, copied: bool) -> Provenance:
    taken = [CONNECTOR, PAINTER, AUTOENCODER, *([UNDERSTANDING] if copied else [])]
    present = [prefix for prefix in released.SECTIONS if _section(files, prefix)]
    return Provenance(
        checkpoint=path,
        task=layout.task,
        sections=tuple(prefix for prefix in present if prefix in taken),
        left_out=tuple(prefix for prefix in present if prefix not in taken),
        metadata=files.metadata,
        null_condition_tokens=layout.null_condition_tokens,
    )


def _write_trained(staged: Path, writer: Writer, layout: released.Layout, changes: Changes) -> None:
    """The painter, its null table and what it does not use; the connector."""
    _write_painter(staged / folder.PAINTER, writer, layout, changes.widen)
    table = writer.read(NULL_TABLE)
    if changes.null_condition_tokens is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            table = resized_null_condition(table, changes.null_condition_tokens)
    save_file({parts.NULL_CONDITION: table}, staged / parts.NULL_CONDITION_FILE)
    connector = {new: writer.read(old) for new, old in _section(writer.files, CONNECTOR).items()}
    save_file(connector, staged / folder.CONNECTOR_FILE)
    if UNUSED in writer.files:
        save_file({UNUSED: writer.files.read(UNUSED)}, staged / folder.UNUSED_FILE)


def _write_painter(target: Path, writer: Writer, layout: released.Layout, widen: bool) -> None:
    architecture = dict(layout.architecture)
    if widen:
        architecture["in_channels"] *= 2
    with torch.device("meta"):
        network = SanaTransformer2DModel(**architecture)
    network.save_config(target)

    def produce(name: str) -> Tensor:
        place = layout.places[name]
        tensor = writer.checked(place.name, released.read_place(writer.files, place))
        return widened(tensor) if widen and name == PATCH_WEIGHT else tensor

    specs = {
        name: Spec(writer.files[layout.places[name].name].dtype, tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
    }
    writer.write(target, folder.NETWORK_STEM, specs, produce)


def _write_autoencoder(
    target: Path, writer: Writer, config: AutoencoderConfig, source: Source | None
) -> None:
    if source is None:
        parts.autoencoder(config).network.save_pretrained(target)
        return
    _autoencoder(config).save_config(target)
    writer.copy(target, folder.NETWORK_STEM, source)


def _write_understanding(
    target: Path, writer: Writer, config: UnderstandingConfig, source: Source | None
) -> None:
    if source is None:
        folder.write_understanding(target, parts.conditioner(config))
        return
    parts.copy_understanding_files(_understanding_place(config), target)
    writer.copy(target, folder.UNDERSTANDING_STEM, source)
