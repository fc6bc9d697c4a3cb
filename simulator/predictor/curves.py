"""Rising curves through noisy measurements: time against bytes, straight between knots in log-log (or in bytes).

Times of small sizes are quantised by the clock and come in two modes, so knots are medians, not means, and are made to
rise by isotonic regression (Barlow et al. 1972).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.results.tables import Array

SPARSE = 1.9  # from which factor between sizes on they are an octave apart, but for the rounding of a bin's median


@dataclass(frozen=True)
class Curve:
    """Seconds at knots of a size in bytes, both rising.

    Below the first knot a time is the first knot's; beyond the last it grows in proportion to the bytes.
    """

    sizes: Array
    seconds: Array

    @classmethod
    def fit(cls, sizes: Array, seconds: Array, *, knots_per_octave: int = 2, weights: Array | None = None) -> Curve:
        """The curve through the medians of the measurements in bins of equal width in log bytes.

        Both are (rows,), in bytes and seconds. A bin at either end that holds less than three quarters of the next
        joins it: an outlier there would go on for ever. Knots are rounded to what their text keeps.
        """
        weights = np.ones(len(sizes)) if weights is None else weights
        x, y = np.log(sizes), np.log(seconds)
        bins = np.floor(np.log2(sizes) * knots_per_octave + 0.5).astype(int)
        every, number = np.unique(bins, return_inverse=True)
        held = np.bincount(number, weights)
        for end, inner in ((0, 1), (-1, -2)):
            if len(every) > 2 and held[end] < 0.75 * held[inner]:
                bins = np.where(bins == every[end], every[inner], bins)
        parts = [np.flatnonzero(bins == one) for one in np.unique(bins)]
        count = np.array([weights[rows].sum() for rows in parts])
        knots = np.array([_median(x[rows], weights[rows]) for rows in parts])
        values = isotonic(np.array([_median(y[rows], weights[rows]) for rows in parts]), count)
        # among outliers the median of a bin's times is off by how far they rise within it: that of the residuals is not
        left = y - np.log(cls(np.exp(knots), np.exp(values))(sizes))
        values += [_median(left[rows], weights[rows]) for rows in parts]
        return cls.of(np.exp(knots), np.exp(isotonic(values, count)))

    @classmethod
    def of(cls, sizes: Array, seconds: Array) -> Curve:
        """The curve through these knots, without those inside a flat stretch."""
        kept = np.ones(len(sizes), dtype=bool)
        kept[1:-1] = (seconds[1:-1] != seconds[:-2]) | (seconds[1:-1] != seconds[2:])
        return cls(*(np.array([float(f"{value:.5g}") for value in knots[kept]]) for knots in (sizes, seconds)))

    def __call__(self, sizes: Array) -> Array:
        """Seconds, (rows,), of sizes in bytes."""
        logs = np.log(np.maximum(sizes, self.sizes[0]))
        seconds = np.exp(np.interp(logs, np.log(self.sizes), np.log(self.seconds)))
        return np.asarray(seconds * np.maximum(1.0, sizes / self.sizes[-1]))

    def of_messages(self, sizes: Array) -> Array:
        """Seconds, (rows,), of messages: straight in bytes where sizes were measured an octave apart or more.

        A message takes a latency and its bytes at a rate; a line in log-log lies above such times between its ends.
        """
        if len(self.sizes) < 2 or (self.sizes[1:] < SPARSE * self.sizes[:-1]).any():
            return self(sizes)
        seconds = np.interp(sizes, self.sizes, self.seconds)
        return np.asarray(seconds * np.maximum(1.0, sizes / self.sizes[-1]))

    def to_json(self) -> dict[str, list[float]]:
        return {"bytes": self.sizes.tolist(), "seconds": self.seconds.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, list[float]]) -> Curve:
        return cls(np.array(data["bytes"]), np.array(data["seconds"]))


def isotonic(values: Array, weights: Array) -> Array:
    """The rising values (n,) nearest to `values` by weighted absolute distance: neighbours that fall are pooled.

    A pool takes its median, so that one outlier does not lift its neighbours.
    """
    pools: list[tuple[float, int, int]] = []  # median, first and end of the pooled values
    for end in range(1, len(values) + 1):
        median, first = float(values[end - 1]), end - 1
        while pools and pools[-1][0] >= median:
            first = pools.pop()[1]
            median = _median(values[first:end], weights[first:end])
        pools.append((median, first, end))
    return np.repeat([median for median, _, _ in pools], [end - first for _, first, end in pools])


def _median(values: Array, weights: Array) -> float:
    """The weighted median; the mean of the two in the middle where they divide the weight evenly."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    half = below[-1] / 2
    first, second = (int(np.searchsorted(below, half, side)) for side in ("left", "right"))
    return float((values[order[first]] + values[order[min(second, len(values) - 1)]]) / 2)
