"""MUSE: language models with a complex hidden state."""
