"""Tokenizers that were trained elsewhere, image formats and folders of reconstructions, scored as our own runs are."""

from .adapters import ABOUT, ADAPTERS, Place, invited
from .config import GuestConfig
from .guest import Guest
from .pairs import pairs
from .trial import score_guest
