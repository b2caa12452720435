"""Pictures of a selection, as PNG files that no eye needs to tell red from green for.

The room gets numbers and draws them; it does not know what was chosen or why. It needs the extra
`plots` (matplotlib), which is imported when something is drawn.

    draw_cosines(Path("cosines.png"), cosines, layers)
    draw_curves(Path("sweep.png"), layers, {"KL, nats": kl, "product": product}, chosen=(9,))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from abliterator.checkpoint import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
CHOSEN = "#999999"
RATES = {"compliance", "coherence", "product"}  # drawn from 0 to 1: small differences look small
WIDTH = 7.0  # inches; at 150 dots an inch a little over the width of a card


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_cosines(path: Path, cosines: Sequence[Sequence[float]], layers: Sequence[int]) -> None:
    """A heatmap of the cosines [n, n] between the directions of `layers`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, WIDTH * 0.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="PuOr", origin="lower")
    every = max(1, len(layers) // 12)
    ticks = range(0, len(layers), every)
    axes.set_xticks(ticks, [str(layers[i]) for i in ticks])
    axes.set_yticks(ticks, [str(layers[i]) for i in ticks])
    axes.set(xlabel="layer", ylabel="layer", title="Cosines between the directions of layers")
    figure.colorbar(image, label="cosine")
    _save(figure, path)


def draw_curves(
    path: Path,
    layers: Sequence[int],
    curves: Mapping[str, Sequence[float | None]],
    *,
    chosen: Sequence[int] = (),
) -> None:
    """One panel a score over `layers`; None is left out, chosen layers have a line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 1.5 * len(curves) + 0.5), layout="constrained")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values), colour in zip(panels, curves.items(), COLOURS, strict=False):
        points = [(x, y) for x, y in zip(layers, values, strict=True) if y is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
        axes.set_ylabel(name)
        if name in RATES:
            axes.set_ylim(-0.05, 1.05)
        axes.grid(alpha=0.3)
        for layer in chosen:
            axes.axvline(layer, color=CHOSEN, linestyle="--", linewidth=1)
    panels[-1].set_xlabel("layer (dashed: chosen)" if chosen else "layer")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """The same numbers give the same bytes: no date, no version."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_bytes_atomic(path, png.getvalue())
