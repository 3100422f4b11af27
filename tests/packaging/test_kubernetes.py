"""The Kubernetes manifests are valid, and a cluster with strict rules lets them in.

``test_deployment.py`` runs their commands.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.test_deployment import instruction, load
from tests.support import ROOT

FOLDER = ROOT / "docs" / "kubernetes"
PODS = {
    "migrate": load(FOLDER / "migrate.yaml")["spec"]["template"]["spec"],
    "app": load(FOLDER / "app.yaml")[0]["spec"]["template"]["spec"],
}


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_manifests_are_valid(version: str) -> None:
    program = Path(sys.executable).with_name("kubernetes-validate")
    result = subprocess.run(
        [program, "--strict", "-k", version, *FOLDER.glob("*.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("passed for resource") == 4


@pytest.fixture(params=list(PODS))
def pod(request: pytest.FixtureRequest) -> Any:
    return PODS[request.param]


def test_pod_runs_without_privileges(pod: Any) -> None:
    """What the Pod Security Standard ``restricted`` asks for, and a file system that nobody writes to."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == int(instruction("USER"))
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    with (ROOT / "pyproject.toml").open("rb") as file:
        release = tomllib.load(file)["project"]["version"]
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert container["image"].endswith(f"/langgraph-persistence:{release}")


def test_the_dsn_is_a_file(pod: Any) -> None:
    secret = load(FOLDER / "secret.yaml")
    (volume,) = pod["volumes"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    for container in pod["containers"]:
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        (mount,) = container["volumeMounts"]
        assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
        (key,) = secret["stringData"]
        assert environment["PERSISTENCE_DSN_FILE"] == f"{mount['mountPath']}/{key}"


def test_requests_go_to_pods_that_are_ready() -> None:
    deployment, service = load(FOLDER / "app.yaml")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    (app,) = template["spec"]["containers"]
    (port,) = app["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        assert app[probe]["httpGet"]["port"] == port["name"]
    assert app["command"][-2:] == ["--port", str(port["containerPort"])]
