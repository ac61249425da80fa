"""Settings of all tests."""

from __future__ import annotations

import os

# Before transformers is imported: no look-ups on a network that may not be there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before Ray is imported: it listens to this machine alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from hypothesis import HealthCheck, settings

# Machines are shared and slow at times; a slow draw is not a failure.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
