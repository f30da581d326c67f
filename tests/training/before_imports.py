"""Imported first by the process that ranks are forked from, for the reasons given in `tests/conftest.py`."""

import gc
import os

gc.disable()
os.fsync = lambda descriptor: None
