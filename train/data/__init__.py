"""Data of the training jobs, on Grain."""
