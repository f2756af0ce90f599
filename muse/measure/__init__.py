"""Instruments: time, memory, arithmetic and errors, measured in the same way wherever they are asked for."""
