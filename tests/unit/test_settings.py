"""Settings: read from the environment, and wrong ones named in one line."""

import re
from dataclasses import fields
from pathlib import Path
from typing import cast

import pytest
from pydantic.fields import FieldInfo

from core.errors import DeploymentError
from core.settings import ModelSettings, Settings, load_settings
from worker.upscaler.engines import Config

GOOD = {
    "UPSCALED_DATABASE_URL": "postgresql://me@localhost/db",
    "UPSCALED_REDIS_URL": "redis://localhost/0",
    "UPSCALED_SECRET_KEY": "a secret of thirty-two characters",
}


@pytest.fixture(autouse=True)
def _good(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)


def test_ordinary_addresses_are_enough() -> None:
    settings = load_settings()
    assert settings.database_url == "postgresql+asyncpg://me@localhost/db"
    assert settings.engine == "auto"
    assert settings.max_output_pixels == 100_000_000


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(DeploymentError, match=f"{name}: Field required"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UPSCALED_DATABASE_URL", "mysql://localhost/db"),
        ("UPSCALED_REDIS_URL", "localhost"),
        ("UPSCALED_SECRET_KEY", "too short a secret"),
        ("UPSCALED_PUBLIC_URL", "ftp://localhost"),
        ("UPSCALED_MAX_OUTPUT_PIXELS", "0"),
        ("UPSCALED_OUTBOUND_ALLOW", "10.0.0.0/8,everything"),
        ("UPSCALED_WEBHOOK_RETRY_SECONDS", "5,soon"),
        ("UPSCALED_LOG_LEVEL", "LOUD"),
        ("UPSCALED_CLARITY_PRESET", "best"),
        ("UPSCALED_CLARITY_HINT", "none"),
        ("UPSCALED_CLARITY_BATCH", "-1"),
        ("UPSCALED_CLARITY_COMPILE", "perhaps"),
        ("UPSCALED_DEVICE", "gpu"),
        ("UPSCALED_DEVICE", "cuda:one"),
        ("UPSCALED_PRECISION", "fp8"),
    ],
)
def test_a_wrong_setting_is_named_and_a_secret_never_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(DeploymentError, match=name) as caught:
        load_settings()
    assert "too short a secret" not in str(caught.value)


def test_an_engine_is_told_what_the_settings_say_and_has_the_same_defaults() -> None:
    settings = {name: field.default for name, field in ModelSettings.model_fields.items()}
    assert {field.name: field.default for field in fields(Config)} == settings


def test_every_setting_is_documented_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs/settings.md").read_text()
    rows = re.findall(r"^\| `UPSCALED_(\w+)` \| (\S+) \|", page, flags=re.MULTILINE)
    shown = {name.lower(): default for name, default in rows}
    assert len(rows) == len(shown)
    assert shown == {name: _shown(field) for name, field in Settings.model_fields.items()}


def _shown(field: FieldInfo) -> str:
    """Return a default as the page writes it."""
    value = field.default
    if field.is_required():
        return "required"
    if str(value) in ("", "()"):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, cast('tuple[object, ...]', value)))}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_lists_are_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSCALED_OUTBOUND_ALLOW", "10.0.0.0/8, fd00::/8")
    monkeypatch.setenv("UPSCALED_WEBHOOK_RETRY_SECONDS", "1,2.5")
    settings = load_settings()
    assert [str(network) for network in settings.outbound_allow] == ["10.0.0.0/8", "fd00::/8"]
    assert settings.webhook_retry_seconds == (1, 2.5)


def test_the_public_url_ends_without_a_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSCALED_PUBLIC_URL", "https://upscale.example.com/")
    assert load_settings().public_url == "https://upscale.example.com"


def test_a_secret_is_not_part_of_what_is_printed() -> None:
    assert GOOD["UPSCALED_SECRET_KEY"] not in repr(load_settings())
