"""schemathesis makes requests of ``/openapi.json``, right ones and wrong ones: none is a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving import operation, scrape
from tests.serving.fakes import Server

pytest.importorskip(
    "schemathesis", reason="requests are made of the schema by schemathesis (pip: dim[test])"
)

import schemathesis
from hypothesis import HealthCheck, settings  # comes with schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 40
"""Of each operation, in each of the ways that schemathesis makes them."""


@pytest.fixture(autouse=True, scope="module")
def running() -> Iterator[None]:
    """Serve is not there to tell of replicas, and no Ray of other tests of what it counts."""
    with pytest.MonkeyPatch.context() as patch:
        parts = {"ingress": 1, "designer": 1, "painter": 1}
        patch.setattr(operation, "running_replicas", lambda: parts)
        patch.setattr(scrape, "agents", list)
        yield


schema = schemathesis.openapi.from_asgi("/openapi.json", Server(hosts=("*",)).app)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,  # the same requests in each run; a failure is one of the change
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_of_the_schema_is_the_servers_fault(case: schemathesis.Case) -> None:
    case.call_and_validate(
        checks=(
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        )
    )
