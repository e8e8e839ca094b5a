"""`ccgpu backends`: a line for each backend, with the dtypes that it runs and how they are computed here."""

import re

import pytest

from ccgpu.kernels.numba_cpu import dot_products
from ccgpu.train import backends


@pytest.mark.parametrize("pairs", [True, False])
def test_cpu_kernels_name_the_arithmetic_of_each_dtype(pairs, monkeypatch):
    monkeypatch.setattr(dot_products, "AVAILABLE", pairs)
    entries = re.split(r"^  (?=\w)", "\n".join(backends.table("cpu")), flags=re.MULTILINE)[1:]
    said = dict(" ".join(entry.split()).split(" ", 1) for entry in entries)
    assert list(said) == ["numba_cpu", "cpu", "torch", "reference"]
    bfloat16 = "bfloat16 by dot-product instructions" if pairs else "bfloat16 converted to float32 in registers"
    assert said["numba_cpu"] == (
        f"float32, {bfloat16}, float16 converted to float32 in registers, float64: "
        "CPU kernels, compiled by Numba at the first call"
    )
    assert said["cpu"].startswith("float32, bfloat16, float16, float64: torch's matrix products")


def test_report_has_both_kinds_of_devices_and_lines_that_fit(capsys):
    assert backends.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("CPU, ") for line in lines)
    assert any(line.startswith("GPU, ") for line in lines)
    assert not any("<" in line for line in lines)
    assert max(len(line) for line in lines) <= backends.WIDTH
