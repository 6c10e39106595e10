"""``fedrec budgets``: one experiment over a list of privacy budgets, methods and seeds, planned and checked as a whole.

A comparison is nothing but ordinary runs, each in a folder that a later call finds again
(``<output_dir>/<name>/<method>/epsilon-<ε>/seed-<s>``). This module says which runs there are and refuses what cannot
run before the first one starts; ``budgets_runs`` runs them, ``budgets_table`` and ``budgets_plot`` show them.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrec.errors import ConfigError
from fedrec.experiment.budgets_values import CURVES
from fedrec.experiment.config import Config, load_config
from fedrec.experiment.plan import Plan

_KEYS = ("epsilons", "seeds", "methods", "metric", "attack_curve")
_METHOD_KEYS = ("overrides", "by_epsilon")
_METRIC = re.compile(r"(?:hr|ndcg|recall|mrr)@(\d+)")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Method:
    """One line of the plot: what makes it (overrides), and what differs at single epsilons."""

    name: str
    overrides: tuple[str, ...] = ()
    by_epsilon: tuple[tuple[float, tuple[str, ...]], ...] = ()

    def at(self, epsilon: float) -> tuple[str, ...]:
        """All overrides at ``epsilon``."""
        return self.overrides + next((more for value, more in self.by_epsilon if value == epsilon), ())


@dataclass(frozen=True)
class BudgetSettings:
    """The ``budgets`` section: ε > 0 in ascending order (infinity: without clipping and noise), seeds, methods.

    ``metric`` is drawn against ε; ``attack_curve`` (a key of ``CURVES``; None: the first that was measured) below it.
    """

    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    metric: str = "hr@10"
    attack_curve: str | None = None

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> BudgetSettings:
        """Settings from the section's keys; ConfigError for what is unknown or out of range."""
        for key in options:
            if key not in _KEYS:
                raise ConfigError(f"budgets.{key}: no such setting; there are {', '.join(_KEYS)}")
        methods = options.get("methods") or {}
        if not isinstance(methods, Mapping):
            raise ConfigError(f'budgets.methods={methods!r}: write +budgets.methods.NAME=["algorithm=fedmf"]')
        metric, curve = str(options.get("metric")), options.get("attack_curve")
        if not _METRIC.fullmatch(metric):
            raise ConfigError(f"budgets.metric={metric}: write a metric with its cut-off, for example hr@10 or ndcg@10")
        if curve is not None and curve not in CURVES:
            raise ConfigError(f"budgets.attack_curve={curve}: no such curve; there are {', '.join(CURVES)}")
        return cls(
            _epsilons(options.get("epsilons")), _seeds(options.get("seeds")),
            tuple(_method(str(name), value) for name, value in methods.items()), metric, curve,
        )  # fmt: skip


def _epsilons(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"budgets.epsilons={values!r}: write a list such as [1,2,4,8,inf]")
    found = [epsilon_of(value) for value in values]
    for value in found:
        if found.count(value) > 1 or [name_of_epsilon(one) for one in found].count(name_of_epsilon(value)) > 1:
            raise ConfigError(f"budgets.epsilons: {value:g} stands there twice; write every budget once")
    return tuple(sorted(found))


def epsilon_of(value: Any, key: str = "budgets.epsilons") -> float:
    """A budget from a configuration value (``inf`` as a word too). ConfigError unless it is above 0."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not found > 0.0:
        raise ConfigError(f"{key}: {value!r} is no budget; write a number above 0, or inf (no clipping, no noise)")
    return found


def name_of_epsilon(epsilon: float) -> str:
    """As it stands in folder names: ``4``, ``0.5``, ``inf``."""
    return f"{epsilon:g}"


def _seeds(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"budgets.seeds={values!r}: write a list such as [0,1,2]")
    for value in values:
        if type(value) is not int or value < 0:
            raise ConfigError(f"budgets.seeds: {value!r} is no seed; write whole numbers, 0 or more")
        if values.count(value) > 1:
            raise ConfigError(f"budgets.seeds: {value} stands there twice; write every seed once")
    return tuple(values)


def _method(name: str, value: Any) -> Method:
    key = f"budgets.methods.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key}: names a folder; write letters, digits, - and _")
    if isinstance(value, Mapping):
        for inner in value:
            if inner not in _METHOD_KEYS:
                raise ConfigError(f"{key}.{inner}: no such setting; there are {', '.join(_METHOD_KEYS)}")
        special = value.get("by_epsilon") or {}
        if not isinstance(special, Mapping):
            raise ConfigError(f'{key}.by_epsilon={special!r}: write {{"1": [overrides], …}}')
        return Method(
            name, _overrides(value.get("overrides", []), f"{key}.overrides"),
            tuple(
                (epsilon_of(at, f"{key}.by_epsilon"), _overrides(more, f"{key}.by_epsilon.{at}"))
                for at, more in special.items()
            ),
        )  # fmt: skip
    return Method(name, _overrides(value, key))


def _overrides(values: Any, key: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ConfigError(f'{key}: write a list of overrides in quotes, ["algorithm=fedmf","federation.rounds=20"]')
    for one in values:
        _check_override(one, key)
    return tuple(values)


_OWNED = {
    "seed": "budgets.seeds=[0,1,2]",
    "privacy.epsilon": "budgets.epsilons=[1,2,4,8,inf]",
    "output_dir": "output_dir=… for the whole comparison",
    "name": "name=… for the whole comparison",
    "experiment": "a recipe for the whole comparison",
}


def _check_override(text: str, key: str) -> None:
    named = _key(text)
    if named in _OWNED or named.partition(".")[0] == "budgets":
        raise ConfigError(
            f"{key}: {text}: set for all methods together; write {_OWNED.get(named, 'it outside of the method')}"
        )


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison: its configuration as ``run_experiment`` takes it, and its folder."""

    method: str
    epsilon: float
    seed: int
    config: Config
    folder: Path
    special: bool = False  # with settings of its own at this epsilon

    @property
    def title(self) -> str:
        budget = "∞" if math.isinf(self.epsilon) else name_of_epsilon(self.epsilon)
        return f"{self.method}, ε {budget}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """All runs of one call. ``runs`` go seed by seed, so that an interrupted call has whole curves of fewer seeds."""

    name: str
    folder: Path
    settings: BudgetSettings
    runs: tuple[PlannedRun, ...]


def plan_comparison(overrides: Sequence[str]) -> Comparison:
    """The comparison that ``overrides`` describe (as for ``fedrec run``, and ``budgets.…``).

    Of the baselines, popularity and EASE go with one run per seed, local-only with one run per method: they do not
    depend on ε.

    Raises:
        ConfigError: a budget, seed, method or override that cannot be, named with the method it belongs to.
    """
    for override in overrides:
        if _key(override) in ("seed", "privacy.epsilon"):
            raise ConfigError(f"{override}: `fedrec budgets` runs a list; write {_OWNED[_key(override)]}")
    config = load_config(overrides)
    settings = BudgetSettings.from_config(config["budgets"])
    methods = settings.methods or (Method(str(config["algorithm"]["_target_"]).rpartition(".")[2].lower()),)
    name = str(config.get("name") or f"budgets_{config['dataset'].get('name', 'file')}")
    folder = Path(str(config["output_dir"])).expanduser() / name
    composed: dict[tuple[str, ...], Config] = {}
    runs = []
    for seed in settings.seeds:
        for method in methods:
            for epsilon in settings.epsilons:
                more = method.at(epsilon)
                if more not in composed:
                    composed[more] = _composed(overrides, more, method.name)
                local = seed == settings.seeds[0] and epsilon == settings.epsilons[-1]
                central = method is methods[0] and epsilon == settings.epsilons[-1]
                place = folder / method.name / f"epsilon-{name_of_epsilon(epsilon)}" / f"seed-{seed}"
                runs.append(
                    PlannedRun(
                        method.name, epsilon, seed, _one(composed[more], method.name, epsilon, seed, central, local),
                        place, more != method.overrides,
                    )
                )  # fmt: skip
    _check_comparable(composed.values())
    _check_measured(settings, config)
    return Comparison(name, folder, settings, tuple(runs))


def _composed(overrides: Sequence[str], more: Sequence[str], method: str) -> Config:
    """The configuration of one method: its own overrides replace those of the whole comparison."""
    own = {_key(one) for one in more}
    kept = [one for one in overrides if _key(one) not in own]
    try:
        config = load_config([*kept, *more])
        if config["privacy"]["mode"] == "none":
            raise ConfigError("privacy=none: has no epsilon to compare; write privacy=user_dp")
    except ConfigError as error:
        raise ConfigError(f"budgets.methods.{method}: {error}") from None if more else error
    return config


def _one(base: Config, method: str, epsilon: float, seed: int, central: bool, local: bool) -> Config:
    config = copy.deepcopy(base)
    del config["budgets"]
    config["name"] = f"{method}_epsilon-{name_of_epsilon(epsilon)}"
    config["seed"] = seed
    config["privacy"]["epsilon"] = epsilon
    baselines = config["baselines"]
    for key, wanted in (("popularity", central), ("ease", central), ("local_only", local)):
        baselines[key] = bool(baselines[key]) and wanted
    return config


def _check_comparable(configs: Iterable[Config]) -> None:
    first, *others = configs
    for section in ("dataset", "protocol"):
        if any(one[section] != first[section] for one in others):
            raise ConfigError(
                f"budgets.methods: the methods differ in {section}, so their numbers cannot be compared; choose it for "
                "the whole comparison"
            )


def _check_measured(settings: BudgetSettings, config: Config) -> None:
    """ConfigError for curves that no run would measure."""
    found = _METRIC.fullmatch(settings.metric)
    cuts = config["protocol"].get("ks") or []
    if found and cuts and int(found[1]) not in cuts:
        raise ConfigError(f"budgets.metric={settings.metric}: protocol.ks={cuts} does not measure it")
    kind = (settings.attack_curve or "").partition(".")[0]
    if kind and kind not in config["attack"]["kinds"]:
        raise ConfigError(f"budgets.attack_curve={settings.attack_curve}: nothing measures it; write attack={kind}")


def check_runs(runs: Sequence[PlannedRun], finished: Callable[[PlannedRun, str], bool]) -> dict[str, str]:
    """Check every method and budget as ``run_experiment`` would; nothing is trained or written.

    Returns the SHA-256 of each method's data. A budget whose runs are all ``finished`` (told the run and that SHA-256)
    needs no check beyond the first one of its method. ConfigError names the method and the budget.
    """
    data: dict[str, str] = {}
    checked: set[tuple[str, float]] = set()
    for run in runs:
        if (run.method, run.epsilon) in checked or (run.method in data and finished(run, data[run.method])):
            continue
        checked.add((run.method, run.epsilon))
        try:
            data[run.method] = Plan(run.config).data.sha256
        except ConfigError as error:
            raise ConfigError(f"{run.method}, epsilon {name_of_epsilon(run.epsilon)}: {error}") from None
    return data
