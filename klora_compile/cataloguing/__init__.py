"""Catalogues: from the profiles of a store to one file with every pair linked."""
