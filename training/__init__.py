"""Offline: data, the M-MTL network, fitting, calibration, evaluation and export."""
