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

PEFT_IS_TOO_OLD = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
"""For this transformers, by its own account. Adapters that it loads itself are then refused, and PEFT generates other
text with virtual tokens, because it passes the cache under the old name."""
NEEDS_PEFT_FOR_TRANSFORMERS = pytest.mark.skipif(
    PEFT_IS_TOO_OLD, reason=f"transformers {transformers.__version__} asks for PEFT {MIN_PEFT_VERSION} or later"
)


def needs_transformers(version: str, lack: str) -> pytest.MarkDecorator:
    """Skip below `version`, of which the versions before `lack` something: "transformers before 5.18 ..."."""
    too_old = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(too_old, reason=f"transformers before {version} {lack}")


def family(model_type: str, *values: object, marks: object = ()) -> object:
    """The parameters `model_type, *values` of a test, skipped where transformers does not have the family."""
    known = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    reason = f"transformers {transformers.__version__} does not have the family {model_type!r}"
    marks = marks if isinstance(marks, tuple) else (marks,)
    return pytest.param(
        model_type, *values, marks=(*marks, pytest.mark.skipif(model_type not in known, reason=reason))
    )
