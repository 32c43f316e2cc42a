"""An HTTP server for range requests that is slow and fails on purpose: what remote reading is tested and timed with.

python tests/range_server.py FOLDER --latency_ms=50 --error_rate=0.02

prints its URL, serves until its standard input ends (Ctrl-D), and prints how many requests of which kind there were.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_PHRASES = {200: "OK", 206: "Partial Content", 403: "Forbidden", 404: "Not Found", 416: "Range Not Satisfiable"}
_FAULTS = {"500": 25, "503": 25, "reset": 25, "truncated": 24, "hang": 1}
_HANG_SECONDS = 3600


class Request(NamedTuple):
    """One request, as faults and tests see it; start and stop are None where no range was asked for."""

    method: str
    path: str
    start: int | None
    stop: int | None


def random_faults(rate: float, seed: int) -> Callable[[Request], str]:
    """Faults for a share of all requests: mostly errors and broken connections, now and then one that hangs."""
    generator = random.Random(seed)

    def fault(request: Request) -> str:
        if generator.random() >= rate:
            return ""
        return generator.choices([*_FAULTS], [*_FAULTS.values()])[0]

    return fault


class RangeServer:
    """Serves a folder on the loopback interface, from a thread.

    Attributes:
      fault: says of each request what goes wrong: a status ("500"), "reset", "truncated", "hang", "html" (a page with
        status 200), "whole" (the range is ignored), "shifted" (another range), "changed" (another ETag); "" is nothing.
      most_at_once: how many requests were in flight at the same time.
      log: the requests so far, with what went wrong.
      url: where the folder is.
    """

    def __init__(self, folder: str | os.PathLike, latency_seconds: float = 0.0,
                 fault: Callable[[Request], str] = lambda request: ""):  # fmt: skip
        self.fault = fault
        self.log: list[tuple[Request, str]] = []
        self.url = ""
        self._folder = Path(folder)
        self.etag_header = "ETag"  # under another name nobody knows it
        self._latency_seconds = latency_seconds
        self._at_once = self.most_at_once = 0

    def __enter__(self) -> "RangeServer":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def start(self, port: int = 0) -> None:
        """Starts to serve, on a free port unless one is given."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task] = set()
        # Many clients may connect at once.
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", port, backlog=1024))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops to serve; clients find their connections closed."""

        async def close() -> None:
            self._server.close()
            for task in [*self._tasks]:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def stats(self) -> dict[str, int]:
        """Number of requests by method and by what went wrong with them."""
        log = self.log[:]
        methods, faults = Counter(request.method for request, _ in log), Counter(fault for _, fault in log if fault)
        return {**methods, **{f"fault {name}": count for name, count in sorted(faults.items())}}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            while await self._answer((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"), writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client is done, or we are
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection goes on."""
        method, path, _ = head.split(" ", 2)
        asked = re.search(r"\r\nRange: *bytes=(\d+)-(\d+)", head, re.IGNORECASE)
        request = Request(method, path, *((int(asked[1]), int(asked[2]) + 1) if asked else (None, None)))
        fault = self.fault(request)
        self.log.append((request, fault))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self._latency_seconds)
        finally:
            self._at_once -= 1
        if fault == "hang":
            await asyncio.sleep(_HANG_SECONDS)
        if fault == "reset":
            return False
        if fault.isdigit():
            await _send(writer, int(fault), {}, b"" if method == "HEAD" else b"no, this time")
            return True
        if fault == "html":
            page = b"<html>the network needs you to log in</html>"
            await _send(writer, 200, {"Content-Type": "text/html"}, page, with_body=method != "HEAD")
            return True
        return await self._send_file(request, fault, writer)

    async def _send_file(self, request: Request, fault: str, writer: asyncio.StreamWriter) -> bool:
        path = self._folder / request.path.lstrip("/")
        if not path.is_file():
            await _send(writer, 404, {}, b"")
            return True
        info = path.stat()
        headers = {self.etag_header: f'"{info.st_mtime_ns:x}-{info.st_size:x}{fault * (fault == "changed")}"'}
        start, stop, status = 0, info.st_size, 200
        if request.start is not None and fault != "whole":
            start, stop, status = request.start, min(request.stop, info.st_size), 206
            if start >= stop:
                await _send(writer, 416, {}, b"")
                return True
            if fault == "shifted":
                start, stop = start - 1, stop - 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{info.st_size}"
        if request.method == "HEAD":
            await _send(writer, status, headers, b"", length=stop - start)
            return True
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), stop - start, start)
        if fault == "truncated":
            await _send(writer, status, headers, content[: len(content) // 2], length=len(content))
            return False
        await _send(writer, status, headers, content)
        return True


async def _send(writer: asyncio.StreamWriter, status: int, headers: dict[str, str], content: bytes,
                length: int | None = None, with_body: bool = True) -> None:  # fmt: skip
    headers = {"Content-Length": len(content) if length is None else length, **headers}
    lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Error')}", *(f"{key}: {headers[key]}" for key in headers)]
    writer.write("\r\n".join([*lines, "\r\n"]).encode() + (content if with_body else b""))
    await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--latency_ms", type=float, default=0.0)
    parser.add_argument("--error_rate", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not os.path.isdir(given.folder):
        parser.error(f"the folder is {given.folder!r}; allowed: one that is there")
    with RangeServer(given.folder, given.latency_ms / 1000, random_faults(given.error_rate, given.seed)) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps(server.stats()))


if __name__ == "__main__":
    main()
