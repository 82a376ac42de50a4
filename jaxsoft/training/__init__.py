"""Trainers and what they are made of; needs the extra `train` to run, not to import."""

from typing import TYPE_CHECKING, Any

from jaxsoft.training.checkpoints import CheckpointError
from jaxsoft.training.interruption import StopRequest, TrainingInterrupted
from jaxsoft.training.language_model.comparison import (
    ComparisonReport,
    HeadReport,
    compare_heads,
)
from jaxsoft.training.language_model.config import LanguageModelConfig, load_config
from jaxsoft.training.language_model.corpus import CorpusError
from jaxsoft.training.language_model.trainer import (
    MissingExtraError,
    NonFiniteLossError,
    require_train_extra,
    train_language_model,
)
from jaxsoft.training.mesh import MeshError, parse_mesh
from jaxsoft.training.regression.job import train_regression
from jaxsoft.training.regression.prediction import (
    PredictionError,
    PredictionReport,
    predict_table,
)
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.regression.saving import ModelFileError
from jaxsoft.training.regression.settings import RegressConfig
from jaxsoft.training.regression.svmlight import (
    SvmlightError,
    load_svmlight_memmap,
    svmlight_to_memmap,
)
from jaxsoft.training.regression.tables import TableError
from jaxsoft.training.reliability import reliability_diagram
from jaxsoft.training.reporting import FinalReport, Listener, Sample
from jaxsoft.training.run_directory import RunDirectoryError

if TYPE_CHECKING:
    from jaxsoft.training.regression.estimator import SoftmaxRegression

__all__ = [
    "CheckpointError",
    "ComparisonReport",
    "CorpusError",
    "FinalReport",
    "HeadReport",
    "LanguageModelConfig",
    "Listener",
    "MeshError",
    "MissingExtraError",
    "ModelFileError",
    "NonFiniteLossError",
    "PredictionError",
    "PredictionReport",
    "RegressConfig",
    "RegressionReport",
    "RunDirectoryError",
    "Sample",
    "SoftmaxRegression",
    "StopRequest",
    "SvmlightError",
    "TableError",
    "TrainingInterrupted",
    "compare_heads",
    "load_config",
    "load_svmlight_memmap",
    "parse_mesh",
    "predict_table",
    "reliability_diagram",
    "require_train_extra",
    "svmlight_to_memmap",
    "train_language_model",
    "train_regression",
]


def __getattr__(name: str) -> Any:
    """Imports `SoftmaxRegression`, which needs scikit-learn, when it is asked for."""
    if name != "SoftmaxRegression":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_train_extra()
    from jaxsoft.training.regression.estimator import SoftmaxRegression

    return SoftmaxRegression
