"""Fetching from a server that misbehaves, and from addresses that must not be asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tenacity import RetryCallState, Retrying

from dim.errors import InputError
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.outcome import Rejection
from pipelines.readers import fetch, records
from pipelines.readers.fetch import FetchConfig, Fetcher, is_public
from tests.image_server import (
    ImageServer,
    cut_short,
    endless,
    hanging,
    in_turn,
    ok,
    serving,
    status,
)
from tests.pipelines.containers import source, target, write_lines
from tests.pipelines.readers.test_containers import read

LOCAL = {"allow_private": True, "workers": 1, "per_host_per_second": 1000, "attempts": 2}


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with serving() as running:
        yield running


def get(url: str, **options: Any) -> bytes | Exception:
    return Fetcher(FetchConfig(**{**LOCAL, **options}))([url])[url]


def reason(result: bytes | Exception) -> str:
    assert isinstance(result, Rejection), result
    return result.reason


def test_a_good_answer_also_behind_redirects(server: ImageServer) -> None:
    server.answers = {
        "/a": ok(b"image"),
        "/b": status(302, Location="c"),
        "/c": status(308, Location=f"{server.url}/a"),
        "/round": status(301, Location="/round"),
    }
    assert get(f"{server.url}/a") == get(f"{server.url}/b") == b"image"
    lost = get(f"{server.url}/round", max_redirects=3)
    assert isinstance(lost, InputError) and "more than 3 redirects" in str(lost)
    assert server.asked["/round"] == 4


def test_busy_hosts_are_asked_again_when_they_say(server: ImageServer) -> None:
    server.answers = {
        "/429": in_turn(status(429, Retry_After="1"), ok(b"later")),
        "/503": status(503, Retry_After="0"),
        "/long": status(503, Retry_After="9999"),
        "/cut": in_turn(cut_short, ok(b"whole")),
    }
    started = time.monotonic()
    assert get(f"{server.url}/429") == b"later"
    assert time.monotonic() - started >= 1
    assert "answers 503, also after 3 attempts" in str(get(f"{server.url}/503", attempts=3))
    assert server.asked["/503"] == 3
    assert "to be asked in 9999 s" in str(get(f"{server.url}/long"))
    assert server.asked["/long"] == 1
    assert get(f"{server.url}/cut") == b"whole"


def test_hosts_that_hang_or_are_not_there_fail_the_record(server: ImageServer) -> None:
    server.answers = {"/hang": hanging}
    found = get(f"{server.url}/hang", timeout_s=0.3, attempts=1)
    assert isinstance(found, InputError) and "no answer within 0.3 s" in str(found)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
    assert isinstance(get(closed, attempts=1), InputError)
    for wrong in ("http://", "http://[bad/a", "http://127.0.0.1:99999/a"):
        assert isinstance(get(wrong), InputError), wrong


def test_an_answer_is_read_to_its_size_cap_and_no_further(server: ImageServer) -> None:
    server.answers = {"/endless": endless, "/declared": ok(b"x" * 5000), "/fits": ok(b"x" * 1000)}
    assert reason(get(f"{server.url}/endless", max_bytes=1_000_000)) == "url.too_large"
    assert reason(get(f"{server.url}/declared", max_bytes=1000)) == "url.too_large"
    assert get(f"{server.url}/fits", max_bytes=1000) == b"x" * 1000


def test_what_is_gone_is_rejected_and_what_is_forbidden_fails(server: ImageServer) -> None:
    server.answers = {"/410": status(410), "/403": status(403)}
    assert reason(get(f"{server.url}/none")) == reason(get(f"{server.url}/410")) == "url.gone"
    assert "answers 403" in str(get(f"{server.url}/403"))


@pytest.mark.parametrize(
    ("tag", "free"),
    [
        ("noai", False),
        ("NoImageAI", False),
        ("nofollow, noindex", False),
        ("none", False),
        ("dim-on-ray: noai", False),
        ("otherbot: noai", True),
        ("otherbot: noai, noindex", True),
        ("nofollow", True),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST, noimageindex", False),
    ],
)
def test_an_opt_out_is_respected(tag: str, free: bool, server: ImageServer) -> None:
    server.answers = {"/a": ok(b"image", X_Robots_Tag=tag)}
    found = get(f"{server.url}/a")
    assert found == b"image" if free else reason(found) == "url.opted_out"
    assert get(f"{server.url}/a", respect_opt_out=False) == b"image"


def test_a_host_is_asked_no_more_at_once_and_no_faster_than_allowed(server: ImageServer) -> None:
    def slowly(request: Any) -> None:
        time.sleep(0.1)
        ok(b"x")(request)

    urls = [f"{server.url}/{n}" for n in range(12)]
    server.answers = {f"/{n}": slowly for n in range(12)}
    fetcher = Fetcher(FetchConfig(**{**LOCAL, "workers": 2, "per_host": 6}))
    assert set(fetcher(urls).values()) == {b"x"}
    assert server.most == 3

    server.times.clear()
    config = FetchConfig(**{**LOCAL, "workers": 2, "per_host": 24, "per_host_per_second": 40})
    fetcher = Fetcher(config)
    fetcher(urls[:6])
    fetcher(urls[6:])
    assert server.times[-1] - server.times[0] >= 11 * 2 / 40 * 0.9


def test_a_host_that_never_answers_is_left_alone(server: ImageServer) -> None:
    urls = [f"{server.url}/{n}" for n in range(40)]
    server.answers = {f"/{n}": hanging for n in range(40)} | {"/good": ok(b"x")}
    fetcher = Fetcher(FetchConfig(**{**LOCAL, "timeout_s": 0.3, "host_failures": 3}))
    found = fetcher(urls).values()
    assert len(server.asked) < 20
    left = [error for error in found if "did not answer for" in str(error)]
    assert len(left) >= 20 and all(isinstance(error, InputError) for error in found)
    assert "127.0.0.1 did not answer for" in str(fetcher([f"{server.url}/good"]))


def test_a_host_that_answers_now_and_then_is_asked_on(server: ImageServer) -> None:
    server.answers = {f"/{n}": hanging if n % 3 else ok(b"x") for n in range(9)}
    options = {"timeout_s": 0.3, "attempts": 1, "host_failures": 3, "per_host": 1}
    found = Fetcher(FetchConfig(**{**LOCAL, **options}))([f"{server.url}/{n}" for n in range(9)])
    assert len(server.asked) == 9 and sum(data == b"x" for data in found.values()) == 3


def test_who_came_first_is_asked_for_first(server: ImageServer) -> None:
    free, order = threading.Event(), []

    def answer(request: Any) -> None:
        order.append(request.path)
        if request.path == "/a":
            free.wait(60)
        ok(b"x")(request)

    server.answers = {f"/{name}": answer for name in "abcd"}
    fetcher = Fetcher(FetchConfig(**{**LOCAL, "per_host": 1}))
    first, second = fetcher.next_turn(), fetcher.next_turn()
    later = [fetcher.begin([f"{server.url}/{name}"], second) for name in "abc"]
    sooner = fetcher.begin([f"{server.url}/d"], first)
    with serving("127.0.0.2") as other:  # when it has answered, all others stand in their line
        other.answers = {"/e": ok(b"x")}
        fetcher([f"{other.url}/e"])
    free.set()
    for each in (*later, sooner):
        each.take()
    assert order == ["/a", "/d", "/b", "/c"]


def test_a_link_that_hangs_where_others_do_not_is_asked_for_again_early(
    server: ImageServer,
) -> None:
    asked_again = threading.Event()

    def late(request: Any) -> None:
        asked_again.wait(50)
        with suppress(OSError):
            ok(b"late")(request)

    def again(request: Any) -> None:
        asked_again.set()
        ok(b"again")(request)

    server.answers = {f"/{n}": ok(b"x") for n in range(8)} | {"/slow": in_turn(late, again)}
    urls = [f"{server.url}/{n}" for n in range(8)]
    fetcher = Fetcher(FetchConfig(**{**LOCAL, "timeout_s": 60, "host_failures": 1}))
    assert set(fetcher(urls).values()) == {b"x"}
    assert fetcher([f"{server.url}/slow"]) == {f"{server.url}/slow": b"again"}
    assert set(fetcher(urls).values()) == {b"x"}  # the host is not said to be silent for that
    alone = {**LOCAL, "timeout_s": 60, "attempts": 1}
    server.answers["/slow"] = in_turn(late, again)
    asked_again.set()
    assert get(f"{server.url}/slow", **alone) == b"late"


def test_a_pause_counts_from_the_beginning_of_an_attempt() -> None:
    def pause(error: Exception) -> float:
        state = RetryCallState(Retrying(), None, (), {})
        state.set_exception((type(error), error, None))
        return fetch._Job(FetchConfig())._pause(state)

    assert 1.0 <= pause(fetch._SilentError("refused")) <= 1.5
    assert 0.6 <= pause(fetch._SilentError("broke off", lasted=0.4)) <= 1.1
    assert pause(fetch._SilentError("no answer", lasted=30.0)) == 0.0
    assert 4.0 <= pause(fetch._Busy("answers 503", wait=4.0)) <= 6.0


def test_a_hanging_host_holds_up_no_other(server: ImageServer) -> None:
    server.answers = {f"/{n}": hanging for n in range(40)}
    fetcher = Fetcher(FetchConfig(**LOCAL))
    begun = fetcher.begin(f"{server.url}/{n}" for n in range(40))
    with serving("127.0.0.2") as other:
        other.answers = {"/a": ok(b"image")}
        assert fetcher([f"{other.url}/a"]) == {f"{other.url}/a": b"image"}
    assert not begun.results.done()
    begun.results.cancel()


@pytest.mark.parametrize(
    ("code", "looked_up", "said"),
    [(socket.EAI_NONAME, 1, "there is no host gone.test"), (socket.EAI_AGAIN, 2, "ClientConn")],
)
def test_a_name_that_does_not_exist_is_not_looked_up_again(
    code: int, looked_up: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert said in str(get("http://gone.test/a"))
    assert len(asked) == looked_up


def test_images_are_on_their_way_before_they_are_wanted(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROWS_PER_PART", 1)
    monkeypatch.setattr(records, "_PARTS_AHEAD", 2)
    third = threading.Event()

    def answer(request: Any) -> None:
        third.set()
        ok(source(2))(request)

    server.answers = {f"/{n}": ok(source(n)) for n in range(5)} | {"/2": answer}
    lines = [{"image_path": f"{server.url}/{n}"} for n in range(5)]
    path = write_lines(tmp_path / "u.jsonl", lines)
    made = ingest.open_source(IngestConfig(out="o", images=str(path), fetch=LOCAL))
    assert isinstance(made.reader, records.Records)
    (each,) = made.ranges
    parts = made.reader.fetch_ahead(made.reader.parts(each))
    first = next(parts)
    assert third.wait(20) and server.asked["/3"] == server.asked["/4"] == 0
    tables = [made.reader.table(part) for part in (first, *parts)]
    assert [table["image"][0].as_py() for table in tables] == [source(n) for n in range(5)]
    assert server.asked == {f"/{n}": 1 for n in range(5)}


def test_limits_must_leave_each_worker_a_request() -> None:
    with pytest.raises(ValidationError, match="per_host must be at least workers"):
        FetchConfig(workers=9, per_host=8)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"),
        *("①②⑦.⓪.⓪.①", "127。0。0。1", "①②⑦.0.0.1", "example.com@127.0.0.1", "[::1%25lo]"),
        *("2130706433", "127.1"),
    ],
)
def test_this_machine_is_not_asked_by_any_name(host: str, server: ImageServer) -> None:
    server.answers = {"/a": ok(b"secret")}
    found = get(f"http://{host}:{server.port}/a", allow_private=False)
    assert isinstance(found, Exception) and not server.asked
    if host not in ("2130706433", "127.1"):  # spellings that not every resolver reads as a number
        assert reason(found) == "url.private_address"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("8.8.8.8", True),
        ("168.63.129.17", True),
        ("192.0.1.1", True),
        ("100.63.255.255", True),
        ("100.128.0.1", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("2001:4860:4860::8888", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("2002:808:808::1", True),
        ("0.0.0.0", False),
        ("0.1.2.3", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),  # metadata of Alibaba
        ("127.0.0.1", False),
        ("127.255.255.254", False),
        ("168.63.129.16", False),  # services of Azure
        ("169.254.169.254", False),
        ("169.254.170.2", False),  # credentials of a container of AWS
        ("172.16.0.1", False),
        ("172.31.255.255", False),
        ("192.0.0.1", False),
        ("192.0.0.9", False),
        ("192.0.0.192", False),  # metadata of Oracle
        ("192.0.2.1", False),
        ("192.88.99.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("198.19.255.255", False),
        ("198.51.100.1", False),
        ("203.0.113.1", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::8.8.8.8", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:168.63.129.16", False),
        ("::ffff:0:127.0.0.1", False),
        ("::ffff:0:8.8.8.8", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::168.63.129.16", False),
        ("64:ff9b:1::1", False),
        ("64:ff9b:1::10.0.0.1", False),
        ("100::1", False),
        ("2001:0:a00:1::f7f7:f7f7", False),  # Teredo by a private server, for 8.8.8.8
        ("2001:0:808:808::f5ff:fffe", False),  # by 8.8.8.8, for 10.0.0.1
        ("2001:2::1", False),
        ("2001:10::1", False),
        ("2001:20::1", False),
        ("2001:db8::1", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::", False),
        ("2002:a83f:8110::1", False),  # of 168.63.129.16
        ("3fff::1", False),
        ("4000::1", False),
        ("5f00::1", False),
        ("fc00::1", False),
        ("fd00::1", False),
        ("fd00:ec2::254", False),  # metadata of AWS
        ("fd20:ce::254", False),  # of Google
        ("fd00:c1::a9fe:a9fe", False),  # of Oracle
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("2606:2800:220:1:248:1893:25c8:1946%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_redirect_to_a_private_address_is_not_followed(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with serving("127.0.0.2") as inside:
        inside.answers = {"/secret": ok(b"secret")}
        server.answers = {
            "/number": status(302, Location=f"{inside.url}/secret"),
            "/file": status(302, Location="file:///etc/hostname"),
        }
        options: dict[str, Any] = {"allow_private": False, "ports": [server.port, inside.port]}
        assert reason(get(f"{server.url}/number", **options)) == "url.private_address"
        assert "not an http" in str(get(f"{server.url}/file", **options))
        assert not inside.asked


def test_the_connection_is_made_to_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that is public when it is checked and private a moment later leads nowhere else."""
    answers: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host != "rebind.test":
            return real(host, port, *args, **options)
        answers.append("127.0.0.1" if not answers else "127.0.0.2")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[-1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with serving("127.0.0.1") as outside:
        outside.answers = {"/a": ok(b"public"), "/b": status(302, Location="/a")}
        url = f"http://rebind.test:{outside.port}"
        options: dict[str, Any] = {"allow_private": False, "ports": [outside.port]}
        assert get(f"{url}/a", **options) == b"public"
        assert answers == ["127.0.0.1"]
        assert reason(get(f"{url}/a", **options)) == "url.private_address"
        assert outside.asked["/a"] == 1


def test_an_address_is_looked_at_where_the_connection_is_made(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a way to write it is known to the client alone."""
    server.answers = {"/a": ok(b"secret")}
    monkeypatch.setattr(fetch, "check_url", lambda url, allow_private: "example.com")
    found = get(f"{server.url}/a", allow_private=False)
    assert reason(found) == "url.private_address" and not server.asked
    assert f"{server.url}/a: 127.0.0.1 is not a public address" in str(found)


def test_only_the_ports_of_the_web_are_asked(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: True)
    with serving() as other:
        server.answers = {"/a": ok(b"image"), "/on": status(302, Location=f"{other.url}/b")}
        other.answers = {"/b": ok(b"other")}
        refused = get(f"{server.url}/a", allow_private=False)
        assert reason(refused) == "url.port" and not server.asked
        assert f"port {server.port} is not 80 or 443 and not one of fetch.ports" in str(refused)
        options: dict[str, Any] = {"allow_private": False, "ports": [server.port]}
        assert get(f"{server.url}/a", **options) == b"image"
        assert reason(get(f"{server.url}/on", **options)) == "url.port" and not other.asked
        assert get(f"{server.url}/on") == b"other"  # in a network of one's own
    for wrong in (0, 65536):
        with pytest.raises(ValidationError, match="ports"):
            FetchConfig(ports=(wrong,))


def test_records_with_urls(server: ImageServer, tmp_path: Path) -> None:
    server.answers = {"/s": ok(source(0)), "/t": ok(target(0)), "/html": ok(b"<html>")}
    lines = [
        {"image_path": f"{server.url}/{one}", "image_path_target": f"{server.url}/{two}"}
        for one, two in (("s", "t"), ("s", "html"), ("s", "gone"), ("busy", "t"))
    ]
    server.answers["/busy"] = status(500)
    path = write_lines(tmp_path / "u.jsonl", [{**line, "prompt": "Add a box."} for line in lines])
    config = IngestConfig(out="o", pairs=str(path), fetch=LOCAL)
    first, *others = read(ingest.open_source(config))
    assert (first["image"], first["image_target"]) == (source(0), target(0))
    assert [row["reason"] for row in others] == ["image.undecodable", "url.gone", None]
    assert others[2]["outcome"] == "failed" and "answers 500" in others[2]["error"]
    assert server.asked["/s"] == 1  # once for the records that share it
    refused = read(ingest.open_source(IngestConfig(out="o", pairs=str(path))))
    assert {row["outcome"] for row in refused} == {"failed"}
    assert "fetched only with --fetch" in refused[0]["error"]
