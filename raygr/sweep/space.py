"""Search space -> points, and a point -> the configuration of its train run. Nothing here needs Ray.

A point is name -> plain value, because search libraries compare values. A guided dimension that is not a number stands
in a point by its label, such as `6 at random, draw 0`. Grid and random points are drawn here and not by Tune or Optuna:
they are checked before Ray starts, none comes twice, and their numbers in the trials' folder names are always the same.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from raygr import files
from raygr.config import ConfigError, check_config
from raygr.data.vector_tables import read_vectors
from raygr.sweep.config import RandomSubsets, SweepConfig, Value, ValueRange
from raygr.train.config import TrainConfig, fitting
from raygr.train.inputs import check_width

GUIDED_DIMENSION, TOTAL_WIDTH, SEED = "guided_dimension", "total_width", "seed"
# All trials run in the same place and are measured in the same way; the guided dimension sets the aspects.
NOT_SEARCHED = ("output", "workers", "use_gpu", "threads", "ray", "candidates", "targets", "aspect_names")
PATHS = ("data", "item_scores", "user_score_run", "user_table", "list_scores")
TRIALS = "trials"
Point = Mapping[str, Any]


class Draw(NamedTuple):
    """A number of aspects, drawn with this seed."""

    aspects: int
    seed: tuple[int, int]


GuidedDimension = int | tuple[str, ...] | Draw


# --- points -------------------------------------------------------------------------------------


def search_points(config: SweepConfig) -> list[Point]:
    """The points of a grid or random search; for tpe, a few points that contain every value once.

    ConfigError for a space that cannot be searched.
    """
    check_space(config)
    values = {name: listed_values(config, name) for name in config.space}
    match config.search:
        case "grid":  # the last name changes fastest
            return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        case "random":
            return random_points(config, values)
        case "tpe":
            first = {name: found[0] for name, found in values.items()}
            return [first | {name: value} for name, found in values.items() for value in found]


def check_space(config: SweepConfig) -> None:
    known = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in NOT_SEARCHED]
    known += [GUIDED_DIMENSION, TOTAL_WIDTH]
    listed = {name: values for name, values in config.space.items() if isinstance(values, tuple)}
    ranges = {name: values for name, values in config.space.items() if isinstance(values, ValueRange)}
    set_twice = {*config.train} & {*config.space}
    if GUIDED_DIMENSION in config.space:
        set_twice |= {"aspect_names"} & {*config.train}
    if TOTAL_WIDTH in config.space:
        set_twice |= {"base_width"} & {*config.space}
    found = {
        f"has names that cannot be searched; those that can are: {', '.join(known)}": set(config.space) - set(known),
        f"sets what train, {GUIDED_DIMENSION} or {TOTAL_WIDTH} also sets": set_twice,
        "has no value": {name for name, values in listed.items() if not values},
        "has the same value twice": {
            name
            for name, values in listed.items()
            if len({repr(value) for value in values}) < len(values)  # by repr, because True == 1
        },
        "has a range, but a grid needs lists": set(ranges) if config.search == "grid" else set(),
        "has a range whose low is not below its high, or not above 0 with log": {
            name for name, r in ranges.items() if r.low >= r.high or (r.log and r.low <= 0)
        },
    }
    wrong = [f"space {text} ({', '.join(sorted(names))})" for text, names in found.items() if names]
    if not config.space:
        wrong.append("space is empty: name the settings to search, and their values")
    if (config.trials is None) != (config.search == "grid"):
        wrong.append("trials is the number of points that search: random and tpe try: they need it, a grid has none")
    if "output" in config.train:
        wrong.append("train.output: every trial has its own, below the sweep's output")
    if wrong:
        raise ConfigError("; ".join(wrong))


def listed_values(config: SweepConfig, name: str) -> list[Any]:
    """The values of a list, with labels for lists of aspects and draws; the two ends of a range."""
    values = config.space[name]
    if isinstance(values, ValueRange):
        return [values.low, values.high]
    return list(guided_dimensions(config)) if name == GUIDED_DIMENSION else list(values)


def random_points(config: SweepConfig, values: Mapping[str, list[Value]]) -> list[Point]:
    """`trials` points by the sweep's seed: different points of lists, independent draws where there are ranges."""
    generator, space, trials = random.Random(config.seed), config.space, config.trials or 0
    if any(isinstance(found, ValueRange) for found in space.values()):
        return [{name: drawn(space[name], values[name], generator) for name in space} for _ in range(trials)]
    sizes = [len(found) for found in values.values()]
    count = math.prod(sizes)
    if trials > count:
        raise ConfigError(f"trials: the space has {count} points, fewer than {trials}: use search: grid")
    # numbers of the grid's points, so that the grid need not be built
    places = [np.unravel_index(number, sizes) for number in generator.sample(range(count), trials)]
    return [{name: values[name][place] for name, place in zip(values, point, strict=True)} for point in places]


def drawn(found: ValueRange | tuple, values: list[Value], generator: random.Random) -> Value:
    match found:
        case ValueRange(low=int(low), high=int(high), log=False):
            return generator.randint(low, high)
        case ValueRange(low=low, high=high, log=True):
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
            return round(value) if isinstance(low, int) and isinstance(high, int) else value
        case ValueRange(low=low, high=high):
            return generator.uniform(low, high)
    return generator.choice(values)


def guided_dimensions(config: SweepConfig) -> dict[Value, GuidedDimension]:
    """Label -> number of first aspects, names of aspects, or a draw."""
    found: dict[Value, GuidedDimension] = {}
    values = config.space[GUIDED_DIMENSION]
    for value in () if isinstance(values, ValueRange) else values:
        match value:
            case RandomSubsets(random=aspects, subsets=count):
                found |= {f"{aspects} at random, draw {n}": Draw(aspects, (config.seed, n)) for n in range(count)}
            case tuple():
                found[", ".join(value)] = value
            case int() if value is not True and value is not False:
                found[value] = value
            case _:
                raise ConfigError(f"space.{GUIDED_DIMENSION}: {value!r} is no count, list of aspects or random subsets")
    return found


# --- train settings -----------------------------------------------------------------------------


def with_absolute_paths(config: SweepConfig) -> SweepConfig:
    """The same paths for trials, which run in other folders. A value of another type is left for the checks."""

    def absolute(value: Any) -> Any:
        return files.absolute(value) if isinstance(value, str) else value

    train = {name: absolute(value) if name in PATHS else value for name, value in config.train.items()}
    space = {
        name: tuple(map(absolute, values)) if name in PATHS and isinstance(values, tuple) else values
        for name, values in config.space.items()
    }
    return dataclasses.replace(config, output=files.absolute(config.output), train=train, space=space)


def train_config(config: SweepConfig, point: Point, *, name: str) -> TrainConfig:
    """The configuration of the trial called `name`; ConfigError where train would refuse it."""
    source = "trial " + ", ".join(f"{searched} = {value}" for searched, value in point.items())
    fields = {searched: value for searched, value in point.items() if searched not in (GUIDED_DIMENSION, TOTAL_WIDTH)}
    settings = {"threads": 1, **config.train, **fields, "output": files.join(files.join(config.output, TRIALS), name)}
    if GUIDED_DIMENSION in point:
        whole = check_config(TrainConfig, fitting(settings), source=source)
        aspects = chosen_aspects(config, point[GUIDED_DIMENSION], whole)
        settings |= {"aspect_names": aspects} if aspects else {"item_scores": None}
    settings = fitting(settings)
    trained = check_config(TrainConfig, settings, source=source)
    aspects = trained_aspects(trained)
    if point.get(TOTAL_WIDTH) is not None:
        taken = len(aspects) if trained.fusion == "concat" else 0
        settings["base_width"] = point[TOTAL_WIDTH] - taken
        trained = check_config(TrainConfig, settings, source=source)
    try:
        check_width(trained, len(aspects))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return trained


def chosen_aspects(config: SweepConfig, label: Value, trained: TrainConfig) -> tuple[str, ...]:
    """The aspects of a guided dimension, in the order of the scores; none for the base model."""
    is_range = isinstance(config.space[GUIDED_DIMENSION], ValueRange)
    dimension = label if is_range else guided_dimensions(config)[label]
    if dimension == 0:
        return ()
    names = scored_aspects(trained)
    found: tuple[str, ...] = ()
    match dimension:
        case int():
            found = names[:dimension] if 0 < dimension <= len(names) else ()
        case Draw(aspects=count, seed=seed):
            numbers = random.Random(str(seed)).sample(range(len(names)), count) if count <= len(names) else []
            found = tuple(names[number] for number in sorted(numbers))
        case tuple() as chosen if set(chosen) <= set(names) and len(set(chosen)) == len(chosen):
            found = tuple(chosen)
    if not found:
        known = f"{trained.item_scores} has {len(names)} aspects: {', '.join(names)}" if names else "no item_scores"
        raise ConfigError(f"space.{GUIDED_DIMENSION}: {label}, but {known}")
    return found


def trained_aspects(trained: TrainConfig) -> tuple[str, ...]:
    """The aspects that a train run uses; none for a base model."""
    return trained.aspect_names or scored_aspects(trained)


def scored_aspects(trained: TrainConfig) -> tuple[str, ...]:
    """All aspects of a train run's item scores; none for a base model."""
    return read_aspect_names(trained.item_scores, trained.score_column) if trained.item_scores else ()


@functools.cache
def read_aspect_names(item_scores: str, column: str) -> tuple[str, ...]:
    return read_vectors(item_scores, subjects="items", column=column, aspects=None).aspects
