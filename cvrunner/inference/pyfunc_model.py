"""The MLflow model that `cvrunner export` writes: MLflow runs this file to load the model (models from code).

Input: a column `path`, audio files on the machine where it runs. Output: per row `<dimension>` and
`<dimension>_sd` on the rating scale. With `protocol: dialogue` the rows are the turns of one dialogue, in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from cvrunner.errors import UsageError
from cvrunner.inference.ensemble import file_table, load_groups, predict_files
from cvrunner.records.model_folder import ModelFolder
from cvrunner.training.device import default_device


class EmotionEnsemble(PythonModel):
    """All models of one condition, held in memory; the encoder's files are exported with them."""

    def load_context(self, context: Any) -> None:
        ensemble = Path(context.artifacts["ensemble"])
        models = [ModelFolder(path) for path in sorted((ensemble / "models").iterdir())]
        self.groups = list(load_groups(models, default_device(), str(ensemble / "encoder")))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Raises UsageError naming every file that cannot be read."""
        found = predict_files([Path(path) for path in model_input["path"]], self.groups)
        if found.problems:
            raise UsageError("; ".join(f"{path}: {problem}" for path, problem in found.problems.items()))
        columns = [name for d in found.dimensions for name in (d, f"{d}_sd")]
        table: pd.DataFrame = file_table(found)[columns].astype(float)
        return table


set_model(EmotionEnsemble())
