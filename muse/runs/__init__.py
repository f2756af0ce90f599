"""The folder of a run: with what it was made, its stored options and checkpoints, and how it goes on."""
