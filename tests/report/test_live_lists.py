"""The lists that the page steers: its numbers rank as the recommender does."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runs import HOSTILE, HOSTILE_USER, LIVE_ASPECTS, prepare_record, trained, with_titles

from raygr import runs
from raygr.config import ConfigError
from raygr.recommend.recommender import Recommender, load_recommender
from raygr.report import live_lists as live_module
from raygr.report.config import ReportConfig
from raygr.report.live_lists import can_steer, first_list, kept_items, live_lists, reasons, unpacked
from raygr.report.stage import report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    trained(folder)
    with_titles(folder / "prepare", {f"i{i}": f"{HOSTILE} {i}" for i in range(1, 30)} | {"i30": ""})
    return folder


@pytest.fixture(scope="module")
def recommender(folder: Path) -> Recommender:
    return load_recommender(str(folder / "train"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    data = prepare_record(folder)
    config = ReportConfig(output=str(folder / "report"), title="t", data=data, train_run=str(folder / "train"))
    return Path(report(config).path, "report.html")


def test_a_report_on_one_run_asks_whether_its_explanations_are_true(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "Can the explanations be trusted?" in text and "rank without the strongest" in text


def embedded(page: Path) -> dict:
    return json.loads(re.findall(r'id="live-data">(.*?)</script>', page.read_text(encoding="utf-8"))[0])


def ranked(live: dict, user: int, moves_A: np.ndarray) -> list[str]:
    """The list of the embedded numbers, as the page's script ranks."""
    scores_I = unpacked(live["scores"], len(live["items"]))[user].astype(float)
    scores_I = scores_I + unpacked(live["standard"], len(live["aspects"])) @ moves_A
    order = [one for one in np.argsort(-scores_I, kind="stable") if not np.isnan(scores_I[one])]
    return [live["items"][one]["id"] for one in order[: live["length"]]]


@pytest.mark.parametrize("move", [0.0, 1.5, -2.0])
def test_the_embedded_numbers_rank_as_the_recommender_does(page: Path, recommender: Recommender, move: float):
    live = embedded(page)
    assert len(live["users"]) == 14 and live["aspects"] == LIVE_ASPECTS
    for number, user in enumerate(live["users"]):
        wanted = recommender.recommend(user["id"], 10, steer={LIVE_ASPECTS[1]: move} if move else None)
        assert ranked(live, number, np.array([0.0, move])) == [one.item_id for one in wanted]
        assert user["looks_for"] == pytest.approx(list(recommender.looks_for(user["id"]).values()), abs=1e-4)


def test_steering_changes_the_list(page: Path):
    live = embedded(page)
    assert ranked(live, 0, np.zeros(2)) != ranked(live, 0, np.array([1.5, 0.0]))


def test_the_first_list_has_titles_and_the_aspects_that_speak_for_its_items(recommender: Recommender):
    table = first_list(live_lists(recommender, {"i1": "One"}))
    wanted = [one.item_id for one in recommender.recommend(HOSTILE_USER, 10)]
    assert [row[1].replace("One", "i1") for row in table.rows] == wanted
    index = recommender.index_of_item[wanted[0]]
    parts = recommender.split_scores(recommender.histories_of(HOSTILE_USER), torch.tensor([index]))
    _, _, spread_1 = recommender.score_and_rank(recommender.histories_of(HOSTILE_USER), index)
    assert table.rows[0][2] == reasons(LIVE_ASPECTS, parts.user_BCA[0, 0].numpy(), 0.05 * float(spread_1))
    assert reasons(["a", "b", "c", "d"], np.array([0.2, 0.5, 0.004, -1]), 0.01) == "b +0.50, a +0.20"
    assert reasons(["a", "b", "c", "d"], np.array([0.2, 0.5, 0.004, -1]), 0.3) == "b +0.50"
    assert reasons(["a"], np.array([0.004]), 0.01) == "no aspect speaks for it"


def test_text_of_the_data_stays_text(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script") == 2  # the data, and the page's own script
    assert "<!--" not in re.findall(r'id="live-data">(.*?)</script>', text)[0] and "alert(2)</script" not in text
    assert html.escape(HOSTILE, quote=False).replace("'", "&#39;") in text
    live = embedded(page)
    assert live["users"][0]["id"] == HOSTILE_USER and live["items"][0]["title"] == f"{HOSTILE} 1"
    assert live["items"][29]["title"] == "i30"  # an id stands in for no title


def test_items_beyond_the_limit_are_left_out_and_no_unmoved_list_changes(recommender, monkeypatch):
    monkeypatch.setattr(live_module, "LIVE_ITEMS", 12)
    monkeypatch.setattr(live_module, "LIVE_USERS", 1)
    live = live_lists(recommender, {})
    assert len(live["items"]) == 12 and len(live["users"]) == 1
    assert ranked(live, 0, np.zeros(2)) == [one.item_id for one in recommender.recommend(HOSTILE_USER, 10)]
    scores_UI = np.array([[3.0, 1, 2, np.nan, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    monkeypatch.setattr(live_module, "KEPT_OF_A_USER", 2)
    monkeypatch.setattr(live_module, "LIVE_ITEMS", 3)
    assert kept_items(scores_UI, np.array([4, 4, 1])).tolist() == [0, 2, 3]  # the best two, and the most bought


def test_a_run_that_cannot_be_steered_is_refused(folder: Path, recommender: Recommender, tmp_path: Path):
    settings = vars(recommender.config)
    assert can_steer(str(folder / "train"), settings) and not can_steer(str(tmp_path), settings)
    assert not can_steer(str(folder / "train"), settings | {"user_side": "off"})
    assert not can_steer(str(folder / "train"), settings | {"item_scores": None})
    base = runs.Run(str(tmp_path / "base"), "train", {"output": "b", "data": "d"}, started=0.0)
    runs.finish_run(base, inputs=[], counts={})
    config = ReportConfig(output=str(tmp_path / "r"), title="t", data=str(folder / "prepare"), train_run=base.path)
    with pytest.raises(ConfigError, match="no guided user state"):
        report(config)
