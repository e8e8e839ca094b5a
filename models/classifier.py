"""The classifiers of a network for other classes: rows of classes that stay are kept, the others are drawn anew.

A classifier is the last convolution of a head, 1x1, with a row of weights and a bias for each class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

CLASSIFIERS = ("head.bottleneck.3", "auxiliary_head.3")
"""The modules of a `CCNet` that end in classes: in the head, and in the auxiliary head where there is one."""


def with_rows(weights: Mapping[str, Tensor], sources: Sequence[int | None]) -> dict[str, Tensor]:
    """Return the state dict of a `CCNet` with its classifiers made for other classes.

        row k = the old row sources[k], its weights and its bias; where that is None, drawn by the rule of nn.Conv2d

    nn.Conv2d draws both uniformly in +-1/sqrt(channels), by torch's generator.

    Args:
        weights: state dict of a `CCNet`; one without heads, of a backbone alone, is returned as it is.
        sources: for each new class the place of the old one that it keeps; None: none.
    """
    changed = dict(weights)
    for name in CLASSIFIERS:
        old = weights.get(f"{name}.weight")
        if old is None:
            continue
        rows = nn.Conv2d(old.shape[1], len(sources), 1).state_dict()
        for entry, values in rows.items():
            for row, source in enumerate(sources):
                if source is not None:
                    values[row] = weights[f"{name}.{entry}"][source]
            changed[f"{name}.{entry}"] = values.to(old.dtype)
    return changed
