"""Private interfaces of torch, Triton and transformers, each with its public fallback: one module per library."""
