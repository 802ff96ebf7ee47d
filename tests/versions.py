"""Marks for tests of what not all supported versions of transformers can do."""

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def needs_transformers(version: str, lack: str) -> pytest.MarkDecorator:
    """Skip below `version`, of which the versions before `lack` something: "transformers before 5.18 ..."."""
    too_old = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(too_old, reason=f"transformers before {version} {lack}")


needs_adapter_verbs_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} asks for peft {MIN_PEFT_VERSION} in its own verbs of adapters",
)


def family(model_type: str, *values: object, marks: object = ()) -> object:
    """The parameters `model_type, *values` of a test, skipped where transformers does not have the family."""
    known = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    reason = f"transformers {transformers.__version__} does not have the family {model_type!r}"
    marks = marks if isinstance(marks, tuple) else (marks,)
    return pytest.param(
        model_type, *values, marks=(*marks, pytest.mark.skipif(model_type not in known, reason=reason))
    )
