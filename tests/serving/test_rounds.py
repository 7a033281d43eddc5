"""Edits in rounds: the designer looks at what was painted, with parts that need no Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest

from dim import tabletop
from dim.config import validate_config
from dim.design import Reply
from dim.designers import CallOptions
from dim.errors import DesignerError
from dim.images import encode_png
from dim.review import Review, parse
from serving import designer as designers
from serving.config import ServingConfig
from serving.designer import OtherDesigners
from serving.jobs import EditJob, ReviewJob
from tests.serving.fakes import BLUEPRINT, Server, opened, picture
from tests.serving.test_streams import read

BETTER = BLUEPRINT.replace("of it", "of it, better")
ACCEPTED = Review(True, 9).render()


def again(score: float, plan: str | None = None) -> str:
    return Review(False, score, "the end", plan).render()


def served(*reviews: Reply, **settings: Any) -> Server:
    server = Server(designers={"eye": "oracle", "blind": "self"}, **settings)
    server.designer.reviews = list(reviews)
    return server


def edit(server: Server, **fields: Any) -> httpx.Response:
    data = {"prompt": "x", "seed": 7, **fields}
    return server.http.post("/v1/images/edits", data=data, files={"image": ("a.png", picture())})


def plans(server: Server) -> list[tuple[str, int]]:
    jobs = [job for job in server.painter.jobs if isinstance(job, EditJob)]
    return [(job.text, job.seed) for job in jobs]


def test_one_round_is_an_edit_as_any_other() -> None:
    server, other = served(), served()
    one, plain = edit(server, rounds=1, best_of=1).json(), edit(other).json()
    assert one["data"] == plain["data"] and one["reviews"] is None
    assert plans(server) == plans(other) and not server.designer.looks


def test_it_is_painted_again_until_the_designer_is_content() -> None:
    server = served(again(2, BETTER), ACCEPTED)
    answer = edit(server, rounds=4).json()
    assert plans(server) == [(BLUEPRINT, 7), (BETTER, 8)]
    (image,) = answer["data"]
    assert (image["seed"], image["blueprint"]) == (8, BETTER)
    first, second = answer["reviews"]
    assert (first["round"], first["score"], first["accepted"]) == (1, 2, False)
    assert (first["missing"], first["blueprint"]) == ("the end", BLUEPRINT)
    assert (second["round"], second["score"], second["accepted"]) == (2, 9, True)
    assert 0 <= first["seconds"] <= second["seconds"]
    look = server.designer.looks[1]
    assert (look.designer, look.instruction, look.plan) == ("eye", "x", BETTER)
    assert opened(look.image).getpixel((0, 0)) == (200, 30, 30)
    assert opened(look.painted).getpixel((0, 0)) == opened(image["b64_json"]).getpixel((0, 0))
    alone = edit(served()).json()["usage"]
    assert answer["usage"]["output_tokens"] == 2 * alone["output_tokens"]


def test_of_several_the_best_is_taken() -> None:
    server = served(again(3), again(8), again(5))
    answer = edit(server, best_of=3, blueprint="as I say").json()
    assert plans(server) == [("as I say", seed) for seed in (7, 8, 9)]
    scores = [review["score"] for review in answer["reviews"]]
    assert sorted(scores) == [3, 5, 8]  # they are looked at at once
    taken = answer["reviews"][scores.index(8)]
    assert [image["seed"] for image in answer["data"]] == [taken["seed"]]


def test_a_stream_tells_each_review() -> None:
    found = read(edit(served(again(2), ACCEPTED), rounds=2, stream=True))
    names = [name for name, _ in found if "blueprint" not in name]
    assert names == ["image_edit.review", "image_edit.review", "image_edit.completed"]
    assert found[-1][1]["seed"] == 8 and found[-2][1]["review"]["accepted"]
    for name, data in found:
        if name == "image_edit.review":
            assert opened(data["b64_json"]).size == (48, 32)
            assert (data["size"], data["output_format"]) == ("48x32", "png")
    assert found[-2][1]["b64_json"] == found[-1][1]["b64_json"]


def test_without_a_review_the_image_is_handed_over() -> None:
    answer = edit(served(DesignerError("designer 'eye' gave no review")), rounds=3).json()
    assert len(answer["data"]) == 1
    (review,) = answer["reviews"]
    assert review["score"] is None and review["error"] == "designer 'eye' gave no review"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"designer": "blind"}, "designer", "'blind' cannot look at what was painted"),
        ({"designer": "none"}, "designer", "eye can"),
        ({"n": 2}, "n", "does not go with rounds"),
        ({"stream": True, "partial_images": 1}, "partial_images", "does not go with rounds"),
    ],
)
def test_what_does_not_go_with_rounds_is_refused(fields: dict, param: str, said: str) -> None:
    server = served()
    answer = edit(server, rounds=2, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"] and not server.painter.jobs


def test_rounds_are_work_before_they_are_begun() -> None:
    server = served(max_pending=10)
    answer = edit(server, rounds=4, best_of=3)
    assert answer.status_code == 400 and "12 images" in answer.json()["error"]["message"]
    assert not server.painter.jobs and not server.designer.jobs


def test_a_generation_has_no_rounds() -> None:
    body = {"prompt": "x", "rounds": 2}
    answer = served().http.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert "only edits are looked at" in answer.json()["error"]["message"]


def job(designer: str, image: bytes, painted: bytes, instruction: str = "x") -> ReviewJob:
    return ReviewJob(
        designer=designer, instruction=instruction, plan="plan", image=image, painted=painted
    )


def config(**settings: Any) -> ServingConfig:
    return validate_config(ServingConfig, {"model": "m", **settings}, where="test")


def test_the_oracle_looks_at_what_was_painted() -> None:
    made = tabletop.sample_edit(np.random.default_rng([11, 0]))
    source, target = (
        encode_png(tabletop.render(scene, 64)) for scene in (made.source, made.target)
    )
    pool = OtherDesigners(config(designers={"eye": "oracle"}), ["eye"])
    good, bad = (
        asyncio.run(pool.review(job("eye", source, painted, made.instruction)))
        for painted in (target, source)
    )
    assert (
        parse(str(good), instruction="").accepted and not parse(str(bad), instruction="").accepted
    )


class Reviewer:
    """A designer over HTTP, as far as its reviews go."""

    name, costly = "openai:vlm", True

    def __init__(self, answer: Reply) -> None:
        self.answer, self.asked = answer, 0

    def design(self, requests: Any) -> list[Reply]:
        return []

    def review(self, requests: Any) -> list[Reply]:
        self.asked += 1
        return [self.answer]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ACCEPTED, None),
        ("see http://upstream/secret", "designer 'best' gave no review that can be read"),
        (DesignerError("http://upstream/secret said 500"), "designer 'best' gave no review;"),
    ],
)
def test_a_review_is_paid_once_and_tells_nothing_of_upstream(
    answer: Reply, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reviewer = Reviewer(answer)

    def create(spec: str, *, calls: CallOptions) -> Reviewer:
        return reviewer

    monkeypatch.setattr(designers, "create", create)
    pool = OtherDesigners(config(designers={"best": "openai:vlm@http://u/v1"}), ["best"])

    async def ask(painted: bytes) -> Reply:
        return await pool.review(job("best", b"source", painted))

    async def ask_all() -> list[Reply]:
        return [await ask(b"one"), await ask(b"one"), await ask(b"other")]

    replies = asyncio.run(ask_all())
    if said is None:
        assert replies == [ACCEPTED] * 3
    else:
        assert all(said in str(reply) and "secret" not in str(reply) for reply in replies)
    assert reviewer.asked == (2 if isinstance(answer, str) else 3)
