"""What only the compiler makes of base models: tables to read files by, a file's family."""
