"""The study: drop one step of the recipe at a time, and say with intervals what that step was worth on your data.

`design` says what is run, `runs` makes the runs and keeps a line of JSON of each, `judge` turns paired runs into
intervals and verdicts, and `show` writes reports and merges studies.
"""

from lightning_unfreeze.study.design.arms import Arm, Recipe
from lightning_unfreeze.study.runner import Study
from lightning_unfreeze.study.show.merge import merge_studies
from lightning_unfreeze.study.show.result import StudyResult, load_study

__all__ = ["Arm", "Recipe", "Study", "StudyResult", "load_study", "merge_studies"]
