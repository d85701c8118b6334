"""The shipped rules, alerts and dashboard: Prometheus's own tool on them, and every name of theirs in a live scrape.

The alerts' own tests, which people can run where they change them, are deploy/prometheus/chat-proxy.rules.test.yml.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from server.test_metrics import CONTRACT, series
from support.harness import (
    GOOD,
    STARTING,
    Peer,
    Running,
    ScriptedUpstream,
    chat,
    delta,
    eventually,
    raw_chat,
    read_until,
    running,
)
from support.nginx import DEPLOY

from proxy import errors
from proxy.telemetry.metrics import ENDINGS

pytestmark = [pytest.mark.nginx, pytest.mark.tools]

RULES = DEPLOY / "prometheus" / "chat-proxy.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "chat-proxy.json"
WIDTH = 24  # columns of a dashboard


def promtool(*arguments: str, folder: Path = RULES.parent) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=STARTING)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def queries() -> dict[str, str]:
    """Every PromQL of the dashboard and the rules by where it stands."""
    board = dashboard()
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    found |= {f"annotation {one['name']}": one["expr"] for one in board["annotations"]["list"]}
    return found | {f"rule {rule.get('alert', rule.get('record'))}": rule["expr"] for rule in rules()}


def test_promtool_accepts_the_rules() -> None:
    """promtool finds every rule, and nothing wrong with one."""
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", RULES.name)


def test_the_alerts_do_what_they_say() -> None:
    """One refused key raises an alarm, a healthy server none, one in trouble all that it should."""
    assert "SUCCESS" in promtool("test", "rules", "chat-proxy.rules.test.yml")


def test_every_alert_is_tested() -> None:
    """Each alert fires in one of their tests."""
    tests = (RULES.parent / "chat-proxy.rules.test.yml").read_text(encoding="utf-8")
    assert [rule["alert"] for rule in rules() if "alert" in rule and rule["alert"] not in tests] == []


def test_promtool_accepts_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """Grafana's variables filled in as Grafana does it, each query is one that Prometheus can parse."""
    filled = [
        query.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$instance", ".*")
        for query in queries().values()
    ]
    assert not [query for query in filled if "$" in query]
    recorded = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(filled)]
    (tmp_path / "q.yml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": recorded}]}), encoding="utf-8")
    promtool("check", "rules", "q.yml", folder=tmp_path)


def test_the_dashboard_is_one() -> None:
    """What Grafana wants of a dashboard: panels with their own ids that do not overlap, a unit each, one source."""
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert {"uid", "title", "time", "templating", "panels"} <= board.keys()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert columns.stop <= WIDTH
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)\b", DASHBOARD.read_text(encoding="utf-8")))
    assert used == variables


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scraped() -> dict[str, set[str]]:
    """The names of a live scrape after some of everything, each with its labels."""

    async def script(peer: Peer) -> None:
        while True:
            match (await peer.request()).json["messages"][0]["content"]:
                case "no key":
                    await peer.whole(b"", "401 Unauthorized")
                case "stay":
                    await peer.head()
                    await peer.chunk(delta("a"))
                    await peer.gone()
                case _:
                    await peer.head()
                    for part in GOOD:
                        await peer.chunk(part)
                        await asyncio.sleep(0.001)
                    await peer.end()

    with ScriptedUpstream(script) as upstream, running(upstream.base_url) as proxy:
        assert chat(proxy).status == 200
        assert chat(proxy, messages=[{"role": "user", "content": "no key"}]).status == 502
        assert chat(proxy, model="unknown").status == 400
        with raw_chat(proxy, messages=[{"role": "user", "content": "stay"}]) as visitor:
            read_until(visitor, delta("a"))
        eventually(lambda: aborts(proxy))
        found: dict[str, set[str]] = {}
        for name, labels in series(proxy.service.app.metrics.exposition()):
            found.setdefault(name, set()).update(label for label, _ in labels)
    return found


def aborts(proxy: Running) -> float:
    return series(proxy.service.app.metrics.exposition())["chat_proxy_abort_seconds_count", frozenset()]


def test_every_metric_is_scraped(scraped: dict[str, set[str]]) -> None:
    """A name in the rules or on the dashboard is one that the server shows, or that the rules record."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for place, query in queries().items():
        names = re.findall(r"\bchat_proxy[a-z0-9_:]+", re.sub(r'"[^"]*"', "", query))
        assert names or "ALERTS" in query or query.startswith("up{"), place
        assert set(names) <= scraped.keys() | recorded, place


def test_every_metric_is_used() -> None:
    """Nothing that the server counts stays unseen."""
    everything = "\n".join(queries().values())
    assert [name for name in CONTRACT if name not in everything] == []


def test_every_label_is_scraped(scraped: dict[str, set[str]]) -> None:
    """What is selected or summed by is a label of the metric, or one that Prometheus adds."""
    for place, query in queries().items():
        for name, selected in re.findall(r"\b(chat_proxy_[a-z0-9_]+)\{([^}]*)\}", query):
            used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selected))
            assert used <= scraped[name] | {"job", "instance"}, place


def test_every_code_is_one_of_ours() -> None:
    """Endings and codes that a query names are ones that the server knows."""
    codes = {"200", "500"} | {kind.code for kind in kinds(errors.Refusal)}
    for place, query in queries().items():
        for label, value in re.findall(r'\b(code|ending)=~?"([^"$]*)"', query):
            known = codes if label == "code" else set(ENDINGS)
            assert set(value.split("|")) <= known, place


def kinds(kind: type[errors.Refusal]) -> list[type[errors.Refusal]]:
    return [kind, *(below for child in kind.__subclasses__() for below in kinds(child))]
