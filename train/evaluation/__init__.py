"""What a model has learnt: perplexity by position, needles by depth and length, RULER's tasks."""
