"""Private interfaces of torch, Triton, transformers and datasets, and what older versions lack."""
