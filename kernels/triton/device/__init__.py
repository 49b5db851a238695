"""The Triton kernels themselves: code for the device."""
