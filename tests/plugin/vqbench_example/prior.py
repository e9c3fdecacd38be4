"""A prior."""

from functools import partial

from bench.priors.models.sequence import RecurrentLayer, SequencePrior

small = partial(SequencePrior, RecurrentLayer)
