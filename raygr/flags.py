"""Flags of the command line, one for each field of a configuration, with their help; and JSON schemas for editors.

A flag takes shell words: text as it is, a list as `a,b` or as several words, a mapping as `key=value` words.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import to_json
from yaml import YAMLError

from raygr.config import ConfigError, InputKind, SettingsOf, alternatives, did_you_mean, flag_of, override, yaml_value

TYPE_WORDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", NoneType: "null"}
SECOND_FLAGS = {"new_item_scores": ["--new-items"]}
WITHOUT_FLAG = {"experiment"}  # the word after `raygr reproduce`


class Setting(NamedTuple):
    """A field of a configuration, or of a configuration inside it."""

    name: str
    """As --set takes it: `epochs`, or `requests.api` inside another field."""
    kind: Any
    """Its type, with the marks of raygr.config."""
    field: FieldInfo


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield the fields of a configuration; a field that is a configuration itself gives the fields inside it."""
    hints = get_type_hints(config, include_extras=True)
    for name in [one.name for one in dataclasses.fields(config)]:
        if dataclasses.is_dataclass(hints[name]):
            yield from settings_of(hints[name], f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, hints[name], config.__pydantic_fields__[name])


# --- help ----------------------------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser, config: Any) -> None:
    """Give the parser a flag for each field of the configuration. A flag that is not given leaves no attribute."""
    about = (
        "Names as in --config and --set, with - in place of _; a flag wins over --set, and --set over the file. "
        "Several values are words, or one word with commas."
    )
    group = parser.add_argument_group("settings", about)
    for name, kind, field in settings_of(config):
        if name in WITHOUT_FLAG:
            continue
        flags = [flag_of(name), *SECOND_FLAGS.get(name, [])]
        text = f"{field.description or ''} [{facts(field)}]".replace("%", "%%")
        kinds = [one for one, _ in alternatives(kind)]
        if bool in kinds and set(kinds) <= {bool, NoneType}:
            switch = argparse.BooleanOptionalAction
            group.add_argument(*flags, dest=name, action=switch, default=argparse.SUPPRESS, help=text)
            continue
        many = any(get_origin(one) in (tuple, Mapping) for one in kinds)
        group.add_argument(
            *flags,
            dest=name,
            action="extend" if many else "store",
            nargs="+" if many else None,
            default=argparse.SUPPRESS,
            metavar=type_words(kind),
            help=text,
        )


def facts(field: FieldInfo) -> str:
    """Return range and default, such as `at least 1; default: 60`."""
    limits = [words for mark in field.metadata if (words := limit_words(mark))]
    if field.is_required():
        return "; ".join([*limits, "required"])
    default = field.get_default(call_default_factory=True)
    shown = default if isinstance(default, str) and default else to_json(default).decode()
    return "; ".join([*limits, f"default: {shown}"])


def limit_words(mark: object) -> str:
    match mark:
        case Ge(ge=limit):
            return f"at least {limit}"
        case Gt(gt=limit):
            return f"above {limit}"
        case Le(le=limit):
            return f"at most {limit}"
        case Lt(lt=limit):
            return f"below {limit}"
        case MinLen(min_length=limit):
            return f"length at least {limit}"
        case MaxLen(max_length=limit):
            return f"length at most {limit}"
    return ""


def type_words(kind: Any) -> str:
    """Return a type as the help shows it: INT, {adam,adagrad}, TEXT also for a list of texts, KEY=INT for a mapping."""
    words: list[str] = []
    for one, marks in alternatives(kind):
        inputs = [mark for mark in marks if isinstance(mark, InputKind)]
        inner = get_args(one)
        if get_origin(one) is Literal:
            words.append(f"{{{','.join(map(str, inner))}}}")
        elif get_origin(one) is tuple:
            words.append(type_words(inner[0]))
        elif get_origin(one) is Mapping:
            words.append(f"KEY={type_words(inner[1])}")
        elif inputs and inputs[0].job:
            words += [f"{inputs[0].job.upper()}_RUN", *(["PATH"] if inputs[0].or_other else [])]
        elif any(isinstance(mark, AfterValidator) for mark in marks):
            words.append("PATH")
        elif one is not NoneType:
            words.append(TYPE_WORDS.get(one, "VALUE"))
    return "VALUE" if "VALUE" in words else "|".join(dict.fromkeys(words))


def completion_script(whole: argparse.ArgumentParser, parsers: Iterable[argparse.ArgumentParser], shell: str) -> str:
    """Return the shell's script for the words of `whole`; the flags of its `parsers` also complete values and paths."""
    import shtab

    for action in [action for parser in parsers for action in parser._actions]:
        words = str(action.metavar)
        if re.fullmatch(r"\{.+\}", words):
            action.choices = words[1:-1].split(",")
        elif re.search("FILE|PATH|_RUN", words):
            vars(action)["complete"] = shtab.FILE
    return shtab.complete(whole, shell)


# --- values --------------------------------------------------------------------------------------


def flag_overrides(config: Any, parsed: argparse.Namespace) -> list[str]:
    """Return the settings that flags gave, each as the `name=value` that load_config takes."""
    given = vars(parsed)
    return [
        override(name, flag_value(name, kind, given[name])) for name, kind, _ in settings_of(config) if name in given
    ]


def flag_value(name: str, kind: Any, given: bool | str | list[str]) -> Any:
    """Return what the words of a flag say; ConfigError names the flag where they cannot be read."""
    if isinstance(given, bool):
        return given
    try:
        values = [read_word(kind, word) for word in ([given] if isinstance(given, str) else given)]
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{flag_of(name)}: {error}") from error
    joined = values[0]
    for value in values[1:]:
        if isinstance(joined, dict) and isinstance(value, dict):
            repeated = [key for key in value if isinstance(joined.get(key), list)]
            joined |= value | {key: joined[key] + value[key] for key in repeated}
        else:
            joined = (joined or []) + (value or [])
    return joined


def flag_words(name: str, kind: Any, value: Any) -> list[str]:
    """Return the words that give a field a value, which is as JSON: its flag, or --set where no flag can say it."""
    kinds = [one for one, _ in alternatives(kind)]
    if isinstance(value, bool) and set(kinds) <= {bool, NoneType}:
        return [flag_of(name) if value else flag_of(f"no-{name}")]
    given = [f"{key}={plain(one)}" for key, one in value.items()] if isinstance(value, Mapping) else [plain(value)]
    if isinstance(value, list):
        given = [plain(one) for one in value]
    many = any(get_origin(one) in (tuple, Mapping) for one in kinds)
    try:
        is_read = bool not in kinds and flag_value(name, kind, given if many else given[0]) == value
    except (ConfigError, IndexError):
        is_read = False
    if is_read and not any(word.startswith("-") for word in given):
        return [flag_of(name), *given]
    return ["--set", override(name, value)]


def plain(value: Any) -> str:
    """Return a value as a word: text as it is, the values of a list with commas, all else as JSON."""
    if isinstance(value, list):
        return ",".join(map(plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_word(kind: Any, text: str) -> Any:
    """Return a word as a value of a type; ValueError where a mapping's word is no `key=value`."""
    found = alternatives(kind)
    kinds = [one for one, _ in found]
    if text == "null" and NoneType in kinds:
        return None
    for one, marks in found:
        if get_origin(one) is Mapping and not text.startswith("{"):
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"expected KEY=VALUE, found {text!r}")
            inner = get_args(one)[1]
            for mark in marks:
                if isinstance(mark, SettingsOf) and not mark.listed:
                    inner = get_type_hints(mark.config, include_extras=True).get(key, Any)
            return {key: read_word(inner, value)}
        if get_origin(one) is tuple and str not in kinds and text[:1] not in ("[", "{"):
            return [read_word(get_args(one)[0], part.strip()) for part in text.split(",") if part.strip()]
    if all(one in (str, NoneType) or get_origin(one) is Literal for one in kinds):
        return text
    try:
        value = yaml_value(text)
    except YAMLError:
        if str not in kinds:
            raise
        return text
    return text if str in kinds and isinstance(value, dict | list | None) else value


def json_schema(config: Any, stages: Mapping[str, Any] | None = None) -> str:
    """Return the JSON schema of a configuration, with the text under each field as its description.

    `stages` are the stage names and configurations that the entries of a pipeline file may have.
    """
    schema = TypeAdapter(config).json_schema()
    fields = schema["properties"]
    schema["properties"] = {one.name: fields[one.name] for one in dataclasses.fields(config)}  # as they are declared
    if stages:
        kinds = [(name, "validation", TypeAdapter(kind)) for name, kind in stages.items()]
        entries, definitions = TypeAdapter.json_schemas(kinds)  # type: ignore[arg-type]
        by_name = {name: {"anyOf": [entry, {"type": "string"}]} for (name, _), entry in entries.items()}
        fields["stages"]["items"] = {"type": "object", "properties": by_name, "additionalProperties": False}
        schema |= definitions
    return json.dumps(schema, indent=2)


# --- unknown flags -------------------------------------------------------------------------------


def parse_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse like parser.parse_args, with _ for - in flags too; for an unknown flag, name the one that is like it."""
    parsed, unknown = parser.parse_known_args(
        [re.sub(r"^--[\w.]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    )
    if unknown:
        known = re.findall(r"(?:^  |, )(--[a-z][\w.-]*)", parser.format_help(), re.MULTILINE)
        hints = [did_you_mean(one.partition("=")[0], known) for one in unknown if one[:2] == "--"]
        if {"true", "false"}.intersection(unknown):
            hints.append("; a setting of yes or no takes no value: --NAME or --no-NAME")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
    return parsed
