"""Storage for the tests: a bucket in memory that fails when told to, and a web server."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """`bucket://NAME/...`: objects in memory, as an object store keeps them."""

    protocol = "bucket"
    objects: ClassVar[dict[str, bytes]] = {}
    errors: ClassVar[list[Exception | None]] = []  # of the next requests, one each; None: it works
    down: ClassVar[Exception | None] = None  # of every request
    requests: ClassVar[list[tuple[str, str]]] = []

    @classmethod
    def empty(cls) -> None:
        cls.objects.clear()
        cls.errors.clear()
        cls.requests.clear()
        cls.down = None

    def _request(self, kind: str, path: str) -> None:
        self.requests.append((kind, path))
        error = self.down or (self.errors.pop(0) if self.errors else None)
        if error is not None:
            raise error

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self._request("info", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self._details(path)

    def _details(self, path: str) -> dict[str, Any]:
        content = self.objects[path]
        return {"name": path, "size": len(content), "type": "file", "ETag": hash(content)}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        folder = self._strip_protocol(path).rstrip("/") + "/"
        self._request("ls", folder)
        found = [name for name in self.objects if name.rpartition("/")[0] + "/" == folder]
        below = [name[len(folder) :] for name in self.objects if name.startswith(folder)]
        folders = {folder + name.partition("/")[0] for name in below if "/" in name}
        details = [self._details(name) for name in found]
        details += [{"name": name, "size": 0, "type": "directory"} for name in sorted(folders)]
        return details if detail else [item["name"] for item in details]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        path = self._strip_protocol(path)
        self._request("read", path)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        path = self._strip_protocol(path)
        self._request("write", path)
        self.objects[path] = value


fsspec.register_implementation("bucket", Bucket, clobber=True)


class _Handler(BaseHTTPRequestHandler):
    def __init__(
        self,
        *args: Any,
        files: dict[str, bytes],
        ranges: bool,
        delay: float,
        failures: list[int],
    ) -> None:
        self.files, self.ranges, self.delay, self.failures = files, ranges, delay, failures
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.delay)
        failure = self.failures.pop(0) if self.failures else 200
        if failure != 200:
            if failure:
                self.send_error(failure)
            self.close_connection = True  # 0: without an answer
            return
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "").removeprefix("bytes=") if self.ranges else ""
        if wanted:
            first, _, last = wanted.partition("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            with suppress(ConnectionError):  # the client gave up
                self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def web_server(
    files: dict[str, bytes],
    ranges: bool = True,
    delay: float = 0.0,
    failures: Sequence[int] = (),
) -> Iterator[str]:
    """Serve `files` (by path, with the leading slash); yields the URL of the root.

    failures: statuses of the first requests, 0 for a connection that is dropped.
    """
    handler = partial(_Handler, files=files, ranges=ranges, delay=delay, failures=list(failures))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
