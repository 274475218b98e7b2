"""Calibration: roles -> rollouts -> activations -> axis -> floors.

The method is that of arXiv 2601.10387: a model answers questions in its default character and in others; the axis at a
layer is the mean activation of the default's answers less that of the roles' answers; a floor is a percentile of
projections. Roles and questions that made no axis say how well it separates.
"""

from axiscap.calibrate.data import Plan, Role, batches, load_questions, load_roles, plan
from axiscap.calibrate.floors import with_floors
from axiscap.calibrate.pipeline import Keep, calibrate
from axiscap.calibrate.rollouts import Settings, Shard, Store, Task, TransformersEngine
from axiscap.calibrate.space import loadings_correlation

__all__ = [
    "Keep",
    "Plan",
    "Role",
    "Settings",
    "Shard",
    "Store",
    "Task",
    "TransformersEngine",
    "batches",
    "calibrate",
    "load_questions",
    "load_roles",
    "loadings_correlation",
    "plan",
    "with_floors",
]
