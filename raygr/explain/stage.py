"""The explain stage: a train run -> explanation.json, explanation.svg and explanation.png (the paper's Figure 5)."""

import dataclasses
import logging

from raygr import files, runs
from raygr.explain.config import ExplainConfig
from raygr.explain.drawing import explanation_figure
from raygr.explain.explanation import explain_item
from raygr.recommend.recommender import load_recommender
from raygr.report.charts import save_figure
from raygr.schema import EXPLANATION

logger = logging.getLogger(__name__)


def explain(config: ExplainConfig) -> runs.Run:
    """Writes the explanation and logs its sentences; ValueError before anything is written if there is none."""
    recommender = load_recommender(config.train_run)
    explanation = explain_item(recommender, config.item, config.users, aspects=config.aspect_names)
    run = runs.start_run(config.output, job="explain", config=config)
    sentences = explanation.sentences()
    files.write_json(dataclasses.asdict(explanation) | {"sentences": sentences}, run.file(f"{EXPLANATION}.json"))
    save_figure(explanation_figure(explanation), run.file(EXPLANATION), dots_per_inch=100)
    runs.finish_run(run, inputs=[config.train_run], counts={"users": len(explanation.users)})
    for text in sentences:
        logger.info("%s", text)
    return run
