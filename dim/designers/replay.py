"""Recorded answers, played back: for tests, for published blueprints, for paid work done before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dim.blueprint import Blueprint
from dim.designers.base import DesignRequest, OnAnswer, Reply, answer_each
from dim.errors import BlueprintError, DesignerError, InputError
from dim.images import decode_image
from dim.reading import REASONING_FIELDS, as_reasoning
from dim.records import clean_text, sha256_hex


class ReplayDesigner:
    """Answers from a JSONL file.

    A line has ``blueprint`` (or ``prompt``, as in the public ``tos_dataset_edit.jsonl``), a text or
    the object that was asked for; where it is empty, an answer in ``reasoning_content`` counts as
    one that a server put there. It may have ``instruction`` (else it is section 1 of the blueprint)
    and the image it was written for: ``image_hash`` (SHA-256 of the file), or ``image_path`` or
    ``image`` beside the JSONL file. A line with an image answers for that image and instruction
    only (the same file or, where the file is there, the same pixels), one without for its
    instruction on any image. Lines that contradict each other answer nothing.

    Raises:
        DesignerError: the file is missing or a line is not of this form.
    """

    costly = False

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = self.fingerprint = f"replay:{path.name}"
        self._answers: dict[tuple[str | None, str], set[str]] = {}
        self._pictures = _Pictures()
        for where, line in _lines(path):
            answer = _text(line, where, "blueprint", "prompt")
            key = (_image_hash(line, path, self._pictures), _instruction(line, answer, where))
            self._answers.setdefault(key, set()).add(answer)

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`."""
        return answer_each(requests, self._find, on_answer)

    def _find(self, request: DesignRequest) -> str:
        instruction = normalise(request.instruction)
        keys: list[str | None] = [*self._pictures.same_as(request.image), None]
        found = next((a for key in keys if (a := self._answers.get((key, instruction)))), None)
        if found is None:
            raise DesignerError(f"{self.name} has no answer for this image and instruction")
        if len(found) > 1:
            raise DesignerError(
                f"{self.name} has {len(found)} different answers for this instruction and does "
                "not say for which image each is"
            )
        return next(iter(found))


class ReplayCaptioner:
    """Captions from a JSONL file with ``caption`` (or ``prompt``) and the image, as above.

    Raises:
        DesignerError: the file is missing, or a line is not of this form or has no image.
    """

    costly = False

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.name = self.fingerprint = f"replay:{path.name}"
        self._captions: dict[str, str] = {}
        self._pictures = _Pictures()
        for where, line in _lines(path):
            image_hash = _image_hash(line, path, self._pictures)
            if image_hash is None:
                raise DesignerError(f"{where} names no image that exists")
            self._captions.setdefault(image_hash, _text(line, where, "caption", "prompt"))

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """See :meth:`dim.designers.Captioner.caption`."""
        requests = [DesignRequest("", image) for image in images]
        return answer_each(requests, self._find, on_answer)

    def _find(self, request: DesignRequest) -> str:
        for image_hash in self._pictures.same_as(request.image):
            if image_hash in self._captions:
                return self._captions[image_hash]
        raise DesignerError(f"{self.name} has no caption for this image")


class _Pictures:
    """The recorded image files, found again when they come with other bytes and the same pixels."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}
        self._by_pixels: dict[str, str] | None = None

    def add(self, file: Path) -> str:
        """Remember a file; returns its hash."""
        image_hash = sha256_hex(file.read_bytes())
        self._files[image_hash] = file
        return image_hash

    def same_as(self, image: bytes) -> Iterator[str]:
        """Hashes that ``image`` may be recorded under: its own, then that of its pixels' file."""
        yield sha256_hex(image)
        if self._files:
            if self._by_pixels is None:  # costs a decoding of every file, and is seldom needed
                read = ((_pixel_hash(f.read_bytes()), known) for known, f in self._files.items())
                self._by_pixels = {pixels: known for pixels, known in read if pixels}
            if same := self._by_pixels.get(_pixel_hash(image) or ""):
                yield same


def _pixel_hash(image: bytes) -> str | None:
    try:
        decoded = decode_image(image)
    except InputError:
        return None
    return sha256_hex(repr(decoded.size).encode() + decoded.tobytes())


def normalise(instruction: str) -> str:
    """An instruction as it is looked up: white space and letter case make no difference."""
    return " ".join(instruction.split()).casefold()


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield f"{path}, line {number},", _parse(text, f"{path}, line {number},")
    except FileNotFoundError:
        raise DesignerError(f"recorded answers not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DesignerError(f"cannot read recorded answers {path}: {error}") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise DesignerError(f"{where} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise DesignerError(f"{where} is not a JSON object")
    return line


def _text(line: dict[str, Any], where: str, *names: str) -> str:
    for name in names:
        value = line.get(name)
        if value and isinstance(value, dict | list):
            return clean_text(json.dumps(value))
        if isinstance(value, str) and value.strip():
            return clean_text(value)
    for name in REASONING_FIELDS:
        if isinstance(thoughts := line.get(name), str) and thoughts.strip():
            return clean_text(as_reasoning(thoughts))
    raise DesignerError(f"{where} has no text under {' or '.join(map(repr, names))}")


def _instruction(line: dict[str, Any], answer: str, where: str) -> str:
    given = line.get("instruction")
    if isinstance(given, str) and given.strip():
        return normalise(clean_text(given))
    try:
        return normalise(Blueprint.parse(answer).instruction)
    except BlueprintError as error:
        raise DesignerError(f"{where} has no instruction, and its blueprint: {error}") from None


def _image_hash(line: dict[str, Any], path: Path, pictures: _Pictures) -> str | None:
    recorded = line.get("image_hash")
    if isinstance(recorded, str) and recorded:
        return recorded.lower()
    for name in ("image_path", "image"):
        value = line.get(name)
        if isinstance(value, str) and value and (path.parent / value).is_file():
            return pictures.add(path.parent / value)
    return None
