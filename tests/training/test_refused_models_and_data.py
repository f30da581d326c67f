"""Models with adapters and blocks of several lengths are refused, before training if they can be seen then."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import BLOCK, blocks, small_model, trainer
from transformers import default_data_collator

from slop_hf import RunConfig, RunDirectory
from slop_hf.errors import DataError, RunError
from slop_hf.training.config import preview_run


def is_untouched(path: Path) -> bool:
    return not RunDirectory(path).exists


# ---- Lengths of blocks ------------------------------------------------------------------------------------------


def uneven_rows(short: int = 3) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row["input_ids"][: BLOCK - 4 * (number == short)]} for number, row in enumerate(blocks(40))]


class Lazy(torch.utils.data.Dataset):
    """Rows whose lengths are known once they are read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_table(rows):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in rows]})


def select_from_table(rows):
    table = make_table([*rows, *blocks(40)])
    return table.select(list(range(len(rows)))[::-1]).select(range(len(rows)))


@pytest.mark.parametrize(("make", "short"), [(list, 3), (make_table, 3), (Lazy, 39), (select_from_table, 39)])
def test_blocks_of_several_lengths_are_refused(make, short, tmp_path):
    with pytest.raises(DataError, match=r"row \d+ of train_dataset has \d+ tokens, row 0 \d+: pack documents"):
        trainer(tmp_path / "out", data=make(uneven_rows(short)))
    assert is_untouched(tmp_path / "out")


@pytest.mark.parametrize("make", [list, make_table, Lazy, select_from_table])
def test_blocks_of_equal_length_are_accepted(make, tmp_path):
    trainer(tmp_path / "out", data=make(blocks(40)))


def test_a_shorter_block_that_no_sample_has_shown_is_refused_when_it_is_read(tmp_path):
    run = trainer(tmp_path / "out", data=Lazy(uneven_rows()))
    with pytest.raises(DataError, match=f"train_dataset has a row of 12 tokens, row 0 has {BLOCK}: pack documents"):
        run.train()


def test_rows_without_tokens_are_refused(tmp_path):
    with pytest.raises(DataError, match="have no input_ids, only text, labels; tokenize them first"):
        trainer(tmp_path / "out", data=[{"text": "words", "labels": 1}])


class Pad:
    """Pads batches to a length, after a number of batches of which it leaves the length."""

    def __init__(self, after):
        self.after = after

    def __call__(self, rows):
        batch = default_data_collator(rows)
        self.after -= 1
        return batch if self.after >= 0 else {key: torch.nn.functional.pad(row, (0, 8)) for key, row in batch.items()}


@pytest.mark.parametrize("after", [0, 3], ids=["at once", "later"])
def test_a_collator_that_changes_lengths_is_refused(after, tmp_path):
    with pytest.raises(DataError, match=rf"data_collator makes {BLOCK + 8} tokens of a block of {BLOCK}"):
        trainer(tmp_path / "out", data_collator=Pad(after)).train()
    assert is_untouched(tmp_path / "out") or after


# ---- Adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["peft", "transformers"])
def test_models_with_adapters_are_refused(by, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = small_model(), peft.LoraConfig(target_modules=["up_proj"], r=2)
    if by == "peft":
        model = peft.get_peft_model(model, adapter)
    else:
        model.add_adapter(adapter)
    with pytest.raises(RunError, match=r"has adapters of peft.*merge_and_unload\(\)"):
        trainer(tmp_path / "out", model=model)
    assert is_untouched(tmp_path / "out")


def test_a_pretrained_model_with_adapters_is_refused_in_a_preview(config, tmp_path):
    """Although transformers would load it."""
    directory = tmp_path / "adapted"
    small_model().save_pretrained(directory)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    run = RunConfig.from_yaml(config, {"model": {"pretrained": str(directory)}})
    with pytest.raises(RunError, match=r"model.pretrained .*adapted holds adapters of peft.*; merge them"):
        preview_run(run, tmp_path / "out")
