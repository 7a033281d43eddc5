"""Images that are answered by URL: they lie in an object store, which hands them out itself."""

from __future__ import annotations

import uuid

from infra.storage import open_store
from serving.config import ServingConfig
from serving.encoding import OutputFormat


class ImageStore:
    """Where images are put, and under which URLs they can be read."""

    def __init__(self, address: str, seconds: int) -> None:
        self._store = open_store(address)
        self._seconds = seconds

    def put(self, data: bytes, format: OutputFormat) -> str:
        """Write an encoded image; it takes time and belongs off the event loop.

        Returns:
            A URL at which anybody who knows it reads the image for the configured time.

        Raises:
            StorageError: the store refused; see ``infra.storage``.
        """
        name = f"images/{uuid.uuid4().hex}.{format}"
        self._store.write(name, data)
        return self._store.presign(name, self._seconds, f"image/{format}")


def open_image_store(config: ServingConfig) -> ImageStore | None:
    """The store that the server is configured with; ``None`` if it has none."""
    if config.object_store is None:
        return None
    return ImageStore(config.object_store, config.url_s)
