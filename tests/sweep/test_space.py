"""A search space becomes points and train settings, or is refused before anything starts."""

from pathlib import Path

import pytest
from toy_sweep import ASPECTS, settings, trained, write_toy

from raygr.config import ConfigError
from raygr.sweep import stage
from raygr.sweep.space import search_points, with_absolute_paths


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def test_guided_dimensions_become_aspects(toy: Path):
    dimensions = [0, 2, ["length", "pace"], {"random": 2, "subsets": 3}]
    base, first, named, *draws = trained(settings(toy, {"guided_dimension": dimensions}, train={"control": "shuffled"}))
    assert (base.item_scores, base.aspect_names, base.control) == (None, None, "none")
    assert first.aspect_names == ("pace", "tension") and first.control == "shuffled"
    assert named.aspect_names == ("length", "pace")
    assert [len(draw.aspect_names) for draw in draws] == [2, 2, 2]
    places = [[ASPECTS.index(name) for name in draw.aspect_names] for draw in draws]
    assert all(place == sorted(place) for place in places)
    assert len({draw.aspect_names for draw in draws}) > 1
    again = trained(settings(toy, {"guided_dimension": dimensions}, train={"control": "shuffled"}))
    assert [draw.aspect_names for draw in draws] == [draw.aspect_names for draw in again[3:]]
    others = trained(settings(toy, {"guided_dimension": dimensions}, seed=1))
    assert [draw.aspect_names for draw in draws] != [draw.aspect_names for draw in others[3:]]


def test_a_total_width_is_kept_and_none_leaves_the_base_width(toy: Path):
    """Figure 3: learned and guided dimensions together 20, and beside it 16 + k."""
    configs = trained(settings(toy, {"guided_dimension": [0, 2, 4], "total_width": [20, None]}))
    assert [config.base_width for config in configs] == [20, 16, 18, 16, 16, 16]
    added = trained(settings(toy, {"guided_dimension": [4], "total_width": [20]}, train={"fusion": "add"}))
    assert [config.base_width for config in added] == [20]


def test_a_grid_has_every_point_once_and_trials_their_own_folders(toy: Path):
    config = settings(toy, {"model": ["sasrec", "gru4rec"], "guided_weight": [0.5, 2], "seed": [0, 1]})
    points = search_points(config)
    assert [tuple(point.values()) for point in points[:3]] == [
        ("sasrec", 0.5, 0),
        ("sasrec", 0.5, 1),
        ("sasrec", 2, 0),
    ]
    assert len({tuple(point.values()) for point in points}) == 8
    configs = trained(config)
    assert [(one.model, one.guided_weight, one.seed) for one in configs] == [tuple(point.values()) for point in points]
    assert configs[3].output == f"{toy}/sweep/trials/3" and configs[3].threads == 1


def test_trials_in_folders_of_their_own_find_the_data(toy: Path, monkeypatch):
    monkeypatch.chdir(toy)
    train = {"data": "prepare", "item_scores": "scores.csv"}
    config = with_absolute_paths(settings(Path(), {"item_scores": ["scores.csv", None], "seed": [0]}, train=train))
    monkeypatch.chdir("/")
    scored, base = trained(config)
    assert (scored.data, scored.item_scores, base.item_scores) == (f"{toy}/prepare", f"{toy}/scores.csv", None)
    assert scored.output == f"{toy}/sweep/trials/0"


def test_random_points_differ_stay_in_their_ranges_and_repeat_with_the_seed(toy: Path):
    lists = {"guided_weight": [0.5, 1, 2], "seed": [0, 1, 2]}
    points = search_points(settings(toy, lists, search="random", trials=9))
    assert len({tuple(point.values()) for point in points}) == 9
    assert points != search_points(settings(toy, lists))
    ranges = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "base_width": {"low": 8, "high": 12},
        "heads": [1],
    }
    drawn = [search_points(settings(toy, ranges, search="random", trials=50, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    widths = {point["base_width"] for point in drawn[0]}
    rates = [point["learning_rate"] for point in drawn[0]]
    assert widths == {8, 9, 10, 11, 12}
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 < sum(rate < 1e-3 for rate in rates) < 40  # a factor of ten on either side


@pytest.mark.parametrize(
    ("space", "changes", "words"),
    [
        ({}, {}, "space is empty"),
        ({"seed": []}, {}, r"no value \(seed\)"),
        ({"lambda": [1]}, {}, r"cannot be searched.*guided_weight.*guided_dimension.*\(lambda\)"),
        ({"workers": [1, 2]}, {}, r"cannot be searched.*\(workers\)"),
        ({"seed": [0, 1, 0]}, {}, r"same value twice \(seed\)"),
        ({"candidates": [["full"], ["uniform-100"]]}, {}, r"cannot be searched.*\(candidates\)"),
        ({"seed": [["a", "b"]]}, {}, r"(?s)no valid TrainConfig.*seed: Input should be a valid integer"),
        (
            {"guided_dimension": [2]},
            {"train": {"aspect_names": ["pace"]}},
            r"total_width also sets \(aspect_names\)",
        ),
        ({"total_width": [20], "base_width": [16]}, {}, r"or total_width also sets \(base_width\)"),
        ({"dropout": {"low": 0.1, "high": 0.5}}, {}, r"a grid needs lists \(dropout\)"),
        ({"dropout": {"low": 0.5, "high": 0.1}}, {"search": "random", "trials": 2}, r"not below its high.*\(dropout\)"),
        ({"seed": [0]}, {"trials": 3}, "a grid has none"),
        ({"seed": [0]}, {"search": "random"}, "they need it"),
        ({"seed": [0, 1]}, {"search": "random", "trials": 3}, "2 points, fewer than 3"),
        ({"seed": [0]}, {"train": {"output": "x"}}, r"train\.output"),
        ({"guided_dimension": [5]}, {}, "guided_dimension: 5, but .* has 4 aspects: pace, tension, humour, length"),
        ({"guided_dimension": [["fear"]]}, {}, "guided_dimension: fear, but .* has 4 aspects"),
        ({"guided_dimension": [{"random": 5, "subsets": 2}]}, {}, "5 at random, draw 0, but .* has 4 aspects"),
        ({"guided_dimension": [2]}, {"train": {"item_scores": None}}, "2, but no item_scores"),
        ({"guided_dimension": ["three"]}, {}, "'three' is no count"),
        ({"dropout": [0.1, 1.5]}, {}, r"(?s)trial dropout = 1.5 is no valid TrainConfig.*less than 1"),
        ({"guided_weight": [1, -1]}, {}, r"(?s)guided_weight = -1 .*greater than or equal to 0"),
        (
            {"linear_map": [True], "fusion": ["concat", "add"]},
            {},
            r"(?s)fusion = add is no valid .*linear_map: no effect on fusion: add",
        ),
        ({"base_width": [16, 17]}, {}, "base_width = 17: total width 21"),
        ({"total_width": [4]}, {}, r"(?s)total_width = 4 .*base_width"),
        ({"dropout": [0.1, 2.0]}, {"search": "tpe", "trials": 3}, "dropout = 2.0"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_starts(toy: Path, monkeypatch, space, changes, words):
    monkeypatch.setattr(stage, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=words):
        stage.sweep(settings(toy, space, **changes))
    assert not (toy / "sweep").exists()
