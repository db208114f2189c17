"""A bucket for tests: what `epath` reads and writes under gs:// lies in this process's memory.

TensorStore, which does not go through `epath`, reaches the same objects over HTTP, where they are `served`.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
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


@contextlib.contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As much of the JSON API of Google Cloud Storage as TensorStore asks for; gives the requests so far.

    Objects of `Bucket.store`: read whole or in part, written, deleted and listed, on conditions of their generation
    (https://cloud.google.com/storage/docs/json_api/v1/objects).
    """
    requests: list[str] = []
    generations: dict[str, int] = {}

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
            requests.append(f"{self.command} {self.path} {status}")
            self.send_response(status)
            for name, value in {**headers, "content_length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def asked(self) -> tuple[str, str, dict[str, str]]:
            """Bucket, object and options."""
            url = urlsplit(self.path)
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            options = dict(parse_qsl(url.query, keep_blank_values=True))
            return f"/{bucket}/", unquote(name.removeprefix("/")) or options.get("name", ""), options

        def generation(self, path: str) -> int:
            return generations.get(path, 1) if path in Bucket.store else 0

        def refused(self, path: str, options: dict[str, str]) -> bool:
            wanted = options.get("ifGenerationMatch")
            return wanted is not None and int(wanted) != self.generation(path)

        def do_GET(self) -> None:
            bucket, name, options = self.asked()
            if not name:
                start, end = bucket + options.get("startOffset", ""), bucket + options.get("endOffset", "\uffff")
                found = sorted(path for path in Bucket.store if path.startswith(bucket) and start <= path < end)
                items = [{"name": path.removeprefix(bucket), "size": str(Bucket.store[path].size)} for path in found]
                return self.answer(200, json.dumps({"items": items}).encode())
            if bucket + name not in Bucket.store:
                return self.answer(404)
            generation = self.generation(bucket + name)
            if options.get("ifGenerationNotMatch") == str(generation):
                return self.answer(304)
            data = Bucket.store[bucket + name].getvalue()
            start, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            whole = "Range" not in self.headers
            part = data[int(start) : int(end or len(data)) + 1] if start else data[-int(end) :]
            first = int(start) if start else len(data) - len(part)
            place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            headers = {} if whole else {"content_range": place}
            return self.answer(200 if whole else 206, part, x_goog_generation=generation, **headers)

        def do_POST(self) -> None:
            bucket, name, options = self.asked()
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.refused(bucket + name, options):
                return self.answer(412)
            generation = self.generation(bucket + name) + 1
            Bucket().pipe_file(bucket + name, data)
            generations[bucket + name] = generation
            return self.answer(200, json.dumps({"name": name, "generation": str(generation)}).encode())

        def do_DELETE(self) -> None:
            bucket, name, options = self.asked()
            if self.refused(bucket + name, options):
                return self.answer(412)
            return self.answer(204 if Bucket.store.pop(bucket + name, None) else 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    patch.setenv("no_proxy", "127.0.0.1")
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()
