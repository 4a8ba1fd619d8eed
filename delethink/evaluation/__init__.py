"""Evaluation: how far thinking scales, measured."""
