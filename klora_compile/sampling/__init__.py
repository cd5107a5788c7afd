"""From a fusion and a diffusers folder to pictures: what ``klora sample`` does."""
