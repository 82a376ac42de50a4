"""Trainers and what they are made of; needs the extra `train` to run, not to import.

A name is imported when it is asked for: a diagram or an error needs no trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsoft.training.errors import (
        CheckpointError,
        CorpusError,
        MeshError,
        MissingExtraError,
        ModelFileError,
        NonFiniteLossError,
        PredictionError,
        RunDirectoryError,
        SvmlightError,
        TableError,
        TrainingInterrupted,
    )
    from jaxsoft.training.interruption import StopRequest
    from jaxsoft.training.language_model.comparison import (
        ComparisonReport,
        HeadReport,
        compare_heads,
    )
    from jaxsoft.training.language_model.config import LanguageModelConfig, load_config
    from jaxsoft.training.language_model.evaluation import (
        EvaluationReport,
        evaluate_language_model,
    )
    from jaxsoft.training.language_model.loading import (
        Continuation,
        Piece,
        TrainedLanguageModel,
        load_language_model,
    )
    from jaxsoft.training.language_model.report import FinalReport, Sample
    from jaxsoft.training.language_model.trainer import train_language_model
    from jaxsoft.training.mesh import parse_mesh
    from jaxsoft.training.regression.cross_validation import SoftmaxRegressionCV
    from jaxsoft.training.regression.estimator import SoftmaxRegression
    from jaxsoft.training.regression.job import train_regression
    from jaxsoft.training.regression.prediction import PredictionReport, predict_table
    from jaxsoft.training.regression.report import RegressionReport
    from jaxsoft.training.regression.settings import RegressConfig
    from jaxsoft.training.regression.svmlight import (
        load_svmlight_memmap,
        svmlight_to_memmap,
    )
    from jaxsoft.training.reliability import reliability_diagram
    from jaxsoft.training.reporting import Listener
    from jaxsoft.training.running import require_train_extra

__all__ = [
    "CheckpointError",
    "ComparisonReport",
    "Continuation",
    "CorpusError",
    "EvaluationReport",
    "FinalReport",
    "HeadReport",
    "LanguageModelConfig",
    "Listener",
    "MeshError",
    "MissingExtraError",
    "ModelFileError",
    "NonFiniteLossError",
    "Piece",
    "PredictionError",
    "PredictionReport",
    "RegressConfig",
    "RegressionReport",
    "RunDirectoryError",
    "Sample",
    "SoftmaxRegression",
    "SoftmaxRegressionCV",
    "StopRequest",
    "SvmlightError",
    "TableError",
    "TrainedLanguageModel",
    "TrainingInterrupted",
    "compare_heads",
    "evaluate_language_model",
    "load_config",
    "load_language_model",
    "load_svmlight_memmap",
    "parse_mesh",
    "predict_table",
    "reliability_diagram",
    "require_train_extra",
    "svmlight_to_memmap",
    "train_language_model",
    "train_regression",
]

# By module, the names that are imported from it.
_NAMES = {
    "errors": "CheckpointError CorpusError MeshError MissingExtraError "
    "ModelFileError NonFiniteLossError PredictionError RunDirectoryError SvmlightError "
    "TableError TrainingInterrupted",
    "interruption": "StopRequest",
    "language_model.comparison": "ComparisonReport HeadReport compare_heads",
    "language_model.config": "LanguageModelConfig load_config",
    "language_model.evaluation": "EvaluationReport evaluate_language_model",
    "language_model.loading": "Continuation Piece TrainedLanguageModel "
    "load_language_model",
    "language_model.report": "FinalReport Sample",
    "language_model.trainer": "train_language_model",
    "mesh": "parse_mesh",
    "regression.cross_validation": "SoftmaxRegressionCV",
    "regression.estimator": "SoftmaxRegression",
    "regression.job": "train_regression",
    "regression.prediction": "PredictionReport predict_table",
    "regression.report": "RegressionReport",
    "regression.settings": "RegressConfig",
    "regression.svmlight": "load_svmlight_memmap svmlight_to_memmap",
    "reliability": "reliability_diagram",
    "reporting": "Listener",
    "running": "require_train_extra",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("SoftmaxRegression", "SoftmaxRegressionCV"):
        # Its class is scikit-learn's: without the extra it cannot even be made.
        from jaxsoft.training.running import require_train_extra

        require_train_extra()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
