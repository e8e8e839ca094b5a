"""Forked programs: what they print, what they leave behind, how they fail."""

from __future__ import annotations

import pytest

from tests import forked
from tests.forked import run_forked


def test_a_program_has_torch_and_nothing_of_ours() -> None:
    program = """
        import os, sys
        print("torch" in sys.modules, {"ccgpu", "numba"} & {*sys.modules} or "alone", os.environ["OF_A_TEST"])
        print("said", file=sys.stderr)
    """
    assert run_forked(program, OF_A_TEST="set") == (0, "True alone set\n", "said\n")


def test_a_program_leaves_nothing_to_the_next() -> None:
    assert run_forked("import os, ccgpu, torch; torch.mine = 1; os.environ['OF_A_TEST'] = 'set'").returncode == 0
    assert run_forked("import os, sys, torch; print(hasattr(torch, 'mine'), 'ccgpu' in sys.modules)").stdout == (
        "False False\n"
    )
    assert run_forked("import os; print('OF_A_TEST' in os.environ)").stdout == "False\n"


def test_a_failure_is_told() -> None:
    status, out, err = run_forked("print('before'); raise ValueError('wrong')")
    assert (status, out) == (1, "before\n")
    assert err.endswith("ValueError: wrong\n")
    assert run_forked("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -9


def test_a_program_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_forked("").returncode == 0  # the server has started
    monkeypatch.setattr(forked, "TIMEOUT", 0.1)
    with pytest.raises(TimeoutError, match="did not end"):
        run_forked("import threading; threading.Event().wait()")
    monkeypatch.undo()
    assert run_forked("print('again')").stdout == "again\n"
