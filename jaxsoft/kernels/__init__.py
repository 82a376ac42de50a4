"""Kernels in Pallas for GPUs and TPUs: what `implementation` asks for."""
