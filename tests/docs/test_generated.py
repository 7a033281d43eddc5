"""The pages that are made of the code say all of it, and the page of troubles says what is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from dim.cli import COMMANDS, command_of, load
from dim.config import StrictModel
from docs.generate import commands, messages, settings
from tests.docs.fences import ROOT

MODELS = [model for model in settings.all_models() if settings.is_settings(model)]


@pytest.fixture(scope="module")
def settings_page() -> str:
    return settings.page()


@pytest.fixture(scope="module")
def messages_page() -> str:
    return messages.page()


def test_every_setting_is_there_with_default_and_meaning(settings_page: str) -> None:
    silent = []
    for model in MODELS:
        section = settings_page.partition(f"{{ #{settings.address(model).replace(':', '.')} }}")[2]
        rows = section.partition("\n## ")[0]
        for name in model.model_fields:
            row = re.search(rf"^\| `{name}` \| (.+?) \| (.+?) \| (.*) \|$", rows, re.MULTILINE)
            assert row is not None, f"{settings.address(model)}.{name} is not on the page"
            if not row[3]:
                silent.append(f"{settings.address(model)}.{name}")
    # Some names say it all; where many are silent, the page is a list of names.
    settings_in_all = sum(len(model.model_fields) for model in MODELS)
    assert len(silent) < 0.1 * settings_in_all, f"say beside them what they mean: {silent}"


def test_a_setting_is_shown_as_it_is_declared(settings_page: str) -> None:
    shown = settings_page.partition("{ #training.stage.StageConfig }")[2]
    assert "| `learning_rate` | number > 0 | required | after warm-up;" in shown
    assert '| `schedule` | `"constant"` \\| `"cosine"` | `"constant"` |' in shown
    assert (
        "| `validation` | [ValidationConfig](#training.stage.ValidationConfig) \\| null |" in shown
    )


def test_what_programs_write_down_is_still_there() -> None:
    known = {model.__name__ for model in settings.all_models()}
    assert known >= settings.NOT_SETTINGS
    assert known >= set(settings.PROGRAMS)


def test_a_setting_says_what_it_means_in_any_of_three_places() -> None:
    assert settings.description(Said, "below") == "Said below."
    assert settings.description(Said, "above") == "Said above. and beside"
    assert settings.description(Said, "named") == "said by name."
    assert settings.description(Said, "nothing") == ""


class Said(StrictModel):
    """A model. ``named``: said by name."""

    below: int
    """Said below."""
    # Said above.
    above: int = 0  # and beside
    named: int = 0
    nothing: int = 0


def test_every_command_is_there_with_its_options() -> None:
    page = commands.page()
    for name, (target, _) in COMMANDS.items():
        section = page.partition(f"## `dim {name}`\n")[2].partition("\n## ")[0]
        assert section.strip(), f"dim {name} is not on the page"
        for parameter in command_of(load(target), name=name).params:
            for option in parameter.opts:
                shown = option if option.startswith("-") else option.upper()
                assert f"`{shown}`" in section or parameter.hidden, f"dim {name} {option}"


def raised() -> Iterator[tuple[str, list[str]]]:
    """Where an error of a user's is raised with arguments, and the texts that these may be."""
    for path in messages._sources():
        for node in ast.walk(messages._tree(path)):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments)):
                    if name in messages.errors():
                        where = f"{path.relative_to(ROOT)}:{node.lineno}"
                        yield where, [t for a in arguments for t in messages.texts(a, path)]


def test_every_sentence_that_is_raised_is_on_the_page(messages_page: str) -> None:
    sites = list(raised())
    assert len(sites) > 400
    passed_on = [where for where, texts in sites if not texts]
    # Errors that pass on the sentence of another one, which is on the page where it is made.
    assert len(passed_on) < 0.05 * len(sites), passed_on
    for where, texts in sites:
        for text in texts:
            if messages.says(text):
                assert f"| {messages._cell(text)} |" in messages_page, f"{where}: {text}"


def test_the_message_of_a_constant_and_of_a_function_are_found(messages_page: str) -> None:
    assert "| the answer is JSON that is cut off or malformed | BlueprintError |" in messages_page
    assert "| the process that worked on its range ended … times" in messages_page
    assert "| not a tracking URI; use sqlite:///FILE" in messages_page


def test_a_message_that_goes_through_a_variable_is_found(messages_page: str) -> None:
    for said in (
        "| the server is busy; try again later | HTTP |",  # handed to the function that answers
        "| … of … samples cannot be used (…) |",  # the same in a method
        "| cannot … …: … | StorageError |",  # one word, and what it is about
        "| delete what is not needed, or set RAY\\_TMPDIR",  # set some lines before
        "| warning: not registered: … | what is said meanwhile |",
    ):
        assert said in messages_page, said


def test_the_page_of_troubles_has_the_words_of_the_program() -> None:
    known = [words(message.text) for message in messages.all_messages()]
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r'^\| "(.+?)" \|', page, re.MULTILINE)
    assert len(quoted) > 40
    for said in quoted:
        assert any(words(said) in text for text in known), f"no message says: {said}"


def words(text: str) -> str:
    """A message by its words alone."""
    return " ".join(re.findall(r"[\w/=:.-]*\w", text))
