"""Sinks of figures: JSON lines, TensorBoard, Weights & Biases."""
