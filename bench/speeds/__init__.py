"""Our hot paths, held against what others have for the same work and against what bounds them."""

from collections.abc import Callable, Iterator

from .commands import starts, studies
from .contest import Contest, compete, met
from .growth import GROWTH, grow
from .layers import look_ups, mambas, quantizers
from .pipeline import decodings, samplings, scoring, steps
from .report import GROWTH_FILE, SPEED_FILE, keep, line, machine, publish

# Each gives its contests on a device, one at a time.
PATHS: dict[str, Callable[[str], Iterator[Contest]]] = {
    "quantizer": quantizers,
    "look-up": look_ups,
    "mamba": mambas,
    "step": steps,
    "scoring": scoring,
    "decoding": decodings,
    "sampling": samplings,
    "start": starts,
    "study": studies,
}
