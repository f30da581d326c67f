"""`python -m slop_hf.testing`: measure the exactness of growth and print it as a Markdown page."""

import argparse

import torch

from ..architectures import ARCHITECTURES
from ..io.files import write_text
from .exactness import build_exactness_page

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m slop_hf.testing", description=__doc__.partition(": ")[2])
    parser.add_argument("--output", help="file to write; by default the page is printed")
    parser.add_argument("--families", nargs="+", default=list(ARCHITECTURES), metavar="MODEL_TYPE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums in a fixed order: the same numbers each time
    page = build_exactness_page(arguments.families)
    if arguments.output:
        write_text(arguments.output, page)
    else:
        print(page, end="")
