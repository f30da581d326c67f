"""Python code in a model's directory never runs, whichever command names the directory and whatever is answered."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

import slop_hf
import slop_hf.data
from slop_hf.data import train_tokenizer
from slop_hf.errors import SlopError
from slop_hf.evaluation.held_out import HeldOut
from slop_hf.io.model_errors import NEEDS_CODE

ROOT = Path(slop_hf.__file__).parents[2]
EARLIER_RUN = Path(__file__).parent / "runs" / "earlier_release" / "run"
ANSWERS = "y\n" * 200
#: Classes of transformers' whose `from_config` looks for code, too.
AUTO = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
open({marker!r}, "w").close()
class MarkedConfig(LlamaConfig):
    model_type = "marked"
class MarkedModel(LlamaForCausalLM):
    config_class = MarkedConfig
class MarkedTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return None
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "stock"
    set_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    train_tokenizer(["to be or not to be"] * 3, 260).save_pretrained(directory)
    return directory


def plant_code(directory: Path, marker: Path, *, is_needed: bool) -> Path:
    """Add code to a model's directory; with `is_needed`, nothing in it can be loaded without that code."""
    (directory / "marked.py").write_text(CODE.format(marker=str(marker)))
    (directory / "custom_generate").mkdir()
    (directory / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedModel"}
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "marked.MarkedTokenizer"]}
    if is_needed:
        config |= {"model_type": "marked", "architectures": ["MarkedModel"]}
        tokenizer["tokenizer_class"] = "MarkedTokenizer"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


class Trap:
    """A model directory with code, a run whose stage is such a directory, and files for the commands."""

    def __init__(self, home: Path, model_dir: Path, *, is_needed: bool) -> None:
        self.home, self.marker = home, home / "the-code-ran"
        self.model = plant_code(shutil.copytree(model_dir, home / "model"), self.marker, is_needed=is_needed)
        self.run = shutil.copytree(EARLIER_RUN, home / "earlier")
        (stage,) = self.run.glob("stage-0-*")
        if stage.is_dir() and not (stage / "marked.py").exists():
            plant_code(stage, self.marker, is_needed=is_needed)
        self.text = home / "texts" / "text.txt"
        self.text.parent.mkdir()
        self.text.write_text("to be or not to be, " * 60)
        deeper = {"operators": ["layer"], "dims": self._dims(3), "tokens": 64}
        self.config = home / "run.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "schedule": {"initial": self._dims(2), "initial_tokens": 64, "stages": [deeper]},
                    "data": {
                        "source": str(self.text),
                        "block_size": 16,
                        "held_out": 0.0,
                        "vocab_size": 260,
                        "cache_dir": str(home / "cache"),
                    },
                    "training": {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
                }
            )
        )

    @staticmethod
    def _dims(layers: int) -> dict[str, int]:
        return {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
        }


@pytest.fixture(params=["needed", "not needed"])
def trap(request, tmp_path: Path, model_dir: Path, monkeypatch) -> Trap:
    monkeypatch.setattr("sys.stdin", io.StringIO(ANSWERS))
    return Trap(tmp_path, model_dir, is_needed=request.param == "needed")


#: Command lines by what they read: the model's directory, or a run with such a stage.
COMMANDS = {
    "train, tokenizer": "train {config} -o {home}/out --set data.tokenizer={model}",
    "train, tokenizer, dry run": "train {config} -o {home}/out --set data.tokenizer={model} --dry-run",
    "train, pretrained": "train {config} -o {home}/out --set model.pretrained={model}",
    "train, pretrained, dry run": "train {config} -o {home}/out --set model.pretrained={model} --dry-run",
    "train, from": "train {config} -o {home}/out --from {model}",
    "train, resume": "train {config} -o {run} --resume",
    "eval": "eval {model} --tasks perplexity --text {text} --block-size 16 --cache-dir {home}/scores",
    "eval, data": "eval {model} --tasks perplexity --data {config} --cache-dir {home}/scores",
    "eval, run": "eval {run} --tasks perplexity --text {text} --block-size 16 --cache-dir {home}/scores",
    "grow": "grow {model} --num-hidden-layers 3 -o {home}/grown",
    "grow, verify": "grow {model} --num-hidden-layers 3 -o {home}/grown --verify",
    "grow, dry run": "grow {model} --num-hidden-layers 3 -o {home}/grown --dry-run",
    "plan, from": "plan --from {model} --target 32,64,3,4",
    "plan, to": "plan --initial 8,16,2,2 --to {model}",
    "calibrate, from": "calibrate --from {model} --to {model} --cpu --steps 1 --batch-size 1 -o {home}/cost.yaml",
    "probe": "probe {config} -o {home}/probe --share 0.5 --set model.pretrained={model} --inits random,preserving",
    "probe, from": "probe {config} -o {home}/probe --share 0.5 --from {run} --set data.tokenizer={model} --dry-run",
    "report": "report {run}",
    "publish, dry run": "publish {run} --to user/name --dry-run",
    "data inspect": "data inspect {config} --set data.tokenizer={model}",
    "data tokenize": "data tokenize {config} --tokenizer {model}",
}
#: Those that cannot do without the code if it is needed.
REFUSE = {
    name for name in COMMANDS if name.split(",")[0] in ("train", "eval", "grow", "data inspect", "data tokenize")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_the_code_of_a_model(name: str, trap: Trap, slop) -> None:
    code, out, err = slop(*COMMANDS[name].format(**vars(trap)).split())
    assert not trap.marker.exists()
    assert code in (0, 2), err
    assert "trust_remote_code" not in out + err and "[y/N]" not in out + err and "Traceback" not in err


@pytest.mark.parametrize("name", sorted(REFUSE - {"train, from", "train, resume", "eval, run"}))
def test_a_model_that_needs_its_code_is_refused_in_words(name: str, tmp_path: Path, model_dir: Path, error_of) -> None:
    trap = Trap(tmp_path, model_dir, is_needed=True)
    assert NEEDS_CODE in error_of(*COMMANDS[name].format(**vars(trap)).split())


#: The same in Python.
CALLS: dict[str, Callable[[Trap], object]] = {
    "load_tokenizer": lambda trap: slop_hf.data.load_tokenizer(trap.model),
    "evaluate_model": lambda trap: slop_hf.evaluate_model(
        trap.model,
        "perplexity",
        held_out=HeldOut.from_texts({"text": trap.text.read_text()}, train_tokenizer(["to be or not"] * 3, 258), 16),
        cache_dir=trap.home / "scores",
    ),
    "grow_checkpoint": lambda trap: slop_hf.grow_checkpoint(
        trap.model, trap.home / "grown", "layer", {"num_hidden_layers": 3}, verify=True
    ),
    "train_run": lambda trap: slop_hf.train_run(
        slop_hf.RunConfig.from_yaml(trap.config, {"model.pretrained": str(trap.model)}), trap.home / "out"
    ),
    "train_run, from": lambda trap: slop_hf.train_run(
        slop_hf.RunConfig.from_yaml(trap.config), trap.home / "out", from_stage=str(trap.model)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_function_runs_the_code_of_a_model(name: str, trap: Trap) -> None:
    try:
        CALLS[name](trap)
    except SlopError as caught:
        assert "trust_remote_code" not in str(caught)
    assert not trap.marker.exists()


@pytest.fixture
def answering_stdin(tmp_path: Path, monkeypatch) -> Iterator[None]:
    """Let file descriptor 0, and with it whatever reads from the terminal, say yes."""
    (tmp_path / "answers").write_text(ANSWERS)
    saved = os.dup(0)
    with (tmp_path / "answers").open() as answers:
        os.dup2(answers.fileno(), 0)
        monkeypatch.setattr("sys.stdin", answers)
        yield
    os.dup2(saved, 0)
    os.close(saved)


@pytest.mark.parametrize("name", ["train, tokenizer", "eval"])
def test_no_answer_at_the_terminal_runs_the_code(
    name: str, tmp_path: Path, model_dir: Path, answering_stdin, error_of
) -> None:
    trap = Trap(tmp_path, model_dir, is_needed=True)
    assert NEEDS_CODE in error_of(*COMMANDS[name].format(**vars(trap)).split())
    assert not trap.marker.exists()


@pytest.mark.parametrize("loader", [AutoConfig, AutoModelForCausalLM, AutoTokenizer])
def test_the_code_would_run_if_asked_for(loader, tmp_path: Path, model_dir: Path, monkeypatch) -> None:
    """Otherwise the tests above would prove nothing."""
    trap = Trap(tmp_path, model_dir, is_needed=True)
    monkeypatch.setattr("sys.stdin", io.StringIO(ANSWERS))
    loader.from_pretrained(trap.model)
    assert trap.marker.exists()


def list_calls_that_may_run_code(source: str) -> Iterator[str]:
    """List the calls that load a model, a config or a tokenizer without `trust_remote_code=False`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        owner, _, name = function.rpartition(".")
        asks = name in ("from_pretrained", "HFLM") or (name == "from_config" and owner.rpartition(".")[2] in AUTO)
        values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if asks and values.get("trust_remote_code") != "False":
            yield f"line {node.lineno}: {function}"


@pytest.mark.parametrize("folder", ["src", "recipes", "benchmarks"])
def test_every_loading_call_refuses_code(folder: str) -> None:
    paths = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.ipynb")]
    assert paths
    calls = {str(path): list(list_calls_that_may_run_code(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: found for path, found in calls.items() if found} == {}


@pytest.mark.parametrize(
    ("call", "is_listed"),
    [
        ("AutoModel.from_pretrained(path)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(path, trust_remote_code=False)", False),
        ("transformers.AutoModelForCausalLM.from_config(config)", True),
        ("HFLM(pretrained=path)", True),
        ("ModelDims.from_config(config)", False),
    ],
)
def test_the_calls_are_found(call: str, is_listed: bool) -> None:
    assert bool(list(list_calls_that_may_run_code(call))) == is_listed


def test_datasets_is_a_version_without_loading_scripts() -> None:
    assert '"datasets>=4"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
