"""Axis tables: for every parameter of a model family, the axis that each of its dimensions lies on.

This is the one description of a family. Growth, parameter counts and FLOPs are all derived from these tables, so
supporting another family means writing another table; no code changes. The tables of the families that come with
slop-hf are the files `families/*.yaml`; a package of your own adds one under the entry-point group
`slop_hf.families`, a script with `register_architecture` (docs/growth.md has an example).

The axes and their sizes, as functions of `ModelDims`:

    hidden            h       hidden_size: the residual stream
    ffn               f       intermediate_size
    query             q       num_attention_heads * head_dim
    key_value         k       num_key_value_heads * head_dim
    fused             3q      query, key and value of one head, then the next head's (GPT-NeoX)
    query_key_value   q + 2k  all queries, then all keys, then all values (Phi-3, GPT-2)
    gate_up           2f      all gates, then all of what they multiply (Phi-3)
    head_dim          d       one head
    vocab             v       vocab_size; growth never changes it
    position          p       max_position_embeddings of learned positions; growth never changes it
    experts           e       num_experts

Weight matrices are listed as `torch.nn.Linear` stores them: (axis written, axis read). With `is_transposed`, as
transformers' `Conv1D` does: (axis read, axis written). The matrices of all experts of a layer are one parameter in
memory, (experts, axis written, axis read), and several tensors in a checkpoint, which `stored_parts` names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from .errors import ArchitectureError
from .io.numbers import is_whole_number
from .io.serialization import describe_alternatives, describe_unknown_key, read_yaml

if TYPE_CHECKING:
    from .dims import ModelConfig

Axis = Literal[
    "hidden",
    "ffn",
    "query",
    "key_value",
    "fused",
    "query_key_value",
    "gate_up",
    "head_dim",
    "vocab",
    "position",
    "experts",
]
Kind = Literal["embedding", "projection", "norm", "bias", "norm_bias"]
Role = Literal["write", "read", "norm"]
Part = Literal["query", "key", "value"]
LAYER = "{layer}"
EXPERT = "{expert}"
#: Group of entry points under which a package adds families: `model_type = "module:object"`.
ENTRY_POINTS = "slop_hf.families"
#: Axes that are made of others, one after another, each with the input of the attention that it is, if any.
JOINED_AXES: dict[Axis, tuple[tuple[Axis, Part | None], ...]] = {
    "query_key_value": (("query", "query"), ("key_value", "key"), ("key_value", "value")),
    "gate_up": (("ffn", None), ("ffn", None)),
}


@dataclass(frozen=True)
class Parameter:
    """One row of an axis table.

    Args:
        name: name in the state dict; `{layer}` stands for the index of a decoder layer.
        axes: axis of each dimension, outermost first.
        kind: "projection" for the weights of a matrix product, which read one axis and write another; the other kinds
            only write.
        exists_if: config flag that must be set for the parameter to exist; None if it always exists.
        tied_to: parameter whose storage this one shares if `tie_word_embeddings` is set.
        stored_as: name in checkpoints (and in models of older releases), if it differs from `name`.
        stored_parts: for a parameter that stacks the matrices of all experts, the name in checkpoints of each tensor
            that an expert has in its place; `{expert}` stands for the index of the expert.
        is_post_norm: whether it is the gain of a norm at the end of a branch, just before the residual stream.
        part: input of the attention that it produces; rotary embeddings treat queries and keys specially.
        exists_unless: config flag that must not be set for the parameter to exist.
        is_transposed: whether a projection reads its first dimension and writes its last.
        is_normalised: whether a norm over all heads together follows, whose mean square new slots would change.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind = "projection"
    exists_if: str | None = None
    tied_to: str | None = None
    stored_as: str | None = None
    is_post_norm: bool = False
    part: Part | None = None
    exists_unless: str | None = None
    is_transposed: bool = False
    is_normalised: bool = False
    stored_parts: tuple[str, ...] = ()

    @property
    def is_in_layer(self) -> bool:
        """Whether every decoder layer has this parameter."""
        return LAYER in self.name

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks the matrices of all experts along its first dimension."""
        return bool(self.stored_parts)

    @property
    def read_dimension(self) -> int | None:
        """The dimension along which the parameter reads its input; None if it only writes."""
        if self.kind != "projection":
            return None
        return len(self.axes) - (2 if self.is_transposed else 1)

    @property
    def write_dimension(self) -> int:
        """The dimension along which the parameter writes its output; an embedding's is its last."""
        if self.kind == "projection" and not self.is_transposed:
            return len(self.axes) - 2
        return len(self.axes) - 1 if self.kind in ("projection", "embedding") else 0

    def name_in_layer(self, layer: int) -> str:
        """Return the name of this row's parameter in a layer."""
        return self.name.replace(LAYER, str(layer))

    def find_layer(self, name: str) -> str | None:
        """Return the number of the layer in a name that this row gives its parameters; None for any other name.

        >>> Parameter("layers.{layer}.norm.weight", ("hidden",), "norm").find_layer("layers.12.norm.weight")
        '12'
        """
        return _match_layer(self.name, name)

    def list_stored_names(self, name: str, experts: int = 0) -> list[str]:
        """Return the names in a checkpoint of the tensors that hold one of this row's parameters.

        Args:
            name: name of the parameter in the state dict.
            experts: number of experts, if the parameter stacks their matrices; the names are then those of the first
                expert's tensors, in the order of its matrix, then those of the second's.

        >>> row = Parameter("{layer}.down", ("experts", "hidden", "ffn"), stored_parts=("{layer}.{expert}.w2",))
        >>> row.list_stored_names("7.down", 2)
        ['7.0.w2', '7.1.w2']
        """
        layer = self.find_layer(name) or ""
        if not self.is_stacked:
            return [self.stored_as.replace(LAYER, layer) if self.stored_as else name]
        parts = [part.replace(LAYER, layer) for part in self.stored_parts]
        return [part.replace(EXPERT, str(expert)) for expert in range(experts) for part in parts]

    def role(self, dimension: int) -> Role:
        """Return what the parameter does along a dimension: write the axis, read it, or scale it as a norm's gain."""
        if self.kind == "norm":
            return "norm"
        return "read" if dimension == self.read_dimension else "write"


@dataclass(frozen=True)
class Architecture:
    """A model family: its axis table, and how its forward pass differs from Llama's.

    Args:
        parameters: rows of the table, in any order.
        norm: "rms" for RMSNorm; "layer" for LayerNorm, which also subtracts the mean.
        norm_eps: config field that holds the epsilon of the norms.
        gain_offset: constant added to a stored gain before it is used (Gemma stores gain - 1).
        scales_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        scale_follows_head_dim: whether attention scores are divided by sqrt(head_dim), and not by a config field.
        has_own_head_dim: whether the config can hold a head_dim other than hidden_size / num_attention_heads.
        has_grouped_heads: whether there can be fewer key/value heads than query heads; never on a fused axis.
        config_fields: config fields that have other names than Llama's, by Llama's name.
        ffn_ratio: intermediate_size over hidden_size if the config leaves the former empty; None if it never does.
        layer_lists: config fields that hold a list with one entry per layer.
        defaults: values of config fields that a plain dict may leave out.
        unsupported: config flags that growth cannot handle, each with the reason and a remedy.
        required: config fields that must have the family's usual value, which a config may leave out.
        test_settings: config fields of the small models of `slop_hf.testing`, chosen so that mistakes show.

    Raises:
        ArchitectureError: if an axis or kind is unknown, a name is given twice, or rows contradict each other.
    """

    model_type: str
    parameters: tuple[Parameter, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    gain_offset: float = 0.0
    scales_embedding: bool = False
    scale_follows_head_dim: bool = True
    has_own_head_dim: bool = True
    has_grouped_heads: bool = True
    config_fields: Mapping[str, str] = field(default_factory=dict)
    ffn_ratio: int | None = None
    layer_lists: tuple[str, ...] = ("layer_types",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    test_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_table(self)
        if any("fused" in row.axes for row in self.parameters):
            object.__setattr__(self, "has_grouped_heads", False)  # a frozen dataclass sets its own fields so

    def rows(self, config: ModelConfig, *, tied: bool = False) -> Iterator[Parameter]:
        """Yield the rows of the parameters that a model with this config has.

        With `tied`, also those that share another's storage (they take part in a matrix product too).
        """
        for row in self.parameters:
            is_tied = row.tied_to is not None and read_setting(config, "tie_word_embeddings", False)
            exists = row.exists_if is None or self.read(config, row.exists_if)
            excluded = row.exists_unless is not None and self.read(config, row.exists_unless)
            if exists and not excluded and (tied or not is_tied):
                yield row

    def read(self, config: ModelConfig, name: str) -> Any:
        """Return a field of a config by Llama's name; if it has none, the family's default, or else None."""
        own = self.config_fields.get(name, name)
        value = read_setting(config, own)
        if value is None and own != name:
            value = read_setting(config, name)
        return self.defaults.get(own) if value is None else value

    def explain_refusal(self, config: ModelConfig) -> str | None:
        """Return the reason why a model with this config has no axis table, with a remedy; None if it has one."""
        for flag, reason in self.unsupported.items():
            if self.read(config, flag):
                return f"{self.model_type} with {flag} cannot grow: {reason}"
        for name, value in self.required.items():
            if (got := self.read(config, name)) not in (value, None):
                return (
                    f"{self.model_type} with {name} {got!r} cannot grow, expected {value!r}: its layers are of "
                    f"several kinds; take a model with {name} {value!r}"
                )
        experts = self.read(config, "num_experts") if self.has_experts else 1
        if not is_whole_number(experts, least=1):
            return f"{self.model_type} with {experts!r} experts cannot grow; expected a whole number, 1 or more"
        return None

    def canonical_name(self, name: str) -> str:
        """Return the table's name of a parameter, given its name in a checkpoint or in an older release."""
        for row in self.parameters:
            if row.stored_as and (layer := _match_layer(row.stored_as, name)) is not None:
                return row.name.replace(LAYER, layer)
        return name

    def find_row(self, name: str) -> Parameter | None:
        """Return the row of a parameter, given its name in the state dict; None if no row has that name."""
        return next((row for row in self.parameters if row.find_layer(name) is not None), None)

    @property
    def flags(self) -> list[str]:
        """The config flags that decide which parameters exist, sorted."""
        flags = {flag for row in self.parameters for flag in (row.exists_if, row.exists_unless) if flag}
        return sorted(flags)

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward networks of the layers are experts with a router."""
        return any("experts" in row.axes for row in self.parameters)

    @property
    def has_head_norms(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return any(row.kind == "norm" and row.axes == ("head_dim",) for row in self.parameters)

    @property
    def has_projection_norms(self) -> bool:
        """Whether the queries, and the keys, of all heads together are normalised (OLMo 2)."""
        return any(row.is_normalised for row in self.parameters)


BuiltT = TypeVar("BuiltT", Parameter, Architecture)


def read_setting(config: ModelConfig, name: str, default: Any = None) -> Any:
    """Return a field of a transformers config, or of its dict; `default` if the config has no such field."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def _match_layer(pattern: str, name: str) -> str | None:
    """Return the number that stands for `{layer}` in a name ("" if the pattern has no layer); None if it differs."""
    before, has_layer, after = pattern.partition(LAYER)
    if not has_layer:
        return "" if name == pattern else None
    number = name[len(before) : len(name) - len(after)]
    return number if number.isdigit() and name == f"{before}{number}{after}" else None


def _check_table(table: Architecture) -> None:
    """Raise an `ArchitectureError` for a table that no model can have."""
    names = [row.name for row in table.parameters]
    where = f"the axis table of {table.model_type!r}"
    if not names:
        raise ArchitectureError(f"{where} has no rows; list every parameter of the model's state dict")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ArchitectureError(f"{where} has {twice[0]} twice; keep one row per parameter")
    if table.norm not in ("rms", "layer"):
        raise ArchitectureError(f"{where}: norm is {table.norm!r}, expected 'rms' or 'layer'")
    for row in table.parameters:
        unknown = [axis for axis in row.axes if axis not in get_args(Axis)]
        if unknown or not row.axes:
            got = repr(unknown[0]) if unknown else "no axis"
            raise ArchitectureError(f"{where}: {row.name} has {got}, expected axes among {', '.join(get_args(Axis))}")
        if row.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise ArchitectureError(f"{where}: {row.name} is of kind {row.kind!r}, expected one of {known}")
        if row.part is not None and row.part not in get_args(Part):
            raise ArchitectureError(
                f"{where}: {row.name} is part {row.part!r}, expected {' or '.join(get_args(Part))}"
            )
        if row.tied_to is not None and row.tied_to not in names:
            raise ArchitectureError(f"{where}: {row.name} is tied to {row.tied_to}, which has no row; correct tied_to")
        _check_stack(row, where)


def _check_stack(row: Parameter, where: str) -> None:
    """Raise an `ArchitectureError` unless a row stacks matrices exactly if it names the tensors of an expert."""
    is_stack = len(row.axes) == 3 and row.axes[0] == "experts" and row.kind == "projection" and row.is_in_layer
    is_stack = is_stack and not row.is_transposed
    if is_stack != row.is_stacked or ("experts" in row.axes[1:]):
        raise ArchitectureError(
            f"{where}: {row.name} has the axes {', '.join(row.axes)} and {len(row.stored_parts)} stored_parts; a "
            "projection of all experts has axes [experts, WRITTEN, READ] and names its tensors, no other row does"
        )
    parts = len(JOINED_AXES.get(row.axes[row.write_dimension], ("",)))
    if row.is_stacked and (
        len(row.stored_parts) != parts or not all(EXPERT in name and LAYER in name for name in row.stored_parts)
    ):
        raise ArchitectureError(
            f"{where}: {row.name} has the stored_parts {', '.join(row.stored_parts)}; name {parts} per expert, each "
            f"with {LAYER} and {EXPERT}"
        )


def read_architecture(path: str | Path) -> Architecture:
    """Return the axis table in a family's YAML file.

    The file has the fields of `Architecture`, with `parameters` as a mapping from each row's name to its other fields.
    `like` names a family whose table and traits hold for all that the file leaves out; then `parameters` has the rows
    that differ or are added, and `without` lists shell patterns (`*.bias`) of the rows that this family lacks.

    Args:
        path: YAML file; `families/*.yaml` in this package are examples.

    Raises:
        ArchitectureError: if the file does not exist, or does not hold a table.
    """
    where, content = str(path), read_yaml(path, error=ArchitectureError)
    if not isinstance(content, Mapping):
        raise ArchitectureError(f"{where}: expected the fields of a family, KEY: VALUE per line; see docs/growth.md")
    own = dict(content)
    like, without, parameters = own.pop("like", None), own.pop("without", ()), own.pop("parameters", {})
    if not isinstance(parameters, Mapping) or not all(isinstance(row, Mapping) for row in parameters.values()):
        raise ArchitectureError(f"{where}: parameters: expected one row per parameter, NAME: {{axes: [...]}}")
    if not isinstance(without, (list, tuple)) or not all(isinstance(pattern, str) for pattern in without):
        raise ArchitectureError(f"{where}: without: expected a list of names or patterns, got {without!r}")
    rows = {name: _build(Parameter, {**row, "name": name}, f"{where}: {name}") for name, row in parameters.items()}
    base = _find_base(like, where)
    others = {row.name: row for row in base.parameters} if base else {}
    if idle := [pattern for pattern in without if not any(fnmatchcase(name, pattern) for name in others)]:
        raise ArchitectureError(f"{where}: without: {idle[0]!r} fits no row of {like!r}; correct it, or leave it out")
    kept = {name: row for name, row in others.items() if not any(fnmatchcase(name, item) for item in without)}
    traits = {**(vars(base) if base else {}), **own, "parameters": tuple({**kept, **rows}.values())}
    return _build(Architecture, traits, where)


def _build(kind: type[BuiltT], content: Mapping[str, Any], where: str) -> BuiltT:
    """Build a row or a table from plain data; pydantic would take longer to load than `slop plan` has.

    Raises:
        ArchitectureError: for an unknown or missing key, or a value of another type.
    """
    known = {item.name: item for item in fields(kind)}
    if unknown := [name for name in content if name not in known]:
        raise ArchitectureError(f"{where}: {describe_unknown_key(str(unknown[0]), known)}")
    required = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if missing := [name for name in required if name not in content]:
        raise ArchitectureError(f"{where}: missing key {missing[0]!r}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    for name, value in values.items():
        names = str(known[name].type).replace(" ", "")
        expected = next((types for prefix, types in _TYPES.items() if names.startswith(prefix)), (str,))
        is_valid = (value is None and names.endswith("|None")) or isinstance(value, expected)
        if not is_valid or (isinstance(value, bool) and bool not in expected):
            wanted = " or ".join("list" if kind is tuple else kind.__name__ for kind in expected)
            raise ArchitectureError(f"{where}: {name} must be a {wanted}, got {content[name]!r}; correct the file")
    return kind(**values)


#: Beginning of a field's annotation -> types of its value; of all others, str.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "float": (int, float),
    "int": (int,),
    "tuple": (tuple,),
    "Mapping": (Mapping,),
}


def _find_base(like: object, where: str) -> Architecture | None:
    """Return the family that a file says it is like; None if it names none."""
    if like is None:
        return None
    if not isinstance(like, str) or like not in ARCHITECTURES:
        known = describe_alternatives(str(like), ARCHITECTURES)
        raise ArchitectureError(f"{where}: like: no axis table for {like!r}{known}")
    return ARCHITECTURES[like]


#: Constants of this module for the tables of the first families.
_CONSTANTS = ("LLAMA", "MISTRAL", "QWEN2", "QWEN3", "GEMMA2", "GPT_NEOX")


class _Families(MutableMapping[str, Architecture]):
    """Axis tables by `model_type`; a file or an entry point is read when its family is first asked for.

    Registered tables come before files, files before entry points.
    """

    def __init__(self, directory: Path) -> None:
        paths = {path.stem: path for path in sorted(directory.glob("*.yaml"))}
        first = [name.lower() for name in _CONSTANTS]
        self._files = {name: paths[name] for name in (*first, *(name for name in paths if name not in first))}
        self._registered: dict[str, Architecture] = {}
        self._read: dict[str, Architecture] = {}

    def __getitem__(self, model_type: str) -> Architecture:
        if model_type in self._registered:
            return self._registered[model_type]
        if model_type not in self._read:
            if model_type in self._files:
                self._read[model_type] = read_architecture(self._files[model_type])
            elif model_type in _find_entry_points():
                self._read[model_type] = _load_entry_point(_find_entry_points()[model_type])
            else:
                raise KeyError(model_type)
        return self._read[model_type]

    def __setitem__(self, model_type: str, table: Architecture) -> None:
        self._registered[model_type] = table

    def __delitem__(self, model_type: str) -> None:
        del self._registered[model_type]

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._registered or model_type in self._files or model_type in _find_entry_points()

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._files, *self._registered, *_find_entry_points()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _find_entry_points() -> dict[str, EntryPoint]:
    """Return the entry points of the installed packages that name a family, by `model_type`."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _load_entry_point(entry: EntryPoint) -> Architecture:
    """Return the axis table that an entry point names: an `Architecture`, or a function that returns one."""
    package = entry.dist.name if entry.dist is not None else "an unknown package"
    where = f"the entry point {entry.name!r} of {package} (group {ENTRY_POINTS}, {entry.value})"
    try:
        table = entry.load()
        table = table() if callable(table) else table
    except Exception as caught:  # whatever a foreign package raises
        raise ArchitectureError(
            f"{where} cannot be loaded: {type(caught).__name__}: {caught}; repair or uninstall {package}"
        ) from caught
    if not isinstance(table, Architecture):
        raise ArchitectureError(
            f"{where} gives {type(table).__name__}, expected an Architecture or a function that returns one; "
            f"correct the entry point of {package}"
        )
    if table.model_type != entry.name:
        raise ArchitectureError(
            f"{where} gives the axis table of {table.model_type!r}; name the entry point after its model_type"
        )
    return table


#: The families with an axis table, by `model_type`.
ARCHITECTURES: MutableMapping[str, Architecture] = _Families(Path(__file__).parent / "families")


def register_architecture(architecture: Architecture | str | Path, *, replaces: bool = False) -> Architecture:
    """Add a family to those that can grow, for this process, and return its axis table.

    To add it for every process, and for the command line, let your package name it under the entry-point group
    `slop_hf.families`.

    Args:
        architecture: axis table, or path of a family's YAML file.
        replaces: whether it may take the place of a table of the same `model_type`.

    Raises:
        ArchitectureError: if the file does not hold a table, or the family has one and `replaces` is not set.

    >>> from dataclasses import replace
    >>> mine = replace(get_architecture({"model_type": "llama"}), model_type="my_llama")
    >>> register_architecture(mine).model_type
    'my_llama'
    >>> get_architecture({"model_type": "my_llama"}) is mine
    True
    >>> del ARCHITECTURES["my_llama"]
    """
    if not isinstance(architecture, Architecture | str | Path):
        kind = type(architecture).__name__
        raise ArchitectureError(f"expected an Architecture or the path of a family's YAML file, got {kind}")
    table = architecture if isinstance(architecture, Architecture) else read_architecture(architecture)
    if table.model_type in ARCHITECTURES and not replaces:
        raise ArchitectureError(
            f"{table.model_type!r} has an axis table already; give yours another model_type, or set replaces=True"
        )
    ARCHITECTURES[table.model_type] = table
    return table


def get_architecture(config: ModelConfig) -> Architecture:
    """Return the axis table of a config's family; raise an `ArchitectureError` if it has none.

    >>> get_architecture({"model_type": "llama"}).model_type
    'llama'
    """
    model_type = read_setting(config, "model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"no axis table for model_type {model_type!r} (supported: {', '.join(ARCHITECTURES)}); "
            'to add a family, register its axis table (docs/growth.md, "Your own family")'
        )
    return ARCHITECTURES[model_type]


def __getattr__(name: str) -> Architecture:
    """Return the table of one of the first families by its constant, such as `LLAMA`."""
    if name in _CONSTANTS:
        return ARCHITECTURES[name.lower()]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
