"""Statistics of one LoRA: Top-K sums, L1 and Frobenius norms of its deltas, and their cache."""
