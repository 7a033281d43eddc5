"""Designers as the server asks them: by name, in time, once for what was paid, without a word of
theirs that is not a blueprint."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from PIL import Image

from dim.blueprint import Blueprint
from dim.config import validate_config
from dim.designers import DesignRequest
from dim.designers.self_play import SelfDesigner
from dim.errors import ConfigError, DesignerError
from dim.images import encode_png
from serving import own_designer
from serving.config import NO_DESIGNER, ServingConfig
from serving.deployments import application, designers
from serving.designer import OtherDesigners, is_paid, presented
from serving.drafts import Draft
from serving.errors import error_response
from serving.jobs import DesignJob
from serving.own_designer import OwnDesigner
from serving.serve import named
from tests.chat_server import Response, completion
from tests.chat_server import running as chat_server
from tests.serving.fakes import RELEASE

SECRET = "s3cret"
PNG, OTHER_PNG = (
    encode_png(Image.new("RGB", (32, 32), colour)) for colour in ((255, 0, 0), (0, 255, 0))
)
ANSWER = (
    "**2. Global Layout Perception:** a table\n3. Local Object Perception: a cup\n"
    "4. Edit Area Localization: the middle\n5. Edited Image Imagination: no cup"
)


def config(**settings: Any) -> ServingConfig:
    return validate_config(ServingConfig, {"model": "m", **settings}, where="test")


def pool(url: str, **settings: Any) -> OtherDesigners:
    """A pool of one designer, ``best``, at ``url``."""
    best = {"spec": f"openai:vlm@{url}", "deadline_s": 5, **settings}
    return OtherDesigners(config(designers={"best": best}, kept_blueprints=2), ["best"])


def job(instruction: str = "remove the cup", image: bytes = PNG, **more: Any) -> DesignJob:
    return DesignJob("best", image, instruction, **more)


async def written(pool: OtherDesigners, job: DesignJob) -> str:
    return "".join([piece async for piece in pool.write(job)])


def test_an_answer_that_was_paid_for_is_not_asked_again() -> None:
    with chat_server(lambda _: completion(ANSWER)) as server:

        async def work() -> None:
            asked = pool(server.url)
            first, second = await asyncio.gather(*(written(asked, job()) for _ in range(2)))
            assert first == second == await written(asked, job())
            assert first.startswith("1. Edit Instruction: remove the cup")
            assert len(server.requests) == 1
            await written(asked, job("remove the plate"))
            await written(asked, job(image=OTHER_PNG))
            assert len(server.requests) == 3
            await written(asked, job())  # two are kept, and this was the oldest
            assert len(server.requests) == 4

        asyncio.run(work())


def test_who_stops_waiting_leaves_the_answer_to_who_asks_again() -> None:
    answer_now = threading.Event()

    def late(_: dict[str, Any]) -> Response:
        answer_now.wait(20)
        return completion(ANSWER)

    with chat_server(late) as server:

        async def work() -> None:
            asked = pool(server.url, deadline_s=20)
            with pytest.raises(DesignerError, match=r"'best' did not answer in [\d.]+ s"):
                await written(asked, job(deadline=time.time() + 0.3))
            answer_now.set()
            assert (await written(asked, job())).startswith("1. Edit Instruction")
            answer_now.clear()
            slow = pool(server.url, deadline_s=0.3)
            with pytest.raises(DesignerError, match=r"'best' did not answer in 0\.3 s"):
                await written(slow, job())
            answer_now.set()

        asyncio.run(work())
        assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("respond", "said", "asked"),
    [
        (lambda _: completion(f"I cannot, says {SECRET}."), "did not answer with a blueprint", 1),
        (lambda _: completion(None, "content_filter", refusal=SECRET), "did not answer", 1),
        (lambda _: Response(SECRET.encode(), 400), "did not answer", 2),
        (lambda _: Response(SECRET.encode(), 401), "takes no more questions for now", 2),
    ],
    ids=["no blueprint", "refused", "bad request", "wrong key"],
)
def test_what_others_write_stays_in_the_log(
    respond: Any, said: str, asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    with chat_server(respond) as server:
        url = server.url.replace("http://", f"http://me:{SECRET}@")

        async def work() -> None:
            asker = pool(url)
            for _ in range(2):
                with pytest.raises(DesignerError) as failed:
                    await written(asker, job())
                answer = error_response(failed.value)
                assert answer.status_code == 502
                body = answer.body.decode()
                assert f"designer 'best' {said}" in body and "log says why" in body
                assert SECRET not in body and server.url not in body and "vlm" not in body
                assert failed.value.__cause__ is None and failed.value.__context__ is None

        asyncio.run(work())
        assert len(server.requests) == asked, server.requests
    assert "best" in caplog.text


def test_a_budget_is_kept_and_its_end_is_said() -> None:
    with chat_server(lambda _: completion(ANSWER, tokens=(1000, 1000))) as server:

        async def work() -> None:
            asked = pool(server.url, input_price=1000, output_price=1000, budget_usd=6)
            with pytest.raises(DesignerError, match="takes no more questions"):
                for number in range(10):
                    await written(asked, job(f"remove cup {number}"))
            assert 1 <= len(server.requests) <= 3
            assert await written(asked, job("remove cup 0"))  # kept answers cost nothing

        asyncio.run(work())


def test_a_slow_designer_holds_up_no_other() -> None:
    may_answer = threading.Semaphore(0)

    def slowly(_: dict[str, Any]) -> Response:
        may_answer.acquire(timeout=20)
        return completion(ANSWER)

    with chat_server(slowly) as slow, chat_server(lambda _: completion(ANSWER)) as fast:
        settings = config(
            designers={
                "slow": {"spec": f"openai:a@{slow.url}", "concurrency": 1},
                "best": f"openai:b@{fast.url}",
            }
        )

        async def work() -> None:
            asked = OtherDesigners(settings, ["slow", "best"])
            jobs = [DesignJob("slow", PNG, f"remove cup {number}") for number in range(3)]
            waiting = [asyncio.create_task(written(asked, each)) for each in jobs]
            assert await written(asked, job())
            assert not any(each.done() for each in waiting)
            may_answer.release()
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert sum(each.done() for each in waiting) == 1
            assert len(slow.requests) <= 2  # one at a time
            for each in waiting:
                each.cancel()
            may_answer.release(3)  # for who is still there

        asyncio.run(work())


def test_designers_have_names_that_are_all_clients_hear() -> None:
    spec = f"openai:vlm@https://me:{SECRET}@host/v1"
    given = config(designers={"best": spec, "fast": "self"})
    assert given.offered == ["best", "fast", NO_DESIGNER]
    assert config(designers=["oracle", "none"]).offered == ["oracle", "none"]
    assert config().offered == ["self", "none"]
    assert named(["fast=self", "best=openai:m@http://h/v1?a=b", "oracle"]) == {
        "fast": "self",
        "best": "openai:m@http://h/v1?a=b",
        "oracle": "oracle",
    }
    for wrong, said in (
        ([spec], "needs a name"),
        ({}, "at least one designer"),
        ({"a b": "self"}, "no name of"),
        ({"none": "self"}, "painting the instruction"),
        ({"fast": "none"}, "painting the instruction"),
        ({"best": {"spec": spec, "deadline_s": 300}}, "less than request_timeout_s"),
        ({"best": {"spec": spec, "budget_usd": 1}}, "needs input_price"),
        ({"fast": {"spec": "self", "requests_per_minute": 1}}, "openai: designers alone"),
        ({"fast": {"spec": "self", "concurrency": 1}}, "those batch"),
        ({"best": {"spec": spec, "budget": 1}}, "budget"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            config(designers=wrong)
        assert SECRET not in str(refused.value)
    for twice in (["a=self", "a=oracle"], ["openai:m@http://h/v1"]):
        with pytest.raises(ConfigError, match="designer"):
            named(twice)


def test_a_pool_for_models_of_ours_and_one_that_takes_no_device() -> None:
    given = config(
        designers={
            "fast": "self",
            "best": "openai:m@http://h/v1",
            "right": "oracle",
            "none": "none",
        },
        gpus_per_replica=1,
        cpus_per_replica=2,
        painter={"num_gpus": 0.5, "max_batch_size": 4, "autoscaling": {"max_replicas": 3}},
        designer={"num_cpus": 1},
        designer_replicas=2,
        ingress_replicas=2,
    )
    pools = designers(given, RELEASE, "key").pools
    assert list(pools) == ["fast", "best", "right"]
    own, others = pools["fast"]._bound_deployment, pools["best"]._bound_deployment
    assert own.func_or_class is OwnDesigner and others.func_or_class is OtherDesigners
    assert pools["best"] is pools["right"]
    assert own.ray_actor_options == {"num_cpus": 1, "num_gpus": 1}
    assert own.num_replicas == 2 and others.num_replicas == 1
    assert others.ray_actor_options == {"num_cpus": 0, "num_gpus": 0}
    assert list(designers(config(designers=["none"]), RELEASE, "key").pools) == []

    class Ingress:
        pass

    ingress = application(given, RELEASE, Ingress)._bound_deployment
    assert ingress.num_replicas == 2
    painter = ingress.init_args[2]._bound_deployment
    assert painter.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    assert painter.init_args[0].max_batch_size == 4 and painter.max_ongoing_requests == 4 + 32
    assert painter._deployment_config.autoscaling_config.max_replicas == 3
    with pytest.raises(ConfigError, match="max_replica"):
        config(painter={"autoscaling": {"max_replica": 3}})
    with pytest.raises(ConfigError, match="min_replicas must be 1"):
        config(painter={"autoscaling": {"min_replicas": 0, "max_replicas": 3}})


def test_the_self_designer_writes_as_the_whole_model_does(tiny_model_dir: Any) -> None:
    from dim import model as models
    from dim.images import decode_image
    from dim.model.checkpoint.understanding import load_understanding

    whole = models.load(tiny_model_dir).design([decode_image(PNG)], ["remove the cup"])
    alone = load_understanding(tiny_model_dir)
    assert alone.design([decode_image(PNG)], ["remove the cup"]) == whole
    assert not hasattr(alone, "painter")


FORMS = {
    "bold": "**1. Edit Instruction:** Remove the cup.\n**2. Global Layout Perception:** a table, "
    "3. row of it: wood\n  and more\n3. Local Object Perception: a cup: red\n"
    "4. Edit Area Localization: the middle\n5. Edited Image Imagination: no cup, but “wood”.",
    "no instruction": ANSWER,
    "json": json.dumps(
        {
            "edit_instruction": "Remove the cup.",
            "global_layout_perception": "a table",
            "local_object_perception": "a cup",
            "edit_area_localization": "the middle",
            "edited_image_imagination": "no cup",
        }
    ),
    "fenced": f"Here it is:\n```\n1. Edit Instruction: Remove the cup.\n{ANSWER}\n```\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_pieces_of_a_draft_are_the_clean_blueprint(form: str) -> None:
    words = FORMS[form]
    draft = Draft("remove the cup")
    pieces = [draft.more(words[:end]) for end in range(len(words) + 1)]
    told = [piece for piece in pieces if piece]
    whole = Blueprint.parse(words, instruction="remove the cup").render()
    assert "".join(told) + draft.rest(whole) == whole
    assert form == "json" or len(told) > 5
    if told:
        with pytest.raises(DesignerError, match="as it had begun"):
            draft.rest("1. Edit Instruction: something else")


def test_no_blueprint_is_told_of_words_that_are_none() -> None:
    for words in ("", "I cannot do that: sorry.\n\n", "1. a: b\n2. c: d\n", "<think>1. Edit"):
        assert Draft("remove the cup").more(words) == ""


def test_a_model_tells_what_it_writes_while_it_does(tiny_model_dir: Any) -> None:
    from dim.model.checkpoint.understanding import load_understanding

    told: dict[int, list[str]] = {}
    designer = SelfDesigner(load_understanding(tiny_model_dir))
    requests = [DesignRequest("remove the cup", image) for image in (b"none", PNG, OTHER_PNG)]
    answers = designer.design(
        requests, on_text=lambda place, text: told.setdefault(place, []).append(text)
    )
    assert isinstance(answers[0], DesignerError) and list(told) == [1, 2]
    for place, texts in told.items():
        assert len(texts) > 2 and all(text.isprintable() or text for text in texts)
        assert answers[place].startswith(texts[0].strip())
        assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in texts)


def test_a_blueprint_comes_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes:
        """Writes a line, and goes on when it was read."""

        def design(self, images: Any, instructions: Any, on_text: Any) -> list[str]:
            for end in range(0, len(ANSWER), 20):
                for row in range(len(instructions)):
                    on_text(row, ANSWER[:end])
                time.sleep(0.1)
            return [ANSWER] * len(instructions)

    monkeypatch.setattr(own_designer, "load_own", lambda *_: SelfDesigner(Writes()))
    pool = OwnDesigner(config(designers={"best": "self"}, batch_wait_s=0.2), ["best"], RELEASE)

    async def alone(asked: Any) -> Any:  # Serve's own batches are for its replicas
        return (await pool._design_batch([asked]))[0]

    monkeypatch.setattr(pool, "_design_batched", alone)

    async def pieces(instruction: str) -> list[str]:
        return [piece async for piece in pool.write(job(instruction))]

    async def work() -> list[list[str]]:
        return await asyncio.gather(pieces("remove the cup"), pieces("take it away"))

    asked = ("remove the cup", "take it away")
    for instruction, told in zip(asked, asyncio.run(work()), strict=True):
        assert len(told) > 1
        assert "".join(told) == Blueprint.parse(ANSWER, instruction=instruction).render()


def test_only_what_the_model_would_say_again_is_kept() -> None:
    assert is_paid("anything") and not is_paid(DesignerError("down"))
    with pytest.raises(DesignerError, match="'best' did not answer; "):
        presented(job(), DesignerError("http://10.0.0.1 is down"))
