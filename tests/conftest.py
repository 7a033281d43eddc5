"""What every test may ask for: a local Ray, an S3 store, a small random model, the shared data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before anything imports torch, Ray or a hub client: one thread per process, nothing from outside.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pytest

from tests.wheel import build, install

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BUCKET_NUMBERS = itertools.count()
RAY_IS_UP = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on Ray first: side by side they take longest, and each process has files after."""
    items.sort(key=lambda item: "Ray" not in group_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadscope`` what shares a Ray, or a module's fixtures, is in one process."""
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    """The file of a test, or which of two Rays that file uses."""
    return _group_of_file(nodeid.partition("::")[0])


@cache
def _group_of_file(path: str) -> str:
    # The fixture, and not the file for `ray up`.
    if "ray_cluster" not in (ROOT / path).read_text().replace("ray_cluster.yaml", ""):
        return path
    return "training on Ray" if "training" in path else "Ray"


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is fetched from object stores lies among the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIM_CACHE", str(tmp_path_factory.mktemp("models")))
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a wheel."""
    return build(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment into which the wheel was installed."""
    return install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="session")
def shared_real() -> Path:
    """The folder of real edit pairs and blueprints that lies beside the checkout, if it does."""
    return _shared_folder("real")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of golden tensors that lies beside the checkout, if it does."""
    return _shared_folder("golden")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto S3 server; the environment points the S3 clients of this process and its Ray at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield endpoint
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> str:
    """The URI of a new, empty bucket."""
    import boto3

    bucket = f"dim-test-{next(BUCKET_NUMBERS)}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """rclone's S3 server, which checks signatures and takes no folder markers."""
    from tests import rclone_server

    folder = tmp_path_factory.mktemp("rclone") / "buckets"
    folder.mkdir()
    with rclone_server.running(folder) as url:
        yield url


@pytest.fixture
def rclone_s3(rclone_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a new, empty bucket there; the environment of this process points at it."""
    import boto3

    from tests import rclone_server

    rclone_server.point_at(rclone_endpoint, monkeypatch)
    bucket = f"dim-test-{next(BUCKET_NUMBERS)}"
    boto3.Session().client("s3", endpoint_url=rclone_endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray of this test session's own; its workers see the S3 server."""
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,  # or the workers of one test would speak into another's output
        _system_config={"health_check_period_ms": 1000},  # a node that is killed is soon missed
        logging_level="warning",
    )
    request.session.stash[RAY_IS_UP] = True
    yield
    request.session.stash[RAY_IS_UP] = False
    ray.shutdown()


@pytest.fixture(autouse=True)
def ray_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test, nor what it calls, shuts down the Ray that those after it use too."""
    yield
    if request.session.stash.get(RAY_IS_UP, False):
        import ray

        assert ray.is_initialized(), "the Ray of all tests was shut down here"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved DIM of the tiny configuration with random weights: right shapes, no knowledge."""
    from dim import model
    from dim.config import load_config
    from dim.model.config import ModelConfig

    parts = ("understanding", "connector", "painter", "autoencoder")
    config = load_config(
        ModelConfig, ROOT / "configs" / "tiny.yaml", [f"{part}.weights=null" for part in parts]
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.build(config, seed=0).save(folder)
    return folder


@pytest.fixture(scope="session")
def edit_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty edits, as a data job leaves them."""
    from dim import records
    from tests.datasets import edit_rows, write_dataset

    return write_dataset(tmp_path_factory.mktemp("edit") / "out", edit_rows(20), records.EDIT)


@pytest.fixture(scope="session")
def held_out_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five edits of other scenes."""
    from dim import records
    from tests.datasets import edit_rows, write_dataset

    rows = edit_rows(5, seed=9)
    return write_dataset(tmp_path_factory.mktemp("held-out") / "out", rows, records.EDIT)


@pytest.fixture(scope="session")
def t2i_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve images and their captions."""
    from dim import records
    from tests.datasets import t2i_rows, write_dataset

    return write_dataset(tmp_path_factory.mktemp("t2i") / "out", t2i_rows(12), records.T2I)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., str]:
    """``make_dataset(name, rows, schema)``: a data set of one's own."""
    from tests.datasets import write_dataset

    return lambda name, rows, schema: write_dataset(tmp_path / name, rows, schema)
