"""Streams, CUDA graphs, threads and several devices; results are the same to the bit whatever else runs."""

import threading

import pytest
import torch

import ccgpu
from ccgpu.bridges.cupy_cuda.launch import LAUNCHER
from tests.gpu.device import DEVICE, gradients, inputs, same_bits

SLEEP = 200_000_000  # GPU cycles, some 0.1 s: far longer than a call takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(97, 97), (300, 20), (4, 20, 31)])
def test_same_bits_every_time(backend, dtype, sizes):
    tensors, dout = inputs(sizes, 64, 64, dtype)
    first = gradients(tensors, dout, backend)
    for _ in range(5):
        assert same_bits(gradients(tensors, dout, backend), first)


def test_same_bits_under_load(backend, half):
    """Other kernels take multiprocessors away and change which block runs when."""
    tensors, dout = inputs((97, 97), 64, 128, half)
    first = gradients(tensors, dout, backend)
    other, load = torch.cuda.Stream(), torch.randn(1024, 1024, device=DEVICE)
    torch.cuda.synchronize()
    for turn in range(20):
        with torch.cuda.stream(other):
            for _ in range(1 + turn % 5):
                load = (load @ load).clamp_(-1, 1)
        assert same_bits(gradients(tensors, dout, backend), first)
    torch.cuda.synchronize()


def test_one_image_does_not_depend_on_the_others(backend, half):
    tensors, dout = inputs((33, 40), 16, 24, half, batch=5)
    together = gradients(tensors, dout, backend)
    alone = gradients(tuple(x[3:4] for x in tensors), dout[3:4], backend)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[3:4].float(), b.float(), rtol=2e-2, atol=2e-2)


def test_call_waits_for_its_stream(backend):
    """The inputs are written late, on a side stream; the default stream is not involved."""
    tensors, dout = inputs((40, 33), 16, 24)
    expected = gradients(tensors, dout, backend)
    late = tuple(torch.full_like(x, torch.nan) for x in tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        results = gradients(late, dout, backend)
        copies = [x.clone() for x in results]  # read on the stream, before anything waits
    assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert same_bits(copies, expected)


def test_default_stream_is_not_held_up(backend):
    tensors, dout = inputs((20, 20), 16, 24)
    gradients(tensors, dout, backend)  # compiles
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        gradients(tensors, dout, backend)
    torch.cuda.default_stream().synchronize()
    assert not stream.query(), "the call's kernels, or a wait for them, went to the default stream"
    torch.cuda.synchronize()


@pytest.mark.parametrize("sizes", [(97, 97), (20, 300), (3, 20, 31)])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_cuda_graph_replays_with_new_data(backend, half, sizes, last):
    tensors, dout = inputs(sizes, 64, 72, half, last=last)
    static = tuple(x.clone() for x in tensors)
    dstatic = dout.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills caches
            gradients(static, dstatic, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(static, dstatic, backend)
    for seed in (1, 2, 1):
        fresh, dfresh = inputs(sizes, 64, 72, half, last=last, seed=seed)
        for x, y in zip((*static, dstatic), (*fresh, dfresh), strict=True):
            x.copy_(y)
        graph.replay()
        assert same_bits(captured, gradients(fresh, dfresh, backend))


def test_compiling_inside_a_graph_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(LAUNCHER, "_kernels", {})  # as in a new process
    tensors, dout = inputs((20, 30), 16, 8, torch.float16, batch=1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must be compiled before a CUDA graph"), torch.cuda.graph(graph):
        ccgpu.cca(*tensors, backend=kernels)
    torch.cuda.synchronize()
    assert bool(torch.isfinite(gradients(tensors, dout, kernels)[0]).all())


@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "a stream each"])
def test_threads_do_not_disturb_each_other(backend, streams):
    """As in torch.nn.DataParallel; the sizes include some that no thread has compiled for before."""
    sizes = [(31, 47), (70, 9), (200,), (64, 64)]
    cases = [inputs(size, 24, 40, torch.float32, seed=seed) for seed, size in enumerate(sizes)]
    results = [[] for _ in cases]
    errors = []

    def work(number):
        try:
            stream = torch.cuda.Stream() if streams else torch.cuda.default_stream()
            with torch.cuda.stream(stream):
                for _ in range(10):
                    results[number].append(gradients(*cases[number], backend))
            stream.synchronize()
        except Exception as error:  # pytest does not see an exception in a thread
            errors.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    torch.cuda.synchronize()
    for case, found in zip(cases, results, strict=True):
        expected = gradients(*case, backend)
        assert len(found) == 10
        for one in found:
            if backend == "torch":  # cuBLAS may choose another algorithm on another stream
                torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
            else:
                assert same_bits(one, expected)


def test_second_device_while_the_first_is_current(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, and torch sees {torch.cuda.device_count()}")
    tensors, dout = inputs((33, 40), 16, 24)
    expected = gradients(tensors, dout, backend)
    second = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    results = gradients(tuple(x.to(second) for x in tensors), dout.to(second), backend)
    assert torch.cuda.current_device() == 0
    assert all(x.device == second for x in results)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.to(DEVICE), b, rtol=1e-4, atol=1e-4)
