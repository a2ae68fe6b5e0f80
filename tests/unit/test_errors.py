"""The tree of errors, and the page that documents it."""

from pathlib import Path

from core import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def _leaves(kind: type[errors.UpscaledError]) -> list[type[errors.UpscaledError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _leaves(child))]


def test_every_error_says_who_can_mend_it() -> None:
    branches = (
        errors.RequestError,
        errors.TransientError,
        errors.DeploymentError,
        errors.LeaseLost,
        errors.Stopped,
    )
    strays = [leaf for leaf in _leaves(errors.UpscaledError)[1:] if not issubclass(leaf, branches)]
    assert [stray for stray in strays if stray.__module__ == "core.errors"] == []


def test_every_code_that_callers_can_meet_is_documented() -> None:
    page = PAGE.read_text()
    branches = (errors.RequestError, errors.TransientError, errors.DeploymentError)
    shown = [errors.UpscaledError, *(leaf for branch in branches for leaf in _leaves(branch))]
    assert [leaf.code for leaf in shown if f"`{leaf.code}`" not in page] == []


def test_a_validation_error_names_every_field_in_its_sentence() -> None:
    error = errors.ValidationError({"a.b": ["is required"], "c": ["too long", "too dull"]})
    assert str(error) == "a.b: is required; c: too long, too dull"
