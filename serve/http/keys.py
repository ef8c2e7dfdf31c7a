"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.http.problems import Problem

_log = logging.getLogger("fanin.serve")
_ENVIRONMENT = "FANIN_API_KEYS"
_FIT_FOR_HEADER = re.compile(r"[!-~]+")


class KeysError(Exception):
    """The keys cannot be had; the message says where and why, and quotes none."""


class ApiKeys:
    """Keys from a file, one in a line (# begins a comment), and from FANIN_API_KEYS, separated by spaces or commas.

    Only their digests are kept. Without file and variable no key is asked for. KeysError for a file that cannot be read or
    has no key, and for a key that no header can hold.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.reload()

    def reload(self) -> None:
        """Reads the file again. After KeysError the keys are those of before."""
        found = [(_ENVIRONMENT, key) for key in os.environ.get(_ENVIRONMENT, "").replace(",", " ").split()]
        if self._file is not None:
            found += self._read(self._file)
        for place, key in found:
            if not _FIT_FOR_HEADER.fullmatch(key):
                raise KeysError(f"{place}: an API key consists of visible ASCII characters, without spaces")
        self._digests = [_digest(key.encode()) for _, key in found]

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def match(self, key: bytes) -> bool:
        """Whether it is one of the keys, in a time that tells nothing about them."""
        digest = _digest(key)
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0

    @staticmethod
    def _read(file: Path) -> list[tuple[str, str]]:
        try:
            lines = file.read_text("utf-8").splitlines()
            mode = file.stat().st_mode
        except OSError as error:
            raise KeysError(f"{file}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise KeysError(f"{file}: it is not text in UTF-8") from None
        if mode & 0o044:
            _log.warning("%s holds API keys and may be read by other users; chmod 600 would stop them", file)
        stripped = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1))
        found = [(f"{file}: line {number}", key) for number, key in stripped if key]
        if not found:
            raise KeysError(f"{file}: it has no API key")
        return found


class KeyCheck:
    """ASGI middleware that answers 401 to whoever asks for a path that is not open, without a key or with a wrong one."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, is_open: Callable[[str], bool]) -> None:
        self._app, self._keys, self._is_open = app, keys, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and not self._is_open(scope["path"]):
            key = _given(Headers(scope=scope))
            if key is None:
                problem = _unauthorized("an API key is needed, as Authorization: Bearer KEY or X-API-Key: KEY")
                return await problem.response(scope)(scope, receive, send)
            if not self._keys.match(key):
                problem = _unauthorized("the API key is not known", ', error="invalid_token"')
                return await problem.response(scope)(scope, receive, send)
        await self._app(scope, receive, send)


def _given(headers: Headers) -> bytes | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    found = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return found.encode("latin-1") if found else None


def _unauthorized(detail: str, challenge: str = "") -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": f'Bearer realm="fanin"{challenge}'})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
