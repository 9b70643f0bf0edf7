"""Is a set of hypotheses good, diverse and specialised, and how sure is that? Functions of texts, labels and arrays.

`pip install 'peft-mcl[evaluation]'` installs what they need; without it, the package imports, and the functions that need a missing
library say so.
"""

from trainer_ext.evaluation.diversity import corpus_diversity, diversity, semantic_diversity
from trainer_ext.evaluation.intervals import Interval, bootstrap, bootstrap_difference
from trainer_ext.evaluation.quality import (
    QUALITY_METRICS,
    best_mean_worst,
    corpus_quality,
    coverage,
    leave_one_out_bleu,
    quality,
)
from trainer_ext.evaluation.specialisation import (
    Sample,
    agreement,
    assignment_entropy,
    characteristic_words,
    samples_won,
    stability,
)


__all__ = [
    "QUALITY_METRICS",
    "best_mean_worst",
    "corpus_quality",
    "coverage",
    "leave_one_out_bleu",
    "quality",
    "corpus_diversity",
    "diversity",
    "semantic_diversity",
    "Sample",
    "agreement",
    "assignment_entropy",
    "characteristic_words",
    "samples_won",
    "stability",
    "Interval",
    "bootstrap",
    "bootstrap_difference",
]
