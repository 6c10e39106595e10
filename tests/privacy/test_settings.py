"""Privacy settings that no guarantee can use are refused by name, with what to write instead."""

from __future__ import annotations

from typing import Any

import pytest

from fedrec.errors import ConfigError
from privacy.settings import PrivacySettings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epsilon", 0.0, "write a positive number"), ("epsilon", -1.0, "write a positive number"),
        ("delta", 0.0, "write a number between 0 and 1"), ("delta", 1.0, "write a number between 0 and 1"),
        ("noise_multiplier", -1.0, r"write 0 \(no noise\) or more"),
        ("max_grad_norm", 0.0, "the clipping norm is a positive number"),
        ("max_grad_norm", -2.0, "the clipping norm is a positive number"),
        ("sample_rate", 0.0, r"write a Poisson rate in \(0, 1\]"),
        ("sample_rate", 1.5, r"write a Poisson rate in \(0, 1\]"),
        ("trust", "me", "write server or secure_aggregation"), ("row_set", "some", "write dense or padded"),
        ("accountant", "gdp", "write auto or prv or rdp"), ("budget", 0.0, "write a positive number"),
        ("clip_quantile", 1.0, "write a share between 0 and 1"), ("steps", 0, "write a whole number, 1 or more"),
        ("padded_rows", -1, "write a whole number, 0 or more"), ("noise_seed", -1, "write a whole number"),
        ("optimizer", "adam", "momentum or Adam belong on the server"),
        ("optimizer", "ghost", "ghost clipping counts padding rows"),
        ("clip_learning_rate", 0.0, "write a positive number"),
        ("clip_count_noise", -0.1, r"write 0 \(chosen for you\) or more"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^privacy\.{key}={value}: .*{message}|^privacy\.{key}={value}: {message}"):
        PrivacySettings.from_config({"mode": "user_dp", "epsilon": 4.0, key: value})


def test_a_mode_without_any_word_on_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing says how much noise; write privacy\.epsilon=4"):
        PrivacySettings.from_config({"mode": "user_dp"})


def test_noise_asked_for_together_with_an_infinite_epsilon_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=inf asks for no noise; leave one out"):
        PrivacySettings("user_dp", epsilon=float("inf"), noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilonn": 3.0}, r"privacy\.epsilonn: no such setting; did you mean privacy\.epsilon\?"),
        ({"epsilon": "four"}, r"privacy\.epsilon='four': expected float"),
        ({"epsilon": True}, r"privacy\.epsilon=True: expected float"),
        ({"steps": 2.5}, r"privacy\.steps=2\.5: expected int"),
        ({"adaptive_clipping": 1}, r"privacy\.adaptive_clipping=1: expected bool"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivacySettings.from_config({"mode": "user_dp", "epsilon": 1.0, **options})


def test_whole_numbers_stand_for_floats_and_null_for_what_is_to_be_solved() -> None:
    settings = PrivacySettings.from_config({"mode": "user_dp", "epsilon": 4, "noise_multiplier": None})
    assert settings.epsilon == 4.0
    assert settings.noise_multiplier is None
    assert not settings.noiseless
