"""The same calls against a local folder and a real S3 API."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError

from dim import records
from dim.errors import InputError, StorageError, StorageUnavailable, UnreadableFile
from infra import s3 as s3_module
from infra import storage
from infra.ports import free_port
from infra.s3 import Connection, Files
from infra.storage import Store, open_store
from tests import rclone_server
from tests.fault_proxy import running


@pytest.fixture(params=["local", "s3", "rclone_s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    local = request.param == "local"
    uri = str(tmp_path / "out") if local else request.getfixturevalue(request.param)
    return open_store(storage.join(uri, "deep", "er"))


def test_writes_and_reads(store: Store) -> None:
    assert store.is_empty() and not store.exists("a.bin") and store.list() == []
    store.write("a.bin", b"one")
    store.write("x/b.bin", b"two!")
    store.write("a.bin", b"three")
    assert store.read("a.bin") == b"three"
    assert store.list() == [("a.bin", 5), ("x/b.bin", 4)]
    assert store.list("x") == [("x/b.bin", 4)]
    assert store.list(suffix="b.bin") == [("x/b.bin", 4)]
    assert store.is_file("a.bin") and store.exists("x") and not store.is_file("x")
    assert not store.is_empty()


def test_moves_and_deletes(store: Store) -> None:
    store.write("a", b"1")
    store.write("f/b", b"2")
    store.move("a", "g/c")
    store.delete("f")
    store.delete("not there")
    assert store.list() == [("g/c", 1)]
    store.delete("g/c")
    assert store.list() == []


def test_reads_parts_of_a_file(store: Store) -> None:
    store.write("a", b"0123456789")
    with store.open_input("a") as file:
        file.seek(3)
        assert file.read(4) == b"3456"


def test_travels_to_another_process(store: Store) -> None:
    store.write("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.read("a") == b"1"


def test_needs_no_environment_once_opened(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = pickle.dumps(open_store(s3))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    thawed = pickle.loads(frozen)
    thawed.write("a", b"1")
    assert thawed.read("a") == b"1"
    assert "test" not in repr(thawed.connection).replace("dim-test", "")


def test_endpoint_in_the_address(
    s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    uri = f"{s3}/folder?endpoint_override={s3_endpoint}"
    file = storage.join(uri, "a.txt")
    assert file == f"{s3}/folder/a.txt?endpoint_override={s3_endpoint}"
    storage.write_bytes(file, b"x")
    assert storage.read_bytes(file) == b"x"
    assert storage.exists(file) and storage.exists(uri)
    assert open_store(uri).list() == [("a.txt", 1)]
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"


def test_a_missing_file_says_where(store: Store) -> None:
    with pytest.raises(StorageError, match="not found: .*deep/er/gone.txt"):
        store.read("gone.txt")
    with pytest.raises(StorageError, match="not found: "):
        store.open_input("gone.txt")


def test_a_missing_bucket_says_so(s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match="cannot write s3://no-such/a: the bucket does not exi"):
        open_store("s3://no-such").write("a", b"1")
    with pytest.raises(StorageError, match="not found: s3://no-such/a"):
        open_store("s3://no-such").read("a")


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("", "address is empty"),
        ("ftp://x/y", "use a local path, file:// or s3://"),
        ("s3://", "names no bucket"),
        ("s3://b/k?endpoint=http://x", "unknown option 'endpoint'"),
        (
            "s3://KEY:s3cret@b/k",
            r"s3://\*\*\*@b/k holds credentials: give them by AWS_ACCESS_KEY_ID",
        ),
        ("s3://b/k?secret_key=s3cret", r"unknown option 'secret_key' in s3://b/k\?secret_key=\*"),
        ("s3://b/k?endpoint_override=http://u:s3cret@h", r"endpoint http://\*\*\*@h holds a user"),
        (
            "s3://b/k?endpoint_override=http%3A%2F%2Fu%3As3cret%40h",
            "holds a user: give the keys by",
        ),
    ],
)
def test_a_wrong_address_is_refused(uri: str, complaint: str) -> None:
    with pytest.raises(StorageError, match=complaint) as refused:
        open_store(uri)
    assert "s3cret" not in str(refused.value)


def test_local_addresses(tmp_path: Path) -> None:
    assert storage.local_path(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    assert storage.is_local(str(tmp_path)) and not storage.is_local("s3://b/x?region=us-east-1")
    with pytest.raises(StorageError, match="is not on this machine"):
        storage.local_path("s3://b/x?region=us-east-1")
    odd = tmp_path / "why?.txt"
    storage.write_bytes(str(odd), b"1")
    assert odd.read_bytes() == b"1"


@pytest.mark.parametrize(
    ("uri", "folder", "name"),
    [
        ("a.jsonl", os.getcwd(), "a.jsonl"),
        ("/a.jsonl", "/", "a.jsonl"),
        ("/x/a.jsonl", "/x", "a.jsonl"),
        ("s3://b/a.jsonl?region=r", "b", "a.jsonl"),
        ("s3://b/x/a.jsonl?region=r", "b/x", "a.jsonl"),
    ],
)
def test_a_files_folder_and_name(uri: str, folder: str, name: str) -> None:
    store, found = storage.open_file(uri)
    assert (store.root, found) == (folder, name)


def test_a_bucket_is_no_file() -> None:
    with pytest.raises(StorageError, match="names a bucket and no file"):
        storage.read_bytes("s3://b?region=r")


def test_a_file_is_seen_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    store.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot write .*/a: no space left on the disk"):
        store.write("a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert store.read("a") == b"old"


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(StorageError, match="no space left on the disk"),
        storage._errors("write", "x"),
    ):
        Path("/dev/full").write_bytes(b"1")


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write .*/file/a: (Not a directory|File exists)"):
        open_store(str(tmp_path / "file")).write("a", b"1")


def test_copies_folders_both_ways(tmp_path: Path, s3: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_bytes(b"deep")
    storage.upload_folder(tmp_path / "a", f"{s3}/up")
    storage.download_folder(f"{s3}/up", tmp_path / "down")
    assert (tmp_path / "down" / "b" / "c.txt").read_bytes() == b"deep"
    with pytest.raises(StorageError, match="there is nothing at"):
        storage.download_folder(f"{s3}/nothing", tmp_path / "down")


NAMING = b'{"files": [{"path": "data/part-00000.parquet"}, {"path": "rejected/x.parquet"}]}'


def test_opens_the_shards_of_several_outputs(store: Store) -> None:
    for name, value in (("one", 1), ("two", 2)):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"a": [value]}), buffer)
        store.write(f"{name}/data/part-00000.parquet", buffer.getvalue())
        store.write(f"{name}/rejected/part-00000.parquet", b"not read")
        store.write(f"{name}/data/part-00001.parquet", b"of a run that was killed")
        store.write(f"{name}/manifest.json", NAMING)
    both = storage.open_dataset([storage.join(store.uri, name) for name in ("one", "two")])
    assert both.to_table()["a"].to_pylist() == [1, 2]
    assert storage.open_dataset(storage.join(store.uri, "two")).count_rows() == 1


def test_unfinished_data_sets_are_not_opened(store: Store) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        storage.open_dataset(store.uri)
    store.write("data/part-00000.parquet", b"half")
    with pytest.raises(StorageError, match="is not finished"):
        storage.open_dataset(store.uri)
    for text in (b"{}", b"half", b'{"files": [3]}'):
        store.write("manifest.json", text)
        with pytest.raises(StorageError, match="manifest.json is no manifest"):
            storage.open_dataset(store.uri)
    store.write("manifest.json", b'{"files": [{"path": "data/../../x.parquet"}]}')
    with pytest.raises(StorageError, match="has no data/"):
        storage.open_dataset(store.uri)


@pytest.fixture
def busy_server() -> Iterator[tuple[str, list[str]]]:
    """An S3 server that says 503 twice to every file it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            busy = asked.count(self.path) <= 2
            body = b"" if busy else b"finally"
            self.send_response(503 if busy else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def test_a_busy_store_is_asked_again(busy_server: tuple[str, list[str]], s3_endpoint: str) -> None:
    endpoint, asked = busy_server
    uri = f"s3://bucket/a.txt?endpoint_override={endpoint}"
    assert storage.read_bytes(uri) == b"finally"
    assert len(asked) >= 3


def test_a_store_that_is_started_anew_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3/bucket").mkdir(parents=True)
    port, is_away = free_port(), s3_module._is_away
    rclone_server.point_at(f"http://127.0.0.1:{port}", monkeypatch)
    store = open_store("s3://bucket/out")
    with monkeypatch.context() as patch:
        patch.setattr(s3_module, "ATTEMPTS", 1)
        with pytest.raises(StorageUnavailable, match="cannot write .*: the store cannot be reach"):
            store.write("a", b"one")
    refused: list[BaseException] = []
    with ExitStack() as stack:

        def come_back(error: BaseException) -> bool:
            if not refused:
                stack.enter_context(rclone_server.running(tmp_path / "s3", port=port))
            refused.append(error)
            return is_away(error)

        monkeypatch.setattr(s3_module, "_is_away", come_back)
        store.write("a", b"one")
        assert refused and store.read("a") == b"one"


def test_of_two_writes_on_the_same_condition_one_succeeds(
    store: Store, request: pytest.FixtureRequest
) -> None:
    heeded = "rclone_s3" not in request.fixturenames
    assert store.read_version("a") is None
    first = store.write_version("a", b"one", None)
    assert first is not None and first == store.read_version("a")
    assert (store.write_version("a", b"two", None) is None) == heeded
    found = store.read_version("a")
    assert found is not None and found.data == (b"one" if heeded else b"two")
    third = store.write_version("a", b"three", found)
    assert third is not None and store.read("a") == b"three"
    assert (store.write_version("a", b"four", first) is None) == heeded
    assert (store.write_version("gone", b"five", first) is None) == heeded


def test_a_write_whose_answer_was_lost_meets_itself(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = open_store(f"{s3}/out"), Files.write_version

    def lose(files: Files, path: str, data: bytes, version: str | None) -> str | None:
        write(files, path, data, version)
        return write(files, path, data, version)

    monkeypatch.setattr(Files, "write_version", lose)
    made = store.write_version("a", b"one", None)
    assert made is not None and made == store.read_version("a")
    assert store.write_version("a", b"two", None) is None and store.read("a") == b"one"


def test_a_store_that_knows_no_conditions_writes_all_the_same(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_objects = Connection.open_objects

    def without(connection: Connection) -> Any:
        client = open_objects(connection)
        put = client.put_object

        def refuse(**options: Any) -> Any:
            if options.keys() & {"IfMatch", "IfNoneMatch"}:
                raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
            return put(**options)

        client.put_object = refuse
        return client

    monkeypatch.setattr(Connection, "open_objects", without)
    store = open_store(f"{s3}/out")
    assert store.write_version("a", b"one", None) and store.write_version("a", b"two", None)
    assert store.read("a") == b"two"


def test_writes_part_by_part(store: Store) -> None:
    with store.open_output("f/a.bin") as file:
        for part in (b"one", b"", b"two"):
            file.write(part)
        assert not store.exists("f/a.bin")
        assert (file.size, file.tell()) == (6, 6)
    assert file.sha256 == records.sha256_hex(b"onetwo")
    assert store.read("f/a.bin") == b"onetwo"


def test_a_file_is_named_by_what_is_in_it(store: Store) -> None:
    with store.open_unnamed("f/a", lambda file: f"f/a-{file.sha256[:4]}") as file:
        file.write(b"onetwo")
        assert not [name for name, _ in store.list() if not name.endswith(".tmp")]
    assert [name for name, _ in store.list()] == [f"f/a-{records.sha256_hex(b'onetwo')[:4]}"]
    assert store.map(f"f/a-{file.sha256[:4]}").to_pybytes() == b"onetwo"
    with pytest.raises(KeyError), store.open_unnamed("b", lambda file: "b") as file:
        raise KeyError
    assert len(store.list()) == 1
    with pytest.raises(StorageError, match="not found: .*/none"):
        store.map("none")


def test_what_ends_in_an_error_never_appears(store: Store) -> None:
    store.write("a", b"old")
    with pytest.raises(KeyError), store.open_output("a") as file:
        file.write(b"half of the new")
        raise KeyError
    assert store.read("a") == b"old"
    assert [name for name, _ in store.list()] == ["a"]


def test_a_disk_that_fills_up_while_a_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(StorageError, match="cannot write .*/a.parquet: no space left on the disk"),
        store.open_output("a.parquet") as file,
    ):
        monkeypatch.setattr(file, "_file", full)
        pq.write_table(pa.table({"a": [1, 2]}), file)
    assert store.list() == []


def test_a_damaged_parquet_file_is_named(store: Store) -> None:
    store.write("a.parquet", b"PAR1 and no more PAR1")
    with (
        pytest.raises(StorageError, match="cannot read .*/a.parquet: "),
        store.open_parquet("a.parquet"),
    ):
        pytest.fail("it was opened")


def test_records_of_a_newer_schema_are_refused(store: Store) -> None:
    newer = {records.KIND_KEY: b"edit", records.VERSION_KEY: b"12"}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata(newer), buffer)
    store.write("data/part-00000.parquet", buffer.getvalue())
    store.write("manifest.json", NAMING)
    known = records.SCHEMA_VERSIONS["edit"]
    said = f"edit records of schema version 12, and this program knows {known}"
    with pytest.raises(InputError, match=said):
        storage.open_dataset(store.uri)


def test_a_refusal_longer_than_what_was_asked_for(s3: str, s3_endpoint: str) -> None:
    storage.write_bytes(f"{s3}/a.bin", b"0123456789")
    with running(s3_endpoint) as proxy:
        store = open_store(f"{s3}?endpoint_override={proxy.url}")
        with store.open_input("a.bin") as file:
            proxy.busy = lambda number: number <= 3  # the first is the question how long it is
            assert file.read(2) == b"01"
            assert file.read() == b"23456789"
            file.seek(4)
            assert file.read(3) == b"456"
        assert proxy.statuses[503] == 2
        proxy.requests = 0
        assert store.read("a.bin") == b"0123456789"


def test_which_servers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    own = storage.open_store("s3://b/out?endpoint_override=http://10.0.0.1:9000")

    def known(uri: str) -> bool:
        return storage.is_known_server(storage.open_store(uri), own)

    assert known("/data") and known("s3://a/b") and known("s3://a?endpoint_override=minio:9000")
    assert known("s3://a?endpoint_override=http://10.0.0.1:9000")
    assert not known("s3://a?endpoint_override=http://169.254.169.254")
    assert not known("s3://a?endpoint_override=http://minio:9000")  # not https


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), StorageUnavailable),
        (ConnectionResetError(errno.ECONNRESET, "reset"), StorageUnavailable),
        (OSError("When reading: AWS Error SLOW_DOWN: reduce"), StorageUnavailable),
        (OSError("AWS Error NETWORK_CONNECTION during GetObject"), StorageUnavailable),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during GetObject"), StorageUnavailable),
        (OSError("ZSTD decompression failed: Unknown frame descriptor"), UnreadableFile),
        (pa.ArrowInvalid("Parquet magic bytes not found in footer"), UnreadableFile),
        (FileNotFoundError(errno.ENOENT, "No such file"), UnreadableFile),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
        (OSError("AWS Error ACCESS_DENIED during GetObject"), StorageError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
    ],
)
def test_what_passes_what_is_damaged_and_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[StorageError]
) -> None:
    def fail(self: Store, name: str) -> None:
        raise error

    monkeypatch.setattr(Store, "_open", fail)
    with pytest.raises(StorageError) as caught, open_store(str(tmp_path)).open_parquet("x"):
        pass
    assert type(caught.value) is kind and f"{tmp_path}/x" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject"), StorageUnavailable),
        (OSError(errno.ESTALE, "Stale file handle"), StorageUnavailable),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (pa.ArrowInvalid("no such thing"), StorageError),
    ],
)
def test_a_write_says_whether_another_may_go_well(
    tmp_path: Path, error: Exception, kind: type[StorageError]
) -> None:
    with pytest.raises(StorageError) as caught, open_store(str(tmp_path)).open_upload("x"):
        raise error
    assert type(caught.value) is kind and f"{tmp_path}/x" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_lies_nowhere_on_its_way(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_disk(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", no_disk)
    for store in (open_store(f"{s3}/folder"), open_store(str(tmp_path))):
        with store.open_upload("whole") as file:
            file.write(b"some ")
            file.write(b"bytes")
        assert (file.size, file.sha256) == (10, hashlib.sha256(b"some bytes").hexdigest())
        assert store.read("whole") == b"some bytes"
        assert store.read_part("whole", 3, 4) == b"e by" and store.read_part("whole", 8, 9) == b"es"
        with pytest.raises(UnreadableFile, match="not found: .*/none"):
            store.read_part("none", 0, 1)
        with pytest.raises(ValueError, match="stop"), store.open_upload("half") as file:
            file.write(b"some")
            raise ValueError("stop")
        assert not store.exists("half")
