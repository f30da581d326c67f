"""Data beside the libraries that it is built on: tokenizing, reading, resuming; `README.md` says how to read a record.

python benchmarks/data.py                 # about ten minutes, on a machine that does nothing else
python benchmarks/data.py --scale tiny    # to see that it works; the figures mean nothing
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from growth import ROOT, goals_table
from measuring import Record, alternate, circumstances, goal
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from slop_hf import RunConfig
from slop_hf.data import MixedBlocks, PackedDataset, Source, documents, train_tokenizer
from slop_hf.data.order import BlockOrder
from slop_hf.data.packing import TokenWriter
from slop_hf.data.tokenizing import plain_backend, tokenize
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json

OUTPUTS = {"full": ROOT / "benchmarks/results/data.json", "tiny": ROOT / "runs/benchmarks/data.json"}
TINY_RECIPE = ROOT / "recipes" / "grow_tiny.yaml"
SOURCE = "python-stdlib"
#: Documents to tokenize, tokens of the cache that is read, blocks read at a time.
SIZES = {"full": (None, 100_000_000, 40_000), "tiny": (100, 200_000, 400)}
VOCABULARIES = {"full": 32_000, "tiny": 500}
BLOCK_SIZES, BATCH = (128, 2048), 16
WEIGHTS = (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)  # of the paper's seven sources
ENCODED = 1000  # texts that the bare tokenizer is given at a time


def tokenizing(scale: str, repetitions: int, folder: Path) -> Record:
    """Documents to files, beside `encode_batch` on texts that are in memory already."""
    source = Source(SOURCE, max_documents=SIZES[scale][0])
    texts = list(documents(source))
    tokenizer = train_tokenizer(texts, VOCABULARIES[scale])
    backend = plain_backend(tokenizer)

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            return clocked(lambda: tokenize(source, tokenizer, Path(made), 0.01, "t", title="", progress=False))

    def bare() -> float:
        return clocked(
            lambda: [backend.encode_batch(texts[at : at + ENCODED]) for at in range(0, len(texts), ENCODED)]
        )

    seconds = alternate({"tokenize": ours, "encode_batch": bare}, repetitions)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    rate = medians["encode_batch"] / medians["tokenize"]
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": len(tokenizer),
        "timed": "reading, hashing, tokenizing and writing to the disk; beside encode_batch alone, offsets included",
        "seconds": seconds,
        "rate_ratio": rate,
        "goals": [goal("encode_batch's rate / ours", 1 / rate, 1 / 0.9)],
    }


def cache(folder: Path, tokens: int, block_size: int) -> MixedBlocks:
    """Random tokens of seven sources, shared out by their weights."""
    parts = {}
    for number, weight in enumerate(WEIGHTS):
        path = folder / f"{number}.ds"
        if not path.exists():
            with TokenWriter(path, "random", 32_000) as writer:
                draws = np.random.default_rng(number)
                for _ in range(max(1, round(tokens * weight / 100_000))):
                    writer.write([draws.integers(1, 32_000, 99_999)], eos=0)
        parts[str(number)] = PackedDataset(path, block_size)
    return MixedBlocks(parts, dict(zip(parts, WEIGHTS, strict=True)), "random")


def loader(dataset: MixedBlocks, blocks: int, skip: int = 0) -> DataLoader[Any]:
    """As Trainer and accelerate make it, behind so many batches."""
    stretch = BlockOrder(dataset, 0, blocks, seed=0)
    batches = BatchSamplerShard(BatchSampler(SequentialSampler(stretch), BATCH, False), 1, 0)
    return DataLoader(stretch, batch_sampler=SkipBatchSampler(batches, skip), collate_fn=default_data_collator)


def reading(scale: str, repetitions: int, folder: Path) -> Record:
    """Blocks in the stream's order, beside numpy slices of the same places of the same files."""
    _, tokens, count = SIZES[scale]
    cases, goals = [], []
    for block_size in BLOCK_SIZES:
        blocks = min(count, tokens // block_size) // BATCH * BATCH
        dataset = cache(folder, tokens, block_size)
        stretch = BlockOrder(dataset, 0, blocks, seed=0)
        places = list(zip(*(axis.tolist() for axis in stretch.order.places(np.arange(blocks))), strict=True))
        mapped = [np.memmap(part.path, dtype="<u2", mode="r") for part in dataset.parts.values()]
        contenders = {
            "stream": partial(clocked, partial(read_stream, stretch)),
            "loader": partial(clocked, lambda blocks=blocks, dataset=dataset: list_of(loader(dataset, blocks))),
            "slices": partial(clocked, partial(read_slices, mapped, places, block_size)),
        }
        seconds = alternate(contenders, repetitions)
        rates = {name: blocks * block_size / statistics.median(runs) for name, runs in seconds.items()}
        ratio = rates["slices"] / rates["stream"]
        cases.append({"block_size": block_size, "blocks": blocks, "seconds": seconds, "tokens_per_second": rates})
        goals.append(goal(f"blocks of {block_size}: rate of numpy slices / the stream's", ratio, 2.0))
    consumed = training_rate(2 if scale == "tiny" else 20)
    goals.append(
        goal("rate of the tiny recipe / the loader's", consumed / cases[0]["tokens_per_second"]["loader"], 0.02)
    )
    return {
        "tokens": tokens,
        "batch": BATCH,
        "timed": "stream: examples in the stream's order, a batch at a time; loader: DataLoader with collation, in "
        "this process; slices: a numpy slice of the memory-mapped file for each block, copied",
        "training_tokens_per_second": consumed,
        "cases": cases,
        "goals": goals,
    }


def read_stream(stretch: BlockOrder) -> None:
    for first in range(0, len(stretch), BATCH):
        stretch.__getitems__(range(first, first + BATCH))


def list_of(batches: DataLoader[Any]) -> None:
    for _ in batches:
        pass


def read_slices(mapped: Sequence[Any], places: Sequence[tuple[int, int]], block_size: int) -> None:
    for source, block in places:
        np.array(mapped[source][block * block_size : (block + 1) * block_size])


def training_rate(steps: int) -> float:
    """Tokens a second of the tiny recipe's first and fastest stage: forward, backward and AdamW."""
    config = RunConfig.from_yaml(TINY_RECIPE)
    dims, block_size, vocab = config.read_schedule().initial, config.data.block_size, config.data.vocab_size
    base = LlamaConfig(vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=block_size)
    model = LlamaForCausalLM(dims.to_config(base)).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, vocab, (BATCH, block_size))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = clocked(lambda: [step() for _ in range(steps)])
    return steps * tokens.numel() / seconds


def resuming(scale: str, repetitions: int, folder: Path) -> Record:
    """From opening the files to the first batch in the middle of all tokens."""
    block_size = BLOCK_SIZES[0]  # the smallest: the most blocks to pass over
    cache(folder, SIZES[scale][1], block_size)

    def first_batch() -> None:
        dataset = cache(folder, SIZES[scale][1], block_size)
        blocks = len(dataset) // BATCH * BATCH
        next(iter(loader(dataset, blocks, skip=blocks // BATCH // 2)))

    seconds = [clocked(first_batch) for _ in range(repetitions)]
    return {
        "tokens": SIZES[scale][1],
        "block_size": block_size,
        "seconds": seconds,
        "goals": [goal("seconds to the first batch", statistics.median(seconds), 1.0)],
    }


def clocked(function: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


PARTS = {"tokenizing": tokenizing, "reading": reading, "resuming": resuming}


def table(record: Record) -> Table:
    """Median seconds of everything that was timed."""
    shown = Table("part", "what", "median s", title="data")
    for name in PARTS:
        part = record[name]
        for case in part.get("cases", [part]):
            timings = case["seconds"] if isinstance(case["seconds"], dict) else {"first batch": case["seconds"]}
            for what, runs in timings.items():
                label = f"{what}, blocks of {case['block_size']}" if "block_size" in case else what
                shown.add_row(name, label, f"{statistics.median(runs):.3f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=OUTPUTS, default="full", help="tiny: little data, to try it out")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement; the median counts")
    parser.add_argument("--output", type=Path, help="the record (full: benchmarks/results/data.json)")
    parser.add_argument("--workdir", type=Path, help="where tokens are written (default: $TMPDIR)")
    options = parser.parse_args(arguments)
    output = options.output or OUTPUTS[options.scale]
    command = f"python benchmarks/data.py --scale {options.scale} --repetitions {options.repetitions}"
    record: Record = circumstances(options.scale, options.repetitions, command)
    with tempfile.TemporaryDirectory(prefix="data-benchmark-", dir=options.workdir) as directory:
        for name, part in PARTS.items():
            record[name] = part(options.scale, options.repetitions, Path(directory))
    record["goals"] = [one for name in PARTS for one in record[name].pop("goals")]
    write_text(output, to_json(record))
    console = Console()
    console.print(table(record))
    console.print(goals_table(record))
    console.print(f"record: {output}")


if __name__ == "__main__":
    main()
