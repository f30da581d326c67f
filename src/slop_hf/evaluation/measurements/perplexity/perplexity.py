"""Exact perplexity of a causal language model, as a measurement of the library `evaluate`.

Load it by its path, without a network: `evaluate.load(slop_hf.evaluation.measurements.path_of("perplexity"))`.
"""

from __future__ import annotations

import datasets
import evaluate

from slop_hf.errors import EvaluationError
from slop_hf.evaluation.held_out import HeldOut, measure_perplexity
from slop_hf.evaluation.scoring import EvaluatedModel

_DESCRIPTION = """
Exponential of the mean loss of all predicted tokens. Texts are cut into blocks and losses summed in float64, not
averaged per batch, so the result does not depend on the batch size.
"""

_INPUTS = """
Args:
    data (list of str): the texts.
    model_id (str): directory or Hub id[@revision] of a causal language model with its tokenizer.
    block_size (int): tokens per block; default, the model's context, but at most 2048.
    batch_size (int or "auto"): blocks per batch.
    device (str): default, a GPU if there is one.
Returns:
    perplexity (float), loss (float): over all tokens; the loss in nats per token.
    perplexities (list of float): perplexity of each text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Perplexity(evaluate.Measurement):
    """Exact perplexity, for `evaluate.load`."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(
        self,
        data: list[str],
        model_id: str,
        block_size: int | None = None,
        batch_size: int | str = "auto",
        device: str | None = None,
    ) -> dict[str, float | list[float]]:
        model = EvaluatedModel(model_id, device)
        if model.tokenizer is None:
            raise EvaluationError(f"{model_id} has no tokenizer: save one with the model")
        context = getattr(model.model.config, "max_position_embeddings", 2048)
        names = [f"text {number}" for number in range(len(data))]
        texts = dict(zip(names, data, strict=True))
        held_out = HeldOut.from_texts(texts, model.tokenizer, block_size or min(context, 2048))
        metrics = measure_perplexity(model.model.eval(), held_out, batch_size=batch_size).metrics
        each = [metrics.get(f"perplexity/{name}", metrics["perplexity"]) for name in names]
        return {"perplexity": metrics["perplexity"], "loss": metrics["loss"], "perplexities": each}
