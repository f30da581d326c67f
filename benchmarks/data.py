"""Tokenizing, reading and resuming, compared with the libraries underneath; `README.md` explains the record.

python benchmarks/data.py                 # about ten minutes, on an otherwise idle machine
python benchmarks/data.py workers         # one part
python benchmarks/data.py --scale tiny    # to see that it works; the numbers mean nothing
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from measuring import (
    ROOT,
    Record,
    alternate,
    build_goals_table,
    describe_circumstances,
    make_goal,
    make_parser,
    read_options,
    save_part,
    time_call,
)
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from slop_hf import RunConfig
from slop_hf.data import MixedBlocks, PackedDataset, Source, read_documents, train_tokenizer
from slop_hf.data.config import PACKAGES, DataPart
from slop_hf.data.order import BlockOrder
from slop_hf.data.packing import TokenWriter
from slop_hf.data.parts import TokenizingJob, merge_parts, tokenize_part
from slop_hf.data.sources import list_local_files
from slop_hf.data.tokenizing import SPLITS, make_plain_backend, tokenize

TINY_RECIPE = ROOT / "recipes" / "grow_tiny.yaml"
SOURCE = "python-stdlib"
#: Documents to tokenize, tokens in the cache to read, number of blocks to read.
SIZES = {"full": (None, 100_000_000, 40_000), "tiny": (100, 200_000, 400)}
VOCABULARIES = {"full": 32_000, "tiny": 500}
BLOCK_SIZES, BATCH = (128, 2048), 16
WEIGHTS = (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02)  # of the paper's seven sources
ENCODED = 1000  # texts per call of the bare tokenizer
#: Bytes of text for one worker and for several, and for the tokenizer that they use.
WORKERS_BYTES = {"full": 100_000_000, "tiny": 300_000}
TOKENIZER_BYTES = {"full": 10_000_000, "tiny": 100_000}


def measure_tokenizing(scale: str, repetitions: int, folder: Path) -> Record:
    """Measure tokenizing documents into files, compared with `encode_batch` on texts in memory."""
    source = Source(SOURCE, max_documents=SIZES[scale][0])
    texts = list(read_documents(source))
    tokenizer = train_tokenizer(texts, VOCABULARIES[scale])
    backend = make_plain_backend(tokenizer)

    def tokenize_documents() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            return time_call(lambda: tokenize(source, tokenizer, Path(made), 0.01, "t"))

    def encode_texts() -> float:
        return time_call(
            lambda: [backend.encode_batch(texts[at : at + ENCODED]) for at in range(0, len(texts), ENCODED)]
        )

    seconds = alternate({"tokenize": tokenize_documents, "encode_batch": encode_texts}, repetitions)
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    rate = medians["encode_batch"] / medians["tokenize"]
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": len(tokenizer),
        "timed": "reading, hashing, tokenizing and writing to the disk; the peer is encode_batch alone, with offsets",
        "seconds": seconds,
        "rate_ratio": rate,
        "goals": [make_goal("encode_batch's rate / ours", 1 / rate, 1 / 0.9)],
    }


def open_cache(folder: Path, tokens: int, block_size: int) -> MixedBlocks:
    """Open a cache of random tokens from seven sources, shared by their weights; write it first if it is missing."""
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


def build_loader(dataset: MixedBlocks, blocks: int, skip: int = 0) -> DataLoader[dict[str, torch.Tensor]]:
    """Build the loader as Trainer and accelerate do, after skipping the first `skip` batches."""
    stretch = BlockOrder(dataset, 0, blocks, seed=0)
    batches = BatchSamplerShard(BatchSampler(SequentialSampler(stretch), BATCH, False), 1, 0)
    return DataLoader(stretch, batch_sampler=SkipBatchSampler(batches, skip), collate_fn=default_data_collator)


def measure_reading(scale: str, repetitions: int, folder: Path) -> Record:
    """Measure reading blocks in the stream's order, compared with numpy slices of the same files."""
    _, tokens, count = SIZES[scale]
    cases, goals = [], []
    for block_size in BLOCK_SIZES:
        blocks = min(count, tokens // block_size) // BATCH * BATCH
        dataset = open_cache(folder, tokens, block_size)
        stretch = BlockOrder(dataset, 0, blocks, seed=0)
        cursors = list(zip(*(axis.tolist() for axis in stretch.order.locate(np.arange(blocks))), strict=True))
        mapped = [np.memmap(part.path, dtype="<u2", mode="r") for part in dataset.parts.values()]
        contenders = {
            "stream": partial(time_call, partial(read_stream, stretch)),
            "loader": partial(time_call, partial(read_all_batches, dataset, blocks)),
            "slices": partial(time_call, partial(read_slices, mapped, cursors, block_size)),
        }
        seconds = alternate(contenders, repetitions)
        rates = {name: blocks * block_size / statistics.median(runs) for name, runs in seconds.items()}
        ratio = rates["slices"] / rates["stream"]
        cases.append({"block_size": block_size, "blocks": blocks, "seconds": seconds, "tokens_per_second": rates})
        goals.append(make_goal(f"blocks of {block_size}: rate of numpy slices / the stream's", ratio, 2.0))
    consumed = measure_training_rate(2 if scale == "tiny" else 20)
    goals.append(
        make_goal("rate of the tiny recipe / the loader's", consumed / cases[0]["tokens_per_second"]["loader"], 0.02)
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


def read_all_batches(dataset: MixedBlocks, blocks: int) -> None:
    for _ in build_loader(dataset, blocks):
        pass


def read_slices(mapped: Sequence[Any], places: Sequence[tuple[int, int]], block_size: int) -> None:
    for source, block in places:
        np.array(mapped[source][block * block_size : (block + 1) * block_size])


def measure_training_rate(steps: int) -> float:
    """Measure the tokens per second of the tiny recipe's first stage, its fastest: forward, backward and AdamW."""
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
    seconds = time_call(lambda: [step() for _ in range(steps)])
    return steps * tokens.numel() / seconds


def measure_resuming(scale: str, repetitions: int, folder: Path) -> Record:
    """Measure the time from opening the files to the first batch in the middle of all tokens."""
    block_size = BLOCK_SIZES[0]  # the smallest: it has the most blocks to skip
    open_cache(folder, SIZES[scale][1], block_size)

    def first_batch() -> None:
        dataset = open_cache(folder, SIZES[scale][1], block_size)
        blocks = len(dataset) // BATCH * BATCH
        next(iter(build_loader(dataset, blocks, skip=blocks // BATCH // 2)))

    seconds = [time_call(first_batch) for _ in range(repetitions)]
    return {
        "tokens": SIZES[scale][1],
        "block_size": block_size,
        "seconds": seconds,
        "goals": [make_goal("seconds to the first batch", statistics.median(seconds), 1.0)],
    }


def measure_workers(scale: str, repetitions: int, folder: Path) -> Record:
    """Measure the rate of one worker per core, compared with one worker on one core times the number of cores."""
    workers = len(os.sched_getaffinity(0))
    texts = copy_packages(folder / "texts", WORKERS_BYTES[scale])
    documents = read_documents(Source(str(texts)))
    tokenizer = train_tokenizer(take_bytes(documents, TOKENIZER_BYTES[scale]), VOCABULARIES[scale])
    job = TokenizingJob(Source(str(texts)), tokenizer, 0.01, "t", None)
    tokens: set[int] = set()

    def tokenize_with(count: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as made, use_one_core() if count == 1 else nullcontext():
            building = Path(made, "building")
            building.mkdir()
            seconds = time_call(lambda: run_workers(job, building, count))
            tokens.add(sum((building / f"{split}.ds").stat().st_size // 2 for split in SPLITS))
            return seconds

    # The first call starts the process that all workers are forked from, and imports what they need.
    startup = time_call(partial(tokenize_first, texts, job, folder, workers))
    number = f"{workers} workers"
    contenders = {"1 worker": partial(tokenize_with, 1), number: partial(tokenize_with, workers)}
    seconds = alternate(contenders, repetitions)
    (total,) = tokens  # every run must give the same
    rates = {name: total / statistics.median(runs) for name, runs in seconds.items()}
    ratio = rates[number] / (workers * rates["1 worker"])
    nbytes = sum(path.stat().st_size for path in texts.iterdir())
    return {
        "documents": sum(1 for _ in texts.iterdir()),
        "bytes": nbytes,
        "tokens": total,
        "vocab_size": len(tokenizer),
        "workers": workers,
        "timed": "reading, hashing, tokenizing, writing and merging; one worker has one core, and nothing to merge",
        "startup_seconds": startup,
        "seconds": seconds,
        "tokens_per_second": rates,
        "bytes_per_second": {name: nbytes / statistics.median(runs) for name, runs in seconds.items()},
        "rate_ratio": ratio,
        "goals": [make_goal(f"{workers} x one worker's rate / that of {number}", 1 / ratio, 1 / 0.8)],
    }


def copy_packages(folder: Path, nbytes: int) -> Path:
    """Copy sources of the installed packages into a folder, in the order of their names, until it has `nbytes`."""
    folder.mkdir()
    copied = 0
    for number, path in enumerate((list_local_files(PACKAGES) or {}).values()):
        if copied >= nbytes:
            break
        copied += Path(shutil.copyfile(path, folder / f"{number:06}.py")).stat().st_size
    return folder


def take_bytes(texts: Iterator[str], nbytes: int) -> Iterator[str]:
    """Yield texts until they have `nbytes` characters."""
    for text in texts:
        if nbytes <= 0:
            break
        nbytes -= len(text)
        yield text


@contextmanager
def use_one_core() -> Iterator[None]:
    """Let this thread and those that it starts run on one core only, and tokenizers start none of its own."""
    cores, name = os.sched_getaffinity(0), "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.sched_setaffinity(0, [min(cores)])
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def run_workers(job: TokenizingJob, building: Path, workers: int) -> None:
    """Tokenize as `prepare_data` does: into `building`, or in pieces that are merged into it."""
    if workers == 1:
        job.run(building)
        return
    part, parts = DataPart(1, 1), building.with_name("parts")
    tokenize_part(job, parts / str(part), part, workers, None)
    merge_parts(job, [parts / str(part)], building)


def tokenize_first(texts: Path, job: TokenizingJob, folder: Path, workers: int) -> None:
    """Tokenize the first files, one per worker."""
    files = [str(path) for path in sorted(texts.iterdir())[:workers]]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        tokenize_part(job._replace(source=Source(files)), Path(made, "1-of-1"), DataPart(1, 1), workers, None)


PARTS = {
    "tokenizing": measure_tokenizing,
    "workers": measure_workers,
    "reading": measure_reading,
    "resuming": measure_resuming,
}


def build_table(name: str, record: Record) -> Table:
    """Return the median seconds of everything that was timed in a part."""
    table = Table("what", "median s", title=name)
    for case in record.get("cases", [record]):
        timings = case["seconds"] if isinstance(case["seconds"], dict) else {"first batch": case["seconds"]}
        for what, runs in timings.items():
            label = f"{what}, blocks of {case['block_size']}" if "block_size" in case else what
            table.add_row(label, f"{statistics.median(runs):.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("data", __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}, or all (default)")
    names = list(PARTS)
    repetitions = {"full": 3, "tiny": 3}
    options = read_options(parser, "data", arguments, repetitions=repetitions, parts=names, default_parts=names)
    console = Console()
    for part in options.parts:
        command = f"python benchmarks/data.py {part} --scale {options.scale} --repetitions {options.repetitions}"
        circumstances = describe_circumstances(options.scale, options.repetitions, command)
        console.print(f"[bold]{part}[/bold] ...")
        with tempfile.TemporaryDirectory(prefix="data-benchmark-", dir=options.workdir) as directory:
            record = PARTS[part](options.scale, options.repetitions, Path(directory))
        save_part(options.output, part, {**circumstances, **record}, PARTS)
        console.print(build_table(part, record))
        console.print(build_goals_table(record))
    console.print(f"record: {options.output}")


if __name__ == "__main__":
    main()
