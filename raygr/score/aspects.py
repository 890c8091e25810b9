"""The aspects that items and users are scored on, with the words that prompts use for subject and role.

Each category has one YAML file; the shipped files are Tables 6, 7 and 8 of the paper.
"""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, check_config, read_yaml


def check_one_line(text: str) -> str:
    """Return `text`; ValueError where it is empty, has outer spaces or more than one line."""
    if not text or text != text.strip() or len(text.splitlines()) > 1:
        raise ValueError(f"{text!r} must be one line, not empty, without spaces around it")
    return text


def check_name(name: str) -> str:
    # the answer line is "name: <rating>": a second colon would make it ambiguous
    if name.endswith(":"):
        raise ValueError(f"{name!r} must not end with a colon")
    return name


Words = Annotated[str, AfterValidator(check_one_line)]
AspectName = Annotated[Words, AfterValidator(check_name)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Aspect:
    """An interpretable property and its scale from 1 to 10, in the words of the prompt."""

    name: AspectName
    description: Words


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AspectSet:
    """The aspects of one category, in the order of the scores, and the words for subject and role."""

    category: Words
    subject: Words
    """The subject without article: `movie`."""
    a_subject: Words
    """The subject with article: `a movie`."""
    a_critic: Words
    """The LLM's role when it scores items: `a movie critic`."""
    a_recommender: Words
    """The LLM's role when it scores users: `a movie recommender`."""
    reviews: Words
    """The entries of a user's prompt: `movie reviews`."""
    aspects: tuple[Aspect, ...] = Field(min_length=1)

    @field_validator("aspects")
    @classmethod
    def check_unique(cls, aspects: tuple[Aspect, ...]) -> tuple[Aspect, ...]:
        # case, and what joins the words of a name, make no difference in free-text answers
        names = [re.sub(r"[ _-]+", " ", aspect.name.casefold()) for aspect in aspects]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"aspect names must be unique, repeated: {', '.join(repeated)}")
        return aspects

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(aspect.name for aspect in self.aspects)


def load_aspects(path: str) -> AspectSet:
    """Read the aspects of a YAML file (local or any fsspec URI); ConfigError names what is wrong in it."""
    return check_config(AspectSet, read_yaml(path), source=path)
