"""Which language model `skipguide llm` takes."""

import pytest

from skipguide.cli.llm_models import load
from skipguide.errors import SkipError


def test_a_model_that_is_none_is_answered_with_language_models():
    with pytest.raises(SkipError, match=r"expected tiny-lm \(bundled\), a folder, or a hub id such as Qwen/"):
        load("./nothing", "cpu", "float32")
