"""docker-compose.yml and the images: what they say is read, and the commands they start run as plain processes.

No container engine is asked for. What a process finds in its container is laid out for it: its command, its
environment, an empty folder to start in, and no package but those of its image.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib.metadata import distribution, packages_distributions
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from cli.embedded import Postgres
from cli.main import cli
from cli.processes import die_with_parent, stop
from cli.upscale import free_port
from core.settings import PREFIX, Settings
from tests.requests import body_of, png
from tests.web import Web

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
EXAMPLE = (DOCKER / ".env.example").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECRETS = {"POSTGRES_PASSWORD": "aa" * 32, "REDIS_PASSWORD": "bb" * 32, "UPSCALED_SECRET_KEY": "cc" * 32}
DOCKERFILES = ("api.Dockerfile", "worker.Dockerfile")

Services = dict[str, dict[str, Any]]


def interpolated(text: str, environ: Mapping[str, str]) -> str:
    """Fill in `${NAME:-default}` and `${NAME:?complaint}` as Compose does; an empty value counts as none."""

    def fill_in(found: re.Match[str]) -> str:
        if not environ.get(found["name"]) and found["rule"] == ":?":
            raise LookupError(found["name"])
        return environ.get(found["name"]) or found["word"]

    return re.sub(r"\$\{(?P<name>\w+)(?P<rule>:[-?])(?P<word>[^}]*)\}", fill_in, text)


def services_for(environ: Mapping[str, str]) -> Services:
    return yaml.safe_load(interpolated(COMPOSE, environ))["services"]


SERVICES = services_for(SECRETS)
OURS = [name for name, service in SERVICES.items() if "build" in service]


def environment_of(service: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a container gets: a variable without a value is handed through, or absent."""
    given: dict[str, str | None] = service["environment"]
    values = {name: environ.get(name) if value is None else value for name, value in given.items()}
    return {name: value for name, value in values.items() if value is not None}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments, in order."""
    text = re.sub(r"^#.*\n", "", (DOCKER / dockerfile).read_text(), flags=re.MULTILINE).replace("\\\n", "")
    lines = (line.partition(" ") for line in text.splitlines() if line)
    return [(name, arguments.strip()) for name, _, arguments in lines]


def distributions_of(requirements: Iterable[str]) -> set[str]:
    """Return the names of all that comes with these requirements, as far as it is installed here."""
    pending = [(Requirement(text), "") for text in requirements]
    known: set[tuple[str, str]] = set()
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {(name, extra) for extra in ("", *requirement.extras)} - known:
            known.add(wanted)
            pending += [(Requirement(text), wanted[1]) for text in distribution(name).requires or ()]
    return {name for name, _ in known}


API_IMAGE = distributions_of(PROJECT["dependencies"])
WORKER_IMAGE = distributions_of(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["worker"])


# What the files say ---------------------------------------------------------------------------------------------------


def test_every_setting_can_be_given_in_the_compose_file_and_no_other() -> None:
    assert set(re.findall(rf"{PREFIX}\w+", COMPOSE)) == {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", OURS)
def test_every_process_is_given_the_same_settings(name: str) -> None:
    assert SERVICES[name]["environment"] == SERVICES["api"]["environment"]


@pytest.mark.parametrize("name", SECRETS)
def test_nothing_starts_without_a_secret(name: str) -> None:
    absent = {other: value for other, value in SECRETS.items() if other != name}
    for environ in (absent, {**absent, name: ""}):
        with pytest.raises(LookupError, match=name):
            services_for(environ)


def test_the_example_names_every_secret_and_gives_none() -> None:
    lines = [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")]
    assert sorted(lines) == sorted(f"{name}=" for name in SECRETS)
    assert set(re.findall(r"\$\{(\w+):\?", COMPOSE)) == set(SECRETS)
    assert "openssl rand -hex 32" in EXAMPLE


def test_the_servers_ask_for_the_passwords_that_the_processes_are_given() -> None:
    ours = environment_of(SERVICES["api"], {})
    servers = environment_of(SERVICES["postgres"], {})
    database = urlsplit(ours["UPSCALED_DATABASE_URL"])
    assert (database.hostname, database.username, database.password, database.path) == (
        *("postgres", servers["POSTGRES_USER"], servers["POSTGRES_PASSWORD"]),
        f"/{servers['POSTGRES_DB']}",
    )
    hints, command = urlsplit(ours["UPSCALED_REDIS_URL"]), SERVICES["redis"]["command"]
    assert (hints.hostname, hints.password) == ("redis", command[command.index("--requirepass") + 1])
    assert {database.password, hints.password, ours["UPSCALED_SECRET_KEY"]} == set(SECRETS.values())


def test_only_the_api_can_be_reached_and_only_from_this_machine_unless_told_otherwise() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "api": ["127.0.0.1:8000:8000"]
    }
    assert SERVICES["api"]["command"][-4:] == ["--host", "0.0.0.0", "--port", "8000"]


@pytest.mark.parametrize("name", OURS)
def test_a_process_of_ours_writes_to_storage_and_tmp_only_and_has_no_powers(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    storage = [] if name == "migrate" else [f"storage:{service['environment']['UPSCALED_STORAGE_DIR']}"]
    in_memory, on_disk = ([], ["scratch:/tmp"]) if name == "worker" else (["/tmp"], [])
    assert (service["tmpfs"], service["volumes"]) == (in_memory, storage + on_disk)


@pytest.mark.parametrize("name", [name for name in OURS if name != "migrate"])
def test_a_process_starts_after_the_migration_has_succeeded(name: str) -> None:
    assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_the_gpu_goes_to_a_service_that_exists() -> None:
    override = yaml.safe_load((DOCKER / "docker-compose.gpu.yml").read_text())
    assert list(override["services"]) == ["worker"]
    assert "worker" in SERVICES


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_copies_what_the_repository_has_and_the_build_is_shown(dockerfile: str) -> None:
    ignored, *shown = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    allowed = {line.removeprefix("!") for line in shown if line.startswith("!")}
    copied = {
        source
        for name, arguments in instructions(dockerfile)
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied <= allowed | {"."}
    assert all((ROOT / path).exists() for path in allowed)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*packages["packages"], PROJECT["readme"], *PROJECT["license-files"]} <= allowed


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_runs_its_processes_as_nobody_in_particular(dockerfile: str) -> None:
    users = [arguments for name, arguments in instructions(dockerfile) if name == "USER"]
    assert users == ["10001:10001"]


def test_both_images_are_made_the_same_way_but_for_what_they_install_and_start() -> None:
    api, worker = ([line for line in instructions(name) if line[0] not in ("EXPOSE", "CMD")] for name in DOCKERFILES)
    spandrel = "    && pip --python /opt/upscaled/bin/python install --constraint constraints.txt --no-deps spandrel "
    same = [(name, text.replace("'.[worker]'", ".").replace(spandrel, "")) for name, text in worker]
    assert same == api
    assert api != worker


def test_every_command_is_one_that_upscaled_knows() -> None:
    commands = [SERVICES[name]["command"] for name in OURS]
    commands += [json.loads(text) for file in DOCKERFILES for name, text in instructions(file) if name == "CMD"]
    assert {program for program, *_ in commands} == {"upscaled"}
    for _, command, *options in commands:
        cli.commands[command].make_context(command, options)


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_built_from_a_dockerfile_that_is_there(name: str) -> None:
    build = SERVICES[name]["build"]
    assert build["context"] == "."
    assert build["dockerfile"] == f"deploy/docker/{'worker' if name == 'worker' else 'api'}.Dockerfile"
    assert (ROOT / build["dockerfile"]).is_file()


def test_only_the_image_of_the_worker_has_what_turns_pixels_into_more_pixels() -> None:
    heavy = {"torch", "numpy", "pillow"}
    assert API_IMAGE & {*heavy, "torchvision", "diffusers", "transformers"} == set()
    assert heavy <= WORKER_IMAGE
    assert "torchvision" not in WORKER_IMAGE


# What they start ------------------------------------------------------------------------------------------------------


class Deployment:
    """The services of the compose file as processes, with the servers of the tests in place of its own."""

    def __init__(self, folder: Path, database_url: str, redis_url: str) -> None:
        self._folder = folder
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self.home = _made(folder / "home")
        # 8000 may be taken, and only in a container does 0.0.0.0 keep the rest of the world out.
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._dotenv = SECRETS | {"UPSCALED_PUBLIC_URL": self.url, "UPSCALED_OUTBOUND_ALLOW": "127.0.0.0/8"}
        self._services = services_for(self._dotenv)
        self._replaced = {
            "UPSCALED_DATABASE_URL": database_url,
            "UPSCALED_REDIS_URL": redis_url,
            "UPSCALED_STORAGE_DIR": str(_made(folder / "storage")),
        }
        self._absent = {name: _lay_out(folder / name, image) for name, image in _IMAGES.items()}

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                die_with_parent(self._here(self._services[name]["command"])),
                cwd=self.home,
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._started[name]

    def run(self, name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in a service's container, as `docker compose exec` does."""
        return subprocess.run(
            self._here(command),
            cwd=self.home,
            env=self._environment(name),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def healthy(self, name: str) -> bool:
        kind, *command = self._services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(name, command).returncode == 0

    def running(self) -> set[str]:
        return {name for name, process in self._started.items() if process.poll() is None}

    def said(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def stop(self) -> dict[str, int]:
        """Stop what runs as `docker compose stop` does; return how each process ended."""
        stop(list(self._started.values()), patience_seconds=30)
        return {name: process.returncode for name, process in self._started.items()}

    def left_behind(self) -> list[psutil.Process]:
        sessions = {process.pid for process in self._started.values()}
        return [process for process in psutil.process_iter() if _session(process) in sessions]

    def _here(self, command: list[str]) -> list[str]:
        port, beside = str(self._port), Path(sys.executable).parent
        moved = [word.replace("8000", port).replace("0.0.0.0", "127.0.0.1") for word in command]
        return [str(beside / moved[0]), *moved[1:]]

    def _environment(self, name: str) -> dict[str, str]:
        service = self._services[name]
        image = {
            "PATH": str(Path(sys.executable).parent),
            "PYTHONPATH": str(self._absent[service["build"]["dockerfile"]]),
        }
        return image | environment_of(service, self._dotenv) | self._replaced

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


_IMAGES = {"deploy/docker/api.Dockerfile": API_IMAGE, "deploy/docker/worker.Dockerfile": WORKER_IMAGE}


def _lay_out(folder: Path, image: set[str]) -> Path:
    """Make a folder that, found first, hides every package that is installed here and not in the image."""
    folder.mkdir(parents=True)
    for package, owners in packages_distributions().items():
        present = {canonicalize_name(owner) for owner in owners} & {*image, "upscaled"}
        if not present and package.isidentifier() and not package.startswith("_"):
            (folder / f"{package}.py").write_text("raise ModuleNotFoundError(f'{__name__} is not in this image')\n")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


@pytest.fixture
def deployment(postgres: Postgres, redis_url: str, tmp_path: Path) -> Generator[Deployment]:
    postgres.create_database("deployed")
    deployment = Deployment(tmp_path, postgres.url("deployed"), redis_url)
    yield deployment
    deployment.stop()


def test_started_on_an_empty_database_the_services_carry_a_job_from_submission_to_webhook(
    deployment: Deployment, web: Web
) -> None:
    assert deployment.start("migrate").wait(60) == 0, deployment.said("migrate")
    for name in ("api", "dispatcher", "worker"):
        deployment.start(name)
    _until(lambda: deployment.healthy("api"), deployment)
    made = deployment.run("api", ["upscaled", "keys", "create", "first"])
    assert made.returncode == 0, made.stderr

    headers = {"X-API-Key": made.stdout.strip()}
    with httpx.Client(base_url=deployment.url, headers=headers, trust_env=False) as client:
        image = f"data:image/png;base64,{base64.b64encode(png(60, 40)).decode()}"
        body = body_of(image) | {"webhookUrl": web.serve("/hook")}
        accepted = client.post("/v2/images/upscale", json=body)
        assert accepted.status_code == 202, accepted.text
        where = accepted.headers["Location"]
        _until(lambda: client.get(where).json()["status"] not in ("QUEUED", "PROCESSING"), deployment)
        job = client.get(where).json()
        assert job["status"] == "COMPLETED", job
        result = client.get(job["result"]["images"][0])
    assert Image.open(BytesIO(result.content)).size == (120, 80)
    _until(lambda: any(seen.path == "/hook" for seen in web.seen), deployment)

    assert deployment.running() == {"api", "dispatcher", "worker"}
    # uvicorn passes the signal on to itself once it has ended its work: in a container that is status 143.
    assert deployment.stop() == {"migrate": 0, "api": -signal.SIGTERM, "dispatcher": 0, "worker": 0}
    assert deployment.left_behind() == []
    assert list(deployment.home.iterdir()) == []


def _until(holds: Callable[[], bool], deployment: Deployment) -> None:
    give_up_at = time.monotonic() + 60
    while not holds():
        up_and_in_time = deployment.running() == {"api", "dispatcher", "worker"} and time.monotonic() < give_up_at
        assert up_and_in_time, [deployment.said(name) for name in ("api", "dispatcher", "worker")]
        time.sleep(0.1)
