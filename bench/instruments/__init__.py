"""Instruments: what a trained tokenizer does besides reconstructing, measured from its weights at any time.

To add one: write a file with an ``Instrument`` and add a line to ``INSTRUMENTS``.

============  ======================================================================================================
robustness    what wrong codes cost, as a prior will make them
equivariance  whether codes and errors move along when the image is shifted, mirrored or enlarged
atlas         every code by itself beside the patches that chose it
probes        what codes tell of labels: linear and nearest-neighbour probes, purity, mutual information
sizes         images 1.5 and 2 times as large as those of training
============  ======================================================================================================

They change nothing about a run: their readings have a file of their own in its folder, instruments.json, and a picture
each where they have one.
"""

from collections.abc import Sequence

from bench.core.errors import UserError
from bench.core.runs import Run
from bench.metrics import Metric

from .atlas import ATLAS
from .equivariance import EQUIVARIANCE
from .instrument import Instrument, Reading, Subject
from .probes import PROBES
from .robustness import ROBUSTNESS
from .sizes import SIZES

INSTRUMENTS: dict[str, Instrument] = {
    "robustness": ROBUSTNESS,
    "equivariance": EQUIVARIANCE,
    "atlas": ATLAS,
    "probes": PROBES,
    "sizes": SIZES,
}
METRICS: dict[str, Metric] = {name: metric for each in INSTRUMENTS.values() for name, metric in each.metrics.items()}
SHOWN: tuple[str, ...] = tuple(name for each in INSTRUMENTS.values() for name in each.shown)

CHEAP = 5  # seconds, of each of the default ones
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(INSTRUMENTS),
    "cheap": tuple(name for name, each in INSTRUMENTS.items() if each.seconds <= CHEAP),
    "none": (),
}


def choose(words: Sequence[str]) -> dict[str, bool]:
    """The instruments that ``words``, names and GROUPS, mean, in the order of INSTRUMENTS: name → whether it was asked
    for by that name, and so may not be left out. UserError on any other word."""
    known = {name: (name,) for name in INSTRUMENTS} | GROUPS
    for word in words:
        if word not in known:
            raise UserError(
                f"unknown instrument {word!r}; choose from {', '.join(INSTRUMENTS)}, or {', '.join(GROUPS)}"
            )
    meant = {name for word in words for name in known[word]}
    return {name: name in words for name in INSTRUMENTS if name in meant}


def readings(run: Run) -> dict[str, float]:
    """Metrics of the instruments that have looked at ``run``, in their present version. Raises Damaged."""
    found = run.instruments()
    return {
        name: found[instrument]["metrics"][name]
        for instrument, each in INSTRUMENTS.items()
        if found.get(instrument, {}).get("version") == each.version
        for name in each.metrics
        if name in found[instrument]["metrics"]
    }
