"""What stands between the command line and a run: Hydra, its sweeps, and errors in one sentence."""
