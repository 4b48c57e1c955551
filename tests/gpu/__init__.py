"""On a real NVIDIA GPU, with PyTorch and transformers and without vLLM. Skipped where any of them is missing."""
