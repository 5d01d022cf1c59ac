"""Messages over pairs that are listed once, as one operation that can be differentiated twice.

Where torch makes a tensor of the size of the filters, ``[pairs, 4 F]``, of every step of a message, and keeps
most of them for the second derivative, this goes through pairs one at a time and recomputes what is cheap:
nothing of that size is kept but the filters.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ffpretrain.native.build import NativeLibrary, NativeUnavailable

#: the inputs that give the sizes: ``mixed``, ``vec``, ``pre``
Sizes = tuple[Tensor, Tensor | None, Tensor]
_SUMS, _GRADIENT, _TANGENTS = 0, 1, 2
#: channels of a head that the code has room for: in vectors, and one by one
_MOST, _MOST_SINGLE = 256, 64
#: numbers per thread below which a thread costs more than it saves
_GRAIN = 200_000


class Shape(NamedTuple):
    """What does not change between the passes of one operation.

    Attributes:
        first: centre of each pair, int64 ``[P]``; of the other direction, the neighbour.
        second: its neighbour.
        heads: of the attention; 0 where there is none, as in PaiNN.
        selves: whether each atom is its own neighbour too; row P of the pairs' arrays is then for all.
    """

    first: Tensor
    second: Tensor
    heads: int = 0
    selves: bool = False


def messages(
    mixed: Tensor, vec: Tensor | None, pre: Tensor, weight: Tensor, direction: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Return the sums over neighbours of the equivariant transformer's scalar and vector messages.

    Eq. 5-8 of Thölke and De Fabritiis (ICLR 2022), with values multiplied by the cutoff function. For an atom
    i and a neighbour j with filters ``s = silu(pre)``, a head's attention is
    ``a = silu(sum(q_i * k_j * s_k))``, the scalar message ``w * x_j * s_x * a`` and the vector message
    ``w * (d_j * s_d * u_ij + v_j * s_v * vec_j)``.

    Args:
        mixed: ``[N, 5 F]``: query, key, and the values x, d and v of each atom; ``[N, 4 F]`` without vectors.
        vec: incoming vectors ``[N, 3, F]``, or None.
        pre: filters of key and values before their activation ``[rows, 4 F]``, or ``[rows, 3 F]``; rows is P,
            or P + 1 where ``shape.selves``.
        weight: cutoff function w ``[rows]``.
        direction: unit vectors u from first to second ``[rows, 3]``.
        shape: pairs and heads.

    Returns:
        ``[N, F]`` and ``[N, 3, F]``; both can be differentiated twice.

    Raises:
        NativeUnavailable: the native code cannot be built, or has no room for so many channels in a head.
    """
    return _Messages.apply(mixed, vec, pre, weight, direction, shape)


def painn_messages(
    context: Tensor, vec: Tensor | None, filters: Tensor, weight: Tensor, direction: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Return the sums over neighbours of PaiNN's scalar and vector messages.

    Eq. 7 and 8 of Schütt, Unke and Gastegger (ICML 2021). An atom i gets from a neighbour j with filters
    ``f`` the scalar message ``w * c_s * f_s`` and the vector message
    ``w * (c_d * f_d * u_ij + c_v * f_v * vec_j)``, with c of the neighbour.

    Args:
        context: ``[N, 3 F]``: the scalar, direction and vector parts c of each atom; ``[N, 2 F]`` without
            vectors.
        vec: incoming vectors ``[N, 3, F]``, or None.
        filters: ``[P, 3 F]``, or ``[P, 2 F]``, of the same parts.
        weight: cutoff function w ``[P]``.
        direction: unit vectors u from first to second ``[P, 3]``.
        shape: pairs, without heads and selves.

    Returns:
        ``[N, F]`` and ``[N, 3, F]``; both can be differentiated twice.

    Raises:
        NativeUnavailable: the native code cannot be built.
    """
    return _Messages.apply(context, vec, filters, weight, direction, shape)


def require(features: int, heads: int) -> None:
    """Build the code and see that it can hold a network of this size.

    Raises:
        NativeUnavailable: it cannot be built, or has no room for so many channels in a head.
    """
    per_head = features // heads
    most = _MOST_SINGLE if per_head % 4 else _MOST
    if per_head > most:
        raise NativeUnavailable(
            f"native messages hold {most} channels in a head of this kind, not {per_head}"
        )
    LIBRARY.load()


def _declare(library: ctypes.CDLL) -> None:
    library.ff_messages.argtypes = [
        ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    library.ff_messages.restype = ctypes.c_int64


LIBRARY = NativeLibrary(Path(__file__).resolve().parent, _declare, openmp=True)


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        vec: Tensor | None,
        pre: Tensor,
        weight: Tensor,
        direction: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        given = _contiguous(mixed, vec, pre, weight, direction)
        ctx.shape = shape
        ctx.save_for_backward(mixed, vec, pre, weight, direction)
        n, f = len(mixed), _features(mixed, vec, shape)
        sums = mixed.new_zeros(n, f), mixed.new_zeros(n, 3, f)
        _call(_SUMS, shape, given, sums=sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        gx, gd = cotangents
        return (*_Gradient.apply(*ctx.saved_tensors, gx, gd, ctx.shape), None)


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        *inputs, gx, gd, shape = args
        ctx.shape = shape
        ctx.save_for_backward(*inputs, gx, gd)
        out = _outputs(inputs, shape)
        _call(_GRADIENT, shape, _contiguous(*inputs), cotangents=_contiguous(gx, gd), gradients=out)
        return _split(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, gx, gd = ctx.saved_tensors
        shape = ctx.shape
        sums, out = (torch.zeros_like(gx), torch.zeros_like(gd)), _outputs(inputs, shape)
        _call(
            _TANGENTS, shape, _contiguous(*inputs), tangents=_contiguous(*tangents),
            cotangents=_contiguous(gx, gd), sums=sums, gradients=out,
        )  # fmt: skip
        return (*_split(out), *sums, None)


def _features(mixed: Tensor, vec: Tensor | None, shape: Shape) -> int:
    return mixed.shape[1] // ((4 if shape.heads else 2) + (vec is not None))


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _outputs(inputs: list[Tensor | None], shape: Shape) -> tuple[Tensor | None, ...]:
    """Memory for the derivatives: of ``mixed``, ``vec``, ``pre``, and of weight and direction by thread.

    All zeros but that of ``pre``, whose rows are written once, apart from that of an atom with itself.
    """
    mixed, vec, pre = cast("Sizes", inputs[:3])
    geometry = mixed.new_zeros(_threads(shape, pre), len(pre), 4)
    filters = torch.empty_like(pre, memory_format=torch.contiguous_format)
    filters[len(shape.first) :] = 0
    return (
        torch.zeros_like(mixed),
        None if vec is None else torch.zeros_like(vec),
        filters,
        geometry,
    )


def _split(out: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    *first, geometry = out
    total = cast("Tensor", geometry).sum(0)
    return (*first, total[:, 0].contiguous(), total[:, 1:].contiguous())


def _threads(shape: Shape, pre: Tensor) -> int:
    most = min(torch.get_num_threads(), shape.heads or pre.shape[1])
    return max(1, min(most, pre.numel() // _GRAIN))


def _call(
    task: int,
    shape: Shape,
    given: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...] = (None,) * 5,
    cotangents: tuple[Tensor | None, ...] = (None,) * 2,
    sums: tuple[Tensor | None, ...] = (None,) * 2,
    gradients: tuple[Tensor | None, ...] = (None,) * 4,
) -> None:
    mixed, vec, pre = cast("Sizes", given[:3])
    tensors = (shape.first, shape.second, *given, *tangents, *cotangents, *sums, *gradients)
    pointers = np.array([0 if t is None else t.data_ptr() for t in tensors], dtype=np.uint64)
    features = _features(mixed, vec, shape)
    sizes = np.array(
        [len(mixed), len(shape.first), features, shape.heads, vec is not None, shape.selves], dtype=np.int64
    )
    failed = LIBRARY.load().ff_messages(
        task, mixed.element_size(), sizes.ctypes.data, pointers.ctypes.data, _threads(shape, pre)
    )
    if failed:
        raise MemoryError("native messages ran out of memory; use smaller batches")
