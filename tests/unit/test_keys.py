"""The form of API keys: what of it can be told without asking the database."""

import re
import zlib
from datetime import timedelta
from uuid import uuid4

import click
import pytest

from cli.keys import read_lifetime
from db import keys
from db.keys import KeyRecord
from db.models import Scope

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_key_has_the_form_that_is_documented() -> None:
    key = keys.mint()
    assert re.fullmatch("upk_[0-9A-Za-z]{38}", key)
    value = 0
    for digit in key[-6:]:
        value = value * 62 + DIGITS.index(digit)
    assert value == zlib.crc32(key[:-6].encode())
    assert keys.is_well_formed(key)


def test_a_key_of_another_maker_with_the_same_rules_is_well_formed() -> None:
    assert keys.is_well_formed("upk_" + "0" * 32 + "0mXmTM")


def test_no_two_keys_are_the_same_and_every_character_is_drawn() -> None:
    made = [keys.mint() for _ in range(500)]
    assert len(set(made)) == 500
    for position in range(4, 36):
        assert len({key[position] for key in made}) > 40


def test_a_key_with_one_wrong_character_is_refused_wherever_it_is() -> None:
    key = keys.mint()
    for position, character in enumerate(key):
        other = DIGITS[(DIGITS.find(character) + 1) % len(DIGITS)]
        assert not keys.is_well_formed(key[:position] + other + key[position + 1 :])


@pytest.mark.parametrize(
    "key",
    [
        "",
        "upk_",
        "upk_" + "a" * 40,  # as keys were before they had checksums
        "upk_" + "0" * 32 + "0mXmTM\n",
        " upk_" + "0" * 32 + "0mXmTM",
        "upk_" + "٠" * 32 + "0mXmTM",
        "upk_" + "0" * 31 + "0mXmTM",
        "UPK_" + "0" * 32 + "0mXmTM",
    ],
)
def test_what_has_another_form_is_no_key(key: str) -> None:
    assert not keys.is_well_formed(key)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ([Scope.JOBS_READ], {Scope.JOBS_READ}),
        ([Scope.JOBS_WRITE], {Scope.JOBS_WRITE}),
        ([Scope.JOBS_WRITE, Scope.JOBS_READ], {Scope.JOBS_WRITE, Scope.JOBS_READ}),
        ([Scope.ADMIN], set(Scope)),
        ([], set[Scope]()),
    ],
)
def test_a_key_may_do_what_its_scopes_say_and_an_admin_s_anything(scopes: list[Scope], allowed: set[Scope]) -> None:
    record = KeyRecord(
        id=uuid4(),
        name="k",
        prefix="upk_",
        active=True,
        has_digest=False,
        scopes=frozenset(scopes),
        requests_per_minute=None,
        daily_pixels=None,
    )
    assert {scope for scope in Scope if record.may(scope)} == allowed


def test_a_lifetime_is_a_number_and_a_unit() -> None:
    assert read_lifetime(None) is None
    assert [read_lifetime(given) for given in ("90d", "12h", "30m")] == [
        *(timedelta(days=90), timedelta(hours=12), timedelta(minutes=30)),
    ]


@pytest.mark.parametrize("given", ["", "90", "d", "0d", "-1d", "1w", "1.5h", "90d ", "100000d", "٣d"])
def test_another_lifetime_is_refused(given: str) -> None:
    with pytest.raises(click.BadParameter, match="90d"):
        read_lifetime(given)
