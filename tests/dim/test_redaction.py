from __future__ import annotations

import time

import pytest

from dim.errors import DesignerError, StorageError
from dim.redaction import redact, redacted

CREDENTIALS = [
    ("openai:m@https://user:s3cret@host/v1", "openai:m@https://***@host/v1"),
    ("openai:m@https://s3cret@host/v1", "openai:m@https://***@host/v1"),
    ("https://user:p@s3cret@host:8000/v1", "https://***@host:8000/v1"),
    ("https://user:p/s3cret@host/v1", "https://***@host/v1"),
    ("HTTPS://user:s3cret@host", "HTTPS://***@host"),
    ("postgresql://user:s3cret@host/db", "postgresql://***@host/db"),
    ("mysql+pymysql://user:1/s3cret@host:3306/db", "mysql+pymysql://***@host:3306/db"),
    ("postgresql://u:a/b@s3cret@host/db", "postgresql://***@host/db"),
    ("postgresql://host/db?user=u&password=s3cret", "postgresql://host/db?user=u&password=***"),
    ("s3://KEY:s3cret@bucket/a", "s3://***@bucket/a"),
    (
        "s3://b/k?endpoint_override=http://u:s3cret@h:9000&region=r",
        "s3://b/k?endpoint_override=http://***@h:9000&region=r",
    ),
    (
        "s3://b/k?endpoint_override=http%3A%2F%2Fu%3As3cret%40h%3A9000",
        "s3://b/k?endpoint_override=http%3A%2F%2F***%40h%3A9000",
    ),
    ("https://host/v1?api_key=s3cret", "https://host/v1?api_key=***"),
    ("https://host/v1?v=1&api%5Fkey=s3cret&w=2", "https://host/v1?v=1&api%5Fkey=***&w=2"),
    ("https://host/#access_token=s3cret", "https://host/#access_token=***"),
    (
        "https://b.s3.amazonaws.com/i.png?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=s3cret"
        "%2F20260101&X-Amz-Date=1&X-Amz-Security-Token=s3cret&X-Amz-Signature=s3cret",
        "https://b.s3.amazonaws.com/i.png?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=***"
        "&X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=***",
    ),
    ("https://h/i?AWSAccessKeyId=s3cret&Expires=1", "https://h/i?AWSAccessKeyId=***&Expires=1"),
    ("https://h/c?sv=2024&se=2026&sig=s3cret%3D", "https://h/c?sv=2024&se=2026&sig=***"),
    ("https://h/f?code=s3cret", "https://h/f?code=***"),
    ("Endpoint=sb://h/;SharedAccessKey=s3cret", "Endpoint=sb://h/;SharedAccessKey=***"),
    (
        "cannot read 'https://u:s3cret@h/a?token=s3cret', nor (https://h/?key=s3cret).",
        "cannot read 'https://***@h/a?token=***', nor (https://h/?key=***).",
    ),
    ('{"url":"https://u:s3cret@h/","next":"x@y"}', '{"url":"https://***@h/","next":"x@y"}'),
]
HARMLESS = [
    "",
    "openai:gpt-4o@https://api.openai.com/v1",
    "openai:org/model@http://host:8000/v1",
    "http://[::1]:8000/a@b",
    "https://host:8080/a@2x.png?width=3",
    "s3://bucket/a@b/c?region=us-east-1&endpoint_override=http://127.0.0.1:9000",
    "sqlite:////home/me@work/mlflow.db",
    "replay:answers.jsonl",
    "mail me@host.org: what is a token=1 worth? nothing & more",
    "https://h/errors?statuscode=404&keyword=cup&author=me&tokens",
    "file:///a/b@c:d",
]


@pytest.mark.parametrize(("text", "shown"), CREDENTIALS)
def test_credentials_go_and_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert "s3cret" not in redact(text)
    assert redact(shown) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_none_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_configuration_is_redacted_at_every_depth() -> None:
    config = {"a": [{"b": ("https://u:p@h", 1, None)}], "c": "x"}
    assert redacted(config) == {"a": [{"b": ["https://***@h", 1, None]}], "c": "x"}


def test_no_error_of_the_project_shows_any() -> None:
    error = StorageError("cannot read https://u:s3cret@h/")
    assert str(error) == "cannot read https://***@h/" and "s3cret" not in repr(error)
    assert str(DesignerError("x: https://h/?key=s3cret", 3)) == "('x: https://h/?key=***', 3)"


@pytest.mark.parametrize("text", ["a" * 300_000, "://" * 100_000, "?" * 300_000, "&a=" * 100_000])
def test_a_long_text_takes_no_long_time(text: str) -> None:
    before = time.monotonic()
    redact(text)
    assert time.monotonic() - before < 2
