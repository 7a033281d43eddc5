"""Who writes blueprints and captions: any of these can stand in for any other.

==================  ===========================================================================
``openai:MODEL@URL``  a vision-language model over HTTP (``openai:MODEL`` alone: OpenAI's own)
``replay:PATH``       recorded answers from a JSONL file
``oracle``            exact answers for images of the tabletop world
``noisy:SHARE``       the oracle, wrong in such a share of its plans: for experiments
``vllm:MODEL``        a vision-language model on this cluster's GPUs; in data jobs only
``self``              the shipped tiny model's own understanding; ``self:FOLDER`` a saved model's
==================  ===========================================================================
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dim.designers.base import (
    CallOptions,
    Captioner,
    Designer,
    DesignRequest,
    OnAnswer,
    Question,
    Reply,
)
from dim.errors import DesignerError

if TYPE_CHECKING:
    from dim.designers.calls.gate import Exchange

__all__ = [
    "CallOptions",
    "Captioner",
    "DesignRequest",
    "Designer",
    "OnAnswer",
    "Question",
    "Reply",
    "calls_a_server",
    "check",
    "create",
    "create_captioner",
    "engine_model",
    "from_anywhere",
]

DESIGNERS = (
    *("openai:MODEL@URL", "replay:PATH", "oracle", "noisy:SHARE"),
    *("self", "self:MODEL_FOLDER", "vllm:MODEL"),
)
CAPTIONERS = ("openai:MODEL@URL", "replay:PATH", "oracle", "vllm:MODEL")

_MODEL_AT_URL = re.compile(r"(?P<model>\S+?)(?:@(?P<url>https?://\S+))?")


def from_anywhere(spec: str) -> str:
    """The same designer for processes that work in another folder: a path from the root on."""
    kind, _, path = spec.strip().partition(":")
    return f"replay:{Path(path).absolute()}" if kind == "replay" and path else spec


def create(
    spec: str, *, calls: CallOptions | None = None, exchange: Exchange | None = None
) -> Designer:
    """The designer that ``spec`` names.

    Args:
        spec: one of the forms above.
        calls: how an HTTP designer calls; the others have no use for it.
        exchange: the meter of all who call the same server, where it is not this process alone.

    Raises:
        DesignerError: the spec is unknown or incomplete, or what it names does not exist.
    """
    kind, argument = _split(spec, DESIGNERS, "designer")
    if kind == "openai":
        from dim.designers.openai import OpenAIModel

        return OpenAIModel(*_model_and_url(argument, spec), calls, exchange)
    if kind == "replay":
        from dim.designers.replay import ReplayDesigner

        return ReplayDesigner(argument)
    if kind == "vllm":
        raise _only_in_jobs(argument)
    if kind == "oracle":
        from dim.designers.tabletop import TabletopOracle

        return TabletopOracle()
    if kind == "noisy":
        from dim.designers.tabletop import NoisyOracle

        return NoisyOracle(_share(argument, spec))
    return _create_self(argument)


def create_captioner(
    spec: str, *, calls: CallOptions | None = None, exchange: Exchange | None = None
) -> Captioner:
    """The captioner that ``spec`` names; arguments and errors as of :func:`create`."""
    kind, argument = _split(spec, CAPTIONERS, "captioner")
    if kind == "openai":
        from dim.designers.openai import OpenAIModel

        return OpenAIModel(*_model_and_url(argument, spec), calls, exchange)
    if kind == "replay":
        from dim.designers.replay import ReplayCaptioner

        return ReplayCaptioner(argument)
    if kind == "vllm":
        raise _only_in_jobs(argument)
    from dim.designers.tabletop import TabletopCaptioner

    return TabletopCaptioner()


def calls_a_server(spec: str) -> bool:
    """Whether a designer or captioner is a model over HTTP, whose answers cost money and time."""
    return spec.strip().partition(":")[0] == "openai"


def can_review(spec: str) -> bool:
    """Whether a designer can look at what was painted, see :class:`dim.design.Reviews`."""
    return spec.strip().partition(":")[0] in ("openai", "oracle")


def engine_model(spec: str) -> str | None:
    """The model that a data job is to run itself, in vLLM; ``None`` where it is another kind."""
    kind, _, model = spec.strip().partition(":")
    return model if kind == "vllm" else None


def check(spec: str, *, captioner: bool = False) -> None:
    """Fail now rather than on every record: the spec is well formed and its file is there.

    Raises:
        DesignerError: see :func:`create`.
    """
    known, role = (CAPTIONERS, "captioner") if captioner else (DESIGNERS, "designer")
    kind, argument = _split(spec, known, role)
    if kind == "openai":
        _model_and_url(argument, spec)
    elif kind == "replay" and not Path(argument).is_file():
        raise DesignerError(f"recorded answers not found: {argument}")
    elif kind == "noisy":
        _share(argument, spec)
    elif kind == "self" and argument and not Path(argument).is_dir():
        raise DesignerError(f"model folder not found: {argument}")


def _only_in_jobs(model: str) -> DesignerError:
    return DesignerError(
        f"vllm:{model} answers whole data sets, in data jobs; for single requests run "
        f"'vllm serve {model}' and write openai:{model}@http://host:8000/v1"
    )


def _split(spec: str, known: tuple[str, ...], role: str) -> tuple[str, str]:
    kind, colon, argument = spec.strip().partition(":")
    forms = [form.partition(":") for form in known if form.partition(":")[0] == kind]
    if not forms:
        raise DesignerError(f"unknown {role} {spec!r}; there are {', '.join(known)}")
    if not any(bool(form[2]) == bool(argument) for form in forms) or (colon and not argument):
        wanted = " or ".join("".join(form) for form in forms)
        raise DesignerError(f"incomplete {role} {spec!r}; write {wanted}")
    return kind, argument


def _model_and_url(argument: str, spec: str) -> tuple[str, str | None]:
    found = _MODEL_AT_URL.fullmatch(argument)
    if found is None or "://" in found["model"] or (not found["url"] and "@" in found["model"]):
        raise DesignerError(f"{spec!r} is not of the form openai:MODEL@http://host:port/v1")
    return found["model"], found["url"]


def _share(argument: str, spec: str) -> float:
    try:
        share = float(argument)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise DesignerError(f"{spec!r} is not of the form noisy:SHARE, with a share from 0 to 1")
    return share


def _create_self(folder: str) -> Designer:
    # Imported here: torch takes seconds, and the other designers have no use for it.
    from dim.designers.self_play import SelfDesigner, shipped
    from dim.model import load

    if not folder:
        return SelfDesigner(shipped())
    return SelfDesigner(load(folder), name=f"self:{Path(folder).name}")
