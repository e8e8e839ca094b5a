"""Finding JPEG files that were cut although they end like whole ones.

libjpeg fills the missing part of such a file with grey and reports nothing that Pillow passes on.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from ccgpu.models.png_files import strips

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)  # frames whose entropy coding is not Huffman's
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a length: TEM and the restart markers
# In coded pixels 0xFF is followed by 0, by a restart marker or by another 0xFF; anything else ends them.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Read as Huffman codes they give pixels; 64 bytes outlast the bits that the decoder holds already. The restart markers
# are for files whose next pixels follow such a marker.
_MORE = b"".join(b"\xaa" * 64 + bytes([0xFF, marker]) for marker in range(0xD0, 0xD8)) + b"\xaa" * 64


def is_cut(content: bytes, image: Image.Image) -> bool:
    """Return whether a JPEG file lacks pixels before its end marker, or the end marker.

    The file is decoded once more, with further bytes before the end marker. After the last pixel the decoder skips
    them; where pixels are missing it takes them for codes, and the two images differ.

    A progressive file that was cut exactly between two of its scans passes: it is whole, but coarser than it was. Of
    arithmetic coding, which may leave out zeros at its end, only the end marker is looked for.

    Args:
        content: a file.
        image: what Pillow decodes from it.
    """
    end, is_huffman = _end_marker(content)
    if end is None:
        return True
    if not is_huffman:
        return False
    longer = io.BytesIO(content[:end] + _MORE + content[end:])
    try:
        with Image.open(longer, formats=("JPEG",)) as other:
            return image.size != other.size or any(
                not np.array_equal(np.asarray(image.crop(box)), np.asarray(other.crop(box)))
                for box in ((0, rows.start, image.width, rows.stop) for rows in strips(image.height, image.width))
            )
    except OSError:  # the further bytes are no codes, and were not skipped
        return True


def _end_marker(content: bytes) -> tuple[int | None, bool]:
    """Return the position of the image's end marker, None if it has none, and whether its codes are Huffman's.

    Segments are skipped by their lengths, because a thumbnail within one has an end marker of its own.
    """
    position, is_huffman = 2, True
    while position + 2 <= len(content):
        marker = content[position + 1]
        if content[position] != 0xFF or marker == 0xFF:  # bytes between segments and fill bytes
            position += 1
        elif marker == _EOI:
            return position, is_huffman
        elif marker in _ALONE or marker in (0, _SOI):
            position += 2
        else:
            is_huffman = is_huffman and marker not in _ARITHMETIC
            position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
            if marker == _SOS:
                found = _END_OF_SCAN.search(content, position)
                if found is None:
                    break
                position = found.start()
    return None, is_huffman
