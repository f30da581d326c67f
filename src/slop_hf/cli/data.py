"""`slop data`: inspect, tokenize, train-tokenizer."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import slop_hf

from ..errors import DataError
from ..io.files import write_directory
from ..io.serialization import parse, read_yaml
from ..io.serialization import set_keys as change_values
from .data_view import overview, samples_of, show_overview, show_result, show_samples
from .shared import read_changes

if TYPE_CHECKING:
    from ..data import DataConfig

data = typer.Typer(
    help="Look at training data, tokenize it, and train tokenizers, before a run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Config = Annotated[Path, typer.Argument(help="A mixture's file (sources), or a run's (its section data).")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value: --set data.block_size=512, or --set sources.NAME.max_documents=1000"),
]


@data.command()
def inspect(
    config: Config,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each source to show, shortened.")] = 1,
    change: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what a mixture holds, and how long it lasts. Writes nothing.

    Tokens, disk and time come from the first 4 MiB of each source, and are marked ~; where all tokens are in the cache
    they are exact. Datasets on the Hub do not say how large they are, unless `max_documents` does.

    The scarcest source for its weight decides how many tokens there are before one is read a second time: a run with
    more tokens than that repeats it.

    Examples:

    `slop data inspect recipes/data/redpajama.yaml`

    `slop data inspect recipes/grow_tiny.yaml --samples 0`
    """
    chosen = read_data(config, change)
    found = overview(chosen)
    texts = samples_of(chosen, samples)
    if as_json:
        print(json.dumps({**found, "samples": texts}, indent=2, ensure_ascii=False))
        return
    show_overview(found, f"{config}")
    show_samples(texts)


@data.command()
def tokenize(
    config: Config,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's folder or Hub id, in place of the config's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it would take, and write nothing.")] = False,
    change: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts (or the cost) as JSON.")] = False,
) -> None:
    """Tokenize a mixture into the cache, from which runs then begin at once.

    The cost is shown first. Each source is tokenized once and kept by itself: other weights, block sizes and runs use
    the same tokens. A command that was interrupted goes on where it was when it is called again.

    Runs find the tokens if they name the same sources, tokenizer, `held_out` and `cache_dir`.

    Example: `slop data tokenize recipes/data/local.yaml --set data.cache_dir=tokens`
    """
    chosen = read_data(config, change)
    if tokenizer is not None:
        chosen = dataclasses.replace(chosen, tokenizer=tokenizer)
    found = overview(chosen)
    if not as_json:
        show_overview(found, f"{config}")
    if dry_run:
        if as_json:
            print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        corpus = slop_hf.prepare_data(chosen)
    show_result(corpus, as_json=as_json)


@data.command("train-tokenizer")
def train_tokenizer(
    config: Config,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write, new or empty.")],
    kind: Annotated[
        str | None, typer.Option(help="'bpe', byte-level, or 'sentencepiece', as LLaMA has. Default: the config's.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens in all. Default: the config's.")] = None,
    change: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Train a tokenizer on a mixture: on 64 MiB of its training documents, of each source its share.

    It is saved as transformers saves one, and `AutoTokenizer` loads it. Name its directory as `data.tokenizer` of runs
    and they share it, whatever data they have. 'sentencepiece' needs `pip install "slop-hf[sentencepiece]"` here, and
    nothing where the tokenizer is used.

    Example: `slop data train-tokenizer recipes/data/local.yaml -o tokenizers/local --vocab-size 8192`
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not an empty directory: choose another one")
    chosen = read_data(config, change)
    chosen = dataclasses.replace(
        chosen,
        tokenizer=None,
        tokenizer_kind=kind or chosen.tokenizer_kind,  # type: ignore[arg-type]
        vocab_size=chosen.vocab_size if vocab_size is None else vocab_size,
    )
    from .. import data as feed  # torch takes seconds
    from ..data.corpus import tokenizer_texts

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        trained = feed.train_tokenizer(tokenizer_texts(chosen), chosen.vocab_size, chosen.tokenizer_kind)
        with write_directory(output) as aside:
            trained.save_pretrained(aside)
    if as_json:
        made = {"tokenizer": str(output), "kind": chosen.tokenizer_kind, "vocab_size": len(trained)}
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return
    print(f"{chosen.tokenizer_kind} tokenizer of {len(trained):,} tokens written to {output}")
    print(f"to use it: data.tokenizer: {output}")


def read_data(path: Path, changes: list[str] | None) -> DataConfig:
    """The data that a mixture's or a run's file describes, with `--set` changes.

    Changes of a mixture begin with `sources.`; those that begin with `data.` are for what else a run says of its data,
    and hold for a mixture's file, too.

    Raises:
        SlopError: naming the file and the key at fault.
    """
    from ..data import DataConfig  # with torch, which `slop --help` does without

    content = read_yaml(path, error=DataError)
    overrides = read_changes(changes)
    if not isinstance(content, dict) or "sources" not in content:
        return slop_hf.RunConfig.from_yaml(path, overrides=overrides).data
    described: dict[str, Any] = {"mixture": content}
    within = {
        key.removeprefix("data.") if key.startswith("data.") else f"mixture.{key}": value
        for key, value in overrides.items()
    }
    change_values(described, within, where=str(path), error=DataError)
    return parse(DataConfig, described, where=str(path), error=DataError)
