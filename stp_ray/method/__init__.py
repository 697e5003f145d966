"""The mathematics of STP: objectives, samplers, calibration, exploration and the loop."""

from .calibrate import calibrate
from .explore import Candidate, Exploration, Explorer, Scored
from .objective import (
    DenseObjective,
    Expansion,
    ExpansionObjective,
    Stimulation,
    StimulativeObjective,
    alpha_divergence,
    cross_entropy,
    kl_divergence,
)
from .sampling import ladder, sampler
from .scoring import reference_logits, score, tuned_score
from .sparsity import relative_sparsity
from .teacher import Teacher
from .training import Optimisation, Progress, Trainer, evaluate, learning_rate

__all__ = [
    "Candidate",
    "DenseObjective",
    "Expansion",
    "ExpansionObjective",
    "Exploration",
    "Explorer",
    "Optimisation",
    "Progress",
    "Scored",
    "Stimulation",
    "StimulativeObjective",
    "Teacher",
    "Trainer",
    "alpha_divergence",
    "calibrate",
    "cross_entropy",
    "evaluate",
    "kl_divergence",
    "ladder",
    "learning_rate",
    "reference_logits",
    "relative_sparsity",
    "sampler",
    "score",
    "tuned_score",
]
