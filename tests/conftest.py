"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes tells how busy the machine is. What CI presets (the same examples in every run) stays.
settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")
