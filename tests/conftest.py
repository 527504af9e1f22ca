"""For all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# transformers copies an export's Python files into a cache that it locates once, when it is imported; keep them out of
# the user's, and each worker's out of the others'.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="moetrain-hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# How long an example takes tells how busy the machine is. What CI presets (the same examples in every run) stays.
settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")
