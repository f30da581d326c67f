"""Tests run offline, quietly and on one thread; the libraries read these settings when they are first imported."""

import os
import tempfile

from hypothesis import settings

_hf_home = tempfile.TemporaryDirectory(prefix="slop-hf-tests-", ignore_cleanup_errors=True)  # removed at exit

os.environ.update(
    HF_HOME=_hf_home.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

# The same examples in every run: a change is judged by what it changed, not by the dice.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
