"""Calibration: roles -> rollouts -> activations -> axis -> floors.

The method is that of arXiv 2601.10387 in small: a model answers questions in its default character and in others; the
axis at a layer is the mean activation of the default's answers less that of the roles' answers; a floor is a percentile
of the default's projections. Roles and questions that made no axis say how well it separates.
"""

from axiscap.calibrate.axis import Calibration, auc, calibrate
from axiscap.calibrate.data import Role, load_questions, load_roles
from axiscap.calibrate.rollouts import Prompt, Rollouts, run

__all__ = ["Calibration", "Prompt", "Role", "Rollouts", "auc", "calibrate", "load_questions", "load_roles", "run"]
