"""The section `verdict`: how the conditions of a run are compared. It changes no trial's numbers."""

from __future__ import annotations

from typing import Literal

from cvrunner.config.sections import Dimension, Positive, Section


class VerdictConfig(Section):
    """How conditions are compared; declared before a run, recorded in its protocol (docs/protocol.md)."""

    primary: Dimension | Literal["avg"] = "avg"
    """Primary outcome, the only one that the sentence decides on: a dimension of the corpus, or `avg` for CCC-Avg."""
    margin: Positive = 0.02
    """Largest difference in CCC that counts as practically equal."""
    cluster: Literal["dialogue", "speaker"] | None = None
    """Unit that is resampled within sessions: the largest one that was sampled. `null`: `speaker` if a session of the
    corpus has more than two speakers, else `dialogue`."""
