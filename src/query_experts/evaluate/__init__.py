"""Evaluation by lm-evaluation-harness, and text generation."""
