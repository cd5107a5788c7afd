"""The compiler's use of base models: tables for reading files, and a file's family."""
