"""Answers of a trained model to many requests at a time, and over HTTP."""
