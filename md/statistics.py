"""Running statistics of a simulation: temperature, and how fast what should be constant is not."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class RunningMoments:
    """Mean, variance and linear trend of ``y`` against ``x``, one point at a time, without losing digits.

    Energies of -17,600 eV that drift by 1e-6 eV are no problem: sums are of differences from the mean.
    """

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    sum_xx: float = 0.0
    sum_xy: float = 0.0
    sum_yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self.n += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.n
        self.mean_y += dy / self.n
        self.sum_xx += dx * (x - self.mean_x)
        self.sum_xy += dx * (y - self.mean_y)
        self.sum_yy += dy * (y - self.mean_y)

    @property
    def std_y(self) -> float:
        """Standard deviation of ``y``; 0 before there are points."""
        return float((max(self.sum_yy, 0.0) / self.n) ** 0.5) if self.n else 0.0

    @property
    def slope(self) -> float | None:
        """Slope of the least-squares line; None with fewer than two places."""
        return self.sum_xy / self.sum_xx if self.sum_xx > 0 else None

    def state(self) -> dict[str, float]:
        """Return the sums as JSON-able values; ``RunningMoments(**state)`` goes on from them."""
        return asdict(self)
