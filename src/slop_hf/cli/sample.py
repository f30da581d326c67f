"""`slop sample`: text that a run's newest model writes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import RunError
from ..runs.directory import RunDirectory, find_newest_model
from .options import AsJson
from .shared import is_quiet, print_json


def sample_command(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model directory, or Hub id[@revision].")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    stage: Annotated[
        int | None, typer.Option(help="Stage of the run. Default: its newest checkpoint or stage.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divisor of the logits; 0 always takes the most likely token.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a model continue a text: the newest checkpoint or stage of a run, also while the run trains.

    The text goes to stdout, the name of the model to stderr.

    Examples:

    `slop sample runs/tiny "def __init__(self"`

    `slop sample runs/tiny "import " --stage 2 --temperature 0 --max-new-tokens 20`
    """
    model = _choose_model(source, stage)
    from ..evaluation.sampling import generate_text  # with torch, which `slop --help` does without

    sample = generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if as_json:
        print_json(sample)
        return
    if not is_quiet():
        print(f"{sample.model}:", file=sys.stderr)
    print(prompt + sample.text)


def _choose_model(source: str, stage: int | None) -> str:
    run = RunDirectory(source)
    if not run.exists:
        if stage is not None:
            raise RunError(f"--stage is for a run, and {source} is none; leave it out, or give a run directory")
        return source
    if stage is None:
        return str(find_newest_model(run))
    run.select_stages([stage])
    return str(run.stage_dir(stage))
