"""How the time of a simulated run divides into kinds of operators, worked out from its iterations once it is over.

What depends on a batch's rows alone (linear layers, experts, collectives, norms and activations) and what the host adds
are asked of the calibration for each size of batch. What is left of the stages' time is attention and, where the host
is slower than the GPU, waiting for it: the tables of a run do not have the lengths that attention depends on.

    operator_times(deployment, iterations)   # {"linear": ..., "communication": ..., ...} in seconds of a stage
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.results.tables import Array
from engine.specs.device_folder import folder_of
from simulator.cluster import Deployment
from simulator.predictor import calibration as store
from simulator.predictor.grids import ROWS
from simulator.predictor.learned import Learned
from simulator.predictor.tables import TableMaker

FAMILIES = ("linear", "communication", "other", "host")
REST = "attention_and_waits"
COLUMNS = ("stage", "duration_s", "num_tokens", "num_decodes", "num_prefills")


def operator_times(deployment: Deployment, iterations: Mapping[str, Array]) -> dict[str, float] | None:
    """Return seconds by family, over all stages of the replicas of a deployment whose `iterations` (rows,) these are.

    None where the times are not those of a calibration. A batch's prompts are each taken to have a token sampled.
    """
    folder, host = folder_of(deployment.device), deployment.host
    if folder is None or host is None or not isinstance(deployment.predictor, Learned):
        return None
    model, device, network, parallel = deployment.model, deployment.device, deployment.network, deployment.parallel
    calibration = store.load(folder, device, host.kernels)
    maker = TableMaker(calibration, model, device, network, parallel, host.attention_kernel, host.kernels)
    found = dict.fromkeys((*FAMILIES, REST), 0.0)
    layers = parallel.stage_layers(model.num_layers)
    for stage in range(parallel.pipeline_parallel_size):
        mine = iterations["stage"] == stage
        tokens, decodes, prompts = (iterations[name][mine].astype(np.int64) for name in COLUMNS[2:])
        rows = {"tokens": _padded(tokens, host.graph_sizes), "sampled": decodes + prompts}
        spent = dict.fromkeys(FAMILIES, 0.0)
        for op, kind in maker.sorted[stage].rows:
            sizes, counts = np.unique(rows[op.rows], return_counts=True)
            times = host.factor(maker.name(op, stage)) * np.interp(sizes, ROWS, maker.by_rows(op, stage, ROWS))
            times[sizes == 0] = 0.0
            family = kind.family if kind.family in FAMILIES else "other"
            spent[family] += float(times @ counts)
        alone, one = (host.times(layers[stage], count, parallel.world_size, stage)[1] for count in (0, 1))
        spent["host"] = float(alone * len(tokens) + (one - alone) * (decodes + prompts).sum())
        rest = float(iterations["duration_s"][mine].sum()) - sum(spent.values())
        for family, seconds in {**spent, REST: max(0.0, rest)}.items():
            found[family] += seconds
    return found


def _padded(tokens: Array, sizes: tuple[int, ...]) -> Array:
    """Return the tokens that batches are computed as, with the padding of CUDA graphs of these sizes."""
    if not sizes:
        return tokens
    place = np.searchsorted(sizes, tokens)
    return np.where(place < len(sizes), np.array(sizes)[np.minimum(place, len(sizes) - 1)], tokens)
