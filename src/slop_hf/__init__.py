"""SLOP: grow a small pre-trained language model into a large one, one dimension per stage.

Public names are listed in `__init__.pyi` and loaded on first use, so that planning needs no torch.
"""

from __future__ import annotations

import warnings

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

#: Earlier names, and what they are called now.
_RENAMED = {
    "checkpoint_directory": "find_checkpoint_directory",
    "comparison_table": "build_comparison_table",
    "continued": "continue_from",
}


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        warnings.warn(f"slop_hf.{name} is now slop_hf.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    return _load(name)
