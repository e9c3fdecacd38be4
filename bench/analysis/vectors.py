"""Charts as SVG: words that show over a point or a line, and colours that follow those of the page."""

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from matplotlib.artist import Artist

SVG = "http://www.w3.org/2000/svg"
TOLD, NEXT = "told:", "¶"  # begins the id of what has words, which follow it, and stands between them
GREY = re.compile(r"#([0-9a-f]{2})\1\1\b")
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def tell(artist: Artist, words: Sequence[str]) -> None:
    """Has ``artist`` show ``words`` under the pointer, one for each of its points, or one for it as a whole."""
    artist.set_gid(TOLD + NEXT.join(words))


def with_words(svg: bytes) -> str:
    """What matplotlib wrote as SVG, with what artists ``tell`` as titles, which browsers show under the pointer.

    Words of an artist whose points are not all there, as where many are drawn as one image, are left out.
    """
    root = ElementTree.fromstring(svg)
    for group in root.iter(f"{{{SVG}}}g"):
        if not (name := group.get("id", "")).startswith(TOLD):
            continue
        del group.attrib["id"]
        words, defined = name.removeprefix(TOLD).split(NEXT), set(group.findall(f".//{{{SVG}}}defs//"))
        marks = [[each for each in group.iter(f"{{{SVG}}}{tag}") if each not in defined] for tag in ("use", "path")]
        told = [group] if len(words) == 1 else marks[0] or marks[1]
        for element, word in zip(told, words, strict=False) if len(told) == len(words) else ():
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = word
            element.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def embedded(svg: str) -> str:
    """An SVG of ``with_words`` as part of a page: without ids that nothing refers to, and with greys between the page's
    ``--ink`` and ``--paper`` in place of those between black and white."""
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :]).replace("xlink:href", "href")
    referred = {*re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)}
    kept = {name for pair in referred for name in pair}
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in kept else "", svg)
    return GREY.sub(lambda found: f"color-mix(in srgb, var(--paper) {int(found[1], 16) / 2.55:.0f}%, var(--ink))", svg)
