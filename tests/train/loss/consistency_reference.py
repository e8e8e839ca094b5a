"""The category consistent loss in NumPy float64, one loop for each sum of its formula."""

import math

import numpy as np


def phi(d: float, delta_v: float, delta_d: float, form: str) -> float:
    if d <= delta_v:
        return 0.0
    if d <= delta_d or form == "quadratic":
        return (d - delta_v) ** 2
    return (d - delta_d) + (delta_d - delta_v) ** 2


def norm(vector: np.ndarray) -> float:
    return math.hypot(*vector.tolist())


def consistency_loop(
    embedding: np.ndarray,
    label: np.ndarray,
    delta_v: float = 0.5,
    delta_d: float = 1.5,
    form: str = "piecewise",
) -> tuple[float, float, float]:
    """Return variance, distance and regularity of embedding (B, E, *S) with label (B, *S), 255 ignored."""
    of_class: dict[int, list[np.ndarray]] = {}
    for b in range(label.shape[0]):
        for position in np.ndindex(*label.shape[1:]):
            category = int(label[(b, *position)])
            if category != 255:
                vector = np.array([embedding[(b, e, *position)] for e in range(embedding.shape[1])], dtype=np.float64)
                of_class.setdefault(category, []).append(vector)
    if not of_class:
        return 0.0, 0.0, 0.0
    means = {}
    for category, vectors in of_class.items():
        total = np.zeros(embedding.shape[1])
        for vector in vectors:
            total += vector
        means[category] = total / len(vectors)
    number = len(of_class)
    variance = distance = regularity = 0.0
    for category, vectors in of_class.items():
        for vector in vectors:
            variance += phi(norm(means[category] - vector), delta_v, delta_d, form) / len(vectors) / number
        regularity += norm(means[category]) / number
    for a in means:
        for b in means:
            gap = norm(means[a] - means[b])
            if a != b and gap <= 2 * delta_d:
                distance += (2 * delta_d - gap) ** 2 / (number * (number - 1))
    return variance, distance, regularity
