"""Reports: runs on disk as tables, figures, Markdown, HTML and JSON. No torch, no transformers.

Names are loaded on first use: training, which publishes and evaluates its stages, does not load matplotlib.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
