"""A small forest of regression trees that is fitted by scikit-learn and kept as text.

A calibration must be readable, diffable and independent of a library's pickles, so the trees are written as one line a
node and evaluated here, with numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.tables import Array


@dataclass(frozen=True)
class Forest:
    """Trees by their nodes, in preorder: the left child of an inner node is the node after it.

    `feature` (nodes,) is the column that an inner node compares, -1 at a leaf; `value` its threshold, or the leaf's
    prediction; `right` the node to go on with where the column is above the threshold. `roots` are the trees.
    """

    feature: Array
    value: Array
    right: Array
    roots: Array

    @classmethod
    def fit(cls, x: Array, y: Array, *, weights: Array | None = None, trees: int = 20, **options: Any) -> Forest:
        """Extremely randomised trees (Geurts et al. 2006) on `x` (rows, features), `y` (rows,); same data, same trees.

        `options` go to sklearn.ensemble.ExtraTreesRegressor (max_leaf_nodes, min_samples_leaf, max_features, ...).
        Numbers are rounded to what the text keeps, so a forest that was written and read again predicts the same.
        """
        from sklearn.ensemble import ExtraTreesRegressor

        model = ExtraTreesRegressor(trees, random_state=0, **options).fit(x, y, sample_weight=weights)
        parts = [_preorder(estimator.tree_) for estimator in model.estimators_]
        roots = np.cumsum([0, *(len(feature) for feature, _, _ in parts[:-1])])
        feature = np.concatenate([feature for feature, _, _ in parts])
        value = np.array([float(f"{number:.5g}") for part in parts for number in part[1]])
        right = np.concatenate([right + root for (_, _, right), root in zip(parts, roots, strict=True)])
        return cls(feature, value, right, roots)

    def predict(self, x: Array) -> Array:
        """The mean of the trees, (rows,), for `x` (rows, features)."""
        total = np.zeros(len(x))
        for root in self.roots:
            node = np.full(len(x), root)
            rows = np.arange(len(x))
            while len(rows):
                at = node[rows]
                feature = self.feature[at]
                rows, at, feature = rows[feature >= 0], at[feature >= 0], feature[feature >= 0]
                node[rows] = np.where(x[rows, feature] <= self.value[at], at + 1, self.right[at])
            total += self.value[node]
        return total / len(self.roots)

    def to_lines(self) -> list[str]:
        """A node a line: `feature threshold right`, or a leaf's value; an empty line before each tree but the first."""
        lines = []
        starts = set(self.roots[1:].tolist())
        columns = (self.feature.tolist(), self.value.tolist(), self.right.tolist())
        for node, (feature, value, right) in enumerate(zip(*columns, strict=True)):
            if node in starts:
                lines.append("")
            lines.append(f"{value:.5g}" if feature < 0 else f"{feature} {value:.5g} {right}")
        return lines

    @classmethod
    def from_lines(cls, lines: list[str]) -> Forest:
        """The forest of `to_lines`. Raises ValueError for anything else."""
        feature: list[int] = []
        value: list[float] = []
        right: list[int] = []
        roots = [0]
        for line in lines:
            words = line.split()
            if not words:
                roots.append(len(feature))
                continue
            if len(words) not in (1, 3):
                raise ValueError(f"a tree node reads {line!r}: expected 'feature threshold right' or a value")
            inner = len(words) == 3
            feature.append(int(words[0]) if inner else -1)
            value.append(float(words[1] if inner else words[0]))
            right.append(int(words[2]) if inner else 0)
        return cls(np.array(feature), np.array(value), np.array(right), np.array(roots))


def _preorder(tree: Any) -> tuple[Array, list[float], Array]:
    """feature, value and right of one scikit-learn tree with its nodes in preorder."""
    feature: list[int] = []
    value: list[float] = []
    right: list[int] = []

    def visit(node: int) -> None:
        here = len(feature)
        leaf = tree.children_left[node] < 0
        feature.append(-1 if leaf else int(tree.feature[node]))
        value.append(float(tree.value[node].item() if leaf else tree.threshold[node]))
        right.append(0)
        if not leaf:
            visit(tree.children_left[node])
            right[here] = len(feature)
            visit(tree.children_right[node])

    visit(0)
    return np.array(feature), value, np.array(right)
