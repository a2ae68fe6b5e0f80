"""Secrets at rest: sealed with one key, opened with any."""

import secrets

import pytest
from cryptography.fernet import Fernet

from core.errors import DeploymentError
from core.sealing import Sealer, new_key
from core.settings import Settings, load_settings

SECRET_KEY = "a secret of thirty-two characters"
SECRET = secrets.token_bytes(32)


def _settings(*encryption_keys: str, secret_key: str = SECRET_KEY) -> Settings:
    return load_settings(
        database_url="postgresql://localhost/db",
        redis_url="redis://localhost/0",
        secret_key=secret_key,
        encryption_keys=",".join(encryption_keys),
    )


def _sealer(*encryption_keys: str, secret_key: str = SECRET_KEY) -> Sealer:
    return Sealer(_settings(*encryption_keys, secret_key=secret_key))


def test_what_is_sealed_is_opened_and_shows_nothing() -> None:
    sealer = _sealer(new_key())
    sealed = sealer.seal(SECRET)
    assert sealer.open(sealed) == SECRET
    assert SECRET not in sealed
    assert sealed != sealer.seal(SECRET)


def test_the_first_key_seals_and_each_opens() -> None:
    first, second = new_key(), new_key()
    sealed = _sealer(first, second).seal(SECRET)
    assert Fernet(first).decrypt(sealed) == SECRET
    assert _sealer(second, first).open(sealed) == SECRET
    assert _sealer(first, second).is_current(sealed)
    assert not _sealer(second, first).is_current(sealed)


def test_without_a_key_one_is_made_of_the_secret_key_alone() -> None:
    sealed = _sealer().seal(SECRET)
    assert _sealer().open(sealed) == SECRET
    assert _sealer(new_key()).open(sealed) == SECRET  # from the day on which a key is named
    assert not _sealer(new_key()).is_current(sealed)
    with pytest.raises(DeploymentError):
        _sealer(secret_key="another secret of thirty-two characters").open(sealed)


def test_what_no_key_opens_names_the_setting_to_mend() -> None:
    former = new_key()
    sealed = _sealer(former).seal(SECRET)
    for wrong in (sealed, sealed[:-1], b"", b"x" * 200):
        with pytest.raises(DeploymentError, match="UPSCALED_ENCRYPTION_KEYS"):
            _sealer(new_key()).open(wrong)


def test_what_was_changed_is_not_opened() -> None:
    sealer = _sealer()
    sealed = bytearray(sealer.seal(SECRET))
    sealed[30] ^= 1
    with pytest.raises(DeploymentError):
        sealer.open(bytes(sealed))


def test_what_the_release_before_stored_is_read_as_it_is() -> None:
    assert _sealer().open(SECRET) == SECRET
    assert not _sealer().is_current(SECRET)


@pytest.mark.parametrize(
    "wrong",
    ["no key at all", "!" * 43 + "=", "é" * 43 + "=", Fernet.generate_key().decode()[:-1], f"{new_key()}x"],
    ids=["words", "no base64", "no ASCII", "too short", "too long"],
)
def test_a_wrong_key_is_named_and_never_shown(wrong: str) -> None:
    with pytest.raises(DeploymentError, match=r"UPSCALED_ENCRYPTION_KEYS: .*new-key") as caught:
        _settings(new_key(), wrong)
    assert wrong not in str(caught.value)


def test_a_key_is_not_part_of_what_is_printed() -> None:
    key = new_key()
    assert key not in repr(_settings(key))
