"""What the Triton and CUDA kernels and the loops of the CPU ops compile to. Needs no GPU."""
