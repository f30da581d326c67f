"""Every part of the growth benchmark runs and leaves a record; what it measures at this size means nothing.

mergekit is stood in for by a few lines that stack the layers of a safetensors file, so that nothing is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slop_hf.cost.flops import count_parameters
from slop_hf.growth import plan_growth

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

STAND_IN = """#!{python}
import json, pathlib, sys
import yaml

recipe, target = yaml.safe_load(open(sys.argv[1])), pathlib.Path(sys.argv[2])
sources = [one["sources"][0] for one in recipe["slices"]]
layers = [layer for one in sources for layer in range(*one["layer_range"])]
(file,) = pathlib.Path(sources[0]["model"]).glob("*.safetensors")
data = file.read_bytes()
end = 8 + int.from_bytes(data[:8], "little")
header, body, grown = json.loads(data[8:end]), b"", {{}}
for name, entry in header.items():
    if name == "__metadata__":
        continue
    begin, stop = entry["data_offsets"]
    parts = name.split(".")
    inside = parts[1] == "layers"
    for new in [i for i, old in enumerate(layers) if str(old) == parts[2]] if inside else [None]:
        renamed = ".".join([*parts[:2], str(new), *parts[3:]]) if inside else name
        grown[renamed] = {{**entry, "data_offsets": [len(body), len(body) + stop - begin]}}
        body += data[end + begin : end + stop]
text = json.dumps(grown).encode()
target.mkdir()
(target / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module; it imports its neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("growth_benchmark", BENCHMARKS / "growth.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def environment(tmp_path):
    """Looks like an environment that mergekit has been installed into."""
    program = tmp_path / "environment/bin/mergekit-yaml"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    packages = {"mergekit": "stand-in", "torch": version("torch")}
    (tmp_path / "environment/ready.json").write_text(json.dumps({"attempts": [], "packages": packages}))
    return tmp_path / "environment"


def run(benchmark, tmp_path, *arguments):
    output, workdir = tmp_path / "results/growth.json", tmp_path / "work"
    workdir.mkdir(exist_ok=True)
    benchmark.main([*arguments, "--scale", "tiny", "--output", str(output), "--workdir", str(workdir)])
    assert list(workdir.iterdir()) == [], "what it wrote is removed"
    text = output.read_text()
    assert str(tmp_path) not in text, "a record names no path of the machine"
    return json.loads(text)


def assert_well_formed(record):
    assert record["command"].startswith("python benchmarks/growth.py ")
    assert {"date", "scale", "repetitions", "machine", "versions"} <= record.keys()
    assert {"cpu", "cores", "memory_bytes"} <= record["machine"].keys()
    for goal in record["goals"]:
        assert goal["met"] is (goal["value"] <= goal["limit"]), goal
    for case in record.get("cases", [record]):
        assert all(len(runs) == record["repetitions"] and min(runs) >= 0 for runs in case["seconds"].values())


@pytest.mark.slow
def test_memory_and_scaling(benchmark, tmp_path):
    run(benchmark, tmp_path, "memory")
    records = run(benchmark, tmp_path, "scaling")
    assert list(records) == ["memory", "scaling"], "a part that is not run keeps its record"
    memory, scaling = records.values()
    assert_well_formed(memory)
    assert [case["operator"] for case in memory["cases"]] == ["layer", "ffn", "hidden", "mha"]
    goals = " ".join(goal["goal"] for goal in memory["goals"])
    assert all(f"{init}, grow_model" in goals for init in ("stack", "random", "preserving", "copy"))
    for case in memory["cases"]:
        grown = case["target_parameters"] / case["source_parameters"]
        assert 1.5 < grown < 2.5, "about twice the size"
        assert set(case["loading"]["peak_bytes"]) == {"from_pretrained + grow_model", "from_pretrained + by hand"}
    assert_well_formed(scaling)
    assert len(scaling["cases"]) == 2
    assert all(1.8 < case["target_parameters"] / case["source_parameters"] < 2.2 for case in scaling["cases"])
    assert (tmp_path / "results" / scaling["figure"]).read_bytes().startswith(b"\x89PNG")


def test_checkpoint(benchmark, tmp_path):
    record = run(benchmark, tmp_path, "checkpoint")["checkpoint"]
    assert_well_formed(record)
    assert [set(case["ratios"]) for case in record["cases"]] == [
        {"stack", "preserving"},
        {"random", "preserving", "copy"},
    ]


@pytest.mark.slow
def test_mergekit(benchmark, environment, tmp_path):
    record = run(benchmark, tmp_path, "mergekit", "--environment", str(environment))["mergekit"]
    assert_well_formed(record)
    assert record["packages"]["mergekit"] == "stand-in"
    assert not any(record["differing_weights"].values())
    assert record["goals"][0]["met"]


def test_a_mergekit_that_fails_is_recorded(benchmark, environment, tmp_path):
    (environment / "bin/mergekit-yaml").write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    record = run(benchmark, tmp_path, "mergekit", "--environment", str(environment))["mergekit"]
    assert not record["ran"]
    assert record["attempts"][-1]["reason"] == "no such architecture"


def test_the_peer_reads_the_source_and_writes_the_targets_size(benchmark, tmp_path):
    checkpoints = sys.modules["checkpoints"]
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        save_file({"a": torch.rand(3, 5), "b": torch.rand(7).bfloat16()}, source / f"{number}.safetensors")
    checkpoints.read_and_write(source, tmp_path / "target", 400)
    written = [tensor for _, tensor in checkpoints.iterate_weights(tmp_path / "target")]
    assert 396 < sum(tensor.nbytes for tensor in written) <= 400


def test_differences_are_found(benchmark, tmp_path):
    checkpoints = sys.modules["checkpoints"]
    one = {"same": torch.ones(2), "value": torch.ones(2), "dtype": torch.ones(2), "only here": torch.ones(2)}
    other = {"same": torch.ones(2), "value": torch.zeros(2), "dtype": torch.ones(2).double(), "there": torch.ones(2)}
    for name, tensors in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert checkpoints.find_differences(tmp_path / "one", tmp_path / "one") == []
    assert checkpoints.find_differences(tmp_path / "one", tmp_path / "other") == [
        "dtype",
        "only here",
        "there",
        "value",
    ]


def test_a_failure_in_a_measured_process_is_told(benchmark):
    measuring = sys.modules["measuring"]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measuring.measure_in_process(divmod, 1, 0)


def test_the_sizes_of_a_full_run_can_be_grown(benchmark):
    for name in ("growth_memory", "growth_checkpoint"):
        module = sys.modules[name]
        config = sys.modules["checkpoints"].llama_config(module.SOURCES["full"], 32000, torch.bfloat16)
        for operator, new_dims in module.TARGETS["full"].items():
            plan = plan_growth(config, operator, new_dims)
            assert 1.75 < count_parameters(plan.new, config) / count_parameters(plan.old, config) < 2.25
