"""Evaluation: protocols (``Protocol``, ``make_split``), ranking (``Evaluator``, ``EvaluationSums``), central baselines.

Metrics are computed per user where the scores are and leave as sums; definitions are in ``metrics``.
"""

from fedrec.evaluation.baselines import evaluate_ease, evaluate_popularity, popularity_scores
from fedrec.evaluation.protocols import Protocol, make_split
from fedrec.evaluation.ranking import Evaluator
from fedrec.evaluation.sums import EvaluationSums

__all__ = [
    "EvaluationSums",
    "Evaluator",
    "Protocol",
    "evaluate_ease",
    "evaluate_popularity",
    "make_split",
    "popularity_scores",
]
