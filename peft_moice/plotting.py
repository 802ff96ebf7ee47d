"""Pictures of measurements. Needs matplotlib, from the extra `peft_moice[plot]`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .evaluation import PositionSweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def plot_position_sweeps(panels: Mapping[str, Mapping[str, PositionSweep]], *, confidence: float = 0.95) -> "Figure":
    """Draw accuracy against the position of the asked fact, one curve per model, with Wilson intervals as bars.

    Args:
        panels: for each panel's title, the sweeps to draw in it by the names of their curves. Equal names have equal
            colours and markers in all panels.
        confidence: of the intervals, in (0, 1). Default: 0.95.

    Returns:
        A matplotlib figure; it is not registered with pyplot, so nothing has to be closed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or more curves than can be told apart.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install 'peft_moice[plot]'.") from error
    if not panels or not all(panels.values()):
        raise ValueError("There is nothing to draw; give at least one panel, and at least one sweep for each.")
    names = list(dict.fromkeys(name for sweeps in panels.values() for name in sweeps))
    if len(names) > len(_COLORS):
        raise ValueError(f"{len(names)} curves cannot be told apart; draw at most {len(_COLORS)} in a picture.")

    figure = Figure(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, sweeps) in zip(axes, panels.items(), strict=True):
        for name, sweep in sweeps.items():
            style = names.index(name)
            # Bars of different curves stand side by side.
            shift = 0.012 * (style - (len(names) - 1) / 2)
            lower, upper = zip(*sweep.intervals(confidence), strict=True)
            axis.errorbar(
                [position + shift for position in sweep.positions],
                sweep.accuracy,
                yerr=(
                    [share - low for share, low in zip(sweep.accuracy, lower, strict=True)],
                    [high - share for share, high in zip(sweep.accuracy, upper, strict=True)],
                ),
                color=_COLORS[style],
                marker=_MARKERS[style],
                capsize=3,
                label=name,
            )
        axis.set_title(title)
        axis.set_xlabel("position of the asked fact")
        axis.set_xticks(next(iter(sweeps.values())).positions)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel(f"exactly right answers ({confidence:.0%} intervals)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[-1].legend(loc="best")
    return figure
