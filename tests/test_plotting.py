import sys

import pytest
import torch

from peft_moice.angles import attention_waveform
from peft_moice.evaluation import PositionSweep
from peft_moice.plotting import plot_position_sweeps, plot_waveforms

AFTER = PositionSweep(30, (0.0, 0.5, 1.0), (20, 19, 20), 20)
BEFORE = PositionSweep(30, (0.0, 0.5, 1.0), (20, 2, 11), 20)


def curves(axis):
    return {container.get_label(): container for container in axis.containers}


def test_curves_show_accuracies_and_bars_their_intervals():
    figure = plot_position_sweeps({"30 facts": {"before": BEFORE, "after": AFTER}})
    (axis,) = figure.axes
    assert list(curves(axis)) == ["before", "after"]
    for name, sweep in (("before", BEFORE), ("after", AFTER)):
        line, _, (bars,) = curves(axis)[name]
        assert tuple(line.get_ydata()) == sweep.accuracy
        assert line.get_xdata() == pytest.approx(sweep.positions, abs=0.02)
        ends = [(segment[0][1], segment[1][1]) for segment in bars.get_segments()]
        for end, interval in zip(ends, sweep.intervals(), strict=True):
            assert end == pytest.approx(interval)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "after"]
    assert "position" in axis.get_xlabel() and "95%" in axis.get_ylabel()


def test_a_name_has_the_same_colour_in_every_panel():
    figure = plot_position_sweeps({"short": {"before": BEFORE, "after": AFTER}, "long": {"after": AFTER}})
    short, long = figure.axes
    assert curves(short)["after"][0].get_color() == curves(long)["after"][0].get_color()
    assert curves(short)["before"][0].get_color() != curves(short)["after"][0].get_color()


def test_writes_a_png(tmp_path):
    plot_position_sweeps({"30 facts": {"before": BEFORE}}).savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("panels", [{}, {"30 facts": {}}])
def test_refuses_to_draw_nothing(panels):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_position_sweeps(panels)


def test_refuses_more_curves_than_colours():
    with pytest.raises(ValueError, match="at most 7"):
        plot_position_sweeps({"many": {str(index): BEFORE for index in range(8)}})


def test_without_matplotlib_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"peft_moice\[plot\]"):
        plot_position_sweeps({"30 facts": {"before": BEFORE}})


def test_waveforms_and_their_envelope():
    figure = plot_waveforms(16, [1e4, 2e4, 3e4], 50)
    single, envelope = figure.axes
    drawn = [torch.as_tensor(line.get_ydata()) for line in single.lines]
    assert all(
        torch.equal(line, attention_waveform(16, base, 50)) for line, base in zip(drawn, (1e4, 2e4, 3e4), strict=True)
    )
    assert torch.equal(torch.as_tensor(envelope.lines[1].get_ydata()), torch.stack(drawn).amax(dim=0))


def test_too_many_waveforms_are_refused():
    with pytest.raises(ValueError, match=r"holds 8 angles; draw 1 to 7"):
        plot_waveforms(16, [1e4 + i for i in range(8)], 50)
