"""How each pipeline stage of a run spent its time."""

from __future__ import annotations

import numpy as np

from engine.results.tables import Array
from studies.pages.figures import BLUE, GREY, ORANGE, Panel, faded, new_figure
from studies.pages.run_record import Record

_MOST_BARS = 16


def stage_shares(record: Record) -> list[tuple[str, Array]]:
    """A label and the shares (3, replicas) of the run that each stage worked, was a bubble, and had no request.

    One entry for each stage of each replica; where those are too many to show, one for each stage of all replicas.
    """
    shares: list[list[Array]] = []
    for replica in record.summary["replicas"]:
        busy, bubbles = np.array(replica["stage_utilization"]), np.array(replica["stage_bubbles"])
        # a bubble is told as a share of the time with requests, of which the stage works the rest
        bubble = np.where(bubbles < 1, busy * bubbles / np.where(bubbles < 1, 1 - bubbles, 1.0), 0.0)
        shares.append(list(np.clip([busy, bubble, 1 - busy - bubble], 0.0, 1.0).T))
    if sum(map(len, shares)) <= _MOST_BARS:
        several, pipelined = len(shares) > 1, max(map(len, shares)) > 1
        return [
            (", ".join([f"replica {i}"] * several + [f"stage {j}"] * pipelined) or "replica 0", share[:, None])
            for i, stages in enumerate(shares)
            for j, share in enumerate(stages)
        ]
    entries = []
    for j in range(max(map(len, shares))):
        having = [stages[j] for stages in shares if len(stages) > j]
        label = f"{len(having)} replicas"
        if max(map(len, shares)) > 1:
            label = f"stage {j}, {label}"
        entries.append((label, np.stack(having, axis=1)))
    return entries


def stage_use(record: Record) -> Panel:
    """Work, bubbles and idle time of each stage."""
    entries = stage_shares(record)
    labels = [label for label, _ in entries]
    together = any(shares.shape[1] > 1 for _, shares in entries)
    figure = new_figure()
    for i, (name, colour) in enumerate([("working", BLUE), ("bubble", ORANGE), ("no request", faded(GREY, 0.3))]):
        means = [100 * float(shares[i].mean()) for _, shares in entries]
        ranges = [f" ({100 * shares[i].min():.0f} to {100 * shares[i].max():.0f})" * together for _, shares in entries]
        words = [
            "" if mean < 11 else f"{mean:.0f} %" + (span if mean > 40 else "")
            for mean, span in zip(means, ranges, strict=True)
        ]
        figure.add_bar(
            x=means, y=labels, name=name, orientation="h", marker={"color": colour, "line": {"width": 0}},
            text=words, textposition="inside", insidetextanchor="middle", textangle=0, constraintext="none",
            **({"textfont": {"color": "white"}} if i < 2 else {}),
            customdata=ranges, hovertemplate="%{x:.3~r} %%{customdata}",
        )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.35, hovermode="closest")
    figure.update_xaxes(title_text="Share of the run (%)", range=[0, 100])
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ")
    caption = "A bubble is time that a stage idles while requests are at its replica."
    if together:
        caption += " Each bar is the mean of its replicas, with the lowest and the highest in brackets."
    return Panel("How each stage spent the run", caption, figure, "full", 130 + 34 * len(entries))
