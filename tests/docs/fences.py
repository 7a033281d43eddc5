"""The commands of README and docs, as they stand there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

NEEDS = {"gpu", "cloud", "minutes", "ray"}
"""What a block of commands may be marked with, in a comment on the line above it:
``<!-- needs: cloud -->``. ``minutes`` is also what goes on until it is stopped, ``ray`` what starts
a Ray of its own, or goes on from what such a command has made."""

_FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<info>[^\n]*)\n(?P<body>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)
_SHELLS = {"bash", "sh", "shell", "console"}
_PROGRAMS = {
    *("dim", "python", "pip", "pytest", "make", "ray", "kubectl", "helm", "docker", "aws"),
    *("export", "printf", "curl", "mkdir", "cp", "mlflow", "git", "pre-commit", "source"),
}
_INLINE = re.compile(r"(?<![`\w])`((?:dim|python -m|make) [^`]+)`(?!`)")


@dataclass(frozen=True)
class Command:
    """``words`` of one command, and the page and line that it stands on."""

    words: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A fence: ``body`` in the language of ``info``; what it ``needs``, and where it begins."""

    page: Path
    line: int
    info: str
    needs: frozenset[str]
    body: str

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands."""
        language = self.info.split(" ")[0]
        first = self.body.strip().split(maxsplit=1)[:1]
        return language in _SHELLS or (not language and first[0] in _PROGRAMS)

    @property
    def file(self) -> str | None:
        """The file that the page tells its reader to write this into, if it does."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None

    def commands(self) -> Iterator[Command]:
        """The commands, one by one, without comments."""
        text = re.sub(r"\\\n", " ", self.body)
        for line in text.splitlines():
            for part in re.split(r" (?:&&|\|) ", line):
                if words := shlex.split(part.removesuffix(" &"), comments=True):
                    yield Command(tuple(words), self.where)

    @property
    def where(self) -> str:
        """For messages."""
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name
        return f"{page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fences of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found["info"].strip(),
            frozenset(re.split(r",\s*", found["needs"])) if found["needs"] else frozenset(),
            found["body"],
        )
        for found in _FENCE.finditer(text)
    ]


def inline(page: Path) -> Iterator[Command]:
    """The commands that are mentioned in a page's sentences."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in _INLINE.finditer(text):
        yield Command(tuple(found[1].split()), str(page.relative_to(ROOT)))
