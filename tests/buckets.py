"""Buckets for tests.

`Bucket`: what `epath` reads and writes under gs:// lies in this process's memory. `Service`: a server of this process,
which gcsfs and TensorStore of all processes that inherit its environment take for Google's.
"""

import contextlib
import itertools
import json
import random
import re
import sys
import threading
import time
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


class Service:
    """As much of the JSON API of Google Cloud Storage as gcsfs and TensorStore ask for; there are no directories.

    Objects are read whole or in part, written whole or in parts, moved, deleted and listed, on conditions of their
    generation (https://cloud.google.com/storage/docs/json_api/v1/objects).
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        """By `bucket/name`."""
        self.requests: list[str] = []
        """Method, path and status of each request so far."""
        self.generations: dict[str, int] = {}
        self.numbers = itertools.count(1)
        self.uploads: dict[int, bytes] = {}
        """What there is so far of those in parts."""
        self.lock = threading.Lock()
        self.delay = 0.0
        """Seconds that an answer to a GET takes at most."""

    def put(self, path: str, data: bytes) -> None:
        """Writes an object."""
        self.objects[path] = data
        self.generations[path] = next(self.numbers)

    def under(self, prefix: str) -> list[str]:
        """Paths of objects, sorted."""
        return sorted(path for path in self.objects if path.startswith(prefix))

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        """Serves on loopback while the block runs; gives the address."""
        server = _Server(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def described(self, path: str) -> dict[str, str]:
        bucket, _, name = path.partition("/")
        generation, time = str(self.generations[path]), "2026-01-01T00:00:00.000Z"
        size = str(len(self.objects[path]))
        return {"bucket": bucket, "name": name, "size": size, "generation": generation, "updated": time}

    def listed(self, bucket: str, options: dict[str, str]) -> dict[str, Any]:
        """Objects, and what the names of those that have the delimiter begin with."""
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter", "")
        start, end = options.get("startOffset", ""), options.get("endOffset") or "\uffff"
        items, prefixes = [], set()
        for path in self.under(f"{bucket}/{prefix}"):
            name = path.removeprefix(f"{bucket}/")
            first, found, _ = name.removeprefix(prefix).partition(delimiter) if delimiter else (name, "", "")
            if not start <= name < end:
                continue
            if found:
                prefixes.add(f"{prefix}{first}{delimiter}")
            else:
                items.append(self.described(path))
        return {"items": items, "prefixes": sorted(prefixes)}


@contextlib.contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[Service]:
    """An empty service, which this process and those that it starts find in place of Google's."""
    service = Service()
    with service.serve() as address:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google, over gRPC, what bucket it is
        patch.setenv("no_proxy", "127.0.0.1")
        yield service


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked was killed, or needs no answer any more
            super().handle_error(request, client_address)


def _parts(kind: str, body: bytes) -> tuple[str, bytes]:
    """Name and content of an upload that describes itself; Google's own client ends lines in another way than gcsfs."""
    boundary = b"--" + kind.partition("boundary=")[2].strip("\"'").encode()
    _, description, content, _ = re.split(rb"\r?\n?" + re.escape(boundary), body)
    description, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (description, content))
    return json.loads(description)["name"], content


def _handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
            service.requests.append(f"{self.command} {self.path} {status}")
            self.send_response(status)
            for name, value in {**headers, "content_length": len(body)}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), content_type="application/json")

        def asked(self) -> tuple[str, str, dict[str, str]]:
            """Bucket, object and options."""
            url = urlsplit(self.path)
            bucket, _, name = url.path.partition("/b/")[2].partition("/o")
            return bucket, unquote(name.removeprefix("/")), dict(parse_qsl(url.query, keep_blank_values=True))

        def refused(self, path: str, options: dict[str, str]) -> bool:
            wanted = options.get("ifGenerationMatch")
            return wanted is not None and int(wanted) != service.generations.get(path, 0)

        def do_GET(self) -> None:
            bucket, name, options = self.asked()
            path = f"{bucket}/{name}"
            time.sleep(random.uniform(0, service.delay))
            with service.lock:
                if not name:
                    whole = urlsplit(self.path).path.endswith("/o")
                    return self.answer_json(service.listed(bucket, options) if whole else {"name": bucket})
                if path not in service.objects:
                    return self.answer(404, b"No such object")
                data, generation = service.objects[path], service.generations[path]
                if options.get("alt") != "media":
                    return self.answer_json(service.described(path))
            if options.get("ifGenerationNotMatch") == str(generation):
                return self.answer(304)
            wanted = self.headers.get("Range")
            if wanted is None:
                return self.answer(200, data, x_goog_generation=generation)
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first = int(start) if start else max(0, len(data) - int(end))
            part = data[first : int(end) + 1 if start and end else None]
            if not part:
                return self.answer(416, b"not satisfiable")
            place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            return self.answer(206, part, x_goog_generation=generation, content_range=place)

        def do_POST(self) -> None:
            bucket, name, options = self.asked()
            length = int(self.headers.get("Content-Length", 0))
            data = self.rfile.read(length)
            if len(data) < length:  # who wrote it was killed
                return None
            source, moved, target = urlsplit(self.path).path.partition("/moveTo/o/")
            if moved:
                name = unquote(target)
                with service.lock:
                    found = service.objects.pop(f"{bucket}/{unquote(source.partition('/o/')[2])}", None)
                if found is None:
                    return self.answer(404, b"No such object")
                data = found
            elif options["uploadType"] == "multipart":
                name, data = _parts(self.headers["Content-Type"], data)
            elif options["uploadType"] == "media":
                name = options["name"]
            elif "upload_id" not in options:  # the first of a resumable one
                address, number = f"http://{self.headers['Host']}{self.path}", next(service.numbers)
                service.uploads[number] = b""
                return self.answer(200, location=f"{address}&upload_id={number}")
            else:
                name, number = options["name"], int(options["upload_id"])
                data = service.uploads[number] = service.uploads[number] + data
                if self.headers["Content-Range"].endswith("/*"):
                    return self.answer(308, range=f"bytes=0-{len(data) - 1}")
                del service.uploads[number]
            path = f"{bucket}/{name}"
            with service.lock:
                if self.refused(path, options):
                    return self.answer(412)
                service.put(path, data)
                return self.answer_json(service.described(path))

        def do_DELETE(self) -> None:
            bucket, name, options = self.asked()
            path = f"{bucket}/{name}"
            with service.lock:
                if self.refused(path, options):
                    return self.answer(412)
                service.generations.pop(path, None)
                known = service.objects.pop(path, None) is not None
            return self.answer(204) if known else self.answer(404, b"No such object")

    return Answers
