"""What `deploy/` says is what the server knows: its metrics, flags, variables and settings, and when it is ready."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ROOT, Server, serve
from test_clients import NAMED, PROMETHEUS, SOUND, metrics
from test_engine import ENGINE

DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "blip2.json").read_text())
UNIT = DEPLOY / "systemd" / "blip2.service"
IMAGES = [DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda"]
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def queries() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def deployment() -> dict[str, Any]:
    return documents(DEPLOY / "kubernetes" / "deployment.yaml")[0]["spec"]["template"]["spec"]


def test_the_board_shows_the_metrics_that_there_are(server: Server) -> None:
    for path, body in SOUND.items():
        assert server.ask(path.format(**NAMED), body)[0] == 200, path
    assert server.ask("/match", {})[0] == 400
    text = metrics(server, "*/*")[1]
    there = set(re.findall(r"^(\w+)[{ ]", text, re.M))
    scaled = documents(DEPLOY / "kubernetes" / "hpa.yaml")[0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    shown = set(re.findall(r"\b(?:blip2|process)_\w+", " ".join([*queries(), scaled])))
    assert len(shown) > 15 and shown <= there, shown - there
    families = re.findall(r"^# TYPE (\w+)", text, re.M)
    assert [family for family in families if not any(name.startswith(family) for name in shown)] == []
    labels = set(re.findall(r"by \((\w+)\)|\{(\w+)=~", " ".join(queries())))
    known = set(re.findall(r"(\w+)=\"", text))
    assert {name for pair in labels for name in pair if name} <= known


def test_prometheus_can_read_the_queries(tmp_path: Path) -> None:
    if not (PROMETHEUS / "promtool").exists():
        pytest.skip("there is no Prometheus; `make setup-prometheus` unpacks one")
    filled = [
        query.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$route", ".*") for query in queries()
    ]
    rules = [{"record": f"query_{n}", "expr": query} for n, query in enumerate(filled)]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    checked = subprocess.run([PROMETHEUS / "promtool", "check", "rules", path], capture_output=True, encoding="utf-8")
    assert checked.returncode == 0, checked
    # The file with the key is on the machine that scrapes.
    config = DEPLOY / "prometheus" / "prometheus.yml"
    (tmp_path / "blip2.key").write_text("a-key-of-a-test-0123")
    shutil.copy(config, tmp_path)
    checked = subprocess.run(
        [PROMETHEUS / "promtool", "check", "config", tmp_path / config.name], capture_output=True, encoding="utf-8"
    )
    assert checked.returncode == 0, checked


def test_flags_and_variables_are_those_of_the_program() -> None:
    text = subprocess.run([ENGINE, "serve", "--help"], capture_output=True, encoding="utf-8", check=True).stdout
    flags, variables = set(re.findall(r"--[a-z][a-z-]+", text)), set(re.findall(r"\[env: (\w+)=", text))
    assert len(flags) > 15 and len(variables) > 8
    container = deployment()["containers"][0]
    commands = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    commands += [line for path in IMAGES for line in path.read_text().splitlines() if line.startswith("ENTRYPOINT")]
    commands += container["args"]
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(commands)))
    assert {"--config", "--drain"} <= used <= flags, used - flags
    named = set(re.findall(r"\bBLIP2_\w+", "".join(path.read_text() for path in [UNIT, *IMAGES, *MANIFESTS])))
    assert {"BLIP2_KEYS", "BLIP2_LISTEN", "BLIP2_MODEL"} <= named <= variables, named - variables


def checked(settings: str, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "serve.toml"
    path.write_text(settings)
    done = subprocess.run([ENGINE, "serve", "--config", path, "--check"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return tomllib.loads(done.stdout)


def test_settings_and_keys_hold(tmp_path: Path) -> None:
    settings = (
        (DEPLOY / "kubernetes" / "serve.toml").read_text().replace("/models/demo-opt", str(ROOT / "tests/bundles/t5"))
    )
    found = checked(settings, tmp_path)
    assert found["log"]["format"] == "json"
    container = deployment()["containers"][0]
    ports = {port["containerPort"] for port in container["ports"]}
    assert {int(found[name].rpartition(":")[2]) for name in ("listen", "admin_listen")} == ports
    assert deployment()["terminationGracePeriodSeconds"] > found["drain_s"] + 5
    stop = int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.M)[1])
    assert stop > int(re.search(r"--drain (\d+)", UNIT.read_text())[1])
    keys = tmp_path / "keys.toml"
    keys.write_text(documents(DEPLOY / "kubernetes" / "keys.example.yaml")[0]["stringData"]["keys.toml"])
    with serve("--keys", str(keys), bundles=("t5",)) as server:
        assert server.ask("/v1/models")[0] == 401


def test_probes_ask_for_what_there_is(server: Server) -> None:
    container = deployment()["containers"][0]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert [server.ask(path)[0] for path in probes] == [200, 200, 200]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.suffix)
def test_images_copy_what_is_there_and_know_when_they_are_ready(server: Server, path: Path) -> None:
    text = path.read_text()
    copied = [name for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M) for name in line.split()]
    assert len(copied) > 6 and [name for name in copied if not (ROOT / name).exists()] == []
    command = json.loads(re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.M)[1])
    assert re.search(r"^USER [1-9]", text, re.M) and "127.0.0.1/8000" in command[-1]
    port = server.url.rpartition(":")[2]
    for ready, there in ((0, port), (1, "1")):
        asked = [*command[:-1], command[-1].replace("/8000", f"/{there}")]
        assert min(subprocess.run(asked, capture_output=True).returncode, 1) == ready
    elsewhere = [*command[:-1], command[-1].replace("/8000", f"/{port}").replace("/health/ready", "/health/nothing")]
    assert subprocess.run(elsewhere, capture_output=True).returncode != 0


def test_onnx_runtime_is_of_one_version() -> None:
    version = re.search(r"^onnxruntime==(\S+)", (ROOT / "export" / "runtime.txt").read_text(), re.M)[1]
    for name in ("cuda.in", "cuda.txt"):
        assert re.search(rf"^onnxruntime-gpu(\[.*\])?=={re.escape(version)}\b", (DEPLOY / name).read_text(), re.M), name


def test_manifests_belong_together() -> None:
    for path in MANIFESTS:
        assert all(document["kind"] for document in documents(path)), path
    listed = documents(DEPLOY / "kubernetes" / "kustomization.yaml")[0]["resources"]
    assert {path.name for path in MANIFESTS} - set(listed) == {"hpa.yaml", "keys.example.yaml", "kustomization.yaml"}
    labels = documents(DEPLOY / "kubernetes" / "deployment.yaml")[0]["spec"]["template"]["metadata"]["labels"]
    assert documents(DEPLOY / "kubernetes" / "service.yaml")[0]["spec"]["selector"] == labels
    assert documents(DEPLOY / "kubernetes" / "disruption.yaml")[0]["spec"]["selector"]["matchLabels"] == labels
    if not shutil.which("kubectl"):
        pytest.skip("there is no kubectl to put them together")
    built = subprocess.run(
        ["kubectl", "kustomize", DEPLOY / "kubernetes"], capture_output=True, encoding="utf-8", check=True
    )
    kinds = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert set(kinds) == {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}
    mounted = kinds["Deployment"]["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    assert mounted == kinds["ConfigMap"]["metadata"]["name"]


def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/blip2/blip2", str(ENGINE)))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, encoding="utf-8")
    assert found.returncode == 0 and unit.name not in found.stderr, found
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
    assert subprocess.run(command, capture_output=True).returncode == 0
