"""Requests that are wrong in some way, made from a seed, and what may be answered to them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

_HEAD = "{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
_INFER = "/v2/models/topics/infer"
_GOOD = {"inputs": "a text", "top_k": 3}


@dataclass(frozen=True)
class Malformed:
    """What to send, and how to go on: read the answer, close one's half first, wait for the server to lose patience, or
    leave without a word. `statuses` may be answered; None among them is a connection closed without an answer."""

    kind: str
    data: bytes
    then: Literal["read", "half-close", "wait", "reset"]
    statuses: frozenset[int | None]


def generate(seed: int) -> Malformed:
    """The same seed makes the same request."""
    rng = random.Random(seed)
    return rng.choice(_KINDS)(rng)


def _request(path: str, body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    given = headers or ("Content-Type: application/json",)
    lines = "".join(f"{header}\r\n" for header in (*given, f"Content-Length: {len(body) if length is None else length}"))
    return (_HEAD.format(method, path) + lines + "\r\n").encode("latin-1") + body


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _of(
    kind: str, data: bytes, *statuses: int | None, then: Literal["read", "half-close", "wait", "reset"] = "read"
) -> Malformed:
    return Malformed(kind, data, then, frozenset(statuses))


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    if depth < 3 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {_text(rng): _value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(
        [None, True, False, rng.randrange(-(10**30), 10**30), rng.random() * 10 ** rng.randrange(300), _text(rng)]
    )


def _text(rng: random.Random) -> str:
    ranges = [(0, 0x20), (0x20, 0x7F), (0x80, 0x800), (0xD800, 0xE000), (0x1F300, 0x1F600)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(12)))


def _not_json(rng: random.Random) -> Malformed:
    good = _json(_GOOD)
    at = rng.randrange(1, len(good) - 1)
    body = rng.choice(
        [
            good[:at],
            good + good,
            good[:at] + bytes([rng.randrange(0x80, 0x100)]) + good[at:],
            rng.choice(["[", '{"a":', '{"inputs":[']).encode() * rng.randrange(2_000, 50_000),
            b"\0" * rng.randrange(1, 100),
            good.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
            rng.randbytes(rng.randrange(1, 5000)) + b"\xff",
            b'{"inputs": "a", "top_k": %s}'
            % rng.choice([b"NaN", b"Infinity", b"-Infinity", b"9" * 5000, b"01", b"0x1", b"1."]),
            b'{"inputs": "a", "inputs": "b"}',
            b'{"inputs": "a\x01b"}',
            b'{"inputs": "\\uD8"}',
            b"<a/>",
        ]
    )
    return _of("not json", _request(rng.choice(["/predict", _INFER]), body), 400)


def _not_valid(rng: random.Random) -> Malformed:
    field = rng.choice(["inputs", "top_k", "min_score", "scores", "return_names", "truncate", "timeout_ms", _text(rng) + "?"])
    wrong = {
        "inputs": ["", " ", [], [""], ["a", None], ["a"] * 129, 1, {"text": "a"}, ["a", ["b"]], "\ud800"],
        "top_k": [0, -1, 1001, 1e300, 2.5, "3", True, None, [3]],
        "min_score": ["high", [], {}, True, 10**400],
        "scores": ["PROBABILITY", "", None, 1],
        "return_names": ["true", 1, None],
        "truncate": ["no", 0, None],
        "timeout_ms": [0, -5, "1", 1.5, False],
    }
    value = rng.choice(wrong.get(field, [_value(rng)]))
    return _of("not valid", _request("/predict", _json({"inputs": "a"} | {field: value})), 422)


def _not_an_object(rng: random.Random) -> Malformed:
    value = _value(rng)
    if isinstance(value, dict):
        value = {f"{name}?": each for name, each in value.items()}
    return _of("not an object", _request(rng.choice(["/predict", _INFER]), _json(value)), 422)


def _not_a_tensor(rng: random.Random) -> Malformed:
    tensor: dict[str, Any] = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    wrong = {
        "name": ["image", "", None, 3],
        "shape": [[], [2], [0], [1, 1, 1], [-1], [1, 7], "1", [1.5], [10**40]],
        "datatype": ["FP32", "bytes", None],
        "data": [[], ["a", "b"], [1], [[["a"]]], "a", [""], [None], {"a": "b"}],
        "parameters": [{"binary_data_size": 5}, {"binary_data_size": -1}, [], "x"],
    }
    field = rng.choice(list(wrong))
    body = _json({"inputs": [tensor | {field: rng.choice(wrong[field])}]})
    return _of("not a tensor", _request(_INFER, body), 422)


def _not_binary(rng: random.Random) -> Malformed:
    binary = rng.choice([b"\1", struct.pack("<I", rng.randrange(5, 1 << 32)) + b"abcd", struct.pack("<I", 2) + b"\xff\xfe"])
    size = len(binary) + rng.choice([0, 0, 1, -1, 10**9])
    head = _json({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}]})
    length = rng.choice([str(len(head)), str(len(head) + 1), "0", "-1", "x", "9" * 40, ""])
    headers = "Content-Type: application/octet-stream", f"Inference-Header-Content-Length: {length}"
    return _of("not binary", _request(_INFER, head + binary, *headers), 400, 422)


def _type(rng: random.Random) -> Malformed:
    header = rng.choice(
        ["X: y", *(f"Content-Type: {kind}" for kind in ("text/plain", "application/jsonp", ";;;", "form-data"))]
    )
    if rng.random() < 0.3:
        return _of("coding", _request("/predict", b"\x1f\x8b", "Content-Type: application/json", "Content-Encoding: gzip"), 415)
    return _of("type", _request("/predict", _json(_GOOD), header), 415)


def _too_large(rng: random.Random) -> Malformed:
    if rng.random() < 0.5:
        length = rng.choice([(1 << 20) + 1, 10**9, 2**63 - 1])
        return _of("announced too large", _request("/predict", b"x", length=length), 413)
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    head = _HEAD.format("POST", "/predict") + "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return _of("too large in chunks", head.encode() + chunk * 33, 413)


def _chunks(rng: random.Random) -> Malformed:
    head = _HEAD.format("POST", "/predict") + "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    wrong = rng.choice([b"z\r\n", b"-1\r\n", b"5\r\nabc\r\n0\r\n\r\n", b"F" * 17 + b"\r\n", b"\r\n", b"2\nab\n", b"2;\0\r\nab"])
    return _of("chunks", head.encode() + rng.choice([b"", b"3\r\nabc\r\n"]) + wrong, 400)


def _head(rng: random.Random) -> Malformed:
    head = _HEAD.format("POST", "/predict")
    wrong = rng.choice(
        [
            rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n"
            + rng.choice([b"a\0b: c", b"a b: c", b": c", b"a: b\0", b"a: \x7f\x01", b" a: b"])
            + b"\r\n\r\n",
            b"GET / HTTP/%d.%d\r\n\r\n" % (rng.randrange(2, 10), rng.randrange(1, 10)),
            rng.choice([b"G@T", b"get", b"POST/", b"\xffET", b"A" * 200]) + b" / HTTP/1.1\r\n\r\n",
            b"GET " + rng.choice([b"/\xff", b"/\0", b"/a b", b"http://[", b"nothing"]) + b" HTTP/1.1\r\n\r\n",
            head.encode() + b"Content-Length: " + rng.choice([b"-1", b"1e3", b"0x10", b"1,1", b"", b"9" * 40]) + b"\r\n\r\n",
            head.encode() + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
            head.encode() + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nabcde",
            head.encode() + b"Transfer-Encoding: gzip, identity\r\n\r\nabcde",
            b"\x16\x03\x01" + rng.randbytes(200),
        ]
    )
    return _of("head", wrong, 400)


def _large_head(rng: random.Random) -> Malformed:
    size = rng.randrange(40_000, 300_000)
    wrong = rng.choice(
        [b"GET /" + b"a" * size, b"GET / HTTP/1.1\r\nx: " + b"y" * size, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (size // 6)]
    )
    return _of("large head", wrong + b"\r\n\r\n", 400, 431)


def _nowhere(rng: random.Random) -> Malformed:
    path = rng.choice(
        [
            "/" + "".join(rng.choice("abz%2F.~;=+$") for _ in range(rng.randrange(1, 40))).replace("%", "%25"),
            "/docs/..%2f..%2fetc%2fpasswd", "//", "/%00", "/%ff%fe", "/v2/models/other", "/v2/models/%00/infer", "/predict/",
            "/v2/models/topics/versions/1", "/labels?ids=none", "/.env", "/docs/" + "a" * 5000,
        ]
    )  # fmt: skip
    return _of("nowhere", (_HEAD.format("GET", path) + "\r\n").encode(), 404, 405)


def _method(rng: random.Random) -> Malformed:
    method, path = (
        rng.choice(["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND"]),
        rng.choice(["/predict", "/labels", "/v2"]),
    )
    return _of("method", (_HEAD.format(method, path) + "\r\n").encode(), 405)


def _query(rng: random.Random) -> Malformed:
    query = rng.choice(
        ["", "limit=5", "query=a&limit=0", "query=a&limit=" + "9" * 400, "query=a&limit=%ff", "ids=a&query=b", "query=", "ids="]
    )
    return _of("query", (_HEAD.format("GET", f"/labels?{query}") + "\r\n").encode(), 404, 422)


def _cut(rng: random.Random) -> tuple[bytes, bytes]:
    """A good request that ends too early: in its head or in its body."""
    whole = _request("/predict", _json(_GOOD))
    at = rng.randrange(1, len(whole))
    return whole[:at], whole[at:]


def _half_closed(rng: random.Random) -> Malformed:
    if rng.random() < 0.3:
        other = _not_valid(rng)
        return _of("wrong and half-closed", other.data, None, *other.statuses, then="half-close")
    return _of("half-closed", _cut(rng)[0], 400, then="half-close")


def _slow(rng: random.Random) -> Malformed:
    return _of("slow", _cut(rng)[0], 408, then="wait")


def _reset(rng: random.Random) -> Malformed:
    data = rng.choice([_cut(rng)[0], _request("/predict", _json(_GOOD)), _too_large(rng).data])
    return _of("reset", data, None, then="reset")


def _silent(rng: random.Random) -> Malformed:
    return _of("silent", b"", None, then=rng.choice(["wait", "half-close", "reset"]))


_KINDS: list[Callable[[random.Random], Malformed]] = [
    _not_json, _not_json, _not_valid, _not_valid, _not_an_object, _not_a_tensor, _not_binary, _type, _too_large, _chunks, _head,
    _head, _large_head, _nowhere, _method, _query, _half_closed, _slow, _reset, _silent,
]  # fmt: skip
