"""Every error a user can meet, with the exit code it ends the program with.

    CvrunnerError                 1
    ├── UsageError                2   a command or an argument that does not exist
    ├── ConfigError               2   a key or a value in the configuration
    ├── CorpusError               2   one or more problems in the corpus, all of one pass
    │   └── LeakError             2   train, validation and test share what they must not
    ├── EncoderError              2   encoder missing, of the wrong kind or not allowed
    ├── ClusterError              2   the cluster cannot hold what was asked for, or does not answer
    ├── ResultsError              2   the results folder is unusable
    ├── TrialError                1   one trial failed; the others go on
    │   ├── MovementError         1   the encoder moved although frozen, or did not although unfrozen
    │   ├── NonFiniteError        1   loss or gradient is not a number
    │   ├── MemoryLimitError      1   out of memory with nothing left to make smaller
    │   └── TrialInUseError       1   another process trains the same trial
    ├── ClusterLostError          1   Ray itself died under a run
    ├── IncompleteRunError        1   trials are missing, so there is no comparison
    └── Stopped                 143   SIGTERM, SIGINT or `ray job stop`

A message has the value, the rule and where it was found (file, row, key), and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence

TARGET_MISSED = 3
"""Exit code of `verify` where all went well and the result is below the target."""


class CvrunnerError(Exception):
    """Base of all errors with a message for the user; anything else is our bug and keeps its traceback."""

    exit_code = 1


class UsageError(CvrunnerError):
    """A command, fold or condition that does not exist."""

    exit_code = 2


class ConfigError(CvrunnerError):
    """A key or value of the configuration breaks a rule; the message begins with the key."""

    exit_code = 2


class CorpusError(CvrunnerError):
    """The corpus has problems; `problems` lists all that one pass found, each with file and row."""

    exit_code = 2
    shown = 20

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{where}: {count} problem{'s' if count != 1 else ''}"]
        lines += [f"  {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[CorpusError], tuple[str, list[str]]]:
        return type(self), (self.where, self.problems)


class LeakError(CorpusError):
    """Two parts of a fold share a speaker, a dialogue, an utterance or identical audio."""


class EncoderError(CvrunnerError):
    """The speech encoder is missing, is not a WavLM, or was already tuned on the corpus."""

    exit_code = 2


class ClusterError(CvrunnerError):
    """The cluster cannot hold a trial, now or ever, or it does not answer."""

    exit_code = 2


class ClusterLostError(CvrunnerError):
    """Ray on the driver's own node is gone; what the trials have saved is not."""


class ResultsError(CvrunnerError):
    """The results folder cannot be used or read."""

    exit_code = 2


class TrialError(CvrunnerError):
    """One trial cannot go on; the other trials can."""


class WeightChangeError(TrialError):
    """The encoder moved although it is frozen, or stood still although it is not."""


class NonFiniteError(TrialError):
    """The loss or a gradient is NaN or infinite."""


class MemoryLimitError(TrialError):
    """Out of memory with one utterance at a time."""


class TrialInUseError(TrialError):
    """Another process trains the same trial; a process that is dying may need a moment to let go."""


class IncompleteRunError(CvrunnerError):
    """Trials are missing; a mean over the folds that happen to be there is never printed."""


class Stopped(CvrunnerError):  # noqa: N818 (not a fault)
    """The run was told to stop and has saved what it had."""

    exit_code = 143
