"""The pictures of README and docs are as new as what they show."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def make_images():
    """The script that draws the pictures."""
    sys.path.insert(0, str(IMAGES))
    try:
        spec = importlib.util.spec_from_file_location("make_images", IMAGES / "make.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_images"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(IMAGES))


def test_no_picture_is_older_than_what_it_shows(make_images):
    assert make_images.list_outdated() == [], "run `make images`"
    assert {path.name for path in IMAGES.glob("*.png")} == {*make_images.PICTURES}


def test_a_picture_that_is_out_of_date_is_found(make_images, monkeypatch, capsys):
    plan = make_images.PICTURES["plan.png"]
    monkeypatch.setitem(make_images.PICTURES, "plan.png", replace(plan, read=lambda: "another plan"))
    assert make_images.main(["--check"]) == 1
    assert "docs/images/plan.png is out of date; run `make images`\n" in capsys.readouterr().out


def test_a_drawn_picture_is_up_to_date(make_images, monkeypatch, tmp_path):
    monkeypatch.setattr(make_images, "HERE", tmp_path)
    make_images.make("axis_maps.png")
    assert make_images.read_source(tmp_path / "axis_maps.png") == make_images.PICTURES["axis_maps.png"].digest
    assert "axis_maps.png" not in make_images.list_outdated()
