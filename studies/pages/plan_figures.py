"""The figures of a plan: price against latency, a GPU's tokens against a user's, and latency beyond the capacity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.results.metric_table import METRICS
from engine.results.metrics import summary_key
from engine.results.slo import SLO
from studies.pages.figures import BOUND, GREY, Panel, add_front, add_line, new_figure, style_of, value_axis
from studies.plan.answer import layout_words
from studies.words import number, statistic_name


@dataclass(frozen=True)
class Dot:
    """A fleet of a candidate at a load: what it costs, and what its users and GPUs have of it.

    `whole` is the fleet itself at the target rate; the others are groups of its replicas at other loads.
    """

    words: str
    device: str
    usd: float  # per hour, for the target rate
    latency_s: float | None
    user_tokens: float | None  # per second, 1 / mean TPOT
    gpu_tokens: float  # output tokens per second
    whole: bool
    best: bool


def dots(made: Mapping[str, Any]) -> list[Dot]:
    """Return every fleet of a plan whose trial met its SLOs, the whole fleets first."""
    key = summary_key(*_shown(made))
    found = []
    for row, facts in zip(made["candidates"], made["facts"], strict=True):
        if not row["met"]:
            continue
        words, gpus, (_, output) = layout_words(row), facts["replica"]["num_gpus"], facts["tokens_per_arrival"]
        best = row is made["candidates"][0]
        # requests/s of a replica, the summary, and whether it is of the whole fleet
        trials = [(made["rate"] / row["replicas"], facts["trial"]["summary"], True)]
        more = [trial for draw in facts["draws"][:1] for trial in draw["trials"] if trial["met"]]
        trials += [(trial["rate"], trial["summary"], False) for trial in more]
        for rate, summary, whole in trials:
            tpot, value = summary.get(summary_key("mean", "tpot")), summary.get(key)
            usd = gpus * facts["usd_per_gpu_hour"] * made["rate"] / rate
            fleet = f"{row['replicas']} replicas of" if whole else f"{number(rate)} requests/s each of"
            found.append(Dot(
                f"{fleet} {words}", row["device"], usd, None if value is None else value / 1e3,
                1e3 / tpot if tpot else None, rate * output / gpus, whole, best,
            ))  # fmt: skip
    return sorted(found, key=lambda dot: not dot.whole)


def _shown(made: Mapping[str, Any]) -> tuple[str, str]:
    """Return statistic and metric of the latency that is drawn: the first SLO's, TTFT's if there is one."""
    slos = [SLO.parse(text) for text in made["slos"]]
    chosen = next((slo for slo in slos if slo.metric == "ttft"), slos[0])
    return chosen.statistic if chosen.statistic in ("mean", "p50", "p90", "p99") else "p99", chosen.metric


def price_panel(made: Mapping[str, Any]) -> Panel:
    """Draw latency against the price of the load: lower left is better."""
    statistic, metric = _shown(made)
    same = (slo for slo in map(SLO.parse, made["slos"]) if (slo.statistic, slo.metric) == (statistic, metric))
    threshold = next((slo.threshold_s for slo in same), None)
    name = f"{METRICS[metric].name}, {statistic_name(statistic)}"
    caption = (
        "Each large dot is a fleet that was simulated whole at the target rate, each small one a group of its replicas "
        "at another load of each, priced for the target rate. Lower left is better; the star is the plan."
    )
    axes = {"usd": "Price of the load ($/h)", "latency_s": f"{name} (s)"}
    return _scatter(made, "Price against latency", caption, axes, 1, threshold)


def speed_panel(made: Mapping[str, Any]) -> Panel:
    """Draw a GPU's output against the speed that a user sees: upper right is better."""
    caption = "The same fleets: what a GPU puts out against the speed that a user sees. Upper right is better."
    axes = {"user_tokens": "Tokens/s of a user, 1 / mean TPOT", "gpu_tokens": "Output tokens/s and GPU"}
    return _scatter(made, "Throughput against a user's speed", caption, axes, -1, None)


def _scatter(
    made: Mapping[str, Any], title: str, caption: str, axes: Mapping[str, str], less: int, threshold: float | None
) -> Panel:
    """Draw the dots that have both of the axes: their attributes, and titles."""
    known = [dot for dot in dots(made) if all(getattr(dot, name) is not None for name in axes)]
    if not known:
        return Panel(title, "No fleet that was simulated meets the objectives.", width="half")
    x_title, y_title = axes.values()
    figure = new_figure(hovermode="closest")
    values = np.array([[getattr(dot, name) for name in axes] for dot in known])
    for number_of, device in enumerate(dict.fromkeys(dot.device for dot in known)):
        mine = [i for i, dot in enumerate(known) if dot.device == device]
        figure.add_scatter(
            x=values[mine, 0], y=values[mine, 1], ids=[known[i].words for i in mine], mode="markers", name=device,
            marker={
                "color": style_of(number_of)[0], "opacity": [1 if known[i].whole else 0.55 for i in mine],
                "size": [(17 if known[i].best else 12) if known[i].whole else 6 for i in mine],
                "symbol": ["star" if known[i].whole and known[i].best else "circle" for i in mine],
                "line": {"color": "white", "width": 1},
            },
            hovertemplate=f"%{{id}}<br>{x_title}: %{{x:.4~r}}<br>{y_title}: %{{y:.4~r}}<extra></extra>",
        )  # fmt: skip
    add_front(figure, values, less, "none beats these")
    high = values[:, 1].max() * 1.15
    if threshold is not None:
        figure.add_hline(y=threshold, line=BOUND)
        high = max(high, 1.1 * threshold)
    low, most = values[:, 0].min(), values[:, 0].max()
    room = 0.12 * max(most - low, 0.3 * most)
    figure.update_xaxes(title_text=x_title, range=[max(0.0, low - room), most + room], nticks=6)
    figure.update_yaxes(title_text=y_title, range=[0, high], nticks=6)
    return Panel(title, caption, figure, "half", 380)


def load_panel(made: Mapping[str, Any]) -> Panel:
    """Draw the best replica's latencies against its load, beyond its capacity too, over their SLOs' thresholds."""
    figure = new_figure(hovermode="closest")
    rates = [each["rate"] for each in made["curve"]]
    top = 1.0
    for i, text in enumerate(made["slos"]):
        slo = SLO.parse(text)
        values = [{each["slo"]: each["value_s"] for each in point["slos"]}.get(str(slo)) for point in made["curve"]]
        shares = [None if value is None else value / slo.threshold_s for value in values]
        top = max(top, *(share for share in shares if share is not None), 1.0)
        hover = f"%{{x:.3~r}} requests/s: %{{y:.3~r}} times {slo.threshold_s:g} s<extra>{text}</extra>"
        marker = {"size": 7, "color": style_of(i)[0]}
        add_line(figure, rates, shares, text, style_of(i)[0], hover, mode="lines+markers", marker=marker)
    figure.add_hline(y=1, line=BOUND)
    held = made["rate"] / made["best"]["replicas"]
    figure.add_vline(x=held, line={"color": GREY, "width": 1.2, "dash": "dot"})
    axis = value_axis(np.array([0.1, top])) if top > 20 else value_axis(np.array([1.0, 0.9 * top, top]))
    figure.update_xaxes(title_text="Requests/s of a replica", range=[0, 1.06 * max(rates)], nticks=6)
    figure.update_yaxes(title_text="Value / threshold", **axis)
    caption = (
        f"A group of the fleet's replicas under more and less load than the plan's {number(held)} requests/s of each "
        "(dotted). Above the dashed line an SLO is missed."
    )
    return Panel("Latency against load", caption, figure, height_px=340)
