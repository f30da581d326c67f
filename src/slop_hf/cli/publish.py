"""`slop publish`: the command and its dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import slop_hf

from ..errors import HubError
from ..io.hub_address import check_repository
from ..io.serialization import Json
from ..io.units import format_bytes
from ..runs.directory import RunDirectory
from .options import AsJson, Run
from .shared import print_json, print_table

if TYPE_CHECKING:
    from ..hub.publish import Published


def publish_command(
    run: Run,
    to: Annotated[str, typer.Option("--to", help="Repository on the Hub, user/name; created if it does not exist.")],
    stage: Annotated[
        list[int] | None, typer.Option(help="Stage to publish; repeat it for more. Default: all finished stages.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository, not a private one.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Model on the Hub that the run began with, for the model cards.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print branches and sizes; upload nothing.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="With --dry-run: list every file of each branch.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a run's finished stages on the Hub.

    Each stage becomes a branch named like its directory, with a model card; the final model is also on `main`. A
    revision appears complete or not at all, and existing revisions are left alone, so that you can repeat the command
    after a failure. The token comes from `hf auth login`, or HF_TOKEN.

    Example: `slop publish runs/tiny --to user/tiny --dry-run`
    """
    directory = RunDirectory(run)
    if "/" not in check_repository(to):
        raise HubError(f"--to {to} has no user or organization: expected user/name, such as user/{to}")
    if dry_run:
        _show_plan(directory, stage, to, base_model, wide=wide, as_json=as_json)
        return
    revisions = slop_hf.publish_run(
        directory,
        to,
        stages=stage,
        private=not public,
        base_model=base_model,
        report=None if as_json else _show_revision,
    )
    if as_json:
        print_json([{"address": str(one.address), "is_new": one.is_new, "bytes": one.nbytes} for one in revisions])


def _show_revision(revision: Published) -> None:
    print(f"{revision.address}: {format_bytes(revision.nbytes) if revision.is_new else 'exists already'}", flush=True)


def _show_plan(
    run: RunDirectory, stages: list[int] | None, to: str, base_model: str | None, *, wide: bool, as_json: bool
) -> None:
    rows: list[dict[str, Json]] = []
    for number in run.select_stages(stages):
        plan = slop_hf.plan_revision(run, number, to, base_model=base_model)
        rows += [{"address": f"{to}@{branch}", "files": plan.sizes} for branch in plan.branches]
    if as_json:
        print_json(rows)
        return
    if wide:
        for row in rows:
            print(f"{row['address']}: would hold {format_bytes(sum(row['files'].values()))}")
            for name, size in row["files"].items():
                print(f"  {name:<32} {format_bytes(size):>12}")
        return
    names = dict.fromkeys(name for row in rows for name in row["files"] if not name.endswith(".safetensors"))
    print_table(
        f"{escape(to)} would hold",
        ("branch", ">files", ">weights", ">in all"),
        [
            (
                escape(row["address"].rpartition("@")[2]),
                str(len(row["files"])),
                format_bytes(sum(size for name, size in row["files"].items() if name.endswith(".safetensors"))),
                format_bytes(sum(row["files"].values())),
            )
            for row in rows
        ],
        caption=f"next to the weights: {', '.join(map(escape, names))}; --wide lists every file",
    )
