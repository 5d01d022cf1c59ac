"""Every noise distribution of the package. Each draw comes from a generator that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError


class Noise(NamedTuple):
    """A draw of coordinate noise.

    Attributes:
        displacement: what is added to the positions, Å, ``[N, 3]``; zero on atoms left alone.
        sigma: standard deviation used for each structure, Å, ``[B]``.
        mask: atoms that were displaced, bool ``[N]``.
    """

    displacement: Tensor
    sigma: Tensor
    mask: Tensor


def noise_levels(sigma_max: float, sigma_min: float, n: int) -> Tensor:
    """Return ``n`` noise levels spaced evenly in their logarithm, largest first, float64 ``[n]``.

    Level k is ``sigma_max * (sigma_min / sigma_max) ** (k / (n - 1))``, as in 3D-EMGP (appendix B.2) and
    SE(3)-DDM (appendix D.5); both ends are exact.

    Args:
        sigma_max: largest level, Å.
        sigma_min: smallest level, Å.
        n: number of levels, at least 1; a single level is ``sigma_max``.

    Raises:
        ConfigError: ``n < 1`` or not ``0 < sigma_min <= sigma_max``, both finite.
    """
    if n < 1:
        raise ConfigError(f"noise levels: n={n}; give at least 1")
    if not 0 < sigma_min <= sigma_max < float("inf"):
        raise ConfigError(f"noise levels: need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    levels = torch.logspace(0, 1, n, base=sigma_min / sigma_max, dtype=torch.float64) * sigma_max
    levels[0] = sigma_max
    if n > 1:
        levels[-1] = sigma_min
    return levels


class FrameGenerators:
    """One random stream per structure, so that a structure's noise does not depend on its batch.

    A single draw from ``generator`` gives the base of this step; each structure's stream is seeded by the
    base and the structure's own index. Splitting a batch over processes then changes no draw.

    Args:
        generator: advanced by exactly one draw; its device is that of the streams.
        index: an integer that identifies each structure ``[B]``; None numbers them by position.
        n_graphs: B.
    """

    def __init__(self, generator: torch.Generator, index: Tensor | None, n_graphs: int) -> None:
        device = generator.device
        base = int(torch.randint(0, 2**62, (1,), generator=generator, device=device))
        ids: Sequence[int] = range(n_graphs) if index is None else index.tolist()
        # 0x9E37... is the odd number nearest 2^64 / golden ratio: consecutive indices land far apart
        self._streams = [
            torch.Generator(device).manual_seed((base + 0x9E3779B97F4A7C15 * (i + 1)) % 2**63) for i in ids
        ]
        self.shared = torch.Generator(device).manual_seed(base)

    def normal(self, counts: Sequence[int], dtype: torch.dtype, width: int = 3) -> Tensor:
        """Draw standard normal numbers ``[sum(counts), width]``, each structure from its own stream."""
        pieces = [
            torch.randn(n, width, generator=g, dtype=dtype, device=g.device)
            for n, g in zip(counts, self._streams, strict=True)
        ]
        return torch.cat(pieces)

    def uniform(self, counts: Sequence[int]) -> list[Tensor]:
        """Draw uniform numbers in [0, 1), float64, ``counts[b]`` for structure b."""
        return [
            torch.rand(n, generator=g, dtype=torch.float64, device=g.device)
            for n, g in zip(counts, self._streams, strict=True)
        ]


def gaussian_noise(
    batch: Tensor,
    n_graphs: int,
    sigma: float,
    generator: torch.Generator,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Noise:
    """Draw isotropic Gaussian noise of one standard deviation for every atom.

    Args:
        batch: structure of each atom ``[N]``.
        n_graphs: B.
        sigma: Å.
        generator: source of randomness.
        index: identifies each structure, see :class:`FrameGenerators`.
        dtype: of the result.

    Raises:
        ConfigError: ``sigma`` is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        raise ConfigError(f"noise: sigma={sigma} must be finite and not negative; give it in Å")
    counts = torch.bincount(batch, minlength=n_graphs).tolist()
    unit = FrameGenerators(generator, index, n_graphs).normal(counts, dtype).to(batch.device)
    levels = torch.full((n_graphs,), sigma, dtype=dtype, device=batch.device)
    return Noise(unit * sigma, levels, torch.ones_like(batch, dtype=torch.bool))


def masked_multiscale_noise(
    batch: Tensor,
    n_graphs: int,
    sigmas: Tensor,
    mask_ratio: float,
    generator: torch.Generator,
    *,
    per_structure: bool = False,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Noise:
    """Draw Gaussian noise at a random level on a random subset of the atoms (NDeM section 4.3.2, after DeNS).

    Args:
        batch: structure of each atom ``[N]``, ascending.
        n_graphs: B.
        sigmas: levels to choose from with equal chance ``[L]``, Å.
        mask_ratio: fraction of each structure's atoms that is displaced; the number is rounded, at least 1
            where the ratio is above 0.
        generator: source of randomness.
        per_structure: a level for each structure; otherwise one for the whole batch.
        index: identifies each structure, see :class:`FrameGenerators`.
        dtype: of the displacement.

    Raises:
        ConfigError: ``mask_ratio`` outside [0, 1].
    """
    if not 0 <= mask_ratio <= 1:
        raise ConfigError(f"mask_ratio={mask_ratio} must lie between 0 and 1")
    counts = torch.bincount(batch, minlength=n_graphs).tolist()
    streams = FrameGenerators(generator, index, n_graphs)
    if per_structure:
        picks = torch.stack([u[0] for u in streams.uniform([1] * n_graphs)])
    else:
        device = streams.shared.device
        picks = torch.rand(1, generator=streams.shared, dtype=torch.float64, device=device).expand(n_graphs)
    sigma = sigmas.to(batch.device, dtype)[(picks * len(sigmas)).long().to(batch.device)]
    masks = []
    for order in streams.uniform(counts):
        n = len(order)
        chosen = max(1, round(mask_ratio * n)) if mask_ratio > 0 else 0
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order.argsort()[:chosen].cpu()] = True
        masks.append(mask)
    mask = torch.cat(masks).to(batch.device)
    unit = streams.normal(counts, dtype).to(batch.device)
    return Noise(unit * sigma[batch].unsqueeze(-1) * mask.unsqueeze(-1), sigma, mask)


class RiemannScore(NamedTuple):
    """Score of the Riemann-Gaussian distribution and its normaliser.

    Attributes:
        score: ``grad log p`` times ``sigma^2``, ``[N, 3]``.
        alpha: normaliser of 3D-EMGP's eq. 12, ``[B]``.
    """

    score: Tensor
    alpha: Tensor


def riemann_gaussian_log_density(noisy: Tensor, clean: Tensor, sigma: Tensor, batch: Tensor) -> Tensor:
    """Return ``-d^2 / (4 sigma^2)`` of each structure ``[B]``, eq. 9-10 of 3D-EMGP without its constant.

    ``d = |Y~^T Y~ - Y^T Y|_F`` compares the matrices of inner products between atoms, in columns and centred;
    it is found from second moments, at a cost that grows with N: ``d^2 = |M~|^2 + |M|^2 - 2 |C|^2``.
    Arguments as :func:`riemann_gaussian_score`.
    """
    n = len(sigma)
    y, x = _centred(noisy, batch, n), _centred(clean, batch, n)
    own, other, cross = _moment(y, y, batch, n), _moment(x, x, batch, n), _moment(x, y, batch, n)
    squares = [m.square().sum((1, 2)) for m in (own, other, cross)]
    return -(squares[0] + squares[1] - 2 * squares[2]) / (4 * sigma.to(noisy).square())


def riemann_gaussian_score(noisy: Tensor, clean: Tensor, sigma: Tensor, batch: Tensor) -> Tensor:
    """Return the score of the Riemann-Gaussian distribution, eq. 11 of 3D-EMGP, ``[N, 3]``.

    ``-(1 / sigma^2) [(Y~ Y~^T) Y~ - (Y~ Y^T) Y]`` in columns, with centred ``Y``: the gradient by ``noisy``
    of ``-d^2 / (4 sigma^2)``, where ``d`` is the distance of the two Gram matrices (eq. 9-10). It turns
    with ``noisy``, does not change when ``clean`` is moved or turned, and has no net force or torque. The
    cost grows with N: no matrix between atoms is formed.

    Args:
        noisy: positions ``[N, 3]``.
        clean: positions ``[N, 3]``.
        sigma: level of each structure ``[B]``.
        batch: structure of each atom ``[N]``.
    """
    found = _riemann(noisy, clean, batch, len(sigma))
    return found.score / sigma.to(noisy)[batch].square().unsqueeze(1)


def riemann_gaussian_target(noisy: Tensor, clean: Tensor, sigma: Tensor, batch: Tensor) -> Tensor:
    """Return ``sigma S / alpha``, what eq. 12 of 3D-EMGP trains forces on, ``[N, 3]``.

    ``alpha = (|Y~ Y~^T|_F + |Y~ Y^T|_F) / 2`` for each structure; where it is zero, as for a single atom, the
    target is zero. Arguments as :func:`riemann_gaussian_score`.
    """
    found = _riemann(noisy, clean, batch, len(sigma))
    divisor = sigma.to(noisy) * found.alpha
    return torch.where((divisor > 0)[batch].unsqueeze(1), found.score / divisor[batch].unsqueeze(1), 0.0)


def riemann_gaussian_slope(n_atoms: Tensor, shape: float | Tensor) -> Tensor:
    """Return c, the number by which ``sigma S / alpha`` comes closest to ``-(displacement) / sigma`` ``[B]``.

    To first order the target of 3D-EMGP is ``-L d / (sigma |M|)`` for a displacement d, with the linear map
    ``L d = d M + Y (d^T Y)`` and the second moments ``M = Y^T Y`` of the structure (rows are atoms). L weighs
    directions by M, so no number makes it the identity; least squares over isotropic noise gives
    ``c = tr(L) |M| / tr(L^2) = N sqrt(shape) / (N + 1 + shape)``, from ``tr L = N tr M`` and
    ``tr L^2 = (N + 1) |M|^2 + (tr M)^2``. For two atoms it is exact: 1/2.

    Args:
        n_atoms: N of each structure ``[B]``.
        shape: ``(tr M)^2 / tr(M^2)``: 1 for a rod, 2 for a disk, 3 for a ball; no more than N - 1.
    """
    n = n_atoms.to(torch.float64)
    bounded = torch.minimum(n - 1, torch.as_tensor(shape).to(n))
    return n * bounded.sqrt() / (n + 1 + bounded)


def riemann_gaussian_sample(
    clean: Tensor,
    sigma: Tensor,
    batch: Tensor,
    generator: torch.Generator,
    steps: int = 1,
    index: Tensor | None = None,
) -> Tensor:
    """Draw noisy positions ``[N, 3]``: :func:`riemann_gaussian_noise` with draws from a generator.

    Args:
        clean: positions ``[N, 3]``.
        sigma: level of each structure ``[B]``.
        batch: structure of each atom ``[N]``, ascending.
        generator: source of randomness.
        steps: of the Langevin dynamics, T of appendix A.6.
        index: identifies each structure, see :class:`FrameGenerators`.

    Raises:
        ConfigError: ``steps`` below 1.
    """
    if steps < 1:
        raise ConfigError(f"riemann_gaussian_sample: steps={steps}; give at least 1")
    counts = torch.bincount(batch, minlength=len(sigma)).tolist()
    streams = FrameGenerators(generator, index, len(sigma))
    unit = [streams.normal(counts, clean.dtype).to(clean.device) for _ in range(steps)]
    return riemann_gaussian_noise(clean, batch, sigma, unit)


def riemann_gaussian_noise(pos: Tensor, batch: Tensor, sigma: Tensor, unit: Sequence[Tensor]) -> Tensor:
    """Return noisy positions ``[N, 3]`` after Langevin steps towards the Riemann-Gaussian distribution.

    Appendix A.6 of 3D-EMGP: step t of length ``beta_t = sigma^2 / 2^t`` (as in the published code) drifts
    along ``S / alpha`` and adds ``sqrt(2 beta_t)`` times a normal draw. It starts where the score is zero,
    so one step, the paper's choice, gives exactly ``pos + sigma * unit[0]``: isotropic Gaussian noise.

    Args:
        pos: clean positions ``[N, 3]``.
        batch: structure of each atom ``[N]``.
        sigma: level of each structure ``[B]``.
        unit: a standard normal draw ``[N, 3]`` for each step.
    """
    noisy, level = pos, sigma.to(pos)[batch].unsqueeze(1)
    for t, draw in enumerate(unit, start=1):
        if t > 1:
            # beta S / alpha, and target = sigma S / alpha
            noisy = noisy + level / 2**t * riemann_gaussian_target(noisy, pos, sigma, batch)
        noisy = noisy + level * (2 / 2**t) ** 0.5 * draw
    return noisy


def _riemann(noisy: Tensor, clean: Tensor, batch: Tensor, n_graphs: int) -> RiemannScore:
    y, x = _centred(noisy, batch, n_graphs), _centred(clean, batch, n_graphs)
    own, cross = _moment(y, y, batch, n_graphs), _moment(x, y, batch, n_graphs)
    score = torch.einsum("ni,nij->nj", x, cross[batch]) - torch.einsum("ni,nij->nj", y, own[batch])
    alpha = 0.5 * (torch.linalg.matrix_norm(own) + torch.linalg.matrix_norm(cross))
    return RiemannScore(score, alpha)


def _moment(a: Tensor, b: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
    """Return ``sum_i a_i b_i^T`` over the atoms of each structure ``[B, 3, 3]``."""
    outer = a.unsqueeze(2) * b.unsqueeze(1)
    return outer.new_zeros(n_graphs, 3, 3).index_add(0, batch, outer)


def _centred(pos: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
    count = torch.bincount(batch, minlength=n_graphs).clamp_min(1).to(pos).unsqueeze(1)
    return pos - (pos.new_zeros(n_graphs, 3).index_add(0, batch, pos) / count)[batch]
