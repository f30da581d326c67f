"""Model cards of published stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ..evaluation.tasks import PERPLEXITY
from ..io.units import NOTHING, format_count, format_decimals, format_significant
from ..report.tables import tabulate_stages
from ..runs.records import END_OF_STAGE, EvalRecord
from .lineage import LINEAGE_FILE, Lineage

#: Data-set id of held-out text in the metadata, which requires one.
HELD_OUT_DATASET = "held-out"
#: Words for the dimension that an operator enlarges.
DIMENSIONS = {
    "layer": "number of layers",
    "mha": "number of attention heads",
    "ffn": "feed-forward size",
    "hidden": "hidden size",
    "head_dim": "head size",
}
#: Address of each evaluation program; the Hub shows no source without one.
SOURCES = {"lm-eval": "https://github.com/EleutherAI/lm-evaluation-harness"}


def render_card(lineage: Lineage, repo_id: str, *, base_model: str | None, has_tokenizer: bool) -> str:
    """Return the model card of a stage, as Markdown with metadata; `base_model` is what the run started from."""
    name, record = repo_id.rpartition("/")[2], lineage.record
    results = list(_list_results(lineage))
    metadata = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,  # the Hub has no relation "grown"
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slop-hf", "model-growth"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = _load_template().render(
        metadata=metadata.to_yaml(),
        name=name,
        repo_id=repo_id,
        lineage=lineage,
        lineage_file=LINEAGE_FILE,
        record=record,
        total_tokens=sum(stage.tokens for stage in (*lineage.ancestors, record)),
        grown=_name_dimensions(record.operators),
        order=", then ".join(_name_dimensions(stage.operators) for stage in lineage.schedule.stages),
        is_last=record.stage == len(lineage.schedule.stages),
        earlier=len(lineage.ancestors) - record.stage,
        base_model=base_model,
        target=f"{2 * record.parameters:.1e}".replace("e+0", "e").replace("e+", "e"),
        table=tabulate_stages([*lineage.ancestors, record]).markdown(),
        scores=[row for scores in lineage.evaluations for row in _make_rows(scores)],
        has_tokenizer=has_tokenizer,
    )
    return str(ModelCard(text))


def _name_dimensions(operators: Sequence[str]) -> str:
    return " and ".join(f"the {DIMENSIONS.get(name, name)}" for name in operators)


@cache
def _load_template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=format_count, decimals=format_decimals)
    return environment.get_template("card.md.j2")


def _make_rows(record: EvalRecord) -> Iterator[tuple[str, ...]]:
    """Yield one row of the table of results per metric."""
    task = record.task if record.when == END_OF_STAGE else f"{record.task} ({record.when.replace('_', ' ')})"
    shots = NOTHING if record.num_fewshot is None else str(record.num_fewshot)
    documents = NOTHING if record.documents is None else f"{record.documents:,}"
    for metric, value in record.metrics.items():
        error = format_significant(record.stderr.get(metric))
        yield task, metric, format_significant(value), error, shots, documents


def _list_results(lineage: Lineage) -> Iterator[EvalResult]:
    """Yield the scores of the trained stage in the Hub's format, or else the perplexity that training measured."""
    scores = [record for record in lineage.evaluations if record.when == END_OF_STAGE]
    held_out = "held-out text" if scores else "held-out part of the training data"
    if not scores and lineage.record.perplexity is not None:
        scores = [EvalRecord(PERPLEXITY, {"perplexity": lineage.record.perplexity})]
    for record in scores:
        source = SOURCES.get(record.harness.partition(" ")[0])
        for metric, value in record.metrics.items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=HELD_OUT_DATASET if record.task == PERPLEXITY else record.task,
                    dataset_name=held_out if record.task == PERPLEXITY else record.task,
                    metric_type=metric,
                    metric_value=value,
                    dataset_args=None if record.num_fewshot is None else {"num_few_shot": record.num_fewshot},
                    source_name=record.harness if source else None,
                    source_url=source,
                )
