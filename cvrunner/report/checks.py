"""The run checks: did each condition train what it should, for long enough, on the same data, without a failure?"""

from __future__ import annotations

from collections.abc import Iterable

from cvrunner.records.summary import Convergence, Reference
from cvrunner.report.report import Report
from cvrunner.text import Table, plural
from cvrunner.verdict.comparison import mixed_precision
from cvrunner.verdict.convergence import convergence

LABELS = {
    "header": "the rating printed next to each utterance, the mean of the observers",
    "observers": "the mean of the individual observers' ratings",
    "all_raters": "the mean of all ratings, including the speakers' ratings of themselves",
    "manifest": "as listed in the manifest",
    "msp_podcast": "the consensus labels of the corpus",
    "audformat": "as in the tables of the database",
}
UNIFORM = 0.05
"""Layer weights within this share of 1/L, for L layers, have stayed uniform."""
SHOWN_DIGITS = 12
"""Leading digits of a digest in the run checks; `facts` shows complete digests."""


def checks_table(report: Report) -> Table:
    """Return what was checked while the run trained and what the checks found; empty before the first result."""
    results = list(report.results.values())
    if not results:
        return Table("Run checks", [], [])
    done = {result.condition for result in results}
    conditions = [condition for condition in report.run.conditions if condition in done]
    splits = {report.run.split_digest, *(r.split_digest for r in results)}
    corpora = {report.run.corpus_digest, *(r.corpus_digest for r in results)}
    variant = report.config.label_variant
    precision = f"{', '.join(sorted({r.precision for r in results}))}, as requested on every device"
    if mixed := mixed_precision(report.config, results):
        precision = f"NOT THE SAME on all devices, so nothing is compared: {mixed}"
    rows = [[f"did {condition} train the right weights?", _trained(report, condition)] for condition in conditions]
    rows += [
        [f"does {condition} beat the {name}?", _beats(report, of, condition)]
        for name, of in report.summary.references.items()
        for condition in report.summary.scores
    ]
    # While trials are missing, the summary has no convergence yet.
    found = report.summary.convergence or convergence(report.epochs, report.run)
    rows += [[f"did {condition} train for long enough?", _long_enough(found[condition])] for condition in conditions]
    rows += [[f"did {condition} learn layer weights?", _uniform_layers(report, condition)] for condition in conditions]
    rows += [
        ["same search for all conditions?", _search_budget(report)],
        ["collapsed predictions", _collapsed(report)],
        ["attempts after the first", _retries(report)],
        ["out of memory", _out_of_memory(report)],
        ["labels", f"{variant}: {LABELS[variant]}"],
        ["labels outside the scale", _outside_scale(report)],
        ["warnings about the corpus", "; ".join(report.run.corpus_warnings) or "none"],
        [
            "encoder weights",
            _same("weights", {f"{r.encoder}, SHA-256 {r.encoder_digest[:SHOWN_DIGITS]}" for r in results}),
        ],
        ["precision", precision],
        ["split", _same("split", {f"digest {digest[:SHOWN_DIGITS]}" for digest in splits})],
        ["corpus", _same("corpus", {f"digest {digest[:SHOWN_DIGITS]}" for digest in corpora})],
    ]
    if tuned := sorted({f"{r.encoder} {r.encoder_tuned}" for r in results if r.encoder_tuned}):
        rule = "allowed by model.allow_tuned_encoder; if it has heard the test speakers, every fold is invalid"
        rows.append(["encoder tuned on emotion", f"probably: {'; '.join(tuned)}; {rule}"])
    return Table(
        "Run checks",
        ["check", "result"],
        rows,
        "Weight change: ||w - w0|| / ||w0||, checked after every epoch; a trial fails if a frozen group changes or a "
        "trained group does not. Long enough: the rule is in docs/statistics.md. The numbers are not comparable with "
        "those of a run that has another split, corpus or label variant.",
    )


def _trained(report: Report, condition: str) -> str:
    of = report.results_of(condition)
    encoder = [change for r in of.values() for group, change in r.weight_change.items() if group != "head"]
    adapters = any(group.startswith("lora") for r in of.values() for group in r.weight_change)
    head = [r.weight_change["head"] for r in of.values() if "head" in r.weight_change]
    # A frozen group that moved and a trained one that did not move at all fail the trial, which then has no result.
    trials = f"in {len(of)} of {len(of)} trials"
    found = f"encoder frozen and unchanged after every epoch {trials}"
    if encoder:
        found = f"encoder weights changed by {_percent(encoder)} by the last epoch {trials}"
    if adapters:
        found = f"adapters (LoRA) changed by {_percent(encoder)} by the last epoch {trials}, encoder unchanged"
    found += f"; head weights changed by {_percent(head)}"
    slow = [
        f"{name}: {group} by {r.weight_change_best.get(group, 0.0):.1e}, implied {implied:.1e}"
        for name, r in of.items()
        for group, implied in r.barely_moved.items()
    ]
    if slow:
        return f"BARELY: weights moved far less than their learning rate implies ({'; '.join(slow)}); {found}"
    return f"yes: {found}"


def _percent(shares: Iterable[float]) -> str:
    """Return the range of shares, in percent."""
    values = sorted(shares)
    if not values:
        return "an unrecorded amount"
    low, high = f"{100 * values[0]:.2g}", f"{100 * values[-1]:.2g}"
    if low == high:
        return f"{low} %"
    return f"{low} to {high} %"


def _beats(report: Report, reference: Reference, condition: str) -> str:
    """Say by outcome whether level 1 shows a lead over a reference; a bare difference shows nothing."""
    found = []
    for outcome, label in report.label.items():
        lead = reference.leads[condition][outcome]
        if lead.mean is None:
            continue
        if lead.on_corpus is None:
            found.append(f"{label} not shown, {lead.mean:+.4f} without an interval")
            continue
        low, high = lead.on_corpus.interval.low, lead.on_corpus.interval.high
        answer = "not shown"
        if low > 0:
            answer = "yes"
        elif high < 0:
            answer = "NO, it scores lower"
        found.append(f"{label} {answer}, {lead.mean:+.4f} ({lead.on_corpus.interval})")
    return "; ".join(found) or "unknown: no CCC is defined"


def _collapsed(report: Report) -> str:
    found = [f"{name}: {', '.join(r.collapsed)}" for name, r in report.results.items() if r.collapsed]
    if not found:
        return "none: every trial's test predictions vary"
    return f"COLLAPSED, the predictions vary less than 5 % as much as the labels: {'; '.join(found)}"


def _uniform_layers(report: Report, condition: str) -> str:
    """Say where the weights of the mixed layers are still those of the start, so that the mix is a plain mean."""
    weights = {
        f"{name} {dimension}": of
        for name, r in report.results_of(condition).items()
        for dimension, of in r.layer_weights.items()
        if len(of) > 1
    }
    if not weights:
        return "one layer, nothing to learn"
    uniform = [name for name, of in weights.items() if max(abs(w * len(of) - 1) for w in of) < UNIFORM]
    if not uniform:
        return "yes: in every trial and dimension, a weight differs by more than 5 % from that of a plain mean"
    if len(uniform) == len(weights):
        return "NO: they stayed uniform in every trial and dimension, so the layers are averaged"
    return f"NOT EVERYWHERE: they stayed uniform in {', '.join(uniform)}"


def _long_enough(found: Convergence) -> str:
    if found.converged is None:
        return f"not known: {found.reason}"
    answer = "yes" if found.converged else "NO, more epochs might score higher"
    return f"{answer}: {found.reason}"


def _search_budget(report: Report) -> str:
    """Say whether the settings of all conditions were searched with the same budget."""
    origin = report.config.settings_from
    samples = {condition: origin.samples(condition) for condition in report.run.conditions}
    if len(set(samples.values())) > 1:
        most, least = max(samples, key=samples.__getitem__), min(samples, key=samples.__getitem__)
        counts = ", ".join(f"{condition} {count}" for condition, count in samples.items())
        return f"NOT THE SAME: settings tried: {counts}; this favours {most} over {least}"
    tried = next(iter(samples.values()))
    if tried:
        return f"yes: {plural(tried, 'setting')} per condition"
    return "no recorded search, so a condition may do better with other settings"


def _retries(report: Report) -> str:
    found = []
    for name, state in report.run.trials.items():
        if state.attempts > 1:
            kinds = ", ".join(f"{kind} {count}" for kind, count in state.failures.items())
            found.append(f"{name}: {state.attempts - 1}" + f" ({kinds})" * bool(kinds))
    return ", ".join(found) or "none"


def _out_of_memory(report: Report) -> str:
    config, places = report.config, {(r.condition, r.fold) for r in report.results.values()}
    configured = {place: config.for_condition(*place).train.batch_size for place in places}
    # Results of earlier versions do not record it and have 0.
    smaller = {n: r.batch_size for n, r in report.results.items() if 0 < r.batch_size < configured[r.condition, r.fold]}
    if not smaller:
        return "never: every trial kept its batch_size"
    listed = ", ".join(f"{name}: {size}" for name, size in smaller.items())
    return f"batch_size was reduced, with the same effective batch size ({listed})"


def _outside_scale(report: Report) -> str:
    low, high = report.config.corpus.scale
    outside = max(r.labels_outside_scale for r in report.results.values())
    if not outside:
        return f"none outside {low:g} to {high:g}"
    return f"{outside} outside {low:g} to {high:g}; kept as they are"


def _same(what: str, found: set[str]) -> str:
    if len(found) == 1:
        return f"{found.pop()}, the same in all trials"
    return f"NOT THE SAME {what} in all trials: {'; '.join(sorted(found))}"
