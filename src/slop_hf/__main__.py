"""`python -m slop_hf` is the `slop` command."""

from .cli import main

main()
