"""Drawn street scenes in the Cityscapes folder layout: data for a first run, for tests and for a
demonstration.

Each picture looks from a driver's seat down a street of random course, width, traffic, weather and light. All
19 classes occur, and so do ids that are no class (ego vehicle, rectification border, static, parking, rail
track), as in the real files. A picture is a function of (seed, split, index) and the size.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ccgpu.train.datasets import IMAGE_SUFFIX, LABEL_SUFFIX
from ccgpu.train.scene_canvas import ID, Camera, Canvas, Frame, choose
from ccgpu.train.scene_ground import Street, background, photograph, weather
from ccgpu.train.scene_street import (
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
from ccgpu.train.scene_traffic import bicycle, bus, car, motorcycle, person, tram, truck

SETTINGS_FILE = "scenes.json"
DEFAULT_SPLITS = {"train": 200, "val": 40}

_VERSION = 1  # of the drawing: another one draws other pictures from the same seed
_SUPERSAMPLING = 2
_SMALLEST = 32  # pixels a side; below it a person ahead is not a pixel wide
_CITY = "drawn"
_FARTHEST = 60.0  # metres; what lies behind is a skyline
_LANE = 3.4  # metres

Paint = Callable[[Canvas, Frame, np.random.Generator], None]


class Thing(NamedTuple):
    """What stands where; ``length`` is how many metres it extends ahead of its frame, 0 for what is flat."""

    paint: Paint
    frame: Frame
    length: float = 0.0

    def span(self) -> tuple[float, float]:
        """Distance of its nearest and its farthest point in metres; a yaw of pi points at the camera."""
        near = self.frame.z - (self.length if abs(self.frame.yaw) == np.pi else 0)
        return near, near + self.length

    def behind(self, other: "Thing") -> bool:
        """Whether ``other`` can hide it: it is farther away, or stands beside ``other`` further outwards."""
        begin, (near, far) = self.span()[0], other.span()
        return begin >= far or (begin > near and abs(self.frame.x) > abs(other.frame.x))


def draw_scene(size: tuple[int, int], generator: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One street scene.

    Arguments:
        size: height and width in pixels.
        generator: decides everything else.
        index: number of the picture; three in a row show a tram, a bus and a truck.

    Returns:
        uint8 (H, W, 3) RGB and Cityscapes label ids uint8 (H, W).
    """
    height, width = (side * _SUPERSAMPLING for side in size)
    large: Paint = (tram, bus, truck)[index % 3]
    camera = Camera(
        width=width,
        height=height,
        focal=min(width, 2 * height) * generator.uniform(0.72, 0.92),
        centre=width * generator.uniform(0.42, 0.58),
        horizon=height * generator.uniform(0.38, 0.48),
        eye=generator.uniform(1.25, 1.6),
        bend=generator.uniform(-0.0016, 0.0016),
    )
    street = _street(large is tram, generator)
    light, zenith = weather(generator)
    canvas = Canvas(camera, light, *background(camera, street, light, zenith, generator))
    _skyline(canvas, generator)
    _roadsides(canvas, street, generator)
    things = _furniture(street, generator) + _walkers(street, generator) + _traffic(street, large, generator)
    for thing in _farthest_first(things):
        thing.paint(canvas, thing.frame, generator)
    if generator.random() < 0.6:
        _own_bonnet(canvas, generator)
    kept = slice(_SUPERSAMPLING // 2, None, _SUPERSAMPLING)
    ids = np.asarray(canvas.ids)[kept, kept].copy()
    pixels = photograph(np.asarray(canvas.image.reduce(_SUPERSAMPLING)), ids, generator)
    if generator.random() < 0.3:
        border = max(1, width // _SUPERSAMPLING // 128)
        ids[:, -border:], pixels[:, -border:] = ID["rectification border"], 0
    return pixels, ids


def _farthest_first(things: list[Thing]) -> list[Thing]:
    """Things in painting order. By distance alone, long vehicles would hide what stands at their sides."""
    order = sorted(things, key=lambda thing: -thing.span()[0])
    for long in [thing for thing in order if thing.length]:
        others = [thing for thing in order if thing is not long]
        before = [thing for thing in others if thing.behind(long)]
        order = [*before, long, *(thing for thing in others if not thing.behind(long))]
    return order


def _street(rails: bool, generator: np.random.Generator) -> Street:
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
    for z in (110.0, 90.0):
        x = -90.0
        while x < 90:
            wide = generator.uniform(8, 18)
            if generator.random() < 0.6:
                tall = generator.uniform(6, 20)
                corners = [(0, 0, 0), (0, wide, 0), (0, wide, tall), (0, 0, tall)]
                canvas.polygon(Frame(x, z, 0).world(corners), choose(generator, FRONTS), ID["building"])
            else:
                leaves(canvas, (x + wide / 2, 2.5, z), (wide / 1.8, generator.uniform(3, 6)), generator, 14)
            x += wide


def _roadsides(canvas: Canvas, street: Street, generator: np.random.Generator) -> None:
    """Fronts along both sides, the farthest first, with a wall on one side and a fence on the other."""
    first = int(generator.integers(2))
    for side in (0, 1):
        sign, edge = 2 * side - 1, street.back(side)
        near = generator.uniform(3, 6)
        stretches: list[tuple[str, float, float]] = []
        while near < _FARTHEST:
            kind = str(generator.choice(["building", "wall", "fence", "hedge"], p=(0.55, 0.12, 0.15, 0.18)))
            if len(stretches) == 1:
                kind = ("wall", "fence")[(side + first) % 2]
            far = near + generator.uniform(7, 13)
            stretches.append((kind, near, far))
            near = far + (generator.uniform(0.5, 3) if generator.random() < 0.4 else 0)
        stretches.insert(0, ("building", 1.2, stretches[0][1] - 0.3))
        for kind, near, far in reversed(stretches):
            if kind == "building":
                building(canvas, sign, street.fronts(side), (near, far), generator)
                continue
            if generator.random() < 0.4:
                building(canvas, sign, street.fronts(side) + 7, (near, far), generator)
            hedge(canvas, sign, edge + 1.2, (near, far), generator)
            if kind == "wall":
                wall(canvas, sign, edge, (near, far), generator)
            if kind == "fence":
                fence(canvas, sign, edge, (near, far), generator)


def _furniture(street: Street, generator: np.random.Generator) -> list[Thing]:
    """What stands between road and fronts."""
    things: list[Thing] = []
    for side in (0, 1):
        sign, kerb = 2 * side - 1, street.kerb(side)
        z, step = generator.uniform(6, 16), generator.uniform(11, 20)
        while z < _FARTHEST:
            things.append(Thing(lamp, Frame(sign * (kerb + 0.4), z, 0)))
            z += step
        if street.grass[side] > 0 or generator.random() < 0.4:
            z, step = generator.uniform(9, 20), generator.uniform(7, 14)
            while z < _FARTHEST:
                things.append(Thing(tree, Frame(sign * (kerb - street.grass[side] / 2 + 0.2), z, 0)))
                z += step * generator.uniform(0.8, 1.5)
        for _ in range(int(generator.integers(1, 4))):
            things.append(Thing(traffic_sign, Frame(sign * (kerb + 0.5), generator.uniform(6, 20), 0)))
        if generator.random() < 0.5:
            things.append(Thing(junction_box, Frame(sign * (street.back(side) - 0.5), generator.uniform(7, 20), 0)))
    crossing = generator.uniform(8, 15)
    for side in (0, 1):
        if side or generator.random() < 0.7:
            for far in (0.0, generator.uniform(8, 14)):
                things.append(
                    Thing(traffic_light, Frame((2 * side - 1) * (street.kerb(side) + 0.3), crossing + far, 0))
                )
    return things


def _walkers(street: Street, generator: np.random.Generator) -> list[Thing]:
    """People on the sidewalks and now and then on the road, and bicycles and motorcycles left at the kerb."""
    things: list[Thing] = []

    def beside(nearest: float, farthest: float) -> tuple[float, float]:
        side = int(generator.integers(2))
        out = generator.uniform(street.kerb(side) + 0.3, street.back(side) - 0.2)
        return (2 * side - 1) * out, generator.uniform(nearest, farthest)

    for _ in range(int(generator.integers(3, 9))):
        things.append(Thing(person, Frame(*beside(7, 30), 0)))
    if generator.random() < 0.35:
        z = generator.uniform(9, 20)
        things += [
            Thing(person, Frame(generator.uniform(-2.5, 2.5), z, 0)) for _ in range(int(generator.integers(1, 4)))
        ]
    for vehicle in (bicycle, motorcycle):
        for _ in range(int(generator.integers(0, 3))):
            yaw = generator.uniform(0.3, 0.7) * np.pi + np.pi * generator.integers(2)
            things.append(Thing(partial(vehicle, ridden=False), Frame(*beside(6, 14), yaw)))
    return things


def _traffic(street: Street, large: Paint, generator: np.random.Generator) -> list[Thing]:
    """Cars in all lanes, one large vehicle, riders at the edge, parked cars."""
    things: list[Thing] = []
    oncoming = [-_LANE * (lane + 1) for lane in range(int(street.road[0] // _LANE))]
    same_way = [_LANE * lane for lane in range(1 + int(street.road[1] // _LANE))]
    if large is tram:
        things.append(Thing(tram, Frame(-street.road[0] - _LANE / 2, generator.uniform(8, 18), 0), 30.0))
        place = np.inf
    else:
        place = float(generator.choice([*oncoming, *same_way]))
    for x in (*oncoming, *same_way):
        turned = x < 0
        z = generator.uniform(7, 14) + (5 if x == 0 else 0)
        paint: Paint = large if x == place else car
        while z < _FARTHEST:
            # A frame is the rear of a vehicle: one that comes towards the camera begins at its far end.
            length = 4.5 if paint is car else 11.5
            frame = Frame(x + generator.uniform(-0.2, 0.2), z + (length if turned else 0), np.pi if turned else 0)
            things.append(Thing(paint, frame))
            z += length + generator.uniform(5, 30)
            paint = car if generator.random() < 0.9 else truck
    if street.beside[1][1] == "parking":
        for slot in range(int(generator.integers(1, 3)), 10):
            if generator.random() < 0.65:
                things.append(Thing(car, Frame(street.road[1] + 1.15, 6.0 * slot + 0.8, 0), 4.5))
    for vehicle in (bicycle, motorcycle):
        for _ in range(int(generator.integers(1, 3))):
            across = generator.random() < 0.5
            yaw = generator.choice([0.5, -0.5]) * np.pi + generator.uniform(-0.6, 0.6) if across else 0.0
            x = generator.uniform(-street.road[0] + 1, street.road[1]) if across else street.road[1] - 0.6
            things.append(Thing(partial(vehicle, ridden=True), Frame(float(x), generator.uniform(7, 15), float(yaw))))
    return things


def _own_bonnet(canvas: Canvas, generator: np.random.Generator) -> None:
    """The bonnet of the camera's own car at the lower edge ("ego vehicle")."""
    width, height = canvas.camera.width, canvas.camera.height
    top, grey = height * generator.uniform(0.88, 0.96), int(generator.integers(20, 70))
    box = (-0.1 * width, top, 1.1 * width, 2.2 * height - top)
    ImageDraw.Draw(canvas.image).ellipse(box, fill=(grey, grey, grey + 6))
    ImageDraw.Draw(canvas.ids).ellipse(box, fill=ID["ego vehicle"])


def write_scenes(
    root: str | Path,
    *,
    splits: Mapping[str, int] | None = None,
    size: tuple[int, int] = (256, 512),
    seed: int = 0,
) -> Path:
    """Write drawn street scenes as a data set in the Cityscapes folder layout.

    The folder appears whole or not at all: it is written under another name beside ``root`` and renamed at
    the end. A ``root`` that already holds the scenes of the same settings is left as it is. Licence plates,
    whose id -1 no file can hold, keep the id of their vehicle, as in the real files.

    Arguments:
        root: the folder to write, absent, empty or with the same scenes.
        splits: number of pictures of each split, at least 1; 200 "train" and 40 "val" by default.
        size: height and width in pixels, each 32 or more.
        seed: 0 or more; another seed gives other pictures.

    Returns:
        ``root`` as a Path.

    Raises:
        ValueError: an argument out of its range, or a ``root`` that holds something else.
        OSError: the folder cannot be written; nothing is left of it.
    """
    root = Path(root)
    splits = {split: int(number) for split, number in (DEFAULT_SPLITS if splits is None else splits).items()}
    if not splits or not all(name.isidentifier() for name in splits) or min(splits.values()) < 1:
        raise ValueError(
            f"write_scenes: splits must name at least one split with 1 or more pictures, got {splits}; "
            'give for example {"train": 200, "val": 40}.'
        )
    if len(size) != 2 or min(size) < _SMALLEST:
        raise ValueError(
            f"write_scenes: size must be (height, width) of {_SMALLEST} or more, got {size}; draw larger pictures."
        )
    if seed < 0:
        raise ValueError(f"write_scenes: seed must be 0 or more, got {seed}; choose another.")
    settings = {
        "version": _VERSION,
        "splits": splits,
        "size": [int(side) for side in size],
        "seed": int(seed),
    }
    if _holds(root, settings):
        return root
    unfinished = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        for split, number in splits.items():
            _write_split(unfinished, split, number, size, seed)
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        try:
            unfinished.rename(root)
        except OSError:
            if not _holds(root, settings):  # another process may have written the same scenes meanwhile
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _holds(root: Path, settings: dict[str, Any]) -> bool:
    """Whether ``root`` has these scenes; False where it is absent or empty, ValueError for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        found = "no drawn scenes"
    if found != settings:
        raise ValueError(
            f"write_scenes: root must be empty or hold the scenes {settings}, got {found} in {root}; "
            "give another folder or remove this one."
        )
    return True


def _write_split(root: Path, split: str, number: int, size: tuple[int, int], seed: int) -> None:
    images, labels = root / "leftImg8bit" / split / _CITY, root / "gtFine" / split / _CITY
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for index in range(number):
        generator = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
        pixels, ids = draw_scene(size, generator, index)
        name = f"{_CITY}_{index:06d}_000019"  # in the real clips too, frame 19 is the labelled one
        Image.fromarray(pixels).save(images / f"{name}{IMAGE_SUFFIX}")
        Image.fromarray(ids).save(labels / f"{name}{LABEL_SUFFIX}")
