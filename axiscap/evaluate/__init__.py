"""Other projects' evaluations under a cap: models and tasks for Inspect, a model for the lm-evaluation-harness."""
