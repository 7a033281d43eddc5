"""The way back: what is kept of edits, and that without consent nothing is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dim import cli, provenance, tabletop
from dim.blueprint import Blueprint
from dim.config import load_config
from dim.errors import StorageError
from dim.images import encode_png
from dim.records import EDIT
from infra.storage import open_store
from pipelines import edit, ingest
from pipelines.edit import EditConfig
from pipelines.ingest import IngestConfig
from pipelines.outputs.shards import Shards
from serving import contributions
from serving.collect import collect
from serving.config import ContributionsConfig, ServingConfig
from serving.contributions import Contribution, Contributions
from serving.errors import NotFoundError
from serving.jobs import EditJob, Painted
from serving.keys import fingerprint, make_key
from serving.serve import check
from tests.serving.fakes import BLUEPRINT, Method, Server, picture

PROMPT = "make it blue"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(contributions={"store": str(tmp_path / "kept")})


def ask(server: Server, **fields: Any) -> Any:
    return server.http.post(
        "/v1/images/edits", files={"image": ("a.png", picture())}, data={"prompt": PROMPT, **fields}
    )


def ask_contribution(server: Server, **fields: Any) -> str:
    answer = ask(server, consent="true", **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["contribution"]


def accept(server: Server, id: str, **body: Any) -> Any:
    return server.http.post(f"/v1/contributions/{id}/accept", json=body)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_without_consent_nothing_is_held(server: Server, tmp_path: Path) -> None:
    for fields in ({}, {"consent": "false"}, {"consent": ""}):
        answer = ask(server, **fields)
        assert answer.json()["data"][0]["contribution"] is None
    assert server.contributions.held() == (0, 0)
    assert not (tmp_path / "kept").exists()


def test_a_server_keeps_nothing_unless_it_is_told_to() -> None:
    server = Server()
    answer = ask(server, consent="true")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "consent"
    assert not server.painter.jobs  # it is said before anything is painted
    for answer in (accept(server, "ab" * 16), server.http.delete(f"/v1/contributions/{'ab' * 16}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "contribution_not_found"


def with_keys(tmp_path: Path, **kept: Any) -> tuple[Server, dict[str, Any]]:
    """A server with a key of each kind, and what asks it with each."""
    keys = {kind: make_key() for kind in ("never", "ask", "always")}
    file = tmp_path / "keys.yaml"
    file.write_text(
        "".join(
            f'- {{name: {kind}-shop, sha256: "{fingerprint(key)}", contributions: {kind}}}\n'
            for kind, key in keys.items()
        ).replace(", contributions: ask", "")  # which is what a line means that says nothing
    )
    server = Server(keys=str(file), **kept)

    def asking(key: str) -> Any:
        def ask(**fields: Any) -> Any:
            return server.http.post(
                "/v1/images/edits", headers={"authorization": f"Bearer {key}"},
                files={"image": ("a.png", picture())}, data={"prompt": PROMPT, **fields},
            )  # fmt: skip

        return ask

    return server, {kind: asking(key) for kind, key in keys.items()}


@pytest.mark.parametrize(
    ("key", "fields", "held"),
    [
        ("ask", {}, False),
        ("ask", {"consent": "true"}, True),
        ("always", {}, True),
        ("always", {"consent": "true"}, True),
        ("always", {"consent": "false"}, False),
        ("never", {}, False),
        ("never", {"consent": "false"}, False),
    ],
)
def test_a_key_says_whether_its_edits_may_be_kept(
    key: str, fields: dict[str, str], held: bool, tmp_path: Path
) -> None:
    server, asks = with_keys(tmp_path, contributions={"store": str(tmp_path / "kept")})
    answer = asks[key](**fields)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["data"][0]["contribution"] is not None) == held
    assert server.contributions.held()[0] == held


def test_a_key_whose_edits_are_never_kept_cannot_consent(tmp_path: Path) -> None:
    server, asks = with_keys(tmp_path, contributions={"store": str(tmp_path / "kept")})
    answer = asks["never"](consent="true")
    assert answer.status_code == 400 and not server.painter.jobs
    assert answer.json()["error"]["message"] == (
        "consent: this server keeps none of 'never-shop' for training; leave it out"
    )
    assert answer.json()["error"]["param"] == "consent"


def test_a_key_s_consent_means_nothing_where_nothing_is_kept(tmp_path: Path) -> None:
    _, asks = with_keys(tmp_path)
    assert asks["always"]().json()["data"][0]["contribution"] is None
    assert asks["always"](consent="true").status_code == 400


def test_clients_are_told_whether_their_edits_may_be_kept(tmp_path: Path) -> None:
    def told(server: Server, **headers: str) -> str:
        return server.http.get("/v1/models", headers=headers).json()["data"][0]["contributions"]

    assert told(Server()) == "never"
    kept = {"contributions": {"store": str(tmp_path / "kept")}}
    assert told(Server(**kept)) == "ask"
    key = make_key()
    file = tmp_path / "keys.yaml"
    file.write_text(f'- {{name: a, sha256: "{fingerprint(key)}", contributions: always}}\n')
    assert told(Server(keys=str(file), **kept), authorization=f"Bearer {key}") == "always"
    assert told(Server(keys=str(file)), authorization=f"Bearer {key}") == "never"


def test_what_is_not_accepted_is_in_memory_only(server: Server, tmp_path: Path) -> None:
    answer = ask(server, consent="true", n="2")
    first, second = (item["contribution"] for item in answer.json()["data"])
    assert first != second and server.contributions.held()[0] == 2
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_what_is_accepted_is_a_record(format: str, server: Server, tmp_path: Path) -> None:
    id = ask_contribution(server, seed="7", output_format=format)
    answer = accept(server, id)
    assert (answer.status_code, answer.json()) == (
        200, {"object": "contribution", "id": id, "status": "accepted"},
    )  # fmt: skip
    assert server.contributions.held() == (0, 0)
    kept = tmp_path / "kept"
    record = json.loads((kept / "records" / f"{id}.json").read_text())
    assert record["instruction"] == PROMPT
    assert record["blueprint"] == record["text"] == Blueprint.parse(BLUEPRINT).render()
    assert record["provenance"]["seed"] == "7"
    assert provenance.read((kept / record["image_path_target"]).read_bytes())["seed"] == "7"
    source = (kept / record["image_path"]).read_bytes()
    assert record["image_hash"] == contributions.sha256_hex(source)
    assert accept(server, id).status_code == 200  # again, nothing changes
    assert len(files(kept)) == 3


def test_a_blueprint_that_the_client_has_edited_is_kept(server: Server, tmp_path: Path) -> None:
    better = Blueprint.parse(BLUEPRINT).render().replace("edit area", "the whole area")
    id = ask_contribution(server)
    answer = accept(server, id, blueprint="no blueprint")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "blueprint"
    assert accept(server, id, blueprint=better).status_code == 200
    record = json.loads((tmp_path / "kept" / "records" / f"{id}.json").read_text())
    assert record["blueprint"] == better != record["text"]
    id = ask_contribution(server, designer="none")
    assert accept(server, id).status_code == 200
    record = json.loads((tmp_path / "kept" / "records" / f"{id}.json").read_text())
    assert (record["blueprint"], record["text"]) == (None, PROMPT)


def test_what_is_forgotten_is_gone(server: Server, tmp_path: Path) -> None:
    held, accepted = ask_contribution(server), ask_contribution(server)
    accept(server, accepted)
    for id in (held, accepted):
        answer = server.http.delete(f"/v1/contributions/{id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "forgotten")
        assert server.http.delete(f"/v1/contributions/{id}").status_code == 404
        assert accept(server, id).status_code == 404
    assert files(tmp_path / "kept") == [] and server.contributions.held() == (0, 0)


@pytest.mark.parametrize("id", ["../records/x", "%2e%2e", "a" * 32, "A" * 32, "x" * 5000])
def test_a_name_leads_nowhere(id: str, server: Server, tmp_path: Path) -> None:
    ask_contribution(server)
    answer = accept(server, id)
    assert answer.status_code == 404 and len(answer.text) < 300
    assert server.http.delete(f"/v1/contributions/{id}").status_code == 404


def test_a_store_that_fails_loses_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = ask_contribution(server)
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise StorageError("s3://secret is full")

        patch.setattr(contributions, "write", refuse)
        answer = accept(server, id)
    assert answer.status_code == 503 and "secret" not in answer.text
    assert accept(server, id).status_code == 200


def test_an_edit_is_answered_where_it_cannot_be_held(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: Contribution) -> str:
        raise ConnectionError("restarting")

    monkeypatch.setattr(server.holder, "hold", Method(away))
    answer = ask(server, consent="true")
    assert answer.status_code == 200 and answer.json()["data"][0]["contribution"] is None


def one(size: int = 1000) -> Contribution:
    return Contribution("x", b"s" * size, b"", "png", "x", {})


def test_what_is_held_has_bounds_in_number_bytes_and_time(tmp_path: Path) -> None:
    async def go() -> None:
        config = ContributionsConfig(store=str(tmp_path), most=3, most_megabytes=0.01)
        held = Contributions(config)
        ids = [await held.hold(one()) for _ in range(4)]
        assert held.held()[0] == 3
        with pytest.raises(NotFoundError):
            await held.accept(str(ids[0]), None)
        assert await held.hold(one(10_001)) is None and held.held()[0] == 3
        assert await held.hold(one(9_000)) is not None
        assert held.held() == (1, one(9_000).size)
        short = Contributions(config.model_copy(update={"keep_s": 0.05}))
        assert await short.hold(one()) is not None
        while short.held() != (0, 0):  # noqa: ASYNC110, nobody asks, and it goes all the same
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_forgotten_while_it_is_written_is_forgotten(tmp_path: Path) -> None:
    async def go() -> None:
        held = Contributions(ContributionsConfig(store=str(tmp_path)))
        id = str(await held.hold(one()))
        await asyncio.gather(held.accept(id, None), held.forget(id))

    asyncio.run(go())
    assert files(tmp_path) == []


def test_a_stream_tells_the_name_too(server: Server) -> None:
    answer = ask(server, consent="true", stream="true")
    (done,) = [
        json.loads(line[6:]) for line in answer.text.splitlines()
        if line.startswith("data: ") and "completed" in line
    ]  # fmt: skip
    assert accept(server, done["contribution"]).status_code == 200


def test_a_store_of_another_kind_is_refused_before_ray_starts() -> None:
    with pytest.raises(StorageError, match="cannot store at gs://bucket"):
        check(ServingConfig(model="x", contributions={"store": "gs://bucket"}), with_port=False)


def test_what_was_accepted_becomes_dim_edit(
    ray_cluster: None, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"{s3}/kept"
    server = Server(contributions={"store": store})
    samples = [tabletop.sample_edit(np.random.default_rng([3, number])) for number in range(3)]
    targets = {each.instruction: tabletop.render(each.target, 64) for each in samples}

    async def paint(job: EditJob) -> Any:
        wanted = next(text for text in targets if text in job.text)
        yield Painted(encode_png(targets[wanted]), 1, 1, "dim/1")

    server.painter.paint = Method(paint)
    plans = []
    for each in samples:
        plan = Blueprint(each.instruction, "a table", "- things", "the middle", "it is done")
        plans.append(plan.render())
        answer = server.http.post(
            "/v1/images/edits",
            files={"image": encode_png(tabletop.render(each.source, 64))},
            data={"prompt": each.instruction, "consent": "true", "blueprint": plan.render()},
        )
        assert accept(server, answer.json()["data"][0]["contribution"]).status_code == 200
    open_store(store).write("records/damaged.json", b'{"id": 3}')

    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "collect", store])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "1 records cannot be read" in said.err
    assert "3 accepted edits" in said.out
    open_store(store).delete("records/damaged.json")
    assert collect(open_store(store)) == (3, 3, [])

    raw, out = str(tmp_path / "raw"), str(tmp_path / "edit")
    made = ingest.run(IngestConfig(pairs=f"{store}/pairs.jsonl", out=raw))
    assert made.counts.kept == 3, made.counts
    replay = tmp_path / "blueprints.jsonl"
    replay.write_bytes(open_store(store).read("blueprints.jsonl"))
    options = [f"raw={raw}", f"designer=replay:{replay}", f"out={out}", "workers=1"]
    made = edit.run(load_config(EditConfig, "configs/data-tabletop-edit.yaml", options))
    assert made.counts.kept == 3, made.counts
    (table,) = Shards.open(out, EDIT).batches()
    rows = table.to_pylist()
    assert sorted(row["blueprint"] for row in rows) == sorted(plans)
    assert {row["instruction"] for row in rows} == set(targets)
