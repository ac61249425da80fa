"""Made-up probes: 0.5 s of constant cost per update, and 0.1 s per second of audio."""

from __future__ import annotations

from typing import Any

from cvrunner.training.probe import ConditionProbe, FeaturePass, TimedUpdate

CONV = FeaturePass("conv", "c", cost=0.01, size=1000.0)
HIDDEN = FeaturePass("hidden", "h", cost=0.02, size=2000.0)


def made_up(condition: str = "unfrozen", **changes: Any) -> ConditionProbe:
    values: dict[str, Any] = {
        "condition": condition,
        "device": "cpu",
        "precision": "float32",
        "memory": "host",
        "peak_memory_mib": 500.0,
        "larger_mib": {},
        "configured": 2,
        "batch_size": 2,
        "fits": None,
        "typical": TimedUpdate(4, longest_s=2.0, audio_s=5.0, step_s=1.0),
        "longest": TimedUpdate(4, longest_s=6.0, audio_s=15.0, step_s=2.0),
        "plain_mamba_s": None,
        "load_s": 0.25,
        "validation_s": 0.01,
        "features": (CONV, HIDDEN) if condition == "frozen" else (CONV,),
        "statistics": 500,
        "linear_probe_s": 3.0,
        "trained_bytes": 1_000_000,
        "checkpoint_bytes": 3_000_000,
    }
    return ConditionProbe(**{**values, **changes})
