"""Memory that engines share: GPUs through NVML, host RAM, simulated."""
