"""What no marker, a credential that moves and a large file must not do, on real S3 servers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs as pafs
import pytest

from dim.errors import StorageError
from infra import storage
from infra.s3 import Files
from infra.storage import Store, open_store
from tests import rclone_server
from tests.fault_proxy import running

COPY = """
import resource, sys
from infra import storage

def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

folder, uri, back = sys.argv[1:]
storage.write_bytes(f"{uri}/warm", b"1")
storage.read_bytes(f"{uri}/warm")
before = peak()
storage.upload_folder(folder, f"{uri}/up")
storage.download_folder(f"{uri}/up", back)
print(peak() - before)
"""


@pytest.fixture(params=["s3", "rclone_s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    uri: str = request.getfixturevalue(request.param)
    return uri


def objects_in(uri: str) -> list[str]:
    """All keys of a bucket, markers too, as boto3 sees them."""
    client = boto3.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=uri.removeprefix("s3://"))
    return [found["Key"] for page in pages for found in page.get("Contents", ())]


def put(uri: str, key: str) -> None:
    client = boto3.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_object(Bucket=uri.removeprefix("s3://"), Key=key, Body=b"")


def test_no_marker_is_ever_written(bucket: str, tmp_path: Path) -> None:
    store = open_store(f"{bucket}/out")
    store.write("a/b/one", b"1")
    store.write("a/two", b"2")
    with store.open_output("c/three") as file:
        file.write(b"3")
    store.move("a/two", "d/e/two")
    store.delete("a/b/one")
    store.delete("c")
    assert objects_in(bucket) == ["out/d/e/two"]
    # What Ray Train does with the file system of a store.
    store.filesystem.create_dir(store.path("f/g"), recursive=True)
    (tmp_path / "up" / "deep").mkdir(parents=True)
    (tmp_path / "up" / "empty").mkdir()
    (tmp_path / "up" / "deep" / "four").write_bytes(b"4")
    pafs.copy_files(
        str(tmp_path / "up"), store.path("f/g"), destination_filesystem=store.filesystem
    )
    assert objects_in(bucket) == ["out/d/e/two", "out/f/g/deep/four"]
    store.filesystem.delete_dir(store.path("f"))
    store.delete("d")
    assert objects_in(bucket) == [] and store.is_empty() and not store.exists()


def test_a_folder_goes_with_the_marker_that_another_program_left(s3: str) -> None:
    store = open_store(s3)
    for key in ("a/", "a/b/", "a/b/c", "ab", "ab/d"):
        put(s3, key)
    assert store.list("a") == [("a/b/c", 0)]
    store.delete("a")
    assert objects_in(s3) == ["ab", "ab/d"] and not store.exists("a")


def test_deletes_more_than_one_listing_holds(rclone_s3: str) -> None:
    client = boto3.Session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for number in range(1003):
        client.put_object(Bucket=rclone_s3.removeprefix("s3://"), Key=f"a/{number}", Body=b"")
    put(rclone_s3, "b")
    open_store(rclone_s3).delete("a")
    assert objects_in(rclone_s3) == ["b"]


def test_a_bucket_is_never_emptied(bucket: str) -> None:
    store = open_store(bucket)
    store.write("a", b"1")
    for doomed in ("", "/", bucket.removeprefix("s3://")):
        with pytest.raises(ValueError, match=r"a bucket and no folder|every bucket"):
            store.filesystem.delete_dir_contents(doomed, accept_root_dir=True)
    assert store.read("a") == b"1"


def test_bytes_are_stored_as_they_are_whatever_they_are_called(bucket: str) -> None:
    store = open_store(bucket)
    store.write("a.jsonl.gz", b"not compressed")
    with store.open_output("b.gz") as file:
        file.write(b"neither")
    assert store.list() == [("a.jsonl.gz", 14), ("b.gz", 7)]
    assert store.read("a.jsonl.gz") == b"not compressed"


def test_an_upload_whose_file_cannot_be_read_to_its_end_leaves_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow completes what it has sent so far; a stub breaks the disk half way."""
    whole, broken = tmp_path / "a", tmp_path / "b"
    whole.write_bytes(b"1" * 1000)
    broken.write_bytes(b"2" * (9 << 20))
    copy_files = pafs.copy_files

    def breaks(source: str, target: str, **how: Any) -> None:
        copy_files(source, target, **how)
        with how["destination_filesystem"].open_output_stream(f"{target}/b") as stream:
            stream.write(b"2" * 1000)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pafs, "copy_files", breaks)
    with pytest.raises(StorageError, match=r"cannot copy .* to s3://.*: Input/output error"):
        storage.upload_folder(tmp_path, f"{bucket}/up")
    assert objects_in(bucket) == ["up/a"]


def test_a_folder_arrives_whole_or_not_at_all(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket}/up")
    for name in ("a", "b/c"):
        store.write(name, name.encode())
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "a").write_bytes(b"old")
    opened: list[str] = []
    open_input_stream = Files.open_input_stream

    def breaks(self: Files, path: str) -> Any:
        opened.append(path)
        if path.endswith("b/c"):
            raise OSError("AWS Error NETWORK_CONNECTION")
        return open_input_stream(self, path)

    monkeypatch.setattr(Files, "open_input_stream", breaks)
    with pytest.raises(StorageError, match=r"cannot copy s3://.*/up to .*: the store cannot be re"):
        storage.download_folder(store.uri, tmp_path / "down")
    assert len(opened) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["down", "a"]
    assert (tmp_path / "down" / "a").read_bytes() == b"old"
    monkeypatch.setattr(Files, "open_input_stream", open_input_stream)
    storage.download_folder(store.uri, tmp_path / "down")
    assert (tmp_path / "down" / "a").read_bytes() == b"a"
    assert (tmp_path / "down" / "b" / "c").read_bytes() == b"b/c"


def test_no_object_lands_outside_of_the_folder(s3: str, tmp_path: Path) -> None:
    for key in ("up/a", "up/../../outside"):
        put(s3, key)
    with pytest.raises(StorageError, match=r"s3://.*/outside would lie outside of .*/down"):
        storage.download_folder(f"{s3}/up", tmp_path / "down" / "down")
    assert list(tmp_path.iterdir()) == []


def test_a_busy_store_is_asked_again_for_a_folder(
    s3: str, s3_endpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "up").mkdir()
    for number in range(4):
        (tmp_path / "up" / str(number)).write_bytes(bytes([number]) * 10)
    with running(s3_endpoint) as proxy:
        proxy.busy = lambda number: number in (2, 5, 20, 23)
        uri = f"{s3}/up?endpoint_override={proxy.url}"
        storage.upload_folder(tmp_path / "up", uri)
        storage.download_folder(uri, tmp_path / "down")
        assert proxy.statuses[503] == 4
    down = {path.name: path.read_bytes() for path in (tmp_path / "down").iterdir()}
    assert down == {str(number): bytes([number]) * 10 for number in range(4)}


def test_large_files_do_not_pass_through_memory(rclone_s3: str, tmp_path: Path) -> None:
    megabytes, files = 320, 3
    (tmp_path / "large").mkdir()
    for number in range(files):
        with (tmp_path / "large" / f"{number}.bin").open("wb") as file:
            file.truncate(megabytes << 20)
    done = subprocess.run(
        [sys.executable, "-c", COPY, tmp_path / "large", rclone_s3, tmp_path / "back"],
        check=True, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert int(done.stdout) < 256  # of 960 MiB that went up and down
    sizes = [path.stat().st_size for path in (tmp_path / "back").iterdir()]
    assert sizes == [megabytes << 20] * files


def write_login(path: Path, access_key: str, secret_key: str) -> None:
    """What a login tool leaves behind."""
    path.write_text(
        f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"
    )


def use(store: Store) -> None:
    """Write, list, read and delete, which two libraries do."""
    store.write("b/c", b"3")
    assert store.list("b") == [("b/c", 1)]
    store.delete("b")
    assert store.read("a") == b"1" and not store.exists("b")


def test_credentials_that_change_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "buckets", "ANOTHERKEYOFTHETEST1"
    (folder / "b").mkdir(parents=True)
    with rclone_server.running(folder) as url:
        rclone_server.point_at(url, monkeypatch)
        store = open_store("s3://b/out")
        store.write("a", b"1")
        use(store)
        early = pickle.dumps(store)
    with rclone_server.running(folder, access_key=other, port=int(url.rpartition(":")[2])):
        with pytest.raises(StorageError, match="the access key is not known there"):
            store.write("a", b"2")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", other)
        use(store)
        sent_now = pickle.dumps(store)
        use(pickle.loads(early))  # which was sent long ago, where there are other credentials now
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        use(pickle.loads(sent_now))
        with pytest.raises(StorageError, match="the access key is not known there"):
            pickle.loads(early).write("a", b"2")
        login = tmp_path / "credentials"
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(login))
        write_login(login, rclone_server.ACCESS_KEY, rclone_server.SECRET_KEY)
        store = open_store("s3://b/out")
        with pytest.raises(StorageError, match="the access key is not known there"):
            store.write("a", b"2")
        write_login(login, other, rclone_server.SECRET_KEY)
        use(store)


def test_an_expired_session_gives_way_to_the_machines_own_credentials(
    rclone_s3: str, rclone_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    login = tmp_path / "credentials"
    with running(rclone_endpoint) as proxy:
        proxy.expired = lambda headers: headers.get("x-amz-security-token") == "old"
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        open_store(rclone_s3).write("a", b"1")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
        sent = pickle.dumps(open_store(rclone_s3))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(login))
        expired = "the session token has expired; run it again with fresh credentials"
        with pytest.raises(StorageError, match=f"cannot write .*/b: {expired}"):
            pickle.loads(sent).write("b", b"2")
        with pytest.raises(StorageError, match=f"cannot read .*/a: refused, as .*{expired}"):
            pickle.loads(sent).read("a")
        write_login(login, rclone_server.ACCESS_KEY, rclone_server.SECRET_KEY)
        use(pickle.loads(sent))
        assert pickle.loads(sent).read("a") == b"1"
