"""Exact perplexity of a causal language model, as a measurement of the library `evaluate`.

Load it by its path, without a network: `evaluate.load(slop_hf.evaluation.measurements.path_of("perplexity"))`.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from slop_hf.evaluation.held_out import HeldOut, perplexity_of
from slop_hf.evaluation.scoring import Subject

_DESCRIPTION = """
exp of the mean loss of all predicted tokens, summed in float64 over texts that are cut into blocks. It does not depend
on the batch size: no mean of batches is taken.
"""

_INPUTS = """
Args:
    data (list of str): the texts.
    model_id (str): a directory or Hub id[@revision] of a causal language model with its tokenizer.
    block_size (int): tokens of a block; default, as many as the model reads, 2048 at most.
    batch_size (int or "auto"): blocks at a time.
    device (str): default, a GPU if there is one.
Returns:
    perplexity (float), loss (float): of all tokens, the loss in nats a token.
    perplexities (list of float): of each text.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Perplexity(evaluate.Measurement):
    """See above."""

    def _info(self) -> Any:
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
    ) -> dict[str, Any]:
        subject = Subject(model_id, device)
        if subject.tokenizer is None:
            raise ValueError(f"{model_id} has no tokenizer: save it beside the model")
        room = getattr(subject.model.config, "max_position_embeddings", 2048)
        names = [f"text {number}" for number in range(len(data))]
        texts = dict(zip(names, data, strict=True))
        held_out = HeldOut.of_texts(texts, subject.tokenizer, block_size or min(room, 2048))
        metrics = perplexity_of(subject.model.eval(), held_out, batch_size=batch_size).metrics
        each = [metrics.get(f"perplexity/{name}", metrics["perplexity"]) for name in names]
        return {"perplexity": metrics["perplexity"], "loss": metrics["loss"], "perplexities": each}
