"""Pages and cards: text from a template, by one set of rules for all of them."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(package: str, template: str, /, **values: Any) -> str:
    """A template of a package's ``templates/`` filled in; in HTML every value is escaped.

    Args:
        package: whose templates, such as ``workflows``.
        template: its file name, ``NAME.html.j2`` or ``NAME.md.j2``.
        values: by the names that the template has for them; a name without a value is an error.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    return environment.get_template(template).render(values)
