"""Size and speed of an exported RCCA beside the module itself: `python -m benchmarks.export`.

Each route of docs/export.md exports the same module with dynamic batch, height and width, at a size that it is not run
at, and must return the module's values. Then all routes take turns on one thread, so that another process slows all of
them down; the median of each counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ccgpu
from ccgpu.models.attention import RCCA
from ccgpu.train.runs import records

Run = Callable[[Tensor], Tensor]
Route = Callable[[RCCA, Tensor, Path], Run]
ITSELF = "the module itself"
ROUNDS = 15


def axes() -> tuple[dict[int, Any]]:
    """Return the dynamic axes of the input, for torch.export."""
    return (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)


def itself(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return the module, which runs the kernels; its file is the state dict."""
    torch.save(net.state_dict(), path)
    return net


def decomposed(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return the module in `ccgpu.decomposed`."""
    torch.save(net.state_dict(), path)
    return ccgpu.decomposed()(net)


def program_with_op(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return a program of torch.export that calls the op."""
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=axes()), path)
    return torch.export.load(path).module()


def program(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return a program of torch.export of standard operators."""
    with ccgpu.decomposed():
        return program_with_op(net, example, path)


def trace(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return a traced module of standard operators."""
    with ccgpu.decomposed():
        torch.jit.trace(net, example).save(path)
    return torch.jit.load(path)


def onnx_by_torch_export(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return an ONNX model of the default exporter, in onnxruntime."""
    torch.onnx.export(net, (example,), path, dynamic_shapes=axes(), dynamo=True, external_data=False, verbose=False)
    return in_onnxruntime(path)


def onnx_by_torchscript(net: RCCA, example: Tensor, path: Path) -> Run:
    """Return an ONNX model of the exporter of TorchScript graphs, in onnxruntime."""
    names = {"x": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(net, (example,), path, input_names=["x"], dynamic_axes=names, dynamo=False, opset_version=18)
    return in_onnxruntime(path)


def in_onnxruntime(path: Path) -> Run:
    """Return a function that runs an ONNX model on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


ROUTES: dict[str, tuple[str, Route]] = {
    ITSELF: (".pt", itself),
    "in `ccgpu.decomposed()`": (".pt", decomposed),
    "`torch.export`, with the op": (".pt2", program_with_op),
    "`torch.export`, decomposed": (".pt2", program),
    "`torch.jit.trace`, decomposed": (".pt", trace),
    "`torch.onnx.export`": (".onnx", onnx_by_torch_export),
    "`torch.onnx.export(dynamo=False)`": (".onnx", onnx_by_torchscript),
}


@torch.no_grad()
def measure(channels: int, shape: Sequence[int], rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return for each route the median of its milliseconds, and the bytes of its file.

    Args:
        channels: C of the RCCA.
        shape: (B, H, W) of the input that is timed; the routes are exported at another.
        rounds: how often each route runs, beside once before.
    """
    torch.manual_seed(0)
    net = RCCA(channels, gamma=1.0).eval()
    batch, height, width = shape
    x = torch.randn(batch, channels, height, width)
    example = torch.randn(batch + 1, channels, height // 2 + 1, width // 2 + 2)
    expected = net(x)
    runs, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecated parts
        for index, (name, (ending, route)) in enumerate(ROUTES.items()):
            path = Path(folder) / f"{index}{ending}"
            runs[name] = route(net, example, path)
            sizes[name] = path.stat().st_size
            torch.testing.assert_close(runs[name](x), expected, rtol=1e-4, atol=1e-4)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run(x)
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}, sizes


def table(record: dict[str, Any]) -> str:
    """Return a record as a table in Markdown: time relative to the module itself, size of the file."""
    times, sizes = record["milliseconds"], record["bytes"]
    lines = ["| | time; the module itself = 1 | file |", "|---|---|---|"]
    lines += [f"| {name} | {times[name] / times[ITSELF]:.2f} | {sizes[name] / 1e6:.2f} MB |" for name in times]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="export", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--channels", type=int, default=256, help="of the RCCA (%(default)s)")
    add("--shape", type=int, nargs=3, default=(1, 48, 64), metavar=("B", "H", "W"), help="of its input (%(default)s)")
    add("--rounds", type=int, default=ROUNDS, help="of all routes (%(default)s)")
    add("--record", type=Path, metavar="FILE", help="append the times to this file of JSON lines")
    flags = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        milliseconds, sizes = measure(flags.channels, flags.shape, flags.rounds)
        record = {
            "kind": "export",
            "milliseconds": milliseconds,
            "bytes": sizes,
            "channels": flags.channels,
            "shape": list(flags.shape),
            **records.circumstances(torch.device("cpu")),
        }
    finally:
        torch.set_num_threads(before)
    print(table(record))
    if flags.record is not None:
        records.append_record(flags.record, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
