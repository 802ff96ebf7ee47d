import sys

import pytest
import torch

from peft_moice.evaluation import PositionLosses, wilson_interval
from peft_moice.evaluation.angles import attention_waveform
from peft_moice.evaluation.plotting import (
    plot_expert_load,
    plot_gates,
    plot_heat_map,
    plot_losses,
    plot_positions,
    plot_waveforms,
)

POSITIONS = (0.0, 0.5, 1.0)
AFTER, BEFORE = (
    ([count / 20 for count in right], [wilson_interval(count, 20) for count in right])
    for right in ((20, 19, 20), (20, 2, 0))
)
LOSSES = PositionLosses((2, 4), (5.0, 4.0), 1)


def curves(axis):
    return {container.get_label(): container for container in axis.containers}


def test_curves_show_accuracies_and_bars_their_intervals():
    figure = plot_positions({"30 facts": {"before": BEFORE, "after": AFTER}}, POSITIONS)
    (axis,) = figure.axes
    assert list(curves(axis)) == ["before", "after"]
    for name, (values, intervals) in (("before", BEFORE), ("after", AFTER)):
        line, _, (bars,) = curves(axis)[name]
        assert list(line.get_ydata()) == values
        assert line.get_xdata() == pytest.approx(POSITIONS, abs=0.02)
        ends = [(segment[0][1], segment[1][1]) for segment in bars.get_segments()]
        for end, interval in zip(ends, intervals, strict=True):
            assert end == pytest.approx(interval)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after"]
    assert "position" in axis.get_xlabel() and "95%" in axis.get_ylabel()


def test_a_mean_beside_its_interval_and_a_model_without_a_name_are_drawn():
    value = 0.1 + 0.2
    (axis,) = plot_positions({"panel": {"model": ([value], [(0.3, 0.3)])}}, [0]).axes
    line, _, _ = curves(axis)["model"]
    assert line.get_ydata() == [value]
    assert not plot_positions({"30 facts": {"": BEFORE}}, POSITIONS).legends


def test_gates_are_drawn_in_any_precision_and_with_a_graph():
    gates = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.bfloat16, requires_grad=True)
    figure = plot_gates(gates, ["What", "$x$"])
    bottom, top = figure.axes[0].collections
    assert bottom.get_paths()[0].vertices[:, 1].max() == 0.5 and top.get_paths()[0].vertices[:, 1].max() == 1.0
    figure.draw_without_rendering()  # a token is no formula
    assert figure.axes[0].get_ylim()[0] == pytest.approx(0.2)
    (axis,) = plot_gates(gates - 1, ["What", "is"], names=["own", "other"]).axes[:1]
    assert axis.images[0].get_array().tolist() == [[-0.75, -0.5], [-0.25, -0.5]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["own", "other"]
    (image,) = plot_expert_load(gates[None]).axes[0].images
    assert image.get_array().tolist() == [[0.25, 0.5]]


def test_a_name_has_the_same_colour_in_every_panel():
    figure = plot_positions({"short": {"before": BEFORE, "after": AFTER}, "long": {"after": AFTER}}, POSITIONS)
    short, long = figure.axes
    assert curves(short)["after"][0].get_color() == curves(long)["after"][0].get_color()
    assert curves(short)["before"][0].get_color() != curves(short)["after"][0].get_color()


def test_without_matplotlib_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"peft_moice\[plot\]"):
        plot_positions({"30 facts": {"before": BEFORE}}, POSITIONS)


def test_waveforms_and_their_envelope():
    figure = plot_waveforms(16, [1e4, 2e4, 3e4], 50)
    single, envelope = figure.axes
    drawn = [torch.as_tensor(line.get_ydata()) for line in single.lines]
    for line, base in zip(drawn, (1e4, 2e4, 3e4), strict=True):
        torch.testing.assert_close(line, attention_waveform(16, base, 50)[1:], rtol=0, atol=1e-12)
    assert torch.equal(torch.as_tensor(envelope.lines[1].get_ydata()), torch.stack(drawn).amax(dim=0))
    assert single.lines[0].get_xdata().tolist() == list(range(1, 50))


def test_long_waveforms_are_drawn_as_means():
    """8,192 points in a picture of 900 pixels would be solid bands."""
    line = plot_waveforms(16, [1e4, 2e4], 8192).axes[0].lines[0]
    distances, values = line.get_xdata(), line.get_ydata()
    assert len(distances) <= 240
    start = int(2 * distances[-1]) + 1 - 8192  # the last bucket goes from here to the end
    assert values[-1] == pytest.approx(attention_waveform(16, 1e4, 8192)[start:].mean().item())
    assert 8192 - start > 100


def test_heat_map_shows_and_names_every_cell():
    figure = plot_heat_map([[1.0, 0.25], [0.5, 0.0]], [512, 1024], [0.0, 1.0], title="model")
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[1.0, 0.25], [0.5, 0.0]]
    assert [text.get_text() for text in axis.texts] == ["100%", "25%", "50%", "0%"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["512", "1,024"]
    assert axis.get_title() == "model"


def test_expert_load_has_a_panel_for_each_expert():
    load = torch.rand(3, 4, 2)
    figure = plot_expert_load(load)
    for expert in range(2):
        assert torch.equal(torch.as_tensor(figure.axes[expert].images[0].get_array()), load[:, :, expert])


def test_gates_on_either_side_of_zero_are_equally_strong():
    image = plot_expert_load(torch.tensor([[[1.25, -0.25]]])).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-1.25, 1.25)
    image = plot_expert_load(torch.tensor([[[0.75, 0.25]]])).axes[0].images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 1.0)


def test_small_differences_of_losses_are_drawn_by_themselves():
    upper, lower = plot_losses({"base": LOSSES, "adapted": PositionLosses((2, 4), (5.0, 3.875), 1)}).axes
    assert [list(line.get_ydata()) for line in upper.lines] == [[5.0, 4.0], [5.0, 3.875]]
    assert [list(line.get_ydata()) for line in lower.lines] == [[0.0, 0.0], [0.0, -0.125]]


@pytest.mark.parametrize(
    ("draw", "arguments", "reason"),
    [
        (plot_positions, ({}, POSITIONS), "nothing to draw"),
        (plot_positions, ({"30 facts": {}}, POSITIONS), "nothing to draw"),
        (plot_positions, ({"many": {str(index): BEFORE for index in range(8)}}, POSITIONS), "at most 7"),
        (plot_waveforms, (16, [1e4 + i for i in range(8)], 50), "holds 8 angles; draw 1 to 7"),
        (plot_heat_map, ([], [], []), "nothing to draw"),
        (plot_expert_load, (torch.zeros(2, 2),), "layers, heads, experts"),
        (plot_gates, (torch.zeros(2, 2), ["one"]), "there are 1 tokens"),
        (plot_gates, (torch.zeros(1, 8), ["one"]), "8 experts"),
        (plot_losses, ({},), "nothing to draw"),
        (plot_losses, ({"a": LOSSES, "b": PositionLosses((2, 4, 8), (5.0, 4.0, 3.0), 1)},), "other positions"),
        (lambda load: plot_expert_load(load, names=["one"]), (torch.zeros(1, 1, 2),), "holds 1. Give one for each"),
    ],
)
def test_refuses_what_cannot_be_drawn(draw, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        draw(*arguments)
