"""Prometheus' rules and Grafana's dashboard: every metric that they name is one that somebody has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from argrad.wire.messages import SolveReply, SolveRequest
from tests.conftest import free_port
from tests.deploy.names import serving_names
from tests.deploy.support import DEPLOY, proxy
from tests.redis_server import running_redis
from tests.service.support import make_app, post, projection, running_app, simplex

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "argrad.json"
RULES = DEPLOY / "prometheus" / "alerts.yml"
PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
COMPOSE = DEPLOY.parent / "docker-compose.yml"
BY_PROMETHEUS = {"up"}
ON_GPUS_ONLY = {"argrad_device_memory_bytes"}
# Names that are not metrics: functions and keywords of PromQL.
WORDS = {"sum", "rate", "by", "histogram_quantile", "increase", "absent", "count", "label_values"}
_QUOTED = re.compile(r'"[^"]*"')
_LABELS = re.compile(r"\{[^}]*\}|\bby\s*\([^)]*\)|\[[^\]]*\]")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def panels() -> list[dict]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def rules() -> list[dict]:
    (group,) = YAML(typ="safe").load(RULES)["groups"]
    return group["rules"]


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, and where it is."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def metrics_of(expression: str) -> set[str]:
    """Metrics that a PromQL expression names."""
    return set(_NAME.findall(_LABELS.sub("", _QUOTED.sub("", expression)))) - WORDS


def labels_of(expression: str) -> dict[str, set[str]]:
    """Labels by which each metric is selected."""
    found: dict[str, set[str]] = {}
    for name, inner in re.findall(r"([a-z_]+)\{([^}]*)\}", expression):
        found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inner))
    return found


def test_names_are_found_in_expressions():
    expression = 'sum by (le, type) (rate(argrad_a_bucket{x="up_b",le=~"."}[5m])) / count(argrad_c) > 0.5'
    assert metrics_of(expression) == {"argrad_a_bucket", "argrad_c"}
    assert labels_of(expression) == {"argrad_a_bucket": {"x", "le"}}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def scraped(anyio_backend: str) -> dict[str, set[str]]:
    """Samples of a real service that has met everything, the loss of its Redis too: each with its labels."""
    with running_redis(free_port()) as redis:
        async with running_app(make_app(redis_url=redis.url)) as client:
            await _meet_everything(client)
            async with running_app(make_app(redis_url=redis.url)) as other:
                reply = await other.post("/v1/solve", json={"problem": simplex(), "keep_state": True})
                ask = {"state": reply.json()["state"], "upstream": {"z": [1, 0]}, "wrt": ["q"]}
                assert (await client.post("/v1/vjp", json=ask)).status_code in {200, 409}  # it may not be there yet
            redis.kill()
            text = ""
            while "argrad_redis_errors_total{" not in text:
                await client.post("/v1/solve", json={"problem": simplex(), "keep_state": True})
                text = (await client.get("/metrics")).text
    return samples_of(text)


async def _meet_everything(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        await client.post("/v1/solve", json={"problem": simplex(), "upstream": {"z": [1, 0]}, "wrt": ["q"]})
    await post(client, "/v1/solve", SolveRequest(), projection((-1, 1), (1, 1)), SolveReply)
    await client.post("/v1/vjp", json={"state": "gone", "upstream": {"z": [1, 0]}})


def samples_of(text: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def scraped_of_proxy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    with (
        serving_names([]) as nobody,
        proxy(nobody, free_port(), tmp_path_factory.mktemp("proxy") / "log") as (url, port),
    ):
        assert httpx.get(f"{url}/nowhere", trust_env=False).status_code == 404
        return samples_of(httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text)


@pytest.mark.anyio
async def test_every_metric_that_is_drawn_or_alerted_of_exists(
    scraped: dict[str, set[str]], scraped_of_proxy: dict[str, set[str]]
):
    there = set(scraped) | set(scraped_of_proxy) | BY_PROMETHEUS | ON_GPUS_ONLY
    named = {where: metrics_of(expression) for where, expression in expressions()}
    assert all(named.values()), "each expression names something"
    assert {where: missing for where, names in named.items() if (missing := names - there)} == {}


@pytest.mark.anyio
async def test_every_label_that_is_selected_by_exists(
    scraped: dict[str, set[str]], scraped_of_proxy: dict[str, set[str]]
):
    by_prometheus = {"instance", "job"}
    for where, expression in expressions():
        for metric, labels in labels_of(expression).items():
            if metric not in BY_PROMETHEUS | ON_GPUS_ONLY:
                own = scraped.get(metric, set()) | scraped_of_proxy.get(metric, set())
                assert labels - by_prometheus <= own, (where, metric)


def test_expressions_are_balanced_and_panels_do_not_overlap():
    for where, expression in expressions():
        for left, right in ("()", "{}", "[]"):
            assert expression.count(left) == expression.count(right), where
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_alert_says_how_bad_it_is_and_what_it_means():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]


def test_prometheus_and_grafana_find_what_compose_runs():
    yaml = YAML(typ="safe")
    services = yaml.load(COMPOSE)["services"]
    jobs = {job["job_name"]: job for job in yaml.load(PROMETHEUS)["scrape_configs"]}
    (found,) = jobs["argrad"]["dns_sd_configs"]
    assert set(found["names"]) <= set(services)
    assert str(found["port"]) == services["argrad"]["environment"]["ARGRAD_METRICS_PORT"]
    ((host, _),) = [target.split(":") for target in jobs["caddy"]["static_configs"][0]["targets"]]
    assert set(services[host]["networks"]) & set(services["prometheus"]["networks"])
    assert set(services["argrad"]["networks"]) & set(services["prometheus"]["networks"])
    assert yaml.load(PROMETHEUS)["rule_files"] == [RULES.name]

    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.load(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    (provider,) = yaml.load(provisioning / "dashboards" / "argrad.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
