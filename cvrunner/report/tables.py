"""The comparison as tables: built once, shown by the terminal, comparison.md and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cvrunner.records.results import RunRecord, Score, ccc_label
from cvrunner.records.summary import Aggregate, Difference, Evaluation, Interval, Summary
from cvrunner.report.evidence import evidence_tables, facts
from cvrunner.report.report import Report, labels
from cvrunner.text import DASH, Table, format_score, tables_as_text
from cvrunner.verdict.ceiling import ATTAINABLE_STRETCHED

Scores = Mapping[str, Mapping[str, Aggregate]]
Differences = Mapping[str, Mapping[str, Difference]]
"""Per name, then dimension or `avg`."""


STEPS = "What each step buys"
SHOWN = 10
"""Names that are listed in a fact; the files have all."""
BY_CONDITION = "Test CCC by condition: mean ± standard deviation over folds and seeds"


def render_markdown(report: Report) -> str:
    """Return comparison.md."""
    tables = [*comparison_tables(report.run, report.summary), *evaluation_tables(report), *evidence_tables(report)]
    parts = [
        f"# {report.run.run}",
        f"**{report.summary.verdict}**",
        *(table.as_markdown() for table in tables),
        "## What was run\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts(report)),
        "Written by `cvrunner report` from the files in this folder; do not edit.",
    ]
    return "\n\n".join(parts) + "\n"


def render_text(run: RunRecord, summary: Summary, width: int = 100) -> str:
    """Return the comparison and the verdict for a terminal of `width` columns, without colours."""
    return tables_as_text(comparison_tables(run, summary, only=summary.primary), width, summary.verdict)


def comparison_tables(run: RunRecord, summary: Summary, only: str | None = None) -> list[Table]:
    """Return the tables that answer the question: scores, differences, what limits them, references, folds.

    Empty while trials are missing. `only`: the outcome to show by fold; None for all.
    """
    # While trials are missing, any mean would be over those that happen to be there.
    if summary.missing:
        return []
    label, primary = labels(run), summary.primary
    outcomes = list(label)
    if only:
        outcomes = [only]
    named = {f"{other} - {summary.baseline}": differences for other, differences in summary.differences.items()}
    leads = {
        f"{condition} - {name}": lead for name, of in summary.references.items() for condition, lead in of.leads.items()
    }
    tables = [
        table_of_scores(
            BY_CONDITION,
            summary.scores,
            label,
            below={name: of.scores for name, of in summary.references.items()},
            above=_ceilings(run),
        ),
        table_of_differences(
            "Paired differences", named, primary, summary.cluster, "sessions" if run.folds_share_test else "folds"
        ),
        table_of_steps(summary),
        table_of_limits(named, primary, summary.margin, summary.cluster),
        table_of_leads(leads, outcomes),
        table_of_folds("Test CCC by fold", summary.scores, named, run.folds, run.seeds, outcomes),
    ]
    return [table for table in tables if table.rows]


def evaluation_tables(report: Report) -> list[Table]:
    """Return the tables of the run's models on other corpora: what was done, then the same tables as for the run."""
    tables = []
    for evaluated in report.evaluations:
        record, summary = evaluated.record, evaluated.summary
        name = f"On {record.run}"
        rows = [[what, value] for what, value in evaluation_facts(record)]
        tables.append(Table(f"{name}: another corpus", ["", ""], [["result", summary.verdict], *rows]))
        if not summary.missing:
            home = report.summary.scores
            tables.append(replace(evaluation_table(record, summary, home), title=f"{name}: CCC and differences"))
            shown = comparison_tables(record, summary, only=summary.primary)
            # What a step costs was measured in training, and stands in the run's own table.
            kept = (table for table in shown if table.title != STEPS)
            tables += [replace(table, title=f"{name}: {table.title}") for table in kept]
    return tables


def evaluation_table(record: Evaluation, summary: Summary, home: Scores) -> Table:
    """Return one table of an evaluation: CCC there and in the run (`home`), differences, between floor and ceiling."""
    label, primary, dash = labels(record), summary.primary, [DASH] * 3
    rows = []
    for name, of in summary.references.items():
        rows.append([name, *(format_score(of.scores[d].mean) for d in label), *dash])
    for condition, by_outcome in summary.scores.items():
        cells = dash.copy()
        # Over fewer dimensions than the run's, CCC-Avg would be another score.
        if primary in home.get(condition, {}) and (primary != "avg" or len(home[condition]) == len(label)):
            cells[0] = format_score(home[condition][primary].mean)
        if difference := summary.differences.get(condition, {}).get(primary):
            cells[1] = format_score(difference.mean, signed=True)
            if level := difference.on_corpus:
                cells[2] = format_interval(level.interval)
        rows.append([condition, *(format_score(by_outcome[d].mean) for d in label), *cells])
    for name, scores in _ceilings(record).items():
        rows.append([name, *(format_score(scores[d].mean) for d in label), *dash])
    outcome = ccc_label(primary)
    columns = ["", *label.values(), f"{outcome} in the run", f"{outcome} - {summary.baseline}", "95 %"]
    note = (
        "Mean over folds and seeds. The floor of a session comes from the other sessions of this corpus. Its labels "
        "and their spread are not those of the run's corpus, so CCCs here and in the run differ for that reason, too."
    )
    return Table("", columns, rows, note)


def evaluation_facts(record: Evaluation) -> list[tuple[str, str]]:
    """Return what was evaluated: corpus, scales, who may score what, looks."""
    (low, high), (run_low, run_high) = record.scale, record.run_scale
    scale = f"{low:g} to {high:g}, as in the run"
    if record.scale != record.run_scale:
        scale = f"{low:g} to {high:g}; predictions mapped linearly from {run_low:g} to {run_high:g}"
    named = "differ, as declared" if record.speakers_differ else "none"
    people = ", ".join(f"{name} = {' = '.join(own)}" for name, own in list(record.same_speakers.items())[:SHOWN])
    if people:
        more = " and more" * (len(record.same_speakers) > SHOWN)
        named = (
            f"{len(record.same_speakers)} ({people}{more}); scored only by folds that did not train or validate on them"
        )
    scored = f"{record.utterances - len(record.left_out)} of {record.utterances}"
    if record.left_out:
        more = " and more" * (len(record.left_out) > SHOWN)
        scored += f"; no model may score {', '.join(record.left_out[:SHOWN])}{more}"
    looks = "not counted" if record.looks_before is None else str(record.looks_before)
    return [
        ("corpus", record.corpus),
        ("corpus digest", record.corpus_digest),
        ("rating scale", scale),
        ("utterances scored", scored),
        ("folds that score", ", ".join(map(str, record.folds))),
        ("speakers of the run", named),
        ("recordings of the run", str(len(record.same_audio))),
        ("looks at this corpus before", looks),
    ]


def _ceilings(run: RunRecord) -> dict[str, Mapping[str, Score]]:
    """Return what a human rater reaches, and what the noise of the labels leaves for a perfect model, if known."""
    found: dict[str, Mapping[str, Score]] = {}
    if run.floor is not None and run.floor.ceiling:
        found["one human rater"] = run.floor.ceiling
    if run.floor is not None and run.floor.panel is not None:
        panel = run.floor.panel.scores[ATTAINABLE_STRETCHED]
        found["perfect model"] = {name: Score(mean=of.mean, pooled=None) for name, of in panel.items()}
    return found


def table_of_scores(
    title: str,
    scores: Scores,
    label: Mapping[str, str],
    below: Mapping[str, Mapping[str, Score]] | None = None,
    above: Mapping[str, Mapping[str, Score]] | None = None,
) -> Table:
    """Return a row per condition, mean ± sd of each dimension and its pooled CCC, between references and ceilings."""
    columns = ["condition", *label.values(), *(f"pooled {name.removeprefix('CCC-')}" for name in label.values())]
    rows = _plain_rows(below or {}, label)
    for condition, by_dimension in scores.items():
        aggregates = [by_dimension[dimension] for dimension in label]
        means = []
        for aggregate in aggregates:
            mean = format_score(aggregate.mean)
            if aggregate.std is not None:
                mean += f" ± {aggregate.std:.4f}"
            means.append(mean)
        rows.append([condition, *means, *(format_score(a.pooled) for a in aggregates)])
    return Table(
        title,
        columns,
        rows + _plain_rows(above or {}, label),
        "Mean ± standard deviation (n - 1) over folds and seeds; pooled: one CCC over all out-of-fold predictions, "
        "mean over seeds. Rows without ± are references: the floor is stretched for CCC, the perfect model is limited "
        "only by the noise of the labels.",
    )


def _plain_rows(named: Mapping[str, Mapping[str, Score]], label: Mapping[str, str]) -> list[list[str]]:
    return [
        [name, *(format_score(of[d].mean) for d in label), *(format_score(of[d].pooled) for d in label)]
        for name, of in named.items()
    ]


def table_of_differences(title: str, named: Differences, primary: str, unit: str, groups: str = "folds") -> Table:
    """Return a row per difference and dimension: mean, both intervals and their p values; the primary outcome first.

    `unit`: what level 1 resamples, dialogue or speaker; `groups`: what level 2 is taken over.
    """
    columns = ["difference", "outcome", "mean", "95 %, on this corpus", "p", "95 %, new speakers", "p"]
    rows = []
    for name, by_dimension in named.items():
        for dimension in sorted(by_dimension, key=lambda outcome: outcome != primary):
            difference = by_dimension[dimension]
            on_corpus, for_new_speakers = [DASH, DASH], [DASH, DASH]
            if level := difference.on_corpus:
                # A secondary outcome has the p that is adjusted for the number of secondary outcomes.
                p = level.p if level.holm_p is None else level.holm_p
                on_corpus = [format_interval(level.interval), format_score(p)]
            if speakers := difference.new_speakers:
                for_new_speakers = [format_interval(speakers.interval), format_score(speakers.p)]
            rows.append(
                [
                    name,
                    ccc_label(dimension),
                    format_score(difference.mean, signed=True),
                    *on_corpus,
                    *for_new_speakers,
                ]
            )
    return Table(title, columns, rows, _difference_note(named, primary, unit, groups))


def table_of_steps(summary: Summary) -> Table:
    """Return a row per condition: what it trains, how long that takes, and what it gains; empty if it is no ladder."""
    label, rows = ccc_label(summary.primary), []
    for condition, cost in summary.costs.items() if summary.is_ladder else ():
        gain, interval = DASH, DASH
        if difference := summary.differences.get(condition, {}).get(summary.primary):
            gain = format_score(difference.mean, signed=True)
            if level := difference.on_corpus:
                interval = format_interval(level.interval)
        score = format_score(summary.scores[condition][summary.primary].mean)
        rows.append([condition, f"{cost.parameters:,}", f"{cost.hours:.3g}", score, gain, interval])
    columns = ["condition", "trained parameters", "hours", label]
    return Table(
        STEPS,
        [*columns, f"difference from {summary.baseline}", "95 %, on this corpus"],
        rows,
        "Trained parameters: of one model, with its head. Hours: training and validation of all folds and seeds, as "
        "measured, without the features that are computed once and cached.",
    )


def table_of_leads(leads: Differences, outcomes: Sequence[str]) -> Table:
    """Return a row per condition, reference and outcome: the lead of the condition, at level 1."""
    rows = []
    for name, by_outcome in leads.items():
        for outcome in outcomes:
            lead, cells = by_outcome[outcome], [DASH, DASH]
            if lead.on_corpus:
                cells = [format_interval(lead.on_corpus.interval), format_score(lead.on_corpus.p)]
            rows.append([name, ccc_label(outcome), format_score(lead.mean, signed=True), *cells])
    return Table(
        "Lead over the references",
        ["lead", "outcome", "mean", "95 %, on this corpus", "p"],
        rows,
        "A condition has not shown that it uses the audio unless it beats the floor, nor that its head is worth its "
        "cost unless it beats the linear probe. Not adjusted for the number of rows.",
    )


def _difference_note(named: Differences, primary: str, unit: str, groups: str) -> str:
    some = [by_dimension[primary] for by_dimension in named.values()]
    speakers = next((d.new_speakers for d in some if d.new_speakers), None)
    parts = [f"{ccc_label(primary)} is the primary outcome and decides; the others are secondary (p after Holm)."]
    if any(d.on_corpus for d in some):
        parts.append(
            f"On this corpus: other test {unit}s and another training of the same models, for these sessions and "
            "training sets."
        )
    elif some:
        parts.append(f"On this corpus: no interval, because {some[0].no_corpus_level}.")
    if speakers and groups == "folds":
        parts.append(
            f"For new speakers: corrected t over {speakers.folds} folds, test/train ratio "
            f"{speakers.test_train_ratio:.2f}; wide by construction."
        )
    elif speakers:
        parts.append(
            f"For new speakers: t over {speakers.folds} {groups}, around the mean of the differences within each, and "
            f"the variance of training; test/train ratio {speakers.test_train_ratio:.2f} (0: all have the same models)."
        )
    if len(named) > 1:
        parts.append("Several conditions: intervals and p are adjusted for their number.")
    return " ".join(parts)


def table_of_limits(named: Differences, primary: str, margin: float, unit: str) -> Table:
    """Return what limits the answer on the primary outcome: sources of variance, detectable differences, what helps."""
    other = {"dialogue": "speaker", "speaker": "dialogue"}[unit]
    cells: dict[str, list[str]] = {}
    for column, by_dimension in enumerate(named.values()):
        level, speakers = by_dimension[primary].on_corpus, by_dimension[primary].new_speakers
        found: dict[str, str] = {}
        if level:
            found |= {
                f"sd of the mean: test {unit}s": f"{level.dialogues_sd:.4f}",
                "sd of the mean: training (seeds)": f"{level.training_sd:.4f}",
                "sd of the difference between sessions": format_score(level.sessions_sd),
                "smallest detectable, on this corpus": f"{level.detectable:.4f}",
                "interval ± now, with one more seed": f"{_half(level.interval):.4f}, {level.one_more_seed:.4f}",
                f"interval if the {other} is resampled": format_interval(level.other_unit),
                "chance to find equality if it is true": f"{100 * level.equality_power:.0f} %",
            }
        if speakers:
            half = _half(speakers.interval)
            found |= {
                "smallest detectable, for new speakers": f"{speakers.detectable:.4f}",
                "new speakers ± now, with one more session": f"{half:.4f}, {speakers.one_more_session:.4f}",
                f"new speakers: P(worse), P(within ±{margin:g}), P(better)": (
                    f"{speakers.worse:.2f}, {speakers.equal:.2f}, {speakers.better:.2f}"
                ),
            }
        for title, text in found.items():
            cells.setdefault(title, [DASH] * len(named))[column] = text
    rows = [[title, *values] for title, values in cells.items()]
    note = (
        f"For {ccc_label(primary)}. The {unit} is the resampled unit. Smallest detectable: the true difference that "
        "this design finds with 80 % power. P: Bayesian correlated t over the folds."
    )
    return Table("What limits the answer", ["", *named], rows, note)


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def format_interval(interval: Interval | None) -> str:
    """Return `+0.0102 to +0.0522`; a dash for None."""
    return DASH if interval is None else str(interval)


def table_of_folds(
    title: str,
    scores: Scores,
    differences: Differences,
    folds: Sequence[int],
    seeds: Sequence[int],
    outcomes: list[str],
) -> Table:
    """Return a row per outcome, fold and seed, with scores and differences side by side."""
    rows = []
    for outcome in outcomes:
        for fold in folds:
            for seed in seeds:
                trial = f"fold-{fold}/seed-{seed}"
                plain = [format_score(of[outcome].by_trial[trial]) for of in scores.values()]
                signed = [format_score(of[outcome].by_trial[trial], signed=True) for of in differences.values()]
                rows.append([ccc_label(outcome), str(fold), str(seed), *plain, *signed])
    return Table(title, ["outcome", "fold", "seed", *scores, *differences], rows)
