"""Objects of a Cloud Storage bucket, by its JSON API and nothing but the standard library.

The launcher and the hosts speak to each other through these objects. What makes that safe is `if_generation_match`: an
object is only written if it still has the generation that was read (0: if there is none), so that of two writers one
is told.
"""

import contextlib
import http.client
import json
import os
import random
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from spiral_jax.errors import SpiralError, Unreachable
from tpu.gcloud import execute

URL = r"gs://([a-z0-9][-a-z0-9_.]{1,220}[a-z0-9])((?:/[A-Za-z0-9_][-\w.]*)*)"
_AGAIN = {408, 429, 500, 502, 503, 504}
_SECONDS = 60.0  # that a connection may be silent


class Conflict(Exception):
    """The object does not have the generation that was asked for."""


class Object(NamedTuple):
    """One line of a listing: name below the bucket's prefix, bytes, generation."""

    name: str
    size: int
    generation: int


class Bucket:
    """The objects under gs://BUCKET[/PREFIX]; names are below the prefix.

    Every method tries again, for `patience` seconds, what fails for a moment.

    Attributes:
      url: without a slash at the end.
    """

    def __init__(self, url: str, patience: float = 120.0, on_host: bool = False):
        """Asks for nothing yet.

        Args:
          url: gs://BUCKET or gs://BUCKET/FOLDER.
          patience: seconds.
          on_host: whether this is a TPU's host, whose service account is taken; otherwise gcloud's account is, also on
            a machine of the cloud.

        Raises:
          SpiralError: the URL is not one.
        """
        match = re.fullmatch(f"{URL}/?", url, re.ASCII)
        if not match:
            raise SpiralError(f"--bucket is {url!r}; allowed: gs://BUCKET or gs://BUCKET/FOLDER")
        self.name, folder = match.groups()
        self.url = f"gs://{self.name}{folder}"
        self._prefix = f"{folder[1:]}/" if folder else ""
        self._patience, self._known = patience, False  # whether the bucket is there
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        self._token = None if emulator else _Token(on_host)
        address = emulator or "https://storage.googleapis.com"
        self._api = (address if "://" in address else f"http://{address}").rstrip("/")

    def get(self, name: str) -> tuple[bytes, int] | None:
        """Content and generation; None if there is no such object."""
        answer = self._call("GET", f"{self._object(name)}?alt=media")
        return answer and (answer.body, int(answer.headers["x-goog-generation"]))

    def read(self, name: str) -> dict | None:
        """An object that holds JSON."""
        found = self.get(name)
        return found and json.loads(found[0])

    def put(self, name: str, content: bytes | dict, if_generation_match: int | None = None) -> int:
        """Writes an object whole and returns its generation; a dict is written as JSON.

        Raises:
          Conflict: the object has another generation than `if_generation_match` (0: there is one).
        """
        content = json.dumps(content, indent=1).encode() if isinstance(content, dict) else content
        query = {"uploadType": "multipart"}
        if if_generation_match is not None:
            query["ifGenerationMatch"] = str(if_generation_match)
        path = f"/upload/storage/v1/b/{self.name}/o?{urllib.parse.urlencode(query)}"
        try:
            answer = self._call("POST", path, content, written=self._prefix + name)
        except _ConflictAtSecondTry:
            # The first try may have been the one that wrote it, its answer lost.
            found = self.get(name)
            if found and found[0] == content:
                return found[1]
            raise
        assert answer is not None
        return int(json.loads(answer.body)["generation"])

    def delete(self, name: str) -> None:
        """Deletes an object, or does nothing if there is none."""
        self._call("DELETE", self._object(name))

    def list(self, prefix: str = "") -> list[Object]:
        """Objects whose names begin with `prefix`, by name."""
        found: list[Object] = []
        query = {"prefix": self._prefix + prefix, "fields": "nextPageToken,items(name,size,generation)"}
        while True:
            answer = self._call("GET", f"/storage/v1/b/{self.name}/o?{urllib.parse.urlencode(query)}", bucket=True)
            assert answer is not None
            page = json.loads(answer.body)
            found += [
                Object(item["name"].removeprefix(self._prefix), int(item["size"]), int(item["generation"]))
                for item in page.get("items", [])
            ]
            if "nextPageToken" not in page:
                return sorted(found)
            query["pageToken"] = page["nextPageToken"]

    def location(self) -> str:
        """Where the bucket is, as `us-central1`, or `us` if it is in several regions."""
        answer = self._call("GET", f"/storage/v1/b/{self.name}", bucket=True)
        assert answer is not None
        return json.loads(answer.body)["location"].lower()

    def _object(self, name: str) -> str:
        return f"/storage/v1/b/{self.name}/o/{urllib.parse.quote(self._prefix + name, safe='')}"

    def _call(
        self, method: str, path: str, content: bytes | None = None, written: str = "", bucket: bool = False
    ) -> "_Answer | None":
        """An answer, or None if the object is not there; `bucket`: it is the bucket that is asked."""
        deadline, delay, tries, refreshed = time.monotonic() + self._patience, 0.5, 0, False
        while True:
            tries += 1
            try:
                return self._once(method, path, content, written)
            except urllib.error.HTTPError as error:
                said = ""
                with contextlib.suppress(OSError, http.client.HTTPException):  # it may break off, too
                    said = error.read(2000).decode(errors="replace")
                reason = f"{error.code} {error.reason}"
                if error.code == 404 and not bucket:
                    if not self._known:
                        self.list("a name that no object has")
                    return None
                if error.code == 412:
                    raise (Conflict if tries == 1 else _ConflictAtSecondTry)(path.partition("?")[0]) from None
                if error.code == 401 and self._token and not refreshed:
                    refreshed = True  # it has run out early
                    self._token.forget()
                    continue
                if error.code not in _AGAIN:
                    raise SpiralError(
                        f"--bucket is {self.url}; allowed: a bucket that is there and that the account of `gcloud auth "
                        f"list` (on a host, the service account) may read and write ({reason}: {_message(said)})"
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            wait = delay * random.uniform(0.5, 1.5)
            if time.monotonic() + wait > deadline:
                raise Unreachable(
                    f"--bucket is {self.url}; allowed: one that answers within {self._patience:g} seconds ({reason})"
                ) from None
            time.sleep(wait)
            delay = min(2 * delay, 30.0)

    def _once(self, method: str, path: str, content: bytes | None, written: str) -> "_Answer":
        request = urllib.request.Request(self._api + path, method=method)
        if content is not None:
            mark, kind = os.urandom(16).hex().encode(), b"\r\nContent-Type: application/"
            parts = (b"json\r\n\r\n" + json.dumps({"name": written}).encode(), b"octet-stream\r\n\r\n" + content)
            request.data = b"".join(b"--" + mark + kind + part + b"\r\n" for part in parts) + b"--" + mark + b"--\r\n"
            request.add_header("Content-Type", f"multipart/related; boundary={mark.decode()}")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token()}")
        # Half of the patience: one connection that hangs shall not take all of it.
        with urllib.request.urlopen(request, timeout=min(_SECONDS, self._patience / 2)) as response:
            answer = _Answer(response.read(), response.headers)
        self._known = True
        return answer


class _ConflictAtSecondTry(Conflict):
    pass


class _Answer(NamedTuple):
    body: bytes
    headers: http.client.HTTPMessage


class _Token:
    """An access token, asked for again before it runs out."""

    def __init__(self, on_host: bool):
        self._on_host, self._text, self._until = on_host, "", 0.0

    def __call__(self) -> str:
        if time.monotonic() > self._until:
            if self._on_host:
                answer = json.loads(metadata("service-accounts/default/token"))
                self._text, seconds = answer["access_token"], answer["expires_in"] - 60
            else:
                self._text, seconds = _token_of_gcloud(), 600  # it does not say how long; a refused one is asked anew
            self._until = time.monotonic() + seconds
        return self._text

    def forget(self) -> None:
        self._until = 0.0


def metadata(key: str) -> str:
    """What the metadata server says of this instance."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def _token_of_gcloud() -> str:
    try:
        status, out, reason = execute(["gcloud", "auth", "print-access-token", "--quiet"], timeout=120)
    except subprocess.TimeoutExpired as error:
        status, out, reason = 1, "", str(error)
    if status or not out.strip():
        reason = " ".join(reason.split())[:200]
        raise SpiralError(f"credentials of gcloud is missing; allowed: an account (`gcloud auth login`; {reason})")
    return out.strip()


def _message(said: str) -> str:
    """The message in an error of the API."""
    try:
        return " ".join(json.loads(said)["error"]["message"].split())[:200]
    except (ValueError, KeyError, TypeError):
        return " ".join(said.split())[:200]
