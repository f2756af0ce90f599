"""MUSE: language models with a complex hidden state."""

import os

# Read by torch at its first allocation: large CPU tensors in huge pages. With 4 KB pages a pass over fresh
# memory spends most of its time in page faults (zeroing 100 MB: 50 ms against 16 ms).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
