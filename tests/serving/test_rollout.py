"""A server that moves to another model while it serves; one that cannot stays as it is."""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from dim import cli, provenance
from dim import model as models
from dim.config import load_config
from dim.errors import CheckpointError, DimError
from dim.images import encode_png
from dim.model.config import ModelConfig
from infra.ports import free_port
from infra.registry import Registry
from infra.tracking import open_client
from serving import release as releases
from serving.config import ServingConfig, model_name
from serving.engine import Engine
from serving.jobs import GenerateJob
from serving.painter import PainterDeployment
from serving.release import Holder, Release, find_release
from serving.rollout import roll_out
from serving.serve import Server, start
from tests.serving.fakes import opened

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO, THREE = (Release(name, name, name) for name in ("one", "two", "three"))


def build(folder: Path, seed: int, *changes: str) -> str:
    """A model folder of the tiny configuration with random weights."""
    random = [f"{part}.weights=null" for part in ("understanding", "connector", "autoencoder")]
    overrides = [*random, "painter.weights=null", *changes]
    config = load_config(ModelConfig, ROOT / "configs" / "tiny.yaml", overrides)
    models.build(config, seed=seed).save(folder)
    return str(folder)


class Registered:
    """A registry with ``dim``, whose alias ``champion`` leads to the last folder that was added."""

    def __init__(self, uri: str) -> None:
        self._registry = Registry(uri)
        client = open_client(uri)
        self._run = client.create_run(client.create_experiment("train")).info.run_id

    def add(self, folder: str) -> None:
        version = self._registry.register("dim", folder, self._run, metrics={}, tags={})
        self._registry.point("champion", version)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield Registered(uri)


@pytest.fixture(scope="module")
def server(ray_cluster: None, registered: Registered, tiny_model_dir: Path) -> Iterator[Server]:
    registered.add(str(tiny_model_dir))
    server = start(
        ServingConfig(
            model="models:/dim@champion",
            designers=("self", "none"),
            port=free_port(),
            application="rolled",
            route_prefix="/rolled",
        )
    )
    yield server
    server.stop()


class Clients:
    """Ask without a pause while the block runs; ``answers``: status and body of each, in order."""

    def __init__(self, server: Server, count: int = 3) -> None:
        self.answers: list[tuple[int, Any]] = []
        self._url, self._done = f"{server.url}/v1/images/generations", threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60) as http:
            while not self._done.is_set():
                body = {"prompt": "a circle", "steps": 4 + number, "seed": number}
                answer = http.post(self._url, json=body)
                self.answers.append((answer.status_code, answer.json()))

    def releases(self) -> Counter[str]:
        return Counter(body["data"][0]["release"] for _, body in self.answers)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_a_server_follows_its_alias_under_load(
    server: Server, registered: Registered, tmp_path: Path
) -> None:
    registered.add(build(tmp_path / "two", seed=2))
    with Clients(server) as clients:
        wait_for(lambda: len(clients.answers) >= 3)
        assert roll_out("rolled").name == "dim/2"
        after = len(clients.answers)
        wait_for(lambda: len(clients.answers) >= after + 9)
    assert {status for status, _ in clients.answers} == {200}
    assert set(clients.releases()) == {"dim/1", "dim/2"}
    painted = clients.answers[-1][1]["data"][0]
    said = provenance.read(base64.b64decode(painted["b64_json"]))
    assert said is not None and (said["model"], said["release"]) == ("dim", "dim/2")
    assert said["model_hash"] == find_release("models:/dim/2").model_hash
    expected = models.load(tmp_path / "two").generate(["a circle"], seeds=[0], steps=4)[0]
    mine = next(
        body["data"][0]
        for _, body in reversed(clients.answers)
        if body["data"][0]["seed"] == 0 and body["data"][0]["release"] == "dim/2"
    )
    shown = opened(mine["b64_json"])
    assert shown.tobytes() == expected.tobytes()


def test_a_model_that_cannot_be_served_leaves_the_old_one(
    server: Server,
    registered: Registered,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = find_release("models:/dim@champion").name
    half = build(tmp_path / "half", seed=3)
    (Path(half) / "connector.safetensors").unlink()
    small = build(tmp_path / "small", 3, "sampling.resolution=32")
    monkeypatch.setattr("ray.init", lambda *_, **__: None)  # the cluster of this process
    monkeypatch.setattr("ray.shutdown", lambda: None)

    def command(*arguments: str) -> str:
        call = ["serve", "rollout", *arguments, "--application", "rolled"]
        assert cli.execute(cli.root(), call, prog_name="dim") == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    with Clients(server, 2) as clients:
        wait_for(lambda: len(clients.answers) >= 2)
        assert "connector.safetensors" in command(half)
        assert f"{served} is served as before" in command(small)
        assert "no model at" in command(str(tmp_path / "nowhere"))
        assert "has no such version" in command("models:/dim/9")
        after = len(clients.answers)
        wait_for(lambda: len(clients.answers) >= after + 2)
    assert {status for status, _ in clients.answers} == {200}
    assert len(clients.releases()) == 1


def test_a_large_source_reaches_designer_and_painter(server: Server) -> None:
    source = Image.effect_noise((400, 400), 90).convert("RGB")
    data = {"prompt": "remove it", "steps": 1, "designer": "none", "n": 2}
    answer = httpx.post(
        f"{server.url}/v1/images/edits", data=data, files={"image": encode_png(source)}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "400x400"


def test_an_application_that_is_not_there_is_said(server: Server) -> None:
    with pytest.raises(DimError, match=r"no application 'dm' \(it serves .*rolled"):
        roll_out("dm")


def holder(log: list[str], bad: str = "") -> Holder[str]:
    def load(release: Release) -> str:
        log.append(f"load {release.name}")
        if release.name == bad:
            raise CheckpointError("it is damaged")
        return f"model {release.name}"

    return Holder("key", ONE, load, lambda model: log.append(f"retire {model}"))


def test_what_was_prepared_is_adopted_without_loading_it_again() -> None:
    log: list[str] = []
    held = holder(log)
    held.prepare(TWO)
    assert held.held.model == "model one"
    held.adopt(TWO)
    held.adopt(TWO)
    assert held.held.model == "model two"
    wait_for(lambda: log == ["load one", "load two", "retire model one"])


def test_a_failure_and_what_is_let_go_change_nothing() -> None:
    log: list[str] = []
    held = holder(log, bad="two")
    with pytest.raises(CheckpointError):
        held.prepare(TWO)
    held.prepare(THREE)
    held.discard()
    held.discard()
    assert held.held.release == ONE
    assert log == ["load one", "load two", "load three", "retire model three"]


def test_a_replica_that_was_not_told_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Release] = {}
    monkeypatch.setattr(releases, "read_release", written.get)
    log: list[str] = []
    held = holder(log, bad="three")
    held.follow()
    assert held.held.release == ONE
    written["key"] = TWO
    held.follow_soon()
    wait_for(lambda: held.held.release == TWO)
    assert holder([]).held.release == TWO  # one that starts now
    written["key"] = THREE
    held.follow()
    assert held.held.release == TWO


def test_what_was_begun_is_painted_to_its_end(tiny_model_dir: Path) -> None:
    model = models.load(tiny_model_dir)
    engine = Engine(model, max_batch_size=2)
    events: list[Any] = []
    for seed in range(4):
        job = GenerateJob(prompt="a", size=(32, 32), seed=seed, steps=3, guidance_scale=1.0)
        engine.submit(job, None, events.append)
    engine.finish()
    assert [type(event).__name__ for event in events] == ["Finished"] * 4
    with pytest.raises(DimError, match="does not paint any more"):
        engine.submit(job, None, events.append)


def test_a_painter_refuses_a_model_for_other_requests(tiny_model_dir: Path, tmp_path: Path) -> None:
    painter = PainterDeployment(ServingConfig(model=str(tiny_model_dir)))
    other = find_release(build(tmp_path / "other", 1, "painter.source_latent=false"))
    with pytest.raises(CheckpointError, match="can edit: False"):
        painter._holder.prepare(other)
    assert painter.defaults().model_hash == find_release(str(tiny_model_dir)).model_hash


@pytest.mark.parametrize(
    ("model", "name"),
    [("models:/dim@champion", "dim"), ("models:/a.b/3", "a.b"), ("s3://b/runs/tiny/model", "tiny")],
)
def test_what_a_model_is_called(model: str, name: str) -> None:
    assert model_name(model) == name
