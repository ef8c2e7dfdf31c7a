"""What deploy/ says fits the server: metrics, routes, flags and ports that exist; files that their programs accept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import promql_parser
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics
from serve.settings import parse
from tests.serve.harness import ROOT, TEXTS, Process

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/fanin.json").read_text())
RULES = [rule for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"] for rule in group["rules"]]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CPU, GPU = DEPLOY / "kubernetes/cpu", DEPLOY / "kubernetes/gpu"
OBJECTS = [CPU / name for name in yaml.safe_load((CPU / "kustomization.yaml").read_text())["resources"]]
DEPLOYMENT = yaml.safe_load((CPU / "deployment.yaml").read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
(SERVER,) = POD["containers"]


def run(*command: str | Path) -> str:
    """Standard output of a program that must end well. Skips the test where the program is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def routes(server: Process) -> set[str]:
    return set(httpx.get(f"{server.url}/openapi.json", timeout=30).json()["paths"])


# Metrics


@pytest.fixture(scope="module")
def series(server: Process) -> dict[str, set[str]]:
    """Every time series that a server exposes, with the names of its labels. Those of Prometheus itself are among them."""
    httpx.post(f"{server.url}/predict", json={"inputs": TEXTS}, timeout=30).raise_for_status()
    scrape = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
    for family in text_string_to_metric_families(scrape):
        labels = {name for sample in family.samples for name in sample.labels} | declared_labels().get(family.name, set())
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        found |= {family.name + ending: labels for ending in endings}
    return found


def declared_labels() -> dict[str, set[str]]:
    """By metric: what has no samples yet has no labels in a scrape."""
    collectors = list(Metrics().registry._collector_to_names)
    families = [each for c in collectors for each in ([c] if isinstance(c, MetricWrapperBase) else c.collect())]
    return {getattr(each, "name", None) or each._name: set(each._labelnames) for each in families}


def known_values(name: str) -> set[str]:
    """Values of a label that a server sets itself, before anything happened."""
    samples = [sample for family in Metrics().registry.collect() for sample in family.samples]
    return {sample.labels[name] for sample in samples if name in sample.labels}


def with_variables_filled(expression: str) -> str:
    for variable, value in {"$__rate_interval": "5m", "$job": "fanin", "$instance": ".*", "$route": ".*"}.items():
        expression = expression.replace(variable, value)
    return expression


def queries() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard and of the alerts, with where it stands."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", with_variables_filled(target["expr"])
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.+), (\w+)\)", with_variables_filled(variable["query"]["query"]))
            assert selector
            yield f"variable {variable['name']}", f"sum by ({selector[2]}) ({selector[1]})"
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def nodes(expression: str) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(expression), found.append)
    return found


QUERIES = dict(queries())


@pytest.mark.parametrize("place", QUERIES)
def test_a_query_names_metrics_and_labels_that_exist(place: str, series: dict[str, set[str]], routes: set[str]) -> None:
    of_scrape = {"job", "instance"}
    found = nodes(QUERIES[place])
    selectors = [node for node in found if isinstance(node, promql_parser.VectorSelector)]
    assert selectors
    for selector in selectors:
        for matcher in selector.matchers.matchers:
            assert matcher.name in series[selector.name] | of_scrape
            if matcher.name in {"stage", "reason", "result"} and matcher.op == promql_parser.MatchOp.Equal:
                assert matcher.value in known_values(matcher.name)
            if matcher.name == "route" and matcher.op == promql_parser.MatchOp.Equal:
                assert matcher.value in routes
    labels = set().union(of_scrape, *(series[selector.name] for selector in selectors))
    for node in found:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            assert set(node.modifier.labels) <= labels


def test_the_dashboard_shows_every_metric(series: dict[str, set[str]]) -> None:
    shown = {node.name for query in QUERIES.values() for node in nodes(query) if isinstance(node, promql_parser.VectorSelector)}
    names = {re.sub("_(bucket|count|sum)$", "", name) for name in shown}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in series} - {"up"} <= names


def test_the_dashboards_panels_stand_side_by_side() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart_x or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


def test_the_dashboards_queries_use_its_variables_only() -> None:
    declared = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    text = json.dumps([panel.get("targets", []) for panel in DASHBOARD["panels"]])
    assert set(re.findall(r"\$\{?(\w+)", text)) <= declared


def test_prometheus_accepts_configuration_and_rules() -> None:
    run("promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml")


def test_each_alert_fires_when_it_should() -> None:
    run("promtool", "test", "rules", ROOT / "tests/alerts.yml")


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    cases = [
        case for test in yaml.safe_load((ROOT / "tests/alerts.yml").read_text())["tests"] for case in test["alert_rule_test"]
    ]
    alerts = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


def test_every_alert_says_how_urgent_it_is_and_what_it_means() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}


# Compose


def test_compose_starts_the_server_with_flags_that_exist() -> None:
    assert parse(COMPOSE["services"]["fanin"]["command"]).bundle == Path("/bundle")


def test_compose_waits_for_the_drain() -> None:
    server = COMPOSE["services"]["fanin"]
    settings = parse(server["command"])
    assert int(server["stop_grace_period"].removesuffix("s")) > settings.drain_delay_s + settings.drain_timeout_s + 5


def test_compose_mounts_files_that_exist_and_names_its_own_volumes() -> None:
    for service in COMPOSE["services"].values():
        for mount in service["volumes"]:
            source = mount.partition(":")[0]
            assert (
                (DEPLOY / source).is_dir()
                if source.startswith(".")
                else source in COMPOSE["volumes"] or source.startswith("${")
            )


def test_compose_builds_a_target_of_the_dockerfile() -> None:
    build = COMPOSE["services"]["fanin"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert re.search(rf"^FROM .+ AS {build['target']}$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus(routes: set[str]) -> None:
    services = COMPOSE["services"]
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in services
    assert int(port) == parse(services[host]["command"]).port
    assert scrape.get("metrics_path", "/metrics") in routes
    assert all(f'job="{scrape["job_name"]}"' in rule["expr"] for rule in RULES if "up{" in rule["expr"])
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/fanin.yml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


# Kubernetes


@pytest.mark.parametrize("file", OBJECTS, ids=lambda file: file.name)
def test_kubernetes_knows_every_field(file: Path) -> None:
    kubernetes_validate.validate(yaml.safe_load(file.read_text()), "1.33", strict=True)


@pytest.mark.parametrize("folder", [CPU, GPU], ids=lambda folder: folder.name)
def test_kustomize_builds_objects_that_kubernetes_knows(folder: Path) -> None:
    objects = list(yaml.safe_load_all(run("kubectl", "kustomize", folder)))
    assert {each["kind"] for each in objects} == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    for each in objects:
        kubernetes_validate.validate(each, "1.33", strict=True)


def test_every_object_is_part_of_the_whole() -> None:
    assert {file.name for file in CPU.glob("*.yaml")} == {file.name for file in OBJECTS} | {"kustomization.yaml"}


@pytest.mark.parametrize("folder", [CPU, GPU], ids=lambda folder: folder.name)
def test_the_pods_flags_exist(folder: Path) -> None:
    (server,) = yaml.safe_load((folder / "deployment.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    settings = parse(server["args"])
    assert (settings.bundle, settings.host) == (Path("/bundle"), "0.0.0.0")


def test_the_gpu_pod_differs_by_its_device_only() -> None:
    (server,) = yaml.safe_load((GPU / "deployment.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    assert [flag for flag in server["args"] if not flag.startswith("--device")] == SERVER["args"]


def test_probes_ask_routes_that_exist_at_the_servers_port(routes: set[str]) -> None:
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    assert ports["http"] == parse(SERVER["args"]).port
    probes = {kind: SERVER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert all(probe["port"] == "http" and probe["path"] in routes for probe in probes.values())
    assert (probes["liveness"]["path"], probes["readiness"]["path"]) == ("/livez", "/readyz")


def test_the_pod_has_time_to_drain_and_proxies_have_time_to_notice() -> None:
    settings, probe = parse(SERVER["args"]), SERVER["readinessProbe"]
    assert settings.drain_delay_s > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert POD["terminationGracePeriodSeconds"] > settings.drain_delay_s + settings.drain_timeout_s + 5


def test_the_pod_may_do_no_more_than_it_needs() -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[:1]
    assert (POD["securityContext"]["runAsNonRoot"], POD["securityContext"]["runAsUser"]) == (True, int(user))
    assert SERVER["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all(mount["readOnly"] for mount in SERVER["volumeMounts"])


def test_everything_selects_the_pods(routes: set[str]) -> None:
    objects = {file.stem: yaml.safe_load(file.read_text()) for file in OBJECTS}
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    monitor = yaml.safe_load((DEPLOY / "kubernetes/servicemonitor.yaml").read_text())
    assert objects["service"]["spec"]["selector"] == labels == objects["disruption-budget"]["spec"]["selector"]["matchLabels"]
    assert monitor["spec"]["selector"]["matchLabels"] == objects["service"]["metadata"]["labels"]
    assert objects["autoscaler"]["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]
    (port,) = objects["service"]["spec"]["ports"]
    assert port["name"] == monitor["spec"]["endpoints"][0]["port"]
    assert port["targetPort"] in {each["name"] for each in SERVER["ports"]}
    assert monitor["spec"]["endpoints"][0]["path"] in routes


def test_every_file_of_deploy_can_be_read() -> None:
    files = [file for file in DEPLOY.rglob("*") if file.is_file()]
    readers: dict[str, Any] = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}
    assert all(readers[file.suffix](file.read_text()) for file in files)
