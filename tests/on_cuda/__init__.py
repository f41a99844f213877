"""What was written for a GPU: on CUDA where there is one, and as far as it means something there, on the CPU too."""
