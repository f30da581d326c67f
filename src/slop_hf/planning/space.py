"""`ConfigSpace`: the target structures that a planner chooses from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

from ..architectures import get_architecture, read_setting
from ..cost.flops import DEFAULT_CONFIG, count_experts, count_flops_per_token, count_paper_params, count_parameters
from ..cost.memory import MemoryLimit
from ..dims import LARGEST_SIZE, IntArray, ModelConfig, ModelDims
from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number, require_whole_number
from .structures import BoolArray, DimsArray

#: More structures would take more than a GB, and minutes.
MAX_CANDIDATES = 5_000_000

_SMALLEST = ModelDims(2, 1, 1, 1)


def check_structures(structures: Sequence[ModelDims], name: str) -> tuple[ModelDims, ...]:
    """Return structures as a tuple; refuse anything else, under the name of the argument."""
    if isinstance(structures, ModelDims):
        raise PlanError(f"{name} must be a list of structures, got one: give [{name}]")
    try:
        checked = tuple(structures)
    except TypeError:
        raise PlanError(f"{name} must be a list of ModelDims, got {structures!r}") from None
    if wrong := [dims for dims in checked if not isinstance(dims, ModelDims)]:
        raise PlanError(f"{name} must be a list of ModelDims, got {wrong[0]!r} in it")
    return checked


@dataclass(frozen=True)
class ConfigSpace:
    """The targets: a list, or every structure of about `target_params` parameters that meets the constraints.

    The constraints come from Section 4.1 of the paper, with additional bounds on depth and shape: without them, among
    all structures of a size, the paper's objective is smallest for the deepest or the shallowest ones.

    Args:
        targets: structures to choose from, as a `DimsArray` if there are very many; excludes `target_params`.
        target_params: number of parameters N of a target.
        tolerance: largest relative deviation of a target's parameters from N.
        count: "model" counts every parameter with `config`'s vocabulary, "paper" counts `l * (6h^2 + 3hf)`.
        config: settings that growth does not change: `model_type`, `vocab_size`, `tie_word_embeddings`; a config or
            a dict.
        sequence_length: tokens per training sequence, for FLOPs.
        hidden_multiple: divisor of hidden sizes.
        ffn_ratios: ffn sizes as multiples of the hidden size, each rounded up to `ffn_multiple`.
        ffn_multiple: divisor of ffn sizes.
        min_layers, max_layers: bounds on depth.
        min_aspect, max_aspect: bounds on hidden size / layers.
        min_hidden, max_hidden, min_ffn, max_ffn, min_heads, max_heads: bounds on a target's sizes; None for no bound.
        heads: "follow": a wider model has more heads of the same size; "fixed": as many heads of a larger size.
        kv_heads: key/value heads of a target; by default each serves as many query heads as in the initial model.
        tensor_parallel: number of devices that share each matrix: the vocabulary, and the heads, key/value heads and
            ffn of every structure on the way, are multiples of it.
        memory: memory that a structure may take per device; None for no limit.

    Raises:
        PlanError: if arguments contradict each other or are out of range.

    >>> space = ConfigSpace(target_params=1e9)
    >>> str(space.structures(ModelDims(768, 2048, 6, 6))[0])
    '(1152, 4608, 42, 9)'
    """

    targets: Sequence[ModelDims] | DimsArray = ()
    target_params: float | None = None
    tolerance: float = 0.05
    count: Literal["model", "paper"] = "model"
    config: ModelConfig = field(default_factory=lambda: DEFAULT_CONFIG)
    sequence_length: int = 2048
    hidden_multiple: int = 128
    ffn_ratios: tuple[Fraction, ...] = (Fraction(8, 3), Fraction(4))
    ffn_multiple: int = 256
    min_layers: int = 1
    max_layers: int = 64
    min_aspect: float = 24
    max_aspect: float = 384
    min_hidden: int | None = None
    max_hidden: int | None = None
    min_ffn: int | None = None
    max_ffn: int | None = None
    min_heads: int | None = None
    max_heads: int | None = None
    heads: Literal["follow", "fixed"] = "follow"
    kv_heads: int | None = None
    tensor_parallel: int = 1
    memory: MemoryLimit | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.targets, DimsArray):
            object.__setattr__(self, "targets", check_structures(self.targets, "targets"))
        if bool(len(self.targets)) == (self.target_params is not None):
            raise PlanError("give either targets or target_params, exactly one of them")
        if self.target_params is not None and not is_positive_number(self.target_params):
            raise PlanError(f"target_params must be a positive number, got {self.target_params}")
        if not (is_finite_number(self.tolerance, least=0) and self.tolerance < 1):
            raise PlanError(f"tolerance must be a share from 0 up to 1, got {self.tolerance}")
        if self.heads not in ("follow", "fixed"):
            raise PlanError(f"heads must be 'follow' or 'fixed', got {self.heads!r}")
        if self.count not in ("model", "paper"):
            raise PlanError(f"count must be 'model' or 'paper', got {self.count!r}")
        bounds = [f"{end}_{name}" for end in ("min", "max") for name in ("layers", "hidden", "ffn", "heads")]
        for name in ("hidden_multiple", "ffn_multiple", "sequence_length", "tensor_parallel", "kv_heads", *bounds):
            if (value := getattr(self, name)) is not None:
                require_whole_number(value, name, most=LARGEST_SIZE, error=PlanError)
        for name in ("min_aspect", "max_aspect"):
            if not is_positive_number(value := getattr(self, name)):
                raise PlanError(f"{name} must be a positive number, got {value}")
        if not self.ffn_ratios or not all(map(is_positive_number, self.ffn_ratios)):
            raise PlanError(f"ffn_ratios must be one or more positive numbers, got {list(self.ffn_ratios)}")
        if self.memory is not None and not isinstance(self.memory, MemoryLimit):
            raise PlanError(f"memory must be a MemoryLimit, got {self.memory!r}")
        self._check_bounds()
        count_flops_per_token(_SMALLEST, self.config, self.sequence_length)  # refuses the config or the length
        if (vocabulary := read_setting(self.config, "vocab_size")) % self.tensor_parallel:
            raise PlanError(
                f"a vocabulary of {vocabulary} cannot be shared by {self.tensor_parallel} devices: pad it to "
                f"{math.ceil(vocabulary / self.tensor_parallel) * self.tensor_parallel}, or lower tensor_parallel"
            )

    def _check_bounds(self) -> None:
        for name in ("layers", "aspect", "hidden", "ffn", "heads"):
            low, high = f"min_{name}", f"max_{name}"
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise PlanError(
                    f"bounds contradict: {low} {least:g} and {high} {most:g}; give a maximum that is not below the "
                    "minimum"
                )

    def allows(self, structures: DimsArray) -> BoolArray:
        """Whether growth may pass through structures, and end there: loadable, divisible, and not too large."""
        allowed = structures.loadable
        if self.tensor_parallel > 1:
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
                allowed &= getattr(structures, name) % self.tensor_parallel == 0
        if self.memory is not None:
            allowed &= self.memory.fits(structures.to_floats(), self.config, self.sequence_length)
        return allowed

    def find_obstacle(self, dims: ModelDims) -> str | None:
        """Explain why one structure is forbidden; None if it is allowed."""
        if bool(self.allows(DimsArray.of([dims]))[0]):
            return None
        if self.memory is not None and not self.memory.fits(dims, self.config, self.sequence_length):
            return f"{dims} does not fit: {self.memory.explain(dims, self.config, self.sequence_length)}"
        return (
            f"heads, key/value heads and ffn of {dims} are not all multiples of tensor_parallel "
            f"{self.tensor_parallel}; lower it, or choose sizes that are"
        )

    def structures(self, initial: ModelDims) -> list[ModelDims]:
        """The targets as a list, see `list_targets`."""
        targets = self.list_targets(initial)
        return [targets.at(number) for number in range(len(targets))]

    def list_targets(self, initial: ModelDims) -> DimsArray:
        """Return `targets`, or all structures that `initial` can grow to, in the order of hidden size, ffn and depth.

        Raises:
            PlanError: if no structure meets the constraints, and the message names the nearest; or if there are too
                many candidates.
        """
        if isinstance(self.targets, DimsArray):
            return self.targets
        if self.targets:
            return DimsArray.of(self.targets)
        candidates = self._list_candidates(initial)
        sizes = candidates.to_floats()
        if self.count == "model":
            counts = count_parameters(sizes, self.config)
        else:
            counts = count_paper_params(sizes, count_experts(self.config))
        assert self.target_params is not None
        deviations = np.abs(counts / self.target_params - 1)
        if (deviations <= self.tolerance).any():
            return candidates[deviations <= self.tolerance]
        nearest = ""
        if len(deviations):
            best = int(np.argmin(deviations))
            nearest = f"; the nearest is {candidates.at(best)} with {counts[best]:.4g}"
        raise PlanError(
            f"no structure grown from {initial} has {self.target_params:.4g} parameters within "
            f"{self.tolerance:.1%}{nearest}; raise the tolerance or loosen the bounds on layers and shape"
        )

    def _list_candidates(self, initial: ModelDims) -> DimsArray:
        widths = self._list_widths(initial)
        fewest, most = (bound.tolist() for bound in self._bound_layers(initial, widths))
        ratios = self.ffn_ratios
        if get_architecture(self.config).has_experts and ratios == type(self).ffn_ratios:
            ratios = (Fraction(initial.intermediate_size, initial.hidden_size),)  # of an expert, the model's own
        columns: list[list[int]] = []  # hidden, ffn, heads, key/value heads and head size of all depths at once
        depths: list[IntArray] = []
        for hidden, low, high in zip(widths, fewest, most, strict=True):
            heads = self._choose_heads(initial, hidden) if low <= high else None
            if heads is None:
                continue
            ffns = {math.ceil(ratio * hidden / self.ffn_multiple) * self.ffn_multiple for ratio in ratios}
            for ffn in sorted(ffns):
                if max(initial.intermediate_size, self.min_ffn or 1) <= ffn <= (self.max_ffn or LARGEST_SIZE):
                    columns.append([hidden, ffn, *heads])
                    depths.append(np.arange(low, high + 1))
        repeats = np.array([len(layers) for layers in depths], dtype=np.int64)
        rows = np.repeat(np.array(columns, dtype=np.int64).reshape(-1, 5), repeats, axis=0)
        layers = np.concatenate([np.empty(0, dtype=np.int64), *depths])
        candidates = DimsArray(*np.ascontiguousarray(np.insert(rows, 2, layers, axis=1).T))
        return candidates[self.allows(candidates)]

    def _list_widths(self, initial: ModelDims) -> range:
        """Return the hidden sizes of candidates; refuse them if there are too many candidates."""
        multiple = self.hidden_multiple
        first = math.ceil(max(initial.hidden_size, self.min_hidden or 1) / multiple) * multiple
        last = math.floor(min(self.max_aspect * self.max_layers, self.max_hidden or math.inf, LARGEST_SIZE))
        widths = range(first, last + 1, multiple)
        # each hidden size has a depth or more, or is near one that has: widths bound the candidates from below
        count = len(widths) * len(self.ffn_ratios)
        if count <= MAX_CANDIDATES:
            fewest, most = self._bound_layers(initial, widths)
            count = int(np.maximum(most - fewest + 1.0, 0.0).sum()) * len(self.ffn_ratios)
        if count > MAX_CANDIDATES:
            raise PlanError(
                f"the bounds leave {count:,} structures or more, too many to compare (at most {MAX_CANDIDATES:,}): "
                "lower max_layers, max_hidden or max_aspect, or raise hidden_multiple"
            )
        return widths

    def _bound_layers(self, initial: ModelDims, widths: range) -> tuple[IntArray, IntArray]:
        """Return the fewest and the most layers of candidates with each hidden size."""
        hidden = np.arange(widths.start, widths.stop, widths.step, dtype=np.int64)
        low = np.maximum(np.ceil(hidden / self.max_aspect), max(self.min_layers, initial.num_hidden_layers))
        high = np.minimum(np.floor(hidden / self.min_aspect), self.max_layers)
        return np.minimum(low, LARGEST_SIZE).astype(np.int64), np.minimum(high, LARGEST_SIZE).astype(np.int64)

    def _choose_heads(self, initial: ModelDims, hidden: int) -> tuple[int, int, int] | None:
        """Return heads, key/value heads and head size of a target; None if its hidden size allows no such heads."""
        heads, remainder = initial.num_attention_heads, hidden % initial.num_attention_heads
        if self.heads == "follow":
            heads, remainder = divmod(hidden * initial.num_attention_heads, initial.hidden_size)
        if remainder or not (self.min_heads or 1) <= heads <= (self.max_heads or math.inf):
            return None
        kv_heads, remainder = divmod(heads * initial.num_key_value_heads, initial.num_attention_heads)
        if self.kv_heads is not None:
            kv_heads, remainder = self.kv_heads, heads % self.kv_heads
        head_dim = initial.head_dim
        if self.heads == "fixed":
            head_dim = hidden // heads * head_dim // (initial.hidden_size // initial.num_attention_heads)
        return None if remainder or head_dim % 2 else (heads, kv_heads, head_dim)
