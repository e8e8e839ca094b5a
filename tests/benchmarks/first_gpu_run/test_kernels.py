"""The step that fills CuPy's cache, with threads in place of processes on a device."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.first_gpu_run import kernels
from benchmarks.first_gpu_run.records import read


@pytest.fixture
def jobs(monkeypatch):
    """Four kernels; the first has machine code, the second is in the cache, the third does not compile."""
    four = kernels.chosen("sm_90")[:4]
    first, second, third, _ = four

    def fill(job, code):
        if job == third:
            raise RuntimeError(f"cca: kernel {job.configuration.entry} must compile for sm_90")
        return "cached" if job == second else "prepared" if code else "compiled"

    monkeypatch.setattr(kernels, "need_kernels", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(kernels, "chosen", lambda gpu: four)
    monkeypatch.setattr(kernels, "pool", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(kernels, "fill", fill)
    monkeypatch.setattr(kernels, "prepared", lambda todo, path: [(job, b"x" if job == first else None) for job in todo])
    return four


def run(tmp_path, seconds):
    flags = ["--records", str(tmp_path / "records"), "--prepared", str(tmp_path), "--seconds", seconds]
    return kernels.main(flags), read(tmp_path / "records")


def test_every_kernel_is_counted_and_one_that_fails_stops_no_other(tmp_path, jobs):
    status, (failure, counts) = run(tmp_path, "60")
    assert status == 1
    assert failure["kernel"] == jobs[2].configuration.entry
    assert "must compile for sm_90" in failure["reason"]
    found = {name: counts[name] for name in ("cached", "prepared", "compiled", "failed", "left")}
    assert found == {"cached": 1, "prepared": 1, "compiled": 1, "failed": 1, "left": 0}
    assert (counts["gpu"], counts["archive"]) == ("sm_90", False)


def test_it_ends_by_itself_when_its_seconds_are_over(tmp_path, jobs, monkeypatch):
    quick = kernels.fill

    def slow(job, code):
        kernels.time.sleep(0.2)
        return quick(job, code)

    monkeypatch.setattr(kernels, "fill", slow)
    status, (counts,) = run(tmp_path, "0.0")
    assert status == 0
    assert counts["left"] >= 2
    assert sum(counts[name] for name in ("cached", "prepared", "compiled", "failed", "left")) == 4


def test_a_gpu_without_chosen_kernels_is_no_error(tmp_path, jobs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 2))
    assert run(tmp_path, "60") == (0, [])
    assert "no kernels are chosen ahead for sm_72" in capsys.readouterr().out
