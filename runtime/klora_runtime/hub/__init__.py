"""Files on the Hugging Face Hub: their names, the right one of a repository, the download."""
