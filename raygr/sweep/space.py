"""A sweep's search space -> its points, and a point -> the configuration of its train run; no Ray here.

A point is name -> plain value. Guided dimensions that are no number go by a label in it, such as `6 at random, draw 0`,
because search libraries want values that compare.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Mapping
from typing import NamedTuple

from raygr import files
from raygr.config import ConfigError, check_config
from raygr.data.vector_tables import read_vectors
from raygr.sweep.config import RandomSubsets, SweepConfig, Value, ValueRange
from raygr.train.config import TrainConfig
from raygr.train.inputs import check_settings, check_width

GUIDED_DIMENSION, TOTAL_WIDTH, SEED = "guided_dimension", "total_width", "seed"
# Where a trial runs and what it is measured by is the same for all; aspects are the guided dimension's.
NOT_SEARCHED = ("output", "workers", "use_gpu", "threads", "candidates", "targets", "aspect_names")
PATHS = ("data", "item_scores", "user_score_run", "list_scores")
TRIALS = "trials"
# A base model has no scores; what only makes sense with them goes with them.
BASE_MODEL = {
    "item_scores": None,
    "aspect_names": None,
    "control": "none",
    "user_scores": "none",
    "user_score_run": None,
    "linear_map": False,
    "train_user_guided": False,
}
Point = Mapping[str, Value]


class Draw(NamedTuple):
    """So many aspects, drawn with this seed."""

    aspects: int
    seed: tuple[int, int]


def search_points(config: SweepConfig) -> list[Point]:
    """The points of a grid or random search; for tpe a few that show every value.

    Raises ConfigError for a space that cannot be searched.
    """
    check_space(config)
    match config.search:
        case "grid":
            return grid_points(config)
        case "random":
            return random_points(config)
        case "tpe":
            return shown_values(config)


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
        f"sets what train, {GUIDED_DIMENSION} or {TOTAL_WIDTH} sets, too": set_twice,
        "has no value": {name for name, values in listed.items() if not values},
        "has the same value twice": {name for name, values in listed.items() if has_twice(values)},
        "has a range, but a grid needs lists": set(ranges) if config.search == "grid" else set(),
        "has a range whose low is not below its high, or not above 0 with log": {
            name for name, r in ranges.items() if r.low >= r.high or (r.log and r.low <= 0)
        },
    }
    wrong = [f"space {text} ({', '.join(sorted(names))})" for text, names in found.items() if names]
    if not config.space:
        wrong.append("space is empty: name what is searched, and its values")
    if (config.trials is None) != (config.search == "grid"):
        wrong.append("trials says how many points search: random and tpe try: they need it, a grid has none")
    if "output" in config.train:
        wrong.append("train.output: every trial has its own, below the sweep's output")
    if wrong:
        raise ConfigError("; ".join(wrong))


def has_twice(values: tuple) -> bool:
    # True == 1, but they are two values
    return len({repr(value) for value in values}) < len(values)


def values_of(config: SweepConfig, name: str) -> list[Value]:
    """The plain values of a listed name, labels in place of lists and draws."""
    if name == GUIDED_DIMENSION:
        return list(guided_dimensions(config))
    return list(config.space[name])


def guided_dimensions(config: SweepConfig) -> dict[Value, int | tuple[str, ...] | Draw]:
    """By their labels: first so many aspects, the named ones, or a draw."""
    found: dict[Value, int | tuple[str, ...] | Draw] = {}
    for value in config.space[GUIDED_DIMENSION]:
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


def grid_points(config: SweepConfig) -> list[Point]:
    """All points; the last name of the space changes fastest."""
    return [
        dict(zip(config.space, values, strict=True))
        for values in itertools.product(*(values_of(config, name) for name in config.space))
    ]


def random_points(config: SweepConfig) -> list[Point]:
    """`trials` points without any twice, by the sweep's seed."""
    generator = random.Random(config.seed)
    if any(isinstance(values, ValueRange) for values in config.space.values()):
        return [{name: drawn(config, name, generator) for name in config.space} for _ in range(config.trials)]
    listed = [values_of(config, name) for name in config.space]
    count = math.prod(map(len, listed))
    if config.trials > count:
        raise ConfigError(f"trials: the space has {count} points, fewer than {config.trials}: use search: grid")
    return [point_at(config, number) for number in generator.sample(range(count), config.trials)]


def point_at(config: SweepConfig, number: int) -> Point:
    """The grid's point of that number, without making the others."""
    point = {}
    for name in reversed(config.space):
        values = values_of(config, name)
        number, place = divmod(number, len(values))
        point[name] = values[place]
    return {name: point[name] for name in config.space}


def drawn(config: SweepConfig, name: str, generator: random.Random) -> Value:
    match config.space[name]:
        case ValueRange(low=int(low), high=int(high), log=False):
            return generator.randint(low, high)
        case ValueRange(low=low, high=high, log=True):
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
            return round(value) if isinstance(low, int) and isinstance(high, int) else value
        case ValueRange(low=low, high=high):
            return generator.uniform(low, high)
        case _:
            return generator.choice(values_of(config, name))


def shown_values(config: SweepConfig) -> list[Point]:
    """Each value once, beside the first of the other names; of a range its two ends."""
    values = {
        name: [found.low, found.high] if isinstance(found, ValueRange) else values_of(config, name)
        for name, found in config.space.items()
    }
    first = {name: found[0] for name, found in values.items()}
    return [first | {name: value} for name, found in values.items() for value in found]


def with_absolute_paths(config: SweepConfig) -> SweepConfig:
    """For trials, which run in folders of their own; a value that is no path is left for the checks."""
    train = {name: absolute(value) if name in PATHS else value for name, value in config.train.items()}
    space = {
        name: tuple(map(absolute, values)) if name in PATHS and isinstance(values, tuple) else values
        for name, values in config.space.items()
    }
    return dataclasses.replace(config, output=files.absolute(config.output), train=train, space=space)


def absolute(value: object) -> object:
    return files.absolute(value) if isinstance(value, str) else value


def train_config(config: SweepConfig, point: Point, *, name: str) -> TrainConfig:
    """The configuration of the trial called `name`; ConfigError where train would refuse it."""
    source = "trial " + ", ".join(f"{searched} = {value}" for searched, value in point.items())
    fields = {searched: value for searched, value in point.items() if searched not in (GUIDED_DIMENSION, TOTAL_WIDTH)}
    settings = {"threads": 1, **config.train, **fields, "output": files.join(files.join(config.output, TRIALS), name)}
    if GUIDED_DIMENSION in point:
        aspects = chosen_aspects(config, point[GUIDED_DIMENSION], check_config(TrainConfig, settings, source=source))
        settings |= {"aspect_names": aspects} if aspects else BASE_MODEL
    trained = check_config(TrainConfig, settings, source=source)
    aspects = trained.aspect_names or aspect_names(trained)
    if point.get(TOTAL_WIDTH) is not None:
        taken = len(aspects) if trained.fusion == "concat" else 0
        settings["base_width"] = point[TOTAL_WIDTH] - taken
        trained = check_config(TrainConfig, settings, source=source)
    try:
        check_settings(trained)
        check_width(trained, len(aspects))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return trained


def chosen_aspects(config: SweepConfig, label: Value, trained: TrainConfig) -> tuple[str, ...]:
    """The aspects of a guided dimension, in the order of the scores; none for the base model."""
    dimension = guided_dimension(config, label)
    if dimension == 0:
        return ()
    names = aspect_names(trained)
    found = None
    match dimension:
        case int():
            found = names[:dimension] if 0 < dimension <= len(names) else None
        case Draw(aspects=count, seed=seed):
            if count <= len(names):
                places = random.Random(str(seed)).sample(range(len(names)), count)
                found = tuple(names[place] for place in sorted(places))
        case chosen:
            found = chosen if set(chosen) <= set(names) and len(set(chosen)) == len(chosen) else None
    if not found:
        known = f"{trained.item_scores} has {len(names)} aspects: {', '.join(names)}" if names else "no item_scores"
        raise ConfigError(f"space.{GUIDED_DIMENSION}: {label}, but {known}")
    return found


def guided_dimension(config: SweepConfig, label: Value) -> int | tuple[str, ...] | Draw:
    """Behind the label; a number of a range is its own."""
    if isinstance(config.space[GUIDED_DIMENSION], ValueRange):
        return label
    return guided_dimensions(config)[label]


def aspect_names(trained: TrainConfig) -> tuple[str, ...]:
    return read_aspect_names(trained.item_scores, trained.score_column) if trained.item_scores else ()


@functools.cache
def read_aspect_names(item_scores: str, column: str) -> tuple[str, ...]:
    return read_vectors(item_scores, subjects="items", column=column, aspects=None).aspects
