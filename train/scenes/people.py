"""Synthetic images of people: one in the middle, sometimes a second one behind, in various clothes and poses.

Left and right are as the person sees them: if a person faces the camera, the left arm is on the right of the image.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ccgpu.train.scenes.canvas import Camera, Canvas, Colour, Light, Pose, bar, choose, darker, disc, facing
from ccgpu.train.scenes.ground import camera_effects, smooth_noise
from ccgpu.train.scenes.traffic import CLOTHES, SKINS

PARTS = (
    *("background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("jumpsuits", "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe"),
    "right-shoe",
)
"""Names of the classes of a pixel; the index is the value in the label map."""

_SUPERSAMPLING = 2  # images are painted at this multiple of the size and reduced, which smooths edges
_HAIR: tuple[Colour, ...] = ((40, 30, 24), (96, 66, 38), (168, 136, 84), (70, 70, 74), (140, 64, 34))
_WALLS: tuple[Colour, ...] = (
    (176, 168, 150),
    (120, 132, 146),
    (150, 110, 92),
    (98, 120, 92),
    (206, 204, 198),
    (70, 74, 84),
)
_GROUNDS: tuple[Colour, ...] = ((120, 104, 84), (98, 98, 100), (96, 120, 62), (178, 162, 130), (60, 58, 60))
_GRAIN = 0.04  # relative variation of the brightness of cloth, skin and walls

Point = tuple[float, float]
"""Metres to the right of the body's middle, metres above its soles."""


@dataclass(frozen=True)
class Limb:
    """An arm (shoulder, elbow, hand) or a leg (hip, knee, ankle) of a `side`, "left" or "right"."""

    side: str
    joints: tuple[Point, Point, Point]

    def until(self, share: float, start: float = 0.0) -> list[tuple[Point, Point]]:
        """Return the straight parts from `start` to `share`, as fractions of the limb; 0.5 is the middle joint."""
        pieces = []
        for number, (begin, end) in enumerate(zip(self.joints, self.joints[1:], strict=False)):
            low, high = (min(max(2 * value - number, 0.0), 1.0) for value in (start, share))
            if high > low:
                pieces.append((_between(begin, end, low), _between(begin, end, high)))
        return pieces


def _between(begin: Point, end: Point, share: float) -> Point:
    return begin[0] + share * (end[0] - begin[0]), begin[1] + share * (end[1] - begin[1])


def _turned(start: Point, length: float, angle: float, sign: int) -> Point:
    """Return the end of a part of a limb that hangs from `start` and is turned outwards by `angle`."""
    return start[0] + sign * length * float(np.sin(angle)), start[1] - length * float(np.cos(angle))


class Person:
    """A person with a random pose, proportions and clothes.

    Args:
        canvas: the canvas to paint on.
        place: where the person stands.
        generator: determines everything else.
    """

    def __init__(self, canvas: Canvas, place: Pose, generator: np.random.Generator) -> None:
        self.canvas, self.place, self.generator = canvas, place, generator
        self.seen = bool(generator.random() < 0.75)  # whether the face is seen, not the back
        self.broad = generator.uniform(0.85, 1.15)
        self.skin = choose(generator, SKINS)
        self.hair = choose(generator, _HAIR)
        self.arms, self.legs = [*self._arms()], [*self._legs()]

    def _sides(self) -> tuple[tuple[str, int], tuple[str, int]]:
        sign = 1 if self.seen else -1
        return ("left", sign), ("right", -sign)

    def _arms(self) -> Iterator[Limb]:
        for side, sign in self._sides():
            raised = self.generator.random() < 0.2
            upper = self.generator.uniform(1.2, 2.5) if raised else self.generator.uniform(0.1, 0.7)
            lower = upper + (self.generator.uniform(0.0, 1.0) if raised else self.generator.uniform(-1.3, 0.1))
            shoulder = (sign * 0.19 * self.broad, 1.4)
            elbow = _turned(shoulder, 0.29, upper, sign)
            yield Limb(side, (shoulder, elbow, _turned(elbow, 0.27, lower, sign)))

    def _legs(self) -> Iterator[Limb]:
        for side, sign in self._sides():
            upper = self.generator.uniform(0.0, 0.28)
            hip = (sign * 0.09 * self.broad, 0.92)
            knee = _turned(hip, 0.43, upper, sign)
            lower = max(upper - self.generator.uniform(0.0, 0.25), -0.12)  # otherwise the feet would cross
            yield Limb(side, (hip, knee, _turned(knee, 0.43, lower, sign)))

    def _draw(self, shape: np.ndarray, colour: Colour, part: str | None) -> None:
        label = None if part is None else PARTS.index(part)
        self.canvas.polygon(self.place.upright(shape), colour, label)

    def _cover(self, limb: Limb, width: float, colour: Colour, part: str, share: float, start: float = 0.0) -> None:
        """Paint a limb from `start` to `share` of its length; left limbs are in the shade."""
        shade = darker(colour, 0.88) if limb.side == "left" else colour
        for begin, end in limb.until(share, start):
            for joint in (begin, end):
                self._draw(disc(joint, width / 2), shade, part)
            self._draw(bar(begin, end, width), shade, part)

    def _body(self, wide: float, low: float, high: float) -> np.ndarray:
        """Return the outline of the trunk from `low` to the shoulders at `high`, widened by the factor `wide`."""
        hips, waist, shoulders = (wide * self.broad * half for half in (0.155, 0.135, 0.205))
        right = [(hips, low), (waist, 1.14), (shoulders, high - 0.06), (shoulders - 0.05, high), (0.05, high + 0.04)]
        return np.array([*right, *((-x, y) for x, y in reversed(right))])

    def paint(self) -> None:
        """Paint the person from the skin outwards."""
        generator = self.generator
        kind = str(generator.choice(["pants", "skirt", "dress", "jumpsuits"], p=(0.4, 0.22, 0.2, 0.18)))
        cloth, long_hair = choose(generator, CLOTHES), bool(generator.random() < 0.5)
        if long_hair and self.seen:
            self._draw(disc((0, 1.52), 0.15, 1.5), darker(self.hair, 0.8), "hair")
        self._paint_legs(kind, cloth)
        self._paint_trunk(kind, cloth if kind == "jumpsuits" else choose(generator, CLOTHES))
        if generator.random() < 0.35:
            self._paint_coat()
        neck, part = (self.skin, "face") if self.seen else (self.hair, "hair")
        self._draw(bar((0, 1.4), (0, 1.56), 0.1), darker(neck, 0.85), part)
        if generator.random() < 0.35:
            self._paint_scarf()
        self._paint_head(long_hair)
        if generator.random() < 0.35:
            self._paint_hat()

    def _paint_legs(self, kind: str, cloth: Colour) -> None:
        """Paint legs, socks and shoes, and trousers or a skirt over them."""
        generator = self.generator
        shoe, sock = choose(generator, CLOTHES), choose(generator, CLOTHES)
        trousers = kind in ("pants", "jumpsuits")
        share = float(generator.choice([0.45, 0.8, 1.0], p=(0.25, 0.25, 0.5)))
        socks = generator.uniform(0.6, 0.9) if generator.random() < 0.6 else 1.0
        for leg in self.legs:
            ankle = leg.joints[-1]
            self._cover(leg, 0.12, self.skin, f"{leg.side}-leg", 1.0)
            self._cover(leg, 0.12, sock, "socks", 1.0, socks)
            toes = (ankle[0] + 0.03 * np.sign(ankle[0]), ankle[1] - 0.05)
            self._draw(disc(toes, 0.075, 0.75 if self.seen else 0.6), shoe, f"{leg.side}-shoe")
        for leg in self.legs if trousers else ():
            self._cover(leg, 0.17 * self.broad, cloth, kind, share)
        if trousers:
            self._draw(self._body(1.05, 0.88, 1.12)[[0, 1, -2, -1]], cloth, kind)
        if kind == "skirt":
            hem, wide = generator.uniform(0.45, 0.75), generator.uniform(0.18, 0.32)
            self._draw(np.array([(-0.15, 1.06), (0.15, 1.06), (wide, hem), (-wide, hem)]), cloth, "skirt")

    def _paint_trunk(self, kind: str, cloth: Colour) -> None:
        """Paint upper clothes, a dress or jumpsuits, with sleeves, and the arms, bare or with gloves."""
        generator = self.generator
        part = kind if kind in ("dress", "jumpsuits") else "upper-clothes"
        if kind == "dress":
            hem, wide = generator.uniform(0.35, 0.7), generator.uniform(0.2, 0.36)
            self._draw(np.array([(-0.14, 1.1), (0.14, 1.1), (wide, hem), (-wide, hem)]), cloth, part)
        trunk = self._body(1.08, 0.9 if kind == "jumpsuits" else 0.98, 1.42)
        self._draw(trunk, cloth, part)
        if generator.random() < 0.4:
            for level in np.arange(1.02, 1.4, 0.09):
                self._draw(bar((-0.12, level), (0.12, level), 0.03), darker(cloth, generator.choice([0.6, 1.5])), None)
        sleeve = float(generator.choice([0.15, 0.4, 0.95], p=(0.25, 0.35, 0.4)))
        gloved, glove = generator.random() < 0.35, choose(generator, CLOTHES)
        for arm in self.arms:
            self._cover(arm, 0.085, self.skin, f"{arm.side}-arm", 1.0)
            self._draw(disc(arm.joints[-1], 0.05, 1.2), self.skin, f"{arm.side}-arm")
            self._cover(arm, 0.12 * self.broad, cloth, part, sleeve)
            if gloved:
                self._cover(arm, 0.1, glove, "glove", 1.0, 0.85)
                self._draw(disc(arm.joints[-1], 0.062, 1.2), glove, "glove")

    def _paint_coat(self) -> None:
        """Paint a coat with sleeves, open in front."""
        generator, cloth = self.generator, choose(self.generator, CLOTHES)
        hem, wide = generator.uniform(0.55, 0.95), generator.uniform(0.19, 0.26)
        back = np.array([(-0.21, 1.38), (-0.1, 1.46), (0.1, 1.46), (0.21, 1.38), (wide, hem), (-wide, hem)])
        if self.seen:
            opening = generator.uniform(0.04, 0.1)
            for sign in (-1, 1):
                panel = [(0.06, 1.46), (0.21, 1.38), (wide, hem), (opening, hem), (opening, 1.2)]
                self._draw(np.array(panel) * (sign, 1), cloth, "coat")
                self._draw(bar((sign * opening, 1.2), (sign * opening, hem), 0.02), darker(cloth, 0.6), None)
        else:
            self._draw(back, cloth, "coat")
        for arm in self.arms:
            self._cover(arm, 0.14 * self.broad, cloth, "coat", 0.92)

    def _paint_scarf(self) -> None:
        cloth = choose(self.generator, CLOTHES)
        self._draw(disc((0, 1.46), 0.125, 0.5), cloth, "scarf")
        if self.seen:
            end = (self.generator.uniform(-0.1, 0.1), self.generator.uniform(1.05, 1.25))
            self._draw(bar((0.04, 1.45), end, 0.09), darker(cloth, 0.9), "scarf")

    def _paint_head(self, long_hair: bool) -> None:
        middle, crown = (0.0, 1.62), np.linspace(-0.15, np.pi + 0.15, 12)
        if not self.seen:
            self._draw(disc(middle, 0.105, 1.3), self.hair, "hair")
            if long_hair:
                self._draw(disc((0, 1.48), 0.13, 1.5), darker(self.hair, 0.9), "hair")
            return
        self._draw(disc(middle, 0.095, 1.3), self.skin, "face")
        for sign in (-1, 1):
            self._draw(disc((sign * 0.036, 1.635), 0.013, 0.8), (40, 30, 30), None)
        self._draw(bar((0, 1.62), (0.008, 1.585), 0.012), darker(self.skin, 0.8), None)
        self._draw(bar((-0.03, 1.555), (0.03, 1.555), 0.014), (150, 60, 60), None)
        outer = np.stack([0.11 * np.cos(crown), 1.63 + 0.13 * np.sin(crown)], axis=1)
        inner = np.stack([0.085 * np.cos(crown), 1.63 + 0.065 * np.sin(crown)], axis=1)
        self._draw(np.concatenate([outer, inner[::-1]]), self.hair, "hair")
        if self.generator.random() < 0.5:
            for sign in (-1, 1):
                self._draw(disc((sign * 0.042, 1.632), 0.04, 0.8), (18, 18, 22), "sunglasses")
            self._draw(bar((-0.09, 1.645), (0.09, 1.645), 0.016), (18, 18, 22), "sunglasses")

    def _paint_hat(self) -> None:
        cloth, brim = choose(self.generator, CLOTHES), self.generator.choice([0.0, 0.12, 0.2])
        top, wide = self.generator.uniform(1.8, 1.9), 0.115
        crown = [(-wide, 1.69), (wide, 1.69), (0.9 * wide, top - 0.03), (0.5 * wide, top)]
        self._draw(np.array([*crown, (-0.5 * wide, top), (-0.9 * wide, top - 0.03)]), cloth, "hat")
        self._draw(bar((-wide, 1.71), (wide, 1.71), 0.035), darker(cloth, 0.6), "hat")
        if brim:
            self._draw(bar((-brim, 1.69), (brim, 1.69), 0.03), darker(cloth, 0.8), "hat")


def draw_people(size: tuple[int, int], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of a person and its label map.

    Args:
        size: height and width in pixels.
        generator: determines everything else.

    Returns:
        uint8 (H, W, 3) RGB and uint8 (H, W), indices into `PARTS`.
    """
    height, width = (side * _SUPERSAMPLING for side in size)
    whole = generator.random() < 0.75
    tall = generator.uniform(0.82, 0.97) if whole else generator.uniform(1.3, 2.0)
    low = 0.0 if whole else 1.85 * (1 - 1 / tall) - 0.05  # metres above the soles at the image's lower edge
    focal = min(tall * height / 1.9, 1.1 * width) if whole else tall * height / 1.9
    camera = Camera(
        width=width,
        height=height,
        focal=focal,
        centre=width * generator.uniform(0.42, 0.58),
        horizon=height * (0.99 - generator.uniform(0.0, 0.02)) - focal * (1.0 - low),
        eye=1.0,
        bend=0.0,
    )
    light = Light(sun=1, haze=(0.0, 0.0, 0.0), sight=np.inf, shade=1.0)
    canvas = Canvas(camera, light, _backdrop((height, width), generator), np.zeros((height, width), np.uint8))
    if generator.random() < 0.2:
        Person(canvas, facing(generator.choice([-1, 1]) * generator.uniform(0.45, 0.8), 1.3), generator).paint()
    Person(canvas, facing(0.0, 1.0), generator).paint()
    centres = slice(_SUPERSAMPLING // 2, None, _SUPERSAMPLING)
    parts = np.asarray(canvas.ids)[centres, centres].copy()
    pixels = np.asarray(canvas.image.reduce(_SUPERSAMPLING))
    return camera_effects(pixels, np.full(size, _GRAIN), generator, generator), parts


def _backdrop(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return a wall above a floor with a few random shapes: uint8 (H, W, 3)."""
    height, width = shape
    y, x = np.mgrid[:height, :width] / np.array(shape)[:, None, None]
    floor = generator.uniform(0.5, 0.9)
    wall, ground = (np.array(choose(generator, colours)) for colours in (_WALLS, _GROUNDS))
    pixels = np.where((y > floor)[..., None], ground, wall * (1.1 - 0.3 * y)[..., None])
    for _ in range(int(generator.integers(0, 6))):
        left, top = generator.uniform(-0.1, 0.9), generator.uniform(-0.1, floor - 0.1)
        wide, high = generator.uniform(0.05, 0.4), generator.uniform(0.1, 0.5)
        colour = np.array(choose(generator, (*_WALLS, *_GROUNDS, *CLOTHES)))
        inside = (abs(x - left - wide / 2) < wide / 2) & (abs(y - top - high / 2) < high / 2)
        if generator.random() < 0.4:
            inside = ((x - left) / wide) ** 2 + ((y - top) / high) ** 2 < 0.25
        pixels[inside] = colour
    rough = smooth_noise(shape, width / 8, generator) + smooth_noise(shape, width / 30, generator)
    return (pixels * (1 + generator.uniform(0.0, 0.08) * rough)[..., None]).clip(0, 255).astype(np.uint8)
