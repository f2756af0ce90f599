"""The processes of a command: ranks, isolated jobs, and the signals that reach them."""
