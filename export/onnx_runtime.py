"""ONNX Runtime. Whoever needs it imports it from here, where it has been told to keep its telemetry off."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import; otherwise it writes a device id into the user's cache

import onnxruntime as onnxruntime
