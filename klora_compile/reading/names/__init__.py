"""From a file's keys to modules of diffusers' models, every key accounted for."""
