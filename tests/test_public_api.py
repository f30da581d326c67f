"""The names that `import slop_hf` offers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

import slop_hf


@pytest.mark.parametrize("name", slop_hf.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(slop_hf, name).__name__ == name


def test_dir_lists_the_public_names() -> None:
    assert set(slop_hf.__all__) <= set(dir(slop_hf))


@pytest.mark.parametrize(
    ("earlier", "name"),
    [
        ("checkpoint_directory", "find_checkpoint_directory"),
        ("comparison_table", "build_comparison_table"),
        ("continued", "continue_from"),
    ],
)
def test_an_earlier_name_still_works_and_says_so(earlier: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"slop_hf.{earlier} is now slop_hf.{name}"):
        assert getattr(slop_hf, earlier) is getattr(slop_hf, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="SlopPlaner"):
        slop_hf.SlopPlaner  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    try:
        installed = version("slop-hf")
    except PackageNotFoundError:
        pytest.skip("slop-hf is not installed")
    assert slop_hf.__version__ == installed
