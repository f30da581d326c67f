"""The figure of a plan: its lines and labels, and that labels do not overlap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations

import matplotlib
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.dims import ModelDims
from slop_hf.errors import PlanError
from slop_hf.operators import find_operators
from slop_hf.report import plan_figure as module
from slop_hf.report.plan_figure import draw_plan
from slop_hf.schedule import GrowthSchedule, GrowthStage

SMALL = ModelDims(768, 2048, 6, 6)
WIDE, DEEP = ModelDims(2816, 7680, 8, 22), ModelDims(1280, 3584, 40, 10)


def path_through(*structures: ModelDims, tokens: Sequence[int] = ()) -> GrowthSchedule:
    """A schedule from its structures; the default is 10B tokens per stage."""
    counts = tokens or [10**10] * len(structures)
    grown = zip(structures, structures[1:], counts[1:], strict=False)
    stages = (GrowthStage(find_operators(old, new), new, count) for old, new, count in grown)
    return GrowthSchedule(structures[0], tuple(stages), counts[0])


def ordered(target: ModelDims, order: str) -> GrowthSchedule:
    """The path to the target that grows one dimension per stage."""
    layers, ffn = target.num_hidden_layers, target.intermediate_size
    wide = {name: getattr(target, name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    changes = {"l": {"num_hidden_layers": layers}, "f": {"intermediate_size": ffn}, "h": wide}
    structures = [SMALL]
    for letter in order:
        structures.append(structures[-1].replace(**changes[letter]))
    return path_through(*structures)


# Five schedules to targets of Table 1, and one arm of each kind.
PLANS = [
    ordered(WIDE, "lfh"),
    ordered(DEEP, "fhl"),
    ordered(ModelDims(2560, 6912, 10, 20), "lfh"),
    ordered(ModelDims(1536, 4096, 32, 12), "fhl"),
    ordered(DEEP, "hfl"),
]
ARMS = [
    ("from_scratch", path_through(WIDE, tokens=[19 * 10**9])),
    ("single_stage", path_through(SMALL, WIDE, tokens=[30 * 10**9, 15 * 10**9])),
    ("msg", ordered(WIDE, "flh")),
    ("_odd $name$", path_through(SMALL, ModelDims(1792, 4864, 7, 14), WIDE)),
    ("stacking", path_through(WIDE.replace(num_hidden_layers=2), WIDE.replace(num_hidden_layers=4), WIDE)),
]


def without_tokens(schedule: GrowthSchedule) -> GrowthSchedule:
    return schedule.with_shares([0] * len(schedule.structures))


def line(axes, gid: str):
    """The only line with this `gid`."""
    (match,) = [line for line in axes.lines if line.get_gid() == gid]
    return match


def gids(axes, start: str) -> list[str]:
    return sorted(line.get_gid() for line in axes.lines if (line.get_gid() or "").startswith(start))


def texts(axes, gid: str | None) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_gid() == gid]


def legends(figure) -> list[list[str]]:
    return [[text.get_text() for text in panel.legends[0].get_texts()] for panel in figure.subfigs]


def touching(figure) -> list[tuple[str, str]]:
    """The pairs of overlapping texts and legends, and texts outside the figure."""
    figure.draw_without_rendering()
    boxes = [("legend", panel.legends[0].get_window_extent()) for panel in figure.subfigs]
    boxes += [(text.get_text(), text.get_window_extent()) for part in (figure, *figure.subfigs) for text in part.texts]
    for axes in figure.axes:
        for text in axes.texts:
            patch = text.get_bbox_patch()
            # An annotation's own extent takes in its leader.
            box = patch.get_window_extent() if patch else Text.get_window_extent(text)
            boxes.append((text.get_text(), box))
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes += [(text.get_text(), text.get_window_extent()) for text in (*labels, axis.label) if text.get_text()]
    outside = [(name, "edge") for name, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > 1800 or box.y1 > 750]
    return outside + [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_every_format_is_written(tmp_path, suffix, magic):
    before = dict(matplotlib.rcParams)
    path = tmp_path / "new" / f"plan{suffix}"
    draw_plan(PLANS[:2], path=path)
    assert path.read_bytes().startswith(magic)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert dict(matplotlib.rcParams) == before
    if suffix == ".png":
        image = imread(path)
        assert image.shape[:2] == (750, 1800) and image[..., :3].std() > 0.02


@pytest.mark.parametrize(
    ("name", "said"),
    [("plan.jpg", "'.jpg'"), ("plan", "no suffix"), ("plan.png.txt", "'.txt'"), (".png", "no suffix")],
)
def test_another_suffix_is_rejected_before_drawing(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr(module, "create_figure", None)
    with pytest.raises(PlanError, match=rf"{said}.*\.png, \.svg, \.pdf"):
        draw_plan(PLANS, path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_no_schedules_are_rejected():
    with pytest.raises(PlanError, match="no schedules"):
        draw_plan([], ARMS)


def test_everything_has_its_line_and_label():
    figure = draw_plan(PLANS, ARMS, title="Growth to $1B_")
    left, right = figure.axes
    assert gids(left, "plan-1-") == [f"plan-1-stage-{stage}" for stage in range(4)]
    assert gids(left, "plan-") == [*gids(left, "plan-1-"), "plan-2", "plan-3", "plan-4", "plan-5"]
    assert gids(left, "arm-") == [f"arm-{number}" for number in range(1, 6)]
    assert texts(left, "growth") == ["l", "f", "h"]
    assert sorted(texts(left, "end")) == ["1  l-f-h", "2  f-h-l", "3  l-f-h", "4  f-h-l", "5  h-f-l"]
    assert gids(right, "axis-") == [
        "axis-hidden_size",
        "axis-intermediate_size",
        "axis-num_attention_heads",
        "axis-num_hidden_layers",
    ]
    assert gids(right, "stage-") == [f"stage-{stage}" for stage in range(4)]
    assert gids(right, "target-") == ["target-2", "target-3", "target-4"]  # the fifth has the second's
    assert sorted(texts(right, "end")) == ["1", "2, 5", "3", "4"]
    assert sorted(texts(right, None)) == sorted(["768", "2,816", "2,048", "7,680", "6", "40", "6", "22"])
    assert legends(figure) == [
        ["best, coloured as in (b)", "other schedules", *(name for name, _ in ARMS)],
        [
            "initial (768, 2048, 6, 6)",
            "l → (768, 2048, 8, 6)",
            "f → (768, 7680, 8, 6)",
            "h → (2816, 7680, 8, 22)",
            "other targets",
        ],
    ]
    assert figure.get_suptitle() == "Growth to $1B_"
    assert touching(figure) == []


def test_steps_are_drawn_at_their_flops_and_parameters():
    config = {"model_type": "llama", "vocab_size": 1000, "tie_word_embeddings": True}
    figure = draw_plan(PLANS, ARMS, config=config, sequence_length=512)
    left = figure.axes[0]
    assert left.get_yscale() == "log"
    most = max(schedule.flops(config, 512) for schedule in [*PLANS, *(arm for _, arm in ARMS)])
    assert f"{most:e}".endswith("e+19") and left.get_xlabel() == "training FLOPs (× 10¹⁹)"
    for gid, schedule in [("plan-2", PLANS[1]), *((f"arm-{n}", arm) for n, (_, arm) in enumerate(ARMS, start=1))]:
        xs, ys = line(left, gid).get_data()
        assert xs[-1] == pytest.approx(schedule.flops(config, 512))
        assert list(ys[1:]) == [count_parameters(dims, config) for dims in schedule.structures]
        assert line(left, gid).get_drawstyle() == "steps-pre" and sorted(xs) == list(xs)
    first = line(left, "plan-1-stage-0").get_xdata()
    assert first[-1] == pytest.approx(count_flops_per_token(SMALL, config, 512) * 10**10)


def test_structures_are_scaled_between_the_smallest_and_the_largest():
    right = draw_plan(PLANS).axes[1]
    assert list(line(right, "stage-0").get_ydata()) == [0, 0, 0, 0]
    assert list(line(right, "stage-3").get_ydata()) == pytest.approx([1, 1, 2 / 34, 1])
    assert list(line(right, "target-2").get_ydata()) == pytest.approx([512 / 2048, 1536 / 5632, 1, 4 / 16])
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["hidden", "ffn", "layers", "heads"]


@pytest.mark.parametrize("which", ["all", "one arm"])
def test_without_tokens_the_axis_counts_stages(which):
    if which == "all":
        figure = draw_plan([without_tokens(plan) for plan in PLANS])
    else:
        figure = draw_plan(PLANS, [*ARMS[:1], ("bare", without_tokens(ARMS[1][1]))])
    left = figure.axes[0]
    assert left.get_xlabel() == "stage (0: the initial model)"
    assert list(line(left, "plan-3").get_xdata()[1:]) == [0.5, 1.5, 2.5, 3.5]
    assert touching(figure) == []


def test_one_schedule_alone():
    figure = draw_plan(PLANS[:1])
    assert texts(figure.axes[0], "end") == ["1  l-f-h"] and texts(figure.axes[1], "end") == []
    assert legends(figure)[0] == ["best, coloured as in (b)"]
    assert len(legends(figure)[1]) == 4
    assert touching(figure) == []


def test_training_from_scratch_alone():
    figure = draw_plan([GrowthSchedule(SMALL)])
    left, right = figure.axes
    assert texts(left, "end") == ["1  no growth"] and left.get_yscale() == "linear"
    assert texts(right, None) == ["768", "2,048", "6", "6"]  # a dimension that does not vary has one label


def test_grouped_queries_and_head_dim_get_axes():
    grouped = ModelDims(1024, 3072, 8, 8, 2, 64)
    more = grouped.replace(num_attention_heads=16, num_key_value_heads=4)
    wide = more.replace(hidden_size=2048, head_dim=128)
    # Trained already: the initial model takes no tokens.
    figure = draw_plan([path_through(grouped, more, wide, tokens=[0, 10**9, 10**9])])
    names = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert names == ["hidden", "ffn", "layers", "heads", "kv heads", "head_dim"]
    assert list(line(figure.axes[1], "stage-1").get_ydata()) == [0, 0, 0, 1, 1, 0]
    assert texts(figure.axes[0], "growth") == ["a", "hd"]
    assert legends(figure)[1][0] == "initial (1024, 3072, 8, 8, kv 2, head_dim 64)"
    assert touching(figure) == []
    same = draw_plan([path_through(grouped, grouped.replace(num_hidden_layers=16))])
    assert [tick.get_text() for tick in same.axes[1].get_xticklabels()] == ["hidden", "ffn", "layers", "heads"]


def short_stages(count: int) -> GrowthSchedule:
    """A schedule of small growths in quick succession, in layers and feed-forward size by turns."""
    structures = [SMALL]
    for number in range(count):
        before = structures[-1]
        layers, ffn = before.num_hidden_layers, before.intermediate_size
        change = {"num_hidden_layers": layers + 1} if number % 2 == 0 else {"intermediate_size": ffn + 256}
        structures.append(before.replace(**change))
    return path_through(*structures, tokens=[10**10, *[10**7] * count])


def test_labels_of_many_short_stages_do_not_touch():
    best = short_stages(12)
    structures = best.structures
    plans = [best, *(path_through(*structures[: 12 - number]) for number in range(10))]
    figure = draw_plan(plans, [(f"arm {number}", ARMS[number % 5][1]) for number in range(8)])
    assert texts(figure.axes[0], "growth") == ["l", "f"] * 6
    assert len(texts(figure.axes[0], "end")) == module.MAX_LABELS
    assert legends(figure)[1][:3] == ["0 initial", "1 l", "2 f"]
    assert touching(figure) == []
    styles = [module._style_arm(number) for number in range(8)]
    assert [line(figure.axes[0], f"arm-{n}").get_color() for n in range(1, 9)] == [style["color"] for style in styles]
    assert len({style["color"] for style in styles[:5]}) == 5 and len(set(map(str, styles))) == 8


@pytest.mark.parametrize("count", [2, 5])
def test_letters_of_a_few_short_stages_do_not_touch(count, monkeypatch):
    plans = [short_stages(count), *PLANS]  # the larger models leave little of the axes to the small growths
    figure = draw_plan(plans)
    assert texts(figure.axes[0], "growth") == ["l", "f", "l", "f", "l"][:count]
    assert touching(figure) == []
    monkeypatch.setattr(module, "_lift_letters", lambda figure: None)
    assert ("l", "f") in touching(draw_plan(plans))


def test_labels_that_touch_are_found(monkeypatch):
    monkeypatch.setattr(module, "END_GAP", 0.0)
    assert ("2  f-h-l", "5  h-f-l") in map(tuple, map(sorted, touching(draw_plan(PLANS))))


def test_no_torch_and_no_pyplot_are_loaded():
    heavy = {"torch", "transformers", "matplotlib.pyplot"}
    code = f"import sys, slop_hf.report.plan_figure; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
