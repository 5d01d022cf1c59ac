"""Noise levels and draws: values in closed form, statistics, independence of the batch, seeds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.noise import FrameGenerators, Noise, gaussian_noise, masked_multiscale_noise, noise_levels

SIZES = [3, 9, 1, 5]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(sizes: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def draw(kind: str, sizes: list[int], generator: torch.Generator, index: Tensor | None = None) -> Noise:
    batch = batch_of(sizes)
    if kind == "gaussian":
        return gaussian_noise(batch, len(sizes), 0.04, generator, index)
    levels = noise_levels(0.5, 0.01, 20)
    per_structure = kind == "per structure"
    return masked_multiscale_noise(
        batch, len(sizes), levels, 0.5, generator, per_structure=per_structure, index=index
    )


KINDS = ("gaussian", "per batch", "per structure")


def test_levels_have_exact_ends_and_a_constant_ratio() -> None:
    levels = noise_levels(10.0, 0.01, 50)
    assert levels[0] == 10.0
    assert levels[-1] == 0.01
    assert levels.shape == (50,)
    assert levels.dtype == torch.float64
    torch.testing.assert_close(levels[1:] / levels[:-1], torch.full((49,), 0.001 ** (1 / 49)).double())
    assert float(levels[1] / levels[0]) == pytest.approx(0.868511, abs=5e-7)
    assert float(noise_levels(10.0, 0.01, 30)[1] / 10) == pytest.approx(0.788046, abs=5e-7)
    # METHODS: sigma_k = 10 * 0.001^(k / 49)
    assert float(levels[17]) == pytest.approx(10 * 0.001 ** (17 / 49), rel=1e-13)


def test_levels_at_the_edges() -> None:
    assert noise_levels(0.3, 0.01, 1).tolist() == [0.3]
    assert noise_levels(0.3, 0.3, 4).tolist() == pytest.approx([0.3] * 4)
    assert noise_levels(0.3, 0.1, 2).tolist() == [0.3, 0.1]


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 0.0, 5),
        (0.1, 0.2, 5),
        (0.1, -0.1, 5),
        (0.1, 0.01, 0),
        (math.inf, 0.1, 3),
        (math.nan, 0.1, 3),
        (0.1, math.nan, 3),
    ],
)
def test_levels_refuse_bad_ranges(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError, match="noise levels"):
        noise_levels(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_noise_and_another_another(kind: str) -> None:
    first, again, other = (draw(kind, SIZES, seeded(s)) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.displacement, other.displacement)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_advances_the_generator_by_one_number(kind: str) -> None:
    used, expected = seeded(3), seeded(3)
    draw(kind, SIZES, used)
    torch.randint(0, 2**62, (1,), generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_structure_depends_on_its_index_alone(kind: str) -> None:
    index = torch.tensor([40, 7, 11, 3])
    whole = draw(kind, SIZES, seeded(5), index)
    parts = torch.split(whole.displacement, SIZES)
    masks = torch.split(whole.mask, SIZES)
    # another order, other company, alone
    for chosen in ([2, 0, 3, 1], [3, 1], [1]):
        found = draw(kind, [SIZES[i] for i in chosen], seeded(5), index[chosen])
        assert torch.equal(found.displacement, torch.cat([parts[i] for i in chosen]))
        assert torch.equal(found.mask, torch.cat([masks[i] for i in chosen]))
        assert torch.equal(found.sigma, whole.sigma[chosen])


def test_structures_differ_from_each_other_and_from_step_to_step() -> None:
    generator = seeded(0)
    first = gaussian_noise(batch_of([4, 4]), 2, 1.0, generator).displacement
    second = gaussian_noise(batch_of([4, 4]), 2, 1.0, generator).displacement
    assert not torch.equal(first[:4], first[4:])
    assert not torch.equal(first, second)


def test_gaussian_noise_is_standard_normal_times_sigma() -> None:
    sizes = [20] * 1000
    noise = gaussian_noise(batch_of(sizes), len(sizes), 0.04, seeded())
    unit = noise.displacement / 0.04
    n = unit.numel()
    # 60,000 numbers: five standard errors each
    assert abs(float(unit.mean())) < 5 / math.sqrt(n)
    assert abs(float(unit.square().mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(unit.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)
    # neighbouring streams are not correlated
    blocks = unit.view(1000, -1)
    assert abs(float((blocks[1:] * blocks[:-1]).mean())) < 5 / math.sqrt(n)
    assert bool(noise.mask.all())
    assert noise.sigma.tolist() == [0.04] * 1000


def test_zero_sigma_gives_no_noise() -> None:
    noise = gaussian_noise(batch_of(SIZES), len(SIZES), 0.0, seeded())
    assert not bool(noise.displacement.any())


@pytest.mark.parametrize("sigma", [-0.1, math.inf, math.nan])
def test_gaussian_noise_refuses_bad_sigma(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        gaussian_noise(batch_of([2]), 1, sigma, seeded())


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(0.0, [0, 0, 0, 0]), (0.01, [1, 1, 1, 1]), (0.5, [2, 4, 1, 2]), (0.25, [1, 2, 1, 1]), (1.0, SIZES)],
)
def test_masks_have_the_rounded_number_of_atoms(ratio: float, counts: list[int]) -> None:
    noise = masked_multiscale_noise(
        batch_of(SIZES), len(SIZES), torch.tensor([0.05]), ratio, seeded(), dtype=torch.float32
    )
    assert [int(part.sum()) for part in torch.split(noise.mask, SIZES)] == counts
    assert noise.displacement.dtype == torch.float32
    assert torch.equal(noise.displacement[~noise.mask], torch.zeros(int((~noise.mask).sum()), 3))
    assert bool((noise.displacement[noise.mask] != 0).all())


def test_masked_noise_takes_every_level_and_every_atom_equally_often() -> None:
    levels = noise_levels(0.05, 0.001, 5)
    sizes = [10] * 2000
    noise = masked_multiscale_noise(
        batch_of(sizes), len(sizes), levels, 0.3, seeded(), per_structure=True, index=None
    )
    share = torch.stack([(noise.sigma == level).double().mean() for level in levels])
    assert float((share - 0.2).abs().max()) < 5 * math.sqrt(0.2 * 0.8 / 2000)
    per_atom = noise.mask.view(2000, 10).double().mean(0)
    assert float((per_atom - 0.3).abs().max()) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    unit = (noise.displacement / noise.sigma[batch_of(sizes)].unsqueeze(1))[noise.mask]
    assert abs(float(unit.square().mean()) - 1) < 5 * math.sqrt(2 / unit.numel())


def test_a_level_for_each_batch_or_for_each_structure() -> None:
    levels = noise_levels(0.05, 0.001, 50)
    batch = batch_of([2] * 30)
    one = masked_multiscale_noise(batch, 30, levels, 1.0, seeded())
    each = masked_multiscale_noise(batch, 30, levels, 1.0, seeded(), per_structure=True)
    assert len(one.sigma.unique()) == 1
    assert len(each.sigma.unique()) > 10
    seen = {float(masked_multiscale_noise(batch, 30, levels, 1.0, seeded(s)).sigma[0]) for s in range(30)}
    assert len(seen) > 10


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_masked_noise_refuses_bad_ratios(ratio: float) -> None:
    with pytest.raises(ConfigError, match="mask_ratio"):
        masked_multiscale_noise(batch_of([2]), 1, torch.tensor([0.1]), ratio, seeded())


def test_streams_match_their_index_only() -> None:
    with pytest.raises(ValueError, match="zip"):
        FrameGenerators(seeded(), torch.tensor([1]), 2).normal([2, 2], torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_noise_for_a_graph_on_a_gpu_is_that_of_the_cpu() -> None:
    batch = batch_of(SIZES)
    here = masked_multiscale_noise(batch, 4, torch.tensor([0.05]), 0.5, seeded())
    there = masked_multiscale_noise(batch.cuda(), 4, torch.tensor([0.05]).cuda(), 0.5, seeded())
    assert there.displacement.is_cuda
    assert torch.equal(here.displacement, there.displacement.cpu())
