"""The page at ``/``: which files a browser is given, and what they may do there.

``index.html`` at ``/``, and what it loads from ``static/`` at ``/page/``. There is no build step,
and nothing comes from another host: the policy below has the browser refuse it.
"""

# Annotations stay real objects: see serving/app.py.

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept, and asked for anew with the ETag: a server that was upgraded is seen at once.
    "Cache-Control": "no-cache",
}


class Files(StaticFiles):
    """Files of this package, ``folder`` below it, with the headers above."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        super().__init__(packages=[("serving.page", folder)])

    def __reduce__(self) -> tuple[type["Files"], tuple[str]]:
        # Serve ships the routes by value; the files are where this package lies on that node.
        return Files, (self._folder,)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


_index = Files(".")


async def index(request: Request) -> Response:
    """The page itself."""
    return await _index.get_response("index.html", request.scope)


routes: list[BaseRoute] = [Route("/", index), Mount("/page", app=Files("static"))]
