"""Loads and checks configurations: frozen dataclasses, one in each stage's config.py, checked by pydantic.

`load_config(ScoreConfig, "score.yaml", ["mode=probe"])`: file first, then `--set` values on top.
An unknown name, a wrong type or a value out of range is refused with the field's name.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import fsspec
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from raygr.files import model_place, placed, shipped

STRICT = ConfigDict(extra="forbid")

# A path, made absolute where it is checked, or any fsspec URI; a file that the checkout may have; a model's folder or
# its name. `SPEED` of a class names the fields that change no result: a run may go on with other values of them.
Place = Annotated[str, AfterValidator(placed)]

Shipped = Annotated[str, AfterValidator(shipped)]

Model = Annotated[str, AfterValidator(model_place)]


class ConfigError(Exception):
    """A configuration that was refused, with the file and the field."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PipelineConfig:
    """Stages in their order; each is one job's name with that job's configuration."""

    stages: tuple[Mapping[str, Mapping[str, Any]], ...] = Field(min_length=1)


Config = TypeVar("Config")


def load_config(kind: type[Config], file: str | None, overrides: list[str]) -> Config:
    """The job's configuration from a YAML file with `name=value` overrides on top."""
    values = read_yaml(file) if file else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: settings are name: value, found a list")
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(overrides))
        settings = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{' '.join([file or '', *overrides]).strip()}: {error}") from error
    by_hand = {one.partition("=")[0].split(".")[0] for one in overrides}
    return check_config(kind, settings, source=file or "the command line", by_hand=by_hand if file else ())


def check_config(kind: type[Config], settings: object, *, source: str, by_hand: Collection[str] = ()) -> Config:
    """`settings` as a checked `kind`; ConfigError names the source and every field that is wrong.

    Fields named in `by_hand` come from --set, and not from the source.
    """
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        problems = []
        for one in error.errors():
            origin = " (of --set)" if set(one["loc"][:1]) & set(by_hand) else ""
            said = unknown_field(kind, one["loc"]) if one["type"] == "unexpected_keyword_argument" else one["msg"]
            problems.append(f"  {'.'.join(map(str, one['loc'])) or 'file'}{origin}: {said}")
        fields = ", ".join(f.name for f in dataclasses.fields(kind))
        text = "\n".join(problems)
        raise ConfigError(f"{source} is no valid {kind.__name__}:\n{text}\nfields are: {fields}") from None


def unknown_field(kind: type, place: tuple[int | str, ...]) -> str:
    """What to say of a field that `kind`, or a configuration inside it, lacks."""
    for name in place[:-1]:
        inner = get_type_hints(kind).get(str(name)) if dataclasses.is_dataclass(kind) else None
        kind = inner if isinstance(inner, type) else object
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    close = difflib.get_close_matches(str(place[-1]), names, n=1)
    return f"no such field; did you mean {close[0]}?" if close else "no such field"


def override(name: str, value: object) -> str:
    """The `name=value` that load_config reads as `value`; JSON is YAML, and plain words go without quotes."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
    if plain and OmegaConf.from_dotlist([f"{name}={value}"])[name] == value:
        return f"{name}={value}"
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def read_yaml(path: str) -> Any:
    """The content of one YAML file; ConfigError where it is missing or not YAML."""
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return OmegaConf.to_container(OmegaConf.create(file.read()))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def id_text(value: object) -> str:
    """Whole numbers are ids, as YAML reads those of MovieLens; ValueError for what may have been another id."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{value!r} is no id: ids are text or whole numbers, anything else in quotes")


def id_texts(value: object) -> object:
    """A list of ids; a single one is a list of one."""
    if value is None:
        return value
    return tuple(map(id_text, value if isinstance(value, list | tuple) else (value,)))


Id = Annotated[str, BeforeValidator(id_text)]

Ids = Annotated[tuple[str, ...], BeforeValidator(id_texts)]
