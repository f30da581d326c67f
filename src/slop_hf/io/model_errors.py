"""Errors of transformers when it loads a model or a tokenizer."""

from __future__ import annotations

from .network_errors import summarise_error

NEEDS_CODE = "it needs the Python code that comes with it, and slop-hf never runs such code"


def explain_load_error(caught: BaseException) -> str:
    """Return the reason in one line; transformers' own advice for models with code is to run the code.

    >>> explain_load_error(ValueError("a contains custom code.\\nPlease pass the argument `trust_remote_code=True`"))
    'it needs the Python code that comes with it, and slop-hf never runs such code'
    """
    return NEEDS_CODE if "trust_remote_code" in str(caught) else summarise_error(caught)
