"""Parameter counts, FLOPs and bytes of a structure, derived from the axis tables.

Every function takes one structure (`ModelDims`) or many at once (`DimsArray`), and answers with an int or an array.
`config` is a transformers config, or a dict with at least `model_type`, `vocab_size` and, if it is set,
`tie_word_embeddings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add, mul

from ..architectures import Parameter, get_architecture, read_setting
from ..dims import LARGEST_SIZE, DimsLike, ModelConfig, ModelDims, Size
from ..errors import PlanError
from ..io.numbers import require_whole_number

#: The paper's model, and the default: Llama with Llama's SentencePiece vocabulary, untied.
DEFAULT_CONFIG: ModelConfig = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
#: Operations of one step of AdamW per parameter: weight decay 1, first moment 3, second moment 4, and the update 6
#: (square root, bias correction, epsilon, quotient, learning rate, difference).
ADAMW_FLOPS = 14


def count_paper_params(dims: DimsLike[Size], experts: int = 1) -> Size:
    """Count parameters as the paper's objective does: `l * (6h^2 + 3hf)`.

    Only the weight matrices of the layers count: no embedding, norm or bias. The paper does not print the formula;
    this one reproduces the products in its Tables 1 and 4 to the printed digits. With experts, it is
    `l * (6h^2 + 3hf * experts)`.

    >>> from slop_hf import ModelDims
    >>> count_paper_params(ModelDims(768, 2048, 6, 6))
    49545216
    """
    hidden = dims.hidden_size
    return dims.num_hidden_layers * (6 * hidden * hidden + 3 * hidden * dims.intermediate_size * experts)


def count_parameters(dims: DimsLike[Size], config: ModelConfig = DEFAULT_CONFIG) -> Size:
    """Count all parameters, as `model.num_parameters()` does; tied embeddings count once.

    >>> from slop_hf import ModelDims
    >>> count_parameters(ModelDims(768, 2048, 6, 6))
    91629312
    """
    sizes = compute_axis_sizes(dims, config)
    rows = get_architecture(config).rows(config)
    return reduce(add, (_numel(row, sizes) * (dims.num_hidden_layers if row.is_in_layer else 1) for row in rows))


def count_layer_matrices(dims: DimsLike[Size], config: ModelConfig = DEFAULT_CONFIG) -> Size:
    """Count the parameters in the matrices of the layers, which Muon updates.

    >>> from slop_hf import ModelDims
    >>> count_layer_matrices(ModelDims(768, 2048, 6, 6))
    42467328
    """
    sizes = compute_axis_sizes(dims, config)
    rows = _list_muon_rows(config)
    matrices = (_numel(row, sizes) for row in rows)
    return dims.num_hidden_layers * reduce(add, matrices)


def count_flops_per_token(
    dims: DimsLike[Size], config: ModelConfig = DEFAULT_CONFIG, sequence_length: int = 2048
) -> Size:
    """Count the training FLOPs per token, forward and backward: `6 * (matrix weights + l * q * S)`.

    `q` is the width of the query projection and `S` the sequence length; the second term is for the scores and values
    of causal attention, half of the full square. The output projection counts even if it is tied, the embedding
    look-up never does. Recomputation of activations is not counted. With Llama's vocabulary and S = 2048, the
    paper's GPU hours are a linear function of this number. Of experts, the active ones count.

    Raises:
        PlanError: if `sequence_length` or the config's `vocab_size` is not a whole number, 1 or more.

    >>> from slop_hf import ModelDims
    >>> count_flops_per_token(ModelDims(768, 2048, 6, 6))
    458883072
    """
    require_whole_number(sequence_length, "sequence_length", most=LARGEST_SIZE, error=PlanError)
    sizes = compute_axis_sizes(dims, config)
    rows = [row for row in get_architecture(config).rows(config, tied=True) if row.kind == "projection"]
    weights = reduce(
        add, (_count_active(row, sizes, config) * (dims.num_hidden_layers if row.is_in_layer else 1) for row in rows)
    )
    return 6 * (weights + dims.num_hidden_layers * sizes["query"] * sequence_length)


def count_muon_flops(dims: ModelDims, config: ModelConfig = DEFAULT_CONFIG, iterations: int = 5) -> int:
    """Count the FLOPs with which Muon orthogonalises the matrices of the layers, per optimizer step.

    For a matrix X of m rows and n >= m columns, a Newton-Schulz iteration computes A = X X^T, A A and B X, which take
    `4 m^2 n + 2 m^3`. Work that is proportional to the number of parameters is not counted.

    >>> from slop_hf import ModelDims
    >>> count_muon_flops(ModelDims(768, 2048, 6, 6))
    842551787520
    """
    sizes = compute_axis_sizes(dims, config)
    rows = _list_muon_rows(config)
    shapes = [sorted(sizes[axis] for axis in row.axes) for row in rows]
    return dims.num_hidden_layers * iterations * sum(4 * m * m * n + 2 * m**3 for m, n in shapes)


def _list_muon_rows(config: ModelConfig) -> list[Parameter]:
    """Return the rows of the matrices that Muon updates; raise a `PlanError` for a family with experts."""
    family = get_architecture(config)
    if family.has_experts:
        raise PlanError(
            f"Muon takes one matrix per tensor, and {family.model_type} stacks those of its experts in one; use AdamW"
        )
    return [row for row in family.rows(config) if row.is_in_layer and row.kind == "projection"]


def compute_axis_sizes(dims: DimsLike[Size], config: ModelConfig = DEFAULT_CONFIG) -> dict[str, Size]:
    """Return the size of every axis in the family's table; refuse a config without a whole `vocab_size`."""
    vocabulary = read_setting(config, "vocab_size")
    require_whole_number(vocabulary, "vocab_size", most=LARGEST_SIZE, error=PlanError)
    query, key_value = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    sizes = {
        "hidden": dims.hidden_size,
        "ffn": dims.intermediate_size,
        "query": query,
        "key_value": key_value,
        "fused": 3 * query,
        "query_key_value": query + 2 * key_value,
        "gate_up": 2 * dims.intermediate_size,
        "head_dim": dims.head_dim,
        "vocab": vocabulary,
    }
    family = get_architecture(config)
    if any("position" in row.axes for row in family.parameters):
        sizes["position"] = family.read(config, "max_position_embeddings")
        require_whole_number(sizes["position"], "max_position_embeddings", most=LARGEST_SIZE, error=PlanError)
    if family.has_experts:
        sizes["experts"] = family.read(config, "num_experts")
        require_whole_number(sizes["experts"], "num_experts", most=LARGEST_SIZE, error=PlanError)
    return sizes


def count_experts(config: ModelConfig) -> int:
    """Return the number of experts per layer; 1 for a family without them.

    >>> count_experts({"model_type": "mixtral"}), count_experts({"model_type": "llama"})
    (8, 1)
    """
    family = get_architecture(config)
    return int(family.read(config, "num_experts")) if family.has_experts else 1


def count_active_experts(config: ModelConfig) -> int:
    """Return the number of experts per layer that each token passes through; refuse more than there are.

    >>> count_active_experts({"model_type": "mixtral"})
    2
    """
    family = get_architecture(config)
    active, experts = (family.read(config, name) for name in ("num_experts_per_tok", "num_experts"))
    require_whole_number(active, "num_experts_per_tok", most=experts, error=PlanError)
    return int(active)


def count_active_parameters(dims: DimsLike[Size], config: ModelConfig = DEFAULT_CONFIG) -> Size:
    """Count the parameters that a token uses: all of them, or, with experts, only those of the active ones.

    >>> from slop_hf import ModelDims
    >>> dims, mixtral = ModelDims(4096, 14336, 32, 32, 8), {"model_type": "mixtral", "vocab_size": 32000}
    >>> count_parameters(dims, mixtral), count_active_parameters(dims, mixtral)
    (46702792704, 12879925248)
    """
    sizes = compute_axis_sizes(dims, config)
    rows = get_architecture(config).rows(config)
    counts = (_count_active(row, sizes, config) * (dims.num_hidden_layers if row.is_in_layer else 1) for row in rows)
    return reduce(add, counts)


def _count_active(row: Parameter, sizes: Mapping[str, Size], config: ModelConfig) -> Size:
    """Count the entries of a row that a token uses: of a stack of experts, those of the active ones."""
    if not row.is_stacked:
        return _numel(row, sizes)
    return reduce(mul, (sizes[axis] for axis in row.axes[1:])) * count_active_experts(config)


def _numel(row: Parameter, sizes: Mapping[str, Size]) -> Size:
    return reduce(mul, (sizes[axis] for axis in row.axes))
