"""The shipped container files: each tool's own verdict, and whether their parts fit together and to the server.

No container is run here; what would run in one is: the image's folders with its own commands, the health check, and
the settings that the manifests put into the environment.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import settings_for
from support.harness import (
    GOOD,
    PATIENCE,
    STARTING,
    ScriptedUpstream,
    environment,
    eventually,
    free_port,
    random_key,
    running,
    send,
    streaming,
)
from support.nginx import DEPLOY

from proxy import settings
from proxy.server.runner import FLUSH
from proxy.server.service import LAST_EVENTS
from proxy.telemetry.metrics import Metrics

pytestmark = [pytest.mark.nginx, pytest.mark.process, pytest.mark.tools]

ROOT = DEPLOY.parent
DOCKER = DEPLOY / "docker"
COMPOSE = DOCKER / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes" / "chat-proxy.yaml"
DOCKERFILE = DOCKER / "Dockerfile"
TOOLS = Path(sys.executable).parent


def tool(name: str, *arguments: str) -> str:
    """What a tool of requirements-test.txt says when it is content."""
    done = subprocess.run([TOOLS / name, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=STARTING)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return found


def manifests() -> dict[str, Any]:
    """The Kubernetes objects by kind."""
    objects = list(yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8")))
    found = {one["kind"]: one for one in objects}
    assert len(found) == len(objects)
    return found


def loaded(variables: dict[str, str], file: Path, secrets: Path) -> settings.Settings:
    """The settings that a container sees: secrets' files found in this folder, whatever theirs is called."""
    for name, value in {"upstream_api_key": random_key(), "session_secret": "s" * 43}.items():
        (secrets / name).write_text(value, encoding="utf-8")
    here = {
        name: str(secrets / Path(value).name) if name.endswith("_FILE") else value for name, value in variables.items()
    }
    return settings.load(str(file), here)


def words_after_a_drain(chosen: settings.Settings) -> float:
    """How long a server may take to end, in seconds."""
    return chosen.server.drain_seconds + LAST_EVENTS + FLUSH


# ---- the image ------------------------------------------------------------------------------------------------------


def test_hadolint_accepts_the_dockerfile() -> None:
    """hadolint has nothing to say, not even for information."""
    assert tool("hadolint", "--failure-threshold", "style", str(DOCKERFILE)) == ""


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text(encoding="utf-8"))
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if re.match("[A-Z]", line)
    ]


def instruction(name: str) -> str:
    return [value for found, value in instructions() if found == name][-1]


def test_the_image_runs_as_nobody_in_particular() -> None:
    """Its user is not root, by number, as Kubernetes wants it to be sure; every package comes by its hash."""
    user, group = instruction("USER").split(":")
    assert int(user) >= 10000
    assert int(group) > 0
    (pip,) = (value for name, value in instructions() if name == "RUN" and "pip install" in value)
    assert "--require-hashes" in pip
    assert "--no-deps" in pip


def copied_from_here() -> list[tuple[str, str]]:
    """Source and target of what the image takes from the repository."""
    copies = [shlex.split(value) for name, value in instructions() if name == "COPY"]
    return [(copy[0], copy[1]) for copy in copies if len(copy) == 2]  # a third word says from which other stage


def test_what_the_image_takes_is_there_and_not_ignored() -> None:
    """Each source of a COPY exists, and is let in by the ignore file, which lets in nothing else."""
    sources = {source for source, _ in copied_from_here()}
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert sources == {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


@contextmanager
def image(folder: Path) -> Iterator[dict[str, str]]:
    """The image's folder as its COPY lines lay it out, and the environment that its ENV lines make, both moved here."""
    for source, target in copied_from_here():
        place = folder / "opt" / target.removeprefix("/opt/chat-proxy/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place = place / Path(source).name if target.endswith(("/", ".")) else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)
    variables = dict(word.split("=", 1) for word in shlex.split(instruction("ENV")))
    yield {name: value.replace("/opt/chat-proxy", str(folder / "opt")) for name, value in variables.items()}


def moved(command: list[str], folder: Path) -> list[str]:
    """A command of the image, with this Python and in that folder."""
    python = "/opt/chat-proxy/venv/bin/python"
    return [
        sys.executable if word == python else word.replace("/opt/chat-proxy", str(folder / "opt")) for word in command
    ]


def test_the_image_serves_and_knows_that_it_does(tmp_path: Path) -> None:
    """The entry point finds the package and the page in the image's folders; the health check says alive, then dead."""
    port = free_port()
    file = tmp_path / "chat-proxy.toml"
    file.write_text("[log]\nformat = 'text'\n", encoding="utf-8")
    entry = json.loads(instruction("ENTRYPOINT"))
    arguments = [word.replace("/etc/chat-proxy", str(tmp_path)) for word in json.loads(instruction("CMD"))]
    health = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    with image(tmp_path) as variables, ScriptedUpstream(streaming(*GOOD)) as upstream:
        given = {f"CHAT_PROXY_{name}": value for name, value in settings_for(upstream.base_url).items()}
        told = environment() | variables | given | {"CHAT_PROXY_SERVER_PORT": str(port)}
        check = moved(health, tmp_path)
        with (tmp_path / "stderr").open("wb") as stderr:
            server = subprocess.Popen([*moved(entry, tmp_path), *arguments], cwd=tmp_path, env=told, stderr=stderr)
        try:
            eventually(
                lambda: subprocess.run(check, env=told, capture_output=True, timeout=STARTING).returncode == 0, STARTING
            )
            found = subprocess.run(
                ["curl", "-sf", f"http://127.0.0.1:{port}/page/page.js"], capture_output=True, timeout=PATIENCE
            )
            assert found.stdout == (ROOT / "static" / "page" / "page.js").read_bytes()
        finally:
            server.terminate()
            assert server.wait(STARTING) == 0, (tmp_path / "stderr").read_text(encoding="utf-8")
        assert subprocess.run(check, env=told, capture_output=True, timeout=STARTING).returncode != 0


def test_the_health_check_of_a_socket(tmp_path: Path) -> None:
    """On a path, as in compose.yaml."""
    path = tmp_path / "1.sock"
    told = environment() | {"CHAT_PROXY_SERVER_SOCKET": str(path)}
    check = [sys.executable, str(DOCKER / "healthcheck.py")]
    with running("http://127.0.0.1:9/v1", SERVER_SOCKET=str(path)):
        assert subprocess.run(check, env=told, capture_output=True, timeout=STARTING).returncode == 0
    assert subprocess.run(check, env=told, capture_output=True, timeout=STARTING).returncode != 0


def test_sessions_can_be_ended_in_a_container() -> None:
    """`sessions revoke` has a folder to write its file to, in a file system that is read-only but for that one; and the
    command that the guide gives is the image's own."""
    state = dict(word.split("=", 1) for word in shlex.split(instruction("ENV")))["STATE_DIRECTORY"]
    for name in ("chat-1", "chat-2"):
        assert state in {mount.partition(":")[0] for mount in compose()["services"][name]["tmpfs"]}
    volumes = {mount["mountPath"]: mount["name"] for mount in pod()["spec"]["containers"][0]["volumeMounts"]}
    assert volumes[state] in {volume["name"] for volume in pod()["spec"]["volumes"] if "emptyDir" in volume}
    guide = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert f"docker compose exec chat-1 {' '.join(json.loads(instruction('ENTRYPOINT')))} sessions revoke " in guide


# ---- compose --------------------------------------------------------------------------------------------------------


def test_compose_keeps_to_its_specification() -> None:
    """The file is valid by the schema of the Compose specification."""
    assert "ok" in tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_nothing_in_compose_may_more_than_it_must() -> None:
    """Every service has a file system that it cannot write, no capabilities but those named, and no way to new ones."""
    for name, service in compose()["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert name == "nginx" or "ports" not in service


def test_the_parts_of_compose_fit() -> None:
    """What is mounted is there, each instance's socket is one that the nginx site asks, and Redis has no way out."""
    found = compose()
    services = found["services"]
    site = (DEPLOY / "nginx" / "chat-proxy.conf").read_text(encoding="utf-8")
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in found["volumes"] or source == "./certificates" or (DOCKER / source).exists(), mount
        if socket := service.get("environment", {}).get("CHAT_PROXY_SERVER_SOCKET"):
            assert f"server unix:{socket} " in site
    assert f"{instruction('USER').partition(':')[2]}" == "101"  # nginx's group in its own image
    assert services["redis"]["networks"] == ["inside"]
    assert found["networks"]["inside"]["internal"]


@pytest.mark.parametrize("name", ["chat-1", "chat-2"])
def test_composes_settings_are_ours(name: str, tmp_path: Path) -> None:
    """The environment, the shipped file and the secrets are one valid whole, and Docker waits for the drain."""
    service = compose()["services"][name]
    chosen = loaded(service["environment"], DEPLOY / "chat-proxy.example.toml", tmp_path)
    assert chosen.limits.store == "redis://redis:6379/0"
    assert chosen.server.socket
    assert int(service["stop_grace_period"].removesuffix("s")) > words_after_a_drain(chosen)
    secrets = {Path(value).name for key, value in service["environment"].items() if key.endswith("_FILE")}
    assert secrets == set(service["secrets"]) == compose()["secrets"].keys()


# ---- kubernetes -----------------------------------------------------------------------------------------------------


def test_kubernetes_accepts_the_manifests() -> None:
    """Each object is valid by the strict schema of the newest release that the validator knows."""
    said = tool("kubernetes-validate", "--strict", str(KUBERNETES))
    assert said.count(" passed ") == len(manifests())


def pod() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]
    return found


def test_the_pods_settings_are_ours(tmp_path: Path) -> None:
    """Environment, ConfigMap and Secret are one valid whole; ports and probes are the server's."""
    container = pod()["spec"]["containers"][0]
    file = tmp_path / "chat-proxy.toml"
    file.write_text(manifests()["ConfigMap"]["data"]["chat-proxy.toml"], encoding="utf-8")
    chosen = loaded({one["name"]: one["value"] for one in container["env"]}, file, tmp_path)
    assert {one["name"]: one["containerPort"] for one in container["ports"]} == {
        "http": chosen.server.port,
        "metrics": chosen.metrics.port,
    }
    assert (chosen.server.host, chosen.metrics.host) == ("0.0.0.0", "0.0.0.0")
    assert {Path(one["value"]).name for one in container["env"]} == manifests()["Secret"]["stringData"].keys()
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(one["value"]).parent) for one in container["env"]} | {"/etc/chat-proxy"} <= mounted
    paths = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    with running("http://127.0.0.1:9/v1") as proxy:
        assert {send(proxy, "GET", path, headers={"host": "10.1.2.3:8000"}).status for path in paths} == {200}
    grace = pod()["spec"]["terminationGracePeriodSeconds"]
    assert grace > container["lifecycle"]["preStop"]["sleep"]["seconds"] + words_after_a_drain(chosen)
    target = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]
    assert int(target["target"]["averageValue"]) < chosen.server.max_streams
    assert f"\n{target['metric']['name']} " in Metrics(("m",)).exposition().decode()


def test_the_pod_may_no_more_than_it_must() -> None:
    """Kubernetes' own `restricted` standard, and no account of the cluster's."""
    spec = pod()["spec"]
    container = spec["containers"][0]["securityContext"]
    assert not spec["enableServiceLinks"]
    assert not spec["automountServiceAccountToken"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == int(instruction("USER").partition(":")[0])
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_everything_finds_its_pods() -> None:
    """The selectors of all objects match the pods' labels, their ports its names, and all are in one namespace."""
    found = manifests()
    labels = pod()["metadata"]["labels"]
    ports = {one["name"] for one in pod()["spec"]["containers"][0]["ports"]}
    assert found["Service"]["spec"]["selector"] == labels
    assert {one["targetPort"] for one in found["Service"]["spec"]["ports"]} <= ports
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    let_in = {one["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for one in rule["ports"]}
    assert let_in == ports
    namespace = found["Namespace"]["metadata"]["name"]
    assert {one["metadata"].get("namespace", namespace) for one in found.values()} == {namespace}
