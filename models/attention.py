"""Criss-cross attention as modules, and attention maps: how much one position attends to every other.

`CrissCrossAttention` is one loop of attention; `RCCA` applies the same loop with the same weights several times
(CCNet, Huang et al., ICCV 2019, sections 3.2 and 3.3). `GatedAttention` is their base class, which non-local attention
(`ccgpu.models.context`) shares. All have the same parameters under the same names, so their checkpoints interchange.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ccgpu
from ccgpu.checks import untraced
from ccgpu.shards import Group, OnGroup, fail

NOT_SCRIPTABLE = (
    "torch.jit.script: {} must be exported or traced, got a request to compile its source; use torch.export.export, or "
    "torch.jit.trace within `with ccgpu.decomposed():` where a file for torch.jit.load is wanted."
)
# By number of position axes: the convolution to use, and the shape of x as messages write it.
_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AXES = {1: "(B, C, W)", 2: "(B, C, H, W)", 3: "(B, C, T, H, W)"}


def require_int(function: str, name: str, value: Any, minimum: int) -> None:
    """Raise unless value is an int (not a bool) of at least minimum."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}; pass a whole number.")
    if value < minimum:
        raise ValueError(f"{function}: {name} must be {minimum} or more, got {value}; pass {minimum} or more.")


def check_position(function: str, at: Iterable[int], size: tuple[int, ...]) -> tuple[int, ...]:
    """Return `at` as a tuple of ints; raise unless it is a position inside `size`."""
    try:
        position = tuple(operator.index(index) for index in at)
    except TypeError:
        raise TypeError(
            f"{function}: at must be ints, one per axis, got {at!r}; pass whole numbers, e.g. (y, x)."
        ) from None
    if len(position) != len(size) or any(not 0 <= index < extent for index, extent in zip(position, size, strict=True)):
        raise ValueError(
            f"{function}: at must be a position inside of {size}, got {position}; count from 0 along each axis."
        )
    return position


@torch.fx.wrap  # a traced graph calls the whole check
@untraced
def _check_features(name: str, x: Tensor, channels: int, dims: int) -> None:
    axes = _AXES[dims]
    if x.ndim != dims + 2:
        raise ValueError(
            f"{name}: x must be {axes} for dims={dims}, got shape {tuple(x.shape)}; "
            "add the batch axis with x.unsqueeze(0) or pass the dims that x has."
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{name}: x must have {channels} channels, axis 1 of {axes}, got shape {tuple(x.shape)}; "
            f"build the module with in_channels={x.shape[1]} or pass other features."
        )


class GatedAttention(nn.Module, ABC):
    """x + gamma * mix(query_conv(x), key_conv(x), value_conv(x)): the base class of attention on feature maps.

    The three convolutions are 1x1 with bias; queries and keys have `in_channels // reduction` channels (at
    least one), values have `in_channels`. A subclass implements `mix`, which decides who attends to whom.

    gamma is learned and starts at 0, so a fresh module is the identity: inserted behind pretrained layers it leaves
    their features unchanged, and training brings attention in as far as it lowers the loss. (At gamma = 0 the three
    convolutions have no gradient, but gamma itself has one.) Gamma takes thousands of steps to move away from 0:
    initialise it to 1 for a short training run, or to test attention alone.

    `load_state_dict` also takes mmcv's `gamma.scale` (shape ()) for `gamma` (shape (1,)), and the weights of
    a module with other `dims`: a 1x1 kernel (D, C, 1, 1) is the same matrix as (D, C, 1, 1, 1). `state_dict`
    writes gamma and the kernels of its own `dims`.

    Args:
        in_channels: C, channels of x and of the output; 1 or more.
        reduction: C // reduction channels for queries and keys; 1 or more. 8 in the paper.
        dims: position axes of x: 1, 2 (images) or 3 (clips).
        gamma: initial value of gamma, finite; 0 in the paper.
        recompute: save only x for backward, and compute q, k, v and the attention again in backward: less memory for
            one more forward pass. Outputs and gradients are the same. The attribute can also be set later
            (`module.recompute = True`).

    Shape:
        x and the output: (B, C, *S) with `dims` axes in S, floating point, any memory format. The output has
        x's dtype; under autocast the wider of x's dtype and autocast's.

    Raises:
        TypeError: in_channels or reduction is not an int.
        ValueError: in_channels or reduction is below 1; dims is not 1, 2 or 3; gamma is not finite; x has another
            rank or number of channels.
    """

    def __init__(self, in_channels: int, *, reduction: int, dims: int, gamma: float, recompute: bool) -> None:
        super().__init__()
        name = type(self).__name__
        require_int(name, "in_channels", in_channels, 1)
        require_int(name, "reduction", reduction, 1)
        if dims not in _CONVOLUTIONS:
            raise ValueError(f"{name}: dims must be 1, 2 or 3, got {dims!r}; pass the number of position axes.")
        if not math.isfinite(gamma):
            raise ValueError(f"{name}: gamma must be finite, got {gamma}; pass 0, as in the paper, or 1.")
        self.in_channels = in_channels
        self.dims = dims
        self.recompute = recompute
        convolution = _CONVOLUTIONS[dims]
        channels = max(in_channels // reduction, 1)
        self.query_conv = convolution(in_channels, channels, kernel_size=1)
        self.key_conv = convolution(in_channels, channels, kernel_size=1)
        self.value_conv = convolution(in_channels, in_channels, kernel_size=1)
        self.gamma = nn.Parameter(torch.full((1,), float(gamma)))

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the values (B, C, *S) mixed by the attention of the queries and keys (B, D, *S)."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend once; see the class for formula and shapes."""
        self.check_input(x)
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """Return gamma * mix(query_conv(x), key_conv(x), value_conv(x)) + x; x has passed `check_input`."""
        if self.recompute:
            # Attention draws no random numbers, so the state of the generators need not be saved.
            return checkpoint(self._attend, x, use_reentrant=False, preserve_rng_state=False)
        return self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        out = self.mix(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        # Under autocast out is 16 bit and gamma 32 bit. Without the cast their product, and with it the next layer's
        # input, would silently become 32 bit.
        return self.gamma.to(out.dtype) * out + x

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, in_channels, *S) with `dims` position axes."""
        _check_features(type(self).__name__, x, self.in_channels, self.dims)

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise: torch.jit.script calls this for each module that it compiles."""
        raise RuntimeError(NOT_SCRIPTABLE.format(type(self).__name__))

    def extra_repr(self) -> str:
        """Name the settings that the submodules do not show."""
        return f"dims={self.dims}" + (", recompute=True" if self.recompute else "")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        theirs, ours = f"{prefix}gamma.scale", f"{prefix}gamma"
        # mmcv has gamma in a submodule, as a 0-d tensor. Any other tensor of this name stays where it is, so that torch
        # reports it as unexpected.
        if theirs in state_dict and ours not in state_dict and state_dict[theirs].ndim == 0:
            state_dict[ours] = state_dict.pop(theirs).reshape(1)
        for convolution in ("query_conv", "key_conv", "value_conv"):
            name, own = f"{prefix}{convolution}.weight", getattr(self, convolution).weight
            weight = state_dict.get(name)
            if isinstance(weight, Tensor) and weight.shape[:2] == own.shape[:2] and set(weight.shape[2:]) == {1}:
                state_dict[name] = weight.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class CrissCrossAttention(OnGroup, GatedAttention):
    """x + gamma * (criss-cross attention of x): every position attends to its own row and column.

        out = gamma * cca(query_conv(x), key_conv(x), value_conv(x)) + x

    Energies are not scaled: there is no 1/sqrt(D) in the paper. `GatedAttention` describes the parameters, why gamma
    starts at 0, and what `load_state_dict` takes.

    A drop-in replacement for the authors' `CC_module(in_dim)` / `CrissCrossAttention(in_dim)` and for mmcv's
    `CrissCrossAttention(in_channels)`: the parameters have the same names (`query_conv`, `key_conv`, `value_conv`,
    `gamma`).

    Args:
        in_channels: C, channels of x and of the output; 1 or more.
        reduction: C // reduction channels for queries and keys; 1 or more. 8 in the paper.
        dims: position axes of x: 1, 2 (images) or 3 (clips: every position attends along T, H and W).
        gamma: initial value of gamma; 0 in the paper.
        recompute: save only x for backward, see `GatedAttention`; False saves q, k, v and the output too.
        backend: name of a backend of `ccgpu.cca`; None: chosen for each call by the tensors.
        group: a `torch.distributed` process group over which the maps are sharded, x being this process's shard;
            `torch.distributed.group.WORLD` for all processes. None: x is the whole map. The attribute can also be set
            later, and so can `sharded_dim`.
        sharded_dim: the axis along which they are sharded, -2 for rows; see `ccgpu.distributed.cca`.

    Shapes and errors: as in `GatedAttention`.

    Source: the paper, section 3.2 and equations 1 and 2; the 3D form is from the TPAMI version.

    Examples:
        >>> import torch
        >>> from ccgpu.models.attention import CrissCrossAttention
        >>> attend = CrissCrossAttention(16)
        >>> x = torch.randn(2, 16, 5, 7)
        >>> torch.equal(attend(x), x)  # gamma is 0
        True
        >>> _ = torch.nn.init.ones_(attend.gamma)
        >>> attend(x).shape
        torch.Size([2, 16, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        reduction: int = 8,
        dims: int = 2,
        gamma: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
        group: Group = None,
        sharded_dim: int = -2,
    ) -> None:
        super().__init__(in_channels, reduction=reduction, dims=dims, gamma=gamma, recompute=recompute)
        self.backend = backend
        self.group, self.sharded_dim = group, sharded_dim

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, in_channels, *S) with `dims` position axes; of shards, on all ranks."""
        if self.group is None:
            return super().check_input(x)
        try:
            super().check_input(x)
        except ValueError as error:
            fail(type(self).__name__, self.group, error)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ccgpu.cca(q, k, v); of shards, ccgpu.distributed.cca(q, k, v)."""
        if self.group is None:
            return ccgpu.cca(q, k, v, backend=self.backend)
        return ccgpu.distributed.cca(q, k, v, group=self.group, dim=self.sharded_dim, backend=self.backend)

    def extra_repr(self) -> str:
        """Name the settings that the submodules do not show."""
        sharded = f", sharded_dim={self.sharded_dim}" if self.is_sharded else ""
        return super().extra_repr() + ("" if self.backend is None else f", backend={self.backend!r}") + sharded


class RCCA(CrissCrossAttention):
    """Recurrent criss-cross attention: `CrissCrossAttention` applied `recurrence` times with the same weights.

        x_0 = x
        x_r = gamma * cca(query_conv(x_{r-1}), key_conv(x_{r-1}), value_conv(x_{r-1})) + x_{r-1},  r = 1 ... R
        out = x_R

    After R = 2 loops every position of a 2D map has information from every other (R = 3 for 3D): the first loop brings
    information from u' to the position where the row of u' crosses the column of u, the second from there to u. R = 0
    is the identity.

    Args:
        in_channels, reduction, dims, gamma, backend, group, sharded_dim: as in `CrissCrossAttention`; so are shapes and
            errors.
        recurrence: R, 0 or more. The state dict does not depend on it: checkpoints of any R, and of
            `CrissCrossAttention`, interchange. The attribute can also be set later (`module.recurrence = 3`).
        recompute: every loop saves only its input: R feature maps for backward instead of about 3 R (97x97, C = 512,
            float32, R = 2: 39 MB instead of 125).

    Source: the paper, section 3.3, which chooses R = 2 in 2D; R = 3 in 3D is from the TPAMI version.

    Examples:
        >>> import torch
        >>> from ccgpu.models.attention import RCCA
        >>> rcca = RCCA(16, recurrence=3, dims=3)
        >>> rcca(torch.randn(1, 16, 2, 5, 7)).shape
        torch.Size([1, 16, 2, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        recurrence: int = 2,
        *,
        reduction: int = 8,
        dims: int = 2,
        gamma: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
        group: Group = None,
        sharded_dim: int = -2,
    ) -> None:
        options: dict[str, Any] = {"reduction": reduction, "dims": dims, "gamma": gamma, "recompute": recompute}
        super().__init__(in_channels, **options, backend=backend, group=group, sharded_dim=sharded_dim)
        require_int("RCCA", "recurrence", recurrence, 0)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """Attend `recurrence` times; see the class for formula and shapes."""
        self.check_input(x)
        for _ in range(self.recurrence):
            x = self.attend(x)
        return x

    def extra_repr(self) -> str:
        """Name the settings that the submodules do not show."""
        return f"recurrence={self.recurrence}, {super().extra_repr()}"


def attention_map(
    module: CrissCrossAttention, x: Tensor, at: Iterable[int], *, recurrence: int | None = None
) -> Tensor:
    """Return how much position `at` of the output attends to each position of x, over all loops of the module.

    Loop r aggregates values by out = A_r v, where the row A_r[u] holds u's attention weights: zero outside
    u's criss-cross, non-negative, summing to 1. The map is the row `at` of the product

        A_R ... A_2 A_1

    so it is non-negative and sums to 1 as well. No matrix is formed: `cca` is linear in v, so a row times A_r is the
    gradient of cca(q_r, k_r, v) with respect to a one-channel v, and R such steps lead from a row that is 1 at `at`
    and 0 elsewhere back to x. The map shows the attention weights alone. Gamma, the value convolution and the residual
    path (+ x) decide what these weights transport, not the weights themselves; they enter only through the inputs x_r
    of the later loops.

    Args:
        module: a `CrissCrossAttention` (one loop) or an `RCCA` (R loops; with R = 0 the map is 1 at `at`).
        x: the module's input, (B, C, *S).
        at: the position in S, one int for each axis, e.g. (y, x); each from 0 to its size - 1.
        recurrence: R, 0 or more; None: the module's own number of loops.

    Returns:
        (B, *S) on x's device, float32 (float64 for a float64 x), detached from the graph. The function also works
        under `torch.no_grad` and `torch.inference_mode`, and leaves the gradients of the parameters alone.

    Raises:
        TypeError: module is not a `CrissCrossAttention`, `at` is not ints, or recurrence is not an int.
        ValueError: x does not fit the module; `at` has another number of axes than S or lies outside it; recurrence is
            below 0.

    Source: the paper, section 3.3, follows one path over two loops; this is the sum over all paths and loops.
    """
    recurrence = _loops("attention_map", module, x, recurrence)
    size = tuple(x.shape[2:])
    position = check_position("attention_map", at, size)
    # The rows are computed by autograd, so the caller's no_grad or inference_mode must not apply here. Autograd cannot
    # save an inference tensor, but it can save a copy of one.
    with torch.inference_mode(False):
        x = x.detach().clone()
        loops = _queries_and_keys(module, x, recurrence)
        row = x.new_zeros((x.shape[0], 1, *size), dtype=torch.promote_types(x.dtype, torch.float32))
        one_hot: tuple[Any, ...] = (..., *position)
        row[one_hot] = 1
        for q, k in reversed(loops):
            row = _row_times_weights(row, q, k, module.backend)
        return row[:, 0]


@torch.no_grad()
def attention_weights(module: CrissCrossAttention, x: Tensor, *, recurrence: int | None = None) -> list[Tensor]:
    """Return how much every position attends to each position of its criss-cross, for each loop.

    These are the entries of A_1, ..., A_R on the criss-crosses; `attention_map` computes a row of the product of these
    matrices. For N positions with K neighbours they are R N K numbers, whereas all maps together have N^2.

    Args:
        module, x, recurrence: as in `attention_map`.

    Returns:
        R tensors (B, K, *S), K = sum(S) - len(S) + 1, the neighbours in the order of `ccgpu.affinity`; float32 (float64
        for a float64 x), summing to 1 over K.

    Raises:
        TypeError, ValueError: as in `attention_map`.
    """
    recurrence = _loops("attention_weights", module, x, recurrence)
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs = _queries_and_keys(module, x, recurrence)
        return [ccgpu.affinity(q.to(wide), k.to(wide)).softmax(1) for q, k in pairs]


def _loops(function: str, module: Any, x: Tensor, recurrence: int | None) -> int:
    """Check the module, its input and recurrence, and return R."""
    if not isinstance(module, CrissCrossAttention):
        raise TypeError(
            f"{function}: module must be a CrissCrossAttention or RCCA, "
            f"got {type(module).__name__}; for a network pass its attention, e.g. net.head.cca."
        )
    if module.group is not None:
        raise ValueError(
            f"{function}: module must attend within a whole map, got one of shards (group is set); set module.group to "
            "None and pass the whole x."
        )
    module.check_input(x)
    if recurrence is None:
        return module.recurrence if isinstance(module, RCCA) else 1
    require_int(function, "recurrence", recurrence, 0)
    return recurrence


@torch.no_grad()
def _queries_and_keys(module: CrissCrossAttention, x: Tensor, recurrence: int) -> list[tuple[Tensor, Tensor]]:
    """Return the queries and keys of each loop."""
    loops: list[tuple[Tensor, Tensor]] = []
    for loop in range(recurrence):
        loops.append((module.query_conv(x), module.key_conv(x)))
        if loop + 1 < recurrence:
            x = module.attend(x)
    return loops


def _row_times_weights(row: Tensor, q: Tensor, k: Tensor, backend: str | None) -> Tensor:
    """Return the vector-matrix product row A, A being the attention matrix of q and k; row is (B, 1, *S)."""
    # Under the caller's autocast each of the R products would be rounded to 16 bit.
    with torch.enable_grad(), torch.autocast(row.device.type, enabled=False):
        v = torch.zeros_like(row, requires_grad=True)
        out = ccgpu.cca(q.to(row.dtype), k.to(row.dtype), v, backend=backend)
        (product,) = torch.autograd.grad(out, v, row)
    return product
