"""The metrics that exist, by family/variant. The arithmetic is in `metrics/`; here it meets answers and records.

A judged metric is recorded under its name and the judge's: interleavedeval/v1/gpt-4o.
"""

from weft.evaluation.judge.measure import rubric_metric
from weft.evaluation.judge.rubric import RUBRICS
from weft.evaluation.measures import graded, pictures, prose, stories, texts
from weft.evaluation.metric import Metric

METRICS: dict[str, Metric] = {
    **prose.METRICS,
    **stories.METRICS,
    **{f"{name}/v{rubric.version}": rubric_metric(rubric) for name, rubric in RUBRICS.items()},
    **graded.METRICS,
    **texts.METRICS,
    **pictures.METRICS,
}
