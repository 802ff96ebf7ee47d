"""Pictures of measurements. Needs matplotlib, from the extra `peft_moice[plot]`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .angles import attention_waveform
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
    figure_class = _figure_class()
    from matplotlib.ticker import PercentFormatter

    if not panels or not all(panels.values()):
        raise ValueError("There is nothing to draw; give at least one panel, and at least one sweep for each.")
    names = list(dict.fromkeys(name for sweeps in panels.values() for name in sweeps))
    if len(names) > len(_COLORS):
        raise ValueError(f"{len(names)} curves cannot be told apart; draw at most {len(_COLORS)} in a picture.")

    figure = figure_class(figsize=(1 + 4 * len(panels), 3.6), layout="constrained")
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


def plot_waveforms(head_dim: int, rope_bases: Sequence[float], context_length: int) -> "Figure":
    """Draw the attention waveforms of base angles, and the envelope of all of them over that of the first.

    Args:
        head_dim: number D of rotated dimensions.
        rope_bases: base angles, the model's own first; at most seven.
        context_length: number of distances.

    Returns:
        A matplotlib figure; it is not registered with pyplot, so nothing has to be closed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: more angles than can be told apart, or a value out of its range.
    """
    figure_class = _figure_class()
    if not 1 <= len(rope_bases) <= len(_COLORS):
        raise ValueError(f"`rope_bases` holds {len(rope_bases)} angles; draw 1 to {len(_COLORS)} in a picture.")
    waveforms = torch.stack([attention_waveform(head_dim, base, context_length) for base in rope_bases])
    figure = figure_class(figsize=(9, 6), layout="constrained")
    single, envelope = figure.subplots(2, 1, sharex=True, sharey=True)
    for base, waveform, color in zip(rope_bases, waveforms, _COLORS, strict=False):
        single.plot(waveform, color=color, linewidth=0.8, label=f"{base:g}")
    single.legend(title="base angle", ncols=2)
    envelope.fill_between(range(context_length), waveforms[0], waveforms.amax(dim=0), color=_COLORS[5], alpha=0.6)
    envelope.plot(waveforms[0], color=_COLORS[0], linewidth=0.8, label=f"{rope_bases[0]:g} alone")
    envelope.plot(waveforms.amax(dim=0), color=_COLORS[1], linewidth=0.8, label="the highest of all")
    envelope.legend()
    envelope.set_xlabel("distance in tokens")
    for axis in (single, envelope):
        axis.set_ylabel("bound on attention")
        axis.grid(alpha=0.3)
    return figure


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install 'peft_moice[plot]'.") from error
    return Figure
