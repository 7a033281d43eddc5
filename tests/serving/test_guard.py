"""Who is let in: names, origins and keys, on an app with one open and one guarded route."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from dim import cli
from dim.config import validate_config
from dim.errors import ConfigError
from serving import keys
from serving.app import read_args
from serving.config import Rates, ServingConfig
from serving.exposure import check_exposure, is_loopback
from serving.guard import Guard, Guarded
from serving.keys import Keys, fingerprint, make_key, read_keys

WORK = "/v1/images/generations"
KEY, OTHER = make_key(), make_key()


def line(name: str, key: str, **rates: float) -> str:
    said = "".join(f", {rate}: {value}" for rate, value in rates.items())
    return f'- {{name: {name}, sha256: "{fingerprint(key)}"{said}}}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(line("shop", KEY))
    return path


def client(base_url: str = "http://127.0.0.1:8000", **settings: object) -> TestClient:
    """Asks an app behind a guard with these settings; it answers who is asking."""
    app = FastAPI()
    guard = Guard(validate_config(ServingConfig, {"model": "m", **settings}, where="test"))
    app.add_middleware(Guarded, guard=guard)

    @app.post(WORK)
    async def work(request: Request) -> str:
        return request.state.client

    @app.get("/healthz")
    async def health() -> str:
        return "well"

    @app.get("/v1/models")
    async def models() -> str:
        return "models"

    return TestClient(app, base_url=base_url)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refused(response: object, status: int, said: str) -> bool:
    error = response.json()["error"]  # type: ignore[attr-defined]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code == status and said in error["message"]  # type: ignore[attr-defined]


def test_only_a_known_key_is_let_in_and_its_name_is_known(file: Path) -> None:
    http = client(keys=str(file))
    assert http.post(WORK, headers=bearer(KEY)).json() == "shop"
    assert http.post(WORK, headers={"authorization": f"bearer {KEY}"}).json() == "shop"
    nobody = http.post(WORK)
    assert refused(nobody, 401, "an API key is needed")
    assert nobody.headers["www-authenticate"] == "Bearer"
    for wrong in (OTHER, KEY[:-1], KEY + "x", "", "ü" * 20, "x" * 10_000, fingerprint(KEY)):
        headers = {b"authorization": f"Bearer {wrong}".encode()}
        assert refused(http.post(WORK, headers=headers), 401, "not known"), wrong
    assert refused(http.post(WORK, headers={"authorization": f"Basic {KEY}"}), 401, "not known")
    assert refused(http.get("/v1/models"), 401, "needed")
    assert http.get("/healthz").json() == "well"
    assert refused(http.post("/healthz"), 401, "needed")
    assert refused(http.get("/nothing"), 401, "needed")


def test_without_keys_everybody_on_this_machine_is_one_client() -> None:
    assert client().post(WORK).json() == "anonymous"
    assert client().post(WORK, headers=bearer("none")).json() == "anonymous"


def test_keys_are_read_again_when_their_file_changes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    http = client(keys=str(file))
    assert http.post(WORK, headers=bearer(OTHER)).status_code == 401
    file.write_text(line("nightly", OTHER))
    assert http.post(WORK, headers=bearer(OTHER)).json() == "nightly"
    assert http.post(WORK, headers=bearer(KEY)).status_code == 401
    file.write_text("- {name: half")
    assert http.post(WORK, headers=bearer(OTHER)).json() == "nightly"
    file.unlink()
    assert http.post(WORK, headers=bearer(OTHER)).json() == "nightly"


def test_a_mounted_secret_is_a_link_that_is_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    link = tmp_path / "keys.yaml"
    for number, key in enumerate((KEY, OTHER)):
        (tmp_path / str(number)).write_text(line("shop", key))
    link.symlink_to("0")
    http = client(keys=str(link))
    assert http.post(WORK, headers=bearer(KEY)).status_code == 200
    (tmp_path / "next").symlink_to("1")
    os.replace(tmp_path / "next", link)
    assert http.post(WORK, headers=bearer(KEY)).status_code == 401
    assert http.post(WORK, headers=bearer(OTHER)).status_code == 200


def test_keys_may_come_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", line("shop", KEY))
    assert client(keys="env:SECRET").post(WORK, headers=bearer(KEY)).json() == "shop"
    with pytest.raises(ConfigError, match="no variable GONE"):
        client(keys="env:GONE")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no keys"),
        ("- [", "not valid YAML"),
        ("shop: 1", "entry list"),
        ("- {name: shop}", "entry 0.sha256"),
        ("- {name: shop, sha256: secret}", "entry 0.sha256"),
        ("- {name: 'a b', sha256: " + "0" * 64 + "}", "entry 0.name"),
        (line("shop", KEY, images_per_minute=0), "entry 0.images_per_minute"),
        (line("shop", KEY, image_per_minute=1), "entry 0.image_per_minute"),
        (line("shop", KEY) + line("shop", OTHER), "the same name"),
        (line("shop", KEY) + line("mine", KEY), "the same sha256"),
    ],
)
def test_a_wrong_keys_file_is_named_and_nothing_in_it_is_shown(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="keys.yaml") as wrong:
        read_keys(text, "keys.yaml")
    assert said in str(wrong.value) and "secret" not in str(wrong.value)


def test_a_key_has_the_rates_of_its_line_and_else_the_servers(file: Path) -> None:
    import asyncio

    file.write_text(line("shop", KEY, images_per_minute=5))
    known = Keys(str(file), Rates(images_per_minute=1, requests_per_minute=9))
    found = asyncio.run(known.client(f"Bearer {KEY}"))
    assert found is not None
    assert found.rates == Rates(images_per_minute=5, requests_per_minute=9)


def test_the_command_shows_a_key_once_and_keeps_its_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        return cli.execute(cli.root(), ["keys", "new", *arguments], prog_name="dim")

    path = tmp_path / "keys.yaml"
    shown = []
    for name in ("shop", "nightly"):
        assert run(name, "--file", str(path)) == 0
        shown.append(capsys.readouterr().out.strip())
    assert [key.sha256 for key in read_keys(path.read_text(), "it")] == list(
        map(fingerprint, shown)
    )
    assert not any(key in path.read_text() for key in shown)
    assert path.stat().st_mode & 0o077 == 0
    assert client(keys=str(path)).post(WORK, headers=bearer(shown[1])).json() == "nightly"

    before = path.read_text()
    assert run("shop", "--file", str(path)) == 2
    assert "the same name" in capsys.readouterr().err
    assert run("two words", "--file", str(path)) == 2
    assert path.read_text() == before

    assert run("alone") == 0
    key, _, entry = capsys.readouterr().out.strip().splitlines()
    assert read_keys(entry, "it")[0].sha256 == fingerprint(key)


def test_pages_of_other_sites_are_refused_unless_they_are_named() -> None:
    http = client()
    for foreign in ("https://evil.example", "null", "http://127.0.0.1:9000", "http://[", "x"):
        headers = {"origin": foreign}
        assert refused(http.post(WORK, headers=headers), 403, "pages of other sites"), foreign
        assert refused(http.get("/healthz", headers=headers), 403, "pages of other sites")
        asked = {**headers, "access-control-request-method": "POST"}
        assert http.options(WORK, headers=asked).status_code == 403
    assert http.post(WORK, headers={"origin": "http://127.0.0.1:8000"}).json() == "anonymous"


def test_a_named_origin_is_answered_as_browsers_ask(file: Path) -> None:
    http = client(keys=str(file), origins=["https://Shop.example"])
    origin = {"origin": "https://shop.example"}
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    preflight = http.options(WORK, headers={**origin, **asked})
    assert preflight.status_code == 200  # browsers send no key with it
    assert preflight.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    answered = http.post(WORK, headers={**origin, **bearer(KEY)})
    assert answered.json() == "shop"
    for response in (answered, http.post(WORK, headers=origin)):  # errors are to be read too
        assert response.headers["access-control-allow-origin"] == origin["origin"]
        assert "credentials" not in str(response.headers)
    assert refused(http.post(WORK, headers={"origin": "https://shop.example.evil"}), 403, "pages")


def test_a_name_that_any_page_can_point_here_is_not_answered(file: Path) -> None:
    page = {"origin": "http://evil.example"}  # of one origin with us once its name leads here
    named = client("http://evil.example")
    assert refused(named.post(WORK, headers=page), 403, "does not answer to the name")
    assert refused(named.get("/v1/models"), 403, "does not answer to the name")
    assert named.get("/healthz").status_code == 200
    for host in ("localhost:8000", "127.0.0.1", "10.0.0.7:8000", "[::1]:8000"):
        assert client(f"http://{host}").post(WORK).status_code == 200, host
    known = {"hosts": ["dim.example", "*.svc.local"]}
    for host, status in (
        ("DIM.example:80", 200),
        ("a.svc.local", 200),
        ("svc.local", 403),
        ("xdim.example", 403),
        ("a_b", 403),
        ("[x", 403),
        ("", 403),
    ):
        headers = {"host": host}
        assert client(**known).post(WORK, headers=headers).status_code == status, host
    assert client("http://any.name", keys=str(file)).post(WORK).status_code == 401


def test_a_server_that_others_reach_needs_keys_or_the_word(file: Path) -> None:
    def config(**settings: object) -> ServingConfig:
        return validate_config(ServingConfig, {"model": "m", **settings}, where="test")

    for host in ("0.0.0.0", "::", "10.0.0.7", "dim.example", ""):
        with pytest.raises(ConfigError, match="whoever reaches the port may spend"):
            check_exposure(config(), host)
        check_exposure(config(keys=str(file)), host)
        check_exposure(config(insecure=True), host)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"):
        assert is_loopback(host)
        check_exposure(config(), host)
    check_exposure(config(), None)
    with pytest.raises(ConfigError, match="it needs keys"):
        config(origins=["*"])
    with pytest.raises(ConfigError, match="https://host"):
        config(origins=["shop.example"])
    with pytest.raises(ConfigError, match="http_options"):
        read_args({"model": "m", "host": "0.0.0.0"})


def test_looking_for_changes_is_no_work_of_every_request(file: Path) -> None:
    import asyncio

    known = Keys(str(file), Rates())
    looked = known._looked
    asyncio.run(known.client(f"Bearer {KEY}"))
    assert known._looked == looked
    known._looked = time.monotonic() - 2
    asyncio.run(known.client(f"Bearer {KEY}"))
    assert known._looked > looked
