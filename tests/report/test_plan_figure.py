"""The figure of a plan: its bars, marks and labels, and that labels do not overlap."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations

import matplotlib
import pytest
from matplotlib.image import imread

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


# Five schedules to targets of Table 1, and arms of several kinds.
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


LOSSES = [2.561, 2.567, 2.556, 2.547, 2.563, 2.549, None, 2.542, 2.54, 2.5405]


def without_tokens(schedule: GrowthSchedule) -> GrowthSchedule:
    return schedule.with_shares([0] * len(schedule.structures))


def get_part(axes, gid: str):
    """Return the part of a bar with this `gid`."""
    (match,) = [part for part in axes.patches if part.get_gid() == gid]
    return match


def list_labels(axes, row: str) -> list[str]:
    """Return the labels of the parts of a bar, such as `plan-1`."""
    return [text.get_text() for text in axes.texts if (text.get_gid() or "").startswith(f"{row}-label-")]


def list_cells(figure) -> list[list[str]]:
    """Return the rows of the table below the bars, with its headings."""
    texts = figure.axes[-1].texts
    width = sum(text.get_gid() == "heading" for text in texts)
    height = len(texts) // width
    return [[texts[column * height + row].get_text() for column in range(width)] for row in range(height)]


def find_touching(figure) -> list[tuple[str, str]]:
    """Return the pairs of overlapping texts, and texts that leave their part of a bar or the figure."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *(text for panel in figure.subfigs for text in panel.texts)]
    texts += [text for panel in figure.subfigs for legend in panel.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label]
        if axes.axison:
            for axis, limits in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
                ticks = [tick for tick in axis.get_major_ticks() if limits[0] <= tick.get_loc() <= limits[1]]
                texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    outside = [(name, "edge") for name, box in boxes if box.x0 < 0 or box.x1 > figure.bbox.x1]
    for label in figure.axes[0].texts:
        part = get_part(figure.axes[0], label.get_gid().replace("-label-", "-stage-")).get_window_extent()
        if label.get_text() and (label.get_window_extent().x0 < part.x0 or label.get_window_extent().x1 > part.x1):
            outside.append((label.get_text(), "part"))
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
        assert image.shape[1] == 1350 and image[..., :3].std() > 0.02


@pytest.mark.parametrize(
    ("name", "said"),
    [("plan.jpg", "'.jpg'"), ("plan", "no suffix"), ("plan.png.txt", "'.txt'"), (".png", "no suffix")],
)
def test_another_suffix_is_rejected_before_drawing(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr(module, "create_figure", None)
    with pytest.raises(PlanError, match=rf"{said}.*\.png, \.svg, \.pdf"):
        draw_plan(PLANS, path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_rejected():
    with pytest.raises(PlanError, match="no schedules"):
        draw_plan([], ARMS)
    with pytest.raises(PlanError, match="2 losses to draw: expected 10"):
        draw_plan(PLANS, ARMS, losses=[2.5, 2.6])


def test_every_schedule_has_its_bar_its_label_and_its_loss():
    figure = draw_plan(PLANS, ARMS, title="Growth to $1B_", losses=LOSSES)
    bars, losses, _ = figure.axes
    assert [text.get_text() for text in bars.get_yticklabels()] == [
        "1  l-f-h → (2816, 7680, 8, 22)",
        "2  f-h-l → (1280, 3584, 40, 10)",
        "3  l-f-h → (2560, 6912, 10, 20)",
        "4  f-h-l → (1536, 4096, 32, 12)",
        "5  h-f-l → (1280, 3584, 40, 10)",
        *("from scratch", "single stage", "msg", " odd $name$", "stacking"),
    ]
    assert list_labels(bars, "plan-1") == ["", "l", "f 210M", "h 953M"]
    assert list_labels(bars, "arm-2") == ["91.6M", "lfh 953M"]
    marks = {line.get_gid(): line for line in losses.lines if line.get_gid()}
    rows = [*(f"plan-{rank}" for rank in range(1, 6)), *(f"arm-{number}" for number in range(1, 6))]
    for height, (row, loss) in enumerate(zip(rows, LOSSES, strict=True)):
        assert (f"{row}-loss" in marks) == (loss is not None)
        if loss is not None:
            assert marks[f"{row}-loss"].get_xydata().tolist() == [[loss, height]]
    assert {line.get_marker() for gid, line in marks.items() if gid.startswith("arm")} == {"s"}
    assert [text.get_text() for text in losses.texts] == ["–" if loss is None else f"{loss:.3f}" for loss in LOSSES]
    assert figure.get_suptitle() == "Growth to $1B_"
    assert find_touching(figure) == []


def test_parts_are_as_long_as_their_flops_and_darker_if_larger():
    config = {"model_type": "llama", "vocab_size": 1000, "tie_word_embeddings": True}
    figure = draw_plan(PLANS, ARMS, config=config, sequence_length=512)
    bars = figure.axes[0]
    schedules = [("plan-2", PLANS[1]), *((f"arm-{number}", arm) for number, (_, arm) in enumerate(ARMS, start=1))]
    for row, schedule in schedules:
        parts = [get_part(bars, f"{row}-stage-{stage}") for stage in range(len(schedule.structures))]
        costs = [count_flops_per_token(dims, config, 512) for dims in schedule.structures]
        lengths = [cost * tokens for cost, tokens in zip(costs, schedule.tokens, strict=True)]
        assert [part.get_width() for part in parts] == pytest.approx(lengths)
        sizes = [count_parameters(dims, config) for dims in schedule.structures]
        brightness = [sum(part.get_facecolor()[:3]) for part in parts]
        assert brightness == sorted(brightness, reverse=True) and sizes == sorted(sizes)
    most = max(schedule.flops(config, 512) for schedule in [*PLANS, *(arm for _, arm in ARMS)])
    assert f"{most:e}".endswith("e+19") and bars.get_xlabel() == "training FLOPs (× 10¹⁹)"


def test_the_table_has_the_sizes_of_the_best_schedule():
    figure = draw_plan(PLANS)
    assert list_cells(figure) == [
        ["stage", "hidden", "ffn", "layers", "heads", "parameters", "tokens"],
        ["0  initial", "768", "2,048", "6", "6", "91.6M", "10B"],
        ["1  l", "768", "2,048", "8", "6", "106M", "10B"],
        ["2  f", "768", "7,680", "8", "6", "210M", "10B"],
        ["3  h", "2,816", "7,680", "8", "22", "953M", "10B"],
    ]
    shaded = [(part.get_x(), part.get_y()) for part in figure.axes[-1].patches]
    assert [(int(x), round(y + 0.46 - 1)) for x, y in shaded] == [(1, 3), (2, 2), (3, 1), (4, 3)]


@pytest.mark.parametrize("which", ["all", "one arm"])
def test_without_tokens_the_axis_counts_stages(which):
    if which == "all":
        figure = draw_plan([without_tokens(plan) for plan in PLANS])
        assert "tokens" not in list_cells(figure)[0]
    else:
        figure = draw_plan(PLANS, [*ARMS[:1], ("bare", without_tokens(ARMS[1][1]))])
    bars = figure.axes[0]
    assert bars.get_xlabel() == "stage (0: the initial model)"
    assert [get_part(bars, f"plan-3-stage-{stage}").get_x() for stage in range(4)] == [-0.5, 0.5, 1.5, 2.5]
    assert find_touching(figure) == []


def test_schedules_to_one_target_do_not_repeat_it():
    figure = draw_plan([PLANS[1], PLANS[4]])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["1  f-h-l", "2  h-f-l"]
    scratch = draw_plan([GrowthSchedule(SMALL)])
    assert [text.get_text() for text in scratch.axes[0].get_yticklabels()] == ["1  no growth"]


def test_grouped_queries_and_head_dim_get_columns():
    grouped = ModelDims(1024, 3072, 8, 8, 2, 64)
    more = grouped.replace(num_attention_heads=16, num_key_value_heads=4)
    wide = more.replace(hidden_size=2048, head_dim=128)
    # Trained already: the initial model takes no tokens.
    figure = draw_plan([path_through(grouped, more, wide, tokens=[0, 10**9, 10**9])])
    headings, *rows = list_cells(figure)
    assert headings[1:7] == ["hidden", "ffn", "layers", "heads", "kv heads", "head_dim"]
    assert [row[0] for row in rows] == ["0  initial", "1  a", "2  hd"] and rows[2][5:7] == ["4", "128"]
    assert rows[0][-1] == "–"
    same = list_cells(draw_plan([path_through(grouped, grouped.replace(num_hidden_layers=16))]))
    assert same[0][1:5] == ["hidden", "ffn", "layers", "heads"] and "head_dim" not in same[0]


def short_stages(count: int) -> GrowthSchedule:
    """A schedule of small growths in quick succession, in layers and feed-forward size by turns."""
    structures = [SMALL]
    for number in range(count):
        before = structures[-1]
        layers, ffn = before.num_hidden_layers, before.intermediate_size
        change = {"num_hidden_layers": layers + 1} if number % 2 == 0 else {"intermediate_size": ffn + 256}
        structures.append(before.replace(**change))
    return path_through(*structures, tokens=[10**10, *[10**7] * count])


def test_labels_of_many_short_stages_do_not_touch(monkeypatch):
    best = short_stages(12)
    plans = [best, *(path_through(*best.structures[: 12 - number]) for number in range(10))]
    arms = [(f"arm {number} of a very long name that does not fit", ARMS[number % 5][1]) for number in range(8)]
    figure = draw_plan(plans, arms)
    assert list_labels(figure.axes[0], "plan-1") == [""] * 13
    assert len(list_cells(figure)) == 14
    assert find_touching(figure) == []
    monkeypatch.setattr(module, "_fit_labels", lambda figure: None)
    assert ("l 98.7M", "part") in find_touching(draw_plan(plans, arms))


def test_no_torch_and_no_pyplot_are_loaded():
    heavy = {"torch", "transformers", "matplotlib.pyplot"}
    code = f"import sys, slop_hf.report.plan_figure; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
