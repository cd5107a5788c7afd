"""Which clock a schedule should follow: the step, or the noise level."""
