"""What `plan` prints, from made-up probes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvrunner.orchestration.resources import Resources
from cvrunner.plan.command import BAR, WIDTH, bar_of, plan_text
from cvrunner.run.estimate import Forecast, Job, assign, forecast
from cvrunner.training.probe import ConditionProbe
from tests.probes import made_up
from tests.run.test_estimate import CLAIMS, NODE
from tests.trials import tiny_corpus, tiny_trials

FOUR = Resources("4 nodes", nodes=4, gpus=32, slots=32)


def planned(folder: Path, *probes: ConditionProbe, stated: bool = True) -> Forecast:
    reference = {"source": "a record of 2026", "claims": CLAIMS} if stated else {}
    probes = probes or (made_up("frozen"), made_up("unfrozen"))
    return forecast(tiny_trials(folder, reference=reference), tiny_corpus(folder).utterances, probes, [NODE, FOUR])


def test_it_fits_on_one_screen_and_ends_with_the_answer(tmp_path: Path) -> None:
    lines = plan_text(planned(tmp_path)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= 50
    assert lines[-1].startswith("all-folds would take about ")
    assert lines[-1].endswith(" on 8 GPUs")


def test_without_a_gpu_it_says_that_memory_is_host_memory(tmp_path: Path) -> None:
    text = plan_text(planned(tmp_path))
    assert "Memory is host memory" in text.replace("\n", " ")
    assert "no limit" in text
    gpu = [made_up(c, memory="GPU", device="NVIDIA GeForce RTX 4090", fits=4) for c in ("frozen", "unfrozen")]
    text = plan_text(planned(tmp_path, *gpu))
    assert "host" not in text
    assert "no limit" not in text
    assert "RTX 4090" in text


def test_what_others_stated_is_marked_as_theirs(tmp_path: Path) -> None:
    text = " ".join(plan_text(planned(tmp_path)).split())
    assert "5.2 GB" in text
    assert "Stated by others, not measured here; unfrozen, batch 8 x 1: 20.6 GB. Source: a record of 2026." in text
    assert "tated" not in plan_text(planned(tmp_path, stated=False))


def test_it_says_what_does_not_fit_and_what_more_takes(tmp_path: Path) -> None:
    small = made_up("unfrozen", memory="GPU", configured=4, batch_size=2, fits=2)
    roomy = made_up("frozen", memory="GPU", fits=8, larger_mib={8: 20_000.0})
    text = " ".join(plan_text(planned(tmp_path, roomy, small)).split())
    assert "unfrozen: train.batch_size 4 does not fit the longest batch; measured with 2" in text
    assert "frozen: 21 GB at batch_size 8" in text


def test_it_says_what_the_mamba_kernels_are_worth(tmp_path: Path) -> None:
    text = " ".join(plan_text(planned(tmp_path, made_up("frozen", plain_mamba_s=1.25), made_up())).split())
    assert "frozen: the typical update takes 1 s with the Mamba kernels, 1.25 s in plain PyTorch." in text
    assert text.count("Mamba kernels") == 1


def test_gpus_that_do_the_same_share_a_bar(tmp_path: Path) -> None:
    lines = plan_text(planned(tmp_path)).splitlines()
    assert sum(line.endswith("idle") for line in lines) == 2
    assert any(line.startswith("   26 x ") for line in lines)
    assert any(line.startswith("    3 x U") for line in lines)


@pytest.mark.parametrize(
    ("durations", "bar"),
    [([4.0], "U" + "=" * 63), ([1.0, 1.0], "U" + "=" * 15 + "U" + "=" * 15 + "." * 32), ([3.999, 0.001], None)],
)
def test_a_bar_is_as_long_as_the_run(durations: list[float], bar: str | None) -> None:
    table = assign([Job(str(i), "unfrozen", 1.0, d) for i, d in enumerate(durations)], 1)
    drawn = bar_of(table.assignments, 4.0, {"unfrozen": "U"})
    assert len(drawn) == BAR
    assert drawn == bar or bar is None
