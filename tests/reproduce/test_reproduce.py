"""The paper's experiments: their runs, what is skipped and refused, tables and figures, and the paper's own numbers.

Most tests train with a stand-in whose ranks are known; one runs the command on toy data.
"""

import csv
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic_core import to_jsonable_python
from toy_data import RUN_METRICS, cycles, random_scores, write_csv, write_prepared

from raygr import cli, files, runs
from raygr.config import ConfigError, check_config, load_config
from raygr.metrics.ranking import METRICS as METRIC_NAMES
from raygr.reproduce.config import EXPERIMENTS, ReproduceConfig
from raygr.reproduce.experiments import arms_of, source_stages, trainings_of, twins_of, with_sources
from raygr.reproduce.paper_tables import read_paper
from raygr.reproduce.stage import reproduce
from raygr.schema import METRICS, RANK_SCHEMA, RANKS
from raygr.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
ASPECTS = ["pace", "tension", "realism"]
ITEMS = 120  # 100 candidates besides a user's own eight


def toy_ranks(config: TrainConfig, candidates: str) -> list[float]:
    """Two users. Base: 2 and 4 (sampled: 1 and 2); refined: 1 and 4 (1 and 1); wider bases are worse by their tens.

    Shuffled scores do as the base.
    """
    is_refined = config.item_scores is not None and config.control != "shuffled"
    if candidates != "full":
        return [1, 1 if is_refined else 2]
    return [1 if is_refined else config.base_width // 10, 4]


def stand_in_train(config: TrainConfig) -> runs.Run:
    """A finished train run with `toy_ranks`."""
    run = runs.start_run(config.output, job="train", config=config)
    rows = [
        (user, 9, True, "test", name, 1, rank, 50)
        for name in config.candidates
        for user, rank in enumerate(toy_ranks(config, name))
    ]
    columns = dict(zip(RANK_SCHEMA.names, zip(*rows, strict=True), strict=True))
    files.write_table(pa.table(columns).cast(RANK_SCHEMA), run.file(RANKS))
    protocol = {"split": "leave_one_out", "candidates": list(config.candidates), "data": "abc"}
    record = RUN_METRICS | {"protocol": protocol, "parameters": 100, "best_epoch": 3, "epochs": 4}
    record["test"] = {}
    files.write_json(record, run.file(METRICS))
    counts = {"interactions": 24, "items": ITEMS, "test_targets": 2}
    runs.finish_run(run, inputs=[config.data], counts=counts)
    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The outputs that the stand-in was asked to fill, in order."""
    asked = []

    def train(config: TrainConfig, **placed: Any) -> runs.Run:
        asked.append(Path(config.output).name)
        return stand_in_train(config)

    monkeypatch.setattr("raygr.train.stage.train", train)
    return asked


def settings(folder: Path, experiment: str = "table-3", **changes: Any) -> ReproduceConfig:
    """SASRec of base width 20 against 17 + 3, two seeds."""
    if not (folder / "prepare").exists():
        write_prepared(folder / "prepare", cycles(20, ITEMS, 8), items=ITEMS)
        scores_IA = random_scores(ITEMS, len(ASPECTS), seed=0)
        write_csv(folder / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
        train = "output: unused\ndata: unused\nmodel: sasrec\nbase_width: 20\nheads: 1\nepochs: 2\nmax_history: 8\n"
        (folder / "train-sasrec.yaml").write_text(train, encoding="utf-8")
    values = {
        "experiment": experiment,
        "output": str(folder / experiment),
        "runs": str(folder / "runs"),
        "data": str(folder / "prepare"),
        "item_scores": str(folder / "scores.csv"),
        "user_scores": "profile",
        "recommenders": {"SASRec": str(folder / "train-sasrec.yaml")},
        "protocol": {"SASRec": "uniform-100", "GRU4Rec": "full"},
        "refined": {"fusion": "concat", "base_width": 17},
        "seeds": (0, 1),
        "paper": str(ROOT / "configs/paper/table-3.csv"),
    }
    return check_config(ReproduceConfig, values | changes, source="the test")


def read_csv(run: runs.Run, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(run.file(name)).read_text(encoding="utf-8").splitlines()))


# --- the paper's numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["table-2", "table-3", "table-4", "table-5"])
def test_the_papers_improvements_follow_from_its_columns(table: str):
    """Each printed improvement lies between those of the least and the greatest values that round to its columns."""
    paper = read_paper(str(ROOT / f"configs/paper/{table}.csv"))
    assert len(paper) == 4 * len(METRIC_NAMES)
    for key, numbers in paper.items():
        base, refined, improvement = map(float, numbers)
        lowest = 100 * ((refined - 5e-5) / (base + 5e-5) - 1) - 0.005
        highest = 100 * ((refined + 5e-5) / (base - 5e-5) - 1) + 0.005
        assert lowest <= improvement <= highest, key


def test_the_papers_tables_agree_with_each_other_and_with_their_metrics():
    """Table 5 repeats Table 3's columns; recall grows with k, and NDCG lies between Recall@1 and Recall@k."""
    third, fifth = (read_paper(str(ROOT / f"configs/paper/table-{n}.csv")) for n in (3, 5))
    for recommender, metric in itertools.product(("GRU4Rec+", "SASRec"), METRIC_NAMES):
        assert fifth[recommender, "refined (base)", metric] == third[recommender, "refined", metric]
        assert fifth[recommender, "refined (cls)", metric].base == third[recommender, "refined", metric].base
    for table in ("table-2", "table-3", "table-4"):
        paper = read_paper(str(ROOT / f"configs/paper/{table}.csv"))
        for recommender, column in itertools.product(("GRU4Rec", "GRU4Rec+", "SASRec", "BERT4Rec"), (0, 1)):
            found = {metric: float(paper[recommender, "refined", metric][column]) for metric in METRIC_NAMES}
            assert found["recall_at_1"] < found["recall_at_5"] < found["recall_at_10"] < found["recall_at_20"]
            for k in (5, 10, 20):
                assert found["recall_at_1"] < found[f"ndcg_at_{k}"] < found[f"recall_at_{k}"]


def test_the_papers_rows_in_its_text(shared_data: Path):
    """Table 4's NDCG@10, as the paper's text has it."""
    text = (shared_data.parent / "paper.txt").read_text(encoding="utf-8")
    paper = read_paper(str(ROOT / "configs/paper/table-4.csv"))
    found = [paper[name, "refined", "ndcg_at_10"] for name in ("GRU4Rec", "GRU4Rec+", "SASRec", "BERT4Rec")]
    row = " | ".join(f"{one.base} | {one.refined} | {one.improvement}%" for one in found)
    assert f"NDCG@10 | {row} |" in text


# --- runs ---------------------------------------------------------------------------------------


def test_every_experiment_of_the_paper_has_its_runs():
    """Runs per recommender and seed: base and refined; Figure 4 has eight bases, Figure 6 five lambdas."""
    counts = {"table-2": 2, "table-3": 2, "table-4": 2, "table-5": 3, "figure-4": 9, "figure-6": 6}
    for name, expected in counts.items():
        config = load_config(ReproduceConfig, str(ROOT / f"configs/paper/{name}.yaml"), [])
        assert len(trainings_of(arms_of(with_sources(config)))) == expected * 5 * len(config.recommenders), name
    assert {*counts, "figure-3"} == set(EXPERIMENTS)


def test_runs_are_shared_between_experiments_and_an_interrupted_one_goes_on(tmp_path: Path, monkeypatch, trained):
    first = settings(tmp_path)
    broken = iter([stand_in_train, stand_in_train])

    def breaks_in_the_third(config: TrainConfig, **placed: Any) -> runs.Run:
        return next(broken, stopped)(config)

    def stopped(config: TrainConfig) -> runs.Run:
        raise RuntimeError(f"stopped before {config.output}")

    with monkeypatch.context() as patch:
        patch.setattr("raygr.train.stage.train", breaks_in_the_third)
        with pytest.raises(RuntimeError, match="sasrec-refined-17-weight-1-users-profile-seed-0"):
            reproduce(first)
    assert not runs.is_finished(first.output)
    reproduce(first)
    refined = [f"sasrec-refined-17-weight-1-users-profile-seed-{seed}" for seed in (0, 1)]
    assert trained == refined
    reproduce(settings(tmp_path, "figure-6", guided_weights=(0.5, 1.0)))
    assert trained == [*refined, *(name.replace("weight-1", "weight-0.5") for name in refined)]
    with pytest.raises(runs.RunError, match="is a finished run"):
        reproduce(first)


def test_runs_of_other_settings_are_never_taken(tmp_path: Path, trained: list[str]):
    reproduce(settings(tmp_path))
    with pytest.raises(runs.RunError, match=r"finished with another configuration .*epochs: 2 -> 3"):
        reproduce(settings(tmp_path, output=str(tmp_path / "other"), train={"epochs": 3}))


def test_guided_widths_take_the_first_scores(tmp_path: Path):
    config = settings(tmp_path, "figure-3", guided_widths=(1, 3))
    arms = arms_of(with_sources(config))
    found = {arm.name: (arm.runs[0].base_width, arm.runs[0].aspect_names) for arm in arms}
    assert found == {
        "SASRec base": (20, None),
        "SASRec 19 + 1": (19, ("pace",)),
        "SASRec 17 + 1": (17, ("pace",)),
        "SASRec 17 + 3": (17, None),
    }
    points = [(arm.curve, arm.value, arm.name) for arm in arms if arm.base]
    assert points == [
        ("total width 20", 1, "SASRec 19 + 1"),
        ("base width 17", 1, "SASRec 17 + 1"),
        ("total width 20", 3, "SASRec 17 + 3"),
        ("base width 17", 3, "SASRec 17 + 3"),
    ]
    with pytest.raises(ConfigError, match=r"guided_widths: 12 of 3 scores \(pace, tension, realism\)"):
        arms_of(settings(tmp_path, "figure-3"))


def test_a_named_list_of_aspects_is_what_guided_widths_count(tmp_path: Path):
    refined = {"fusion": "concat", "base_width": 18, "aspect_names": ["realism", "pace"]}
    config = settings(tmp_path, "figure-3", guided_widths=(1, 2), refined=refined)
    found = {arm.name: arm.runs[0].aspect_names for arm in arms_of(config) if arm.base}
    assert [*found.values()] == [("realism",), ("realism",), ("realism", "pace")]


# --- what comes before the training -------------------------------------------------------------


def open_settings(folder: Path, experiment: str, **changes: Any) -> ReproduceConfig:
    """A configuration that leaves every result to the paper's stages."""
    stages = {
        "prepare": "prepare.yaml",
        "item_scores": "score.yaml",
        "teacher": "score-teacher.yaml",
        "finetune": "finetune.yaml",
        "user_scores": "score-users.yaml",
    }
    places = {name: str(ROOT / "configs/paper/movies" / file) for name, file in stages.items()}
    left = {"data": None, "item_scores": None, "user_scores": "llm", "stage_files": places}
    return settings(folder, experiment, **left | changes)


def test_stages_that_are_left_open_feed_each_other(tmp_path: Path):
    config = open_settings(tmp_path, "table-5")
    stages = source_stages(config)
    assert [(job, Path(stage.output).name) for job, stage in stages] == [
        ("prepare", "prepare"),
        ("score", "item-scores"),
        ("score", "teacher"),
        ("finetune", "finetune"),
        ("score", "user-scores"),
        ("finetune", "finetune-classification"),
        ("score", "user-scores-classification"),
    ]
    folder = str(tmp_path / "runs")
    configs = [stage for _, stage in stages]
    assert {stage.data for stage in configs[1:]} == {f"{folder}/prepare"}
    for tuned, scored, task in ((configs[3], configs[4], "base"), (configs[5], configs[6], "classification")):
        assert (tuned.task, tuned.item_scores, tuned.teacher) == (task, f"{folder}/item-scores", f"{folder}/teacher")
        assert scored.adapter == tuned.output
    arms = arms_of(with_sources(config))
    assert [arm.runs[0].user_score_run for arm in arms] == [None, configs[4].output, configs[6].output]


def test_table_5_has_further_arms_behind_the_papers_two(tmp_path: Path):
    arms = {"items only": {"user_scores": "none", "user_score_run": None}, "bare": {"user_score_run": "bare-scores"}}
    twins = {"refined (cls)": "items only", "bare": "items only"}
    config = open_settings(tmp_path, "table-5", extra_arms=arms, twins=twins)
    made = with_sources(config)
    found = {arm.name: arm.runs[0].user_score_run for arm in arms_of(made)}
    assert found == {
        "SASRec base": None,
        "SASRec refined (base)": made.user_score_run,
        "SASRec refined (cls)": made.classification_scores,
        "SASRec items only": None,
        "SASRec bare": str(Path("bare-scores").absolute()),
    }
    assert twins_of(config) == {"SASRec refined (cls)": "SASRec items only", "SASRec bare": "SASRec items only"}
    with pytest.raises(ConfigError, match=r"twins: refined and bare must be two of refined \(base\), refined \(cls\)"):
        open_settings(tmp_path, "table-5", extra_arms=arms, twins={"refined": "bare"})


def test_what_is_given_is_not_made(tmp_path: Path):
    config = open_settings(tmp_path, "table-3", data="mine", user_scores="profile")
    [(job, stage)] = source_stages(config)
    assert (job, stage.data, stage.subjects) == ("score", str(Path("mine").absolute()), "items")
    with pytest.raises(
        ConfigError, match=r"stage_files\.item_scores: name the YAML .*, or set what it makes: .*item_scores"
    ):
        source_stages(settings(tmp_path, item_scores=None))


def test_wrong_settings_are_refused_before_anything_runs(tmp_path: Path, trained: list[str]):
    for changes, message in [
        ({"protocol": {"GRU4Rec": "full"}}, "protocol names no candidates for SASRec"),
        ({"refined": {"fusion": "concat", "base_widht": 17}}, "base_widht: no such field"),
        ({"refined": {"linear_map": True}}, "linear_map: no effect on fusion: none"),
        ({"train": {"item_scores": "a.csv"}}, "item_scores belong to reproduce"),
        ({"train": {"targets": ["every"]}}, "targets: last"),
        ({"experiment": "table-5"}, "two adapters"),
        (
            {"experiment": "figure-6", "extra_arms": {"add": {"fusion": "add"}}},
            "extra_arms are for table-2, .*, table-5",
        ),
        ({"extra_arms": {"refined": {"fusion": "add"}}}, "names that begin with base or refined"),
        ({"extra_arms": {"Base 20": {"fusion": "add"}}}, "Base 20: names that begin with base"),
        ({"extra_arms": {"add, a": {}, "add a": {}}}, "add, a: another arm would have the same folders"),
        ({"twins": {"refined": "shuffled"}}, "twins: refined and shuffled must be two of refined"),
        ({"paper": str(tmp_path / "scores.csv")}, "has the columns"),
    ]:
        with pytest.raises(ConfigError, match=message):
            reproduce(settings(tmp_path, **changes))
    assert not trained and not (tmp_path / "table-3").exists()


def test_a_missing_input_of_any_arm_is_refused_before_anything_is_written(tmp_path: Path, trained: list[str]):
    config = settings(tmp_path, extra_arms={"text": {"item_scores": str(tmp_path / "text.csv")}})
    with pytest.raises(runs.RunError, match=r"sasrec-text-seed-0: item_scores: .*text\.csv is not there"):
        reproduce(config)
    assert not trained and not Path(config.output).exists()


def test_an_arm_that_cannot_be_trained_stops_all_before_the_first(tmp_path: Path, trained: list[str]):
    for changes, message in [
        ({"train": {"heads": 4}, "refined": {"fusion": "concat", "base_width": 18}}, "total width 21 .* heads 4"),
        ({"refined": {"fusion": "concat", "base_width": 18, "aspect_names": ["pase"]}}, "no aspect pase"),
    ]:
        with pytest.raises((ConfigError, ValueError), match=message):
            reproduce(settings(tmp_path, output=str(tmp_path / message), **changes))
    assert not trained


# --- tables and figures -------------------------------------------------------------------------


def test_a_table_by_hand_under_every_protocol(tmp_path: Path, trained: list[str]):
    """MRR, full: (1/2 + 1/4) / 2 to (1 + 1/4) / 2; sampled: (1 + 1/2) / 2 to 1. The paper has SASRec sampled."""
    run = reproduce(settings(tmp_path))
    text = Path(run.file("table-3.md")).read_text(encoding="utf-8")
    papers, full = text[text.index("## The paper's protocols") :].split("## One protocol: full")
    [mrr] = [line for line in papers.splitlines() if "| MRR |" in line]
    assert mrr.startswith("| SASRec | MRR | 0.7500 | 1.0000 | +33.3% [")
    assert mrr.endswith("| 0.1939 | 0.2140 | +10.38% |")
    assert "| SASRec | MRR | 0.3750 | 0.6250 | +66.7% [" in full and "0.1939" not in full
    assert "24 interactions with 120 items" in text and "seeds 0, 1" in text
    rows = [row for row in read_csv(run, "table-3.csv") if row["metric"] == "mrr"]
    assert [(row["protocol"], row["candidates"]) for row in rows] == [("paper", "uniform-100"), ("full", "full")]
    assert float(rows[1]["relative"]) == pytest.approx(100 * 0.25 / 0.375)
    assert (rows[0]["paper_improvement"], rows[1]["paper_improvement"]) == ("10.38", "")
    latex = Path(run.file("table-3.tex")).read_text(encoding="utf-8")
    assert "candidates: uniform-100" in latex and r"MRR & 0.7500 & 1.0000 & +33.3\% [" in latex


def test_further_arms_stand_beside_the_papers_and_beside_their_twins(tmp_path: Path, trained: list[str]):
    """Sampled MRR .75 of the base and the shuffled twin, 1 of the refined arm."""
    arms = {"no users": {"user_scores": "none"}, "shuffled, no users": {"user_scores": "none", "control": "shuffled"}}
    run = reproduce(settings(tmp_path, extra_arms=arms, twins={"no users": "shuffled, no users"}))
    assert trained[-2:] == ["sasrec-shuffled-no-users-seed-0", "sasrec-shuffled-no-users-seed-1"]
    papers = Path(run.file("table-3.md")).read_text(encoding="utf-8").split("## One protocol")[0]
    rows = {line.split(" | ")[1]: line for line in papers.splitlines() if line.startswith("| SASRec | ")}
    assert {"MRR", "refined", "no users", "shuffled, no users"} <= rows.keys()
    assert rows["MRR"].count("+33.3%") == 1  # of the refined arm alone
    assert rows["no users"].count("+33.3% [") == 2 and "| shuffled, no users | +33.3% [" in rows["no users"]
    assert "| the same for every user |" in rows["shuffled, no users"] and "+33.3%" not in rows["shuffled, no users"]


def test_runs_train_at_the_same_time_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two runs wait for each other: neither ends before the other has started."""
    meeting, placed = threading.Barrier(2, timeout=20), []

    def train(config: TrainConfig, **placement: Any) -> runs.Run:
        placed.append(placement)
        meeting.wait()
        return stand_in_train(config)

    monkeypatch.setattr("raygr.train.stage.train", train)
    monkeypatch.setattr("raygr.ray_setup.connect", lambda: None)
    monkeypatch.setattr("raygr.execution.distributed.check_at_once", lambda workers, at_once, threads: None)
    reproduce(settings(tmp_path, at_once=2, gpu_share=0.5))
    assert placed == [{"gpu_share": 0.5, "at_once": 2}] * 4


def test_after_a_failed_run_no_other_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun = []

    def train(config: TrainConfig, **placement: Any) -> runs.Run:
        begun.append(config.output)
        raise ValueError("the loss is nan")

    monkeypatch.setattr("raygr.train.stage.train", train)
    monkeypatch.setattr("raygr.ray_setup.connect", lambda: None)
    monkeypatch.setattr("raygr.execution.distributed.check_at_once", lambda workers, at_once, threads: None)
    with pytest.raises(ValueError, match="the loss is nan"):
        reproduce(settings(tmp_path, at_once=2, seeds=tuple(range(50))))
    assert len(begun) < 50
    monkeypatch.setattr("raygr.train.stage.train", lambda config, **placement: stand_in_train(config))
    reproduce(settings(tmp_path, seeds=tuple(range(50))))  # the interrupted run continues, one run at a time


def test_base_widths_are_ratios_to_the_refined_arm(tmp_path: Path, trained: list[str]):
    """MRR, full: base 20 has .375, base 40 (1/4 + 1/4) / 2, refined .625."""
    run = reproduce(settings(tmp_path, "figure-4", base_widths=(20, 40)))
    text = Path(run.file("figure-4.md")).read_text(encoding="utf-8")
    full = text[text.index("## One protocol: full") :]
    assert "| SASRec | base | 20 | 0.600 [" in full and "| SASRec | base | 40 | 0.400 [" in full
    assert "| SASRec | the paper's table | 60 | 0.906 |" in text  # .1939 / .2140


@pytest.mark.parametrize("experiment", ["figure-3", "figure-4", "figure-6"])
def test_a_figure_holds_its_points(tmp_path: Path, trained: list[str], experiment: str):
    """Every protocol has its PNG and SVG; the SVG's text names recommender, metrics and values."""
    run = reproduce(settings(tmp_path, experiment, guided_widths=(1, 3), base_widths=(20, 60), guided_weights=(1, 2)))
    for name in (experiment, f"{experiment}-full"):
        assert Path(run.file(f"{name}.png")).read_bytes().startswith(b"\x89PNG")
        drawing = Path(run.file(f"{name}.svg")).read_text(encoding="utf-8")
        ranking = "full" if name.endswith("full") else "uniform-100"
        for text in (f"SASRec, {ranking}", "NDCG@1", "NDCG@20", "MRR"):
            assert f">{text}<" in drawing, text
        assert ("the paper's table" in drawing) == (name == experiment and experiment != "figure-3")
    assert not files.exists(run.file(f"{experiment}.tex"))
    rows = [row for row in read_csv(run, f"{experiment}.csv") if (row["protocol"], row["metric"]) == ("full", "mrr")]
    places = [(row["curve"], float(row["value"])) for row in rows]
    assert (
        places
        == {
            "figure-3": [("total width 20", 1), ("base width 17", 1), ("total width 20", 3), ("base width 17", 3)],
            "figure-4": [("base", 20), ("base", 60)],
            "figure-6": [("refined", 1), ("refined", 2)],
        }[experiment]
    )


# --- the command --------------------------------------------------------------------------------


def test_the_command_on_toy_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Real trainings; a second experiment on the same data takes the runs that are there."""
    shown = settings(tmp_path, protocol={"SASRec": "full"}, seeds=(0,))
    values = {name: value for name, value in vars(shown).items() if name != "experiment" and value is not None}
    (tmp_path / "toy.json").write_text(json.dumps(to_jsonable_python(values)), encoding="utf-8")
    flags = ["--config", str(tmp_path / "toy.json"), "--set", "train.threads=1"]
    assert cli.main(["reproduce", "table-3", *flags]) == 0
    assert capsys.readouterr().out.strip() == shown.output
    text = Path(shown.output, "table-3.md").read_text(encoding="utf-8")
    assert text.count("| SASRec | MRR | 0.") == 1 and "## One protocol" not in text
    assert "| full | popularity | 0." in text and "| full | chance | 0." in text and "° one run: users only" in text
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/train/*/run.json")}
    assert len(before) == 2
    flags += ["--set", f"output={tmp_path}/figure-6", "--set", "guided_weights=[1]"]
    assert cli.main(["reproduce", "figure-6", *flags]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/train/*/run.json")} == before


def test_the_experiments_files_are_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found: list[ReproduceConfig] = []
    monkeypatch.setattr(cli, "run_alone", lambda job, config, run, force: found.append(config) or config.output)
    assert cli.main(["reproduce", "table-3", "--set", "data=../p"]) == 0
    [config] = found
    assert config.paper == f"{ROOT}/configs/paper/table-3.csv"
    assert all(Path(file).is_file() for file in [*config.recommenders.values(), *config.stage_files.values()])
    assert (config.data, config.output) == (f"{tmp_path.parent}/p", f"{tmp_path}/outputs/paper/table-3")
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)  # as if raygr had been installed without it
    assert cli.main(["reproduce", "table-3"]) == 0
    assert found[1].paper == f"{ROOT}/raygr/configs/paper/table-3.csv"
