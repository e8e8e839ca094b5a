"""Synthetic street scenes and videos of them: data for a first run, for tests and for demonstrations.

Each image shows, from a driver's seat, a street of random course, width, traffic, weather and light. All 19 classes of
Cityscapes occur, as do labels without a class (ego vehicle, rectification border, static, parking, rail track), as in
the real label files.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import ImageDraw

from ccgpu.train.scenes.buildings import (
    FRONTS,
    building,
    fence,
    hedge,
    junction_box,
    lamp,
    leaves,
    traffic_light,
    traffic_sign,
    tree,
    wall,
)
from ccgpu.train.scenes.canvas import ID, Camera, Canvas, Pose, choose
from ccgpu.train.scenes.ground import GRAIN, Street, background, camera_effects, weather
from ccgpu.train.scenes.traffic import bicycle, bus, car, motorcycle, person, tram, truck

_SUPERSAMPLING = 2  # scenes are painted at this multiple of the size and reduced, which smooths edges
_FARTHEST = 60.0  # metres; only a skyline is farther away
_LANE = 3.4  # width in metres

Paint = Callable[[Canvas, Pose, np.random.Generator], None]
Part = Callable[..., np.random.Generator]  # (name, number) of a part of the scene -> its random generator


class Thing(NamedTuple):
    """A person, vehicle or other object on the street.

    Attributes:
        paint: function that paints the thing.
        pose: the thing's pose when the camera is at 0.
        length: extent in metres ahead of its pose; 0 for flat things.
        speed: speed along the street, as a multiple of the camera's.
    """

    paint: Paint
    pose: Pose
    length: float = 0.0
    speed: float = 0.0

    def span(self) -> tuple[float, float]:
        """Return the z of its nearest and farthest point in metres; at a yaw of pi it extends towards the camera."""
        near = self.pose.z - (self.length if abs(self.pose.yaw) == np.pi else 0)
        return near, near + self.length

    def behind(self, other: "Thing") -> bool:
        """Return whether `other` can hide it: it is farther away, or beside `other` and farther from the middle."""
        begin, (near, far) = self.span()[0], other.span()
        return begin >= far or (begin > near and abs(self.pose.x) > abs(other.pose.x))

    def when(self, travelled: float) -> "Thing":
        """Return the thing at its place when the camera has travelled `travelled` metres."""
        return self._replace(pose=self.pose._replace(z=self.pose.z + self.speed * travelled))


def draw_scene(size: tuple[int, int], generator: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a street scene.

    Args:
        size: height and width in pixels.
        generator: determines everything else.
        index: number of the image; of three consecutive images the first shows a tram, the second a bus, the third a
            truck.

    Returns:
        uint8 (H, W, 3) RGB and scene ids uint8 (H, W), see `canvas.ID`.
    """
    return _draw(size, lambda name, number=0: generator, index, 0.0)


def draw_frame(size: tuple[int, int], video: tuple[int, ...], travelled: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a frame of a drive through a street scene.

    Each part of the scene has its own random generator, so all frames of a video show the same things, wherever the
    camera is. Only the camera's noise differs from frame to frame.

    Args:
        size: height and width in pixels.
        video: numbers, 0 or more, that determine everything else; the last is the video's number, used like `index` of
            `draw_scene`.
        travelled: metres that the camera has travelled, 0 or more; the street ends after 60.

    Returns:
        As `draw_scene`.
    """

    def part(name: str, number: int = 0) -> np.random.Generator:
        return np.random.default_rng((*video, zlib.crc32(name.encode()), number))

    return _draw(size, part, video[-1], travelled)


def _draw(size: tuple[int, int], part: Part, index: int, travelled: float) -> tuple[np.ndarray, np.ndarray]:
    """Return image and scene ids: background first, then the things from the farthest to the nearest."""
    height, width = (side * _SUPERSAMPLING for side in size)
    large: Paint = (tram, bus, truck)[index % 3]
    generator = part("camera")
    camera = Camera(
        width=width,
        height=height,
        focal=min(width, 2 * height) * generator.uniform(0.72, 0.92),
        centre=width * generator.uniform(0.42, 0.58),
        horizon=height * generator.uniform(0.38, 0.48),
        eye=generator.uniform(1.25, 1.6),
        bend=generator.uniform(-0.0016, 0.0016),
        z=travelled,
    )
    street = _street(large is tram, part("street"))
    light, zenith = weather(part("weather"))
    canvas = Canvas(camera, light, *background(camera, street, light, zenith, part("background")))
    _skyline(canvas, part("skyline"))
    _roadsides(canvas, street, part)
    things = [
        *_furniture(street, part("furniture")),
        *_walkers(street, part("walkers")),
        *_traffic(street, large, part("traffic")),
    ]
    things = [thing.when(travelled) for thing in things]
    for number in _farthest_first(things):
        things[number].paint(canvas, things[number].pose, part("thing", number))
    generator = part("bonnet")
    if generator.random() < 0.6:
        _own_bonnet(canvas, generator)
    centres = slice(_SUPERSAMPLING // 2, None, _SUPERSAMPLING)
    ids = np.asarray(canvas.ids)[centres, centres].copy()
    pixels = np.asarray(canvas.image.reduce(_SUPERSAMPLING))
    pixels = camera_effects(pixels, GRAIN[ids], part("lens"), part("sensor", round(1000 * travelled)))
    if part("border").random() < 0.3:
        border = max(1, width // _SUPERSAMPLING // 128)
        ids[:, -border:], pixels[:, -border:] = ID["rectification border"], 0
    return pixels, ids


def _farthest_first(things: list[Thing]) -> list[int]:
    """Return the numbers of the things in painting order.

    The order is not by distance alone, because long things would then hide things beside them.
    """
    order = sorted(range(len(things)), key=lambda number: -things[number].span()[0])
    for long in [number for number in order if things[number].length]:
        others = [number for number in order if number != long]
        before = [number for number in others if things[number].behind(things[long])]
        order = [*before, long, *(number for number in others if not things[number].behind(things[long]))]
    return order


def _street(rails: bool, generator: np.random.Generator) -> Street:
    """Return a random street, with rails for a tram on the left or without."""
    lanes = 1 + int(generator.random() < 0.25), int(generator.random() < 0.25)
    parking = generator.random() < 0.4
    grass = [float(generator.uniform(0.8, 2.2)) if generator.random() < 0.7 else 0.0 for _ in range(2)]
    return Street(
        road=(_LANE * (lanes[0] + 0.5), _LANE * (lanes[1] + 0.5) + 0.6),
        beside=((_LANE, "rail track") if rails else (0.0, ""), (2.3, "parking") if parking else (0.0, "")),
        grass=(grass[0], grass[1]),
        sidewalk=(float(generator.uniform(1.8, 3.2)), float(generator.uniform(1.8, 3.2))),
        front=(float(generator.uniform(0.0, 3.0)), float(generator.uniform(0.0, 3.0))),
    )


def _skyline(canvas: Canvas, generator: np.random.Generator) -> None:
    """Paint tall buildings and trees far behind the end of the street."""
    for z in (110.0, 90.0):
        x = -90.0
        while x < 90:
            wide = generator.uniform(8, 18)
            if generator.random() < 0.6:
                tall = generator.uniform(6, 20)
                corners = [(0, 0, 0), (0, wide, 0), (0, wide, tall), (0, 0, tall)]
                canvas.polygon(Pose(x, z, 0).world(corners), choose(generator, FRONTS), ID["skyline"])
            else:
                leaves(canvas, (x + wide / 2, 2.5, z), (wide / 1.8, generator.uniform(3, 6)), generator, 14)
            x += wide


def _roadsides(canvas: Canvas, street: Street, part: Part) -> None:
    """Paint what lines both sides, the farthest first, with at least a wall on one side and a fence on the other."""
    first = int(part("roadsides").integers(2))
    for side in (0, 1):
        kinds = ("wall", "fence")[(side + first) % 2]
        stretches = _stretches(kinds, part("stretches", side))
        for number, stretch in reversed([*enumerate(stretches)]):
            _roadside(canvas, street, side, stretch, part(f"front {side}", number))


def _stretches(second: str, generator: np.random.Generator) -> list[tuple[str, float, float]]:
    """Return (kind, near, far) of the stretches along one side, nearest first.

    A building beside the camera is followed by one random stretch, one of kind `second`, and further random ones.
    """
    near = generator.uniform(3, 6)
    stretches: list[tuple[str, float, float]] = []
    while near < _FARTHEST:
        kind = str(generator.choice(["building", "wall", "fence", "hedge"], p=(0.55, 0.12, 0.15, 0.18)))
        far = near + generator.uniform(7, 13)
        stretches.append((second if len(stretches) == 1 else kind, near, far))
        near = far + (generator.uniform(0.5, 3) if generator.random() < 0.4 else 0)
    return [("building", 1.2, stretches[0][1] - 0.3), *stretches]


def _roadside(
    canvas: Canvas, street: Street, side: int, stretch: tuple[str, float, float], generator: np.random.Generator
) -> None:
    """Paint one stretch of a side of the street; walls, fences and hedges may have a building behind them."""
    sign, edge, (kind, near, far) = 2 * side - 1, street.back(side), stretch
    if kind == "building":
        building(canvas, sign, street.fronts(side), (near, far), generator)
        return
    if generator.random() < 0.4:
        building(canvas, sign, street.fronts(side) + 7, (near, far), generator)
    hedge(canvas, sign, edge + 1.2, (near, far), generator)
    if kind == "wall":
        wall(canvas, sign, edge, (near, far), generator)
    if kind == "fence":
        fence(canvas, sign, edge, (near, far), generator)


def _furniture(street: Street, generator: np.random.Generator) -> list[Thing]:
    """Return what stands between the road and the fronts: lamps, trees, signs, junction boxes, traffic lights."""
    things: list[Thing] = []
    for side in (0, 1):
        sign, kerb = 2 * side - 1, street.kerb(side)
        z, step = generator.uniform(6, 16), generator.uniform(11, 20)
        while z < _FARTHEST:
            things.append(Thing(lamp, Pose(sign * (kerb + 0.4), z, 0)))
            z += step
        if street.grass[side] > 0 or generator.random() < 0.4:
            z, step = generator.uniform(9, 20), generator.uniform(7, 14)
            while z < _FARTHEST:
                things.append(Thing(tree, Pose(sign * (kerb - street.grass[side] / 2 + 0.2), z, 0)))
                z += step * generator.uniform(0.8, 1.5)
        for _ in range(int(generator.integers(1, 4))):
            things.append(Thing(traffic_sign, Pose(sign * (kerb + 0.5), generator.uniform(6, 20), 0)))
        if generator.random() < 0.5:
            things.append(Thing(junction_box, Pose(sign * (street.back(side) - 0.5), generator.uniform(7, 20), 0)))
    crossing = generator.uniform(8, 15)
    for side in (0, 1):
        if side or generator.random() < 0.7:
            for far in (0.0, generator.uniform(8, 14)):
                things.append(Thing(traffic_light, Pose((2 * side - 1) * (street.kerb(side) + 0.3), crossing + far, 0)))
    return things


def _walkers(street: Street, generator: np.random.Generator) -> list[Thing]:
    """Return people on the sidewalks and sometimes on the road, and bicycles and motorcycles parked at the kerb."""
    things: list[Thing] = []

    def beside(nearest: float, farthest: float) -> tuple[float, float]:
        side = int(generator.integers(2))
        out = generator.uniform(street.kerb(side) + 0.3, street.back(side) - 0.2)
        return (2 * side - 1) * out, generator.uniform(nearest, farthest)

    for _ in range(int(generator.integers(3, 9))):
        things.append(Thing(person, Pose(*beside(7, 30), 0)))
    if generator.random() < 0.35:
        z = generator.uniform(9, 20)
        things += [
            Thing(person, Pose(generator.uniform(-2.5, 2.5), z, 0)) for _ in range(int(generator.integers(1, 4)))
        ]
    for vehicle in (bicycle, motorcycle):
        for _ in range(int(generator.integers(0, 3))):
            yaw = generator.uniform(0.3, 0.7) * np.pi + np.pi * generator.integers(2)
            things.append(Thing(partial(vehicle, ridden=False), Pose(*beside(6, 14), yaw)))
    return things


def _traffic(street: Street, large: Paint, generator: np.random.Generator) -> list[Thing]:
    """Return cars in all lanes, one large vehicle, riders at the edge, and parked cars."""
    things: list[Thing] = []
    oncoming = [-_LANE * (lane + 1) for lane in range(int(street.road[0] // _LANE))]
    same_way = [_LANE * lane for lane in range(1 + int(street.road[1] // _LANE))]
    if large is tram:
        things.append(Thing(tram, Pose(-street.road[0] - _LANE / 2, generator.uniform(8, 18), 0), 30.0))
        place = np.inf
    else:
        place = float(generator.choice([*oncoming, *same_way]))
    for x in (*oncoming, *same_way):
        turned = x < 0
        z = generator.uniform(7, 14) + (5 if x == 0 else 0)
        paint: Paint = large if x == place else car
        while z < _FARTHEST:
            # A vehicle extends ahead from its pose, so the pose of an oncoming one is at its far end.
            length = 4.5 if paint is car else 11.5
            pose = Pose(x + generator.uniform(-0.2, 0.2), z + (length if turned else 0), np.pi if turned else 0)
            things.append(Thing(paint, pose, speed=-0.5 if turned else 1.0))
            z += length + generator.uniform(5, 30)
            paint = car if generator.random() < 0.9 else truck
    if street.beside[1][1] == "parking":
        for slot in range(int(generator.integers(1, 3)), 10):
            if generator.random() < 0.65:
                things.append(Thing(car, Pose(street.road[1] + 1.15, 6.0 * slot + 0.8, 0), 4.5))
    for vehicle in (bicycle, motorcycle):
        for _ in range(int(generator.integers(1, 3))):
            across = generator.random() < 0.5
            yaw = generator.choice([0.5, -0.5]) * np.pi + generator.uniform(-0.6, 0.6) if across else 0.0
            x = generator.uniform(-street.road[0] + 1, street.road[1]) if across else street.road[1] - 0.6
            pose = Pose(float(x), generator.uniform(7, 15), float(yaw))
            things.append(Thing(partial(vehicle, ridden=True), pose, speed=0.0 if across else 1.0))
    return things


def _own_bonnet(canvas: Canvas, generator: np.random.Generator) -> None:
    """Paint the bonnet of the camera's own car at the lower edge ("ego vehicle")."""
    width, height = canvas.camera.width, canvas.camera.height
    top, grey = height * generator.uniform(0.88, 0.96), int(generator.integers(20, 70))
    box = (-0.1 * width, top, 1.1 * width, 2.2 * height - top)
    ImageDraw.Draw(canvas.image).ellipse(box, fill=(grey, grey, grey + 6))
    ImageDraw.Draw(canvas.ids).ellipse(box, fill=ID["ego vehicle"])
