"""``GET /metrics``: what Ray's agents have counted of this application, for one scrape target.

Each node of a Ray cluster has an agent with the metrics of the node's processes. All of them are
asked and their answers put together, so that it does not matter which replica is reached.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

import aiohttp
import ray
from prometheus_client import CollectorRegistry, generate_latest
from ray import serve
from ray.serve.exceptions import RayServeException

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIMEOUT_S = 5.0
AT_ONCE = 8
"""Agents asked at a time: an answer is a megabyte or more, of which a part is kept."""

# The last ones say since when a process has counted.
_KEPT = re.compile(r"^(?:# (?:HELP|TYPE) )?ray_(?:dim|serve)_(?!\w*_created\b).*\n", re.MULTILINE)
_APPLICATION = re.compile(r'[{,]app(?:lication)?="([^"]+)"')
_NODES = """\
# HELP dim_metrics_nodes Nodes of the cluster, by whether their agent has answered.
# TYPE dim_metrics_nodes gauge
dim_metrics_nodes{{answered="yes"}} {yes}
dim_metrics_nodes{{answered="no"}} {no}
"""


class Scrape:
    """Answers ``/metrics``; whoever asks while it is being made gets the same answer.

    Args:
        own: what this process counts itself; shown where no agent answers.
    """

    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own
        self._asking: asyncio.Task[str] | None = None

    async def text(self) -> str:
        """The metrics of this application, and of the Serve that it runs in.

        In Prometheus' text format; the nodes that have no part in it are counted in it.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> str:
        addresses = await asyncio.to_thread(agents)
        few = asyncio.Semaphore(AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:

            async def one(address: str) -> str | None:
                async with few:
                    return await ask(session, address)

            answers = await asyncio.gather(*map(one, addresses))
        return await asyncio.to_thread(self._together, answers)

    def _together(self, answers: list[str | None]) -> str:
        known = [answer for answer in answers if answer is not None]
        counts = _NODES.format(yes=len(known), no=len(answers) - len(known))
        if known:
            return merged(known, application()) + counts
        return kept(generate_latest(self._own).decode()) + counts


def agents() -> list[str]:
    """Addresses of the agents of all nodes that are alive; of those that have one."""
    if not ray.is_initialized():
        return []
    return [
        f"http://{in_url(node['NodeManagerAddress'])}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]


def in_url(host: str) -> str:
    """An address as URLs have it."""
    return f"[{host}]" if ":" in host else host


async def ask(session: aiohttp.ClientSession, address: str) -> str | None:
    """Of what an agent knows, the lines that are shown; ``None``: it does not answer."""
    try:
        async with session.get(address) as response:
            response.raise_for_status()
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError, OSError, UnicodeDecodeError):
        return None
    return await asyncio.to_thread(kept, text)


def kept(text: str) -> str:
    """The lines of our metrics and of Serve's; an agent knows all of its node's."""
    return "".join(_KEPT.findall(text))


def merged(texts: Iterable[str], application: str | None) -> str:
    """Several agents' lines as one text, in which all of a metric stand together.

    Args:
        texts: of each agent what is ``kept``.
        application: whose metrics are shown, not those of others on the cluster.
    """
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines(keepends=True):
            if line.startswith("# "):
                _, kind, name, _ = line.split(" ", 3)
                heads.setdefault(name, {}).setdefault(kind, line)
            elif is_of(application, line):
                samples.setdefault(name, []).append(line)
    return "".join(
        "".join((*heads.get(name, {}).values(), *lines)) for name, lines in samples.items()
    )


def is_of(application: str | None, line: str) -> bool:
    """Whether a sample is of this application, or of the Serve that it shares with others."""
    found = _APPLICATION.search(line)
    if found is None:
        return line.startswith("ray_serve_") or application is None
    return application in (None, found[1])


def application() -> str | None:
    """The name of this application; ``None`` outside of Serve."""
    try:
        return serve.get_replica_context().app_name
    except RayServeException:
        return None
