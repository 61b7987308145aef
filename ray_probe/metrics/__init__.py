"""Figures of ended measurements for other programs: JSON lines, TensorBoard, Weights & Biases."""
