"""Triton kernels and their launchers: one file a stem, and common.py for what they share."""
