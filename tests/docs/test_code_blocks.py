"""The code blocks of README and docs: README's Python runs as pasted, commands and imports are understood."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from slop_hf import CostModel, ModelDims, RunConfig, grow_model
from slop_hf.cli import _build_command, _ClickError
from slop_hf.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
COMMIT = "0" * 40


def read_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def list_commands(page):
    """Return the `slop` commands in the blocks of a page, as words."""
    lines = [line for block in read_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [part for line in lines for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' ")]
    return [shlex.split(command)[1:] for command in commands if command.startswith("slop ")]


COMMANDS = {f"{page.stem}: slop {' '.join(words)}": words for page in PAGES for words in list_commands(page)}


def parse_command(words):
    """Parse a command line as `slop` does, without running it."""
    command = _build_command()
    context = command.context_class(command, info_name="slop")
    while hasattr(command, "commands"):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
    command.make_context(name, list(words), parent=context)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_are_understood(words):
    if words[-1] == "...":  # an option among others
        words = [*words[:-1], "--initial", "64,128,2,4"]
    if "--help" in words:
        words.remove("--help")
    else:
        parse_command(words)
    for word in words:
        assert not word.startswith("recipes/") or (ROOT / word).exists(), word


def test_wrong_commands_would_be_found():
    for words in (["plan", "--initia", "1"], ["train"], ["report"], ["status", "run", "--interval", "none"]):
        with pytest.raises(_ClickError):
            parse_command(words)
    with pytest.raises(AssertionError):
        parse_command(["plann"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_import_what_exists(page):
    for block in (block for name in ("python", "py") for block in read_blocks(page, name)):
        if block.startswith(">>>"):
            continue  # a doctest, which tests/growth/test_growth_page.py runs
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        ours = [node for node in imports if "slop_hf" in ast.unparse(node)]
        exec("\n".join(map(ast.unparse, ours)), {})


@pytest.fixture
def smollm(monkeypatch, tmp_path):
    """A tiny model in the Hub's cache, in place of SmolLM2-135M."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    folder = cache / "models--HuggingFaceTB--SmolLM2-135M"
    snapshot = folder / "snapshots" / COMMIT
    tokenizer = train_tokenizer([" ".join(str(k) for k in range(500))] * 20, 400)
    config = ModelDims(48, 96, 3, 3, 1).to_config(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True))
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_readmes_python_runs_as_pasted(smollm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    namespace = {}
    for block in read_blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["larger"].config.num_hidden_layers == namespace["model"].config.num_hidden_layers + 2
    trained = AutoModelForCausalLM.from_pretrained("runs/mine/stage-0-initial", trust_remote_code=False)
    assert torch.equal(trained.lm_head.weight, namespace["model"].lm_head.weight), "the initial model is not trained"


@pytest.mark.slow
def test_the_python_of_the_guides_runs_as_pasted(config, tmp_path, monkeypatch):
    """All but trials of billion-parameter schedules; publishing.md and growth.md's doctests have their own tests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "recipes").mkdir()
    shutil.copy(config, "recipes/grow_tiny.yaml")
    CostModel(3e-19, 2e-12).to_yaml("cost.yaml")
    dims = ModelDims(16, 32, 2, 2)
    names = {
        "grow_model": grow_model,
        "llama": LlamaForCausalLM(dims.replace(intermediate_size=3584).to_config(LlamaConfig(vocab_size=50))),
        "mixtral": AutoModelForCausalLM.from_config(dims.to_config(MixtralConfig(vocab_size=50))),
        "config": RunConfig.from_yaml(config),
        "texts": ["a short text of some words"],
    }
    run = 0
    for page, language in [("training", "python"), ("evaluation", "python"), ("planning", "python"), ("growth", "py")]:
        for block in read_blocks(ROOT / "docs" / f"{page}.md", language):
            if not any(word in block for word in ("Probe(", "exaone4")):
                exec(compile(block, f"{page}.md", "exec"), names)
                run += 1
    assert run >= 7 and (tmp_path / "law.yaml").is_file() and (tmp_path / "runs" / "tiny" / "stage-2-ffn").is_dir()
