"""Fonts for the names of classes and images, which people write in the letters of their language."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Pillow's own font has the letters of English alone. These are looked for in the folders of the system's fonts: those
# of Linux distributions, then of macOS and Windows; the first have the letters of Europe, the others those of Asia too.
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "msyh.ttc", "msgothic.ttc", "malgun.ttf"),
)
_NO_CHARACTER = "\uffff"  # Unicode has none there: every font draws it as it draws what it lacks
_MISSING = "?"


def font_and_texts(texts: Sequence[str], size: int) -> tuple[Font, list[str]]:
    """Return a font for some texts, and the texts as it can draw them, each in one line.

    That is Pillow's own font where it has all their characters, and else the font of the system that lacks fewest. A
    letter with an accent that it lacks is drawn without, any other character that it lacks as a question mark.

    Args:
        texts: the texts; line breaks and tabs in them become spaces.
        size: of the font, in pixels.

    Examples:
        >>> from ccgpu.models.fonts import font_and_texts
        >>> font, texts = font_and_texts(["road", "side\\twalk"], 12)
        >>> texts, font.getlength("road") > 0
        (['road', 'side walk'], True)
    """
    lines = [" ".join(text.split()) for text in texts]
    characters = sorted({character for line in lines for character in line} - {" "})
    best: Font = ImageFont.load_default(size)
    missing = _lacks(best, characters)
    for name in SYSTEM_FONTS if missing else ():
        font = _system_font(name, size)
        lacks = missing if font is None else _lacks(font, characters)
        if font is not None and len(lacks) < len(missing):
            best, missing = font, lacks
        if not missing:
            break
    instead = {character: _without_accent(best, character) for character in missing}
    return best, ["".join(instead.get(character, character) for character in line) for line in lines]


@lru_cache(maxsize=64)  # looking through the system's folders takes milliseconds, and videos have many frames
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _lacks(font: Font, characters: Iterable[str]) -> set[str]:
    """Return those of the characters that the font does not have."""
    missing = _drawn(font, _NO_CHARACTER)
    return {character for character in characters if not _is_text(character) or _drawn(font, character) == missing}


def _is_text(character: str) -> bool:
    # Half of a surrogate pair stands for a byte of a file's name that is not UTF-8.
    return unicodedata.category(character) not in ("Cc", "Cs")


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _without_accent(font: Font, character: str) -> str:
    letter = unicodedata.normalize("NFKD", character)[0]
    return _MISSING if letter == character or _lacks(font, letter) else letter
