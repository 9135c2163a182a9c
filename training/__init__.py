"""Offline: data, the M-MTL network, fitting, calibration, evaluation and export."""

import os

import models  # noqa: F401  # before ONNX Runtime, which it keeps from reporting

# How long a thread that has done its share of a step spins before it lets another program have the
# core. As the library has it, a step beside another busy program takes several times as long
# (docs/training-beside.md). Read when torch is loaded, which is after this.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
