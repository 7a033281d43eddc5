"""``GET /metrics``: the counts of a whole cluster at one address, and who may read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.ports import free_port
from serving import scrape
from serving.keys import fingerprint, make_key
from serving.scrape import in_url, kept, merged
from tests import image_server
from tests.image_server import ImageServer, ok
from tests.serving.fakes import Server

HEAD = "# HELP ray_dim_images_total Images.\n# TYPE ray_dim_images_total counter\n"
OTHERS = """\
# TYPE ray_node_mem_used gauge
ray_node_mem_used{SessionName="a"} 1.0
# TYPE ray_dimension gauge
ray_dimension 1.0
"""


def images(replica: str, count: float, application: str = "dim") -> str:
    tags = f'application="{application}",replica="{replica}",route="/v1/images/edits"'
    return f"ray_dim_images_total{{{tags}}} {count}\n"


def nodes(yes: int, no: int) -> str:
    return f'dim_metrics_nodes{{answered="yes"}} {yes}\ndim_metrics_nodes{{answered="no"}} {no}\n'


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no agents, not those of a Ray that other tests have started either."""
    monkeypatch.setattr(scrape, "agents", list)


@pytest.fixture
def agents(alone: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    """Two agents that answer, one that fails and one that is not there."""
    with image_server.serving() as server:
        places = [f"{server.url}/{number}" for number in range(3)]
        server.answers["/0"] = ok((OTHERS + HEAD + images("a", 1)).encode())
        server.answers["/1"] = ok((HEAD + images("b", 2) + images("c", 4, "other")).encode())
        monkeypatch.setattr(
            scrape, "agents", lambda: [*places, f"http://127.0.0.1:{free_port()}/metrics"]
        )
        monkeypatch.setattr(scrape, "application", lambda: "dim")
        yield server


def test_what_all_nodes_count_is_one_text(agents: ImageServer) -> None:
    answer = Server().http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == scrape.CONTENT_TYPE
    assert answer.text.startswith(HEAD + images("a", 1) + images("b", 2) + "# HELP dim_metrics")
    assert answer.text.endswith(nodes(2, 2))


def test_without_agents_a_process_tells_of_itself() -> None:
    server = Server()
    assert server.http.post("/v1/images/generations", json={"prompt": "a cup"}).status_code == 200
    text = server.http.get("/metrics").text
    assert text.endswith(nodes(0, 0))
    assert 'ray_dim_images_total{route="/v1/images/generations"} 1.0\n' in text
    assert 'ray_dim_requests_total{route="/v1/images/generations",status="200"} 1.0\n' in text
    assert 'ray_dim_request_seconds_bucket{le="+Inf",route="/v1/images/generations"} 1.0\n' in text
    documented = Path(__file__).parents[2].joinpath("docs/serving.md").read_text()
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) - {"dim_metrics_nodes"}
    assert len(names) == 5 and all(f"| `{name}` |" in documented for name in names)
    assert "a cup" not in text


def test_a_stranger_learns_nothing_unless_that_is_wanted(tmp_path: Path) -> None:
    key, file = make_key(), tmp_path / "keys.yaml"
    file.write_text(f'- {{name: prometheus, sha256: "{fingerprint(key)}"}}\n')
    guarded = Server(keys=str(file)).http
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == 200
    opened = Server(keys=str(file), open_metrics=True).http
    assert opened.get("/metrics").status_code == 200
    assert opened.post("/metrics").status_code == 401 == opened.get("/metrics/x").status_code
    assert prometheus_is_nobody_in(opened.get("/metrics").text)


def prometheus_is_nobody_in(text: str) -> bool:
    """Whether no client is named, and no key."""
    return "prometheus" not in text and "dim-" not in text


def test_lines_are_told_apart_by_their_names_and_application() -> None:
    serve = 'ray_serve_num_http_requests_total{route="/"} 3.0\n'
    assert kept(OTHERS + serve) == serve
    assert kept("# TYPE ray_dim_images_created gauge\nray_dim_images_created 1.7e9\n") == ""
    assert merged([serve], "dim") == serve  # of the Serve that all share
    assert merged(['ray_dim_job_rows_total{run="7"} 1.0\n'], "dim") == ""  # a job's
    assert merged(['ray_serve_x{app="other"} 1.0\n'], "dim") == ""
    assert merged([images("a", 1, "other")], None) == images("a", 1, "other")
    assert (in_url("10.0.0.1"), in_url("::1")) == ("10.0.0.1", "[::1]")
