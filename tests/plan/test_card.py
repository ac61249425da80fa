"""Estimates for a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cvrunner.errors import MemoryLimitError, UsageError
from cvrunner.orchestration.resources import Resources
from cvrunner.plan.cards import CARDS, EFFICIENCY, LAUNCH_S, find_card
from cvrunner.plan.command import WIDTH, plan_text
from cvrunner.plan.counting import META, Calls, estimate
from cvrunner.run.estimate import forecast
from cvrunner.training.probe import Counted
from tests.trials import pick, tiny_corpus, tiny_trials

RTX_4090, H100 = CARDS


@pytest.mark.parametrize("name", ["RTX 4090", "4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_found_by_any_of_its_names(name: str) -> None:
    assert find_card(name) is RTX_4090


def test_an_unknown_card_is_answered_with_the_known_ones_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="RTX 4090 and H100 SXM only"):
        find_card("4080")
    with pytest.raises(UsageError, match="H100 SXM and RTX 4090 only"):
        find_card("H100 PCIe")


def test_an_update_takes_what_is_longer_its_launches_or_its_work() -> None:
    work = Counted(launches=1, bfloat16=165.2e12, float32=82.6e12, moved_bytes=int(1.008e12), peak_bytes=0)
    assert RTX_4090.seconds(work) == pytest.approx(2 / EFFICIENCY + 1)
    assert RTX_4090.seconds(replace(work, launches=2_000_000)) == pytest.approx(2_000_000 * LAUNCH_S)


def test_calls_count_operations_bytes_and_the_memory_that_is_held_at_a_time() -> None:
    a, b = torch.empty(10, 20, device=META), torch.empty(20, 30, device=META)
    with Calls() as calls:
        for _ in range(3):
            product = (a @ b).T
            del product
    assert calls.total == Counted(3, 0.0, 3 * 2 * 10 * 20 * 30, 3 * 4 * (200 + 600 + 300), peak_bytes=4 * 300)
    with Calls() as calls:
        kept = [a.bfloat16() @ b.bfloat16() for _ in range(2)]
    # Two results, and the casts of the second product.
    assert calls.peak_bytes == 2 * (len(kept) * 300 + 200 + 600)
    assert calls.counts == {"cast": 4, "mm": 2}
    assert (calls.total.bfloat16, calls.total.float32) == (2 * 2 * 10 * 20 * 30, 0)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"unfreeze_top_layers": 1}},
        {"model": {"lora": {"rank": 2}}},
        {"model": {"protocol": "dialogue", "spec_augment": True}},
        {"train": {"gradient_checkpointing": True, "accumulation": "averaged"}},
    ],
)
def test_every_condition_can_be_estimated_without_audio(tmp_path: Path, sections: dict[str, Any]) -> None:
    trials = tiny_trials(tmp_path, **sections)
    frozen, unfrozen = (estimate(pick(trials, c), RTX_4090, tmp_path / "empty") for c in ("frozen", "unfrozen"))
    assert not (tmp_path / "empty").exists()
    assert frozen.estimate is not None
    assert unfrozen.estimate is not None
    assert frozen.estimate.longest.launches < unfrozen.estimate.longest.launches
    assert frozen.estimate.longest.bfloat16 == 0 < unfrozen.estimate.longest.bfloat16
    assert 0 < frozen.peak_memory_mib < unfrozen.peak_memory_mib
    assert frozen.trained_bytes < unfrozen.trained_bytes
    assert unfrozen.typical.step_s <= unfrozen.longest.step_s
    assert {one.kind for one in frozen.features} == {"conv", "hidden"}
    assert all(one.size > 0 for one in frozen.features)


def test_a_batch_that_does_not_fit_is_halved_or_refused(tmp_path: Path) -> None:
    trial = pick(tiny_trials(tmp_path), "unfrozen")
    roomy = estimate(trial, RTX_4090, tmp_path / "empty")
    assert (roomy.batch_size, roomy.fits) == (2, 4)
    assert list(roomy.larger_mib) == [4]
    # 0.9 of its memory, less than what two utterances take.
    small = estimate(trial, replace(RTX_4090, memory_bytes=roomy.peak_memory_mib * 2**20), tmp_path / "empty")
    assert (small.batch_size, small.fits) == (1, 1)
    assert small.peak_memory_mib < 0.9 * roomy.peak_memory_mib
    with pytest.raises(MemoryLimitError, match="by this estimate a RTX 4090 has too little memory"):
        estimate(trial, replace(RTX_4090, memory_bytes=2**16), tmp_path / "empty")


def test_what_is_printed_says_that_it_is_an_estimate_and_what_it_assumes(tmp_path: Path) -> None:
    trials = tiny_trials(tmp_path)
    probes = [estimate(pick(trials, c), H100, tmp_path / "empty") for c in ("frozen", "unfrozen")]
    found = forecast(trials, tiny_corpus(tmp_path).utterances, probes, [Resources("a node", 1, 8, 8)])
    lines = plan_text(found).splitlines()
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= WIDTH
    assert lines[-1].startswith("An estimate, never measured: all-folds would take about ")
    assert "Measured" not in text
    assert f"Estimate for H100 SXM in bfloat16, never measured; it assumes {H100.assumptions}." in text
    assert "Estimate per condition" in text
    assert "The run, by this estimate" in text
    assert "By this estimate, on 8 GPUs: 1 seed" in text
    assert "unfrozen, counted for the estimate: the typical update" in text
