"""Triton kernels and their launchers, without argument validation and autograd.

The modules are imported only when the triton backend is chosen.

bf16 never takes part in arithmetic here. Kernels see its int16 bit pattern and widen or round it
with integer operations (`rounding`). These are the same on a GPU and in Triton's interpreter, whose
own bf16 casts are wrong.
"""
