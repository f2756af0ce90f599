"""Everything that a machine is to be asked, by one command within minutes: ``python -m muse.card``."""
