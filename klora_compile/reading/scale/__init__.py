"""By which number a file means its factors to be multiplied."""
