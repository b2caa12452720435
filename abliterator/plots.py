"""Pictures of a selection and of a study as PNG files, readable with any colour vision.

This module takes numbers alone, and reads no record. It needs the extra `plots` (matplotlib), which
is imported when something is drawn.

    draw_cosines(Path("cosines.png"), cosines, layers)
    draw_curves(Path("sweep.png"), [(8, -1), (9, -1)], {"KL, nats": [0.1, 0.2]}, chosen=(9,))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterator.files import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008): distinct with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKS = ("o", "s", "^", "x")
CHOSEN = "#999999"
RATES = {"compliance", "coherence", "product"}  # drawn from 0 to 1: small differences look small
WIDTH = 7.0  # inches; at 150 dots an inch a little over the width of a card


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_cosines(path: Path, cosines: Sequence[Sequence[float]], layers: Sequence[int]) -> None:
    """Writes a heatmap of the cosines [n, n] between the directions of `layers`."""
    _save(cosines_figure(cosines, layers), path)


def cosines_figure(cosines: Sequence[Sequence[float]], layers: Sequence[int]) -> Figure:
    """A heatmap of the cosines [n, n] between the directions of `layers`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH * 0.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="PuOr", origin="lower")
    step = max(1, len(layers) // 12)
    ticks = range(0, len(layers), step)
    axes.set_xticks(ticks, [str(layers[i]) for i in ticks])
    axes.set_yticks(ticks, [str(layers[i]) for i in ticks])
    axes.set(xlabel="layer", ylabel="layer", title="Cosines between the directions of layers")
    figure.colorbar(image, label="cosine")
    return figure


def draw_curves(
    path: Path,
    places: Sequence[tuple[int, int | str]],
    curves: Mapping[str, Sequence[float | None]],
    *,
    chosen: Sequence[int] = (),
) -> None:
    """One panel a score over layers, one line in it a position of the prompt.

    Args:
        path: of the picture.
        places: layer and position of each value; lines are in the order of their positions.
        curves: the values of each score; None is left out.
        chosen: layers that get a line across all panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.5 * len(curves) + 0.5), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    positions = list(dict.fromkeys(position for _, position in places))
    for axes, (name, values), colour in zip(panels, curves.items(), COLOURS, strict=False):
        for i, position in enumerate(positions):
            points = [
                (layer, value)
                for (layer, value_position), value in zip(places, values, strict=True)
                if value_position == position and value is not None
            ]
            # one line: the panel's colour; several: distinct in colour and mark
            style = {"color": colour, "marker": "o"} if len(positions) == 1 else _style(i)
            axes.plot(
                *zip(*points, strict=True), markersize=4, label=f"position {position}", **style
            )
        axes.set_ylabel(name)
        if name in RATES:
            axes.set_ylim(-0.05, 1.05)
        axes.grid(alpha=0.3)
        for layer in chosen:
            axes.axvline(layer, color=CHOSEN, linestyle="--", linewidth=1)
    if len(positions) > 1:
        panels[0].legend(fontsize="small", ncols=3)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)  # there is no layer 2.5
    panels[-1].set_xlabel("layer (dashed: chosen)" if chosen else "layer")
    _save(figure, path)


def draw_front(
    path: Path,
    edits: Mapping[str, Sequence[tuple[float, float]]],
    *,
    controls: Sequence[tuple[float, float]] = (),
    base: float | None = None,
) -> None:
    """Compliance against KL, one line an edit, from its least strength to its greatest.

    The nearer to the upper left, the more is complied with for the same change of other answers.

    Args:
        path: of the picture.
        edits: by name, KL in nats a token and compliance at each strength.
        controls: the same of edits that should do nothing, each a cross.
        base: compliance of the model without an edit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH * 0.7), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(edits.items()):
        style: dict[str, Any] = {**_style(i), "label": name, "markersize": 5, "linewidth": 1}
        axes.plot(*zip(*points, strict=True), **style)
    if controls:
        axes.plot(*zip(*controls, strict=True), "x", color=CHOSEN, label="controls")
    if base is not None:
        axes.axhline(base, color=CHOSEN, linestyle="--", linewidth=1, label="base")
    axes.set(xlabel="KL on neutral answers, nats a token", ylabel="compliance", ylim=(-0.05, 1.05))
    if all(kl > 0 for points in (*edits.values(), controls) for kl, _ in points):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=3)
    _save(figure, path)


def _style(i: int) -> dict[str, str]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i // len(COLOURS) % len(MARKS)]}


def _save(figure: Figure, path: Path) -> None:
    """Writes the PNG without date and version: the same numbers give the same bytes."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_bytes_atomic(path, png.getvalue())
