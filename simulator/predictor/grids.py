"""The grids that a deployment's times are tabulated over, once; between their points they are interpolated."""

from __future__ import annotations

import numpy as np

MOST_ROWS = 16384  # batch tokens that are tabulated; larger batches go on with the last row's time per token
MOST_REQUESTS = 1024
MOST_TOKENS = 1 << 22  # cached tokens of a decode batch
PREFIXES = np.unique(np.concatenate([[0], np.geomspace(64, 1 << 18, 33).round()]))
CHUNKS = np.unique(np.geomspace(1, 1 << 18, 61).round())
PROMPTS = np.array([1.0, 2, 4, 8, 16, 64, 256])  # of one batch
REQUESTS = np.unique(np.geomspace(1, MOST_REQUESTS, 41).round())
ROWS = np.unique(
    np.concatenate([np.arange(1, 513), np.arange(512, 2049, 8), np.arange(2048, MOST_ROWS + 1, 64)])
).astype(float)
KV_TOKENS = np.unique(np.concatenate([[1], np.geomspace(16, MOST_TOKENS, 61).round()]))
LENGTHS = np.unique(np.concatenate([[1], np.geomspace(16, 1 << 20, 65).round()]))  # cached tokens of a decode
