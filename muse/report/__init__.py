"""What a run shows: metrics, tables, plots, result files."""
