"""The table of rules on the next base: rows, kept cells, candidates, pilot and a blind test."""
