"""The judge of the tabletop: whether an image shows the scene that its record says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from dim import tabletop
from dim.errors import InputError


class TabletopJudge:
    """``exact`` and ``strict`` (0 or 1, see :class:`dim.tabletop.Judgement`) where known."""

    columns = ("provenance",)

    def judge(
        self,
        painted: Image.Image,
        target: Image.Image,
        source: Image.Image | None,
        row: Mapping[str, Any],
    ) -> dict[str, float]:
        """See :class:`dim.judges.Judge`; the scenes in ``provenance`` say more than the images.

        Raises:
            InputError: the provenance is no JSON or its scene is none.
        """
        provenance = row["provenance"]
        scene = target_scene(provenance)
        if scene is None:
            return {}
        before = _scene(provenance, "source_scene")
        judgement = tabletop.judge(painted, scene, before)
        scores = {"exact": float(judgement.exact)}
        # Of an edit without its source nobody knows what should have stayed.
        if before is not None or _scene(provenance, "target_scene") is None:
            scores["strict"] = float(judgement.strict)
        return scores


def target_scene(provenance: str | None) -> tabletop.Scene | None:
    """The scene that a tabletop record's image to paint shows, or ``None`` for other records.

    Raises:
        InputError: the provenance is no JSON or its scene is none.
    """
    return _scene(provenance, "target_scene", "scene")


def _scene(provenance: str | None, *names: str) -> tabletop.Scene | None:
    if not provenance:
        return None
    try:
        origin = json.loads(provenance).get("tabletop")
    except (ValueError, AttributeError):
        raise InputError(f"a record's provenance is no JSON object: {provenance[:80]!r}") from None
    if not origin:
        return None
    scene = next((origin[name] for name in names if origin.get(name)), None)
    if scene is None:
        return None
    return tabletop.Scene.from_json(scene if isinstance(scene, str) else json.dumps(scene))
