"""Load and check configurations: frozen dataclasses, one in each stage's config.py, checked by pydantic.

`load_config(ScoreConfig, "score.yaml", ["mode=probe"])` reads the file first and puts the `--set` values on top.
The text under a field is its help on the command line and its line in the settings reference.
An unknown name, a wrong type, a value out of range and settings that contradict each other are refused by name.
`input_paths(config)` lists every path that a configuration reads, with the kind of run or file that belongs there.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import fsspec
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from raygr.files import is_relative, model_place, placed, shipped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)

RayUse = Literal["auto", "never", "always"]
"""Whether a stage runs on Ray: `auto` runs small work in the calling process, outside a cluster."""

Logger = Literal["tensorboard", "mlflow", "wandb"]
"""Where the curves of a training go, beside the files of its run."""


class InputKind(NamedTuple):
    """What a path field must name. Without a job it is a file or folder of any content."""

    job: str = ""
    """The stage whose finished run it is."""
    subjects: Literal["", "items", "users"] = ""
    """Of a score run."""
    or_other: bool = False
    """Something else than a run is as good: a table of vectors, or the folder of an adapter."""
    pattern: bool = False
    """It may be a glob pattern of files."""
    or_name: bool = False
    """It may be the name of a model instead of a path."""


class SettingsOf(NamedTuple):
    """Marks a mapping whose keys are fields of another configuration, and whose paths are inputs too."""

    config: type
    listed: bool = False
    """Whether each value is a tuple of values to try."""


# Types of path fields. A local path is made absolute where it is checked; any fsspec URI stays as it is. `Place` alone
# is written to; the others are read. `Shipped` is a file that the checkout may hold.
Place = Annotated[str, AfterValidator(placed)]
InputFile = Annotated[Place, InputKind()]
RawFiles = Annotated[Place, InputKind(pattern=True)]
Shipped = Annotated[str, AfterValidator(shipped), InputKind()]
Model = Annotated[str, AfterValidator(model_place), InputKind(or_name=True)]
SimulateRun = Annotated[Place, InputKind("simulate")]
PrepareRun = Annotated[Place, InputKind("prepare")]
ItemScoreRun = Annotated[Place, InputKind("score", "items")]
UserScoreRun = Annotated[Place, InputKind("score", "users")]
ItemVectors = Annotated[Place, InputKind("score", "items", or_other=True)]
UserVectors = Annotated[Place, InputKind("score", "users", or_other=True)]
Adapter = Annotated[Place, InputKind("finetune", or_other=True)]
FinetuneRun = Annotated[Place, InputKind("finetune")]
TrainRun = Annotated[Place, InputKind("train")]
CompareRun = Annotated[Place, InputKind("compare")]


class InputPath(NamedTuple):
    """A path that a configuration reads."""

    field: str
    """Such as `item_scores`, or `arms.base.0` inside a mapping of tuples."""
    path: str
    kind: InputKind


class ConfigError(Exception):
    """A configuration was refused; the message names the file and the field."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PipelineConfig:
    """Run several stages in order, each given as its name with its settings."""

    stages: tuple[Mapping[str, Mapping[str, Any] | str], ...] = Field(min_length=1)
    """Entries such as `- train: {output: ..., data: ...}`, in the order in which they run. In place of its settings a
    stage may have the path of a YAML file that holds them."""


Config = TypeVar("Config", bound="DataclassInstance")


def load_config(kind: type[Config], file: str | None, overrides: list[str], flags: Collection[str] = ()) -> Config:
    """Return the configuration of a YAML file, with `name=value` overrides on top.

    `flags` are further overrides, on top of those, which errors call by their flag and not by --set.
    """
    values = read_yaml(file) if file else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: settings are name: value, found a list")
    try:
        given = OmegaConf.from_dotlist([*(quoted(kind, one) for one in overrides), *flags])
        settings = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(values), given), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{' '.join([file or '', *overrides, *flags]).strip()}: {error}") from error
    by_hand = {one.partition("=")[0].split(".")[0]: "--set" for one in overrides} if file else {}
    by_hand |= {name: flag_of(name) for name in (one.partition("=")[0] for one in flags)}
    return check_config(kind, settings, source=file or "the command line", by_hand=by_hand)


def quoted(kind: Any, one: str) -> str:
    """Return a `name=value` with the value in quotes where the field takes text, which YAML may read as something else.

    A value that is in quotes, or null where the field takes that, stays as it is.
    """
    name, equals, text = one.partition("=")
    kinds = {part for part, _ in alternatives(get_type_hints(kind, include_extras=True).get(name, Any))}
    is_text = str in kinds and all(part in (str, NoneType) or get_origin(part) is Literal for part in kinds)
    if not equals or not is_text or (NoneType in kinds and text in ("", "null", "~")):
        return one
    try:
        is_quoted = text[:1] in ("'", '"') and isinstance(yaml_value(text), str)
    except YAMLError:
        is_quoted = False
    return one if is_quoted else f"{name}={json.dumps(text, ensure_ascii=False)}"


def alternatives(kind: Any, marks: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the types that a union allows, or the one type that there is, each with the marks of its Annotated."""
    if get_origin(kind) is Annotated:
        return alternatives(get_args(kind)[0], (*marks, *kind.__metadata__))
    if get_origin(kind) in (Union, UnionType):
        return [one for part in get_args(kind) for one in alternatives(part, marks)]
    return [(kind, marks)]


def yaml_value(text: str) -> Any:
    """Return what `--set name=text` sets a field to that does not take text."""
    read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return read["value"]


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def refuse(config: Any, without_effect: Mapping[str, Collection[str]], contradictions: Mapping[str, bool]) -> None:
    """ValueError for fields that differ from their defaults without having an effect, and for contradictions that hold.

    `without_effect` maps a reason to the fields that have none for it.
    """
    fields = type(config).__pydantic_fields__
    defaults = {name: one.get_default(call_default_factory=True) for name, one in fields.items()}
    wrong = [text for text, holds in contradictions.items() if holds]
    for reason, names in without_effect.items():
        given = [name for name in names if vars(config)[name] != defaults[name]]
        wrong += [f"{', '.join(given)}: no effect {reason}"] if given else []
    if wrong:
        raise ValueError("; ".join(wrong))


def check_config(
    kind: type[Config], settings: object, *, source: str, by_hand: Mapping[str, str] | None = None
) -> Config:
    """Return `settings` as a checked `kind`; ConfigError names the source and every field that is wrong.

    `by_hand` holds the fields that do not come from the source, with what gave them: --set or a flag.
    """
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        problems = []
        for one in error.errors():
            said = unknown_field(kind, one["loc"]) if one["type"] == "unexpected_keyword_argument" else one["msg"]
            place = ".".join(map(str, one["loc"]))
            givers = [giver for name, giver in (by_hand or {}).items() if f"{place}.".startswith(f"{name}.")]
            place += f" (of {givers[-1]}): " if givers else ": " if place else ""
            problems.append(f"  {place}{said.removeprefix('Value error, ')}")
        fields = ", ".join(f.name for f in dataclasses.fields(kind))
        text = "\n".join(problems)
        raise ConfigError(f"{source} is no valid {kind.__name__}:\n{text}\nfields are: {fields}") from None


def unknown_field(kind: type, place: tuple[int | str, ...]) -> str:
    """Return the message for a field that `kind`, or a configuration inside it, does not have."""
    for name in place[:-1]:
        inner = get_type_hints(kind).get(str(name)) if dataclasses.is_dataclass(kind) else None
        kind = inner if isinstance(inner, type) else object
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    return f"no such field{did_you_mean(str(place[-1]), names)}"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Return the end of a message on an unknown word: the known word that is like it, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def input_paths(config: object) -> list[InputPath]:
    """Return every path that the configuration reads, those inside tuples and nested mappings too."""
    return inputs_in(type(config), config, "")


def inputs_in(kind: Any, value: Any, field: str) -> list[InputPath]:
    """Return the inputs in `value`, which `kind` has checked; `field` is the name that errors give it."""
    origin, parts = get_origin(kind), get_args(kind)
    found: list[tuple[Any, Any, str]] = []
    if value is None or origin is Literal:
        return []
    if origin is Annotated:
        for mark in kind.__metadata__:
            if isinstance(mark, InputKind):
                is_path = isinstance(value, str) and not (mark.or_name and is_relative(value))
                return [InputPath(field, value, mark)] if is_path else []
            if isinstance(mark, SettingsOf):
                return inputs_of_settings(mark, value, field)
        found = [(parts[0], value, field)]
    elif origin in (Union, UnionType):
        is_word = any(get_origin(part) is Literal and value in get_args(part) for part in parts)
        found = [] if is_word else [(part, value, field) for part in parts]
    elif isinstance(value, tuple) and parts:
        found = [(parts[0], one, f"{field}.{place}") for place, one in enumerate(value)]
    elif isinstance(value, Mapping) and parts:
        found = [(parts[1], one, f"{field}.{name}") for name, one in value.items()]
    elif dataclasses.is_dataclass(value):
        hints, names = get_type_hints(kind, include_extras=True), [one.name for one in dataclasses.fields(value)]
        found = [(hints[name], vars(value)[name], f"{field}.{name}".lstrip(".")) for name in names]
    return [one for part in found for one in inputs_in(*part)]


def inputs_of_settings(mark: SettingsOf, settings: Mapping[str, Any], field: str) -> list[InputPath]:
    """Return the inputs in unchecked settings of another configuration; what it would refuse is left to it."""
    hints = get_type_hints(mark.config, include_extras=True)
    found = []
    for name, given in settings.items():
        values = given if mark.listed and isinstance(given, tuple | list) else [given]
        for value in values if name in hints else []:
            try:
                checked = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError:
                continue
            found += inputs_in(hints[name], checked, f"{field}.{name}")
    return found


def override(name: str, value: object) -> str:
    """Return the `name=value` that load_config reads as `value`: JSON, which is YAML too, or a plain word."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml_value(value) == value:
        return f"{name}={value}"
    text = json.dumps(value, ensure_ascii=False)
    return f"{name}=" + re.sub(r"((?:\\\\)*)\$\{", r"\1\1\\\\${", text)  # ${ begins an interpolation of omegaconf


def read_yaml(path: str) -> Any:
    """Return the content of one YAML file; ConfigError where it is missing or not YAML."""
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return OmegaConf.to_container(OmegaConf.create(file.read()))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def id_text(value: object) -> str:
    """Return an id as text. YAML reads ids such as MovieLens's as whole numbers; any other type is a ValueError."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{value!r} is no id: ids are text or whole numbers, anything else in quotes")


def id_texts(value: object) -> object:
    """Return ids as a tuple of texts; a single id becomes a tuple of one."""
    if value is None:
        return value
    return tuple(map(id_text, value if isinstance(value, list | tuple) else (value,)))


Id = Annotated[str, BeforeValidator(id_text, json_schema_input_type=str | int)]

Ids = Annotated[tuple[str, ...], BeforeValidator(id_texts, json_schema_input_type=tuple[str | int, ...] | str | int)]
