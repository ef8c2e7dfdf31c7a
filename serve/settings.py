"""The settings of a server. One dataclass makes the command line and its help."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

_DESCRIPTION = """\
Serves the model of BUNDLE, a directory written by `python -m export`, over HTTP.

It prints its address when the model is loaded and warmed up.

signals:
  SIGTERM, Ctrl-C   drain: /readyz turns 503, predictions under way are answered, then it ends; a second one ends it at once
  SIGHUP            reload BUNDLE, which may be a link that points elsewhere by now: the new one is verified and warmed up
                    beside the old one; if anything is wrong with it, the old one stays

exit status:
  0    drained
  2    a wrong setting, a bundle that cannot be served, an address that cannot be had
  3    the engine or the event loop died or is stuck: start it again
  130  Ctrl-C before it was set up

/livez fails as long as the process should be replaced, /readyz as long as it should get no predictions.
"""
_EPILOG = """\
example:
  python -m serve bundle --port 8000
  curl -s localhost:8000/predict -H 'Content-Type: application/json' -d '{"inputs": "sort an array", "top_k": 5}'

A page to try the model is at /, the API's description at /docs, Prometheus metrics at /metrics. With --admin-port there is
a second listener, for operators only:
  curl -X POST localhost:8001/reload    # as SIGHUP; -H 'Content-Type: application/json' -d '{"bundle": "path"}' takes another
  curl -X POST localhost:8001/drain     # as SIGTERM
"""


def _at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is not {least} {'or more' if most is None else f'to {most}'}")
        return value

    parse.__name__ = "whole number"  # argparse puts it into its message
    return parse


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _devices(text: str) -> tuple[str, ...]:
    devices = tuple(text.split(","))
    for device in devices:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise argparse.ArgumentTypeError(f"{device!r} is not cpu, cuda or cuda:N")
    return devices


_seconds.__name__ = "number of seconds"


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", text):
        raise argparse.ArgumentTypeError(f"{text} is not an origin such as https://example.org, nor *")
    return text


def _setting(group: str, default: Any, help: str, parse: Callable[[str], Any], metavar: str = "N", **more: Any) -> Any:
    facts = {"group": group, "help": help, "type": parse, "metavar": metavar, **more}
    return dataclasses.field(default=default, metadata=facts)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a server, by the name of its flag (dashes for underscores)."""

    bundle: Path

    host: str = _setting("network", "127.0.0.1", "address to listen on; 0.0.0.0 for every IPv4 network", str, "ADDRESS")
    port: int = _setting("network", 8000, "port to listen on; 0 takes a free one", _at_least(0, 65_535))
    admin_host: str = _setting("network", "127.0.0.1", "address of the admin listener", str, "ADDRESS")
    admin_port: int | None = _setting(
        "network", None, "port of the admin listener (reload, drain); 0 takes a free one (default: none)", _at_least(0, 65_535)
    )
    drain_delay_s: int = _setting(
        "network",
        0,
        "seconds that predictions are still taken after /readyz has turned 503, for load balancers to notice",
        _at_least(0),
        "S",
    )
    drain_timeout_s: int = _setting("network", 30, "seconds that predictions under way may take at the end", _at_least(0), "S")

    max_connections: int = _setting("network", 512, "connections at a time; more are answered 503 and closed", _at_least(1))
    client_timeout_s: float = _setting(
        "network",
        20,
        "seconds a client may take to send a request, and to read on in its answer, before its connection is closed",
        _seconds,
        "S",
    )
    cors_origin: list[str] | None = _setting(
        "network",
        None,
        "origin whose pages may call this server, or * for all; may be repeated (default: none)",
        _origin,
        "ORIGIN",
        action="append",
    )
    api_keys_file: Path | None = _setting(
        "network",
        None,
        "file with API keys, one in a line; then every request must have one, but for health checks, /metrics and pages. "
        "More may stand in the environment variable FANIN_API_KEYS, separated by spaces (default: no key is needed)",
        Path,
        "FILE",
    )

    log_format: Literal["text", "json"] = _setting(
        "log", "text", "how lines on standard error look", str, "text|json", choices=("text", "json")
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "log",
        "warning",
        "what is logged at least; with info, every request",
        str,
        "debug|info|warning|error",
        choices=("debug", "info", "warning", "error"),
    )

    devices: tuple[str, ...] = _setting(
        "engine",
        ("cpu",),
        "cpu, cuda or cuda:N; of several, separated by commas, each gets a process of its own, which is replaced when lost",
        _devices,
        "DEVICE",
        flag="--device",
    )
    encoder_runtime: Literal["onnx", "torch"] = _setting(
        "engine",
        "onnx",
        "what runs the encoder on a GPU; torch needs a bundle exported with --torch-encoder",
        str,
        "onnx|torch",
        choices=("onnx", "torch"),
    )
    threads: int | None = _setting(
        "engine",
        None,
        "threads of encoder and head per device (default: the cores this process may use, shared out among the devices)",
        _at_least(1),
    )
    max_batch_inputs: int = _setting("engine", 32, "texts in one batch, at most", _at_least(1))
    max_batch_tokens: int = _setting(
        "engine", 1024, "tokens in one batch, padding included, at most; a single longer text still goes alone", _at_least(1)
    )
    hang_timeout_s: float | None = _setting(
        "engine",
        None,
        "seconds without progress after which the engine counts as stuck: /livez fails and the process ends with status 3, or, "
        "with several devices, the engine's process is replaced; "
        "inf for never (default: 4 times the largest batch at warm-up, at least 1.5, or 10 with several devices)",
        _seconds,
        "S",
    )

    max_queue_tokens: int = _setting(
        "limits",
        32_768,
        "tokens that may wait before requests are answered 429; an empty queue takes any request",
        _at_least(1),
    )
    max_queue_ms: int = _setting(
        "limits",
        500,
        "milliseconds that requests may have to wait for their turn before they are answered 429, however few wait",
        _at_least(1),
        "MS",
    )
    max_inputs: int = _setting("limits", 128, "texts in one request, at most", _at_least(1))
    max_top_k: int = _setting("limits", 1000, "labels per text a request may ask for", _at_least(1))
    max_filter_labels: int = _setting("limits", 10_000, "labels that a request may allow and deny, together", _at_least(1))
    max_body_bytes: int = _setting("limits", 1 << 20, "bytes in a request's body, at most", _at_least(1))
    timeout_ms: int = _setting(
        "limits", 30_000, "milliseconds a request may take unless it asks for less; it is answered 504 then", _at_least(1), "MS"
    )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (default: this process's). Ends the process with status 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        "python -m serve", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory written by `python -m export`")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Settings)[1:]:
        facts = dict(field.metadata)
        name = facts.pop("group")
        group = groups[name] if name in groups else groups.setdefault(name, parser.add_argument_group(name))
        shown = "" if field.default is None else " (default: %(default)s)"
        flag = facts.pop("flag", "--" + field.name.removesuffix("_s").replace("_", "-"))
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        group.add_argument(flag, dest=field.name, default=default, **{**facts, "help": facts["help"] + shown})
    return Settings(**vars(parser.parse_args(arguments)))
