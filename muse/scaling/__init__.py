"""What a training step costs at any size and on any number of ranks, by formulas: docs/scaling.md.

``counts.py`` parameters and FLOPs, ``memory.py`` bytes on a rank, ``ranks.py`` what ranks send each other and
what that makes of a step; ``python -m muse.scaling`` prints them. Nothing here builds a model.
"""
