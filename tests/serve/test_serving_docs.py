"""docs/serving.md says what is so: each example runs, and each route, error, flag, metric and alert is there."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.settings import Settings
from tests.serve.harness import ROOT, Process

DOCS = (ROOT / "docs/serving.md").read_text()
# Names of model and labels.
IN_THE_DOCS, HERE = ("docstrings", "numpy.sort", "heapq.merge", "singular"), ("topics", "t-1", "t-2", "topic")


class Example(NamedTuple):
    command: str
    status: int
    answer: Any  # JSON; None where the docs show none


def examples() -> Iterator[Example]:
    """Every curl command, with the status and the answer that the docs give it."""
    for block in re.finditer(r"```sh\n(.+?)```(?:\s+(?:Answer `(\d+)`:\s+)?```json\n(.+?)```)?", DOCS, re.DOTALL):
        commands = re.findall(r"^curl (?:.|\n(?!curl))+", block[1], re.MULTILINE)
        assert commands, block[1]
        for command in commands:
            yield Example(command.strip(), int(block[2] or 200), json.loads(block[3]) if block[3] else None)


EXAMPLES = sorted(examples(), key=lambda example: example.command.endswith("/drain"))  # after that there is no server


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(title)}$\n(.+?)(?=^#|\Z)", DOCS, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[1]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's tables, without their headings."""
    lines = re.findall(r"^(\|.+)\n(?!\|---)", section(title), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


@pytest.fixture(scope="module")
def own(bundle_path: Path) -> Iterator[tuple[str, str]]:
    """A server with an admin listener that one of the examples ends: its two addresses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = Process(bundle_path, "--admin-port", str(port))
    yield process.url.removeprefix("http://"), f"127.0.0.1:{port}"
    assert process.end() == (0, "")


def same_shape(documented: Any, real: Any, where: str = "") -> None:
    """Asserts that the same fields are there, and the same kinds of values."""
    assert type(documented) is type(real), where
    if isinstance(documented, dict) and documented:
        assert list(documented) == list(real), where
        for key in documented:
            same_shape(documented[key], real[key], f"{where}/{key}")
    if isinstance(documented, list) and documented:
        same_shape(documented[0], real[0], f"{where}/0")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.command.splitlines()[0][:60])
def test_an_example_gets_the_answer_that_the_docs_show(own: tuple[str, str], example: Example) -> None:
    command = example.command
    for ours, theirs in zip(("localhost:8000", "localhost:8001", *IN_THE_DOCS), (*own, *HERE), strict=True):
        command = command.replace(ours, theirs)
    done = subprocess.run(
        ["bash", "-c", f"{command} -w '\\n%{{http_code}}'"], capture_output=True, text=True, timeout=60, check=True
    )
    body, _, status = done.stdout.rpartition("\n")
    assert int(status) == example.status, body
    if example.answer is not None:
        same_shape(example.answer, json.loads(body))
        if example.status >= 400:
            real = json.loads(body)
            assert (real["type"], real.get("errors")) == (example.answer["type"], example.answer.get("errors"))


def test_every_route_has_an_example(server: Process) -> None:
    routes = set(httpx.get(f"{server.url}/openapi.json", timeout=30).json()["paths"])
    asked = {re.search(r"localhost:800\d([^'\s?]*)", example.command)[1] for example in EXAMPLES}  # type: ignore[index]
    asked = {path.replace("/docstrings", "/{model}") for path in asked}
    assert {route for route in routes if "{version}" not in route} <= asked
    assert {"/reload", "/drain", "/", "/docs", "/openapi.json"} <= asked
    assert len({example.command for example in EXAMPLES}) == len(EXAMPLES)


def test_every_field_of_a_request_is_described(server: Process) -> None:
    schemas = httpx.get(f"{server.url}/openapi.json", timeout=30).json()["components"]["schemas"]
    described = {name for row in rows("`POST /predict`") for name in quoted(row[0])}
    assert described == set(schemas["PredictRequest"]["properties"])


def test_every_setting_is_described_and_no_other() -> None:
    fields = {
        field.metadata.get("flag", f"--{field.name.removesuffix('_s').replace('_', '-')}")
        for field in dataclasses.fields(Settings)[1:]
    }
    table = [flag for row in rows("Settings") for flag in quoted(row[0]) if flag.startswith("--")]
    assert sorted(table) == sorted(fields)


def test_every_kind_of_problem_is_described_and_no_other() -> None:
    """Those that the code names as a constant, and those that are a state of the service."""
    made: set[tuple[int, str]] = set()
    for file in (ROOT / "serve").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Problem", "try_again", "_refuse"):
                status, kind = [argument.value if isinstance(argument, ast.Constant) else None for argument in call.args[:2]]
                if status and kind:
                    made.add((status, kind))
    documented = set()
    for statuses, kinds, *_ in rows("Errors"):
        documented |= {(int(status), kind) for status in statuses.split(", ") for kind in quoted(kinds)}
    of_states_and_frameworks = {
        (503, "loading"),
        (503, "draining"),
        (400, "bad-json"),
        (404, "not-found"),
        (405, "method-not-allowed"),
    }
    assert documented == made | of_states_and_frameworks


def test_every_metric_is_described_with_its_labels_and_no_other(server: Process) -> None:
    httpx.post(f"{server.url}/predict", json={"inputs": "a"}, timeout=30).raise_for_status()
    described = {
        name: (kind, set(quoted(labels)))
        for names, kind, labels, _ in rows("Metrics")
        if "fanin_" in names
        for name in quoted(names)
    }
    exposed = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        kind = "info" if family.name.endswith("_info") else family.type
        exposed[family.name + ("_total" if kind == "counter" else "")] = (kind, labels)
    without_samples = {name for name, (_, labels) in exposed.items() if not labels}
    assert {name: fact[0] for name, fact in described.items()} == {name: fact[0] for name, fact in exposed.items()}
    for name in described.keys() - without_samples:
        assert described[name][1] == exposed[name][1], name


def test_every_alert_is_described_and_no_other() -> None:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    described = [name for row in rows("Alerts") for name in quoted(row[0])]
    assert sorted(described) == sorted(rule["alert"] for group in groups for rule in group["rules"])


def test_links_and_files_exist() -> None:
    titles = re.findall(r"^#+ (.+)$", DOCS, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", DOCS):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (ROOT / "docs" / target).exists(), target
    for file in re.findall(r"\bdeploy/[\w./-]+\w", DOCS):
        assert (ROOT / file).exists(), file
