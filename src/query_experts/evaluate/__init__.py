"""Scores checkpoints with lm-evaluation-harness, and generates text."""
