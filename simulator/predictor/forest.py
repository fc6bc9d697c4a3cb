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
AT_ONCE = 2048  # rows


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
        return cls._of([(feature, _rounded(value), right) for feature, value, right in parts])

    @classmethod
    def boost(cls, x: Array, y: Array, *, trees: int, **options: Any) -> Forest:
        """Boosted trees (Friedman 2001) on histograms of `x` (rows, features), each of what those before left of `y`.

        `options` go to sklearn.ensemble.HistGradientBoostingRegressor (max_leaf_nodes, learning_rate, ...). As a
        prediction is the mean of the trees, each leaf is `trees` times as large, and has the first constant in it.
        """
        from sklearn.ensemble import HistGradientBoostingRegressor

        model = HistGradientBoostingRegressor(max_iter=trees, early_stopping=False, random_state=0, **options).fit(x, y)
        first = float(np.asarray(model._baseline_prediction).ravel()[0])
        parts = [_preorder_of_nodes(predictor.nodes) for (predictor,) in model._predictors]
        every = [np.unique(column) for column in x.T]
        return cls._of(
            [
                (at, np.where(at < 0, _rounded(first + trees * value), _between(at, value, every)), right)
                for at, value, right in parts
            ]
        )

    @classmethod
    def _of(cls, parts: list[tuple[Array, Array, Array]]) -> Forest:
        """The forest of these trees, each feature, value and right of its nodes."""
        roots = np.cumsum([0, *(len(feature) for feature, _, _ in parts[:-1])])
        feature = np.concatenate([feature for feature, _, _ in parts])
        value = np.concatenate([value for _, value, _ in parts])
        right = np.concatenate([right + root for (_, _, right), root in zip(parts, roots, strict=True)])
        right[feature < 0] = 0
        return cls(feature, value, right, roots)

    def predict(self, x: Array) -> Array:
        """The mean of the trees, (rows,), for `x` (rows, features)."""
        return np.concatenate([self._mean(x[start : start + AT_ONCE]) for start in range(0, max(len(x), 1), AT_ONCE)])

    def _mean(self, x: Array) -> Array:
        """As `predict`, all trees of all rows a level at a time."""
        node = np.tile(self.roots, len(x))
        rows, places = np.repeat(np.arange(len(x)), len(self.roots)), np.arange(len(node))
        while len(places):
            at = node[places]
            feature = self.feature[at]
            inner = feature >= 0
            rows, places, at, feature = rows[inner], places[inner], at[inner], feature[inner]
            node[places] = np.where(x[rows, feature] <= self.value[at], at + 1, self.right[at])
        total = np.zeros(len(x))
        for values in self.value[node].reshape(len(x), len(self.roots)).T:
            total += values
        return total / len(self.roots)

    def to_lines(self) -> list[str]:
        """A tree a line, its nodes in preorder: `feature:threshold` of an inner node, the value of a leaf."""
        words = [
            f"{value:.5g}" if feature < 0 else f"{feature}:{_text(value)}"
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


def _rounded(values: Array) -> Array:
    """To five digits."""
    return np.array([float(f"{value:.5g}") for value in values.tolist()])


def _text(value: float) -> str:
    """Return the shortest text, of five digits at least, that is read as this number."""
    return next(text for digits in range(5, 18) if float(text := f"{value:.{digits}g}") == value)


def _between(feature: Array, value: Array, every: list[Array]) -> Array:
    """Thresholds (nodes,) of as few digits, five at least, as keep apart what they do of each feature's values.

    Those of histograms lie between two values that may differ in their sixth digit: rounded like others, some would put
    both on the same side.
    """
    found = value.copy()
    for node in np.flatnonzero(feature >= 0).tolist():
        values, threshold = every[feature[node]], float(value[node])
        after = int(np.searchsorted(values, threshold, side="right"))
        low, high = values[max(after - 1, 0)], values[min(after, len(values) - 1)]
        texts = (float(f"{threshold:.{digits}g}") for digits in range(5, 18))
        found[node] = next((number for number in texts if low <= number < high), threshold)
    return found


def _preorder(tree: Any) -> tuple[Array, Array, Array]:
    """feature, value and right of one scikit-learn tree with its nodes in preorder."""
    return _ordered(
        tree.children_left.tolist(),  # each look at the tree makes an array
        tree.children_right.tolist(),
        tree.feature.tolist(),
        tree.threshold.tolist(),
        tree.value.ravel().tolist(),
    )


def _preorder_of_nodes(nodes: Any) -> tuple[Array, Array, Array]:
    """The same of one of HistGradientBoostingRegressor's trees."""
    lefts = np.where(nodes["is_leaf"], -1, nodes["left"].astype(int))
    names = ("right", "feature_idx", "num_threshold", "value")
    return _ordered(lefts.tolist(), *(nodes[name].tolist() for name in names))


def _ordered(
    lefts: list[int], rights: list[int], features: list[int], thresholds: list[float], means: list[float]
) -> tuple[Array, Array, Array]:
    feature: list[int] = []
    value: list[float] = []
    right: list[int] = []

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
    return np.array(feature), np.array(value), np.array(right)
