"""Measurements of a model against its baseline."""
