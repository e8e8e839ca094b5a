"""Painting the traffic of a synthetic street scene: vehicles, pedestrians and riders.

Each function paints one thing at a pose. Sizes are those of real things in metres; colours and proportions are random.
"""

import numpy as np

from ccgpu.train.scenes.canvas import ID, Canvas, Colour, Pose, bar, choose, darker, disc, facing, patch, ring

_GLASS: Colour = (42, 52, 62)
_TYRE: Colour = (22, 22, 24)
_PAINTS: tuple[Colour, ...] = (
    *((235, 235, 238), (190, 194, 198), (120, 124, 130), (60, 62, 68), (28, 28, 32), (165, 24, 28)),
    *((24, 52, 118), (40, 96, 62), (196, 160, 60), (120, 70, 44), (92, 132, 168)),
)
CLOTHES: tuple[Colour, ...] = (
    *(
        (34, 36, 44),
        (60, 70, 96),
        (140, 36, 40),
        (212, 204, 192),
        (70, 92, 60),
        (150, 118, 84),
        (28, 90, 140),
    ),
    *((196, 140, 40), (120, 80, 130)),
)
SKINS: tuple[Colour, ...] = ((226, 184, 154), (196, 146, 112), (132, 90, 66), (88, 60, 44))


def _wheels(canvas: Canvas, faces: dict[str, np.ndarray], length: float, radius: float, label: int) -> None:
    """Paint two wheels on each visible side, and the tyres' treads at the visible end."""
    for name in ("left", "right"):
        if name not in faces:
            continue
        base, across = faces[name][0], (faces[name][1] - faces[name][0]) / length
        for place in (0.18 * length, 0.80 * length):
            for size, colour in ((radius, _TYRE), (0.55 * radius, (128, 130, 134))):
                shape = disc((place, radius), size)
                points = base + shape[:, :1] * across + np.array([[0.0, 1.0, 0.0]]) * shape[:, 1:]
                points[:, 1] = shape[:, 1]
                canvas.polygon(points, colour, label)
    for name in ("rear", "front"):
        if name in faces:
            for left in (0.04, 0.80):
                wheel = patch(faces[name], left, left + 0.16, 0, 1)
                wheel[2:, 1], wheel[:2, 1] = faces[name][0, 1] + 0.05, 0.0
                canvas.polygon(wheel, _TYRE, label)


def _ends(canvas: Canvas, faces: dict[str, np.ndarray], label: int, level: float, height: float) -> None:
    """Paint lamps and licence plate at the visible end; the plate has the vehicle's id, as in the real label files."""
    for name, lamp in (("rear", (208, 28, 24)), ("front", (250, 246, 220))):
        if name in faces:
            face = faces[name]
            for left in (0.04, 0.78):
                canvas.details(face, np.array((left, left + 0.18, level, level + height)), lamp)
            canvas.details(face, np.array((0.37, 0.63, level - 0.6 * height, level)), (224, 224, 214))


def _window_band(canvas: Canvas, face: np.ndarray, low: float, high: float, number: int, gap: float = 0.12) -> None:
    """Paint `number` windows side by side from `low` to `high`, in fractions of the face's height."""
    left, right = (np.arange(number) + gap) / number, (np.arange(number) + 1 - gap) / number
    level = np.ones(number)
    canvas.details(face, np.stack([left, right, low * level, high * level], axis=1), _GLASS)
    canvas.details(
        face,
        np.stack([left, (left + right) / 2, (low + high) / 2 * level, high * level], axis=1),
        (58, 72, 84),
    )


def car(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a saloon, an estate or a van, 3.9 to 4.8 m long."""
    label, paint = ID["car"], choose(generator, _PAINTS)
    length, half = generator.uniform(3.9, 4.8), generator.uniform(0.84, 0.94)
    waist, roof = generator.uniform(0.82, 0.95), generator.uniform(1.42, 1.6)
    boot = generator.uniform(0.0, 0.8)
    if generator.random() < 0.2:
        roof, boot, label = 2.0, 0.0, ID["van"]
    canvas.shadow(pose, 0, length, half + 0.1)
    canvas.box(pose, (0.1, length - 0.1), half - 0.12, (0.12, 0.35), _TYRE, label)
    body = canvas.box(pose, (0, length), half, (0.3, waist), paint, label, taper=(0.05, 0.1, 0.04))
    cabin = canvas.box(pose, (boot, length - 1.1), half - 0.06, (waist, roof), paint, label, taper=(0.35, 0.6, 0.16))
    for name, face in cabin.items():
        if name in ("left", "right"):
            _window_band(canvas, face, 0.12, 0.86, 2, 0.05)
        else:
            canvas.details(face, np.array((0.08, 0.92, 0.12, 0.88)), _GLASS)
    _wheels(canvas, body, length, 0.33, label)
    _ends(canvas, body, label, 0.55, 0.28)


def truck(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a truck with a cab and a closed cargo box, 6.5 to 9.5 m long, 3.2 to 3.8 m high."""
    label, paint = ID["truck"], choose(generator, _PAINTS)
    length, height = generator.uniform(6.5, 9.5), generator.uniform(3.2, 3.8)
    load: Colour = choose(generator, ((228, 228, 224), (196, 188, 170), (70, 96, 140), (150, 60, 50), (208, 176, 84)))
    cab = length - 1.9
    canvas.shadow(pose, 0, length, 1.3)

    def draw_cab() -> None:
        faces = canvas.box(pose, (cab + 0.15, length), 1.15, (0.5, 2.6), paint, label, taper=(0, 0.25, 0.05))
        for name, face in faces.items():
            if name != "rear":
                canvas.details(face, np.array((0.12, 0.88, 0.52, 0.9)), _GLASS)
        _ends(canvas, faces, label, 0.12, 0.14)

    def draw_load() -> None:
        canvas.box(pose, (0.1, cab), 1.0, (0.25, 0.9), (50, 50, 54), label)
        faces = canvas.box(pose, (0, cab), 1.25, (0.9, height), load, label)
        if "rear" in faces:
            face = faces["rear"]
            canvas.details(face, np.array((0.49, 0.51, 0.04, 0.96)), darker(load, 0.5))
            for left in (0.03, 0.83):
                canvas.details(face, np.array((left, left + 0.14, -0.08, -0.01)), (208, 28, 24))
        for name in faces.keys() & {"left", "right"}:
            canvas.details(faces[name], np.array((0.2, 0.8, 0.4, 0.7)), choose(generator, _PAINTS))
        _wheels(canvas, faces, cab, 0.48, label)

    # The part that is farther away is painted first.
    away = np.cos(pose.yaw) > 0
    for part in (draw_cab, draw_load) if away else (draw_load, draw_cab):
        part()


def bus(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a city bus, 9 to 12 m long, with a band of windows and a lit destination."""
    label = ID["bus"]
    paint = choose(generator, ((186, 34, 32), (224, 182, 40), (44, 94, 158), (226, 226, 222), (70, 130, 80)))
    length = generator.uniform(9, 12)
    canvas.shadow(pose, 0, length, 1.35)
    canvas.box(pose, (0.1, length - 0.1), 1.1, (0.1, 0.4), _TYRE, label)
    faces = canvas.box(pose, (0, length), 1.25, (0.35, 3.05), paint, label, taper=(0.05, 0.1, 0.06))
    for name in faces.keys() & {"left", "right"}:
        _window_band(canvas, faces[name], 0.42, 0.84, 7, 0.05)
        canvas.details(faces[name], np.array((0, 1, 0.0, 0.1)), darker(paint, 0.55))
    for name in faces.keys() & {"rear", "front"}:
        canvas.details(faces[name], np.array((0.07, 0.93, 0.4, 0.78)), _GLASS)
        canvas.details(faces[name], np.array((0.22, 0.78, 0.83, 0.94)), (24, 24, 24))
        canvas.details(faces[name], np.array((0.3, 0.7, 0.86, 0.91)), (250, 180, 50))
    _wheels(canvas, faces, length, 0.48, label)
    _ends(canvas, faces, label, 0.16, 0.1)


def tram(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a tram, 18 to 30 m long, in a light colour with a stripe and a current collector."""
    label = ID["train"]
    paint = choose(generator, ((232, 228, 214), (214, 214, 218), (228, 214, 170)), 0.05)
    stripe = choose(generator, ((196, 24, 30), (20, 90, 60), (26, 60, 140)))
    length = generator.uniform(18, 30)
    canvas.shadow(pose, 0, length, 1.3)
    canvas.box(pose, (0.2, length - 0.2), 1.0, (0.1, 0.5), (52, 52, 56), label)
    faces = canvas.box(pose, (0, length), 1.25, (0.45, 3.4), paint, label, taper=(0.5, 0.5, 0.14))
    for name, face in faces.items():
        canvas.details(face, np.array((0, 1, 0.02, 0.24)), stripe)
        canvas.details(face, np.array((0, 1, 0.88, 0.96)), stripe)
        if name in ("left", "right"):
            _window_band(canvas, face, 0.4, 0.82, 12, 0.08)
        else:
            canvas.details(face, np.array((0.1, 0.9, 0.36, 0.82)), _GLASS)
            for left in (0.1, 0.78):
                canvas.details(face, np.array((left, left + 0.12, 0.1, 0.18)), (250, 240, 200))
    roof = pose.world(
        [(length / 2, -0.6, 3.4), (length / 2, 0.6, 3.4), (length / 2, 0.1, 4.4), (length / 2, -0.1, 4.4)]
    )
    canvas.polygon(roof, (70, 70, 74), label)


def person(canvas: Canvas, pose: Pose, generator: np.random.Generator) -> None:
    """Paint a person who walks or stands, 1.5 to 1.95 m tall."""
    label, size = ID["person"], generator.uniform(0.85, 1.1)
    coat, trousers = choose(generator, CLOTHES), choose(generator, CLOTHES)
    skin, stride = choose(generator, SKINS), generator.uniform(0.05, 0.34)
    place = facing(pose.x, pose.z)
    canvas.shadow(pose, -0.2, 0.2, 0.3 * size)

    def draw(shape: np.ndarray, colour: Colour) -> None:
        canvas.polygon(place.upright(shape * size), colour, label)

    for side, shade in ((-1, 0.8), (1, 1.0)):
        draw(bar((0.07 * side, 0.85), (stride * side, 0.05), 0.2), darker(trousers, shade))
        draw(bar((0.22 * side, 1.4), ((0.26 + 0.4 * stride) * side, 0.82), 0.13), darker(coat, 0.85 * shade))
    draw(np.array([(-0.2, 0.78), (0.2, 0.78), (0.27, 1.42), (0.12, 1.5), (-0.12, 1.5), (-0.27, 1.42)]), coat)
    draw(disc((0, 1.62), 0.12, 1.25), skin)
    draw(
        disc((0, 1.7), 0.12, 0.75),
        choose(generator, ((40, 30, 24), (96, 70, 40), (150, 130, 90), (60, 60, 64))),
    )


def _sitting(canvas: Canvas, pose: Pose, seat: float, reach: float, generator: np.random.Generator) -> None:
    """Paint a rider seen from the side, with a seat `seat` metres high and a handlebar `reach` metres ahead of it."""
    label, coat, trousers = ID["rider"], choose(generator, CLOTHES), choose(generator, CLOTHES)
    shoulder = (0.3 * reach + 0.1, seat + 0.58)
    for shape, colour in (
        (bar((0.0, seat), (0.36, seat - 0.25), 0.2), trousers),
        (bar((0.36, seat - 0.25), (0.16, seat - 0.66), 0.15), trousers),
        (bar((-0.05, seat - 0.02), shoulder, 0.34), coat),
        (bar(shoulder, (reach, seat + 0.15), 0.13), darker(coat, 0.85)),
        (disc((shoulder[0] + 0.08, shoulder[1] + 0.2), 0.13, 1.2), choose(generator, SKINS)),
        (disc((shoulder[0] + 0.07, shoulder[1] + 0.27), 0.15, 0.8), choose(generator, _PAINTS)),
    ):
        canvas.polygon(pose.upright(shape), colour, label)


def _from_behind(canvas: Canvas, pose: Pose, seat: float, generator: np.random.Generator) -> None:
    """Paint a rider seen from behind, with a seat `seat` metres high."""
    label, coat, trousers = ID["rider"], choose(generator, CLOTHES), choose(generator, CLOTHES)
    place = facing(pose.x, pose.z)
    for side in (-1, 1):
        canvas.polygon(place.upright(bar((0.1 * side, seat), (0.16 * side, seat - 0.6), 0.17)), trousers, label)
        canvas.polygon(place.upright(bar((0.2 * side, seat + 0.55), (0.32 * side, seat + 0.15), 0.13)), coat, label)
    back = [
        (-0.2, seat - 0.05),
        (0.2, seat - 0.05),
        (0.25, seat + 0.55),
        (0.1, seat + 0.64),
        (-0.1, seat + 0.64),
    ]
    canvas.polygon(place.upright([*back, (-0.25, seat + 0.55)]), coat, label)
    canvas.polygon(place.upright(disc((0, seat + 0.78), 0.13, 1.2)), choose(generator, _PAINTS), label)


def bicycle(canvas: Canvas, pose: Pose, generator: np.random.Generator, *, ridden: bool) -> None:
    """Paint a bicycle, seen from the side or, at a yaw near 0, from behind; with its rider or alone."""
    label, paint = ID["bicycle"], choose(generator, _PAINTS)
    canvas.shadow(pose, -0.8, 0.8, 0.15)
    if abs(np.sin(pose.yaw)) < 0.4:
        place = facing(pose.x, pose.z)
        canvas.polygon(place.upright(disc((0, 0.36), 0.09, 4.0)), _TYRE, label)
        canvas.polygon(place.upright(bar((-0.3, 1.0), (0.3, 1.0), 0.07)), (60, 60, 64), label)
        canvas.polygon(place.upright(bar((0, 0.4), (0, 1.0), 0.1)), paint, label)
        if ridden:
            _from_behind(canvas, pose, 0.95, generator)
        return
    for centre in (-0.52, 0.52):
        canvas.polygon(pose.upright(disc((centre, 0.35), 0.36)), None, label)
        canvas.polygon(pose.upright(ring((centre, 0.35), 0.36, 0.07)), _TYRE, label)
        for angle in (0.3, 1.35, 2.4):
            spoke = 0.33 * np.cos(angle), 0.33 * np.sin(angle)
            ends = (centre - spoke[0], 0.35 - spoke[1]), (centre + spoke[0], 0.35 + spoke[1])
            canvas.polygon(pose.upright(bar(*ends, 0.02)), (130, 130, 134), label)
    crank, saddle, head = (-0.05, 0.33), (-0.2, 0.9), (0.36, 0.88)
    joints = (
        (crank, saddle),
        (crank, head),
        (saddle, head),
        ((-0.52, 0.35), crank),
        ((0.52, 0.35), (0.33, 1.02)),
    )
    for start, end in (*joints, ((-0.52, 0.35), saddle)):
        canvas.polygon(pose.upright(bar(start, end, 0.07)), paint, label)
    canvas.polygon(pose.upright(bar((-0.36, 0.95), (-0.08, 0.95), 0.08)), _TYRE, label)
    if ridden:
        _sitting(canvas, pose, 0.97, 0.42, generator)


def motorcycle(canvas: Canvas, pose: Pose, generator: np.random.Generator, *, ridden: bool) -> None:
    """Paint a motorcycle, seen from the side or, at a yaw near 0, from behind; with its rider or alone."""
    label, paint = ID["motorcycle"], choose(generator, _PAINTS)
    canvas.shadow(pose, -1.0, 1.0, 0.35)
    if abs(np.sin(pose.yaw)) < 0.4:
        place = facing(pose.x, pose.z)
        canvas.polygon(place.upright(disc((0, 0.34), 0.14, 2.4)), _TYRE, label)
        tail = [(-0.26, 0.45), (0.26, 0.45), (0.3, 0.9), (0.16, 1.0), (-0.16, 1.0), (-0.3, 0.9)]
        canvas.polygon(place.upright(tail), paint, label)
        canvas.polygon(place.upright(bar((-0.45, 1.08), (0.45, 1.08), 0.09)), _TYRE, label)
        canvas.polygon(place.upright(bar((-0.1, 0.78), (0.1, 0.78), 0.12)), (208, 28, 24), label)
        if ridden:
            _from_behind(canvas, pose, 0.95, generator)
        return
    for centre in (-0.72, 0.72):
        canvas.polygon(pose.upright(disc((centre, 0.34), 0.36)), _TYRE, label)
        canvas.polygon(pose.upright(disc((centre, 0.34), 0.17)), (120, 122, 126), label)
    engine = [(-0.45, 0.25), (0.4, 0.25), (0.55, 0.6), (-0.6, 0.62)]
    tank = [(-0.95, 0.72), (-0.1, 0.68), (0.55, 0.66), (0.6, 0.98), (0.25, 1.04), (-0.1, 0.84), (-0.95, 0.88)]
    for shape, colour in (
        (engine, (66, 66, 72)),
        (tank, paint),
        ([(-0.8, 0.84), (-0.05, 0.84), (-0.1, 0.94)], _TYRE),
    ):
        canvas.polygon(pose.upright(shape), colour, label)
    canvas.polygon(pose.upright(bar((0.72, 0.34), (0.46, 1.1), 0.1)), (90, 90, 96), label)
    canvas.polygon(pose.upright(disc((0.66, 0.92), 0.11)), (240, 236, 210), label)
    if ridden:
        _sitting(canvas, pose, 0.92, 0.5, generator)
