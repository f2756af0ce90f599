"""torchrun that does not repeat an error that a process has told: ``python -m muse.torchrun``."""

from muse.processes.torchrun import main

if __name__ == "__main__":
    main()
