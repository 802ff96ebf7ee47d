"""`MoICEConfig`: defaults, what it refuses, and its way through JSON."""

import math

import pytest
from families import tiny_model
from peft import PeftConfig, get_peft_model

from peft_moice import MoICEConfig


def test_defaults_are_the_official_release():
    config = MoICEConfig()
    assert config.num_experts == 7
    config.resolve_bases({None: 10_000.0})
    assert config.rope_bases == pytest.approx([10000, 17500, 18000, 19000, 20000, 22500, 25000])
    assert config.router_aux_loss_coef == 0.3
    assert config.router_scope == "layer"


def test_multipliers_resolve_per_layer_type():
    config = MoICEConfig(base_multipliers=[1, 2])
    config.resolve_bases({"full_attention": 1e6, "sliding_attention": 1e4})
    assert config.rope_bases == {"full_attention": [1e6, 2e6], "sliding_attention": [1e4, 2e4]}
    assert config.base_multipliers is None
    assert config.num_experts == 2


def test_routers_of_a_config_that_no_model_has_resolved():
    config = MoICEConfig(rope_bases=[1e4, 2e4], top_k=1, router_dim=2)
    with pytest.raises(ValueError, match="Inject the adapter first"):
        config.router_specs()
    config.hidden_act = "silu"
    (spec,) = config.router_specs()
    assert (spec.rope_bases, spec.top_k, spec.router_dim, spec.hidden_act) == ([1e4, 2e4], 1, 2, "silu")


def test_a_single_angle_need_not_be_the_models_own():
    config = MoICEConfig(rope_bases=[30_000.0])
    config.resolve_bases({None: 10_000.0})
    assert config.rope_bases == [30_000.0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_bases": [1e4, 2e4], "top_k": 1, "router_dim": 5, "router_scope": "head"},
        {"rope_bases": {"full_attention": [1e6, 2e6], "sliding_attention": [1e4, 2e4]}},
        {"base_multipliers": [1.0, 3.0], "hidden_act": "gelu", "init_weights": "identity"},
        {"target_modules": ["self_attn"], "exclude_modules": ["layers.0.self_attn"], "layers_to_transform": [1, 2]},
        {"target_modules": r".*layers\.[02]\.self_attn", "modules_to_save": ["lm_head"], "router_aux_loss_coef": 0.0},
    ],
)
def test_a_config_survives_json(tmp_path, fields):
    config = MoICEConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoICEConfig
    assert loaded == config
    for name, value in fields.items():
        expected = set(value) if name in ("target_modules", "exclude_modules") and isinstance(value, list) else value
        assert getattr(loaded, name) == expected


def test_one_layer_may_be_given_as_a_number():
    assert MoICEConfig(layers_to_transform=2) == MoICEConfig(layers_to_transform=[2])


OUT_OF_RANGE = [
    ({"rope_bases": []}, "rope_bases"),
    ({"rope_bases": {}}, "rope_bases"),
    ({"rope_bases": {"full_attention": []}}, "full_attention"),
    ({"rope_bases": {"a": [1e4, 2e4], "b": [1e4]}}, "same number of angles"),
    ({"rope_bases": [1e4, -2e4]}, "-20000.0"),
    ({"rope_bases": [1e4, 0]}, "0.0"),
    ({"rope_bases": [1e4, math.inf]}, "inf"),
    ({"rope_bases": [1e4, math.nan]}, "nan"),
    ({"rope_bases": [1e4, 2e4, 2e4]}, "twice"),
    ({"rope_bases": [1e4], "base_multipliers": [1.0]}, "exclude each other"),
    ({"base_multipliers": []}, "base_multipliers"),
    ({"base_multipliers": [2.0, 1.0]}, "has to be 1"),
    ({"base_multipliers": [1.0, 1.0]}, "twice"),
    ({"top_k": 0}, "top_k"),
    ({"top_k": 8}, "1..7"),
    ({"top_k": 3, "base_multipliers": [1.0, 2.0]}, "1..2"),
    ({"router_dim": 0}, "router_dim"),
    ({"router_scope": "token"}, "'token'"),
    ({"init_weights": "zeros"}, "'zeros'"),
    ({"hidden_act": "swoosh"}, "'swoosh'"),
    ({"router_aux_loss_coef": -0.1}, "-0.1"),
    ({"router_aux_loss_coef": math.inf}, "inf"),
    ({"target_modules": "all-linear"}, "self_attn"),
    ({"target_modules": r".*self_attn", "layers_to_transform": [0]}, "regular expression"),
    ({"layers_pattern": "blocks"}, "layers_to_transform"),
    ({"layers_to_transform": []}, "at least one layer"),
    ({"layers_to_transform": [0, -1]}, "-1"),
]


@pytest.mark.parametrize(("fields", "named"), OUT_OF_RANGE)
def test_values_out_of_range(fields, named):
    with pytest.raises(ValueError, match=named):
        MoICEConfig(**fields)


WRONG_TYPES = [
    ({"rope_bases": "10000"}, "rope_bases"),
    ({"rope_bases": 10000.0}, "rope_bases"),
    ({"rope_bases": [1e4, "2e4"]}, "'2e4'"),
    ({"rope_bases": [1e4, True]}, "True"),
    ({"rope_bases": [[1e4, 2e4]]}, "rope_bases"),
    ({"base_multipliers": [None]}, "None"),
    ({"top_k": 2.0}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"router_dim": "7"}, "router_dim"),
    ({"router_aux_loss_coef": None}, "router_aux_loss_coef"),
    ({"router_aux_loss_coef": "0.3"}, "router_aux_loss_coef"),
    ({"target_modules": 3}, "target_modules"),
    ({"exclude_modules": [3]}, "exclude_modules"),
    ({"layers_to_transform": "0"}, "layers_to_transform"),
    ({"layers_to_transform": [0.0]}, "layers_to_transform"),
    ({"layers_to_transform": True}, "layers_to_transform"),
]


@pytest.mark.parametrize(("fields", "named"), WRONG_TYPES)
def test_values_of_the_wrong_type(fields, named):
    with pytest.raises(TypeError, match=named):
        MoICEConfig(**fields)


@pytest.mark.parametrize("own", [10_000.0, 499_000.0])
def test_angles_of_another_model(own):
    config = MoICEConfig()
    config.resolve_bases({None: 500_000.0})
    resolved = list(config.rope_bases)
    config.resolve_bases({None: 500_000.0})
    assert config.rope_bases == resolved
    with pytest.raises(ValueError, match=rf"500000\.0.*{own}"):
        config.resolve_bases({None: own})


def test_angles_for_other_layer_types():
    config = MoICEConfig(rope_bases={"full_attention": [1e6, 2e6]})
    with pytest.raises(ValueError, match="sliding_attention"):
        config.resolve_bases({"full_attention": 1e6, "sliding_attention": 1e4})
    with pytest.raises(ValueError, match=r"'full_attention'.* have one angle for all\. Give one list, or"):
        config.resolve_bases({None: 1e6})
    config = MoICEConfig(rope_bases=[1e6, 2e6])
    with pytest.raises(ValueError, match=r"1000000\.0.*10000\.0 in layers.* in one list per layer type"):
        config.resolve_bases({"full_attention": 1e6, "sliding_attention": 1e4})


def test_a_config_does_not_change_what_it_was_given():
    bases = {"full_attention": [1000000, 2000000]}
    config = MoICEConfig(rope_bases=bases)
    config.rope_bases["full_attention"].append(3.0)
    assert bases == {"full_attention": [1000000, 2000000]}


def test_the_name_of_an_implementation_that_there_was_reads_as_auto():
    config = MoICEConfig(base_multipliers=[1.0, 4.0], implementation="grouped")
    with pytest.warns(FutureWarning, match="no implementation 'grouped' any more"):
        model = get_peft_model(tiny_model("llama"), config)
    assert model.peft_config["default"].implementation == "auto"
