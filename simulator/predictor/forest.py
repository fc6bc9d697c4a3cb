"""A small forest of regression trees that is fitted by scikit-learn and kept as text.

A calibration must be readable and independent of a library's pickles, so the trees are written as text, a line each,
and evaluated here, with numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.results.tables import Array

MOST_FEATURES = 1000
MOST_LEAF = 100.0  # leaves are logarithms


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
        right[feature < 0] = 0
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
        """A tree a line, its nodes in preorder: `feature:threshold` of an inner node, the value of a leaf."""
        words = [
            f"{value:.5g}" if feature < 0 else f"{feature}:{value:.5g}"
            for feature, value in zip(self.feature.tolist(), self.value.tolist(), strict=True)
        ]
        ends = [*self.roots[1:].tolist(), len(words)]
        return [" ".join(words[start:end]) for start, end in zip(self.roots.tolist(), ends, strict=True)]

    @classmethod
    def from_lines(cls, lines: list[str]) -> Forest:
        """The forest of `to_lines`. Raises ValueError for anything else."""
        feature: list[int] = []
        value: list[float] = []
        right: list[int] = []
        roots: list[int] = []
        for line in lines:
            roots.append(len(feature))
            waiting: list[int] = []  # inner nodes whose right child is still to come, innermost last
            open_nodes = 1  # nodes that the tree still needs
            after_leaf = False
            for word in line.split():
                if not open_nodes:
                    raise ValueError(f"a tree goes on after its end with {word!r}")
                if after_leaf:
                    right[waiting.pop()] = len(feature)
                name, colon, number = word.rpartition(":")
                feature.append(int(name) if colon else -1)
                value.append(float(number))
                right.append(0)
                open_nodes += 1 if colon else -1
                if colon:
                    waiting.append(len(feature) - 1)
                after_leaf = not colon
            if open_nodes:
                raise ValueError(f"a tree of {len(line.split())} nodes is cut off")
        if not roots or min(feature) < -1 or max(feature) >= MOST_FEATURES:
            raise ValueError("no tree" if not roots else f"a tree of feature {max(feature)}")
        if not all(abs(number) <= (MOST_LEAF if at < 0 else inf) for number, at in zip(value, feature, strict=True)):
            raise ValueError("a tree with a leaf that is no logarithm of a time")
        return cls(np.array(feature), np.array(value), np.array(right), np.array(roots))


@dataclass(frozen=True)
class WrittenForest:
    """A forest as its text, which is parsed when it is first asked: few of a calibration's ever are."""

    lines: list[str]

    @cached_property
    def forest(self) -> Forest:
        try:
            return Forest.from_lines(self.lines)
        except ValueError as error:
            raise InputError(f"the calibration holds no forest ({error}): fit it again") from None

    def predict(self, x: Array) -> Array:
        """The mean of the trees, (rows,). Raises InputError for a text that is no forest."""
        if self.forest.feature.max() >= x.shape[1]:
            raise InputError(f"the calibration's forest has more than {x.shape[1]} features: fit it again")
        return self.forest.predict(x)

    def to_lines(self) -> list[str]:
        return self.lines


def _preorder(tree: Any) -> tuple[Array, list[float], Array]:
    """feature, value and right of one scikit-learn tree with its nodes in preorder."""
    feature: list[int] = []
    value: list[float] = []
    right: list[int] = []
    lefts, rights = tree.children_left.tolist(), tree.children_right.tolist()  # each look at the tree makes an array
    features, thresholds, means = tree.feature.tolist(), tree.threshold.tolist(), tree.value.ravel().tolist()

    def visit(node: int) -> None:
        here = len(feature)
        leaf = lefts[node] < 0
        feature.append(-1 if leaf else features[node])
        value.append(means[node] if leaf else thresholds[node])
        right.append(0)
        if not leaf:
            visit(lefts[node])
            right[here] = len(feature)
            visit(rights[node])

    visit(0)
    return np.array(feature), value, np.array(right)
