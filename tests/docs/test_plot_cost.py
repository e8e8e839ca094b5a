"""The plot of cost over map sizes tells what was measured from what was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib (extra dev)")

from docs import plot_cost


def test_predictions_are_hollow_and_dashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(side: int, predicted: list[str]) -> dict[str, object]:
        numbers = {"peak_mb": 1.0 * side**2, "forward_backward_ms": 2.0 * side**2}
        return {"features": [1, 8, side, side], "predicted": predicted, **numbers}

    measured = [case(side, []) for side in (70, 90, 110)]
    for name, cases in (("measured", measured), ("both", [*measured, case(300, [*plot_cost.KEYS])])):
        monkeypatch.setattr(plot_cost, "sweep", lambda cases=cases: dict.fromkeys(plot_cost.SWEPT, cases))
        monkeypatch.setattr(plot_cost, "TARGET", tmp_path / f"{name}.svg")
        plot_cost.main()
    drawn = {name: (tmp_path / f"{name}.svg").read_text().partition("</style>")[2] for name in ("measured", "both")}
    assert "stroke-dasharray: 3" not in drawn["measured"]
    assert drawn["both"].count("stroke-dasharray: 3") == 2 * len(plot_cost.SWEPT)
