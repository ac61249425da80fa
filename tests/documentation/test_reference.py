"""The generated pages list every key and every command with its meaning."""

from __future__ import annotations

import pytest

from cvrunner.config.reading import load_config
from cvrunner.config.schema import valid_keys
from cvrunner.paths import default_config
from docs.generated.commands_page import command_line, commands_page
from docs.generated.configuration_page import configuration_page, numbers

ROWS = {row.split("`")[1]: row for row in configuration_page().splitlines() if row.startswith("| `")}
SECTIONS = {key.rpartition(".")[0] for key in valid_keys()}


def test_every_key_stands_on_its_page_with_its_meaning() -> None:
    keys = [key for key in valid_keys() if key not in SECTIONS and key != "reference.claims"]
    assert [key for key in keys if key not in ROWS] == []
    assert [key for key, row in ROWS.items() if row.endswith("|  |")] == []


@pytest.mark.parametrize(
    ("override", "counts"),
    [
        ("train.lr=3e-4", "yes"),
        ("train.early_stopping_patience=3", "yes"),
        ("model.mamba.layers=1", "yes"),
        ("cluster.cpus_per_trial=2", "yes"),
        ("cluster.max_concurrent=1", "no"),
        ("tracking.enabled=false", "no"),
        ("results.root=elsewhere", "no"),
        ("verdict.margin=0.05", "no"),
        ("model.encoder=elsewhere", "by content"),
    ],
)
def test_a_key_counts_where_the_page_says_so(override: str, counts: str) -> None:
    before, after = load_config(default_config()), load_config(default_config(), [override])
    assert numbers(override.partition("=")[0]) == counts
    assert (before.numerics != after.numerics) == (counts == "yes")


def test_every_command_stands_on_its_page_with_all_its_options() -> None:
    page = commands_page()
    group, context = command_line()
    for name in group.list_commands(context):
        part = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert f"cvrunner {name}" in part
        for parameter in group.get_command(context, name).params:
            options = parameter.opts if parameter.param_type_name == "option" else []
            assert [option for option in options if option not in part] == [], name


def test_every_exit_code_is_explained() -> None:
    part = commands_page().partition("## Exit codes\n")[2]
    assert {line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")} >= {"1", "2", "143"}
