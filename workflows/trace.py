"""``dim trace IMAGE``: from a painted image to the model, the training and the data behind it.

What the image says is a claim of whoever wrote the file. So no address is taken from it: its model
is found by its hash, in a registry or folder that the user names, and from there on the addresses
are those that our own jobs have recorded. A link that cannot be followed says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from dim import provenance
from dim.errors import DimError, InputError
from dim.redaction import redacted
from infra import samples, storage
from infra.fingerprint import fingerprint
from infra.registry import Registered, Registry, located
from infra.tracking import call, default_uri, open_client
from pipelines.outputs import manifest as manifests
from pipelines.outputs.shards import Shards
from training.record import MODEL_FOLDER, STAGE_FILE, StageRecord, read_record
from training.stage import StageConfig

_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 28  # of an image file
_MOST_LINKS = 200  # a chain of jobs has a dozen
_METRICS = ("validation_exact", "validation_loss", "loss")


@dataclass(frozen=True)
class Link:
    """One link of the chain.

    Attributes:
        what: ``image``, ``model``, ``stage``, ``run`` or ``data``.
        where: its address or name; empty if it is not known.
        said: what is known of it, by name.
        why: why the chain breaks here, or does not hold; empty if it does.
    """

    what: str
    where: str
    said: Mapping[str, str] = field(default_factory=dict)
    why: str = ""


def trace(said: Mapping[str, str], model: str | None, uri: str | None) -> Iterator[Link]:
    """What is behind an image.

    Args:
        said: what the image says of itself, see :func:`dim.provenance.read`.
        model: address of a model folder to compare with, or ``models:/…``.
        uri: of the MLflow store that knows the models; ``None``: there is none.

    Raises:
        DimError: there is no such model to compare with.
    """
    content = said.get("model_hash", "")
    if not _HASH.fullmatch(content):
        yield Link("model", "", why="the image names no hash of a model, by which it is found")
        return
    folders = []
    if model is not None:
        link = _compared(model, content, uri)
        yield link
        folders += [] if link.why else [link.where]
    for link in _registered(content, uri):
        yield link
        if not link.why and link.where not in folders:
            folders.append(link.where)
    if folders:
        yield from _stages(folders[0], uri)


def _compared(model: str, content: str, uri: str | None) -> Link:
    folder = located(model, uri)
    found = fingerprint(folder)
    if found == content:
        return Link("model", folder, {"hash": found})
    why = f"the image was painted by another model: it names {content[:12]}…, not {found[:12]}…"
    return Link("model", folder, {"hash": found}, why)


def _registered(content: str, uri: str | None) -> Iterator[Link]:
    """The versions of registered models that have a hash."""
    if uri is None:
        why = (
            "no MLflow store is known that could name the model: give --uri, or MLFLOW_TRACKING_URI"
        )
        yield Link("model", "", why=why)
        return
    try:
        _check_there(uri)
        versions = Registry(uri).with_content(content)
    except DimError as error:
        yield Link("model", "", why=str(error))
        return
    if not versions:
        yield Link("model", "", why="no registered model has the hash that the image names")
    for each in versions:
        yield _version(each, content)


def _version(version: Registered, content: str) -> Link:
    said = {"registered": version.uri, "run": version.run_id, "hash": content}
    if version.aliases:
        said["aliases"] = " ".join(f"@{alias}" for alias in version.aliases)
    try:
        now = fingerprint(version.address)
    except DimError as error:
        return Link("model", version.address, said, f"its folder cannot be read: {error}")
    same = now == content
    return Link("model", version.address, said, "" if same else "its folder holds another by now")


def _stages(folder: str, uri: str | None) -> Iterator[Link]:
    """The stage that trained a model, its run and data, and the same of the model it began with."""
    seen: set[str] = set()
    while folder not in seen:
        seen.add(folder)
        stage = _stage(folder)
        yield stage.link
        if stage.record is None or stage.config is None:
            return
        yield _run(stage.record, stage.config, stage.out, uri)
        for address in stage.config.uris:
            yield from _data(address)
        folder = stage.config.init
        if storage.open_file(folder)[1] != MODEL_FOLDER:
            return  # where the chain of stages begins: a configuration, or a model of others


@dataclass(frozen=True)
class _Stage:
    link: Link
    out: str = ""
    record: StageRecord | None = None
    config: StageConfig | None = None


def _stage(folder: str) -> _Stage:
    store, name = storage.open_file(folder)
    out = store.uri
    try:
        record = read_record(out) if name == MODEL_FOLDER else None
    except DimError as error:
        return _Stage(Link("stage", out, why=str(error)))
    if record is None:
        return _Stage(
            Link("stage", folder, why=f"no {STAGE_FILE} beside it: it was not trained there")
        )
    said = {"stage": str(record.identity.get("stage", "")), "run": record.run_id}
    said |= {"registered": record.registered} if record.registered else {}
    try:
        config = StageConfig.model_validate(record.config)
    except ValidationError:
        why = f"its {STAGE_FILE} is of another version of this program"
        return _Stage(Link("stage", out, said, why))
    said |= {"init": config.init, "data": ", ".join(config.uris)}
    return _Stage(Link("stage", out, said, _changed(config, record)), out, record, config)


def _changed(config: StageConfig, record: StageRecord) -> str:
    """What of that which a stage began with is not what it was; empty if all is."""
    try:
        if samples.fingerprint(config.uris) != record.identity.get("data"):
            return "its data hold something else by now"
        if fingerprint(config.init) != record.identity.get("init"):
            return "the model that it began with is another by now"
    except (DimError, OSError, ValueError, KeyError) as error:
        return f"what it began with cannot be read any more: {error}"
    return ""


def _run(record: StageRecord, config: StageConfig, out: str, uri: str | None) -> Link:
    where = f"run {record.run_id}"
    try:
        store = uri or config.tracking.uri or default_uri(out)
        _check_there(store)
        client = open_client(store)
        run = call(store, f"find {where}", lambda: client.get_run(record.run_id))
    except DimError as error:
        return Link("run", where, why=str(error))
    begun = datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M")
    said = {"name": run.info.run_name or "", "state": run.info.status.lower(), "begun": begun}
    said |= {name: f"{run.data.metrics[name]:.4g}" for name in _METRICS if name in run.data.metrics}
    return Link("run", where, {**said, "mlflow": store})


def _check_there(uri: str) -> None:
    """Refuse a database that is not there: MLflow would make it."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    if uri.startswith("sqlite:///") and not Path(name).is_file():
        raise InputError(f"there is no MLflow store at {uri}")


def _data(address: str) -> Iterator[Link]:
    """The output of a data job, and those that it was made of."""
    expected: str | None = None
    for _ in range(_MOST_LINKS):
        try:
            shards = Shards(*manifests.open_finished(address, "data"))
        except DimError as error:
            yield Link("data", address, why=str(error))
            return
        done = shards.manifest
        said = {"job": done.job, "records": done.counts.in_words()}
        said |= {key: str(done.config[key]) for key in ("designer", "model") if key in done.config}
        files = shards.identity["files"]
        changed = expected not in (None, files)
        source = done.input.get("uri") or done.input.get("file")
        said |= {"from": str(source)} if source else {}
        yield Link("data", address, said, "it holds other records by now" if changed else "")
        if not isinstance(done.input.get("uri"), str):
            return  # a file of others, or made by the program itself
        address, expected = done.input["uri"], done.input.get("files")


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        InputError: it cannot be read, or is no image by its size.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > _MOST_BYTES:
        raise InputError(f"{path} is over {_MOST_BYTES:,} bytes: it is no image of ours")
    return data


def shown(text: str) -> str:
    """``text`` for a terminal, which hostile characters do not move or colour."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)[
        :1000
    ]


def in_words(link: Link) -> str:
    """A link for people: a line, and one for each thing that is known of it."""
    lines = [f"{link.what:6} {shown(link.where)}".rstrip()]
    lines += [f"         {shown(name)}: {shown(value)}" for name, value in link.said.items()]
    lines += [f"       ! {shown(link.why)}"] if link.why else []
    return "\n".join(lines)


def main(
    image: Annotated[
        Path, typer.Argument(help="An image that `dim serve`, `edit` or `generate` painted.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder of a DIM, or models:/NAME@ALIAS: did it paint the image?"
        ),
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option(help="The MLflow store that knows it.", envvar="MLFLOW_TRACKING_URI"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Follow a painted image to its model, the training run and the data.

    The image's own word is no proof: whoever has the file can write it as he likes.
    """
    said = provenance.read(read_file(image))
    if said is None:
        raise InputError(
            f"{image} does not say how it was painted: nothing of this project wrote it, or "
            "another program has saved it anew since"
        )
    links = [Link("image", str(image), said), *trace(said, model, uri or None)]
    if as_json:
        typer.echo(json.dumps(redacted([asdict(link) for link in links]), indent=2))
    else:
        for link in links:
            typer.echo(in_words(Link(**redacted(asdict(link)))))
    if model is not None and links[1].why:
        raise InputError(f"{image}: {links[1].why}")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
