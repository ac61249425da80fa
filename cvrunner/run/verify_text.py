"""What `verify` prints: one fold's result beside what others claimed and the target."""

from __future__ import annotations

from collections.abc import Mapping

from cvrunner.config.schema import Config
from cvrunner.config.sections import Claim
from cvrunner.records.results import Ccc, TrialResult, ccc_label
from cvrunner.report.render import tables_as_text
from cvrunner.report.tables import NONE, Table, number


def missed(least_ccc: Mapping[str, float], ccc: Ccc) -> list[str]:
    """The dimensions whose CCC is below its target, or undefined."""
    return [d for d, least in least_ccc.items() if (value := ccc.get(d)) is None or value < least]


def verify_text(config: Config, result: TrialResult, synthetic: bool, width: int) -> str:
    """A table, where its claims come from, and a sentence."""
    source = f"Claimed by {config.reference.source}; not" if config.reference.source else "Claims: not"
    note = f"{source} measured here, and one fold is not the mean over all.\n"
    claimed = any(_claims(config, result.condition, dimension) for dimension in result.test_ccc)
    return tables_as_text(
        [_table(config, result)], (note if claimed else "") + _sentence(config, result, synthetic), width
    )


def _table(config: Config, result: TrialResult) -> Table:
    least = config.verify.least_ccc
    rows = [
        [
            ccc_label(dimension),
            number(result.validation_ccc.get(dimension)),
            number(value),
            number(least.get(dimension)),
            "; ".join(map(_claim, _claims(config, result.condition, dimension))) or NONE,
        ]
        for dimension, value in result.test_ccc.items()
    ]
    epoch = f"epoch {result.best_epoch} of {result.epochs_run}, chosen by validation"
    title = f"{result.condition}, fold {result.fold}: {epoch}"
    return Table(title, ["quantity", "validation", "test", "target", "claimed"], rows)


def _claims(config: Config, condition: str, dimension: str) -> list[Claim]:
    """Of the baseline and of the condition itself."""
    about = {next(iter(config.conditions)), condition}
    return [c for c in config.reference.claims if c.condition in about and c.quantity == f"ccc_{dimension}"]


def _claim(claim: Claim) -> str:
    figure = f"{claim.low:g}" if claim.high is None else f"{claim.low:g} to {claim.high:g}"
    return f"{figure} ({claim.condition}, {claim.name})"


def _sentence(config: Config, result: TrialResult, synthetic: bool) -> str:
    least_ccc, data = config.verify.least_ccc, " (synthetic data)" if synthetic else ""
    if not least_ccc:
        return f"no target is set (verify.target); the fold is trained{data}"
    below = missed(least_ccc, result.test_ccc)
    parts = [
        f"{ccc_label(d)} {number(result.test_ccc.get(d))} {'is below' if d in below else 'reaches'} {least:g}"
        for d, least in least_ccc.items()
    ]
    return f"target {'missed' if below else 'met'}: {', '.join(parts)}{data}"
