"""schemathesis over the whole API: it makes requests out of the API's description, right ones and wrong ones, and checks that
each answer is one that the description allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.serve.harness import Process

EXAMPLES = int(os.environ.get("FANIN_SCHEMATHESIS_EXAMPLES", "3"))  # for each route; 300 take some minutes

# What a description cannot say: ids or query but not both; an empty list among labels; a tensor that fits its shape.
_CONFIG = """
[generation]
deterministic = true

[[operations]]
include-path = ["/labels", "/predict", "/v2/models/{{model}}/infer", "/v2/models/{{model}}/versions/{{version}}/infer"]
[operations.checks]
positive_data_acceptance.expected-statuses = ["2xx", "404", "422", "504"]
not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]  # a timeout_ms of 1 is right, too

[parameters]
"path.model" = "topics"
"path.version" = "{version}"
"""


def test_every_answer_is_one_that_the_description_allows(server: Process, tmp_path: Path) -> None:
    with httpx.Client(base_url=server.url) as client:
        version = client.get("/v2/models/topics").json()["versions"][0]
    config = tmp_path / "schemathesis.toml"
    config.write_text(_CONFIG.format(version=version))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", f"{server.url}/openapi.json"]
    result = subprocess.run(
        [*command, "--no-color", f"--max-examples={EXAMPLES}"], cwd=tmp_path, capture_output=True, text=True, timeout=3600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Tested: 16" in result.stdout
    assert httpx.get(f"{server.url}/readyz").status_code == 200
