"""What a search optimises: scores of tokenizers, or of what a prior over their codes generates."""

from collections.abc import Sequence

from bench.analysis.frames import GENERATION
from bench.analysis.searches import CODED, RATE, by_generation
from bench.core.errors import UserError

DISTORTION = "lpips_vgg"
# Of a prior, but not of the tokenizer below it: what its budget or its machine decides, and bits of a token, of which
# a codebook that collapses needs the fewest. Those of a pixel are those of an image once more.
UNSOUGHT = ("coded_bits_per_token", "coded_bits_per_pixel", "params_prior", "flops_prior", "images_per_second_sample")


def objectives(metrics: Sequence[str], priors: Sequence[str], at: int | None) -> tuple[str, ...]:
    """What a search optimises for which ``metrics`` were given, or none, and ``priors`` to train over its tokenizers;
    ``at``: the bits per image that all have, or None.

    Without a rate that is given, rate is an objective of its own beside scores of generation. Coded bits are a rate and
    stand beside a distortion: alone, they would be fewest where nothing is kept of an image. Raises UserError where
    ``priors`` and ``metrics`` do not fit together.
    """
    names = tuple(dict.fromkeys(priors))
    if len(names) > 1:
        fix = "name one, and give the others searches of their own"
        raise UserError(f"--prior is {', '.join(names)}, and a trial of a search is judged by one prior; {fix}")
    found = tuple(metrics) or ((DISTORTION,) if at else (DISTORTION, RATE))
    if not by_generation(found):
        if names:
            fix = "add --metric gfid_vgg16 or coded_bits_per_image, or leave it out"
            raise UserError(f"--prior {names[0]} would change no {' or '.join(found)}; {fix}")
        return found
    if not names:
        first = next(name for name in found if name in GENERATION)
        raise UserError(f"metric {first!r} is of a prior over the codes; name one, such as --prior transformer")
    if {RATE, CODED} <= {*found}:
        raise UserError(f"--metric has two rates, {RATE} and {CODED}; leave out one of them")
    if {*found} == {CODED}:
        return (DISTORTION, CODED)
    return found if at or {RATE, CODED} & {*found} else (*found, RATE)
