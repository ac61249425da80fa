"""Kernels are used on a GPU alone, and only if both packages that they need are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What the packages export; each function says that it was called. mamba-ssm's calls causal-conv1d's.
MAMBA = """
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None
def selective_state_update(x): return "kernel"
def mamba_split_conv1d_scan_combined(zxbcdt, *args, **kwargs): return causal_conv1d_fn(zxbcdt)
def mamba_chunk_scan_combined(x, *args, **kwargs): return causal_conv1d_fn(x)
"""
CAUSAL = "def causal_conv1d_fn(x, *args, **kwargs): return 'kernel'\ndef causal_conv1d_update(x): return 'kernel'\n"
PROGRAM = """
import sys, torch
from types import SimpleNamespace
from transformers.models.mamba2 import modeling_mamba2
from cvrunner.config.sections import MambaConfig
from cvrunner.encoders.packing import Packing
from cvrunner.model.mamba import KERNELS, LONGEST, MambaBlock
block = MambaBlock(16, MambaConfig(state_size=4, head_dim=8, chunk_size=32))
lengths = (LONGEST + 1, 5)
block(torch.randn(sum(lengths), 16), Packing(lengths, torch.device("cpu"))).sum().backward()
with torch.no_grad():
    block.eval()(torch.randn(sum(lengths), 16), Packing(lengths, torch.device("cpu")))
print(KERNELS)
if KERNELS:
    on_gpu = SimpleNamespace(is_cuda=True)
    names = ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")
    print(*(getattr(modeling_mamba2, name)(on_gpu) for name in names))
"""


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        ({"mamba_ssm": MAMBA}, ["False"]),
        ({"mamba_ssm": MAMBA, "causal_conv1d": "raise ImportError('undefined symbol')"}, ["False"]),
        ({"mamba_ssm": MAMBA, "causal_conv1d": CAUSAL}, ["True", "kernel", "kernel", "kernel"]),
    ],
    ids=["mamba-ssm alone", "a broken causal-conv1d", "both"],
)
def test_long_sequences_run_on_a_cpu_whatever_is_installed(
    tmp_path: Path, packages: dict[str, str], expected: list[str]
) -> None:
    for name, source in packages.items():
        (tmp_path / f"{name}.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected
