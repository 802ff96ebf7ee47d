"""Rules of ropes by position and distance: what they stand for, and what is refused."""

import logging
import math

import pytest
import torch
from families import tiny_model, tokens
from peft import get_peft_model

from peft_moice import MoICEConfig
from peft_moice.rope.rules import experts_of
from peft_moice.routing import mixture

OWN = {"query_positions": [0, 32]}
BEYOND = {"query_positions": [32, 128]}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def test_experts_in_the_order_of_their_positions():
    far, near = {**BEYOND, "distances": [24, None], **LINEAR}, {**BEYOND, "distances": [0, 24]}
    own, beyond = experts_of([far, OWN, near])
    assert (own.first, own.end, own.is_own) == (0, 32, True)
    assert (beyond.first, beyond.end, beyond.start, beyond.near) == (32, 128, 24, ())
    assert dict(beyond.far) == LINEAR
    assert beyond.in_words() == (
        "queries from 32 on below 128: the model's own rope for keys nearer than 24, linear factor 4.0 beyond"
    )
    (everywhere,) = experts_of([YARN])
    assert (everywhere.first, everywhere.end, everywhere.far, dict(everywhere.near)) == (0, None, None, YARN)


BAD_VALUES = {
    "a gap between positions": ([OWN, {"query_positions": [40, None], **YARN}], "gap at 40"),
    "positions that overlap": ([OWN, {"query_positions": [20, None], **YARN}], "overlap at 20"),
    "positions not from 0": ([{"query_positions": [8, None], **YARN}], "gap at 8"),
    "positions behind an end that is open": ([YARN, BEYOND], "overlap at"),
    "a gap between distances": ([{"distances": [0, 8]}, {"distances": [9, None], **YARN}], r"\[0, 8\].*without gaps"),
    "distances that overlap": ([{"distances": [0, 8]}, {"distances": [7, None], **YARN}], "without gaps"),
    "the same distances twice": ([YARN, LINEAR], "overlap"),
    "distances with an end": ([{"distances": [0, 8], **YARN}], "without end"),
    "three ranges of distances": (
        [{"distances": [0, 8]}, {"distances": [8, 9], **YARN}, {"distances": [9, None], **LINEAR}],
        "3 ranges; near and far",
    ),
    "another rope for near keys": ([{"distances": [0, 8], **YARN}, {"distances": [8, None], **LINEAR}], "near keys"),
    "an empty range": ([{"query_positions": [8, 8]}], "at least one"),
    "a negative position": ([{"query_positions": [-1, None]}], "from 0 on"),
    "a position beyond all": ([{"query_positions": [0, 2**60]}], "at least one"),
    "an unknown name": ([{**YARN, "fcator": 2.0}], "'fcator'.*'factor'"),
    "a name that is no string": ([{1: 2.0}], "'1'"),
    "an unknown rope type": ([{"rope_type": "yarm", "factor": 2.0}], "'yarm'; choose one of"),
    "a rope type that changes": ([{"rope_type": "dynamic", "factor": 2.0}], "keys in a cache would not fit"),
    "a rope type that is no string": ([{"rope_type": ["yarn"]}], "choose one of"),
    "a factor below 1": ([{"rope_type": "linear", "factor": 0.5}], "`factor`.*0.5.*at least 1"),
    "no number": ([{"rope_type": "linear", "factor": math.nan}], "nan.*at least 1"),
    "infinity": ([{"rope_theta": math.inf}], "inf.*finite"),
    "a negative base": ([{"rope_theta": -1.0}], "-1.0.*positive"),
}
BAD_TYPES = {
    "a list of factors with zero": ([{"rope_type": "longrope", "long_factor": [0.0]}], "positive numbers"),
    "no list": ({"rope_type": "yarn"}, "list of dicts"),
    "no rules": ([], "list of dicts"),
    "no dicts": (["yarn"], "list of dicts"),
    "a range that is a number": ([{"query_positions": 32}], "two integers"),
    "a range of fractions": ([{"query_positions": [0, 32.0]}], "two integers"),
    "a range of booleans": ([{"distances": [False, True]}], "two integers"),
    "a range of three": ([{"distances": [0, 1, 2]}], "two integers"),
    "a number that is text": ([{"rope_type": "linear", "factor": "4"}], "has to be a number, not '4'"),
    "a number that is a boolean": ([{"rope_type": "linear", "factor": True}], "has to be a number"),
    "what is neither true nor false": ([{**YARN, "truncate": {}}], "true or false"),
    "factors that are a number": ([{"rope_type": "longrope", "long_factor": 2.0}], "list of positive numbers"),
}


BAD = [(ValueError, *case) for case in BAD_VALUES.values()] + [(TypeError, *case) for case in BAD_TYPES.values()]


@pytest.mark.parametrize(("error", "rules", "reason"), BAD, ids=[*BAD_VALUES, *BAD_TYPES])
def test_bad_rules(error, rules, reason):
    with pytest.raises(error, match=f"(?s){reason}"):
        MoICEConfig(ropes=rules)


BAD_FOR_THE_MODEL = {
    "near beyond the window": ([{"distances": [0, 33]}, {"distances": [33, None], **LINEAR}], "33.*trained for 32"),
    "what a type needs": ([{"rope_type": "llama3", "factor": 2.0}], "llama3"),
    "factors for other pairs": (
        [{"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}],
        "longrope",
    ),
    "linear without a factor": ([{"rope_type": "linear"}], "linear"),
}


@pytest.mark.parametrize(("rules", "reason"), BAD_FOR_THE_MODEL.values(), ids=BAD_FOR_THE_MODEL)
def test_rules_that_do_not_fit_the_model_leave_it_as_it_was(rules, reason):
    model = tiny_model("llama", max_position_embeddings=32)
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, MoICEConfig(ropes=rules))
    assert not hasattr(model, "peft_config")
    assert not any("MoICE" in type(module).__name__ for module in model.modules())


@torch.no_grad()
def test_behind_the_last_range_the_last_rule_goes_on_and_one_warning_says_so(caplog):
    ropes = [{**OWN}, {"query_positions": [32, 40], **LINEAR}]
    models = [
        get_peft_model(tiny_model("llama", max_position_embeddings=32), MoICEConfig(ropes=rules)).eval()
        for rules in (ropes, [OWN, {"query_positions": [32, None], **LINEAR}])
    ]
    mixture._warn_once_of_end.cache_clear()
    with caplog.at_level(logging.WARNING, logger="peft_moice"):
        models[0](tokens(length=40))
        assert not caplog.records
        for length in (41, 60, 50):
            expected = models[1](tokens(length=length)).logits
            torch.testing.assert_close(models[0](tokens(length=length)).logits, expected, rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert "position 40" in record.getMessage()
