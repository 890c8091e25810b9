"""The shipped aspects equal the paper's; a user's own YAML is checked."""

import re

import pytest
import yaml

from raygr.config import ConfigError
from raygr.score.aspects import load_aspects

CATEGORIES = ("movies", "clothing", "games")  # Tables 6, 7 and 8, in this order in the paper's text
OWN = {
    "category": "books",
    "subject": "book",
    "a_subject": "a book",
    "a_critic": "a book critic",
    "a_recommender": "a book recommender",
    "reviews": "book reviews",
    "aspects": [{"name": "wit", "description": "How funny it is."}],
}


def write(folder, **changes) -> str:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(OWN | changes), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("table", "category"), list(enumerate(CATEGORIES)))
def test_shipped_aspects_are_the_papers_word_for_word(table, category, shared_data):
    paper = shared_data.parent / "paper.txt"
    if not paper.is_file():
        pytest.skip(f"needs the paper's text in {paper}")
    appendix = paper.read_text(encoding="utf-8").split("Appendix C Prompt Formats")[-1]
    rows = appendix.split("Aspect | Description |\n---|---|\n")[1 + table].split("\n")[:12]
    shipped = [f"{a.name} | {a.description} |" for a in load_aspects(f"configs/aspects/{category}.yaml").aspects]
    assert shipped == rows


@pytest.mark.parametrize("category", CATEGORIES)
def test_shipped_aspects_are_twelve_with_both_ends_of_the_scale(category):
    aspects = load_aspects(f"configs/aspects/{category}.yaml")
    assert aspects.category == category
    assert len(aspects.aspects) == 12
    assert all(re.search(r"\(e\.g\., 1 for .+, 10 for .+\)\.$", a.description) for a in aspects.aspects)


def test_ones_own_aspects_keep_their_order(tmp_path):
    described = [{"name": name, "description": "D."} for name in ("wit", "ambition", "length")]
    assert load_aspects(write(tmp_path, aspects=described)).names == ("wit", "ambition", "length")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"aspects": []}, "aspects"),
        ({"aspects": [{"name": "", "description": "D."}]}, "aspects.0.name"),
        ({"aspects": [{"name": "wit\npace", "description": "D."}]}, "aspects.0.name"),
        ({"aspects": [{"name": "wit:", "description": "D."}]}, "must not end with a colon"),
        ({"aspects": [{"name": "wit", "description": "one\ntwo"}]}, "aspects.0.description"),
        ({"aspects": [{"name": "wit", "description": "D.", "scale": 5}]}, "scale"),
        ({"aspects": [{"name": n, "description": "D."} for n in ("wit", "Wit")]}, "repeated: wit"),
        ({"subject": " book"}, "subject"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, problem):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=re.escape(problem)) as refused:
        load_aspects(path)
    assert path in str(refused.value)
