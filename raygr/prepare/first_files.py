"""`raygr init`: one's own files -> prepare.yaml, aspects.yaml and pipeline.yaml, in which every line is explained."""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raygr.config import ConfigError
from raygr.files import exists, shipped
from raygr.prepare.first_look import LEAST_KEPT, FirstLook, look_at
from raygr.score.aspects import AspectSet, load_aspects

# Words by which the products of a shipped set's category are known. The set `products` fits anything.
SIGNS = {
    "movies": "movie movies film films dvd blu-ray cinema drama comedy thriller documentary romance horror",
    "games": "game games xbox playstation nintendo multiplayer console controller puzzle",
    "clothing": "shirt dress shoes jacket jeans cotton skirt sweater socks coat pants boots wear hoodie clothing",
    "gift-cards": "gift-card gift-cards giftcard egift voucher",
}
ANYTHING = "products"
LEAST_SHARE = 0.3  # of the products with such a word


class Choice(NamedTuple):
    """A shipped set of aspects, and why it was chosen."""

    name: str
    why: str


def init(reviews: str, metadata: str | None, *, folder: str, columns: Mapping[str, str]) -> str:
    """Write the three files into `folder`; return what was found and chosen, and the next command, as lines of text.

    ConfigError where a file is there already, or where the data leave a question open.
    """
    paths = {
        name: os.path.normpath(os.path.join(folder, f"{name}.yaml")) for name in ("prepare", "aspects", "pipeline")
    }
    there = [path for path in paths.values() if exists(path)]
    if there:
        raise ConfigError(f"{', '.join(there)}: there already; move it away, or name another place: --folder FOLDER")
    for path in (reviews, metadata or reviews):
        if not exists(path):
            raise ConfigError(f"{path}: no such file")
    look = look_at(reviews, metadata or reviews, columns)
    choice = chosen_aspects(look.texts)
    runs = os.path.normpath(os.path.join(folder, "outputs"))
    texts = {
        "prepare": prepare_text(look, reviews, metadata or reviews, runs),
        "aspects": aspects_text(load_aspects(shipped(f"configs/aspects/{choice.name}.yaml")), choice),
        "pipeline": pipeline_text(paths, runs),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        Path(path).write_text(texts[name], encoding="utf-8")
    command = f"raygr pipeline --config {paths['pipeline']}"
    next_lines = [
        f"wrote {', '.join(paths.values())}: read them, they are short",
        f"next: {command} --dry-run   # what it would do",
        f"      {command}",
    ]
    return (
        "\n".join([*look_lines(look, reviews, metadata), f"aspects: {choice.name}, {choice.why}", *next_lines]) + "\n"
    )


def look_lines(look: FirstLook, reviews: str, metadata: str | None) -> list[str]:
    users, items, kept = look.cores[look.core]
    few = kept < LEAST_KEPT * (look.rows - look.repeated)
    both = {*look.columns.values(), *look.item_columns.values()}
    return [
        f"{reviews}: {look.rows:,} rows; " + found(look.columns, look.names, both if metadata is None else ()),
        f"{metadata or reviews}: {len(look.texts):,} items; "
        + found(look.item_columns, look.item_names, look.item_names if metadata is None else ()),
        f"{look.core}-core: {kept:,} interactions of {users:,} users with {items:,} items stay"
        + (f", {kept / look.rows:.0%} of all: few items were bought by several users" if few else ""),
    ]


def found(columns: Mapping[str, str], names: Sequence[str], elsewhere: Collection[str]) -> str:
    """Which column is what, and which are not read, here or as columns of `elsewhere`."""
    unread = [name for name in names if name not in columns.values() and name not in elsewhere]
    told = ", ".join(f"{ours} is {name}" for ours, name in columns.items())
    return told + (f"; not read: {', '.join(unread)}" if unread else "")


# --- aspects -------------------------------------------------------------------------------------


def chosen_aspects(texts: Sequence[str]) -> Choice:
    """Return the shipped set whose signs are in most of the items' texts; `products` where no set's are in enough."""
    words = [set(re.findall(r"[a-z][a-z-]+", text.lower().replace("gift card", "gift-card"))) for text in texts]
    found = {name: sum(bool(one & set(signs.split())) for one in words) for name, signs in SIGNS.items()}
    best = max(found, key=lambda name: found[name])
    if found[best] < LEAST_SHARE * len(texts):
        said = f"words of {best} are in {found[best]:,} of {len(texts):,} items" if found[best] else "no other set"
        return Choice(ANYTHING, f"which fit anything: no set fits the items' words ({said}); better write your own")
    signs = [word for word in SIGNS[best].split() if any(word in one for one in words)]
    return Choice(best, f"because {found[best]:,} of {len(texts):,} items have words such as {', '.join(signs[:3])}")


def aspects_text(aspects: AspectSet, choice: Choice) -> str:
    words = {
        "category": "what the shop sells, as the prompts name it",
        "subject": "one of them",
        "a_subject": "the same with its article",
        "a_critic": "whose part the LLM plays when it rates an item",
        "a_recommender": "and when it rates a user",
        "reviews": "what a user has written, or bought",
    }
    lines = [
        f"# The shipped set `{choice.name}`, {choice.why}.",
        "# Change any word before you score: each change asks the LLM again. `raygr aspects check` finds weak ones.",
        *(f"{name}: {quoted(vars(aspects)[name])}  # {about}" for name, about in words.items()),
        "aspects:  # each is rated from 1 to 10; the description names both ends",
    ]
    for one in aspects.aspects:
        lines += [f"  - name: {quoted(one.name)}", f"    description: {quoted(one.description)}"]
    return "\n".join(lines) + "\n"


# --- settings ------------------------------------------------------------------------------------


def quoted(value: object) -> str:
    """Return a value as YAML."""
    return json.dumps(value, ensure_ascii=False)


def prepare_text(look: FirstLook, reviews: str, metadata: str, runs: str) -> str:
    inner = {ours: name for ours, name in look.item_columns.items() if look.columns.get(ours) != name}
    cores = "; ".join(
        f"{k} leaves {users:,} users, {items:,} items, {kept:,} interactions"
        for k, (users, items, kept) in look.cores.items()
    )
    times = "an order inside each user" if look.timestamps == "position" else "times"
    lines = [
        "# raygr prepare --config FILE: the files -> items, users and interactions with their split.",
        f"output: {quoted(f'{runs}/prepare')}  # the folder of the run",
        f"reviews: [{quoted(reviews)}]  # who had what and when; more files or a pattern may stand here",
        f"metadata: [{quoted(metadata)}]  # what the items are: the LLM reads it",
        "format: table  # columns of any name",
        f"columns: {mapping(look.columns)}  # raygr's name: the file's name",
        *([f"item_columns: {mapping(inner)}  # the same for the metadata"] if inner else []),
        f"timestamps: {look.timestamps}  # {times} such as {look.first_time}",
    ]
    if look.rating_range:
        lines.append(f"rating_range: {quoted(list(look.rating_range))}  # lowest and highest rating found")
    lines += [
        f"keep_duplicate: first  # {look.repeated:,} of {look.rows:,} rows repeat a user and an item; "
        "all: keeps repeat purchases",
        f"min_user_interactions: {look.core}  # k-core: {cores}",
        f"min_item_interactions: {look.core}",
        "split: leave_one_out  # each user's last interaction is the test, the one before it the validation",
    ]
    return "\n".join(lines) + "\n"


def mapping(names: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in names.items()) + "}"


def pipeline_text(paths: Mapping[str, str], runs: str) -> str:
    return f"""\
# raygr pipeline --config FILE: from the files to a report and lists. A stage that is finished is not run again.
stages:
  - prepare: {quoted(paths["prepare"])}  # the settings of a stage, or a file that holds them
  - score:  # an LLM rates each item on each aspect
      output: {quoted(f"{runs}/item-scores")}
      data: {quoted(f"{runs}/prepare")}
      subjects: items
      aspects: {quoted(paths["aspects"])}
      llm: smollm2  # SmolLM2-135M, to try it out: its ratings are weak; better a larger one of the Hugging Face hub
      engine: transformers  # the fastest for a small LLM on processors; vllm is for GPUs
  - train: &base  # SASRec without the LLM: what the others have to beat
      output: {quoted(f"{runs}/train/base")}
      data: {quoted(f"{runs}/prepare")}
      epochs: 100  # at most
      evaluate_every: 2  # epochs
      patience: 10  # evaluations without a better one, then training stops
      seed: 0  # more seeds say more: see docs/training.md
  - train: &guided  # the same with the scores: what a user looks for now, by aspect
      <<: *base
      output: {quoted(f"{runs}/train/guided")}
      item_scores: {quoted(f"{runs}/item-scores")}
  - train:  # a control: the scores of other items, which should gain nothing
      <<: *guided
      output: {quoted(f"{runs}/train/shuffled")}
      control: shuffled
  - compare:  # gains over base, with intervals over users
      output: {quoted(f"{runs}/comparison")}
      arms:
        base: [{quoted(f"{runs}/train/base")}]
        guided: [{quoted(f"{runs}/train/guided")}]
        "guided, shuffled scores": [{quoted(f"{runs}/train/shuffled")}]
  - recommend:  # ten items for each user; recommendations/ holds them as Parquet
      output: {quoted(f"{runs}/lists")}
      train_run: {quoted(f"{runs}/train/guided")}
  - report:  # report.html
      output: {quoted(f"{runs}/report")}
      title: My first report
      data: {quoted(f"{runs}/prepare")}
      comparison: {quoted(f"{runs}/comparison")}
      item_score_run: {quoted(f"{runs}/item-scores")}
"""
