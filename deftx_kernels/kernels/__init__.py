"""Triton kernels and their launchers, one file per family. They import torch and triton alone."""
