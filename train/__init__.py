"""Training jobs: pre-training, supervised fine-tuning, reinforcement with CISPO."""
