"""The background of a synthetic scene, sky and ground, and the effects of the camera on the finished image."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ccgpu.train.scenes.canvas import ID, Camera, Colour, Light, by_id

GRAIN = by_id(
    {
        **{"vegetation": 0.16, "terrain": 0.13, "wall": 0.08, "sidewalk": 0.05, "road": 0.05, "building": 0.05},
        "rail track": 0.10,
    },
    0.0,
)
"""Relative variation of a surface's brightness, by id: leaves and grass are rough, glass and paint are not."""

_ASPHALTS: tuple[Colour, ...] = ((92, 92, 94), (78, 78, 82), (112, 108, 104), (98, 96, 100))
_PAVINGS: tuple[Colour, ...] = ((150, 144, 136), (134, 130, 128), (168, 156, 144), (150, 128, 116))
_GRASSES: tuple[Colour, ...] = ((106, 124, 58), (124, 128, 66), (92, 116, 60), (134, 116, 80))
# Colour of the sky overhead and at the horizon, typical `Light.sight` in metres, `Light.shade`.
_SKIES: tuple[tuple[Colour, Colour, float, float], ...] = (
    ((84, 136, 208), (190, 212, 234), 260.0, 0.45),  # clear
    ((150, 164, 180), (206, 210, 214), 200.0, 0.72),  # overcast
    ((108, 128, 172), (240, 202, 158), 180.0, 0.40),  # low sun
    ((186, 190, 194), (206, 208, 210), 90.0, 0.80),  # fog
)


@dataclass(frozen=True)
class Street:
    """Cross-section of a street, outwards from the middle of the camera's lane, in metres; index 0 is left, 1 right.

    Attributes:
        road: distance of the road's edge.
        beside: width and label of the strip beside the road ("rail track" or "parking"; width 0: there is none).
        grass: width of the strip of grass that follows.
        sidewalk: width of the sidewalk.
        front: width of the terrain from the sidewalk to the buildings.
    """

    road: tuple[float, float]
    beside: tuple[tuple[float, str], tuple[float, str]]
    grass: tuple[float, float]
    sidewalk: tuple[float, float]
    front: tuple[float, float]

    def kerb(self, side: int) -> float:
        """Return the distance of the sidewalk's inner edge."""
        return self.road[side] + self.beside[side][0] + self.grass[side]

    def back(self, side: int) -> float:
        """Return the distance of the sidewalk's outer edge."""
        return self.kerb(side) + self.sidewalk[side]

    def fronts(self, side: int) -> float:
        """Return the distance of the buildings."""
        return self.back(side) + self.front[side]


def weather(generator: np.random.Generator) -> tuple[Light, Colour]:
    """Return the light of a scene and the colour of the sky overhead."""
    top, haze, sight, shade = _SKIES[generator.choice(4, p=(0.4, 0.3, 0.2, 0.1))]
    return Light(int(generator.choice([-1, 1])), haze, sight * generator.uniform(0.8, 1.4), shade), top


def smooth_noise(shape: tuple[int, int], cell: float, generator: np.random.Generator) -> np.ndarray:
    """Return noise (H, W) with mean 0 and standard deviation about 1 that changes over `cell` pixels."""
    rows, columns = (max(2, round(side / cell) + 1) for side in shape)
    grid = Image.fromarray(generator.standard_normal((rows, columns)).astype(np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC)) * 1.4  # resizing reduces the deviation


def background(
    camera: Camera, street: Street, light: Light, zenith: Colour, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a sky with clouds over an empty street: uint8 (H, W, 3) and its label map uint8 (H, W)."""
    shape = camera.height, camera.width
    row = np.arange(camera.height)[:, None] + 0.5
    start = int(np.ceil(camera.horizon + 1))
    up = np.clip((camera.horizon - row[:start]) / camera.horizon, 0, 1)[..., None] ** 0.7
    pixels = np.empty((*shape, 3))
    pixels[:start] = np.array(light.haze) * (1 - up) + np.array(zenith) * up
    sky = start, camera.width
    clouds = smooth_noise(sky, camera.width / 6, generator) + 0.6 * smooth_noise(sky, camera.width / 16, generator)
    cover = np.clip(clouds - generator.uniform(0.0, 1.4), 0, 1)[..., None] * 0.8 * up
    pixels[:start] += cover * (np.array((244.0, 244.0, 246.0)) - pixels[:start])
    ids = np.full(shape, ID["sky"], dtype=np.uint8)
    below = row[start:]
    ahead = camera.focal * camera.eye / (below - camera.horizon)
    across = (np.arange(camera.width)[None] + 0.5 - camera.centre) * ahead / camera.focal - camera.bend * ahead**2
    colours, ids[start:] = _ground(street, across, np.broadcast_to(camera.z + ahead, across.shape), generator)
    haze = 1 - np.exp(-ahead / light.sight)[..., None]
    pixels[start:] = colours + haze * (np.array(light.haze) - colours)
    ids[:start][row[:start, 0] > camera.horizon] = ID["terrain"]
    return pixels.clip(0, 255).astype(np.uint8), ids


def _ground(
    street: Street, across: np.ndarray, along: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return colours (h, W, 3) and ids (h, W) of the ground, `across` and `along` being metres (negative: left)."""
    asphalt, paving, grass = (
        np.array(palette[generator.integers(len(palette))]) * generator.uniform(0.85, 1.15)
        for palette in (_ASPHALTS, _PAVINGS, _GRASSES)
    )
    # Each pixel of `surfaces` is an index into these two lists.
    colours: list[np.ndarray] = []
    labels: list[int] = []
    surfaces = np.zeros(across.shape, dtype=np.uint8)

    def lay(where: np.ndarray, colour: np.ndarray, label: str) -> None:
        surfaces[where] = len(colours)
        colours.append(colour)
        labels.append(ID[label])

    paint = np.full(3, 218.0)
    lay(np.ones_like(surfaces, dtype=bool), grass, "terrain")
    joints = ((across % 0.9 < 0.05) | (along % 0.9 < 0.07)) & (along < 16)
    for side in (0, 1):
        out = across if side else -across
        road, (width, kind) = street.road[side], street.beside[side]
        paved = (out >= street.kerb(side)) & (out < street.back(side))
        lay(paved, paving, "sidewalk")
        lay(paved & joints, paving * 0.82, "sidewalk")
        lay(paved & (out < street.kerb(side) + 0.22), paving * 1.2, "sidewalk")
        strip = (out >= road) & (out < road + width)
        if width:
            lay(strip, asphalt * 0.86, kind)
        if kind == "rail track":
            rails = np.abs(np.abs(out - road - width / 2) - 0.72) < 0.09
            lay(strip & rails, np.array((176.0, 172.0, 166.0)), kind)
        if kind == "parking":
            lay(strip & (along % 6 < 0.14), paint, kind)
        lane = (out >= 0) & (out < road)
        lay(lane, asphalt, "road")
        between = (np.abs((out - 1.7) % 3.4 - 1.7) > 1.62) & (out < road - 1) & (along % 9 < 4)
        lay(lane & (between | (np.abs(out - road + 0.23) < 0.07)), paint, "road")
    if generator.random() < 0.35:
        begin = generator.uniform(6, 14)
        stripes = (along > begin) & (along < begin + 3) & (across % 1.0 < 0.5)
        lay(stripes & (across > -street.road[0]) & (across < street.road[1]), paint, "road")
    worn = 1 + 0.04 * smooth_noise(across.shape, 40, generator)
    return np.array(colours)[surfaces] * worn[..., None], np.array(labels, dtype=np.uint8)[surfaces]


def camera_effects(
    pixels: np.ndarray, grain: np.ndarray, lens: np.random.Generator, sensor: np.random.Generator
) -> np.ndarray:
    """Return the image with surface grain and a camera's exposure, colour cast, vignette and sensor noise.

    Args:
        pixels: uint8 (H, W, 3).
        grain: relative variation of brightness of each pixel's surface, (H, W); see `GRAIN`.
        lens: determines exposure, cast and vignette, which the frames of a video share.
        sensor: determines grain and noise, which differ between frames; may be the same generator.

    Returns:
        uint8 (H, W, 3).
    """
    shape = grain.shape
    rough = sum(smooth_noise(shape, cell, sensor) for cell in (1.5, 4, 12)) / 1.7
    image = pixels / 255 * (1 + grain * rough)[..., None]
    cast = 1 + lens.uniform(-0.06, 0.06, 3)
    y, x = (np.linspace(-1, 1, side) for side in shape)
    vignette = 1 - lens.uniform(0.05, 0.22) * (y[:, None] ** 2 + x**2) / 2
    image = image.clip(0, None) ** lens.uniform(0.85, 1.2) * lens.uniform(0.8, 1.12) * cast
    noise = sensor.standard_normal(image.shape) * lens.uniform(0.004, 0.022)
    return ((image * vignette[..., None] + noise) * 255).round().clip(0, 255).astype(np.uint8)
