"""Draw docs/images/criss-cross.svg with the op itself: `python -m docs.draw_op` (needs matplotlib)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from ccgpu.models.attention import RCCA, attention_map
from docs.drawing import IMAGES, INK, ORANGE, RED, save

HEIGHT, WIDTH, AT = 9, 13, (3, 4)


def main() -> None:
    """Draw what one position attends to in one loop and in two, with equal energies everywhere."""
    rcca = RCCA(1)
    torch.nn.init.zeros_(rcca.query_conv.weight)
    torch.nn.init.zeros_(rcca.query_conv.bias)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    reached = HEIGHT + WIDTH - 1, HEIGHT * WIDTH
    for loops, (ax, number) in enumerate(zip(axes, reached, strict=True), 1):
        weights = attention_map(rcca, torch.zeros(1, 1, HEIGHT, WIDTH), AT, recurrence=loops)[0]
        assert int((weights > 0).sum()) == number
        title = "its row and column" if loops == 1 else "every position"
        ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="equal")
        ax.set_title(f"R = {loops}: {title}, {number} of {HEIGHT * WIDTH}", loc="left", fontsize=10, fontweight="bold")
        ax.axis("off")
        for y in range(HEIGHT):
            for x in range(WIDTH):
                share = float(weights[y, x] / weights.max()) ** 0.5
                ax.add_patch(Rectangle((x, y), 1, 1, facecolor="white", edgecolor=INK, linewidth=0.5))
                ax.add_patch(Rectangle((x, y), 1, 1, facecolor=ORANGE, edgecolor="none", alpha=share))
        ax.add_patch(Rectangle(AT[::-1], 1, 1, facecolor="none", edgecolor=RED, linewidth=2))
    save(figure, IMAGES / "criss-cross.svg")


if __name__ == "__main__":
    main()
