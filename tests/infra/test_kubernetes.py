"""The files for Kubernetes: what its API server, the operator, Ray and we make of them."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import socket
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dim import __version__
from dim.cli import COMMANDS, command_of, load
from dim.config import load_config
from infra.diagnosis.bucket import examine_store
from infra.ports import free_port
from serving.config import ServingConfig
from serving.deployments import DRAINING_S
from serving.exposure import check_exposure
from tests.infra.autoscaler import of_features, of_stage, wanted_nodes
from tests.infra.manifests import (
    CLUSTER,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    Pod,
    build,
    check,
    clusters,
    jobs,
    pods,
    selects,
)
from training.stage import StageConfig

SERVERS = tuple(f"{name}/serving" for name in OVERLAYS)
JOBS = jobs()
CONTROL_PLANE = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "object manager": 8076}


def both(overlay: str) -> list[dict[str, Any]]:
    """The cluster of an overlay and its server."""
    return build(overlay) + build(f"{overlay}/serving")


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_api_server_takes_every_document(name: str) -> None:
    documents = build(name)
    assert documents
    for document in documents:
        check(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "dim"


@pytest.mark.parametrize("name", JOBS)
def test_the_api_server_takes_every_job(name: str) -> None:
    check(JOBS[name])


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("RayCluster", lambda spec: spec.update(authOption={"mode": "token"})),
        ("RayCluster", lambda spec: spec["authOptions"].update(mode="password")),
        (
            "RayCluster",
            lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(toleration=[]),
        ),
        ("StatefulSet", lambda spec: spec["template"]["spec"].update(securitycontext={})),
        ("NetworkPolicy", lambda spec: spec.update(policyType=["Ingress"])),
    ],
)
def test_a_field_that_nobody_knows_is_refused(kind: str, spoil: Any) -> None:
    document = next(found for found in build("autoscaling") if found["kind"] == kind)
    spoil(document["spec"])
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_asks_for_a_token_and_survives_its_head(name: str) -> None:
    found = dict(clusters(both(name)))
    assert set(found) == {"RayCluster", "RayService"}
    for spec in found.values():
        assert spec["authOptions"] == {"mode": "token", "secretName": "dim-ray-token"}
        store = spec["gcsFaultToleranceOptions"]
        assert store["redisAddress"] == "redis:6379"
        assert store["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "dim-redis"
        assert spec["rayVersion"] == pinned()["ray"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_is_one_that_a_restricted_namespace_takes(name: str) -> None:
    """See Kubernetes' pod security standards; and it says how much of the node it takes."""
    for pod in pods(both(name)):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0, pod.owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, pod.owner
            assert own["capabilities"] == {"drop": ["ALL"]}, pod.owner
            for size in ("requests", "limits"):
                wanted = {"cpu", "memory", "ephemeral-storage"}
                assert wanted <= set(container["resources"][size]), pod.owner
            tag = container["image"].partition(":")[2]
            assert tag and tag != "latest", pod.owner
        if "ray.io/cluster" not in pod.labels:
            # The operator gives Ray's containers theirs, which know Ray's version and its token.
            (container,) = pod.spec["containers"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container), pod.owner


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_s_containers_have_room_and_settings(name: str) -> None:
    for pod in pods(both(name)):
        if "ray.io/cluster" in pod.labels:
            (container,) = pod.spec["containers"]
            sources = [source for entry in container["envFrom"] for source in entry.values()]
            assert [source["name"] for source in sources] == ["dim-settings", "dim-credentials"]
            scratch = next(v for v in pod.spec["volumes"] if v["name"] == "ray-logs")
            assert scratch["emptyDir"]["sizeLimit"]
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["ray-logs"] == "/tmp/ray"  # noqa: S108 - in the container


def reached_by_strangers(pod: Pod, policies: list[dict[str, Any]], port: int) -> bool:
    """Whether a pod of another namespace, with no label that counts, reaches a port."""
    applying = [policy for policy in policies if selects(policy["spec"]["podSelector"], pod.labels)]
    if not applying:
        return True
    rules = [rule for policy in applying for rule in policy["spec"].get("ingress", [])]
    for rule in rules:
        ports = [entry["port"] for entry in rule.get("ports", [])]
        if "from" not in rule and (not ports or port in ports):
            return True
        for peer in rule.get("from", []):
            assert "ipBlock" not in peer
            stranger = selects(peer.get("podSelector", {}), {"app": "stranger"})
            elsewhere = "namespaceSelector" in peer and not peer["namespaceSelector"]
            if stranger and elsewhere and (not ports or port in ports):
                return True
    return False


@pytest.mark.parametrize("name", OVERLAYS)
def test_strangers_reach_the_server_s_port_and_no_other(name: str) -> None:
    documents = both(name)
    policies = [found for found in documents if found["kind"] == "NetworkPolicy"]
    assert all(policy["spec"]["policyTypes"] == ["Ingress"] for policy in policies)
    for pod in pods(documents):
        own = [p["containerPort"] for c in pod.containers for p in c.get("ports", [])]
        for port in {*own, *CONTROL_PLANE.values()}:
            open_to_all = pod.labels["dim-part"] == "serving" and port == 8000
            assert reached_by_strangers(pod, policies, port) == open_to_all, (pod.owner, port)


def test_who_needs_a_port_is_let_in() -> None:
    """Who talks to whom: each is a rule of the part that is talked to."""
    documents = both("one-gpu")
    policies = {found["metadata"]["name"]: found["spec"] for found in documents
                if found["kind"] == "NetworkPolicy"}  # fmt: skip
    parts = {pod.labels["dim-part"]: pod.labels for pod in pods(documents)}
    for policy, port, clients in [
        ("redis", 6379, ["jobs", "serving"]),
        ("mlflow", 5000, ["jobs", "serving"]),
        ("mlflow-db", 5432, ["mlflow"]),
        ("store", 9000, ["jobs", "serving", "mlflow"]),
        ("ray-jobs", None, ["jobs"]),
        ("ray-serving", None, ["serving"]),
    ]:
        rules = policies[policy]["ingress"]
        let_in = {
            part
            for part, labels in parts.items()
            for rule in rules
            for peer in rule.get("from", [])
            if "namespaceSelector" not in peer and selects(peer["podSelector"], labels)
            and (port is None or [entry["port"] for entry in rule["ports"]] == [port])
        }  # fmt: skip
        assert let_in == set(clients), policy
    for policy in ("ray-jobs", "ray-serving"):
        operator = policies[policy]["ingress"][1]
        (peer,) = operator["from"]  # a label alone could be anybody's
        assert peer["namespaceSelector"]["matchLabels"] == {
            "kubernetes.io/metadata.name": "kuberay-system"
        }
        assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
        assert [entry["port"] for entry in operator["ports"]] == [CONTROL_PLANE["dashboard"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_lead_to_the_ports_of_their_pods(name: str) -> None:
    documents = both(name)
    services = [found for found in documents if found["kind"] == "Service"]
    assert {"redis", "mlflow", "mlflow-db"} <= {found["metadata"]["name"] for found in services}
    for service in services:
        spec = service["spec"]
        (pod,) = [
            pod for pod in pods(documents) if selects({"matchLabels": spec["selector"]}, pod.labels)
        ]
        ports = {p["name"]: p["containerPort"] for c in pod.containers for p in c.get("ports", [])}
        assert [entry["port"] for entry in spec["ports"]] == [
            ports[entry["targetPort"]] for entry in spec["ports"]
        ]
    settings = next(found for found in documents if found["kind"] == "ConfigMap")["data"]
    known = {(found["metadata"]["name"], found["spec"]["ports"][0]["port"]) for found in services}
    for variable in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        if address := settings.get(variable):
            host, _, port = address.removeprefix("http://").partition(":")
            assert (host, int(port)) in known


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_referred_to_and_docs_say_how_to_make_them(name: str) -> None:
    documents = both(name)
    assert not [found for found in documents if found["kind"] == "Secret"]
    text = yaml.safe_dump_all(documents)
    referred = set(re.findall(r"secretName: (\S+)", text))
    for container in (container for pod in pods(documents) for container in pod.containers):
        for variable in container.get("env", []):
            if re.search("PASSWORD|SECRET|TOKEN", variable["name"]):
                referred.add(variable["valueFrom"]["secretKeyRef"]["name"])
        referred |= {
            entry["secretRef"]["name"]
            for entry in container.get("envFrom", [])
            if "secretRef" in entry
        }
    assert referred == {
        "dim-ray-token", "dim-redis", "dim-credentials", "dim-mlflow-db", "dim-api-keys"
    }  # fmt: skip
    page = (ROOT / "docs" / "cluster.md").read_text()
    for secret in referred:
        assert f"create secret generic {secret} " in page


@pytest.mark.parametrize("name", OVERLAYS)
def test_nodes_are_not_emptied_under_a_head(name: str) -> None:
    documents = both(name)
    budgets = [found["spec"] for found in documents if found["kind"] == "PodDisruptionBudget"]
    assert all(type(budget["minAvailable"]) is int for budget in budgets)  # no share, no maximum
    for pod in pods(documents):
        kept = [budget for budget in budgets if selects(budget["selector"], pod.labels)]
        wanted = pod.labels.get("ray.io/node-type") == "head" or pod.labels["dim-part"] == "redis"
        if name == "autoscaling" and pod.owner == "RayService/gpu":
            wanted = True
        assert len(kept) == wanted, pod.owner


def application_of(name: str) -> tuple[ServingConfig, dict[str, Any]]:
    """What a RayService serves, and all of its specification."""
    from ray.serve.schema import ServeDeploySchema

    spec = next(found for found in build(name) if found["kind"] == "RayService")["spec"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    assert schema.http_options.host == "0.0.0.0"
    (application,) = schema.applications
    assert application.import_path == "serving.app:build"
    return ServingConfig.model_validate(application.args), spec


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_asks_for_keys_of_a_secret(name: str) -> None:
    config, spec = application_of(name)
    check_exposure(config, "0.0.0.0")
    assert config.keys is not None
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    for group in (spec["rayClusterConfig"]["headGroupSpec"], *groups):
        (container,) = group["template"]["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(config.keys).parent) == mounts["api-keys"]
    assert config.cpus_per_ingress > 0  # the head offers none
    assert spec["excludeHeadPodFromServeSvc"] is True


@pytest.mark.parametrize("name", SERVERS)
def test_pods_wait_for_the_longest_request(name: str) -> None:
    from ray.scripts.scripts import drain_node

    config, spec = application_of(name)
    longest = config.request_timeout_s + DRAINING_S
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > longest
        (container,) = pod["containers"]
        script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        drain = shlex.split(script.partition(";")[0])
        assert drain[:2] == ["ray", "drain-node"]
        given = drain_node.make_context("drain-node", drain[2:]).params
        assert longest < given["deadline_remaining_seconds"] < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", SERVERS)
def test_the_workers_hold_what_the_server_asks_for(name: str) -> None:
    config, spec = application_of(name)
    (group,) = [kind for kind in node_types(spec["rayClusterConfig"]).values()
                if kind["resources"]["CPU"]]  # fmt: skip
    node = group["resources"]
    for pool in (config.designer, config.painter):
        assert (pool.num_gpus or config.gpus_per_replica) <= node.get("GPU", 0)
        assert (pool.num_cpus or config.cpus_per_replica) <= node["CPU"]
    most = [
        (pool.autoscaling or {}).get("max_replicas", 1)
        for pool in (config.designer, config.painter)
    ]
    gpus = sum(
        count * (pool.num_gpus or config.gpus_per_replica)
        for count, pool in zip(most, (config.designer, config.painter), strict=True)
    )
    assert gpus <= node.get("GPU", 0) * group["max_workers"]
    if gpus:
        assert gpus == node["GPU"] * group["max_workers"]


def autoscaling(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The autoscaler's view of a cluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    resource = {"metadata": {"name": "dim", "namespace": "dim"}, "spec": spec}
    return _derive_autoscaling_config_from_ray_cr(resource)


def node_types(spec: Mapping[str, Any]) -> dict[str, Any]:
    return autoscaling(spec)["available_node_types"]


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("autoscaling", {"cpu": 0, "encoder-gpu": 8, "training-gpu": 8}),
        ("one-gpu", {"cpu": 0, "gpu": 1}),
        ("tiny", {"cpu": 0}),
    ],
)
def test_groups_start_from_zero_with_their_gpus(name: str, gpus: dict[str, int]) -> None:
    (spec,) = [spec for kind, spec in clusters(build(name)) if kind == "RayCluster"]
    types = node_types(spec)
    (head,) = set(types) - set(gpus)
    assert types[head]["resources"]["CPU"] == 0
    for group, count in gpus.items():
        assert types[group]["min_workers"] == 0 < types[group]["max_workers"]
        assert types[group]["resources"].get("GPU", 0) == count
        assert types[group]["resources"]["CPU"] > 0


def test_the_published_stages_and_features_find_their_nodes() -> None:
    (spec,) = [spec for kind, spec in clusters(build("autoscaling")) if kind == "RayCluster"]
    cluster = autoscaling(spec)
    assert wanted_nodes(cluster, of_features()) == {"encoder-gpu": 1}
    assert wanted_nodes(cluster, [{"CPU": 1.0}] * 32) == {"cpu": 2}
    for stage, nodes in (("t2i", 4), ("edit1", 1), ("edit2", 1)):
        assert wanted_nodes(cluster, of_stage(stage)) == {"training-gpu": nodes}, stage


def test_there_is_a_job_for_each_pipeline_and_stage() -> None:
    asked = " ".join(entrypoint(document) for document in JOBS.values())
    for module in ("ingest", "filter", "edit", "t2i", "features", "evaluate"):
        assert f"python -m pipelines.{module} " in asked
    for stage in ("t2i", "edit1", "edit2"):
        assert f"python -m training.train configs/dim-4.6b-{stage}.yaml " in asked


def entrypoint(job: Mapping[str, Any]) -> str:
    """The shell command of a RayJob or of a RayCronJob's jobs."""
    spec = job["spec"].get("jobTemplate", job["spec"])
    assert spec["clusterSelector"] == {"ray.io/cluster": "dim"}
    assert spec["submissionMode"] == "HTTPMode"
    return str(spec["entrypoint"])


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_commands_that_the_programs_take(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = yaml.safe_load((CLUSTER / "base" / "settings.yaml").read_text())["data"]
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("day", "2026-01-02")
    monkeypatch.chdir(tmp_path)  # as in the image, which holds no checkout
    modules = {target.partition(":")[0]: target for target, _ in COMMANDS.values()}
    programs = [step.strip() for step in entrypoint(JOBS[name]).split("&&")]
    for program in programs:
        if program.startswith("day="):
            continue
        words = shlex.split(os.path.expandvars(program))
        assert words[:2] == ["python", "-m"]
        command = command_of(load(modules[words[2]]))
        context = command.make_context(words[2], words[3:], resilient_parsing=False)
        assert "$" not in " ".join(map(str, context.params.values()))
        if words[2] == "training.train":
            load_config(StageConfig, context.params["stage"], context.params["overrides"])
        elif context.params.get("overrides"):
            assert name == "evaluate"
            config = importlib.import_module(words[2]).EvaluateConfig
            given = ["model=m", "data=d", *context.params["overrides"]]
            assert load_config(config, None, given).gpus_per_worker == 1


def test_the_images_are_this_version_s() -> None:
    for name in OVERLAYS:
        for pod in pods(both(name)):
            for container in pod.containers:
                repository, _, tag = container["image"].rpartition(":")
                if repository.endswith("dim"):
                    wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
                    assert tag == __version__ + ("" if wants_gpu else "-cpu"), pod.owner


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def container_of(name: str, owner: str) -> dict[str, Any]:
    """The one container of a pod of an overlay."""
    (pod,) = [pod for pod in pods(build(name)) if pod.owner == owner]
    (container,) = pod.spec["containers"]
    return container


def expanded(container: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """A container's variables as Kubernetes sets them: ``$(NAME)`` is one that came before."""
    values = dict(given)
    for variable in container["env"]:
        if "value" in variable:
            values[variable["name"]] = re.sub(
                r"\$\((\w+)\)", lambda found: values[found[1]], variable["value"]
            )
    return values


def test_mlflow_is_started_with_options_that_it_has_and_answers_to_its_names() -> None:
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    container = container_of("one-gpu", "Deployment/mlflow")
    assert container["command"] == ["mlflow", "server"]
    options = server.make_context("server", list(container["args"])).params
    assert options["artifacts_destination"] == "$(DIM_STORE)/mlflow"
    assert options["serve_artifacts"] and options["host"] == "0.0.0.0"
    names = options["allowed_hosts"].split(",")
    for host in ("mlflow:5000", "mlflow.dim.svc.cluster.local:5000", "localhost:15000"):
        assert is_allowed_host_header(names, host)
    assert not is_allowed_host_header(names, "rebound.example:5000")
    values = expanded(container, {"MLFLOW_DB_PASSWORD": "secret"})
    assert values["MLFLOW_BACKEND_STORE_URI"] == "postgresql://mlflow:secret@mlflow-db:5432/mlflow"


def test_the_store_takes_the_keys_of_its_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = container_of("one-gpu", "StatefulSet/store")
    keys = {"AWS_ACCESS_KEY_ID": "KEYOFTHECLUSTER00001", "AWS_SECRET_ACCESS_KEY": "a-secret"}
    port = free_port()
    (tmp_path / "data" / "dim").mkdir(parents=True)  # as the pod's first container does
    command = [*container["command"], *container["args"]]
    changed = {"/data": str(tmp_path / "data"), ":9000": f"127.0.0.1:{port}"}
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, *(changed.get(word, word) for word in command[1:])],
            env={**os.environ, **expanded(container, keys)}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        wait_for_port(server, port)
        assert {found.status.value for found in examine_store("s3://dim/any")} == {"ok"}
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        assert "failed" in {found.status.value for found in examine_store("s3://dim/any")}
    finally:
        server.kill()
        server.wait()


def wait_for_port(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    pytest.fail("the store does not listen")
