"""Pictures of measurements. Needs matplotlib, from the extra `peft_moice[plot]`.

Every function returns a matplotlib figure that is not registered with pyplot, so nothing has to be closed, and raises
ImportError where matplotlib is not installed and ValueError where there is nothing to draw or too much to tell apart.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from .angles import attention_waveform

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_PANEL = (4.2, 3.6)
"""Width and height of a panel in inches: two of them are readable side by side at the width of a page."""

_BUCKETS = 240

Curve = tuple[Sequence[float], Sequence[tuple[float, float]]]
"""Values by position, and their intervals."""


class AccuracyByPosition(Protocol):
    """What [`plot_position_sweeps`] draws, such as `evaluation.PositionSweep`."""

    @property
    def positions(self) -> Sequence[float]: ...

    @property
    def accuracy(self) -> Sequence[float]: ...

    def intervals(self, confidence: float = 0.95) -> Sequence[tuple[float, float]]: ...


class LossByPosition(Protocol):
    """What [`plot_losses`] draws, such as `evaluation.PositionLosses`."""

    @property
    def centers(self) -> Sequence[float]: ...

    @property
    def losses(self) -> Sequence[float]: ...


def plot_positions(
    panels: Mapping[str, Mapping[str, Curve]], positions: Sequence[float], *, confidence: float = 0.95
) -> "Figure":
    """Draw shares of right answers against the position of what was asked for, one curve per model.

    Args:
        panels: for each panel's title, the curves to draw in it by their names. Equal names have equal colours and
            markers in all panels.
        positions: relative positions of all curves, 0 to 1.
        confidence: of the intervals, for the label of the axis. Default: 0.95.
    """
    figure_class = _figure_class()
    from matplotlib.ticker import PercentFormatter

    if not panels or not all(panels.values()) or not positions:
        raise ValueError("There is nothing to draw; give at least one panel, with one curve, and one position.")
    names = _distinct(name for curves in panels.values() for name in curves)
    figure = figure_class(figsize=(_PANEL[0] * len(panels), _PANEL[1] + 0.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, (values, intervals) in curves.items():
            style = names.index(name)
            # Bars of different curves stand side by side.
            shift = 0.012 * (style - (len(names) - 1) / 2)
            axis.errorbar(
                [position + shift for position in positions],
                values,
                yerr=(
                    [value - low for value, (low, _) in zip(values, intervals, strict=True)],
                    [high - value for value, (_, high) in zip(values, intervals, strict=True)],
                ),
                color=_COLORS[style],
                marker=_MARKERS[style],
                capsize=3,
                label=name,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("position of what is asked for")
        axis.set_xticks(positions)
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel(f"right answers ({confidence:.0%} intervals)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend_below(figure, axes)
    return figure


def plot_position_sweeps(
    panels: Mapping[str, Mapping[str, AccuracyByPosition]], *, confidence: float = 0.95
) -> "Figure":
    """Draw accuracy against the position of the asked fact, one curve per model, with Wilson intervals as bars.

    Args:
        panels: for each panel's title, the sweeps to draw in it by the names of their curves. All have the same
            positions.
        confidence: of the intervals, in (0, 1). Default: 0.95.
    """
    curves = {
        title: {name: (sweep.accuracy, sweep.intervals(confidence)) for name, sweep in sweeps.items()}
        for title, sweeps in panels.items()
    }
    positions = next((sweep.positions for sweeps in panels.values() for sweep in sweeps.values()), ())
    return plot_positions(curves, positions, confidence=confidence)


def plot_heat_map(
    table: Sequence[Sequence[float]],
    lengths: Sequence[int],
    positions: Sequence[float],
    *,
    unit: str = "tokens",
    title: str = "",
) -> "Figure":
    """Draw scores over position and length.

    Args:
        table: scores 0 to 1 by length (rows) and position (columns).
        lengths: of the rows.
        positions: relative positions of the columns.
        unit: what lengths count. Default: "tokens".
        title: of the picture; name the model in it.
    """
    figure_class = _figure_class()
    if not table or not all(table):
        raise ValueError("There is nothing to draw; give at least one row, with one score.")
    width = max(_PANEL[0], 1.6 + 0.75 * len(positions))
    figure = figure_class(figsize=(width, 1.6 + 0.45 * len(lengths)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for row, scores in enumerate(table):
        for column, score in enumerate(scores):
            axis.text(column, row, f"{score:.0%}", ha="center", va="center", color="black" if score > 0.5 else "white")
    axis.set_xticks(range(len(positions)), [f"{position:.0%}" for position in positions])
    axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_xlabel("position of what is asked for")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="right answers")
    return figure


def plot_tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    base: tuple[float, float],
    *,
    repair: str,
    damage: str = "perplexity of ordinary text, change",
    title: str = "",
) -> "Figure":
    """Draw what methods repair against what they damage, one curve per method over its settings.

    Args:
        curves: for each method, points (damage, repair), in the order in which they are joined.
        base: the base model's point.
        repair: label of the vertical axis, on which higher is better.
        damage: label of the horizontal axis, in shares.
        title: of the picture; name the model in it.
    """
    figure_class = _figure_class()
    from matplotlib.ticker import PercentFormatter

    if not curves or not all(curves.values()):
        raise ValueError("There is nothing to draw; give at least one method, with one point.")
    names = _distinct(curves)
    figure = figure_class(figsize=(1.5 * _PANEL[0], _PANEL[1] + 0.6), layout="constrained")
    axis = figure.subplots()
    for style, name in enumerate(names):
        across, up = zip(*curves[name], strict=True)
        axis.plot(across, up, color=_COLORS[style], marker=_MARKERS[style], label=name)
    axis.plot(*base, color="black", marker="*", markersize=12, linestyle="none", label="base model")
    axis.set_xlabel(damage)
    axis.set_ylabel(repair)
    axis.set_title(title, fontsize=10)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)
    _legend_below(figure, [axis])
    return figure


def plot_expert_load(load: torch.Tensor, *, names: Sequence[str] | None = None, title: str = "") -> "Figure":
    """Draw the mean gate of each expert, per layer and head.

    Args:
        load: `[L, H, N]`, mean gates of N experts in each of L layers and H heads. With the identity start they may
            lie outside of 0 to 1.
        names: of the experts. Default: their numbers.
        title: of the picture; name the model in it.
    """
    figure_class = _figure_class()
    if load.dim() != 3 or not load.numel():
        raise ValueError(f"`load` has shape {tuple(load.shape)}, but has to be [layers, heads, experts].")
    layers, heads, experts = load.shape
    names = _names_of(experts, names)
    low, high = min(0.0, load.min().item()), max(1.0, load.max().item())
    width, height = 0.9 + max(1.0, 0.16 * heads) * experts, 1.2 + 0.12 * layers
    figure = figure_class(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, experts, sharey=True, squeeze=False)[0]
    for expert, axis in enumerate(axes):
        image = axis.imshow(
            load[:, :, expert].cpu().numpy(), vmin=low, vmax=high, cmap="cividis", aspect="auto", origin="lower"
        )
        axis.set_title(names[expert], fontsize=9)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="mean gate")
    figure.suptitle(title, fontsize=10)
    return figure


def plot_gates(
    gates: torch.Tensor, tokens: Sequence[str], *, names: Sequence[str] | None = None, title: str = ""
) -> "Figure":
    """Draw how the experts share the gates along a prompt.

    Args:
        gates: `[S, N]`, gates of N experts at each of S tokens, in one head or as a mean. They are stacked, unless
            some are negative.
        tokens: the S tokens as text; every token is named where they are few, else some of them.
        names: of the experts. Default: their numbers.
        title: of the picture; name the model in it.
    """
    figure_class = _figure_class()
    if gates.dim() != 2 or len(tokens) != len(gates) or not len(tokens):
        raise ValueError(
            f"`gates` has shape {tuple(gates.shape)} and there are {len(tokens)} tokens; give [tokens, experts]."
        )
    if gates.shape[1] > len(_COLORS):
        raise ValueError(f"{gates.shape[1]} experts cannot be told apart; draw at most {len(_COLORS)}.")
    figure = figure_class(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    names = _names_of(gates.shape[1], names)
    if gates.min() < 0:  # the identity start can leave 0 to 1, and then there is nothing to stack
        for name, values, color in zip(names, gates.T, _COLORS, strict=False):
            axis.step(range(len(tokens)), values, where="mid", color=color, label=name)
        axis.set_ylabel("gate")
    else:
        axis.stackplot(range(len(tokens)), gates.T, colors=_COLORS[: len(names)], labels=names, step="mid")
        # The own angle at the bottom mostly fills the picture; what the others take is at the top.
        axis.set_ylim(max(0.0, 0.95 - gates[:, 1:].sum(dim=1).max().item()), 1)
        axis.set_ylabel("share of the gates")
    step = max(1, len(tokens) // 60)
    shown = range(0, len(tokens), step)
    axis.set_xticks(shown, [tokens[index].replace("$", r"\$") for index in shown], rotation=90, fontsize=6)
    axis.set_xlim(-0.5, len(tokens) - 0.5)
    axis.set_title(title, fontsize=10)
    _legend_below(figure, [axis])
    return figure


def plot_losses(losses: Mapping[str, LossByPosition], *, title: str = "") -> "Figure":
    """Draw loss against position in running text, one curve per model, on a logarithmic axis of positions.

    Args:
        losses: by the names of their curves.
        title: of the picture; name the text in it.
    """
    figure_class = _figure_class()
    if not losses:
        raise ValueError("There is nothing to draw; give at least one curve.")
    names = _distinct(losses)
    figure = figure_class(figsize=(1.5 * _PANEL[0], _PANEL[1]), layout="constrained")
    axis = figure.subplots()
    for style, name in enumerate(names):
        axis.plot(losses[name].centers, losses[name].losses, color=_COLORS[style], marker=_MARKERS[style], label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("position in the text, in tokens")
    axis.set_ylabel("mean loss, in nats")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    _legend_below(figure, [axis])
    return figure


def plot_waveforms(head_dim: int, rope_bases: Sequence[float], context_length: int) -> "Figure":
    """Draw the attention waveforms of base angles, and the envelope of all of them over that of the first.

    Args:
        head_dim: number D of rotated dimensions.
        rope_bases: base angles, the model's own first; at most seven.
        context_length: number of distances.
    """
    figure_class = _figure_class()
    if not 1 <= len(rope_bases) <= len(_COLORS):
        raise ValueError(f"`rope_bases` holds {len(rope_bases)} angles; draw 1 to {len(_COLORS)} in a picture.")
    waveforms = torch.stack([attention_waveform(head_dim, base, context_length) for base in rope_bases])
    # Means over buckets of equal width on the axis: finer waves would hide each other in solid bands.
    edges = torch.unique(torch.logspace(0, math.log10(context_length), _BUCKETS + 1).round().long())
    sizes = edges.diff().tolist()
    smooth = torch.stack([part.mean(dim=-1) for part in torch.split(waveforms[:, 1:], sizes, dim=-1)], dim=-1).numpy()
    distances = ((edges[:-1] + edges[1:] - 1) / 2).tolist()
    figure = figure_class(figsize=(9, 6), layout="constrained")
    single, envelope = figure.subplots(2, 1, sharex=True, sharey=True)
    for base, waveform, color in zip(rope_bases, smooth, _COLORS, strict=False):
        single.plot(distances, waveform, color=color, linewidth=0.8, label=f"{base:g}")
    highest = smooth.max(axis=0)
    envelope.fill_between(distances, smooth[0], highest, color=_COLORS[5], alpha=0.6)
    envelope.plot(distances, smooth[0], color=_COLORS[0], linewidth=0.8, label=f"{rope_bases[0]:g} alone")
    envelope.plot(distances, highest, color=_COLORS[1], linewidth=0.8, label="the highest of all")
    single.legend(title="base angle", ncols=2, loc="upper right")
    envelope.legend(loc="upper right")
    envelope.set_xscale("log")
    envelope.set_xlim(1, context_length)
    envelope.set_xlabel("distance in tokens")
    for axis in (single, envelope):
        axis.set_ylabel("bound on attention")
        axis.grid(alpha=0.3)
    return figure


def _names_of(experts: int, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [f"expert {expert}" for expert in range(experts)]
    if len(names) != experts:
        raise ValueError(f"There are {experts} experts, but `names` holds {len(names)}. Give one for each.")
    return list(names)


def _distinct(names: Iterable[str]) -> list[str]:
    """Names without repetitions."""
    names = list(dict.fromkeys(names))
    if len(names) > len(_COLORS):
        raise ValueError(f"{len(names)} curves cannot be told apart; draw at most {len(_COLORS)} in a picture.")
    return names


def _legend_below(figure: "Figure", axes: "Sequence[Axes]") -> None:
    """One legend for all panels, where it hides no data."""
    entries: dict[str, Artist] = {}
    for axis in axes:
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    # A letter takes about a twelfth of an inch, a line's sample with its margins as much as eight letters.
    fitting = int(figure.get_figwidth() * 12 / (8 + max(map(len, entries))))
    columns = max(1, min(4, len(entries), fitting))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plotting needs matplotlib: pip install 'peft_moice[plot]'.") from error
    return Figure
