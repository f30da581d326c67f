"""Division of an optimizer step over devices; a run's steps and data do not depend on it."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from training_runs import BATCH, BLOCK, SCHEDULE, TOKENS, blocks, small_model, trainer
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.data import MixedBlocks
from slop_hf.data.order import BlockOrder
from slop_hf.errors import RunError
from slop_hf.training.batches import (
    PER_STAGE,
    Batches,
    count_blocks_per_step,
    keep_last_stage,
    resolve_per_stage,
    share_batches,
)

#: Three stages of four steps.
SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2]).with_shares([TOKENS // 2] * 3)


def settings(**changes):
    """The arguments that batches depend on, at their defaults."""
    defaults = dict.fromkeys(PER_STAGE)
    return SimpleNamespace(
        **{**defaults, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, **changes}
    )


# ---- Sharing --------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 200)


@given(each=SIZES, largest=SIZES, devices=SIZES)
def test_a_step_is_shared_in_the_largest_micro_batches_possible(each, largest, devices):
    blocks = each * devices
    shared = Batches.share(blocks, largest, devices)
    micro, accumulation = shared.micro_batch_size, shared.accumulation_steps
    assert micro * accumulation * devices == blocks and micro <= largest
    assert all(each % size for size in range(micro + 1, largest + 1))


@given(blocks=SIZES, largest=SIZES, devices=SIZES)
def test_a_step_that_cannot_be_shared_equally_is_refused(blocks, largest, devices):
    assume(blocks % devices)
    with pytest.raises(RunError, match=f"a step has {blocks} blocks, which {devices} devices cannot share equally"):
        Batches.share(blocks, largest, devices)


def test_no_blocks_are_refused():
    with pytest.raises(RunError, match="a step has 0 blocks"):
        Batches.share(0, 4, 2)


# ---- One value, or one per stage -------------------------------------------------------------------------------


def test_per_stage():
    assert resolve_per_stage(None, 7, 3, "sizes") == (7, 7, 7)
    assert resolve_per_stage([5], 7, 3, "sizes") == (5, 5, 5)
    assert resolve_per_stage([1, 2, 3], 7, 3, "sizes") == (1, 2, 3)
    assert resolve_per_stage([2], 7, 1, "sizes") == (2,)


@pytest.mark.parametrize("values", [[], [1, 2], [1, 2, 3, 4]])
def test_another_number_of_values_is_refused(values):
    with pytest.raises(RunError, match=rf"sizes has {len(values)} values, but the run has 3 stages .*; give one or 3"):
        resolve_per_stage(values, 7, 3, "sizes")


@pytest.mark.parametrize(
    ("changes", "devices", "expected"),
    [
        ({}, 1, (4, 4, 4)),
        ({"gradient_accumulation_steps": 3}, 2, (24, 24, 24)),
        ({"stage_batch_sizes": [8, 4, 2], "gradient_accumulation_steps": 2}, 1, (16, 8, 4)),
        ({"batch_tokens": [128]}, 1, (8, 8, 8)),
        ({"batch_tokens": [128, 64, 16]}, 1, (8, 4, 1)),
        ({"batch_tokens": [128], "stage_batch_sizes": [8, 4, 2]}, 8, (8, 8, 8)),
    ],
)
def test_blocks_of_a_step(changes, devices, expected):
    """Batch sizes are per device; `batch_tokens` counts all devices together."""
    assert count_blocks_per_step(settings(**changes), BLOCK, devices, 3) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": [40]}, "batch_tokens 40 is not a multiple of the block size 16; take 32"),
        ({"batch_tokens": [64, 64, 7]}, "batch_tokens 7 .*; take 16"),
        ({"batch_tokens": [64], "gradient_accumulation_steps": 2}, "follows from batch_tokens; give one of the two"),
        ({"batch_tokens": [64, 64]}, "batch_tokens has 2 values, but the run has 3 stages"),
        ({"stage_batch_sizes": [4, 4, 4, 4]}, "stage_batch_sizes has 4 values, but the run has 3 stages"),
    ],
)
def test_what_makes_no_steps_is_refused(changes, message):
    with pytest.raises(RunError, match=message):
        count_blocks_per_step(settings(**changes), BLOCK, 1, 3)


def test_batches_follow_the_number_of_devices():
    """The run fixes the blocks per step, the launch a device's share of them."""
    args, steps = settings(stage_batch_sizes=[8, 4, 3]), (16, 16, 12)
    assert share_batches(args, steps, 1) == (Batches(8, 2), Batches(4, 4), Batches(3, 4))
    assert share_batches(args, steps, 2) == (Batches(8, 1), Batches(4, 2), Batches(3, 2))
    assert share_batches(args, steps, 4) == (Batches(4, 1), Batches(4, 1), Batches(3, 1))
    with pytest.raises(RunError, match="a step has 12 blocks, which 8 devices cannot share equally"):
        share_batches(args, steps, 8)
    with pytest.raises(RunError, match="stage_batch_sizes has 3 values, but the run has 2 stages"):
        share_batches(args, steps[:2], 1)


def test_the_last_stages_values_alone():
    args = settings(batch_tokens=[64, 128], stage_learning_rates=[1e-2, 1e-3])
    keep_last_stage(args)
    assert (args.batch_tokens, args.stage_batch_sizes, args.stage_learning_rates) == ([128], None, [1e-3])


# ---- In a run --------------------------------------------------------------------------------------------------


class Seen(torch.utils.data.Dataset):
    """Blocks that record the order in which they are read."""

    def __init__(self, rows):
        self.rows, self.order = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.order.append(index)
        return self.rows[index]


class Shares(TrainerCallback):
    """Records batch size, accumulation and micro-batches of every step; stops before a given step."""

    def __init__(self, stop=None):
        self.steps, self.micro_batches, self.stop = [], 0, stop

    def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step == self.stop:
            raise KeyboardInterrupt
        assert train_dataloader.total_batch_size == args.per_device_train_batch_size

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        assert self.micro_batches + 1 == args.gradient_accumulation_steps
        self.steps.append((args.per_device_train_batch_size, args.gradient_accumulation_steps))
        self.micro_batches = 0


def test_each_stage_has_its_own_batch(tmp_path):
    shares, data = Shares(), Seen(blocks(60))
    settings = {"batch_tokens": [64, 32, 128], "stage_batch_sizes": [2, 2, 4], "per_device_train_batch_size": 3}
    run = trainer(tmp_path / "out", schedule=SHORT, data=data, callbacks=[shares], **settings)
    data.order.clear()
    run.train()
    assert shares.steps == [(2, 2)] * 4 + [(2, 1)] * 8 + [(4, 2)] * 2
    directory = RunDirectory(tmp_path / "out")
    losses = [entry for entry in directory.history() if "loss" in entry]
    per_step = [64] * 4 + [32] * 8 + [128] * 2
    assert [entry["tokens"] for entry in losses] == [sum(per_step[: done + 1]) for done in range(len(per_step))]
    assert [(record.tokens, record.steps) for record in directory.records()] == [(256, 4), (256, 8), (256, 2)]
    expected = Seen(data.rows)
    list(BlockOrder(MixedBlocks.wrap(expected), 0, 3 * 256 // BLOCK, seed=run.args.seed))
    assert data.order == expected.order
    assert (run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps) == (3, 1)


def test_values_for_another_number_of_stages_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RunError, match="batch_tokens has 2 values, but the run has 3 stages"):
        trainer(tmp_path / "out", schedule=SHORT, batch_tokens=[64, 128]).train()
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_a_run_continues_in_smaller_micro_batches(tmp_path):
    """The run keeps its steps: accumulation makes up for less memory per device."""

    def train(name, size, stop=None):
        shares, path = Shares(stop), tmp_path / name
        run = trainer(
            path,
            schedule=SHORT,
            model=small_model(dropout=0.0),
            callbacks=[shares],
            per_device_train_batch_size=size,
        )
        run.train(resume_from_checkpoint=RunDirectory(path).exists)
        return run, shares.steps

    whole, steps = train("whole", BATCH)
    assert steps == [(4, 1)] * 12
    with pytest.raises(KeyboardInterrupt):
        train("parts", BATCH, stop=7)
    parts, steps = train("parts", 2)
    assert steps == [(2, 2)] * 6  # from the checkpoint at step 6
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    tokens = [[row["tokens"] for row in RunDirectory(tmp_path / name).history()] for name in ("whole", "parts")]
    assert tokens[0] == tokens[1]
