import math

import pytest
import torch
from peft import get_peft_model
from representatives import slow_but
from tiny_models import load, logits_of, save_tiny_model, token_ids

from peft_moice import MoICEConfig
from peft_moice.evaluation.angles import (
    AngleScores,
    OwnAngle,
    attention_waveform,
    extrema,
    own_angles,
    score_angles,
    search_angles,
)
from peft_moice.tuner.config import RELEASED_MULTIPLIERS


def test_waveform_is_the_mean_of_partial_sums():
    waveform = attention_waveform(8, 100.0, 5)
    frequencies = [100.0 ** (-2 * i / 8) for i in range(4)]
    for distance in range(5):
        sums = [
            sum(complex(math.cos(distance * f), math.sin(distance * f)) for f in frequencies[:i]) for i in (1, 2, 3, 4)
        ]
        expected = sum(map(abs, sums)) / (1 + 2 + 3 + 4)
        assert waveform[distance].item() == pytest.approx(expected, abs=1e-12)


def test_extrema_of_a_cosine():
    peaks, troughs = extrema(torch.arange(100, dtype=torch.float64).mul(2 * math.pi / 20).cos())
    assert peaks.tolist() == [20, 40, 60, 80]
    assert troughs.tolist() == [10, 30, 50, 70, 90]


@pytest.mark.parametrize(("context_length", "shared"), slow_but([(2048, 5)], [(2048, 5), (4096, 4)]))
def test_search_finds_most_of_the_released_angles(context_length, shared):
    """Six draws from forty candidates would share one other angle with the released seven on average."""
    released = {multiple * 10000 for multiple in RELEASED_MULTIPLIERS}
    found = search_angles(128, 10000, context_length)
    assert found[0] == 10000
    assert len(set(found)) == 7
    assert len(released & set(found)) == shared


def test_search_prefers_an_interlocking_candidate():
    """Of two candidates, the one whose peaks lie on the own angle's troughs more closely."""
    own = extrema(attention_waveform(64, 1e4, 1024))

    def distance(base: float) -> float:
        peaks, troughs = extrema(attention_waveform(64, base, 1024))
        pairs = ((own[1], peaks), (own[0], troughs))
        return sum((a[:, None] - b).abs().min(dim=1).values.double().mean().item() for a, b in pairs)

    candidates = sorted((1.1e4, 1.5e4, 2e4, 2.7e4), key=distance)
    assert search_angles(64, 1e4, 1024, num_experts=2, candidates=candidates[::-1]) == [1e4, candidates[0]]


def test_candidates_may_be_an_array():
    candidates = torch.linspace(1e4, 3e4, 9).numpy()
    assert search_angles(64, 1e4, 512, 3, candidates) == search_angles(64, 1e4, 512, 3, candidates.tolist())
    with pytest.raises(ValueError, match=r"has to lie in 1\.\.1"):
        search_angles(64, 1e4, 512, 3, candidates=[])


def test_best_angles_complement_each_other():
    losses = torch.tensor([[1.0, 1.0, 9.0, 9.0], [0.9, 0.9, 8.0, 8.0], [5.0, 5.0, 2.0, 9.0], [7.0, 7.0, 7.0, 1.0]])
    scores = AngleScores((1e4, 2e4, 3e4, 4e4), losses)
    assert scores.best(1) == [1e4]
    assert scores.best(3) == [1e4, 4e4, 3e4]


def test_scores_are_those_of_the_model_under_each_angle(tmp_path):
    folder = save_tiny_model(tmp_path)
    model, ids = load(folder), token_ids(3)

    def losses_of(model: torch.nn.Module) -> list[float]:
        return [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]

    before = logits_of(model)
    scores = score_angles(model, losses_of, multipliers=(4.0, 1.0, 4.0))
    assert torch.equal(logits_of(model), before)
    assert scores.rope_bases == (10000.0, 40000.0)
    other = get_peft_model(load(folder), MoICEConfig(rope_bases=[40000.0])).eval()
    assert scores.losses.tolist() == [losses_of(model), losses_of(other)]


def test_own_angles_are_read_off_the_layers(tmp_path):
    model = load(save_tiny_model(tmp_path / "gemma3", "gemma3"))
    before = logits_of(model)
    assert own_angles(model) == [
        OwnAngle(10_000.0, 16, "sliding_attention"),
        OwnAngle(1_000_000.0, 16, "full_attention"),
    ]
    assert torch.equal(logits_of(model), before)
    assert own_angles(load(save_tiny_model(tmp_path / "phi", "phi"))) == [OwnAngle(10_000.0, 8, None)]
    with pytest.raises(ValueError, match="different angles"):
        score_angles(model, lambda candidate: [0.0])


def test_bad_input():
    with pytest.raises(ValueError, match="`head_dim` is 7"):
        attention_waveform(7, 1e4, 100)
    for rope_theta in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match=r"`rope_theta` .* has to be positive and finite"):
            search_angles(8, rope_theta, 100)
    with pytest.raises(ValueError, match=r"has to lie in 1\.\.3"):
        search_angles(64, 1e4, 256, num_experts=4, candidates=[2e4, 3e4])
    with pytest.raises(ValueError, match=r"has to lie in 1\.\.2"):
        AngleScores((1e4, 2e4), torch.zeros(2, 1)).best(3)
