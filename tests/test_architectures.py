"""Axis tables: the files of the families, registration, and families of other packages."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slop_hf import architectures
from slop_hf.architectures import (
    ARCHITECTURES,
    LLAMA,
    Architecture,
    Parameter,
    get_architecture,
    read_architecture,
    register_architecture,
)
from slop_hf.dims import ModelDims
from slop_hf.errors import ArchitectureError

FAMILIES = Path(architectures.__file__).parent / "families"
PAGE = Path(__file__).parents[1] / "docs" / "growth.md"
ROW = "parameters:\n  model.embed_tokens.weight: {axes: [vocab, hidden], kind: embedding}\n"


@pytest.fixture
def registered():
    """Forget the families that a test registers."""
    before = set(ARCHITECTURES)
    yield
    for name in set(ARCHITECTURES) - before:
        del ARCHITECTURES[name]


@pytest.fixture
def write(tmp_path):
    def write_family(text, name="mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_family


def test_each_file_is_named_after_its_family():
    assert {path.stem for path in FAMILIES.iterdir()} == set(ARCHITECTURES)
    assert all(ARCHITECTURES[name].model_type == name for name in ARCHITECTURES)
    assert len(ARCHITECTURES) == len(list(ARCHITECTURES))
    assert architectures.GPT_NEOX is ARCHITECTURES["gpt_neox"]
    with pytest.raises(AttributeError, match="GPT_NEOY"):
        architectures.GPT_NEOY  # noqa: B018


def test_a_table_is_read_when_it_is_needed():
    code = (
        "import slop_hf.architectures as module; read = module.read_architecture; seen = []\n"
        "module.read_architecture = lambda path: seen.append(path.stem) or read(path)\n"
        "assert 'qwen3' in module.ARCHITECTURES and not seen\n"
        "module.get_architecture({'model_type': 'mistral'}); print(*seen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mistral", "llama"]


def test_a_file_says_what_differs_from_another_family(write):
    changed = "model.layers.{layer}.mlp.up_proj.weight"
    table = read_architecture(
        write(
            "model_type: mine\nlike: llama\nwithout: ['*.bias', '*.gate_proj.*']\nnorm_eps: eps\ngain_offset: 1\n"
            f"parameters:\n  {changed}: {{axes: [hidden, ffn], is_transposed: true}}\n"
            "  extra.weight: {axes: [hidden], kind: norm, exists_unless: flag}\n"
        )
    )
    names = [row.name for row in LLAMA.parameters if not row.name.endswith("bias") and "gate_proj" not in row.name]
    assert [row.name for row in table.parameters] == [*names, "extra.weight"]
    rows = {row.name: row for row in table.parameters}
    assert rows[changed] == Parameter(changed, ("hidden", "ffn"), "projection", is_transposed=True)
    assert (rows[changed].read_dimension, rows[changed].write_dimension) == (0, 1)
    assert (table.norm_eps, table.gain_offset, table.flags) == ("eps", 1, ["flag"])
    listed = [row.name for row in table.rows({"flag": True, "tie_word_embeddings": True})]
    assert "extra.weight" not in listed and "lm_head.weight" not in listed
    assert "extra.weight" in [row.name for row in table.rows({})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the fields of a family, KEY: VALUE per line"),
        ("model_type: mine\n", r"the axis table of 'mine' has no rows; list every parameter"),
        (ROW, "missing key 'model_type'"),
        (f"model_type: 3\n{ROW}", "model_type must be a str, got 3"),
        (f"model_type: mine\nnorms: layer\n{ROW}", "unknown key 'norms'; did you mean 'norm'"),
        (f"model_type: mine\nnorm: batch\n{ROW}", "norm is 'batch', expected 'rms' or 'layer'"),
        (f"model_type: mine\nscales_embedding: 1\n{ROW}", "scales_embedding must be a bool, got 1"),
        (f"model_type: mine\ngain_offset: true\n{ROW}", "gain_offset must be a int or float, got True"),
        ("model_type: mine\nlike: lama\n", "like: no axis table for 'lama'; did you mean 'llama'"),
        ("model_type: mine\nlike: llama\nwithout: ['*.gain']\n", "without: '.*gain' fits no row of 'llama'"),
        ("model_type: mine\nlike: llama\nwithout: all\n", "without: expected a list of names or patterns, got 'all'"),
        ("model_type: mine\nparameters: [a]\n", "parameters: expected one row per parameter"),
        (f"model_type: mine\n{ROW}  a: {{kind: norm}}\n", "mine.yaml: a: missing key 'axes'"),
        (f"model_type: mine\n{ROW}  a: {{axes: hidden}}\n", "a: axes must be a list, got 'hidden'"),
        (f"model_type: mine\n{ROW}  a: {{axes: [width]}}\n", "a has 'width', expected axes among hidden, ffn, query"),
        (
            f"model_type: mine\n{ROW}  a: {{axes: [hidden], kind: gain}}\n",
            "a is of kind 'gain', expected one of embed",
        ),
        (f"model_type: mine\n{ROW}  a: {{axes: [hidden], part: keys}}\n", "a is part 'keys', expected query or key"),
        (f"model_type: mine\n{ROW}  a: {{axes: [hidden], tied_to: b}}\n", "a is tied to b, which has no row"),
        (f"model_type: mine\n{ROW}  a: {{axes: [hidden], is_post: true}}\n", "unknown key 'is_post'; did you mean"),
        (
            f"model_type: mine\n{ROW}  'a.{{layer}}': {{axes: [experts, hidden, ffn]}}\n",
            "has the axes experts, hidden, ffn and 0 stored_parts; a projection of all experts has axes",
        ),
        (
            f"model_type: mine\n{ROW}  'a.{{layer}}': {{axes: [experts, gate_up, hidden], stored_parts: ['w1']}}\n",
            "has the stored_parts w1; name 2 per expert, each with {layer} and {expert}",
        ),
    ],
    ids=range(21),
)
def test_a_wrong_file_is_refused(write, text, message):
    with pytest.raises(ArchitectureError, match=message):
        read_architecture(write(text))


def test_a_missing_file_and_a_twin_are_refused(tmp_path):
    with pytest.raises(ArchitectureError, match="no such file"):
        read_architecture(tmp_path / "none.yaml")
    with pytest.raises(ArchitectureError, match="has a twice; keep one row per parameter"):
        Architecture("mine", (Parameter("a", ("hidden",), "norm"), Parameter("a", ("ffn",), "bias")))


def test_a_family_is_registered_for_the_process(write, registered):
    path = write("model_type: mine\nlike: llama\nwithout: ['*.bias']\n")
    table = register_architecture(path)
    assert get_architecture({"model_type": "mine"}) is table and list(ARCHITECTURES)[-1] == "mine"
    with pytest.raises(ArchitectureError, match=r"'mine' has an axis table already; .* or set replaces=True"):
        register_architecture(table)
    assert register_architecture(replace(table, norm_eps="eps"), replaces=True).norm_eps == "eps"
    with pytest.raises(ArchitectureError, match="'llama' has an axis table already"):
        register_architecture(LLAMA)
    with pytest.raises(ArchitectureError, match=r"expected an Architecture or the path of a .* file, got int"):
        register_architecture(3)


# --- entry points ---


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution of one module with entry points, on a path of its own."""

    def install_package(module, entries, files=()):
        root = tmp_path / "site"
        info = root / "fake_families-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-families\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[slop_hf.families]\n{entries}\n")
        (root / "fake_families").mkdir()
        (root / "fake_families" / "__init__.py").write_text(module)
        for name, text in files:
            (root / "fake_families" / name).write_text(text)
        monkeypatch.syspath_prepend(str(root))
        architectures._find_entry_points.cache_clear()

    yield install_package
    architectures._find_entry_points.cache_clear()
    sys.modules.pop("fake_families", None)
    for name in set(ARCHITECTURES._read) - set(ARCHITECTURES._files):
        del ARCHITECTURES._read[name]


def read_blocks():
    """Return the YAML, the module and the entry point of the page's example."""
    section = PAGE.read_text(encoding="utf-8").split("## Your own family")[1].split("\n## ")[0]
    blocks = dict(reversed(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)))  # of two alike, the first
    return blocks["yaml"], blocks["py"], blocks["toml"]


def test_the_pages_family_of_another_package_grows(install):
    """EXAONE 4, from a package that names it, as `docs/growth.md` shows."""
    from slop_hf.testing import check, list_conformance_cases

    family, module, entries = read_blocks()
    lines = [line for line in entries.splitlines() if " = " in line]
    install(
        module, "\n".join(lines).replace('"', "").replace("my_families", "fake_families"), [("exaone4.yaml", family)]
    )
    assert "exaone4" in ARCHITECTURES and "exaone4" in list(ARCHITECTURES)
    assert get_architecture({"model_type": "exaone4"}) is ARCHITECTURES["exaone4"]
    assert ModelDims.from_config(
        {"model_type": "exaone4", "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
        | {"num_attention_heads": 2}
    ) == ModelDims(8, 4, 1, 2)
    cases = {(case.operator, case.init): case for case in list_conformance_cases("exaone4", every=False)}
    assert "normalises each head" in check(cases["head_dim", "preserving"]).refused
    assert all(check(cases[operator, "preserving"]).error < 1e-5 for operator in ("mha", "hidden"))


@pytest.mark.parametrize(
    ("module", "value", "message"),
    [
        (
            "x = 1",
            "fake_families:x",
            "gives int, expected an Architecture or a function that returns one; correct the",
        ),
        ("import no_such_module", "fake_families:x", "cannot be loaded: ModuleNotFoundError: .*; repair or uninstall"),
        ("", "fake_families:x", "cannot be loaded: AttributeError"),
        (
            "from slop_hf.architectures import LLAMA as x",
            "fake_families:x",
            "gives the axis table of 'llama'; name the entry point after its model_type",
        ),
    ],
    ids=["other", "import", "attribute", "name"],
)
def test_a_broken_package_is_named(install, module, value, message):
    install(module, f"mine = {value}")
    with pytest.raises(ArchitectureError, match=rf"the entry point 'mine' of fake-families \(.*{value}\) {message}"):
        get_architecture({"model_type": "mine"})
    assert get_architecture({"model_type": "llama"}) is LLAMA


def test_a_package_cannot_replace_a_family_of_ours(install):
    install("", "llama = fake_families:x")
    assert get_architecture({"model_type": "llama"}) is LLAMA and list(ARCHITECTURES).count("llama") == 1
