"""Kubernetes files as the API server sees them: built by kustomize, checked without a cluster."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "infra" / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
KUBERNETES = "1.31"  # the oldest that still gets fixes when this was written
OVERLAYS = ("tiny", "one-gpu", "autoscaling")
KUSTOMIZATIONS = tuple(f"{name}{part}" for name in OVERLAYS for part in ("", "/serving"))

Document = dict[str, Any]


class Pod(NamedTuple):
    """A pod as some document describes it."""

    owner: str
    labels: Mapping[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        """All of them, those that begin too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def build(name: str) -> list[Document]:
    """The documents of an overlay; the caller may change them."""
    return copy.deepcopy(_built(name))


@cache
def _built(name: str) -> list[Document]:
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if not shutil.which(command[0]):
        pytest.skip("neither kubectl nor kustomize is there")
    done = subprocess.run(
        [*command, CLUSTER / "overlays" / name], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def jobs() -> dict[str, Document]:
    """Every job file by its name."""
    paths = sorted([*CLUSTER.glob("jobs/*.yaml"), *CLUSTER.glob("overlays/*/job.yaml")])
    return {path.stem: yaml.safe_load(path.read_text()) for path in paths}


def check(document: Document) -> None:
    """Refuse what the API server refuses, unknown fields too.

    Raises:
        jsonschema.ValidationError: the first mistake.
    """
    if not document["apiVersion"].startswith("ray.io/"):
        _check_kubernetes_own(json.dumps(document))
        return
    schema = _kuberay(document["kind"])
    jsonschema.Draft202012Validator(schema).validate(document)
    for where in _unknown(document, schema, document["kind"]):
        raise jsonschema.ValidationError(f"unknown field {where}")


@cache  # overlays share most of their documents, and each reads all of Kubernetes' definitions
def _check_kubernetes_own(document: str) -> None:
    kubernetes_validate.validate(json.loads(document), KUBERNETES, strict=True)


@cache
def _kuberay(kind: str) -> Document:
    path = SCHEMAS / f"{kind.lower()}.v1.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    schema: Document = json.loads(path.read_text())
    return schema


def _unknown(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Fields that the schema does not name; JSON Schema by itself lets them pass."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, schema.get("items", {}), f"{where}[{index}]")
    elif isinstance(value, dict) and not _is_open(schema):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            if name in known:
                yield from _unknown(item, known[name], f"{where}.{name}")
            elif isinstance(others, Mapping):
                yield from _unknown(item, others, f"{where}.{name}")
            else:
                yield f"{where}.{name}"


def _is_open(schema: Mapping[str, Any]) -> bool:
    """An object of which nothing more is said: a document's metadata."""
    return "properties" not in schema and "additionalProperties" not in schema


def clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Each Ray cluster's kind and specification."""
    for document in documents:
        if document["kind"] == "RayCluster":
            yield "RayCluster", document["spec"]
        elif document["kind"] == "RayService":
            yield "RayService", document["spec"]["rayClusterConfig"]


def pods(documents: list[Document]) -> Iterator[Pod]:
    """Every pod that would come of the documents."""
    for document in documents:
        if "template" in document.get("spec", {}):
            template = document["spec"]["template"]
            owner = f"{document['kind']}/{document['metadata']['name']}"
            yield Pod(owner, template["metadata"]["labels"], template["spec"])
    for kind, spec in clusters(documents):
        groups = [("head", spec["headGroupSpec"])]
        groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
        for name, group in groups:
            # As the operator adds them.
            role = "head" if name == "head" else "worker"
            labels = {**group["template"]["metadata"]["labels"], "ray.io/node-type": role}
            labels["ray.io/cluster"] = kind
            yield Pod(f"{kind}/{name}", labels, group["template"]["spec"])


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels."""
    for name, value in selector.get("matchLabels", {}).items():
        if labels.get(name) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        found = labels.get(rule["key"])
        taken = found is not None if rule["operator"] == "Exists" else found in rule["values"]
        assert rule["operator"] in ("Exists", "In")
        if not taken:
            return False
    return True
