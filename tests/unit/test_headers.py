"""Prefer and If-None-Match, as their RFCs allow them to be written."""

import time

import pytest

from api.headers import names_tag, preferred_wait


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        *(("wait", 60), ("wait=", 60), ('wait=""', 60), ("wait=1", 1), ("wait=60", 60), ("Wait = 10", 10)),
        *(('wait="10"', 10), ("respond-async, wait=5", 5), ("wait=5,respond-async", 5), ("wait=5; foo=bar", 5)),
        *(('foo="a, wait=3", wait=7', 7), ('foo="\\", wait=3", wait=7', 7), ("wait=3, wait=7", 3), ("a b, wait=7", 7)),
        *((",, wait=7 ,", 7), ("wait=007", 7), ("return=minimal;wait=3, wait=7", 7)),
        *(("wait=0", None), ("wait=61", None), ("wait=-1", None), ("wait=1.5", None), ("wait=soon", None)),
        *(("wait=61, wait=7", None), ("waiting=7", None), ("wait 7", None), ("", None), ("respond-async", None)),
        *(('foo="wait=7', None), ("wait=\u0667", None), ("wait=99999999999999999999", None), ("x;wait=7", None)),
    ],
)
def test_prefer_is_read_as_a_list_and_what_is_malformed_is_passed_over(prefer: str, seconds: int | None) -> None:
    assert preferred_wait([prefer]) == seconds


def test_several_prefer_headers_are_one_list() -> None:
    assert preferred_wait(["respond-async", "wait=7"]) == 7


@pytest.mark.parametrize("hostile", ['"\\' * 30_000, '"' * 60_000, "wait=" * 12_000, "," * 60_000, "w =" * 20_000])
def test_a_header_costs_no_more_than_its_length(hostile: str) -> None:
    began = time.process_time()
    preferred_wait([hostile])
    names_tag([hostile], 'W/"a"')
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize("value", ['W/"a"', '"a"', 'W/"b", W/"a"', '"b","a"', "*", " * ", '"b,\'" , W/"a"'])
def test_a_tag_is_found_in_a_list_whether_weak_or_not(value: str) -> None:
    assert names_tag([value], 'W/"a"')


@pytest.mark.parametrize("value", ["", "a", 'W/"b"', '"aa"', '"A"', '"b, *"', '"a', 'W/"b", *x'])
def test_another_tag_is_not_found(value: str) -> None:
    assert not names_tag([value], 'W/"a"')


def test_several_if_none_match_headers_are_one_list() -> None:
    assert names_tag(['"b"', '"a"'], 'W/"a"')
