"""The backends of the loss: plain torch, C++ on CPUs, and `triton`, which is installed from `kernels/triton`."""
