"""Credentials in addresses, taken out of whatever is written down or shown.

An address such as ``https://user:password@host/v1?api_key=…`` is needed whole to reach what it
names, and only there. Manifests, cards, experiment trackers, errors and logs get it from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# "user:password@" ends at the last "@" before the path. Who forgets to encode a password with "/"
# in it has a wrong URL and still a secret, unless what looks like one is a port; databases have no
# port there, and take such passwords.
_USER = re.compile(
    r"""://(?:
      [^\s/?#"<>]*@
    | [^\s/?#"<>@:\[]*:(?!\d*(?:[/?#\s"<>]|$))[^\s"<>@]{0,256}+@(?:[^\s/?#"<>@]*@)*
    | (?<!http://)(?<!https://)(?<!s3://)[^\s/?#"<>@:\[]*:[^\s"<>@]{0,256}+@(?:[^\s/?#"<>@]*@)*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
# The same in an address that is a value of another one's query.
_ENCODED_USER = re.compile(r"(?<=%3A%2F%2F)(?:(?!%2F|%3F|%23)[^\s/?#&\"<>])*%40", re.IGNORECASE)
_PARAMETER = re.compile(
    r"""(?P<before>[?&;\#](?P<name>[^\s?&;\#="<>]+)=)[^\s&\#"<>]+?(?=[)'\],.;:]*(?:[\s&\#"<>]|$))""",
    re.VERBOSE,
)
_SECRET = re.compile(
    "token|secret|passw|credential|signature"
    "|(?:key|keyid|auth|authorization|pwd|pass|sig|jwt|hmac|^code|^sas)$"
)


def redact(text: str) -> str:
    """``text`` without the credentials of the URLs in it.

    User and password, and the values of query parameters that are named like a secret (``api_key``,
    ``token``, ``X-Amz-Signature`` …), become ``***``. Everything else stays, so what holds none is
    returned as it is; so is what was redacted before.
    """
    text = _USER.sub(f"://{HIDDEN}@", text)
    text = _ENCODED_USER.sub(f"{HIDDEN}%40", text)
    return _PARAMETER.sub(_without_secret, text)


def redacted(value: Any) -> Any:
    """A nested configuration with every text in it redacted; mappings and lists are copied."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def _without_secret(found: re.Match[str]) -> str:
    name = re.sub(r"[-_.]", "", unquote(found["name"])).lower()
    return found["before"] + HIDDEN if _SECRET.search(name) else found[0]
