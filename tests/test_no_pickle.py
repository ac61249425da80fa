"""Data is never executed: the program calls nothing that runs code from a file.

It reads no pickle, except tensors in the process that `cvrunner encoder --trust-pickle` starts.
"""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest
import torch

from cvrunner import cli
from cvrunner.encoders.files import find_encoder
from cvrunner.encoders.loading import load_backbone
from tests.bad_input import add_pickle
from tests.tiny_encoders import save_encoder


def test_a_malicious_pickle_next_to_good_weights_is_never_opened(tmp_path: Path) -> None:
    plain, infected = (save_encoder(tmp_path / name) for name in ("plain", "infected"))
    add_pickle(infected)
    loaded, expected = (load_backbone(find_encoder(str(folder))).state_dict() for folder in (infected, plain))
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    assert find_encoder(str(infected)).digest == find_encoder(str(plain)).digest
    assert not list(tmp_path.rglob("owned"))


def test_the_malicious_pickle_would_do_harm_if_it_were_loaded(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    add_pickle(tmp_path / "wavlm")
    pickle.loads((tmp_path / "wavlm" / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "owned").is_dir()


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip
PROGRAM = sorted(Path(cli.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(PROGRAM[0].parent)))
def test_the_program_has_nothing_that_runs_data(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not {str(name).partition(".")[0] for name in names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            trusted = path.name == "unpickle.py" and keywords.get("weights_only") == "True"
            assert name not in FORBIDDEN_CALLS - ({"torch.load"} if trusted else set())
            assert keywords.get("allow_pickle", "False") == "False"
            assert keywords.get("trust_remote_code", "False") == "False"
            assert name != "yaml.load" or "_Loader" in ast.unparse(node), "yaml.load without the safe loader"
            assert not name.endswith("from_pretrained") or keywords.get("use_safetensors") == "True"
