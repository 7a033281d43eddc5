"""The four parts of a DIM, each from weights or at random from its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dim.errors import CheckpointError, ConfigError
from dim.model.autoencoder import Autoencoder
from dim.model.checkpoint.finite import require_finite
from dim.model.conditioner import Conditioner
from dim.model.config import (
    AutoencoderConfig,
    ConnectorConfig,
    ModelConfig,
    PainterConfig,
    PartConfig,
    UnderstandingConfig,
    weights_path,
)
from dim.model.connector import Connector
from dim.model.painter import Painter, random_null_condition
from dim.model.tokenizer import build_tokenizer

NULL_CONDITION_FILE = "null_condition.safetensors"
NULL_CONDITION = "null_condition"
# Between the pictures' sizes that Qwen may be shown there is no limit of ours.
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 1 << 30}


class Parts(NamedTuple):
    """The modules of a DIM."""

    conditioner: Conditioner
    connector: Connector
    painter: Painter
    autoencoder: Autoencoder


def make(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype | None = None) -> Parts:
    """Every part of ``config``; see the functions below."""
    understanding = conditioner(config.understanding, seed=seed, dtype=dtype)
    return Parts(
        understanding,
        connector(config.connector, understanding.hidden_size, seed=seed, dtype=dtype),
        painter(config.painter, seed=seed, dtype=dtype),
        autoencoder(config.autoencoder, seed=seed, dtype=dtype),
    )


def conditioner(
    config: UnderstandingConfig, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Conditioner:
    """The frozen Qwen2.5-VL with its tokenizer.

    With null weights the tokenizer is a byte tokenizer. ``dtype`` None is the configured type.

    Raises:
        CheckpointError: the weights are missing, damaged or incomplete.
        ConfigError: the architecture is not one.
    """
    dtype = dtype or _configured(config)
    if config.weights is None:
        tokenizer = build_tokenizer((), vocab_size=_vocab_size(config.architecture))
        with _random(seed, "understanding.architecture"):
            model = Qwen2_5_VLForConditionalGeneration(
                understanding_config(config.architecture, tokenizer)
            )
        processor = image_processor(model.config)
    else:
        where = weights_path(config.weights)
        model = _understanding(where, dtype)
        tokenizer, processor = _readers(where, model.config)
    if dtype is not None:
        model = model.to(dtype)
    return Conditioner(
        model,
        tokenizer,
        processor,
        image_size=config.image_size,
        max_condition_tokens=config.max_condition_tokens,
    )


def understanding_config(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> Qwen2_5_VLConfig:
    """``architecture`` as a Qwen2.5-VL configuration with the special ids of ``tokenizer``."""
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    text = {
        **architecture.get("text_config", {}),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen2_5_VLConfig(**{**architecture, **ids, "text_config": text})


def image_processor(config: Qwen2_5_VLConfig) -> Qwen2VLImageProcessorPil:
    """The PIL image processor for a vision tower; it keeps every size that divides into patches."""
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size=ANY_SIZE,
    )


def autoencoder(
    config: AutoencoderConfig, *, seed: int = 0, dtype: torch.dtype | None = None
) -> Autoencoder:
    """The frozen DC-AE.

    Raises:
        CheckpointError, ConfigError: as for ``conditioner``.
    """
    dtype = dtype or _configured(config)
    if config.weights is None:
        with _random(seed, "autoencoder.architecture"):
            network = AutoencoderDC(**config.architecture)
        return Autoencoder(network if dtype is None else network.to(dtype))
    return Autoencoder(_diffusers(AutoencoderDC, weights_path(config.weights), None, dtype))


def connector(
    config: ConnectorConfig,
    in_features: int,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Connector:
    """The connector from ``in_features``.

    Raises:
        CheckpointError: the weights are missing, damaged or of other sizes.
    """
    dtype = dtype or _configured(config)
    with _random(seed, "connector"):
        module = Connector(in_features, config.out_features)
    if config.weights is not None:
        where = Path(weights_path(config.weights))
        with _readable(str(where)):
            tensors = load_file(where)
            module.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        require_finite(str(where), tensors)
    return module if dtype is None else module.to(dtype)


def painter(config: PainterConfig, *, seed: int = 0, dtype: torch.dtype | None = None) -> Painter:
    """The painter with its null table, widened and resized as ``config`` wants it.

    Raises:
        CheckpointError, ConfigError: as for ``conditioner``.
    """
    dtype = dtype or _configured(config)
    module = _random_painter(config, seed) if config.weights is None else _painter(config, dtype)
    if config.weights is not None:
        require_finite(weights_path(config.weights), module.state_dict())
    with _random(seed, "painter"):
        module.resize_null_condition(config.null_condition_tokens)
    if config.source_latent and not module.takes_source:
        module.widen()
    if module.takes_source and not config.source_latent:
        raise ConfigError("painter.source_latent is false, but the weights are an edit painter's")
    return module if dtype is None else module.to(dtype)


def _random_painter(config: PainterConfig, seed: int) -> Painter:
    with _random(seed, "painter.architecture"):
        network = SanaTransformer2DModel(**config.architecture)
        null_condition = random_null_condition(
            config.null_condition_tokens, network.config["caption_channels"]
        )
    torch.nn.init.constant_(network.caption_norm.weight, config.condition_norm_scale)
    return Painter(network, null_condition, integer_timesteps=config.integer_timesteps)


def _painter(config: PainterConfig, dtype: torch.dtype | None) -> Painter:
    where = weights_path(str(config.weights))
    network = _diffusers(SanaTransformer2DModel, where, "transformer", dtype)
    null_condition = _null_condition(Path(where))
    if null_condition is None:
        null_condition = random_null_condition(0, network.config["caption_channels"])
    return Painter(
        network,
        null_condition.to(network.dtype),
        integer_timesteps=config.integer_timesteps,
    )


def _null_condition(folder: Path) -> Tensor | None:
    for file in (folder / NULL_CONDITION_FILE, folder.parent / NULL_CONDITION_FILE):
        if file.is_file():
            with _readable(str(file)):
                return load_file(file)[NULL_CONDITION]
    return None


def _understanding(where: str, dtype: torch.dtype | None) -> Qwen2_5_VLForConditionalGeneration:
    with _readable(where):
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            where, dtype=dtype or "auto", output_loading_info=True
        )
    _complete(where, report)
    # Sampling defaults that come with a checkpoint are not ours: a design is the likeliest answer.
    model.generation_config = GenerationConfig()
    return model


def saved_understanding_config(where: str) -> Qwen2_5_VLConfig:
    """The configuration of the understanding model at ``where``, a folder or a hub id.

    Raises:
        CheckpointError: it has none, or a damaged one.
    """
    # Of a folder without one transformers would make up a configuration.
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise CheckpointError(f"cannot load weights from {where}: it has no config.json")
    with _readable(where):
        return Qwen2_5_VLConfig.from_pretrained(where)


def copy_understanding_files(where: str, folder: Path) -> None:
    """All but the weights of the understanding model at ``where``, written into ``folder``.

    Raises:
        CheckpointError: something is missing or damaged.
    """
    config = saved_understanding_config(where)
    for part in (config, *_readers(where, config)):
        part.save_pretrained(folder)


def _readers(
    where: str, config: Qwen2_5_VLConfig
) -> tuple[PreTrainedTokenizerBase, Qwen2VLImageProcessorPil]:
    """What reads texts and pictures for the understanding model at ``where``."""
    with _readable(where):
        tokenizer = AutoTokenizer.from_pretrained(where)
        if Path(where).is_dir() and not (Path(where) / "preprocessor_config.json").is_file():
            return tokenizer, image_processor(config)
        return tokenizer, Qwen2VLImageProcessorPil.from_pretrained(where)


def autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    """The keyword arguments of ``AutoencoderDC`` for ``config``; no weights are read.

    Raises:
        CheckpointError: the weights have no configuration, or a damaged one.
    """
    if config.weights is None:
        return config.architecture
    where = weights_path(config.weights)
    with _readable(where):
        saved = AutoencoderDC.load_config(where)
    return {name: value for name, value in saved.items() if not name.startswith("_")}


def patch_size(config: PainterConfig) -> int:
    """Latent cells along each side of a painter's token; no weights are read.

    Raises:
        CheckpointError: the weights have no configuration, or a damaged one.
    """
    if config.weights is None:
        return int(config.architecture.get("patch_size", 1))
    where = weights_path(config.weights)
    nested = not (Path(where) / "config.json").is_file()
    with _readable(where):
        saved = SanaTransformer2DModel.load_config(
            where, subfolder="transformer" if nested else None
        )
    return int(saved["patch_size"])


def _diffusers(cls: Any, where: str, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    """A diffusers network from a folder, a sub-folder of it, or the hub."""
    folder = Path(where)
    if folder.is_dir() and (folder / "config.json").is_file():
        subfolder = None
    with _readable(where):
        network, report = cls.from_pretrained(
            where,
            subfolder=subfolder,
            torch_dtype=dtype or _saved_dtype(folder / (subfolder or "")),
            output_loading_info=True,
        )
    _complete(where, report)
    return network


def _configured(config: PartConfig) -> torch.dtype | None:
    return None if config.dtype is None else getattr(torch, config.dtype)


def _saved_dtype(folder: Path) -> torch.dtype:
    """The floating type of a folder's first tensor; single precision where there is no folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for key in reader.keys():  # noqa: SIM118
                return reader.get_slice(key)[...].dtype
    return torch.float32


def _complete(where: str, report: dict[str, Any]) -> None:
    problems = [f"missing {key}" for key in sorted(report.get("missing_keys", ()))]
    problems += [
        f"wrong shape {key}" for key in sorted(map(str, report.get("mismatched_keys", ())))
    ]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")


def _vocab_size(architecture: dict[str, Any]) -> int:
    return int(architecture.get("text_config", {}).get("vocab_size", 1024))


@contextmanager
def _random(seed: int, section: str) -> Iterator[None]:
    """Random weights by ``seed`` alone; an architecture that no class accepts names its section."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            yield
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise ConfigError(f"{section}: {' '.join(str(error).split())}") from error


@contextmanager
def _readable(where: str) -> Iterator[None]:
    """Loading: what the libraries raise becomes one sentence."""
    try:
        with without_progress_bars():
            yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"cannot load weights from {where}: {reason}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers reads and writes without drawing bars meanwhile."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
