"""The tiny SANA with its connector: what it paints of held-out captions, and how it is kept.

It stands where SANA1.5's weights stand for a real user: a painter that knows words, shapes and
places, and has never seen an edit.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from dim import tabletop
from dim.model import DIM, parts
from dim.tabletop import Scene
from dim.tiny.config import TinyBuildConfig
from dim.tiny.corpus import edit

_BATCH = 64


def painting_accuracy(config: TinyBuildConfig, model: DIM) -> dict[str, float]:
    """Share of held-out captions painted as they say, whatever the free positions within a place.

    ``objects`` asks for every thing in its place and nothing else, ``background`` for the table.
    """
    scenes = [edit(config, "evaluation", i).source for i in range(config.evaluate)]
    captions = [tabletop.caption(scene) for scene in scenes]
    images = model.generate(captions, seeds=range(len(scenes)), batch_size=_BATCH)
    read = [tabletop.read(image) for image in images]
    objects = [
        not found.unknown and _listed(found.scene) == _listed(scene)
        for found, scene in zip(read, scenes, strict=True)
    ]
    tables = [r.scene.background == s.background for r, s in zip(read, scenes, strict=True)]
    return {"objects": sum(objects) / len(scenes), "background": sum(tables) / len(scenes)}


def save_painter(model: DIM, folder: Path) -> None:
    """Write painter and connector as float16 into ``folder``; brings those of ``model`` to it."""
    model.painter.half().network.save_pretrained(folder)
    table = {parts.NULL_CONDITION: model.painter.null_condition.detach()}
    save_file(table, folder / parts.NULL_CONDITION_FILE)
    save_file(model.connector.half().state_dict(), folder / "connector.safetensors")


def _listed(scene: Scene) -> list[tuple[str, ...]]:
    return sorted((t.size, t.colour, t.shape, t.place) for t in scene.objects)
