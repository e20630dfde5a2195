"""Options as the command line hands them on."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import InputError
from common.inference import FinishRegistrationd, PaddedInferer
from common.options import as_flag


@pytest.mark.parametrize("value", [False, "false", "False", "FALSE"])
def test_a_word_is_what_it_says(value: Any) -> None:
    assert as_flag(value, "unfold") is False
    assert FinishRegistrationd(unfold=value).unfold is False
    assert PaddedInferer(multiple=8, uncertainty=value).uncertainty is False
    assert as_flag(str(not value) if value is False else "true", "unfold") is True


@pytest.mark.parametrize("value", ["no", "", 0, 1, None])
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="--unfold is either True or False"):
        FinishRegistrationd(unfold=value)
