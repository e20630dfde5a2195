"""Training: the objective, validation figures, and starting, continuing and saving a run."""

from common.training.distributed import SequenceForward
from common.training.engine import EpochSetter, GradientClipper, TrainingRun, prepare_training_batch
from common.training.evaluation import EvaluationRun
from common.training.objective import RegistrationObjective
from common.training.validation import ValidationFigure, better, validation_metrics

__all__ = [
    "EpochSetter",
    "EvaluationRun",
    "GradientClipper",
    "RegistrationObjective",
    "SequenceForward",
    "TrainingRun",
    "ValidationFigure",
    "better",
    "prepare_training_batch",
    "validation_metrics",
]
