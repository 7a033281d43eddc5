from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dim import judges, tabletop
from dim.errors import ConfigError, InputError
from dim.judges import Judge
from dim.judges.similarity import SAME
from dim.judges.tabletop import target_scene

SCENE = tabletop.sample_scene(np.random.default_rng(0))


def scores_of(name: str, image: Image.Image, target: Image.Image, provenance: str | None) -> object:
    row = {"id": "a", "provenance": provenance}
    return judges.create(name).judge(image, target, None, row)


def test_an_image_is_judged_by_the_scenes_of_its_record() -> None:
    def judged(image: Image.Image, provenance: str | None) -> object:
        return scores_of("tabletop", image, image, provenance)

    edited = SCENE.without(SCENE.objects[0])
    image = tabletop.render(edited, 64)
    source, target = (json.loads(scene.to_json()) for scene in (SCENE, edited))
    both = json.dumps({"tabletop": {"source_scene": source, "target_scene": target}})
    assert judged(image, both) == {"exact": 1, "strict": 1}
    assert judged(tabletop.render(SCENE, 64), both) == {"exact": 0, "strict": 0}
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.15)
    assert judged(faded, both) == {"exact": 1, "strict": 0}
    alone = json.dumps({"tabletop": {"target_scene": target}})  # nobody knows what should stay
    assert judged(image, alone) == {"exact": 1}
    assert judged(image, json.dumps({"tabletop": {"scene": target}})) == {"exact": 1, "strict": 1}
    assert judged(image, None) == {}


def test_the_scene_of_a_record() -> None:
    as_text = json.dumps({"tabletop": {"target_scene": SCENE.to_json()}})
    as_object = json.dumps({"tabletop": {"scene": json.loads(SCENE.to_json())}})
    assert target_scene(as_text) == target_scene(as_object) == SCENE
    assert target_scene(None) is None and target_scene('{"file": "a.png"}') is None
    with pytest.raises(InputError, match="provenance is no JSON object"):
        target_scene("[1")


def test_likeness_falls_with_the_difference() -> None:
    target = tabletop.render(SCENE, 64)
    grey = Image.new("RGB", target.size, "grey")
    near, far = (
        scores_of("similarity", Image.blend(target, grey, share), target, None)
        for share in (0.1, 0.6)
    )
    assert scores_of("similarity", target, target, None) == {"psnr": SAME, "ssim": 1.0}
    assert SAME > near["psnr"] > far["psnr"] > 0  # type: ignore[index]
    assert 1 > near["ssim"] > far["ssim"]  # type: ignore[index]
    black, white = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
    assert scores_of("similarity", black, white, None)["psnr"] == 0  # type: ignore[index]
    one_off = np.full((1024, 1024, 3), 9, np.uint8)
    one_off[0, 0, 0] = 10
    flat = Image.new("RGB", (1024, 1024), (9, 9, 9))
    assert scores_of("similarity", Image.fromarray(one_off), flat, None)["psnr"] == SAME  # type: ignore[index]


def test_every_judge_of_the_table_is_one() -> None:
    assert all(isinstance(judges.create(name), Judge) for name in judges.JUDGES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("beauty", "there is no judge 'beauty'; there are tabletop, similarity, or MODULE"),
        ("dim.nothing:make", "judge dim.nothing:make: .*No module named 'dim.nothing'"),
        ("dim.tabletop:make", "judge dim.tabletop:make: .*has no attribute 'make'"),
        ("collections:OrderedDict", "is a OrderedDict, which lacks columns or a method judge"),
    ],
)
def test_what_makes_no_judge_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        judges.create(name)
