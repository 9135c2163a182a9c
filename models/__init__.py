"""The contract between training and serving: what a bundle is, and how an image is read."""

import os

# From 1.29 on ONNX Runtime reports to Microsoft what it runs and on what, and keeps a database of
# that and an id of the machine in the home directory (onnxruntime pull request 27379). Read when it
# is loaded, which is after this: whatever imports it here imports this package before.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
