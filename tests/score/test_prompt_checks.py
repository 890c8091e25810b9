"""Checks of prompts: titles alone, different subjects with one prompt, missing text, cut text."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from toy_data import typed, walks, write_prepared

from raygr import files
from raygr.cli import main
from raygr.config import ConfigError
from raygr.schema import ITEM_SCHEMA
from raygr.score.config import ScoreConfig
from raygr.score.prompt_checks import check_prompts, first_difference
from raygr.score.subjects import PromptSettings, chosen_prompts, encoder_of, prompt_settings, subjects_of, whole_texts

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")
WORDS = ["travel", "silk", "baby", "steel", "cheap", "summer", "music", "red"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tokenizer) -> str:
    """A prepare run of ten users with eight reviews each of twelve items."""
    return write_prepared(tmp_path_factory.mktemp("shop") / "prepare", walks(10, 12, 8, seed=0), items=12)


def with_items(folder: Path, rows: list[dict]) -> str:
    """A prepare run whose items have these texts."""
    data = write_prepared(folder, [[1, 2, 3]], items=3)
    empty = dict.fromkeys(("title", "description", "categories", "details"), "")
    rated = {"train_rating": None, "train_rating_count": 0, "all_rating": None, "all_rating_count": 0}
    numbered = [(number, f"i{number}", *(empty | rated | row).values()) for number, row in enumerate(rows, start=1)]
    files.write_table(typed(list(zip(*numbered, strict=True)), ITEM_SCHEMA), f"{data}/items/part-0.parquet")
    return data


def asked(data: str, **changes) -> tuple[pa.Table, PromptSettings]:
    """PROMPT rows of all subjects, and the settings that they were made with."""
    config = ScoreConfig(**{"output": "unused", "data": data, "subjects": "items", "aspects": ASPECTS} | changes)
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    return chosen_prompts(data, settings, subjects_of(data, config.subjects, None)), settings


def test_every_prompt_holds_its_title(tmp_path, tokenizer):
    """40 products with a title and nothing else once had one prompt in probe mode, the default."""
    titles = [f"{WORDS[n % 8]} {WORDS[n // 8]} {n}" for n in range(40)]
    data = with_items(tmp_path / "prepare", [{"title": title} for title in titles])
    prompts, settings = asked(data)
    texts = [encoder_of(settings).tokenizer.decode(ids) for ids in prompts["prompt_ids"].to_pylist()]
    assert all(f"\ntitle: {title}<|im_end|>" in text for title, text in zip(titles, texts, strict=True))
    assert len(set(prompts["prompt_sha256"].to_pylist())) == 40
    counts = check_prompts(prompts, data=data, settings=settings)
    assert (counts["count"], counts["cut_subjects"], counts["share_a_prompt_unlike"]) == (40, 0, 0)


def test_unlike_subjects_with_one_prompt_are_refused_with_their_texts(tmp_path, tokenizer):
    long = "word " * 900
    rows = [{"title": "A"}, *({"title": "B", "description": long + end} for end in ("ends well", "ends badly"))]
    data = with_items(tmp_path / "prepare", rows)
    prompts, settings = asked(data)
    expected = r"2 of 3 items share a prompt .* i2 and i3 \(description: well / badly\) \(raise max_prompt_tokens"
    with pytest.raises(ConfigError, match=expected):
        check_prompts(prompts, data=data, settings=settings)
    prompts, settings = asked(data, max_prompt_tokens=2048)
    assert check_prompts(prompts, data=data, settings=settings)["share_a_prompt_unlike"] == 0


def test_few_that_the_budget_made_alike_are_warned_of(tmp_path, tokenizer, caplog):
    long = "word " * 900
    rows = [{"title": f"T{n}"} for n in range(298)] + [{"title": "B", "details": long + end} for end in ("x", "y")]
    data = with_items(tmp_path / "prepare", rows)
    prompts, settings = asked(data)
    with caplog.at_level(logging.WARNING):
        assert check_prompts(prompts, data=data, settings=settings)["share_a_prompt_unlike"] == 2
    assert "2 of 300 items share a prompt" in caplog.text


def test_a_tokenizer_that_tells_titles_not_apart_is_refused(tmp_path, tokenizer):
    data = with_items(tmp_path / "prepare", [{"title": "電影"}, {"title": "音樂"}])
    prompts, settings = asked(data)
    # as if every character were unknown to the tokenizer
    alike = prompts.set_column(prompts.column_names.index("prompt_sha256"), "prompt_sha256", pa.array(["same", "same"]))
    with pytest.raises(ConfigError, match=r"i1 and i2 \(title: 電影 / 音樂\) \(the model's tokenizer"):
        check_prompts(alike, data=data, settings=settings)


def test_identical_duplicates_are_asked_once_without_a_word(tmp_path, tokenizer, caplog):
    data = with_items(tmp_path / "prepare", [{"title": "A"}, {"title": " A "}])
    prompts, settings = asked(data)
    assert check_prompts(prompts, data=data, settings=settings)["share_a_prompt_unlike"] == 0
    assert not caplog.records


def test_items_without_any_text_are_counted_and_a_catalogue_of_them_refused(tmp_path, tokenizer, caplog):
    rated = {"train_rating": 4.0, "train_rating_count": 3}
    data = with_items(tmp_path / "some", [{"title": "A"}, rated, {"title": " "}])
    prompts, settings = asked(data)
    assert check_prompts(prompts, data=data, settings=settings)["without_text"] == 2
    assert "2 of 3 items have no text" in caplog.text
    data = with_items(tmp_path / "all", [rated, {}])
    prompts, settings = asked(data)
    with pytest.raises(ConfigError, match="none of the 2 items has any text"):
        check_prompts(prompts, data=data, settings=settings)


def test_cut_text_is_counted_and_warned_of(tmp_path, tokenizer, caplog):
    data = with_items(tmp_path / "prepare", [{"title": "A"}, {"title": "B", "details": "word " * 1000}])
    prompts, settings = asked(data)
    counts = check_prompts(prompts, data=data, settings=settings)
    assert (counts["cut_subjects"], counts["cut_subjects_share"]) == (1, 0.5)
    kept = sum(prompts["prompt_tokens"].to_pylist()) - sum(prompts["shared_tokens"].to_pylist())
    lost = prompts["cut_tokens"].to_pylist()[1]
    assert counts["cut_tokens_share"] == pytest.approx(lost / (lost + kept))
    assert prompts["cut_from"].to_pylist() == ["", f"details {lost}"]
    assert "max_prompt_tokens=1024 cut the text of 1 of 2 items (50.0%)" in caplog.text


def test_left_out_reviews_are_counted_and_warned_of(shop, caplog):
    prompts, settings = asked(shop, subjects="users", max_prompt_tokens=745)
    counts = check_prompts(prompts, data=shop, settings=settings)
    assert counts["reviews_used"] + counts["reviews_left_out"] == 60  # all train reviews
    assert 0 < counts["reviews_left_out"] == pc.sum(prompts["reviews_left_out"]).as_py()
    assert f"left out the oldest reviews of 10 of 10 users: {counts['reviews_left_out']} of 60 reviews" in caplog.text


def test_an_earlier_cutoff_shows_the_first_part_and_says_so(shop):
    """Six of eight interactions are train: half of them are positions 0 to 2, whose words the prompt has."""
    prompts, settings = asked(shop, subjects="users", cutoff_fraction=0.5)
    assert prompts["cutoff_position"].to_pylist() == [2] * 10
    for user, ids in enumerate(prompts["prompt_ids"].to_pylist()):
        text = encoder_of(settings).tokenizer.decode(ids)
        assert [at for at in range(8) if f"words of u{user} at {at}\n" in text + "\n"] == [0, 1, 2]
    with pytest.raises(ValueError, match="cutoff_fraction: no effect on subjects: items"):
        ScoreConfig(output="o", data=shop, subjects="items", aspects=ASPECTS, cutoff_fraction=0.5)


def test_the_texts_of_users_are_read_in_the_order_asked_for(shop):
    _, settings = asked(shop, subjects="users")
    first, second = whole_texts(shop, settings, ["u7", "u2"])
    assert "words of u7 at 0" in first and "words of u2 at 5" in second


def test_two_texts_part_in_a_named_line():
    assert first_difference("title: A\nrating: 4.0", "title: A\nrating: 4.5") == "rating: 0 / 5"
    assert first_difference("title: A", "title: A\ndetails: x") == "title: nothing more / details: x"


@pytest.mark.parametrize("subjects", ["items", "users"])
def test_prompts_are_shown_whole_and_nothing_is_written(shop, subjects, tmp_path, capsys):
    settings = {"output": tmp_path / "run", "data": shop, "subjects": subjects, "aspects": ASPECTS}
    settings |= {"max_prompt_tokens": 745}
    flags = [flag for name, value in settings.items() for flag in ("--set", f"{name}={value}")]
    assert main(["score", *flags, "--show-prompts", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("<|im_start|>system\nYou are ") == shown.count("<|im_start|>assistant\n") == 3
    if subjects == "items":
        assert "=== i3: " in shown and "title: title 3<|im_end|>" in shown and "no field cut" in shown
    else:
        assert "older reviews left out" in shown and "words of u2 at 5" in shown
    assert not (tmp_path / "run").exists()
