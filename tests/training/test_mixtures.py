"""A run over a mixture of sources: order, consumed tokens, losses by source, and refused resumptions."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, Interrupt, losses, small_model, trainer
from transformers import PreTrainedTokenizerFast

from slop_hf import RunDirectory
from slop_hf.data import MixedBlocks, PackedDataset, train_tokenizer
from slop_hf.data.order import StreamOrder
from slop_hf.data.packing import TokenWriter
from slop_hf.errors import RunError

WEIGHTS = {"web": 0.6, "books": 0.3, "code": 0.1}
TOKENS = {"web": 3000, "books": 900, "code": 70}
EOS = 0


def packed(folder, name, tokens, eos=None, shift=0):
    """Random documents of seven tokens and their eos."""
    path = folder / f"{name}.ds"
    if not path.exists():
        draws = np.random.default_rng(tokens + shift)
        with TokenWriter(path, "t", 40) as writer:
            writer.write(draws.integers(1, 40, (math.ceil(tokens / 8), 7)).tolist(), EOS)
    return PackedDataset(path, BLOCK, eos)


def mixed(folder, weights=WEIGHTS, fingerprint="data", eos=None):
    parts = {name: packed(folder, name, tokens, eos) for name, tokens in TOKENS.items()}
    return MixedBlocks(parts, weights, fingerprint)


def held_out(folder):
    return {name: packed(folder, f"{name}-held-out", 200 + 40 * n, shift=1) for n, name in enumerate(["web", "code"])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed")
    trainer(path / "out", data=mixed(path), eval_dataset=held_out(path)).train()
    return path


def test_blocks_come_in_the_streams_order(tmp_path):
    batches = []
    run = trainer(tmp_path / "out", data=mixed(tmp_path), eval_dataset=None)
    step = run.training_step

    def watched(model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].clone())
        return step(model, inputs, *args, **kwargs)

    run.training_step = watched
    run.train()
    data = run.blocks
    order = StreamOrder([len(part) for part in data.parts.values()], list(data.weights.values()), run.args.seed)
    sources, blocks = order.locate(np.arange(4 * STEPS * BATCH))
    parts = list(data.parts.values())
    expected = [parts[source][block]["input_ids"] for source, block in zip(sources, blocks, strict=True)]
    assert torch.equal(torch.cat(batches), torch.stack(expected))


def test_an_interrupted_run_reads_the_same_blocks(whole, tmp_path):
    settings = {"eval_dataset": held_out(whole)}
    run = trainer(tmp_path / "out", data=mixed(whole), callbacks=[Interrupt(STEPS + 5)], **settings)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    trainer(tmp_path / "out", data=mixed(whole), **settings).train(resume_from_checkpoint=True)
    assert losses(tmp_path / "out") == losses(whole / "out")
    assert RunDirectory(tmp_path / "out").records()[-1].data == RunDirectory(whole / "out").records()[-1].data


def test_consumed_tokens_and_losses_by_source(whole):
    records = RunDirectory(whole / "out").records()
    for record in records:
        assert {consumed.source: consumed.weight for consumed in record.data} == pytest.approx(WEIGHTS)
        assert sum(consumed.tokens for consumed in record.data) == record.tokens == STEPS * BATCH * BLOCK
        assert (record.data_fingerprint, record.data_seed) == ("data", 42)
        assert set(record.eval_losses) == {"web", "code"}
        expected = (6 * record.eval_losses["web"] + record.eval_losses["code"]) / 7
        assert record.eval_loss == pytest.approx(expected) and record.perplexity == pytest.approx(math.exp(expected))
        assert record.eval_loss_after_growth is None or record.stage > 0
    for before, after in pairwise(records):
        assert [consumed.end_token for consumed in before.data] == [consumed.first_token for consumed in after.data]
    stored = json.loads((whole / "out" / records[0].name / "stage.json").read_text())
    assert stored["data"][2]["available_tokens"] == 64, "whole blocks only"
    logged = [entry for entry in RunDirectory(whole / "out").history() if "eval_code_loss" in entry]
    assert all("eval_code_perplexity" in entry and entry["stage"] in range(4) for entry in logged)


@pytest.mark.parametrize("name", ["corpus", "web"])
def test_an_only_source_has_no_loss_of_its_own(tmp_path, name):
    """`Corpus.held_out` names every source; the loss of the only one is `eval_loss`, and is logged once."""
    data = MixedBlocks({name: packed(tmp_path, "web", TOKENS["web"])}, {name: 1.0})
    run = trainer(tmp_path / "out", data=data, eval_dataset={name: packed(tmp_path, "held-out", 200, shift=1)})
    run.train()
    logged = [entry for entry in RunDirectory(tmp_path / "out").history() if any(key[:5] == "eval_" for key in entry)]
    assert len(logged) == 7, "at the end of each stage, and after each growth"
    assert all(name not in key for entry in logged for key in entry)
    assert all(record.eval_losses == {} and record.eval_loss for record in RunDirectory(tmp_path / "out").records())


def test_sources_that_are_read_again_are_reported(whole, tmp_path, caplog):
    trainer(tmp_path / "out", data=mixed(whole), eval_dataset=None)._warn()
    warnings = [record.getMessage() for record in caplog.records if "passes over it" in record.getMessage()]
    assert len(warnings) == 1 and "of source code, which has 64: the run will make 4.2 passes" in warnings[0]


def test_other_data_and_vocabularies_are_refused(whole, tmp_path):
    tokenizer, other = (train_tokenizer(["to be or not to be"] * 2, size) for size in (257, 259))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    path = tmp_path / "out"
    model = small_model()
    model.resize_token_embeddings(300)

    def again(**settings):
        run = trainer(path, data=mixed(whole, **settings), model=model, processing_class=tokenizer, eval_dataset=None)
        run.train(resume_from_checkpoint=RunDirectory(path).exists)

    run = trainer(
        path,
        data=mixed(whole),
        model=model,
        processing_class=tokenizer,
        eval_dataset=None,
        callbacks=[Interrupt(STEPS + 1)],
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(RunError, match="other documents, or other weights of its mixture; resume with the same data"):
        again(fingerprint="other")
    changed = trainer(path, data=mixed(whole), model=model, processing_class=other, eval_dataset=None)
    with pytest.raises(RunError, match="another tokenizer, and a vocabulary cannot change between stages"):
        changed.train(resume_from_checkpoint=True)
    again()
    assert RunDirectory(path).is_finished


def test_documents_are_kept_apart_in_training(whole, tmp_path):
    """A loss is the mean over predictions within documents, whatever else is in the block."""
    run = trainer(tmp_path / "out", data=mixed(whole, eos=EOS), eval_dataset=None, model=small_model(dropout=0.0))
    model, document_losses = small_model(dropout=0.0), []
    batch = [run.blocks.parts["web"][number] for number in range(BATCH)]
    for row in (example["input_ids"].tolist() for example in batch):
        ends = [index + 1 for index, token in enumerate(row) if token == EOS] + [len(row)]
        for start, end in pairwise(dict.fromkeys([0, *ends])):
            ids = torch.tensor([row[start:end]])
            if ids.shape[1] > 1:
                logits = model(input_ids=ids).logits[0, :-1]
                document_losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    tokens = sum(int((example["labels"][1:] != -100).sum()) for example in batch)
    inputs = {name: torch.stack([example[name] for example in batch]) for name in batch[0]}
    model.config.use_cache = False
    with torch.no_grad():
        loss = float(model(**inputs).loss)
    assert loss == pytest.approx(float(sum(document_losses).detach()) / tokens, rel=1e-5)
    run.train()
    assert RunDirectory(tmp_path / "out").is_finished


def test_kernels_that_would_mix_documents_are_refused(whole, tmp_path):
    model = small_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(RunError, match=r"document_mask under flash_attention_2 takes one block at a time, got 4"):
        trainer(tmp_path / "out", data=mixed(whole, eos=EOS), model=model, eval_dataset=None)
    model.config._attn_implementation_internal = "flash_attention_2"
    trainer(tmp_path / "out", data=mixed(whole), model=model, schedule=SCHEDULE, eval_dataset=None)
