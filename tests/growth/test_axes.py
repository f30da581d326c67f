import pytest

from slop_hf import ModelDims
from slop_hf.errors import GrowthError
from slop_hf.growth.axes import AxisMap, axis_maps
from slop_hf.growth.inits import resolve_inits, stack


def test_new_query_heads_join_their_group():
    """Heads (group, j) of K = 2, g = 1 move to slots group * g' + j of K = 2, g' = 3."""
    old, new = ModelDims(24, 8, 1, 2, 2, 2), ModelDims(24, 8, 1, 6, 2, 2)
    maps = axis_maps(old, new)
    assert maps["query"].source == [0, 1, None, None, None, None, 2, 3, None, None, None, None]
    assert maps["key_value"].is_identity


def test_new_groups_come_behind():
    old, new = ModelDims(24, 8, 1, 4, 2, 2), ModelDims(24, 8, 1, 8, 4, 2)
    maps = axis_maps(old, new)
    assert maps["query"].source == [*range(8), *[None] * 8]
    assert maps["key_value"].source == [*range(4), *[None] * 4]


def test_groups_cannot_shrink():
    with pytest.raises(GrowthError, match="from 2 to 1 query heads per key/value head"):
        axis_maps(ModelDims(24, 8, 1, 4, 2, 2), ModelDims(24, 8, 1, 4, 4, 2))


def test_segments_cover_the_axis():
    axis = AxisMap(4, 9, ((1, 0, 2), (5, 2, 2)))
    assert axis.segments == [(0, None, 1), (1, 0, 2), (3, None, 2), (5, 2, 2), (7, None, 2)]
    assert sum(length for _, _, length in axis.segments) == axis.new_size


@pytest.mark.parametrize(("old", "new"), [(2, 4), (6, 8), (5, 17)])
def test_stacking_repeats_the_model(old, new):
    layers = stack(old, new)
    assert len(layers) == new and layers[:old] == list(range(old))
    assert all(layers[i] == layers[i - old] for i in range(old, new))


def test_inits_by_name():
    assert resolve_inits(("hidden", "mha"), "random") == {"hidden": "random", "mha": "random"}
    assert resolve_inits(("layer", "ffn"), {"ffn": "random"}) == {"layer": "stack", "ffn": "random"}
    with pytest.raises(GrowthError, match="unknown init 'magic' for operator 'ffn'; known: random"):
        resolve_inits(("ffn",), "magic")
    with pytest.raises(GrowthError, match="unknown init 'random' for operator 'layer'; known: stack"):
        resolve_inits(("layer", "ffn"), "random")
