"""What Figure 2 and Table 2 of the Sarathi-Serve paper say of its engine's host time, by a fit.

Yi-34B on two A100 (TP2): whole prompts, decodes of about 1024 tokens of context, and Table 2's three batches. The
constants `iteration_s` and `sequence_s` that bring the predictions nearest to these times (least squares of the
logarithm of predicted / published; neither below 0) are the host overhead `sarathi_osdi24_fig2`. It repeats
numbers that it was fitted to, so nothing of Figure 2 or Table 2 is a claim of it.

    python -m studies.published.fitted_host
"""

from __future__ import annotations

import numpy as np

from engine.results.tables import Array
from engine.scheduling.request import BatchShape
from engine.specs import ParallelSpec, catalog
from simulator.cluster import deploy
from studies.published.operation_split import batch_shape

MEASURED = "sarathi_osdi24"
CONTEXT = 1024
PREFILL_MS = {128: 48.1, 512: 105.6, 1024: 214.3, 2048: 366.0, 4096: 758.0, 8192: 1863.0, 16384: 4407.0}
DECODE_MS = {1: 46.8, 2: 47.5, 4: 48.8, 8: 69.7, 16: 77.3, 32: 87.9, 64: 127.8, 128: 189.3}
TABLE_2_MS = {(0, 4): 68.1, (1021, 3): 217.6, (1024, 0): 217.2}  # prompt tokens and decodes


def published() -> list[tuple[BatchShape, float]]:
    """Return the batches of Figure 2 and Table 2, and the seconds they took."""
    rows = [((tokens, 0), ms) for tokens, ms in PREFILL_MS.items()]
    rows += [((0, batch), ms) for batch, ms in DECODE_MS.items()]
    return [(batch_shape(*which, CONTEXT), 1e-3 * ms) for which, ms in (*rows, *TABLE_2_MS.items())]


def residuals(iteration_s: float, sequence_s: float, base: Array, sequences: Array, seconds: Array) -> Array:
    """Return log(predicted / published) of batches that take `base` seconds without these two constants."""
    return np.asarray(np.log((base + iteration_s + sequence_s * sequences) / seconds))


def fit() -> tuple[float, float, dict[str, float]]:
    """Return iteration_s, sequence_s, and the typical error (root mean square of the log) before and after."""
    from scipy.optimize import least_squares

    host = catalog.host_overhead(MEASURED)
    deployment = deploy("01-ai/Yi-34B", "a100", parallel=ParallelSpec(tensor_parallel_size=2),
                        host_overhead=host.name, num_gpu_blocks_override=1)  # fmt: skip
    shapes, took = zip(*published(), strict=True)
    seconds = np.array(took)
    sequences = np.array([shape.num_decodes + len(shape.prefills) for shape in shapes], dtype=float)
    times = np.array([deployment.predictor.stage_time(shape, 0) for shape in shapes])
    base = times - host.iteration_s - host.sequence_s * sequences  # without the two constants
    found = least_squares(lambda x: residuals(x[0], x[1], base, sequences, seconds), [0.01, 1e-4], bounds=(0, np.inf),
                          x_scale=[1e-2, 1e-4])  # fmt: skip
    before = residuals(host.iteration_s, host.sequence_s, base, sequences, seconds)
    errors = {name: float(np.sqrt(np.mean(each**2))) for name, each in (("before", before), ("after", found.fun))}
    return float(found.x[0]), float(found.x[1]), errors


if __name__ == "__main__":
    iteration_s, sequence_s, errors = fit()
    print(f"iteration_s {iteration_s:.4g}, sequence_s {sequence_s:.4g}; {errors}")
