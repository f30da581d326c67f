"""`slop publish`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import slop_hf

from ..runs.directory import RunDirectory


def publish(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    to: Annotated[str, typer.Option("--to", help="The repository on the Hub, user/name; made if there is none.")],
    stage: Annotated[
        list[int] | None, typer.Option(help="A stage to publish; give it again for more. Default: all finished ones.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public, not private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="For the cards: the model on the Hub that the run began with.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print revisions, files and sizes, and send nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is published as JSON.")] = False,
) -> None:
    """Publish a run's finished stages on the Hub.

    Each stage is a branch named like its directory, with a model card; the final model is on `main` too. A revision
    appears whole or not at all, and what is there already is left alone, so that this can be repeated after a failure.
    The token is the one of `hf auth login`, or HF_TOKEN.

    Example: `slop publish runs/tiny --to user/tiny --dry-run`
    """
    found = RunDirectory(run)
    if dry_run:
        _show_plan(found, stage, to, base_model, as_json=as_json)
        return
    rows = []
    for one in slop_hf.publish_run(found, to, stages=stage, private=not public, base_model=base_model):
        rows.append({"address": str(one.address), "is_new": one.is_new, "bytes": one.nbytes})
        if not as_json:
            print(f"{one.address}: {_size(one.nbytes) if one.is_new else 'was there'}")
    if as_json:
        print(json.dumps(rows, indent=2))


def _show_plan(run: RunDirectory, stages: list[int] | None, to: str, base_model: str | None, *, as_json: bool) -> None:
    from ..hub.publish import stages_to_publish  # with torch

    rows: list[dict[str, Any]] = []
    for number in stages_to_publish(run, stages):
        plan = slop_hf.plan_revision(run, number, to, base_model=base_model)
        rows += [{"address": f"{to}@{branch}", "files": plan.sizes} for branch in plan.branches]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['address']}: would hold {_size(sum(row['files'].values()))}")
        for name, size in row["files"].items():
            print(f"  {name:<32} {_size(size):>12}")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:,.1f} KiB"
