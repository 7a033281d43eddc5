"""What a DIM folder holds, from its description and its files' headers; no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dim.errors import CheckpointError
from dim.model import parts
from dim.model.checkpoint import folder, tensorfile
from dim.model.checkpoint.folder import Description
from dim.model.checkpoint.tensorfile import TensorFiles
from dim.model.config import Task
from dim.model.painter import PATCH_WEIGHT


@dataclass(frozen=True)
class PartSummary:
    """A part's weights: how many numbers, in which types (F32, …), how many bytes."""

    name: str
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """A DIM folder.

    ``parts``: what lies in the folder, and the understanding model if it lies in a folder
    elsewhere. ``sizes``: name → number, in the order to show them.
    """

    path: Path
    description: Description
    parts: tuple[PartSummary, ...]
    sizes: dict[str, int]

    @property
    def stage(self) -> Task:
        """What the painter can do: ``edit`` or ``t2i``."""
        return "edit" if self.description.config.painter.source_latent else "t2i"


def summarise(path: str | Path) -> Summary:
    """Read the description and the headers of the DIM folder ``path``.

    Raises:
        CheckpointError: no such folder, not a DIM, incomplete, or a damaged file.
    """
    path = Path(path)
    description = folder.read_description(path)
    connector = TensorFiles([path / folder.CONNECTOR_FILE])
    table = TensorFiles([path / parts.NULL_CONDITION_FILE])
    painter = tensorfile.open_folder(path / folder.PAINTER, folder.NETWORK_STEM)
    autoencoder = tensorfile.open_folder(path / folder.AUTOENCODER, folder.NETWORK_STEM)
    found = {
        "understanding": _understanding(path, description),
        "connector": connector,
        "painter": painter,
        "null table": table,
        "autoencoder": autoencoder,
    }
    return Summary(
        path,
        description,
        tuple(_part(name, files) for name, files in found.items() if files is not None),
        _sizes(description, connector, painter, table),
    )


def _understanding(path: Path, description: Description) -> TensorFiles | None:
    """The understanding model's headers, if it is in the folder or in one that is in reach."""
    place = description.understanding_in_reach(path)
    return None if place is None else tensorfile.open_folder(place, folder.UNDERSTANDING_STEM)


def _part(name: str, files: TensorFiles) -> PartSummary:
    return PartSummary(
        name,
        sum(spec.count for spec in files.values()),
        tuple(sorted({spec.dtype for spec in files.values()})),
        sum(spec.nbytes for spec in files.values()),
    )


def _sizes(
    description: Description, connector: TensorFiles, painter: TensorFiles, table: TensorFiles
) -> dict[str, int]:
    config = description.config
    architecture: dict[str, Any] = config.painter.architecture
    try:
        patch = painter[PATCH_WEIGHT].shape
        outputs = painter["proj_out.bias"].shape[0]
        return {
            "layers": len({name.split(".")[1] for name in painter if ".attn1.to_q.w" in name}),
            "width": patch[0],
            "input channels": patch[1],
            "latent channels": outputs // patch[2] ** 2,
            "patch size": patch[2],
            "self-attention heads": architecture.get("num_attention_heads", 0),
            "cross-attention heads": architecture.get("num_cross_attention_heads", 0),
            "hidden states' features": connector["0.weight"].shape[1],
            "condition's features": connector["2.weight"].shape[0],
            "null table's rows": table[parts.NULL_CONDITION].shape[0],
            "longest condition in tokens": config.understanding.max_condition_tokens,
            "resolution in pixels": config.sampling.resolution,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{painter.files[0]}: not a DIM's tensors: {error}") from None
