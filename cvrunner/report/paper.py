"""paper/: what a run gives a paper: methods paragraph, tables in Markdown and LaTeX, figures as PDF, BibTeX."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cvrunner.files import write_atomically
from cvrunner.records.results import ccc_label
from cvrunner.report.panels import style
from cvrunner.report.report import Report
from cvrunner.report.tables import BY_CONDITION, comparison_tables
from cvrunner.text import Table, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = (BY_CONDITION, "Paired differences", "What each step buys", "Lead over the references")
SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}
REFERENCES = Path(__file__).with_name("references.bib")
"""Every work that the methods paragraph may cite; only those cited are written."""


def write_paper(report: Report, figures: dict[str, tuple[Figure, str]]) -> None:
    """Write the folder; nothing while trials are missing, because a paper has no use for part of a comparison."""
    if report.summary.missing:
        return
    folder, text = report.directory.path / "paper", methods(report)
    tables = [table for table in comparison_tables(report.run, report.summary) if table.title in TABLES]
    markdown = "\n\n".join(table.as_markdown() for table in tables)
    write_atomically(folder / "methods.md", f"{text}\n")
    write_atomically(folder / "methods.tex", f"{as_latex(text)}\n")
    write_atomically(folder / "tables.md", f"{markdown}\n")
    write_atomically(folder / "tables.tex", "\n\n".join(map(latex_table, tables)) + "\n")
    write_atomically(folder / "references.bib", cited_references(text))
    for name, (figure, _) in figures.items():
        file = io.BytesIO()
        with style():
            # Without a date, the same run gives the same file.
            figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
        write_atomically(folder / f"{name}.pdf", file.getvalue())


def methods(report: Report) -> str:
    """Return the methods paragraph and the result in Markdown, with citations such as [@lin1989]."""
    run, config, summary = report.run, report.config, report.summary
    results = list(report.results.values())
    encoders = ", ".join(sorted({f"{r.encoder} (weights SHA-256 {r.encoder_digest[:12]})" for r in results}))
    iemocap = " [@busso2008]" if config.corpus.format == "iemocap" else ""
    synthetic = " The corpus is synthetic." if run.synthetic else ""
    others = list(summary.differences)
    conditions = "; ".join(_condition(report, condition) for condition in run.conditions)
    scheme = "the training, validation and test part of the manifest"
    if config.folds.scheme == "leave_one_session_out":
        scheme = "leave one session out; the next session served for validation"
    low, high = config.corpus.scale
    data = (
        f"We used {run.corpus}{iemocap}.{synthetic} The rating scale is {low:g} to {high:g}. There were "
        f"{plural(len(run.folds), 'fold')} ({scheme}) and {plural(len(run.seeds), 'seed')}; the conditions of a fold "
        "shared split, data order and random draws."
    )
    path = ""
    if config.model.linear_path:
        path = (
            "Their output is averaged with that of a ridge regression on mean and standard deviation over time of "
            "every hidden state, fitted before the first epoch and then fixed. "
        )
    model = (
        f"The encoder was {encoders}; its convolutional front-end was frozen. The head mixes the hidden states with "
        f"weights per dimension and reads them with {plural(config.model.mamba.layers, 'Mamba-2 block')} [@dao2024]. "
        f"{path}The loss was one minus the mean concordance correlation coefficient (CCC) [@lin1989] of the effective "
        f"batch of {config.train.effective_batch} utterances, computed exactly over its micro-batches [@gao2021]. "
        f"Conditions: {conditions}. The epoch with the best validation CCC-Avg was tested once."
    )
    statistics = _statistics(report, others) if others else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results[0].versions.items()))
    origin = (
        f"Versions: cvrunner {run.cvrunner_version}, {versions}. Digests: split {run.split_digest[:12]}, corpus "
        f"{run.corpus_digest[:12]}."
    )
    return "\n\n".join(part for part in (data, model, statistics, origin, f"Result: {summary.verdict}") if part)


def _condition(report: Report, condition: str) -> str:
    chosen = report.config.for_condition(condition)
    adaptation, train = chosen.adaptation, chosen.train
    kind = "encoder frozen"
    if adaptation.trains_encoder:
        kind = f"encoder adapted ({adaptation.method.replace('_', ' ')}, learning rate {train.encoder_lr:g})"
    if adaptation.lora is not None:
        kind = f"encoder adapted (LoRA [@hu2021] of rank {adaptation.lora.rank}, learning rate {train.lora_lr:g})"
    return f"{condition}: {kind}, head learning rate {train.lr:g}, at most {train.epochs} epochs"


def _statistics(report: Report, others: list[str]) -> str:
    summary = report.summary
    several = ""
    if len(others) > 1:
        several = " Intervals are simultaneous over the conditions [@dunnett1955]."
    return (
        f"The primary outcome was {ccc_label(summary.primary)}, with a margin of practical equality of "
        f"{summary.margin:g} [@schuirmann1987]; p values of secondary outcomes were adjusted [@holm1979]. Level 1, on "
        "this corpus: the variance of the mean difference is that of a paired bootstrap of whole "
        f"{summary.cluster}s within sessions [@rao1988] plus that of training, estimated over the seeds of each fold, "
        f"with Satterthwaite's degrees of freedom [@satterthwaite1946].{several} Level 2, for new speakers: the "
        "corrected resampled t over folds [@nadeau2003] and its Bayesian counterpart [@benavoli2017]."
    )


def as_latex(text: str) -> str:
    r"""Return text as LaTeX: special characters escaped, `[@key]` as `\cite{key}`."""
    parts = re.split(r"\[@(\w+)\]", text)
    return "".join(f"\\cite{{{part}}}" if i % 2 else escape(part) for i, part in enumerate(parts))


def escape(text: str) -> str:
    """Return text in which no character has a meaning for LaTeX."""
    return "".join(SPECIAL.get(character, character) for character in text)


def latex_table(table: Table) -> str:
    """Return a table environment in the style of booktabs, with its note as part of the caption."""
    alignment = "".join("r" if table.is_numeric(i) else "l" for i in range(len(table.columns)))
    rows = [" & ".join(map(escape, cells)) + r" \\" for cells in (table.columns, *table.rows)]
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape(table.title)}. {escape(table.note)}}}"]
    lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", r"\end{table}"])


def cited_references(text: str) -> str:
    """Return the BibTeX entries of the works that a text cites, in the order of their first citation."""
    entries = {re.findall(r"@\w+{(\w+),", entry)[0]: entry for entry in REFERENCES.read_text().strip().split("\n\n")}
    return "\n\n".join(entries[key] for key in dict.fromkeys(re.findall(r"@(\w+)\]", text))) + "\n"
