"""The service: HTTP and images in, predictions out."""

import models  # noqa: F401  # before ONNX Runtime, which it keeps from reporting
