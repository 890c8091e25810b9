"""How many items must a large LLM score? Learning curves of the readout from SmolLM2-135M's states.

    python benchmarks/readout.py films --data ../shared/data/ml-1m                      # 3,416 films of MovieLens 1M
    python benchmarks/readout.py games --data ../shared/data/amazon2018_video_games     # 1,216 games

FOLDER holds `item_scores_llm.csv`, the large LLM's scores, and the items' texts: `movies.csv.gz` (title, genres, plot)
or `items.jsonl.gz` (title, platform, genres, developer, release date). Each seed draws the items that are taught; all
others are held out. Beside the first half of the layers, which `raygr vectors` takes, the curve has its last layer
alone. States are computed once and kept in outputs/readout. Figures go to benchmarks/results/readout/NAME.json, a
picture of both to docs/results/taught-small-llm.{svg,png}, and a Markdown table to the console.
"""

import argparse
import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from raygr import files
from raygr.compare.tables import markdown_rows
from raygr.data.vector_tables import read_vectors
from raygr.metrics.agreement import agreement, mean_agreement
from raygr.report.charts import BLUE, GREY, ORANGE, STYLE, save_figure
from raygr.score.aspects import load_aspects
from raygr.score.default_model import small_model_folder
from raygr.score.prompts import Item, PromptEncoder, user_lead_in
from raygr.score.subjects import drawn, load_tokenizer
from raygr.vectors.readout import fit_readout
from raygr.vectors.text_states import Text, batches_of_states, language_model

OUTPUTS, RESULTS = Path("outputs/readout"), Path(__file__).parent / "results" / "readout"
FIGURE = "docs/results/taught-small-llm"
COUNTS = {"films": (50, 100, 300, 1000), "games": (50, 100, 300, 800)}
ASPECTS = {"films": "movies", "games": "games"}
WIDTH = 576


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COUNTS)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parsed = parser.parse_args()
    table = read_vectors(str(parsed.data / "item_scores_llm.csv"), subjects="items", column="expected", aspects=None)
    kept = OUTPUTS / f"{parsed.name}.npz"
    if not kept.exists():
        keep_states(parsed.name, parsed.data, table.ids_S.tolist(), kept)
    states = np.load(kept)
    row_of = {item: row for row, item in enumerate(table.ids_S.tolist())}
    scores_SA = table.values_SA[[row_of[item] for item in states["ids"].tolist()]]
    curves = {
        "first half of the layers": curve(states["features"], scores_SA, parsed.name, parsed.seeds),
        "its last layer": curve(states["features"][:, -WIDTH:], scores_SA, parsed.name, parsed.seeds),
    }
    record = {"items": len(scores_SA), "seeds": parsed.seeds, "aspects": table.aspects, "curves": curves}
    RESULTS.mkdir(parents=True, exist_ok=True)
    files.write_json(record, str(RESULTS / f"{parsed.name}.json"))
    rows = [["taught", *(f"{name}: {what}" for name in curves for what in ("Spearman", "error"))]]
    for place, count in enumerate(COUNTS[parsed.name]):
        means = [one[place]["mean"] for one in curves.values()]
        rows.append(
            [str(count), *(f"{one[what]:.2f}" for one in means for what in ("spearman", "mean_absolute_error"))]
        )
    print(markdown_rows(rows))
    draw()


def keep_states(name: str, data: Path, ids: list[str], kept: Path) -> None:
    """Compute the states of all items as `raygr vectors` does, and keep them with their ids."""
    items = {"films": films, "games": games}[name](data)
    model, aspects = str(small_model_folder()), load_aspects(f"configs/aspects/{ASPECTS[name]}.yaml")
    encoder = PromptEncoder(load_tokenizer(model), aspects, "items", max_prompt_tokens=1024)
    texts = [Text(item, encoder.subject_ids(encoder.item_prompt(items[item]).prefix_ids)) for item in ids]
    prefix = (encoder.shared[0], *encoder.encode(user_lead_in(aspects, "items") + "\n"))
    found: list[str] = []
    states, started = [], time.perf_counter()
    for batch, states_BXD in batches_of_states(language_model(model, half=True), prefix, texts, 16):
        found += batch
        states.append(states_BXD.reshape(len(batch), -1))
        if len(states) % 10 == 0:
            print(f"{len(found)} of {len(ids)}, {len(found) / (time.perf_counter() - started):.1f}/s", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, ids=np.array(found), features=np.concatenate(states))


def films(data: Path) -> dict[str, Item]:
    with gzip.open(data / "movies.csv.gz", "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["movie_id"]: Item(row["title"], description=row["plot"], categories=row["genres"].replace("|", " "))
        for row in rows
    }


def games(data: Path) -> dict[str, Item]:
    names = {"platform": "Platform", "developer": "Developer", "release_date": "Release date"}
    items = {}
    with gzip.open(data / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            details = " ".join(f"{name}: {row[field]}" for field, name in names.items() if row.get(field))
            categories = " ".join(row.get("genres") or row["categories"])
            items[row["item_id"]] = Item(row["title"], categories=categories, details=details)
    return items


def curve(features_SX: np.ndarray, scores_SA: np.ndarray, name: str, seeds: int) -> list[dict[str, Any]]:
    """For each number of taught items the mean agreement of the others over seeds, and per aspect over seeds."""
    points = []
    for count in COUNTS[name]:
        found = []
        for seed in range(seeds):
            taught = drawn(np.arange(len(scores_SA)), count, seed=seed)
            others = np.setdiff1d(np.arange(len(scores_SA)), taught)
            readout = fit_readout(features_SX[taught], scores_SA[taught])
            predicted_SA = readout.scores(features_SX[others])
            found.append(agreement(predicted_SA, scores_SA[others], scores_SA[taught].mean(axis=0)))
        means = [mean_agreement(one) for one in found]
        points.append(
            {
                "taught": count,
                "mean": {field: float(np.mean([one[field] for one in means])) for field in means[0]},
                "spearman_of_seeds": [one["spearman"] for one in means],
                "aspects": [mean_agreement(list(one)) for one in zip(*found, strict=True)],
            }
        )
        print(name, count, points[-1]["mean"], flush=True)
    return points


def draw() -> None:
    """Draw mean Spearman against the number of taught items, for each data set that has results."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("films", BLUE), ("games", ORANGE)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        for label, style in (("first half of the layers", "-"), ("its last layer", ":")):
            points = files.read_json(str(path))["curves"][label]
            x, y = [one["taught"] for one in points], [one["mean"]["spearman"] for one in points]
            axes.plot(x, y, style, marker="o", color=colour, label=f"{name}, {label}")
    axes.set_xscale("log")
    axes.set_xticks(COUNTS["films"], [f"{count:,}" for count in COUNTS["films"]])
    axes.minorticks_off()
    axes.set_xlabel("taught items")
    axes.set_ylabel("Spearman's correlation, held-out items")
    axes.grid(color=GREY, alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, FIGURE)


if __name__ == "__main__":
    main()
