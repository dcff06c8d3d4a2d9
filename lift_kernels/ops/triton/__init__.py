"""Triton kernels and their launchers: no argument validation, no autograd. Imported only when the
backend is chosen.

bf16 never takes part in arithmetic here: kernels see its int16 bit pattern and widen or round it
with integer operations (`numerics`), which are the same on a GPU and in Triton's interpreter, whose
own bf16 casts are wrong.
"""
