"""The mapping of a file's keys to modules of diffusers' models; every key is accounted for."""
