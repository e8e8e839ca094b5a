"""Synthetic images in which the class of a disc is the colour of a square that lies elsewhere in the image.

An image holds squares of different *markers*, and discs. A disc is painted in the colour of its marker, which says
nothing about its class; the square has a frame of that colour around the colour of the class. With one marker, grey,
all discs of an image have one class, that of its only square. With N markers an image has from one to N squares, and a
disc must find its own: images with few squares are what training begins to learn from.

In a clip the squares lie in one frame and the discs in all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

CLASSES: tuple[tuple[str, Colour], ...] = (
    ("red", (220, 40, 40)),
    ("green", (40, 180, 60)),
    ("blue", (50, 80, 230)),
    ("yellow", (235, 215, 40)),
)
"""Names and colours of the classes of discs; class 0 is everything else, the squares included."""
MARKERS: tuple[Colour, ...] = (
    *((150, 150, 150), (240, 240, 240), (60, 210, 210), (210, 60, 210)),
    *((245, 150, 60), (120, 70, 30), (130, 60, 160), (250, 170, 190)),
)
"""Colours of the discs and of the frames of their squares; the first is grey."""
SMALLEST = 64  # pixels per side, below which there may be no room for a disc
_SIDE, _FRAME = 20, 2  # pixels of a square, and of its frame on each side
# The same where discs must be matched with frames: with thinner frames no context module learnt to in 4000 steps.
_SIDE_OF_MANY, _FRAME_OF_MANY = 24, 5
RADII = (8, 12)  # smallest and largest radius of a disc, in pixels
_DISCS = 8  # of an image, as far as there is room for them
_TRIES = 40  # places that are tried for a disc
_GAP = 2  # pixels between two of them, at least
_GROUND = (15, 70)  # range of the grey of the ground
_GRAIN = 6.0  # standard deviation of the noise of a pixel, in 0..255


@dataclass(frozen=True)
class Square:
    """A square.

    Attributes:
        frame: the frame of the clip that it lies in.
        top, left: its upper left corner, in pixels.
        side: its extent along height and width, in pixels.
        border: the width of the frame around its colour, in pixels.
        marker: 0..7, the colour of that frame.
        label: 1..4, its class.
    """

    frame: int
    top: int
    left: int
    side: int
    border: int
    marker: int
    label: int


@dataclass(frozen=True, eq=False)
class Scene:
    """An image or a clip of discs and squares, T = 1 for an image.

    Attributes:
        pixels: uint8 (T, H, W, 3), RGB.
        labels: uint8 (T, H, W): the class of a disc's pixels, 0 elsewhere.
        owners: int8 (T, H, W): the square that gives a disc's pixel its class, an index of `squares`; -1 elsewhere.
        squares: the squares, of different markers.
    """

    pixels: np.ndarray
    labels: np.ndarray
    owners: np.ndarray
    squares: tuple[Square, ...]

    def offsets(self) -> np.ndarray:
        """Return how far each pixel of a disc is from its square along T, H and W: int32 (3, T, H, W).

        Along T in frames, along H and W in pixels between a pixel's row (column) and the nearest one of the square, 0
        where the square crosses that row (column); -1 outside of discs. An image's pixel lies on the criss-cross
        of its square where one of the last two is 0; a clip's pixel shares as many axes with it as there are zeros.
        """
        found = np.full((3, *self.owners.shape), -1, np.int32)
        for index, square in enumerate(self.squares):
            inside = np.nonzero(self.owners == index)
            starts = (square.frame, square.top, square.left)
            for axis, (start, extent) in enumerate(zip(starts, (1, square.side, square.side), strict=True)):
                place = inside[axis]
                found[axis][inside] = np.maximum(np.maximum(start - place, place - (start + extent - 1)), 0)
        return found


def draw_scene(size: tuple[int, int], generator: np.random.Generator, *, markers: int = 1, frames: int = 1) -> Scene:
    """Return a random image or clip.

    Args:
        size: height and width in pixels, each 64 or more, and large enough for N squares: 72 is for all N.
        generator: determines everything.
        markers: N, 1 to 8: the largest number of squares; each number from 1 to N has the same probability.
        frames: T, 1 for an image. The frame of the squares is one of them with equal probability.

    Raises:
        ValueError: an argument is out of its range.
    """
    if len(size) != 2 or min(size) < SMALLEST:
        raise ValueError(f"draw_scene: size must be (height, width) of {SMALLEST} or more, got {size}; enlarge it.")
    if not 1 <= markers <= len(MARKERS):
        raise ValueError(f"draw_scene: markers must be 1 to {len(MARKERS)}, got {markers}; choose fewer or more.")
    side, _ = _side_and_border(markers)
    if (size[0] // side) * (size[1] // side) < markers:
        raise ValueError(
            f"draw_scene: size must have room for {markers} squares of {side} pixels, got {size}; enlarge it."
        )
    if frames < 1:
        raise ValueError(f"draw_scene: frames must be 1 or more, got {frames}; give 1 for an image.")
    home = int(generator.integers(frames))
    squares = _draw_squares(size, generator, markers, home)
    pixels = np.repeat(generator.uniform(*_GROUND, (frames, 1, 1, 1)), size[0], 1).repeat(size[1], 2).repeat(3, 3)
    labels, owners = np.zeros((frames, *size), np.uint8), np.full((frames, *size), -1, np.int8)
    for square in squares:
        for border, colour in ((0, MARKERS[square.marker]), (square.border, CLASSES[square.label - 1][1])):
            rows, columns = (slice(start + border, start + square.side - border) for start in (square.top, square.left))
            pixels[home, rows, columns] = colour
    for frame in (frame for frame in range(frames) if frames == 1 or frame != home):
        half = squares[0].side / 2
        centres = [(square.top + half, square.left + half, half * 2**0.5) for square in squares]
        for inside in _draw_discs(size, generator, centres if frame == home else []):
            owner = int(generator.integers(len(squares)))
            square = squares[owner]
            pixels[frame][inside], labels[frame][inside] = MARKERS[square.marker], square.label
            owners[frame][inside] = owner
    pixels += _GRAIN * generator.standard_normal(pixels.shape, np.float32)
    return Scene(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), labels, owners, squares)


def _side_and_border(markers: int) -> tuple[int, int]:
    """Return the side of the squares, and the width of their frames, of images with up to this many."""
    return (_SIDE, _FRAME) if markers == 1 else (_SIDE_OF_MANY, _FRAME_OF_MANY)


def _draw_squares(
    size: tuple[int, int], generator: np.random.Generator, markers: int, frame: int
) -> tuple[Square, ...]:
    """Return squares of different markers, each in another cell of a grid, so that they never overlap."""
    kinds = [0] if markers == 1 else generator.permutation(markers)[: generator.integers(1, markers + 1)].tolist()
    side, border = _side_and_border(markers)
    cells = [extent // (side + _GAP) for extent in size]
    if cells[0] * cells[1] < len(kinds):  # a small image has room for as many squares that touch each other
        cells = [extent // side for extent in size]
    squares = []
    chosen = generator.choice(cells[0] * cells[1], len(kinds), replace=False)
    for marker, cell in zip(kinds, chosen, strict=True):
        bounds = zip(divmod(int(cell), cells[1]), cells, size, strict=True)
        ranges = [(index * extent // count, (index + 1) * extent // count - side) for index, count, extent in bounds]
        top, left = (int(generator.integers(low, high + 1)) for low, high in ranges)
        label = int(generator.integers(1, len(CLASSES) + 1))
        squares.append(Square(frame, top, left, side, border, marker, label))
    return tuple(squares)


def _draw_discs(
    size: tuple[int, int], generator: np.random.Generator, taken: list[tuple[float, float, float]]
) -> list[np.ndarray]:
    """Return the pixels of discs, bool (H, W) each, that overlap neither each other nor the circles `taken`.

    A circle is the y and x of its centre and its radius, in pixels.
    """
    rows, columns = np.ogrid[: size[0], : size[1]]
    circles, discs = [*taken], []
    for _ in range(_DISCS):
        radius = generator.uniform(*RADII)
        for y, x in generator.uniform(radius, np.subtract(size, radius), (_TRIES, 2)):
            if all(np.hypot(y - row, x - column) > radius + other + _GAP for row, column, other in circles):
                circles.append((y, x, radius))
                discs.append(np.hypot(rows - y, columns - x) <= radius)
                break
    return discs
