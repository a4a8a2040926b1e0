"""Owns the settings that choices have of their own: which keys may be searched over, the study's space with
them, and the config as it is under a choice."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from pydantic import ValidationError

from memcontrol.config.inner import InnerConfig
from memcontrol.config.load import set_at
from memcontrol.config.problems import explain_problems
from memcontrol.config.strict import Strict, get_value
from memcontrol.config.study import Config
from memcontrol.core.choice import CHECKPOINT_KEY, OF_TRAINING, STRENGTH_KEY, Choice, freeze, thaw
from memcontrol.core.errors import MemControlError
from memcontrol.core.reward_table import EPSILON
from memcontrol.core.space import Coordinate, SearchSpace
from memcontrol.core.space_yaml import load_space, parse_over

PRIVACY_KEY = "inner.privacy"
_OF_SAMPLING = ("rewards.guidance", "rewards.guidance_from", "rewards.sampling_steps")
_MOST_VARIANTS = 24  # that a fine-tuning is measured at


def load_study_space(config: Config) -> SearchSpace:
    """The space that a config names, with what `search` adds to it. Raises MemControlError."""
    return complete_space(load_space(config.space), config)


def complete_space(space: SearchSpace, config: Config) -> SearchSpace:
    """The space with what `search.over`, `search.strengths` and `search.checkpoints` say, and the config's
    own values where a choice says nothing. Raises MemControlError where the config does not allow them."""
    over = {**space.over, **parse_over("search.over", config.search.over, _refuse_setting)}
    for key in over:
        _check_key(key, config)
    usual = {key: replace(one, usual=_find_usual(config, key)) for key, one in over.items()}
    found = replace(
        space,
        over={key: one for key, one in usual.items() if key.startswith(OF_TRAINING)},
        free={key: _make_free(key, one) for key, one in usual.items() if key in _OF_SAMPLING}
        | _make_free_shares(STRENGTH_KEY, config.search.strengths)
        | _make_free_shares(CHECKPOINT_KEY, config.search.checkpoints),
    )
    _check_values(found, config)
    _check_bound(config, found)
    return found


def knows_bound(config: Config, space: SearchSpace) -> bool:
    """Whether any fine-tuning of a study has a bound on what it tells."""
    return config.inner.privacy is not None or any(key.startswith(PRIVACY_KEY) for key in space.over)


def _check_bound(config: Config, space: SearchSpace) -> None:
    """An epsilon that no fine-tuning has says nothing."""
    asked = [name for name in (*config.rewards.objectives, *config.rewards.limits) if name == EPSILON]
    if asked and not knows_bound(config, space):
        _refuse_setting(
            "rewards: epsilon is the bound that inner.privacy keeps to, and no fine-tuning has one; set "
            "inner.privacy: {epsilon: 8}, or search over it, inner.privacy: [null, {epsilon: 8}]"
        )


def _refuse_setting(text: str) -> NoReturn:
    raise MemControlError(text)


def _check_key(key: str, config: Config) -> None:
    allowed = [name for name in list_inner_keys() if name not in config.inner.memory_keys]
    keys = [*(f"{OF_TRAINING}{name}" for name in allowed), *_OF_SAMPLING]
    if key not in keys:
        near = difflib.get_close_matches(key, keys, 3, 0.5) or keys[:3]
        _refuse_setting(
            f"search.over: '{key}' is nothing that a choice may decide; allowed are the keys of inner but "
            f"those of memory, and {', '.join(_OF_SAMPLING)}; near are {', '.join(near)}"
        )


def list_inner_keys(model: type[Strict] = InnerConfig, prefix: str = "") -> list[str]:
    """Of a fine-tuning's config, settings inside settings included: "ensemble", "ensemble.shards"."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inside = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Strict)]
        found.append(f"{prefix}{name}")
        for kind in inside:
            found += list_inner_keys(kind, f"{prefix}{name}.")
    return found


def _find_usual(config: Config, key: str) -> Any:
    """The config's own value; None inside a setting that is off."""
    with contextlib.suppress(AttributeError):
        value = get_value(config, key)
        return freeze(value.model_dump(mode="json")) if isinstance(value, Strict) else value
    return None


def _make_free(key: str, coordinate: Coordinate) -> Coordinate:
    """With the config's own value first, at which a fine-tuning is measured in any case."""
    if coordinate.limits is not None:
        _refuse_setting(
            f"search.over: {key} is a range; give the values that each fine-tuning is measured at: [1, 2]"
        )
    return replace(coordinate, options=tuple(dict.fromkeys([coordinate.usual, *coordinate.options])))


def _make_free_shares(key: str, shares: tuple[float, ...]) -> dict[str, Coordinate]:
    options = tuple(dict.fromkeys([1.0, *shares]))
    return {key: Coordinate(options, usual=1.0)} if len(options) > 1 else {}


def _check_values(space: SearchSpace, config: Config) -> None:
    """Each value alone, or inside the setting that it needs, must be one that the config allows."""
    for key, coordinate in {**space.over, **space.free}.items():
        if key in (STRENGTH_KEY, CHECKPOINT_KEY):
            continue
        needed = _turn_on(key, space, config)
        ends = coordinate.options if coordinate.limits is None else coordinate.limits
        for option in ends:
            apply_settings(config, {**needed, key: thaw(option)}, f"search.over: {key}")
    n = len(space.list_variants(Choice((), "full", 1.0)))
    if n > _MOST_VARIANTS:
        _refuse_setting(
            f"search.strengths, search.checkpoints and what search.over says of sampling are {n} further "
            f"measurements of each fine-tuning; allowed: {_MOST_VARIANTS}; give fewer values"
        )


def _turn_on(key: str, space: SearchSpace, config: Config) -> dict[str, Any]:
    """What must be set for the key to mean anything: settings around it that are off, at an option that is
    on."""
    found: dict[str, Any] = {}
    names = key.split(".")
    for n in range(2, len(names)):
        around = ".".join(names[:n])
        if around in space.over:
            found[around] = next((thaw(one) for one in space.over[around].options if one is not None), None)
        if found.get(around, get_value(config, around)) is None:
            _refuse_setting(
                f"search.over: {key} lies inside {around}, which is off; set it, or search over it too, "
                f"{around}: [null, {{}}]"
            )
    return found


def configure_choice(config: Config, choice: Choice) -> Config:
    """The config under the choice's own settings. Raises MemControlError where they do not go together."""
    return apply_settings(config, choice.overrides, f"choice {choice.key}")


def apply_settings(config: Config, settings: Mapping[str, Any], where: str) -> Config:
    """The config with other values at keys of `inner` and `rewards`. Raises MemControlError, which begins
    with `where`."""
    if not settings:
        return config
    values = config.model_dump(exclude={"storage"})
    for key in sorted(settings):  # what lies around a key comes before it
        values = set_at(values, key.split("."), settings[key])
    try:
        found = Config.model_validate(values)
    except ValidationError as error:
        raise MemControlError(f"{where}: {explain_problems(error.errors(), Config)}") from None
    return config.model_copy(update={"inner": found.inner, "rewards": found.rewards})


def is_allowed(config: Config, choice: Choice) -> bool:
    """Whether a choice's settings go together."""
    try:
        configure_choice(config, choice)
    except MemControlError:
        return False
    return True
