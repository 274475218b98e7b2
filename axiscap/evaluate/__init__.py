"""Evaluation by other people's yardsticks under a cap: models for Inspect and for the lm-evaluation-harness."""
