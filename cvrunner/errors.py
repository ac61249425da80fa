"""All errors that are meant for the user, each with the exit code of the program.

    CvrunnerError                 1
    ├── UsageError                2   a command or an argument that does not exist
    ├── ConfigError               2   a key or a value in the configuration
    ├── CorpusError               2   all problems that one pass over the corpus found
    │   └── LeakError             2   train, validation and test are not disjoint
    ├── EncoderError              2   the encoder is missing, unsupported or not allowed
    ├── ClusterError              2   the cluster is too small for a trial, or does not answer
    ├── ResultsError              2   the results folder cannot be used
    ├── TrialError                1   one trial failed; the others continue
    │   ├── WeightChangeError     1   a frozen encoder changed, or an unfrozen one did not
    │   ├── NonFiniteError        1   the loss or a gradient is NaN or infinite
    │   ├── DeviceError           1   torch cannot use the GPU that the trial should train on
    │   ├── MemoryLimitError      1   out of memory although the batch cannot shrink further
    │   └── TrialInUseError       1   another process trains the same trial
    ├── ClusterLostError          1   Ray died during a run
    ├── IncompleteRunError        1   trials are missing, so nothing can be compared
    └── Stopped                 143   SIGTERM, SIGINT or `ray job stop`

A message gives the value, the rule, the place (file, row, key) and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence

from cvrunner.text import plural

TARGET_MISSED = 3
"""Exit code of `verify` if training succeeded but the validation CCC is below the target."""


class CvrunnerError(Exception):
    """Base of all errors with a message for the user; any other exception is a bug and keeps its traceback."""

    exit_code = 1


class UsageError(CvrunnerError):
    """A command, an argument, a fold or a condition does not exist."""

    exit_code = 2


class ConfigError(CvrunnerError):
    """A key or a value in the configuration breaks a rule; the message begins with the key."""

    exit_code = 2


class CorpusError(CvrunnerError):
    """The corpus has problems; `problems` lists all that one pass found, with file and row."""

    exit_code = 2
    shown = 20

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{where}: {plural(count, 'problem')}"]
        lines += [f"  {problem}" for problem in self.problems[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more")
        super().__init__("\n".join(lines))

    # Ray pickles errors, and by default would pass the whole message as `where`.
    def __reduce__(self) -> tuple[type[CorpusError], tuple[str, list[str]]]:
        return type(self), (self.where, self.problems)


class LeakError(CorpusError):
    """Two parts of a fold share a speaker, a dialogue, an utterance or a recording."""


class EncoderError(CvrunnerError):
    """The speech encoder is missing, unsupported, or already fine-tuned on emotion data."""

    exit_code = 2


class ClusterError(CvrunnerError):
    """The cluster is too small for a trial, or it does not answer."""

    exit_code = 2


class ClusterLostError(CvrunnerError):
    """Ray died on the driver's node; the files that the trials wrote are safe."""


class ResultsError(CvrunnerError):
    """The results folder cannot be read or written."""

    exit_code = 2


class TrialError(CvrunnerError):
    """One trial failed; the other trials continue."""


class WeightChangeError(TrialError):
    """The weights of a frozen encoder changed, or those of an unfrozen one did not."""


class NonFiniteError(TrialError):
    """The loss or a gradient is NaN or infinite."""


class DeviceError(TrialError):
    """torch cannot use the GPU that a trial should train on, or could use one although the trial is for a CPU."""


class MemoryLimitError(TrialError):
    """Out of memory although only one utterance is encoded at a time."""


class TrialInUseError(TrialError):
    """Another process trains the same trial; one that is being killed may hold its lock for a moment."""


class IncompleteRunError(CvrunnerError):
    """Trials are missing; a mean over only some of the folds is never printed."""


class Stopped(CvrunnerError):  # noqa: N818 (not a fault)
    """The run was asked to stop and has saved its state."""

    exit_code = 143
