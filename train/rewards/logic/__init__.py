"""Logic puzzles in families of SynLogic, with generators and verifiers of this project's own.

Each verifier checks the rules of its puzzle, so that any valid answer counts, and reads answers
with a small parser: no text of a model is ever evaluated.

Source: Liu et al., SynLogic (arXiv 2505.19641), for the families; MiniMax-M1 report, section 4.1.
"""
