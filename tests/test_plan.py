"""The plan of a pipeline: states of stages, reasons of refusals, prompts and tokens of LLM stages."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pydantic_core import to_jsonable_python
from toy_data import walks, write_prepared

from raygr import files, pipeline, runs
from raygr.cli import main
from raygr.config import PipelineConfig, check_config
from raygr.pipeline import FINISHED, REFUSED, RESUMED, TO_RUN, StagePlan, checked_stage, plan_stages
from raygr.score.config import ScoreConfig
from raygr.score.store import StoredScore, open_store
from raygr.score.subjects import chosen_prompts, item_prompts, prompt_settings, user_prompt
from raygr.stages import STAGES

ITEMS, USERS, LENGTH = 40, 12, 10  # positions 0..7 are train, 8 validation, 9 test


def write_aspects(path: Path, *, pace: str = "Slow to fast.") -> str:
    words = {"category": "movies", "subject": "movie", "a_subject": "a movie", "a_critic": "a movie critic"}
    words |= {"a_recommender": "a movie recommender", "reviews": "movie reviews"}
    described = [{"name": "pace", "description": pace}, {"name": "wit", "description": "Dull to witty."}]
    path.write_text(yaml.safe_dump(words | {"aspects": described}), encoding="utf-8")
    return str(path)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write_prepared(tmp_path / "prepare", walks(USERS, ITEMS, LENGTH, seed=0), items=ITEMS)
    write_aspects(tmp_path / "aspects.yaml")
    return tmp_path


def planned(*entries: Mapping[str, Any]) -> list[StagePlan]:
    return plan_stages([checked_stage(number, entry) for number, entry in enumerate(entries, start=1)])


def prepare_stage(folder: Path) -> dict[str, Any]:
    (folder / "raw.jsonl").touch()
    return {"prepare": {"output": f"{folder}/made", "reviews": [f"{folder}/raw.jsonl"]}}


def train_stage(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"train": {"output": f"{folder}/train", "data": f"{folder}/made"} | changes}


def score_config(folder: Path, **changes: Any) -> ScoreConfig:
    named = {"output": f"{folder}/scores", "data": f"{folder}/prepare", "aspects": f"{folder}/aspects.yaml"}
    return ScoreConfig(**(named | {"subjects": "items", "store": f"{folder}/store", "mode": "generate"} | changes))


def score_stage(folder: Path, **changes: Any) -> dict[str, Any]:
    config = score_config(folder, **changes)
    names = ("output", "data", "aspects", "subjects", "store", "max_subjects", "mode")
    return {"score": {name: to_jsonable_python(config)[name] for name in names}}


def begin(entry: Mapping[str, Any], inputs: list[str]) -> runs.Run:
    [(job, settings)] = entry.items()
    config = check_config(STAGES[job], settings, source="test")
    run = runs.start_run(config.output, job=job, config=config, inputs=inputs)
    files.write_text("", run.file("epochs.jsonl"))
    return run


def finish(entry: Mapping[str, Any], inputs: list[str]) -> None:
    runs.finish_run(begin(entry, inputs), inputs=inputs, counts={})


# --- states --------------------------------------------------------------------------------------


def test_a_stage_is_finished_unfinished_or_to_run(tmp_path: Path):
    prepare, train, other = (
        prepare_stage(tmp_path),
        train_stage(tmp_path),
        train_stage(tmp_path, output=f"{tmp_path}/b"),
    )
    assert [plan.state for plan in planned(prepare, train, other)] == [TO_RUN] * 3
    finish(prepare, [])
    begin(train, [f"{tmp_path}/made"])
    assert [plan.state for plan in planned(prepare, train, other)] == [FINISHED, RESUMED, TO_RUN]
    finish(train, [f"{tmp_path}/made"])
    assert [plan.state for plan in planned(prepare, train, other)] == [FINISHED, FINISHED, TO_RUN]


@pytest.mark.parametrize("leave", [begin, finish])
def test_another_configuration_is_refused_with_the_field(tmp_path: Path, leave):
    finish(prepare_stage(tmp_path), [])
    leave(train_stage(tmp_path, epochs=3), [])
    plan = planned(prepare_stage(tmp_path), train_stage(tmp_path, epochs=4))[1]
    assert (plan.state, "epochs: 3 -> 4" in plan.note) == (REFUSED, True)


@pytest.mark.parametrize("leave", [begin, finish])
def test_what_changes_no_result_makes_no_other_run(tmp_path: Path, leave):
    leave(prepare_stage(tmp_path), [])
    other = prepare_stage(tmp_path)
    other["prepare"]["parallelism"] = 4
    assert planned(other)[0].state == {begin: RESUMED, finish: FINISHED}[leave]
    other["prepare"]["seed"] = 1
    assert "seed: 0 -> 1" in planned(other)[0].note and "parallelism" not in planned(other)[0].note


def test_a_start_that_wrote_nothing_is_to_run_with_any_configuration(tmp_path: Path):
    config = check_config(STAGES["prepare"], prepare_stage(tmp_path)["prepare"], source="test")
    runs.start_run(config.output, job="prepare", config=config)
    other = prepare_stage(tmp_path)
    other["prepare"]["seed"] = 1
    assert planned(other)[0].state == TO_RUN


def test_a_pipeline_is_refused_where_an_output_holds_somebodys_files(tmp_path: Path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "own.csv").write_text("mine")
    plan = planned(prepare_stage(tmp_path))[0]
    assert (plan.state, "holds files that are not of a run (own.csv)" in plan.note) == (REFUSED, True)
    raw = {"prepare": {"output": f"{tmp_path}/new", "reviews": [f"{tmp_path}/new/raw.jsonl"]}}
    assert "raw.jsonl lies inside the output" in planned(raw)[0].note


@pytest.mark.parametrize("leave", [begin, finish])
def test_a_stage_below_one_that_is_made_anew_is_refused_before_anything_starts(tmp_path: Path, leave, monkeypatch):
    prepare, train = prepare_stage(tmp_path), train_stage(tmp_path)
    finish(prepare, [])
    leave(train, [f"{tmp_path}/made"])
    shutil.rmtree(f"{tmp_path}/made")
    plan = planned(prepare, train)[1]
    assert plan.state == REFUSED
    assert f"from {tmp_path}/made, which stage 1 (prepare) makes anew; rename the folder to redo it" in plan.note
    monkeypatch.setattr(pipeline, "run_stage", lambda config: pytest.fail("a stage was started"))
    with pytest.raises(runs.RunError, match=r"1 of 2 stages are refused, none was started:\s+stage 2 \(train\)"):
        pipeline.pipeline(PipelineConfig(stages=(prepare, train)))
    shutil.rmtree(f"{tmp_path}/train")
    assert [plan.state for plan in planned(prepare, train)] == [TO_RUN, TO_RUN]


@pytest.mark.parametrize("leave", [begin, finish])
def test_a_stage_whose_input_has_changed_is_refused(tmp_path: Path, leave):
    scores = tmp_path / "scores.csv"
    scores.write_text("id,pace\ni1,1\n")
    finish(prepare_stage(tmp_path), [])
    train = train_stage(tmp_path, item_scores=str(scores))
    leave(train, [f"{tmp_path}/made", str(scores)])
    scores.write_text("id,pace\ni1,2\n")
    plan = planned(prepare_stage(tmp_path), train)[1]
    assert (plan.state, f"from other content of {scores};" in plan.note) == (REFUSED, True)


def test_a_file_inside_a_folder_that_is_made_anew_counts_too(tmp_path: Path):
    simulate = {"simulate": {"output": f"{tmp_path}/raw"}}
    train = train_stage(tmp_path, item_scores=f"{tmp_path}/raw/item_scores.csv")
    finish(prepare_stage(tmp_path), [])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "item_scores.csv").write_text("id,pace\ni1,1\n")
    finish(train, [f"{tmp_path}/made", f"{tmp_path}/raw/item_scores.csv"])
    shutil.rmtree(tmp_path / "raw")
    assert [plan.state for plan in planned(simulate, prepare_stage(tmp_path), train)] == [TO_RUN, FINISHED, REFUSED]


def test_an_input_that_nobody_makes_is_refused(tmp_path: Path):
    [plan] = planned(train_stage(tmp_path))
    assert (plan.state, plan.note) == (REFUSED, f"data: {tmp_path}/made is not there, and no earlier stage makes it")
    compare = {"compare": {"output": f"{tmp_path}/table", "arms": {"base": [f"{tmp_path}/train"]}}}
    assert planned(compare)[0].state == REFUSED
    assert [plan.state for plan in planned(prepare_stage(tmp_path), train_stage(tmp_path), compare)] == [TO_RUN] * 3


def stage_of(job: str, folder: Path, field: str, value: Any) -> dict[str, Any]:
    """A stage whose inputs exist, except for one field."""
    there = {name: f"{folder}/{name}.csv" for name in ("items", "users")}
    for path in there.values():
        Path(path).write_text("id,pace\nx,1\n")
    write_aspects(folder / "aspects.yaml")
    data = {"data": f"{folder}/made"}
    settings = {
        "score": data | {"subjects": "users", "aspects": f"{folder}/aspects.yaml"},
        "finetune": data | {"item_scores": there["items"], "aspects": f"{folder}/aspects.yaml"},
        "train": data | {"item_scores": there["items"]},
        "sweep": {"train": data, "space": {"seed": [0, 1]}},
        "recommend": {"train_run": f"{folder}/train"},
        "report": {"title": "", **data},
    }[job]
    return {job: {"output": f"{folder}/new"} | settings | {field: value}}


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ("train", "item_scores"),
        ("train", "list_scores"),
        ("finetune", "teacher"),
        ("finetune", "adapter"),
        ("score", "aspects"),
        ("score", "llm"),
        ("recommend", "histories"),
        ("recommend", "users_file"),
        ("recommend", "mmr_scores"),
        ("report", "comparison"),
        ("report", "item_score_run"),
        ("report", "user_score_run"),
        ("report", "reference_scores"),
    ],
)
def test_a_path_with_a_typo_is_refused_before_anything_starts(tmp_path: Path, job: str, field: str):
    finish(prepare_stage(tmp_path), [])
    finish(train_stage(tmp_path), [])
    changes = {"teacher": {"warm_start_epochs": 1}, "mmr_scores": {"mmr_weight": 0.5}}.get(field, {})
    entry = stage_of(job, tmp_path, field, f"{tmp_path}/typo")
    entry[job] |= changes
    [plan] = planned(entry)
    assert (plan.state, plan.note) == (REFUSED, f"{field}: {tmp_path}/typo is not there, and no earlier stage makes it")


@pytest.mark.parametrize(
    ("job", "field", "value", "place"),
    [
        ("report", "finetune", ["{}/typo"], "finetune.0"),
        ("sweep", "train", {"data": "{}/made", "item_scores": "{}/typo"}, "train.item_scores"),
        ("sweep", "space", {"item_scores": ["{}/items.csv", "{}/typo"]}, "space.item_scores"),
    ],
)
def test_a_typo_inside_a_list_or_in_the_settings_of_trials_is_refused(tmp_path: Path, job, field, value, place):
    finish(prepare_stage(tmp_path), [])
    value = json.loads(json.dumps(value).replace("{}", str(tmp_path)))
    [plan] = planned(stage_of(job, tmp_path, field, value))
    assert (plan.state, plan.note) == (REFUSED, f"{place}: {tmp_path}/typo is not there, and no earlier stage makes it")


def test_raw_files_that_match_nothing_are_refused(tmp_path: Path):
    entry = prepare_stage(tmp_path)
    entry["prepare"]["reviews"] = [f"{tmp_path}/*.jsonl"]
    assert planned(entry)[0].state == TO_RUN
    entry["prepare"]["reviews"] = [f"{tmp_path}/*.csv"]
    assert "reviews.0: " in planned(entry)[0].note


def score_run(folder: Path, name: str, subjects: str) -> None:
    finish({"score": score_stage(folder, output=f"{folder}/{name}", subjects=subjects)["score"]}, [])


def test_a_run_of_the_wrong_kind_is_refused_before_anything_starts(tmp_path: Path):
    finish(prepare_stage(tmp_path), [])
    finish(train_stage(tmp_path), [])
    begin(train_stage(tmp_path, output=f"{tmp_path}/begun"), [])
    score_run(tmp_path, "items", "items")
    wrong = {
        ("train", "data", "train"): "is a run of `train`: name the output of `raygr prepare` here",
        ("train", "item_scores", "train"): "is a run of `train`: name the output of `raygr score` here",
        ("recommend", "train_run", "made"): "is a run of `prepare`: name the output of `raygr train` here",
        ("recommend", "train_run", "begun"): "did not finish there",
        ("report", "user_score_run", "items"): "has scores of items: name scores of users here",
        ("report", "item_score_run", "items.csv"): "holds no run.json",
        ("finetune", "adapter", "made"): "is a run of `prepare`: name the output of `raygr finetune` here",
    }
    for (job, field, name), words in wrong.items():
        [plan] = planned(stage_of(job, tmp_path, field, f"{tmp_path}/{name}"))
        assert plan.state == REFUSED and plan.note.startswith(f"{field}: ") and words in plan.note, plan.note


def test_an_earlier_stage_of_the_wrong_kind_is_refused_too(tmp_path: Path):
    prepare, train = prepare_stage(tmp_path), train_stage(tmp_path)
    again = train_stage(tmp_path, output=f"{tmp_path}/new", item_scores=f"{tmp_path}/train")
    plan = planned(prepare, train, again)[2]
    assert plan.note == f"item_scores: {tmp_path}/train is the output of stage 2 (train): name one of `score` here"
    write_aspects(tmp_path / "aspects.yaml")
    users = {"score": score_stage(tmp_path, data=f"{tmp_path}/made", subjects="users")["score"]}
    plan = planned(prepare, users, train_stage(tmp_path, item_scores=f"{tmp_path}/scores"))[2]
    assert plan.note == "item_scores: stage 2 makes scores of users: name scores of items here"


def test_two_stages_with_one_output_are_refused(tmp_path: Path):
    finish(prepare_stage(tmp_path), [])
    plan = planned(prepare_stage(tmp_path), train_stage(tmp_path), train_stage(tmp_path, seed=1))[2]
    assert (plan.state, plan.note) == (REFUSED, "stage 2 (train) has the same output")


def test_a_job_of_a_cluster_writes_nowhere_in_its_own_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    lost = {"prepare": {"output": "outputs/made", "reviews": [f"{tmp_path}/raw.jsonl"]}}
    assert [plan.state for plan in planned(prepare_stage(tmp_path), lost)] == [TO_RUN, REFUSED]


# --- prompts and tokens --------------------------------------------------------------------------


def all_items(config: ScoreConfig) -> pa.Table:
    return item_prompts(files.read_table(f"{config.data}/items"), settings=prompt_settings(config, config.subjects))


def file_answers(config: ScoreConfig, hashes: list[str]) -> None:
    answer = StoredScore(ratings=(5, 5), expected=(5.0, 5.0), reason="ok", completion="")
    open_store(config, on_gpu=torch.cuda.is_available()).write(hashes, [answer] * len(hashes))


def asked(found: StagePlan) -> tuple[int, int]:
    """Prompts and tokens of a plan's note."""
    numbers = re.search(r": (?:about )?([\d,]+) prompts to ask(?: in each pass)?, ([\d,]+) tokens$", found.note)
    assert numbers, found.note
    return tuple(int(one.replace(",", "")) for one in numbers.groups())


def test_items_are_counted_net_of_the_store(shop: Path, tokenizer):
    config = score_config(shop)
    prompts = all_items(config)
    lengths = prompts["prompt_tokens"].to_pylist()
    [found] = planned(score_stage(shop))
    assert (asked(found), found.state) == ((ITEMS, sum(lengths)), TO_RUN)
    file_answers(config, prompts["prompt_sha256"].to_pylist()[:25])
    assert asked(planned(score_stage(shop))[0]) == (ITEMS - 25, sum(lengths[25:]))


def test_equal_prompts_are_asked_once(shop: Path, tokenizer):
    part = f"{shop}/prepare/items/part-0.parquet"
    items = files.read_table(part)
    titles = pa.array(["the same"] * 3 + items["title"].to_pylist()[3:])
    files.write_table(items.set_column(items.column_names.index("title"), "title", titles), part)
    assert asked(planned(score_stage(shop))[0])[0] == ITEMS - 2


def test_other_words_ask_all_again_and_the_same_words_nothing(shop: Path, tokenizer):
    config = score_config(shop)
    file_answers(config, all_items(config)["prompt_sha256"].to_pylist())
    same = {"score": score_stage(shop, output=f"{shop}/again")["score"]}
    assert planned(same)[0].note == f"{ITEMS} items: 0 prompts to ask, 0 tokens"
    write_aspects(shop / "other.yaml", pace="Slow to very fast.")
    other = score_stage(shop, output=f"{shop}/again", aspects=f"{shop}/other.yaml")
    assert asked(planned(other)[0])[0] == ITEMS


def test_a_subset_of_the_aspects_asks_nothing_and_words_changed_in_place_are_refused(shop: Path, tokenizer):
    score = score_stage(shop)
    finish(score, [f"{shop}/prepare", f"{shop}/aspects.yaml"])
    scores, data = f"{shop}/scores", f"{shop}/prepare"
    train = train_stage(shop, data=data, item_scores=scores, aspect_names=["wit"])
    assert [(plan.state, plan.note) for plan in planned(score, train)] == [(FINISHED, ""), (TO_RUN, "")]
    write_aspects(shop / "aspects.yaml", pace="Slow to very fast.")
    refused = planned(score, train)[0]
    assert (refused.state, f"from other content of {shop}/aspects.yaml;" in refused.note) == (REFUSED, True)


def test_many_subjects_are_estimated_from_some(shop: Path, tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "SAMPLED", 10)
    [found] = planned(score_stage(shop))
    assert found.note.startswith("40 items: about 40 prompts to ask, ")
    assert asked(found)[1] == pytest.approx(sum(all_items(score_config(shop))["prompt_tokens"].to_pylist()), rel=0.02)


def test_users_prompts_are_those_that_scoring_makes(shop: Path, tokenizer):
    config = score_config(shop, subjects="users", max_subjects=7)
    settings = prompt_settings(config, "users")
    reviews = files.read_table(f"{shop}/prepare/reviews")
    reviews = reviews.filter(pa.compute.equal(reviews["split"], "train"))
    items = files.read_table(f"{shop}/prepare/items").sort_by("item_index")
    ids = files.read_table(f"{shop}/prepare/users.parquet")["user_id"].combine_chunks()
    whole = [
        user_prompt(
            reviews.filter(pa.compute.equal(reviews["user_index"], u)), settings=settings, items=items, user_ids=ids
        )
        for u in range(7)
    ]
    sampled = chosen_prompts(config.data, settings, np.arange(7))
    assert sampled.equals(pa.concat_tables(whole))
    found = planned(score_stage(shop, subjects="users", max_subjects=7))[0]
    assert asked(found) == (7, sum(sampled["prompt_tokens"].to_pylist()))


def test_a_server_s_answers_are_told_with_their_price(shop: Path, tokenizer):
    http = {"url": "http://host/v1", "samples": 3, "price_per_million_input": 2.0, "price_per_million_output": 5.0}
    score = score_stage(shop)["score"] | {"engine": "http", "answered_by": "big", "structured": False, "http": http}
    score |= {"temperature": 1.0, "requests": {"max_tokens": 50}}
    tokens = sum(all_items(score_config(shop))["prompt_tokens"].to_pylist())
    cost = (3 * tokens * 2 + 3 * ITEMS * 50 * 5) / 1e6
    words = f"{tokens:,} tokens, at most {3 * ITEMS * 50:,} tokens of answers, at most {cost:.2f} at the given prices"
    assert planned({"score": score})[0].note == f"{ITEMS} items: {ITEMS} prompts to ask, {words}"
    free = score | {"http": {"url": "http://host/v1"}}
    assert planned({"score": free})[0].note.endswith(f", at most {ITEMS * 50:,} tokens of answers")


def finetune_stage(shop: Path, **changes: Any) -> dict[str, Any]:
    named = {"output": f"{shop}/tuned", "data": f"{shop}/prepare", "aspects": f"{shop}/aspects.yaml"}
    small = {"keep_out": 3, "held_out_fraction": 0.25, "completions": 4, "batch_size": 4}
    (shop / "items.csv").write_text("id,pace,wit\ni1,1,2\n")
    named |= small | {"item_scores": f"{shop}/items.csv", "warm_start_epochs": 1, "teacher": "profile"} | changes
    return {"finetune": named}


def test_a_finetune_asks_its_users_in_every_pass(shop: Path, tokenizer):
    found = planned(finetune_stage(shop))[0]
    assert asked(found)[0] == USERS and "in each pass" in found.note


def test_vectors_read_every_item_once(shop: Path, tokenizer):
    settings = {"output": f"{shop}/pca", "data": f"{shop}/prepare", "aspects": f"{shop}/aspects.yaml", "width": 2}
    whole = all_items(score_config(shop))
    assert asked(planned({"vectors": settings})[0]) == (ITEMS, sum(whole["prompt_tokens"].to_pylist()))


def test_before_the_data_are_prepared_nothing_is_counted(shop: Path):
    prepare = prepare_stage(shop)
    score = score_stage(shop, data=f"{shop}/made")
    assert planned(prepare, score)[1].note == "prompts are known after stage 1 (prepare)"


def test_a_budget_that_no_prompt_fits_is_refused_in_the_plan(shop: Path, tokenizer):
    entry = score_stage(shop)
    entry["score"]["max_prompt_tokens"] = 64
    [plan] = planned(entry)
    assert (plan.state, "max_prompt_tokens=64 is too small" in plan.note) == (REFUSED, True)


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_nothing(shop: Path, capsys):
    file = shop / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"stages": [prepare_stage(shop), score_stage(shop, data=f"{shop}/made")]}))
    before = sorted(shop.rglob("*"))
    assert main(["pipeline", "--config", str(file), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f" 1  prepare    to run               {shop}/made",
        f" 2  score      to run               {shop}/scores: prompts are known after stage 1 (prepare)",
    ]
    assert sorted(shop.rglob("*")) == before


def test_a_dry_run_of_a_refused_pipeline_fails_with_every_reason(shop: Path, capsys):
    stages = [train_stage(shop), train_stage(shop, output=f"{shop}/b")]
    (shop / "pipeline.yaml").write_text(yaml.safe_dump({"stages": stages}))
    assert main(["pipeline", "--config", f"{shop}/pipeline.yaml", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.err.count("is not there, and no earlier stage makes it") == said.out.count("  refused  ") == 2


def simulated(folder: Path, *flags: str) -> int:
    return main(["simulate", "--set", f"output={folder}/raw", "--set", "shoppers=20", *flags])


def test_an_identical_finished_stage_is_done_and_another_one_is_made_room_for_by_force(tmp_path: Path, capsys, caplog):
    caplog.set_level("INFO")
    assert simulated(tmp_path) == 0
    before = (tmp_path / "raw/run.json").stat().st_mtime_ns
    assert simulated(tmp_path) == 0
    assert f"already finished: {tmp_path}/raw" in caplog.text
    assert capsys.readouterr().out == f"{tmp_path}/raw\n" * 2
    assert simulated(tmp_path, "--set", "seed=1") == 2
    assert f"{tmp_path}/raw is finished with another configuration (seed: 0 -> 1); rename" in capsys.readouterr().err
    assert (tmp_path / "raw/run.json").stat().st_mtime_ns == before
    assert simulated(tmp_path, "--set", "seed=1", "--force") == 0
    assert simulated(tmp_path, "--force") == 0
    seeds = [runs.read_run(f"{tmp_path}/{name}", job="simulate").config["seed"] for name in ("raw.1", "raw.2", "raw")]
    assert seeds == [0, 1, 0]


def test_force_sets_no_folder_aside_that_is_no_run(tmp_path: Path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "own.csv").write_text("mine")
    assert simulated(tmp_path, "--force") == 2
    assert "holds files that are not of a run (own.csv)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_exported_prompts_replace_no_file(shop: Path, capsys):
    (shop / "requests.jsonl").write_text("mine")
    settings = score_stage(shop)["score"]
    flags = [flag for name, value in settings.items() if value for flag in ("--set", f"{name}={value}")]
    flags += ["--set", "answered_by=gpt", "--set", "structured=false"]
    assert main(["score", *flags, "--export-prompts", f"{shop}/requests.jsonl"]) == 2
    assert "requests.jsonl exists already: export to another file" in capsys.readouterr().err
    assert (shop / "requests.jsonl").read_text() == "mine" and not (shop / "scores").exists()


def test_a_model_that_is_not_there_is_one_message_and_no_trace_of_a_run(shop: Path, capsys):
    (shop / "model").mkdir()
    entry = score_stage(shop)["score"] | {"llm": f"{shop}/model"}
    flags = [flag for name, value in entry.items() if value for flag in ("--set", f"{name}={value}")]
    assert main(["score", *flags]) == 2
    assert f"{shop}/model" in capsys.readouterr().err
    assert not (shop / "scores").exists()
