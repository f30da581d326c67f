import pytest

from slop_hf import ModelDims
from slop_hf.errors import GrowthError
from slop_hf.growth.axes import AxisMap, Segment, build_axis_maps
from slop_hf.growth.inits import interleave, resolve_inits, stack


def test_new_query_heads_join_their_group():
    """Heads (group, j) of K = 2, g = 1 move to slots group * g' + j of K = 2, g' = 3."""
    old, new = ModelDims(24, 8, 1, 2, 2, 2), ModelDims(24, 8, 1, 6, 2, 2)
    maps = build_axis_maps(old, new, {})
    assert maps["query"].source == [0, 1, None, None, None, None, 2, 3, None, None, None, None]
    assert maps["key_value"].is_identity


def test_new_groups_come_last():
    old, new = ModelDims(24, 8, 1, 4, 2, 2), ModelDims(24, 8, 1, 8, 4, 2)
    maps = build_axis_maps(old, new, {})
    assert maps["query"].source == [*range(8), *[None] * 8]
    assert maps["key_value"].source == [*range(4), *[None] * 4]


def test_smaller_groups_get_copies_of_their_keys():
    """From 4 query heads with 2 key/value heads to 4 with 4: repeat_interleave, not repeat."""
    maps = build_axis_maps(ModelDims(24, 8, 1, 4, 2, 2), ModelDims(24, 8, 1, 4, 4, 2), {})
    assert maps["query"].is_identity
    assert maps["key_value"].source == [0, 1, 0, 1, 2, 3, 2, 3]


def test_groups_split_into_equal_parts_only():
    with pytest.raises(GrowthError, match="from 6 to 4 query heads per key/value head"):
        build_axis_maps(ModelDims(24, 8, 1, 6, 1, 2), ModelDims(24, 8, 1, 8, 2, 2), {})
    with pytest.raises(GrowthError, match="from 4 to 2 query heads"):
        build_axis_maps(ModelDims(24, 8, 1, 8, 2, 2), ModelDims(24, 8, 1, 6, 3, 2), {})


def test_copied_heads_stay_in_groups():
    maps = build_axis_maps(ModelDims(24, 8, 1, 4, 2, 2), ModelDims(24, 8, 1, 8, 2, 2), {"mha": "copy"})
    heads = maps["query"].source[::2]
    assert heads == [0, 2, 0, 2, 4, 6, 4, 6]
    assert {segment.copies for segment in maps["query"].segments} == {2}


def test_tiles():
    assert AxisMap.tile(3, 8, "ffn").source == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [(segment.start, segment.copies) for segment in AxisMap.tile(3, 8, "ffn").segments] == [
        (0, 3),
        (2, 2),
        (3, 3),
        (5, 2),
        (6, 3),
    ]
    whole = AxisMap.tile(3, 8, "hidden", whole=True)
    assert whole.source == [0, 1, 2, 0, 1, 2, None, None]
    assert whole.max_copies == 2 and whole.segments[-1].operator == "hidden"


def test_pairs_of_rotary_embeddings_stay_pairs():
    old, new = ModelDims(24, 8, 1, 1, 1, 4), ModelDims(24, 8, 1, 1, 1, 12)
    assert build_axis_maps(old, new, {"head_dim": "preserving"})["query"].source == [
        *[0, 1, None, None, None, None],
        *[2, 3, None, None, None, None],
    ]
    assert build_axis_maps(old, new, {"head_dim": "spread"})["query"].source == [
        *[0, None, None, 1, None, None],
        *[2, None, None, 3, None, None],
    ]
    with pytest.raises(GrowthError, match="a whole multiple of head_dim 4, got 10"):
        build_axis_maps(old, new.replace(head_dim=10), {"head_dim": "spread"})


def test_segments_cover_the_axis_and_are_few():
    axis = AxisMap.from_source([None, 0, 1, None, None, 2, 3], 4, "ffn")
    assert axis.segments == (
        Segment(0, 1, None, 1, "ffn"),
        Segment(1, 2, 0),
        Segment(3, 2, None, 1, "ffn"),
        Segment(5, 2, 2),
    )
    assert axis.new_size == 7 == sum(segment.length for segment in axis.segments)
    assert len(AxisMap.append(4096, 8192, "hidden").segments) == 2


@pytest.mark.parametrize(("old", "new"), [(2, 4), (6, 8), (5, 17)])
def test_stacking_repeats_the_model(old, new):
    layers = stack(old, new)
    assert len(layers) == new and layers[:old] == list(range(old))
    assert all(layers[i] == layers[i - old] for i in range(old, new))


def test_interleaving_keeps_the_order():
    assert interleave(3, 7) == sorted(interleave(3, 7)) and set(interleave(3, 7)) == {0, 1, 2}


def test_inits_by_name():
    assert resolve_inits(("hidden", "mha"), "random") == {"hidden": "random", "mha": "random"}
    assert resolve_inits(("layer", "ffn"), {"ffn": "random"}) == {"layer": "stack", "ffn": "random"}
    with pytest.raises(
        GrowthError, match=r"unknown init 'magic' for operator 'ffn' \(known: random, preserving, copy"
    ):
        resolve_inits(("ffn",), "magic")
    with pytest.raises(GrowthError, match=r"unknown init 'copy' for operator 'layer' \(known: stack, interleave, pre"):
        resolve_inits(("layer", "ffn"), "copy")
