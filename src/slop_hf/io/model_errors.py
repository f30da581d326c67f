"""Errors of transformers when it loads a model or a tokenizer."""

from __future__ import annotations

from .network_errors import find_network_error, summarise_error

NEEDS_CODE = "it needs the Python code that comes with it, and slop-hf never runs such code"


def explain_load_error(caught: BaseException) -> str:
    """Return the reason in one line; transformers' own advice for models with code is to run the code.

    >>> explain_load_error(ValueError("a contains custom code.\\nPlease pass the argument `trust_remote_code=True`"))
    'it needs the Python code that comes with it, and slop-hf never runs such code'
    """
    if "trust_remote_code" in str(caught):
        return NEEDS_CODE
    if (cause := find_network_error(caught)) is not None:
        return f"the Hub cannot be reached ({summarise_error(cause)})"
    return summarise_error(caught)
