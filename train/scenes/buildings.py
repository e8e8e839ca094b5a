"""Painting the sides of a synthetic street: buildings, walls, fences, hedges, trees, lamps, traffic lights, signs.

Long things are placed by `side` (-1 left, 1 right), `front` (metres from the middle of the street) and `stretch` (where
they begin and end, in metres ahead), single things by a pose.
"""

import numpy as np

from ccgpu.train.scenes.canvas import ID, Canvas, Colour, Pose, bar, choose, darker, disc, facing

_GLASS: Colour = (58, 68, 80)
_LEAVES: tuple[Colour, ...] = ((70, 104, 44), (58, 92, 50), (92, 112, 42), (46, 76, 40), (116, 108, 48))
FRONTS: tuple[Colour, ...] = (
    *((176, 160, 136), (150, 88, 70), (198, 188, 168), (128, 124, 122), (166, 140, 110), (204, 176, 130)),
    *((116, 96, 84), (182, 184, 186), (140, 150, 156)),
)
_ROOFS: tuple[Colour, ...] = ((122, 62, 48), (84, 80, 84), (104, 74, 60))
_WALLS: tuple[Colour, ...] = ((150, 148, 142), (142, 92, 74), (170, 162, 144), (112, 110, 108))
_METAL: tuple[Colour, ...] = ((112, 114, 116), (84, 88, 90), (134, 134, 130), (70, 82, 74))
_SIGN_RED, _SIGN_BLUE, _SIGN_YELLOW, _WHITE = (198, 26, 34), (28, 78, 168), (240, 196, 30), (238, 238, 234)


def building(
    canvas: Canvas, side: int, front: float, stretch: tuple[float, float], generator: np.random.Generator
) -> None:
    """Paint a house with storeys of windows, a ground floor of shops or doors, and a flat or pitched roof."""
    label, paint = ID["building"], choose(generator, FRONTS)
    near, far = stretch
    storey, storeys = generator.uniform(2.9, 3.4), int(generator.integers(2, 7))
    height, deep = storey * (storeys + 0.4), 11.0
    pose = Pose(side * (front + deep / 2), near, 0)
    faces = canvas.box(pose, (0, far - near), deep / 2, (0, height), paint, label)
    if generator.random() < 0.5:
        roof = choose(generator, _ROOFS)
        canvas.box(pose, (0, far - near), deep / 2 + 0.3, (height, height + 2.6), roof, label, taper=(0, 0, 4))
    glass = darker(_GLASS, generator.uniform(0.7, 1.6))
    frame_colour = darker(paint, generator.choice([0.7, 1.25]))
    share = generator.uniform(0.28, 0.38)
    levels = storeys + 0.4
    for face in faces.values():
        columns = max(1, round(float(np.linalg.norm(face[1] - face[0])) / generator.uniform(2.2, 3.0)))
        row, column = (index.ravel() for index in np.mgrid[:storeys, :columns])
        half = np.where(row == 0, 0.42, share)  # shop windows below
        low, high = np.where(row == 0, 0.02, (row + 0.28) / levels), (row + 0.82) / levels
        windows = np.stack([(column + 0.5 - half) / columns, (column + 0.5 + half) / columns, low, high], axis=1)
        bright = np.where(generator.random(len(row)) < 0.8, 1.0, 2.0)[:, None]
        border = np.array([-0.06 / columns, 0.06 / columns, -0.006, 0.006])
        canvas.details(face, np.array([(0, 1, 0.97, 1), (0, 1, 0, 0.8 / levels)]), darker(paint, 0.78))
        canvas.details(face, windows[row > 0] + border, frame_colour)
        canvas.details(face, windows, np.array(glass) * bright)


def wall(canvas: Canvas, side: int, front: float, stretch: tuple[float, float], generator: np.random.Generator) -> None:
    """Paint a wall of 1.6 to 3 m with courses of stone and a coping."""
    label, paint = ID["wall"], choose(generator, _WALLS)
    near, far = stretch
    height, courses = generator.uniform(1.6, 3.0), int(generator.integers(4, 8))
    pose = Pose(side * (front + 0.2), near, 0)
    for face in canvas.box(pose, (0, far - near), 0.2, (0, height), paint, label).values():
        rows = np.arange(1, courses)[:, None] / courses
        columns = max(1, round(float(np.linalg.norm(face[1] - face[0])) / 1.6))
        joints = np.arange(1, columns)[:, None] / columns
        canvas.details(face, rows * (0, 0, 1, 1) + (0, 1, -0.015, 0.015), darker(paint, 0.62))
        canvas.details(face, joints * (1, 1, 0, 0) + (-0.02 / columns, 0.02 / columns, 0, 1), darker(paint, 0.66))
        canvas.details(face, np.array((0, 1, 0.92, 1)), darker(paint, 1.2))


def fence(
    canvas: Canvas, side: int, front: float, stretch: tuple[float, float], generator: np.random.Generator
) -> None:
    """Paint a fence of bars; gaps between the bars have the fence's id as well, as in the real label files."""
    label, paint = ID["fence"], choose(generator, (*_METAL, (130, 92, 60), (206, 202, 194)))
    (near, far), height = stretch, generator.uniform(1.2, 2.2)
    x = side * front
    face = np.array([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)])
    canvas.polygon(face, None, label)
    bars = max(2, round((far - near) / 0.45))
    middle = np.arange(bars + 1)[:, None] / bars
    half = np.where(np.arange(bars + 1) % 6 == 0, 0.08, 0.035)[:, None] / (far - near)
    posts = (middle + half * (-1, 1, 0, 0)).clip(0, 1)
    posts[:, 2:] = 0, 1
    rails = np.array([(0, 1, level, level + 0.06) for level in (0.12, 0.5, 0.86)])
    canvas.details(face, np.concatenate([posts, rails]), paint)


def leaves(
    canvas: Canvas,
    place: tuple[float, float, float],
    radius: tuple[float, float],
    generator: np.random.Generator,
    number: int = 34,
    name: str = "vegetation",
) -> None:
    """Paint a cloud of leaves around (x, y, z), darker below and brighter towards the sun."""
    label, paint = ID[name], choose(generator, _LEAVES, 0.25)
    x, y, z = place
    where = facing(x, z)
    number = max(6, round(number * min(1.0, 16 / z)))  # far away, a leaf is smaller than a pixel
    wide, high = radius
    canvas.polygon(where.upright(disc((0, y), 0.85 * wide, high / wide)), darker(paint, 0.55), label)
    angle, far = generator.uniform(0, 2 * np.pi, number), np.sqrt(generator.uniform(0, 1, number))
    right, up = far * np.cos(angle), far * np.sin(angle)
    size = generator.uniform(0.16, 0.34, number)
    order = np.argsort(up)
    right, up, size = right[order], up[order], size[order]
    light = (0.8 + 0.35 * up + 0.2 * canvas.light.sun * right) * generator.uniform(0.85, 1.2, number)
    centres = np.stack([right * wide, y + up * high], axis=1)
    shapes = disc((0, 0), wide, 0.9, 9) * size[:, None, None] + centres[:, None]
    canvas.polygons(where.upright(shapes), np.array(paint) * light[:, None], label)


def tree(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a tree of 4 to 8 m; trunk and crown are vegetation."""
    crown, wide = generator.uniform(3.2, 5.2), generator.uniform(1.3, 2.4)
    place = facing(pose.x, pose.z)
    trunk = bar((0, 0), (generator.uniform(-0.3, 0.3), crown), generator.uniform(0.22, 0.4))
    canvas.shadow(pose, -0.8 * wide, 0.8 * wide, wide)
    canvas.polygon(place.upright(trunk), (82, 66, 50), ID["vegetation"])
    leaves(canvas, (pose.x, crown, pose.z), (wide, wide * generator.uniform(0.8, 1.2)), generator)


def hedge(
    canvas: Canvas, side: int, front: float, stretch: tuple[float, float], generator: np.random.Generator
) -> None:
    """Paint bushes and small trees along a stretch, the farthest first."""
    z, near = stretch[1], stretch[0]
    while z > near:
        high = generator.uniform(0.9, 2.4)
        x = side * (front + generator.uniform(0.6, 1.6))
        leaves(canvas, (x, 0.75 * high, z), (generator.uniform(0.9, 1.5), 0.85 * high), generator, 18, "hedge")
        z -= generator.uniform(0.9, 1.7) * (1 + z / 40)


def lamp(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a street lamp of 5 to 7 m whose arm reaches towards the road."""
    label, paint = ID["street lamp"], choose(generator, _METAL)
    place, height = facing(pose.x, pose.z), generator.uniform(5, 7)
    reach = -np.sign(pose.x) * generator.uniform(0.8, 1.8)
    canvas.polygon(place.upright(bar((0, 0), (0, height), 0.2)), paint, label)
    canvas.polygon(place.upright(bar((0.05, 0), (0.05, height), 0.07)), darker(paint, 1.35), label)
    canvas.polygon(place.upright(bar((0, height), (reach, height + 0.3), 0.12)), paint, label)
    canvas.polygon(place.upright(bar((reach, height + 0.28), (1.5 * reach, height + 0.3), 0.2)), _WHITE, label)


def traffic_light(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a traffic light on its pole, with one of its three lamps lit."""
    label, paint = ID["traffic light"], choose(generator, _METAL)
    place, low = facing(pose.x, pose.z), generator.uniform(2.0, 2.6)
    tall = generator.uniform(1.05, 1.3)
    canvas.polygon(place.upright(bar((0, 0), (0, low + 1.2 * tall), 0.17)), paint, ID["pole"])
    for half, colour in ((0.27, darker(_WHITE, 0.8)), (0.23, (26, 28, 28))):
        edge = half - 0.23
        shape = [
            (-half, low - edge),
            (half, low - edge),
            (half, low + tall + edge),
            (-half, low + tall + edge),
        ]
        canvas.polygon(place.upright(shape), colour, label)
    lit = int(generator.integers(3))
    for index, lamp_colour in enumerate(((66, 240, 130), (255, 190, 40), (255, 50, 40))):
        colour = lamp_colour if index == lit else darker(lamp_colour, 0.22)
        canvas.polygon(place.upright(disc((0, low + tall * (index + 0.5) / 3), 0.15)), colour, label)


def traffic_sign(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a traffic sign on its pole: prohibition, warning, stop, priority, crossing or direction."""
    label = ID["traffic sign"]
    place, middle = facing(pose.x, pose.z), generator.uniform(2.2, 2.7)
    size = generator.uniform(0.42, 0.55)
    canvas.polygon(place.upright(bar((0, 0), (0, middle + size), 0.12)), choose(generator, _METAL), ID["pole"])

    def draw(shape: np.ndarray, colour: Colour) -> None:
        canvas.polygon(place.upright(shape), colour, label)

    triangle = np.array([(-1, -0.75), (1, -0.75), (0, 1.0)])
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    octagon = disc((0, 0), 1.05, corners=8)
    up = np.array([0, middle])
    kind = int(generator.integers(6))
    if kind == 0:
        draw(disc((0, middle), size), _SIGN_RED)
        draw(disc((0, middle), 0.72 * size), _WHITE)
        draw(up + 0.3 * size * square * (1, 0.8), (30, 30, 30))
    elif kind == 1:
        draw(up + 1.15 * size * triangle, _SIGN_RED)
        draw(up + 0.75 * size * triangle, _WHITE)
    elif kind == 2:
        draw(up + size * octagon, _SIGN_RED)
        draw(up + 0.7 * size * square * (1, 0.28), _WHITE)
    elif kind == 3:
        draw(disc((0, middle), 1.1 * size, corners=4), _WHITE)
        draw(disc((0, middle), 0.8 * size, corners=4), _SIGN_YELLOW)
    elif kind == 4:
        draw(up + 0.9 * size * square, _SIGN_BLUE)
        draw(up + 0.6 * size * triangle, _WHITE)
    else:
        draw(up + size * square * (1.9, 1.0), choose(generator, (_SIGN_BLUE, (20, 110, 70), _SIGN_YELLOW)))
        for row in (-0.4, 0.35):
            draw(up + size * (square * (1.4, 0.16) + (0, row)), _WHITE)


def junction_box(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a junction box: "static", which counts neither in the loss nor in the evaluation."""
    paint = choose(generator, ((70, 84, 74), (96, 98, 100), (176, 110, 40)))
    canvas.box(pose, (0, 0.5), 0.3, (0, generator.uniform(0.8, 1.4)), paint, ID["static"])
