"""Benchmarks: what is timed, what is compiled, and the tables made of both."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
