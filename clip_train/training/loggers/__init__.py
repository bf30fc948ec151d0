"""Where metrics go: metrics.csv, TensorBoard, Weights & Biases; once per step, however often a run resumes."""
