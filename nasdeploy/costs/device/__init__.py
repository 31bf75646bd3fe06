"""Measures ONNX models where they run: only the standard library, numpy and onnxruntime, Python 3.8 or newer.

The same folder travels in a pack to devices that have nothing else, so nothing here imports nasdeploy.
"""
