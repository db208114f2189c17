"""A bucket for tests: what `epath` reads and writes under gs:// lies in this process's memory."""

from typing import Any

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """fsspec's memory file system under the names of gcsfs."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("gs://"))

    def glob(self, path: str, **options: Any) -> list[str]:
        return [found.lstrip("/") for found in super().glob(path, **options)]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().info(path, **options)
        return {**found, "mtime": found["created"]} if "created" in found else found
