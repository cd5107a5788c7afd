"""Calibration: a base model shows at compile time what each LoRA does alone.

    own pictures --record--> calls of the denoiser --moments or coefficients--> slots or a schedule

``recording`` runs the pipeline with one LoRA at a time; ``moments`` is what SSR-Merge needs of
that, ``coefficients`` what the fit of weights needs. ``calibrate`` leads through both.
"""
