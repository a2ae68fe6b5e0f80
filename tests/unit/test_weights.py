"""Weights: fetched from a hub that a test plays on loopback, and checked against manifest, hub and record."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from cli.main import cli
from core.errors import DeploymentError
from worker.upscaler import weights
from worker.upscaler.weights import MANIFEST, Commercial, Entry, File, Role

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"width": 8}'
WEIGHTS = bytes(range(256)) * 512


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(*files: File) -> Entry:
    return Entry(
        name="base", role=Role.BASE, files=files, licence="MIT", commercial=Commercial.YES, remark="Keep the notice."
    )


class Hub:
    """Answers like the Hugging Face Hub: `files` by path of one repository, at any revision."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {"config.json": CONFIG, "unet/model.safetensors": WEIGHTS}
        self.etags: dict[str, str] = {}
        """Promised hashes, where they are not the files' own."""
        self.cuts: list[int] = []
        """After how many bytes each of the next downloads breaks off."""
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and range."""

    def downloads(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET"]

    def etag(self, name: str) -> str:
        """What is stored apart because it is large has its SHA-256 for a tag, what git has its own hash."""
        own = sha256(self.files[name]) if name.endswith(".safetensors") else hashlib.sha1(self.files[name]).hexdigest()  # noqa: S324
        return self.etags.get(name, own)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            asked = self.headers.get("Range")
            hub.asked.append((self.command, self.path, asked))
            found = re.fullmatch(r"/maker/model/resolve/(\w+)/(.+)", self.path)
            if found is None or found[2] not in hub.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            content = hub.files[found[2]]
            self.send_response(206 if asked else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hub.etag(found[2])}"')
            self.send_header("Content-Length", str(len(content) - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if with_body:
                self.wfile.write(content[start : start + hub.cuts.pop(0)] if hub.cuts else content[start:])

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", _no_pause)  # between attempts
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def _no_pause(_: float) -> None:
    pass


CONFIG_FILE = File("maker/model", COMMIT, "config.json", len(CONFIG), sha256(CONFIG))
WEIGHTS_FILE = File("maker/model", COMMIT, "unet/model.safetensors", len(WEIGHTS), sha256(WEIGHTS))
BASE = entry(CONFIG_FILE, WEIGHTS_FILE)
UNKNOWN = entry(*(File(file.hub, "main", file.path) for file in BASE.files))
"""The same, of which the manifest knows neither sizes nor hashes."""


# Pulling --------------------------------------------------------------------------------------------------------------


def test_what_is_pulled_lies_where_it_is_looked_for_and_is_as_it_should_be(hub: Hub, tmp_path: Path) -> None:
    assert not weights.is_installed(tmp_path, BASE)
    announced: list[File] = []
    weights.pull(tmp_path, BASE, announced.append)
    assert announced == list(BASE.files)
    assert (tmp_path / "base/unet/model.safetensors").read_bytes() == WEIGHTS
    assert weights.is_installed(tmp_path, BASE)
    assert weights.verify(tmp_path, BASE) == []
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["config.json", weights.RECORD, "unet"]


def test_only_the_files_that_are_named_are_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.bin"] = b"a pickle"
    weights.pull(tmp_path, BASE)
    prefix = f"/maker/model/resolve/{COMMIT}"
    assert {path for _, path, _ in hub.asked} == {f"{prefix}/config.json", f"{prefix}/unet/model.safetensors"}


def test_a_file_can_be_installed_under_another_name(hub: Hub, tmp_path: Path) -> None:
    moved = entry(replace(WEIGHTS_FILE, installed="model.safetensors"))
    weights.pull(tmp_path, moved)
    assert (tmp_path / "base/model.safetensors").read_bytes() == WEIGHTS
    assert weights.is_installed(tmp_path, moved)
    assert weights.verify(tmp_path, moved) == []


@pytest.mark.parametrize("pulled", [BASE, UNKNOWN])
def test_what_is_there_already_is_not_fetched_again(hub: Hub, tmp_path: Path, pulled: Entry) -> None:
    weights.pull(tmp_path, pulled)
    hub.asked.clear()
    weights.pull(tmp_path, pulled)
    assert hub.asked == []


def test_a_pull_goes_on_where_an_earlier_one_failed(hub: Hub, tmp_path: Path) -> None:
    del hub.files["unet/model.safetensors"]
    with pytest.raises(DeploymentError):
        weights.pull(tmp_path, BASE)
    hub.files["unet/model.safetensors"] = WEIGHTS
    hub.asked.clear()
    weights.pull(tmp_path, BASE)
    assert [path.rpartition("/")[2] for path in hub.downloads()] == ["model.safetensors"]
    assert weights.verify(tmp_path, BASE) == []


def test_a_download_that_breaks_off_goes_on_from_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cuts = [1000]
    weights.pull(tmp_path, entry(WEIGHTS_FILE))
    assert [asked for method, _, asked in hub.asked if method == "GET"] == [None, "bytes=1000-"]
    assert (tmp_path / "base/unet/model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_never_gets_on_ends_in_one_sentence_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = [1000, *[0] * 20]
    with pytest.raises(DeploymentError, match=r"unet/model\.safetensors cannot be pulled: .+\.$") as caught:
        weights.pull(tmp_path, BASE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base/unet/model.safetensors").exists()


def test_a_file_that_is_damaged_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    weights.pull(tmp_path, BASE)
    (tmp_path / "base/unet/model.safetensors").write_bytes(WEIGHTS[::-1])
    weights.pull(tmp_path, BASE)
    assert weights.verify(tmp_path, BASE) == []


@pytest.mark.parametrize("wrong", [{"sha256": sha256(b"others")}, {"size": len(WEIGHTS) + 1}])
def test_a_file_that_is_not_that_of_the_manifest_never_takes_its_place(
    hub: Hub, tmp_path: Path, wrong: dict[str, object]
) -> None:
    other = entry(replace(WEIGHTS_FILE, **wrong))
    with pytest.raises(DeploymentError, match="is not what was expected") as caught:
        weights.pull(tmp_path, other)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base/unet/model.safetensors").exists()
    assert not weights.is_installed(tmp_path, other)


def test_what_came_damaged_is_not_taken_for_what_has_come(hub: Hub, tmp_path: Path) -> None:
    hub.files["unet/model.safetensors"] = WEIGHTS[::-1]
    with pytest.raises(DeploymentError, match="is not what was expected"):
        weights.pull(tmp_path, BASE)
    hub.files["unet/model.safetensors"] = WEIGHTS
    weights.pull(tmp_path, BASE)
    assert weights.verify(tmp_path, BASE) == []


def test_a_folder_that_cannot_be_written_to_ends_in_one_sentence(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/.incoming").touch()
    with pytest.raises(DeploymentError, match=r"config\.json cannot be pulled: ") as caught:
        weights.pull(tmp_path, BASE)
    assert "\n" not in str(caught.value)


def test_without_the_workers_packages_pulling_says_what_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DeploymentError, match=r"upscaled\[worker\]"):
        weights.pull(tmp_path, BASE)


def test_where_the_manifest_knows_no_hash_that_of_the_hub_counts(hub: Hub, tmp_path: Path) -> None:
    hub.etags["unet/model.safetensors"] = sha256(b"others")
    with pytest.raises(DeploymentError, match=f"not {sha256(b'others')}"):
        weights.pull(tmp_path, UNKNOWN)
    del hub.etags["unet/model.safetensors"]
    weights.pull(tmp_path, UNKNOWN)
    assert weights.verify(tmp_path, UNKNOWN) == []


def test_a_file_that_is_not_there_ends_in_one_sentence_with_its_address(hub: Hub, tmp_path: Path) -> None:
    del hub.files["config.json"]
    address = re.escape(f"{hub.url}/maker/model/resolve/{COMMIT}/config.json")
    with pytest.raises(DeploymentError, match=f"^{address} cannot be pulled: the hub answered 404.$"):
        weights.pull(tmp_path, BASE)


def test_a_hub_that_is_not_there_ends_in_one_sentence_and_what_is_installed_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = tmp_path / "base/config.json"
    by_hand.parent.mkdir()
    by_hand.write_bytes(b"{}")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(DeploymentError, match=r"^http://127\.0\.0\.1:9/\S+ cannot be pulled: .*refused.*\.$") as caught:
        weights.pull(tmp_path, BASE)
    assert "\n" not in str(caught.value)
    assert by_hand.read_bytes() == b"{}"


@pytest.mark.parametrize(
    "name", ["model.bin", "model.ckpt", "model.pth", "model.pt", "run.py", "model.safetensors.pkl"]
)
def test_files_that_could_run_code_cannot_be_named(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        File("maker/model", COMMIT, name)


# Checking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pulled", [BASE, UNKNOWN])
@pytest.mark.parametrize(
    ("content", "problem"), [(None, "is missing"), (WEIGHTS[:-1], "bytes, not"), (WEIGHTS[::-1], "SHA-256")]
)
def test_what_is_missing_short_or_altered_is_found_with_and_without_the_manifests_help(
    hub: Hub, tmp_path: Path, pulled: Entry, content: bytes | None, problem: str
) -> None:
    weights.pull(tmp_path, pulled)
    file = tmp_path / "base/unet/model.safetensors"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    [found] = weights.verify(tmp_path, pulled)
    assert str(file) in found
    assert problem in found


def test_files_put_there_by_hand_are_held_against_the_manifest(tmp_path: Path) -> None:
    for file, content in zip(BASE.files, (CONFIG, WEIGHTS), strict=True):
        path = file.within(tmp_path / "base")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert weights.is_installed(tmp_path, BASE)
    assert weights.verify(tmp_path, BASE) == []
    (tmp_path / "base/config.json").write_bytes(CONFIG[:-1])
    assert not weights.is_installed(tmp_path, BASE)


def test_a_record_that_cannot_be_read_is_named(hub: Hub, tmp_path: Path) -> None:
    weights.pull(tmp_path, BASE)
    (tmp_path / "base" / weights.RECORD).write_text("{")
    with pytest.raises(DeploymentError, match=re.escape(weights.RECORD)):
        weights.verify(tmp_path, BASE)


# Finding --------------------------------------------------------------------------------------------------------------


def test_clarity_needs_base_controlnet_and_vae_and_no_base_with_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("base/unet", "base/text_encoder", "controlnet", "vae")]
    assert weights.missing(tmp_path) == weights.missing(tmp_path, "tune.safetensors") == folders
    own = tmp_path / "own"
    own.mkdir()
    assert weights.missing(tmp_path, str(own)) == folders[2:]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    assert weights.missing(tmp_path) == folders
    for folder in folders:
        (folder / "model.safetensors").touch()
    assert weights.missing(tmp_path) == []


def test_the_optional_networks_are_found_where_they_are_installed(tmp_path: Path) -> None:
    assert weights.preupscaler(tmp_path) is None
    assert weights.safety_checker(tmp_path) is None
    for name in ("preupscaler/x4.safetensors", "safety/model.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert weights.preupscaler(tmp_path) == tmp_path / "preupscaler/x4.safetensors"
    assert weights.safety_checker(tmp_path) == tmp_path / "safety"


# The manifest ---------------------------------------------------------------------------------------------------------


def test_what_is_pulled_by_default_is_one_of_each_and_may_be_used_for_money() -> None:
    defaults = [entry for entry in MANIFEST if entry.default]
    assert sorted(entry.role for entry in defaults) == sorted(Role)
    assert {entry.commercial for entry in defaults} == {Commercial.YES}
    assert all(entry.size for entry in defaults)


def test_the_manifest_is_well_formed() -> None:
    assert len({entry.name for entry in MANIFEST}) == len(MANIFEST)
    for listed in MANIFEST:
        paths = [file.within(Path(listed.name)) for file in listed.files]
        assert len(set(paths)) == len(paths)
        for file in listed.files:
            assert re.fullmatch(r"[0-9a-f]{40}|main", file.revision)
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert ".." not in Path(file.path).parts
        assert (listed.commercial is Commercial.YES) or not listed.default


@pytest.mark.parametrize("listed", [listed for listed in MANIFEST if listed.default], ids=lambda listed: listed.name)
def test_what_the_manifest_installs_is_what_is_looked_for(tmp_path: Path, listed: Entry) -> None:
    for file in listed.files:
        path = file.within(tmp_path / listed.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = {
        Role.BASE: not {tmp_path / "base/unet", tmp_path / "base/text_encoder"} & set(weights.missing(tmp_path)),
        Role.CONTROLNET: tmp_path / "controlnet" not in weights.missing(tmp_path),
        Role.VAE: tmp_path / "vae" not in weights.missing(tmp_path),
        Role.PREUPSCALER: weights.preupscaler(tmp_path) is not None,
        Role.SAFETY: weights.safety_checker(tmp_path) is not None,
    }
    assert [role for role, is_found in found.items() if is_found] == [listed.role]


def test_every_entry_is_documented_with_its_licence() -> None:
    text = (ROOT / "docs/models.md").read_text()
    for listed in MANIFEST:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{listed.name}` |"))
        assert f"| {listed.licence} | {listed.commercial} |" in row
        assert all(file.hub in row for file in listed.files)


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the commands know two entries of the hub; return the folder that they work on."""
    extra = replace(entry(CONFIG_FILE), name="extra", default=False, commercial=Commercial.UNCLEAR)
    monkeypatch.setattr("cli.models.MANIFEST", (BASE, extra))
    monkeypatch.setenv("UPSCALED_MODELS_DIR", str(tmp_path))
    for name in ("UPSCALED_DATABASE_URL", "UPSCALED_REDIS_URL", "UPSCALED_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["models", *arguments])
    return result.exit_code, result.output


def test_the_list_says_what_there_is_and_what_is_installed(manifest: Path) -> None:
    weights.pull(manifest, BASE)
    status, output = run("list")
    header, *rows = output.splitlines()
    assert status == 0
    assert header.split() == ["NAME", "ROLE", "SIZE", "LICENCE", "COMMERCIAL", "USE", "INSTALLED"]
    assert [row.split() for row in rows] == [
        ["base", "base", "131.1", "kB", "MIT", "yes", "yes"],
        ["extra", "base", "0.0", "kB", "MIT", "unclear", "no"],
    ]


def test_pull_fetches_the_default_ones_and_others_by_name(manifest: Path) -> None:
    status, output = run("pull")
    assert (status, (manifest / "base").exists(), (manifest / "extra").exists()) == (0, True, False)
    assert "licence MIT, commercial use yes. Keep the notice." in output
    assert run("pull", "extra")[0] == 0
    assert (manifest / "extra/config.json").read_bytes() == CONFIG


def test_pull_knows_no_other_names(manifest: Path) -> None:
    status, output = run("pull", "base", "../etc")
    assert status == 2
    assert "../etc" in output
    assert list(manifest.iterdir()) == []


def test_verify_ends_with_status_1_when_something_is_missing_or_wrong(manifest: Path) -> None:
    status, output = run("verify")
    assert (status, output.count("is missing")) == (1, 2)
    run("pull")
    assert run("verify")[0] == 0
    (manifest / "base/config.json").write_bytes(CONFIG[::-1])
    status, output = run("verify")
    assert status == 1
    assert "base/config.json has the SHA-256" in output


def test_a_wrong_setting_of_the_models_is_named(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSCALED_DEVICE", "gpu")
    result = CliRunner().invoke(cli, ["models", "list"])
    assert isinstance(result.exception, DeploymentError)
    assert "UPSCALED_DEVICE" in str(result.exception)


def test_the_environment_names_the_hub_and_an_unreachable_one_ends_the_command_with_one_line(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cli.main", "models", "pull", "vae"]
    python = {"PYTHONPATH": str(ROOT), "UPSCALED_MODELS_DIR": str(tmp_path / "models")}
    done = subprocess.run(command, env=environment | python, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"upscaled: http://127\.0\.0\.1:9/stabilityai/\S+ cannot be pulled: .+\.\n", done.stderr)
