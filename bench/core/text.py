"""Text that comes from anybody, and what of it may be shown or written."""

import re
from functools import lru_cache

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # and not tab and line feed


def printable(text: str) -> str:
    """``text`` with a replacement character for each that would steer a terminal, or turn the direction of writing."""
    return STEERING.sub("\ufffd", text)


@lru_cache(4096)
def is_text(name: str) -> bool:
    """Whether ``name`` can be written into a file and read again: it steers nothing, and all of it is characters."""
    return name == printable(name) and name == name.encode(errors="replace").decode()
