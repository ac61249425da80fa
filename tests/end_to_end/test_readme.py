"""Every example in the README runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cvrunner.data.demo import write_demo_corpus
from tests.end_to_end.programs import REPOSITORY, cvrunner
from tests.tiny_encoders import save_encoder

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(600)]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = README.split("```")[1::2]
    return [text.partition("\n")[2] for text in fences if text.partition("\n")[0] == language]


def commands(start: str) -> list[str]:
    return [line for block in blocks("") for line in block.splitlines() if line.startswith(start)]


@pytest.mark.suites("ci", "all")
def test_the_commands_for_iemocap_run_on_a_tree_in_its_layout(tmp_path: Path) -> None:
    """A small corpus, encoder and number of epochs replace the real ones."""
    write_demo_corpus(tmp_path / "IEMOCAP", utterances=60)
    encoder = save_encoder(tmp_path / "wavlm")
    shown = [line for line in commands("python -m cvrunner") if "/data/IEMOCAP" in line]
    assert [shlex.split(line)[3] for line in shown] == ["audit", "all-folds"]
    small = [f"model.encoder={encoder}", "train.epochs=1", "cluster.cpus_per_trial=1", "tracking.enabled=false"]
    small += [f"cluster.cache_dir={tmp_path / 'cache'}", "model.width=16", "model.mamba.head_dim=8"]
    for line in shown:
        words = shlex.split(line.replace("/data/IEMOCAP_full_release", str(tmp_path / "IEMOCAP")))[3:]
        words = [str(REPOSITORY / word) if word.startswith("configs/") else word for word in words]
        finished = cvrunner(*words, *[part for key in small for part in ("--set", key)], folder=tmp_path)
        assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_command_for_a_safetensors_folder_works(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "pickled")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    (shown,) = commands("python -m cvrunner encoder")
    finished = cvrunner(*shlex.split(shown.replace("microsoft/wavlm-large", str(source)))[3:], folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "wavlm-large" / "model.safetensors").is_file()
    assert (tmp_path / "wavlm-large" / "preprocessor_config.json").is_file()


def test_the_commands_for_a_cluster_are_those_that_the_job_test_submits() -> None:
    (submit,) = commands("python -m cvrunner submit")
    words = shlex.split(submit)
    assert words[words.index("--") + 1 :] == ["all-folds", "--config", "configs/finetune.yaml"]


def test_the_table_of_commands_names_every_command() -> None:
    listed = cvrunner("--help", folder=REPOSITORY).stdout
    names = re.findall(r"^  ([a-z-]+)  ", listed[listed.index("Commands:") :], flags=re.MULTILINE)
    assert len(names) >= 5
    assert [name for name in names if f"`{name}" not in README] == []
