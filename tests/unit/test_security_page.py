"""docs/security.md: every promise is held by a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROWS = re.findall(r"^\| .+ \| (`.+`) \|$", (ROOT / "docs/security.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for row in ROWS for name in re.findall(r"`([^`]+)`", row)])
def test_a_test_that_the_page_names_exists(name: str) -> None:
    path, _, function = name.partition("::")
    source = (ROOT / "tests" / path).read_text()
    assert re.search(rf"^(async )?def {function}\(", source, flags=re.MULTILINE)


def test_the_page_has_a_row_for_every_part() -> None:
    assert len(ROWS) > 80
