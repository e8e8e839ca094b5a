"""What the parts of a CCNet take of a training step and of a prediction, in time, memory and FLOPs.

The whole network runs, as `ccgpu train` and `ccgpu predict` run it, and hooks on its modules and on the tensors between
them say which part begins (`watch`): in forward before and after each module, in backward when the gradient of a
module's output or input is complete. On the CPU, autograd runs the operations of backward one after the other, in the
reverse order of forward, so that between two hooks there are those of one part alone; on a GPU each hook waits for the
device. Every moment of a step belongs to one part, so the parts' times add up to that of the step, and the weights
change exactly as without hooks.

    backbone        the ResNet
    head            conva, convb and bottleneck of the criss-cross head, everything but its context module
    attention       the context module, RCCA or another one
    auxiliary head  in training only
    output          resizing the logits to the images' size; in training the loss
    optimiser       in training only: SGD with momentum changes the weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ccgpu.models.ccnet import CCNet, Outputs
from ccgpu.models.precision import Precision
from ccgpu.train.loss.criterion import Criterion
from ccgpu.train.measurement.timing import Clock, Stopwatch, milliseconds
from ccgpu.train.memory import Enter, counted_peak, peak_bytes_of_parts, saved_bytes_of_parts
from ccgpu.train.optimisation.optimisers import build_optimiser
from ccgpu.train.optimisation.update import Update

PARTS = ("backbone", "head", "attention", "auxiliary head", "output", "optimiser")
CLASSES = 19  # Cityscapes'
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4  # the paper's
STATES = 3  # numbers that training holds for each parameter: the weight, its gradient, SGD's momentum
BYTES = 4  # of a float32


class Network(NamedTuple):
    """A CCNet to measure, with its images.

    Attributes:
        backbone: its name.
        context: the context module's name.
        images: (B, 3, H, W).
        head_channels: channels of both heads.
    """

    backbone: str
    context: str
    images: tuple[int, int, int, int]
    head_channels: int = 512

    def build(self, device: torch.device) -> CCNet:
        """Return the network, its attention at work (gamma is 0.5), in channels last."""
        torch.manual_seed(0)
        with device:
            net = CCNet(self.backbone, CLASSES, context=self.context, head_channels=self.head_channels, gamma=0.5)
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return net

    def batch(self, device: torch.device) -> dict[str, Tensor]:
        """Return random images and labels."""
        generator = torch.Generator().manual_seed(0)
        size = (self.images[0], *self.images[2:])
        return {
            "image": torch.randn(*self.images, generator=generator).to(device, memory_format=torch.channels_last),
            "label": torch.randint(CLASSES, size, generator=generator).to(device),
        }


def modules_of(net: CCNet) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules that are parts: name -> (module, the part in which it is called)."""
    context = net.head.context if net.head.cca is None else net.head.cca
    found: dict[str, tuple[nn.Module, str]] = {"backbone": (net.backbone, "output"), "head": (net.head, "output")}
    if context is not None:
        found["attention"] = (context, "head")
    if net.auxiliary_head is not None:
        found["auxiliary head"] = (net.auxiliary_head, "output")
    return found


@contextmanager
def watch(net: CCNet, enter: Enter) -> Iterator[None]:
    """Tell `enter` which of `PARTS` begins, in each forward and backward of a network during a block.

    Entering the part that is running already changes nothing, and happens. "optimiser" is not a module's: whoever
    calls the optimiser says so.
    """
    handles = []
    for name, (module, caller) in modules_of(net).items():
        handles.append(module.register_forward_pre_hook(_before(enter, name, caller)))
        handles.append(module.register_forward_hook(_after(enter, name, caller)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(enter: Enter, name: str, caller: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        enter(name)
        if caller == "output":  # then its input is the backbone's output, which has a hook that enters the backbone
            return
        for x in arguments:
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda gradient: enter(caller))

    return hook


def _after(enter: Enter, name: str, caller: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], results: Any) -> None:
        for x in results if isinstance(results, tuple) else (results,):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda gradient: enter(name))
        enter(caller)

    return hook


def training(net: CCNet, device: torch.device) -> Update:
    """Return the step of `ccgpu train` for a network: SGD on the cross-entropy of both heads."""
    optimiser = build_optimiser(net, net.backbone, "sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    precision = Precision(device, channels_last=True)
    return Update(net, optimiser, precision.scaler(), precision, lambda iteration: LR, Criterion())


def step(update: Update, batch: Mapping[str, Tensor], enter: Enter) -> None:
    """Train for one step."""
    enter("output")
    update.begin(0)
    update.gradients(batch)
    enter("optimiser")
    update.apply(0)


def prediction(net: CCNet, images: Tensor, enter: Enter) -> Tensor:
    """Return the logits of images at their size, as a prediction computes them."""
    enter("output")
    with torch.no_grad():
        found: Tensor = net.eval()(images)
    return found


def measure(network: Network, clock: Clock, repeats: int) -> dict[str, Any]:
    """Return what each part takes of a training step and of a prediction.

    Returns:
        "training_ms" and "prediction_ms": part -> milliseconds, of the run that took the median time of `repeats` runs,
        so that the parts add up to a time that was measured; "training_whole_ms" and "prediction_whole_ms": median
        times without hooks; "training_peak_mb" and "prediction_peak_mb": part -> the most that was allocated while it
        ran, beyond weights, momentum and images.
    """
    device = clock.device
    net, batch = network.build(device), network.batch(device)
    update = training(net, device)
    record: dict[str, Any] = {}
    images = batch["image"]
    calls: dict[str, Callable[[Enter], object]] = {
        "training": lambda enter: step(update, batch, enter),
        "prediction": lambda enter: prediction(net, images, enter),
    }
    for kind, call in calls.items():
        call(_ignore)  # compiles kernels, fills caches, makes the optimiser's momentum
        record[f"{kind}_whole_ms"] = milliseconds(partial(call, _ignore), clock, repeats)
        runs = []
        for _ in range(repeats):
            stopwatch = Stopwatch(clock)
            with watch(net, stopwatch.enter):
                call(stopwatch.enter)
            stopwatch.enter(None)
            runs.append(stopwatch.milliseconds)
        record[f"{kind}_ms"] = sorted(runs, key=lambda run: sum(run.values()))[len(runs) // 2]
        update.optimiser.zero_grad(set_to_none=True)  # the gradients of a step are part of its peak

        def watched(enter: Enter, call: Callable[[Enter], object] = call) -> None:
            with watch(net, enter):
                call(enter)

        peaks = peak_bytes_of_parts(watched, device)
        record[f"{kind}_peak_mb"] = {part: peaks[part] / 1e6 for part in PARTS if part in peaks}
    return record


def count(network: Network, device: torch.device) -> dict[str, Any]:
    """Return what follows from the shapes alone; nothing is computed.

    Returns:
        "parameters": part -> their number; "training_gflops" and "prediction_gflops": part -> GFLOPs of forward and
        backward, and of forward without the auxiliary head; "saved_mb": part -> what its forward saves for backward;
        "states_mb": part -> weights, gradients and momentum; "least_peak_mb": a lower bound of what a step holds, the
        counted peak of forward and backward (`ccgpu.train.memory.counted_peak`) with weights and momentum.
    """
    with FakeTensorMode():
        net, images = network.build(device).train(), torch.empty(*network.images, device=device)

        def forward(enter: Enter) -> None:
            with watch(net, enter):
                net(images.to(memory_format=torch.channels_last))

        saved = saved_bytes_of_parts(forward, net)
        peak = counted_peak(lambda: _backward(net(images)))
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, (module, _) in modules_of(net).items()}
    parameters["head"] -= parameters.get("attention", 0)
    states = {part: STATES * BYTES * number / 1e6 for part, number in parameters.items()}
    gflops = {kind: flops(network, backward=kind == "training") for kind in ("training", "prediction")}
    return {
        "parameters": parameters,
        **{f"{kind}_gflops": by for kind, by in gflops.items()},
        "saved_mb": {part: saved[part] / 1e6 for part in PARTS if part in saved},
        "states_mb": states,
        "least_peak_mb": peak / 1e6 + sum(states.values()) * (STATES - 1) / STATES,  # the gradients are in the peak
    }


def flops(network: Network, *, backward: bool) -> dict[str, float]:
    """Return the GFLOPs of each part: of a prediction, or of forward and backward in training."""
    found: dict[str, float] = {}
    part, before = "output", 0
    counter = FlopCounterMode(display=False)

    def enter(name: str) -> None:
        nonlocal part, before
        total = counter.get_total_flops()
        found[part] = found.get(part, 0.0) + (total - before) / 1e9
        part, before = name, total

    with FakeTensorMode(), torch.set_grad_enabled(backward):
        net = network.build(torch.device("cpu")).train(backward)
        images = torch.empty(*network.images)
        with watch(net, enter), counter:
            results = net(images)
            if backward:
                _backward(results)
            enter("output")
    return {name: found[name] for name in PARTS if found.get(name, 0.0) > 0}


def _backward(outputs: Outputs) -> None:
    """Run backward from any gradient: what is allocated depends on the shapes alone."""
    logits = [x for x in (outputs.logits, outputs.auxiliary) if x is not None]
    torch.autograd.backward(logits, [torch.ones_like(x) for x in logits])


def _ignore(part: str) -> None:
    pass
