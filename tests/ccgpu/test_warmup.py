"""Compiling ahead: which kernels are compiled, what is printed, and the reason if none can be compiled."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ccgpu import warmup as module
from ccgpu.bridges import numba_cpu
from ccgpu.bridges.cupy_cuda.attention import plan
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER
from ccgpu.kernels.numba_cpu import cache
from ccgpu.warmup import main, warmup


def test_compiles_the_kernels_that_calls_need(gpu):
    compiled = list(warmup((97, 97), (129, 257), dtype=torch.bfloat16))
    names = [name for name, *_ in gpu.compiled]
    assert [kernel.name for kernel in compiled] == names
    assert all(kernel.seconds >= 0 for kernel in compiled)
    limits = LAUNCHER.limits(torch.device("cuda", 0))
    needed = {
        launch.configuration.entry
        for sizes in ((97, 97), (129, 257))
        for kernel in ("forward", "backward")
        for launch in plan(kernel, torch.bfloat16, 8, sizes, 64, 512, limits)
    }
    assert set(names) == needed
    assert list(warmup((97, 97), (97, 96), dtype=torch.bfloat16)) == []
    assert not gpu.runs


def test_device_dtype_and_direction(gpu):
    forward = list(warmup((20, 20), dtype=torch.float32, backward=False, device="cuda:1"))
    assert [kernel.name for kernel in forward] == [name for name, *_ in gpu.compiled]
    assert all(name.startswith("cca_forward_f32") for name, *_ in gpu.compiled)
    assert {device for _, device, _ in gpu.compiled} == {1}


def test_command_prints_each_kernel_and_its_seconds(gpu, capsys):
    arguments = "--size 97 97 --size 5 60 80 --depth 32 --channels 256 --dtype float16 --batch 2"
    assert main(arguments.split()) == 0
    *kernels, last = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in kernels] == [name for name, *_ in gpu.compiled]
    assert all(line.split()[1] == "s" and float(line.split()[0]) >= 0 for line in kernels)
    assert last.endswith(f"for {len(kernels)} kernels")
    assert all("_f16_" in name and ("_d32_" in name) for name, *_ in gpu.compiled)


def test_command_without_arguments_and_with_tf32(gpu, capsys):
    try:
        assert main(["--dtype", "float32", "--tf32", "--forward-only"]) == 0
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(name.startswith("cca_forward_tf32") for name, *_ in gpu.compiled)
    assert len(gpu.compiled) == 1


@pytest.mark.parametrize("sizes", [["1", "2", "3", "4"], ["0"], ["-3", "2"]])
def test_command_names_a_bad_size(gpu, capsys, sizes):
    with pytest.raises(SystemExit):
        main(["--size", *sizes])
    assert "--size must be one to three positive numbers, got " + " ".join(sizes) in capsys.readouterr().err


def test_reason_in_one_line_where_it_cannot(gpu, capsys):
    assert main(["--depth", "300"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(
        "warmup: the kernels must be able to run on cuda, got: its kernels hold at most 256 channels"
    )


def test_the_cpu_kernels_of_a_dtype(capsys):
    """They are loaded here, because other tests compile them, or compiled if this one is the first."""
    kernels = [kernel.name for kernel in warmup(dtype=torch.float16, device="cpu")]
    assert kernels == ["forward float16", "backward float16", "affinity float16", "aggregate float32"]
    in_16_bits = {kernel for kernel, _, kept in cache.LOADED if kept is np.uint16}
    assert in_16_bits >= {"forward", "backward", "affinity"}
    assert ("aggregate", np.float32, np.float32) in cache.LOADED
    assert main(["--dtype", "float16", "--forward-only"]) == 0  # without a GPU, the CPU is the default
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(" s  ")[1] for line in lines] == [name for name in kernels if "backward" not in name]
    assert last.endswith("for 3 kernels")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta"])
def test_command_names_a_bad_device(device, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--device", device])
    assert f"--device must be cpu, cuda or cuda:N, got {device}" in capsys.readouterr().err


def test_reason_where_numba_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(numba_cpu, "_reason", lambda: "Numba cannot be used (broken)")
    assert main(["--device", "cpu"]) == 1
    assert "must be able to run on the CPU, got: Numba cannot be used (broken)" in capsys.readouterr().err


def test_command_fails_where_there_is_no_device():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module.__name__, "--size", "9", "9", "--device", "cuda"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 1
    assert answer.stdout == ""
    (line,) = answer.stderr.splitlines()
    assert "torch sees no CUDA device" in line
