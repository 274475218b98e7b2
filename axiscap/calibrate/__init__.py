"""Calibration: roles -> rollouts -> activations -> axis -> floors.

The method is that of arXiv 2601.10387. A model answers questions in its default character and in other roles. The axis
at a layer is the mean activation of the default's answers minus the mean activation of the roles' answers. A floor is a
percentile of projections on the axis. Held-out roles and questions show how well the axis separates.
"""

from axiscap.calibrate.cluster import RayWorkers
from axiscap.calibrate.measure import measure
from axiscap.calibrate.pipeline import Keep, calibrate
from axiscap.calibrate.roles import Plan, Role, Task, batches, load_questions, load_roles, plan
from axiscap.calibrate.rollouts import EndpointEngine, Here, TransformersEngine, VllmEngine, Workers
from axiscap.calibrate.sinks import NormLimits, find_norm_limits
from axiscap.calibrate.space import loadings_correlation
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.calibrate.work import Work, load_work
from axiscap.profile.floors import shares_below, with_floors

__all__ = [
    "EndpointEngine",
    "Here",
    "Keep",
    "NormLimits",
    "Plan",
    "RayWorkers",
    "Role",
    "Settings",
    "Shard",
    "Store",
    "Task",
    "TransformersEngine",
    "VllmEngine",
    "Work",
    "Workers",
    "batches",
    "calibrate",
    "find_norm_limits",
    "load_questions",
    "load_roles",
    "load_work",
    "loadings_correlation",
    "measure",
    "plan",
    "shares_below",
    "with_floors",
]
