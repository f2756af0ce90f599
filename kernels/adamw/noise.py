"""The random 16 bits of an element: a hash of its position that two neighbours share, half of it each.

With j the half of the position and a, b the halves of the key, modulo 2^32,

    x = j WEYL + a;  x ^= x >> 16;  x = (x FIRST) ^ b;  x ^= x >> 15;  x = x SECOND

Even positions take the lower 16 bits of x, odd ones the upper. For any j every step is one to one in x, so
over all keys each value of 32 bits is met equally often.
"""

from __future__ import annotations

# The golden ratio and the multipliers of Chris Wellons' lowbias32; all odd.
WEYL, FIRST, SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
