"""How long the CPU kernels compile, measured with an empty cache."""

import pytest

from benchmarks import first_call


@pytest.mark.slow
def test_another_process_compiles_with_an_empty_cache():
    assert first_call.compile_seconds("float64") > 0.5  # loading from a cache takes less


def test_what_cannot_be_compiled_is_told(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(RuntimeError, match=r"must compile float32, got: .*NUMBA_DISABLE_JIT"):
        first_call.compile_seconds("float32")
