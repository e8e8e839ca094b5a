"""The canvas of synthetic scenes: a camera projects polygons in the world into an image and its label map.

World coordinates are metres: x to the right of the camera, y up from the ground, z ahead. Everything is painted as
polygons in the world; a box is up to five of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ccgpu.train.data.cityscapes_labels import LABELS

Colour = tuple[float, float, float]

# Things that scenes distinguish for some datasets, but Cityscapes does not -> their Cityscapes label.
_FINER = {"street lamp": "pole", "hedge": "vegetation", "skyline": "building", "van": "car"}

ID = {label.name: label.id for label in LABELS if label.id >= 0}
ID |= {name: max(ID.values()) + 1 + number for number, name in enumerate(_FINER)}
"""Name -> id in the label maps of scenes: the Cityscapes label ids, and further ids for finer things."""

_NEAR = 0.3  # metres; polygons are clipped at this distance from the camera


def by_id(values: Mapping[str, float], otherwise: float) -> np.ndarray:
    """Return a lookup table (256,) from the ids of a scene to values given by name.

    A name that is not in `values` gets the value of its Cityscapes label, or `otherwise` if that is not in `values`
    either.
    """
    table = np.full(256, otherwise)
    for name, scene_id in ID.items():
        table[scene_id] = values.get(name, values.get(_FINER.get(name, name), otherwise))
    return table


def void_borders(ids: np.ndarray, reach: int, void: int) -> np.ndarray:
    """Return a label map in which all pixels near another id are void.

    Args:
        ids: label ids, uint8 (H, W).
        reach: pixels whose rows and columns differ by at most this are near each other.
        void: the id of the pixels near a border.

    Returns:
        uint8 (H, W).
    """
    image, size = Image.fromarray(ids), 2 * reach + 1
    lowest, highest = (np.asarray(image.filter(kind(size))) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    return np.where(lowest == highest, ids, np.uint8(void))


@dataclass(frozen=True)
class Camera:
    """Pinhole camera above a flat ground, looking along z.

    Attributes:
        width, height: of the image in pixels.
        focal: focal length in pixels.
        centre: column of x = 0, in pixels.
        horizon: row of the horizon, in pixels.
        eye: height of the camera above the ground in metres.
        bend: curvature of the street: points z ahead are shifted to the right by bend * z * z metres.
        z: position of the camera along the street in metres.
    """

    width: int
    height: int
    focal: float
    centre: float
    horizon: float
    eye: float
    bend: float
    z: float = 0.0

    def project(self, points: np.ndarray) -> np.ndarray:
        """Return the pixel positions (..., 2), column first, of world points (..., 3) ahead of the camera."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2] - self.z
        pixels = np.empty((*points.shape[:-1], 2))
        pixels[..., 0] = self.centre + self.focal * (x / z + self.bend * z)
        pixels[..., 1] = self.horizon + self.focal * (self.eye - y) / z
        return pixels

    def ahead(self, points: np.ndarray) -> np.ndarray:
        """Return the part (m, 3) of a polygon (n, 3) that lies ahead of the camera; m = 0 if there is none."""
        depth = points[:, 2] - self.z - _NEAR
        if depth.min() >= 0:
            return points
        after, depth_after = np.roll(points, -1, axis=0), np.roll(depth, -1)
        clipped = []
        for point, other, here, there in zip(points, after, depth, depth_after, strict=True):
            if here >= 0:
                clipped.append(point)
            if (here >= 0) != (there >= 0):
                clipped.append(point + (other - point) * (here / (here - there)))
        return np.array(clipped).reshape(-1, 3)


@dataclass(frozen=True)
class Light:
    """Light of a scene.

    Attributes:
        sun: -1 (from the left) or 1.
        haze: colour that distant things fade to.
        sight: distance in metres at which haze has replaced 63 % of a colour.
        shade: brightness of faces in the shadow, 0..1.
    """

    sun: int
    haze: Colour
    sight: float
    shade: float


class Pose(NamedTuple):
    """A position on the ground with a direction: `yaw` 0 looks along z, pi / 2 to the right (along x)."""

    x: float
    z: float
    yaw: float

    def world(self, local: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """Return the world points (..., 3) of local points (..., 3): metres ahead, metres to the right, metres up."""
        local = np.asarray(local, dtype=float)
        ahead, right = local[..., 0], local[..., 1]
        sine, cosine = math.sin(self.yaw), math.cos(self.yaw)
        points = np.empty_like(local)
        points[..., 0] = self.x + ahead * sine + right * cosine
        points[..., 1] = local[..., 2]
        points[..., 2] = self.z + ahead * cosine - right * sine
        return points

    def upright(self, shape: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """Return the world points (..., 3) of upright flat shapes (..., 2): metres ahead, metres up."""
        shape = np.asarray(shape, dtype=float)
        local = np.zeros((*shape.shape[:-1], 3))
        local[..., 0], local[..., 2] = shape[..., 0], shape[..., 1]
        return self.world(local)


def facing(x: float, z: float) -> Pose:
    """Return the pose whose `upright` shapes face the camera, with their first coordinate to the right."""
    return Pose(x, z, np.pi / 2)


def disc(centre: tuple[float, float], radius: float, stretch: float = 1.0, corners: int = 14) -> np.ndarray:
    """Return the flat shape (corners, 2) of an ellipse, `stretch` times as high as wide."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + stretch * radius * np.sin(angle)], axis=1)


def bar(start: tuple[float, float], end: tuple[float, float], thickness: float) -> np.ndarray:
    """Return the flat shape (4, 2) of a straight bar."""
    ends = np.array([start, end])
    along = ends[1] - ends[0]
    across = np.array([-along[1], along[0]]) * (thickness / 2 / max(float(np.hypot(*along)), 1e-9))
    return np.concatenate([ends + across, ends[::-1] - across])


def ring(centre: tuple[float, float], radius: float, thickness: float) -> np.ndarray:
    """Return the flat shape of a ring: the outer circle, then the inner circle backwards."""
    outer, inner = disc(centre, radius), disc(centre, radius - thickness)
    return np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])


def patch(face: np.ndarray, left: float, right: float, bottom: float, top: float) -> np.ndarray:
    """Return a part (4, 3) of a face (4, 3), given in fractions 0..1 of its width and height."""
    return patches(face, np.array([[left, right, bottom, top]]))[0]


def patches(face: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return parts (n, 4, 3) of a face (4, 3); parts (n, 4) are left, right, bottom, top as fractions 0..1."""
    u, v = parts[:, (0, 1, 1, 0), None], parts[:, (2, 2, 3, 3), None]
    return (1 - v) * (face[0] + u * (face[1] - face[0])) + v * (face[3] + u * (face[2] - face[3]))


def darker(colour: Colour, factor: float) -> Colour:
    """Return the colour times a factor (above 1: brighter)."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def choose(generator: np.random.Generator, colours: tuple[Colour, ...], spread: float = 0.12) -> Colour:
    """Return one of the colours, with random small changes of brightness and hue."""
    colour = np.array(colours[generator.integers(len(colours))]) * (1 + generator.uniform(-spread, spread))
    red, green, blue = colour + generator.uniform(-8, 8, 3)
    return float(red), float(green), float(blue)


class Canvas:
    """An image and its label map, painted with the same polygons; callers paint the nearest last.

    Args:
        camera: projects the polygons.
        light: determines the haze and the brightness of faces.
        pixels: background, uint8 (H, W, 3).
        ids: label map of the background, uint8 (H, W), values of `ID`.
    """

    def __init__(self, camera: Camera, light: Light, pixels: np.ndarray, ids: np.ndarray) -> None:
        self.camera = camera
        self.light = light
        self.image = Image.fromarray(pixels)
        self.ids = Image.fromarray(ids)
        self._paint = ImageDraw.Draw(self.image, "RGBA")
        self._mark = ImageDraw.Draw(self.ids)
        self._haze = np.array(light.haze)

    def polygon(self, points: np.ndarray, colour: Colour | None, label: int | None, opacity: float = 1.0) -> None:
        """Fill a polygon (n, 3); colour None leaves the image unchanged, label None the label map."""
        self.polygons(points[None], None if colour is None else np.array([colour]), label, opacity)

    def polygons(self, points: np.ndarray, colours: np.ndarray | None, label: int | None, opacity: float = 1.0) -> None:
        """Fill polygons (m, n, 3) in this order, in colours (m, 3) or one colour (1, 3); None as in `polygon`."""
        if (points[..., 2] < self.camera.z + _NEAR - 1e-6).any():  # clipped polygons end at _NEAR up to rounding
            for index, outline in enumerate(points):
                seen, colour = self.camera.ahead(outline), colours if colours is None else colours[index % len(colours)]
                if len(seen) > 2:
                    self.polygons(seen[None], colour if colour is None else colour[None], label, opacity)
            return
        corners = self.camera.project(points).reshape(len(points), 2 * points.shape[1]).tolist()
        if colours is not None:
            ahead = points[:, :, 2].sum(axis=1, keepdims=True) / points.shape[1] - self.camera.z
            mixed = colours + (self._haze - colours) * (1 - np.exp(ahead / -self.light.sight))
            fills = np.minimum(np.maximum(np.rint(mixed), 0), 255).astype(int)
            alpha = round(255 * opacity)
            for outline, colour in zip(corners, fills.tolist(), strict=True):
                self._paint.polygon(outline, fill=(*colour, alpha))
        if label is not None:
            for outline in corners:
                self._mark.polygon(outline, fill=label)

    def details(self, face: np.ndarray, parts: np.ndarray, colour: Colour | np.ndarray) -> None:
        """Paint parts (n, 4) of a face (see `patches`) in one or n colours, without changing its label."""
        self.polygons(patches(face, np.atleast_2d(parts)), np.atleast_2d(np.asarray(colour, dtype=float)), None)

    def shadow(self, pose: Pose, start: float, end: float, half: float) -> None:
        """Darken the ground under a thing from `start` to `end` metres ahead of its pose."""
        side = 0.5 * self.light.sun
        corners = [
            (start, -half - side, 0),
            (start, half - side, 0),
            (end, half - side, 0),
            (end, -half - side, 0),
        ]
        self.polygon(pose.world(corners), (12, 12, 16), None, 0.45)

    def box(
        self,
        pose: Pose,
        along: tuple[float, float],
        half: float,
        up: tuple[float, float],
        colour: Colour,
        label: int,
        *,
        taper: tuple[float, float, float] = (0, 0, 0),
    ) -> dict[str, np.ndarray]:
        """Paint the visible faces of a box and return them, so that details can be painted on them.

        Args:
            pose: position and direction.
            along: start and end, metres ahead.
            half: half the box's width in metres.
            up: bottom and top, metres above the ground.
            colour: colour in full light.
            label: a value of `ID`.
            taper: metres by which the top is shorter at the rear, at the front and on each side.

        Returns:
            The visible faces out of "rear", "front", "left" and "right": corners (4, 3) in counterclockwise order from
            the bottom left, as seen from outside.
        """
        (a, b), (low, high), (rear, front, side) = along, up, taper
        bottom = pose.world([(a, -half, low), (a, half, low), (b, half, low), (b, -half, low)])
        inner = half - side
        top = pose.world(
            [
                (a + rear, -inner, high),
                (a + rear, inner, high),
                (b - front, inner, high),
                (b - front, -inner, high),
            ]
        )
        faces = {"top": top}
        for index, name in enumerate(("rear", "right", "front", "left")):
            after = (index + 1) % 4
            faces[name] = np.array([bottom[index], bottom[after], top[after], top[index]])
        seen = {}
        for name, face in faces.items():
            x, y = self.camera.project(self.camera.ahead(face)).T
            if x @ np.roll(y, -1) - y @ np.roll(x, -1) >= 0:
                continue  # turned away from the camera, or behind it
            self.polygon(face, darker(colour, self._brightness(face)), label)
            if name != "top":
                seen[name] = face
        return seen

    def _brightness(self, face: np.ndarray) -> float:
        """Return the brightness of a face by its direction, from `shade` to 1.1."""
        (ex, ey, ez), (rx, ry, rz) = (face[1] - face[0]).tolist(), (face[3] - face[0]).tolist()
        normal = ry * ez - rz * ey, rz * ex - rx * ez, rx * ey - ry * ex
        sun = 0.8 * self.light.sun, 0.5, -0.35
        along = sum(n * s for n, s in zip(normal, sun, strict=True)) / max(math.hypot(*normal), 1e-9)
        return self.light.shade + (1.1 - self.light.shade) * min(1.0, 0.5 + 0.5 * along)
