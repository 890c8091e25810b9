"""The report's section of training: the validation curve of each arm's first run."""

import numpy as np

from raygr.compare.comparison import Comparison
from raygr.compare.tables import Table
from raygr.files import exists, join
from raygr.metrics.ranking import metric_name
from raygr.report.charts import CURVES, Curve, curve_chart
from raygr.report.finetune_section import read_lines
from raygr.report.sections import Chart, Section, show
from raygr.schema import HISTORY


def training_section(comparison: Comparison) -> Section | None:
    """The primary metric on validation by epoch, in the first run of each arm; None where no run keeps any."""
    curves, metric = [], comparison.primary_metric
    for name, arm in comparison.arms.items():
        is_kept = arm.runs and exists(join(arm.runs[0], HISTORY))
        lines = read_lines(arm.runs[0], HISTORY) if is_kept else []
        known = [(line["epoch"], line["validation"][metric]) for line in lines if line.get("validation")]
        if known:
            curves.append(Curve(name, [epoch for epoch, _ in known], [value for _, value in known], None, None))
    if not curves:
        return None
    caption = f"{metric_name(metric)} on validation by epoch"
    text = "The first run of each arm; a curve ends where the run stopped, and the test is of its best epoch."
    if len(curves) > len(CURVES):
        text += f" The figure draws the first {len(CURVES)} arms."
    svg = curve_chart(curves[: len(CURVES)], figure_id="training", label=caption, axis="epoch")
    rows = [[one.name, show(one.steps[int(np.argmax(one.values))]), show(max(one.values))] for one in curves]
    table = Table("The best epoch on validation", ["arm", "epoch", metric_name(metric)], rows)
    return Section("Training", text, [table], [Chart(caption, svg)])
