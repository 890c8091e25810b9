"""The report over small fake runs: its numbers are the runs' numbers, and the page needs nothing from outside."""

import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from browser import opened_browser

from raygr.compare.comparison import read_comparison
from raygr.compare.tables import LIST_FIGURES
from raygr.config import check_config, load_config
from raygr.files import write_json, write_table, write_text
from raygr.metrics.ranking import METRICS
from raygr.report.charts import PAGE_COLORS, share_chart
from raygr.report.config import ReportConfig
from raygr.report.finetune_section import (
    LOSS_PARTS,
    finetune_section,
    read_evaluations,
    read_lines,
    step_curve,
    tuning_charts,
)
from raygr.report.scored_subjects import ScoreMatrix, read_reference
from raygr.report.sections import correlation_section
from raygr.report.stage import markdown, report, run_command, short_names
from raygr.report.training_section import training_section
from raygr.report.verdict import against_words, comparison_verdict, headline_arm, verdict_warnings
from raygr.runs import Run, RunError, finish_run
from raygr.schema import INTERACTION_SCHEMA, ITEM_SCHEMA, USER_SCHEMA, score_schema
from raygr.train.config import TrainConfig

ASPECTS = ["tension level", "pace", "dead | aspect"]
HOSTILE = "<script>alert('x')</script> | [a](b) & $x$"
EXTERNAL = re.compile(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']?\s*(?:https?:)?//|url\(["'\s]*http|@import""")


def finished(path: Path, job: str, config: dict, *, counts: dict | None = None) -> str:
    """Writes the run.json of a run whose files are there already."""
    finish_run(Run(str(path), job, config, started=0.0), inputs=[], counts=counts or {})
    return str(path)


def make_data(path: Path) -> str:
    items = [
        {"item_index": i, "item_id": f"I{i}", "title": title, "description": "", "categories": "", "details": "",
         "train_rating": 4.0, "train_rating_count": count, "all_rating": 4.0, "all_rating_count": count}
        for i, (title, count) in enumerate(
            [("The Plain Film", 70), (HOSTILE, 50), ("Never Scored", 99), ("", 60), ("Rare Film", 1)], start=1
        )
    ]  # fmt: skip
    users = [
        {"user_index": u, "user_id": f"U{u}", "interactions": 5 + u, "cutoff": 3, "cutoff_position": 2}
        for u in range(5)
    ]
    events = [
        {"user_index": u, "item_index": p + 1, "position": p, "rating": 4.0, "timestamp": p,
         "split": ["train", "train", "train", "validation", "test"][p]}
        for u in range(5) for p in range(5)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(items, schema=ITEM_SCHEMA), str(path / "items" / "part-0.parquet"))
    write_table(pa.Table.from_pylist(users, schema=USER_SCHEMA), str(path / "users.parquet"))
    write_table(pa.Table.from_pylist(events, schema=INTERACTION_SCHEMA), str(path / "interactions.parquet"))
    write_json({"users": 4321, "items": 5, "history": {"median": 7.25}}, str(path / "statistics.json"))
    config = {"output": str(path), "reviews": ["a b.jsonl"]}
    return finished(path, "prepare", config, counts={"rows_in": 98765, "dropped": {"bad rating": 12}})


def make_scores(path: Path, subjects: str, ids: list[str]) -> str:
    rows = [
        {"subject_id": subject, "ratings": [row + 1, 5, 3], "expected": [row + 1.3, 9.0 - row, 3.0],
         "reason": "ok" if row < 4 else "no rating", "model": "m", "adapter": "", "mode": "probe"}
        for row, subject in enumerate(ids)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=score_schema(ASPECTS)), str(path / "scores" / "part-0.parquet"))
    aspect = {"mean": 5.25, "spread": 1.75, "identical_share": 0.125, "dead": False}
    quality = {
        "subjects": len(ids), "by_reason": {"ok": 4, "no rating": 1}, "valid_share": 0.8, "effective_rank": 1.875,
        "aspects": {**dict.fromkeys(ASPECTS[:2], aspect), ASPECTS[2]: {**aspect, "spread": 0.0, "dead": True}},
        "seconds": 33.5, "subjects_per_second": 0.149, "tokens_computed": 1234567,
    }  # fmt: skip
    write_json(quality, str(path / "quality.json"))
    return finished(path, "score", {"output": str(path), "data": "d", "subjects": subjects, "aspects": "a.yaml"})


def make_comparison(path: Path, train: str) -> str:
    protocol = {"split": "leave_one_out", "ties": "mean rank"}
    lists = {"length": 10, "mmr_weight": 0.5, "scores": None}
    lists |= dict.fromkeys(("ranked", "reranked"), dict.fromkeys(LIST_FIGURES, 0.4321))

    def arm(mean: float, gain: dict | None, shares: dict | None) -> dict:
        metrics = {m: {"mean": mean, "per_run": [mean]} for m in METRICS}
        gains = None if gain is None else dict.fromkeys(METRICS, gain)
        cold = {m: {"mean": mean / 10, "per_run": [mean / 10]} for m in METRICS}
        return {
            "runs": [train, str(path / "gone")], "parameters": 54321, "shares": shares,
            "base_moved": shares and 0.3456,
            "base": None if gain is None else "base", "protocol": protocol, "lists": lists,
            "settings": {"model": "sasrec", "fusion": "add", "control": "none", "user_scores": "llm",
                         "base_width": 60, "loss": "cross_entropy"},
            "metrics": {"full": metrics},
            "against_base": None if gain is None else {"full": gains}, "is_reference": False, "against_references": {},
            "cold": {"full": {"targets": 17, "users": 15, "metrics": cold,
                              "against_base": gains and dict.fromkeys(METRICS, nothing)}},
        }  # fmt: skip

    better = {"difference": 0.01, "low": 0.002, "high": 0.02, "relative": 12.34, "relative_low": 2.1,
              "relative_high": 22.9, "p": 0.001, "p_holm": 0.02, "per_run": [12.0, 13.0],
              "over": "users and runs"}  # fmt: skip
    unsure = {
        **better,
        "difference": -0.0036,
        "low": -0.011,
        "high": 0.0049,
        "relative": -3.21,
        "relative_low": -9.9,
        "relative_high": 4.4,
        "p_holm": 0.06,
    }
    nothing = {**better, "difference": 0.0, "relative": None, "relative_low": None, "relative_high": None}
    arms = {
        "base": arm(0.1111, None, None),
        "refined": arm(0.1248, better, {"base": 0.62, "encoder_guided": 0.345, "user_guided": 0.035}),
        "shuffled": arm(0.1075, unsure, None),
        "chance": arm(0.0123, {**unsure, "over": "users"}, None)
        | {"runs": [], "is_reference": True, "lists": None, "settings": {}, "parameters": 0},
    }
    plain = {name: value for name, value in better.items() if name not in ("p_holm", "per_run")}
    groups = [(0, 0, 0.0219), (1, 14, -0.0037), (15, 321, 0.0456)]
    arms["refined"]["by_train_count"] = {
        "full": [
            {"least": least, "most": most, "targets": 1414, "users": 1313, "base": 0.0765,
             "gain": plain | {"difference": gain, "low": gain - 0.01, "high": gain + 0.01}}
            for least, most, gain in groups
        ]
    }  # fmt: skip
    arms["shuffled"]["settings"] = arms["shuffled"]["settings"] | {"control": "shuffled"}
    way = {"share": 0.43, "low": 0.352, "high": 0.508}
    arms["refined"]["way_to_truth"] = {"full": dict.fromkeys(METRICS, way)}
    record = {"protocol": protocol, "base": "base", "cold_below": 10, "shown": ["refined", "shuffled"], "arms": arms}
    record |= {"primary_metric": "ndcg_at_10", "remarks": ["“shuffled” ranks worse than chance."]}
    write_json(record, str(path / "comparison.json"))
    return finished(path, "compare", {"output": str(path), "arms": {"base": [train]}, "base": "base"})


def make_tuning(path: Path) -> str:
    """Four held-out users whose reward rises by 0.5 each, and whose AUC is known of three."""
    stages = [("before", 0, 0.0), ("warm_start", 0, 0.25), ("reinforcement", 10, 0.75), ("reinforcement", 20, 0.5)]
    users = [
        {"stage": stage, "step": step, "user_index": u, "user_id": f"U{u}", "reward": u / 10 + rise,
         "mrr": u / 10 + rise / 2, "auc": None if u == 0 else 0.5, "common_mrr": 0.25, "common_auc": 0.5,
         "personal_mrr": 0.2, "personal_auc": 0.45,
         "valid": 1.0}
        for stage, step, rise in stages for u in range(4)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(users), str(path / "evaluations.parquet"))
    evaluations = [{"stage": stage, "step": step, "metrics": {}} for stage, step, _ in stages]
    record = {"steps": 20, "warm_steps": 3, "best_step": 10, "held_out": 4, "evaluations": evaluations}
    write_json(record, str(path / "evaluations.json"))
    figures = {"reward_spread": 0.25, "flat_groups": 0.125, "valid": 1.0, "entropy": 2.125, "gradient_norm": 1.5}
    figures["losses"] = {"value": -0.5, "format": 1.5, "format_reward": 0.0, "teacher": 0.0, "kl": 0.0}
    lines = [{"stage": "warm_start", "step": n, "loss": 3.0} for n in range(1, 4)]
    lines += [
        {"stage": "reinforcement", "step": n, "reward": n / 64, "loss": 1.0, "kl": 0.0375 if n % 10 == 0 else None,
         "tokens_per_second": 4567.0, **figures}
        for n in range(1, 21)
    ]  # fmt: skip
    write_text("".join(json.dumps(line) + "\n" for line in lines), str(path / "steps.jsonl"))
    config = {"output": str(path), "data": "d", "item_scores": "s", "aspects": "a.yaml", "task": "base"}
    config["adapter"] = None
    return finished(path, "finetune", config | {"rollouts": "slots"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> ReportConfig:
    folder = tmp_path_factory.mktemp("runs")
    lines = [
        {"epoch": n} | ({"validation": {"ndcg_at_10": 0.3 - (n - 4) ** 2 / 100}} if n % 2 == 0 else {})
        for n in range(1, 9)
    ]
    write_text("\n".join(map(json.dumps, lines)), str(folder / "train" / "epochs.jsonl"))
    train = finished(folder / "train", "train", {"output": "t", "data": "d", "heads": 2, "dropout": 0.25})
    write_text("movie_id,pace,tension level\nI1,9,1\nI2,8,2\nI3,7,3\nI4,6,5\nI9,1,1\n", str(folder / "reference.csv"))
    return ReportConfig(
        output=str(folder / "report"),
        title=f"Films {HOSTILE}",
        notice="Simulated shoppers: a positive control.",
        data=make_data(folder / "data"),
        comparison=make_comparison(folder / "compare", train),
        item_score_run=make_scores(folder / "item_scores", "items", ["I1", "I2", "I4", "I5", "I3"]),
        user_score_run=make_scores(folder / "user_scores", "users", ["U1", "U2", "U3", "U4", "U0"]),
        reference_scores=str(folder / "reference.csv"),
        finetune=(make_tuning(folder / "tuned"),),
    )


@pytest.fixture(scope="module")
def page(inputs) -> str:
    return Path(report(inputs).path, "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(inputs, page) -> str:
    return Path(inputs.output, "report.md").read_text(encoding="utf-8")


NUMBERS = [
    "4,321", "7.25", "98,765",  # data
    "0.1111", "0.1248", "+12.3%*", "(+2.1 to +22.9)", "-3.2%", "62.0%", "3.5%", "54,321", "leave_one_out",
    "0.0125", "17 targets of 15 users", "0.4321",  # cold-start targets, lists
    "43%", "15–321", "1,414", "+0.0219", "+0.0119 to +0.0319",  # the way to the truth, gains by train count
    "0.8", "12.5%", "1.875", "1,234,567", "yes",  # quality
    "+1.00",  # agreement
    "0.1500", "0.6500", "+0.5000*", "+0.7500*", "(+0.5000 to +0.5000)", "+0.0000", "4,567", "0.0375",  # fine-tune
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_the_runs_stand_in_page_and_markdown(page, text, number):
    assert number in page
    assert number.replace("*", r"\*") in text


def test_only_a_gain_with_a_small_corrected_p_is_marked(page):
    assert "-3.2%*" not in page and "+12.3%*" in page


def test_page_refers_to_nothing_outside(page):
    assert not EXTERNAL.search(page)
    assert "http://" not in page and "https://" not in page
    # verdict, gains, by train count, way to the truth, shares, training,
    # correlations, agreement, items, users, six of the fine-tune
    assert page.count("<svg") == 20
    assert page.count('role="img" aria-label=') == 20


def test_figures_take_the_colours_of_the_page(page):
    """White, black and grid lines would hide a figure in the dark page."""
    figures = page[page.index("<svg") : page.rindex("</svg")]
    assert "var(--ink)" in figures and "var(--line)" in figures
    assert not re.search(rf": (?:{'|'.join(PAGE_COLORS)})", figures)
    for name in PAGE_COLORS.values():
        assert page.count(f"--{name}:") == 2, "a colour is light and dark"


def test_ids_of_the_page_are_unique(page):
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) > 50 and len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_hostile_titles_stay_text(page, text):
    assert page.count("<script") == page.count("</script") == 1 and "<script" not in text
    assert "<script>alert" not in page
    assert html.escape(HOSTILE, quote=False).replace("'", "&#39;") in page
    assert markdown(HOSTILE) in text


def test_every_markdown_table_is_rectangular(text):
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 10
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_drawn_items_are_the_most_reviewed_ones_with_scores(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    items = [caption for caption in captions if "training reviews" in caption]
    assert [re.search(r"(\d+) training", caption)[1] for caption in items] == ["70", "60", "50"]
    assert items[0].startswith("The Plain Film") and items[1].startswith("I4")  # an id stands in for no title


def test_drawn_users_have_the_longest_histories_and_their_newest_training_items(page):
    captions = [c for c in re.findall(r"<figcaption>(.*?)</figcaption>", page) if c.startswith("User ")]
    assert [caption.split()[1].rstrip(":") for caption in captions] == ["U4", "U3", "U2"]
    assert "9 interactions; newest: Never Scored; " in captions[0] and "I4" not in captions[0]


def test_the_page_opens_with_the_verdict_on_the_first_arm_and_its_warnings(inputs, page, text):
    sentence = (
        "“refined” ranks better than “base”: NDCG@10 +12.3% (95% interval +2.1 to +22.9)"
        "; its control “shuffled” has -3.2% (95% interval -9.9 to +4.4)."
    )
    assert sentence in page[: page.index("<nav")] and sentence in text[: text.index("## ")]
    warnings = page[page.index("<strong>Warnings") : page.index("<nav")]
    assert re.findall(r"<li>(.*?)</li>", warnings) == [
        "“shuffled” ranks worse than chance.",
        "1 of 3 aspects of the item scores are dead: dead | aspect.",
        "20.0% of the items have no scores; the reasons are in the appendix.",
        "1 of 3 aspects of the user scores are dead: dead | aspect.",
        "20.0% of the users have no scores; the reasons are in the appendix.",
    ]
    # settings, hashes and full paths stand in the appendix alone
    assert inputs.data not in page[: page.index("<h2>Appendix")]
    assert "Rows in and out" not in page[: page.index("<h2>Appendix")] and "Rows in and out" in page


def test_the_verdict_says_what_weakens_it(inputs):
    comparison = read_comparison(inputs.comparison)
    refined, shuffled = comparison.arms["refined"], comparison.arms["shuffled"]
    metric = comparison.primary_metric
    gain = refined.against_base["full"][metric]
    assert against_words(gain) == "ranks better than"
    assert against_words(replace(gain, p_holm=0.3)).startswith("cannot be told, after the correction")
    assert against_words(replace(gain, low=-1.0)) == "cannot be told from"
    assert against_words(replace(gain, low=-2.0, high=-1.0)) == "ranks worse than"
    refined.shares = {"base": 0.995, "encoder_guided": 0.005, "user_guided": 0.0}
    one_run = replace(gain, over="users")
    assert len(verdict_warnings("refined", refined, one_run, {"shuffled": gain})) == 3
    shuffled.settings["control"] = "shuffled"
    comparison.shown.reverse()  # the control is no headline, wherever it stands
    assert headline_arm(comparison) == "refined"
    comparison.shown.remove("refined")
    assert headline_arm(comparison) is None and comparison_verdict(comparison) is None
    (warning,) = verdict_warnings("refined", replace(refined, shares=None), gain, {})
    assert "control: shuffled" in warning


def test_short_names_tell_paths_apart():
    assert short_names(["/a/b/c", "/a/d/c", "/a/d/e/"]) == {"/a/b/c": "b/c", "/a/d/c": "d/c", "/a/d/e/": "d/e"}
    assert short_names(["/x/scores.csv"]) == {"/x/scores.csv": "scores.csv"} and short_names([]) == {}


def test_runs_and_commands_are_shown_and_lost_runs_left_out(page, text, inputs):
    jobs = re.findall(r"<summary>([a-z]+):", page)
    assert jobs == ["prepare", "score", "score", "finetune", "train", "compare"]
    assert "raygr train --set output=t --set data=d --set dropout=0.25" in text
    assert "Versions" in text and "numpy" in page


def test_validation_curves_end_with_their_best_epoch(inputs):
    comparison = read_comparison(inputs.comparison)
    section = training_section(comparison)
    assert section.tables[0].rows[0] == ["base", "4", "0.3"] and len(section.charts) == 1
    for arm in comparison.arms.values():
        arm.runs = ["gone"]
    assert training_section(comparison) is None


def test_correlations_by_hand():
    scores_SA = np.array([[1, 2, 5, 4.0], [2, 4, 5, 3], [3, 6, 5, 8]])
    section = correlation_section(ScoreMatrix(["x", "y", "z"], ["a", "b", "flat", "c"], scores_SA))
    third = np.corrcoef([1, 2, 3], [4, 3, 8])[0, 1]
    assert section.tables[0].rows == [["a", "b", "+1.00"], ["a", "c", f"{third:+.2f}"], ["b", "c", f"{third:+.2f}"]]
    assert len(section.charts) == 1  # and the flat aspect is in no pair


def test_tables_sort_and_search_in_a_browser(inputs, page, tmp_path):
    with opened_browser(tmp_path / "profile") as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=False)
        browser.open(f"{inputs.output}/report.html")
        browser.run("table = document.querySelector('.table table')")
        browser.run("names = () => [...table.rows].map((row) => row.cells[0].innerText)")
        assert browser.run("names().slice(1)") == ["base", "refined", "shuffled", "chance"]
        click = "table.tHead.rows[0].cells[1].querySelector('button').click();"
        assert browser.run(f"{click} names().slice(1)") == ["chance", "shuffled", "base", "refined"]  # by MRR
        assert browser.run(f"{click} names().slice(1)") == ["refined", "base", "shuffled", "chance"]
        assert browser.run("table.tHead.rows[0].cells[1].ariaSort") == "descending"
        assert browser.run("table.closest('.table').classList.contains('wide')")
        assert browser.run("getComputedStyle(table.rows[1].cells[0]).position") == "sticky"
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "the page itself scrolls sideways"
        search = "box = document.querySelector('.search'); found = box.closest('.table').querySelectorAll('tbody tr');"
        browser.run(f"{search} box.value = found[2].cells[0].innerText; box.dispatchEvent(new Event('input'))")
        assert browser.run("[...found].filter((row) => !row.hidden).includes(found[2])")
        assert browser.run("[...found].filter((row) => row.hidden).length") > 0
        assert browser.errors == []


def test_an_sft_warm_up_alone_has_no_reinforcement_learning_steps(tmp_path):
    path = make_tuning(tmp_path)
    lines = [line for line in (tmp_path / "steps.jsonl").read_text().splitlines() if "warm_start" in line]
    write_text("\n".join(lines), str(tmp_path / "steps.jsonl"))
    evaluations = [{"stage": stage, "step": 0, "metrics": {}} for stage in ("before", "warm_start")]
    record = {"steps": 0, "warm_steps": 3, "best_step": 0, "held_out": 4, "evaluations": evaluations}
    write_json(record, str(tmp_path / "evaluations.json"))
    config = {"task": "base", "rollouts": "slots", "adapter": "runs/first"}
    section = finetune_section(path, config, name="tuned", figure_id="t")
    assert "from the adapter of runs/first" in section.text
    (stages,) = section.tables
    assert [row[0] for row in stages.rows] == ["before", "after the SFT warm-up"]
    assert [chart.caption for chart in section.charts] == ["Loss by step"]


def test_what_every_step_logs_is_a_curve(tmp_path):
    lines = read_lines(make_tuning(tmp_path))[3:]
    kl = step_curve(lines, "kl", "KL")
    assert (list(kl.steps), list(kl.values)) == ([10, 20], [0.0375, 0.0375])  # every tenth step has one
    charts = tuning_charts(read_evaluations(str(tmp_path)), lines, "t")
    drawn = {one.caption: one.svg for one in charts}
    parts, nats, answers = list(drawn)[3:]
    assert nats.startswith("Entropy and KL divergence") and answers.startswith("Answers by step")
    named = [name for name in LOSS_PARTS.values() if f">{name}<" in drawn[parts] or f"<!-- {name} -->" in drawn[parts]]
    assert named == ["ratings (5)", "format (6)"]  # the others are 0 in every step


def test_report_without_comparison_and_scores_leaves_the_sections_out(inputs, tmp_path):
    small = ReportConfig(output=str(tmp_path / "small"), title="Data only", data=inputs.data)
    page = Path(report(small).path, "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Data", "Appendix"]
    assert "<svg" not in page and 'class="notice"' not in page


def test_equal_inputs_give_equal_pages(inputs, page, tmp_path):
    settings = {**vars(inputs), "output": str(tmp_path / "again")}
    again = report(check_config(ReportConfig, settings, source="test"))
    assert Path(again.path, "report.html").read_text() == page


def test_unfinished_input_is_named_and_nothing_is_written(inputs, tmp_path):
    config = ReportConfig(output=str(tmp_path / "report"), title="x", data=str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="nowhere"):
        report(config)
    assert not (tmp_path / "report").exists()


def test_command_reads_back_as_the_same_configuration():
    settings = {"output": "runs/a b", "data": "no", "aspect_names": ["tension level", "pace"], "guided_weight": 2.0}
    settings |= {"item_scores": "x=1", "user_scores": "llm", "user_score_run": "null", "threads": 2}
    config = check_config(TrainConfig, settings, source="test")
    command = run_command("train", json.loads(json.dumps(vars(config))))
    words = shlex.split(command)
    assert words[:2] == ["raygr", "train"] and set(words[2::2]) == {"--set"} and "heads" not in command
    assert load_config(TrainConfig, None, words[3::2]) == config


def test_negative_share_is_drawn_left_of_zero():
    shares = {"a": {"base": 0.9, "encoder_guided": 0.2, "user_guided": -0.1}}
    drawing = share_chart(shares, figure_id="x", label="<shares>")
    assert 'aria-label="&lt;shares&gt;"' in drawing
    bars = re.findall(r'd="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*z\n*" clip-path', drawing)
    base, encoder, user = [(float(start), float(end)) for start, end in bars]
    assert base[1] == encoder[0] < encoder[1] and user[0] == base[0] > user[1]


def test_reference_ids_keep_their_zeros(tmp_path):
    (tmp_path / "reference.csv").write_text("item_id,pace\n0005019281,3\n0005,4\n")
    assert read_reference(str(tmp_path / "reference.csv")).ids == ["0005019281", "0005"]
    write_table(pa.table({"item_id": ["007"], "pace": [4]}), str(tmp_path / "reference.parquet"))
    matrix = read_reference(str(tmp_path / "reference.parquet"))
    assert matrix.ids == ["007"] and matrix.aspects == ["pace"] and matrix.scores_SA.tolist() == [[4.0]]


def test_a_reference_that_cannot_be_read_says_why(tmp_path):
    path = tmp_path / "reference.csv"
    for text, why in [("item_id,pace\na,3\na,4\n", "id a .* more than once"), ("item_id,pace\na,slow\n", "'pace' is")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"reference.csv: .*{why}"):
            read_reference(str(path))
    with pytest.raises(FileNotFoundError, match="no such scores"):
        read_reference(str(tmp_path / "absent.csv"))


def test_page_draws_in_a_browser(inputs, page, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium to draw the page")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    target = [f"--screenshot={picture}", "--window-size=1200,2000", f"file://{inputs.output}/report.html"]
    subprocess.run([browser, *flags, *target], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 10_000
