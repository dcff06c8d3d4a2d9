"""What the Triton and CUDA kernels compile to. Needs no GPU."""
