"""The image, the Compose file and the Makefile, as far as they can be tested without Docker.

The Dockerfile's instructions are carried out in a folder, and what the services run is run there, on a real
Postgres. ``test_kubernetes.py`` looks at the manifests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from psycopg.conninfo import conninfo_to_dict
from ruamel.yaml import YAML

from persistence.backends import embedded
from persistence.dsn import Dsn
from tests.support import ROOT, Result, clean_environment

BIN = Path(sys.executable).parent
SECRET = "/run/secrets/persistence_dsn"


def load(path: Path) -> Any:
    """A YAML file; more than one document as a list."""
    documents = list(YAML(typ="safe").load_all(path.read_text()))
    return documents if len(documents) > 1 else documents[0]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile, as pairs of an instruction and the rest of its line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def instruction(word: str) -> str:
    """The last instruction of that name."""
    return [rest for name, rest in instructions() if name == word][-1]


@dataclass(frozen=True)
class Image:
    """What the Dockerfile makes, in a folder."""

    root: Path

    def environment(self, dsn: str, variables: dict[str, str]) -> dict[str, str]:
        """A service's environment; the secret is a file here too."""
        secret = self.root / "secret"
        secret.write_text(dsn)
        return {"PATH": f"{self.root}/opt/venv/bin:{os.environ['PATH']}"} | {
            name: str(secret) if name == "PERSISTENCE_DSN_FILE" else value
            for name, value in variables.items()
        }

    def run(self, command: list[str], environment: dict[str, str]) -> Result:
        """Run a command to its end."""
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.root / "app",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    @contextmanager
    def serving(self, command: list[str], environment: dict[str, str]) -> Iterator[None]:
        """Run a service meanwhile."""
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        with subprocess.Popen([program, *command[1:]], cwd=self.root / "app", env=environment) as process:
            try:
                yield
            finally:
                process.terminate()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Carries out what the Dockerfile says; of the last stage only the copying, as its commands need root."""
    root = tmp_path_factory.mktemp("image")
    folder, stage = root, 0
    stages = sum(word == "FROM" for word, _ in instructions())
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in instructions():
        if word == "FROM":
            stage += 1
        elif word == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir()
        elif word == "COPY" and "--from" not in rest:
            *sources, target = rest.split()
            for source in sources:
                assert f"!{source}" in allowed
                _copy(ROOT / source, folder / target / ("" if len(sources) == 1 else source))
        elif word == "RUN" and stage < stages:
            command = rest.replace("/opt/venv", f"{root}/opt/venv")
            environment = clean_environment() | {"PATH": f"{BIN}:{os.environ['PATH']}"}
            subprocess.run(["sh", "-c", command], cwd=folder, env=environment, check=True, timeout=300)
    return Image(root)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def compose() -> Any:
    """The Compose file."""
    return load(ROOT / "docker-compose.yml")


def interpolate(text: str, **variables: str) -> str:
    """As Compose does for ``${NAME:-default}``."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1], found[2]), text)


@pytest.mark.parametrize(
    ("schema", "path"), [("compose-spec", "docker-compose.yml"), ("dependabot", ".github/dependabot.yml")]
)
def test_file_fits_the_published_schema(schema: str, path: str) -> None:
    result = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", f"vendor.{schema}", ROOT / path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_services_wait_for_each_other(compose: Any) -> None:
    services = compose["services"]
    healthy = {"condition": "service_healthy"}
    migrated = {"condition": "service_completed_successfully"}
    assert services["migrate"]["depends_on"] == {"postgres": healthy}
    assert services["app"]["depends_on"] == {"migrate": migrated}
    assert services["pgbouncer"]["depends_on"] == {"postgres": healthy}
    assert services["app-pgbouncer"]["depends_on"] == {"migrate": migrated, "pgbouncer": healthy}
    assert {name for name, service in services.items() if "profiles" not in service} == {
        "postgres",
        "migrate",
        "app",
    }


def test_ports_are_open_to_this_machine_only(compose: Any) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("password", ["persistence", "p@ss/w%rd?&=#1"])
def test_services_find_each_other(compose: Any, password: str) -> None:
    """A DSN is in the file that the environment names, and leads to a service."""
    services = compose["services"]
    for name, host, port in (("app", "postgres", 5432), ("app-pgbouncer", "pgbouncer", 6432)):
        (mounted,) = services[name]["configs"]
        assert mounted["target"] == services[name]["environment"]["PERSISTENCE_DSN_FILE"] == SECRET
        dsn = Dsn.parse(
            interpolate(compose["configs"][mounted["source"]]["content"], POSTGRES_PASSWORD=password)
        )
        found = conninfo_to_dict(str.__str__(dsn.conninfo))
        assert (found["host"], str(found.get("port", 5432))) == (host, str(port))
        assert found["user"] == services["postgres"]["environment"]["POSTGRES_USER"]
        assert found["dbname"] == services["postgres"]["environment"]["POSTGRES_DB"]
        assert found["password"] == password
        assert dsn.options.get("pgbouncer", False) == (host == "pgbouncer")
    assert services["migrate"]["configs"] == services["app"]["configs"]
    assert interpolate(compose["configs"]["password"]["content"], POSTGRES_PASSWORD=password) == password
    assert "PASSWORD" not in json.dumps([s.get("environment") for s in services.values()]).replace(
        "POSTGRES_PASSWORD_FILE", ""
    )


def test_services_run(image: Image, compose: Any, postgres_dsn: str) -> None:
    """The very commands of Compose and Kubernetes, with another port and another DSN."""
    services = compose["services"]
    job = load(ROOT / "docs" / "kubernetes" / "migrate.yaml")["spec"]["template"]["spec"]
    pod = load(ROOT / "docs" / "kubernetes" / "app.yaml")[0]["spec"]["template"]["spec"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def elsewhere(command: str) -> list[str]:
        words: list[str] = json.loads(command.replace("8000", port))
        return words

    health = elsewhere(instruction("HEALTHCHECK").partition("CMD ")[2])
    environment = image.environment(postgres_dsn, services["app"]["environment"])
    (migrate,), (app,) = job["containers"], pod["containers"]
    assert migrate["command"] == services["migrate"]["command"]
    assert app["command"] == json.loads(instruction("CMD"))

    ready, alive = (app[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe"))
    with (
        image.serving(elsewhere(instruction("CMD")), environment),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        _wait_for(client, alive)
        assert client.get(ready).json()["problem"]["code"] == "schema"
        assert image.run(health, environment).returncode == 1
        migrated = image.run(services["migrate"]["command"], environment)
        assert migrated.returncode == 0, migrated.stderr
        _wait_for(client, ready)
        assert image.run(health, environment).returncode == 0
        answer = client.post("/threads/alice", json={"text": "3 nights in Lisbon"}).json()
        assert answer["waiting_for_answer"] == ["3 nights in Lisbon cost 241.5. Book?"]


def _wait_for(client: httpx.Client, path: str) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize("service", ["postgres", "pgbouncer"])
def test_healthcheck_of_the_server(compose: Any, postgres_dsn: str, service: str) -> None:
    server = conninfo_to_dict(str.__str__(Dsn.parse(postgres_dsn).conninfo))
    here = {
        "127.0.0.1": server["host"],
        "5432": server.get("port", "5432"),
        "6432": server.get("port", "5432"),
    }
    _, program, *arguments = compose["services"][service]["healthcheck"]["test"]
    command = [embedded.BIN / program, *(str(here.get(word, word)) for word in arguments)]
    assert subprocess.run(command, timeout=30).returncode == 0
    command[command.index("-p") + 1] = "1"
    assert subprocess.run(command, timeout=30).returncode == 2


def test_dockerfile_is_linted() -> None:
    result = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_image_drops_root_and_is_pinned(compose: Any) -> None:
    words = [word for word, _ in instructions()]
    assert int(instruction("USER")) >= 1000
    assert words[words.index("USER") :] == ["USER", "EXPOSE", "HEALTHCHECK", "CMD"]
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    bases += re.findall(r"--from=(\S+/\S+)", (ROOT / "Dockerfile").read_text())
    others = [service["image"] for service in compose["services"].values() if "build" not in service]
    assert len(bases) == 3 and len(others) == 2
    assert all(re.search(r":v?\d+\.\d+", name) for name in bases + others), bases + others


def test_pinned_packages_are_what_the_project_asks_for() -> None:
    """``make lock`` was run after the requirements had changed."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    project = document["project"]
    asked = project["dependencies"] + document["dependency-groups"]["service"]
    for extra in ("postgres", "encryption", "serve"):
        asked += project["optional-dependencies"][extra]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for requirement in map(Requirement, asked):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version), f"{requirement}: make lock"


class TestMakefile:
    """What can be seen without making an environment; CI itself runs in one that make made."""

    def make(self, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
        """Run make in the checkout."""
        return subprocess.run(
            ["make", *arguments],
            cwd=ROOT,
            env={"PATH": path, "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_help_lists_the_targets(self) -> None:
        listed = re.findall(r"make (\w+)", self.make("help").stdout)
        assert {"demo", "test", "lint", "bench", "docs", "clean"} <= set(listed)

    def test_no_python_is_said_clearly(self, tmp_path: Path) -> None:
        for name in ("sh", "sed", "expand"):
            (tmp_path / name).symlink_to(f"/bin/{name}")
        result = subprocess.run(
            ["/bin/sh", ROOT / "tools" / "make_venv.sh", tmp_path / "venv"],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 1
        assert "3.11" in result.stderr
        assert not (tmp_path / "venv").exists()
